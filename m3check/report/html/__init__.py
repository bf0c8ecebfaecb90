"""report.html: records as one page to look around in. It loads nothing from anywhere, and escapes what came from outside.

The page is `page.html` with `style.css`, the scripts and the records' data put in. The data stands in a script element that
is never run; scripts set text, never markup; and a content security policy lets no other script or request happen.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from string import Template
from typing import Any

from m3check.report.html.data import data
from m3check.report.matrix import columns, ordered
from m3check.report.tables import clean
from m3check.report.tally import verdict
from m3check.types import Record

SCRIPTS = tuple(f"{name}.js" for name in (
    "model", "elements", "distribution", "places", "top", "filters", "kernels", "results", "more", "page",
))  # fmt: skip
"""One script in the page: a later one uses what earlier ones name."""


def render(records: Sequence[Record]) -> str:
    """One record, or several of any targets, as the text of an HTML file."""
    records = ordered(records)
    names = columns(records)
    script, style = "\n".join(map(_asset, SCRIPTS)), _asset("style.css")
    verdicts = [f"{name}: {verdict(record)}" for name, record in zip(names, records, strict=True)]
    allowed = f"script-src {_hash(script)}; style-src {_hash(style)}"
    words = {
        "title": html.escape(clean(f"m3check {', '.join(verdicts)}")),
        "exits": html.escape(clean(" ".join(f"Exit {record.exit.code}: {record.exit.reason}." for record in records))),
        "policy": f"default-src 'none'; base-uri 'none'; form-action 'none'; {allowed}",
        "style": style,
        "script": script,
        "data": _embedded(data(records, names)),
    }
    return Template(_asset("page.html")).substitute(words)


def _embedded(value: Any) -> str:
    """JSON inside a script element: without `<` nothing can end the element or open a comment in it."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _asset(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8").strip()
