"""The adapters to fmha_sm100 and to what vLLM has beside it, on a torch model of them: right ones green, wrong ones red."""

from __future__ import annotations

import functools
import inspect
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import fake_vllm
import pytest
import torch
from fake_fmha_sm100 import Model
from mixed_layers import launched
from torch_kernels import RIGHT as RIGHT_TORCH

from m3check import cases, doctor, invariants, kernels, power, runner
from m3check.arch import ARCHS
from m3check.cli import main
from m3check.kernels import fmha_sm100, vllm_layer
from m3check.kernels.contract import SIGNATURES
from m3check.kernels.fmha_sm100 import data, index_decode, production
from m3check.kernels.fmha_sm100 import sparse_attn_decode as cutlass
from m3check.kernels.fmha_sm100.interface import Interface
from m3check.kernels.layer_standin import FILES, M3, MSA_FILES, LayerWorld
from m3check.kernels.locate import locate
from m3check.kernels.provider import Loaded, Spec, with_chains
from m3check.types import Kernel, M3CheckError, PlanLine, Profile, Status

SPEC = Spec("fmha_sm100", "fmha_sm100")

SCORE = "index_score/q=3+2,kv=300+2177,h=2"
FP8_SCORE = "index_score/q=2,kv=700,h=2,dtype=fp8_e4m3fn,cache=fp8_e4m3fn"
TOPK = "index_topk/q=2+1,kv=2690+300,h=2,init=1,local=2"
DECODE_SCORE = "index_decode_score/q=2x2,kv=300+1,h=2,init=1"
DECODE = "index_decode/q=2x2,kv=2433+300,h=2,mq=4"
PADDED = "index_decode/q=1x2,kv=2305+0,h=2"
ATTEND = "sparse_attn/q=3+2,kv=1409+300,h=2,g=4,topk=4"
FP8_ATTEND = "sparse_attn/q=3,kv=1409,h=2,g=4,topk=4,cache=fp8_e4m3fn,ids=short"
CUTLASS = "sparse_attn_decode/q=1x16,kv=2177+129x15,h=1,g=2,cache=fp8_e4m3fn,scale=scalar,ids=ascending"
PREFILL = "prefill/q=2,kv=2305,h=2,g=2"


@pytest.fixture(autouse=True)
def _power(monkeypatch):
    """What a case could see belongs to the case, not to the kernels that are tested here."""
    monkeypatch.setattr(power, "doubt", lambda case, device: None)


def session(model):
    """A provider of adapters to a model."""
    made, missing = fmha_sm100.adapted(Interface.of(model), SPEC.text)
    every, missing = with_chains(made, missing)
    return runner.Session(ARCHS["sm100"], "interpreted", "cpu", Loaded(SPEC, every, missing, refusal=fmha_sm100.refusal))


def run(model, case, names=()):
    parsed = cases.parse_id(case)
    return runner.run_one(parsed, session(model), PlanLine(case, parsed.op, SPEC.text, "interpreted", None, names), "")


def red(result):
    return {finding.check for finding in result.findings if finding.status is Status.FAILED}


RIGHT = [SCORE, FP8_SCORE, TOPK, DECODE_SCORE, DECODE, PADDED, ATTEND, FP8_ATTEND, CUTLASS, PREFILL]


@pytest.mark.parametrize("case", RIGHT)
def test_the_right_model_passes_all_checks(case):
    result = run(Model(), case)
    assert result.status is Status.PASSED, result.reason
    assert not red(result)


class HeadMajor(Model):
    """A buffer of tokens, heads, tiles read as one of heads, tiles, tokens."""

    def laid_out(self, max_score, t, h, k):
        return max_score.reshape(h, k, t).permute(2, 0, 1)


class LaterToken(Model):
    def last_position(self, offset, i):
        return offset + i + 1


class WithoutOffset(Model):
    """Queries taken for the first of their request."""

    def last_position(self, offset, i):
        return i


class FirstRequestsPages(Model):
    def pages_of(self, plan, kv_indices, request):
        return kv_indices[: plan["kv_page_indptr"][request + 1] - plan["kv_page_indptr"][request]].long()


class ByScore(Model):
    def ordered(self, ids, score):
        return ids


class PageTooFew(Model):
    def seen_pages(self, valid):
        return max(1, valid - 1)


class PageTooMany(Model):
    def seen_pages(self, valid):
        return valid + 1


class HoleInTheMiddle(Model):
    """The unused slots before the ids instead of after them."""

    def padded(self, ids, topk):
        return [-1] * (topk - len(ids)) + ids


class NoLocal(Model):
    def forced(self, score, valid, begin, end):
        return super().forced(score, valid, begin, 0)


class NoInit(Model):
    def forced(self, score, valid, begin, end):
        return super().forced(score, valid, 0, end)


class SlotLost(Model):
    """The last slot of each list dropped on the way into the CSR."""

    def served(self, q2k):
        kept = q2k >= 0
        kept[..., -1] = False
        return kept


class BlockLost(Model):
    """The last block of each list left out of the sum."""

    def merged(self, partial, lse):
        return super().merged(partial[:-1], lse[:-1]) if len(lse) > 1 else super().merged(partial, lse)


class EqualWeights(Model):
    """Blocks merged without their log-sum-exps."""

    def merged(self, partial, lse):
        return partial.float().mean(0)


class OtherBase(Model):
    """Log-sum-exps of base e merged as if their base were 2."""

    def merged(self, partial, lse):
        return super().merged(partial, lse * math.log(2))


class KeyScaleDropped(Model):
    def decode_scales(self, k_scale, v_scale):
        return 1.0, v_scale


class ValueScaleDropped(Model):
    def decode_scales(self, k_scale, v_scale):
        return k_scale, 1.0


