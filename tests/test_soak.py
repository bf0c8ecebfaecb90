"""Many seeds told in few words: what is counted, what is kept in full, and that nothing red gets lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import msgspec
import pytest
import torch_kernels as right
from test_invariants import like, session

from m3check import cases, soak
from m3check.config import RunOptions
from m3check.isolate import Death
from m3check.runner import result
from m3check.types import M3CheckError, PlanLine, Result, Status

CASE = "index_decode_score/q=2,kv=700,h=2,d=64"
LINE = PlanLine(CASE, "index_decode_score", "user", "interpreted", None, ("repeat", "poison"))


def answered(function, first, last):
    message = {"line": msgspec.to_builtins(LINE), "seeds": [first, last], "repro": "m3check run --kernels user"}
    return json.loads(json.dumps(soak.answer(session({"index_decode_score": function}), message)))


def test_every_seed_is_a_case_of_its_own_and_right_ones_leave_counts_alone():
    reply = answered(right.index_decode_score, 3, 7)
    assert reply["others"] == []
    assert reply["tally"]["results"] == 5
    assert reply["tally"]["summary"] == {"passed": 5}
    worst = reply["tally"]["worst"]["score"]
    assert 0 < worst["ratio"] < 1
    assert worst["case"] in {f"{CASE}~{seed}" for seed in range(3, 8)}
    assert not {"repeat", "poison"} & set(reply["tally"]["worst"])


def test_a_wrong_result_is_kept_in_full_with_the_command_that_shows_it_again():
    calls = []

    @like("index_decode_score")
    def rarely(**arguments):
        score = right.index_decode_score(**arguments)
        calls.append(0)
        return score * 1.5 if len(calls) == 4 else score

    reply = answered(rarely, 1, 6)
    assert reply["tally"]["summary"] == {"passed": 5, "failed": 1}
    [other] = msgspec.convert(reply["others"], list[Result])
    assert other.case == f"{CASE}~4"
    assert any(finding.check == "score" and finding.status is Status.FAILED for finding in other.findings)
    assert other.repro == f"m3check run --kernels user --case {CASE}~4"
    cases.parse_id(other.case)


def test_only_so_many_are_kept_in_full_and_all_are_counted():
    @like("index_decode_score")
    def never(**arguments):
        return right.index_decode_score(**arguments) * 1.5

    reply = answered(never, 1, 14)
    assert reply["tally"]["summary"] == {"failed": 14}
    assert len(reply["others"]) == soak.WHOLE


def test_tasks_give_every_case_its_first_seeds_before_any_has_more():
    lines = [LINE, PlanLine("index_topk/q=2,kv=1409,h=2", "index_topk", "user", "interpreted")]
    tasks = list(soak._tasks(lines, 1, soak.CHUNK + 7))
    assert [(t.first, t.last) for t in tasks] == [(1, soak.CHUNK)] * 2 + [(soak.CHUNK + 1, soak.CHUNK + 7)] * 2
    assert {t.line.op for t in tasks[:2]} == {"index_topk", "index_decode_score"}


def test_a_task_that_died_is_red_and_says_which_seeds_it_had():
    found = soak.Soak("sm90", "", {}, (1, 9), 9)
    soak._count(found, soak.Task(LINE, 1, 4), answered(right.index_decode_score, 1, 4), "m3check run")
    soak._count(found, soak.Task(LINE, 5, 9), Death("crashed", "it ended with signal SIGSEGV"), "m3check run")
    assert found.total.results == 5
    assert found.total.statuses == {"passed": 4, "crashed": 1}
    assert "seeds 5 to 9" in found.others[0].reason
    options = RunOptions(arch="sm90", kernels=("user.module",))
    assert soak._judged(found, options, False).code == 5, "a named provider without results"
    found.tallies = {("index_decode_score", "user.module"): found.total}
    verdict = soak._judged(found, options, False)
    assert (verdict.code, verdict.reason) == (1, "1 of 5 results are red")
    assert soak._judged(found, options, True).code == 2


def test_noted_results_are_red_under_strict_only():
    tally = soak.Tally()
    tally.add(soak.heard({"results": 3, "summary": {"passed": 3}, "noted": 2, "seconds": 1.0, "worst": {}}))
    found = soak.Soak("sm90", "", {}, (1, 3), 3, {("index_topk", "triton"): tally})
    assert soak._judged(found, RunOptions(arch="sm90"), False).code == 0
    assert soak._judged(found, RunOptions(arch="sm90", strict=True), False).code == 1


def test_the_largest_ratio_of_two_tallies_wins():
    one, two = soak.Tally(worst={"row": (0.5, "a")}), soak.Tally(worst={"row": (0.7, "b"), "element": (0.1, "c")})
    one.add(two)
    assert one.worst == {"row": (0.7, "b"), "element": (0.1, "c")}


@pytest.mark.parametrize("seeds", [(0, 3), (4, 3)])
def test_seeds_begin_at_one_and_do_not_run_backwards(seeds):
    with pytest.raises(M3CheckError, match="--seeds"):
        soak.run(RunOptions(arch="sm90"), seeds)


def command(*words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "m3check", "soak", "--arch", "sm90", *words]
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=600, check=False)


def test_the_command_writes_a_small_record_and_ends_like_a_run(tmp_path):
    pytest.importorskip("triton")
    words = ["--case", "index_topk/q=2,kv=1409,h=2", "index_topk/q=3,kv=300,h=1", "--seeds", "2..4", "--jobs", "1"]
    done = command(*words, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "soak.json").read_text())
    assert (data["results"], data["asked"], data["seeds"], data["others"]) == (6, 6, [2, 4], [])
    assert data["exit"]["code"] == 0
    assert data["environment"]["torch"]
    assert "index_topk" in done.stdout
    assert "6 results, none is red" in done.stderr


def test_a_mistyped_range_is_a_sentence_and_exit_code_4():
    done = command("--seeds", "some")
    assert done.returncode == 4
    assert "wants A..B" in done.stderr


def test_references_may_run_elsewhere_than_the_kernel(monkeypatch):
    """What a kernel is given goes to its device, what it made comes back to be judged."""
    seen, moved = [], result._moved

    def spy(value, device):
        seen.append((type(value).__name__, device))
        return moved(value, device)

    monkeypatch.setattr(result, "_moved", spy)
    message = {"line": msgspec.to_builtins(LINE), "seeds": [1, 2], "repro": "", "judged_on": "cpu"}
    reply = soak.answer(session({"index_decode_score": right.index_decode_score}), message)
    assert reply["tally"]["summary"] == {"passed": 2}
    assert seen == [("Inputs", "cpu"), ("Run", "cpu")] * 2
    inputs = cases.make_inputs(cases.parse_id(CASE))
    there = moved(inputs, "meta")
    assert (there.idx_q.device.type, there.case, there.scores) == ("meta", inputs.case, None)

    @like("index_decode_score")
    def wrong(**arguments):
        return right.index_decode_score(**arguments) * 1.5

    assert soak.answer(session({"index_decode_score": wrong}), message)["tally"]["summary"] == {"failed": 2}
