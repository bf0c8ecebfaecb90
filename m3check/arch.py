"""The hardware targets: one row each, with what a kernel may use there and how precisely it multiplies.

Every figure has a source (`m3check archs --explain ARCH`). Figures that nobody has published say so; where nothing is known
the conservative value stands: the one that forgives more.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from m3check.types import M3CheckError


@dataclass(frozen=True)
class Accumulator:
    """How a matrix product was summed, which decides how far correct arithmetic may be off.

    `fraction_bits` None is fp32 arithmetic with a rounding at every addition, in any order; otherwise `inner` products at a
    time and the accumulator are aligned to the largest of them, cut to `fraction_bits` below its exponent, added, and the
    sum is brought to `output_bits` fraction bits: cut, or rounded to nearest. `operand_bits` is the significand that
    operands are cut to on the way in (11 for TF32), None where they enter unchanged.
    """

    fraction_bits: int | None = None
    inner: int = 1
    operand_bits: int | None = None
    origin: str = "fp32"
    output_bits: int = 23
    nearest: bool = False

    @property
    def precision(self) -> tuple[int, int]:
        """What orders accumulators from the coarsest to the finest: significands of operands, then bits of the sum."""
        return self.operand_bits or 24, self.fraction_bits or 24


FP32 = Accumulator()


class Arithmetic(NamedTuple):
    """How one call summed: block scores, the logits of attention, and the weights times the values."""

    score: Accumulator = FP32
    dot: Accumulator = FP32
    pv: Accumulator = FP32


@dataclass(frozen=True)
class Mma:
    """How one kind of matrix instruction adds up (see Accumulator), by the operands it multiplies."""

    instruction: str  # how it begins in PTX or amdgcn assembly: mma, wgmma, tcgen05, v_mfma
    operands: str  # 16 (bf16 and fp16), tf32, fp32, fp8
    accumulator: Accumulator
    source: str


@dataclass(frozen=True, kw_only=True)
class Arch:
    """One hardware target. Sizes are in bytes, registers are 32 bits wide."""

    name: str
    vendor: Literal["nvidia", "amd"]
    capability: tuple[int, int]
    """CUDA compute capability; of gfx942 it is (9, 4)."""
    product: str
    multiprocessors: int
    """Multiprocessors (compute units) of the product that is named first; wrappers size their grids by them."""
    shared_memory: int
    """What one block may use."""
    shared_memory_unit: int
    """What the blocks of one multiprocessor (compute unit) share."""
    registers: int
    """Of one thread, at most."""
    registers_unit: int
    """Of one multiprocessor."""
    warp_size: int
    warps: int
    """Resident on one multiprocessor, at most."""
    blocks: int
    """Likewise."""
    fp8: frozenset[str]
    """fp8 dtypes that Triton compiles for it; bf16, fp16 and fp32 compile everywhere."""
    fp8_native: frozenset[str]
    """fp8 dtypes that its matrix instructions multiply; others are widened first."""
    pdl: bool
    """Programmatic dependent launch."""
    mma: tuple[Mma, ...]
    sources: Mapping[str, str]

    def rows(self, operands: str, instruction: str = "") -> list[Mma]:
        """The matrix instructions for such operands; where none has that name, every one that could be meant.

        A target without fp8 instructions widens fp8 operands to 16 bits.
        """
        fitting = [m for m in self.mma if m.operands == operands] or [m for m in self.mma if m.operands == "16"]
        named = [m for m in fitting if instruction and instruction.startswith(m.instruction)]
        return named or fitting

    def accumulator(self, operands: str, instruction: str = "") -> Accumulator:
        """The least precise accumulator of this target for such operands (of such an instruction, where it is known)."""
        return min((m.accumulator for m in self.rows(operands, instruction)), key=lambda a: a.precision)

    def kind(self, dtype: str) -> str:
        """The operand kind of a dtype's word: 16, fp8, and for fp32 the least precise that a kernel may use here.

        TF32 (XF32 on gfx942) where the target has it; no kernel promises to do without: what was emitted decides.
        """
        if dtype == "fp32":
            return "tf32" if any(row.operands == "tf32" for row in self.mma) else "fp32"
        return "fp8" if dtype.startswith("fp8") else "16"


def operands_of(instruction: str) -> str:
    """The operand kind of a matrix instruction: `fp8`, `tf32`, `fp32` or `16`."""
    if re.search(r"e4m3|e5m2|fp8|bf8|f8f6f4", instruction):
        return "fp8"
    if "tf32" in instruction or "xf32" in instruction:
        return "tf32"
    return "fp32" if re.match(r"v_mfma_f32_\d+x\d+x\d+_?(\d+b_)?f32$", instruction) else "16"


# Sources.

_GUIDE = "CUDA Programming Guide 13, compute capabilities, tables 30 and 31"
_ROCM = "ROCm documentation, AMD GPU specifications (LDS, VGPR file, wavefront size)"
_LLVM = "LLVM, AMDGPU target: AddressableLocalMemorySize, 512 VGPRs and AGPRs of a lane, 8 waves on each of 4 SIMDs"
_TRITON = "Triton 3.8.0, supported_fp8_dtypes of its backend"
_TYPES = "CUDA Programming Guide 13, compute capabilities, table 33 (tensor core data types)"
_SHEET = "the data sheet of the product that is named first"
_DRIVER = "what its driver reports; no data sheet has it"
_PDL = "CUDA Programming Guide 13: programmatic dependent launch needs compute capability 9.0"
_CDNA = "AMD Instinct CDNA3 and CDNA4 ISA references: MFMA takes fnuz formats on CDNA3, OCP formats on CDNA4"
_MODELS = "Khattak & Mikaitis, arXiv 2512.07004, with the authors' models ({}, bit-accurate)"
_SIM = "Xie et al., MMA-Sim, arXiv 2511.10909, with the authors' simulator ({}, bit-accurate)"
_FP22 = "SageAttention2, arXiv 2411.10958 (1 + 8 + 13 bits)"
_UNPUBLISHED = "not published; conservative: as few fraction bits as any published unit of its vendor's has"
_UNPUBLISHED_FP8 = "not published; conservative: as few fraction bits as any published unit has (Ada and Hopper)"

FN = frozenset({"fp8_e4m3fn", "fp8_e5m2"})
FNUZ = frozenset({"fp8_e4m3fnuz", "fp8_e5m2fnuz"})


def _cut(instruction: str, operands: str, bits: int, inner: int, source: str, output_bits: int = 23) -> Mma:
    """An NVIDIA instruction: alignment and result are cut toward zero."""
    origin = f"{instruction} {operands}, {bits} bits"
    operand_bits = 11 if operands == "tf32" else None
    return Mma(instruction, operands, Accumulator(bits, inner, operand_bits, origin, output_bits), source)


def _both(models: str, sim: str) -> str:
    return f"{_MODELS.format(models)}; {_SIM.format(sim)}"


_AMPERE = _both("A100", "Ampere")
_ADA = _both("L40S", "Ada Lovelace")
_HOPPER = _both("H100, H200", "Hopper")
_BLACKWELL = _both("B200", "Blackwell")
_RTX = _both("RTX PRO 6000", "RTX Blackwell")
_MI300 = f"{_MODELS.format('CDNA3')}; {_SIM.format('CDNA3')}"


def _mma(bits: int, inner: int, source: str, instruction: str = "mma") -> tuple[Mma, ...]:
    """16-bit and TF32 operands; TF32 steps are half as long."""
    return _cut(instruction, "16", bits, inner, source), _cut(instruction, "tf32", bits, inner // 2, source)


def _mfma(operands: str, bits: int, inner: int, source: str, operand_bits: int | None = None) -> Mma:
    """An AMD instruction: alignment is cut, the result rounded to nearest."""
    origin = f"v_mfma {operands}, {bits} bits"
    return Mma("v_mfma", operands, Accumulator(bits, inner, operand_bits, origin, nearest=True), source)


_FMA = Mma("v_mfma", "fp32", replace(FP32, origin="v_mfma fp32, a chain of fused multiply-adds"), _MI300)


def _sm(name: str, capability: tuple[int, int], product: str, units: int, shared: int, warps: int, blocks: int,
        mma: tuple[Mma, ...], native: frozenset[str] = FN, pdl: bool = True, counted: str = _SHEET) -> Arch:  # fmt: skip
    """A row of NVIDIA's tables; `units` are multiprocessors, `shared` is KB of one: a block may use all but one."""
    return Arch(
        name=name, vendor="nvidia", capability=capability, product=product, multiprocessors=units,
        shared_memory=(shared - 1) * 1024, shared_memory_unit=shared * 1024, registers=255, registers_unit=65_536,
        warp_size=32, warps=warps, blocks=blocks, fp8=native or frozenset({"fp8_e5m2"}), fp8_native=native, pdl=pdl,
        mma=mma,
        sources={"capability": _GUIDE, "multiprocessors": counted, "shared_memory": _GUIDE, "registers": _GUIDE,
                 "warp_size": _GUIDE, "warps": _GUIDE, "fp8": _TRITON, "fp8_native": _TYPES, "pdl": _PDL},
    )  # fmt: skip