class ValueScaleTwice(Model):
    def decode_scales(self, k_scale, v_scale):
        return k_scale, v_scale * v_scale


class Scaled(Model):
    """OnlyScore of logits instead of dots."""

    def scored(self, blocks, sm_scale):
        return blocks * sm_scale


class DeadZero(Model):
    """Blocks that a row does not see, in a tile that others see, hold 0."""

    def scored(self, blocks, sm_scale):
        return blocks.nan_to_num(neginf=0.0)


class FirstRequestsOffset(Model):
    """One prefix length for a mixed batch."""

    def offset_of(self, plan, request):
        return plan["qo_offset"][0]


class SelectedHeadMajor(Model):
    """Scores of tokens, heads, tiles read as heads, tiles, tokens."""

    def by_token(self, max_score, layout):
        t, h, k = max_score.shape
        return max_score.view(h, k, t).permute(2, 0, 1)


class WrittenHeadMajor(Model):
    """Ids of [T, H, topk] written as [H, T, topk]."""

    def sparse_topk_select(self, *args, output, **options):
        t, h, topk = output.shape
        right = super().sparse_topk_select(*args, output=output.clone(), **options)
        output.copy_(right.transpose(0, 1).reshape(t, h, topk))


class Descending(Model):
    def ordered(self, ids, score):
        return ids.sort(descending=True).values


class RowsOffByOne(Model):
    def counted(self, row_ptr):
        return torch.cat([row_ptr[:, :1], row_ptr[:, :-1]], dim=1)


class OneTable(Model):
    """Every request by the page table of the first."""

    def page(self, page_table, request, block):
        return int(page_table[0, block])

    def first_page(self, plan, row):
        return 0


class HalvesExchanged(Model):
    """Values taken for keys and keys for values."""

    def sparse_atten_func(self, q, k, v, *args, **options):
        return super().sparse_atten_func(q, v, k, *args, **options)


@pytest.mark.parametrize(
    ("wrong", "case", "check"),
    [
        (HeadMajor, SCORE, "score"),
        (LaterToken, "index_score/q=2,kv=700,h=2,fill=edge_up", "score"),
        (LaterToken, DECODE_SCORE, "invisible_score"),
        (WithoutOffset, SCORE, "finite_score"),
        (FirstRequestsPages, SCORE, "score"),
        (ByScore, TOPK, "order"),
        (ByScore, DECODE, "order"),
        (PageTooFew, TOPK, "forced"),
        (PageTooMany, TOPK, "ids"),
        (PageTooMany, DECODE, "ids"),
        (HoleInTheMiddle, TOPK, "ids"),
        (NoLocal, "index_topk/q=4,kv=2690,h=2,init=1,local=2", "forced"),
        (NoInit, "index_topk/q=4,kv=2690,h=2,init=3,local=1", "forced"),
        (BlockLost, ATTEND, "token"),
        (BlockLost, FP8_ATTEND, "token"),
        (EqualWeights, ATTEND, "element"),
        (EqualWeights, FP8_ATTEND, "element"),
    ],
)
def test_a_model_with_a_plausible_mistake_is_red(wrong, case, check):
    result = run(wrong(), case)
    assert result.status is Status.FAILED, result.reason
    assert check in red(result), red(result)


@pytest.mark.parametrize(
    ("wrong", "case", "check", "words"),
    [
        (Scaled, SCORE, "score", "the right one times 0.0883883 (a scale applied or lost)"),
        (DeadZero, SCORE, "invisible_score", "2 cells of blocks that their query does not see hold a number, here 0"),
        (FirstRequestsOffset, SCORE, "finite_score", "58 visible cells hold -inf"),
        (SelectedHeadMajor, TOPK, "selection", "was taken and block"),
        (WrittenHeadMajor, TOPK, "ids", "-1 before the end"),
        (Descending, TOPK, "order", "ids are not in ascending order, which this kernel promises"),
        (OtherBase, ATTEND, "token", "times its weight"),
        (OneTable, ATTEND, "element", "request 1,"),
        (HalvesExchanged, ATTEND, "element", "further off than rounding explains"),
        (OneTable, CUTLASS, "element", "request 1,"),
        (KeyScaleDropped, CUTLASS, "scale", "like a softmax scale off by +12"),
        (ValueScaleDropped, CUTLASS, "scale", "like an output off by a factor 0.58"),
        (ValueScaleTwice, CUTLASS, "scale", "like an output off by a factor 1.72"),
    ],
)
def test_a_mistake_is_told_by_what_it_looks_like(wrong, case, check, words):
    result = run(wrong(), case)
    assert result.status is Status.FAILED, result.reason
    told = [f"{f.where}: {f.hint}" for f in result.findings if f.check == check and f.status is Status.FAILED]
    assert any(words in line for line in told), (told, red(result))


TINY = ["index_score/q=1,kv=300,h=1", "index_decode_score/q=1,kv=300,h=1", "sparse_attn/q=1,kv=300,h=1,g=4,topk=4"]


@pytest.mark.parametrize("case", TINY)
def test_a_stride_that_means_nothing_reaches_no_library(case):
    """The model refuses it, as MSA does or as its TMA descriptors do."""
    held, parsed = session(Model()), cases.parse_id(case)
    kernel = held.loaded.kernels[parsed.op]
    bare = replace(kernel, function=kernel.function.__wrapped__)
    for given, status in ((kernel, Status.PASSED), (bare, Status.FAILED)):
        chosen = replace(held, loaded=replace(held.loaded, kernels={parsed.op: given}))
        result = runner.run_one(parsed, chosen, PlanLine(case, parsed.op, "", "interpreted", None, ("strides",)), "")
        assert {f.status for f in result.findings if f.check == "strides"} == {status}, result.reason


