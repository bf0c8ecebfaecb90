"""The hardware targets: one row each, with what a kernel may use there and how precisely it multiplies.

Figures that no vendor publishes say so; where nothing is known the conservative value stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Mma:
    """How one matrix instruction adds up: `inner` products aligned to the largest, `fraction_bits` kept, then truncated."""

    name: str  # how the instruction begins in PTX or amdgcn assembly
    operands: str  # bf16, fp16, tf32, fp8
    inner: int  # products summed in one step (κ)
    fraction_bits: int  # kept below the leading bit of the largest addend (f)
    source: str


@dataclass(frozen=True)
class Arch:
    """One hardware target."""

    name: str
    vendor: Literal["nvidia", "amd"]
    capability: tuple[int, int]  # CUDA compute capability, or (major, minor) of gfx
    product: str
    shared_memory: int  # bytes one block may use
    warp_size: int
    fp8: frozenset[str]  # cache dtypes that kernels can compile here
    pdl: bool  # programmatic dependent launch
    mma: tuple[Mma, ...] = ()
    registers: int = 255  # 32-bit registers a thread may use
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Accumulator:
    """How a matrix product was summed, which decides how far correct arithmetic may be off.

    `fraction_bits` None is fp32 arithmetic with a rounding at every addition, in any order; otherwise `inner` products at a
    time are aligned to the largest addend, cut to `fraction_bits` and added to the accumulator. `operand_bits` is the
    significand that operands are rounded to on the way in (11 for TF32), None where they enter unchanged.
    """

    fraction_bits: int | None = None
    inner: int = 1
    operand_bits: int | None = None
    origin: str = "fp32"


FP32 = Accumulator()
