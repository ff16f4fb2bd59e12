"""`python -m experiments.codec_yardsticks`: a codec against JPEG and patches of the same rate."""

from experiments.command import start

start(__name__, "experiments.train.codec_yardsticks")