@pytest.mark.parametrize("case", ["index_decode_score/q=8,kv=300,h=4", "index_decode_score/q=2,kv=300,h=4"])
def test_a_limit_that_the_kernel_refuses_is_not_asked_of_it(case):
    """CuteDSL takes 32 index heads times drafts: those of the graph, too."""
    result = run(Model(), case, ("room",))
    assert result.status is Status.PASSED, result.reason
    assert "room" in {finding.check for finding in result.findings}


@pytest.mark.parametrize(
    ("case", "asked", "left_out"),
    [
        ("index_topk/q=2+1,kv=2690+300,h=2,init=1", {"repeat", "other_init", "other_topk"}, {"other_topk"}),
        ("index_decode/q=1,kv=2433,h=2", {"all_padded", "empty", "repeat", "other_topk"}, {"other_topk"}),
        ("index_decode_score/q=1,kv=300,h=1", {"all_padded", "empty", "repeat"}, set()),
    ],
)
def test_a_change_that_the_kernel_refuses_does_not_hide_the_others(case, asked, left_out):
    """It has but one topk."""
    result = run(Model(), case, tuple(asked))
    assert result.status is Status.PASSED, result.reason
    assert asked & {finding.check for finding in result.findings} == asked - left_out


@pytest.mark.parametrize("case", [f"{TINY[2]},layout=pool", f"{CUTLASS.replace('2177+129x15', '1x16')},layout=pool"])
def test_rows_with_gaps_reach_no_library(case):
    result = run(Model(), case)
    assert result.status is Status.PASSED, result.reason


def replaced(op, **words):
    """A session whose kernel of an op promises something else."""
    held = session(Model())
    kernel = held.loaded.kernels[op]
    kernel = replace(kernel, profile=replace(kernel.profile, **words))
    return replace(held, loaded=replace(held.loaded, kernels={**held.loaded.kernels, op: kernel}))


@pytest.mark.parametrize(
    ("case", "words", "check"), [(PADDED, {"dead_ids": "empty"}, "ids"), (CUTLASS, {"queries": ""}, "element")]
)
def test_what_a_profile_grants_is_needed(case, words, check):
    """Ids of padded rows, and fp8 queries and weights: without the promise the same answers are red."""
    parsed = cases.parse_id(case)
    line = PlanLine(case, parsed.op, SPEC.text, "interpreted")
    result = runner.run_one(parsed, replaced(parsed.op, **words), line, "")
    assert check in red(result)


def test_fp8_queries_do_not_hide_a_lost_block():
    class Shorter(Model):
        def msa_cutlass_sparse_decode(self, query_fp8, kv_cache, topk, output, metadata, **scales):
            topk = torch.cat([topk[..., 1:], torch.full_like(topk[..., :1], -1)], dim=-1)
            super().msa_cutlass_sparse_decode(query_fp8, kv_cache, topk, output, metadata, **scales)

    result = run(Shorter(), CUTLASS)
    assert "token" in red(result), result.reason


def test_a_wrong_csr_is_told_before_anything_attends_with_it():
    result = run(SlotLost(), ATTEND)
    assert result.status is Status.ERROR
    assert "CSR: row 8 of head 0 ends at 9, wanted 10" in result.reason


def test_rows_of_a_csr_that_are_off_by_one_are_told():
    result = run(RowsOffByOne(), ATTEND)
    assert result.status is Status.ERROR
    assert "CSR: row 1 of head 0 ends at 0, wanted 2" in result.reason


def test_a_wrong_plan_is_told_before_anything_scores_by_it():
    class PageForgotten(Model):
        def _fmha_sm100_plan(self, *args, **options):
            plan = super()._fmha_sm100_plan(*args, **options)
            plan["kv_page_indptr"] = [max(0, n - 1) for n in plan["kv_page_indptr"]]
            return plan

    result = run(PageForgotten(), SCORE)
    assert result.status is Status.ERROR
    assert "plan: kv_page_indptr is [0, 2, 20], wanted [0, 3, 21]" in result.reason


class StalePlan(Model):
    """The plan keeps the lengths that it was made for."""

    def refreshed(self, plan, seq_lens, decode_query_len):
        """Nothing."""


class NoOffsets(Model):
    """Only lengths are brought up to date."""

    def refreshed(self, plan, seq_lens, decode_query_len):
        plan["kv_segment_lens"].copy_(seq_lens.repeat_interleave(decode_query_len))


class PlanEachTime(Model):
    """A new plan in each step, which no captured graph reads."""

    def prepare_decode_metadata(self, *args, plan_cache, **options):
        return super().prepare_decode_metadata(*args, **options)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (StalePlan, "decode plan: kv_segment_lens is [129, 129, 129, 129, 129, 129, 129, 129] …, wanted [2177, 129"),
        (NoOffsets, "decode plan: qo_offset is [128, 128"),
        (PlanEachTime, "decode plan: another object than for the step before"),
    ],
)
def test_a_decode_plan_that_is_not_brought_up_to_date_is_told_before_anything_attends_with_it(wrong, words):
    result = run(wrong(), CUTLASS)
    assert result.status is Status.ERROR
    assert words in result.reason, result.reason


@pytest.mark.parametrize("version", ["0.27.0", "0.33.0"])
def test_vllms_own_kernel_brings_a_decode_plan_up_to_date(version):
    """The part of prepare_decode_metadata that runs without SM100; the plan itself is made by fmha_sm100."""
    pytest.importorskip("triton")
    module = cached_world(version)[0].load(f"{M3}.nvidia.msa_cutlass_sparse_decode")
    lengths, table = torch.tensor([300, 5, 1, 2177], dtype=torch.int32), torch.zeros(4, 3, dtype=torch.int32)
    info = {"kv_segment_lens": torch.zeros(8, dtype=torch.int32), "qo_offset": torch.zeros(8, dtype=torch.int32)}
    held = SimpleNamespace(plan=(None, None, None, info), page_table=table.view(-1))
    assert "kv_segment_lens" in (data.decode_fault(held, held, table, lengths, 2) or "")
    refresh = module._update_runtime_metadata_kernel[(1,)]
    refresh(lengths, info["kv_segment_lens"], info["qo_offset"], num_rows=8, decode_query_len=2, BLOCK_SIZE=128)
    assert data.decode_fault(held, held, table, lengths, 2) is None


