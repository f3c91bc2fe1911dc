"""Puts this folder on the path: the emulator is the package `ptx`, its helpers lie beside it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
