"""warm: what batches of other sizes compile and time once a kernel is warm is heard and named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch_kernels as right
from test_invariants import PROFILE, like, session

from m3check import cases, kernels, runner, warm
from m3check.arch import ARCHS
from m3check.types import Kernel, PlanLine, Profile, Status

jit = pytest.importorskip("triton.runtime.jit")
autotuner = pytest.importorskip("triton.runtime.autotuner")

CASE = "index_topk/q=2+1,kv=1305+20,h=2,topk=4"
PROMISED = Profile(dequantise="rounded", bitwise=frozenset({"warm"}))


def counting(x, n, TILE):
    """Any function with a source: its launches are counted, not carried out."""


kernel = jit.JITFunction(counting)
tuner = autotuner.Autotuner(kernel, ["x", "n"], [], [], None, None)


def compiled(self, x, n, TILE, **_):
    """As Triton specialises: n by 1 and by 16, TILE by its value; what it has compiled it keeps."""
    key = (n == 1, n % 16 == 0, TILE)
    if key not in self.device_caches:
        constants = {(2,): TILE} | ({(1,): n} if n == 1 else {})
        hook = jit.knobs.runtime.jit_cache_hook or (lambda **_: None)
        hook(
            key=key,
            fn=jit.JitFunctionInfo(None, "counting", self),
            compile={
                "signature": {"x": "*fp32", "n": "constexpr" if n == 1 else "i32", "TILE": "constexpr"},
                "constants": constants,
                "configs": [{(1,): [["tt.divisibility", 16]]} if n % 16 == 0 else {}],
                "num_warps": 4,
                "num_stages": 1,
            },
        )
        self.device_caches[key] = True


@pytest.fixture
def device(monkeypatch):
    """Launches of `kernel` by this file's own compiler, and a session that believes to be on a device."""
    monkeypatch.setattr(jit.JITFunction, "run", compiled)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(kernel, "device_caches", {})

    def told(function, profile=PROFILE, warm_up=None):
        def launching(**arguments):
            ids = right.index_topk(**arguments)
            function(ids)
            return ids

        made = session({"index_topk": like("index_topk")(launching)}, profile)
        loaded = made.loaded
        served = Kernel("user", "index_topk", "k", profile, loaded.kernels["index_topk"].function, warm_up=warm_up)
        made = replace(made, evidence="device", loaded=replace(loaded, kernels={**loaded.kernels, "index_topk": served}))
        result = runner.run_one(
            cases.parse_id(CASE), made, PlanLine(CASE, "index_topk", "user", "device", None, ("warm",)), ""
        )
        return [f for f in result.findings if f.check == "warm"]

    return told


def test_a_kernel_that_compiles_for_other_batches_is_red_where_it_promised_and_noted_elsewhere(device):
    def specialised(ids):
        kernel.run(ids, ids.shape[1], TILE=8)  # 3 queries first, then 1, 16 and 36

    [red] = device(specialised, PROMISED)
    assert (red.status, red.measured, red.where) == (Status.FAILED, 2.0, "counting")
    assert "1 queries of 1 requests" in red.hint
    assert "n is the constant 1, was i32" in red.hint
    [noted] = device(specialised)
    assert noted.status is Status.NOTED
    assert "does not promise" in noted.hint


def test_what_was_compiled_before_hides_nothing_and_is_there_again_afterwards(device):
    kernel.device_caches = before = {(n == 1, n % 16 == 0, 8): True for n in (1, 16, 3)}
    assert device(lambda ids: kernel.run(ids, ids.shape[1], TILE=8), PROMISED)[0].status is Status.FAILED
    assert kernel.device_caches is before


def test_a_tile_that_follows_the_batch_is_named(device):
    [red] = device(lambda ids: kernel.run(ids, 5, TILE=ids.shape[1]), PROMISED)
    assert red.measured == 4.0
    assert "TILE is the constant 1, was the constant 3" in red.hint


def test_what_only_many_queries_compile_is_told(device):
    """Work that few queries cut into parts, and many do not."""
    [red] = device(lambda ids: kernel.run(ids, 5, TILE=8 if ids.shape[1] < 512 else 16), PROMISED)
    assert red.measured == 1.0
    assert "600 queries of 1 requests" in red.hint


