"""Faster diffusion sampling by computing fewer tokens at fewer steps.

import regrow

with regrow.apply(pipe, regrow.DaTo.preset("b1")) as run:
    image = pipe("an astronaut riding a horse", num_inference_steps=50).images[0]
print(run.report())
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from regrow.apply import Run, apply
from regrow.control import Control
from regrow.core.call import Observation
from regrow.core.clock import ConcurrentGenerationError
from regrow.core.compiling import compile_blocks
from regrow.core.recipe import CallInfo, Recipe, recipe_of
from regrow.methods.adaptive import Adaptive
from regrow.methods.atedm import ATEDM, Restored, Similarity
from regrow.methods.base import About, MethodConfig, Role, register
from regrow.methods.cat import CATPruning, TokenChoice
from regrow.methods.combined import Combined
from regrow.methods.dato import DaTo
from regrow.methods.deepcache import DeepCache
from regrow.methods.fora import FORA
from regrow.methods.l2p import L2P
from regrow.methods.pruning import Features, PruneAfter, TokenRule, Where
from regrow.methods.sito import BaseChoice, SiTo
from regrow.methods.spectrum import Spectrum
from regrow.methods.taylorseer import ForecastLevel, TaylorSeer
from regrow.methods.toca import ToCa
from regrow.methods.tokencache import TokenCache
from regrow.methods.tome import ToMeSD
from regrow.models import UnsupportedModelError
from regrow.recover.space import Recovery
from regrow.recover.time import Chebyshev, Fitted, Reuse, Taylor, TimeRecovery
from regrow.report import RunReport
from regrow.schedule import FULL, Plan, Schedule, ScheduleError
from regrow.tokens.alignment import Alignment

if TYPE_CHECKING:
    from regrow.lab.calibration.calibrate import calibrate
    from regrow.lab.calibration.recording import Recording, record

__version__ = "0.1.0"

__all__ = [
    "ATEDM",
    "FORA",
    "FULL",
    "L2P",
    "About",
    "Adaptive",
    "Alignment",
    "BaseChoice",
    "CATPruning",
    "CallInfo",
    "Chebyshev",
    "Combined",
    "ConcurrentGenerationError",
    "Control",
    "DaTo",
    "DeepCache",
    "Features",
    "Fitted",
    "ForecastLevel",
    "MethodConfig",
    "Observation",
    "Plan",
    "PruneAfter",
    "Recipe",
    "Recording",
    "Recovery",
    "Restored",
    "Reuse",
    "Role",
    "Run",
    "RunReport",
    "Schedule",
    "ScheduleError",
    "SiTo",
    "Similarity",
    "Spectrum",
    "Taylor",
    "TaylorSeer",
    "TimeRecovery",
    "ToCa",
    "ToMeSD",
    "TokenCache",
    "TokenChoice",
    "TokenRule",
    "UnsupportedModelError",
    "Where",
    "apply",
    "calibrate",
    "compile_blocks",
    "recipe_of",
    "record",
    "register",
]

# Imported when asked for: they bring diffusers and its pipelines.
_LAB = {"calibrate": "calibrate", "Recording": "recording", "record": "recording"}

if not TYPE_CHECKING:
    # Type checkers would take any name for one that is there.
    def __getattr__(name: str) -> Any:
        if name not in _LAB:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"regrow.lab.calibration.{_LAB[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
