"""What pyproject.toml cannot say: that a checkout must have kept its links, and how the CUDA extension is built."""

import functools
import importlib.util
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

PACKAGE = Path(__file__).parent / "dfkd_fast"
BINARY = "dfkd_fast_cuda.so"

for name in ("kernels", "csrc"):
    if not (PACKAGE / name).is_dir():
        raise SystemExit(
            f"dfkd_fast/{name} must be a link to ../{name}, and this checkout lost it: git config core.symlinks true, then git checkout ."
        )


@functools.cache
def compiler() -> ModuleType:
    """kernels/build.py by itself: importing dfkd_fast would need everything that it depends on."""
    spec = importlib.util.spec_from_file_location("dfkd_fast_build", PACKAGE / "kernels" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildExtension(build_ext):  # type: ignore[misc]
    """Calls nvcc where there is one. The extension is optional: without it an installation is complete, and says why."""

    def run(self) -> None:
        """Build the extension, or forget it."""
        build = compiler()
        reason = build.unbuildable_reason()
        if reason is None:
            try:
                super().run()
                return
            except build.BuildError as error:
                reason = str(error).splitlines()[0]
        print(f"dfkd_fast: built without its CUDA extension ({reason}); dfkd-fast build adds it later", flush=True)
        self.extensions: list[Extension] = []
        self.distribution.ext_modules = []

    def build_extension(self, ext: Extension) -> None:
        """Compile it to where setuptools wants it."""
        compiler().compile_extension(Path(self.get_ext_fullpath(ext.name)).absolute())

    def get_ext_filename(self, fullname: str) -> str:
        """The name is the same for every Python: the binary does not know Python."""
        return str(Path(*fullname.split(".")[:-1]) / BINARY)


class Wheel(bdist_wheel):  # type: ignore[misc]
    """Tagged for any Python, and for one platform only if the extension is in it."""

    def run(self) -> None:
        """Build the extension first, because its absence decides where files go."""
        self.run_command("build_ext")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Python, interface and platform."""
        return "py3", "none", "any" if self.root_is_pure else super().get_tag()[2]


setup(
    ext_modules=[Extension("dfkd_fast.kernels.dfkd_fast_cuda", sources=[])],
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": Wheel},
)
