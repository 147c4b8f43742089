"""What a checkpoint holds of a training, and how a training goes on from it."""

import copy
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from dfkd_fast import distributed
from dfkd_fast.errors import DfkdError, first_line
from dfkd_fast.renamed import current_keys

from .epoch import Epoch
from .method import differences, method_to_dict
from .optim import restore_learning_rates
from .state import TrainState

__all__ = ["load_state_dict", "state_dict"]


def state_dict(state: TrainState) -> dict[str, Any]:
    """Everything a training needs to go on bit for bit: tensors, numbers and containers, as copies on the CPU. Changes nothing."""
    shared_memory = state.replay_source is not None and not state.replay_source.per_rank
    live = {
        "teacher": state.teacher_sha256,
        "method": method_to_dict(state.method),
        "networks": {name: network.state_dict() for name, network in state.saved_networks.items()},
        "memory": state.replay_source.state_dict() if state.replay_source is not None and shared_memory else None,
        "optimizers": [state.student_optimizer.state_dict(), state.generator_optimizer.state_dict()],
        "schedules": [schedule.state_dict() for schedule in state.schedules],
        "processes": distributed.all_gather([_of_this_process(state)]),
        "precision": state.precision.state_dict(),
        "losses": state.losses.values,
        "drift": state.drift.state_dict(),
        "pretrained": state.pretrained,
        "iteration": state.iteration,
        "history": [asdict(epoch) for epoch in state.history],
        "seconds": state.clock.read(),
    }
    copied: dict[str, Any] = _cpu_copy(live)
    return copied


def _of_this_process(state: TrainState) -> dict[str, Any]:
    """What every process has another one of."""
    replay_source = state.replay_source
    return {
        "streams": [state.fresh_stream.get_state(), state.replay_stream.get_state()],
        "torch_random_state": torch.get_rng_state(),
        "cuda_random_state": torch.cuda.get_rng_state(state.device) if state.device.type == "cuda" else None,
        "memory": replay_source.state_dict() if replay_source is not None and replay_source.per_rank else None,
        "buffers": state.running_statistics() if distributed.world_size() > 1 else None,
        "fresh": [state.images, state.logits] if replay_source is not None and replay_source.stores_fresh else None,
    }


def _cpu_copy(state: Any) -> Any:
    """A state of tensors, numbers and containers that shares no memory with the given one, its tensors on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        copied = type(state)({key: _cpu_copy(value) for key, value in state.items()})  # not of pairs, which a Counter would count
        if hasattr(state, "_metadata"):  # the versions of a state dict's modules
            copied._metadata = state._metadata  # type: ignore[attr-defined]
        return copied
    return type(state)(map(_cpu_copy, state)) if isinstance(state, list | tuple) else state


def load_state_dict(state: TrainState, saved: dict[str, Any]) -> None:
    """Go on from what :func:`state_dict` gave, of the same networks and method.

    Raises:
        DfkdError: it is of something else, such as of another teacher's student or of another schedule; then nothing has changed.
    """
    before = state_dict(state)
    try:
        _check(state, saved)
        _load(state, saved)
    except Exception as error:
        _load(state, before)
        if isinstance(error, DfkdError):
            raise
        raise DfkdError(f"the state is not of these networks and this method: {first_line(error)}") from error


def _check(state: TrainState, saved: dict[str, Any]) -> None:
    """Raise a :class:`DfkdError` for a state that another teacher or schedule left; nothing is changed yet."""
    if (teacher := saved.get("teacher")) is None:
        state.notes.append("the checkpoint does not say which teacher it is of: whether it is this one was not checked")
    elif teacher != state.teacher_sha256:
        raise DfkdError(
            f"the state is of a run with another teacher: of sha256 {teacher[:12]}, and this one's is {state.teacher_sha256[:12]}"
        )
    # Not in states of before it was recorded.
    recorded = current_keys(saved.get("method", {}), "the state")
    for path, theirs, ours in differences(recorded, method_to_dict(state.method)):
        raise DfkdError(f"{path} = {ours!r}: the state is of a run with {theirs!r}")
    if len(saved["processes"]) != distributed.world_size():
        raise DfkdError(f"the state is of {len(saved['processes'])} processes, and here are {distributed.world_size()}")
    loop, epochs, iteration = state.method.loop, len(saved["history"]), saved["iteration"]
    if epochs > loop.epochs or (epochs == loop.epochs and iteration):
        raise DfkdError(f"loop.epochs = {loop.epochs}: the state has {epochs} epochs and {iteration} iterations done already")
    if iteration > loop.iterations_per_epoch or any(len(values) != loop.iterations_per_epoch for values in saved["losses"].values()):
        raise DfkdError(f"loop.iterations_per_epoch = {loop.iterations_per_epoch}: the state is of a run with another number of iterations")


def _load(state: TrainState, saved: dict[str, Any]) -> None:
    state.precision.load_state_dict(saved["precision"])
    for name, network in state.saved_networks.items():
        network.load_state_dict(saved["networks"][name])
    own = saved["processes"][distributed.rank()]
    if state.replay_source is not None:
        state.replay_source.load_state_dict(own["memory"] if state.replay_source.per_rank else saved["memory"])
    for optimizer, values in zip((state.student_optimizer, state.generator_optimizer), saved["optimizers"], strict=True):
        optimizer.load_state_dict(copy.deepcopy(values))  # it would keep the very tensors
        restore_learning_rates(optimizer, state.device)
    for schedule, values in zip(state.schedules, saved["schedules"], strict=True):
        # The milestones are the method's: some checkpoints hold a miscounted copy, which is never reached.
        own_milestones = {name: value for name, value in schedule.state_dict().items() if name == "milestones"}
        schedule.load_state_dict(values | own_milestones)
    for stream, position in zip((state.fresh_stream, state.replay_stream), own["streams"], strict=True):
        stream.set_state(position)
    torch.set_rng_state(own["torch_random_state"])
    if own["cuda_random_state"] is not None and state.device.type == "cuda":
        torch.cuda.set_rng_state(own["cuda_random_state"], state.device)
    if own.get("buffers") is not None:
        for buffer, value in zip(state.running_statistics(), own["buffers"], strict=True):
            buffer.copy_(value)
    if own["fresh"] is not None:
        for buffer, value in zip((state.images, state.logits), own["fresh"], strict=True):
            buffer.copy_(value)
    state.losses.values = {name: values.to(state.device, copy=True) for name, values in saved["losses"].items()}
    state.drift.load_state_dict(saved["drift"], state.device)
    state.pretrained = saved["pretrained"]
    state.iteration = saved["iteration"]
    state.history = [Epoch(**epoch) for epoch in saved["history"]]
    state.clock.seconds.update(saved["seconds"])
