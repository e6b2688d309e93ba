"""What every entry promises of its gradient: nothing stays nothing, one derivative, a loss that may be changed."""

import gc
import itertools
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import DEVICE
from torch import Tensor
from torch.autograd.functional import hessian, hvp, jacobian, vhp

from topk_rkl import (
    linear_topk_divergence,
    linear_topk_reverse_kl,
    teacher_topk,
    topk_divergence,
    topk_reverse_kl as by_topk,
    use_backend,
)
from topk_rkl.divergence import MASSES
from topk_rkl.recipe.rollout import sampled_token_loss
from topk_rkl.recipe.weighting import aggregate

N, V, H, K = 4, 40, 6, 5
WITH_A_TAIL = [mass for mass in MASSES if mass != "renormalized"]
LINEAR = ("hidden", "head", "bias")


class Given:
    """What the entries take: leaves that all require grad, and constants."""

    def __init__(self) -> None:
        self.student, self.teacher = torch.randn(2, N, V, device=DEVICE)
        self.hidden, self.head = torch.randn(N, H, device=DEVICE), torch.randn(V, H, device=DEVICE)
        self.bias, self.sampled = torch.randn(V, device=DEVICE), torch.arange(N, device=DEVICE)
        self.weights = torch.ones(N, device=DEVICE)

    def leaves(self, names: tuple[str, ...]) -> list[Tensor]:
        return [getattr(self, name).requires_grad_() for name in names]

    def rows(self, index: Any) -> "Given":
        """Only some positions, or all in another shape."""
        other = Given()
        for name, x in vars(self).items():
            setattr(other, name, (x if name in ("head", "bias") else x[index]).detach().clone())
        return other


def from_logits(x: Given, **options: Any) -> Tensor:
    return by_topk(x.student, x.teacher, k=K, weights=x.weights, **options)


def from_support(x: Given, **options: Any) -> Tensor:
    return by_topk(x.student, teacher_topk(x.teacher, K), weights=x.weights, **options)


def from_repeated_ids(x: Given, **options: Any) -> Tensor:
    support = teacher_topk(x.teacher, K)
    repeated = support.each(lambda s: torch.cat((s, s[..., :2]), -1))
    return by_topk(x.student, repeated, weights=x.weights, **options)


def from_hidden(x: Given, **options: Any) -> Tensor:
    support = teacher_topk(x.teacher, K)
    return linear_topk_reverse_kl(
        x.hidden, x.head, support, student_bias=x.bias, softcap=3.0, weights=x.weights, **options
    )


