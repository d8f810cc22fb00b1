"""The page in a real browser: it draws without a fault, its controls work by mouse and keyboard, it fits a phone."""

from __future__ import annotations

import importlib.util
import math
import shutil

import numpy as np
import pytest
import torch

from lossguard import Guard, report
from lossguard.recovery import Ladder
from lossguard.report.downsample import Grid, envelope
from lossguard.report.reading import Run

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("playwright", "plotly") if importlib.util.find_spec(name) is None] + ([] if BROWSER else ["chromium"])
if not MISSING:
    import playwright.sync_api
pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")]
SWITCHES = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"


def run(folder, *, lr=0.1, poison=None, bias=0.0):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
    torch.nn.init.constant_(model[0].bias, bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with Guard(model, optimizer, record=folder, halt=None) as guard:
        for step in range(90):
            x = torch.randn(32, 8)
            loss = torch.nn.functional.cross_entropy(model(x), x[:, :3].argmax(dim=1)) * (math.nan if step == poison else 1.0)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(loss)


def wide(path):
    """More rows and columns than a screen has pixels for, and single numbers that are not finite among them."""
    grid = Grid(240)
    for step in range(0, 9600, 10):
        values = np.full(900, 1.0 + step / 9600)
        values[[31, 500, 866]] = np.where(step in (3330, 9590), np.nan, values[[31, 500, 866]])
        grid.add(step, values, np.ones(900, dtype=bool))
    names = [f"model.decoder.blocks.{k}.self_attention.output_projection.weight" for k in range(900)]
    curves = {"loss": envelope(np.arange(9600), np.linspace(3.0, 1.0, 9600), 1500)}
    made = Run("wide", steps=9600, state="learning", ended=True, curves=curves, grids={"grad_norm": grid}, rows={"grad_norm": names})
    path.write_text(report.page([made], report._library()), encoding="utf-8")


def point(page, spot, shown):
    """Point there until this shows: a drawing that ends under a pointer at rest tells it nothing. spot: (x, y), or asked anew for each try."""
    for nudge in range(15):
        x, y = (spot() if callable(spot) else spot)[:2]
        page.mouse.move(x - nudge % 2, y)
        try:
            return page.locator(shown).wait_for(timeout=2000)
        except playwright.sync_api.TimeoutError:
            continue
    raise AssertionError(f"{shown} did not show")


def late_cell(page):
    """A spot in a cell of the first row, late in the run: asked anew, since a page that is still being laid out moves it."""
    page.locator("#heat").scroll_into_view_if_needed()
    box = page.locator("#heat .nsewdrag").first.bounding_box()
    return box["x"] + 0.9 * box["width"], box["y"] + 0.1 * box["height"]


def eventful(folder):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Guard(model, optimizer, record=folder, recover=Ladder(every=20)) as guard:
        for step in range(160):
            x = torch.randn(32, 8)
            loss = torch.nn.functional.cross_entropy(model(x), x[:, :3].argmax(dim=1)) * (math.nan if step == 90 else 1.0)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step(loss)
            if step == 50:
                guard.saved("checkpoints/51.pt")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    run(folder / "dead", bias=-20.0)
    run(folder / "nan", poison=60)
    wide(folder / "wide.html")
    eventful(folder / "eventful")
    return {
        "wide": folder / "wide.html",
        "eventful": report.of_folders(folder / "eventful", path=folder / "eventful.html"),
        "dead": report.of_folders(folder / "dead", path=folder / "dead.html"),
        "nan": report.of_folders(folder / "nan", path=folder / "nan.html"),
        "both": report.of_folders(folder / "dead", folder / "nan", folder / "both.html"),
    }


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=SWITCHES.split())
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, pages):
    """Opens a page; at the end no fault was logged and nothing was fetched."""
    contexts, faults = [], []

    def open_page(name, width=1280, height=900, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: faults.append(request.url) if not request.url.startswith(("file:", "data:", "blob:")) else None)
        page.add_init_script(WCAG)
        page.goto(pages[name].as_uri())
        page.wait_for_selector("html[data-drawn=yes]", timeout=60_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def heat(page):
    return page.evaluate(
        "({z: Array.from($('heat').data[0].z[0]), x: $('heat').layout.xaxis.range, y: $('heat').layout.yaxis.range, rows: $('heat').data[0].z.length})"
    )


@pytest.mark.parametrize("name", ["dead", "nan", "both", "eventful"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_draws(visit, name, scheme):
    """Both charts are drawn in light and in dark, with no fault and no request, and the text stands out from its ground."""
    page = visit(name, color_scheme=scheme)
    assert page.locator("#loss .main-svg").count() > 0
    assert page.locator("#heat .main-svg").count() > 0
    assert page.locator(".wait").count() == 0
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    for place in ("h1", ".small", "dt, th", ".lede", ".because", ".when", ".verdict .tone", ".index .badge", ".severity", ".index small", "summary", ".then"):
        assert contrast(page, place) >= 4.5, place
    for place in ("warning", "error", "halt", "info"):  # numbers stand on them in the colour of the ground, as on a mark
        assert page.evaluate("(name) => wcag(token(name), token('surface'))", place) >= 4.5, place


WCAG = """
    window.rgb = (c) => (c[0] === '#' ? [1, 3, 5].map((k) => parseInt(c.slice(k, k + 2), 16)) : c.match(/[\\d.]+/g).map(Number));
    window.linear = (v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
    window.light = (c) => { const [r, g, b] = rgb(c).map(linear); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    window.wcag = (a, b) => { return (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05); };
"""


def contrast(page, place):
    """The contrast ratio of WCAG between an element's text and the first opaque ground behind it; without such an element, all is well."""
    return page.evaluate(
        """(place) => {
        let e = document.querySelector(place);
        if (!e) return 21;
        const ink = getComputedStyle(e).color;
        while (e && (rgb(getComputedStyle(e).backgroundColor)[3] ?? 1) === 0) e = e.parentElement;
        return wcag(ink, getComputedStyle(e).backgroundColor);
    }""",
        place,
    )


@pytest.mark.parametrize("name", ["dead", "both", "eventful"])
@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_needs_no_sideways_scroll(visit, name, width):
    """At the width of a phone nothing reaches beyond the page, opened explanations included, and all is drawn."""
    page = visit(name, width=width, height=844, has_touch=True, is_mobile=True)
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    heights = page.evaluate("[...document.querySelectorAll('button, select, .segments label, .index a, summary')].map((e) => e.getBoundingClientRect().height)")
    assert min(h for h in heights if h) >= 36  # a finger's breadth; WCAG 2.2 asks for 24


def test_the_signal_and_the_scale_are_chosen(visit):
    """The selects and the scale change what is drawn."""
    page = visit("dead")
    assert page.locator("#signal").input_value() == "dead_fraction"
    before = heat(page)
    page.locator("#signal").select_option("grad_norm")
    page.wait_for_function("(n) => $('heat').data[0].z.length !== n", arg=before["rows"])
    assert heat(page)["rows"] == 4
    page.locator("input[value=log]").check()
    page.wait_for_function("$('loss').layout.yaxis.type === 'log'")


def test_everything_is_reached_by_keyboard(visit):
    """Tab reaches every control with a visible focus; arrows, space and return work them."""
    page = visit("dead")
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("(() => { const e = document.activeElement; return e.id || e.dataset.zoom || e.value || e.dataset.mark || e.tagName; })()")
        )
        shown = page.evaluate(
            """(() => { const e = document.activeElement, s = getComputedStyle(e.matches('.segments input') ? e.nextElementSibling : e);
            return e === document.body || s.outlineStyle !== 'none'; })()"""
        )
        assert shown, reached[-1]
    assert {"theme", "left", "in", "out", "right", "all", "signal", "SUMMARY", "1"} <= set(reached)
    page.locator("#theme").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.locator("#theme").get_attribute("aria-pressed") == "true"
    page.locator("input[name=scale]:checked").focus()
    was = page.locator("input[name=scale]:checked").input_value()
    page.keyboard.press("ArrowLeft" if was == "log" else "ArrowRight")
    assert page.locator("input[name=scale]:checked").input_value() != was
    page.locator("[data-zoom=in]").focus()
    page.keyboard.press("Space")
    page.wait_for_function("$('heat').layout.xaxis.range[0] > 10")
    assert page.evaluate("$('loss').layout.xaxis.range") == heat(page)["x"]
    page.locator("[data-zoom=all]").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("$('heat').layout.xaxis.range[0] < 0")


def test_a_mark_leads_to_its_story_and_the_story_to_the_heat_map(visit):
    """A click on a finding's mark goes to its story; the story's button shows the layer and the steps of the finding."""
    page = visit("dead")
    page.evaluate("document.documentElement.style.scrollBehavior = 'auto'")
    spot = page.evaluate("""(() => { const l = $('loss')._fullLayout, m = placedMarks()[0], r = $('loss').getBoundingClientRect();
        return [r.x + l._size.l + l.xaxis.d2p(m.step), r.y + l._size.t + l.yaxis2.d2p(m.y), m.id]; })()""")
    point(page, spot, "#loss .hoverlayer .hovertext")
    assert "click for its story" in page.locator("#loss .hoverlayer").text_content()
    page.mouse.click(spot[0], spot[1])
    page.wait_for_function("(id) => document.activeElement.id === 'f' + id", arg=spot[2])
    page.locator("#signal").select_option("weight_norm")
    page.locator(f"[data-mark='{spot[2]}']").click()
    page.wait_for_function("$('signal').value !== 'weight_norm'")
    assert page.evaluate("document.activeElement.id") == "signal"


def test_not_a_number_is_told_by_a_colour_of_its_own(visit):
    """Cells that are not finite have the last colour of the scale, which no number has; the legend and the pointer name them."""
    page = visit("nan")
    page.locator("#signal").select_option("grad_norm")
    page.wait_for_function("gridOf().signal === 'grad_norm'")
    cells = page.evaluate(
        "({z: Array.from($('heat').data[0].z[0]), top: $('heat').data[0].zmax, scale: $('heat').data[0].colorscale.at(-1)[1], lost: token('lost')})"
    )
    assert cells["scale"] == cells["lost"]
    assert [z == cells["top"] for z in cells["z"]] == [
        bool(f) for f in page.evaluate("numbersOf(gridOf()).then((n) => Array.from(n.flags.slice(0, gridOf().first.length)))")
    ]
    assert any(z == cells["top"] for z in cells["z"])
    for signal in page.evaluate("data.runs[0].grids.map((g) => g.signal)"):  # however far a finite number is beyond the scale
        page.locator("#signal").select_option(signal)
        page.wait_for_function("(s) => gridOf().signal === s", arg=signal)
        page.evaluate("drawing")
        highest, border = page.evaluate(
            """(async () => { const d = $('heat').data[0], n = await numbersOf(gridOf()), C = gridOf().first.length;
            const finite = d.z.flatMap((row, r) => Array.from(row).filter((v, c) => !Number.isNaN(v) && !n.flags[r * C + c]));
            const share = finite.map((v) => (v - d.zmin) / (d.zmax - d.zmin));
            return [Math.max(...share), d.colorscale.find((s) => s[1] === token('lost'))[0]]; })()"""
        )
        assert highest < border - 0.01, signal
    page.locator("#signal").select_option("grad_norm")
    page.wait_for_function("gridOf().signal === 'grad_norm'")
    page.evaluate("drawing")
    page.evaluate("document.documentElement.style.scrollBehavior = 'auto'")  # a smooth scroll would still be under way
    point(page, lambda: late_cell(page), "#tip:not([hidden])")
    assert "NaN" in page.locator("#tip").inner_text()
    assert "Not finite in 4 rows, first in 0.weight, step 60." in page.locator("#heat-note").inner_text()


def test_a_scroll_hides_the_words_of_a_cell_and_the_next_movement_within_it_shows_them_again(visit):
    page = visit("nan")
    page.evaluate("document.documentElement.style.scrollBehavior = 'auto'")
    point(page, lambda: late_cell(page), "#tip:not([hidden])")
    words = page.locator("#tip").inner_text()
    for _ in range(3):
        page.evaluate("window.dispatchEvent(new Event('scroll'))")
        page.locator("#tip").wait_for(state="hidden")
        point(page, lambda: late_cell(page), "#tip:not([hidden])")
        assert page.locator("#tip").inner_text() == words


def test_dragging_zooms_both_charts(visit):
    """A box drawn over the heat map zooms both charts to its steps; a double click shows all again."""
    page = visit("dead")
    page.locator("#signal").select_option("grad_norm")
    page.wait_for_function("$('heat').data[0].z.length === 4")
    page.locator("#heat").scroll_into_view_if_needed()
    box = page.locator("#heat .nsewdrag").first.bounding_box()
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 4)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.6 * box["height"], steps=4)
    page.mouse.up()
    page.wait_for_function("$('loss').layout.xaxis.range[0] > 15 && $('loss').layout.xaxis.range[1] < 60")
    page.mouse.dblclick(box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"])
    page.wait_for_function("$('loss').layout.xaxis.range[0] < 0 && $('heat').layout.yaxis.range[0] === 3.5")


def test_two_runs_can_be_chosen_between(visit):
    """On a page of two runs both losses are drawn, and the heat map shows the run that is chosen."""
    page = visit("both")
    assert page.locator("#run").is_visible()
    assert "A dead" in page.locator("#loss-key").inner_text()
    assert "B nan" in page.locator("#loss-key").inner_text()
    page.locator("#run").select_option("1")
    page.locator("#signal").select_option("grad_norm")
    page.wait_for_function("view.run === 1 && gridOf().flagged")


def test_on_paper_it_fits(visit):
    """Printed, the page is light, its charts fit the paper, and the screen's state comes back."""
    page = visit("dead", color_scheme="dark")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    assert page.evaluate("[$('loss'), $('heat')].map((c) => c.querySelector('.main-svg').getBoundingClientRect().width)") == [660, 660]
    page.emulate_media(media="screen")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.evaluate("drawing")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.evaluate("$('heat').querySelector('.main-svg').getBoundingClientRect().width") > 700


def test_without_script_the_words_are_there(browser, pages):
    """Verdict, findings and coverage are read where scripts do not run."""
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["dead"].as_uri())
    assert page.locator("h1").is_visible()
    assert "dead_relu" in page.locator("#findings").inner_text()
    assert page.locator("text=The chart needs JavaScript").first.is_visible()
    context.close()


