"""The collectives of a call whose vocabulary is shared by ranks, and the bytes that a rank sends in each.

for collective in ours("topk_reverse_kl", ranks=8, k=64):
    collective.sent(ranks=8, rows=16_384)
"""

from dataclasses import dataclass

AGREEMENT = 32  # bytes that a rank tells the others before a call: four int64
AGREED = "sizes of the shards"
ID = 4  # bytes of an id
SHARE = {"all-to-all": 1, "all-gather": 1, "all-reduce": 2}  # times (ranks - 1) / ranks of the tensor is sent
ENTRIES = (
    "teacher_topk",
    "topk_reverse_kl",
    "topk_reverse_kl with a Support",
    "linear_teacher_topk",
    "linear_topk_reverse_kl",
    "linear_topk_reverse_kl with a Support",
)


@dataclass(frozen=True)
class Collective:
    """The tensor is what a rank holds before an all-to-all, what it holds after an all-gather, what is all-reduced."""

    kind: str
    row_bytes: float  # of the tensor, per row
    what: str
    dealt: bool = False  # the ranks own equal blocks of rows, the last one padded
    call_bytes: float = 0  # of the tensor, beside those of rows

    def bytes(self, ranks: int, rows: int) -> float:
        """Of the tensor."""
        counted = ranks * max(1, -(-rows // ranks)) if self.dealt else rows
        return self.call_bytes + counted * self.row_bytes

    def sent(self, ranks: int, rows: int) -> float:
        """Bytes that one rank sends, by a ring where it is an all-reduce."""
        return SHARE[self.kind] * (ranks - 1) / ranks * self.bytes(ranks, rows)


def ours(
    entry: str,
    ranks: int,
    k: int,
    teacher: int = 2,  # bytes of a logit
    student: int = 2,  # or of a number of the hidden states
    width: int = 0,
    hidden_grad: bool = True,
    normalize: bool = False,
) -> tuple[Collective, ...]:
    """Those of the forward and the backward pass of a call, in their order; none for one rank alone."""
    if ranks == 1:
        return ()
    agreement = Collective("all-gather", 0, AGREED, call_bytes=AGREEMENT * ranks)
    return agreement, *_of_rows(entry, ranks, k, teacher, student, width, hidden_grad, normalize)


def _of_rows(
    entry: str, ranks: int, k: int, teacher: int, student: int, width: int, hidden_grad: bool, normalize: bool
) -> tuple[Collective, ...]:
    result = max(4, student)
    if entry == "topk_reverse_kl":
        return (
            Collective("all-to-all", k * (teacher + student + 1), "candidates", dealt=True),
            Collective("all-to-all", (k + 1) * result, "gradient and loss", dealt=True),
        )
    if entry == "topk_reverse_kl with a Support":
        return (Collective("all-reduce", k * student, "the student's logits"),)
    if entry in ("teacher_topk", "linear_teacher_topk"):
        candidates = k * (teacher + ID)
        total = (Collective("all-gather", 8 * ranks, "logsumexp of the shards"),) if normalize else ()
        if ranks == 2:
            return (*total, Collective("all-gather", ranks * candidates, "candidates"))
        return (
            *total,
            Collective("all-to-all", candidates, "candidates", dealt=True),
            Collective("all-gather", k * (ID + max(4, teacher)), "ids and logits", dealt=True),
        )
    logits = Collective("all-reduce", k * result, "the student's logits")
    gradient = (Collective("all-reduce", width * result, "gradient of the hidden states"),) if hidden_grad else ()
    if entry == "linear_topk_reverse_kl with a Support":
        return (logits, *gradient)
    if entry == "linear_topk_reverse_kl":
        return (*_of_rows("teacher_topk", ranks, k, teacher, student, width, hidden_grad, False), logits, *gradient)
    raise ValueError(f"entry is {entry!r}; it must be one of {', '.join(ENTRIES)}")


@dataclass(frozen=True)
class Design:
    """How another project shares a vocabulary, read from its source.

    Bytes of the shard count every operation that reads or writes numbers for all of a rank's vocabulary, forward and
    backward, at the width that they have there.
    """

    name: str
    collectives: tuple[Collective, ...]
    shard_bytes: float  # per logit of the shard
    all_of_it: bool = False  # every rank then works on the whole vocabulary
    objective: str = "the same loss"


def designs(ranks: int, k: int, vocab: int) -> tuple[Design, ...]:
    """The student's side alone, as teachers come as top-K there; bfloat16 logits."""
    number = Collective("all-reduce", 4, "a number per row")
    gathered = ranks * 1024 * 4.0
    return (
        Design("this package with a `Support`", ours("topk_reverse_kl with a Support", ranks, k), 2),
        # The gather is written (2), the loss reads K logits of it, the gradient is written (2).
        Design("gather of [N, V]", (Collective("all-gather", 2 * vocab, "logits"),), 4, all_of_it=True),
        # To float32 (6), maximum (4), difference (8), exponentials (8), their sum (4), log-softmax (8), softmax (8);
        # backward: product with the mass (8), with the gradient (8), to bfloat16 (6).
        Design("vocabulary-parallel log-softmax, as in verl", (number,) * 3, 68, objective="forward KL"),
        # To float32 (6), K logits; backward: zeros (4), to bfloat16 (6).
        Design("NeMo-RL, renormalised", (Collective("all-reduce", 4 * k, "logits at K ids"),), 16),
        # To float32 (6), maximum (4), difference (8), exponentials (8), sum (4), log-softmax (8); backward: zeros (4),
        # their sum (4), exponentials' gradient (12), both added (12), to bfloat16 (6). The ghost token reduces once
        # more, and each sum again backwards.
        Design("Megatron-LM `topk_kl_div`", (number,) * 5, 76, objective="forward KL with a tail"),
        # Of both sides: to float32 (12), torch.topk of 1,024, which reads about four times (32); backward: zeros (4),
        # to bfloat16 (6). The gradient of the gather is reduced.
        Design(
            "ModelOpt, K = 1,024",
            (
                Collective("all-gather", gathered, "the teacher's candidates"),
                Collective("all-gather", gathered, "the student's candidates"),
                Collective("all-reduce", gathered, "their gradient"),
            ),
            54,
        ),
        # Maximum (2), one read (2) that writes exponentials (4); backward reads those (4) and writes the gradient (2).
        Design(
            "Liger, packed",
            (number, Collective("all-reduce", 8, "two numbers per row")),
            14,
            objective="cross-entropy",
        ),
    )
