"""Promise: memory. The most that a call holds, whoever asks for it, beyond what was held before and the gradients."""

import ctypes
import gc
import multiprocessing
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import BACKENDS, DEVICE, LiveBytes
from torch import Tensor

from tests.direct import Direct
from topk_rkl import (
    ForwardKL,
    ReverseKL,
    Support,
    backends,
    linear_teacher_topk,
    linear_topk_reverse_kl,
    rows,
    teacher_topk,
    topk_divergence,
    use_backend,
)
from topk_rkl.diagnostics import NAMES, topk_diagnostics
from topk_rkl.recipe.builders import fixed_ids, student_topk, teacher_top_p, with_sampled
from topk_rkl.recipe.composition import mixture, taid
from topk_rkl.recipe.rollout import sampled_token_loss

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux"),
    pytest.mark.skipif(DEVICE != "cpu", reason="test_gpu.py counts the memory of a GPU"),
    pytest.mark.xdist_group("memory"),  # one process measures for all
]

HAVE_IT = [
    name for name in BACKENDS if name in ("native", "reference")
]  # an interpreter copies every tensor of a launch
K, MIB = 32, 1 << 20
LOGITS = 512, 131_072  # (N, V): 128 MiB in 16 bits, so that one copy in any dtype is beyond the 64 MiB allowed
STATES = 8_192, 16_384, 256  # (N, V, H): N V elements are 256 MiB in 16 bits, N K H elements 128

Call = Callable[[], object]


