"""`m3check kernels`: who can be tested, and what a kernel of one's own must look like."""

from __future__ import annotations

import argparse
import textwrap
from importlib import metadata

from m3check.commands.talk import emit


def main(arguments: argparse.Namespace) -> int:
    """Print the providers, or with --signatures the functions that a user's file may define."""
    if arguments.signatures:
        emit(signatures())
        return 0
    from tabulate import tabulate

    from m3check.kernels import PROVIDERS

    rows = [(p.name, "\n".join(p.grammar), p.summary, p.needs, installed(p.distribution) or "–") for p in PROVIDERS]
    headers = ["provider", "SPEC", "what it is", "needs", "installed"]
    emit(tabulate(rows, headers=headers, tablefmt="grid", disable_numparse=True, maxcolwidths=[None, None, 44, 36, None]))
    return 0


def installed(distribution: str) -> str:
    """The version of an installed distribution, or an empty string."""
    try:
        return metadata.version(distribution) if distribution else ""
    except metadata.PackageNotFoundError:
        return ""


def signatures() -> str:
    """The functions of a user's file as Python stubs, every parameter explained once."""
    from m3check.kernels.calls import FAMILIES
    from m3check.types import OPS

    lines = ["# Functions named like the ops, called with these keywords; those marked ~ need not be taken.", ""]
    for family in FAMILIES.values():
        for op, (parameters, returns) in family.signatures.items():
            lines += [
                f"# {OPS[op].summary}",
                *textwrap.wrap(f"def {op}(*, {', '.join(parameters)}):", 100, subsequent_indent=" " * 8),
            ]
            lines += [f'    """Returns {returns}."""', ""]
        lines.append(f"# {family.letters}")
        width = max(len(name) for name in family.parameters)
        lines += [
            f"# {'~' if name in family.optional else ' '} {name:<{width}}  {text}"
            for name, text in family.parameters.items()
        ]
        lines.append("")
    return "\n".join(lines[:-1])
