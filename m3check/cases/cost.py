"""How long a case takes: a rough estimate, to hand out long cases first and to warn of those that need a device.

The constants were measured with vLLM 0.33.0's kernels on two cores (AMD EPYC) and hold within a factor of about three.
"""

from __future__ import annotations

from dataclasses import dataclass

from m3check.cases import families
from m3check.cases.validity import reads_main_cache
from m3check.types import OPS, Case

CALL = 0.15  # seconds a case costs whatever its size: reference, checks, packing, launching
VALUE = 2e-8  # making, packing and reading one value of a cache, CPU
SCORE_STEP = 1.2e-3  # one block of one score program (64 x 128 x D), interpreted
SCORE_CHUNKS = 0.18  # a decode request's 256 score programs, most of them empty; 16 requests share 4096
SELECT_ROW = 0.03  # one (query token, head) row of a bitonic top-k
SPLIT_SELECT = 0.016  # one chunk of a decode row's top-k; 16 chunks while there are few rows
ATTEND_STEP = 4e-3  # one block of one (query token, KV head) attention program
MERGE_ROW = 1.5e-3  # merging the partial outputs of one (query token, query head)
DEVICE_CALL = 0.05
DEVICE_VALUE = 2e-9
TILE = 64


@dataclass(frozen=True)
class Estimate:
    """Seconds that one case on one provider takes; as text, a sentence for a machine without a device."""

    interpreted: float
    device: float

    def __str__(self) -> str:
        """E.g. `about 3 h interpreted, 2 s on a device`."""
        return f"about {_duration(self.interpreted)} interpreted, {_duration(self.device)} on a device"


def case_cost(case: Case) -> Estimate:
    """Estimate a case from its figures alone."""
    family = families.of(case.op)
    if family is not None:
        return family.estimate(case)
    ops = OPS[case.op].chain or (case.op,)
    steps = sum(_seconds(case, op) for op in ops)
    width = case.head_dim * (2 * case.kv_heads if reads_main_cache(case.op) else 1)
    values = case.total_tokens * width
    if case.op == "index_topk":
        values = case.kv_heads * case.total_queries * case.block_columns
    # the reference multiplies every query with every listed key, in fp64
    products = case.total_queries * case.heads * min(case.topk * 128, case.context) * case.head_dim
    return Estimate(CALL + steps + values * VALUE, DEVICE_CALL + values * DEVICE_VALUE + products * 1e-12)


def cost(case: Case, evidence: str) -> float:
    """Seconds by one kind of evidence."""
    estimate = case_cost(case)
    return estimate.device if evidence == "device" else estimate.interpreted


def _seconds(case: Case, op: str) -> float:
    """Interpreted seconds of one op's kernel."""
    heads, total = case.kv_heads, 0.0
    for request in case.requests():
        blocks = request.visible_blocks(request.query_len - 1) if request.query_len else 0
        if op == "index_score":
            total += SCORE_STEP * -(-request.query_len // TILE) * heads * blocks
        if op in ("index_decode_score", "index_decode"):
            total += SCORE_CHUNKS * min(1, 16 / len(case.kv_lens)) + SCORE_STEP * blocks
        if op == "index_topk":
            total += SELECT_ROW * request.query_len * heads
        if op in ("sparse_attn", "sparse_attn_decode"):
            total += ATTEND_STEP * request.query_len * heads * (1 + min(case.topk, blocks))
    rows = case.total_queries * heads
    if op == "index_decode":
        total += SPLIT_SELECT * rows * min(16, max(1, 512 // rows))
    if op == "sparse_attn_decode":
        total += MERGE_ROW * case.total_queries * case.heads
    return total


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1g} s" if seconds < 10 else f"{seconds:.0f} s"
