"""Whole iterations of a recipe: the plain loop, the plain loop compiled, and the engine with one feature after another.

``contenders.py`` builds what can be timed, ``measuring.py`` times it, and measures its memory and its kernels, in processes of their own
(``process.py``), and ``rows.py`` has what comes of it, as a row, a file and a picture.
"""

from .contenders import networks
from .measuring import measure
from .rows import Row, draw, write

__all__ = ["Row", "draw", "measure", "networks", "write"]
