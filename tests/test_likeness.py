"""A failed result of an op without stages has a named cause, in a run's report and from `m3check explain`."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
import amd_models  # noqa: E402
import test_latent  # noqa: E402
import test_logits  # noqa: E402
import torch_insert  # noqa: E402

from m3check import arch, cases, kernels, runner  # noqa: E402
from m3check.explain import explain  # noqa: E402
from m3check.explain.text import render  # noqa: E402
from m3check.types import Kernel, PlanLine, Profile, Status  # noqa: E402

E4M3 = "dtype=fp8_e4m3fn,cache=fp8_e4m3fn"
LATENT = "mla_sparse/q=2+3,kv=150+70,h=1,g=4,d=80,topk=64"
LOGITS = f"mqa_logits/q=5+3,kv=70+9,h=1,g=4,d=32,{E4M3}"
PAGED = f"paged_mqa_logits/q=2x3,kv=131+64+65,h=1,g=4,d=32,{E4M3}"
INSERT = "qknorm_rope_insert/q=1+3,kv=300+130,h=2,g=2"
KEYS = "index_insert/q=9+3,kv=300+3,d=64"


def session(op, function):
    profile = Profile(id_lists=Profile().id_lists)
    made = {op: Kernel("user", op, "mine", profile, function)}
    return runner.Session(arch.find_arch("sm90"), "interpreted", "cpu", kernels.Loaded.of(made))


def line(text):
    return PlanLine(text, text.partition("/")[0], "user", "interpreted", None, ())


def ran(text, function):
    case = cases.parse_id(text)
    return runner.run_one(case, session(case.op, function), line(text), "")


def rolled(name, dim):
    """A right kernel of logits whose argument `name` is rolled by one."""

    def change(right):
        def mqa_logits(q, k, k_scale, weights, starts, ends):
            given = {"q": q, "k": k, "k_scale": k_scale, "weights": weights, "starts": starts, "ends": ends}
            return right(**{**given, name: given[name].roll(1, dim)})

        return mqa_logits

    return change(test_logits.windowed())


def inserts(by=0):
    """Index keys into their slots: of the token `by` before each."""

    def index_insert(index_k, index_cache, index_slot_mapping):
        rows = index_k.roll(by, 0)
        for token, slot in enumerate(index_slot_mapping.tolist()):
            if slot >= 0:
                index_cache[slot // 128, slot % 128] = rows[token].to(index_cache.dtype)

    return index_insert


RIGHT = {
    "latent": (LATENT, test_latent.kernel(tile=32, splits=4, reverse=True)),
    "logits": (LOGITS, test_logits.windowed(order=-1)),
    "paged": (PAGED, test_logits.paged(order=-1)),
    "insert": (INSERT, torch_insert.kernel(normed=lambda x, w, e: x / torch.sqrt(torch_insert.power(x) + e) * (1 + w))),
    "table": (amd_models.TABLE, amd_models.table(reverse=True)),
    "keys": (KEYS, inserts()),
}


@pytest.mark.parametrize("family", RIGHT)
def test_a_right_kernel_that_adds_up_otherwise_has_no_cause(family):
    text, function = RIGHT[family]
    result = ran(text, function)
    assert result.status is Status.PASSED, result.reason
    assert not any(" like " in finding.hint for finding in result.findings)


def wide_norm(x, weight, eps):
    return torch_insert.normed(x, weight - 1, eps)


WRONG = {
    "a part of the list lost": (LATENT, test_latent.kernel(splits=4, lost=2), "latent_part_lost_3_of_4"),
    "base 2 in the logsumexp": (LATENT, test_latent.kernel(lse_base=1.4426950408889634), "latent_lse_base"),
    "no relu": (LOGITS, test_logits.windowed(relu=False), "logits_relu_lost"),
    "weights of the head beside": (LOGITS, rolled("weights", 1), "logits_weights_heads"),
    "a window short": (LOGITS, test_logits.windowed(shift=-1), "logits_own_lost"),
    "the next draft token's row": (PAGED, test_logits.paged(shift=1), "logits_queries"),
    "no scale": (PAGED, test_logits.paged(scaled=False), "logits_scale_lost"),
    "w for 1 + w": (INSERT, torch_insert.kernel(normed=wide_norm), "insert_weight_alone"),
    "sine of the other sign": (
        INSERT,
        torch_insert.kernel(rotated=lambda x, cos, sin: torch_insert.rotated(x, cos, -sin)),
        "insert_rotation_back",
    ),
    "lengths without drafts": (amd_models.TABLE, amd_models.table("length"), "table_request_end"),
    "the own block in between": (amd_models.TABLE, amd_models.table("order"), "table_order"),
    "the token before": (KEYS, inserts(by=1), "keys_token_before"),
    "nothing written": (KEYS, lambda index_k, index_cache, index_slot_mapping: None, "keys_unwritten"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_kernel_is_named_in_a_run(what):
    text, function, name = WRONG[what]
    result = ran(text, function)
    assert result.status is Status.FAILED
    assert f"[{name}]" in result.reason
    assert "like one of" not in result.reason


def explained(text, function, toggled=False):
    case = cases.parse_id(text)
    return explain(case, session(case.op, function), line(text), toggled=toggled)


def test_the_worst_of_a_selection_is_told_as_lists():
    found = explained("index_topk_cp/q=4,kv=1300,h=2", amd_models.selects("last"))  # heads stand before rows

    assert found.worst
    assert all("index head" in line and "] instead of [" in line for line in found.worst)


@pytest.mark.parametrize("what", ["a part of the list lost", "no relu", "w for 1 + w", "the own block in between"])
def test_explain_says_the_cause_the_rows_and_the_size(what):
    text, function, name = WRONG[what]
    found = explained(text, function)
    assert (found.status, found.stage) == ("failed", text.partition("/")[0])
    assert found.names == [name]
    assert found.pattern
    assert "instead of" in found.worst[0]
    assert found.heat
    told = render(vars(found), "headline", colour=False)
    assert f"[{name}]" in told
    assert "none of the known mistakes" not in told


def test_rows_of_one_request_alone_are_told_as_such():
    def first_request(q, k, k_scale, weights, starts, ends):
        out = test_logits.windowed()(q, k, k_scale, weights, starts, ends)
        wrong = test_logits.windowed(scaled=False)(q, k, k_scale, weights, starts, ends)
        return torch.where((starts == 0)[:, None], wrong, out)

    found = explained(LOGITS, first_request, toggled=True)
    assert found.names == ["logits_scale_lost"]
    assert found.pattern == "all requests with context % 128 == 70"
    told = {name: clears for name, clears, _ in found.toggles}
    assert told["called again, eagerly"] is False
    assert "one split" not in told


def test_what_no_hypothesis_gives_is_shown_without_a_cause():
    def noise(q, k, k_scale, weights, starts, ends):
        out = test_logits.windowed()(q, k, k_scale, weights, starts, ends)
        return out * (1 + torch.arange(out.shape[1]) * 1e-3)

    found = explained(LOGITS, noise)
    assert found.explained == []
    assert found.worst
    assert "[" not in ran(LOGITS, noise).reason


def test_an_op_without_hypotheses_is_explained_as_far_as_it_goes():
    def page16_rebase(slot_mapping, block_table, block_size):
        return slot_mapping, block_table

    found = explained("page16_rebase/q=9+3,kv=300+130", page16_rebase, toggled=True)
    assert (found.status, found.stage, found.explained) == ("failed", "page16_rebase", [])
    assert found.worst
    assert found.pattern
