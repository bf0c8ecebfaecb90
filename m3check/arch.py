"""The hardware targets: one row each, with what a kernel may use there and how precisely it multiplies.

Figures that no vendor publishes say so; where nothing is known the conservative value stands.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from m3check.types import M3CheckError


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


@dataclass(frozen=True)
class Mma:
    """How one kind of matrix instruction adds up (see Accumulator), by the operands it multiplies."""

    instruction: str  # how it begins in PTX or amdgcn assembly
    operands: str  # 16 (bf16 and fp16), tf32, fp8
    accumulator: Accumulator
    source: str


@dataclass(frozen=True)
class Arch:
    """One hardware target."""

    name: str
    vendor: Literal["nvidia", "amd"]
    capability: tuple[int, int]  # CUDA compute capability; of gfx942 it is (9, 4)
    product: str
    shared_memory: int  # bytes that one block may use
    warp_size: int
    fp8: frozenset[str]  # fp8 dtypes that Triton compiles for it
    pdl: bool  # programmatic dependent launch
    mma: tuple[Mma, ...] = ()
    registers: int = 255  # 32-bit registers of a thread
    sources: Mapping[str, str] = field(default_factory=dict)

    def accumulator(self, operands: str, instruction: str = "") -> Accumulator:
        """The least precise accumulator of this target for such operands (of such an instruction, where it is known)."""
        rows = [
            m for m in self.mma if m.operands == operands and (not instruction or instruction.startswith(m.instruction))
        ]
        return min((m.accumulator for m in rows), key=lambda a: a.fraction_bits or 24, default=FP32)


_GUIDE = "CUDA C++ Programming Guide, table of technical specifications by compute capability"
_MODELS = "Khattak & Mikaitis, Accurate Models of NVIDIA Tensor Cores, arXiv 2512.07004"
_FP22 = "SageAttention2, arXiv 2411.10958: fp8 products on Ada and Hopper are summed in 1 + 8 + 13 bits"
_UNPUBLISHED = "not published; conservative: as few fraction bits as any neighbour has"
_TRITON = "Triton 3.8.0, supported_fp8_dtypes of its backend"
_CDNA = "AMD Instinct CDNA instruction set architecture, local data share size"

FN = frozenset({"fp8_e4m3fn", "fp8_e5m2"})
FNUZ = frozenset({"fp8_e4m3fnuz", "fp8_e5m2fnuz"})


def _bits(fraction: int, inner: int, origin: str, operand_bits: int | None = None) -> Accumulator:
    return Accumulator(fraction, inner, operand_bits, origin)


def _tensor_cores(sixteen: str, fp8_bits: int | None, fp8_source: str, instruction: str = "") -> tuple[Mma, ...]:
    """The usual three rows: 16-bit and TF32 operands keep at least fp32's 23 fraction bits, fp8 what its row says."""
    rows = [
        Mma(instruction, "16", _bits(23, 16, f"{instruction or 'mma'} 16-bit, at least 23 fraction bits"), sixteen),
        Mma(instruction, "tf32", _bits(23, 8, f"{instruction or 'mma'} tf32, at least 23 fraction bits", 11), sixteen),
    ]
    if fp8_bits is not None:
        origin = f"{instruction or 'mma'} fp8, {fp8_bits} fraction bits"
        rows.append(Mma(instruction, "fp8", _bits(fp8_bits, 32, origin), fp8_source))
    return tuple(rows)


ARCHS: Mapping[str, Arch] = {
    arch.name: arch
    for arch in (
        Arch("sm80", "nvidia", (8, 0), "A100", 166_912, 32, frozenset({"fp8_e5m2"}), False,
             _tensor_cores(_MODELS, None, ""), sources={"shared_memory": _GUIDE, "fp8": _TRITON}),
        Arch("sm89", "nvidia", (8, 9), "L40S, RTX 4090", 101_376, 32, FN, False,
             _tensor_cores(_UNPUBLISHED, 13, _FP22), sources={"shared_memory": _GUIDE, "fp8": _TRITON}),
        Arch("sm90", "nvidia", (9, 0), "H100, H200", 232_448, 32, FN, True,
             _tensor_cores(_MODELS, 13, _FP22, "wgmma") + _tensor_cores(_MODELS, 13, _FP22, "mma"),
             sources={"shared_memory": _GUIDE, "fp8": _TRITON}),
        Arch("sm100", "nvidia", (10, 0), "B200", 232_448, 32, FN, True,
             _tensor_cores(_MODELS, 23, _MODELS), sources={"shared_memory": _GUIDE, "fp8": _TRITON}),
        Arch("sm103", "nvidia", (10, 3), "B300", 232_448, 32, FN, True,
             _tensor_cores(_UNPUBLISHED, 13, _UNPUBLISHED), sources={"shared_memory": _GUIDE, "fp8": _TRITON}),
        Arch("sm120", "nvidia", (12, 0), "RTX 5090, RTX PRO 6000", 101_376, 32, FN, True,
             _tensor_cores(_UNPUBLISHED, 13, _UNPUBLISHED), sources={"shared_memory": _GUIDE, "fp8": _TRITON}),
        Arch("sm121", "nvidia", (12, 1), "GB10", 101_376, 32, FN, True,
             _tensor_cores(_UNPUBLISHED, 13, _UNPUBLISHED), sources={"shared_memory": _GUIDE, "fp8": _TRITON}),
        Arch("gfx942", "amd", (9, 4), "MI300X, MI325X", 65_536, 64, FN | FNUZ, False,
             _tensor_cores(_UNPUBLISHED, 13, _UNPUBLISHED, "v_mfma"), 512, {"shared_memory": _CDNA, "fp8": _TRITON}),
        Arch("gfx950", "amd", (9, 5), "MI350X, MI355X", 163_840, 64, FN | FNUZ, False,
             _tensor_cores(_UNPUBLISHED, 13, _UNPUBLISHED, "v_mfma"), 512, {"shared_memory": _CDNA, "fp8": _TRITON}),
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
