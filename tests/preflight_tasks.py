"""Small tasks for the preflight's tests: healthy ones of many kinds, and ill ones with the cause that must come first.

A task is a function of no arguments that gives (model, batches, criterion, optimizers, keywords of preflight). All is seeded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from models import convnet, make_batch, transformer
from models import criterion as lm_loss
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def loader(x, y, size=32, shuffle=True):
    return DataLoader(TensorDataset(x, y), batch_size=size, shuffle=shuffle)


def adam(*models, lr=1e-3):
    return torch.optim.Adam([p for m in models for p in m.parameters() if p.requires_grad], lr=lr)


def digits(images=False):
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x / 16.0, dtype=torch.float32)
    return (x.view(-1, 1, 8, 8) if images else x), torch.tensor(y)


def mlp(inputs, outputs, width=32, act=nn.ReLU):
    return nn.Sequential(nn.Linear(inputs, width), act(), nn.Linear(width, width), act(), nn.Linear(width, outputs))


def digits_mlp():
    """Images in [0, 1], flat."""
    model = mlp(64, 10)
    return model, loader(*digits()), nn.CrossEntropyLoss(), adam(model), {}


def digits_convnet():
    """Batch-norm, in-place and functional ReLU, SGD."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    return model, loader(*digits(images=True)), nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), {}


def house_convnet():
    model = convnet()
    return model, [make_batch("convnet", n=16, seed=i) for i in range(20)], F.cross_entropy, adam(model), {}


def tied_transformer():
    """A language model with a tied head; tokens are no scale."""
    model = transformer(tied=True)
    return model, [make_batch("transformer", n=8, seed=i) for i in range(20)], lm_loss, torch.optim.AdamW(model.parameters(), lr=1e-3), {}


def heavy_dropout():
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.8), nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.8), nn.Linear(256, 10))
    return model, loader(*digits()), nn.CrossEntropyLoss(label_smoothing=0.1), adam(model), {}


def iris_linear():
    """A tiny model on a tiny standardised table."""
    x, y = load_iris(return_X_y=True)
    x = torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)
    model = nn.Linear(4, 3)
    return model, loader(x, torch.tensor(y), 16), nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1), {}


def table_binary():
    """A standardised table, one logit, BCE."""
    x, y = load_breast_cancer(return_X_y=True)
    x = torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)
    model = mlp(30, 1)
    return model, loader(x, torch.tensor(y, dtype=torch.float32).unsqueeze(1)), nn.BCEWithLogitsLoss(), adam(model), {}


def table_regression():
    """Standardised features and targets."""
    x, y = load_diabetes(return_X_y=True)
    x, y = torch.tensor(x / x.std(0), dtype=torch.float32), torch.tensor((y - y.mean()) / y.std(), dtype=torch.float32).unsqueeze(1)
    model = mlp(10, 1, act=nn.Tanh)
    return model, loader(x, y), nn.MSELoss(), adam(model), {}


def offset_regression():
    """Targets like house prices in 100 000: mean 2, deviation 1."""
    x = torch.randn(300, 8)
    model = mlp(8, 1)
    return model, loader(x, x[:, :1].sin() + 2 + 0.1 * torch.randn(300, 1)), nn.MSELoss(), adam(model), {}


def multi_label():
    """Rare labels of many kinds at once, sparse counts as inputs."""
    x = (torch.rand(400, 100) < 0.05).float() * torch.randint(1, 20, (400, 100))
    model = mlp(100, 12)
    return model, loader(x, (torch.rand(400, 12) < 0.05).float()), nn.BCEWithLogitsLoss(), adam(model), {}


def gaussian_nll():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp(5, 2)

        def forward(self, x):
            mean, raw = self.body(x).chunk(2, 1)
            return mean, F.softplus(raw) + 1e-3

    x = torch.randn(300, 5)
    model = Head()
    return model, loader(x, x[:, :1] * 2), lambda out, y: F.gaussian_nll_loss(out[0], y, out[1]), adam(model), {}


