"""junit.xml: what CI systems draw. A test suite for each provider and op, a test case for each result.

Statuses that are neither red nor a pass become `skipped`, as pytest does with expected failures: they must not look green.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from m3check.report.markdown import sentence, telling
from m3check.report.tables import clean, computed, figure, groups, machine, worst_ratio
from m3check.report.tally import breaches, red_word, strict
from m3check.types import Record, Result, Status


def render(records: Sequence[Record]) -> str:
    """The suites of one or more records as XML text."""
    root = ElementTree.Element("testsuites", name="m3check")
    for record in records:
        for op, provider, results in groups(record.results):
            _suite(root, record, f"{record.arch}.{provider}.{op}", results)
        if record.exit.code not in (0, 1):
            _broken(root, record, "run", record.exit.reason)
        elif told := breaches(record):
            _broken(root, record, "gate", "\n".join(breach.sentence for breach in told))
    for name in ("tests", "failures", "errors", "skipped"):
        root.set(name, str(sum(int(suite.get(name, "0")) for suite in root)))
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def _suite(root: ElementTree.Element, record: Record, name: str, results: Sequence[Result]) -> None:
    suite = ElementTree.SubElement(root, "testsuite", name=clean(name))
    for result in results:
        _case(suite, name, result, strict(record))
    for attribute, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(attribute, str(sum(case.find(tag) is not None for case in suite)))
    suite.set("tests", str(len(results)))
    suite.set("time", f"{sum(r.seconds for r in results):.3f}")
    suite.set("hostname", clean(machine(record)))
    if date := record.environment.get("date"):
        suite.set("timestamp", clean(str(date)))


def _case(suite: ElementTree.Element, name: str, result: Result, stern: bool) -> None:
    owner = clean(name if computed(result) else f"{name}.compiled")  # a reader keeps one of two with the same names
    case = ElementTree.SubElement(suite, "testcase", classname=owner, name=clean(result.case), time=f"{result.seconds:.3f}")
    used = worst_ratio([result])
    facts = {"evidence": result.evidence, "kernel": result.kernel, "status": result.status.value, "repro": result.repro}
    if used is not None:
        facts["worst measured/limit"] = figure(used)
    properties = ElementTree.SubElement(case, "properties")
    for key, value in facts.items():
        ElementTree.SubElement(properties, "property", name=key, value=clean(value))
    if (tag := _tag(result, stern)) is None:
        return
    told = [sentence(f) for f in telling(result, stern)] or [result.reason or result.status.value]
    kind = f"m3check.{red_word(result, stern) or result.status.value}"
    if tag == "skipped":
        ElementTree.SubElement(case, tag, type=kind, message=clean(result.reason))
        return
    body = ElementTree.SubElement(case, tag, type=kind, message=clean(told[0]))
    body.text = clean("\n".join([*told, f"repro: {result.repro}"]))


def _tag(result: Result, stern: bool) -> str | None:
    word = red_word(result, stern)
    if word in (Status.ERROR, Status.CRASHED, Status.TIMEOUT):
        return "error"
    if word:
        return "failure"
    return None if result.status is Status.PASSED else "skipped"


def _broken(root: ElementTree.Element, record: Record, what: str, told: str) -> None:
    """What is red though no case is (nothing ran, a floor that was not met) must not be drawn green."""
    name = f"{record.arch}.{what}"
    suite = ElementTree.SubElement(
        root, "testsuite", name=clean(name), failures="0", errors="1", skipped="0", tests="1", time="0.000"
    )
    case = ElementTree.SubElement(suite, "testcase", classname=clean(name), name=what, time="0.000")
    message = " ".join(clean(told).split())
    error = ElementTree.SubElement(case, "error", type=f"m3check.exit.{record.exit.code}", message=message)
    error.text = clean(f"{told}\n{record.command}" if what == "gate" else record.command)
