"""The tensors of a tree of modules, gathered once for as long as they stay what they were."""

from itertools import chain
from operator import is_

from torch import Tensor, nn

try:
    # The check that torch.compile makes of its inputs before every call: one call for all tensors, 40 ns each.
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # an internal of PyTorch: without it, everything counts as changed
    TensorGuards = None  # type: ignore[assignment, misc]

__all__ = ["Gathered"]

_END = object()


class Gathered:
    """Notices whether modules still have the parameters and buffers that they had, described as they were.

    Gathering them with ``parameters()`` and looking at their shapes, strides, dtypes and devices takes 2 µs a tensor, this 0.1 µs.
    Noticed are tensors and submodules that were replaced, added or removed, and tensors that ``.data = ...``, ``module.to(...)`` or an
    in-place view changed in shape, strides, dtype or device. Not noticed is other memory: a kernel asks for addresses at every call.

    Holds the modules' children and tensors, but not the modules.
    """

    def __init__(self, *roots: nn.Module) -> None:
        registries = [
            registry for root in roots for module in root.modules() for registry in (module._modules, module._parameters, module._buffers)
        ]
        # Views: they show what is added later. The end marks where a last registry must not have grown.
        self._views = [*(registry.values() for registry in registries if registry), (_END,)]
        self._empty = [registry for registry in registries if not registry]
        self._members = [*chain.from_iterable(self._views)]
        self._tensors = tuple({id(member): member for member in self._members if isinstance(member, Tensor)}.values())
        # PyTorch reads these keywords without looking whether they are given.
        none_dynamic = {"dynamic_dims_sizes": None, "dynamic_dims_strides": None}
        self._guards = None if TensorGuards is None else TensorGuards(*self._tensors, **none_dynamic)

    def unchanged(self) -> bool:
        """Whether gathering anew would give the same tensors, described the same."""
        return (
            self._guards is not None
            and not any(self._empty)
            and all(map(is_, chain.from_iterable(self._views), self._members))
            and self._guards.check(*self._tensors)
        )
