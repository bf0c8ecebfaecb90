"""report.html: one file that loads nothing, escapes everything, and works in a real browser."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import browser as browsers
import pytest
from records import GOLDEN, finding, green, nothing, record, red, result

import m3check
from m3check import report
from m3check.types import Finding, Heat, HeatMap, Record, Result, Status

EVIL = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>'\"&amp;<!--\u202e\x00"
ROOT = Path(m3check.__file__).parent

MAP = HeatMap("request, token", "query head", ("0, 4095", "1, 700"), ("··3#·N·9", "········"), step=2, count=3)
MARKS = HeatMap("index head", "block", ("2",), ("=-+±²·",), of="0, 4095")


class Tags(html.parser.HTMLParser):
    """The elements of a page, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data


def rendered(*records: Record) -> str:
    return report.render(records, "html")


def hostile() -> Record:
    """Outside words in every field that has any."""
    told = Finding(EVIL, Status.FAILED, 2.0, 1.0, f"request 0, query 1 (position 3){EVIL}", EVIL)
    evil_map = HeatMap(EVIL, EVIL, (EVIL,), (f"·9{EVIL}",), of=EVIL)
    bad = result(
        Status.FAILED, provider=EVIL, case=f"sparse_attn/{EVIL}", kernel=EVIL, reason=EVIL, repro=EVIL, findings=(told,),
        heat=Heat(EVIL, (evil_map,)), axes={"fill": EVIL, EVIL: EVIL},
    )  # fmt: skip
    noted = result(provider=EVIL, findings=(finding(EVIL, Status.NOTED, where=EVIL, hint=EVIL),))
    skipped = result(Status.SKIPPED, op=EVIL, reason=EVIL)
    facts = {
        "date": EVIL, "host": EVIL, "evidence_reason": EVIL, EVIL: EVIL,
        "power": {"cases": 1, "defects": [[EVIL, EVIL, 0, 1]]},
        "gate": {"ledger": EVIL, "breaches": [{"sentence": EVIL}], "floors": [EVIL]},
        "dispatch": [dict.fromkeys(("version", "op", "implementation", "when"), EVIL) | {"evidence": f"not run{EVIL}"}],
    }  # fmt: skip
    made = record(bad, noted, skipped, command=EVIL, environment=facts)
    return replace(made, arch=EVIL, exit=replace(made.exit, reason=EVIL))


def pictured() -> Record:
    """A red record whose failures have maps."""
    made = red()
    first = replace(made.results[0], heat=Heat("out", (MAP,)))
    lists = result(
        Status.FAILED,
        op="index_topk",
        case="index_topk/q=5x2,kv=2304+900",
        findings=(finding("ids", Status.FAILED, where="request 1, query 0 (position 895), index head 2", hint="wrong"),),
        heat=Heat("ids", (replace(MAP, cells=("N·N", "···")), MARKS)),
    )
    return replace(made, results=(first, lists, *made.results[1:]))


