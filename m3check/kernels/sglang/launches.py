"""Standing in for a launch of a wrapper: to see its arguments, to change them, or to leave it out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

Stub = Callable[[dict[str, Any]], "dict[str, Any] | None"]
"""Takes the arguments of a launch by name; gives those to launch with, or None for no launch."""


def not_launched(arguments: dict[str, Any]) -> None:
    """The launch is left out."""
    return None


def launched(arguments: dict[str, Any]) -> dict[str, Any]:
    """The launch happens as it is."""
    return arguments


class Launcher:
    """Stands in a module for a Triton kernel, and remembers the arguments of its last launch by name."""

    def __init__(self, kernel: Any, stub: Stub) -> None:
        self._kernel, self._stub = kernel, stub
        self.seen: dict[str, Any] = {}

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def call(*places: Any, **keywords: Any) -> None:
            names = self._kernel.arg_names[: len(places)]
            self.seen = dict(zip(names, places, strict=True)) | keywords
            arguments = self._stub(dict(self.seen))
            if arguments is not None:
                # By place where the wrapper passes by place: autotuners know arguments by their places.
                by_place = [arguments.pop(name) for name in names]
                self._kernel[grid](*by_place, **arguments)

        return call


@contextmanager
def instead(module: ModuleType, stubs: Mapping[str, Stub]) -> Iterator[dict[str, Launcher]]:
    """Stand in for kernels of a module, where it has them; gives what stands there, by the kernel's name."""
    real = {name: getattr(module, name) for name in stubs if hasattr(module, name)}
    there = {name: Launcher(kernel, stubs[name]) for name, kernel in real.items()}
    try:
        for name, launcher in there.items():
            setattr(module, name, launcher)
        yield there
    finally:
        for name, kernel in real.items():
            setattr(module, name, kernel)
