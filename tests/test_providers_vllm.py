"""vLLM's kernels: where they are found, what is read from their source, and how they run beside stand-ins."""

from __future__ import annotations

import compileall
import sys
import textwrap

import fake_vllm
import pytest

from m3check import cases, kernels
from m3check.arch import ARCHS
from m3check.kernels import contract, reading, wheelfile, wheels
from m3check.kernels.standin import World
from m3check.types import SPARSE, Case, M3CheckError

pytest.importorskip("triton")

TINY = {"kv_heads": 2, "gqa": 2, "head_dim": 16, "topk": 3, "dtype": "fp32", "cache_dtype": "fp32"}
SCORE = Case(op="index_score", query_lens=(2,), kv_lens=(300,), **TINY)
ATTEND = Case(op="sparse_attn", query_lens=(2,), kv_lens=(300,), **TINY)
SCALED = Case(
    op="sparse_attn_decode", query_lens=(1,), kv_lens=(300,), **{**TINY, "cache_dtype": "fp8_e4m3fn"}, scales="scalar"
)
CHECKED = Case(op="index_topk", query_lens=(1,), kv_lens=(300,), **TINY)


def load(text, arch="sm90", evidence="interpreted"):
    return kernels.load(kernels.parse_spec(text), ARCHS[arch], evidence, offline=True)


def at(folder, **choices):
    return f"vllm:{fake_vllm.tree(folder, fake_vllm.files(**choices))}"


def mark(loaded):
    """What the fake index_score answers, through the real calling convention."""
    return float(contract.call(loaded.kernels["index_score"], cases.make_inputs(SCORE)).outputs["score"][0, 0, 0])


# Where the files are.


def test_a_checkout_a_wheel_and_a_package_folder_serve_alike(tmp_path, monkeypatch):
    monkeypatch.setenv("M3CHECK_CACHE", str(tmp_path / "cache"))
    fake_vllm.tree(
        tmp_path / "checkout", {**fake_vllm.files(), "vllm/_version.py": "__version__ = version = '0.99.1.dev3'\n"}
    )
    wheel = fake_vllm.wheel(tmp_path, "0.99.0", fake_vllm.files())
    fake_vllm.tree(tmp_path / "site", {**fake_vllm.files(), "vllm-0.98.0.dist-info/METADATA": ""})
    for path, version in (
        ("checkout", "0.99.1.dev3"),
        ("checkout/vllm", "0.99.1.dev3"),
        (wheel.name, "0.99.0"),
        ("site", "0.98.0"),
    ):
        loaded = load(f"vllm:{tmp_path / path}")
        assert (loaded.description["version"], mark(loaded)) == (version, 1.0), path


def test_the_installed_vllm_is_found_without_being_executed(tmp_path, monkeypatch):
    metadata = {"vllm-0.97.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: vllm\nVersion: 0.97.0\n"}
    fake_vllm.tree(tmp_path, {**fake_vllm.files(), **metadata})
    monkeypatch.syspath_prepend(str(tmp_path))
    loaded = load("vllm")
    assert loaded.description["version"] == "0.97.0"
    assert loaded.description["from"] == "installed"
    assert loaded.kernels["index_score"].provider == "vllm"
    assert mark(loaded) == 1.0


def test_a_vllm_that_is_not_installed_is_a_sentence_that_names_the_other_ways(monkeypatch):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if "site-packages" not in p])
    with pytest.raises(M3CheckError, match=r"vllm is not installed here; .*vllm==0\.33\.0.*vllm:PATH"):
        kernels.prepare(kernels.parse_spec("vllm"))


def test_a_path_without_the_kernels_says_what_is_wanted(tmp_path):
    with pytest.raises(M3CheckError, match=r"there is nothing at .*a checkout, a site-packages folder"):
        load(f"vllm:{tmp_path / 'nowhere'}")
    with pytest.raises(M3CheckError, match="has no vllm/models/minimax_m3"):
        load(f"vllm:{tmp_path}")


