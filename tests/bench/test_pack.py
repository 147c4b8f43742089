"""bench/gpu/pack.sh, in a copy of the repository, with fakes of the package index and the compiler."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bench import provenance

ROOT = Path(__file__).parents[2]
MNIST = [f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
# A fake interpreter of version VERSION: pip's downloads are empty files of WHEEL_BYTES, the extension is a text file unless the copy has
# kernels/build.py, and the commands of the printed line are logged.
PYTHON = """#!{executable}
import json
import os
import sys
from pathlib import Path

arguments = sys.argv[1:]
if arguments[:3] == ["-m", "pip", "download"]:
    folder = Path(arguments[arguments.index("--dest") + 1])
    folder.mkdir()
    for requirement in arguments[arguments.index("--dest") + 2 :]:
        name = requirement.partition(">")[0].replace("-", "_")
        with (folder / f"{{name}}-1.0-py3-none-any.whl").open("wb") as wheel:
            wheel.truncate(int(os.environ.get("WHEEL_BYTES", 1000)))
elif arguments[0] == "-c":
    print(os.environ.get("VERSION", "3.12"))
elif arguments[-1].endswith("dfkd_fast_cuda.so") and not Path("kernels/build.py").exists():
    if os.environ.get("BROKEN_COMPILER"):
        sys.exit("nvcc failed")
    Path(arguments[-1]).write_text("extension")
elif arguments[0] == "-m":
    held = sorted(str(path) for path in Path(os.environ["TMPDIR"]).rglob("*-ubyte"))
    environment = [os.environ.get("PYTHONPATH", ""), os.environ.get("DFKD_FAST_EXTENSION", "")]
    with Path("{folder}/commands.txt").open("a") as file:
        print(json.dumps([arguments, environment, held, Path(".git").exists()]), file=file)
else:
    os.execv("{executable}", ["{executable}", *arguments])
"""


class Result(NamedTuple):
    """Exit code and output of a call."""

    code: int
    out: str
    err: str


class Copy:
    """A repository in ``root`` with pack.sh and the files it reads, and fake programs in ``bin``."""

    def __init__(self, folder: Path) -> None:
        self.root, self.bin = folder / "repository", folder / "bin"
        (self.root / "bench" / "gpu").mkdir(parents=True)
        self.bin.mkdir()
        shutil.copy(ROOT / "pyproject.toml", self.root)
        shutil.copy(ROOT / "bench" / "provenance.py", self.root / "bench")
        shutil.copy(ROOT / "bench" / "gpu" / "pack.sh", self.root / "bench" / "gpu")
        self.program("python3", PYTHON.format(executable=sys.executable, folder=folder))
        self.program("strip", "#!/bin/sh\n")
        self.carry = self.root / ".carry"

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def pack(self, *arguments: str | Path, **environment: str) -> Result:
        command = ["bash", self.root / "bench" / "gpu" / "pack.sh", *arguments]
        environment = {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", **environment}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return Result(done.returncode, done.stdout, done.stderr)

    def commit(self) -> None:
        """Create a git repository that ignores .carry, with one commit."""
        (self.root / ".gitignore").write_text("/.carry/\n")
        identity = ("-c", "user.name=N", "-c", "user.email=n@example.org")
        for command in (("init", "-q"), ("add", "-A"), (*identity, "commit", "-qm", "all")):
            subprocess.run(["git", *command], cwd=self.root, check=True)

    def contents(self) -> dict[str, bytes]:
        return {str(path.relative_to(self.carry)): path.read_bytes() for path in self.carry.rglob("*") if path.is_file()}


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Files of MNIST, two of them gzipped."""
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in MNIST[:2]:
        (raw / name).write_text(name)
    for name in MNIST[2:]:
        (raw / f"{name}.gz").write_bytes(gzip.compress(name.encode()))
    return tmp_path / "data"


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def array(name: str) -> set[str]:
    """Return an array of pack.sh."""
    match = re.search(rf"^{name}=\(([^)]*)\)", (ROOT / "bench" / "gpu" / "pack.sh").read_text(), re.MULTILINE)
    assert match is not None
    return set(match[1].split())


def with_dependencies(requirements: set[str]) -> set[str]:
    """Return the names of installed packages and of all their dependencies."""
    reached: set[str] = set()
    waiting = set(requirements)
    while waiting:
        name = waiting.pop()
        reached.add(name)
        needed = [Requirement(text) for text in metadata.requires(name) or []]
        waiting |= {canonicalize_name(need.name) for need in needed if need.marker is None or need.marker.evaluate({"extra": ""})} - reached
    return reached


