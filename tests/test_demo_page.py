"""The demo in a real headless Chromium, with models that compile at once."""

import io
import json
import re
import shutil
import time
import zipfile

import numpy as np
import pytest
from conftest import mixing_prior, patch_codec
from PIL import Image

from aps_jax import pretrained
from aps_jax.cli import perceptual
from aps_jax.io import checkpoint
from aps_jax.scores.lpips import PerceptualUnavailable

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def without_lpips():
    raise PerceptualUnavailable("it would compile VGG16")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The demo with toys in place of the embedded models, whose cards stay."""
    pytest.importorskip("gradio", reason="the demo needs Gradio: pip install '.[demo]'")
    from aps_jax.cli.demo.command import launch

    def load(name, **options):
        card = checkpoint.read_card(pretrained.model_folder(name))
        return pretrained.Model(mixing_prior(window=16), patch_codec(stride=4), card)

    patch = pytest.MonkeyPatch()
    patch.setattr(pretrained, "load_pretrained", load)
    patch.setattr(perceptual, "load_lpips", without_lpips)
    folder = tmp_path_factory.mktemp("demo")
    blocks = launch(folder)
    blocks.folder = folder
    yield blocks
    blocks.close(verbose=False)
    patch.undo()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser, server):
    """A visitor of their own, all of whose requests are kept."""
    visitor = browser.new_context(viewport={"width": 1400, "height": 1300}, accept_downloads=True)
    opened = visitor.new_page()
    opened.asked = []
    opened.on("request", lambda request: opened.asked.append(request.url))
    opened.set_default_timeout(90_000)
    opened.goto(server.local_url)
    opened.get_by_role("button", name="Restore", exact=True).wait_for()
    yield opened
    visitor.close()


def picture(tmp_path, name="mine.png", seed=0, size=(80, 72)):
    path = tmp_path / name
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def upload(page, path, tab="restore"):
    page.locator(f"#{tab}-file input[type=file]").set_input_files(str(path))
    page.locator(f"#{tab}-file .file-preview").wait_for()


def set_steps(page, num_steps, num_inner=1):
    page.locator("#restore-more button").first.click()
    page.locator("#steps textarea, #steps input").fill(str(num_steps))
    page.locator("#inner-steps textarea, #inner-steps input").fill(str(num_inner))


def finish(page, tab="restore"):
    page.locator(f"#{tab}-status").get_by_text("done after").wait_for()
    page.locator(f"#{tab}-slider img").first.wait_for()


def downloaded(page, tab="restore"):
    with page.expect_download() as found:
        page.locator(f"#{tab}-download").click()
    archive = zipfile.ZipFile(io.BytesIO(found.value.path().read_bytes()))
    record = json.loads(archive.read("result.json"))
    assert sorted(archive.namelist()) == sorted(record["files"])
    return record


def test_a_visitor_restores_an_own_picture(page, tmp_path):
    upload(page, picture(tmp_path))
    page.locator("#restore-samples input[type=number]").fill("2")
    set_steps(page, 3)
    seen = set()
    page.expose_function("seen", lambda url: seen.add(url))
    page.evaluate(
        "new MutationObserver(() => { const i = document.querySelector('#restore-live img');"
        " if (i) window.seen(i.src) }).observe(document.querySelector('#restore-live'),"
        " {subtree: true, childList: true, attributes: true})"
    )
    page.locator("#restore-go").click()
    page.locator("#restore-status").get_by_text("timestep 3 of 3").wait_for()
    finish(page)
    assert len(seen) >= 2  # The picture changed while it ran.
    assert page.locator("#restore-slider img").count() == 2
    assert page.locator("#restore-gallery img").count() >= 4  # Two samples, mean and spread.
    record = downloaded(page)
    assert record["config"]["num_samples"] == 2 and record["config"]["num_steps"] == 3
    assert record["task"]["name"] == "inpainting_box" and "mine" in record["image"]["path"]
    assert page.locator("#restore-scores").get_by_text("which needs no model").count()
    assert all(url.startswith((page.url, "blob:", "data:")) for url in page.asked), page.asked


def test_what_is_drawn_is_missing(page):
    page.locator("#task input").click()
    page.get_by_role("option").filter(has_text="inpainting mask").click()
    set_steps(page, 2)
    page.locator("#restore-go").click()
    page.get_by_text("nothing is drawn; draw over what is missing").wait_for()
    canvas = page.locator("#restore-editor canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 60, middle[1], steps=6)
    page.mouse.up()
    time.sleep(1)
    page.locator("#restore-go").click()
    finish(page)
    record = downloaded(page)
    assert record["task"]["name"] == "inpainting_mask" and "mask.png" in record["files"]


def test_stop_ends_the_computation(page, server, monkeypatch):
    from aps_jax import restore as host_loop

    steps = []
    advance = host_loop._Loop.advance

    def slowly(loop):
        steps.append(time.monotonic())
        time.sleep(0.4)
        advance(loop)

    monkeypatch.setattr(host_loop._Loop, "advance", slowly)
    set_steps(page, 60)
    page.locator("#restore-go").click()
    page.locator("#restore-status").get_by_text(re.compile(r"timestep \d+ of 60")).wait_for()
    page.locator("#restore-stop").click()
    page.locator("#restore-status").get_by_text("stopped").wait_for()
    deadline = time.monotonic() + 15
    while len(steps) > (before := len(steps)) - 1 and time.monotonic() < deadline:
        time.sleep(1.5)
        if len(steps) == before:
            break
    assert len(steps) == before < 40
    # The next run is not in its way.
    page.locator("#steps textarea, #steps input").fill("2")
    page.locator("#restore-go").click()
    finish(page)


def test_what_is_no_picture_is_refused_in_words(page, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"this is no picture")
    upload(page, bad)
    message = page.get_by_text("bad.png").filter(has_text="image")
    message.first.wait_for()
    page.locator("#restore-go").click()
    page.wait_for_timeout(500)
    assert not page.locator("#restore-slider img").count()
    assert "Traceback" not in page.content()


def test_two_visitors_do_not_mix(page, browser, server, tmp_path):
    other = browser.new_context(accept_downloads=True).new_page()
    other.goto(server.local_url)
    for visitor, seed in ((page, 1), (other, 2)):
        upload(visitor, picture(tmp_path, f"visitor{seed}.png", seed))
        set_steps(visitor, 2)
    page.locator("#restore-go").click()
    other.locator("#restore-go").click()
    records = []
    for visitor in (page, other):
        finish(visitor)
        records.append(downloaded(visitor))
    assert ["visitor1" in records[0]["image"]["path"], "visitor2" in records[1]["image"]["path"]]
    assert records[0]["image"]["sha256"] != records[1]["image"]["sha256"]
    other.context.close()


def test_a_face_is_edited_by_words(page, tmp_path):
    pytest.importorskip("tokenizers")
    page.get_by_role("tab", name="Edit a face").click()
    page.locator("#edit-go").click()
    page.get_by_text("nothing is wished for").wait_for()
    upload(page, picture(tmp_path, "face.png"), "edit")
    page.locator("#edit-words input").fill("smiling")
    page.get_by_role("option", name="smiling", exact=True).click()
    page.locator("#edit-more button").first.click()
    page.locator("#edit-steps textarea, #edit-steps input").fill("2")
    page.locator("#edit-go").click()
    finish(page, "edit")
    record = downloaded(page, "edit")
    assert "smiling" in record["command"]
