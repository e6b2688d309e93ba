"""The groups of the smoke test: checks of a backend against the reference, by the assertions of the tests."""

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from conftest import DEVICE
from torch import Tensor

from tests import cases, linear_problem
from tests.direct import Direct, reference
from tests.oracles import assert_selects
from tests.probes import captured
from topk_rkl import backends, teacher_topk, topk_reverse_kl, use_backend
from topk_rkl.divergence import JensenShannon, ReverseKL

# A kernel with its sizes, and the call that raises where it is wrong.
Check = tuple[str, Callable[[], object]]
Group = Callable[[str, bool], Iterator[Check]]  # of a backend's name, and whether small sizes do

BF16 = torch.bfloat16
V = 151_936  # of Qwen 2.5 and 3
DTYPES = {"bfloat16": BF16, "float16": torch.float16, "float32": torch.float32}


def normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE).normal_()


def selection(backend: str, small: bool, dtype: str) -> Iterator[Check]:
    module = Direct(backends._load(backend))
    sizes = [(V, 64), (V, 32), (V, 256), (V, 1_024), (50_257, 64), (50_257, 256), (4_099, 32), (4_099, 1_024), (33, 33)]
    for vocab, k in [(33, 5), (300, 20)] if small else sizes:
        names = ["many_ties_at_the_kth", "fewer_than_k_finite"] if small else None
        rows = cases.rows(vocab, k, DTYPES[dtype], names, DEVICE)
        yield f"select {dtype} V {vocab} K {k}", partial(assert_selects, module, rows, k)
        if not small:
            many = normal(600, vocab, dtype=DTYPES[dtype])
            yield f"select {dtype} V {vocab} K {k} N 600", partial(assert_selects, module, many, k)
    logits = normal(2 if small else 8, 300 if small else 50_257, dtype=DTYPES[dtype]) * 4
    yield f"select {dtype} V {logits.shape[1]} K 20 normalized", partial(assert_log_probs, module, logits, 20)


def assert_log_probs(
    module: Any,
    logits: Tensor,  # (N, V)
    k: int,
) -> None:
    ids, values = module.select(logits, k, True)
    want = logits.double().log_softmax(-1).gather(1, ids.long())
    torch.testing.assert_close(values.double(), want, rtol=1e-6, atol=4e-6)


def loss(backend: str, small: bool) -> Iterator[Check]:
    module, (n, vocab) = Direct(backends._load(backend)), (3, 300) if small else (300, V)
    student, teacher, weights = normal(n, vocab), normal(n, vocab), torch.rand(n, device=DEVICE)
    weights[1] = 0
    for k in (9,) if small else (32, 64, 256, 1_024):
        for t in (1.0, 0.05):
            size = f"N {n} V {vocab} K {k} T {t}"
            yield f"select_loss {size}", partial(assert_loss, module, student, teacher, k, weights, t)
            ids, values = reference.select(teacher, k)
            yield f"support_loss {size}", partial(assert_support_loss, module, student, ids, values, weights, t)


def assert_near(got: Tensor, want: Tensor) -> None:
    """Of the largest value: 2e-6, or what float64 is rounded by."""
    off = (got.double() - want.double()).abs().max() / want.abs().max()
    assert off < 2e-6, f"off by {off:.0e} of the largest"


def assert_loss(
    module: Any,
    student: Tensor,  # (N, V)
    teacher: Tensor,  # (N, V)
    k: int,
    weights: Tensor,  # (N,)
    temperature: float,
) -> None:
    loss, ids, g = module.select_loss(student, teacher, k, weights, temperature)
    want = reference.select_loss(student.double(), teacher.double(), k, weights.double(), temperature)
    live = weights != 0  # a row of weight 0 may select or not
    assert torch.equal(ids[live], want[1][live].to(ids.dtype)), "other ids"
    assert_near(loss, want[0])
    assert_near(g, want[2])


def assert_support_loss(
    module: Any,
    student: Tensor,  # (N, V)
    ids: Tensor,  # (N, K)
    values: Tensor,  # (N, K)
    weights: Tensor,  # (N,)
    temperature: float,
) -> None:
    got = module.support_loss(student, ids, values, weights, temperature)
    want = reference.support_loss(student.double(), ids, values.double(), weights.double(), temperature)
    for a, b in zip(got, want, strict=True):
        assert_near(a, b)