@pytest.mark.parametrize("width", [390, 1280])
def test_what_is_not_finite_is_never_too_small_to_be_drawn(visit, width):
    """However many rows and columns there are, each line and column drawn is at least a pixel wide, and one with a NaN in it has the colour of NaN."""
    page = visit("wide", width=width)
    lines = page.evaluate(
        """(() => { const d = $('heat').data[0], l = $('heat')._fullLayout, z = d.z.map((row) => Array.from(row));
        const widths = (at, axis) => at.slice(1).map((v, k) => Math.abs(axis.d2p(v) - axis.d2p(at[k])));
        const sick = z.map((row, r) => [r, row.map((v, c) => (v === d.zmax ? c : -1)).filter((c) => c >= 0)]).filter(([, cs]) => cs.length);
        return { sick: sick.map(([r, cs]) => [d.y[r], d.y[r + 1], cs.map((c) => [d.x[c], d.x[c + 1]])]),
            least: Math.min(...widths(d.x, l.xaxis), ...widths(d.y, l.yaxis)) }; })()"""
    )
    assert lines["least"] >= 0.99
    assert [any(a < row < b for a, b, _ in lines["sick"]) for row in (31, 500, 866)] == [True] * 3
    assert len(lines["sick"]) == 3
    assert all([any(a < step < b for a, b in columns) for step in (3330, 9590)] == [True, True] for _, _, columns in lines["sick"])
    assert page.evaluate("$('heat').layout.shapes.length") == 3
    names = page.evaluate("shortNames(gridOf())")
    assert len(set(names)) == 900
    assert "model.decoder.blocks" in page.locator("#heat-note").inner_text()


