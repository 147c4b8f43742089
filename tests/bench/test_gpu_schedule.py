"""Stages of python -m bench gpu that fail: the others finish, no record is lost, and the table names the fault."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bench.gpu import folder as folders
from bench.gpu import schedule, summary
from bench.gpu.folder import Folder, check_out
from bench.gpu.records import Record, parse, read
from bench.gpu.schedule import Campaign
from dfkd_fast.errors import DfkdError
from tests.bench.faults import all_faults, campaign, stage

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Campaign, list[str], Path]:
    folder = tmp_path_factory.mktemp("faults")
    ran = all_faults(folder, log=lambda line: None)
    return ran, ran.run(10.0), folder


def statuses(ran: Campaign, name: str) -> dict[str, str]:
    return {record.case: record.status for record in summary.latest(ran.records) if record.stage == name}


def runs(process: str) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(process: str) -> bool:
    """Return whether a process ends within 30 seconds; a killed process takes a moment."""
    for _ in range(300):
        if not runs(process):
            return True
        time.sleep(0.1)
    return False


def text(ran: Campaign, name: str, case: str = "") -> str:
    return next(record.text for record in reversed(ran.records) if (record.stage, record.case) == (name, case))


def test_stages_around_the_faults_complete(faulty: tuple[Campaign, list[str], Path]) -> None:
    ran, _, _ = faulty
    for name in ("sound", "sound at the end"):
        assert statuses(ran, name) == {"first": "ok", "second": "ok", "": "ok"}


def test_every_fault_is_named_before_the_results(faulty: tuple[Campaign, list[str], Path]) -> None:
    _, lines, _ = faulty
    failures = [line for line in lines if line.startswith(("FAILED", "WRONG"))]
    assert lines[: len(failures)] == failures
    for expected in [
        "FAILED exception: ZeroDivisionError: planted with a second line",
        "FAILED case / bad: RuntimeError: planted",
        "FAILED hang / stuck: out of time",
        "FAILED hang: out of time",
        "FAILED crash / deadly: killed by SIGSEGV",
        "FAILED exit: exit code 3",
        "FAILED lost GPU / illegal: an illegal memory access was encountered",
        "FAILED full disk: OSError: [Errno 28] No space left on device",
    ]:
        assert expected in failures
    wrong = "WRONG wrong kernel / channel_moments triton float32 contiguous: called: result 1 is off by 1.0e-03"
    assert any(line.startswith(wrong) for line in failures)
    assert len(lines) <= 60
    assert any(line.startswith("sound: second of abc") for line in lines[len(failures) :])


def test_records_before_the_fault_are_kept(faulty: tuple[Campaign, list[str], Path]) -> None:
    ran, lines, folder = faulty
    assert statuses(ran, "exception")["before"] == "ok"
    assert statuses(ran, "hang")["before"] == "ok"
    assert [record.line() for record in read(folder / "out" / "results.jsonl")] == [record.line() for record in ran.records]
    assert (folder / "out" / "summary.txt").read_text().splitlines() == lines
    assert "ZeroDivisionError" in (folder / "out" / "failures.txt").read_text()
    assert {path.name for path in (folder / "out").iterdir()} == {"results.jsonl", "log.txt", "failures.txt", "summary.txt"}


def test_a_stage_continues_after_the_case_that_killed_its_process(faulty: tuple[Campaign, list[str], Path]) -> None:
    ran, _, _ = faulty
    assert statuses(ran, "crash") == {"before": "ok", "deadly": "failed", "after": "ok", "": "ok"}
    assert statuses(ran, "lost GPU") == {"before": "ok", "illegal": "failed", "after": "ok", "": "ok"}
    assert sum((record.stage, record.case) == ("crash", "before") for record in ran.records) == 1


def test_the_line_at_which_a_stage_hangs_is_in_its_log(faulty: tuple[Campaign, list[str], Path]) -> None:
    _, _, folder = faulty
    assert "in hanging" in (folder / "out" / "log.txt").read_text()


def test_child_processes_do_not_outlive_their_stage(faulty: tuple[Campaign, list[str], Path], tmp_path: Path) -> None:
    left = campaign(tmp_path, stage("leaving", "leaving_a_child"), log=lambda line: None)
    left.run(5.0)
    assert statuses(left, "leaving")[""] == "ok"
    for ran, name in ((faulty[0], "hang"), (left, "leaving")):
        assert ends(text(ran, name, "child"))


def test_other_operations_than_the_wrong_one_pass(faulty: tuple[Campaign, list[str], Path]) -> None:
    ran, _, _ = faulty
    of_triton = {case: status for case, status in statuses(ran, "wrong kernel").items() if " triton " in case}
    assert {status for case, status in of_triton.items() if case.startswith("channel_moments")} == {"wrong"}
    assert {status for case, status in of_triton.items() if case.startswith("l1_discrepancy")} == {"ok"}


@pytest.mark.parametrize("name", ["kept", "out"])
def test_a_full_disk_is_reported_and_the_table_is_complete(name: str, tmp_path: Path) -> None:
    ran = campaign(tmp_path, stage("sound", "sound"), log=lambda line: None)
    (tmp_path / name / "results.jsonl").symlink_to("/dev/full")
    lines = ran.run(5.0)
    assert lines[0] == f"FAILED {tmp_path / name / 'results.jsonl'} cannot be written: No space left on device"
    assert any(line.split()[:2] == ["sound", "ok"] for line in lines)
    assert ran.failed


def test_a_second_call_resumes_the_first_one(tmp_path: Path) -> None:
    stages = [stage("sound", "sound"), stage("without time", "without_time"), stage("too long", "sound", needs=50.0)]
    logged: list[str] = []
    first = campaign(tmp_path, *stages, log=logged.append)
    first.run(0.5)
    assert statuses(first, "without time") == {"short": "left", "long": "left", "": "left"}
    assert statuses(first, "too long") == {"": "left"}
    assert "needs 50 s, and " in text(first, "too long")
    assert not first.failed
    second = campaign(tmp_path, *stages, log=logged.append)
    second.run(5.0)
    assert "sound: done in an earlier call" in logged
    assert statuses(second, "too long") == {"first": "ok", "second": "ok", "": "ok"}
    assert sum(record.stage == "sound" for record in second.records) == 3


def test_a_chosen_stage_that_is_done_restarts_and_no_other_runs(tmp_path: Path) -> None:
    stages = [stage("sound", "sound"), stage("other", "sound")]
    for chosen in ((), ("sound",)):
        ran = campaign(tmp_path, *stages, log=lambda line: None)
        ran.run(5.0, chosen)
        assert [record.stage for record in read(tmp_path / "kept" / "results.jsonl")].count("sound") == 3
        assert [record.stage for record in ran.records].count("other") == 3
    assert ran.records[-1].stage == "sound"


def test_a_chosen_stage_without_time_keeps_its_records(tmp_path: Path) -> None:
    for minutes in (5.0, 0.5):
        ran = campaign(tmp_path, stage("sound", "sound", needs=50.0), log=lambda line: None)
        ran.run(minutes, ["sound"])
        assert statuses(ran, "sound") == {"first": "ok", "second": "ok", "": "ok"}
        assert len(read(tmp_path / "kept" / "results.jsonl")) == 3


def test_a_chosen_stage_that_records_nothing_keeps_its_records(tmp_path: Path) -> None:
    campaign(tmp_path, stage("sound", "sound"), log=lambda line: None).run(5.0)
    ran = campaign(tmp_path, stage("sound", "dying_at_once"), log=lambda line: None)
    lines = ran.run(5.0, ["sound"])
    assert lines[0] == "FAILED sound: exit code 3; it recorded nothing, and the records of an earlier call stay"
    assert statuses(ran, "sound") == {"first": "ok", "second": "ok", "": "ok"}
    assert ran.failed


def test_a_case_that_was_left_before_the_process_died_runs_in_the_next_one(tmp_path: Path) -> None:
    ran = campaign(tmp_path, stage("leaving", "leaving_before_dying"), log=lambda line: None)
    ran.run(5.0)
    assert statuses(ran, "leaving") == {"left at first": "ok", "deadly": "failed", "": "ok"}


def test_a_call_resumes_after_a_truncated_line(tmp_path: Path) -> None:
    kept = tmp_path / "kept" / "results.jsonl"
    for _ in range(3):
        ran = campaign(tmp_path, stage("sound", "sound"), log=lambda line: None)
        ran.run(5.0)
        assert statuses(ran, "sound") == {"first": "ok", "second": "ok", "": "ok"}
        assert not ran.failed
        kept.write_text(kept.read_text()[:-20])
    assert sum(record.case == "first" for record in ran.records) == 1


def test_environment_variables_of_the_user_do_not_reach_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DFKD_FAST_BACKEND", "PYTEST_ADDOPTS", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "reference")
    variables = {"TRITON_INTERPRET": "1", "GIVEN": "2"}
    ran = campaign(tmp_path, stage("variables", "recording_variables"), variables=variables, log=lambda line: None)
    ran.run(5.0)
    texts = {record.case: record.text for record in ran.records if record.case}
    assert texts.pop("PyTorch") == "not imported", "a stage that does not use PyTorch would take seconds to start"
    assert texts == {"DFKD_FAST_BACKEND": "cleared", "PYTEST_ADDOPTS": "cleared", "TRITON_INTERPRET": "1", "GIVEN": "2"}


def test_a_stage_ends_when_its_scheduler_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.bench.faults import campaign, stage;"
        "campaign(Path(sys.argv[1]), stage('hang', 'hanging')).run(5.0)"
    )
    scheduler = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not any(record.case == "child" for record in read(tmp_path / "kept" / "results.jsonl")):
        assert scheduler.poll() is None
        time.sleep(0.1)
    scheduler.kill()
    scheduler.wait()
    assert ends(next(record.text for record in read(tmp_path / "kept" / "results.jsonl") if record.case == "child"))


def test_sigterm_ends_the_stage_and_still_prints_the_table(tmp_path: Path) -> None:
    stages = [stage("sound", "sound"), stage("hang", "hanging")]
    ran = campaign(tmp_path, *stages, log=lambda line: None)

    def terminate() -> None:
        while not any(record.stage == "hang" for record in ran.records):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate, daemon=True)
    thread.start()
    lines = ran.run(5.0)
    thread.join()
    assert lines[0] == "INTERRUPTED: the earlier records are kept"
    assert lines[0] in (tmp_path / "out" / "failures.txt").read_text()
    assert statuses(ran, "sound")[""] == "ok"
    assert statuses(ran, "hang")["before"] == "ok"
    assert statuses(ran, "hang")[""] == "left"


def test_a_copy_is_limited_and_keeps_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "FILE_LIMIT", 10_000)
    campaign(tmp_path, stage("flood", "flooding"), log=lambda line: None).run(5.0)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert len(log) == 10_000
    assert log.endswith("999\n")
    assert (tmp_path / "kept" / "log.txt").stat().st_size > 1_000_000


def test_more_cases_than_an_argument_could_name_are_skipped(tmp_path: Path) -> None:
    kept = Folder(tmp_path / "kept", tmp_path / "out")
    kept.replace_records(Record("sound", f"{number} {'x' * 200}", "ok") for number in range(5000))
    kept.append("results.jsonl", Record("sound", "first", "ok").line() + "\n")
    ran = campaign(tmp_path, stage("sound", "sound"), log=lambda line: None)
    ran.run(5.0)
    assert [record.case for record in ran.records[5001:]] == ["second", ""]


def test_truncated_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    whole = Record("smoke", "case", "ok", row={"value": 1.5})
    path.write_text(f"{whole.line()}\n{whole.line()[:20]}{whole.line()}\n{whole.line()}\n{whole.line()[:20]}")
    assert read(path) == [whole, whole]
    path.write_text("something else\n")
    with pytest.raises(ValueError, match="is not a record"):
        read(path)


def test_a_record_after_a_failed_write_starts_on_a_new_line(tmp_path: Path) -> None:
    files = Folder(tmp_path / "kept", tmp_path / "out")
    files.append("results.jsonl", "half of a li")
    files._cut.add("results.jsonl")  # as after an error during the write
    files.append("results.jsonl", Record("smoke", "case", "ok").line() + "\n")
    assert [record.case for record in files.records()] == ["case"]


def test_an_output_folder_with_other_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("log.txt", "results.jsonl"):
        theirs = tmp_path / name.partition(".")[0]
        theirs.mkdir()
        (theirs / name).write_text("mine")
        with pytest.raises(DfkdError, match=f"holds {name}, which"):
            check_out(theirs)
        assert (theirs / name).read_text() == "mine"
    campaign(tmp_path, stage("sound", "sound"), log=lambda line: None).run(5.0)
    check_out(tmp_path / "out")
    check_out(tmp_path / "new")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DfkdError, match="must not be the current folder"):
        check_out(Path())


def test_two_campaigns_at_once_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "STATE", tmp_path)
    with schedule.alone(), pytest.raises(DfkdError, match="another python -m bench gpu is running in this checkout"), schedule.alone():
        pass
    with schedule.alone():
        pass


@pytest.mark.parametrize("line", ["[]", "3", '{"stage": "smoke", "status": "fine"}', '{"case": "x"}', "nothing"])
def test_an_invalid_record_is_refused(line: str) -> None:
    with pytest.raises((TypeError, ValueError)):
        parse(line)


def test_the_table_has_at_most_60_lines_and_counts_the_omitted_failures() -> None:
    records = [Record("tests", f"test {number}", "failed", "planted") for number in range(300)]
    records += [Record("micro", f"case {number}", "ok", "fast", highlight=True) for number in range(100)]
    lines = summary.lines(records, ["tests", "micro"])
    assert len(lines) == 60
    shown = sum(line.startswith("FAILED") for line in lines)
    assert f"... and {300 - shown} more: failures.txt" in lines
    assert sum(line.startswith("micro: fast") for line in lines) > 10
    assert summary.failures(records).count("FAILED") == 300


def test_records_are_one_line_of_json_each() -> None:
    record = Record("tests", "case", "failed", "text", "two\nlines", 1.5, True, "micro", {"a": None, "b": 2}, {"device": "x"})
    assert "\n" not in record.line()
    assert parse(record.line()) == record
    assert json.loads(Record("tests", "", "ok").line()) == {"stage": "tests", "status": "ok"}