def scatter(backend: str, small: bool) -> Iterator[Check]:
    module, (n, vocab, k) = Direct(backends._load(backend)), (3, 300, 8) if small else (300, V, 64)
    ids, g = normal(n, vocab).topk(k).indices.int(), torch.randn(n, k, device=DEVICE)
    repeated = torch.cat([ids[:, :1], ids[:, :-1]], 1)
    for dtype in (BF16, torch.float32):
        for unique, given in ((True, ids), (False, repeated)):
            name = f"scatter {'unique' if unique else 'repeated'} {dtype} N {n} V {vocab} K {k}"
            yield name, partial(assert_scatters, module, g, given, dtype, vocab, unique)


def assert_scatters(
    module: Any,
    g: Tensor,  # (N, K)
    ids: Tensor,  # (N, K)
    dtype: torch.dtype,
    vocab: int,
    unique: bool,
) -> None:
    scale = torch.rand(len(g), device=DEVICE)
    outs = [torch.full((len(g), vocab), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2)]
    for which, out in zip((module, reference), outs, strict=True):
        which.scatter(g, ids, scale, out, unique)
    torch.testing.assert_close(*outs, rtol=2**-7 if dtype == BF16 else 1e-6, atol=1e-6)


def head(backend: str, small: bool) -> Iterator[Check]:
    module = Direct(backends._load(backend))
    sizes = [(40, 32, 3_000, 4_096), (40, 64, 3_000, 4_096), (9, 300, 900, 1_030), (5, 5, 60, 70)]
    for n, k, vocab, width in [(2, 2, 9, 18)] if small else sizes:
        for dtype in (BF16, torch.float32):
            problem = linear_problem.draw(n, k, vocab, width, dtype, biased=True, weighted=True, softcap=20.0)
            size = f"{dtype} N {n} K {k} V {vocab} H {width}"
            yield f"linear_loss {size}", partial(linear_problem.assert_equals_the_reference, module, problem)
            yield f"weight_grad {size}", partial(assert_weight_grad, module, problem)
            if hasattr(module.module, "linear_logits"):  # "cuda" has no halves
                compared = linear_problem.assert_halves_equal_the_reference
                yield f"halves of linear_loss {size}", partial(compared, module, problem)
    if not small:
        ids = torch.randint(0, 50, (5_000, 4), device=DEVICE)
        ids[:, 0] = 7  # in every row
        g, hidden = torch.randn(5_000, 4, device=DEVICE), torch.randn(5_000, 1_030, device=DEVICE)
        compared = linear_problem.assert_weight_grad_equals_the_reference
        yield "weight_grad N 5000 K 4 H 1030, an id in every row", partial(compared, module, g, ids, hidden, 60)


def assert_weight_grad(module: Any, problem: linear_problem.Problem) -> None:
    _, g, _ = problem.run(reference)
    linear_problem.assert_weight_grad_equals_the_reference(module, g, problem.ids, problem.hidden, len(problem.head))


def mass(backend: str, small: bool) -> Iterator[Check]:
    module, (n, vocab, k) = Direct(backends._load(backend)), (2, 300, 9) if small else (60, V, 20)
    student, teacher = normal(n, vocab, dtype=torch.float32) * 3, normal(n, vocab, dtype=torch.float32) * 3
    for divergence in (ReverseKL(), JensenShannon(0.3)):
        name = f"tail_logit, mass_loss, mass_grad of {divergence} N {n} V {vocab} K {k}"
        yield name, partial(assert_tail, module, student, teacher, k, divergence.code)


