"""Repairs of the interpreter's arithmetic: conversions, bf16 and fp8 operators, dots, comparisons, sums.

Each function changes one thing on Triton's InterpreterBuilder (or beside it) and is called only where its probe saw the
defect. bf16 and fp8 tensors stay what they are in the interpreter, arrays of codes: an operator widens them exactly to
fp32, calculates there and rounds once, which is what a GPU does with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from triton.language import core as tlc
from triton.runtime import interpreter as base

from m3check.interpret import formats

Builder = base.InterpreterBuilder
Handle = base.TensorHandle

_converted: set[str] = set()  # the types whose conversions are ours
_BOOLEAN = frozenset({np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal})


def _is_codes(handle: Any) -> bool:
    return handle.dtype.scalar.name in formats.NARROW and handle.data.dtype != np.bool_


def _wide(handle: Any) -> Any:
    return formats.decode(handle.data, handle.dtype.scalar.name) if _is_codes(handle) else handle.data


# -- conversions ------------------------------------------------------------------------------------------------------


def repair_conversions(*names: str) -> None:
    """Conversions from and to these types round to the nearest even (or truncate on demand) and keep NaN and infinity."""
    _converted.update(names)
    original = base._convert_float
    if getattr(original, "is_repair", False):
        return
    known = formats.NARROW | formats.NUMPY.keys()

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        pair = {source.name, target.name}
        if not pair <= known or not pair & _converted:
            return original(data, source, target, rounding)
        numbers = data.view(formats.NUMPY[source.name]) if source.name in formats.NUMPY else data
        out = formats.convert(numbers, source.name, target.name, truncate=rounding == base._ir.ROUNDING_MODE.RTZ)
        return out.view(f"u{out.dtype.itemsize}")

    convert_float.is_repair = True  # type: ignore[attr-defined]
    base._convert_float = convert_float


def repair_bf16_casts() -> None:
    """Casts between bf16 and integers, fp16 and fp64 convert numbers, not codes."""
    original = Builder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if target.name in formats.NARROW and source.name not in formats.NARROW:
            return Handle(formats.encode(src.data.astype(np.float32), target.name), target)
        if _is_codes(src) and source != target:
            if target.name in formats.NARROW:
                return Handle(formats.convert(src.data, source.name, target.name), target)
            return Handle(_wide(src).astype(base._get_np_dtype(target)), target)
        return original(self, src, dst_type)

    Builder.cast_impl = cast_impl


def repair_unsigned_inversion() -> None:
    """`~` of unsigned numbers, for which Triton asks NumPy to put -1 into an unsigned type."""
    original = Builder.get_all_ones_value

    def get_all_ones_value(self: Any, type: Any) -> Any:
        numbers = base._get_np_dtype(type)
        if np.issubdtype(numbers, np.unsignedinteger):
            return Handle(np.full(1, np.iinfo(numbers).max, dtype=numbers), type.scalar)
        return original(self, type)

    Builder.get_all_ones_value = get_all_ones_value


def repair_bf16_constants() -> None:
    """A Python number may become a bf16 constant."""

    def get_bf16(self: Any, value: float) -> Any:
        return Handle(formats.fp32_to_bf16(np.array([value], dtype=np.float32)), tlc.bfloat16)

    Builder.get_bf16 = get_bf16


# -- operators --------------------------------------------------------------------------------------------------------


def repair_comparisons() -> None:
    """A comparison gives booleans that say so: the interpreter labels them with the type of the left operand."""
    original = Builder.binary_op

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Callable[..., Any]) -> Any:
        out = original(self, lhs, rhs, op)
        return Handle(out.data, tlc.int1) if op in _BOOLEAN else out

    Builder.binary_op = binary_op


def repair_operators() -> None:
    """Operators on bf16 and fp8 calculate with the numbers, not with their codes."""
    binary, unary, ternary, fma = Builder.binary_op, Builder.unary_op, Builder.ternary_op, Builder.create_fma

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Callable[..., Any]) -> Any:
        if not _is_codes(lhs):
            return binary(self, lhs, rhs, op)
        with np.errstate(all="ignore"):
            output = op(_wide(lhs), _wide(rhs))
        if op in _BOOLEAN:
            return Handle(output, tlc.int1)
        kind = lhs.dtype.scalar
        return Handle(formats.encode(output, kind.name), kind)

    def unary_op(self: Any, arg: Any, op: Callable[..., Any]) -> Any:
        if not _is_codes(arg):
            return unary(self, arg, op)
        kind = arg.dtype.scalar
        return Handle(formats.encode(op(_wide(arg)), kind.name), kind)

    def ternary_op(self: Any, lhs: Any, rhs: Any, other: Any, op: Callable[..., Any]) -> Any:
        if op is np.where or not _is_codes(other):
            return ternary(self, lhs, rhs, other, op)
        kind = other.dtype.scalar
        return Handle(formats.encode(op(_wide(lhs), _wide(rhs), _wide(other)), kind.name), kind)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if not _is_codes(z):
            return fma(self, x, y, z)
        kind = z.dtype.scalar
        product = np.multiply(_wide(x), _wide(y), dtype=np.float64)  # exact: 16 bits of mantissa
        return Handle(formats.encode(product + _wide(z), kind.name), kind)

    Builder.binary_op, Builder.unary_op = binary_op, unary_op
    Builder.ternary_op, Builder.create_fma = ternary_op, create_fma


def repair_sum() -> None:
    """A sum of bf16 is a tree of bf16 additions, each rounded, as on a GPU."""
    original = base.ReduceOps.sum

    def tree_sum(self: Any, tensor: Any) -> Any:
        if not _is_codes(tensor.handle):
            return original(self, tensor)
        kind = tensor.dtype
        axis = self.axis
        data = tensor.handle.data if axis is not None else tensor.handle.data.reshape(-1)
        data = np.moveaxis(data, axis if axis is not None else 0, -1)
        while data.shape[-1] > 1:
            half = data.shape[-1] // 2
            wide = formats.decode(data, kind.name)
            data = formats.encode(wide[..., :half] + wide[..., half:], kind.name)
        if self.keep_dims:
            shape = [1] * tensor.handle.data.ndim if axis is None else list(tensor.handle.data.shape)
            shape[axis or 0] = 1
            return self.to_tensor(data.reshape(shape), kind)
        total = data[..., 0]
        return self.to_tensor(total if total.shape else total.item(), kind)

    base.ReduceOps.sum = tree_sum


def repair_number_extremes() -> None:
    """tl.maximum and tl.minimum ignore a NaN unless told to propagate it."""
    Builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    Builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    original = Builder.create_clampf

    def create_clampf(self: Any, arg: Any, lo: Any, hi: Any, propagate_nans: Any) -> Any:
        if propagate_nans == base._ir.PROPAGATE_NAN.NONE:
            return self.binary_op(self.binary_op(arg, lo, np.fmax), hi, np.fmin)
        return original(self, arg, lo, hi, propagate_nans)

    Builder.create_clampf = create_clampf


def repair_dot() -> None:
    """tl.dot of bf16 and fp8 multiplies numbers; products of narrow types are summed in fp32."""
    original = Builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        if not (_is_codes(a) or _is_codes(b)):
            return original(self, a, b, d, *precision)
        with np.errstate(all="ignore"):
            product = np.matmul(_wide(a).astype(np.float32, copy=False), _wide(b).astype(np.float32, copy=False))
            product += _wide(d)
        kind = d.dtype.scalar
        return Handle(
            formats.encode(product, kind.name) if _is_codes(d) else product.astype(d.data.dtype, copy=False), kind
        )

    Builder.create_dot = create_dot
