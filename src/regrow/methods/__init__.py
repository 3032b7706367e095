"""One file a published system: its configuration, and how it is made of the parts.

Every file of this folder is imported, so that its methods are registered.
"""

from importlib import import_module
from pkgutil import iter_modules

from regrow.core.recipe import (
    After,
    Alignment,
    Attention,
    CallInfo,
    Features,
    Recipe,
    Recovery,
    Where,
    recipe_of,
)
from regrow.methods.adaptive import Adaptive
from regrow.methods.atedm import ATEDM, Restored, Similarity
from regrow.methods.base import (
    About,
    DenoiserKind,
    MethodConfig,
    Options,
    Role,
    Status,
    TextError,
    register,
)
from regrow.methods.cat import CATPruning, TokenChoice
from regrow.methods.combined import Combined
from regrow.methods.dato import DaTo
from regrow.methods.deepcache import DeepCache
from regrow.methods.fora import FORA
from regrow.methods.l2p import L2P
from regrow.methods.pruning import TokenRule
from regrow.methods.sito import BaseChoice, SiTo
from regrow.methods.spectrum import Spectrum
from regrow.methods.taylorseer import ForecastLevel, TaylorSeer
from regrow.methods.toca import ToCa
from regrow.methods.tokencache import TokenCache
from regrow.methods.tome import ToMeSD

__all__ = [
    "ATEDM",
    "FORA",
    "L2P",
    "About",
    "Adaptive",
    "After",
    "Alignment",
    "Attention",
    "BaseChoice",
    "CATPruning",
    "CallInfo",
    "Combined",
    "DaTo",
    "DeepCache",
    "DenoiserKind",
    "Features",
    "ForecastLevel",
    "MethodConfig",
    "Options",
    "Recipe",
    "Recovery",
    "Restored",
    "Role",
    "SiTo",
    "Similarity",
    "Spectrum",
    "Status",
    "TaylorSeer",
    "TextError",
    "ToCa",
    "ToMeSD",
    "TokenCache",
    "TokenChoice",
    "TokenRule",
    "Where",
    "recipe_of",
    "register",
]

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
