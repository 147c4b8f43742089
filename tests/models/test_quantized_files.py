import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from dfkd_fast import DfkdError
from dfkd_fast.models import load_quantized, save_quantized, save_weights
from dfkd_fast.models.quantized_files import _pack, _unpack
from dfkd_fast.models.weights import read_tensors, save_tensors
from dfkd_fast.surgery import FLOAT, calibrate, quantize, quantized_layers


def network(seed: int = 0, width: int = 5) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 3, 1), nn.Flatten(), nn.Linear(27, 7)]
    made = nn.Sequential(*layers)
    made(images())
    return made


def images() -> Tensor:
    return torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1))


def quantized(weight_bits: int = 4, activation_bits: int = 8, end_bits: int = 8) -> nn.Sequential:
    original = network()
    made = copy.deepcopy(original)
    quantize(made, images(), weight_bits=weight_bits, activation_bits=activation_bits, end_bits=end_bits)
    calibrate(made, original, images())
    return made.eval()


@pytest.mark.parametrize(("weights", "activations", "ends"), [(3, 8, 4), (4, 8, 8), (8, 4, 3), (FLOAT, 8, 8), (4, FLOAT, 2), (16, 8, 16)])
def test_a_loaded_network_has_the_logits_and_bits_of_the_saved_one(tmp_path: Path, weights: int, activations: int, ends: int) -> None:
    saved, path = quantized(weights, activations, ends), tmp_path / "w.safetensors"
    save_quantized(saved, path)
    fresh = network(seed=7)
    loaded = load_quantized(fresh, path)
    assert loaded is fresh and not any(layer.training for layer in loaded.modules())
    assert torch.equal(loaded(images()), saved(images()))
    ours, theirs = quantized_layers(loaded), quantized_layers(saved)
    assert list(ours) == list(theirs)
    for name, layer in ours.items():
        assert (layer.weight_bits, layer.activation_bits) == (theirs[name].weight_bits, theirs[name].activation_bits)
        assert torch.equal(layer.weight, theirs[name].weight)
    again = tmp_path / "again.safetensors"
    save_quantized(loaded, again)
    assert again.read_bytes() == path.read_bytes()
    assert sorted(tmp_path.iterdir()) == [again, path]


