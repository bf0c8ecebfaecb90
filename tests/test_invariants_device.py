"""Graphs, launches in flight and dependent launches: shown with stand-ins for streams and graphs, and on a GPU for real."""

from __future__ import annotations

import inspect
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import mixed_layers
import pytest
import torch
import torch_insert
import torch_kernels as right
from test_invariants import PROFILE, like, session

from m3check import cases, invariants, kernels, runner
from m3check.arch import ARCHS, find_arch, present
from m3check.checks.invariants import launches
from m3check.kernels import overlap, producer, replay
from m3check.kernels.composed import Composed, ComposedMaker
from m3check.kernels.provider import Loaded, with_chains
from m3check.types import OPS, Kernel, PlanLine, Profile, Status

CASES = (
    "index_score/q=3+2,kv=447+305,h=2,d=64",
    "index_topk/q=1+2,kv=1024+561,h=2,topk=3",
    "index_decode_score/q=2x3,kv=2+633+300,h=2,d=64",
    "index_decode/q=2x2,kv=733+400,h=2,d=64,topk=4",
    "sparse_attn/q=2+3,kv=525+384,h=2,g=4,d=64,topk=3,cache=fp8_e4m3fn,scale=token",
    "sparse_attn_decode/q=2x2,kv=700+577,h=2,g=2,d=64,topk=3,layout=pool",
    "prefill/q=2+3,kv=525+384,h=2,g=2,d=64,topk=3",
    "decode/q=2x2,kv=300+609,h=2,g=2,d=64,topk=3,cache=fp8_e4m3fn,scale=token",
)
ON_A_DEVICE = ("graph", "load", "dependent_launch")


class Replays:
    """torch.cuda, as far as it is used, without a GPU: a graph calls what was captured again, on the same tensors."""

    def __init__(self):
        self.mode = "eager"
        self.calls = []
        self.late = []

    def produce(self, to, source, _zero):
        """What it would write is there once somebody has waited for it."""
        self.late.append(lambda: to.copy_(source))

    def wait(self):
        """As a kernel waits for the one before it."""
        for write in self.late:
            write()
        self.late.clear()

    def captured(self, function, op, waits=True):
        @like(op)
        def call(**arguments):
            if waits:
                self.wait()
            result = function(**arguments)
            if self.mode == "capture":
                self.calls.append((function, arguments, result))
            return result

        return call

    @contextmanager
    def graph(self, _graph):
        self.mode, self.calls = "capture", []
        try:
            yield
        finally:
            self.mode = "eager"

    def replay(self):
        self.mode = "replay"
        for function, arguments, result in self.calls:
            new = function(**arguments)
            if result is not None:
                result.copy_(new)
        self.mode = "eager"


class Stream:
    def wait_stream(self, _other):
        """Nothing runs beside anything here."""


@pytest.fixture
def replays(monkeypatch):
    pytest.importorskip("triton")
    found = Replays()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: found)
    monkeypatch.setattr(torch.cuda, "graph", found.graph)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda _mode: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.mode == "capture")
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _cycles: None)
    monkeypatch.setattr(overlap, "BUSY", 16)
    monkeypatch.setattr(producer, "produce", found.produce)
    return found


def run(replays, functions, case, names, switch=None, profile=PROFILE):
    made = session({op: replays.captured(function, op) for op, function in functions.items()}, profile)
    made = replace(made, evidence="device", loaded=replace(made.loaded, dependent_launch=switch))
    parsed = cases.parse_id(case)
    return runner.run_one(parsed, made, PlanLine(case, parsed.op, "user", "device", None, names), "")


@pytest.mark.parametrize("case", CASES)
def test_right_kernels_hold_them(replays, case):
    result = run(replays, right.RIGHT, case, ON_A_DEVICE, switch=lambda on: None)
    assert result.status is Status.PASSED, result.reason
    wanted = {name for name in invariants.fitting(cases.parse_id(case), "device") if name in ON_A_DEVICE}
    assert wanted <= {f.check for f in result.findings}
    assert {"graph", "load"} <= wanted