@cache
def many() -> Record:
    """2,000 results, a tenth of them red, with findings as long as real ones."""

    def one(i: int) -> Result:
        op = ("index_score", "index_topk", "sparse_attn", "sparse_attn_decode")[i % 4]
        provider = ("triton", "vllm==0.33.0")[i // 4 % 2]
        fill = "wide" if i % 3 else "ties"
        case = f"{op}/q=8x5,kv={20000 + i}+256+8+24319+12033,h=8,d=64,topk=63,dtype=fp8_e5m2,fill={fill}"
        words = {"op": op, "provider": provider, "case": case}
        checks = tuple(finding(name, measured=0.3 + i % 7 / 11) for name in ("element", "row", "token", "scale"))
        exact = tuple(finding(name, measured=0.0, limit=0.0) for name in ("finite", "guards", "inputs", "padding", "order"))
        if i % 10:
            return result(**words, findings=checks + exact)
        hint = f"-1 before the end; {i} rows; this one: {list(range(i % 9, 63))}"
        bad = finding("ids", Status.FAILED, measured=4.0 + i, where=f"request 4, query {i} (position 12025)", hint=hint)
        lines = tuple("".join("·123456789#N"[(i + x * y) % 12] for x in range(64)) for y in range(24))
        drawn = HeatMap("request, token", "query head", tuple(f"{i}, {y}" for y in range(24)), lines)
        maps = (drawn, replace(drawn, cells=lines[:8]))
        return result(Status.FAILED, **words, findings=(bad, *exact), heat=Heat("out", maps))

    return record(*map(one, range(2000)))


@cache
def many_rendered() -> str:
    return rendered(many())


def data(text: str) -> dict:
    return json.loads(Tags(text).scripts[0])


def test_a_page_is_one_file_that_asks_for_nothing_else() -> None:
    page = Tags(rendered(green()))

    assert [attrs for tag, attrs in page.tags if tag == "script"] == [{"type": "application/json", "id": "data"}, {}]
    for _, attrs in page.tags:
        assert not attrs.keys() & {"src", "srcset", "data", "action", "ping", "style", "onclick", "onerror"}
        assert str(attrs.get("href", "#")).startswith("#")
    asset = "".join(p.read_text() for p in (ROOT / "report/html").iterdir() if p.suffix in (".js", ".css", ".html"))
    for word in ("url(", "@import", "fetch(", "XMLHttp", "import(", "eval(", "erHTML", "insertAdjacent", "document.write"):
        assert word not in asset
    assert set(re.findall(r"https?://[^\"' ]+", asset)) == {"http://www.w3.org/2000/svg"}


def test_only_the_page_s_own_script_and_style_may_run() -> None:
    text = rendered(green())
    (policy,) = (attrs["content"] for tag, attrs in Tags(text).tags if attrs.get("http-equiv") == "Content-Security-Policy")
    style = re.search("<style>(.*?)</style>", text, re.S)

    assert style is not None
    for part, inside in (("script-src", Tags(text).scripts[1]), ("style-src", style[1])):
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{part} 'sha256-{digest}'" in str(policy)
    assert str(policy).startswith("default-src 'none'")


def test_words_from_outside_never_become_markup() -> None:
    text = rendered(hostile())
    page = Tags(text)

    assert [tag for tag, _ in page.tags].count("script") == 2
    assert "img" not in [tag for tag, _ in page.tags]
    assert "<" not in page.scripts[0]
    assert "\x00" not in text
    assert EVIL.replace("\x00", "\ufffd") in data(text)["words"], "and nothing is lost"


def test_the_data_holds_what_the_record_holds() -> None:
    made = data(rendered(pictured()))
    place = {name: i for i, name in enumerate(made["fields"])}
    first, lists, *_ = made["results"]

    def words(row, name):
        return made["words"][row[place[name]]]

    assert (words(first, "op"), words(first, "status"), words(first, "red")) == ("sparse_attn", "failed", "failed")
    assert first[place["heat"]][1][0]["cells"] == list(MAP.cells)
    assert lists[place["heat"]][0] == "ids"
    check, status, ratio, measured, limit, where, hint = first[place["findings"]][1]
    assert [made["words"][i] for i in (check, status, where)] == ["lost_token", "failed", "token 3, kv head 1, key 517"]
    assert (ratio, measured, limit) == (11.4, 91.25, 8)
    assert made["words"][hint] == "key 517 is missing\ufffd from the sum"
    assert first[place["repro"]] == "", "the command is made of arch, provider and case"
    assert data(rendered(record(result(repro="make check"))))["results"][0][place["repro"]] == "make check"
    strict = data(rendered(record(*green().results, command="m3check run --strict")))
    assert sum(strict["words"][row[place["red"]]] == "noted" for row in strict["results"]) == 2


def test_figures_that_are_no_margins_are_not_in_a_distribution() -> None:
    compiled = result(evidence="compiled", findings=(finding("registers"), finding("shared_memory")))
    noted = result(findings=(finding("row", Status.NOTED), finding("ids", measured=0.0, limit=0.0)))
    (registers, shared), (note, exact) = (row[12] for row in data(rendered(record(compiled, noted)))["results"])

    assert (registers[2], shared[2], note[2]) == (None, 0.25, None)
    assert isinstance(exact, int), "an exact check that passed is its name alone"


@pytest.mark.parametrize("value", [float("inf"), sys.float_info.max])
def test_figures_beyond_every_number_are_a_word(value: float) -> None:
    far = result(status=Status.FAILED, findings=(finding("lse", Status.FAILED, measured=value),))
    assert data(rendered(record(far)))["results"][0][12][0][3] == "inf"


def test_2000_results_are_less_than_5_mb() -> None:
    text = many_rendered()
    assert len(text.encode()) < 5e6
    assert len(data(text)["results"]) == 2000


def test_every_result_red_with_a_map_still_fits() -> None:
    worst = next(r for r in many().results if r.heat)
    text = rendered(record(*(replace(worst, case=f"{worst.case}~{i}") for i in range(2000))))

    assert len(text.encode()) < 5e6
    assert sum(row[-1] == 0 for row in data(text)["results"]) == 1500, "and says where the other maps are"


def test_its_files_are_in_the_package() -> None:
    told = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["m3check"]
    files = [p for p in (ROOT / "report/html").iterdir() if p.is_file() and p.suffix != ".py"]

    assert {p.suffix for p in files} == {".html", ".css", ".js"}
    for path in files:
        assert any(path.relative_to(ROOT).match(pattern) for pattern in told), path


def test_showing_it_imports_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(report.render([red()], "json"))
    code = (
        "import sys; from m3check.cli import main; code = main(['show', sys.argv[1], '--format', 'html']); "
        "print([m for m in ('torch', 'triton', 'numpy') if m in sys.modules], code, file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)

    assert ran.stdout.startswith("<!doctype html>")
    assert ran.stderr.strip() == "[] 0"


# --- In a browser.


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browsers.Browser]:
    if browsers.found() is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium): the page was not opened")
    made = browsers.Browser(tmp_path_factory.mktemp("chromium"))
    yield made
    made.close()


