import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dfkd_fast import DfkdError, Trainer
from dfkd_fast.errors import OutOfMemoryError
from dfkd_fast.evaluation import Evaluator
from dfkd_fast.out_of_memory import is_out_of_memory, memory_for
from tests.command_line import Run

TINY = [
    *("--set", "loop.epochs=2", "--set", "loop.iterations_per_epoch=2", "--set", "loop.batch_size=8", "--set", "loop.student_steps=2"),
    *("--set", "teacher.epochs=1", "--set", "generator.width=2", "--set", "report.samples=9"),
]


def raised_by(size: tuple[int, ...]) -> Exception:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(size)
    return raised.value


@pytest.mark.parametrize(
    "error",
    [
        raised_by((2**50,)),
        raised_by((2**40, 2**40)),
        torch.OutOfMemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
        MemoryError(),
    ],
    ids=lambda error: str(error)[:40] or type(error).__name__,
)
def test_every_allocator_s_error_becomes_one_line_with_the_settings(error: Exception) -> None:
    with (
        pytest.raises(OutOfMemoryError, match=r"^out of memory for the steps.*: lower one of loop\.batch_size = 7$"),
        memory_for("the steps", {"loop.batch_size": 7}),
    ):
        raise error


def test_numpy_s_errors_are_known() -> None:
    for shape in ((2**50,), (2**40, 2**40)):
        with pytest.raises((MemoryError, ValueError)) as raised:
            np.empty(shape)
        assert is_out_of_memory(raised.value)


def test_the_amount_is_given_in_gib() -> None:
    with pytest.raises(DfkdError, match=r"1,048,576\.0 GiB at once"), memory_for("a tensor", {}):
        torch.empty(2**48)


@pytest.mark.parametrize("error", [RuntimeError("shapes"), ValueError("a value"), TypeError("a type"), KeyError("out of memory")])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error.args[0])), memory_for("the steps", {}):
        raise error


def test_during_a_run_the_last_checkpoint_is_named_and_kept(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    iterate = Trainer.iterate

    def short_of_memory(trainer: Trainer) -> None:
        if trainer.history:
            torch.empty(2**50)
        iterate(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "iterate", short_of_memory)
        result = run("distill", "digits", "--out", "a", *TINY)
    assert result.code == 2
    assert result.err.startswith("dfkd-fast: out of memory for the training, 4,194,304.0 GiB at once: lower one of loop.batch_size = 8")
    assert result.err.endswith("the last good checkpoint is a/checkpoints/iteration-00000002.pt\n")
    assert run("distill", "digits", "--out", "a", "--resume").code == 0


def test_a_run_that_fails_before_its_first_checkpoint_leaves_nothing(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run("teach", "digits", "--out", "t", *TINY).code == 0
    before = sorted(tmp_path.rglob("*"))

    def short_of_memory(*_: object) -> None:
        torch.empty(2**50)

    for owner, name, what in ((Evaluator, "__call__", "the evaluation"), (Trainer, "iterate", "the training")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, short_of_memory)
            result = run("distill", "digits", *TINY, "--teacher", "t/teacher.safetensors")
        assert result.code == 2
        assert f"out of memory for {what}" in result.err
        assert sorted(tmp_path.rglob("*")) == before


def test_what_a_trainer_refuses_is_reported_before_the_teacher_is_trained(run: Run, tmp_path: Path) -> None:
    result = run("distill", "digits", "--set", "objective.bn_moments=1", "--set", "teacher.model=lenet5")
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert "bn_moments" in result.err
    assert not result.out
    assert list(tmp_path.iterdir()) == []


def test_trying_the_steps_before_a_run_changes_nothing_of_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def student(folder: str) -> bytes:
        assert run("distill", "digits", "--out", folder, *TINY, "--set", "loop.drift_samples=4").code == 0
        return (Path(folder) / "student.safetensors").read_bytes()

    tried = student("tried")
    with monkeypatch.context() as patch:
        patch.setattr("dfkd_fast.commands.distill.rehearse", lambda *_: None)
        assert student("untried") == tried
    logs = [[json.loads(line)["losses"] for line in (Path(name) / "metrics.jsonl").open()] for name in ("tried", "untried")]
    assert logs[0] == logs[1]


def test_a_network_short_of_memory_is_not_taken_for_one_that_does_not_fit(make_trainer: object) -> None:
    class Huge(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.empty(len(images), 2**48)

    from dfkd_fast.engine.compatibility import check_classifier

    with pytest.raises(RuntimeError, match="can't allocate memory"):
        check_classifier("teacher", Huge(), torch.zeros(2, 1, 8, 8), "the generator's")
