"""What each command does and prints."""

from .candidates import EvaluationRequest
from .distill import distill, fitted, teach
from .doctor import Check, check_teacher, print_machine, print_teacher
from .evaluate import Evaluated, EvaluatedClassifier, EvaluatedSegmenter, evaluate_and_print, evaluate_weights
from .recipes import compare_runs, print_recipes

__all__ = [
    "Check",
    "Evaluated",
    "EvaluatedClassifier",
    "EvaluatedSegmenter",
    "EvaluationRequest",
    "check_teacher",
    "compare_runs",
    "distill",
    "evaluate_and_print",
    "evaluate_weights",
    "fitted",
    "print_machine",
    "print_recipes",
    "print_teacher",
    "teach",
]
