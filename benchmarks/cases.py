"""The registry of cases, by name. The tests hold every contestant to float64 on `tiny`, which is not published."""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LINE = 64  # bytes: what reading one number from memory moves

Work = Literal["select", "loss", "loss on ids", "linear"]


class Moved(NamedTuple):
    """Bytes that no implementation can do without."""

    read: int
    written: int


@dataclass(frozen=True)
class Case:
    """Some work at some sizes.

    Works: "select" is (N, V) teacher logits -> the K largest. "loss" is the logits of both sides -> the loss, and the
    student's gradient. "loss on ids" has K ids and log-probs of the teacher instead of its logits. "linear" has those,
    and instead of the student's logits its hidden states (N, H) and its head (V, H).
    """

    name: str
    work: Work
    n: int
    v: int
    k: int
    h: int = 0
    dtype: str = "bfloat16"
    gradients: str = ""  # of "linear": which are asked for, see GRADIENTS
    rows: str = "random"  # of the teacher's logits: a name in tests.cases.ROWS
    axis: str = ""  # the size that is varied where others stay, for a fit and a plot
    contestants: tuple[str, ...] = ()  # only these; empty for all
    peak: bool = False  # the peak of memory is measured too, where that takes a process of its own

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    def moved(self, touched: int) -> tuple[Moved, Moved]:
        """The bytes that the forward and the backward pass must move.

        Positions name `touched` rows of the head, and each is read at least once. The K logits of a position lie in K
        lines of memory.
        """
        n, v, k, h, e = self.n, self.v, self.k, self.h, self.itemsize
        slots = n * k * 8  # ids and values, or ids and the gradient there
        if self.work == "select":
            return Moved(n * v * e, slots), Moved(0, 0)
        if self.work == "linear":
            rows = touched * h * e
            dhead = {"hidden alone": 0, "sparse head": rows, "dense head": v * h * e}[self.gradients]
            again = (n * h * e if dhead else 0) + slots
            return Moved(rows + n * h * e + slots, slots), Moved(again, n * h * e + dhead)
        teacher = n * v * e if self.work == "loss" else slots
        return Moved(teacher + n * k * LINE, slots), Moved(slots, n * v * e)


GRADIENTS = ("hidden alone", "sparse head", "dense head")
WORST = ("ascending", "two_valued", "all_equal")
OURS_AND_PLAIN = ("topk_rkl", "plain")
IN_MEMORY = ("topk_rkl", "plain", "gathered", "gathered in chunks")


def _scaling(base: Case, **axes: tuple[int, ...]) -> list[Case]:
    return [
        replace(base, axis=axis, peak=axis == "n", **{axis: size}) for axis, sizes in axes.items() for size in sizes
    ]


V = 151_936  # of Qwen 2.5 and 3
CPU = [
    Case("tiny", "select", 24, 1_000, 8),
    Case("tiny", "loss", 24, 1_000, 8),
    Case("tiny", "loss on ids", 24, 1_000, 8, dtype="float32"),
    *(Case("tiny", "linear", 24, 500, 8, 32, "float32", gradients) for gradients in GRADIENTS),
    *(Case("select", "select", 256, V, k) for k in (16, 64, 256)),
    Case("select", "select", 256, V, 64, dtype="float32"),
    *(
        Case("worst rows", "select", 256, V, k, rows=rows, contestants=("topk_rkl", "torch.topk"))
        for k in (16, 256)
        for rows in WORST
    ),
    Case("loss", "loss", 256, V, 32),
    *(Case("loss on ids", "loss on ids", n, 32_000, 64, dtype="float32") for n in (256, 1_024)),
    Case("loss on ids", "loss on ids", 256, V, 64),
    *(Case("linear", "linear", 256, 32_000, 64, 1_024, "float32", gradients) for gradients in GRADIENTS),
    *(
        Case("linear memory", "linear", 512, V, 32, 2_048, "bfloat16", gradients, contestants=IN_MEMORY, peak=True)
        for gradients in ("hidden alone", "dense head")
    ),
    *_scaling(
        Case("scaling", "loss", 256, V, 64, contestants=OURS_AND_PLAIN),
        n=(64, 128, 256, 512, 640),
        k=(16, 32, 64, 128, 160),
        v=(26_000, 52_000, 104_000, 208_000, 260_000),
    ),
    *_scaling(
        Case("scaling", "linear", 256, 32_000, 64, 1_024, "float32", "hidden alone", contestants=OURS_AND_PLAIN),
        n=(64, 128, 256, 512, 640),
        k=(16, 32, 64, 128, 160),
        h=(256, 512, 1_024, 2_048, 2_560),
        v=(16_000, 32_000, 64_000, 128_000, 160_000),
    ),
]
GPU = [
    *(case for case in CPU if case.name == "tiny"),
    *(Case("select", "select", 16_384, V, k) for k in (16, 64, 256)),
    Case("loss", "loss", 16_384, V, 64),
    *(Case("small N", work, n, V, 64) for work in ("select", "loss") for n in (64, 256)),
    Case("loss on ids", "loss on ids", 16_384, V, 64),
    *(
        Case("linear", "linear", 16_384, V, 32, 4_096, gradients=gradients)
        for gradients in ("hidden alone", "dense head")
    ),
    Case("sparse head", "linear", 16_384, V, 32, 4_096, gradients="sparse head"),
    *_scaling(
        Case("scaling", "loss", 4_096, V, 64, contestants=OURS_AND_PLAIN),
        n=(1_024, 2_048, 4_096, 8_192, 10_240),
        k=(16, 32, 64, 128, 160),
        v=(26_000, 52_000, 104_000, 208_000, 260_000),
    ),
    *_scaling(
        Case("scaling", "linear", 4_096, V, 64, 2_048, gradients="hidden alone", contestants=OURS_AND_PLAIN),
        n=(1_024, 2_048, 4_096, 8_192, 10_240),
        k=(16, 32, 64, 128, 160),
        h=(512, 1_024, 2_048, 4_096, 5_120),
        v=(26_000, 52_000, 104_000, 208_000, 260_000),
    ),
]
SUITES = {"cpu": CPU, "gpu": GPU}