def numbers(
    count: int,
    columns: int,
) -> Tensor:  # (count, columns) bfloat16
    """Few are drawn."""
    return torch.randn(min(count, 16), columns).bfloat16().repeat(-(-count // 16), 1)[:count]


def leaf(*shape: int) -> Tensor:
    return numbers(*shape).requires_grad_()


def select(n: int) -> Call:
    teacher = numbers(n, LOGITS[1])
    return lambda: teacher_topk(teacher, K)


def select_normalized(n: int) -> Call:
    teacher = numbers(n, LOGITS[1])
    return lambda: teacher_topk(teacher, K, normalize=True)


def loss_on(given: str, n: int, **options: object) -> Call:
    """The loss alone: its backward pass makes the gradient, and is measured on its own."""
    student, teacher = (leaf(n, LOGITS[1]), numbers(n, LOGITS[1]))
    target, k = (teacher, K) if given == "logits" else (teacher_topk(teacher, K, normalize=True), None)
    return lambda: topk_divergence(student, target, k=k, **options)


def loss(n: int) -> Call:
    return loss_on("logits", n)


def loss_of_a_support(n: int) -> Call:
    return loss_on("support", n)


def loss_of_another_form(n: int) -> Call:
    return loss_on("logits", n, divergence=ForwardKL())


def loss_with_a_tail(n: int) -> Call:
    return loss_on("logits", n, mass="tail")


def loss_on_raw_probabilities(n: int) -> Call:
    return loss_on("support", n, mass="raw")


def loss_with_the_sampled_token(n: int) -> Call:
    return loss_on("logits", n, mass="ema_pg", sampled_ids=torch.zeros(n, dtype=torch.long))


def backward_of(loss: Tensor) -> Call:
    return lambda: loss.backward()


def gradient(n: int) -> Call:
    return backward_of(loss(n)())


def gradient_of_a_support(n: int) -> Call:
    return backward_of(loss_of_a_support(n)())


def gradient_with_a_tail(n: int) -> Call:
    return backward_of(loss_with_a_tail(n)())


def overwriting(n: int, **options: str) -> Call:
    logits, teacher = leaf(n, LOGITS[1]) * 1, numbers(n, LOGITS[1])
    loss = topk_divergence(logits, teacher, k=K, overwrite_student_logits=True, **options)
    return lambda: torch.autograd.grad(loss, logits)


def overwriting_with_a_tail(n: int) -> Call:
    return overwriting(n, mass="tail")


def head(n: int, trained: bool = False, **options: str) -> Call:
    _, vocab, width = STATES
    hidden, weight = leaf(n, width), numbers(vocab, width).requires_grad_(trained)
    support = Support(torch.randint(vocab, (n, K)), torch.randn(n, K))
    return lambda: linear_topk_reverse_kl(hidden, weight, support, **options).backward()


def frozen_head(n: int) -> Call:
    return head(n)


def trained_head(n: int) -> Call:
    return head(n, trained=True)


def row_sparse_head(n: int) -> Call:
    return head(n, trained=True, weight_grad="sparse")


def select_from_states(n: int) -> Call:
    hidden, weight = numbers(n, 16).float(), numbers(LOGITS[1], 16).float()
    return lambda: linear_teacher_topk(hidden, weight, K)


def builders(n: int) -> Call:
    student, teacher = (numbers(n, LOGITS[1]) for _ in range(2))

    def call() -> None:
        best = student_topk(student, teacher, K, normalize=True)
        teacher_top_p(teacher, 0.9, K)
        fixed_ids(teacher, range(K), normalize=True)
        with_sampled(best, torch.arange(n), teacher)

    return call


def composition(n: int) -> Call:
    student, teacher = (numbers(n, LOGITS[1]) for _ in range(2))

    def call() -> None:
        mixture([student, teacher], [0.3, 0.7], k=K)
        taid(student, teacher, t=0.5, k=K)

    return call


def diagnostics(n: int) -> Call:
    student, teacher = leaf(n, LOGITS[1]), numbers(n, LOGITS[1])
    sampled = torch.zeros(n, dtype=torch.long)
    return lambda: topk_diagnostics(student, teacher, NAMES, k=K, sampled_ids=sampled)


def sampled_token(n: int) -> Call:
    student, teacher = leaf(n, LOGITS[1]), numbers(n, LOGITS[1])
    return lambda: sampled_token_loss(student, teacher, torch.zeros(n, dtype=torch.long))


def gradient_of_a_sampled_token(n: int) -> Call:
    return backward_of(sampled_token(n)())


SLOTS = LOGITS[0] * K * 16 / MIB + 64
OF_STATES = STATES[0] * K * 16 / MIB + 64
GRADIENT = LOGITS[0] * LOGITS[1] * 2 / MIB
OF_HIDDEN = STATES[0] * STATES[2] * (2 + 4) / MIB  # and in float32
OF_HEAD = STATES[1] * STATES[2] * 2 / MIB
ON_EVERY_BACKEND = {  # MiB
    select: SLOTS,
    select_normalized: SLOTS,
    loss: SLOTS,
    loss_of_a_support: SLOTS,
    loss_of_another_form: SLOTS,
    loss_with_a_tail: SLOTS,
    loss_on_raw_probabilities: SLOTS,
    gradient: GRADIENT + SLOTS,
    gradient_of_a_support: GRADIENT + SLOTS,
    gradient_with_a_tail: GRADIENT + SLOTS,
    overwriting: SLOTS,
    overwriting_with_a_tail: SLOTS,
    frozen_head: OF_HIDDEN + OF_STATES,
    trained_head: OF_HIDDEN + OF_HEAD + OF_STATES,
    row_sparse_head: OF_HIDDEN + 2 * OF_HEAD + OF_STATES,
}
IN_PLAIN_PYTORCH = {
    loss_with_the_sampled_token: SLOTS,
    select_from_states: 128 + SLOTS,
    builders: SLOTS,
    composition: SLOTS + 2 * 16,
    diagnostics: SLOTS + 3 * 64,
    sampled_token: SLOTS,
    gradient_of_a_sampled_token: GRADIENT + SLOTS,
}


def peak(build: Callable[[int], Call], n: int, backend: str, chunk_bytes: int) -> float:  # MiB
    """Run in a process of its own. A first call, on few rows, also loads what is loaded once."""
    torch.manual_seed(0)
    rows.CHUNK_BYTES = chunk_bytes
    with use_backend(backend):
        build(8)()
        call = build(n)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS")
        call()
        return (resident("VmHWM") - before) / MIB


def resident(field: str) -> int:  # bytes
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


@pytest.fixture(scope="module")
def apart() -> Iterator[ProcessPoolExecutor]:
    """A process whose allocator gives back what is freed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", str(MIB // 4))
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            process.submit(torch.set_num_threads, 1).result()
            yield process


@pytest.mark.parametrize("build", ON_EVERY_BACKEND, ids=lambda build: build.__name__)
def test_memory_of(build: Callable[[int], Call], backend: str, apart: ProcessPoolExecutor) -> None:
    """The reference sorts whole rows: it gets an eighth of the logits, of the chunk and of what is allowed."""
    if "head" in build.__name__:
        share, n = 1, STATES[0]
    else:
        share = 8 if backend == "reference" else 1
        n = LOGITS[0] // share
    assert apart.submit(peak, build, n, backend, rows.CHUNK_BYTES // share).result() <= ON_EVERY_BACKEND[build] / share


@pytest.mark.parametrize("build", IN_PLAIN_PYTORCH, ids=lambda build: build.__name__)
def test_memory_in_plain_pytorch_of(build: Callable[[int], Call], apart: ProcessPoolExecutor) -> None:
    held = apart.submit(peak, build, LOGITS[0], "auto", rows.CHUNK_BYTES).result()
    assert held <= IN_PLAIN_PYTORCH[build]


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
def test_memory_that_the_launches_of_triton_ask_for(monkeypatch) -> None:
    """The kernels are left out: the interpreter copies every tensor of a launch."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *_, **__: None)
    module, n = Direct(backends._load("triton")), LOGITS[0]
    logits, out, ids = numbers(*LOGITS), numbers(*LOGITS), torch.randint(LOGITS[1], (n, K), dtype=torch.int32)
    slots, row, outside = torch.randn(n, K), torch.randn(n), torch.randn(n, 2, dtype=torch.float64)
    kl = ReverseKL().code
    calls = [
        lambda: module.select(logits, K),
        lambda: module.select(logits, K, True),
        lambda: module.support_loss(logits, ids, slots, row, 1.0),
        lambda: module.select_loss(logits, out, K, row, 1.0),
        lambda: module.scatter(slots, ids, row, out, True),
        lambda: module.scatter(slots, ids, row, out, False),
        lambda: module.tail_logit(logits, ids, 1.0),
        lambda: module.mass_loss(logits, ids, slots, row, row, 1.0, kl, "tail"),
        lambda: module.mass_grad(slots, ids, outside, row, logits, 1.0, out),
        lambda: module.mass_grad(slots, ids, outside, row, None, 1.0, out),
    ]
    for call in calls:
        with LiveBytes() as memory:
            call()
            assert memory.peak <= SLOTS * MIB
    n, vocab, width = STATES
    hidden, head, dhead = numbers(n, width), numbers(vocab, width), numbers(vocab, width)
    ids, slots = torch.randint(vocab, (n, K), dtype=torch.int32), torch.randn(n, K)
    with LiveBytes() as memory:
        module.linear_loss(hidden, head, None, ids, slots, None, 1.0, 1.0, None, True)
    assert memory.peak <= (OF_HIDDEN + OF_STATES) * MIB
    with LiveBytes() as memory:
        module.linear_weight_grad(slots, ids, hidden, dhead, None)
    assert memory.peak <= OF_STATES * MIB
