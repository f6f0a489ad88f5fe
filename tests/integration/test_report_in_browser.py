"""The report in a real browser: nothing fails to load, nothing sticks out of a phone, both colour schemes are legible.

Needs Chromium or Chrome on the PATH; skipped without one.
"""

import os
import shutil

import pyro
import pyro.distributions as dist
import pytest
import torch

import bnn
from bnn.kernels import MCMC, SGHMC
from support.runs import classification_run, regression_run

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ARGUMENTS = ["--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
LEAST_CONTRAST = 4.5  # of text: WCAG 2.1, level AA


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser on the PATH: none of {', '.join(NAMES)}")
    as_root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS + as_root)
        yield browser
        browser.close()


def sampled():
    """A run of SGHMC with all that it measures, over a model with a long name."""

    def model(x, y):
        w = pyro.sample("a_weight_with_quite_a_long_name", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    mcmc = MCMC(SGHMC(model, step_size=0.05, friction=2.0, compile="fx"), 60, 20, num_chains=4, disable_progbar=True)
    mcmc.run(torch.randn(30, 3), torch.randn(30))
    return bnn.to_arviz(mcmc, posterior_predictive=True)


def bad():
    return regression_run(shift=0.3, kinetic=1.5, slow=0.9, attrs={"kernel": "SGLD", "caveat": "x" * 200})


def of_a_guide():
    return regression_run(attrs={"guide": "AutoNormal", "kernel": None}, drop=("sample_stats",), chains=1)


@pytest.fixture(scope="module", params=[sampled, classification_run, bad, of_a_guide], ids=lambda make: make.__name__)
def page_file(request, tmp_path_factory):
    torch.set_num_threads(1)
    return bnn.report(request.param(), tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture
def opened(browser, page_file):
    """Opens the page; fails if anything was written to the console or asked from elsewhere."""
    said, asked, contexts = [], [], []

    def open_page(width, scheme):
        context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(page_file.as_uri(), wait_until="load")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not said
    assert {url for url in asked if not url.startswith("data:")} == {page_file.as_uri()}


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_nothing_sticks_out(opened, width):
    page = opened(width, "light")
    assert page.evaluate("document.documentElement.scrollWidth") <= page.evaluate("innerWidth")
    # Tables that are wider scroll by themselves; nothing else reaches over the edge.
    wide = page.evaluate(
        """[...document.querySelectorAll("main *")].filter(e => !e.closest(".scroll table, svg") &&
        e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert wide == []


def test_every_picture_is_there(opened):
    page = opened(390, "light")
    sizes = page.evaluate(
        """[...document.querySelectorAll("figure svg")].map(s => {
        const r = s.getBoundingClientRect(); return [r.width, r.height, s.querySelectorAll("path, use").length]})"""
    )
    assert len(sizes) == page.evaluate("document.querySelectorAll('figure').length") >= 4
    assert all(width > 250 and height > 100 and parts > 5 for width, height, parts in sizes)
    images = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 0)")
    assert all(images)
    texts = page.evaluate(
        "[...document.querySelectorAll('figure svg text')].map(t => t.getBoundingClientRect().height)"
    )
    assert min(texts) >= 9  # pixels, on a phone


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(opened, scheme):
    """All text, and the lines and marks of the plots, stand out from the ground."""
    page = opened(1280, scheme)
    ground = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (ground > 0.8) == (scheme == "light")
    colours = page.evaluate(
        """[...new Set([...document.querySelectorAll("main *")].filter(e => !e.closest("svg") && e.innerText)
        .map(e => getComputedStyle(e).color))]"""
    )
    colours += page.evaluate(
        "[...new Set([...document.querySelectorAll('svg text')].map(e => getComputedStyle(e).fill))]"
    )
    assert len(colours) >= 3
    assert min(contrast(luminance(colour), ground) for colour in colours) >= LEAST_CONTRAST
    strokes = page.evaluate(
        """[...new Set([...document.querySelectorAll("svg path")].map(e => getComputedStyle(e).stroke))]"""
    )
    drawn = [contrast(luminance(colour), ground) for colour in strokes if colour.startswith("rgb(")]
    assert drawn and min(drawn) >= 2.0


def test_it_prints(opened):
    page = opened(1280, "dark")
    document = page.pdf(format="A4")
    assert document.startswith(b"%PDF") and document.count(b"/Type /Page\n") + document.count(b"/Type /Page ") >= 1
    page.emulate_media(media="print")
    assert luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) == 1.0


def luminance(colour):
    """Relative luminance of a CSS colour, by WCAG."""
    numbers = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in numbers]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first, second):
    """Contrast ratio, by WCAG."""
    light, dark = max(first, second), min(first, second)
    return (light + 0.05) / (dark + 0.05)
