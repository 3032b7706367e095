"""What a run's calls did, as its report tells it, without counting MACs: that takes longer than the run."""

from __future__ import annotations

import regrow
from regrow.report import CallRow, _row


def rows_of(run: regrow.Run) -> list[CallRow]:
    """The rows of the report; no MACs are in them."""
    generation = run._engine.generation
    assert generation is not None
    return [_row(record, run._engine, None) for record in generation.records]
