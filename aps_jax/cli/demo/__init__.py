"""`aps-jax demo`: the commands restore and edit in a browser tab."""
