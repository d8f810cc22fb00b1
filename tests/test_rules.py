"""Each rule against one ill and one healthy run, both seeded; contracts over the whole registry."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lossguard.findings import DIAGNOSES, Finding, Severity
from lossguard.host.history import History, Param, Sample, Unit
from lossguard.rules import RULES
from lossguard.rules.judge import Judge

PER_PARAMETER = ("grad_norm", "weight_norm", "update_norm", "rounded_away", "gradient_reach", "weight_range")
PER_UNIT = ("activation_rms", "sample_variance", "zero_fraction", "dead_fraction", "saturated_fraction", "activation_reach",
            "attention_logit", "attention_head")  # fmt: skip
PER_HEAD = ("logit_peak", "confident_fraction", "log_normalizer", "confident_wrong", "label_nll")
FEW = ("loss", "validation", "input_rms", "clip_coefficient", "consecutive_skips", "total_skips", "frozen_update", "net_update", "void_update",
       "outside_update", "weight_print")  # fmt: skip
SIGNALS = {*FEW, "squashed", "axis", "paired", "grad_rms", "grad_total", "update_ratio", *PER_PARAMETER, *PER_UNIT, *PER_HEAD}

PARAMS = [
    Param("embed.weight", 32000, "embedding", module="Embedding"),
    Param("layers.0.weight", 4096, "matrix", module="Linear"),
    Param("layers.0.bias", 64, "vector", module="Linear"),
    Param("norm.weight", 64, "norm", module="LayerNorm"),
    Param("layers.1.weight", 4096, "matrix", module="Linear"),
    Param("layers.2.weight", 4096, "matrix", module="Linear"),
    Param("head.weight", 640, "matrix", module="Linear"),
]
UNITS = [("embed", "Embedding"), ("layers.0", "Linear"), ("act.0", "ReLU"), ("norm", "LayerNorm"), ("layers.1", "Linear"),
         ("act.1", "Sigmoid"), ("layers.2", "Linear"), ("act.2", "Tanh"), ("head", "Linear")]  # fmt: skip
WIDTH = {**dict.fromkeys(PER_PARAMETER, len(PARAMS)), **dict.fromkeys(PER_UNIT, len(UNITS)), **dict.fromkeys(PER_HEAD, 2)}
EVALUATED = 20  # steps from one evaluation to the next
Values = dict[str, Any]
Edit = Callable[[int, Values, dict[str, Any]], None]


def sampled(step: int) -> bool:
    """The guard's default: every step at first, every tenth afterwards."""
    return step < 50 or step % 10 == 0


def healthy_step(step: int, rng: np.random.Generator, scale: float) -> tuple[Values, dict[str, Any]]:
    """One step of a run that learns: all signals inside the envelopes of survey."""
    fade, noise = np.exp(-step / 60), lambda n: 1 + 0.1 * rng.standard_normal(n)
    sizes = np.sqrt([p.numel for p in PARAMS])
    relu, rails = np.array([i == 2 for i in range(9)]), np.array([i in (5, 7) for i in range(9)])
    values: Values = {
        "loss": scale * (0.5 + 1.8 * fade) * (1 + 0.08 * rng.standard_normal()),
        "grad_norm": scale * 0.01 * sizes * (0.3 + fade) * noise(7),
        "weight_norm": 0.06 * sizes * (1 + 0.002 * step),
        "update_norm": 0.06 * sizes * 2e-3 * noise(7),
        "activation_rms": 0.8 * noise(9),
        "sample_variance": np.clip(0.2 * noise(9), 0.01, 1),
        "zero_fraction": np.where(relu, 0.6, np.nan),
        "dead_fraction": np.where(relu & (step >= 30), 0.1, np.nan),
        "saturated_fraction": np.where(rails, 0.05, np.nan),
        "logit_peak": 8 * noise(2), "confident_fraction": np.array([0.4, 0.1]) * noise(2), "log_normalizer": 3 * noise(2),
        "confident_wrong": np.array([0.02, np.nan]), "label_nll": np.array([0.5, np.nan]),
        "input_rms": noise(1), "clip_coefficient": np.minimum(1.0, noise(1)), "consecutive_skips": np.zeros(1), "total_skips": np.zeros(1),
        "activation_reach": 0.01 * noise(9), "gradient_reach": 0.001 * noise(7), "rounded_away": np.clip(0.3 * noise(7), 0, 1),
        "weight_range": np.where(np.arange(7) % 2 == 1, 0.3, np.nan), "attention_logit": np.where(np.arange(9) == 4, 3 * noise(9), np.nan),
        "frozen_update": np.full(1, np.nan),
    }  # fmt: skip
    if step % EVALUATED == EVALUATED - 1:
        values["validation"] = scale * (0.55 + 1.8 * fade) * (1 + 0.02 * rng.standard_normal())
    return values, {"lr": 1e-3, "stepped": 1.0, "not_cleared": 0.0, "no_gradient": (), "batch": step, "scaler": 0.0, "optimizer_name": "Adam", "adam_eps": 1e-8}


def new_history(**words: Any) -> History:
    history = History(params=PARAMS, **{"loss_family": "cross_entropy", **words})
    history.units = [Unit(name, kind, 64) for name, kind in UNITS]
    history.heads = ["loss", "attention.0"]
    return history


