import pytest
import torch
from torch import Tensor, nn

from dfkd_fast.kernels import ema_update_

SHAPES = [(), (7,), (3, 5), (2, 3, 5, 7), (0, 4)]
STEPS = 4


def laid_out(values: Tensor, layout: str) -> Tensor:
    if layout == "channels_last" and values.ndim == 4:
        return values.contiguous(memory_format=torch.channels_last)
    return torch.stack([values, values], dim=-1)[..., 0] if layout == "sliced" else values.clone()


@pytest.mark.parametrize("decay", [0.0, 0.2, 0.95, 1.0])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize(
    ("average_dtype", "source_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-6),
        (torch.float32, torch.bfloat16, 1e-6),
        (torch.float32, torch.float16, 1e-6),
        (torch.float64, torch.float64, 1e-14),
        (torch.float64, torch.bfloat16, 1e-14),
    ],
)
def test_several_steps_give_the_closed_form(
    decay: float, as_tensor: bool, layout: str, average_dtype: torch.dtype, source_dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    starts = [torch.randn(shape).to(average_dtype) for shape in SHAPES]
    sources = [[torch.randn(shape).to(source_dtype) for shape in SHAPES] for _ in range(STEPS)]
    averages = [laid_out(start, layout) for start in starts]
    for step in sources:
        ema_update_(averages, [laid_out(source, layout) for source in step], torch.tensor(decay).double() if as_tensor else decay)
    if as_tensor:
        decay = torch.tensor(decay).item()
    for index, average in enumerate(averages):
        history = sum((1 - decay) * decay ** (STEPS - 1 - age) * step[index].double() for age, step in enumerate(sources))
        expected = decay**STEPS * starts[index].double() + history
        torch.testing.assert_close(average.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("decay", [0.0, 0.05, 0.3, 0.95, torch.tensor(0.7), torch.tensor(0.999, dtype=torch.float64)])
def test_equal_tensors_stay_exactly_equal(decay: float | Tensor) -> None:
    torch.manual_seed(0)
    source = torch.randn(1001) * torch.logspace(-30, 30, 1001)
    average = source.clone()
    ema_update_([average], [source], decay)
    assert torch.equal(average, source)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_integers_are_copied(dtype: torch.dtype) -> None:
    average, source = torch.tensor([0, 1, 1]).to(dtype), torch.tensor([1, 0, 1]).to(dtype)
    ema_update_([average], [source], 0.95)
    assert torch.equal(average, source)


def test_a_tensor_of_decay_is_read_at_every_call() -> None:
    average, source, decay = torch.zeros(3), torch.ones(3), torch.tensor(1.0)
    ema_update_([average], [source], decay)
    assert torch.equal(average, torch.zeros(3))
    decay.fill_(0.25)
    ema_update_([average], [source], decay)
    assert torch.equal(average, torch.full((3,), 0.75))


def test_elements_between_those_of_a_slice_are_untouched() -> None:
    whole = torch.zeros(3, 6)
    ema_update_([whole[:, ::2]], [torch.ones(3, 6)[:, ::2]], 0.5)
    assert torch.equal(whole, torch.tensor([[0.5, 0.0] * 3] * 3))


def test_strides_of_dimensions_with_one_element_do_not_matter() -> None:
    source = torch.randn(4, 1, 5, 5)
    average = torch.zeros(4, 1, 5, 5).contiguous(memory_format=torch.channels_last).as_strided((4, 1, 5, 5), (25, 1, 5, 1))
    assert average.stride() != source.stride()
    ema_update_([average], [source], 0.0)
    assert torch.equal(average, source)


def test_parameters_are_updated_without_a_graph_and_sources_left_alone() -> None:
    average, source = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
    ema_update_([average], [source], 0.75)
    assert torch.equal(average.detach(), torch.full((3,), 0.25))
    assert torch.equal(source.detach(), torch.ones(3))
    assert average.is_leaf
    assert average.grad is None
    assert source.grad is None


GOOD = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("average", "source", "message"),
    [
        (GOOD, torch.zeros(2, 3, 4, 5), r"pair 1: .* shape: \(2, 3, 4, 4\) and \(2, 3, 4, 5\)"),
        (GOOD, torch.zeros(1, 3, 4, 4), "pair 1: .* shape"),
        (GOOD, GOOD.to(memory_format=torch.channels_last), r"pair 1: .* strides: \(48, 16, 4, 1\) and \(48, 1, 12, 3\)"),
        (GOOD, GOOD.transpose(2, 3), "pair 1: .* strides"),
        (GOOD, GOOD.to("meta"), "pair 1: .* device: cpu and meta"),
        (GOOD.to("meta"), GOOD.to("meta"), "pair 1: .* device: meta, and the first is on cpu"),
        (GOOD, GOOD.long(), "pair 1: .* dtype: torch.float32 and torch.int64"),
        (GOOD.long(), GOOD, "pair 1: .* dtype: torch.int64 and torch.float32"),
        (GOOD.long(), GOOD.int(), "pair 1: .* dtype: torch.int64 and torch.int32"),
        (GOOD.bfloat16(), GOOD.bfloat16(), "pair 1: an average must be float32 or float64, not torch.bfloat16"),
        (GOOD.half(), GOOD, "pair 1: an average must be float32 or float64, not torch.float16"),
    ],
)
def test_a_pair_that_does_not_match_is_named_and_nothing_is_changed(average: Tensor, source: Tensor, message: str) -> None:
    first = torch.zeros(3)
    with pytest.raises(ValueError, match=message):
        ema_update_([first, average], [torch.ones(3), source], 0.5)
    assert torch.equal(first, torch.zeros(3))


@pytest.mark.parametrize("averages", [0, 1, 3])
def test_lists_of_different_lengths_are_refused(averages: int) -> None:
    with pytest.raises(ValueError, match=f"differ in length: {averages} and 2"):
        ema_update_([torch.zeros(1)] * averages, [torch.zeros(1)] * 2, 0.5)


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan"), float("inf"), torch.tensor([0.5])])
def test_a_decay_outside_0_to_1_is_refused(decay: float | Tensor) -> None:
    with pytest.raises(ValueError, match="decay must be"):
        ema_update_([torch.zeros(1)], [torch.zeros(1)], decay)
