"""First axis: what the student and the generator each minimise."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_fast import distributed
from dfkd_fast.kernels import js_discrepancy, kl_discrepancy, l1_discrepancy
from dfkd_fast.settings import NonNegative, Temperature, settings
from dfkd_fast.surgery import Observation

__all__ = ["Objective", "activation", "bn_moments", "class_nll", "embedding_norm", "entropy", "one_hot"]


@settings
class Objective:
    """Recipe section ``[objective]``: the student minimises a discrepancy, the generator a sum of weighted terms.

    A term of weight 0 is not computed. Terms that are no means over samples are those of the samples of all processes.
    """

    discrepancy: Literal["l1", "kl", "js"] = "l1"
    """Of the student: mean |s − t| over all logits (DFAD), KL(teacher ‖ student) a sample, or a pixel (MAD), or Jensen–Shannon."""
    temperature: Temperature = 1.0
    """Of the softmax in ``kl``, whose value is multiplied by temperature², and in ``js``, whose value is not."""
    adversary: Literal["l1", "log_l1", "kl", "js", "js_clamped"] = "l1"
    """The discrepancy D that the generator maximises: −D, or −log(1 + D) for ``log_l1`` (DFAD for segmentation).
    ``js_clamped`` is what PRE-DFKD's public code computes in place of ``js``: see :func:`clamped_js`."""
    adversarial_cap: NonNegative = 0.0
    """The generator gains nothing from a discrepancy above this (MAD, optional); 0 for no cap."""
    adversarial: NonNegative = 1.0
    """Weight of the adversary's term."""
    one_hot: NonNegative = 0.0
    """Weight of :func:`one_hot`."""
    entropy: NonNegative = 0.0
    """Weight of :func:`entropy`."""
    activation: NonNegative = 0.0
    """Weight of :func:`activation`."""
    bn_moments: NonNegative = 0.0
    """Weight of :func:`bn_moments`."""
    class_nll: NonNegative = 0.0
    """Weight of :func:`class_nll`; for conditional generators."""
    embedding_norm: NonNegative = 0.0
    """Weight of :func:`embedding_norm`; for conditional generators."""

    def __post_init__(self) -> None:
        if not self.adversarial and not self.has_non_adversarial_terms:
            raise ValueError("every weight of the generator's terms is 0: it would have nothing to learn")

    @property
    def has_non_adversarial_terms(self) -> bool:
        """Whether any term is left without the adversary's."""
        return any((self.one_hot, self.entropy, self.activation, self.bn_moments, self.class_nll))

    @property
    def conditional(self) -> bool:
        """Whether a term needs the class a sample was made for."""
        return bool(self.class_nll or self.embedding_norm)

    def student_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The student's discrepancy D(S, T), from logits of equal shape; 0-d."""
        return self._discrepancy(self.discrepancy, student, teacher)

    def generator_terms(
        self, student: Tensor | None, teacher: Observation, labels: Tensor | None = None, embeddings: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The generator's weighted terms by name, each 0-d; their sum is its loss.

        Args:
            student: its logits for the generated images; None leaves the adversary out.
            teacher: what it says of the same images, with the features and statistics that the terms need.
            labels: the classes the images were made for, (B,), where the generator is conditional.
            embeddings: those classes' embeddings, (B, latent_dim), likewise.
        """
        terms = {}
        if self.adversarial and student is not None:
            terms["adversarial"] = self.adversarial * self._adversarial(student, teacher.logits)
        if self.one_hot:
            terms["one_hot"] = self.one_hot * one_hot(teacher.logits)
        if self.entropy:
            terms["entropy"] = self.entropy * entropy(teacher.logits)
        if self.activation and teacher.features is not None:
            terms["activation"] = self.activation * activation(teacher.features)
        if self.bn_moments and teacher.statistics is not None and teacher.running is not None:
            terms["bn_moments"] = self.bn_moments * bn_moments(teacher.statistics, teacher.running)
        if self.class_nll and labels is not None:
            terms["class_nll"] = self.class_nll * class_nll(teacher.logits, labels)
        if self.embedding_norm and embeddings is not None:
            terms["embedding_norm"] = self.embedding_norm * embedding_norm(embeddings)
        return terms

    def _adversarial(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.adversary == "js_clamped":
            discrepancy = clamped_js(student, teacher, self.temperature)
        elif self.adversary == "log_l1":
            discrepancy = distributed.mean(self._discrepancy("l1", student, teacher)).log1p()
        else:
            discrepancy = self._discrepancy(self.adversary, student, teacher)
        return -(distributed.mean(discrepancy).clamp(max=self.adversarial_cap) if self.adversarial_cap else discrepancy)

    def _discrepancy(self, kind: Literal["l1", "kl", "js"], student: Tensor, teacher: Tensor) -> Tensor:
        if kind == "l1":
            return l1_discrepancy(student, teacher, reduction="mean")
        divergence = kl_discrepancy if kind == "kl" else js_discrepancy
        scaled = kind == "kl"
        total = divergence(student, teacher, temperature=self.temperature, reduction="batchmean", scale_by_temperature_squared=scaled)
        return total if student.ndim == 2 else total / student[0, 0].numel()


def one_hot(logits: Tensor) -> Tensor:
    """Cross-entropy of the teacher's logits with their own argmax: images it is sure about (DAFL, arXiv 1904.01186, eq. 2)."""
    return F.cross_entropy(logits.float(), logits.argmax(1))


def entropy(logits: Tensor) -> Tensor:
    """Σ p̄ log p̄ of the teacher's mean prediction p̄ over the batch: least when all classes are as frequent (DAFL, eq. 4)."""
    mean = distributed.mean(logits.float().softmax(1).movedim(1, -1).flatten(0, -2).mean(0))
    # Not entr: its gradient is infinite at 0, where a class that no sample is of underflows to.
    return (mean * mean.clamp(min=torch.finfo(mean.dtype).tiny).log()).sum()


def activation(features: Tensor) -> Tensor:
    """−mean |f| of what the teacher's classifier is given: images that excite it (DAFL, eq. 3)."""
    return -features.float().abs().mean()


def bn_moments(statistics: Tensor, running: Tensor) -> Tensor:
    """Σ ‖mean − running mean‖₂ + ‖var − running var‖₂ over the teacher's batch norms (MAD; DeepInversion, arXiv 1912.08795, eq. 4).

    Unsquared norms and biased variances, as in the CMI benchmark.

    Args:
        statistics: means and variances of the batch, (2, layers, C), zero where a layer has fewer channels.
        running: what they should be, likewise.
    """
    return (_of_all_processes(statistics, running) - running).norm(dim=2).sum()


def _of_all_processes(statistics: Tensor, running: Tensor) -> Tensor:
    """Means and variances of the batches of all processes together, in one message."""
    if distributed.world_size() == 1:
        return statistics
    # Second moments about the running means, which are the same everywhere and near: about 0 they would cancel.
    offset = statistics[0] - running[0]
    offset, square = distributed.mean(torch.stack([offset, statistics[1] + offset.square()])).unbind()
    return torch.stack([running[0] + offset, square - offset.square()])


def class_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood under the teacher of the classes that the images were made for (MAD)."""
    return F.cross_entropy(logits.float(), labels)


def embedding_norm(embeddings: Tensor) -> Tensor:
    """mean(max(‖e_y‖₂ − √dim, 0)) over the embeddings e_y of the drawn classes, (B, dim): e must not drown z (MAD)."""
    return (embeddings.norm(dim=1) - embeddings.shape[1] ** 0.5).clamp(min=0).mean()


def clamped_js(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """What PRE-DFKD's public code has for the Jensen–Shannon divergence, for runs that must agree with it.

    Probabilities are clamped to [.01, .99] and not renormalised, the divergences are KL(m ‖ p) in place of KL(p ‖ m), and
    the mean is over N·C. Where all probabilities are below .01, as those of flat logits over more than 100 classes, its gradient is 0.
    """
    p, q = ((logits.float() / temperature).softmax(1) for logits in (student, teacher))
    p, q, m = (probabilities.clamp(0.01, 0.99) for probabilities in (p, q, (p + q) / 2))
    return (m * (m.log() - p.log()) + m * (m.log() - q.log())).mean() / 2
