"""Checks the shapes that signatures promise, in all tests; importing this installs it.

It must come before `aps_jax`, as it does in the alphabetical order of `conftest`'s imports.
"""

import jax
import numpy as np
from beartype import BeartypeConf, FrozenDict, beartype
from jaxtyping import install_import_hook

#: Modules of plain functions; those of Flax have their own ideas of what an argument is.
MODULES = [
    "aps_jax.codec.expectation",
    "aps_jax.energies",
    "aps_jax.sampler",
    "aps_jax.sampling",
]

_checked = beartype(
    conf=BeartypeConf(
        is_pep484_tower=True,  # 1 is a float.
        hint_overrides=FrozenDict({jax.Array: jax.Array | np.ndarray}),
    )
)


def check(fn):
    """Checks calls of `fn`, but for constructors: JAX fills bundles with placeholders."""
    return fn if fn.__name__ == "__init__" else _checked(fn)


install_import_hook(MODULES, "typecheck.check")
