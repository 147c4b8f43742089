import pytest
import torch
from torch import Tensor, nn

from dfkd_fast import DfkdError
from dfkd_fast.evaluation import evaluate, top1_accuracy


class Table(nn.Module):
    """Shows the logits that are written in the images, (B, classes, 1, 1)."""

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
        # Batches of different sizes, classes of different frequency: neither is averaged over.
        ([[0], [0, 0, 0, 1, 1, 1, 1]], [[1], [0, 0, 0, 0, 0, 0, 0]], 2, 100 * 3 / 8),
        ([[99]], [[99]], 100, 100.0),
    ],
)
def test_accuracy_is_the_share_of_images_whose_largest_logit_is_their_labels(
    predicted: list[list[int]], labels: list[list[int]], classes: int, percent: float
) -> None:
    batches = [(images(guess, classes), torch.tensor(truth)) for guess, truth in zip(predicted, labels, strict=True)]
    assert top1_accuracy(Table(), batches) == pytest.approx(percent, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_accuracy_of_random_logits_is_a_count_by_hand(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # Shuffled integers: no two logits of an image tie, in any dtype.
    logits = torch.stack([torch.randperm(7) for _ in range(101)]).to(dtype)
    labels = torch.randint(0, 7, (101,))
    right = sum(max(range(7), key=row.__getitem__) == label for row, label in zip(logits.tolist(), labels.tolist(), strict=True))
    batches = [(part[:, :, None, None], truth) for part, truth in zip(logits.split(10), labels.split(10), strict=True)]
    assert top1_accuracy(Table(), batches) == pytest.approx(100 * right / 101, rel=1e-12)


def normalising() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten())


@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_evaluated_in_evaluation_mode_and_left_as_it_was(training: bool) -> None:
    network = normalising().train(training)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    inputs, labels = torch.randn(50, 3, 1, 1) + torch.tensor([4.0, 0.0, 0.0])[:, None, None], torch.zeros(50, dtype=torch.long)
    # Running statistics keep the first logit's lead of 4, the batch's own would take it away.
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

    def watch(_: nn.Module, __: tuple[Tensor, ...], logits: Tensor) -> None:
        recorded.append(logits.requires_grad)

    network.register_forward_hook(watch)
    top1_accuracy(network, [(torch.randn(2, 3, 1, 1), torch.zeros(2, dtype=torch.long))] * 2)
    assert recorded == [False, False]


def test_nothing_to_evaluate_on_is_refused() -> None:
    with pytest.raises(ValueError, match="no images"):
        top1_accuracy(Table(), [])


class Shifted(Table):
    """Logits that differ from the images' by a fixed table."""

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
def test_top_5_is_the_share_of_labels_among_the_five_largest_logits(classes: int) -> None:
    logits, labels, batches = random_batches(classes)
    found = evaluate({"a": Table()}, batches).networks["a"]
    ranks = [int((row > row[label]).sum()) for row, label in zip(logits, labels, strict=True)]
    assert found.top1 == pytest.approx(100 * sum(rank == 0 for rank in ranks) / 53, rel=1e-12)
    assert found.top5 == pytest.approx(100 * sum(rank < 5 for rank in ranks) / 53, rel=1e-12)


def test_agreement_is_counted_and_the_divergence_is_a_mean_over_images() -> None:
    logits, labels, batches = random_batches(7)
    shift = torch.randn(7)
    found = evaluate({"teacher": Table(), "student": Shifted(shift)}, batches, reference="teacher")
    (agreement,) = found.agreements
    assert (agreement.network, agreement.reference) == ("student", "teacher")
    teacher, student = logits.double(), logits.double() + shift.double()
    assert agreement.top1 == pytest.approx(100 * (teacher.argmax(1) == student.argmax(1)).double().mean().item(), rel=1e-12)
    assert 0 < agreement.top1 < 100
    p, log_ratio = teacher.softmax(1), teacher.log_softmax(1) - student.log_softmax(1)
    assert agreement.mean_kl == pytest.approx((p * log_ratio).sum(1).mean().item(), rel=1e-5)
    assert found.count == 53
    assert found.networks["student"].top1 == pytest.approx(100 * (student.argmax(1) == labels).double().mean().item(), rel=1e-12)


def test_without_a_reference_nothing_is_compared() -> None:
    _, _, batches = random_batches(3)
    assert evaluate({"a": Table(), "b": Table()}, batches).agreements == []


def test_the_seconds_are_those_of_waiting_and_the_rest() -> None:
    _, _, batches = random_batches(3)
    found = evaluate({"a": Table()}, batches)
    assert found.seconds["decode"] > 0
    assert found.seconds["network"] > 0
    assert found.seconds["decode"] + found.seconds["network"] == pytest.approx(found.seconds["total"])
    assert found.images_per_second == pytest.approx(53 / found.seconds["total"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_network_whose_output_is_no_number_has_no_accuracy(value: float) -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = value
    with pytest.raises(DfkdError, match="network a: its output is NaN or infinite on 1 of 3 images"):
        evaluate({"a": Table()}, [(logits[:, :, None, None], torch.zeros(3, dtype=torch.long))])


def test_labels_beyond_a_networks_classes_are_refused() -> None:
    with pytest.raises(DfkdError, match="network a: 2 of 3 labels are not among its classes"):
        evaluate({"a": Table()}, [(torch.randn(3, 4, 1, 1), torch.tensor([3, 4, 9]))])


def test_every_batch_is_reported() -> None:
    _, _, batches = random_batches(3)
    told: list[int] = []
    evaluate({"a": Table()}, batches, on_batch=told.append)
    assert told == [10, 10, 10, 10, 10, 3]
