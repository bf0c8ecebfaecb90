"""What a run says while it goes on: one rewritten line on a terminal, elsewhere a line for each 5 %; red at once."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from typing import TextIO

from m3check.config import Event
from m3check.types import Result

STEPS = 20
SILENCE = 60.0
"""Seconds after which a line comes although there is no further step, as in a search, whose end nobody knows."""

REDRAW = 0.1
"""Seconds between two redraws: fast enough to look alive, slow enough to cost nothing."""


class Progress:
    """Call it with each Event; `results` holds what came, whatever becomes of the run."""

    def __init__(self, stream: TextIO, strict: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.results: list[Result] = []
        self._stream, self._strict, self._clock = stream, strict, clock
        self._terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._colour = self._terminal and not os.environ.get("NO_COLOR")
        self._started = self._drawn = clock()
        self._first_done: int | None = None
        self._step = 0
        self._red = 0

    def __call__(self, event: Event) -> None:
        """Take one event in and tell what it is worth."""
        if event.message:
            self._line(event.message)
        if event.result is not None:
            self._take(event.result)
        if self._first_done is None:
            self._first_done = max(0, event.done - (event.result is not None))
        if self._terminal:
            self._redraw(event)
        elif event.result is not None or event.running:
            step = event.done * STEPS // event.total if event.total else 0
            if step > self._step or self._clock() - self._drawn >= SILENCE:
                self._step, self._drawn = step, self._clock()
                done = f"{event.done} of {event.total} done" if event.total else f"{event.done} tried"
                self._line(f"{done}, {self._red} red")

    def close(self) -> None:
        """Leave the terminal's last line empty."""
        if self._terminal and self._first_done is not None:
            self._write("\r\x1b[2K")

    def _take(self, result: Result) -> None:
        from m3check.report.markdown import sentence, telling
        from m3check.report.tables import clean
        from m3check.report.tally import red_word

        self.results.append(result)
        word = red_word(result, self._strict)
        if not word:
            return
        self._red += 1
        told = telling(result, self._strict)
        what = " ".join(clean(sentence(told[0]) if told else result.reason).split())
        self._line(f"{self._paint(word.upper())} {result.case} [{result.provider}] {what}\n  {result.repro}")

    def _redraw(self, event: Event) -> None:
        now = self._clock()
        if now - self._drawn < REDRAW and event.done != event.total:
            return
        self._drawn = now
        current = event.running or (event.result.case if event.result else "")
        eta = self._eta(event, now)
        done = f"{event.done}/{event.total}" if event.total else f"{event.done} tried"
        text = f"{done} · {self._red} red{eta} · {current}"
        self._write(f"\r\x1b[2K{text[: shutil.get_terminal_size().columns - 1]}")

    def _eta(self, event: Event, now: float) -> str:
        done = event.done - (self._first_done or 0)  # a resumed run's earlier results took no time now
        if done <= 0 or not event.total:
            return ""
        left = int((now - self._started) / done * (event.total - event.done))
        return f" · {left // 60}:{left % 60:02d} left"

    def _paint(self, word: str) -> str:
        return f"\x1b[31m{word}\x1b[0m" if self._colour else word

    def _line(self, text: str) -> None:
        self._write(("\r\x1b[2K" if self._terminal else "") + text + "\n")

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            pass  # a closed stderr never breaks a run
