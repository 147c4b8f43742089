"""Recipes that are no recipes: as TOML, in their names, in what they extend, and in numbers that no machine can use."""

from collections.abc import Callable
from pathlib import Path

from tests.bad_input.case import Case, case

DIGITS = "9" * 5000
FILE = "mine.toml"


def shows(name: str, content: str | bytes | Callable[[Path], object], error: str) -> Case:
    """A recipe in a file."""
    return case(name, "show", FILE, error=error, files={FILE: content})


def sets(name: str, change: str, error: str) -> Case:
    """A change of a shipped recipe."""
    return case(name, "show", "digits", "--set", change, error=error)


CASES: list[Case] = [
    # what is no TOML
    case("a recipe that is not there", "show", "nowhere.toml", error="recipe 'nowhere.toml' cannot be read: [Errno 2]"),
    case("a recipe that is nearly there", "show", "digit", error="unknown recipe 'digit': did you mean 'digits'?"),
    case("a recipe in a file of another suffix", "show", "./mine.tml", error="a recipe's file must end in .toml", files={"mine.tml": ""}),
    shows("a folder for a recipe", Path.mkdir, error="recipe 'mine.toml' cannot be read: [Errno 21]"),
    shows("bytes that are no text", b"\xff\xfe\x00", error="recipe 'mine.toml' cannot be read: 'utf-8' codec"),
    shows("text that is no TOML", "epochs: 3", error="recipe 'mine.toml' is not TOML"),
    shows("JSON", '{"loop": {"epochs": 3}}', error="recipe 'mine.toml' is not TOML"),
    shows("a table that is opened twice", "[loop]\n[loop]", error="recipe 'mine.toml' is not TOML"),
    shows("a key that is given twice", "seed = 1\nseed = 2", error="recipe 'mine.toml' is not TOML"),
    shows("half a file", "[loop]\nepochs = ", error="recipe 'mine.toml' is not TOML"),
    shows("lists in lists, 5,000 deep", "seed = " + "[" * 5000, error="recipe 'mine.toml' is nested too deeply"),
    shows("tables in tables, 5,000 deep", "seed = " + "{a=" * 5000, error="recipe 'mine.toml' is nested too deeply"),
    shows("a key of 5,000 parts", ".".join("a" * 5000) + " = 1", error="recipe 'mine.toml' is nested too deeply"),
    shows("a header of 5,000 parts", f"[{'.'.join('a' * 5000)}]", error="recipe 'mine.toml' is nested too deeply"),
    shows("an integer of 5,000 digits", f"seed = {DIGITS}", error="recipe 'mine.toml' is not TOML: Exceeds the limit"),
    shows(
        "an integer of 5,000 hexadecimal digits", "seed = 0x" + "f" * 5000, error="seed = a number of 20000 bits: must be a whole number"
    ),
    shows("NUL in text", 'description = "a\\u0000b"', error="description has a NUL character"),
    shows("NUL in a key", '[provenance]\n"a\\u0000b" = "c"', error="provenance has a NUL character"),
    shows("NUL in a list", 'data.mean = ["a\\u0000b"]', error="data.mean.0 has a NUL character"),
    # keys of no recipe
    shows("a section that does not exist", "[lop]\nepochs = 3", error="unknown key 'lop': did you mean 'loop'?"),
    shows("a key that does not exist", "[loop]\nepoch = 3", error="unknown key 'loop.epoch': did you mean 'loop.epochs'?"),
    shows("a section of a section that does not exist", "[loop.a]\nb = 3", error="unknown key 'loop.a'"),
    shows("a value in a section's place", "loop = 3", error="loop = 3: must be a section"),
    shows("a list in a section's place", "[[loop]]\nepochs = 3", error="loop = [{'epochs': 3}]: must be a section"),
    shows("an empty key", '"" = 3', error="unknown key ''"),
    shows("an earlier key beside its present one", "[loop]\nprecision = 'fp32'\n[engine]\nprecision = 'fp32'", error="both are given"),
    # what it extends
    shows("what is extended is not a name", "extends = 3", error="extends = 3: must be the name or path of a recipe"),
    shows("what is extended does not exist", "extends = 'digit'", error="unknown recipe 'digit': did you mean 'digits'?"),
    shows("what is extended is not there", "extends = 'nowhere.toml'", error="recipe 'nowhere.toml' cannot be read"),
    shows("it extends itself", "extends = 'mine.toml'", error="recipe 'mine.toml' extends itself through 'mine.toml'"),
    shows("it extends itself under another path", "extends = './a/../mine.toml'", error="cannot be read"),
    case(
        "two extend each other",
        *("show", "a/mine.toml"),
        error="recipe 'a/mine.toml' extends itself through 'a/../b/../a/mine.toml'",
        files={"a/mine.toml": "extends = '../b/other.toml'", "b/other.toml": "extends = '../a/mine.toml'"},
    ),
    shows("NUL in what is extended", 'extends = "a\\u0000b.toml"', error="cannot be read: embedded null byte"),
    # names, which are folders' too
    *(
        sets(f"a name that is {what}", f"name={value}", error="must be the name of a folder")
        for what, value in {
            "empty": '""',
            "above": "..",
            "here": ".",
            "hidden": ".x",
            "in another folder": "../x",
            "absolute": "/tmp/x",
            "in a folder below": "a/b",
            "two lines": '"a\\nb"',
            "coloured": '"\\u001b[31m"',
            "spaced before": '" a"',
            "spaced behind": '"a "',
            "too long": "a" * 300,
            "too long in UTF-8": "ä" * 120,
        }.items()
    ),
    sets("a number for a name", "name=3", error="name = 3: must be a string"),
    sets("a name that is not text", "name=a\udcff", error="name has a NUL character or bytes that are not UTF-8"),
    sets("NUL in a name", 'name="a\\u0000b"', error="name has a NUL character"),
    sets("a path that is no UTF-8", "data.root=/a\udcff", error="data.root has a NUL character or bytes that are not UTF-8"),
    sets("NUL in a path", 'data.root="a\\u0000b"', error="data.root has a NUL character"),
    # numbers that no machine can use
    sets("a seed of 2⁶³", f"seed={2**63}", error=f"seed = {2**63}: must be a whole number ≥ 0 and ≤ {2**63 - 1}"),
    sets("a seed of 2⁶⁴", f"seed={2**64}", error=f"seed = {2**64}: must be a whole number"),
    sets("an integer of 5,000 digits in a change", f"loop.epochs={DIGITS}", error=f"loop.epochs = '{DIGITS[:99]}…"),
    sets("an integer of 4,000 digits", f"loop.epochs={DIGITS[:4000]}", error=f"loop.epochs = {DIGITS[:100]}…"),
    sets("an integer of 400 digits for a number", f"objective.adversarial={DIGITS[:400]}", error="must be a number ≥ 0 and ≤ 1e+38"),
    sets("an integer beyond any batch", f"loop.batch_size={2**31}", error=f"loop.batch_size = {2**31}: must be a whole number"),
    sets(
        "a rate beyond float32", "student_optimizer.lr=1e300", error="student_optimizer.lr = 1e+300: must be a number ≥ 1e-38 and ≤ 1e+38"
    ),
    sets("a rate below float32", "student_optimizer.lr=1e-300", error="student_optimizer.lr = 1e-300: must be a number ≥ 1e-38"),
    sets("a rate of zero", "generator_optimizer.lr=0", error="generator_optimizer.lr = 0: must be a number ≥ 1e-38"),
    sets("a decay beyond float32", "student_optimizer.weight_decay=1e39", error="must be a number ≥ 0 and ≤ 1e+38"),
    sets("a mean beyond float32", "data.mean=[-1e300]", error="data.mean.0 = -1e+300: must be a list"),
    sets("a deviation that float32 makes zero", "data.std=[1e-300]", error="data.std.0 = 1e-300: must be a list"),
    sets("a momentum above one", "student_optimizer.momentum=1.5", error="student_optimizer.momentum = 1.5: must be a number ≥ 0 and ≤ 1"),
    sets("a rate of averages of one", "generator_optimizer.betas=[0.9,1.0]", error="generator_optimizer.betas.1 = 1.0: must be a list"),
    sets("one rate of averages of two", "generator_optimizer.betas=[0.9]", error="generator_optimizer.betas"),
    sets("a temperature of zero", "objective.temperature=0", error="objective.temperature = 0: must be a number ≥ 0.0001"),
    # networks to compile
    sets(
        "a network to compile that does not exist",
        'engine.compile=["teachers"]',
        error="engine.compile: ['teachers'] must be true, false or",
    ),
    sets("a name instead of a list of networks", "engine.compile=student", error="a list of 'teacher', 'student' and 'generator'"),
    sets("a number instead of a list of networks", "engine.compile=1", error="engine.compile: 1 must be true, false or a list of"),
    # durations
    sets("a number for a duration", "loop.budget=40", error="loop.budget: 40 must be a duration from 1s to 8760h, such as 90s, 40min"),
    sets("a duration in other words", 'loop.budget="40 minutes"', error="loop.budget: '40 minutes' must be a duration"),
    sets("a duration with two points", "loop.budget=1.2.3h", error="loop.budget: '1.2.3h' must be a duration"),
    sets("a duration beyond a year", f"loop.budget={'9' * 4000}h", error="must be a duration from 1s to 8760h"),
    sets("an integer of 4,000 digits for a duration", f"loop.budget={DIGITS[:4000]}", error="must be a duration from 1s to 8760h"),
    # --set
    sets("two lines in a change", "loop.epochs=3\nseed=4", error="--set 'loop.epochs=3\\nseed=4': must be one value; repeat --set"),
    sets("a table in a change", "seed=4\n[loop]\nepochs=3", error="must be one value; repeat --set"),
    sets("a change of no key between two dots", "loop..epochs=3", error="--set 'loop..epochs=3': must be key.path=value"),
    sets("a change of a dot", ".=3", error="--set '.=3': must be key.path=value"),
    sets("a change of what is behind a dot", ".loop=3", error="--set '.loop=3': must be key.path=value"),
    sets("lists in lists in a change", "seed=" + "[" * 5000, error="--set seed: the value is nested too deeply"),
    sets("a table of 5,000 parts in a change", f"loop={{{'.'.join('a' * 5000)}=1}}", error="recipe 'digits' is nested too deeply"),
    sets("a change of 5,000 parts", ".".join("a" * 5000) + "=1", error="recipe 'digits' is nested too deeply"),
    sets("what is extended in a change", "extends=digits-dfad", error="unknown key 'extends'"),
    sets("the same as bytes", "seed=b'3'", error="seed = \"b'3'\": must be a whole number"),
]
