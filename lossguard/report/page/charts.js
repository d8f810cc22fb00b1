// The two charts. Drawn anew for a theme, a scale, a signal or a range of steps; they share their steps.
const data = JSON.parse($("data").textContent);
const several = data.runs.length > 1;
const view = { scale: "linear", run: 0, signal: null, shows: "worst", range: null, rows: null, shared: 1, columns: [], width: undefined };
const SYMBOLS = { info: "circle", warning: "triangle-up", error: "square", halt: "octagon" };
const LIGHT = {
  sequence: ["#f3f7ee", "#c9e4c5", "#7fc6bd", "#3a97b4", "#2a5f9e", "#1d2b6b"],
  band: ["#123a72", "#3d7fc1", "#a9cbe8", "#f2f1ec", "#f2bd7c", "#cf7416", "#7c3a04"],
};
const DARK = {
  sequence: ["#20272f", "#25456b", "#2c6f95", "#3ea3a4", "#8ccf9b", "#eef6c8"],
  band: ["#a8d4ff", "#4c93d9", "#2c5074", "#2b2f34", "#79501f", "#d98a2b", "#ffd49a"],
};
const ramp = (kind) => { const c = (dark() ? DARK : LIGHT)[kind]; return c.map((colour, i) => [i / (c.length - 1), colour]); };
const whole = () => { const last = Math.max(...data.runs.map((r) => r.steps)); const pad = Math.max(0.6, last * 0.012); return [-pad, last - 1 + pad]; };
const shownSteps = () => view.range || whole();
const narrow = () => window.innerWidth < 720;
const config = { displayModeBar: false, responsive: true, doubleClick: false, showTips: false };

// How many leading parts all names share; they are told once.
function sharedParts(grid) {
  const first = grid.rows[0].split(".");
  let n = grid.rows.length > 1 ? first.length - 1 : 0;
  for (const name of grid.rows) {
    const parts = name.split(".");
    n = Math.min(n, parts.length - 1);
    while (n && parts.slice(0, n).some((part, i) => part !== first[i])) n--;
  }
  return n;
}

// Long names: what all share is left out, leading parts become letters, in all rows alike, numbers stay, and what is still too long is cut behind the last number.
const shortened = new Map(); // by grid and room
function shortNames(grid) {
  const room = narrow() ? 14 : 30, key = grid.block + room;
  if (shortened.has(key)) return shortened.get(key);
  const shared = sharedParts(grid), rows = grid.rows.map((name) => name.split(".").slice(shared).join("."));
  const cut = new Set(), letter = (part) => (/^\d/.test(part) ? part : part[0] || "");
  for (const name of rows) {
    const parts = name.split(".");
    for (let i = 0; i < parts.length - 1 && parts.join(".").length > room; i++) { cut.add(i + parts[i]); parts[i] = letter(parts[i]); }
  }
  shortened.set(key, rows.map((name) => {
    const parts = name.split("."), n = parts.map((part, i) => (i < parts.length - 1 && cut.has(i + part) ? letter(part) : part)).join(".");
    const head = Math.min(room - 4, Math.max(Math.ceil(room / 2), n.search(/\d\D*$/) + 1));
    return n.length <= room ? n : n.slice(0, head) + "…" + n.slice(head + 1 - room);
  }));
  return shortened.get(key);
}

// Both charts leave the same room for their labels where that is little, so that steps stand under steps.
function leftMargin() {
  const grid = data.runs[view.run].grids.find((g) => g.signal === view.signal);
  return 22 + 6.4 * (grid ? shortNames(grid) : []).reduce((most, n) => Math.max(most, n.length), 6);
}

function base() {
  const ink = token("ink"), line = token("line"), muted = token("muted");
  const axis = { gridcolor: line, zeroline: false, linecolor: line, tickcolor: line, tickfont: { color: muted, size: 12 }, title: { font: { color: muted, size: 12 } } };
  const touch = window.matchMedia("(pointer: coarse)").matches;
  return { axis, layout: {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: getComputedStyle(document.body).fontFamily, color: ink, size: 12 },
    width: view.width, autosize: view.width === undefined, showlegend: false, dragmode: touch ? false : "zoom", hovermode: "closest",
    hoverlabel: { bgcolor: token("surface"), bordercolor: muted, align: "left", font: { color: ink, size: 12.5, family: getComputedStyle(document.body).fontFamily } },
  } };
}

// ---- the curves

function colourOf(run, k) { return k === 0 ? token("run-" + run) : token("term-" + ((k - 1) % 3)); }
const alpha = (hex, a) => hex + Math.round(a * 255).toString(16).padStart(2, "0");

const there = (values, i) => i >= 0 && i < values.length && values[i] !== null;
const lone = (values) => values.map((v, i) => (there(values, i - 1) || there(values, i + 1) ? null : v)); // a point without neighbours has no line to be seen by

