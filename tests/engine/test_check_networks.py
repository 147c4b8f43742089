"""Incompatible networks, and networks without the required gradients, are rejected before the first step."""

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FrozenBatchNorm2d

from dfkd_fast import DfkdError, Trainer
from dfkd_fast.engine.compatibility import check_networks
from dfkd_fast.models import GeneratorSettings, build_generator, build_model
from dfkd_fast.surgery import freeze
from tests.small import Networks, small_method, small_networks

CPU = torch.device("cpu")
LATENTS, SIZE, CLASSES = 6, 16, 5


def classifier(width: int = 4, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3), norm(width), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, CLASSES)
    )


class Generator(nn.Module):
    latent_dim = LATENTS

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(LATENTS, 3 * SIZE**2), nn.Unflatten(1, (3, SIZE, SIZE)), nn.BatchNorm2d(3))

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


class Around(nn.Module):
    """A network with a module before and after it, under torch.no_grad if ``no_grad`` is set."""

    latent_dim = LATENTS

    def __init__(
        self,
        network: nn.Module,
        before: Callable[[Tensor], Tensor] = lambda x: x,
        behind: Callable[[Tensor], Any] = lambda y: y,
        no_grad: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.before, self.behind = before, behind
        self.no_grad = no_grad

    def forward(self, x: Tensor) -> Any:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.no_grad):
            return self.behind(self.network(self.before(x)))


def networks() -> Networks:
    torch.manual_seed(0)
    return freeze(classifier()), classifier(), Generator()


