"""How `aps-jax restore` ends: where the pictures are, and whether the model was worth it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

Scores = Mapping[str, Mapping[str, float | None]]

#: What needs no model, by its name in `metrics` of result.json.
YARDSTICKS = {
    "bicubic": "bicubic enlargement",
    "measurement": "the measurement as it is",
    "smooth_estimate": "a smooth image fitted to the measurement",
}
#: Decibels below which two images are called equally close.
_EQUAL = 0.05
_MEANINGS = {
    "restored.png": "the restored image",
    "comparison.png": "everything side by side, with scores",
    "mean.png": "mean of the samples, usually the closest to the photo",
    "std.png": "where the samples differ (white: most)",
    "trajectory.webp": "the timesteps, one after the other",
    "trajectory.gif": "the timesteps, one after the other",
}


def verdict(scores: Scores) -> str:
    """One sentence on the restored image and the best that needs no model; "" without a photo."""
    own = scores.get("restored_pasted", scores.get("restored", {})).get("psnr")
    rivals = {
        name: value
        for name in YARDSTICKS
        if (value := scores.get(name, {}).get("psnr")) is not None
    }
    if own is None or not rivals:
        return ""
    best = max(rivals, key=rivals.__getitem__)
    gain = own - rivals[best]
    figures = f"PSNR {own:.2f} against {rivals[best]:.2f} dB"
    what = f"{YARDSTICKS[best]}, which needs no model ({figures})"
    if abs(gain) < _EQUAL:
        return f"The restored image is as close to the photo as {what}."
    if gain > 0:
        return f"The restored image is {gain:.1f} dB closer to the photo than {what}."
    return (
        f"The restored image is {-gain:.1f} dB farther from the photo than {what}{_cure(scores)}."
    )


def _cure(scores: Scores) -> str:
    """What comes closer to the photo on average, if it has not been done yet."""
    if "first_sample" in scores:  # The restored image is a mean already.
        return ""
    more = "" if "mean_of_samples" in scores else "--num-samples 8 "
    return f"; the mean of several samples comes closer: add {more}--estimate mean"


def pictures(out: Path) -> list[str]:
    """A line per picture in `out` that a person wants to open: its path and what it shows."""
    found = [(str(out / name), _MEANINGS[name]) for name in _MEANINGS if (out / name).is_file()]
    width = max((len(path) for path, _ in found), default=0)
    return [f"  {path:{width}}  {meaning}" for path, meaning in found]
