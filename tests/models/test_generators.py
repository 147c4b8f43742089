import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode

from dfkd_fast.errors import DfkdError
from dfkd_fast.models import (
    Generator,
    GeneratorA,
    GeneratorB,
    GeneratorC,
    GeneratorD,
    GeneratorSettings,
    Standardize,
    UpsampleConv2d,
    build_generator,
    condition_latents,
    generate,
)
from dfkd_fast.surgery import keep_spectral_norms_in_float32


def close(actual: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    assert actual is not None
    assert expected is not None
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 1, 1), (3, 4, 1, 6)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_upsample_conv_equals_nearest_upsampling_followed_by_a_convolution(shape: tuple[int, ...], layout: str) -> None:
    torch.manual_seed(0)
    layer = UpsampleConv2d(shape[1], 5).double()
    twin = nn.Conv2d(shape[1], 5, kernel_size=3, padding=1).double()
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(*shape, 2, dtype=torch.float64)[..., 0]
    if layout != "sliced":
        x = x.contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)
    ours, theirs = (x.detach().requires_grad_() for _ in range(2))

    actual, expected = layer(ours), twin(F.interpolate(theirs, scale_factor=2, mode="nearest"))
    close(actual, expected, 1e-12)
    cotangent = torch.randn_like(expected)
    actual.backward(cotangent)
    expected.backward(cotangent)
    close(ours.grad, theirs.grad, 1e-12)
    close(layer.weight.grad, twin.weight.grad, 1e-12)
    close(layer.bias.grad if layer.bias is not None else None, twin.bias.grad if twin.bias is not None else None, 1e-12)


def textbook_a(latent_dim: int, channels: int, image_size: int, width: int) -> list[nn.Module]:
    side = image_size // 4
    return [
        nn.Linear(latent_dim, 2 * width * side**2),
        nn.Unflatten(1, (2 * width, side, side)),
        nn.BatchNorm2d(2 * width),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        nn.BatchNorm2d(2 * width),
        nn.LeakyReLU(0.2),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(2 * width, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, channels, 3, padding=1),
        nn.Tanh(),
        nn.BatchNorm2d(channels, affine=False),
    ]


def textbook_b(latent_dim: int, channels: int, image_size: int, width: int) -> list[nn.Module]:
    side = image_size // 16
    layers: list[nn.Module] = [
        nn.Linear(latent_dim, 8 * width * side**2),
        nn.Unflatten(1, (8 * width, side, side)),
        nn.BatchNorm2d(8 * width),
    ]
    for before, after in ((8, 4), (4, 2), (2, 1), (1, 1)):
        up = nn.ConvTranspose2d(before * width, after * width, 4, stride=2, padding=1, bias=False)
        layers += [up, nn.BatchNorm2d(after * width), nn.LeakyReLU(0.2)]
    return [*layers, nn.Conv2d(width, channels, 3, padding=1), nn.Tanh()]


def test_generator_c_applies_sigmoid_and_dataset_normalization_to_its_body() -> None:
    torch.manual_seed(0)
    latent_dim, width, mean, std = 7, 4, (0.5, 0.4), (0.25, 2.0)
    generator = GeneratorC(latent_dim, 12, mean, std, width).double()
    layers = textbook_a(latent_dim, 2, 12, width)[:-2]
    layers[:3] = [nn.Linear(latent_dim, 4 * width * 9), nn.Unflatten(1, (4 * width, 3, 3)), nn.BatchNorm2d(4 * width)]
    layers[4] = nn.Conv2d(4 * width, 2 * width, 3, padding=1)
    twin = nn.Sequential(*layers).double()
    twin.load_state_dict(dict(zip(twin.state_dict(), generator.body.state_dict().values(), strict=True)))
    z = torch.randn(6, latent_dim, dtype=torch.float64)
    actual, raw = generator(z), twin(z)
    expected = torch.stack([(1 / (1 + (-raw[:, index]).exp()) - mean[index]) / std[index] for index in range(2)], 1)
    close(actual, expected, 1e-7)  # the constants are float32
    actual.square().mean().backward()
    expected.square().mean().backward()
    for weight, other in zip(generator.parameters(), twin.parameters(), strict=True):
        close(weight.grad, other.grad, 1e-6)


