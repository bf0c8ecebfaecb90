"""Diagnosis by hypothesis: which named mistake turns the reference's answer into what the kernel gave, within the bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from m3check.explain.stages import Stand
from m3check.hypotheses.hypothesis import Stage
from m3check.hypotheses.scene import Scene, Suspect
from m3check.hypotheses.scores import comparable, forced_cells
from m3check.hypotheses.suspects import touching
from m3check.types import Inputs, Outputs

if TYPE_CHECKING:
    from torch import Tensor

PLAIN = 8.0
"""An output this many limits off is plainly wrong: a suspect must bring it down by half before it is looked at closely."""


@dataclass(frozen=True, eq=False)
class Match:
    """A suspect whose answer is what the kernel gave in every row that is wrong."""

    suspect: Suspect
    answer: Tensor
    """What it gives, of the shape of the kernel's output."""
    rows: Tensor
    """Bool [H, T]: rows that it changes."""
    everywhere: bool
    """Whether the kernel gave this answer in all rows that the suspect changes, and not in some of them only."""

    def spared(self, wrong: Tensor) -> int:
        """How many rows the suspect changes and the kernel has right."""
        return 0 if self.everywhere else int((self.rows & ~wrong).sum())


def wrong_rows(stand: Stand) -> Tensor:
    """Bool [H, T]: which rows of which (KV) head are off; all where only a statistic over rows says that some are."""
    chart, stage = stand.wrong, stand.scene.stage
    rows = _rows(chart > 1, stand)
    if stage == "attend":
        rows = rows | _rows(~stand.scene.actual.isfinite() & stand.expected["out"].isfinite(), stand)
    if stand.findings and not rows.any():
        rows = rows | True
    return rows


def _rows(cells: Tensor, stand: Stand) -> Tensor:
    """Cells of an output as rows [H, T]."""
    stage, case = stand.scene.stage, stand.scene.problem.case
    if stage == "score":
        return cells.any(-1)
    if stage == "select":
        return cells if cells.dim() == 2 else cells.any(-1)
    rows: Tensor = cells.any(-1).unflatten(1, (case.kv_heads, -1)).any(-1).T
    return rows


def matches(stand: Stand, extra: Sequence[Suspect] = (), told: Callable[[str], None] = lambda text: None) -> list[Match]:
    """Every suspect of the stage that explains all wrong rows, those that need no exceptions first."""
    wrong = wrong_rows(stand)
    found = []
    for suspect in (*extra, *touching(stand.scene.stage)):
        told(suspect.name)
        try:
            match = _tried(stand, suspect, wrong)
        except (IndexError, RuntimeError):  # the changed inputs are none that a reference takes
            continue
        if match is not None:
            found.append(match)
    if any(match.everywhere for match in found):
        found = [match for match in found if match.everywhere]
    return sorted(found, key=lambda match: match.spared(wrong))


def _tried(stand: Stand, suspect: Suspect, wrong: Tensor) -> Match | None:
    scene = stand.scene
    if suspect.result is not None:
        spoiled = suspect.result(scene)
        if spoiled is None:
            return None
        if scene.stage == "select":
            return _same_lists(stand, suspect, spoiled, wrong)
        problem, expected = scene.problem, dict(stand.expected) | {scene.name: spoiled}
        if "plain_score" in expected:
            expected["plain_score"] = spoiled
    else:
        assert suspect.inputs is not None
        changed = suspect.inputs(scene)
        if changed is None:
            return None
        problem, expected = _asked(scene, changed)
    return _judged(stand, suspect, problem, expected, wrong)


def _asked(scene: Scene, changed: Inputs) -> tuple[Inputs, dict[str, Tensor]]:
    """(changed inputs dequantised, the reference's answer cut to the shape of the output)."""
    changed = scene.dequantised(changed)
    answer = dict(scene.answer(changed))
    columns = scene.actual.shape[-1]
    for name in (scene.name, "plain_score"):
        if name in answer:
            answer[name] = _cut(answer[name], columns, scene.name)
    return changed, answer


def _cut(x: Tensor, columns: int, name: str) -> Tensor:
    import torch

    missing = columns - x.shape[-1]
    if missing <= 0:
        return x[..., :columns]
    return torch.nn.functional.pad(x, (0, missing), value=-1 if name == "ids" else -torch.inf)


