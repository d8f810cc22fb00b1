"""What the guard observes and what it does not, and why: silence means that it looked. Host facts only."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from lossguard.device import signals
from lossguard.device.bank import NORMS
from lossguard.device.compiled import SWITCH
from lossguard.device.recorder import Recorder
from lossguard.host.handover import Handover
from lossguard.host.history import History

CALLED = {"activation_rms": "activations", "grad_norm": "gradients", "update_norm": "updates"}  # signals that somebody has to call a hook for
SILENT = 8  # samples without one after which it is told; each waits for an update


@dataclass(frozen=True)
class Coverage:
    """observed: signal -> number of sites seen so far. not_observed: what -> why.

    >>> print(Coverage({"loss": 1}, {"table.weight": "its gradient is sparse: reading it would wait"}))
    observed: loss (1)
    not observed:
      table.weight: its gradient is sparse: reading it would wait
    """

    observed: dict[str, int] = field(default_factory=dict)
    not_observed: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        seen = ", ".join(f"{name} ({sites})" for name, sites in self.observed.items()) or "nothing yet"
        unseen = [f"  {what}: {why}" for what, why in self.not_observed.items()]
        return "\n".join([f"observed: {seen}", *(["not observed:", *unseen] if unseen else [])])


def survey(
    recorder: Recorder, history: History, handover: Handover, steps: int, backward_seen: bool, silenced: Collection[str], unguarded: Mapping[str, str]
) -> Coverage:
    """Ask every part what it has seen."""
    observed = {"loss": 1} if history.loss_steps(1).size else {}
    observed.update(history.observed())
    unseen = recorder.unread()
    unseen.update({f"signal {name}": f"failed and reads NaN ({why})" for name, why in signals.BROKEN.items()})
    unseen.update({entry.partition(": ")[0]: entry.partition(": ")[2] for entry in recorder.passes.forward.unwatched})
    if steps:
        unseen.update(_after_steps(recorder, history, observed, backward_seen))
        unseen.update(_of_all_ranks(recorder, history))
    if handover.late:
        unseen["late rows"] = f"{handover.late} rows had not arrived at their step and were waited for; a larger lag= avoids that"
    unseen.update(dict.fromkeys(silenced, "failed once and is switched off"))
    unseen.update(unguarded)
    return Coverage(observed, unseen)


def _after_steps(recorder: Recorder, history: History, observed: Collection[str], backward_seen: bool) -> dict[str, str]:
    unseen: dict[str, str] = {}
    quiet = sorted(name for name, _ in recorder.passes.modules.values() if name not in recorder.passes.fired)
    if quiet:
        shown = ", ".join(quiet[:5]) + (f" and {len(quiet) - 5} more" if len(quiet) > 5 else "")
        evaluates = bool((history.fact("in_evaluation", default=0.0) > 0).any())
        why = "the model is in evaluation mode, call model.train() before training" if evaluates else _why_quiet(recorder)
        unseen["activations"] = f"no forward pass in training mode was seen of {shown}: {why}"
    unseen.update(_fallen_silent(history))
    if not backward_seen and "grad_norm" not in observed:
        unseen["gradients"] = "no backward pass was seen to end between two guard steps"
    elif "update_norm" not in observed:
        unseen["updates"] = "no step of an optimizer was seen since the guard was attached"
    unseen.update({name: why for name, _, why in (entry.partition(": ") for entry in recorder.extras.attention.hidden)})
    graph = recorder.passes.graph
    if graph is not None and graph.attentions and not recorder.extras.attention.sites:
        unseen["attention logits"] = f"{graph.attentions} fused attentions whose output no watched Linear takes: their logits stay inside the kernel"
    if graph is not None:
        unseen.update({f"graph region ({what})": "its inside cannot be read for roles and functional ReLUs" for what in sorted(graph.opaque)})
    if "logit_peak" not in observed:
        unseen["softmax logits"] = "no softmax was found at the loss; pass them with guard.step(loss, logits=...) if there is one"
    return unseen


def _fallen_silent(history: History) -> dict[str, str]:
    """What was seen once and is not any more: hooks that are no longer called."""
    unseen: dict[str, str] = {}
    for signal, what in CALLED.items():
        seen = history.seen(signal)
        if len(seen) > SILENT and seen.any() and not seen[-SILENT:].any():
            last = int(history.steps()[seen.any(axis=1)][-1])
            unseen[what] = f"none was seen since step {last}: a CUDA graph that is replayed calls no hook (capture less, or run some steps without it)"
    return unseen


def _of_all_ranks(recorder: Recorder, history: History) -> dict[str, str]:
    """What is this rank's own though the run has several."""
    unseen: dict[str, str] = {}
    joint, void = recorder.joint, history.notes.get("void_rows", 0)
    if joint.over is not None or void:
        own = f": {joint.faults[0]}" if joint.faults else ""
        unseen["numbers of all ranks"] = joint.over or f"a rank could not measure its part in {void} samples, which were dropped on all{own}"
    apart = joint.apart([s.index for s in recorder.passes.forward.sites if s.kind in signals.RELU_KINDS])
    if apart is not None:
        unseen["dead units of all ranks"] = f"dead_fraction is of this rank's batches alone: {apart}"
    if any(bank.sharded for bank in recorder.banks):
        unseen["clearing of sharded gradients"] = "whether they are cleared between updates does not show in their version counters"
        custom = [s.name for tap in ("gradient", "weight", "update") for s in signals.of(tap) if s.name not in NORMS]
        unseen.update({f"signal {name}": "a signal of your own cannot be joined over the ranks that hold a parameter's parts" for name in custom})
    return unseen


def _why_quiet(recorder: Recorder) -> str:
    if SWITCH.forbidden:
        return "compiled, and torch._dynamo.config.error_on_recompile forbids the second variant that compiled=True needs"
    if SWITCH.traced and not recorder.passes.looks_inside:
        return "compiled (Guard(compiled=True), made before the first call, looks inside), frozen, unused, or called past its __call__"
    return "compiled before the guard was made (make it before the first call, or call torch._dynamo.reset()), frozen, unused, or called past its __call__"
