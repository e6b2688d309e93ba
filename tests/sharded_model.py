"""A tiny transformer, and an adapter on its head: for the tests of sharded training."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

VOCAB, WIDTH, LENGTH = 67, 32, 6


class Tiny(nn.Module):
    """Gives hidden states, or what its head makes of them."""

    def __init__(self, seed: int = 0, tied: bool = False, bias: bool = False, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=bias)
        if tied:
            self.head.weight = self.embed.weight

    def forward(
        self,
        tokens: Tensor,  # (B, T)
        through_head: bool = False,
    ) -> Tensor:  # (B, T, H), or (B, T, V)
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return 2 * self.head(x) if through_head else x  # as a model that scales its logits


class LoRA(nn.Module):
    """A linear layer with an adapter, of the structure that peft gives one."""

    def __init__(self, base: nn.Linear, rank: int = 3, scaling: float = 2.0) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        self.scaling = {"default": scaling}

    def forward(
        self,
        x: Tensor,  # (..., H)
    ) -> Tensor:  # (..., V)
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x)) * self.scaling["default"]

    def merged(self, everywhere: Callable[[Any], Any] = lambda x: x) -> Any:  # (V, H)
        a, b = everywhere(self.lora_A["default"].weight), self.lora_B["default"].weight
        return self.base_layer.weight + (b @ a) * self.scaling["default"]


def mesh_of(group: Any) -> DeviceMesh:
    return DeviceMesh.from_group(group, "cpu")


def square() -> DeviceMesh:
    return DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("dp", "tp"))


def whole(x: Any) -> Any:
    return x.full_tensor() if isinstance(x, DTensor) else x


def assert_close(a: Tensor, b: Tensor, by: float = 2e-6) -> None:
    torch.testing.assert_close(a, b, rtol=by, atol=by)