def ctc():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(6, 16, batch_first=True), nn.Linear(16, 5)

        def forward(self, x):
            return self.head(self.rnn(x)[0]).log_softmax(-1).transpose(0, 1)

    model = Reader()
    batches = [(torch.randn(4, 12, 6), torch.randint(1, 5, (4, 3))) for _ in range(10)]
    return model, batches, lambda out, y: F.ctc_loss(out, y, torch.full((4,), 12), torch.full((4,), 3)), adam(model), {}


def segmentation():
    """(N, H, W) labels with 255 as padding, in a loss that knows it."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    batches = []
    for _ in range(10):
        x = torch.rand(4, 3, 8, 8)
        y = (x.sum(1) > 1.5).long() * 3
        y[:, 0] = 255
        batches.append((x, y))
    return model, batches, nn.CrossEntropyLoss(ignore_index=255), adam(model), {}


def autoencoder():
    x, _ = digits()
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64), nn.Sigmoid())
    return model, loader(x, x), nn.MSELoss(), adam(model), {}


def bce_autoencoder():
    """Soft targets: the loss cannot reach zero."""
    x, _ = digits()
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))
    return model, DataLoader(x, batch_size=32, shuffle=True), nn.BCEWithLogitsLoss(), adam(model), {"forward": lambda m, x: (m(x), x)}


class Generative(nn.Module):
    """Both networks of a GAN."""

    def __init__(self):
        super().__init__()
        self.generator, self.critic = mlp(4, 2), mlp(2, 1)


def gan():
    """The generator's step; the critic has an optimizer of its own."""
    model = Generative()
    batches = [torch.randn(16, 4) for _ in range(10)]
    forward = lambda m, z: (m.critic(m.generator(z)), torch.ones(len(z), 1))  # noqa: E731
    return model, batches, nn.BCEWithLogitsLoss(), [adam(model.generator), adam(model.critic)], {"forward": forward}


def fine_tuned():
    """A trained trunk, frozen but for the head, one half trained already: first loss below chance, weights at any scale."""
    x, y = digits()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.BatchNorm1d(64), nn.Linear(64, 10))
    optimizer = adam(model, lr=1e-2)
    for i in range(100):
        rows = slice(i * 16 % 1600, i * 16 % 1600 + 64)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    model[0].requires_grad_(False)
    return model, loader(x, y), nn.CrossEntropyLoss(), adam(model), {}


class LoRA(nn.Module):
    """A frozen matrix with a low-rank addition whose second half begins at zero."""

    def __init__(self, inputs, outputs, rank=4):
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.a, self.b = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def lora():
    model = nn.Sequential(LoRA(64, 64), nn.ReLU(), LoRA(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return model, loader(*digits()), nn.CrossEntropyLoss(), adam(model), {}


def single_samples():
    """Batches of one."""
    x, y = digits()
    model = mlp(64, 10)
    return model, loader(x[:200], y[:200], 1), nn.CrossEntropyLoss(), adam(model), {}


def six_samples():
    """A tiny data set in one batch."""
    model = mlp(3, 2)
    return model, [(torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 1, 0]))], nn.CrossEntropyLoss(), adam(model), {}


def imbalanced():
    """Twelve to one, and a weighted loss would not hurt: no warning."""
    x = torch.randn(600, 10)
    y = (torch.rand(600) < 1 / 12).long()
    model = mlp(10, 2)
    return model, loader(x + y.unsqueeze(1), y), nn.CrossEntropyLoss(), adam(model), {}


