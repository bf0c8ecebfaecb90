"""What a row of the catalogue is, and the forms that a defect takes: around a kernel, in our sources, a call left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from m3check.mutants.mutant import Wrapper


@dataclass(frozen=True)
class Wrap:
    """A form of a row that goes around a kernel."""

    what: str
    ops: tuple[str, ...]
    make: Any
    """A wrapper; or, with `fresh`, a function that makes one with a memory of its own."""
    fresh: bool = False

    def wrapper(self) -> Wrapper:
        """What goes around a kernel."""
        made: Wrapper = self.make() if self.fresh else self.make
        return made


@dataclass(frozen=True)
class Change:
    """A form of a row that edits our source: each (file, before, after) replaces the one place that reads `before`."""

    what: str
    replacements: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Dropped:
    """A form of a row that leaves a call out, wherever a provider's sources make it: each place is a mutant of its own."""

    what: str
    call: str


@dataclass(frozen=True)
class Row:
    """One public defect."""

    name: str
    defect: str
    where: str  # interpreted, device or elsewhere
    forms: tuple[Wrap | Change | Dropped, ...] = ()
    reason: str = ""