function curveTraces(run, r) {
  const traces = [];
  run.curves.forEach((curve, k) => {
    if (several && k > 0) return;
    const colour = colourOf(r, k), name = (several ? "AB"[r] + " " : "") + (k === 0 ? "loss" : curve.name);
    const x = curve.exact ? curve.first : curve.first.map((s, i) => (s + curve.last[i]) / 2);
    if (!curve.exact && k === 0) {
      traces.push({ x, y: curve.low, mode: "lines", line: { width: 0 }, hoverinfo: "skip", connectgaps: false });
      traces.push({ x, y: curve.high, mode: "lines", line: { width: 0.6, color: alpha(colour, 0.5) }, fill: "tonexty", fillcolor: alpha(colour, 0.2), hoverinfo: "skip", connectgaps: false });
    }
    const text = x.map((_, i) => `<b>${name}</b> ${say(curve.middle[i])}` + (curve.exact ? `<br>step ${curve.first[i]}`
      : `<br>${say(curve.low[i])} to ${say(curve.high[i])}<br>steps ${curve.first[i]} to ${curve.last[i]}`) + (curve.flags[i] ? `<br><b>${flagNames(curve.flags[i])}</b>` : ""));
    traces.push({ x, y: curve.middle, mode: "lines", line: { width: k === 0 ? 1.7 : 1.2, color: colour }, text, hoverinfo: "text", connectgaps: false });
    const points = lone(curve.middle);
    if (points.some((v) => v !== null)) traces.push({ x, y: points, mode: "markers", marker: { size: 6, color: colour, opacity: 1 }, text, hoverinfo: "text" });
  });
  const v = run.validation;
  if (v.steps.length) {
    const colour = several ? token("run-" + r) : token("validation");
    traces.push({ x: v.steps, y: v.values, mode: "lines+markers", line: { width: 1.3, color: colour, dash: several ? "dash" : "solid" }, marker: { size: 6, color: colour, symbol: r ? "diamond" : "circle" },
      text: v.values.map((y, i) => `<b>${several ? "AB"[r] + " " : ""}validation</b> ${say(y)}<br>after step ${v.steps[i]}`), hoverinfo: "text", connectgaps: false });
  }
  return traces;
}

// Where the loss was not finite: a band over the whole height, told in its own colour.
function brokenShapes(run) {
  const curve = run.curves[0], shapes = [];
  if (!curve) return shapes;
  const end = (i) => (curve.exact ? curve.first[i] : curve.last[i]);
  for (let i = 0; i < curve.flags.length; i++) {
    if (!curve.flags[i]) continue;
    const from = i;
    let kinds = curve.flags[i];
    while (i + 1 < curve.flags.length && curve.flags[i + 1]) kinds |= curve.flags[++i];
    shapes.push({ type: "rect", xref: "x", yref: "paper", x0: curve.first[from] - 0.5, x1: end(i) + 0.5, y0: 0, y1: 1, fillcolor: alpha(token("lost"), 0.16), line: { width: 1, color: token("lost") }, layer: "below", name: flagNames(kinds) });
  }
  return shapes;
}

// Marks stand in rows at the top, so that neighbours do not hide each other.
function placedMarks() {
  const [low, high] = shownSteps(), taken = [];
  const marks = data.runs.flatMap((run, r) => run.marks.map((m) => ({ ...m, run: r })));
  marks.sort((a, b) => a.step - b.step);
  for (const mark of marks) {
    const x = (mark.step - low) / (high - low), gap = narrow() ? 0.075 : 0.028;
    let row = taken.findIndex((t) => x - t > gap);
    if (row < 0) row = taken.length < 5 ? taken.length : 4;
    taken[row] = x;
    mark.y = 0.955 - 0.075 * row;
  }
  return marks;
}

