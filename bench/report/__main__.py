"""``python -m bench.report``: the same as ``python -m bench report``."""

import sys
from pathlib import Path

from . import main

main(map(Path, sys.argv[1:]))
