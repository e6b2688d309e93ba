"""A set as a stream that ranks and workers share: every row once, in the same order for the same seed and epoch."""

import os
import sys
from collections.abc import Iterator
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset, get_worker_info

from topk_rkl import checks
from topk_rkl.store.rows import Row
from topk_rkl.store.store import Store

Uneven = Literal["refuse", "keep", "drop", "repeat"]


class StoreDataset(IterableDataset[Row]):
    """The rows of one rank, for a DataLoader whose workers share them.

    Trainers that divide rows among ranks themselves, as accelerate and that of transformers do, take a `Store` instead.

    Args:
        store: a `Store`, or the folder of one.
        shuffle: a new order of all rows in each epoch; False keeps that of the set.
        seed: of that order, the same on all ranks.
        rank, world_size: of this process; None takes those of torch.distributed where it is initialised, else 0 and 1.
            They are refused beside accelerate, which would divide a rank's rows once more.
        uneven: what becomes of rows that ranks cannot share evenly; DDP hangs where ranks have unequal counts.
            "refuse" raises. "keep" gives some ranks one more. "drop" leaves out fewer than world_size rows at the end
            of the order. "repeat" gives the first rows of the order again.

    Raises:
        TypeError, ValueError: an argument is not as above.
        RuntimeError: accelerate runs on several ranks, and rank is None; at the first iteration too.
    """

    def __init__(
        self,
        store: Store | str | os.PathLike[str],
        *,
        shuffle: bool = False,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        uneven: Uneven = "refuse",
    ) -> None:
        checks.require_flag("shuffle", shuffle)
        checks.require_one_of("uneven", uneven, get_args(Uneven))
        self.seed = _require_counted("seed", seed)
        self.rank, self.world_size = _place(rank, world_size)
        self._asked_for = rank is not None
        self._require_undivided()
        self.store = store if isinstance(store, Store) else Store(store)
        self.shuffle, self.uneven = shuffle, uneven
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that stay see a new epoch
        left = len(self.store) % self.world_size
        if left and uneven == "refuse":
            raise ValueError(
                f"uneven is 'refuse', and {len(self.store)} rows do not divide by world_size = {self.world_size}; "
                f"choose 'drop' to leave out {left} of them, 'repeat' to give {self.world_size - left} twice, or "
                "'keep' where unequal counts are right"
            )

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is that of this epoch, in workers that are there already too."""
        self._epoch.fill_(_require_counted("epoch", epoch))

    def __len__(self) -> int:
        """Rows of this rank."""
        return len(self._mine())

    def __iter__(self) -> Iterator[Row]:
        self._require_undivided()
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for index in self._order()[self._mine()][first::step].tolist():
            yield self.store[index]

    def _require_undivided(self) -> None:
        """Accelerate divides what is iterable among ranks, whether or not it is divided already."""
        state = sys.modules.get("accelerate.state")
        if self.world_size > 1 and not self._asked_for and state is not None and state.is_initialized():
            raise RuntimeError(
                f"accelerate, on which the Trainer of transformers runs, would divide the rows of rank {self.rank} "
                f"among {self.world_size} ranks again; give it the Store, or StoreDataset(..., rank=0, world_size=1). "
                f"Where it does not prepare this loader, pass rank={self.rank}, world_size={self.world_size}"
            )

    def _order(self) -> torch.Tensor:  # (rows,)
        """Of all rows: those of all ranks, so that they share one."""
        rows = len(self.store)
        if not self.shuffle:
            return torch.arange(rows)
        draw = torch.Generator().manual_seed(self.seed + int(self._epoch))
        return torch.randperm(rows, generator=draw)

    def _mine(self) -> torch.Tensor:  # (n,)
        """This rank's places in the order."""
        rows = len(self.store)
        end = rows - {"drop": rows % self.world_size, "repeat": -(-rows % self.world_size)}.get(self.uneven, 0)
        return torch.arange(self.rank, max(end, self.rank), self.world_size) % rows


def _require_counted(name: str, value: object) -> int:
    value = checks.require_integer(name, value)
    if not 0 <= value < 2**62:
        raise ValueError(f"{name} is {value}; it must be from 0 to 2**62 - 1")
    return value


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank is {rank} and world_size {world_size}; give both, or neither")
    if rank is None or world_size is None:
        there = dist.is_available() and dist.is_initialized()
        return (dist.get_rank(), dist.get_world_size()) if there else (0, 1)
    rank, world_size = checks.require_integer("rank", rank), checks.require_integer("world_size", world_size)
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}; it must be at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}; it must be from 0 to {world_size - 1}, below world_size")
    return rank, world_size