def zeroed(network: nn.Module, *names: str) -> nn.Module:
    """A network with all or some parameters set to 0."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if not names or name in names:
                parameter.zero_()
    return network


def check(teacher: nn.Module, student: nn.Module, generator: nn.Module, **options: bool) -> None:
    assert check_networks(teacher, student, generator, CPU, **options) == ((3, SIZE, SIZE), (CLASSES,))


def refused(message: str, teacher: nn.Module, student: nn.Module, generator: nn.Module, **options: bool) -> None:
    with pytest.raises(DfkdError, match=message) as caught:
        check_networks(teacher, student, generator, CPU, **options)
    assert "\n" not in str(caught.value)


def test_networks_that_share_nothing_and_learn_are_accepted() -> None:
    check(*networks())


@pytest.mark.parametrize("shared", ["identity", "storage"])
@pytest.mark.parametrize(("role", "other"), [("student", "teacher"), ("generator", "teacher"), ("student", "generator")])
def test_a_parameter_of_two_networks_is_rejected(role: str, other: str, shared: str) -> None:
    by_role: dict[str, Any] = dict(zip(("teacher", "student", "generator"), networks(), strict=True))
    by_role["generator"].head = nn.Linear(16, CLASSES)
    name, others_name = ("head.weight" if each == "generator" else "5.weight" for each in (role, other))
    theirs = by_role[other].get_parameter(others_name)
    layer = by_role[role].get_submodule(name.removesuffix(".weight"))
    layer.weight = theirs if shared == "identity" else nn.Parameter(theirs.detach())
    refused(f"the {role}'s {name} shares memory with the {other}'s {others_name}: .*pass a copy", **by_role)
    layer.weight = nn.Parameter(theirs.detach().clone())
    check(**by_role)


def test_a_submodule_of_the_teacher_in_the_student_is_rejected() -> None:
    teacher, student, generator = networks()
    student[0] = teacher[0]  # type: ignore[index, operator]
    refused("the student's 0.weight shares memory with the teacher", teacher, student, generator)


def test_one_network_as_teacher_and_student_is_rejected() -> None:
    teacher, _, generator = networks()
    refused("the student's 0.weight shares memory with the teacher.*copy.deepcopy", teacher, teacher, generator)


def test_a_slice_of_the_teachers_weights_is_rejected_but_not_adjacent_memory() -> None:
    teacher, student, generator = networks()
    whole = torch.randn(2, CLASSES, 16)
    teacher[5].weight = nn.Parameter(whole[0], requires_grad=False)  # type: ignore[index]
    student[5].weight = nn.Parameter(whole[1])  # type: ignore[index]
    check(teacher, student, generator)
    student[5].weight = nn.Parameter(whole.flatten()[16 : 16 + CLASSES * 16].view(CLASSES, 16))  # type: ignore[index]
    refused("the student's 5.weight shares memory with the teacher", teacher, student, generator)


def test_running_statistics_of_two_networks_are_rejected_and_constants_are_not() -> None:
    teacher, student, generator = networks()
    norm = nn.BatchNorm2d(3, affine=False)
    refused(
        "the student's 0.running_mean shares memory with the teacher", nn.Sequential(norm, teacher), nn.Sequential(norm, student), generator
    )
    frozen = FrozenBatchNorm2d(3)
    check(nn.Sequential(frozen, teacher), nn.Sequential(frozen, student), generator)
    refused("the generator's 1.running_mean shares memory with the teacher", nn.Sequential(norm, teacher), student, tail(generator, norm))


def tail(generator: nn.Module, layer: nn.Module) -> nn.Module:
    network = nn.Sequential(generator, layer)
    network.latent_dim = LATENTS  # type: ignore[assignment]
    return network


def test_a_network_without_anything_to_train_is_rejected() -> None:
    teacher, student, generator = networks()
    refused("the student has no parameters to train: all 6 of them have requires_grad = False", teacher, freeze(student), generator)
    refused("the student has no parameters to train$", teacher, nn.AdaptiveAvgPool2d(1), generator)
    _, student, generator = networks()
    refused("the generator has no parameters to train: all 4 of them", teacher, student, generator.requires_grad_(False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_to_train_in_another_precision_are_rejected(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    teacher, student, generator = networks()
    refused(rf"the student's weights must be float32, but 0.weight is {name}: .*\.float\(\)", teacher, student.to(dtype), generator)
    teacher, student, generator = networks()
    refused(f"the generator's weights must be float32, but layers.0.weight is {name}", teacher, student, generator.to(dtype))


NO_GRAPH = r"its output has no graph \(torch.no_grad, detach"
NO_DEPENDENCE = "its output does not depend on the images"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"no_grad": True}, NO_GRAPH),
        ({"behind": lambda y: y.detach()}, NO_GRAPH),
        ({"before": lambda x: x.detach()}, NO_GRAPH),
        ({"behind": lambda y: torch.tensor(y.tolist())}, NO_GRAPH),
        ({"before": lambda x: (x * 255).round() / 255}, NO_DEPENDENCE),
        ({"before": lambda x: (x * 255).to(torch.uint8).float()}, NO_GRAPH),
    ],
)
def test_a_teacher_without_a_gradient_to_the_images_is_rejected(options: dict[str, Any], reason: str) -> None:
    teacher, student, generator = networks()
    refused(f"the generator gets no gradient through the teacher: {reason}", freeze(Around(teacher, **options)), student, generator)


def test_a_teacher_of_zeros_is_rejected_unless_it_has_yet_to_be_trained() -> None:
    teacher, student, generator = networks()
    for names in ((), ("5.weight", "5.bias")):
        refused(f"through the teacher: {NO_DEPENDENCE}", zeroed(copy.deepcopy(teacher), *names), student, generator)
    untrained = zeroed(classifier(), "5.weight", "5.bias")
    check(untrained, student, generator, teacher_trained=False)
    refused(f"through the teacher: {NO_GRAPH}", Around(untrained, no_grad=True), student, generator, teacher_trained=False)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"before": lambda x: x.detach()}, NO_GRAPH),
        ({"before": lambda x: x.round()}, NO_DEPENDENCE),
    ],
)
def test_a_student_without_a_gradient_to_the_images_is_rejected_if_the_generator_needs_it(options: dict[str, Any], reason: str) -> None:
    teacher, student, generator = networks()
    student = Around(student, **options)
    refused(f"the generator gets no gradient through the student: {reason}", teacher, student, generator)
    check(teacher, student, generator, adversarial=False)


@pytest.mark.parametrize(
    "options", [{"no_grad": True}, {"behind": lambda y: y.detach()}, {"behind": lambda y: y.detach().requires_grad_()}]
)
def test_a_student_whose_parameters_get_no_gradient_is_rejected(options: dict[str, Any]) -> None:
    teacher, student, generator = networks()
    refused(
        "no gradient of the student's output reaches its parameters: ", teacher, Around(student, **options), generator, adversarial=False
    )


@pytest.mark.parametrize("options", [{"no_grad": True}, {"behind": lambda y: y.detach()}, {"behind": lambda y: y.sign()}])
def test_a_generator_whose_parameters_get_no_gradient_is_rejected(options: dict[str, Any]) -> None:
    teacher, student, generator = networks()
    refused("no gradient of the generator's output reaches its parameters: its output", teacher, student, Around(generator, **options))


class Residual(nn.Module):
    """A residual branch with a gain initialized to 0, in a classifier without a skip connection."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.network(x)


