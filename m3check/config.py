"""What a run is asked to do: the flags of `m3check run` as data, checked once for the command line and the Python API."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path

from m3check.types import Evidence, M3CheckError, Result

TIERS = ("smoke", "ci", "full", "production")
EVIDENCE: tuple[Evidence, ...] = ("device", "interpreted", "compiled")

SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")

TIME_LIMIT = 120.0
"""Seconds a case may take, compilation apart; interpreted ones take a few, so this tells a hang from a slow machine."""


@dataclass(frozen=True)
class Event:
    """What a run tells while it goes on: a result that came in, a case that was begun, or a message for the user."""

    done: int
    total: int
    result: Result | None = None
    running: str = ""
    """Id of a case that is in work."""
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The flags of `m3check run`. Raises M3CheckError for a value that cannot be meant."""

    arch: str
    kernels: tuple[str, ...] = ("triton",)
    """Provider specs as named on the command line; each of them must give results."""
    ops: tuple[str, ...] = ()
    """Empty means all."""
    tier: str = "smoke"
    expr: str = ""
    """pytest's `-k` grammar, see m3check/expression.py; empty means all."""
    cases: tuple[str, ...] = ()
    """Case ids to run instead of a tier."""
    shard: tuple[int, int] = (1, 1)
    """(i, n), 1 ≤ i ≤ n: the i-th of n parts, by a hash of the case id."""
    jobs: int = 0
    """Worker processes; 0 lets the machine decide."""
    seed: int = 0
    timeout: float = TIME_LIMIT
    """Seconds a case, compilation apart."""
    resume: bool = False
    """Keep the results that the folder's journal holds and run what is missing."""
    require: Evidence | None = None
    """Weaker evidence than this is a failure."""
    strict: bool = False
    """Noted, mistrusted and inconclusive are red as well."""
    offline: bool = False
    sanitize: str = ""
    """A tool of compute-sanitizer (m3check/sanitize.py) that workers run under; only on a device."""
    save_failures: int = 0
    """How many red cases to save as folders that replay without m3check; needs safetensors."""
    ledger: Path | None = None
    """TOML file of known failures, see m3check/ledger.py."""
    floors: tuple[str, ...] = ()
    """The least that a whole run must show, as `min_cases=10`; see m3check/floors.py."""
    out: Path | None = None
    shown: frozenset[str] = field(default=frozenset(), compare=False)
    """Fields that `command` says though they have their default, because a settings file has another value."""
    progress: Callable[[Event], None] | None = None

    def __post_init__(self) -> None:
        from m3check.arch import ARCHS
        from m3check.expression import matcher
        from m3check.types import OPS

        choose("arch", self.arch, ARCHS)
        choose("tier", self.tier, TIERS)
        for op in self.ops:
            choose("op", op, OPS)
        if self.require is not None:
            choose("evidence", self.require, EVIDENCE)
        if not self.kernels:
            raise M3CheckError("no kernels named; the default is --kernels triton")
        i, n = self.shard
        if not 1 <= i <= n:
            raise M3CheckError(f"--shard {i}/{n} does not exist; the first of {max(n, 1)} is 1/{max(n, 1)}")
        for flag, value in (("--jobs", self.jobs), ("--seed", self.seed), ("--save-failures", self.save_failures)):
            if value < 0:
                raise M3CheckError(f"{flag} {value} cannot be; the least is 0")
        if not self.timeout > 0:
            raise M3CheckError(f"--timeout {self.timeout:g} leaves no time; give seconds, e.g. --timeout {TIME_LIMIT:g}")
        if self.sanitize:
            choose("sanitizer", self.sanitize, SANITIZERS)
        matcher(self.expr)
        if self.floors:
            from m3check.floors import parse

            parse(self.floors)

    @property
    def folder(self) -> Path:
        """Where journal and reports go."""
        return self.out if self.out is not None else Path("reports") / self.arch

    @property
    def command(self) -> str:
        """The command line that asks for this run, flags in the order of the help, defaults left out."""
        default = {each.name: each.default for each in fields(self) if each.name not in self.shown}
        words = ["m3check", "run", "--arch", self.arch]
        for name, flag in _FLAGS:
            value = getattr(self, name)
            if (name in default and value == default[name]) or value in ((), "", None):
                continue
            if isinstance(value, bool):
                words.append(flag if value else flag.replace("--", "--no-", 1))
            elif name == "shard":
                words += [flag, f"{value[0]}/{value[1]}"]
            elif isinstance(value, tuple):
                words += [flag, *value]
            else:
                words += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
        return shlex.join(words)


_FLAGS = (  # field, flag
    ("kernels", "--kernels"),
    ("ops", "--op"),
    ("tier", "--tier"),
    ("expr", "-k"),
    ("cases", "--case"),
    ("shard", "--shard"),
    ("jobs", "--jobs"),
    ("seed", "--seed"),
    ("timeout", "--timeout"),
    ("resume", "--resume"),
    ("require", "--require"),
    ("strict", "--strict"),
    ("sanitize", "--sanitize"),
    ("offline", "--offline"),
    ("ledger", "--ledger"),
    ("floors", "--floor"),
    ("out", "--out"),
)


def choose(kind: str, text: str, known: Iterable[str]) -> str:
    """`text` where it is one of the known names; else an M3CheckError that lists them and guesses what was meant."""
    names = list(known)
    if text in names:
        return text
    close = difflib.get_close_matches(text, names, n=1)
    guess = f"did you mean {close[0]}? Known: " if close else "known: "
    raise M3CheckError(f"unknown {kind} {text!r}; {guess}{', '.join(names)}")
