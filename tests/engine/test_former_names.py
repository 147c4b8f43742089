"""Names of version 0.1.0 keep working in Python, or are rejected with a line that gives the current name."""

import warnings
from collections.abc import Callable

import pytest

from dfkd_fast import Engine, Loop, Replay, Trainer, methods
from dfkd_fast.renamed import RENAMED
from tests.small import small_method, small_networks


def test_a_keyword_renamed_within_its_section_works_with_a_warning() -> None:
    with pytest.warns(FutureWarning, match=r"^engine\.keep_memory is now called engine\.malloc_reuse$"):
        engine = Engine(keep_memory=False)  # type: ignore[call-arg]
    assert engine == Engine(malloc_reuse=False)


@pytest.mark.parametrize(
    ("build", "former", "current"),
    [
        (lambda: Loop(precision="bf16"), "loop.precision", "engine.precision"),  # type: ignore[call-arg]
        (lambda: Loop(keep_memory=True), "loop.keep_memory", "engine.malloc_reuse"),  # type: ignore[call-arg]
        (lambda: Replay(kind="ema_generator", ema_decay=0.9), "replay.ema_decay", "replay.ema_generator.decay"),  # type: ignore[arg-type]
    ],
)
def test_a_keyword_that_moved_to_another_section_is_rejected_with_its_current_name(
    build: Callable[[], object], former: str, current: str
) -> None:
    with pytest.raises(TypeError) as error:
        build()
    message = str(error.value)
    assert f"{former} is now called {current}" in message
    assert "\n" not in message


def test_a_keyword_under_both_names_is_rejected() -> None:
    with pytest.raises(TypeError, match=r"engine\.keep_memory is now called engine\.malloc_reuse, and both are given$"):
        Engine(keep_memory=True, malloc_reuse=True)  # type: ignore[call-arg]


def test_every_renamed_recipe_key_is_recognised_as_a_keyword() -> None:
    sections: dict[str, Callable[..., object]] = {"loop": Loop, "engine": Engine, "replay": Replay}
    for former, current in RENAMED.items():
        section, key = former.split(".")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                sections[section](**{key: True})
            except TypeError as error:
                lines = [str(error)]
            else:
                lines = [str(warning.message) for warning in caught]
        assert len(lines) == 1
        assert f"{former} is now called {current}" in lines[0]


@pytest.mark.parametrize(("former", "current"), [("Memory", "ReplaySource"), ("build_memory", "build_replay_source")])
def test_a_former_name_of_the_methods_package_works_with_a_warning(former: str, current: str) -> None:
    with pytest.warns(FutureWarning, match=rf"^dfkd_fast\.methods\.{former} is now called {current}$") as caught:
        value = getattr(methods, former)
    assert value is getattr(methods, current)
    assert len(caught) == 1


def test_a_name_that_the_methods_package_never_had_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Memories'"):
        methods.Memories  # noqa: B018


def test_the_former_name_of_the_trainers_notes_works_with_a_warning() -> None:
    trainer = Trainer(*small_networks(), small_method())
    trainer.state.notes.append("a note")
    with pytest.warns(FutureWarning, match=r"^Trainer\.remarks is now called Trainer\.notes$") as caught:
        remarks = trainer.remarks
    assert remarks is trainer.notes
    assert len(caught) == 1
