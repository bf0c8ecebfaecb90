"""WHAT TO TRY: cases, their one-line ids, the tiers, and the tensors that an id stands for.

Importing this package imports neither torch nor numpy; `make_inputs` does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from m3check.cases import tiers
from m3check.cases.cost import Estimate, case_cost, cost
from m3check.cases.fills import FILLS
from m3check.cases.ident import case_id, parse_id
from m3check.cases.production import production, weight
from m3check.cases.selections import SELECTIONS
from m3check.cases.tiers import TIERS, shard, tier
from m3check.cases.validity import complaint, validate
from m3check.types import Case, M3CheckError

if TYPE_CHECKING:
    import torch

    from m3check.types import Inputs

Test = TypeVar("Test", bound=Callable[..., Any])

__all__ = [
    "FILLS",
    "SELECTIONS",
    "TIERS",
    "Cases",
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
    """The logical tensors that a case's op reads, on `device`, the same bits on every machine.

    Shapes, dtypes and what stays None are told in `types.Inputs`. Raises M3CheckError for a case that makes no sense.
    """
    from m3check.cases.generate import make_inputs

    return make_inputs(case, device)


class Cases(tuple[Case, ...]):
    """Some cases; as a decorator they are the values of a pytest test's argument `case`, each named by its id."""

    def __call__(self, test: Test) -> Test:
        """One test for each case: `-k`, xdist and junit see their ids."""
        import pytest

        if not self:
            raise M3CheckError(
                "there is no such case: the tier has none of these ops, and a test of nothing would be green"
            )
        marked: Test = pytest.mark.parametrize("case", tuple(self), ids=[case_id(case) for case in self])(test)
        return marked


class _Package(ModuleType):
    """This package, which can be called: `m3check.cases(op="sparse_attn", tier="ci")` is the public interface."""

    def __call__(self, tier: str = "ci", op: str | Sequence[str] = ()) -> Cases:
        """The cases of a tier (`smoke`, `ci`, `full`, `production`), of all ops or some; M3CheckError for unknown ones."""
        return Cases(tiers.tier(tier, (op,) if isinstance(op, str) else op))


sys.modules[__name__].__class__ = _Package
