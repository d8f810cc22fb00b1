"""The culprit of a non-finite value: which operation of which module made it, on planted faults; and that looking changes nothing."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lossguard import Finding, Guard, TrainingHalted
from lossguard.cli import main
from lossguard.culprit import find, states
from lossguard.culprit.find import of_call
from lossguard.device.keepsake import Keepsake
from lossguard.findings import CHANGES
from lossguard.sinks import findings

INF = math.inf


class Op(nn.Module):
    """A module that applies a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Attention(nn.Module):
    """One head with a causal mask; ``rows`` are masked altogether."""

    def __init__(self, rows=()):
        super().__init__()
        self.query, self.rows = nn.Linear(6, 6), rows

    def forward(self, x):
        q = self.query(x)
        mask = torch.triu(torch.ones(len(x), len(x), dtype=torch.bool), 1)
        mask[list(self.rows)] = True
        return (q @ q.T).masked_fill(mask, -INF).softmax(-1) @ q


class Additive(nn.Module):
    """Scores plus a float mask that is a buffer."""

    def __init__(self, row=None):
        super().__init__()
        mask = torch.triu(torch.full((8, 8), -INF), 1)
        if row is not None:
            mask[row] = -INF
        self.register_buffer("mask", mask)

    def forward(self, x):
        return torch.softmax(x @ x.T + self.mask, -1) @ x


def net(middle):
    """first: Linear, fault: what is planted, last: Linear."""
    torch.manual_seed(0)
    return nn.ModuleDict({"first": nn.Linear(6, 6), "fault": middle, "last": nn.Linear(6, 3)})


def through(model, x):
    return model["last"](model["fault"](model["first"](x)))


def inputs():
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


@dataclass
class Fault:
    """What is planted, and what must be named."""

    middle: object
    op: str
    phase: str = "forward"
    module: str | None = "fault"  # None: outside of the model
    kind: str = "operation"
    loss: object = None  # of the model and the batch
    spoil: object = None  # done to model and batch before
    change: str = ""  # key of the remedy


def mean(model, x):
    return through(model, x).square().mean()


def same(x):
    return x


def fp16(model, x):
    with torch.no_grad():
        model.half()
    return mean(model, x.half())


def poison(name, row):
    def spoil(model, x):
        with torch.no_grad():
            model.get_parameter(name)[row] = math.nan

    return spoil


def nan_input(model, x):
    x[5, 2] = math.nan


def inf_input(model, x):
    x[5, 2] = INF


def embedding(model, x):
    return mean(model, model["fault"].table(torch.tensor([1, 3, 3, 0, 2, 4, 4, 1])))


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 6)

    def forward(self, x):
        return x


def filled_with_nan(model, x):
    torch.use_deterministic_algorithms(True)  # torch then fills such memory with NaN
    try:
        return mean(model, x)
    finally:
        torch.use_deterministic_algorithms(False)


