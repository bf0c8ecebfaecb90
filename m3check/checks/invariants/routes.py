"""The same rows by another route: a prefill in chunks, drafts one token at a time, decode rows as prefill rows."""

from __future__ import annotations

from dataclasses import replace

from m3check.checks.invariants.regroup import Part, assembled, put_back
from m3check.checks.invariants.trial import Trial, damage
from m3check.paging import World
from m3check.types import Finding

PREFILL_OF = {
    "index_decode_score": "index_score",
    "sparse_attn_decode": "sparse_attn",
    "decode": "prefill",
    "paged_mqa_logits": "mqa_logits",
}


def chunked(trial: Trial) -> list[Finding]:
    """Each request's queries in two calls, the second with the first as its prefix."""
    early, late = [], []
    for request in trial.inputs.case.requests():
        cut = (request.query_len + 1) // 2
        if cut:
            early.append(Part.up_to(request, 0, cut))
        if cut < request.query_len:
            late.append(Part.up_to(request, cut, request.query_len))
    runs = []
    for parts in (early, late):
        inputs, rows = assembled(trial.inputs, parts)
        runs.append((trial.call(inputs, World()), rows))
    run = put_back(trial.first.outputs, runs)
    return [trial.same("chunked", "the prefill ran in two chunks", run, bitwise=False)]


def verify(trial: Trial) -> list[Finding]:
    """Every query token as a request of its own with one query: what decoding token by token would have given.

    Of a mixed batch the prefilled ones too, so that prefill and decode of a token must agree.
    """
    parts = [Part.up_to(r, i, i + 1) for r in trial.inputs.case.requests() for i in range(r.query_len)]
    inputs, rows = assembled(trial.inputs, parts)
    run = put_back(trial.first.outputs, [(trial.call(inputs, World()), rows)])
    return [trial.same("verify", "draft tokens ran as single decode rows", run, bitwise=False)]


def prefill(trial: Trial) -> list[Finding]:
    """The provider's prefill kernel on the same rows: both within their bounds of one answer."""
    assert trial.other is not None
    op = PREFILL_OF[trial.inputs.case.op]
    live = [r for r in trial.inputs.case.requests() if r.kv_len >= r.query_len > 0]
    inputs, _ = assembled(trial.inputs, [Part.whole(r) for r in live], op=op, max_query_len=0)
    run, findings = trial.other(op, inputs)
    change = f"the same rows went through {op}"
    broken = damage(run)
    if broken is not None:
        return [replace(broken, check="same_as_prefill", hint=f"{change}: {broken.hint}")]
    return [trial.worst("same_as_prefill", change, findings)]
