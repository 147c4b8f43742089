"""What the command line does: distil, teach, evaluate."""

from .distill import distill, fitted, teach
from .evaluate import Evaluated, Wanted, evaluate_weights
from .examine import Check, examine_teacher

__all__ = ["Check", "Evaluated", "Wanted", "distill", "evaluate_weights", "examine_teacher", "fitted", "teach"]
