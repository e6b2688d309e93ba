"""The sizes of the items, and their tensors: made when first asked for, then shared by all items."""

from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

BF16 = torch.bfloat16
HOT_SHARE = 12  # V over the ids that occur: some 40 slots per id, as in 12,800 positions of prose (SmolLM2, K = 32)


@dataclass(frozen=True)
class Sizes:
    n: int = 16_384  # positions
    batch: int = 64  # responses that they are
    v: int = 151_936
    shard: int = 19_072  # of the vocabulary, on one of eight ranks
    h: int = 4_096
    ks: tuple[int, int, int, int] = (32, 64, 256, 1_024)
    few: tuple[int, ...] = (64, 256, 1_024)  # positions, where they are few
    read_words: int = 8_192  # that a program of the plain read takes, at most
    chunk: int = 2_048  # positions that the dense products take at a time
    host_calls: int = 100  # between two looks at the host's clock

    @property
    def row(self) -> int:
        """Bytes of a row of logits."""
        return self.v * BF16.itemsize


FULL = Sizes()
PROFILED = Sizes(n=2_112)  # sixteen rows per core of an H100; a profiler runs each launch many times
SMALL = Sizes(n=2, batch=2, v=32, shard=16, h=16, ks=(2, 3, 4, 8), few=(2,), read_words=16, chunk=2, host_calls=1)


class Inputs:
    """Random tensors of these sizes. At the full sizes they hold 23 GB, each many times a second-level cache."""

    def __init__(self, sizes: Sizes, device: str) -> None:
        self.sizes, self.device = sizes, device
        torch.manual_seed(0)
        self.ids, self.hot_ids, self.values = cache(self._ids), cache(self._hot_ids), cache(self._values)

    @cached_property
    def teacher_batch(self) -> Tensor:  # (B, N / B + 1, V)
        return self._batch()

    @cached_property
    def student_batch(self) -> Tensor:  # (B, N / B + 1, V)
        return self._batch()

    @cached_property
    def teacher(self) -> Tensor:  # (N, V)
        return self.teacher_batch.flatten(0, 1)[: self.sizes.n]

    @cached_property
    def student(self) -> Tensor:  # (N, V)
        return self.student_batch.flatten(0, 1)[: self.sizes.n]

    @cached_property
    def shards(self) -> tuple[Tensor, Tensor]:  # (N, V / 8) each, in the memory of student and teacher
        n, columns = self.sizes.n, self.sizes.shard
        student, teacher = (x.view(-1)[: n * columns].view(n, columns) for x in (self.student, self.teacher))
        return student, teacher

    @cached_property
    def teacher_in_float32(self) -> Tensor:  # (N / 2, V): as many bytes
        return torch.randn(self.sizes.n // 2, self.sizes.v, device=self.device)

    @cached_property
    def gradient(self) -> Tensor:  # (N, V): to be written
        return torch.zeros_like(self.teacher)

    @cached_property
    def hidden(self) -> Tensor:  # (N, H)
        return self._normal(self.sizes.n, self.sizes.h)

    @cached_property
    def head(self) -> Tensor:  # (V, H)
        return self._normal(self.sizes.v, self.sizes.h).mul_(self.sizes.h**-0.5)

    @cached_property
    def dhead(self) -> Tensor:  # (V, H): to be written
        return torch.zeros_like(self.head)

    @cached_property
    def per_row(self) -> Tensor:  # (N,)
        return torch.rand(self.sizes.n, device=self.device)

    def _ids(self, k: int) -> Tensor:  # (N, K) int32, ascending
        """Spread evenly over the vocabulary, none twice in a row."""
        apart = self.sizes.v // k
        within = torch.randint(apart, (self.sizes.n, k), device=self.device)
        return (torch.arange(k, device=self.device) * apart + within).int()

    def _hot_ids(self, k: int) -> Tensor:  # (N, K) int32
        """As text has them: a twelfth of the vocabulary, rank r in proportion to 1 / (r + 16)."""
        most, shift = self.sizes.v // HOT_SHARE, 16
        power = torch.rand(self.sizes.n, k, device=self.device)
        rank = (shift * ((most + shift) / shift) ** power - shift).long().clamp_(0, most - 1)
        return (rank * HOT_SHARE).int()

    def _values(self, k: int) -> Tensor:  # (N, K)
        return torch.randn(self.sizes.n, k, device=self.device)

    def _batch(self) -> Tensor:
        return self._normal(self.sizes.batch, self.sizes.n // self.sizes.batch + 1, self.sizes.v)

    def _normal(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=BF16, device=self.device).normal_()
