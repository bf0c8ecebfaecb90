"""How precisely scores were added up, in bits: what a device's accumulator can be told by. docs/numerics.md explains it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from m3check.checks.bounds import whole
from m3check.checks.view import chunks
from m3check.types import BLOCK, Inputs, Outputs

SPAN = 2**16
"""Keys at a time; a multiple of the block."""


def effective_bits(problem: Inputs, score: Tensor, expected: Outputs) -> float | None:
    """-log2 of the largest |score - s| / Σ|q·k|, the sum being that of the key which gives a block its maximum.

    `score` [H, T, K] fp32 is what a kernel gave. Forced cells, those that a row does not see and those that are not finite
    do not count. None where nothing can be said: no such cell, whole numbers (their sums are exact) or no error at all.
    """
    queries, keys = problem.idx_q, problem.idx_k
    plain = expected.get("plain_score", expected.get("score"))
    if queries is None or keys is None or plain is None or whole(queries, keys):
        return None
    plain = plain.to(score.device)
    final = expected["score"].to(score.device) if "score" in expected else plain
    size = sizes(problem, score.device)
    counts = plain.isfinite() & (final == plain) & score.isfinite() & (size > 0)
    ratio = ((score.double() - plain).abs() / size.clamp(min=1e-300)).where(counts, 0.0)
    worst = ratio.max().item() if ratio.numel() else 0.0
    return -math.log2(worst) if worst > 0 else None


def sizes(problem: Inputs, device: torch.device) -> Tensor:
    """Σ|q·k| of the largest visible key of each block: [H, T, K] fp64, 0 where a row sees none."""
    assert problem.idx_q is not None
    assert problem.idx_k is not None
    case, q, k = problem.case, problem.idx_q.to(device).float(), problem.idx_k.to(device).float()
    heads, rows = q.shape[1], q.shape[0]
    result = torch.zeros(heads, rows, case.block_columns, dtype=torch.float64, device=q.device)
    cells = 2**26 if q.device.type == "cuda" else 2**21
    for request in case.requests():
        for part in chunks(request.query_len, max(1, cells // (heads * min(max(request.kv_len, 1), SPAN)))):
            row = slice(request.query_start + part.start, request.query_start + part.stop)
            position = request.prefix + torch.arange(part.start, part.stop, device=q.device)
            for span in chunks(request.kv_len, SPAN):
                own, each = k[request.tokens][span], q[row].transpose(0, 1)  # [n, D], [H, c, D]
                unseen = torch.arange(span.start, span.stop, device=q.device) > position[:, None]
                dot = (each @ own.T).masked_fill(unseen, -math.inf)
                size = (each.abs() @ own.abs().T).masked_fill(unseen, 0)
                pad = -dot.shape[-1] % BLOCK
                dot = torch.nn.functional.pad(dot, (0, pad), value=-math.inf).unflatten(-1, (-1, BLOCK))
                size = torch.nn.functional.pad(size, (0, pad)).unflatten(-1, (-1, BLOCK))
                best = torch.nan_to_num(dot, nan=-math.inf).argmax(-1, keepdim=True)
                place = slice(span.start // BLOCK, -(-span.stop // BLOCK))
                result[:, row, place] = size.gather(-1, best)[..., 0].double()
    return result
