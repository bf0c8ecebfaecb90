"""Maps of red outputs: they point at the cells that were made wrong, stay small, and never cost a verdict."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import test_invariants
import torch_kernels as right

from m3check import cases, runner
from m3check.checks import heat
from m3check.report import jsonfile
from m3check.types import Heat, PlanLine, Result, Status

SHAPE = "q=9+3,kv=1500+700,h=2,topk=4"


def run(op: str, spoil, *, shape: str = SHAPE, drawn: bool = True) -> Result:
    """One case on a right kernel whose output `spoil` changes in place."""

    def kernel(*args, **words):
        given = inspect.signature(right.RIGHT[op]).bind(*args, **words).arguments
        result = right.RIGHT[op](*args, **words)
        spoil(given["output"] if result is None else result)
        return result

    session = test_invariants.session({**right.RIGHT, op: test_invariants.like(op)(kernel)})
    case = f"{op}/{shape}"
    line = PlanLine(case, op, "user", "interpreted", None, ())
    return runner.run_one(cases.parse_id(case), replace(session, heat=drawn), line, "")


def test_scores_are_drawn_by_row_and_head_and_the_worst_row_by_block():
    def spoil(score):
        score[1, 4, 3] += 1.0

    made = run("index_score", spoil, shape="q=9+3,kv=1500+700,h=2,d=64").heat

    assert made is not None
    assert made.output == "score"
    rows, blocks = made.maps
    assert [label for label, line in zip(rows.labels, rows.cells, strict=True) if set(line) != {"·"}] == ["0, 1495"]
    assert rows.cells[4] == "·#"
    assert (blocks.of, blocks.labels, len(blocks.cells[0])) == ("0, 1495", ("1",), 12)
    assert blocks.cells[0].replace("#", "x") == "···x········"


def test_attention_is_drawn_by_query_head_and_the_worst_row_by_channel():
    def spoil(out):
        out[10, 5, 60:] = 3.0

    made = run("sparse_attn", spoil, shape="q=9+3,kv=300+200,h=2,g=4,d=64,topk=2").heat

    assert made is not None
    rows, channels = made.maps
    assert rows.cells[10][5] not in "·N"
    assert sum(set(line) != {"·"} for line in rows.cells) == 1
    assert channels.labels == ("5",)
    assert set(channels.cells[0][:60]) == {"·"}
    assert "·" not in channels.cells[0][60:]


def test_a_selection_is_drawn_as_what_it_took_and_left_out():
    def spoil(ids):
        ids[0, 2] = ids.new_tensor([0, 1, 2, 11]).roll(1)

    made = run("index_topk", spoil).heat

    assert made is not None
    rows, lists = made.maps
    assert rows.cells[2] == "N·"
    assert lists.of == "0, 1493"
    assert lists.cells[0].count("+") == lists.cells[0].count("-") > 0


def test_a_block_that_is_listed_twice_has_a_mark():
    def spoil(ids):
        ids[1, 0, 0] = ids[1, 0, 1]

    made = run("index_topk", spoil).heat

    assert made is not None
    assert "²" in made.maps[1].cells[0]


def test_a_green_result_and_a_session_without_maps_have_none():
    assert run("index_topk", lambda ids: None).heat is None
    silent = run("index_topk", lambda ids: ids.fill_(0), drawn=False)
    assert (silent.status, silent.heat) == (Status.FAILED, None)


def test_many_rows_and_heads_stay_small():
    made = run("index_topk", lambda ids: ids.fill_(0), shape="q=130,kv=9000,h=80,topk=4").heat

    assert made is not None
    rows, lists = made.maps
    assert len(rows.cells) <= heat.LINES
    assert rows.count * len(rows.cells) >= 130
    assert (rows.step, len(rows.cells[0])) == (2, 40)
    assert len(lists.cells) == heat.DETAIL
    assert max(map(len, lists.cells)) <= heat.COLUMNS


def test_a_map_that_cannot_be_made_costs_no_verdict(monkeypatch: pytest.MonkeyPatch):
    def broken(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(heat, "drawn", broken)

    result = run("index_topk", lambda ids: ids.fill_(0))

    assert (result.status, result.heat) == (Status.FAILED, None)


def test_a_map_is_in_the_record_of_a_red_result_and_nowhere_else():
    red = run("index_topk", lambda ids: ids.fill_(0))
    from records import record

    text = jsonfile.dumps(record(red, replace(red, status=Status.PASSED, heat=None)))

    assert text.count('"heat"') == 1
    assert isinstance(jsonfile.loads(text).results[0].heat, Heat)
    assert jsonfile.loads(text).results[0] == replace(jsonfile.loads(text).results[0], heat=red.heat)
    assert jsonfile.load_result(jsonfile.dump_result(red)).heat == red.heat
