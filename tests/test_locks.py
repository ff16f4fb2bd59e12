"""One process at a time writes a folder; whoever is killed leaves nothing that blocks."""

import subprocess
import sys

import pytest

from aps_jax.io import rows
from aps_jax.io.locks import InUseError, held

HOLD = """
import pathlib, sys, time
from aps_jax.io.locks import held
with held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("name", ["folder", "rows.jsonl", "n" * 255])
def test_a_second_process_is_refused_until_the_first_ends_however_it_ends(tmp_path, name):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    process = holder(path)
    with pytest.raises(InUseError, match="another process is writing"):
        with held(path):
            pass
    process.kill()
    process.wait()
    with held(path):
        pass
    left = [found for found in tmp_path.rglob("*") if found != path]
    assert not left


def test_locks_of_different_paths_do_not_meet(tmp_path):
    with held(tmp_path / "a"), held(tmp_path / "b"):
        pass


def test_a_log_is_locked_by_the_same_lock(tmp_path):
    with rows.alone(tmp_path / "rows.jsonl"):
        with pytest.raises(InUseError, match="rows.jsonl"):
            with held(tmp_path / "rows.jsonl"):
                pass
