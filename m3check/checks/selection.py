"""Selected ids: well formed, forced blocks among them, and no better block left out — certified, not compared."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from m3check.checks.scores import plain_scores, slack, visible_cells
from m3check.checks.view import View
from m3check.paging import IMPOSSIBLE_ID
from m3check.types import LOCAL_SCORE, ODD_SCORES, Finding, Status

# Ranks as one fp64 number: forced classes above +inf, NaN below -inf.
OWN, INIT, LOCAL = 1e308, 1e307, 1e306
PLUS_INF, MINUS_INF, NOT_A_NUMBER = 1e300, -1e300, -1e301


@dataclass(frozen=True)
class Lists:
    """A selection [H, T, topk] taken apart."""

    ids: Tensor
    count: Tensor  # [T] ids that a row must have
    listed: Tensor  # [H, T, topk] bool: a visible id
    times: Tensor  # [H, T, K] how often each visible block is listed

    @classmethod
    def of(cls, view: View) -> Lists:
        """The kernel's own ids."""
        ids = view.actual("ids").long()
        visible, columns = view.rows.visible, view.case.block_columns
        listed = (ids >= 0) & (ids < visible[:, None])
        times = torch.zeros(*ids.shape[:2], columns + 1, dtype=torch.int32, device=ids.device)
        times.scatter_add_(2, ids.where(listed, columns), torch.ones_like(ids, dtype=torch.int32))
        return cls(ids, visible.clamp(max=view.case.topk), listed, times[..., :columns])


def _lists(view: View) -> Lists:
    if "lists" not in view.memo:
        view.memo["lists"] = Lists.of(view)
    result: Lists = view.memo["lists"]
    return result


def forced_blocks(view: View) -> tuple[Tensor, Tensor, Tensor]:
    """(own, init, local) bool [T, K]: the query's own block, init blocks that are not local, and local blocks."""
    case, seen = view.case, visible_cells(view)
    block = torch.arange(case.block_columns, device=view.device)
    visible = view.rows.visible[:, None]
    local = seen & (block >= visible - case.local_blocks)
    init = seen & (block < case.init_blocks) & ~local
    return local & (block == visible - 1), init, local


def _faults(view: View) -> list[tuple[Tensor, str]]:
    """Rows [H, T] that break the structure of a list, one entry for each way to break it."""
    lists = _lists(view)
    ids, slot = lists.ids, torch.arange(view.case.topk, device=view.device)
    head = slot < lists.count[:, None]  # [T, topk]
    columns = view.case.block_columns
    faults = (
        ("never written", ids == IMPOSSIBLE_ID, "the slot still holds what was in the buffer"),
        ("-1 before the end", (ids == -1) & head, "fewer ids than min(topk, visible blocks), or -1 in between"),
        ("not -1 in an unused slot", (ids != -1) & ~head, "more ids than the row has visible blocks, or a stale slot"),
        ("negative id", (ids < -1) & head, "an id below -1"),
        ("id out of range", (ids >= columns) & head, "past every block of the batch"),
        ("invisible id", head & (ids >= view.rows.visible[:, None]) & (ids < columns), "a block after the query's own"),
    )
    rows = [(fault.any(-1), f"{name}: {meaning}") for name, fault, meaning in faults]
    rows.append(((lists.times > 1).any(-1), "a block is listed twice; attention would give it double weight"))
    if view.setting.profile.dead_ids == "any":
        rows = [(fault & (lists.count > 0), meaning) for fault, meaning in rows]
    return rows


def check_structure(view: View) -> list[Finding]:
    """min(topk, visible) distinct visible ids, then -1 to the end."""
    rows = _faults(view)
    promised = _promised(view, _own_scores(view)[0])
    flags = torch.stack([torch.stack([(r & promised).any(), (r & ~promised).any()]) for r, _ in rows]).tolist()
    findings = []
    for status, column, among, note in ((Status.FAILED, 0, promised, ""), (Status.NOTED, 1, ~promised, UNPROMISED)):
        found = next(((r, hint) for (r, hint), flag in zip(rows, flags, strict=True) if flag[column]), None)
        if found is not None:
            findings.append(_fault(view, "ids", found[0] & among, found[1] + note, status))
    if not findings or findings[0].status is Status.NOTED:
        findings.insert(0, Finding("ids", Status.PASSED, 0.0, 0.0))
    return findings


def _fault(view: View, check: str, rows: Tensor, hint: str, status: Status = Status.FAILED, limit: float = 0.0) -> Finding:
    """A finding about rows [H, T], named by the first and with its list."""
    count, first = int(rows.sum()), int(rows.flatten().int().argmax())
    head, row = divmod(first, view.case.total_queries)
    ids = view.actual("ids")[head, row].tolist()
    where = f"{view.rows.name(row)}, index head {head}, {int(view.rows.visible[row])} visible blocks"
    return Finding(check, status, float(count), limit, where, f"{hint}; {count} rows; this one: {ids}")


