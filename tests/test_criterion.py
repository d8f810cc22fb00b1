"""What the graph says of the loss itself: signs, shapes that are broadcast, dimensions. Each fault is heard, and what looks like it is not."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from test_beginnings import small
from test_newcomers import alarms, trained
from torch import nn

from lossguard import Guard, Severity
from lossguard.device import criterion

N = 8
X, TARGETS = torch.randn(N, 4, generator=torch.Generator().manual_seed(0)), torch.randn(N, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def column():
    """Outputs of shape (N, 1)."""
    torch.manual_seed(0)
    return nn.Linear(4, 1)(X)


PAIRED = [
    lambda p, y: F.mse_loss(p, y),
    lambda p, y: F.l1_loss(p, y),
    lambda p, y: F.smooth_l1_loss(p, y),
    lambda p, y: F.huber_loss(p.squeeze(-1), y[:, None]),
    lambda p, y: ((p - y) ** 2).mean(),
    lambda p, y: (y - p).abs().sum() / N,
    lambda p, y: torch.sqrt(((p - y) ** 2).mean()),
    lambda p, y: 0.5 * (p - y).square().mean() + 1e-4 * p.square().sum(),
    lambda p, y: torch.linalg.vector_norm(p - y),
    lambda p, y: -(y * F.logsigmoid(p) + (1 - y) * F.logsigmoid(-p)).mean(),  # a binary cross entropy by hand
    lambda p, y: -(p * y).sum(),  # a policy gradient
]


@pytest.mark.parametrize("loss", PAIRED)
def test_outputs_that_meet_every_target_are_seen(column, loss):
    """Whatever error is taken of (n, 1) against (n,): the shape of the outputs and their number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of which only its functional losses have one
        value = loss(column, TARGETS)
    value.backward()
    given, n = criterion.paired(value.grad_fn)
    assert n == N and given in ((N, 1), (N,))


@pytest.mark.parametrize(
    "loss",
    [
        lambda p, y: F.mse_loss(p.squeeze(-1), y),
        lambda p, y: ((p - y[:, None]) ** 2).mean(),
        lambda p, y: ((p - p.T) ** 2).mean(),  # all pairs of outputs
        lambda p, y: 2 * (p - y[None, :]).abs().mean() - (p - p.T).abs().mean(),  # an energy distance
        lambda p, y: ((p.squeeze(-1).unsqueeze(1) - y) ** 2).mean(),  # a dimension given on purpose
        lambda p, y: (((p - y) ** 2) * torch.softmax(-((p - y).detach() ** 2), dim=1)).sum(),  # a transport cost
        lambda p, y: torch.relu(1 - (p - y)).mean(),  # ranking
        lambda p, y: torch.exp(-((p - y) ** 2)).mean(),  # a kernel
        lambda p, y: ((p - y[:3]) ** 2).mean(),  # quantile levels, support points
        lambda p, y: ((p - y.mean()) ** 2).mean(),
        lambda p, y: -(y * F.logsigmoid(p.squeeze(-1))).mean(),
        lambda p, y: (p * y[None, :3]).mean(),
        lambda p, y: (p @ y[None, :]).mean(),  # an outer product
        lambda p, y: ((p.expand(N, 5) - y[:5]) ** 2).mean(),
    ],
)
def test_pairs_that_are_meant_are_not(column, loss):
    assert criterion.paired(loss(column, TARGETS).grad_fn) == ((), 0)


def test_one_sample_is_no_pair():
    assert criterion.paired(((nn.Linear(4, 1)(X[:1]) - TARGETS[:1]) ** 2).mean().grad_fn) == ((), 0)


def regression(loss_of, **options):
    """A regression with one output on a rule that can be learned, under a guard."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    draw = torch.Generator().manual_seed(0)
    with Guard(model, optimizer, halt=None, **options) as guard:
        for _ in range(60):
            x = torch.randn(32, 4, generator=draw)
            loss = loss_of(model(x), x[:, 0] * x[:, 1])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(loss)
    return guard


def test_broadcast_targets_are_named_at_the_first_step():
    """A hand-written error of (n, 1) against (n,): the shapes are named at once, and nothing else is. With one shape there is no alarm."""
    (found,) = [f for f in regression(lambda p, y: ((p - y) ** 2).mean()).findings if f.severity >= Severity.WARNING]
    assert (found.diagnosis, found.step, found.causes[0].name) == ("invalid_labels", 0, "shapes are broadcast")
    assert "outputs (32, 1), targets (32,)" in found.causes[0].because and "view_as" in found.remedies[0].text
    assert alarms(regression(lambda p, y: ((p.squeeze(-1) - y) ** 2).mean())) == []


# ---- the dimension of a softmax


def test_a_softmax_over_the_wrong_dimension_is_named():
    """Over the samples, or the places of a sequence that is flattened behind it; over the classes it is silent, whatever the shapes are."""
    wrong = trained(lambda out, y: F.nll_loss(F.log_softmax(out, dim=0), y))
    assert alarms(wrong)[0] == ("wrong_output_activation", "softmax over the wrong axis")
    assert "dimension 0 of size 16, and the loss takes 3 classes" in wrong.findings[0].causes[0].because
    assert alarms(trained(lambda out, y: F.nll_loss(F.log_softmax(out, dim=-1), y))) == []


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        (lambda z, y: F.nll_loss(F.log_softmax(z, dim=1).reshape(-1, 6), y.reshape(-1)), (1, 5, 6)),
        (lambda z, y: F.nll_loss(F.log_softmax(z, dim=0).reshape(-1, 6), y.reshape(-1)), (0, 4, 6)),
        (lambda z, y: F.nll_loss(F.softmax(z, dim=1).log().reshape(-1, 6), y.reshape(-1)), (1, 5, 6)),
        (lambda z, y: F.nll_loss(F.log_softmax(z, dim=2).reshape(-1, 6), y.reshape(-1)), (0, 0, 0)),
        (lambda z, y: F.nll_loss(F.log_softmax(z, dim=2).transpose(1, 2), y), (0, 0, 0)),
        (lambda z, y: F.nll_loss(F.log_softmax(z, dim=1).transpose(1, 2), y), (1, 5, 6)),
        (lambda z, y: F.nll_loss(F.log_softmax(z.transpose(1, 2), dim=1), y), (0, 0, 0)),
        (lambda z, y: F.cross_entropy(z.transpose(1, 2), y), (0, 0, 0)),
        (lambda z, y: F.cross_entropy(z.reshape(-1, 6), y.reshape(-1)), (0, 0, 0)),
        (lambda z, y: F.nll_loss(F.log_softmax(z[:, 0] @ z[:, 1].T, dim=0), torch.arange(4)), (0, 0, 0)),  # the other direction of a contrastive loss
    ],
)
def test_the_dimension_is_followed_through_views(loss, found):
    """(samples, places, classes) logits: the softmax's dimension, its size, the classes; zeros where it is right."""
    logits = torch.randn(4, 5, 6, requires_grad=True) * 1.0
    queue, axis = [loss(logits, torch.randint(6, (4, 5))).grad_fn], (0, 0, 0)
    while queue:
        node = queue.pop()
        axis = axis if axis[1] else criterion.wrong_axis(node)
        queue += [child for child, _ in node.next_functions if child is not None]
    assert axis == found


