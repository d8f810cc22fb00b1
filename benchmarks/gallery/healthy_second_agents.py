"""Healthy programs, second set: agents and learners of learners. Proximal policies, deterministic policies, second-order meta-learning."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from gallery.models import mlp
from gallery.registry import Job, program


class Poles:
    """Sixteen poles on carts, the classic equations, an episode of 100 steps at most."""

    def __init__(self, n: int, seed: int) -> None:
        self.random, self.n = np.random.default_rng(seed), n
        self.state, self.age = self.random.uniform(-0.05, 0.05, (n, 4)), np.zeros(n)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rewards and which episodes ended; those begin anew."""
        x, v, a, w = self.state.T
        force, sin, cos = np.where(action == 1, 10.0, -10.0), np.sin(a), np.cos(a)
        push = (force + 0.05 * w**2 * sin) / 1.1
        turn = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
        self.state = np.stack([x + 0.02 * v, v + 0.02 * (push - 0.05 * turn * cos / 1.1), a + 0.02 * w, w + 0.02 * turn], 1)
        self.age += 1
        done = (np.abs(self.state[:, 0]) > 2.4) | (np.abs(self.state[:, 2]) > 0.21) | (self.age >= 100)
        self.state[done], self.age[done] = self.random.uniform(-0.05, 0.05, (int(done.sum()), 4)), 0
        return np.ones(self.n), done


@program(healthy=True, bar=45.0, families=("second", "reinforcement"))
def cart_pole_proximal_policy(job: Job) -> float:
    """PPO: clipped ratios, an entropy bonus, a value loss that grows as episodes get longer. Scored by the mean length of episodes."""
    poles = Poles(16, 100 + job.seed)
    nets = nn.ModuleDict({"policy": mlp(4, 48, 2, activation=nn.Tanh), "value": mlp(4, 48, 1, activation=nn.Tanh)})
    optimizer = torch.optim.Adam(nets.parameters(), lr=3e-3)
    guard = job.guard(nets, optimizer)
    ended, lived = 0, 0
    for round_ in range(35):
        seen, acts, logs, dones = [], [], [], []
        with torch.no_grad():
            for _ in range(32):
                s = torch.tensor(poles.state, dtype=torch.float32)
                log = nets["policy"](s).log_softmax(1)
                a = torch.multinomial(log.exp(), 1, generator=job.generator).squeeze(1)
                _, done = poles.step(a.numpy())
                seen.append(s), acts.append(a), logs.append(log.gather(1, a[:, None]).squeeze(1)), dones.append(torch.tensor(done))
            values = [nets["value"](s).squeeze(1) for s in [*seen, torch.tensor(poles.state, dtype=torch.float32)]]
            owed, gains = torch.zeros(16), [torch.zeros(16)] * 32
            for t in reversed(range(32)):
                alive = 1.0 - dones[t].float()
                owed = 1 + 0.98 * alive * values[t + 1] - values[t] + 0.98 * 0.95 * alive * owed
                gains[t] = owed
        if round_ >= 28:
            lived, ended = lived + 16 * 32, ended + int(sum(d.sum() for d in dones))
        s, a, old, gain = torch.cat(seen), torch.cat(acts), torch.cat(logs), torch.cat(gains)
        back = gain + torch.cat(values[:-1])
        gain = (gain - gain.mean()) / (gain.std() + 1e-8)
        for _ in range(4):
            for rows in torch.randperm(512, generator=job.generator).split(128):
                log = nets["policy"](s[rows]).log_softmax(1)
                ratio = (log.gather(1, a[rows, None]).squeeze(1) - old[rows]).exp()
                terms = {
                    "policy": -torch.minimum(ratio * gain[rows], ratio.clamp(0.8, 1.2) * gain[rows]).mean(),
                    "value": 0.5 * F.mse_loss(nets["value"](s[rows]).squeeze(1), back[rows]),
                    "entropy": 0.01 * (log.exp() * log).sum(1).mean(),
                }
                optimizer.zero_grad()
                sum(terms.values()).backward()
                nn.utils.clip_grad_norm_(nets.parameters(), 0.5)
                optimizer.step()
                guard.step(terms)
    return lived / max(1, ended)


