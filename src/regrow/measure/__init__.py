"""What a method costs and saves: MACs, time, and the distance to the unaccelerated picture."""

from regrow.measure.architectures import NAMES, Architecture, architecture, architecture_of
from regrow.measure.images import contact_sheet, feature_distances, mean_psnr, psnr
from regrow.measure.macs import Profile, profile

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
