"""The stages, in order. A new stage is a module with a function ``run(context)``, and a line here."""

from typing import NamedTuple

__all__ = ["STAGES", "Stage"]


class Stage(NamedTuple):
    """A stage, which runs in its own process."""

    name: str
    limit: float
    """Time limit in seconds on a GPU."""
    rehearsal_limit: float
    """Time limit in seconds of a rehearsal."""
    needs: float
    """Minimum remaining time in seconds to start the stage."""
    function: str
    """``module:function`` of a :class:`~bench.gpu.context.Context`."""


STAGES = (
    Stage("environment", 60, 240, 5, "bench.gpu.environment:run"),
    Stage("smoke", 80, 240, 15, "bench.gpu.smoke:run"),
    Stage("tests", 150, 240, 30, "bench.gpu.tests:run"),
    Stage("micro", 120, 240, 20, "bench.gpu.micro:run"),
    Stage("end-to-end", 220, 240, 30, "bench.gpu.end_to_end:run"),
    Stage("accuracy", 90, 240, 20, "bench.gpu.accuracy:run"),
)
