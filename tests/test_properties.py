"""What must hold for any input, found by search (hypothesis) on every backend."""

import hypothesis.strategies as st
import pytest
import torch
from conftest import BACKENDS, DEVICE
from hypothesis import example, given
from torch import Tensor

from tests.search import QUARTERS, SEARCH, SEEDS, SHAPES
from topk_rkl import Support, teacher_topk, topk_reverse_kl, use_backend


def draw(seed: int, n: int, vocab: int, spread: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z, w = torch.randint(-spread, spread + 1, (2, n, vocab), generator=generator).float() / 4
    return z.to(DEVICE), w.to(DEVICE)


def loss_and_gradient(z: Tensor, teacher: Tensor | Support, k: int | None = None) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    loss = topk_reverse_kl(z, teacher, k=k, reduction="none")
    loss.sum().backward()
    return loss.detach(), z.grad


@pytest.mark.parametrize("name", BACKENDS)
@given(shape=SHAPES, seed=SEEDS, spread=QUARTERS, shift=st.tuples(st.integers(-64, 64), st.integers(-64, 64)))
@SEARCH
def test_a_constant_added_to_a_row_changes_nothing(name: str, shape, seed, spread, shift) -> None:
    n, vocab, k = shape
    z, w = draw(seed, n, vocab, spread)
    with use_backend(name):
        loss, grad = loss_and_gradient(z, w, k)
        shifted_loss, shifted_grad = loss_and_gradient(z + shift[0], w + shift[1], k)
    assert torch.equal(loss, shifted_loss) and torch.equal(grad, shifted_grad)


@pytest.mark.parametrize("name", BACKENDS)
@given(shape=SHAPES, seed=SEEDS, spread=QUARTERS)
@SEARCH
def test_renaming_the_vocabulary_renames_the_gradient(name: str, shape, seed, spread) -> None:
    n, vocab, k = shape
    z, w = draw(seed, n, vocab, spread)
    new_name = torch.randperm(vocab, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    with use_backend(name):
        ids, log_probs = teacher_topk(w, k).tensors
        loss, grad = loss_and_gradient(z, Support(ids, log_probs))
        renamed = torch.empty_like(z)
        renamed[:, new_name] = z
        other_loss, other_grad = loss_and_gradient(renamed, Support(new_name[ids.long()], log_probs))
    assert torch.equal(loss, other_loss) and torch.equal(grad, other_grad[:, new_name])


@pytest.mark.parametrize("name", BACKENDS)
@given(shape=SHAPES, seed=SEEDS, spread=QUARTERS)
@SEARCH
def test_loss_is_not_negative_and_the_gradient_sums_to_0(name: str, shape, seed, spread) -> None:
    n, vocab, k = shape
    z, w = draw(seed, n, vocab, spread)
    with use_backend(name):
        loss, grad = loss_and_gradient(z, w, k)
        ids = teacher_topk(w, k).ids.long()
    assert (loss >= 0).all()
    assert (grad.double().sum(1).abs() <= 1e-6 * (1 + grad.abs().sum(1))).all()
    assert (torch.zeros_like(grad).scatter(1, ids, 1.0)[grad != 0] == 1).all()


@pytest.mark.parametrize("name", BACKENDS)
@given(shape=SHAPES, seed=SEEDS, spread=QUARTERS)
@example(shape=(2, 2, 2), seed=9, spread=100)  # a divergence of 1.5e-19, whose terms cancel to less than 0
@SEARCH
def test_zero_where_the_two_agree_on_the_support_and_only_there(name: str, shape, seed, spread) -> None:
    n, vocab, k = shape
    z, w = draw(seed, n, vocab, spread)
    with use_backend(name):
        ids = teacher_topk(w, k).ids.long()
        agreeing = z.scatter(1, ids, w.gather(1, ids) + 2)
        loss, grad = loss_and_gradient(agreeing, w, k)
        assert (loss == 0).all() and (grad == 0).all()
        differing = agreeing.scatter_add(1, ids[:, :1], torch.ones(n, 1, device=DEVICE))
        loss, _ = loss_and_gradient(differing, w, k)
    assert (loss >= 0).all()
    # What the first token gains the others lose: a sum of terms that cannot cancel.
    lost = w.gather(1, ids).double().softmax(1)[:, 1:].sum(1)
    assert (loss > 0)[lost > 1e-12].all() and (loss <= 1e-12)[lost <= 1e-12].all()


@pytest.mark.parametrize("name", BACKENDS)
@given(shape=SHAPES, seed=SEEDS, spread=QUARTERS)
@SEARCH
def test_rows_do_not_see_each_other(name: str, shape, seed, spread) -> None:
    n, vocab, k = shape
    z, w = draw(seed, n, vocab, spread)
    with use_backend(name):
        loss, grad = loss_and_gradient(z, w, k)
        backwards_loss, backwards_grad = loss_and_gradient(z.flip(0), w.flip(0), k)
    assert torch.equal(loss, backwards_loss.flip(0)) and torch.equal(grad, backwards_grad.flip(0))
