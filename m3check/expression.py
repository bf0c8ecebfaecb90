"""`-k EXPR`: words joined by and, or, not and parentheses, as pytest has them; a word matches any text that contains it."""

from __future__ import annotations

import re
from collections.abc import Callable

from m3check.types import M3CheckError

_TOKEN = re.compile(r"\s*(?:(?P<mark>[()])|(?P<word>[\w.=,/~+:\[\]-]+))")

Matcher = Callable[[str], bool]


def matcher(expr: str) -> Matcher:
    """A function that says whether a text matches `expr`; an empty one matches everything.

    Letter case is ignored. Raises M3CheckError that says what is wrong and where.
    """
    if not expr.strip():
        return lambda _text: True
    found = _Parser(expr).parse()
    return lambda text: found(text.lower())


class _Parser:
    """Recursive descent over `or`, `and`, `not`, in this order of binding."""

    def __init__(self, expr: str) -> None:
        self.expr = expr
        self.tokens = list(self._split(expr))
        self.next = 0

    def _split(self, expr: str) -> list[tuple[str, int]]:
        tokens, at = [], 0
        expr = expr.rstrip()
        while at < len(expr):
            found = _TOKEN.match(expr, at)
            if not found:
                column = len(expr) - len(expr[at:].lstrip()) + 1
                raise self._error(f"{expr[column - 1]!r} cannot be part of a word", column)
            kind = found.lastgroup or "word"
            tokens.append((found[kind], found.start(kind) + 1))
            at = found.end()
        return tokens

    def _error(self, what: str, column: int) -> M3CheckError:
        return M3CheckError(
            f"-k {self.expr!r}: {what} (column {column}); write words joined by and, or, not: -k 'gauss and not ties'"
        )

    def _peek(self) -> str:
        return self.tokens[self.next][0] if self.next < len(self.tokens) else ""

    def _take(self) -> str:
        token = self._peek()
        self.next += 1
        return token

    def parse(self) -> Matcher:
        found = self._either()
        if self._peek():
            word, column = self.tokens[self.next]
            raise self._error(f"{word!r} is not joined to what stands before it", column)
        return found

    def _either(self) -> Matcher:
        left = self._both()
        while self._peek() == "or":
            self._take()
            left = _either(left, self._both())
        return left

    def _both(self) -> Matcher:
        left = self._one()
        while self._peek() == "and":
            self._take()
            left = _both(left, self._one())
        return left

    def _one(self) -> Matcher:
        column = self.tokens[self.next][1] if self.next < len(self.tokens) else len(self.expr) + 1
        token = self._take()
        if token == "not":
            inner = self._one()
            return lambda text: not inner(text)
        if token == "(":
            inside = self._either()
            if self._take() != ")":
                raise self._error("a parenthesis is not closed", len(self.expr) + 1)
            return inside
        if token in ("", ")", "and", "or"):
            raise self._error(f"a word is missing before {token!r}" if token else "a word is missing at the end", column)
        word = token.lower()
        return lambda text: word in text


def _either(left: Matcher, right: Matcher) -> Matcher:
    return lambda text: left(text) or right(text)


def _both(left: Matcher, right: Matcher) -> Matcher:
    return lambda text: left(text) and right(text)
