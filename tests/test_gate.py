"""The gate cannot be fooled: each way to come out green without having shown it, with its exit code and its sentence."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import fake_pool
import pytest
from records import record, result

from m3check import cases, kernels
from m3check.arch import ARCHS
from m3check.cli import main
from m3check.kernels import ours
from m3check.report import jsonfile
from m3check.types import OPS, PlanLine, Status

Main = Callable[..., tuple[int, str, str]]

SMOKE = [c for c in cases.tier("smoke") if not ours.refuses(kernels.parse_spec("triton"), c, ARCHS["sm100"], "interpreted")]
MISSING = len(cases.tier("smoke")) - len(SMOKE)
"""Cases of ops that our kernels lack, which every run of them skips."""

CASE = cases.case_id(next(case for case in cases.tier("smoke") if case.op == "index_decode"))
ENTRY = """
[[known]]
{selector}
reason = "loses an id"
issue = "https://example.org/1"
expires = {expires}
"""


@pytest.fixture
def m3check(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Main:
    """Run one command line in an empty folder; (exit code, stdout, last line of stderr)."""
    monkeypatch.chdir(tmp_path)
    for name in ("M3CHECK_TIER", "M3CHECK_SEED", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)

    def call(line: str) -> tuple[int, str, str]:
        code = main(shlex.split(line))
        out, err = capsys.readouterr()
        return code, out, err.splitlines()[-1]

    return call


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Workers that fail the named cases and pass the others."""

    def put(*failing: str, status: Status = Status.FAILED, **description: str) -> list[str]:
        def verdict(line: PlanLine) -> Status:
            return status if line.case in failing else Status.PASSED

        return fake_pool.install(monkeypatch, verdict, **description)

    return put


def ledger(
    selector: str = f'case = "{CASE}"', expires: str = "2999-12-31", name: str = "known.toml", more: str = ""
) -> None:
    text = ENTRY.format(selector=selector, expires=expires)
    Path(name).write_text(text + more + "\n")


# ---- nothing ran, all skipped, a provider missing


def test_nothing_ran(m3check: Main, workers: Callable[..., list[str]]) -> None:
    workers()
    code, _, said = m3check("run --arch sm100 -k no_such_word")

    assert code == 5
    assert "nothing ran: no case was selected: of " in said
    assert "cases (tier smoke) -k 'no_such_word' leaves none" in said


def test_nothing_ran_outweighs_a_ledger_and_floors(m3check: Main, workers: Callable[..., list[str]]) -> None:
    workers()
    ledger()
    code, _, said = m3check("run --arch sm100 -k no_such_word --ledger known.toml --floor min_cases=1")

    assert code == 5
    assert "nothing ran" in said


def test_all_skipped(m3check: Main, workers: Callable[..., list[str]]) -> None:
    workers()
    code, _, said = m3check("run --arch sm100 --tier production --op sparse_attn")

    assert code == 5
    assert "nothing ran: all" in said
    assert "needs a device" in said


def test_a_provider_that_cannot_be_found(m3check: Main) -> None:
    code, _, said = m3check("run --arch sm100 --kernels triton ./gone.py")

    assert code == 4
    assert "there is no kernel file" in said
    assert not Path("reports/sm100").exists()