def from_hidden_densely(x: Given, **options: Any) -> Tensor:
    support = teacher_topk(x.teacher, V // 2)  # by default a dense product
    return linear_topk_reverse_kl(x.hidden, x.head, support, student_bias=x.bias, weights=x.weights, **options)


def sparsely(x: Given, **options: Any) -> Tensor:
    return from_hidden(x, weight_grad="sparse", **options)


def sampled(x: Given, **options: Any) -> Tensor:
    return sampled_token_loss(x.student, x.teacher, x.sampled, weights=x.weights, **options)


def sampled_for(mass: str, x: Given) -> Tensor | None:
    return x.sampled if mass.startswith("ema_pg") else None


def with_mass(mass: str) -> Callable[..., Tensor]:
    def entry(x: Given, **options: Any) -> Tensor:
        return topk_divergence(
            x.student, x.teacher, k=K, mass=mass, sampled_ids=sampled_for(mass, x), weights=x.weights, **options
        )

    return entry


def linear_with_mass(mass: str) -> Callable[..., Tensor]:
    def entry(x: Given, **options: Any) -> Tensor:
        return linear_topk_divergence(
            x.hidden, x.head, x.teacher, k=K, mass=mass, student_bias=x.bias, sampled_ids=sampled_for(mass, x),
            weights=x.weights, **options,
        )  # fmt: skip

    return entry


LOGITS: dict[str, Callable[..., Tensor]] = {
    "logits": from_logits, "support": from_support, "repeated ids": from_repeated_ids, "sampled": sampled,
    **{mass: with_mass(mass) for mass in WITH_A_TAIL},
}  # fmt: skip
HIDDEN: dict[str, Callable[..., Tensor]] = {
    "hidden": from_hidden, "hidden, dense product": from_hidden_densely, "hidden, sparse": sparsely,
    **{f"hidden, {mass}": linear_with_mass(mass) for mass in WITH_A_TAIL},
}  # fmt: skip
ENTRIES = {name: (("student",), entry) for name, entry in LOGITS.items()}
ENTRIES |= {name: (LINEAR, entry) for name, entry in HIDDEN.items()}


@pytest.fixture(params=ENTRIES)
def entry(request: pytest.FixtureRequest, backend: str) -> Iterator[tuple[tuple[str, ...], Callable[..., Tensor]]]:
    """The names of its leaves, and what gives the loss, where the backend has it."""
    name = request.param
    plain = name == "sampled" or (name.startswith("hidden, ") and name != "hidden, sparse")
    if plain and backend != "reference":
        pytest.skip("the same code as on the reference")
    if (backend == "cuda" and name in WITH_A_TAIL) or (backend != "reference" and name.startswith("ema_pg")):
        pytest.skip("the backend has no such mass")
    with use_backend("auto" if name == "hidden, dense product" else backend):
        yield ENTRIES[name]


def few(backend: str, cases: list[Any]) -> list[Any]:
    """The first and the last for the interpreter: autograd, not the kernel, tells them apart."""
    return [cases[0], cases[-1]] if backend == "triton" and DEVICE == "cpu" else cases


def dense(gradients: tuple[Tensor, ...]) -> list[Tensor]:
    return [g.to_dense() for g in gradients]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nothing_times_what_is_not_finite_is_nothing(entry, bad: float) -> None:
    """A position that grad_output drops after the fact, and one of weight 0 that a later division makes NaN."""
    names, loss = entry
    x = Given()
    kept = x.rows([0, 3])
    getattr(x, names[0])[1:3] = bad
    x.weights[2] = 0
    leaves, of_kept = x.leaves(names), kept.leaves(names)
    grad_output = torch.tensor([0.5, 0.0, bad, -2.0], device=DEVICE)
    got = dense(torch.autograd.grad(loss(x, reduction="none"), leaves, grad_output))
    want = dense(torch.autograd.grad(loss(kept, reduction="none"), of_kept, grad_output[[0, 3]]))
    assert not got[0][1:3].view(torch.int32).any()
    torch.testing.assert_close([got[0][[0, 3]], *got[1:]], want, rtol=1e-6, atol=1e-7)
    assert all(g.count_nonzero() > 0 for g in got)


WAYS: list[Callable[[Tensor, Tensor], Any]] = [
    torch.autograd.grad,
    lambda y, leaf: torch.autograd.grad(y, leaf, allow_unused=True),
    lambda y, leaf: torch.autograd.grad(y, leaf, materialize_grads=True),
    lambda y, leaf: y.backward(inputs=[leaf]),
    lambda y, _: y.backward(),
]


def test_a_second_derivative_raises_however_it_is_asked_for(entry, backend: str) -> None:
    names, loss = entry
    x = Given()
    leaves = x.leaves(names)
    want = dense(torch.autograd.grad(loss(x), leaves))
    pairs = list(itertools.product(range(len(names)), leaves))
    for i in few(backend, list(range(max(len(pairs), len(WAYS))))):
        (first, leaf), ask = pairs[i % len(pairs)], WAYS[i % len(WAYS)]
        (gradient,) = dense(torch.autograd.grad(loss(x), leaves[first], create_graph=True))
        assert torch.equal(gradient, want[first])
        with pytest.raises(RuntimeError, match="no second derivative"):
            ask(gradient.square().sum(), leaf)


def test_a_second_derivative_by_the_functional_forms_raises(entry) -> None:
    names, loss = entry
    x = Given()

    def of(*leaves: Tensor) -> Tensor:
        y = x.rows(slice(None))
        for name, leaf in zip(names, leaves, strict=True):
            setattr(y, name, leaf)
        return loss(y)

    leaves = tuple(x.leaves(names))
    if loss is sparsely:
        pytest.skip("torch has no functional form for a sparse gradient")
    jacobian(of, leaves, create_graph=True)
    for ask in (lambda: hessian(of, leaves), lambda: hvp(of, leaves, leaves), lambda: vhp(of, leaves, leaves)):
        with pytest.raises(RuntimeError, match="no second derivative"):
            ask()
    grad_output = torch.ones((), device=DEVICE, requires_grad=True)
    (first,) = torch.autograd.grad(of(*leaves), leaves[0], grad_output, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(first.sum(), grad_output)


def released(alive: list[weakref.ref]) -> bool:
    """Within a second: on a GPU autograd's own thread drops its hold on the graph after it has woken the caller."""
    for _ in range(100):
        if all(ref() is None for ref in alive):
            return True
        time.sleep(0.01)
    return False


def test_nothing_is_held_after_the_backward_pass(entry) -> None:
    names, loss = entry
    gc.disable()
    try:
        for create_graph in (False, True):
            x = Given()
            leaves = x.leaves(names)
            alive = [weakref.ref(leaf) for leaf in leaves]
            gradients = torch.autograd.grad(loss(x), leaves, create_graph=create_graph)
            del x, leaves, gradients
            assert released(alive)
    finally:
        gc.enable()


@pytest.mark.parametrize("lead", [(N,), (2, 2)], ids=str)
def test_the_loss_may_be_changed_in_place(entry, backend: str, lead: tuple[int, ...]) -> None:
    names, loss = entry
    x = Given().rows(torch.arange(N).view(lead))
    leaves = x.leaves(names)
    mask = torch.tensor([1.0, 0.0, 2.0, 1.0], device=DEVICE).view(lead)
    for weights in (x.weights, None):
        x.weights = weights
        want = dense(torch.autograd.grad((loss(x, reduction="none") * mask).clamp(max=1.0).sum(), leaves))
        per_token = loss(x, reduction="none")
        per_token *= mask
        got = dense(torch.autograd.grad(per_token.clamp_(max=1.0).sum(), leaves))
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_what_was_made_under_inference_mode_may_be_trained_on(entry, backend: str) -> None:
    names, loss = entry
    x = Given()
    mask = torch.ones(1, N, device=DEVICE)
    for frozen in few(backend, [(), *((name,) for name in names if len(names) > 1), names[1:]]):
        trained = tuple(name for name in names if name not in frozen)
        y, z = x.rows(slice(None)), x.rows(slice(None))
        leaves = y.leaves(trained)
        want = dense(torch.autograd.grad(aggregate(loss(y, reduction="none")[None], mask), leaves))
        with torch.inference_mode():
            for name in {*vars(z)} - {*trained}:
                setattr(z, name, getattr(z, name).clone())
            constant_mask = mask.clone()
        leaves = z.leaves(trained)
        got = dense(torch.autograd.grad(aggregate(loss(z, reduction="none")[None], constant_mask), leaves))
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unique", [True, False])
def test_repeatable_row_by_row_to_the_sign_of_a_zero(module, dtype: torch.dtype, unique: bool) -> None:
    """On a CPU 32 MiB and more are written past the caches."""
    native = module.__name__.endswith("native")
    n, vocab, k = (17, 1 << 20, 24) if native else (3, 700, 24)
    g, grad_output = torch.randn(n, k, device=DEVICE), torch.randn(n, device=DEVICE)
    g[:, ::3] = 0
    grad_output[:2] = torch.tensor([0.0, -0.0])
    g[0, 1], g[2, 1] = torch.nan, -0.0
    ids = torch.rand(n, 700, device=DEVICE).argsort(1)[:, :k].contiguous()
    if not unique:
        ids[:, -4:] = ids[:, :4]
    out = torch.empty(n, vocab, dtype=dtype, device=DEVICE)
    module.scatter(g, ids, grad_output, out, unique)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert (out != 0).any() and not (out.signbit() & (out == 0)).any()
    for i in range(n):
        alone = torch.empty(1, vocab, dtype=dtype, device=DEVICE)
        module.scatter(*(x[i : i + 1] for x in (g, ids, grad_output)), alone, unique)
        assert torch.equal(alone[0].view(bits), out[i].view(bits))
