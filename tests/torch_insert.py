"""`qknorm_rope_insert` in plain torch on physical tensors, right in itself; wrong kernels change one step of it."""

from __future__ import annotations

import functools
import itertools
from types import SimpleNamespace

import torch

BLOCK = 128


def power(x):
    """Mean square of heads [..., D] in fp32."""
    return x.square().sum(-1, keepdim=True) / x.shape[-1]


def normed(x, weight, eps):
    """A head at unit mean square, times 1 + weight."""
    return x * torch.rsqrt(power(x) + eps) * (1 + weight)


def rotated(x, cos, sin):
    """Channels i and i + R/2 turned into each other."""
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, x[..., 2 * half :]], -1)


def angles(table, positions):
    """Cosines and sines [T, 1, R/2] in fp32."""
    return table[positions].float()[:, None].chunk(2, -1)


def stored(x, dtype, model):
    """fp32 numbers as a dtype, fp8 saturated."""
    if dtype.itemsize == 1:
        largest = torch.finfo(dtype).max
        return x.clamp(-largest, largest).to(dtype)
    return x.to(dtype)


def insert(cache, slots, rows, dim=slice(None), stored=stored):
    """Rows [T, heads, D] into the cells of a cache; a negative slot is none."""
    model = rows.dtype
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            put(cache, slot, rows[token], dim, stored, model)


def put(cache, slot, row, dim, stored, model):
    """One token's heads [heads, D]."""
    codes = stored(row, cache.dtype, model)
    target = cache[slot // BLOCK, :, slot % BLOCK, dim] if cache.dim() == 4 else cache[slot // BLOCK, slot % BLOCK][None]
    bits(target).copy_(bits(codes))


def bits(x):
    """Memory as integers, which torch copies in every dtype."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


STEPS = SimpleNamespace(normed=normed, rotated=rotated, angles=angles, stored=stored, insert=insert)


def kernel(**changed):
    """A kernel of these steps; those that are named are replaced."""
    return functools.partial(run, SimpleNamespace(**{**vars(STEPS), **changed}))


def run(
    do, qkv, q_norm_weight, k_norm_weight, cos_sin_cache, positions, num_heads, num_kv_heads, rotary_dim, eps,
    index_q_norm_weight, index_k_norm_weight, num_index_heads, slot_mapping, index_slot_mapping, kv_cache, index_cache,
    q_out, index_q_out, skip_index_branch, q_fp8_out, q_fp8_scale,
):  # fmt: skip
    """What the contract says, in fp32, in the order of its words."""
    dim, model = q_norm_weight.numel(), qkv.dtype
    row = qkv.view(len(qkv), qkv.shape[1] // dim, dim)
    cos, sin = do.angles(cos_sin_cache, positions)
    q, k, v, index_q, index_k = (slice(a, b) for a, b in bounds(num_heads, num_kv_heads, num_index_heads))

    def worked(heads, weight):
        return do.rotated(do.normed(row[:, heads].float(), weight.float(), eps), cos, sin)

    def write(target, heads, values):
        bits(target.view(len(qkv), -1, dim)[:, heads]).copy_(bits(do.stored(values, target.dtype, model)))

    queries = worked(q, q_norm_weight)
    if q_out is not None or q_fp8_out is None:
        write(qkv if q_out is None else q_out, q, queries)
    if q_fp8_out is not None:
        write(q_fp8_out, q, queries / q_fp8_scale)
    keys, values = worked(k, k_norm_weight), row[:, v].float()
    write(qkv, k, keys)
    if kv_cache is not None:
        do.insert(kv_cache, slot_mapping, keys, slice(0, dim), do.stored)
        do.insert(kv_cache, slot_mapping, values, slice(dim, 2 * dim), do.stored)
    if num_index_heads and not skip_index_branch:
        found = worked(index_q, index_q_norm_weight)
        if index_q_out is None:
            write(qkv, index_q, found)
        else:
            write(index_q_out, slice(None), found)
        found = worked(index_k, index_k_norm_weight)
        write(qkv, index_k, found)
        if index_cache is not None:
            do.insert(index_cache, index_slot_mapping, found, slice(None), do.stored)


def bounds(heads, kv_heads, index_heads):
    """First and last head of q, k, v, index q and index k in a row."""
    ends = [0]
    for n in (heads, kv_heads, kv_heads, index_heads, 1):
        ends.append(ends[-1] + n)
    return itertools.pairwise(ends)
