"""Weights files of other training code: what is loaded from them, and what is refused."""

import argparse
import importlib
import pathlib
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dfkd_fast.errors import DfkdError
from dfkd_fast.kernels import FusedEMA
from dfkd_fast.models import PRETRAINED, build_model, load_encoder, load_pretrained, load_weights, read_metadata, save_weights
from dfkd_fast.models.pretrained import Pretrained

State = dict[str, Tensor]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))


SAVED = network(1)
STATE: State = dict(SAVED.state_dict())
OTHER: State = dict(network(2).state_dict())
FLOAT = "1.running_var"


def under(prefix: str, state: State = STATE) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def optimizer() -> dict[str, Any]:
    """Returns the state dict of an Adam optimizer after one step."""
    trained = network()
    steps = torch.optim.Adam(trained.parameters())
    for parameter in trained.parameters():
        parameter.grad = torch.ones_like(parameter)
    steps.step()
    return steps.state_dict()


def load(folder: Path, content: object, key: str = "") -> list[str]:
    """Saves ``content``, loads it into another network, checks that its state is now SAVED's; returns the logged lines."""
    path, loaded = folder / "w.pth", network(3)
    logged: list[str] = []
    torch.save(content, path)
    load_weights(loaded, path, key=key, log=logged.append)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, STATE[name]), name
    return [line.removeprefix(f"weights {path}: ") for line in logged]


def refused(folder: Path, content: object, key: str = "") -> str:
    loaded, path = network(3), folder / "w.pth"
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    torch.save(content, path)
    with pytest.raises(DfkdError) as caught:
        load_weights(loaded, path, key=key)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())
    assert str(caught.value).startswith(f"weights {path}")
    assert str(caught.value).isprintable()  # so one line, too
    return str(caught.value).removeprefix(f"weights {path}").lstrip(": ")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"net": STATE, "acc": 93.1, "epoch": 3}, "loaded 'net' (9 tensors), ignored 'acc', 'epoch'"),
        (
            {"state_dict_ema": STATE, "optimizer": optimizer(), "epoch": 3},
            "loaded 'state_dict_ema' (9 tensors), ignored 'optimizer', 'epoch'",
        ),
        ({"model": STATE, "best": np.float64(3), "last": np.float32(1)}, "loaded 'model' (9 tensors), ignored 'best', 'last'"),
        ({"model": STATE, "curve": np.arange(3)}, "loaded 'model' (9 tensors), ignored 'curve'"),
        ({"model": STATE, "log": defaultdict(list, {"loss": [1.0]})}, "loaded 'model' (9 tensors), ignored 'log'"),
        ({"model": STATE, "args": argparse.Namespace(out=pathlib.Path("x"))}, "loaded 'model' (9 tensors), ignored 'args'"),
        ({**STATE, "epoch": 3, "acc": 93.1}, "loaded 9 tensors, ignored 'epoch', 'acc'"),
        ({"state_dict": under("model."), "epoch": 3}, "loaded 'state_dict.model' (9 tensors), ignored 'epoch'"),
        (
            {"state_dict": {**under("student."), "loss.w": torch.ones(1)}},
            "loaded 'state_dict.student' (9 tensors), ignored 'state_dict.loss'",
        ),
        ({"state": {"net": STATE}, "net.old": 1}, "loaded 'state.net' (9 tensors), ignored 'net.old'"),
        ({**STATE, "total_ops": torch.ones(1), "0.total_params": torch.ones(1)}, "loaded 9 tensors, ignored 'total_ops', 'total_params'"),
        (AveragedModel(SAVED).state_dict(), "loaded 9 tensors, ignored 'n_averaged'"),
        (FusedEMA(SAVED, 0.9).state_dict(), "loaded 9 tensors, ignored 'updates'"),
        (FusedEMA(SAVED, 0.9, shadow_dtype=torch.bfloat16).state_dict(), "loaded 'module' (9 tensors), ignored 'updates', 'shadow'"),
    ],
)
def test_weights_in_a_training_checkpoint_are_loaded_and_logged_in_one_line(tmp_path: Path, content: object, line: str) -> None:
    assert load(tmp_path, content) == [line]


