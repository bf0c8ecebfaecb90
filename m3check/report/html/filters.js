// Filters, and the address that holds them.

const STATUSES = ["red", ...DATA.statuses.filter((status) => !(status in ASIDE)), ...Object.keys(ASIDE)];

function filters() {
  const search = h("input", {
    type: "search",
    id: "q",
    placeholder: "words, axis=value, -word",
    "aria-label": "Free text: every word must be there, none with a minus before it",
    oninput: (event) => choose({ q: event.target.value }, false),
  });
  const selects = Object.entries(CHOICES).map(([name, choice]) => {
    const values = grouped(RESULTS.filter(choice.among ?? (() => true)), choice.of).map(({ key, items }) => [
      key,
      items.length,
    ]);
    if (!values.length) return null;
    if (name === "op") values.sort((a, b) => DATA.ops.indexOf(a[0]) - DATA.ops.indexOf(b[0]));
    const select = h(
      "select",
      { id: `choice-${name}`, "data-choice": name, onchange: (event) => choose({ [name]: event.target.value }, false) },
      h("option", { value: "" }, `all (${values.length})`),
      values.map(([value, n]) => h("option", { value }, `${value || "–"} (${COUNT.format(n)})`)),
    );
    return h("label", {}, h("span", {}, choice.label), select);
  });
  const order = h(
    "select",
    { id: "order", onchange: (event) => choose({ order: event.target.value }, false) },
    Object.keys(ORDERS).map((name) => h("option", { value: name }, name)),
  );
  byId("filters").append(
    h("div", { class: "chips", id: "chips", role: "group", "aria-label": "Status" }),
    h(
      "div",
      { class: "choices" },
      ...[
        h("label", { class: "wide" }, h("span", {}, "text"), search),
        selects,
        h("label", {}, h("span", {}, "order"), order),
        button("clear", () => choose(null), { id: "clear" }),
      ].filter(Boolean),
    ),
    h("p", { id: "told", class: "quiet", role: "status" }),
  );
}

function chips(results) {
  const counts = STATUSES.map((status) => [status, results.filter((result) => hasStatus(result, status)).length]);
  const [[, red], ...others] = counts; // where all red results have one status, one chip says it
  const shown = counts.filter(
    ([status, n]) => state.status.has(status) || (n && !(status === "red" && others.some(([, m]) => m === red))),
  );
  const focused = document.activeElement?.dataset?.status;
  byId("chips").replaceChildren(
    ...shown.map(([status, n]) =>
      button([`${status} `, h("b", {}, COUNT.format(n))], () => toggle(status), {
        class: `chip ${status}`,
        "data-status": status,
        "aria-pressed": String(state.status.has(status)),
      }),
    ),
  );
  if (focused) byId("chips").querySelector(`[data-status="${focused}"]`)?.focus();
}

function toggle(status) {
  const chosen = new Set(state.status);
  if (!chosen.delete(status)) chosen.add(status);
  choose({ status: chosen }, false);
}

// Changes some filters (null: forgets all), and puts them into the address, so that a link opens the same view.
function choose(changes, scroll = true) {
  Object.assign(state, changes ?? unfiltered());
  history.replaceState(null, "", `#${address()}`);
  refresh();
  if (scroll && changes?.op) byId("results").scrollIntoView({ block: "start" });
}
