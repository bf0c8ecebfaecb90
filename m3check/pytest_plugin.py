"""What m3check adds to pytest's reports of a kernel author's own tests, which `@m3check.cases(...)` makes.

Nothing of m3check is imported here, so that a test session without it pays nothing.
"""

from __future__ import annotations

import sys

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Give a test that met a Mismatch the properties `m3check_case`, `m3check_checks` and `m3check_repro` (junit.xml)."""
    types = sys.modules.get("m3check.types")
    if types is None or call.excinfo is None or not isinstance(call.excinfo.value, types.Mismatch):
        return
    result = call.excinfo.value.result
    red = [finding.check for finding in result.findings if finding.status == "failed"]
    item.user_properties += [
        ("m3check_case", result.case),
        ("m3check_checks", " ".join(red) or str(result.status)),
        ("m3check_repro", result.repro or item.nodeid),
    ]
