"""State dict of a training: its contents, checks and restoration."""

import copy
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from dfkd_fast import distributed
from dfkd_fast.errors import DfkdError, first_line
from dfkd_fast.renamed import current_keys, with_weights_like

from .epoch import Epoch
from .method import differences, method_to_dict
from .optim import restore_learning_rates
from .state import TrainState

__all__ = ["load_state_dict", "state_dict"]


def state_dict(state: TrainState) -> dict[str, Any]:
    """Returns the state from which :func:`load_state_dict` resumes a training bit for bit.

    It consists of tensors, numbers and containers, all copied to the CPU. With several processes, all of them must call it.
    """
    shared_replay = state.replay_source is not None and not state.replay_source.per_rank
    live = {
        "teacher": state.teacher_sha256,
        "method": method_to_dict(state.method),
        "networks": {name: network.state_dict() for name, network in state.saved_networks.items()},
        "memory": state.replay_source.state_dict() if state.replay_source is not None and shared_replay else None,
        "optimizers": [state.student_optimizer.state_dict(), state.generator_optimizer.state_dict()],
        "schedules": [schedule.state_dict() for schedule in state.schedules],
        "processes": distributed.all_gather([_per_rank_state(state)]),
        "precision": state.precision.state_dict(),
        "losses": state.losses.values,
        "drift": state.drift.state_dict(),
        "pretrained": state.pretrained,
        "calibrated": state.calibrated,
        "iteration": state.iteration,
        "history": [asdict(epoch) for epoch in state.history],
        "seconds": state.clock.read(),
    }
    copied: dict[str, Any] = _cpu_copy(live)
    return copied


def _per_rank_state(state: TrainState) -> dict[str, Any]:
    """Returns the part of the state that differs between processes."""
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
    """Returns a deep copy of a state of tensors, numbers and containers, with all tensors on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        copied = type(state)({key: _cpu_copy(value) for key, value in state.items()})  # from a dict: a Counter would count pairs
        if hasattr(state, "_metadata"):  # module versions of a state dict
            copied._metadata = state._metadata  # type: ignore[attr-defined]
        return copied
    return type(state)(map(_cpu_copy, state)) if isinstance(state, list | tuple) else state


def load_state_dict(state: TrainState, saved: dict[str, Any]) -> None:
    """Loads a state returned by :func:`state_dict` for the same networks and method.

    Raises:
        DfkdError: The state belongs to other networks, another teacher or other settings. The training is unchanged in that case.
    """
    backup = state_dict(state)
    try:
        _check(state, saved)
        _load(state, saved)
    except Exception as error:
        _load(state, backup)
        if isinstance(error, DfkdError):
            raise
        raise DfkdError(f"the state does not match the networks and the method: {first_line(error)}") from error


def _check(state: TrainState, saved: dict[str, Any]) -> None:
    """Raises a :class:`DfkdError` if a state belongs to another teacher or to other settings; modifies nothing."""
    if (teacher := saved.get("teacher")) is None:
        state.notes.append("the checkpoint does not record its teacher: whether it matches this one was not checked")
    elif teacher != state.teacher_sha256:
        raise DfkdError(
            f"the state is of a run with another teacher: its SHA-256 is {teacher[:12]}, that of this teacher {state.teacher_sha256[:12]}"
        )
    # Missing in checkpoints of early versions.
    recorded = current_keys(saved.get("method", {}), "the state")
    current = method_to_dict(state.method)
    for path, old, new in differences(with_weights_like(current, recorded, "the state"), current):
        raise DfkdError(f"{path} = {new!r}: the state is of a run with {old!r}")
    if len(saved["processes"]) != distributed.world_size():
        raise DfkdError(f"the state is of a run with {len(saved['processes'])} processes, this one has {distributed.world_size()}")
    loop, epochs, iteration = state.method.loop, len(saved["history"]), saved["iteration"]
    if epochs > loop.epochs or (epochs == loop.epochs and iteration):
        raise DfkdError(f"loop.epochs = {loop.epochs}: the state has already completed {epochs} epochs and {iteration} iterations")
    if iteration > loop.iterations_per_epoch or any(len(values) != loop.iterations_per_epoch for values in saved["losses"].values()):
        raise DfkdError(f"loop.iterations_per_epoch = {loop.iterations_per_epoch}: the state is of a run with another number of iterations")


def _load(state: TrainState, saved: dict[str, Any]) -> None:
    state.precision.load_state_dict(saved["precision"])
    for name, network in state.saved_networks.items():
        network.load_state_dict(saved["networks"][name])
    per_rank = saved["processes"][distributed.rank()]
    if state.replay_source is not None:
        state.replay_source.load_state_dict(per_rank["memory"] if state.replay_source.per_rank else saved["memory"])
    for optimizer, values in zip((state.student_optimizer, state.generator_optimizer), saved["optimizers"], strict=True):
        optimizer.load_state_dict(copy.deepcopy(values))  # load_state_dict keeps references
        restore_learning_rates(optimizer, state.device)
    for schedule, values in zip(state.schedules, saved["schedules"], strict=True):
        # The milestones come from the method: some checkpoints contain a wrong copy of them.
        milestones = {name: value for name, value in schedule.state_dict().items() if name == "milestones"}
        schedule.load_state_dict(values | milestones)
    for stream, stream_state in zip((state.fresh_stream, state.replay_stream), per_rank["streams"], strict=True):
        stream.set_state(stream_state)
    torch.set_rng_state(per_rank["torch_random_state"])
    if per_rank["cuda_random_state"] is not None and state.device.type == "cuda":
        torch.cuda.set_rng_state(per_rank["cuda_random_state"], state.device)
    if per_rank.get("buffers") is not None:
        for buffer, value in zip(state.running_statistics(), per_rank["buffers"], strict=True):
            buffer.copy_(value)
    if per_rank["fresh"] is not None:
        for buffer, value in zip((state.images, state.logits), per_rank["fresh"], strict=True):
            buffer.copy_(value)
    state.losses.values = {name: values.to(state.device, copy=True) for name, values in saved["losses"].items()}
    state.drift.load_state_dict(saved["drift"], state.device)
    state.pretrained = saved["pretrained"]
    state.calibrated = saved.get("calibrated", False)
    state.iteration = saved["iteration"]
    state.history = [Epoch(**epoch) for epoch in saved["history"]]
    state.clock.seconds.update(saved["seconds"])