@pytest.fixture
def page(browser: browsers.Browser, tmp_path: Path) -> Iterator[browsers.Browser]:
    """A browser that has nothing to complain of afterwards."""
    yield browser
    assert browser.messages == []


def opened(page: browsers.Browser, folder: Path, *records: Record, hash: str = "") -> None:
    path = folder / "report.html"
    path.write_text(rendered(*records), encoding="utf-8")
    page.open(path, hash)
    assert page.requests == [path.as_uri()], "it asked for something else"


SHOWN = "[...document.querySelectorAll('#list .case')].map(e => e.textContent)"
TOLD = "document.getElementById('told').textContent"


@pytest.mark.parametrize("name", GOLDEN)
def test_a_page_says_what_became_of_its_record(name: str, page: browsers.Browser, tmp_path: Path) -> None:
    made = GOLDEN[name]()
    opened(page, tmp_path, made)

    verdict = {"green": "green", "red": "RED", "nothing": "nothing ran"}[name]
    assert page.js("document.querySelector('h1').textContent") == f"{verdict} sm100"
    assert page.js(f"{SHOWN}.length") == len(made.results)
    assert f"Exit {made.exit.code}: {made.exit.reason}." in page.js("document.querySelector('header').textContent")
    assert page.js("document.title").startswith("m3check sm100: ")


def test_red_results_are_open_and_tell_everything(page: browsers.Browser, tmp_path: Path) -> None:
    opened(page, tmp_path, pictured())
    first = page.js("document.querySelector('#list > li').innerText")

    for words in ("lost_token", "91.3 against a limit of 8 (11.4 times)", "token 3, kv head 1, key 517", "is missing"):
        assert words in first
    assert "m3check run --arch sm100 --kernels triton --case sparse_attn/q=5,kv=2304" in first
    assert "m3check explain --arch sm100 --kernels triton sparse_attn/q=5,kv=2304" in first
    assert "fill gauss" in first.replace("\n", " ")
    causes = page.js("document.getElementById('causes').innerText")
    assert "Red (6)" in causes
    assert "SIGSEGV <core dumped>" in causes


