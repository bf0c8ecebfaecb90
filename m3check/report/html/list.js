// What the filters leave: kernels with their distributions, and the results themselves.

const OPENED = 10, FIRST = 60, FURTHER = 200;

// --- Kernels: how many of each verdict, and how near to their limits.

const opened = new Set();
const MANY = 32;
let every = false;

function kernels(results) {
  const ran = results.filter((result) => result.status !== "skipped");
  const section = byId("kernels");
  section.replaceChildren(h("h2", { id: "kernels-title" }, "Kernels"));
  if (!ran.length) return section.append(h("p", { class: "quiet" }, "Nothing that ran is left by the filters."));
  const headers = ["op", ...(SEVERAL ? ["record"] : []), "provider", "evidence", "results", "", "measured/limit", "median", "largest"];
  const groups = grouped(ran, (result) => [result.op, result.record, result.provider, result.evidence]);
  groups.sort((a, b) => DATA.ops.indexOf(a.key[0]) - DATA.ops.indexOf(b.key[0]));
  const body = h("tbody");
  const cut = every || groups.length <= MANY ? groups.length : MANY;
  for (const { key, items } of groups.slice(0, cut)) {
    const name = JSON.stringify(key), row = kernelRow(key, items, name);
    body.append(row);
    if (opened.has(name)) body.append(...checkRows(items, headers.length));
  }
  section.append(
    h("p", { class: "quiet" }, "How much of what correct arithmetic can explain was used up: each figure is one finding, on a scale of doublings; right of the line it is beyond its limit. Compiled kernels: of shared memory."),
    h("div", { class: "scroll" }, h("table", { class: "kernels" }, h("thead", {}, h("tr", {}, headers.map((text) => h("th", { scope: "col", class: text === "median" || text === "largest" || text === "results" ? "right" : null }, text, text === "measured/limit" ? histogramScale() : "")))), body)),
    cut < groups.length ? h("button", { type: "button", class: "link", onclick: () => { every = true; refresh(); } }, `Show the other ${groups.length - cut} kernels; filters leave fewer`) : "");
}

const ratiosOf = (findings) => findings.map((finding) => finding.ratio).filter((ratio) => ratio !== null);
const largest = (ratios) => (ratios.length ? figure(ratios.some(Number.isNaN) ? NaN : ratios.reduce((a, b) => Math.max(a, b))) : "–");

function kernelRow([op, record, provider, evidence], items, name) {
  const ratios = ratiosOf(items.flatMap((result) => result.findings)), red = items.filter((result) => result.red).length;
  const open = opened.has(name);
  const flip = () => { if (!opened.delete(name)) opened.add(name); refresh(); byId("kernels").querySelector(`[data-kernel="${CSS.escape(name)}"]`)?.focus(); };
  return h("tr", { class: "kernel" },
    h("th", { scope: "row" }, h("button", { type: "button", class: "disclose", "data-kernel": name, "aria-expanded": String(open), onclick: flip }, op)),
    SEVERAL ? h("td", {}, RECORDS[record].name) : null, h("td", {}, provider), h("td", {}, word(evidence)),
    h("td", { class: "right" }, red ? h("b", { class: "redtext" }, `${COUNT.format(red)} red of `) : "", COUNT.format(items.length)), h("td", {}, shareBar(items)),
    h("td", {}, histogram(ratios)), h("td", { class: "right" }, ratios.length ? figure(median(ratios)) : "–"), h("td", { class: "right" }, largest(ratios)));
}

function checkRows(items, wide) {
  const groups = grouped(items.flatMap((result) => result.findings.filter((finding) => finding.status !== "noted")), (finding) => finding.check);
  if (!groups.length) return [h("tr", { class: "check" }, h("td", { colspan: wide }, "no check came to judge"))];
  return groups.map(({ key, items: findings }) => {
    const ratios = ratiosOf(findings), failed = findings.filter((finding) => finding.status === "failed").length;
    return h("tr", { class: "check" }, h("td", { colspan: wide - 5 }, key),
      h("td", { class: "right" }, failed ? h("b", { class: "redtext" }, `${COUNT.format(failed)} failed of `) : "", COUNT.format(findings.length)), h("td"),
      h("td", {}, ratios.length ? histogram(ratios) : h("span", { class: "quiet" }, "exact")), h("td", { class: "right" }, ratios.length ? figure(median(ratios)) : "–"), h("td", { class: "right" }, largest(ratios)));
  });
}

// --- Results: a line each, in full when opened; drawn as far as somebody wants to see.

const shownOf = new Map();  // result index: whether it is open, where somebody said so
let listed = [], drawn = 0;

function results(found) {
  listed = [...found].sort(ORDERS[state.order]);
  drawn = 0;
  const list = h("ol", { id: "list" });
  byId("results").replaceChildren(h("h2", { id: "results-title" }, "Results"), list,
    h("p", { id: "further" }, h("button", { type: "button", onclick: () => further(FURTHER) }), " ", h("button", { type: "button", class: "link", onclick: () => further(listed.length) }, "all of them")));
  if (!listed.length) list.replaceWith(h("p", { class: "quiet" }, RESULTS.length ? "No result fits these filters." : "There is no result."));
  further(FIRST);
}