def test_every_dependency_is_packed_or_installed_or_omitted_explicitly(copy: Copy) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["dependencies"] + project["optional-dependencies"]["test"]
    packed = copy.pack("--list").out.splitlines()
    assert set(packed) <= set(declared)
    assert names(packed) | array("installed") | array("omitted") == names(declared)
    assert names(packed) == {"pydantic", "tomli-w"}
    assert array("omitted").isdisjoint(names(project["dependencies"])), "the package does not import without its dependencies"


def test_a_new_dependency_is_packed_unless_the_host_has_it(copy: Copy) -> None:
    project = copy.root / "pyproject.toml"
    project.write_text(project.read_text().replace("dependencies = [", 'dependencies = ["attrs>=25", "Numba>=1",', 1))
    assert copy.pack("--list").out.splitlines() == ["attrs>=25", "pydantic>=2.9", "tomli-w>=1.1"]


def test_no_wheel_replaces_a_package_of_the_host(copy: Copy) -> None:
    wheels = with_dependencies(names(copy.pack("--list").out.splitlines()))
    assert wheels >= {"pydantic-core", "annotated-types", "typing-inspection"}
    assert wheels.isdisjoint(array("installed"))


def test_the_folder_holds_the_wheels_the_extension_and_the_data_gzipped(copy: Copy, data: Path) -> None:
    result = copy.pack("--data", data)
    assert result.code == 0, result.err
    contents = copy.contents()
    wheels = {f"wheels/{name}-1.0-py3-none-any.whl" for name in ("pydantic", "tomli_w")}
    assert contents.keys() == wheels | {"dfkd_fast_cuda.so"} | {f"data/MNIST/raw/{name}.gz" for name in MNIST}
    assert all(gzip.decompress(contents[f"data/MNIST/raw/{name}.gz"]).decode() == name for name in MNIST)
    assert all(re.search(rf"^\d+\s+{part}$", result.err, re.MULTILINE) for part in ("wheels", "data", "dfkd_fast_cuda.so", "total"))


def test_paths_are_relative_to_the_current_folder(copy: Copy, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data.parent)
    result = copy.pack("--data", "data", "--python", "bin/python3")
    assert result.code == 0, result.err
    assert (copy.carry / "data").is_dir()


def test_a_second_call_produces_the_same_folder(copy: Copy, data: Path) -> None:
    copy.pack("--data", data)
    first = copy.contents()
    (copy.carry / "stale").touch()
    assert copy.pack("--data", data).code == 0
    assert copy.contents() == first


def test_the_line_is_the_only_output_and_names_the_commit(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "ROOT", copy.root)
    assert "--commit unknown " in copy.pack().out
    results = [copy.root / name for name in ("README.md", "docs/gpu.md", "bench/results/micro.csv")]
    for path in results:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    copy.commit()
    clean = provenance.commit()
    for change in (None, *results, copy.root / "pyproject.toml"):
        if change is not None:
            with change.open("a") as file:
                file.write("# changed\n")
        result = copy.pack()
        assert len(result.out.splitlines()) == 1
        assert len(result.out) <= 2000
        assert f"--commit {provenance.commit()} " in result.out
        assert (provenance.commit() == clean) == (change is None or change in results)


def test_without_the_excluded_paths_the_commit_is_unknown_and_refused(copy: Copy) -> None:
    (copy.root / "bench" / "provenance.py").write_text("")
    assert copy.pack()[:2] == (2, "")
    assert not copy.carry.exists()


def test_the_line_refuses_to_run_without_a_folder_for_the_results(copy: Copy, tmp_path: Path) -> None:
    line = copy.pack().out
    environment = {**os.environ, "PATH": f"{copy.bin}:{os.environ['PATH']}", "TMPDIR": str(tmp_path / "temporary"), "OUT": ""}
    (tmp_path / "temporary").mkdir()
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(["bash", "-c", line], cwd=copy.root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "OUT: must name the folder for the results" in done.stderr
    assert sorted(tmp_path.rglob("*")) == before, "neither installed nor started"


def test_the_extension_is_compiled_for_the_default_architectures(copy: Copy) -> None:
    (copy.root / "kernels").mkdir()
    (copy.root / "kernels" / "build.py").write_text(
        "class BuildError(RuntimeError): ...\n"
        "def compile_extension(binary, **options):\n"
        "    raise BuildError(f'{binary.name} with {options}')\n"
    )
    assert copy.pack() == Result(1, "", "bench/gpu/pack.sh: dfkd_fast_cuda.so with {}\n")


def test_help_is_the_comment_at_the_top(copy: Copy) -> None:
    result = copy.pack("--help")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0].startswith("Pack what a GPU host")
    assert lines[-1].endswith("the line refuses to run without it.")
    usage = [line for line in lines if line.startswith("    bench/gpu/pack.sh")]
    options = {line.split()[0] for line in lines if line.startswith("--")}
    assert options == set(re.findall(r"--\w+", " ".join(usage)))
    assert options == set(re.findall(r"--\w+", copy.pack("--no-such-option").err.partition("one of")[2]))