class Clever(torch.autograd.Function):
    """A derivative that the user wrote, and wrote wrongly."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.relu() / x.relu()


def gate(x):
    """x where it is positive, else 0, with a derivative that is a product, so that it hides no infinity as that of relu does."""
    return x * (x > 0)


def normalized(x):
    x = torch.cat([x[:-1], torch.full_like(x[-1:], 0.5)])
    return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)


FAULTS = {
    "log of 0": Fault(Op(lambda x: x.relu().log()), "aten.log", change="eps"),
    "log of a negative": Fault(Op(lambda x: torch.log2(x)), "aten.log2", change="eps"),
    "0/0": Fault(Op(lambda x: x.relu() / x.relu()), "aten.div", change="eps"),
    "1/0": Fault(Op(lambda x: 1 / x.relu()), "aten.reciprocal", change="eps"),
    "exp overflows": Fault(Op(lambda x: (x * 500).exp()), "aten.exp", change="clamp"),
    "exp overflows, then inf/inf": Fault(Op(lambda x: (x * 500).exp() / (x * 500).exp().sum(1, keepdim=True)), "aten.exp", change="clamp"),
    "root of 0, backward": Fault(Op(lambda x: gate(x).sqrt()), "aten.sqrt", "backward", change="eps"),
    "rsqrt of 0": Fault(Op(lambda x: x.relu().rsqrt()), "aten.rsqrt", change="eps"),
    "norm of a zero vector by hand, backward": Fault(Op(lambda x: x + (x * 0).square().sum(1, keepdim=True).sqrt()), "aten.sqrt", "backward", change="eps"),
    "eigenvectors of equal values, backward": Fault(
        Op(lambda x: x @ torch.linalg.eigh(x.T @ x * 0 + torch.eye(6))[1]), "aten._linalg_eigh", "backward", change="eps"
    ),
    "power below 1 of 0, backward": Fault(Op(lambda x: gate(x).pow(0.5)), "aten.pow", "backward", change="eps"),
    "power of a negative": Fault(Op(lambda x: x.pow(1.5)), "aten.pow", change="eps"),
    "acos of 1, backward": Fault(Op(lambda x: torch.acos(x / x.abs())), "aten.acos", "backward", change="clamp"),
    "acos beyond 1": Fault(Op(lambda x: torch.acos(x + 2)), "aten.acos", change="clamp"),
    "x log x at 0, backward": Fault(Op(lambda x: torch.xlogy(gate(x), gate(x))), "aten.xlogy", "backward", change="eps"),
    "constant row normalised": Fault(Op(normalized), "aten.div", change="eps"),
    "logit of 1": Fault(Op(lambda x: torch.logit((x * 100).sigmoid())), "aten.logit", change="eps"),
    "cumprod overflows": Fault(Op(lambda x: (x * 0 + 1e10).cumprod(1)), "aten.cumprod", change="clamp"),
    "times infinity": Fault(Op(lambda x: x.relu() * INF), "aten.mul", change="clamp"),
    "mask times infinity": Fault(Op(lambda x: x + (x > 0).float() * -INF), "aten.mul", change="clamp"),
    "root hidden by where": Fault(Op(lambda x: torch.where(x > 0, gate(x).sqrt(), 0.0)), "aten.sqrt", "backward", change="eps"),
    "log hidden by where": Fault(Op(lambda x: torch.where(x > 0, gate(x).log(), 0.0)), "aten.log", "backward", change="eps"),
    "fully masked row": Fault(Attention(rows=(3,)), "aten._softmax", change="clamp"),
    "fully masked row, additive": Fault(Additive(row=4), "aten._softmax", change="clamp"),
    "log_softmax of a masked row": Fault(Op(lambda x: (x.masked_fill(torch.ones(6) > 0, -INF)).log_softmax(1)), "aten._log_softmax", change="clamp"),
    "float16 matmul overflows": Fault(Op(lambda x: (x.abs() * 3e4) @ torch.ones(6, 6, dtype=x.dtype)), "aten.mm", loss=fp16, change="dtype"),
    "float16 cast overflows": Fault(Op(lambda x: (x * 1e6).half().float()), "aten._to_copy", change="dtype"),
    "in place": Fault(Op(lambda x: x.relu().clone().log_().add_(1)), "aten.log_", change="eps"),
    "written through a view": Fault(Op(lambda x: _through_a_view(x)), "aten.sqrt", change="eps"),
    "a derivative of one's own": Fault(Op(Clever.apply), "Clever", "backward"),
    "NaN beside an infinity": Fault(Op(lambda x: (x * 500).exp().log() + x.sqrt()), "aten.sqrt", change="eps"),
    "uninitialised memory is read": Fault(Op(lambda x: x + torch.empty(6)), "aten.empty", loss=lambda m, x: filled_with_nan(m, x)),
    "loss function": Fault(Op(same), "aten.log", module=None, loss=lambda m, x: (through(m, x).softmax(1) * 0).log().mean(), change="eps"),
    "every label ignored": Fault(
        Op(same), "aten.nll_loss_forward", module=None, loss=lambda m, x: F.cross_entropy(through(m, x), torch.full((8,), -100)), change="labels"
    ),
    "bad weight": Fault(Op(same), "", kind="weight", module="first", spoil=poison("first.weight", 2), change="parameter"),
    "embedding row": Fault(Table(), "", kind="weight", module="fault.table", loss=embedding, spoil=poison("fault.table.weight", 4), change="parameter"),
    "bad input": Fault(Op(same), "", kind="input", module="first", spoil=nan_input, change="look_at"),
    "infinite input": Fault(Op(same), "", kind="input", module="first", spoil=inf_input, change="look_at"),
}


def _through_a_view(x):
    y = torch.ones_like(x) * x
    y[:, 2:4] = (x[:, 2:4].relu() - 1).sqrt()
    return y


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults(name):
    """The module is right in every planted fault, the operation too, and the remedy has a number or a word for programs."""
    fault = FAULTS[name]
    model, x = net(fault.middle), inputs()
    if fault.spoil:
        fault.spoil(model, x)
    culprit = find(model, lambda: (fault.loss or mean)(model, x))
    assert culprit is not None
    print(culprit)
    assert (culprit.kind, culprit.op, culprit.phase) == (fault.kind, fault.op, fault.phase)
    assert (culprit.inside, culprit.module) == (fault.module is not None, fault.module or "")
    assert set(culprit.remedy.change) <= set(CHANGES)
    assert not fault.change or set(culprit.remedy.change) == {fault.change}


HEALTHY = {
    "linear": Op(same),
    "causal mask": Attention(),
    "additive mask": Additive(),
    "norm of a zero vector": Op(lambda x: (x * 0).norm(dim=1, keepdim=True) + x),
    "angle at the origin": Op(lambda x: torch.atan2(gate(x) * 0, gate(x))),
    "a value masked away": Op(lambda x: torch.where(x > 0, x.detach().relu().log(), x)),
    "infinity as a start": Op(lambda x: torch.maximum(x, torch.full_like(x, -INF))),
    "uninitialised memory": Op(lambda x: torch.empty_like(x).fill_(1.0) * x),
    "fused attention": Op(lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None], is_causal=True)[0, 0]),
    "infinite sort key": Op(lambda x: x.masked_fill(x < 0, INF).clamp(max=3.0)),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_what_is_legal_is_not_named(name):
    """Masks of -inf, their softmax, and values that are masked away while loss and gradients are finite have no culprit."""
    model, x = net(HEALTHY[name]), inputs()
    assert find(model, lambda: mean(model, x)) is None


# ---- what people read


def test_what_a_culprit_says():
    """It names module, operation, the range of the argument, the line that called it, and a remedy with a number."""
    model, x = net(Op(lambda x: x.relu().log())), inputs()
    text = str(find(model, lambda: mean(model, x)))
    assert "aten.log in fault (Op, forward)" in text
    assert "self float32[8x6] in [0, 1.12]" in text
    assert "test_culprit.py:" in text
    assert "model, x = net(Op(lambda x: x.relu().log())), inputs()" in text
    assert "log(x.clamp(min=1e-08))" in text
    assert str(find(model, lambda: mean(model, x)).cause()).startswith("aten.log in fault (Op, forward) (0.9")


def test_a_value_that_was_masked_too_late():
    """Where the result was thrown away and its derivative was not, the remedy is to mask the argument, forward or backward."""
    for hidden in (lambda x: torch.where(x > 0, gate(x).sqrt(), 0.0), lambda x: torch.where(x > 0, x.sqrt(), 0.0)):
        model, x = net(Op(hidden)), inputs()
        culprit = find(model, lambda: mean(model, x))
        assert culprit.op == "aten.sqrt"
        assert culprit.remedy.text.startswith("mask the argument, not the result")


def test_half_precision_gets_another_eps():
    """1e-8 is 0 in float16, so the remedy there is a number that it can hold."""
    model, x = net(Op(lambda x: x.relu().log())), inputs()
    culprit = find(model, lambda: fp16(model, x))
    assert culprit.remedy.change == {"eps": 1e-4}
    assert float(torch.tensor(1e-4, dtype=torch.float16)) > 0


def test_the_target_is_masked():
    """An infinity on purpose that reaches the loss is named where nothing else is to blame."""
    model, x = net(Op(same)), inputs()

    def step():
        logits = through(model, x).masked_fill(torch.tensor([True, False, False]), -INF)
        return F.cross_entropy(logits, torch.zeros(8, dtype=torch.long))

    culprit = find(model, step)
    assert culprit.op == "aten.masked_fill"
    assert "reaches the loss" in culprit.reason


def test_the_optimizer_did_it():
    """Where loss and gradients are finite and the weights are not after the step, the operation of the update is named."""
    model, x = net(Op(same)), inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=INF)
    before = [p.tolist() for p in model.parameters()]

    def step():
        loss = mean(model, x)
        loss.backward()
        optimizer.step()
        return loss

    culprit = find(model, step)
    assert (culprit.phase, culprit.kind) == ("update", "operation")
    assert before == [p.tolist() for p in model.parameters()]


@pytest.mark.parametrize("reentrant", [False, True])
def test_behind_a_checkpoint(reentrant):
    """Modules that activation checkpointing runs twice are named as they are without it, forward and backward."""
    from torch.utils.checkpoint import checkpoint

    for middle, op, phase in ((lambda x: x.relu().log(), "aten.log", "forward"), (lambda x: gate(x).sqrt(), "aten.sqrt", "backward")):
        model, x = net(Op(middle)), inputs()
        culprit = find(model, lambda: model["last"](checkpoint(model["fault"], model["first"](x), use_reentrant=reentrant)).sum())
        assert (culprit.op, culprit.phase, culprit.module) == (op, phase, "fault")


def test_compiled_models_are_replayed_in_eager():
    """A compiled model has its operation named as an eager one has."""
    model, x = net(Op(lambda x: x.relu().log())), inputs()
    compiled = torch.compile(model["fault"], backend="eager")
    compiled(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        culprit = find(model, lambda: model["last"](compiled(model["first"](x))).sum())
    assert (culprit.op, culprit.module) == ("aten.log", "fault")


def test_a_loss_in_other_clothes():
    """The loss may be a dict of terms, an object with ``loss``, or nothing where the function runs the backward pass itself."""
    from types import SimpleNamespace

    model, x = net(Op(lambda x: gate(x).sqrt())), inputs()

    def own():
        mean(model, x).backward()

    for step in (lambda: {"a": x.sum(), "b": mean(model, x)}, lambda: SimpleNamespace(loss=mean(model, x)), own):
        assert find(model, step).op == "aten.sqrt"
    assert find(model, lambda: {"a": x.sum(), "b": x.square().sum() * INF}).op == "aten.mul"


# ---- looking changes nothing


def everything(model, optimizer, x):
    return [
        [(n, p.tolist(), id(p), None if p.grad is None else (id(p.grad), p.grad.tolist())) for n, p in model.named_parameters()],
        [(n, b.tolist()) for n, b in model.named_buffers()],
        [(n, m.training, sorted(map(str, vars(m)))) for n, m in model.named_modules()],
        repr(optimizer.state_dict()),
        x.tolist(),
        torch.get_rng_state().tolist(),
        len(torch.nn.modules.module._global_forward_hooks),
        len(torch.nn.modules.module._global_forward_pre_hooks),
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(fails):
    """Weights, buffers, gradients, modes, optimizer, batch, random states and hooks are as before, also if the step raises."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), Op(lambda x: x.relu().log()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    x = inputs()
    model[:3](x).sum().backward()
    optimizer.step()

    def step():
        model.train()
        x.add_(1.0)
        loss = model(x).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        if fails:
            raise KeyError("planted")
        return loss

    before = everything(model, optimizer, x)
    if fails:
        with pytest.raises(KeyError, match="planted"):
            find(model, step)
    else:
        assert find(model, step).op == "aten.log"
    assert everything(model, optimizer, x) == before
    second = nn.Linear(2, 2)
    assert find(second, lambda: second(torch.ones(1, 2)).sum()) is None