def test_a_kernel_that_compiles_once_passes_and_one_of_torch_is_not_asked(device):
    assert [f.status for f in device(lambda ids: kernel.run(ids, 5, TILE=8), PROMISED)] == [Status.PASSED]
    assert device(lambda ids: None, PROMISED) == []


def test_a_warm_up_is_what_counts_where_there_is_one(device):
    def specialised(ids):
        kernel.run(ids, ids.shape[1], TILE=8)

    def warm_up(**_):
        for n in (1, 16, 3):
            kernel.run(None, n, TILE=8)

    assert device(specialised, PROMISED, warm_up)[0].status is Status.PASSED
    assert device(specialised, PROMISED, lambda **_: kernel.run(None, 3, TILE=8))[0].status is Status.FAILED


def test_configurations_that_are_timed_again_are_told(device, monkeypatch):
    monkeypatch.setattr(autotuner.Autotuner, "_bench", lambda self, *_, **__: [0.0])
    monkeypatch.setattr(
        autotuner.Autotuner, "run", lambda self, n: n in self.cache or self.cache.update({n: self._bench()})
    )

    def tuned(ids, key):
        kernel.run(ids, 5, TILE=8)
        tuner.run(key(ids))

    [red] = device(lambda ids: tuned(ids, lambda ids: ids.shape[1]), PROMISED)
    assert "timed its configurations again" in red.hint
    assert red.measured == 4.0
    assert device(lambda ids: tuned(ids, lambda ids: 7), PROMISED)[0].status is Status.PASSED


CAPTURED = """
import importlib, json, sys
from dataclasses import replace
import torch, triton
from m3check import cases, kernels, warm
from m3check.arch import ARCHS
from m3check.compiled import evidence, target
from m3check.compiled.capture import capturing
from m3check.kernels import contract
from m3check.kernels.triton import tiles
from m3check.paging import World

target.present(ARCHS["sm90"])
ours = kernels.load(kernels.parse_spec("triton"), ARCHS["sm90"], "compiled", True).kernels

def told(text, warmed=True):
    case = cases.parse_id(text)
    kernel = ours[case.op] if warmed else replace(ours[case.op], warm_up=None)
    return [[str(f.status), f.hint] for f in evidence.warmth(case, kernel)]

def variants(text, cut):  # of a call whose lengths and tables begin `cut` requests into others
    case = cases.parse_id(text)
    arguments = contract.prepare(ours[case.op], cases.make_inputs(case), World()).arguments
    for name in {"block_table", "cu_seqlens_q", "seq_lens", "prefix_lens"} & set(arguments):
        whole = torch.cat([arguments[name][:cut], arguments[name]])
        arguments[name] = whole[cut:]
    with capturing() as launches:
        ours[case.op].function(**arguments)
    return {launch.candidates[0].variant for launch in launches}

asked = json.loads(sys.argv[1])
found = {"warm": [told(text) for text in asked["warm"]]}
found["cold"] = [told(text, False) for text in asked["cold"]]
found["sliced"] = [len(variants(text, 0) | variants(text, 1)) for text in asked["sliced"]]
attention = importlib.import_module("m3check.kernels.triton.sparse_attn")
attention.sparse_attn_kernel = triton.jit(attention.sparse_attn_kernel.fn)
tiles.selection_rows = lambda rows, width: tiles.power_of_two(rows)
found["wrong"] = [told(text) for text in asked["wrong"]]
found["sliced wrong"] = [len(variants(text, 0) | variants(text, 1)) for text in asked["sliced wrong"]]
print(json.dumps(found))
"""


MANY = "sparse_attn_decode/q=1x70,kv=300x70,h=8,g=1,d=16,topk=3"
"""Queries enough that no list is cut into parts, as those of few are."""


