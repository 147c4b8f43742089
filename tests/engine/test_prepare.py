"""The passes over the networks: each has a key in [engine], and none changes the networks of the user."""

import random
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from dfkd_fast import Engine, Method, Objective, Replay, Trainer, Update
from dfkd_fast.engine.prepare import PASSES, prepare
from dfkd_fast.engine.state import TrainState
from dfkd_fast.errors import DfkdError
from dfkd_fast.kernels import batch_norm_act, conv2d_relu
from dfkd_fast.kernels.conv import relu
from dfkd_fast.surgery import BatchNormAct2d, ConvAct2d, ConvBeforeNorm, CpuConv2d, fuse_norm_act
from tests.small import small_method, small_networks

PLAIN = Engine(precision="fp32", channels_last=False, cpu_convolutions=False, fuse_norm_act=False, fold_teacher=False, malloc_reuse=False)


def trainer(engine: Engine) -> Trainer:
    networks = small_networks(teacher="wrn10_1", student="wrn10_1", channels=3)
    return Trainer(*networks, replace(small_method(), engine=engine))


def optimized_networks(trainer: Trainer) -> dict[str, nn.Module]:
    return {"teacher": trainer.state.teacher, "student": trainer.state.student, "generator": trainer.state.generator}


def kinds(network: nn.Module) -> set[type[nn.Module]]:
    return {type(layer) for layer in network.modules()}


def has_fused_norms(network: nn.Module) -> bool:
    return any(isinstance(layer, BatchNormAct2d) for layer in network.modules())


def effects(trainer: Trainer) -> set[str]:
    """Names of the passes that modified the optimized networks."""
    networks = optimized_networks(trainer)
    weights = [parameter for network in networks.values() for parameter in network.parameters() if parameter.ndim == 4]
    traces = {
        "channels_last": all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights),
        "cpu_convolutions": all(CpuConv2d in kinds(network) for network in networks.values()),
        "fuse_norm_act": has_fused_norms(networks["generator"]),
        "fold_teacher": any(hasattr(layer, "folded_norm") for layer in networks["teacher"].modules()),
        "precision": any(parameter.dtype == torch.bfloat16 for parameter in networks["teacher"].parameters()),
    }
    return {name for name, left in traces.items() if left}


def test_with_every_pass_disabled_outputs_equal_those_of_the_users_networks() -> None:
    plain = trainer(PLAIN)
    assert effects(plain) == set()
    for role, network in optimized_networks(plain).items():
        assert kinds(network) == kinds(getattr(plain, role))


@pytest.mark.parametrize(
    ("switch", "value"),
    [("channels_last", True), ("cpu_convolutions", True), ("fuse_norm_act", True), ("fold_teacher", True), ("precision", "bf16")],
)
def test_a_key_enables_its_pass_only(switch: str, value: Any) -> None:
    changes: dict[str, Any] = {switch: value}
    assert effects(trainer(replace(PLAIN, **changes))) == {switch}


def test_all_passes_together_leave_classes_and_modes_of_the_users_networks() -> None:
    networks = small_networks(teacher="wrn10_1", student="wrn10_1", channels=3)
    before = [[(type(layer), layer.training) for layer in network.modules()] for network in networks]
    prepared = Trainer(*networks, Method(engine=Engine(precision="bf16")))
    assert effects(prepared) == {"channels_last", "cpu_convolutions", "fuse_norm_act", "fold_teacher", "precision"}
    assert [[(type(layer), layer.training) for layer in network.modules()] for network in networks] == before


BATCHES: dict[str, list[int]] = {"teacher": [], "student": []}
"""Batch sizes of the calls of :class:`Counted` networks and their copies."""


class Counted(nn.Module):
    def __init__(self, role: str, network: nn.Module) -> None:
        super().__init__()
        self.role, self.network = role, network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if isinstance(count := images.shape[0], int):  # a proxy while torch.fx traces the network
            BATCHES[self.role].append(count)
        return self.network(images)


def test_passes_before_the_first_step_are_few_and_of_few_images() -> None:
    teacher, student, generator = small_networks(teacher="wrn10_1", student="wrn10_1", channels=3)
    for calls in BATCHES.values():
        calls.clear()
    prepare(Counted("teacher", teacher), Counted("student", student), generator, small_method(), seed=0, device=torch.device("cpu"))
    assert BATCHES == {
        # Logits and gradient; the form of the output; before folding, compared with the folded copy.
        "teacher": [4, 4, 2, 2],
        # Logits, gradients of weights and of images; in both modes before and after the fusion; the form of the output in both modes.
        "student": [4, 4, 4, 2, 4, 2, 4, 2, 4],
    }


@pytest.mark.parametrize("update", ["plain", "first-order", "second-order"])
def test_a_students_batch_norms_are_fused_unless_it_is_differentiated_twice(update: Any) -> None:
    networks = small_networks(teacher="wrn10_1", student="wrn10_1", channels=3)
    method = replace(small_method(), update=Update(kind=update), replay=Replay(kind="ema_generator"))
    state = prepare(*networks, method, seed=0, device=torch.device("cpu"))
    assert (has_fused_norms(state.student)) == (update != "second-order")
    assert not has_fused_norms(state.teacher)


