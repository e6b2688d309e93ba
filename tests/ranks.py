"""Functions on several ranks: four processes with gloo, started once, of which a test takes the first 1 to 4.

def halves(group, x): ...            # at the top of a test's file; runs on every rank

results = on_ranks(2, halves, x)     # a result per rank, in the order of the ranks
"""

import atexit
import importlib
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.processes import HANGS

WORLD = 4
AFTER_A_FAILURE = 10  # seconds that the other ranks have, which may wait for the one that failed
# On one worker of pytest, which starts the processes once.
together = pytest.mark.xdist_group("ranks")


class Failed(Exception):
    """What a rank raised, by name and message: a test says which it expects."""


class Ranks:
    """The processes; one that dies takes the others with it, and the next call starts new ones."""

    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self.store = tempfile.mkdtemp()
        pipes = [context.Pipe() for _ in range(WORLD)]
        kept = {name: os.environ.get(name) for name in ("TRITON_INTERPRET", "OMP_NUM_THREADS")}
        os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        try:
            self.processes = [
                context.Process(target=_serve, args=(rank, pipes[rank][1], self.store), daemon=True)
                for rank in range(WORLD)
            ]
            for process in self.processes:
                process.start()
        finally:
            for name, value in kept.items():
                os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
        self.pipes = [ours for ours, _ in pipes]

    def run(self, world: int, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        call = world, function.__module__, function.__qualname__, args, torch.initial_seed()
        for pipe in self.pipes:
            pipe.send(call)
        waiting, answers, failed = dict(zip(self.pipes, range(WORLD))), {}, []
        while waiting:
            ready = connection.wait(list(waiting), AFTER_A_FAILURE if failed else HANGS)
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    good, answers[rank] = pipe.recv()
                except EOFError:
                    good, answers[rank] = False, "died"
                if not good:
                    failed.append(f"rank {rank}: {answers[rank]}")
            if not ready or "died" in answers.values():
                stop()
                raise Failed("\n".join([*failed, *(f"rank {rank} waits for others" for rank in waiting.values())]))
        if failed:
            raise Failed("\n".join(failed))
        return [answers[rank] for rank in range(world)]


_ranks: Ranks | None = None


def on_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """function(group, *args) on each of the first `world` ranks, all from the seed of the test."""
    global _ranks
    if _ranks is None:
        _ranks = Ranks()
    return _ranks.run(world, function, args)


@atexit.register
def stop() -> None:
    global _ranks
    if _ranks is not None:
        for process in _ranks.processes:
            process.kill()
    _ranks = None


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _serve(rank: int, pipe: Any, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=HANGS)
    )
    groups = {world: dist.new_group(list(range(world))) for world in range(1, WORLD + 1)}
    while True:
        world, module, name, args, seed = pipe.recv()
        torch.manual_seed(seed)
        try:
            function = getattr(importlib.import_module(module), name)
            answer = True, function(groups[world], *args) if rank < world else None
        except (Exception, pytest.fail.Exception) as error:  # the latter of pytest.raises
            answer = False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        pipe.send(answer)
