"""Configuration of the documentation site; `sphinx-build -W docs docs/_build` builds it.

Notebooks are shown as they are committed, without outputs. `APS_JAX_DOCS_EXECUTE=1` executes them
first, which takes some minutes, and shows what they print and draw.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
# The converters and the studies are not installed, and the extensions lie beside this file.
sys.path[:0] = [str(HERE / "_ext"), str(ROOT)]

import aps_jax  # noqa: E402

project = "aps_jax"
author = "the authors of aps_jax"
copyright = "the authors of aps_jax, Apache-2.0"  # noqa: A001 - Sphinx wants this name
release = version = aps_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "commands",
    "docstrings",
    "full_tables",
    "notebooks",
    "public_names",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "**/README.md"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "cache" if os.environ.get("APS_JAX_DOCS_EXECUTE") else "off"
nb_execution_cache_path = str(HERE / "_build" / "notebooks")
nb_execution_timeout = 900
nb_execution_raise_on_error = True

autosummary_generate = True
# The demo's library holds Pillow back, and is too large for a description of functions.
autodoc_mock_imports = ["gradio"]
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True
copybutton_line_continuation_character = "\\"

# Tables of studies begin with headings of the third level.
suppress_warnings = ["myst.header"]

html_theme = "pydata_sphinx_theme"
html_title = f"aps_jax {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "header_links_before_dropdown": 7,
    "secondary_sidebar_items": ["page-toc"],
}
html_show_sourcelink = False
