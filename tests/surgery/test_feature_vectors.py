import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_fast import DfkdError
from dfkd_fast.models import build_model
from dfkd_fast.surgery import FeatureVectors, fold_and_verify, matched_layers, quantize, shared_layers


class OneReLU(nn.Module):
    """Network that calls one activation at several sizes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.relu, self.head = nn.ReLU(), nn.Linear(width, 5)

    def features(self, x: Tensor) -> list[Tensor]:
        x = self.relu(self.first(x))
        return [x, self.relu(self.second(x))]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)[-1].mean((2, 3)))


def expected_maps(features: list[Tensor]) -> Tensor:
    maps = []
    for feature in features:
        squares = feature.double().pow(2).mean(1).flatten(1)  # the mean over channels: a constant factor cancels
        maps.append(squares / squares.pow(2).sum(1, keepdim=True).sqrt() / squares.shape[1] ** 0.5)
    return torch.cat(maps, dim=1)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 9)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_maps_of_one_activation_called_at_two_sizes_are_those_of_each_call(height: int, width: int, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    teacher, student = OneReLU(6), OneReLU(4)
    images = torch.randn(3, 3, height, width).to(memory_format=layout)
    for network, calls in zip((teacher, student), matched_layers(teacher, student, images), strict=True):
        logits, maps = FeatureVectors(network, calls, attention=1.0, hint=0.0)(images)
        assert torch.equal(logits, network(images))
        torch.testing.assert_close(maps.double(), expected_maps(network.features(images)), rtol=1e-5, atol=1e-7)


def test_squared_distance_of_maps_is_the_sum_over_layers_of_the_mean_over_positions() -> None:
    torch.manual_seed(0)
    networks, images = (OneReLU(6), OneReLU(4)), torch.randn(3, 3, 8, 8)
    ours = [
        FeatureVectors(network, calls, attention=1.0, hint=0.0)(images)[1]
        for network, calls in zip(networks, matched_layers(*networks, images), strict=True)
    ]
    normalized = [[F.normalize(f.pow(2).mean(1).flatten(1)) for f in network.features(images)] for network in networks]
    expected = sum((one - other).pow(2).mean() for one, other in zip(*normalized, strict=True))
    torch.testing.assert_close((ours[0] - ours[1]).square().sum(1).mean(), expected)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 9)])
@pytest.mark.parametrize(("attention", "hint"), [(0.0, 3.0), (250.0, 10.0)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_squared_distance_is_the_weighted_sum_of_attention_and_hint(
    height: int, width: int, attention: float, hint: float, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    teacher, student = OneReLU(6), OneReLU(4)
    images = torch.randn(3, 3, height, width).to(memory_format=layout)
    of_teacher, of_student = matched_layers(teacher, student, images)
    assert [(ours.channels, theirs.channels) for ours, theirs in zip(of_student, of_teacher, strict=True)] == [(4, 6), (4, 6)]
    projection = nn.Conv2d(4, 6, 1)
    expected_logits = student(images)
    _, theirs = FeatureVectors(teacher, of_teacher, attention, hint)(images)
    logits, ours = FeatureVectors(student, of_student, attention, hint, projection)(images)
    assert torch.equal(logits, expected_logits)
    expected = attention * (expected_maps(student.features(images)) - expected_maps(teacher.features(images))).square().sum(1).mean()
    weight, bias = projection.weight.double().flatten(1), projection.bias.double()  # type: ignore[union-attr]
    projected = torch.einsum("oc,bchw->bohw", weight, student.features(images)[-1].double()) + bias[:, None, None]
    expected = expected + hint * (projected - teacher.features(images)[-1].double()).square().mean()
    torch.testing.assert_close((ours - theirs).double().square().sum(1).mean(), expected, rtol=1e-4, atol=1e-6)
    gradients = torch.autograd.grad(
        (ours - theirs.detach()).double().square().sum(1).mean(), [*student.first.parameters(), projection.weight]
    )
    exact = torch.autograd.grad(expected, [*student.first.parameters(), projection.weight])
    for gradient, other in zip(gradients, exact, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-5)


def test_a_wide_resnet_is_compared_before_each_reduction_of_its_size() -> None:
    teacher, student = build_model("wrn16_2", 10, 3), build_model("wrn16_1", 10, 3)
    images = torch.randn(2, 3, 32, 32)
    sizes: dict[str, torch.Size] = {}
    for name, layer in student.named_modules():
        layer.register_forward_hook(lambda _, __, output, name=name: sizes.__setitem__(name, output.shape))
    of_teacher, of_student = matched_layers(teacher, student, images)
    student(images)
    assert [tuple(sizes[call.layer]) for call in of_student] == [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]
    assert [call[:2] for call in of_teacher] == [call[:2] for call in of_student]
    assert [(ours.channels, theirs.channels) for ours, theirs in zip(of_student, of_teacher, strict=True)] == [
        (16, 32),
        (32, 64),
        (64, 128),
    ]


class Auxiliary(nn.Module):
    """Network whose training has a call of its layer at another size before the call of every mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.training:
            self.second(F.avg_pool2d(x, 2))
        return self.head(self.second(x).mean((2, 3)))


