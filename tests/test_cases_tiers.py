"""What the tiers hold, how large they are, and that they cost nothing to read."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

import m3check
from m3check.cases import FILLS, TIERS, case_cost, case_id, complaint, cost, production, shard, tier, weight
from m3check.cases.axes import often_refused, point
from m3check.types import BLOCK, DTYPES, OPS, SPARSE, Case, M3CheckError, blocks


def test_smoke_is_within_ci_within_full():
    smoke, ci, full = (set(tier(name)) for name in ("smoke", "ci", "full"))
    assert smoke < ci < full
    assert len(smoke) >= 40
    assert 300 <= len(ci) <= 600
    assert 1500 <= len(full) <= 3000


@pytest.mark.parametrize("name", TIERS)
def test_every_case_of_a_tier_makes_sense_and_is_there_once(name):
    cases = tier(name)
    assert len({case_id(case) for case in cases}) == len(cases)
    assert [complaint(case) for case in cases if complaint(case)] == []


def test_smoke_has_every_op_dtype_scale_layout_list_and_fill():
    assert {case.op for case in tier("smoke")} == set(OPS)
    cases = tier("smoke", SPARSE)
    assert {case.fill for case in cases} == set(FILLS)
    assert {case.scales for case in cases} == {"none", "scalar", "token"}
    assert {case.layout for case in cases} == {"hnd", "nhd", "pool"}
    assert {case.ids for case in cases} == {"full", "ascending", "short", "holes", "future"}
    assert {case.cache_dtype for case in cases} >= {word for word in DTYPES if not word.endswith("fnuz")}
    for op in SPARSE:
        if OPS[op].phase == "decode":
            assert any(min(case.kv_lens) == 0 for case in cases if case.op == op), f"{op} has no dead row"


def is_real(case: Case) -> bool:
    """M3's own shape, with a selection to make; index ops read no query heads."""
    return (case.kv_heads, case.gqa, case.head_dim, case.topk) == (4, 16, 128, 16) and case.block_columns > 16


def test_the_models_own_shape_is_tried():
    for op in SPARSE:
        assert any(is_real(case) for case in tier("smoke", [op])), f"{op} never has M3's shape in smoke"
    assert sum(is_real(case) for case in tier("ci")) >= 12
    assert sum(is_real(case) for case in tier("ci", ["sparse_attn", "sparse_attn_decode", "prefill", "decode"])) >= 12


@pytest.mark.parametrize("name", ["smoke", "ci", "full"])
def test_most_cases_have_more_visible_blocks_than_topk(name):
    """Otherwise every block is taken and a selection that ignores the scores passes."""
    cases = [case for case in tier(name, SPARSE) if "reach" in point(case)]
    chosen = [case for case in cases if case.block_columns > case.topk]
    twice = [case for case in cases if case.block_columns >= 2 * case.topk]
    assert len(chosen) > 0.6 * len(cases)
    assert len(twice) > 0.3 * len(cases)


def test_lengths_stand_at_block_edges_and_some_do_not():
    for name in ("smoke", "ci", "full"):
        residues = {n % BLOCK for case in tier(name) for n in case.kv_lens}
        assert {127, 0, 1} < residues


def test_cases_that_providers_often_refuse_are_few():
    """Three heads where one tile holds all heads, and the fp8 dialects of a single target."""
    for name, share in (("ci", 0.02), ("full", 0.2)):
        cases = tier(name, SPARSE)
        heads = [case for case in cases if often_refused(case.op, "kv_heads", case.kv_heads)]
        refused = [case for case in cases if any(often_refused(case.op, *item) for item in point(case).items())]
        assert len(heads) < 0.1 * len(cases)
        assert len(refused) < share * len(cases) + len(heads)


def test_full_goes_to_a_million_tokens():
    longest = [case for case in tier("full") if case.context >= 2**20 - 256]
    assert {case.op for case in longest} >= set(SPARSE)
    keys = [case for case in tier("full") if case.context >= 131_000 and case.op != "index_topk"]  # which has scores only
    assert len(keys) < 40


def test_a_tier_of_some_ops():
    assert {case.op for case in tier("ci", ["decode", "index_topk"])} == {"decode", "index_topk"}
    with pytest.raises(M3CheckError, match="unknown tier 'nightly'; known tiers: smoke, ci, full, production"):
        tier("nightly")
    with pytest.raises(M3CheckError, match=r"unknown op 'attend'.*index_score"):
        tier("ci", ["attend"])


def test_shards_part_a_tier_and_stay_when_others_come():
    cases = tier("ci")
    parts = [shard(cases, i, 3) for i in (1, 2, 3)]
    assert sorted(case_id(case) for part in parts for case in part) == sorted(map(case_id, cases))
    assert all(len(part) > 0.2 * len(cases) for part in parts)
    fewer = cases[::2]
    assert shard(fewer, 2, 3) == [case for case in parts[1] if case in set(fewer)]
    with pytest.raises(M3CheckError, match="shard 4/3"):
        shard(cases, 4, 3)


def test_production_is_what_the_file_says():
    data = Path(m3check.__file__).parent / "data" / "m3_prefill_production.csv"
    text = data.read_text()
    assert "MiniMax-AI/MSA" in text
    assert "a67238686ca704e1bbe0a1098ed11c9857565f4e" in text
    rows = list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))
    assert len(rows) == 66
    for op in ("index_score", "index_topk", "sparse_attn"):
        cases = [case for case in production() if case.op == op]
        figures = [(len(c.kv_lens), c.total_queries, c.context, weight(c)) for c in cases]
        assert figures == [tuple(int(row[w]) for w in ("batch", "total_q", "max_final_kv", "weight")) for row in rows]
        assert sum(weight(case) for case in cases) == 14_805
    assert weight(tier("smoke")[0]) == 0


def test_production_requests_differ_in_length():
    many = [case for case in production() if len(case.kv_lens) > 2]
    assert all(len(set(case.query_lens)) > 1 and len(set(case.kv_lens)) > 1 for case in many)


def test_costs_are_told_in_words():
    long, short = production()[-1], tier("smoke")[0]
    assert cost(long, "interpreted") > 60 * cost(short, "interpreted")
    assert cost(long, "device") < cost(long, "interpreted")
    assert str(case_cost(long)).startswith("about ")
    assert "on a device" in str(case_cost(long))


def test_reading_tiers_imports_neither_torch_nor_numpy():
    code = (
        "import sys, m3check.cases as c; c.tier('full'); c.tier('production')\n"
        "print([m for m in ('torch', 'numpy', 'triton') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_ragged_batches_mix_block_counts():
    ragged = [case for case in tier("full", SPARSE) if point(case)["mix"] == "ragged" and len(case.kv_lens) > 2]
    assert sum(len({blocks(n) for n in case.kv_lens}) > 1 for case in ragged) > 0.8 * len(ragged)
