"""Tables for a paged attention: the tokens that a row's pages and its context name are those that the row should see."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from m3check.checks.view import View
from m3check.types import BLOCK, Finding, Status

PAGE = 16
"""Tokens of a page."""

PAGES = BLOCK // PAGE

FOREIGN = -2
"""In `pages`: a page id that no visible or later block of the row's request has, or half of one."""


def check_context(view: View) -> list[Finding]:
    """Each row's context is the number of tokens that it should see."""
    actual, wanted = view.actual("context").long(), view.on_own_ids("context")
    wrong = actual != wanted
    if not bool(wrong.any()):
        return [Finding("context", Status.PASSED, 0.0, 0.0)]
    row = int(wrong.int().argmax())
    told = f"{int(actual[row])} tokens, wanted {int(wanted[row])}; {int(wrong.sum())} rows"
    off = float((actual - wanted).abs().max())
    return [Finding("context", Status.FAILED, off, 0.0, view.rows.name(row), told)]


def _faults(view: View) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[T] each: other pages before the last one; another last page; a foreign page behind; how many pages there are."""
    actual, wanted, context = view.actual("pages").long(), view.on_own_ids("pages"), view.on_own_ids("context")
    cell = torch.arange(actual.shape[-1], device=actual.device)
    used = (context[:, None] + PAGE - 1) // PAGE
    last = (cell == used - 1) & (context[:, None] % PAGE != 0)
    whole = (cell < used) & ~last
    moved = (_sorted(actual, whole) != _sorted(wanted, whole)).any(-1)
    cut = (last & (actual != wanted)).any(-1)
    own = view.rows.position[:, None].div(BLOCK, rounding_mode="floor")
    behind = ((cell >= used) & (actual != -1) & (actual.div(PAGES, rounding_mode="floor") != own)).any(-1)
    return moved, cut, behind, used


def chart(view: View) -> Tensor:
    """[T, cells]: infinite in rows of wrong pages, 0 in others."""
    moved, cut, behind, _ = _faults(view)
    wrong = (moved | cut | behind)[:, None].expand(view.actual("pages").shape)
    return torch.where(wrong, torch.inf, 0.0)


def exact_chart(view: View, name: str) -> Tensor:
    """Infinite where an output is not exactly what it should be, 0 elsewhere."""
    wanted = view.expected[name].to(view.device) if name in view.expected else view.on_own_ids(name)
    return torch.where(view.actual(name).to(wanted.dtype) != wanted, torch.inf, 0.0)


def check_pages(view: View) -> list[Finding]:
    """The pages that hold the context: whole ones in any order, the last one in its place; behind them nothing foreign.

    Cells past the context may hold the rest of the query's own block, which a kernel may write whole, or page id 0.
    """
    actual, wanted = view.actual("pages").long(), view.on_own_ids("pages")
    moved, cut, behind, used = _faults(view)
    wrong = moved | cut | behind
    if not bool(wrong.any()):
        return [Finding("pages", Status.PASSED, 0.0, 0.0)]
    row, count = int(wrong.int().argmax()), int(wrong.sum())
    if bool(moved[row] | cut[row]):
        hint = _difference(actual[row], wanted[row], int(used[row]), bool(moved[row]))
    else:
        hint = "a cell past the context names a page that is not of the query's own block; wanted page id 0"
    return [Finding("pages", Status.FAILED, float(count), 0.0, view.rows.name(row), f"{hint}; {count} rows")]


def check_exact(name: str) -> Callable[[View], list[Finding]]:
    """A check that an output has exactly the expected values."""

    def check(view: View) -> list[Finding]:
        actual, wanted = view.actual(name), view.expected[name].to(view.device)
        wrong = actual.to(wanted.dtype) != wanted
        count = int(wrong.sum())
        if not count:
            return [Finding(name, Status.PASSED, 0.0, 0.0)]
        first = [int(i) for i in wrong.nonzero()[0]]
        hint = f"{actual[tuple(first)].item():.6g}, wanted {wanted[tuple(first)].item():.6g}; {count} cells"
        return [Finding(name, Status.FAILED, float(count), 0.0, f"`{name}` {first}", hint)]

    return check


def check_counter(view: View) -> list[Finding]:
    """What programs of a launch count on is zero again when it ends, so that the next launch may use it."""
    left = int((view.actual("counter") != 0).sum())
    hint = f"{left} counters are not zero after the call: the next one would end too early, or never" if left else ""
    return [Finding("counter", Status.FAILED if left else Status.PASSED, float(left), 0.0, hint=hint)]


def _sorted(pages: Tensor, among: Tensor) -> Tensor:
    return pages.masked_fill(~among, 1 << 40).sort(-1).values


def _difference(actual: Tensor, wanted: Tensor, used: int, moved: bool) -> str:
    """The first page that is missing or in the wrong place, in tokens."""
    got, right = actual[:used].tolist(), wanted[:used].tolist()
    if not moved:
        return f"the last page of the context is {_tokens(got[-1])}, wanted {_tokens(right[-1])}: the cut falls elsewhere"
    missing = sorted(set(right) - set(got))
    instead = sorted(set(got) - set(right))
    told = f"{_tokens(missing[0])} missing" if missing else "a page stands there twice"
    return f"{told}; {_tokens(instead[0])} instead" if instead else told


def _tokens(page: int) -> str:
    if page < 0:
        return "page id 0" if page == -1 else "a page of nobody"
    return f"tokens {page * PAGE} … {page * PAGE + PAGE - 1} (block {page // PAGES})"
