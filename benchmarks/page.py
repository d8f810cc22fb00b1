"""How large the page of a long run of a deep model is, how long it takes to write, and how long a browser takes to draw it.

    OMP_NUM_THREADS=1 python benchmarks/page.py                 # 100,000 steps, 500 layers, a sample every 10 steps; some minutes, 0.5 GB of disk
    OMP_NUM_THREADS=1 python benchmarks/page.py --folder runs/big --keep      # write the record once, measure it again later

The record is written by the library's own writer from seeded, made-up numbers: a loss that falls with noise and two spikes,
norms that drift apart over the depth, each layer with a noise of its own, dead units that grow, and an end of NaN. What is timed:

    record    making and writing it (not judged)
    report    ``python -m lossguard report``, a process of its own, from start to end
    file      bytes, and the share of the plotting library
    drawn     navigation until both charts are drawn and a frame after that was painted, in a fresh headless chromium each time
    processor what the page's main thread has computed until then, which other processes on the machine do not add to

It fails where the page takes 3 s to draw or 10 MB: the least of ``--times`` counts, as other processes only ever add.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from lossguard import Evidence, Finding, Severity
from lossguard.findings import Cause, Remedy
from lossguard.host.history import History, Param, Sample, Unit
from lossguard.sinks import Record

SECONDS, MEGABYTES = 3.0, 10.0  # the bars
SWITCHES = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync"
PAINTED = """() => { const mark = performance.getEntriesByName('lossguard-drawn')[0], paint = performance.getEntriesByName('first-contentful-paint')[0];
    const share = (name) => performance.getEntriesByName('lossguard-' + name)[0]?.startTime;
    return { paint: paint?.startTime, library: share('library'), loss: share('loss'), drawn: mark?.startTime }; }"""


def losses_of(rng: np.random.Generator, steps: int) -> np.ndarray:
    """A loss that falls from 7 to 2 with noise of 3 %, two spikes, and NaN in the last 20 steps."""
    now = np.arange(steps)
    losses = (2.0 + 5.0 * np.exp(-now / (steps / 8))) * np.exp(0.03 * rng.standard_normal(steps))
    losses[int(0.4 * steps)] *= 6.0
    losses[int(0.7 * steps)] *= 9.0
    losses[-20:] = np.nan
    return losses


def write_record(folder: Path, steps: int, layers: int, every: int, seed: int) -> None:
    """A record of ``layers`` linear layers (a weight and a bias each) and as many ReLU."""
    rng = np.random.default_rng(seed)
    names = [f"model.decoder.blocks.{k}.mlp.fc" for k in range(layers)]
    params = [Param(f"{n}.{part}", 4096, kind, module="Linear") for n in names for part, kind in (("weight", "matrix"), ("bias", "vector"))]
    history = History(losses=8, samples=2, params=params)
    history.units = [Unit(f"{n}.act", "ReLU", 64) for n in names]
    wide, sites, units = len(params), np.arange(len(params)), np.arange(layers)
    depth = np.repeat(np.linspace(-1.0, 1.0, layers), 2)
    losses = losses_of(rng, steps)
    record = Record(folder, {"torch": "synthetic", "model": "Decoder", "every": every})
    for step in range(0, steps, every):
        record.losses(step, losses[step : step + every].tolist(), {})
        share = step / steps
        grads = np.exp(-1.5 + 2.0 * share * depth + 0.3 * rng.standard_normal(wide))
        weights = np.exp(1.0 + 0.4 * share + 0.05 * depth + 0.001 * rng.standard_normal(wide))
        updates = weights * np.exp(np.log(1e-3) - 2.0 * share + 0.25 * rng.standard_normal(wide))
        if np.isnan(losses[step]):
            grads[wide // 2 :] = np.nan
        scales = np.exp(0.6 * share * depth[::2] + 0.05 * rng.standard_normal(layers))
        dead = np.clip(share * np.linspace(0, 0.6, layers) + 0.02 * rng.standard_normal(layers), 0.0, 1.0)
        values = {"grad_norm": (sites, grads), "weight_norm": (sites, weights), "update_norm": (sites, updates)}
        values |= {"activation_rms": (units, scales), "dead_fraction": (units, dead)}
        record.sample(Sample(step, values, {"lr": 1e-3}), history)
        if step and step % (steps // 50) < every:
            record.validation(step, 1.05 * float(np.nanmedian(losses[max(0, step - 100) : step + 1])))
    found = [told("loss_spike", Severity.WARNING, int(0.4 * steps), "loss"), told("dead_relu", Severity.ERROR, int(0.8 * steps), f"{names[-1]}.act (ReLU)"),
             told("nonfinite_loss", Severity.HALT, steps - 20, "loss")]  # fmt: skip
    about: dict[str, Any] = {"model": "Decoder", "optimizers": ["AdamW"], "devices": ["cuda:0"], "dtypes": ["float32"], "tensors": wide, "steps": steps}
    record.summary(found, {**about, "every": every, "halted": True, "ended": time.time()}, {"observed": {"grad_norm": wide}, "not_observed": {}})
    record.close()


def told(diagnosis: str, severity: Severity, step: int, where: str) -> Finding:
    return Finding(diagnosis, severity, step, where, "made up for the benchmark", (Evidence("made-up number", 9.0, 3.0),),
                   (Cause("made up", 0.5, "it is a benchmark"),), (Remedy("nothing"),))  # fmt: skip


def write_page(folder: Path, page: Path) -> float:
    """Seconds that the command takes."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "lossguard", "report", str(folder), "-o", str(page)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def open_page(page: Path, width: int, theme: str) -> dict[str, float]:
    """Milliseconds from navigation to the marks that the page sets, and to the frame after both charts were drawn; and of computing."""
    from playwright.sync_api import sync_playwright

    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=SWITCHES.split())
        tab = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
        session = tab.context.new_cdp_session(tab)
        session.send("Performance.enable", {"timeDomain": "threadTicks"})
        tab.goto(page.as_uri(), wait_until="commit")
        tab.wait_for_function("performance.getEntriesByName('lossguard-drawn').length", timeout=120_000)
        spent = {metric["name"]: metric["value"] for metric in session.send("Performance.getMetrics")["metrics"]}
        marks: dict[str, float] = {**tab.evaluate(PAINTED), "processor": 1e3 * spent["ThreadTime"]}
        chromium.close()
    return marks


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="the page of a long run of a deep model: bytes and seconds")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--layers", type=int, default=500)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--times", type=int, default=5, help="how often the page is opened")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the record is, or goes")
    parser.add_argument("--keep", action="store_true", help="leave the record there")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "record"
        if not (folder / "rows.jsonl").exists():
            began = time.perf_counter()
            write_record(folder, options.steps, options.layers, options.every, options.seed)
            print(f"record   {time.perf_counter() - began:.1f} s to write, {sum(f.stat().st_size for f in folder.glob('*.jsonl')) / 1e6:.0f} MB")
        page = Path(scratch) / "report.html"
        took, size = write_page(folder, page), 0
        text = page.read_text(encoding="utf-8")
        size, library = len(text.encode()), len(text.partition('id="library">')[2].partition("</script>")[0])
        print(f"report   {took:.1f} s")
        print(f"file     {size / 1e6:.2f} MB, of which the plotting library {library / 1e6:.2f} MB")
        opened = []
        for k in range(options.times):
            opened.append(open_page(page, 1280 if k % 2 == 0 else 390, "light" if k % 2 == 0 else "dark"))
            shown = ", ".join(f"{name} {value:.0f}" for name, value in opened[-1].items())
            print(f"opened   {shown} ms; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        least, computed = (min(marks[name] for marks in opened) / 1e3 for name in ("drawn", "processor"))
        print(f"least    drawn in {least:.2f} s, {computed:.2f} s of computing on the main thread")
        if options.folder and not options.keep:
            shutil.rmtree(options.folder)
    good = least < SECONDS and size < MEGABYTES * 1e6
    print("within the bars" if good else f"over a bar: {SECONDS:g} s, {MEGABYTES:g} MB")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
