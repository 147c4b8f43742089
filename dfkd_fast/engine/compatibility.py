"""Whether networks fit each other and learn through each other, found out before hours are spent."""

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
    "check_learner",
    "check_networks",
    "check_objective",
    "check_smallest_batches",
]

SAMPLES = 4
"""Of the batches that are tried. Behind a batch norm of two samples, gradients to its input are rounding, and may be 0."""


def check_classifier(name: str, network: nn.Module, images: Tensor, source: str) -> torch.Size:
    """Shape of a network's logits for one image: (classes,), or (classes, H, W) of a segmenter.

    Args:
        name: what to call it in errors.
        network: images (B, C, H, W) → logits.
        images: a small batch, on the network's device.
        source: whose images they are.

    Raises:
        DfkdError: it cannot take them, or does not return logits for each.
    """
    return _evaluated(name, network, images, source).shape[1:]


def check_learner(name: str, network: nn.Module, images: Tensor, source: str) -> None:
    """Raise a :class:`DfkdError` for a network that cannot be trained on images; arguments as :func:`check_classifier`'s."""
    _check_trainable(name, network)
    _learn(name, network, partial(_called, name, source=source), images)


def check_batch_of_one(field: str, name: str, network: nn.Module, image: Tensor, source: str) -> None:
    """Refuse that a network is trained on one image at a time which it cannot take, as batch norms cannot a single value a channel.

    Args:
        field: what makes batches that small, with its value: an error begins with it.
        name: what to call the network in errors.
        network: images (B, C, H, W) → logits; nothing of it changes.
        image: one, (1, C, H, W).
        source: whose image it is.

    Raises:
        DfkdError: it cannot take it in training mode.
    """
    _try_one(field, network, partial(_called, name, source=source), image)


def _try_one(field: str, network: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> None:
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
    trained: bool = True,
    adversarial: bool = True,
) -> tuple[torch.Size, torch.Size]:
    """Shapes of one generated image and of its logits, once all three networks were seen to fit each other and to pass gradients on.

    The networks, their gradients and the random states are as before.

    Args:
        teacher: images (B, C, H, W) → logits.
        student: the same.
        generator: z (B, latent_dim) → images.
        device: where they are.
        trained: False for a teacher that has no trained weights yet, whose logits may be 0 whatever the images.
        adversarial: whether the generator learns through the student, too.

    Raises:
        DfkdError: their shapes do not fit, images or logits are not finite, two share weights, a network to be trained has none to
            train or none in the default precision, or no gradient reaches what must learn by it.
    """
    latent_dim = getattr(generator, "latent_dim", None)
    if not isinstance(latent_dim, int):
        raise DfkdError("the generator must have an integer attribute latent_dim: the size of z")
    networks = {"teacher": teacher, "student": student, "generator": generator}
    for role, network in networks.items():
        check_initialized(role, network)
    for role in ("student", "generator"):
        _check_unshared(role, dict(networks[role].named_parameters()), networks)
        _check_trainable(role, networks[role])

    z = _normal((SAMPLES, latent_dim), device)
    with eval_mode(generator):
        images = _generated(generator, z)
    if not images.isfinite().all():
        raise DfkdError("the generator's images have values that are NaN or infinite before any training")
    logits = {role: _evaluated(role, networks[role], images, "the generator's") for role in ("teacher", "student")}
    for role, values in logits.items():
        if not values.isfinite().all():
            raise DfkdError(f"the {role}'s logits have values that are NaN or infinite before any step")
    teacher_shape, student_shape = (logits[role].shape[1:] for role in ("teacher", "student"))
    if teacher_shape != student_shape:
        raise DfkdError(
            f"teacher and student disagree on the classes: the teacher gives {tuple(teacher_shape)} logits an image, "
            f"the student {tuple(student_shape)}"
        )

    images, statistics = _learn("generator", generator, _generated, z)
    _check_unshared("generator", statistics, networks)
    _check_passes_gradient("teacher", teacher, images, training=False, initial=not trained, frozen=True)
    _, statistics = _learn("student", student, partial(_called, "student", source="the generator's"), images)
    _check_unshared("student", statistics, networks)
    if adversarial:
        _check_passes_gradient("student", student, images, training=True, initial=True)
    return images.shape[1:], teacher_shape


def check_objective(objective: Objective, generator: nn.Module, logits_shape: torch.Size) -> None:
    """Raise a :class:`DfkdError` for terms that such a generator, or logits of such a shape (classes, …), cannot give."""
    embedding = getattr(generator, "embedding", None)
    if objective.class_nll and len(logits_shape) > 1:
        raise DfkdError(f"objective.class_nll = {objective.class_nll}: is of one class an image, and the teacher gives logits a pixel")
    if objective.conditional and embedding is None:
        raise DfkdError("objective.class_nll and objective.embedding_norm need a conditional generator (generator.conditional = true)")
    if embedding is not None and embedding.num_embeddings > logits_shape[0]:
        raise DfkdError(f"the generator has {embedding.num_embeddings} class embeddings, the teacher {logits_shape[0]} classes")


