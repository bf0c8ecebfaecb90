"""Kernels with known answers, run by tests/test_interpret.py in processes of their own: `python interpreted.py [repaired]`.

Each scenario returns None where the interpreter is right, else what is wrong; the outcomes are printed as JSON.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings

import numpy as np
import torch
import triton
import triton.language as tl

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


@triton.jit
def cast(source, target, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(target + at, tl.load(source + at).to(target.dtype.element_ty))


@triton.jit
def pairwise(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(out + at, x + y)
    tl.store(out + N + at, x - y)
    tl.store(out + 2 * N + at, x * y)
    tl.store(out + 3 * N + at, (x / y).to(out.dtype.element_ty))
    tl.store(out + 4 * N + at, tl.where(x < y, x, -y))
    tl.store(out + 5 * N + at, x * 0.3 + 1.7)


@triton.jit
def extremes(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(out + at, tl.maximum(x, y))
    tl.store(out + N + at, tl.minimum(x, y))


@triton.jit
def inverted(a, out, N: tl.constexpr):
    at = tl.arange(0, N)
    bits = tl.load(a + at).to(out.dtype.element_ty, bitcast=True)
    tl.store(out + at, tl.where(bits > 7, ~bits, bits))


@triton.jit
def reductions(a, out, M: tl.constexpr, N: tl.constexpr):
    x = tl.load(a + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(out + tl.arange(0, M), tl.max(x, axis=1).to(out.dtype.element_ty))
    tl.store(out + M + tl.arange(0, M), tl.min(x, axis=1).to(out.dtype.element_ty))
    tl.store(out + 2 * M + tl.arange(0, M), tl.sum(x, axis=1).to(out.dtype.element_ty))
    tl.store(out + 3 * M + tl.arange(0, M), tl.sum(x, axis=1, keep_dims=True).reshape((M,)).to(out.dtype.element_ty))


@triton.jit
def matmul(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x, y = tl.load(a + m[:, None] * K + k[None, :]), tl.load(b + k[:, None] * N + n[None, :])
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(x, y, out_dtype=tl.float32))


@triton.jit
def masked(a, out, limit, switch, N: tl.constexpr):
    at = tl.arange(0, N)
    inside = (at < limit) & (tl.load(switch) > 0)
    tl.store(out + at, tl.load(a + at, mask=inside, other=-1.0))


@triton.jit
def block_pointer(a, out, limit, N: tl.constexpr):
    x = tl.make_block_ptr(a, (limit,), (1,), (0,), (N,), (0,))
    y = tl.make_block_ptr(out, (N,), (1,), (0,), (N,), (0,))
    tl.store(y, tl.load(x, boundary_check=(0,), padding_option="zero"))


@triton.jit
def scalar_float_mask(a, limit, out, N: tl.constexpr):
    inside = (tl.load(a) > tl.load(limit)) & (tl.arange(0, N) < 3)
    tl.store(out + tl.arange(0, N), inside.to(out.dtype.element_ty))


@triton.jit
def constants(out, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), tl.full((N,), 2.5, out.dtype.element_ty))


@triton.jit
def loop_to(a, out):
    total = 0
    for i in range(tl.load(a)):
        total += i
    tl.store(out, total)


@triton.jit
def flag(yes, out):
    tl.store(out, tl.where(yes, 3, 4))


@triton.jit
def dependent(out, USE: tl.constexpr):
    if USE:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(out, 5)


@triton.autotune([triton.Config({"BLOCK": b}, num_warps=w) for b, w in ((64, 8), (16, 4), (32, 4), (8, 1))], key=["n"])
@triton.jit
def tuned(out, n, TOPK: tl.constexpr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK > TOPK)
    tl.store(out, BLOCK)
    tl.store(out + 1, tl.load(out + 1) + 1)


@triton.autotune([triton.Config({"BLOCK": 8}), triton.Config({"BLOCK": 16})], key=[])
@triton.jit
def broken(out, BLOCK: tl.constexpr):
    tl.store(out, tl.arange(0, BLOCK + 1))


@triton.jit
def integers(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(out + at, x // y)
    tl.store(out + N + at, x % y)
    tl.store(out + 2 * N + at, x * 1000003)
    tl.store(out + 3 * N + at, x + 2147483647)
    tl.store(out + 4 * N + at, x >> 1)


@triton.jit
def transcendental(a, out, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(a + at)
    tl.store(out + at, tl.exp2(x))
    tl.store(out + N + at, tl.log2(tl.abs(x)))


@triton.jit
def rearranged(a, out, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(a + at)
    tl.store(out + at, tl.sort(x))
    tl.store(out + N + at, tl.sort(x, descending=True))
    left, right = tl.split(tl.reshape(x, (N // 2, 2)))
    tl.store(out + 2 * N + at, tl.reshape(tl.join(right, left), (N,)))
    tl.store(out + 3 * N + at, tl.cat(left, right, can_reorder=True))


@triton.jit
def counted(a, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.atomic_add(out + at % 4, tl.load(a + at), mask=at < N - 2)
    tl.atomic_max(out + 4, tl.max(tl.load(a + at), axis=0))


@triton.jit
def everything(a, b, out, n, N: tl.constexpr):
    r = tl.arange(0, N)
    inside = (r[:, None] < n) & (r[None, :] < n - 1)
    x = tl.load(a + r[:, None] * N + r[None, :], mask=inside, other=0.5)
    y = tl.load(b + r[None, :] * N + r[:, None])
    p = tl.exp2(tl.dot(x, y) - tl.max(x, axis=1)[:, None])
    p = tl.where(inside, p / (1 + tl.sum(p, axis=1)[:, None]), 3 - x * r[None, :])
    tl.store(out + r[:, None] * N + r[None, :], p, mask=inside)
    tl.store(out + N * N + r, tl.sort(tl.sum(p, axis=0)))


def differs(what, got, want):
    got, want = got.double(), torch.as_tensor(want).double()
    wrong = ~torch.isclose(got, want, rtol=0, atol=0, equal_nan=True)
    if not wrong.any():
        return None
    at = tuple(int(i) for i in wrong.nonzero()[0])
    return f"{what}: {int(wrong.sum())} wrong, at {at} {got[at].item()} for {want[at].item()}"


def dense_fp32():
    """Every binade, with and without ties, and the special values: 65,536 numbers."""
    bits = np.arange(65536, dtype=np.uint32) << np.uint32(16)
    tail = np.array([0, 0x8000, 0x7FFF, 0x8001, 0xFFFF, 1, 0x4000, 0xC000], dtype=np.uint32)
    return torch.from_numpy((bits | np.tile(tail, 8192)).view(np.float32))


def to_fp8(values, kind):
    """torch's conversion, saturated where the hardware saturates."""
    values = values.float()
    if "fnuz" not in str(kind):
        top = torch.finfo(kind).max
        values = values.clamp(-top, top)
    return values.to(kind)


