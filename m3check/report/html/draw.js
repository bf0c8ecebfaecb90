// How things look: elements, figures, and the three kinds of picture. Texts are set as text, never as markup.

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
  return h("div", { class: "scroll" }, h("table", {},
    h("thead", {}, h("tr", {}, headers.map((text, i) => h("th", { scope: "col", class: side(i) }, text)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell, i) => h("td", { class: side(i) }, cell)))))));
}

const word = (text, kind = text) => h("span", { class: `word ${/^[a-z]+$/.test(kind) ? kind : ""}` }, text);

// --- The distribution of measured/limit: octaves from 2^-10 to 2^6, the limit a line, heights by the square root.

const LOW = -10, HIGH = 6, BINS = (HIGH - LOW) * 2, BIN = 6, HEIGHT = 30;
const LIMIT_AT = -LOW * 2 * BIN;

function bin(ratio) {
  if (!(ratio > 0)) return Number.isNaN(ratio) ? BINS - 1 : 0;
  const place = Math.floor((Math.log2(ratio) - LOW) * 2);
  return Math.max(0, Math.min(BINS - 1, ratio > 1 ? Math.max(place, -LOW * 2) : Math.min(place, -LOW * 2 - 1)));
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

function histogram(ratios) {
  if (!ratios.length) return h("span", { class: "quiet" }, "exact checks only");
  const counts = new Array(BINS).fill(0);
  for (const ratio of ratios) counts[bin(ratio)]++;
  const top = Math.sqrt(Math.max(...counts));
  const over = ratios.filter((ratio) => !(ratio <= 1)).length;
  const told = `${counted(ratios.length, "figure")} of measured/limit: median ${figure(median(ratios))}, ` +
    `largest ${figure(ratios.reduce((a, b) => (b > a || Number.isNaN(b) ? b : a)))}${over ? `, ${over} beyond the limit` : ""}`;
  const bars = counts.map((count, i) => {
    if (!count) return null;
    const tall = Math.max(2, (Math.sqrt(count) / top) * (HEIGHT - 4));
    const from = i === 0 ? "up to" : `${figure(2 ** (LOW + i / 2))} to`;
    const to = i === BINS - 1 ? "more" : figure(2 ** (LOW + (i + 1) / 2));
    return svg("rect", { class: i * BIN >= LIMIT_AT ? "over" : "within", x: i * BIN, y: HEIGHT - tall, width: BIN - 1, height: tall },
      svg("title", {}, `${from} ${to}: ${COUNT.format(count)}`));
  });
  return svg("svg", { class: "histogram", viewBox: `0 0 ${BINS * BIN} ${HEIGHT + 1}`, width: BINS * BIN, height: HEIGHT + 1, role: "img", "aria-label": told },
    svg("title", {}, told), svg("line", { class: "floor", x1: 0, x2: BINS * BIN, y1: HEIGHT + 0.5, y2: HEIGHT + 0.5 }),
    svg("line", { class: "limit", x1: LIMIT_AT - 0.5, x2: LIMIT_AT - 0.5, y1: 0, y2: HEIGHT }), bars);
}

function histogramScale() {
  const mark = (power, text, anchor = "middle") =>
    svg("text", { x: (power - LOW) * 2 * BIN, y: 9, "text-anchor": anchor }, text);
  return svg("svg", { class: "scale", viewBox: `0 0 ${BINS * BIN} 11`, width: BINS * BIN, height: 11, "aria-hidden": "true" },
    mark(LOW, "2⁻¹⁰", "start"), mark(-5, "2⁻⁵"), mark(0, "limit"), mark(HIGH, "2⁶ and more", "end"));
}

// --- The share of each status, in one bar.

const SHARES = ["red", "known", "doubtful", "passed", "skipped"];

function share(result) {
  if (result.red) return "red";
  if (result.status === "passed" || result.status === "skipped" || result.status === "known") return result.status;
  return "doubtful";
}

function shareBar(results) {
  const told = SHARES.map((kind) => [kind, results.filter((result) => share(result) === kind).length]).filter(([, n]) => n);
  return h("span", { class: "share", role: "img", "aria-label": told.map(([kind, n]) => `${n} ${kind}`).join(", "), title: told.map(([kind, n]) => `${n} ${kind}`).join(", ") },
    told.map(([kind, n]) => {
      const part = h("span", { class: kind });
      part.style.flexGrow = n;
      return part;
    }));
}

// --- Heat maps: characters of the record as cells.

const CELL = 11, LEFT = 74;
const MARKS = { "=": ["chosen", "chosen rightly"], "-": ["lost", "left out"], "+": ["extra", "taken instead"], "±": ["both", "left out and taken"], "²": ["both", "listed twice"] };

function cellClass(character) {
  if (character in MARKS) return MARKS[character][0];
  if (character === "N") return "none";
  const place = DATA.shades.indexOf(character);
  return place > 0 ? `heat-${place}` : null;
}

function meaning(character, output) {
  if (character in MARKS) return MARKS[character][1];
  if (character === "N") return output === "ids" ? "a wrong list" : "not finite, or not exact where it must be";
  const place = DATA.shades.indexOf(character);
  return place === DATA.shades.length - 1 ? "more than 512 times the limit" : place > 0 ? `${2 ** (place - 1)} to ${2 ** place} times the limit` : "within the limit";
}

function heatMap(map, output) {
  const wide = Math.max(1, ...map.cells.map((line) => [...line].length)), tall = map.cells.length;
  const cells = [];
  map.cells.forEach((line, y) => [...line].forEach((character, x) => {
    const kind = cellClass(character);
    if (!kind) return;
    const columns = map.step > 1 ? `${map.columns}s ${x * map.step} to ${(x + 1) * map.step - 1}` : `${map.columns} ${x}`;
    cells.push(svg("rect", { class: kind, x: LEFT + x * CELL, y: y * CELL, width: CELL - 1, height: CELL - 1 },
      svg("title", {}, `${map.rows} ${map.labels[y]}, ${columns}: ${meaning(character, output)}`)));
  }));
  const height = tall * CELL + 13, width = LEFT + wide * CELL + 8;
  const per = map.count > 1 ? `, ${map.count} rows a line` : "";
  const step = map.step > 1 ? `, ${map.step} a cell` : "";
  const caption = `${map.of ? `Request, token ${map.of}: ` : "All rows: "}${map.rows} × ${map.columns}${per}${step}`;
  const ticks = [0, ...(wide > 16 ? [8, 16, 24, 32, 40, 48, 56].filter((x) => x < wide - 4) : []), ...(wide > 1 ? [wide - 1] : [])];
  return h("figure", { class: "heat" }, h("figcaption", {}, caption), h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": caption },
    svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `${caption}; ${counted(cells.length, "cell")} marked` },
      svg("rect", { class: "ground", x: LEFT, y: 0, width: wide * CELL - 1, height: tall * CELL - 1 }), cells,
      map.labels.map((label, y) => svg("text", { x: LEFT - 6, y: y * CELL + 8.5, "text-anchor": "end" }, label)),
      ticks.map((x) => svg("text", { x: LEFT + x * CELL + CELL / 2, y: tall * CELL + 10, "text-anchor": "middle" }, x * map.step)))));
}

