"""Any architecture trains under guard: bit for bit as without it, without a fault, an alarm or an untruthful coverage."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from architectures import JOBS, build
from torch import nn

from lossguard import Guard, Severity

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning:lossguard", "ignore::DeprecationWarning", "ignore::FutureWarning")
STEPS = 8


def bits(tensors):
    return [t.detach().clone() for t in tensors if not nn.parameter.is_lazy(t)]


def train(made, *, guarded, steps=STEPS):
    """(closed guard or None, all losses, all weights and buffers)."""
    guard = Guard(made.model, made.optimizers, halt=None, dense=4, every=3) if guarded else None
    torch.manual_seed(1)
    losses = []
    for i in range(steps):
        if made.step is not None:
            loss = made.step(i)
        else:
            loss = made.loss(i)
            loss.backward()
            for optimizer in made.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        losses += [x.detach().clone() for x in (loss.values() if isinstance(loss, dict) else [loss])]
        if guard is not None:
            guard.step(loss)
    if guard is not None:
        guard.close()
    return guard, losses, bits([*made.model.parameters(), *made.model.buffers()])


def check(guard, model, unseen=()):
    """No fault, no alarm, and every trained parameter and module call is either observed or listed."""
    assert not guard._faults.silenced, guard._faults.silenced
    assert not [f for f in guard.findings if f.severity >= Severity.WARNING], guard.findings
    listed = guard.coverage.not_observed
    assert set(unseen) <= set(listed), listed
    history = guard._history
    for signal in ("grad_norm", "update_norm"):
        seen = history.seen(signal)
        for p, there in zip(history.params, seen.any(axis=0), strict=False):
            assert there or p.name in listed or "no_gradient" in history.facts(), (signal, p.name)
    fired = {u.name.partition("[")[0] for u in history.units}
    if "activations" not in listed:
        silent = {name for name, _ in guard._recorder.passes.modules.values()} - guard._recorder.passes.fired
        assert not silent, silent
    assert fired or "activations" in listed or not guard._recorder.passes.modules


@pytest.mark.parametrize("name", JOBS)
def test_architectures(name):
    """The family trains bit for bit as without a guard, no part of the guard fails, nothing is alarmed, and what is not seen is listed."""
    _, losses, state = train(build(name), guarded=False)
    made = build(name)
    guard, guarded_losses, guarded_state = train(made, guarded=True)
    for a, b in zip([*losses, *state], [*guarded_losses, *guarded_state], strict=True):
        assert torch.equal(a, b)
    check(guard, made.model, made.unseen)


def test_the_list_is_long():
    """There are at least forty families."""
    assert len(JOBS) >= 40


# ---- copies


class Copied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act, self.head = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.act(self.first(x)))


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": saved,
    "ema": lambda m: torch.optim.swa_utils.AveragedModel(m, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)),
    "swa": lambda m: torch.optim.swa_utils.AveragedModel(m),
    "script": torch.jit.script,
}


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_copies_while_attached(way, sampled):
    """Copies of a model under guard can be made in any step and used without the guard seeing them."""
    torch.manual_seed(0)
    model = Copied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x = torch.randn(8, 4)
    with Guard(model, optimizer, halt=None, dense=1, every=4) as guard:
        for i in range(9):
            if i == (4 if sampled else 2):
                other = WAYS[way](model)
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    assert torch.equal(other(x), model(x))
                F.mse_loss(other(x), torch.zeros(8, 3)).backward()
                for p in other.parameters():
                    p.grad = None
                guard.abandon()
            loss = F.mse_loss(model(x), torch.ones(8, 3))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(loss)
    assert [u.name for u in guard._history.units] == ["first", "act", "head"]
    assert not guard._faults.silenced
    assert guard.findings == []


# ---- transformers

TINY = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32}
CAUSAL = {
    "GPT2": {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0},
    "Llama": {**TINY, "num_key_value_heads": 1},
    "Mistral": {**TINY, "num_key_value_heads": 1},
    "Qwen2": {**TINY, "num_key_value_heads": 1},
    "Qwen3": {**TINY, "num_key_value_heads": 1, "head_dim": 8},
    "Gemma2": {**TINY, "num_key_value_heads": 1, "head_dim": 8},
    "Phi": TINY,
    "GPTNeoX": TINY,
    "OPT": {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32, "word_embed_proj_dim": 16},
    "Bloom": {"vocab_size": 32, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    "Mixtral": {**TINY, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Mamba": {"vocab_size": 32, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2},
}
OTHER = {
    "BertForMaskedLM": TINY,
    "DistilBertForMaskedLM": {"vocab_size": 32, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 32},
    "AlbertForMaskedLM": {**TINY, "embedding_size": 8},
    "T5ForConditionalGeneration": {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
    "BartForConditionalGeneration": {"vocab_size": 32, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
                                     "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32},
    "ViTForImageClassification": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 8,
                                  "patch_size": 4},
    "Wav2Vec2ForCTC": {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "conv_dim": (8, 8),
                       "conv_kernel": (4, 4), "conv_stride": (4, 4), "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0},
}  # fmt: skip


def of_transformers(name):
    transformers = pytest.importorskip("transformers")
    family, head = (name, "ForCausalLM") if name in CAUSAL else (name.partition("For")[0], "For" + name.partition("For")[2])
    head = "LMHeadModel" if name == "GPT2" else head
    config = getattr(transformers, f"{family}Config")(**{"pad_token_id": 0, **(CAUSAL.get(name) or OTHER[name])})
    torch.manual_seed(0)
    model = getattr(transformers, family + head)(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def loss(i):
        ids = torch.randint(1, 32, (4, 8), generator=torch.Generator().manual_seed(i))
        if family == "ViT":
            return model(pixel_values=torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)), labels=ids[:, 0] % 2).loss
        if family == "Wav2Vec2":
            return model(torch.randn(4, 400, generator=torch.Generator().manual_seed(i)), labels=ids[:, :3]).loss
        return model(input_ids=ids, labels=ids).loss

    return model, optimizer, loss


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CAUSAL, *OTHER])
def test_transformers_architectures(name):
    """A tiny random model of each architecture trains bit for bit as without a guard, unalarmed and with a truthful coverage."""
    from architectures import Job

    results = []
    for guarded in (False, True):
        model, optimizer, loss = of_transformers(name)
        guard, losses, state = train(Job(model, loss, [optimizer]), guarded=guarded, steps=5)
        results.append([*losses, *state])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    check(guard, model)
