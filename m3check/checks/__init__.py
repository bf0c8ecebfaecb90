"""What must hold: each check judges a kernel's outputs, with limits that are derived from the arithmetic and never tuned.

`CHECKS` is the list; `compare` runs those that apply. Every check gives a finding also where it passes, with what was
measured and the limit, so that a report can show how near correct kernels come. docs/bounds.md has the derivations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from m3check.checks import (
    accesses,
    attention,
    edges,
    finite,
    inserted,
    integrity,
    logits,
    logsumexp,
    metadata,
    mixed,
    pages,
    probes,
    scores,
    selection,
)
from m3check.checks.setting import Setting
from m3check.checks.view import View
from m3check.paging import Run
from m3check.types import OPS, Finding, Inputs, Outputs, Status

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CHECKS", "Check", "Setting", "compare", "refuses"]


@dataclass(frozen=True)
class Check:
    """One property that an output must have."""

    name: str
    output: str  # which output it reads; "" for the memory around all of them
    catches: str
    blind: str
    run: Callable[[View], list[Finding]]
    beyond: bool = False  # whether it looks at cells past the logical shape, of which an empty output may have some


CHECKS: tuple[Check, ...] = (
    Check("metadata", "", "a batch split or counted wrongly, row starts not rebased, other pages, lengths in memory that "
          "moves", "attributes by other names", metadata.check_metadata),
    Check("handover", "", "ids or scores in other rows of a persistent buffer, in another layout, or outside it",
          "implementations that return nothing", mixed.check_handover),
    Check("waits", "", "host code of a decode batch that waits for the device", "waits inside kernels and libraries",
          mixed.check_waits),
    Check("finite_score", "score", "NaN, unwritten or overflown cells", "finite wrong values", finite.check_scores),
    Check("edges", "score", "which key gave a block its maximum (fill=edge_up, edge_down)", "keys inside a block",
          edges.check_edges),
    Check("score", "score", "a key lost from a maximum; a wrong key, scale, head or precision",
          "a lost key that is not its block's maximum", scores.check_values),
    Check("invisible_score", "score", "a causal mask off by a block", "memory that was not filled",
          scores.check_invisible),
    Check("ids", "ids", "duplicate, invisible, unwritten ids; -1 inside", "which valid ids were chosen",
          selection.check_structure),
    Check("selection", "ids", "a better block left out; forcing; promised ties and order",
          "blocks closer than the rounding of scores that nobody saw", selection.check_optimality),
    Check("finite", "out", "NaN and infinities: unwritten rows, poison read", "finite garbage", finite.check_output),
    Check("dead_row", "out", "rows without a valid block that are not zero", "live rows", finite.check_dead),
    Check("membership", "out", "which tokens were attended, how often (fill=membership)", "weights; q and k",
          probes.check_membership),
    Check("needle", "out", "a token that has all the weight not read, or another one (fill=needle)", "all other tokens",
          probes.check_needle),
    Check("two_keys", "out", "base of the exponential, softmax scale, merge (fill=two_keys)", "all other tokens",
          probes.check_two_keys),
    Check("element", "out", "any single wrong element", "errors below the rounding of one element",
          attention.check_elements),
    Check("row", "out", "rows that are a little wrong everywhere", "errors below about 1.5 σ of each element",
          attention.check_rows),
    Check("token", "out", "a token or block lost, doubled, or seen too early", "tokens whose weight is below the noise",
          attention.check_tokens),
    Check("scale", "out", "another softmax scale, a factor on the output", "changes below the noise of a row",
          attention.check_scale),
    Check("context", "context", "tokens too many or too few behind a table of pages", "which pages they are in",
          pages.check_context),
    Check("pages", "pages", "a page missing, doubled, of another block or request; a cut that is not the query's own block",
          "the order of whole pages", pages.check_pages),
    Check("index_keys", "index_keys", "a key in no slot, or in another's; another rounding",
          "what tokens without a slot write (guards see that)", pages.check_exact("index_keys")),
    Check("slots", "slots", "a slot of another token; a token without a slot that gets one", "which page a block has",
          pages.check_exact("slots")),
    Check("blocks", "blocks", "a page id of another block", "columns past a request's last block",
          pages.check_exact("blocks")),
    Check("counter", "counter", "counters that a launch leaves behind for the next", "the count itself",
          pages.check_counter),
    Check("logits", "logits", "a key, head, weight or scale wrong or lost; relu; rows exchanged; precision",
          "errors below the rounding of the accumulator", logits.check_values),
    Check("outside", "logits", "a window off by one; cells left unwritten, which a top-k would take", "visible cells",
          logits.check_outside, beyond=True),
    Check("lse", "lse", "base of the logsumexp, a part lost in it, dead rows that weigh something", "errors below the "
          "rounding of weights", logsumexp.check_lse),
    Check("turned", "k", "norm and rotation of queries, keys and index heads: weight, eps, halves, position, head, dtype",
          "mistakes below the rounding of what is stored", inserted.check_rows),
    Check("inserted", "cached_k", "what stands at the slots of a batch: key and value, slot, head, rounding to fp8 codes",
          "other cells of a cache (guards see those)", inserted.check_cached),
    Check("identity", "cached_k", "a scale in what an fp8 cache holds, which no reader takes out again",
          "scales nearer to 1 than many roundings show", inserted.check_identity),
    Check("memory", "", "any address outside a tensor, in a page of nobody, never written, or raced for (interpreted)",
          "tensors beyond 1 GB; a read of the wrong cell", accesses.check_memory),
    Check("guards", "", "writes around and between the rows of a buffer", "memory that nobody watches",
          integrity.check_guards),
    Check("given", "", "a result that is returned, and not in the buffer that was given for it", "buffers never given",
          integrity.check_given),
    Check("inputs", "", "writes into inputs", "a value written back unchanged", integrity.check_inputs),
    Check("padding", "", "writes past the last block of a fresh result", "results whose memory was not filled",
          integrity.check_beyond),
)  # fmt: skip


def compare(
    problem: Inputs,
    run: Run,
    expected: Outputs,
    setting: Setting,
    expected_on: Callable[[Tensor], Outputs] | None = None,
) -> list[Finding]:
    """Judge one result.

    `problem` has been through `reference.dequantised`; `expected` is the reference's answer on it, in fp64. A chain's
    attention is judged on the kernel's own selection: `expected_on(ids)` gives the attention on any ids. Where a chain
    fails, every failed finding names the first op of the chain that is to blame.

    `run.outputs` have the shapes of `types.Outputs`, on the device of `problem`; outputs that are not there are not
    judged. Never raises for what a kernel gave: another shape is refused before, by `kernels.contract`.
    """
    view = View(OPS[problem.case.op], problem, run, expected, setting, expected_on)
    findings: list[Finding] = []
    own = {name for op in (view.op.name, *view.op.chain) for name in OPS[op].outputs}
    guilty = ""
    for check in CHECKS:
        if check.output and check.output not in run.outputs:
            continue
        if check.output and not run.outputs[check.output].numel() and not (check.beyond and check.output in run.beyond):
            continue
        new = check.run(view)
        if check.output and check.output not in own:  # scores of a selection: only what is wrong with them is told
            new = [finding for finding in new if finding.status is not Status.PASSED]
        if view.op.chain and not guilty and any(f.status is Status.FAILED for f in new):
            guilty = _stage(view, check.output)
        findings += new
    if guilty:
        blame = f"first guilty stage: {guilty}"
        findings = [replace(f, hint=f"{f.hint}; {blame}") if f.status is Status.FAILED else f for f in findings]
    return findings


def refuses(
    problem: Inputs,
    outputs: Outputs,
    expected: Outputs,
    setting: Setting,
    expected_on: Callable[[Tensor], Outputs] | None = None,
) -> bool:
    """Whether `compare` is red on outputs that came out of no memory. Those that are judged each by itself are looked at
    one after the other, the last first, until one is red: a logsumexp tells in no time what rows take long to.
    """
    own = {check.output for check in CHECKS}
    apart = not OPS[problem.case.op].chain and "ids" not in outputs and own.issuperset(outputs)
    parts = [{name: outputs[name]} for name in reversed(tuple(outputs))] if apart else [dict(outputs)]
    return any(
        finding.status is Status.FAILED
        for part in parts
        for finding in compare(problem, Run(part), expected, setting, expected_on)
    )


def _stage(view: View, output: str) -> str:
    """The op of a chain that gives an output; in a mixed batch each part has its own."""
    given = [op for op in view.op.chain if output in OPS[op].outputs]
    return " or ".join(given) or (view.op.chain[0] if output == "score" else view.op.name)
