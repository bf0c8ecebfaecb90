"""Repairs of how the interpreter starts a kernel: types, arguments, autotuning, dependent launches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.extra import cuda
from triton.runtime import autotuner, jit
from triton.runtime import interpreter as base

from m3check.interpret import language
from m3check.types import M3CheckError


class StaticAssertionFailed(AssertionError):
    """tl.static_assert: this configuration does not compile."""


def _static_assert(cond: object, msg: str = "") -> None:
    if not cond:
        raise StaticAssertionFailed(msg)


def repair_fnuz_types() -> None:
    """The fnuz dialects have an interpreter type."""
    names = {"fp8e4b8": "get_fp8e4b8_ty", "fp8e5b16": "get_fp8e5b16_ty"}

    def make(original: Any) -> Any:
        return lambda self, builder: getattr(builder, names[self.name])() if self.name in names else original(self, builder)

    language.override(tl.dtype, "to_ir", make)


def repair_scalar_index() -> None:
    """A scalar tensor is an index (numpy 2.4 no longer turns an array of one element into an int)."""
    language.override(tl.tensor, "__index__", lambda original: lambda self: int(self.handle.data.reshape(())))


def name_static_assertions() -> None:
    """A failing tl.static_assert can be told from any other assertion."""
    for owner in (tl, tl.core):
        language.override(owner, "static_assert", lambda original: _static_assert)


def repair_boolean_arguments() -> None:
    """A Python bool may be a kernel argument that is not constexpr."""
    original = base._implicit_cvt

    def implicit_cvt(arg: Any) -> Any:
        if isinstance(arg, bool):
            return tl.tensor(base.TensorHandle(np.array([arg], dtype=np.bool_), tl.int1), tl.int1)
        return original(arg)

    base._implicit_cvt = implicit_cvt


_INTEGERS = {
    f"{sign}{bits}": np.dtype(f"{kind}{bits}") for sign, kind in (("i", "int"), ("u", "uint")) for bits in (8, 16, 32, 64)
}


class _Typed(int):
    """An integer argument whose type its kernel names: `n: tl.int64`."""

    type: str


def repair_annotated_arguments() -> None:
    """An integer argument has the type that its kernel names, where it names one, and not the narrowest that holds it."""
    convert, launch = base._implicit_cvt, base.GridExecutor.__call__

    def implicit_cvt(arg: Any) -> Any:
        if not isinstance(arg, _Typed):
            return convert(arg)
        kind = tl.str_to_ty(arg.type, None)
        return tl.tensor(base.TensorHandle(np.array([int(arg)], dtype=_INTEGERS[arg.type]), kind), kind)

    def typed(name: str, arg: Any, types: Mapping[str, Any]) -> Any:
        kind = jit._normalize_ty(types[name]) if name in types and type(arg) is int else ""
        if kind not in _INTEGERS:
            return arg
        named = _Typed(arg)
        named.type = kind
        return named

    def call(self: Any, *args: Any, **named: Any) -> Any:
        types = self.fn.__annotations__
        told = [typed(name, arg, types) for name, arg in zip(self.arg_names, args, strict=False)]
        return launch(self, *told, *args[len(told) :], **{name: typed(name, arg, types) for name, arg in named.items()})

    base._implicit_cvt, base.GridExecutor.__call__ = implicit_cvt, call


waits: list[Callable[[], None]] = []
"""Called whenever a program waits for the kernel launched before its own."""


def repair_dependent_launch() -> None:
    """Programs run one after another here, so waiting for an earlier kernel and releasing a later one are nothing."""

    def wait(_semantic: Any = None) -> None:
        for told in waits:
            told()

    def nothing(_semantic: Any = None) -> None:
        return None

    for owner in (cuda, cuda.gdc):
        owner.gdc_wait, owner.gdc_launch_dependents = wait, nothing


# -- autotuning -------------------------------------------------------------------------------------------------------

_PIN = "_m3check_pin"


def autotuner_of(kernel: Any) -> Any:
    """The Autotuner inside a kernel object (behind heuristics and the like), or None."""
    while kernel is not None and not isinstance(kernel, autotuner.Autotuner):
        kernel = getattr(kernel, "fn", None)
    return kernel


def autotuned(namespace: Mapping[str, Any]) -> dict[str, int]:
    """Names of the autotuned kernels of a module's namespace and how many configurations each has."""
    found = {name: autotuner_of(value) for name, value in namespace.items()}
    return {name: len(tuner.configs) for name, tuner in found.items() if tuner is not None}


def pin_autotune(kernel: Any, index: int | None) -> None:
    """Run configuration `index` of an autotuned kernel from now on; None: the cheapest that compiles, the default."""
    tuner = autotuner_of(kernel)
    if tuner is None:
        raise M3CheckError(f"{getattr(kernel, '__name__', kernel)} is not autotuned")
    if index is not None and not 0 <= index < len(tuner.configs):
        raise M3CheckError(f"configuration {index} does not exist: the kernel has {len(tuner.configs)}, counted from 0")
    setattr(tuner, _PIN, index)


def cost_of(config: Any) -> tuple[float, int, int]:
    """What orders configurations from the cheapest: the size of the tile, then warps and stages."""
    sizes = [v for v in config.kwargs.values() if isinstance(v, int) and not isinstance(v, bool) and v > 0]
    return math.prod(sizes), config.num_warps or 0, config.num_stages or 0


def _is_static_assertion(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, StaticAssertionFailed):
            return True
        error = error.__cause__
    return False


def repair_autotune() -> None:
    """An autotuned kernel runs without a device to time it on: pinned, or the cheapest configuration that compiles."""
    name_static_assertions()

    def launch(self: Any, config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.best_config = config
        if config.pre_hook is not None:
            config.pre_hook({**self.nargs, **kwargs, **config.all_kwargs()})
        return self.fn.run(*args, **kwargs, **config.all_kwargs())

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        pin = getattr(self, _PIN, None)
        if pin is not None:
            return launch(self, self.configs[pin], args, kwargs)
        configs = list(self.configs)
        if self.early_config_prune:
            configs = self.early_config_prune(configs, self.nargs, **kwargs)
        configs.sort(key=cost_of)
        for config in configs[:-1]:
            try:
                return launch(self, config, args, kwargs)
            except base.InterpreterError as error:
                if not _is_static_assertion(error):
                    raise
        return launch(self, configs[-1], args, kwargs)

    autotuner.Autotuner.run = run