@pytest.mark.parametrize("frozen", ["seq_lens", "block_table"])
def test_graph_catches_what_was_read_on_the_host_at_capture(replays, frozen):
    kept = {}

    @like("sparse_attn_decode")
    def reads_early(**arguments):
        if replays.mode == "capture":
            kept[frozen] = arguments[frozen].clone()
        if replays.mode == "replay":
            arguments[frozen] = kept[frozen]
        right.sparse_attn_decode(**arguments)

    functions = {"sparse_attn_decode": reads_early}
    case = "sparse_attn_decode/q=2x2,kv=700+333,h=2,g=2,d=64,topk=2"
    assert run(replays, functions, case, ()).status is Status.PASSED
    result = run(replays, functions, case, ("graph",))
    assert result.status is Status.FAILED
    assert "graph replayed with other lengths" in result.reason


def test_graph_catches_live_rows_counted_at_capture(replays):
    kept = {}

    @like("index_decode")
    def counts_early(**arguments):
        if replays.mode != "replay":
            kept["dead"] = arguments["seq_lens"] == 0
        ids = right.index_decode(**arguments)
        dead = (arguments["seq_lens"] == 0) & ~kept["dead"]
        ids[:, dead.repeat_interleave(arguments["decode_query_len"])] = 0
        return ids

    case = "index_decode/q=2x2,kv=733+400,h=2,d=64,topk=4"
    result = run(replays, {"index_decode": counts_early}, case, ("graph",))
    assert result.status is Status.FAILED
    assert "fewer live rows" in result.reason


STEP = "indexer/q=1x3,kv=300+0+520,h=2,g=2,d=16,topk=2"


def into_the_buffer(out, **arguments):
    out.copy_(right.index_decode(**arguments))


def served(replays, kind=Composed, case=STEP):
    """A layer of host code around captured kernels: its metadata are those of a graph captured on the batch before."""
    functions = {op: replays.captured(getattr(right, op), op) for op in OPS["indexer"].chain}
    functions["index_decode"] = select = replays.captured(into_the_buffer, "index_decode")
    known = inspect.signature(right.index_decode).parameters.values()
    select.__signature__ = inspect.Signature([*known, inspect.Parameter("out", inspect.Parameter.KEYWORD_ONLY)])
    parts = {op: Kernel("user", op, op, PROFILE, mixed_layers.launched(function)) for op, function in functions.items()}

    class Maker(ComposedMaker):
        def __call__(self, figures, buffers):
            return kind(self.parts, figures, buffers)

    kernel = replace(with_chains(parts, {})[0]["indexer"], function=Maker(parts))
    made = replace(session({}), evidence="device", loaded=Loaded.of({"indexer": kernel}))
    parsed = cases.parse_id(case)
    return runner.run_one(parsed, made, PlanLine(case, "indexer", "user", "device", None, ("stale",)), "")


def test_a_step_is_captured_and_replayed_on_a_device(replays):
    result = served(replays)
    assert result.status is Status.PASSED, result.reason
    assert "stale" in {f.check for f in result.findings}
    assert len(replays.calls) == 2, "selection and attention, as they were captured"


class Waits(Composed):
    """Asks for the longest length while it is captured."""

    replays: Replays

    def forward(self, metadata, tensors):
        assert self.replays.mode != "capture", "operation not permitted when stream is capturing"
        return super().forward(metadata, tensors)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (mixed_layers.HostLengths, "captured and replayed"),
        (mixed_layers.CopiedLate, "captured and replayed"),
        (Waits, "not permitted when stream is capturing"),
    ],
)
def test_a_graph_of_a_step_shows_what_its_replay_cannot_know(replays, kind, words):
    Waits.replays = replays
    result = served(replays, kind)
    assert result.status is Status.FAILED
    assert {f.check for f in result.findings if f.status is Status.FAILED} == {"stale"}
    assert words in result.reason


def test_a_kernel_that_cannot_be_captured_is_noted_and_red_where_it_promised(replays):
    @like("index_score")
    def synchronises(**arguments):
        assert replays.mode != "capture", "operation not permitted when stream is capturing"
        return right.index_score(**arguments)

    result = run(replays, {"index_score": synchronises}, CASES[0], ("graph",))
    assert result.status is Status.PASSED
    [noted] = [f for f in result.findings if f.status is Status.NOTED]
    assert "not permitted when stream is capturing" in noted.hint
    promises = Profile(dequantise="rounded", bitwise=frozenset({"graph"}))
    assert run(replays, {"index_score": synchronises}, CASES[0], ("graph",), profile=promises).status is Status.FAILED


