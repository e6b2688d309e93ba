"""Rows that no single stride leads through, as those of logits[:, :-1]: the bits of contiguous rows, in one launch."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import BACKENDS, DEVICE
from torch import Tensor

from tests.direct import Direct, reference
from tests.probes import lazy_memory
from topk_rkl import Support, backends, linear_topk_reverse_kl, teacher_topk, topk_divergence, topk_reverse_kl
from topk_rkl.rows import row_views

V, H, K = 41, 24, 5
TAKING_SLABS = [name for name in BACKENDS if getattr(Direct(backends._load(name)), "SLABS", False)]


def into(buffer: Tensor, view: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """x as a view of a larger buffer, whose other values are larger than any of x."""
    cut = view(buffer.to(x.dtype).fill_(99))
    cut.copy_(x)
    return cut


def buffer(x: Tensor, *more: int) -> Tensor:
    return torch.empty([size + extra for size, extra in zip(x.shape, more, strict=True)], device=x.device)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {  # of (B, T, X)
    "contiguous": lambda x: x.clone(),
    "without the last position": lambda x: into(buffer(x, 0, 1, 0), lambda b: b[:, :-1], x),
    "without the first, padded": lambda x: into(buffer(x, 0, 1, 3), lambda b: b[:, 1:, :-3], x),
    "positions first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other column": lambda x: into(buffer(x, 0, 2, x.shape[2]), lambda b: b[:, 1:-1, ::2], x),
}
PAIRS = [  # of the student's and the teacher's logits
    ("without the last position", "without the first, padded"),
    ("positions first", "contiguous"),
    ("contiguous", "every other column"),
    ("without the first, padded", "positions first"),
]
FEW = [(1, 2), (2, 1), (0, 3), (3, 0)]  # positions


def with_lead(cases: list) -> Any:
    """Each case with positions (2, 2), and the first with fewer."""
    pairs = [(case, (2, 2)) for case in cases] + [(cases[0], lead) for lead in FEW]
    names = [f"{case if isinstance(case, str) else '; '.join(case)}, {lead}" for case, lead in pairs]
    return pytest.mark.parametrize(("layout", "lead"), pairs, ids=names)


def all_equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def losses(student: Tensor, teacher: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """From logits and from a Support, and the student's gradient of both."""
    given = torch.linspace(-1, 2, weights.numel(), device=DEVICE).view(weights.shape)
    results: list[Tensor] = []
    for target, k in ((teacher, K), (teacher_topk(teacher, K), None)):
        leaf = student.detach().requires_grad_()
        loss = topk_reverse_kl(leaf, target, k=k, weights=weights, reduction="none")
        loss.backward(given)
        results += [loss.detach(), leaf.grad]
    return tuple(results)


@with_lead(PAIRS)
def test_the_loss_has_the_bits_of_contiguous_logits(backend, layout: tuple[str, str], lead: tuple[int, int]) -> None:
    student, teacher = torch.randn(2, *lead, V, device=DEVICE)
    weights = torch.randn(lead, device=DEVICE)
    want = losses(student, teacher, weights)
    got = losses(LAYOUTS[layout[0]](student), LAYOUTS[layout[1]](teacher), weights)
    assert all_equal(got, want)
    assert want[0].shape == lead and (want[1] != 0).any() == (weights.numel() > 0)


