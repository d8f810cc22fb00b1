"""A guard and a finding in a notebook: small, complete, escaped, readable on a light and on a dark page."""

from __future__ import annotations

import copy
import importlib.util
import math
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from lossguard import Finding, Guard, Severity
from lossguard.notebook import CHIPS, NAMED, SHOWN, of_guard

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("playwright",) if importlib.util.find_spec(name) is None] + ([] if BROWSER else ["chromium"])
SWITCHES = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
EMPTY = {"br", "hr", "img", "input", "meta", "link"}


class Outline(HTMLParser):
    """Which tags there are; fails where one is not closed in turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + " "


def run(poison=(3,), steps=5, model=None):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    guard = Guard(model, optimizer, halt=None)
    for step in range(steps):
        loss = model(torch.randn(8, 4)).square().mean() * (math.nan if step in poison else 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return guard


def test_a_guard_shows_what_it_knows():
    """The table has state, steps, verdict, every finding with its severity and whole text, what is observed and what is not; before, during and after a run."""
    guard = run()
    for state in ("watching", "closed"):
        html = guard._repr_html_()
        outline = Outline(html)
        assert f"{state}, 5 steps" in outline.text and guard.verdict in outline.text and "Sequential" in outline.text
        assert guard.findings
        for finding in guard.findings:
            assert finding.severity.label in outline.text and str(finding) in outline.text
        seen = guard.coverage
        assert all(f"{name} ({count})" in outline.text for name, count in seen.observed.items())
        assert all(f"{what}: {why}" in outline.text for what, why in list(seen.not_observed.items())[:NAMED])
        guard.close()
    fresh = Outline(Guard(nn.Linear(2, 1), torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1))._repr_html_())
    assert "watching, 0 steps" in fresh.text and "none" in fresh.text and "nothing yet" in fresh.text


def test_findings_stay_a_list():
    """guard.findings is a plain list; each of its findings shows itself."""
    guard = run()
    guard.close()
    assert type(guard.findings) is list
    assert str(guard.findings[0]) in Outline(guard.findings[0]._repr_html_()).text


def test_looking_changes_nothing():
    """A run that is shown after every step is bit-identical with one that is not."""
    shown, unseen = copy.deepcopy(nn.Linear(4, 2)), nn.Linear(4, 2)
    unseen.load_state_dict(shown.state_dict())
    results = []
    for model, look in ((shown, True), (unseen, False)):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with Guard(model, optimizer, lag=2) as guard:
            for _ in range(12):
                loss = model(torch.randn(8, 4)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                guard.step(loss)
                if look:
                    guard._repr_html_()
        results.append([p.detach().clone() for p in model.parameters()] + [torch.tensor(guard.history.losses())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_names_are_escaped_and_nothing_is_fetched():
    """Markup in a name is text; there is no script, no link, no address, no style sheet that could reach the page."""
    evil = "<script>alert(1)</script><img src=x onerror=y>&\"'"
    finding = Finding("loss_spike", Severity.WARNING, 12, evil, evil, note=evil)
    html = of_guard(evil, "watching", 1, evil, [finding], {evil: 1}, {evil: evil}) + finding._repr_html_()
    outline = Outline(html)
    assert {tag for tag, _ in outline.tags} <= {"table", "caption", "tbody", "tr", "th", "td", "details", "summary", "pre", "span", "b", "div", "code"}
    assert {name for _, attributes in outline.tags for name in attributes} <= {"style", "scope"}
    assert not re.search(r"https?:|url\(|@import", html)
    assert outline.text.count("alert(1)") >= 6


def test_many_findings_stay_small():
    """A wall of findings and of unseen things is cut to the newest, with the count of the others."""
    many = [Finding("loss_spike", Severity.WARNING, step, "loss", "jump") for step in range(500)]
    html = of_guard("g", "closed", 500, "flat", many, {}, {f"thing {i}": "why" for i in range(300)})
    assert len(html) < 30_000
    assert f"{500 - SHOWN} earlier ones" in html and f"and {300 - NAMED} more" in html and "at step 499" in html and "at step 3," not in html


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("severity", list(Severity))
def test_every_severity_can_be_read(severity):
    """White on the ground of every severity has a contrast of 4.5, and the ground stands out from a white and from a dark page."""
    ground = luminance(CHIPS[severity.label])
    assert 1.05 / (ground + 0.05) >= 4.5
    assert (ground + 0.05) / (luminance("#111111") + 0.05) >= 1.5


@pytest.mark.browser
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
@pytest.mark.parametrize(("ground", "ink"), [("rgb(255, 255, 255)", "rgb(0, 0, 0)"), ("rgb(17, 17, 17)", "rgb(225, 225, 225)")])
def test_in_a_browser_it_takes_the_pages_colours(ground, ink):
    """On a light and on a dark page text has the page's own colour, on a ground through which the page is seen, and fits a narrow cell."""
    from playwright.sync_api import sync_playwright

    guard = run()
    guard.close()
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=SWITCHES.split())
        page = chromium.new_page(viewport={"width": 640, "height": 700})
        body = guard._repr_html_() + guard.findings[0]._repr_html_()
        page.set_content(f'<body style="background:{ground};color:{ink};font-family:sans-serif">{body}</body>')
        page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        inks = page.evaluate("[...document.querySelectorAll('th,td,caption,pre,b,summary')].map((e) => getComputedStyle(e).color)")
        grounds = page.evaluate("[...document.querySelectorAll('table,tr,th,td,div')].map((e) => getComputedStyle(e).backgroundColor)")
        wide = page.evaluate("document.documentElement.scrollWidth")
        chromium.close()
    assert set(inks) == {ink}
    assert set(grounds) == {"rgba(0, 0, 0, 0)"}
    assert wide <= 640
