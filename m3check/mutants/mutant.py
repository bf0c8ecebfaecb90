"""What a mutant is: one small change of a correct kernel, by an edit of its source or a wrapper around it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from m3check.types import Case, Profile

Wrapper = Callable[..., Any]
"""`wrapper(function, keywords)`: what is called in a kernel's place, with the kernel and the keywords of its call."""


@dataclass(frozen=True)
class Edit:
    """Replace bytes `start` … `end` of a file (relative to the provider's folder of kernels) by `new`."""

    file: str
    start: int
    end: int
    new: bytes


@dataclass(frozen=True)
class Mutant:
    """One wrong kernel, or (kind `control`) one that differs and is right."""

    provider: str
    """triton or vllm, without a version: a reviewed mutant stays reviewed while its statement stays."""
    kind: str
    """`catalogue`, `control`, or the name of the generic edit."""
    name: str
    """Of a catalogue row, with the form it takes: `A12 k_scale dropped`; of a generic edit file:line."""
    text: str
    """What is changed, in one line: before → after."""
    key: str
    """Content hash: of the changed statement before and after, and where it stands; never of line numbers."""
    edits: tuple[Edit, ...] = ()
    wrapper: Wrapper | None = None
    prepare: Callable[[], None] | None = None
    """Called in the mutant's process once its kernels are imported: a control may set a tile size there."""
    ops: frozenset[str] = frozenset()
    """Ops of a wrapper; empty for edits, which meet the cases that execute an edited line."""
    lines: tuple[int, int] = (0, 0)
    """First and last line of the edited statement."""
    function: str = ""
    """The function of the edited statement; empty for a wrapper."""
    where: str = "interpreted"
    shown_by: str = ""
    """The invariant that shows it, where only one can: cases that have it are met first."""
    suits: Callable[[Case], bool] | None = None
    """Cases that a control is right on, or that a row can show on; None: all."""
    profile: Callable[[Profile], Profile] | None = None
    """What the wrapped kernel promises less than the clean one."""

    @property
    def file(self) -> str:
        """The edited file; empty for a wrapper."""
        return self.edits[0].file if self.edits else ""


@dataclass(frozen=True)
class Outcome:
    """What became of one mutant."""

    mutant: Mutant
    verdict: str
    """killed, survived, equivalent, accepted, unreached, elsewhere, invalid; for a control green or red."""
    check: str = ""
    """The check, or error, crashed, timeout, that killed it."""
    case: str = ""
    detail: str = ""
    cases: int = 0
    """How many cases it met."""
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


def content_key(*parts: str) -> str:
    """Twelve hex digits of what identifies a mutant."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
