"""Trackers for hand-written loops, each against its real package; those that are not installed are skipped."""

from __future__ import annotations

import csv
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lossguard import Guard
from lossguard.scalars import SCALARS
from lossguard.trackers import CSV, MLflow, TensorBoard, WandB
from lossguard.trackers.csvfile import headline

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*")


def train(*trackers, steps=80, poison: int | None = None, lag=3, each=lambda i: None, **options):
    """A small loop; every sampled step's scalars are due at the trackers. each: called in every iteration, as a loop's own logging."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with Guard(model, optimizer, trackers=trackers, lag=lag, dense=20, halt=None, **options) as guard:
        for i in range(steps):
            x = torch.randn(16, 4)
            loss = F.cross_entropy(model(x), x[:, :3].argmax(1)) * (math.nan if i == poison else 1.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            each(i)
            guard.step(loss)
    return guard


def expected(guard):
    """Step -> (gradient norm, loss) of each sample of the history."""
    losses = dict(zip(guard.history.loss_steps().tolist(), guard.history.losses(), strict=True))
    return {s: (n, losses[s]) for s, n in zip(guard.history.steps().tolist(), guard.history.last("grad_total")[:, 0], strict=True)}


def test_any_callable_gets_the_scalars():
    """A callable gets each sample once, in order, at the step it is of: floats under readable names, at most 20, the loss among them."""
    rows = []
    guard = train(lambda step, numbers: rows.append((step, dict(numbers))))
    assert [step for step, _ in rows] == [*range(20), 20, 30, 40, 50, 60, 70] == guard.history.steps().tolist()
    names = {name for _, numbers in rows for name in numbers}
    assert 12 <= len(names) <= 20
    assert names <= {"loss", *SCALARS, "loss_scale", "findings"}
    for step, numbers in rows:
        assert all(type(value) is float for value in numbers.values())
        np.testing.assert_allclose((numbers["grad_norm"], numbers["loss"]), expected(guard)[step], rtol=1e-6)


def test_tracking_changes_no_run():
    """Weights are bit-identical with and without trackers."""
    with_, without = train(lambda step, numbers: None), train()
    for a, b in zip(with_.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_tracker_that_fails_is_one_warning():
    """A tracker that raises is told of once and gets no more; the others and the training go on."""
    rows = []

    def broken(step, numbers):
        raise OSError("disk full")

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        guard = train(broken, lambda step, numbers: rows.append(step))
    assert [str(w.message) for w in heard if "disk full" in str(w.message)] != []
    assert sum("disk full" in str(w.message) for w in heard) == 1
    assert guard.steps == 80 and len(rows) == 26


REFUSED = {
    "text": ("tensorboard", r"trackers= holds 't', which is no tracker; give TensorBoard\(folder\)"),
    "class": ([CSV], r"which is no tracker"),
    "number": ([3], r"trackers= holds 3, which is no tracker"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_tracker_is_refused_in_words(name):
    """trackers= takes trackers and callables; anything else is a ValueError that says what to give."""
    given, words = REFUSED[name]
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=words):
        Guard(model, torch.optim.SGD(model.parameters(), lr=0.1), trackers=given)


# ---- CSV


def test_csv(tmp_path):
    """A line for each sample and each finding, readable by the standard library; NaN is written as it is, what was not measured stays empty."""
    path = tmp_path / "deep" / "run.csv"
    guard = train(CSV(path), poison=50)
    rows = list(csv.DictReader(path.open()))
    numbers, findings = [r for r in rows if not r["finding"]], [r for r in rows if r["finding"]]
    assert [int(r["step"]) for r in numbers] == guard.history.steps().tolist()
    for r in numbers:
        np.testing.assert_allclose((float(r["grad_norm"]), float(r["loss"])), expected(guard)[int(r["step"])], rtol=1e-5)
    assert any(math.isnan(float(r["loss"])) for r in numbers)
    assert numbers[0]["dead_fraction_largest"] == ""
    assert [(int(r["step"]), r["finding"]) for r in findings] == [(50, headline(f)) for f in guard.findings]


def test_csv_is_continued_and_other_files_are_not_touched(tmp_path):
    """A second run goes on below the first; a file of another kind is refused and left as it is."""
    path, other = tmp_path / "run.csv", tmp_path / "other.csv"
    train(CSV(path), steps=5)
    train(CSV(path), steps=5)
    assert [int(r["step"]) for r in csv.DictReader(path.open())] == [*range(5), *range(5)]
    other.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"is no CSV file of this version .*'a,b'.*give another path"):
        CSV(other)
    assert other.read_text() == "a,b\n1,2\n"


# ---- TensorBoard


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={TENSORS: 0})
    found.Reload()
    return found


def test_tensorboard(tmp_path):
    """The curves stand under one prefix at their steps, NaN included; findings are text at theirs."""
    pytest.importorskip("tensorboard")
    guard = train(TensorBoard(tmp_path), poison=50)
    found = events(tmp_path)
    names = found.Tags()["scalars"]
    assert 12 <= len(names) <= 20 and all(n.startswith("lossguard/") for n in names)
    points = found.Scalars("lossguard/grad_norm")
    assert [p.step for p in points] == guard.history.steps().tolist()
    np.testing.assert_allclose([p.value for p in points], [expected(guard)[p.step][0] for p in points], rtol=1e-6)
    assert math.isnan(points[-1].value)
    (finding,) = guard.findings
    text = found.Tensors(f"lossguard/{finding.diagnosis}/text_summary")[0]
    assert text.step == 50 and f"lossguard: halt {finding.diagnosis} at step 50" in text.tensor_proto.string_val[0].decode()


def test_tensorboard_with_the_loops_own_writer(tmp_path):
    """A writer that is given stays open, layers come on demand, and the writer itself is no tracker."""
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        train(TensorBoard(writer, layers=True, prefix="guard"), steps=10)
        writer.add_scalar("own", 1.0, 3)
        model = nn.Linear(2, 1)
        with pytest.raises(ValueError, match=r"a SummaryWriter itself; give lossguard.trackers.TensorBoard\(writer\)"):
            Guard(model, torch.optim.SGD(model.parameters(), lr=0.1), trackers=[writer])
    assert {"own", "guard/grad_norm/0.weight", "guard/update_ratio/2.bias", "guard/loss"} <= set(events(tmp_path).Tags()["scalars"])
    with pytest.raises(ValueError, match="takes a SummaryWriter or a folder, got int"):
        TensorBoard(3)


# ---- Weights & Biases


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A run that is kept on disk, and what reads its rows afterwards."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(mode="offline", dir=str(tmp_path), project="lossguard")
    yield run, lambda: _rows(run, tmp_path)
    run.finish()


def _rows(run, folder):
    """The rows and alerts of an offline run, out of its file: protocol buffers in the log format of LevelDB."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    run.finish()
    wandb.teardown()  # ends the process that writes the file
    data, at, held = next(Path(folder).rglob("*.wandb")).read_bytes(), 7, b""
    rows, alerts = [], []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # a block's end too short for a header is padding
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        held = (held if kind in (3, 4) else b"") + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind not in (1, 4):  # the record goes on in the next block
            continue
        record = wandb_internal_pb2.Record()
        record.ParseFromString(held)
        if record.HasField("history"):
            rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
        if record.HasField("alert"):
            alerts.append((record.alert.title, record.alert.level, record.alert.text))
    return rows, alerts


