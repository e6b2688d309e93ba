"""The registry of contestants, each called as its users call it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.cases import DTYPES, Case
from benchmarks.problems import FORWARD, OF_STATES, TOP_K, WHOLE, Problem, on_slots
from topk_rkl import linear_teacher_topk, linear_topk_reverse_kl, teacher_topk, topk_reverse_kl, use_backend
from topk_rkl.backends import unavailable

CHUNK = 32  # positions


@dataclass
class Runner:
    """A contestant at work on a problem.

    `forward` gives the values and ids of a selection, or the mean of a loss. The gradients of a loss exist after
    `backward`, or before it where the forward pass makes them. `prepare` undoes what an earlier call changed.
    """

    forward: Callable[[], Any]
    leaves: list[Tensor] = field(default_factory=list)
    prepare: Callable[[], object] = lambda: None
    gradients: Callable[[], list[Tensor]] | None = None

    def backward(self, out: Any, /) -> None:
        if isinstance(out, Tensor) and out.requires_grad:
            out.backward()

    def fresh(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        self.prepare()

    def results(self) -> list[Tensor]:
        return self.gradients() if self.gradients else [leaf.grad for leaf in self.leaves]


Build = Callable[[Problem], Runner]


class Contestant(NamedTuple):
    name: str
    work: str
    build: Build
    objective: str = TOP_K
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = tuple(DTYPES)
    compiles: bool = False  # for seconds, before its first call

    @property
    def ours(self) -> bool:
        return self.name.startswith("topk_rkl")


class Unavailable(Exception):
    """A backend of ours cannot run on this machine, which is no fault of it."""


def select_ours(p: Problem) -> Runner:
    return Runner(lambda: teacher_topk(p.teacher, p.case.k).tensors[::-1])


def select_torch(p: Problem) -> Runner:
    return Runner(lambda: p.teacher.topk(p.case.k))


def select_numpy(p: Problem) -> Runner:
    """numpy uses one thread."""
    import numpy as np

    rows, kept = p.teacher.numpy(), slice(p.case.v - p.case.k, None)

    def largest() -> tuple[Tensor, Tensor]:
        ids = np.argpartition(rows, p.case.v - p.case.k, axis=-1)[:, kept]
        return torch.from_numpy(np.take_along_axis(rows, ids, -1)), torch.from_numpy(ids)

    return Runner(largest)


def select_flashinfer(p: Problem) -> Runner:
    top_k = peers.flashinfer_top_k()
    return Runner(lambda: top_k(p.teacher, p.case.k))


def loss_ours(p: Problem) -> Runner:
    return Runner(lambda: topk_reverse_kl(p.student, p.teacher, k=p.case.k), p.leaves)


def plain(
    student: Tensor,  # (N, V)
    teacher: Tensor,  # (N, V)
    k: int,
) -> Tensor:  # ()
    """The README's plain form: gathers first, then casts to float32."""
    w, ids = teacher.topk(k, dim=-1)
    return plain_on_ids(student, w.float(), ids)


def plain_in_float32(
    student: Tensor,  # (N, V)
    teacher: Tensor,  # (N, V)
    k: int,
) -> Tensor:  # ()
    """The plain form of trainers whose logits are float32."""
    return plain(student.float(), teacher.float(), k)


def plain_on_ids(
    student: Tensor,  # (N, V)
    w: Tensor,  # (N, K)
    ids: Tensor,  # (N, K) int64
) -> Tensor:  # ()
    return on_slots(student.gather(-1, ids).float(), w).mean()


def loss_plain(p: Problem, function: Callable[..., Tensor] = plain, compiled: bool = False) -> Runner:
    function = torch.compile(function, dynamic=False) if compiled else function
    return Runner(lambda: function(p.student, p.teacher, p.case.k), p.leaves)


def loss_on(peer: Callable[..., peers.Loss], p: Problem) -> Runner:
    """The peer's loss on ids, with the selection that its trainer makes first."""

    def forward() -> Tensor:
        w, ids = p.teacher.topk(p.case.k)
        return peer(p.student, ids, w.float())()

    return Runner(forward, p.leaves)


def ids_ours(p: Problem) -> Runner:
    return Runner(lambda: topk_reverse_kl(p.student, p.support), p.leaves)