def around_fp8(kind):
    values = torch.arange(256, dtype=torch.uint8).view(kind).double().nan_to_num(0, 0, 0).unique()
    middle = (values[1:] + values[:-1]) / 2
    every = torch.cat([values, middle]).float().numpy()
    every = np.concatenate([every, np.nextafter(every, np.float32(9e9)), np.nextafter(every, np.float32(-9e9))])
    return torch.from_numpy(np.resize(every, 2048))


def bf16_rounding():
    source, out = dense_fp32(), torch.empty(65536, dtype=torch.bfloat16)
    cast[(1,)](source, out, 65536)
    return differs("fp32 to bf16", out, source.bfloat16())


def fp8_decoding():
    codes = torch.arange(256, dtype=torch.uint8)
    for kind in FP8:
        for wide in (torch.float32, torch.bfloat16, torch.float16):
            out = torch.empty(256, dtype=wide)
            cast[(1,)](codes.view(kind), out, 256)
            if wrong := differs(f"{kind} to {wide}", out, codes.view(kind).float()):
                return wrong
    return None


def fp8_encoding():
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    for kind in FP8:
        for source in (halves.view(torch.bfloat16), halves.view(torch.float16), dense_fp32(), around_fp8(kind)):
            out = torch.empty(source.numel(), dtype=kind)
            cast[(1,)](source, out, source.numel())
            if wrong := differs(f"{source.dtype} to {kind}", out.float(), to_fp8(source, kind).float()):
                return wrong
    return None


def fnuz_types():
    out = torch.empty(4)
    for kind in FP8[2:]:
        cast[(1,)](torch.tensor([1.0, -2.0, 0.5, 3.0]).to(kind), out, 4)
        if wrong := differs(str(kind), out, [1.0, -2.0, 0.5, 3.0]):
            return wrong
    return None


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def bf16_operators():
    a, b = random(2, 1024).bfloat16()
    out = torch.empty(6, 1024, dtype=torch.bfloat16)
    pairwise[(1,)](a, b, out, 1024)
    scaled = (a * torch.tensor(0.3).bfloat16()) + torch.tensor(1.7).bfloat16()
    want = torch.stack([a + b, a - b, a * b, a / b, torch.where(a < b, a, -b), scaled])
    return differs("bf16 operators", out, want)


