"""What a vLLM kernel file says of itself, read from its source without running it.

Versions differ in cache layout, in the id lists that attention bears and in the fp8 operands that scoring takes. What a
version does is read here from its syntax tree, so that a version nobody has seen needs no entry in a list.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from m3check.types import OPS, M3CheckError

PREFIX = "minimax_m3_"

IdRule = Literal["tested", "counted", "leading"]


@dataclass(frozen=True)
class Reading:
    """One op's function in one file."""

    function: str
    parameters: tuple[str, ...]
    extra: tuple[str, ...]
    """Keyword-only parameters without a default."""
    kv_layout: Literal["packed", "split"] | None
    """By the number of strides taken from `kv_cache`: four or five."""
    id_rule: IdRule
    """What attention does with ids: `tested` skips each that is negative or not visible, `counted` reads as many leading
    ids as are not negative, `leading` reads min(topk, visible) ids unseen. A kernel with half of a test means the whole."""
    mixes_fp8: bool
    """Whether a kernel asks for fp8 operands, to widen one that differs from the other."""


def read_file(path: Path) -> Mapping[str, Reading]:
    """The ops that a file defines."""
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except (OSError, SyntaxError, ValueError) as error:
        raise M3CheckError(f"cannot read {path}: {error}") from error
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    return {op: _read(functions, PREFIX + op) for op in OPS if PREFIX + op in functions}


def _read(functions: Mapping[str, ast.FunctionDef], name: str) -> Reading:
    node = functions[name]
    arguments = node.args
    extra = tuple(a.arg for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if default is None)
    reached = [functions[n] for n in _reached(functions, name)]
    strides = _strides(node, "kv_cache")
    return Reading(
        function=name,
        parameters=tuple(a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)),
        extra=extra,
        kv_layout={3: "packed", 4: "split"}.get(max(strides, default=-1)),  # type: ignore[arg-type]
        id_rule=_id_rule(reached),
        mixes_fp8=any(isinstance(n, ast.Attribute) and n.attr == "is_fp8" for f in reached for n in ast.walk(f)),
    )


def _reached(functions: Mapping[str, ast.FunctionDef], name: str) -> list[str]:
    """The file's functions that one uses, itself first, through any number of others."""
    found = [name]
    for current in found:
        for node in ast.walk(functions[current]):
            if isinstance(node, ast.Name) and node.id in functions and node.id not in found:
                found.append(node.id)
    return found


def _strides(node: ast.FunctionDef, tensor: str) -> list[int]:
    return [
        call.args[0].value
        for call in ast.walk(node)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr == "stride"
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id == tensor
        and len(call.args) == 1
        and isinstance(call.args[0], ast.Constant)
        and isinstance(call.args[0].value, int)
    ]


def _id_rule(functions: list[ast.FunctionDef]) -> IdRule:
    rules: set[IdRule] = set()
    for function in functions:
        loaded = set(_loaded_names(function))
        counted = {id(n) for call in ast.walk(function) if _is_call(call, "sum") for n in ast.walk(call)}
        for name, node in _compared(function):
            if name in loaded:
                rules.add("counted" if id(node) in counted else "tested")
    return next((rule for rule in ("counted", "tested") if rule in rules), "leading")


def _loaded_names(function: ast.FunctionDef) -> Iterator[str]:
    """Names that hold what a load gave."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and any(_is_call(n, "load") for n in ast.walk(node.value)):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def _compared(function: ast.FunctionDef) -> Iterator[tuple[str, ast.Compare]]:
    """Names tested to be at least 0, or below something."""
    for node in ast.walk(function):
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Name):
            right = node.comparators[0]
            from_zero = isinstance(node.ops[0], ast.GtE) and isinstance(right, ast.Constant) and right.value == 0
            if from_zero or isinstance(node.ops[0], ast.Lt):
                yield node.left.id, node


def _is_call(node: ast.AST, attribute: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == attribute
