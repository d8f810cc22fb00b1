// The heat map, the controls and what ties them to the stories.
const gridOf = () => data.runs[view.run].grids.find((g) => g.signal === view.signal);

function scaleOf(grid, numbers) {
  if (grid.scale === "share") return { to: (v) => v, low: 0, high: 1, colours: ramp("sequence"), ends: ["0", "1"] };
  if (grid.scale === "plain" && numbers.low.some((v) => v < 0)) {
    const seen = [...numbers.low, ...numbers.high].filter((v) => !Number.isNaN(v)), low = seen.reduce((a, b) => Math.min(a, b), 0), high = seen.reduce((a, b) => Math.max(a, b), 0);
    return { to: (v) => v, low, high, colours: ramp("sequence"), ends: [say(low), say(high)] };
  }
  const to = (v) => (v > 0 ? Math.log10(v) : v === 0 ? -60 : NaN);
  if (grid.scale === "band") {
    const c = Math.log10(grid.centre);
    return { to, low: c - 2.5, high: c + 2.5, colours: ramp("band"), ends: ["≤ 3e-6", "≥ 0.3"], middle: "1e-3" };
  }
  const seen = Float64Array.from(numbers.high, to).filter((v) => v > -60).sort();
  const low = seen.length ? seen[Math.floor(0.02 * seen.length)] : -1, high = seen.length ? seen[seen.length - 1] : 1;
  const wide = high - low < 0.5 ? 0.25 : 0;
  return { to, low: low - wide, high: high + wide, colours: ramp("sequence"), ends: [(low > seen[0] ? "≤ " : "") + say(10 ** (low - wide)), say(10 ** (high + wide))] };
}

function pick(grid, low, high) {
  if (view.shows === "low") return low;
  if (view.shows === "high" || grid.scale !== "band") return high;
  const far = (v) => (v > 0 ? Math.abs(Math.log10(v / grid.centre)) : 60);
  return far(low) > far(high) ? low : high;
}

// The least, the greatest and the flags of neighbouring rows in neighbouring columns, from the one to before the other.
function cellOf(grid, numbers, row, count, [from, until]) {
  const C = grid.first.length, end = Math.min(row + count, grid.rows.length);
  let low = NaN, high = NaN, flags = 0;
  for (let r = row; r < end; r++) for (let i = r * C + from; i < r * C + until; i++) {
    flags |= numbers.flags[i];
    if (!(low <= numbers.low[i]) && !Number.isNaN(numbers.low[i])) low = numbers.low[i];
    if (!(high >= numbers.high[i]) && !Number.isNaN(numbers.high[i])) high = numbers.high[i];
  }
  return [low, high, flags];
}

// Columns that would be too narrow to be drawn stand together, so that none is lost: [first, the one behind the last] of each.
function columnsOf(grid, width) {
  const bounds = edges(grid), [low, high] = shownSteps(), least = (LEAST * (high - low)) / Math.max(1, width), groups = [];
  let from = 0;
  for (let c = 0; c < grid.first.length; c++) if (bounds[c + 1] - bounds[from] >= least) { groups.push([from, c + 1]); from = c + 1; }
  if (from < grid.first.length) {
    if (groups.length) groups.at(-1)[1] = grid.first.length;
    else groups.push([from, grid.first.length]);
  }
  return groups;
}
const LEAST = 1.5; // pixels of a column: what is narrower may fall between two of them

function edges(grid) {
  const n = grid.first.length, gap = n > 1 ? grid.first[n - 1] - grid.first[n - 2] : 1;
  return [...grid.first.map((s) => s - 0.5), Math.max(grid.last[n - 1] + 0.5, grid.first[n - 1] - 0.5 + Math.min(gap, 10))];
}

const RAMP = 0.96, GAP = 0.98; // of the colour scale: finite numbers end at the one, the colour of what is not finite begins at the other

