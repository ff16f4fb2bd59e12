"""What setup.cfg cannot say: the converters are installed inside `aps_jax`, not beside it."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["aps_jax", "aps_jax.*"]), "aps_jax.convert"],
    package_dir={"aps_jax.convert": "convert"},
)
