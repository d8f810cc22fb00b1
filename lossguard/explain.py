"""What a diagnosis means: made from the classes that find it, so that it can never lag behind the code. Text flows out.

A page is built from a class's docstring (its first sentence, the law, and the sections Why, Do, False alarm), from the
comments of its fields, which are its limits, and from the registry of signals, which says what is measured.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import textwrap
from collections.abc import Mapping
from typing import Any

from lossguard.device.signals import SIGNALS
from lossguard.findings import DIAGNOSES, check_names
from lossguard.preflight import CHECKS
from lossguard.rules import RULES

CHECKED = "by lossguard.preflight, on a copy of the model or on weights that are put back, before the first step"
SOURCES = (
    "Where limits come from: `survey` is docs/survey.md in the repository, healthy and faulty runs that were measured before the rules were written; "
    "`our own choice` was made with the project's gallery of runs in view."
)
SECTIONS = ("Why", "Do", "False alarm")
# What rules read beside the registered signals.
DERIVED = {
    "loss": "the training loss, at every step", "validation": "validation losses and accuracies, once an evaluation",
    "activation_rms": "root mean square of a module's output", "input_rms": "root mean square of an input tensor",
    "dead_fraction": "share of units that are silent for a whole window of batches", "clip_coefficient": "clip value over gradient norm, at most 1",
    "consecutive_skips": "updates left out in a row by the guard's gate", "total_skips": "all updates left out by the guard's gate",
    "confident_wrong": "share of rows with p > 0.99 for another class than the label",
    "sample_variance": "variance over the samples of a batch over the mean square of a module's output",
    "activation_reach": "largest magnitude of a float16 output over 65504", "gradient_reach": "largest magnitude of a float16 gradient over 65504",
    "frozen_update": "largest change of a sample of parameters that do not require a gradient", "weight_range": "largest less smallest weight of a tensor",
    "attention_logit": "largest logit of sampled queries and keys of an attention",
    "weight_print": "projection of a weight tensor on fixed random signs, compared over ranks",
    "attention_head": "which head of an attention has the largest logit",
    "net_update": "L2 norm of the weights at the iteration's end less those before the update", "void_update": "change of weights by a step without gradients",
    "outside_update": "change of parameters that no optimizer holds",
    "squashed": "the activation that feeds a loss on logits, read from the loss's graph",
    "axis": "the dimension that the softmax before a loss runs over, read from the same", "paired": "outputs that a loss broadcasts, read from the same",
    "label_nll": "mean negative log-likelihood of the labels", "update_ratio": "update norm over weight norm",
}  # fmt: skip


def registries() -> list[Mapping[str, Any]]:
    """Every registry of classes that find diagnoses: the rules, and the checks before the first step."""
    return [RULES, CHECKS]


def finders(name: str) -> list[type]:
    """The classes that find a diagnosis."""
    found = [registry[name] for registry in registries() if name in registry]
    return [entry if inspect.isclass(entry) else type(entry) for entry in found]


def families() -> dict[str, list[str]]:
    """Diagnoses by what they look at: the first sentence of the module that finds them -> names, in order of definition."""
    grouped: dict[str, list[str]] = {}
    for name in DIAGNOSES:
        classes = finders(name)
        grouped.setdefault(_family(classes[0]) if classes else "Other", []).append(name)
    return grouped


def listing() -> str:
    """All diagnoses with their severities, one line each, by family."""
    width = max(map(len, DIAGNOSES))
    parts = []
    for family, names in families().items():
        rows = [f"  {name:<{width}}  {DIAGNOSES[name][0].label:<8} {DIAGNOSES[name][1]}" for name in names]
        parts.append("\n".join([family, *rows]))
    return "\n\n".join(parts)


def page(name: str) -> str:
    """The page of one diagnosis; ``ValueError`` with a suggestion for an unknown one.

    >>> print(page("constant_loss").splitlines()[0])
    constant_loss (warning): the loss does not change from batch to batch
    """
    check_names({name}, "explain")
    severity, summary = DIAGNOSES[name]
    parts = [f"{name} ({severity.label}): {summary}"]
    for title, paragraphs in chapters(name):
        parts.append("\n".join([title, *(f"  {line}" for line in paragraphs)]))
    return "\n\n".join([*parts, SOURCES]).replace("``", "")


def chapters(name: str) -> list[tuple[str, list[str]]]:
    """The parts of a page: (title, lines)."""
    found: list[tuple[str, list[str]]] = []
    classes = finders(name)
    for cls in classes:
        before = " (before the first step)" if len(classes) > 1 and cls is not classes[0] else ""
        text = sections(cls)
        found.append((f"What it means{before}", [text[""], *([text["Law"]] if text["Law"] else [])]))
        how = [f"{signal}: {meaning}" for signal, meaning in measured(cls).items()] if cls is RULES.get(name) else [CHECKED]
        found.append((f"How it is measured{before}", how))
        found.append((f"Limits{before}", [f"{field} = {_value(value)}" + (f"    {why}" if why else "") for field, value, why in fields(cls)]))
        titles = {"Why": "Why it happens", "Do": "What to do", "False alarm": "When it is a false alarm"}
        found += [(f"{title}{before}", [text[key]]) for key, title in titles.items() if text[key]]
    tune = [f"{call}(..., mute={{{name!r}}})" for call, registry in (("Guard", RULES), ("preflight", CHECKS)) if name in registry]
    for cls in classes[:1]:
        first = next((f for f, value, _ in fields(cls) if isinstance(value, float)), None)
        call = "Guard(..., rules=" if cls is RULES.get(name) else "preflight(..., checks="
        tune += [f"{call}[{cls.__name__}({first}=...)])"] if first else []
        tune += [f"from {cls.__module__} import {cls.__name__}"]
    return [*((title, lines) for title, lines in found if lines), ("Silence or tune", tune)]


def sections(cls: type) -> dict[str, str]:
    """A docstring in its parts: ``""`` the first sentence, ``Law`` the prose after it, and the SECTIONS; each on one line, empty if absent."""
    found: dict[str, list[str]] = {"": [], "Law": [], **{name: [] for name in SECTIONS}}
    at = ""
    for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
        head, colon, rest = line.partition(":")
        if colon and head in SECTIONS:
            at, line = head, rest
        elif at == "" and not line.strip():
            at = "Law"
        found[at].append(line.strip())
    text = {name: " ".join(part for part in lines if part) for name, lines in found.items()}
    return {**text, "Law": text["Law"].removeprefix("Law: ")}


def measured(cls: type) -> dict[str, str]:
    """What a class reads: signal -> its unit or meaning."""
    names: tuple[str, ...] = getattr(cls, "reads", ())
    return {name: SIGNALS[name].unit if name in SIGNALS else DERIVED.get(name, "") for name in names}


def fields(cls: type) -> list[tuple[str, object, str]]:
    """The thresholds of a rule: (name, default, the comment that gives unit and source)."""
    if not dataclasses.is_dataclass(cls):
        return []
    source = textwrap.dedent(inspect.getsource(cls))
    found = []
    for field in dataclasses.fields(cls):
        match = re.search(rf"^    {field.name}:[^\n#]*?(?:#\s*(.*))?$", source, re.MULTILINE)
        found.append((field.name, field.default, (match.group(1) or "").strip() if match else ""))
    return found


def markdown() -> str:
    """All pages as one Markdown document, by family."""
    lines = ["# Diagnoses", "", "Written by `python -m lossguard explain --markdown`; change the docstrings and not this file.", "",
             "Where limits come from: `survey` is [survey.md](survey.md), healthy and faulty runs that were measured before the rules were written; "
             "`our own choice` was made with the project's gallery of runs in view.", ""]  # fmt: skip
    for family, names in families().items():
        links = [f"| [`{name}`](#{name}) | {DIAGNOSES[name][0].label} | {DIAGNOSES[name][1]} |" for name in names]
        lines += [f"**{family}**", "", "| diagnosis | severity | meaning |", "|---|---|---|", *links, ""]
    for names in families().values():
        for name in names:
            lines += [f"## {name}", "", f"*{DIAGNOSES[name][0].label}*: {DIAGNOSES[name][1]}.", ""]
            for title, text in chapters(name):
                lines += _markdown(title, text)
    return "\n".join(lines).rstrip() + "\n"


def _markdown(title: str, text: list[str]) -> list[str]:
    if title.startswith("Limits"):
        rows = [line.partition("    ") for line in text]
        return [
            f"**{title}**",
            "",
            "| limit | unit and source |",
            "|---|---|",
            *(f"| `{limit}` | {why.replace('|', chr(92) + '|')} |" for limit, _, why in rows),
            "",
        ]
    if title.startswith("Silence"):
        return [f"**{title}**", "", "```python", *reversed(text), "```", ""]
    if title.startswith("How it is measured"):
        return [f"**{title}**", "", *(f"- {line}" for line in text), ""]
    return [f"**{title}**", "", *(part for line in text for part in (textwrap.fill(line, 120, break_on_hyphens=False), ""))]


@functools.cache
def _family(cls: type) -> str:
    """The first sentence of the module's docstring, without what flows in and out."""
    module = inspect.getmodule(cls)
    return re.split(r"[.:]\s", (module.__doc__ or "Other").strip() + " ")[0].replace("\n", " ") if module else "Other"


def _value(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def wrapped(text: str, width: int = 100) -> str:
    """Long lines folded for a terminal, indentation kept."""
    lines: list[str] = []
    for line in text.splitlines():
        indent = re.match(r"\s*", line)
        lead = indent.group(0) if indent else ""
        hang = "    " if " = " in line[:40] and lead else ""
        lines += textwrap.wrap(line, width, subsequent_indent=lead + hang) or [""]
    return "\n".join(lines)
