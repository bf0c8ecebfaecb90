"""What a verdict depends on besides the tensors: promises, machine, arithmetic, acceptable false alarms."""

from __future__ import annotations

import math
from dataclasses import dataclass

from m3check.arch import FP32, Accumulator, Arch
from m3check.types import Evidence, Profile

RUN_RESULTS = 4096
"""Results that share a run's false alarms: `full` has at most 3,000 cases for one provider."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How one result is judged."""

    profile: Profile
    evidence: Evidence
    arch: Arch | None = None
    dot: Accumulator = FP32
    """How q·k was summed."""
    pv: Accumulator = FP32
    """How the weights times the values were summed."""
    scoring: Accumulator | None = None
    """How block scores were summed, where it was not as in attention: a chain's index kernel may use fp8 instructions."""
    alarms: float = 0.01
    """Acceptable false alarms of a whole run, each test given the same share."""
    filled: bool = True
    """Whether fresh memory held NaN before the kernel ran, so that an untouched cell can be told from a written one."""

    def surprise(self, count: int) -> float:
        """-ln of the probability that each of `count` judgements of one test in one result may be wrong with."""
        return math.log(2.0 * max(count, 1) * RUN_RESULTS / self.alarms)

    def deviations(self, count: int) -> float:
        """λ: how many standard deviations a sub-Gaussian error stays within, in `count` places of one result."""
        return math.sqrt(2.0 * self.surprise(count))
