"""Generic edits of kernel sources: every small change of an expression that a tired hand could make, from the syntax tree.

Both the Triton functions of a file and the Python functions that launch them are edited. What raises for a wrong call is
left alone, and so is what only changes speed (`num_warps`, `num_stages`, autotune lists), what only refuses to compile
(`tl.static_assert`), and programmatic dependent launch: a wait too few is a race on a device, row W7 of the catalogue.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from m3check.mutants.mutant import Edit, Mutant, content_key

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
OPPOSITES = {
    "minimum": "maximum",
    "maximum": "minimum",
    "min": "max",
    "max": "min",
    "exp2": "exp",
    "exp": "exp2",
    "log2": "log",
    "log": "log2",
    "sum": "max",
    "num_programs": "program_id",
}
KINDS = {
    "comparison": "< for <=, == for != and so on",
    "bound": "a compared bound one less",
    "mask dropped": "a load or store without its mask",
    "term of a mask dropped": "one side of & or `and` left out",
    "stride swapped": "another stride of the same tensor",
    "constant": "an integer one more, a float twice as large, a flag turned",
    "guard removed": "an `if` that always or never holds, one branch of tl.where alone",
    "arithmetic": "+ for -, // for %, * for + and so on",
    "min/max": "the opposite extreme, or one side alone",
    "function": "exp for exp2, sum for max",
    "program id": "another axis of the grid",
    "cast": "a conversion left out, or to fp16 instead of fp32",
    "factor dropped": "one side of a product left out",
    "initial value": "another start of an accumulator, another `other`",
    "statement dropped": "a store, an update or a reassignment left out",
    "loop": "the first or the last step left out",
    "sign": "a minus or a `not` left out",
}
_HINTS = frozenset({"static_assert", "static_print", "gdc_wait", "gdc_launch_dependents", "multiple_of", "max_contiguous"})
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


@dataclass(frozen=True)
class _Site:
    kind: str
    node: ast.AST
    new: str


def mutants(provider: str, file: str, source: bytes) -> list[Mutant]:
    """Every generic mutant of one file, in the order of the file."""
    tree = ast.parse(source)
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found: list[Mutant] = []
    seen: dict[tuple[str, ...], int] = {}
    for function in tree.body:
        if not isinstance(function, ast.FunctionDef):
            continue
        for statement, site in _Function(source, starts, function).sites():
            first, last = statement
            start, end = _span(starts, site.node)
            line_from, line_to = starts[first - 1], starts[last]
            before = _squeezed(source[line_from:line_to])
            after = _squeezed(source[line_from:start] + site.new.encode() + source[end:line_to])
            if before == after:
                continue
            identity = (provider, file, function.name, site.kind, before, after)
            seen[identity] = seen.get(identity, -1) + 1
            old = _squeezed(source[start:end])
            line = site.node.lineno  # type: ignore[attr-defined]
            found.append(
                Mutant(
                    provider,
                    site.kind,
                    f"{file}:{line}",
                    f"{file}:{line} {function.name}: {_short(old)} → {_short(' '.join(site.new.split())) or 'nothing'}",
                    content_key(*identity, str(seen[identity])),
                    (Edit(file, start, end, site.new.encode()),),
                    lines=(first, last),
                    function=function.name,
                )
            )
    unique: dict[bytes, Mutant] = {}
    for mutant in found:  # two kinds may make the same text of the same place
        edit = mutant.edits[0]
        unique.setdefault(b"%d %d %s" % (edit.start, edit.end, edit.new), mutant)
    return list(unique.values())


class _Function:
    """The sites of one function."""

    def __init__(self, source: bytes, starts: list[int], function: ast.FunctionDef) -> None:
        self._source, self._starts, self._function = source, starts, function
        self._jit = any("jit" in ast.unparse(d) for d in function.decorator_list)
        self._parameters = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
        self._known = set(self._parameters)

    def sites(self) -> Iterator[tuple[tuple[int, int], _Site]]:
        body = self._function.body
        if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body = body[1:]
        yield from self._block(body)

    def _block(self, body: list[ast.stmt]) -> Iterator[tuple[tuple[int, int], _Site]]:
        for node in body:
            if isinstance(node, ast.Raise | ast.Assert | ast.FunctionDef | ast.Import | ast.ImportFrom) or _only_speed(
                node
            ):
                continue
            if isinstance(node, ast.If):
                if all(isinstance(n, ast.Raise) or _only_speed(n) for n in node.body):
                    continue
                at = (node.lineno, node.test.end_lineno or node.lineno)
                if self._jit or not node.orelse:
                    for value in ("True", "False"):
                        yield at, _Site("guard removed", node.test, value)
                yield from ((at, site) for site in self._expressions(node.test))
                yield from self._block(node.body)
                yield from self._block(node.orelse)
            elif isinstance(node, ast.For | ast.While | ast.With):
                head = node.iter if isinstance(node, ast.For) else node.test if isinstance(node, ast.While) else None
                if head is not None:
                    at = (node.lineno, head.end_lineno or node.lineno)
                    yield from ((at, site) for site in self._loop(head))
                yield from self._block(node.body)
            else:
                at = (node.lineno, node.end_lineno or node.lineno)
                yield from ((at, site) for site in self._statement(node))
            self._known |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}

    def _loop(self, head: ast.expr) -> Iterator[_Site]:
        if isinstance(head, ast.Call) and _name(head.func) in ("range", "static_range"):
            arguments = [self._text(a) for a in head.args]
            called = self._text(head.func)
            rest = "".join(f", {self._text(k)}" for k in head.keywords)
            lower, upper = (arguments[0], arguments[1]) if len(arguments) > 1 else ("0", arguments[0])
            step = arguments[2] if len(arguments) > 2 else "1"
            yield _Site("loop", head, f"{called}({lower} + ({step}), {upper}, {step}{rest})")
            yield _Site("loop", head, f"{called}({lower}, {upper} - ({step}), {step}{rest})")
        yield from self._expressions(head)

    def _statement(self, node: ast.stmt) -> Iterator[_Site]:
        if isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
            yield _Site("statement dropped", node, "pass")
        elif isinstance(node, ast.Assign):
            stored = {n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
            if stored and stored <= self._known:
                yield _Site("statement dropped", node, "pass")
        elif isinstance(node, ast.Return) and node.value is None:
            yield _Site("guard removed", node, "pass")
            return
        for value in ast.iter_child_nodes(node):
            if isinstance(value, ast.expr) and not (isinstance(node, ast.AnnAssign) and value is node.annotation):
                yield from self._expressions(value)

    def _expressions(self, node: ast.AST, slicing: bool = False) -> Iterator[_Site]:
        if isinstance(node, ast.JoinedStr | ast.Lambda | ast.Starred):
            return
        yield from self._here(node, slicing)
        if isinstance(node, ast.Subscript):
            yield from self._expressions(node.value, slicing)
            if not self._jit:
                yield from self._expressions(node.slice, True)
            return
        if isinstance(node, ast.Call):
            yield from self._expressions(node.func)
            shape = _name(node.func) in ("full", "zeros", "arange", "empty", "reshape", "permute", "view", "program_id")
            for i, argument in enumerate(node.args):
                if not (shape and self._jit) and not (_name(node.func) in ("sum", "max", "min") and i == 1 and self._jit):
                    yield from self._expressions(argument)
            for keyword in node.keywords:
                if keyword.arg not in _SPEED:
                    yield from self._expressions(keyword.value)
            return
        for child in ast.iter_child_nodes(node):
            yield from self._expressions(child, slicing)

    def _here(self, node: ast.AST, slicing: bool) -> Iterator[_Site]:
        text = self._text
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
            left, right, operator = text(node.left), text(node.comparators[0]), type(node.ops[0])
            yield _Site("comparison", node, f"({left} {COMPARISONS[operator]} {right})")
            if operator not in (ast.Eq, ast.NotEq):
                sign = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}[operator]
                yield _Site("bound", node, f"({left} {sign} ({right}) - 1)")
        elif isinstance(node, ast.BinOp):
            left, right = text(node.left), text(node.right)
            if type(node.op) in ARITHMETIC:
                yield _Site("arithmetic", node, f"(({left}) {ARITHMETIC[type(node.op)]} ({right}))")
            if isinstance(node.op, ast.BitAnd):
                yield _Site("term of a mask dropped", node, f"({left})")
                yield _Site("term of a mask dropped", node, f"({right})")
            if isinstance(node.op, ast.Mult | ast.FloorDiv):
                yield _Site("factor dropped", node, f"({left})")
            if isinstance(node.op, ast.Mult):
                yield _Site("factor dropped", node, f"({right})")
        elif isinstance(node, ast.BoolOp) and len(node.values) == 2 and self._jit:
            for value in node.values:
                yield _Site("term of a mask dropped", node, f"({text(value)})")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
            yield _Site("sign", node, f"({text(node.operand)})")
        elif isinstance(node, ast.Constant) and not slicing:
            yield from self._constant(node)
        elif isinstance(node, ast.Name) and node.id.startswith("stride_"):
            other = self._other_stride(node.id)
            if other:
                yield _Site("stride swapped", node, other)
        elif isinstance(node, ast.Call):
            yield from self._call(node)

    def _constant(self, node: ast.Constant) -> Iterator[_Site]:
        if isinstance(node.value, bool):
            yield _Site("constant", node, str(not node.value))
        elif isinstance(node.value, int):
            yield _Site("constant", node, str(node.value + 1))
            if node.value == 1:
                yield _Site("constant", node, "0")
        elif isinstance(node.value, float):
            yield _Site("constant", node, repr(2 * node.value if node.value else 1.0))

    def _call(self, node: ast.Call) -> Iterator[_Site]:
        name, text = _name(node.func), self._text
        arguments = [text(a) for a in node.args]
        keywords = {k.arg: k for k in node.keywords}
        if name in ("load", "store") and self._jit:
            if "mask" in keywords:
                kept = arguments + [text(k) for k in node.keywords if k.arg not in ("mask", "other")]
                yield _Site("mask dropped", node, f"{text(node.func)}({', '.join(kept)})")
            if "other" in keywords:
                value = keywords["other"].value
                yield _Site("initial value", value, "0" if "inf" in text(value) or "-" in text(value) else "1")
        elif name == "full" and len(arguments) > 1 and self._jit:
            yield _Site("initial value", node.args[1], "0.0" if "inf" in arguments[1] or "nan" in arguments[1] else "1.0")
        elif name == "zeros" and self._jit:
            yield _Site("initial value", node, f"({text(node)} + 1)")
        elif name == "where" and len(arguments) == 3:
            for argument in arguments[1:]:
                yield _Site("guard removed", node, f"({argument})")
        elif name == "program_id" and isinstance(node.args[0], ast.Constant):
            for axis in {0, 1, 2} - {node.args[0].value}:
                yield _Site("program id", node, f"{text(node.func)}({axis})")
        elif name == "to" and isinstance(node.func, ast.Attribute) and len(arguments) == 1:
            yield _Site("cast", node, f"({text(node.func.value)})")
            if arguments[0].endswith("float32"):
                yield _Site("cast", node.args[0], arguments[0].replace("float32", "float16"))
            if arguments[0].endswith("int64"):
                yield _Site("cast", node.args[0], arguments[0].replace("int64", "int32"))
        if name in ("minimum", "maximum", "min", "max") and len(arguments) == 2 and not (
            self._jit and name in ("min", "max") and isinstance(node.args[1], ast.Constant)
        ):  # fmt: skip
            for argument in arguments:
                yield _Site("min/max", node, f"({argument})")
        if name in OPPOSITES and (self._jit or name in ("min", "max", "log2")):
            kind = "min/max" if "m" in name and name not in ("sum", "num_programs") else "function"
            if name == "num_programs":
                kind = "program id"
            yield _Site(kind, _Tail(node.func), OPPOSITES[name])

    def _other_stride(self, name: str) -> str | None:
        """The next stride of the same tensor, in the order of the signature."""
        base = name[:-1]
        family = [p for p in self._parameters if p.startswith(base) and len(p) <= len(name) + 3 and p.startswith("stride_")]
        if len(family) < 2 or name not in family:
            return None
        return family[(family.index(name) + 1) % len(family)]

    def _text(self, node: ast.AST) -> str:
        start, end = _span(self._starts, node)
        return self._source[start:end].decode()


def _only_speed(node: ast.stmt) -> bool:
    """Whether a statement is a hint, sets launch options alone, or asks whether dependent launch is supported."""
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return any(isinstance(t, ast.Name) and t.id in _PDL for t in targets)
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        return False
    call = node.value
    if _name(call.func) == "update" and len(call.args) == 1 and isinstance(call.args[0], ast.Dict):
        return all(isinstance(key, ast.Constant) and key.value in _SPEED for key in call.args[0].keys)
    return _name(call.func) in _HINTS


class _Tail(ast.AST):
    """The last name of a called expression: `exp2` of `tl.exp2`."""

    def __init__(self, func: ast.expr) -> None:
        self.lineno, self.end_lineno = func.end_lineno, func.end_lineno
        self.end_col_offset = func.end_col_offset
        self.col_offset = (func.end_col_offset or 0) - len(_name(func).encode())


def _name(func: ast.expr) -> str:
    if isinstance(func, ast.Attribute):
        return func.attr
    return func.id if isinstance(func, ast.Name) else ""


def _span(starts: list[int], node: ast.AST) -> tuple[int, int]:
    first = starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
    last = starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
    return first, last


def _squeezed(text: bytes) -> str:
    return " ".join(re.sub(r"#.*", "", line) for line in text.decode().split("\n")).strip()


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 70 else text[:69] + "…"