def test_log_probs(backend) -> None:
    """Within rounding: where a row starts may decide in which order its exponentials are added."""
    teacher = torch.randn(2, 2, V, device=DEVICE)
    want = teacher.double().log_softmax(-1)
    for layout in LAYOUTS.values():
        ids, log_probs = teacher_topk(layout(teacher), K, normalize=True).tensors
        torch.testing.assert_close(log_probs.double(), want.gather(-1, ids.long()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_that_start_anywhere(backend, dtype: torch.dtype) -> None:
    """Of odd length, so that each begins elsewhere within 16 bytes."""
    student, teacher = torch.randn(2, 2, 2, V, device=DEVICE).to(dtype)
    cut = LAYOUTS["without the first, padded"]
    weights = torch.rand(2, 2, device=DEVICE)
    assert all_equal(losses(cut(student), cut(teacher), weights), losses(student, teacher, weights))


def with_mass(student: Tensor, teacher: Tensor, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """The loss with the rest of the vocabulary as a class, and the gradient of its sum."""
    source = torch.zeros(student.shape, device=DEVICE, requires_grad=True)
    logits = (student.detach() if overwrite else student.detach().clone()).add_(source)
    loss = topk_divergence(logits, teacher, k=K, mass="tail", reduction="none", overwrite_student_logits=overwrite)
    loss.sum().backward()
    return loss.detach(), source.grad


@pytest.mark.parametrize("pair", PAIRS, ids="; ".join)
def test_the_rest_of_the_vocabulary(backend, pair: tuple[str, str]) -> None:
    if backend == "cuda":
        pytest.skip("it has kernels for the renormalised reverse KL alone")
    student, teacher = torch.randn(2, 2, 2, V, device=DEVICE)
    want = with_mass(student, teacher)
    cut, other = LAYOUTS[pair[0]](student), LAYOUTS[pair[1]](teacher)
    assert all_equal(with_mass(cut, other), want) and (want[1] != 0).all()
    assert all_equal(with_mass(cut, other, overwrite=True), want)
    assert torch.equal(cut, want[1])


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_the_students_logits_are_overwritten_and_nothing_beside_them(backend, layout: str) -> None:
    student, teacher = torch.randn(2, 2, 2, V, device=DEVICE)
    want = losses(student, teacher, torch.ones(2, 2, device=DEVICE))
    cut = LAYOUTS[layout](student)
    memory = cut.new_empty(0).set_(cut.untyped_storage())
    before = memory.clone()
    logits = cut.add_(torch.zeros((), device=DEVICE, requires_grad=True))  # no leaf, in the same memory
    loss = topk_reverse_kl(logits, teacher, k=K, reduction="none", overwrite_student_logits=True)
    loss.backward(torch.linspace(-1, 2, 4, device=DEVICE).view(2, 2))
    assert torch.equal(cut, want[1])
    with torch.no_grad():
        cut.copy_(student)
    assert torch.equal(memory, before)


def from_hidden(hidden: Tensor, head: Tensor, bias: Tensor, support: Support, weights: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (hidden, head, bias)]
    loss = linear_topk_reverse_kl(*leaves[:2], support, student_bias=leaves[2], weights=weights, reduction="none")
    loss.sum().backward()
    return loss.detach(), *(leaf.grad for leaf in leaves)


@with_lead(list(LAYOUTS)[1:])
def test_hidden_states(backend, layout: str, lead: tuple[int, int]) -> None:
    hidden, weights = torch.randn(*lead, H, device=DEVICE), torch.randn(lead, device=DEVICE)
    head, bias = torch.randn(V, H, device=DEVICE), torch.randn(V, device=DEVICE)
    support = Support(torch.rand(*lead, V).argsort(-1)[..., :K].to(DEVICE), torch.randn(*lead, K, device=DEVICE))
    want = from_hidden(hidden, head, bias, support, weights)
    assert all_equal(from_hidden(LAYOUTS[layout](hidden), head, bias, support, weights), want)
    assert (want[1] != 0).any() == (weights.numel() > 0)


FOUR = {  # views of (A, B, C, X), and how many of them it takes, in matrices and in slabs
    "one stride": (lambda x: x, 1, 1),
    "without the last position": (lambda x: x[:, :, :-1], 6, 1),
    "without the last of the second": (lambda x: x[:, :-1], 2, 1),
    "without both": (lambda x: x[:, :-1, :-1], 4, 2),
    "turned": (lambda x: x.permute(2, 1, 0, 3), 12, 4),
}


@pytest.mark.parametrize("view", [lambda x: x[:, :-1, :-1], lambda x: x[..., :-1, :].permute(2, 1, 0, 3)])
def test_three_leading_dimensions_that_no_two_strides_lead_through(backend, view: Callable[[Tensor], Tensor]) -> None:
    student, teacher = (view(x) for x in torch.randn(2, 2, 2, 3, V, device=DEVICE))
    weights = torch.rand(student.shape[:-1], device=DEVICE)
    want = losses(student.contiguous(), teacher.contiguous(), weights)
    assert all_equal(losses(student, teacher, weights), want)


@pytest.mark.parametrize("name", FOUR)
def test_as_few_views_as_strides_allow(name: str) -> None:
    view, matrices, slabs = FOUR[name]
    x = view(torch.arange(2.0 * 3 * 4 * 7).view(2, 3, 4, 7))
    weights = torch.arange(float(x[..., 0].numel())).view(x.shape[:-1])
    for count, dims, taken in ((matrices, (2,), False), (slabs, (2, 3), True)):
        parts = list(row_views(x, None, weights, slabs=taken))
        assert len(parts) == count and {rows.dim() for rows, _, _ in parts} <= set(dims)
        assert torch.equal(torch.cat([rows.reshape(-1, 7) for rows, _, _ in parts]), x.reshape(-1, 7))
        assert torch.equal(torch.cat([weight for _, _, weight in parts]), weights.flatten())
        assert {rows.untyped_storage().data_ptr() for rows, _, _ in parts} == {x.untyped_storage().data_ptr()}


def test_a_matrix_stays_one_beside_slabs() -> None:
    x, y = torch.randn(2, 3, 5, 7), torch.randn(3, 4, 6)
    ((rows, outside),) = row_views(x[0, :, :-1], y, slabs=True)
    assert rows.shape == (3, 4, 7) and outside.shape == (12, 6)
    ((one,),) = row_views(torch.randn(7), slabs=True)
    assert one.shape == (1, 7)


@pytest.fixture
def calls(module: Any, monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often each function of the backend is called."""
    counted: Counter = Counter()

    def counting(name: str, function: Callable) -> Callable:
        def call(*arguments: Any) -> Any:
            counted[name] += 1
            return function(*arguments)

        return call

    names = ("select", "support_loss", "select_loss", "scatter", "tail_logit", "mass_loss", "mass_grad", "linear_loss")
    for name in (name for name in names if hasattr(module.module, name)):
        monkeypatch.setattr(module.module, name, counting(name, getattr(module.module, name)))
    return counted


def test_one_call_per_op(module: Any, calls: Counter) -> None:
    """Where the backend takes slabs, and else one for each of them."""
    name = module.__name__.split(".")[-1]
    assert (name in TAKING_SLABS) == (name != "reference")
    each = 1 if name in TAKING_SLABS else 2
    student, teacher = (LAYOUTS["without the last position"](x) for x in torch.randn(2, 2, 2, V, device=DEVICE))
    with backends.use_backend(name):
        topk_reverse_kl(student.requires_grad_(), teacher, k=K).backward()
        assert calls.pop("select_loss") == each and calls.pop("scatter") == 1
        calls.clear()  # some selections are a part of that
        support = teacher_topk(teacher, K)
        assert calls.pop("select") == each
        logits = student.detach().add_(torch.zeros((), device=DEVICE, requires_grad=True))  # no leaf
        loss = topk_reverse_kl(logits, support, overwrite_student_logits=True)
        loss.backward()
        assert calls.pop("support_loss") == calls.pop("scatter") == each
        linear_topk_reverse_kl(
            LAYOUTS["positions first"](torch.randn(2, 2, H, device=DEVICE)), torch.randn(V, H).to(DEVICE), support
        )
        assert calls.pop("linear_loss") == each
        if name == "cuda":
            return
        with_mass(student.detach(), teacher, overwrite=True)
        assert calls.pop("tail_logit") == calls.pop("mass_loss") == calls.pop("mass_grad") == each


@pytest.mark.skipif(DEVICE != "cpu", reason="address space without memory behind it is to be had on the host alone")
@pytest.mark.parametrize("strides", [(2**31 + 11, 40, 1), (40, 2**31 + 11, 1)], ids=["far slabs", "far rows"])
@pytest.mark.parametrize("name", TAKING_SLABS)
def test_big_offsets_are_64_bit(name: str, strides: tuple[int, int, int]) -> None:
    module = Direct(backends._load(name))
    far = [lazy_memory(2**32 + 4_096, torch.bfloat16).as_strided((2, 2, 33), strides) for _ in range(2)]
    near = torch.randn(2, 2, 2, 33).bfloat16()
    for x, y in zip(far, near, strict=True):
        x.copy_(y)
    student, teacher = far
    flat = near.view(2, 4, 33)
    got = module.select_loss(student, teacher, K, None, 1.0)
    want = module.select_loss(flat[0], flat[1], K, None, 1.0)
    assert all_equal(got, want)
    ids, g = want[1:]
    assert all_equal(module.support_loss(student, ids, g, None, 1.0), module.support_loss(flat[0], ids, g, None, 1.0))
    hidden, head = student[..., :24], torch.randn(50, 24).bfloat16()
    rest = (head, None, ids, g, None, 1.0, 1.0, None, True)
    assert all_equal(module.linear_loss(hidden, *rest), module.linear_loss(flat[0][:, :24], *rest))
    module.scatter(g, ids, got[0], student, True)
    out = torch.empty(4, 33).bfloat16()
    reference.scatter(g, ids, want[0], out, True)
    assert torch.equal(student.reshape(4, 33), out)
