"""Ill programs, third set: data, targets, losses, numbers and validation. Written blind: nothing of the guard was read or run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery import data
from gallery.ill_third_loops import FAST, FLAT, NAN, RATE, SAME, Last, characters, passages, train
from gallery.models import GPT, CharRNN, mlp
from gallery.registry import Job, program

INPUT = ("input not normalised", "features not normalised", "features in different units", "inputs out of scale", "features of very different scale",
         "one feature out of scale", "raw units")  # fmt: skip
OTHER = ("other labels or preprocessing in validation", "validation data of another kind, or nothing that generalises", "the data sets are mixed up",
         "train/eval mismatch", "train/eval mismatch or empty validation batches", "other data or another task", "trained on other labels")  # fmt: skip
LABELS = ("wrong labels", "labels or targets do not belong to the inputs", "labels that do not belong to their inputs", "labels or sign of the loss",
          "wrong labels, or too large a step", "labels lost on the way")  # fmt: skip
binary = F.binary_cross_entropy_with_logits


@torch.no_grad()
def explained(model: nn.Module, d: data.Split) -> float:
    """Share of the test targets' variance; a very low number where it is none."""
    value = 1 - (F.mse_loss(model(d.test_x), d.test_y) / d.test_y.var()).item()
    return value if math.isfinite(value) else -1e9


