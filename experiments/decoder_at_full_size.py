"""`python -m experiments.decoder_at_full_size`: runs the full MagVIT-v2 decoder once."""

from experiments.command import start

start(__name__, "experiments.speed.decoder_at_full_size")
