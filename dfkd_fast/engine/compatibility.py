"""Compatibility checks of networks and their gradients before a training."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dfkd_fast import distributed
from dfkd_fast.errors import USER_CODE_ERRORS, DfkdError, describe_exception
from dfkd_fast.methods import Objective
from dfkd_fast.models import condition_latents
from dfkd_fast.out_of_memory import is_out_of_memory
from dfkd_fast.surgery import dry_run, eval_mode, get_logits

from .method import Method

__all__ = [
    "check_batch_of_one",
    "check_classifier",
    "check_initialized",
    "check_networks",
    "check_objective",
    "check_smallest_batches",
    "check_trainable_network",
]

SAMPLES = 4
"""Batch size of the checks. With two samples, gradients through a batch norm are rounding errors and may be 0."""


def check_classifier(name: str, network: nn.Module, images: Tensor, source: str) -> torch.Size:
    """Returns the shape of a network's logits for one image: (classes,), or (classes, H, W) for segmentation.

    Args:
        name: Name of the network in error messages.
        network: Maps images (B, C, H, W) to logits.
        images: Small batch on the network's device.
        source: Origin of the images in error messages, such as "the generator's".

    Raises:
        DfkdError: The network fails on these images or does not return one set of logits per image.
    """
    return _eval_logits(name, network, images, source).shape[1:]


def check_trainable_network(name: str, network: nn.Module, images: Tensor, source: str) -> None:
    """Raises a :class:`DfkdError` if a network cannot be trained on images; for the arguments see :func:`check_classifier`."""
    _check_parameters(name, network)
    _dry_training_pass(name, network, partial(_logits, name, source=source), images)


def check_batch_of_one(field: str, name: str, network: nn.Module, image: Tensor, source: str) -> None:
    """Checks that a network can be trained on single images, unlike batch norms with one value per channel.

    Args:
        field: Setting that causes batches of one, with its value; the error message starts with it.
        name: Name of the network in error messages.
        network: Maps images (B, C, H, W) to logits; not modified.
        image: Batch of one image, (1, C, H, W).
        source: Origin of the image in error messages.

    Raises:
        DfkdError: the network cannot take one image in training mode.
    """
    _check_single_sample(field, network, partial(_logits, name, source=source), image)


def _check_single_sample(field: str, network: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> None:
    with dry_run(network) as trial, torch.no_grad():
        trial.train()
        try:
            call(trial, x.clone())
        except DfkdError as error:
            raise DfkdError(f"{field}: {error}") from error


def check_networks(
    teacher: nn.Module,
    student: nn.Module,
    generator: nn.Module,
    device: torch.device,
    *,
    teacher_trained: bool = True,
    adversarial: bool = True,
) -> tuple[torch.Size, torch.Size]:
    """Checks that the networks are compatible and that gradients reach the generator and the student.

    The networks, their gradients and the random states are not modified.

    Args:
        teacher: Maps images (B, C, H, W) to logits.
        student: Maps images (B, C, H, W) to logits of the same shape.
        generator: Maps z (B, latent_dim) to images.
        device: Device of the networks.
        teacher_trained: False if the teacher's weights are not trained yet, so that its logits may not depend on the images.
        adversarial: Whether the generator receives gradients through the student.

    Returns:
        Shape (C, H, W) of a generated image and shape (classes, …) of its logits.

    Raises:
        DfkdError: Shapes do not match, images or logits are not finite, networks share weights, a network to be trained has no
            trainable parameters or none in the default dtype, or no gradient reaches the parameters of one.
    """
    latent_dim = getattr(generator, "latent_dim", None)
    if not isinstance(latent_dim, int):
        raise DfkdError("the generator must have an integer attribute latent_dim, the size of z")
    networks = {"teacher": teacher, "student": student, "generator": generator}
    for role, network in networks.items():
        check_initialized(role, network)
    for role in ("student", "generator"):
        _check_unshared(role, dict(networks[role].named_parameters()), networks)
        _check_parameters(role, networks[role])

    z = _fixed_normal((SAMPLES, latent_dim), device)
    with eval_mode(generator):
        images = _generate(generator, z)
    if not images.isfinite().all():
        raise DfkdError("the generator's images contain NaN or infinite values before any training")
    logits = {role: _eval_logits(role, networks[role], images, "the generator's") for role in ("teacher", "student")}
    for role, values in logits.items():
        if not values.isfinite().all():
            raise DfkdError(f"the {role}'s logits contain NaN or infinite values before any step")
    teacher_shape, student_shape = (logits[role].shape[1:] for role in ("teacher", "student"))
    if teacher_shape != student_shape:
        raise DfkdError(
            f"teacher and student must return logits of the same shape: the teacher returns {tuple(teacher_shape)} per image, "
            f"the student {tuple(student_shape)}"
        )

    images, statistics = _dry_training_pass("generator", generator, _generate, z)
    _check_unshared("generator", statistics, networks)
    _check_passes_gradient("teacher", teacher, images, training=False, initial=not teacher_trained, frozen=True)
    _, statistics = _dry_training_pass("student", student, partial(_logits, "student", source="the generator's"), images)
    _check_unshared("student", statistics, networks)
    if adversarial:
        _check_passes_gradient("student", student, images, training=True, initial=True)
    return images.shape[1:], teacher_shape


def check_objective(objective: Objective, generator: nn.Module, logits_shape: torch.Size) -> None:
    """Raises a :class:`DfkdError` if terms of the objective cannot be computed.

    Args:
        objective: Terms of the generator's loss.
        generator: Generator, with an attribute ``embedding`` if it is conditional.
        logits_shape: Shape of the teacher's logits for one image, (classes,) or (classes, H, W).
    """
    embedding = getattr(generator, "embedding", None)
    if objective.class_nll and len(logits_shape) > 1:
        raise DfkdError(f"objective.class_nll = {objective.class_nll}: needs one class per image, but the teacher returns per-pixel logits")
    if objective.conditional and embedding is None:
        raise DfkdError("objective.class_nll and objective.embedding_norm need a conditional generator (generator.conditional = true)")
    if embedding is not None and embedding.num_embeddings > logits_shape[0]:
        raise DfkdError(f"the generator has {embedding.num_embeddings} class embeddings, but the teacher only {logits_shape[0]} classes")


def check_smallest_batches(method: Method, student: nn.Module, generator: nn.Module, device: torch.device, *, fresh_only: bool) -> None:
    """Raises a :class:`DfkdError` if steps use batches of one sample on which student or generator cannot be trained.

    Args:
        method: Batch size, micro-batches and replay.
        student: Compatible with the generator's images.
        generator: Maps z (B, latent_dim) to images.
        device: Device of the networks.
        fresh_only: Whether some student steps have no replayed samples.
    """
    loop, engine, replay = method.loop, method.engine, method.replay
    if distributed.world_size() > 1 and engine.sync_batch_norm:  # statistics are those of all processes
        return
    field = f"loop.batch_size = {loop.batch_size}"
    if engine.micro_batches > 1:
        field = f"engine.micro_batches = {engine.micro_batches} of {field}"
    z = _fixed_normal((1, int(generator.latent_dim)), device)  # type: ignore[arg-type]
    with eval_mode(generator):
        image = _generate(generator, z)
    if loop.batch_size // engine.micro_batches == 1:
        _check_single_sample(field, generator, _generate, z)
        in_generator_step = method.objective.adversarial > 0 and loop.student_in_generator_step == "train"
        if fresh_only or in_generator_step or method.update.is_retain_acquire:
            check_batch_of_one(field, "student", student, image, "the generator's")
    if method.update.is_retain_acquire and replay.num_rows(loop.batch_size) == 1:
        check_batch_of_one("replay.rows = 1", "student", student, image, "the generator's")


def check_initialized(role: str, network: nn.Module) -> None:
    """Raises a :class:`DfkdError` if parameters or buffers of a network are lazy or on the meta device."""
    for name, tensor in itertools.chain(network.named_parameters(), network.named_buffers()):
        if is_lazy(tensor):
            raise DfkdError(f"the {role}'s {name} is uninitialized: call a network with lazy layers once before passing it")
        if tensor.is_meta:
            raise DfkdError(f"the {role}'s {name} is on the meta device, without values: build the network on the CPU")


def _check_parameters(role: str, network: nn.Module) -> None:
    parameters = dict(network.named_parameters())
    if not parameters:
        raise DfkdError(f"the {role} has no parameters to train")
    trainable = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    if not trainable:
        raise DfkdError(f"the {role} has no parameters to train: all {len(parameters)} of them have requires_grad = False")
    expected = torch.get_default_dtype()
    for name, parameter in trainable.items():
        if parameter.dtype != expected:
            expected_name, actual_name = (str(dtype).removeprefix("torch.") for dtype in (expected, parameter.dtype))
            raise DfkdError(
                f"the {role}'s weights must be {expected_name}, but {name} is {actual_name}: "
                "convert it with .float(); engine.precision sets the autocast dtype"
            )


def _check_unshared(role: str, tensors: Mapping[str, Tensor], networks: Mapping[str, nn.Module]) -> None:
    """Raises a :class:`DfkdError` if tensors that training modifies share memory with another network.

    Args:
        role: Role of the network that owns the tensors.
        tensors: Tensors that training modifies, by name.
        networks: All networks by role.
    """
    for other, network in networks.items():
        if other == role:
            continue
        byte_ranges = defaultdict(list)
        for name, tensor in itertools.chain(network.named_parameters(), network.named_buffers()):
            storage, start, end = _byte_range(tensor)
            byte_ranges[storage].append((start, end, name))
        for name, tensor in tensors.items():
            storage, start, end = _byte_range(tensor)
            for other_start, other_end, other_name in byte_ranges[storage]:
                if start < other_end and other_start < end:
                    raise DfkdError(
                        f"the {role}'s {name} shares memory with the {other}'s {other_name}: training the {role} would change the "
                        f"{other}; pass a copy (copy.deepcopy)"
                    )


def _byte_range(tensor: Tensor) -> tuple[int, int, int]:
    """Returns the address of a tensor's storage, and the start and end of its elements within the storage, in bytes."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    start, itemsize = int(tensor.storage_offset()), tensor.element_size()
    return tensor.untyped_storage().data_ptr(), start * itemsize, (start + int(span)) * itemsize


