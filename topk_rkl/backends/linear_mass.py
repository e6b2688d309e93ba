"""The loss from hidden states where every logit counts, in plain PyTorch on any device.

A block of positions is multiplied with a block of the vocabulary at a time, forwards and again backwards, in float32,
or float64 for float64: nothing of size N V exists.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from topk_rkl.backends.reference import live_slots, mass_slots_loss, result_dtype, times
from topk_rkl.divergence import Code, Terms, capped

ROWS, TOKENS = 512, 4096  # of a block: 8 MiB


def linear_mass_loss(
    hidden: Tensor,  # (N, H)
    head: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (N, K), none twice in a row
    values: Tensor,  # (N, K)
    tail: Tensor,  # (N,) the teacher's `rest`
    weights: Tensor | None,  # (N,)
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    divergence: Code | Terms,
    mass: str,
) -> tuple[Tensor, Tensor, Tensor]:  # (N,), (N, K), (N, 2) float64
    """reference.mass_loss of the logits that the head would make of the hidden states; g is with respect to those."""
    (n, k), vocab, dtype = ids.shape, len(head), result_dtype(hidden)
    live = live_slots(ids, values, vocab)
    named = torch.where(live, ids, -1).long()
    z = hidden.new_zeros((n, k), dtype=dtype)
    peak = hidden.new_full((n,), -torch.inf, dtype=torch.float64)
    total = torch.zeros_like(peak)
    for rows, tokens in _blocks(n, vocab):
        logits, _ = _logits(hidden[rows], head, bias, tokens, logit_scale, softcap)
        inside, place = _inside(named[rows], tokens)
        z[rows] += torch.where(inside, logits.gather(1, torch.where(inside, place, 0)), 0)
        logits = _put(logits, inside, place, torch.full_like(z[rows], -torch.inf))
        higher = torch.maximum(peak[rows], logits.amax(1).double())
        base = torch.where(higher == -torch.inf, 0, higher)
        added = ((logits - base[:, None].to(dtype)) / temperature).exp_().sum(1, dtype=torch.float64)
        total[rows] = total[rows] * ((peak[rows] - base) / temperature).exp() + added
        peak[rows] = higher
    peak = torch.where(peak == -torch.inf, 0, peak)
    loss, g, factor = mass_slots_loss(z, values, live, peak, total, tail, weights, temperature, divergence, mass)
    return loss.to(dtype), g.to(dtype), torch.stack((peak, factor), 1)


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
    n, vocab, dtype = len(hidden), len(head), result_dtype(hidden)
    g = times(g, grad_output.to(dtype))
    peak, factor = others.unbind(1)
    factor = times(factor[:, None], grad_output).to(dtype)
    sums = [None if out is None else torch.zeros_like(out, dtype=dtype) for out in (dhidden, dhead, dbias)]
    of_hidden, of_head, of_bias = sums
    for rows, tokens in _blocks(n, vocab):
        logits, slope = _logits(hidden[rows], head, bias, tokens, logit_scale, softcap)
        dz = ((logits - peak[rows, None].to(dtype)) / temperature).exp_() * factor[rows]
        dz = torch.where(factor[rows] == 0, 0, dz)
        inside, place = _inside(ids[rows].long(), tokens)
        dz = _put(dz, inside, place, g[rows])
        dz = torch.where(dz == 0, 0, dz * slope)
        with torch.autocast(hidden.device.type, enabled=False):
            if of_hidden is not None:
                of_hidden[rows] += dz @ _finite(head[tokens], dtype)
            if of_head is not None:
                of_head[tokens] += dz.T @ _finite(hidden[rows], dtype)
        if of_bias is not None:
            of_bias[tokens] += dz.sum(0)
    for out, total in zip((dhidden, dhead, dbias), sums, strict=True):
        if out is not None and total is not None:
            out.copy_(total)


def _blocks(n: int, vocab: int) -> Iterator[tuple[slice, slice]]:
    for first in range(0, vocab, TOKENS):
        for row in range(0, n, ROWS):
            yield slice(row, row + ROWS), slice(first, min(first + TOKENS, vocab))


def all_logits(
    hidden: Tensor,  # (n, H)
    head: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    logit_scale: float,
    softcap: float | None,
) -> Tensor:  # (n, V) float32, or float64 for float64
    """Of so few positions that they may all exist."""
    blocks = (slice(first, first + TOKENS) for first in range(0, len(head), TOKENS))
    return torch.cat([_logits(hidden, head, bias, tokens, logit_scale, softcap)[0] for tokens in blocks], 1)


def _logits(
    hidden: Tensor,  # (n, H)
    head: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    tokens: slice,
    logit_scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:  # (n, TOKENS), (n, TOKENS)
    """The logits and their derivative with respect to the product."""
    dtype = result_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):  # a trainer's would take the products in 16 bits
        raw = hidden.to(dtype) @ head[tokens].to(dtype).T
    return capped(raw if bias is None else raw + bias[tokens].to(dtype), logit_scale, softcap)


def _inside(
    ids: Tensor,  # (n, K)
    tokens: slice,
) -> tuple[Tensor, Tensor]:  # (n, K) bool, (n, K) the column in the block
    return (ids >= tokens.start) & (ids < tokens.stop), ids - tokens.start


def _put(
    block: Tensor,  # (n, TOKENS)
    inside: Tensor,  # (n, K) bool
    place: Tensor,  # (n, K)
    value: Tensor,  # (n, K)
) -> Tensor:  # (n, TOKENS)
    """The block with the values of the slots inside it; the others go to a column that is cut off again."""
    width = block.shape[1]
    wider = torch.cat((block, block.new_zeros(len(block), 1)), 1)
    return wider.scatter_(1, torch.where(inside, place, width), value)[:, :width]


def _finite(
    x: Tensor,  # (n, H)
    dtype: torch.dtype,
) -> Tensor:  # (n, H)
    """0 for what is not finite, since 0 times that is NaN; a position that reads it is NaN in its own right."""
    return x.to(dtype).nan_to_num(0, 0, 0)