@pytest.mark.parametrize(
    "state",
    [
        STATE,
        under("module."),
        under("_orig_mod."),
        under("module._orig_mod."),
        {name.replace("2.", "2._orig_mod."): tensor for name, tensor in STATE.items()},
        {name.replace("2.", "2.module."): tensor for name, tensor in under("_orig_mod.").items()},
    ],
)
def test_wrapper_prefixes_of_parallel_training_and_compilation_are_stripped_at_any_depth_without_a_log_line(
    tmp_path: Path, state: State
) -> None:
    assert load(tmp_path, state) == []


def test_a_networks_own_names_are_not_stripped(tmp_path: Path) -> None:
    saved, loaded = (nn.ModuleDict({"module": network(seed), "model": network(seed + 10), "1": network(seed + 20)}) for seed in (1, 2))
    torch.save({"model": saved.state_dict()}, tmp_path / "w.pt")
    load_weights(loaded, tmp_path / "w.pt")
    assert all(torch.equal(tensor, saved.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_keys_that_differ_only_in_wrapper_components_are_not_confused(tmp_path: Path) -> None:
    saved, loaded = (nn.ModuleDict({"module": nn.Linear(2, 2), "_orig_mod": nn.Linear(2, 2)}) for _ in range(2))
    torch.save(saved.state_dict(), tmp_path / "w.pt")
    load_weights(loaded, tmp_path / "w.pt")
    assert all(torch.equal(tensor, saved.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_an_unknown_prefix_is_not_stripped_unless_it_is_the_key(tmp_path: Path) -> None:
    content = {**under("backbone."), "head.weight": torch.ones(1)}
    assert "do not fit the network Sequential: Missing keys 0.weight, 0.bias, 1.weight and 5 more" in refused(tmp_path, content)
    assert load(tmp_path, content, "backbone") == ["loaded 'backbone' (9 tensors), ignored 'head'"]


@pytest.mark.parametrize(
    ("content", "names", "key", "label"),
    [
        ({"model": OTHER, "model_ema": STATE}, "'model' and 'model_ema'", "model_ema", "model_ema"),
        ({"model": OTHER, "model_ema": under("module.")}, "'model' and 'model_ema'", "model_ema", "model_ema"),
        ({"teacher": STATE, "student": OTHER}, "'teacher' and 'student'", "teacher", "teacher"),
        ({**STATE, **under("ema.", OTHER)}, "'.' and 'ema'", ".", ""),
        ({**under("module.", OTHER), **STATE}, "'.' and 'module'", ".", ""),
        ({"net": {**under("ema."), **OTHER}}, "'net' and 'net.ema'", "net.ema", "net.ema"),
        (
            {"state_dict": {**under("student."), **under("teacher.", OTHER)}},
            "'state_dict.student' and 'state_dict.teacher'",
            "student",
            "state_dict.student",
        ),
    ],
)
def test_several_state_dicts_that_fit_are_listed_and_the_key_selects_one(
    tmp_path: Path, content: object, names: str, key: str, label: str
) -> None:
    assert refused(tmp_path, content) == (
        f"contain several state dicts that fit the network, {names}: choose by key= or teacher.weights_key"
    )
    (line,) = load(tmp_path, content, key)
    assert line.startswith(f"loaded {label!r} (9 tensors), ignored " if label else "loaded 9 tensors, ignored ")
    assert "the weights key 'nothing' is not in the file; available: " in refused(tmp_path, content, "nothing")


def test_tied_weights_that_differ_in_the_file_are_refused(tmp_path: Path) -> None:
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    content = tied.state_dict()
    torch.save({name: tensor.clone() for name, tensor in content.items()}, tmp_path / "w.pt")
    load_weights(tied, str(tmp_path / "w.pt"))
    torch.save({**content, "1.weight": content["0.weight"] + 1}, tmp_path / "w.pt")
    with pytest.raises(DfkdError, match=r"0.weight and 1.weight are tied in the network but differ in the file$"):
        load_weights(tied, tmp_path / "w.pt")


def test_a_flipped_bit_in_a_saved_file_is_detected(tmp_path: Path) -> None:
    save_weights(SAVED, tmp_path / "w.safetensors", {"role": "teacher"})
    load_weights(network(3), tmp_path / "w.safetensors")
    content = bytearray((tmp_path / "w.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(DfkdError, match=r"are damaged: the content does not match the checksum in the header$"):
        load_weights(network(3), tmp_path / "w.safetensors")


def test_only_state_dicts_that_fit_are_candidates(tmp_path: Path) -> None:
    wider = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Sequential(nn.Flatten(), nn.Linear(5, 2))).state_dict()
    assert load(tmp_path, {"teacher": wider, "student": STATE}) == ["loaded 'student' (9 tensors), ignored 'teacher'"]
    assert refused(tmp_path, {"teacher": wider, "student": STATE}, "teacher").startswith(
        "under 'teacher' do not fit the network Sequential: size mismatch for 0.weight ((5, 3, 3, 3) in the file, (4, 3, 3, 3) in"
    )


def test_num_batches_tracked_may_be_missing_as_in_old_files(tmp_path: Path) -> None:
    loaded = network(3)
    torch.save({name: tensor for name, tensor in STATE.items() if "batches" not in name}, tmp_path / "w.pt")
    load_weights(loaded, tmp_path / "w.pt")
    assert torch.equal(loaded.state_dict()["0.weight"], STATE["0.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_dtypes_are_converted(tmp_path: Path, dtype: torch.dtype) -> None:
    loaded = network(3)
    torch.save({name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in STATE.items()}, tmp_path / "w.pt")
    load_weights(loaded, tmp_path / "w.pt")
    assert torch.equal(loaded.state_dict()["0.weight"], STATE["0.weight"].to(dtype).float())
    assert loaded.state_dict()["0.weight"].dtype == torch.float32


def quantized() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch deprecates quantized tensors, but files contain them
        return torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)


INVALID = [
    pytest.param(torch.ones(4, dtype=torch.int32), "is int32: must be float16, bfloat16, float32 or float64", id="integer"),
    pytest.param(torch.ones(4, dtype=torch.bool), "is bool: must be float16, bfloat16, float32 or float64", id="bool"),
    pytest.param(torch.ones(4, dtype=torch.complex64), "is complex64: must be float16, bfloat16, float32 or float64", id="complex"),
    pytest.param(torch.ones(4).to(torch.float8_e4m3fn), "is float8_e4m3fn: must be float16, bfloat16, float32 or float64", id="float8"),
    pytest.param(torch.tensor([1, float("nan"), 1, 1]), "has 1 of 4 values that are NaN or infinite: must be finite", id="NaN"),
    pytest.param(torch.tensor([1, 1, float("inf"), 1]), "has 1 of 4 values that are NaN or infinite: must be finite", id="infinite"),
    pytest.param(torch.full((4,), 1e300, dtype=torch.float64), "has 4 of 4 values that are infinite in float32", id="too large"),
]


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        *INVALID,
        pytest.param(torch.ones(4).to_sparse(), "is sparse or nested (float32): must be a dense tensor", id="sparse"),
        pytest.param(torch.ones(4, device="meta"), "is on the meta device (float32): must be a dense tensor", id="meta"),
    ],
)
def test_invalid_values_in_pytorch_files_are_refused_by_name(tmp_path: Path, tensor: Tensor, problem: str) -> None:
    assert refused(tmp_path, {**STATE, FLOAT: tensor}).startswith(f"{FLOAT} {problem}")


def test_quantized_weights_are_refused_by_name(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert refused(tmp_path, {**STATE, FLOAT: quantized()}).startswith(f"{FLOAT} is quantized (qint8): must be a dense tensor")


@pytest.mark.parametrize(("tensor", "problem"), INVALID)
def test_invalid_values_in_safetensors_are_refused_by_name(tmp_path: Path, tensor: Tensor, problem: str) -> None:
    save_file({**STATE, FLOAT: tensor}, tmp_path / "w.safetensors")
    with pytest.raises(DfkdError) as caught:
        load_weights(network(3), tmp_path / "w.safetensors")
    assert f"{FLOAT} {problem}" in str(caught.value)


def test_num_batches_tracked_must_be_an_integer(tmp_path: Path) -> None:
    assert (
        refused(tmp_path, {**STATE, "1.num_batches_tracked": torch.tensor(3.0)}) == "1.num_batches_tracked is float32: must be an integer"
    )
    loaded = network(3)
    torch.save({**STATE, "1.num_batches_tracked": torch.tensor(3, dtype=torch.int32)}, tmp_path / "w.pt")
    load_weights(loaded, tmp_path / "w.pt")
    assert loaded.state_dict()["1.num_batches_tracked"] == 3


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.weight = nn.Parameter(torch.zeros(2))


def test_a_mask_may_be_infinite_in_the_file_where_it_is_infinite_in_the_network(tmp_path: Path) -> None:
    torch.save({"mask": torch.tensor([0.0, -torch.inf]), "weight": torch.ones(2)}, tmp_path / "w.pt")
    loaded = Masked()
    load_weights(loaded, tmp_path / "w.pt")
    assert loaded.weight.tolist() == [1, 1]
    torch.save({"mask": torch.tensor([-torch.inf, 0.0]), "weight": torch.ones(2)}, tmp_path / "w.pt")
    with pytest.raises(DfkdError, match="mask has 1 of 2 values that are NaN or infinite"):
        load_weights(Masked(), tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.pth", "w.bin", "w"])
def test_safetensors_files_are_recognized_by_their_content(tmp_path: Path, name: str) -> None:
    save_file(STATE, tmp_path / name)
    loaded = network(3)
    load_weights(loaded, tmp_path / name)
    assert torch.equal(loaded.state_dict()["0.weight"], STATE["0.weight"])


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pytorch_file_with_the_suffix_safetensors_is_loaded(tmp_path: Path, zipped: bool) -> None:
    torch.save(STATE, tmp_path / "w.safetensors", _use_new_zipfile_serialization=zipped)
    loaded = network(3)
    load_weights(loaded, tmp_path / "w.safetensors")
    assert torch.equal(loaded.state_dict()["0.weight"], STATE["0.weight"])


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("w.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer: fetch the file itself"),
        ("w.pth", b"<!DOCTYPE html><html>404</html>", "is an HTML page"),
        (
            "w.safetensors.index.json",
            b'{"metadata": {}, "weight_map": {"a": "b"}}',
            "is the index of a sharded checkpoint: merge its shards",
        ),
        ("w.safetensors", (10**6).to_bytes(8, "little") + b"{}", "cannot be read: "),
        ("w.pth", (10**6).to_bytes(8, "little") + b"{}", "cannot be read: "),
    ],
)
def test_files_that_are_commonly_mistaken_for_weights_are_identified(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DfkdError) as caught:
        load_weights(network(), tmp_path / name)
    assert problem in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_shard_of_a_checkpoint_is_identified(tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00003.safetensors"
    save_file({"0.weight": STATE["0.weight"]}, path)
    with pytest.raises(DfkdError, match=r"Missing keys .*; the file is shard 1 of 3: merge the shards into one file"):
        load_weights(network(), path)


@pytest.mark.parametrize("content", [SAVED, {"model": SAVED, "epoch": 3}])
def test_the_error_for_a_pickled_network_tells_how_to_convert_it(tmp_path: Path, content: object) -> None:
    message = refused(tmp_path, content)
    assert message.startswith(
        "cannot be read: it requires torch.nn.modules.container.Sequential, and code from weights files is never executed;"
    )
    assert message.endswith("torch.save(network.state_dict(), 'weights.pt')")


def test_the_error_for_a_torchscript_archive_tells_how_to_convert_it(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(SAVED.eval(), torch.zeros(1, 3, 3, 3)), str(tmp_path / "w.pt"))
    with pytest.raises(DfkdError, match=r"is a TorchScript archive: convert it with .*state_dict\(\)"):
        load_weights(network(), tmp_path / "w.pt")


def test_the_class_of_a_configuration_object_in_a_file_is_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "yacs").mkdir()
    (tmp_path / "yacs/config.py").write_text("class CfgNode(dict):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = importlib.import_module("yacs.config").CfgNode(lr=1)
    settings.frozen = True
    torch.save({"model": STATE, "cfg": settings}, tmp_path / "saved.pth")
    for name in ("yacs", "yacs.config"):
        monkeypatch.delitem(sys.modules, name)
    loaded = network(3)
    load_weights(loaded, tmp_path / "saved.pth")
    assert "yacs.config" not in sys.modules
    assert torch.equal(loaded.state_dict()["0.weight"], STATE["0.weight"])


def test_an_encoder_in_a_training_checkpoint_is_loaded_and_checked_in_the_same_way(tmp_path: Path) -> None:
    source, target = (build_model("lraspp:mobilenetv3_small_050", 3, 3) for _ in range(2))
    assert isinstance(source.backbone, nn.Module) and isinstance(target.backbone, nn.Module)
    state = dict(source.backbone.state_dict())
    path = tmp_path / "w.pth"
    torch.save({"model": under("module.", state), "args": argparse.Namespace(lr=1)}, path)
    load_encoder(target, str(path))
    assert all(torch.equal(tensor, state[name]) for name, tensor in target.backbone.state_dict().items())
    name = next(name for name in state if name.endswith("running_var"))
    torch.save({**state, name: state[name] * float("nan")}, path)
    with pytest.raises(DfkdError, match=rf"encoder_weights: .*{name} has .* NaN or infinite"):
        load_encoder(target, str(path))
    torch.save({"model": state, "model_ema": state}, path)
    with pytest.raises(DfkdError, match="'model' and 'model_ema': save the one to load in a separate file"):
        load_encoder(target, str(path))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda state: state[:-1], "do not fit: the package has [0-9]+ tensors, the network has [0-9]+"),
        (
            lambda state: [state[0][:1], *state[1:]],
            r"do not fit: 0\.weight is \(1, 3, 3, 3\) in the package, \(4, 3, 3, 3\) in the network",
        ),
        (lambda state: [state[0] * float("nan"), *state[1:]], r"0\.weight has 108 of 108 values that are NaN or infinite"),
        (lambda state: [state[0].int(), *state[1:]], r"0\.weight is int32: must be float16"),
    ],
)
def test_the_weights_of_a_package_are_checked_in_the_same_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[list[Tensor]], list[Tensor]], problem: str
) -> None:
    package = f"planted_weights_{tmp_path.name}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(PRETRAINED, "planted", Pretrained("resnet10t", package, package, "w.pth"))
    for change in (list, spoil):
        torch.save({f"{number}": tensor for number, tensor in enumerate(change(list(STATE.values())))}, tmp_path / package / "w.pth")
        loaded = network(3)
        if change is list:
            load_pretrained(loaded, "planted")
            assert torch.equal(loaded.state_dict()["0.weight"], STATE["0.weight"])
        else:
            with pytest.raises(DfkdError, match=f"model 'planted': .*{problem}"):
                load_pretrained(loaded, "planted")