def bf16_casts():
    numbers = torch.tensor([0, 1, -2, 255, 257, -30000, 65535, 3])
    for kind in (torch.int32, torch.int64, torch.float64):
        out = torch.empty(8, dtype=torch.bfloat16)
        cast[(1,)](numbers.to(kind), out, 8)
        if wrong := differs(f"{kind} to bf16", out, numbers.bfloat16()):
            return wrong
        back = torch.empty(8, dtype=kind)
        cast[(1,)](numbers.bfloat16(), back, 8)
        if wrong := differs(f"bf16 to {kind}", back, numbers.bfloat16().to(kind)):
            return wrong
    halves, out = random(512).bfloat16(), torch.empty(512, dtype=torch.float16)
    cast[(1,)](halves, out, 512)
    return differs("bf16 to fp16", out, halves.half())


def bf16_constants():
    out = torch.empty(4, dtype=torch.bfloat16)
    constants[(1,)](out, 4)
    return differs("tl.full", out, [2.5] * 4)


def bf16_extremes():
    a, b = random(2, 64).bfloat16()
    out = torch.empty(2, 64, dtype=torch.bfloat16)
    extremes[(1,)](a, b, out, 64)
    return differs("bf16 maximum, minimum", out, torch.stack([torch.maximum(a, b), torch.minimum(a, b)]))


def bf16_reductions():
    a = torch.arange(-8, 24).reshape(4, 8).bfloat16()
    out = torch.empty(4, 4, dtype=torch.bfloat16)
    reductions[(1,)](a, out, 4, 8)
    return differs("bf16 max, min, sum", out, torch.stack([a.amax(1), a.amin(1), a.sum(1), a.sum(1)]))


def bf16_sum_rounds_each_addition():
    a, out = torch.tensor([[256.0, 1, 1, 1]]).bfloat16(), torch.empty(4, 1, dtype=torch.bfloat16)
    reductions[(1,)](a, out, 1, 4)  # 256 + 1 is 256, 1 + 1 is 2: 258, where one rounding of 259 gives 260
    return differs("bf16 sum of 256, 1, 1, 1", out[2], [258.0])


def narrow_dots():
    for kind in (torch.bfloat16, *FP8):
        a, b, c = random(16, 128).to(kind), random(128, 32).to(kind), torch.empty(16, 32)
        matmul[(1,)](a, b, c, 16, 32, 128)
        error = (c.double() - a.double() @ b.double()).abs() / (a.double().abs() @ b.double().abs())
        if not error.max() <= 128 * 2.0**-24:
            return f"dot of {kind}: relative error {error.max():.1e}"
    return None


def fp8_dot_keeps_nan():
    a = torch.zeros(16, 16)
    a[3, 4] = torch.nan
    for kind in FP8:
        c = torch.empty(16, 16)
        matmul[(1,)](a.to(kind), torch.ones(16, 16).to(kind), c, 16, 16, 16)
        want = torch.zeros(16, 16)
        want[3] = torch.nan
        if wrong := differs(f"dot of {kind}", c, want):
            return wrong
    return None


def masks():
    for switch, want in ((1, [0.0, 1.0, 2.0, -1.0]), (0, [-1.0] * 4)):
        out = torch.zeros(4)
        masked[(1,)](torch.arange(4.0), out, 3, torch.tensor([switch], dtype=torch.int32), 4)
        if wrong := differs("mask of vector and scalar", out, want):
            return wrong
    return None


def comparisons():
    for source in (torch.float32, torch.float16, torch.bfloat16, torch.int32):
        for target in (torch.bfloat16, torch.float32, torch.int32):
            out = torch.zeros(4, dtype=target)
            scalar_float_mask[(1,)](torch.tensor([2]).to(source), torch.tensor([1]).to(source), out, 4)
            if wrong := differs(f"{source} comparison as {target}", out, [1.0, 1.0, 1.0, 0.0]):
                return wrong
    return None


def scalar_index():
    out = torch.zeros(1, dtype=torch.int32)
    loop_to[(1,)](torch.tensor([5], dtype=torch.int32), out)
    return differs("a loop", out, [10])


@triton.jit
def wide(out, n: tl.int64, small: tl.int16, plain):
    tl.store(out, n * plain)
    tl.store(out + 1, small)
    tl.store(out + 2, plain * plain)


def annotated_arguments():
    out = torch.zeros(3, dtype=torch.int64)
    wide[(1,)](out, 1 << 20, small=7, plain=(1 << 20) + 1)
    return differs("arguments of a named type", out, [(1 << 40) + (1 << 20), 7, (1 << 21) + 1])


