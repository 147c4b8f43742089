"""Files of weights as other programs leave them: what is taken from them, and what is refused."""

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
    """Of one step, with a tensor for each parameter."""
    trained = network()
    steps = torch.optim.Adam(trained.parameters())
    for parameter in trained.parameters():
        parameter.grad = torch.ones_like(parameter)
    steps.step()
    return steps.state_dict()


def load(folder: Path, held: object, key: str = "") -> list[str]:
    """Save, load into another network, check that it is SAVED's state now; returns what was said."""
    path, loaded = folder / "w.pth", network(3)
    said: list[str] = []
    torch.save(held, path)
    load_weights(loaded, path, key=key, log=said.append)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, STATE[name]), name
    return [line.removeprefix(f"weights {path}: ") for line in said]


def refused(folder: Path, held: object, key: str = "") -> str:
    loaded, path = network(3), folder / "w.pth"
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    torch.save(held, path)
    with pytest.raises(DfkdError) as caught:
        load_weights(loaded, path, key=key)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())
    assert str(caught.value).startswith(f"weights {path}")
    assert str(caught.value).isprintable()  # so one line, too
    return str(caught.value).removeprefix(f"weights {path}").lstrip(": ")


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"net": STATE, "acc": 93.1, "epoch": 3}, "took 'net' (9 tensors), left out 'acc', 'epoch'"),
        (
            {"state_dict_ema": STATE, "optimizer": optimizer(), "epoch": 3},
            "took 'state_dict_ema' (9 tensors), left out 'optimizer', 'epoch'",
        ),
        ({"model": STATE, "best": np.float64(3), "last": np.float32(1)}, "took 'model' (9 tensors), left out 'best', 'last'"),
        ({"model": STATE, "curve": np.arange(3)}, "took 'model' (9 tensors), left out 'curve'"),
        ({"model": STATE, "log": defaultdict(list, {"loss": [1.0]})}, "took 'model' (9 tensors), left out 'log'"),
        ({"model": STATE, "args": argparse.Namespace(out=pathlib.Path("x"))}, "took 'model' (9 tensors), left out 'args'"),
        ({**STATE, "epoch": 3, "acc": 93.1}, "took 9 tensors, left out 'epoch', 'acc'"),
        ({"state_dict": under("model."), "epoch": 3}, "took 'state_dict.model' (9 tensors), left out 'epoch'"),
        (
            {"state_dict": {**under("student."), "loss.w": torch.ones(1)}},
            "took 'state_dict.student' (9 tensors), left out 'state_dict.loss'",
        ),
        ({"state": {"net": STATE}, "net.old": 1}, "took 'state.net' (9 tensors), left out 'net.old'"),
        ({**STATE, "total_ops": torch.ones(1), "0.total_params": torch.ones(1)}, "took 9 tensors, left out 'total_ops', 'total_params'"),
        (AveragedModel(SAVED).state_dict(), "took 9 tensors, left out 'n_averaged'"),
        (FusedEMA(SAVED, 0.9).state_dict(), "took 9 tensors, left out 'updates'"),
        (FusedEMA(SAVED, 0.9, shadow_dtype=torch.bfloat16).state_dict(), "took 'module' (9 tensors), left out 'updates', 'shadow'"),
    ],
)
def test_weights_are_found_in_what_trainers_leave_and_one_line_says_which(tmp_path: Path, held: object, said: str) -> None:
    assert load(tmp_path, held) == [said]


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
def test_wrappers_of_parallel_training_and_compilation_are_stripped_at_any_depth_without_a_word(tmp_path: Path, state: State) -> None:
    assert load(tmp_path, state) == []


