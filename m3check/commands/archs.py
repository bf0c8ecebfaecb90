"""`m3check archs`: the hardware targets as m3check knows them, with the source of each figure."""

from __future__ import annotations

import argparse

from m3check.arch import ARCHS, Accumulator, Arch, present
from m3check.commands.talk import emit
from m3check.config import choose
from m3check.dispatch import LATEST, SOURCE, not_run
from m3check.dispatch import rows as dispatched


def main(arguments: argparse.Namespace) -> int:
    """Print all targets in a table, or one in full: what each figure means and where it is from, what production runs."""
    from tabulate import tabulate

    here = {name for _, name in present()}
    if arguments.explain is None:
        rows = [(*_row(arch), "yes" if arch.name in here else "") for arch in ARCHS.values()]
        headers = ["arch", "product", "shared memory", "registers", "warps", "fp8 compiles", "fp8 native", "PDL",
                   "sums of 16-bit", "sums of fp8", "here"]  # fmt: skip
        emit(tabulate(rows, headers=headers, tablefmt="plain", disable_numparse=True))
        return 0
    choose("arch", arguments.explain, ARCHS)
    arch = ARCHS[arguments.explain]
    figures = _figures(arch, arch.name in here)
    emit(tabulate(figures, headers=["figure", "value", "what it means", "source"], tablefmt="plain", disable_numparse=True))
    runs = [
        (op, row.name, row.when, row.file, not_run(row, arch.name) if row.needs else "vllm")
        for op, row in dispatched(arch.name)
    ]
    heads = ["op", f"vLLM {'.'.join(map(str, LATEST))} runs", "when", "file below vllm/", "provider"]
    emit(f"\n{tabulate(runs, headers=heads, tablefmt='plain', disable_numparse=True)}\n\n{SOURCE}")
    return 0


def _row(arch: Arch) -> tuple[str, ...]:
    native = _dtypes(arch.fp8_native)
    return (
        arch.name,
        arch.product,
        f"{arch.shared_memory // 1024} KB",
        str(arch.registers),
        f"{arch.warps} × {arch.warp_size}",
        _dtypes(arch.fp8),
        native or "none",
        "yes" if arch.pdl else "",
        _bits(arch, "16"),
        _bits(arch, "fp8") if native else "as 16-bit",
    )


def _dtypes(names: frozenset[str]) -> str:
    return " ".join(sorted(word.removeprefix("fp8_") for word in names))


def _bits(arch: Arch, operands: str) -> str:
    """Fraction bits by instruction: `wgmma 13, mma 13`, in one word where all are alike."""
    told = {row.instruction: row.accumulator.fraction_bits for row in arch.rows(operands)}
    if len(set(told.values())) == 1:
        return f"{next(iter(told.values()))} bits"
    return ", ".join(f"{name} {bits}" for name, bits in told.items())


def _figures(arch: Arch, here: bool) -> list[tuple[str, str, str, str]]:
    """(figure, value, meaning, source) of one target."""
    source = arch.sources
    smallest = arch.shared_memory_unit
    told = [
        ("arch", arch.name, f"{arch.vendor}: {arch.product}", ""),
        ("here", "yes" if here else "no", "whether this machine has one", "the driver of this machine"),
        ("capability", ".".join(map(str, arch.capability)), "what kernels ask the platform for", source["capability"]),
        (
            "multiprocessors",
            str(arch.multiprocessors),
            "compute units of the first product; grids are sized by them",
            source["multiprocessors"],
        ),
        (
            "shared memory",
            f"{arch.shared_memory} bytes",
            "one block may use; more does not launch",
            source["shared_memory"],
        ),
        ("  of a multiprocessor", f"{smallest} bytes", "all its resident blocks together", source["shared_memory"]),
        ("registers", str(arch.registers), "32-bit, of one thread; more spill to memory", source["registers"]),
        ("  of a multiprocessor", str(arch.registers_unit), "all its resident threads together", source["registers"]),
        ("warp", str(arch.warp_size), "threads that step together", source["warp_size"]),
        ("warps", str(arch.warps), "resident on a multiprocessor, at most", source["warps"]),
        (
            "fp8 that compiles",
            _dtypes(arch.fp8),
            "a case in another dtype is skipped; bf16, fp16, fp32 compile",
            source["fp8"],
        ),
        (
            "fp8 native",
            _dtypes(arch.fp8_native) or "none",
            "multiplied as they are; others are widened",
            source["fp8_native"],
        ),
        ("PDL", "yes" if arch.pdl else "no", "programmatic dependent launch", source["pdl"]),
    ]
    return told + [
        (f"{row.instruction} {row.operands}", _value(row.accumulator), _meaning(row.accumulator), row.source)
        for row in arch.mma
    ]


def _value(sums: Accumulator) -> str:
    return "fp32" if sums.fraction_bits is None else f"{sums.fraction_bits} fraction bits, {sums.inner} products a step"


def _meaning(sums: Accumulator) -> str:
    if sums.fraction_bits is None:
        return "a rounding to nearest at every addition, in any order"
    words = (
        f"what lies below is cut; the sum is {'rounded to nearest' if sums.nearest else 'cut'} to {sums.output_bits} bits"
    )
    return words + (f"; operands are cut to {sums.operand_bits} significand bits" if sums.operand_bits else "")