def _gfx(name: str, capability: tuple[int, int], product: str, units: int, shared: int, native: frozenset[str],
         mma: tuple[Mma, ...]) -> Arch:  # fmt: skip
    """A CDNA row; a workgroup may use the whole LDS of its compute unit."""
    return Arch(
        name=name, vendor="amd", capability=capability, product=product, multiprocessors=units,
        shared_memory=shared * 1024, shared_memory_unit=shared * 1024, registers=512, registers_unit=4 * 512 * 64,
        warp_size=64, warps=32, blocks=32, fp8=FN | FNUZ, fp8_native=native, pdl=False, mma=mma,
        sources={"capability": "the target's own name", "multiprocessors": _SHEET, "shared_memory": f"{_ROCM}; {_LLVM}",
                 "registers": f"{_ROCM}; {_LLVM}", "warp_size": _ROCM, "warps": _LLVM, "fp8": _TRITON, "fp8_native": _CDNA,
                 "pdl": "ROCm has no such launch attribute"},
    )  # fmt: skip


ARCHS: Mapping[str, Arch] = {
    arch.name: arch
    for arch in (
        _sm("sm80", (8, 0), "A100", 108, 164, 64, 32, _mma(24, 8, _AMPERE), frozenset(), pdl=False),
        _sm("sm89", (8, 9), "L40S, RTX 4090", 142, 100, 48, 24,
            (*_mma(24, 8, _ADA), _cut("mma", "fp8", 13, 16, f"{_ADA}; {_FP22}", 13)), pdl=False),
        _sm("sm90", (9, 0), "H100, H200", 132, 228, 64, 32,
            (*_mma(25, 16, _HOPPER, "wgmma"), _cut("wgmma", "fp8", 13, 32, f"{_HOPPER}; {_FP22}", 13),
             *_mma(25, 16, _HOPPER), _cut("mma", "fp8", 13, 32, _MODELS.format("H100, H200"), 13))),
        _sm("sm100", (10, 0), "B200", 148, 228, 64, 32,
            (*_mma(25, 16, _BLACKWELL, "tcgen05"), _cut("tcgen05", "fp8", 25, 32, _BLACKWELL),
             *_mma(25, 16, _BLACKWELL), _cut("mma", "fp8", 25, 32, _MODELS.format("B200"))), counted=_DRIVER),
        _sm("sm103", (10, 3), "B300", 148, 228, 64, 32,
            (*_mma(23, 16, _UNPUBLISHED, "tcgen05"), _cut("tcgen05", "fp8", 13, 32, _UNPUBLISHED_FP8, 13),
             *_mma(23, 16, _UNPUBLISHED), _cut("mma", "fp8", 13, 32, _UNPUBLISHED_FP8, 13)), counted=_DRIVER),
        _sm("sm120", (12, 0), "RTX 5090, RTX PRO 6000", 170, 100, 48, 24,
            (*_mma(25, 16, _RTX), _cut("mma", "fp8", 25, 32, _RTX))),
        _sm("sm121", (12, 1), "GB10", 48, 100, 48, 24,
            (*_mma(23, 16, _UNPUBLISHED), _cut("mma", "fp8", 13, 32, _UNPUBLISHED_FP8, 13)), counted=_DRIVER),
        _gfx("gfx942", (9, 4), "MI300X, MI325X", 304, 64, FNUZ,
              # fp8: even and odd products are aligned apart and then together, three cuts of 24 bits: 23 in a bound for one
              (_mfma("16", 24, 8, _MI300), _mfma("tf32", 24, 4, _MI300, 11), _mfma("fp8", 23, 16, _MI300), _FMA)),
        _gfx("gfx950", (9, 5), "MI350X, MI355X", 256, 160, FN,
              (_mfma("16", 23, 16, _UNPUBLISHED), _mfma("fp8", 13, 32, _UNPUBLISHED_FP8),
               replace(_FMA, source="not published for CDNA4; fp32 with a rounding at every addition, in any order"))),
    )
}  # fmt: skip


