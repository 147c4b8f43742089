"""What the numba kernels share: storage formats, vectorisable elementary functions, threads.

A kernel takes a tensor as its place: its address, and a scalar whose type says how an element is stored. An array would
cost the call more than small tensors cost to compute. bfloat16 and float16, which numba lacks, are the bits of a uint16 and an
int16; ``widen`` and ``narrow`` convert. The elementary functions are short polynomials, because a call into libm would
keep LLVM from vectorising the loop around it.
"""

import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numba
import numpy as np
import torch
from llvmlite import binding as llvm
from llvmlite import ir
from llvmlite.binding import Linkage
from numba import types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.extending import intrinsic
from torch import Tensor

from .machine_code import keeping_machine_code

__all__ = [
    "BLOCK",
    "TypedPointer",
    "exp",
    "exp_of_negative",
    "expm1_of_negative",
    "helper",
    "inline",
    "laid_out_as",
    "log1p",
    "narrow",
    "parallel",
    "pointer",
    "sigmoid",
    "stored_as",
    "tanh",
    "threads",
    "total",
    "typed_pointer",
    "widen",
]

TypedPointer = tuple[int, Any]
BLOCK = 8192  # elements a task: partial sums are a block's, so that they do not depend on the number of threads

# Contracting and reordering sums is allowed, assuming that no NaN occurs is not.
_RELAXED = {"contract", "reassoc", "nsz", "arcp"}


_PARALLEL_FOR, _LOOP = "numba_parallel_for", "dfkd_fast_parallel_for"


def _loop_module() -> str:
    """A function in the place of numba's that shares a loop out: it runs the loop of a single thread without waking others.

    In a forked child there are none to wake, and GNU OpenMP ends it for the attempt.
    """
    pointer, integer = ir.IntType(8).as_pointer(), ir.IntType(64)
    module = ir.Module()
    parameters = [*5 * [pointer], *3 * [integer]]  # loop, its arguments, their counts and steps, its data; dimensions, arguments, threads
    share_out = ir.Function(module, ir.FunctionType(ir.VoidType(), parameters), _PARALLEL_FOR)
    function = ir.Function(module, share_out.function_type, _LOOP)
    # Were the loop inlined here, there would be two of it, which might round differently.
    function.attributes.add("noinline")
    function.attributes.add("optnone")
    builder = ir.IRBuilder(function.append_basic_block())
    with builder.if_else(builder.icmp_unsigned("==", function.args[-1], integer(1))) as (alone, together):
        with alone:
            kind = ir.FunctionType(ir.VoidType(), 4 * [pointer])
            builder.call(builder.bitcast(function.args[0], kind.as_pointer()), function.args[1:5])
        with together:
            builder.call(share_out, function.args)
    builder.ret_void()
    return str(module)


_LOOP_MODULE = _loop_module()


class _KernelLibrary(JITCodeLibrary):  # type: ignore[misc]
    """A kernel's machine code, which calls nothing that was compiled for another.

    numba links a copy of the loop and of every helper into the kernel's module and optimises it there again, yet leaves the
    symbols public: where the same process compiled them apart, as it did before it compiled the kernel, the linker takes those
    instead, and a process that loads the kernel from disk takes the copy. Both round as ``_RELAXED`` allows, each its own way.
    """

    def _optimize_final_module(self) -> None:
        functions = {function.name: function for function in self._final_module.functions}
        if _PARALLEL_FOR in functions:
            functions[_PARALLEL_FOR].name = _LOOP
            self._final_module.link_in(llvm.parse_assembly(_LOOP_MODULE))
        for function in self._final_module.functions:
            if function.name == _LOOP or function.linkage in (Linkage.linkonce_odr, Linkage.weak_odr):
                function.linkage = Linkage.internal
        super()._optimize_final_module()


class _KernelCompiler(Compiler):  # type: ignore[misc]
    """numba's compiler, into a library of ours."""

    def compile_extra(self, func: Callable[..., Any]) -> Any:
        self.state.library = _KernelLibrary(self.state.targetctx.codegen(), func.__qualname__)
        self.state.library.enable_object_caching()
        return super().compile_extra(func)


