"""What a hypothesis is: one named way to be wrong, as other inputs for the unchanged reference or as another formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from m3check.hypotheses.geometry import Change
from m3check.types import Inputs, Outputs, Profile

if TYPE_CHECKING:
    from m3check.paging import World

Stage = Literal["score", "select", "attend", "latent", "logits", "insert", "table", "keys"]
"""Where it acts: a stage of block-sparse attention, or what ops of another family do (their file in this folder)."""

State = Literal["seen", "unseen", "equal", "absent"]
"""Refused by the checks; not refused; as right as the right answer; nothing to act on."""


@dataclass(frozen=True, eq=False)
class Ground:
    """What another formula starts from: one op with its right answer."""

    inputs: Inputs
    """Dequantised."""
    right: Outputs
    answer: Callable[[Inputs], Outputs]
    """The reference."""
    profile: Profile
    world: World
    """How the memory of the call was laid out."""


@dataclass(frozen=True)
class Hypothesis:
    """One way to be wrong; it has a `change`, a `result`, or both."""

    name: str
    stage: Stage
    words: str
    change: Change | None = None
    """Other inputs for the reference; None in place of inputs where it has nothing to act on."""
    gross: bool = False
    """A case that this changes without the checks seeing it is not to be trusted."""
    codes: bool = False
    """Changes the cache's codes and scales; the others change what these mean."""
    result: Callable[[Ground], Outputs | None] | None = None
    """For what no inputs say: the outputs that another formula gives, those that it changes; bounds are those of `change`,
    where there is one, else of the inputs as they are."""

    def applied(self, ground: Ground) -> tuple[Inputs, Outputs] | None:
        """(the inputs that its bounds are derived from, the wrong answer); None where it has nothing to act on."""
        changed = ground.inputs if self.change is None else self.change(ground.inputs)
        if changed is None or self.result is None:
            return None if changed is None else (changed, ground.answer(changed))
        made = self.result(ground)
        return None if made is None else (changed, {**ground.right, **made})