class Logits(torch.autograd.Function):
    """Logits as a head gives them: no leaf, with the memory of `buffer`. No gradient goes further."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, buffer: Tensor) -> Tensor:
        return buffer.view_as(buffer)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def ids_overwriting(p: Problem) -> Runner:
    buffer = p.student.detach().clone()

    def forward() -> Tensor:
        return topk_reverse_kl(Logits.apply(p.student, buffer), p.support, overwrite_student_logits=True)

    return Runner(forward, prepare=lambda: buffer.copy_(p.student.detach()), gradients=lambda: [buffer])


def ids_plain(p: Problem, compiled: bool = False) -> Runner:
    function = torch.compile(plain_on_ids, dynamic=False) if compiled else plain_on_ids
    return Runner(lambda: function(p.student, p.support.log_probs, p.ids), p.leaves)


def ids_peer(peer: Callable[..., peers.Loss], p: Problem) -> Runner:
    return Runner(peer(p.student, p.ids, p.support.log_probs), p.leaves)


def ids_nemo(p: Problem) -> Runner:
    """Given one position more than counts, since it drops the last."""
    longer = torch.cat([p.student.detach(), p.student.detach()[:1]]).requires_grad_()
    ids, log_probs = (torch.cat([x, x[:1]]) for x in (p.ids, p.support.log_probs))
    return Runner(peers.nemo_rl(longer, ids, log_probs), [longer], gradients=lambda: [longer.grad[:-1]])


def fast_llm(p: Problem) -> Runner:
    """One kernel makes loss and gradient, in the forward pass."""
    loss, gradients = peers.fast_llm(p.student, p.teacher)
    return Runner(loss, gradients=gradients, prepare=lambda: gradients().clear())


def linear_ours(p: Problem, from_states: bool = False) -> Runner:
    """The loss on an existing support, or with the selection of one from the teacher's hidden states."""
    layout = "sparse" if p.case.gradients == "sparse head" else "dense"

    def forward() -> Tensor:
        support = linear_teacher_topk(*p.other_teacher, p.case.k) if from_states else p.support
        return linear_topk_reverse_kl(p.hidden, p.head, support, weight_grad=layout)

    return Runner(forward, p.leaves)


def plain_linear(
    hidden: Tensor,  # (N, H)
    head: Tensor,  # (V, H)
    ids: Tensor,  # (N, K) int64
    w: Tensor,  # (N, K)
) -> Tensor:  # ()
    """Multiplies by the whole head and gathers from the logits."""
    return on_slots((hidden @ head.T).gather(-1, ids).float(), w).mean()


def linear_plain(p: Problem, compiled: bool = False) -> Runner:
    function = torch.compile(plain_linear, dynamic=False) if compiled else plain_linear
    return Runner(lambda: function(p.hidden, p.head, p.ids, p.support.log_probs), p.leaves)


def gathered(p: Problem, rows: slice = slice(None)) -> Tensor:  # (n,)
    """Multiplies by the K rows of the head alone."""
    sparse = p.case.gradients == "sparse head"
    head_rows = F.embedding(p.ids[rows], p.head, sparse=True) if sparse else p.head[p.ids[rows]]  # (n, K, H)
    z = torch.bmm(head_rows, p.hidden[rows, :, None]).squeeze(-1)
    return on_slots(z.float(), p.support.log_probs[rows])


def linear_gathered(p: Problem) -> Runner:
    return Runner(lambda: gathered(p).mean(), p.leaves)


def linear_gathered_in_chunks(p: Problem) -> Runner:
    """The gradients are made in the forward pass, as those who chunk do."""

    def forward() -> Tensor:
        parts = []
        for start in range(0, p.case.n, CHUNK):
            loss = gathered(p, slice(start, start + CHUNK)).sum() / p.case.n
            loss.backward()
            parts.append(loss.detach())
        return torch.stack(parts).sum()

    return Runner(forward, p.leaves)


def linear_peer(peer: Callable[..., peers.Loss], p: Problem, **options: bool) -> Runner:
    return Runner(peer(p.hidden, p.head, p.ids, p.support.log_probs, **options), p.leaves)


