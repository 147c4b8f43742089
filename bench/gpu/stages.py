"""The stages, in the order in which they run. A new one is a file with a function ``run(context)``, and a line here."""

from typing import NamedTuple

__all__ = ["STAGES", "Stage"]


class Stage(NamedTuple):
    """What runs in a process of its own."""

    name: str
    limit: float
    """Seconds it may take at most on a GPU."""
    rehearsal_limit: float
    """Seconds its rehearsal may take at most on a CPU."""
    needs: float
    """Seconds below which it is not worth starting."""
    function: str
    """``module:function``; takes a :class:`~bench.gpu.context.Context`."""


STAGES = (
    Stage("environment", 60, 240, 5, "bench.gpu.environment:run"),
    Stage("smoke", 80, 240, 15, "bench.gpu.smoke:run"),
    Stage("tests", 150, 240, 30, "bench.gpu.tests:run"),
    Stage("micro", 120, 240, 20, "bench.gpu.micro:run"),
    Stage("end-to-end", 220, 240, 30, "bench.gpu.end_to_end:run"),
    Stage("accuracy", 90, 240, 20, "bench.gpu.accuracy:run"),
)
