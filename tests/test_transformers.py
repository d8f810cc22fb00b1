"""The Hugging Face callback: every promise of its docstring, on real Trainers and models that are drawn from a configuration."""

from __future__ import annotations

import json
import logging
import math
import pickle
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from lossguard import Severity, TrainingHalted  # noqa: E402
from lossguard.integrations.hftrainer import Detour, as_text, from_text  # noqa: E402
from lossguard.integrations.transformers import LossGuardCallback  # noqa: E402
from lossguard.soundness import nonfinite  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

pytestmark = [pytest.mark.filterwarnings("ignore:.*"), pytest.mark.filterwarnings("error::RuntimeWarning:lossguard")]

VOCABULARY, LENGTH = 31, 12


def gpt2(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **options}))


def bert():
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(**sizes, max_position_embeddings=16, num_labels=3))


def t5():
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))


def vit():
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(**sizes, num_labels=2))


class Plain(nn.Module):
    """No model of the library: a module that returns its loss in a dict, as the Trainer allows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits} if labels is not None else {"logits": logits}


def counting(n=256):
    """Sequences that count in threes from a random start: each token follows from the one before."""
    start = torch.randint(VOCABULARY, (n, 1), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "labels": ids.clone()} for ids in (start + 3 * torch.arange(LENGTH)) % VOCABULARY]


def classes(n=256):
    """Sequences whose first token tells the class."""
    ids = torch.randint(1, VOCABULARY, (n, LENGTH), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row[0] % 3} for row in ids]


def pairs(n=256):
    """Sequences and the same sequences, a token further."""
    return [{"input_ids": d["input_ids"], "labels": (d["input_ids"] + 3) % VOCABULARY} for d in counting(n)]


def images(n=256, poison: int | None = None):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(n, 1, 8, 8, generator=generator)
    labels = (pixels.mean(dim=(1, 2, 3)) > 0).long()
    if poison is not None:
        pixels[poison, 0, 3, 3] = math.nan
    return [{"pixel_values": p, "labels": y} for p, y in zip(pixels, labels, strict=True)]


def vectors(n=256, poison: int | None = None):
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(0))
    y = x[:, :3].argmax(1)
    if poison is not None:
        x[poison, 2] = math.nan
    return [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]


class InOrder(Trainer):
    """Batches in the data's order, so that a test knows which one is which."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(model, data, *callbacks, folder="unused", kind=Trainer, **options):
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 20, "seed": 0}
    known = {"compute_loss_func", "eval_dataset", "compute_metrics", "optimizers"}
    if part := options.pop("part", None):  # the optimizer is given this part of the model only
        options["optimizers"] = (torch.optim.AdamW([p for n, p in model.named_parameters() if n.startswith(part)], lr=1e-3), None)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        **{**quiet, "max_steps": 40, "learning_rate": 1e-3, **{k: v for k, v in options.items() if k not in known}},
    )
    return kind(model, arguments, train_dataset=data, callbacks=list(callbacks), **{k: v for k, v in options.items() if k in known})


def train(model, data, callback=None, **options):
    callback = callback or LossGuardCallback()
    run = trainer(model, data, callback, **options)
    run.train()
    return callback


def heard(callback, least=Severity.WARNING):
    return {f.diagnosis for f in callback.findings if f.severity >= least}


def hooks_on(model, optimizers):
    """Hooks of any kind that are left."""
    count = len(nn.modules.module._global_forward_hooks)
    count += sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())
    count += sum(len(o._optimizer_step_pre_hooks) + len(o._optimizer_step_post_hooks) for o in optimizers)
    return count + sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


# ---- healthy runs


