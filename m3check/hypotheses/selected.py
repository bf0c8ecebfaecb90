"""Selections gone wrong after the fact, or by another order of scores: what becomes of a row's slots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from m3check.hypotheses.geometry import Geometry, positions
from m3check.hypotheses.scene import Scene
from m3check.hypotheses.scores import forced_cells
from m3check.types import INIT_SCORE, LOCAL_SCORE, Case, Inputs, Request, blocks

if TYPE_CHECKING:
    from torch import Tensor


def standing(move: Callable[[Request, int], int]) -> Callable[[Scene], Inputs | None]:
    """Query i stands at `move(request, i)`, also past its request's end: there cells hold what memory held, NaN."""

    def inputs(scene: Scene) -> Inputs | None:
        import torch

        case, scores = scene.problem.case, scene.problem.scores
        assert scores is not None
        rows: list[Request] = []
        for request in case.requests():
            for i in range(request.query_len):
                end = max(0, move(request, i) + 1)
                rows.append(Request(len(rows), request.query_start + i, 1, request.kv_start, end))
        figures = {name: getattr(case, name) for name in Case.__dataclass_fields__}
        other = Geometry(**figures, rows=tuple(rows))
        if positions(other) == positions(case):
            return None
        longest = max(blocks(row.kv_len) for row in rows)
        seen = forced_cells(scene.problem)[0]
        wide = torch.nn.functional.pad(
            scores.masked_fill(~seen, torch.nan), (0, max(0, longest - scores.shape[-1])), value=torch.nan
        )
        return replace(scene.problem, case=other, scores=wide)

    return inputs


def forcing(init: bool, own: bool) -> Callable[[Scene], Inputs | None]:
    """Forced are the init blocks or not, and of the local ones the query's own or none."""

    def inputs(scene: Scene) -> Inputs | None:
        case = scene.problem.case
        other = replace(case, init_blocks=case.init_blocks * init, local_blocks=min(case.local_blocks, int(own)))
        return replace(scene.problem, case=other) if other != case else None

    return inputs


def ranked(values: Callable[[Tensor], Tensor]) -> Callable[[Scene], Inputs | None]:
    """Scores compare by `values(scores)`."""

    def inputs(scene: Scene) -> Inputs | None:
        scores = scene.problem.scores
        assert scores is not None
        other = values(scores)
        same = (other == scores) | (other.isnan() & scores.isnan())
        return None if bool(same.all()) else replace(scene.problem, scores=other)

    return inputs


def binned(bits: int) -> Callable[[Tensor], Tensor]:
    """fp32 scores without their last bits, in the order of a sort key: blocks of one bin are equals."""

    def values(scores: Tensor) -> Tensor:
        import torch

        word = scores.float().view(torch.int32)
        key = torch.where(word < 0, word ^ 0x7FFFFFFF, word)
        key = (key >> bits) << bits
        return torch.where(scores.isfinite(), torch.where(key < 0, key ^ 0x7FFFFFFF, key).view(torch.float32), scores)

    return values


def nan_first(scores: Tensor) -> Tensor:
    """NaN outranks every number."""
    return scores.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))


def forced_by_value(scene: Scene) -> Inputs | None:
    """Forcing is a score of 1e30 or 1e29, which a larger score beats."""
    problem = scene.problem
    assert problem.scores is not None
    _, init, local = forced_cells(problem)
    scores = problem.scores.masked_fill(init, INIT_SCORE).masked_fill(local, LOCAL_SCORE)
    return replace(problem, case=replace(problem.case, init_blocks=0, local_blocks=0), scores=scores)


def local_first(scene: Scene) -> Inputs | None:
    """Local blocks come before the init blocks."""
    problem, case = scene.problem, scene.problem.case
    assert problem.scores is not None
    if not case.init_blocks or case.init_blocks + case.local_blocks <= case.topk:
        return None
    _, init, local = forced_cells(problem)
    scores = problem.scores.double().masked_fill(init, 1e300).masked_fill(local, 1e305)
    return replace(problem, case=replace(case, init_blocks=0, local_blocks=0), scores=scores)


def first_head(scene: Scene) -> Inputs | None:
    """One selection for all heads, the first one's."""
    scores = scene.problem.scores
    assert scores is not None
    return replace(scene.problem, scores=scores[:1].expand(scores.shape)) if len(scores) > 1 else None


# What becomes of finished lists: [H, T, topk] in the order of the reference, best first.


def cut_after_sort(scene: Scene) -> Tensor | None:
    """The power of two above topk is selected, sorted by id, and cut."""
    import torch

    case = scene.problem.case
    more = 1 << (case.topk - 1).bit_length()
    ids = scene.answer(replace(scene.problem, case=replace(case, topk=more)))["ids"]
    ordered = torch.where(ids < 0, 1 << 30, ids).sort(-1).values[..., : case.topk]
    return torch.where(ordered == 1 << 30, -1, ordered).int()


