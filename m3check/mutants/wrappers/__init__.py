"""Wrong kernels made of a right one: each changes what a kernel is given, or what it gave, as a public defect would.

A wrapper takes the kernel and the keywords of its call. It works on every provider, since all have the same keywords. One
is a function in the file of what it spoils, and stands in a row of `rows`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Keywords = dict[str, Any]
Function = Callable[..., Any]


def given(**changes: Callable[[Keywords], Any]) -> Callable[[Function, Keywords], Any]:
    """A wrapper that replaces keywords, where the call has them, by functions of all keywords."""

    def wrapper(function: Function, keywords: Keywords) -> Any:
        changed = {k: change(keywords) for k, change in changes.items() if keywords.get(k) is not None}
        return function(**{**keywords, **changed})

    return wrapper


def after(change: Callable[[Any, Keywords], None]) -> Callable[[Function, Keywords], Any]:
    """A wrapper that changes the result in place."""

    def wrapper(function: Function, keywords: Keywords) -> Any:
        returned = function(**keywords)
        result = returned if returned is not None else keywords["output"]
        change(result, keywords)
        return returned

    return wrapper
