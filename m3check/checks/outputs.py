"""The outputs of ops as invariants compare them: which dimension counts query tokens, and which cells a kernel promises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from m3check.checks.rowkinds import dead_rows, promised_rows
from m3check.checks.scores import visible_cells
from m3check.checks.view import View


@dataclass(frozen=True)
class Output:
    """One output."""

    rows: int
    """Which of its dimensions counts the query tokens."""
    promised: Callable[[View], Tensor]
    """Bool that broadcasts to it: cells that the kernel owns and makes promises about."""
    place: str
    """The other dimensions of a cell in words, with {0}, {1}, {2} for its indices."""
    fill: float | None = None
    """What stands for columns that a regrouped result lacks; None where it has as many."""


def _every(view: View) -> Tensor:
    return torch.ones(1, dtype=torch.bool, device=view.device)


def _attended(view: View) -> Tensor:
    rows = promised_rows(view) & (~dead_rows(view) | (view.setting.profile.dead_rows == "zero"))
    return rows.repeat_interleave(view.case.gqa, dim=1)[..., None]  # [T, Hq, 1]


def _weighed(view: View) -> Tensor:
    """A dead row's logsumexp is whatever weighs nothing."""
    return ~dead_rows(view).repeat_interleave(view.case.gqa, dim=1)  # [T, Hq]


OUTPUTS: Mapping[str, Output] = {
    "score": Output(1, visible_cells, "index head {0}, block {2}", float("nan")),  # missing blocks are invisible
    "ids": Output(1, _every, "index head {0}, slot {2}"),
    "logits": Output(0, _every, "token {1}", float("-inf")),
    "lse": Output(0, _weighed, "query head {1}"),
    "q": Output(0, _every, "query head {1}, channel {2}"),
    "q_codes": Output(0, _every, "query head {1}, channel {2}"),
    "k": Output(0, _every, "kv head {1}, channel {2}"),
    "idx_q": Output(0, _every, "index head {1}, channel {2}"),
    "idx_k": Output(0, _every, "channel {2}"),
    "cached_k": Output(0, _every, "kv head {1}, channel {2}"),
    "cached_v": Output(0, _every, "kv head {1}, channel {2}"),
    "cached_idx_k": Output(0, _every, "channel {2}"),
    "out": Output(0, _attended, "query head {1}, channel {2}"),
    "pages": Output(0, _every, "cell {1}"),
    "context": Output(0, _every, "its length"),
    "index_keys": Output(0, _every, "channel {1}"),
    "slots": Output(0, _every, "its slot"),
    "blocks": Output(0, _every, "block {1}"),
    "counter": Output(1, _every, "index head {0}"),
}