def test_zero_initialized_parameters_are_accepted() -> None:
    teacher, student, generator = networks()
    head = zeroed(copy.deepcopy(student), "5.weight", "5.bias")
    gain = zeroed(copy.deepcopy(student), "1.weight", "1.bias")
    for network in (head, gain, Residual(student), zeroed(copy.deepcopy(student))):
        check(teacher, network, generator)
    check(teacher, student, zeroed(generator))


def test_a_student_initialized_as_a_copy_of_its_teacher_is_accepted() -> None:
    teacher, _, generator = networks()
    check(teacher, copy.deepcopy(teacher).requires_grad_(), generator)


def test_parameters_that_are_never_used_or_frozen_are_accepted() -> None:
    teacher, student, generator = networks()
    student.unused = nn.Linear(3, 3)
    student[0].requires_grad_(False)  # type: ignore[index]
    check(teacher, Around(student[:6]), generator)  # type: ignore[index]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_networks_with_activation_checkpointing_are_accepted_if_gradients_arrive() -> None:
    teacher, student, generator = networks()

    class Checkpointed(Around):
        reentrant = False

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.network, x, use_reentrant=self.reentrant)

    check(freeze(Checkpointed(teacher)), Checkpointed(student), generator)
    Checkpointed.reentrant = True
    check(freeze(Checkpointed(teacher)), student, generator)
    # Reentrant checkpointing computes no gradients if its input does not require any, as in the student step.
    refused("no gradient of the student's output reaches its parameters", teacher, Checkpointed(student), generator)


class DropoutInPlace(nn.Module):
    """Draws random numbers, modifies its input in place, and warns."""

    def forward(self, x: Tensor) -> Tensor:
        warnings.warn("called", stacklevel=1)
        return nn.functional.dropout(x, 0.2, self.training, inplace=True).mul_(2)


def test_the_check_changes_nothing() -> None:
    teacher, student, generator = networks()
    student = nn.Sequential(DropoutInPlace(), zeroed(student, "5.weight"))
    next(student.parameters()).grad = torch.ones(4, 3, 3, 3)
    student.get_submodule("1.1").eval()
    students, generators = copy.deepcopy(student.state_dict()), copy.deepcopy(generator.state_dict())
    modes = [module.training for network in (teacher, student, generator) for module in network.modules()]
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(teacher, student, generator)
    for before, network in ((students, student), (generators, generator)):
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for network in (teacher, student, generator) for module in network.modules()] == modes
    gradients = [parameter.grad for network in (teacher, student, generator) for parameter in network.parameters()]
    assert sum(gradient is not None for gradient in gradients) == 1 and torch.equal(next(student.parameters()).grad, torch.ones(4, 3, 3, 3))  # type: ignore[arg-type]


def test_a_trainer_raises_it_before_the_first_step() -> None:
    teacher, student, generator = small_networks()
    with pytest.raises(DfkdError, match="the generator gets no gradient through the teacher"):
        Trainer(Around(teacher, no_grad=True), student, generator, small_method())


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
@pytest.mark.parametrize("compiled", ["script", "trace", "frozen script"])
def test_compiled_scripts_are_accepted(compiled: str) -> None:
    teacher, student, generator = networks()
    if compiled == "trace":
        x = torch.randn(4, 3, SIZE, SIZE)
        check(torch.jit.trace(teacher, x), torch.jit.trace(student, x, check_trace=False), generator)
        return
    script: Any = torch.jit.script(teacher)
    teacher = torch.jit.freeze(script.eval()) if compiled == "frozen script" else script
    check(teacher, torch.jit.script(student), generator)
    refused("the student's 0.weight shares memory with the teacher", script, script, generator)


