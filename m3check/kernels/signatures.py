"""The calling convention in words, for whoever writes kernels: what `m3check kernels --signatures` prints."""

from __future__ import annotations

import textwrap

from m3check.kernels.contract import OPTIONAL, PARAMETERS, SIGNATURES
from m3check.types import OPS

WIDTH = 100


def signatures_text() -> str:
    """Every op's parameters and result, then what each parameter is."""
    lines = [
        "A kernel is a Python function named like its op. It is called with keywords, takes those of these that it needs,",
        "and writes nothing but its output. T: query tokens of the batch, R: requests, H: index heads (one for each KV",
        "head), Hq: query heads, Hkv: KV heads, D: head dim, K: blocks of 128 tokens; [brackets] mark optional parameters.",
        "",
    ]
    for op, (parameters, result) in SIGNATURES.items():
        shown = ", ".join(f"[{p}]" if p in OPTIONAL else p for p in parameters)
        call = f"{op}({shown})"
        lines += [f"{op}: {OPS[op].summary}"]
        lines += textwrap.wrap(call, WIDTH, initial_indent="    ", subsequent_indent=" " * (5 + len(op)))
        lines += [f"    -> {result}", ""]
    width = max(map(len, PARAMETERS))
    lines += ["Parameters"]
    for name, meaning in PARAMETERS.items():
        lines += textwrap.wrap(meaning, WIDTH, initial_indent=f"    {name:<{width}}  ", subsequent_indent=" " * (width + 6))
    lines += [
        "",
        "A module-level PROFILE = m3check.Profile(...) says what the kernels promise where that is not the default: the",
        'cache layout (kv_layout="split" is [pages, 2, 128, Hkv, D]), the order of ids, which id lists attention accepts.',
    ]
    return "\n".join(lines) + "\n"
