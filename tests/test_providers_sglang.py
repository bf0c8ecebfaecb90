"""SGLang's kernels: where they are found, how they are called through views of the contract's memory, what they refuse."""

from __future__ import annotations

import sys
from dataclasses import replace

import fake_sglang
import pytest
import torch
from fake_vllm import wheel

from m3check import cases, checks, kernels, reference
from m3check.arch import ARCHS
from m3check.kernels import contract, wheelfile, wheels
from m3check.kernels.locate import locate
from m3check.kernels.project import SGLANG
from m3check.paging import World
from m3check.types import OPS, RED, Case, M3CheckError

pytest.importorskip("triton")

SMALL = {"kv_heads": 2, "gqa": 2, "head_dim": 16, "topk": 3}
BATCH = {
    "prefill": {"query_lens": (3, 2), "kv_lens": (700, 130)},
    "decode": {"query_lens": (2, 2, 2), "kv_lens": (700, 0, 513)},
}
SINGLE = [op.name for op in OPS.values() if op.name in ("index_score", "index_topk", "index_decode_score", "index_decode",
                                                         "sparse_attn", "sparse_attn_decode")]  # fmt: skip


def small(op, **axes):
    return Case(op=op, **{**SMALL, **BATCH[OPS[op].phase], **axes})


def load(text, arch="sm90", evidence="interpreted"):
    return kernels.load(kernels.parse_spec(text), ARCHS[arch], evidence, offline=True)


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    return load(f"sglang:{fake_sglang.tree(tmp_path_factory.mktemp('new'), fake_sglang.files())}")


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    return load(f"sglang:{fake_sglang.tree(tmp_path_factory.mktemp('old'), fake_sglang.files(old=True))}")


def attended(problem):
    """For a chain: the attention on any ids, as the runner gives it to the checks."""
    if not OPS[problem.case.op].chain:
        return None
    last = OPS[problem.case.op].chain[-1]
    return lambda ids: reference.expected(replace(problem, case=replace(problem.case, op=last), topk_idx=ids))


def judged(loaded, case, world=None):
    """Names of the checks that refuse one call."""
    from m3check.checks import Setting

    kernel = loaded.kernels[case.op]
    inputs = cases.make_inputs(case)
    problem = reference.dequantised(inputs, "folded")
    run = contract.call(kernel, inputs, world)
    setting = Setting(profile=kernel.profile, evidence="interpreted")
    return {
        f.check
        for f in checks.compare(problem, run, reference.expected(problem), setting, attended(problem))
        if f.status in RED
    }


# Where the files are.


@pytest.mark.parametrize("place", ["", "python/", "old"])
def test_checkouts_of_both_times_and_package_folders_are_found(place, tmp_path):
    is_old = place == "old"
    fake_sglang.tree(tmp_path / place.strip("old"), fake_sglang.files(old=is_old))
    loaded = load(f"sglang:{tmp_path}")
    assert judged(loaded, small("index_score")) == set()
    assert loaded.kernels["index_score"].profile.id_order == ("score" if is_old else "ascending")
    assert not any(name.partition(".")[0] == "sglang" for name in sys.modules), "stand-ins were left behind"


def test_a_wheel_is_read_and_checked_like_vllms(tmp_path, monkeypatch):
    monkeypatch.setenv("M3CHECK_CACHE", str(tmp_path / "cache"))
    made = wheel(tmp_path / "mine", "0.9.0", fake_sglang.files(), project="sglang")
    assert "RECORD only" in load(f"sglang:{made}").warnings[0]
    honest = fake_sglang.files()
    path = f"{fake_sglang.NEW}/common/utils.py"
    other = wheel(tmp_path / "other", "0.9.1", {**honest, path: honest[path] + "# more"}, recorded=honest, project="sglang")
    with pytest.raises(M3CheckError, match=r"utils\.py is not what sglang 0\.9\.1's RECORD says"):
        load(f"sglang:{other}")
    monkeypatch.setattr(wheels, "_fetch", lambda project, _, target, __: wheelfile.extract_wheel(project, made, target))
    kernels.prepare(kernels.parse_spec("sglang==0.9.0"))
    assert load("sglang==0.9.0").description["version"] == "0.9.0"


