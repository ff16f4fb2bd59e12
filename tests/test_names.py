"""Names of files and folders as people, cameras and archives write them."""

import json
import os
import shlex

import pytest

from aps_jax.cli import program
from aps_jax.cli.options import Restore, command_of
from aps_jax.cli.sweep.share import _with_suffix
from aps_jax.cli.sweep.sources import named_images
from aps_jax.io.files import list_images, write_atomically, write_json

LATIN = os.fsdecode(b"caf\xe9.png")


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def listed(folder):
    return [path.relative_to(folder).as_posix() for path in list_images([folder])]


def test_companions_folders_and_other_files_are_no_images(tmp_path):
    touch(tmp_path / "a.png", tmp_path / "._a.png", tmp_path / "set.png" / "b.JPG")
    touch(tmp_path / "__MACOSX" / "._a.png", tmp_path / "notes.txt", tmp_path / LATIN)
    os.mkfifo(tmp_path / "pipe.png")  # Reading it would wait for ever.
    assert listed(tmp_path) == ["a.png", LATIN, "set.png/b.JPG"]


def test_links_are_followed_once(tmp_path):
    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    touch(photos / "z" / "a.png", elsewhere / "c.png")
    (photos / "linked").symlink_to(elsewhere, target_is_directory=True)
    (photos / "again").symlink_to(elsewhere, target_is_directory=True)
    (photos / "a-cycle").symlink_to(photos, target_is_directory=True)
    (photos / "b-inside").symlink_to(photos / "z", target_is_directory=True)
    (elsewhere / "back").symlink_to(tmp_path, target_is_directory=True)
    (photos / "gone.png").symlink_to(tmp_path / "nowhere.png")
    # The missing photo is named, so that its row can say what is wrong with it.
    assert listed(photos) == ["again/c.png", "gone.png", "z/a.png"]


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127, "a\nb", LATIN, "-x"])
def test_any_name_is_written_and_leaves_no_other_file(tmp_path, name):
    write_atomically(tmp_path / name, b"1")
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_bytes() == b"1"


def test_names_that_are_no_utf8_can_be_had_back_from_json(tmp_path):
    write_json(tmp_path / "a.json", {"path": LATIN, "other": "é"})
    text = (tmp_path / "a.json").read_text("utf-8")
    values = json.loads(text)
    assert os.fsencode(values["path"]) == b"caf\xe9.png" and values["other"] == "é"


@pytest.mark.parametrize(
    "values",
    [
        {"image": "-x.png"},
        {"image": "a b'c\n.png", "out": "-out"},
        {"image": LATIN, "prompt": "-a cat", "kernel": "-k.npy", "task": "blur"},
        {"option": ("learning_rate=-1", "keep_best=true"), "seed": 3},
    ],
)
def test_the_recorded_command_gives_the_same_options(values):
    from pathlib import Path

    paths = {"image", "out", "kernel"}
    given = {name: Path(v) if name in paths else v for name, v in values.items()}
    words = shlex.split(json.loads(json.dumps(command_of(Restore(**given)))))
    again = program._parse(words[1:])
    assert again == Restore(**given)


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_lists_hold_names_of_any_bytes(tmp_path, start):
    touch(tmp_path / "a.png", tmp_path / LATIN, tmp_path / " spaced.png ")
    lines = b"a.png\r\ncaf\xe9.png\n spaced.png \n\n"
    (tmp_path / "list.txt").write_bytes(start + lines)
    assert set(named_images(tmp_path / "list.txt")) == {"a.png", LATIN, " spaced.png "}


def test_lists_of_windows_editors(tmp_path):
    touch(tmp_path / "é.png")
    (tmp_path / "list.txt").write_bytes("é.png\r\n".encode("utf-16"))
    assert list(named_images(tmp_path / "list.txt")) == ["é.png"]


def test_results_of_long_names_have_names_that_fit_and_differ():
    one, two = _with_suffix("é" * 125 + "a.png"), _with_suffix("é" * 125 + "b.png")
    assert one != two and max(len(os.fsencode(name)) for name in (one, two)) <= 255
    assert _with_suffix("a.png") == "a.png.png" and _with_suffix("n" * 251) == "n" * 251 + ".png"
