"""A dead, hung or refusing worker costs its own case and nothing else."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from m3check import api, isolate
from m3check.config import RunOptions
from m3check.types import M3CheckError, Status

CASE = "index_score/q=5+2,kv=300+140,h=2,d=64"
OTHER = "index_score/q=3,kv=257,h=1,d=64"

GOOD = """
import torch

def index_score(idx_q, index_kv_cache, block_table, cu_seqlens_q, seq_lens, prefix_lens):
    heads, columns = idx_q.shape[1], -(-int(seq_lens.max()) // 128)
    score = torch.full((heads, idx_q.shape[0], columns), float("-inf"))
    for r in range(len(seq_lens)):
        keys = index_kv_cache[block_table[r, : -(-int(seq_lens[r]) // 128)].long()].flatten(0, 1).float()
        for t in range(int(cu_seqlens_q[r]), int(cu_seqlens_q[r + 1])):
            visible = int(prefix_lens[r]) + t - int(cu_seqlens_q[r]) + 1
            dots = idx_q[t].float() @ keys[:visible].T
            for b in range(-(-visible // 128)):
                score[:, t, b] = dots[:, 128 * b : 128 * b + 128].amax(1)
    return score
"""


def run(tmp_path: Path, body: str, cases=(CASE, OTHER), **options):
    file = tmp_path / "mine.py"
    file.write_text(body)
    settings = {"arch": "sm100", "kernels": (str(file),), "cases": cases, "out": tmp_path, "jobs": 1, **options}
    return api.run(RunOptions(**settings))


def when(condition: str, action: str) -> str:
    """The good kernel, doing something else first where `condition` holds."""
    line = "    heads, columns"
    return GOOD.replace(line, f"    if {condition}:\n        {action}\n{line}", 1)


def test_the_good_kernel_passes(tmp_path):
    record = run(tmp_path, GOOD)
    assert [r.status for r in record.results] == [Status.PASSED] * 2
    assert record.exit.code == 0


def test_a_crash_costs_one_case(tmp_path):
    record = run(tmp_path, when("len(seq_lens) == 2", "import os; os.abort()"))
    assert {r.case: r.status for r in record.results} == {CASE: Status.CRASHED, OTHER: Status.PASSED}
    crashed = next(r for r in record.results if r.case == CASE)
    assert "SIGABRT" in crashed.reason
    assert f"--case {CASE}" in crashed.repro
    assert record.exit.code == 1


def test_a_hang_costs_one_case_and_its_time_limit(tmp_path):
    began = time.monotonic()
    record = run(tmp_path, when("len(seq_lens) == 2", "import time; time.sleep(600)"), timeout=12.0)
    assert {r.case: r.status for r in record.results} == {CASE: Status.TIMEOUT, OTHER: Status.PASSED}
    hung = next(r for r in record.results if r.case == CASE)
    assert re.search(r"it was at mine\.py:\d+, in index_score", hung.reason)
    assert time.monotonic() - began < 120


def test_a_file_that_hangs_while_it_loads_is_told_of_and_ended_with_its_line(tmp_path, monkeypatch, capsys):
    marker = tmp_path / "loads"
    monkeypatch.setattr(isolate, "SLOW_START", 0.5)
    monkeypatch.setattr(isolate.Worker, "overdue", lambda worker: marker.exists())  # not after five minutes
    with pytest.raises(M3CheckError, match=r"could not be loaded within .* it was at mine\.py:\d+, in <module>"):
        run(tmp_path, f"open({str(marker)!r}, 'w')\nimport time\ntime.sleep(600)")
    assert capsys.readouterr().err.count("takes more than 0.5 s") == 1


def test_an_exception_is_an_error_with_its_place(tmp_path):
    record = run(tmp_path, when("True", "raise ValueError('no such page')"), cases=(OTHER,))
    (result,) = record.results
    assert result.status is Status.ERROR
    assert "ValueError: no such page" in result.reason
    assert "mine.py:" in result.reason


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ("return torch.zeros(1, 2)", "shape [1, 2], wanted"),
        ("return torch.zeros(idx_q.shape[1], idx_q.shape[0], 64, dtype=torch.float16)", "torch.float16"),
        ("return 7", "returned int"),
        ("return None", "returned None"),
    ],
)
def test_a_wrong_result_is_an_error_that_says_what_was_wanted(tmp_path, action, words):
    (result,) = run(tmp_path, when("True", action), cases=(OTHER,)).results
    assert result.status is Status.ERROR
    assert words in result.reason


def test_what_a_kernel_prints_does_not_reach_the_protocol(tmp_path):
    record = run(tmp_path, when("True", "print('{\"answer\": 1}', flush=True)"), cases=(OTHER,))
    assert record.exit.code == 0


@pytest.mark.parametrize(
    ("body", "words"),
    [("import nothing_of_this_name", "nothing_of_this_name"), ("x = 1", "index_score"), ("def f(:", "mine.py")],
)
def test_a_file_that_gives_no_kernels_ends_the_run_at_once(tmp_path, body, words):
    with pytest.raises(M3CheckError, match=words):
        run(tmp_path, body)


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    run(tmp_path, GOOD)
    journal = tmp_path / "journal.jsonl"
    lines = journal.read_text().splitlines()
    first = json.loads(lines[1])
    journal.write_text("\n".join(lines[:2]) + "\n" + lines[2][: len(lines[2]) // 2])  # killed while it wrote
    seen = []
    record = run(tmp_path, GOOD, resume=True, progress=lambda event: seen.append(event.result))
    assert len(record.results) == 2
    assert [r.case for r in seen] == [r.case for r in record.results if r.case != first["case"]]
    assert len(journal.read_text().splitlines()) == 4  # header, result, torn line, result


def test_a_journal_of_another_run_is_not_resumed(tmp_path):
    run(tmp_path, GOOD)
    with pytest.raises(M3CheckError, match="cannot resume"):
        run(tmp_path, GOOD, resume=True, arch="sm90")
