"""Rendered reports compared exactly. After a wanted change: python tests/test_report_golden.py, then read the diff."""

from __future__ import annotations

from pathlib import Path

import pytest
from records import GOLDEN

from m3check import report
from m3check.report import jsonfile

FOLDER = Path(__file__).parent / "golden"
ENDINGS = {"md": "md", "junit": "xml", "json": "json"}


@pytest.mark.parametrize("format", ENDINGS)
@pytest.mark.parametrize("name", GOLDEN)
def test_a_report_is_as_it_was_read_and_approved(name: str, format: str) -> None:
    expected = (FOLDER / f"{name}.{ENDINGS[format]}").read_text(encoding="utf-8")

    assert report.render([GOLDEN[name]()], format) == expected


@pytest.mark.parametrize("name", GOLDEN)
def test_a_record_that_was_read_back_renders_the_same(name: str) -> None:
    read = jsonfile.read(FOLDER / f"{name}.json")

    assert report.render([read], "md") == (FOLDER / f"{name}.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    for name, make in GOLDEN.items():
        for format, ending in ENDINGS.items():
            (FOLDER / f"{name}.{ending}").write_text(report.render([make()], format), encoding="utf-8")
