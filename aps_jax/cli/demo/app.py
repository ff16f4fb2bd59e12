"""The page: a tab that restores, a tab that edits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from gradio import themes

from aps_jax.cli.demo import page
from aps_jax.cli.demo.editing import edit_tab
from aps_jax.cli.demo.restoring import restore_tab


def look() -> dict[str, Any]:
    """How the page looks: the system's own fonts, so that nothing is fetched."""
    sans = ["system-ui", "sans-serif"]
    theme = themes.Default(font=sans, font_mono=["ui-monospace", "monospace"])
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
            restore_tab(folder)
        with gr.Tab("Edit a face", elem_id="tab-edit"):
            edit_tab(folder)
    return blocks