# ---- signs


ONE, TWO = (lambda out: F.cross_entropy(out[:, :3], torch.zeros(N, dtype=torch.long))), (lambda out: F.mse_loss(out, torch.zeros(N, 4)))


@pytest.mark.parametrize(
    ("loss", "sign"),
    [
        (lambda out: ONE(out), 1),
        (lambda out: (ONE(out) + TWO(out)) / 2, 1),
        (lambda out: 0.5 * ONE(out) + TWO(out), 0),  # 0.5 may have been -0.5
        (lambda out: TWO(out) - (-ONE(out)), 0),  # right, but a difference
        (lambda out: -ONE(out), -1),
        (lambda out: -(0.5 * ONE(out) + 2 * TWO(out)), -1),
        (lambda out: -(0.5 * ONE(out)) - TWO(out), -1),
        (lambda out: 1 - ONE(out), -1),
        (lambda out: 1 - (1 - ONE(out)), 0),  # right, but not read as that: nothing is claimed
        (lambda out: ONE(out) * -1, 0),  # autograd has forgotten the factor
        (lambda out: ONE(out) - 0.1 * TWO(out), 0),  # a game of two sides
        (lambda out: ONE(out) * torch.tensor(-2.0), 0),  # an advantage
        (lambda out: -(F.cross_entropy(out, torch.zeros(N, dtype=torch.long), reduction="none") * torch.rand(N)).mean(), 0),  # advantages
        (lambda out: -0.5 * ONE(out) - TWO(out), 0),
        (lambda out: -F.kl_div(out.log_softmax(1), torch.full((N, 4), 0.25)), 0),  # mutual information is maximised
        (lambda out: -out.log_softmax(1)[:, 0].mean(), 0),  # a policy gradient
        (lambda out: out.square().mean(), 0),
    ],
)
def test_the_sign_of_a_loss_is_read_from_its_graph(loss, sign):
    """1: it cannot be negative. -1: it only subtracts what cannot be. 0: nothing is claimed. As the graph is read, after the backward pass."""
    value = loss(nn.Linear(4, 4)(X))
    value.backward()
    assert criterion.sign([value]) == sign


def test_a_minus_before_weighted_terms_is_named_early():
    """As soon as the loss has fallen half as far again below 0 as it began, though its terms are weighted, and no label is shown."""
    model, draw = small(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with Guard(model, optimizer, halt=None) as guard:
        for _ in range(60):
            out, y = model(torch.randn(16, 8, generator=draw)), torch.randint(3, (16,), generator=draw)
            loss = -(0.7 * F.cross_entropy(out, y) + 0.3 * F.cross_entropy(out * 2, y))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(loss)
    first = next(f for f in guard.findings if f.severity >= Severity.WARNING)
    assert (first.diagnosis, first.causes[0].name) == ("negative_loss", "sign of the loss")
    assert "under a minus sign" in first.causes[0].because and first.step < 40


def test_a_divergence_of_probabilities_is_named():
    """kl_div takes log-probabilities: given what a softmax made it is named, also where a distillation weighs it beside a cross entropy."""
    torch.manual_seed(0)
    told = torch.randn(16, 3).softmax(1)

    def distilled(prepare):
        return trained(lambda out, y: 0.7 * 4.0 * F.kl_div(prepare(out / 2), told, reduction="batchmean") + 0.3 * F.cross_entropy(out, y))

    assert alarms(distilled(lambda z: F.softmax(z, 1)))[0] == ("wrong_output_activation", "softmax before a KL divergence")
    assert alarms(distilled(lambda z: F.log_softmax(z, 1))) == []
    assert alarms(trained(lambda out, y: F.kl_div(F.log_softmax(out, 1), told.log(), log_target=True, reduction="batchmean"))) == []
    assert alarms(trained(lambda out, y: ((told - 2.0 * F.softmax(out, 1)) ** 2).mean())) == []
    assert alarms(trained(lambda out, y: (1 - F.one_hot(y, 3) * F.softmax(out, 1)).mean())) == []  # an expected error, written by hand