def _judged(stand: Stand, suspect: Suspect, problem: Inputs, expected: Outputs, wrong: Tensor) -> Match | None:
    scene = stand.scene
    actual, right = scene.actual, stand.expected[scene.name]
    answer = expected[scene.name]
    if scene.stage == "select":
        failing = _selection_fails(stand, problem, expected)
        changed = _lists_differ(stand, answer, right)
        if bool((failing & wrong).any()) or not bool((changed & wrong).any()):
            return None
        return Match(suspect, answer, changed, not bool((failing & changed).any()))
    if not _alike(problem, scene.problem):
        problem = (
            scene.problem
        )  # a channel that hides a token by a huge key, slots twice: the bound is that of the plain inputs
    actual = stand.shown(problem, expected, actual)
    rounded = answer.to(actual.dtype)
    nan = answer.isnan()
    cells_wrong = _cells(wrong, actual, scene)
    if bool((nan & ~actual.isnan() & cells_wrong).any()) or bool(
        (~nan & actual.isnan() & answer.isfinite() & cells_wrong).any()
    ):
        return None
    differs = _rows((rounded != right.to(actual.dtype)) & ~(nan & right.isnan()), stand)
    if not bool((differs & wrong).any()):
        return None
    if not nan.any() and _far(actual, answer, stand, cells_wrong):
        return None
    # Rows that are right take no part: there the suspect's own answer stands in for the kernel's.
    safe = {**expected, scene.name: answer.where(~nan, 0.0)}
    if "plain_score" in safe and nan.any():
        safe["plain_score"] = safe["plain_score"].where(~nan, 0.0)
    mixed = actual.where(cells_wrong, rounded).where(~nan, 0.0)
    if problem.case.op == "index_decode_score" and stand.setting.profile.forced_scores:
        mixed = mixed.where(cells_wrong, safe["score"].to(mixed.dtype))
    if stand.failures(problem, safe, mixed):
        return None
    elsewhere = differs & ~wrong
    everywhere = not bool(elsewhere.any()) or not stand.failures(
        problem, safe, actual.where(cells_wrong | _cells(elsewhere, actual, scene), rounded).where(~nan, 0.0)
    )
    return Match(suspect, answer, differs, everywhere)


def _alike(one: Inputs, two: Inputs) -> bool:
    """Whether queries and id lists have the same shapes."""
    return all(
        (a is None) == (b is None) and (a is None or b is None or a.shape == b.shape)
        for a, b in ((one.q, two.q), (one.topk_idx, two.topk_idx))
    )


def _cells(rows: Tensor, like: Tensor, scene: Scene) -> Tensor:
    """Rows [H, T] as a mask of an output's cells."""
    if scene.stage == "attend":
        return rows.T.repeat_interleave(scene.problem.case.gqa, 1)[..., None].expand(like.shape)
    return rows[..., None].expand(like.shape)


def _far(actual: Tensor, answer: Tensor, stand: Stand, cells: Tensor) -> bool:
    """Whether an output that is plainly wrong is hardly nearer to the suspect's answer than to the right one."""
    chart = stand.wrong
    if not bool((chart.where(chart.isfinite(), 0) > PLAIN).any()):
        return False

    def size(given: Tensor, wanted: Tensor) -> float:
        error = (given.double() - wanted.double()).abs()
        return float(error.where(cells & error.isfinite(), 0).square().sum())

    right = stand.expected[stand.scene.name]
    judged = stand.shown(stand.scene.problem, stand.expected, stand.scene.actual)
    if bool((cells & right.isfinite() & ~judged.isfinite()).any()):
        return False
    return size(actual, answer) > 0.25 * size(judged, right)


# Selections ----------------------------------------------------------------------------------------------------------


def _worth(scene: Scene, ids: Tensor) -> Tensor:
    """What each slot is worth [H, T, topk]: lists of equal worth are equally right; unused slots are the least."""
    import torch

    problem = scene.problem
    assert problem.scores is not None
    seen, init, local = forced_cells(problem)
    worth = comparable(problem.scores).masked_fill(init, 2e305).masked_fill(local, 1e305)
    columns = worth.shape[-1]
    # An invisible block is worth its own number, so that one is told from another and from an unused slot.
    block = torch.arange(columns, device=worth.device).double()
    worth = worth.where(seen, -1.5e305 - block * 1e300)
    worth = torch.nn.functional.pad(worth, (0, 1), value=-2e305)
    out_of_range = -1.7e305 - ids.double() * 1e300
    got = worth.gather(-1, ids.where((ids >= 0) & (ids < columns), columns).long())
    return torch.where(ids >= columns, out_of_range, got)


