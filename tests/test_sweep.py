"""The sweep on tiny models: what is written, what is refused, and hosts that die."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import mixing_prior, patch_codec
from PIL import Image

from aps_jax import operators, pretrained, sharding
from aps_jax.cli import perceptual
from aps_jax.cli.sweep import batches, hosts, memory, share, sources
from aps_jax.cli.sweep import command as sweep
from aps_jax.io import checkpoint, rows
from aps_jax.samplers import sample as library_sample
from aps_jax.tasks import TASKS
from aps_jax.types import Perceptual

ROOT = Path(__file__).parents[1]
NAMES = [f"{letter}/{index}.png" for letter in "ab" for index in range(4)]

#: What a fixture takes away, for those tests that need it.
LOAD_DISTANCE = perceptual.load


@pytest.fixture(scope="module")
def photo_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name in NAMES:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / name)
    return folder


@pytest.fixture
def toy(tiny_model, monkeypatch):
    """The folder loads as a model without convolutions, which compiles at once."""
    loaded = pretrained.Model(
        mixing_prior(window=4), patch_codec(), checkpoint.read_card(tiny_model)
    )
    monkeypatch.setattr(pretrained, "load_pretrained", lambda name, **options: loaded)
    monkeypatch.setattr(perceptual, "load", lambda *_: None)
    return tiny_model


def arguments(photos, model, out, *more):
    return [
        str(photos), "--model", str(model), "--out", str(out), "--size", "16", "--task",
        "inpainting_random", "--num-steps", "2", "--num-inner-steps", "2", "--batch-size", "2",
        "--draw", "categorical", *more,
    ]  # fmt: skip


def pixels(out):
    return {
        name: np.asarray(Image.open(out / "images" / f"{name}.png"), np.int32) for name in NAMES
    }


def table(out):
    return [row for log in sorted(out.glob("rows-*.jsonl")) for row in rows.read(log)]


def test_results_do_not_depend_on_batches_hosts_or_lists(photo_folder, toy, tmp_path, monkeypatch):
    """Two hosts, one after the other and with other batches, do what one host does alone."""
    assert sweep.main(arguments(photo_folder, toy, tmp_path / "one")) == 0
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(str(photo_folder / name) for name in reversed(NAMES)) + "\n")
    for index in (1, 0):
        monkeypatch.setattr(hosts, "join", lambda *_, index=index, **__: hosts.Place(index, 2))
        more = ("--batch-size", "3")
        assert sweep.main(arguments(listed, toy, tmp_path / "two", *more)) == 0
        assert len(rows.read(tmp_path / "two" / f"rows-{index:04}.jsonl")) == 4
    one, two = pixels(tmp_path / "one"), pixels(tmp_path / "two")
    for name in NAMES:
        np.testing.assert_allclose(one[name], two[name], atol=1, err_msg=name)
    assert len({image.tobytes() for image in one.values()}) == len(NAMES)
    for row in table(tmp_path / "one"):
        assert row["status"] == "restored" and np.isfinite([row["psnr"], row["residual"]]).all()


def test_noise_and_samples_are_those_of_the_seed_and_the_name(photo_folder, toy):
    options = sweep.read_options(arguments(photo_folder, toy, "out"))
    path = photo_folder / NAMES[0]
    one, same, other = (batches.measure_image(options, name, path) for name in "xxy")
    seeded = batches.measure_image(dataclasses.replace(options, seed=1), "x", path)
    np.testing.assert_array_equal(one.problem.y, same.problem.y)
    assert np.array_equal(jax.random.key_data(one.key), jax.random.key_data(same.key))
    # Its operator is that of all images, its noise and its samples are its own.
    mask, others = (np.asarray(job.problem.operator.params) for job in (one, other))
    np.testing.assert_array_equal(mask, others)
    assert not np.array_equal(mask, seeded.problem.operator.params)
    noise = np.asarray(one.problem.y - other.problem.y)[0]
    assert np.std(noise[mask[..., 0] > 0]) == pytest.approx(0.05 * 2**0.5, rel=0.2)
    for job in (other, seeded):
        assert not np.array_equal(jax.random.key_data(one.key), jax.random.key_data(job.key))


def test_images_with_masks_of_their_own_share_a_batch(toy, tmp_path):
    """Each is restored by its own mask: as if it were alone."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "measured"
    folder.mkdir()
    for index in range(3):
        image = rng.integers(0, 256, (16, 16, 4), dtype=np.uint8)
        image[..., 3] = 255 * (np.arange(16) % 4 != index)[:, None]
        Image.fromarray(image).save(folder / f"{index}.png")
    found = sources.named_images(folder)
    for size, names in (
        (1, [["0.png"], ["1.png"], ["2.png"]]),
        (2, [["0.png", "1.png"], ["2.png"]]),
    ):
        words = arguments(
            folder, toy, tmp_path / str(size), "--measured", "--batch-size", str(size)
        )
        words[words.index("--task") + 1] = "inpainting_mask"
        options = sweep.read_options([*words, "--size", "None"])
        host = share.Host(options, hosts.Place(0, 1))
        groups = batches.group(options, found, size)
        assert [[job.name for job in batch] for batch in groups] == names
        assert host.run(found) == 0
        assert len(host._compiled) == 1  # A mask is data, and the last batch is filled up.
    for index, row in enumerate(table(tmp_path / "2")):
        mask = np.arange(16) % 4 != index
        known, restored, alone = (
            np.asarray(Image.open(path).convert("RGB"), float) / 127.5 - 1
            for path in (
                folder / row["name"],
                tmp_path / "2" / "images" / f"{row['name']}.png",
                tmp_path / "1" / "images" / f"{row['name']}.png",
            )
        )
        error = np.sqrt(np.mean((known - restored)[mask] ** 2))
        assert row["residual"] == pytest.approx(error, abs=0.01)
        np.testing.assert_allclose(restored, alone, atol=1 / 127)


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.is_random])
def test_all_images_of_one_size_have_one_operator(photo_folder, toy, task):
    """So a batch may take that of its first image."""
    words = arguments(photo_folder, toy, "out")
    words[words.index("--task") + 1] = task
    options = sweep.read_options(words)
    one, other = (
        batches.measure_image(options, name, photo_folder / name).problem for name in NAMES[:2]
    )
    assert batches._kind(one) == batches._kind(other)
    leaves = zip(*map(jax.tree.leaves, (one.operator, other.operator)), strict=True)
    assert all(np.array_equal(*pair) for pair in leaves)
    assert not np.array_equal(one.y, other.y)


