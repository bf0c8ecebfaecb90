"""WHAT TO TRY: cases, their one-line ids, the tiers, and the tensors that an id stands for.

Importing this package imports neither torch nor numpy; `make_inputs` does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from m3check.cases import tiers
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


class _Package(ModuleType):
    """This package, which can be called: `m3check.cases(tier="ci", ops=("sparse_attn",))` is the public interface."""

    def __call__(self, tier: str = "ci", ops: Sequence[str] = ()) -> tuple[Case, ...]:
        """The cases of a tier (`smoke`, `ci`, `full`, `production`), of all ops or of some."""
        return tuple(case for case in tiers.tier(tier) if not ops or case.op in ops)


sys.modules[__name__].__class__ = _Package
