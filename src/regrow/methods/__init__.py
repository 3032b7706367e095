"""One file a published system: its configuration, and how it is made of the parts."""

from regrow.methods.dato import DaTo
from regrow.methods.parts import Alignment, Features, MethodConfig, Recovery
from regrow.methods.sito import BaseChoice, SiTo

__all__ = ["Alignment", "BaseChoice", "DaTo", "Features", "MethodConfig", "Recovery", "SiTo"]
