"""Which line of a kernel file a compilation failed on, and why, in one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_DIAGNOSTIC = re.compile(r"(/[^\s:\"]+\.py)\"?:(\d+):\d+\)?: error: ([^\n]*)")
_PTXAS = re.compile(r"line (\d+); (?:error|fatal)\s*: ([^\n]*)")


def error_of(error: BaseException, function: Any, heard: str) -> tuple[str, str]:
    """(sentence, file:line) of a failed compilation; `heard` is what the compiler printed meanwhile."""
    from triton.compiler.errors import CompilationError

    chain = list(_chain(error))
    frontend = [e for e in chain if isinstance(e, CompilationError) and e.node is not None]
    if frontend:
        innermost, root = frontend[-1], chain[-1]
        text = str(root.error_message or "") if isinstance(root, CompilationError) else str(root)
        return _shown(type(root), text), _place(innermost, function)
    found = _DIAGNOSTIC.search(heard)
    if found:
        return _shown(type(error), found[3]), f"{Path(found[1]).name}:{found[2]}"
    start = f"{Path(function.file_name).name}:{function.starting_line_number}"
    ptxas = _PTXAS.search(str(error))
    if ptxas:
        return _shown(type(error), f"ptxas, line {ptxas[1]} of the PTX: {ptxas[2]}"), start
    return _shown(type(error), _line(str(error))), start


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _shown(kind: type[BaseException], text: str) -> str:
    text = _line(text)
    return text if kind.__name__ == "CompilationError" or not text else f"{kind.__name__}: {text}"


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:299] + "…"


def _place(error: Any, function: Any) -> str:
    """The line in the file of the (possibly called) function whose source the error quotes."""
    for owner in _reached(function):
        if owner.src == error.src:
            offset = owner.raw_src and next(i for i, line in enumerate(owner.raw_src) if re.match(r"\s*def\s", line))
            return f"{Path(owner.file_name).name}:{owner.starting_line_number + (offset or 0) + error.node.lineno - 1}"
    return f"{Path(function.file_name).name}:{function.starting_line_number}"


def _reached(function: Any) -> Iterator[Any]:
    """A kernel and the jitted functions that it can name, directly or through others."""
    from triton.runtime.jit import JITFunction

    found, seen = [function], {id(function)}
    for current in found:
        yield current
        for value in current.get_capture_scope().values():
            if isinstance(value, JITFunction) and id(value) not in seen:
                seen.add(id(value))
                found.append(value)
