"""The adapters to flashinfer.msa_ops on a torch model of it: right ones green, wrong ones red; what it refuses."""

from __future__ import annotations

import math
import sys

import pytest
from fake_flashinfer import Model

from m3check import cases, kernels, power, runner
from m3check.arch import ARCHS
from m3check.kernels import flashinfer
from m3check.kernels.provider import Loaded, Spec, with_chains
from m3check.types import M3CheckError, PlanLine, Status

SPEC = Spec("flashinfer", "flashinfer")

SCORE = "index_score/q=3+2,kv=300+700,h=2"
MIXED_SCORE = "index_score/q=2,kv=700,h=2,cache=fp8_e4m3fn"
TOPK = "index_topk/q=2+1,kv=2690+300,h=2,init=1,local=2"
DECODE_SCORE = "index_decode_score/q=2x2,kv=300+1,h=2,init=1,dtype=fp16,cache=fp16"
DECODE = "index_decode/q=1x3,kv=2433+300+0,h=2"
ATTEND = "sparse_attn/q=3+2,kv=1409+300,h=2,g=4,topk=4,layout=nhd,ids=ascending"
SCALED = "sparse_attn/q=3,kv=1409,h=2,g=4,topk=4,cache=fp8_e4m3fn,scale=scalar,ids=ascending"
ATTEND_DECODE = "sparse_attn_decode/q=2x2,kv=1409+300,h=2,g=4,topk=4,cache=fp8_e4m3fn,scale=scalar,ids=ascending"
WHOLE = "decode/q=2,kv=2305,h=2,g=2"


@pytest.fixture(autouse=True)
def _power(monkeypatch):
    monkeypatch.setattr(power, "doubt", lambda case, device: None)


def run(model, case, names=()):
    parsed = cases.parse_id(case)
    every, missing = with_chains(flashinfer.adapted(flashinfer.Interface.of(model), SPEC.text), {})
    loaded = Loaded(SPEC, every, missing, refusal=flashinfer.refusal)
    session = runner.Session(ARCHS["sm120"], "interpreted", "cpu", loaded)
    return runner.run_one(parsed, session, PlanLine(case, parsed.op, SPEC.text, "interpreted", None, names), "")


def red(result):
    return {finding.check for finding in result.findings if finding.status is Status.FAILED}


@pytest.mark.parametrize("case", [SCORE, MIXED_SCORE, TOPK, DECODE_SCORE, DECODE, ATTEND, SCALED, ATTEND_DECODE, WHOLE])
def test_the_right_model_passes_all_checks(case):
    result = run(Model(), case)
    assert result.status is Status.PASSED, result.reason
    assert not red(result)


@pytest.mark.parametrize("case", [ATTEND_DECODE, WHOLE])
def test_prefill_and_decode_agree(case):
    result = run(Model(), case, ("same_as_prefill",))
    assert result.status is Status.PASSED, result.reason
    assert "same_as_prefill" in {finding.check for finding in result.findings}


class LaterToken(Model):
    def limit(self, position):
        return position + 2


class FirstRequest(Model):
    def page(self, page_table, request, block):
        return int(page_table[0, block])


class OneBlockMore(Model):
    def bound(self, valid):
        return valid + 1


class OneBlockLess(Model):
    def bound(self, valid):
        return max(1, valid - 1)


class Descending(Model):
    def ordered(self, ids):
        return sorted(ids, reverse=True)


class BlockLost(Model):
    def attends(self, ids):
        return ids[1:]


class ValueScaleDropped(Model):
    def scaled(self, out, v_global_scale):
        return out


class EqualWeights(Model):
    def merged(self, partial, lse):
        return partial.float().mean(0)


class OtherBase(Model):
    """Log-sum-exps of base e merged as if their base were 2."""

    def merged(self, partial, lse):
        return super().merged(partial, lse * math.log(2))


class KeyScaleDropped(Model):
    """The softmax scale of the head_dim, whatever is asked."""

    def softmax(self, scale):
        return 128**-0.5


class ValueScaleTwice(Model):
    def scaled(self, out, v_global_scale):
        return super().scaled(super().scaled(out, v_global_scale), v_global_scale)


class Scaled(Model):
    """Scores of logits instead of dots."""

    def scored(self, best):
        return best * 128**-0.5


class DeadZero(Model):
    def hidden(self):
        return 0.0


class WrittenHeadMajor(Model):
    """Ids of [T, H, topk] written as [H, T, topk]."""

    def msa_topk_select(self, *args, output, **options):
        right = super().msa_topk_select(*args, output=output.clone(), **options)
        output.copy_(right.transpose(0, 1).reshape(output.shape))


class NoLocal(Model):
    def msa_topk_select(self, *args, force_end_blocks, **options):
        return super().msa_topk_select(*args, force_end_blocks=0, **options)


class FirstRequestsOffset(Model):
    """One prefix length for a mixed batch."""

    def msa_proxy_score(self, q, k, cu_seqlens_q, *, seqused_k, **options):
        lens = cu_seqlens_q.diff()
        same = lens + (seqused_k - lens)[0]
        return super().msa_proxy_score(q, k, cu_seqlens_q, seqused_k=same.int(), **options)


