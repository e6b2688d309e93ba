"""Labels for weights: the shift, the mask and the denominator of causal language models."""

from typing import Any

import pytest
import torch
from conftest import DEVICE, LiveBytes, same_bits
from torch import Tensor

from tests.ranks import on_ranks, together
from topk_rkl.loss import (
    ForwardKL,
    causal_topk_reverse_kl,
    global_count,
    linear_causal_topk_reverse_kl,
    teacher_topk,
    topk_divergence,
    topk_reverse_kl,
)

B, T, V, H, K = 3, 7, 50, 16, 5


def batch() -> tuple[Tensor, Tensor, Tensor]:  # (B, T, V) twice, (B, T)
    labels = torch.randint(V, (B, T), device=DEVICE)
    labels[:, :2] = labels[1, 5:] = -100  # a prompt, and padding
    z, w = 3 * torch.randn(2, B, T, V, device=DEVICE)
    return z, w, labels


def plain(
    z: Tensor,  # (B, T, V)
    w: Tensor,  # (B, T, V)
    labels: Tensor,  # (B, T)
) -> Tensor:  # (B, T - 1), 0 where a label does not count
    best, ids = w[:, :-1].double().topk(K)
    log_p, log_q = z[:, :-1].double().gather(-1, ids).log_softmax(-1), best.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1) * (labels[:, 1:] != -100)


def assert_loss(loss: Tensor, leaf: Tensor, want: Tensor, wide: Tensor) -> None:
    torch.testing.assert_close(loss.double(), want, rtol=2e-6, atol=2e-6)
    loss.backward(), want.backward()
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("given", ["logits", "support", "support without the last position"])
def test_the_loss_is_shifted_masked_and_divided_by_the_labels_that_count(backend, given: str) -> None:
    z, w, labels = batch()
    teacher = w if given == "logits" else teacher_topk(w if given == "support" else w[:, :-1], K)
    leaf, wide = z.clone().requires_grad_(), z.double().requires_grad_()
    loss = causal_topk_reverse_kl(leaf, teacher, labels, k=K if given == "logits" else None)
    assert_loss(loss, leaf, plain(wide, w, labels).sum() / (labels[:, 1:] != -100).sum(), wide)
    assert (leaf.grad[:, -1] == 0).all()


def test_from_hidden_states(backend) -> None:
    _, w, labels = batch()
    hidden, head = torch.randn(B, T, H, device=DEVICE), torch.randn(V, H, device=DEVICE)
    leaf, wide = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    loss = linear_causal_topk_reverse_kl(leaf, head, teacher_topk(w, K), labels, logit_scale=0.5, num_items_in_batch=40)
    assert_loss(loss, leaf, plain(0.5 * wide @ head.double().T, w, labels).sum() / 40, wide)


@pytest.mark.parametrize("items", [11, 11.0, torch.tensor(11), 2**24 + 1, torch.tensor(2**24 + 1)])
def test_num_items_in_batch_divides_and_the_world_size_multiplies(items) -> None:
    z, w, labels = batch()
    total = causal_topk_reverse_kl(z, w, labels, k=K, reduction="sum").double()
    for world in (1, 3):
        loss = causal_topk_reverse_kl(z, w, labels, k=K, num_items_in_batch=items, world_size=world)
        torch.testing.assert_close(loss.double(), total * world / int(items), rtol=2e-7, atol=0)


def test_micro_batches_add_up_to_the_batch() -> None:
    z, w, labels = batch()
    items = (labels[:, 1:] != -100).sum()
    whole, parts = z.clone().requires_grad_(), z.clone().requires_grad_()
    causal_topk_reverse_kl(whole, w, labels, k=K).backward()
    for row in range(B):
        loss = causal_topk_reverse_kl(parts[row : row + 1], w[row : row + 1], labels[row : row + 1], k=K,
                                      num_items_in_batch=items)  # fmt: skip
        loss.backward()
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-6, atol=1e-8)


def test_weights_are_a_factor_per_label() -> None:
    z, w, labels = batch()
    weights = torch.rand(B, T, device=DEVICE)
    want = plain(z, w, labels) * weights[:, 1:].double()
    per_token = causal_topk_reverse_kl(z, w, labels, k=K, weights=weights, reduction="none")
    torch.testing.assert_close(per_token[:, :-1].double(), want, rtol=2e-6, atol=2e-6)
    assert (per_token[:, -1] == 0).all()
    kept = weights > 0.5
    want = (plain(z, w, labels) * kept[:, 1:]).sum() / (kept & (labels != -100))[:, 1:].sum()
    torch.testing.assert_close(
        causal_topk_reverse_kl(z, w, labels, k=K, weights=kept).double(), want, rtol=2e-6, atol=0
    )