HEALTHY = {
    "gpt2": (gpt2, counting, {"max_steps": 60}),
    "gpt2 accumulating": (gpt2, counting, {"gradient_accumulation_steps": 4, "max_steps": 16}),
    "gpt2 bf16": (gpt2, counting, {"bf16": True}),
    "gpt2 smoothed labels, no clipping": (gpt2, counting, {"label_smoothing_factor": 0.1, "max_grad_norm": 0.0}),
    "gpt2 checkpointing": (gpt2, counting, {"gradient_checkpointing": True}),
    "bert": (bert, classes, {"max_steps": 50, "lr_scheduler_type": "cosine", "warmup_steps": 8}),
    "t5": (t5, pairs, {"optim": "adafactor"}),
    "vit": (vit, images, {}),
    "plain module": (Plain, vectors, {"learning_rate": 0.3, "optim": "sgd"}),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_is_seen_whole_and_nothing_is_found(name):
    """Every trainable tensor has its gradient and update, guard steps are the Trainer's, and nothing of a warning or above is said."""
    make, data, options = HEALTHY[name]
    model = make()
    callback = train(model, data(), **options)
    observed, tensors = callback.coverage.observed, sum(p.requires_grad for p in model.parameters())
    assert callback.guard.steps == options.get("max_steps", 40)
    assert observed["grad_norm"] == observed["update_norm"] == tensors
    assert callback.coverage.not_observed.keys() <= ({"activations"} if name == "t5" else set())  # T5's shared embedding is called by other names
    assert callback.guard.history.loss_family == ("unknown" if "smoothed" in name else "cross_entropy")
    assert heard(callback) == set()
    losses = callback.guard.history.losses()
    assert losses[-5:].mean() < losses[:5].mean()


@pytest.mark.parametrize(
    "options", [{"max_steps": 20}, {"gradient_accumulation_steps": 3, "max_steps": 6}, {"bf16": True, "max_steps": 10}], ids=["plain", "accumulating", "bf16"]
)
def test_weights_are_bit_identical_with_and_without(options):
    """Dropout, clipping and schedule included, a guarded training ends with the very weights of a bare one, and logs the same losses."""
    ends = []
    for callbacks in ([], [LossGuardCallback(every=2)]):
        model = gpt2()
        run = trainer(model, counting(), *callbacks, logging_steps=1, **options)
        run.train()
        ends.append((model.state_dict(), [line["loss"] for line in run.state.log_history if "loss" in line]))
    assert ends[0][1] == ends[1][1]
    for name, tensor in ends[0][0].items():
        assert torch.equal(tensor, ends[1][0][name]), name


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_numbers_are_the_trainers_own(accumulate):
    """Losses and unclipped gradient norms are those that the Trainer computes, one for each update; the clip coefficient follows from them."""
    callback = LossGuardCallback()
    run = trainer(gpt2(), counting(), callback, logging_steps=1, max_grad_norm=0.2, max_steps=20, gradient_accumulation_steps=accumulate)
    run.train()
    history, log = callback.guard.history, [line for line in run.state.log_history if "loss" in line]
    norms = history.last("grad_total")[:, 0]
    np.testing.assert_allclose(history.losses(), [line["loss"] for line in log], rtol=1e-5)
    np.testing.assert_allclose(norms, [line["grad_norm"] for line in log], rtol=1e-4)
    np.testing.assert_allclose(history.last("clip_coefficient")[:, 0], np.minimum(1.0, 0.2 / norms), rtol=1e-3)


def test_accumulation_counts_no_module_twice():
    """An update's micro-batches are one step: module calls, gradients and updates are recorded once."""
    whole, parts = train(gpt2(), counting()), train(gpt2(), counting(), gradient_accumulation_steps=4, max_steps=10)
    assert [u.name for u in parts.guard.history.units] == [u.name for u in whole.guard.history.units]
    assert parts.guard.history.seen("update_norm").all()


def test_labels_of_a_causal_model_are_shifted():
    """The likelihood of the labels at the softmax is the loss, but for the count of tokens that the Trainer divides by, as the model's own loss shifts them."""
    history = train(gpt2(), counting(), max_steps=20).guard.history
    ratio = history.last("label_nll")[1:, 0] / history.losses()[1:]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
    assert min(abs(ratio[0] - 1.0), abs(ratio[0] - LENGTH / (LENGTH - 1))) < 1e-4


# ---- ill runs


def dropped(model):
    """Weights that somebody froze by mistake behind the optimizer's back: their gradients are cut off."""
    model.transformer.h[0].register_forward_hook(lambda module, args, out: out.detach() if isinstance(out, torch.Tensor) else (out[0].detach(), *out[1:]))
    return model


def shifted():
    """Labels that belong to the next sample: nothing can be learned from them."""
    rows, labels = vectors(4096), torch.randint(3, (4096,), generator=torch.Generator().manual_seed(1))
    return [{**row, "labels": y} for row, y in zip(rows, labels, strict=True)]


ILL = {
    "learning rate times 100": (gpt2, counting, {"learning_rate": 0.1, "max_steps": 20}, {"update_ratio_high"}),
    "NaN in the data": (Plain, lambda: vectors(poison=43), {"kind": InOrder}, {"nonfinite_input"}),
    "NaN in pixels": (vit, lambda: images(poison=43), {"kind": InOrder}, {"nonfinite_input"}),
    "gradients cut off": (lambda: dropped(gpt2()), counting, {"max_steps": 80}, {"unchanged_weights"}),
    "optimizer of a part": (gpt2, counting, {"part": "transformer.h.0."}, {"unchanged_weights"}),
    "learning rate far too low": (Plain, vectors, {"learning_rate": 1e-9, "max_steps": 200}, {"update_ratio_low"}),
    "labels of other samples": (Plain, shifted, {"learning_rate": 1e-3, "max_steps": 512, "lr_scheduler_type": "constant"}, {"loss_plateau"}),
}


@pytest.mark.parametrize("name", ILL)
def test_an_ill_run_is_named(name):
    """What is wrong with the run is among the findings, by one of its right names."""
    make, data, options, names = ILL[name]
    callback = train(make(), data(), LossGuardCallback(halt=None), **options)
    assert heard(callback, Severity.INFO) & names, callback.findings


def test_a_nan_loss_is_seen_although_the_trainers_log_hides_it():
    """The raw loss is read: the Trainer's log shows finite losses only, and the batch is named where the NaN came from."""
    callback = LossGuardCallback(halt=None)
    run = trainer(Plain(), vectors(poison=43), callback, kind=InOrder, logging_steps=1, max_steps=10)
    run.train()
    assert all(math.isfinite(line["loss"]) for line in run.state.log_history if "loss" in line)
    found = callback.findings[0]
    assert (found.diagnosis, found.step) == ("nonfinite_input", 5)
    assert not math.isfinite(callback.guard.history.losses()[5])


def test_a_bad_micro_batch_is_named_wherever_it_stands():
    """Of the micro-batches of an update each is looked at, not only the last."""
    for sample in (32, 40, 48, 56):  # the four micro-batches of update 1
        callback = train(Plain(), vectors(poison=sample), LossGuardCallback(halt=None), kind=InOrder, gradient_accumulation_steps=4, max_steps=4)
        assert (callback.findings[0].diagnosis, callback.findings[0].step) == ("nonfinite_input", 1), sample


# ---- the loss, wherever it comes from


class OwnStep(Trainer):
    """A training step of the user's own, past Accelerate."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = model(**self._prepare_inputs(inputs))["loss"]
        loss.backward()
        return loss.detach()


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        loss = 3.0 * outputs["loss"]
        return (loss, outputs) if return_outputs else loss


LOSSES = {
    "own training_step": ({"kind": OwnStep}, 1.0),
    "own compute_loss": ({"kind": OwnLoss}, 3.0),
    "compute_loss_func": ({"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: 2.0 * F.cross_entropy(outputs["logits"], labels)}, 2.0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_the_users_own(name):
    """The recorded loss is the one that backward ran on, whoever computed it."""
    options, factor = LOSSES[name]
    history = train(Plain(), vectors(), max_steps=20, **options).guard.history
    plain = train(Plain(), vectors(), max_steps=20).guard.history
    np.testing.assert_allclose(history.losses()[0], factor * plain.losses()[0], rtol=1e-5)
    assert history.losses().size == 20
    assert history.seen("grad_norm").all() and history.seen("update_norm").all()


def test_a_loss_scaler_keeps_the_true_scale():
    """With float16 and a loss scaler, losses and gradient norms have the scale that they have without."""

    def fit(scaled):
        callback = LossGuardCallback()
        run = trainer(Plain(), vectors(), callback, max_steps=20)
        if scaled:  # Accelerate refuses fp16 on a CPU, torch does not
            run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            run.model.forward = torch.autocast("cpu", torch.float16)(run.model.forward)
        run.train()
        return callback

    ours, true = fit(True), fit(False)
    assert (ours.guard.history.fact("scaler") == 1.0).all()
    np.testing.assert_allclose(ours.guard.history.losses(), true.guard.history.losses(), rtol=0.02)
    np.testing.assert_allclose(ours.guard.history.last("grad_total"), true.guard.history.last("grad_total"), rtol=0.1)
    assert heard(ours) == set()


def test_evaluations_are_the_validation_curve():
    """Each evaluation within the training adds its loss and accuracy; one after it adds nothing and fails nothing."""
    callback = LossGuardCallback()
    accuracy = lambda p: {"accuracy": float((p.predictions.argmax(1) == p.label_ids).mean())}  # noqa: E731
    run = trainer(Plain(), vectors(), callback, eval_strategy="steps", eval_steps=10, eval_dataset=vectors(64), compute_metrics=accuracy, eval_on_start=True)
    run.train()
    logged = [(line["eval_loss"], line["eval_accuracy"]) for line in run.state.log_history if "eval_loss" in line][1:]
    np.testing.assert_allclose(callback.guard.history.validations()[:, 1:3], logged, rtol=1e-6)
    assert callback.guard.history.validations()[:, 0].tolist() == [9, 19, 29, 39]
    run.evaluate()
    assert len(callback.guard.history.validations()) == 4


# ---- halting, and coming off


def test_a_halt_comes_out_of_train():
    """TrainingHalted ends trainer.train at the step of the fault; the guard is detached and keeps its finding."""
    callback = LossGuardCallback()
    run = trainer(Plain(), vectors(poison=43), callback, kind=InOrder)
    with pytest.raises(TrainingHalted) as halt:
        run.train()
    assert halt.value.exit_code == 83
    assert (halt.value.finding.step, run.state.global_step) == (5, 6)
    assert callback.halted is halt.value
    assert callback.guard.closed and hooks_on(run.model, callback.guard.optimizers) == 0


def test_a_halt_may_stop_the_training_instead():
    """on_halt='stop' ends the training early, and train returns as after any other."""
    callback = LossGuardCallback(on_halt="stop")
    run = trainer(Plain(), vectors(poison=43), callback, kind=InOrder)
    assert run.train().global_step == 6
    assert callback.halted.finding.diagnosis == "nonfinite_input"


class Bad(Exception):
    pass


class Raises(TrainerCallback):
    def __init__(self, error):
        self.error = error

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise self.error


class Rotten(list):
    def __getitem__(self, i):
        raise Bad


@pytest.mark.parametrize("how", ["end", "callback", "interrupt", "data", "late callback"])
def test_all_comes_off(how):
    """After the end, an exception in a callback or in the data, or Ctrl-C, neither model, optimizer, Trainer nor Accelerate carries anything of ours."""
    errors = {"callback": [Raises(Bad())], "interrupt": [Raises(KeyboardInterrupt())]}
    callback = LossGuardCallback()
    run = trainer(Plain(), Rotten(vectors()) if how == "data" else vectors(), *([] if how == "late callback" else [callback]), *errors.get(how, []))
    if how == "late callback":
        run.add_callback(callback)
    try:
        run.train()
    except (Bad, KeyboardInterrupt):
        assert how not in ("end", "late callback")
    assert callback.guard.closed
    assert hooks_on(run.model, callback.guard.optimizers) == 0
    assert not {"training_step", "_save_checkpoint"} & set(vars(run))
    assert "backward" not in vars(run.accelerator)


def test_out_of_memory_begins_anew():
    """auto_find_batch_size runs the training again with smaller batches: the guard begins anew with it."""

    class Tight(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if len(inputs["labels"]) > 4 and self.state.global_step == 1:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    callback = train(Plain(), vectors(), kind=Tight, auto_find_batch_size=True, max_steps=4)
    assert callback.guard.steps == 4
    assert heard(callback) == set()


def test_a_detour_leaves_others_alone():
    """A method that somebody else has replaced before us comes back as his; one replaced after us stays."""

    class Owner:
        def method(self):
            return 1

    owner = Owner()
    owner.method = first = lambda: 2
    detour = Detour(owner, "method", lambda method: 10 * method())
    assert owner.method() == 20
    detour.remove()
    assert owner.method is first
    detour = Detour(owner, "method", lambda method: 10 * method())
    owner.method = second = lambda: 3
    detour.remove()
    assert owner.method is second


def test_wrong_keywords_are_named():
    """A misspelt keyword is refused where it is written, a wrong value before the first step."""
    with pytest.raises(TypeError, match="did you mean 'every'"):
        LossGuardCallback(evry=3)
    with pytest.raises(TypeError, match="unknown keyword 'accumulate'"):
        LossGuardCallback(accumulate=4)
    with pytest.raises(ValueError, match="unknown on_halt 'halt'; expected 'raise' or 'stop'"):
        LossGuardCallback(on_halt="halt")
    with pytest.raises(ValueError, match="unknown diagnosis"):
        train(Plain(), vectors(), LossGuardCallback(mute={"explodng_gradient"}))


def test_a_callback_without_a_trainer_says_so():
    """Called by anything but a Trainer it warns and watches nothing."""
    with pytest.warns(RuntimeWarning, match="no transformers.Trainer calls this callback"):
        LossGuardCallback().on_train_begin(None, None, None, model=Plain())


# ---- checkpoints


def checkpoints(folder):
    return sorted(int(p.name.partition("-")[2]) for p in Path(folder).glob("checkpoint-*"))


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_goes_on_with_the_same_history(tmp_path, restore):
    """A resumed training has the history and the findings of an uninterrupted one; the callback that the user holds is the one that goes on."""
    options = {"save_strategy": "steps", "save_steps": 15, "learning_rate": 0.05, "max_steps": 30, "restore_callback_states_from_checkpoint": restore}
    whole = train(gpt2(), counting(), LossGuardCallback(halt=None, every=3), folder=tmp_path, **options)
    saved = json.loads((tmp_path / "checkpoint-15" / "trainer_state.json").read_text())
    assert from_text(saved["stateful_callbacks"]["LossGuardCallback"]["attributes"]["_saved"])["steps"] == 15
    callback = LossGuardCallback(halt=None, every=3)
    run = trainer(gpt2(), counting(), callback, folder=tmp_path, **options)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-15"))
    assert callback.guard.every == 3
    assert callback.guard.steps == whole.guard.steps == 30
    for signal in ("grad_norm", "update_norm", "activation_rms"):
        np.testing.assert_array_equal(callback.guard.history.last(signal), whole.guard.history.last(signal), err_msg=signal)
    np.testing.assert_array_equal(callback.guard.history.losses(), whole.guard.history.losses())
    assert heard(whole) and [str(f) for f in callback.findings] == [str(f) for f in whole.findings]
    assert sum(type(c).__name__ == "LossGuardCallback" for c in run.callback_handler.callbacks) == 1


def test_a_checkpoint_of_an_unguarded_run(tmp_path, caplog):
    """A training resumed without a state of the guard is guarded from there on, and the log says where the history begins."""
    options = {"save_strategy": "steps", "save_steps": 10, "max_steps": 20, "folder": tmp_path}
    trainer(Plain(), vectors(), **options).train()
    callback = LossGuardCallback()
    with caplog.at_level(logging.WARNING, "lossguard"):
        trainer(Plain(), vectors(), callback, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert "its history begins at step 10" in caplog.text
    assert callback.guard.steps == 10


def test_a_state_that_does_not_fit_is_left_out(tmp_path):
    """The state of another model is one warning, and the training goes on."""
    options = {"save_strategy": "steps", "save_steps": 10, "max_steps": 20, "folder": tmp_path}
    train(Plain(), vectors(), **options)
    path = tmp_path / "checkpoint-10" / "trainer_state.json"
    state = json.loads(path.read_text())
    other = train(vit(), images(), LossGuardCallback(), max_steps=2)
    state["stateful_callbacks"]["LossGuardCallback"]["attributes"]["_saved"] = as_text(other.guard.state_dict())
    path.write_text(json.dumps(state))
    callback = LossGuardCallback()
    with warnings.catch_warnings(record=True) as heard_warnings:
        warnings.simplefilter("always")
        trainer(Plain(), vectors(), callback, **options).train(resume_from_checkpoint=str(path.parent))
    assert sum("begins anew" in str(w.message) for w in heard_warnings) == 1
    assert callback.guard.steps == 10


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_no_unsound_state_is_saved_over_good_ones(tmp_path, strategy, caplog):
    """Once a weight is NaN no checkpoint is written: rotation keeps the good one, the best model is loaded, and the log names the weight."""
    best = {"eval_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": True, "metric_for_best_model": "steps", "greater_is_better": True}
    options = {"save_strategy": strategy, "save_steps": 5, "save_total_limit": 1, "max_steps": 20, "folder": tmp_path, "kind": InOrder, **best}
    calls = iter(range(100))
    metric = {"compute_metrics": lambda p: {"steps": float(next(calls))}, "eval_dataset": vectors(16)}  # every evaluation seems better
    model, callback = Plain(), LossGuardCallback(halt=None)
    with caplog.at_level(logging.WARNING, "lossguard"):
        train(model, vectors(poison=8 * 7 + 1), callback, logging_nan_inf_filter=True, **options, **metric)
    assert checkpoints(tmp_path) == [5]
    assert "no checkpoint is written: not fit to be saved after 10 steps" in caplog.text and "weights are not finite (net.0.weight" in caplog.text
    assert "the last good one is" in caplog.text
    assert nonfinite(model, []) == []


def test_saves_are_left_alone_on_request(tmp_path):
    """veto_saves=False: the Trainer saves as it would."""
    train(
        Plain(),
        vectors(poison=9),
        LossGuardCallback(halt=None, veto_saves=False),
        folder=tmp_path,
        kind=InOrder,
        save_strategy="steps",
        save_steps=10,
        max_steps=20,
    )
    assert checkpoints(tmp_path) == [10, 20]


# ---- scalars


def test_scalars_go_where_the_trainer_reports_to(tmp_path, monkeypatch):
    """At most 20 scalars under one prefix stand in the Trainer's history and its TensorBoard, at the step they are of; none is printed."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = LossGuardCallback(lag=3)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    run = trainer(gpt2(), counting(), callback, folder=tmp_path, report_to=["tensorboard"])
    run.train()
    rows = [line for line in run.state.log_history if "lossguard/grad_norm" in line]
    names = {k for row in rows for k in row if k.startswith("lossguard/")}
    assert 12 <= len(names) <= 20
    norms = dict(zip((callback.guard.history.steps() + 1).tolist(), callback.guard.history.last("grad_total")[:, 0], strict=True))
    assert [row["step"] for row in rows] == [17, 37, 40]
    np.testing.assert_allclose([row["lossguard/grad_norm"] for row in rows], [norms[row["step"]] for row in rows], rtol=1e-6)
    events = EventAccumulator(str(next(tmp_path.rglob("events.*")).parent))
    events.Reload()
    points = events.Scalars("train/lossguard/grad_norm")
    assert [p.step for p in points] == [17, 37, 40]
    np.testing.assert_allclose([p.value for p in points], [row["lossguard/grad_norm"] for row in rows], rtol=1e-6)


def test_scalars_of_an_ill_run_do_not_fail_and_are_not_printed(capsys):
    """NaN is logged as it is; the console shows the Trainer's own lines only."""
    callback = LossGuardCallback(halt=None)
    run = trainer(Plain(), vectors(poison=3), callback, kind=InOrder, logging_steps=1, max_steps=5)
    run.train()
    assert any(math.isnan(line.get("lossguard/grad_norm", 0.0)) for line in run.state.log_history)
    out = capsys.readouterr().out
    assert "'loss'" in out and "lossguard/" not in out


def test_a_broken_logger_ends_no_run():
    """A callback that raises on our scalars is one warning; training goes on without them."""

    class Broken(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if any(k.startswith("lossguard/") for k in logs):
                raise OSError("disk full")

    with warnings.catch_warnings(record=True) as heard_warnings:
        warnings.simplefilter("always")
        callback = LossGuardCallback()
        trainer(Plain(), vectors(), callback, Broken(), logging_steps=1, max_steps=10).train()
    assert callback.guard.steps == 10
    assert sum("disk full" in str(w.message) for w in heard_warnings) == 1


# ---- adapters, engines, packages


def lora(**options):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(gpt2(), peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], lora_dropout=0.05, **options))


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=["plain", "accumulating"])
def test_lora_is_healthy(options):
    """Adapters alone are watched, a gradient of exactly 0 at the start is fine, and the frozen model below them is no finding."""
    model = lora()
    callback = train(model, counting(), learning_rate=1e-2, **options)
    assert all("lora_" in p.name for p in callback.guard.history.params)
    assert callback.coverage.observed["update_norm"] == len(callback.guard.history.params) == 8
    assert heard(callback) == set()


