"""How good is the diagnosis? `python -m m3check.explain.measure` explains and shrinks every mutant of the catalogue.

Each mutant meets the case that killed it in `m3check mutants --json FILE` (named by --cases); what `explain` and `shrink`
say of it is held against what the row is known to be. The table of docs/diagnosis.md is its output.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3check.types import SPARSE, Case

WANTED: Mapping[str, frozenset[str]] = {  # row and form: the hypotheses that name it rightly, as a regular family by prefix
    name: frozenset(words.split())
    for name, words in {
        "S1 the last query's mask": "score_past_seen_last score_past_seen",
        "S1 every query's mask in its last block": "score_past_seen score_block_end",
        "S2 max_seq_len 64": "score_columns_cut",
        "S3 selection reads every column": "select_every_column",
        "S6 the largest score of any head": "score_heads_largest",
        "S6 the first head's ids": "select_first_head",
        "S9 queries through e4m3": "score_queries_e4m3",
        "S9 index cache of layer 0": "score_layer_first",
        "S9 main cache of layer 0": "layer_first",
        "S8 one norm for all index heads": "insert_norm_shared",
        "S11 earlier keys of that block lost": "score_chunk_start",
        "T1 two ties at most": "select_ties_2",
        "T1 bins of 20 bits": "select_bins_20",
        "T2 NaN ranked by its bits": "select_nan_first",
        "T3 unused slots hold ids": "select_slots_numbered",
        "T5 only the current block": "select_own_forced",
        "T5 no forced block": "select_none_forced",
        "T5 cut after sorting": "select_cut_sorted",
        "T7 positions count from the batch's first row": "select_batch_start",
        "T9 ids of the row before": "select_row_before",
        "T10 over the first row": "select_first_row",
        "T11 -1 in the first slot of short rows": "select_hole_first",
        "A1 V loaded where nothing is seen": "past_seen past_seen_last",
        "A2 -1 is block 0": "minus_one_is_zero ids_clamped",
        "A5 head-major read as token-major": "ids_token_major",
        "A7 lengths without draft tokens": "drafts_lost score_drafts_lost select_drafts_lost",
        "A7 top-left alignment": "top_left score_top_left select_top_left",
        "A7 prefill queries see the whole request": "unmasked",
        "A7 decode queries see the whole request": "unmasked",
        "A8 every second page": "pages_halved score_pages_halved",
        "A8 identity table": "identity_of_batch score_identity_of_batch",
        "A10 dense pages": "cache_dense",
        "A11 of the first call": "kept_sm_scale",
        "A11 doubled": "scale_double",
        "A11 dropped": "scale_dropped",
        "A12 k_scale dropped": "k_scale_dropped",
        "A12 v_scale dropped": "v_scale_dropped",
        "A12 k_scale for v": "k_scale_for_both",
        "A12 mean k_scale": "k_scale_mean",
        "A12 mean v_scale": "v_scale_mean",
        "A13 main cache as fnuz": "dialect",
        "A13 index cache as fnuz": "score_dialect",
        "A13 main cache as integers": "integers",
        "A13 index cache as integers": "score_integers",
        "A15 half the output": "output_halved",
        "A16 without log2 e": "scale_base",
        "A16 log2 e twice": "scale_base_twice",
        "M1 attention": "empty_first",
        "M1 merge": "empty_any empty_first",
        "M1 NaN in dead rows": "empty_dead",
        "M3 weights of parts by exp": "merge_tops_by_e",
    }.items()
}

BY_ADDRESS = frozenset({"S4 score kernels", "S4 attention", "T10 past the last row", "A2 no test for negative ids"})
"""Memory-safety rows, named by address: the share of right hypotheses leaves them out."""

MERGING = frozenset({"M1 merge", "M3 weights of parts by exp"})

SELECTING = ("T", "S3", "S6 the first head's ids", "A7 top-left alignment: index_topk", "W5")


def stage_of(name: str, op: str) -> frozenset[str]:
    """The stages that a mutant may rightly be said to fail in; two where its row does both at once."""
    row = name.partition(":")[0]
    if op not in SPARSE:
        return frozenset({op})
    if row in MERGING:
        return frozenset({"merge"})
    if op in ("index_score", "index_decode_score"):
        return frozenset({"score"})
    if op == "index_topk":
        return frozenset({"select"})
    if op.startswith("sparse_attn"):
        return frozenset({"attend"})
    return frozenset({"select" if name.startswith(SELECTING) else "score"})


@dataclass
class Line:
    """One mutant, explained."""

    name: str
    case: str
    data: dict[str, Any]

    @property
    def row(self) -> str:
        """Row and form, without the op."""
        return self.name.partition(":")[0]

    @property
    def stage(self) -> bool:
        """Whether the right stage was named."""
        return self.data.get("stage") in stage_of(self.name, self.case.partition("/")[0])

    @property
    def counted(self) -> bool:
        """Whether a hypothesis is due: rows of stages S, T, A and M but the memory-safety ones."""
        return self.name[0] in "STAM" and self.row not in BY_ADDRESS

    @property
    def right(self) -> bool:
        """Whether the right hypothesis is among those named."""
        return any(n == w or n.startswith(f"{w}_") for n in self.data.get("names", []) for w in WANTED.get(self.row, ()))

    @property
    def misled(self) -> bool:
        """Whether only wrong ones are named."""
        return bool(self.data.get("names")) and not self.right


def main() -> int:
    """Explain and shrink; prints the table in Markdown and the totals."""
    parser = argparse.ArgumentParser(prog="python -m m3check.explain.measure", description=main.__doc__)
    parser.add_argument(
        "--cases", required=True, metavar="FILE", help="what m3check mutants --only catalogue --json FILE wrote"
    )
    parser.add_argument("--only", default="", help="mutants whose name has this text")
    parser.add_argument("--no-shrink", action="store_true", help="explain only")
    parser.add_argument("--json", metavar="FILE", help="write what came of each mutant there")
    arguments = parser.parse_args()
    killed = [
        o
        for o in json.loads(Path(arguments.cases).read_text(encoding="utf-8"))
        if o["kind"] == "catalogue" and o["verdict"] == "killed" and arguments.only in o["name"]
    ]
    lines = list(_explained(killed, shrink=not arguments.no_shrink))
    _print(lines, shrunk=not arguments.no_shrink)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([vars(line) for line in lines], indent=1) + "\n", encoding="utf-8")
    return 0


def _explained(killed: list[dict[str, Any]], shrink: bool) -> Any:
    import os

    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from m3check import arch as arches
    from m3check import cases, interpret, kernels, runner
    from m3check.config import RunOptions
    from m3check.mutants import catalogue, processes
    from m3check.mutants.origins import sources
    from m3check.mutants.sources import load

    torch.set_num_threads(1)
    interpret.install()
    arch = arches.find_arch("sm90")
    origin = sources(kernels.parse_spec("triton"), arch, True)
    mutants = {m.key: m for m in catalogue.mutants(origin, "interpreted")[0]}
    session = runner.Session(arch, "interpreted", "cpu", load(origin, arch, "interpreted", None, Path()))
    warm = cases.parse_id("sparse_attn_decode/q=1,kv=130,h=1,g=1,topk=2")
    runner.run_one(warm, session, runner.plan(RunOptions(arch="sm90", cases=(cases.case_id(warm),)))[0], "")

    def work(outcome: dict[str, Any], send: processes.Send) -> None:
        try:
            examine(outcome, send)
        except Exception:
            send({"error": traceback.format_exc()})
            raise

    def examine(outcome: dict[str, Any], send: processes.Send) -> None:
        from m3check.explain import as_data, explain

        with tempfile.TemporaryDirectory(prefix="m3check-mutant-") as folder:
            session.loaded = load(origin, arch, "interpreted", mutants[outcome["key"]], Path(folder))
            line = runner.plan(RunOptions(arch="sm90", cases=(outcome["case"],)))[0]
            started = time.monotonic()
            found = explain(cases.parse_id(outcome["case"]), session, line)
            data = as_data(found) | {"names": found.names, "seconds": time.monotonic() - started}
            send(data)
            if shrink:
                from m3check import shrink as shrinking

                started = time.monotonic()

                def attempt(case: Case, wanted: str) -> str:
                    # A fresh kernel each time: a wrapper may remember its first call.
                    session.loaded = load(origin, arch, "interpreted", mutants[outcome["key"]], Path(folder))
                    return shrinking.reason(case, session, wanted)

                small = shrinking.shrink(cases.parse_id(outcome["case"]), attempt)
                send(
                    data
                    | {
                        "shrunk": cases.case_id(small.case),
                        "tries": small.tries,
                        "shrink_seconds": time.monotonic() - started,
                    }
                )

    for child in processes.run(iter(killed), work, 1, 600.0):
        data = child.messages[-1] if child.messages else {}
        if "error" in data:
            print(data["error"], file=sys.stderr)
        if child.ended:
            data = {**data, "ended": child.ended}
        line = Line(child.task["name"], child.task["case"], data)
        words = ", ".join(data.get("names", [])[:4])
        print(
            f"{'ok ' if line.stage else 'BAD'} {'ok ' if line.right else 'BAD' if line.counted else '   '} {line.name}: "
            f"{data.get('stage')}; {words}; {data.get('seconds', 0):.1f} s; {data.get('shrunk', '')} "
            f"{data.get('shrink_seconds', 0):.0f} s {child.ended}",
            file=sys.stderr,
            flush=True,
        )
        yield line


def small(line: Line) -> bool:
    """Whether it was shrunk to at most 2 requests and max(4, topk + 2) blocks."""
    from m3check import cases

    if "shrunk" not in line.data:
        return False
    case = cases.parse_id(line.data["shrunk"])
    return len(case.kv_lens) <= 2 and case.block_columns <= max(4, case.topk + 2)


def _print(lines: list[Line], shrunk: bool) -> None:
    print("| mutant | stage | hypotheses that explain it | shrunk to | seconds: explain, shrink |")
    print("| --- | --- | --- | --- | --- |")
    for line in lines:
        data = line.data
        names = data.get("names", [])
        words = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"
        mark = "" if line.right or not line.counted else " (not the right one)" if names else ""
        print(
            f"| {line.name} | {data.get('stage', '-')}{'' if line.stage else ' (wrong)'} | {words}{mark} "
            f"| `{data.get('shrunk', '')}` | {data.get('seconds', 0):.1f}, {data.get('shrink_seconds', 0):.1f} |"
        )
    counted = [line for line in lines if line.counted]

    def share(n: int, of: int) -> str:
        return f"{n} of {of} ({100 * n / max(1, of):.1f} %)"

    print(f"\nright first stage: {share(sum(x.stage for x in lines), len(lines))}")
    print(f"right hypothesis named: {share(sum(x.right for x in counted), len(counted))}")
    print(f"right hypothesis alone: {share(sum(x.right and len(x.data['explained']) == 1 for x in counted), len(counted))}")
    print(f"only wrong ones named: {share(sum(x.misled for x in counted), len(counted))}")
    if shrunk:
        print(f"shrunk to at most 2 requests and max(4, topk + 2) blocks: {share(sum(map(small, lines)), len(lines))}")
        print(f"longest shrink: {max(x.data.get('shrink_seconds', 0) for x in lines):.0f} s")


if __name__ == "__main__":
    sys.exit(main())
