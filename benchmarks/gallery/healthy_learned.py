"""Healthy programs: representation learning and reinforcement learning, where the loss's height says little."""

from __future__ import annotations

import copy
import math
import random
from collections import deque

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery import data
from gallery.models import ConvNet, mlp
from gallery.registry import Job, program


def augmented(x: Tensor) -> Tensor:
    """Flat digits with noise and dropped pixels."""
    return (x + 0.3 * torch.randn(x.shape)) * (torch.rand(x.shape) > 0.2)


@torch.no_grad()
def neighbours(encode: nn.Module) -> float:
    """Accuracy of the nearest training digit in the learned space."""
    d = data.digits()
    encode.eval()
    a, b = F.normalize(encode(d.x), dim=1), F.normalize(encode(d.test_x), dim=1)
    encode.train()
    return (d.y[(b @ a.T).argmax(1)] == d.test_y).float().mean().item()


@program(healthy=True, bar=0.85, families=("contrastive",))
def contrastive_simclr(job: Job) -> float:
    """InfoNCE with a temperature of 0.1 between two noisy views; starts near the logarithm of the number of negatives."""
    d = data.digits()
    model = mlp(64, 128, 64, 32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    guard = job.guard(model, optimizer)
    for x, _ in data.endless(data.loader(d.x, d.y, 128, job.generator, drop_last=True), 500):
        z = F.normalize(model(torch.cat([augmented(x), augmented(x)])), dim=1)
        logits = (z @ z.T / 0.1).masked_fill(torch.eye(len(z), dtype=torch.bool), float("-inf"))
        loss = F.cross_entropy(logits, torch.arange(len(z)).roll(len(x)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return neighbours(model)


@program(healthy=True, bar=0.9, families=("contrastive",))
def contrastive_learned_temperature(job: Job) -> float:
    """CLIP-like: images against embeddings of their labels, with a learned temperature."""
    d = data.digits()
    model = nn.ModuleDict({"image": mlp(64, 96, 32), "label": nn.Embedding(10, 32)})
    model.register_parameter("scale", nn.Parameter(torch.tensor(math.log(1 / 0.07))))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 64, job.generator), 500)):
        a, b = F.normalize(model["image"](x), dim=1), F.normalize(model["label"].weight, dim=1)
        loss = F.cross_entropy(model.scale.exp().clamp(max=100) * a @ b.T, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    with torch.no_grad():
        out = F.normalize(model["image"](d.test_x), dim=1) @ F.normalize(model["label"].weight, dim=1).T
        return (out.argmax(1) == d.test_y).float().mean().item()


@program(healthy=True, bar=0.9, families=("contrastive", "siamese"))
def siamese_triplets(job: Job) -> float:
    """Triplets with a margin of 0.3: more and more batches have a loss near 0."""
    d = data.digits()
    model = mlp(64, 96, 24)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    criterion = nn.TripletMarginLoss(margin=0.3)
    groups = [torch.nonzero(d.y == c).squeeze(1) for c in range(10)]
    guard = job.guard(model, optimizer)
    for _ in range(500):
        first = torch.randint(10, (64,), generator=job.generator)
        second = (first + torch.randint(1, 10, (64,), generator=job.generator)) % 10
        rows = [[int(groups[c][torch.randint(len(groups[c]), (1,), generator=job.generator)]) for c in side] for side in (first, first, second)]
        a, p, n = (F.normalize(model(d.x[r]), dim=1) for r in rows)
        loss = criterion(a, p, n)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return neighbours(model)


@program(healthy=True, bar=0.8, families=("contrastive", "siamese"))
def siamese_byol(job: Job) -> float:
    """BYOL: an EMA teacher, a predictor, a loss that is minus a cosine."""
    d = data.digits()
    online, predictor = mlp(64, 128, 64, norm=nn.BatchNorm1d), mlp(64, 64, 64, norm=nn.BatchNorm1d)
    teacher = copy.deepcopy(online).requires_grad_(False)
    model = nn.Sequential(online, predictor)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5)
    guard = job.guard(model, optimizer)
    for x, _ in data.endless(data.loader(d.x, d.y, 128, job.generator, drop_last=True), 400):
        a, b = augmented(x), augmented(x)
        with torch.no_grad():
            ta, tb = teacher(a), teacher(b)
        loss = -(F.cosine_similarity(model(a), tb).mean() + F.cosine_similarity(model(b), ta).mean()) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for p, q in zip(teacher.parameters(), online.parameters(), strict=True):
                p.lerp_(q, 0.02)
        guard.step(loss)
    return neighbours(online)