def _own_scores(view: View) -> tuple[Tensor, Tensor | None]:
    """(scores [H, T, K], slack): the op's input or the kernel's own output exactly, else the reference's within bounds."""
    if view.problem.scores is not None and view.op.name in ("index_topk", "index_topk_cp", "index_topk_cp_table"):
        return view.problem.scores.to(view.device), None
    if "score" in view.run.outputs:
        return view.actual("score"), None
    return plain_scores(view), slack(view).double()


def _ranks(view: View, scores: Tensor) -> Tensor:
    """Scores as comparable fp64 [H, T, K]: forced blocks by the profile's rule, NaN lowest, -0 as 0."""
    rank = scores.double()
    rank = rank.where(rank != math.inf, PLUS_INF).where(rank != -math.inf, MINUS_INF).where(~rank.isnan(), NOT_A_NUMBER)
    own, init, local = forced_blocks(view)
    rank = rank.masked_fill(init, INIT).masked_fill(local, LOCAL)
    if view.setting.profile.forcing == "own_block":
        full = (init | local).sum(-1, keepdim=True) > view.case.topk
        rank = rank.masked_fill(full & init, LOCAL)  # promises the own block, and only forced ones
        rank = rank.masked_fill(own, OWN)
    return rank.masked_fill(~visible_cells(view), -math.inf)


UNPROMISED = ": a row with NaN, infinite, -0 or >= 1e29 scores, where this kernel promises nothing"


def _promised(view: View, scores: Tensor) -> Tensor:
    """Rows [H, T] that the profile promises to select rightly: those with ordinary competing scores, or odd as promised."""
    _, init, local = forced_blocks(view)
    competing = visible_cells(view) & ~(init | local)
    nan = scores.isnan() & competing
    short = (visible_cells(view) & ~nan).sum(-1) < _lists(view).count
    odd = {
        "nan": nan.any(-1) & ~short,
        "mostly_nan": nan.any(-1) & short,
        "infinite": (scores.isinf() & competing).any(-1),
        "negative_zero": ((scores == 0) & scores.signbit() & competing).any(-1),
        "huge": (scores.isfinite() & (scores >= LOCAL_SCORE) & competing).any(-1),
    }
    promised = torch.ones(scores.shape[:2], dtype=torch.bool, device=scores.device)
    for kind in ODD_SCORES - view.setting.profile.odd_scores:
        promised &= ~odd[kind]
    return promised


def _violations(view: View) -> tuple[list[tuple[str, Tensor, str]], Tensor, Tensor, Tensor]:
    """((name, rows [H, T], hint) of each way to select wrongly; rank, margin and chosen [H, T, K])."""
    lists, profile = _lists(view), view.setting.profile
    scores, beta = _own_scores(view)
    rank, seen = _ranks(view, scores), visible_cells(view)
    _, init, local = forced_blocks(view)
    chosen = lists.times > 0
    margin = torch.zeros_like(rank) if beta is None else beta.masked_fill(init | local, 0)
    low = (rank + margin).masked_fill(~chosen, math.inf).amin(-1)  # the worst chosen block at its best
    high = (rank - margin).masked_fill(chosen | ~seen, -math.inf).amax(-1)  # the best left out at its worst
    full = chosen.sum(-1) >= lists.count  # a shorter list is the structure check's finding
    wrong = full & (low < high)
    lost = wrong & (high >= LOCAL)  # a forced block is out
    tied = _wrong_ties(view, rank, chosen) & full if profile.tie_rule != "any" and beta is None else None
    order = _wrong_order(view, lists, rank, margin) & full if profile.id_order != "any" else None
    groups = [lost, wrong & ~lost, *(x for x in (tied, order) if x is not None)]
    words = ["a forced block (init or local) was left out for one that is not, or for one of lower rank", "", "", ""]
    told = ((tied, _TIES[profile.tie_rule]), (order, _ORDER[profile.id_order]))
    words = words[:2] + [w for x, w in told if x is not None]
    names = ["forced", "selection", *(w for x, w in ((tied, "ties"), (order, "order")) if x is not None)]
    return list(zip(names, groups, words, strict=True)), rank, margin, chosen


def wrong_rows(view: View, *, promised: bool) -> Tensor:
    """Rows [H, T] whose list is broken or not the best; with `promised` only where the profile says that it is neither."""
    rows = [*(rows for rows, _ in _faults(view)), *(rows for _, rows, _ in _violations(view)[0])]
    wrong = torch.stack(rows).any(0)
    return wrong & _promised(view, _own_scores(view)[0]) if promised else wrong


