"use strict";
// Shows the data of the page. Text of a run reaches the page as text nodes alone, by `el` and `bdi`.
const { runs, findings } = JSON.parse(document.getElementById("data").textContent);
const given = runs.map((run) => run.name);
runs.forEach((run, at) => { // runs of one name in two folders
  if (given.indexOf(run.name) !== given.lastIndexOf(run.name)) run.name += ` (${at + 1})`;
});
const GIB = 2 ** 30;
const root = document.documentElement;
const section = (id) => document.getElementById(id);

// Control characters other than tab and line feed, and those that turn the direction of a text.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g;
const visible = (text) => String(text).replace(HIDDEN, (sign) => {
  const code = sign.charCodeAt(0);
  return code < 32 ? String.fromCharCode(0x2400 + code) : `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
});

function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
const bdi = (text) => el("bdi", {}, visible(text));
const number = (value) => {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  return size >= 1e6 || (size && size < 1e-3) ? value.toExponential(1) : String(Number(value.toPrecision(4)));
};
const percent = (share) => (share === null || share === undefined ? "–" : `${(100 * share).toFixed(1)} %`);
const gigabytes = (bytes) => (bytes ? `${(bytes / GIB).toFixed(2)} GB` : "–");
const table = (head, rows) => el("div", { className: "scroll", tabIndex: 0 }, el("table", {},
  el("thead", {}, el("tr", {}, ...head.map((cell) => el("th", { scope: "col" }, cell)))),
  el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((cell, at) =>
    at ? el("td", {}, cell) : el("th", { scope: "row" }, cell)))))));

// ---- The first screen

const MODEL_ROWS = [
  ["strict accuracy", (model) => percent(model.strict_accuracy)],
  ["95 % interval", (model) => interval(model.ci95)],
  ["lenient accuracy", (model) => percent(model.lenient_accuracy)],
  ["format", (model) => percent(model.format_rate)],
  ["truncated", (model) => percent(model.truncated_rate)],
  ["tokens per completion", (model) => model.mean_completion_tokens.toFixed(1)],
];
const interval = ([low, high]) => `${(100 * low).toFixed(1)} to ${percent(high)}`;
const STAGES = { base: "base", sft: "after warm-up", start: "given adapter", adapter: "adapter" };
const modelsOf = (run) => Object.keys(STAGES).filter((name) => run.evaluation[name]?.ci95).map((name) => [STAGES[name], run.evaluation[name]]);
const isKept = (run) => typeof run.kept_step === "number";
const costs = (run) => [
  ["steps", `${run.step} of ${run.steps ?? "–"}`],
  ["kept adapter", isKept(run) ? `of step ${run.kept_step}` : "–"],
  ["time in steps", `${run.minutes.toFixed(1)} min`],
  ["peak memory", gigabytes(run.peak_memory_bytes)],
  ["memory planned", gigabytes(run.predicted_memory_bytes)],
];

function showHead() {
  const names = runs.map((run) => run.name).join(", ");
  document.title = `${visible(names)} · lora-grpo report`;
  section("head").append(el("h1", {}, bdi(names)));
  if (runs.length > 1) return;
  const { settings, evaluation } = runs[0];
  const test = evaluation.num_items ? `, tested on ${evaluation.num_items} problems of ${evaluation.dataset} (${evaluation.split})` : "";
  section("head").append(el("p", { className: "quiet" }, bdi(
    `GRPO with LoRA, r ${settings.r}, on ${settings.model}; data ${settings.dataset}${test}`)));
}

function showVerdict() {
  const place = section("verdict");
  if (runs.length === 1) {
    place.append(...runs[0].verdict.map((sentence) => el("p", { className: "verdict" }, bdi(sentence))));
  }
  const more = runs.length === 1 ? findings.slice(1) : findings;
  if (more.length) place.append(el("ul", {}, ...more.map((sentence) => el("li", {}, bdi(sentence)))));
  if (runs.length > 1) return compareRuns(place);
  const [run] = runs, models = modelsOf(run);
  place.append(el("div", { className: "side" },
    models.length ? table(["greedy, test problems", ...models.map(([name]) => bdi(name))],
      MODEL_ROWS.map(([label, cell]) => [label, ...models.map(([, model]) => cell(model))])) : null,
    table(["the run", ""], costs(run))));
  place.append(el("details", {}, el("summary", {}, "Settings"), table(["setting", "value"],
    Object.entries(run.settings).map(([name, value]) => [bdi(name), bdi(value)]))));
}

function compareRuns(place) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))];
  const differing = names.filter((name) => name !== "steps" && new Set(runs.map((run) => run.settings[name])).size > 1);
  const short = (text) => (text.length > 40 ? `${text.slice(0, 12)}…` : text); // hashes
  const share = (model) => (model ? `${percent(model.strict_accuracy)} (${interval(model.ci95)})` : "–");
  const rows = [
    ["verdict", (run) => bdi(run.verdict[0].split(":")[0])],
    ["base, strict", (run) => share(run.evaluation.base)],
    ...["sft", "start"].filter((name) => runs.some((run) => run.evaluation[name])).map((name) => [`${STAGES[name]}, strict`, (run) => share(run.evaluation[name])]),
    ["adapter, strict", (run) => share(run.evaluation.adapter)],
    ["McNemar's p", (run) => number(run.evaluation.mcnemar_p)],
    ...costs(runs[0]).map(([label], at) => [label, (run) => costs(run)[at][1]]),
    ...differing.map((name) => [bdi(name), (run) => bdi(short(run.settings[name] ?? "–"))]),
  ];
  place.append(table(["", ...runs.map((run) => bdi(run.name))],
    rows.map(([label, cell]) => [label, ...runs.map(cell)])));
}

// ---- Curves

// Each line: where its values come from, their key (a * stands for every name), and its label.
const SAMPLED = "sampled in training", GREEDY = "greedy, validation problems", BASE = "base, greedy, test problems";
const CHARTS = [
  { title: "Reward", unit: "mean per completion", lines: [["metrics", "reward", "all rewards"], ["metrics", "rewards/*"]] },
  { title: "Correct", unit: "% of completions", scale: 100, lines: [["metrics", "correct", SAMPLED], ["validation", "strict_accuracy", GREEDY], ["base", "strict_accuracy", BASE]] },
  { title: "Format", unit: "% of completions", scale: 100, lines: [["metrics", "format", SAMPLED], ["validation", "format_rate", GREEDY], ["base", "format_rate", BASE]] },
  { title: "Length", unit: "mean tokens per completion", lines: [["metrics", "completion_length", SAMPLED], ["base", "mean_completion_tokens", BASE], ["used", "max_completion_length", "limit"]] },
  { title: "Clipped at the length limit", unit: "% of completions", scale: 100, lines: [["metrics", "clipped_ratio", SAMPLED], ["base", "truncated_rate", BASE]] },
  { title: "Dead groups", unit: "% whose rewards are all equal", scale: 100, lines: [["metrics", "frac_reward_zero_std", SAMPLED]] },
  { title: "Entropy", unit: "nats per token", lines: [["metrics", "entropy", SAMPLED]] },
  { title: "KL from the base", unit: "nats per token", lines: [["metrics", "kl", SAMPLED]] },
  { title: "Gradient norm", unit: "before clipping", lines: [["metrics", "grad_norm", "norm"], ["used", "max_grad_norm", "clipped above"]] },
  { title: "Learning rate", unit: "of the optimiser", lines: [["metrics", "learning_rate", "rate"]] },
  { title: "Importance ratio", unit: "trainer to sampler, per token", lines: [["metrics", "sampler_ratio", "mean"], ["metrics", "sampler_ratio_clipped", "share clipped"]] },
  { title: "Trainer against sampler", unit: "difference of log-probabilities", lines: [["metrics", "sampler_logprob_difference", "mean"], ["metrics", "sampler_logprob_difference_max", "largest"]] },
  { title: "Seconds by phase", unit: "per step", lines: [["metrics", "seconds", "whole step"], ...["generate", "sync", "reward", "update", "other"].map((phase) => ["metrics", `seconds_${phase}`, phase])] },
  { title: "Memory", unit: "GB", scale: 1 / GIB, lines: [["metrics", "peak_memory_bytes", "peak so far"], ["metrics", "predicted_memory_bytes", "planned"]] },
];
const DASH = { metrics: [], validation: [6, 4], base: [2, 3], used: [12, 4] };
const BORDER = { metrics: "solid", validation: "dashed", base: "dotted", used: "dashed" };
const INCREMENTS = [1, 10, 100, 1000, 10000].flatMap((size) => [size, 2 * size, 5 * size]); // no half steps
const charts = [];

// Beside other runs a run shows a chart's first line and its validation, and one run the base.
const chosen = (run, source, at) => runs.length === 1 || !at || source === "validation" || (source === "base" && run === runs[0]);

function linesOf(run, { lines, scale = 1 }) {
  return lines.filter(([source], at) => chosen(run, source, at)).flatMap(([source, key, label]) => {
    const rows = run[source] || {};
    const keys = key.endsWith("*") ? Object.keys(rows).filter((name) => name.startsWith(key.slice(0, -1))) : [key];
    return keys.map((name) => {
      let xs = rows.step, values = rows[name];
      if (source === "base" || source === "used") { // one value: a line from step 0 to the last
        const value = (source === "base" ? run.evaluation.base : rows)?.[name];
        xs = [0, Math.max(run.step, 1)];
        values = [value, value];
      }
      const ys = (values || []).map((value) => (typeof value === "number" ? value * scale : null));
      return { source, label: label || name.slice(key.length - 1), xs, ys };
    }).filter((line) => line.ys.some((value) => value !== null));
  });
}

const shade = (name) => getComputedStyle(root).getPropertyValue(name).trim();

function drawChart(place, chart, lines) {
  const grid = { stroke: shade("--line"), width: 1 };
  const axis = { stroke: shade("--quiet"), grid, ticks: grid, font: "12px system-ui", values: (u, ticks) => ticks.map(number) };
  const last = (ys) => ys.findLast((value) => value !== null && value !== undefined);
  const range = (u, low, high) => (chart.scale === 100 ? [0, 100] : [Math.min(0, low), high > 0 ? high * 1.06 : 1]);
  const width = () => Math.max(place.clientWidth, 200);
  const plot = new uPlot({
    width: width(), height: 190,
    scales: { x: { time: false }, y: { range } },
    axes: [{ ...axis, label: "step", labelSize: 18, labelFont: "12px system-ui", size: 28, incrs: INCREMENTS }, { ...axis, size: 58 }],
    cursor: { sync: { key: "step", scales: ["x", null] }, points: { size: 7 } },
    legend: { markers: { width: 2, dash: (u, at) => (at ? BORDER[lines[at - 1].source] : "solid") } },
    hooks: { draw: [markKept] },
    series: [{ label: "step", value: (u, step) => (step === null ? "last" : String(step)) }, ...lines.map((line) => ({
      label: visible(line.label), stroke: shade(`--c${line.colour % 6}`), width: 2, dash: DASH[line.source], spanGaps: true,
      points: { metrics: {}, validation: { show: true, size: 7 } }[line.source] ?? { show: false },
      value: (u, value, at, index) => number(index === null ? last(u.data[at]) : value),
    }))],
  }, uPlot.join(lines.map((line) => [line.xs, line.ys])), place);
  new ResizeObserver(() => plot.width !== width() && plot.setSize({ width: width(), height: 190 })).observe(place);
  place.onkeydown = (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    const steps = plot.data[0], at = (plot.cursor.idx ?? (step > 0 ? -1 : steps.length)) + step;
    plot.setCursor({ left: plot.valToPos(steps[Math.min(Math.max(at, 0), steps.length - 1)], "x"), top: 20 });
    event.preventDefault();
  };
  charts.push(plot);
}

function markKept(plot) {
  for (const [at, run] of runs.entries()) {
    if (!isKept(run)) continue;
    const step = run.kept_step;
    const x = plot.valToPos(step, "x", true), { top, height } = plot.bbox;
    plot.ctx.save();
    plot.ctx.strokeStyle = shade(runs.length > 1 ? `--c${at % 6}` : "--quiet");
    plot.ctx.setLineDash([]);
    plot.ctx.globalAlpha = 0.7;
    plot.ctx.beginPath();
    plot.ctx.moveTo(x, top);
    plot.ctx.lineTo(x, top + height);
    plot.ctx.stroke();
    plot.ctx.restore();
  }
}

function showCurves() {
  const place = section("curves"), grid = el("div", { className: "charts" }), missing = [];
  const kept = runs.filter(isKept).map((run) => run.kept_step).join(", ");
  place.append(el("p", { className: "quiet" },
    "Solid: completions sampled in training. Dashed, with points: greedy on the validation problems. Dotted: the base, greedy on the test problems. ",
    kept ? `Vertical line: the step whose adapter was kept (${kept}). ` : null,
    el("span", { className: "hint" }, "Pointing at a chart, or the arrow keys on it, give the values of a step; dragging zooms in, a double click out.")), grid);
  for (const chart of CHARTS) {
    const lines = runs.flatMap((run, at) => linesOf(run, chart).map((line, index) => (runs.length === 1
      ? { ...line, colour: index }
      : { ...line, colour: at, label: `${run.name}: ${line.label}` })));
    if (!lines.length) { missing.push(chart.title); continue; }
    const canvas = el("div", { tabIndex: 0, role: "group", "aria-label": `chart: ${chart.title}` });
    grid.append(el("figure", {}, el("h3", {}, chart.title, el("span", { className: "quiet" }, ` · ${chart.unit}`)), canvas));
    drawChart(canvas, chart, lines);
    canvas.redraw = () => { canvas.replaceChildren(); drawChart(canvas, chart, lines); };
  }
  if (missing.length) place.append(el("p", { className: "quiet" }, `Not recorded: ${missing.join("; ")}.`));
}

function redraw() {
  charts.splice(0).forEach((plot) => plot.destroy());
  document.querySelectorAll(".charts figure > div").forEach((canvas) => canvas.redraw());
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
addEventListener("beforeprint", () => { root.classList.add("printing"); redraw(); });
addEventListener("afterprint", () => { root.classList.remove("printing"); redraw(); });

// ---- Completions

const START = 4000; // characters of a text that are shown at once

function textBlock(text) {
  const shown = visible(text), block = el("pre", { dir: "auto", tabIndex: 0 }, shown.slice(0, START));
  if (shown.length <= START) return block;
  const more = el("button", { type: "button" }, `show all ${shown.length.toLocaleString("en")} characters`);
  more.onclick = () => {
    block.dir = getComputedStyle(block).direction; // "auto" takes 15 s for a megabyte
    block.textContent = shown;
    more.remove();
  };
  return el("div", {}, block, more);
}

const badge = (good, yes, no) => el("span", { className: good ? "good" : "bad" }, good ? yes : no);
const signed = (value) => (value > 0 ? "+" : "") + value.toFixed(2);

function card(completion, heading, advantage) {
  const direction = advantage > 0 ? " up" : advantage < 0 ? " down" : "";
  return el("article", { className: `card${direction}` },
    el("div", { className: "facts" }, heading ? el("strong", {}, heading) : null,
      badge(completion.right ?? completion.strict, "✓ right", "✗ wrong"), badge(completion.format, "✓ format", "✗ format"),
      completion.truncated ? badge(false, "", "truncated") : null, el("span", {}, `${completion.tokens} tokens`),
      advantage === undefined ? null : el("span", {}, `advantage ${signed(advantage)}`),
      advantage === undefined ? null : el("span", {}, `reward ${number(completion.reward)}`),
      ...Object.entries(completion.rewards || {}).map(([name, score]) => el("span", { className: "quiet" }, bdi(name), ` ${number(score)}`))),
    textBlock(completion.text ?? completion.completion));
}

// A filter: its control, and whether a completion of an entry passes the control's value.
const choice = (label, options, test) => ({ label, test,
  control: el("select", {}, ...options.map(([value, text]) => el("option", { value }, visible(text)))) });
const typed = (label, type, test) => ({ label, test, control: el("input", { type, step: "any" }) });
const yesNo = (label, yes, no, read) => choice(label, [["", "any"], ["yes", yes], ["no", no]],
  (completion, entry, value) => read(completion) === (value === "yes"));
const counted = (entries, key) => [...Map.groupBy(entries, (entry) => entry[key])].map(([value, some]) => [String(value), `${value} (${some.length})`]);
const holds = (text, part) => text.toLowerCase().includes(part.toLowerCase());
const ofRun = () => (runs.length === 1 ? [] : [choice("run", [["", "all"], ...runs.map((run) => [run.name, run.name])],
  (completion, entry, value) => entry.run === value)]);

function groupFilters(groups) {
  return [...ofRun(), choice("step", [["", "all"], ...counted(groups, "step")], (completion, group, value) => group.step === Number(value)),
    yesNo("answer", "right", "wrong", (completion) => completion.right),
    yesNo("format", "as asked", "another", (completion) => completion.format),
    yesNo("length", "truncated", "ended by itself", (completion) => completion.truncated),
    typed("reward from", "number", (completion, group, value) => completion.reward !== null && completion.reward >= Number(value)),
    typed("to", "number", (completion, group, value) => completion.reward !== null && completion.reward <= Number(value)),
    typed("text", "search", (completion, group, value) => holds(completion.text, value) || holds(group.question, value))];
}

function itemFilters(items) {
  const both = (item) => [item.base.completion, item.adapter.completion, item.question];
  return [...ofRun(), choice("strict answer", [["", "all, changed first"], ...counted(items, "change")], (item, entry, value) => entry.change === value),
    yesNo("adapter's format", "as asked", "another", (item) => item.adapter.format),
    yesNo("adapter's length", "truncated", "ended by itself", (item) => item.adapter.truncated),
    typed("text", "search", (item, entry, value) => both(item).some((text) => holds(text, value)))];
}

const gold = (entry) => el("p", {}, "gold answer: ", el("strong", {}, bdi(entry.answer)));
const runName = (entry) => (runs.length > 1 ? [bdi(entry.run), ", "] : []);

function showGroup(group, matching) {
  const { system_prompt: system, example } = runs.find((run) => run.name === group.run).used;
  return [el("h3", {}, ...runName(group), `step ${group.step}`), el("div", { className: "question", dir: "auto" }, visible(group.question)), gold(group),
    system ? el("details", {}, el("summary", {}, example ? "system prompt and example" : "system prompt"), textBlock(system),
      example ? textBlock(typeof example === "string" ? example : JSON.stringify(example, null, 2)) : null) : null,
    el("div", { className: "cards" }, ...matching.map((completion) => card(completion, null, completion.advantage)))];
}

function showItem(item) {
  return [el("h3", {}, ...runName(item), `test problem ${item.index + 1}: ${item.change}`),
    el("div", { className: "question", dir: "auto" }, visible(item.question)), gold(item),
    el("div", { className: "cards" }, ...Object.keys(STAGES).filter((name) => item[name]).map((name) => card(item[name], STAGES[name])))];
}

function browser(entries, filters, completionsOf, unit, show) {
  const place = el("div"), said = el("span", { role: "status" });
  let found = [], at = 0;
  const move = (by) => { at = Math.min(Math.max(at + by, 0), found.length - 1); draw(); };
  const before = el("button", { type: "button", onclick: () => move(-1) }, "previous (k)");
  const after = el("button", { type: "button", onclick: () => move(1) }, "next (j)");
  function draw() {
    const [entry, matching] = found[at] || [];
    before.disabled = at <= 0;
    after.disabled = at >= found.length - 1;
    said.textContent = !entry ? `no ${unit} passes the filters` : `${unit} ${at + 1} of ${found.length}`
      + (matching.length < completionsOf(entry).length ? ` (${matching.length} of its ${completionsOf(entry).length} completions pass)` : "");
    place.replaceChildren(...(entry ? show(entry, matching).filter(Boolean) : []));
  }
  function filter() {
    const active = filters.filter(({ control }) => control.value !== "");
    found = entries.map((entry) => [entry, completionsOf(entry).filter((completion) =>
      active.every(({ test, control }) => test(completion, entry, control.value)))]).filter(([, matching]) => matching.length);
    at = 0;
    draw();
  }
  filters.forEach(({ control }) => control.addEventListener("input", filter));
  filter();
  const panel = el("div", {}, el("div", { className: "filters" }, ...filters.map(({ label, control }) => el("label", {}, label, control))),
    el("div", { className: "pager" }, before, after, said), place);
  return { panel, move };
}

function showCompletions() {
  const place = section("completions");
  const all = (key) => runs.flatMap((run) => run[key].map((entry) => ({ ...entry, run: run.name })));
  const groups = all("groups"), order = ["gained", "lost", "both wrong", "both right"];
  const items = all("items").sort((one, other) => order.indexOf(one.change) - order.indexOf(other.change));
  const tabs = [];
  if (items.length) tabs.push(["Test problems: base beside adapter", browser(items, itemFilters(items), (item) => [item], "problem", showItem)]);
  if (groups.length) tabs.push(["Training: groups of a step", browser(groups, groupFilters(groups), (group) => group.completions, "group", showGroup)]);
  if (!tabs.length) return void place.append(el("p", {}, "No completions are recorded yet."));
  let open = tabs[0][1];
  const buttons = tabs.map(([label, { panel }], at) => el("button", { type: "button", onclick: () => choose(at) }, label));
  function choose(at) {
    open = tabs[at][1];
    tabs.forEach(([, { panel }], other) => { panel.hidden = other !== at; });
    buttons.forEach((button, other) => button.setAttribute("aria-pressed", other === at));
  }
  place.append(el("div", { className: "tabs" }, ...buttons), ...tabs.map(([, { panel }]) => panel));
  choose(0);
  addEventListener("keydown", (event) => {
    if (event.target.matches("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "j" || event.key === "k") open.move(event.key === "j" ? 1 : -1);
  });
}

function showFoot() {
  const notes = runs.flatMap((run) => run.notes.map((note) => (runs.length > 1 ? `${run.name}: ${note}` : note)));
  section("foot").append(...notes.map((note) => el("p", {}, bdi(`To keep the page under 5 MB, ${note}.`))),
    el("p", {}, "Written by lora-grpo report; charts by uPlot (MIT licence, in the file)."));
}

showHead();
showVerdict();
showCurves();
showCompletions();
showFoot();
