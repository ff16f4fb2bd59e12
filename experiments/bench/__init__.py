"""`python -m experiments.benchmark`: what is compared, how it is run, tuned and shown."""