def test_lora_is_found_ill():
    """A learning rate far too high is named on adapters, too."""
    callback = train(lora(), counting(), LossGuardCallback(halt=None), learning_rate=30.0)
    assert any("learning rate" in cause.name for f in callback.findings for cause in f.causes), callback.findings


def test_engines_that_hide_gradients_are_named(caplog):
    """Under DeepSpeed coverage says what is not seen, and weights that its optimizer holds elsewhere are no finding."""
    from accelerate.utils import DistributedType

    callback = LossGuardCallback()
    run = trainer(Plain(), vectors(), callback, max_steps=2)
    flat = torch.optim.SGD([nn.Parameter(torch.zeros(10))], lr=0.1)

    class Engine:
        distributed_type, callback_handler = DistributedType.DEEPSPEED, None

        def backward(self, loss): ...

    class Pretend:
        def __init__(self):
            self.accelerator, self.callback_handler = Engine(), run.callback_handler

        def training_step(self, model, inputs): ...

        def begin(self):
            callback.on_train_begin(run.args, run.state, run.control, model=run.model, optimizer=flat)

    pretend = Pretend()
    with caplog.at_level(logging.WARNING, "lossguard"):
        pretend.begin()
    assert "DeepSpeed" in caplog.text
    assert "DeepSpeed" in callback.coverage.not_observed["gradients"]
    assert "unchanged_weights" in callback.guard._muted
    callback.guard.close()


