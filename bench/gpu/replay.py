"""One call that can be repeated: a CUDA graph on a GPU, the call itself on a CPU."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["replayed"]

WARM_UP = 3


def replayed(step: Callable[[], Sequence[Tensor]], device: torch.device) -> tuple[Callable[[], None], Sequence[Tensor]]:
    """Capture a step.

    Args:
        step: reads and writes tensors that stay where they are; returns its results.
        device: of these tensors.

    Returns:
        What replays the step, and the results, which every replay overwrites. On a CPU a replay is a call whose results are copied.
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
    with torch.cuda.graph(graph):
        results = step()
    return graph.replay, results
