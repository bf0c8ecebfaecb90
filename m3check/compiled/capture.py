"""The Triton launches that a call makes, taken as they would be compiled, and neither compiled nor run.

Triton itself works out each specialisation (types, constants, alignment, options); it is stopped where it would begin to
compile. An autotuned kernel launches every candidate that its own pruning leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from m3check.warm import Variant


@dataclass(frozen=True)
class Specialisation:
    """One variant of one kernel: what Triton compiles."""

    function: Any  # triton's JITFunction
    source: Any  # triton's ASTSource: the function with types, constants and alignments
    options: Any  # the backend's options: num_warps, num_stages, launch_pdl …

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.function.__name__)

    @property
    def variant(self) -> Variant:
        """What it is compiled for, in words."""
        source, options = self.source, self.options
        how = f"{options.num_warps} warps, {options.num_stages} stages"
        return Variant.of(self.name, source.signature, source.constants, source.attrs, how)


@dataclass
class Launch:
    """One launch; of an autotuned kernel all candidates, of which Triton takes the fastest that loads."""

    candidates: list[Specialisation]
    tuned: bool = False


@contextmanager
def capturing() -> Iterator[list[Launch]]:
    """Take every launch of the block instead of carrying it out; outputs keep whatever they held."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    tuning: list[Launch] = []

    def take(
        self: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, attributes: Any, *_: Any
    ) -> None:
        found = Specialisation(self, self.ASTSource(self, signature, constants, attributes), options)
        if tuning:
            tuning[-1].candidates.append(found)
        else:
            launches.append(Launch([found]))

    def every_candidate(self: Any, *args: Any, **kwargs: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        tuning.append(Launch([], tuned=True))
        try:
            for config in self.prune_configs(kwargs):
                if config.pre_hook is not None:
                    config.pre_hook({**self.nargs, **kwargs, **config.all_kwargs()})
                self.fn.run(*args, **kwargs, **config.all_kwargs())
        finally:
            self.nargs = None
            launch = tuning.pop()
        if launch.candidates:
            launches.append(launch)

    compile_, tune = JITFunction._do_compile, Autotuner.run
    JITFunction._do_compile, Autotuner.run = take, every_candidate
    try:
        yield launches
    finally:
        JITFunction._do_compile, Autotuner.run = compile_, tune
