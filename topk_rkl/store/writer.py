"""Writes a set shard by shard, so that a process that is stopped at any moment goes on where it ended."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from topk_rkl.store import files
from topk_rkl.store.files import LOCK, MANIFEST, Manifest, Shard, shard_name
from topk_rkl.store.header import Header, require_header, require_same_header
from topk_rkl.store.rows import Row, encoded, require_rows


class Writer:
    """Creates a set, or goes on with one.

    A shard is written under another name, then gets its own, then the manifest names it. A process that is killed
    loses the shard it was writing and no other. `writer.rows` tells the next process which row comes next.

    with Writer(folder, header) as writer:
        for rows in batches_from(writer.rows):
            writer.append(rows)
        writer.finish()

    Args:
        folder: of the set alone; it is made where it is not there.
        header: that of all rows; where some are stored already, the same.

    Raises:
        TypeError, ValueError: an argument is not as above, the folder holds other files, its set has another header,
            or one of its shards is damaged.
        BlockingIOError: another writer has the folder open.
        OSError: the folder cannot be written to or locked, or there is no room. What is stored stays.
        ModuleNotFoundError: safetensors is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], header: Header) -> None:
        self.folder = files.as_folder(folder)
        require_header(header)
        self._safetensors = files.safetensors()
        if self.folder.exists():
            if not self.folder.is_dir():
                raise ValueError(f"folder is {self.folder}, a file; give a folder")
            files.require_no_foreign(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock: IO[bytes] | None = _locked(self.folder)
        try:
            self._manifest = self._found(header)
        except BaseException:
            self.close()
            raise

    @property
    def header(self) -> Header:
        return self._manifest.header

    @property
    def rows(self) -> int:
        """How many rows are stored."""
        return self._manifest.rows

    @property
    def complete(self) -> bool:
        """Whether `finish` was called."""
        return self._manifest.complete

    def append(self, rows: Sequence[Row]) -> None:
        """Stores the rows as one shard; once it returns they survive a crash.

        Shards of some 100 MB read fast and lose little. All tensors are on a CPU.

        Args:
            rows: at least one `Row` of the header's k, vocab_size and normalized.

        Raises:
            TypeError, ValueError: a row is not as its header says, or has a log-prob that the header's dtype cannot
                hold. Nothing is written then.
            RuntimeError: the set is complete, or the writer is closed.
        """
        self._require_open()
        if self.complete:
            raise RuntimeError(f"the set in {self.folder} is complete; write further rows to another folder")
        require_rows(rows, self.header)
        index, tensors = len(self._manifest.shards), encoded(rows, self.header)
        data = self._safetensors.torch.save(tensors, files.shard_metadata(self.header, index))
        files.write_durably(self.folder / shard_name(index), data)
        positions = int(tensors["offsets"][-1])
        shard = Shard(shard_name(index), len(rows), positions, len(data), hashlib.sha256(data).hexdigest())
        self._write(Manifest(self.header, [*self._manifest.shards, shard]))

    def finish(self) -> None:
        """Marks the set as complete, so that `Store` opens it, and closes the writer."""
        self._require_open()
        if not self.rows:
            raise RuntimeError(f"the set in {self.folder} has no rows; append some before it is finished")
        if not self.complete:
            self._write(Manifest(self.header, self._manifest.shards, complete=True))
        self.close()

    def close(self) -> None:
        """Lets another writer go on; the set stays unfinished unless `finish` was called."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _found(self, header: Header) -> Manifest:
        """The manifest of the set that is there, without what a stopped writer left; a new one where there is none."""
        there = (self.folder / MANIFEST).exists()
        if not there:
            self._require_new()
        manifest = files.read_manifest(self.folder) if there else Manifest(header)
        if manifest.shards:
            require_same_header(f"the set in {self.folder}", manifest.header, header)
        elif not there or manifest.header != header:  # a set without rows is of any header
            manifest = Manifest(header)
            files.write_durably(self.folder / MANIFEST, manifest.text().encode())
        files.require_sizes(self.folder, manifest.shards)
        for path in files.leftovers(self.folder, manifest):
            path.unlink()
        return manifest

    def _require_new(self) -> None:
        shards = sorted(self.folder.glob(f"{files.PREFIX}*{files.SUFFIX}"))
        if shards:
            raise ValueError(
                f"{self.folder} has {shards[0].name} and no {MANIFEST}; restore the manifest, or give another folder"
            )

    def _write(self, manifest: Manifest) -> None:
        files.write_durably(self.folder / MANIFEST, manifest.text().encode())
        self._manifest = manifest

    def _require_open(self) -> None:
        if self._lock is None:
            raise RuntimeError(f"the writer of {self.folder} is closed; make another: Writer(folder, header)")


def _locked(folder: Path) -> IO[bytes]:
    """A lock of the operating system, which ends with the process that holds it, however that ends."""
    import fcntl  # not on Windows

    file = (folder / LOCK).open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise BlockingIOError(
            f"another writer has {folder} open; wait for it to end, or give each writer a folder of its own"
        ) from None
    except OSError as error:
        file.close()
        told = f"{folder} cannot be locked, {error.strerror}; write to a local disk, and copy the finished set"
        raise OSError(error.errno, told) from None
    return file
