"""``dfkd-fast doctor --teacher``: what is wrong with a teacher is found before hours are spent on it."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dfkd_fast.commands.doctor import check_teacher
from dfkd_fast.errors import DfkdError
from dfkd_fast.models import LeNet5
from dfkd_fast.recipe import load_recipe
from tests.command_line import Run

TEACHERS = """
import torch
from torch import nn


class Scored(nn.Module):
    def __init__(self, score):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
        self.score = score

    def forward(self, x):
        return self.score(self.body(x))


def good(num_classes):
    return Scored(lambda x: 5 * x)


def probable(num_classes):
    return Scored(lambda x: x.softmax(1))


def log_probable(num_classes):
    return Scored(lambda x: x.log_softmax(1))


def random(num_classes):
    return Scored(lambda x: x + torch.rand_like(x))


def broken(num_classes):
    return Scored(lambda x: x * float("nan"))


def few(num_classes):
    return Scored(lambda x: x[:, :7])


def bare(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(1024, 10))
"""


@pytest.fixture
def verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """The verdict on each thing about a teacher of the module above, which was trained on images of mean 0 and variance 1."""
    monkeypatch.chdir(tmp_path)
    name = f"teachers_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(TEACHERS)
    monkeypatch.syspath_prepend(str(tmp_path))

    def judge(function: str, **changes: object) -> dict[str, str]:
        module = __import__(name)
        torch.manual_seed(0)
        teacher: nn.Module = getattr(module, function)(10)
        for layer in teacher.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = None
        for _ in range(5):
            teacher.train()(natural())
        torch.save(teacher.state_dict(), "teacher.pt")
        settings: dict[str, object] = {
            "teacher.model": f"{name}:{function}",
            "teacher.weights": "teacher.pt",
            "data.name": "none",
            "data.mean": [0.45],
            "data.std": [0.25],
        }
        return {check.name: check.verdict for check in check_teacher(load_recipe("digits", settings | changes), torch.device("cpu"))}

    return judge


def natural() -> Tensor:
    """Noise that is as smooth as natural images, of mean 0 and variance 1."""
    noise = nn.functional.interpolate(torch.randn(32, 1, 6, 6), size=32, mode="bicubic")
    return noise / noise.std()


def test_a_good_teacher_passes(verdicts: Callable[..., dict[str, str]]) -> None:
    assert set(verdicts("good").values()) == {"good"}


@pytest.mark.parametrize(
    ("function", "changes", "wrong"),
    [
        ("probable", {}, "scores"),
        ("log_probable", {}, "scores"),
        ("broken", {}, "scores"),
        ("random", {}, "evaluation mode"),
        ("few", {}, "classes"),
        ("bare", {"objective.bn_moments": 1.0}, "batch norms"),
        ("good", {"data.mean": [0.0], "data.std": [0.004]}, "normalization"),
    ],
)
def test_a_wrong_teacher_fails_its_check(
    verdicts: Callable[..., dict[str, str]], function: str, changes: dict[str, object], wrong: str
) -> None:
    assert verdicts(function, **changes)[wrong] == "wrong"


def test_with_data_the_accuracy_is_measured(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(LeNet5(10).state_dict(), tmp_path / "untrained.pt")
    recipe = load_recipe("digits", {"teacher.weights": str(tmp_path / "untrained.pt")})
    accuracy = next(check for check in check_teacher(recipe, torch.device("cpu")) if check.name == "accuracy")
    assert "chance is 10.00 %" in accuracy.result
    assert accuracy.verdict == "wrong"


def test_an_untrained_teacher_cannot_be_checked() -> None:
    with pytest.raises(DfkdError, match="trains its teacher: name one with --weights"):
        check_teacher(load_recipe("digits"), torch.device("cpu"))


def test_a_file_with_another_checksum_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "teacher.pt"
    torch.save(LeNet5(10).state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    check_teacher(load_recipe("digits", {"teacher.weights": str(path), "teacher.sha256": digest[:8].upper()}), torch.device("cpu"))
    with pytest.raises(DfkdError, match=f"teacher.sha256 = '1234': the file .* has {digest}"):
        check_teacher(load_recipe("digits", {"teacher.weights": str(path), "teacher.sha256": "1234"}), torch.device("cpu"))


def test_the_command_prints_a_table_and_fails_if_a_check_fails(run: Run, tmp_path: Path) -> None:
    torch.save(LeNet5(10).state_dict(), tmp_path / "teacher.pt")
    result = run("doctor", "--teacher", "digits", "--weights", tmp_path / "teacher.pt")
    assert result.code == 2
    assert "evaluation mode" in result.out
    assert result.err == "dfkd-fast: --teacher digits: failed checks: accuracy\n"
