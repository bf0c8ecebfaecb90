"""Triton's CPU interpreter, made faithful: which of its defects this Triton has, and their repair.

`install()` runs in a worker that set TRITON_INTERPRET=1 before triton was imported. Each repair has a probe, a small kernel
that shows the defect; where the probe comes out right nothing is touched. After a repair the probe must come out right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any


@dataclass(frozen=True)
class Repair:
    """What became of one repair; `needed and not installed` makes every interpreted result inconclusive."""

    name: str
    needed: bool
    installed: bool
    detail: str


_done: tuple[Repair, ...] | None = None


def install() -> tuple[Repair, ...]:
    """Repair the interpreter of this process, once; every later call returns the same answer.

    Raises RuntimeError where the interpreter is not on: TRITON_INTERPRET must be set before triton is imported.
    """
    global _done
    if _done is None:
        from triton import knobs

        if not knobs.runtime.interpret:
            raise RuntimeError("TRITON_INTERPRET=1 must be in the environment before triton is imported")
        from m3check.interpret import arithmetic, language, launch, memory, probes, speed

        language.install()  # first: what Triton leaves behind after a launch would stay for good
        _done = tuple(_one(*entry) for entry in _repairs(arithmetic, launch, memory, probes))
        speed.install()
    return _done


def _repairs(
    arithmetic: ModuleType, launch: ModuleType, memory: ModuleType, probes: ModuleType
) -> list[tuple[str, Callable[[], str | None], Callable[[], None]]]:
    return [
        ("scalar index", probes.scalar_index, launch.repair_scalar_index),
        ("boolean arguments", probes.boolean_arguments, launch.repair_boolean_arguments),
        ("annotated arguments", probes.annotated_arguments, launch.repair_annotated_arguments),
        ("fnuz types", probes.fnuz_types, launch.repair_fnuz_types),
        ("masks", probes.masks, memory.repair_masks),
        ("bf16 rounding", probes.bf16_rounding, lambda: arithmetic.repair_conversions("bf16")),
        ("fp8 conversions", probes.fp8_conversions, lambda: arithmetic.repair_conversions(*arithmetic.formats.FP8)),
        ("bf16 casts", probes.bf16_casts, arithmetic.repair_bf16_casts),
        ("bf16 constants", probes.bf16_constants, arithmetic.repair_bf16_constants),
        ("bf16 operators", probes.bf16_operators, arithmetic.repair_operators),
        ("bf16 sum", probes.bf16_sum, arithmetic.repair_sum),
        ("narrow dot", probes.narrow_dot, arithmetic.repair_dot),
        ("comparisons", probes.comparisons, arithmetic.repair_comparisons),
        ("unsigned inversion", probes.unsigned_inversion, arithmetic.repair_unsigned_inversion),
        ("maximum of numbers", probes.number_extremes, arithmetic.repair_number_extremes),
        ("dependent launch", probes.dependent_launch, launch.repair_dependent_launch),
        ("autotune", probes.autotune, launch.repair_autotune),
    ]


def _one(name: str, probe: Callable[[], str | None], repair: Callable[[], None]) -> Repair:
    wrong = _tried(probe)
    if wrong is None:
        return Repair(name, needed=False, installed=False, detail="sound in this Triton")
    try:
        repair()
    except Exception as error:
        return Repair(name, needed=True, installed=False, detail=f"{wrong}; the repair does not fit: {_line(error)}")
    left = _tried(probe)
    if left is not None:
        return Repair(name, needed=True, installed=False, detail=f"{wrong}; after the repair: {left}")
    return Repair(name, needed=True, installed=True, detail=wrong)


def _tried(probe: Callable[[], str | None]) -> str | None:
    try:
        return probe()
    except Exception as error:
        return _line(error)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:159] + "…"


def pin_autotune(kernel: Any, index: int | None) -> None:
    """Run configuration `index` of an autotuned kernel from now on; None: the cheapest that compiles."""
    from m3check.interpret import launch

    launch.pin_autotune(kernel, index)


def autotuned(namespace: dict[str, Any]) -> dict[str, int]:
    """Names of the autotuned kernels of a module's namespace and how many configurations each has."""
    from m3check.interpret import launch

    return launch.autotuned(namespace)
