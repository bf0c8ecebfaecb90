# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, operator, index"
"""Tiny kernels that show a defect of Triton's interpreter: each probe runs one and says what came out wrong, or None."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


@triton.jit
def _cast(source, target, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(target + at, tl.load(source + at).to(target.dtype.element_ty))


@triton.jit
def _operators(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(a + at)
    y = tl.load(b + at)
    tl.store(out + at, x + y)
    tl.store(out + N + at, x * y)
    tl.store(out + 2 * N + at, x - y)
    tl.store(out + 3 * N + at, tl.maximum(x, y))
    tl.store(out + 4 * N + at, tl.where(x < y, x, y))
    tl.store(out + 5 * N + at, -x)
    tl.store(out + 6 * N + at, tl.fma(x, y, x))
    tl.store(out + 7 * N + at, tl.clamp(x, y, y))


@triton.jit
def _constants(out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.full((N,), 1.5, dtype=tl.bfloat16))


@triton.jit
def _sum(a, out, N: tl.constexpr):
    tl.store(out, tl.sum(tl.load(a + tl.arange(0, N)), axis=0))


@triton.jit
def _dot(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at), out_dtype=tl.float32))


@triton.jit
def _masked(a, out, limit, N: tl.constexpr):
    at = tl.arange(0, N)
    inside = (at < limit) & (limit > 0)
    tl.store(out + at, tl.load(a + at, mask=inside, other=0.0), mask=inside)


@triton.jit
def _compared(a, b, out, N: tl.constexpr):
    both = (tl.load(a) > tl.load(b)) & (tl.arange(0, N) < 2)
    tl.store(out + tl.arange(0, N), both.to(out.dtype.element_ty))


@triton.jit
def _inverted(a, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, ~tl.load(a + at).to(out.dtype.element_ty, bitcast=True))


@triton.jit
def _extremes(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.maximum(tl.load(a + at), tl.load(b + at)))
    tl.store(out + N + at, tl.minimum(tl.load(a + at), tl.load(b + at)))


@triton.jit
def _counted(a, out):
    total = 0
    for i in range(tl.load(a)):
        total += i
    tl.store(out, total)


@triton.jit
def _flagged(flag, out):
    tl.store(out, tl.where(flag, 1, 2))


@triton.jit
def _dependent(out):
    tl.extra.cuda.gdc_wait()
    tl.store(out, 1)
    tl.extra.cuda.gdc_launch_dependents()


@triton.autotune([triton.Config({"N": 4}), triton.Config({"N": 8}), triton.Config({"N": 2})], key=[])
@triton.jit
def _tuned(out, N: tl.constexpr):
    tl.static_assert(N > 2)
    tl.store(out, N)


def _differs(what: str, got: torch.Tensor, want: Any) -> str | None:
    want = torch.as_tensor(want, dtype=torch.float64)
    if torch.allclose(got.double(), want, rtol=0, atol=0, equal_nan=True):
        return None
    at = int((~torch.isclose(got.double(), want, rtol=0, atol=0, equal_nan=True)).nonzero()[0])
    return f"{what} gave {got[at].item():g} for {want[at].item():g}"


def bf16_rounding() -> str | None:
    """Fp32 to bf16 rounds to the nearest even; NaN stays NaN."""
    bits = np.array([0x3F808001, 0x3F808000, 0x3F818000, 0x7F7FFFFF, 0xBF80FFFF, 0x7F800001, 0x00008001, 0x7F800000])
    source = torch.from_numpy(bits.astype(np.uint32).view(np.float32))
    out = torch.empty(8, dtype=torch.bfloat16)
    _cast[(1,)](source, out, 8)
    return _differs("fp32 to bf16", out, source.to(torch.bfloat16).double())


def fp8_conversions() -> str | None:
    """All codes decode rightly; carries, subnormals and NaN survive encoding."""
    codes = torch.arange(256, dtype=torch.uint8)
    wide = torch.empty(256)
    for kind in FP8:
        _cast[(1,)](codes.view(kind), wide, 256)
        if wrong := _differs(f"{kind} to fp32", wide, codes.view(kind).double()):
            return wrong
        values = codes.view(kind).float().nan_to_num(0, 0, 0)
        middle = values * 1.0625  # odd numbers of sixteenths: ties and carries
        middle = torch.where(middle.abs() > torch.finfo(kind).max, values, middle)
        middle[0] = float("nan")
        out = torch.empty(256, dtype=kind)
        _cast[(1,)](middle, out, 256)
        if wrong := _differs(f"fp32 to {kind}", out, middle.to(kind).double()):
            return wrong
    return None


def fnuz_types() -> str | None:
    """Pointers to the fnuz dialects are understood."""
    for kind in FP8[2:]:
        _cast[(1,)](torch.zeros(4, dtype=kind), torch.empty(4, dtype=kind), 4)
    return None


def bf16_casts() -> str | None:
    """Integers, fp16 and fp64 convert to and from bf16 as numbers."""
    numbers = torch.tensor([1.0, -2.0, 3.0, 256.0])
    for kind in (torch.int32, torch.float16, torch.float64):
        for source, target in ((torch.bfloat16, kind), (kind, torch.bfloat16)):
            out = torch.empty(4, dtype=target)
            _cast[(1,)](numbers.to(source), out, 4)
            if wrong := _differs(f"{source} to {target}", out, numbers.double()):
                return wrong
    return None


def bf16_constants() -> str | None:
    """tl.full makes bf16."""
    out = torch.empty(2, dtype=torch.bfloat16)
    _constants[(1,)](out, 2)
    return _differs("tl.full(1.5, bf16)", out, [1.5, 1.5])


def bf16_operators() -> str | None:
    """Arithmetic, comparison and selection of bf16."""
    a, b = torch.tensor([1.0, -2.0, 3.0, -0.5]).bfloat16(), torch.tensor([2.0, -3.0, -1.0, 4.0]).bfloat16()
    out = torch.empty(8, 4, dtype=torch.bfloat16)
    _operators[(1,)](a, b, out, 4)
    want = torch.stack([a + b, a * b, a - b, torch.maximum(a, b), torch.minimum(a, b), -a, a * b + a, b])
    return _differs("arithmetic of bf16", out.flatten(), want.flatten().double())


def bf16_sum() -> str | None:
    """tl.sum of bf16."""
    a, out = torch.tensor([1.0, 2.0, -4.0, 8.0]).bfloat16(), torch.empty(1, dtype=torch.bfloat16)
    _sum[(1,)](a, out, 4)
    return _differs("tl.sum of bf16", out, [7.0])


def narrow_dot() -> str | None:
    """tl.dot of bf16 and of the codes of fp8."""
    for kind in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        a = torch.arange(-128, 128).reshape(16, 16).float().div(4).to(kind)
        b = torch.arange(256).remainder(7).sub(3).reshape(16, 16).float().to(kind)
        out = torch.empty(16, 16)
        _dot[(1,)](a, b, out, 16)
        if wrong := _differs(f"tl.dot of {kind}", out.flatten(), (a.double() @ b.double()).flatten()):
            return wrong
    a = torch.full((16, 16), float("nan")).to(torch.float8_e4m3fn)
    _dot[(1,)](a, a, out, 16)
    return _differs("tl.dot of fp8 NaN", out.flatten(), torch.full((256,), torch.nan))


def comparisons() -> str | None:
    """The outcome of comparing scalars is a boolean: it meets other booleans, and can be cast to any type."""
    for source, target in itertools.product((torch.int32, torch.float32, torch.bfloat16), repeat=2):
        out = torch.empty(4, dtype=target)
        _compared[(1,)](torch.tensor([2]).to(source), torch.tensor([1]).to(source), out, 4)
        if wrong := _differs(f"comparing {source}", out, [1.0, 1.0, 0.0, 0.0]):
            return wrong
    return None


def masks() -> str | None:
    """A mask made of a vector and a scalar."""
    out = torch.zeros(4)
    _masked[(1,)](torch.arange(1.0, 5.0), out, 3, 4)
    return _differs("a mask", out, [1.0, 2.0, 3.0, 0.0])


def unsigned_inversion() -> str | None:
    """~ of unsigned numbers."""
    out = torch.empty(2, dtype=torch.uint32)
    _inverted[(1,)](torch.tensor([0, -6], dtype=torch.int32), out, 2)
    return _differs("~ of uint32", out.to(torch.int64), [4294967295, 5])


def number_extremes() -> str | None:
    """tl.maximum and tl.minimum ignore NaN."""
    out = torch.empty(4)
    _extremes[(1,)](torch.tensor([torch.nan, 1.0]), torch.tensor([2.0, torch.nan]), out, 2)
    return _differs("tl.maximum/minimum with NaN", out, [2.0, 1.0, 2.0, 1.0])


def scalar_index() -> str | None:
    """A loop may run to a loaded number."""
    out = torch.empty(1, dtype=torch.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        _counted[(1,)](torch.tensor([4], dtype=torch.int32), out)
    return _differs("range(4)", out, [6])


@triton.jit
def _annotated(n: tl.int64, out):
    tl.store(out, n * n)


def annotated_arguments() -> str | None:
    """An argument is as wide as the kernel says."""
    out = torch.empty(1, dtype=torch.int64)
    _annotated[(1,)](1 << 20, out)
    return _differs("n * n of an n: tl.int64", out, [1 << 40])


def boolean_arguments() -> str | None:
    """True may be passed."""
    out = torch.empty(1, dtype=torch.int32)
    _flagged[(1,)](True, out)
    return _differs("a bool argument", out, [1])


def dependent_launch() -> str | None:
    """The calls of programmatic dependent launch."""
    out = torch.zeros(1, dtype=torch.int32)
    _dependent[(1,)](out, launch_pdl=True)
    return _differs("gdc_wait", out, [1])


def autotune() -> str | None:
    """An autotuned kernel runs, with the cheapest configuration that compiles."""
    out = torch.zeros(1, dtype=torch.int32)
    _tuned[(1,)](out)
    return _differs("autotuning", out, [4])
