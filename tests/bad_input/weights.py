"""Files that are not weight files, are damaged, hold something else, or belong to another network."""

import io
import json
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfkd_fast.models import build_model
from tests.bad_input.case import Case, Content, case

Writer = Callable[[Path], object]
HEADER = "t.safetensors cannot be read: Error while deserializing header: "
DOCTOR = ("doctor", "--teacher", "digits")


def weights(name: str, content: Content, error: str, *options: str, file: str = "t.pt") -> Case:
    """A row with a file that is given as the weights of a LeNet-5."""
    return case(name, *DOCTOR, "--weights", file, *options, error=error, files={file: content})


def header(name: str, content: bytes, error: str) -> Case:
    """A row with a safetensors file whose header is damaged."""
    return weights(name, content, HEADER + error, file="t.safetensors")


def ours(name: str, entry: object, error: str) -> Case:
    """A row with a safetensors file of ours whose entry in the header is damaged."""
    return weights(name, noted(entry), error, file="t.safetensors")


def evaluated(name: str, metadata: object, error: str, *options: str) -> Case:
    """A row with a file that is to be evaluated, and says in its header what network it is."""
    return case(name, "evaluate", "s.safetensors", *options, error=error, files={"s.safetensors": noted(metadata)})


def safetensors(header: object, data: int = 0, *, length: int | None = None) -> bytes:
    """A file of the format, with so many bytes of tensors; a header that is not bytes is written as JSON."""
    written = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(written) if length is None else length) + written + bytes(data)


def tensor(dtype: str = "F32", shape: object = (2,), offsets: tuple[int, int] = (0, 8)) -> dict[str, Any]:
    """A tensor's entry in the header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def noted(metadata: object) -> bytes:
    """A file of no tensors whose header has such an entry of this program."""
    return safetensors({"__metadata__": {"dfkd_fast": metadata if isinstance(metadata, str) else json.dumps(metadata)}})


def student(recipe: str) -> dict[str, str]:
    return {"role": "student", "recipe": recipe}


def saved(change: Callable[[dict[str, Any]], object] = lambda state: None) -> Writer:
    """Writes a LeNet-5's state by PyTorch, once a function has changed it, or replaced it by what it returns."""

    def write(path: Path) -> None:
        state: dict[str, Any] = {name: torch.full_like(value, 0.5) for name, value in build_model("lenet5", 10, 1).state_dict().items()}
        found = change(state)
        torch.save(state if found is None else found, path)

    return write


def one(name: str, made: Callable[[Tensor], object]) -> Writer:
    """Writes a LeNet-5's state with something else in place of one tensor."""
    return saved(lambda state: state.update({name: made(state[name])}))