def find_arch(name: str) -> Arch:
    """The row of a target; raises M3CheckError that lists the known ones."""
    if name not in ARCHS:
        raise M3CheckError(f"unknown arch {name!r}; known: {', '.join(ARCHS)}")
    return ARCHS[name]


def present() -> list[tuple[int, str]]:
    """The GPUs of this machine as (device index, arch name), asked of the driver itself, so that torch is not imported."""
    return _nvidia() or _amd()


def _nvidia() -> list[tuple[int, str]]:
    major_attribute, minor_attribute = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{MAJOR,MINOR}
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, value = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    found = []
    for index in range(count.value):
        capability = []
        for attribute in (major_attribute, minor_attribute):
            cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, index)
            capability.append(value.value)
        found.append((index, f"sm{capability[0]}{capability[1]}"))
    return found


def _amd() -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    for node in sorted(Path("/sys/class/kfd/kfd/topology/nodes").glob("*/properties")):
        version = re.search(r"^gfx_target_version (\d+)$", node.read_text(), re.MULTILINE)
        if version and int(version[1]):
            major, minor, stepping = int(version[1]) // 10000, int(version[1]) // 100 % 100, int(version[1]) % 100
            found.append((len(found), f"gfx{major}{minor:x}{stepping:x}"))
    return found
