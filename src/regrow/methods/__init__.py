"""One file a published system: its configuration, and how it is made of the parts.

Every file of this folder is imported, so that its methods are registered.
"""

from importlib import import_module
from pkgutil import iter_modules

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
