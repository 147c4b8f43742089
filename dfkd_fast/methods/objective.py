"""First axis of a method, the objective: the losses of the student and of the generator."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_fast import distributed
from dfkd_fast.kernels import js_discrepancy, kl_discrepancy, l1_discrepancy
from dfkd_fast.settings import NonNegative, Positive, Temperature, settings
from dfkd_fast.surgery import Observation

__all__ = ["Objective", "activation", "bn_moments", "bn_moments_norm", "class_nll", "embedding_norm", "entropy", "feature_loss", "one_hot"]


@settings
class Objective:
    """Recipe section ``[objective]``: losses of the student and of the generator.

    The student minimizes ``student_weight`` times a discrepancy between its logits and the teacher's; the generator minimizes a weighted
    sum of terms. Terms of weight 0 are not computed. With several processes, terms that are not means over samples are computed over the
    global batch.
    """

    discrepancy: Literal["l1", "kl", "js"] = "l1"
    """Loss of the student: ``l1`` is the mean of |s − t| over all logits (DFAD), ``kl`` is KL(teacher ‖ student) and ``js`` the
    Jensen–Shannon divergence, both averaged over samples, or over pixels for segmentation (MAD)."""
    student_weight: Positive = 1.0
    """Factor of the student's loss. 2 gives the sum of the discrepancies over fresh and over replayed samples at ``replay.share = 0.5``."""
    temperature: Temperature = 1.0
    """Temperature of the softmax in ``kl`` and ``js``. The value of ``kl`` is multiplied by temperature², that of ``js`` is not."""
    adversary: Literal["l1", "log_l1", "kl", "js", "js_clamped"] = "l1"
    """Discrepancy D that the generator maximizes. Its loss term is −D, or −log(1 + D) for ``log_l1`` (DFAD for segmentation).
    ``js_clamped`` is the variant of ``js`` in PRE-DFKD's public code, see :func:`clamped_js`."""
    adversarial_cap: NonNegative = 0.0
    """Upper bound on the discrepancy in the adversarial term (optional in MAD); 0 disables it."""
    adversarial_rows: Literal["all", "agreeing"] = "all"
    """Samples, or pixels for segmentation, in the adversarial term: ``agreeing`` keeps those that student and teacher assign to the same
    class and counts the others as D = 0, so that the generator does not move where the student is already wrong (public code of CMI,
    arXiv 2105.08584)."""
    adversarial: NonNegative = 1.0
    """Weight of the adversarial term."""
    one_hot: NonNegative = 0.0
    """Weight of :func:`one_hot`."""
    entropy: NonNegative = 0.0
    """Weight of :func:`entropy`."""
    activation: NonNegative = 0.0
    """Weight of :func:`activation`."""
    bn_moments: NonNegative = 0.0
    """Weight of :func:`bn_moments`."""
    attention: NonNegative = 0.0
    """Weight of attention transfer (arXiv 1612.03928) in the student's loss: spatial attention maps of teacher and student are compared,
    see :class:`~dfkd_fast.surgery.FeatureVectors`. It is added to ``discrepancy`` for every sample that the teacher is run on: not for
    replayed samples with stored logits. The public code of ZSKT (arXiv 1905.09768) uses 250."""
    hint: NonNegative = 0.0
    """Weight of the hint of FitNets (arXiv 1412.6550) in the student's loss, for the samples of ``attention``: the smallest feature map
    of the teacher is compared with that of the student after a learned projection, see :class:`~dfkd_fast.surgery.FeatureVectors`."""
    features: NonNegative = 0.0
    """Weight of the mean squared distance between the inputs of layers that teacher and student share, each divided by its norm, in the
    loss of a student that is a copy of the teacher, such as a quantized one; for the samples of ``attention``. See
    :class:`~dfkd_fast.surgery.FeatureVectors` and :func:`~dfkd_fast.surgery.shared_layers`."""
    class_nll: NonNegative = 0.0
    """Weight of :func:`class_nll`; requires a conditional generator."""
    embedding_norm: NonNegative = 0.0
    """Weight of :func:`embedding_norm`; requires a conditional generator."""

    def __post_init__(self) -> None:
        if not self.adversarial and not self.has_non_adversarial_terms:
            raise ValueError("every weight of the generator's terms is 0: at least one must be positive")

    @property
    def has_non_adversarial_terms(self) -> bool:
        """Whether a term other than the adversarial one provides a gradient to the generator."""
        return any((self.one_hot, self.entropy, self.activation, self.bn_moments, self.class_nll))

    @property
    def compares_features(self) -> bool:
        """Whether the student's loss compares feature maps, not only logits."""
        return bool(self.attention or self.hint or self.features)

    @property
    def conditional(self) -> bool:
        """Whether a term requires the class labels of a conditional generator."""
        return bool(self.class_nll or self.embedding_norm)

    def student_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the student's discrepancy D(S, T) as a 0-d tensor, without ``student_weight``.

        Args:
            student: Logits (B, classes) or (B, classes, H, W).
            teacher: Logits of the same shape.
        """
        return self._discrepancy(self.discrepancy, student, teacher)

    def generator_terms(
        self, student: Tensor | None, teacher: Observation, labels: Tensor | None = None, embeddings: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Returns the weighted loss terms of the generator by name, each a 0-d tensor. Their sum is its loss.

        Args:
            student: Logits of the student for the generated images; None omits the adversarial term.
            teacher: Teacher outputs for the same images: logits, and the features and batch statistics that the terms require.
            labels: Class labels (B,) passed to a conditional generator.
            embeddings: Embeddings (B, latent_dim) of these classes.
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
        if self.adversarial_rows == "agreeing":
            agreeing = student.argmax(1, keepdim=True) == teacher.argmax(1, keepdim=True)
            # Equal logits, whose discrepancy and its gradient are 0.
            teacher = torch.where(agreeing, teacher, 0)
            student = torch.where(agreeing, student, 0)
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


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns the mean squared distance between feature vectors of student and teacher, 0-d.

    With the vectors of :class:`~dfkd_fast.surgery.FeatureVectors` it is the weighted sum of the terms that compare features.

    Args:
        student: Feature vectors (B, D).
        teacher: Feature vectors of the same shape.
    """
    return F.mse_loss(student, teacher, reduction="sum") / len(student)


