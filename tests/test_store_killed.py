"""Promise: stored sets. A writer that is killed at any moment loses no finished shard, and repeats none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stored import HEADER, PER_SHARD, SHARDS, contents, rows, same
from topk_rkl.store import Store, Writer

ROOT = Path(__file__).parent.parent
CALLS = 3 * (1 + 2 * SHARDS + 1)  # fsync, rename and the folder's fsync of the manifest, of each shard, and at the end


def program(*moments: object) -> str:
    """What `write_each` prints in a process of its own."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.stored", *map(str, moments)],
        env={**os.environ, "PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_writer_killed_before_any_call_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    folders = [tmp_path / str(moment) for moment in range(CALLS)]
    whole = tmp_path / "whole"
    killed = [x for moment, folder in enumerate(folders) for x in (folder, moment)]
    assert program(whole, -1, *killed).split() == [str(CALLS)]
    made, orphans = rows(SHARDS * PER_SHARD), 0
    for moment, folder in enumerate(folders):
        stored = PER_SHARD * min(max(moment - 2, 0) // 6, SHARDS)  # a shard counts once the manifest that names it does
        assert (folder / "manifest.json").exists() == (moment >= 2)
        if moment >= 2:
            partial = list(Store(folder, check="full", partial=True))
            assert len(partial) == stored and all(same(a, b) for a, b in zip(partial, made))
        orphans += len(list(folder.glob("shard-*.safetensors"))) > stored // PER_SHARD
        if moment % 2:  # of the others the next process is the first to look
            with Writer(folder, HEADER) as writer:
                assert writer.rows == stored and writer.complete == (moment >= CALLS - 1)
    assert orphans == 3 * SHARDS  # between the rename of a shard and that of the manifest
    program(*[x for folder in folders for x in (folder, -1)])
    assert [folder.name for folder in folders if contents(folder) != contents(whole)] == []
    assert len(Store(whole, check="full")) == SHARDS * PER_SHARD


def test_what_a_killed_writer_leaves_is_cleaned(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    with Writer(folder, HEADER) as writer:
        writer.append(rows(3))
    for name in ("shard-00001.safetensors", "shard-00001.safetensors.tmp", "manifest.json.tmp"):
        (folder / name).write_bytes(b"half")
    assert len(Store(folder, partial=True)) == 3
    Writer(folder, HEADER).close()
    assert sorted(contents(folder)) == ["manifest.json", "shard-00000.safetensors", "writer.lock"]


def test_two_writers_at_once_are_refused_and_a_killed_one_blocks_nobody(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    with Writer(folder, HEADER), pytest.raises(BlockingIOError, match=r"another writer has .* open; wait for it"):
        Writer(folder, HEADER)
    holding = (
        "import sys, pathlib, tests.stored as s\n"
        "writer = s.Writer(sys.argv[1], s.HEADER)\n"
        "print('open', flush=True)\n"
        "sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", holding, str(folder)], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout.readline() == "open\n"
        with pytest.raises(BlockingIOError, match="another writer"):
            Writer(folder, HEADER)
    finally:
        child.kill()
        child.communicate()
    with Writer(folder, HEADER) as writer:
        assert writer.rows == 0
