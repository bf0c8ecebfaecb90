"""Reading a ledger file (see ledger.py): what is wrong with it is told with file, entry and how to mend it."""

from __future__ import annotations

import datetime
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from m3check.config import EVIDENCE, choose
from m3check.expression import matcher
from m3check.ledger import SELECTORS, Entry, Ledger
from m3check.types import OPS, RED, STRICTLY_RED, M3CheckError, Status

KEYS = (*SELECTORS, "arch", "provider", "evidence", "status", "check", "reason", "issue", "expires")


def read(path: Path | str) -> Ledger:
    """The ledger in a file. Raises M3CheckError that names file and entry, and says how to mend it."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        data = tomllib.loads(text)
    except OSError as error:
        raise M3CheckError(f"the ledger {path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # also UnicodeDecodeError
        raise M3CheckError(f"the ledger {path} is not TOML: {error}") from None
    for key in data:
        if key != "known":
            raise M3CheckError(f"the ledger {path}: unknown key {key!r}; it holds [[known]] entries only")
    tables = data.get("known", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise M3CheckError(f"the ledger {path}: known is not a list of tables; write [[known]] over each entry")
    lines = [n for n, line in enumerate(text.splitlines(), 1) if re.match(r"\s*\[\[\s*known\s*\]\]", line)]
    if len(lines) != len(tables):
        lines = [0] * len(tables)
    entries = tuple(
        _entry(table, f"{path}, entry {n}", line) for n, (table, line) in enumerate(zip(tables, lines, strict=True), 1)
    )
    return Ledger(str(path), entries)


def _entry(table: Mapping[str, Any], place: str, line: int) -> Entry:
    try:
        return _checked(table, place, line)
    except M3CheckError as error:
        raise M3CheckError(f"the ledger {place}: {error}") from None


def _checked(table: Mapping[str, Any], place: str, line: int) -> Entry:
    from m3check.arch import ARCHS
    from m3check.cases import case_id, parse_id
    from m3check.kernels import parse_spec

    for key in table:
        choose("key", key, KEYS)
    if not any(key in table for key in SELECTORS):
        raise M3CheckError('it selects nothing; add case = "ID", op = "OP" or select = "EXPRESSION"')
    lacking = [key for key in ("reason", "issue", "expires") if table.get(key) in (None, "")]
    if lacking:
        example = {"reason": '"what is wrong"', "issue": '"https://…"', "expires": "2027-01-31"}[lacking[0]]
        raise M3CheckError(f"{' and '.join(lacking)} missing; add {lacking[0]} = {example}")
    words = {key: _text(table, key) for key in (*SELECTORS, "reason", "issue") if key in table}
    lists = {key: _texts(table, key) for key in ("arch", "provider", "evidence", "status", "check") if key in table}
    if "op" in words:
        choose("op", words["op"], OPS)
    if "case" in words:
        words["case"] = case_id(parse_id(words["case"]))  # words in any order mean the same case
    matcher(words.get("select", ""))
    for arch in lists.get("arch", ()):
        choose("arch", arch, ARCHS)
    for provider in lists.get("provider", ()):
        parse_spec(provider)
    for evidence in lists.get("evidence", ()):
        choose("evidence", evidence, EVIDENCE)
    for status in lists.get("status", ()):
        choose("status", status, [s.value for s in Status if s in RED | STRICTLY_RED])
    address = urlsplit(words["issue"])
    if address.scheme not in ("http", "https") or not address.netloc or re.search(r"\s", words["issue"]):
        raise M3CheckError(f"issue = {words['issue']!r} is no address; wanted https://…")
    return Entry(place=place, line=line, expires=_date(table["expires"]), **cast(Any, {**words, **lists}))


def _text(table: Mapping[str, Any], key: str) -> str:
    value = table[key]
    if not isinstance(value, str) or not value.strip():
        raise M3CheckError(f'{key} = {value!r} is not a text; wanted {key} = "…"')
    return value.strip()


def _texts(table: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = table[key]
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(each, str) and each for each in values):
        raise M3CheckError(f'{key} = {value!r} is neither a text nor a list of texts; wanted {key} = "…" or ["…", "…"]')
    return tuple(values)


def _date(value: object) -> datetime.date:
    if isinstance(value, datetime.datetime):
        return value.date()
    if isinstance(value, datetime.date):
        return value
    try:
        return datetime.date.fromisoformat(str(value))
    except ValueError:
        raise M3CheckError(f"expires = {value!r} is no date; wanted expires = 2027-01-31 (year-month-day)") from None
