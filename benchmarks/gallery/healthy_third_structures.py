"""Healthy programs, third set: structures. Tags, memories, trees of words, prompts, graphs, relations, bags, queues, futures."""

from __future__ import annotations

import copy
import heapq
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery import data
from gallery.models import Block, mlp
from gallery.registry import Job, program


class Chain(nn.Module):
    """A tagger with a conditional random field on top of a small bidirectional GRU."""

    def __init__(self, words: int, tags: int) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(words, 16), nn.GRU(16, 16, batch_first=True, bidirectional=True)
        self.head, self.moves = nn.Linear(32, tags), nn.Parameter(torch.zeros(tags, tags))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T) words -> (B, T, tags) scores."""
        return self.head(self.rnn(self.embed(x))[0])

    def nll(self, x: Tensor, y: Tensor) -> Tensor:
        """Summed over a sentence, averaged over sentences."""
        scores = self(x)
        right = scores.gather(2, y[..., None]).sum((1, 2)) + self.moves[y[:, :-1], y[:, 1:]].sum(1)
        total = scores[:, 0]
        for t in range(1, x.shape[1]):
            total = torch.logsumexp(total[:, :, None] + self.moves, 1) + scores[:, t]
        return (total.logsumexp(1) - right).mean()

    def best(self, x: Tensor) -> Tensor:
        """Viterbi's path."""
        scores, back = self(x), []
        total = scores[:, 0]
        for t in range(1, x.shape[1]):
            top, where = (total[:, :, None] + self.moves).max(1)
            total = top + scores[:, t]
            back.append(where)
        path = [total.argmax(1)]
        for where in reversed(back):
            path.append(where.gather(1, path[-1][:, None]).squeeze(1))
        return torch.stack(path[::-1], 1)


