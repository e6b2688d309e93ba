"""The promises about the loss and its gradient, each by its name, on every backend."""

import itertools
import re

import numpy
import pytest
import torch
from conftest import DEVICE, same_bits
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests import cases
from tests.oracles import plain, run
from tests.probes import NoHostSync
from topk_rkl import (
    AlphaBeta,
    JensenShannon,
    Mixture,
    SkewForwardKL,
    SkewReverseKL,
    Support,
    TopKReverseKLLoss,
    generalized_jsd,
    linear_teacher_topk,
    linear_topk_reverse_kl,
    teacher_topk,
    topk_divergence,
    topk_reverse_kl,
)
from topk_rkl.recipe import builders, composition, rewards, weighting

LOW = [torch.bfloat16, torch.float16]
OF_A_SHARE = (JensenShannon, Mixture, SkewReverseKL, SkewForwardKL, generalized_jsd)


def truth(
    z: Tensor,  # (N, K)
    w: Tensor,  # (N, K)
    temperature: float,
) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:  # (N,), (N, K), (N,)
    """Loss, gradient, largest |log ratio|, in 80-bit floats and by the textbook's formula."""

    def log_softmax(x: Tensor) -> numpy.ndarray:
        y = x.double().numpy().astype(numpy.longdouble) / numpy.longdouble(temperature)
        y = y - y.max(1, keepdims=True)
        return y - numpy.log(numpy.exp(y).sum(1, keepdims=True))

    log_p, log_q = log_softmax(z.cpu()), log_softmax(w.cpu())
    loss = (numpy.exp(log_p) * (log_p - log_q)).sum(1)
    g = numpy.exp(log_p) * (log_p - log_q - loss[:, None]) / numpy.longdouble(temperature)
    return loss, g, numpy.abs(log_p - log_q).max(1)