def test_a_published_version_is_loaded_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("M3CHECK_CACHE", str(tmp_path))
    path = fake_vllm.wheel(tmp_path / "index", "0.99.0", fake_vllm.files(mark=5.0))
    monkeypatch.setattr(wheels, "_fetch", lambda project, _, target, __: wheelfile.extract_wheel(project, path, target))
    warnings = kernels.prepare(kernels.parse_spec("vllm==0.99.0"))
    loaded = load("vllm==0.99.0")
    assert mark(loaded) == 5.0
    assert loaded.kernels["index_score"].provider == "vllm==0.99.0"
    assert "RECORD only" in warnings[0]
    assert "RECORD only" in loaded.warnings[0]


# What is read from the source.


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        (fake_vllm.BOUNDED, {"full", "ascending", "short", "future"}),
        ("keep = blk >= 0", {"full", "ascending", "short", "future"}),  # half a test is a mistake, not a smaller promise
        ("keep = blk < num_blocks", {"full", "ascending", "short", "future"}),
        (fake_vllm.COUNTED, {"full", "ascending", "short"}),
        (fake_vllm.UNSEEN, {"full", "ascending"}),
    ],
)
def test_which_id_lists_attention_bears_is_read_from_how_it_tests_them(rule, wanted, tmp_path):
    loaded = load(at(tmp_path, rule=rule))
    assert loaded.kernels["sparse_attn_decode"].profile.id_lists == wanted
    assert loaded.kernels["sparse_attn"].profile.id_lists == {"full", "ascending"}, "its function launches no such kernel"


def test_layout_and_scales_are_read_from_strides_and_parameters(tmp_path):
    packed, split = load(at(tmp_path / "new")), load(at(tmp_path / "old", packed=False))
    assert packed.kernels["sparse_attn"].profile.kv_layout == "packed"
    assert split.kernels["sparse_attn"].profile.kv_layout == "split"
    assert packed.refuses(SCALED) is None
    assert "takes no k_scale and v_scale" in (split.refuses(SCALED) or "")


def test_an_op_that_a_version_lacks_is_missing_with_a_sentence_and_so_is_its_chain(tmp_path):
    loaded = load(at(tmp_path))
    assert "has no minimax_m3_index_decode_score in common/ops/index_topk.py" in loaded.missing["index_decode_score"]
    assert sorted(set(SPARSE) - set(loaded.kernels)) == ["index_decode_score"]


def test_before_loading_the_same_is_refused_as_after(tmp_path):
    spec, arch = kernels.parse_spec(at(tmp_path, packed=False)), ARCHS["sm80"]
    for evidence in ("interpreted", "device"):
        loaded = kernels.load(spec, arch, evidence, offline=True)
        for case in (SCORE, ATTEND, SCALED, Case(op="index_decode_score", query_lens=(1,), kv_lens=(9,)),
                     Case(op="index_score", query_lens=(1,), kv_lens=(9,), head_dim=96),
                     Case(op="index_decode", query_lens=(1,), kv_lens=(9,), kv_heads=3),
                     Case(op="index_score", query_lens=(1,), kv_lens=(9,), cache_dtype="fp8_e4m3fn"),
                     Case(op="index_score", query_lens=(1,), kv_lens=(9,), dtype="fp8_e5m2", cache_dtype="fp8_e5m2"),
                     Case(op="decode", query_lens=(1,), kv_lens=(9,), index_cache_dtype="fp8_e4m3fn"),
                     Case(op="sparse_attn", query_lens=(1,), kv_lens=(9,), cache_dtype="fp8_e4m3fn")):  # fmt: skip
            assert kernels.refuses(spec, case, arch, evidence) == loaded.refuses(case), case


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (Case(op="index_score", query_lens=(1,), kv_lens=(9,), head_dim=96), "head_dim that is a power of two, got 96"),
        (Case(op="index_decode", query_lens=(1,), kv_lens=(9,), kv_heads=3), "index heads that is a power of two, got 3"),
        (
            Case(op="index_score", query_lens=(1,), kv_lens=(9,), cache_dtype="fp8_e4m3fn"),
            "the same dtype, got bf16 and fp8",
        ),
        (Case(op="sparse_attn", query_lens=(1,), kv_lens=(9,), cache_dtype="fp16"), "a bf16 or fp8 cache, got fp16"),
        (Case(op="index_score", query_lens=(1,), kv_lens=(9,), kv_heads=3), None),
        (Case(op="sparse_attn", query_lens=(1,), kv_lens=(9,), head_dim=96, kv_heads=3), None),
        (Case(op="sparse_attn", query_lens=(1,), kv_lens=(9,), cache_dtype="fp8_e4m3fnuz"), None),
    ],
)
def test_what_a_version_cannot_run_is_refused_with_the_reason(case, words, tmp_path):
    sentence = load(at(tmp_path)).refuses(case)
    assert (sentence is None) if words is None else words in (sentence or "")


