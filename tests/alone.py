"""Where xdist runs several tests at once, one that is marked ``alone`` waits for the others to end, and they wait for it."""

import fcntl
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _in_turn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if not hasattr(request.config, "workerinput"):
        yield
        return
    alone = request.node.get_closest_marker("alone") is not None
    with (tmp_path_factory.getbasetemp().parent / "turn.lock").open("a+") as lock:  # every worker's
        fcntl.lockf(lock, fcntl.LOCK_EX, 1, 0)  # a queue: nobody overtakes a test that waits to be alone
        fcntl.lockf(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH, 1, 1)
        fcntl.lockf(lock, fcntl.LOCK_UN, 1, 0)
        yield