def linear_whole(peer: Callable[..., peers.Loss], p: Problem, **options: bool) -> Runner:
    return Runner(peer(p.hidden, p.head, *p.other_teacher, **options), p.leaves)


def in_cuda(build: Build, p: Problem) -> Runner:
    """This package's own, by its CUDA C++ kernels; the backward pass takes the backend of its forward."""
    if reason := unavailable("cuda"):
        raise Unavailable(reason)
    runner = build(p)

    def forward() -> Any:
        with use_backend("cuda"):
            return runner.forward()

    return replace(runner, forward=forward)


CPU, CUDA = ("cpu",), ("cuda",)
FROM_STATES = "topk_rkl, teacher from its hidden states"
CONTESTANTS = [
    Contestant("topk_rkl", "select", select_ours),
    Contestant("topk_rkl, CUDA C++", "select", partial(in_cuda, select_ours), devices=CUDA),
    Contestant("torch.topk", "select", select_torch),
    Contestant("numpy.argpartition", "select", select_numpy, devices=CPU, dtypes=("float32",)),
    Contestant("FlashInfer", "select", select_flashinfer, devices=CUDA),
    Contestant("topk_rkl", "loss", loss_ours),
    Contestant("topk_rkl, CUDA C++", "loss", partial(in_cuda, loss_ours), devices=CUDA),
    Contestant("plain", "loss", loss_plain),
    Contestant("plain in float32", "loss", partial(loss_plain, function=plain_in_float32)),
    Contestant("torch.compile", "loss", partial(loss_plain, compiled=True), compiles=True),
    Contestant("ms-swift", "loss", partial(loss_on, peers.ms_swift)),
    Contestant("Fast-LLM", "loss", fast_llm, WHOLE, CUDA),
    Contestant("topk_rkl", "loss on ids", ids_ours),
    Contestant("topk_rkl, overwriting", "loss on ids", ids_overwriting),
    Contestant("plain", "loss on ids", ids_plain),
    Contestant("torch.compile", "loss on ids", partial(ids_plain, compiled=True), compiles=True),
    Contestant("ms-swift", "loss on ids", partial(ids_peer, peers.ms_swift)),
    Contestant("NeMo-RL", "loss on ids", ids_nemo),
    Contestant("verl", "loss on ids", partial(ids_peer, peers.verl), FORWARD),
    Contestant("topk_rkl", "linear", linear_ours),
    Contestant("topk_rkl, CUDA C++", "linear", partial(in_cuda, linear_ours), devices=CUDA),
    Contestant(FROM_STATES, "linear", partial(linear_ours, from_states=True), OF_STATES),
    Contestant("plain", "linear", linear_plain),
    Contestant("torch.compile", "linear", partial(linear_plain, compiled=True), compiles=True),
    Contestant("gathered", "linear", linear_gathered),
    Contestant("gathered in chunks", "linear", linear_gathered_in_chunks),
    Contestant("axolotl", "linear", partial(linear_peer, peers.axolotl)),
    Contestant("axolotl, compiled", "linear", partial(linear_peer, peers.axolotl, compiled=True), compiles=True),
    Contestant("VeOmni", "linear", partial(linear_peer, peers.veomni), FORWARD),
    Contestant("TRL", "linear", partial(linear_whole, peers.trl), WHOLE),
    Contestant("Liger", "linear", partial(linear_whole, peers.liger), WHOLE),
    Contestant("Liger, compiled", "linear", partial(linear_whole, peers.liger, compiled=True), WHOLE, compiles=True),
    Contestant("Liger, Triton", "linear", partial(linear_whole, peers.liger_triton), WHOLE, CUDA),
]


PLAIN_TORCH = ("torch.topk", "plain", "plain in float32", "gathered", "gathered in chunks")


def taking_part(case: Case, device: str, only_ours: bool = False) -> list[Contestant]:
    """With `only_ours` neither other projects nor torch.compile: this package, and plain PyTorch beside it."""
    return [
        contestant
        for contestant in CONTESTANTS
        if contestant.work == case.work
        and device in contestant.devices
        and case.dtype in contestant.dtypes
        and (not case.contestants or contestant.name in case.contestants)
        and not (contestant.compiles and case.name == "tiny")
        and (not only_ours or contestant.ours or contestant.name in PLAIN_TORCH)
    ]