def boolean_arguments():
    out = torch.zeros(2, dtype=torch.int32)
    flag[(1,)](True, out[:1])
    flag[(1,)](False, out[1:])
    return differs("flags", out, [3, 4])


def maximum_of_numbers():
    nan, out = torch.nan, torch.empty(2, 4)
    extremes[(1,)](torch.tensor([nan, 1.0, nan, 2.0]), torch.tensor([3.0, nan, nan, 1.0]), out, 4)
    return differs("maximum, minimum", out, [[3.0, 1.0, nan, 2.0], [3.0, 1.0, nan, 1.0]])


def unsigned_inversion():
    for signed, unsigned in ((torch.int32, torch.uint32), (torch.int64, torch.uint64), (torch.int8, torch.uint8)):
        a, out = torch.tensor([5, -1, -6, 7], dtype=signed), torch.empty(4, dtype=unsigned)
        inverted[(1,)](a, out, 4)
        if wrong := differs(f"~ of {unsigned}", out.to(torch.int64), [5, 0, 5, 7]):
            return wrong
    return None


def dependent_launch():
    out = torch.zeros(1, dtype=torch.int32)
    dependent[(1,)](out, USE=True, launch_pdl=True, num_warps=4, num_stages=2)
    return differs("pdl", out, [5])


def autotune():
    for topk, want in ((4, 8), (8, 16), (16, 32), (40, 64)):
        out = torch.zeros(2)
        tuned[(1,)](out, 1, TOPK=topk)
        if wrong := differs("the cheapest that compiles", out, [want, 1.0]):
            return wrong
    return None


def autotune_pins():
    from m3check.interpret import autotuned, pin_autotune

    if autotuned(globals()) != {"tuned": 4, "broken": 2}:
        return f"found {autotuned(globals())}"
    for index, want in ((0, 64), (1, 16), (2, 32), (None, 8)):
        pin_autotune(tuned, index)
        out = torch.zeros(2)
        tuned[(1,)](out, 1, TOPK=4)
        if wrong := differs(f"pin {index}", out[:1], [want]):
            return wrong
    pin_autotune(tuned, 3)
    try:
        tuned[(1,)](torch.zeros(2), 1, TOPK=16)
    except triton.runtime.errors.InterpreterError:
        pin_autotune(tuned, None)
    else:
        return "a pinned configuration that does not compile ran"
    try:
        broken[(1,)](torch.zeros(2))
    except triton.runtime.errors.InterpreterError as error:
        return None if "power of 2" in str(error) else str(error)
    return "an error that is no static assertion was swallowed"


def integer_semantics():
    a = torch.tensor([7, -7, 7, -7, 2147483647, -2147483648, 5, -1], dtype=torch.int32)
    b = torch.tensor([2, 2, -2, -2, 3, 3, 7, 4], dtype=torch.int32)
    out = torch.empty(5, 8, dtype=torch.int32)
    with np.errstate(over="ignore"):
        integers[(1,)](a, b, out, 8)
    quotient = torch.div(a, b, rounding_mode="trunc")
    want = torch.stack([quotient, a - quotient * b, a * 1000003, a + 2147483647, a >> 1])
    return differs("C's division, wrapping, shifting", out, want)


def fp32_dot_is_fp32():
    a, b, c = random(16, 64), random(64, 16), torch.empty(16, 16)
    matmul[(1,)](a, b, c, 16, 16, 64)
    error = (c.double() - a.double() @ b.double()).abs() / (a.double().abs() @ b.double().abs())
    return None if error.max() <= 64 * 2.0**-24 else f"relative error {error.max():.1e}"


def transcendental_precision():
    x = (random(4096) * 20).float()
    out = torch.empty(2, 4096)
    transcendental[(1,)](x, out, 4096)
    power, logarithm = torch.exp2(x.double()), torch.log2(x.double().abs())
    worst = ((out[0].double() - power).abs() / power).max()
    worst_log = ((out[1].double() - logarithm).abs() / (logarithm.abs() + 2.0**-10)).max()
    return None if worst <= 2.0**-22 and worst_log <= 2.0**-22 else f"exp2 {worst:.1e}, log2 {worst_log:.1e}"


def max_ignores_nan():
    a = torch.tensor([[1.0, torch.nan, 3.0, 2.0], [torch.nan] * 4])
    out = torch.empty(4, 2)
    reductions[(1,)](a, out, 2, 4)
    return differs("max, min", out[:2], [[3.0, torch.nan], [1.0, torch.nan]])


