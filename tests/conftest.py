"""Shared by all tests: a device marker that explains itself, and Triton's interpreter switched on in time."""

from __future__ import annotations

import os

import pytest

from m3check.arch import present

if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core already: threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

DEVICES = present()
if not DEVICES:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine cannot do, each with a sentence; slow and network tests run only when named by -m."""
    asked = config.getoption("markexpr") or ""
    for item in items:
        if "gpu" in item.keywords and not DEVICES:
            item.add_marker(pytest.mark.skip(reason="needs a GPU; this machine has none"))
        for marker, why in (("slow", "takes minutes"), ("network", "fetches from the package index")):
            if marker in item.keywords and marker not in asked:
                item.add_marker(pytest.mark.skip(reason=f"{why}; run it with -m {marker}"))
