"""Measure what a method costs and saves: MACs, time, and the distance to the unaccelerated picture."""

from regrow.lab.measure.architectures import NAMES, Architecture, architecture, architecture_of
from regrow.lab.measure.images import contact_sheet, feature_distances, mean_psnr, psnr
from regrow.lab.measure.macs import Profile, profile

__all__ = [
    "NAMES",
    "Architecture",
    "Profile",
    "architecture",
    "architecture_of",
    "contact_sheet",
    "feature_distances",
    "mean_psnr",
    "profile",
    "psnr",
]
