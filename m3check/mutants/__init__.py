"""How good is the harness? Wrong kernels on purpose: which of them a tier turns red, and which right ones stay green."""

from __future__ import annotations

import random
from collections.abc import Sequence

from m3check.mutants.mutant import Mutant

__all__ = ["STANDARD", "standard"]

STANDARD = 2
"""Generic edits of each kind in each function that the standard set has; the catalogue and the controls it has whole."""


def standard(mutants: Sequence[Mutant], each: int = STANDARD) -> list[Mutant]:
    """At most `each` of a kind in a function, chosen by content hash, so that the choice stays when others come and go."""
    taken: dict[tuple[str, str, str], int] = {}
    chosen: set[str] = set()
    for mutant in sorted(mutants, key=lambda m: m.key):
        group = (mutant.file, mutant.text.split()[1], mutant.kind)
        taken[group] = taken.get(group, 0) + 1
        if taken[group] <= each:
            chosen.add(mutant.key)
    return [mutant for mutant in mutants if mutant.key in chosen]


def sampled(mutants: Sequence[Mutant], count: int, seed: int) -> list[Mutant]:
    """`count` of them, by a seed and their content alone."""
    keys = sorted(mutant.key for mutant in mutants)
    chosen = set(random.Random(seed).sample(keys, min(count, len(keys))))
    return [mutant for mutant in mutants if mutant.key in chosen]
