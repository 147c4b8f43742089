import copy
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dfkd_fast.kernels import Backend, BackendError, ema_multi_avg_fn, ema_update_
from tests.kernels.oracles import (
    HALVES,
    INF,
    KERNEL_DTYPES,
    NAN,
    PROPERTY,
    SANITIZED_DTYPES,
    assert_as_accurate_as_pytorch,
    layouts,
    lerp,
    with_layout,
)

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = [(), (7,), (3, 5), (2, 3, 5, 7), (0, 4), (3, 1, 2, 2), (8192,), (8193,), (3, 8191)]
STEPS = 4


def values(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, layout: str = "contiguous") -> Tensor:
    made = torch.randn(shape).to(device, dtype)
    return with_layout(made, layout) if made.ndim == 4 else made


@pytest.mark.parametrize("decay", [0.0, 0.2, 0.5, 0.9999, 1.0])
@pytest.mark.parametrize(
    ("layout", "as_tensor"), [("contiguous", None), ("channels_last", torch.float32), ("contiguous", torch.float64)], ids=str
)
@pytest.mark.parametrize("source_dtype", KERNEL_DTYPES, ids=str)
def test_several_steps_over_many_tensors_match_float64(
    backend: Backend, device: torch.device, decay: float, layout: str, as_tensor: torch.dtype | None, source_dtype: torch.dtype
) -> None:
    averages = [values(shape, torch.float32, device, layout) for shape in SHAPES]
    exact, plain = [average.double() for average in averages], [average.clone() for average in averages]
    decay_argument: float | Tensor = decay if as_tensor is None else torch.tensor(decay, dtype=as_tensor, device=device)
    decay_value = decay if as_tensor is None else torch.tensor(decay, dtype=as_tensor).item()
    for _ in range(STEPS):
        sources = [values(shape, source_dtype, device, layout) for shape in SHAPES]
        ema_update_(averages, sources, decay_argument)
        exact = [lerp(average, source, decay_value) for average, source in zip(exact, sources, strict=True)]
        for average, source in zip(plain, sources, strict=True):
            average.lerp_(source.float(), 1 - decay_value)
    for average, usual, expected in zip(averages, plain, exact, strict=True):
        assert_as_accurate_as_pytorch(average, usual, expected)


@PROPERTY
@given(data=st.data(), decay=st.floats(0, 1), shadow_dtype=st.sampled_from([None, torch.bfloat16]))
def test_any_list_of_dense_tensors(
    fused: Backend, device: torch.device, data: st.DataObject, decay: float, shadow_dtype: torch.dtype | None
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    averages, sources, shadows = [], [], []
    for shape in data.draw(st.lists(st.lists(st.integers(0, 12), max_size=4), max_size=6)):
        to_layout = data.draw(layouts(len(shape), gaps=False))
        averages.append(to_layout(torch.randn(shape).to(device)))
        sources.append(to_layout(torch.randn(shape).to(device, data.draw(st.sampled_from(KERNEL_DTYPES[:2])))))
        shadows.append(to_layout(torch.randn(shape).to(device, shadow_dtype or torch.float32)))
    exact = [lerp(average, source, decay) for average, source in zip(averages, sources, strict=True)]
    plain = [average.lerp(source.float(), 1 - decay) for average, source in zip(averages, sources, strict=True)]
    ema_update_(averages, sources, decay, shadows=shadows if shadow_dtype else None)
    for average, usual, expected, shadow in zip(averages, plain, exact, shadows, strict=True):
        assert_as_accurate_as_pytorch(average, usual, expected)
        if shadow_dtype:
            assert torch.equal(shadow, average.to(shadow_dtype))


@pytest.mark.parametrize(("decay", "expected"), [(0.0, "source"), (1.0, "average")])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_decay_0_and_1_are_exact(backend: Backend, device: torch.device, decay: float, expected: str, as_tensor: bool) -> None:
    average, source = (torch.randn(5000, device=device) * torch.logspace(-30, 30, 5000, device=device) for _ in range(2))
    expected_average = (source if expected == "source" else average).clone()
    ema_update_([average], [source], torch.tensor(decay, device=device) if as_tensor else decay)
    assert torch.equal(average, expected_average)


@pytest.mark.parametrize("decay", [0.0, 0.05, 0.3, 0.5, 0.95, torch.tensor(0.7), torch.tensor(0.999, dtype=torch.float64)])
@pytest.mark.parametrize("source_dtype", KERNEL_DTYPES, ids=str)
def test_equal_tensors_stay_exactly_equal(backend: Backend, device: torch.device, decay: float | Tensor, source_dtype: torch.dtype) -> None:
    source = (torch.randn(1001) * torch.logspace(-30, 30, 1001)).clamp(-6e4, 6e4).to(device, source_dtype)
    average = source.float()
    ema_update_([average], [source], decay.to(device) if isinstance(decay, Tensor) else decay)
    assert torch.equal(average, source.float())


@pytest.mark.parametrize("shadow_dtype", SANITIZED_DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "misaligned"])
def test_shadows_receive_the_new_averages_rounded(backend: Backend, device: torch.device, shadow_dtype: torch.dtype, layout: str) -> None:
    averages = [values(shape, torch.float32, device, layout) for shape in SHAPES]
    sources = [values(shape, torch.float32, device, layout) for shape in SHAPES]
    shadows = [torch.full_like(average, NAN, dtype=shadow_dtype) for average in averages]
    alone = [average.clone() for average in averages]
    for decay in (0.9, torch.tensor(0.25, device=device)):
        ema_update_(averages, sources, decay, shadows=shadows)
        ema_update_(alone, sources, decay)
        for average, shadow, expected in zip(averages, shadows, alone, strict=True):
            assert torch.equal(average, expected)
            assert torch.equal(shadow, average.to(shadow_dtype))