@program(healthy=True, bar=-0.25, families=("second", "reinforcement"))
def point_mass_deterministic_policy(job: Job) -> float:
    """DDPG on a point that must come to the origin: targets that follow slowly, an actor whose loss is minus a value, replay. Scored by distance."""
    g = job.generator
    actor, critic = nn.Sequential(mlp(2, 48, 1), nn.Tanh()), mlp(3, 64, 64, 1)
    late_actor, late_critic = (copy.deepcopy(m).requires_grad_(False) for m in (actor, critic))
    opt_a, opt_c = torch.optim.Adam(actor.parameters(), lr=1e-3), torch.optim.Adam(critic.parameters(), lr=2e-3)
    guard_a, guard_c = job.guard(actor, opt_a), job.guard(critic, opt_c)

    def move(s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        v = (0.9 * s[:, 1] + 0.3 * a[:, 0]).clamp(-1, 1)
        x = (s[:, 0] + 0.3 * v).clamp(-2, 2)
        return torch.stack([x, v], 1), -(x.square() + 0.1 * v.square() + 0.01 * a[:, 0].square())

    def begin(n: int) -> Tensor:
        return torch.stack([2 * torch.rand(n, generator=g) - 1, torch.zeros(n)], 1)

    s, memory = begin(8), []
    for i in range(900):
        with torch.no_grad():
            a = (actor(s) + 0.3 * torch.randn(8, 1, generator=g)).clamp(-1, 1) if i > 60 else 2 * torch.rand(8, 1, generator=g) - 1
            after, reward = move(s, a)
        memory.append((s, a, reward, after))
        s = begin(8) if (i + 1) % 25 == 0 else after
        if i < 30:
            continue
        chosen = [memory[k] for k in torch.randint(max(0, len(memory) - 400), len(memory), (12,), generator=g)]
        ms, ma, mr, mn = (torch.cat(part) for part in zip(*chosen))
        with torch.no_grad():
            target = mr + 0.95 * late_critic(torch.cat([mn, late_actor(mn)], 1)).squeeze(1)
        loss_c = F.mse_loss(critic(torch.cat([ms, ma], 1)).squeeze(1), target)
        opt_c.zero_grad()
        loss_c.backward()
        opt_c.step()
        guard_c.step(loss_c)
        loss_a = -critic(torch.cat([ms, actor(ms)], 1)).mean()
        opt_a.zero_grad()
        loss_a.backward()
        opt_a.step()
        guard_a.step(loss_a)
        with torch.no_grad():
            for late, net in ((late_actor, actor), (late_critic, critic)):
                for slow, p in zip(late.parameters(), net.parameters()):
                    slow.lerp_(p, 0.01)
    s = begin(200)
    with torch.no_grad():
        for _ in range(30):
            s, _ = move(s, actor(s))
    return -s[:, 0].abs().mean().item()


def waves(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ten points of each of n sines of random height and phase, twice."""
    x = 10 * torch.rand(n, 20, 1, generator=g) - 5
    high, phase = 0.5 + 2 * torch.rand(n, 1, 1, generator=g), math.pi * torch.rand(n, 1, 1, generator=g)
    return x / 3, high * torch.sin(x + phase)


@program(healthy=True, bar=0.2, families=("second", "meta"))
def sines_model_agnostic(job: Job) -> float:
    """MAML with one inner step and second derivatives: the guard sees the outer loss alone, over four tasks. Scored by what adapting gains."""
    model = mlp(1, 40, 40, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    guard = job.guard(model, optimizer)

    def adapted(x: Tensor, y: Tensor, create: bool) -> Tensor:
        weights = dict(model.named_parameters())
        inner = F.mse_loss(functional_call(model, weights, (x[:10],)), y[:10])
        slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=create)
        return F.mse_loss(functional_call(model, {k: p - 0.05 * s for (k, p), s in zip(weights.items(), slopes)}, (x[10:],)), y[10:])

    for _ in range(500):
        xs, ys = waves(4, job.generator)
        loss = torch.stack([adapted(x, y, True) for x, y in zip(xs, ys)]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        guard.step(loss)
    xs, ys = waves(100, job.generator)
    after = torch.stack([adapted(x, y, False).detach() for x, y in zip(xs, ys)]).mean()
    return 1 - (after / ys.var()).item()


@program(healthy=True, bar=0.3, families=("second", "meta"))
def sines_reptile(job: Job) -> float:
    """Reptile: five steps of SGD on one sine, then the weights go a tenth of the way there from where they were. Each task starts anew."""
    model = mlp(1, 48, 48, 1, activation=nn.Tanh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    guard = job.guard(model, optimizer)
    for i in range(400):
        x, y = (v[0] for v in waves(1, job.generator))
        before = [p.detach().clone() for p in model.parameters()]
        for _ in range(5):
            loss = F.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(loss)
        with torch.no_grad():
            for p, old in zip(model.parameters(), before):
                p.copy_(torch.lerp(old, p, 0.5 * (1 - i / 400) + 0.05))
    xs, ys = waves(60, job.generator)
    left = []
    for x, y in zip(xs, ys):
        net = copy.deepcopy(model)
        tune = torch.optim.SGD(net.parameters(), lr=0.05)
        for _ in range(10):
            tune.zero_grad()
            F.mse_loss(net(x[:10]), y[:10]).backward()
            tune.step()
        left.append(F.mse_loss(net(x[10:]), y[10:]).detach())
    return 1 - (torch.stack(left).mean() / ys.var()).item()