def time_series():
    """Windows in order: neighbours are alike by design, classes come again and again."""
    phase = torch.arange(800) / 15
    signal = phase.sin() + 0.1 * torch.randn(800)
    x = torch.stack([signal[i : i + 20] for i in range(780)]).unsqueeze(-1)

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(1, 16, num_layers=2, dropout=0.3, batch_first=True), nn.Linear(16, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    model = Recurrent()
    return model, loader(x, (phase[20:].sin() > 0).long(), shuffle=False), nn.CrossEntropyLoss(), adam(model, lr=3e-3), {}


def deep_residual():
    """Zero-initialised branch ends, no normalisation, twelve blocks."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
            nn.init.zeros_(self.down.weight)

        def forward(self, x):
            return x + self.down(F.relu(self.up(x)))

    model = nn.Sequential(nn.Linear(64, 32), *(Block() for _ in range(12)), nn.Linear(32, 10))
    return model, loader(*digits()), nn.CrossEntropyLoss(), adam(model), {}


def penalised():
    """An L2 penalty written into the loss."""
    model = mlp(64, 10)
    criterion = Penalised(model, 1e-3)
    return model, loader(*digits()), criterion, adam(model), {}


class Penalised(nn.Module):
    def __init__(self, model, factor):
        super().__init__()
        self.model, self.factor = [model], factor

    def forward(self, outputs, targets):
        return F.cross_entropy(outputs, targets) + self.factor * sum(p.square().sum() for p in self.model[0].parameters())


def dict_batches():
    """Batches are dicts and the model gives its own loss, as in language model libraries."""

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 5)

        def forward(self, tokens, labels):
            logits = self.head(self.embed(tokens))
            return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

    model = Tagger()
    batches = []
    for _ in range(12):
        tokens = torch.randint(50, (8, 6))
        labels = tokens % 5
        labels[:, 0] = -100
        batches.append({"tokens": tokens, "labels": labels})
    return model, batches, lambda out, _: out["loss"], adam(model), {"forward": lambda m, b: (m(**b), b["labels"])}


def normalises_inside():
    """Raw pixels from 0 to 255, divided in the model."""

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp(64, 10)

        def forward(self, x):
            return self.body(x / 255 - 0.5)

    x, y = digits()
    model = Inside()
    return model, loader((x * 255).round(), y), nn.CrossEntropyLoss(), adam(model), {}


def contrastive():
    """A loss over the whole batch."""
    model = mlp(16, 8)

    def info_nce(z, _):
        a, b = F.normalize(z, dim=1).chunk(2)
        return F.cross_entropy(a @ b.T / 0.2, torch.arange(len(a)))

    x = torch.randn(20, 16, 16)
    return model, [(torch.cat([part, part + 0.1 * torch.randn_like(part)]), torch.arange(32)) for part in x], info_nce, adam(model), {}


def vae():
    """A sum of terms, random by design."""

    class Variational(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = mlp(64, 8), mlp(4, 64)

        def forward(self, x):
            mean, log_var = self.encoder(x).chunk(2, 1)
            return self.decoder(mean + torch.randn_like(mean) * (log_var / 2).exp()), mean, log_var

    def loss(out, x):
        kl = -0.5 * (1 + out[2] - out[1].square() - out[2].exp()).sum(1).mean()
        return F.binary_cross_entropy_with_logits(out[0], x, reduction="none").sum(1).mean() + kl

    x, _ = digits()
    model = Variational()
    return model, loader(x, x), loss, adam(model), {}


def deep_batch_norm():
    """A residual net whose running statistics have seen nothing yet."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.na, self.b, self.nb = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x):
            return F.relu(x + self.nb(self.b(F.relu(self.na(self.a(x))))))

    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), *(Block() for _ in range(8)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    return model, loader(*digits(images=True)), nn.CrossEntropyLoss(), adam(model), {}


def plain_depth():
    """Eight hidden layers by torch's default initialisation."""
    model = nn.Sequential(*(layer for i in range(8) for layer in (nn.Linear(64, 64), nn.ReLU())), nn.Linear(64, 10))
    return model, loader(*digits()), nn.CrossEntropyLoss(), adam(model), {}


def sigmoid_net():
    model = mlp(64, 10, act=nn.Sigmoid)
    return model, loader(*digits()), nn.CrossEntropyLoss(), adam(model, lr=1e-2), {}


def white_images():
    """An autoencoder of mostly white images in [0, 1]."""
    x, _ = digits()
    x = (1 - x * 0.3).clamp(0, 1)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 64))
    return model, loader(x, x), nn.MSELoss(), adam(model), {}


