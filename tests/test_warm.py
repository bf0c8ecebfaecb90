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
    assert red.measured == 3.0
    assert "TILE is the constant 1, was the constant 3" in red.hint


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
    assert red.measured == 3.0
    assert device(lambda ids: tuned(ids, lambda ids: 7), PROMISED)[0].status is Status.PASSED


CAPTURED = """
import json, sys
from m3check import cases, kernels, warm
from m3check.arch import ARCHS
from m3check.compiled import evidence, target

target.present(ARCHS["sm90"])
loaded = kernels.load(kernels.parse_spec("triton"), ARCHS["sm90"], "compiled", True)
for text in sys.argv[1:]:
    case = cases.parse_id(text)
    kernel = loaded.kernels[case.op]
    print(json.dumps([[str(f.status), f.hint] for f in evidence.warmth(case, kernel)]))
"""


def test_our_kernels_of_other_families_stay_warm_and_our_decode_attention_is_named():
    """Real specialisations of a target that is not here, captured and not compiled."""
    ids = [
        "mla_sparse/q=3+2,kv=150+70,h=1,d=576,topk=64",
        "mla_sparse/q=3,kv=150,h=1,g=5,d=576,topk=512,dtype=fp32,cache=fp32",
        "mqa_logits/q=5+3,kv=130+9,h=1,g=4,dtype=fp8_e4m3fn,cache=fp8_e4m3fn",
        "paged_mqa_logits/q=2x4,kv=131+64+0+65,h=1,g=4,dtype=fp8_e4m3fn,cache=fp8_e4m3fn",
        "qknorm_rope_insert/q=1+5,kv=300+130,h=2,g=4",
        "sparse_attn_decode/q=1x3,kv=2305+0+640",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CAPTURED, *ids], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    *warm, attention = (json.loads(line) for line in done.stdout.splitlines())
    assert warm == [[["passed", ""]]] * 5
    [[status, hint]] = attention
    assert status == "noted"
    assert "16 queries of 16 requests" in hint
    assert "SHARE is the constant 2, was the constant 1" in hint


@pytest.mark.parametrize("text", [CASE, "index_decode/q=1x2,kv=2305+0", "qknorm_rope_insert/q=1+5,kv=300+130,h=2,g=4"])
def test_batches_differ_in_sizes_alone(text):
    case = cases.parse_id(text)
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
