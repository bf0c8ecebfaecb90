"""What an insert stored, read by the same provider's kernels that read those caches: both sides mean the same numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m3check import paging
from m3check.checks.invariants.trial import Trial
from m3check.types import Case, Finding, Inputs, M3CheckError, Status, blocks


def scale(trial: Trial) -> list[Finding]:
    """The stored tokens as one request's: scored, and attended to without a scale and with scales of 1, by each reader.

    Each is judged as any result of that reader, on the stored codes taken as numbers. An insert that stores multiples, or
    a reader that multiplies where it is told no scale, disagrees with it.
    """
    change = "the provider's own {} read what was inserted, {}"
    for op, inputs, how in _readings(trial):
        assert trial.other is not None
        try:
            _, findings = trial.other(op, inputs)
        except M3CheckError:
            continue  # this provider's reader does not take such a cache
        worst = trial.worst("readers", change.format(op, how), findings)
        if worst.status is Status.FAILED:
            return [worst]
    return [trial.passed("readers")]


def _readings(trial: Trial) -> list[tuple[str, Inputs, str]]:
    """(op, inputs, words) of each reader."""
    case, out, more = trial.inputs.case, trial.first.outputs, trial.inputs.more
    kept = (more["kept"] & more["kept_idx"]).to(out["k"].device)
    tokens, dtypes = int(kept.sum()), paging.stored(case)
    model = more["x_q"].dtype

    def of(name: str, rows: Tensor) -> Tensor:
        return out[name][rows].to(dtypes[name])

    last = kept.nonzero().flatten()[-1:]
    one: dict[str, Any] = {"query_lens": (1,), "kv_lens": (tokens,)}
    found = []
    index = "bf16" if dtypes["cached_idx_k"] is torch.bfloat16 else "fp16"
    word = case.index_cache_dtype if dtypes["cached_idx_k"].itemsize == 1 else index
    queries = word if dtypes["idx_q"].itemsize == 1 else case.dtype
    scored = Case(
        op="index_decode_score", kv_heads=case.index_width, local_blocks=0, dtype=queries, cache_dtype=word, **one
    )
    keys = of("cached_idx_k", kept)[:, 0]
    found.append(("index_decode_score", Inputs(scored, 1.0, idx_q=of("idx_q", last), idx_k=keys), "which has no scale"))
    ids = torch.arange(blocks(tokens), dtype=torch.int32, device=kept.device).expand(case.kv_heads, 1, -1).contiguous()
    q = out["q"][last] if "q" in out else more["x_q"].to(kept.device)[last]
    unit = torch.ones((), dtype=torch.float32, device=kept.device)
    for scales in ("none", "scalar") if dtypes["cached_k"].itemsize == 1 else ("none",):
        for op in ("sparse_attn", "sparse_attn_decode"):
            attended = Case(
                op=op, kv_heads=case.kv_heads, gqa=case.gqa, topk=ids.shape[2], dtype=case.dtype,
                cache_dtype=case.cache_dtype, scales=scales, layout=case.layout, **one,
            )  # fmt: skip
            k, v = of("cached_k", kept), of("cached_v", kept)
            by: dict[str, Any] = {} if scales == "none" else {"k_scale": unit, "v_scale": unit}
            inputs = Inputs(attended, case.head_dim**-0.5, q=q.to(model), k=k, v=v, topk_idx=ids, **by)
            found.append((op, inputs, "without a scale" if scales == "none" else "with scales of 1"))
    return found
