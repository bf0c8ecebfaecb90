"""The kinds of generic edits: one function a kind, which says what it makes of one place of a syntax tree.

A kind is added by its function and a line in `KINDS`; `walk` brings it to every place that is edited.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

COMPARISONS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "=="}
ARITHMETIC = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "+",
    ast.FloorDiv: "%",
    ast.Mod: "//",
    ast.Div: "*",
    ast.LShift: ">>",
    ast.RShift: "<<",
    ast.BitAnd: "|",
    ast.BitOr: "&",
    ast.BitXor: "|",
}
EXTREMES = {"minimum": "maximum", "maximum": "minimum", "min": "max", "max": "min"}
FUNCTIONS = {"exp2": "exp", "exp": "exp2", "log2": "log", "log": "log2", "sum": "max"}


@dataclass(frozen=True)
class Place:
    """What a kind may ask about where a node stands."""

    text: Callable[[ast.AST], str]
    """The source of a node."""
    jit: bool
    """Whether it stands in a Triton function, not in the Python that launches one."""
    parameters: Sequence[str]
    """Of the function."""
    known: set[str]
    """Names that have a value before the statement."""


Changes = Iterator[tuple[ast.AST, str]]
"""What is replaced, and by what."""


@dataclass(frozen=True)
class Kind:
    """One kind of edit."""

    name: str
    what: str
    changes: Callable[[ast.AST, Place], Changes]
    """Of one statement or expression."""


def _comparison(node: ast.AST, place: Place) -> Changes:
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
        left, right = place.text(node.left), place.text(node.comparators[0])
        yield node, f"({left} {COMPARISONS[type(node.ops[0])]} {right})"


def _bound(node: ast.AST, place: Place) -> Changes:
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        sign = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}.get(type(node.ops[0]))
        if sign:
            yield node, f"({place.text(node.left)} {sign} ({place.text(node.comparators[0])}) - 1)"


def _mask(node: ast.AST, place: Place) -> Changes:
    if not (isinstance(node, ast.Call) and called(node.func) in ("load", "store") and place.jit):
        return
    if any(k.arg == "mask" for k in node.keywords):
        kept = [place.text(a) for a in (*node.args, *(k for k in node.keywords if k.arg not in ("mask", "other")))]
        yield node, f"{place.text(node.func)}({', '.join(kept)})"


def _term(node: ast.AST, place: Place) -> Changes:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        yield node, f"({place.text(node.left)})"
        yield node, f"({place.text(node.right)})"
    elif isinstance(node, ast.BoolOp) and len(node.values) == 2 and place.jit:
        for value in node.values:
            yield node, f"({place.text(value)})"


def _stride(node: ast.AST, place: Place) -> Changes:
    """The next stride of the same tensor, in the order of the signature."""
    if isinstance(node, ast.Name) and node.id.startswith("stride_"):
        name, base = node.id, node.id[:-1]
        family = [p for p in place.parameters if p.startswith(base) and len(p) <= len(name) + 3 and p.startswith("stride_")]
        if len(family) >= 2 and name in family:
            yield node, family[(family.index(name) + 1) % len(family)]


def _constant(node: ast.AST, place: Place) -> Changes:
    if not isinstance(node, ast.Constant):
        return
    if isinstance(node.value, bool):
        yield node, str(not node.value)
    elif isinstance(node.value, int):
        yield node, str(node.value + 1)
        if node.value == 1:
            yield node, "0"
    elif isinstance(node.value, float):
        yield node, repr(2 * node.value if node.value else 1.0)


def _guard(node: ast.AST, place: Place) -> Changes:
    if isinstance(node, ast.If):
        if place.jit or not node.orelse:
            for value in ("True", "False"):
                yield node.test, value
    elif isinstance(node, ast.Return) and node.value is None:
        yield node, "pass"
    elif isinstance(node, ast.Call) and called(node.func) == "where" and len(node.args) == 3:
        for argument in node.args[1:]:
            yield node, f"({place.text(argument)})"


def _arithmetic(node: ast.AST, place: Place) -> Changes:
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        yield node, f"(({place.text(node.left)}) {ARITHMETIC[type(node.op)]} ({place.text(node.right)}))"


def _factor(node: ast.AST, place: Place) -> Changes:
    if isinstance(node, ast.BinOp):
        if isinstance(node.op, ast.Mult | ast.FloorDiv):
            yield node, f"({place.text(node.left)})"
        if isinstance(node.op, ast.Mult):
            yield node, f"({place.text(node.right)})"


def _extreme(node: ast.AST, place: Place) -> Changes:
    if not isinstance(node, ast.Call) or called(node.func) not in EXTREMES:
        return
    name = called(node.func)
    over_axis = place.jit and name in ("min", "max") and len(node.args) == 2 and isinstance(node.args[1], ast.Constant)
    if len(node.args) == 2 and not over_axis:
        for argument in node.args:
            yield node, f"({place.text(argument)})"
    if place.jit or name in ("min", "max"):
        yield _Tail(node.func), EXTREMES[name]


def _function(node: ast.AST, place: Place) -> Changes:
    if isinstance(node, ast.Call) and called(node.func) in FUNCTIONS and (place.jit or called(node.func) == "log2"):
        yield _Tail(node.func), FUNCTIONS[called(node.func)]


def _program(node: ast.AST, place: Place) -> Changes:
    if not isinstance(node, ast.Call):
        return
    if called(node.func) == "program_id" and isinstance(node.args[0], ast.Constant):
        for axis in {0, 1, 2} - {node.args[0].value}:
            yield node, f"{place.text(node.func)}({axis})"
    elif called(node.func) == "num_programs" and place.jit:
        yield _Tail(node.func), "program_id"


def _cast(node: ast.AST, place: Place) -> Changes:
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return
    if node.func.attr == "to" and len(node.args) == 1:
        dtype = place.text(node.args[0])
        yield node, f"({place.text(node.func.value)})"
        if dtype.endswith("float32"):
            yield node.args[0], dtype.replace("float32", "float16")
        if dtype.endswith("int64"):
            yield node.args[0], dtype.replace("int64", "int32")


def _initial(node: ast.AST, place: Place) -> Changes:
    if not (isinstance(node, ast.Call) and place.jit):
        return
    name = called(node.func)
    if name in ("load", "store"):
        for other in (k.value for k in node.keywords if k.arg == "other"):
            text = place.text(other)
            yield other, "0" if "inf" in text or "-" in text else "1"
    elif name == "full" and len(node.args) > 1:
        text = place.text(node.args[1])
        yield node.args[1], "0.0" if "inf" in text or "nan" in text else "1.0"
    elif name == "zeros":
        yield node, f"({place.text(node)} + 1)"


def _dropped(node: ast.AST, place: Place) -> Changes:
    if isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield node, "pass"
    elif isinstance(node, ast.Assign):
        stored = {n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
        if stored and stored <= place.known:
            yield node, "pass"


def _loop(node: ast.AST, place: Place) -> Changes:
    head = node.iter if isinstance(node, ast.For) else None
    if isinstance(head, ast.Call) and called(head.func) in ("range", "static_range"):
        arguments = [place.text(a) for a in head.args]
        name = place.text(head.func)
        rest = "".join(f", {place.text(k)}" for k in head.keywords)
        lower, upper = (arguments[0], arguments[1]) if len(arguments) > 1 else ("0", arguments[0])
        step = arguments[2] if len(arguments) > 2 else "1"
        yield head, f"{name}({lower} + ({step}), {upper}, {step}{rest})"
        yield head, f"{name}({lower}, {upper} - ({step}), {step}{rest})"


def _sign(node: ast.AST, place: Place) -> Changes:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield node, f"({place.text(node.operand)})"


KINDS: tuple[Kind, ...] = (
    Kind("comparison", "< for <=, == for != and so on", _comparison),
    Kind("bound", "a compared bound one less", _bound),
    Kind("mask dropped", "a load or store without its mask", _mask),
    Kind("arithmetic", "+ for -, // for %, * for + and so on", _arithmetic),
    Kind("term of a mask dropped", "one side of & or `and` left out", _term),
    Kind("stride swapped", "another stride of the same tensor", _stride),
    Kind("constant", "an integer one more, a float twice as large, a flag turned", _constant),
    Kind("guard removed", "an `if` that always or never holds, one branch of tl.where alone", _guard),
    Kind("min/max", "the opposite extreme, or one side alone", _extreme),
    Kind("function", "exp for exp2, sum for max", _function),
    Kind("program id", "another axis of the grid", _program),
    Kind("cast", "a conversion left out, or to fp16 instead of fp32", _cast),
    Kind("factor dropped", "one side of a product left out", _factor),
    Kind("initial value", "another start of an accumulator, another `other`", _initial),
    Kind("statement dropped", "a store, an update or a reassignment left out", _dropped),
    Kind("loop", "the first or the last step left out", _loop),
    Kind("sign", "a minus or a `not` left out", _sign),
)


def called(func: ast.expr) -> str:
    """The last name of a called expression; empty where it has none."""
    if isinstance(func, ast.Attribute):
        return func.attr
    return func.id if isinstance(func, ast.Name) else ""


class _Tail(ast.AST):
    """The last name of a called expression: `exp2` of `tl.exp2`."""

    def __init__(self, func: ast.expr) -> None:
        self.lineno, self.end_lineno = func.end_lineno, func.end_lineno
        self.end_col_offset = func.end_col_offset
        self.col_offset = (func.end_col_offset or 0) - len(called(func).encode())
