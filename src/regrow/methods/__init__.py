"""One file a published system: its configuration, and how it is made of the parts."""

from regrow.methods.atedm import ATEDM, Restored, Similarity
from regrow.methods.cat import CATPruning, TokenChoice
from regrow.methods.combined import Combined
from regrow.methods.dato import DaTo
from regrow.methods.deepcache import DeepCache
from regrow.methods.fora import FORA
from regrow.methods.parts import After, Alignment, Features, MethodConfig, Recovery
from regrow.methods.sito import BaseChoice, SiTo
from regrow.methods.toca import ToCa
from regrow.methods.tome import ToMeSD

__all__ = [
    "ATEDM",
    "FORA",
    "After",
    "Alignment",
    "BaseChoice",
    "CATPruning",
    "Combined",
    "DaTo",
    "DeepCache",
    "Features",
    "MethodConfig",
    "Recovery",
    "Restored",
    "SiTo",
    "Similarity",
    "ToCa",
    "ToMeSD",
    "TokenChoice",
]
