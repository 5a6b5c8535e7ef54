"""Triton kernels in Triton's interpreter, on CPU tensors: ``interpreted(kernel)[grid](*args, **constants)``.

Chosen per launch: no environment variable, nothing stays patched, kernels can be compiled in the same process. What the
interpreter (of Triton 3.8) lacks is put right for the time of a launch:

- Functions of `triton.language` that are written in Triton (`tl.sum`, `tl.zeros`) and own helpers were decorated before
  anyone asked for the interpreter: calling one runs its body.
- bfloat16 is kept as 16-bit integers, and arithmetic, casts and dot products are done on these bits
  (triton-lang/triton 10945, 11584, 11604): they are done in float32 and rounded to the nearest even number.
- A fused multiply-add of float32 rounds twice: here it is done in float64.
- Inline assembly is not supported: the few PTX instructions that the kernels use are evaluated here.

Not thread-safe. Kernels see no bounds: an unmasked load out of range reads the memory of the process.
"""

import contextlib
import re
import warnings

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction, KernelInterface

_functions = {}


def interpreted(kernel):
    """`kernel`, launched by the interpreter."""
    return _Launch(kernel)


class _Launch(KernelInterface):
    def __init__(self, kernel):
        self.kernel = kernel

    def run(self, *args, grid, warmup=False, **kwargs):
        with _interpreting(self.kernel), _patched(), np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All-NaN")  # numpy's word for the maximum of them
            return _function(self.kernel).run(*args, grid=grid, warmup=warmup, **kwargs)


def _function(kernel):
    # Not keyed by the kernel: its hash is computed from its globals, which are patched now.
    if kernel.fn not in _functions:
        _functions[kernel.fn] = InterpretedFunction(kernel.fn)
    return _functions[kernel.fn]


@contextlib.contextmanager
def _interpreting(kernel):
    scopes = [interpreter._patch_lang(kernel.fn), interpreter._patch_lang(tl.standard.sum.fn)]
    call = JITFunction.__call__
    JITFunction.__call__ = lambda self, *args, **kwargs: _function(self).rewrite()(*args, **kwargs)
    try:
        yield
    finally:
        JITFunction.__call__ = call
        for scope in reversed(scopes):
            scope.restore()


# ------------------------------------------------------------------------------------------------------------ bfloat16


def _is_bfloat16(x):
    return x.dtype.scalar == tl.bfloat16


def _widen(x):
    return (x.data.astype(np.uint32) << 16).view(np.float32) if _is_bfloat16(x) else x.data


def _narrow(values):
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(values), np.uint16(0x7FC0), rounded), tl.bfloat16)


_stock = {
    name: getattr(InterpreterBuilder, name)
    for name in (
        "binary_op",
        "unary_op",
        "cast_impl",
        "create_fp_to_fp",
        "create_dot",
        "create_fma",
        "create_inline_asm",
    )
}


def _binary_op(self, lhs, rhs, op):
    if not (_is_bfloat16(lhs) and _is_bfloat16(rhs)):
        return _stock["binary_op"](self, lhs, rhs, op)
    out = op(_widen(lhs), _widen(rhs))
    return TensorHandle(out, tl.int1) if out.dtype == bool else _narrow(out)


def _unary_op(self, x, op):
    return _narrow(op(_widen(x))) if _is_bfloat16(x) else _stock["unary_op"](self, x, op)


def _cast_impl(self, source, target, *_):
    to, of = target.scalar, source.dtype.scalar
    if _is_bfloat16(source) and to != tl.bfloat16:
        return TensorHandle(_widen(source).astype(interpreter._get_np_dtype(target)), to)
    if to == tl.bfloat16 and of != tl.bfloat16 and (of.is_int() or of.primitive_bitwidth != 8):
        return _narrow(source.data.astype(np.float32))
    return _stock["cast_impl"](self, source, target)


def _create_fp_to_fp(self, source, target, rounding):
    kinds = {source.dtype.scalar, target.scalar}
    if tl.bfloat16 in kinds and kinds <= {tl.bfloat16, tl.float16, tl.float32, tl.float64}:
        return _cast_impl(self, source, target)
    return _stock["create_fp_to_fp"](self, source, target, rounding)


def _create_dot(self, a, b, d, *rest):
    a, b = (TensorHandle(_widen(x), tl.float32) if _is_bfloat16(x) else x for x in (a, b))
    return _stock["create_dot"](self, a, b, d, *rest)


def _create_fma(self, x, y, z):
    if not _is_bfloat16(z):
        if z.dtype.scalar != tl.float32:
            return _stock["create_fma"](self, x, y, z)
        fused = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(fused.astype(np.float32), tl.float32)
    return _narrow(_widen(x) * _widen(y) + _widen(z))


# ---------------------------------------------------------------------------------------------------- inline assembly


def _prmt(a, b, selector):
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    out = np.zeros_like(selector)
    for byte in range(4):
        nibble = (selector >> np.uint32(4 * byte)) & np.uint32(15)
        value = (both >> (np.uint64(8) * (nibble & np.uint32(7)))) & np.uint64(255)
        value = np.where(nibble & 8, np.where(value & np.uint64(128), 255, 0), value)
        out |= value.astype(np.uint32) << np.uint32(8 * byte)
    return out


def _lop3(a, b, c, table):
    out = np.zeros_like(a)
    for index in range(8):
        if int(table.flat[0]) >> index & 1:
            out |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return out


def _halves(op):
    return lambda *args: op(*(x.view(np.float16) for x in args)).astype(np.float16).view(np.uint32)


_INSTRUCTIONS = {
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shr.u32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b,
    "mov.b32": lambda a: a,
    "sub.rn.f16x2": _halves(lambda a, b: a - b),
}


def _create_inline_asm(self, text, constraints, values, types, is_pure, pack):
    """PTX on 32-bit registers, one element at a time."""
    assert pack == 1
    operands = [np.ascontiguousarray(x.data).view(np.uint32) for x in values]
    shape = np.broadcast_shapes(*(x.shape for x in operands))
    outputs = constraints.count("=")
    registers = {f"${outputs + i}": np.ascontiguousarray(np.broadcast_to(x, shape)) for i, x in enumerate(operands)}
    for line in filter(None, (part.strip() for part in text.strip("{} \n").split(";"))):
        if line.startswith(".reg"):
            continue
        name, to, *arguments = re.split(r"[\s,]+", line)
        inputs = [
            registers[x] if x in registers else np.full(shape, int(x.removesuffix("U"), 0) & 0xFFFFFFFF, np.uint32)
            for x in arguments
        ]
        registers[to] = _INSTRUCTIONS[name](*inputs)
    results = [TensorHandle(registers[f"${i}"].view(np.int32), tl.int32) for i in range(outputs)]
    return _Results(results)


class _Results:
    """What the frontend asks for the results of inline assembly."""

    def __init__(self, results):
        self.results = results

    def get_result(self, index):
        return self.results[index]


@contextlib.contextmanager
def _patched():
    own = globals()
    for name in _stock:
        setattr(InterpreterBuilder, name, own[f"_{name}"])
    InterpreterBuilder.get_bf16 = lambda self, value: _narrow(np.array([value], np.float32))
    try:
        yield
    finally:
        for name, function in _stock.items():
            setattr(InterpreterBuilder, name, function)
        del InterpreterBuilder.get_bf16
