"""`python -m experiments.edits`: prompts and rewards for edits of faces."""

from experiments.command import start

start(__name__, "experiments.studies.edits")
