"""The losses of the epoch under way."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dfkd_fast import distributed
from dfkd_fast.errors import NonFiniteLossError

from .method import Loop

__all__ = ["LossLog", "check_pretraining"]


class LossLog:
    """Every loss of the epoch under way, kept on the device, so that no step waits for a number.

    Args:
        loop: how many iterations an epoch has, and how many steps an iteration.
        learned: losses that the replay's own learning gives beside the student's, by name, and in how many student steps of an
            iteration each is computed.
        device: of the losses.
    """

    def __init__(self, loop: Loop, learned: Mapping[str, int], device: torch.device) -> None:
        self.values: dict[str, Tensor] = {}
        """By term: (iterations_per_epoch, steps)."""
        self._loop = loop
        self._student_steps = {"student": loop.student_steps} | {name: min(loop.student_steps, steps) for name, steps in learned.items()}
        self._device = device

    def record(self, losses: Mapping[str, Tensor], iteration: int, step: int) -> None:
        """Keep the losses, 0-d, of a step, both counted from 0."""
        for name, loss in losses.items():
            if name not in self.values:
                steps = self._student_steps.get(name, self._loop.generator_steps)
                self.values[name] = torch.zeros(self._loop.iterations_per_epoch, steps, device=self._device)
            self.values[name][iteration, step] = loss

    def means(self, iterations: int) -> dict[str, float]:
        """Of the first so many iterations, by term; waits for the device."""
        return {name: float(values[: max(iterations, 1)].mean()) for name, values in self.values.items()}

    def check_finite(self, iterations: int, epoch: int) -> None:
        """Look at the losses of the first so many iterations, in all processes; waits for the device.

        Args:
            iterations: how many were taken.
            epoch: its number, as an error calls it.

        Raises:
            NonFiniteLossError: one is NaN or infinite; the message names the first.
        """
        # A loss that is NaN in one process is NaN in the mean, so that all of them stop.
        distributed.average_(list(self.values.values()))
        nonfinite = []
        for name, values in self.values.items():
            indices = (~values[:iterations].isfinite()).nonzero()
            if len(indices):
                row, column = indices[0].tolist()
                # The player who comes first in an iteration sorts first.
                later = (name in self._student_steps) == self._loop.generator_first
                nonfinite.append((row, later, column, name))
        if nonfinite:
            row, _, column, name = min(nonfinite)
            player = "student" if name in self._student_steps else "generator"
            where = f"{player} step {column + 1} of iteration {row + 1}, epoch {epoch}"
            raise NonFiniteLossError(f"the {player}'s loss term {name!r} is {float(self.values[name][row, column])} at {where}")


def check_pretraining(terms: Mapping[str, Tensor], steps: int) -> None:
    """Look at the generator's terms, 0-d, of the last of so many steps of its pretraining, in all processes; waits for the device.

    Raises:
        NonFiniteLossError: one is NaN or infinite.
    """
    distributed.average_(list(terms.values()))  # so that all processes stop
    for name, term in terms.items():
        if not term.isfinite():
            raise NonFiniteLossError(f"the generator's loss term {name!r} is {term.item()} after {steps} steps of its pretraining")
