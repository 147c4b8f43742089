"""Loading of the compiled CUDA extension.

``DFKD_FAST_EXTENSION`` overrides its path, which is next to this file by default.
"""

import functools
import os
from pathlib import Path

import torch

__all__ = ["BINARY", "load_error", "loaded"]

VARIABLE = "DFKD_FAST_EXTENSION"
BINARY = Path(os.environ.get(VARIABLE) or Path(__file__).parent / "dfkd_fast_cuda.so")


@functools.cache
def load_error() -> str | None:
    """Load the extension once; return the error in one line, or None if it is loaded."""
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    if not BINARY.is_file():
        return f"{VARIABLE} is {BINARY}, which is not a file" if os.environ.get(VARIABLE) else "not built: dfkd-fast build"
    try:
        torch.ops.load_library(str(BINARY))
    except OSError as error:
        return f"{BINARY.name} cannot be loaded: {str(error).splitlines()[0]}"
    return None


def loaded() -> bool:
    """Return whether ``torch.ops.dfkd_fast`` has the CUDA overloads."""
    return load_error() is None
