"""Id lists given to attention: which blocks each query and KV head reads, and how the list is written down.

A row's blocks are a window of a shuffled circle of the visible blocks. Heads start their windows at different places, so
where more blocks are visible than listed, no two heads list the same ones (as long as there are fewer heads than places).
Seven rows of eight list their own block as well, as the model's kernels always do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from m3check.cases.stream import Stream
from m3check.types import Case, blocks

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Ids = npt.NDArray[np.int64]

STRIDES = (
    1052299,
    1055671,
    1146569,
    1314283,
    1377517,
    1397719,
    1503091,
    1564657,
    1571461,
    1584283,
    1634693,
    1675181,
    1828283,
    1896443,
    1904531,
    2039561,
)
"""Primes above 2^20, the most blocks of a context: walking a circle of visible blocks by one of them meets each once."""


def visible_blocks(case: Case) -> Ids:
    """[T] blocks that each query sees, 0 for a dead row."""
    import numpy as np

    parts = [[request.visible_blocks(i) for i in range(request.query_len)] for request in case.requests()]
    return np.array([n for part in parts for n in part], dtype=np.int64)


def distinct_blocks(case: Case, stream: Stream) -> tuple[Ids, Ids]:
    """[H, T, topk] visible ids, distinct in each row and in random order, and [T] how many leading ones count."""
    import numpy as np

    heads, rows, topk = case.kv_heads, case.total_queries, case.topk
    visible = visible_blocks(case)
    count = np.minimum(visible, topk)
    own_too = (stream.below(8, [rows]) > 0) & (topk > 1) & (visible > 1)
    circle = np.maximum(visible - own_too, 1)  # blocks to choose a window from; the own block stands apart
    stride = np.array(STRIDES)[stream.below(len(STRIDES), [rows])]
    start = stream.below(circle, [rows])
    step = np.maximum(circle // heads, 1)
    head = np.arange(heads)[:, None, None]
    slot = np.arange(topk)[None, None, :]
    per_row = (None, slice(None), None)
    window = start[per_row] + head * step[per_row] + slot
    ids = window % circle[per_row] * stride[per_row] % circle[per_row]
    last = slot == (count - 1)[per_row]
    ids = np.where(own_too[per_row] & last, (visible - 1)[per_row], ids)
    order = stream.below(1 << 30, [heads, rows, topk])
    order = np.where(slot < count[per_row], order, 1 << 40)  # unused slots stay behind
    return np.take_along_axis(ids, np.argsort(order, axis=-1, kind="stable"), axis=-1), count


def _cut(ids: Ids, count: Ids) -> Ids:
    import numpy as np

    return np.where(np.arange(ids.shape[-1]) < count[..., None], ids, -1)


def full(case: Case, stream: Stream) -> Ids:
    """min(topk, visible) distinct visible ids in random order, then -1."""
    return _cut(*distinct_blocks(case, stream))


def ascending(case: Case, stream: Stream) -> Ids:
    """The same, in ascending order."""
    import numpy as np

    ids = full(case, stream)
    ordered = np.sort(np.where(ids < 0, 1 << 40, ids), axis=-1)
    return np.where(ordered == 1 << 40, -1, ordered)


def short(case: Case, stream: Stream) -> Ids:
    """Fewer ids than min(topk, visible), at least one, then -1."""
    import numpy as np

    ids, count = distinct_blocks(case, stream)
    kept = 1 + stream.below(np.maximum(count - 1, 1), [case.kv_heads, case.total_queries])
    return _cut(ids, np.minimum(kept, count))


def holes(case: Case, stream: Stream) -> Ids:
    """At least one id and, where topk > 1, at least one -1 before it or between two."""
    import numpy as np

    ids = short(case, stream)
    order = stream.below(1 << 30, ids.shape)
    order[..., 0] |= 1 << 31  # what stood first goes last, behind every hole
    return np.take_along_axis(ids, np.argsort(order, axis=-1, kind="stable"), axis=-1)


def future(case: Case, stream: Stream) -> Ids:
    """One id of a block that the query does not see: one of its request where there is such, else the next one."""
    import numpy as np

    ids = full(case, stream)
    visible = visible_blocks(case)
    there = np.concatenate([np.full(r.query_len, blocks(r.kv_len)) for r in case.requests()])
    where = stream.below(case.topk, ids.shape[:2])
    unseen = visible + stream.below(np.maximum(there - visible, 1), ids.shape[:2])
    first_free = np.minimum(np.minimum(visible, case.topk), case.topk - 1)  # a partly filled list gets it in place or next
    np.put_along_axis(ids, np.minimum(where, first_free)[..., None], unseen[..., None], axis=-1)
    return ids


SELECTIONS: Mapping[str, Callable[[Case, Stream], Ids]] = {
    "full": full,
    "ascending": ascending,
    "short": short,
    "holes": holes,
    "future": future,
}