async function drawHeat() {
  const grid = gridOf();
  if (!grid) return;
  const numbers = ready.get(grid.block) || (await numbersOf(grid)), scale = scaleOf(grid, numbers), { axis, layout } = base();
  layout.shapes = [];
  const R = grid.rows.length, z = [], margin = { l: leftMargin(), r: narrow() ? 8 : 14, t: 6, b: 40 };
  view.columns = columnsOf(grid, (view.width || $("heat").clientWidth) - margin.l - margin.r);
  const rows = view.rows || [R - 0.5, -0.5], height = Math.min(640, Math.max(170, 20 * R + 52));
  const shared = view.shared = Math.ceil(Math.abs(rows[0] - rows[1]) / (height - 52)); // rows that share a line: more than there are pixels would hide each other
  const top = scale.low + (scale.high - scale.low) / RAMP; // the scale's last piece is for what is not finite
  for (let first = 0; first < R; first += shared) {
    const line = new Float64Array(view.columns.length).fill(NaN);
    for (let c = 0; c < line.length; c++) {
      const [low, high, flags] = cellOf(grid, numbers, first, shared, view.columns[c]);
      if (flags) line[c] = top;
      else if (!Number.isNaN(low)) line[c] = Math.min(scale.high, Math.max(scale.low, scale.to(pick(grid, low, high))));
    }
    z.push(line);
  }
  const bounds = [...z.map((_, k) => k * shared - 0.5), R - 0.5], sides = edges(grid), x = [...view.columns.map(([from]) => sides[from]), sides.at(-1)];
  const colours = [...scale.colours.map(([at, colour]) => [at * RAMP, colour]), [GAP, scale.colours.at(-1)[1]], [GAP, token("lost")], [1, token("lost")]];
  const traces = [{ type: "heatmap", x, y: bounds, z, zmin: scale.low, zmax: top, colorscale: colours, showscale: false, hoverinfo: "none", hoverongaps: false, name: "cells" }];
  const marks = data.runs[view.run].marks.filter((m) => grid.rows.includes(m.row));
  if (marks.length) traces.push({ type: "scatter", mode: "markers+text", x: marks.map((m) => m.step), y: marks.map((m) => grid.rows.indexOf(m.row)), text: marks.map((m) => m.id), textfont: { color: token("surface"), size: 10 },
    customdata: marks.map((m) => m.id), name: "marks", hovertext: marks.map((m) => `<b>${escapeText(m.diagnosis)}</b>, step ${m.step}<br>${fold(m.text)}<br><i>click for its story</i>`), hoverinfo: "text",
    marker: { size: marks.map((m) => (m.severity === "warning" ? 21 : 17)), opacity: 1, symbol: marks.map((m) => SYMBOLS[m.severity]), color: marks.map((m) => token(m.severity)), line: { width: 1.5, color: token("surface") } } });
  const lost = brokenRows(grid, numbers), least = Math.max(0, R / 400 - 0.5), marked = new Uint8Array(R);
  for (const { row } of lost) marked[row] = 1;
  for (let r = 0; R > 60 && r < R; r++) { // beside a narrow column of NaN stands a mark that is wide enough to be seen
    if (!marked[r]) continue;
    const from = r;
    while (marked[r + 1]) r++;
    layout.shapes.push({ type: "rect", xref: "paper", x0: -0.008, x1: -0.001, y0: from - 0.5 - least, y1: r + 0.5 + least, fillcolor: token("lost"), line: { width: 0 } });
  }
  const space = Math.max(1, Math.ceil((Math.abs(rows[0] - rows[1]) * 14) / (height - 52))), ticks = [];
  for (let r = Math.max(0, Math.ceil(rows[1])); r <= Math.min(R - 1, rows[0]); r += space) ticks.push(r);
  Object.assign(layout, {
    height, margin, plot_bgcolor: token("unseen"),
    xaxis: { ...axis, range: shownSteps(), showgrid: false, title: { ...axis.title, text: "step" }, ticks: "outside", exponentformat: "none", nticks: narrow() ? 5 : 10 },
    yaxis: { ...axis, range: rows, showgrid: false, tickvals: ticks, ticktext: ticks.map((r) => escapeText(shortNames(grid)[r])), tickfont: { color: token("muted"), size: 11 } },
  });
  $("heat").style.height = height + "px";
  heatWords(grid, scale, lost);
  await Plotly.react("heat", traces, layout, config);
  placeCursor();
  if ($("heat-table").open) fillTable();
}

