"""Promise: compile. The ops, their fakes, and torch.compile over them."""

import pytest
import torch
from conftest import DEVICE
from torch._dynamo.testing import CompileCounterWithBackend

from topk_rkl import (
    ForwardKL,
    JensenShannon,
    ReverseKL,
    Support,
    TopKReverseKLLoss,
    linear_teacher_topk,
    linear_topk_divergence,
    linear_topk_reverse_kl,
    ops,
    teacher_topk,
    topk_divergence,
    topk_reverse_kl,
)
from topk_rkl.objective import pack

CLAMPED = pack(0.7, ReverseKL(clamp=(-2.0, 0.5)), logit_scale=0.5, softcap=3.0)


def samples() -> dict[str, tuple]:
    student, teacher = torch.randn(2, 3, 4, 50, device=DEVICE)
    ids = torch.randint(-1, 50, (3, 4, 6), device=DEVICE)
    values, weights = torch.randn(3, 4, 6, device=DEVICE), torch.rand(3, 4, device=DEVICE)
    hidden, head, bias = torch.randn(3, 4, 8, device=DEVICE), *torch.randn(50, 9, device=DEVICE).split((8, 1), 1)
    head, bias = head.contiguous(), bias.flatten()
    distinct = torch.arange(6, device=DEVICE).expand(3, 4, 6).clone()
    outside = torch.rand(3, 4, 2, device=DEVICE, dtype=torch.float64)
    return {
        "kept": (ids.mT,),
        "select": (teacher[:, 1:], 6, True, "reference"),
        "support_loss": (student, ids, values, weights, CLAMPED, "reference"),
        "select_loss": (student, teacher.bfloat16(), 6, None, CLAMPED, "reference"),
        "tail_logit": (student, ids, pack(0.7), "reference"),
        "mass_loss": (student, distinct, values, weights, weights, pack(0.7, mass="tail"), "reference"),
        "mass_grad": (values, distinct, outside, weights, student, student.clone(), pack(0.7), "reference"),
        "scatter": (values, ids, weights, student.clone(), False, "reference"),
        "linear_select": (hidden, head, bias, 6, 5, CLAMPED, True, False, True, "reference"),
        "linear_logits": (hidden, head, bias, ids, "reference"),
        "linear_hidden_grad": (values, ids, head, hidden.clone(), "reference"),
        "linear_tail_logit": (hidden, head, bias, ids, pack(0.7, mass="tail", softcap=3.0), "reference"),
        "linear_loss": (hidden, head, bias, ids, values, weights, CLAMPED, True, "reference"),
        "scale_rows": (hidden, weights, torch.float16, "reference"),
        "linear_weight_grad": (values, ids, hidden, head.clone(), bias.clone(), False, "reference"),
        "linear_mass_loss": (
            hidden, head, bias, distinct, values, weights, weights, pack(mass="raw"), "reference"
        ),
        "linear_mass_grad": (
            values, distinct, outside, weights, hidden, head, bias,
            *map(torch.clone, (hidden, head, bias)), pack(0.7, mass="raw", softcap=3.0), "reference",
        ),
    }  # fmt: skip


OPS = list(samples())
WRITING = ("scatter", "mass_grad", "linear_hidden_grad", "linear_weight_grad", "linear_mass_grad")


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str) -> None:
    packet = getattr(torch.ops.topk_rkl, name)
    for overload in packet.overloads():
        outcome = torch.library.opcheck(getattr(packet, overload), samples()[name])
        assert set(outcome.values()) == {"SUCCESS"}, overload


@pytest.mark.parametrize("name", OPS)
def test_what_reads_an_objective_is_left_out_of_cuda_graphs(name: str) -> None:
    """A replay would repeat the numbers that were read on the host."""
    packet = getattr(torch.ops.topk_rkl, name)
    tagged = {x for x in packet.overloads() if torch.Tag.cudagraph_unsafe in getattr(packet, x).tags}
    reads = "objective" in {x.name for x in packet.default._schema.arguments}
    assert set(packet.overloads()) == {"default", *(["objective"] if reads else [])}
    assert tagged == ({"objective"} if reads else set())


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_fake_is_what_the_op_gives(name: str, dtype: torch.dtype) -> None:
    def cast(x):
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    arguments = tuple(map(cast, samples()[name])) if name not in WRITING else samples()[name]
    real = getattr(ops, name)(*arguments)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = getattr(ops, name)(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments))
    real, fake = ((x,) if isinstance(x, torch.Tensor) else x or () for x in (real, fake))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


def by_logits(student, teacher, weights):
    return topk_reverse_kl(student, teacher, k=6, weights=weights, temperature=0.5)


def by_support(student, teacher, weights):
    return topk_reverse_kl(student, teacher_topk(teacher, 6, normalize=True), weights=weights, reduction="sum")


