"""The interpreter's bookkeeping, remembered instead of repeated; no number changes.

Nine tenths of an interpreted kernel's time go into Python objects that describe types: a shape is a tuple of constexpr
with a type of its own, made anew for every result. Types do not change, so here they are made once. Each entry says what
it relies on; an entry that does not fit this Triton is left out.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language import core, semantic
from triton.runtime import interpreter as base

from m3check.interpret import memory


def install() -> dict[str, str]:
    """Install what fits; the reasons why others were left out, by name."""
    left: dict[str, str] = {}
    for entry in ENTRIES:
        try:
            entry()
        except (AttributeError, TypeError, AssertionError) as error:
            left[entry.__name__] = str(error)
    return left


def _no_discarded_assertions() -> None:
    """Integer operators calculate an overflow condition in int64, which device_assert drops unless options say debug."""
    options = base.interpreter_builder.options
    if not options.debug:
        base.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def _tensor_parts() -> None:
    """All of a tensor but its handle follows from its type object."""
    original = tl.tensor.__init__

    def init(self: Any, handle: Any, type: Any) -> None:
        parts = type.__dict__.get("_tensor_parts")
        if parts is None:
            original(self, handle, type)
            type._tensor_parts = {name: value for name, value in vars(self).items() if name != "handle"}
        else:
            self.__dict__.update(parts)
            self.handle = handle

    tl.tensor.__init__ = init


def _block_types() -> None:
    """One object for each element type and shape."""
    original = core.block_type.__init__
    known: dict[Any, Any] = {}
    constexpr = core.constexpr

    def new(cls: Any, element_ty: Any, shape: Any) -> Any:
        key = (cls, id(element_ty), *[s.value if isinstance(s, constexpr) else s for s in shape])
        found = known.get(key)
        if found is None:
            found = object.__new__(cls)
            original(found, element_ty, shape)
            found.element_ty = element_ty  # keeps the id in the key alive
            known[key] = found
        return found

    assert core.block_type.__new__ is object.__new__, "block_type makes its own objects"
    core.block_type.__new__ = new
    core.block_type.__init__ = lambda self, element_ty, shape: None


def _dtype_answers() -> None:
    """A type equals itself; whether it is an integer is looked up in a set."""
    for kind in (core.dtype, core.block_type, core.pointer_type):
        kind.__eq__ = _same_or(kind.__eq__)
    signed, unsigned = frozenset(core.dtype.SINT_TYPES), frozenset(core.dtype.UINT_TYPES)
    integers, floats = signed | unsigned, frozenset(core.dtype.FP_TYPES)
    core.dtype.is_int = lambda self: self.name in integers
    core.dtype.is_int_signed = lambda self: self.name in signed
    core.dtype.is_int_unsigned = lambda self: self.name in unsigned
    core.dtype.is_floating = lambda self: self.name in floats


def _same_or(compare: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    return lambda self, other: self is other or compare(self, other)


def _promotions() -> None:
    """The type in which two scalar types meet depends on their names only."""
    original = semantic.TritonSemantic.computation_type_impl
    known: dict[Any, Any] = {}

    def computation_type_impl(self: Any, a: Any, a_scalar: bool, b: Any, b_scalar: bool, div_or_mod: bool) -> Any:
        key = (a.name, a_scalar, b.name, b_scalar, div_or_mod)
        if key not in known:
            known[key] = original(self, a, a_scalar, b, b_scalar, div_or_mod)
        return known[key]

    semantic.TritonSemantic.computation_type_impl = computation_type_impl


def _operands() -> None:
    """Operands of a binary operator meet in one type and shape; numpy stretches them itself, so no copies are made.

    Callers of this method build elementwise operators only. What is not an everyday case is left to Triton.
    """
    Semantic = semantic.TritonSemantic
    original = Semantic.binary_op_type_checking_impl
    shapes: dict[tuple[int, int], tuple[Any, Any, Any, Any]] = {}
    scalar_types: dict[tuple[type, Any], Any] = {}
    names = list(inspect.signature(original).parameters)
    assert names == ["self", "lhs", "rhs", "allow_lhs_ptr", "allow_rhs_ptr", "arithmetic_check", "div_or_mod"], names

    def stretched(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        left, right = lhs.type, rhs.type
        if left is right:
            return lhs, rhs
        pair = shapes.get((id(left), id(right)))
        if pair is None:
            a, b = self.broadcast_impl_value(lhs, rhs)
            shapes[id(left), id(right)] = a.type, b.type, left, right  # the latter keep their ids alive
            return a, b
        return (
            lhs if pair[0] is left else tl.tensor(lhs.handle, pair[0]),
            rhs if pair[1] is right else tl.tensor(rhs.handle, pair[1]),
        )

    def meet(
        self: Any,
        lhs: Any,
        rhs: Any,
        allow_lhs_ptr: bool = False,
        allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True,
        div_or_mod: bool = False,
    ) -> Any:
        left_number, right_number = type(lhs) in _NUMBERS, type(rhs) in _NUMBERS
        if not arithmetic_check or (left_number and right_number):
            return original(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)
        if left_number or right_number:
            number = lhs if left_number else rhs
            kind = scalar_types.get((type(number), number))
            if kind is None:
                kind = scalar_types[type(number), number] = self.to_tensor(number).dtype
            other = (rhs if left_number else lhs).dtype
            if other.is_ptr():
                return original(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)
            a, b = (kind, other) if left_number else (other, kind)
            meeting = self.computation_type_impl(a, left_number, b, right_number, div_or_mod)
            if meeting.is_int() and not meeting.get_int_min_value() <= number <= meeting.get_int_max_value():
                return original(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)
            lhs = self.scalar_constant(lhs, meeting) if left_number else lhs
            rhs = self.scalar_constant(rhs, meeting) if right_number else rhs
        else:
            a, b = lhs.dtype, rhs.dtype
            if a.is_ptr() or b.is_ptr():
                self.check_ptr_type_impl(a, b, allow_lhs_ptr)
                self.check_ptr_type_impl(b, a, allow_rhs_ptr)
                return stretched(self, lhs, rhs)
            meeting = self.computation_type_impl(a, False, b, False, div_or_mod)
        if lhs.dtype is not meeting:
            lhs = self.cast(lhs, meeting)
        if rhs.dtype is not meeting:
            rhs = self.cast(rhs, meeting)
        return stretched(self, lhs, rhs)

    Semantic.binary_op_type_checking_impl = meet


def _unwrapping() -> None:
    """Most things that might be a constexpr are not."""
    original = core._unwrap_if_constexpr
    plain = _NUMBERS | {str, type(None), tl.tensor, core.dtype, core.block_type, core.pointer_type}
    core._unwrap_if_constexpr = lambda o: o if type(o) in plain else original(o)


def _axes() -> None:
    """numpy's expand_dims and broadcast_to check what Triton has checked already."""

    def create_expand_dims(self: Any, arg: Any, axis: int) -> Any:
        data = arg.data
        shape = data.shape
        return base.TensorHandle(data.reshape(*shape[:axis], 1, *shape[axis:]), arg.dtype.scalar)

    base.InterpreterBuilder.create_expand_dims = create_expand_dims


