"""Wrong kernels on purpose: made from sources, killed by name, and the right ones among them left alone."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from collections import Counter

import pytest

from m3check import arch, kernels
from m3check.mutants import catalogue, controls, generic, processes, sampled, standard
from m3check.mutants.mutant import Edit, Mutant, Outcome, content_key
from m3check.mutants.origins import sources
from m3check.mutants.reach import Reach, reached
from m3check.mutants.review import elsewhere, judged, reviewed
from m3check.mutants.rows import ROWS
from m3check.mutants.sources import Sources, edited, load
from m3check.mutants.tables import percent
from m3check.types import M3CheckError

SOURCE = b'''import triton
import triton.language as tl


@triton.jit
def kernel(x, stride_xm, stride_xn, n, out):
    """Not edited: 1 < 2."""
    at = tl.program_id(0) * 64 + tl.arange(0, 64)
    if n > 0:
        value = tl.load(x + at * stride_xm, mask=at < n, other=-1.0)
        tl.store(out + at, tl.maximum(value, 0.5), mask=(at < n) & (at >= 0))


def launch(x, out, n):
    if n < 0:
        raise ValueError("n < 0")
    kernel[(n // 64 + 1,)](x, x.stride(0), x.stride(1), n, out, num_warps=4)
'''


@pytest.fixture(scope="module")
def ours():
    return sources(kernels.parse_spec("triton"), arch.find_arch("sm90"), offline=True)


@pytest.fixture(scope="module")
def edits(ours):
    return [m for file in ours.files for m in generic.mutants("triton", file, ours.read(file))]


def made(source: bytes = SOURCE) -> list[Mutant]:
    return generic.mutants("triton", "file.py", source)


def texts(kind: str) -> set[str]:
    return {m.text.split(": ", 1)[1] for m in made() if m.kind == kind}


def test_each_kind_of_edit_does_what_its_name_says():
    assert "at < n → (at <= n)" in texts("comparison")
    assert "at < n → (at < (n) - 1)" in texts("bound")
    assert any(t.endswith("tl.load(x + at * stride_xm)") for t in texts("mask dropped"))
    assert texts("term of a mask dropped") == {"(at < n) & (at >= 0) → (at < n)", "(at < n) & (at >= 0) → (at >= 0)"}
    assert texts("stride swapped") == {"stride_xm → stride_xn"}
    assert {"n > 0 → True", "n > 0 → False"} <= texts("guard removed")
    assert {"maximum → minimum", "tl.maximum(value, 0.5) → (0.5)"} <= texts("min/max")
    assert "tl.program_id(0) → tl.program_id(1)" in texts("program id")
    assert any(t.endswith("→ pass") for t in texts("statement dropped"))
    assert "-1.0 → 0" in texts("initial value")
    assert "x.stride(0) → x.stride(1)" not in texts("stride swapped")
    assert "0 → 1" in texts("constant")


def test_documentation_raises_and_speed_are_not_edited():
    for mutant in made():
        assert '"""' not in mutant.text
        assert "4 → 5" not in mutant.text
        assert "n < 0" not in mutant.text


def test_every_edit_of_our_kernels_parses_and_changes_the_program(ours, edits):
    for file in ours.files:
        source = ours.read(file)
        clean = ast.dump(ast.parse(source))
        for mutant in [m for m in standard(edits, 1) if m.file == file]:
            text = edited(source, mutant, file)
            assert ast.dump(ast.parse(text)) != clean, mutant.text


def test_there_are_enough_of_them_in_every_kernel(ours, edits):
    assert len(standard(edits)) >= 150  # and as many of vLLM's
    assert len({m.key for m in edits}) == len(edits)
    functions = Counter(m.text.split()[1] for m in standard(edits))
    for function in ("score_tile:", "select_tile:", "attend:", "merge_kernel:", "sparse_attn_kernel:", "index_score:"):
        assert functions[function] >= 5


def test_a_hash_outlives_lines_that_come_and_go_elsewhere():
    moved = SOURCE.replace(b"def launch", b"NEW = 1\n\n\ndef launch").replace(
        b"import triton\n", b"# a comment\nimport triton\n"
    )
    assert [m.key for m in made(moved)] == [m.key for m in made()]
    assert {m.name for m in made(moved)} != {m.name for m in made()}
    changed = {m.key for m in made(SOURCE.replace(b"0.5", b"0.25"))}
    assert 0 < len(changed & {m.key for m in made()}) < len(changed)