function markTraces(marks) {
  const traces = marks.filter((m) => m.last !== null && m.last > m.step).map((m) => ({
    x: [m.step, m.last], y: [m.y, m.y], yaxis: "y2", mode: "lines", line: { width: 3, color: alpha(token(m.severity), 0.38) }, hoverinfo: "skip" }));
  if (marks.length) traces.push({
    x: marks.map((m) => m.step), y: marks.map((m) => m.y), yaxis: "y2", mode: "markers+text", customdata: marks.map((m) => m.id), text: marks.map((m) => m.id),
    textfont: { color: token("surface"), size: 11 }, textposition: "middle center", cliponaxis: false, name: "marks",
    marker: { size: marks.map((m) => (m.severity === "warning" ? 23 : 19)), opacity: 1, symbol: marks.map((m) => SYMBOLS[m.severity]), color: marks.map((m) => token(m.severity)), line: { width: 1.5, color: token("surface") } },
    hovertext: marks.map((m) => `<b>${escapeText(m.diagnosis)}</b> ${m.severity}, step ${m.step}` + (m.last > m.step ? ` to ${m.last}` : "") + `<br>${fold(m.text)}<br><i>click for its story</i>`), hoverinfo: "text" });
  return traces;
}
// What was done to the run stands in a row at the foot, so that findings keep the top.
const EVENTS = {
  skip: { symbol: "x", size: 9, colour: "done", words: "updates left out" },
  cut: { symbol: "triangle-down", size: 13, colour: "done", words: "learning rate cut" },
  rollback: { symbol: "arrow-bar-left", size: 14, colour: "done", words: "rolled back" },
  load: { symbol: "arrow-bar-left", size: 14, colour: "done", words: "loaded from a checkpoint" },
  saved: { symbol: "diamond", size: 8, colour: "muted", words: "checkpoint" },
  resumed: { symbol: "arrow-bar-right", size: 13, colour: "muted", words: "resumed" },
  stall: { symbol: "hourglass", size: 15, colour: "done", words: "stood still" },
};
const FOOT = 0.035;
function eventTraces() {
  const events = data.runs.flatMap((run, r) => run.events.map((e) => ({ ...e, run: r }))), traces = [];
  for (const e of events) {
    if (e.to !== null && e.to < e.first) traces.push({ x: [e.to, e.first], y: [FOOT, FOOT], line: { width: 2, color: token("done"), dash: "dot" } });
    else if (e.last > e.first) traces.push({ x: [e.first, e.last], y: [FOOT, FOOT], line: { width: 6, color: alpha(token("done"), 0.35) } });
  }
  for (const t of traces) Object.assign(t, { yaxis: "y2", mode: "lines", hoverinfo: "skip" });
  if (events.length) traces.push({
    x: events.map((e) => (e.first + e.last) / 2), y: events.map((e) => (e.kind === "resumed" ? 2.4 : 1) * FOOT), yaxis: "y2", mode: "markers", name: "events", cliponaxis: false,
    marker: { symbol: events.map((e) => EVENTS[e.kind].symbol), size: events.map((e) => EVENTS[e.kind].size), opacity: 1, color: events.map((e) => token(EVENTS[e.kind].colour)), line: { width: 1, color: token("surface") } },
    hovertext: events.map((e) => `<b>${several ? "AB"[e.run] + " " : ""}${EVENTS[e.kind].words}</b>, ${e.when}<br>${fold(e.text)}`), hoverinfo: "text" });
  return traces;
}
const escapeText = (s) => s.replace(/&/g, "&amp;").replace(/</g, "&lt;");
const fold = (s) => escapeText(s).replace(/(.{1,58})(\s|$)/g, "$1<br>").replace(/<br>$/, "");

function lossRange(log) {
  // Plain numbers, seen in full: the extremes of what is shown, with room for the marks on top.
  const [from, to] = shownSteps();
  let low = Infinity, high = -Infinity;
  const take = (x, y) => { if (y !== null && x >= from && x <= to && (!log || y > 0)) { low = Math.min(low, y); high = Math.max(high, y); } };
  for (const run of data.runs) {
    (several ? run.curves.slice(0, 1) : run.curves).forEach((c, k) => c.first.forEach((x, i) => { take(x, c.middle[i]); if (!c.exact && k === 0) { take(x, c.low[i]); take(x, c.high[i]); } }));
    run.validation.steps.forEach((x, i) => take(x, run.validation.values[i]));
  }
  if (low > high) return log ? [-1, 1] : [0, 1];
  if (log) { low = Math.log10(low); high = Math.log10(high); } else if (low >= 0 && low < 0.35 * high) low = 0;
  const span = high - low || Math.abs(high) || 1, marks = data.runs.some((r) => r.marks.length);
  const foot = data.runs.some((r) => r.events.length) ? 0.1 : low === 0 && !log ? 0.02 : 0.06;
  return [low - foot * span, high + (marks ? 0.24 : 0.06) * span];
}

function logTicks([low, high]) {
  const every = Math.max(1, Math.ceil((high - low) / 7)), steps = high - low > 2.5 ? [1] : high - low > 1 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9], values = [];
  for (let e = Math.floor(low); e <= high; e += every) for (const m of steps) if (Math.log10(m) + e >= low && Math.log10(m) + e <= high) values.push(m * 10 ** e);
  return { tickvals: values, ticktext: values.map((v) => (v >= 1e4 ? v.toExponential().replace("e+", "e") : say(Number(v.toPrecision(2))))) };
}

