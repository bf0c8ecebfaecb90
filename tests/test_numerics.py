"""The probe of accumulators: a kernel that sums too coarsely is told, a right one passes, instructions are simulated."""

from __future__ import annotations

import pytest
import torch

from m3check import kernels, numerics, runner
from m3check.arch import FP32, Accumulator, find_arch
from m3check.numerics import Measured, added_up, made, measure, probes
from m3check.types import Kernel, Profile

SHAPE = ("index_score/q=5,kv=700,h=2",)


def session(how: Accumulator | None) -> runner.Session:
    """A provider whose one kernel, in torch, sums as `how` says, or in fp32."""

    def index_score(idx_q, index_kv_cache, block_table, cu_seqlens_q, seq_lens, prefix_lens):
        keys = index_kv_cache[block_table[0, : -(-int(seq_lens[0]) // 128)].long()].flatten(0, 1)[: int(seq_lens[0])]
        score = torch.full((idx_q.shape[1], idx_q.shape[0], block_table.shape[1]), -torch.inf)
        for t in range(idx_q.shape[0]):
            seen = keys[: int(prefix_lens[0]) + t + 1]
            sums = idx_q[t].float() @ seen.float().T if how is None else added_up(idx_q[t], seen, how).float()
            for block, part in enumerate(sums.split(128, dim=1)):
                score[:, t, block] = part.amax(1)
        return score

    loaded = kernels.Loaded.of({"index_score": Kernel("user", "index_score", "index_score", Profile(), index_score)})
    return runner.Session(find_arch("sm90"), "interpreted", "cpu", loaded)


@pytest.mark.parametrize(("how", "wanted"), [(None, {"yes"}), (find_arch("sm90").accumulator("fp8"), {"NO"})])
def test_a_kernel_that_sums_more_coarsely_than_it_should_is_told(how, wanted):
    found = list(measure(session(how), "user", probes(SHAPE, ["bf16"])))
    assert [m.numbers for m in found] == list(numerics.NUMBERS)
    assert {m.verdict for m in found} == wanted


@pytest.mark.parametrize(
    ("bits", "simulated", "wanted"),
    [
        (13.1, 13.2, "yes"),
        (12.0, 13.2, "NO"),
        (22.0, 13.2, "finer"),
        (8.0, None, "NO"),
        (None, 13.0, "finer"),
        (None, None, "yes"),
    ],
)
def test_a_measurement_is_held_against_bound_and_simulation(bits, simulated, wanted):
    assert Measured("x", "case", "gauss", "wgmma", bits, simulated, 9.0).verdict == wanted


def test_every_instruction_of_every_target_is_simulated():
    for arch in (find_arch("sm90"), find_arch("sm100"), find_arch("gfx942")):
        told = {name: effective for name, _, effective in numerics.simulate(arch)}
        assert set(told) == {f"{row.instruction} {row.operands}" for row in arch.mma if row.operands != "fp32"}
    assert "one sign 2^-9" in numerics.simulate(find_arch("sm90"))[2][2]


def test_one_sign_has_no_negative_numbers_and_keeps_the_dtype():
    inputs = made("index_score/q=5,kv=700,h=2,dtype=fp8_e4m3fn,cache=fp8_e4m3fn", "one sign", "cpu")
    assert inputs.idx_q.dtype == inputs.idx_k.dtype == torch.float8_e4m3fn
    assert (inputs.idx_q.float() >= 0).all()
    assert (inputs.idx_k.float() >= 0).all()


def test_fp32_is_not_simulated():
    assert FP32.fraction_bits is None
    with pytest.raises(AssertionError):
        added_up(torch.ones(1, 4), torch.ones(1, 4), FP32)


def test_the_command_measures_our_kernels(monkeypatch, capsys):
    monkeypatch.setattr(numerics, "probes", lambda *_: iter([("index_score/q=3,kv=300,h=1", "gauss")]))
    monkeypatch.setattr(numerics, "simulate", lambda _arch: [])
    monkeypatch.setattr("m3check.arch.present", list)
    assert numerics.main(["--arch", "gfx942"]) == 0
    out = capsys.readouterr().out
    assert "interpreted: this machine has no gfx942 GPU" in out
    assert "| triton" in out
    assert "| yes" in out
