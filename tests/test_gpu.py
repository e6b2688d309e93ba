"""The promises that only a GPU can show: graphs, streams, real memory, offsets past 2^31. Run by `make gpu`."""

from collections.abc import Callable

import pytest
import torch
from conftest import BACKENDS
from torch.utils.data import DataLoader

from tests.oracles import plain, run, stable_sort
from tests.probes import captured
from topk_rkl import (
    Mixture,
    Support,
    linear_topk_reverse_kl,
    teacher_topk,
    topk_divergence,
    topk_reverse_kl,
    use_backend,
)
from topk_rkl.recipe.builders import intersection, remap, student_topk, teacher_top_p, union, with_sampled
from topk_rkl.recipe.composition import mixture, residual, taid
from topk_rkl.recipe.rewards import log_ratio, return_to_go

pytestmark = pytest.mark.gpu
# Of these some hold 20 GB: one worker runs them, one at a time.
large = pytest.mark.xdist_group("large")


@pytest.fixture(autouse=True)
def _without_poison():
    """Filling fresh memory costs time and memory that these tests count; what is freed is for the other workers."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.cuda.empty_cache()


@pytest.fixture(params=[name for name in BACKENDS if name != "reference"])
def kernels(request: pytest.FixtureRequest) -> str:
    """The backends that keep to the promised memory by kernels of their own."""
    return request.param


@pytest.mark.parametrize("name", BACKENDS)
def test_no_host_sync_and_capture_in_a_cuda_graph(name: str) -> None:
    student = torch.randn(8, 33_000, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(8, 33_000, device="cuda", dtype=torch.bfloat16)
    weights = torch.rand(8, device="cuda")
    denominator = torch.tensor(5.0, device="cuda")

    def step():
        student.grad = None
        loss = topk_reverse_kl(student, teacher, k=32, weights=weights, denominator=denominator)
        loss.backward()
        return loss, student.grad

    with use_backend(name):
        graph, (loss, grad) = captured(step)
        with torch.no_grad():
            student.copy_(torch.randn_like(student))
            teacher.copy_(torch.randn_like(teacher))
        graph.replay()
        want = run(student, teacher, k=32, weights=weights, denominator=denominator, reduction="mean")
    assert torch.equal(loss.detach(), want[0]) and torch.equal(grad, want[1])


@pytest.mark.parametrize("name", ["reference", "triton"])
@pytest.mark.parametrize("mass", ["renormalized", "tail", "raw_stop_grad"])
def test_mass_no_host_sync_and_capture_in_a_cuda_graph(name: str, mass: str) -> None:
    student = torch.randn(8, 33_000, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(8, 33_000, device="cuda", dtype=torch.bfloat16)
    divergence = Mixture(0.4)

    def step():
        student.grad = None
        loss = topk_divergence(student, teacher, k=32, divergence=divergence, mass=mass)
        loss.backward()
        return loss, student.grad

    with use_backend(name):
        graph, results = captured(step)
        with torch.no_grad():
            student.copy_(torch.randn_like(student))
        graph.replay()
        replayed = [x.detach().clone() for x in results]
        want = step()
    assert all(torch.equal(a, b) for a, b in zip(replayed, want, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
def test_from_hidden_states_no_host_sync_and_capture_in_a_cuda_graph(name: str) -> None:
    hidden = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    head = torch.randn(33_000, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    support = teacher_topk(torch.randn(64, 33_000, device="cuda"), 32)

    def step():
        hidden.grad = head.grad = None
        loss = linear_topk_reverse_kl(hidden, head, support, softcap=30.0)
        loss.backward()
        return loss, hidden.grad, head.grad

    with use_backend(name):
        graph, results = captured(step)
        with torch.no_grad():
            hidden.copy_(torch.randn_like(hidden))
        graph.replay()
        replayed = [x.detach().clone() for x in results]
        want = step()
    assert all(torch.equal(a, b) for a, b in zip(replayed, want, strict=True))


# The loss of each row, of which t is a number that changes from call to call.
COMPILED = {
    "logits": lambda logits, teacher, t: topk_reverse_kl(logits, teacher, k=32, reduction="none") * t,
    "support": lambda logits, teacher, t: topk_reverse_kl(
        logits, teacher_topk(teacher, 32), temperature=t, reduction="none"
    ),
    "tail": lambda logits, teacher, t: topk_divergence(
        logits, teacher, k=32, divergence=Mixture(0.4), mass="tail", temperature=t, reduction="none"
    ),
    # The logits are the hidden states here, and the teacher's logits the head as well.
    "hidden": lambda logits, teacher, t: linear_topk_reverse_kl(
        logits, teacher, teacher_topk(teacher, 32), softcap=t, logit_scale=2**-12, reduction="none"
    ),
}


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("entry", COMPILED)
def test_compiled_by_inductor(entry: str, mode: str) -> None:
    """The bits of the eager call, beside operations that Inductor fuses. Of CUDA graphs the last calls are replays."""
    torch._dynamo.reset()
    leaf = torch.randn(40, 3_000, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(40, 3_000, device="cuda", dtype=torch.bfloat16)

    def loss_of(leaf: torch.Tensor, teacher: torch.Tensor, t: float) -> torch.Tensor:
        return COMPILED[entry](leaf * 2, teacher * 2, t) * 4

    def step(function: Callable[..., torch.Tensor], t: float) -> list[torch.Tensor]:
        leaf.grad = None
        loss = function(leaf, teacher, t)
        loss.sum().backward()
        return [loss.detach().clone(), leaf.grad.clone()]

    compiled = torch.compile(loss_of, mode=mode, fullgraph=True)
    for t in (0.75, 1.25, 0.5, 2.0, 1.5):
        torch.compiler.cudagraph_mark_step_begin()
        got = step(compiled, t)
        assert all(torch.equal(a, b) for a, b in zip(got, step(loss_of, t), strict=True)), t


def test_building_a_support_has_no_host_sync_and_is_captured_in_a_cuda_graph() -> None:
    student, teacher, other = torch.randn(3, 8, 33_000, device="cuda", dtype=torch.bfloat16)
    sampled = torch.randint(0, 33_000, (8,), device="cuda")

    def step():
        found = union(
            student_topk(student, teacher, 16, normalize=True), teacher_top_p(teacher, 0.9, 16, normalize=True)
        )
        found = remap(with_sampled(found, sampled, teacher), {3: 5}, student_vocab=32_000)
        found = residual(found, other)
        reward = return_to_go(log_ratio(found.log_probs[:, 0], found.log_probs[:, 1]), sampled > 9, gamma=0.9)
        targets = intersection(taid(student, other, t=0.5, k=64), mixture([teacher, other], [0.3, 0.7], k=64))
        return *found, *targets, reward

    graph, results = captured(step)
    for logits in (student, teacher, other):
        logits.copy_(torch.randn_like(logits))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip([x.clone() for x in results], step(), strict=True))


@large
def test_from_hidden_states_of_a_real_size(kernels: str) -> None:
    """Against float64 on the K rows; what is held besides the gradients stays below a fiftieth of the logits."""
    n, vocab, width, k = 4_096, 151_936, 2_048, 32
    hidden = torch.randn(n, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    head = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16)
    ids = torch.randint(0, vocab, (n, k), device="cuda")
    ids[:, 0] = 7  # on every row
    values = torch.randn(n, k, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with use_backend(kernels):
        loss = linear_topk_reverse_kl(hidden, head, Support(ids, values), logit_scale=0.02, reduction="none")
        loss.sum().backward()
    torch.cuda.synchronize()
    gradients = n * width * (4 + 4 + 2)  # kept in float32, times grad_output, rounded
    assert torch.cuda.max_memory_allocated() - before < gradients + n * vocab * 2 // 50
    some = slice(0, 64)
    exact = hidden[some].detach().double().requires_grad_()
    z = torch.einsum("nkh,nh->nk", head[ids[some]].double(), exact) * 0.02
    log_p, log_q = z.log_softmax(-1), values[some].double().log_softmax(-1)
    want = (log_p.exp() * (log_p - log_q)).sum(-1)
    (grad,) = torch.autograd.grad(want.sum(), exact)
    torch.testing.assert_close(loss[some].double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad[some].double(), grad, rtol=2**-8, atol=1e-5)


def test_the_current_stream_is_used(backend) -> None:
    teacher, student = torch.randn(2, 64, 50_000, device="cuda")
    want = run(student, teacher, k=32)
    side = torch.cuda.Stream()
    late = torch.empty_like(teacher)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(teacher)
        got = run(student, late, k=32)
    side.synchronize()
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_streams_do_not_share_scratch(backend) -> None:
    tensors = torch.randn(4, 2, 512, 50_000, device="cuda", dtype=torch.bfloat16)
    want = [run(z, w, k=64, reduction="none") for z, w in tensors]
    torch.cuda.synchronize()
    got = []
    for z, w in tensors:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            got.append(run(z, w, k=64, reduction="none"))
    torch.cuda.synchronize()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@large
def test_big_more_than_2_to_the_31_elements(backend) -> None:
    n, vocab, k = 16_400, 131_072 + 8, 16
    teacher = torch.empty(n, vocab, dtype=torch.bfloat16, device="cuda")
    for part in teacher.split(1024):
        part.normal_()
    assert teacher.numel() > 2**31
    student = teacher.roll(1, 0)
    loss, grad = run(student, teacher, k=k, reduction="none")
    tail = slice(n - 3, n)
    want_ids, _ = stable_sort(teacher[tail], k)
    assert torch.equal(teacher_topk(teacher, k).ids[tail], want_ids)
    leaf = student[tail].clone().requires_grad_()
    want = plain(leaf, teacher[tail], k)
    want.sum().backward()
    torch.testing.assert_close(loss[tail], want.detach().float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad[tail], leaf.grad, rtol=2**-7, atol=1e-6)


@large
@pytest.mark.parametrize("stride", [(2**31 + 11, 1), (1, 2**26 + 3)], ids=["far rows", "far columns"])
def test_big_strided_views(backend, stride: tuple[int, int]) -> None:
    logits = torch.empty(2**32, dtype=torch.bfloat16, device="cuda").as_strided((2, 33), stride)
    logits.copy_(torch.randn(2, 33))
    support = teacher_topk(logits, 5)
    assert torch.equal(support.ids, stable_sort(logits.contiguous(), 5)[0])


@large
def test_memory(kernels: str) -> None:
    n, vocab, k = 2_048, 151_936, 64
    student = torch.randn(n, vocab, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(n, vocab, device="cuda", dtype=torch.bfloat16)
    small = n * k * 16 + (64 << 20)
    with use_backend(kernels):
        topk_reverse_kl(student, teacher, k=k).backward()
        student.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = topk_reverse_kl(student, teacher, k=k)
        assert torch.cuda.max_memory_allocated() - before <= small
        loss.backward()
        assert torch.cuda.max_memory_allocated() - before <= small + student.numel() * 2
        logits = student.detach().clone().add_(torch.zeros((), device="cuda", requires_grad=True))  # no leaf
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        topk_reverse_kl(logits, teacher, k=k, overwrite_student_logits=True).backward()
        assert torch.cuda.max_memory_allocated() - before <= small


def test_the_device_of_the_tensors_is_used(backend) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs, and this machine has one")
    student, teacher = torch.randn(2, 4, 500, device="cuda:1")
    loss, grad = run(student, teacher, k=8)
    want = run(student.to("cuda:0"), teacher.to("cuda:0"), k=8)
    assert torch.equal(loss.cpu(), want[0].cpu()) and torch.equal(grad.cpu(), want[1].cpu())


@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("stride", [(2**31 + 11, 40, 1), (40, 2**31, 1)], ids=["far slabs", "far rows"])
def test_big_slabs(backend, stride: tuple[int, int, int]) -> None:
    logits = torch.empty(2**32, dtype=torch.bfloat16, device="cuda").as_strided((2, 2, 33), stride)
    logits.copy_(torch.randn(2, 2, 33))
    ids, _ = teacher_topk(logits, 5).tensors
    assert torch.equal(ids.view(4, 5), stable_sort(logits.reshape(4, 33), 5)[0])


def test_a_support_is_pinned_and_moved() -> None:
    """As a DataLoader with pin_memory=True and a Trainer do, and the loss on it is the same."""
    support = teacher_topk(torch.randn(3, 5, 40), 4, normalize=True)
    rows = [{"teacher": row} for row in (support[0], support[1], support[2])]
    (batch,) = DataLoader(rows, batch_size=3, pin_memory=True)
    assert batch["teacher"].ids.is_pinned() and batch["teacher"].log_probs.is_pinned()
    moved = batch["teacher"].to("cuda", non_blocking=True)
    assert moved.ids.is_cuda and moved.normalized and torch.equal(moved.ids.cpu(), support.ids)
    student = torch.randn(3, 5, 40)
    torch.testing.assert_close(topk_reverse_kl(student.cuda(), moved).cpu(), topk_reverse_kl(student, support))
