"""The device of a command."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dfkd_fast import distributed
from dfkd_fast.choices import DeviceName
from dfkd_fast.engine.device import pick_device
from dfkd_fast.errors import DfkdError
from dfkd_fast.kernels import BackendError

__all__ = ["device_context"]


@contextmanager
def device_context(name: DeviceName) -> Iterator[torch.device]:
    """Yields this process's device; inside, the processes of torchrun form a process group.

    Raises:
        DfkdError: the device does not exist, or a forced kernel backend does not exist or does not support a call.
    """
    try:
        device = distributed.local_device(pick_device(name))
        with distributed.process_group(device):
            yield device
    except BackendError as error:
        raise DfkdError(str(error)) from error
