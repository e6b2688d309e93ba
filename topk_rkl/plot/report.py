"""What a picture shows, as numbers: per position the loss, both distributions on S, and the token that follows."""

import math
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from topk_rkl import checks
from topk_rkl.diagnostics import topk_diagnostics
from topk_rkl.loss import topk_reverse_kl
from topk_rkl.plot.tokens import Tokenizer, require_tokenizer, shown_tokens
from topk_rkl.rows import finite_max, live_slots
from topk_rkl.support import Support, require_support

Position = tuple[int, int]
"""A sequence, and the position in it whose logits are compared. It predicts the token after it."""


@dataclass(frozen=True, eq=False)
class TokenReport:
    """B sequences with P positions each; the last P tokens of a sequence are those that they predict, in order.

    All tensors are on the CPU.
    """

    loss: Tensor
    """(B, P) float64, the reverse KL in nats, and 0 where the position does not count."""
    counted: Tensor
    """(B, P) bool, whether the weight of the position is not 0."""
    ids: Tensor
    """(B, P, K) int64, the tokens of S with the teacher's best first; -1 in an empty slot, which is last."""
    p: Tensor
    """(B, P, K) float64, the student's probabilities renormalised on S, and 0 in an empty slot."""
    q: Tensor
    """(B, P, K) float64, those of the teacher."""
    terms: Tensor
    """(B, P, K) float64, p (log p - log q), whose sum is the loss."""
    student_mass: Tensor
    """(B, P) float64, the student's probability of S among all tokens."""
    teacher_mass: Tensor | None
    """(B, P) float64, that of the teacher. None where the support holds logits or the teacher's temperature is not 1.
    """
    place: Tensor
    """(B, P) int64, the slot of the token that the position predicts, and -1 where S lacks it."""
    next_prob: Tensor
    """(B, P) float64, the student's probability of that token among all tokens."""
    input_ids: Tensor
    """(B, L) int64, with L of at least P + 1."""
    names: dict[int, str]
    """Every id of input_ids and of S with its token as it is shown."""

    def __len__(self) -> int:
        """B."""
        return len(self.loss)

    @property
    def lead(self) -> int:
        """How many tokens no position predicts: position t predicts the token at lead + t."""
        return self.input_ids.shape[1] - self.loss.shape[1]

    def sequences(self) -> list[int]:
        """By mean loss, the worst first; NaN is worse than any number, and a sequence where nothing counts is last."""
        total, count = (self.loss * self.counted).sum(1), self.counted.sum(1)
        return torch.where(count > 0, total / count, -1).sort(descending=True, stable=True).indices.tolist()

    def worst(self, count: int) -> list[Position]:
        """The positions with the largest losses among those that count, NaN before all numbers."""
        count, (_, length) = checks.require_integer("count", count), self.loss.shape
        order = self.loss.masked_fill(~self.counted, -1).flatten().sort(descending=True, stable=True).indices
        kept = min(max(count, 0), int(self.counted.sum()))
        return [divmod(i, length) for i in order[:kept].tolist()]

    def summary(self, sequence: int | None = None) -> str:
        """Of a sequence, or of all, in words: the mean of the losses that are numbers, and how many losses count."""
        rows = slice(None) if sequence is None else sequence
        losses = self.loss[rows][self.counted[rows]]
        numbers = losses[~losses.isnan()]
        if not len(losses):
            return "no position counts"
        mean = f"{float(numbers.mean()):.3f}" if len(numbers) else "NaN"
        words = f"mean loss {mean} over {len(losses):,} position{'s' * (len(losses) != 1)}"
        return words if len(numbers) == len(losses) else f"{words}, {len(losses) - len(numbers):,} NaN"

    @cached_property
    def largest(self) -> float:
        """The largest loss that is a number, 0 for none."""
        return float(torch.where(self.loss.isfinite() & self.counted, self.loss, 0).max())

    def loss_text(self, position: Position) -> str:
        """The loss to 3 digits, or NaN."""
        loss = float(self.loss[position])
        return "NaN" if math.isnan(loss) else f"{loss:.3f}"

    def token(self, position: Position) -> str:
        """The one that the position predicts, as it is shown."""
        sequence, t = position
        return self.names[int(self.input_ids[sequence, self.lead + t])]

    def context(self, position: Position, count: int) -> str:
        """The tokens before the one that the position predicts, `count` of them at most."""
        sequence, t = position[0], position[1] + self.lead
        return "".join(self.names[i] for i in self.input_ids[sequence, max(0, t - count) : t].tolist())

    def cells(self, sequence: int) -> list[tuple[str, int | None]]:
        """The tokens of a sequence, each with the position that predicts it, None where none that counts does.

        More than three equal tokens that do not count, as padding has, are one cell, with their number.
        """
        found: list[tuple[str, int | None]] = []
        ids, counted = self.input_ids[sequence].tolist(), [False] * self.lead + self.counted[sequence].tolist()
        start = 0
        for i in range(1, len(ids) + 1):
            if i < len(ids) and ids[i] == ids[start] and not counted[i] and not counted[start]:
                continue
            name, length = self.names[ids[start]], i - start
            text = f"{name}⟨{length} times⟩" if length > 3 else name * length
            found.append((text, start - self.lead if counted[start] else None))
            start = i
        return found