def assert_tail(
    module: Any,
    student: Tensor,  # (N, V)
    teacher: Tensor,  # (N, V)
    k: int,
    code: tuple[float, ...],
) -> None:
    ids = teacher.topk(k).indices.sort(1).values
    results = []
    for which, z, w in ((module, student, teacher), (reference, student.double(), teacher.double())):
        w = w.log_softmax(1)
        tail = which.tail_logit(w, ids, 1.0)
        loss, g, outside = which.mass_loss(z, ids, w.gather(1, ids), tail, None, 1.0, code, "tail")
        out = torch.full_like(z, torch.nan)
        which.mass_grad(g, ids, outside, torch.ones_like(loss), z, 1.0, out)
        results.append([x.double() for x in (loss, g, out)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def slabs(backend: str, small: bool) -> Iterator[Check]:
    """logits[:, :-1] of a batch, whose rows no stride joins."""
    for vocab in (49,) if small else (V, 50_257):
        shape = (2, 2, vocab) if small else (64, 65, vocab)
        yield f"logits[:, :-1] of {shape}", partial(assert_slabs, backend, normal(*shape), normal(*shape))


def assert_slabs(
    backend: str,
    student: Tensor,  # (B, T, V)
    teacher: Tensor,  # (B, T, V)
) -> None:
    results = []
    with use_backend(backend):
        for form in (lambda x: x[:, :-1], lambda x: x[:, :-1].contiguous()):
            leaf = student.clone().requires_grad_()
            loss = topk_reverse_kl(form(leaf), form(teacher), k=16, reduction="none")
            loss.sum().backward()
            results.append((loss.detach(), leaf.grad, *teacher_topk(form(teacher), 16).tensors))
    assert all(map(torch.equal, *results)), "other bits than of contiguous rows"


def graph(backend: str, small: bool) -> Iterator[Check]:
    if not small:
        logits = normal(64, V), normal(64, V)
        yield f"topk_reverse_kl captured in a graph N 64 V {V} K 64", partial(assert_replays, backend, *logits)


def assert_replays(
    backend: str,
    student: Tensor,  # (N, V)
    teacher: Tensor,  # (N, V)
) -> None:
    student.requires_grad_()

    def step() -> tuple[Tensor, ...]:
        student.grad = None
        loss = topk_reverse_kl(student, teacher, k=64)
        loss.backward()
        return loss, student.grad

    with use_backend(backend):
        replayed, results = captured(step)
        teacher.normal_()
        replayed.replay()
        got = [x.detach().clone() for x in results]
        assert all(map(torch.equal, got, step())), "a replay has other bits than a call"


def stress(backend: str, small: bool) -> Iterator[Check]:
    """Thousands of programs at once, again and again: a race shows as bits that change, or as a wrong row."""
    n, vocab = (3, 100) if small else (4_096, V)
    student, teacher = normal(n, vocab), normal(n, vocab)
    for k in (5,) if small else (32, 64, 256):
        name = f"select_loss and scatter 12 times N {n} V {vocab} K {k}"
        yield name, partial(assert_repeats, Direct(backends._load(backend)), student, teacher, k, 2 if small else 12)


def assert_repeats(
    module: Any,
    student: Tensor,  # (N, V)
    teacher: Tensor,  # (N, V)
    k: int,
    turns: int,
) -> None:
    loss, ids, g = first = module.select_loss(student, teacher, k, None, 1.0)
    values = teacher.float().topk(k).values
    assert torch.equal(teacher.gather(1, ids.long()).float(), values), "not the largest"
    assert ((ids.diff(dim=1) > 0) | (values.diff(dim=1) != 0)).all(), "ties are not by id"
    out, other = torch.empty_like(student), torch.empty_like(student)
    module.scatter(g, ids, loss, out, True)
    assert (out != 0).sum() <= g.numel(), "a gradient outside the support"
    for turn in range(turns):
        again = module.select_loss(student, teacher, k, None, 1.0)
        assert all(map(torch.equal, again, first)), f"another loss in turn {turn}"
        module.scatter(g, ids, loss, other.fill_(torch.nan), True)
        assert torch.equal(out, other), f"another gradient in turn {turn}"


def threads(backend: str, small: bool) -> Iterator[Check]:
    """Launches of one kernel with little and with much shared memory, which is an attribute of the kernel."""
    if not small:
        module, problems = (
            Direct(backends._load(backend)),
            [linear_problem.draw(4, k, 300, 4_096, BF16) for k in (8, 64)],
        )
        yield "linear_loss K 8 and K 64 H 4096 from two threads", partial(assert_threads, module, problems)


def assert_threads(module: Any, problems: list[linear_problem.Problem], seconds: float = 2.0) -> None:
    wants = [problem.run(module) for problem in problems]
    errors: list[str] = []
    until = time.monotonic() + seconds

    def launch(problem: linear_problem.Problem, want: tuple[Tensor, ...]) -> None:
        calls = 0
        try:
            while time.monotonic() < until:
                got, calls = problem.run(module), calls + 1
            assert all(map(torch.equal, got, want)), "other bits"
        except Exception as error:  # of a thread, which would be lost
            errors.append(f"K {problem.ids.shape[1]}, call {calls}: {type(error).__name__}: {error}")

    started = [threading.Thread(target=launch, args=pair) for pair in zip(problems, wants, strict=True)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    assert not errors, "; ".join(errors)


GROUPS: dict[str, Group] = {
    **{f"selection {dtype}": partial(selection, dtype=dtype) for dtype in DTYPES},
    **{group.__name__: group for group in (loss, scatter, head, stress, graph, slabs, mass, threads)},
}
