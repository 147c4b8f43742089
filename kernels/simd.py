"""Shared code of the numba kernels: element types, vectorizable elementary functions, threads.

Kernels take tensors as typed pointers: an address, and a scalar whose NumPy type is the element type. Unboxing arrays would take
longer than the computation on small tensors. bfloat16 and float16, which numba lacks, are represented by the bits of a uint16 and
an int16; ``widen`` and ``narrow`` convert. The elementary functions are short polynomials, because a call into libm would prevent
LLVM from vectorizing the loop.
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

from .machine_code import njit_with_cache

__all__ = [
    "BLOCK",
    "TypedPointer",
    "element_type",
    "exp",
    "exp_of_negative",
    "expm1_of_negative",
    "helper",
    "inline",
    "log1p",
    "narrow",
    "parallel",
    "pointer",
    "restride_like",
    "sigmoid",
    "tanh",
    "threads",
    "total",
    "typed_pointer",
    "widen",
]

TypedPointer = tuple[int, Any]
"""Address of the first element, and a scalar of the element type."""
BLOCK = 8192  # elements per task; one partial sum per block, so that results do not depend on the number of threads

# fastmath without nnan and ninf: sums may be contracted and reassociated, but NaN and infinities are handled.
_RELAXED = {"contract", "reassoc", "nsz", "arcp"}


_PARALLEL_FOR, _LOOP = "numba_parallel_for", "dfkd_fast_parallel_for"


def _loop_module() -> str:
    """LLVM module with a replacement for numba's parallel-for: with one thread, it runs the loop without the threading layer.

    In a forked child the worker threads do not exist, and GNU OpenMP terminates the process that tries to use them.
    """
    pointer, integer = ir.IntType(8).as_pointer(), ir.IntType(64)
    module = ir.Module()
    parameters = [*5 * [pointer], *3 * [integer]]  # loop, arguments, shapes, steps, data; number of dimensions, arguments, threads
    parallel_for = ir.Function(module, ir.FunctionType(ir.VoidType(), parameters), _PARALLEL_FOR)
    function = ir.Function(module, parallel_for.function_type, _LOOP)
    # If the loop were inlined here, there would be two copies of it, which might round differently.
    function.attributes.add("noinline")
    function.attributes.add("optnone")
    builder = ir.IRBuilder(function.append_basic_block())
    with builder.if_else(builder.icmp_unsigned("==", function.args[-1], integer(1))) as (one_thread, several_threads):
        with one_thread:
            kind = ir.FunctionType(ir.VoidType(), 4 * [pointer])
            builder.call(builder.bitcast(function.args[0], kind.as_pointer()), function.args[1:5])
        with several_threads:
            builder.call(parallel_for, function.args)
    builder.ret_void()
    return str(module)


_LOOP_MODULE = _loop_module()


class _KernelLibrary(JITCodeLibrary):  # type: ignore[misc]
    """Code library of one kernel, in which the copies of helper functions have internal linkage.

    numba links a copy of the loop and of every helper into the kernel's module and optimizes it again, but leaves the symbols
    public. The process that compiles a kernel has also compiled the helpers separately, and the linker uses those; a process
    that loads the kernel from the cache uses the copies. With ``_RELAXED`` arithmetic the two may round differently.
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
    """numba's compiler pipeline with ``_KernelLibrary`` as code library."""

    def compile_extra(self, func: Callable[..., Any]) -> Any:
        self.state.library = _KernelLibrary(self.state.targetctx.codegen(), func.__qualname__)
        self.state.library.enable_object_caching()
        return super().compile_extra(func)


