"""Whole iterations of a recipe: the plain loop, eager and compiled, and the engine with one feature enabled after another.

``contenders.py`` builds what is timed, ``measuring.py`` measures times, memory and kernels in one process per contender, ``rows.py`` holds
the results as rows of a CSV, and ``plots.py`` plots them; it is not imported here, because the processes do not need matplotlib.
"""

from .contenders import networks
from .measuring import measure
from .rows import Row, read, write

__all__ = ["Row", "measure", "networks", "read", "write"]