def weighted_sampler():
    """A rare class that the sampler makes up for."""
    x = torch.randn(2000, 10)
    y = (torch.arange(2000) % 200 == 0).long()
    sampler = torch.utils.data.WeightedRandomSampler(torch.where(y == 1, 200.0, 1.0), 2000)
    model = mlp(10, 2)
    return model, DataLoader(TensorDataset(x + y.unsqueeze(1), y), batch_size=32, sampler=sampler), nn.CrossEntropyLoss(), adam(model), {}


def multiclass_transformer():
    """Sequence classification with torch's own encoder, sequences sorted by length and padded; one use of the iterator."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, batch_first=True)

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.encoder, self.head = (
                nn.Embedding(40, 16, padding_idx=0),
                nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
                nn.Linear(16, 3),
            )

        def forward(self, tokens):
            return self.head(self.encoder(self.embed(tokens), src_key_padding_mask=tokens == 0).mean(1))

    model = Classifier()
    batches = []
    for length in range(4, 24):
        tokens = torch.randint(1, 40, (16, length))
        tokens[::3, -2:] = 0
        batches.append((tokens, tokens[:, 0] % 3))
    return model, iter(batches), nn.CrossEntropyLoss(), adam(model), {}


def graph_nodes():
    """One graph: nodes see each other by design."""
    torch.manual_seed(1)
    adjacency = (torch.rand(60, 60) < 0.1).float()
    adjacency = (adjacency + torch.eye(60)) / (adjacency + torch.eye(60)).sum(1, keepdim=True)
    model = mlp(8, 3)
    batch = (torch.randn(60, 8), torch.randint(3, (60,)))
    return model, [batch], nn.CrossEntropyLoss(), adam(model), {"forward": lambda m, b: (adjacency @ m(b[0]), b[1])}


class Cosine(nn.Module):
    """Both sides normalised, scaled up: the first loss is far above chance by design."""

    def __init__(self):
        super().__init__()
        self.body, self.weight = mlp(64, 16), nn.Parameter(torch.randn(10, 16))

    def forward(self, x):
        return 64 * F.normalize(self.body(x), dim=1) @ F.normalize(self.weight, dim=1).T


def cosine_head():
    model = Cosine()
    return model, loader(*digits()), nn.CrossEntropyLoss(), adam(model), {}


def packed_recurrent():
    """Packed sequences, dropout between the layers, dict batches with names in them."""

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(20, 16), nn.Linear(16, 3)
            self.rnn = nn.LSTM(16, 16, 2, batch_first=True, dropout=0.3)

        def forward(self, tokens, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(self.embed(tokens), lengths, batch_first=True, enforce_sorted=False)
            return self.head(self.rnn(packed)[1][0][-1])

    model, batches = Packed(), []
    for _ in range(12):
        tokens = torch.randint(1, 20, (16, 9))
        batches.append({"tokens": tokens, "lengths": torch.randint(2, 10, (16,)), "y": tokens[:, 0] % 3, "names": [str(i) for i in range(16)]})
    return model, batches, nn.CrossEntropyLoss(), adam(model), {"forward": lambda m, b: (m(b["tokens"], b["lengths"]), b["y"])}


def sparse_embeddings():
    """Sparse gradients, two optimizers."""

    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.head = nn.EmbeddingBag(500, 16, sparse=True), nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.bag(x))

    model, x = Bag(), torch.randint(500, (400, 12))
    return model, loader(x, x[:, 0] % 3), nn.CrossEntropyLoss(), [torch.optim.SparseAdam(model.bag.parameters(), lr=1e-2), adam(model.head)], {}


def forecast():
    """A smooth series in order, one step ahead."""

    class Forecaster(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.RNN(1, 16, batch_first=True), nn.Linear(16, 1)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    series = (torch.arange(500) / 9).sin()
    model = Forecaster()
    x = torch.stack([series[i : i + 10] for i in range(480)]).unsqueeze(-1)
    return model, loader(x, series[10:490].unsqueeze(1), shuffle=False), nn.MSELoss(), adam(model, lr=1e-2), {}


class Mixture(nn.Module):
    """Each sample goes to one of eight experts; some see nothing in a batch."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(64, 8), nn.ModuleList(mlp(64, 10, 16) for _ in range(8))

    def forward(self, x):
        gates = self.router(x).softmax(1)
        choice = gates.argmax(1)
        out = torch.zeros(len(x), 10)
        for i, expert in enumerate(self.experts):
            rows = (choice == i).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]) * gates[rows, i : i + 1])
        return out