def cached_world(version):
    """(a vLLM's modules on SM100, their folder); skips what is not cached."""
    try:
        folder = locate(kernels.parse_spec(f"vllm=={version}"), offline=True).folder
    except M3CheckError as error:
        pytest.skip(str(error))
    return LayerWorld(folder, ARCHS["sm100"], pdl=False), folder


# What is refused, and where.


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("index_score/q=2,kv=300,h=2,d=64", "head_dim 128"),
        ("index_score/q=2,kv=300,h=2,dtype=fp16,cache=fp16", "bf16 or fp8_e4m3fn"),
        ("index_score/q=2,kv=300,h=2,cache=fp8_e4m3fn", "of the same dtype"),
        ("index_score/q=1,kv=1048577,h=1", "8192 tiles"),
        ("index_topk/q=2,kv=300,h=2,topk=8", "topk 16"),
        ("index_topk/q=2,kv=300,h=2,init=9,local=8", "at most 16"),
        ("index_decode_score/q=9,kv=300", "at most 32 index heads"),
        ("index_decode/q=1,kv=300,topk=4", "topk 16"),
        ("sparse_attn/q=2,kv=300,h=2,g=2,topk=5", "topk 4, 8, 16 or 32"),
        ("sparse_attn/q=2,kv=300,h=2,g=5", "1, 2, 4, 8 or 16 query heads"),
        ("sparse_attn/q=2,kv=300,h=2,g=2,cache=fp8_e5m2", "fp8_e4m3fn cache"),
        ("sparse_attn/q=2,kv=300,h=2,g=2,cache=fp8_e4m3fn,scale=scalar", "no k_scale and v_scale"),
        ("prefill/q=2,kv=300,h=2,g=2,cache=fp8_e4m3fn,scale=scalar", "no k_scale and v_scale"),
        ("sparse_attn_decode/q=1x15,kv=300x15,h=2,g=2,cache=fp8_e4m3fn,ids=ascending", "from 16 requests on"),
        ("sparse_attn_decode/q=1x16,kv=300x16,h=2,g=2,cache=fp8_e4m3fn", "ascending order"),
        ("sparse_attn_decode/q=1x16,kv=300x16,h=2,g=2,ids=ascending", "fp8_e4m3fn cache"),
        ("sparse_attn_decode/q=1x16,kv=300x16,h=8,g=2,cache=fp8_e4m3fn,ids=ascending", "at most 4 KV heads"),
        ("sparse_attn_decode/q=1x16,kv=300x16,h=2,g=2,cache=fp8_e4m3fn,scale=token,ids=ascending", "one k_scale"),
        ("sparse_attn_decode/q=33x16,kv=300x16,h=2,g=2,cache=fp8_e4m3fn,ids=ascending", "at most 32 query tokens"),
    ],
)
def test_what_the_kernels_cannot_run_is_refused_with_a_sentence(case, says):
    parsed = cases.parse_id(case)
    assert says in (fmha_sm100.refuses(SPEC, parsed, ARCHS["sm100"], "device") or "")
    if "k_scale and" not in says:  # an invariant holds this prefill against CUTLASS decode of a scaled cache
        assert says in (session(Model()).loaded.refuses(parsed) or "")


def test_it_runs_on_its_own_gpus_only():
    case = cases.parse_id(SCORE)
    assert fmha_sm100.refuses(SPEC, case, ARCHS["sm103"], "device") is None
    assert "needs an SM100 GPU" in (fmha_sm100.refuses(SPEC, case, ARCHS["sm100"], "interpreted") or "")
    assert "on sm90 production runs others" in (fmha_sm100.refuses(SPEC, case, ARCHS["sm90"], "device") or "")
    loaded = kernels.load(SPEC, ARCHS["sm100"], "interpreted", offline=True)
    assert "needs an SM100 GPU" in (loaded.refuses(case) or "")


def test_naming_it_where_it_is_not_ends_the_run(tmp_path):
    with pytest.raises(M3CheckError, match=r"no fmha_sm100/api\.py"):
        kernels.prepare(kernels.parse_spec(f"fmha_sm100:{tmp_path}"))
    with pytest.raises(M3CheckError, match="there is nothing at"):
        kernels.prepare(kernels.parse_spec(f"fmha_sm100:{tmp_path / 'not'}"))
    with pytest.raises(M3CheckError, match="lacks a path"):
        kernels.parse_spec("fmha_sm100:")


# From files.


MIXED = "sparse_attn_decode/q=1,kv=300,h=2,g=2,topk=4,cache=fp8_e4m3fn,scale=scalar"
HELD = "from fake_fmha_sm100 import Model\nheld = Model()\n"


def tree(folder, package):
    """A package of the model, in files."""
    top = folder.joinpath(*package.split("."))
    top.mkdir(parents=True)
    (top / "__init__.py").write_text("")
    lines = {
        "api": ("_fmha_sm100_plan", "_fmha_sm100", "sparse_topk_select"),
        "sparse": ("build_k2q_csr", "sparse_atten_func"),
    }
    for name, functions in lines.items():
        (top / f"{name}.py").write_text(HELD + "".join(f"{each} = held.{each}\n" for each in functions))
    return folder