def test_the_heat_map_is_read_by_keyboard(visit):
    """Arrow keys go from cell to cell and tell each; plus zooms around it, 0 shows all, escape and leaving hide it."""
    page = visit("nan")
    page.locator("#signal").select_option("grad_norm")
    page.wait_for_function("gridOf().signal === 'grad_norm'")
    page.evaluate("drawing")
    page.locator("#heat").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("$('heat-say').textContent.startsWith('0.weight') && $('heat-say').textContent.endsWith('step 0')")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("$('heat-say').textContent.startsWith('0.bias') && $('heat-say').textContent.endsWith('step 1')")
    assert page.locator("#tip").is_visible()
    cell, chart = page.locator("#cursor").bounding_box(), page.locator("#heat").bounding_box()
    assert chart["x"] < cell["x"] < chart["x"] + chart["width"]
    for _ in range(200):  # to the last column, and no farther
        page.keyboard.press("ArrowRight")
    page.wait_for_function("$('heat-say').textContent.includes('NaN')")
    page.keyboard.press("+")
    page.wait_for_function("$('heat').layout.xaxis.range[0] > 30")
    page.keyboard.press("0")
    page.wait_for_function("$('heat').layout.xaxis.range[0] < 0")
    page.keyboard.press("Escape")
    assert page.locator("#cursor").is_hidden()
    assert page.locator("#tip").is_hidden()


