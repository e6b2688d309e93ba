"""R small transformers in one, as in `stacked`: run r of R has its own weights and its own random numbers."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, gelu, layer_norm, scaled_dot_product_attention

from examples.paper.stacked import Linear, normal
from topk_rkl.recipe.rollout import sample_top_p


class Shape(NamedTuple):
    vocab: int
    length: int  # of prompt and response
    width: int
    layers: int
    heads: int = 4


class Layer(nn.Module):
    """Attention, then a multilayer perceptron."""

    def __init__(self, shape: Shape, sources: Sequence[torch.Generator]) -> None:
        super().__init__()
        width, self.heads, small = shape.width, shape.heads, shape.layers**-0.5
        self.into, self.out = Linear(width, 3 * width, sources), Linear(width, width, sources, small)
        self.up, self.down = Linear(width, 4 * width, sources), Linear(4 * width, width, sources, small)

    def forward(
        self,
        x: Tensor,  # (R, B, T, D)
        past: list[Tensor],  # keys and values (R * B, heads, time, D / heads), or nothing; those of x are added
    ) -> Tensor:  # (R, B, T, D)
        q, k, v = self.into(normed(x)).flatten(0, 1).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if past:
            k, v = (torch.cat(both, 2) for both in zip(past, (k, v)))  # (R * B, heads, time, D / heads)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=not past)  # a later call has one query, which sees all
        past[:] = k, v
        x = x + self.out(mixed.transpose(1, 2).flatten(2).view_as(x))
        return x + self.down(gelu(self.up(normed(x)), approximate="tanh"))


class Transformer(nn.Module):
    def __init__(self, shape: Shape, sources: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.shape = shape
        self.tokens = nn.Parameter(normal((shape.vocab, shape.width), sources))  # (R, V, D)
        self.places = nn.Parameter(normal((shape.length, shape.width), sources))  # (R, length, D)
        self.layers = nn.ModuleList(Layer(shape, sources) for _ in range(shape.layers))
        self.head = Linear(shape.width, shape.vocab, sources)

    def forward(
        self,
        ids: Tensor,  # (R, B, T)
        past: list[list[Tensor]] | None = None,  # of each layer; the ids follow what it has seen
    ) -> Tensor:  # (R, B, T, V)
        past = [[] for _ in self.layers] if past is None else past
        seen = past[0][0].shape[2] if past[0] else 0
        rows = self.shape.vocab * torch.arange(len(ids)).view(-1, 1, 1)  # where a run's tokens begin
        x = embedding(ids + rows, self.tokens.flatten(0, 1))  # (R, B, T, D)
        x = x + self.places[:, None, seen : seen + ids.shape[2]]
        for layer, own in zip(self.layers, past):
            x = layer(x, own)
        return self.head(normed(x))


def normed(
    x: Tensor,  # (..., D)
) -> Tensor:  # (..., D)
    return layer_norm(x, x.shape[-1:])


@torch.no_grad()
def respond(
    model: Transformer,
    prompts: Tensor,  # (R, B, P)
    length: int,
    ends: Sequence[int],
    pad: int,
    top_p: float,
    sources: Sequence[torch.Generator],
) -> Tensor:  # (R, B, length), padded after one of `ends`
    past: list[list[Tensor]] = [[] for _ in model.layers]
    ids, going, response, last = prompts, torch.ones(prompts.shape[:2], dtype=torch.bool), [], torch.tensor(ends)
    for _ in range(length):
        logits = model(ids, past)[:, :, -1]  # (R, B, V)
        drawn = [sample_top_p(run, top_p, generator=source) for run, source in zip(logits, sources)]
        response.append(torch.stack(drawn).masked_fill(~going, pad))  # (R, B)
        going, ids = going & ~torch.isin(response[-1], last), response[-1].unsqueeze(-1)
    return torch.stack(response, -1)


def response_logits(
    model: Transformer,
    prompts: Tensor,  # (R, B, P)
    responses: Tensor,  # (R, B, T)
) -> Tensor:  # (R, B, T, V)
    """Position t is what the model says of token t of the response."""
    logits = model(torch.cat([prompts, responses[..., :-1]], -1))  # (R, B, P + T - 1, V)
    return logits[:, :, prompts.shape[-1] - 1 :].contiguous()  # else losses in plain PyTorch take each (r, b) alone
