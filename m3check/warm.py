"""What a server that is warm still compiles or times: batches of other sizes after a warm-up or a first call.

Triton compiles anew where an ordinary integer argument becomes 1 or is (no longer) divisible by 16, where a pointer is no
longer aligned, and for each value of a tl.constexpr. On a device its own hook tells of each compilation; for a target that
is not there the captured launches do (m3check/compiled).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from m3check.types import OPS, Case, Finding, Status, blocks

if TYPE_CHECKING:
    from m3check.paging import World

MARKS = {"tt.divisibility": "divisible by 16", "tt.pointer_range": "within 2 GB"}
"""What Triton finds of an argument, in words."""

NAME = "warm"
"""Of the check, and of the promise in `Profile.bitwise`."""


@dataclass(frozen=True)
class Variant:
    """A kernel as it is compiled once."""

    name: str
    arguments: tuple[tuple[str, str], ...]
    """Each argument with what is compiled for: its type, alignment or value."""
    options: str

    @classmethod
    def of(cls, name: str, signature: Mapping[str, Any], constants: Any, attributes: Any, options: str) -> Variant:
        """From what Triton tells: types by name, values and attributes by the argument's path."""
        words = []
        for place, (argument, kind) in enumerate(signature.items()):
            values = [str(value) for path, value in constants.items() if path[0] == place]
            marks = [MARKS.get(mark, mark) for path, found in attributes.items() if path[0] == place for mark, _ in found]
            words.append((argument, f"the constant {', '.join(values)}" if values else " ".join([str(kind), *marks])))
        return cls(name, tuple(words), options)

    def unlike(self, known: Iterable[Variant]) -> str:
        """What sets it apart from the known variant of the same kernel that is most like it."""
        told = []
        for other in known:
            if other.name == self.name:
                before = dict(other.arguments)
                told.append([f"{a} is {is_}, was {before.get(a)}" for a, is_ in self.arguments if before.get(a) != is_])
        if not told:
            return "no call before launched it"
        differ = min(told, key=len)
        return "; ".join(differ[:3]) + (f" and {len(differ) - 3} more" if len(differ) > 3 else "") or "its launch options"


def batches(case: Case) -> list[tuple[str, Case]]:
    """Batches that the same server may meet after one like `case`, with words: of 1, of 16 and of a few odd requests, and
    one of so many queries that no kernel cuts their work into parts as it does for few.
    """
    decode = OPS[case.op].phase == "decode"
    plain = replace(case, fill="gauss", ids="full", seed=0)
    n = max(1, *case.query_lens) if decode else 1
    shapes = (
        ([n], [130 + n]),
        ([n] * 16, [144] * 16),
        ([n] * 5, [300, 16 + n, 1025, 64 + n, 700]) if decode else ([33, 2, 1], [1025, 2, 70]),
        ([n] * (600 // n), [16 + n] * (600 // n)) if decode else ([600], [600]),
    )
    return [
        (f"{sum(queries)} queries of {len(queries)} requests, up to {max(lengths)} tokens long",
         replace(plain, query_lens=tuple(queries), kv_lens=tuple(lengths)))
        for queries, lengths in shapes
    ]  # fmt: skip


def server(case: Case) -> World:
    """A cache and block tables that hold every one of these batches: a server's own do not change."""
    from m3check.paging import SPARE_PAGES, World

    every = [case, *(other for _, other in batches(case))]
    pages = max(sum(blocks(n) for n in each.kv_lens) for each in every)
    return World(columns=max(each.block_columns for each in every) + 2, pages=pages + SPARE_PAGES)


def judged(warmed: Heard, later: Sequence[tuple[str, Heard]], promises: frozenset[str]) -> list[Finding]:
    """One finding: how often batches after the warm-up compiled or timed, and what the first of it was.

    None where nothing of Triton's was launched; noted rather than red for a kernel that does not promise `warm`.
    """
    if not warmed.variants:
        return []
    known, new = list(warmed.variants), list[tuple[str, str]]()
    for words, heard in later:
        for variant in heard.variants:
            if variant not in known:
                new.append((variant.name, f"{words}, compiled it again: {variant.unlike(known)}"))
                known.append(variant)
        new += [(name, f"{words}, timed its configurations again") for name in dict.fromkeys(heard.timed)]
    if not new:
        return [Finding(NAME, Status.PASSED, where=", ".join(dict.fromkeys(variant.name for variant in warmed.variants)))]
    promised = NAME in promises
    hint = f"a batch of other size, {new[0][1]}" + ("" if promised else "; this kernel does not promise to stay warm")
    names = ", ".join(dict.fromkeys(name for name, _ in new))
    return [Finding(NAME, Status.FAILED if promised else Status.NOTED, float(len(new)), 0.0, names, hint)]


@dataclass
class Heard:
    """What was compiled, and the names of kernels whose configurations were timed."""

    variants: list[Variant] = field(default_factory=list)
    timed: list[str] = field(default_factory=list)

    def taken(self) -> Heard:
        """All so far, which is forgotten."""
        told = Heard(self.variants, self.timed)
        self.variants, self.timed = [], []
        return told


@contextmanager
def listening() -> Iterator[Heard]:
    """Hear of every compilation inside; what this process had compiled or timed before does not count."""
    from triton import knobs
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    heard = Heard()
    kept: dict[int, tuple[Any, str, Any]] = {}
    other, run, tune, bench = knobs.runtime.jit_cache_hook, JITFunction.run, Autotuner.run, Autotuner._bench

    def afresh(owner: Any, name: str, empty: Any) -> None:
        if id(owner) not in kept:
            kept[id(owner)] = owner, name, getattr(owner, name)
            setattr(owner, name, empty)

    def hook(**told: Any) -> Any:
        what = told["compile"]
        options = f"{what.get('num_warps')} warps, {what.get('num_stages')} stages"
        attributes = (what.get("configs") or [{}])[0]
        heard.variants.append(Variant.of(told["fn"].name, what["signature"], what["constants"], attributes, options))
        return other(**told) if other else None

    def launched(self: Any, *arguments: Any, **keywords: Any) -> Any:
        afresh(self, "device_caches", defaultdict(self.create_binder))
        return run(self, *arguments, **keywords)

    def chosen(self: Any, *arguments: Any, **keywords: Any) -> Any:
        afresh(self, "cache", {})
        return tune(self, *arguments, **keywords)

    def timed(self: Any, *arguments: Any, **keywords: Any) -> Any:
        heard.timed.append(self.base_fn.__name__)
        return bench(self, *arguments, **keywords)

    knobs.runtime.jit_cache_hook, JITFunction.run, Autotuner.run, Autotuner._bench = hook, launched, chosen, timed
    try:
        yield heard
    finally:
        knobs.runtime.jit_cache_hook, JITFunction.run, Autotuner.run, Autotuner._bench = other, run, tune, bench
        for owner, name, before in kept.values():
            setattr(owner, name, before)
