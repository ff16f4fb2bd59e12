"""`aps-jax sweep`: a folder of images on as many devices and hosts as there are."""
