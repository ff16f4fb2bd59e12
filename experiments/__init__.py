"""Studies and trainings; run one with `python -m experiments.NAME`."""
