"""Which functions and branches of a provider's files its calls can reach: what they never run is not edited.

A file may serve other models and targets: a switch that no call of the contract turns on, a kernel that another target
launches. `Reach` takes conditions whose value is known, as they read in the source, and follows names from the functions
that are called.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Reach:
    """Conditions that the calls and the target fix, and the functions that are left; None: every function."""

    fixed: Mapping[str, bool] = field(default_factory=dict)
    """By the text that `ast.unparse` gives."""
    functions: frozenset[str] | None = None

    def truth(self, test: ast.expr) -> bool | None:
        """Whether a condition holds; None where that is open."""
        text = ast.unparse(test) if self.fixed else ""
        if text in self.fixed:
            return self.fixed[text]
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self.truth(test.operand)
            return None if inner is None else not inner
        if isinstance(test, ast.BoolOp):
            values = {self.truth(value) for value in test.values}
            decisive = isinstance(test.op, ast.Or)  # one that holds decides `or`, one that does not decides `and`
            if decisive in values:
                return decisive
            return None if None in values else not decisive
        return None

    def ends(self, node: ast.AST) -> bool:
        """Whether what stands after a statement never runs: a return, or an `if` whose taken branch ends so."""
        if isinstance(node, ast.If) and (fixed := self.truth(node.test)) is not None:
            taken = node.body if fixed else node.orelse
            return bool(taken) and self.ends(taken[-1])
        return isinstance(node, ast.Return)

    def has_some(self, source: bytes) -> bool:
        """Whether a function of this file is left."""
        return any(isinstance(n, ast.FunctionDef) and self.holds(n.name) for n in ast.parse(source).body)

    def holds(self, function: str) -> bool:
        """Whether a function is left."""
        return self.functions is None or function in self.functions


def reached(sources: Iterable[bytes], entries: Iterable[str], fixed: Mapping[str, bool]) -> Reach:
    """What calls of `entries` reach in these files together, where conditions are `fixed`."""
    within = Reach(fixed)
    bodies: dict[str, list[ast.AST]] = {}
    for source in sources:
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef):
                bodies.setdefault(node.name, []).extend(node.body)
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    bodies.setdefault(ast.unparse(target), []).append(node.value)
    found: set[str] = set()
    waiting = [name for name in entries if name in bodies]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [other for other in _names(bodies[name], within) if other in bodies]
    return Reach(fixed, frozenset(found))


def _names(nodes: Iterable[Any], reach: Reach) -> Iterator[str]:
    """The names that nodes mention, branches that are not taken left out."""
    for node in nodes:
        if not isinstance(node, ast.AST):
            continue
        if isinstance(node, ast.Name):
            yield node.id
        fixed = reach.truth(node.test) if isinstance(node, ast.If | ast.IfExp) else None
        for field_name, value in ast.iter_fields(node):
            if fixed is None or field_name != ("orelse" if fixed else "body"):
                yield from _names(value if isinstance(value, list) else [value], reach)
        if reach.ends(node):
            return