@pytest.mark.sanitize
@pytest.mark.parametrize("tensors", [101, 801])
def test_lists_may_be_longer_than_one_launch_supports(backend: Backend, device: torch.device, tensors: int) -> None:
    averages, sources = ([torch.randn(size % 7, device=device) for size in range(tensors)] for _ in range(2))
    exact = [lerp(average, source, 0.75) for average, source in zip(averages, sources, strict=True)]
    ema_update_(averages, sources, 0.75)
    for average, expected in zip(averages, exact, strict=True):
        torch.testing.assert_close(average.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.sanitize
@pytest.mark.parametrize("shadowed", [False, True])
def test_a_list_may_mix_dtypes_shapes_and_kinds(backend: Backend, device: torch.device, shadowed: bool) -> None:
    kinds = [torch.float32, torch.bfloat16, torch.int64, torch.float16, torch.bool, torch.float32, torch.uint8]
    sources = [values((3, 5), torch.float32, device).mul(9).abs().to(kind) for kind in kinds]
    averages = [
        torch.ones_like(source, dtype=torch.float32 if kind.is_floating_point else kind)
        for source, kind in zip(sources, kinds, strict=True)
    ]
    halves = [torch.float16, torch.bfloat16, torch.int64, torch.float32, torch.bool, torch.bfloat16, torch.uint8]
    shadows = [torch.zeros_like(average, dtype=half) for average, half in zip(averages, halves, strict=True)] if shadowed else None
    ema_update_(averages, sources, 0.75, shadows=shadows)
    for index, (average, source) in enumerate(zip(averages, sources, strict=True)):
        if source.is_floating_point():
            torch.testing.assert_close(average.double(), lerp(torch.ones_like(average), source, 0.75), rtol=1e-6, atol=0)
        else:
            assert torch.equal(average, source)
        if shadows is not None:
            assert torch.equal(shadows[index], average.to(halves[index]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool], ids=str)
def test_integers_are_copied(backend: Backend, device: torch.device, dtype: torch.dtype) -> None:
    average, source = torch.tensor([0, 1, 1], device=device).to(dtype), torch.tensor([1, 0, 1], device=device).to(dtype)
    shadow = torch.zeros_like(average)
    ema_update_([average], [source], 0.95, shadows=[shadow])
    assert torch.equal(average, source)
    assert torch.equal(shadow, source)


def test_empty_lists_and_tensors_are_supported(backend: Backend, device: torch.device) -> None:
    ema_update_([], [], 0.5)
    ema_update_([], [], 0.5, shadows=[])
    nothing = [torch.zeros(0, 3, device=device), torch.zeros(2, 0, device=device)]
    ema_update_(nothing, [tensor.clone() for tensor in nothing], torch.tensor(0.5, device=device))
    average = torch.zeros(3, device=device)
    ema_update_([nothing[0], average, nothing[1]], [nothing[0].clone(), torch.ones_like(average), nothing[1].clone()], 0.5)
    assert torch.equal(average, torch.full_like(average, 0.5))


def test_a_decay_tensor_is_read_at_every_call(backend: Backend, device: torch.device) -> None:
    average, source, decay = torch.zeros(3, device=device), torch.ones(3, device=device), torch.tensor(1.0, device=device)
    ema_update_([average], [source], decay)
    assert torch.equal(average, torch.zeros_like(average))
    decay.fill_(0.25)
    ema_update_([average], [source], decay)
    assert torch.equal(average, torch.full_like(average, 0.75))


def test_nonfinite_values_propagate_as_in_lerp(backend: Backend, device: torch.device) -> None:
    numbers = torch.tensor([1.0, NAN, INF, -INF], device=device)
    start, source = numbers.repeat(4), numbers.repeat_interleave(4)
    for decay in (0.0, 0.3, 0.9, 1.0):
        average = start.clone()
        ema_update_([average], [source], decay)
        torch.testing.assert_close(average, start.lerp(source, 1 - decay), equal_nan=True)


def test_elements_between_those_of_a_slice_are_untouched() -> None:
    whole = torch.zeros(3, 6)
    ema_update_([whole[:, ::2]], [torch.ones(3, 6)[:, ::2]], 0.5)
    assert torch.equal(whole, torch.tensor([[0.5, 0.0] * 3] * 3))


def test_only_the_reference_supports_tensors_with_gaps(fused: Backend, device: torch.device) -> None:
    whole = torch.zeros(300, 600, device=device)
    for average in (whole[:, ::2], whole[:, :599]):
        with pytest.raises(BackendError, match=f"{fused} is forced, but supports only dense tensors"):
            ema_update_(
                [torch.zeros(1, device=device), average],
                [torch.ones(1, device=device), torch.ones_like(whole).as_strided(average.shape, average.stride())],
                0.5,
            )
    assert not whole.any()


def test_large_tensors_with_gaps_use_the_reference_by_default() -> None:
    whole = torch.zeros(300, 600)
    ema_update_([whole[:, ::2]], [torch.ones(300, 600)[:, ::2]], 0.5)
    assert torch.equal(whole[:, ::2], torch.full((300, 300), 0.5))
    assert not whole[:, 1::2].any()


@pytest.mark.parametrize("shape", [(4, 1, 5, 5), (1, 4, 5, 5)], ids=str)
def test_strides_of_dimensions_of_size_1_are_ignored(backend: Backend, device: torch.device, shape: tuple[int, ...]) -> None:
    source = torch.randn(shape, device=device)
    strides = tuple(1 if size == 1 else stride for size, stride in zip(shape, source.stride(), strict=True))
    average = torch.zeros(shape, device=device).as_strided(shape, strides)
    assert average.stride() != source.stride()
    ema_update_([average], [source], 0.0)
    assert torch.equal(average, source)


@pytest.mark.parallel
def test_results_are_bitwise_reproducible_for_any_number_of_threads(fused: Backend, device: torch.device) -> None:
    starts, sources = ([values(shape, torch.float32, device) for shape in SHAPES] for _ in range(2))
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        averages = [start.clone() for start in starts]
        ema_update_(averages, sources, 0.7)
        results.append(averages)
    for again in results[1:]:
        assert all(map(torch.equal, results[0], again))


def test_parameters_are_updated_without_a_graph_and_sources_unchanged(backend: Backend, device: torch.device) -> None:
    average, source = nn.Parameter(torch.zeros(3, device=device)), nn.Parameter(torch.ones(3, device=device))
    ema_update_([average], [source], 0.75)
    assert torch.equal(average.detach(), torch.full_like(average, 0.25))
    assert torch.equal(source.detach(), torch.ones_like(source))
    assert average.is_leaf
    assert average.grad is None
    assert source.grad is None


def test_averaged_model_matches_pytorchs_averaging_function(backend: Backend, device: torch.device) -> None:
    norm = nn.BatchNorm2d(8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Linear(5, 4)).to(device)
    ours = AveragedModel(model, multi_avg_fn=ema_multi_avg_fn(0.9), use_buffers=True)
    theirs = AveragedModel(copy.deepcopy(model), multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(STEPS):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
            norm(torch.randn(2, 8, 3, 3, device=device))
        ours.update_parameters(model)
        theirs.update_parameters(model)
    expected = theirs.module.state_dict()
    for name, tensor in ours.module.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
    assert ours.module.state_dict()["1.num_batches_tracked"].item() == STEPS


def test_float64_averages_stay_float64() -> None:
    average, source = torch.randn(40_000, dtype=torch.float64), torch.randn(40_000)
    expected = lerp(average, source, 0.9)
    ema_update_([average], [source], 0.9)
    torch.testing.assert_close(average, expected, rtol=1e-14, atol=1e-15)


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
def test_an_invalid_pair_is_named_and_nothing_is_changed(average: Tensor, source: Tensor, message: str) -> None:
    first = torch.zeros(3)
    with pytest.raises(ValueError, match=message):
        ema_update_([first, average], [torch.ones(3), source], 0.5)
    assert torch.equal(first, torch.zeros(3))


@pytest.mark.parametrize("averages", [0, 1, 3])
def test_lists_of_different_lengths_raise(averages: int) -> None:
    with pytest.raises(ValueError, match=f"differ in length: {averages} and 2"):
        ema_update_([torch.zeros(1)] * averages, [torch.zeros(1)] * 2, 0.5)


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan"), float("inf"), torch.tensor([0.5])])
def test_a_decay_outside_0_to_1_raises(decay: float | Tensor) -> None:
    with pytest.raises(ValueError, match="decay must be"):
        ema_update_([torch.zeros(1)], [torch.zeros(1)], decay)


@pytest.mark.parametrize(
    ("shadow", "message"),
    [
        (torch.zeros(2, 3, 4, 5), "pair 1: average and shadow differ in shape"),
        (GOOD.to(memory_format=torch.channels_last), "pair 1: average and shadow differ in strides"),
        (GOOD.to("meta"), "pair 1: average and shadow differ in device"),
        (GOOD.long(), "pair 1: average and shadow differ in dtype"),
    ],
)
def test_an_invalid_shadow_is_named_and_nothing_is_changed(shadow: Tensor, message: str) -> None:
    averages = [torch.zeros(3), GOOD.clone()]
    with pytest.raises(ValueError, match=message):
        ema_update_(averages, [torch.ones(3), GOOD + 1], 0.5, shadows=[torch.zeros(3), shadow])
    assert not any(average.any() for average in averages)


@pytest.mark.parametrize("shadows", [[], [torch.zeros(1)] * 3])
def test_the_number_of_shadows_must_match(shadows: Sequence[Tensor]) -> None:
    with pytest.raises(ValueError, match=f"averages and shadows differ in length: 2 and {len(shadows)}"):
        ema_update_([torch.zeros(1)] * 2, [torch.zeros(1)] * 2, 0.5, shadows=shadows)


def test_a_decay_on_another_device_raises() -> None:
    with pytest.raises(ValueError, match="decay is on meta, the averages on cpu"):
        ema_update_([torch.zeros(1)], [torch.zeros(1)], torch.tensor(0.5, device="meta"))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_averages_raise_in_every_backend(backend: Backend, device: torch.device, dtype: torch.dtype) -> None:
    average = torch.zeros(3, dtype=dtype, device=device)
    with pytest.raises(ValueError, match="pair 0: an average must be float32 or float64"):
        ema_update_([average], [torch.ones_like(average)], 0.5)
    assert not average.any()