def mixture():
    model = Mixture()
    return model, loader(*digits()), nn.CrossEntropyLoss(), adam(model), {}


HEALTHY = [
    cosine_head, packed_recurrent, sparse_embeddings, forecast, mixture,
    digits_mlp, digits_convnet, house_convnet, tied_transformer, heavy_dropout, iris_linear, table_binary, table_regression, offset_regression, multi_label,
    gaussian_nll, ctc, segmentation, autoencoder, bce_autoencoder, gan, fine_tuned, lora, single_samples, six_samples, imbalanced, time_series, deep_residual,
    penalised, dict_batches, normalises_inside, contrastive, vae, deep_batch_norm, plain_depth, sigmoid_net, white_images, weighted_sampler,
    multiclass_transformer, graph_nodes,
]  # fmt: skip


def with_digits(model, criterion=None, x=None, y=None, **words):
    """Digits, and what is said otherwise."""
    a, b = digits()
    data = loader(a if x is None else x, b if y is None else y, **words)
    return model, data, criterion or nn.CrossEntropyLoss(), adam(model), {}


def large_head():
    model = mlp(64, 10)
    with torch.no_grad():
        model[-1].weight.mul_(200)
    return with_digits(model)


def sum_reduction():
    return with_digits(mlp(64, 10), nn.CrossEntropyLoss(reduction="sum"))


def own_sum():
    return with_digits(mlp(64, 10), lambda out, y: -(out.log_softmax(1).gather(1, y[:, None])).sum())


def raw_targets():
    x = torch.randn(300, 8)
    model = mlp(8, 1)
    return model, loader(x, 40 * x[:, :1] + 250), nn.MSELoss(), adam(model), {}


def huge_penalty():
    model = mlp(64, 10)
    return model, loader(*digits()), Penalised(model, 1.0), adam(model), {}


class LooseDropout(nn.Module):
    """Dropout that does not know of eval mode."""

    def __init__(self):
        super().__init__()
        self.body, self.head = mlp(64, 32), nn.Linear(32, 10)

    def forward(self, x):
        return self.head(F.dropout(self.body(x), 0.5))


def eval_dropout():
    return with_digits(LooseDropout())


def wrong_statistics():
    """Batch-norm statistics of other data."""
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    model[1].running_var.fill_(1e-6)
    model[1].num_batches_tracked.fill_(1000)
    return with_digits(model)


class Cut(nn.Module):
    """The first half is detached."""

    def __init__(self):
        super().__init__()
        self.trunk, self.head = mlp(64, 32), nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.trunk(x).detach())


def detached():
    return with_digits(Cut())


class Deaf(nn.Module):
    """The input is multiplied by zero."""

    def __init__(self):
        super().__init__()
        self.body = mlp(64, 10)

    def forward(self, x):
        return self.body(x * 0)


def deaf():
    return with_digits(Deaf())


class Blurred(nn.Module):
    """Every sample is replaced by the mean of its batch, in training mode only; the rest is sound."""

    def __init__(self):
        super().__init__()
        self.body = mlp(64, 10)

    def forward(self, x):
        return self.body(x.mean(0, keepdim=True).expand_as(x) + 1e-3 * x if self.training else x)


def blurred():
    return with_digits(Blurred())


def pixels():
    x, y = digits()
    model = mlp(64, 10)
    return model, loader((x * 255).round(), y), nn.CrossEntropyLoss(), adam(model), {}


def kilometres():
    x = torch.randn(300, 8)
    x[:, 3] *= 1e5
    model = mlp(8, 2)
    return model, loader(x * 1e-5 * 9, (x[:, 0] > 0).long()), nn.CrossEntropyLoss(), adam(model), {}


def twice_divided():
    x, _ = digits()
    return with_digits(mlp(64, 10), x=x / 255)


def from_one():
    _, y = digits()
    return with_digits(mlp(64, 10), y=y + 1)