@pytest.fixture
def clean(monkeypatch):
    """Modules and paths as they were before."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("vllm", "fmha_sm100"):
            del sys.modules[name]


@pytest.mark.parametrize("compiler", [True, False])
def test_without_a_compiler_there_is_a_warning_and_every_call_stops_the_clock(tmp_path, clean, monkeypatch, compiler):
    monkeypatch.setenv("CUDA_HOME", "/cuda" if compiler else "")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys.modules["m3check.kernels.fmha_sm100.locate"], "TOOLKITS", ())
    spec = kernels.parse_spec(f"fmha_sm100:{tree(tmp_path, 'fmha_sm100')}")
    loaded = kernels.load(spec, ARCHS["sm100"], "device", offline=True)
    assert [("set CUDA_HOME" in line) for line in loaded.warnings] == [True] * (not compiler)
    told = []
    loaded.on_compile(told.append)
    held = runner.Session(ARCHS["sm100"], "interpreted", "cpu", loaded)
    result = runner.run_one(cases.parse_id(TINY[0]), held, PlanLine(TINY[0], "index_score", spec.text, "interpreted"), "")
    assert result.status is Status.PASSED, result.reason
    assert told[:4] == [True, False] * 2, "the plan, and OnlyScore"


@pytest.mark.parametrize("inside", ["python/fmha_sm100", "fmha_sm100", ""])
def test_a_checkout_of_msa_has_prefill_and_selection(tmp_path, clean, inside):
    folder = tmp_path if inside else tmp_path / "fmha_sm100"
    tree(folder / "python" if inside.startswith("python") else tmp_path, "fmha_sm100")
    spec = kernels.parse_spec(f"fmha_sm100:{folder}")
    assert kernels.prepare(spec) == ()
    loaded = kernels.load(spec, ARCHS["sm100"], "device", offline=True)
    assert {"index_score", "index_topk", "sparse_attn", "prefill"} <= set(loaded.kernels)
    assert "not in MSA" in loaded.missing["index_decode_score"]
    assert "not in MSA" in (loaded.refuses(cases.parse_id(DECODE)) or "")


def test_kernels_and_doctor_say_whether_it_is_here(tmp_path, clean, monkeypatch, capsys):
    def told():
        assert main(["kernels"]) == 0
        row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| fmha_sm100"))
        return row.split("|")[-2].strip(), next(line.state for line in doctor._providers() if "fmha_sm100" in line.what)

    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    assert told() == ("–", "info")
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(tree(tmp_path, "fmha_sm100")))
    assert told() == ("yes", "ok")


def test_minimaxs_own_msa_is_attended_with_and_not_selected_by(tmp_path, clean):
    """Its scores are [heads, tiles, tokens], its bound is one number, and its attention returns the output."""
    folder = tree(tmp_path, "fmha_sm100") / "fmha_sm100"
    (folder / "api.py").write_text(
        f"{HELD}_fmha_sm100_plan, _fmha_sm100 = held._fmha_sm100_plan, held._fmha_sm100\n"
        "def sparse_topk_select(max_score, topk, num_valid_pages=None, output=None):\n    raise AssertionError\n"
    )
    lines = (folder / "sparse.py").read_text()
    body = "    return held.sparse_atten_func(q, *args, out=q.new_empty(q.shape), **options)\n"
    given = ", ".join(f"{name}=None" for name in inspect.signature(Model.sparse_atten_func).parameters if name not in SLOTS)
    unpacked = "    options = {k: v for k, v in locals().items() if k not in ('q', 'args')}\n"
    (folder / "sparse.py").write_text(f"{lines}\ndef sparse_atten_func(q, *args, {given}):\n{unpacked}{body}")
    spec = kernels.parse_spec(f"fmha_sm100:{tmp_path}")
    loaded = kernels.load(spec, ARCHS["sm100"], "device", offline=True)
    for op in ("index_score", "index_topk", "prefill"):
        assert "this sparse_topk_select has no max_score_layout" in loaded.missing[op]
    case = f"{TINY[2]},layout=pool"
    held = runner.Session(ARCHS["sm100"], "interpreted", "cpu", loaded)
    result = runner.run_one(cases.parse_id(case), held, PlanLine(case, "sparse_attn", spec.text, "interpreted"), "")
    assert result.status is Status.PASSED, result.reason


SLOTS = ("self", "q", "k", "v", "k2q_row_ptr", "k2q_q_indices", "out")


def test_vllm_on_an_sm100_gpu_is_productions_pair_and_elsewhere_triton(tmp_path, clean):
    files = {**fake_vllm.files(), "vllm/__init__.py": "", "vllm/models/minimax_m3/__init__.py": ""}
    packages = ("models", "third_party", "models/minimax_m3/nvidia", "models/minimax_m3/nvidia/ops")
    files |= {f"vllm/{name}/__init__.py": "" for name in packages}
    score = "minimax_m3_index_decode_score_cutedsl"
    files["vllm/models/minimax_m3/nvidia/ops/index_decode_score.py"] = f"{HELD}{score} = held.{score}\n"
    tree(fake_vllm.tree(tmp_path, files), "vllm.third_party.fmha_sm100")
    (tmp_path / "vllm/_version.py").write_text("__version__ = version = '0.33.0'\n")
    spec = kernels.parse_spec(f"vllm:{tmp_path}")
    kernels.prepare(spec)
    wide, short = cases.parse_id("index_topk/q=2,kv=300,h=2"), cases.parse_id("index_topk/q=2,kv=300,h=2,topk=8")
    pair = kernels.load(spec, ARCHS["sm100"], "device", offline=True)
    assert pair.kernel("index_topk", wide).name == "sparse_topk_select"
    assert pair.kernel("index_topk", short).name == "minimax_m3_index_topk"
    assert pair.kernel("index_decode", cases.parse_id("index_decode/q=1,kv=300,h=2")).name.startswith(score)
    assert "MSA's kernels where vLLM selects them" in pair.description["note"]
    assert kernels.suits(spec, "same_as_prefill", cases.parse_id(MIXED), ARCHS["sm100"], "device")
    assert not kernels.suits(spec, "same_as_prefill", cases.parse_id(MIXED), ARCHS["sm100"], "interpreted")
    odd = cases.parse_id("index_decode/q=1,kv=300,h=3")  # which Triton's kernel cannot run, and MSA's can
    assert kernels.refuses(spec, odd, ARCHS["sm100"], "device") is None
    assert pair.refuses(odd) is None
    assert "power of two" in (kernels.refuses(spec, odd, ARCHS["sm100"], "interpreted") or "")
    alone = kernels.load(spec, ARCHS["sm100"], "interpreted", offline=True)
    assert alone.kernel("index_topk", wide).name == "minimax_m3_index_topk"
    assert "these are the Triton ones" in alone.description["note"]
    assert (
        kernels.load(spec, ARCHS["sm90"], "device", offline=True).kernel("index_topk", wide).name == "minimax_m3_index_topk"
    )


@pytest.mark.parametrize(
    ("case", "mixed"),
    [
        ("sparse_attn_decode/q=1,kv=300,h=2,g=2,topk=4", True),
        ("sparse_attn_decode/q=1,kv=300,h=2,g=2,d=64,topk=4", False),
        ("sparse_attn_decode/q=1,kv=300,h=2,g=2,topk=5", False),
        ("index_decode_score/q=1,kv=300,h=2", True),
        ("index_decode_score/q=1,kv=300,h=2,dtype=fp16,cache=fp16", False),
        ("decode/q=1,kv=300,h=2,g=2,topk=4", True),
        ("decode/q=1,kv=300,h=2,g=2,d=64,topk=4", False),
        ("sparse_attn/q=1,kv=300,h=2,g=2,topk=4", False),
    ],
)
def test_cases_on_which_prefill_and_decode_differ_are_known(case, mixed):
    assert production.mixes(cases.parse_id(case)) is mixed


@pytest.mark.parametrize("tier", ["smoke", "ci", "full"])
def test_a_tier_compares_prefill_and_decode_on_such_cases(tier):
    """Attention with scales other than 1 among them, which MSA's prefill is not given."""

    def suits(name, case):
        return name == "same_as_prefill" and production.telling(case)

    some = [case for case in cases.tier(tier) if case.op in ("index_decode_score", "sparse_attn_decode", "decode")]
    costs = [(cases.case_id(case), case, cases.cost(case, "device")) for case in some]
    shown = [n for n, names in invariants.assign(costs, "device", tier, suits).items() if "same_as_prefill" in names]
    telling = [case for case in map(cases.parse_id, shown) if production.telling(case)]
    assert {case.op for case in telling} == {"index_decode_score", "sparse_attn_decode", "decode"}
    assert {case.op for case in telling if case.scales != "none"} == {"sparse_attn_decode", "decode"}


