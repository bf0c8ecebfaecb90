// The top of the page: verdict and evidence, what is red by cause, the records side by side.

const EVIDENCE = {
  device: (arch, machine) => `Ran on ${arch} hardware (${machine}).`,
  interpreted: (arch, machine) =>
    `Triton's interpreter ran the kernels on a CPU (${machine}): what ${arch}'s compiler and matrix units do was not seen.`,
  compiled: (arch) => `Cross-compiled for ${arch} and not run.`,
};
const colour = (record) => (record.code === 0 ? "green" : record.code === 1 ? "red" : "doubtful");

function head() {
  const [first] = RECORDS;
  const red = RECORDS.filter((record) => record.code === 1).length;
  const title = SEVERAL
    ? h("h1", {}, counted(RECORDS.length, "record"), red ? [" ", h("span", { class: "verdict red" }, `${red} RED`)] : "")
    : h("h1", {}, h("span", { class: `verdict ${colour(first)}` }, first.verdict), " ", first.arch);
  const theme = button("", nextTheme, { id: "theme" });
  const sections = ["kernels", "results", "power", "environment"].filter(sectionOf);
  const jumps = sections.map((id) => button(id, () => jump(id), { class: "link" }));
  byId("head").append(
    h("nav", { class: "top", "aria-label": "Sections" }, h("span", { class: "brand" }, "m3check"), jumps, theme),
    title,
    SEVERAL ? recordsTable() : recordFacts(first),
  );
}

const sectionOf = (id) => document.querySelector(`#${id}, [data-section="${id}"]`);

// To a section, opened where it can be closed. (Addresses hold filters, so that these are no links.)
function jump(id) {
  const section = sectionOf(id);
  if (section instanceof HTMLDetailsElement) section.open = true;
  section.scrollIntoView({ block: "start" });
  (section.querySelector("summary") ?? section).focus({ preventScroll: true });
}

function recordFacts(record) {
  const kinds = record.evidence.map(([kind]) => kind);
  const missing = !kinds.length
    ? "No result at all."
    : kinds.includes("device")
      ? ""
      : `Nothing here ran on ${record.arch} hardware.`;
  const listItems = record.breaches.map((sentence) => h("li", {}, sentence));
  return h(
    "div",
    {},
    h("p", { class: "lead" }, `Exit ${record.code}: ${record.reason}.`),
    record.breaches.length ? h("ul", { class: "breaches" }, listItems) : null,
    quiet(
      missing ? h("strong", {}, missing, " ") : "",
      record.evidence.map(([kind, machine]) => [word(kind), " ", EVIDENCE[kind]?.(record.arch, machine) ?? "", " "]),
      missing && record.why ? `Why: ${record.why}. ` : "",
      record.date ? h("span", { class: "m" }, record.date.replace("T", " ").replace("+00:00", " UTC")) : "",
    ),
  );
}

function recordsTable() {
  const breached = ({ length }) => (length === 0 ? "" : length === 1 ? " (1 breach)" : ` (${length} breaches)`);
  const rows = RECORDS.map((record) => [
    button(record.name, () => choose({ arch: record.name }), { class: "link" }),
    h("span", { class: `verdict small ${colour(record)}` }, record.verdict),
    record.evidence.map(([kind]) => [word(kind), " "]),
    record.evidence[0]?.[1] ?? "–",
    `${record.code}: ${record.reason}${breached(record.breaches)}`,
    record.date.slice(0, 16).replace("T", " "),
  ]);
  const silent = RECORDS.filter((record) => !record.evidence.some(([kind]) => kind === "device")).map(
    (record) => record.name,
  );
  return h(
    "div",
    {},
    silent.length ? h("p", { class: "lead" }, `Nothing ran on the hardware of ${silent.join(", ")}.`) : null,
    grid(["record", "verdict", "evidence", "machine", "exit", "date"], rows),
  );
}

const THEMES = { "": "follows the system", light: "light", dark: "dark" };

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  byId("theme").replaceChildren(`Theme: ${THEMES[name]}`);
}

function nextTheme() {
  const names = Object.keys(THEMES);
  const name = names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length];
  setTheme(name);
  try {
    localStorage.setItem("m3check-theme", name);
  } catch {
    /* a file may have no storage */
  }
}

function storedTheme(asked) {
  let stored = "";
  try {
    stored = localStorage.getItem("m3check-theme") ?? "";
  } catch {
    /* likewise */
  }
  const name = asked ?? stored;
  return name in THEMES ? name : "";
}

// --- What is red, by cause.

function causes() {
  const red = RESULTS.filter((result) => result.red);
  if (!red.length) return;
  const groups = grouped(red, (result) => [result.op, result.provider, result.recordName, result.red, cause(result)]);
  groups.sort((a, b) => b.items.length - a.items.length);
  const rows = groups.map(({ key: [op, provider, name, status, check], items: [first, ...others] }) => {
    const [finding] = telling(first);
    const show = () => choose({ op, provider, arch: SEVERAL ? name : "", cause: check });
    return [
      COUNT.format(others.length + 1),
      word(status),
      ...(SEVERAL ? [name] : []),
      op,
      provider,
      check,
      h("span", { class: "clip" }, finding ? finding.hint || finding.where : first.reason),
      button("show", show, { class: "link", "aria-label": `Show ${op}, ${provider}, ${check}` }),
    ];
  });
  byId("causes").append(
    h("h2", { id: "causes-title" }, `Red (${COUNT.format(red.length)})`),
    grid(["results", "status", ...(SEVERAL ? ["record"] : []), "op", "provider", "check", "the first one says", ""], rows, [
      "results",
    ]),
  );
}

// --- Several records: op × provider × record, what it is worth and by what evidence.

function matrix() {
  const rows = grouped(RESULTS, (result) => [result.op, result.provider]);
  rows.sort((a, b) => DATA.ops.indexOf(a.key[0]) - DATA.ops.indexOf(b.key[0]));
  const cell = (op, provider, record, items) => {
    const ran = items.filter((result) => result.status !== "skipped");
    const red = ran.filter((result) => result.red).length;
    if (!ran.length) return h("span", { class: "quiet" }, items.length ? `skipped ${items.length}` : "–");
    const kinds = [...new Set(ran.map((result) => result.evidence))];
    const told = h(
      "span",
      {},
      red ? alarming(`${red} red of `) : "",
      COUNT.format(ran.length),
      " ",
      h("span", { class: "quiet" }, kinds.join(", ")),
    );
    return button([shareBar(ran), told], () => choose({ op, provider, arch: record.name }), {
      class: "cell",
      "aria-label": `${op}, ${provider}, ${record.name}: ${red} red of ${ran.length}, ${kinds.join(", ")}`,
    });
  };
  byId("matrix").append(
    h("h2", { id: "matrix-title" }, "Op × provider × record"),
    grid(
      ["op", "provider", ...RECORDS.map((record) => record.name)],
      rows.map(({ key: [op, provider], items }) => [
        op,
        provider,
        ...RECORDS.map((record, i) =>
          cell(
            op,
            provider,
            record,
            items.filter(({ record: place }) => place === i),
          ),
        ),
      ]),
    ),
  );
}
