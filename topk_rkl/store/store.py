"""Reads a set: shards are mapped into memory, and a row is decoded when it is asked for."""

import os
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset

from topk_rkl import checks
from topk_rkl.store import files
from topk_rkl.store.files import AGAIN, FORMAT, Shard
from topk_rkl.store.header import Header
from topk_rkl.store.rows import Row, Tensors, decoded, layout, wide
from topk_rkl.vocabulary import tokenizer_hash

Check = Literal["fast", "full"]
Opened = tuple[Tensors, list[int]]  # and the offsets, as ints


class Store(Dataset[Row]):
    """A set as a map-style dataset: len(store), store[i], and iteration.

    The samplers of a DataLoader and of the Trainer of transformers share its rows among ranks and workers.

    Args:
        folder: that `Writer` wrote to.
        check: "fast" compares each file with the manifest: its length, its header, and the dtype and the shape of each
            tensor. "full" also reads each file: its hash, and that ids and log-probs are in their bounds.
        partial: opens a set that is not finished too, as far as it is written.
        tokenizer: the student's, which must give ids the meaning that they have in the set; None does not compare it.

    Raises:
        FileNotFoundError: the folder has no manifest, or lacks a shard.
        TypeError, ValueError: an argument is not as above, the set is unfinished, or a file is damaged or foreign.
        ModuleNotFoundError: safetensors is not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        check: Check = "fast",
        partial: bool = False,
        tokenizer: Any = None,
    ) -> None:
        self.folder = files.as_folder(folder)
        checks.require_one_of("check", check, get_args(Check))
        checks.require_flag("partial", partial)
        files.safetensors()
        self._manifest = files.read_manifest(self.folder)
        if not self._manifest.complete and not partial:
            raise ValueError(
                f"the set in {self.folder} is unfinished, with {self._manifest.rows} rows; go on with Writer and call "
                "finish(), or open what is there: Store(folder, partial=True)"
            )
        if not partial:
            files.require_no_foreign(self.folder)
            files.require_no_leftovers(self.folder, self._manifest)
        files.require_sizes(self.folder, self.shards)
        self._ends = list(accumulate(shard.rows for shard in self.shards))
        self._opened: dict[int, Opened] = {}
        for index in range(len(self.shards)):
            self._open(index)
        if tokenizer is not None:
            self.require_tokenizer(tokenizer)
        if check == "full":
            self.check()

    @property
    def header(self) -> Header:
        return self._manifest.header

    @property
    def shards(self) -> list[Shard]:
        """What the manifest says of each file."""
        return self._manifest.shards

    @property
    def bytes(self) -> int:
        """Of all shards."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def positions(self) -> int:
        """Tokens of all rows."""
        return sum(shard.positions for shard in self.shards)

    def __len__(self) -> int:
        return self._manifest.rows

    def __getitem__(self, index: int) -> Row:
        i = checks.require_integer("index", index)
        if not -len(self) <= i < len(self):
            raise IndexError(f"index is {i}; the set in {self.folder} has {len(self)} rows")
        i %= len(self)
        shard = bisect_right(self._ends, i)
        tensors, offsets = self._open(shard)
        row = i - self._ends[shard] + self.shards[shard].rows
        return decoded(tensors, offsets[row], offsets[row + 1], self.header.normalized)

    def __iter__(self) -> Iterator[Row]:
        for shard in range(len(self.shards)):
            tensors, offsets = self._open(shard)
            for first, last in pairwise(offsets):
                yield decoded(tensors, first, last, self.header.normalized)

    def check(self) -> None:
        """Reads every file, and refuses by its name one that is not as it was written."""
        for index, shard in enumerate(self.shards):
            path = self.folder / shard.name
            found = files.digest(path)
            if found != shard.sha256:
                raise ValueError(f"{path} has SHA-256 {found} and the manifest says {shard.sha256}; {AGAIN}")
            _require_bounds(path, self._open(index)[0], self.header)

    def require_tokenizer(self, tokenizer: Any) -> None:
        """Refuses a tokenizer of another hash than the one that made the set's tokens."""
        found = tokenizer_hash(tokenizer)
        if found != self.header.tokenizer:
            raise ValueError(
                f"tokenizer has the hash {found} and the set in {self.folder} {self.header.tokenizer}; ids mean other "
                "tokens: give the tokenizer that the set was made with"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": {}}  # a worker maps the files itself

    def _open(self, index: int) -> Opened:
        if index not in self._opened:
            self._opened[index] = _mapped(self.folder / self.shards[index].name, self.shards[index], index, self.header)
        return self._opened[index]


def _mapped(path: Path, shard: Shard, index: int, header: Header) -> Opened:
    safetensors = files.safetensors()
    try:
        with safetensors.safe_open(path, "pt") as file:
            said, names = (file.metadata() or {}).get(FORMAT), set(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole file of safetensors ({error}); {AGAIN}") from None
    if said != files.shard_metadata(header, index)[FORMAT]:
        raise ValueError(f"{path} is a shard of another set, or of another place in it: it says {said}; {AGAIN}")
    want = layout(header, shard.rows, shard.positions)
    if names | {"loss_mask"} != want.keys():
        raise ValueError(f"{path} holds {', '.join(sorted(names))}; {AGAIN}")
    for name, x in tensors.items():
        if (x.dtype, tuple(x.shape)) != want[name]:
            raise ValueError(f"{path} holds {name} as {x.dtype} {tuple(x.shape)}, not {want[name]}; {AGAIN}")
    offsets = tensors.pop("offsets").tolist()
    if offsets[0] != 0 or offsets[-1] != shard.positions or any(a >= b for a, b in pairwise(offsets)):
        raise ValueError(f"{path} has offsets that do not grow from 0 to {shard.positions}; {AGAIN}")
    return tensors, offsets


def _require_bounds(path: Path, tensors: Tensors, header: Header) -> None:
    """Of what a writer never writes, hashes tell nothing: files that others made may hold it."""
    ids, log_probs = wide(tensors["ids"], torch.int32), tensors["log_probs"]
    tokens = wide(tensors["input_ids"], torch.int32)
    empty = log_probs == -torch.inf
    wrong = {
        "ids": _outside(ids, -1, header.vocab_size) or bool(((ids == -1) != empty).any()),
        "input_ids": _outside(tokens, 0, header.vocab_size),
        "log_probs": bool((~log_probs.isfinite() & ~empty).any()),
    }
    for name, found in wrong.items():
        if found:
            raise ValueError(f"{path} has {name} out of their bounds, for V = {header.vocab_size}; {AGAIN}")


def _outside(ids: Tensor, low: int, end: int) -> bool:
    least, most = ids.aminmax()
    return bool(least < low) or bool(most >= end)