@program(healthy=True, bar=0.9, families=("contrastive",))
def arcface_scaled_cosine(job: Job) -> float:
    """Cosine logits times 30 with an additive margin: logits of 30 are by design."""
    d = data.digits()
    model = nn.Sequential(mlp(64, 96, 32), nn.Flatten())
    centers = nn.Parameter(torch.randn(10, 32))
    model.register_parameter("centers", centers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 64, job.generator), 500)):
        cosine = F.normalize(model(x), dim=1) @ F.normalize(centers, dim=1).T
        loss = F.cross_entropy(30 * (cosine - 0.2 * F.one_hot(y, 10)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return neighbours(model)


@program(healthy=True, bar=0.85, families=("contrastive", "fewshot"))
def prototypical_episodes(job: Job) -> float:
    """Episodes of five classes with five shots each; every episode is another task."""
    d = data.digits("image")
    model = ConvNet(8, classes=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    groups = [torch.nonzero(d.y == c).squeeze(1) for c in range(10)]
    guard = job.guard(model, optimizer)
    right = 0.0
    for i in range(300):
        classes = torch.randperm(10, generator=job.generator)[:5].tolist()
        rows = torch.stack([groups[c][torch.randperm(len(groups[c]), generator=job.generator)[:10]] for c in classes])
        z = model(d.x[rows.flatten()]).reshape(5, 10, -1)
        prototypes, queries = z[:, :5].mean(1), z[:, 5:].flatten(0, 1)
        logits, y = -torch.cdist(queries, prototypes).square(), torch.arange(5).repeat_interleave(5)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss, logits=logits)
        right += (logits.argmax(1) == y).float().mean().item() * (i >= 250) / 50
    return right


@program(healthy=True, bar=0.9, families=("reinforcement",))
def bandit_reinforce(job: Job) -> float:
    """REINFORCE with a running baseline on a contextual bandit of digits: the loss wanders around zero."""
    d = data.digits()
    model = mlp(64, 64, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    baseline = 0.1
    guard = job.guard(model, optimizer, loss_family="reinforcement")
    for x, y in data.endless(data.loader(d.x, d.y, 128, job.generator), 700):
        policy = torch.distributions.Categorical(logits=model(x))
        action = policy.sample()
        reward = (action == y).float()
        loss = -((reward - baseline) * policy.log_prob(action)).mean() - 0.01 * policy.entropy().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        baseline = 0.95 * baseline + 0.05 * reward.mean().item()
        guard.step(loss)
    return data.accuracy(model, d.test_x, d.test_y)


class Grid:
    """A 5 x 5 grid: from a corner to the other, -0.02 a step, +1 at the goal, 30 steps at most."""

    def reset(self) -> Tensor:
        """A new episode."""
        self.at, self.time = [0, 0], 0
        return self.seen()

    def seen(self) -> Tensor:
        """The place as one of 25."""
        return F.one_hot(torch.tensor(self.at[0] * 5 + self.at[1]), 25).float()

    def step(self, action: int) -> tuple[Tensor, float, bool]:
        """The next state, the reward, and whether it is over."""
        axis, way = divmod(action, 2)
        self.at[axis] = min(4, max(0, self.at[axis] + 2 * way - 1))
        self.time += 1
        goal = self.at == [4, 4]
        return self.seen(), (1.0 if goal else -0.02), goal or self.time >= 30


@program(healthy=True, bar=0.8, families=("reinforcement",))
def grid_dqn_target(job: Job) -> float:
    """DQN with a replay and a target network: the loss is tiny, rises as reward is found, and jumps at each copy. Undeclared."""
    env, model = Grid(), mlp(25, 64, 4)
    target = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    memory: deque[tuple[Tensor, int, float, Tensor, float]] = deque(maxlen=2000)
    guard = job.guard(model, optimizer)
    state, returns, total, updates = env.reset(), [], 0.0, 0
    for i in range(2400):
        if random.random() < max(0.05, 1 - i / 1200):
            action = random.randrange(4)
        else:
            with torch.no_grad():
                action = int(model(state).argmax())
        after, reward, over = env.step(action)
        memory.append((state, action, reward, after, float(over and reward > 0)))
        state, total = after, total + reward
        if over:
            returns.append(total)
            state, total = env.reset(), 0.0
        if i < 200 or i % 2:
            continue
        s, a, r, n, done = (torch.stack(c) if isinstance(c[0], Tensor) else torch.tensor(c) for c in zip(*random.sample(memory, 32), strict=True))
        with torch.no_grad():
            goal = r + 0.95 * (1 - done) * target(n).max(1).values
        loss = F.smooth_l1_loss(model(s).gather(1, a[:, None]).squeeze(1), goal)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
        updates += 1
        if updates % 50 == 0:
            target.load_state_dict(model.state_dict())
    return sum(returns[-20:]) / 20


@program(healthy=True, bar=0.7, families=("reinforcement", "clipping"))
def grid_actor_critic(job: Job) -> float:
    """Advantage actor-critic, one episode an update, gradients clipped at 0.5 as such recipes do; a dict of three terms."""
    env, body, policy, value = Grid(), mlp(25, 64, 64, activation=nn.Tanh), nn.Linear(64, 4), nn.Linear(64, 1)
    model = nn.ModuleList([body, policy, value])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    guard = job.guard(model, optimizer, loss_family="reinforcement")
    returns = []
    for _ in range(350):
        state, over, logs, values, rewards, entropies = env.reset(), False, [], [], [], []
        while not over:
            h = torch.tanh(body(state))
            choice = torch.distributions.Categorical(logits=policy(h))
            action = choice.sample()
            logs.append(choice.log_prob(action))
            entropies.append(choice.entropy())
            values.append(value(h).squeeze())
            state, reward, over = env.step(int(action))
            rewards.append(reward)
        goals, ahead = [], 0.0
        for reward in reversed(rewards):
            ahead = reward + 0.95 * ahead
            goals.insert(0, ahead)
        goal, seen = torch.tensor(goals), torch.stack(values)
        terms = {
            "policy": -((goal - seen.detach()) * torch.stack(logs)).mean(),
            "value": 0.5 * F.mse_loss(seen, goal),
            "entropy": -0.02 * torch.stack(entropies).mean(),
        }
        optimizer.zero_grad()
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        guard.step(terms)
        returns.append(sum(rewards))
    return sum(returns[-30:]) / 30


@program(healthy=True, bar=0.9, families=("distillation",))
def distillation_soft_targets(job: Job) -> float:
    """A small student learns a teacher's probabilities at temperature 4, with the teacher inside the guarded module, frozen."""
    d = data.digits()
    teacher = mlp(64, 128, 10)
    first = torch.optim.Adam(teacher.parameters(), lr=3e-3)
    for x, y in data.draws(d.x, d.y, 64, 200, job.generator):
        first.zero_grad()
        F.cross_entropy(teacher(x), y).backward()
        first.step()
    teacher.requires_grad_(False).eval()
    model = nn.ModuleDict({"teacher": teacher, "student": mlp(64, 16, 10)})
    student = model["student"]
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    guard = job.guard(model, optimizer)
    for x, y in guard.batches(data.endless(data.loader(d.x, d.y, 64, job.generator), 500)):
        out = student(x)
        soft = F.kl_div(F.log_softmax(out / 4, 1), F.softmax(teacher(x) / 4, 1), reduction="batchmean") * 16
        loss = 0.7 * soft + 0.3 * F.cross_entropy(out, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return data.accuracy(student, d.test_x, d.test_y)