def one_hot(logits: Tensor) -> Tensor:
    """Returns the cross-entropy between the teacher's logits and their argmax, 0-d (DAFL, arXiv 1904.01186, eq. 2).

    It is small for images that the teacher classifies with high confidence.
    """
    return F.cross_entropy(logits.float(), logits.argmax(1))


def entropy(logits: Tensor) -> Tensor:
    """Returns the negative entropy Σ p̄ log p̄ of the teacher's mean prediction p̄ over the global batch, 0-d (DAFL, eq. 4).

    Its minimum is a uniform distribution over the classes.
    """
    mean = distributed.mean(logits.float().softmax(1).movedim(1, -1).flatten(0, -2).mean(0))
    # Not torch.special.entr: its gradient is infinite at 0, and the probability of a class without samples underflows to 0.
    return (mean * mean.clamp(min=torch.finfo(mean.dtype).tiny).log()).sum()


def activation(features: Tensor) -> Tensor:
    """Returns −mean |f| over the input features f of the teacher's classification layer, 0-d (DAFL, eq. 3)."""
    return -features.float().abs().mean()


def bn_moments(statistics: Tensor, running: Tensor) -> Tensor:
    """Returns Σ ‖mean − running mean‖₂ + ‖var − running var‖₂ over the teacher's batch norms, 0-d.

    The norms are not squared and the variances are biased, as in the CMI benchmark (MAD; DeepInversion, arXiv 1912.08795, eq. 4).

    Args:
        statistics: Per-channel means and variances of the batch, (2, layers, C), padded with zeros for layers with fewer channels.
        running: Running means and variances, of the same shape.
    """
    return (_global_moments(statistics, running) - running).norm(dim=2).sum()


def bn_moments_norm(running: Tensor) -> Tensor:
    """Returns Σ ‖running mean‖₂ + ‖running var‖₂ over the teacher's batch norms, 0-d: :func:`bn_moments` of activations that are all 0.

    Args:
        running: Running means and variances, (2, layers, C).
    """
    return running.norm(dim=2).sum()


def _global_moments(statistics: Tensor, running: Tensor) -> Tensor:
    """Returns means and variances of the global batch, with one all-reduce."""
    if distributed.world_size() == 1:
        return statistics
    # Second moments about the running means, which are equal on all processes and close to the batch means: about 0 they would cancel.
    offset = statistics[0] - running[0]
    offset, square = distributed.mean(torch.stack([offset, statistics[1] + offset.square()])).unbind()
    return torch.stack([running[0] + offset, square - offset.square()])


def class_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross-entropy between the teacher's logits and the labels passed to a conditional generator, 0-d (MAD)."""
    return F.cross_entropy(logits.float(), labels)


def embedding_norm(embeddings: Tensor) -> Tensor:
    """Returns mean(max(‖e_y‖₂ − √dim, 0)) over class embeddings e_y (B, dim), 0-d (MAD).

    It keeps the embeddings at the scale of the latents z ~ N(0, I).
    """
    return (embeddings.norm(dim=1) - embeddings.shape[1] ** 0.5).clamp(min=0).mean()


def clamped_js(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Returns the Jensen–Shannon divergence as implemented in PRE-DFKD's public code, 0-d.

    The code deviates from the definition: probabilities are clamped to [0.01, 0.99] without renormalization, KL(m ‖ p) replaces
    KL(p ‖ m), and the mean is taken over N·C. The gradient is 0 where all probabilities are below 0.01, for example for uniform
    predictions over more than 100 classes.
    """
    p, q = ((logits.float() / temperature).softmax(1) for logits in (student, teacher))
    p, q, m = (probabilities.clamp(0.01, 0.99) for probabilities in (p, q, (p + q) / 2))
    return (m * (m.log() - p.log()) + m * (m.log() - q.log())).mean() / 2
