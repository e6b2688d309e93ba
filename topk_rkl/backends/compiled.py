"""What the two compiled backends share: checks what a pointer cannot say, and calls csrc/.

The arguments of an op are those of its struct in csrc/ops.hpp, in that order. Logits, hidden states and `out` are
matrices (N, V), or slabs of rows (S, R, V) with S R = N where no one stride leads from row to row. Outputs are given.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from topk_rkl.backends.pointers import FLOATS, INTEGERS, MAX_VOCAB, Pointers, in_range, rows_of, same_rows
from topk_rkl.divergence import MASSES, Code
from topk_rkl.objective import Objective

DOUBLES = (torch.float64,)
KERNEL_MASSES = MASSES[:4]  # as Mass in csrc/objective.hpp


@dataclass(frozen=True)
class Compiled:
    """The ops of one extension."""

    name: str
    call: Callable[..., None]  # with the op's name, a tensor on the device of all, and the arguments
    device: torch.device | None = None  # of all tensors; None is the device of the first
    max_k: int = MAX_VOCAB
    max_slots: int = 2**31  # that linear_weight_grad sorts
    strided_hidden: bool = False  # linear_weight_grad takes hidden states whose columns are apart
    objective_refusal: Callable[[Code, str], str | None] | None = None

    def select(
        self,
        logits: Tensor,  # (N, V)
        normalize: bool,
        ids: Tensor,  # (N, K) int32
        log_probs: Tensor,  # (N, K) float32
    ) -> None:
        on, shape = self._on(logits), self._selected(logits, ids)
        self.call(
            "select",
            logits,
            on.matrix("logits", logits),
            normalize,
            on.rows("ids", ids, shape, torch.int32),
            on.rows("log_probs", log_probs, shape),
        )

    def support_loss(
        self,
        student: Tensor,  # (N, V)
        ids: Tensor,  # (N, K)
        log_probs: Tensor,  # (N, K)
        weights: Tensor | None,  # (N,)
        objective: Objective,
        loss: Tensor,  # (N,) float32: times the weight of the row, as g
        g: Tensor,  # (N, K) float32
    ) -> None:
        on, (n, k) = self._on(student), self._slots(ids)
        same_rows("student", student, n)
        self.call(
            "support_loss",
            student,
            on.matrix("student", student),
            on.matrix("ids", ids, INTEGERS),
            on.matrix("log_probs", log_probs, FLOATS, (n, k)),
            on.vector("weights", weights, n),
            self._code(objective),
            on.row("loss", loss, n),
            on.rows("g", g, (n, k)),
        )

    def select_loss(
        self,
        student: Tensor,  # (N, V_student)
        teacher: Tensor,  # (N, V)
        weights: Tensor | None,  # (N,)
        objective: Objective,
        loss: Tensor,  # (N,) float32
        ids: Tensor,  # (N, K) int32
        g: Tensor,  # (N, K) float32
    ) -> None:
        on, (n, k) = self._on(teacher), self._selected(teacher, ids)
        same_rows("student", student, n)
        self.call(
            "select_loss",
            teacher,
            on.matrix("student", student),
            on.matrix("teacher", teacher),
            on.vector("weights", weights, n),
            self._code(objective),
            on.row("loss", loss, n),
            on.rows("ids", ids, (n, k), torch.int32),
            on.rows("g", g, (n, k)),
        )

    def scatter(
        self,
        g: Tensor,  # (N, K)
        ids: Tensor,  # (N, K)
        grad_output: Tensor,  # (N,)
        out: Tensor,  # (N, V), overwritten
        unique: bool,
    ) -> None:
        on, (n, k) = self._on(out), self._slots(ids)
        same_rows("out", out, n)
        g = g.float().contiguous()
        self.call(
            "scatter",
            out,
            on.matrix("g", g, shape=(n, k)),
            on.matrix("ids", ids, INTEGERS),
            on.vector("grad_output", grad_output, n),
            on.matrix("out", out),
            unique,
        )

    def tail_logit(
        self,
        logits: Tensor,  # (N, V)
        ids: Tensor,  # (N, K) ascending, none twice in a row, the negative ones last
        temperature: float,
        out: Tensor,  # (N,) float64
    ) -> None:
        on, (n, _) = self._on(logits), self._slots(ids)
        same_rows("logits", logits, n)
        self.call(
            "tail_logit",
            logits,
            on.matrix("logits", logits),
            on.matrix("ids", ids, INTEGERS),
            temperature,
            on.row("out", out, n, torch.float64),
        )

    def mass_loss(
        self,
        student: Tensor,  # (N, V)
        ids: Tensor,  # (N, K) as for `tail_logit`
        log_probs: Tensor,  # (N, K)
        tail: Tensor,  # (N,)
        weights: Tensor | None,  # (N,)
        objective: Objective,
        loss: Tensor,  # (N,) float32
        g: Tensor,  # (N, K) float32
        outside: Tensor,  # (N, 2) float64
    ) -> None:
        on, (n, k) = self._on(student), self._slots(ids)
        same_rows("student", student, n)
        self.call(
            "mass_loss",
            student,
            on.matrix("student", student),
            on.matrix("ids", ids, INTEGERS),
            on.matrix("log_probs", log_probs, FLOATS, (n, k)),
            on.vector("tail", tail, n),
            on.vector("weights", weights, n),
            self._code(objective),
            on.row("loss", loss, n),
            on.rows("g", g, (n, k)),
            on.rows("outside", outside, (n, 2), torch.float64),
        )

    def mass_grad(
        self,
        g: Tensor,  # (N, K)
        ids: Tensor,  # (N, K), none twice in a row
        outside: Tensor,  # (N, 2) float64
        grad_output: Tensor,  # (N,)
        student: Tensor | None,  # (N, V), or None: out holds it
        temperature: float,
        out: Tensor,  # (N, V), overwritten
    ) -> None:
        on, (n, k) = self._on(out), self._slots(ids)
        student = out if student is None else student
        same_rows("out", out, n)
        same_rows("student", student, n, out.shape[-1])
        g = g.float().contiguous()
        self.call(
            "mass_grad",
            out,
            on.matrix("g", g, shape=(n, k)),
            on.matrix("ids", ids, INTEGERS),
            on.matrix("outside", outside, DOUBLES, (n, 2)),
            on.vector("grad_output", grad_output, n),
            on.matrix("student", student),
            temperature,
            on.matrix("out", out),
        )

    def linear_loss(
        self,
        hidden: Tensor,  # (N, H)
        head: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        ids: Tensor,  # (N, K)
        log_probs: Tensor,  # (N, K)
        weights: Tensor | None,  # (N,)
        objective: Objective,
        loss: Tensor,  # (N,) float32
        g: Tensor,  # (N, K) float32
        dhidden: Tensor | None,  # (N, H) float32
    ) -> None:
        on, (n, k), (vocab, width) = self._on(hidden), self._slots(ids), head.shape
        same_rows("hidden", hidden, n, width)
        self.call(
            "linear_loss",
            hidden,
            on.matrix("hidden", hidden),
            on.matrix("head", head),
            on.vector("bias", bias, vocab),
            on.matrix("ids", ids, INTEGERS),
            on.matrix("log_probs", log_probs, FLOATS, (n, k)),
            on.vector("weights", weights, n),
            self._code(objective),
            on.row("loss", loss, n),
            on.rows("g", g, (n, k)),
            on.rows("dhidden", dhidden, (n, width)),
        )

    def linear_logits(
        self,
        hidden: Tensor,  # (N, H)
        head: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        ids: Tensor,  # (N, K)
        out: Tensor,  # (N, K) float32
    ) -> None:
        on, (n, k), (vocab, width) = self._on(hidden), self._slots(ids), head.shape
        same_rows("hidden", hidden, n, width)
        self.call(
            "linear_logits",
            hidden,
            on.matrix("hidden", hidden),
            on.matrix("head", head),
            on.vector("bias", bias, vocab),
            on.matrix("ids", ids, INTEGERS),
            on.rows("out", out, (n, k)),
        )

    def linear_hidden_grad(
        self,
        g: Tensor,  # (N, K)
        ids: Tensor,  # (N, K)
        head: Tensor,  # (V, H)
        out: Tensor,  # (N, H) float32, overwritten
    ) -> None:
        on, (n, k) = self._on(head), self._slots(ids)
        g = g.float().contiguous()
        self.call(
            "linear_hidden_grad",
            head,
            on.rows("g", g, (n, k)),
            on.matrix("ids", ids, INTEGERS),
            on.matrix("head", head),
            on.rows("out", out, (n, head.shape[1])),
        )

    def linear_weight_grad(
        self,
        g: Tensor,  # (N, K)
        ids: Tensor,  # (N, K)
        hidden: Tensor,  # (N, H)
        dhead: Tensor | None,  # (V, H), overwritten
        dbias: Tensor | None,  # (V,), overwritten
    ) -> None:
        on, (n, k), width = self._on(hidden), self._slots(ids), hidden.shape[1]
        vocab = next(len(out) for out in (dhead, dbias) if out is not None)
        if n * k >= self.max_slots:
            most = f"2^{self.max_slots.bit_length() - 1}"
            raise ValueError(
                f"ids has {n} rows of {k} slots; the {self.name} backend sorts fewer than {most}, pass fewer rows"
            )
        g = g.float().contiguous()
        hidden = hidden if self.strided_hidden else hidden.contiguous()
        self.call(
            "linear_weight_grad",
            hidden,
            on.rows("g", g, (n, k)),
            on.matrix("ids", ids, INTEGERS),
            on.matrix("hidden", hidden, shape=(n, width)),
            on.matrix("dhead", dhead, shape=(vocab, width)),
            on.vector("dbias", dbias, vocab),
        )

    def _on(self, first: Tensor) -> Pointers:
        return pointers_on(self.device or first.device)

    def _slots(self, ids: Tensor) -> tuple[int, int]:
        n, k = ids.shape
        in_range("k", k, self.max_k, "the most")
        return n, k

    def _selected(
        self,
        logits: Tensor,  # (N, V)
        ids: Tensor,  # (N, K)
    ) -> tuple[int, int]:
        k, vocab = ids.shape[-1], logits.shape[-1]
        in_range("k", k, min(vocab, self.max_k), "V" if vocab <= self.max_k else "the most")
        return rows_of(logits), k

    def _code(self, objective: Objective) -> tuple[float, tuple[float, ...], int, float, float]:
        temperature, divergence, mass, logit_scale, softcap = objective
        assert not callable(divergence)
        if self.objective_refusal is not None and (reason := self.objective_refusal(divergence, mass)):
            raise ValueError(f"divergence is {divergence} and mass {mass!r}; {reason}")
        return temperature, tuple(divergence), KERNEL_MASSES.index(mass), logit_scale, softcap or 0.0


@functools.cache
def pointers_on(device: torch.device) -> Pointers:
    return Pointers(device)