def test_ci_has_cases_that_cutlass_decode_and_the_layer_of_msa_take():
    taken = [case for case in cases.tier("ci") if case.op == "sparse_attn_decode" and cutlass.refusal(case) is None]
    assert [case.scales for case in taken] == ["scalar"]
    layers = [case for case in cases.tier("ci") if case.op == "indexer" and production.takes("index_topk", case)]
    assert {case.scales for case in layers if production.takes("sparse_attn", case)} == {"scalar", "none"}


# The dispatch as a whole: prefill by MSA, decode by Triton.


def pair(model):
    """A provider with production's pair: MSA where vLLM selects it, and plain torch functions in Triton's place."""
    triton = {op: Kernel("vllm", op, f"minimax_m3_{op}", Profile(dequantise="rounded"), f) for op, f in RIGHT_TORCH.items()}
    every, missing = with_chains(triton, {})
    chosen = production.Dispatch.of(triton, Interface.of(model), "vllm")
    loaded = Loaded(Spec("vllm", "vllm"), every, missing, produced=chosen.kernels)
    return runner.Session(ARCHS["sm100"], "interpreted", "cpu", loaded)


def run_pair(model, case, names=()):
    parsed = cases.parse_id(case)
    return runner.run_one(parsed, pair(model), PlanLine(case, parsed.op, "vllm", "interpreted", None, names), "")


@pytest.mark.parametrize(
    ("case", "kernel"),
    [
        ("index_score/q=2,kv=300,h=2", "fmha_sm100 OnlyScore"),
        ("index_score/q=2,kv=300,h=2,d=64", "minimax_m3_index_score"),
        ("index_score/q=2,kv=300,h=2,dtype=fp16,cache=fp16", "minimax_m3_index_score"),
        ("index_topk/q=2,kv=300,h=2", "sparse_topk_select"),
        ("index_topk/q=2,kv=300,h=2,topk=8", "minimax_m3_index_topk"),
        ("index_decode_score/q=1,kv=300,h=2", "minimax_m3_index_decode_score_cutedsl"),
        ("index_decode_score/q=1,kv=300,mq=9", "minimax_m3_index_decode_score"),
        ("index_decode/q=1,kv=300,h=2", "minimax_m3_index_decode_score_cutedsl + sparse_topk_select"),
        ("index_decode/q=1,kv=300,mq=9", "minimax_m3_index_decode_score + sparse_topk_select"),
        ("index_decode/q=1,kv=300,h=2,topk=4", "minimax_m3_index_decode"),
        ("sparse_attn/q=2,kv=300,h=2,g=2,topk=4", "sparse_atten_func"),
        ("sparse_attn/q=2,kv=300,h=2,g=2,topk=5", "minimax_m3_sparse_attn"),
        ("sparse_attn/q=2,kv=300,h=2,g=2,topk=4,cache=fp8_e5m2", "minimax_m3_sparse_attn"),
        ("sparse_attn_decode/q=1,kv=300,h=2,g=2", "minimax_m3_sparse_attn_decode"),
        ("prefill/q=1,kv=300,h=2,g=2,topk=4", "minimax_m3_index_score + minimax_m3_index_topk + sparse_atten_func"),
    ],
)
def test_the_pair_has_the_kernel_that_production_selects(case, kernel):
    parsed = cases.parse_id(case)
    found = pair(Model()).loaded.kernel(parsed.op, parsed)
    assert found.name == kernel


