import pytest
import torch
from torch import Tensor, nn

from dfkd_fast.evaluation import top1_accuracy


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