def _dry_training_pass(
    role: str, network: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], x: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Runs a forward and a backward pass in training mode on a copy of a network and checks that a gradient reaches its parameters.

    Args:
        role: Role of the network in error messages.
        network: Generator or student; not modified.
        call: Calls the network on ``x``.
        x: Small batch.

    Returns:
        The output, detached, and the buffers that the forward pass modifies, such as running statistics, by name.

    Raises:
        DfkdError: The pass fails, or no parameter receives a gradient.
    """
    with dry_run(network) as trial, torch.enable_grad():
        trial.train()  # not chained: a user's train() may return None
        _fill_zeros(trial)
        output = call(trial, x.clone())  # a copy: the network may modify its input in place
        _backward(role, output)
        if not any(_has_gradient(parameter) for parameter in trial.parameters()):
            raise DfkdError(f"no gradient of the {role}'s output reaches its parameters: {_no_gradient_reason(output, 'its parameters')}")
        after = dict(trial.named_buffers())
        changed = {name: buffer for name, buffer in network.named_buffers() if name in after and not torch.equal(buffer, after[name])}
        return output.detach(), changed


def _check_passes_gradient(role: str, network: nn.Module, images: Tensor, *, training: bool, initial: bool, frozen: bool = False) -> None:
    """Checks that the gradient of a network's output reaches the images.

    Args:
        role: Role of the network in error messages.
        network: Maps images (B, C, H, W) to logits; not modified.
        images: Small batch.
        training: Whether the network is in training mode.
        initial: Whether its weights are initial values rather than trained ones.
        frozen: Whether the network is a frozen copy of one that is trained later.

    Raises:
        DfkdError: No gradient reaches the images.
    """
    leaf = images.clone().requires_grad_()
    with dry_run(network) as trial, torch.enable_grad():
        trial.train(training)
        if initial:
            _fill_zeros(trial, frozen=frozen)
        for parameter in trial.parameters():
            parameter.requires_grad_(False)  # as in the generator's step
        output = _logits(role, trial, leaf.clone(), "the generator's")  # a copy: a leaf must not be modified in place
        _backward(role, output)
        if not _has_gradient(leaf):
            raise DfkdError(f"the generator gets no gradient through the {role}: {_no_gradient_reason(output, 'the images')}")


@torch.no_grad()
def _fill_zeros(network: nn.Module, *, frozen: bool = False) -> None:
    """Fills parameters that are initialized to 0, such as last layers or gains of residual branches, with small random values.

    At 0 they block gradients to earlier layers, but only in the first training step.
    """
    for parameter in network.parameters():
        if (parameter.requires_grad or frozen) and not parameter.any():
            parameter.copy_(0.02 * _fixed_normal(parameter.shape, parameter.device))


def _backward(role: str, output: Tensor) -> None:
    """Backpropagates a random projection of an output, since a discrepancy is 0 for a student that is a copy of its teacher."""
    if not output.requires_grad:
        return
    try:
        output.backward(_fixed_normal(output.shape, output.device).to(output.dtype))
    except USER_CODE_ERRORS as error:  # a user's autograd function
        if is_out_of_memory(error):
            raise
        raise DfkdError(f"the {role} cannot be differentiated: {describe_exception(error)}") from error


def _has_gradient(tensor: Tensor) -> bool:
    return tensor.grad is not None and bool(tensor.grad.count_nonzero())


def _no_gradient_reason(output: Tensor, leaves: str) -> str:
    if not output.requires_grad:
        return "its output has no graph (torch.no_grad, detach, NumPy or integers in its forward)"
    return (
        f"its output does not depend on {leaves}, or is piecewise constant in them "
        "(weights that are all 0, or a rounded or detached tensor in its forward)"
    )


def _generate(generator: nn.Module, z: Tensor) -> Tensor:
    """Returns images for z; labels of a conditional generator cycle through the classes."""
    embedding = getattr(generator, "embedding", None)
    labels = torch.arange(len(z), device=z.device) % (1 if embedding is None else embedding.num_embeddings)
    mode = " in training mode" if generator.training else ""
    try:
        images = generator(condition_latents(generator, z, labels))
    except USER_CODE_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise DfkdError(f"the generator cannot take latents {tuple(z.shape)}{mode}: {describe_exception(error)}") from error
    if not isinstance(images, Tensor):
        raise DfkdError(f"the generator must return images (B, C, H, W), not {type(images).__name__}")
    _check_dense("generator", "images", images, z.device)
    if images.ndim != 4 or len(images) != len(z):
        raise DfkdError(f"the generator must return images (B, C, H, W), not {tuple(images.shape)} for B = {len(z)}")
    return images


def _eval_logits(name: str, network: nn.Module, images: Tensor, source: str) -> Tensor:
    """Returns logits for images in evaluation mode; for the arguments see :func:`check_classifier`."""
    check_initialized(name, network)
    with eval_mode(network):
        return _logits(name, network, images.clone(), source)


def _logits(name: str, network: nn.Module, images: Tensor, source: str) -> Tensor:
    mode = " in training mode" if network.training else ""
    try:
        output = network(images)
    except USER_CODE_ERRORS as error:
        if is_out_of_memory(error):
            raise
        size = "×".join(map(str, images.shape[1:]))
        count = "one of " if len(images) == 1 else ""
        raise DfkdError(f"the {name} cannot take {count}{source} {size} images{mode}: {describe_exception(error)}") from error
    try:
        logits = get_logits(output)
    except DfkdError as error:
        raise DfkdError(f"the {name} {error}") from error
    _check_dense(name, "logits", logits, images.device)
    if logits.ndim not in (2, 4) or len(logits) != len(images) or not logits.numel():
        raise DfkdError(
            f"the {name} must return logits (B, classes) or (B, classes, H, W), not {tuple(logits.shape)} for B = {len(images)}"
        )
    return logits


def _check_dense(name: str, what: str, tensor: Tensor, device: torch.device) -> None:
    """Raises a :class:`DfkdError` if an output is not a dense floating-point tensor on the device of the input."""
    kind = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else "sparse" if tensor.layout != torch.strided else ""
    if kind or not tensor.is_floating_point():
        actual = kind or str(tensor.dtype).removeprefix("torch.")
        raise DfkdError(f"the {name} must return {what} as a dense floating-point tensor, not {actual}")
    if tensor.device != device:
        raise DfkdError(f"the {name} must return {what} on the device of its input, {device}, not on {tensor.device}")


def _fixed_normal(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns standard normal numbers, which are the same at every call with a shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