@pytest.fixture(scope="module")
def captured():
    """Real specialisations of a target that is not here, captured and not compiled: of our kernels, right and spoiled."""
    asked = {
        "warm": [
            "index_score/q=70,kv=2500",
            "index_topk/q=2,kv=1409,h=3,topk=1,local=0,layout=pool",
            "index_decode_score/q=4x2,kv=4097+2303",
            "index_decode/q=3x3,kv=384+129+255,h=1,topk=3,local=0,layout=pool,mq=6",
            "sparse_attn/q=1+3+0,kv=1+483+641,h=2,g=5,d=64,topk=3,cache=fp8_e5m2,scale=token,layout=pool",
            "sparse_attn_decode/q=1x3,kv=2305+0+640",
            MANY,
            "mla_sparse/q=3+2,kv=150+70,h=1,d=576,topk=64",
            "mla_sparse/q=3,kv=150,h=1,g=5,d=576,topk=512,dtype=fp32,cache=fp32",
            "mqa_logits/q=5+3,kv=130+9,h=1,g=4,dtype=fp8_e4m3fn,cache=fp8_e4m3fn",
            "paged_mqa_logits/q=2x4,kv=131+64+0+65,h=1,g=4,dtype=fp8_e4m3fn,cache=fp8_e4m3fn",
            "qknorm_rope_insert/q=1+5,kv=300+130,h=2,g=4",
        ],
        "cold": [MANY, "index_topk/q=2,kv=9000"],
        "wrong": ["sparse_attn/q=5,kv=700", "index_topk/q=2,kv=1409"],
        "sliced": ["index_score/q=3,kv=700", "index_topk/q=3,kv=700", "sparse_attn/q=3,kv=700", "index_decode/q=1,kv=700"],
        "sliced wrong": ["sparse_attn/q=3,kv=700"],
    }
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CAPTURED, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return {what: dict(zip(asked[what], told, strict=True)) for what, told in json.loads(done.stdout).items()}


def test_our_kernels_stay_warm(captured):
    assert {text: told for text, told in captured["warm"].items() if told != [["passed", ""]]} == {}


def test_our_kernels_that_wait_for_a_warm_up_are_red_without_it(captured):
    [[status, hint]] = captured["cold"][MANY]
    assert status == "failed"
    assert "output is *fp32 divisible by 16, was *bf16" in hint  # parts, unnormalised
    [[status, hint]] = captured["cold"]["index_topk/q=2,kv=9000"]
    assert status == "failed"
    assert "COLUMNS is the constant 64, was the constant 256" in hint


def test_a_count_that_is_compiled_for_and_tiles_that_follow_the_batch_are_red(captured):
    [[status, hint]] = captured["wrong"]["sparse_attn/q=5,kv=700"]
    assert status == "failed"
    assert "requests is i32" in hint
    [[status, hint]] = captured["wrong"]["index_topk/q=2,kv=1409"]
    assert status == "failed"
    assert "ROWS is the constant" in hint


def test_lengths_and_tables_of_the_later_requests_of_a_batch_compile_nothing(captured):
    """A slice of them is aligned or not by the number of decoded requests before it."""
    launches = {"index_score": 1, "index_topk": 1, "sparse_attn": 1, "index_decode": 2}
    assert {text.split("/")[0]: count for text, count in captured["sliced"].items()} == launches
    assert captured["sliced wrong"] == {"sparse_attn/q=3,kv=700": 2}


@pytest.mark.parametrize("text", [CASE, "index_decode/q=1x2,kv=2305+0", "qknorm_rope_insert/q=1+5,kv=300+130,h=2,g=4"])
def test_batches_differ_in_sizes_alone(text):
    case = cases.parse_id(text)
    assert max(other.total_queries for _, other in warm.batches(case)) > 512
    for words, other in warm.batches(case):
        cases.parse_id(cases.case_id(other))
        assert words.startswith(f"{other.total_queries} queries of {len(other.kv_lens)} requests")
        assert replace(other, query_lens=case.query_lens, kv_lens=case.kv_lens) == case
        assert all(kv >= q > 0 for q, kv in zip(other.query_lens, other.kv_lens, strict=True))


def test_a_users_file_has_its_warm_ups_by_name(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def index_topk(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks): ...\n"
        "def index_score(idx_q, index_kv_cache, block_table, cu_seqlens_q, prefix_lens, max_seq_len): ...\n"
        "def warm_up_index_topk(**_): return 'warm'\n"
    )
    loaded = kernels.load(kernels.parse_spec(str(file)), ARCHS["sm90"], "interpreted")
    assert loaded.kernels["index_topk"].warm_up() == "warm"
    assert loaded.kernels["index_score"].warm_up is None