def test_a_networks_own_names_are_not_stripped(tmp_path: Path) -> None:
    saved, loaded = (nn.ModuleDict({"module": network(seed), "model": network(seed + 10), "1": network(seed + 20)}) for seed in (1, 2))
    torch.save({"model": saved.state_dict()}, tmp_path / "w.pt")
    load_weights(loaded, tmp_path / "w.pt")
    assert all(torch.equal(tensor, saved.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_names_that_differ_in_wrappers_only_are_kept_apart(tmp_path: Path) -> None:
    saved, loaded = (nn.ModuleDict({"module": nn.Linear(2, 2), "_orig_mod": nn.Linear(2, 2)}) for _ in range(2))
    torch.save(saved.state_dict(), tmp_path / "w.pt")
    load_weights(loaded, tmp_path / "w.pt")
    assert all(torch.equal(tensor, saved.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_a_prefix_that_no_wrapper_is_known_by_is_not_guessed_but_can_be_named(tmp_path: Path) -> None:
    held = {**under("backbone."), "head.weight": torch.ones(1)}
    assert "do not fit the network Sequential: Missing keys 0.weight, 0.bias, 1.weight and 5 more" in refused(tmp_path, held)
    assert load(tmp_path, held, "backbone") == ["took 'backbone' (9 tensors), left out 'head'"]


@pytest.mark.parametrize(
    ("held", "names", "key", "taken"),
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
def test_several_states_that_fit_are_named_and_the_key_chooses(tmp_path: Path, held: object, names: str, key: str, taken: str) -> None:
    assert refused(tmp_path, held) == (f"hold several states that fit the network, {names}: choose by key= or teacher.weights_key")
    (said,) = load(tmp_path, held, key)
    assert said.startswith(f"took {taken!r} (9 tensors), left out " if taken else "took 9 tensors, left out ")
    assert "the weights key 'nothing' is not in the file; there are " in refused(tmp_path, held, "nothing")


def test_tied_weights_that_differ_in_the_file_are_refused(tmp_path: Path) -> None:
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    held = tied.state_dict()
    torch.save({name: tensor.clone() for name, tensor in held.items()}, tmp_path / "w.pt")
    load_weights(tied, str(tmp_path / "w.pt"))
    torch.save({**held, "1.weight": held["0.weight"] + 1}, tmp_path / "w.pt")
    with pytest.raises(DfkdError, match=r"0.weight and 1.weight are one tensor in the network, and differ in the file$"):
        load_weights(tied, tmp_path / "w.pt")


def test_a_flipped_bit_of_our_own_files_is_noticed(tmp_path: Path) -> None:
    save_weights(SAVED, tmp_path / "w.safetensors", {"role": "teacher"})
    load_weights(network(3), tmp_path / "w.safetensors")
    content = bytearray((tmp_path / "w.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(DfkdError, match=r"are damaged: the content does not match the checksum in the header$"):
        load_weights(network(3), tmp_path / "w.safetensors")


def test_of_several_states_only_those_that_fit_count(tmp_path: Path) -> None:
    wider = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Sequential(nn.Flatten(), nn.Linear(5, 2))).state_dict()
    assert load(tmp_path, {"teacher": wider, "student": STATE}) == ["took 'student' (9 tensors), left out 'teacher'"]
    assert refused(tmp_path, {"teacher": wider, "student": STATE}, "teacher").startswith(
        "under 'teacher' do not fit the network Sequential: size mismatch for 0.weight ((5, 3, 3, 3) in the file, (4, 3, 3, 3) in"
    )


def test_batch_counters_may_be_missing_as_in_old_files(tmp_path: Path) -> None:
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


def quantised() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch means to give them up; files have them
        return torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)


UNFIT = [
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
        *UNFIT,
        pytest.param(torch.ones(4).to_sparse(), "is sparse or nested (float32): a plain tensor is needed", id="sparse"),
        pytest.param(torch.ones(4, device="meta"), "is without values (float32): a plain tensor is needed", id="meta"),
    ],
)
def test_values_that_no_weight_can_have_are_refused_by_name(tmp_path: Path, tensor: Tensor, problem: str) -> None:
    assert refused(tmp_path, {**STATE, FLOAT: tensor}).startswith(f"{FLOAT} {problem}")


def test_quantised_weights_are_refused_by_name(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert refused(tmp_path, {**STATE, FLOAT: quantised()}).startswith(f"{FLOAT} is quantised (qint8): a plain tensor is needed")


@pytest.mark.parametrize(("tensor", "problem"), UNFIT)
def test_the_same_of_safetensors(tmp_path: Path, tensor: Tensor, problem: str) -> None:
    save_file({**STATE, FLOAT: tensor}, tmp_path / "w.safetensors")
    with pytest.raises(DfkdError) as caught:
        load_weights(network(3), tmp_path / "w.safetensors")
    assert f"{FLOAT} {problem}" in str(caught.value)


def test_a_counter_is_an_integer(tmp_path: Path) -> None:
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


def test_a_mask_that_is_infinite_in_the_network_itself_may_be_in_the_file(tmp_path: Path) -> None:
    torch.save({"mask": torch.tensor([0.0, -torch.inf]), "weight": torch.ones(2)}, tmp_path / "w.pt")
    loaded = Masked()
    load_weights(loaded, tmp_path / "w.pt")
    assert loaded.weight.tolist() == [1, 1]
    torch.save({"mask": torch.tensor([-torch.inf, 0.0]), "weight": torch.ones(2)}, tmp_path / "w.pt")
    with pytest.raises(DfkdError, match="mask has 1 of 2 values that are NaN or infinite"):
        load_weights(Masked(), tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.pth", "w.bin", "w"])
def test_safetensors_are_known_by_their_content(tmp_path: Path, name: str) -> None:
    save_file(STATE, tmp_path / name)
    loaded = network(3)
    load_weights(loaded, tmp_path / name)
    assert torch.equal(loaded.state_dict()["0.weight"], STATE["0.weight"])


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pytorch_file_that_is_called_safetensors_is_loaded(tmp_path: Path, zipped: bool) -> None:
    torch.save(STATE, tmp_path / "w.safetensors", _use_new_zipfile_serialization=zipped)
    loaded = network(3)
    load_weights(loaded, tmp_path / "w.safetensors")
    assert torch.equal(loaded.state_dict()["0.weight"], STATE["0.weight"])


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("w.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS: fetch the file itself"),
        ("w.pth", b"<!DOCTYPE html><html>404</html>", "is a web page"),
        ("w.safetensors.index.json", b'{"metadata": {}, "weight_map": {"a": "b"}}', "is the index of a sharded file: join its parts"),
        ("w.safetensors", (10**6).to_bytes(8, "little") + b"{}", "cannot be read: "),
        ("w.pth", (10**6).to_bytes(8, "little") + b"{}", "cannot be read: "),
    ],
)
def test_what_is_taken_for_weights_by_mistake_is_said(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DfkdError) as caught:
        load_weights(network(), tmp_path / name)
    assert problem in str(caught.value)
    assert str(caught.value).isprintable()


def test_one_part_of_a_sharded_file_is_said(tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00003.safetensors"
    save_file({"0.weight": STATE["0.weight"]}, path)
    with pytest.raises(DfkdError, match=r"Missing keys .*; it is part 1 of 3: join them into one file"):
        load_weights(network(), path)


@pytest.mark.parametrize("held", [SAVED, {"model": SAVED, "epoch": 3}])
def test_a_pickled_network_says_how_it_is_converted(tmp_path: Path, held: object) -> None:
    said = refused(tmp_path, held)
    assert said.startswith("cannot be read: it needs torch.nn.modules.container.Sequential, and nothing that a file names is executed;")
    assert said.endswith("torch.save(network.state_dict(), 'weights.pt')")


def test_a_torchscript_archive_says_how_it_is_converted(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(SAVED.eval(), torch.zeros(1, 3, 3, 3)), str(tmp_path / "w.pt"))
    with pytest.raises(DfkdError, match=r"is a TorchScript archive: convert it by .*state_dict\(\)"):
        load_weights(network(), tmp_path / "w.pt")


def test_a_class_that_settings_in_a_file_are_of_is_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_an_encoder_is_found_in_what_trainers_leave_and_checked_alike(tmp_path: Path) -> None:
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
    with pytest.raises(DfkdError, match="'model' and 'model_ema': store the right one in a file of its own"):
        load_encoder(target, str(path))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda state: state[:-1], "do not fit: there are [0-9]+ tensors, the network has [0-9]+"),
        (lambda state: [state[0][:1], *state[1:]], r"do not fit: 0\.weight is \(1, 3, 3, 3\) there, \(4, 3, 3, 3\) here"),
        (lambda state: [state[0] * float("nan"), *state[1:]], r"0\.weight has 108 of 108 values that are NaN or infinite"),
        (lambda state: [state[0].int(), *state[1:]], r"0\.weight is int32: must be float16"),
    ],
)
def test_the_weights_of_a_package_are_checked_alike(
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


@pytest.mark.parametrize("metadata", ['["a list"]', '{"role": 3}', "3", "[" * 100_000, "no JSON"])
def test_a_header_that_is_no_table_of_strings_is_refused(tmp_path: Path, metadata: str) -> None:
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
def test_integers_that_the_network_cannot_hold_are_refused(tmp_path: Path, value: int) -> None:
    torch.save({"small": torch.tensor([1, value]), "num_batches_tracked": torch.tensor(1)}, tmp_path / "w.pt")
    with pytest.raises(DfkdError, match="small is int64 with values that uint8 cannot hold"):
        load_weights(Counting(), tmp_path / "w.pt")


def test_what_a_network_itself_refuses_is_one_line(tmp_path: Path) -> None:
    torch.save({"small": torch.zeros(2, dtype=torch.uint8)}, tmp_path / "w.pt")  # a counter that no batch norm fills in
    with pytest.raises(DfkdError, match="do not fit the network Counting: Missing key") as caught:
        load_weights(Counting(), tmp_path / "w.pt")
    assert str(caught.value).isprintable()


def test_a_key_finds_its_state_even_where_nothing_of_it_fits(tmp_path: Path) -> None:
    held = {"model": {"a.w": torch.ones(1)}, "ema": {"b.w": torch.ones(1)}}
    assert refused(tmp_path, held, "ema").startswith("under 'ema' do not fit the network Sequential: Missing keys 0.weight, ")


def test_a_lazy_network_is_given_its_shapes_by_the_file(tmp_path: Path) -> None:
    saved = nn.Linear(3, 2)
    torch.save({"net": saved.state_dict()}, tmp_path / "w.pt")
    loaded = nn.LazyLinear(2)
    load_weights(loaded, tmp_path / "w.pt")
    assert torch.equal(loaded.weight, saved.weight)