class Executed:
    """Leaves a folder where somebody unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def zipped(**members: str) -> Writer:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)

    return write


def legacy_tar(path: Path) -> None:
    """The format of PyTorch before 0.1.10, whose members are pickles."""
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(Executed())
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def truncated(path: Path) -> None:
    saved()(path)
    path.write_bytes(path.read_bytes()[:-3000])


def in_nested_tensor(value: Tensor) -> Tensor:
    with warnings.catch_warnings(action="ignore"):  # that they are a prototype
        return torch.nested.nested_tensor([value])


def nested(depth: int) -> dict[str, Any]:
    state: dict[str, Any] = {"tensor": torch.zeros(1)}
    for _ in range(depth):
        state = {"deeper": state}
    return state


TWICE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
DAMAGED = "t.pt cannot be read: it is damaged or not a PyTorch file of tensors"
NO_STATE = "t.pt contain no state dict (named tensors); a pickled network or training state cannot be loaded; keys: "

SAFETENSORS = [
    weights("an empty safetensors file", b"", "t.safetensors cannot be read: it is empty", file="t.safetensors"),
    header("a safetensors file shorter than its length", b"\x08\0\0", "header too small"),
    header("a safetensors header of 2⁶³ bytes", safetensors(b"{}", length=2**63), "header too large"),
    header("a safetensors header longer than its file", safetensors(b"{}", length=100), "invalid header length"),
    header("a safetensors header that is no UTF-8", safetensors(b'{"\xff": 1}'), "invalid UTF-8"),
    header("a safetensors header that is no JSON", safetensors(b"{not json"), "invalid JSON"),
    header("a safetensors header that is a list", safetensors([1]), "invalid JSON in header: invalid type: sequence"),
    header("a safetensors header that is nested", safetensors(b'{"x":' * 5000 + b"1" + b"}" * 5000), "invalid JSON"),
    header("safetensors metadata that are a list", safetensors({"__metadata__": [1]}), "invalid JSON in header: invalid type: sequence"),
    header("safetensors metadata that are a number", safetensors({"__metadata__": 1}), "invalid JSON in header: invalid type: integer"),
    header(
        "safetensors metadata of numbers",
        safetensors({"__metadata__": {"a": 1}}),
        "invalid JSON in header: invalid type: integer `1`, expected a",
    ),
    header("a safetensors tensor of no dtype", safetensors({"a": tensor("F31")}, 8), "invalid JSON in header: unknown variant `F31`"),
    header("a safetensors shape that overflows", safetensors({"a": tensor(shape=(2**40, 2**40))}, 8), "overflow computing buffer size"),
    header("a negative safetensors shape", safetensors({"a": tensor(shape=(-1,))}, 8), "invalid JSON in header: invalid value"),
    header("a fractional safetensors shape", safetensors({"a": tensor(shape=(1.5,))}, 8), "invalid JSON in header: invalid type"),
    header("safetensors that overlap", safetensors({"a": tensor(), "b": tensor(offsets=(4, 12))}, 12), "invalid offset for tensor `b`"),
    header("a safetensors tensor that ends before it begins", safetensors({"a": tensor(offsets=(8, 0))}, 8), "invalid offset"),
    header("a safetensors tensor beyond its file", safetensors({"a": tensor()}, 4), "incomplete metadata"),
    header("safetensors of other sizes than their shapes", safetensors({"a": tensor(shape=(3,))}, 8), "invalid shape"),
    weights("a safetensors tensor twice", safetensors(TWICE, 4), "Unexpected keys a", file="t.safetensors"),
    weights(
        "a name that changes a terminal's colours",
        safetensors({"\x1b[31m": tensor()}, 8),
        "Unexpected keys \\x1b[31m",
        file="t.safetensors",
    ),
    weights("a name of 9000 letters", safetensors({"x" * 9000: tensor()}, 8), f"keys {'x' * 200}…", file="t.safetensors"),
    ours("a header of ours that is a list", [1], "'dfkd_fast' in its header must be a JSON object of strings"),
    ours("a header of ours with numbers", {"sha256": 1}, "'dfkd_fast' in its header must be a JSON object of strings"),
    ours("a header of ours that is no JSON", "{", "t.safetensors cannot be read: Expecting property name"),
    ours("a header of ours that is nested", '{"x":' * 100_000, "t.safetensors cannot be read: maximum recursion depth exceeded"),
    ours("a header of ours with a long number", '{"x":' + "9" * 5000 + "}", "t.safetensors cannot be read: Exceeds the limit"),
    ours("another checksum than the tensors'", {"sha256": "0"}, "the content does not match the checksum in the header"),
]
RECIPES = [
    evaluated("a recipe in a header that is no TOML", student("= 1"), "recipe in s.safetensors is not TOML"),
    evaluated("an empty recipe in a header", student(""), "recipe in s.safetensors: name is missing"),
    evaluated("a nested recipe in a header", student("seed = " + "[" * 5000), "recipe in s.safetensors is nested too deeply"),
    evaluated("a recipe in a header with an unknown key", student("name = 'x'\nabsent = 1"), "in s.safetensors: unknown key 'absent'"),
    evaluated("a recipe in a header that is not text", student("name = '\ud800'"), "recipe in s.safetensors: name has a NUL"),
    evaluated("a recipe in a header with an unknown network", student("name = 'x'\nstudent.model = 'absent'"), "unknown model 'absent'"),
    evaluated("code in a header", student("name = 'x'\nstudent.model = 'os:getcwd'"), "code that a file names runs only if"),
    evaluated("a header without a role", {"recipe": "name = 'x'"}, "has a recipe but no role in its metadata"),
    evaluated("a header with another role", {"role": "boss", "recipe": "name = 'x'"}, "role 'boss' in the metadata of s.safetensors"),
    evaluated("a header without a recipe", {}, "s.safetensors has no metadata that names its network"),
]
PYTORCH = [
    weights("an empty file", b"", "t.pt cannot be read: it is empty"),
    weights("a text", "hello", DAMAGED),
    weights("a truncated file", truncated, DAMAGED),
    weights("a zip of something else", zipped(a="b"), DAMAGED),
    weights("a zip with a text for its pickle", zipped(**{"a/data.pkl": "x", "a/version": "3"}), DAMAGED),
    weights("a tar of pickles", legacy_tar, DAMAGED),
    weights("a pickle that executes something", pickle.dumps(Executed()), DAMAGED),
    weights("a pickle of a million brackets", b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", DAMAGED),
    weights("an object among the tensors that executes something", saved(lambda state: {"a": Executed()}), "it requires posix.mkdir"),
    weights("a whole network", saved(lambda state: build_model("lenet5", 10, 1)), "it requires dfkd_fast.models.classifiers.LeNet5"),
    weights("a list of states", saved(lambda state: [state]), "contain no state dict but a list"),
    weights("a tensor alone", saved(lambda state: torch.zeros(2)), "contain no state dict but a Tensor"),
    weights("a dictionary of nothing", saved(lambda state: {}), "Missing keys 0.weight, 0.bias, 3.weight and 7 more"),
    weights("a dictionary of numbers", saved(lambda state: {"a": 1, 2: "b"}), f"{NO_STATE}'a', 2"),
    weights("a state at depth 200", saved(lambda state: nested(200)), f"{NO_STATE}'deeper'"),
    weights("tensors without names", saved(lambda state: dict(enumerate(state.values()))), f"{NO_STATE}0, 1, 2"),
    weights("a pointer of Git LFS", "version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer"),
    weights("a web page", "<html>", "it is an HTML page, probably of a failed download"),
    weights("an index of parts", '{"weight_map": {}}', "it is the index of a sharded checkpoint", file="t.json"),
]
TENSORS = [
    weights("a missing tensor", saved(lambda state: state.__delitem__("0.weight")), "LeNet5: Missing keys 0.weight"),
    weights("a tensor too many", saved(lambda state: state.update(extra=torch.zeros(1))), "LeNet5: Unexpected keys extra"),
    weights("a number in place of a tensor", one("0.weight", lambda x: 3), "LeNet5: Missing keys 0.weight"),
    weights("a tensor of another shape", one("0.weight", lambda x: x[0]), "size mismatch for 0.weight ((1, 5, 5) in the file"),
    weights("integers in place of floats", one("0.weight", Tensor.int), "0.weight is int32: must be float16, bfloat16, float32 or float64"),
    weights("complex numbers in place of floats", one("0.weight", lambda x: x + 0j), "0.weight is complex64: must be float16"),
    weights("floats of 8 bits", one("0.weight", lambda x: x.to(torch.float8_e4m3fn)), "0.weight is float8_e4m3fn: must be float16"),
    weights("NaN", one("0.weight", lambda x: x * torch.nan), "0.weight has 150 of 150 values that are NaN or infinite: must be finite"),
    weights("values that float32 lacks", one("0.weight", lambda x: x.double() * 1e300), "values that are infinite in float32"),
    weights("a sparse tensor", one("0.bias", Tensor.to_sparse), "0.bias is sparse or nested (float32): must be a dense tensor"),
    weights("a tensor without values", one("0.bias", lambda x: x.to("meta")), "0.bias is on the meta device (float32)"),
    weights("a nested tensor", one("0.bias", in_nested_tensor), "0.bias is sparse or nested (float32)"),
    weights("two states that fit", saved(lambda state: {"a": state, "b": state}), "several state dicts that fit the network, 'a' and 'b'"),
    weights("a key that is not there", saved(), "the weights key 'absent' is not in the file", "--weights-key", "absent"),
    weights(
        "the key of another network",
        saved(lambda state: {"a": state, "b": {"x": torch.zeros(1)}}),
        "t.pt under 'b' do not fit the network LeNet5",
        *("--weights-key", "b"),
    ),
    weights(
        "a state that holds itself", saved(lambda state: state.update(me=state)), "several state dicts that fit the network, '.' and 'me'"
    ),
    weights("a part of a file", saved(lambda state: {"0.bias": state["0.bias"]}), "the file is shard 1 of 2", file="m-00001-of-00002.pt"),
]
PLACES = [
    case("weights that do not exist", *DOCTOR, "--weights", "absent.pt", error="absent.pt not found"),
    weights("a folder", Path.mkdir, "t.pt must be a file, not a folder"),
    weights("a pipe", os.mkfifo, "t.pt must be a file, not a pipe or device"),
    case("a device", *DOCTOR, "--weights", "/dev/zero", error="/dev/zero must be a file, not a pipe or device"),
    weights("a link to itself", lambda path: path.symlink_to(path), "t.pt not found"),
    case("the home folder of an unknown user", *DOCTOR, "--weights", "~nobody_at_all/t.pt", error="t.pt not found"),
    case(
        "the home folder of an unknown user in a recipe",
        *DOCTOR,
        "--set",
        "teacher.weights=~nobody_at_all/t.pt",
        error="t.pt not found",
    ),
    case("a file's name of 300 letters", *DOCTOR, "--weights", "x" * 300, error="File name too long"),
    case("a folder that is not a run", "evaluate", ".", error=". holds neither student.safetensors nor teacher.safetensors"),
    case("a pipe to evaluate", "evaluate", "t.pt", error="weights t.pt must be a file, not a pipe or device", files={"t.pt": os.mkfifo}),
    weights("a file of another checksum", saved(), "teacher.sha256 = '00': the file", "--set", "teacher.sha256=00"),
    case(
        "a package without weights",
        *DOCTOR,
        "--weights",
        "package",
        error="model 'lenet5' needs a weights file, since nothing is downloaded",
    ),
    case(
        "weights of another network for a distillation",
        *("distill", "digits", "--teacher", "t.pt"),
        error="do not fit the network LeNet5: Missing keys",
        files={"t.pt": saved(lambda state: {})},
    ),
    case(
        "an encoder of a network that has none",
        *("distill", "digits", "--set", "student.encoder_weights=teacher"),
        error="encoder_weights: the network LeNet5 has no encoder",
    ),
    case(
        "weights of a network that takes other images",
        *("evaluate", "t.pt", "--recipe", "digits", "--role", "teacher", "--set", "data.image_size=36"),
        error="the teacher cannot take data.image_size's 1×36×36 images",
        files={"t.pt": saved()},
    ),
]
CASES: list[Case] = [*SAFETENSORS, *RECIPES, *PYTORCH, *TENSORS, *PLACES]
