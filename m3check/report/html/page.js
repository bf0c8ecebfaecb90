// The page: filters, what stands below the results, and what happens when somebody touches it.

// --- Filters.

const STATUSES = ["red", ...DATA.statuses.filter((status) => !(status in ASIDE)), ...Object.keys(ASIDE)];

function filters() {
  const search = h("input", { type: "search", id: "q", placeholder: "words, axis=value, -word", "aria-label": "Free text: every word must be there, none with a minus before it", oninput: (event) => choose({ q: event.target.value }, false) });
  const selects = Object.entries(CHOICES).map(([name, choice]) => {
    const values = grouped(RESULTS.filter(choice.among ?? (() => true)), choice.of).map(({ key, items }) => [key, items.length]);
    if (!values.length) return null;
    if (name === "op") values.sort((a, b) => DATA.ops.indexOf(a[0]) - DATA.ops.indexOf(b[0]));
    const select = h("select", { id: `choice-${name}`, "data-choice": name, onchange: (event) => choose({ [name]: event.target.value }, false) },
      h("option", { value: "" }, `all (${values.length})`), values.map(([value, n]) => h("option", { value }, `${value || "–"} (${COUNT.format(n)})`)));
    return h("label", {}, h("span", {}, choice.label), select);
  });
  const order = h("select", { id: "order", onchange: (event) => choose({ order: event.target.value }, false) }, Object.keys(ORDERS).map((name) => h("option", { value: name }, name)));
  byId("filters").append(
    h("div", { class: "chips", id: "chips", role: "group", "aria-label": "Status" }),
    h("div", { class: "choices" }, ...[h("label", { class: "wide" }, h("span", {}, "text"), search), selects, h("label", {}, h("span", {}, "order"), order),
      h("button", { type: "button", id: "clear", onclick: () => choose(null) }, "clear")].filter(Boolean)),
    h("p", { id: "told", class: "quiet", role: "status" }));
}

function chips(results) {
  const counts = STATUSES.map((status) => [status, results.filter((result) => hasStatus(result, status)).length]);
  const [[, red], ...others] = counts;  // where all red results have one status, one chip says it
  const shown = counts.filter(([status, n]) => state.status.has(status) || (n && !(status === "red" && others.some(([, m]) => m === red))));
  const focused = document.activeElement?.dataset?.status;
  byId("chips").replaceChildren(...shown.map(([status, n]) =>
    h("button", { type: "button", class: `chip ${status}`, "data-status": status, "aria-pressed": String(state.status.has(status)), onclick: () => toggle(status) }, `${status} `, h("b", {}, COUNT.format(n)))));
  if (focused) byId("chips").querySelector(`[data-status="${focused}"]`)?.focus();
}

function toggle(status) {
  const chosen = new Set(state.status);
  if (!chosen.delete(status)) chosen.add(status);
  choose({ status: chosen }, false);
}

// Changes some filters (null: forgets all), and puts them into the address, so that a link opens the same view.
function choose(changes, scroll = true) {
  if (changes === null) changes = { status: new Set(), q: "", order: "red first", ...Object.fromEntries(Object.keys(CHOICES).map((name) => [name, ""])) };
  Object.assign(state, changes);
  history.replaceState(null, "", `#${address()}`);
  refresh();
  if (scroll && changes.op) byId("results").scrollIntoView({ block: "start" });
}

// --- Below: power, production, notes, skips, environment.

