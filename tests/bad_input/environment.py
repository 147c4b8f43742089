"""Environment variables that say nonsense."""

from tests.bad_input.case import Case, case


def runs_with(name: str, variable: str, value: str, error: str) -> Case:
    """A command that computes, which ends before it does."""
    return case(name, "distill", "digits", "--resume", "--out", "run", error=error, environment={variable: value})


def in_group(name: str, error: str, **changes: str) -> Case:
    """The same command as one process of two."""
    group = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    environment = {variable: value for variable, value in (group | changes).items() if value}
    return case(name, "distill", "digits", "--resume", "--out", "run", error=error, environment=environment)


CASES: list[Case] = [
    # of one process
    runs_with("threads of no kind", "NUMBA_THREADING_LAYER", "foo", "NUMBA_THREADING_LAYER = 'foo': must be one of default, safe"),
    runs_with("a number of processes that is text", "WORLD_SIZE", "two", "WORLD_SIZE = 'two': must be a whole number ≥ 1"),
    runs_with("no processes", "WORLD_SIZE", "0", "WORLD_SIZE = '0': must be a whole number ≥ 1"),
    runs_with("an empty number of processes", "WORLD_SIZE", "", "WORLD_SIZE = '': must be a whole number"),
    runs_with("half a process", "WORLD_SIZE", "1.5", "WORLD_SIZE = '1.5': must be a whole number"),
    runs_with("more processes than a number holds", "WORLD_SIZE", "9" * 20, "WORLD_SIZE = '99999999999999999999': must be a whole number"),
    runs_with("a number of processes of 5,000 digits", "WORLD_SIZE", "9" * 5000, "WORLD_SIZE = '9999"),
    runs_with("a process of a machine that is text", "LOCAL_RANK", "x", "LOCAL_RANK = 'x': must be a whole number"),
    runs_with(
        "a restart that is text", "TORCHELASTIC_RESTART_COUNT", "once", "TORCHELASTIC_RESTART_COUNT = 'once': must be a whole number"
    ),
    runs_with("threads of numba that are text", "NUMBA_NUM_THREADS", "all", "NUMBA_NUM_THREADS = 'all': must be a whole number"),
    runs_with("no threads of numba", "NUMBA_NUM_THREADS", "0", "NUMBA_NUM_THREADS = '0': must be a whole number ≥ 1"),
    runs_with("more threads of numba than any machine has", "NUMBA_NUM_THREADS", "99999", "NUMBA_NUM_THREADS = '99999'"),
    runs_with("a switch of numba that is text", "NUMBA_DISABLE_JIT", "yes", "NUMBA_DISABLE_JIT = 'yes': must be a whole"),
    runs_with("a switch of numba that is a number", "NUMBA_DISABLE_JIT", "2", "must be a whole number ≥ 0 and ≤ 1"),
    case(
        "a number of processes before images",
        *("evaluate", "weights.pt"),
        error="WORLD_SIZE = 'x': must be a whole number",
        environment={"WORLD_SIZE": "x"},
    ),
    # of one process of several
    in_group("a process of several without a number", "RANK is not set: torchrun sets it", RANK=""),
    in_group("a process beyond the last", "RANK = 2: must be less than WORLD_SIZE = 2", RANK="2"),
    in_group("a process's number that is text", "RANK = 'first': must be a whole number ≥ 0", RANK="first"),
    in_group("a negative process", "RANK = '-1': must be a whole number ≥ 0", RANK="-1"),
    in_group("a port that is text", "MASTER_PORT = 'http': must be a whole number ≥ 1", MASTER_PORT="http"),
    in_group("a port beyond all", "MASTER_PORT = '99999': must be a whole number ≥ 1 and ≤ 65535", MASTER_PORT="99999"),
    in_group("port zero", "MASTER_PORT = '0': must be a whole number ≥ 1", MASTER_PORT="0"),
    in_group("processes without a place to meet", "MASTER_ADDR is not set: torchrun sets it", MASTER_ADDR=""),
    in_group("processes without a port to meet at", "MASTER_PORT is not set: torchrun sets it", MASTER_PORT=""),
]