def test_networks_under_torch_compile_are_accepted_and_not_compiled_in_training_mode() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled: list[Any] = [torch.compile(network, backend=counter) for network in networks()]
    check(*compiled)
    assert counter.frame_count <= 3  # one compilation per network in evaluation mode


def test_frozen_batch_norms_dense_logits_and_conditional_generators_are_accepted() -> None:
    torch.manual_seed(0)
    _, _, generator = networks()
    check(freeze(classifier(norm=FrozenBatchNorm2d)), classifier(norm=FrozenBatchNorm2d), generator)
    conditional = build_generator(GeneratorSettings(conditional=True, width=2, latent_dim=LATENTS), 3, SIZE, num_classes=2)
    check(*networks()[:2], conditional)
    dense = [build_model("small_fcn4", CLASSES, 3) for _ in range(2)]
    assert check_networks(freeze(dense[0]), dense[1], generator, CPU) == ((3, SIZE, SIZE), (CLASSES, SIZE, SIZE))


def test_torchvisions_transformer_with_a_zero_initialized_head_is_accepted_as_a_student() -> None:
    torch.manual_seed(0)
    teacher, _, generator = networks()
    student = torchvision.models.VisionTransformer(SIZE, 8, 1, 2, 8, 16, num_classes=CLASSES)
    assert not student.heads.head.weight.any()
    check(teacher, student, generator)
    refused("through the teacher", freeze(copy.deepcopy(student)), student, generator)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, 0], r"images \(B, C, H, W\), not \(4, 16, 16\) for B = 4"),
        (lambda x: x[:1], r"images \(B, C, H, W\), not \(1, 3, 16, 16\) for B = 4"),
        (lambda x: (x, x), "images .* not tuple"),
        (lambda x: x.view(7), "cannot take latents"),
    ],
)
def test_a_generator_that_does_not_return_a_batch_of_images_is_rejected(change: Callable[[Tensor], Any], message: str) -> None:
    teacher, student, generator = networks()
    refused(f"the generator .*{message}", teacher, student, Around(generator, behind=change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y.sum(1), r"logits \(B, classes\) or \(B, classes, H, W\), not \(4,\) for B = 4"),
        (lambda y: y.mean(0, keepdim=True), r"not \(1, 5\) for B = 4"),
        (lambda y: {"scores": y}, "must return logits: .*not dict with the keys 'scores'"),
    ],
)
def test_a_network_that_does_not_return_logits_per_image_is_rejected(change: Callable[[Tensor], Any], message: str) -> None:
    teacher, student, generator = networks()
    refused(f"the teacher .*{message}", Around(teacher, behind=change), student, generator)
    refused(f"the student .*{message}", teacher, Around(student, behind=change), generator)


def test_a_student_that_fails_in_training_mode_is_rejected_with_its_error() -> None:
    class OnlyInEvaluation(Around):
        def forward(self, x: Tensor) -> Any:
            assert not self.training, "input height 16 does not match"
            return self.network(x)

    teacher, student, generator = networks()
    message = re.escape("the generator's 3×16×16 images in training mode: AssertionError: input height 16 does not match")
    refused(message, teacher, OnlyInEvaluation(student), generator)
    check(freeze(OnlyInEvaluation(teacher)), student, generator)


def test_running_out_of_memory_is_not_reported_as_incompatibility() -> None:
    def exhaust(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    teacher, student, generator = networks()
    for exhausted in ((Around(teacher, exhaust), student, generator), (teacher, student, Around(generator, exhaust))):
        with pytest.raises(torch.OutOfMemoryError):
            check(*exhausted)


@pytest.mark.parametrize("role", ["teacher", "student", "generator"])
def test_a_network_with_lazy_layers_is_rejected_before_it_was_called(role: str) -> None:
    by_role = dict(zip(("teacher", "student", "generator"), small_networks(), strict=True))
    by_role[role] = nn.Sequential(nn.LazyLinear(10))
    with pytest.raises(DfkdError, match=f"^the {role}'s 0.weight is uninitialized: call a network with lazy layers once"):
        Trainer(by_role["teacher"], by_role["student"], by_role["generator"])
