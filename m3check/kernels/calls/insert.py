"""How kernels that norm, rotate and insert are called: their keywords. slots.py makes the tensors, and needs torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from m3check.kernels.calls.family import Calls, Physical, Taken
from m3check.types import Inputs, Kernel

if TYPE_CHECKING:
    from torch import Tensor

    from m3check.paging import Guard, World

PARAMETERS: Mapping[str, str] = {
    "qkv": "[T, heads · D] bf16 or fp16, contiguous: q, k, v and, unless dense, index q and an index k; worked on in place",
    "q_norm_weight": "[D] like qkv: a head is scaled by 1 + weight",
    "k_norm_weight": "likewise for keys",
    "cos_sin_cache": "[positions, rotary_dim] like qkv: rotary_dim / 2 cosines, then as many sines",
    "positions": "[T] int64",
    "num_heads": "int: Hq",
    "num_kv_heads": "int: Hkv",
    "rotary_dim": "int: channels that are rotated, i with i + rotary_dim / 2; the others pass",
    "eps": "float: added to the mean square",
    "index_q_norm_weight": "None, or [D] like qkv",
    "index_k_norm_weight": "likewise",
    "num_index_heads": "int: index query heads in a row of qkv; 0 in a dense layer",
    "slot_mapping": "None, or [T] int64: page · 128 + offset of each token; a negative slot is none",
    "index_slot_mapping": "likewise, in the index cache",
    "kv_cache": "None, or [pages, Hkv, 128, 2D] qkv's dtype or fp8, channels contiguous: keys, then values",
    "index_cache": "None, or [pages, 128, D] qkv's dtype or fp8_e4m3, contiguous",
    "block_size": "int: 128, or 0 without caches",
    "q_out": "None, or [T, Hq · D] like qkv: where queries go, whose place in qkv is left alone then",
    "index_q_out": "None, or [T, H · D] in the index cache's dtype: likewise",
    "kv_cache_dtype": "str: auto, fp8_e4m3 or fp8_e5m2",
    "skip_index_branch": "bool: rows have index heads, which are left alone",
    "q_fp8_out": "None, or [T, Hq · D] fp8_e4m3: where queries divided by q_fp8_scale go; without q_out nowhere else",
    "q_fp8_scale": "float",
}

SIGNATURES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "qknorm_rope_insert": (tuple(PARAMETERS), "None: qkv, the caches and the buffers hold the result"),
}


def physical(
    kernel: Kernel, inputs: Inputs, world: World, accepted: frozenset[str], upstream: Mapping[str, Tensor]
) -> Physical:
    """The tensors of one call."""
    from m3check.kernels.calls import slots

    return slots.physical(inputs, world)


def take(kernel: Kernel, result: Any, inputs: Inputs, buffers: Mapping[str, Guard]) -> Taken:
    """What stands where it belongs, whatever the kernel returned."""
    from m3check.kernels.calls import slots

    return slots.take(inputs.case, buffers)


CALLS = Calls(
    parameters=PARAMETERS,
    signatures=SIGNATURES,
    letters="T tokens, Hq query heads, Hkv KV heads, H index query heads, D = 128 channels of a head",
    physical=physical,
    take=take,
    optional=frozenset({"block_size", "kv_cache_dtype"}),
    held=frozenset({"qkv"}),
    fresh=frozenset({"qkv"}),
)