def state_for_a_gpu(teacher: nn.Module, *, compares: bool = False, **engine: Any) -> TrainState:
    _, student, generator = small_networks(student="wrn10_1", channels=3)
    method = replace(small_method(), engine=replace(Engine(precision="bf16"), **engine), objective=Objective(attention=float(compares)))
    return prepare(teacher, student, generator, method, seed=0, device=torch.device("cpu"), optimize_for="cuda")


def test_on_a_gpu_the_teachers_convolutions_are_fused_and_the_networks_of_the_user_are_not() -> None:
    teacher = small_networks(teacher="wrn10_1", channels=3)[0]
    state = state_for_a_gpu(teacher)
    assert ConvAct2d in kinds(state.teacher) and ConvAct2d not in kinds(teacher) and not state.notes
    plain = state_for_a_gpu(teacher, fuse_teacher=False)
    assert ConvAct2d not in kinds(plain.teacher)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with state.precision.autocast():
        ours, theirs = state.teacher(images), plain.teacher(images)
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05 * float(theirs.abs().max()))
    assert ConvAct2d not in kinds(trainer(Engine()).state.teacher)  # on a CPU


def test_the_teacher_is_not_fused_where_its_feature_maps_are_compared() -> None:
    assert ConvAct2d not in kinds(state_for_a_gpu(small_networks(teacher="wrn10_1", channels=3)[0], compares=True).teacher)


def test_convolutions_for_which_cudnn_has_no_kernel_run_separately_with_one_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> torch.Tensor:
        raise RuntimeError("GET was unable to find an engine to execute this computation\nand more")

    monkeypatch.setattr(torch, "cudnn_convolution_relu", unsupported)
    monkeypatch.setattr(relu, "cases_without_kernel", missing := dict[str, str]())
    monkeypatch.setattr("dfkd_fast.engine.prepare.cases_without_kernel", missing)
    with torch.library._scoped_library("dfkd_fast", "IMPL") as library:
        library.impl("conv2d_relu", relu._on_gpu, "CPU", allow_override=True)
        state_for_a_gpu(small_networks(teacher="lenet5", channels=3)[0])
        state = state_for_a_gpu(small_networks(teacher="wrn10_1", channels=3)[0])  # notes its own convolutions only
    assert ConvAct2d in kinds(state.teacher)
    (note,) = [note for note in state.notes if "engine.fuse_teacher" in note]
    assert "cuDNN has no fused kernel for 3 of 6 convolutions, such as bfloat16 (2, 16, 32, 32)" in note and "unable to find" in note


@pytest.mark.parametrize("failure", ["untraceable", "no kernel", "wrong", "wrong gradient"])
def test_a_teacher_that_cannot_be_fused_runs_as_before_with_one_note(failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Branching(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x) if len(x) else x

    def broken(*arguments: Any, **keywords: Any) -> torch.Tensor:
        if failure == "no kernel":
            raise RuntimeError("GET was unable to find an engine to execute this computation")
        y = conv2d_relu(*arguments, **keywords)
        return y.detach() + 3 * (y - y.detach()) if failure == "wrong gradient" else 3 * y

    teacher = small_networks(teacher="wrn10_1", channels=3)[0]
    if failure == "untraceable":
        teacher = Branching(teacher)
    else:
        monkeypatch.setattr("dfkd_fast.surgery.fuse_conv_act.conv2d_relu", broken)
    state = state_for_a_gpu(teacher)
    assert ConvAct2d not in kinds(state.teacher)
    notes = [note for note in state.notes if "engine.fuse_teacher" in note]
    expected = {
        "untraceable": "Branching cannot be traced",
        "no kernel": "unable to find an engine",
        "wrong": "its logits would change",
        "wrong gradient": "its input gradient would change",
    }
    assert len(notes) == 1 and expected[failure] in notes[0]


@pytest.mark.parametrize("of", ["output", "gradient", "statistics"])
@pytest.mark.parametrize("role", ["student", "generator"])
def test_a_network_that_fused_batch_norms_change_runs_as_before_with_one_note(role: str, of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    correct = batch_norm_act

    def broken(x: torch.Tensor, mean: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        y = correct(x, mean, *arguments, **keywords)
        if of == "statistics" and keywords["training"]:
            mean.data.mul_(1.01)  # not seen by autograd
        elif of == "gradient":
            return y.detach() + 1.01 * (y - y.detach())
        return y if of == "statistics" else y * 1.01

    monkeypatch.setattr(fuse_norm_act, "batch_norm_act", broken)
    prepared = trainer(Engine())
    assert not has_fused_norms(optimized_networks(prepared)[role])
    expected = {"output": "its outputs in evaluation would change", "gradient": "its gradients would", "statistics": "its buffers would"}
    (note,) = [note for note in prepared.notes if f"engine.fuse_norm_act: the {role}'s" in note]
    assert expected[of] in note


def test_a_student_with_other_results_in_every_call_is_fused_if_it_is_equal_in_evaluation_mode() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 30 * 30, 10))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x + random.random() if self.training else x)

    teacher, _, generator = small_networks()
    prepared = Trainer(teacher, Noisy(), generator, small_method())
    assert has_fused_norms(prepared.state.student) and not prepared.notes


