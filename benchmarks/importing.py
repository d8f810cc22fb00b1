"""What `import lossguard` adds to `import torch`: seconds in fresh processes, and the packages it brings along.

    python benchmarks/importing.py [--runs 9]

The bound is 0.3 s. Each run is a new process that imports torch and numpy first, so that only what is ours is timed. The
bytecode is compiled beforehand, as pip does when it installs; the time of the processor is told too, which a busy machine
disturbs less.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

BOUND = 0.3  # seconds
CODE = """
import time, sys, torch, numpy
before, begin, busy = set(sys.modules), time.perf_counter(), time.process_time()
import lossguard
seconds, busy, new = time.perf_counter() - begin, time.process_time() - busy, set(sys.modules) - before
print(seconds, busy, len(new), *sorted({m.partition('.')[0] for m in new}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as cache:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {"PYTHONPYCACHEPREFIX": cache}
        command = [sys.executable, "-c", CODE]
        answers = [subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split() for _ in range(runs + 1)]
    times, busy = [float(a[0]) for a in answers[1:]], [float(a[1]) for a in answers[1:]]  # the first compiles
    median = statistics.median(times)
    print(f"import lossguard after torch: median {median:.3f} s of {runs} runs (least {min(times):.3f}, most {max(times):.3f}; bound {BOUND})")
    print(f"time of the processor: median {statistics.median(busy):.3f} s")
    print(f"modules new: {answers[-1][2]}; top-level packages: {' '.join(answers[-1][3:])}")
    return 0 if median <= BOUND else 1


if __name__ == "__main__":
    raise SystemExit(main())
