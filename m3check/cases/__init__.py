"""WHAT TO TRY: cases, their one-line ids, the tiers, and the tensors that an id stands for.

Importing this package imports neither torch nor numpy; `make_inputs` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from m3check.cases.cost import Estimate, case_cost, cost
from m3check.cases.fills import FILLS
from m3check.cases.ident import case_id, parse_id
from m3check.cases.production import production, weight
from m3check.cases.selections import SELECTIONS
from m3check.cases.tiers import TIERS, shard, tier
from m3check.cases.validity import complaint, validate

if TYPE_CHECKING:
    import torch

    from m3check.types import Case, Inputs

__all__ = [
    "FILLS",
    "SELECTIONS",
    "TIERS",
    "Estimate",
    "case_cost",
    "case_id",
    "complaint",
    "cost",
    "make_inputs",
    "parse_id",
    "production",
    "shard",
    "tier",
    "validate",
    "weight",
]


def make_inputs(case: Case, device: torch.device | str = "cpu") -> Inputs:
    """The logical tensors of a case (see `generate.make_inputs`), the same bits on every machine."""
    from m3check.cases.generate import make_inputs

    return make_inputs(case, device)
