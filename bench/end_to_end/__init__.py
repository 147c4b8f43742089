"""Whole iterations of a recipe: the plain loop, the plain loop compiled, and the engine with one feature after another.

``contenders.py`` builds what can be timed, ``measuring.py`` measures its times, its memory and its kernels in a process of its own, and
``rows.py`` has the results as rows, a file and a plot.
"""

from .contenders import networks
from .measuring import measure
from .rows import Row, draw, write

__all__ = ["Row", "draw", "measure", "networks", "write"]
