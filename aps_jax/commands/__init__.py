"""What the subcommands of `aps-jax` do; `aps_jax.cli` parses their options."""