def test_the_heat_map_has_a_table(visit):
    """Opened, the table has a line for every row with its extremes, and says from which step on it is not finite; it follows the signal."""
    page = visit("nan")
    page.locator("#signal").select_option("grad_norm")
    page.wait_for_function("gridOf().signal === 'grad_norm'")
    page.locator("#heat-table summary").press("Enter")
    page.wait_for_selector("#heat-table td")
    assert page.locator("#heat-table tbody tr").count() == 4
    assert page.locator("#heat-table tbody tr").first.inner_text().split("\t")[0] == "0.weight"
    assert "from step 60 on" in page.locator("#heat-table").inner_text()
    page.locator("#signal").select_option("activation_rms")
    page.wait_for_function("document.querySelector('#heat-table tbody th').textContent.includes('Linear')")
    assert page.locator("#heat").get_attribute("aria-label").startswith("Activation RMS: 3 rows")
    assert "not finite" in page.locator("#loss").get_attribute("aria-label")


def test_cures_and_checkpoints_stand_on_the_curve(visit):
    """What was done to the run has its marks at the foot of the curve, a key, and leads to the list of events."""
    page = visit("eventful")
    texts = page.evaluate("$('loss').data.find((t) => t.name === 'events').hovertext")
    assert any("rolled back" in text for text in texts)
    assert any("checkpoints/51.pt" in text for text in texts)
    assert "rolled back" in page.locator("#loss-key").inner_text()
    spot = page.evaluate("""(() => { const l = $('loss')._fullLayout, t = $('loss').data.find((t) => t.name === 'events');
        const r = $('loss').getBoundingClientRect();
        return [r.x + l._size.l + l.xaxis.d2p(t.x[0]), r.y + l._size.t + l.yaxis2.d2p(t.y[0])]; })()""")
    page.evaluate("document.documentElement.style.scrollBehavior = 'auto'")
    point(page, spot, "#loss .hoverlayer .hovertext")
    page.mouse.click(*spot)
    page.wait_for_function("$('done-title').getBoundingClientRect().top < innerHeight")
    assert page.locator(".events .event-rollback").is_visible()
