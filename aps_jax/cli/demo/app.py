"""The page: a tab that restores, a tab that edits."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from aps_jax import pretrained
from aps_jax.animation import draw_tokens
from aps_jax.cli import edit, options, restore, wishes
from aps_jax.cli.demo import controls, page, pictures
from aps_jax.cli.demo.runs import Failed, moments
from aps_jax.cli.errors import trouble_of
from aps_jax.io.checkpoint import read_card

TASK, MODEL, FACE_MODEL, PRESET, SIZE = "inpainting_box", "photo64", "face64", "draft", 64
_LARGEST, _MOST_SAMPLES = 256, 8


def look() -> dict[str, Any]:
    """How the page looks: the system's own fonts, so that nothing is fetched."""
    sans = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(font=sans, font_mono=["ui-monospace", "monospace"])
    return {"theme": theme, "css": page.CSS}


def build(folder: Path) -> gr.Blocks:
    """The page; every run of every visitor gets a folder of its own below `folder`."""
    with gr.Blocks(
        title="aps-jax", analytics_enabled=False, delete_cache=(3600, 3600), fill_width=True
    ) as blocks:
        gr.Markdown(
            "## aps-jax\nPictures from measurements, by a masked discrete diffusion model. "
            "Everything is computed on this machine and deleted when the demo ends."
        )
        with gr.Tab("Restore", elem_id="tab-restore"):
            _restore_tab(folder)
        with gr.Tab("Edit a face", elem_id="tab-edit"):
            _edit_tab(folder)
    return blocks


@contextlib.contextmanager
def _said() -> Iterator[None]:
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
class _View:
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
        return [getattr(self, field.name) for field in dataclasses.fields(self)]


def _view(name: str, labels: str) -> _View:
    return _View(
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
        last=gr.State(None, time_to_live=3600, delete_callback=_forget),
    )  # fmt: skip


def _forget(folder: Path | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _show(
    view: _View,
    command: Callable[[], int],
    place: Path,
    name: str,
    before: np.ndarray,
    overlay: Callable[[np.ndarray, Any], np.ndarray],
) -> Iterator[dict[Any, Any]]:
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


def _results(view: _View, place: Path, name: str, before: np.ndarray) -> dict[Any, Any]:
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
        view.slider: gr.ImageSlider((_fitted(before, after), after), visible=True),
        view.gallery: gr.Gallery(shown, visible=bool(shown)),
        view.scores: page.table(record),
        view.download: gr.DownloadButton(value=str(pictures.pack(out)), visible=True),
    }


def _fitted(picture: np.ndarray, to: np.ndarray) -> np.ndarray:
    """The picture, pixels [H, W, 3], as large as another."""
    rows = np.arange(to.shape[0]) * picture.shape[0] // to.shape[0]
    columns = np.arange(to.shape[1]) * picture.shape[1] // to.shape[1]
    return picture[rows][:, columns]


def _overlay(show_tokens: bool, model: str) -> Callable[[np.ndarray, Any], np.ndarray]:
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


def _editor(name: str, picture: np.ndarray | None) -> gr.ImageEditor:
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


def _buttons(name: str, verb: str) -> tuple[gr.Button, gr.Button]:
    with gr.Row():
        go = gr.Button(verb, variant="primary", elem_id=f"{name}-go")
        return go, gr.Button("Stop", variant="stop", elem_id=f"{name}-stop")


def _wire(
    view: _View, go: gr.Button, stop: gr.Button, run: Callable[..., Any], inputs: list[Any]
) -> None:
    """The button that runs and the one that stops; one run at a time over both tabs."""
    event = go.click(
        run, inputs, view.parts, concurrency_id="machine", concurrency_limit=1,
        show_progress="hidden", api_visibility="private",
    )  # fmt: skip
    stop.click(
        page.stopped, None, view.status, cancels=[event], queue=False, api_visibility="private"
    )


def _picture_inputs(name: str) -> gr.File:
    return gr.File(
        label="Your picture (or the one below)", file_count="single", type="filepath", height=110,
        elem_id=f"{name}-file",
    )  # fmt: skip


def _load(path: str | None, size: float | None, is_measured: bool = False) -> np.ndarray:
    with _said():
        return pictures.enlarged(pictures.load(path, None if is_measured else int(size or SIZE)))


def _restore_tab(folder: Path) -> None:
    with gr.Row():
        with gr.Column():
            file = _picture_inputs("restore")
            editor = _editor("restore", _load(None, SIZE))
            task = controls.task_choice(TASK)
            of_task = controls.task_controls(TASK)
            preset = controls.preset_choice(PRESET)
            samples = gr.Slider(
                1, _MOST_SAMPLES, 1, step=1, label="Samples", elem_id="restore-samples"
            )
            size = gr.Slider(32, _LARGEST, SIZE, step=16, label="Side in pixels", elem_id="size")
            with gr.Accordion("More", open=False, elem_id="restore-more"):
                measured = gr.Checkbox(label="The picture is the measurement itself")
                show_tokens = gr.Checkbox(label="Show which tokens have been revealed")
                model = gr.Dropdown(list(pretrained.EMBEDDED_MODELS), value=MODEL, label="Model")
                sigma = gr.Number(0.05, label="Noise, standard deviation on the scale [-1, 1]")
                seed = gr.Number(0, precision=0, label="Seed")
                num_steps = controls.optional_number(
                    label="Timesteps, instead of the preset's", elem_id="steps"
                )
                num_inner = controls.optional_number(
                    label="Inner steps, likewise", elem_id="inner-steps"
                )
        with gr.Column():
            go, stop = _buttons("restore", "Restore")
            view = _view("restore", "Measured and restored")
    for changed in (file.change, size.release, measured.change):
        changed(_load, [file, size, measured], editor, api_visibility="private")
    task.change(of_task.shown, task, list(of_task.groups.values()), api_visibility="private")
    own = [
        view.last, file, editor, task, preset, samples, size, measured, show_tokens, model, sigma,
        seed, num_steps, num_inner,
    ]  # fmt: skip
    run = functools.partial(_restore, folder, view, of_task)
    _wire(view, go, stop, run, [*own, *of_task.inputs])


