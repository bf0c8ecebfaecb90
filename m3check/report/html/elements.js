// What everything is made of: elements, figures, tables. Texts are set as text, never as markup.

const byId = (id) => document.getElementById(id);

function h(name, words = {}, ...children) {
  return furnished(document.createElement(name), words, children);
}

function svg(name, words = {}, ...children) {
  return furnished(document.createElementNS("http://www.w3.org/2000/svg", name), words, children);
}

function furnished(element, words, children) {
  for (const [name, value] of Object.entries(words)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

const button = (text, onclick, words = {}) => h("button", { type: "button", ...words, onclick }, text);
const quiet = (...children) => h("p", { class: "quiet" }, children);
const alarming = (text) => h("b", { class: "redtext" }, text);

// A drawing that is read out as one sentence.
const picture = (told, width, height, words, ...children) =>
  svg("svg", { ...words, viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": told }, children);

// Wider than a window may be: scrolls by itself, and from a keyboard.
const scrolled = (name, child) =>
  h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": name }, child);

const COUNT = new Intl.NumberFormat("en-US");
const counted = (n, thing) => `${COUNT.format(n)} ${thing}${n === 1 ? "" : "s"}`;

function figure(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "string") value = number(value);
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "nan" : value > 0 ? "inf" : "-inf";
  if (Number.isInteger(value) && Math.abs(value) < 1e7) return COUNT.format(value);
  return Number(value.toPrecision(3)).toString();
}

function grid(headers, rows, right = []) {
  const side = (i) => (right.includes(headers[i]) ? "right" : null);
  return h(
    "div",
    { class: "scroll" },
    h(
      "table",
      {},
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          headers.map((text, i) => h("th", { scope: "col", class: side(i) }, text)),
        ),
      ),
      h(
        "tbody",
        {},
        rows.map((row) =>
          h(
            "tr",
            {},
            row.map((cell, i) => h("td", { class: side(i) }, cell)),
          ),
        ),
      ),
    ),
  );
}

const word = (text, kind = text) => h("span", { class: `word ${/^[a-z]+$/.test(kind) ? kind : ""}` }, text);