def test_what_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(M3CheckError, match=r"has no sglang/kernels/ops/attention/minimax_sparse and no sglang/srt"):
        load(f"sglang:{tmp_path}")
    with pytest.raises(M3CheckError, match=r"sglang is not installed here; .*sglang==0\.5\.23.*sglang:PATH"):
        load("sglang")
    with pytest.raises(M3CheckError, match=r"wanted a version after ==, such as sglang==0\.5\.23"):
        kernels.parse_spec("sglang==new")


def test_a_version_without_one_of_the_wrappers_has_the_other_ops(tmp_path):
    fake_sglang.tree(tmp_path, fake_sglang.files())
    (tmp_path / fake_sglang.NEW / "decode/topk_sparse.py").write_text("")
    loaded = load(f"sglang:{tmp_path}")
    assert "has no flash_decode_with_gqa_share_sparse in" in loaded.missing["sparse_attn_decode"]
    assert "sparse_attn_decode" in loaded.missing["decode"]
    assert judged(loaded, small("prefill")) == set()


def test_what_the_stand_in_lacks_is_named_with_file_and_line(tmp_path):
    fake_sglang.tree(tmp_path, fake_sglang.files())
    file = tmp_path / fake_sglang.NEW / "decode/topk_sparse.py"
    file.write_text(file.read_text() + "\nget_platform().is_npu\n")
    with pytest.raises(M3CheckError, match=r"topk_sparse\.py:\d+ does not import: AttributeError.*'is_npu'"):
        load(f"sglang:{tmp_path}")


@pytest.mark.parametrize(
    ("arch", "hopper", "rocm"), [("sm90", True, False), ("sm100", False, False), ("gfx942", False, True)]
)
def test_the_target_is_presented_while_files_are_imported(arch, hopper, rocm, tmp_path):
    loaded = load(f"sglang:{fake_sglang.tree(tmp_path, fake_sglang.files())}", arch)
    wrapped = loaded.kernels["sparse_attn"].function.__wrapped__
    module = wrapped.__self__._prefill
    presented = (module.HOPPER, module.ROCM)
    assert presented == (hopper, rocm)
    assert torch.version.hip is None


# Through views of the contract's memory.


@pytest.mark.parametrize("layout", ["hnd", "nhd", "pool"])
@pytest.mark.parametrize("op", [*SINGLE, "prefill", "decode"])
def test_a_right_kernel_is_right_in_every_layout(op, layout, fake):
    assert judged(fake, small(op, layout=layout)) == set()


def test_no_key_is_copied_and_memory_that_nobody_owns_keeps_its_poison():
    from m3check.kernels.sglang.views import slots

    cache = torch.full((3, 2, 128, 8), float("nan"))
    cache[1, :, :5] = torch.arange(80.0).view(2, 5, 8)
    view, table = slots(cache[..., :4], torch.tensor([[1, 2]], dtype=torch.int32))
    assert view.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()
    assert table.shape == (1, 256)
    assert torch.equal(view[table[0, :5].long()], cache[1, :, :5, :4].transpose(0, 1))
    assert view[table[0, 5:].long()].isnan().all(), "dead slots of a page, and the next page"
    with pytest.raises(M3CheckError, match="no multiple"):
        slots(torch.empty(3, 2, 130, 8)[:, :, :128].as_strided((3, 1, 128, 4), (1001, 8, 8, 1)), table)


def test_a_kernel_that_reads_a_token_too_many_is_refused(tmp_path):
    files = fake_sglang.files()
    for stem in ("decode/flash_with_topk_idx", "decode/topk_sparse"):
        path = f"{fake_sglang.NEW}/{stem}.py"
        files[path] = files[path].replace("seq_lens.tolist()", "(seq_lens + 1).tolist()")
    loaded = load(f"sglang:{fake_sglang.tree(tmp_path, files)}")
    for op in ("index_decode_score", "sparse_attn_decode"):
        assert judged(loaded, small(op)), op


def test_a_kernel_that_takes_slots_for_positions_is_refused(tmp_path):
    files = fake_sglang.files()
    path = f"{fake_sglang.NEW}/common/utils.py"
    files[path] = files[path].replace("slots = table[at[at < seen]].long()", "slots = at[at < seen].long()")
    assert judged(load(f"sglang:{fake_sglang.tree(tmp_path, files)}"), small("sparse_attn"))


# Scoring fused with attention, and an indexer of several processes.


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    return load(f"sglang_fused:{fake_sglang.tree(tmp_path_factory.mktemp('fused'), fake_sglang.files())}")


