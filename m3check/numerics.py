"""How precisely kernels add up, measured and held against the table of targets: `python -m m3check.numerics --arch ARCH`.

The probe runs score kernels on a few cases, on the target's GPU where this machine has one, else interpreted, and prints
their effective bits (`checks.sums`) beside those of a simulation of the instruction that ran, on the same numbers. It then
simulates every instruction of the target, which needs no GPU. docs/numerics.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from m3check.arch import ARCHS, Accumulator, Arch, find_arch

if TYPE_CHECKING:
    from torch import Tensor

    from m3check.runner import Session
    from m3check.types import Inputs

SHAPES = ("index_score/q=64,kv=2304", "index_decode_score/q=1x2,kv=2304+1500", "index_decode_score/q=8x2,kv=2304+1500")
DTYPES = ("bf16", "fp16", "fp32", "fp8_e4m3fn", "fp8_e5m2")
NUMBERS = ("gauss", "wide", "one sign")
"""Fills, and `gauss` without its signs: what truncation cuts off then adds up instead of cancelling."""

CLOSE = 1.0
"""Bits that a measurement may be away from the simulation: the order of channels and of steps is the kernel's own."""


@dataclass(frozen=True)
class Measured:
    """One kernel on one case."""

    provider: str
    case: str
    numbers: str
    by: str
    bits: float | None
    """Effective bits; None where no error was seen."""
    simulated: float | None
    """Those of the instruction as the table describes it; None for fp32, whose order of additions is not fixed, or for no
    error."""
    bound: float
    """The least that the bound allows."""

    @property
    def verdict(self) -> str:
        """`yes` where the measurement is near the simulation, `finer` above it, `NO` below it or beyond the bound."""
        if self.bits is None:
            return "yes" if self.simulated is None else "finer"
        if self.bits < self.bound or (self.simulated is not None and self.bits < self.simulated - CLOSE):
            return "NO"
        return "finer" if self.simulated is not None and self.bits > self.simulated + CLOSE else "yes"


def added_up(a: Tensor, b: Tensor, how: Accumulator, start_from: Tensor | None = None) -> Tensor:
    """a [m, D] times b [n, D] transposed in fp64, added to 0 or to [m, n] as an instruction does: align, cut, add, cut."""
    import torch

    assert how.fraction_bits is not None
    a, b = a.double(), b.double()
    if how.operand_bits is not None:
        a, b = _cut(a, how.operand_bits - 1), _cut(b, how.operand_bits - 1)
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float64, device=a.device) if start_from is None else start_from
    for start in range(0, a.shape[1], how.inner):
        left, right = a[:, None, start : start + how.inner], b[None, :, start : start + how.inner]
        terms = torch.cat([total[..., None], left * right], -1)
        # A product's place is the sum of its factors' exponents, before its significand is brought below 2.
        places = torch.cat([_exponents(total)[..., None], _exponents(left) + _exponents(right)], -1)
        unit = torch.exp2((places.amax(-1, keepdim=True) - how.fraction_bits).double())
        total = ((terms / unit).trunc() * unit).sum(-1)
        total = total.float().double() if how.nearest else _cut(total, how.output_bits)
    return total


def _exponents(x: Tensor) -> Tensor:
    import torch

    return torch.where(x == 0, -1000, torch.frexp(x)[1] - 1)


def _cut(x: Tensor, bits: int) -> Tensor:
    import torch

    unit = torch.exp2((_exponents(x) - bits).double())
    return torch.where(x == 0, 0.0, (x / unit).trunc() * unit)


def simulated_scores(problem: Inputs, how: Accumulator) -> Tensor:
    """Block scores [H, T, K] fp32 of a kernel that adds up as `how` says; -inf for blocks that a row does not see."""
    import torch

    case, queries, keys = problem.case, problem.idx_q, problem.idx_k
    assert queries is not None
    assert keys is not None
    result = torch.full((case.kv_heads, case.total_queries, case.block_columns), -torch.inf, device=queries.device)
    for request in case.requests():
        own = keys[request.tokens]
        for i in range(request.query_len):
            seen = own[: max(0, request.position(i) + 1)]
            if not len(seen):
                continue
            sums = added_up(queries[request.query_start + i], seen, how).float()  # [H, n]
            for block, part in enumerate(sums.split(128, dim=1)):
                result[:, request.query_start + i, block] = part.amax(1)
    return result


def probes(shapes: Sequence[str] = SHAPES, dtypes: Sequence[str] = DTYPES) -> Iterator[tuple[str, str]]:
    """(case id, numbers) of the probe; `one sign` is the case of `gauss` with other inputs."""
    for shape in shapes:
        for dtype in dtypes:
            words = shape if dtype == "bf16" else f"{shape},dtype={dtype},cache={dtype}"
            for numbers in NUMBERS:
                yield f"{words},fill=wide" if numbers == "wide" else words, numbers


