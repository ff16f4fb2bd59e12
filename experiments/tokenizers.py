"""`python -m experiments.tokenizers`: what the tokenizer is worth, on small faces."""

from experiments.command import start

start(__name__, "experiments.studies.tokenizers")