def test_wandb_joins_the_loops_own_rows(offline):
    """Ours stand in the rows that the loop logs, at steps that the loop chooses; none of the loop's points is dropped."""
    run, read = offline
    guard = train(WandB(run), poison=50, each=lambda i: run.log({"own": i}, step=i) if i % 10 == 9 else None)
    rows, alerts = read()
    assert [r["own"] for r in rows if "own" in r] == [9, 19, 29, 39, 49, 59, 69, 79]
    ours = {int(r["lossguard/step"]): r for r in rows if "lossguard/step" in r}
    assert len(ours) >= 6
    for step, row in ours.items():
        np.testing.assert_allclose(float(row["lossguard/grad_norm"]), expected(guard)[step][0], rtol=1e-6)
    assert any("nonfinite" in title and level == "ERROR" and "step 50" in text for title, level, text in alerts)


def test_wandb_rows_of_our_own(offline):
    """commit=True gives a row for each sample; without it, a run that nobody else logs to is told what to say."""
    run, read = offline
    with pytest.warns(RuntimeWarning, match=r"use WandB\(run, commit=True\)"):
        train(WandB(run), steps=10)
    guard = train(WandB(run, commit=True), steps=30)
    rows, _ = read()
    steps = [int(r["lossguard/step"]) for r in rows if "lossguard/step" in r]
    assert steps[-len(guard.history.steps()) + 1 :] == guard.history.steps().tolist()[1:]  # the first joins what was left before


def test_wandb_needs_a_run():
    """Without an active run, or given something else, the error says what to do."""
    pytest.importorskip("wandb")
    with pytest.raises(ValueError, match=r"no Weights & Biases run is active; call wandb.init\(\) first"):
        WandB()
    with pytest.raises(ValueError, match=r"takes the run that wandb.init\(\) returned, got str"):
        WandB("run")


# ---- MLflow


def test_mlflow(tmp_path, monkeypatch):
    """Metrics stand at their steps under one prefix; findings are tags and a text among the artifacts."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    store = f"file:{tmp_path}/store"
    mlflow.set_tracking_uri(store)
    mlflow.set_experiment("lossguard")
    with mlflow.start_run() as run:
        guard = train(MLflow(), poison=50, lag=0)
    client = mlflow.MlflowClient(store)
    data = client.get_run(run.info.run_id).data
    assert 12 <= len(data.metrics) <= 20 and all(name.startswith("lossguard/") for name in data.metrics)
    points = client.get_metric_history(run.info.run_id, "lossguard/grad_norm")
    assert sorted(p.step for p in points) == guard.history.steps().tolist()
    for p in points:
        np.testing.assert_allclose(p.value, expected(guard)[p.step][0], rtol=1e-6)
    (finding,) = guard.findings
    assert data.tags[f"lossguard.{finding.diagnosis}"].startswith(f"halt {finding.diagnosis} at step 50")
    text = Path(client.download_artifacts(run.info.run_id, "lossguard/findings.txt", str(tmp_path))).read_text()
    assert f"lossguard: halt {finding.diagnosis} at step 50" in text
    with pytest.raises(ValueError, match=r"no MLflow run is active; call mlflow.start_run\(\) first"):
        MLflow()