def test_the_replay_draws_what_the_run_drew():
    """Dropout in the replay drops what it would have dropped next: the fault that depends on it comes back."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), Op(lambda x: 1 / x))
    x = inputs()
    torch.manual_seed(3)
    found = [find(model, lambda: model(x).sum()).output for _ in range(2)]
    zeros = int((model[1](model[0](x)) == 0).sum())
    assert found[0] == found[1]
    assert f"and {zeros} infinite" in found[0]


def test_what_cannot_be_read_is_said(monkeypatch):
    """An operation whose result cannot be read is named in one warning, and the search goes on with the others."""
    from lossguard.culprit import trace

    def state_of(tensor):
        if tensor.shape == (8, 5):
            raise NotImplementedError("no such kernel")
        return states.state_of(tensor)

    monkeypatch.setattr(trace, "state_of", state_of)
    model, x = net(Op(lambda x: x.relu().log() + x[:, :5].relu().sum())), inputs()
    with pytest.warns(RuntimeWarning, match=r"the results of \d+ kinds of operations could not be read \(.*relu.*\)"):
        assert find(model, lambda: mean(model, x)).op == "aten.log"


def test_several_ranks_are_left_alone(tmp_path, monkeypatch):
    """Where several processes train together the step is not run again, because it would wait for the others; the finding says so."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    halt, _ = run(tmp_path, Op(BAD["forward"]))
    assert halt.culprit is None
    assert "not sought where several ranks train together" in halt.finding.message