def rearrangements():
    x = random(32)
    out = torch.empty(4, 32)
    rearranged[(1,)](x, out, 32)
    up = x.sort().values
    swapped = x.reshape(16, 2).flip(1).reshape(32)
    return differs("sort, split, join, cat", out, torch.stack([up, up.flip(0), swapped, torch.cat([x[::2], x[1::2]])]))


def atomics():
    for kind in (torch.float32, torch.int32):
        a, out = torch.arange(16).to(kind), torch.zeros(5, dtype=kind)
        counted[(1,)](a, out, 16)
        want = [0 + 4 + 8 + 12, 1 + 5 + 9 + 13, 2 + 6 + 10, 3 + 7 + 11, 15]
        if wrong := differs(f"atomics of {kind}", out, want):
            return wrong
    return None


def block_pointers():
    if int(triton.__version__.split(".")[1]) >= 9:
        return None  # removed from Triton
    out = torch.ones(8)
    block_pointer[(1,)](torch.arange(1.0, 9.0), out, 5, 8)
    return differs("a block pointer's border", out, [1.0, 2.0, 3.0, 4.0, 5.0, 0.0, 0.0, 0.0])


def fp32_bytes():
    """A hash of what a kernel without any defect computes: the same with and without repairs."""
    a, b, out = random(32, 32), random(32, 32) / 8, torch.zeros(33, 32)
    everything[(1,)](a, b, out, 27, 32)
    return hashlib.sha256(out.numpy().tobytes()).hexdigest()


def language_is_put_back():
    if not tl.core.is_builtin(tl.core.expand_dims):
        return "tl.core is still patched"
    before = {name: getattr(tl, name) for name in ("load", "dot", "static_assert", "reduce")}
    extremes[(1,)](torch.zeros(4), torch.zeros(4), torch.zeros(8), 4)
    rearranged[(1,)](torch.zeros(4), torch.zeros(16), 4)
    changed = [name for name, value in before.items() if getattr(tl, name) is not value]
    return f"changed: {changed}" if changed else None


def watchers_see_addresses():
    from m3check.interpret import memory

    seen = []
    a, out = torch.arange(4.0), torch.zeros(4)

    def watcher(addresses, mask, size, kind, values):
        seen.append((kind, sorted(addresses[mask].tolist()), size))

    memory.watch(watcher)
    masked[(1,)](a, out, 3, torch.tensor([1], dtype=torch.int32), 4)
    memory.unwatch(watcher)
    masked[(1,)](a, out, 3, torch.tensor([1], dtype=torch.int32), 4)
    want = [("load", [a.data_ptr() + 4 * i for i in range(3)], 4), ("store", [out.data_ptr() + 4 * i for i in range(4)], 4)]
    return None if seen[1:] == want else f"{seen}"


# repair: the scenarios that show its defect
DEFECTS = {
    "scalar index": [scalar_index],
    "boolean arguments": [boolean_arguments],
    "annotated arguments": [annotated_arguments],
    "fnuz types": [fnuz_types],
    "masks": [masks],
    "bf16 rounding": [bf16_rounding],
    "fp8 conversions": [fp8_decoding, fp8_encoding],
    "bf16 casts": [bf16_casts],
    "bf16 constants": [bf16_constants],
    "bf16 operators": [bf16_operators, bf16_extremes],
    "bf16 sum": [bf16_reductions, bf16_sum_rounds_each_addition],
    "narrow dot": [narrow_dots, fp8_dot_keeps_nan],
    "comparisons": [comparisons],
    "unsigned inversion": [unsigned_inversion],
    "maximum of numbers": [maximum_of_numbers],
    "dependent launch": [dependent_launch],
    "autotune": [autotune],
}
SOUND = [
    integer_semantics,
    fp32_dot_is_fp32,
    transcendental_precision,
    max_ignores_nan,
    rearrangements,
    atomics,
    block_pointers,
]
OURS = [autotune_pins, language_is_put_back, watchers_see_addresses]


def outcome(scenario):
    try:
        return scenario()
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def main():
    repaired = "repaired" in sys.argv
    answer = {"triton": triton.__version__}
    if repaired:
        from m3check.interpret import install

        repairs = install()
        assert install() is repairs
        answer["repairs"] = {r.name: [r.needed, r.installed, r.detail] for r in repairs}
    answer["defects"] = {name: [outcome(s) for s in scenarios] for name, scenarios in DEFECTS.items()}
    answer["sound"] = {s.__name__: outcome(s) for s in SOUND}
    answer["bytes"] = outcome(fp32_bytes)
    if repaired:
        answer["ours"] = {s.__name__: outcome(s) for s in OURS}
    print(json.dumps(answer))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
