"""What production runs where, as dispatch.py has it, against vLLM's own choice of an implementation, version by version."""

from __future__ import annotations

import functools
import inspect
import itertools
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from m3check import dispatch
from m3check.arch import ARCHS
from m3check.kernels import parse_spec
from m3check.kernels.layer_standin import FILES, M3, MSA_FILES, LayerWorld
from m3check.kernels.locate import locate
from m3check.types import M3CheckError

VERSIONS = ("0.24.0", "0.25.1", "0.26.0", "0.27.0", "0.28.0", "0.31.0", "0.32.0", "0.33.0")
TOPKS = (1, 4, 8, 15, 16, 32)
INDEX_DTYPES = ("bf16", "fp8", "fp8_e4m3", "mxfp4", "nvfp4")
CACHE_DTYPES = ("auto", "fp8_e4m3", "fp8_e5m2")


@functools.cache
def selectors(version: str, vendor: str) -> LayerWorld:
    """A version's modules with the selectors; skips what is not cached."""
    try:
        source = locate(parse_spec(f"vllm=={version}"), offline=True)
    except M3CheckError as error:
        pytest.skip(str(error))
    world = LayerWorld(source.folder, ARCHS["gfx942" if vendor == "amd" else "sm90"], pdl=False)
    world.config = SimpleNamespace(attention_config=SimpleNamespace(minimax_m3_indexer_cp=False))
    world.only_named(*MSA_FILES)
    return world


@functools.cache
def chosen(version: str, arch: str) -> tuple[dict, dict]:
    """((topk, index dtype) -> class, (topk, cache dtype) -> class), None for a refusal."""
    world = selectors(version, ARCHS[arch].vendor)
    world._platform._arch = ARCHS[arch]  # the selectors ask it at each call
    index_file, attend_file = (world.load(name) for name in FILES)
    attend = attend_file.select_main_impl_cls
    heads = {"num_kv_heads": 4} if "num_kv_heads" in inspect.signature(attend).parameters else {}
    index, main = {}, {}
    with world.entered():
        for topk, dtype in itertools.product(TOPKS, INDEX_DTYPES):
            try:
                index[topk, dtype] = index_file.select_indexer_impl_cls(topk_blocks=topk, indexer_kv_dtype=dtype).__name__
            except NotImplementedError:
                index[topk, dtype] = None
        for topk, dtype in itertools.product(TOPKS, CACHE_DTYPES):
            main[topk, dtype] = attend(topk_blocks=topk, kv_cache_dtype=dtype, **heads).__name__
    return index, main


def in_msa(op: str, version: str, arch: str, topk: int, cache: str = "") -> bool:
    """Whether ROWS gives an op to fmha_sm100, by what `when` says of topk and of the cache."""
    told = [
        row
        for name, row in dispatch.rows(arch, dispatch.version_of(version) or dispatch.LATEST)
        if name == op and row.name.startswith("fmha_sm100") and "NVFP4" not in row.when
    ]
    return any(topk in map(int, re.findall(r"\b\d+\b", row.when)) and f"not {cache}" not in row.when for row in told)


