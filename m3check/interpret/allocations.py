"""What a wrapper does between launches, as far as a watch must know: memory left unwritten, and what torch writes there."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from m3check.interpret.regions import OWN, READ, WRITE

if TYPE_CHECKING:
    from m3check.interpret.addresses import Watch

_UNWRITTEN = frozenset({"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"})
_LIBRARIES = tuple(str(Path(str(m.__file__)).parent) + os.sep for m in (torch, triton, np))
_HERE = str(Path(__file__).parent) + os.sep


class Allocations(TorchDispatchMode):
    """Memory that the wrapper allocates without writing it, and what torch writes there, between launches."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.overloadpacket.__name__ in _UNWRITTEN and not self._watch.is_known(out):
            self._watch.know(out, f"temporary {list(out.shape)} of {source_line()}", OWN | READ | WRITE)
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                target = args[place] if place < len(args) else kwargs.get(argument.name)
                if isinstance(target, torch.Tensor):
                    self._watch.wrote(target)
        return out


def source_line() -> str:
    """The innermost line of source that is neither a library's nor the watch's: file.py:12."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((*_LIBRARIES, _HERE, "<")) and "contextlib" not in file:
            return f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown line"
