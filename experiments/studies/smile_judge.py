"""A judge of smiles from elsewhere: the expression network of face-api, beside CelebA's labels.

    npm pack @vladmandic/face-api@1.7.15 && tar xzf vladmandic-face-api-1.7.15.tgz
    python -m experiments.studies.smile_judge --model package/model --faces HELD_OUT \
        --attributes celeba_attributes.csv --out experiments/results/judges/smile.json

The package (MIT licence) is fetched by hand. Its network was trained by others on other pictures
(V. Mühler, face-api.js) to tell seven expressions; a face smiles for it if "happy" is the
likeliest. With `--edits`, the folder of `experiments.edits`, it also judges the pictures there.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from aps_jax.cli.errors import guarded
from aps_jax.images import load_image
from aps_jax.io.files import write_json
from aps_jax.types import Array
from experiments import photos
from experiments.train.attributes import ATTRIBUTES, read_labels, scores_of

MANIFEST = "face_expression_model-weights_manifest.json"
EXPRESSIONS = ("neutral", "happy", "sad", "angry", "fearful", "disgusted", "surprised")
#: The tight square around a face, in a picture of 64x64 pixels: first and last row, then column.
_BOX = (14, 54, 12, 52)
#: What the package subtracts from red, green and blue on 0..255, and the side it looks at.
_MEANS, _SIDE = (122.782, 117.001, 104.298), 112


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Command line.

    Attributes:
      model: folder with the manifest and the weights.
      faces: held-out aligned faces of 64x64 pixels.
      attributes: CSV file with CelebA's labels of them.
      out: JSON file to write.
      edits: folder of `experiments.edits` with its pictures.
    """

    model: Path
    faces: Path
    attributes: Path
    out: Path
    edits: Path | None = None


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of a TensorFlow.js manifest: floats, or bytes with a scale and a least value.

    Raises:
      ValueError: if sizes and files do not fit, or a type is another.
    """
    arrays: dict[str, np.ndarray] = {}
    for group in json.loads((folder / MANIFEST).read_text()):
        data = b"".join((folder / Path(name).name).read_bytes() for name in group["paths"])
        at = 0
        for entry in group["weights"]:
            stored = entry.get("quantization", {})
            kind = np.dtype(stored.get("dtype", entry["dtype"]))
            if kind not in (np.dtype("uint8"), np.dtype("float32")):
                raise ValueError(f"{entry['name']} is of {kind}; expected uint8 or float32")
            size = math.prod(entry["shape"]) * kind.itemsize
            if at + size > len(data):
                raise ValueError(f"{folder} is truncated at {entry['name']}; fetch it again")
            values = np.frombuffer(data, kind, math.prod(entry["shape"]), at).astype(np.float32)
            values = values * stored.get("scale", 1.0) + stored.get("min", 0.0)
            arrays[entry["name"]] = values.reshape(entry["shape"]).astype(np.float32)
            at += size
        if at != len(data):
            raise ValueError(f"{folder} has {len(data) - at} bytes more than its manifest says")
    return arrays


def _convolution(x: Array, kernel: Array, stride: int, groups: int = 1) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )  # fmt: skip


def _layer(weights: dict[str, Array], name: str, x: Array, stride: int) -> Array:
    """A convolution, or one per channel followed by one per pixel."""
    if f"{name}/filters" in weights:
        return _convolution(x, weights[f"{name}/filters"], stride) + weights[f"{name}/bias"]
    each = jnp.swapaxes(weights[f"{name}/depthwise_filter"], 2, 3)
    x = _convolution(x, each, stride, groups=x.shape[-1])
    return _convolution(x, weights[f"{name}/pointwise_filter"], 1) + weights[f"{name}/bias"]


@jax.jit
def expressions(weights: dict[str, Array], x: Array) -> Array:
    """Logits [B, 7] of aligned faces [B, 64, 64, 3] in [-1, 1]."""
    top, bottom, left, right = _BOX
    x = (x[:, top:bottom, left:right] + 1) * 127.5
    x = jax.image.resize(x, (len(x), _SIDE, _SIDE, 3), "linear")
    x = (x - jnp.array(_MEANS)) / 255
    for block in range(4):
        total = jax.nn.relu(_layer(weights, f"dense{block}/conv0", x, 2))
        for layer in (1, 2, 3):  # Each sees the rectified sum of all before it.
            total += _layer(weights, f"dense{block}/conv{layer}", jax.nn.relu(total), 1)
        x = jax.nn.relu(total)
    pooled = jnp.mean(x, axis=(1, 2))  # Seven by seven are left, which one window covers.
    return pooled @ weights["fc/weights"] + weights["fc/bias"]


def is_smile(weights: dict[str, Array], x: np.ndarray) -> np.ndarray:
    """Bool [B]: "happy" is the likeliest expression."""
    parts = [expressions(weights, x[start : start + 50]) for start in range(0, len(x), 50)]
    return np.concatenate([np.asarray(part).argmax(axis=1) for part in parts]) == 1


def of_edits(weights: dict[str, Array], folder: Path) -> dict[str, Any]:
    """Share of smiles, by case and method, of pictures that `experiments.edits` left."""
    found = {}
    for part in sorted((folder / "pictures").iterdir()):
        if part.name.startswith(("smiling", "unsmiling")):
            x = np.stack([load_image(path) for path in sorted(part.glob("*.png"))])
            found[part.name] = {"pictures": len(x), "smiles": int(is_smile(weights, x).sum())}
    return found


def run(config: Config) -> None:
    """Judges and writes."""
    weights = {name: jnp.asarray(value) for name, value in read_weights(config.model).items()}
    names, faces = photos.center_crops(config.faces, size=64, shrink=1, count=None)
    place = list(ATTRIBUTES).index("smiling")
    labels = read_labels(config.attributes, names)[:, [place]]
    smiles = is_smile(weights, faces)[:, None]
    scores = scores_of(np.where(smiles, 1.0, -1.0), labels)
    facts = {
        "network": "@vladmandic/face-api 1.7.15, face_expression_model (MIT)",
        "faces": len(faces),
        "smiling_by_the_labels": int(labels.sum()),
        "smiling_by_the_network": int(smiles.sum()),
        "accuracy": round(float(scores["accuracy"][0]), 4),
        "balanced_accuracy": round(float(scores["balanced_accuracy"][0]), 4),
    }
    if config.edits is not None:
        facts["edits"] = of_edits(weights, config.edits)
    write_json(config.out, facts)
    print(facts)


if __name__ == "__main__":
    sys.exit(guarded(lambda: run(tyro.cli(Config)), "smile_judge"))