def test_load_catches_a_launch_that_is_not_like_the_others(replays):
    calls = []

    @like("index_score")
    def sometimes(**arguments):
        score = right.index_score(**arguments)
        calls.append(0)
        return score * 2 if len(calls) == 9 else score

    result = run(replays, {"index_score": sometimes}, CASES[0], ("load",))
    assert result.status is Status.FAILED
    assert "in flight on two streams" in result.reason


def test_dependent_launch_catches_a_result_that_needs_it(replays):
    on = [True]

    @like("index_decode_score")
    def eager_reader(**arguments):
        score = right.index_decode_score(**arguments)
        return score if on[0] else score * 2

    def switch(value):
        on[0] = value

    case = "index_decode_score/q=2x3,kv=2+633+300,h=2,d=64,local=0"
    result = run(replays, {"index_decode_score": eager_reader}, case, ("dependent_launch",), switch)
    assert result.status is Status.FAILED
    assert "without programmatic dependent launch" in result.reason
    assert on == [True], "it is switched on again"


@pytest.mark.parametrize("early", ["seq_lens", "topk_idx"])
def test_dependent_launch_catches_what_is_read_before_the_wait(replays, early):
    @like("sparse_attn_decode")
    def reads_early(**arguments):
        arguments[early] = arguments[early].clone()
        replays.wait()
        right.sparse_attn_decode(**arguments)

    @like("sparse_attn_decode")
    def waits(**arguments):
        replays.wait()
        right.sparse_attn_decode(**arguments)

    def result(function):
        made = replace(session({"sparse_attn_decode": function}), evidence="device", arch=find_arch("sm90"))
        parsed = cases.parse_id(CASES[5])
        return runner.run_one(
            parsed, made, PlanLine(CASES[5], parsed.op, "user", "device", None, ("dependent_launch",)), ""
        )

    assert result(waits).status is Status.PASSED
    red = result(reads_early)
    assert red.status is Status.FAILED
    assert "right behind a slow kernel" in red.reason


def test_load_catches_metadata_of_the_launch_before(replays):
    """One table for all launches: the second in flight still reads the first one's."""
    before = []

    @like("sparse_attn_decode")
    def shared(**arguments):
        before.append(arguments["block_table"].clone())
        if len(before) > 1 and before[-2].shape == before[-1].shape and len(before) > 3:
            arguments["block_table"] = before[-2]
        right.sparse_attn_decode(**arguments)

    assert run(replays, {"sparse_attn_decode": shared}, CASES[5], ()).status is Status.PASSED
    before.clear()
    result = run(replays, {"sparse_attn_decode": shared}, CASES[5], ("load",))
    assert result.status is Status.FAILED
    assert "in flight on two streams" in result.reason


# Inserts work in place: their rows are fresh in every launch, and where a token goes changes between replays.

INSERT = "qknorm_rope_insert/q=1+3,kv=300+130,h=1,g=2,icache=fp8_e4m3fn,ids=skip_first"
SAME = "qknorm_rope_insert/q=4,kv=130,h=1,g=1,queries=fp8"


@pytest.fixture(autouse=True)
def few_launches(monkeypatch, request):
    if "replays" in request.fixturenames and "insert" in request.node.name:
        monkeypatch.setattr(launches, "LAUNCHES", 6)


def inserted(replays, function, names, case=INSERT, waits=True):
    made = session({"qknorm_rope_insert": replays.captured(function, "qknorm_rope_insert", waits)}, PROFILE)
    made = replace(made, evidence="device", arch=find_arch("sm90"))
    parsed = cases.parse_id(case)
    return runner.run_one(parsed, made, PlanLine(case, parsed.op, "user", "device", None, names), "")


@pytest.mark.parametrize("case", [INSERT, SAME])
def test_a_right_insert_holds_them(replays, case):
    names = tuple(name for name in invariants.fitting(cases.parse_id(case), "device") if name in ON_A_DEVICE)
    assert set(names) == set(ON_A_DEVICE) - ({"graph"} if case == SAME else set())
    result = inserted(replays, torch_insert.kernel(), names, case)
    assert result.status is Status.PASSED, result.reason
    assert set(names) <= {f.check for f in result.findings if f.status is Status.PASSED}


