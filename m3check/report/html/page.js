// All of it, and what happens when somebody touches it.

function refresh() {
  const found = matching();
  const left = ofStatus(found);
  chips(found);
  for (const select of document.querySelectorAll("select[data-choice]")) select.value = state[select.dataset.choice];
  byId("order").value = state.order;
  if (byId("q").value !== state.q) byId("q").value = state.q;
  byId("clear").hidden = address() === "";
  byId("told").replaceChildren(
    left.length === RESULTS.length
      ? `All ${counted(RESULTS.length, "result")}`
      : `${COUNT.format(left.length)} of ${counted(RESULTS.length, "result")}`,
  );
  kernels(left);
  results(left);
}

function start() {
  const asked = readState();
  byId("main").hidden = false;
  causes();
  if (SEVERAL) matrix();
  filters();
  more();
  head(); // last, since it leads to the others
  setTheme(storedTheme(asked.get("theme")));
  refresh();
  addEventListener("hashchange", () => {
    readState();
    refresh();
  });
  addEventListener("keydown", (event) => {
    const typing = /^(input|select|textarea)$/i.test(event.target.tagName);
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      byId("q").focus();
    }
    if (event.key === "Escape" && event.target.id === "q") choose({ q: "" }, false);
  });
  document.querySelector("[data-skip]").addEventListener("click", (event) => {
    event.preventDefault();
    jump("results");
  });
}

start();
