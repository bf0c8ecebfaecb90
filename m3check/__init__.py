"""m3check: does an optimized MiniMax-M3 sparse-attention kernel compute what the mathematics says?

The public interface is `Case`, `Profile`, `plan`, `run`, `verify`, `cases` and `load_record`; all else is private.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m3check import cases
    from m3check.api import load_record, plan, run, verify
    from m3check.types import Case, Profile

__version__ = "0.1.0"
__all__ = ["Case", "Profile", "cases", "load_record", "plan", "run", "verify"]


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that `m3check run --help` answers at once.
    if name in {"Case", "Profile"}:
        from m3check import types

        return getattr(types, name)
    if name in {"load_record", "plan", "run", "verify"}:
        from m3check import api

        return getattr(api, name)
    if name == "cases":
        from importlib import import_module

        return import_module("m3check.cases")
    raise AttributeError(f"module 'm3check' has no attribute {name!r}")