@pytest.mark.parametrize(
    ("wrong", "case", "check"),
    [
        (LaterToken, "index_score/q=2,kv=700,h=2,fill=edge_up", "score"),
        (LaterToken, ATTEND, "token"),
        (FirstRequest, SCORE, "score"),
        (FirstRequest, ATTEND_DECODE, "element"),
        (OneBlockMore, TOPK, "ids"),
        (OneBlockLess, TOPK, "forced"),
        (Descending, DECODE, "order"),
        (BlockLost, ATTEND, "token"),
        (ValueScaleDropped, SCALED, "element"),
        (ValueScaleDropped, ATTEND_DECODE, "element"),
        (EqualWeights, ATTEND_DECODE, "element"),
        (OtherBase, ATTEND, "element"),
        (KeyScaleDropped, SCALED, "scale"),
        (KeyScaleDropped, ATTEND_DECODE, "scale"),
        (ValueScaleTwice, ATTEND_DECODE, "scale"),
        (Scaled, SCORE, "score"),
        (DeadZero, SCORE, "invisible_score"),
        (WrittenHeadMajor, TOPK, "ids"),
        (NoLocal, "index_topk/q=4,kv=2690,h=2,init=1,local=2", "forced"),
        (FirstRequestsOffset, SCORE, "finite_score"),
    ],
)
def test_a_model_with_a_plausible_mistake_is_red(wrong, case, check):
    result = run(wrong(), case)
    assert result.status is Status.FAILED, result.reason
    assert check in red(result), red(result)


@pytest.mark.parametrize("case", ["index_score/q=1,kv=300,h=1", "sparse_attn/q=1,kv=300,h=1,g=4,topk=4,ids=ascending"])
def test_a_stride_that_means_nothing_reaches_no_library(case):
    result = run(Model(), case, ("strides",))
    assert result.status is Status.PASSED, result.reason
    assert "strides" in {finding.check for finding in result.findings}


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("index_score/q=2,kv=300,h=2,d=64", "head_dim 128"),
        ("index_score/q=2,kv=300,h=2,dtype=fp32,cache=fp32", "fp8_e4m3fn keys"),
        ("index_score/q=2,kv=300,h=2,layout=pool", "without gaps"),
        ("index_topk/q=2,kv=300,h=2,topk=8", "topk 16"),
        ("index_topk/q=2,kv=300,h=2,init=9,local=9", "at most 16"),
        ("sparse_attn/q=2,kv=300,h=2,g=5", "power of two"),
        ("sparse_attn_decode/q=2,kv=300,h=1,g=32", "up to 16"),
        ("sparse_attn/q=2,kv=300,h=2,g=2,cache=fp8_e4m3fn,scale=token", "one k_scale"),
        ("sparse_attn/q=2,kv=300,h=2,g=2,cache=fp8_e5m2", "fp8_e4m3fn"),
        ("decode/q=1,kv=300,h=2,g=2,topk=4", "topk 16"),
    ],
)
def test_what_it_cannot_run_is_refused_with_a_sentence(case, says):
    assert says in (flashinfer.refuses(SPEC, cases.parse_id(case), ARCHS["sm120"], "device") or "")


def test_it_runs_on_its_own_gpu_only():
    case = cases.parse_id(SCORE)
    assert flashinfer.refuses(SPEC, case, ARCHS["sm120"], "device") is None
    assert "needs an SM121 GPU" in (flashinfer.refuses(SPEC, case, ARCHS["sm121"], "interpreted") or "")
    assert "SM120 and SM121 only" in (flashinfer.refuses(SPEC, case, ARCHS["sm90"], "device") or "")
    loaded = flashinfer.load(SPEC, ARCHS["sm120"], "interpreted", offline=True)
    assert "needs an SM120 GPU" in (loaded.refuses(case) or "")


def test_naming_it_where_it_is_not_ends_the_run(tmp_path):
    with pytest.raises(M3CheckError, match="has no flashinfer/msa_ops"):
        kernels.prepare(kernels.parse_spec(f"flashinfer:{tmp_path}"))
    with pytest.raises(M3CheckError, match="lacks a path"):
        kernels.parse_spec("flashinfer:")


def test_a_checkout_is_loaded_on_its_gpu(tmp_path, monkeypatch):
    folder = tmp_path / "flashinfer/msa_ops"
    folder.mkdir(parents=True)
    (tmp_path / "flashinfer/__init__.py").write_text("")
    lines = ["from fake_flashinfer import Model", "held = Model()"]
    lines += [f"{name} = held.{name}" for name in flashinfer.Interface.__annotations__]
    (folder / "__init__.py").write_text("\n".join(lines))
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = kernels.parse_spec(f"flashinfer:{tmp_path}")
    assert kernels.prepare(spec) == ()
    loaded = kernels.load(spec, ARCHS["sm120"], "device", offline=True)
    assert {"prefill", "decode", "index_score"} <= set(loaded.kernels)
    for name in [name for name in sys.modules if name.partition(".")[0] == "flashinfer"]:
        del sys.modules[name]
