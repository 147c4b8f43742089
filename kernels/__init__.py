"""Operations of data-free distillation that other trainers can import.

One folder an operation: ``__init__.py`` is the public function and checks its arguments, ``reference.py``
is the mathematics in plain PyTorch. Nothing here knows the rest of the project, only tensors.
"""

from .concat import concat_generated
from .discrepancy import kl_discrepancy, l1_discrepancy
from .ema import ema_update_

__all__ = ["concat_generated", "ema_update_", "kl_discrepancy", "l1_discrepancy"]
