"""Naming providers, loading a user's kernels, building chains, refusing cases with a sentence."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from m3check import cases, kernels, reference
from m3check.arch import ARCHS
from m3check.kernels import calls, contract
from m3check.kernels.provider import Loaded, Spec
from m3check.types import OPS, Case, Kernel, M3CheckError, Profile

EXAMPLE = Path(__file__).parents[1] / "examples" / "my_kernels.py"
SM90 = ARCHS["sm90"]
TINY = {"kv_heads": 2, "gqa": 2, "head_dim": 16, "topk": 3}


@pytest.fixture(autouse=True)
def _own_modules(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("m3check_user_", "some_kernels")):
            del sys.modules[name]


def load(text, arch=SM90, evidence="interpreted"):
    return kernels.load(kernels.parse_spec(text), arch, evidence, offline=True)


def user_file(folder, text, name="mine.py"):
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return str(path)


# Grammar.


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("triton", {"provider": "triton"}),
        ("vllm", {"provider": "vllm", "version": "", "path": ""}),
        ("vllm==0.33.0", {"provider": "vllm", "version": "0.33.0"}),
        ("vllm==0.33.0rc1.dev5+g12ab", {"provider": "vllm", "version": "0.33.0rc1.dev5+g12ab"}),
        ("vllm:/some/where", {"provider": "vllm", "path": "/some/where"}),
        ("/abs/file.py", {"provider": "user", "path": "/abs/file.py"}),
        ("my.module", {"provider": "user", "module": "my.module"}),
    ],
)
def test_a_spec_names_a_provider(text, fields):
    spec = kernels.parse_spec(text)
    assert spec.text == text
    assert {name: getattr(spec, name) for name in fields} == fields


def test_an_entry_of_the_list_is_all_that_a_new_provider_is_named_by(monkeypatch):
    library = kernels.Provider("mine", ("mine", "mine:PATH"), "kernels", "a GPU", "m3check.kernels.user")
    wheels = replace(kernels.PROVIDERS[1], name="ours", grammar=("ours", "ours==X.Y.Z"))
    monkeypatch.setattr(kernels, "PROVIDERS", (library, wheels))
    assert kernels.parse_spec("mine") == Spec("mine", "mine")
    assert kernels.parse_spec("mine:/here") == Spec("mine:/here", "mine", path="/here")
    assert kernels.parse_spec("ours==1.2") == Spec("ours==1.2", "ours", version="1.2")
    for text in ("mine==1.2", "ours:here", "vllm"):
        with pytest.raises(M3CheckError, match=r"known: mine · mine:PATH · ours · ours==X\.Y\.Z"):
            kernels.parse_spec(text)


@pytest.mark.parametrize("text", ["./file.py", "file.py", "~/file.py", "vllm:here"])
def test_a_path_is_made_absolute_so_that_workers_agree(text, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kernels.parse_spec(text).path.startswith(str(tmp_path))


@pytest.mark.parametrize("text", ["sgl", "tritn", "vllm=0.33.0", "", "triton==3.8", "a b.c"])
def test_an_unknown_provider_lists_the_known_ones(text):
    with pytest.raises(M3CheckError, match="unknown provider") as caught:
        kernels.parse_spec(text)
    for provider in kernels.PROVIDERS:
        assert all(form in str(caught.value) for form in provider.grammar)


@pytest.mark.parametrize("text", ["vllm==", "vllm==--index-url=x", "vllm==0.1 evil", "vllm==latest", "vllm:"])
def test_a_version_that_is_none_is_refused(text):
    with pytest.raises(M3CheckError, match=r"wanted a version|lacks a path"):
        kernels.parse_spec(text)


# A user's kernels.


def test_the_example_computes_what_the_reference_does():
    loaded = load(str(EXAMPLE))
    assert sorted(loaded.kernels) == ["index_score", "sparse_attn_decode"]
    assert "defines no index_topk" in loaded.missing["index_topk"]
    fp32 = {**TINY, "dtype": "fp32", "cache_dtype": "fp32"}
    scaled = {**fp32, "cache_dtype": "fp8_e4m3fn", "scales": "token"}
    for case in (
        Case(op="index_score", query_lens=(3, 2), kv_lens=(129, 300), **fp32),
        Case(op="sparse_attn_decode", query_lens=(2, 2, 2), kv_lens=(0, 129, 700), **fp32),
        Case(op="sparse_attn_decode", query_lens=(1, 1), kv_lens=(300, 700), ids="holes", **fp32),
        Case(op="sparse_attn_decode", query_lens=(1, 1), kv_lens=(300, 700), **scaled),
    ):
        assert loaded.refuses(case) is None
        inputs = cases.make_inputs(case)
        run = contract.call(loaded.kernels[case.op], inputs)
        expected = reference.expected(reference.dequantised(inputs, "rounded"))
        assert set(run.outputs) == set(OPS[case.op].outputs)
        for name, output in run.outputs.items():
            torch.testing.assert_close(output.double(), expected[name].double(), atol=1e-5, rtol=1e-5)
        assert not any(guard.overwritten() for guard in run.guards)
        assert not any(frozen.changed() for frozen in run.frozen)


def test_vllms_names_serve_too_and_a_profile_is_read(tmp_path):
    path = user_file(
        tmp_path,
        """
        import m3check
        PROFILE = m3check.Profile(id_order="ascending")
        def minimax_m3_index_topk(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks, out): ...
        """,
    )
    kernel = load(path).kernels["index_topk"]
    assert kernel.name == "minimax_m3_index_topk"
    assert kernel.provider == path
    assert kernel.profile == Profile(id_order="ascending")


def test_a_module_is_found_from_the_working_directory(tmp_path, monkeypatch):
    package = tmp_path / "some_kernels"
    package.mkdir()
    (package / "__init__.py").write_text("")
    user_file(package, "def index_topk(**keywords): ...", "fast.py")
    monkeypatch.chdir(tmp_path)
    assert sorted(load("some_kernels.fast").kernels) == ["index_topk"]


def test_a_file_imports_its_neighbours(tmp_path):
    user_file(tmp_path, "WIDTH = 3", "some_kernels_neighbour.py")
    path = user_file(tmp_path, "from some_kernels_neighbour import WIDTH\ndef index_topk(**keywords): ...")
    assert "index_topk" in load(path).kernels


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import nowhere_to_be_found", ["mine.py:1", "ModuleNotFoundError", "nowhere_to_be_found"]),
        ("x = 1\ny = 1 / 0", ["mine.py:2", "ZeroDivisionError"]),
        ("def broken(:", ["mine.py:1", "SyntaxError"]),
        ("raise SystemExit(3)", ["mine.py:1", "SystemExit"]),
        ("x = 1", ["defines no kernel", "index_score", "sparse_attn_decode"]),
        ("index_topk = 3", ["index_topk is int, wanted a function"]),
        ("PROFILE = {}\ndef index_topk(**k): ...", ["PROFILE is dict, wanted m3check.Profile"]),
        ("def index_topk(scores, topk): ...", ["index_topk has a parameter 'scores'", "--signatures"]),
        ("def index_topk(score, topk): ...", ["lacks", "local_blocks", "--signatures index_topk"]),
        ("def index_topk(score, /, **k): ...", ["score by position only", "take out the /"]),
        ("def sparse_atn_decode(**k): ...", ["defines no kernel (did you mean sparse_attn_decode by sparse_atn_decode?)"]),
        ("from m3check import Profile\nPROFILE = Profile(tie='any')", ["mine.py:2", "known: kv_layout", "tie_rule"]),
        ("from m3check import Profile\nPROFILE = Profile(tie_rule='low')", ["mine.py:2", "'low'", "'smaller_id'"]),
    ],
)
def test_a_file_that_cannot_serve_is_refused_with_what_and_where(source, words, tmp_path):
    with pytest.raises(M3CheckError) as caught:
        load(user_file(tmp_path, source))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_function_that_is_named_almost_like_an_op_is_no_silent_skip(tmp_path):
    source = """
        def index_topk(*positions, **keywords): ...
        def index_scores(**keywords): ...
        def sparse_attn_reference(**keywords): ...
    """
    missing = load(user_file(tmp_path, source)).missing
    assert "(did you mean index_score by index_scores?)" in missing["index_score"]
    assert "did you mean" not in missing["sparse_attn"] + missing["sparse_attn_decode"]


def test_a_file_may_have_a_layer_of_its_own_and_says_how_its_ids_stand(tmp_path):
    from m3check import device

    source = """
        class Layer:
            layout = "token"
            def __call__(self, figures, buffers): ...
        indexer = Layer()
    """
    loaded = load(user_file(tmp_path, source))
    assert sorted(loaded.kernels) == ["indexer"]
    assert loaded.kernels["indexer"].function.layout == "token"
    assert device.Launches().following(loaded.kernels["indexer"]).function is loaded.kernels["indexer"].function
    assert "defines no index_topk" in loaded.missing["index_topk"]
    with pytest.raises(M3CheckError, match="to have a layout, 'head' or 'token'") as caught:
        load(user_file(tmp_path, "def indexer(figures, buffers): ...", "flat.py"))
    assert "got function with layout None" in str(caught.value)


def test_a_profile_takes_its_known_words_and_any_set_of_words():
    assert Profile(bitwise={"repeat"}, id_lists=["full"]) == Profile(
        bitwise=frozenset({"repeat"}), id_lists=frozenset({"full"})
    )
    with pytest.raises(M3CheckError, match=r"Profile\(lse='log2'\): known are 'natural', 'base2'"):
        Profile(lse="log2")
    with pytest.raises(M3CheckError, match="wanted a set of words"):
        Profile(id_lists="short")


def test_a_folder_is_no_kernel_file_and_a_name_without_a_dot_is_guessed(tmp_path, monkeypatch):
    (tmp_path / "some_kernels").mkdir()
    user_file(tmp_path, "x = 1", "fast.py")
    monkeypatch.chdir(tmp_path)
    for text, words in (
        ("some_kernels", "did you mean a file in that folder, as ./some_kernels/NAME.py?"),
        ("fast", "did you mean ./fast.py?"),
        ("tritn", "did you mean triton?"),
    ):
        with pytest.raises(M3CheckError, match="unknown provider") as caught:
            kernels.parse_spec(text)
        assert words in str(caught.value)
    with pytest.raises(M3CheckError, match="some_kernels is a folder; wanted a Python file"):
        load("./some_kernels")


@pytest.mark.parametrize("text", ["/no/such/file.py", "no_such_module_here.kernels", "json.kernels"])
def test_a_file_or_module_that_is_not_there_is_said(text):
    with pytest.raises(M3CheckError, match="there is no"):
        load(text)


# Chains, refusals, words.


def named(op, function):
    return Kernel("mine", op, op, Profile(), function)


def test_a_chain_is_built_when_all_its_parts_are_there_and_else_says_what_lacks(tmp_path):
    every = "\n".join(f"def {op}(**keywords): ..." for op in contract.SIGNATURES)
    whole = load(user_file(tmp_path, every, "whole.py"))
    assert sorted(whole.kernels) == sorted(OPS)
    assert list(whole.kernels["prefill"].parts) == list(OPS["prefill"].chain)
    part = load(user_file(tmp_path, "def index_decode(**keywords): ...", "part.py"))
    assert sorted(part.kernels) == ["index_decode"]
    assert "needs sparse_attn_decode" in part.missing["decode"]


def test_a_chain_takes_the_selections_promises_and_the_attentions(tmp_path):
    from m3check.kernels.provider import with_chains

    select = Kernel("p", "index_decode", "s", Profile(tie_rule="smaller_id", dead_rows="nan"), print)
    attend = Kernel("p", "sparse_attn_decode", "a", Profile(normaliser="lse"), print)
    both, _ = with_chains({"index_decode": select, "sparse_attn_decode": attend}, {})
    assert both["decode"].profile == Profile(tie_rule="smaller_id", normaliser="lse", dead_rows="zero")


def test_scaled_cases_are_refused_by_kernels_without_scales_and_only_by_those():
    def without(q, kv_cache): ...

    def with_scales(q, kv_cache, k_scale=None, v_scale=None): ...

    def anything(**keywords): ...

    scaled = Case(op="sparse_attn", query_lens=(1,), kv_lens=(5,), cache_dtype="fp8_e4m3fn", scales="scalar")
    plain = Case(op="sparse_attn", query_lens=(1,), kv_lens=(5,))
    for function, refused in ((without, True), (with_scales, False), (anything, False)):
        loaded = Loaded.of({"sparse_attn": named("sparse_attn", function)})
        assert ("takes no k_scale" in (loaded.refuses(scaled) or "")) is refused
        assert loaded.refuses(plain) is None


def test_an_op_that_a_provider_lacks_is_refused_with_a_sentence():
    loaded = Loaded.of({"sparse_attn": named("sparse_attn", print)})
    assert "has no index_topk" in (loaded.refuses(Case(op="index_topk", query_lens=(1,), kv_lens=(5,))) or "")


def test_our_own_kernels_load_for_every_target():
    loaded = load("triton", ARCHS["gfx942"])
    assert set(loaded.kernels) | set(loaded.missing) == set(OPS)
    for op, kernel in loaded.kernels.items():
        assert (kernel.provider, kernel.op) == ("triton", op)


def test_every_parameter_of_an_op_has_its_meaning_written_down():
    for family in calls.FAMILIES.values():
        used = {name for parameters, _ in family.signatures.values() for name in parameters}
        assert used == set(family.parameters), "a parameter without a meaning, or a meaning without a parameter"


def test_planning_imports_no_library_of_kernels(tmp_path):
    code = (
        "import sys; from m3check import kernels; from m3check.arch import ARCHS; from m3check.types import Case\n"
        "case = Case(op='sparse_attn', query_lens=(1,), kv_lens=(5,))\n"
        "for text in ('triton', 'vllm', 'vllm==0.33.0', './x.py'):\n"
        "    kernels.refuses(kernels.parse_spec(text), case, ARCHS['sm90'])\n"
        "print([m for m in ('torch', 'triton', 'vllm') if m in sys.modules])"
    )
    environment = {"M3CHECK_CACHE": str(tmp_path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"
