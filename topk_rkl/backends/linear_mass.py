"""The loss from hidden states where every logit counts: a block of them at a time, forwards and again backwards."""

import torch
from torch import Tensor

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
from topk_rkl.backends.reference import live_slots, mass_slots_loss, result_dtype, times
from topk_rkl.divergence import Code, Terms, capped


def linear_mass_loss(
    hidden: Tensor,  # (N, H)
    head: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (N, K), none twice in a row
    values: Tensor,  # (N, K)
    tail: Tensor,  # (N,) the teacher's `tail_logit`
    weights: Tensor | None,  # (N,)
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    divergence: Code | Terms,
    mass: str,
) -> tuple[Tensor, Tensor, Tensor]:  # (N,), (N, K), (N, 2) float64
    """reference.mass_loss of the logits that the head would make of the hidden states; g is with respect to those."""
    (n, k), vocab, dtype = ids.shape, len(head), result_dtype(hidden)
    loss = hidden.new_empty(n, dtype=dtype)
    g = hidden.new_zeros((n, k), dtype=dtype)  # first of all the logits
    peak = hidden.new_full((n,), -torch.inf, dtype=torch.float64)
    total, factor = torch.zeros_like(peak), torch.empty_like(peak)
    for tokens in token_blocks(ids, hidden, vocab):
        weight, biases = head[tokens].to(dtype), None if bias is None else bias[tokens]
        for rows in row_blocks(ids, hidden):
            logits, _ = capped(product(hidden[rows], weight, biases), logit_scale, softcap)
            within, place = inside(ids[rows], tokens)
            within &= live_slots(ids[rows], values[rows], vocab)
            add_at(g[rows], logits, within, place)
            logits = _put(logits, within, place, -torch.inf)
            higher = torch.maximum(peak[rows], logits.amax(1).double())
            base = torch.where(higher == -torch.inf, 0, higher)
            added = logits.sub_(base[:, None].to(dtype)).div_(temperature).exp_().sum(1, dtype=torch.float64)
            total[rows] = total[rows] * ((peak[rows] - base) / temperature).exp() + added
            peak[rows] = higher
    peak = torch.where(peak == -torch.inf, 0, peak)
    for rows in slot_blocks(ids):
        live = live_slots(ids[rows], values[rows], vocab)
        of_rows = None if weights is None else weights[rows]
        loss[rows], g[rows], factor[rows] = mass_slots_loss(
            g[rows], values[rows], live, peak[rows], total[rows], tail[rows], of_rows, temperature, divergence, mass
        )
    return loss, g, torch.stack((peak, factor), 1)


def linear_mass_grad(
    g: Tensor,  # (N, K)
    ids: Tensor,  # (N, K)
    others: Tensor,  # (N, 2)
    grad_output: Tensor,  # (N,)
    hidden: Tensor,  # (N, H)
    head: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    dhidden: Tensor | None,  # (N, H), overwritten
    dhead: Tensor | None,  # (V, H), overwritten
    dbias: Tensor | None,  # (V,), overwritten
) -> None:
    vocab, dtype = len(head), result_dtype(hidden)
    scale = grad_output.to(dtype)
    peak, factor = others.unbind(1)
    factor = times(factor[:, None], grad_output).to(dtype)
    of_hidden = zeros_for(dhidden, dtype)
    for tokens in token_blocks(ids, hidden, vocab):
        part_of_head, part_of_bias = (None if out is None else out[tokens] for out in (dhead, dbias))
        of_head, of_bias = zeros_for(part_of_head, dtype), zeros_for(part_of_bias, dtype)
        weight, biases = head[tokens].to(dtype), None if bias is None else bias[tokens]
        clean = finite(weight, dtype)
        for rows in row_blocks(ids, hidden):
            logits, slope = capped(product(hidden[rows], weight, biases), logit_scale, softcap)
            dz = logits.sub_(peak[rows, None].to(dtype)).div_(temperature).exp_().mul_(factor[rows])
            dz.masked_fill_(factor[rows] == 0, 0)
            dz = _put(dz, *inside(ids[rows], tokens), times(g[rows], scale[rows]))
            dz = torch.where(dz == 0, 0, dz * slope)
            with torch.autocast(hidden.device.type, enabled=False):
                if of_hidden is not None:
                    of_hidden[rows].addmm_(dz, clean)
                if of_head is not None:
                    of_head.addmm_(dz.T, finite(hidden[rows], dtype))
            if of_bias is not None:
                of_bias += dz.sum(0)
        store(of_head, part_of_head)
        store(of_bias, part_of_bias)
    store(of_hidden, dhidden)


def _put(
    block: Tensor,  # (n, TOKENS)
    within: Tensor,  # (n, K) bool
    place: Tensor,  # (n, K)
    value: Tensor | float,  # (n, K)
) -> Tensor:  # (n, TOKENS)
    """The block with the values of the slots inside it; the others go to a column that is cut off again."""
    width = block.shape[1]
    wider = torch.cat((block, block.new_zeros(len(block), 1)), 1)
    return wider.scatter_(1, torch.where(within, place, width), value)[:, :width]
