"""compute-sanitizer's report as findings, and workers that run under it, with a stand-in that prints its format."""

from __future__ import annotations

import os
import stat
import sys

import pytest

from m3check import api, sanitize
from m3check.config import RunOptions
from m3check.isolate import Pool, Worker
from m3check.types import M3CheckError, Result, Status

MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 2 bytes
=========     at sparse_attn_decode_kernel+0x4d0 in /kernels/attention.py:45
=========     by thread (32,0,0) in block (1,0,3)
=========     Address 0x7f671ac00482 is out of bounds
=========     and is 130 bytes after the nearest allocation at 0x7f671ac00000 of size 1,024 bytes
=========
========= Invalid __global__ read of size 2 bytes
=========     at sparse_attn_decode_kernel+0x4d0 in /kernels/attention.py:45
=========     by thread (33,0,0) in block (1,0,3)
=========     Address 0x7f671ac00484 is out of bounds
=========     and is 132 bytes after the nearest allocation at 0x7f671ac00000 of size 1,024 bytes
=========
========= Invalid __shared__ write of size 4 bytes
=========     at void merge(int *, float)+0x160 in merge.cu:6
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x1 is misaligned
=========
========= Program hit cudaErrorLaunchFailure (error 719) due to "unspecified launch failure" on CUDA API call to cudaMalloc.
=========
========= ERROR SUMMARY: 4 errors
"""

RACECHECK = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at void sum(int *, int *)+0xf0 in race.cu:41
=========     and Read access at void sum(int *, int *)+0x130 in race.cu:46 [36 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""

INITCHECK = """\
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at vectorAdd(float *, float *)+0x70 in init.cu:12
=========     by thread (3,0,0) in block (0,0,0)
=========     Address 0x7f3fc0400000
=========
========= ERROR SUMMARY: 1 error
"""

CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"


def test_an_invalid_access_names_kernel_line_thread_and_distance():
    first, other = sanitize.findings(MEMCHECK, "memcheck")
    assert first.status is Status.FAILED
    assert first.measured == 3
    assert first.where == "sparse_attn_decode_kernel at attention.py:45, thread (32,0,0) in block (1,0,3)"
    assert first.hint.startswith("Invalid __global__ read of size 2 bytes; Address 0x7f671ac00482 is out of bounds")
    assert "130 bytes after the nearest allocation" in first.hint
    assert first.hint.endswith("3 errors in 2 places")
    assert other.where.startswith("merge at merge.cu:6")
    assert "misaligned" in other.hint


def test_a_race_names_both_sides_and_an_unwritten_cell_its_reader():
    [race] = sanitize.findings(RACECHECK, "racecheck")
    assert race.where == "sum at race.cu:41"
    assert race.hint.startswith("Race reported between Write access")
    assert "Read access at void sum(int *, int *)+0x130 in race.cu:46 [36 hazards]" in race.hint
    [read] = sanitize.findings(INITCHECK, "initcheck")
    assert read.where == "vectorAdd at init.cu:12, thread (3,0,0) in block (0,0,0)"


def test_a_report_without_errors_passes_and_a_tool_that_cannot_watch_is_no_pass():
    [finding] = sanitize.findings(CLEAN, "memcheck")
    assert (finding.status, finding.measured) == (Status.PASSED, 0.0)
    [finding] = sanitize.findings("========= Error: Device not supported. Please refer to the documentation\n", "memcheck")
    assert finding.status is Status.ERROR
    assert "Device not supported" in finding.hint


def test_each_case_gets_what_was_written_since_the_last_one(tmp_path):
    file = tmp_path / "log.txt"
    log = sanitize.Log(str(file), "memcheck")
    [finding] = log.news(0)
    assert finding.status is Status.ERROR
    assert "nothing was watched" in finding.hint
    file.write_text("========= COMPUTE-SANITIZER\n")
    assert [f.status for f in log.news(0)] == [Status.PASSED]
    with file.open("a") as more:
        more.write(MEMCHECK)
    assert [f.status for f in log.news(0)] == [Status.FAILED] * 2
    assert [f.status for f in log.news(0)] == [Status.PASSED]


def result(status, reason=""):
    return Result("case", "index_topk", "triton", "kernel", "device", {}, status, reason)


def test_what_the_sanitizer_saw_is_the_cause_whatever_else_went_wrong():
    seen = sanitize.findings(MEMCHECK, "memcheck")
    joined = sanitize.joined(result(Status.PASSED), seen)
    assert joined.status is Status.FAILED
    assert joined.reason.startswith("sanitizer: Invalid __global__ read")
    joined = sanitize.joined(result(Status.ERROR, "CUDA error: unspecified launch failure"), seen)
    assert joined.status is Status.ERROR
    assert joined.reason.startswith("sanitizer: ")
    assert joined.reason.endswith("unspecified launch failure")
    clean = sanitize.joined(result(Status.PASSED), sanitize.findings(CLEAN, "memcheck"))
    assert (clean.status, clean.reason, len(clean.findings)) == (Status.PASSED, "", 1)


def test_it_is_looked_for_on_path_and_in_the_toolkit(tmp_path, monkeypatch):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sanitize, "PLACES", ())
    with pytest.raises(M3CheckError, match="comes with the CUDA toolkit"):
        sanitize.needed("device", "")
    (tmp_path / "bin").mkdir()
    program = stand_in(tmp_path / "bin", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert sanitize.needed("device", "") == program
    with pytest.raises(M3CheckError, match="leave --sanitize out"):
        sanitize.needed("interpreted", "this machine has no sm90 GPU")


def stand_in(folder, text):
    """A `compute-sanitizer` that writes a report as soon as it runs, and passes on nothing but stdin."""
    program = folder / "compute-sanitizer"
    program.write_text(
        f"""#!{sys.executable}
import subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    if words[0] == "--log-file":
        open(words[1], "w").write({text!r})
    if words[0] == "--padding":
        open({str(folder / "padding")!r}, "w").write(words[1])
    words = words[2:]
sys.exit(subprocess.run(words, close_fds=True).returncode)
"""
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


@pytest.mark.parametrize(("text", "statuses"), [(CLEAN, ["passed", "passed"]), (MEMCHECK, ["failed", "passed"])])
def test_a_run_under_it(tmp_path, monkeypatch, text, statuses):
    """The whole path but the GPU: worker, wrapper, report, result."""
    pytest.importorskip("triton")
    stand_in(tmp_path, text)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sanitize, "needed", lambda evidence, why: sanitize.program())
    names = ("index_topk/q=3,kv=300,h=1", "index_topk/q=2,kv=129,h=1")
    options = RunOptions(arch="sm90", cases=names, sanitize="memcheck", jobs=1, out=tmp_path)
    record = api.run(options)
    found = {
        r.case: [f for f in r.findings if f.check == "sanitizer"] for r in record.results if r.evidence == "interpreted"
    }
    assert sorted(str(r.status) for r in record.results if r.evidence == "interpreted") == sorted(statuses)
    assert all(found.values())
    assert not {f.check for r in record.results for f in r.findings} & {"repeat", "poison", "strides"}
    assert record.environment["sanitize"] == "memcheck"
    assert "--sanitize memcheck" in record.command
    assert int((tmp_path / "padding").read_text()) >= 1 << 16  # or the next allocation begins where one ends


def test_a_worker_whose_gpu_is_lost_gets_no_further_case():
    program = (
        "import os, socket, sys\n"
        "from m3check import isolate\n"
        "replies = iter([{'spent': True}, {}])\n"
        "with socket.socket(fileno=int(sys.argv[-1])) as channel:\n"
        "    isolate.serve(channel, lambda c, s: {}, lambda m: {'pid': os.getpid(), **next(replies)})\n"
    )

    class Other(Worker):
        def __post_init__(self):
            self.wrapper = [sys.executable, "-c", program]
            super().__post_init__()

    with Pool(1, lambda _group: Other({}, {}), 60.0) as pool:
        pool.greet(["one"])
        pids = [answer["pid"] for _, answer in pool.run({"one": ["a", "b"]}, lambda task: {"task": task})]
    assert len(set(pids)) == 2


def test_a_crash_is_told_with_what_the_sanitizer_saw_of_this_task(tmp_path):
    report = tmp_path / "report.txt"
    program = (
        "import socket, sys\n"
        "from m3check import isolate\n"
        "def answer(message):\n"
        f"    with open({str(report)!r}, 'a') as log:\n"
        f"        log.write({MEMCHECK!r} if message['task'] == 'bad' else {CLEAN!r})\n"
        "    return {} if message['task'] == 'good' else sys.exit(6)\n"
        "with socket.socket(fileno=0) as channel:\n"
        "    isolate.serve(channel, lambda c, s: {}, answer)\n"
    )
    words = [sys.executable, "-c", program]

    def make(_group):
        return sanitize._Worker({"sanitizer": [str(report), "memcheck"]}, {}, words)

    with Pool(1, make, 60.0) as pool:
        pool.greet(["one"])
        told = dict(pool.run({"one": ["good", "bad", "worse"]}, lambda task: {"task": task}))
    assert told["bad"].kind == told["worse"].kind == "crashed"
    assert told["bad"].reason.startswith("sanitizer: Invalid __global__ read")
    assert told["worse"].reason.startswith("the worker process ended with exit code 6"), "the error was the other task's"