@pytest.mark.parametrize(
    ("kind", "textbook", "sizes"),
    [
        (GeneratorA, textbook_a, (7, 1, 8, 4)),
        (GeneratorA, textbook_a, (5, 3, 20, 6)),
        (GeneratorB, textbook_b, (7, 3, 16, 4)),
        (GeneratorB, textbook_b, (5, 1, 32, 2)),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_generator_computes_what_the_paper_describes(
    kind: type[GeneratorA] | type[GeneratorB], textbook: type, sizes: tuple[int, int, int, int], training: bool
) -> None:
    torch.manual_seed(0)
    generator = kind(*sizes).double()
    twin = nn.Sequential(*textbook(*sizes)).double()
    twin.load_state_dict(dict(zip(twin.state_dict(), generator.state_dict().values(), strict=True)))
    z = torch.randn(6, sizes[0], dtype=torch.float64)
    generator(z), twin(z)
    actual, expected = generator.train(training)(z), twin.train(training)(z)
    assert actual.shape == (6, sizes[1], sizes[2], sizes[2])
    close(actual, expected, 1e-9)
    for ours, theirs in zip(generator.state_dict().values(), twin.state_dict().values(), strict=True):
        close(ours, theirs, 1e-12)
    actual.square().mean().backward()
    expected.square().mean().backward()
    for weight, other in zip(generator.parameters(), twin.parameters(), strict=True):
        close(weight.grad, other.grad, 1e-9)


# Counted by hand from the paper's table of layers.
@pytest.mark.parametrize(
    ("kind", "latent_dim", "channels", "image_size", "expected"),
    [
        (GeneratorA, 100, 1, 32, 8192 * 101 + 256 + 128 * 128 * 9 + 128 + 256 + 128 * 64 * 9 + 64 + 128 + 64 * 9 + 1),
        (GeneratorA, 256, 3, 32, 8192 * 257 + 256 + 128 * 128 * 9 + 128 + 256 + 128 * 64 * 9 + 64 + 128 + 3 * (64 * 9 + 1)),
        (
            GeneratorB,
            256,
            3,
            128,
            32768 * 257 + 1024 + 16 * (512 * 256 + 256 * 128 + 128 * 64 + 64 * 64) + 512 + 256 + 128 + 128 + 3 * (64 * 9 + 1),
        ),
    ],
)
def test_parameters_at_the_papers_sizes(
    kind: type[GeneratorA] | type[GeneratorB], latent_dim: int, channels: int, image_size: int, expected: int
) -> None:
    with torch.device("meta"):
        generator = kind(latent_dim, channels, image_size)
    assert sum(parameter.numel() for parameter in generator.parameters()) == expected
    assert generator(torch.empty(2, latent_dim, device="meta")).shape == (2, channels, image_size, image_size)


def test_generator_a_in_training_gives_zero_mean_and_unit_variance_in_every_channel() -> None:
    torch.manual_seed(0)
    images = GeneratorA(16, 3, 16, width=8)(torch.randn(32, 16))
    variance, mean = torch.var_mean(images, dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(variance, torch.ones(3), atol=1e-2, rtol=0)


def test_generator_b_initializes_its_weights_as_in_the_paper() -> None:
    torch.manual_seed(0)
    generator = GeneratorB(64, 3, 16, width=16)
    for module in generator.modules():
        if isinstance(module, nn.Linear | nn.ConvTranspose2d | nn.BatchNorm2d) and module.weight.numel() >= 64:
            center = 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0
            tolerance = 6 * 0.02 / module.weight.numel() ** 0.5
            assert module.weight.mean().item() == pytest.approx(center, abs=tolerance)
            assert module.weight.std().item() == pytest.approx(0.02, abs=tolerance)


@pytest.mark.parametrize(
    ("kind", "image_size", "message"),
    [
        (GeneratorA, 30, "multiple of 4, not 30"),
        (GeneratorB, 8, "16, 32, 64, 128 or 256, not 8"),
        (GeneratorB, 48, "not 48"),
        (GeneratorB, 512, "not 512"),
    ],
)
def test_an_unsupported_image_size_is_refused(kind: type[GeneratorA] | type[GeneratorB], image_size: int, message: str) -> None:
    with pytest.raises(DfkdError, match=message):
        kind(10, 1, image_size)


def test_an_unsupported_image_size_of_generator_c_is_refused() -> None:
    with pytest.raises(DfkdError, match="multiple of 4, not 18"):
        GeneratorC(10, 18, [0.5], [0.5])


@pytest.mark.parametrize(("model", "kind"), [("A", GeneratorA), ("B", GeneratorB), ("C", GeneratorC), ("D", GeneratorD)])
def test_a_recipes_section_builds_its_generator(model: Any, kind: type[Generator]) -> None:
    generator = build_generator(GeneratorSettings(model=model, latent_dim=6, width=3), channels=2, image_size=16)
    assert type(generator) is kind
    assert generator.latent_dim == 6
    assert generator(torch.randn(2, 6)).shape == (2, 2, 16, 16)
    assert [layer.in_channels for layer in generator.modules() if type(layer) is nn.Conv2d] == [3]


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": "E"},
        {"checkpointing": 1},
        {"latent_dim": 0},
        {"latent_dim": "9"},
        {"width": True},
        {"widht": 8},
        {"conditional": 1},
        {"hidden_eps": 0.0},
        {"uniform_init": -0.1},
    ],
)
def test_a_section_with_a_wrong_value_names_the_field(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        GeneratorSettings(**wrong)


class UserGenerator(nn.Module):
    """A user's generator, to whose output no activation or normalization may be added."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 3 * 256), nn.Unflatten(1, (3, 16, 16)), nn.BatchNorm2d(3), nn.Sigmoid())

    def forward(self, z: Tensor) -> Tensor:
        images: Tensor = self.layers(z)
        return 4 * images


class UserSpectralGenerator(UserGenerator):
    """A user's generator with PyTorch's spectral norm."""

    def __init__(self) -> None:
        super().__init__()
        spectral_norm(self.layers[0])


class Cumulative(Generator):
    """A generator whose batch norm keeps a cumulative average (``momentum=None``)."""

    def __init__(self) -> None:
        body = nn.Sequential(nn.Linear(5, 3 * 256), nn.Unflatten(1, (3, 16, 16)))
        super().__init__(body, 5, nn.BatchNorm2d(3, affine=False, momentum=None))


MEAN, STD = [0.5, -0.2, 0.3], [0.2, 1.5, 0.7]


def built(model: Any, **options: Any) -> Generator:
    settings = GeneratorSettings(model=model, latent_dim=5, width=4, **options)
    return build_generator(settings, 3, 16, mean=MEAN, std=STD, num_classes=6)


SMALL: dict[str, Callable[[], nn.Module]] = {
    "A": lambda: built("A"),
    "B": lambda: built("B"),
    "C": lambda: built("C"),
    "D": lambda: GeneratorC(5, 16, STD, MEAN, width=4),  # C, for other data
    "S": lambda: built("A", spectral_norm=True, hidden_eps=0.8, uniform_init=0.08),
    "T": lambda: built("B", spectral_norm=True),
    "O": UserGenerator,
    "M": Cumulative,
}


def small(kinds: str) -> Iterator[nn.Module]:
    return (SMALL[kind]() for kind in kinds)


def states(generators: Sequence[nn.Module]) -> list[Tensor]:
    return [tensor for generator in generators for tensor in generator.state_dict().values()]


def gradients(generators: Sequence[nn.Module]) -> list[Tensor | None]:
    return [parameter.grad for generator in generators for parameter in generator.parameters()]


@pytest.mark.parametrize("kinds", ["A", "AA", "B", "BB", "C", "CC", "CD", "CA", "AS", "TB", "O", "OO", "AO", "OBA", "MM"])
@pytest.mark.parametrize("training", [(True, True, True), (False, True, False), (False, False, False)])
def test_generate_equals_the_generators_own_forwards(kinds: str, training: tuple[bool, ...]) -> None:
    torch.manual_seed(0)
    generators = [generator.train(mode) for generator, mode in zip(small(kinds), training, strict=False)]
    twins = copy.deepcopy(generators)
    for _ in range(3):
        latents = [torch.randn(4 + index, 5) for index in range(len(kinds))]
        images = generate(generators, latents)
        expected = torch.cat([twin(z) for twin, z in zip(twins, latents, strict=True)])
        close(images, expected, 1e-5)
    assert images.is_contiguous(memory_format=torch.channels_last)
    for ours, theirs in zip(states(generators), states(twins), strict=True):
        close(ours, theirs, 1e-5)
    cotangent = torch.randn(expected.shape)
    images.backward(cotangent)
    expected.backward(cotangent)
    for gradient, other in zip(gradients(generators), gradients(twins), strict=True):
        close(gradient, other, 1e-3)


@pytest.mark.parametrize("kinds", ["AA", "BB", "CC", "CD", "SA", "AO"])
def test_generate_writes_to_a_preallocated_batch(kinds: str) -> None:
    torch.manual_seed(0)
    generators = [generator.eval() for generator in small(kinds)]
    latents = [torch.randn(2, 5), torch.randn(3, 5)]
    out = torch.full((5, 3, 16, 16), float("nan"))
    with torch.no_grad():
        assert generate(generators, latents, out=out) is out
        close(out, torch.cat([generator(z) for generator, z in zip(generators, latents, strict=True)]), 1e-5)


def test_generate_equals_forward_for_an_output_norm_without_running_statistics() -> None:
    generator = Generator(nn.Unflatten(1, (3, 2, 2)), 12, nn.BatchNorm2d(3, affine=False, track_running_stats=False))
    z = torch.randn(5, 12)
    torch.testing.assert_close(generate([generator], [z]), generator(z))


def largest_singular_values(generator: Generator) -> dict[str, float]:
    """Returns the largest singular value of every convolution's weight as a matrix with one row per output channel."""
    values = {}
    for name, layer in generator.named_modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            weight = layer.weight.detach().double()
            rows = weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else weight
            values[name] = float(np.linalg.norm(rows.flatten(1).numpy(), 2))
    return values


@pytest.mark.parametrize("model", ["A", "B", "C"])
def test_spectral_norm_sets_the_largest_singular_value_of_convolutions_to_1_and_leaves_linear_layers(model: Any) -> None:
    torch.manual_seed(0)
    generator, plain = built(model, spectral_norm=True, uniform_init=0.3), built(model, uniform_init=0.3)
    for _ in range(60):  # one power iteration each
        generator(torch.randn(2, 5))
    values = largest_singular_values(generator.eval())
    assert values == pytest.approx(dict.fromkeys(values, 1.0), rel=1e-3)
    assert all(value > 1.1 for value in largest_singular_values(plain).values())
    assert not any(is_parametrized(layer) for layer in generator.modules() if isinstance(layer, nn.Linear))


def singular_vectors(generator: nn.Module) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Returns u, v and the unnormalized weight matrix of every spectral norm, in float64."""
    vectors = {}
    for name, layer in generator.named_modules():
        if isinstance(layer, ParametrizationList):
            norm: Any = layer[0]
            weight = layer.original.transpose(0, norm.dim).flatten(1)
            vectors[name] = (norm._u.double(), norm._v.double(), weight.detach().double())
    return vectors


def with_random_singular_vectors(model: Any, **options: Any) -> Generator:
    """A generator with random singular vectors, so that another power iteration changes its weights."""
    torch.manual_seed(0)
    generator = built(model, spectral_norm=True, **options)
    for name, buffer in generator.named_buffers():
        if name.endswith(("._u", "._v")):
            buffer.copy_(F.normalize(torch.randn_like(buffer), dim=0))
    return generator


@pytest.mark.parametrize("model", ["A", "B", "C", "D"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_forward_pass_in_training_runs_one_power_iteration_per_spectral_norm(model: Any, autocast: bool) -> None:
    generator = with_random_singular_vectors(model)
    before = singular_vectors(generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        generator(torch.randn(4, 5))
    after = singular_vectors(generator)
    assert len(after) == {"A": 3, "B": 5, "C": 3, "D": 3}[model]
    for name, (_, v, weight) in before.items():
        u = F.normalize(weight @ v, dim=0)
        close(after[name][0], u, 1e-5)
        close(after[name][1], F.normalize(weight.t() @ u, dim=0), 1e-5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        generator.eval()(torch.randn(4, 5))
    assert all(torch.equal(singular_vectors(generator)[name][0], u) for name, (u, *_) in after.items())


class Products(TorchDispatchMode):
    """Records the dtypes of matrix-vector products, which only power iterations compute here."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mv.default:
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


# Autocast casts matrix-vector products on GPUs, but not on CPUs.
def test_power_iterations_stay_in_float32_under_cuda_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode(), torch.device("cuda"):
        for generator in (built("A", spectral_norm=True), keep_spectral_norms_in_float32(UserSpectralGenerator())):
            z = torch.randn(4, 5)
            with Products() as products, monkeypatch.context() as patch:
                for query in ("is_available", "is_bf16_supported"):  # otherwise autocast disables itself
                    patch.setattr(torch.cuda, query, lambda: True)
                with torch.autocast("cuda", torch.bfloat16):
                    images = generator(z)
            assert images.device.type == "cuda"
            assert len(products.dtypes) >= 3 and set(products.dtypes) == {torch.float32}


def test_checkpointing_recomputes_with_the_weights_of_the_forward_pass() -> None:
    plain, checkpointed = (with_random_singular_vectors("D", checkpointing=on, hidden_eps=0.8) for on in (False, True))
    z = torch.randn(4, 5)
    # A batch norm with a small eps would cancel the scale of the weights; the test uses hidden_eps = 0.8.
    for generator in (plain, checkpointed):
        generator(z).square().mean().backward()
    torch.testing.assert_close(gradients([checkpointed]), gradients([plain]))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(states([checkpointed]), states([plain]), strict=True))
    assert all(module.training for module in checkpointed.modules())


@pytest.mark.parametrize("kind", ["S", "T"])
def test_spectral_norm_survives_deepcopy_and_state_dict(kind: str) -> None:
    torch.manual_seed(0)
    generator, other = small(2 * kind)
    for _ in range(3):
        generator(torch.randn(4, 5))
    other.load_state_dict(generator.state_dict())
    z = torch.randn(4, 5)
    twins = [generator, copy.deepcopy(generator), other]
    for mode in (False, True, True):  # in training, power iterations continue from the same state
        images, copied, loaded = (twin.train(mode)(z) for twin in twins)
        assert torch.equal(images, copied)
        assert torch.equal(images, loaded)


@pytest.mark.parametrize("model", ["A", "B", "C"])
def test_hidden_eps_applies_to_every_batch_norm_except_the_output_norm(model: Any) -> None:
    generator = built(model, hidden_eps=0.8)
    norms = {name: layer.eps for name, layer in generator.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    hidden = {name: eps for name, eps in norms.items() if name.startswith("body.")}
    assert len(hidden) == {"A": 3, "B": 5, "C": 3}[model]
    assert set(hidden.values()) == {0.8}
    assert [norms[name] for name in norms.keys() - hidden] == ([1e-5] if model == "A" else [])


@pytest.mark.parametrize("model", ["A", "B", "C"])
@pytest.mark.parametrize("spectral_norm", [False, True])
def test_uniform_init_initializes_weight_matrices_only(model: Any, spectral_norm: bool) -> None:
    torch.manual_seed(0)
    generator = built(model, uniform_init=0.08, spectral_norm=spectral_norm)
    drawn = 0
    for name, parameter in generator.named_parameters():
        if parameter.ndim > 1:
            drawn += 1
            assert 0.07 < parameter.abs().max().item() <= 0.08
            # The mean square of n samples of U(−a, a) is a²/3 with a relative standard deviation of 0.9/√n.
            assert parameter.square().mean().item() == pytest.approx(0.08**2 / 3, rel=5 / parameter.numel() ** 0.5)
        elif "weight" in name and model != "B":
            assert torch.equal(parameter, torch.ones_like(parameter))
    assert drawn == {"A": 4, "B": 6, "C": 4}[model]


def test_condition_latents_adds_the_class_embedding() -> None:
    torch.manual_seed(0)
    generator, z, labels = built("A", conditional=True), torch.randn(4, 5), torch.tensor([5, 0, 5, 2])
    assert generator.embedding is not None and generator.embedding.weight.shape == (6, 5)
    expected = torch.stack([z[row] + generator.embedding.weight[label] for row, label in enumerate(labels.tolist())])
    latents = condition_latents(generator, z, labels)
    assert torch.equal(latents, expected)
    latents.sum().backward()
    assert generator.embedding.weight.grad is not None
    counts = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 2.0])
    assert torch.equal(generator.embedding.weight.grad, counts[:, None].expand(6, 5))
    assert condition_latents(built("A"), z, labels) is z
    assert condition_latents(UserGenerator(), z, labels) is z


