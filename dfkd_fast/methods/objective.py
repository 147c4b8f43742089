"""First axis: what the student and the generator each minimise."""

from typing import Literal

from torch import Tensor

from dfkd_fast.kernels import kl_discrepancy, l1_discrepancy
from dfkd_fast.settings import NonNegative, Positive, settings

__all__ = ["Objective"]


@settings
class Objective:
    """Recipe section ``[objective]``: the student minimises a discrepancy, the generator a sum of weighted terms."""

    discrepancy: Literal["l1", "kl"] = "l1"
    """Of the student: mean |s − t| over all logits (DFAD), or KL(teacher ‖ student) a sample (MAD)."""
    temperature: Positive = 1.0
    """Of the softmax in ``kl``, whose value is multiplied by temperature²."""
    adversary: Literal["l1", "log_l1", "kl"] = "l1"
    """The discrepancy D that the generator maximises: −D, or −log(1 + D) for ``log_l1`` (DFAD for segmentation)."""
    adversarial: NonNegative = 1.0
    """Weight of that term."""

    def student_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The student's discrepancy D(S, T), from logits of equal shape; 0-d."""
        return self._discrepancy(self.discrepancy, student, teacher)

    def generator_terms(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """The generator's weighted terms by name, each 0-d; their sum is its loss."""
        if self.adversary == "log_l1":
            adversarial = -self._discrepancy("l1", student, teacher).log1p()
        else:
            adversarial = -self._discrepancy(self.adversary, student, teacher)
        return {"adversarial": self.adversarial * adversarial}

    def _discrepancy(self, kind: Literal["l1", "kl"], student: Tensor, teacher: Tensor) -> Tensor:
        if kind == "l1":
            return l1_discrepancy(student, teacher, reduction="mean")
        return kl_discrepancy(student, teacher, temperature=self.temperature, reduction="batchmean", scale_by_temperature_squared=True)
