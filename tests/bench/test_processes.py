"""Functions that are called in other processes. Times are only limits: no test checks a duration."""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from bench.processes import OutOfTime, Pool, Worker, WorkerError, Workers
from tests.bench.jobs import FAIL, die, run

SOON = 60.0


def has_ended(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


THREADS = torch.get_num_threads() + 1


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    """A worker for calls that do not end its process."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    with Worker() as worker:
        torch.set_num_threads(before)
        yield worker


def test_a_worker_has_the_number_of_threads_of_its_parent_process(worker: Worker) -> None:
    assert worker.call(torch.get_num_threads) == THREADS
    # The process sets it when it first has PyTorch, once.
    worker.call(torch.set_num_threads, THREADS + 1)
    assert worker.call(torch.get_num_threads) == THREADS + 1
    worker.call(torch.set_num_threads, THREADS)


def test_after_an_error_in_a_function_the_process_can_be_called_again(worker: Worker) -> None:
    with pytest.raises(WorkerError, match=r"^ValueError: a reason$") as caught:
        worker.call(run, FAIL)
    assert "at length" in caught.value.detail
    assert "in run" in caught.value.detail
    assert worker.call(os.getpid) != os.getpid()


def test_a_function_that_cannot_be_pickled_or_imported_fails_only_its_call(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WorkerError, match=r"^TypeError: cannot pickle"):
        worker.call(threading.Lock)
    with monkeypatch.context() as patched:
        patched.setattr(os, "only_here", die, raising=False)
        patched.setattr(die, "__module__", "os")
        patched.setattr(die, "__qualname__", "only_here")
        with pytest.raises(WorkerError, match=r"^AttributeError: .*only_here"):
            worker.call(die)
    assert worker.call(os.getpid) != os.getpid()


def test_a_call_that_hangs_logs_a_traceback_and_is_stopped(capfd: pytest.CaptureFixture[str]) -> None:
    with Worker() as worker:
        worker.call(os.getpid)
        with pytest.raises(OutOfTime, match=r"^out of time: stopped after 1 s$"):
            worker.call(run, "while True: pass", limit=1.0)
        assert "in run" in capfd.readouterr().err
        with pytest.raises(WorkerError, match=r"^killed by SIGKILL$"):
            worker.call(os.getpid)


def test_a_call_that_ends_its_process_is_an_error_with_the_signal() -> None:
    with Worker() as worker, pytest.raises(WorkerError, match=r"^killed by SIGKILL$"):
        worker.call(die)


def test_a_busy_process_ends_with_its_worker() -> None:
    with Worker() as worker:
        process = worker.call(os.getpid)
        worker.submit(time.sleep, 1e6)
    assert has_ended(process)


def test_every_worker_is_prepared_before_it_is_taken_and_ends_when_the_next_one_is(tmp_path: Path) -> None:
    with Workers(2, partial(Path.touch, tmp_path / "prepared")) as workers:
        first = workers.take().call(os.getpid)
        assert (tmp_path / "prepared").is_file()
        second = workers.take().call(os.getpid)
        assert has_ended(first)
        assert not has_ended(second)
        with pytest.raises(IndexError):
            workers.take()
    assert has_ended(second)


def test_a_worker_that_cannot_be_prepared_fails_only_when_taken() -> None:
    with Workers(2, partial(run, FAIL)) as workers:
        for _ in range(2):
            with pytest.raises(WorkerError, match=r"^ValueError: a reason$"):
                workers.take()


def test_a_worker_that_is_not_prepared_in_time_is_stopped_only_when_taken() -> None:
    with Workers(2, partial(time.sleep, 1e6)) as workers:
        for _ in range(2):
            with pytest.raises(OutOfTime):
                workers.take(0.1)


def test_no_worker_is_prepared_while_another_of_its_batch_runs(tmp_path: Path) -> None:
    prepared = tmp_path / "prepared"
    with Workers(3, partial(run, f"import os; open({str(prepared)!r}, 'a').write(f'{{os.getpid()}} ')"), batch=2) as workers:
        for taken, count in ((1, 2), (2, 2), (3, 3)):
            workers.take()
            assert len(prepared.read_text().split()) == count, taken


def results_of(pool: Pool[str, int], jobs: Sequence[str], seconds: float = SOON) -> dict[str, int | WorkerError]:
    return dict(pool.results(jobs, time.monotonic() + seconds))


def test_a_job_that_fails_or_crashes_does_not_affect_others_and_its_process_is_replaced() -> None:
    jobs = ["pass", FAIL, "pass  # again", "import os; os._exit(3)", "1 + 1"]
    with Pool(run, 1) as pool:
        results = results_of(pool, jobs)
    assert list(results) == jobs
    assert [str(result) for result in results.values() if isinstance(result, WorkerError)] == [
        "ValueError: a reason",
        "its process ended with code 3",
    ]
    processes = [result for result in results.values() if isinstance(result, int)]
    assert len(set(processes)) == 3


def test_at_the_deadline_a_job_is_stopped_and_the_next_ones_get_a_new_process() -> None:
    with Pool(run, 1) as pool:
        first = results_of(pool, ["pass"])["pass"]
        assert isinstance(first, int)
        assert results_of(pool, ["while True: pass", "pass"], seconds=0.2) == {}
        assert has_ended(first)
        assert isinstance(results_of(pool, ["pass"])["pass"], int)
        assert results_of(pool, ["pass"], seconds=-1.0) == {}


def test_processes_are_reused_and_end_with_their_pool() -> None:
    with Pool(run, 2) as pool:
        results = [*results_of(pool, [f"pass  # {number}" for number in range(5)]).values(), *results_of(pool, ["pass"]).values()]
        processes = {result for result in results if isinstance(result, int)}
        assert len(results) == 6
        assert len(processes) == 2
    assert all(has_ended(process) for process in processes)
