"""The teachers of the package: what their files say is true of them."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from dfkd_fast.evaluation import top1_accuracy
from dfkd_fast.models import build_model, load_weights, read_metadata, shipped_teachers, weights_path
from dfkd_fast.recipe import Recipe, load_recipe, recipe_from_toml
from dfkd_fast.recipe_files import shipped_recipes

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
NAMES = shipped_teachers()


def recipe_of(name: str) -> Recipe:
    return recipe_from_toml(read_metadata(weights_path(f"shipped:{name}"))["recipe"], name)


def teacher_of(name: str) -> nn.Module:
    recipe = recipe_of(name)
    network = build_model(recipe.teacher.model, recipe.data.num_classes, recipe.data.channels)
    load_weights(network, f"shipped:{name}")
    return network


def mnist_test() -> tuple[Tensor, Tensor]:
    images = np.frombuffer(gzip.decompress((DATA / "mnist" / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((DATA / "mnist" / "t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    return torch.tensor(images.reshape(-1, 1, 28, 28)), torch.tensor(labels).long()


def cifar10_test() -> tuple[Tensor, Tensor]:
    mosaics = [np.asarray(Image.open(path)) for path in sorted((DATA / "cifar10").glob("test-*.webp"))]
    tiles = [mosaic.reshape(40, 32, 50, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3) for mosaic in mosaics]
    labels = np.fromfile(DATA / "cifar10" / "test-labels.u8", np.uint8)
    return torch.tensor(np.concatenate(tiles)).permute(0, 3, 1, 2), torch.tensor(labels).long()


TEST_SETS = {"mnist": mnist_test, "cifar10": cifar10_test}


def test_there_are_teachers_of_three_megabytes_at_most() -> None:
    assert NAMES == ["cifar10-wrn16_2", "mnist-lenet5"]
    folder = weights_path(f"shipped:{NAMES[0]}").parent
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 3e6


@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_says_how_and_on_what_it_was_trained(name: str) -> None:
    metadata = read_metadata(weights_path(f"shipped:{name}"))
    assert metadata.keys() >= {"recipe", "role", "version", "seconds", "accuracy", "metric", "data", "license", "commit"}
    recipe = recipe_of(name)
    assert recipe.data.root == "" and recipe.teacher.weights == "" and recipe.data.holdout == 0
    shipped = load_recipe(recipe.name)
    assert shipped.data == recipe.data
    assert shipped.teacher.weights == f"shipped:{name}" and shipped.teacher.model == recipe.teacher.model
    # The command in the documentation trains it again.
    assert (shipped.teacher.epochs, shipped.teacher.batch_size, shipped.teacher.augment, shipped.teacher_optimizer) == (
        *(recipe.teacher.epochs, recipe.teacher.batch_size, recipe.teacher.augment),
        recipe.teacher_optimizer,
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_log_of_a_teacher_ends_with_its_accuracy(name: str) -> None:
    path = weights_path(f"shipped:{name}")
    epochs = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert [epoch["epoch"] for epoch in epochs] == list(range(1, recipe_of(name).teacher.epochs + 1))
    assert epochs[-1]["student_accuracy"] == pytest.approx(float(read_metadata(path)["accuracy"]), abs=0.15)  # before rounding to bf16


@pytest.mark.parametrize("name", NAMES)
def test_matrices_are_stored_in_bfloat16_and_vectors_in_float32(name: str) -> None:
    tensors = load_file(weights_path(f"shipped:{name}"))
    parameters = dict(teacher_of(name).named_parameters())
    for key, tensor in tensors.items():
        if tensor.is_floating_point():
            assert tensor.dtype == (torch.bfloat16 if key in parameters and tensor.ndim > 1 else torch.float32), key


@pytest.mark.parametrize("name", NAMES)
def test_the_accuracy_of_a_teacher_is_what_its_file_says(name: str) -> None:
    data = recipe_of(name).data
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is absent: no test images")
    pixels, labels = TEST_SETS[data.name]()
    mean, std = (torch.tensor(constants)[:, None, None] for constants in (data.mean, data.std))

    def batches() -> list[tuple[Tensor, Tensor]]:
        pairs = zip(pixels.split(1000), labels.split(1000), strict=True)
        return [((resized(part, data.image_size) - mean) / std, part_labels) for part, part_labels in pairs]

    accuracy = top1_accuracy(teacher_of(name), batches())
    assert accuracy == pytest.approx(float(read_metadata(weights_path(f"shipped:{name}"))["accuracy"]), abs=0.05)


def resized(pixels: Tensor, size: int) -> Tensor:
    from torchvision.transforms.v2.functional import resize

    return (pixels if pixels.shape[-1] == size else resize(pixels, [size, size], antialias=True)).float() / 255


@pytest.mark.parametrize("name", NAMES)
def test_hardly_a_channel_of_a_teacher_is_dead(name: str) -> None:
    """With half of the second convolution's channels dead, LeNet-5 had 99.36 % itself, and its student 51 % instead of 98 %."""
    data, teacher = recipe_of(name).data, teacher_of(name).eval()
    active: list[Tensor] = []
    for layer in teacher.modules():
        if isinstance(layer, nn.ReLU):
            layer.register_forward_hook(lambda _layer, _inputs, output: active.append((output > 0).transpose(0, 1).flatten(1).any(1)))
    with torch.no_grad():
        teacher(torch.randn(256, data.channels, data.image_size, data.image_size, generator=torch.Generator().manual_seed(0)))
    assert len(active) >= 4
    assert min(float(channels.float().mean()) for channels in active) > 0.8


def test_a_recipe_with_a_shipped_teacher_names_one_that_exists() -> None:
    weights = {recipe.teacher.weights for recipe in map(load_recipe, shipped_recipes()) if recipe.teacher.weights.startswith("shipped:")}
    assert weights == {f"shipped:{name}" for name in NAMES}
