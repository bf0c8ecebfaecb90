"""Further changed inputs, which only a diagnosis tries: queries, keys, lists, scales and lengths read wrongly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from m3check.hypotheses.geometry import Change, cached, moved
from m3check.hypotheses.scene import Scene
from m3check.types import BLOCK, Inputs, blocks

if TYPE_CHECKING:
    from torch import Tensor

TOP_LEFT = moved(lambda request, i: i)
WHOLE_BLOCKS = moved(lambda request, i: (request.position(i) + 1) // BLOCK * BLOCK - 1)
BLOCK_END = moved(lambda request, i: request.position(i) | (BLOCK - 1))
ONE_LESS = moved(lambda request, i: min(request.position(i), request.kv_len - request.query_len))


def past_seen(last_only: bool) -> Callable[[Scene], Inputs | None]:
    """A query sees its own block to the end, past the last token too, whatever the memory of the call holds there."""

    def inputs(scene: Scene) -> Inputs | None:
        from m3check.hypotheses.geometry import Geometry
        from m3check.hypotheses.memory import to_the_end
        from m3check.types import Case, Request

        case = scene.given.case
        rows: list[Request] = []
        start = 0
        for request in case.requests():
            for i in range(request.query_len):
                position = request.position(i)
                ends = position >= 0 and (not last_only or position == request.kv_len - 1)
                end = (position | (BLOCK - 1)) + 1 if ends else max(0, position + 1)
                rows.append(Request(len(rows), request.query_start + i, 1, start, end))
            start += blocks(request.kv_len) * BLOCK
        if start == case.total_tokens:
            return None
        longer = to_the_end(scene)
        figures = {name: getattr(case, name) for name in Case.__dataclass_fields__}
        figures["kv_lens"] = tuple(blocks(n) * BLOCK for n in case.kv_lens)
        return None if longer is None else replace(longer, case=Geometry(**figures, rows=tuple(rows)))

    return inputs


def queries_by_e4m3(inputs: Inputs) -> Inputs | None:
    """Index queries that went through e4m3."""
    import torch

    q = inputs.idx_q
    if q is None or q.element_size() == 1:
        return None
    return replace(inputs, idx_q=q.to(torch.float8_e4m3fn).to(q.dtype))


def chunk_start_lost(inputs: Inputs) -> Inputs | None:
    """Keys of a chunk's first block that an earlier chunk wrote are not seen: NaN, which a maximum ignores."""
    assert inputs.idx_k is not None
    keys, found = inputs.idx_k.double(), False
    for request in inputs.case.requests():
        if request.query_len and request.prefix > 0 and request.prefix % BLOCK:
            first = request.prefix // BLOCK * BLOCK
            keys[request.kv_start + first : request.kv_start + request.prefix] = math.nan
            found = True
    return replace(inputs, idx_k=keys) if found else None


def as_integers(inputs: Inputs) -> Inputs | None:
    """fp8 codes taken as the integers 0 … 255."""
    import torch

    keys = inputs.idx_k if inputs.idx_k is not None else inputs.k
    if keys is None or keys.element_size() > 1:
        return None
    return replace(cached(inputs, lambda x: x.view(torch.uint8).double()), k_scale=None, v_scale=None)


def minus_one_is_zero(inputs: Inputs) -> Inputs | None:
    """-1 is read as block 0."""
    ids = inputs.topk_idx
    assert ids is not None
    return replace(inputs, topk_idx=ids.clamp(min=0)) if (ids < 0).any() else None


def token_major(inputs: Inputs) -> Inputs | None:
    """Head-major id lists are read as token-major ones."""
    ids = inputs.topk_idx
    assert ids is not None
    heads, tokens, topk = ids.shape
    return (
        replace(inputs, topk_idx=ids.contiguous().view(tokens, heads, topk).transpose(0, 1)) if heads > 1 < tokens else None
    )


def first_list(inputs: Inputs) -> Inputs | None:
    """All heads read the list of the first."""
    ids = inputs.topk_idx
    assert ids is not None
    return replace(inputs, topk_idx=ids[:1].expand(ids.shape)) if len(ids) > 1 else None


