"""Judges what was compiled: that it compiles, fits into the target, and how. A finding names one variant of one kernel.

Limits are the target's own. Triton's autotuner leaves out candidates that trip over a static_assert, that ptxas refuses or
that need more than there is; so does this, and only a kernel without any candidate left is red.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from m3check.arch import Arch, operands_of
from m3check.compiled.build import Built
from m3check.compiled.capture import Launch, Specialisation
from m3check.compiled.figures import Figures
from m3check.types import DTYPES, Case, Finding, Status

LEFT_OUT = frozenset({"CompileTimeAssertionFailure", "PTXASError", "OutOfResources"})
"""Errors on which Triton's autotuner goes on without the candidate."""

TENSOR_MEMORY = 512
"""Columns of tensor memory of a multiprocessor that has it (PTX ISA, tcgen05.alloc)."""

THREADS = 1024
"""Threads that a block may have, on every target."""


@dataclass(frozen=True)
class Variant:
    """One compiled specialisation under the name that findings give it."""

    found: Specialisation
    built: Built

    @property
    def name(self) -> str:
        """Kernel, launch options and the beginning of its hash, so that a report can count variants."""
        options = self.found.options
        return f"{self.found.name} #{self.built.key[:8]} warps={options.num_warps} stages={options.num_stages}"

    @property
    def constants(self) -> str:
        """Its constants and the types of its pointers, which tell it from its siblings."""
        signature = self.found.source.signature
        words = [f"{name}={kind}" for name, kind in signature.items() if isinstance(kind, str) and kind.startswith("*")]
        names = list(signature)
        for path, value in self.found.source.constants.items():
            if len(path) == 1 and value is not None and not isinstance(value, str):
                words.append(f"{names[path[0]]}={value}")
        return " ".join(words)


def judge(launches: Sequence[Launch], outcomes: Mapping[int, Built], arch: Arch, case: Case) -> list[Finding]:
    """Findings on all launches of a case; `outcomes` is by id() of the specialisation."""
    found: list[Finding] = []
    names: dict[str, set[str]] = {}
    for launch in launches:
        variants = [Variant(each, outcomes[id(each)]) for each in launch.candidates]
        names.setdefault(variants[0].found.name, set()).update(v.built.key for v in variants)
        judged = [_variant(variant, arch, case) for variant in variants]
        if launch.tuned and any(_loads(each) for each in judged):
            kept = [each for v, each in zip(variants, judged, strict=True) if _loads(each) or not _left_out(v, each)]
        else:
            kept = judged
        found += [finding for each in kept for finding in each]
    told = list({(f.check, f.where, f.status): f for f in found}.values())
    counted = ", ".join(f"{name} ×{len(keys)}" if len(keys) > 1 else name for name, keys in names.items())
    if not any(f.check == "compiles" for f in told):
        told.insert(0, Finding("compiles", Status.PASSED, where=counted))
    return told


def loads(candidate: Specialisation, built: Built, arch: Arch, case: Case) -> bool:
    """Whether an autotuner could take a candidate: nothing about it is red."""
    return _loads(_variant(Variant(candidate, built), arch, case))


def _loads(findings: Iterable[Finding]) -> bool:
    return all(f.status is not Status.FAILED for f in findings)


def _left_out(variant: Variant, findings: Iterable[Finding]) -> bool:
    """Whether Triton's autotuner goes on without it."""
    return variant.built.figures is not None or variant.built.kind in LEFT_OUT


def _variant(variant: Variant, arch: Arch, case: Case) -> list[Finding]:
    built = variant.built
    if built.figures is None:
        hint = f"does not compile for {arch.name}: {built.error}; variant {variant.name} {variant.constants}"
        return [Finding("compiles", Status.FAILED, 1.0, 0.0, f"{variant.found.name} at {built.where}", hint)]
    figures = built.figures
    return [
        _shared(variant, figures, arch),
        *([_tensor_memory(variant, figures)] if figures.tensor_memory else []),
        *_occupancy(variant, figures, arch),
        _spills(variant, figures, arch),
        Finding("matrix", Status.PASSED, where=variant.name, hint=_matrix(figures, case)),
    ]