@pytest.mark.parametrize("with_data", [False, True], ids=["no data", "data"])
def test_the_line_installs_unpacks_and_starts_the_benchmark(copy: Copy, data: Path, with_data: bool) -> None:
    copy.commit()
    result = copy.pack("--rehearse", *(("--data", data) if with_data else ()))
    assert result.code == 0, result.err
    install, start = map(json.loads, (copy.bin.parent / "commands.txt").read_text().splitlines())
    site = install[0][install[0].index("--target") + 1]
    assert install[0][:3] == ["-m", "pip", "install"]
    assert {"--no-index", "--no-deps"} < set(install[0])
    assert {Path(name).name for name in install[0] if name.endswith(".whl")} == {path.name for path in (copy.carry / "wheels").iterdir()}

    arguments, (python_path, extension), unpacked, has_git = start
    assert arguments[:3] == ["-m", "bench", "gpu"]
    assert arguments[-1] == "--rehearse"
    assert python_path == site
    assert extension.endswith("/tree/.carry/dfkd_fast_cuda.so")
    assert not has_git
    assert {Path(path).name for path in unpacked} == (set(MNIST) if with_data else set())
    if with_data:
        root = Path(arguments[arguments.index("--data-root") + 1])
        assert {Path(path).parent for path in unpacked} == {root / "MNIST" / "raw"}
    assert {path.name for path in copy.root.iterdir()} == {".carry", ".git", ".gitignore", "bench", "pyproject.toml"}


@pytest.mark.parametrize(
    ("environment", "code", "message"),
    [({"WHEEL_BYTES": "31000000"}, 2, "are more than 60000000"), ({"BROKEN_COMPILER": "1"}, 1, "nvcc failed")],
)
def test_a_failure_keeps_the_previous_folder(copy: Copy, environment: dict[str, str], code: int, message: str) -> None:
    assert copy.pack().code == 0
    before = copy.contents()
    result = copy.pack(**environment)
    assert (result.code, result.out) == (code, "")
    assert message in result.err
    assert copy.contents() == before
    assert {path.name for path in copy.root.iterdir()} == {".carry", "bench", "pyproject.toml"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dta", "x"], "--dta: must be one of --python, --data, --rehearse, --list, --help"),
        (["--data"], "--data needs a value"),
        (["--python", "no-such-python"], "--python no-such-python: no such program"),
        (["--python", "/bin/cat", "--list"], "--python /bin/cat: must be Python 3.11 or newer"),
        (["--python", "/bin/true", "--list"], "--python /bin/true: must be Python 3.11 or newer"),
        (["--data", "nowhere"], "--data nowhere: has neither MNIST/raw/train-images-idx3-ubyte nor train-images-idx3-ubyte.gz"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_code_2(copy: Copy, arguments: list[str], message: str) -> None:
    assert copy.pack(*arguments) == Result(2, "", f"bench/gpu/pack.sh: {message}\n")
    assert not copy.carry.exists()


@pytest.mark.parametrize(("version", "accepted"), [("2.7", False), ("3.9", False), ("3.10", False), ("3.11", True), ("3.14", True)])
def test_python_is_3_11_or_newer(copy: Copy, version: str, accepted: bool) -> None:
    result = copy.pack("--list", VERSION=version)
    assert (result.code == 0) == accepted
    assert accepted or result.err.splitlines() == [f"bench/gpu/pack.sh: --python {copy.bin}/python3: must be Python 3.11 or newer"]


@pytest.mark.parametrize("version", ["3.11", "3.13"])
def test_a_rehearsal_requires_the_python_of_the_wheels(copy: Copy, version: str) -> None:
    result = copy.pack("--rehearse", VERSION=version)
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines() == [
        f"bench/gpu/pack.sh: --rehearse: requires Python 3.12, like the wheels; --python {copy.bin}/python3 is {version}"
    ]
    assert not copy.carry.exists()
