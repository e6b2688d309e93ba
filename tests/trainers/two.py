"""Two processes with gloo that a test starts, as torchrun would start two ranks."""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
ROOT = Path(__file__).parents[2]


def on_two(function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """What function(*args) gives on each of two ranks, from one seed."""
    path = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), path)))
    try:
        mp.spawn(_run, args=(str(folder), function.__module__, function.__qualname__, args), nprocs=WORLD)
    finally:
        os.environ["PYTHONPATH"] = path
    return [torch.load(folder / f"of rank {rank}", weights_only=False) for rank in range(WORLD)]


def _run(rank: int, folder: str, module: str, name: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, init_method=f"file://{folder}/store")
    found = getattr(importlib.import_module(module), name)(*args)
    torch.save(found, f"{folder}/of rank {rank}")
    dist.destroy_process_group()
