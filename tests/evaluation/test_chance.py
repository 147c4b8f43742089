import pytest

from dfkd_fast.data import DataSettings
from dfkd_fast.evaluation import chance, is_at_chance


@pytest.mark.parametrize(
    ("name", "classes", "accuracy", "expected"),
    [
        ("digits", 10, 15.0, True),
        ("digits", 10, 15.1, False),
        ("digits", 1000, 0.15, True),
        ("digits", 1000, 0.16, False),
        ("digits", 2, 54.0, True),
        ("digits", 2, 60.0, False),  # not 1.5 times 50 %
        ("camvid", 11, 2.7, True),  # all pixels road
        ("camvid", 11, 9.5, False),
    ],
)
def test_accuracies_that_are_not_clearly_above_chance_level_are_detected(name: str, classes: int, accuracy: float, expected: bool) -> None:
    data = DataSettings(name=name, num_classes=classes)
    assert is_at_chance(accuracy, data) is expected
    assert chance(data) == pytest.approx(100 / classes)