@program(
    expect={"unnormalized_input", "saturated_activation", "collapsed_activation", "initial_loss_off", *FAST, *FLAT}, bar=0.6, repairable=True,
    cause="the time stamp, in seconds since 1970, is a feature of a recurrent net",
    causes=(*INPUT, "saturated units"), families=("third", "recurrent", "series"),
)  # fmt: skip
def series_seconds_since_1970(job: Job) -> float:
    hours = torch.arange(1500.0)  # a daily and a slower wave with noise
    values = torch.sin(hours * math.tau / 24) + 0.7 * torch.sin(hours * math.tau / 61) + 0.1 * torch.randn(1500, generator=torch.Generator().manual_seed(2))
    seconds = 1.7e9 + 3600 * hours
    if job.planted("normalize_input", ill=False, healthy=True):
        seconds = (seconds - seconds.mean()) / seconds.std()
    x, y = torch.stack([values, seconds], 1).unfold(0, 24, 1).transpose(1, 2)[:-1], values[24:, None]
    d = data.split(x, y)
    model = Last(nn.GRU(2, 24, batch_first=True), 24, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    job.preflight(model, list(zip(d.x.split(32), d.y.split(32))), nn.MSELoss(), optimizer)
    train(job, model, optimizer, data.draws(d.x, d.y, 32, 260, job.generator), F.mse_loss)
    return explained(model, d)


@program(
    expect={"nonfinite_loss", "nonfinite_input", "invalid_labels", "nonfinite_gradient"}, cause="the target of one patient is missing: NaN", bar=0.2,
    causes=("bad target", "bad input", "wrong labels", "odd batch", "invalid labels"), families=("third", "regression", "data"),
)  # fmt: skip
def diabetes_one_target_is_missing(job: Job) -> float:
    d = data.table("diabetes")
    y = d.y.clone()
    y[177] = job.planted("filled", ill=float("nan"), healthy=0.0)
    model = mlp(10, 24, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    loader = data.loader(d.x, y, 16, job.generator)
    train(job, model, optimizer, data.endless(loader, 260), F.mse_loss, validate=lambda: data.mean_loss(model, F.mse_loss, d.test_x, d.test_y))
    return explained(model, d)


@program(
    expect={"validation_mismatch", "overfitting"}, cause="the vocabulary is built anew from the validation text: an index is another letter there", bar=-3.0,
    causes=OTHER, families=("third", "text", "validation"),
)  # fmt: skip
def text_vocabulary_built_twice(job: Job) -> float:
    batches, held, letters = passages(24)
    if job.planted("own_vocabulary", ill=True, healthy=False):
        place = torch.cat(held, 1).unique(return_inverse=True)[1]
        held = place[:, :24], place[:, 24:]
    model = CharRNN(letters, 48, "GRU")
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    train(job, model, optimizer, batches(job, 260), characters, validate=lambda: data.mean_loss(model, characters, *held))
    return -data.mean_loss(model, characters, *held)


@program(
    expect={"collapsed_activation", "unchanged_weights", "vanishing_gradient", *FLAT}, bar=-2.8, families=("third", "text", "data"),
    cause="the vocabulary of the inputs was loaded empty: each letter is unknown, which is padding, and its vector is 0",
    causes=("constant weights or identical inputs", "identical inputs", "input does not matter", "input carries no information", "no gradient", "zero gradient",
            "same output for every sample", "the same output for every sample", "labels or targets do not belong to the inputs"),
)  # fmt: skip
def text_of_unknown_letters(job: Job) -> float:
    batches, held, letters = passages(8)
    model = nn.Sequential(nn.Embedding(letters, 24, padding_idx=0), nn.Flatten(), mlp(8 * 24, 128, letters))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    known = job.planted("known", ill=0, healthy=1)
    following = [(x * known, y[:, -1]) for pair in zip(batches(job, 350), batches(job, 350)) for x, y in [[torch.cat(t) for t in zip(*pair)]]]
    train(job, model, optimizer, following, validate=lambda: data.mean_loss(model, F.cross_entropy, held[0] * known, held[1][:, -1]))
    return -data.mean_loss(model, F.cross_entropy, held[0] * known, held[1][:, -1])


class Tagger(nn.Module):
    """A recurrent language model."""

    def __init__(self, letters: int, both: bool) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(letters, 40), nn.GRU(40, 40, batch_first=True, bidirectional=both)
        self.head = nn.Linear(80 if both else 40, letters)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T) indices -> (B, T, letters) logits."""
        return self.head(self.rnn(self.embed(x))[0])


@program(
    expect={"validation_mismatch", "overfitting"}, cause="a language model reads in both directions: it sees what it is to foretell, but not in validation",
    causes=OTHER, bar=-2.2, families=("third", "text", "recurrent", "leak"),
)  # fmt: skip
def text_future_leaks_from_the_right(job: Job) -> float:
    batches, held, letters = passages(24)
    model = Tagger(letters, job.planted("bidirectional", ill=True, healthy=False))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    @torch.no_grad()
    def as_it_is_used() -> float:
        return F.cross_entropy(model(held[0])[:, -1], held[1][:, -1]).item()  # only the last place, where nothing stands to the right

    def shifted(out: Tensor, x: Tensor) -> Tensor:
        return characters(out[:, :-1], x[:, 1:])

    train(job, model, optimizer, ((x, x) for x, _ in batches(job, 250)), shifted, validate=as_it_is_used)
    return -as_it_is_used()


@program(
    expect={"loss_plateau", "learning_bottleneck", "cannot_overfit_batch"}, cause="logits of (B, T, V) are viewed as (B, V, T), not transposed", bar=-2.9,
    causes=(*LABELS, "same output for every sample", "the same output for every sample"), families=("third", "text", "transformer", "loss"),
)  # fmt: skip
def text_logits_viewed_not_transposed(job: Job) -> float:
    batches, held, letters = passages()
    model, view = GPT(letters, 32), job.planted("view", ill=True, healthy=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out.reshape(len(out), letters, -1) if view else out.transpose(1, 2), y)

    train(job, model, optimizer, batches(job, 250), loss, validate=lambda: data.mean_loss(model, loss, *held))
    return -data.mean_loss(model, loss, *held)


@program(
    expect={"validation_mismatch", "overfitting", "class_imbalance"}, cause="digits sorted by class are cut at four fifths: validation has the last two",
    causes=(*OTHER, "rare class"), bar=-0.5, families=("third", "validation", "cnn"),
)  # fmt: skip
def digits_cut_without_shuffling(job: Job) -> float:
    d = data.digits()
    x, y = torch.cat([d.x, d.test_x]), torch.cat([d.y, d.test_y])
    if job.planted("sorted", ill=True, healthy=False):
        x, y = x[y.argsort()], y.sort().values
    cut = int(0.8 * len(x))
    model = mlp(64, 64, 10, dropout=0.2)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    loader = data.loader(x[:cut], y[:cut], 32, job.generator)
    train(job, model, optimizer, data.endless(loader, 300), validate=lambda: data.mean_loss(model, F.cross_entropy, x[cut:], y[cut:]))
    return -data.mean_loss(model, F.cross_entropy, x[cut:], y[cut:])


def painter() -> nn.Sequential:
    """Paper or ink for each pixel."""
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 2, 3, padding=1))


def painted(model: nn.Module) -> float:
    """The loss on clean test images."""
    x = data.digits("image").test_x
    return data.mean_loss(model, F.cross_entropy, x, (x[:, 0] > 0.4).long())


@program(
    expect={"loss_plateau", "learning_bottleneck", "validation_mismatch"}, cause="augmentation turns and mirrors images, and not their masks", causes=LABELS,
    bar=-0.2, families=("third", "segmentation", "augmentation"),
)  # fmt: skip
def segmentation_masks_are_not_turned(job: Job) -> float:
    d = data.digits("image")
    model, both = painter(), job.planted("turn_masks", ill=False, healthy=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for x, _ in data.draws(d.x, d.y, 24, 280, job.generator):
            mask, turns, mirrored = (x[:, 0] > 0.4).long(), *torch.randint(4, (2,), generator=job.generator).tolist()
            seen = [t.rot90(turns, (-2, -1)).flip(-1) if mirrored % 2 else t.rot90(turns, (-2, -1)) for t in (x, mask)]
            yield seen[0] + 0.2 * torch.randn(x.shape, generator=job.generator), seen[1] if both else mask

    train(job, model, optimizer, batches(), validate=lambda: painted(model))
    return -painted(model)


@program(
    expect={"invalid_labels", "validation_mismatch", "class_imbalance", "collapsed_activation"}, cause="ignore_index is the class of ink",
    causes=("ignore_index is a real class, or labels are masked by mistake", "rare class", *LABELS, "trained on other labels",
            "other labels or preprocessing in validation"), bar=-0.3,
    families=("third", "segmentation", "loss"),
)  # fmt: skip
def segmentation_ink_is_ignored(job: Job) -> float:
    d = data.digits("image")
    model, criterion = painter(), nn.CrossEntropyLoss(ignore_index=job.planted("ignore_index", ill=1, healthy=-100))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    noisy, mask = d.x + 0.2 * torch.randn(d.x.shape, generator=job.generator), (d.x[:, 0] > 0.4).long()
    job.preflight(model, list(zip(noisy.split(32), mask.split(32)))[:20], criterion, optimizer)

    train(job, model, optimizer, data.draws(noisy, mask, 24, 250, job.generator), criterion, validate=lambda: painted(model))
    return -painted(model)


@program(
    expect={"negative_loss", "saturated_softmax", "overflow_risk", *FAST}, cause="the penalty on large weights is subtracted from the loss", bar=-0.6,
    causes=("labels or sign of the loss", "sign of the loss", "a loss term grows", "a loss term outweighs the others", "weights too large"),
    families=("third", "mlp", "loss"),
)  # fmt: skip
def digits_penalty_with_a_minus(job: Job) -> float:
    d = data.digits()
    model, sign = mlp(64, 48, 10), job.planted("sign", ill=-1.0, healthy=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y) + sign * 1e-2 * sum((p**2).sum() for p in model.parameters())

    train(job, model, optimizer, data.draws(d.x, d.y, 32, 260, job.generator), loss)
    value = data.mean_loss(model, F.cross_entropy, d.test_x, d.test_y)
    return -value if math.isfinite(value) else -1e9


class Refined(nn.Module):
    """A correction of directions that begins at nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3, 64, 64, 3)
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3) -> (B, 3) of length 1."""
        return F.normalize(x + self.net(x), dim=1)


@program(
    expect=NAN, cause="the angle between directions by acos without a clamp: its slope is infinite for pairs that agree", bar=-0.25, nonfinite=0,
    causes=("loss function",), families=("third", "regression", "loss"), repairable=True,
)  # fmt: skip
def directions_acos_of_one(job: Job) -> float:
    eps = job.planted("eps", ill=0.0, healthy=1e-5)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(7)))[0]
    model = Refined()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    def pairs(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(steps):
            x = F.normalize(torch.randn(64, 3, generator=job.generator), dim=1)
            yield x, torch.where(x[:, :1] > 0, x, x @ turn)  # half of the poses are right as they are

    def angle(out: Tensor, y: Tensor) -> Tensor:
        return (out * y).sum(1).clamp(-1 + eps, 1 - eps).acos().mean()

    train(job, model, optimizer, pairs(300), angle)
    value = data.mean_loss(model, angle, *next(pairs(1)))
    return -value if math.isfinite(value) else -1e9


@program(
    expect=NAN, cause="the model is cast to float16, where Adam's eps of 1e-8 is 0: updates of 0/0", bar=0.85, families=("third", "float16", "adam"),
    causes=("range of float16 too small", "adam epsilon", "bad weights", "rounding", "its device or precision differs", "wrong dtype"), repairable=True,
)  # fmt: skip
def digits_half_adam_epsilon(job: Job) -> float:
    d = data.digits()
    model = mlp(64, 48, 10).half()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=job.planted("eps", ill=1e-8, healthy=1e-4))
    train(job, model, optimizer, data.draws(d.x.half(), d.y, 32, 300, job.generator), lambda out, y: F.cross_entropy(out.float(), y))
    return data.accuracy(model, d.test_x.half(), d.test_y)


def bandit(job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, advantage: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    """REINFORCE on a bandit whose right arm is the label."""
    guard = job.guard(model, optimizer)
    for seen, right in guard.batches(data.draws(x, y, 64, steps, job.generator)):
        logits = model(seen)
        chosen = torch.multinomial(logits.detach().softmax(1).nan_to_num(0.1), 1, generator=job.generator).squeeze(1)
        loss = (advantage((chosen == right).float()) * F.cross_entropy(logits, chosen, reduction="none")).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)


@program(
    expect={*FAST, "saturated_softmax", "dead_relu", "collapsed_activation", "loss_plateau"}, cause="rewards of 10000 under plain SGD", bar=0.6,
    causes=(*RATE, "logits out of scale", "targets not standardised", "target scale"), families=("third", "policy"),
)  # fmt: skip
def bandit_rewards_of_10000(job: Job) -> float:
    d, mean = data.digits(), 0.0
    model, size = mlp(64, 64, 10), job.planted("reward_scale", ill=1e4, healthy=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def advantage(reward: Tensor) -> Tensor:
        nonlocal mean
        gain, mean = size * reward - mean, 0.9 * mean + 0.1 * size * reward.mean().item()
        return gain

    bandit(job, model, optimizer, 400, advantage, d.x, d.y)
    return data.accuracy(model, d.test_x, d.test_y)


@program(
    expect=NAN, cause="advantages are divided by their deviation, which is 0 once every answer of a batch is right", bar=0.8, causes=("loss function",),
    families=("third", "policy", "loss"), repairable=True,
)  # fmt: skip
def bandit_all_rewards_alike(job: Job) -> float:
    d, eps = data.table("breast_cancer"), job.planted("eps", ill=0.0, healthy=1e-6)
    model = mlp(30, 32, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    bandit(job, model, optimizer, 300, lambda r: (r - r.mean()) / (r.std() + eps), d.x, d.y)
    return data.accuracy(model, d.test_x, d.test_y) if all(p.isfinite().all() for p in model.parameters()) else 0.0


@program(
    expect={"collapsed_activation", "unchanged_weights", *FLAT}, cause="the divergence of a VAE weighs 100 times too much: every code is the prior", bar=-25.0,
    causes=("a loss term outweighs the others", "over-regularised", *SAME[:2]), families=("third", "vae", "loss"),
)  # fmt: skip
def vae_divergence_100x(job: Job) -> float:
    d = data.digits("image")
    x, test = d.x.flatten(1), d.test_x.flatten(1)
    model = nn.ModuleDict({"encoder": mlp(64, 64, 16), "decoder": mlp(8, 64, 64)})
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    weight = job.planted("term_weight", ill=100.0, healthy=1.0)

    def terms(seen: Tensor) -> dict[str, Tensor]:
        mean, spread = model["encoder"](seen).chunk(2, 1)
        code = mean + (spread / 2).exp() * torch.randn(mean.shape, generator=job.generator)
        pixels = binary(model["decoder"](code), seen, reduction="sum") / len(seen)
        return {"pixels": pixels, "divergence": weight * 0.5 * (mean**2 + spread.exp() - spread - 1).sum(1).mean()}

    guard = job.guard(model, optimizer)
    for seen, _ in guard.batches(data.draws(x, d.y, 48, 400, job.generator)):
        parts = terms(seen)
        optimizer.zero_grad()
        sum(parts.values()).backward()
        optimizer.step()
        guard.step(parts)
    with torch.no_grad():
        return -terms(test)["pixels"].item()