def test_calls_are_those_of_the_mode_of_each_network() -> None:
    torch.manual_seed(0)
    teacher, student, images = Auxiliary().eval(), Auxiliary(), torch.randn(3, 3, 8, 8)
    of_teacher, of_student = matched_layers(teacher, student, images)
    assert [call.number for call in of_teacher] == [0] and [call.number for call in of_student] == [1]
    _, vectors = FeatureVectors(student, of_student, attention=0.0, hint=1.0)(images)
    torch.testing.assert_close(vectors, student.second(student.first(images)).flatten(1) / (6 * 64) ** 0.5)


def test_a_layer_that_is_skipped_is_named() -> None:
    student = Auxiliary()
    _, calls = matched_layers(Auxiliary(), student, torch.randn(3, 3, 8, 8))
    vectors = FeatureVectors(student.eval(), calls, attention=1.0, hint=0.0)
    with pytest.raises(DfkdError, match="layer 'second' was called 1 times, and 2 times before: networks that skip layers at random"):
        vectors(torch.randn(3, 3, 8, 8))


def test_parametrized_layers_are_compared() -> None:
    last = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3, padding=1))
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), last, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    images = torch.randn(3, 3, 8, 8)
    calls, _ = matched_layers(network, network, images)
    assert [(call.layer, call.channels) for call in calls] == [("1", 6)]
    _, vectors = FeatureVectors(network, calls, attention=0.0, hint=1.0)(images)
    torch.testing.assert_close(vectors, network[:2](images).flatten(1) / (6 * 64) ** 0.5)


def test_the_smallest_feature_map_comes_last_also_in_a_network_that_upsamples() -> None:
    body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3, padding=1), nn.Upsample(scale_factor=2))
    network = nn.Sequential(*body, nn.Conv2d(5, 7, 1))
    calls, _ = matched_layers(network, network, torch.randn(2, 3, 8, 8))
    assert [(call.layer, call.channels) for call in calls] == [("4", 7), ("2", 5)]


def test_a_folded_teacher_has_the_maps_of_the_network() -> None:
    torch.manual_seed(0)
    teacher = build_model("wrn10_1", 10, 3)
    teacher(torch.randn(8, 3, 16, 16))  # moves the running statistics
    teacher.eval()
    images = torch.randn(4, 3, 16, 16)
    folded = fold_and_verify(teacher, images)
    maps = [
        FeatureVectors(network, matched_layers(network, teacher, images)[0], attention=1.0, hint=0.0)(images)[1]
        for network in (folded, teacher)
    ]
    torch.testing.assert_close(*maps, rtol=1e-4, atol=1e-6)


def test_recording_leaves_the_network_unchanged_and_trains_it() -> None:
    network = build_model("wrn10_1", 10, 3)
    images = torch.randn(4, 3, 16, 16)
    before, names = copy.deepcopy(network.state_dict()), [type(layer) for layer in network.modules()]
    calls, _ = matched_layers(network, network, images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    _, maps = FeatureVectors(network, calls, attention=1.0, hint=0.0)(images)
    (maps * torch.randn_like(maps)).sum().backward()
    assert [type(layer) for layer in network.modules()] == names
    assert network.features[0].weight.grad.abs().sum() > 0  # type: ignore[index, union-attr]
    assert not any(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())


def test_features_of_zero_have_a_map_of_zero_and_finite_first_and_second_derivatives() -> None:
    network = OneReLU(4)
    nn.init.zeros_(network.first.weight)
    nn.init.zeros_(network.first.bias)  # type: ignore[arg-type]
    images = torch.randn(2, 3, 8, 8)
    _, maps = FeatureVectors(network, matched_layers(network, network, images)[0], attention=1.0, hint=0.0)(images)
    parameters = list(network.parameters())
    gradients = torch.autograd.grad(maps.square().sum(), parameters, create_graph=True, materialize_grads=True)
    assert not maps[:, :64].any()
    assert all(gradient.isfinite().all() for gradient in gradients)
    second = torch.autograd.grad([gradient.sum() for gradient in gradients], parameters, materialize_grads=True)
    assert all(gradient.isfinite().all() for gradient in second)


def test_networks_without_feature_maps_of_one_size_are_rejected_with_their_sizes() -> None:
    halved = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))
    images = torch.randn(2, 3, 8, 8)
    whole = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    with pytest.raises(DfkdError, match="feature maps of 8 x 8, the student of 4 x 4; none are equal"):
        matched_layers(whole, halved, images)
    with pytest.raises(DfkdError, match="the student of no size"):
        matched_layers(whole, linear, images)


