"""Would a wrong answer have passed? The power of a case: which named defects (hypotheses/) its checks would refuse.

It depends on the case alone, not on a kernel, so it is worked out once: `python -m m3check.power` writes
m3check/data/power.json for the tiers, with the promises of `Profile()` and sums in fp32. A case that is not in the table (a
user's `--case`) is asked about the gross defects when it runs; another seed has the power of the listed one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from m3check import cases
from m3check.hypotheses import HYPOTHESES, Side, State, touching
from m3check.types import BLOCK, OPS, SPARSE, Case, Inputs, M3CheckError, Outputs, Profile, Result, Status

if TYPE_CHECKING:
    from torch import Tensor

Rule = Literal["rounded", "folded"]

PATH = Path(__file__).parent / "data" / "power.json"

MARKS: Mapping[State, str] = {"seen": "+", "unseen": "-", "equal": "=", "absent": "."}

LARGEST = 2e8
"""Products of query and key elements of the largest case that is asked when it runs: a second or two on a CPU."""


def work(case: Case) -> float:
    """Products that the reference of a case takes, or numbers that it moves where it multiplies none."""
    rows = case.total_queries * case.heads * case.head_dim
    if case.op not in SPARSE:
        return rows * {"latent": case.topk, "logits": case.context}.get(OPS[case.op].family, 1)
    scored = case.total_queries * case.kv_heads * case.context * case.head_dim if case.op != "index_topk" else 0
    attended = rows * case.topk * BLOCK
    read = {"index_topk": 0, "sparse_attn": attended, "sparse_attn_decode": attended}
    return read.get(case.op, scored + (attended if OPS[case.op].chain else 0))


def asked(case: Case) -> bool:
    """Whether hypotheses are tried on a case while it runs: there are some, and it is small."""
    return bool(touching(case.op)) and work(case) <= LARGEST


def side_of(inputs: Inputs) -> Side:
    """The reference side of generated inputs. Outputs are refused where they are red under every rule of dequantisation."""
    from m3check import checks, reference

    case, setting = inputs.case, checks.Setting(profile=Profile(), evidence="interpreted")
    rules: tuple[Rule, ...] = ("rounded", "folded") if inputs.k_scale is not None else ("rounded",)

    @cache
    def right(rule: Rule) -> tuple[Inputs, Outputs]:
        problem = reference.dequantised(inputs, rule)
        return problem, reference.expected(problem)

    def red(outputs: Mapping[str, Tensor], rule: Rule) -> bool:
        problem, expected = right(rule)

        def attend(ids: Tensor) -> Outputs:
            op = "sparse_attn" if OPS[case.op].phase == "prefill" else "sparse_attn_decode"
            return reference.expected(replace(problem, case=replace(case, op=op), topk_idx=ids))

        return checks.refuses(problem, outputs, expected, setting, attend)

    problem, expected = right("rounded")
    return Side(
        inputs,
        problem,
        expected,
        lambda changed: reference.expected(reference.dequantised(changed, "rounded")),
        lambda outputs: all(red(outputs, rule) for rule in rules),
    )


def power(side: Side) -> dict[str, State]:
    """What a case says to every hypothesis that touches its op."""
    case = side.inputs.case
    if side.refused(side.right_answer()):
        raise M3CheckError(f"the checks refuse the reference's own answer to {cases.case_id(case)}: they can tell nothing")
    return {h.name: side.state(h) for h in touching(case.op)}


def gross(side: Side) -> dict[str, State]:
    """The same for the gross hypotheses, and for the others as long as none was seen."""
    found: dict[str, State] = {}
    for h in sorted(touching(side.inputs.case.op), key=lambda h: not h.gross):
        if h.gross or "seen" not in found.values():
            found[h.name] = side.state(h)
    return found


@lru_cache
def table() -> Mapping[str, Mapping[str, State]]:
    """The shipped table: case id -> hypothesis -> state."""
    if not PATH.exists():
        return {}
    data = json.loads(PATH.read_text(encoding="utf-8"))
    states = {mark: word for word, mark in MARKS.items()}
    names = data["hypotheses"]
    return {
        case: dict(zip(names[case.partition("/")[0]], (states[mark] for mark in marks), strict=True))
        for case, marks in data["cases"].items()
    }


def known(case: Case) -> Mapping[str, State] | None:
    """What the table says of a case, or of the same case with the first seed."""
    return table().get(cases.case_id(replace(case, seed=0)))


def doubt(case: Case, device: str = "cpu") -> tuple[Status, str] | None:
    """What is to be said of a case that agreed: that it could not have failed, or saw nothing; None where it is sound."""
    if not touching(case.op):
        return None
    found = known(case)
    listed = replace(case, seed=0) in cases.tier("full")
    if found is None and not listed and asked(case):  # a tier has its time to keep
        found = gross(side_of(cases.make_inputs(case, device)))
    return None if found is None else judged(found)


def judged(found: Mapping[str, State]) -> tuple[Status, str] | None:
    """The doubt that states give rise to."""
    words = {h.name: h.words for h in HYPOTHESES}
    for h in HYPOTHESES:
        if h.gross and found.get(h.name) == "unseen":
            return Status.MISTRUSTED, f"agreed, but could not have failed: {h.words} ({h.name}) would have passed, too"
    if "seen" in found.values():
        return None
    unseen = [words[name] for name, word in found.items() if word == "unseen"]
    if unseen:
        return Status.INCONCLUSIVE, f"nothing that could be wrong here is told from rounding, not even: {unseen[0]}"
    return Status.INCONCLUSIVE, "no named defect would change the right answer of this case"


def summary(results: Iterable[Result]) -> dict[str, Any]:
    """The power table of a run for its record.

    `defects` has a row for each: stage, words, how many cases refuse it, how many right answers it changes.
    """
    counts: dict[str, list[int]] = {}
    listed = unlisted = 0
    for case in dict.fromkeys(result.case for result in results if result.status is not Status.SKIPPED):
        if not touching(case.partition("/")[0]):
            continue
        found = known(cases.parse_id(case))
        listed, unlisted = listed + (found is not None), unlisted + (found is None)
        for name, word in (found or {}).items():
            row = counts.setdefault(name, [0, 0])
            row[0] += word == "seen"
            row[1] += word in ("seen", "unseen")
    rows = [[h.stage, h.words, *counts[h.name]] for h in HYPOTHESES if h.name in counts]
    return {"cases": listed, "unlisted": unlisted, "defects": rows} if rows else {}


def _marks(text: str) -> tuple[str, str]:
    import torch

    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = power(side_of(cases.make_inputs(cases.parse_id(text), device)))
    return text, "".join(MARKS[word] for word in found.values())


def main() -> int:
    """Write the table: what is listed already and still in a tier stays, unless --all asks for it anew."""
    parser = argparse.ArgumentParser(prog="python -m m3check.power", description=main.__doc__)
    parser.add_argument("--all", action="store_true", help="work out every case anew")
    parser.add_argument("--tier", default="ci", help="the tier that is to be complete (default: ci)")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    arguments = parser.parse_args()
    wanted = [cases.case_id(case) for case in cases.tier(arguments.tier) if touching(case.op)]
    names = {op: [h.name for h in touching(op)] for op in OPS if touching(op)}
    done = {} if arguments.all else _kept(names)
    due = sorted((case for case in wanted if case not in done), key=lambda text: work(cases.parse_id(text)))
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for i, (text, marks) in enumerate(pool.map(_marks, due), 1):
            done[text] = marks
            print(f"{i}/{len(due)} {marks} {text}", file=sys.stderr, flush=True)
    order = [case_id for case in cases.tier("full") if (case_id := cases.case_id(case)) in done]
    body = ",\n".join(f"{json.dumps(case)}: {json.dumps(done[case])}" for case in order)
    legend = "+ seen, - unseen, = as right as the right answer, . nothing to act on; written by python -m m3check.power"
    head = f'{{"legend": {json.dumps(legend)},\n"hypotheses": {json.dumps(names)},\n"cases": {{\n'
    PATH.write_text(head + body + "\n}}\n", encoding="utf-8")
    return 0


def _kept(names: Mapping[str, list[str]]) -> dict[str, str]:
    """The lines of the table whose op still has the same hypotheses."""
    if not PATH.exists():
        return {}
    data = json.loads(PATH.read_text(encoding="utf-8"))
    same = {op for op in names if data["hypotheses"].get(op) == names[op]}
    return {case: marks for case, marks in data["cases"].items() if case.partition("/")[0] in same}


if __name__ == "__main__":
    sys.exit(main())