def test_the_environment_goes_before_the_callbacks_keywords(monkeypatch, tmp_path, caplog):
    """Variables and their file reach the Trainer's guard, each once; what the Trainer answers itself stays its own."""
    (tmp_path / "run.toml").write_text(f"mute = ['dead_relu']\ntrackers = {{ csv = '{tmp_path}/run.csv' }}\n")
    monkeypatch.setenv("LOSSGUARD_CONFIG", str(tmp_path / "run.toml"))
    monkeypatch.setenv("LOSSGUARD_EVERY", "2")
    with caplog.at_level(logging.INFO, "lossguard"):
        callback = train(Plain(), vectors(), LossGuardCallback(every=5, dense=0), max_steps=6)
    guard = callback.guard
    assert (guard.every, guard.dense, guard._muted, guard.steps, guard._explicit) == (2, 0, {"dead_relu"}, 6, True)
    assert [line for line in caplog.messages if "every" in line] == ["lossguard: every = 2 by LOSSGUARD_EVERY, in the place of 5"]
    assert [line.split(",")[0] for line in (tmp_path / "run.csv").read_text().splitlines()] == ["step", "0", "2", "4"]


def test_a_callback_is_switched_off(monkeypatch):
    """With LOSSGUARD=off the Trainer trains as without a callback: same weights, nothing attached, no halt."""
    plain, watched = Plain(), Plain()
    watched.load_state_dict(plain.state_dict())
    trainer(plain, vectors(poison=40), max_steps=6).train()
    monkeypatch.setenv("LOSSGUARD", "off")
    callback = train(watched, vectors(poison=40), LossGuardCallback(every=1, halt="warning"), max_steps=6)
    assert (callback.findings, callback.guard.closed, callback.halted) == ([], True, None)
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))


def test_it_pickles():
    """The callback goes to other processes as its keywords."""
    assert pickle.loads(pickle.dumps(LossGuardCallback(every=3)))._keywords == {"every": 3}


def test_without_the_package_the_import_says_what_to_install():
    """With no transformers installed the integration names what to install; lossguard itself imports neither it nor Accelerate."""
    code = """
        import sys
        import lossguard
        assert not {"transformers", "accelerate", "tensorboard", "wandb", "mlflow"} & set(sys.modules)
        sys.modules["transformers"] = None
        try:
            import lossguard.integrations.transformers
        except ImportError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert "pip install 'transformers>=4.46'" in done.stdout, done.stderr
