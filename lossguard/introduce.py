"""Tells the history who is who: parameters, module calls, softmaxes, the loss's family. Device facts in, host facts out."""

from __future__ import annotations

import math

from torch import Tensor, nn

from lossguard.device.recorder import Recorder
from lossguard.host.history import History, Param


class Introduction:
    """Keeps a history's names up to date with a recorder. declared: the user named the loss's family."""

    def __init__(self, history: History, recorder: Recorder, *, declared: bool) -> None:
        self._history, self._recorder, self._declared = history, recorder, declared
        self._named: tuple[object, object] = (None, None)  # the roster and the graph whose facts the history has

    def update(self) -> None:
        """Pass on what is known by now."""
        history, recorder = self._history, self._recorder
        if recorder.roster is not self._named[0] or recorder.passes.graph is not self._named[1]:
            self._named = recorder.roster, recorder.passes.graph
            self._name_parameters()
        history.name_units([(s.name, s.kind, s.width) for s in recorder.passes.forward.sites])
        history.heads = list(recorder.passes.heads)
        history.notes["replicated"] = recorder.replicated

    def ensure(self) -> None:
        """Make sites known before the first sampled step, as for a state that is saved or loaded then."""
        if not self._recorder.banks:
            self._recorder.build()
            self.update()

    def _name_parameters(self) -> None:
        history, roster, graph = self._history, self._recorder.roster, self._recorder.passes.graph
        cancelled = graph.cancelled if graph else set()
        history.params = [
            Param(t.name, _numel(t.tensor), t.kind, t.optimizer, str(t.tensor.dtype).removeprefix("torch."), id(t.tensor) in cancelled, t.module)
            for t in roster.trained
        ]
        if roster.missing and history.notes.get("missing_from_optimizer") == ():
            history.notes["missing_since"] = history.step  # they were thawed, or new, or taken out of their groups
        history.notes.update(missing_from_optimizer=tuple(roster.missing), foreign_in_optimizer=roster.foreign, trainable=len(roster.trained))
        history.notes.update(loss_is_nonnegative=self._declared or bool(graph and graph.sign > 0), loss_is_safe=bool(graph and graph.safe))
        history.notes.update(loss_is_negated=bool(graph and graph.sign < 0))
        history.notes.update(loss_is_summed=bool(graph and graph.summed), loss_is_mean=bool(graph and graph.averaged))
        history.notes.update(softmax_is_masked=bool(graph and graph.masked))
        history.notes.update(linear_chain=graph.linear_chain if graph else ("", ""), head=str(graph.head or "") if graph else "")
        history.notes.update(unregistered=tuple(name for name, i in roster.unregistered.items() if graph and i in graph.leaves))
        dropouts = [m.p for m in self._recorder.model.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.training]
        history.notes.update(largest_dropout=max(dropouts, default=0.0))
        norms = [m for m in self._recorder.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training and m.track_running_stats]
        history.notes.update(least_norm_momentum=min((float(m.momentum) for m in norms if m.momentum is not None), default=None))
        frozen = [not p.requires_grad for p in self._recorder.model.parameters()]
        history.notes.update(frozen_share=sum(frozen) / max(1, len(frozen)))
        own = {id(p) for p in self._recorder.model.parameters()}
        history.notes.update(loss_of_others=bool(graph and not own.issuperset(graph.leaves) and own & graph.leaves))
        if graph and not self._declared and graph.loss_family != "unknown":
            history.loss_family = graph.loss_family


def _numel(tensor: Tensor) -> int:
    return 0 if nn.parameter.is_lazy(tensor) else math.prod(tensor.shape)