def _numpy_types() -> None:
    """The numpy type of a Triton type."""
    original = base._get_np_dtype

    def get_np_dtype(kind: Any) -> Any:
        found = kind.__dict__.get("_numpy_type")
        if found is None:
            found = kind._numpy_type = original(kind)
        return found

    base._get_np_dtype = get_np_dtype


def _handle_sizes() -> None:
    """How many bytes an element of a Triton type may have at most in numpy."""
    original = base._validate_np_data_size

    def fits(array: Any, kind: Any) -> bool:
        limit = kind.__dict__.get("_numpy_bytes")
        if limit is None:
            limit = 1 << 30 if isinstance(kind, core.pointer_type) else max(8, kind.primitive_bitwidth) // 8
            kind._numpy_bytes = limit
        return bool(array.itemsize <= limit)

    assert original(np.zeros(1, np.int32), tl.int32)
    assert not original(np.zeros(1, np.int32), tl.int16)
    base._validate_np_data_size = fits


def _argument_types() -> None:
    """The type that a name such as `*fp32` stands for."""
    original = tl.str_to_ty
    known: dict[str, Any] = {}

    def str_to_ty(name: str, c: Any) -> Any:
        if c is not None:
            return original(name, c)
        if name not in known:
            known[name] = original(name, c)
        return known[name]

    tl.str_to_ty = str_to_ty


_NUMBERS = frozenset({int, float, bool})
ENTRIES = (
    _no_discarded_assertions,
    _tensor_parts,
    _block_types,
    _dtype_answers,
    _promotions,
    _operands,
    _unwrapping,
    _axes,
    _numpy_types,
    _argument_types,
    _handle_sizes,
    memory.read_whole_tiles,
)