def test_weights_take_their_bits_rounded_up_to_bytes_and_all_else_is_as_in_the_state_dict(tmp_path: Path) -> None:
    saved, path = quantized(3, 8, 4), tmp_path / "w.safetensors"
    save_quantized(saved, path)
    content, state = load_file(path), saved.state_dict()
    assert content.keys() == state.keys() | {f"{name}.bits" for name in quantized_layers(saved)}
    for name, layer in quantized_layers(saved).items():
        assert content.pop(f"{name}.bits").tolist() == [layer.weight_bits, layer.activation_bits]
        packed = content.pop(f"{name}.weight")
        assert packed.dtype == torch.uint8 and packed.shape == (-(-layer.weight.numel() * layer.weight_bits // 8),)
    assert all(torch.equal(tensor, state[name]) for name, tensor in content.items())


@settings(max_examples=40, deadline=None, database=None)
@given(bits=st.integers(2, 16), count=st.integers(1, 17), data=st.data())
def test_integers_are_packed_lowest_bit_first_and_unpacked(bits: int, count: int, data: Any) -> None:
    low = -(2 ** (bits - 1))
    values = data.draw(st.lists(st.integers(low, -low - 1), min_size=count, max_size=count))
    packed = _pack(torch.tensor(values).float(), bits)
    stream = sum((value - low) << (index * bits) for index, value in enumerate(values))
    assert bytes(packed.tolist()) == stream.to_bytes(-(-count * bits // 8), "little")
    assert _unpack(packed, bits, torch.Size([count, 1])).flatten().tolist() == values


def refused(path: Path, into: nn.Module | None = None) -> str:
    """Returns the message of the error, which is one line that names the file."""
    with pytest.raises(DfkdError) as caught:
        load_quantized(into or network(), path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def test_a_damaged_or_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_quantized(quantized(), path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for position in (header, (header + len(whole)) // 2, len(whole) - 1):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert "are damaged" in refused(path)
    for length in (0, 7, 8, header - 1, header, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "cannot be read" in refused(path)


def test_a_damaged_header_raises_no_other_error(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_quantized(quantized(), path)
    whole = path.read_bytes()
    for position in range(0, 8 + int.from_bytes(whole[:8], "little"), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        try:
            load_quantized(network(), path)
        except DfkdError as error:
            assert str(path) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_of_a_network_that_is_not_quantized_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    if suffix == ".pt":
        torch.save(network().state_dict(), path)
    else:
        save_weights(network(), path, {"model": "wrn16_2"})
    assert refused(path) == f"weights {path} are not those of a quantized network"
    assert "not found" in refused(tmp_path / f"absent{suffix}")


def transposed() -> nn.Module:
    """Network whose last layer has as many weights, but other outputs."""
    made = network()
    made[5] = nn.Linear(7, 27)
    return made


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: network(width=6), r"size mismatch for 0\.weight"),
        (transposed, r"size mismatch for 5\.weight"),
        (lambda: network()[:5], "its layers differ"),
        (lambda: nn.Sequential(*network()[:3], nn.BatchNorm2d(5), *network()[4:]), "its layers differ"),
        (lambda: nn.Sequential(*network(), nn.Linear(7, 7)), r"Missing key\(s\) in state_dict: \"6\.weight\""),
        (lambda: nn.Sequential(network()[0], nn.Identity(), *network()[2:]), r"Unexpected key\(s\)"),
        (lambda: nn.Linear(3, 2), "its layers differ"),
    ],
)
def test_a_file_of_another_architecture_is_refused(tmp_path: Path, build: Callable[[], nn.Module], message: str) -> None:
    path = tmp_path / "w.safetensors"
    save_quantized(quantized(), path)
    with pytest.raises(DfkdError, match=f"^weights {path} do not fit the network \\w+: .*{message}"):
        load_quantized(build(), path)
    refused(path, build())


INVALID = [
    torch.tensor(bits, dtype=torch.uint8) for bits in ([4], [4, 8, 8], 4, [[4, 8]], [99, 8], [4, 99], [0, 8], [1, 8], [17, 8], [31, 8])
]


@pytest.mark.parametrize(
    "bits", [*INVALID, torch.tensor([4.0, 8.0]), torch.tensor([4, 8])], ids=lambda bits: f"{bits.dtype} {bits.tolist()}"
)
def test_bits_that_are_not_allowed_are_refused(tmp_path: Path, bits: Tensor) -> None:
    path, other = tmp_path / "w.safetensors", tmp_path / "other.safetensors"
    save_quantized(quantized(), path)
    save_tensors(read_tensors(path) | {"3.bits": bits}, other, {})
    assert refused(other) == f"weights {other} are not those of a quantized network"


def test_bits_of_a_layer_that_cannot_have_any_are_refused(tmp_path: Path) -> None:
    path, other = tmp_path / "w.safetensors", tmp_path / "other.safetensors"
    save_quantized(quantized(), path)
    for name in ("1.bits", "bits", "absent.bits"):
        save_tensors(read_tensors(path) | {name: torch.tensor([4, 8], dtype=torch.uint8)}, other, {})
        assert "its layers differ" in refused(other)


def test_every_bit_of_the_header_is_checked_or_without_effect(tmp_path: Path) -> None:
    saved, path = quantized(), tmp_path / "w.safetensors"
    save_quantized(saved, path)
    whole, expected = path.read_bytes(), saved(images())
    for position in range(8, 8 + int.from_bytes(whole[:8], "little"), 3):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            loaded = load_quantized(network(), path)
        except DfkdError:
            continue
        assert torch.equal(loaded(images()), expected)


def shorter(tensor: Tensor) -> Tensor:
    return tensor.flatten()[:-1]


def wrapped(tensor: Tensor) -> Tensor:
    return tensor[None]


@pytest.mark.parametrize("key", ["3.weight", "3.weight_scale", "3.input_scale", "3.input_zero_point", "3.bias", "1.running_var"])
@pytest.mark.parametrize("change", [None, shorter, wrapped])
def test_a_tensor_that_is_missing_or_has_another_shape_is_refused(
    tmp_path: Path, key: str, change: Callable[[Tensor], Tensor] | None
) -> None:
    path = tmp_path / "w.safetensors"
    save_quantized(quantized(), path)
    tensors = read_tensors(path)
    before = tensors.pop(key)
    if change is not None:
        tensors[key] = change(before)
    save_tensors(tensors, path, {})
    if change is wrapped and before.ndim == 0:  # PyTorch loads one value into a 0-d tensor
        assert torch.equal(load_quantized(network(), path)(images()), quantized()(images()))
        return
    assert key in refused(path) or "size mismatch for 3.weight" in refused(path)


def test_weights_that_are_not_packed_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_quantized(quantized(8), path)
    tensors = read_tensors(path)
    save_tensors(tensors | {"3.weight": tensors["3.weight"].float()}, path, {})
    assert "size mismatch for 3.weight" in refused(path)
