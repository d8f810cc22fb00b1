"""TensorBoard: scalars under one prefix, findings as text. Host numbers flow in; event files flow out. Needs ``pip install tensorboard``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lossguard.findings import Finding


class TensorBoard:
    """writer: the loop's own ``torch.utils.tensorboard.SummaryWriter``, which stays open, or a folder for one of our own.
    layers: every parameter's and module's series besides the at most 20 scalars. prefix: of all names.
    """

    def __init__(self, writer: Any, *, layers: bool = False, prefix: str = "lossguard") -> None:
        self.layers, self.prefix = layers, prefix
        self._own = isinstance(writer, (str, Path))
        if self._own:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError("lossguard.trackers.TensorBoard(folder) needs tensorboard; pip install tensorboard") from error
            writer = SummaryWriter(str(writer))
        if not hasattr(writer, "add_scalar") or not hasattr(writer, "add_text"):
            raise ValueError(f"TensorBoard() takes a SummaryWriter or a folder, got {type(writer).__name__}")
        self._writer = writer

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """One point of each curve."""
        for name, value in numbers.items():
            self._writer.add_scalar(f"{self.prefix}/{name}", value, step)

    def finding(self, finding: Finding) -> None:
        """The finding as people read it, in TensorBoard's text tab, at its step."""
        text = "\n".join("    " + line for line in str(finding).splitlines())  # indented: TensorBoard reads Markdown
        self._writer.add_text(f"{self.prefix}/{finding.diagnosis}", text, finding.step)
        self._writer.flush()

    def close(self) -> None:
        """What is written gets to disk; a writer of our own is closed."""
        if self._own:
            self._writer.close()
        else:
            self._writer.flush()
