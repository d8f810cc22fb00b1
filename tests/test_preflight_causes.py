"""Which of two neighbouring faults a preflight names, and where a neighbour of a fault is healthy."""

from __future__ import annotations

import preflight_tasks
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lossguard import Severity, preflight
from lossguard.preflight.labels import InvalidLabels


def loader(x, y, size=32, shuffle=True):
    return DataLoader(TensorDataset(x, y), batch_size=size, shuffle=shuffle)


def table(n=320, seed=1):
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


def mlp(outputs=3, act=nn.ReLU, width=32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, width), act(), nn.Linear(width, width), act(), nn.Linear(width, outputs))


def severity(result, name):
    return next((f.severity for f in result if f.diagnosis == name), None)


@pytest.mark.parametrize(("lr", "heard"), [(0.02, Severity.WARNING), (1e-3 / 32, Severity.INFO), (None, Severity.INFO)])
def test_a_sum_is_a_fault_only_at_a_rate_that_was_not_chosen_for_it(lr, heard):
    """A sum over the batch warns where the first steps are torn, and informs where the rate was divided or is not known."""
    x = table()
    model = mlp(1)
    optimizer = None if lr is None else torch.optim.SGD(model.parameters(), lr=lr * (10 if heard else 1), momentum=0.9)
    result = preflight(model, loader(x, 3 * x[:, :1]), nn.MSELoss(reduction="sum"), optimizer)
    assert severity(result, "initial_loss_off") is heard, str(result)


def test_raw_targets_that_a_bias_learns_are_an_info():
    """Targets of mean 150 and deviation 77 under Adam are worth a line, not a warning."""
    x = table()
    model = mlp(1)
    result = preflight(model, loader(x, 77 * x[:, :1] + 150), nn.MSELoss(), torch.optim.Adam(model.parameters(), lr=1e-2))
    assert severity(result, "initial_loss_off") in (None, Severity.INFO), str(result)


@pytest.mark.parametrize(
    ("make", "said"),
    [(lambda p: torch.optim.SGD(p, lr=0.02), "rises at once"), (lambda p: torch.optim.Adam(p, lr=1e-5), "for ever")],
    ids=["sgd", "adam"],
)
def test_targets_that_the_rate_does_not_bear_are_a_warning(make, said):
    """Targets of ten thousand tear plain gradient descent, and are out of reach of a small step of Adam: the targets are named."""
    x = table()
    model = mlp(1)
    result = preflight(model, loader(x, 1e4 * x[:, :1]), nn.MSELoss(), make(model.parameters()))
    finding = next(f for f in result if f.diagnosis == "initial_loss_off")
    assert finding.severity is Severity.WARNING and said in finding.message and finding.causes[0].name == "targets not standardised"


def test_a_rate_too_high_by_itself_is_not_blamed_on_the_targets():
    """Where standardised targets do not help either, the targets are not the cause."""
    x = table()
    model = mlp(1)
    result = preflight(model, loader(x, 40 * x[:, :1]), nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=300.0))
    assert severity(result, "initial_loss_off") is None, str(result)


def classes(counts):
    y = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(2))]
    return table(len(y)), y


@pytest.mark.parametrize(
    ("counts", "size", "heard"),
    [
        ((200, 3), 32, Severity.WARNING),  # too few to learn or to measure
        ((145, 145, 4, 4), 64, Severity.WARNING),
        ((600, 25), 32, Severity.INFO),  # moderate
        ((3000, 25), 32, Severity.INFO),  # rare, and in every fourth batch
        ((6000, 25), 32, Severity.WARNING),  # in one batch of eight
        ((300, 20), 32, None),
        ((60, *[60] * 20, 2), 32, Severity.INFO),  # a long tail of many classes
    ],
)
def test_a_starved_class_is_a_warning_and_moderate_imbalance_an_info(counts, size, heard):
    """Starved is what cannot be learned: under ten samples in all, or a hundred times rarer and missing from most batches."""
    x, y = classes(counts)
    torch.manual_seed(0)
    result = preflight(nn.Linear(8, len(counts)), loader(x, y, size), nn.CrossEntropyLoss())
    assert severity(result, "class_imbalance") is heard, str(result)


def test_rare_words_are_no_starved_classes():
    """Where tokens come in, the classes may be tokens too: their long tail is an info."""
    generator = torch.Generator().manual_seed(3)
    tokens = (torch.rand(2000, 4, generator=generator).square() * 12).long()
    y = torch.where(torch.arange(2000) % 700 == 0, 11, tokens[:, 0] % 8)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12, 8), nn.Flatten(), nn.Linear(32, 12))
    assert severity(preflight(model, loader(tokens, y), nn.CrossEntropyLoss()), "class_imbalance") is not Severity.WARNING