@pytest.mark.parametrize("layout", ["hnd", "nhd", "pool"])
@pytest.mark.parametrize("op", [*SINGLE, "decode"])
def test_one_pass_that_scores_and_attends_is_right_in_every_layout(op, layout, fused):
    topk = 6 if "ids" not in OPS[op].outputs or op == "decode" else 3
    assert judged(fused, small(op, layout=layout, topk=topk)) == set()
    assert fused.kernels["sparse_attn"].name == "flash_prefill_with_topk_index"


def test_one_pass_over_a_scaled_cache_is_right(fused):
    for op in ("sparse_attn", "sparse_attn_decode"):
        assert judged(fused, small(op, topk=6, cache_dtype="fp8_e4m3fn", scales="scalar")) == set()


def test_one_pass_that_reads_a_token_too_many_or_leaves_a_block_out_is_refused(tmp_path):
    for place, old, new in (
        ("decode", "seq_lens.tolist()", "(seq_lens + 1).tolist()"),
        ("common", "(-(-seen // 128))", "(1)"),
    ):
        files = fake_sglang.files()
        path = f"{fake_sglang.NEW}/{'common/utils' if place == 'common' else 'decode/flash_with_topk_idx'}.py"
        assert old in files[path]
        files[path] = files[path].replace(old, new)
        assert judged(
            load(f"sglang_fused:{fake_sglang.tree(tmp_path / place, files)}"), small("sparse_attn_decode", topk=6)
        )


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"op": "sparse_attn", "topk": 5}, "must name them all; got 5 of 6"),
        ({"op": "sparse_attn_decode", "topk": 6, "ids": "short"}, "must name them all; got ids=short"),
        ({"op": "sparse_attn", "topk": 6, "head_dim": 512}, "head_dim of at most 256"),
        ({"op": "decode"}, "must name them all"),
    ],
)
def test_one_pass_wants_lists_of_every_block(axes, words, fused):
    assert words in (fused.refuses(small(**axes)) or "")


SHARED = Case(op="index_decode_cp", kv_heads=2, head_dim=128, topk=16, query_lens=(2, 2, 2), kv_lens=(2600, 300, 1))


def test_an_indexer_of_several_processes_is_put_together(tmp_path):
    files = fake_sglang.files()
    loaded = load(f"sglang:{fake_sglang.tree(tmp_path / 'right', files)}", "gfx942")
    assert judged(loaded, SHARED) == set()
    path = f"{fake_sglang.NEW}/decode/indexer_cp.py"
    files[path] = files[path].replace("* scores.shape[0] + rank", "* scores.shape[0]")
    assert judged(load(f"sglang:{fake_sglang.tree(tmp_path / 'wrong', files)}", "gfx942"), SHARED)


def test_who_has_an_indexer_of_several_processes_and_what_it_refuses(fake, tmp_path):
    assert "path on AMD" in fake.missing["index_decode_cp"]
    early = load(f"sglang:{fake_sglang.tree(tmp_path / 'old', fake_sglang.files(old=True))}", "gfx942")
    assert "has no score_local_blocks" in early.missing["index_decode_cp"]
    loaded = load(f"sglang:{fake_sglang.tree(tmp_path / 'new', fake_sglang.files())}", "gfx942")
    for axes, words in (
        ({"topk": 8}, "topk of 16"),
        ({"topk": 24}, "topk of 16"),
        ({"kv_heads": 1}, "got 1"),
        ({"head_dim": 64}, "head_dim of 128"),
        ({"dtype": "fp32", "cache_dtype": "fp32"}, "got fp32"),
    ):
        assert words in (loaded.refuses(replace(SHARED, **axes)) or ""), axes


# Scores, scales, and what is refused.


def test_scores_are_not_scaled(fake):
    case = small("index_score", fill="integer")
    inputs = cases.make_inputs(case)
    score = contract.call(fake.kernels["index_score"], inputs).outputs["score"]
    wanted = reference.expected(inputs)["score"]
    assert torch.equal(score[wanted.isfinite()].double(), wanted[wanted.isfinite()])


def test_the_scores_behind_a_selection_are_given_where_rows_own_them(fake):
    inputs = cases.make_inputs(small("index_decode"))
    run = contract.call(fake.kernels["index_decode"], inputs, World(poison="garbage"))
    forced = run.outputs["score"]
    assert float(forced[0, 1, 5]) == pytest.approx(1e29), "the last query of 700 tokens is in block 5"
    assert not any(guard.overwritten() for guard in run.guards)


