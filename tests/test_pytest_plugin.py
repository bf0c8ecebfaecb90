"""A kernel author's own tests: `@m3check.cases`, `verify(...).check()`, and what pytest, xdist and junit make of them."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
import tomllib
import unittest
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import m3check
from m3check import cases, cli
from m3check.types import Finding, M3CheckError, Mismatch, Result, Status

pytest_plugins = ["pytester"]

EXAMPLE = Path(__file__).parents[1] / "examples" / "test_my_kernel.py"
REGISTERED = any(point.name == "m3check" for point in importlib.metadata.entry_points(group="pytest11"))
PLUGIN = ("-p", "no:hypothesispytest", *(() if REGISTERED else ("-p", "m3check.pytest_plugin")))

KERNEL = '''
import torch

import m3check

PROFILE = m3check.Profile(odd_scores=frozenset())

def index_topk(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks):
    """A selection that is right for one request of which nothing is forced but its own block; WRONG leaves it out."""
    ids = torch.full((*score.shape[:2], topk), -1, dtype=torch.int32)
    for t in range(score.shape[1]):
        visible = (int(prefix_lens[0]) + t) // 128 + 1
        ranked = score[:, t, :visible].clone()
        ranked[:, visible - 1] = -torch.inf if WRONG else torch.inf
        ids[:, t, : min(topk, visible)] = ranked.topk(min(topk, visible)).indices.int()
    return ids
'''
TEST = """
import pytest

import m3check
import mine

@pytest.mark.parametrize("case", ["index_topk/q=3,kv=700,h=2,topk=3", "index_topk/q=2,kv=300,h=1,topk=2~7"])
def test_mine(case):
    m3check.verify(case, mine.index_topk, mine.PROFILE, invariants=False).check()
"""
LISTED = """
import m3check

@m3check.cases(op=OPS, tier="smoke")
def test_listed(case):
    assert case.op in OPS
