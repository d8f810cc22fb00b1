// The heat map without a mouse: a cursor that goes from cell to cell, and a table of the same numbers.
const cursor = { row: 0, column: 0, on: false };

function wireKeys() {
  const heat = $("heat");
  heat.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], PageUp: [-10, 0], PageDown: [10, 0] }[event.key];
    const zoomed = { "+": "in", "=": "in", "-": "out", 0: "all" }[event.key];
    if (event.key === "Escape") return leaveCursor();
    if (event.ctrlKey || event.metaKey || event.altKey || !(move || zoomed)) return;
    event.preventDefault();
    if (move) moveCursor(...move);
    else zoomCursor(zoomed);
  });
  heat.addEventListener("blur", leaveCursor);
  $("heat-table").addEventListener("toggle", () => { if ($("heat-table").open) fillTable(); });
}

function leaveCursor() {
  cursor.on = false;
  hideTip();
  placeCursor();
}

const groupOf = (column) => view.columns.findIndex(([, until]) => column < until);
const clamp = (v, low, high) => Math.max(low, Math.min(high, v));

function moveCursor(down, right) {
  const grid = gridOf(), shared = view.shared, last = grid.rows.length - 1, [from, to] = shownSteps();
  if (cursor.on) {
    cursor.row = clamp(Math.floor(cursor.row / shared) * shared + down * shared, 0, Math.floor(last / shared) * shared);
    cursor.column = view.columns[clamp(groupOf(cursor.column) + right, 0, view.columns.length - 1)][0];
  } else { // where the eye begins: the upper left cell of what is shown
    cursor.on = true;
    cursor.row = Math.floor(clamp(Math.ceil(view.rows ? view.rows[1] : 0), 0, last) / shared) * shared;
    cursor.column = clamp(grid.last.findIndex((s) => s >= from), 0, grid.first.length - 1);
  }
  const bounds = edges(grid), [begin, end] = view.columns[groupOf(cursor.column)].map((c) => bounds[c]);
  if (view.rows && (cursor.row < view.rows[1] || cursor.row > view.rows[0])) {
    const by = cursor.row < view.rows[1] ? cursor.row - 0.5 - view.rows[1] : cursor.row + shared - 0.5 - view.rows[0];
    view.rows = [view.rows[0] + by, view.rows[1] + by];
  }
  if (begin < from) setRange([begin, begin + to - from]);
  else if (end > to) setRange([end - to + from, end]);
  else if (view.rows) redraw(drawHeat);
  redraw(placeCursor); // behind what was asked for before
}

function zoomCursor(how) {
  const grid = gridOf(), R = grid.rows.length;
  if (how === "all" || !cursor.on) return zoom(how);
  const rows = view.rows || [R - 0.5, -0.5], [from, to] = shownSteps(), factor = how === "in" ? 0.25 : 1;
  const half = { steps: (to - from) * factor, rows: Math.max(4, (rows[0] - rows[1]) * factor) }, at = (grid.first[cursor.column] + grid.last[cursor.column]) / 2;
  const top = clamp(cursor.row - half.rows, -0.5, R - 0.5), bottom = clamp(cursor.row + half.rows, -0.5, R - 0.5);
  view.rows = top <= -0.5 && bottom >= R - 0.5 ? null : [bottom, top];
  return half.steps < 2 ? redraw(drawHeat) : setRange([at - half.steps, at + half.steps]);
}

// A frame around the cell, over the drawing: drawing all anew for every key would be slow.
async function placeCursor() {
  const box = $("cursor") || $("heat").appendChild(Object.assign(document.createElement("div"), { id: "cursor" })), grid = gridOf(), full = $("heat")._fullLayout;
  box.hidden = !cursor.on || !full;
  if (box.hidden) return;
  cursor.row = Math.floor(clamp(cursor.row, 0, grid.rows.length - 1) / view.shared) * view.shared;
  cursor.column = clamp(cursor.column, 0, grid.first.length - 1);
  const bounds = edges(grid), columns = view.columns[groupOf(cursor.column)], { xaxis, yaxis, _size } = full, inside = (v, axis) => clamp(v, 0, axis._length);
  const [x0, x1] = columns.map((c) => _size.l + inside(xaxis.d2p(bounds[c]), xaxis));
  const [y0, y1] = [cursor.row - 0.5, Math.min(cursor.row + view.shared, grid.rows.length) - 0.5].map((v) => _size.t + inside(yaxis.d2p(v), yaxis));
  Object.assign(box.style, { left: x0 + "px", top: y0 + "px", width: Math.max(2, x1 - x0) + "px", height: Math.max(2, y1 - y0) + "px" });
  const words = cellWords(grid, await numbersOf(grid), cursor.row, columns), place = box.getBoundingClientRect();
  $("heat-say").textContent = words.join(", ");
  showTip(words, place.right, place.top);
}

// One line a row: where it began and ended in the steps shown, its extremes, and since when it is not finite.
async function fillTable() {
  const grid = gridOf(), numbers = await numbersOf(grid), C = grid.first.length, [from, to] = shownSteps(), body = document.createElement("tbody");
  const columns = [...grid.first.keys()].filter((c) => grid.last[c] >= from && grid.first[c] <= to);
  const cell = (tag, words) => Object.assign(document.createElement(tag), { textContent: words });
  grid.rows.forEach((name, r) => {
    let [low, high, first, last, lost] = [NaN, NaN, NaN, NaN, -1];
    for (const c of columns) {
      const i = r * C + c;
      if (numbers.flags[i] && lost < 0) lost = c;
      if (Number.isNaN(numbers.low[i])) continue;
      if (!(low <= numbers.low[i])) low = numbers.low[i];
      if (!(high >= numbers.high[i])) high = numbers.high[i];
      if (Number.isNaN(first)) first = pick(grid, numbers.low[i], numbers.high[i]);
      last = pick(grid, numbers.low[i], numbers.high[i]);
    }
    const line = document.createElement("tr"), head = cell("th", name), broken = cell("td", lost < 0 ? "" : `from step ${grid.first[lost]} on`);
    head.scope = "row";
    broken.className = "broken";
    line.append(head, ...[first, last, low, high].map((v) => cell("td", say(v))), broken);
    body.append(line);
  });
  const table = document.createElement("table"), heads = document.createElement("tr"), top = document.createElement("thead");
  heads.append(...["Row", "First", "Last", "Least", "Greatest", "Not finite"].map((words) => Object.assign(cell("th", words), { scope: "col" })));
  top.append(heads);
  table.append(top, body);
  document.querySelector("#heat-table .scroll").replaceChildren(table);
}
