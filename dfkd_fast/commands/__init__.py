"""What the command line does: distil, teach, evaluate."""

from .distill import distill, teach
from .evaluate import Evaluated, Wanted, evaluate_weights

__all__ = ["Evaluated", "Wanted", "distill", "evaluate_weights", "teach"]
