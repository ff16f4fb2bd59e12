"""The tab that restores: `aps-jax restore` with what the controls say."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import gradio as gr

from aps_jax import presets, pretrained
from aps_jax.cli import options, restore
from aps_jax.cli.demo import controls, pictures
from aps_jax.cli.demo.runs import Failed
from aps_jax.cli.demo.view import (
    MOST_SAMPLES,
    SIZE,
    View,
    fitted,
    forget,
    load_shown,
    make_buttons,
    make_editor,
    make_view,
    needed,
    overlay_of,
    picture_input,
    said,
    show,
    wire,
)

TASK, MODEL, PRESET, LARGEST = "inpainting_box", "photo64", "draft", 256


def models_of_images() -> list[str]:
    """Embedded models that a picture can be restored with."""
    return [name for name in pretrained.EMBEDDED_MODELS if "prior" in presets.kinds_of(name)]


def restore_tab(folder: Path) -> None:
    """Makes the controls of the tab; runs go to folders below `folder`."""
    with gr.Row():
        with gr.Column():
            file = picture_input("restore")
            editor = make_editor("restore", load_shown(None, SIZE, MODEL))
            task = controls.task_choice(TASK)
            of_task = controls.task_controls(TASK)
            preset = controls.preset_choice(PRESET)
            samples = gr.Slider(
                1, MOST_SAMPLES, 1, step=1, label="Samples", elem_id="restore-samples"
            )
            size = gr.Slider(32, LARGEST, SIZE, step=16, label="Side in pixels", elem_id="size")
            with gr.Accordion("More", open=False, elem_id="restore-more"):
                measured = gr.Checkbox(label="The picture is the measurement itself")
                show_tokens = gr.Checkbox(label="Show which tokens have been revealed")
                model = gr.Dropdown(models_of_images(), value=MODEL, label="Model")
                sigma = gr.Number(0.05, label="Noise, standard deviation on the scale [-1, 1]")
                seed = gr.Number(0, precision=0, label="Seed")
                num_steps = controls.optional_number(
                    label="Timesteps, instead of the preset's", elem_id="steps"
                )
                num_inner = controls.optional_number(
                    label="Inner steps, likewise", elem_id="inner-steps"
                )
        with gr.Column():
            go, stop = make_buttons("restore", "Restore")
            view = make_view("restore", "Measured and restored")
    for changed in (file.change, size.release, measured.change, model.change):
        changed(load_shown, [file, size, model, measured], editor, api_visibility="private")
    task.change(of_task.shown, task, list(of_task.groups.values()), api_visibility="private")
    own = [
        view.last, file, editor, task, preset, samples, size, measured, show_tokens, model, sigma,
        seed, num_steps, num_inner,
    ]  # fmt: skip
    run = functools.partial(_restore, folder, view, of_task)
    wire(view, go, stop, run, [*own, *of_task.inputs])


def _restore(
    folder: Path, view: View, of_task: controls.TaskControls,
    last: Path | None, file: str | None, editor: Any, task: str, preset: str, samples: float,
    size: float, measured: bool, show_tokens: bool, model: str, sigma: float, seed: float,
    num_steps: str, num_inner: str, *of_tasks: Any,
) -> Generator[dict[Any, Any], None, None]:  # fmt: skip
    """What the button Restore does: `aps-jax restore` with these options."""
    with said():
        forget(last)
        place = Path(tempfile.mkdtemp(dir=folder, prefix="run-"))
        side = None if measured else int(size)
        given = of_task.given(task, of_tasks)
        if controls.DRAWN in controls.CHOSEN[task].options:
            shown = pictures.load(file, side, model)
            missing = pictures.drawn(editor, shown.shape[:2])
            if missing is None:
                raise Failed("nothing is drawn; draw over what is missing in the picture first")
            given[controls.DRAWN] = pictures.save_mask(place / "mask.png", missing)
        chosen = options.Restore(
            image=Path(file) if file else None, task=task, measured=measured, model=model,
            preset=preset, num_samples=int(samples), sigma=needed("the noise", sigma),
            seed=int(needed("the seed", seed)), size=side,
            num_steps=controls.number("timesteps", num_steps),
            num_inner_steps=controls.number("inner steps", num_inner), out=place / "out",
            save_steps=True,
            **given,
        )  # fmt: skip
        options.check(chosen)
        before = pictures.enlarged(pictures.load(file, side, model))
        overlay = overlay_of(show_tokens, model)
        shows = show(view, lambda: restore.run(chosen), place, "restored", before, overlay)
        with contextlib.closing(shows):
            for update in shows:
                if view.slider in update and view.scores in update and update[view.scores]:
                    measurement = pictures.read(place / "out" / "measurement.png")
                    after = pictures.read(place / "out" / "restored.png")
                    update[view.slider] = gr.ImageSlider(
                        (fitted(measurement, after), after), visible=True
                    )
                yield update