def _restore(
    folder: Path, view: _View, of_task: controls.TaskControls,
    last: Path | None, file: str | None, editor: Any, task: str, preset: str, samples: float,
    size: float, measured: bool, show_tokens: bool, model: str, sigma: float, seed: float,
    num_steps: str, num_inner: str, *of_tasks: Any,
) -> Iterator[dict[Any, Any]]:  # fmt: skip
    """What the button Restore does: `aps-jax restore` with these options."""
    with _said():
        _forget(last)
        place = Path(tempfile.mkdtemp(dir=folder, prefix="run-"))
        side = None if measured else int(size)
        given = of_task.given(task, of_tasks)
        if controls.DRAWN in controls.CHOSEN[task].options:
            shown = pictures.load(file, side)
            missing = pictures.drawn(editor, shown.shape[:2])
            if missing is None:
                raise Failed("nothing is drawn; draw over what is missing in the picture first")
            given[controls.DRAWN] = pictures.save_mask(place / "mask.png", missing)
        chosen = options.Restore(
            image=Path(file) if file else None, task=task, measured=measured, model=model,
            preset=preset, num_samples=int(samples), sigma=_number("the noise", sigma),
            seed=int(_number("the seed", seed)), size=side,
            num_steps=controls.number("timesteps", num_steps),
            num_inner_steps=controls.number("inner steps", num_inner), out=place / "out", save_steps=True,
            **given,
        )  # fmt: skip
        options.check(chosen)
        before = pictures.enlarged(pictures.load(file, side))
        overlay = _overlay(show_tokens, model)
        shows = _show(view, lambda: restore.run(chosen), place, "restored", before, overlay)
        with contextlib.closing(shows):
            for update in shows:
                if view.slider in update and view.scores in update and update[view.scores]:
                    measurement = pictures.read(place / "out" / "measurement.png")
                    after = pictures.read(place / "out" / "restored.png")
                    update[view.slider] = gr.ImageSlider(
                        (_fitted(measurement, after), after), visible=True
                    )
                yield update


def _number(what: str, value: float | None) -> float:
    if value is None:
        raise Failed(f"{what} is empty; give a number")
    return value


def _edit_tab(folder: Path) -> None:
    model_folder = pretrained.model_folder(FACE_MODEL)
    with gr.Row():
        with gr.Column():
            gr.Markdown(
                "An upright face in the middle of the picture, as in CelebA. Draw over what may "
                "change, or nothing to change all of it a little."
            )
            file = _picture_inputs("edit")
            editor = _editor("edit", None)
            wanted = gr.Dropdown(
                controls.words(model_folder), multiselect=True, label="What is to be seen",
                elem_id="edit-words",
            )  # fmt: skip
            unwanted = gr.Dropdown(
                controls.words(model_folder), multiselect=True, label="What is not to be seen",
                elem_id="edit-unwanted",
            )  # fmt: skip
            samples = gr.Slider(
                1, _MOST_SAMPLES, 1, step=1, label="Samples", elem_id="edit-samples"
            )
            with gr.Accordion("More", open=False, elem_id="edit-more"):
                guidance = gr.Slider(0, 10, 4, label="How much the words count")
                seed = gr.Number(0, precision=0, label="Seed")
                num_steps = controls.optional_number(
                    label="Timesteps, instead of the default", elem_id="edit-steps"
                )
        with gr.Column():
            go, stop = _buttons("edit", "Edit")
            view = _view("edit", "Before and after")
    load = functools.partial(_load_face)
    file.change(load, file, editor, api_visibility="private")
    own = [view.last, file, editor, wanted, unwanted, samples, guidance, seed, num_steps]
    _wire(view, go, stop, functools.partial(_edit, folder, view), own)


def _load_face(path: str | None) -> np.ndarray | None:
    return None if path is None else _load(path, SIZE)


def _edit(
    folder: Path, view: _View,
    last: Path | None, file: str | None, editor: Any, wanted: list[str], unwanted: list[str],
    samples: float, guidance: float, seed: float, num_steps: str,
) -> Iterator[dict[Any, Any]]:  # fmt: skip
    """What the button Edit does: `aps-jax edit` with these options."""
    with _said():
        _forget(last)
        if not file:
            raise Failed("there is no picture; upload one of a face first")
        photo = pictures.load(file, SIZE)
        place = Path(tempfile.mkdtemp(dir=folder, prefix="run-"))
        free = pictures.drawn(editor, photo.shape[:2])
        size = None
        image = Path(file)
        mask = None if free is None else pictures.save_mask(place / "mask.png", free)
        if photo.shape != pictures.load(file, None).shape:
            # The mask is drawn on the part that is cut out.
            image = place / f"{image.stem}.png"
            pictures.images.save_image(image, photo)
        chosen = wishes.Edit(
            image=image, mask=mask, prompt=", ".join(wanted) or None,
            negative=", ".join(unwanted) or None, guidance_scale=guidance,
            num_samples=int(samples), seed=int(_number("the seed", seed)), num_steps=controls.number("timesteps", num_steps),
            size=size, model=FACE_MODEL, out=place / "out", paste_known=mask is not None,
        )  # fmt: skip
        wishes.check(chosen)
        yield from _show(
            view, lambda: edit.run(chosen), place, "edited", pictures.enlarged(photo),
            _overlay(False, FACE_MODEL),
        )  # fmt: skip