@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0, 3.7, 20.0])
@pytest.mark.parametrize("spread", [0.01, 0.2, 1.0, 30.0])
def test_accuracy(backend, temperature: float, spread: float) -> None:
    n, k = 4 if backend in ("triton", "cuda") and DEVICE == "cpu" else 512, 32
    student, teacher = torch.randn(2, n, 200, device=DEVICE) * spread
    teacher[: n // 2] = student[: n // 2] + 0.01 * torch.randn(n // 2, 200, device=DEVICE)
    support = teacher_topk(teacher, k)
    loss, grad = run(student, support, temperature=temperature, reduction="none")
    z = student.gather(1, support.ids.long())
    want_loss, want_g, ratio = truth(z, support.log_probs, temperature)
    bound = 2e-6 * (1 + ratio)
    g = grad.gather(1, support.ids.long()).cpu().numpy()
    assert (numpy.abs(loss.cpu().numpy() - want_loss) <= bound).all()
    assert (numpy.abs(g - want_g) <= bound[:, None]).all()


@pytest.mark.parametrize("dtype", LOW)
def test_accuracy_of_a_low_precision_gradient_is_that_of_rounding(backend, dtype: torch.dtype) -> None:
    n = 4 if backend in ("triton", "cuda") and DEVICE == "cpu" else 40
    student, teacher = (torch.randn(2, n, 300, device=DEVICE) * 3).to(dtype)
    loss, grad = run(student, teacher, k=16)
    full_loss, full_grad = run(student.float(), teacher, k=16)
    assert torch.equal(loss, full_loss)
    assert torch.equal(grad, full_grad.to(dtype))


def test_accuracy_in_float64() -> None:
    student, teacher = torch.randn(2, 20, 100, dtype=torch.float64, device=DEVICE)
    loss, grad = run(student, teacher, k=9, temperature=0.7, reduction="none")
    leaf = student.clone().requires_grad_()
    want = plain(leaf, teacher, 9, 0.7)
    want.sum().backward()
    assert loss.dtype == grad.dtype == torch.float64
    torch.testing.assert_close(loss, want.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", [name for name in cases.ROWS if name not in ("infinities",)])
def test_every_case_matches_the_plain_formula(backend, name: str) -> None:
    vocab, k = 507, 16
    teacher = cases.rows(vocab, k, torch.float32, [name], DEVICE)
    student = torch.randn(1, vocab, device=DEVICE)
    support = teacher_topk(teacher, k)
    loss, grad = run(student, teacher, k=k)
    if support.log_probs.isnan().any():
        assert loss.isnan() and grad[0, support.ids[0].long()].isnan().all()
        return
    kept = support.ids[0][support.ids[0] >= 0].long()
    leaf = student[:, kept].detach().requires_grad_()
    want = plain(leaf, teacher[:, kept], len(kept)).sum()
    want.backward()
    torch.testing.assert_close(loss, want.detach().float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, torch.zeros_like(student).index_copy(1, kept, leaf.grad), rtol=1e-6, atol=1e-6)


def test_logits_and_support_are_the_same_loss(backend) -> None:
    student, teacher = torch.randn(2, 3, 5, 100, device=DEVICE)
    want = run(student, teacher, k=7)
    for normalize, ids_dtype in itertools.product((False, True), (torch.int32, torch.int64)):
        ids, log_probs = teacher_topk(teacher, 7, normalize=normalize).tensors
        loss, grad = run(student, Support(ids.to(ids_dtype), log_probs))
        torch.testing.assert_close(loss, want[0], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(grad, want[1], rtol=2e-6, atol=2e-6)


def test_empty_slots_are_outside_the_support(backend) -> None:
    student = torch.randn(1, 10, device=DEVICE)
    want_loss, want_grad = run(
        student, Support(torch.tensor([[2, 5]]).to(DEVICE), torch.tensor([[0.3, -1.0]]).to(DEVICE))
    )
    ids = torch.tensor([[-1, 2, 10, 7, 5, -9, 2**31 - 1]], device=DEVICE)
    log_probs = torch.tensor([[9.0, 0.3, 9.0, -torch.inf, -1.0, torch.nan, 9.0]], device=DEVICE)
    loss, grad = run(student, Support(ids, log_probs))
    torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, want_grad, rtol=1e-6, atol=1e-9)
    assert grad.nonzero()[:, 1].tolist() == [2, 5]


def test_empty_slots_of_a_smaller_student_vocabulary(backend) -> None:
    """A teacher whose vocabulary is larger, or padded: ids that the student lacks are outside S."""
    student, teacher = torch.randn(4, 60, device=DEVICE), torch.randn(4, 100, device=DEVICE)
    loss, grad = run(student, teacher, k=20)
    ids, log_probs = teacher_topk(teacher, 20).tensors
    kept = ids < 60
    want = run(student, Support(ids.masked_fill(~kept, -1), log_probs))
    assert torch.equal(loss, want[0]) and torch.equal(grad, want[1]) and not kept.all()


def test_student_minus_inf_inside_the_support(backend) -> None:
    student = torch.tensor([[1.0, -torch.inf, 0.5, 3.0], [-torch.inf] * 4], device=DEVICE)
    support = Support(torch.tensor([[0, 1, 2]] * 2).to(DEVICE), torch.tensor([[0.0, 1.0, 2.0]] * 2).to(DEVICE))
    loss, grad = run(student, support, reduction="none")
    log_p = torch.tensor([1.0, 0.5], dtype=torch.float64).log_softmax(0)
    log_q = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64).log_softmax(0)[[0, 2]]
    want = (log_p.exp() * (log_p - log_q)).sum()
    g = log_p.exp() * (log_p - log_q - want)
    torch.testing.assert_close(loss.cpu(), torch.stack([want, want * 0]).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(grad[0, [0, 2]].cpu(), g.float(), rtol=1e-6, atol=1e-7)
    assert (grad[0, [1, 3]] == 0).all()
    assert (grad[1] == 0).all()


def test_empty_support(backend) -> None:
    student = torch.full((2, 9), torch.nan, device=DEVICE)
    for teacher, k in [
        (torch.full((2, 9), -torch.inf, device=DEVICE), 3),
        (Support(torch.full((2, 3), -1, device=DEVICE), torch.zeros(2, 3, device=DEVICE)), None),
    ]:
        loss, grad = run(student, teacher, k=k, reduction="none")
        assert (loss == 0).all() and (grad == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])
def test_nan_and_inf_stay_in_their_row(backend, bad: float) -> None:
    student, teacher = torch.randn(2, 4, 300, device=DEVICE)
    clean = run(student, teacher, k=5, reduction="none")
    ids = teacher_topk(teacher, 5).ids.long()
    for side in ("teacher", "student"):
        z, w = student.clone(), teacher.clone()
        (w if side == "teacher" else z)[2, ids[2, 1]] = bad
        loss, grad = run(z, w, k=5, reduction="none")
        others = [0, 1, 3]
        assert loss[2].isnan() and grad[2, ids[2, 1]].isnan()
        assert torch.equal(loss[others], clean[0][others]) and torch.equal(grad[others], clean[1][others])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_of_the_teacher_is_never_lost(backend, bad: float) -> None:
    """At ids that the student lacks, and where the student has no probability; but an empty slot is empty."""
    z = torch.randn(7, 20, device=DEVICE)
    z[3] = -torch.inf
    ids = torch.tensor([[4, 20, 7], [20, 25, 30], [4, -1, 7], [4, 5, 7], [4, 20, 7], [4, 2**32 + 5, 7], [4, -3, 20]])
    values = torch.randn(7, 3).index_fill(1, torch.tensor(1), bad)
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    ids, values, weights = ids.to(DEVICE), values.to(DEVICE), weights.to(DEVICE)
    spoilt = [True, True, False, True, False, True, False]
    loss, grad = run(z, Support(ids, values), weights=weights, reduction="none")
    assert loss.isnan().tolist() == spoilt
    named = grad.gather(1, ids.clamp(0, 19)[:, ::2]).isnan()  # of the first and the last slot
    assert named.tolist() == [
        [x and id < 20 for id in row] for x, row in zip(spoilt, ids[:, ::2].tolist(), strict=True)
    ]
    assert loss[4] == 0 and (grad[4] == 0).all()
    teacher = torch.randn(7, 25, device=DEVICE)
    teacher[:3, 20:] = bad
    loss, grad = run(z, teacher, k=3, reduction="none")
    assert loss.isnan().tolist() == [True] * 3 + [False] * 4 and not grad[3:].isnan().any()


@pytest.mark.parametrize("far", [2**31 - 1, 2**31, 2**32 + 2, -(2**32) + 2, 2**63 - 1, -(2**63)])
def test_empty_slots_of_ids_that_32_bits_cannot_hold(backend, far: int) -> None:
    z, values = torch.randn(3, 20, device=DEVICE), torch.randn(3, 4, device=DEVICE)
    ids = torch.tensor([[2, far, 7, 5]] * 3, device=DEVICE)
    ids[1] = far
    want = run(z, Support(ids.clamp(-1, 20).int(), values), reduction="none")
    got = run(z, Support(ids, values), reduction="none")
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and got[0][1] == 0


@pytest.mark.parametrize("dtype", [*LOW, torch.float32, torch.float64])
def test_a_support_and_weights_of_any_dtype(backend, dtype: torch.dtype) -> None:
    """Numbers that every dtype holds: the same bits."""
    z, ids = torch.randn(4, 30, device=DEVICE), torch.rand(4, 30).argsort(1)[:, :5].to(DEVICE)
    values, weights = (
        torch.randint(-8, 8, (4, 5), device=DEVICE) / 4,
        torch.tensor([1.0, 0.0, -2.0, 0.5], device=DEVICE),
    )
    want = run(z, Support(ids, values), weights=weights, reduction="none")
    got = run(z, Support(ids, values.to(dtype)), weights=weights.to(dtype), reduction="none")
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    leaf = z.clone().requires_grad_()
    topk_reverse_kl(leaf, Support(ids, values), weights=weights, reduction="none").to(dtype).sum().backward()
    assert torch.equal(leaf.grad, want[1])


def test_nan_of_the_student_outside_the_support_is_not_seen(backend) -> None:
    student, teacher = torch.randn(2, 4, 300, device=DEVICE)
    clean = run(student, teacher, k=5)
    student = torch.full_like(student, torch.nan).scatter(
        1, i := teacher_topk(teacher, 5).ids.long(), student.gather(1, i)
    )
    loss, grad = run(student, teacher, k=5)
    assert torch.equal(loss, clean[0]) and torch.equal(grad, clean[1])


@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
def test_duplicates_accumulate(backend, dtype: torch.dtype) -> None:
    student = torch.randn(2, 50, device=DEVICE).to(dtype)
    ids = torch.randint(0, 12, (2, 40), device=DEVICE)
    ids[:, ::7] = -1
    log_probs = torch.randn(2, 40, device=DEVICE)
    loss, grad = run(student, Support(ids, log_probs))
    leaf = student.double().requires_grad_()
    empty = ids < 0
    log_p = leaf.gather(1, ids.clamp(min=0)).masked_fill(empty, -torch.inf).log_softmax(1).masked_fill(empty, 0)
    log_q = log_probs.double().masked_fill(empty, -torch.inf).log_softmax(1).masked_fill(empty, 0)
    want = (log_p.exp().masked_fill(empty, 0) * (log_p - log_q)).sum()
    want.backward()
    torch.testing.assert_close(loss, want.detach().float(), rtol=1e-6, atol=0)
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(grad.double(), leaf.grad, rtol=rounding, atol=1e-7)


def test_k_1_is_exactly_zero_and_warns_once(backend) -> None:
    student, teacher = torch.randn(2, 4, 30, device=DEVICE)
    with pytest.warns(UserWarning, match="K = 1") as record:
        loss, grad = run(student, teacher, k=1, temperature=0.3)
    ours = [warning for warning in record if "K = 1" in str(warning.message)]
    assert len(ours) == 1 and ours[0].filename == run.__code__.co_filename
    assert loss == 0 and (grad == 0).all()


@pytest.mark.parametrize("dtype", [*LOW, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
def test_self_distillation_is_exactly_zero(backend, dtype: torch.dtype, temperature: float) -> None:
    if dtype == torch.float64 and backend != "reference":
        pytest.skip("float64 belongs to the reference")
    names = [*cases.FINITE, "padded_vocabulary", "fewer_than_k_finite", "all_minus_inf"]
    logits = cases.rows(507, 32, dtype, names, DEVICE)
    loss, grad = run(logits, logits, k=32, temperature=temperature, reduction="none")
    assert (loss == 0).all() and (grad == 0).all()


def test_inputs_untouched(backend) -> None:
    student, teacher, weights = (
        torch.randn(5, 99, device=DEVICE),
        torch.randn(5, 99, device=DEVICE),
        torch.rand(5).to(DEVICE),
    )
    support = teacher_topk(teacher, 9)
    inputs = [student, teacher, weights, *support.tensors]
    before = [x.clone() for x in inputs]
    run(student, teacher, k=9, weights=weights)
    run(student, support, weights=weights)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_overwrite_student_logits_holds_the_gradient(backend) -> None:
    leaf, teacher = torch.randn(2, 3, 6, 80, device=DEVICE)
    _, want = run(leaf[:, :-1], teacher[:, :-1], k=9)
    source = leaf.clone().requires_grad_()
    logits = source * 1
    topk_reverse_kl(logits[:, :-1], teacher[:, :-1], k=9, reduction="sum", overwrite_student_logits=True).backward()
    assert torch.equal(source.grad[:, :-1], want) and (source.grad[:, -1] == 0).all()
    assert torch.equal(logits[:, :-1], want) and torch.equal(logits[:, -1], leaf[:, -1])


def test_overwrite_student_logits_leaves_other_gradients_their_own_memory(backend) -> None:
    """Those of the leaf behind the logits, which accumulate, and the one that the logits retain."""
    leaf, teacher = torch.randn(2, 3, 40, device=DEVICE)
    _, want = run(leaf, teacher, k=5)
    leaf.requires_grad_()
    for _ in range(2):
        logits = leaf * 2 - leaf.detach()
        logits.retain_grad()
        topk_reverse_kl(logits, teacher, k=5, reduction="sum", overwrite_student_logits=True).backward()
        logits.detach().fill_(torch.nan)
        assert torch.equal(logits.grad, want)
    assert torch.equal(leaf.grad, want * 4)


def test_numpy_numbers_are_numbers() -> None:
    """Neither refused nor computed with in their own type, in which 1 - 2 is 255 and 1 - 0.3 has 11 bits."""
    student, teacher = torch.randn(2, 3, 40, device=DEVICE)
    hidden, head = torch.randn(3, 8, device=DEVICE), torch.randn(40, 8, device=DEVICE)
    support = teacher_topk(teacher, 4)
    for call in (
        lambda n: topk_reverse_kl(student, teacher, k=n(4), temperature=n(2), denominator=n(3)),
        lambda n: TopKReverseKLLoss(n(4))(student, teacher),
        lambda n: linear_topk_reverse_kl(hidden, head, teacher, k=n(4), logit_scale=n(2), softcap=n(9)),
        lambda n: linear_teacher_topk(hidden, head, n(4), chunk_rows=n(2)),
        lambda n: topk_divergence(student, teacher, k=n(4), divergence=AlphaBeta(n(2), n(3))),
        lambda n: builders.student_topk(student, teacher, n(4)),
        lambda n: builders.teacher_top_p(teacher, 0.9, n(4)),
        lambda n: builders.fixed_ids(teacher, [n(3), n(1)]),
        lambda n: builders.remap(support, {n(3): n(1)}, student_vocab=n(30)),
        lambda n: composition.extrapolation(teacher, student, k=n(4), lam=n(2)),
        lambda n: rewards.extrapolated_log_ratio(student, teacher, teacher, lam=n(2)),
        lambda n: weighting.special_token_mask(support.ids, {n(3), n(1)}),
    ):
        want = call(int)
        for kind in (numpy.int64, numpy.uint8):
            torch.testing.assert_close(tree_leaves(call(kind)), tree_leaves(want), rtol=0, atol=0)
    for call in (
        lambda x: topk_reverse_kl(student, teacher, k=4, temperature=x),
        *(lambda x, one=one: topk_divergence(student, teacher, k=4, divergence=one(x)) for one in OF_A_SHARE),
        lambda x: composition.taid(student, teacher, t=x, k=4),
        lambda x: rewards.log_ratio(student, teacher, clip=(-x, x)),
        lambda x: rewards.box_cox(student, teacher, alpha=x),
        lambda x: rewards.tanh_log_ratio(student, teacher, tau=x),
    ):
        low = numpy.float16(0.3)
        torch.testing.assert_close(tree_leaves(call(low)), tree_leaves(call(float(low))), rtol=0, atol=0)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_with_advice_that_works(layout: torch.layout) -> None:
    """Each refusal says what to pass for that argument; after three of them the loss is that of all positions."""
    student, teacher, weights = ([torch.randn(t, *v, device=DEVICE) for t in (2, 3)] for v in ((40,), (40,), ()))
    arguments = {
        name: torch.nested.nested_tensor(parts, layout=layout)
        for name, parts in (("student_logits", student), ("teacher", teacher), ("weights", weights))
    }
    for name in ("student_logits", "weights", "teacher"):
        with pytest.raises(TypeError, match=f"{name} is a nested tensor") as error:
            topk_reverse_kl(**arguments, k=4)
        advice = re.search("pass (.*), its positions", str(error.value))[1]
        arguments[name] = eval(advice, {"torch": torch, **arguments})
    want = topk_reverse_kl(torch.cat(student), torch.cat(teacher), k=4, weights=torch.cat(weights))
    assert torch.equal(topk_reverse_kl(**arguments, k=4), want)


def test_overwrite_student_logits_of_interleaved_strides(backend) -> None:
    values, teacher = torch.randn(2, 2, 3, device=DEVICE)
    _, want = run(values, teacher, k=2)
    leaf = torch.randn(8, device=DEVICE, requires_grad=True)
    logits = (leaf * 1).as_strided((2, 3), (3, 2))
    with torch.no_grad():
        logits.copy_(values)
    topk_reverse_kl(logits, teacher, k=2, reduction="sum", overwrite_student_logits=True).backward()
    assert torch.equal(logits, want) and torch.equal(leaf.grad.as_strided((2, 3), (3, 2)), want)


def test_overwrite_student_logits_is_refused_a_second_time(backend) -> None:
    logits = torch.randn(3, 40, device=DEVICE, requires_grad=True) * 1
    loss = topk_reverse_kl(logits, torch.randn(3, 40, device=DEVICE), k=5, overwrite_student_logits=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_overwrite_student_logits_that_a_producer_saved_is_refused(backend) -> None:
    logits = torch.randn(3, 40, device=DEVICE, requires_grad=True).exp()
    loss = topk_reverse_kl(logits, torch.randn(3, 40, device=DEVICE), k=5, overwrite_student_logits=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradient_backward_twice_gives_the_same_bits(backend) -> None:
    student = torch.randn(4, 60, device=DEVICE, requires_grad=True)
    loss = topk_reverse_kl(student, torch.randn(4, 60, device=DEVICE), k=7)
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    (second,) = torch.autograd.grad(loss, student)
    assert same_bits(first, second) and (first != 0).any()


@pytest.mark.parametrize("kind", ["per row", "strided", "expanded", "zero"])
@pytest.mark.parametrize("given", ["logits", "support"])
def test_gradient_for_any_grad_output(backend, kind: str, given: str) -> None:
    lead = rows, columns = (2, 3) if backend in ("triton", "cuda") and DEVICE == "cpu" else (4, 6)
    student, teacher = torch.randn(2, *lead, 60, device=DEVICE)
    grad_output = {
        "per row": torch.randn(lead),
        "strided": torch.randn(columns, 2 * rows)[:, ::2].t(),
        "expanded": torch.tensor(-2.5).expand(lead),
        "zero": torch.zeros(lead),
    }[kind].to(DEVICE)
    leaf = student.clone().requires_grad_()
    target, k = (teacher, 7) if given == "logits" else (teacher_topk(teacher, 7), None)
    loss = topk_reverse_kl(leaf, target, k=k, reduction="none")
    loss.backward(grad_output)
    plain_leaf = student.clone().requires_grad_()
    plain(plain_leaf, teacher, 7).backward(grad_output.double())
    torch.testing.assert_close(leaf.grad, plain_leaf.grad, rtol=1e-5, atol=1e-6)


def test_gradient_of_a_strided_student(backend) -> None:
    teacher = torch.randn(6, 50, device=DEVICE)
    x = torch.randn(6, 50, device=DEVICE)
    want = run(x, teacher, k=8)
    for name, layout in cases.LAYOUTS.items():
        loss, grad = run(layout(x), layout(teacher), k=8)
        assert torch.equal(loss, want[0]) and torch.equal(grad, want[1]), name


def test_gradient_twice_raises(backend) -> None:
    student = torch.randn(4, 60, device=DEVICE, requires_grad=True)
    loss = topk_reverse_kl(student, torch.randn(4, 60, device=DEVICE), k=7)
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_repeatable(backend) -> None:
    torch.use_deterministic_algorithms(False)
    student, teacher = torch.randn(2, 4, 900, device=DEVICE)
    ids = torch.randint(0, 50, (4, 64), device=DEVICE)
    support = Support(ids, torch.randn(4, 64, device=DEVICE))
    for arguments in ({"teacher": teacher, "k": 64}, {"teacher": support}):
        first = run(student, **arguments)
        for _ in range(3):
            again = run(student, **arguments)
            assert same_bits(first[0], again[0]) and same_bits(first[1], again[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", ["logits", "support"])
def test_repeatable_row_by_row(backend, given: str, dtype: torch.dtype) -> None:
    """Ties, ids given twice, probabilities of 0, a NaN and weights of either sign among them."""
    student, teacher = (torch.randn(2, 9, 200, device=DEVICE) * 3).to(dtype)
    student[1] = teacher[1]
    student[2], student[3, ::2], teacher[4] = torch.nan, -torch.inf, 1
    weights = torch.tensor([1.0, 2.0, 1.0, 1.0, -3.0, -0.5, 0.0, -0.0, 1.0], device=DEVICE)
    support = Support(torch.randint(-1, 60, (9, 33), device=DEVICE), torch.randn(9, 33, device=DEVICE))

    def run_rows(rows: slice) -> tuple[Tensor, Tensor]:
        target, k = (teacher[rows], 33) if given == "logits" else (support[rows], None)
        return run(student[rows], target, k=k, weights=weights[rows], temperature=0.7, reduction="none")

    loss, grad = run_rows(slice(None))
    for i in range(9) if backend in ("reference", "native") or DEVICE == "cuda" else (1, 4, 6):
        row = slice(i, i + 1)
        alone = run_rows(row)
        assert same_bits(alone[0], loss[row]) and same_bits(alone[1], grad[row]), i


def test_no_host_sync_is_what_it_says() -> None:
    for read in (lambda x: x.item(), lambda x: x.nonzero(), lambda x: bool(x > 0)):
        with NoHostSync(), pytest.raises(AssertionError):
            read(torch.ones(()))


def test_no_host_sync(module) -> None:
    if DEVICE == "cpu" and module.__name__.endswith("triton"):
        pytest.skip("the interpreter itself reads values; test_gpu.py captures the compiled kernels in a CUDA graph")
    student, teacher = torch.randn(2, 8, 90, device=DEVICE)
    ids = torch.randint(-1, 50, (8, 16), device=DEVICE)
    weights = torch.ones(8, device=DEVICE)
    out = torch.empty_like(student)
    with NoHostSync():
        module.select(teacher, 16, True)
        module.support_loss(student, ids, ids.float(), weights, 1.0)
        loss, ids, g = module.select_loss(student, teacher, 16, weights, 1.0)
        module.scatter(g, ids, loss, out, False)
    assert loss.isfinite().all() and ((out != 0).sum(1) > 0).all()


def test_no_host_sync_in_reductions() -> None:
    student = torch.randn(4, 90, device=DEVICE, requires_grad=True)
    with NoHostSync():
        for denominator in (None, 3.0, torch.tensor(5.0, device=DEVICE)):
            weights = torch.ones(4, device=DEVICE)
            topk_reverse_kl(student, student.detach(), k=4, weights=weights, denominator=denominator).backward()
    assert (student.grad == 0).all()


@pytest.mark.parametrize("k", [16, 300])
@pytest.mark.parametrize("unique", [True, False])
@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
def test_scatter_writes_every_element(module, k: int, unique: bool, dtype: torch.dtype) -> None:
    n, vocab = 3, 70_001 if k == 16 else 9_000
    ids = torch.stack([torch.randperm(vocab + 9)[:k] for _ in range(n)]).int().to(DEVICE)
    ids[:, 3] = -1
    if not unique:
        ids[:, 8] = ids[:, 5]
        ids[1] = ids[1, 0]
    g = torch.randn(n, k, device=DEVICE)
    grad_output = torch.randn(n, device=DEVICE)
    buffer = torch.full((n, vocab + 3), 7.0, dtype=dtype, device=DEVICE)
    module.scatter(g, ids, grad_output, buffer[:, 1:-2], unique)
    want = torch.zeros(n, vocab + 10, dtype=torch.float64, device=DEVICE)
    live = (ids >= 0) & (ids < vocab)
    want.scatter_add_(1, torch.where(live, ids, vocab).long(), (g * grad_output[:, None]).double())
    tolerance = {} if unique else {"rtol": 1e-5 if dtype == torch.float32 else 2**-7, "atol": 1e-5}
    torch.testing.assert_close(
        buffer[:, 1:-2], want[:, :vocab].float().to(dtype), **(tolerance or {"rtol": 0, "atol": 0})
    )
    assert (buffer[:, [0, -2, -1]] == 7).all()


def test_the_module_is_the_function() -> None:
    student, teacher = torch.randn(2, 3, 5, 50, device=DEVICE)
    weights, denominator = torch.rand(3, 5, device=DEVICE), torch.tensor(4.0, device=DEVICE)
    options = {"temperature": 0.7, "reduction": "mean"}
    module = TopKReverseKLLoss(k=6, **options)
    want = topk_reverse_kl(student, teacher, k=6, weights=weights, denominator=denominator, **options)
    assert torch.equal(module(student, teacher, weights, denominator), want)
    assert "k=6, temperature=0.7, teacher_temperature=None, reduction='mean'" in repr(module)
    support = teacher_topk(teacher, 6)
    assert torch.equal(TopKReverseKLLoss(**options)(student, support, weights, denominator), want)