class Measured:
    """Stands for `measure_image`: every image is of the size of its place in the folder."""

    def __init__(self, kind_of):
        self.kind_of, self.names = kind_of, []

    def __call__(self, options, name, image):
        self.names.append(name)
        shape = (16, 16 + self.kind_of(int(name)))
        operator = operators.denoising()
        problem = batches.inputs.Problem(None, np.zeros((1, *shape, 3)), operator, shape, {})
        return batches.Job(name, problem, None)


def test_a_folder_of_many_sizes_does_not_wait_for_its_end(monkeypatch, toy):
    """However many there are, few images are held; all come, and the most of one kind first."""
    options = sweep.read_options(arguments("photos", toy, "out"))
    measured = Measured(lambda index: index if index != 3 else 1)
    monkeypatch.setattr(batches, "measure_image", measured)
    given = []
    for batch in batches.group(options, {str(index): Path() for index in range(40)}, 3):
        given.append([job.name for job in batch])
        held = len(measured.names) - sum(map(len, given))
        assert held <= (batches.WAITING_BATCHES + 1) * 3 + 1
    assert given[0] == ["1", "3"] and given[1] == ["0"]
    assert sorted(sum(given, []), key=int) == measured.names


def test_the_next_batch_is_read_while_one_is_restored(monkeypatch, toy):
    options = sweep.read_options(arguments("photos", toy, "out"))
    measured = Measured(lambda index: 0)
    monkeypatch.setattr(batches, "measure_image", measured)
    groups = batches.group(options, {str(index): Path() for index in range(40)}, 2)
    assert [job.name for job in next(groups)] == ["0", "1"]
    deadline = time.monotonic() + 30
    while len(measured.names) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    groups.close()
    assert len(measured.names) <= 2 + 2 + 1  # No more than that, and nothing once it has ended.
    assert not [one for one in threading.enumerate() if one.name.startswith("read-ahead")]


