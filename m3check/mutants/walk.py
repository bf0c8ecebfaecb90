"""Which places of a function are edited: its statements and expressions, without what only raises, hints or sets speed.

What raises for a wrong call is left alone, and so is what only changes speed (`num_warps`, `num_stages`, autotune lists),
what only refuses to compile (`tl.static_assert`), and programmatic dependent launch: a wait too few is a race on a device,
row W7 of the catalogue. Branches that a provider's calls never take (`reach`) are left alone, too.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from m3check.mutants.kinds import KINDS, Place, called
from m3check.mutants.reach import Reach

_HINTS = frozenset(
    {"static_assert", "static_print", "assume", "gdc_wait", "gdc_launch_dependents", "multiple_of", "max_contiguous"}
)
"""Calls without a result of their own: they rule a configuration out, or say what the compiler or the launcher may do."""
_PDL = frozenset({"USE_PDL", "use_pdl", "launch_pdl"})
_SPEED = frozenset(
    {
        "launch_pdl",
        "USE_PDL",
        "num_warps",
        "num_stages",
        "configs",
        "key",
        "device",
        "dtype",
        "input_precision",
        "out_dtype",
    }
)
_SHAPED = ("full", "zeros", "arange", "empty", "reshape", "permute", "view", "program_id")
"""Calls of a Triton function whose arguments are shapes: another one does not compile."""


@dataclass(frozen=True)
class Site:
    """One edit: a node and what stands in its place."""

    kind: str
    node: ast.AST
    new: str
    lines: tuple[int, int]
    """First and last line of the statement, or of the head of one that has a body."""


class Walk:
    """The sites of one function."""

    def __init__(self, function: ast.FunctionDef, text: Callable[[ast.AST], str], reach: Reach) -> None:
        """`text` gives the source of a node."""
        parameters = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
        self._function, self._reach = function, reach
        self._jit = any("jit" in ast.unparse(d) for d in function.decorator_list)
        self._place = Place(text, self._jit, parameters, set(parameters))

    def sites(self) -> Iterator[Site]:
        """Every edit of the function, in the order of its statements."""
        body = self._function.body
        if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body = body[1:]
        yield from self._block(body)

    def _block(self, body: list[ast.stmt]) -> Iterator[Site]:
        for node in body:
            if _left_alone(node):
                continue
            if isinstance(node, ast.If):
                fixed = self._reach.truth(node.test)
                if fixed is None:
                    yield from self._at(node, node.test)
                if fixed is not False:
                    yield from self._block(node.body)
                if fixed is not True:
                    yield from self._block(node.orelse)
                if fixed is not None and self._reach.ends(node):
                    return
            elif isinstance(node, ast.For | ast.While | ast.With):
                head = node.iter if isinstance(node, ast.For) else node.test if isinstance(node, ast.While) else None
                if head is not None:
                    yield from self._at(node, head)
                yield from self._block(node.body)
            else:
                yield from self._at(node, node)
            self._place.known.update(
                n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            )

    def _at(self, node: ast.stmt, head: ast.AST) -> Iterator[Site]:
        """The sites of a statement itself, and of the expressions of its head."""
        lines = (node.lineno, head.end_lineno or node.lineno)  # type: ignore[attr-defined]
        for found in self._statement(node, head):
            for kind in KINDS:
                for place, new in kind.changes(found, self._place):
                    yield Site(kind.name, place, new, lines)

    def _statement(self, node: ast.stmt, head: ast.AST) -> Iterator[ast.AST]:
        """The nodes of a statement that kinds are asked about."""
        yield node
        if head is not node:
            yield from self._expressions(head)
        elif not (isinstance(node, ast.Return) and node.value is None):
            for value in ast.iter_child_nodes(node):
                if isinstance(value, ast.expr) and not (isinstance(node, ast.AnnAssign) and value is node.annotation):
                    yield from self._expressions(value)

    def _expressions(self, node: ast.AST, slicing: bool = False) -> Iterator[ast.AST]:
        if isinstance(node, ast.JoinedStr | ast.Lambda | ast.Starred):
            return
        fixed = self._reach.truth(node.test) if isinstance(node, ast.IfExp) else None
        if isinstance(node, ast.IfExp) and fixed is not None:
            yield from self._expressions(node.body if fixed else node.orelse, slicing)
            return
        if not (slicing and isinstance(node, ast.Constant)):
            yield node
        if isinstance(node, ast.Subscript):
            yield from self._expressions(node.value, slicing)
            if not self._jit:
                yield from self._expressions(node.slice, True)
            return
        if isinstance(node, ast.Call):
            yield from self._expressions(node.func)
            name = called(node.func)
            for i, argument in enumerate(node.args):
                axis = name in ("sum", "max", "min") and i == 1
                if not (self._jit and (name in _SHAPED or axis)):
                    yield from self._expressions(argument)
            for keyword in node.keywords:
                if keyword.arg not in _SPEED:
                    yield from self._expressions(keyword.value)
            return
        for child in ast.iter_child_nodes(node):
            yield from self._expressions(child, slicing)


def _left_alone(node: ast.stmt) -> bool:
    """Whether a statement only raises, defines, imports, hints or sets launch options, or guards nothing else."""
    if isinstance(node, ast.Raise | ast.Assert | ast.FunctionDef | ast.Import | ast.ImportFrom) or _only_speed(node):
        return True
    return isinstance(node, ast.If) and all(isinstance(n, ast.Raise | ast.Assert) or _only_speed(n) for n in node.body)


def _only_speed(node: ast.stmt) -> bool:
    """Whether a statement is a hint, sets launch options alone, or asks whether dependent launch is supported."""
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return any(isinstance(t, ast.Name) and t.id in _PDL for t in targets)
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        return False
    call = node.value
    if called(call.func) == "update" and len(call.args) == 1 and isinstance(call.args[0], ast.Dict):
        return all(isinstance(key, ast.Constant) and key.value in _SPEED for key in call.args[0].keys)
    return called(call.func) in _HINTS
