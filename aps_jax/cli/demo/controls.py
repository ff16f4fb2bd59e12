"""Controls of the page, made from where options are declared."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from aps_jax import presets
from aps_jax.tasks import TASKS, Option, Task

#: Tasks that can be chosen: those that need no weights from elsewhere.
CHOSEN = {
    name: task
    for name, task in TASKS.items()
    if not any(option.kind is dict for option in task.options.values())
}
#: The option of a task that is drawn on the picture instead of given as a file.
DRAWN = "mask"


@dataclasses.dataclass(frozen=True)
class TaskControls:
    """One group of controls per task, of which only the chosen task's is shown.

    Attributes:
      groups: by task.
      fields: (task, field of the command's options) of every control, in the order of `inputs`.
      inputs: the controls.
    """

    groups: Mapping[str, gr.Group]
    fields: Sequence[tuple[str, str]]
    inputs: Sequence[Any]

    def given(self, task: str, values: Sequence[Any]) -> dict[str, Any]:
        """Options of a task by the command's names, those that were filled in."""
        named = dict(zip(self.fields, values, strict=True))
        given = {}
        for (name, field), value in named.items():
            if name != task or value in (None, ""):
                continue
            kind = next(o.kind for n, o in TASKS[task].options.items() if field in (n, o.flag))
            if kind is np.ndarray:
                given[field] = Path(value)
            else:
                given[field] = value if kind is str else number(field, value, kind)
        return given

    def shown(self, task: str) -> list[Any]:
        """Updates of the groups once a task is chosen."""
        return [gr.Group(visible=name == task) for name in self.groups]


def task_controls(chosen: str) -> TaskControls:
    """Makes the controls of every task; `chosen` is shown first."""
    groups, fields, inputs = {}, [], []
    for task in CHOSEN.values():
        with gr.Group(visible=task.name == chosen) as group:
            for name, option in task.options.items():
                if name == DRAWN:
                    gr.Markdown("Draw over what is missing in the picture.", padding=True)
                    continue
                fields.append((task.name, option.flag or name))
                inputs.append(_control(task, name, option))
        groups[task.name] = group
    return TaskControls(groups, fields, inputs)


def _control(task: Task, name: str, option: Option) -> Any:
    look: dict[str, Any] = {
        "label": name.replace("_", " "),
        "info": option.summary,
        "elem_id": f"{task.name}-{name}".replace("_", "-"),
    }
    if option.kind is np.ndarray:
        return gr.File(label=f"{look['label']}: {option.summary}", elem_id=look["elem_id"])
    if option.kind is str:
        return gr.Dropdown(option.metavar.split("|"), value=option.default, **look)
    return optional_number(value=option.default, **look)


def optional_number(value: float | None = None, **look: Any) -> gr.Textbox:
    """A number that may be left out; Gradio's own numbers are 0 when they are empty."""
    text = "" if value is None else f"{value:g}"
    return gr.Textbox(text, placeholder="by default, as said above", max_lines=1, **look)


def number(what: str, text: Any, kind: type[Any] = int) -> Any:
    """The number in a field, None if it is empty.

    Raises:
      ValueError: it is none.
    """
    text = str(text or "").strip()
    try:
        return kind(text) if text else None
    except ValueError:
        name = "a whole number" if kind is int else "a number"
        raise ValueError(f"{what} cannot be {text!r}; it is {name}") from None


def task_choice(chosen: str) -> gr.Dropdown:
    """The choice of a task, by its summary."""
    choices = [(f"{name.replace('_', ' ')}: {t.summary}", name) for name, t in CHOSEN.items()]
    return gr.Dropdown(choices, value=chosen, label="What was done to it", elem_id="task")


def preset_choice(chosen: str) -> gr.Radio:
    """The choice of a preset, with the work that each means."""
    names = []
    for name, options in presets.PRESETS.items():
        steps = f"{options['num_steps']} × {options['num_inner_steps']} steps"
        names.append((f"{name} ({steps})", name))
    return gr.Radio(names, value=chosen, label="Preset", elem_id="preset")


def words(folder: os.PathLike[str]) -> list[str]:
    """Words that the model of a folder knows; none if it has no list of them."""
    from aps_jax.text.tokenizer import TextError, load_tokenizer

    try:
        return load_tokenizer(folder).words()
    except TextError:
        return []