def disagreements(version: str, arch: str) -> list[str]:
    """Where ROWS and vLLM's own selectors differ, by topk and by the dtypes of the index and of the cache."""
    index, main = chosen(version, arch)
    rows = dispatch.rows(arch, dispatch.version_of(version) or dispatch.LATEST)
    triton = {op: [r for each, r in rows if each == op and r.name.startswith("Triton") and not r.needs]
              for op in ("index_score", "index_topk", "sparse_attn")}  # fmt: skip
    found = []
    for (topk, dtype), name in index.items():
        if dtype in ("bf16", "fp8_e4m3"):
            word = {"bf16": "bf16", "fp8_e4m3": "fp8_e4m3fn"}[dtype]
            axes = {"topk": topk, "dtype": word, "cache_dtype": word}
            by_triton = any(row.takes(axes) for row in triton["index_score"])
            if arch not in ("sm100", "sm103") and by_triton != (name is not None):
                found.append(f"index_score of a {word} index: vLLM has {name}, ROWS {by_triton}")
        if name is None:
            continue
        if in_msa("index_score", version, arch, topk) != (name == "MiniMaxM3IndexerMSAImpl"):
            found.append(f"index_score, topk {topk}, {dtype}: vLLM has {name}")
        selects = name == "MiniMaxM3IndexerTritonImpl" or version == "0.24.0"  # whose MSA class still selects with Triton
        if any(r.takes({"topk": topk}) for r in triton["index_topk"]) != selects:
            found.append(f"index_topk, topk {topk}, {dtype}: vLLM has {name}")
    for (topk, dtype), name in main.items():
        cache = {"auto": "bf16", "fp8_e4m3": "fp8_e4m3fn", "fp8_e5m2": "fp8_e5m2"}[dtype]
        if in_msa("sparse_attn", version, arch, topk, cache) != (name == "MiniMaxM3SparseMSAImpl"):
            found.append(f"sparse_attn, topk {topk}, {cache}: vLLM has {name}")
        taken = any(row.takes({"topk": topk, "cache_dtype": cache}) for row in triton["sparse_attn"])
        if taken != (name == "MiniMaxM3SparseTritonImpl"):
            found.append(f"sparse_attn, topk {topk}, {cache}: vLLM has {name}, a Triton row {taken}")
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_vllms_own_selector_agrees_with_the_rows_on_every_target(version):
    assert {arch: found for arch in ARCHS if (found := disagreements(version, arch))} == {}
    for arch in ARCHS:
        index, main = chosen(version, arch)
        assert {index[topk, "bf16"] for topk in TOPKS} <= {"MiniMaxM3IndexerMSAImpl", "MiniMaxM3IndexerTritonImpl"}
        assert not any(index[topk, dtype] for topk in TOPKS for dtype in ("mxfp4", "nvfp4"))
        assert len(main) == len(TOPKS) * len(CACHE_DTYPES)


def test_the_selectors_of_several_versions_were_asked_where_any_wheel_is_cached():
    asked = [version for version in VERSIONS if locatable(version)]
    if not asked:
        pytest.skip("no wheel of vLLM is cached")
    differ = {tuple(sorted(chosen(version, "sm100")[0].items(), key=str)) for version in asked}
    assert len(asked) < 3 or len(differ) > 1, "they do not all choose alike"


def locatable(version: str) -> bool:
    try:
        locate(parse_spec(f"vllm=={version}"), offline=True)
    except M3CheckError:
        return False
    return True


@pytest.mark.parametrize(
    ("op", "name", "arch", "changes", "said"),
    [
        ("index_score", "fmha_sm100 OnlyScore", "sm100", {"when": "topk 8, bf16 or fp8 index"}, "index_score, topk 8"),
        ("index_score", "fmha_sm100 OnlyScore", "sm103", {"archs": ("sm100",)}, "index_score, topk 16"),
        ("index_score", "Triton (common), fp8", "sm80", {"archs": ("sm80",)}, "a fp8_e4m3fn index: vLLM has None"),
        ("index_score", "Triton (common), fp8", "sm121", {"since": (0, 34)}, "a fp8_e4m3fn index: vLLM has MiniMaxM3"),
        ("index_topk", "Triton (common)", "sm100", {"takes": lambda axes: True}, "index_topk, topk 16"),
        ("sparse_attn", "fmha_sm100 sparse_atten_func", "sm100", {"when": "topk 4, 8, 16 or 32"}, "topk 16, fp8_e5m2"),
        ("sparse_attn", "fmha_sm100 sparse_atten_func", "sm120", {"archs": ("sm120",)}, "sparse_attn, topk 4, bf16"),
        ("sparse_attn", "Triton (common)", "sm100", {"takes": lambda axes: axes["topk"] != 4}, "topk 8, bf16: vLLM has"),
    ],
)
def test_a_planted_wrong_row_is_found(monkeypatch, op, name, arch, changes, said):
    assert disagreements("0.33.0", arch) == []
    spoiled = [replace(row, **changes) if op in row.ops and row.name == name else row for row in dispatch.ROWS]
    assert spoiled != list(dispatch.ROWS)
    monkeypatch.setattr(dispatch, "ROWS", tuple(spoiled))
    assert any(said in line for line in disagreements("0.33.0", arch)), disagreements("0.33.0", arch)


