// Results: a line each, in full when opened; drawn as far as somebody wants to see.

const OPENED = 10; // red results at the top of the list that are open from the beginning
const [FIRST, FURTHER] = [60, 200]; // results that are drawn at first, and whenever more are asked for
const shownOf = new Map(); // result index: whether it is open, where somebody said so
let listed = [];
let drawn = 0;

function results(found) {
  listed = [...found].sort(ORDERS[state.order]);
  drawn = 0;
  const list = h("ol", { id: "list" });
  byId("results").replaceChildren(
    h("h2", { id: "results-title" }, "Results"),
    list,
    h(
      "p",
      { id: "further" },
      button("", () => further(FURTHER)),
      " ",
      button("all of them", () => further(listed.length), { class: "link" }),
    ),
  );
  if (!listed.length) list.replaceWith(quiet(RESULTS.length ? "No result fits these filters." : "There is no result."));
  further(FIRST);
}

function further(count) {
  const list = byId("list");
  const rest = byId("further");
  if (list) list.append(...listed.slice(drawn, drawn + count).map((result, i) => line(result, drawn + i)));
  drawn = Math.min(drawn + count, listed.length);
  rest.hidden = drawn >= listed.length;
  rest.firstChild.replaceChildren(
    `Show ${Math.min(FURTHER, listed.length - drawn)} more of ${COUNT.format(listed.length - drawn)}`,
  );
}

function line(result, place) {
  const item = h("li", { class: result.red ? "red" : share(result) });
  const open = shownOf.get(result.index) ?? (result.red !== "" && place < OPENED);
  const evidence = result.evidence === "device" ? "" : ` · ${result.evidence}`;
  const parts = [
    h(
      "span",
      { class: "status" },
      word(result.red || result.status, result.red ? "failed" : result.status),
      result.noted && !result.red ? word("noted") : "",
    ),
    h("span", { class: "case m" }, result.case),
    h("span", { class: "who" }, SEVERAL ? `${result.recordName} · ` : "", result.provider, evidence),
    h("span", { class: "right", title: "the largest measured/limit" }, result.worst === null ? "" : figure(result.worst)),
    h(
      "span",
      { class: "right quiet", title: "wall clock" },
      result.status === "skipped" ? "" : `${figure(result.seconds)} s`,
    ),
  ];
  const head = button(parts, () => flip(), { class: "line", "aria-expanded": String(open) });
  const flip = (to = head.getAttribute("aria-expanded") !== "true") => {
    head.setAttribute("aria-expanded", String(to));
    shownOf.set(result.index, to);
    item.querySelector(".detail")?.remove();
    if (to) item.append(detail(result));
  };
  item.append(head);
  if (open) item.append(detail(result));
  return item;
}

function detail(result) {
  const { arch, provider } = result;
  const explain = `m3check explain --arch ${quoted(arch)} --kernels ${quoted(provider)} ${quoted(result.case)}`;
  return h(
    "div",
    { class: "detail" },
    result.reason ? h("p", { class: "reason" }, result.reason) : null,
    result.findings.filter((finding) => finding.status !== "passed").map(findingCard),
    result.red ? batch(result) : null,
    maps(result),
    passedFindings(result),
    command("again", result.repro),
    result.red && result.evidence !== "compiled" ? command("why", explain) : null,
    axes(result),
  );
}

function maps({ heat }) {
  if (heat === 0) return quiet("This page holds the maps of the first red results only; report.json holds this one, too.");
  if (!heat) return null;
  const [output, drawn] = heat;
  const pictures = drawn.map((map) => heatMap(map, output));
  const title = h("h3", {}, `Wrong cells of ${output}`);
  return h("div", { class: "pictures" }, title, h("div", { class: "row" }, pictures), heatLegend(drawn, output));
}

function passedFindings(result) {
  const passed = result.findings.filter((finding) => finding.status === "passed");
  if (!passed.length) return null;
  const names = [...new Set(passed.map((finding) => finding.check))].join(", ");
  const rows = passed
    .filter((finding) => finding.measured != null || finding.hint || finding.where)
    .map((finding) => [
      finding.check,
      ...[finding.measured, finding.limit, finding.ratio].map(figure),
      finding.where,
      finding.hint,
    ]);
  const figures = ["measured", "limit", "measured/limit"];
  return h(
    "details",
    {},
    h("summary", {}, `${counted(passed.length, "finding")} passed: ${names}`),
    rows.length ? grid(["check", ...figures, "where", "says"], rows, figures) : quiet("All of them exact."),
  );
}

function axes(result) {
  const [by, bits] = result.sums ?? [];
  const rows = [["kernel", result.kernel], ...DATA.axes.map((name, place) => [name, result.axes[place]])];
  rows.push(["summed by", by], ["effective bits", bits]);
  const told = rows.filter(([, value]) => value !== null && value !== undefined);
  return h(
    "dl",
    { class: "axes" },
    told.map(([name, value]) => h("div", {}, h("dt", {}, name), " ", h("dd", {}, String(value)))),
  );
}

function findingCard({ check, status, ratio, measured, limit, where, hint }) {
  const times = ratio !== null && limit ? ` (${figure(ratio)} times)` : "";
  const against = measured == null ? "" : `${figure(measured)} against a limit of ${figure(limit)}${times}`;
  const row = (name, text) => (text ? h("p", {}, h("span", { class: "name" }, name), text) : null);
  return h(
    "div",
    { class: `finding ${status}` },
    h("p", {}, word(status), " ", h("b", {}, check), " ", h("span", { class: "m" }, against)),
    row("where", where),
    row("says", hint),
  );
}

const quoted = (text) => (/^[\w=.:,/+@%~-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`);

function command(name, text) {
  const code = h("code", {}, text);
  const copy = button("copy", async () => {
    try {
      await navigator.clipboard.writeText(text);
      copy.replaceChildren("copied");
    } catch {
      getSelection().selectAllChildren(code); // a file may have no clipboard
      copy.replaceChildren("selected");
    }
  });
  return h("div", { class: "command" }, h("span", { class: "name" }, name), code, copy);
}
