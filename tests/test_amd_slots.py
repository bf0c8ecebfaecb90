"""Inserted index keys, and slots and tables that are renumbered."""

from __future__ import annotations

import pytest
import torch
from amd_models import (
    CODES,
    INSERT,
    REBASE,
    inserts,
    judged,
    rebases,
)

import m3check
from m3check import cases
from m3check.kernels import vllm_amd
from m3check.types import Status


def test_a_table_that_is_not_written_into_the_buffer_of_the_step_is_refused():
    def slots(slot_mapping, block_size):
        return slot_mapping.where(slot_mapping < 0, slot_mapping // block_size * 2 * block_size + slot_mapping % block_size)

    def rebased(keeps):
        def table(block_table, out):
            return torch.mul(block_table, 2, out=out) if keeps else block_table * 2

        parts = {"minimax_m3_rebase_slots_to_page16": slots, "minimax_m3_rebase_block_table_to_page16": table}
        return vllm_amd.PIECES["page16_rebase"].composed(parts)

    assert judged(REBASE, rebased(True)) == (Status.PASSED, set())
    assert m3check.verify(REBASE, rebased(False), invariants=False).status is Status.ERROR


@pytest.mark.parametrize("case", [INSERT, f"{INSERT},cache=fp8_e4m3fn,layout=pool"])
def test_keys_are_held_to_their_slots(case):
    assert judged(case, inserts()) == (Status.PASSED, set())
    assert judged(case, inserts("padding"))[1] == {"guards"}
    assert judged(case, inserts("neighbour"))[1] >= {"guards", "index_keys"}
    for mistake in ("key", "sign", "stops"):
        assert judged(case, inserts(mistake))[1] == {"index_keys"}, mistake


@pytest.mark.parametrize("mistake", CODES)
def test_codes_of_wide_keys_are_saturated_and_rounded_to_nearest(mistake):
    case = "index_insert/q=12,kv=140,d=64,cache=fp8_e4m3fn,fill=wide"
    assert judged(case, inserts()) == (Status.PASSED, set())
    assert judged(case, inserts(mistake))[1] == {"index_keys"}
    keys = cases.make_inputs(cases.parse_id(case)).more["index_k"].float().abs()
    assert bool((keys > 464).any())
    assert bool((keys < 2**-10).any())
    assert bool(((keys.log2() % 1).exp2() * 16 % 2 == 1).any()), "ties between codes"


def test_renumbered_slots_and_pages_stand_for_what_they_did():
    assert judged(REBASE, rebases()) == (Status.PASSED, set())
    assert judged(REBASE, rebases("padding"))[1] == {"slots"}, "a negative slot becomes another one"
    assert judged(REBASE, rebases("twice"))[1] == {"slots"}
    assert judged(REBASE, rebases("table"))[1] == {"blocks"}