def test_a_map_has_a_mark_for_each_cell_that_is_off(page: browsers.Browser, tmp_path: Path) -> None:
    opened(page, tmp_path, pictured())

    assert page.js(f"{SHOWN}.slice(0, 2)") == ["sparse_attn/q=5,kv=2304", "index_topk/q=5x2,kv=2304+900"]
    kinds = "m => [...m.querySelectorAll('rect:not(.ground)')].map(e => e.classList[0])"
    assert page.js(f"[...document.querySelectorAll('.heat')].map({kinds})") == [
        ["heat-3", "heat-10", "none", "heat-9"],
        ["none", "none"],
        ["chosen", "lost", "extra", "both", "both"],
    ]
    title = page.js("document.querySelector('.heat .heat-3 title').textContent")
    assert title == "request, token 0, 4095, query heads 4 to 5: 4 to 8 times the limit"
    assert page.js("document.querySelectorAll('.batch g .place').length") == 1, "the batch, with where the finding points"
    assert page.js("document.querySelectorAll('.batch g').length") == 2


@pytest.mark.parametrize(
    ("hash", "cases"),
    [
        ("status=red", ["decode/q=5", "index_score/q=5", "prefill/q=5", "sparse_attn/q=5", "sparse_attn/q=6"]),
        ("status=crashed,timeout", ["decode/q=5", "index_score/q=5"]),
        ("status=passed&op=decode", []),
        ("op=index_topk", ["index_topk/q=5"]),
        ("evidence=device", ["index_topk/q=5"]),
        ("q=lost_token", ["sparse_attn/q=5"]),
        ("q=KV%3D2304+-q%3D5", ["sparse_attn/q=6"]),
        ("q=head_dim%3D64", []),
        ("q=head_dim%3D128+segv", ["decode/q=5"]),
        ("cause=timeout", ["index_score/q=5"]),
        ("fill=ties&provider=nobody", []),
    ],
)
def test_an_address_opens_a_filtered_view(hash: str, cases: list[str], page: browsers.Browser, tmp_path: Path) -> None:
    opened(page, tmp_path, red(), hash=hash)

    assert sorted(page.js(SHOWN)) == [f"{case},kv=2304" for case in cases]
    assert page.js(TOLD) == f"{len(cases)} of 6 results"


def test_filters_are_put_into_the_address_and_can_be_cleared(page: browsers.Browser, tmp_path: Path) -> None:
    opened(page, tmp_path, green(), replace(red(), arch="sm90"))
    page.js("document.querySelector('[data-status=crashed]').click()")
    page.js("(e => { e.value = 'sm90'; e.dispatchEvent(new Event('change')); })(document.getElementById('choice-arch'))")

    assert page.js("location.hash") == "#status=crashed&arch=sm90"
    assert page.js(SHOWN) == ["decode/q=5,kv=2304"]
    assert page.js("document.querySelector('[data-status=crashed]').ariaPressed") == "true"
    page.js("document.getElementById('clear').click()")
    assert page.js(TOLD) == "All 14 results"
    page.js("document.querySelector('#matrix button.cell').click()")
    assert page.js("location.hash").startswith("#op=")


def test_it_can_be_used_from_a_keyboard(page: browsers.Browser, tmp_path: Path) -> None:
    opened(page, tmp_path, red())

    page.press("/")
    assert page.js("document.activeElement.id") == "q"
    for letter in "segv":
        page.press(letter)
    assert page.js(SHOWN) == ["decode/q=5,kv=2304"]
    page.press("Escape")
    assert page.js(f"{SHOWN}.length") == 6
    page.js("document.querySelector('#list .line').focus()")
    page.press("Enter")
    assert page.js("document.querySelector('#list .line').ariaExpanded") == "false", "it was open, as red ones are"
    page.press("Tab")
    assert page.js("document.activeElement.className") == "line"
    page.js("[...document.querySelectorAll('.disclose')].find(e => e.textContent === 'sparse_attn').focus()")
    page.press("Enter")
    assert page.js("document.activeElement.ariaExpanded") == "true", "the focus stays where it was"
    checks = "[...document.querySelectorAll('tr.check')].map(e => e.firstChild.textContent)"
    assert page.js(checks) == ["element", "lost_token", "row"]