@pytest.mark.parametrize("metadata", ['["a list"]', '{"role": 3}', "3", "[" * 100_000, "not JSON"])
def test_a_header_that_is_not_a_json_object_of_strings_is_refused(tmp_path: Path, metadata: str) -> None:
    save_file(STATE, tmp_path / "w.pth", metadata={"dfkd_fast": metadata})
    with pytest.raises(DfkdError, match="cannot be read: ") as caught:
        read_metadata(tmp_path / "w.pth")
    assert str(caught.value).isprintable()


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("small", torch.zeros(2, dtype=torch.uint8))
        self.register_buffer("num_batches_tracked", torch.tensor(0))


@pytest.mark.parametrize("value", [300, -1])
def test_integers_that_the_networks_dtype_cannot_represent_are_refused(tmp_path: Path, value: int) -> None:
    torch.save({"small": torch.tensor([1, value]), "num_batches_tracked": torch.tensor(1)}, tmp_path / "w.pt")
    with pytest.raises(DfkdError, match="small is int64 with values that uint8 cannot represent"):
        load_weights(Counting(), tmp_path / "w.pt")


def test_an_error_of_load_state_dict_is_one_line(tmp_path: Path) -> None:
    torch.save({"small": torch.zeros(2, dtype=torch.uint8)}, tmp_path / "w.pt")  # without the counter, which only batch norms fill in
    with pytest.raises(DfkdError, match="do not fit the network Counting: Missing key") as caught:
        load_weights(Counting(), tmp_path / "w.pt")
    assert str(caught.value).isprintable()


def test_a_key_selects_its_state_dict_even_if_no_key_of_it_matches(tmp_path: Path) -> None:
    content = {"model": {"a.w": torch.ones(1)}, "ema": {"b.w": torch.ones(1)}}
    assert refused(tmp_path, content, "ema").startswith("under 'ema' do not fit the network Sequential: Missing keys 0.weight, ")


def test_a_lazy_network_takes_its_shapes_from_the_file(tmp_path: Path) -> None:
    saved = nn.Linear(3, 2)
    torch.save({"net": saved.state_dict()}, tmp_path / "w.pt")
    loaded = nn.LazyLinear(2)
    load_weights(loaded, tmp_path / "w.pt")
    assert torch.equal(loaded.weight, saved.weight)
