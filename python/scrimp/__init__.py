"""scrimp: LLM inference made cheaper by not doing work that does not matter."""

from importlib import metadata

from . import ops
from ._registry import implementations, which

try:
    __version__ = metadata.version("scrimp")
except metadata.PackageNotFoundError:  # a source tree on sys.path, not installed
    __version__ = "0+unknown"

__all__ = ["__version__", "implementations", "ops", "which"]
