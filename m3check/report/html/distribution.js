// How many of each status, and how near to their limits: two small charts.

// --- The distribution of measured/limit: octaves from 2^-10 to 2^6, the limit a line, heights by the square root.

const LOW = -10,
  HIGH = 6,
  BINS = (HIGH - LOW) * 2,
  BIN = 6,
  HEIGHT = 30;
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
  const told =
    `${counted(ratios.length, "figure")} of measured/limit: median ${figure(median(ratios))}, ` +
    `largest ${figure(ratios.reduce((a, b) => (b > a || Number.isNaN(b) ? b : a)))}${over ? `, ${over} beyond the limit` : ""}`;
  const bars = counts.map((count, i) => {
    if (!count) return null;
    const tall = Math.max(2, (Math.sqrt(count) / top) * (HEIGHT - 4));
    const from = i === 0 ? "up to" : `${figure(2 ** (LOW + i / 2))} to`;
    const to = i === BINS - 1 ? "more" : figure(2 ** (LOW + (i + 1) / 2));
    return svg(
      "rect",
      { class: i * BIN >= LIMIT_AT ? "over" : "within", x: i * BIN, y: HEIGHT - tall, width: BIN - 1, height: tall },
      svg("title", {}, `${from} ${to}: ${COUNT.format(count)}`),
    );
  });
  return picture(
    told,
    BINS * BIN,
    HEIGHT + 1,
    { class: "histogram" },
    svg("title", {}, told),
    svg("line", { class: "floor", x1: 0, x2: BINS * BIN, y1: HEIGHT + 0.5, y2: HEIGHT + 0.5 }),
    svg("line", { class: "limit", x1: LIMIT_AT - 0.5, x2: LIMIT_AT - 0.5, y1: 0, y2: HEIGHT }),
    bars,
  );
}

function histogramScale() {
  const mark = (power, text, anchor = "middle") =>
    svg("text", { x: (power - LOW) * 2 * BIN, y: 9, "text-anchor": anchor }, text);
  return svg(
    "svg",
    { class: "scale", viewBox: `0 0 ${BINS * BIN} 11`, width: BINS * BIN, height: 11, "aria-hidden": "true" },
    mark(LOW, "2⁻¹⁰", "start"),
    mark(-5, "2⁻⁵"),
    mark(0, "limit"),
    mark(HIGH, "2⁶ and more", "end"),
  );
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
  return h(
    "span",
    {
      class: "share",
      role: "img",
      "aria-label": told.map(([kind, n]) => `${n} ${kind}`).join(", "),
      title: told.map(([kind, n]) => `${n} ${kind}`).join(", "),
    },
    told.map(([kind, n]) => {
      const part = h("span", { class: kind });
      part.style.flexGrow = n;
      return part;
    }),
  );
}
