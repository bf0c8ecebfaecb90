"""`m3check archs`: the hardware targets as m3check knows them, with the source of each figure."""

from __future__ import annotations

import argparse

from m3check.arch import ARCHS, Arch, present
from m3check.commands.talk import emit
from m3check.config import choose


def main(arguments: argparse.Namespace) -> int:
    """Print all targets in a table, or one with its sources."""
    from tabulate import tabulate

    here = {name for _, name in present()}
    if arguments.explain is not None:
        choose("arch", arguments.explain, ARCHS)
        rows = _explained(ARCHS[arguments.explain], arguments.explain in here)
        emit(tabulate(rows, headers=["what", "value", "source"], tablefmt="plain", disable_numparse=True))
        return 0
    rows = [(*_row(arch), "yes" if arch.name in here else "") for arch in ARCHS.values()]
    headers = ["arch", "product", "shared memory", "registers", "warp", "fp8", "PDL", "fp8 accumulator", "here"]
    emit(tabulate(rows, headers=headers, tablefmt="plain", disable_numparse=True))
    return 0


def _row(arch: Arch) -> tuple[str, ...]:
    fp8 = arch.accumulator("fp8")
    has_fp8 = any(row.operands == "fp8" for row in arch.mma)
    bits = f"{fp8.fraction_bits} fraction bits" if has_fp8 else "no fp8 MMA"
    return (
        arch.name,
        arch.product,
        f"{arch.shared_memory // 1024} KB",
        str(arch.registers),
        str(arch.warp_size),
        " ".join(sorted(word.removeprefix("fp8_") for word in arch.fp8)),
        "yes" if arch.pdl else "",
        bits,
    )


def _explained(arch: Arch, here: bool) -> list[tuple[str, ...]]:
    def source(field: str) -> str:
        return arch.sources.get(field, "")

    rows: list[tuple[str, ...]] = [
        ("arch", arch.name, ""),
        ("vendor", arch.vendor, ""),
        ("products", arch.product, ""),
        ("on this machine", "yes" if here else "no", "the driver"),
        ("capability", f"{arch.capability[0]}.{arch.capability[1]}", source("capability")),
        ("shared memory of a block", f"{arch.shared_memory} bytes", source("shared_memory")),
        ("registers of a thread", str(arch.registers), source("registers")),
        ("warp size", str(arch.warp_size), source("warp_size")),
        ("fp8 dtypes that compile", ", ".join(sorted(arch.fp8)), source("fp8")),
        ("programmatic dependent launch", "yes" if arch.pdl else "no", source("pdl")),
    ]
    for row in arch.mma:
        sums = row.accumulator
        value = f"{sums.inner} products a step, {sums.fraction_bits} fraction bits"
        value += f", operands rounded to {sums.operand_bits} bits" if sums.operand_bits else ""
        rows.append((f"{row.instruction or 'MMA'} {row.operands}", value, row.source))
    return rows
