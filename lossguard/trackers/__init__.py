"""Trackers for hand-written loops: where a run's scalars and findings go besides the log. Host values that have arrived flow in.

``Guard(model, optimizer, trackers=[TensorBoard("runs/7"), CSV("run.csv")])``. A tracker is any object with ``scalars(step,
numbers)``, and ``finding(finding)`` and ``close()`` if it likes; a plain callable gets ``(step, numbers)``. At most 20 numbers
come for each sampled step, under readable names; NaN and infinity come as they are. Each tracker imports its package only
when it is made. ``Heartbeat(every=100)`` writes one readable line now and then. On a cluster give trackers on one rank. Under
Lightning and Hugging Face the Trainer's own loggers are used.
"""

from lossguard.trackers.csvfile import CSV
from lossguard.trackers.feed import Feed, Tracker
from lossguard.trackers.heartbeat import Heartbeat
from lossguard.trackers.mlflow import MLflow
from lossguard.trackers.tensorboard import TensorBoard
from lossguard.trackers.wandb import WandB

__all__ = ["CSV", "Feed", "Heartbeat", "MLflow", "TensorBoard", "Tracker", "WandB"]