def test_a_conditional_generator_without_a_number_of_classes_is_refused() -> None:
    with pytest.raises(DfkdError, match="number of classes"):
        build_generator(GeneratorSettings(conditional=True), 3, 16)


def test_generator_c_without_constants_returns_pixels_between_0_and_1() -> None:
    torch.manual_seed(0)
    generator = build_generator(GeneratorSettings(model="C", latent_dim=5, width=4), 2, 8)
    assert isinstance(generator.output_norm, Standardize)
    images = generator(100 * torch.randn(16, 5))
    assert 0 <= images.min().item() < images.max().item() <= 1


@pytest.mark.parametrize(
    ("image_size", "side", "widths"), [(64, 4, [32, 32, 16, 8, 4]), (112, 7, [32, 32, 16, 8, 4]), (224, 7, [32, 32, 32, 16, 8, 4])]
)
def test_generator_d_upsamples_a_small_square_to_the_image_size(image_size: int, side: int, widths: list[int]) -> None:
    torch.manual_seed(0)
    generator = GeneratorD(5, image_size, (0.5, 0.4, 0.3), (0.25, 0.5, 2.0), width=4).double()
    layers: list[nn.Module] = [nn.Linear(5, widths[0] * side**2), nn.Unflatten(1, (widths[0], side, side)), nn.BatchNorm2d(widths[0])]
    for before, after in itertools.pairwise(widths):
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
    twin = nn.Sequential(*layers, nn.Conv2d(4, 3, 3, padding=1), nn.Sigmoid()).double()
    twin.load_state_dict(dict(zip(twin.state_dict(), generator.body.state_dict().values(), strict=True)))
    z = torch.randn(3, 5, dtype=torch.float64)
    actual, pixels = generator(z), twin(z)
    expected = (pixels - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.25, 0.5, 2.0])[:, None, None]
    assert actual.shape == (3, 3, image_size, image_size)
    close(actual, expected, 1e-6)  # the constants are float32