def parallel(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a kernel whose ``prange`` loop runs on all threads, with the on-disk cache.

    Compiled and cached kernels give bitwise the same results.
    """
    options: dict[str, Any] = {
        "parallel": True,
        "fastmath": _RELAXED,
        "error_model": "numpy",
        "nogil": True,
        "pipeline_class": _KernelCompiler,
    }
    # numba invalidates its cache when the kernel's own file changes, but not when this one does, whose functions are inlined.
    return njit_with_cache(partial(numba.njit, kernel, **options), Path(__file__))


def inline(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function that is inlined into kernels; operations may be contracted, but not reordered."""
    return numba.njit(function, fastmath={"contract"}, error_model="numpy", forceinline=True)


def helper(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function that is called from kernels."""
    return numba.njit(function, error_model="numpy")


@helper
def total(partial: Any) -> float:
    """Sum the partial sums in order; numba parallelizes ``partial.sum()``, whose result depends on the number of threads."""
    result = 0.0
    for i in range(len(partial)):
        result += partial[i]
    return result


class _Threads:
    """Context manager around kernel calls: uses as many threads as PyTorch, and allows one parallel kernel at a time.

    Not every threading layer supports concurrent parallel kernels. In a forked child, such as a DataLoader worker, the parent's
    threads do not exist: kernels run on the calling thread, with the same results.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._threads_lost = False
        if hasattr(os, "register_at_fork"):
            # No kernel runs or is compiled during a fork: the child would wait for its lock forever.
            os.register_at_fork(before=self._lock.acquire, after_in_parent=self._lock.release, after_in_child=self._forked)

    def __enter__(self) -> None:
        self._lock.acquire()
        num_threads = torch.get_num_threads()
        numba.set_num_threads(1 if self._threads_lost else min(num_threads, numba.config.NUMBA_NUM_THREADS))
        if torch.get_num_threads() != num_threads:
            # Launching numba's threads (once per process) changes OpenMP's number of threads globally.
            torch.set_num_threads(num_threads)

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _forked(self) -> None:
        try:
            numba.threading_layer()
        except ValueError:  # no threads have been launched yet, so the child can launch its own
            self._threads_lost = False
        else:
            self._threads_lost = True
        self._lock.release()


threads = _Threads()


def typed_pointer(tensor: Tensor) -> TypedPointer:
    """Return the address of a tensor's first element and a scalar of its element type."""
    return tensor.data_ptr(), _ELEMENT_TYPES[tensor.dtype]


def element_type(dtype: torch.dtype) -> Any:
    """Return a scalar of the NumPy type that represents elements of a dtype in kernels."""
    return _ELEMENT_TYPES[dtype]


def restride_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a dense tensor with the strides of ``torch.empty_like(other)``; copies only if they differ."""
    if other.is_contiguous() and tensor.is_contiguous():
        return tensor
    expected = torch.empty_like(other, dtype=tensor.dtype)
    return tensor if tensor.stride() == expected.stride() else expected.copy_(tensor)


_ELEMENT_TYPES = {
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
def pointer(_: Any, typed: Any) -> Any:
    """Convert a typed pointer to a C pointer, which can be indexed."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(builder.extract_value(arguments[0], 0), context.get_value_type(signature.return_type))

    return types.CPointer(typed[1])(typed), emit


@intrinsic
def widen(_: Any, x: Any) -> Any:
    """Convert an element to float32: from float32, bfloat16 (uint16), float16 (int16) or int8."""

    def emit(__: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (value,) = arguments
        if signature.args[0] == types.uint16:
            return builder.bitcast(builder.shl(builder.zext(value, I32), I32(16)), F32)
        if signature.args[0] == types.int16:
            return builder.fpext(builder.bitcast(value, ir.HalfType()), F32)
        return builder.sitofp(value, F32) if signature.args[0] == types.int8 else value

    return types.float32(x), emit


@intrinsic
def narrow(_: Any, x: Any, typed: Any) -> Any:
    """Convert a float32 value to the element type of a typed pointer, rounding to nearest even."""

    def emit(__: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = arguments[0]
        if signature.return_type == types.int16:
            return builder.bitcast(builder.fptrunc(value, ir.HalfType()), I16)
        if signature.return_type != types.uint16:
            return value
        word = builder.bitcast(value, I32)
        odd = builder.and_(builder.lshr(word, I32(16)), I32(1))
        rounded = builder.lshr(builder.add(builder.add(word, I32(0x7FFF)), odd), I32(16))
        result = builder.select(builder.fcmp_unordered("uno", value, value), I32(0x7FC0), rounded)
        return builder.trunc(result, I16)

    return typed[1](types.float32, typed), emit


@intrinsic
def exp2_of_integer(_: Any, n: Any) -> Any:
    """2ⁿ for an integral float32 n in [−126, 127]."""

    def emit(__: Any, builder: Any, ___: Any, arguments: Any) -> Any:
        exponent = builder.add(builder.fptosi(arguments[0], I32), I32(127))
        return builder.bitcast(builder.shl(exponent, I32(23)), F32)

    return types.float32(types.float32), emit


@intrinsic
def rint(_: Any, x: Any) -> Any:
    """Round to the nearest integer."""

    def emit(__: Any, builder: Any, ___: Any, arguments: Any) -> Any:
        return builder.call(builder.module.declare_intrinsic("llvm.rint", [F32]), arguments)

    return types.float32(types.float32), emit


# float32 constants: a Python float would promote the arithmetic to float64.
ZERO, HALF, ONE, TWO = (cast("Any", np.float32(value)) for value in (0, 0.5, 1, 2))
EXP_MIN, EXP_MAX = np.float32(-87.3), np.float32(88)  # outside this range 2ⁿ is not a normal float32 number
LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.1219444005469057e-4)  # n · LN2_HIGH is exact
# eʳ = 1 + r + r² (E2 + E3 r + …) for |r| ≤ ½ log 2, error 1e-8
E2, E3, E4, E5, E6 = (np.float32(c) for c in (0.5, 0.16666577026, 0.04166655466, 0.00836317307, 0.00139261761))
# 2 atanh(s) / s in s² over |s| ≤ 1/3, and (tanh(x) / x − 1) / x² in x² over x ≤ 0.55: interpolated at Chebyshev
# nodes, relative error 4e-9.
A0, A1, A2, A3, A4 = (np.float32(c) for c in (2.00000000768, 0.6666632164, 0.4002459523, 0.2796515776, 0.2815777829))
T0, T1, T2, T3, T4 = (np.float32(c) for c in (-0.33333332008, 0.13333113729, -0.05390942883, 0.02130938867, -0.00661022784))
TANH_SERIES_MAX = np.float32(0.55)


@inline
def exp_of_negative(x: Any) -> Any:
    """eˣ for x ≤ 88 with relative error 1e-7; 0 below −87.3."""
    n = rint(x * LOG2_E)
    n = n if n > np.float32(-126) else np.float32(-126)  # also for NaN, for which 2ⁿ must be defined
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    y = (ONE + r * (ONE + r * (E2 + r * (E3 + r * (E4 + r * (E5 + r * E6)))))) * exp2_of_integer(n)
    return ZERO if x < EXP_MIN else y


@inline
def expm1_of_negative(x: Any) -> Any:
    """eˣ − 1 for x ≤ 88 with relative error 1e-7; −1 below −87.3."""
    n = rint(x * LOG2_E)
    n = n if n > np.float32(-126) else np.float32(-126)
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    power = exp2_of_integer(n)
    y = power * (r * (ONE + r * (E2 + r * (E3 + r * (E4 + r * (E5 + r * E6)))))) + (power - ONE)
    return -ONE if x < EXP_MIN else y


@inline
def exp(x: Any) -> Any:
    """eˣ with relative error 1e-7; 0 below −87.3, infinity above 88."""
    y = exp_of_negative(x if x < EXP_MAX else EXP_MAX)
    y = np.float32(np.inf) if x > EXP_MAX else y
    return y if x == x else x


@inline
def log1p(u: Any) -> Any:
    """log(1 + u) for u in [−½, 1] with relative error 1e-7."""
    s = u / (TWO + u)
    w = s * s
    return s * (A0 + w * (A1 + w * (A2 + w * (A3 + w * A4))))


@inline
def tanh(x: Any) -> Any:
    """Hyperbolic tangent with relative error 1e-7."""
    size = abs(x)
    w = x * x
    near = x + x * w * (T0 + w * (T1 + w * (T2 + w * (T3 + w * T4))))
    far = ONE - TWO / (exp(TWO * size) + ONE)
    far = far if x > ZERO else -far
    return near if size < TANH_SERIES_MAX else far


@inline
def sigmoid(x: Any) -> Any:
    """1 / (1 + e⁻ˣ)."""
    return ONE / (ONE + exp(-x))
