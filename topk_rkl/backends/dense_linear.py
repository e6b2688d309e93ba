"""linear_loss and linear_weight_grad by dense products, for a K so large that gathering rows of the head costs more."""

import torch
from torch import Tensor

from topk_rkl.backends import choose, products
from topk_rkl.backends.reference import raw_slots_loss
from topk_rkl.objective import Objective


@torch.autocast("cpu", enabled=False)  # a trainer's would take the products in 16 bits
def linear_loss(
    hidden: Tensor,  # (N, H)
    head: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (N, K)
    log_probs: Tensor,  # (N, K)
    weights: Tensor | None,  # (N,)
    objective: Objective,
    loss: Tensor,  # (N,), written
    g: Tensor,  # (N, K), written
    dhidden: Tensor | None,  # (N, H), written
) -> None:
    vocab = len(head)
    g.zero_()  # first of all the products
    for tokens in products.token_blocks(ids, hidden, vocab):
        weight, biases = head[tokens].float(), None if bias is None else bias[tokens]
        for rows in products.row_blocks(ids, hidden):
            products.add_at(
                g[rows], products.product(hidden[rows], weight, biases), *products.inside(ids[rows], tokens)
            )
    for rows in products.slot_blocks(ids):
        of_rows = None if weights is None else weights[rows]
        loss[rows], g[rows] = raw_slots_loss(g[rows], ids[rows], log_probs[rows], of_rows, vocab, objective)
    if dhidden is None:
        return
    dhidden.zero_()
    for tokens in products.token_blocks(ids, hidden, vocab):
        weight = products.finite(head[tokens], torch.float32)
        for rows in products.row_blocks(ids, hidden):
            dhidden[rows].addmm_(_dense(g[rows], ids[rows], tokens), weight)


@torch.autocast("cpu", enabled=False)
def linear_weight_grad(
    g: Tensor,  # (N, K)
    ids: Tensor,  # (N, K)
    hidden: Tensor,  # (N, H)
    dhead: Tensor | None,  # (V, H), overwritten
    dbias: Tensor | None,  # (V,), overwritten
) -> None:
    vocab = next(len(out) for out in (dhead, dbias) if out is not None)
    for tokens in products.token_blocks(ids, hidden, vocab):
        part_of_head, part_of_bias = (None if out is None else out[tokens] for out in (dhead, dbias))
        of_head, of_bias = (
            products.zeros_for(part_of_head, torch.float32),
            products.zeros_for(part_of_bias, torch.float32),
        )
        for rows in products.row_blocks(ids, hidden):
            dense = _dense(g[rows], ids[rows], tokens)
            if of_head is not None:
                of_head.addmm_(dense.T, products.finite(hidden[rows], torch.float32))
            if of_bias is not None:
                of_bias += dense.sum(0)
        products.store(of_head, part_of_head)
        products.store(of_bias, part_of_bias)


def _dense(
    g: Tensor,  # (n, K)
    ids: Tensor,  # (n, K)
    tokens: slice,
) -> Tensor:  # (n, TOKENS), zeros but for g at the ids inside
    out = g.new_empty(len(g), tokens.stop - tokens.start)
    choose("auto", ids.shape[1], out).scatter(g, ids - tokens.start, g.new_ones(len(g)), out, False)
    return out
