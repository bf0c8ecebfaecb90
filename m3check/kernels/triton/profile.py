"""What our Triton kernels need and promise."""

from m3check.types import ODD_SCORES, Profile

PROFILE = Profile(
    kv_layout="packed",
    id_order="score",
    tie_rule="smaller_id",
    forcing="init_first",
    forced_scores=True,
    dead_rows="zero",
    odd_scores=ODD_SCORES,
    normaliser="sum",
    dequantise="rounded",
    partials="fp32",
    bitwise=frozenset({"repeat", "far_rows", "far_slots", "graph", "apart", "empty", "warm"}),
)