function further(count) {
  const list = byId("list"), rest = byId("further");
  if (list) list.append(...listed.slice(drawn, drawn + count).map((result, i) => line(result, drawn + i)));
  drawn = Math.min(drawn + count, listed.length);
  rest.hidden = drawn >= listed.length;
  rest.firstChild.replaceChildren(`Show ${Math.min(FURTHER, listed.length - drawn)} more of ${COUNT.format(listed.length - drawn)}`);
}

function line(result, place) {
  const item = h("li", { class: result.red ? "red" : share(result) });
  const open = shownOf.get(result.index) ?? (result.red !== "" && place < OPENED);
  const button = h("button", { type: "button", class: "line", "aria-expanded": String(open), onclick: () => flip() },
    h("span", { class: "status" }, word(result.red || result.status, result.red ? "failed" : result.status), result.noted && !result.red ? word("noted") : ""),
    h("span", { class: "case m" }, result.case),
    h("span", { class: "who" }, SEVERAL ? `${result.recordName} · ` : "", result.provider, result.evidence === "device" ? "" : ` · ${result.evidence}`),
    h("span", { class: "right", title: "the largest measured/limit" }, result.worst === null ? "" : figure(result.worst)),
    h("span", { class: "right quiet", title: "wall clock" }, result.status === "skipped" ? "" : `${figure(result.seconds)} s`));
  const flip = (to = button.getAttribute("aria-expanded") !== "true") => {
    button.setAttribute("aria-expanded", String(to));
    shownOf.set(result.index, to);
    item.querySelector(".detail")?.remove();
    if (to) item.append(detail(result));
  };
  item.append(button);
  if (open) item.append(detail(result));
  return item;
}

function detail(result) {
  const told = result.findings.filter((finding) => finding.status !== "passed");
  const passed = result.findings.filter((finding) => finding.status === "passed");
  const heat = result.heat && { output: result.heat[0], maps: result.heat[1] };
  const maps = result.heat === 0 ? h("p", { class: "quiet" }, "This page holds the maps of the first red results only; report.json holds this one, too.") : heat ? h("div", { class: "pictures" }, h("h3", {}, `Wrong cells of ${heat.output}`), h("div", { class: "row" }, heat.maps.map((map) => heatMap(map, heat.output))), heatLegend(heat.maps, heat.output)) : null;
  const figures = passed.filter((finding) => finding.measured != null || finding.hint || finding.where);
  return h("div", { class: "detail" },
    result.reason ? h("p", { class: "reason" }, result.reason) : null,
    told.map(findingCard), result.red ? batch(result) : null, maps,
    passed.length ? h("details", {}, h("summary", {}, `${counted(passed.length, "finding")} passed: ${[...new Set(passed.map((finding) => finding.check))].join(", ")}`),
      figures.length ? grid(["check", "measured", "limit", "measured/limit", "where", "says"], figures.map((finding) => [finding.check, figure(finding.measured), figure(finding.limit), figure(finding.ratio), finding.where, finding.hint]), ["measured", "limit", "measured/limit"]) : h("p", { class: "quiet" }, "All of them exact.")) : null,
    command("again", result.repro),
    result.red && result.evidence !== "compiled" ? command("why", `m3check explain --arch ${quoted(result.arch)} --kernels ${quoted(result.provider)} ${quoted(result.case)}`) : null,
    h("dl", { class: "axes" }, [["kernel", result.kernel], ...DATA.axes.map((name, place) => [name, result.axes[place]]),
      ...(result.sums ? [["summed by", result.sums[0]], ...(result.sums[1] === null ? [] : [["effective bits", figure(result.sums[1])]])] : [])]
      .filter(([, value]) => value !== null && value !== undefined).map(([name, value]) => h("div", {}, h("dt", {}, name), " ", h("dd", {}, String(value))))));
}

function findingCard(finding) {
  const against = finding.measured == null ? null : h("span", { class: "m" }, `${figure(finding.measured)} against a limit of ${figure(finding.limit)}${finding.ratio !== null && finding.limit ? ` (${figure(finding.ratio)} times)` : ""}`);
  return h("div", { class: `finding ${finding.status}` }, h("p", {}, word(finding.status), " ", h("b", {}, finding.check), " ", against),
    finding.where ? h("p", {}, h("span", { class: "name" }, "where"), finding.where) : null, finding.hint ? h("p", {}, h("span", { class: "name" }, "says"), finding.hint) : null);
}

const quoted = (text) => (/^[\w=.:,/+@%~-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`);

function command(name, text) {
  const copy = h("button", { type: "button", onclick: async () => {
    try { await navigator.clipboard.writeText(text); copy.replaceChildren("copied"); } catch { getSelection().selectAllChildren(code); copy.replaceChildren("selected"); }
  } }, "copy");
  const code = h("code", {}, text);
  return h("div", { class: "command" }, h("span", { class: "name" }, name), code, copy);
}