def test_a_sample_is_the_same_for_the_same_seed(edits):
    assert sampled(edits, 20, 1) == sampled(list(reversed(edits)), 20, 1)[::-1]
    assert sampled(edits, 20, 1) != sampled(edits, 20, 2)


def test_every_row_of_the_catalogue_is_made_or_says_why_not(ours):
    found, without = catalogue.mutants(ours, "interpreted")
    named = {m.name.split()[0] for m in found}
    interpreted = {row.name for row in ROWS if row.where == "interpreted"}
    assert named == interpreted - {"W7"}  # our kernels launch nothing dependently
    assert all(row.reason and (row.where in ("device", "elsewhere") or row.name == "W7") for row in without)
    assert len({m.key for m in found}) == len(found)


def test_a_call_left_out_is_a_mutant_wherever_it_is_made(tmp_path):
    source = "@triton.jit\ndef one(x):\n    if PDL:\n        tl.extra.cuda.gdc_wait()\n    y = gdc_wait_time(x)\n"
    (tmp_path / "a.py").write_text(source + source.replace("one", "two").replace("    y", "    lib.gdc_wait()\n    y"))
    origin = Sources(kernels.parse_spec("vllm==0.33.0"), "vllm", {"": tmp_path}, ("a.py",))
    found = [m for m in catalogue.mutants(origin, "interpreted")[0] if m.name.startswith("W7")]
    assert [m.text.split(" ", 1)[1] for m in found] == [f"{n}: gdc_wait → pass" for n in ("one", "two", "two")]
    assert len({m.key for m in found}) == 3
    texts = [edited(origin.read("a.py"), m, "a.py") for m in found]
    assert [text.count(b"gdc_wait()") for text in texts] == [2, 2, 2]
    assert all(compile(text, "a.py", "exec") for text in texts)


def test_every_tree_of_vllm_is_edited_in_a_copy_that_loads(tmp_path):
    spec, gfx950 = kernels.parse_spec("vllm==0.33.0"), arch.find_arch("gfx950")
    try:
        kernels.prepare(spec, True)
    except M3CheckError as error:
        pytest.skip(f"vLLM's wheel is not in the cache: {error}")
    origin = sources(spec, gfx950, offline=True)
    assert {"amd/ops/sparse_pa.py", "amd/ops/indexer_cp_exchange.py", "xpu_mla_sparse.py"} < set(origin.files)
    assert not [file for file in sources(spec, arch.find_arch("sm90"), True).files if file.startswith("amd/")]
    for file, op in (("amd/ops/sparse_pa.py", "sparse_pa_table"), ("xpu_mla_sparse.py", "mla_sparse")):
        source = origin.read(file)
        mutant = Mutant("vllm", "function", "", "", "", (Edit(file, 0, 0, b"raise RuntimeError('edited')\n"),))
        copy = tmp_path / op
        try:
            loaded = load(origin, gfx950, "compiled", mutant, copy)
            sentence = loaded.missing[op]  # a file of latent attention may fail to import: its op alone is missing
        except M3CheckError as error:
            sentence = str(error)
        assert "edited" in sentence
        assert str(copy) in sentence or op == "mla_sparse"
        assert origin.read(file) == source


def of_sglang(name: str, target: str) -> Sources:
    spec = kernels.parse_spec(name)
    try:
        kernels.prepare(spec, True)
    except M3CheckError as error:
        pytest.skip(f"SGLang's wheel is not in the cache: {error}")
    return sources(spec, arch.find_arch(target), True)


@pytest.fixture(scope="module")
def hopper():
    """SGLang's sources on Hopper, and their edits."""
    origin = of_sglang("sglang==0.5.23", "sm90")
    return origin, [m for f in origin.files for m in generic.mutants("sglang", f, origin.read(f), origin.reach)]