// What a cell holds, told where the pointer is: texts for all cells would cost more than the drawing.
async function tip(event) {
  const point = event.points.find((p) => p.data.name === "cells"), box = $("tip");
  if (!point) return void (box.hidden = true);
  const grid = gridOf(), [line, c] = point.pointNumber;
  showTip(cellWords(grid, await numbersOf(grid), line * view.shared, view.columns[c]), event.event.clientX, event.event.clientY);
}

// A cell in words: its rows, its numbers, its steps.
function cellWords(grid, numbers, r, columns) {
  const end = Math.min(r + view.shared, grid.rows.length) - 1, [low, high, flag] = cellOf(grid, numbers, r, view.shared, columns), first = grid.first[columns[0]], last = grid.last[columns[1] - 1];
  const values = [flagNames(flag), Number.isNaN(low) ? "" : low === high ? say(low) : `${say(low)} to ${say(high)}`].filter(Boolean).join(", ");
  return [end > r ? `${grid.rows[r]} to ${grid.rows[end]}` : grid.rows[r], values || "not measured", first === last ? `step ${first}` : `steps ${first} to ${last}`];
}

function showTip([head, ...rest], x, y) {
  const box = $("tip"), name = document.createElement("b");
  name.textContent = head;
  box.replaceChildren(name, ...rest.flatMap((words) => [document.createElement("br"), words]));
  box.hidden = false;
  box.style.left = Math.max(4, Math.min(window.innerWidth - box.offsetWidth - 8, x + 14)) + "px";
  box.style.top = Math.max(4, y - box.offsetHeight - 12) + "px";
}

// The pointer's cell is forgotten as well: Plotly tells of a cell only when it is entered, and the next movement within it shall show it again. Before the first drawing there is none.
function hideTip() {
  $("tip").hidden = true;
  if ($("heat").data) Plotly.Fx.unhover("heat");
}

// The rows that hold a number that is not finite, the earliest first.
function brokenRows(grid, numbers) {
  const C = grid.first.length, found = [];
  for (let row = 0; grid.flagged && row < grid.rows.length; row++) {
    const c = numbers.flags.subarray(row * C, (row + 1) * C).findIndex(Boolean);
    if (c >= 0) found.push({ row, c, step: grid.first[c], last: grid.last[c] });
  }
  return found.sort((a, b) => a.c - b.c);
}

function heatWords(grid, scale, lost) {
  $("heat-about").textContent = grid.about;
  const span = (style, words, cls) => { const s = document.createElement("span"), i = document.createElement("i"); i.className = cls; i.style.cssText = style; s.append(i, words); return s; };
  const bar = document.createElement("span");
  const strip = Object.assign(document.createElement("i"), { className: "ramp" });
  strip.style.background = `linear-gradient(90deg, ${scale.colours.map((c) => c[1]).join(",")})`;
  bar.append(scale.ends[0], strip, scale.ends[1]);
  $("legend").replaceChildren(bar, ...(scale.middle ? [`middle: ${scale.middle}`] : []), span(`background:${token("lost")}`, grid.flagged ? "NaN or infinite" : "NaN or infinite: none", "swatch"), span(`background:${token("unseen")}`, "not measured", "swatch"));
  $("heat-note").textContent = `${grid.rows.length} rows. ` + (view.shared > 1 ? `${view.shared} neighbours share a line, which shows the worst of them; zoom in to part them. ` : "") + (grid.most > 1 ? `A cell holds up to ${grid.most} sampled steps and shows ${$("shows").selectedOptions[0].textContent} of them.` : "Each column is one sampled step.")
    + (view.columns.length < grid.first.length ? " Columns too narrow to be drawn stand together, and show the worst of them." : "")
    + (sharedParts(grid) ? ` All names begin with ${grid.rows[0].split(".").slice(0, sharedParts(grid)).join(".")}.` : "")
    + (lost.length ? ` Not finite in ${lost.length} row${lost.length > 1 ? "s" : ""}, first in ${grid.rows[lost[0].row]}, step${lost[0].step === lost[0].last ? ` ${lost[0].step}` : `s ${lost[0].step} to ${lost[0].last}`}.` : "");
  $("shows").disabled = grid.most <= 1;
  $("heat").setAttribute("aria-label", `${grid.title}: ${$("heat-note").textContent} Arrow keys go from cell to cell, plus and minus zoom, 0 shows all.`);
}

