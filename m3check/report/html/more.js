// Below the results: power, production, notes, skips, environment.

function more() {
  const titled = (text, record) => (SEVERAL ? `${text}: ${record.name}` : text);
  const parts = [];
  for (const record of RECORDS) {
    if (record.power) parts.push(part("power", titled("Power", record), !SEVERAL, power(record.power)));
    if (record.production.length) parts.push(production(record));
  }
  parts.push(notes(), skips());
  for (const record of RECORDS) {
    const title = titled("Evidence and environment", record);
    parts.push(part("environment", title, !SEVERAL, SEVERAL ? recordFacts(record) : null, environment(record)));
  }
  byId("more").append(...parts.filter(Boolean));
}

function part(name, title, open, ...children) {
  return h("details", { open, "data-section": name }, h("summary", {}, h("h2", {}, title)), children);
}

function power({ cases, unlisted, defects }) {
  const rows = defects.map(([stage, words, seen, changed]) => {
    const bar = h("span", { class: "power", "aria-hidden": "true" }, h("span", { class: seen < changed ? "partly" : "" }));
    bar.firstChild.style.width = `${changed ? (seen / changed) * 100 : 0}%`;
    const share = changed ? `${Math.floor((seen / changed) * 100)} %` : "–";
    return [
      stage,
      words,
      COUNT.format(changed),
      COUNT.format(seen),
      bar,
      seen || !changed ? share : alarming("by no case"),
    ];
  });
  const text =
    "Would a wrong answer have passed? Each defect is the reference on changed inputs, judged by the same checks on " +
    `${counted(cases, "case")} of this run. “Changed” counts the cases where it changes the right answer, “seen” those of ` +
    "them that would have been red; in the others it cannot be told from rounding.";
  const others = unlisted ? ` ${counted(unlisted, "more case")} not in the table.` : "";
  return [
    quiet(text, others),
    grid(["stage", "defect", "changed", "seen", "", "share"], rows, ["changed", "seen", "share"]),
  ];
}

function production(record) {
  const rows = record.production.map(([version, op, implementation, when, evidence, hole]) => [
    ...[version, op, implementation, when],
    hole ? alarming(evidence) : evidence,
  ]);
  return part(
    "production",
    `What production runs on ${record.arch}`,
    !SEVERAL,
    quiet("An implementation that was not run here is a hole in this report: nothing in it is about that code."),
    grid(["vLLM", "op", "implementation", "when", "evidence"], rows),
  );
}

function notes() {
  const noted = RESULTS.flatMap((result) =>
    result.findings.filter((finding) => finding.status === "noted").map((finding) => ({ result, finding })),
  );
  if (!noted.length) return null;
  const what = (finding) => finding.hint.replace(/; \d+ rows.*/, ""); // without the figures of one case
  const groups = grouped(noted, ({ result, finding }) => [result.provider, result.op, finding.check, what(finding)]);
  const rows = groups.map(({ key, items }) => [COUNT.format(items.length), ...key, items[0].finding.where]);
  return part(
    "notes",
    `Noted (${COUNT.format(noted.length)})`,
    false,
    quiet("Breaks the contract where the provider promises nothing; red under --strict only."),
    grid(["times", "provider", "op", "check", "what", "first at"], rows, ["times"]),
  );
}

function skips() {
  const skipped = RESULTS.filter((result) => result.status === "skipped");
  if (!skipped.length) return null;
  const groups = grouped(skipped, (result) => result.reason).sort((a, b) => b.items.length - a.items.length);
  const each = (items, of) => [...new Set(items.map(of))].join(", ");
  const rows = groups.map(({ key, items }) => [
    ...[COUNT.format(items.length), key],
    ...[each(items, (result) => result.op), each(items, (result) => result.provider)],
  ]);
  return part(
    "skips",
    `Skipped (${COUNT.format(skipped.length)})`,
    false,
    grid(["cases", "why", "ops", "providers"], rows, ["cases"]),
  );
}

function environment(record) {
  const facts = record.environment.map(([name, value]) => [name, h("span", { class: "m" }, value)]);
  const gate = record.gate.length ? grid(["gate", ""], record.gate) : null;
  return [gate, grid(["what", "value"], facts), command("made by", record.command)];
}
