"""Wrong kernels that only a real launch shows: what each form does, shown with stand-ins, and which cases they meet."""

from __future__ import annotations

import ast
import subprocess
from types import SimpleNamespace

import pytest
import torch
import torch_kernels as right
from test_invariants import session
from test_invariants_device import CASES, PROFILE, replays  # noqa: F401  # a fixture

from m3check import arch, cases, kernels, runner
from m3check.kernels.locate import locate
from m3check.mutants import catalogue, controls, launching, measure, processes
from m3check.mutants.controls import swapped_slots
from m3check.mutants.origins import sources
from m3check.mutants.sources import edited, wrapped
from m3check.types import M3CheckError, PlanLine, Profile, Status

DECODE = CASES[5]


@pytest.fixture(scope="module")
def ours():
    return sources(kernels.parse_spec("triton"), arch.find_arch("sm90"), offline=True)


@pytest.fixture(scope="module")
def vllm():
    spec = kernels.parse_spec("vllm==0.33.0")
    try:
        locate(spec, offline=True)
    except M3CheckError:
        pytest.skip("vllm==0.33.0 is not in the cache")
    return sources(spec, arch.find_arch("sm90"), offline=True)


def run(function, names):
    made = session({"sparse_attn_decode": function}, PROFILE)
    made.evidence = "device"
    return runner.run_one(
        cases.parse_id(DECODE), made, PlanLine(DECODE, "sparse_attn_decode", "user", "device", None, names), ""
    )


def test_lengths_frozen_at_capture_are_seen_in_the_graph_alone(replays):  # noqa: F811
    function = wrapped(replays.captured(right.sparse_attn_decode, "sparse_attn_decode"), launching.frozen_at_capture())
    assert run(function, ("load", "repeat")).status is Status.PASSED
    result = run(function, ("graph",))
    assert result.status is Status.FAILED
    assert "graph replayed with other lengths" in result.reason


def test_metadata_is_shared_by_launches_of_the_same_shape_and_right_for_each_alone():
    seen = []
    wrapper = launching.shared_metadata()
    for lengths in (torch.tensor([3, 4]), torch.tensor([5, 6]), torch.tensor([7])):
        wrapper(lambda **keywords: seen.append(keywords["seq_lens"]), {"seq_lens": lengths, "topk": 4})
        assert seen[-1].equal(lengths)
    assert seen[0].data_ptr() == seen[1].data_ptr() != seen[2].data_ptr()
    assert seen[0].tolist() == [5, 6], "the launch before reads what the next one wrote"


def test_what_was_compiled_for_one_topk_runs_for_another(monkeypatch):
    jit = pytest.importorskip("triton.runtime.jit")
    launched = []
    monkeypatch.setattr(jit.JITFunction, "run", lambda self, *args, **kwargs: launched.append((args, kwargs)))
    launching.topk_of_the_first_compilation()
    names = {"score": False, "TOPK": True, "ROWS": True}
    function = SimpleNamespace(params=[SimpleNamespace(name=n, is_constexpr=c) for n, c in names.items()])
    for arguments in ((1, 4, 16), (1, 3, 16), (1, 3, 32)):
        jit.JITFunction.run(function, *arguments, grid=(1,))
    jit.JITFunction.run(function, 1, TOPK=5, ROWS=16, grid=(1,))
    assert [args for args, _ in launched[:3]] == [(1, 4, 16), (1, 4, 16), (1, 3, 32)]
    assert launched[3][1]["TOPK"] == 4


def test_every_row_that_needs_a_launch_is_made_on_a_device_only(ours, vllm):
    for origin, rows in ((ours, {"W1", "W3", "W5", "M5"}), (vllm, {"W1", "W3", "W5", "W7"})):
        keys = {m.key for m in launching.mutants(origin)}
        made = [m for m in catalogue.mutants(origin, "device")[0] if m.key in keys]
        assert {m.name.split()[0] for m in made} == rows
        assert all(m.where == "device" for m in made)
        assert not keys & {m.key for m in catalogue.mutants(origin, "interpreted")[0]}
        for mutant in made:
            for file in {edit.file for edit in mutant.edits}:
                text = edited(origin.read(file), mutant, file)
                assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(origin.read(file)))


def test_sources_of_another_version_have_no_such_mutant(ours, tmp_path):
    (tmp_path / "sparse_attn_decode.py").write_text("def sparse_attn_decode(): pass\n")
    other = type(ours)(ours.spec, "triton", {"": tmp_path}, ("sparse_attn_decode.py",))
    assert {m.name.split()[0] for m in launching.mutants(other)} == {"W1", "W3", "W5"}


def test_a_device_measures_only_cases_that_its_mutants_can_meet(ours):
    mutants = [m for m in launching.mutants(ours) if m.ops == {"sparse_attn_decode"}]
    lines = [
        PlanLine(name, name.partition("/")[0], "triton", "device", None, shown)
        for name, shown in (
            (CASES[0], ("graph",)),
            (DECODE, ("graph",)),
            (CASES[7], ("load",)),
            ("sparse_attn_decode/q=2,kv=700,h=2,g=2,d=64,topk=3", ()),
            ("sparse_attn_decode/q=2,kv=700,h=2,g=2,d=64,topk=3,ids=short", ()),
        )
    ]
    assert [line.case for line in measure._telling(lines, mutants)] == [lines[1].case, lines[2].case, lines[4].case]


def test_the_parent_leaves_the_driver_alone(monkeypatch):
    monkeypatch.setattr(arch, "present", arch.present)  # put back afterwards
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0, stdout='[[1, "sm90"]]\n'))
    processes.ask_for_devices()
    monkeypatch.setattr(arch, "_nvidia", lambda: pytest.fail("the driver was asked"))
    assert arch.present() == [(1, "sm90")]
    assert runner.evidence_for(arch.find_arch("sm90"))[:2] == ("device", 1)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stdout=""))
    processes.ask_for_devices()
    assert arch.present() == []


def test_swapped_slots_changes_the_order_alone():
    ids = torch.tensor([[[3, 1, 2], [4, -1, -1], [-1, -1, -1]]], dtype=torch.int32)
    swapped = swapped_slots({"topk_idx": ids})
    assert swapped.tolist() == [[[1, 3, 2], [4, -1, -1], [-1, -1, -1]]]
    assert swapped.dtype == torch.int32
    assert ids[0, 0].tolist() == [3, 1, 2]
    assert swapped_slots({"topk_idx": ids[..., :1]}).equal(ids[..., :1])


def test_controls_promise_no_graph_where_they_wait_for_the_device(ours):
    [ties] = [c for c in controls.controls(ours) if c.name.startswith("N1")]
    promised = Profile(bitwise=frozenset({"graph", "repeat"}))
    assert ties.profile(promised).bitwise == {"repeat"}
