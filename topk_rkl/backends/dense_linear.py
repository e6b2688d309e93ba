"""The functions of the sparse head by dense products, for a K so large that gathering K rows of the head costs more."""

import torch
from torch import Tensor

from topk_rkl.backends import choose
from topk_rkl.backends.products import (
    add_at,
    finite,
    inside,
    product,
    row_blocks,
    slot_blocks,
    store,
    token_blocks,
    zeros_for,
)
from topk_rkl.backends.reference import raw_slots_loss
from topk_rkl.divergence import REVERSE_KL, Code


@torch.autocast("cpu", enabled=False)  # a trainer's would take the products in 16 bits
def linear_loss(
    hidden: Tensor,  # (N, H)
    head: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (N, K)
    values: Tensor,  # (N, K)
    weights: Tensor | None,  # (N,)
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    want_dhidden: bool,
    divergence: Code = REVERSE_KL,
) -> tuple[Tensor, Tensor, Tensor]:  # (N,), (N, K), (N, H) or (0, H), all float32
    (n, k), (vocab, width) = ids.shape, head.shape
    loss = hidden.new_empty(n, dtype=torch.float32)
    g = hidden.new_zeros((n, k), dtype=torch.float32)  # first of all the products
    for tokens in token_blocks(ids, hidden, vocab):
        weight, biases = head[tokens].float(), None if bias is None else bias[tokens]
        for rows in row_blocks(ids, hidden):
            add_at(g[rows], product(hidden[rows], weight, biases), *inside(ids[rows], tokens))
    for rows in slot_blocks(ids):
        of_rows = None if weights is None else weights[rows]
        loss[rows], g[rows] = raw_slots_loss(
            g[rows], ids[rows], values[rows], of_rows, vocab, temperature, logit_scale, softcap, divergence
        )
    dhidden = hidden.new_zeros((n if want_dhidden else 0, width), dtype=torch.float32)
    for tokens in token_blocks(ids, hidden, vocab) if want_dhidden else ():
        weight = finite(head[tokens], torch.float32)
        for rows in row_blocks(ids, hidden):
            dhidden[rows].addmm_(_spread(g[rows], ids[rows], tokens), weight)
    return loss, g, dhidden


@torch.autocast("cpu", enabled=False)
def linear_weight_grad(
    g: Tensor,  # (N, K)
    ids: Tensor,  # (N, K)
    hidden: Tensor,  # (N, H)
    dhead: Tensor | None,  # (V, H), overwritten
    dbias: Tensor | None,  # (V,), overwritten
) -> None:
    vocab = next(len(out) for out in (dhead, dbias) if out is not None)
    for tokens in token_blocks(ids, hidden, vocab):
        part_of_head, part_of_bias = (None if out is None else out[tokens] for out in (dhead, dbias))
        of_head, of_bias = zeros_for(part_of_head, torch.float32), zeros_for(part_of_bias, torch.float32)
        for rows in row_blocks(ids, hidden):
            dense = _spread(g[rows], ids[rows], tokens)
            if of_head is not None:
                of_head.addmm_(dense.T, finite(hidden[rows], torch.float32))
            if of_bias is not None:
                of_bias += dense.sum(0)
        store(of_head, part_of_head)
        store(of_bias, part_of_bias)


def _spread(
    g: Tensor,  # (n, K)
    ids: Tensor,  # (n, K)
    tokens: slice,
) -> Tensor:  # (n, TOKENS), zeros but for g at the ids inside
    out = g.new_empty(len(g), tokens.stop - tokens.start)
    choose("auto", ids.shape[1], out).scatter(g, ids - tokens.start, g.new_ones(len(g)), out, False)
    return out