class Residual(nn.Module):
    """Network with a layer that is called twice, a residual sum and a linear layer over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4)
        self.twice, self.wide, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 6), nn.Linear(6, 5)

    def inputs(self, x: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.stem(x))
        tokens = (x + self.twice(F.relu(self.twice(x)))).flatten(2).movedim(1, -1)
        return {"wide": tokens, "head": F.relu(self.wide(tokens)).mean(1)}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inputs(x)["head"])


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 9)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_squared_distance_of_shared_layers_is_the_mean_of_those_of_their_normalized_inputs(
    height: int, width: int, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    teacher, images = Residual().eval(), torch.randn(3, 3, height, width).to(memory_format=layout)
    student = copy.deepcopy(teacher)
    quantize(student, images, weight_bits=3, activation_bits=4)
    assert shared_layers(teacher, student, images) == ["wide", "head"]
    expected_logits = student(images)
    _, theirs = FeatureVectors(teacher, layers=["wide", "head"], features=10.0)(images)
    logits, ours = FeatureVectors(student, layers=["wide", "head"], features=10.0)(images)
    assert torch.equal(logits, expected_logits)
    pairs = zip(student.inputs(images).values(), teacher.inputs(images).values(), strict=True)
    distances = [F.normalize(one.double().flatten(1)) - F.normalize(other.double().flatten(1)) for one, other in pairs]
    expected = 10.0 / 2 * torch.stack([distance.square().sum(1).mean() for distance in distances]).sum()
    assert expected.item() > 1e-3
    actual = (ours - theirs).square().sum(1).mean()
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-7)
    parameters = [student.norm.weight, dict(student.named_parameters())["wide.weight"]]
    for gradient, exact in zip(torch.autograd.grad(actual, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-7)


def test_every_layer_of_a_folded_teacher_but_the_first_is_shared_with_a_copy_and_has_its_inputs() -> None:
    torch.manual_seed(0)
    teacher = build_model("wrn10_1", 10, 3)
    teacher(torch.randn(8, 3, 16, 16))  # moves the running statistics
    teacher.eval()
    images = torch.randn(4, 3, 16, 16)
    names = shared_layers(folded := fold_and_verify(teacher, images), copy.deepcopy(teacher), images)
    layers = [name for name, layer in teacher.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert sorted(names) == sorted(layers[1:])
    vectors = [FeatureVectors(network, layers=names, features=1.0)(images)[1] for network in (folded, teacher)]
    torch.testing.assert_close(*vectors, rtol=1e-4, atol=1e-6)


def test_layers_with_inputs_of_twice_the_size_of_an_earlier_one_are_not_compared() -> None:
    channels = [3, 4, 7, 8, 2, 4, 2]
    network = nn.Sequential(*(nn.Conv2d(*pair, kernel_size=1) for pair in itertools.pairwise(channels)))
    assert shared_layers(network, copy.deepcopy(network), torch.randn(2, 3, 8, 8)) == ["1", "2", "4"]


class Unusual(nn.Module):
    """Network with a squeezed input, merged and reordered batches, keyword arguments and an encoder with a fast path."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.squeeze, self.after = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.up, self.merged, self.reordered = nn.ConvTranspose2d(4, 4, 2, stride=2), nn.Linear(4, 4), nn.Linear(4, 4)
        self.encoder, self.head = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x))
        x = self.after(x * self.squeeze(x.mean((2, 3), keepdim=True)).sigmoid())
        x = F.avg_pool2d(self.up(x, output_size=[16, 16]), 4)
        tokens = self.merged(x.movedim(1, -1).reshape(-1, 4)).view(len(x), -1, 4)
        tokens = self.reordered(tokens.transpose(0, 1)).transpose(0, 1)
        return self.head(self.encoder(tokens).mean(1))


def test_layers_that_cannot_be_compared_are_left_out_and_small_inputs_do_not_exclude_later_layers() -> None:
    torch.manual_seed(0)
    teacher, images = Unusual().eval(), torch.randn(3, 3, 8, 8)
    student = copy.deepcopy(teacher).train()
    names = shared_layers(teacher, student, images)
    assert names == ["body", "squeeze", "after", "head"]
    with torch.no_grad():  # the teacher takes the encoder's fast path
        _, theirs = FeatureVectors(teacher, layers=names, features=1.0)(images)
    _, ours = FeatureVectors(student, layers=names, features=1.0)(images)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_networks_that_share_no_layer_are_rejected() -> None:
    whole = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    other = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5))
    with pytest.raises(DfkdError, match=r"^objective.features: teacher and student have no convolution or linear layer of the same name"):
        shared_layers(whole, other, torch.randn(2, 3, 8, 8))