def test_wrong_use():
    """What cannot work is refused with what to do."""
    with pytest.raises(ValueError, match="give the model first"):
        find(lambda: 1, nn.Linear(1, 1))
    with pytest.raises(ValueError, match="give a function without arguments that returns the loss"):
        find(nn.Linear(1, 1), torch.zeros(1))


# ---- in a run


def run(tmp_path, middle, *, ill=13, steps=30, show=True, **options):
    """A run whose batches are made ill at one step; returns the halt and the guard."""
    model = net(middle)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(5)
    loader = [torch.randn(8, 6, generator=generator) * (200.0 if i == ill else 1.0) for i in range(steps)]
    guard = Guard(model, optimizer, record=tmp_path, **{"locate": lambda x, y: mean(model, x), "every": 10, "dense": 3, **options})
    with pytest.raises(TrainingHalted) as caught, guard:
        for x in loader:
            if show:
                guard.batch(x)
            loss = mean(model, x)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(loss)
    return caught.value, guard


BAD = {"forward": lambda x: (12 - x).log(), "backward": lambda x: (x * (x < 10)).abs().sqrt() + x}


@pytest.mark.parametrize("lag", [0, 8])
@pytest.mark.parametrize("phase", BAD)
def test_a_halt_names_the_operation(tmp_path, phase, lag):
    """A guard that was told how the loss is computed names the operation, also when the verdict comes late and the weights are lost."""
    halt, guard = run(tmp_path, Op(BAD[phase]), lag=lag, ill=13)
    op = {"forward": "aten.log", "backward": "aten.sqrt"}[phase]
    assert halt.finding.diagnosis.startswith("nonfinite_")
    assert f"run again, step 13 has it first from {op} in fault (Op, {phase})" in halt.finding.message
    assert halt.finding.causes[0].name == f"{op} in fault (Op, {phase})"
    assert halt.finding.remedies[0].change["eps"] == 1e-8
    assert halt.culprit["module"] == "fault"
    state = json.loads((halt.folder / "state.json").read_text())
    assert state["culprit"]["op"] == op
    assert Finding.from_dict(state["finding"]).causes == halt.finding.causes
    for known in (guard.findings, findings(tmp_path)):
        assert halt.finding.causes in [f.causes for f in known]


