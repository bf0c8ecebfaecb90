"""Pictures in characters of where an output is wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass

SHADES = "·123456789#"
"""|error| / limit as one character: up to 1, 2, 4, 8 … 512, more."""


def shade(ratio: float) -> str:
    """One character for |error| / limit: `·` within it, a digit for each doubling, `#` beyond 512, `N` for infinite."""
    if math.isinf(ratio) or math.isnan(ratio):
        return "N"
    if ratio <= 1:
        return SHADES[0]
    return SHADES[min(len(SHADES) - 1, 1 + int(math.log2(ratio)))]


@dataclass(frozen=True)
class HeatMap:
    """A picture in characters: |error| / limit as `shade` has it, where `N` is also a list that is wrong.

    Of a selection's blocks: `=` chosen rightly, `-` left out, `+` taken instead, `±` both, `²` listed twice.
    """

    rows: str
    """What a line is: `request, token`, or a kind of head."""
    columns: str
    """What a character is: a kind of head, `block` or `channel`."""
    labels: tuple[str, ...]
    """Of each line; of its first row where it stands for several."""
    cells: tuple[str, ...]
    step: int = 1
    """Columns in one character, which shows their worst."""
    count: int = 1
    """Rows in one line, likewise."""
    of: str = ""
    """The request and token that it shows, where it shows one row only."""


@dataclass(frozen=True)
class Heat:
    """Where an output is wrong: rows × heads, and the worst row in detail."""

    output: str  # score, ids or out
    maps: tuple[HeatMap, ...]
