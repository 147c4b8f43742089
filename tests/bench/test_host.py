"""The host overhead of an EMA update: which calls are timed, and that their kernel does not run. No test checks a time."""

import sys
from pathlib import Path

import pytest

from bench import host, table
from bench.__main__ import main
from dfkd_fast.kernels import operators, use_backend


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    monkeypatch.setattr(sys, "argv", ["bench", "host", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_the_calls_are_measured_without_their_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: list[int] = []
    monkeypatch.setattr(host, "_no_op", lambda averages, *_: called.append(len(averages)))
    operator, out = operators.operator, tmp_path / "host.csv"
    assert not run(monkeypatch, "--network", "generator-a", "--out", str(out))
    rows = table.read(out)
    assert [(row["network"], row["call"]) for row in rows] == [("generator-a", "FusedEMA.update"), ("generator-a", "ema_update_")]
    assert all(float(row[column]) > 0 for row in rows for column in ("median_us", "q20_us", "q80_us"))
    assert set(called) == {int(rows[0]["tensors"])}
    assert len(called) == 2 * (host.CALLS * host.SAMPLES + 1)
    assert operators.operator is operator


def test_a_network_that_is_unknown_or_has_no_kernel_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--network", "resnet19") == 2
    assert "--network 'resnet19': must be one of resnet18" in capsys.readouterr().err
    with use_backend("reference"):
        assert run(monkeypatch, "--network", "generator-a") == 2
    error = capsys.readouterr().err
    assert "generator-a" in error and "no kernel" in error
    assert error.count("\n") == 1
