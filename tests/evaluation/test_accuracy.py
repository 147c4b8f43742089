import pytest
import torch
from torch import Tensor, nn

from dfkd_fast import DfkdError
from dfkd_fast.evaluation import evaluate, top1_accuracy


class Identity(nn.Module):
    """Returns images (B, classes, 1, 1) as logits (B, classes)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def images(predicted: list[int], classes: int) -> Tensor:
    return torch.eye(classes)[predicted][:, :, None, None] - 0.5


@pytest.mark.parametrize(
    ("predicted", "labels", "classes", "percent"),
    [
        ([[0, 1, 2], [3, 0]], [[0, 1, 2], [3, 0]], 4, 100.0),
        ([[0, 1, 2], [3, 0]], [[1, 2, 3], [0, 1]], 4, 0.0),
        ([[0, 1, 2], [3, 0]], [[0, 1, 0], [3, 3]], 4, 60.0),
        # Different batch sizes and class frequencies: the accuracy is neither a mean over batches nor over classes.
        ([[0], [0, 0, 0, 1, 1, 1, 1]], [[1], [0, 0, 0, 0, 0, 0, 0]], 2, 100 * 3 / 8),
        ([[99]], [[99]], 100, 100.0),
    ],
)
def test_top1_accuracy_is_the_percentage_of_correct_predictions(
    predicted: list[list[int]], labels: list[list[int]], classes: int, percent: float
) -> None:
    batches = [(images(guess, classes), torch.tensor(truth)) for guess, truth in zip(predicted, labels, strict=True)]
    assert top1_accuracy(Identity(), batches) == pytest.approx(percent, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_top1_accuracy_of_random_logits_equals_a_manual_count(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # Permutations of integers have no ties in any dtype.
    logits = torch.stack([torch.randperm(7) for _ in range(101)]).to(dtype)
    labels = torch.randint(0, 7, (101,))
    correct = sum(max(range(7), key=row.__getitem__) == label for row, label in zip(logits.tolist(), labels.tolist(), strict=True))
    batches = [(part[:, :, None, None], truth) for part, truth in zip(logits.split(10), labels.split(10), strict=True)]
    assert top1_accuracy(Identity(), batches) == pytest.approx(100 * correct / 101, rel=1e-12)


def batch_norm_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten())


@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_evaluated_in_evaluation_mode_and_restored(training: bool) -> None:
    network = batch_norm_network().train(training)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    inputs, labels = torch.randn(50, 3, 1, 1) + torch.tensor([4.0, 0.0, 0.0])[:, None, None], torch.zeros(50, dtype=torch.long)
    # Running statistics keep the first logit 4 larger than the others; batch statistics would remove the offset.
    assert top1_accuracy(network, [(inputs, labels)]) > 90
    assert all(module.training == training for module in network.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_when_the_network_fails(training: bool) -> None:
    network = nn.Sequential(nn.Linear(5, 2)).train(training)
    with pytest.raises(RuntimeError, match="shape"):
        top1_accuracy(network, [(torch.zeros(2, 3, 1, 1), torch.zeros(2, dtype=torch.long))])
    assert all(module.training == training for module in network.modules())


def test_no_graph_is_recorded() -> None:
    network, recorded = nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), []

    def record(_: nn.Module, __: tuple[Tensor, ...], logits: Tensor) -> None:
        recorded.append(logits.requires_grad)

    network.register_forward_hook(record)
    top1_accuracy(network, [(torch.randn(2, 3, 1, 1), torch.zeros(2, dtype=torch.long))] * 2)
    assert recorded == [False, False]


def test_evaluation_without_images_is_refused() -> None:
    with pytest.raises(ValueError, match="no images"):
        top1_accuracy(Identity(), [])


class Shifted(Identity):
    """Adds a constant offset to the logits."""

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shift


def random_batches(classes: int) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(1)
    logits, labels = torch.randn(53, classes), torch.randint(0, classes, (53,))
    return logits, labels, [(x[:, :, None, None], y) for x, y in zip(logits.split(10), labels.split(10), strict=True)]


@pytest.mark.parametrize("classes", [2, 5, 6, 40])
def test_top5_accuracy_is_the_percentage_of_labels_among_the_five_largest_logits(classes: int) -> None:
    logits, labels, batches = random_batches(classes)
    metrics = evaluate({"a": Identity()}, batches).networks["a"]
    ranks = [int((row > row[label]).sum()) for row, label in zip(logits, labels, strict=True)]
    assert metrics.top1 == pytest.approx(100 * sum(rank == 0 for rank in ranks) / 53, rel=1e-12)
    assert metrics.top5 == pytest.approx(100 * sum(rank < 5 for rank in ranks) / 53, rel=1e-12)


def test_agreement_is_a_percentage_and_the_divergence_a_mean_over_images() -> None:
    logits, labels, batches = random_batches(7)
    shift = torch.randn(7)
    evaluation = evaluate({"teacher": Identity(), "student": Shifted(shift)}, batches, reference="teacher")
    (agreement,) = evaluation.agreements
    assert (agreement.network, agreement.reference) == ("student", "teacher")
    teacher, student = logits.double(), logits.double() + shift.double()
    assert agreement.top1 == pytest.approx(100 * (teacher.argmax(1) == student.argmax(1)).double().mean().item(), rel=1e-12)
    assert 0 < agreement.top1 < 100
    p, log_ratio = teacher.softmax(1), teacher.log_softmax(1) - student.log_softmax(1)
    assert agreement.mean_kl == pytest.approx((p * log_ratio).sum(1).mean().item(), rel=1e-5)
    assert evaluation.count == 53
    assert evaluation.networks["student"].top1 == pytest.approx(100 * (student.argmax(1) == labels).double().mean().item(), rel=1e-12)


def test_without_a_reference_there_is_no_agreement() -> None:
    _, _, batches = random_batches(3)
    assert evaluate({"a": Identity(), "b": Identity()}, batches).agreements == []


def test_the_total_time_is_the_sum_of_decode_and_network_time() -> None:
    _, _, batches = random_batches(3)
    evaluation = evaluate({"a": Identity()}, batches)
    assert evaluation.seconds["decode"] > 0
    assert evaluation.seconds["network"] > 0
    assert evaluation.seconds["decode"] + evaluation.seconds["network"] == pytest.approx(evaluation.seconds["total"])
    assert evaluation.images_per_second == pytest.approx(53 / evaluation.seconds["total"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_output_is_an_error(value: float) -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = value
    with pytest.raises(DfkdError, match="network a: its output is NaN or infinite on 1 of 3 images"):
        evaluate({"a": Identity()}, [(logits[:, :, None, None], torch.zeros(3, dtype=torch.long))])


def test_labels_outside_a_networks_classes_are_refused() -> None:
    with pytest.raises(DfkdError, match="network a: 2 of 3 labels are not among its classes"):
        evaluate({"a": Identity()}, [(torch.randn(3, 4, 1, 1), torch.tensor([3, 4, 9]))])


def test_every_batch_is_reported() -> None:
    _, _, batches = random_batches(3)
    reported: list[int] = []
    evaluate({"a": Identity()}, batches, on_batch=reported.append)
    assert reported == [10, 10, 10, 10, 10, 3]
