"""Composed teachers: every target against its formula over the whole vocabulary in float64."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import DEVICE, LiveBytes
from torch import Tensor

from topk_rkl import Support, rows, teacher_topk, topk_reverse_kl
from topk_rkl.recipe import composition
from topk_rkl.recipe.builders import fixed_ids
from topk_rkl.recipe.composition import extrapolation, mixture, residual, taid, veto

INF = math.inf


def mixed(a: Tensor, b: Tensor) -> Tensor:
    return (0.25 * a.softmax(-1) + 0.75 * b.softmax(-1)).log()


def corrected(a: Tensor, b: Tensor) -> Tensor:
    log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
    return (log_a + 1.5 * (log_b - log_a).clamp(-1, 1)).log_softmax(-1)


TARGETS: dict[str, tuple[Callable, Callable]] = {  # the package's, and the log of the whole distribution
    "mixture": (lambda a, b, **k: mixture([a, b], [1, 3], **k), mixed),
    "residual": (lambda a, b, **k: residual(a, b, lam=1.5, clip=1.0, **k), corrected),
    "extrapolation": (lambda a, b, **k: extrapolation(a, b, lam=1.25, **k), lambda a, b: 1.25 * a - 0.25 * b),
    "interpolation": (lambda a, b, **k: extrapolation(a, b, lam=0.5, **k), lambda a, b: 0.5 * a + 0.5 * b),
    "taid": (lambda a, b, **k: taid(b, a, t=0.4, **k), lambda a, b: 0.4 * a + 0.6 * b),
    "veto": (lambda a, b, **k: veto(b, a, beta=0.3, **k), lambda a, b: a + 0.3 * b),
}


@pytest.mark.parametrize("name", TARGETS)
def test_from_logits_it_is_the_top_k_of_the_composed_distribution(backend, name: str) -> None:
    a, b = torch.randn(2, 2, 2, 60, device=DEVICE) * 2
    make, formula = TARGETS[name]
    got = make(a, b, k=7)
    want = formula(a.double(), b.double()).log_softmax(-1)
    chosen = want.gather(-1, got.ids.long())
    assert got.ids.dtype == torch.int32 and len(set(got.ids[0, 0].tolist())) == 7
    torch.testing.assert_close(got.log_probs.double(), chosen, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(chosen, want.topk(7).values, rtol=1e-5, atol=1e-5)  # near ties may swap


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("given", ["supports", "first", "second"])
def test_on_slots_it_is_the_formula_there(name: str, given: str) -> None:
    a, b = torch.randn(2, 4, 60, device=DEVICE) * 2
    make, formula = TARGETS[name]
    ids = torch.rand(4, 60, device=DEVICE).argsort(-1)[:, :9]
    trained = name in ("taid", "veto")  # where b is the student
    sources = [x if which == given else fixed_ids(x, ids, normalize=True) for x, which in ((a, "second"), (b, "first"))]
    sources[1] = b if trained else sources[1]
    if all(isinstance(x, Tensor) for x in sources):
        sources[0] = fixed_ids(a, ids)
    got = make(*sources)
    want = formula(a.double(), b.double()).gather(-1, ids)
    assert torch.equal(got.ids, ids)
    difference = got.log_probs.double() - want
    if name == "mixture":  # keeps the normaliser
        torch.testing.assert_close(difference, torch.zeros_like(want), rtol=0, atol=2e-6)
    torch.testing.assert_close(difference, difference[:, :1].expand_as(want), rtol=0, atol=2e-5)
    full = topk_reverse_kl(b, Support(ids, want))
    torch.testing.assert_close(topk_reverse_kl(b, got), full, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", TARGETS)
def test_probabilities_add_up_and_float64_stays(name: str) -> None:
    a, b = torch.randn(2, 3, 20, dtype=torch.float64, device=DEVICE)
    make, formula = TARGETS[name]
    got = make(a, b, k=20)
    torch.testing.assert_close(got.log_probs.logsumexp(-1), a.new_zeros(3), rtol=0, atol=1e-12)
    want = formula(a, b).log_softmax(-1).gather(-1, got.ids.long())
    torch.testing.assert_close(got.log_probs, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", TARGETS)
def test_low_precision_logits_are_composed_in_float32(name: str) -> None:
    a, b = torch.randn(2, 3, 50, device=DEVICE).bfloat16()
    got, want = TARGETS[name][0](a, b, k=6), TARGETS[name][0](a.float(), b.float(), k=6)
    assert torch.equal(got.ids, want.ids) and torch.equal(got.log_probs, want.log_probs)


@pytest.mark.parametrize("name", TARGETS)
def test_chunks_of_rows_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(2, 3, 5, 40, device=DEVICE)
    whole = TARGETS[name][0](a[:, :-1], b[:, 1:], k=6)
    alone = TARGETS[name][0](a[2, 3], b[2, 4], k=6)
    assert torch.equal(alone.ids, whole.ids[2, 3])
    torch.testing.assert_close(alone.log_probs, whole.log_probs[2, 3], rtol=1e-6, atol=1e-6)
    for elements in (1, 3 * 40, 9 * 40):  # a position, three of one sequence, two sequences at a time
        monkeypatch.setattr(rows, "CHUNK_BYTES", 8 * elements)
        chunked = TARGETS[name][0](a[:, :-1], b[:, 1:], k=6)
        assert torch.equal(whole.ids, chunked.ids)
        torch.testing.assert_close(whole.log_probs, chunked.log_probs, rtol=1e-6, atol=1e-6)
    empty = TARGETS[name][0](a[:0], b[:0], k=6)
    assert empty.ids.shape == empty.log_probs.shape == (0, 5, 6)


@pytest.mark.parametrize("name", TARGETS)
def test_no_float32_copy_of_the_logits_is_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "CHUNK_BYTES", 8 << 13)
    a, b = torch.randn(2, 100, 4_000, device=DEVICE).bfloat16()
    TARGETS[name][0](a[:4], b[:4], k=8)
    with LiveBytes() as memory:
        TARGETS[name][0](a, b, k=8)
    assert memory.peak < a.numel()  # bytes: a quarter of one such copy


@pytest.mark.slow
def test_composed_teachers_compile_without_a_graph_break() -> None:
    def composed(student: Tensor, a: Tensor, b: Tensor, share: Tensor) -> list[Tensor]:
        slots = teacher_topk(a, 5, normalize=True)
        targets = mixture([a, b], [0.3, share], k=4), taid(student, a, t=0.5, k=4), residual(slots, b)
        return [x for target in targets for x in target.tensors]

    student, a, b = (x[:, :-1] for x in torch.randn(3, 2, 5, 40))  # no 2-D view
    got = torch.compile(composed, fullgraph=True, backend="aot_eager")(student, a, b, torch.full((2, 4), 0.7))
    want = composed(student, a, b, torch.full((2, 4), 0.7))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_mixture_of_three_takes_weights_of_each_position(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 2, 4, 30, dtype=dtype, device=DEVICE)
    weights = torch.rand(3, 2, 4, dtype=dtype, device=DEVICE)
    want = ((weights / weights.sum(0))[..., None] * logits.softmax(-1)).sum(0)
    got = mixture(list(logits), list(weights), k=5)
    torch.testing.assert_close(got.log_probs.exp(), want.topk(5).values)
    on_slots = mixture(
        [replace(got, log_probs=x.log_softmax(-1).gather(-1, got.ids.long())) for x in logits], [*weights]
    )
    torch.testing.assert_close(on_slots.log_probs, got.log_probs)
    numbers = mixture(list(logits), [0.0, 2, torch.tensor(2.0, device=DEVICE)], k=5)
    torch.testing.assert_close(numbers.log_probs.exp(), logits.softmax(-1)[1:].mean(0).topk(5).values)


def test_a_token_that_one_teacher_excludes_stays_in_the_mixture() -> None:
    a, b = torch.tensor([[0.0, -INF, 0]]), torch.tensor([[-INF, 0.0, -INF]])
    got = mixture([a, b], [1, 1], k=3)
    assert dict(zip(got.ids[0].tolist(), got.log_probs[0].exp().tolist(), strict=True)) == pytest.approx(
        {1: 0.5, 0: 0.25, 2: 0.25}
    )
    a, b = (
        Support(torch.tensor([[4, -1, 7]]), torch.tensor([[-1.0, -INF, -2]])),
        Support(torch.tensor([[4, 5, -1]]), torch.tensor([[-1.0, -3.0, 9.0]])),
    )
    got = mixture([a, b], [1, 1])
    assert got.ids.tolist() == [[4, 5, 7]]
    torch.testing.assert_close(got.log_probs, torch.tensor([[-1.0, -3 - math.log(2), -2 - math.log(2)]]))


@pytest.mark.parametrize("name", ["residual", "extrapolation", "taid", "veto"])
def test_what_the_teacher_excludes_stays_excluded(name: str) -> None:
    a, b = torch.tensor([[1.0, -INF, 0]]), torch.tensor([[0.5, 3.0, 1]])
    for got in (TARGETS[name][0](a, b, k=3), TARGETS[name][0](fixed_ids(a, [0, 1, 2], normalize=True), b)):
        assert set(got.ids[got.log_probs > -INF].tolist()) == {0, 2} and not got.log_probs.isnan().any()
    a, b = a.fill_(-INF), b.fill_(-INF)
    got = TARGETS[name][0](a, b, k=2)
    assert got.ids.tolist() == [[-1, -1]] and got.log_probs.tolist() == [[-INF, -INF]]


def test_the_ends_of_each_family_are_the_teacher() -> None:
    a, b = torch.randn(2, 3, 30, device=DEVICE)
    b[0, 2] = -INF
    want = teacher_topk(a, 6, normalize=True)
    for got in (
        mixture([a, b], [1, 0], k=6),
        residual(b.nan_to_num(neginf=-1.0), a, clip=1e6, k=6),
        residual(a, b, lam=0.0, k=6),
        extrapolation(a, b, lam=1.0, k=6),
        taid(b, a, t=1.0, k=6),
        veto(b, a, beta=0.0, k=6),
    ):
        assert torch.equal(got.ids, want.ids)
        torch.testing.assert_close(got.log_probs, want.log_probs, rtol=1e-5, atol=1e-5)
    student = taid(b, a, t=0.0, k=6)
    assert torch.equal(student.ids, teacher_topk(b, 6).ids)


def test_no_gradient_flows_through_the_target() -> None:
    student, teacher = torch.randn(2, 3, 30, device=DEVICE)
    student.requires_grad_()
    slots = teacher_topk(teacher, 8)
    for target in (
        taid(student, teacher, t=0.4, k=8),
        veto(student, teacher, beta=0.5, k=8),
        taid(student, slots, t=0.4),
        veto(student, slots, beta=0.5),
    ):
        assert not target.log_probs.requires_grad
        (got,) = torch.autograd.grad(topk_reverse_kl(student, target), student)
        log_p = student.gather(-1, target.ids.long()).log_softmax(-1)
        want = (log_p.exp() * (log_p - target.log_probs.log_softmax(-1))).sum(-1).mean()
        torch.testing.assert_close(got, torch.autograd.grad(want, student)[0])


def test_slots_that_name_different_tokens_make_their_position_nan() -> None:
    a = Support(torch.tensor([[1, 2], [3, 4]]), torch.full((2, 2), -1.0))
    b = Support(torch.tensor([[1, 2], [3, 5]], dtype=torch.int32), torch.full((2, 2), -1.0))
    for got in (mixture([a, b], [1, 1]), residual(a, b), extrapolation(a, b)):
        assert got.log_probs.isnan().any(-1).tolist() == [False, True]
        assert topk_reverse_kl(torch.randn(2, 9), got, reduction="none").isnan().tolist() == [False, True]


def test_a_token_that_only_the_base_excludes_is_nan_beyond_the_teacher() -> None:
    teacher, base, student = torch.randn(3, 1, 6)
    base[0, 3] = -INF
    assert extrapolation(teacher, base, k=6).log_probs.isnan().all()
    assert topk_reverse_kl(student, extrapolation(teacher_topk(teacher, 6), base)).isnan()


def test_losses_of_two_teachers_add_up_where_each_has_its_positions() -> None:
    student, a, b = torch.randn(3, 6, 30, device=DEVICE)
    first = torch.arange(6, device=DEVICE) < 2
    got = sum(topk_reverse_kl(student, x, k=5, weights=own, denominator=6) for x, own in ((a, first), (b, ~first)))
    routed = topk_reverse_kl(student, torch.where(first[:, None], a, b), k=5)
    torch.testing.assert_close(got, routed)


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("zero", [0, 0.0, np.float32(0), torch.tensor(0.0), torch.zeros(3, dtype=torch.float64)])
@pytest.mark.parametrize("given", ["logits", "supports"])
def test_a_teacher_of_weight_0_does_not_matter_whatever_it_holds(bad: float, zero, given: str) -> None:
    a, b = torch.randn(2, 3, 30)
    want = mixture([a, b], [1, 3], k=6)
    sources = [a, torch.full_like(a, bad), b]
    if given == "supports":
        sources = [fixed_ids(a, want.ids, normalize=True), Support(want.ids + 1, torch.full_like(want.log_probs, bad))]
        sources += [fixed_ids(b, want.ids, normalize=True)]
    got = mixture(sources, [1, zero, 3], k=6 if given == "logits" else None)
    assert torch.equal(got.ids, want.ids)
    torch.testing.assert_close(got.log_probs, want.log_probs, rtol=1e-6, atol=2e-6)


def test_a_teacher_may_be_absent_at_some_positions() -> None:
    a, b = torch.randn(2, 3, 30)
    b[1] = math.nan
    shares = torch.tensor([1.0, 0.0, 1.0])
    got = mixture([a, b], [1, shares], k=6)
    want = mixture([a, torch.where(shares[:, None] == 0, a, b)], [1, 1], k=6)
    assert torch.equal(got.ids, want.ids)
    torch.testing.assert_close(got.log_probs, want.log_probs, rtol=1e-6, atol=2e-6)
    assert mixture([a, b], [torch.zeros(3), torch.zeros(3)], k=6).log_probs.isnan().all()


@pytest.mark.parametrize("given", ["logits", "support"])
@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
def test_at_the_ends_of_a_family_the_other_end_does_not_matter_whatever_it_holds(bad: float, given: str) -> None:
    a = torch.randn(3, 30)
    other, slots, k = torch.full_like(a, bad), teacher_topk(a, 6, normalize=True), 6
    a, k = (a, 6) if given == "logits" else (slots, None)
    for got in (
        residual(a, other, lam=0.0, k=k),
        extrapolation(a, other, lam=1, k=k),
        taid(other, a, t=1.0, k=k),
        veto(other, a, beta=np.float32(0), k=k),
    ):
        assert torch.equal(got.ids, slots.ids)
        torch.testing.assert_close(got.log_probs.log_softmax(-1), slots.log_probs.log_softmax(-1))


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_supports_of_low_precision_are_composed_in_float32(name: str, dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 3, 40)
    slots = fixed_ids(a, torch.arange(9), normalize=True)
    low = Support(slots.ids, slots.log_probs.to(dtype))
    got, want = (TARGETS[name][0](x, b) for x in (low, Support(low.ids, low.log_probs.float())))
    assert got.log_probs.dtype == torch.float32 and torch.equal(got.log_probs, want.log_probs)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("given", ["logits", "support"])
def test_large_logits_cost_no_accuracy(backend, name: str, given: str) -> None:
    a, b = torch.randn(2, 3, 60, device=DEVICE)
    a, b = a + 1e4, b * 2 - 9e3
    make, formula = TARGETS[name]
    ids = torch.arange(9, device=DEVICE).expand(3, 9)
    normalize = name in ("mixture", "residual")
    got = make(a, b, k=9) if given == "logits" else make(fixed_ids(a, ids, normalize=normalize), b)
    want = formula(a.double(), b.double()).gather(-1, got.ids.long()).log_softmax(-1)
    torch.testing.assert_close(got.log_probs.double().log_softmax(-1), want, rtol=0, atol=4e-6)


def test_supports_of_logits_are_refused_or_nan_where_log_probs_are_needed() -> None:
    a, b = torch.randn(2, 3, 30) + 2
    logits, log_probs = teacher_topk(a, 6), teacher_topk(a, 6, normalize=True)
    for make in (lambda x: mixture([x, b], [1, 1]), lambda x: residual(x, b), lambda x: residual(b, x)):
        with pytest.raises(ValueError, match=r"holds logits, as its field `normalized` says, but \w+ needs true log-"):
            make(logits)
        assert make(Support(*logits.tensors)).log_probs.isnan().all() and make(log_probs).log_probs.isfinite().all()
        twice = Support(log_probs.ids[:, [0, 0, 0, 0]], log_probs.log_probs[:, [0, 0, 0, 0]] / 4)
        assert make(twice).log_probs.isfinite().all()


A = torch.zeros(2, 9)
S = Support(torch.zeros(2, 3).long(), torch.zeros(2, 3))
REFUSALS = {
    "k missing": (lambda: taid(A, A, t=0.5), ValueError, "k is None, but student_logits holds logits"),
    "k with a support": (lambda: residual(S, A, k=3), ValueError, "k is 3, but partial is a Support"),
    "k above V": (lambda: extrapolation(A, A, k=10), ValueError, "k is 10"),
    "vocabularies": (lambda: residual(A, A[:, :8], k=3), ValueError, "last dimensions differ: partial 9, full 8; cut"),
    "slots": (lambda: mixture([S, Support(A.long(), A)], [1, 1]), ValueError, r"teachers\[0\] 3, teachers\[1\] 9"),
    "rows": (lambda: extrapolation(A, A[:1], k=3), ValueError, r"base has shape \(1, 9\) and teacher \(2, 9\)"),
    "trained teacher": (
        lambda: veto(A, A.clone().requires_grad_(), beta=1, k=3),
        ValueError,
        "teacher requires grad, but is a constant",
    ),
    "student a support": (lambda: taid(S, A, t=0.5), TypeError, "student_logits is a topk_rkl.support.Support"),
    "teacher a list": (lambda: extrapolation(A, [1.0]), TypeError, "base is a list; it must be a torch.Tensor"),
    "t": (lambda: taid(A, A, t=1.5, k=3), ValueError, "t is 1.5; it must be from 0 to 1"),
    "beta": (lambda: veto(A, A, beta=-1, k=3), ValueError, "beta is -1; it must not be negative"),
    "lam": (lambda: extrapolation(A, A, lam=math.nan, k=3), ValueError, "lam is nan; it must be finite"),
    "clip": (lambda: residual(A, A, clip=0, k=3), ValueError, "clip is 0; it must be positive"),
    "no teacher": (lambda: mixture([], [], k=3), ValueError, "teachers is empty"),
    "one tensor": (lambda: mixture(A, [1, 1], k=3), TypeError, "teachers is a torch.Tensor"),
    "weights": (lambda: mixture([A, A], [1], k=3), ValueError, r"weights is \[1\]; it must be a list of 2"),
    "weights negative": (lambda: mixture([A, A], [1, -1], k=3), ValueError, r"weights\[1\] is -1"),
    "weights 0": (lambda: mixture([A, A], [0, 0.0], k=3), ValueError, "at least one must be above 0"),
    "weights shape": (lambda: mixture([A, A], [1, A], k=3), ValueError, r"weights\[1\] has shape \(2, 9\)"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composition.ops, "select", lambda *_: pytest.fail("an op ran before the refusal"))
    call, kind, message = REFUSALS[name]
    with pytest.raises(kind, match=message):
        call()