@pytest.mark.parametrize("layers", [(0,), (4,), (0, 4)])
def test_one_constant_layer_is_broken_up_by_its_neighbours(layers):
    """Only layers that follow one another are a fault: random neighbours tell the units of a constant one apart."""
    model = mlp()
    for i in layers:
        nn.init.constant_(model[i].weight, 0.01)
    result = preflight(model, loader(table(), table()[:, :3].argmax(1)), nn.CrossEntropyLoss())
    assert severity(result, "poor_initialization") is None, str(result)


def test_equal_weights_with_random_biases_are_named():
    """All weights are one number and only the biases differ: the weights are the cause."""
    model = mlp()
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.constant_(layer.weight, 0.01)
    result = preflight(model, loader(table(), table()[:, :3].argmax(1)), nn.CrossEntropyLoss())
    assert [f.diagnosis for f in result] == ["poor_initialization"] and result[0].causes[0].name == "weights all equal"


@pytest.mark.parametrize(("act", "scale", "ill"), [(nn.Tanh, 12.0, True), (nn.Sigmoid, 200.0, True), (nn.Tanh, 1.0, False), (nn.Tanh, 2.9, False)])
def test_saturated_units_at_the_start_are_the_weights(act, scale, ill):
    """Tanh and sigmoid units that begin at their ends are an initialisation too large, above a first loss that is off for it."""
    torch.manual_seed(0)
    model = nn.Sequential(*(m for i in range(4) for m in (nn.Linear(64 if i else 8, 64), act())), nn.Linear(64, 3))
    for layer in model:
        if isinstance(layer, nn.Linear):
            layer.weight.data.mul_(scale)
    result = preflight(model, loader(table(), table()[:, :3].argmax(1)), nn.CrossEntropyLoss())
    assert [f.diagnosis for f in result if f.severity >= Severity.WARNING] == ["poor_initialization"] * ill, str(result)
    assert not ill or result[0].causes[0].name == "weights too large"


def test_an_input_without_information_is_named():
    """Every sample is the same although the labels differ: the input is the root, whatever follows."""
    x = torch.zeros(320, 8)
    result = preflight(mlp(), loader(x, torch.arange(320) % 3), nn.CrossEntropyLoss())
    assert [f.diagnosis for f in result] == ["unnormalized_input"] and result[0].causes[0].name == "input carries no information", str(result)


def test_a_constant_input_beside_another_is_no_fault():
    """A second input that is the same for every sample, and a learned constant for equal targets, are fine."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 3), nn.Linear(2, 3)

        def forward(self, x):
            return self.a(x) + self.b(torch.ones(len(x), 2))

    torch.manual_seed(0)
    assert severity(preflight(Two(), loader(table(), torch.arange(320) % 3), nn.CrossEntropyLoss()), "unnormalized_input") is None
    result = preflight(mlp(1), loader(torch.zeros(320, 8), torch.full((320, 1), 2.0)), nn.MSELoss())
    assert severity(result, "unnormalized_input") is None, str(result)


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ((0.0, 255.0), "targets are no probabilities"),
        ((0.0, 100.0), "targets are no probabilities"),
        (tuple(float(v) for v in range(0, 256, 5)), "targets are no probabilities"),
        ((0.0, 1.0, 2.0), "class numbers where yes or no is expected"),
        ((-1.0, 1.0), "labels are -1 and 1"),
        ((0.0, 0.5, 3.25), "targets are no probabilities"),
    ],
)
def test_binary_targets_outside_are_told_apart(values, cause):
    """Masks and pixels that were not divided are no class numbers."""
    y = torch.tensor(values)[torch.arange(320) % len(values)].unsqueeze(1)
    result = preflight(mlp(1), loader(table(), y), nn.BCEWithLogitsLoss(), checks=[InvalidLabels()])
    assert result[0].diagnosis == "invalid_labels" and result[0].causes[0].name == cause, str(result)


def test_a_softmax_over_the_batch_is_told_from_one_that_is_missing():
    """One event, the axis as its cause; over the classes it is right."""
    x, y = table(), torch.arange(320) % 3
    wrong = preflight(nn.Sequential(mlp(), nn.LogSoftmax(0)), loader(x, y), nn.NLLLoss())
    assert [(f.diagnosis, f.causes[0].name) for f in wrong] == [("wrong_output_activation", "softmax over the wrong axis")]
    assert preflight(nn.Sequential(mlp(), nn.LogSoftmax(1)), loader(x, y), nn.NLLLoss()).answers["wrong_output_activation"] == "pass"
    missing = preflight(mlp(), loader(x, y), lambda out, t: F.nll_loss(out, t))
    assert missing[0].causes[0].name == "log_softmax missing"


def test_a_trained_tanh_network_is_not_called_badly_initialised():
    """Weights that were trained saturate their units, and begin below chance: no finding."""
    _, data, criterion, _, _ = preflight_tasks.digits_mlp()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(4):
        for x, y in data:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
    assert severity(preflight(model, data, criterion), "poor_initialization") is None
