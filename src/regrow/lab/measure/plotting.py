"""What all plots have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Okabe and Ito's colours, told apart by colour-blind readers; line styles tell more lines apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
LINES = ("-", "--", ":", "-.")


def check_matplotlib() -> None:
    """Refuse early what could not be drawn.

    Raises:
        ImportError: if matplotlib is not installed (extra ``plot``).
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'regrow[plot]', or --no-plots") from error
    matplotlib.use("agg")


def save(figure: Any, file: Path) -> None:
    """Write a figure, and let go of it."""
    import matplotlib.pyplot as plt

    figure.savefig(file, dpi=130)
    plt.close(figure)