// ---- controls

function option(value, words) { return Object.assign(document.createElement("option"), { value, textContent: words }); }

function chooseRun(run) {
  view.run = run;
  view.rows = null;
  const grids = data.runs[run].grids;
  $("run").value = String(run);
  $("signal").replaceChildren(...grids.map((g) => option(g.signal, g.title)));
  if (!grids.some((g) => g.signal === view.signal)) view.signal = grids.length ? grids[0].signal : null;
  if (view.signal) $("signal").value = view.signal;
}

let drawing = Promise.resolve();
function redraw(...parts) {
  drawing = drawing.then(async () => { for (const part of parts) await part(); }).catch(fail);
  return drawing;
}

function setRange(range) {
  const [low, high] = whole();
  view.range = range && (range[0] > low || range[1] < high) ? [Math.max(low, range[0]), Math.min(high, range[1])] : null;
  return redraw(drawLoss, drawHeat);
}

function zoom(how) {
  const [a, b] = shownSteps(), width = b - a, [low, high] = whole();
  if (how === "all") { view.rows = null; return setRange(null); }
  if (how === "in") return width < 6 ? null : setRange([a + width / 4, b - width / 4]);
  if (how === "out") return setRange([a - width / 2, b + width / 2]);
  const by = Math.max(low - a, Math.min(high - b, (how === "left" ? -1 : 1) * width / 2));
  return setRange([a + by, b + by]);
}

function listen(chart) {
  chart.on("plotly_relayout", (change) => {
    if (chart.id === "heat" && "yaxis.range[0]" in change) view.rows = [change["yaxis.range[0]"], change["yaxis.range[1]"]];
    if ("xaxis.range[0]" in change) setRange([change["xaxis.range[0]"], change["xaxis.range[1]"]]);
    else if ("yaxis.range[0]" in change) redraw(drawHeat);
  });
  if (chart.id === "heat") {
    chart.on("plotly_hover", tip);
    chart.on("plotly_unhover", () => { $("tip").hidden = true; });
    window.addEventListener("scroll", () => { if (cursor.on) placeCursor(); else hideTip(); }, { passive: true });
  }
  chart.on("plotly_doubleclick", () => zoom("all"));
  chart.on("plotly_click", (event) => {
    const point = event.points.find((p) => p.data.name === "marks");
    if (point) tell(point.customdata);
    else if (event.points.some((p) => p.data.name === "events")) $("done-title").scrollIntoView();
  });
}

function tell(id) {
  const story = $("f" + id);
  history.replaceState(null, "", "#f" + id);
  document.querySelectorAll(".story.here").forEach((s) => s.classList.remove("here"));
  story.classList.add("here");
  story.scrollIntoView();
  story.focus({ preventScroll: true });
}

function show(id) {
  const run = data.runs.findIndex((r) => r.marks.some((m) => m.id === id)), mark = data.runs[run].marks.find((m) => m.id === id);
  view.signal = mark.signal;
  chooseRun(run);
  const grid = gridOf(), row = grid.rows.indexOf(mark.row), half = Math.max(30, (mark.last || mark.step) - mark.step);
  if (row >= 0 && grid.rows.length > 24) view.rows = [Math.min(grid.rows.length - 0.5, row + 8.5), Math.max(-0.5, row - 8.5)];
  setRange([mark.step - half, Math.max(mark.last || 0, mark.step) + half]);
  $("heat-card").scrollIntoView();
  $("signal").focus({ preventScroll: true });
}