ASKED = {  # what is asked for besides: the row of it, and the class that vLLM then has
    "context parallelism": ("Triton (amd), context parallel", "MiniMaxM3IndexerTritonCPImpl"),
    "AITER": ("AITER sparse paged attention", "MiniMaxM3SparseAiterPAImpl"),
    "NVFP4": ("fmha_sm100 sparse_atten_nvfp4_kv_func", "MiniMaxM3SparseMSAImpl"),
}


@functools.cache
def chosen_on_request(version: str, arch: str) -> dict[str, str]:
    """What vLLM chooses where more is asked for than caches and topk; the name of the error where it refuses."""
    chosen(version, arch)
    world = selectors(version, ARCHS[arch].vendor)
    world.only_named(*(f"{M3}.amd.{name}" for name in ("indexer_context_parallel", "sparse_attention_msa")))
    world._platform._arch = ARCHS[arch]
    index_file, attend_file = (world.load(name) for name in FILES)
    vars(index_file)["get_tensor_model_parallel_world_size"] = lambda: 2
    heads = {"num_kv_heads": 1} if "num_kv_heads" in inspect.signature(attend_file.select_main_impl_cls).parameters else {}

    def asked(choose, **options) -> str:
        try:
            return choose(topk_blocks=16, **options).__name__
        except ValueError as error:
            return type(error).__name__

    told, plain = {}, world.config
    with world.entered():
        world.config = SimpleNamespace(attention_config=SimpleNamespace(minimax_m3_indexer_cp=True))
        told["context parallelism"] = asked(index_file.select_indexer_impl_cls, indexer_kv_dtype="bf16")
        world.config, world.aiter = plain, ARCHS[arch].vendor == "amd"
        told["AITER"] = asked(attend_file.select_main_impl_cls, kv_cache_dtype="auto", **heads)
        world.aiter = False
        if hasattr(attend_file, "get_kv_quant_mode"):  # a version before knows no such cache, and looks at no word of it
            told["NVFP4"] = asked(attend_file.select_main_impl_cls, kv_cache_dtype="nvfp4", **heads)
    return told


def unlike_on_request(version: str, arch: str) -> list[str]:
    """Where ROWS and vLLM differ in what is only chosen on request."""
    rows = {row.name for _, row in dispatch.rows(arch, dispatch.version_of(version) or dispatch.LATEST)}
    told = chosen_on_request(version, arch)
    return [f"{what}: vLLM has {told.get(what)}, ROWS {row in rows}"
            for what, (row, name) in ASKED.items() if (told.get(what) == name) != (row in rows)]  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_chosen_on_request_agrees_with_the_rows(version):
    assert {arch: found for arch in ARCHS if (found := unlike_on_request(version, arch))} == {}


@pytest.mark.parametrize("what", ASKED)
def test_a_planted_wrong_row_of_what_is_chosen_on_request_is_found(monkeypatch, what):
    name = ASKED[what][0]
    arch = "sm100" if what == "NVFP4" else "gfx950"
    assert unlike_on_request("0.33.0", arch) == []
    kept = tuple(row for row in dispatch.ROWS if row.name != name)
    everywhere = [replace(row, archs=tuple(ARCHS)) for row in dispatch.ROWS if row.name == name]
    monkeypatch.setattr(dispatch, "ROWS", kept)
    assert [line.partition(":")[0] for line in unlike_on_request("0.33.0", arch)] == [what]
    monkeypatch.setattr(dispatch, "ROWS", (*kept, *everywhere))
    assert [line.partition(":")[0] for line in unlike_on_request("0.33.0", "sm90")] == [what]


@pytest.mark.parametrize(
    ("version", "arch", "wanted"),
    [("0.31.0", "sm90", None), ("0.32.0", "sm90", "MiniMaxM3IndexerTritonImpl"), ("0.33.0", "sm80", None),
     ("0.33.0", "sm100", "MiniMaxM3IndexerMSAImpl"), ("0.33.0", "gfx942", None)],
)  # fmt: skip
def test_where_an_fp8_index_cache_is_served(version, arch, wanted):
    assert chosen(version, arch)[0][16, "fp8"] == wanted
