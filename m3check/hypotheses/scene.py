"""One stage of a failing call as a suspect sees it: what the stage read, what it gave, and the reference to ask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from m3check.hypotheses.hypothesis import Stage
from m3check.types import Inputs, Outputs, Profile

if TYPE_CHECKING:
    from torch import Tensor

    from m3check.paging import World


@dataclass(frozen=True, eq=False)
class Scene:
    """What one stage of one op read and gave. `inputs.case.op` is the op whose reference answers for the stage."""

    stage: Stage
    given: Inputs
    """As the kernel saw them: codes, with their scales."""
    problem: Inputs
    """The same, dequantised."""
    actual: Tensor
    """What the kernel gave: score [H, T, K], ids [H, T, topk] or out [T, Hq, D]."""
    profile: Profile
    world: World
    """How the memory of the call was laid out."""
    dequantised: Callable[[Inputs], Inputs]
    """By the rule of this scene."""
    answer: Callable[[Inputs], Outputs]
    """Dequantises and asks the reference of `inputs.case.op`."""

    @property
    def name(self) -> str:
        """The output of this stage."""
        return {"score": "score", "select": "ids", "attend": "out"}[self.stage]

    @cached_property
    def right(self) -> Tensor:
        """What the stage should have given."""
        return self.answer(self.problem)[self.name]


@dataclass(frozen=True)
class Suspect:
    """One way to be wrong that an output is held against: other inputs for the unchanged reference, or its answer spoiled.

    Either is None where the case has nothing for it to act on.
    """

    name: str
    stage: Stage
    words: str
    inputs: Callable[[Scene], Inputs | None] | None = None
    result: Callable[[Scene], Tensor | None] | None = None
    """For what no input says: how parts are merged, what becomes of a finished selection."""
    merge: bool = False
    """Blames the joining of parts rather than the attention of one part."""