def test_a_dialect_that_triton_cannot_compile_is_refused_on_the_device_only(tmp_path):
    case = Case(op="sparse_attn", query_lens=(1,), kv_lens=(9,), cache_dtype="fp8_e4m3fn")
    assert "compiles no fp8_e4m3fn for sm80" in (load(at(tmp_path), "sm80", "device").refuses(case) or "")
    assert load(at(tmp_path), "sm80").refuses(case) is None
    assert load(at(tmp_path), "sm90", "device").refuses(case) is None


def test_operands_that_a_kernel_widens_may_differ(tmp_path):
    source = """
    def _kernel(q):
        if q.dtype.is_fp8():
            return
    def minimax_m3_index_score(idx_q):
        _kernel[(1,)](idx_q)
    def minimax_m3_index_topk(score):
        pass
    """
    path = tmp_path / "index_topk.py"
    path.write_text(textwrap.dedent(source))
    found = reading.read_file(path)
    assert found["index_score"].mixes_fp8
    assert not found["index_topk"].mixes_fp8


def test_a_file_that_is_not_python_is_a_sentence(tmp_path):
    spec = at(tmp_path)
    (tmp_path / fake_vllm.OPS / "index_topk.py").write_text("def (")
    with pytest.raises(M3CheckError, match=r"cannot read .*index_topk\.py"):
        load(spec)


# Beside stand-ins.


def test_two_versions_live_in_one_process_and_leave_no_trace(tmp_path):
    before = {name for name in sys.modules if name.partition(".")[0] == "vllm"}
    first, second = load(at(tmp_path / "a", mark=1.0)), load(at(tmp_path / "b", mark=2.0))
    assert [mark(first), mark(second), mark(first)] == [1.0, 2.0, 1.0]
    assert {name for name in sys.modules if name.partition(".")[0] == "vllm"} == before
    assert not any(type(finder).__name__ == "_Finder" for finder in sys.meta_path)


def test_a_vllm_that_was_imported_before_is_put_back(tmp_path, monkeypatch):
    other = type(sys)("vllm")
    monkeypatch.setitem(sys.modules, "vllm", other)
    assert mark(load(at(tmp_path))) == 1.0
    assert sys.modules["vllm"] is other


@pytest.mark.parametrize(("arch", "split"), [("sm120", 1.0), ("sm121", 0.0), ("sm90", 0.0)])
def test_the_platform_presents_the_target(arch, split, tmp_path):
    loaded = load(at(tmp_path), arch)
    score = contract.call(loaded.kernels["index_score"], cases.make_inputs(SCORE)).outputs["score"]
    assert float(score[0, 0, 1]) == split


@pytest.mark.parametrize(("arch", "wanted"), [("gfx942", 1), ("gfx950", 0), ("sm90", 0)])
def test_what_is_imported_inside_a_function_is_there_when_it_is_called(arch, wanted, tmp_path):
    loaded = load(at(tmp_path), arch)
    ids = contract.call(loaded.kernels["index_topk"], cases.make_inputs(CHECKED)).outputs["ids"]
    assert int(ids[0, 0, 0]) == wanted


@pytest.mark.parametrize(("arch", "wanted"), [("sm90", 1.0), ("sm100", 1.0), ("sm89", 0.0), ("gfx950", 0.0)])
def test_dependent_launch_is_presented_where_the_target_has_it(arch, wanted, tmp_path):
    loaded = load(at(tmp_path), arch, "device")
    assert float(contract.call(loaded.kernels["index_score"], cases.make_inputs(SCORE)).outputs["score"][0, 0, 2]) == wanted


