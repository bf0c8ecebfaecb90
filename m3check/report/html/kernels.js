// Kernels: how many of each verdict, and how near to their limits.

const opened = new Set();
const MANY = 32;
let every = false;

function kernels(results) {
  const ran = results.filter((result) => result.status !== "skipped");
  const groups = grouped(ran, (result) => [result.op, result.record, result.provider, result.evidence]);
  groups.sort((a, b) => DATA.ops.indexOf(a.key[0]) - DATA.ops.indexOf(b.key[0]));
  const shown = every ? groups : groups.slice(0, MANY);
  byId("kernels").replaceChildren(
    h("h2", { id: "kernels-title" }, "Kernels"),
    groups.length
      ? quiet(
          "How much of what correct arithmetic can explain was used up: each figure is one finding, on a scale of ",
          "doublings; right of the line it is beyond its limit. Compiled kernels: of shared memory.",
        )
      : quiet("Nothing that ran is left by the filters."),
  );
  if (groups.length) byId("kernels").append(h("div", { class: "scroll" }, kernelsTable(shown)));
  if (shown.length < groups.length) {
    const all = () => ((every = true), refresh());
    byId("kernels").append(
      button(`Show the other ${groups.length - MANY} kernels; filters leave fewer`, all, { class: "link" }),
    );
  }
}

const COLUMNS = [
  "op",
  ...(SEVERAL ? ["record"] : []),
  "provider",
  "evidence",
  "results",
  "",
  "measured/limit",
  "median",
  "largest",
];
const RIGHT = ["results", "median", "largest"];

function kernelsTable(groups) {
  const heads = COLUMNS.map((text) =>
    h(
      "th",
      { scope: "col", class: RIGHT.includes(text) ? "right" : null },
      text,
      text === "measured/limit" ? histogramScale() : "",
    ),
  );
  const rows = groups.flatMap(({ key, items }) => {
    const name = JSON.stringify(key);
    return [kernelRow(key, items, name), ...(opened.has(name) ? checkRows(items) : [])];
  });
  return h("table", { class: "kernels" }, h("thead", {}, h("tr", {}, heads)), h("tbody", {}, rows));
}

const ratiosOf = (findings) => findings.map((finding) => finding.ratio).filter((ratio) => ratio !== null);
const largest = (ratios) =>
  ratios.length ? figure(ratios.some(Number.isNaN) ? NaN : ratios.reduce((a, b) => Math.max(a, b))) : "–";

function kernelRow([op, record, provider, evidence], items, name) {
  const ratios = ratiosOf(items.flatMap((result) => result.findings));
  const red = items.filter((result) => result.red).length;
  const open = opened.has(name);
  const flip = () => {
    if (!opened.delete(name)) opened.add(name);
    refresh();
    byId("kernels")
      .querySelector(`[data-kernel="${CSS.escape(name)}"]`)
      ?.focus();
  };
  const disclose = button(op, flip, { class: "disclose", "data-kernel": name, "aria-expanded": String(open) });
  return h(
    "tr",
    { class: "kernel" },
    h("th", { scope: "row" }, disclose),
    SEVERAL ? h("td", {}, RECORDS[record].name) : null,
    h("td", {}, provider),
    h("td", {}, word(evidence)),
    h("td", { class: "right" }, red ? alarming(`${COUNT.format(red)} red of `) : "", COUNT.format(items.length)),
    h("td", {}, shareBar(items)),
    distributionCells(ratios),
  );
}

const distributionCells = (ratios) => [
  h("td", {}, histogram(ratios)),
  h("td", { class: "right" }, ratios.length ? figure(median(ratios)) : "–"),
  h("td", { class: "right" }, largest(ratios)),
];

function checkRows(items) {
  const groups = grouped(
    items.flatMap((result) => result.findings.filter((finding) => finding.status !== "noted")),
    (finding) => finding.check,
  );
  if (!groups.length) return [h("tr", { class: "check" }, h("td", { colspan: COLUMNS.length }, "no check came to judge"))];
  return groups.map(({ key, items: findings }) => {
    const failed = findings.filter((finding) => finding.status === "failed").length;
    return h(
      "tr",
      { class: "check" },
      h("td", { colspan: COLUMNS.length - 5 }, key),
      h(
        "td",
        { class: "right" },
        failed ? alarming(`${COUNT.format(failed)} failed of `) : "",
        COUNT.format(findings.length),
      ),
      h("td"),
      distributionCells(ratiosOf(findings)),
    );
  });
}