def parallel(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a kernel whose ``prange`` loop runs on all threads, and keep the machine code on disk.

    What is compiled in this process and what is loaded from the disk is the same machine code.
    """
    options: dict[str, Any] = {
        "parallel": True,
        "fastmath": _RELAXED,
        "error_model": "numpy",
        "nogil": True,
        "pipeline_class": _KernelCompiler,
    }
    # numba notices a change of a kernel's own file, but not of this one, whose functions are compiled into the kernel.
    return keeping_machine_code(partial(numba.njit, kernel, **options), Path(__file__))


def inline(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function for use in kernels, rounding as written but for contraction."""
    return numba.njit(function, fastmath={"contract"}, error_model="numpy", forceinline=True)


def helper(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function that kernels call."""
    return numba.njit(function, error_model="numpy")


@helper
def total(partial: Any) -> float:
    """The sum of the tasks' partial sums, in their order: numba shares ``partial.sum()`` out among the threads, and groups it by them."""
    result = 0.0
    for i in range(len(partial)):
        result += partial[i]
    return result


class _Threads:
    """As many threads as PyTorch uses, one parallel kernel at a time: not every threading layer allows two.

    A forked child, such as a worker of a DataLoader, has none of the threads that its parent launched: its kernels run on
    the thread that calls them. They compute the same.
    """

    def __init__(self) -> None:
        self._running = threading.RLock()
        self._lost = False
        if hasattr(os, "register_at_fork"):
            # No kernel runs or is compiled during a fork: the child would wait forever for whoever does.
            os.register_at_fork(before=self._running.acquire, after_in_parent=self._running.release, after_in_child=self._forked)

    def __enter__(self) -> None:
        self._running.acquire()
        wanted = torch.get_num_threads()
        numba.set_num_threads(1 if self._lost else min(wanted, numba.config.NUMBA_NUM_THREADS))
        if torch.get_num_threads() != wanted:
            # Launching numba's threads, once a process, sets OpenMP's number for everyone.
            torch.set_num_threads(wanted)

    def __exit__(self, *_: object) -> None:
        self._running.release()

    def _forked(self) -> None:
        try:
            numba.threading_layer()
        except ValueError:  # nobody has launched threads yet: the child may launch its own
            self._lost = False
        else:
            self._lost = True
        self._running.release()


threads = _Threads()


def typed_pointer(tensor: Tensor) -> TypedPointer:
    """The address of a tensor's first element, and how its elements are stored."""
    return tensor.data_ptr(), _STORED_AS[tensor.dtype]


def stored_as(dtype: torch.dtype) -> Any:
    """The second half of a place."""
    return _STORED_AS[dtype]


def laid_out_as(result: Tensor, given: Tensor) -> Tensor:
    """A dense result with the strides of ``torch.empty_like(given)``, copied only if it has others."""
    if given.is_contiguous() and result.is_contiguous():
        return result
    expected = torch.empty_like(given, dtype=result.dtype)
    return result if result.stride() == expected.stride() else expected.copy_(result)


_STORED_AS = {
    torch.float32: np.float32(0),
    torch.bfloat16: np.uint16(0),
    torch.float16: np.int16(0),
    torch.float64: np.float64(0),
    torch.int8: np.int8(0),
    torch.int64: np.int64(0),
}

F32 = ir.FloatType()
I16, I32 = ir.IntType(16), ir.IntType(32)


@intrinsic
def pointer(_: Any, place: Any) -> Any:
    """A place's elements, to be indexed."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(builder.extract_value(arguments[0], 0), context.get_value_type(signature.return_type))

    return types.CPointer(place[1])(place), emit


@intrinsic
def widen(_: Any, x: Any) -> Any:
    """The float32 value of an element: float32, bfloat16 (uint16), float16 (int16) or a sign (int8)."""

    def emit(__: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (value,) = arguments
        if signature.args[0] == types.uint16:
            return builder.bitcast(builder.shl(builder.zext(value, I32), I32(16)), F32)
        if signature.args[0] == types.int16:
            return builder.fpext(builder.bitcast(value, ir.HalfType()), F32)
        return builder.sitofp(value, F32) if signature.args[0] == types.int8 else value

    return types.float32(x), emit


@intrinsic
def narrow(_: Any, x: Any, place: Any) -> Any:
    """A float32 value as an element of a place, rounded to nearest even."""

    def emit(__: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = arguments[0]
        if signature.return_type == types.int16:
            return builder.bitcast(builder.fptrunc(value, ir.HalfType()), I16)
        if signature.return_type != types.uint16:
            return value
        word = builder.bitcast(value, I32)
        odd = builder.and_(builder.lshr(word, I32(16)), I32(1))
        rounded = builder.lshr(builder.add(builder.add(word, I32(0x7FFF)), odd), I32(16))
        kept = builder.select(builder.fcmp_unordered("uno", value, value), I32(0x7FC0), rounded)
        return builder.trunc(kept, I16)

    return place[1](types.float32, place), emit


@intrinsic
def two_to_the(_: Any, n: Any) -> Any:
    """2ⁿ for a whole float32 n from −126 to 127."""

    def emit(__: Any, builder: Any, ___: Any, arguments: Any) -> Any:
        exponent = builder.add(builder.fptosi(arguments[0], I32), I32(127))
        return builder.bitcast(builder.shl(exponent, I32(23)), F32)

    return types.float32(types.float32), emit


@intrinsic
def rounded(_: Any, x: Any) -> Any:
    """The nearest whole number."""

    def emit(__: Any, builder: Any, ___: Any, arguments: Any) -> Any:
        return builder.call(builder.module.declare_intrinsic("llvm.rint", [F32]), arguments)

    return types.float32(types.float32), emit


# float32 constants: a Python float would widen the arithmetic to float64.
ZERO, HALF, ONE, TWO = (cast("Any", np.float32(value)) for value in (0, 0.5, 1, 2))
LOWEST, LARGEST = np.float32(-87.3), np.float32(88)  # beyond them 2ⁿ is no normal float32 number
LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.1219444005469057e-4)  # n · LN2_HIGH is exact
# eʳ = 1 + r + r² (E2 + E3 r + …) for |r| ≤ ½ log 2, to 1e-8
E2, E3, E4, E5, E6 = (np.float32(c) for c in (0.5, 0.16666577026, 0.04166655466, 0.00836317307, 0.00139261761))
# 2 atanh(s) / s in s² over |s| ≤ 1/3, and (tanh(x) / x − 1) / x² in x² over x ≤ 0.55: interpolated at Chebyshev
# points, to 4e-9 of the value.
A0, A1, A2, A3, A4 = (np.float32(c) for c in (2.00000000768, 0.6666632164, 0.4002459523, 0.2796515776, 0.2815777829))
T0, T1, T2, T3, T4 = (np.float32(c) for c in (-0.33333332008, 0.13333113729, -0.05390942883, 0.02130938867, -0.00661022784))
SMALL = np.float32(0.55)


@inline
def exp_of_negative(x: Any) -> Any:
    """eˣ to about 1e-7 for x ≤ 0 (up to 88); 0 below −87.3."""
    n = rounded(x * LOG2_E)
    n = n if n > np.float32(-126) else np.float32(-126)  # NaN too: its power of two must exist
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    y = (ONE + r * (ONE + r * (E2 + r * (E3 + r * (E4 + r * (E5 + r * E6)))))) * two_to_the(n)
    return ZERO if x < LOWEST else y


@inline
def expm1_of_negative(x: Any) -> Any:
    """eˣ − 1 to about 1e-7 of its value for x ≤ 0 (up to 88); −1 below −87.3."""
    n = rounded(x * LOG2_E)
    n = n if n > np.float32(-126) else np.float32(-126)
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    power = two_to_the(n)
    y = power * (r * (ONE + r * (E2 + r * (E3 + r * (E4 + r * (E5 + r * E6)))))) + (power - ONE)
    return -ONE if x < LOWEST else y


@inline
def exp(x: Any) -> Any:
    """eˣ to about 1e-7; 0 below −87.3, infinity above 88."""
    y = exp_of_negative(x if x < LARGEST else LARGEST)
    y = np.float32(np.inf) if x > LARGEST else y
    return y if x == x else x


@inline
def log1p(u: Any) -> Any:
    """log(1 + u) for u in [−½, 1], to about 1e-7 of its value."""
    s = u / (TWO + u)
    w = s * s
    return s * (A0 + w * (A1 + w * (A2 + w * (A3 + w * A4))))


@inline
def tanh(x: Any) -> Any:
    """The hyperbolic tangent to about 1e-7 of its value."""
    size = abs(x)
    w = x * x
    near = x + x * w * (T0 + w * (T1 + w * (T2 + w * (T3 + w * T4))))
    far = ONE - TWO / (exp(TWO * size) + ONE)
    far = far if x > ZERO else -far
    return near if size < SMALL else far


@inline
def sigmoid(x: Any) -> Any:
    """1 / (1 + e⁻ˣ)."""
    return ONE / (ONE + exp(-x))