def _lists_differ(stand: Stand, one: Tensor, two: Tensor) -> Tensor:
    """Rows [H, T] whose lists are not worth the same, slot by slot; in any order where none is promised."""
    if stand.scene.profile.tie_rule == "smaller_id" and stand.scene.profile.id_order == "score":
        return (one != two).any(-1)  # one list alone is right
    a, b = _worth(stand.scene, one), _worth(stand.scene, two)
    if stand.scene.profile.id_order == "any":
        holes = ((one < 0) != (two < 0)).any(-1)
        return (a.sort(-1).values != b.sort(-1).values).any(-1) | holes
    return (a != b).any(-1)


def _same_lists(stand: Stand, suspect: Suspect, spoiled: Tensor, wrong: Tensor) -> Match | None:
    right = stand.expected["ids"]
    differs = _lists_differ(stand, spoiled, right)
    misses = _lists_differ(stand, stand.scene.actual, spoiled)
    if not bool((differs & wrong).any()) or bool((misses & wrong).any()):
        return None
    return Match(suspect, spoiled, differs, not bool((misses & differs).any()))


def _selection_fails(stand: Stand, problem: Inputs, expected: Outputs) -> Tensor:
    """Rows [H, T] that are not a right selection of the changed problem; blocks that only it sees count as they are."""
    from m3check.hypotheses.geometry import Geometry

    scene = stand.scene
    longer = isinstance(problem.case, Geometry) and any(
        row.kv_len > scene.problem.case.context for row in problem.case.rows
    )
    if longer or problem.case.topk != scene.problem.case.topk:
        return _lists_differ(stand, scene.actual, expected["ids"])
    from m3check.checks import charts

    # A change may put scores out of the ordinary in, where a profile promises nothing: that excuses no selection here.
    return charts.ids_chart(stand.view(problem, expected), promised=False) > 1


def classes(found: Sequence[Match], stand: Stand) -> Iterator[list[Match]]:
    """Matches whose answers are the same in all rows that are wrong, together: this case cannot tell them apart."""
    import torch

    wrong, left = wrong_rows(stand), list(found)

    def shown(match: Match) -> Tensor:
        answer = match.answer[..., : stand.scene.actual.shape[-1]].double().nan_to_num(nan=1e99)
        return answer.where(_cells(wrong, answer, stand.scene), 0.0)

    while left:
        first = shown(left[0])
        same = [match for match in left if match is left[0] or torch.equal(shown(match), first)]
        left = [match for match in left if all(match is not other for other in same)]
        yield same


def kept(before: Inputs, now: Inputs, stage: Stage) -> list[Suspect]:
    """Figures of an earlier call that a kernel may have kept: the reference on now's inputs with then's figures."""
    figures: dict[str, Callable[[Inputs], Inputs]] = {}
    if before.sm_scale != now.sm_scale:
        figures["sm_scale"] = lambda inputs: replace(inputs, sm_scale=before.sm_scale)
    for name in ("topk", "init_blocks", "local_blocks"):
        value = getattr(before.case, name)
        if value != getattr(now.case, name):
            figures[name] = _with(name, value)
    if len(figures) > 1:
        figures = {"several figures": _all(tuple(figures.values())), **figures}

    def suspect(name: str, change: Callable[[Inputs], Inputs]) -> Suspect:
        words = f"{name} is that of the first call"
        return Suspect(f"kept_{name}", stage, words, lambda scene: change(scene.problem))

    found = [suspect(name, change) for name, change in figures.items()]
    lengths = before.case.kv_lens
    if len(lengths) == len(now.case.kv_lens) and lengths != now.case.kv_lens:
        from m3check.hypotheses.geometry import moved

        change = moved(lambda request, i: lengths[request.index] - request.query_len + i)
        found.append(
            Suspect(
                "kept_lengths",
                stage,
                "lengths are those of the first call",
                lambda scene: change(scene.problem),
            )
        )
    return found


def _with(name: str, value: int) -> Callable[[Inputs], Inputs]:
    fields = {name: value}
    return lambda inputs: replace(inputs, case=replace(inputs.case, **fields))  # type: ignore[arg-type]


def _all(changes: Sequence[Callable[[Inputs], Inputs]]) -> Callable[[Inputs], Inputs]:
    def change(inputs: Inputs) -> Inputs:
        for each in changes:
            inputs = each(inputs)
        return inputs

    return change
