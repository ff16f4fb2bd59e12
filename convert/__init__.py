"""Converters from published weight files to the formats that `aps_jax` loads."""