def test_sglang_is_edited_in_a_copy_that_loads_where_its_calls_reach(hopper, tmp_path):
    origin, edits = hopper
    launched = {"_gqa_share_sparse_fwd_kernel", "_decode_score_paged_kernel", "tile_ptrs_3d", "_compare_and_swap"}
    others = {"_decode_score_kernel", "_decode_score_attn_kernel", "_merge_attn_out_kernel", "_score_shard"}
    assert launched < origin.reach.functions
    assert not others & origin.reach.functions
    assert "_decode_score_kernel" in of_sglang("sglang==0.5.23", "sm100").reach.functions
    assert "_decode_score_attn_kernel" in of_sglang("sglang_fused==0.5.23", "sm90").reach.functions
    assert "decode/indexer_cp.py" in of_sglang("sglang==0.5.23", "gfx950").files
    assert "decode/indexer_cp.py" not in origin.files
    assert len(standard(edits)) > 300
    assert not [m.text for m in edits if "qsink" in m.text]
    rows, _ = catalogue.mutants(origin, "interpreted")
    assert {"A12", "T3", "S2"} < {m.name.split()[0] for m in rows}  # wrappers go around anybody's kernels
    file = "common/tile_ptr.py"
    source = origin.read(file)
    mutant = Mutant("sglang", "function", "", "", "", (Edit(file, 0, 0, b"raise RuntimeError('edited')\n"),))
    with pytest.raises(M3CheckError, match="edited") as error:
        load(origin, arch.find_arch("sm90"), "compiled", mutant, tmp_path)
    assert str(tmp_path) in str(error.value)
    assert origin.read(file) == source
    assert "index_topk" in load(origin, arch.find_arch("sm90"), "compiled", None, tmp_path).kernels


REACHED = b"""
def called(x, sink, n):
    y = n + 1
    if sink is not None and n > 2:
        y = n + 3
    elif not MODERN:
        return early(x if MODERN else x + 4, n + 5)
    y = n + 6
    return table[x](y)

def early(x, n):
    return n + 7

def launched(y):
    return y + 8

def unused(y):
    return y + 9

table = {0: launched}
"""


def test_what_calls_never_reach_is_not_edited():
    def numbers(*conditions):
        fixed = dict(conditions)
        reach = reached([REACHED], ["called"], fixed)
        changed = [m for m in generic.mutants("triton", "a.py", REACHED, reach) if m.kind == "arithmetic"]
        return {int(m.text.split(" + ")[1].split()[0]) for m in changed}

    assert numbers() == {1, 3, 4, 5, 6, 7, 8}
    assert numbers(("sink is not None", False)) == {1, 4, 5, 6, 7, 8}
    assert numbers(("sink is not None", True)) == {1, 3, 4, 5, 6, 7, 8}  # `and` stays open
    assert numbers(("MODERN", True)) == {1, 3, 6, 8}
    assert numbers(("MODERN", False), ("sink is not None", False)) == {1, 4, 5, 7}  # what follows a return
    assert {m.text for m in generic.mutants("triton", "a.py", REACHED) if "unused" in m.text}
    assert Reach({"a": True, "b": False}).truth(ast.parse("a or c", mode="eval").body) is True
    assert Reach({"a": True, "b": False}).truth(ast.parse("not (a and b)", mode="eval").body) is True
    assert Reach({"a": True}).truth(ast.parse("a and c", mode="eval").body) is None


def test_what_was_reviewed_is_still_there(ours, edits):
    known = {m.key for m in (*edits, *catalogue.mutants(ours, "device")[0])}
    for entry in reviewed().values():
        if entry.what.startswith("triton "):
            assert entry.key in known, f"{entry.what}: no mutant has the key {entry.key} any more"


def test_what_was_reviewed_of_sglang_is_still_there(hopper):
    origin, edits = hopper
    known = {m.key for m in (*edits, *catalogue.mutants(origin, "interpreted")[0])}
    for entry in reviewed().values():
        if entry.what.startswith("sglang "):
            assert entry.key in known, f"{entry.what}: no mutant has the key {entry.key} any more"


def test_reviewed_survivors_count_against_the_score(tmp_path):
    mutants = [Mutant("triton", "constant", "a", "a", content_key(str(i))) for i in range(4)]
    verdicts = ["killed", "survived", "survived", "unreached"]
    file = tmp_path / "reviewed.toml"
    file.write_text(
        f'[[mutant]]\nkey = "{mutants[1].key}"\nwhat = "a"\nverdict = "equivalent"\nreason = "same"\n'
        f'[[mutant]]\nkey = "{mutants[2].key}"\nwhat = "b"\nverdict = "accepted"\nreason = "no case"\n'
    )
    outcomes = [judged(Outcome(m, v), reviewed(file), {}) for m, v in zip(mutants, verdicts, strict=True)]
    assert [o.verdict for o in outcomes] == ["killed", "equivalent", "accepted", "unreached"]
    assert percent(outcomes) == "33.3 %"
    both = f'keys = ["{mutants[1].key}", "{mutants[3].key}"]'
    file.write_text(f'[[mutant]]\n{both}\nwhat = "a"\nverdict = "equivalent"\nreason = "the same"\n')
    assert {entry.key: entry.reason for entry in reviewed(file).values()} == {mutants[i].key: "the same" for i in (1, 3)}
    file.write_text(f'[[mutant]]\nkey = "{mutants[1].key}"\nwhat = "a"\nverdict = "equivalent"\nreason = " "\n')
    with pytest.raises(ValueError, match="no reason"):
        reviewed(file)