function more() {
  const parts = [];
  for (const record of RECORDS) {
    const title = (text) => h("summary", {}, h("h2", {}, SEVERAL ? `${text}: ${record.name}` : text));
    if (record.power) parts.push(h("details", { open: !SEVERAL, "data-section": "power" }, title("Power"), power(record.power)));
    if (record.production.length) parts.push(h("details", { open: !SEVERAL }, title(`What production runs on ${record.arch}`),
      h("p", { class: "quiet" }, "An implementation that was not run here is a hole in this report: nothing in it is about that code."),
      grid(["vLLM", "op", "implementation", "when", "evidence"], record.production.map(([version, op, implementation, when, evidence, hole]) => [version, op, implementation, when, hole ? h("b", { class: "redtext" }, evidence) : evidence]))));
  }
  const noted = RESULTS.flatMap((result) => result.findings.filter((finding) => finding.status === "noted").map((finding) => ({ result, finding })));
  if (noted.length) parts.push(h("details", {}, h("summary", {}, h("h2", {}, `Noted (${COUNT.format(noted.length)})`)), h("p", { class: "quiet" }, "Breaks the contract where the provider promises nothing; red under --strict only."),
    grid(["times", "provider", "op", "check", "what", "first at"], grouped(noted, ({ result, finding }) => [result.provider, result.op, finding.check, finding.hint.replace(/; \d+ rows.*/, "")]).map(({ key, items }) => [COUNT.format(items.length), ...key, items[0].finding.where]), ["times"])));
  const skipped = RESULTS.filter((result) => result.status === "skipped");
  if (skipped.length) parts.push(h("details", {}, h("summary", {}, h("h2", {}, `Skipped (${COUNT.format(skipped.length)})`)),
    grid(["cases", "why", "ops", "providers"], grouped(skipped, (result) => result.reason).sort((a, b) => b.items.length - a.items.length).map(({ key, items }) => [COUNT.format(items.length), key, [...new Set(items.map((result) => result.op))].join(", "), [...new Set(items.map((result) => result.provider))].join(", ")]), ["cases"])));
  for (const record of RECORDS) parts.push(h("details", { open: !SEVERAL, "data-section": "environment" }, h("summary", {}, h("h2", {}, SEVERAL ? `Evidence and environment: ${record.name}` : "Evidence and environment")),
    SEVERAL ? recordFacts(record) : null, record.gate.length ? grid(["gate", ""], record.gate) : null, grid(["what", "value"], record.environment.map(([name, value]) => [name, h("span", { class: "m" }, value)])), command("made by", record.command)));
  byId("more").append(...parts);
}

function power({ cases, unlisted, defects }) {
  const rows = defects.map(([stage, words, seen, changed]) => {
    const bar = h("span", { class: "power", "aria-hidden": "true" }, h("span", { class: seen < changed ? "partly" : "" }));
    bar.firstChild.style.width = `${changed ? (seen / changed) * 100 : 0}%`;
    return [stage, words, COUNT.format(changed), COUNT.format(seen), bar, seen || !changed ? (changed ? `${Math.floor((seen / changed) * 100)} %` : "–") : h("b", { class: "redtext" }, "by no case")];
  });
  return h("div", {}, h("p", { class: "quiet" }, `Would a wrong answer have passed? Each defect is the reference on changed inputs, judged by the same checks on ${counted(cases, "case")} of this run. “Changed” counts the cases where it changes the right answer, “seen” those of them that would have been red; in the others it cannot be told from rounding.${unlisted ? ` ${counted(unlisted, "more case")} not in the table.` : ""}`),
    grid(["stage", "defect", "changed", "seen", "", "share"], rows, ["changed", "seen", "share"]));
}

// --- All of it.

function refresh() {
  const found = matching(), left = ofStatus(found);
  chips(found);
  for (const select of document.querySelectorAll("select[data-choice]")) select.value = state[select.dataset.choice];
  byId("order").value = state.order;
  if (byId("q").value !== state.q) byId("q").value = state.q;
  byId("clear").hidden = address() === "";
  byId("told").replaceChildren(left.length === RESULTS.length ? `All ${counted(RESULTS.length, "result")}` : `${COUNT.format(left.length)} of ${counted(RESULTS.length, "result")}`);
  kernels(left);
  results(left);
}

function start() {
  head();
  const asked = readState();
  setTheme(storedTheme(asked.get("theme")));
  byId("main").hidden = false;
  causes();
  if (SEVERAL) matrix();
  filters();
  more();
  refresh();
  addEventListener("hashchange", () => { readState(); refresh(); });
  addEventListener("keydown", (event) => {
    const typing = /^(input|select|textarea)$/i.test(event.target.tagName);
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) { event.preventDefault(); byId("q").focus(); }
    if (event.key === "Escape" && event.target.id === "q") choose({ q: "" }, false);
  });
  document.querySelector("[data-skip]").addEventListener("click", (event) => { event.preventDefault(); jump("results"); });
}

start();
