"""The loss from hidden states where every logit counts: a block of them at a time, forwards and again backwards."""

import torch
from torch import Tensor

from topk_rkl.backends import products
from topk_rkl.backends.reference import as_logit, mass_slots_loss
from topk_rkl.divergence import capped
from topk_rkl.objective import Objective
from topk_rkl.rows import live_slots, result_dtype, times


def linear_mass_loss(
    hidden: Tensor,  # (N, H)
    head: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (N, K), none twice in a row
    log_probs: Tensor,  # (N, K)
    tail: Tensor,  # (N,) the teacher's `tail_logit`
    weights: Tensor | None,  # (N,)
    objective: Objective,
    loss: Tensor,  # (N,), written
    g: Tensor,  # (N, K), written
    outside: Tensor,  # (N, 2) float64, written
) -> None:
    """reference.mass_loss of the logits that the head would make of the hidden states; g is with respect to those."""
    vocab = len(head)
    g.zero_()  # first of all the logits
    named = torch.where(live_slots(ids, log_probs, vocab), ids, -1)
    peak, total = _outside(hidden, head, bias, named, objective, g)
    for rows in products.slot_blocks(ids):
        live = live_slots(ids[rows], log_probs[rows], vocab)
        of_rows = None if weights is None else weights[rows]
        loss[rows], g[rows], outside[rows, 1] = mass_slots_loss(
            g[rows], log_probs[rows], live, peak[rows], total[rows], tail[rows], of_rows, objective
        )
    outside[:, 0] = peak


def linear_tail_logit(
    hidden: Tensor,  # (N, H)
    head: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (N, K)
    objective: Objective,
    out: Tensor,  # (N,) float64, written
) -> None:
    """reference.tail_logit of the logits that the head would make of the hidden states."""
    out.copy_(as_logit(*_outside(hidden, head, bias, ids, objective), objective.temperature))


def _outside(
    hidden: Tensor,  # (N, H)
    head: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (N, K)
    objective: Objective,
    logits_at: Tensor | None = None,  # (N, K), to which those at ids are added
) -> tuple[Tensor, Tensor]:  # (N,), (N,) float64
    """Of the tokens that no id names: the largest logit, or 0 for -inf, and the sum of exp((logit - it) / T)."""
    dtype, temperature = result_dtype(hidden), objective.temperature
    peak = hidden.new_full((len(ids),), -torch.inf, dtype=torch.float64)
    total = torch.zeros_like(peak)
    for tokens in products.token_blocks(ids, hidden, len(head)):
        weight, biases = head[tokens].to(dtype), None if bias is None else bias[tokens]
        for rows in products.row_blocks(ids, hidden):
            logits, _ = capped(products.product(hidden[rows], weight, biases), objective.logit_scale, objective.softcap)
            within, place = products.inside(ids[rows], tokens)
            if logits_at is not None:
                products.add_at(logits_at[rows], logits, within, place)
            logits = _put(logits, within, place, -torch.inf)
            higher = torch.maximum(peak[rows], logits.amax(1).double())
            base = torch.where(higher == -torch.inf, 0, higher)
            added = logits.sub_(base[:, None].to(dtype)).div_(temperature).exp_().sum(1, dtype=torch.float64)
            total[rows] = total[rows] * ((peak[rows] - base) / temperature).exp() + added
            peak[rows] = higher
    return torch.where(peak == -torch.inf, 0, peak), total


def linear_mass_grad(
    g: Tensor,  # (N, K)
    ids: Tensor,  # (N, K)
    outside: Tensor,  # (N, 2)
    grad_output: Tensor,  # (N,)
    hidden: Tensor,  # (N, H)
    head: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    dhidden: Tensor | None,  # (N, H), overwritten
    dhead: Tensor | None,  # (V, H), overwritten
    dbias: Tensor | None,  # (V,), overwritten
    objective: Objective,
) -> None:
    vocab, dtype = len(head), result_dtype(hidden)
    scale = grad_output.to(dtype)
    peak, factor = outside.unbind(1)
    factor = times(factor[:, None], grad_output).to(dtype)
    of_hidden = products.zeros_for(dhidden, dtype)
    for tokens in products.token_blocks(ids, hidden, vocab):
        part_of_head, part_of_bias = (None if out is None else out[tokens] for out in (dhead, dbias))
        of_head, of_bias = products.zeros_for(part_of_head, dtype), products.zeros_for(part_of_bias, dtype)
        weight, biases = head[tokens].to(dtype), None if bias is None else bias[tokens]
        clean = products.finite(weight, dtype)
        for rows in products.row_blocks(ids, hidden):
            logits, slope = capped(
                products.product(hidden[rows], weight, biases), objective.logit_scale, objective.softcap
            )
            dz = logits.sub_(peak[rows, None].to(dtype)).div_(objective.temperature).exp_().mul_(factor[rows])
            dz.masked_fill_(factor[rows] == 0, 0)
            dz = _put(dz, *products.inside(ids[rows], tokens), times(g[rows], scale[rows]))
            dz = torch.where(dz == 0, 0, dz * slope)
            with torch.autocast(hidden.device.type, enabled=False):
                if of_hidden is not None:
                    of_hidden[rows].addmm_(dz, clean)
                if of_head is not None:
                    of_head.addmm_(dz.T, products.finite(hidden[rows], dtype))
            if of_bias is not None:
                of_bias += dz.sum(0)
        products.store(of_head, part_of_head)
        products.store(of_bias, part_of_bias)
    products.store(of_hidden, dhidden)


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