@pytest.mark.parametrize("op", ["sparse_attn", "sparse_attn_decode"])
def test_one_scale_is_folded_into_logits_and_output(op, fake, old):
    case = small(op, cache_dtype="fp8_e4m3fn", scales="scalar")
    assert judged(fake, case) == set()
    assert "takes no k_scale and v_scale" in (old.refuses(case) or "")
    assert "none for each token" in (fake.refuses(replace(case, scales="token")) or "")


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"op": "index_score", "dtype": "fp32", "cache_dtype": "fp32"}, "bf16 or fp16, got fp32"),
        ({"op": "index_score", "dtype": "fp16"}, "the queries' dtype.*got fp16 and bf16"),
        ({"op": "index_score", "cache_dtype": "fp8_e4m3fn"}, None),
        ({"op": "index_score", "cache_dtype": "fp8_e4m3fnuz"}, "fp8_e4m3fn, fp8_e5m2; got bf16 and fp8_e4m3fnuz"),
        ({"op": "index_score", "dtype": "fp8_e4m3fn", "cache_dtype": "fp8_e4m3fn"}, None),
        ({"op": "index_score", "dtype": "fp8_e5m2", "cache_dtype": "fp8_e5m2"}, "takes queries of .*got fp8_e5m2"),
        ({"op": "index_score", "head_dim": 512}, "head_dim of at most 256"),
        ({"op": "index_topk", "init_blocks": 3}, "no more forced blocks than topk, got 3 \\+ 1 of 3"),
        ({"op": "index_decode", "init_blocks": 3}, None),
        ({"op": "index_decode", "kv_heads": 3}, None),
        ({"op": "sparse_attn", "gqa": 256}, "at most 128 query heads"),
    ],
)
def test_what_the_wrappers_refuse_is_told_before_they_are_called(axes, words, fake):
    import re

    sentence = fake.refuses(small(**axes))
    assert (sentence is None) if words is None else re.search(words, sentence or "")


def test_before_loading_the_same_is_refused_as_after(tmp_path):
    spec = kernels.parse_spec(f"sglang:{fake_sglang.tree(tmp_path, fake_sglang.files(old=True))}")
    loaded = kernels.load(spec, ARCHS["sm90"], "interpreted", offline=True)
    for case in (small("index_score", cache_dtype="fp8_e4m3fn"), small("sparse_attn", cache_dtype="fp8_e4m3fn"),
                 small("decode", index_cache_dtype="fp8_e4m3fn"), small("decode")):  # fmt: skip
        assert kernels.refuses(spec, case, ARCHS["sm90"]) == loaded.refuses(case), case
    assert loaded.refuses(small("decode")) is None


# The published versions.


def test_the_shipped_hashes_are_of_the_published_versions():
    versions = wheelfile.known_versions(SGLANG)
    assert list(versions) == ["0.5.14", "0.5.15", "0.5.15.post1", "0.5.16", "0.5.17", "0.5.18", "0.5.19", "0.5.20",
                              "0.5.21", "0.5.22", "0.5.23"]  # fmt: skip
    for version, hashes in versions.items():
        tree = fake_sglang.OLD if version in ("0.5.14", "0.5.15", "0.5.15.post1") else fake_sglang.NEW
        assert {f"{tree}/{stem}.py" for stem in ("common/utils", "prefill/topk_sparse", "decode/topk_sparse")} <= set(
            hashes
        )


@pytest.fixture(scope="module")
def real():
    """The newest version that m3check knows, where an earlier run has fetched it."""
    from m3check import interpret

    spec = kernels.parse_spec(f"sglang=={SGLANG.example}")
    try:
        locate(spec, True, SGLANG)
    except M3CheckError as error:
        pytest.skip(str(error))
    interpret.install()
    return kernels.load(spec, ARCHS["sm100"], "interpreted", offline=True)


@pytest.mark.parametrize("op", SINGLE)
def test_the_published_kernels_compute_what_the_mathematics_says(op, real):
    if torch.cuda.is_available():
        pytest.skip("interpreted on a CPU; on a GPU the command line runs them")
    requests = {"prefill": ((2,), (300,)), "decode": ((2,), (300,))}[OPS[op].phase]
    assert judged(real, small(op, query_lens=requests[0], kv_lens=requests[1], topk=2)) == set()
