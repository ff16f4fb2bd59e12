"""What `aps-jax restore` gives back: scores, pictures and the record of the run."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aps_jax import animation, images
from aps_jax.cli import verdict
from aps_jax.cli.facts import seconds_of
from aps_jax.cli.inputs import Problem
from aps_jax.cli.options import Restore, command_of, preset_of
from aps_jax.config import APSConfig, SharedConfig
from aps_jax.restore import Restored
from aps_jax.sampling.smooth import smooth_estimate
from aps_jax.scores import report
from aps_jax.types import Array, Codec, ImageShape, Operator, Perceptual, PyTree

#: Files of a finished run, beside its record, and those of which there may be several.
FILES = (
    "restored.png", "measurement.png", "measurement.npy", "comparison.png", "mean.png", "std.png",
    "mask.png", "kernel.npy", "trajectory.webp", "trajectory.gif",
)  # fmt: skip
PATTERNS = ("samples/sample_*.png", "steps/step_*.png")


class Outputs:
    """Scores, pictures and record of one restored image."""

    def __init__(
        self,
        options: Restore,
        config: SharedConfig,
        problem: Problem,
        restored: Restored,
        codec: Codec | None,
        distance: Perceptual | None,
    ) -> None:
        self.options, self.config, self.problem, self.restored = options, config, problem, restored
        self.codec = codec
        self.result = jax.device_get(restored.result)
        self.is_mean = options.estimate == "mean"
        result = restored.result
        self.image = result.mean[0] if self.is_mean else result.images[0]
        self.pasted = None
        if options.paste_known:
            self.pasted = report.paste_known(problem.operator, self.image, problem.y)
        self.trivial = report.baseline(problem.y, problem.operator, problem.image_shape)
        self.scores: dict[str, dict[str, float | None]] = {}
        if problem.photo is not None:
            self.scores = self._scores(problem.photo[0], distance)
        decoded = result.decoded[0].mean(0) if self.is_mean else result.decoded[0, 0]
        self.residual = report.data_residual(
            problem.operator, self.image, problem.y, sigma=options.sigma, decoded=decoded
        )

    def residual_notes(self) -> list[str]:
        """What the residual says of the measurement, if it is far from the noise."""
        return report.residual_notes(self.residual, self.options.sigma)

    def _scores(
        self, photo: Array, distance: Perceptual | None
    ) -> dict[str, dict[str, float | None]]:
        candidates = {"restored": self.image}
        if self.pasted is not None:
            candidates["restored_pasted"] = self.pasted
        if self.config.num_samples > 1:
            name, _, picture = self._other()
            candidates[name] = picture
        if self.trivial is not None:
            candidates[self.trivial[0]] = self.trivial[1]
        if self.trivial is None or self.trivial[0] != "bicubic":
            candidates["smooth_estimate"] = self._smooth()
        if self.codec is not None:
            candidates["codec_reconstruction"] = report.codec_reconstruction(
                self.codec, photo, self.config.decode_scale
            )
        return report.scores(candidates, photo, distance)

    def _smooth(self) -> Array:
        """What fits the measurement without any model: smooth pixels."""
        problem, sigma = self.problem, self.options.sigma or APSConfig().sigma
        return _smooth(problem.operator, problem.y, problem.image_shape, sigma)

    def _other(self) -> tuple[str, str, Array]:
        """Of several samples, their mean or the first of them, whichever is not `restored`.

        Its names in the record and in the comparison, and the picture.
        """
        result = self.restored.result
        if self.is_mean:
            return "first_sample", "first sample", result.images[0]
        return "mean_of_samples", "mean of samples", result.mean[0]

    def record(self, facts: Mapping[str, Any], began: float) -> dict[str, Any]:
        """The record of the run, for JSON; the clock showed `began` when it started."""
        return {
            "command": command_of(self.options, resume=False, overwrite=False),
            **facts,
            "preset": preset_of(self.options),
            "budget": self.options.budget,
            "estimate": self.options.estimate,
            "metrics": self.scores or None,
            "residual": self.residual,
            "history": {
                "loss": self.result.info.loss[:, 0],
                "num_masked": self.result.info.num_masked[:, 0],
            },
            "seconds": seconds_of(self.restored, began),
            "model_calls": self.restored.calls,
            "std_white": report.spread_view(self.result.std[0])[1],
        }

    def write_pictures(self, folder: Path) -> None:
        """Writes every picture and array of the run into a folder."""
        problem, result = self.problem, self.result
        shown = self.image if self.pasted is None else self.pasted
        view = report.measurement_view(problem.y, problem.operator, problem.image_shape)
        images.save_image(folder / "restored.png", shown)
        images.save_image(folder / "measurement.png", view)
        images.save_array(folder / "measurement.npy", problem.y[0])
        params = problem.operator.params
        if problem.operator.name.startswith("inpainting"):
            images.save_image(folder / "mask.png", 2 * np.asarray(params) - 1)
        elif problem.operator.name in ("blur", "motion_blur"):
            images.save_array(folder / "kernel.npy", params)

        trivial = self._caption(self.trivial[0] if self.trivial else "")
        panels: list[tuple[str, Array | np.ndarray, str]] = [("measurement", view, trivial)]
        if problem.photo is not None:
            panels.insert(0, ("photo", problem.photo[0], ""))
        best = "restored" if self.pasted is None else "restored_pasted"
        panels.append(("restored", shown, self._caption(best)))
        if self.config.num_samples > 1:
            std, white = report.spread_view(result.std[0])
            if not self.is_mean:
                images.save_image(folder / "mean.png", result.mean[0])
            images.save_image(folder / "std.png", std)
            name, label, picture = self._other()
            panels.append((label, picture, self._caption(name)))
            panels.append(("std", std, f"white = {white:.2g}"))
            for index, sample in enumerate(result.samples[0], start=1):
                images.save_image(folder / "samples" / f"sample_{index:02}.png", sample)
        if self.options.save_steps:
            for index, shown in enumerate(result.info.trace.images[:, 0, 0], start=1):
                images.save_image(folder / "steps" / f"step_{index:02}.png", shown)
        if self.options.save_video:
            self._write_video(folder / f"trajectory.{self.options.save_video}", view)
        canvas = images.comparison(
            [(label, picture) for label, picture, _ in panels],
            captions=[caption for _, _, caption in panels],
        )
        images.save_image(folder / "comparison.png", canvas)

    def _write_video(self, path: Path, measurement: np.ndarray) -> None:
        tokens: dict[str, Any] = {}
        if self.codec is not None and self.options.show_tokens:
            scale = self.config.decode_scale
            height, width = self.problem.image_shape
            rows, columns, *_ = self.codec.grid((height * scale, width * scale))
            stride = self.codec.stride / scale
            tokens = {"tokens_in": (rows, columns), "mask": self.codec.num_codes, "stride": stride}
        frames = animation.trajectory(self.result, measurement=measurement, **tokens)
        animation.save_animation(path, frames)

    def _caption(self, name: str) -> str:
        if name not in self.scores:
            return ""
        prefix = "bicubic " if name == "bicubic" else ""
        return f"{prefix}{_figure(self.scores[name]['psnr'], '.2f')} dB"

    def summarise(self, notes: list[str], seconds: float) -> None:
        """Prints what a person wants to know."""
        options = self.options
        height, width = self.problem.image_shape
        print(
            f"{options.task} {width}x{height}, {options.sampler}, {work_of(self.config)}, seed "
            f"{options.seed}"
        )
        if self.scores:
            print(f"{'':22}{'PSNR':>8}{'SSIM':>8}{'LPIPS':>8}")
            for name, row in self.scores.items():
                cells = (
                    _figure(row[score], digits)
                    for score, digits in (("psnr", ".2f"), ("ssim", ".3f"), ("lpips", ".3f"))
                )
                print(f"{name.replace('_', ' '):22}" + "".join(f"{cell:>8}" for cell in cells))
        rms = self.residual["root_mean_square"]
        own = self.residual["decoded_root_mean_square"]
        before = "" if own == rms else f"; {own:.4f} before data consistency"
        print(f"residual {rms:.4f} (root mean square; the noise has {options.sigma:g}{before})")
        for note in notes:
            print(f"note: {note}")
        if sentence := verdict.verdict(self.scores):
            print(sentence)
        spent = self.restored.seconds
        print(
            f"after {seconds:.1f} s (compiling {spent['compile']:.1f}, sampling "
            f"{spent['sample']:.1f}), in {options.out}:"
        )
        print("\n".join(verdict.pictures(options.out)))


@functools.partial(jax.jit, static_argnames="image_shape")
def _smooth(operator: Operator, y: PyTree, image_shape: ImageShape, sigma: float) -> Array:
    return smooth_estimate(operator, y, image_shape=image_shape, sigma=sigma)[0]


def work_of(config: SharedConfig) -> str:
    """How much a sampler does, for people."""
    if isinstance(config, APSConfig):
        return f"{config.num_steps} timesteps of {config.num_inner_steps} inner steps"
    calls = config.evaluations()
    if config.NEEDS != "prior":
        what = "operator" if config.NEEDS == "denoiser" else "decoder"
        return f"{calls.denoiser} denoiser calls and {calls.decoder_gradient} {what} gradients"
    return (
        f"{calls.denoiser} denoiser and {calls.decoder + calls.decoder_gradient} decoder "
        "evaluations per sample"
    )


def _figure(value: float | None, digits: str) -> str:
    return "-" if value is None else format(value, digits)
