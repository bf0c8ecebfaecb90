"""Which scales a call of attention brings: none, one for the tensor, or one for each token and head."""

from __future__ import annotations

from torch import Tensor


def mode(form: str, kv_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> str:
    """`none`, `scalar` or `token`; scales of a cache that is not fp8 are ignored. Raises ValueError for other shapes."""
    if (k_scale is None) != (v_scale is None):
        raise ValueError("k_scale and v_scale must be given together or not at all")
    if k_scale is None or v_scale is None or form == "plain":
        return "none"
    if k_scale.numel() == v_scale.numel() == 1:
        return "scalar"
    pages, heads = kv_cache.shape[:2]
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale.dim() != 2 or scale.shape[0] != heads or scale.shape[1] < pages * 128 or scale.stride(1) != 1:
            raise ValueError(
                f"{name} has shape {list(scale.shape)}, wanted [1] or [{heads}, {pages * 128}] with unit stride"
            )
    return "token"
