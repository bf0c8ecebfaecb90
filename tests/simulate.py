"""Kernels in torch that work as real ones do (online softmax, rounded p, split-K partials), right and wrong ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from m3check import cases, reference
from m3check.checks import Setting, compare
from m3check.paging import Run
from m3check.types import BLOCK, Case, Finding, Inputs, Profile, Status

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Style:
    """How a correct attention kernel may differ from another."""

    tile: int = 128
    splits: int = 1
    partials: torch.dtype | None = None  # None: fp32
    lse: bool = False  # normalise by 2^(m - lse) instead of by the sum
    natural: bool = False  # exp instead of exp2
    reverse: bool = False
    rounded_sum: bool = False  # sum p after it was rounded
    fp32_p: bool = False


@dataclass
class Edit:
    """What a wrong kernel does differently; all fields keep it right."""

    logits: Callable[[Tensor], Tensor] | None = None  # [T, H, G, n] natural logits after masking
    split: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None  # partial outputs [R, ...] and lse [R, ...]
    inputs: Callable[[Inputs], Inputs] | None = None
    scale: float = 1.0


RIGHT = Edit()


def rows_of(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """(position, kv_start, kv_len) of each row."""
    columns = [[], [], []]
    for r in case.requests():
        for i in range(r.query_len):
            for column, value in zip(columns, (r.position(i), r.kv_start, r.kv_len), strict=True):
                column.append(value)
    return tuple(torch.tensor(c) for c in columns)


def attention(problem: Inputs, ids: Tensor, style: Style = Style(), edit: Edit = RIGHT) -> Tensor:
    """[T, Hq, D] in the queries' dtype; ids [H, T, topk], those that are invalid are skipped."""
    if edit.inputs:
        problem = edit.inputs(problem)
    case, q, k, v = problem.case, problem.q, problem.k, problem.v
    position, start, _ = rows_of(case)
    token = (ids.long()[..., None] * BLOCK + torch.arange(BLOCK)).flatten(2).transpose(0, 1)  # [T, H, n]
    seen = (token >= 0) & (token <= position[:, None, None])
    source = (start[:, None, None] + token).where(seen, 0)
    head = torch.arange(case.kv_heads)[None, :, None]
    keys, values = k[source, head].float(), v[source, head].float()  # [T, H, n, D]
    queries = q.unflatten(1, (case.kv_heads, -1)).float()
    logits = (queries @ keys.mT) * torch.tensor(problem.sm_scale * edit.scale, dtype=torch.float32)
    if not style.natural:
        logits = (queries @ keys.mT) * torch.tensor(problem.sm_scale * edit.scale * LOG2E, dtype=torch.float32)
    logits = logits.masked_fill(~seen[:, :, None], -math.inf)
    if edit.logits:
        logits = edit.logits(logits)
    slots = ids.shape[-1]
    per = -(-slots // style.splits)
    parts = [
        _online(logits, values, s * per, min((s + 1) * per, slots), style, q.dtype)
        for s in range(style.splits)
        if s * per < slots
    ]
    outs, sums = zip(*parts, strict=True)
    out, lse = torch.stack(outs), torch.stack(sums)
    if style.splits == 1:
        return _round(out[0], q.dtype).flatten(1, 2)
    out = _round(out, style.partials or torch.float32).float()
    if edit.split:
        out, lse = edit.split(out, lse)
    power = torch.exp if style.natural else torch.exp2
    weight = power(lse - lse.amax(0))
    weight = weight / weight.sum(0)
    return _round((out * weight.nan_to_num(0)[..., None]).sum(0), q.dtype).nan_to_num(0).flatten(1, 2)


def _round(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


def _online(
    logits: Tensor, values: Tensor, first: int, last: int, style: Style, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(output fp32, log of the sum) over slots [first, last)."""
    power, log = (torch.exp, torch.log) if style.natural else (torch.exp2, torch.log2)
    m = torch.full(logits.shape[:-1], -math.inf)
    total, lse = torch.zeros(logits.shape[:-1]), m.clone()
    acc = torch.zeros(*logits.shape[:-1], values.shape[-1])
    tiles = [(a, min(a + style.tile, last * BLOCK)) for a in range(first * BLOCK, last * BLOCK, style.tile)]
    for a, b in reversed(tiles) if style.reverse else tiles:
        part = logits[..., a:b]
        new = torch.maximum(m, part.amax(-1))
        safe = new.where(new > -math.inf, 0)
        p = power(part - safe[..., None])
        alpha = power(m - safe)
        rounded = p if style.fp32_p else p.to(dtype).float()
        total = total * alpha + (rounded if style.rounded_sum else p).sum(-1)
        lse = safe + log(power(lse - safe) + (rounded if style.rounded_sum else p).sum(-1))
        acc = acc * alpha[..., None] + rounded @ values[:, :, a:b]
        m = new
    if style.lse:
        return (acc * power(m - lse)[..., None]).nan_to_num(0), lse
    return (acc / total.clamp(min=1e-38)[..., None]), m + log(total)


def scores(problem: Inputs, reverse: bool = False) -> Tensor:
    """[H, T, K] fp32 block scores, NaN where a block is invisible; summed over channels forwards or backwards."""
    case = problem.case
    q, k = problem.idx_q.float(), problem.idx_k.float()
    if reverse:
        q, k = q.flip(-1), k.flip(-1)
    result = torch.full((case.kv_heads, case.total_queries, case.block_columns), math.nan)
    for r in case.requests():
        for i in range(r.query_len):
            if r.position(i) < 0:
                continue
            s = q[r.query_start + i] @ k[r.kv_start : r.kv_start + r.position(i) + 1].T  # [H, seen]
            s = torch.nn.functional.pad(s, (0, -s.shape[-1] % BLOCK), value=-math.inf).unflatten(-1, (-1, BLOCK)).amax(-1)
            result[:, r.query_start + i, : s.shape[-1]] = s
    return result


def forced(case: Case, plain: Tensor) -> Tensor:
    """Scores with INIT_SCORE and LOCAL_SCORE in forced cells, as decode kernels write them."""
    result = plain.clone()
    for r in case.requests():
        for i in range(r.query_len):
            n, row = r.visible_blocks(i), r.query_start + i
            result[:, row, : min(case.init_blocks, n)] = 1e30
            result[:, row, max(0, n - case.local_blocks) : n] = 1e29
    return result


def select(case: Case, score: Tensor) -> Tensor:
    """[H, T, topk] int32 by descending score, forced blocks first and NaN last."""
    ids = torch.full((case.kv_heads, case.total_queries, case.topk), -1, dtype=torch.int32)
    rank = score.double()
    rank = rank.nan_to_num(nan=-1e301, posinf=1e300, neginf=-1e300)
    for r in case.requests():
        for i in range(r.query_len):
            n, row = r.visible_blocks(i), r.query_start + i
            count = min(case.topk, n)
            ranked = rank[:, row, :n].clone()
            ranked[:, : case.init_blocks] = 1e307
            ranked[:, max(0, n - case.local_blocks) :] = 1e306
            ids[:, row, :count] = ranked.argsort(dim=-1, descending=True, stable=True)[:, :count].int()
    return ids


def inputs(case: Case | str) -> Inputs:
    """Dequantised inputs of a case or of its id."""
    made = cases.make_inputs(cases.parse_id(case) if isinstance(case, str) else case)
    return reference.dequantised(made, "rounded")


def judge(problem: Inputs, outputs: dict[str, Tensor], **options: object) -> list[Finding]:
    """Findings of `compare` on simulated outputs; `options` are fields of Setting or of Profile."""
    fields = set(Profile.__dataclass_fields__)
    profile = Profile(**{name: value for name, value in options.items() if name in fields})
    rest = {name: value for name, value in options.items() if name not in fields}
    setting = Setting(profile=profile, evidence="interpreted", **rest)

    def attend(ids: Tensor) -> dict[str, Tensor]:
        op = "sparse_attn" if problem.case.op == "prefill" else "sparse_attn_decode"
        return dict(reference.expected(replace(problem, case=replace(problem.case, op=op), topk_idx=ids)))

    return compare(problem, Run(dict(outputs)), reference.expected(problem), setting, attend)


def red(findings: list[Finding]) -> dict[str, Finding]:
    """Failed findings by check."""
    return {f.check: f for f in findings if f.status is Status.FAILED}