def test_everything_that_can_be_touched_or_seen_has_a_name(page: browsers.Browser, tmp_path: Path) -> None:
    opened(page, tmp_path, pictured(), green())

    nameless = page.js(
        "[...document.querySelectorAll('button, input, select, summary, svg:not([aria-hidden]), [role=img]')].filter(e => "
        "!(e.getAttribute('aria-label') || e.textContent.trim() || (e.labels && e.labels.length))).map(e => e.outerHTML)"
    )
    assert nameless == []
    assert page.js("document.querySelectorAll('h1').length") == 1
    ids = page.js("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


def test_hostile_words_are_shown_and_do_nothing(page: browsers.Browser, tmp_path: Path) -> None:
    opened(page, tmp_path, hostile())
    assert page.js("document.querySelectorAll('details').forEach(e => { e.open = true; })") is None

    assert page.js("[typeof window.hacked, document.images.length, document.scripts.length]") == ["undefined", 0, 2]
    assert page.js("document.body.innerText.split('window.hacked=1</script><img src=x').length") > 20
    opened(page, tmp_path, hostile(), hostile(), hash="q=%3Cimg%20src%3Dx%20onerror%3Dwindow.hacked%3D1%3E&op=%3Cimg%3E")
    assert page.js("[typeof window.hacked, document.images.length]") == ["undefined", 0]


def test_distributions_show_what_is_beyond_the_limit(page: browsers.Browser, tmp_path: Path) -> None:
    row = result(findings=(finding(measured=0.5), finding(measured=1.0), finding(measured=0.0)))
    over = result(Status.FAILED, case="sparse_attn/q=6,kv=2304", findings=(finding("row", Status.FAILED, measured=1.01),))
    exact = result(op="index_topk", findings=(finding(measured=0.0, limit=0.0),))
    opened(page, tmp_path, record(row, over, exact))

    label = page.js("document.querySelector('.histogram').getAttribute('aria-label')")
    assert label == "4 figures of measured/limit: median 0.75, largest 1.01, 1 beyond the limit"
    assert page.js("['within', 'over'].map(c => document.querySelectorAll(`.histogram .${c}`).length)") == [3, 1]
    assert page.js("document.querySelectorAll('.histogram').length") == 1
    assert "exact checks only" in page.js("document.getElementById('kernels').innerText")


def test_it_is_dark_where_the_system_is_and_the_button_has_the_last_word(page: browsers.Browser, tmp_path: Path) -> None:
    def ground() -> int:
        return sum(map(int, re.findall(r"\d+", page.js("getComputedStyle(document.body).backgroundColor"))[:3]))

    def system(scheme: str) -> None:
        page.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    system("dark")
    opened(page, tmp_path, green())
    assert ground() < 150
    system("light")
    assert ground() > 600
    page.js("document.getElementById('theme').click(); document.getElementById('theme').click()")
    assert ground() < 150
    assert page.js("document.getElementById('theme').textContent") == "Theme: dark"
    page.js("document.getElementById('theme').click()")
    assert ground() > 600
    opened(page, tmp_path, green(), hash="theme=dark")
    assert ground() < 150


def test_2000_results_open_and_filter(page: browsers.Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(many_rendered(), encoding="utf-8")
    page.open(path)

    assert page.js(f"{SHOWN}.length") == 60, "the others when they are asked for"
    page.js("document.querySelector('#further button').click()")
    assert page.js(f"{SHOWN}.length") == 260
    page.js("choose({ q: 'fill=ties' }, false)")
    assert page.js(TOLD) == "667 of 2,000 results"


@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_a_window(width: int, page: browsers.Browser, tmp_path: Path) -> None:
    page.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    opened(page, tmp_path, pictured(), green())

    assert page.js("document.documentElement.scrollWidth") <= width, "only what is marked so scrolls sideways"
    shot = base64.b64decode(page.ask("Page.captureScreenshot", format="png")["data"])
    assert len(shot) > 20_000, "an empty page is smaller"
    page.ask("Emulation.clearDeviceMetricsOverride")


def test_nothing_is_said_of_a_record_that_has_nothing(page: browsers.Browser, tmp_path: Path) -> None:
    opened(page, tmp_path, replace(nothing(), results=(), environment={}))

    assert "There is no result." in page.js("document.getElementById('results').innerText")
    assert page.js("document.getElementById('causes').innerText") == ""