def save_noise(path, height, width):
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def test_what_was_restored_before_a_kill_is_kept(toy, tmp_path, monkeypatch, capsys):
    """Of images that each have a size of their own, so that no batch is ever full."""
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for index in range(5):
        save_noise(folder / f"{index}.png", 16, 16 + 4 * index)
    measure = batches.measure_image

    def stopped(options, name, image):
        if name == "4.png":
            raise KeyboardInterrupt
        return measure(options, name, image)

    monkeypatch.setattr(batches, "measure_image", stopped)
    monkeypatch.setattr(batches, "WAITING_BATCHES", 1)
    assert sweep.main(arguments(folder, toy, out, "--size", "None")) == 130
    assert "the same command does what is missing" in capsys.readouterr().err
    assert [row["name"] for row in table(out)] == ["0.png", "1.png"]


def test_a_small_image_takes_lpips_from_itself_alone(toy, tmp_path, monkeypatch):
    """Not from those that come after it, for scores and for the perceptual term."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, height in {"0": 12, "1": 16, "2": 12}.items():
        save_noise(folder / f"{name}.png", height, 20)
    distance = Perceptual(params=None, apply=lambda _, a, b: jnp.mean(abs(a - b), axis=(1, 2, 3)))
    monkeypatch.setattr(perceptual, "load", LOAD_DISTANCE)
    monkeypatch.setattr(perceptual, "load_lpips", lambda: distance)
    for more in ((), ("--option", "perceptual_weight=0.1")):
        out = tmp_path / f"out{len(more)}"
        words = arguments(folder, toy, out, "--size", "None", "--batch-size", "1", *more)
        assert sweep.main(words) == 0
        found = {row["name"]: row for row in table(out)}
        assert [found[f"{index}.png"]["lpips"] is None for index in range(3)] == [True, False, True]
        notes = [" ".join(found[f"{index}.png"].get("notes", [])) for index in range(3)]
        is_told = ["perceptual" in text for text in notes]
        assert is_told == [bool(more), False, bool(more)]


def test_a_perceptual_term_without_lpips_is_refused(
    photo_folder, toy, tmp_path, monkeypatch, capsys
):
    def missing():
        raise perceptual.PerceptualUnavailable("no weights; fetch them")

    monkeypatch.setattr(perceptual, "load", LOAD_DISTANCE)
    monkeypatch.setattr(perceptual, "load_lpips", missing)
    words = arguments(photo_folder, toy, tmp_path / "out", "--option", "perceptual_weight=0.1")
    assert sweep.main(words) == 2
    printed = capsys.readouterr().err
    assert "no weights; fetch them; or sweep without it: --option perceptual_weight=0" in printed
    assert printed.count("\n") == 1


def test_seconds_are_per_image_and_divergence_is_told(
    photo_folder, toy, tmp_path, monkeypatch, capsys
):
    def diverged(params, y, keys, *, config):
        result = library_sample(params, y, keys, config=config)
        is_finite = result.info.is_finite.at[:, 1].set(False)  # the second of each batch
        return result._replace(info=result.info._replace(is_finite=is_finite))

    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(share.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(share, "sample", diverged)
    out = tmp_path / "out"
    assert sweep.main(arguments(photo_folder, toy, out)) == 1
    found = table(out)
    assert [row["status"] for row in found] == ["restored", "diverged"] * 4
    assert all(row["seconds"] == 5 for row in found[::2])
    written = {path.relative_to(out / "images").as_posix() for path in out.rglob("*.png")}
    assert written == {f"{row['name']}.png" for row in found[::2]}
    assert "objective is not finite; lower learning_rate" in capsys.readouterr().err


def test_seconds_do_not_hold_the_compilation(photo_folder, toy, tmp_path, monkeypatch):
    clock = [0.0]

    def traced(params, y, keys, *, config):
        clock[0] += 100  # This runs once, when the first batch compiles.
        return library_sample(params, y, keys, config=config)

    monkeypatch.setattr(share.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(share, "sample", traced)
    assert sweep.main(arguments(photo_folder, toy, tmp_path / "out")) == 0
    assert clock[0] >= 100
    assert [row["seconds"] for row in table(tmp_path / "out")] == [0] * len(NAMES)


def test_another_mask_file_is_another_sweep(photo_folder, toy, tmp_path, capsys):
    mask = tmp_path / "mask.png"
    words = arguments(photo_folder, toy, tmp_path / "out", "--mask", str(mask))
    words[words.index("--task") + 1] = "inpainting_mask"
    for column in (3, 4):
        pixels = np.full((16, 16), 255, np.uint8)
        pixels[:, column] = 0
        Image.fromarray(pixels).save(mask)
        code = sweep.main(words)
    assert code == 2 and "task.options.mask" in capsys.readouterr().err


def test_other_weights_of_an_operator_are_another_sweep(photo_folder, toy, tmp_path):
    """Of one size and at one place; the same ones elsewhere are not."""

    def identity(folder):
        words = arguments(photo_folder, toy, tmp_path / "out", "--weights", str(folder))
        options = sweep.read_options(words)
        return sweep._identity(options, sweep.cli_options.config_of(options))

    one, moved = tmp_path / "one", tmp_path / "moved"
    one.mkdir()
    (one / checkpoint.CARD_NAME).write_text("{}")
    (one / "kernel_wizard.safetensors").write_bytes(b"weights")
    before = identity(one)
    shutil.copytree(one, moved)
    assert identity(moved) == before
    (one / "kernel_wizard.safetensors").write_bytes(b"WEIGHTS")
    rows.claim(tmp_path / "claimed.json", before)
    with pytest.raises(rows.ForeignResults, match="task.options.weights.kernel_wizard"):
        rows.claim(tmp_path / "claimed.json", identity(one))


def test_a_rerun_does_what_is_missing_and_no_more(photo_folder, toy, tmp_path, capsys):
    """A damaged image is skipped and recorded; once repaired, only what changed is restored."""
    folder, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(photo_folder, folder)
    (folder / "a/2.png").write_bytes(b"no image")
    assert sweep.main(arguments(folder, toy, out)) == 1
    assert "a/2.png was left out" in capsys.readouterr().err
    statuses = {row["name"]: row["status"] for row in table(out)}
    assert statuses.pop("a/2.png") == "unreadable"
    assert set(statuses.values()) == {"restored"} and len(statuses) == 7
    shutil.copy(photo_folder / "a/2.png", folder / "a/2.png")
    (out / "images/b/0.png.png").unlink()
    shutil.copy(photo_folder / "a/0.png", folder / "b/1.png")  # another photo of that name
    log = out / "rows-0000.jsonl"
    log.write_text(log.read_text() + '{"name": "b/3.png", "status": "rest')  # killed while writing
    assert sweep.main(arguments(folder, toy, out)) == 0
    assert sorted(row["name"] for row in table(out)[8:]) == ["a/2.png", "b/0.png", "b/1.png"]
    before = log.read_bytes()
    assert sweep.main(arguments(folder, toy, out)) == 0
    assert log.read_bytes() == before


def test_results_of_another_run_are_refused(photo_folder, toy, tmp_path, capsys):
    out = tmp_path / "out"
    identity = sweep._identity(
        sweep.read_options(arguments(photo_folder, toy, out)),
        sweep.cli_options.config_of(sweep.read_options(arguments(photo_folder, toy, out))),
    )
    rows.claim(out / sweep.MANIFEST, identity)
    rows.claim(out / sweep.MANIFEST, identity)
    assert sweep.main(arguments(photo_folder, toy, out, "--sigma", "0.1")) == 2
    assert "sigma was 0.05, now 0.1; use the same settings" in capsys.readouterr().err
    older = identity | {"versions": identity["versions"] | {"jax": "0.1"}}
    (out / sweep.MANIFEST).write_text(json.dumps(older))
    assert sweep.main(arguments(photo_folder, toy, out)) == 2
    assert "versions.jax was '0.1'" in capsys.readouterr().err
    assert sweep.main(arguments(photo_folder, toy, out, "--dtype", "bfloat16")) == 2
    assert "dtype was None, now 'bfloat16'" in capsys.readouterr().err
    (out / "rows-0000.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1 is not a row"):
        table(out)


def test_rows_without_hashes_are_refused(photo_folder, toy, tmp_path, capsys):
    out = tmp_path / "out"
    unread = {"name": "b", "status": "unreadable", "reason": "damaged"}
    rows.append(out / "rows-0003.jsonl", [unread, {"name": "a/0.png", "status": "restored"}])
    assert sweep.main(arguments(photo_folder, toy, out)) == 2
    printed = capsys.readouterr().err
    assert "rows-0003.jsonl has a row of a/0.png without the hash" in printed
    assert "choose another --out" in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num-data", "99"], "99 x 1 devices does not fit the"),
        (["--batch-size", "0"], "--batch-size must be a positive multiple"),
        (["--coordinator", "here:1"], "belong together"),
        (
            ["--coordinator", "here", "--num-processes", "2", "--process-id", "0"],
            "must be HOST:PORT",
        ),
        (
            ["--coordinator", "here:1", "--num-processes", "2", "--process-id", "2"],
            "--process-id must be from 0 to 1",
        ),
        (["--task", "inpainting_rando"], "did you mean 'inpainting_random'"),
        (["--fraction", "2"], "fraction"),
        (["--scale", "4"], "no option 'scale'"),
        (["--num-samples", "2"], "--num-samples must be 1 here"),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(
    photo_folder, toy, tmp_path, capsys, more, message
):
    out = tmp_path / "out"
    assert sweep.main(arguments(photo_folder, toy, out, *more)) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert not out.exists()


def test_bad_sources_and_configurations(photo_folder, toy, tmp_path, capsys):
    listed = tmp_path / "list.txt"
    listed.write_text("x.png\nx.png\n")
    config = tmp_path / "sweep.json"
    config.write_text('{"image": "nowhere", "sigmo": 1}')
    for source, message in [
        ("nowhere", "neither a folder of images nor a list"),
        (listed, "names .*x.png twice"),
        (config, "unknown option 'sigmo'"),
        (tmp_path / "no.json", "there is no file"),
    ]:
        with pytest.raises(ValueError, match=message):
            sweep.run(sweep.read_options(arguments(source, toy, tmp_path / "out")))
    config.write_text(json.dumps({"image": str(photo_folder), "sigma": 0.2, "size": 16}))
    options = sweep.read_options([str(config), "--seed", "3"])
    assert (options.image, options.sigma, options.seed) == (photo_folder, 0.2, 3)
    config.write_text('{"weights": "here", "mask": "there"}')
    options = sweep.read_options([str(config)])
    assert (options.weights, options.mask) == (Path("here"), Path("there"))
    values = {
        "image": "some photos",
        "measured": True,
        "option": ["learning_rate=1"],
        "prompt": "-",
    }
    config.write_text(json.dumps(values | {"seed": -3, "kernel": None}))
    options = sweep.read_options([str(config), "--option", "schedule=linear"])
    assert (options.image, options.measured, options.prompt) == (Path("some photos"), True, "-")
    assert (options.seed, options.kernel) == (-3, None)
    assert options.option == ("learning_rate=1", "schedule=linear")
    config.write_text('{"measured": "no"}')
    with pytest.raises(ValueError, match="measured must be true or false, got 'no'"):
        sweep.read_options([str(config)])
    for values in ({"batch_size": "eight"}, {"size": 1.5}, {"resume": True}):
        config.write_text(json.dumps(values))
        with pytest.raises(SystemExit) as stopped:
            sweep.read_options([str(config)])
        name = next(iter(values)).replace("_", "-")
        assert stopped.value.code == 2 and f"--{name}" in capsys.readouterr().err


def test_the_prior_is_loaded_to_the_devices_that_share_it(toy, photo_folder, tmp_path, monkeypatch):
    meshes, load = [], pretrained.load_pretrained

    def watched(name, *, mesh, **options):
        meshes.append(mesh)
        return load(name, mesh=mesh, **options)

    monkeypatch.setattr(pretrained, "load_pretrained", watched)
    options = sweep.read_options(arguments(photo_folder, toy, tmp_path))
    host = share.Host(options, hosts.Place(0, 1))
    assert meshes == [host.mesh] and host.mesh.axis_names == ("data", "model")


RECORDS = """
import io
import numpy as np
from PIL import Image