// The shades as one row of doublings, and each mark with its words.
function heatLegend(maps, output) {
  const used = new Set(maps.flatMap((map) => map.cells.flatMap((line) => [...line])));
  const key = (character) => svg("svg", { width: CELL, height: CELL, class: "key", "aria-hidden": "true" }, svg("rect", { class: cellClass(character), width: CELL - 1, height: CELL - 1 }));
  const shades = [...DATA.shades].slice(1);
  const ramp = shades.some((character) => used.has(character))
    ? h("span", {}, "times the limit, from", shades.map((character, i) => [" ", key(character), ` ${2 ** i}`])) : null;
  const marks = ["N", ...Object.keys(MARKS)].filter((character) => used.has(character));
  return h("p", { class: "legend" }, ramp, marks.map((character) => h("span", {}, key(character), ` ${meaning(character, output)}`)));
}

// --- The batch of a case, from its id: a bar for each request, its queries at the end, and where the findings point.

const lengths = (text) => (text ?? "").split("+").flatMap((part) => {
  const [length, times = 1] = part.split("x").map(Number);
  return new Array(Math.min(times || 1, 4096)).fill(length);
});

function batch(result) {
  const id = Object.fromEntries(result.case.split("~")[0].split("/").slice(1).join("/").split(",").map((part) => part.split("=")));
  const kv = lengths(id.kv), q = lengths(id.q);
  const places = telling(result).map((finding) => [finding, /request (\d+)(?:.*?position (-?\d+))?/.exec(finding.where)]).filter(([, at]) => at);
  if (!places.length || !kv.length || ![...kv, ...q].every(Number.isFinite)) return null;
  const pointed = new Set(places.map(([, at]) => Number(at[1])));
  const shown = [...kv.keys()].filter((i) => kv.length <= 16 || pointed.has(i)).slice(0, 16);
  const most = Math.max(...kv, 1), wide = 520, line = 15;
  const x = (token) => LEFT + (Math.max(0, token) / most) * wide;
  const bars = shown.map((request, y) => {
    const from = x(kv[request] - (q[request] ?? 0)), to = x(kv[request]);
    return svg("g", { transform: `translate(0 ${y * line})` },
      svg("text", { x: LEFT - 6, y: 10, "text-anchor": "end" }, `request ${request}`),
      svg("rect", { class: "context", x: LEFT, y: 3, width: Math.max(1, to - LEFT), height: 7 }, svg("title", {}, `request ${request}: ${figure(kv[request])} tokens, ${q[request] ?? "?"} of them queries`)),
      svg("rect", { class: "queries", x: Math.min(from, to - 1), y: 3, width: Math.max(1, to - from), height: 7 }),
      svg("text", { x: to + 16, y: 10 }, figure(kv[request])),
      places.filter(([, at]) => Number(at[1]) === request).map(([finding, at]) =>
        svg("path", { class: "place", d: "M0 1 l5 5 l-5 5 l-5 -5 z", transform: `translate(${x(Math.min(Number(at[2] ?? kv[request]), kv[request]))} 0.5)` }, svg("title", {}, `${finding.check}: ${finding.where}`))));
  });
  const height = shown.length * line + 2, width = LEFT + wide + 64;
  const caption = `The batch: context and, at its end, the queries of ${shown.length < kv.length ? `${shown.length} of ${kv.length} requests` : counted(kv.length, "request")}; where the findings point`;
  return h("figure", { class: "batch" }, h("figcaption", {}, caption, " ", svg("svg", { width: 11, height: 11, class: "key", "aria-hidden": "true" }, svg("path", { class: "place", d: "M5.5 0.5 l5 5 l-5 5 l-5 -5 z" }))),
    h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": caption }, svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `${caption}: ${places.map(([finding]) => finding.where).join("; ")}` }, bars)));
}