def test_locating_changes_no_run():
    """With locate= a run has the same weights and random states as without, and the copy of the weights is counted as memory."""

    def final(**options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with Guard(model, optimizer, **options) as guard:
            for _ in range(25):
                x = torch.randn(8, 6)
                guard.batch(x)
                loss = model(x).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                guard.step(loss)
            memory = guard.memory
        return [v.tolist() for v in model.state_dict().values()], torch.rand(3).tolist(), memory, sum(v.nbytes for v in model.state_dict().values())

    off, on = final(), final(locate=lambda x, y: None)
    assert off[:2] == on[:2]
    assert on[2] - off[2] == on[3] + 2 * 8 * 6 * 4


def test_what_cannot_be_located_is_said(tmp_path):
    """Where no batch was shown, or the step comes out finite, the finding says so; where the function fails, the halt stands."""
    halt, _ = run(tmp_path / "n", Op(BAD["forward"]), show=False)
    assert "no batch was shown; use for x, y in guard.batches(loader)" in halt.finding.message
    halt, _ = run(tmp_path / "a", Op(BAD["forward"]), locate=lambda x, y: x.sum())
    assert "the step was run again and came out finite" in halt.finding.message
    assert halt.culprit is None

    def broken(x, y):
        raise KeyError("planted")

    with pytest.warns(RuntimeWarning, match=r"lossguard: locate failed and is switched off for this run \(KeyError: 'planted'\)"):
        halt, _ = run(tmp_path / "b", Op(BAD["forward"]), locate=broken)
    assert halt.culprit is None
    with pytest.raises(ValueError, match="locate is a Tensor; give a function of inputs and targets"):
        run(tmp_path / "c", Op(same), locate=torch.zeros(1))


def test_the_copy_is_from_before_the_fault():
    """The copy of the weights stops at the last sound step and goes on once loss and weights are sound again; no value is read."""
    model = nn.Linear(2, 1)
    keepsake = Keepsake(model)
    for step, loss in enumerate([1.0, math.nan, math.nan, 1.0, 1.0]):
        with torch.no_grad():
            model.weight.fill_(step)
            model.weight[0, 0] = math.nan if step == 4 else step
        keepsake.keep(step, [torch.tensor(loss)])
        assert keepsake.at[0].item() == [1, 1, 1, 4, 4][step]
    keepsake.put_back()
    assert model.weight.tolist() == [[3.0, 3.0]]


STEPS = """
import torch

class Log(torch.nn.Module):
    def forward(self, x):
        return (12 - x).log()

def step(bundle):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), Log())
    return model(bundle.batch[0]).square().mean()
"""


def test_replay_names_the_operation(tmp_path, monkeypatch, capfd):
    """``python -m lossguard replay --locate`` names the operation from what a halt has left behind."""
    run(tmp_path / "record", Op(BAD["forward"]), locate=None, keep_batch=True)
    (tmp_path / "my_steps.py").write_text(STEPS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    assert main(["replay", "record", "--step", "my_steps:step", "--locate"]) == 0
    text = capfd.readouterr().out
    assert "reproducible" in text
    assert "aten.log in 1 (Log, forward)" in text
    assert "my_steps.py:6 in forward" in text


def test_a_step_that_builds_its_own_model():
    """Of a function that is all there is, the operation is named by the modules it calls, and its gradients are looked at too."""

    def step():
        model = nn.Sequential(nn.Linear(6, 6), Op(lambda x: gate(x).sqrt()))
        model[0].weight.data[0, 0] = poisoned
        return model(inputs()).sum()

    poisoned = 1.0
    assert str(of_call(step)[1]).startswith("  culprit    aten.sqrt in 1 (Op, backward)")
    poisoned = math.nan
    assert str(of_call(step)[1]).startswith("  culprit    weight 0.weight in 0 (Linear, forward)")
    x = inputs()
    x[2] = math.nan
    assert of_call(lambda: x.sum(), {"x": x})[1].name == "batch['x']"
    assert of_call(lambda: inputs().sum())[1] is None