def test_dependent_launch_is_interpreted_only_where_its_calls_are_no_ops(tmp_path, monkeypatch):
    from triton.language.extra import cuda

    def as_published(_semantic=None):
        raise ValueError("Did you forget to add @triton.jit ?")

    for call, wanted in ((as_published, 0.0), (lambda _semantic=None: None, 1.0)):
        monkeypatch.setattr(cuda, "gdc_wait", call)
        score = contract.call(load(at(tmp_path)).kernels["index_score"], cases.make_inputs(SCORE)).outputs["score"]
        assert float(score[0, 0, 2]) == wanted


def test_what_the_stand_in_lacks_is_named_with_file_and_line(tmp_path):
    spec = at(tmp_path)
    file = tmp_path / fake_vllm.OPS / "sparse_attn.py"
    file.write_text(file.read_text() + "\ncurrent_platform.is_npu()\n")
    with pytest.raises(M3CheckError, match=r"sparse_attn\.py:\d+ does not import: AttributeError.*'is_npu'"):
        load(spec)
    file.write_text("import vllm.envs\n" + file.read_text())
    with pytest.raises(M3CheckError, match=r"sparse_attn\.py:\d+ does not import: ModuleNotFoundError.*vllm\.envs"):
        load(spec)


def test_bytecode_beside_a_checked_file_does_not_run(tmp_path):
    spec = at(tmp_path, mark=6.0)
    file = tmp_path / fake_vllm.OPS / "index_topk.py"
    compileall.compile_file(str(file), quiet=1, invalidation_mode=compileall.py_compile.PycInvalidationMode.UNCHECKED_HASH)
    assert list((file.parent / "__pycache__").iterdir())
    fake_vllm.tree(tmp_path, fake_vllm.files(mark=7.0))
    assert mark(load(spec)) == 7.0


def test_a_keyword_that_only_amd_serving_needs_is_left_out(tmp_path):
    """amd/ops/index_topk.py takes keyword-only arguments for its own attention; None switches them off."""
    common = fake_vllm.files()[f"{fake_vllm.OPS}/index_topk.py"]
    more = common.replace(
        "max_decode_query_len, out=None):", "max_decode_query_len, out=None, *, table, counter):\n    assert table is None"
    )
    fake_vllm.tree(tmp_path, {f"{fake_vllm.OPS.replace('common', 'amd')}/index_topk.py": more})
    amd, nvidia = load(at(tmp_path), "gfx942"), load(at(tmp_path), "sm90")
    case = Case(op="index_decode", query_lens=(1,), kv_lens=(300,), **TINY)
    for loaded in (amd, nvidia):
        assert int(contract.call(loaded.kernels["index_decode"], cases.make_inputs(case)).outputs["ids"].max()) == -1
    assert any("amd/ops" in fact for fact in amd.description)
    assert not any("amd/ops" in fact for fact in nvidia.description)
    assert "which production runs on gfx942" in amd.missing["index_decode_score"]


def test_a_world_keeps_its_own_modules(tmp_path):
    fake_vllm.tree(tmp_path, fake_vllm.files())
    world = World(tmp_path, ARCHS["sm90"], pdl=False)
    name = "vllm.models.minimax_m3.common.ops.index_topk"
    assert world.load(name) is world.load(name)
    assert name not in sys.modules


# The published versions.


@pytest.mark.network
def test_the_published_0_33_0_scores_like_the_reference(tmp_path, monkeypatch):
    import torch

    from m3check import interpret, reference

    monkeypatch.setenv("M3CHECK_CACHE", str(tmp_path))
    interpret.install()
    spec = kernels.parse_spec("vllm==0.33.0")
    loaded = kernels.load(spec, ARCHS["sm100"], "interpreted")
    assert set(loaded.kernels) >= set(SPARSE)
    assert loaded.warnings == ()
    inputs = cases.make_inputs(SCORE)
    score = contract.call(loaded.kernels["index_score"], inputs).outputs["score"].double()
    wanted = reference.expected(inputs)["score"]
    seen = wanted.isfinite()
    torch.testing.assert_close(score[seen], wanted[seen], atol=1e-4, rtol=1e-5)
    assert loaded.kernels["sparse_attn"].profile.id_lists == {"full", "ascending"}
    assert "future" in loaded.kernels["sparse_attn_decode"].profile.id_lists
