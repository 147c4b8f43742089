import copy
import itertools
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench import end_to_end, methods, table
from bench.baselines.plain import textbook
from bench.end_to_end import Row
from dfkd_fast import DfkdError, GeneratorA, Recipe, load_recipe

CPU = torch.device("cpu")


def tiny(**changes: object) -> Recipe:
    small = {"loop.batch_size": 4, "generator.width": 4, "loop.student_steps": 1}
    return load_recipe("digits", small | {name.replace("__", "."): value for name, value in changes.items()})


def row(contender: str, seconds: float) -> Row:
    text = {"recipe": "r", "precision": "fp32", "contender": contender, "device": "d", "torch": "", "commit": "", "command": ""}
    figures = {name: seconds for name in Row.__annotations__ if name not in text}
    return Row(**text, **figures | {"batch_size": 4})  # type: ignore[arg-type]


def test_the_textbook_generator_is_the_same_function_with_the_same_parameters() -> None:
    ours = GeneratorA(5, 3, 16, width=4).double().eval()
    other = textbook(copy.deepcopy(ours))
    z = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(other(z), ours(z))
    assert other.state_dict().keys() == ours.state_dict().keys()
    assert [type(layer) for layer in other.modules()] != [type(layer) for layer in ours.modules()]


@pytest.mark.parametrize("replay", ["none", "ema_generator"])
def test_every_uncompiled_contender_plays_whole_iterations_and_says_how_long(replay: str) -> None:
    contenders = end_to_end._contenders(tiny(replay__kind=replay), CPU, "bf16", True)
    assert list(contenders)[:2] == ["plain", "plain_compiled"]
    assert list(contenders)[-2:] == ["engine", "engine, compiled"]
    for name, build in contenders.items():
        if "compiled" not in name:
            student, whole = build().run()
            assert 0 < student < whole, name


def test_the_features_are_switched_on_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, object]] = []
    monkeypatch.setattr(end_to_end, "_engine", lambda recipe, device, changes: seen.append(changes))
    for name, build in end_to_end._contenders(tiny(), CPU, "bf16", True).items():
        if not name.startswith("plain"):
            build()
    differences = [{key for key in seen[-1] if before.get(key) != after.get(key)} for before, after in itertools.pairwise(seen)]
    assert differences == [
        {"loop.channels_last"},
        {"algorithms"},
        {"loop.keep_memory"},
        {"textbook"},
        {"kernels"},
        {"loop.fold_teacher"},
        {"loop.precision"},
        {"loop.compile"},
    ]


def test_the_memory_of_an_iteration_is_at_least_that_of_its_student_steps() -> None:
    recipe = tiny(generator__width=32)
    for name in ("plain", "engine"):
        whole, imitation = end_to_end._in_its_own_process(recipe, CPU, "fp32", name)
        assert 0 <= imitation <= whole < 1000


def test_what_the_plain_loop_does_not_know_is_refused() -> None:
    with pytest.raises(DfkdError, match="the plain loop knows"):
        end_to_end._check(load_recipe("digits-vae"))
    end_to_end._check(load_recipe("cifar10-mad"))


def test_rows_replace_those_of_their_own_case_only(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    end_to_end.write(path, [row("plain", 4.0), row("engine", 1.0)])
    end_to_end.write(path, [replace(row("plain", 8.0), precision="bf16")])
    end_to_end.write(path, [row("plain", 3.0)])
    assert [(found["precision"], found["contender"], float(found["seconds_per_iteration"])) for found in table.read(path)] == [
        ("bf16", "plain", 8.0),
        ("fp32", "plain", 3.0),
    ]


def test_the_picture_has_a_panel_a_case(tmp_path: Path) -> None:
    rows = [{name: str(value) for name, value in asdict(row(name, 1.0)).items()} for name in ("plain", "engine")]
    end_to_end.draw(rows, tmp_path / "one.png")
    end_to_end.draw([*rows, *({**found, "precision": "bf16"} for found in rows)], tmp_path / "two.png")
    assert Image.open(tmp_path / "two.png").height > Image.open(tmp_path / "one.png").height


def test_the_cost_of_a_method_is_relative_to_the_first() -> None:
    rows = methods.measure(["digits-dfad", "digits-bank"], CPU, 1, "")
    assert [found.recipe for found in rows] == ["digits-dfad", "digits-bank"]
    assert (rows[0].times_first, rows[0].memory_over_first_mib) == (1.0, 0.0)
    assert [found.fresh_rows + found.replayed_rows for found in rows] == [64, 64]
    assert all(found.iteration_ms > 0 and found.peak_memory_mib > 50 for found in rows)