@pytest.mark.parametrize("image_size", [8, 12, 36, 100, 225])
def test_an_unsupported_image_size_of_generator_d_is_refused(image_size: int) -> None:
    with pytest.raises(DfkdError, match=f"not {image_size}"):
        GeneratorD(5, image_size, (0.5,), (0.5,), width=2)


def count_saved(generator: nn.Module, z: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Returns images and the number of elements saved for the backward pass."""
    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return generator(z), sum(saved)


def test_checkpointing_changes_neither_images_nor_gradients_nor_running_statistics() -> None:
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        generator = GeneratorD(5, 32, (0.5,), (0.5,), width=3, checkpointing=checkpointing)
        z = torch.randn(4, 5, requires_grad=True)
        images, saved = count_saved(generator, z)
        images.square().mean().backward()
        assert z.grad is not None
        gradients = [weight.grad for weight in generator.parameters()]
        results.append((images.detach(), z.grad, gradients, list(generator.buffers()), saved))
    (plain, plain_z, plain_gradients, plain_buffers, plain_saved), (images, z_gradient, gradients, buffers, saved) = results
    torch.testing.assert_close(images, plain, rtol=0, atol=0)
    torch.testing.assert_close(z_gradient, plain_z)
    torch.testing.assert_close(gradients, plain_gradients)
    torch.testing.assert_close(buffers, plain_buffers, rtol=0, atol=0)
    assert saved < 0.5 * plain_saved


def test_checkpointing_of_generators_other_than_d_is_refused() -> None:
    with pytest.raises(DfkdError, match="generator A does not support it"):
        build_generator(GeneratorSettings(checkpointing=True), 1, 32)