function setTheme(name, keep) {
  document.documentElement.dataset.theme = name;
  $("theme").setAttribute("aria-pressed", String(name === "dark"));
  if (keep) { try { localStorage.setItem("lossguard-theme", name); } catch { /* a file may have no storage */ } }
}

function wire() {
  $("theme").addEventListener("click", () => { setTheme(dark() ? "light" : "dark", true); lossKey(); redraw(drawLoss, drawHeat); });
  document.querySelectorAll("input[name=scale]").forEach((input) => input.addEventListener("change", () => { view.scale = input.value; redraw(drawLoss); }));
  document.querySelectorAll("[data-zoom]").forEach((button) => button.addEventListener("click", () => zoom(button.dataset.zoom)));
  document.querySelectorAll("[data-mark]").forEach((button) => button.addEventListener("click", () => show(button.dataset.mark)));
  document.querySelectorAll(".index a").forEach((link) => link.addEventListener("click", (event) => { event.preventDefault(); tell(link.hash.slice(2)); }));
  $("run").addEventListener("change", () => { chooseRun(Number($("run").value)); redraw(drawLoss, drawHeat); });
  $("signal").addEventListener("change", () => { view.signal = $("signal").value; view.rows = null; redraw(drawLoss, drawHeat); });
  $("shows").addEventListener("change", () => { view.shows = $("shows").value; redraw(drawHeat); });
  wireKeys();
  let waiting = null, width = window.innerWidth;
  window.addEventListener("resize", () => { if (window.innerWidth !== width) { width = window.innerWidth; clearTimeout(waiting); waiting = setTimeout(() => redraw(drawLoss, drawHeat), 150); } });
  let before = null; // on paper: light, as wide as a page
  window.addEventListener("beforeprint", () => { before = document.documentElement.dataset.theme; view.width = 660; setTheme("light"); lossKey(); drawLoss(); drawHeat(); });
  window.addEventListener("afterprint", () => { view.width = undefined; setTheme(before); lossKey(); redraw(drawLoss, drawHeat); });
}

function fail(error) {
  document.querySelectorAll(".chart .wait").forEach((p) => { p.textContent = `The charts could not be drawn: ${error.message}.`; });
  console.error(error);
}

async function begin() {
  document.querySelectorAll(".chart .wait").forEach((p) => { p.textContent = "Drawing…"; });
  $("run-label").hidden = !several;
  $("run").replaceChildren(...data.runs.map((r, k) => option(String(k), `${"AB"[k]} ${r.label}`)));
  const marks = data.runs.flatMap((r, k) => r.marks.filter((m) => m.signal && m.severity !== "info").map((m) => ({ ...m, run: k })));
  if (marks.length) view.signal = marks[0].signal;
  chooseRun(marks.length && several ? marks[0].run : 0);
  if (!view.signal) $("heat-card").hidden = true;
  const shown = data.runs.flatMap((r) => (r.curves[0] ? r.curves[0].high || r.curves[0].middle : [])).filter((v) => v !== null);
  const least = shown.reduce((a, b) => Math.min(a, b), Infinity), most = shown.reduce((a, b) => Math.max(a, b), -Infinity);
  if (least > 0 && most / least > 100) { view.scale = "log"; document.querySelector("input[value=log]").checked = true; }
  lossKey();
  wire();
  if (view.signal) numbersOf(gridOf()).catch(() => {}); // meanwhile; a failure is told where the numbers are drawn
  await library;
  document.querySelectorAll(".chart .wait").forEach((p) => p.remove());
  await drawLoss();
  performance.mark("lossguard-loss");
  listen($("loss"));
  if (view.signal) { await drawHeat(); listen($("heat")); }
  document.documentElement.dataset.drawn = "yes";
  requestAnimationFrame(() => setTimeout(() => performance.mark("lossguard-drawn"))); // behind the frame that shows both charts
}

let kept = null;
try { kept = localStorage.getItem("lossguard-theme"); } catch { /* as above */ }
setTheme(kept || (window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
begin().catch(fail);