def test_a_provider_that_gave_nothing(m3check: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.py").write_text("")
    fake_pool.install(monkeypatch, lambda line: Status.SKIPPED if line.provider == "./mine.py" else Status.PASSED)
    code, _, said = m3check("run --arch sm100 --kernels triton ./mine.py")

    assert code == 5
    assert f"no result for ./mine.py; {len(SMOKE)} results of the others, none red" in said


# ---- the ledger


def test_a_known_failure_is_not_red_and_says_why(m3check: Main, workers: Callable[..., list[str]]) -> None:
    workers(CASE)
    ledger()

    assert m3check("run --arch sm100")[0] == 1
    code, out, said = m3check("run --arch sm100 --ledger known.toml")
    (known,) = [r for r in jsonfile.read("reports/sm100").results if r.status is Status.KNOWN]
    assert code == 0
    assert "none red, 1 known" in said
    assert (known.case, known.reason) == (CASE, "loses an id (https://example.org/1, until 2999-12-31)")
    assert known.findings[-1].hint == "failed: it failed"
    assert "ledger `known.toml`: 1 known failure\n" in out


@pytest.mark.parametrize(
    "more",
    ['arch = "sm90"', 'provider = "vllm"', 'status = "crashed"', 'check = "row"', 'evidence = "device"'],
)
def test_an_entry_for_something_else_excuses_nothing(m3check: Main, workers: Callable[..., list[str]], more: str) -> None:
    workers(CASE)
    ledger(more=more)
    code, _, said = m3check("run --arch sm100 --ledger known.toml")

    assert code == 1
    assert "1 failed of" in said
    assert "breach" not in said
    assert "passes unexpectedly" not in said


@pytest.mark.parametrize(
    "more", ['arch = ["sm90", "sm100"]', 'provider = "triton"', 'check = "ids"', 'evidence = "interpreted"']
)
def test_an_entry_for_just_this_does(m3check: Main, workers: Callable[..., list[str]], more: str) -> None:
    workers(CASE)
    ledger(more=more)

    assert m3check("run --arch sm100 --ledger known.toml")[0] == 0


def test_a_crash_is_excused_only_by_an_entry_for_crashes(m3check: Main, workers: Callable[..., list[str]]) -> None:
    workers(CASE, status=Status.CRASHED)
    ledger()
    assert m3check("run --arch sm100 --ledger known.toml")[0] == 1
    (red,) = [r for r in jsonfile.read("reports/sm100").results if r.status is Status.CRASHED]
    assert red.reason == "it crashed; known.toml, entry 1 does not excuse this: it is for failed"

    ledger(more='status = ["failed", "crashed"]')
    assert m3check("run --arch sm100 --ledger known.toml")[0] == 0


def test_an_expired_entry_is_red_and_excuses_nothing(m3check: Main, workers: Callable[..., list[str]]) -> None:
    ledger(expires="2026-01-31")
    workers(CASE)
    code, _, said = m3check("run --arch sm100 --ledger known.toml")
    assert code == 1
    assert said.startswith("m3check: exit 1: 1 failed of ")
    assert f"known.toml, entry 1 (case '{CASE}') expired on 2026-01-31" in said
    (red,) = [r for r in jsonfile.read("reports/sm100").results if r.status is Status.FAILED]
    assert red.reason == "it failed; known.toml, entry 1 excused this until 2026-01-31"

    workers()  # mended, and the entry forgotten
    code, _, said = m3check("run --arch sm100 --ledger known.toml")
    assert code == 1
    assert "expired on 2026-01-31" in said


def test_the_last_day_of_an_entry_still_counts(m3check: Main, workers: Callable[..., list[str]]) -> None:
    import datetime

    today = datetime.datetime.now(datetime.UTC).date()
    workers(CASE)
    ledger(expires=str(today))
    assert m3check("run --arch sm100 --ledger known.toml")[0] == 0
    ledger(expires=str(today - datetime.timedelta(days=1)))
    assert m3check("run --arch sm100 --ledger known.toml")[0] == 1


def test_an_unexpected_pass_is_red(m3check: Main, workers: Callable[..., list[str]]) -> None:
    workers()
    ledger()
    code, _, said = m3check("run --arch sm100 --ledger known.toml")

    assert code == 1
    assert f"(case '{CASE}') passes unexpectedly: its case passed on triton; delete the entry" in said
    assert 'type="m3check.exit.1"' in Path("reports/sm100/junit.xml").read_text()
    assert "## Gate" in Path("reports/sm100/report.md").read_text()


def test_of_several_cases_one_that_still_fails_is_enough(m3check: Main, workers: Callable[..., list[str]]) -> None:
    ledger('op = "index_decode"')
    workers(CASE)
    assert m3check("run --arch sm100 --ledger known.toml")[0] == 0

    workers()
    code, _, said = m3check("run --arch sm100 --ledger known.toml")
    assert code == 1
    assert "results that it means passed; delete the entry" in said


@pytest.mark.parametrize(
    "selector", ['select = "fp9"', 'case = "index_decode/q=3,kv=999"', 'op = "decode"\nselect = "q=999"']
)
def test_an_entry_that_matches_nothing_is_red(m3check: Main, workers: Callable[..., list[str]], selector: str) -> None:
    workers()
    ledger(selector)
    code, _, said = m3check("run --arch sm100 --ledger known.toml")

    assert code == 1
    assert "matches nothing: it selects no case of any tier; correct it or delete it" in said


def test_an_entry_whose_cases_were_all_skipped_is_red(m3check: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pool.install(monkeypatch, lambda line: Status.SKIPPED if line.case == CASE else Status.PASSED)
    ledger()
    code, _, said = m3check("run --arch sm100 --ledger known.toml")

    assert code == 1
    assert "matches nothing that ran: all 1 skipped, because it skipped" in said


def test_an_entry_of_another_tier_is_left_alone(m3check: Main, workers: Callable[..., list[str]]) -> None:
    smoke = set(cases.tier("smoke"))
    workers()
    ledger(f'case = "{cases.case_id(next(case for case in cases.tier("full") if case not in smoke))}"')

    assert m3check("run --arch sm100 --ledger known.toml")[0] == 0


def test_a_part_of_a_run_does_not_judge_what_it_cannot_see(m3check: Main, workers: Callable[..., list[str]]) -> None:
    workers()
    ledger('op = "index_decode"')

    assert m3check("run --arch sm100 --ledger known.toml --shard 1/2")[0] == 0
    assert "not judged here: known.toml, entry 1 selects" in Path("reports/sm100/report.md").read_text()
    assert m3check("run --arch sm100 --ledger known.toml -k topk=16")[0] == 0
    assert m3check("run --arch sm100 --ledger known.toml --op sparse_attn")[0] == 0
    assert m3check(f"run --arch sm100 --ledger known.toml --case {CASE}")[0] == 0


def test_a_replay_judges_the_entries_that_it_meets_alone(m3check: Main, workers: Callable[..., list[str]]) -> None:
    workers()
    ledger('select = "fp9"', expires="2026-01-01")
    assert m3check(f"run --arch sm100 --ledger known.toml --case {CASE}")[0] == 0

    ledger()
    code, _, said = m3check(f"run --arch sm100 --ledger known.toml --case {CASE}")
    assert code == 1
    assert "passes unexpectedly" in said


def test_another_seed_is_another_draw_of_the_same_case(m3check: Main, workers: Callable[..., list[str]]) -> None:
    workers(f"{CASE}~7")
    ledger()
    assert m3check("run --arch sm100 --ledger known.toml --seed 7")[0] == 0

    ledger(f'case = "{CASE}~8"')
    code, _, said = m3check("run --arch sm100 --ledger known.toml --seed 7")
    assert code == 1
    assert "1 failed" in said
    assert "nothing" not in said


def test_a_strict_run_can_excuse_a_note(m3check: Main, workers: Callable[..., list[str]]) -> None:
    workers(CASE, status=Status.MISTRUSTED)
    ledger(more='status = "mistrusted"')

    assert m3check("run --arch sm100 --strict")[0] == 1
    assert m3check("run --arch sm100 --strict --ledger known.toml")[0] == 0
    code, _, said = m3check("run --arch sm100 --ledger known.toml")
    assert code == 0, "what the entry is for still is so, although this run does not call it red"
    assert "1 mistrusted" in said


# ---- floors


@pytest.mark.parametrize(
    ("floor", "said"),
    [
        ("min_cases=60", "floor min_cases: index_score ran"),
        ("min_cases.index_topk=60", "floor min_cases: index_topk ran"),
        ("evidence=device", f"floor evidence=device: {len(SMOKE) - 1} cases are interpreted only"),
        ("max_skipped=0", f"floor max_skipped=0: {MISSING + 1} cases of triton are skipped"),
        ("max_mistrusted=0", "floor max_mistrusted=0: 1 case of triton is mistrusted"),
        ("max_inconclusive=0", "floor max_inconclusive=0: 1 case of triton is inconclusive"),
        ("max_known=0", "floor max_known=0: 1 case of triton is known"),
    ],
)
def test_a_floor_that_is_not_met_is_red(m3check: Main, monkeypatch: pytest.MonkeyPatch, floor: str, said: str) -> None:
    others = [cases.case_id(case) for case in cases.tier("smoke") if case.op == "sparse_attn"]
    odd = {
        CASE: Status.FAILED,
        others[0]: Status.SKIPPED,
        others[1]: Status.MISTRUSTED,
        others[2]: Status.INCONCLUSIVE,
    }
    fake_pool.install(monkeypatch, lambda line: odd.get(line.case, Status.PASSED))
    ledger()
    line = "run --arch sm100 --ledger known.toml --floor"
    code, _, told = m3check(f"{line} {floor}")

    assert code == 1
    assert said in told
    lax = "min_cases=1 min_cases.index_decode=2 evidence=interpreted max_mistrusted=1 max_inconclusive=1"
    assert m3check(f"{line} {lax} max_skipped={MISSING + 1} max_known=1")[0] == 0


def test_what_was_only_compiled_computed_nothing(m3check: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    def verdict(line: PlanLine) -> Status:
        return Status.PASSED if line.evidence == "compiled" or line.op != "decode" else Status.SKIPPED

    fake_pool.install(monkeypatch, verdict, compiled=True)
    assert m3check("run --arch sm100")[0] == 0
    code, _, said = m3check("run --arch sm100 --floor min_cases.decode=1")
    assert code == 1
    assert "decode ran 0 cases on triton" in said
    code, _, said = m3check("run --arch sm100 --floor min_cases.decode=1 evidence=compiled")
    assert code == 0, said
    assert m3check("run --arch sm100 --floor evidence=interpreted")[0] == 1


def test_a_floor_for_each_op_asks_nothing_of_ops_beside_block_sparse_attention(
    m3check: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verdict(line: PlanLine) -> Status:
        return Status.PASSED if OPS[line.op].family == "sparse" else Status.SKIPPED

    fake_pool.install(monkeypatch, verdict)
    assert m3check("run --arch sm100 --floor min_cases=1")[0] == 0
    code, _, said = m3check("run --arch sm100 --floor min_cases=1 min_cases.mla_sparse=1")
    assert code == 1
    assert "mla_sparse ran 0 cases on triton, the floor is 1" in said


def test_each_named_provider_must_reach_the_floor(m3check: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.py").write_text("")
    fake_pool.install(
        monkeypatch,
        lambda line: Status.SKIPPED if line.provider != "triton" and line.op == "decode" else Status.PASSED,
    )
    code, _, said = m3check("run --arch sm100 --kernels triton ./mine.py --floor min_cases.decode=1")

    assert code == 1
    assert "floor min_cases: decode ran 0 cases on ./mine.py, the floor is 1" in said


def test_a_narrowed_run_is_held_to_its_floors_and_a_replay_is_not(m3check: Main, workers: Callable[..., list[str]]) -> None:
    workers()
    Path("m3check.toml").write_text("[floors]\nmin_cases = 1\n")

    assert m3check("run --arch sm100")[0] == 0
    assert m3check("run --arch sm100 --op decode")[0] == 1, "a forgotten --op would empty a gate"
    assert m3check("run --arch sm100 --op decode --floor none")[0] == 0
    assert m3check(f"run --arch sm100 --case {CASE}")[0] == 0
    assert "no floor is asked of named cases" in Path("reports/sm100/report.md").read_text()


def test_the_floors_of_a_target_come_before_the_common_ones(m3check: Main, workers: Callable[..., list[str]]) -> None:
    workers()
    Path("m3check.toml").write_text("[floors]\nmin_cases = 1\n[floors.sm90]\nmin_cases = {each = 1, decode = 1000}\n")

    assert m3check("run --arch sm100")[0] == 0
    code, _, said = m3check("run --arch sm90")
    assert code == 1
    assert "floor min_cases: decode ran" in said


# ---- a killed run


def test_a_killed_run_leaves_no_report_and_is_resumed(m3check: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pool.install(monkeypatch, lambda _line: Status.PASSED)
    assert m3check("run --arch sm100 --op decode")[0] == 0
    whole = len(jsonfile.read("reports/sm100").results)

    class Killed(BaseException):
        """Nothing in m3check can catch this, as nothing can catch SIGKILL."""

    turns = iter(range(1000))
    fake_pool.install(monkeypatch, lambda _line: Status.PASSED if next(turns) < 2 else Killed())
    with pytest.raises(Killed):
        m3check("run --arch sm100 --op decode")
    assert not Path("reports/sm100/report.json").exists(), "the earlier run's green report would stand for this one"
    journal = Path("reports/sm100/journal.jsonl")
    journal.write_text(journal.read_text() + '{"case": "torn')
    code, _, said = m3check("merge reports/sm100")
    assert code == 4
    assert "report.json cannot be read: No such file or directory" in said

    ran = fake_pool.install(monkeypatch, lambda _line: Status.PASSED)
    code, _, said = m3check("run --arch sm100 --op decode --resume --floor min_cases.decode=2")
    assert code == 0
    assert len(ran) == whole - 2
    assert f"{whole} results, none red" in said


def test_a_failure_before_the_kill_is_red_after_the_resumption(m3check: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = iter([Status.FAILED, KeyboardInterrupt()])
    fake_pool.install(monkeypatch, lambda _line: next(turns))
    code, _, said = m3check("run --arch sm100 --op decode")
    assert code == 2
    assert "interrupted after 1 results" in said
    fake_pool.install(monkeypatch, lambda _line: Status.PASSED)
    assert m3check("run --arch sm100 --op decode --resume")[0] == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("sm100", "sm90", 1), "it was made with arch 'sm90', this run has 'sm100'"),
        (lambda text: text.replace("aaa", "bbb", 1), "it was made with providers"),
        (lambda _text: "not a journal\n", "is not a journal of m3check"),
    ],
)
def test_a_journal_of_another_run_is_not_resumed(
    m3check: Main, workers: Callable[..., list[str]], change: Callable[[str], str], said: str
) -> None:
    workers(sha256="aaa")
    m3check("run --arch sm100 --op decode")
    journal = Path("reports/sm100/journal.jsonl")
    journal.write_text(change(journal.read_text()))
    code, _, told = m3check("run --arch sm100 --op decode --resume")

    assert code == 4
    assert said in told


# ---- shards and merges


def shards(m3check: Main, n: int, more: str = "", only: tuple[int, ...] = ()) -> str:
    for i in only or range(1, n + 1):
        m3check(f"run --arch sm100 --shard {i}/{n} --out part{i} {more}")
    return " ".join(f"part{i}" for i in only or range(1, n + 1))


def test_shards_are_disjoint_cover_the_tier_and_merge_into_the_whole_run(
    m3check: Main, workers: Callable[..., list[str]]
) -> None:
    ran = workers()
    parts = shards(m3check, 3)

    assert sorted(ran) == sorted(cases.case_id(case) for case in SMOKE)
    assert m3check(f"merge {parts} --out all")[0] == 0
    assert m3check("run --arch sm100")[0] == 0
    assert {r.case for r in jsonfile.read("all").results} == {r.case for r in jsonfile.read("reports/sm100").results}
    assert m3check("compare reports/sm100 all")[0] == 0


def test_a_case_stays_in_its_shard_when_others_come_and_go(m3check: Main) -> None:
    every = cases.tier("ci")
    some = every[::2]

    assert set(cases.shard(some, 2, 5)) == set(cases.shard(every, 2, 5)) & set(some)


def test_a_lost_shard_is_found(m3check: Main, workers: Callable[..., list[str]]) -> None:
    workers()
    parts = shards(m3check, 3, only=(1, 3))
    code, _, said = m3check(f"merge {parts}")

    assert code == 5
    assert said == "m3check: exit 5: shards are missing: 2/3 of `m3check run --arch sm100`"
    assert m3check(f"merge {parts} --out two")[0] == 5
    assert m3check("merge two")[0] == 5, "a merge of merges knows it, too"
    m3check("run --arch sm100 --shard 2/3 --out part2")
    assert m3check("merge two part2")[0] == 0


def test_a_shard_of_another_run_does_not_stand_in(m3check: Main, workers: Callable[..., list[str]]) -> None:
    workers()
    shards(m3check, 2, only=(1,))
    m3check("run --arch sm100 --tier ci --shard 2/2 --out other")
    code, _, said = m3check("merge part1 other")

    assert code == 5
    assert "2/2 of `m3check run --arch sm100`, 1/2 of `m3check run --arch sm100 --tier ci`" in said


def test_a_shard_twice_changes_nothing(m3check: Main, workers: Callable[..., list[str]]) -> None:
    workers()
    parts = shards(m3check, 2)
    m3check(f"merge {parts} part1 --out all")

    assert len(jsonfile.read("all").results) == len(cases.tier("smoke"))


def test_two_verdicts_on_one_case_are_not_merged(m3check: Main, workers: Callable[..., list[str]]) -> None:
    workers()
    m3check("run --arch sm100 --out green")
    workers(CASE)
    m3check("run --arch sm100 --out red")
    code, _, said = m3check("merge green red")

    assert code == 4
    assert "a merge does not choose between verdicts" in said


def test_parts_of_different_targets_tools_or_kernels_are_not_merged(
    m3check: Main, workers: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    workers(sha256="aaa")
    m3check("run --arch sm100 --shard 1/2 --out a")
    m3check("run --arch sm90 --shard 2/2 --out other_arch")
    workers(sha256="bbb")
    m3check("run --arch sm100 --shard 2/2 --out other_code")
    monkeypatch.setattr("m3check.__version__", "9.9.9")
    workers(sha256="aaa")
    m3check("run --arch sm100 --shard 2/2 --out other_tool")

    for other, said in {
        "other_arch": "the records are of different targets (sm100, sm90)",
        "other_code": "triton is not the same code in all records: its sha256 differs",
        "other_tool": "the records were made by m3check 0.1.0 and m3check 9.9.9",
    }.items():
        code, _, told = m3check(f"merge a {other}")
        assert code == 4
        assert said in told


def test_a_shard_that_was_interrupted_is_not_made_good(m3check: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pool.install(monkeypatch, lambda _line: Status.PASSED)
    parts = shards(m3check, 2, "--op sparse_attn")
    turns = iter([Status.PASSED, KeyboardInterrupt()])
    fake_pool.install(monkeypatch, lambda _line: next(turns))
    m3check("run --arch sm100 --op sparse_attn --shard 2/2 --out part2")
    code, _, said = m3check(f"merge {parts}")

    assert code == 2
    assert "a merged record broke off: interrupted after 1 results" in said


def test_what_shards_cannot_judge_is_judged_by_their_merge(m3check: Main, workers: Callable[..., list[str]]) -> None:
    workers()
    ledger()
    more = "--ledger known.toml --floor min_cases=1000"
    shards(m3check, 2, more)
    told = [jsonfile.read(f"part{i}").exit for i in (1, 2)]
    held = [CASE in {r.case for r in jsonfile.read(f"part{i}").results} for i in (1, 2)]

    assert [exit.code for exit in told] == [int(here) for here in held], "an entry for one case is judged where it is"
    code, _, said = m3check("merge part1 part2")
    assert code == 1, "by the ledger and the floors that all shards were asked for"
    assert "passes unexpectedly" in said
    assert "more breaches" in said
    code, _, said = m3check("merge part1 part2 --floor none")
    assert "more breaches" not in said
    ledger('op = "decode"', name="other.toml")
    code, _, said = m3check("merge part1 part2 --ledger other.toml --floor none")
    assert "other.toml, entry 1" in said


def test_a_merge_judges_known_failures_anew(m3check: Main, workers: Callable[..., list[str]]) -> None:
    workers(CASE)
    ledger()
    parts = shards(m3check, 2, "--ledger known.toml")
    assert m3check(f"merge {parts} --out all")[0] == 0
    assert jsonfile.read("all").summary["known"] == 1

    Path("none.toml").write_text("")
    code, _, said = m3check(f"merge {parts} --ledger none.toml --out all")
    assert code == 1
    assert "1 failed" in said
    (red,) = [r for r in jsonfile.read("all").results if r.case == CASE]
    assert [f.check for f in red.findings] == ["ids"]
    assert red.reason == "it failed"


def test_required_evidence_is_required_of_a_merge(m3check: Main, workers: Callable[..., list[str]]) -> None:
    workers()
    parts = shards(m3check, 2, "--require device")
    code, _, said = m3check(f"merge {parts}")

    assert code == 1
    assert "--require device" in said


# ---- comparisons


def test_a_corrupt_baseline(m3check: Main) -> None:
    text = jsonfile.dumps(record(result()))
    Path("new.json").write_text(text)
    told = {}
    for name, broken in {
        "torn": text[: len(text) // 2],
        "empty": "",
        "foreign": "{}",
        "newer": text.replace('"1.', '"7.', 1),
        "odd": text.replace('"status":"passed"', '"status":"fine"', 1),
    }.items():
        Path("old.json").write_text(broken)
        code, _, told[name] = m3check("compare old.json new.json")
        assert code == 4, name

    assert "old.json is not a record: no valid JSON" in told["torn"]
    assert "old.json is not a record: no valid JSON" in told["empty"]
    assert "it has no schema_version" in told["foreign"]
    assert "old.json has schema 7." in told["newer"]
    assert "old.json is not a record of schema" in told["odd"]


def test_a_baseline_that_is_no_whole_run(m3check: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pool.install(monkeypatch, lambda _line: Status.PASSED)
    m3check("run --arch sm100 --op decode --out whole")
    turns = iter([Status.PASSED, KeyboardInterrupt()])
    fake_pool.install(monkeypatch, lambda _line: next(turns))
    m3check("run --arch sm100 --op decode --out part")

    code, _, said = m3check("compare part whole")
    assert code == 4
    assert "the OLD record broke off (exit 2: interrupted after 1 results)" in said
    code, out, said = m3check("compare whole part --format json")
    assert code == 1
    assert {change["kind"] for change in json.loads(out)["changes"]} == {"broke off", "missing"}
