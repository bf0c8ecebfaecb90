"""report.json: records written, read and described by a schema.

JSON has no numbers for NaN and the infinities, so `measured` and `limit` hold the strings "nan", "inf" and "-inf" there;
the reader turns them back. To keep thousands of results under four megabytes, figures have six significant digits; axes
that few cases move stand only where they are moved; a finding that passed goes without its place (but names a compiled
variant), without an empty hint, and without figures where an exact check measured 0. Every other finding has all of its
fields. Keys that a reader does not know are ignored, so a later minor version may add some.
"""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from m3check.types import DTYPES, Case, M3CheckError, Record, Result, Status

SCHEMA_VERSION = "1.0"

NAME = "report.json"
NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
DIGITS = 6


def dumps(record: Record) -> str:
    """A record as JSON text, one result a line, so that `grep` and `diff` work on it."""
    lines = [
        f"{json.dumps(name)}: {_compact(_plain(value))}" for name, value in _fields(record).items() if name != "results"
    ]
    body = ",\n".join(_compact(_plain(_lean(result))) for result in record.results)
    lines.append('"results": [' + (f"\n{body}\n" if body else "") + "]")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def loads(text: str | bytes, origin: str = "the record") -> Record:
    """The record in `text`. Raises M3CheckError in a sentence where it is none, or of a version that cannot be read."""
    import msgspec

    try:
        data = json.loads(text)
    except ValueError as error:
        raise M3CheckError(f"{origin} is not a record: no valid JSON ({error})") from None
    if not isinstance(data, dict) or "schema_version" not in data:
        raise M3CheckError(f"{origin} is not a record: it has no schema_version")
    version = str(data["schema_version"])
    if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise M3CheckError(f"{origin} has schema {version}; this m3check reads {SCHEMA_VERSION.split('.')[0]}.x")
    try:
        return msgspec.convert(_revived(data), Record)
    except msgspec.ValidationError as error:
        raise M3CheckError(f"{origin} is not a record of schema {version}: {error}") from None


def read(path: Path | str) -> Record:
    """The record in a file, or in the report.json of a folder."""
    path = Path(path)
    if path.is_dir():
        path /= NAME
    try:
        text = path.read_bytes()
    except OSError as error:
        raise M3CheckError(f"{path} cannot be read: {error.strerror}") from None
    return loads(text, str(path))


def dump_result(result: Result) -> str:
    """One result as one line of a journal, without the line's end."""
    return _compact(_plain(result))


def load_result(line: str | bytes) -> Result:
    """A result from a journal's line; raises ValueError where the line was cut off, as the last one of a killed run is."""
    import msgspec

    data = json.loads(line)
    if not isinstance(data, dict):
        raise ValueError(f"not a result: {line!r}")
    return msgspec.convert(_revive(data), Result)


def schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of report.json."""
    import msgspec

    made: dict[str, Any] = msgspec.json.schema(Record)
    parts = made["$defs"]
    number = {"anyOf": [{"type": "number"}, {"type": "null"}, {"enum": sorted(NONFINITE)}], "default": None}
    for field in ("measured", "limit"):
        parts["Finding"]["properties"][field] = dict(number)
    parts["Result"]["properties"]["axes"] = {"type": "object", "properties": dict(_AXES)}
    for part, words in _WORDS.items():
        for field, text in words.items():
            parts[part]["properties"][field]["description"] = text
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"m3check record {SCHEMA_VERSION}", **made}


_USUAL = {
    field.name: field.default
    for field in fields(Case)
    if field.name in {"dtype", "index_cache_dtype", "scales", "layout", "ids", "seed"}
}
_MOVED = object()

_COUNT = {"type": "integer", "minimum": 0}
_DTYPE = {"enum": list(DTYPES)}
_AXES: dict[str, Any] = {
    "batch": _COUNT,
    "context": _COUNT,
    "query_len": _COUNT,
    "topk": _COUNT,
    "gqa": _COUNT,
    "kv_heads": _COUNT,
    "head_dim": _COUNT,
    "dtype": {**_DTYPE, "default": "bf16"},
    "cache_dtype": _DTYPE,
    "index_cache_dtype": {**_DTYPE, "default": "bf16"},
    "init_blocks": _COUNT,
    "local_blocks": _COUNT,
    "fill": {"type": "string"},
    "scales": {"enum": ["none", "scalar", "token"], "default": "none"},
    "layout": {"type": "string", "default": "hnd"},
    "ids": {"type": "string", "default": "full"},
    "max_query_len": {**_COUNT, "description": "left out where it is query_len"},
    "seed": {**_COUNT, "default": 0},
}

_WORDS = {
    "Record": {
        "schema_version": "major.minor; a reader of the same major ignores keys that it does not know",
        "tool": "name and version of what wrote this",
        "arch": "the target that was asked for, e.g. sm100",
        "environment": "where it ran: `machine` and `date` (ISO 8601, UTC) in words, and the versions that were used; "
        "`power`: named defects as [stage, words, cases that would refuse it, cases whose right answer it changes]; "
        "`gate`: ledger, number of known failures, floors, breaches {sentence, file, line}, and what waits for a merge; "
        "`merged`: the commands of a merge's parts",
        "command": "the command line that makes this record again",
        "exit": "the exit code and the sentence that explains it",
        "summary": "{status: count}",
        "results": "one case on one kernel by one kind of evidence each",
    },
    "Result": {
        "case": "id of the case: one line that can be pasted behind --case",
        "op": "the operation",
        "provider": "who made the kernel, with the version",
        "kernel": "the implementation's own name",
        "evidence": "device: ran on that arch; interpreted: on a CPU; compiled: cross-compiled, nothing computed",
        "axes": "the case in figures; what has a default is left out where it has that value",
        "status": "what became of it",
        "reason": "a sentence where it was skipped, raised, crashed or took too long",
        "findings": "the judgements of the checks",
        "seconds": "wall clock of the case, compilation included",
        "repro": "the command that reruns exactly this case on this kernel",
        "sums": "how it added up products, on a device; left out elsewhere, and for chains",
        "heat": "where a comparison that failed was wrong; left out of every other result",
    },
    "Heat": {
        "output": "score, ids or out: the first that has a cell beyond its limit",
        "maps": "all rows, and the worst one in detail",
    },
    "HeatMap": {
        "rows": "what a line is: `request, token`, or a kind of head",
        "columns": "what a character is: a kind of head, block or channel",
        "labels": "of each line; of its first row where it stands for several",
        "cells": "· within the limit, 1 … 9 one to nine doublings beyond it, # more, N not finite or a wrong list; "
        "of a selection's blocks = chosen rightly, - left out, + taken instead, ± both, ² listed twice",
        "step": "columns in one character, which shows the worst of them",
        "count": "rows in one line, likewise",
        "of": "request and token, where only one row is shown",
    },
    "Sums": {
        "by": "the least precise of the matrix instructions that ran, with its fraction bits; or fp32",
        "bits": "-log2 of the largest |score - s| / Σ|q·k|; left out where no scores tell",
    },
    "Finding": {
        "check": "which check",
        "status": "its judgement; noted: breaks the contract where the provider promises nothing",
        "measured": 'what was found, in the unit of `limit`; "nan", "inf" and "-inf" where it is no number',
        "limit": "the largest that correct arithmetic can explain; 0, null or left out where the check is exact",
        "where": "the place, in tokens, heads and blocks, of compiled results the variant; left out where what ran passed",
        "hint": "what the mistake looks like",
    },
}


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    """The same tree with every float in JSON's reach."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
        short = float(f"{value:.{DIGITS}g}")
        return int(short) if short == 0 else short
    if is_dataclass(value):
        value = _fields(value)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value


def _fields(value: Any) -> dict[str, Any]:
    # Not vars(): msgspec leaves a default that the text did not have on the class.
    return {field.name: getattr(value, field.name) for field in fields(value)}


def _lean(result: Result) -> dict[str, Any]:
    """A result whose passed findings say only what reports read of them."""
    findings = []
    for finding in result.findings:
        told = _fields(finding)
        if finding.status is Status.PASSED:
            if result.evidence != "compiled":  # there it names the variant
                del told["where"]
            if not finding.hint:
                del told["hint"]
            if not finding.measured and not finding.limit:
                del told["measured"], told["limit"]
        findings.append(told)
    axes = {name: value for name, value in result.axes.items() if value != _usual(result.axes).get(name, _MOVED)}
    told = {**_fields(result), "axes": axes, "findings": findings}
    del told["sums"], told["heat"]
    if result.sums is not None:
        told["sums"] = {name: value for name, value in _fields(result.sums).items() if value is not None}
    if result.heat is not None:
        told["heat"] = result.heat
    return told


def _usual(axes: dict[str, Any]) -> dict[str, Any]:
    """The values of axes that are left out of the text."""
    return {**_USUAL, "max_query_len": axes["query_len"]} if "query_len" in axes else {}


def _revived(data: dict[str, Any]) -> dict[str, Any]:
    results = data.get("results")
    if isinstance(results, list):
        data["results"] = [_revive(r) if isinstance(r, dict) else r for r in results]
    return data


def _revive(result: dict[str, Any]) -> dict[str, Any]:
    if isinstance(axes := result.get("axes"), dict):
        result["axes"] = {**axes, **{name: value for name, value in _usual(axes).items() if name not in axes}}
    findings = result.get("findings")
    for finding in findings if isinstance(findings, list) else ():
        for field in ("measured", "limit"):
            if isinstance(finding, dict) and isinstance(finding.get(field), str):
                finding[field] = NONFINITE.get(finding[field], finding[field])
    return result
