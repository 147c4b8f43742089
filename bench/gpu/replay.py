"""Repeats a call: as a CUDA graph on a GPU, by calling it again on a CPU."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dfkd_fast.errors import first_line

from .context import CaptureError

__all__ = ["replayed"]

WARM_UP = 3


def replayed(step: Callable[[], Sequence[Tensor]], device: torch.device) -> tuple[Callable[[], None], Sequence[Tensor]]:
    """Capture a step.

    Args:
        step: function that reads and writes tensors at fixed addresses, and returns its results.
        device: device of these tensors.

    Returns:
        A function that replays the step, and the results, which every replay overwrites. On a CPU a replay calls the step and copies its
        results.

    Raises:
        CaptureError: The step cannot be captured.
    """
    if device.type != "cuda":
        results = step()

        def repeat() -> None:
            for result, new in zip(results, step(), strict=True):
                result.detach().copy_(new.detach())

        return repeat, results
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            results = step()
    except RuntimeError as error:
        raise CaptureError(f"the capture failed: {first_line(error)}") from error
    return graph.replay, results