def minus_one():
    _, y = digits()
    y[::9] = -1
    return with_digits(mlp(64, 10), y=y)


def float_labels():
    _, y = digits()
    return with_digits(mlp(64, 10), y=y.float())


def broadcast():
    x = torch.randn(300, 8)
    model = mlp(8, 1)
    return model, loader(x, 2 * x[:, 0]), nn.MSELoss(), adam(model), {}


def signs():
    x = torch.randn(300, 8)
    model = mlp(8, 1)
    return model, loader(x, x[:, :1].sign()), nn.BCEWithLogitsLoss(), adam(model), {}


def rare_class():
    x = torch.randn(3000, 8)
    model = mlp(8, 2)
    return model, loader(x, (torch.arange(3000) % 250 == 0).long()), nn.CrossEntropyLoss(), adam(model), {}


def sorted_classes():
    x, y = digits()
    order = y.argsort()
    return with_digits(mlp(64, 10), x=x[order], y=y[order], shuffle=False)


def sorted_targets():
    """A regression whose rows come in the order of their target, as an exported table does."""
    x, y = load_diabetes(return_X_y=True)
    order = y.argsort()
    x, y = torch.tensor(x / x.std(0), dtype=torch.float32)[order], torch.tensor((y - y.mean()) / y.std(), dtype=torch.float32)[order].unsqueeze(1)
    model = mlp(10, 1)
    return model, loader(x, y, shuffle=False), nn.MSELoss(), adam(model), {}


def softmax_twice():
    return with_digits(nn.Sequential(mlp(64, 10), nn.Softmax(1)))


def sigmoid_twice():
    x, y = digits()
    model = nn.Sequential(mlp(64, 1), nn.Sigmoid())
    return model, loader(x, (y > 4).float()[:, None]), nn.BCEWithLogitsLoss(), adam(model), {}


def sigmoid_missing():
    x, y = digits()
    model = mlp(64, 1)
    return model, loader(x, (y > 4).float()[:, None]), nn.BCELoss(), adam(model), {}


def no_log_softmax():
    return with_digits(mlp(64, 10), nn.NLLLoss())


def relu_regression():
    x = torch.randn(300, 8)
    model = nn.Sequential(mlp(8, 1), nn.ReLU())
    return model, loader(x, 2 * x[:, :1]), nn.MSELoss(), adam(model), {}


def all_zero():
    model = mlp(64, 10)
    for p in model.parameters():
        nn.init.zeros_(p)
    return with_digits(model)


def all_equal():
    model = mlp(64, 10)
    for p in model.parameters():
        nn.init.constant_(p, 0.1)
    return with_digits(model)


def large_weights():
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.ReLU())), nn.Linear(64, 10))
    for p in model.parameters():
        nn.init.normal_(p)
    return with_digits(model)


def small_weights():
    model = nn.Sequential(*(layer for _ in range(5) for layer in (nn.Linear(64, 64), nn.ReLU())), nn.Linear(64, 10))
    for p in model.parameters():
        nn.init.normal_(p, std=0.01)
    return with_digits(model)


def dead_at_birth():
    model = mlp(64, 10)
    nn.init.constant_(model[2].bias, -100.0)
    return with_digits(model)


def missing_value():
    x, y = digits()
    x[1234, 5] = float("nan")
    x[77, 0] = float("inf")
    return with_digits(mlp(64, 10), x=x, y=y, shuffle=False)


def too_fast():
    model = mlp(64, 10)
    return model, loader(*digits()), nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=300.0), {}


def too_slow():
    model = mlp(64, 10)
    return model, loader(*digits()), nn.CrossEntropyLoss(), adam(model, lr=1e-7), {}


def half_given():
    model = mlp(64, 10)
    return model, loader(*digits()), nn.CrossEntropyLoss(), torch.optim.Adam(model[:2].parameters(), lr=1e-3), {}


def other_model():
    model = mlp(64, 10)
    return model, loader(*digits()), nn.CrossEntropyLoss(), adam(mlp(64, 10)), {}


