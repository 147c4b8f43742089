import itertools
import re
from types import SimpleNamespace
from typing import Any

from tests.kernels import on_cpu


def test_every_file_with_backend_tests_is_listed() -> None:
    users = {path.name for path in on_cpu.HERE.glob("test_*.py") if re.search(r"\b((?:norm_)?backend|fused): Backend\b", path.read_text())}
    assert users == set(itertools.chain(*on_cpu.SHARED.values()))


def test_a_sample_is_small_and_covers_every_parameter_value() -> None:
    functions: dict[str, dict[str, list[Any]]] = {
        "test_a": {"kind": ["x", "y", "z"], "shape": [(1, 2), (2, 1)], "layout": list(range(6))},
        "test_b": {"kind": ["x"]},
        "test_c": {"kind": ["x", "y"], "shape": [(1, 2), (2, 1)]},
    }
    cases: list[Any] = [
        SimpleNamespace(nodeid=f"{name}[{values}]", callspec=SimpleNamespace(params=dict(zip(parameters, values, strict=True))))
        for name, parameters in functions.items()
        for values in itertools.product(*parameters.values())
    ]
    sample = on_cpu._sample(cases)
    assert len(sample) < len(cases) / 2
    assert on_cpu._sample(cases[::-1]) == sample
    for name, parameters in functions.items():
        chosen: list[dict[str, Any]] = [case.callspec.params for case in sample if case.nodeid.startswith(name)]  # type: ignore[attr-defined]
        for parameter, values in parameters.items():
            assert {values[parameter] for values in chosen} == set(values)