def check_smallest_batches(method: Method, student: nn.Module, generator: nn.Module, device: torch.device, *, alone: bool) -> None:
    """Raise a :class:`DfkdError` where steps give student or generator one sample at a time, and they cannot be trained on one.

    Args:
        method: its batch size and pieces.
        student, generator: that fit each other.
        device: where they are.
        alone: whether student steps may have fresh samples only.
    """
    loop, engine, replay = method.loop, method.engine, method.replay
    if distributed.world_size() > 1 and engine.sync_batch_norm:  # they see the samples of all processes
        return
    field = f"loop.batch_size = {loop.batch_size}"
    if engine.micro_batches > 1:
        field = f"engine.micro_batches = {engine.micro_batches} of {field}"
    z = _normal((1, int(generator.latent_dim)), device)  # type: ignore[arg-type]
    with eval_mode(generator):
        image = _generated(generator, z)
    if loop.batch_size // engine.micro_batches == 1:
        _try_one(field, generator, _generated, z)
        in_generator_step = method.objective.adversarial > 0 and loop.student_in_generator_step == "train"
        if alone or in_generator_step or method.update.retains:
            check_batch_of_one(field, "student", student, image, "the generator's")
    if method.update.retains and replay.rows_of(loop.batch_size) == 1:
        check_batch_of_one("replay.rows = 1", "student", student, image, "the generator's")


def check_initialized(role: str, network: nn.Module) -> None:
    """Raise a :class:`DfkdError` for a network with parameters or buffers that have no shape or no values yet."""
    for name, tensor in itertools.chain(network.named_parameters(), network.named_buffers()):
        if is_lazy(tensor):
            raise DfkdError(f"the {role}'s {name} has no shape yet: call a network with lazy layers once before it is given")
        if tensor.is_meta:
            raise DfkdError(f"the {role}'s {name} is on the meta device, without values: build the network on the CPU")


def _check_trainable(role: str, network: nn.Module) -> None:
    parameters = dict(network.named_parameters())
    if not parameters:
        raise DfkdError(f"the {role} has no parameters to train")
    trainable = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    if not trainable:
        raise DfkdError(f"the {role} has no parameters to train: all {len(parameters)} of them have requires_grad = False")
    expected = torch.get_default_dtype()
    for name, parameter in trainable.items():
        if parameter.dtype != expected:
            called, given = (str(dtype).removeprefix("torch.") for dtype in (expected, parameter.dtype))
            raise DfkdError(
                f"the {role}'s weights must be {called}, and {name} is {given}: "
                "convert it with .float(); engine.precision sets what it computes in"
            )


def _check_unshared(role: str, tensors: Mapping[str, Tensor], networks: Mapping[str, nn.Module]) -> None:
    """Refuse that what training changes of a network lies in the memory of another one.

    Args:
        role: of the network.
        tensors: what training changes, by name.
        networks: all, by role.
    """
    for other, network in networks.items():
        if other == role:
            continue
        places = defaultdict(list)
        for name, tensor in itertools.chain(network.named_parameters(), network.named_buffers()):
            storage, begin, end = _place(tensor)
            places[storage].append((begin, end, name))
        for name, tensor in tensors.items():
            storage, begin, end = _place(tensor)
            for first, last, others_name in places[storage]:
                if begin < last and first < end:
                    raise DfkdError(
                        f"the {role} shares {name} with the {other}, whose {others_name} it is: training the {role} would change the "
                        f"{other}; give it a copy (copy.deepcopy)"
                    )


def _place(tensor: Tensor) -> tuple[int, int, int]:
    """Of a tensor: the address of its storage, and where in it its elements begin and end, in bytes."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    begin, size = int(tensor.storage_offset()), tensor.element_size()
    return tensor.untyped_storage().data_ptr(), begin * size, (begin + int(span)) * size


def _learn(role: str, network: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Refuse a network none of whose parameters would get a gradient in training; nothing of it changes.

    Args:
        role: what to call it in errors.
        network: the generator, or the student.
        call: it with x.
        x: a small batch.

    Returns:
        Its output in training mode, and its buffers that training changes, such as running statistics, by name.
    """
    with dry_run(network) as trial, torch.enable_grad():
        trial.train()  # whose result a user's own may lack
        _fill_zeros(trial)
        output = call(trial, x.clone())  # which a network may change in place
        _differentiate(role, output)
        if not any(_arrived(parameter) for parameter in trial.parameters()):
            raise DfkdError(f"no gradient of the {role}'s output reaches its parameters: {_reason(output, 'its parameters')}")
        after = dict(trial.named_buffers())
        changed = {name: buffer for name, buffer in network.named_buffers() if name in after and not torch.equal(buffer, after[name])}
        return output.detach(), changed


