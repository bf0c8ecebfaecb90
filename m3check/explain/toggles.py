"""What makes a failure go away: the same call once more with one thing made simple."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from m3check.types import OPS, SPARSE, Inputs, M3CheckError, Status, blocks

if TYPE_CHECKING:
    from m3check.explain.stages import Trouble
    from m3check.paging import World
    from m3check.runner import Session

FILLED = {"interpreted": 64, "device": 1024}
"""(query token, KV head) programs from which on nobody splits a list: our kernels stop at 64 interpreted, 512 on a device,
vLLM's at 512 rows."""


@dataclass(frozen=True)
class Toggle:
    """One thing made simple."""

    name: str
    clears: bool | None
    """None: it does not apply, or was not tried."""
    words: str = ""


def tried(trouble: Trouble, session: Session) -> list[Toggle]:
    """Every toggle that applies, and whether the failure stays."""
    found = []
    for name in fitting(trouble.inputs.case.op):
        make = _TOGGLES[name]
        try:
            made = make(trouble, session)
        except M3CheckError as error:
            made = str(error)
        if isinstance(made, str):
            found.append(Toggle(name, None, made))
            continue
        found.append(Toggle(name, *_outcome(trouble, session, *made)))
    found.append(_dependent(trouble, session))
    return found


def _outcome(trouble: Trouble, session: Session, inputs: Inputs, world: World) -> tuple[bool | None, str]:
    from m3check import runner

    refusal = session.loaded.refuses(inputs.case)
    if refusal is not None:
        return None, refusal
    try:
        run = runner.call(trouble.kernel, inputs, session, world)
    except runner.KernelRaised as error:
        return False, f"raises: {error}"
    findings = runner.Judge(inputs, trouble.setting)(inputs, run)
    red = next((finding for finding in findings if finding.status is Status.FAILED), None)
    return (True, "") if red is None else (False, red.check)


def fitting(op: str) -> tuple[str, ...]:
    """The toggles that mean something for an op."""
    if op in SPARSE:
        return tuple(_TOGGLES)
    whole = OPS[op].phase == "mixed" or op in ("index_insert", "page16_rebase")  # a part of the batch is another problem
    layout = OPS[op].family in ("latent", "logits", "insert")
    fits = {"contiguous pages": True, "plain layout": layout, "one query a request": not whole, "one request": not whole}
    return ("called again, eagerly", *(name for name, does in fits.items() if does))


Made = tuple[Inputs, "World"] | str


def one_split(trouble: Trouble, session: Session) -> Made:
    """Padded requests fill the batch, so that no list is cut into parts."""
    from m3check.checks.invariants.regroup import Part, assembled

    inputs = trouble.inputs
    case = inputs.case
    if OPS[case.op].phase != "decode":
        return "only decode kernels split"
    rows = FILLED[session.evidence] // case.kv_heads + 1
    requests = list(case.requests())
    more = max(0, -(-(rows - case.total_queries) // requests[0].query_len))
    if not more:
        return "the batch is so large that nothing is split"
    parts = [*(Part.whole(r) for r in requests), *([Part(requests[0], 0, requests[0].query_len, 0)] * more)]
    return assembled(inputs, parts)[0], trouble.world


def contiguous(trouble: Trouble, session: Session) -> Made:
    """Pages lie in order, as after a fresh start."""
    if trouble.inputs.case.op == "index_topk":
        return "it reads no pages"
    return trouble.inputs, replace(trouble.world, contiguous=True)


def plain_layout(trouble: Trouble, session: Session) -> Made:
    """Heads before tokens, one layer alone."""
    if (trouble.world.layout or trouble.inputs.case.layout) == "hnd":
        return "the layout is plain already"
    return trouble.inputs, replace(trouble.world, layout="hnd", odd_strides=False)


def wide_cache(trouble: Trouble, session: Session) -> Made:
    """The cache holds the dequantised values in the queries' dtype."""
    from m3check import reference

    inputs, case = trouble.inputs, trouble.inputs.case
    if inputs.k is None or inputs.k.element_size() > 1:
        return "the main cache is not fp8"
    plain = reference.dequantised(inputs, "rounded")
    return replace(plain, case=replace(case, cache_dtype=case.dtype, scales="none")), trouble.world


def every_block(trouble: Trouble, session: Session) -> Made:
    """topk is as large as the context: every visible block is listed."""
    import torch

    from m3check.hypotheses.geometry import positions

    inputs, case = trouble.inputs, trouble.inputs.case
    most = blocks(case.context)
    if inputs.topk_idx is not None:
        position = torch.tensor(positions(case), device=inputs.topk_idx.device)[:, None]
        block = torch.arange(most, device=position.device, dtype=torch.int32)
        lists = torch.where(block * 128 <= position, block, -1).int().expand(case.kv_heads, -1, -1).contiguous()
        if torch.equal(lists, inputs.topk_idx):
            return "every block is listed already"
        return replace(inputs, case=replace(case, topk=most, ids="ascending"), topk_idx=lists), trouble.world
    if "topk" not in _reads(case.op) or case.topk >= most:
        return "nothing is selected" if "topk" not in _reads(case.op) else "topk reaches every block already"
    return replace(inputs, case=replace(case, topk=most)), trouble.world


def one_query(trouble: Trouble, session: Session) -> Made:
    """The last query of each request alone."""
    from m3check.checks.invariants.regroup import Part, assembled

    requests = [r for r in trouble.inputs.case.requests() if r.query_len and r.kv_len]
    if all(r.query_len == 1 for r in requests):
        return "every request has one query"
    parts = [Part.up_to(r, r.query_len - 1, r.query_len) for r in requests]
    return assembled(trouble.inputs, parts)[0], trouble.world


def one_request(trouble: Trouble, session: Session) -> Made:
    """The longest request alone."""
    from m3check.checks.invariants.regroup import Part, assembled

    requests = [r for r in trouble.inputs.case.requests() if r.query_len and r.kv_len]
    if len(requests) < 2:
        return "there is one request"
    longest = max(requests, key=lambda r: r.kv_len)
    return assembled(trouble.inputs, [Part.whole(longest)])[0], trouble.world


def again(trouble: Trouble, session: Session) -> Made:
    """The same call once more."""
    return trouble.inputs, trouble.world


def _reads(op: str) -> frozenset[str]:
    from m3check.cases.validity import READS

    return READS[op]


def _dependent(trouble: Trouble, session: Session) -> Toggle:
    name, switch = "dependent launch off", session.loaded.dependent_launch
    if session.evidence != "device":
        return Toggle(name, None, "needs a device; interpreted launches run one after another")
    if switch is None:
        return Toggle(name, None, "these kernels do not use it")
    switch(False)
    try:
        return Toggle(name, *_outcome(trouble, session, trouble.inputs, trouble.world))
    finally:
        switch(True)


_TOGGLES: dict[str, Callable[[Trouble, Session], Made]] = {
    "called again, eagerly": again,
    "one split": one_split,
    "contiguous pages": contiguous,
    "plain layout": plain_layout,
    "cache in the queries' dtype": wide_cache,
    "topk >= blocks": every_block,
    "one query a request": one_query,
    "one request": one_request,
}


def telling(toggles: list[Toggle]) -> Iterator[Toggle]:
    """Those that clear the failure."""
    return (toggle for toggle in toggles if toggle.clears)
