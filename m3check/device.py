"""What a device really ran: the Triton kernels launched by a call, and the matrix instructions they were compiled to."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from m3check.arch import FP32, Accumulator, Arch, operands_of
from m3check.types import OPS, Kernel

_INSTRUCTION = re.compile(r"\b(wgmma\.mma_async[\w.:]*|mma\.sync[\w.:]*|tcgen05\.mma[\w.:]*|v_mfma_\w+)")


@dataclass
class Launches:
    """The compiled kernels that ran inside one `recording` block, by the op of a chain that launched them."""

    instructions: dict[str, set[str]] = field(default_factory=dict)
    """Of each op that launched a Triton kernel, the matrix instructions in the variants that ran."""
    op: str = ""
    """The op that is running."""

    def following(self, kernel: Kernel) -> Kernel:
        """The kernel, or the chain, whose launches are put down to its op from now on."""
        if OPS[kernel.op].chain:  # a layer without parts launches what it likes, and is no function to be wrapped
            return replace(kernel, parts={op: self.following(part) for op, part in kernel.parts.items()})

        @functools.wraps(kernel.function)
        def function(*args: Any, **keywords: Any) -> Any:
            self.op = "" if kernel.library else kernel.op
            return kernel.function(*args, **keywords)

        return replace(kernel, function=function)

    def accumulator(self, op: str, arch: Arch, default_operands: str) -> Accumulator:
        """How the least precise product of an op was summed.

        Without any matrix instruction a Triton kernel multiplied in fp32. An op that launched no Triton kernel at all used
        a library, for which the target's own least precise row for `default_operands` stands.
        """
        if op not in self.instructions:
            return arch.accumulator(default_operands)
        rows = [arch.accumulator(operands_of(name), name) for name in sorted(self.instructions[op])]
        return min(rows, key=lambda row: row.precision, default=FP32)


_seen: dict[int, tuple[object, frozenset[str]]] = {}


def _instructions(compiled: Any) -> frozenset[str]:
    """Matrix instructions in a compiled kernel's assembly; read once for each kernel."""
    known = _seen.get(id(compiled))
    if known is not None and known[0] is compiled:
        return known[1]
    assembly = getattr(compiled, "asm", {})
    text = assembly.get("ptx") or assembly.get("amdgcn") or ""
    found = frozenset(_INSTRUCTION.findall(text))
    _seen[id(compiled)] = (compiled, found)
    return found


@contextmanager
def recording() -> Iterator[Launches]:
    """Note every Triton launch of the block."""
    from triton.runtime.jit import JITFunction

    launches = Launches()
    original = JITFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        compiled = original(self, *args, **kwargs)
        if compiled is not None:
            launches.instructions.setdefault(launches.op, set()).update(_instructions(compiled))
        return compiled

    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original


def lost(device: str) -> bool:
    """Whether this process can no longer use its GPU, as after an access outside every allocation."""
    import torch

    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def on_compile(notify: Callable[[bool], None]) -> None:
    """Call `notify(True)` before Triton compiles a kernel and `notify(False)` after, so that time limits leave it out."""
    from triton import knobs

    def before(**_: Any) -> bool:
        notify(True)
        return False  # False lets Triton go on and compile

    def after(**_: Any) -> bool:
        notify(False)
        return False

    knobs.runtime.jit_cache_hook = before
    knobs.runtime.jit_post_compile_hook = after