"""


@pytest.fixture(scope="module", autouse=True)
def loaded():
    """What a session imports first is gone after it, and torch can be imported but once: so here, before any session."""
    mine: dict[str, Any] = {}
    exec(KERNEL.replace("WRONG", "False"), mine)
    found = m3check.verify("index_topk/q=2,kv=300,h=1,topk=2", mine["index_topk"], mine["PROFILE"], invariants=False)
    assert found.status is Status.PASSED, found


def session(pytester: pytest.Pytester, *words: str, wrong: bool = False) -> pytest.RunResult:
    pytester.syspathinsert()
    pytester.makepyfile(mine=KERNEL.replace("WRONG", str(wrong)), test_mine=TEST)
    return pytester.runpytest_inprocess(*PLUGIN, *words)


def listed(pytester: pytest.Pytester, ops: str, *words: str) -> pytest.RunResult:
    pytester.makepyfile(test_listed=LISTED.replace("OPS", repr(ops)))
    return pytester.runpytest_inprocess(*PLUGIN, *words)


def test_a_right_kernel_passes(pytester):
    session(pytester).assert_outcomes(passed=2)


def test_a_wrong_one_fails_with_the_finding_and_the_line_that_shows_it_again(pytester):
    done = session(pytester, "--junitxml=out.xml", wrong=True)

    done.assert_outcomes(failed=2)
    done.stdout.fnmatch_lines(
        [
            "*verify(case, mine.index_topk*",
            "E *Mismatch: failed index_topk/q=3,kv=700,h=2,topk=3 *",
            "E *forced: * > 0 at request 0, query 0*",
            "E *m3check run --arch * --kernels ./mine.py --case index_topk/q=3,kv=700,h=2,topk=3",
        ]
    )
    assert "result.py" not in done.stdout.str(), "a traceback ends in the author's own test"
    tests = ElementTree.parse(pytester.path / "out.xml").iter("testcase")
    properties = [{each.get("name"): each.get("value") for each in test.iter("property")} for test in tests]
    assert [found["m3check_case"] for found in properties] == [
        "index_topk/q=3,kv=700,h=2,topk=3",
        "index_topk/q=2,kv=300,h=1,topk=2~7",
    ]
    assert "forced" in properties[0]["m3check_checks"].split()
    assert properties[0]["m3check_repro"].endswith("--case index_topk/q=3,kv=700,h=2,topk=3")


def test_each_case_is_a_test_named_by_its_id_which_k_selects(pytester):
    chosen = m3check.cases(op="index_topk", tier="smoke")
    done = listed(pytester, "index_topk", "--collect-only", "-q")
    names = [line for line in done.outlines if line.startswith("test_listed.py::")]
    assert names == [f"test_listed.py::test_listed[{cases.case_id(case)}]" for case in chosen]

    ties = [case for case in chosen if case.fill == "ties"]
    assert 0 < len(ties) < len(chosen)
    listed(pytester, "index_topk", "-k", "ties").assert_outcomes(passed=len(ties), deselected=len(chosen) - len(ties))


def test_workers_of_xdist_share_the_cases(pytester, monkeypatch):
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
        monkeypatch.delenv(name, raising=False)
    count = len(m3check.cases(op="index_topk", tier="smoke"))
    listed(pytester, "index_topk", "-n", "2").assert_outcomes(passed=count)


def test_a_wrong_name_is_a_sentence(pytester):
    done = listed(pytester, "topk")
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(["*@m3check.cases(op='topk'*", "E *unknown op 'topk'; known ops: index_score, *"])
    with pytest.raises(M3CheckError, match="a test of nothing would be green"):
        m3check.cases(op="index_decode", tier="production")(test_a_wrong_name_is_a_sentence)


def test_the_example_passes(pytester):
    pytester.makepyfile(test_example=EXAMPLE.read_text())
    pytester.syspathinsert(EXAMPLE.parent)
    pytester.runpytest_inprocess(*PLUGIN, "-k", "two_keys").assert_outcomes(passed=1)
    assert len([line for line in EXAMPLE.read_text().splitlines() if line]) <= 10


def test_pytest_finds_the_plugin_where_m3check_is_installed():
    declared = tomllib.loads((EXAMPLE.parents[1] / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    assert {name: importlib.import_module(module).__name__ for name, module in declared.items()} == {
        "m3check": "m3check.pytest_plugin"
    }


def test_a_session_without_m3check_imports_nothing_of_it():
    code = "import sys, m3check.pytest_plugin; print(sorted(m for m in sys.modules if m[:7] in ('m3check', 'torch')))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "['m3check', 'm3check.pytest_plugin']"


# check() ---


def result(status: Status, *found: Finding, reason: str = "") -> Result:
    case = cases.parse_id("index_topk/q=1,kv=9")
    return Result("index_topk/q=1,kv=9", case.op, "user", "f", "interpreted", case.axes(), status, reason, found)


def test_what_ran_not_is_skipped_and_doubts_are_red_where_asked_for():
    result(Status.PASSED).check()
    result(Status.MISTRUSTED, reason="it would have agreed anyway").check()
    with pytest.raises(Mismatch, match="it would have agreed anyway") as told:
        result(Status.MISTRUSTED, reason="it would have agreed anyway").check(strict=True)
    assert told.value.result.status is Status.MISTRUSTED
    noted = result(Status.PASSED, Finding("dead_row", Status.NOTED, 3.0, 0.0, "request 1", "NaN in a padded row"))
    noted.check()
    with pytest.raises(Mismatch, match=r"dead_row: 3 > 0 at request 1 \(NaN in a padded row\)"):
        noted.check(strict=True)
    with pytest.raises(Mismatch, match="f raised"):
        result(Status.ERROR, reason="f raised ValueError").check()
    with pytest.raises(unittest.SkipTest, match="takes no k_scale"):
        result(Status.SKIPPED, reason="f takes no k_scale").check()


def test_the_line_that_shows_a_failure_again_does(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "wrong_topk.py").write_text(KERNEL.replace("WRONG", "True"))
    import wrong_topk

    found = m3check.verify("index_topk/q=2,kv=300,h=1,topk=2", wrong_topk.index_topk, wrong_topk.PROFILE, invariants=False)
    words = found.repro.split()
    assert words[:2] == ["m3check", "run"]
    options = cli.parser().parse_args(words[1:])
    assert (options.kernels, options.case) == (["./wrong_topk.py"], [found.case])
    other = m3check.verify(found.case, wrong_topk.index_topk, invariants=False)
    assert other.repro == "", "the file alone would be judged by another profile"