@torch.no_grad()
def token_report(
    student_logits: Tensor,  # (T, V) or (B, T, V)
    support: Support,  # of (T, K) or (B, T, K)
    input_ids: Tensor,  # (T,) or (B, T), or longer: (L,) or (B, L)
    tokenizer: Tokenizer,
    *,
    weights: Tensor | None = None,  # (T,) or (B, T)
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
) -> TokenReport:
    """The loss of each position as `topk_reverse_kl` gives it, and what it is made of.

    Position t of the logits predicts the token after it, and its loss is shown at that token.

    Args:
        student_logits: (T, V) or (B, T, V), as the model gives them for the input ids; detached here.
        support: of (T, K) or (B, T, K). One of T - 1 positions lacks the last, where that predicts no token.
        input_ids: (T,) or (B, T) int32 or int64, the tokens that the model read; the last position then predicts no
            token, and is left out. Of more than T tokens, the last T are those that the positions predict, as a model
            gives logits of a response alone. Negative ids are shown as numbers.
        tokenizer: with a `decode` method, as those of transformers and of tokenizers have it; or a function from a list
            of ids to a list of strings.
        weights: (T,) or (B, T) bool or float, as `topk_reverse_kl` takes them: a position of weight 0 does not count.
            Other weights do not change the loss that is shown. None counts all.
        temperature, teacher_temperature: those of the loss, numbers.

    Returns:
        A `TokenReport` of P positions: T - 1, or T where input_ids has more than T tokens.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, and nothing has been computed.
    """
    checks.require_logits("student_logits", student_logits)
    checks.require_plain(student_logits=student_logits)
    if student_logits.dim() not in (2, 3) or student_logits.numel() == 0:
        raise ValueError(
            f"student_logits has shape {checks.shape_of(student_logits)}; it must be (T, V) or (B, T, V), with a "
            "position at least"
        )
    require_support("support", support)
    positions = student_logits.shape[:-1]
    _require_input_ids(input_ids, student_logits)
    if support.shape == (*positions[:-1], positions[-1] - 1) and input_ids.shape[-1] == positions[-1]:
        support = support.pad(positions[-1])
    checks.require_same_positions("support.ids", support.ids, student_logits)
    checks.require_weights(weights, student_logits)
    checks.require_temperature(temperature)
    own = temperature if teacher_temperature is None else teacher_temperature
    checks.require_temperature(own, "teacher_temperature")
    require_tokenizer(tokenizer)
    ids = input_ids.long().reshape(-1, input_ids.shape[-1])  # (B, L)
    length = min(positions[-1], ids.shape[1] - 1)  # P
    predicted = ids[:, -length:]  # (B, P)

    def cut(x: Tensor) -> Tensor:  # (T, X) or (B, T, X), as (B, P, X)
        return (x if x.dim() == 3 else x[None])[:, :length]

    student = cut(student_logits.detach())  # (B, P, V)
    support = _best_first(support.each(cut), student.shape[-1])
    names = shown_tokens(tokenizer, torch.cat([ids.flatten(), support.ids[support.ids >= 0]]).unique().tolist())
    counted = torch.ones_like(predicted, dtype=torch.bool)
    if weights is not None:
        counted = cut(weights[..., None]).squeeze(-1) != 0
    found = _compared(student, support, float(temperature), float(own)) | {
        "loss": topk_reverse_kl(
            student, support, weights=counted, temperature=temperature, teacher_temperature=own, reduction="none"
        ).double(),
        "counted": counted,
        "ids": support.ids,
        "place": _place(support.ids, predicted),
        "input_ids": ids,
        **_watched(student, support, predicted, temperature, own),
    }
    tensors = {name: None if x is None else x.cpu() for name, x in found.items()}
    assert {*tensors, "names"} == {field.name for field in fields(TokenReport)}
    return TokenReport(**tensors, names=names)  # type: ignore[arg-type]


