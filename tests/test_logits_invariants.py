"""What must not change indexer logits: what the comparison lets pass is red by its invariant; right kernels hold all."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from test_invariants import session
from test_invariants_device import ON_A_DEVICE, replays  # noqa: F401  # a fixture
from test_logits import paged, windowed

from m3check import cases, invariants, runner
from m3check.arch import find_arch
from m3check.types import PlanLine, Profile, Status

PROFILE = Profile(bitwise=frozenset({"repeat", "far_rows", "apart", "empty", "graph"}))
FP8 = "h=1,g=4,d=16,dtype=fp8_e4m3fn,cache=fp8_e4m3fn"
MQA = f"mqa_logits/q=5+3,kv=71+9,{FP8}"
PAGED = f"paged_mqa_logits/q=2x4,kv=131+64+7+65,{FP8}"
IDS = {"mqa_logits": MQA, "paged_mqa_logits": PAGED}
NEGATIVE = float("-inf")


def into(function):
    """A right kernel that writes where it is told, or into a tensor of its own."""

    def call(logits_out=None, **arguments):
        result = function(**arguments)
        return result if logits_out is None else logits_out.copy_(result)

    return like(function, call)


def like(function, wrapper):
    """A wrapper with a kernel's signature and a buffer, which say what m3check passes."""
    given = [p for p in inspect.signature(function).parameters.values() if p.name != "logits_out"]
    buffer = inspect.Parameter("logits_out", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
    wrapper.__signature__ = inspect.Signature([*given, buffer])
    return wrapper


RIGHT = {"mqa_logits": into(windowed()), "paged_mqa_logits": into(paged())}


def planted(op, spoil):
    """The right kernel of an op, spoiled: `spoil(kernel, arguments)` gives its result."""
    return like(RIGHT[op], lambda **arguments: spoil(RIGHT[op], arguments))


def judged(case, names, functions, profile=PROFILE, **loaded):
    parsed = cases.parse_id(case)
    made = session({**RIGHT, **functions}, profile)
    made = replace(made, loaded=replace(made.loaded, **loaded))
    return runner.run_one(parsed, made, PlanLine(case, parsed.op, "user", "interpreted", None, tuple(names)), "")


def caught(op, spoil, name, says, case=None, profile=PROFILE):
    """The comparison alone passes; the invariant, by its name, is red and alone so; and the right kernel passes it."""
    wrong, case = {op: planted(op, spoil)}, case or IDS[op]
    alone = judged(case, (), wrong, profile)
    assert alone.status is Status.PASSED, alone.reason
    result = judged(case, (name,), wrong, profile)
    assert {f.check for f in result.findings if f.status is Status.FAILED} == {name}, result
    assert says in result.reason
    clean = judged(case, (name,), {}, profile)
    assert clean.status is Status.PASSED, clean.reason
    assert name in {f.check for f in clean.findings}, "it did not even look"


def test_keys_of_other_lanes_may_be_added_up_in_another_order():
    def by_lane(kernel, arguments):
        buffer = arguments.pop("logits_out", None)
        odd = torch.arange(len(arguments["k"])) % 2 == 1
        result = torch.where(odd, windowed()(**arguments), windowed(order=-1)(**arguments))
        return result if buffer is None else buffer.copy_(result)

    result = judged(f"{MQA},fill=wide", ("batch_order",), {"mqa_logits": planted("mqa_logits", by_lane)})
    assert result.status is Status.PASSED, result.reason


@pytest.mark.parametrize("op", IDS)
@pytest.mark.parametrize("how", [{}, {"order": -1}, {"dtype": torch.float64}])
def test_right_kernels_hold_all_of_them_however_they_add_up(op, how):
    made = {"mqa_logits": windowed, "paged_mqa_logits": paged}[op]
    names = invariants.fitting(cases.parse_id(IDS[op]), "interpreted")
    result = judged(IDS[op], names, {op: into(made(**how))})
    assert result.status is Status.PASSED, result.reason
    shown = {f.check for f in result.findings}
    assert set(names) - shown <= {"tiles", "autotune"}, "torch functions tell no tiles and no configurations"
    wanted = {"far_rows", "apart", "own_buffers", "head_order", "padded", "all_padded", "poison", "tiles"}
    wanted |= {"chunked"} if op == "mqa_logits" else {"far_pages", "verify", "same_as_prefill"}
    assert wanted <= set(names)


def wrapped(tensor):
    """Rows of a tensor where offsets of 32 bits would find them."""
    rows = []
    for row in range(tensor.shape[0]):
        offset = (row * tensor.stride(0) + 2**31) % 2**32 - 2**31
        rows.append(tensor.as_strided(tensor.shape[1:], tensor.stride()[1:], tensor.storage_offset() + offset))
    return rows


@pytest.mark.parametrize("op", IDS)
@pytest.mark.parametrize("name", ["q", "k", "weights", "logits_out"])
def test_far_rows_catches_an_offset_of_32_bits(op, name):
    if name == "k" and op != "mqa_logits":
        return

    def spoil(kernel, arguments):
        if name != "logits_out":
            return kernel(**{**arguments, name: torch.stack(wrapped(arguments[name]))})
        result = kernel(**{**arguments, name: None})
        for cells, row in zip(wrapped(arguments[name]), result, strict=True):
            cells.copy_(row)
        return arguments[name]

    caught(op, spoil, "far_rows", "query tokens times their stride")
    unpromised = judged(IDS[op], ("far_rows",), {op: planted(op, spoil)}, Profile(bitwise=frozenset({"repeat"})))
    assert unpromised.status is Status.PASSED
    assert Status.NOTED in {f.status for f in unpromised.findings}


@pytest.mark.parametrize("bytes_too", [True, False], ids=["of bytes", "of scales alone"])
def test_far_pages_catches_an_offset_of_32_bits(bytes_too):
    def wrap(page, stride):
        return (page * stride + 2**31) % 2**32 - 2**31

    def spoil(kernel, arguments):
        cache, table = arguments["kv_cache"], arguments["block_table"]
        split, pages = 64 * 16, []
        for page in table.flatten().tolist():
            whole = cache.as_strided((64 * 20,), (1,), cache.storage_offset() + page * cache.stride(0)).clone()
            if bytes_too:
                at = cache.storage_offset() + wrap(page, cache.stride(0))
                whole[:split] = cache.as_strided((split,), (1,), at)
            at = cache.storage_offset() + 4 * wrap(page, cache.stride(0) // 4)
            whole[split:] = cache.as_strided((256,), (1,), at + split)
            pages.append(whole)
        arguments = {**arguments, "kv_cache": torch.stack(pages).view(-1, 64, 1, 20)}
        return kernel(**{**arguments, "block_table": torch.arange(table.numel()).view(table.shape)})

    caught("paged_mqa_logits", spoil, "far_pages", "page ids times their stride passed 2^31")


def dense(tensor):
    """Taken for contiguous in its last dimension."""
    return tensor.as_strided(tensor.shape, (*tensor.stride()[:-1], 1))


@pytest.mark.parametrize(("op", "name"), [("mqa_logits", "k"), ("mqa_logits", "weights"), ("paged_mqa_logits", "q")])
def test_apart_catches_channels_that_were_taken_for_dense(op, name):
    caught(op, lambda kernel, a: kernel(**{**a, name: dense(a[name])}), "apart", "two elements apart")


def test_apart_catches_columns_of_the_result_that_were_taken_for_dense():
    def spoil(kernel, arguments):
        kernel(**{**arguments, "logits_out": dense(arguments["logits_out"])})
        return arguments["logits_out"]

    caught("mqa_logits", spoil, "apart", "two elements apart")


def doubled(when):
    """The right result, twice as large where `when(arguments)` says so."""

    def spoil(kernel, arguments):
        result = kernel(**arguments)
        return result.mul_(2) if when(arguments) else result

    return spoil


def scratch(kernel, arguments):
    result = kernel(**arguments)
    result[:, 0] += torch.empty(1).nan_to_num(0)  # a partial result that nobody wrote
    return result


SPOILED = {
    ("poison", "mqa_logits"): (scratch, "large numbers instead of NaN"),
    ("poison", "paged_mqa_logits"): (scratch, "large numbers instead of NaN"),
    ("own_buffers", "mqa_logits"): (doubled(lambda a: a.get("logits_out") is None), "no buffer was given"),
    ("own_buffers", "paged_mqa_logits"): (doubled(lambda a: a.get("logits_out") is None), "no buffer was given"),
    ("padded", "mqa_logits"): (doubled(lambda a: (a["starts"] == a["ends"]).any()), "padded rows"),
    ("padded", "paged_mqa_logits"): (doubled(lambda a: (a["context_lens"] == 0).any()), "padded rows"),
    ("chunked", "mqa_logits"): (doubled(lambda a: len(a["k"]) % 2), "in two chunks"),
    ("verify", "paged_mqa_logits"): (doubled(lambda a: a["q"].shape[1] == 1), "single decode rows"),
}


@pytest.mark.parametrize(("name", "op"), SPOILED)
def test_a_kernel_that_is_wrong_in_one_circumstance(name, op):
    spoil, says = SPOILED[name, op]
    caught(op, spoil, name, says)


@pytest.mark.parametrize("op", IDS)
def test_head_order_catches_a_head_that_is_treated_by_its_place(op):
    first = cases.make_inputs(cases.parse_id(IDS[op])).more["weights"][0]
    heaviest = int(first.abs().argmax())

    def spoil(kernel, arguments):  # the heaviest head is right where it is, and nowhere else
        wrong = int(arguments["weights"][0].abs().argmax()) != heaviest
        return kernel(**{**arguments, "weights": arguments["weights"] * (1.5 if wrong else 1)})

    caught(op, spoil, "head_order", "the heads stood in another order: logits")


@pytest.mark.parametrize("fill", [0.0, float("nan"), -1e30])
@pytest.mark.parametrize("op", IDS)
def test_all_padded_looks_at_the_cells_of_a_batch_that_sees_nothing(op, fill):
    def spoil(kernel, arguments):
        result = kernel(**arguments)
        return result if (result > NEGATIVE).any() else result.fill_(fill)

    caught(op, spoil, "all_padded", "no query saw a token: outside")


def test_same_as_prefill_asks_the_kernel_over_windows():
    wrong = {"mqa_logits": planted("mqa_logits", doubled(lambda a: True))}
    result = judged(PAGED, ("same_as_prefill",), wrong)
    assert {f.check for f in result.findings if f.status is Status.FAILED} == {"same_as_prefill"}
    assert "went through mqa_logits: logits" in result.reason


def test_tiles_catches_a_tile_that_is_never_made():
    step = {"keys": 1000}

    @contextmanager
    def small():
        step["keys"] = 32
        try:
            yield
        finally:
            step["keys"] = 1000

    def three_tiles(kernel, arguments):
        result = kernel(**arguments)
        result[:, 2 * step["keys"] :] = NEGATIVE
        return result

    tiles = (("tiles of 32 keys", small),)
    for op, case in IDS.items():
        result = judged(case, ("tiles",), {op: planted(op, three_tiles)}, tiles=tiles)
        assert result.status is Status.FAILED
        assert "with tiles of 32 keys: logits" in result.reason
        assert judged(case, ("tiles",), {}, tiles=tiles).status is Status.PASSED


def test_a_buffer_holds_the_result_and_its_margins_are_somebody_elses():
    def elsewhere(kernel, arguments):
        return kernel(**{**arguments, "logits_out": None})

    def spills(kernel, arguments):
        out = arguments.get("logits_out")
        if out is not None and out.stride(0) > out.shape[1]:
            out.as_strided((1,), (1,), out.storage_offset() + out.shape[1]).fill_(0)
        return kernel(**arguments)

    for op, case in IDS.items():
        for spoil, check in ((elsewhere, "given"), (spills, "guards")):
            result = judged(f"{case},layout=pool", ("repeat",), {op: planted(op, spoil)})
            assert check in {f.check for f in result.findings if f.status is Status.FAILED}, (op, check)


# On a device: graphs and streams are stood in for, as for the other ops.


def launched(replays, op, function, names, case=None):  # noqa: F811
    made = session({op: like(RIGHT[op], replays.captured(function, op))}, PROFILE)
    made = replace(made, evidence="device", arch=find_arch("sm90"))
    case = case or IDS[op]
    return runner.run_one(cases.parse_id(case), made, PlanLine(case, op, "user", "device", None, tuple(names)), "")


@pytest.mark.parametrize("op", IDS)
def test_right_kernels_hold_what_a_device_shows(replays, op):  # noqa: F811
    names = [n for n in invariants.fitting(cases.parse_id(IDS[op]), "device") if n in ON_A_DEVICE]
    assert set(names) == ({"graph", "load"} if op == "mqa_logits" else {"graph", "load", "dependent_launch"})
    result = launched(replays, op, RIGHT[op], names)
    assert result.status is Status.PASSED, result.reason
    assert set(names) <= {f.check for f in result.findings if f.status is Status.PASSED}


FROZEN = [("mqa_logits", "ends"), ("paged_mqa_logits", "context_lens"), ("paged_mqa_logits", "block_table")]


@pytest.mark.parametrize(("op", "frozen"), FROZEN)
def test_graph_catches_what_was_read_at_capture(replays, op, frozen):  # noqa: F811
    kept = {}

    def early(**arguments):
        if replays.mode == "capture":
            kept[frozen] = arguments[frozen].clone()
        if replays.mode == "replay":
            arguments[frozen] = kept[frozen]
        return RIGHT[op](**arguments)

    assert launched(replays, op, early, ()).status is Status.PASSED
    result = launched(replays, op, early, ("graph",))
    assert result.status is Status.FAILED
    assert "graph replayed with other lengths" in result.reason


@pytest.mark.parametrize(("op", "shared"), FROZEN)
def test_load_catches_metadata_of_the_launch_before(replays, op, shared):  # noqa: F811
    before = []

    def late(**arguments):
        before.append(arguments[shared].clone())
        if len(before) > 3 and before[-2].shape == before[-1].shape:
            arguments[shared] = before[-2]
        return RIGHT[op](**arguments)

    assert launched(replays, op, late, ()).status is Status.PASSED
    before.clear()
    result = launched(replays, op, late, ("load",))
    assert result.status is Status.FAILED
    assert "in flight on two streams" in result.reason


def test_dependent_launch_catches_lengths_that_are_read_before_the_wait(replays):  # noqa: F811
    def early(**arguments):
        arguments["context_lens"] = arguments["context_lens"].clone()
        replays.wait()
        return RIGHT["paged_mqa_logits"](**arguments)

    made = session({"paged_mqa_logits": like(RIGHT["paged_mqa_logits"], early)}, PROFILE)
    made = replace(made, evidence="device", arch=find_arch("sm90"))
    line = PlanLine(PAGED, "paged_mqa_logits", "user", "device", None, ("dependent_launch",))
    result = runner.run_one(cases.parse_id(PAGED), made, line, "")
    assert result.status is Status.FAILED
    assert "right behind a slow kernel" in result.reason
