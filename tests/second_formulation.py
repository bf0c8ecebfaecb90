"""Every op a second time, from its definition and not from the reference: dense numpy and Python sets, in fp64.

It imports nothing of m3check.reference and shares no idea with it. Where the reference pads keys, folds maxima, sorts
stably and gathers tokens, this works token by token on the dense [tokens] axis of one query row: who is seen, who is
listed, who wins. Slow, and only for cases of a few thousand tokens.
"""

from __future__ import annotations

import math

import numpy as np

from m3check.types import OPS, Inputs

INIT, LOCAL = float(np.float32(1e30)), float(np.float32(1e29))


def second(inputs: Inputs) -> dict[str, np.ndarray]:
    """The outputs that `m3check.reference.expected` must give, by name."""
    op = inputs.case.op
    if op == "index_score":
        return {"score": scores(inputs)}
    if op == "index_topk":
        return {"ids": selection(inputs, _numbers(inputs.scores))}
    if op in ("sparse_attn", "sparse_attn_decode"):
        return attention(inputs, inputs.topk_idx.numpy())
    plain = scores(inputs)
    decoding = {} if op == "prefill" else {"plain_score": plain}
    result = {"score": plain if op == "prefill" else forced(inputs, plain), **decoding}
    if op != "index_decode_score":
        result["ids"] = selection(inputs, plain)
    if op in ("prefill", "decode"):
        result |= attention(inputs, result["ids"])
    return result


def _numbers(tensor) -> np.ndarray:
    return tensor.double().numpy()


def _rows(inputs: Inputs):
    """(row among all queries, first token of its request, tokens it sees), query by query."""
    row = first = 0
    for query_len, kv_len in zip(inputs.case.query_lens, inputs.case.kv_lens, strict=True):
        for later in reversed(range(query_len)):
            yield row, first, max(0, kv_len - later)
            row += 1
        first += kv_len


def _columns(inputs: Inputs) -> int:
    return math.ceil(max(inputs.case.kv_lens) / 128)


def scores(inputs: Inputs) -> np.ndarray:
    q, k = _numbers(inputs.idx_q), _numbers(inputs.idx_k)
    score = np.full((q.shape[1], q.shape[0], _columns(inputs)), -np.inf)
    for row, first, seen in _rows(inputs):
        dots = np.einsum("hd,nd->hn", q[row], k[first : first + seen])
        for start in range(0, seen, 128):
            for head, block in enumerate(dots[:, start : start + 128]):
                numbers = block[~np.isnan(block)]
                score[head, row, start // 128] = numbers.max() if numbers.size else np.nan
    return score


def _forced_sets(inputs: Inputs, seen: int) -> tuple[set[int], set[int], set[int]]:
    visible = {token // 128 for token in range(seen)}
    local = set(sorted(visible)[len(visible) - min(len(visible), inputs.case.local_blocks) :])
    init = {block for block in visible if block < inputs.case.init_blocks} - local
    return visible, init, local


def forced(inputs: Inputs, plain: np.ndarray) -> np.ndarray:
    score = plain.copy()
    for row, _, seen in _rows(inputs):
        _, init, local = _forced_sets(inputs, seen)
        for block in init:
            score[:, row, block] = INIT
        for block in local:
            score[:, row, block] = LOCAL
    return score


def selection(inputs: Inputs, score: np.ndarray) -> np.ndarray:
    topk = inputs.case.topk
    ids = np.full((*score.shape[:2], topk), -1)
    for row, _, seen in _rows(inputs):
        visible, init, local = _forced_sets(inputs, seen)
        for head in range(score.shape[0]):
            cells = score[head, row]

            def place(block: int, init=init, local=local, cells=cells) -> tuple:
                if block in init:
                    return (0, 0.0, block)
                if block in local:
                    return (1, 0.0, block)
                return (3, 0.0, block) if math.isnan(cells[block]) else (2, -cells[block], block)

            chosen = sorted(visible, key=place)[:topk]
            ids[head, row, : len(chosen)] = chosen
    return ids


def attention(inputs: Inputs, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Softmax as sums of 2^x over the tokens seen, the unlisted ones weighing nothing."""
    q, k, v = _numbers(inputs.q), _numbers(inputs.k), _numbers(inputs.v)
    group = q.shape[1] // k.shape[1]
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    for row, first, seen in _rows(inputs):
        for kv_head in range(k.shape[1]):
            tokens = first + np.flatnonzero(np.isin(np.arange(seen) // 128, ids[kv_head, row]))
            if not tokens.size:
                continue
            heads = slice(kv_head * group, (kv_head + 1) * group)
            exponents = inputs.sm_scale / math.log(2) * np.einsum("nd,gd->gn", k[tokens, kv_head], q[row, heads])
            top = exponents.max(axis=1)
            lse[row, heads] = top + np.log2(np.exp2(exponents - top[:, None]).sum(axis=1))
            weights = np.exp2(exponents - lse[row, heads][:, None])
            out[row, heads] = np.einsum("gn,nd->gd", weights, v[tokens, kv_head])
    return {"out": out, "lse": lse}


def assert_agrees(inputs: Inputs) -> None:
    """The reference in fp64 gives the same: ids exactly, numbers within fp64 sums of a few thousand terms."""
    from m3check.reference import expected

    got, wanted = expected(inputs), second(inputs)
    assert set(got) >= set(wanted) >= set(OPS[inputs.case.op].outputs)
    for name, values in wanted.items():
        actual = got[name].numpy()
        if name == "ids":
            np.testing.assert_array_equal(actual, values, err_msg=name)
        else:
            ordinary = np.abs(values[np.isfinite(values) & (np.abs(values) < LOCAL)])
            np.testing.assert_allclose(actual, values, rtol=1e-11, atol=1e-11 * ordinary.max(initial=0), err_msg=name)