def test_where_msa_does_not_import_triton_does_not_stand_in_for_it():
    class Broken(Model):
        sparse_atten_func = None

    result = run_pair(Broken(), "sparse_attn/q=2,kv=300,h=2,g=2,topk=4")
    assert result.status is Status.SKIPPED
    found = pair(Broken()).loaded.kernel("sparse_attn", cases.parse_id("sparse_attn/q=2,kv=300,h=2,g=2,topk=5"))
    assert found.name == "minimax_m3_sparse_attn"


SAME = ("same_as_prefill",)


@pytest.mark.parametrize(
    "case",
    [
        "sparse_attn_decode/q=2,kv=700,h=2,g=2,topk=4",
        "sparse_attn_decode/q=2,kv=700,h=2,g=2,topk=4,cache=fp8_e4m3fn",
        "sparse_attn_decode/q=2,kv=700,h=2,g=2,topk=5,cache=fp8_e4m3fn,scale=scalar",  # Triton does both
        "index_decode_score/q=2x2,kv=300+500,h=2",
        "decode/q=2,kv=2305,h=2,g=2",
    ],
)
def test_prefill_and_decode_agree_where_scales_are_one(case):
    result = run_pair(Model(), case, SAME)
    assert result.status is Status.PASSED, result.reason
    assert "same_as_prefill" in {finding.check for finding in result.findings}


class Hearing(Model):
    """A prefill whose caller folds k_scale into sm_scale; it multiplies by v_scale before it rounds."""

    v_scale = 1.0

    def merged(self, partial, lse):
        return super().merged(partial, lse) * self.v_scale

    def told(self, kernel):
        """MSA's prefill kernel as a caller that minds the scales would call it."""

        @functools.wraps(kernel.function)
        def sparse_attn(*, sm_scale, k_scale, v_scale, **given):
            self.v_scale = float(v_scale)
            kernel.function(sm_scale=sm_scale * float(k_scale), **given)

        return replace(kernel, function=sparse_attn)


DECODES = {
    "Triton": (run_pair, "sparse_attn_decode/q=2,kv=700,h=2,g=2,topk=4,cache=fp8_e4m3fn,scale=scalar"),
    "Triton, by token": (run_pair, "sparse_attn_decode/q=2,kv=700,h=2,g=2,topk=4,cache=fp8_e4m3fn,scale=token"),
    "CuteDSL": (run_pair, "decode/q=2,kv=2305,h=1,g=2,cache=fp8_e4m3fn,scale=scalar"),
    "CUTLASS": (run, CUTLASS),
}


@pytest.mark.parametrize(("by", "case"), DECODES.values(), ids=DECODES)
def test_a_prefill_that_ignores_scales_is_found_beside_a_decode_that_does_not(by, case):
    """vLLM 0.33.0 on SM100: sparse_atten_func is given no scales, and each of its decodes multiplies by them."""
    result = by(Model(), case, SAME)
    assert result.status is Status.FAILED, result.reason
    assert red(result) == {"same_as_prefill"}


@pytest.mark.parametrize("name", ["Triton", "CuteDSL", "CUTLASS"])
def test_a_prefill_that_minds_the_scales_agrees_with_each_decode(name, monkeypatch):
    by, case = DECODES[name]
    model, original = Hearing(), fmha_sm100.adapted

    def adapted(interface, provider):
        made, missing = original(interface, provider)
        return {**made, "sparse_attn": model.told(made["sparse_attn"])}, missing

    monkeypatch.setattr(fmha_sm100, "adapted", adapted)
    monkeypatch.setattr(production, "adapted", adapted)
    result = by(model, case, SAME)
    assert result.status is Status.PASSED, result.reason
    assert "same_as_prefill" in {finding.check for finding in result.findings}


def test_an_indexer_whose_prefill_scores_otherwise_than_cutedsl_is_found():
    result = run_pair(Scaled(), "index_decode_score/q=2x2,kv=300+500,h=2", SAME)
    assert red(result) == {"same_as_prefill"}, result.reason


def test_the_prefill_itself_is_red_on_a_scaled_cache():
    result = run_pair(Model(), "sparse_attn/q=2,kv=700,h=2,g=2,topk=4,cache=fp8_e4m3fn,scale=scalar")
    assert result.status is Status.FAILED
    assert "element" in red(result)


# A whole layer of it: vLLM's own classes out of the wheel around a model of what they call.

MIXED_LAYER = "indexer/q=2x2+3+1,kv=2305+0+400+300,h=2,g=1,mq=2"
DECODED_LAYER = "indexer/q=1x3,kv=2305+0+300,h=1,g=1,init=1"
SCALED_LAYER = "indexer/q=1+2,kv=258+200,h=1,g=1,cache=fp8_e4m3fn,scale=scalar"


