"""The functions of the sparse head by dense products, for a K so large that gathering K rows of the head costs more.

A block of positions is multiplied with a block of the vocabulary at a time, in float32: nothing of size N V exists.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from topk_rkl.backends import choose
from topk_rkl.backends.reference import raw_slots_loss
from topk_rkl.divergence import REVERSE_KL, Code

ROWS, TOKENS = 512, 4096  # of a block: 8 MiB


@torch.autocast("cpu", enabled=False)  # a trainer's would take the products in 16 bits
def sparse_head(
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
    raw = hidden.new_zeros((n, k), dtype=torch.float32)
    for rows, tokens, place, inside in _blocks(ids, vocab):
        product = hidden[rows].float() @ head[tokens].float().T  # (ROWS, TOKENS)
        if bias is not None:
            product += bias[tokens]
        raw[rows] += torch.where(inside, product.gather(1, place), 0)
    double = raw_slots_loss(raw, ids, values, weights, vocab, temperature, logit_scale, softcap, divergence)
    loss, g = (x.float() for x in double)
    dhidden = hidden.new_zeros((n if want_dhidden else 0, width), dtype=torch.float32)
    if want_dhidden:
        for rows, tokens, _, _ in _blocks(ids, vocab):
            dhidden[rows] += _spread(g[rows], ids[rows], tokens) @ _finite(head[tokens])
    return loss, g, dhidden


@torch.autocast("cpu", enabled=False)
def sparse_head_weight_grad(
    g: Tensor,  # (N, K)
    ids: Tensor,  # (N, K)
    hidden: Tensor,  # (N, H)
    dhead: Tensor | None,  # (V, H), overwritten
    dbias: Tensor | None,  # (V,), overwritten
) -> None:
    vocab = next(len(out) for out in (dhead, dbias) if out is not None)
    for tokens in _parts(vocab, TOKENS):
        of_head = hidden.new_zeros((tokens.stop - tokens.start, hidden.shape[1]), dtype=torch.float32)
        of_bias = hidden.new_zeros(tokens.stop - tokens.start, dtype=torch.float32)
        for rows in _parts(len(g), ROWS):
            dense = _spread(g[rows], ids[rows], tokens)
            of_bias += dense.sum(0)
            if dhead is not None:
                of_head.addmm_(dense.T, _finite(hidden[rows]))
        if dhead is not None:
            dhead[tokens] = of_head.to(dhead.dtype)
        if dbias is not None:
            dbias[tokens] = of_bias.to(dbias.dtype)


def _parts(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _blocks(
    ids: Tensor,  # (N, K)
    vocab: int,
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:  # rows, tokens, and of each slot: its column, if it is inside
    for rows in _parts(len(ids), ROWS):
        for tokens in _parts(vocab, TOKENS):
            place = ids[rows].long() - tokens.start
            inside = (place >= 0) & (place < tokens.stop - tokens.start)
            yield rows, tokens, torch.where(inside, place, 0), inside


def _finite(
    x: Tensor,  # (n, H)
) -> Tensor:  # (n, H) float32
    """0 for what is not finite, since 0 times that is NaN; slots that name it have a g of NaN, or of 0, anyway."""
    return x.float().nan_to_num(0, 0, 0)


def _spread(
    g: Tensor,  # (n, K)
    ids: Tensor,  # (n, K)
    tokens: slice,
) -> Tensor:  # (n, TOKENS), zeros but for g at the ids inside
    out = g.new_empty(len(g), tokens.stop - tokens.start)
    choose("auto", ids.shape[1], out).scatter(g, ids - tokens.start, g.new_ones(len(g)), out, False)
    return out