def test_a_student_that_runs_in_float32_only_is_fused() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = small_networks(student="wrn10_1")[1]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x.float())

    teacher, _, generator = small_networks()
    prepared = Trainer(teacher, Single(), generator, small_method())
    assert has_fused_norms(prepared.state.student) and not prepared.notes


def test_a_student_whose_feature_maps_are_compared_is_not_fused() -> None:
    teacher = small_networks(teacher="wrn10_1", channels=3)[0]
    assert not has_fused_norms(state_for_a_gpu(teacher, compares=True).student)
    assert has_fused_norms(state_for_a_gpu(teacher).student)


def test_biases_before_batch_norms_are_skipped_and_on_a_gpu_all_batch_norms_use_the_kernel() -> None:
    state = state_for_a_gpu(small_networks(teacher="wrn10_1", channels=3)[0])
    assert not any(type(layer) is nn.BatchNorm2d for network in (state.student, state.generator) for layer in network.modules())
    on_cpu = trainer(Engine()).state.generator
    assert any(type(layer) is nn.BatchNorm2d for layer in on_cpu.modules())
    for generator in (state.generator, on_cpu):
        assert sum(isinstance(layer, ConvBeforeNorm) for layer in generator.modules()) == 2


def test_preparation_leaves_buffers_and_gradients_of_the_users_networks() -> None:
    networks = small_networks(teacher="wrn10_1", student="wrn10_1", channels=3)
    before = [buffer.clone() for network in networks for buffer in network.buffers()]
    Trainer(*networks, Method(engine=Engine(precision="bf16")))
    assert all(map(torch.equal, before, [buffer for network in networks for buffer in network.buffers()]))
    assert all(parameter.grad is None for network in networks for parameter in network.parameters())


@pytest.mark.parametrize("role", ["student", "generator"])
def test_optimized_networks_share_tensors_with_the_users(role: str) -> None:
    prepared = trainer(Engine(precision="bf16"))
    optimized, original = optimized_networks(prepared)[role], getattr(prepared, role)
    assert [tensor.data_ptr() for tensor in optimized.parameters()] == [tensor.data_ptr() for tensor in original.parameters()]
    assert [tensor.data_ptr() for tensor in optimized.buffers()] == [tensor.data_ptr() for tensor in original.buffers()]


def test_the_generator_is_prepared_first_since_other_passes_use_its_images() -> None:
    assert next(iter(PASSES)) == "generator"


def test_preparing_with_an_untrained_teacher_changes_no_tensor() -> None:
    teacher, student, generator = networks = small_networks()
    with torch.no_grad():
        teacher[-1].weight.zero_()  # type: ignore[index]  # as some last layers begin
    before = [tensor.clone() for network in networks for tensor in network.state_dict().values()]
    prepare(teacher, student, generator, small_method(), seed=0, device=torch.device("cpu"), teacher_trained=False)
    after = [tensor for network in networks for tensor in network.state_dict().values()]
    assert all(torch.equal(*pair) for pair in zip(after, before, strict=True))
    with pytest.raises(DfkdError, match="no gradient through the teacher"):
        Trainer(teacher, student, generator, small_method())


def with_norms() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))


@pytest.mark.parametrize(
    ("loop", "engine", "message"),
    [
        ({"batch_size": 1}, {}, "loop.batch_size = 1: the student cannot take one of the generator's 1×32×32 images in training mode"),
        ({"batch_size": 4}, {"micro_batches": 3}, "engine.micro_batches = 3 of loop.batch_size = 4: the student cannot take one of"),
    ],
)
def test_batches_of_one_image_are_rejected_before_the_first_step(loop: dict[str, Any], engine: dict[str, Any], message: str) -> None:
    teacher, _, generator = small_networks()
    method = replace(small_method(), loop=replace(small_method().loop, **loop), engine=replace(small_method().engine, **engine))
    with pytest.raises(DfkdError, match=re.escape(message)):
        Trainer(teacher, with_norms(), generator, method)
    Trainer(teacher, small_networks()[1], generator, method).fit()  # without batch norms


def test_a_fresh_image_with_replayed_ones_is_not_a_batch_of_one() -> None:
    teacher, _, generator = small_networks()
    method = small_method(replay=Replay(kind="ema_generator"), batch_size=1)
    method = replace(method, loop=replace(method.loop, student_in_generator_step="eval"))
    Trainer(teacher, with_norms(), generator, method).fit()
