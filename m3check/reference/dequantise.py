"""What an fp8 code means: the keys and values that attention is defined on."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from m3check.reference.rows import chunks
from m3check.types import Inputs, M3CheckError

Rule = Literal["rounded", "folded"]


def dequantised(inputs: Inputs, rule: Rule) -> Inputs:
    """The same inputs with the scales applied to `k` and `v`, and None where the scales stood.

    `rounded`: k := RN_query_dtype(code · scale), the product in fp32, as kernels that widen a tile before the dot do.
    `folded`: k := code · scale in fp64, which holds the product exactly, as kernels that scale the logits do.

    An fp8 cache without scales has scale 1. A cache that is not fp8 is returned as it is: its values are already exact,
    and scales beside it raise M3CheckError. Index keys have no scale. At 1M tokens of 4 heads of 128 dims each of k and
    v takes 1 GB `rounded` and 4 GB `folded`.
    """
    if inputs.k is None or inputs.v is None or inputs.q is None:
        return inputs
    to = inputs.q.dtype if rule == "rounded" else torch.float64
    return replace(
        inputs,
        k=_dequantise(inputs.k, inputs.k_scale, to),
        v=_dequantise(inputs.v, inputs.v_scale, to),
        k_scale=None,
        v_scale=None,
    )


def _dequantise(codes: Tensor, scale: Tensor | None, to: torch.dtype) -> Tensor:
    """`codes` [N, Hkv, D] times `scale` ([], [N, Hkv] or None) in dtype `to`."""
    if codes.dtype.itemsize > 1:
        if scale is not None:
            raise M3CheckError(f"k_scale and v_scale belong to an fp8 cache, got a cache of {codes.dtype}; set scales=none")
        return codes
    product = torch.float64 if to == torch.float64 else torch.float32
    values = torch.empty(codes.shape, dtype=to, device=codes.device)
    for rows in chunks(len(codes), codes[:1].numel() * product.itemsize):
        wide = codes[rows].to(product)
        if scale is not None:
            wide *= (scale if scale.dim() == 0 else scale[rows, :, None]).to(product)
        values[rows] = wide
    return values
