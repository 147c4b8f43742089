import errno
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dfkd_fast.errors import DfkdError
from dfkd_fast.models import LeNet5, load_weights, read_metadata, save_weights


def network(features: int = 4) -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(3, features, 3), nn.BatchNorm2d(features), nn.Flatten(), nn.Linear(features, 2))
    for buffer in layers.buffers():
        buffer.copy_(torch.randint(1, 9, buffer.shape))
    return layers


def assert_same_state(actual: nn.Module, expected: nn.Module) -> None:
    ours, theirs = actual.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_and_metadata_survive_saving_and_loading(tmp_path: Path, dtype: torch.dtype) -> None:
    saved, loaded, path = network().to(dtype), network().to(dtype), tmp_path / "student.safetensors"
    save_weights(saved, path, {"model": "lenet5", "accuracy": "98,7 ± 0,1"})
    load_weights(loaded, path)
    assert_same_state(loaded, saved)
    assert load_file(path)["0.weight"].dtype == dtype
    assert read_metadata(path) == {"model": "lenet5", "accuracy": "98,7 ± 0,1"}
    assert list(tmp_path.iterdir()) == [path]


def test_weights_saved_in_channels_last_load_into_either_memory_format(tmp_path: Path) -> None:
    saved, path = network().to(memory_format=torch.channels_last), tmp_path / "w.safetensors"
    save_weights(saved, path, {})
    for layout in (torch.contiguous_format, torch.channels_last):
        loaded = network().to(memory_format=layout)
        load_weights(loaded, path)
        assert_same_state(loaded, saved)


class Shared(nn.Module):
    """Has buffers and parameters that are overlapping or transposed views of one storage."""

    def __init__(self, start: float) -> None:
        super().__init__()
        arena = torch.arange(start, start + 12)
        self.register_buffer("arena", arena)
        self.register_buffer("tail", arena[6:])
        self.register_buffer("transposed", arena.view(3, 4).t())
        self.first = nn.Parameter(arena[1:5])
        self.again = self.first


def test_tensors_that_share_storage_are_saved_under_each_name(tmp_path: Path) -> None:
    saved, loaded, path = Shared(0.0), Shared(50.0), tmp_path / "w.safetensors"
    save_weights(saved, path, {})
    assert set(load_file(path)) == {"arena", "tail", "transposed", "first", "again"}
    load_weights(loaded, path)
    assert_same_state(loaded, saved)


def test_saving_replaces_a_file_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, path = network(), tmp_path / "w.safetensors"
    save_weights(saved, path, {"run": "1"})

    def full_disk(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match=r"No space.*w\.safetensors"):
        save_weights(network(), path, {"run": "2"})
    loaded = network()
    load_weights(loaded, path)
    assert_same_state(loaded, saved)
    assert read_metadata(path) == {"run": "1"}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_files_of_common_layouts_are_loaded(tmp_path: Path, key: str | None, prefix: str, zipped: bool) -> None:
    saved, loaded, path = network(), network(), tmp_path / "w.pt"
    state = {prefix + name: tensor for name, tensor in saved.state_dict().items()}
    torch.save(state if key is None else {key: state, "epoch": 3}, path, _use_new_zipfile_serialization=zipped)
    load_weights(loaded, path)
    assert_same_state(loaded, saved)
    assert read_metadata(path) == {}


def test_a_network_with_a_submodule_called_module_loads_its_own_pytorch_file(tmp_path: Path) -> None:
    saved, loaded = (nn.ModuleDict({"module": network()}) for _ in range(2))
    torch.save(saved.state_dict(), tmp_path / "w.pt")
    load_weights(loaded, tmp_path / "w.pt")
    assert_same_state(loaded, saved)


def test_equal_weights_and_metadata_give_equal_bytes(tmp_path: Path) -> None:
    saved, metadata = network(), {f"entry {number}": str(number) for number in range(20)}
    paths = [tmp_path / f"{number}.safetensors" for number in range(5)]
    for path in paths:
        save_weights(saved, path, metadata)
    assert len({path.read_bytes() for path in paths}) == 1


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_safetensors_of_other_programs_are_loaded_and_have_no_metadata(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    saved, loaded, path = network(), network(), tmp_path / "w.safetensors"
    save_file(saved.state_dict(), path, metadata=metadata)
    load_weights(loaded, path)
    assert_same_state(loaded, saved)
    assert read_metadata(path) == {}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("state", "problem"),
    [
        (network(5).state_dict(), "size mismatch for 0.weight"),
        ({}, "Missing key.*0.weight"),
        ({**network().state_dict(), "head.weight": torch.ones(1)}, "Unexpected key.*head.weight"),
    ],
)
def test_weights_of_a_different_network_are_refused_in_one_line(
    tmp_path: Path, suffix: str, state: dict[str, Tensor], problem: str
) -> None:
    path = tmp_path / f"w{suffix}"
    if suffix == ".pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    with pytest.raises(DfkdError, match=rf"w{suffix} do not fit the network Sequential: {problem}") as caught:
        load_weights(network(), path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b".", id="one byte"),
        pytest.param(b"hello, this is text", id="text"),
        pytest.param(b"PK\x03\x04 half an archive", id="half an archive"),
        pytest.param(bytes(range(256)), id="all bytes"),
        pytest.param(bytes(100), id="zeros"),
    ],
)
def test_a_file_that_is_not_a_weights_file_is_refused_in_one_line(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(DfkdError, match=rf"weights .*w{suffix} cannot be read: \S") as caught:
        load_weights(network(), path)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("kept", [0.02, 0.1, 0.25, 0.5, 0.9, 0.99])
def test_a_truncated_weights_file_is_refused(tmp_path: Path, kind: str, kept: float) -> None:
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        save_weights(network(), path, {})
    else:
        torch.save(network().state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(DfkdError, match="cannot be read"):
        load_weights(network(), path)


def test_reading_the_metadata_of_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"hello, this is text")
    with pytest.raises(DfkdError, match=r"w\.safetensors cannot be read"):
        read_metadata(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent.safetensors", "absent.safetensors not found"), ("absent.pt", "absent.pt not found"), (".", "must be a file, not a folder")],
)
def test_a_missing_file_is_named(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(DfkdError, match=message):
        load_weights(network(), tmp_path / name)


class Intruder:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.proof,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_hidden_in_a_pytorch_file_is_not_run(tmp_path: Path, zipped: bool) -> None:
    path, proof = tmp_path / "w.pt", tmp_path / "proof"
    torch.save({"state_dict": network().state_dict(), "extra": Intruder(proof)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(DfkdError, match="cannot be read") as caught:
        load_weights(network(), path)
    assert not proof.exists()
    assert str(caught.value).isprintable()


def test_code_hidden_in_a_bare_pickle_is_not_run(tmp_path: Path) -> None:
    path, proof = tmp_path / "w.pt", tmp_path / "proof"
    path.write_bytes(pickle.dumps(Intruder(proof), protocol=2))
    with pytest.raises(DfkdError, match="cannot be read"):
        load_weights(network(), path)
    assert not proof.exists()


@pytest.mark.parametrize("content", [[torch.ones(2)], {"epoch": 3}, torch.ones(3), {3: torch.ones(2)}, {"model": 4}])
def test_a_pytorch_file_without_a_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(DfkdError, match="contain no state dict"):
        load_weights(network(), tmp_path / "w.pt")


def test_a_pickled_network_is_refused(tmp_path: Path) -> None:
    torch.save(LeNet5(), tmp_path / "w.pt")
    with pytest.raises(DfkdError, match=r"w\.pt cannot be read"):
        load_weights(LeNet5(), tmp_path / "w.pt")
