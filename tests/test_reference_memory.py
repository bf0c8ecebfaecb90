"""The references on real sizes stay within the memory of an ordinary machine."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

LIMIT = 8 * 10**9
"""Bytes of resident memory, inputs, outputs and torch itself included."""

PREAMBLE = """
import resource, torch
from m3check.reference import expected
from m3check.types import Case, Inputs
def filled(*shape):
    return torch.empty(shape, dtype=torch.bfloat16).normal_()
def ended(outputs, **wanted):
    assert {name: tuple(tensor.shape) for name, tensor in outputs.items() if name in wanted} == wanted
    assert all(bool(tensor.isfinite().any()) for tensor in outputs.values())
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""

DECODE_1M = """
case = Case(op="decode", query_lens=(1,), kv_lens=(2**20,))
inputs = Inputs(case, 128**-0.5, idx_q=filled(1, 4, 128), idx_k=filled(2**20, 128), q=filled(1, 64, 128),
                k=filled(2**20, 4, 128), v=filled(2**20, 4, 128))
ended(expected(inputs, torch.float32), score=(4, 1, 8192), ids=(4, 1, 16), out=(1, 64, 128))
"""

PREFILL_SLICE = """
case = Case(op="prefill", query_lens=(16384,), kv_lens=(173824,))
inputs = Inputs(case, 128**-0.5, idx_q=filled(16384, 4, 128), idx_k=filled(173824, 128), q=filled(16384, 64, 128),
                k=filled(173824, 4, 128), v=filled(173824, 4, 128))
ended(expected(inputs, torch.float32), score=(4, 16384, 1358), ids=(4, 16384, 16), out=(16384, 64, 128))
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", [DECODE_1M, PREFILL_SLICE], ids=["decode_of_1M_tokens", "prefill_of_16384_queries"])
def test_real_sizes_fit(program):
    done = subprocess.run([sys.executable, "-c", PREAMBLE + program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout) * (1 if sys.platform == "darwin" else 1024)
    print(f"peak {peak / 1e9:.2f} GB; {resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime:.0f} s of CPU so far")
    assert peak < LIMIT