def test_options_are_those_of_the_loss() -> None:
    z, w, labels = batch()
    options = {"divergence": ForwardKL(), "mass": "tail", "temperature": 0.7, "k": K}
    want = topk_divergence(z, w, weights=torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1)), **options)
    assert same_bits(causal_topk_reverse_kl(z, w, labels, **options), want)
    other = labels.masked_fill(labels == -100, -1)
    assert same_bits(causal_topk_reverse_kl(z, w, other, ignore_index=-1, **options), want)


def test_a_batch_without_a_label_gives_0_attached_to_the_graph() -> None:
    z, w, labels = batch()
    leaf = z.requires_grad_()
    loss = causal_topk_reverse_kl(leaf, w, torch.full_like(labels, -100), k=K)
    loss.backward()
    assert loss == 0 and (leaf.grad == 0).all()


def test_no_copy_of_the_logits_or_of_their_gradient_is_made(backend) -> None:
    (z, w), labels = torch.randn(2, 4, 8, 20_000, device=DEVICE), torch.randint(9, (4, 8), device=DEVICE)
    leaf, support = z.requires_grad_(), teacher_topk(w, K)
    with LiveBytes() as bytes_:
        causal_topk_reverse_kl(leaf, support, labels).backward()
    assert bytes_.peak < 1.05 * leaf.grad.nbytes
    with LiveBytes() as sliced:
        topk_reverse_kl(leaf[:, :-1], support[:, :-1], weights=labels[:, 1:] > -1).backward()
    assert sliced.peak > 1.5 * leaf.grad.nbytes  # so the measurement sees such a copy


REFUSALS = {
    "labels that are floats": ({"labels": torch.rand(B, T)}, TypeError, "labels is torch.float32"),
    "labels that are shifted": ({"labels": torch.ones(B, T - 1).long()}, ValueError, r"labels has shape \(3, 6\)"),
    "labels as weights": ({"weights": torch.ones(B, T).long()}, TypeError, r"weights is torch.int64.*labels != -100"),
    "a denominator": ({"denominator": 3}, TypeError, "denominator is given.*pass num_items_in_batch"),
    "a sum that is divided": ({"num_items_in_batch": 3, "reduction": "sum"}, ValueError, "num_items_in_batch is given"),
    "ranks that nothing counts": ({"world_size": 2}, ValueError, r"world_size is 2 without num_items_in_batch.*global"),
    "a world of no rank": ({"world_size": 0, "num_items_in_batch": 3}, ValueError, "world_size is 0"),
    "items as a vector": ({"num_items_in_batch": torch.ones(2)}, ValueError, r"num_items_in_batch has shape \(2,\)"),
    "a flat batch": ({"student_logits": torch.randn(V)}, ValueError, r"student_logits has shape \(50,\).*\(B, T"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    change, kind, message = REFUSALS[name]
    z, w, labels = (x.cpu() for x in batch())
    with pytest.raises(kind, match=message):
        causal_topk_reverse_kl(**({"student_logits": z, "teacher": w, "labels": labels, "k": K} | change))


def one_is_wrong(group: Any) -> None:
    z, labels = torch.randn(B, T, V), torch.ones(B, T).long()
    given = labels.float() if group.rank() == 1 else labels
    call = {"k": K, "group": group}
    with pytest.raises((TypeError, RuntimeError), match=r"labels is torch.float32"):
        causal_topk_reverse_kl(z, z, given, **call)
    with pytest.raises((TypeError, RuntimeError), match=r"labels is torch.float32"):
        linear_causal_topk_reverse_kl(torch.randn(B, T, H), torch.randn(V, H), z, given, **call)


@together
def test_ranks_refuse_together() -> None:
    on_ranks(2, one_is_wrong)


def test_no_position_gives_0() -> None:
    loss = causal_topk_reverse_kl(torch.randn(B, 0, V), torch.randn(B, 0, V), torch.ones(B, 0).long(), k=K)
    assert loss == 0


def test_what_the_refusals_advise_is_right() -> None:
    z, w, labels = batch()
    want = plain(z, w, labels).sum() / (labels[:, 1:] != -100).sum()
    sides = z[:, :-1], w[:, :-1]
    for weights in ((labels != -100)[:, 1:], (labels != -100).long()[:, 1:].bool()):
        torch.testing.assert_close(topk_reverse_kl(*sides, k=K, weights=weights).double(), want, rtol=2e-6, atol=0)
    items = global_count(labels[:, 1:] != -100)
    torch.testing.assert_close(
        causal_topk_reverse_kl(z, w, labels, k=K, num_items_in_batch=items, world_size=1).double(), want, rtol=2e-6,
        atol=0,
    )  # fmt: skip
