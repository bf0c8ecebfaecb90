"""The author's bench: shrinking a case, saving one that replays, and the commands around them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from m3check import arch as arches
from m3check import bundle, cases, cli, kernels, runner, shrink
from m3check.commands.explain import target
from m3check.report import jsonfile
from m3check.types import Case, Exit, M3CheckError, PlanLine, Record, Result, Status

WRONG = '''
import torch


def sparse_attn_decode(q, kv_cache, topk_idx, block_table, seq_lens, sm_scale, output, decode_query_len):
    """Right, but that two requests of a batch share the first one's page table."""
    dim, heads = q.shape[-1], kv_cache.shape[1]
    group = q.shape[1] // heads
    for row in range(q.shape[0]):
        request, i = divmod(row, decode_query_len)
        position = int(seq_lens[request]) - decode_query_len + i
        for head in range(heads):
            lanes = slice(head * group, (head + 1) * group)
            listed = [int(b) for b in topk_idx[head, row] if 0 <= b <= position // 128]
            if not listed:
                output[row, lanes] = 0
                continue
            token = (torch.tensor(listed)[:, None] * 128 + torch.arange(128)).flatten()
            token = token[token <= position]
            kv = kv_cache[block_table[TABLE, token // 128].long(), head, token % 128].float()
            weight = (q[row, lanes].float() @ kv[:, :dim].T * sm_scale).softmax(-1)
            output[row, lanes] = (weight @ kv[:, dim:]).to(output.dtype)
'''
CASE = "sparse_attn_decode/q=1x3,kv=900+770+1300,h=2,g=2,d=64,topk=4"


def written(folder: Path, table: str) -> Path:
    path = folder / f"kernel_{len(table)}.py"
    path.write_text(WRONG.replace("TABLE", table))
    return path


def session(path: Path) -> runner.Session:
    spec = kernels.parse_spec(str(path))
    arch = arches.find_arch("sm90")
    return runner.Session(arch, "interpreted", "cpu", kernels.load(spec, arch, "interpreted", True))


# Shrinking ---


def test_a_failing_case_becomes_small(tmp_path):
    one = session(written(tmp_path, "0"))

    found = shrink.shrink(cases.parse_id(CASE), lambda case, wanted: shrink.reason(case, one, wanted))

    assert found.finished
    assert found.reason == "attend"
    assert len(found.case.kv_lens) == 2  # one request alone is right
    assert found.case.block_columns <= max(4, found.case.topk + 2)
    assert (found.case.kv_heads, found.case.gqa, found.case.topk) == (1, 1, 1)
    again = shrink.shrink(cases.parse_id(CASE), lambda case, wanted: shrink.reason(case, one, wanted))
    assert again == found


def test_a_green_case_cannot_be_shrunk(tmp_path):
    one = session(written(tmp_path, "request"))

    with pytest.raises(ValueError, match="does not fail"):
        shrink.shrink(cases.parse_id(CASE), lambda case, wanted: shrink.reason(case, one, wanted))


def test_only_the_same_reason_counts():
    """A case that fails otherwise is no smaller version of this one."""

    def attempt(case: Case, wanted: str) -> str:
        if case.context > 500:
            return "score"
        return "memory" if case.context > 100 else ""

    found = shrink.shrink(cases.parse_id("index_score/q=1,kv=1500"), attempt)

    assert 500 < found.case.context < 700
    assert found.reason == "score"


def test_every_try_is_a_valid_case():
    seen = []

    def attempt(case: Case, wanted: str) -> str:
        assert cases.complaint(case) is None
        assert cases.parse_id(cases.case_id(case)) == case
        seen.append(case)
        return "x"

    for text in (
        "decode/q=2x3,kv=1+1409+700,h=2,g=4,topk=4,init=1,cache=fp8_e4m3fn,icache=fp8_e4m3fn,scale=token,mq=4",
        "sparse_attn/q=5+1,kv=1025+129,h=2,g=4,topk=4,cache=fp8_e4m3fn,scale=token,ids=holes,layout=nhd~3",
        "index_topk/q=3,kv=2690,h=2,topk=8,fill=ties",
    ):
        found = shrink.shrink(cases.parse_id(text), attempt).case
        assert (found.total_queries, found.kv_heads, found.layout, found.seed) == (1, 1, "hnd", 0)
        assert found.context <= 128
    assert len(seen) < 120


def test_time_ends_a_descent():
    found = shrink.shrink(cases.parse_id(CASE), lambda case, wanted: "x", seconds=-1.0)

    assert not found.finished
    assert found.case == cases.parse_id(CASE)


# Bundles ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    path = written(folder, "0")
    line = PlanLine(CASE, "sparse_attn_decode", str(path), "interpreted")
    return bundle.save(cases.parse_id(CASE), session(path), line, folder / "failures", {"version": "1"})


def replay(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The script by itself: no m3check on its path, torch without our tests' settings."""
    command = [sys.executable, "-I", str(folder / "repro.py"), "--device", "cpu", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)


def test_a_bundle_replays_the_failure(saved):
    done = replay(saved)

    assert done.returncode == 1, done.stderr
    assert "beyond their bound" in done.stdout
    assert "the same as recorded" in done.stdout
    assert CASE in done.stdout


def test_a_mended_kernel_passes_the_bundle(saved):
    right = written(saved.parent, "request")
    done = replay(saved, "--kernel", f"{right}:sparse_attn_decode")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of " in done.stdout
    assert "is not the file that failed" in done.stderr


def test_a_bundle_names_the_kernel_and_holds_no_source_and_no_pickle(saved):
    about = json.loads((saved / "case.json").read_text())

    (call,) = about["calls"]
    assert call["kernel"]["function"] == "sparse_attn_decode"
    assert len(call["kernel"]["sha256"]) == 64
    assert about["provider_description"] == {"version": "1"}
    assert {path.name for path in saved.iterdir()} == {"case.json", "repro.py", "tensors.safetensors"}
    assert "import torch" in (saved / "repro.py").read_text()
    assert "m3check" not in [
        line.split()[1] for line in (saved / "repro.py").read_text().splitlines() if line.startswith("import")
    ]
    assert (saved / "tensors.safetensors").read_bytes()[8:9] == b"{"


def test_a_chain_and_a_kernel_that_raises(tmp_path):
    import torch_kernels

    from m3check.kernels.provider import with_chains
    from m3check.types import Kernel, Profile

    made = {op: Kernel("user", op, op, Profile(dequantise="rounded"), f) for op, f in torch_kernels.RIGHT.items()}

    def broken(**keywords: object) -> None:
        raise ValueError("no such page")

    made["sparse_attn"] = replace(made["sparse_attn"], function=broken)
    loaded = kernels.Loaded.of(with_chains(made, {})[0])
    one = runner.Session(arches.find_arch("sm90"), "interpreted", "cpu", loaded)
    text = "prefill/q=2,kv=700,h=2,g=2,d=64,topk=3,cache=fp8_e4m3fn,scale=token"
    folder = bundle.save(cases.parse_id(text), one, PlanLine(text, "prefill", "user", "interpreted"), tmp_path, {})

    about = json.loads((folder / "case.json").read_text())
    assert [call["op"] for call in about["calls"]] == ["index_score", "index_topk", "sparse_attn"]
    assert "no such page" in about["calls"][-1]["raised"]
    assert "wanted" in about["calls"][0]
    assert "wanted" not in about["calls"][-1]


# Commands ---


def record(folder: Path) -> Path:
    def result(case: str, status: Status) -> Result:
        return Result(case, case.partition("/")[0], "./k.py", "k", "interpreted", cases.parse_id(case).axes(), status)

    results = (
        result("index_score/q=1,kv=100", Status.PASSED),
        result("index_score/q=1,kv=200", Status.FAILED),
        result("index_score/q=1,kv=300", Status.CRASHED),
    )
    made = Record("1.0", {"name": "m3check", "version": "0"}, "sm80", {}, "m3check run", Exit(1, "red"), {}, results)
    path = folder / "report.json"
    path.write_text(jsonfile.dumps(made))
    return path


def test_a_red_result_of_a_record_by_its_number(tmp_path):
    path = record(tmp_path)

    assert target(f"{path}#2", None, None) == ("index_score/q=1,kv=300", "./k.py", "sm80")
    assert target(f"{path}#1", None, "sm90") == ("index_score/q=1,kv=200", "./k.py", "sm90")
    assert target("index_score/q=1,kv=9", None, None) == ("index_score/q=1,kv=9", "triton", None)
    assert target(f"{tmp_path}#1", None, None) == ("index_score/q=1,kv=200", "./k.py", "sm80")
    for text, asked in (
        (f"{path}#3", "there is no #3"),
        (str(path), "name one of them"),
        (str(tmp_path), "name one of them"),
    ):
        with pytest.raises(M3CheckError, match=f"has 2 red results: {asked}") as caught:
            target(text, None, None)
        assert f"{text.partition('#')[0]}#2 crashed index_score/q=1,kv=300 [./k.py]" in str(caught.value)
    with pytest.raises(M3CheckError, match="has no red result to explain"):
        target(f"{path}#1", "triton", None)


def test_explain_and_shrink_on_the_command_line(tmp_path, capsys):
    wrong = written(tmp_path, "0")

    assert cli.main(["explain", CASE, "--kernels", str(wrong), "--arch", "sm90"]) == 1
    out = capsys.readouterr().out
    assert "every request reads the pages of the first" in out
    assert "fails in  every request but the first" in out
    assert cli.main(["shrink", CASE, "--kernels", str(wrong), "--arch", "sm90"]) == 0
    shown = capsys.readouterr()
    assert cases.parse_id(shown.out.strip()).kv_heads == 1
    assert "fails by attend" in shown.err


def test_explain_of_a_green_case_and_of_nonsense(tmp_path, capsys):
    right = written(tmp_path, "request")

    assert cli.main(["explain", CASE, "--kernels", str(right), "--arch", "sm90", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "passed"
    assert cli.main(["shrink", CASE, "--kernels", str(right), "--arch", "sm90"]) == 4
    assert "there is nothing to shrink" in capsys.readouterr().err
    assert cli.main(["explain", "nonsense/q=1", "--kernels", str(right)]) == 4
    assert cli.main(["explain", "index_score/q=1,kv=9", "--kernels", str(right), "--arch", "sm90"]) == 4


def test_a_kernel_that_ends_its_process_costs_the_question_alone(tmp_path, capsys):
    path = tmp_path / "ends.py"
    path.write_text("import os\n\n\ndef index_score(**keywords):\n    os._exit(9)\n")

    assert cli.main(["explain", "index_score/q=1,kv=9", "--kernels", str(path), "--arch", "sm90"]) == 1
    assert "crashed" in capsys.readouterr().out
    # Each try costs a fresh worker, so the descent is cut short.
    assert cli.main(["shrink", "index_score/q=3,kv=300", "--kernels", str(path), "--arch", "sm90", "--seconds", "1"]) == 0
    shown = capsys.readouterr()
    assert cases.parse_id(shown.out.strip()).op == "index_score"
    assert "fails by crashed; its time was up" in shown.err


def test_a_run_saves_its_failures(tmp_path, capsys):
    wrong = written(tmp_path, "0")
    words = ["run", "--arch", "sm90", "--kernels", str(wrong), "--case", CASE, "--out", str(tmp_path / "out")]

    assert cli.main([*words, "--save-failures", "2"]) == 1
    (folder,) = (tmp_path / "out" / "failures").iterdir()
    assert f"python {folder}/repro.py" in capsys.readouterr().err
    assert replay(folder).returncode == 1