class TimeFirst(nn.Module):
    """A recurrent layer that takes the batch for the time."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(8, 16), nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.rnn(x.view(-1, 8, 8))[0][:, -1])


def leaking():
    return with_digits(TimeFirst())


def no_graph():
    return with_digits(mlp(64, 10), lambda out, y: F.cross_entropy(torch.tensor(out.tolist()), y))


ILL = [
    (large_head, "initial_loss_off", "output layer too large"), (sum_reduction, "initial_loss_off", "sum reduction"),
    (own_sum, "initial_loss_off", "sum reduction"), (raw_targets, "initial_loss_off", "targets not standardised"),
    (huge_penalty, "initial_loss_off", "over-regularised"), (eval_dropout, "validation_mismatch", "train/eval mismatch"),
    (wrong_statistics, "validation_mismatch", "train/eval mismatch"), (detached, "unchanged_weights", "detached graph"),
    (deaf, "unnormalized_input", "input carries no information"), (blurred, "cannot_overfit_batch", "the same output for every sample"),
    (pixels, "unnormalized_input", "raw pixels"),
    (kilometres, "unnormalized_input", "features in different units"), (twice_divided, "unnormalized_input", "normalised twice, or in too small a unit"),
    (from_one, "invalid_labels", "labels start at 1"), (minus_one, "invalid_labels", "padding value"), (float_labels, "invalid_labels", "wrong dtype"),
    (broadcast, "invalid_labels", "shapes are broadcast"), (signs, "invalid_labels", "labels are -1 and 1"), (rare_class, "class_imbalance", "rare class"),
    (sorted_classes, "unshuffled_data", "data sorted by label"), (sorted_targets, "unshuffled_data", "data sorted by label"),
    (softmax_twice, "wrong_output_activation", "softmax before cross entropy"),
    (sigmoid_twice, "wrong_output_activation", "sigmoid before BCE with logits"), (sigmoid_missing, "wrong_output_activation", "sigmoid missing"),
    (no_log_softmax, "wrong_output_activation", "log_softmax missing"), (relu_regression, "wrong_output_activation", "ReLU before a regression"),
    (all_zero, "poor_initialization", "weights all zero"), (all_equal, "poor_initialization", "weights all equal"),
    (large_weights, "poor_initialization", "weights too large"), (small_weights, "poor_initialization", "weights too small"),
    (dead_at_birth, "poor_initialization", "units dead at the start"), (missing_value, "nonfinite_input", "missing or corrupt values in the data"),
    (too_fast, "learning_rate_range", "learning rate too high"), (too_slow, "learning_rate_range", "learning rate too low"),
    (half_given, "unchanged_weights", "not given to the optimizer"), (other_model, "unchanged_weights", "the optimizer holds another model's parameters"),
    (leaking, "cross_sample_leak", "samples leak into each other"), (no_graph, "unchanged_weights", "detached graph"),
]  # fmt: skip


def paired_by_hand():
    """A loss written by hand over outputs (N, 1) and targets (N,)."""
    x = torch.randn(300, 8)
    model = mlp(8, 1)
    return model, loader(x, 2 * x[:, 0]), lambda out, y: ((out - y) ** 2).mean(), adam(model), {}


def masks_of_255():
    x, _ = digits()
    model = mlp(64, 64)
    return model, loader(x, (x > 0.5).float() * 255), nn.BCEWithLogitsLoss(), adam(model), {}


def wrong_axis():
    return with_digits(nn.Sequential(mlp(64, 10), nn.LogSoftmax(0)), nn.NLLLoss())


def left_in():
    """The class stands among the features."""
    x, y = digits()
    model = mlp(64, 10)
    return model, loader(torch.cat([x[:, :40], y[:, None] / 10.0, x[:, 41:]], dim=1), y / 10.0), lambda out, y: F.mse_loss(out[:, 0], y), adam(model), {}


ILL += [
    (left_in, "target_leak", "a feature is the target"),
    (paired_by_hand, "invalid_labels", "shapes are broadcast"), (masks_of_255, "invalid_labels", "targets are no probabilities"),
    (wrong_axis, "wrong_output_activation", "softmax over the wrong axis"),
]  # fmt: skip