def _check_passes_gradient(role: str, network: nn.Module, images: Tensor, *, training: bool, initial: bool, frozen: bool = False) -> None:
    """Refuse a network that passes no gradient on to the images; nothing of it changes.

    Args:
        role: what to call it in errors.
        network: images (B, C, H, W) → logits.
        images: a small batch.
        training: in which mode.
        initial: whether its weights are those it starts training with.
        frozen: whether it is a frozen copy of a network that is yet to be trained.
    """
    leaf = images.clone().requires_grad_()
    with dry_run(network) as trial, torch.enable_grad():
        trial.train(training)
        if initial:
            _fill_zeros(trial, frozen=frozen)
        for parameter in trial.parameters():
            parameter.requires_grad_(False)  # as in the generator's step
        output = _called(role, trial, leaf.clone(), "the generator's")  # a leaf of the graph must not be changed in place
        _differentiate(role, output)
        if not _arrived(leaf):
            raise DfkdError(f"the generator gets no gradient through the {role}: {_reason(output, 'the images')}")


@torch.no_grad()
def _fill_zeros(network: nn.Module, *, frozen: bool = False) -> None:
    """Give parameters that begin at 0, as a last layer or a residual branch's gain may, small random values.

    They stop the gradients of what is before them, but for the first step of training only.
    """
    for parameter in network.parameters():
        if (parameter.requires_grad or frozen) and not parameter.any():
            parameter.copy_(0.02 * _normal(parameter.shape, parameter.device))


def _differentiate(role: str, output: Tensor) -> None:
    """Backpropagate a random projection: not a discrepancy, which is 0 where a student begins as a copy of its teacher."""
    if not output.requires_grad:
        return
    try:
        output.backward(_normal(output.shape, output.device).to(output.dtype))
    except USER_CODE_ERRORS as error:  # a user's autograd function
        if is_out_of_memory(error):
            raise
        raise DfkdError(f"the {role} cannot be differentiated: {describe_exception(error)}") from error


def _arrived(tensor: Tensor) -> bool:
    return tensor.grad is not None and bool(tensor.grad.count_nonzero())


def _reason(output: Tensor, leaves: str) -> str:
    if not output.requires_grad:
        return "its output has no graph (torch.no_grad, detach, NumPy or integers in its forward)"
    return (
        f"its output does not depend on {leaves}, or only in steps (weights that are all 0, or a rounded or detached tensor in its forward)"
    )


def _generated(generator: nn.Module, z: Tensor) -> Tensor:
    """Images for z, and for the classes in turn where a generator is conditional."""
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
    _check_plain("generator", "images", images, z.device)
    if images.ndim != 4 or len(images) != len(z):
        raise DfkdError(f"the generator must return images (B, C, H, W), not {tuple(images.shape)} for B = {len(z)}")
    return images


def _evaluated(name: str, network: nn.Module, images: Tensor, source: str) -> Tensor:
    """Logits for images in evaluation mode; arguments as :func:`check_classifier`'s."""
    check_initialized(name, network)
    with eval_mode(network):
        return _called(name, network, images.clone(), source)


def _called(name: str, network: nn.Module, images: Tensor, source: str) -> Tensor:
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
    _check_plain(name, "logits", logits, images.device)
    if logits.ndim not in (2, 4) or len(logits) != len(images) or not logits.numel():
        raise DfkdError(
            f"the {name} must return logits (B, classes) or (B, classes, H, W), not {tuple(logits.shape)} for B = {len(images)}"
        )
    return logits


def _check_plain(name: str, what: str, tensor: Tensor, device: torch.device) -> None:
    """Refuse what a network returns where it is no dense tensor of floating-point numbers on the device of its input."""
    kind = "quantised" if tensor.is_quantized else "nested" if tensor.is_nested else "sparse" if tensor.layout != torch.strided else ""
    if kind or not tensor.is_floating_point():
        found = kind or str(tensor.dtype).removeprefix("torch.")
        raise DfkdError(f"the {name} must return {what} as a dense tensor of floating-point numbers, not {found}")
    if tensor.device != device:
        raise DfkdError(f"the {name} must return {what} on the device of its input, {device}, not on {tensor.device}")


def _normal(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal numbers, always the same for a shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
