"use strict";
// Compressed blocks of the page, unpacked when they are needed; the plotting library at once, while the rest of the page is still read.
const $ = (id) => document.getElementById(id);

async function unpack(name) {
  if (typeof DecompressionStream === "undefined") throw new Error("this browser is too old to unpack the charts; the findings below are complete");
  const packed = await fetch("data:application/octet-stream;base64," + $(name).textContent); // from this page itself
  return new Response(packed.body.pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

// As a file of its own, so that the browser compiles it beside what else is done here.
async function loadLibrary() {
  const address = URL.createObjectURL(new Blob([await unpack("library")], { type: "text/javascript;charset=utf-8" }));
  const script = document.createElement("script");
  await new Promise((done, refuse) => {
    script.onload = done;
    script.onerror = () => refuse(new Error("the plotting library could not be read"));
    script.src = address;
    document.head.append(script);
  });
  URL.revokeObjectURL(address);
}

const library = loadLibrary().then(() => performance.mark("lossguard-library"));
library.catch(() => {}); // told where the charts are drawn

// A grid's numbers: low and high (the same where a bucket holds one sample), and flags: 1 NaN, 2 +Inf, 4 -Inf. By site, then bucket.
const unpacked = new Map(), ready = new Map(); // promises of numbers, and the numbers once they are there
function numbersOf(grid) {
  if (!unpacked.has(grid.block)) {
    unpacked.set(grid.block, unpack(grid.block).then((buffer) => {
      const n = grid.rows.length * grid.first.length;
      const low = new Float32Array(buffer, 0, n);
      const high = grid.same ? low : new Float32Array(buffer, 4 * n, n);
      const flags = grid.flagged ? new Uint8Array(buffer, (grid.same ? 4 : 8) * n, n) : new Uint8Array(n);
      ready.set(grid.block, { low, high, flags });
      return ready.get(grid.block);
    }));
  }
  return unpacked.get(grid.block);
}

function say(x) {
  if (x === null || Number.isNaN(x)) return "–";
  if (x === 0) return "0";
  const a = Math.abs(x);
  return a >= 1e5 || a < 1e-3 ? x.toExponential(2).replace(/\.?0*e\+?/, "e") : String(Number(x.toPrecision(4)));
}

const flagNames = (f) => [f & 1 && "NaN", f & 2 && "+Inf", f & 4 && "−Inf"].filter(Boolean).join(", ");
const token = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const dark = () => document.documentElement.dataset.theme === "dark";
