"""What a newcomer sees first: help, verdicts, animations; runs that are watched and stopped."""

import importlib
import io
import threading
import time

import numpy as np
import pytest
from PIL import Image

from aps_jax import animation, cli
from aps_jax.cli import help as helps
from aps_jax.cli import options as cli_options
from aps_jax.cli import verdict
from aps_jax.cli.demo import page, runs
from aps_jax.cli.progress import _bar, _Estimate, told
from aps_jax.restore import StepReport
from aps_jax.sampling.run import SampleResult, StepInfo, Trace


def test_the_command_alone_says_what_to_do_next(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    for command in ("restore", "demo", "tasks", "samplers", "models", "doctor"):
        assert f"aps-jax {command}" in text
    assert len(text.splitlines()) < 24


@pytest.mark.parametrize("command", ["restore", "edit", "stylize", "sweep", "demo", "models"])
def test_help_fits_one_screen_and_the_rest_is_not_lost(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def lines(flag):
        try:
            assert cli.main([command, flag]) == 0
        except SystemExit as stop:
            assert not stop.code
        return capsys.readouterr().out

    brief, full = lines("--help"), lines("--help-all")
    assert len(brief.splitlines()) <= 44
    if command in helps.COMMON:
        assert f"aps-jax {command} --help-all" in brief
        assert "--num-inner-steps" in full and "--num-inner-steps" not in brief
        for name in set(helps.COMMON[command]) - {"image"}:
            assert f"--{name.replace('_', '-')}" in brief
    else:
        assert brief == full


def test_the_demo_offers_models_of_pictures():
    pytest.importorskip("gradio")
    restoring = importlib.import_module("aps_jax.cli.demo.restoring")
    assert restoring.models_of_images() == ["face64", "photo64"]


def scores(**psnr):
    return {name: {"psnr": value, "ssim": None, "lpips": None} for name, value in psnr.items()}


def test_the_verdict_is_honest_in_both_directions():
    better = verdict.verdict(scores(restored=24.0, measurement=10.0, smooth_estimate=22.5))
    assert "1.5 dB closer" in better and "smooth image" in better
    worse = verdict.verdict(scores(restored=21.0, bicubic=23.0))
    assert "2.0 dB farther" in worse and "bicubic" in worse
    assert "--num-samples 8 --estimate mean" in worse
    several = verdict.verdict(scores(restored=21.0, mean_of_samples=22.0, bicubic=23.0))
    assert "add --estimate mean" in several
    mean = verdict.verdict(scores(restored=22.0, first_sample=21.0, bicubic=23.0))
    assert "1.0 dB farther" in mean and "--estimate" not in mean
    assert "as close" in verdict.verdict(scores(restored=21.0, bicubic=21.01))
    assert "24.00" in verdict.verdict(scores(restored=20.0, restored_pasted=24.0, bicubic=21.0))
    assert verdict.verdict({}) == verdict.verdict(scores(restored=21.0)) == ""


def traced_run(tokens, pictures):
    """A result of one image and one sample with a trace [T, ...]."""
    steps, one = len(tokens), np.zeros((len(tokens), 1, 1))
    trace = Trace(np.zeros((steps, 1, 1, 0)), tokens[:, None, None], pictures[:, None, None])
    last = pictures[-1][None]
    info = StepInfo(one, one, one, one, trace)
    return SampleResult(last, tokens[-1][None], info, last[None], last, last, last[None])


@pytest.mark.parametrize("suffix", ["webp", "gif"])
def test_an_animation_shows_the_measurement_every_timestep_and_the_end(tmp_path, suffix):
    pictures = np.stack([np.full((8, 8, 3), level, np.float32) for level in (-1.0, 0.0, 1.0)])
    result = traced_run(np.zeros((3, 4), np.int32), pictures)
    grey = np.full((4, 4, 1), 0.5, np.float32)
    frames = animation.trajectory(result, measurement=grey, min_height=32)
    assert [f.pixels.shape for f in frames] == [(32, 32, 3)] * 5
    path = tmp_path / f"run.{suffix}"
    animation.save_animation(path, frames, milliseconds=100)
    with Image.open(path) as film:
        assert film.info["loop"] == 0
        levels = []
        for index in range(film.n_frames):
            film.seek(index)
            levels.append(int(np.asarray(film.convert("RGB"))[16, 16, 0]))
    # Equal neighbours may be one frame: the last timestep is the result.
    np.testing.assert_allclose(levels[:4], [191, 0, 128, 255], atol=6)


def test_masked_tokens_are_veiled_and_new_ones_framed():
    pixels = np.full((40, 40, 3), 200, np.uint8)
    masked = np.array([True, False, False, False])
    new = np.array([False, True, False, False])
    shown = animation.draw_tokens(pixels, masked, new, (2, 2), 20)
    assert (shown[5:15, 5:15] < 120).all()
    np.testing.assert_array_equal(shown[25:35, 5:35], 200)
    np.testing.assert_array_equal(shown[0, 25], animation._NEW[:3])
    np.testing.assert_array_equal(shown[10, 30], 200)


def test_animations_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="webp or a .gif"):
        animation.save_animation(tmp_path / "run.mp4", [])
    with pytest.raises(ValueError, match="trace=True"):
        result = traced_run(np.zeros((1, 4), np.int32), np.zeros((1, 8, 8, 3), np.float32))
        animation.trajectory(result._replace(info=result.info._replace(trace=None)))
    with pytest.raises(ValueError, match="--save-video must be webp or gif"):
        cli_options.check(cli_options.Restore(save_video="mp4"))
    with pytest.raises(ValueError, match="add --save-video"):
        cli_options.check(cli_options.Restore(show_tokens=True))


def steps_of(count, done=None):
    """A command that reports `count` timesteps as a host loop does."""

    def command():
        with _bar("nothing") as on_step:
            for index in range(count + 1):
                on_step(StepReport(index, count, 1.0 / (index + 1), count - index))
                if done is not None:
                    done.append(index)
                time.sleep(0.02)
        return 0

    return command


def test_a_run_tells_of_every_timestep():
    news = [moment for moment in runs.moments(steps_of(3)) if moment.is_new]
    assert [moment.report.num_done for moment in news] == [0, 1, 2, 3]
    assert news[0].seconds_left is None and news[-1].seconds_left == 0
    text = page.status(news[-1], [1.0, 0.5, 0.25])
    assert "timestep 3 of 3" in text and 'value="3"' in text and "<polyline" in text


def test_a_run_that_nobody_watches_any_more_ends_after_its_timestep():
    done = []
    watched = runs.moments(steps_of(1000, done))
    while not (moment := next(watched)).is_new:
        assert moment.report is None
    watched.close()
    time.sleep(0.2)
    before = len(done)
    time.sleep(0.2)
    assert len(done) == before < 1000
    # It has let go of the machine.
    assert [m.report.num_done for m in runs.moments(steps_of(1)) if m.is_new] == [0, 1]


def test_runs_take_turns():
    busy, most = [], []

    def command():
        busy.append(1)
        most.append(len(busy))
        time.sleep(0.1)
        busy.pop()
        return 0

    threads = [threading.Thread(target=lambda: list(runs.moments(command))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]


def test_what_is_wrong_with_the_input_is_told_in_one_line_and_bugs_are_not(capsys):
    def fails(error):
        def command():
            raise error

        return command

    with pytest.raises(runs.Failed, match="^photo.png is no image; choose another$"):
        list(runs.moments(fails(ValueError("photo.png is no image;\n choose another"))))
    with pytest.raises(runs.Failed, match="free some space"):
        list(runs.moments(fails(OSError(28, "No space left", "out"))))
    with pytest.raises(RuntimeError, match="the terminal says more"):
        list(runs.moments(fails(KeyError("secret"))))
    assert "secret" in capsys.readouterr().err


def test_long_runs_say_early_how_long(capsys, monkeypatch):
    clock = iter([0.0, 30.0, 60.0, 90.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    on_step = _Estimate()
    for index in range(3):
        on_step(StepReport(index, 5, 0.1, 3, seconds=None if index else 40.0))
    assert capsys.readouterr().err == (
        "about 40 s on this machine, roughly guessed from the arithmetic\n"
        "about 2 min left; Ctrl-C keeps what is done\n"
    )
    _Estimate()(StepReport(0, 5, 0.1, 3, seconds=3.0))
    assert not capsys.readouterr().err
    assert [told(s) for s in (3, 119, 120, 7200)] == ["3 s", "119 s", "2 min", "2 h"]


def test_without_gradio_the_cure_is_told(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == (
        "aps-jax: error: aps-jax demo needs Gradio: pip install 'aps_jax[demo]'\n"
    )


def test_completion_is_printed(capsys):
    assert cli.main(["--tyro-print-completion", "bash"]) == 0
    text = capsys.readouterr().out
    assert "complete" in text and "--save-video" in text
    assert io.StringIO(text).readline()