def test_what_no_case_reaches_in_a_function_that_runs_elsewhere_is_not_counted(tmp_path):
    file = tmp_path / "reviewed.toml"
    entry = '[[elsewhere]]\nprovider = "vllm"\nfile = "amd/pages.py"\nfunctions = ["attend"]\nreason = "{}"\n'
    file.write_text(entry.format("needs a library"))
    edit = (Edit("amd/pages.py", 0, 1, b"x"),)

    def found(verdict, provider="vllm", function="attend"):
        mutant = Mutant(provider, "constant", "a", "a", content_key(verdict), edit, function=function)
        return judged(Outcome(mutant, verdict), reviewed(file), elsewhere(file))

    assert found("unreached").verdict == "elsewhere"
    assert found("unreached").detail == "needs a library"
    assert found("survived").verdict == "survived", "a case does reach it"
    assert found("unreached", function="build").verdict == "unreached"
    assert found("unreached", provider="triton").verdict == "unreached"
    assert percent([found("unreached"), found("killed")]) == "100.0 %"
    file.write_text(entry.format(" "))
    with pytest.raises(ValueError, match="no reason"):
        elsewhere(file)


def test_functions_that_run_elsewhere_are_still_there():
    try:
        origin = sources(kernels.parse_spec("vllm==0.33.0"), arch.find_arch("gfx950"), offline=True)
    except M3CheckError as error:
        pytest.skip(f"the wheel is not in the cache: {error}")
    for provider, file, function in elsewhere():
        assert provider == origin.name
        assert f"\ndef {function}(".encode() in origin.read(file), f"{file} has no {function}"


def test_a_process_that_hangs_or_dies_costs_itself_alone():
    def work(task, send):
        send({"begin": task})
        if task == "hang":
            processes.limit(0.3)
            while True:
                pass
        if task == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if task == "raise":
            raise RuntimeError
        send({"green": True})

    ended = {c.task: c.ended for c in processes.run(iter(["fine", "hang", "die", "raise"]), work, 2, 30.0)}
    assert ended == {"fine": "", "hang": "timeout", "die": "signal SIGKILL", "raise": "exit code 70"}


def test_controls_of_ours_stay_within_what_right_kernels_may_do(ours):
    names = {c.name.split()[0] for c in controls.controls(ours)}
    assert names == {"N1", "N2", "N3"}
    for control in controls.controls(ours):
        for file in {edit.file for edit in control.edits}:
            ast.parse(edited(ours.read(file), control, file))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="mutants run in forked processes")
def test_named_mutants_are_killed_and_a_control_is_green(tmp_path):
    """The whole path on the selection kernels: sources, a warm parent, the run's own judging, the verdicts."""
    out = tmp_path / "mutants.json"
    only = ["T3 unused", "T5 no forced block: index_topk", "T10 past the last row: index_topk", "S3 selection", "N1 tied"]
    words = [sys.executable, "-m", "m3check", "mutants", "--op", "index_topk", "-k", "h=2", "--json", str(out), "--only"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*words, *only], capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ended = {row["name"]: (row["verdict"], row["check"]) for row in json.loads(out.read_text())}
    assert ended["N1 tied blocks swapped"] == ("green", "")
    assert ended["T3 unused slots hold ids: index_topk"] == ("killed", "ids")
    assert ended["T5 no forced block: index_topk"] in {("killed", "forced"), ("killed", "order")}, (
        "forced blocks come first"
    )
    assert ended["T10 past the last row: index_topk"] == ("killed", "guards")
    assert ended["S3 selection reads every column"][0] == "killed"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="mutants run in forked processes")
def test_a_seeded_sample_of_generic_edits_has_no_survivor_that_is_not_listed(tmp_path):
    """The harness measured anew at every change: exit 1 where smoke lets one of them live that nobody has looked at."""
    out = tmp_path / "mutants.json"
    sample = ["--only", "selection.py:", "index_topk.py:", "--sample", "8", "--seed", "1"]
    words = ["m3check", "mutants", "--op", "index_topk", *sample, "--json"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *words, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [row for row in json.loads(out.read_text()) if row["kind"] != "catalogue"]
    assert len(rows) == 8
    assert sum(row["verdict"] == "killed" for row in rows) >= 4
    assert not list(tmp_path.glob("*.part"))
