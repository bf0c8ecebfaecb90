"use strict";
// What the page knows: the results, unpacked, and which of them the filters leave.

const DATA = JSON.parse(document.getElementById("data").textContent);
const RECORDS = DATA.records;
const SEVERAL = RECORDS.length > 1;
const number = (value) => (value === "inf" ? Infinity : value === "-inf" ? -Infinity : value === "nan" ? NaN : value);

function unpackedFinding(packed) {
  const [check, status, ratio, measured, limit, where, hint] = Array.isArray(packed) ? packed : [packed];
  const word = (index) => (index == null ? "" : DATA.words[index]);
  return {
    check: word(check),
    status: status == null ? "passed" : word(status),
    ratio: ratio == null ? null : number(ratio),
    measured,
    limit,
    where: word(where),
    hint: word(hint),
  };
}

function unpacked(row, index) {
  const result = Object.fromEntries(DATA.fields.map((name, place) => [name, row[place]]));
  for (const name of ["op", "provider", "kernel", "evidence", "status", "case", "reason", "red"])
    result[name] = DATA.words[result[name]];
  result.index = index;
  result.arch = RECORDS[result.record].arch;
  result.recordName = RECORDS[result.record].name;
  result.findings = result.findings.map(unpackedFinding);
  result.noted = result.findings.some((finding) => finding.status === "noted");
  result.fill = String(row[DATA.fields.indexOf("axes")][DATA.axes.indexOf("fill")] ?? "");
  result.worst = null;
  for (const { ratio } of result.findings)
    if (ratio !== null && (result.worst === null || ratio > result.worst)) result.worst = ratio;
  result.repro ||= `m3check run --arch ${result.arch} --kernels ${result.provider} --case ${result.case}`;
  return result;
}

const RESULTS = DATA.results.map(unpacked);

// The findings that made a result red; under --strict notes and doubts do.
function telling(result) {
  const failed = result.findings.filter((finding) => finding.status === "failed" || finding.status === "error");
  return failed.length || !result.red ? failed : result.findings.filter((finding) => finding.status !== "passed");
}

// In one word: the check that failed first, or what became of the result.
function cause(result) {
  const [first] = telling(result);
  return first ? first.check : result.status;
}

const ASIDE = { noted: 2, passed: 3, skipped: 4 }; // the statuses that nobody has to look at, last
const rank = (result) => (result.red ? 0 : result.status === "passed" && result.noted ? 2 : (ASIDE[result.status] ?? 1));
const amount = (value) => (value === null || Number.isNaN(value) ? -1 : value);
const ORDERS = {
  "red first": (a, b) => rank(a) - rank(b) || a.index - b.index,
  "nearest to the limit": (a, b) => amount(b.worst) - amount(a.worst) || a.index - b.index,
  slowest: (a, b) => b.seconds - a.seconds || a.index - b.index,
};

// One choice each, by the word in the address; the status alone can have several.
const CHOICES = {
  op: { label: "op", of: (result) => result.op },
  provider: { label: "provider", of: (result) => result.provider },
  arch: { label: SEVERAL ? "record" : "arch", of: (result) => result.recordName },
  evidence: { label: "evidence", of: (result) => result.evidence },
  fill: { label: "fill", of: (result) => result.fill },
  cause: { label: "red cause", of: (result) => (result.red ? cause(result) : ""), among: (result) => result.red },
};

function unfiltered() {
  const open = Object.fromEntries(Object.keys(CHOICES).map((name) => [name, ""]));
  return { status: new Set(), q: "", order: "red first", ...open };
}

const state = unfiltered();

function readState() {
  const asked = new URLSearchParams(location.hash.slice(1));
  state.status = new Set((asked.get("status") ?? "").split(",").filter(Boolean));
  state.q = asked.get("q") ?? "";
  state.order = asked.get("order") in ORDERS ? asked.get("order") : "red first";
  for (const name of Object.keys(CHOICES)) state[name] = asked.get(name) ?? "";
  return asked;
}

function address() {
  const told = new URLSearchParams();
  if (state.status.size) told.set("status", [...state.status].join(","));
  for (const name of Object.keys(CHOICES)) if (state[name]) told.set(name, state[name]);
  if (state.q) told.set("q", state.q);
  if (state.order !== "red first") told.set("order", state.order);
  return told.toString();
}

function searchable(result) {
  result.text ??= [
    result.case,
    result.provider,
    result.kernel,
    result.recordName,
    result.reason,
    result.status,
    result.red,
    ...result.findings
      .filter((finding) => finding.status !== "passed")
      .flatMap((finding) => [finding.check, finding.where, finding.hint]),
  ]
    .join("\n")
    .toLowerCase();
  return result.text;
}

// `word=value` is the beginning of an axis; the words of axes alone would match everything.
function fits(result, term) {
  if (searchable(result).includes(term)) return true;
  return (
    term.includes("=") && DATA.axes.some((name, place) => `${name}=${result.axes[place]}`.toLowerCase().startsWith(term))
  );
}

const hasStatus = (result, status) =>
  status === "red" ? result.red !== "" : status === "noted" ? result.noted : result.status === status;

// Every word must be in the text, and none of those with a minus before it.
function matching() {
  const terms = state.q
    .toLowerCase()
    .split(/\s+/)
    .filter((term) => term && term !== "-");
  return RESULTS.filter(
    (result) =>
      Object.entries(CHOICES).every(([name, choice]) => !state[name] || choice.of(result) === state[name]) &&
      terms.every((term) => (term[0] === "-" ? !fits(result, term.slice(1)) : fits(result, term))),
  );
}

const ofStatus = (results) =>
  state.status.size ? results.filter((result) => [...state.status].some((status) => hasStatus(result, status))) : results;

function grouped(items, key) {
  const groups = new Map();
  for (const item of items) {
    const name = JSON.stringify(key(item));
    if (!groups.has(name)) groups.set(name, { key: key(item), items: [] });
    groups.get(name).items.push(item);
  }
  return [...groups.values()];
}
