"""What a report says of its target: production's implementations, accumulators, and holes that must not be overlooked."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from fake_fmha_sm100 import Model
from records import finding, green, record, result

from m3check import dispatch, dispatched, report
from m3check.arch import ARCHS
from m3check.kernels import fmha_sm100
from m3check.kernels.fmha_sm100 import production
from m3check.report import targets
from m3check.types import OPS, PlanLine, Status, Sums

VLLM = {"provider": "vllm==0.33.0"}
NEEDS = "not run here, needs SM100 and vLLM installed there (--kernels vllm, or fmha_sm100)"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("version", [(0, minor) for minor in range(24, 34)])
def test_every_op_has_an_implementation_on_every_target_and_no_two_alike(arch, version):
    rows = dispatch.rows(arch, version)
    ops = {op.name for op in OPS.values() if not op.chain and op.family != "amd"}
    ops -= {"index_decode_score"} if version == (0, 24) else set()  # it came with 0.25
    amd = {op for op, _ in rows if op in OPS and OPS[op].family == "amd"}
    assert {op for op, _ in rows} >= ops
    assert bool(amd) == (arch.startswith("gfx") and version >= (0, 26))
    assert len({(op, row.name, row.when) for op, row in rows}) == len(rows)
    assert all(row.file and row.when for _, row in rows)


@pytest.mark.parametrize(
    ("arch", "version", "op", "wanted"),
    [
        ("sm90", (0, 33), "index_score", ["Triton (common)", "Triton (common), fp8"]),
        ("sm90", (0, 31), "index_score", ["Triton (common)"]),
        ("sm80", (0, 33), "index_score", ["Triton (common)"]),
        ("sm100", (0, 33), "index_score", ["fmha_sm100 OnlyScore", "Triton (common)"]),
        ("sm100", (0, 24), "index_topk", ["Triton (common)"]),
        ("sm103", (0, 25), "index_decode_score", ["Triton (common)"]),
        ("sm103", (0, 26), "index_decode_score", ["CuteDSL score", "Triton (common)"]),
        ("sm120", (0, 33), "sparse_attn", ["Triton (common)"]),
        ("gfx942", (0, 24), "sparse_attn", ["Triton (common)"]),
        ("gfx942", (0, 33), "sparse_attn", ["Triton (amd), tiles of 32 keys", "AITER sparse paged attention"]),
        ("gfx950", (0, 25), "sparse_attn", ["Triton (amd), tiles of 64 keys"]),
        ("gfx950", (0, 29), "index_decode", ["Triton (amd), score and selector"]),
        ("gfx942", (0, 32), "index_decode_cp", []),
        ("gfx942", (0, 33), "index_decode_cp", ["Triton (amd), context parallel"]),
        ("gfx950", (0, 28), "sparse_pa_table", ["Triton (amd), table of 16-token pages"]),
        ("sm121", (0, 33), "mla_sparse", ["FlashInfer sparse MLA", "Triton, of pull requests 38476 and 47629"]),
        ("gfx942", (0, 29), "mqa_logits", ["Triton fp8_mqa_logits_gfx942"]),
        ("gfx942", (0, 30), "mqa_logits", ["AITER MQA logits"]),
    ],
)
def test_production_picks_by_target_and_version(arch, version, op, wanted):
    assert [row.name for each, row in dispatch.rows(arch, version) if each == op] == wanted


def test_no_row_is_without_a_result_or_a_sentence():
    results = [result(**VLLM), result(Status.FAILED, op="index_score", **VLLM), result(op="index_topk")]
    told = dispatched.summary("sm100", results, {})
    assert all(entry["evidence"] for entry in told)
    by = {(entry["op"], entry["implementation"]): entry["evidence"] for entry in told}
    assert by["index_score", "fmha_sm100 OnlyScore"] == NEEDS
    assert by["index_score", "Triton (common)"] == "interpreted: 1 failed"
    assert by["index_topk", "Triton (common)"] == "not run here: no case of this run has it", "ours is not production's"
    assert {entry["version"] for entry in told} == {"0.33.0"}


def test_results_count_only_where_production_runs_that_implementation():
    narrow = replace(result(op="index_topk", **VLLM), axes={"topk": 8})
    (entry,) = [
        e for e in dispatched.summary("sm100", [narrow], {}) if e["op"] == "index_topk" and "Triton" in e["implementation"]
    ]
    assert entry["evidence"] == "interpreted: 1 passed"
    wide = replace(narrow, axes={"topk": 16})
    (entry,) = [
        e for e in dispatched.summary("sm100", [wide], {}) if e["op"] == "index_topk" and "Triton" in e["implementation"]
    ]
    assert entry["evidence"].startswith("not run here")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("providers", [(), ("vllm==0.33.0",), ("vllm==0.24.0", "triton", "fmha_sm100")])
def test_every_row_of_every_target_has_a_result_or_a_sentence(arch, providers):
    results = [
        result(op=op, provider=each) for op in ("index_score", "sparse_pa_table", "mla_sparse") for each in providers
    ]
    for entry in dispatched.summary(arch, results, {}):
        assert entry["evidence"].startswith(("not run here", "interpreted: 1 passed")), entry
    lines = [PlanLine(f"{r.op}/q=1,kv=1", r.op, r.provider, "interpreted") for r in results]
    for op, name, _, would in dispatched.planned(arch, lines, lambda case: {}):
        assert would, (op, name)


def test_results_of_another_provider_are_about_the_row_that_names_it():
    mine = [replace(result(op="index_score", provider="fmha_sm100"), axes={"topk": 16}), result(op="index_topk", **VLLM)]
    by = {(e["op"], e["implementation"]): e["evidence"] for e in dispatched.summary("sm100", mine, {})}
    assert by["index_score", "fmha_sm100 OnlyScore"] == "interpreted: 1 passed"
    assert by["index_topk", "fmha_sm100 sparse_topk_select"] == NEEDS
    device = replace(result(op="index_topk", **VLLM), kernel="sparse_topk_select", axes={"topk": 16})
    by = {(e["op"], e["implementation"]): e["evidence"] for e in dispatched.summary("sm100", [device], {})}
    assert by["index_topk", "fmha_sm100 sparse_topk_select"] == "interpreted: 1 passed"
    assert by["index_topk", "Triton (common)"].startswith("not run here")


def test_what_an_installed_vllm_runs_by_msa_is_not_counted_for_triton():
    device = {"evidence": "device", **VLLM}
    runs = [result(op="index_score", kernel=name, **device) for name in ("fmha_sm100 OnlyScore", "minimax_m3_index_score")]
    by = {(e["op"], e["implementation"]): e["evidence"] for e in dispatched.summary("sm100", runs, {})}
    assert by["index_score", "fmha_sm100 OnlyScore"] == by["index_score", "Triton (common)"] == "device: 1 passed"


def test_kernels_that_are_msas_are_known_by_their_names():
    model = fmha_sm100.Interface.of(Model())
    names = [kernel.name for kernel in fmha_sm100.adapted(model, "vllm")[0].values()]
    for name in (*names, production.TRITON_SCORED):
        result_ = result(op="sparse_attn", kernel=name, **VLLM)
        by = {(e["op"], e["implementation"]): e["evidence"] for e in dispatched.summary("sm100", [result_], {})}
        assert by["sparse_attn", "fmha_sm100 sparse_atten_func"] == "interpreted: 1 passed", name


def test_a_kernel_of_a_pull_request_is_known_by_its_function():
    def told(kernel):
        made = replace(result(op="mla_sparse", provider="vllm:../vllm"), kernel=kernel)
        return [
            e["evidence"]
            for e in dispatched.summary("sm80", [made], {"vllm:../vllm": {"version": "0.33.0"}})
            if e["op"] == "mla_sparse"
        ]

    assert told("triton_bf16_mla_sparse_interface") == [
        "not run here, needs a checkout that has them (--kernels vllm:PATH)"
    ]
    assert told("triton_mla_sparse_attention") == ["interpreted: 1 passed"]


def test_a_plan_says_what_it_has_of_production():
    case = "index_topk/q=1,kv=1"
    lines = [
        PlanLine(case, "index_topk", "vllm==0.33.0", "interpreted"),
        PlanLine("index_score/q=1,kv=1", "index_score", "vllm==0.33.0", "interpreted", "no fp8 here"),
    ]
    told = {(op, name): would for op, name, _, would in dispatched.planned("sm90", lines, lambda case: {"topk": 16})}
    assert told["index_topk", "Triton (common)"] == "1 cases"
    assert told["index_score", "Triton (common)"] == "no fp8 here"
    there = dispatched.planned("sm100", lines, lambda case: {"topk": 16})
    needs = {(op, name): would for op, name, _, would in there}
    assert needs["index_topk", "fmha_sm100 sparse_topk_select"] == NEEDS
    told = {(op, name): would for op, name, _, would in dispatched.planned("sm90", [], lambda case: {})}
    assert told["index_topk", "Triton (common)"] == "no provider vllm is named"


def test_a_skip_is_told_by_its_sentence():
    skipped = result(Status.SKIPPED, reason="Triton compiles no fp8 here", **VLLM)
    told = dispatched.summary("sm90", [skipped], {})
    assert {e["evidence"] for e in told if e["op"] == "sparse_attn"} == {"not run here: Triton compiles no fp8 here"}


@pytest.mark.parametrize(
    ("provider", "said", "wanted"),
    [
        ("vllm==0.24.0", {}, "0.24.0"),
        ("vllm:../vllm", {"vllm:../vllm": {"version": "0.31.0"}}, "0.31.0"),
        ("vllm:../vllm", {}, "of unknown version (taken for 0.33)"),
        ("vllm==0.40.0", {}, "0.40.0 (taken for 0.33)"),
        ("triton", {}, "0.33.0"),
    ],
)
def test_the_version_comes_from_the_provider(provider, said, wanted):
    told = dispatched.summary("sm90", [result(provider=provider)], said)
    assert {entry["version"] for entry in told} == {wanted}


def test_a_report_shows_what_production_runs_and_a_matrix_shows_the_holes():
    text = report.render([green()], "md")
    assert "| sparse_attn | fmha_sm100 sparse_atten_func | topk 16 | not run here, needs SM100 |" in _squeezed(text)
    text = _squeezed(report.render([green(), replace(green(), arch="sm90")], "md"))
    assert "fmha_sm100 sparse_atten_func (topk 16): not run here, needs SM100" in text
    rows = json.loads(report.render([green(), replace(green(), arch="sm90")], "json"))
    holes = [row for row in rows if "hole" in row]
    assert [(row["arch"], row["implementation"]) for row in holes] == [
        ("sm90", "fmha_sm100 sparse_atten_func"),
        ("sm100", "fmha_sm100 sparse_atten_func"),
    ]


def test_a_matrix_tells_each_kind_of_evidence_apart():
    registers = finding("registers", measured=255.0, limit=255.0)
    compiled = result(evidence="compiled", findings=(registers, finding("shared_memory", measured=58.0, limit=64.0)))
    both = record(result(findings=(finding(measured=0.4),)), compiled)
    text = _squeezed(report.render([both, replace(both, arch="gfx942")], "md"))
    assert "1 of 1 passed, interpreted, 0.4; 1 of 1 passed, compiled, 0.906" in text
    (row, _) = json.loads(report.render([both, replace(both, arch="gfx942")], "json"))
    assert row["worst"] == 0.4
    assert row["by_evidence"]["compiled"] == {"results": 1, "red": 0, "worst": pytest.approx(0.90625)}


def test_a_note_is_no_margin_of_a_matrix():
    noted = finding("element", Status.NOTED, measured=1e45, limit=1.0)
    told = record(result(findings=(finding(measured=0.4), noted)))
    assert "1 of 1 passed, interpreted, 0.4" in _squeezed(report.render([told, replace(told, arch="sm90")], "md"))


def test_measured_accumulators_are_told_by_op_and_instruction():
    device = {"evidence": "device", "op": "index_score"}
    told = record(
        result(sums=Sums("wgmma fp8, 13 bits", 11.0), **device),
        result(sums=Sums("wgmma fp8, 13 bits", 10.4), case="index_score/b", **device),
        result(sums=Sums("fp32"), evidence="device"),
        arch="sm90",
    )
    text = _squeezed(targets.sums(told))
    assert "| index_score | triton | bf16 | wgmma fp8, 13 bits | 2^-10.4 | 2 |" in text
    assert "| sparse_attn | triton | bf16 | fp32 | no scores to measure | |" in text
    assert "Not measured" not in text


def test_accumulators_that_nobody_measured_come_from_the_table_with_their_source():
    matrix = finding("matrix", measured=None, limit=None, hint="wgmma.m64n64k32.f32.e4m3.e4m3 (fp8 native)")
    told = record(
        result(op="index_score"),
        result(op="index_score", evidence="compiled", findings=(matrix,)),
        result(op="sparse_attn"),
        result(op="index_topk"),
        result(op="index_decode_score", evidence="compiled", findings=(finding("matrix", measured=None, limit=None),)),
        arch="sm90",
    )
    text = _squeezed(targets.sums(told))
    assert "| index_score | triton | compiled for it | wgmma fp8: 13 |" in text
    assert "| sparse_attn | triton | could be used | wgmma 16: 25; mma 16: 25 |" in text
    assert "| index_decode_score | triton | compiled for it | no matrix instruction: fp32 |" in text
    assert "index_topk" not in text
    assert "- wgmma fp8: Khattak & Mikaitis, arXiv 2512.07004" in text


def _squeezed(text: str) -> str:
    return "\n".join(" ".join(line.split()) for line in text.splitlines())


def test_a_merge_works_out_anew_what_production_runs(tmp_path, capsys):
    from m3check import cli
    from m3check.report import jsonfile

    command = "m3check run --arch sm100 --kernels vllm==0.33.0 --shard {}/2"
    parts = [result(**VLLM), result(op="sparse_attn_decode", **VLLM)]
    for i, each in enumerate(parts, 1):
        told = record(each, command=command.format(i))
        told = replace(told, environment={**told.environment, "dispatch": dispatched.summary("sm100", [each], {})})
        (tmp_path / f"{i}.json").write_text(jsonfile.dumps(told))
    assert cli.main(["merge", str(tmp_path / "1.json"), str(tmp_path / "2.json")]) == 0
    merged = jsonfile.loads(capsys.readouterr().out)
    by = {(e["op"], e["implementation"]): e["evidence"] for e in targets.listed(merged.environment)}
    assert by["sparse_attn_decode", "Triton (common)"] == "interpreted: 1 passed"
    assert by["index_score", "fmha_sm100 OnlyScore"] == NEEDS


def test_a_record_without_the_list_says_nothing_of_production():
    assert targets.production(record(result())) == ""
    assert targets.listed({"dispatch": "lost in a merge"}) == []
