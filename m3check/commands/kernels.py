"""`m3check kernels`: who can be tested, and what a kernel of one's own must look like."""

from __future__ import annotations

import argparse
import ast
import inspect
import textwrap
from collections.abc import Sequence
from importlib import metadata

from m3check.commands.talk import emit
from m3check.config import choose


def main(arguments: argparse.Namespace) -> int:
    """Print the providers, or what a user's file may define: functions (--signatures) and promises (--profile)."""
    told = [] if arguments.signatures is None else [signatures(arguments.signatures)]
    told += [profile()] if arguments.profile else []
    if told:
        emit("\n\n".join(told))
        return 0
    from tabulate import tabulate

    from m3check.kernels import PROVIDERS, absent

    part = {p.name for p in PROVIDERS if not p.distribution and p.name in p.grammar and absent(p) is None}  # of a package

    rows = [
        (p.name, "\n".join(p.grammar), p.summary, p.needs, "yes" if p.name in part else installed(p.distribution) or "–")
        for p in PROVIDERS
    ]
    headers = ["provider", "SPEC", "what it is", "needs", "installed"]
    emit(tabulate(rows, headers=headers, tablefmt="grid", disable_numparse=True, maxcolwidths=[None, None, 44, 36, None]))
    return 0


def installed(distribution: str) -> str:
    """The version of an installed distribution, or an empty string."""
    try:
        return metadata.version(distribution) if distribution else ""
    except metadata.PackageNotFoundError:
        return ""


def signatures(ops: Sequence[str] = ()) -> str:
    """The functions of a user's file as Python stubs, every parameter explained once; of these ops, else of all."""
    from m3check.kernels.calls import FAMILIES
    from m3check.types import OPS

    for op in ops:
        choose("op of its own", op, [op for family in FAMILIES.values() for op in family.signatures])
    lines = ["# Functions named like the ops, called with these keywords; those marked ~ need not be taken.", ""]
    for family in FAMILIES.values():
        shown = {op: signature for op, signature in family.signatures.items() if not ops or op in ops}
        if not shown:
            continue
        for op, (parameters, returns) in shown.items():
            lines += [
                f"# {OPS[op].summary}",
                *textwrap.wrap(f"def {op}(*, {', '.join(parameters)}):", 100, subsequent_indent=" " * 8),
            ]
            lines += [f'    """Returns {returns}."""', ""]
        lines.append(f"# {family.letters}")
        used = {name for parameters, _ in shown.values() for name in parameters}
        told = {name: text for name, text in family.parameters.items() if name in used}
        width = max(len(name) for name in told)
        lines += [f"# {'~' if name in family.optional else ' '} {name:<{width}}  {text}" for name, text in told.items()]
        lines.append("")
    return "\n".join(lines[:-1])


def profile() -> str:
    """The fields of Profile with their defaults and what they mean, as a user's file may set them."""
    from m3check.types import Profile

    (body,) = ast.parse(inspect.getsource(Profile)).body
    assert isinstance(body, ast.ClassDef)
    lines = ["# PROFILE = m3check.Profile(...) beside the functions says what differs from these defaults."]
    for field, meaning in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(meaning, ast.Expr):
            name, kind = ast.unparse(field.target), ast.unparse(field.annotation).removeprefix("Literal")
            value = getattr(Profile(), name)
            default = f"frozenset({sorted(value)})" if isinstance(value, frozenset) else repr(value)
            text = " ".join(ast.literal_eval(meaning.value).split())
            lines += ["", f"{name} = {default}{f'  # of {kind}' if kind.startswith('[') else ''}"]
            lines += textwrap.wrap(text, 100, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)
