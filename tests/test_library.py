"""Around a library's functions: the clock that stands still while they may compile, and the strides that they are given."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from m3check import device, kernels, rerun, worker
from m3check.kernels.library import Clock, dense, regular
from m3check.kernels.provider import Loaded, Spec
from m3check.types import Kernel, M3CheckError, Profile


def test_a_clock_tells_of_a_call_and_of_its_end_whatever_comes_of_it():
    clock, told = Clock(), []
    clock.listen(told.append)

    def fails():
        assert told == [True]
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        clock.stopped(fails)()
    assert told == [True, False]
    assert clock.stopped(lambda x, *, y: x + y)(1, y=2) == 3
    assert told == [True, False] * 2


@pytest.mark.parametrize("evidence", ["device", "compiled"])
def test_a_worker_stops_the_clock_for_a_library_on_a_device(monkeypatch, evidence):
    clock, sent = Clock(), []
    loaded = Loaded(Spec("fmha_sm100", "fmha_sm100"), {}, on_compile=clock.listen)
    monkeypatch.setattr(kernels, "load", lambda *_: loaded)
    monkeypatch.setattr(worker, "environment", lambda where: {})
    monkeypatch.setattr(device, "on_compile", lambda notify: None)
    monkeypatch.setattr("m3check.compiled.target.present", lambda arch: None)
    command = {"arch": "sm100", "evidence": evidence, "device": 0, "spec": "fmha_sm100", "offline": True}
    worker.Service().load(command, sent.append)
    clock.stopped(lambda: None)()
    assert sent == ([{"compiling": True}, {"compiling": False}] if evidence == "device" else [])


def test_of_what_a_library_compiles_for_other_batches_nothing_is_said():
    kernel = Kernel("x", "sparse_attn_decode", "msa_cutlass_sparse_decode", Profile(), print, library=True)
    with pytest.raises(M3CheckError, match="nothing tells what msa_cutlass_sparse_decode compiles"):
        rerun._warmed(kernel, None)


@pytest.mark.parametrize(
    ("shape", "strides", "wanted"),
    [
        ((1, 3, 8), (7919, 8, 1), (24, 8, 1)),
        ((3, 1, 8), (16, 7919, 1), (16, 8, 1)),
        ((5, 1, 4, 8), (96, 7919, 24, 1), (96, 96, 24, 1)),
        ((4, 1), (3, 7919), (3, 1)),
        ((2, 3), (1, 2), (1, 2)),
    ],
)
def test_dimensions_of_size_1_get_the_stride_of_a_fresh_tensor(shape, strides, wanted):
    odd = torch.arange(10000).as_strided(shape, strides, 3)
    plain = regular(odd)
    assert plain.stride() == wanted
    assert plain.data_ptr() == odd.data_ptr()
    assert torch.equal(plain, odd)


def test_what_is_no_tensor_stays():
    figures = SimpleNamespace(shape=(1,))
    assert regular(figures) is figures
    assert regular(None) is None


def test_an_output_with_gaps_is_written_through_a_dense_one():
    backing = torch.zeros(2, 5)
    with dense(backing[:, :3]) as whole:
        assert whole.is_contiguous()
        whole.fill_(1)
    assert backing.tolist() == [[1, 1, 1, 0, 0]] * 2
    with dense(backing) as same:
        assert same is backing
