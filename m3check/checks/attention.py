"""Attention outputs: each element and each row within what rounding explains, and no named defect that fits the error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from m3check.checks.bounds import whole
from m3check.checks.filters import EXPLAINED, Match, best_scale, best_token
from m3check.checks.likeness import looks_like
from m3check.checks.noise import SMALLEST, SUBTILE, Pairs, noise
from m3check.checks.residue import Residue, row_limit
from m3check.checks.rowkinds import dead_rows, promised_rows, valid_ids
from m3check.checks.view import View
from m3check.types import BLOCK, Finding, Status

EQUAL_CHANNELS = frozenset({"membership"})
"""Fills where many channels hold one number and round alike: statistics over channels say nothing, probes.py counts."""


@dataclass
class Worst:
    """The worst place of one test so far: measured and limit, where, and how many places are over."""

    measured: float = 0.0
    limit: float = 0.0
    ratio: float = -1.0
    row: int = 0
    head: int = 0
    channel: int = 0
    over: int = 0

    def take(self, measured: Tensor, limit: Tensor, rows: Tensor, heads: Tensor) -> None:
        """Look at one chunk: [P, G] or [P, G, D], pairs of `rows` and `heads` [P]."""
        # A limit of 0 is meant: there only an error of 0 is right.
        ratio = torch.where(measured > limit, measured / limit, measured / limit.clamp(min=1e-38))
        place = ratio.argmax()
        values = [
            ratio.flatten()[place],
            measured.flatten()[place],
            limit.flatten()[place],
            (measured > limit).sum(),
            place,
        ]
        worst, value, bound, over, flat = torch.stack([x.double() for x in values]).tolist()
        self.over += int(over)
        if worst > self.ratio:
            self.ratio, self.measured, self.limit = worst, value, bound
            inner = ratio.shape[1] * (ratio.shape[2] if ratio.dim() == 3 else 1)
            pair, rest = divmod(int(flat), inner)
            group, self.channel = divmod(rest, ratio.shape[2]) if ratio.dim() == 3 else (rest, 0)
            self.row, self.head = int(rows[pair]), int(heads[pair]) * ratio.shape[1] + group


@dataclass
class Tests:
    """The four tests over all live rows that the kernel promises, and the element test over the others."""

    element: Worst = field(default_factory=Worst)
    row: Worst = field(default_factory=Worst)
    unpromised: Worst = field(default_factory=Worst)
    token: Match | None = None
    scale: Match | None = None


def _order(view: View) -> tuple[Tensor, Tensor, list[int]]:
    """(pairs [M, 2] of (row, kv head), their valid ids [M, topk] first slots first, how many each has), longest first."""
    ids, valid = view.attended.transpose(0, 1), valid_ids(view)
    earlier = torch.ones(ids.shape[-1], ids.shape[-1], dtype=torch.bool, device=ids.device).tril(-1)
    pairs = (~dead_rows(view)).nonzero()
    ids, valid = ids[pairs[:, 0], pairs[:, 1]], valid[pairs[:, 0], pairs[:, 1]]
    for part in torch.arange(len(ids), device=ids.device).split(2**22 // max(1, ids.shape[-1] ** 2) + 1):
        twice = (ids[part][:, :, None] == ids[part][:, None, :]) & earlier & valid[part][:, None, :]
        valid[part] &= ~twice.any(-1)  # a duplicate is outside the contract; here it counts once
    count = valid.sum(-1)
    order = count.argsort(descending=True, stable=True)
    front = (~valid).int().argsort(dim=-1, stable=True)
    return pairs[order], ids.where(valid, -1).gather(1, front)[order], count[order].tolist()


def gathered(view: View) -> Iterator[tuple[Tensor, Tensor, Pairs]]:
    """(rows [P], kv heads [P], gathered tensors), few enough pairs at a time to fit a fixed memory."""
    q, k, v = view.problem.q, view.problem.k, view.problem.v
    assert q is not None
    assert k is not None
    assert v is not None
    rows, group, dim = view.rows, view.case.gqa, view.case.head_dim
    pairs, ids, counts = _order(view)
    integers = whole(q, k)
    budget = 2**31 if view.device.type == "cuda" else 2**26
    start = 0
    while start < len(counts):
        slots = counts[start]
        size = slots * view.span * 4 * (7 * dim + 16 * group) + slots * group * dim * 24
        stop = min(len(counts), start + max(1, budget // size))
        row, head = pairs[start:stop].unbind(-1)
        listed = ids[start:stop, :slots]
        token = view.tokens(listed)  # [P, n]
        token = torch.nn.functional.pad(token, (0, -token.shape[1] % BLOCK), value=-1)
        there = (token >= 0) & (token < rows.kv_len[row, None])
        attended = there & (token <= view.last[row, None])
        source = (rows.kv_start[row, None] + token).where(there, 0)
        values = v[source, head[:, None]].float().masked_fill_(~there[..., None], 0)
        future = there & ~attended  # kept for the filters: their size does not set the unit
        past = values.masked_fill(~attended[..., None], 0) if future.any() else values
        unit = past.abs().amax(1, keepdim=True)
        unit = unit.where(unit > 0, 1)
        values = values / unit
        keys = k[source, head[:, None]].float().masked_fill_(~there[..., None], 0)
        grouped = q[row].unflatten(1, (-1, group))[torch.arange(len(row), device=row.device), head].float()
        listing = view.span == 1
        tile = SMALLEST if listing else SUBTILE
        size_of, square_of = values.abs(), values.square()
        yield (
            row,
            head,
            Pairs(
                grouped, keys, values, size_of, square_of, unit.double(), attended, there, token, integers, tile, listing
            ),
        )
        start = stop


def analyse(view: View) -> Tests:
    """All tests in one pass over the pairs; made once for a result."""
    if "attention" in view.memo:
        done: Tests = view.memo["attention"]
        return done
    tests, case, setting = Tests(), view.case, view.setting
    actual = view.actual("out")
    expected, promised = view.expected_out, promised_rows(view)
    some_unpromised = bool((~promised & ~dead_rows(view)).any())
    elements = case.total_queries * case.heads * case.head_dim
    deviations = setting.deviations(elements)
    found = setting.deviations(
        case.total_queries * (case.heads + case.kv_heads) * (min(case.context, case.topk * view.span) + 2)
    )
    surprise = setting.surprise(case.total_queries * case.heads)
    lane = case.gqa
    for row, head, pairs in gathered(view):
        index = (head[:, None] * lane + torch.arange(lane, device=head.device), row[:, None])
        wanted, given = expected[index[1], index[0]].double(), actual[index[1], index[0]].double()
        model = noise(pairs, wanted, actual.dtype, view.problem.sm_scale, setting, deviations)
        ok = promised[row, head]
        error = (given - wanted).where(given.isfinite() & wanted.isfinite(), 0) / pairs.unit
        limit = torch.minimum(deviations * (model.from_tokens + model.own).sqrt(), model.most) + model.bias + model.half
        error = error.float()
        # the limit in the units of the output, so that the finding can be read
        if some_unpromised:
            off = (error * ~ok[:, None, None]).abs() * pairs.unit.float()
            tests.unpromised.take(off, limit * pairs.unit.float(), row, head)
            error = error * ok[:, None, None]
        tests.element.take((error.abs() * pairs.unit.float()), limit * pairs.unit.float(), row, head)
        residue = Residue.of(error, model)
        measured, allowed = row_limit(residue, model, pairs, surprise)
        if "chart" in view.memo:  # made by checks/charts.py: where it is wrong, not only that it is
            ratio = torch.where(error != 0, error.abs() / limit, 0)
            view.memo["chart"][index[1], index[0]] = ratio.where(given.isfinite() == wanted.isfinite(), torch.inf).double()
            view.memo["rows"][index[1], index[0]] = (measured / allowed).double()
            view.memo["limit"][index[1], index[0]] = (limit * pairs.unit.float()).double()
        tests.row.take(measured, allowed, row, head)
        tests.token = best_token(residue, model, pairs, found, row, head, tests.token)
        tests.scale = best_scale(residue, model, pairs, found, row, head, tests.scale)
    view.memo["attention"] = tests
    return tests


def _head(view: View, worst: Worst) -> str:
    return f"{view.rows.name(worst.row)}, query head {worst.head} (kv head {worst.head // view.case.gqa})"


def _finding(view: View, check: str, worst: Worst, what: str, hint: str) -> Finding:
    status = Status.FAILED if worst.over else Status.PASSED
    where = _head(view, worst) + (f", channel {worst.channel}" if what == "elements" else "")
    count = f"at least {worst.over}" if what == "rows" else f"{worst.over}"  # not every row is worked out
    text = f"{count} {what} are further off than rounding explains{hint}" if worst.over else ""
    return Finding(check, status, max(worst.measured, 0.0), worst.limit, where, text)


def check_elements(view: View) -> list[Finding]:
    """Every output element is within bias + λ·sqrt(variance) + half an ulp of the exact result."""
    tests = analyse(view)
    hint = _cause(view, tests) if tests.element.over else ""
    findings = [_finding(view, "element", tests.element, "elements", hint)]
    if tests.unpromised.over:
        worst = tests.unpromised
        note = f"{worst.over} elements are wrong in rows whose id list this kernel does not accept"
        place = f"{_head(view, worst)}, channel {worst.channel}"
        findings.append(Finding("element", Status.NOTED, worst.measured, worst.limit, place, note))
    return findings


def _cause(view: View, tests: Tests) -> str:
    """The named defect that explains the error best, or whose right answer the worst row is."""
    red = [match for match in (tests.token, tests.scale) if match is not None and match.red]
    best = max(red, key=lambda match: match.share, default=None)
    alike = looks_like(view, tests.element.row, tests.element.head)
    if not alike and best is not None and best.share > EXPLAINED:
        return "; " + best.hint(int(view.rows.position[best.row]))
    return alike


def check_rows(view: View) -> list[Finding]:
    """The errors of a row, each in units of its σ, are no larger together than noise is."""
    if view.case.fill in EQUAL_CHANNELS:
        return []
    return [_finding(view, "row", analyse(view).row, "rows", " (rms over the channels, each in units of its own σ)")]


def check_tokens(view: View) -> list[Finding]:
    """No token or block lost or counted twice, for a whole GQA group or for one head, explains the error."""
    return _match(view, "token", analyse(view).token)


def check_scale(view: View) -> list[Finding]:
    """No other softmax scale and no factor on the output explains the error."""
    return _match(view, "scale", analyse(view).scale)


def _match(view: View, check: str, match: Match | None) -> list[Finding]:
    if view.case.fill in EQUAL_CHANNELS:
        return []
    if match is None:
        return [Finding(check, Status.PASSED, 0.0, 0.0)]
    group = view.case.gqa
    if match.group is None:
        heads = (
            f"kv head {match.kv_head}, its whole group of {group} query heads"
            if group > 1
            else f"query head {match.kv_head}"
        )
    else:
        heads = f"query head {match.kv_head * group + match.group} alone (kv head {match.kv_head})"
    where = f"{view.rows.name(match.row)}, {heads}" + match.place()
    status = Status.FAILED if match.red else Status.PASSED
    return [
        Finding(
            check, status, match.z, match.limit, where, match.hint(int(view.rows.position[match.row])) if match.red else ""
        )
    ]
