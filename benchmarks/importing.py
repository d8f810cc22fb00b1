"""What `import lossguard` adds to `import torch`: seconds in fresh processes, and the packages it brings along.

    python benchmarks/importing.py [--runs 9]

The bound is 0.3 s. Each run is a new process that imports torch and numpy first, so that only what is ours is timed.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

BOUND = 0.3  # seconds
CODE = """
import time, sys, torch, numpy
before, begin = set(sys.modules), time.perf_counter()
import lossguard
print(time.perf_counter() - begin, len(set(sys.modules) - before), *sorted({m.partition('.')[0] for m in set(sys.modules) - before}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    answers = [subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True).stdout.split() for _ in range(runs + 1)]
    times = [float(a[0]) for a in answers[1:]]  # the first may have compiled
    median = statistics.median(times)
    print(f"import lossguard after torch: median {median:.3f} s of {runs} runs (least {min(times):.3f}, most {max(times):.3f}; bound {BOUND})")
    print(f"modules new: {answers[-1][1]}; top-level packages: {' '.join(answers[-1][2:])}")
    return 0 if median <= BOUND else 1


if __name__ == "__main__":
    raise SystemExit(main())
