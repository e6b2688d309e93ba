"""From rows of (id, log-prob) pairs to a Support: the part that all servers share."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from topk_rkl.rows import repeats
from topk_rkl.support import LARGEST_LOG_SUM, Support

NEVER = -9999.0  # vLLM writes it for -inf, Tinker -99999.0, llama.cpp the lowest float32
LARGEST_ID = torch.iinfo(torch.int32).max


@dataclass
class Rows:
    """The entries of many positions in flat lists: a tensor per row would take longer than all else."""

    name: str
    """The field of the answer, for messages."""
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    """The number of entries per row."""
    actual: list[int] = field(default_factory=list)
    """The token of the text per row, which a server lists though it is not among the best; -1 where not known."""
    crowded: bool = False
    """Whether a row has a fixed number of entries, so that an actual token beyond the best takes the place of one."""

    def add(self, ids: Iterable[Any], log_probs: Iterable[Any], actual: int = -1) -> None:
        before = len(self.ids)
        self.ids.extend(ids)
        self.log_probs.extend(log_probs)
        self.counts.append(len(self.ids) - before)
        self.actual.append(actual)

    def support(self, k: int, remedy: str) -> Support:
        """The best K of each row, (T, K). The remedy says how to ask the server for K."""
        ids, log_probs = self.padded()
        return best(self.name, ids, log_probs, k, remedy, torch.tensor(self.actual, dtype=torch.int64), self.crowded)

    def padded(self) -> tuple[Tensor, Tensor]:
        """Ids int64 and log-probs float32, (T, W) for the longest row."""
        counts = torch.tensor(self.counts, dtype=torch.int64)
        slots = torch.arange(max(self.counts, default=0)) < counts[:, None]
        ids = torch.full(slots.shape, -1, dtype=torch.int64)
        log_probs = torch.full(slots.shape, -torch.inf)
        ids[slots] = flat(f"the ids of {self.name}", self.ids, torch.int64)
        log_probs[slots] = flat(f"the log-probs of {self.name}", self.log_probs, torch.float32)
        return ids, log_probs


def flat(name: str, values: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """The numbers as a tensor. An int may stand for a float, but no float for an int."""
    try:
        found = torch.tensor(values, dtype=dtype if dtype.is_floating_point or not values else None)
        if found.dim() == 1 and found.is_floating_point() == dtype.is_floating_point and found.dtype != torch.bool:
            return found.to(dtype)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    kind = "numbers" if dtype.is_floating_point else "ints of at most 64 bits"
    raise ValueError(f"answer: {name} are not all {kind}")


def best(
    name: str,
    ids: Tensor,  # (T, W) int64
    log_probs: Tensor,  # (T, W) float32
    k: int,
    remedy: str,
    actual: Tensor | None = None,  # (T,) int64
    crowded: bool = False,
) -> Support:
    """The best K of each row, (T, K), each id once, by (log-prob descending, id ascending)."""
    impossible = ((ids >= 0) & (log_probs <= NEVER)).sum(-1)  # listed, but no slot
    ids, log_probs = ranked(name, ids, log_probs)
    sure, most = surely_best(ids, log_probs, impossible, actual, crowded)
    if 0 < most < k:
        raise ValueError(f"k is {k}, but no position of {name} has more than {most} tokens; {remedy}")
    out = (ids < 0) | (torch.arange(ids.shape[-1]) >= sure[:, None])
    ids, log_probs = ids.masked_fill(out, -1)[:, :k], log_probs.masked_fill(out, -torch.inf)[:, :k]
    log_probs, filled_first = log_probs.sort(dim=-1, descending=True, stable=True)
    more = (0, k - ids.shape[-1])
    return Support(pad(ids.gather(-1, filled_first), more, value=-1), pad(log_probs, more, value=-torch.inf))


def ranked(
    name: str,
    ids: Tensor,  # (T, W) int64
    log_probs: Tensor,  # (T, W)
) -> tuple[Tensor, Tensor]:
    """Both by (log-prob descending, id ascending), ids int32 and each once; -1 with a log-prob is a token without id.

    Raises:
        ValueError: a log-prob is NaN, those of a row are logits, or an id is no int32.
    """
    _require_numbers(name, ids, log_probs)
    ids = ids.clamp_min(-1).to(torch.int32)
    ids, order = ids.masked_fill(log_probs <= NEVER, -1).sort(dim=-1, stable=True)
    empty = (repeats(ids) & (ids >= 0)) | (log_probs.gather(-1, order) <= NEVER)
    log_probs = log_probs.gather(-1, order).masked_fill(empty, -torch.inf)
    log_probs, best_first = log_probs.sort(dim=-1, descending=True, stable=True)
    if (log_probs.logsumexp(-1) > LARGEST_LOG_SUM).any():
        raise ValueError(
            f"answer: probabilities of {name} add up to more than 1, so its numbers are logits; start the server so "
            "that it gives log-probs, such as with --logprobs-mode raw_logprobs"
        )
    return ids.masked_fill(empty, -1).gather(-1, best_first), log_probs


def surely_best(
    ids: Tensor,  # (T, W) ranked
    log_probs: Tensor,  # (T, W)
    impossible: Tensor,  # (T,) the number of tokens that have -inf
    actual: Tensor | None,  # (T,)
    crowded: bool,
) -> tuple[Tensor, int]:
    """How many leading slots of each row are known to be the teacher's best tokens, (T,), and how many K may be.

    A server that is asked for K lists K, and the actual token. Where that is ranked last, it is either the K-th best or
    one that would not be listed otherwise: the row has K or K + 1. Another row has K. Crowded rows all have K, so that
    an actual token which is ranked last may stand in the place of a better one.
    """
    given = (log_probs > -torch.inf).sum(-1)
    listed = given + impossible
    most = int(listed.max()) if listed.numel() else 0
    if actual is None or most == 0:
        return given, most
    lowest = log_probs.gather(-1, (given - 1).clamp_min(0)[:, None])
    doubtful = ((ids == actual[:, None]) & (ids >= 0) & (log_probs == lowest)).any(-1).long()
    if crowded:
        return given - doubtful, most
    least = int((listed - doubtful).max())
    shown = bool((listed == least).any())  # else K is `least` or one more, and the caller's k is taken at its word
    return given, least if shown else most


def _require_numbers(
    name: str,
    ids: Tensor,  # (T, W)
    log_probs: Tensor,  # (T, W)
) -> None:
    wrong = log_probs.isnan().nonzero()
    if len(wrong):
        raise ValueError(
            f"answer: {name}[{int(wrong[0, 0])}] has a log-prob of NaN; the server computed no number there"
        )
    if ids.numel() and int(ids.max()) > LARGEST_ID:
        raise ValueError(f"answer: {name} has the id {int(ids.max())}, which is no int32")


def after(
    support: Support,  # (N, K), row i speaks of token i
    start: int = 0,
) -> Support:  # (start + N, K)
    """Row i is that of position `start` + i - 1: the rows move one position earlier, and the last one is empty."""
    length = start + len(support)
    return support.pad(length, side="left")[1:].pad(length)
