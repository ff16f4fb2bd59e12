"""What both tabs are made of: the picture to draw on, the buttons, and where a run is shown."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from aps_jax import pretrained
from aps_jax.animation import draw_tokens
from aps_jax.cli.demo import page, pictures
from aps_jax.cli.demo.runs import Failed, moments
from aps_jax.cli.errors import trouble_of
from aps_jax.io.checkpoint import read_card

#: Side of pictures at first, and what a visitor may ask for at once.
SIZE, MOST_SAMPLES = 64, 8


@contextlib.contextmanager
def said() -> Iterator[None]:
    """Expected failures as a message on the page, in the words of the command line."""
    try:
        yield
    except Failed as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from None
    except Exception as error:
        trouble = trouble_of(error)
        if trouble is None:
            raise
        raise gr.Error(trouble, duration=None, print_exception=False) from None


@dataclasses.dataclass(frozen=True)
class View:
    """Where a run is shown, in the order of `parts`."""

    status: gr.HTML
    live: gr.Image
    slider: gr.ImageSlider
    gallery: gr.Gallery
    scores: gr.Markdown
    download: gr.DownloadButton
    last: gr.State

    @property
    def parts(self) -> list[Any]:
        """The components, as outputs of an event."""
        return [getattr(self, field.name) for field in dataclasses.fields(self)]


def make_view(name: str, labels: str) -> View:
    """Makes the right half of a tab; `labels` says what its slider compares."""
    return View(
        status=gr.HTML(elem_id=f"{name}-status"),
        live=gr.Image(
            label="This timestep", interactive=False, format="png", elem_id=f"{name}-live",
            buttons=[],
        ),
        slider=gr.ImageSlider(
            label=labels, interactive=False, format="png", elem_id=f"{name}-slider", visible=False,
        ),
        gallery=gr.Gallery(
            label="Samples", columns=4, format="png", elem_id=f"{name}-gallery", visible=False,
            interactive=False,
        ),
        scores=gr.Markdown(elem_id=f"{name}-scores"),
        download=gr.DownloadButton(
            "Download everything, with its result.json", elem_id=f"{name}-download", visible=False,
        ),
        last=gr.State(None, time_to_live=3600, delete_callback=forget),
    )  # fmt: skip


def forget(folder: Path | None) -> None:
    """Deletes what an earlier run left, if there was one."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def show(
    view: View,
    command: Callable[[], int],
    place: Path,
    name: str,
    before: np.ndarray,
    overlay: Callable[[np.ndarray, Any], np.ndarray],
) -> Generator[dict[Any, Any], None, None]:
    """Runs a command into `place`/out and shows it, timestep by timestep, then its results."""
    losses: list[float] = []
    begun = {
        view.slider: gr.ImageSlider(visible=False), view.gallery: gr.Gallery(visible=False),
        view.download: gr.DownloadButton(visible=False), view.scores: "", view.last: place,
        view.live: gr.Image(before, visible=True),
    }  # fmt: skip
    yield begun
    with contextlib.closing(moments(command)) as news:
        for moment in news:
            report = moment.report
            shown: dict[Any, Any] = {}
            if moment.is_new and report is not None and report.num_done:
                losses.append(report.loss)
                if report.trace is not None:
                    tokens = np.asarray(report.trace.tokens)[0]
                    shown[view.live] = overlay(np.asarray(report.trace.images)[0], tokens)
            yield {view.status: page.status(moment, losses), **shown}
    yield _results(view, place, name, before)


