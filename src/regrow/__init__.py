"""Faster diffusion sampling by computing fewer tokens at fewer steps.

import regrow

with regrow.apply(pipe, regrow.DaTo.preset("b1")) as run:
    image = pipe("an astronaut riding a horse", num_inference_steps=50).images[0]
print(run.report())
"""

from regrow.apply import Run, apply
from regrow.clock import ConcurrentGenerationError
from regrow.compiling import compile_blocks
from regrow.engine.call import Observation
from regrow.methods import (
    ATEDM,
    FORA,
    After,
    Alignment,
    BaseChoice,
    CATPruning,
    Combined,
    DaTo,
    DeepCache,
    Features,
    Recovery,
    Restored,
    Similarity,
    SiTo,
    ToCa,
    TokenChoice,
    ToMeSD,
)
from regrow.models import UnsupportedModelError
from regrow.run_report import RunReport
from regrow.schedule import FULL, Schedule, ScheduleError

__version__ = "0.1.0"

__all__ = [
    "ATEDM",
    "FORA",
    "FULL",
    "After",
    "Alignment",
    "BaseChoice",
    "CATPruning",
    "Combined",
    "ConcurrentGenerationError",
    "DaTo",
    "DeepCache",
    "Features",
    "Observation",
    "Recovery",
    "Restored",
    "Run",
    "RunReport",
    "Schedule",
    "ScheduleError",
    "SiTo",
    "Similarity",
    "ToCa",
    "ToMeSD",
    "TokenChoice",
    "UnsupportedModelError",
    "apply",
    "compile_blocks",
]
