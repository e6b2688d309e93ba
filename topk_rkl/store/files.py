"""The files of a set: a manifest, and shards that are whole once they have their names."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from topk_rkl import checks
from topk_rkl.store.header import Header

FORMAT, VERSION = "topk_rkl.store", 1
MANIFEST, LOCK = "manifest.json", "writer.lock"
TEMPORARY = ".tmp"  # the end of a name until the file is whole
PREFIX, SUFFIX = "shard-", ".safetensors"
AGAIN = "restore it from a copy, or write the set again into another folder"


@dataclass(frozen=True)
class Shard:
    """What the manifest says of a file."""

    name: str
    rows: int
    positions: int
    bytes: int
    sha256: str


@dataclass
class Manifest:
    header: Header
    shards: list[Shard] = field(default_factory=list)
    complete: bool = False

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def text(self) -> str:
        said = {"format": FORMAT, "version": VERSION, "complete": self.complete, "header": self.header.as_dict()}
        return json.dumps({**said, "shards": [asdict(shard) for shard in self.shards]}, indent=1) + "\n"


def shard_name(index: int) -> str:
    return f"{PREFIX}{index:05d}{SUFFIX}"


def shard_metadata(header: Header, index: int) -> dict[str, str]:
    """Of a shard's file: one entry, since safetensors keeps several in no order."""
    return {FORMAT: json.dumps({"version": VERSION, "shard": index, "header": header.as_dict()})}


def write_durably(path: Path, data: bytes) -> None:
    """The file appears under its name whole, or not at all, whenever the process or the machine stops."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        told = f"{path} cannot be written, {error.strerror}; make room for it and go on: what is stored stays"
        raise OSError(error.errno, told) from None
    os.rename(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        said = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is not there; folder must be one that topk_rkl.store.Writer wrote to"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); {AGAIN}") from None
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        raise ValueError(f"{path} is not a manifest of {FORMAT}; give the folder of a stored set")
    if said.get("version") != VERSION:
        raise ValueError(f"{path} has version {said.get('version')!r} and this package reads {VERSION}; update it")
    try:
        return _manifest(said)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); {AGAIN}") from None


def _manifest(said: dict[str, Any]) -> Manifest:
    checks.require_flag("complete", said["complete"])
    shards = [Shard(**shard) for shard in said["shards"]]
    for index, shard in enumerate(shards):
        for each in fields(Shard):
            if type(getattr(shard, each.name)) is not each.type:
                raise ValueError(f"shard {index} has {each.name} = {getattr(shard, each.name)!r}")
        if shard.name != shard_name(index):
            raise ValueError(f"shard {index} is called {shard.name}")
    return Manifest(Header.from_dict(said["header"]), shards, said["complete"])


def require_sizes(folder: Path, shards: list[Shard]) -> None:
    """Refuses files that are missing, or of another length than when they were written."""
    for shard in shards:
        path = folder / shard.name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; {AGAIN}")
        size = path.stat().st_size
        if size != shard.bytes:
            raise ValueError(f"{path} has {size} bytes and the manifest says {shard.bytes}; {AGAIN}")


def leftovers(folder: Path, manifest: Manifest) -> Iterator[Path]:
    """What a writer that was stopped leaves: unfinished files, and shards that the manifest does not know."""
    known = {shard.name for shard in manifest.shards}
    for path in sorted(folder.iterdir()):
        if path.name not in known and _is_ours(path.name) and path.name not in (MANIFEST, LOCK):
            yield path


def require_no_foreign(folder: Path) -> None:
    """Hidden files are those of file systems and of copying programs, such as .nfs0001 and .gitattributes."""
    for path in sorted(folder.iterdir()):
        if not path.name.startswith(".") and not _is_ours(path.name):
            raise ValueError(f"{path} is no part of a stored set; give a folder of the set's own, or move the file")


def require_no_leftovers(folder: Path, manifest: Manifest) -> None:
    for path in leftovers(folder, manifest):
        raise ValueError(f"{path} is not in the manifest of a finished set; move the file, or {AGAIN}")


def _is_ours(name: str) -> bool:
    name = name.removesuffix(TEMPORARY)
    number = name.removeprefix(PREFIX).removesuffix(SUFFIX)
    return name in (MANIFEST, LOCK) or (name == f"{PREFIX}{number}{SUFFIX}" and number.isdigit())


def digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def as_folder(folder: object) -> Path:
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"folder is {checks.seen(folder)}; it must be a path, a str or a pathlib.Path")
    return Path(folder)


def safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ModuleNotFoundError("stored sets need safetensors: pip install 'topk-rkl[store]'") from error
    return safetensors
