"""The tab that edits a face: `aps-jax edit` with what the controls say."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from aps_jax import pretrained
from aps_jax.cli import edit, wishes
from aps_jax.cli.demo import controls, pictures
from aps_jax.cli.demo.view import (
    MOST_SAMPLES,
    SIZE,
    View,
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

FACE_MODEL = "face64"


def edit_tab(folder: Path) -> None:
    """Makes the controls of the tab; runs go to folders below `folder`."""
    model_folder = pretrained.model_folder(FACE_MODEL)
    with gr.Row():
        with gr.Column():
            gr.Markdown(
                "An upright face in the middle of the picture, as in CelebA. Draw over what may "
                "change, or nothing to change all of it a little."
            )
            file = picture_input("edit")
            editor = make_editor("edit", _load_face(None))
            wanted = gr.Dropdown(
                controls.words(model_folder), multiselect=True, label="What is to be seen",
                elem_id="edit-words",
            )  # fmt: skip
            unwanted = gr.Dropdown(
                controls.words(model_folder), multiselect=True, label="What is not to be seen",
                elem_id="edit-unwanted",
            )  # fmt: skip
            samples = gr.Slider(1, MOST_SAMPLES, 4, step=1, label="Samples", elem_id="edit-samples")
            with gr.Accordion("More", open=False, elem_id="edit-more"):
                guidance = gr.Slider(0, 10, wishes.GUIDANCE, label="How much the words count")
                seed = gr.Number(0, precision=0, label="Seed")
                num_steps = controls.optional_number(
                    label="Timesteps, instead of the default", elem_id="edit-steps"
                )
        with gr.Column():
            go, stop = make_buttons("edit", "Edit")
            view = make_view("edit", "Before and after")
    file.change(_load_face, file, editor, api_visibility="private")
    own = [view.last, file, editor, wanted, unwanted, samples, guidance, seed, num_steps]
    wire(view, go, stop, functools.partial(_edit, folder, view), own)


def _load_face(path: str | None) -> np.ndarray:
    return load_shown(path, SIZE, FACE_MODEL)


def _edit(
    folder: Path, view: View,
    last: Path | None, file: str | None, editor: Any, wanted: list[str], unwanted: list[str],
    samples: float, guidance: float, seed: float, num_steps: str,
) -> Generator[dict[Any, Any], None, None]:  # fmt: skip
    """What the button Edit does: `aps-jax edit` with these options."""
    with said():
        forget(last)
        photo = pictures.load(file, SIZE, FACE_MODEL)
        place = Path(tempfile.mkdtemp(dir=folder, prefix="run-"))
        free = pictures.drawn(editor, photo.shape[:2])
        size = None
        mask = None if free is None else pictures.save_mask(place / "mask.png", free)
        if file and photo.shape == pictures.load(file, None, FACE_MODEL).shape:
            image = Path(file)
        else:  # The mask is drawn on the part that is cut out.
            image = place / "photo.png"
            pictures.images.save_image(image, photo)
        chosen = wishes.Edit(
            image=image, mask=mask, prompt=", ".join(wanted) or None,
            negative=", ".join(unwanted) or None, guidance_scale=guidance,
            num_samples=int(samples), seed=int(needed("the seed", seed)),
            num_steps=controls.number("timesteps", num_steps),
            size=size, model=FACE_MODEL, out=place / "out", paste_known=mask is not None,
        )  # fmt: skip
        wishes.check(chosen)
        yield from show(
            view, lambda: edit.run(chosen), place, "edited", pictures.enlarged(photo),
            overlay_of(False, FACE_MODEL),
        )  # fmt: skip