def _results(view: View, place: Path, name: str, before: np.ndarray) -> dict[Any, Any]:
    out = place / "out"
    record = pictures.record(out)
    after = pictures.read(out / f"{name}.png")
    extra = [(path, path.stem.replace("_", " ")) for path in sorted(out.glob("samples/*.png"))]
    for file, label in (("mean.png", "mean"), ("std.png", "spread (white: most)")):
        if (out / file).is_file():
            extra.append((out / file, label))
    shown = [(pictures.read(path), label) for path, label in extra]
    return {
        view.status: page.finished(record),
        view.live: gr.Image(after, visible=False),
        view.slider: gr.ImageSlider((fitted(before, after), after), visible=True),
        view.gallery: gr.Gallery(shown, visible=bool(shown)),
        view.scores: page.table(record),
        view.download: gr.DownloadButton(value=str(pictures.pack(out)), visible=True),
    }


def fitted(picture: np.ndarray, to: np.ndarray) -> np.ndarray:
    """The picture, pixels [H, W, 3], as large as another."""
    rows = np.arange(to.shape[0]) * picture.shape[0] // to.shape[0]
    columns = np.arange(to.shape[1]) * picture.shape[1] // to.shape[1]
    return picture[rows][:, columns]


def overlay_of(show_tokens: bool, model: str) -> Callable[[np.ndarray, Any], np.ndarray]:
    """How a timestep is drawn: the picture, and over it what is still masked."""
    if not show_tokens:
        return lambda picture, tokens: pictures.enlarged(picture)
    card = read_card(pretrained.model_folder(model))
    mask = card["prior"]["num_outputs"]
    stride = 2 ** (len(card["codec"]["encoder_channels"]) - 1)
    previous: list[np.ndarray] = []

    def draw(picture: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        grid = tuple(-(-side // stride) for side in picture.shape[:2])
        pixels, is_masked = pictures.enlarged(picture), tokens == mask
        before = previous[-1] if previous else np.ones_like(is_masked)
        previous.append(is_masked)
        if is_masked.size % (grid[0] * grid[1]):
            return pixels
        side = stride * len(pixels) / len(picture)
        return draw_tokens(pixels, is_masked, before & ~is_masked, (grid[0], grid[1]), side)

    return draw


def make_editor(name: str, picture: np.ndarray | None) -> gr.ImageEditor:
    """The picture that a visitor may draw on."""
    return gr.ImageEditor(
        value=picture,
        label="Picture, to draw on",
        sources=(),
        transforms=(),
        layers=False,
        brush=gr.Brush(default_size=32, colors=["#ff9600"], color_mode="fixed"),
        canvas_size=(pictures.SHOWN, pictures.SHOWN),
        format="png",
        elem_id=f"{name}-editor",
    )


def make_buttons(name: str, verb: str) -> tuple[gr.Button, gr.Button]:
    """The buttons that start and stop a run."""
    with gr.Row():
        go = gr.Button(verb, variant="primary", elem_id=f"{name}-go")
        return go, gr.Button("Stop", variant="stop", elem_id=f"{name}-stop")


def wire(
    view: View, go: gr.Button, stop: gr.Button, run: Callable[..., Any], inputs: list[Any]
) -> None:
    """The button that runs and the one that stops; one run at a time over both tabs."""
    event = go.click(
        run, inputs, view.parts, concurrency_id="machine", concurrency_limit=1,
        show_progress="hidden", api_visibility="private",
    )  # fmt: skip
    stop.click(
        page.stopped, None, view.status, cancels=[event], queue=False, api_visibility="private"
    )


def picture_input(name: str) -> gr.File:
    """Where a visitor uploads a picture."""
    return gr.File(
        label="Your picture (or the one below)", file_count="single", type="filepath", height=110,
        elem_id=f"{name}-file",
    )  # fmt: skip


def load_shown(
    path: str | None, size: float | None, model: str, is_measured: bool = False
) -> np.ndarray:
    """The picture as the editor shows it; a message on the page if it is none."""
    with said():
        side = None if is_measured else int(size or SIZE)
        return pictures.enlarged(pictures.load(path, side, model))


def needed(what: str, value: float | None) -> float:
    """A number that must be there; Failed if its field is empty."""
    if value is None:
        raise Failed(f"{what} is empty; give a number")
    return value
