"""What `triton.language` looks like while an interpreted kernel runs, and putting it back afterwards.

Triton exchanges some 500 attributes at every launch and again at every call of a device function, and leaves the latter.
Here the exchange is worked out once and done once a launch: a bitonic sort calls thousands of device functions.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter as base

_original = base._patch_lang
_overrides: dict[tuple[Any, str], Callable[[Any], Any]] = {}
_exchange: list[tuple[Any, str, Any, Any]] = []  # owner, name, outside of kernels, inside
_known: set[Any] = set()
_inside = False


def override(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Inside kernels `owner.name` is `make(what Triton puts there)`."""
    _overrides[owner, name] = make
    _exchange.clear()
    install()


def install() -> None:
    """Let this file do the exchange."""
    base._patch_lang = _patch


class _Scope:
    """What Triton calls at the end of a launch."""

    def __init__(self, outermost: bool) -> None:
        self.outermost = outermost

    def restore(self) -> None:
        global _inside
        if self.outermost:
            for owner, name, outside, _ in _exchange:
                _put(owner, name, outside)
            _inside = False


def _put(owner: Any, name: str, value: Any) -> None:
    if value is base._MISSING:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


def _patch(fn: Any) -> _Scope:
    global _inside
    if fn not in _known:
        if not any(value is tl or value is tl.core for value in fn.__globals__.values()):
            _original(fn)  # raises Triton's own sentence
        _known.add(fn)
    if _inside:
        return _Scope(outermost=False)
    if not _exchange:
        _exchange.extend(_work_out())
    for owner, name, _, inside in _exchange:
        setattr(owner, name, inside)
    _inside = True
    return _Scope(outermost=True)


def _direct(inside: Any) -> Any:
    """Triton's stand-in for a builtin calls a wrapper that calls the function; this calls the function."""
    builtin = (getattr(inside, "__kwdefaults__", None) or {}).get("member")
    if builtin is None:
        return inside
    function = getattr(builtin, "__wrapped__", builtin)
    semantic = base.interpreter_semantic

    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = semantic
        return function(*args, **kwargs)

    return call


def _work_out() -> list[tuple[Any, str, Any, Any]]:
    """Have Triton patch both namespaces that a kernel may name, note what changed, and put it back."""
    scope = _original(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    for (owner, name), make in _overrides.items():
        scope.set_attr(owner, name, make(getattr(owner, name)))
    before: dict[tuple[int, str], Any] = {}
    owners: dict[tuple[int, str], Any] = {}
    for owner, name, outside in scope._changes:
        before.setdefault((id(owner), name), outside)
        owners[id(owner), name] = owner
    after = {key: _direct(vars(owner)[key[1]]) for key, owner in owners.items()}
    scope.restore()
    # An inherited attribute was found on a parent class: leaving the class must delete it, not copy it down.
    own = {key: base._MISSING if key[1] not in vars(owner) else before[key] for key, owner in owners.items()}
    return [(owner, key[1], own[key], after[key]) for key, owner in owners.items()]