rng = np.random.default_rng(0)
pixels = [rng.integers(0, 256, (20, 24, 3), dtype=np.uint8) for _ in range(5)]


def encoded(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


class Source:
    def __init__(self, first):
        self.records = [first, {"image": pixels[1], "label": 3}, {"image": encoded(pixels[2])}]
        self.records += [pixels[3] / np.float32(127.5) - 1, {"label": 1}, None]

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        if index == 5:
            raise OSError("disk gone")
        return self.records[index]


def photos():
    return Source(pixels[0])


class Other:
    photos = Source(pixels[4])


class Endless(Source):
    def __len__(self):
        import sys
        return sys.maxsize


class Iterable:
    def __iter__(self):
        return iter(pixels)


endless, iterable, empty = Endless(1), Iterable(), []
"""


@pytest.fixture
def record_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep_records.py").write_text(RECORDS)
    yield "sweep_records"
    sys.modules.pop("sweep_records", None)


def test_records_are_restored_as_the_files_they_would_be(record_module, toy, tmp_path, capsys):
    """Arrays and encoded images; bad ones are told, and those that changed are done again."""
    out = tmp_path / "out"
    assert sweep.main(arguments(f"{record_module}:photos", toy, out)) == 1
    printed = capsys.readouterr().err
    assert "4 was left out: record 4 has no 'image', only ['label']" in printed
    assert "5 was left out: record 5 cannot be read: OSError('disk gone')" in printed
    found = {row["name"]: row for row in table(out) if row["status"] == "restored"}
    assert sorted(found) == ["0", "1", "2", "3"]
    folder = tmp_path / "files"
    folder.mkdir()
    options = sweep.read_options(arguments(folder, toy, out))
    for name, pixels in enumerate(sys.modules[record_module].pixels[:4]):
        Image.fromarray(pixels).save(folder / f"{name}.png")
        job = batches.measure_image(options, str(name), folder / f"{name}.png")
        record = sources.Record(sys.modules[record_module].photos(), name)
        same = batches.measure_image(options, str(name), record)
        np.testing.assert_allclose(same.problem.photo, job.problem.photo, atol=1e-6)
        np.testing.assert_allclose(same.problem.y, job.problem.y, atol=1e-6)
        assert same.problem.source["sha256"] == found[str(name)]["sha256"]

    before = {path: path.read_bytes() for path in (out / "images").iterdir()}
    assert sweep.main(arguments(f"{record_module}:Other.photos", toy, out)) == 1
    changed = {path.name for path in before if path.read_bytes() != before[path]}
    assert changed == {"0.png"} and len(table(out)) == 6 + 3


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("sweep_recordz:photos", "No module named 'sweep_recordz'"),
        ("sweep_records:photoz", "no attribute 'photoz'"),
        ("sweep_records:endless", "it is Endless, length"),
        ("sweep_records:iterable", "no len"),
        ("sweep_records:empty", "it is list, length 0"),
    ],
)
def test_sources_that_are_none(record_module, toy, tmp_path, capsys, place, message):
    assert sweep.main(arguments(place, toy, tmp_path / "out")) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_two_processes_do_not_write_the_same_rows(photo_folder, toy, tmp_path, capsys):
    out = tmp_path / "out"
    with rows.alone(out / "rows-0000.jsonl"):
        assert sweep.main(arguments(photo_folder, toy, out)) == 2
        assert "another process is writing" in capsys.readouterr().err
        with rows.alone(out / "rows-0001.jsonl"):  # Another host's.
            pass
    assert not (out / "rows-0000.jsonl").exists()
    assert sweep.main(arguments(photo_folder, toy, out)) == 0


def test_a_cluster_is_asked_for_by_name(monkeypatch):
    calls = []

    def initialize(*given, initialization_timeout):
        calls.append(given)
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    nothing = {"seconds": 5, "fail": pytest.fail}
    assert hosts.join(None, None, None, **nothing) == hosts.Place(0, 1) and not calls
    with pytest.raises(ValueError, match="should be defined.; give --coordinator"):
        hosts.join(None, None, None, is_cluster=True, **nothing)
    assert calls == [(None, None, None)]


def test_out_of_memory_names_the_batch_that_fits(photo_folder, toy, tmp_path, capsys, monkeypatch):
    """Of 8 GiB free beside the models an image takes 1: half the batch is the first to try."""
    gib = 2**30
    analysis = SimpleNamespace(
        argument_size_in_bytes=2 * gib,
        temp_size_in_bytes=11 * gib,
        output_size_in_bytes=gib,
    )
    compiled = SimpleNamespace(memory_analysis=lambda: analysis)
    mesh = sharding.make_mesh(1, devices=jax.devices()[:1])
    monkeypatch.setattr(memory, "free_memory", lambda: 8 * gib)
    with pytest.raises(memory.MemoryShortage, match=r"12\.00 GiB.*8\.00.*set --batch-size 6"):
        memory.require_fitting(compiled, 12, mesh)
    monkeypatch.setattr(memory, "free_memory", lambda: 4 * gib)
    with pytest.raises(memory.MemoryShortage, match="set --batch-size 3"):  # A tenth stays free.
        memory.require_fitting(compiled, 12, mesh)
    monkeypatch.setattr(memory, "free_memory", lambda: gib)
    with pytest.raises(memory.MemoryShortage, match="not even one image"):
        memory.require_fitting(compiled, 12, mesh)
    monkeypatch.setattr(memory, "free_memory", lambda: 12 * gib)
    memory.require_fitting(compiled, 12, mesh)

    def exhausted(*_, config):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes")

    monkeypatch.setattr(share, "sample", exhausted)
    assert sweep.main(arguments(photo_folder, toy, tmp_path / "out")) == 2
    assert "out of memory with a batch of 2; set --batch-size 1" in capsys.readouterr().err


def test_the_smallest_batch_is_not_told_to_be_smaller():
    mesh = sharding.make_mesh(1, devices=jax.devices()[:1])
    assert "set --batch-size 1 " in memory.advice(None, 2, mesh)
    text = memory.advice(None, 1, mesh)
    assert "--batch-size" not in text and "--size" in text and "--num-model" in text


@pytest.mark.parametrize(
    ("room", "num_model", "cure"),
    [
        (24, 1, "18.00 GiB on each device, which has 24.00 GiB in all; .*--num-model 2"),
        (10, 1, "18.00 GiB on each device, which has 10.00 GiB in all; .*--num-model 4"),
        (10, 2, "10.00 GiB on each device, .*--num-model 4"),
        (4, 1, "not even a larger --num-model makes it fit the 8 device"),
        (None, 4, "6.00 GiB on each device; .*--num-model 8"),
    ],
)
def test_weights_that_do_not_fit_name_the_devices_that_would_hold_them(
    tmp_path, monkeypatch, room, num_model, cure
):
    """A prior of 16 GiB and a codec of 2 on some of 8 devices."""
    gib = 2**30
    stats = None if room is None else {"bytes_limit": room * gib}
    device = SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
    mesh = SimpleNamespace(
        devices=np.full((1, num_model), device), shape={"data": 1, "model": num_model}
    )
    sizes = {"prior": 16 * gib, "codec": 2 * gib}
    monkeypatch.setattr(memory, "_weight_bytes", lambda model, section: sizes[section])
    monkeypatch.setattr(memory.jax, "local_devices", lambda: [device] * 8)
    with pytest.raises(memory.MemoryShortage, match=cure), memory.loading("model", mesh):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes")
    with pytest.raises(RuntimeError, match="a bug"), memory.loading("model", mesh):
        raise RuntimeError("a bug")


def test_out_of_memory_while_loading_is_one_line(photo_folder, toy, tmp_path, monkeypatch, capsys):
    model = pretrained.load_pretrained(toy)
    weights = sum(
        leaf.nbytes
        for path in ("prior", "codec")
        for leaf in jax.tree.leaves(safetensors.numpy.load_file(toy / f"{path}.safetensors"))
    )
    assert memory._weight_bytes(toy, "prior") + memory._weight_bytes(toy, "codec") == weights

    def exhausted(name, **options):
        raise MemoryError

    monkeypatch.setattr(pretrained, "load_pretrained", exhausted)
    assert sweep.main(arguments(photo_folder, toy, tmp_path / "out")) == 2
    printed = capsys.readouterr().err
    assert f"while the weights of {toy} were loaded" in printed and printed.count("\n") == 1
    monkeypatch.setattr(pretrained, "load_pretrained", lambda name, **options: model)
    monkeypatch.setattr(share.report, "scores", lambda *_: exhausted(""))
    assert sweep.main(arguments(photo_folder, toy, tmp_path / "out")) == 2
    assert "out of memory; set a smaller --batch-size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
    ],
)
def test_schedulers_are_recognised(environment, expected):
    assert hosts.scheduled(environment) is expected


def start(*words, num_devices=1):
    flags = f"--xla_force_host_platform_device_count={num_devices}"
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.sweep", *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        stderr=subprocess.PIPE,
        text=True,
    )


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.slow
def test_a_host_dies_and_a_rerun_finishes(photo_folder, tiny_model, tmp_path):
    """Two processes meet through JAX's runtime; one is killed, the other finishes all the same."""
    out, address = tmp_path / "out", free_address()
    words = arguments(photo_folder, tiny_model, out, "--batch-size", "1")
    # Long enough for a kill in the middle: the next image takes far longer than the poll below.
    words[words.index("--num-inner-steps") + 1] = "400"
    both = [
        start(*words, "--coordinator", address, "--num-processes", 2, "--process-id", index)
        for index in range(2)
    ]
    log, deadline = out / "rows-0001.jsonl", time.monotonic() + 300
    while not (log.exists() and log.read_text().count("\n") >= 1):
        assert both[1].poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    both[1].send_signal(signal.SIGKILL)
    messages = [process.communicate(timeout=400)[1] for process in both]
    assert [process.returncode for process in both] == [0, -signal.SIGKILL], messages
    survivor = rows.read(out / "rows-0000.jsonl")
    assert [row["name"] for row in survivor] == NAMES[0::2]
    finished = len(rows.read(log))
    assert 1 <= finished < 4
    before = {path: path.stat().st_mtime_ns for path in (out / "images").rglob("*.png")}

    assert start(*words).wait(timeout=400) == 0
    names = [row["name"] for row in table(out)]
    assert sorted(names) == NAMES  # Each once: nothing was done twice.
    recomputed = [path for path, mtime in before.items() if path.stat().st_mtime_ns != mtime]
    assert len(recomputed) <= 1  # An image that was killed between itself and its row.

    alone = tmp_path / "alone"
    words[words.index("--out") + 1] = str(alone)
    assert start(*words).wait(timeout=400) == 0
    one, two = pixels(alone), pixels(out)
    for name in NAMES:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


@pytest.mark.slow
def test_results_do_not_depend_on_devices(photo_folder, tiny_model, tmp_path):
    """One device, two that share the images, and two that share the prior."""
    for name, more in {"1": (), "2x1": (), "1x2": ("--num-model", "2")}.items():
        words = arguments(photo_folder, tiny_model, tmp_path / name, *more)
        process = start(*words, num_devices=1 if name == "1" else 2)
        assert process.wait(timeout=400) == 0, process.stderr.read()
    one = pixels(tmp_path / "1")
    for name in ("2x1", "1x2"):
        for image, found in pixels(tmp_path / name).items():
            np.testing.assert_allclose(found, one[image], atol=1, err_msg=f"{name} {image}")


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_a_host_that_never_joins_is_an_error(photo_folder, tiny_model, tmp_path, index):
    words = arguments(photo_folder, tiny_model, tmp_path / "out", "--join-seconds", "3")
    words += ["--coordinator", free_address(), "--num-processes", "2", "--process-id", str(index)]
    process = start(*words)
    message = process.communicate(timeout=120)[1]
    assert process.returncode == 2
    assert "not all processes met at 127.0.0.1" in message.splitlines()[-1]
    assert "--join-seconds" in message and "Traceback" not in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("is_folder", [False, True])
def test_one_result_that_cannot_be_written_is_that_images_row(
    photo_folder, toy, tmp_path, monkeypatch, capsys, is_folder
):
    """But where the folder itself takes nothing, the sweep ends."""
    out, save = tmp_path / "out", share.images.save_image

    def refused(path, image):
        if path.name.startswith("1.png"):
            raise OSError(errno.ENOSPC if is_folder else errno.ENAMETOOLONG, "not this one")
        save(path, image)

    monkeypatch.setattr(share.images, "save_image", refused)
    code = sweep.main(arguments(photo_folder, toy, out))
    if is_folder:
        assert code == 2 and "not this one" in capsys.readouterr().err
        return
    assert code == 1
    status = {row["name"]: row["status"] for row in table(out)}
    assert {name for name, found in status.items() if found == "unwritable"} == {
        name for name in NAMES if name.endswith("1.png")
    }
    assert sum(found == "restored" for found in status.values()) == len(NAMES) - 2