def feed(history: History, step: int, values: Values, facts: dict[str, Any]) -> None:
    """Hand one step to the history; arrays of NaN sites are given as unseen unless listed in ``facts['measured']``."""
    history.add_loss(step, float(values["loss"]), input_finite=facts.get("input_finite", 1.0), fingerprint=facts.get("fingerprint", float(step)),
                     samples=facts.get("samples", np.nan))  # fmt: skip
    told = values.pop("validation", None)
    if told is not None:
        history.add_validation(step, *np.atleast_1d(told).tolist())
    if not sampled(step) and not facts.get("forced"):
        return
    measured = {}
    for name, numbers in values.items():
        if name != "loss":
            row = np.asarray(numbers, dtype=np.float32)
            sites = np.flatnonzero(~np.isnan(row)) if name not in facts.get("measured", ()) else np.arange(row.size)
            measured[name] = (sites, row[sites])
    history.add_sample(Sample(step, measured, facts))


def run(rules: list[Any], edit: Edit | None = None, *, steps: int = 200, seed: int = 0, scale: float = 1.0, notes: dict[str, Any] | None = None,
        **words: Any) -> list[tuple[int, Finding]]:  # fmt: skip
    """Simulate a run judged at every step: the findings that were heard, each with the step at which it was heard."""
    rng, history, judge, heard = np.random.default_rng(seed), new_history(**words), Judge(rules), []
    history.notes = {"loss_is_nonnegative": True, "loss_is_mean": True, **(notes or {})}
    for step in range(steps):
        values, facts = healthy_step(step, rng, scale)
        if edit is not None:
            edit(step, values, facts)
        before = history.samples, history.steps(1).tolist()
        feed(history, step, values, facts)
        heard += [(step, f) for f in judge.observe(history, new_sample=before != (history.samples, history.steps(1).tolist()))]
    return heard


def at(signal: str, site: int | slice, number: float, *, since: int = 0, until: int = 10**9, measured: bool = False) -> Edit:
    """From a step on, a signal reads this number at a site."""

    def edit(step: int, values: Values, facts: dict[str, Any]) -> None:
        if since <= step < until:
            values[signal] = np.array(values[signal], dtype=np.float64)
            values[signal][site] = number
            if measured:
                facts["measured"] = (*facts.get("measured", ()), signal)

    return edit


def times(signal: str, site: int | slice, factor: float, *, since: int = 0, until: int = 10**9) -> Edit:
    """From a step on, a signal is multiplied."""

    def edit(step: int, values: Values, facts: dict[str, Any]) -> None:
        if since <= step < until:
            values[signal][site] *= factor

    return edit


def loss(number: Callable[[int, float], float], *, since: int = 0, until: int = 10**9) -> Edit:
    def edit(step: int, values: Values, facts: dict[str, Any]) -> None:
        if since <= step < until:
            values["loss"] = number(step, values["loss"])

    return edit


def validation(number: Callable[[int, float], Any]) -> Edit:
    """Every evaluation tells this number, or (loss, accuracy, training accuracy)."""

    def edit(step: int, values: Values, facts: dict[str, Any]) -> None:
        if "validation" in values:
            values["validation"] = number(step, values["validation"])

    return edit


def fact(name: str, number: Any, *, since: int = 0, until: int = 10**9) -> Edit:
    def edit(step: int, values: Values, facts: dict[str, Any]) -> None:
        if since <= step < until:
            facts[name] = number

    return edit


def both(*edits: Edit) -> Edit:
    def edit(step: int, values: Values, facts: dict[str, Any]) -> None:
        for one in edits:
            one(step, values, facts)

    return edit


def grow(step: int, values: Values, facts: dict[str, Any]) -> None:
    """Weights double every 3 steps from step 60 on."""
    if step >= 60:
        values["weight_norm"] = values["weight_norm"] * 2.0 ** ((step - 60) / 3)


def still(site: int, since: int = 0) -> Edit:
    return both(at("update_norm", site, 0.0, since=since), at("weight_norm", site, 4.0, since=since))


