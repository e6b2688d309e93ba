"""What the ranks of a group tell each other before a call: that nothing is refused, and how long their shards are.

One all-gather of four integers. On a CPU every rank reads them, so that a refusal on one rank is raised on all. On a
GPU and under torch.compile nothing is read on the host: there the other ranks see the time-out of the group.
"""

import contextlib
import zlib
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from topk_rkl import checks
from topk_rkl.backends import requested
from topk_rkl.parallel.collectives import all_gather

TEXT = 2048  # bytes of a message


class Shards(NamedTuple):
    """Where the ids of each rank lie in the vocabularies that the ranks share."""

    group: dist.ProcessGroup
    student: Tensor
    """(ranks + 1,) int64: the first id of each rank, and V."""
    teacher: Tensor
    """(ranks + 1,) int64, as above: all 0 where the teacher is a Support."""


def refused_together(
    group: dist.ProcessGroup | None,
    like: object,  # a tensor on the device of the group, but for hostile arguments
) -> contextlib.AbstractContextManager[None]:
    """Around the checks of a call: what they raise on this rank, `agree` raises on the others."""
    if group is None or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return _refused_together(group, like)


@contextlib.contextmanager
def _refused_together(group: dist.ProcessGroup, like: object) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        device = like.device if isinstance(like, Tensor) else _device_of(group)
        _exchange(group, device, True, 0, 0, 0)
        if device.type == "cpu":
            _texts(group, f"{type(error).__name__}: {error}")
        raise


def shards_of(
    group: dist.ProcessGroup | None,
    like: Tensor,  # (..., X) with the positions and the device of the call
    student: Tensor | None,  # (..., V_local)
    teacher: object,  # (..., V_local) logits, or a Support
    k: int | None,
    divergence: object = None,
    mass: str | None = None,
    **others: object,
) -> Shards | None:
    """The shards of all ranks, which have been called alike; None without a group.

    Raises:
        RuntimeError: another rank has refused its arguments.
        ValueError: the ranks were not called alike, or K is above V.
    """
    if group is None:
        return None
    text = ""
    if not torch.compiler.is_compiling():
        text = _described(like, student, teacher, k=k, divergence=divergence, mass=mass, **others)
    vocabs = [x.shape[-1] if isinstance(x, Tensor) else 0 for x in (student, teacher)]
    table = _exchange(group, like.device, False, zlib.crc32(text.encode()) if text else 0, *vocabs)
    if read_on_host(like):
        failed, digests = table[:, 0].tolist(), table[:, 1].tolist()
        if any(failed) or len(set(digests)) > 1:
            _refuse(_texts(group, text), failed)
        if isinstance(teacher, Tensor):
            checks.require_k(k, int(table[:, 3].sum()), "the teacher's logits over all ranks")
    starts = pad(table[:, 2:].cumsum(0), (0, 0, 1, 0))  # (ranks + 1, 2)
    return Shards(group, starts[:, 0], starts[:, 1])


def _described(
    like: Tensor,  # (..., X)
    student: Tensor | None,  # (..., V_local)
    teacher: object,  # (..., V_local) logits, or a Support
    **options: object,
) -> str:
    """A call by all that must be the same on every rank, a line each."""
    given = [x for x in (student, *(teacher if isinstance(teacher, tuple) else (teacher,))) if isinstance(x, Tensor)]
    if isinstance(teacher, tuple):
        options["k"] = given[-1].shape[-1]
    options["divergence"] = getattr(options["divergence"], "__qualname__", options["divergence"])
    shared = {
        "the shape of the positions": tuple(like.shape[:-1]),
        "the kind of teacher": type(teacher).__name__,
        "the dtypes": [str(x.dtype) for x in given],
        "the backend": requested(),
        **options,
    }
    return "\n".join(f"{name}={value}" for name, value in shared.items())


def read_on_host(like: Tensor) -> bool:
    """Whether the numbers that ranks exchange may be read: there is no wait for a device, and no trace."""
    return like.is_cpu and not torch.compiler.is_compiling()


def require_begin_alike(shards: Shards) -> Tensor:  # () bool
    """Whether the ids of each rank begin for the student where they do for the teacher, unless a rank has none.

    Refused where it may be read.
    """
    begins, ends = shards.teacher[:-1], shards.teacher[1:]
    alike = ((shards.student[:-1] == begins) | (begins == ends)).all()
    if read_on_host(alike) and not alike:
        raise ValueError(
            f"the shards of teacher begin at ids {begins.tolist()} and those of student_logits at "
            f"{shards.student[:-1].tolist()}; select first, with teacher_topk(teacher_logits, k, group=group)"
        )
    return alike


def _exchange(group: dist.ProcessGroup, device: torch.device, *numbers: int) -> Tensor:  # (ranks, 4)
    return all_gather(torch.tensor(numbers, dtype=torch.int64, device=device), group)


def _texts(group: dist.ProcessGroup, text: str) -> list[str]:
    raw = text.encode()[:TEXT].ljust(TEXT)
    table = all_gather(torch.frombuffer(bytearray(raw), dtype=torch.uint8), group)
    return [bytes(row.tolist()).decode(errors="replace").rstrip() for row in table]


def _refuse(texts: list[str], failed: list[int]) -> NoReturn:
    for rank, text in enumerate(texts):
        if failed[rank]:
            raise RuntimeError(f"rank {rank} of the group refused its arguments: {text}")
    first = dict(line.split("=", 1) for line in texts[0].splitlines())
    for rank, text in enumerate(texts):
        for name, value in (line.split("=", 1) for line in text.splitlines()):
            if value != first.get(name):
                raise ValueError(
                    f"{name} is {value} on rank {rank} of the group and {first.get(name)} on rank 0; call all ranks "
                    "alike: only the shards of the vocabulary may differ"
                )
    raise AssertionError("the ranks differ in nothing")


def _device_of(group: dist.ProcessGroup) -> torch.device:
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
