"""What a compiled kernel needs of its target, read from what the compiler wrote: the same for a cross-compiled kernel and
for one that a driver has loaded, so that the two can be compared.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MATRIX = re.compile(r"\b(wgmma\.mma_async[\w.:]*|mma\.(?:sp\.)?sync[\w.:]*|tcgen05\.mma[\w.:]*|v_s?mfmac?_\w+)")
_NOISE = re.compile(r"\.(?:sync|aligned|mma_async|row|col|cta_group::\d)\b")
_RESOURCES = re.compile(r"Function (\w+):\s*\n?\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_AMD = re.compile(r"^\s*\.(vgpr_count|sgpr_count|private_segment_fixed_size):\s*(\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Figures:
    """The resources of one compiled kernel."""

    warps: int
    """Of a block, as compiled: warp specialisation adds some to what was asked for."""
    shared: int
    """Bytes of shared memory of a block."""
    registers: int
    """32-bit registers of a thread; on AMD vector registers, accumulators among them."""
    spilled: int
    """Bytes of a thread that do not fit in registers: local memory on NVIDIA, scratch on AMD."""
    tensor_memory: int = 0
    """Columns of tensor memory (sm100 and sm103)."""
    matrix: tuple[str, ...] = ()
    """Matrix instructions, sorted: kind, tile and operands."""


def read(compiled: Any) -> Figures:
    """The figures of Triton's CompiledKernel. Raises ValueError where the compiler's output does not hold them."""
    asm, metadata = compiled.asm, compiled.metadata
    text = asm.get("ptx") or asm.get("amdgcn") or ""
    registers, spilled = _nvidia(asm["cubin"], metadata.name) if "cubin" in asm else _amd(text)
    return Figures(
        metadata.num_warps,
        metadata.shared,
        registers,
        spilled,
        getattr(metadata, "tmem_size", None) or 0,
        matrix_instructions(text),
    )


def matrix_instructions(assembly: str) -> tuple[str, ...]:
    """The matrix instructions of PTX or amdgcn text, without the words that all of them have."""
    return tuple(sorted({_NOISE.sub("", name) for name in _MATRIX.findall(assembly)}))


def _nvidia(cubin: bytes, name: str) -> tuple[int, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for function, registers, stack, _, local in _RESOURCES.findall(text):
        if function == name:
            return int(registers), int(stack) + int(local)
    raise ValueError(f"{Path(command[0]).name} names no resources of {name}: {text[:200]}")


def _amd(text: str) -> tuple[int, int]:
    found = {name: int(value) for name, value in _AMD.findall(text)}
    if "vgpr_count" not in found:
        raise ValueError("the assembly names no .vgpr_count")
    return found["vgpr_count"], found.get("private_segment_fixed_size", 0)