def by_unique_support(student, teacher, weights):
    support = teacher_topk(teacher, 6).unique()
    return TopKReverseKLLoss()(student, support, weights)


def overwriting(student, teacher, weights):
    return topk_reverse_kl(student * 2, teacher, k=6, weights=weights, overwrite_student_logits=True)


HEAD = torch.randn(60, 50, device=DEVICE) / 7


def from_hidden(hidden, teacher, weights):
    support = linear_teacher_topk(teacher, HEAD, 6, chunk_rows=2)
    return linear_topk_reverse_kl(hidden, HEAD * hidden.mean(), support, weights=weights, softcap=2.0)


def by_tail(student, teacher, weights):
    return topk_divergence(student, teacher, divergence=JensenShannon(0.3), mass="tail", k=6, weights=weights)


def by_tail_from_hidden(hidden, teacher, weights):
    head = HEAD * hidden.mean()
    return linear_topk_divergence(hidden, head, teacher, mass="tail", k=6, divergence=ForwardKL(), weights=weights)


COMPILED = [by_logits, by_support, by_unique_support, overwriting, from_hidden, by_tail, by_tail_from_hidden]


@pytest.mark.slow
@pytest.mark.parametrize("function", COMPILED)
def test_compile_without_a_graph_break_at_most_twice_over_changing_n(function) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for n in (4, 5, 6, 9):
        student, teacher = torch.randn(2, n, 50, device=DEVICE)
        weights = torch.rand(n, device=DEVICE)
        gradients = []
        for f in (function, compiled):
            leaf = student.clone().requires_grad_()
            loss = f(leaf, teacher, weights)
            loss.backward()
            gradients.append((loss.detach(), leaf.grad))
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-7)
    assert 1 <= counter.frame_count <= 2


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["eager", "aot_eager_decomp_partition"])
def test_compile_with_a_support_made_under_inference_mode(compiler: str) -> None:
    torch._dynamo.reset()
    student, teacher = torch.randn(2, 4, 50, device=DEVICE)
    with torch.inference_mode():
        made = teacher_topk(teacher, 6, normalize=True)
    for function in (topk_reverse_kl, lambda z, s: topk_divergence(z, s, mass="tail"), by_head):
        leaf = student.clone().requires_grad_()
        (want,) = torch.autograd.grad(function(leaf, teacher_topk(teacher, 6, normalize=True)), leaf)
        loss = torch.compile(function, backend=compiler, fullgraph=True)(leaf, made)
        torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], want)


def by_head(hidden, support):
    return linear_topk_reverse_kl(hidden, HEAD * hidden.mean(), support)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.5])  # another than 1 makes Inductor compile code for the host too
def test_compile_with_inductor(temperature: float) -> None:
    torch._dynamo.reset()
    student, teacher = torch.randn(2, 4, 50, device=DEVICE)
    leaf = student.requires_grad_()
    want = topk_reverse_kl(leaf, teacher, k=6, temperature=temperature)
    (want_grad,) = torch.autograd.grad(want, leaf)
    got = torch.compile(topk_reverse_kl, fullgraph=True)(leaf, teacher, k=6, temperature=temperature)
    got.backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(leaf.grad, want_grad)


@pytest.mark.slow
def test_gradcheck() -> None:
    student = torch.randn(3, 20, dtype=torch.float64, device=DEVICE, requires_grad=True)
    teacher = torch.randn(3, 20, dtype=torch.float64, device=DEVICE)
    weights = torch.tensor([1.0, -0.5, 0.0], dtype=torch.float64, device=DEVICE)
    ids = torch.randint(-1, 20, (3, 9), device=DEVICE)
    for target, k in ((teacher, 7), (teacher, 20), (Support(ids, torch.randn(3, 9, device=DEVICE)), None)):
        for reduction in ("none", "mean"):
            assert torch.autograd.gradcheck(
                lambda z, t=target, k=k, r=reduction: topk_reverse_kl(
                    z, t, k=k, weights=weights, temperature=0.7, reduction=r
                ),
                student,
            )


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradcheck_from_hidden_states(softcap: float | None) -> None:
    options = {"dtype": torch.float64, "device": DEVICE}
    hidden, head, bias = (torch.randn(shape, **options).requires_grad_() for shape in ((4, 5), (11, 5), (11,)))
    ids = torch.randint(-1, 12, (4, 6), device=DEVICE)
    support = Support(ids, torch.randn(4, 6, **options))
    weights = torch.tensor([1.0, -0.5, 0.0, 2.0], **options)
    for reduction in ("none", "mean"):
        assert torch.autograd.gradcheck(
            lambda h, w, b, r=reduction: linear_topk_reverse_kl(
                h, w, support, student_bias=b, weights=weights, temperature=0.7, logit_scale=1.2, softcap=softcap,
                reduction=r,
            ),
            (hidden, head, bias),
        )  # fmt: skip
