"""One call that can be repeated: a CUDA graph on a GPU, the call itself on a CPU."""

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
        step: reads and writes tensors that stay where they are; returns its results.
        device: of these tensors.

    Returns:
        What replays the step, and the results, which every replay overwrites. On a CPU a replay is a call whose results are copied.

    Raises:
        CaptureError: the step cannot be captured.
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
