"""Rows as a teacher's, and sets of them, for the tests of topk_rkl.store. Run as a program it writes sets: `write`."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from topk_rkl.store import Header, Row, Writer
from topk_rkl.support import Support

K, V = 4, 50
HEADER = Header(K, V, "a teacher", "0" * 64, "some data")
SHARDS, PER_SHARD = 2, 5


def rows(
    count: int, seed: int = 0, header: Header = HEADER, masked: bool = True, dtype: torch.dtype = torch.float16
) -> list[Row]:
    """Of 1 to 6 tokens, with the log-probs of random logits, rounded to dtype; the last slot of each row is empty."""
    draw = torch.Generator().manual_seed(seed)

    def row(i: int) -> Row:
        tokens = torch.randint(header.vocab_size, (1 + i % 6,), generator=draw)
        logits = 3 * torch.randn(len(tokens), header.vocab_size, generator=draw)
        log_probs, ids = logits.log_softmax(-1).topk(header.k)
        log_probs[-1, -1], ids[-1, -1] = -torch.inf, -1
        mask = torch.rand(len(tokens), generator=draw) < 0.7 if masked else None
        return Row(tokens, Support(ids.int(), log_probs.to(dtype).float(), header.normalized), mask)

    return [row(i) for i in range(count)]


def same(a: Row, b: Row) -> bool:
    masks = (a.loss_mask is None) == (b.loss_mask is None)
    if masks and a.loss_mask is not None:
        masks = torch.equal(a.loss_mask, b.loss_mask)
    pairs = zip((a.input_ids, *a.support.tensors), (b.input_ids, *b.support.tensors), strict=True)
    return masks and a.support.normalized == b.support.normalized and all(torch.equal(x, y) for x, y in pairs)


def written(folder: Path, count: int = 12, per_shard: int = 5, header: Header = HEADER, **options: Any) -> list[Row]:
    """A finished set in the folder, and its rows."""
    made = rows(count, header=header, **options)
    with Writer(folder, header) as writer:
        for first in range(0, count, per_shard):
            writer.append(made[first : first + per_shard])
        writer.finish()
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def write(folder: Path, killed_before: int = -1) -> None:
    """Goes on with a set of SHARDS shards; the process is killed before that call of an fsync or a rename."""
    calls = 0

    def counted(real: Any) -> Any:
        def call(*given: Any) -> Any:
            nonlocal calls
            if calls == killed_before:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
            return real(*given)

        return call

    os.fsync, os.rename = counted(os.fsync), counted(os.rename)
    made = rows(SHARDS * PER_SHARD)
    with Writer(folder, HEADER) as writer:
        while writer.rows < len(made):
            writer.append(made[writer.rows : writer.rows + PER_SHARD])
        writer.finish()
    print(calls, flush=True)


def write_each(moments: list[str]) -> None:
    """`write` in a child per folder and moment; torch has no threads yet, so that a child may be forked."""
    torch.set_num_threads(1)
    for folder, moment in zip(moments[::2], moments[1::2], strict=True):
        child = os.fork()
        if child == 0:
            write(Path(folder), int(moment))
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != (0 if moment == "-1" else -signal.SIGKILL):
            sys.exit(f"{folder} at {moment}: {status}")


if __name__ == "__main__":
    write_each(sys.argv[1:])