def require_report(report: object) -> None:
    if not isinstance(report, TokenReport):
        raise TypeError(f"report is {checks.kind_of(report)}; it must be a TokenReport, as token_report gives it")


def _require_input_ids(
    ids: Tensor,  # (T,) or (B, T), or longer
    student: Tensor,  # (T, V) or (B, T, V)
) -> None:
    checks.require_tensor("input_ids", ids, checks.INTEGERS)
    *lead, length = student.shape[:-1]
    if ids.dim() != student.dim() - 1 or list(ids.shape[:-1]) != lead or ids.shape[-1] < length:
        raise ValueError(
            f"input_ids has shape {checks.shape_of(ids)} and student_logits {checks.shape_of(student)}; it must be "
            f"{(*lead, length)}, or longer, with the token that the last position predicts at its end"
        )
    if ids.shape[-1] < 2:
        raise ValueError("input_ids has 1 token, which no position predicts; pass 2 tokens at least")
    checks.require_same_device("input_ids", ids, "student_logits", student)


def _best_first(support: Support, vocab: int) -> Support:
    """With int64 ids, sorted by log-prob, the slots outside S emptied and last."""
    support = support.without(~live_slots(*support.tensors, vocab))
    order = support.log_probs.sort(dim=-1, descending=True, stable=True).indices  # (..., K)
    return support.each(lambda x: x.gather(-1, order)).each(lambda x: x if x.is_floating_point() else x.long())


def _compared(
    student: Tensor,  # (B, P, V)
    support: Support,  # of (B, P, K)
    temperature: float,
    teacher_temperature: float,
) -> dict[str, Tensor]:  # (B, P, K) each
    """p, q and the terms of the loss, in float64."""
    live = support.ids >= 0
    z = student.gather(-1, support.ids.clamp(min=0)).double().masked_fill(~live, -torch.inf)
    log_p, log_q = _log_softmax(z, temperature), _log_softmax(support.log_probs.double(), teacher_temperature)
    p, q = (torch.where(live, x.exp(), 0) for x in (log_p, log_q))
    return {"p": p, "q": q, "terms": torch.where(p == 0, 0, p * (log_p - log_q))}


def _log_softmax(
    x: Tensor,  # (..., K)
    temperature: float,
) -> Tensor:  # (..., K)
    """Of x / temperature. The difference from the largest comes first, since quotients of large logits lose it."""
    return ((x - finite_max(x)) / temperature).log_softmax(-1)


def _place(
    slots: Tensor,  # (B, P, K)
    tokens: Tensor,  # (B, P)
) -> Tensor:  # (B, P), -1 for none
    same = (slots == tokens[..., None]) & (slots >= 0)
    return torch.where(same.any(-1), same.int().argmax(-1), -1)


def _watched(
    student: Tensor,  # (B, P, V)
    support: Support,  # of (B, P, K)
    tokens: Tensor,  # (B, P)
    temperature: float,
    teacher_temperature: float,
) -> dict[str, Tensor | None]:  # (B, P) each
    """Probabilities among all tokens."""
    names = ["student_mass", "sampled_log_prob"]
    if support.normalized and teacher_temperature == 1:
        names.append("teacher_mass")
    found = topk_diagnostics(
        student, support, names, temperature=temperature, teacher_temperature=teacher_temperature, sampled_ids=tokens
    )
    return {
        "student_mass": found["student_mass"].double(),
        "teacher_mass": found["teacher_mass"].double() if "teacher_mass" in found else None,
        "next_prob": found["sampled_log_prob"].double().exp(),
    }