def _shared(variant: Variant, figures: Figures, arch: Arch) -> Finding:
    needs, allowed = figures.shared, arch.shared_memory
    if needs <= allowed:
        return Finding("shared_memory", Status.PASSED, float(needs), float(allowed), variant.name)
    hint = (
        f"needs {needs:,} bytes of shared memory, {arch.name} allows {allowed:,}: it will not launch; "
        f"take fewer num_stages or smaller tiles ({variant.constants})"
    )
    return Finding("shared_memory", Status.FAILED, float(needs), float(allowed), variant.name, hint)


def _tensor_memory(variant: Variant, figures: Figures) -> Finding:
    needs = figures.tensor_memory
    if needs <= TENSOR_MEMORY:
        return Finding("tensor_memory", Status.PASSED, float(needs), float(TENSOR_MEMORY), variant.name)
    hint = f"needs {needs} columns of tensor memory, there are {TENSOR_MEMORY}: it will not launch; take smaller tiles"
    return Finding("tensor_memory", Status.FAILED, float(needs), float(TENSOR_MEMORY), variant.name, hint)


def _spills(variant: Variant, figures: Figures, arch: Arch) -> Finding:
    """Red where a thread keeps more outside its registers than it can hold inside: it needs over twice what there is.

    Spilling is slow, not wrong, so that fewer bytes are a figure in the report, and from half of its registers on a note.
    """
    room = 4 * arch.registers
    limit = float(room)
    if figures.spilled * 2 <= room:
        return Finding("spills", Status.PASSED, float(figures.spilled), limit, variant.name)
    status = Status.NOTED if figures.spilled <= room else Status.FAILED
    hint = (
        f"{figures.spilled:,} bytes of each thread do not fit into its registers (at most {arch.registers} of 4 bytes on "
        f"{arch.name}) and go through memory; take smaller tiles or more num_warps"
    )
    return Finding("spills", status, float(figures.spilled), limit, variant.name, hint)


def resident_blocks(figures: Figures, arch: Arch) -> int:
    """How many blocks of a kernel run on one multiprocessor at once, by registers, shared memory and warps."""
    reserved = arch.shared_memory_unit - arch.shared_memory  # NVIDIA takes some for itself with each block
    shared = figures.shared + reserved
    by_shared = arch.shared_memory_unit // shared if shared else arch.blocks
    if arch.vendor == "amd":  # each of four SIMDs has registers for its own waves, in portions of 8
        warps = 4 * (arch.registers // max(8, -(-figures.registers // 8) * 8))
    else:  # a warp takes registers in portions of 256
        warps = arch.registers_unit // (-(-max(1, figures.registers) * arch.warp_size // 256) * 256)
    return min(by_shared, min(warps, arch.warps) // figures.warps, arch.blocks)


def _occupancy(variant: Variant, figures: Figures, arch: Arch) -> list[Finding]:
    """Registers of a thread, and the share of a multiprocessor's warps that run at once."""
    registers = Finding("registers", Status.PASSED, float(figures.registers), float(arch.registers), variant.name)
    threads = figures.warps * arch.warp_size
    if threads > THREADS:
        hint = f"a block has {threads} threads, {arch.name} allows {THREADS}: it will not launch; take fewer num_warps"
        return [registers, Finding("occupancy", Status.FAILED, float(threads), float(THREADS), variant.name, hint)]
    blocks = resident_blocks(figures, arch)
    if not blocks and figures.shared <= arch.shared_memory:
        hint = (
            f"{threads} threads with {figures.registers} registers each are more than a multiprocessor of {arch.name} has: "
            "it will not launch; take fewer num_warps"
        )
        return [registers, Finding("occupancy", Status.FAILED, float(threads), float(THREADS), variant.name, hint)]
    running = blocks * figures.warps
    return [
        registers,
        Finding("occupancy", Status.PASSED, float(running), float(arch.warps), variant.name, f"{blocks} blocks"),
    ]


def _matrix(figures: Figures, case: Case) -> str:
    """The matrix instructions that were emitted, and what became of fp8."""
    if not figures.matrix:
        return ""
    told = " ".join(figures.matrix)
    words = {case.dtype, case.cache_dtype, case.index_cache_dtype}
    if any(word in DTYPES and word.startswith("fp8") for word in words):
        native = any(operands_of(each) == "fp8" for each in figures.matrix)
        told += " (fp8 native)" if native else " (fp8 upcast)"
    return told