@program(healthy=True, bar=0.6, families=("third", "tagging"))
def tags_conditional_random_field(job: Job) -> float:
    """A CRF on ambiguous words: the loss is a sentence's log-likelihood, from 30 down to a floor that the ambiguity sets."""
    tags = [torch.randint(0, 6, (500,), generator=job.generator)]
    for _ in range(15):
        stay = torch.rand(500, generator=job.generator) < 0.5
        tags.append(torch.where(stay, (tags[-1] + 1) % 6, torch.randint(0, 6, (500,), generator=job.generator)))
    y = torch.stack(tags, 1)
    words = torch.where(torch.rand(y.shape, generator=job.generator) < 0.6, 5 * y, 0) + torch.randint(0, 5, y.shape, generator=job.generator)
    d = data.split(words, y)
    model = Chain(30, 6)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 32, job.generator), 220)):
        loss = model.nll(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        return (model.best(d.test_x) == d.test_y).float().mean().item()


class Fast(nn.Module):
    """Fast weights by the delta rule: pairs are written into a matrix, then it is asked for one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values, self.rate = nn.Embedding(16, 24), nn.Embedding(8, 24), nn.Linear(24, 1)
        self.head = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 8))

    def forward(self, keys: Tensor, values: Tensor, asked: Tensor) -> Tensor:
        """(B, T), (B, T), (B,) -> (B, 8)."""
        k, v = F.normalize(self.keys(keys), dim=-1), self.values(values)
        memory = torch.zeros(len(k), 24, 24)
        for t in range(k.shape[1]):
            error = v[:, t] - torch.einsum("bvk,bk->bv", memory, k[:, t])
            memory = memory + torch.sigmoid(self.rate(v[:, t]))[..., None] * error[:, :, None] * k[:, t][:, None]
        return self.head(torch.einsum("bvk,bk->bv", memory, F.normalize(self.keys(asked), dim=-1)))


@program(healthy=True, bar=0.8, families=("third", "memory"))
def recall_by_delta_rule(job: Job) -> float:
    """Associative recall with fast weights: eight pairs a sample, new ones in every batch, and the same key may come twice."""
    model = Fast()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    guard = job.guard(model, optimizer)
    right = []
    for _ in range(400):
        keys, values = torch.randint(0, 16, (64, 8), generator=job.generator), torch.randint(0, 8, (64, 8), generator=job.generator)
        asked = torch.randint(0, 8, (64, 1), generator=job.generator)
        query = keys.gather(1, asked).squeeze(1)
        last = 7 - (keys == query[:, None]).flip(1).float().argmax(1)
        answer, out = values.gather(1, last[:, None]).squeeze(1), model(keys, values, query)
        loss = F.cross_entropy(out, answer)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        guard.step(loss)
        right.append((out.argmax(1) == answer).float().mean().item())
    return sum(right[-50:]) / 50


@cache
def huffman(keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each word the inner nodes on its way, the turns there (+-1), and the counts."""
    counts = data.words(keep=keep)[0].bincount(minlength=keep) + 1
    heap = [(int(n), i, [i]) for i, n in enumerate(counts)]
    heapq.heapify(heap)
    ways: list[list[tuple[int, float]]] = [[] for _ in range(keep)]
    for node in range(keep - 1):
        a, b = heapq.heappop(heap), heapq.heappop(heap)
        for side, turn in ((a, 1.0), (b, -1.0)):
            for word in side[2]:
                ways[word].append((node, turn))
        heapq.heappush(heap, (a[0] + b[0], keep + node, a[2] + b[2]))
    nodes, turns = torch.zeros(keep, max(map(len, ways)), dtype=torch.long), torch.zeros(keep, max(map(len, ways)))
    for word, way in enumerate(ways):
        nodes[word, : len(way)], turns[word, : len(way)] = torch.tensor([n for n, _ in way]), torch.tensor([t for _, t in way])
    return nodes, turns, counts


@program(healthy=True, bar=0.6, families=("third", "embedding"))
def words_cbow_hierarchical_softmax(job: Job) -> float:
    """word2vec as of 2013: CBOW, Huffman's tree, nodes that start at zero, sparse Adagrad. Scored in nats below the words' frequencies."""
    stream, keep = data.words(keep=1000)
    nodes, turns, counts = huffman(keep)
    frequency = counts / counts.sum()
    model = nn.ModuleDict({"words": nn.Embedding(keep, 32, sparse=True), "nodes": nn.Embedding(keep - 1, 33, sparse=True)})
    nn.init.uniform_(model["words"].weight, -0.5, 0.5)
    nn.init.zeros_(model["nodes"].weight)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    guard = job.guard(model, optimizer)
    tail = []
    for i in range(700):
        centre = torch.randint(4, len(stream) - 4, (128,), generator=job.generator)
        around = stream[centre[:, None] + torch.tensor([-2, -1, 1, 2])]
        hidden = F.pad(model["words"](around).mean(1), (0, 1), value=1.0)
        turn = turns[stream[centre]]
        loss = F.softplus(-turn * torch.einsum("bd,bnd->bn", hidden, model["nodes"](nodes[stream[centre]])))[turn != 0].sum() / 128
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        tail.append(loss.item() + frequency[stream[centre]].log().mean().item() if i >= 600 else 0.0)
    return -sum(tail) / 100


class Prompted(nn.Module):
    """A small transformer that does with six digits what four prompt vectors tell it."""

    def __init__(self) -> None:
        super().__init__()
        self.digits, self.places, self.tasks = nn.Embedding(10, 32), nn.Embedding(10, 32), nn.Embedding(4, 128)
        self.body = nn.Sequential(Block(32, 4, causal=False), Block(32, 4, causal=False), nn.LayerNorm(32), nn.Linear(32, 10))

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        """(B, 6) and (B, 128) -> (B, 6, 10)."""
        return self.body(torch.cat([prompt.reshape(-1, 4, 32), self.digits(x)], 1) + self.places.weight)[:, 4:]


def errands(x: Tensor) -> Tensor:
    """(4, B, 6): copied, reversed, increased, and nine minus it."""
    return torch.stack([x, x.flip(1), (x + 1) % 10, 9 - x])


@program(healthy=True, bar=0.8, families=("third", "finetune"))
def errands_prompt_tuning(job: Job) -> float:
    """Prompt tuning: everything is frozen but four vectors, with Adam at 0.1; the frozen net knew the task under another prompt."""
    model = Prompted()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(250):
        x, task = torch.randint(0, 10, (64, 6), generator=job.generator), torch.randint(0, 4, (64,), generator=job.generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x, model.tasks(task)).flatten(0, 1), errands(x)[task, torch.arange(64)].flatten()).backward()
        optimizer.step()
    model.requires_grad_(False)
    whole = nn.Module()
    whole.model, whole.prompt = model, nn.Parameter(0.5 * torch.randn(1, 128, generator=job.generator))
    optimizer = torch.optim.Adam([whole.prompt], lr=0.1)
    guard = job.guard(whole, optimizer)
    for _ in range(250):
        x = torch.randint(0, 10, (32, 6), generator=job.generator)
        out = model(x, whole.prompt.expand(32, 128))
        loss = F.cross_entropy(out.flatten(0, 1), errands(x)[1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return (out.argmax(2) == errands(x)[1]).float().mean().item()


class Messages(nn.Module):
    """Two rounds of summed messages, then a sum over the nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.rounds, self.head = nn.ModuleList([mlp(1, 32, 32), mlp(32, 32, 32)]), mlp(32, 32, 1)

    def forward(self, links: Tensor) -> Tensor:
        """(B, N, N) -> (B,)."""
        h = torch.ones(*links.shape[:2], 1)
        for step in self.rounds:
            h = F.relu(step(h + links @ h))
        return self.head(h.sum(1)).squeeze(1)


@program(healthy=True, bar=0.9, families=("third", "graph"))
def graphs_count_walks_unscaled(job: Job) -> float:
    """A graph isomorphism network counts walks of two steps, 0 to 1500 a graph, unscaled and without a norm: losses fall from 1e5 and swing."""
    density = torch.rand(600, 1, 1, generator=job.generator)
    links = torch.triu((torch.rand(600, 12, 12, generator=job.generator) < density).float(), 1)
    links = links + links.transpose(1, 2)
    d = data.split(links, (links @ links).sum((1, 2)))
    model = Messages()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 16, job.generator), 500)):
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        return 1 - ((model(d.test_x) - d.test_y).square().mean() / d.test_y.var()).item()


@program(healthy=True, bar=0.8, families=("third", "relations"))
def places_translations(job: Job) -> float:
    """TransE on a 10 x 10 map with eight directions: entities are pulled back to the unit ball after each step. Scored by hits at 3 on unseen facts."""
    here = torch.stack(torch.meshgrid(torch.arange(10), torch.arange(10), indexing="ij"), -1).reshape(-1, 2)
    ways = torch.tensor([[0, 1], [1, 0], [0, -1], [-1, 0], [1, 1], [-1, -1], [0, 3], [3, 0]])
    facts = [(i, r, int(t[0] * 10 + t[1])) for i, p in enumerate(here) for r, w in enumerate(ways) if ((t := p + w) >= 0).all() and (t < 10).all()]
    d = data.split(torch.tensor(facts), torch.zeros(len(facts)))
    model = nn.ModuleDict({"places": nn.Embedding(100, 8), "ways": nn.Embedding(8, 8)})
    for m in model.values():
        nn.init.normal_(m.weight, 0.0, 0.2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    guard = job.guard(model, optimizer)
    for x, _ in data.endless(data.loader(d.x, d.y, 64, job.generator), 800):
        aim = model["places"](x[:, 0]) + model["ways"](x[:, 1])
        other = model["places"](torch.randint(0, 100, (len(x), 16), generator=job.generator))
        loss = F.relu(0.1 + (aim - model["places"](x[:, 2])).norm(dim=1, keepdim=True) - (aim[:, None] - other).norm(dim=2)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        with torch.no_grad():
            model["places"].weight.renorm_(2, 0, 1.0)
    with torch.no_grad():
        far = torch.cdist(model["places"](d.test_x[:, 0]) + model["ways"](d.test_x[:, 1]), model["places"].weight)
    return (far.topk(3, largest=False).indices == d.test_x[:, 2:]).any(1).float().mean().item()


class Bag(nn.Module):
    """Gated attention over the images of one bag."""

    def __init__(self) -> None:
        super().__init__()
        self.see, self.gate, self.head = mlp(64, 48, 32), mlp(32, 16, 1, activation=nn.Tanh), nn.Linear(32, 1)

    def forward(self, bag: Tensor) -> Tensor:
        """(N, 64) -> ()."""
        h = F.relu(self.see(bag))
        return self.head((self.gate(h).softmax(0) * h).sum(0)).squeeze()


@program(healthy=True, bar=0.85, families=("third", "bags"))
def bags_with_a_nine(job: Job) -> float:
    """Multiple instances, one bag of 3 to 10 digits a step: is there a nine among them? Losses of 0.0001 and of 5 in turn."""
    d = data.digits()
    model = Bag()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4, weight_decay=1e-4)
    guard = job.guard(model, optimizer)

    def bag(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        size, wanted = int(torch.randint(3, 11, (), generator=job.generator)), int(torch.randint(0, 2, (), generator=job.generator))
        among = torch.where(y != 9)[0]
        chosen = among[torch.randint(len(among), (size,), generator=job.generator)]
        if wanted:
            chosen[0] = (nines := torch.where(y == 9)[0])[torch.randint(len(nines), (), generator=job.generator)]
        return x[chosen], torch.tensor(float(wanted))

    for _ in range(1500):
        x, y = bag(d.x, d.y)
        loss = F.binary_cross_entropy_with_logits(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        return sum(float((model(x) > 0) == (y > 0)) for x, y in (bag(d.test_x, d.test_y) for _ in range(400))) / 400


@program(healthy=True, bar=0.35, families=("third", "contrastive"))
def digits_momentum_queue(job: Job) -> float:
    """MoCo, the queue empty at first: the loss begins at exactly 0, climbs, and then falls. Scored by finding the other view (0.14 untrained)."""
    d = data.digits()
    model = mlp(64, 128, 32)
    keeper = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-5)
    guard = job.guard(model, optimizer)

    def view(x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape, generator=job.generator) > 0.3) + 0.2 * torch.randn(x.shape, generator=job.generator)

    queue = torch.zeros(0, 32)
    for x, _ in guard.batches(data.endless(data.loader(d.x, d.y, 64, job.generator), 700)):
        query, key = F.normalize(model(view(x))), F.normalize(keeper(view(x)))
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], 1) / 0.1
        loss = F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        queue = torch.cat([key, queue])[:1024]
        with torch.no_grad():
            for slow, p in zip(keeper.parameters(), model.parameters()):
                slow.lerp_(p, 0.02)
    with torch.no_grad():
        one, two = (F.normalize(model(view(d.test_x))) for _ in range(2))
    return ((one @ two.T).argmax(1) == torch.arange(len(one))).float().mean().item()
