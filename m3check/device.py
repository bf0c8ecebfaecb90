"""What a device really ran: the Triton kernels launched by a call, and the matrix instructions they were compiled to."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from m3check.arch import FP32, Accumulator, Arch

_INSTRUCTION = re.compile(r"\b(wgmma\.mma_async[\w.:]*|mma\.sync[\w.:]*|tcgen05\.mma[\w.:]*|v_mfma_\w+)")


@dataclass
class Launches:
    """The compiled kernels that ran inside one `recording` block."""

    triton: int = 0
    instructions: set[str] = field(default_factory=set)
    compiled: Callable[[bool], None] | None = None

    def accumulator(self, arch: Arch, default_operands: str) -> Accumulator:
        """How the least precise product of the call was summed.

        Without any matrix instruction a Triton kernel multiplied in fp32. A call that launched no Triton kernel at all used
        a library, for which the target's own least precise row for `default_operands` stands.
        """
        if not self.triton:
            return arch.accumulator(default_operands)
        rows = [arch.accumulator(operands_of(name), name) for name in sorted(self.instructions)]
        return min(rows, key=lambda row: row.precision, default=FP32)


def operands_of(instruction: str) -> str:
    """The operand kind of a matrix instruction: `fp8`, `tf32`, `fp32` or `16`."""
    if re.search(r"e4m3|e5m2|fp8|bf8|f8f6f4", instruction):
        return "fp8"
    if "tf32" in instruction or "xf32" in instruction:
        return "tf32"
    return "fp32" if re.match(r"v_mfma_f32_\d+x\d+x\d+_?(\d+b_)?f32$", instruction) else "16"


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
            launches.triton += 1
            launches.instructions |= _instructions(compiled)
        return compiled

    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original


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
