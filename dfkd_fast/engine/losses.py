"""Recording of losses during an epoch."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dfkd_fast import distributed
from dfkd_fast.errors import NonFiniteLossError

from .method import Loop

__all__ = ["LossLog", "check_pretraining"]


class LossLog:
    """All losses of the current epoch, kept on the device so that no step synchronizes.

    Args:
        loop: Number of iterations per epoch and of steps per iteration.
        replay_losses: Losses of the replay source by name, with the number of student steps per iteration that compute each.
        device: Device of the losses.
    """

    def __init__(self, loop: Loop, replay_losses: Mapping[str, int], device: torch.device) -> None:
        self.values: dict[str, Tensor] = {}
        """Losses by name, (iterations_per_epoch, steps)."""
        self._loop = loop
        self._student_steps = {"student": loop.student_steps}
        self._student_steps |= {name: min(loop.student_steps, steps) for name, steps in replay_losses.items()}
        self._device = device

    def record(self, losses: Mapping[str, Tensor], iteration: int, step: int) -> None:
        """Records the losses of a step.

        Args:
            losses: 0-d tensors by name.
            iteration: Index of the iteration in the epoch, from 0.
            step: Index of the step in the iteration, from 0.
        """
        for name, loss in losses.items():
            if name not in self.values:
                steps = self._student_steps.get(name, self._loop.generator_steps)
                self.values[name] = torch.zeros(self._loop.iterations_per_epoch, steps, device=self._device)
            self.values[name][iteration, step] = loss

    def means(self, iterations: int) -> dict[str, float]:
        """Returns the mean of each loss over the first iterations of the epoch, by name. Synchronizes the device."""
        return {name: float(values[: max(iterations, 1)].mean()) for name, values in self.values.items()}

    def check_finite(self, iterations: int, epoch: int) -> None:
        """Checks the losses of the first iterations on all processes, and averages them over processes. Synchronizes the device.

        Args:
            iterations: Number of completed iterations.
            epoch: Number of the epoch, for the error message.

        Raises:
            NonFiniteLossError: A loss is NaN or infinite. The message names the first one.
        """
        # A loss that is NaN on one process is NaN in the mean, so all processes raise.
        distributed.average_(list(self.values.values()))
        nonfinite = []
        for name, values in self.values.items():
            indices = (~values[:iterations].isfinite()).nonzero()
            if len(indices):
                row, column = indices[0].tolist()
                # Sorted by order of execution: generator steps come first with loop.generator_first.
                second = (name in self._student_steps) == self._loop.generator_first
                nonfinite.append((row, second, column, name))
        if nonfinite:
            row, _, column, name = min(nonfinite)
            role = "student" if name in self._student_steps else "generator"
            where = f"{role} step {column + 1} of iteration {row + 1}, epoch {epoch}"
            raise NonFiniteLossError(f"the {role}'s loss term {name!r} is {float(self.values[name][row, column])} at {where}")


def check_pretraining(terms: Mapping[str, Tensor], steps: int) -> None:
    """Checks the generator's loss terms of the last pretraining step on all processes. Synchronizes the device.

    Args:
        terms: 0-d tensors by name.
        steps: Number of completed pretraining steps, for the error message.

    Raises:
        NonFiniteLossError: A term is NaN or infinite.
    """
    distributed.average_(list(terms.values()))  # so that all processes raise
    for name, term in terms.items():
        if not term.isfinite():
            raise NonFiniteLossError(f"the generator's loss term {name!r} is {term.item()} after {steps} pretraining steps")
