"""The judge of edits: never a reward, and of another kind than the network that is one.

It is linear in histograms of oriented gradients and in coarse colours, fitted to faces that
`aps_jax.load_attributes` never saw (`python -m experiments.train.judge`). What fools the
derivatives of a deep network has little hold on it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from aps_jax.faces.framing import gradient_histograms
from aps_jax.io import checkpoint
from aps_jax.io.names import suggestion
from aps_jax.io.tensors import TensorFileError, open_tensors

#: Where the committed judge lies, and its weights in there.
FOLDER = Path(__file__).parent / "results" / "judges" / "attributes64"
WEIGHTS = "judge.safetensors"
_SIDE = 64


@dataclasses.dataclass(frozen=True)
class Judge:
    """A linear score per attribute.

    Attributes:
      names: of the attributes.
      weights: float32 [F, A].
      bias: float32 [A].
    """

    names: tuple[str, ...]
    weights: np.ndarray
    bias: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Scores [B, A] of faces [B, 64, 64, 3] in [-1, 1]; above 0 the attribute is there."""
        return features(x) @ self.weights + self.bias

    def index(self, name: str) -> int:
        """Place of an attribute among the scores; ValueError if there is no such attribute."""
        if name not in self.names:
            raise ValueError(f"unknown attribute {name!r}{suggestion(name, self.names)}")
        return self.names.index(name)


def features(x: np.ndarray) -> np.ndarray:
    """What the judge looks at, float32 [B, F], of faces [B, 64, 64, 3] in [-1, 1].

    Gradients in 16x16 cells of the picture and in 8x8 cells of its half, and colours of 16x16.
    """
    x = np.asarray(x, np.float32)
    if x.ndim != 4 or x.shape[1:] != (_SIDE, _SIDE, 3):
        raise ValueError(f"the judge takes faces [B, {_SIDE}, {_SIDE}, 3], got {x.shape}")
    count = len(x)
    luma = (x @ np.float32([0.299, 0.587, 0.114]) + 1) * 127.5
    half = luma.reshape(count, _SIDE // 2, 2, _SIDE // 2, 2).mean(axis=(2, 4))
    colours = x.reshape(count, 16, _SIDE // 16, 16, _SIDE // 16, 3).mean(axis=(2, 4))
    parts = (
        gradient_histograms(luma, 16), gradient_histograms(half, 8), colours.reshape(count, -1),
    )  # fmt: skip
    return np.concatenate(parts, axis=1)


def load_judge(folder: Path = FOLDER) -> Judge:
    """Loads the committed judge, or one that was fitted again.

    Raises:
      aps_jax.io.checkpoint.CheckpointError: the folder is damaged or holds no judge.
    """
    names = tuple(checkpoint.read_card(folder)["judge"]["names"])
    try:
        tensors = open_tensors(folder / WEIGHTS)
        weights, bias = (np.array(tensors[name], np.float32) for name in ("weights", "bias"))
    except (OSError, KeyError, TensorFileError) as error:
        raise checkpoint.CheckpointError(f"{folder / WEIGHTS} cannot be read: {error}") from None
    return Judge(names, weights, bias)