def made(name: str, numbers: str, device: str) -> Inputs:
    """The logical inputs of a probe."""
    from m3check import cases

    inputs = cases.make_inputs(cases.parse_id(name), device)
    if numbers != "one sign":
        return inputs
    q, k = inputs.idx_q, inputs.idx_k
    assert q is not None
    assert k is not None
    return replace(inputs, idx_q=q.float().abs().to(q.dtype), idx_k=k.float().abs().to(k.dtype))


def measure(session: Session, provider: str, due: Iterable[tuple[str, str]]) -> Iterator[Measured]:
    """The probe on one provider's kernels; cases that it refuses are left out."""
    from m3check import cases as case_module
    from m3check import reference, runner
    from m3check.checks import Setting
    from m3check.checks.scores import margins
    from m3check.checks.sums import effective_bits, sizes

    for name, numbers in due:
        case = case_module.parse_id(name)
        if session.loaded.refuses(case) is not None:
            continue
        kernel = session.loaded.kernel(case.op, case)
        assert kernel is not None
        inputs = made(name, numbers, session.device)
        run = runner.call(kernel, inputs, session)
        problem = reference.dequantised(inputs, "rounded")
        expected = reference.expected(problem)
        assert run.arithmetic is not None
        how = run.arithmetic.score
        score = run.outputs["score"]
        limits = margins(problem, how, Setting(profile=kernel.profile, evidence=session.evidence), score.device)
        size = sizes(problem, score.device)
        worst = (limits.double() / size.clamp(min=1e-300)).where(size > 0, 0.0).max().item()
        model = None if how.fraction_bits is None else effective_bits(problem, simulated_scores(problem, how), expected)
        bits = effective_bits(problem, score, expected)
        yield Measured(provider, name, numbers, how.origin, bits, model, -math.log2(worst))


def simulate(arch: Arch) -> list[tuple[str, str, str]]:
    """(instruction, fraction bits, effective bits by numbers) of every matrix instruction of a target."""
    from m3check import reference
    from m3check.checks.sums import effective_bits

    dtypes = {"16": "bf16", "tf32": "fp32", "fp8": "fp8_e4m3fn"}
    rows = []
    for row in arch.mma:
        if row.accumulator.fraction_bits is None:
            continue
        told = []
        for name, numbers in probes(SHAPES[1:2], [dtypes[row.operands]]):
            problem = reference.dequantised(made(name, numbers, "cpu"), "rounded")
            bits = effective_bits(problem, simulated_scores(problem, row.accumulator), reference.expected(problem))
            told.append(f"{numbers} {_power(bits)}")
        rows.append((f"{row.instruction} {row.operands}", str(row.accumulator.fraction_bits), ", ".join(told)))
    return rows


def main(words: Sequence[str] | None = None) -> int:
    """Print both tables; 1 where a measurement is beyond its bound or coarser than the simulation."""
    from tabulate import tabulate

    parser = argparse.ArgumentParser(prog="python -m m3check.numerics", description=__doc__)
    parser.add_argument("--arch", required=True, choices=tuple(ARCHS))
    parser.add_argument("--kernels", nargs="+", default=["triton"], metavar="SPEC")
    parser.add_argument("--offline", action="store_true")
    arguments = parser.parse_args(words)
    arch = find_arch(arguments.arch)
    evidence, device, why = _place(arch)
    found: list[Measured] = []
    for text in arguments.kernels:
        found += measure(_session(text, arch, evidence, device, arguments.offline), text, probes())
    print(f"{evidence}: {why}")
    rows = [(m.provider, m.case, m.numbers, m.by, _power(m.bits), _simulated(m), _power(m.bound), m.verdict) for m in found]
    headers = ["provider", "case", "numbers", "summed by", "measured", "simulated", "bound", "agrees"]
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))
    print(f"\nEvery matrix instruction of {arch.name}, simulated:\n")
    print(tabulate(simulate(arch), headers=["instruction", "fraction bits", "effective"], tablefmt="github"))
    return 0 if found and all(m.verdict != "NO" for m in found) else 1


def _power(bits: float | None) -> str:
    return "exact" if bits is None else f"2^-{bits:.1f}"


def _simulated(found: Measured) -> str:
    return "–" if found.by == "fp32" else _power(found.simulated)


def _place(arch: Arch) -> tuple[Any, str, str]:
    """(evidence, torch device, why); the interpreter is switched on before anything imports triton."""
    from m3check import runner

    evidence, index, why = runner.evidence_for(arch)
    if evidence == "device":
        return evidence, f"cuda:{index}", why
    os.environ["TRITON_INTERPRET"] = "1"
    from m3check import interpret

    interpret.install()
    return evidence, "cpu", why


def _session(text: str, arch: Arch, evidence: Any, device: str, offline: bool) -> Session:
    from m3check import kernels, runner

    spec = kernels.parse_spec(text)
    kernels.prepare(spec, offline)
    return runner.Session(arch, evidence, device, kernels.load(spec, arch, evidence, offline))


if __name__ == "__main__":
    sys.exit(main())