def ties_capped(most: int) -> Callable[[Scene], Tensor | None]:
    """Of the blocks that tie with the last one taken, only so many are kept."""

    def result(scene: Scene) -> Tensor | None:
        import torch

        ids, scores = scene.right, scene.problem.scores
        assert scores is not None
        at = scores.gather(2, ids.clamp(min=0).long())
        used = ids >= 0
        least = torch.where(used, at, torch.inf).amin(2, keepdim=True)
        tied = used & (at == least)
        kept = torch.where(tied & (tied.cumsum(2) > most), -1, ids)
        return kept.gather(2, (kept < 0).to(torch.int8).argsort(dim=2, stable=True))

    return result


def slots_numbered(scene: Scene) -> Tensor | None:
    """Unused slots hold their own number instead of -1."""
    import torch

    slot = torch.arange(scene.right.shape[-1], dtype=scene.right.dtype, device=scene.right.device)
    return torch.where(scene.right < 0, slot, scene.right)


def row_before(scene: Scene) -> Tensor | None:
    """Unused slots hold what the row before had there."""
    import torch

    ids = scene.right.clone()
    for row in range(1, ids.shape[1]):
        ids[:, row] = torch.where(ids[:, row] < 0, ids[:, row - 1], ids[:, row])
    return ids


def first_row_erased(scene: Scene) -> Tensor | None:
    """The first row of the batch is -1 throughout."""
    ids = scene.right.clone()
    ids[:, :1] = -1
    return ids


def hole_first(scene: Scene) -> Tensor | None:
    """A row that is not full begins with -1."""
    import torch

    ids = scene.right
    short = (ids < 0).any(2, keepdim=True) & (ids >= 0).any(2, keepdim=True)
    return torch.where(short, ids.roll(1, 2), ids)


def every_column(forced: bool) -> Callable[[Scene], Tensor | None]:
    """Blocks past the query's own take part, whose cells hold what memory held, NaN; or even count as local."""

    def result(scene: Scene) -> Tensor | None:
        import torch

        problem, case = scene.problem, scene.problem.case
        assert problem.scores is not None
        seen, init, local = forced_cells(problem)
        wide = -(-problem.scores.shape[-1] // 16) * 16
        room = (0, wide - problem.scores.shape[-1])
        past = ~torch.nn.functional.pad(seen, room)
        local = torch.nn.functional.pad(local, room) | (past & forced)
        scores = torch.nn.functional.pad(problem.scores.double(), room).masked_fill(past, torch.nan)
        scores = scores.masked_fill(local, 1e305).masked_fill(torch.nn.functional.pad(init, room), 1e306)
        rows = tuple(Request(i, i, 1, 0, wide * 128 if p >= 0 else 0) for i, p in enumerate(positions(case)))
        figures = {name: getattr(case, name) for name in Case.__dataclass_fields__} | {"init_blocks": 0, "local_blocks": 0}
        return scene.answer(replace(problem, case=Geometry(**figures, rows=rows), scores=scores))["ids"]

    return result


def slots_cut(scene: Scene) -> Tensor | None:
    """A list ends early, and what it holds are the best blocks; where it ends is read off the output, row by row."""
    import torch

    kept = (scene.actual >= 0).sum(-1, keepdim=True)
    slot = torch.arange(scene.right.shape[-1], device=scene.right.device)
    ended = scene.right.where(slot < kept, -1)
    return None if torch.equal(ended, scene.right) or not bool((kept > 0).any()) else ended


def tile_cut(tile: int) -> Callable[[Scene], Tensor | None]:
    """Blocks come in tiles, and only the power of two below topk goes on from one tile to the next."""

    def result(scene: Scene) -> Tensor | None:
        import torch

        problem, topk = scene.problem, scene.problem.case.topk
        assert problem.scores is not None
        keep, columns = 1 << (topk.bit_length() - 1), problem.scores.shape[-1]
        if keep == topk or columns <= tile or tile <= keep // 2:
            return None
        best = scene.answer(replace(problem, case=replace(problem.case, topk=columns)))["ids"].long()
        slot = torch.arange(columns, device=best.device).expand(best.shape)
        rank = torch.full((*best.shape[:2], columns + 1), columns, device=best.device)
        rank.scatter_(-1, best.where(best >= 0, columns), slot.contiguous())
        rank = rank[..., :columns]  # a block's place among all; invisible ones are last
        seen = rank < columns
        visible = seen.sum(-1, keepdim=True)
        block = torch.arange(columns, device=best.device)
        alive = torch.zeros_like(seen)
        for start in range(0, columns, tile):
            alive |= seen & (block >= start) & (block < start + tile)
            place = rank.masked_fill(~alive, columns).argsort(-1).argsort(-1)
            alive &= (place < keep) | (visible <= start + tile)
        order = rank.masked_fill(~alive, columns).sort(-1)
        ids = order.indices.where(order.values < columns, -1)[..., :topk].int()
        missing = topk - ids.shape[-1]
        return torch.nn.functional.pad(ids, (0, missing), value=-1) if missing > 0 else ids

    return result
