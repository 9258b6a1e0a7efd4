"""The build scripts of native/ are not a package: import them by path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "native"))
