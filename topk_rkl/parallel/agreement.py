"""What the ranks of a group tell each other before a call: that nothing is refused, and how long their shards are.

One all-gather of four integers. On a CPU every rank reads them, so that a refusal on one rank is raised on all. On a
GPU and under torch.compile nothing is read on the host: there the other ranks see the time-out of the group.
"""

import contextlib
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from topk_rkl import checks
from topk_rkl.backends import choose, requested
from topk_rkl.divergence import Divergence
from topk_rkl.parallel.collectives import all_gather, start_all_gather, wait
from topk_rkl.support import Support

TEXT = 2048  # bytes of a message
FIRST = 8  # slots of a Support that ranks compare


class Shards(NamedTuple):
    """Where the ids of each rank lie in the vocabularies that the ranks share."""

    group: dist.ProcessGroup
    table: Tensor
    """(ranks, 4) int64, to wait for: what each rank has sent, its two vocabularies last."""

    def student(self) -> Tensor:  # (ranks + 1,) int64
        """The first id of each rank, and V."""
        return pad(wait(self.table)[:, 2].cumsum(0), (1, 0))

    def teacher(self) -> Tensor:  # (ranks + 1,) int64
        """As `student`; all 0 of a Support."""
        return pad(wait(self.table)[:, 3].cumsum(0), (1, 0))


def refused_together(
    group: dist.ProcessGroup | None,
    like: object,  # a tensor on the device of the group, but for hostile arguments
) -> contextlib.AbstractContextManager[None]:
    """Around the checks of a call: what they raise on this rank, `shards_of` raises on the others."""
    if group is None or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return _refused_together(group, like)


@contextlib.contextmanager
def _refused_together(group: dist.ProcessGroup, like: object) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        device = like.device if isinstance(like, Tensor) else _device_of(group)
        wait(_exchange(group, device, 1, 0, 0, 0))
        if device.type == "cpu":
            _texts(group, f"{type(error).__name__}: {error}")
        raise


def require_backend(
    group: dist.ProcessGroup | None,
    k: int | None,  # None of a Support
    mass: str,
    *given: Any,  # logits (..., X), a Support
) -> None:
    """Refuses, on all ranks, what a backend asked for by name cannot take: an empty shard would never ask it."""
    logits = [x for x in given if isinstance(x, Tensor)]
    if group is not None and logits and not torch.compiler.is_compiling():
        slots = k or next(x.k for x in given if isinstance(x, Support))
        choose(requested(), slots, *logits, mass=mass)


def shards_of(
    group: dist.ProcessGroup | None,
    given: tuple[Any, ...],  # logits (..., X) or hidden states first; then others, a Support, None
    student_vocab: int,  # of this rank's shard
    teacher_vocab: int | None,  # None of a Support
    k: int | None,
    asked: dict[str, object],  # by name: what else must be alike
) -> Shards | None:
    """The shards of all ranks, which have been called alike; None without a group.

    Raises:
        RuntimeError: another rank has refused its arguments.
        ValueError: the ranks were not called alike, or K is above V.
    """
    if group is None:
        return None
    like, text = given[0], "" if torch.compiler.is_compiling() else _described(given, {"k": k, **asked})
    digest = zlib.crc32(text.encode()) if text else 0
    table = _exchange(group, like.device, 0, digest, student_vocab, teacher_vocab or 0)
    if read_on_host(like):
        failed, digests, _, teacher = wait(table).T.tolist()
        if any(failed) or len(set(digests)) > 1:
            _refuse(_texts(group, text), failed)
        if teacher_vocab is not None:
            checks.require_k(k, sum(teacher), "the teacher's logits over all ranks")
    return Shards(group, table)


def _described(given: tuple[Any, ...], asked: dict[str, object]) -> str:
    """A call by all that must be the same on every rank, a line each."""
    kinds = [
        f"a Support of K = {x.k} and {x.log_probs.dtype}" if isinstance(x, Support) else str(x.dtype)
        for x in given
        if x is not None
    ]
    for name, x in asked.items():
        if callable(x) and not isinstance(x, Divergence):  # whose repr may hold an address
            asked[name] = getattr(x, "__qualname__", type(x).__qualname__)
        elif isinstance(x, Tensor):  # of one temperature per position
            asked[name] = f"a tensor of shape {checks.shape_of(x)}"
    asked |= {"the shape of the positions": tuple(given[0].shape[:-1]), "the kind of tensors": kinds}
    asked["the backend"] = requested()
    for x in given:
        if isinstance(x, Support) and read_on_host(x.ids):  # a support of this shard alone would differ here
            asked["the first ids of teacher"] = x.ids.flatten()[:FIRST].tolist()
    return "\n".join(f"{name}={value}" for name, value in asked.items())


def read_on_host(like: Tensor) -> bool:
    """Whether the numbers that ranks exchange may be read: there is no wait for a device, and no trace."""
    return like.is_cpu and not torch.compiler.is_compiling()


def require_begin_alike(shards: Shards) -> None:
    if not begin_alike(shards):
        raise ValueError(
            f"the shards of teacher begin at ids {shards.teacher()[:-1].tolist()} and those of student_logits at "
            f"{shards.student()[:-1].tolist()}; select first, with teacher_topk(teacher_logits, k, group=group)"
        )


def begin_alike(shards: Shards) -> Tensor:  # () bool
    """Whether the ids of each rank begin for the student where they do for the teacher, unless a rank has none."""
    student, teacher = wait(shards.table)[:, 2:].unbind(1)
    ahead = (student - teacher).cumsum(0)[:-1]  # of the second rank on
    return ((ahead == 0) | (teacher[1:] == 0)).all()


def _exchange(
    group: dist.ProcessGroup,
    device: torch.device,
    *numbers: int,  # failed, digest, and the two vocabularies
) -> Tensor:  # (ranks, 4), to wait for
    # Filled on the device, since a copy from the host would be waited for.
    row = torch.stack([torch.full((), number, dtype=torch.int64, device=device) for number in numbers])
    return start_all_gather(row, group)


def _texts(group: dist.ProcessGroup, text: str) -> list[str]:
    raw = text.encode()[:TEXT].ljust(TEXT)
    table = all_gather(torch.frombuffer(bytearray(raw), dtype=torch.uint8), group)
    return [bytes(row.tolist()).decode(errors="replace").rstrip() for row in table]


def _refuse(texts: list[str], failed: list[int]) -> NoReturn:
    for rank, text in enumerate(texts):
        if failed[rank]:
            raise RuntimeError(f"rank {rank} of the group refused its arguments: {text}")
    first = dict(_values(texts[0]))
    for rank, text in enumerate(texts):
        for name, value in _values(text):
            if value != first.get(name):
                raise ValueError(
                    f"{name} is {value} on rank {rank} of the group and {first.get(name)} on rank 0; call all ranks "
                    "alike: only the shards of the vocabulary may differ"
                )
    raise ValueError(
        f"the ranks of the group differ in what is beyond {TEXT} bytes of {texts[0]!r}; call all ranks alike: only the "
        "shards of the vocabulary may differ"
    )


def _values(text: str) -> Iterator[tuple[str, str]]:
    """The name and the value of each line of `_described`."""
    for line in text.splitlines():
        name, _, value = line.partition("=")
        yield name, value


def _device_of(group: dist.ProcessGroup) -> torch.device:
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