def layer(model, version="0.33.0"):
    """A vLLM's classes on SM100 with torch functions in place of Triton's kernels; skips what is not cached."""
    world, folder = cached_world(version)
    for name, stem in (("index_topk", "index"), ("sparse_attn", "sparse_attn")):
        functions = {f"minimax_m3_{op}": positional(op) for op in RIGHT_TORCH if op.startswith(stem)}
        world.add(f"{M3}.common.ops.{name}", SPARSE_BLOCK_SIZE=128, **functions)
    triton = {op: Kernel("vllm", op, f"minimax_m3_{op}", Profile(dequantise="rounded"), f) for op, f in RIGHT_TORCH.items()}
    maker = vllm_layer.LayerMaker(world, vllm_layer.buffer_layout(folder, ARCHS["sm100"]))
    triton["indexer"] = Kernel("vllm", "indexer", "layer", Profile(dequantise="rounded"), maker)
    interface = Interface.of(model)
    held = {name: launched(function) for name, function in vars(interface).items() if callable(function)}
    chosen = production.Dispatch.of(triton, replace(interface, **held), "vllm")
    loaded = Loaded(Spec("vllm", "vllm"), triton, chosen.missing, produced=chosen.kernels)
    return runner.Session(ARCHS["sm100"], "interpreted", "cpu", loaded)


def positional(op):
    """A torch function with the order of arguments of vLLM's, and their buffers."""
    order = [*SIGNATURES[op][0]]
    takes = inspect.signature(RIGHT_TORCH[op]).parameters

    @launched
    def call(*args, **options):
        given = dict(zip(order, args, strict=False)) | options
        result = RIGHT_TORCH[op](**{name: value for name, value in given.items() if name in takes})
        out = given.get("score_out" if op.endswith("score") else "out")
        if out is not None:
            out[:, : result.shape[1], : result.shape[2]] = result
        return result

    return call


def run_layer(model, case, names=(), version="0.33.0", **constants):
    """`constants` replace those of the indexer's module."""
    held, parsed = layer(model, version), cases.parse_id(case)
    maker = held.loaded.kernel("indexer", parsed).function
    vars(maker.world.load(MSA_FILES[0])).update(constants)
    line = PlanLine(case, "indexer", "vllm", "interpreted", None, names)
    return runner.run_one(parsed, held, line, "")


@pytest.mark.parametrize(
    ("case", "version", "names"),
    [(MIXED_LAYER, "0.27.0", ()), (MIXED_LAYER, "0.33.0", ()), (DECODED_LAYER, "0.33.0", ("stale",))],
)
def test_vllms_msa_classes_are_a_layer(case, version, names):
    result = run_layer(Model(), case, names, version)
    assert result.status is Status.PASSED, result.reason
    assert result.kernel == "MiniMaxM3IndexerMSAImpl + MiniMaxM3SparseMSAImpl"
    assert {"metadata", "guards", "ids", "element", *names} <= {finding.check for finding in result.findings}


@pytest.mark.parametrize(
    ("constants", "check", "words"),
    [
        ({"PAGE_SIZE": 64}, "metadata", "topk_num_valid_pages` of the indexer's metadata: holds 37+1+5, wanted 19+?+3"),
        ({"_SCORE_SENTINEL": 0.0}, "metadata", "`index.unified_scores`: not -inf after `build`"),
    ],
)
def test_a_builder_of_msa_with_a_mistake_is_told_by_its_field(constants, check, words):
    result = run_layer(Model(), DECODED_LAYER, **constants)
    told = [f"{f.where}: {f.hint}" for f in result.findings if f.check == check and f.status is Status.FAILED]
    assert any(words in line for line in told), (told, result.reason)


def test_a_layer_whose_prefill_ignores_scales_is_red_in_its_prefilled_rows():
    """Decode multiplies by k_scale and v_scale, sparse_atten_func is given none."""
    result = run_layer(Model(), SCALED_LAYER)
    told = {f.check: f.where for f in result.findings if f.status is Status.FAILED}
    assert "request 1" in told["element"], told
    assert not {"metadata", "handover", "ids", "guards"} & told.keys()


@pytest.mark.parametrize(("longest", "called"), [(16, True), (17, False)])
def test_cutedsl_scores_where_index_heads_times_queries_are_32_at_most(longest, called):
    class Spied(Model):
        asked = False

        def minimax_m3_index_decode_score_cutedsl(self, *args, **options):
            self.asked = True
            return super().minimax_m3_index_decode_score_cutedsl(*args, **options)

    model, case = Spied(), f"indexer/q=1,kv=300,h=2,g=1,mq={longest}"
    result = run_layer(model, case)
    assert result.status is Status.PASSED, result.reason
    assert model.asked is called is not index_decode.too_wide(cases.parse_id(case))


@pytest.mark.parametrize(
    ("case", "classes"),
    [
        ("indexer/q=1,kv=300,h=2,g=2", (True, True)),
        ("indexer/q=1,kv=300,h=2,g=2,topk=8", (False, True)),
        ("indexer/q=1,kv=300,h=2,g=2,cache=fp8_e5m2", (True, False)),
        ("indexer/q=1,kv=300,h=2,g=2,topk=6", (False, False)),
        ("indexer/q=1,kv=300,h=2,g=2,d=64", (False, False)),
    ],
)
def test_a_layer_has_the_classes_that_vllm_selects(case, classes):
    parsed = cases.parse_id(case)
    maker = layer(Model()).loaded.kernel("indexer", parsed).function
    assert maker.msa == classes
    world = maker.world
    world.config = SimpleNamespace(attention_config=SimpleNamespace(minimax_m3_indexer_cp=False))
    index, main = (world.load(name) for name in FILES)
    word = "fp8_e5m2" if parsed.cache_dtype == "fp8_e5m2" else "auto"
    with world.entered():
        chosen = (
            index.select_indexer_impl_cls(topk_blocks=parsed.topk, indexer_kv_dtype="bf16").__name__,
            main.select_main_impl_cls(topk_blocks=parsed.topk, kv_cache_dtype=word, num_kv_heads=2).__name__,
        )
    assert chosen == maker.names or parsed.head_dim != 128  # no model has another
