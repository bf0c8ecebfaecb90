"""A case <-> its one-line id, which anyone can read, type and paste back without quoting.

`sparse_attn/q=5+1,kv=1025+129,h=2,topk=8,cache=fp8_e4m3fn,scale=token,fill=wide~3` is op, then word=value pairs, then the
seed. Defaults are left out, the order is fixed, and a value repeated in neighbouring requests is written once (`129x64`).
The generator is keyed by this text, so a default that changed would change inputs: they are frozen
(tests/test_cases_ident.py).
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from m3check.types import DTYPES, OPS, Case, M3CheckError

WORDS: Mapping[str, str] = {  # the word in an id: the field of Case, in the order of ids
    "q": "query_lens",
    "kv": "kv_lens",
    "h": "kv_heads",
    "g": "gqa",
    "d": "head_dim",
    "topk": "topk",
    "init": "init_blocks",
    "local": "local_blocks",
    "dtype": "dtype",
    "cache": "cache_dtype",
    "icache": "index_cache_dtype",
    "scale": "scales",
    "layout": "layout",
    "ids": "ids",
    "mq": "max_query_len",
    "layer": "layer",
    "queries": "queries",
    "rotary": "rotary_dim",
    "ih": "index_heads",
    "eps": "eps",
    "fill": "fill",
}

DEFAULTS: Mapping[str, Any] = {f.name: f.default for f in dataclasses.fields(Case) if f.default is not dataclasses.MISSING}

_LENGTHS = ("query_lens", "kv_lens")
_LENGTH = re.compile(r"([0-9]+)(?:x([0-9]+))?")
MOST_REQUESTS = 65_536
"""More requests than any kernel's grid can hold; it keeps a mistyped repetition from filling the memory."""


def case_id(case: Case) -> str:
    """The id of a case; equal cases have equal ids and `parse_id` gives the case back."""
    parts = []
    for word, field in WORDS.items():
        value = getattr(case, field)
        if field in _LENGTHS:
            parts.append(f"{word}={_write_lengths(value)}")
        elif value != DEFAULTS[field]:
            parts.append(f"{word}={value}")
    seed = f"~{case.seed}" if case.seed else ""
    return f"{case.op}/{','.join(parts)}{seed}"


def parse_id(text: str) -> Case:
    """The case that an id names; words may come in any order and defaults may be written out.

    Raises M3CheckError with the part that is wrong, what was got and what is known; a case that makes no sense as a whole
    is refused by `validate` likewise.
    """
    from m3check.cases.validity import validate

    text = text.strip()
    op, slash, rest = text.partition("/")
    if op not in OPS:
        raise M3CheckError(f"case {text!r}: unknown op {op!r}{meant(op, OPS)}; known ops: {', '.join(OPS)}")
    if not slash:
        raise M3CheckError(f"case {text!r}: expected a '/' after the op, as in {op}/q=5,kv=1025")
    rest, tilde, seed = rest.partition("~")
    values: dict[str, Any] = {"op": op}
    if tilde:
        values["seed"] = _number(text, "the seed after '~'", seed)
    for part in rest.split(","):
        word, equals, value = part.partition("=")
        if word not in WORDS or not equals:
            known = f"{meant(word, WORDS)}; known: {', '.join(WORDS)}"
            raise M3CheckError(f"case {text!r}: {part!r} is not word=value with a known word{known}")
        field = WORDS[word]
        if field in values:
            raise M3CheckError(f"case {text!r}: {word} is given twice")
        if field in _LENGTHS:
            values[field] = _read_lengths(text, word, value)
        elif isinstance(DEFAULTS[field], int):
            values[field] = _number(text, word, value)
        else:
            values[field] = _known_word(text, word, value)
    for word in ("q", "kv"):
        if WORDS[word] not in values:
            raise M3CheckError(
                f"case {text!r}: {word}=… is missing; every id needs q=<query lengths> and kv=<visible lengths>"
            )
    case = Case(**values)
    validate(case)
    return case


def _known_word(text: str, word: str, value: str) -> str:
    from m3check.cases.validity import KNOWN

    known = tuple(DTYPES) if word in ("dtype", "cache", "icache") else KNOWN[WORDS[word]]()
    if value not in known:
        raise M3CheckError(f"case {text!r}: unknown {word} {value!r}; known: {', '.join(known)}")
    return value


def meant(word: str, known: Iterable[str]) -> str:
    """A clause with the known word that is nearest, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _number(text: str, what: str, value: str) -> int:
    if not (value.isascii() and value.isdigit()) or len(value) > 18:
        raise M3CheckError(f"case {text!r}: {what} must be a whole number, got {value!r}")
    return int(value)


def _write_lengths(lengths: tuple[int, ...]) -> str:
    parts: list[str] = []
    start = 0
    for i in range(1, len(lengths) + 1):
        if i == len(lengths) or lengths[i] != lengths[start]:
            parts.append(f"{lengths[start]}x{i - start}" if i - start > 1 else str(lengths[start]))
            start = i
    return "+".join(parts)


def _read_lengths(text: str, word: str, value: str) -> tuple[int, ...]:
    lengths: list[int] = []
    for part in value.split("+"):
        match = _LENGTH.fullmatch(part) if part.isascii() and len(part) <= 24 else None
        count = int(match[2] or 1) if match else 0
        if match is None or count < 1:
            raise M3CheckError(
                f"case {text!r}: {word} must be lengths joined by '+', a repeated one written as 129x64; got {part!r}"
            )
        if len(lengths) + count > MOST_REQUESTS:
            raise M3CheckError(f"case {text!r}: {word} has more than {MOST_REQUESTS} requests")
        lengths += [int(match[1])] * count
    return tuple(lengths)
