"""What one failure is called, so that different ones are told apart and a smaller case counts only for its own."""

from __future__ import annotations

import re

from m3check.report.tally import red_word
from m3check.types import STRICTLY_RED, Result, Status

NEAR = frozenset({"row", "token", "scale"})
"""Checks that see the same error as `element`, on other sums of it: which of them is red first depends on the case."""

_RAISED = re.compile(r"raised (\w+)")
_PLACE = re.compile(r" at (\S+:\d+)$")


def kind(result: Result, strict: bool = False) -> str:
    """A failure's name: its first red check, or how it ended; empty where the result is not red."""
    word = red_word(result, strict)
    if not word:
        return ""
    for finding in result.findings:
        if finding.status is Status.FAILED:
            return "element" if finding.check in NEAR else finding.check
    if word == Status.ERROR:
        parts = [match[1] for pattern in (_RAISED, _PLACE) if (match := pattern.search(result.reason))]
        return " ".join([word, *parts])
    doubtful = [finding.check for finding in result.findings if finding.status in STRICTLY_RED]
    return " ".join([word, *doubtful[:1]])


def size(result: Result) -> tuple[object, ...]:
    """What a small failing case has little of, the weightiest first."""
    axes = result.axes
    heads = axes["kv_heads"] * axes["gqa"]
    words = len(result.case.split(","))  # one for each value that is not the default
    blocks = axes["context"] // 128
    return axes["batch"], blocks, axes["query_len"], axes["topk"], heads, words, axes["context"], result.case