@pytest.mark.parametrize("name", ["slot_mapping", "index_slot_mapping", "positions"])
def test_graph_catches_an_insert_that_keeps_what_it_was_captured_with(replays, name):
    kept = {}

    def frozen(**arguments):
        if replays.mode == "capture":
            kept[name] = arguments[name].clone()
        if replays.mode == "replay":
            arguments[name] = kept[name]
        torch_insert.kernel()(**arguments)

    assert inserted(replays, frozen, ()).status is Status.PASSED
    result = inserted(replays, frozen, ("graph",))
    assert result.status is Status.FAILED
    assert "replayed" in result.reason


def test_graph_catches_a_write_for_a_token_that_lost_its_slot(replays):
    """Padding of a replay had a slot when the graph was captured, and has it still."""
    kept = {}

    def keeps(**arguments):
        slots = arguments["slot_mapping"]
        if replays.mode == "capture":
            kept["live"] = slots >= 0
        if replays.mode == "replay" and bool(((slots < 0) & kept["live"]).any()):
            arguments["slot_mapping"] = slots.where((slots >= 0) | ~kept["live"], slots.max() + 1)
        torch_insert.kernel()(**arguments)

    result = inserted(replays, keeps, ("graph",))
    assert result.status is Status.FAILED
    assert "which no token of the batch has" in result.reason or "fewer live rows" in result.reason


@pytest.mark.parametrize(("name", "case"), [("slot_mapping", INSERT), ("positions", SAME)])
def test_load_catches_an_insert_with_the_metadata_of_the_launch_before(replays, name, case):
    before = []

    def shared(**arguments):
        before.append(arguments[name].clone())
        if len(before) > 3:
            arguments[name] = before[-2]
        torch_insert.kernel()(**arguments)

    assert inserted(replays, shared, (), case).status is Status.PASSED
    before.clear()
    result = inserted(replays, shared, ("load",), case)
    assert result.status is Status.FAILED
    assert "in flight on two streams" in result.reason


def test_dependent_launch_catches_rows_that_are_read_before_the_wait(replays):
    def early(**arguments):
        whole = arguments["qkv"]
        arguments["qkv"] = whole.clone()
        replays.wait()
        torch_insert.kernel()(**arguments)
        whole.copy_(arguments["qkv"])

    result = inserted(replays, early, ("dependent_launch",), waits=False)
    assert result.status is Status.FAILED
    assert "right behind a slow kernel" in result.reason


@pytest.mark.parametrize("case", CASES)
def test_launches_in_flight_do_not_share_their_metadata(replays, case, monkeypatch):
    in_flight, seen = overlap.in_flight, []

    def spy(kernel, lanes, count):
        seen.extend(lanes)
        return in_flight(kernel, lanes, count)

    monkeypatch.setattr(overlap, "in_flight", spy)
    assert run(replays, right.RIGHT, case, ("load",)).status is Status.PASSED
    kernel = session(right.RIGHT).loaded.kernels[cases.parse_id(case).op]
    one, two = (replay.stages(kernel, inputs, world)[0].arguments for inputs, world in seen)
    shared = [name for name in ("seq_lens", "prefix_lens", "cu_seqlens_q") if name in one]
    assert all(one[name].shape == two[name].shape for name in shared)
    assert any(not one[name].equal(two[name]) for name in shared)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, "indexer/q=2x3,kv=385+0+1,h=2,g=2,d=64,topk=2,mq=2"])
def test_our_triton_kernels_hold_every_invariant_on_this_gpu(case):
    index, name = next((i, name) for i, name in present() if name in ARCHS)
    arch = find_arch(name)
    loaded = kernels.load(kernels.parse_spec("triton"), arch, "device", True)
    parsed = cases.parse_id(case)
    names = invariants.fitting(parsed, "device")
    line = PlanLine(case, parsed.op, "triton", "device", None, names)
    result = runner.run_one(parsed, runner.Session(arch, "device", f"cuda:{index}", loaded), line, "")
    assert result.status is Status.PASSED, result.reason
    assert set(names) - {"dependent_launch"} <= {f.check for f in result.findings}  # ours do not use it