NAN, INF = float("nan"), float("inf")
ALL = slice(None)
# diagnosis -> (the fault, the step at which it begins, the longest allowed delay in steps, what `where` must name, the least severity)
ILL: dict[str, tuple[Edit, int, int, str, Severity]] = {
    "nonfinite_input": (both(fact("input_finite", 0.0, since=63, until=64), loss(lambda t, v: NAN, since=63)), 63, 0, "input", Severity.HALT),
    "nonfinite_activation": (both(at("activation_rms", slice(4, 9), NAN, since=70, measured=True), loss(lambda t, v: NAN, since=70)),
                             70, 0, "layers.1 (Linear", Severity.HALT),
    "nonfinite_gradient": (at("grad_norm", slice(0, 5), INF, since=70), 70, 0, "layers.1.weight", Severity.HALT),
    "nonfinite_weight": (at("weight_norm", slice(4, 7), NAN, since=70, measured=True), 70, 0, "layers.1.weight", Severity.HALT),
    "nonfinite_loss": (loss(lambda t, v: NAN, since=77), 77, 0, "loss", Severity.WARNING),
    "exploding_gradient": (both(times("grad_norm", ALL, 300.0, since=100), loss(lambda t, v: 2.3)), 100, 40, "", Severity.WARNING),
    "vanishing_gradient": (times("grad_norm", slice(0, 2), 1e-8), 0, 20, "layers.0.weight", Severity.WARNING),
    "missing_zero_grad": (fact("not_cleared", 1.0), 0, 3, "zero_grad", Severity.WARNING),
    "clipping_dominates": (both(at("clip_coefficient", 0, 0.01), fact("adam_eps", None)), 0, 50, "clipping", Severity.WARNING),
    "skipped_steps": (both(fact("scaler", 1.0), at("update_norm", ALL, 0.0)), 20, 10, "optimizer.step", Severity.WARNING),
    "update_ratio_high": (times("update_norm", ALL, 400.0), 0, 5, "", Severity.WARNING),
    "update_ratio_low": (times("update_norm", ALL, 1e-5), 0, 20, "", Severity.WARNING),
    "unchanged_weights": (still(4), 0, 20, "layers.1.weight", Severity.WARNING),
    "dead_relu": (at("dead_fraction", 2, 1.0, since=30), 30, 1, "act.0", Severity.ERROR),
    "saturated_activation": (at("saturated_fraction", 5, 0.9), 0, 20, "act.1", Severity.WARNING),
    "collapsed_activation": (at("sample_variance", slice(5, 9), 1e-9), 0, 20, "act.1", Severity.ERROR),
    "saturated_softmax": (both(lambda t, v, f: v["logit_peak"].__setitem__(0, 6e3 + t), loss(lambda t, v: 40.0 + t % 3)), 0, 20, "loss", Severity.WARNING),
    "duplicate_batches": (lambda t, v, f: f.__setitem__("fingerprint", float(t // 2)), 0, 20, "data loader", Severity.WARNING),
    "frozen_weights_changed": (both(fact("frozen", ("trunk.weight",), since=60), at("frozen_update", 0, 1e-3, since=60)),
                               60, 20, "trunk.weight", Severity.WARNING),
    "overflow_risk": (times("activation_reach", 6, 60.0, since=40), 40, 3, "layers.2", Severity.WARNING),
    "poor_initialization": (at("weight_range", slice(1, 6), 0.0), 0, 0, "layers.0.weight", Severity.WARNING),
    "initial_loss_off": (loss(lambda t, v: v + 40.0 * np.exp(-t / 20)), 0, 0, "first loss", Severity.WARNING),
    "attention_logit_growth": (both(times("attention_logit", 4, 50.0, since=20), loss(lambda t, v: 2.3)), 20, 20, "layers.1", Severity.ERROR),
    "loss_spike": (loss(lambda t, v: 60.0, since=133, until=134), 133, 3, "loss", Severity.WARNING),
    "diverging_loss": (loss(lambda t, v: v * 1.1 ** (t - 80), since=80), 80, 60, "loss", Severity.WARNING),
    "constant_loss": (loss(lambda t, v: 87.33654), 0, 20, "loss", Severity.WARNING),
    "loss_plateau": (both(loss(lambda t, v: 2.3 + 0.05 * np.sin(t)), times("update_norm", ALL, 2e-3)), 0, 150, "loss", Severity.WARNING),
    "oscillating_loss": (both(loss(lambda t, v: 1 + 0.4 * (-1) ** t, since=20), times("update_norm", ALL, 25.0)), 20, 240, "loss", Severity.WARNING),
    "invalid_labels": (fact("paired", ((8, 1), 8)), 0, 0, "targets", Severity.WARNING),
    "wrong_output_activation": (fact("squashed", ("head", "softmax", "cross entropy", 10)), 0, 0, "head", Severity.WARNING),
    "negative_loss": (loss(lambda t, v: -0.02, since=70), 70, 0, "loss", Severity.WARNING),
    "overfitting": (validation(lambda t, v: v + 0.004 * max(0, t - 120)), 120, 140, "validation", Severity.WARNING),
    "validation_mismatch": (
        both(loss(lambda t, v: 2.3 + 0.05 * np.sin(t)), validation(lambda t, v: 2.3 * np.exp(-t / 200))), 0, 150, "validation", Severity.WARNING),
    "learning_bottleneck": (
        both(loss(lambda t, v: 1.9 + 0.05 * np.sin(t), since=30), validation(lambda t, v: 1.95 + 0.01 * np.sin(t)), times("update_norm", ALL, 25.0),
             at("confident_fraction", 0, 0.0)), 30, 350, "both losses", Severity.WARNING),
    "validation_below_training": (validation(lambda t, v: 0.6 * v), 0, 120, "validation", Severity.INFO),
    "oscillating_validation": (validation(lambda t, v: 0.96 if t // EVALUATED % 2 else 0.6), 0, 180, "validation", Severity.WARNING),
}  # fmt: skip
# diagnosis -> something healthy that comes near to the fault (the false-alarm column of survey)
NEAR: dict[str, Edit] = {
    "nonfinite_input": fact("input_finite", NAN),
    "nonfinite_activation": both(fact("scaler", 1.0), times("activation_rms", ALL, 1e4)),
    "nonfinite_gradient": both(fact("scaler", 1.0), at("grad_norm", ALL, INF, until=16), at("grad_norm", 3, INF, since=100, until=101)),
    "nonfinite_weight": times("weight_norm", ALL, 1e6),
    "nonfinite_loss": loss(lambda t, v: -1e30),
    # single steps, a warm-up's rise, and a network that leaves a plateau: its gradients grow while its loss falls
    "exploding_gradient": both(
        times("grad_norm", ALL, 31.7, since=60, until=61), times("grad_norm", ALL, 14.0, since=70, until=74), times("grad_norm", ALL, 20.0, since=100)
    ),
    "vanishing_gradient": both(times("grad_norm", 1, 0.0, until=3), times("grad_norm", 4, 6e-4), times("grad_norm", 0, 1e-9), times("grad_norm", 2, 1e-9)),
    "missing_zero_grad": both(fact("not_cleared", 0.3), fact("not_cleared", 1.0, since=40, until=42)),
    "clipping_dominates": at("clip_coefficient", 0, 0.97),
    "skipped_steps": both(fact("scaler", 1.0), at("update_norm", ALL, 0.0, until=16), at("update_norm", ALL, 0.0, since=100, until=101)),
    "update_ratio_high": both(times("update_norm", ALL, 60.0, until=4), times("update_norm", 4, 95.0, since=30, until=33)),
    "update_ratio_low": times("update_norm", ALL, 1.7e-2),
    "unchanged_weights": both(still(3), at("update_norm", 1, 0.0, until=10), fact("lr", 0.0, until=5)),
    "dead_relu": both(at("zero_fraction", 2, 0.97), at("dead_fraction", 2, 0.36, since=30)),
    "saturated_activation": at("saturated_fraction", 7, 0.4),
    "collapsed_activation": both(at("sample_variance", 8, 0.0, until=15), at("sample_variance", 3, 0.0)),
    "saturated_softmax": both(at("confident_fraction", 0, 0.75), at("confident_wrong", 0, 0.19), at("logit_peak", 1, 1e9), times("logit_peak", 0, 3.0)),
    # one batch, epochs of ten batches, and chance repeats of few different samples
    "duplicate_batches": lambda t, v, f: f.__setitem__("fingerprint", 7.0 if t < 100 else float(t % 10) if t < 200 else float(t * t * 31 % 97 % 3)),
    "frozen_weights_changed": both(fact("frozen", ("trunk.weight",), since=60), at("frozen_update", 0, 0.0, since=60, until=100)),
    "overflow_risk": both(at("activation_reach", 6, 1.0), times("activation_reach", 4, 70.0, since=30, until=32), times("gradient_reach", ALL, 300.0)),
    "initial_loss_off": loss(lambda t, v: v + 30.0 * np.exp(-t / 20) + 100.0 * (t > 5)),
    "poor_initialization": both(at("weight_range", 3, 0.0), at("weight_norm", 6, 0.0, until=1), times("activation_rms", 8, 1e-3)),
    # large from the start, sharp once the loss has fallen, and a mask
    "attention_logit_growth": both(times("attention_logit", 4, 40.0), times("logit_peak", 1, 9.0, since=150), at("logit_peak", 0, 1e9)),
    "loss_spike": loss(lambda t, v: v * (1.0 if t % 37 else 1.5)),
    "diverging_loss": loss(lambda t, v: v + 0.2 * np.sin(t / 15)),
    "constant_loss": loss(lambda t, v: round(v, 2)),
    # the last fifth of a long warm-up, and a fall of 3 % within much noise
    "loss_plateau": both(loss(lambda t, v: 2.3 * (1 - 3e-4 * t) * v / (0.5 + 1.8 * np.exp(-t / 60)))),
    "oscillating_loss": both(loss(lambda t, v: (0.5 + 1.8 * np.exp(-t / 60)) * (1 + 0.3 * ((t * 7919) % 13 - 6) / 6)), times("update_norm", ALL, 25.0)),
    "invalid_labels": fact("paired", ((), 0)),
    "wrong_output_activation": fact("squashed", ("", "", "", 0)),
    "negative_loss": loss(lambda t, v: -1e-8),
    "overfitting": validation(lambda t, v: v + 0.0003 * max(0, t - 120)),
    # batch-norm statistics that settle late: validation comes down to training, which stands
    "validation_mismatch": both(loss(lambda t, v: 0.1 * v), validation(lambda t, v: 0.1 * v + 2 * np.exp(-t / 90))),
    "learning_bottleneck": both(loss(lambda t, v: 2.3 * np.exp(-t / 300)), validation(lambda t, v: 2.4 * np.exp(-t / 300)), times("update_norm", ALL, 25.0)),
    "validation_below_training": validation(lambda t, v: 0.97 * v),
    "oscillating_validation": validation(lambda t, v: v * (1.06 if t // EVALUATED % 2 else 1.0)),
}  # fmt: skip
LONG = {"learning_bottleneck": 400, "oscillating_loss": 300, "overfitting": 300}  # steps that a fault needs; 200 for all others


@pytest.mark.parametrize("name", sorted(ILL))
def test_the_ill_run_is_heard_in_time(name: str) -> None:
    """A fault is heard within its delay, at the right place, with evidence, a cause and a remedy."""
    fault, since, delay, where, severity = ILL[name]
    heard = run([RULES[name]()], fault, steps=LONG.get(name, 200))
    assert heard, name
    step, finding = heard[0]
    assert finding.diagnosis == name and since <= step <= since + delay, (step, finding)
    assert where in finding.where and finding.severity >= severity and finding.step <= step
    assert finding.evidence and 1 <= len(finding.causes) <= 3 and finding.remedies and all(c.because for c in finding.causes)
    assert Finding.from_dict(finding.to_dict()).diagnosis == name and "\n" in str(finding)


@pytest.mark.parametrize("name", sorted(NEAR))
def test_what_comes_near_is_not_heard(name: str) -> None:
    """The known false triggers of a diagnosis do not trigger it."""
    assert [f for _, f in run([RULES[name]()], NEAR[name], steps=400) if f.severity >= Severity.WARNING or name == "validation_below_training"] == []


@pytest.mark.parametrize("seed", range(3))
def test_the_healthy_run_is_silent(seed: int) -> None:
    """All rules together say nothing about a run that learns, but for a line of information once it stands still."""
    heard = run([make() for make in RULES.values()], seed=seed, steps=400)
    assert [(f.diagnosis, f.severity) for _, f in heard if f.diagnosis != "learning_bottleneck" or f.severity > Severity.INFO] == []
    assert run([make() for make in RULES.values()], seed=seed, steps=250) == []


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), exponent=st.integers(-6, 6))
def test_the_scale_of_the_loss_does_not_matter(seed: int, exponent: int) -> None:
    """Multiplying the loss and its gradients by 1e-6 to 1e6 makes no alarm; only of a mean cross entropy the size itself is known."""
    heard = run([make() for make in RULES.values()], seed=seed, scale=10.0**exponent, steps=130, notes={"loss_is_mean": False})
    assert [f for _, f in heard if f.severity >= Severity.WARNING] == []


@settings(max_examples=8, deadline=None)
@given(exponent=st.integers(-6, 6), name=st.sampled_from(["loss_spike", "diverging_loss"]))
def test_curve_faults_are_heard_at_every_scale(exponent: int, name: str) -> None:
    """A spike and a divergence are judged against the run's own past, whatever its scale."""
    scale = 10.0**exponent
    fault = loss(lambda t, v: 60.0 * scale, since=133, until=134) if name == "loss_spike" else ILL[name][0]
    assert [f.diagnosis for _, f in run([RULES[name]()], fault, scale=scale)] == [name]


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_keeps_the_contract(name: str) -> None:
    """A rule is a frozen dataclass named by its diagnosis, reads known signals, and documents itself and each threshold."""
    cls = RULES[name]
    assert cls.diagnosis == name and name in DIAGNOSES and set(cls.reads) <= SIGNALS and cls.__doc__ and name in cls.__doc__
    source = inspect.getsource(cls).splitlines()
    for threshold in dataclasses.fields(cls):
        line = next(row for row in source if row.strip().startswith(f"{threshold.name}:"))
        assert len(line.partition("#")[2].strip()) > 10, line
    with pytest.raises(dataclasses.FrozenInstanceError):
        cls().grace = 5


def hostile() -> dict[str, History]:
    """Histories that no rule expects."""
    cases = {"empty": History(), "no sample": new_history()}
    cases["no sample"].add_loss(0, 2.3)
    strange = {"nan": NAN, "inf": INF, "-inf": -INF, "zero": 0.0, "one": 1.0, "huge": 1e38, "tiny": 1e-38, "negative": -1.0}
    for length in (1, 2, 80):
        for word, number in strange.items():
            history = cases[f"{word} x {length}"] = new_history()
            for step in range(length):
                values, facts = healthy_step(step, np.random.default_rng(0), 1.0)
                values["validation"] = 1.0
                values = {k: np.full(np.shape(v), number) if np.shape(v) else number for k, v in values.items()}
                strained = {"lr": number, "not_cleared": number, "scaler": float(length == 2), "adam_eps": number}
                feed(history, step, values, {**facts, "measured": tuple(values), **strained})
    for word, number in strange.items():
        history = cases[f"{word} at last"] = new_history()
        for step in range(80):
            values, facts = healthy_step(step, np.random.default_rng(step), 1.0)
            values["validation"] = 1.0
            if step >= 70:
                values = {k: np.full(np.shape(v), number) if np.shape(v) else number for k, v in values.items()}
            feed(history, step, values, {**facts, "measured": tuple(values)})
    nameless = cases["nothing registered"] = History()
    for step in range(60):
        nameless.add_loss(step, 1.0)
        nameless.add_sample(Sample(step, {s: (np.arange(2), np.full(2, NAN, np.float32)) for s in (*PER_UNIT, *PER_HEAD, "input_rms", "clip_coefficient")}))
    return cases


HOSTILE = hostile()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", sorted(RULES))
def test_no_history_breaks_a_rule(name: str) -> None:
    """Empty, single, constant, huge, tiny and non-finite histories raise nothing, warn of nothing, and get the same answer twice."""
    for word, history in HOSTILE.items():
        rule = RULES[name]()
        first = rule.check(history)
        assert first == rule.check(history) or repr(first) == repr(rule.check(history)), word
        assert first is None or (str(first) and first.diagnosis == name), word


@pytest.mark.parametrize("number", [NAN, INF, -INF])
@pytest.mark.parametrize("name", [n for n in sorted(RULES) if n.startswith("nonfinite")])
def test_what_is_not_finite_is_sick(name: str, number: float) -> None:
    """NaN, Inf and -Inf fall on the sick side of every rule about them, even as the very first numbers."""
    signal = {"nonfinite_loss": "loss", "nonfinite_input": "input_rms", "nonfinite_activation": "activation_rms", "nonfinite_gradient": "grad_norm",
              "nonfinite_weight": "weight_norm"}[name]  # fmt: skip
    heard = run([RULES[name]()], loss(lambda t, v: number) if signal == "loss" else at(signal, 0, number, measured=True), steps=3)
    assert heard and heard[0][0] == 0


def test_a_lasting_nonfinite_loss_halts_and_keeps_its_first_step() -> None:
    """One NaN loss with sound weights warns, the second halts, and the step is that of the first."""
    heard = run([RULES["nonfinite_loss"]()], loss(lambda t, v: NAN, since=77))
    assert [(s, f.severity, f.step) for s, f in heard] == [(77, Severity.WARNING, 77), (78, Severity.HALT, 77)]
    assert [f.severity for _, f in run([RULES["nonfinite_loss"]()], loss(lambda t, v: NAN, since=77, until=78))] == [Severity.WARNING]


@pytest.mark.parametrize(
    ("edit", "cause"),
    [
        (loss(lambda t, v: v * 10.0 ** (t - 75) if t < 80 else NAN, since=75), "exploding gradient"),
        (loss(lambda t, v: NAN, since=80), "loss function"),
        (both(loss(lambda t, v: NAN, since=80), fact("input_finite", 0.0, since=80)), "bad input"),
        (both(loss(lambda t, v: NAN, since=80), at("weight_norm", 4, NAN, since=80, measured=True)), "bad weights"),
    ],
)
def test_the_cause_of_a_nonfinite_loss_is_told(edit: Edit, cause: str) -> None:
    """Growth, calm, a bad batch and bad weights before a NaN loss are told apart, each with a number to try."""
    finding = run([RULES["nonfinite_loss"]()], edit)[-1][1]
    assert finding.causes[0].name == cause and finding.remedies


def test_a_spike_hides_no_later_spike() -> None:
    """Two spikes far apart are both found, and the first does not enter the past that judges the second."""
    history, rule, found = new_history(), RULES["loss_spike"](), []
    rng = np.random.default_rng(0)
    for step in range(200):
        history.add_loss(step, 40.0 if step in (130, 140) else 1 + 0.05 * rng.standard_normal())
        finding = rule.check(history)
        found += [finding.step] if finding else []
        history.mark_judged()
    assert found == [130, 140]


def test_every_fresh_loss_is_judged_against_its_own_past() -> None:
    """Losses that arrive ten at a time are judged like losses that arrive one by one."""
    history, rng = new_history(), np.random.default_rng(0)
    for step in range(140):
        history.add_loss(step, 40.0 if step == 133 else 1 + 0.05 * rng.standard_normal())
        if step == 129:
            history.mark_judged()
    found = RULES["loss_spike"]().check(history)
    assert found is not None and found.step == 133


def test_a_loss_of_both_signs_is_not_compared_by_ratios() -> None:
    """A Gaussian likelihood that falls through zero and a noise around zero raise no curve alarm."""
    curves = [RULES[n]() for n in ("loss_spike", "diverging_loss", "constant_loss")]
    rng = np.random.default_rng(0)
    assert run(curves, loss(lambda t, v: 2 - t / 40 + 0.1 * rng.standard_normal()), steps=300) == []
    assert run(curves, loss(lambda t, v: rng.standard_normal()), steps=300) == []


@pytest.mark.parametrize("words", [{"optimizers": 2}, {"loss_family": "adversarial"}, {"loss_family": "reinforcement"}])
@pytest.mark.parametrize("name", ["loss_spike", "diverging_loss", "constant_loss"])
def test_curves_without_order_inform_only(name: str, words: dict[str, Any]) -> None:
    """Where the loss has no order, curve rules never warn."""
    assert {f.severity for _, f in run([RULES[name]()], ILL[name][0], **words)} == {Severity.INFO}


@pytest.mark.parametrize(
    ("first", "second", "sign", "silent"),
    [("policy_loss", "value_loss", -1, True), ("policy", "value", 1, False), ("loss/generator", "loss/critic", 1, True), ("class", "value", -1, False)],
)
def test_terms_named_after_a_game_inform_only(first: str, second: str, sign: int, silent: bool) -> None:
    """Terms named after a policy and its critic, or a generator and its judge, declare a loss without order; a policy that learns a likelihood does not."""
    history = new_history(loss_family="unknown")
    for step in range(120):
        size = 1.0 + max(0, step - 60)
        history.add_loss(step, size, {first: sign * 0.1, second: size})
    finding = RULES["diverging_loss"]().check(history)
    assert finding is not None and (finding.severity == Severity.INFO) == silent


def test_a_heavy_tail_near_convergence_is_no_spike() -> None:
    """Small batches of a nearly converged run, with log-normal losses, raise no spike."""
    rng = np.random.default_rng(3)
    assert run([RULES["loss_spike"]()], loss(lambda t, v: 0.3 * float(np.exp(1.2 * rng.standard_normal()))), steps=400) == []


def test_divergence_that_goes_on_halts() -> None:
    """A loss above its start for 300 steps ends in a halt."""
    heard = run([RULES["diverging_loss"]()], loss(lambda t, v: 30.0 + v, since=60), steps=460)
    assert [f.severity for _, f in heard] == [Severity.WARNING, Severity.HALT]


def test_settled_full_batch_descent_is_no_constant_loss() -> None:
    """A loss that came down and settled smoothly is information, one that jumps to a constant is an alarm."""
    smooth = run([RULES["constant_loss"]()], loss(lambda t, v: 1 + float(np.exp(-t / 5))), steps=200)
    assert {f.severity for _, f in smooth} <= {Severity.INFO}
    jump = run([RULES["constant_loss"]()], loss(lambda t, v: 2.302585, since=60), steps=100)
    assert [f.severity for _, f in jump] == [Severity.WARNING] and "ln 10" in jump[0][1].causes[0].because
    assert run([RULES["constant_loss"]()], loss(lambda t, v: 0.0), steps=60) == []


def test_missing_parameters_are_told_at_once() -> None:
    """Parameters in no optimizer are named at the first sample; if all are missing it is an error."""
    rule = [RULES["unchanged_weights"]()]
    heard = run(rule, notes={"missing_from_optimizer": ("head.weight",), "foreign_in_optimizer": 0, "trainable": 7}, steps=5)
    assert [(s, f.severity, f.where) for s, f in heard] == [(0, Severity.WARNING, "head.weight")]
    every = run(rule, notes={"missing_from_optimizer": tuple(p.name for p in PARAMS), "foreign_in_optimizer": 7, "trainable": 7}, steps=5)
    assert every[0][1].severity == Severity.ERROR and "another model" in every[0][1].causes[0].name


def test_accumulation_and_alternation_are_not_missing_steps() -> None:
    """Steps that fall between the samples move the weights, and accumulated gradients grow: neither is unchanged."""
    rule = [RULES["unchanged_weights"]()]
    never = both(at("update_norm", ALL, 0.0), at("weight_norm", ALL, 4.0), fact("stepped", 0.0))
    assert [f.where for _, f in run(rule, never)] == ["optimizer.step"]
    assert run(rule, both(never, lambda t, v, f: v.__setitem__("grad_norm", v["grad_norm"] * (1 + t))), steps=60) == []
    assert run(rule, both(at("update_norm", 4, 0.0), fact("stepped", 0.0, until=10))) == []


def test_steps_that_stop_are_told_from_lengthened_accumulation() -> None:
    """An optimizer that stops for longer than ever before is heard; not where weights move, nor where no gradient arrives."""
    rule = [RULES["unchanged_weights"]()]
    stops = both(fact("stepped", 0.0, since=60), at("weight_norm", ALL, 4.0, since=60))
    (heard,) = run(rule, stops)
    assert heard[0] <= 130 and heard[1].where == "optimizer.step" and heard[1].causes[0].name == "optimizer.step() is no longer called"
    assert run(rule, fact("stepped", 0.0, since=60)) == []
    assert run(rule, both(stops, at("grad_norm", ALL, NAN, since=60))) == []
    assert run(rule, both(stops, lambda t, v, f: v.__setitem__("grad_norm", v["grad_norm"] * (1 + max(0, t - 60))))) == []


def test_updates_that_are_written_over_are_named() -> None:
    """Of each update 1 % is left when the step ends: heard; half of it is left, as Lookahead leaves it: silent."""
    rule = [RULES["unchanged_weights"]()]

    def left(share: float) -> Edit:
        return lambda t, v, f: v.__setitem__("net_update", share * v["update_norm"])

    assert [f.causes[0].name for _, f in run(rule, left(0.01))] == ["weights are overwritten"]
    assert run(rule, left(0.5)) == []


def test_a_group_whose_rate_was_cut_is_heard_and_one_that_was_led_to_zero_is_told() -> None:
    """A rate of 0 that came at once warns; one that was approached, or was 0 from the start, is information."""
    rule = [RULES["unchanged_weights"]()]
    rests = both(still(4), fact("resting", (4,)))
    (_, cut), (_, led) = run(rule, both(rests, fact("rate_cut", 1.0)))[0], run(rule, both(rests, fact("rate_cut", 0.0)))[0]
    assert (cut.severity, led.severity) == (Severity.WARNING, Severity.INFO) and cut.causes[0].name == "learning rate is zero"


def test_master_weights_are_no_missing_parameters() -> None:
    """An optimizer that holds copies is no mistake while the model's own weights move; it is one when they stand."""
    rule = [RULES["unchanged_weights"]()]
    notes = {"missing_from_optimizer": tuple(p.name for p in PARAMS), "foreign_in_optimizer": 7, "trainable": 7}
    for size, severities in ((1e-3, []), (0.0, [Severity.ERROR])):
        heard = run(rule, both(lambda t, v, f, size=size: v.__setitem__("outside_update", np.full(1, size)), fact("outside", 1)), notes=notes, steps=15)
        assert [f.severity for _, f in heard] == severities


def test_a_loss_that_mirrors_the_likelihood_has_the_wrong_sign() -> None:
    """A loss that is minus the labels' negative log-likelihood is heard; one that goes its own way below 0 is not."""
    rule = [RULES["negative_loss"]()]

    def mirrored(noise: float) -> Edit:
        def edit(step: int, values: Values, facts: dict[str, Any]) -> None:
            nll = 2.3 + 0.02 * step
            values["label_nll"] = np.array([nll, np.nan])
            values["loss"] = -nll * (1 + noise * np.sin(step))

        return edit

    notes = {"loss_is_nonnegative": False}
    (heard,) = run(rule, mirrored(0.0), loss_family="unknown", notes=notes)
    assert heard[0] < 30 and heard[1].causes[0].name == "sign of the loss"
    assert run(rule, mirrored(0.1), loss_family="unknown", notes=notes) == []
    assert run(rule, mirrored(0.0), loss_family="reinforcement", notes=notes) == []


def test_an_unused_head_informs_only() -> None:
    """A matrix whose module never ran and has no gradient is a line of information; one that ran is an alarm."""
    params = [*PARAMS[:-1], Param("spare.weight", 4096, "matrix", module="Linear")]
    edit, history = both(still(6), fact("no_gradient", (6,)), at("grad_norm", 6, NAN)), new_history()
    history.params = params
    rng = np.random.default_rng(0)
    for step in range(30):
        values, facts = healthy_step(step, rng, 1.0)
        edit(step, values, facts)
        feed(history, step, values, facts)
    finding = RULES["unchanged_weights"]().check(history)
    assert finding is not None and finding.severity == Severity.INFO
    assert run([RULES["unchanged_weights"]()], edit)[0][1].severity == Severity.WARNING


def test_a_rate_of_zero_for_longer_than_there_was_one_is_heard() -> None:
    """A schedule that ends after 30 of 200 steps is heard once it was 0 for 100; one that ends 60 steps before the run, or restarts, is not."""
    rule = [RULES["unchanged_weights"]()]
    ended = run(rule, fact("lr", 0.0, since=30), steps=200)
    assert [(f.severity, f.step, f.causes[0].name) for _, f in ended] == [(Severity.WARNING, 30, "learning rate schedule")]
    assert 130 <= ended[0][0] <= 145
    assert run(rule, fact("lr", 0.0, since=140), steps=200) == []
    assert run(rule, fact("lr", 0.0, until=20), steps=200) == []
    assert [f.causes[0].name for _, f in run(rule, fact("lr", 0.0), steps=200)] == ["learning rate is zero"]


def test_a_head_that_no_longer_runs_informs_only() -> None:
    """A matrix whose module ran and has stopped running is a line of information, as one that never ran; cut off while it runs it is an alarm."""
    rule, cut = [RULES["unchanged_weights"]()], both(at("grad_norm", 6, NAN, since=60), at("update_norm", 6, 0.0, since=60))
    cut = both(cut, at("weight_norm", 6, 1.5, since=60))
    cut = both(cut, lambda t, v, f: f.__setitem__("no_gradient", (6,) if t >= 60 else ()))
    rests = both(cut, at("activation_rms", 8, NAN, since=60))
    assert [f.severity for _, f in run(rule, rests)] == [Severity.INFO]
    assert [f.severity for _, f in run(rule, cut)] == [Severity.WARNING]


def test_weight_growth_is_heard_without_grace() -> None:
    """A weight norm that grows tenfold is heard at once, also from its last finite sample and from its newest update."""
    heard = run([RULES["update_ratio_high"]()], grow)
    assert heard and heard[0][0] <= 80 and "grew" in heard[0][1].message
    first = run([RULES["update_ratio_high"]()], times("update_norm", ALL, 2e5), steps=2)
    assert first and first[0][0] == 0


def test_update_rules_look_away_where_small_is_right() -> None:
    """Warm-up from zero, a schedule's tail and a converged run are not too slow."""
    rule, small = [RULES["update_ratio_low"]()], ILL["update_ratio_low"][0]
    assert run(rule, both(small, lambda t, v, f: f.__setitem__("lr", 1e-8 * (t + 1)))) == []
    assert run(rule, both(times("update_norm", ALL, 1e-5, since=50), fact("lr", 1e-5, since=50))) == []
    assert run(rule, both(times("update_norm", ALL, 1e-5, since=50), loss(lambda t, v: v * 1e-4, since=40))) == []


def test_dead_layers_name_their_root() -> None:
    """Of dead forward layers the first is named, of gradient rows that are all dead the last, and narrow layers must be dead altogether."""
    history = new_history()
    history.units = [Unit("a", "ReLU", 64), Unit("b", "ReLU", 64), Unit("c", "ReLU", 4)]

    def answer(*dead: float) -> Finding | None:
        history.add_sample(Sample(history.samples, {"dead_fraction": (np.arange(3), np.array(dead, np.float32))}))
        return RULES["dead_relu"]().check(history)

    assert answer(0.4, 0.1, 0.75) is None
    whole = answer(0.0, 0.6, 1.0)
    assert whole is not None and whole.where == "c (ReLU)" and whole.severity == Severity.ERROR
    first = answer(0.0, 0.6, 0.75)
    assert first is not None and first.where == "b (ReLU)" and first.severity == Severity.INFO  # too early to say that it does not learn
    history.units = [Unit(n, "gradient rows", 64) for n in "abc"]
    last = answer(1.0, 1.0, 0.2)
    assert last is not None and last.where == "b (gradient rows)" and last.severity == Severity.ERROR


def test_output_and_gates_may_saturate() -> None:
    """The sigmoid that feeds the loss and gates may sit at their rails."""
    history = new_history()
    history.units = [Unit("hidden", "Tanh", 64), Unit("se.gate", "Sigmoid", 64), Unit("out", "Sigmoid", 10)]
    for step in range(25):
        history.add_sample(Sample(step, {"saturated_fraction": (np.arange(3), np.array([0.1, 0.9, 0.9], np.float32))}))
    assert RULES["saturated_activation"]().check(history) is None


def test_a_single_skip_by_our_gate_is_silent_and_a_long_run_halts() -> None:
    """Three skipped updates in a row warn, twenty halt."""
    skips = lambda t, v, f: v.__setitem__("consecutive_skips", np.array([max(0.0, t - 9.0)]))  # noqa: E731
    assert [f.severity for _, f in run([RULES["skipped_steps"]()], skips, steps=40)] == [Severity.WARNING, Severity.HALT]
    assert run([RULES["skipped_steps"]()], at("consecutive_skips", 0, 2.0)) == []


def test_inputs_that_the_model_digests_do_not_halt() -> None:
    """NaN as a missing-value code with a finite loss informs; a sudden bad batch with a finite loss warns."""
    rule = [RULES["nonfinite_input"]()]
    assert [f.severity for _, f in run(rule, fact("input_finite", 0.0))] == [Severity.INFO]
    assert [f.severity for _, f in run(rule, fact("input_finite", 0.0, since=63, until=64))] == [Severity.WARNING]


def test_underflow_to_zero_beside_tiny_gradients_vanishes() -> None:
    """Gradients that fade to exact zeros in the shallow layers are vanishing; zeros alone are not."""
    rule = [RULES["vanishing_gradient"]()]
    fade = both(times("grad_norm", 1, 0.0), times("grad_norm", 4, 1e-8))
    assert [f.where for _, f in run(rule, fade)] == ["layers.0.weight"]
    assert run(rule, times("grad_norm", 1, 0.0)) == []
    assert run([RULES["unchanged_weights"]()], both(fade, still(1), still(4))) == []


def test_gradients_below_adams_epsilon_vanish() -> None:
    """Gradients under ten times Adam's epsilon with dying updates name the epsilon."""
    heard = run([RULES["vanishing_gradient"]()], both(times("grad_norm", ALL, 1e-6), times("update_norm", ALL, 1e-3)))
    assert heard and heard[0][1].causes[0].name == "adam epsilon"


def test_an_explosion_in_the_first_steps_is_an_error() -> None:
    """Two gradients a thousand times their past are heard before there is a long past."""
    heard = run([RULES["exploding_gradient"]()], times("grad_norm", ALL, 1e5, since=25))
    assert heard[0][0] <= 27 and heard[0][1].severity == Severity.ERROR and heard[0][1].step == 25


def test_one_odd_value_is_no_fault() -> None:
    """A single catastrophic gradient, one odd matrix of four, a constant mask in the logits, and a small rise of a negative loss are silent."""
    assert run([RULES["exploding_gradient"]()], times("grad_norm", ALL, 1e5, since=100, until=101)) == []
    assert run([RULES["update_ratio_high"]()], times("update_norm", 4, 150.0)) == []
    unlearned = loss(lambda t, v: 3.0 + 0.01 * (t % 5))
    assert run([RULES["saturated_softmax"]()], both(at("logit_peak", 0, 1e9), unlearned)) == []
    rng = np.random.default_rng(0)
    assert run([RULES["loss_spike"]()], loss(lambda t, v: -1.4 if t == 150 else -2 + 0.03 * rng.standard_normal())) == []
