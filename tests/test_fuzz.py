"""The search: what it draws, that it finds what no tier has, makes it small, remembers it, and survives what it finds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch_kernels as right
from hypothesis import HealthCheck, Phase, given, seed, settings
from records import finding
from test_invariants import like, session

from m3check import cases, cli, fuzz, isolate, runner
from m3check.cases import strategies
from m3check.cases.cost import cost
from m3check.fuzz.kinds import kind
from m3check.fuzz.search import Example, Search
from m3check.types import BLOCK, OPS, Case, PlanLine, Profile, Result, Status


def drawn(op: str, count: int) -> list[Case]:
    found = []

    @seed(0)
    @settings(max_examples=count, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(strategies.cases(op))
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    return found


# What is drawn ---


@pytest.mark.parametrize("op", sorted(OPS))
def test_every_case_makes_sense_and_is_affordable(op):
    found = drawn(op, 6)

    assert len(set(found)) > 3
    for case in found:
        assert cases.complaint(case) is None
        assert cases.parse_id(cases.case_id(case)) == case
        assert cost(case, "interpreted") <= (strategies.SECONDS if OPS[op].family == "sparse" else 10)


def test_what_a_tier_varies_is_varied():
    found = drawn("sparse_attn_decode", 150)

    assert any(kv < case.query_lens[0] for case in found for kv in case.kv_lens), "dead rows"
    assert any(len(set(case.kv_lens)) > 1 for case in found), "ragged"
    assert {kv % BLOCK for case in found for kv in case.kv_lens} >= {0, 1, BLOCK - 1}
    for field in ("cache_dtype", "scales", "layout", "ids", "topk", "gqa", "kv_heads", "head_dim", "seed"):
        assert len({getattr(case, field) for case in found}) > 1, field
    assert {case.fill for case in found} >= {"gauss", "wide", "ties", "needle"}


# Finding ---


def searched(attempt, number=4, rounds=1, op="index_topk", **more) -> Search:
    search = Search(op, "interpreted", number, **more)
    for _ in range(rounds):
        search.round(25, attempt)
    return search


def judged(function):
    """An attempt that runs a kernel here."""
    one = session({**right.RIGHT, "index_topk": function}, Profile(odd_scores=frozenset()))

    def attempt(example: Example) -> Result:
        name = cases.case_id(example.case)
        shown = (example.invariant,) if example.invariant else ()
        return runner.run_one(example.case, one, PlanLine(name, "index_topk", "user", "interpreted", None, shown), "")

    return attempt


@like("index_topk")
def wrong_for_seven_of_three(**arguments):
    ids = right.index_topk(**arguments)
    if arguments["topk"] == 7 and len(arguments["cu_seqlens_q"]) == 4:
        ids[0, -1, 1:] = ids[0, -1, 0]
    return ids


def test_a_mistake_that_no_tier_shows_is_found_and_made_small():
    meant = [c for c in cases.tier("full") if c.op == "index_topk" and c.topk == 7]
    assert not meant, "a tier shows it"

    search = searched(judged(wrong_for_seven_of_three))
    (result,) = search.found.values()
    case = cases.parse_id(result.case)
    assert result.status is Status.FAILED
    assert (case.topk, len(case.kv_lens), case.total_queries, case.kv_heads, case.seed) == (7, 3, 3, 1, 0)
    assert case.context <= 2 * BLOCK
    assert result.findings


def test_a_right_kernel_stays_green():
    search = Search("index_topk", "interpreted", 4)
    assert search.round(12, judged(right.index_topk)) == []
    assert len(search.seen) > 6
    assert search.found == {}
    assert all(result.status is not Status.FAILED for result in search.results(100))


def answer(example: Example, check: str = "", status: Status = Status.FAILED) -> Result:
    """A result without a kernel: red by a check, if one is named."""
    case = example.case
    found = (finding(check or "ids", Status.FAILED if check else Status.PASSED),)
    ended = status if check else Status.PASSED
    return Result(cases.case_id(case), case.op, "user", "k", "interpreted", case.axes(), ended, "", found)


def seven_of_three(example: Example) -> Result:
    case = example.case
    return answer(example, "ids" if case.topk == 7 and len(case.kv_lens) == 3 else "")


def long_or_many(example: Example) -> Result:
    case = example.case
    return answer(example, "selection" if case.topk > 30 else "ids" if len(case.kv_lens) > 2 else "")


def test_the_same_seed_gives_the_same_cases():
    first, again, other = (Search("index_topk", "interpreted", number) for number in (4, 4, 5))
    for search in (first, again, other):
        search.round(9, answer)

    assert len(first.seen) > 5
    assert list(first.seen) == list(again.seen)
    assert list(first.seen) != list(other.seen)


def test_different_failures_are_told_apart_and_one_hides_no_other():
    search = Search("index_topk", "interpreted", 1)
    told = [result.case for _ in range(3) for result in search.round(25, long_or_many)]
    assert set(search.found) == {"selection", "ids"}
    assert sorted(told) == sorted(result.case for result in search.found.values()), "each is told once"
    assert cases.parse_id(search.found["selection"].case).topk == 31
    assert cases.parse_id(search.found["ids"].case).query_lens == (1, 1, 1)
    reds = [result for result in search.results(1000) if result.status is Status.FAILED]
    assert len(reds) == 2, "of many red results the smallest alone is kept"


def test_a_crash_is_a_failure_that_costs_few_tries():
    ends = []

    def attempt(example: Example) -> Result:
        if example.case.topk < 20:
            return answer(example)
        ends.append(example)
        return answer(example, "none", Status.CRASHED)

    search = Search("index_topk", "interpreted", 1)
    (result,) = search.round(25, attempt)
    assert (result.status, list(search.found)) == (Status.CRASHED, ["none"])
    assert len(ends) <= 12
    before = len(search.seen)
    assert search.round(25, attempt) == []
    assert len(search.seen) > before, "the search went on"


def test_refused_cases_never_run():
    search = Search("index_topk", "interpreted", 4, refuses=lambda case: "not this one" if case.topk > 9 else None)
    search.round(5, answer)
    assert search.ran > 3
    assert all(example.case.topk < 10 for example in search.seen)


def test_a_provider_that_refuses_all_is_not_asked_for_ever():
    def skipped(example: Example) -> Result:
        return replace(answer(example), status=Status.SKIPPED)

    search = Search("index_topk", "interpreted", 1)
    search.round(6, skipped)
    assert search.ran == 0
    assert len(search.seen) <= 20
    assert search.results(10) == []


# Remembering ---


def test_failing_examples_are_tried_first_in_the_next_run_until_they_pass(tmp_path):
    smallest = [result.case for result in searched(long_or_many, 1, folder=tmp_path).found.values()]
    assert len(smallest) == 2

    def first_of(attempt, **more) -> list[str]:
        search = Search("index_topk", "interpreted", 99, folder=tmp_path, **more)
        search.round(3, attempt)
        return [cases.case_id(example.case) for example in search.seen][:2]

    assert sorted(first_of(long_or_many)) == sorted(smallest)
    assert len(first_of(long_or_many, enough=lambda shrinking: True)) == 1, "time was up after one"
    assert sorted(first_of(long_or_many)) == sorted(smallest), "the other was not forgotten"
    first_of(answer)
    assert not set(first_of(answer)) & set(smallest), "both were mended"


# Names ---


@pytest.mark.parametrize(
    ("result", "name"),
    [
        ({"findings": (finding("ids"), finding("token", Status.FAILED))}, "element"),
        ({"findings": (finding("selection", Status.FAILED), finding("element", Status.FAILED))}, "selection"),
        (
            {"findings": (), "status": Status.ERROR, "reason": "f raised KeyError: 'x' at k.py:12"},
            "error KeyError k.py:12",
        ),
        ({"findings": (), "status": Status.TIMEOUT, "reason": "no answer in time"}, "timeout"),
        ({"status": Status.PASSED, "findings": (finding("dead_row", Status.NOTED),)}, ""),
    ],
)
def test_kinds_of_failure(result, name):
    plain = answer(Example(cases.parse_id("index_topk/q=1,kv=9"), ""), "ids")
    assert kind(replace(plain, **result)) == name
    if not name:
        assert kind(replace(plain, **result), strict=True) == "noted dead_row"


# The command ---


class FakeHelper:
    """A worker that answers at once."""

    attempt = staticmethod(seven_of_three)

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> FakeHelper:
        return self

    def __exit__(self, *_: object) -> None: ...

    def hello(self):
        machine = {"torch": "2.13.0", "triton": "3.8.0"}
        return {"warnings": [], "environment": machine, "repairs": [], "description": {}}

    def ask(self, message):
        line = msgspec.convert(message["line"], PlanLine)
        result = self.attempt(Example(cases.parse_id(line.case), ""))
        if result.status is Status.CRASHED:
            return isolate.Death("crashed", "signal SIGSEGV")
        return msgspec.to_builtins(replace(result, provider=line.provider, repro=message["repro"]))

    def end(self) -> None: ...


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def call(attempt, *words: str) -> int:
        monkeypatch.setattr(FakeHelper, "attempt", staticmethod(attempt))
        monkeypatch.setattr(fuzz, "Helper", FakeHelper)
        return cli.main(["fuzz", "--arch", "sm90", "--op", "index_topk", "--jobs", "1", "--out", str(tmp_path), *words])

    return call


def test_a_failure_is_printed_with_its_command_and_makes_the_exit_code(command, tmp_path, capsys):
    def attempt(example: Example) -> Result:
        return answer(example, "ids" if len(example.case.kv_lens) > 2 else "")

    assert command(attempt, "--seed", "13", "--max-examples", "30") == 1
    error = capsys.readouterr().err
    assert "FAILED index_topk/q=1x3,kv=1x3,h=1,topk=1,local=0 [triton] ids" in error
    assert "m3check run --arch sm90 --kernels triton --case index_topk/q=1x3,kv=1x3,h=1,topk=1,local=0" in error
    record = json.loads((tmp_path / "report.json").read_text())
    assert record["exit"]["code"] == 1
    assert record["environment"]["fuzz"]["seed"] == 13
    assert record["summary"]["failed"] == 1
    assert not (tmp_path / "examples").exists(), "a fixed seed depends on nothing that was kept"


def test_a_green_search_a_crashing_one_and_one_without_cases(command, tmp_path, capsys, monkeypatch):
    assert command(answer, "--ci", "--max-examples", "5") == 0
    assert command(lambda example: answer(example, "ids", Status.CRASHED), "--max-examples", "5") == 1
    assert "CRASHED" in capsys.readouterr().err
    assert list((tmp_path / "examples" / "triton" / "index_topk").iterdir()), "kept for the next run"
    monkeypatch.setattr(fuzz.kernels, "refuses", lambda *_: "no")
    assert command(answer, "--ci") == 5


def test_time_ends_a_search_and_ctrl_c_leaves_a_report(command, tmp_path, monkeypatch, capsys):
    assert command(answer, "--time", "0.2s") == 0

    def interrupted(*_: object, **__: object):
        raise KeyboardInterrupt

    monkeypatch.setattr(fuzz, "wait", interrupted)
    assert command(answer, "--time", "10m") == 2
    assert json.loads((tmp_path / "report.json").read_text())["exit"]["code"] == 2


def test_a_mistake_on_the_command_line_is_a_sentence(command, monkeypatch, capsys):
    for words, said in (
        (["--time", "10"], "such as 90s, 10m or 2h"),
        (["--max-examples", "0"], "the least is 1"),
        (["--ci", "--seed", "1"], "leave --ci or --seed out"),
        (["--op", "topk"], "unknown op 'topk'"),
    ):
        assert command(answer, *words) == 4
        assert said in capsys.readouterr().err
    monkeypatch.setattr(fuzz.importlib.util, "find_spec", lambda name: None)
    assert command(answer) == 4
    assert "pip install 'm3check[fuzz]'" in capsys.readouterr().err


def test_a_real_worker(tmp_path, capsys):
    """A kernel file that ends its process on some cases, and is wrong on others."""
    path = tmp_path / "mine.py"
    path.write_text(
        "import os\n\n\ndef index_topk(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks, out):\n"
        "    if topk > 40:\n        os._exit(3)\n    out.fill_(-1)\n"
    )
    words = ["--op", "index_topk", "--seed", "2", "--max-examples", "4", "--jobs", "1", "--out", str(tmp_path / "out")]

    assert cli.main(["fuzz", "--arch", "sm90", "--kernels", str(path), *words]) == 1
    error = capsys.readouterr().err
    assert "FAILED index_topk/q=1,kv=1,h=1,topk=1,local=0" in error
