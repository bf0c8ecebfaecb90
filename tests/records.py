"""Three small records that the report's tests share: a green one, a red one, and one where nothing ran."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from m3check.types import Case, Exit, Finding, Record, Result, Status

CASE = Case(op="sparse_attn", query_lens=(5,), kv_lens=(2304,))


def finding(check: str = "element", status: Status = Status.PASSED, **words: Any) -> Finding:
    return Finding(check, status, **({"measured": 0.25, "limit": 1.0} | words))


def result(status: Status = Status.PASSED, **words: Any) -> Result:
    provider, op = words.get("provider", "triton"), words.get("op", "sparse_attn")
    case = words.get("case", f"{op}/q=5,kv=2304")
    fixed: dict[str, Any] = {
        "case": case,
        "op": op,
        "provider": provider,
        "kernel": op,
        "evidence": "interpreted",
        "axes": replace(CASE, op=op).axes(),
        "status": status,
        "findings": (finding(),) if status is Status.PASSED else (),
        "seconds": 0.5,
        "repro": f"m3check run --arch sm100 --kernels {provider} --case {case}",
    }
    return Result(**(fixed | words))


def record(*results: Result, exit: Exit | None = None, command: str = "m3check run --arch sm100", **words: Any) -> Record:
    from m3check.report.exits import judge, summarise

    named = tuple(dict.fromkeys(r.provider for r in results)) or ("triton",)
    fixed: dict[str, Any] = {
        "schema_version": "1.0",
        "tool": {"name": "m3check", "version": "0.1.0"},
        "arch": "sm100",
        "environment": {
            "date": "2026-11-21T08:00:00+00:00",
            "host": "x86_64",
            "cores": 2,
            "evidence_reason": "this machine has no sm100 GPU",
            "torch": "2.13.0+cpu",
            "triton": "3.8.0",
            "providers": {"vllm==0.33.0": {"version": "0.33.0", "from": "a published wheel"}},
            "interpreter_repairs": ["bf16 dot", "bf16 rounding"],
        },
        "command": command,
        "exit": exit or judge(results, named, strict="--strict" in command),
        "summary": summarise(results),
        "results": results,
    }
    return Record(**(fixed | words))


POWER = {
    "cases": 2,
    "unlisted": 1,
    "defects": [
        ["attend", "every row loses its first block", 2, 2],
        ["attend", "a softmax scale 1 % too large", 0, 1],
        ["attend", "k_scale not applied", 0, 0],
    ],
}


DISPATCH = [
    {
        "version": "0.33.0",
        "op": "sparse_attn",
        "implementation": "fmha_sm100 sparse_atten_func",
        "file": "third_party/fmha_sm100",
        "when": "topk 16",
        "evidence": "not run here, needs SM100",
    },
    {
        "version": "0.33.0",
        "op": "sparse_attn",
        "implementation": "Triton (common)",
        "file": "models/minimax_m3/common/ops/sparse_attn.py",
        "when": "always",
        "evidence": "interpreted: 2 passed",
    },
]


def green() -> Record:
    note = finding(
        "dead_rows", Status.NOTED, measured=None, limit=None, where="request 1", hint="NaN where zero is asked for"
    )
    vllm = {"provider": "vllm==0.33.0"}
    made = record(
        result(findings=(finding(measured=0.7), finding("row", measured=0.004, limit=0.02))),
        result(
            case="sparse_attn/q=5,kv=2304,fill=ties",
            findings=(finding(measured=0.1), finding("row", measured=0.01, limit=0.02)),
        ),
        result(op="index_topk", findings=(finding("selection", measured=None, limit=None),)),
        result(**vllm, findings=(finding(measured=0.5), note)),
        result(**vllm, case="sparse_attn/q=9,kv=2304", findings=(finding(measured=0.4), note)),
        result(Status.SKIPPED, **vllm, op="index_topk", reason="vllm 0.33.0 takes 16 ids only | not 24"),
        result(
            Status.SKIPPED,
            **vllm,
            op="index_topk",
            case="index_topk/q=1,kv=9",
            reason="vllm 0.33.0 takes 16 ids only | not 24",
        ),
        result(Status.INCONCLUSIVE, op="prefill", reason="masks could not be repaired"),
    )
    return replace(made, environment={**made.environment, "power": POWER, "dispatch": DISPATCH})


def red() -> Record:
    lost = finding(
        "lost_token",
        Status.FAILED,
        measured=91.25,
        limit=8.0,
        where="token 3, kv head 1, key 517",
        hint="key 517 is missing\x00 from the sum",
    )
    infinite = finding("element", Status.FAILED, measured=math.inf, limit=0.01, where="token 0, head 2, channel 5")
    return record(
        result(Status.FAILED, findings=(finding(measured=1.5, status=Status.FAILED), lost), reason="element: too large"),
        result(Status.FAILED, case="sparse_attn/q=6,kv=2304", findings=(infinite, finding("row", measured=math.nan))),
        result(Status.CRASHED, op="decode", reason="the worker process ended with signal SIGSEGV <core dumped>"),
        result(Status.TIMEOUT, op="index_score", reason="no result within 120 s"),
        result(Status.ERROR, op="prefill", reason="ValueError: `block_table` | wrong"),
        result(op="index_topk", evidence="device"),
        environment={"date": "2026-11-21T08:00:00+00:00", "gpu": "NVIDIA B200", "host": "x86_64", "cores": 2},
    )


def nothing() -> Record:
    return record(
        result(Status.SKIPPED, reason="needs a device"),
        result(Status.SKIPPED, case="sparse_attn/q=1,kv=9", reason="needs a device"),
    )


GOLDEN = {"green": green, "red": red, "nothing": nothing}
