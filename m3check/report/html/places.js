// Where a result is wrong: maps of its cells, and the place in its batch.

// --- Heat maps: characters of the record as cells.

const CELL = 11; // pixels of a cell
const LEFT = 74; // of the labels before it
const MARKS = {
  "=": ["chosen", "chosen rightly"],
  "-": ["lost", "left out"],
  "+": ["extra", "taken instead"],
  "±": ["both", "left out and taken"],
  "²": ["both", "listed twice"],
};

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
  return place === DATA.shades.length - 1
    ? "more than 512 times the limit"
    : place > 0
      ? `${2 ** (place - 1)} to ${2 ** place} times the limit`
      : "within the limit";
}

// A picture under its caption, which may show a key.
const framed = (kind, caption, key, drawing) =>
  h("figure", { class: kind }, h("figcaption", {}, caption, key), scrolled(caption, drawing));

function heatMap(map, output) {
  const wide = Math.max(1, ...map.cells.map((line) => [...line].length));
  const tall = map.cells.length;
  const cells = [];
  map.cells.forEach((line, y) =>
    [...line].forEach((character, x) => {
      const kind = cellClass(character);
      if (!kind) return;
      const columns = map.step > 1 ? `${map.columns}s ${x * map.step} to ${(x + 1) * map.step - 1}` : `${map.columns} ${x}`;
      cells.push(
        svg(
          "rect",
          { class: kind, x: LEFT + x * CELL, y: y * CELL, width: CELL - 1, height: CELL - 1 },
          svg("title", {}, `${map.rows} ${map.labels[y]}, ${columns}: ${meaning(character, output)}`),
        ),
      );
    }),
  );
  const height = tall * CELL + 13;
  const width = LEFT + wide * CELL + 8;
  const per = map.count > 1 ? `, ${map.count} rows a line` : "";
  const step = map.step > 1 ? `, ${map.step} a cell` : "";
  const caption = `${map.of ? `Request, token ${map.of}: ` : "All rows: "}${map.rows} × ${map.columns}${per}${step}`;
  const ticks = [
    0,
    ...(wide > 16 ? [8, 16, 24, 32, 40, 48, 56].filter((x) => x < wide - 4) : []),
    ...(wide > 1 ? [wide - 1] : []),
  ];
  const drawing = picture(
    `${caption}; ${counted(cells.length, "cell")} marked`,
    width,
    height,
    {},
    svg("rect", { class: "ground", x: LEFT, y: 0, width: wide * CELL - 1, height: tall * CELL - 1 }),
    cells,
    map.labels.map((label, y) => svg("text", { x: LEFT - 6, y: y * CELL + 8.5, "text-anchor": "end" }, label)),
    ticks.map((x) =>
      svg("text", { x: LEFT + x * CELL + CELL / 2, y: tall * CELL + 10, "text-anchor": "middle" }, x * map.step),
    ),
  );
  return framed("heat", caption, null, drawing);
}

// The shades as one row of doublings, and each mark with its words.
function heatLegend(maps, output) {
  const used = new Set(maps.flatMap((map) => map.cells.flatMap((line) => [...line])));
  const key = (character) =>
    svg(
      "svg",
      { width: CELL, height: CELL, class: "key", "aria-hidden": "true" },
      svg("rect", { class: cellClass(character), width: CELL - 1, height: CELL - 1 }),
    );
  const shades = [...DATA.shades].slice(1);
  const ramp = shades.some((character) => used.has(character))
    ? h(
        "span",
        {},
        "times the limit, from",
        shades.map((character, i) => [" ", key(character), ` ${2 ** i}`]),
      )
    : null;
  const marks = ["N", ...Object.keys(MARKS)].filter((character) => used.has(character));
  return h(
    "p",
    { class: "legend" },
    ramp,
    marks.map((character) => h("span", {}, key(character), ` ${meaning(character, output)}`)),
  );
}

// --- The batch of a case, from its id: a bar for each request, its queries at the end, and where the findings point.

const lengths = (text) =>
  (text ?? "").split("+").flatMap((part) => {
    const [length, times = 1] = part.split("x").map(Number);
    return new Array(Math.min(times || 1, 4096)).fill(length);
  });

function batch(result) {
  const [, words] = /^[^/]*\/([^~]*)/.exec(result.case) ?? ["", ""];
  const id = Object.fromEntries(words.split(",").map((part) => part.split("=")));
  const [kv, q] = [lengths(id.kv), lengths(id.q)];
  const places = telling(result)
    .map((finding) => [finding, /request (\d+)(?:.*?position (-?\d+))?/.exec(finding.where)])
    .filter(([, at]) => at);
  if (!places.length || !kv.length || ![...kv, ...q].every(Number.isFinite)) return null;
  const pointed = new Set(places.map(([, at]) => Number(at[1])));
  const shown = [...kv.keys()].filter((i) => kv.length <= 16 || pointed.has(i)).slice(0, 16);
  const most = Math.max(...kv, 1);
  const [wide, line] = [520, 15];
  const x = (token) => LEFT + (Math.max(0, token) / most) * wide;
  const bars = shown.map((request, y) => {
    const from = x(kv[request] - (q[request] ?? 0));
    const to = x(kv[request]);
    return svg(
      "g",
      { transform: `translate(0 ${y * line})` },
      svg("text", { x: LEFT - 6, y: 10, "text-anchor": "end" }, `request ${request}`),
      svg(
        "rect",
        { class: "context", x: LEFT, y: 3, width: Math.max(1, to - LEFT), height: 7 },
        svg("title", {}, `request ${request}: ${figure(kv[request])} tokens, ${q[request] ?? "?"} of them queries`),
      ),
      svg("rect", { class: "queries", x: Math.min(from, to - 1), y: 3, width: Math.max(1, to - from), height: 7 }),
      svg("text", { x: to + 16, y: 10 }, figure(kv[request])),
      places
        .filter(([, at]) => Number(at[1]) === request)
        .map(([finding, at]) =>
          svg(
            "path",
            {
              class: "place",
              d: "M0 1 l5 5 l-5 5 l-5 -5 z",
              transform: `translate(${x(Math.min(Number(at[2] ?? kv[request]), kv[request]))} 0.5)`,
            },
            svg("title", {}, `${finding.check}: ${finding.where}`),
          ),
        ),
    );
  });
  const height = shown.length * line + 2;
  const width = LEFT + wide + 64;
  const which = shown.length < kv.length ? `${shown.length} of ${kv.length} requests` : counted(kv.length, "request");
  const caption = `The batch: context and, at its end, the queries of ${which}; where the findings point`;
  const key = svg(
    "svg",
    { width: 11, height: 11, class: "key", "aria-hidden": "true" },
    svg("path", { class: "place", d: "M5.5 0.5 l5 5 l-5 5 l-5 -5 z" }),
  );
  const told = `${caption}: ${places.map(([finding]) => finding.where).join("; ")}`;
  return framed("batch", caption, [" ", key], picture(told, width, height, {}, bars));
}
