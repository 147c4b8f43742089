import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from dfkd_fast.methods import Batch, EmaGenerator, Part, Replay, VaeReplay
from dfkd_fast.models import Generator, GeneratorA, GeneratorSettings, Vae, build_generator
from tests.states import through_a_file


def generator() -> GeneratorA:
    torch.manual_seed(0)
    return GeneratorA(5, 3, 8, width=4)


def train_a_little(network: nn.Module) -> None:
    network.train()(torch.randn(6, 5))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter))


def state(network: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(network.state_dict())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("decay", [0.0, 0.2, 0.95, 1.0])
def test_parameters_and_statistics_follow_the_closed_form_and_counters_are_copied(layout: torch.memory_format, decay: float) -> None:
    original = generator().to(memory_format=layout)
    average, history = EmaGenerator(original, decay), [state(original)]
    for _ in range(4):
        train_a_little(original)
        average.follow(original)
        history.append(state(original))
    weights = [decay**4, *((1 - decay) * decay ** (3 - age) for age in range(4))]
    kinds = set()
    for name, actual in average.generator.state_dict().items():
        kinds.add(name.rpartition(".")[2])
        if actual.is_floating_point():
            expected = sum(weight * past[name].double() for weight, past in zip(weights, history, strict=True))
            torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
        else:
            assert actual.item() == 4
    assert kinds == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def test_the_average_starts_as_a_copy_of_its_generator() -> None:
    original = generator()
    average, start = EmaGenerator(original, 0.95), state(original)
    train_a_little(original)
    assert all(torch.equal(tensor, start[name]) for name, tensor in average.generator.state_dict().items())
    moved = state(original)
    average.follow(original)
    assert all(torch.equal(tensor, moved[name]) for name, tensor in original.state_dict().items())


def test_the_average_is_never_trained_and_its_generator_still_is() -> None:
    original = generator()
    average = EmaGenerator(original, 0.95)
    average.follow(original)
    assert not any(parameter.requires_grad for parameter in average.generator.parameters())
    assert not average.generator(torch.randn(6, 5)).requires_grad
    assert original.training
    assert all(parameter.requires_grad for parameter in original.parameters())


def test_the_average_normalises_with_its_statistics_and_leaves_them_alone() -> None:
    original = generator()
    average = EmaGenerator(original, 0.5)
    train_a_little(original)
    average.follow(original)
    before, z = state(average.generator), torch.randn(6, 5)
    images = average.generator(z)
    assert all(torch.equal(tensor, before[name]) for name, tensor in average.generator.state_dict().items())
    torch.testing.assert_close(images[:1], average.generator(z[:1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "wrong", [{"kind": "bank"}, {"share": 1.0}, {"share": -0.1}, {"weight": -1.0}, {"fresh_weight": -1.0}, {"decay": 0.9}]
)
def test_a_section_with_a_wrong_value_names_the_field(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Replay(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"ema_generator": {"decay": 1.5}},
        {"ema_generator": {"decay": -0.1}},
        {"memory_bank": {"slots": 0}},
        {"memory_bank": {"every": 0}},
        {"memory_bank": {"storage": "int8"}},
        {"vae": {"latent_dim": 0}},
        {"vae": {"steps": 0}},
        {"vae": {"lr": 0.0}},
        {"vae": {"leak": 1}},
    ],
)
def test_a_subsection_with_a_wrong_value_names_the_field(wrong: dict[str, dict[str, Any]]) -> None:
    ((section, fields),) = wrong.items()
    with pytest.raises(ValidationError, match=f"{section}.{next(iter(fields))}"):
        Replay(**wrong)  # type: ignore[arg-type]


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def conditional(num_classes: int) -> Generator:
    torch.manual_seed(0)
    return build_generator(GeneratorSettings(latent_dim=5, width=4, conditional=True), 3, 8, num_classes=num_classes)


def test_singular_vectors_of_a_spectral_norm_are_copied_so_that_the_average_is_normalised() -> None:
    torch.manual_seed(0)
    original = build_generator(GeneratorSettings(model="B", latent_dim=6, width=2, spectral_norm=True), 3, 16).train()
    source = EmaGenerator(original, 0.5)
    for _ in range(3):
        with torch.no_grad():
            for parameter in original.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for _ in range(20):
            original(torch.randn(4, 6))  # every forward pass runs a power iteration
        source.follow(original)
    averaged = dict(source.generator.named_buffers())
    vectors = [(averaged[name], vector) for name, vector in original.named_buffers() if name.endswith(("._u", "._v"))]
    assert len(vectors) == 10
    for ours, theirs in vectors:
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("num_classes", [1, 6])
def test_replayed_latents_are_conditioned_on_random_classes_by_the_averaged_embedding(num_classes: int) -> None:
    original = conditional(num_classes)
    average = EmaGenerator(original, 0.5, rows=64)
    before = state(original)["embedding.weight"]
    train_a_little(original)
    average.follow(original)
    embedding = (before + original.state_dict()["embedding.weight"]) / 2
    assert not torch.allclose(embedding, before)

    actual = average.latents(stream(3)) - torch.randn(64, 5, generator=stream(3))
    distances = (actual[:, None] - embedding).norm(dim=2)
    assert (distances.amin(1) < 1e-5).all()
    assert set(distances.argmin(1).tolist()) == set(range(num_classes))
    assert not actual.requires_grad


@pytest.mark.parametrize("build", [generator, lambda: conditional(6)])
def test_the_average_is_reset_in_place_to_the_pretrained_generator(build: Callable[[], nn.Module]) -> None:
    original = build()
    average = EmaGenerator(original, 0.95)
    train_a_little(original)
    average.start(original)
    started = state(original)
    train_a_little(original)
    assert all(torch.equal(tensor, started[name]) for name, tensor in average.generator.state_dict().items())
    assert not any(parameter.requires_grad for parameter in average.generator.parameters())
    assert not average.generator.training


def vae_replay(**options: Any) -> VaeReplay:
    """Source of 2×8×8 images. Its teacher is not frozen, to detect gradients that reach it."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(108, 6)).eval()
    vae = Vae(5, 2, 8, width=3)
    for _ in range(3):  # running statistics that differ from those of a batch
        vae.decoder(1 + torch.randn(6, 5))
        vae.encode(torch.randn(6, 2, 8, 8) - 1)
    return VaeReplay(vae, teacher, rows=options.pop("rows", 4), fresh_rows=3, **options)


def student_batch(seed: int = 1) -> Batch:
    """A batch of six fresh and four replayed rows."""
    torch.manual_seed(seed)
    return Batch(torch.randn(10, 2, 8, 8), torch.randn(10, 6), [Part(6, 1.0), Part(4, 1.0)])


def gradients(parameters: Any) -> list[Tensor | None]:
    return [parameter.grad for parameter in parameters]


@pytest.mark.parametrize("pixels", [True, False])
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_the_autoencoders_loss_is_l1_on_logits_and_pixels_and_the_divergence_from_a_normal(pixels: bool, kl: float) -> None:
    source = vae_replay(pixels=pixels, kl=kl)
    source.vae.double()
    source.teacher.double()
    twin = copy.deepcopy(source.vae)
    x, noise = torch.randn(7, 2, 8, 8).double(), torch.randn(7, 5).double()
    logits = torch.randn(7, 6).double()
    loss = source.loss(x, logits, noise)
    loss.backward(inputs=list(source.vae.parameters()))

    mean, log_variance = twin.encoder(x).split(5, dim=1)
    deviation = torch.exp(log_variance).sqrt()
    rebuilt = twin.decoder(mean + deviation * noise)
    expected = (source.teacher(rebuilt) - logits).abs().sum() / (7 * 6)
    expected = expected + kl * kl_divergence(Normal(mean, deviation), Normal(0.0, 1.0)).sum() / 7
    if pixels:
        expected = expected + (rebuilt - x).abs().sum() / (7 * 2 * 8 * 8)
    expected.backward(inputs=list(twin.parameters()))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(source.vae.parameters()), gradients(twin.parameters()), rtol=1e-9, atol=1e-12)


def latent_loss(source: VaeReplay, z: Tensor) -> Tensor:
    logits = source.teacher(source.vae.decoder(z))
    mean_prediction = logits.softmax(1).mean(0)
    moments = F.mse_loss(z.var(0), torch.ones(5)) + F.mse_loss(z.mean(0), torch.zeros(5)) if len(z) > 1 else 0.0
    return F.cross_entropy(logits, logits.argmax(1)) + 5 * (mean_prediction * mean_prediction.log()).sum() + moments


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("leak", [False, True])
def test_replayed_latents_have_taken_one_step_of_adam_on_the_tuning_loss(rows: int, leak: bool) -> None:
    source = vae_replay(rows=rows, latent_lr=0.03, leak=leak)
    twin = copy.deepcopy(source)
    actual = source.latents(stream(2))
    start = torch.empty(rows, 5).normal_(generator=stream(2))
    z = start.clone().requires_grad_()
    adam = torch.optim.Adam([z], lr=0.03)
    latent_loss(twin, z).backward(inputs=[z])
    adam.step()
    torch.testing.assert_close(actual, z.detach(), rtol=0, atol=1e-5)
    assert (actual - start).abs().amax() > 0.02
    assert not actual.requires_grad


def test_latents_that_take_no_step_are_those_that_were_drawn() -> None:
    assert torch.equal(vae_replay(latent_lr=0.0).latents(stream(2)), torch.empty(4, 5).normal_(generator=stream(2)))


@pytest.mark.parametrize("leak", [False, True])
def test_drawing_latents_moves_neither_weights_nor_statistics_and_gives_the_teacher_no_gradient(leak: bool) -> None:
    source = vae_replay(leak=leak)
    before = state(source.vae)
    with torch.no_grad():  # as in a student step
        source.generator(source.latents(stream()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.vae.state_dict().items())
    assert gradients(source.teacher.parameters()) == 4 * [None]
    assert not any(module.training for module in source.generator.modules())


def test_drawing_latents_leaves_no_gradient_in_the_decoder_and_its_next_update_is_the_same_without_it() -> None:
    source, twin = vae_replay(), vae_replay()
    source.latents(stream(1))
    source.latents(stream(2))
    assert all(gradient is None for gradient in gradients(source.vae.parameters()))
    for one in (source, twin):
        one.learn(student_batch(), 0, stream(3))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(state(source.vae).values(), state(twin.vae).values(), strict=True))


def test_a_leak_adds_the_gradients_of_every_draw_since_to_the_decoders_next_update() -> None:
    source = vae_replay(leak=True)
    twin, batch = copy.deepcopy(source), student_batch()
    decoder = list(source.vae.decoder.parameters())
    source.latents(stream(1))
    source.latents(stream(2))
    source.learn(batch, 0, stream(3))

    for seed in (1, 2):
        z = torch.empty(4, 5).normal_(generator=stream(seed)).requires_grad_()
        latent_loss(twin, z).backward(inputs=list(twin.vae.decoder.parameters()))
    twin.vae.train()
    rows = torch.cat([torch.arange(3), torch.arange(6, 10)])
    noise = torch.empty(7, 5).normal_(generator=stream(3))
    twin.loss(batch.images[rows], batch.teacher_logits[rows], noise).backward(inputs=list(twin.vae.parameters()))
    for parameter, other in zip(decoder, twin.vae.decoder.parameters(), strict=True):
        # Adam's first moment is a tenth of the gradient.
        assert other.grad is not None
        torch.testing.assert_close(10 * source.optimizer.state[parameter]["exp_avg"], other.grad, rtol=1e-4, atol=1e-5)
    assert all(gradient is None for gradient in gradients(source.vae.parameters()))


def test_the_autoencoder_learns_the_first_fresh_rows_and_all_of_its_own_by_adam() -> None:
    source, batch = vae_replay(lr=2e-3), student_batch()
    twin = copy.deepcopy(source.vae).train()
    losses = source.learn(batch, 3, stream(3))
    adam = torch.optim.Adam(twin.parameters(), lr=2e-3)
    reference = vae_replay()
    reference.vae = twin
    rows = [0, 1, 2, 6, 7, 8, 9]
    loss = reference.loss(batch.images[rows], batch.teacher_logits[rows], torch.empty(7, 5).normal_(generator=stream(3)))
    loss.backward()
    adam.step()
    torch.testing.assert_close(losses, {"vae": loss.detach()})
    torch.testing.assert_close(source.vae.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)
    assert gradients(source.teacher.parameters()) == 4 * [None]
    assert not any(module.training for module in source.vae.modules())


def test_the_autoencoder_learns_in_the_first_steps_of_an_iteration_only() -> None:
    source, moved = vae_replay(steps=2), []
    for step in range(4):
        before = state(source.vae)
        losses = source.learn(student_batch(step), step, stream(step))
        moved.append((list(losses), any(not torch.equal(tensor, before[name]) for name, tensor in source.vae.state_dict().items())))
    assert moved == [(["vae"], True), (["vae"], True), ([], False), ([], False)]


@pytest.mark.parametrize("leak", [False, True])
def test_a_restored_autoencoder_continues_bitwise_with_its_leaked_gradients(leak: bool) -> None:
    def continue_training(source: VaeReplay) -> list[Tensor]:
        drawn = []
        for step in range(2):
            drawn.append(source.latents(random))
            source.learn(student_batch(step), step, random)
        return [*drawn, *state(source.vae).values()]

    source, restored = vae_replay(leak=leak), vae_replay(leak=leak)
    random = stream(5)
    continue_training(source)
    source.latents(random)  # the gradient that this draw leaks is not yet part of an update
    saved, random_state = through_a_file(source.state_dict()), random.get_state()
    expected = continue_training(source)
    random.set_state(random_state)
    restored.load_state_dict(saved)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(continue_training(restored), expected, strict=True))


def test_the_state_of_an_autoencoder_on_a_gpu_loads_on_a_cpu() -> None:
    first, second = vae_replay(steps=1), vae_replay(steps=1)
    first.learn(student_batch(), 0, stream())
    saved = first.state_dict()
    for group in saved["optimizer"]["param_groups"]:
        group |= {"fused": True, "capturable": True}  # capturable is an error on a CPU
    second.load_state_dict(saved)
    expected, actual = (source.learn(student_batch(), 0, stream(1))["vae"] for source in (first, second))
    assert torch.equal(expected, actual)
    assert second.optimizer.param_groups[0]["capturable"] is False