def check_optimality(view: View) -> list[Finding]:
    """No block left out outranks a chosen one, by more than what rounding of unseen scores explains; ties as promised."""
    if not view.case.context:  # padded rows alone: there is nothing to choose from
        return [Finding("selection", Status.PASSED, 0.0, 0.0)]
    violations, rank, margin, chosen = _violations(view)
    promised = _promised(view, _own_scores(view)[0])
    groups = [rows for _, rows, _ in violations]
    flags = torch.stack([torch.stack([(g & promised).any(), (g & ~promised).any()]) for g in groups]).tolist()
    findings = []
    for (name, group, hint), (broken, unpromised) in zip(violations, flags, strict=True):
        if name == "selection":
            findings.append(_swap(view, group & promised, rank, margin, chosen, broken))
        elif broken:
            findings.append(_fault(view, name, group & promised, hint))
        else:
            findings.append(Finding(name, Status.PASSED, 0.0, 0.0))
        if unpromised:
            words_ = (hint or "a better block was left out") + UNPROMISED
            findings.append(_fault(view, name, group & ~promised, words_, Status.NOTED))
    return findings


_TIES = {
    "any": "",
    "smaller_id": "of equal scores, a larger id was taken before a smaller one, which this kernel promises not to do",
    "larger_id": "of equal scores, a smaller id was taken before a larger one, which this kernel promises not to do",
}
_ORDER = {
    "any": "",
    "ascending": "ids are not in ascending order, which this kernel promises",
    "score": "ids are not in descending order of score with forced blocks first, which this kernel promises",
}


def _swap(view: View, wrong: Tensor, rank: Tensor, margin: Tensor, chosen: Tensor, broken: bool) -> Finding:
    """The optimality finding: by how much the best block left out beats the worst one chosen, and the slack."""
    if not broken:
        return Finding("selection", Status.PASSED, 0.0, float(margin.max()) if margin.numel() else 0.0)
    head, row = divmod(int(wrong.flatten().int().argmax()), view.case.total_queries)
    seen = visible_cells(view)[row]
    taken = int((rank + margin)[head, row].masked_fill(~chosen[head, row], math.inf).argmin())
    out = int((rank - margin)[head, row].masked_fill(chosen[head, row] | ~seen, -math.inf).argmax())
    gap, slack_ = (
        (rank[head, row, out] - rank[head, row, taken]).item(),
        (margin[head, row, out] + margin[head, row, taken]).item(),
    )
    hint = (
        f"block {taken} (score {rank[head, row, taken].item():.7g}) was taken and block {out} "
        f"({rank[head, row, out].item():.7g}) left out; {int(wrong.sum())} rows"
    )
    return Finding("selection", Status.FAILED, gap, slack_, f"{view.rows.name(row)}, index head {head}", hint)


def _wrong_ties(view: View, rank: Tensor, chosen: Tensor) -> Tensor:
    """Rows [H, T] where, of the blocks that share the lowest chosen rank, others than those of promised ids were taken."""
    lowest = rank.masked_fill(~chosen, math.inf).amin(-1, keepdim=True)
    tied = (rank == lowest) & visible_cells(view)
    taken = (tied & chosen).sum(-1, keepdim=True)
    place = tied.flip(-1).cumsum(-1).flip(-1) if view.setting.profile.tie_rule == "larger_id" else tied.cumsum(-1)
    return (tied & chosen & (place > taken)).any(-1)


def _wrong_order(view: View, lists: Lists, rank: Tensor, margin: Tensor) -> Tensor:
    """Rows [H, T] whose ids are not in the promised order."""
    both = lists.listed[..., 1:] & lists.listed[..., :-1]
    if view.setting.profile.id_order == "ascending":
        return (both & (lists.ids[..., 1:] <= lists.ids[..., :-1])).any(-1)
    safe = lists.ids.where(lists.listed, 0)
    value, slack_ = rank.gather(2, safe), margin.gather(2, safe)
    later, earlier = value[..., 1:] - slack_[..., 1:], value[..., :-1] + slack_[..., :-1]
    wrong = both & (later > earlier)
    if view.setting.profile.tie_rule != "any":
        equal = (value[..., 1:] == value[..., :-1]) & (slack_[..., 1:] == 0)
        smaller = view.setting.profile.tie_rule == "smaller_id"
        before, after = (lists.ids[..., :-1], lists.ids[..., 1:]) if smaller else (lists.ids[..., 1:], lists.ids[..., :-1])
        wrong |= both & equal & (after < before)
    return wrong.any(-1)
