"""What judging costs on the host: all rules over one new sampled row, without a model or a device.

    python benchmarks/judging.py                      # 30, 300 and 3000 parameter tensors
    python benchmarks/judging.py --rules              # and each rule by itself, for 300

A calm run is made up (losses that fall with noise, gradients, weights and updates of healthy sizes), for a finding costs
what it costs. A number is the median over samples, in microseconds; taking a row in and judging it are told apart.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from lossguard.host.history import History, Param, Sample
from lossguard.rules import RULES
from lossguard.rules.judge import Judge

EVERY, WARM_UP, SAMPLES = 10, 60, 200


def calm(tensors: int, step: int, noise: np.random.Generator) -> Sample:
    """One sampled row of a healthy network of ``tensors`` weights and biases, with a ReLU for each pair."""
    sites, units, one = np.arange(tensors), np.arange(tensors // 2), np.zeros(1, dtype=np.intp)
    matrix = sites % 2 == 0

    def around(value: Any, n: int) -> Any:
        return value * np.exp(0.1 * noise.standard_normal(n))

    weights = np.where(matrix, 8.0, 0.3)
    values = {
        "grad_norm": (sites, around(np.where(matrix, 0.02, 0.005), tensors)),
        "weight_norm": (sites, around(weights, tensors)),
        "update_norm": (sites, around(1e-3 * weights, tensors)),
        "activation_rms": (units, around(1.0, tensors // 2)),
        "sample_spread": (units, around(0.7, tensors // 2)),
        "sample_size": (units, around(1.4, tensors // 2)),
        "zero_fraction": (units, around(0.5, tensors // 2)),
        "dead_fraction": (units, np.full(tensors // 2, 0.01)),
        "clip_coefficient": (one, np.ones(1)),
        "input_rms": (one, around(1.0, 1)),
        "logit_peak": (one, around(5.0, 1)),
        "confident_fraction": (one, around(0.3, 1)),
        "log_normalizer": (one, around(3.0, 1)),
        "labelled_fraction": (one, np.ones(1)),
        "nll_part": (one, around(1.0, 1)),
        "wrong_part": (one, np.full(1, 0.01)),
    }
    return Sample(step, values, {"lr": 1e-3, "stepped": 1.0, "adam_eps": 1e-8, "optimizer_name": "AdamW", "batch": step})


def model(tensors: int) -> History:
    kinds = ("matrix", "vector")
    params = [Param(f"layers.{i // 2}.{('weight', 'bias')[i % 2]}", (4096, 64)[i % 2], kinds[i % 2], 0, module="Linear") for i in range(tensors)]
    history = History(params=params)
    history.name_units([(f"layers.{i}.act", "ReLU", 64) for i in range(tensors // 2)])
    history.heads = ["loss"]
    history.loss_family = "cross_entropy"
    return history


def measure(tensors: int) -> tuple[float, float, dict[str, float], list[str]]:
    """Microseconds to take a row in, to judge it, and of each rule; and what was found, which should be nothing."""
    noise, history = np.random.default_rng(0), model(tensors)
    rules = [make() for make in RULES.values()]
    judge, of_rules = Judge(rules), timed(rules)
    taken, judged = [], []
    for step in range(0, EVERY * (WARM_UP + SAMPLES), EVERY):
        for k in range(EVERY):
            history.add_loss(step + k, (0.3 + 2.0 * 0.999 ** (step + k)) * float(np.exp(0.05 * noise.standard_normal())))
        sample = calm(tensors, step + EVERY - 1, noise)
        start = time.perf_counter()
        history.add_sample(sample)
        between = time.perf_counter()
        judge.observe(history, new_sample=True)
        taken.append(between - start)
        judged.append(time.perf_counter() - between)
    each = {name: 1e6 * median(times[len(times) // 2 :]) for name, times in of_rules.items()}
    return 1e6 * median(taken[WARM_UP:]), 1e6 * median(judged[WARM_UP:]), each, [f.diagnosis for f in judge.findings]


def timed(rules: Sequence[Any]) -> dict[str, list[float]]:
    """Times every question that these rules are asked."""
    took: dict[str, list[float]] = defaultdict(list)

    def watch(rule: Any) -> None:
        check = rule.check

        def asked(history: History) -> Any:
            start = time.perf_counter()
            answer = check(history)
            took[rule.diagnosis].append(time.perf_counter() - start)
            return answer

        object.__setattr__(rule, "check", asked)  # rules are frozen

    for rule in rules:
        watch(rule)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description="host time to take in and judge one sampled row")
    parser.add_argument("--rules", action="store_true", help="each rule by itself, for 300 tensors")
    options = parser.parse_args()
    print(f"{len(RULES)} rules\n\n| tensors | taking a row in, us | judging it, us |\n|---|---|---|")
    each: dict[str, float] = {}
    for tensors in (30, 300, 3000):
        taken, judged, rules, found = measure(tensors)
        print(f"| {tensors} | {taken:.0f} | {judged:.0f} |" + (f" found: {', '.join(found)}" if found else ""), flush=True)
        each = rules if tensors == 300 else each
    if options.rules:
        print("\n| rule, 300 tensors | us |\n|---|---|")
        for name, spent in sorted(each.items(), key=lambda item: -item[1]):
            print(f"| {name} | {spent:.0f} |")


if __name__ == "__main__":
    main()
