"""The settings of the student's initial weights and bits, and of the size of generated images."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dfkd_fast import DfkdError, load_recipe
from dfkd_fast.commands.networks import build_networks
from dfkd_fast.commands.rehearsal import initialize_student
from dfkd_fast.recipe import recipe_from_toml, recipe_to_toml
from dfkd_fast.surgery import quantized_layers

COPY = {"student.init": "teacher", "student.model": "lenet5"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"student.weight_bits": 4}, "student: weight_bits = 4: requires init = 'teacher', not 'random'"),
        ({"student.activation_bits": 8}, "student: activation_bits = 8: requires init = 'teacher', not 'random'"),
        ({"student.init": "teacher"}, "student.model = 'lenet5_half': must be 'lenet5', the teacher's, for student.init = 'teacher'"),
        ({**COPY, "student.encoder_weights": "w.pt"}, "student: encoder_weights = 'w.pt': must be empty for init = 'teacher'"),
        ({**COPY, "student.weight_bits": 5}, "student.weight_bits = 5: must be one of 3, 4, 8, 32"),
        ({**COPY, "student.weight_bits": "4"}, "student.weight_bits = '4': must be one of 3, 4, 8, 32"),
        ({**COPY, "student.activation_bits": 3}, "student.activation_bits = 3: must be one of 4, 8, 32"),
        ({**COPY, "student.first_last_bits": 32}, "student.first_last_bits = 32: must be one of 3, 4, 8"),
        ({"student.init": "teachers"}, "student.init = 'teachers': unknown choice 'teachers': did you mean 'teacher'?"),
        ({"generator.image_size": -1}, "generator.image_size = -1: must be a whole number ≥ 0 and ≤ 16384"),
    ],
)
def test_settings_that_exclude_each_other_are_named_in_one_line(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(DfkdError) as caught:
        load_recipe("digits", overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_images_are_generated_in_the_size_of_the_data_unless_the_generator_has_its_own() -> None:
    recipe, smaller = load_recipe("digits"), load_recipe("digits", {"generator.image_size": 16, "generator.width": 4})
    assert recipe.generated_size == recipe.data.image_size == smaller.data.image_size == 32
    assert smaller.generated_size == 16
    _, _, generator = build_networks(smaller, torch.device("cpu"))
    assert generator(torch.zeros(2, smaller.generator.latent_dim)).shape == (2, 1, 16, 16)


def initialized(**overrides: Any) -> tuple[dict[str, Tensor], Any]:
    """Returns the state dict of a recipe's teacher, and its initialized student."""
    recipe = load_recipe("digits", {**COPY, "generator.width": 4, **{f"student.{name}": value for name, value in overrides.items()}})
    assert recipe.student.is_quantized == bool(overrides)
    assert recipe_from_toml(recipe_to_toml(recipe), "digits") == recipe
    teacher, student, _ = build_networks(recipe, torch.device("cpu"))
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    initialize_student(recipe, student, teacher)
    return teacher.state_dict(), student


def test_a_student_may_start_with_the_weights_of_the_teacher() -> None:
    expected, student = initialized()
    assert not quantized_layers(student)
    assert student.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in student.state_dict().items())


def test_a_quantized_student_starts_with_the_weights_of_the_teacher_and_scales_and_ranges_for_them() -> None:
    expected, student = initialized(weight_bits=4, activation_bits=8, first_last_bits=3)
    layers = quantized_layers(student)
    names = list(layers)
    assert [layers[name].weight_bits for name in names] == [3, *[4] * (len(names) - 2), 3]
    assert [layers[name].activation_bits for name in names] == [3, *[8] * (len(names) - 2), 3]
    for name, layer in layers.items():
        assert torch.equal(student.state_dict()[f"{name}.weight"], expected[f"{name}.weight"])
        scale = layer.weight_scale.clone()
        layer.fit_weight_scale()
        assert torch.equal(layer.weight_scale, scale)
        ends = layer.input_range.clone()
        assert ends[0] <= 0 < ends[1] and not torch.equal(ends, torch.tensor([-1.0, 1.0]))