def keys_for_values(inputs: Inputs) -> Inputs:
    """Keys and values are exchanged."""
    return replace(inputs, k=inputs.v, v=inputs.k)


def values_times(factor: float) -> Change:
    """The output is a factor off, as by a wrong normaliser."""

    def change(inputs: Inputs) -> Inputs:
        assert inputs.v is not None
        return replace(inputs, v=inputs.v.double() * factor)

    return change


def _slots(part: int, of: int, changed: Callable[[Tensor, slice], Tensor]) -> Change:
    """One of `of` equal parts of every list, as a split reads them, is changed."""

    def change(inputs: Inputs) -> Inputs | None:
        ids = inputs.topk_idx
        assert ids is not None
        share = -(-ids.shape[-1] // of)
        slots = slice(part * share, (part + 1) * share)
        if ids.shape[-1] < of or not (ids[..., slots] >= 0).any():
            return None
        return replace(inputs, topk_idx=changed(ids, slots))

    return change


def slots_lost(part: int, of: int) -> Change:
    """One of several parts of every list is not attended: a split lost."""

    def without(ids: Tensor, slots: slice) -> Tensor:
        ids = ids.clone()
        ids[..., slots] = -1
        return ids

    return _slots(part, of, without)


def slots_doubled(part: int, of: int) -> Change:
    """One of several parts of every list counts twice."""

    def twice(ids: Tensor, slots: slice) -> Tensor:
        return ids[..., [*range(ids.shape[-1]), *range(ids.shape[-1])[slots]]]

    return _slots(part, of, twice)


def slots_past(count: int) -> Change:
    """Only the first so many slots of a list are attended."""

    def change(inputs: Inputs) -> Inputs | None:
        ids = inputs.topk_idx
        assert ids is not None
        if count >= ids.shape[-1] or not (ids[..., count:] >= 0).any():
            return None
        other = ids.clone()
        other[..., count:] = -1
        return replace(inputs, topk_idx=other)

    return change


def mean_scale(name: str) -> Change:
    """One scale, the mean, where each token and head has its own."""

    def change(inputs: Inputs) -> Inputs | None:
        scale: Tensor | None = getattr(inputs, name)
        if scale is None or scale.dim() < 2:
            return None
        fields = {name: scale.mean().expand(scale.shape)}
        return replace(inputs, **fields)  # type: ignore[arg-type]

    return change


def one_scale_a_head(inputs: Inputs) -> Inputs | None:
    """The scale of a request's first token stands for all of its tokens."""
    k, v = inputs.k_scale, inputs.v_scale
    if k is None or v is None or k.dim() < 2:
        return None
    k, v = k.clone(), v.clone()
    for request in inputs.case.requests():
        if request.kv_len:
            k[request.tokens], v[request.tokens] = k[request.kv_start].clone(), v[request.kv_start].clone()
    return replace(inputs, k_scale=k, v_scale=v)


def scale_for_both(source: str) -> Change:
    """k_scale for keys and values, or v_scale."""

    def change(inputs: Inputs) -> Inputs | None:
        scale = getattr(inputs, source)
        return None if scale is None else replace(inputs, k_scale=scale, v_scale=scale)

    return change


# Scores after the fact.


def largest_of_heads(scene: Scene) -> Tensor | None:
    """Every index head has the largest score of any."""
    right = scene.right
    return right.amax(0, keepdim=True).expand(right.shape) if len(right) > 1 else None


def columns_cut(scene: Scene) -> Tensor | None:
    """Columns from some block on are not written; from which one is read off the output."""
    import torch

    unwritten = scene.actual.isnan().all(0).all(0)
    if not bool(unwritten.any()) or bool(unwritten.all()):
        return None
    first = int(unwritten.int().argmax())
    column = torch.arange(unwritten.shape[0], device=unwritten.device)
    return scene.right.masked_fill((column >= first) & scene.right.isfinite(), math.nan)
