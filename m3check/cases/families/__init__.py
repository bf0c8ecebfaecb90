"""Ops beside block-sparse attention: what this package must know of each family, a file a family.

The block-sparse ops have their own rules (`validity`), values (`generate`), axes (`axes`) and lists; an op of another
family brings all of these in one `Family`. Its cases stand in m3check/data/<family>.txt under the headings `[smoke]`,
`[ci]`, `[full]` and `[production]`, each tier having those of the smaller ones as well.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3check.types import OPS, Case, M3CheckError

if TYPE_CHECKING:
    from torch import Tensor

    from m3check.cases.cost import Estimate

DATA = Path(__file__).parent.parent.parent / "data"


@dataclass(frozen=True)
class Family:
    """What the cases of a family are. Importing its file imports no torch."""

    reads: Mapping[str, frozenset[str]]
    """op: the fields of Case that its inputs or its result depend on, lengths apart; the others keep their defaults."""
    complaint: Callable[[Case], str | None]
    """Why a case makes no sense, as one sentence; that words and numbers are known is seen to already."""
    make: Callable[[Case, Callable[..., Tensor], Any], Mapping[str, Any]]
    """From (case, draw(role, shape, dtype word), device): fields of Inputs, `more` and `sm_scale` for the most part."""
    estimate: Callable[[Case], Estimate]
    """How long a case takes."""
    ids: frozenset[str] = frozenset()
    """Words of `ids` that the family has beside those of cases/selections.py."""


MODULES: Mapping[str, str] = {
    "latent": "latent",
    "logits": "logits",
    "indexer": "indexer",
    "amd": "amd",
    "insert": "insert",
}
"""family: the file in this folder that defines FAMILY."""


@functools.cache
def of(op: str) -> Family | None:
    """The family of an op; None for a block-sparse one."""
    module = MODULES.get(OPS[op].family)
    if module is None:
        return None
    family: Family = importlib.import_module(f"m3check.cases.families.{module}").FAMILY
    return family


def ids() -> tuple[str, ...]:
    """Words of `ids` that some family has beside those of cases/selections.py."""
    return tuple(sorted({word for op in OPS if (family := of(op)) for word in family.ids}))


@functools.cache
def listed(tier: str) -> tuple[str, ...]:
    """The ids of all families' cases under one heading of their lists."""
    found: list[str] = []
    for family in MODULES:
        heading = ""
        for line in (DATA / f"{family}.txt").read_text(encoding="utf-8").splitlines():
            if line.startswith("["):
                heading = line.strip("[]")
                if heading not in ("smoke", "ci", "full", "production"):
                    raise M3CheckError(f"{family}.txt: unknown heading [{heading}]")
            elif line and not line.startswith("#") and heading == tier:
                found.append(line)
    return tuple(found)