// Wide ones bear their names, on a ground of their own, so that no grid line runs through.
function brokenNames(shapes) {
  const [low, high] = shownSteps(), seen = shapes.map((s) => [Math.max(low, s.x0), Math.min(high, s.x1), s.name]);
  return seen.filter(([a, b]) => b - a > 0.08 * (high - low)).map(([a, b, text]) => ({ x: (a + b) / 2, xref: "x", y: 0.5, yref: "paper", text, showarrow: false, bgcolor: token("surface"), borderpad: 4, font: { color: token("lost"), size: 15 } }));
}

function drawLoss() {
  const log = view.scale === "log", marks = placedMarks(), { axis, layout } = base();
  const traces = [...data.runs.flatMap(curveTraces), ...eventTraces(), ...markTraces(marks)];
  const lines = marks.map((m) => ({ type: "line", xref: "x", yref: "paper", x0: m.step, x1: m.step, y0: 0, y1: m.y, line: { color: token(m.severity), width: 1, dash: "dot" }, layer: "below" }));
  lines.push(...data.runs.flatMap((r) => r.events.filter((e) => e.kind === "resumed").map((e) => ({ type: "line", xref: "x", yref: "paper", x0: e.first, x1: e.first, y0: 0, y1: 1, line: { color: token("muted"), width: 1, dash: "dash" }, layer: "below" }))));
  const broken = data.runs.flatMap(brokenShapes);
  Object.assign(layout, {
    annotations: brokenNames(broken),
    margin: { l: narrow() ? 46 : leftMargin() > 110 ? 62 : leftMargin(), r: narrow() ? 8 : 14, t: 8, b: 40 }, shapes: [...broken, ...lines],
    xaxis: { ...axis, range: shownSteps(), showgrid: false, title: { ...axis.title, text: "step" }, ticks: "outside", exponentformat: "none", nticks: narrow() ? 5 : 10 },
    yaxis: { ...axis, type: log ? "log" : "linear", range: lossRange(log), ...(log ? logTicks(lossRange(log)) : { exponentformat: "power" }), fixedrange: true },
    yaxis2: { overlaying: "y", range: [0, 1], fixedrange: true, visible: false },
  });
  const values = data.runs.flatMap((r) => r.curves.flatMap((c) => (c.low || c.middle).filter((v) => v !== null && v <= 0)));
  $("loss-note").textContent = log && values.length ? "Losses of 0 or below cannot stand on a logarithmic scale and are not shown; the linear scale shows them." : "";
  $("loss").setAttribute("aria-label", data.runs.map(lossWords).join(" "));
  return Plotly.react("loss", traces, layout, config);
}

// The curve for those who cannot see it.
function lossWords(run, r) {
  const curve = run.curves[0], named = several ? `Run ${"AB"[r]}, ${run.label}: ` : "";
  if (!curve) return `${named}no loss was recorded.`;
  const known = curve.middle.filter((v) => v !== null), least = (curve.low || curve.middle).reduce((a, v) => (v !== null && v < a ? v : a), Infinity), broken = curve.flags.findIndex(Boolean);
  return `${named}the loss over ${run.steps} steps, ` + (known.length ? `from ${say(known[0])} to ${say(known.at(-1))}, least ${say(least)}` : "never finite")
    + (broken < 0 ? "" : `, not finite ${curve.exact ? `at step ${curve.first[broken]}` : `from step ${curve.first[broken]} on`} for the first time`) + `; ${run.marks.length} findings, told below.`;
}

function lossKey() {
  const items = [];
  const add = (kind, style, words) => { const li = document.createElement("li"), i = document.createElement("i"); i.className = kind; i.style.cssText = style; li.append(i, words); items.push(li); };
  data.runs.forEach((run, r) => {
    const p = several ? `${"AB"[r]} ${run.label}: ` : "";
    run.curves.forEach((c, k) => { if (!several || k === 0) add("", `border-color:${colourOf(r, k)}`, p + (k ? c.name : run.validation.steps.length || run.curves.length > 1 ? "training loss" : "loss") + (c.exact || k ? "" : " (median, least to greatest)")); });
    if (run.validation.steps.length) add(several ? "" : "dot", several ? `border-color:${token("run-" + r)};border-top-style:dashed` : `background:${token("validation")}`, p + "validation loss");
  });
  if (data.runs.some((r) => r.curves[0] && r.curves[0].flags.some(Boolean))) add("block", `background:${token("lost")}`, "loss is NaN or infinite");
  for (const [kind, e] of Object.entries(EVENTS)) if (data.runs.some((r) => r.events.some((v) => v.kind === kind))) {
    add("sign", "", e.words);
    items.at(-1).firstChild.innerHTML = `<svg class="sign sign-${kind}" viewBox="0 0 16 16" aria-hidden="true"><path d="${data.signs[kind]}" fill-rule="evenodd"/></svg>`;
  }
  $("loss-key").replaceChildren(...items);
}
