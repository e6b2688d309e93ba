"""What the adapters import of trainers that need GPUs: the names alone, with the shapes that those trainers use."""

import contextlib
import enum
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

PROJECTS = "axolotl", "megatron", "nemo_rl"
ADAPTERS = "axolotl", "megatron", "nemo_rl", "slime"


@contextlib.contextmanager
def standing_in(group: Any = None, context: tuple[int, int] = (0, 1), initialized: bool = True) -> Iterator[None]:
    """Within, the projects can be imported: tensor-parallel ranks `group`, and context-parallel rank and ranks."""
    forget()
    try:
        for name, names in modules(group, context, initialized).items():
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                path = ".".join(parts[:end])
                made = sys.modules.setdefault(path, ModuleType(path))
                made.__path__ = []
                if end > 1:
                    setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], made)
            vars(sys.modules[name]).update(names)
        yield
    finally:
        forget()


def forget() -> None:
    for name in list(sys.modules):
        if name.split(".")[0] in PROJECTS or name in {f"topk_rkl.trainers.{adapter}" for adapter in ADAPTERS}:
            del sys.modules[name]
    trainers = importlib.import_module("topk_rkl.trainers")
    for adapter in ADAPTERS:
        vars(trainers).pop(adapter, None)


def modules(group: Any, context: tuple[int, int], initialized: bool) -> dict[str, dict[str, Any]]:
    def told(value: Any) -> Any:
        assert initialized, "Megatron's groups are not initialized"
        return value

    ranks = {
        "get_tensor_model_parallel_group": lambda: told(group),
        "get_context_parallel_rank": lambda: told(context[0]),
        "get_context_parallel_world_size": lambda: told(context[1]),
        "model_parallel_is_initialized": lambda: initialized,
    }
    return {
        "megatron.core": {},
        "megatron.core.parallel_state": ranks,
        "megatron.core.mpu": ranks,
        "nemo_rl.algorithms.loss.interfaces": {
            "LossType": enum.Enum("LossType", "TOKEN_LEVEL SEQUENCE_LEVEL"),
            "LossInputType": enum.Enum("LossInputType", "LOGIT LOGPROB DISTILLATION"),
        },
        "axolotl.integrations.kd": {"KDPlugin": KDPlugin},
        "axolotl.integrations.kd.trainer": {"AxolotlKDTrainer": AxolotlKDTrainer},
    }


class KDPlugin:
    def get_trainer_cls(self, _: Any) -> type:
        return AxolotlKDTrainer


class AxolotlKDTrainer:
    def __init__(self, model: nn.Module, ranks: int = 1, **args: Any) -> None:
        defaults = {"kd_ce_alpha": 0, "kd_alpha": 1.0, "kd_temperature": 1.0, "kd_beta": None}
        defaults |= {"kd_normalize_topk": True, "average_tokens_across_devices": True}
        self.model, self.args = model, SimpleNamespace(**defaults | args)
        self.accelerator = SimpleNamespace(num_processes=ranks)

    def get_tp_size(self) -> int:
        return 1


class Causal(nn.Module):
    """A causal language model as far as the adapters look at it: its hidden states are those of each token alone."""

    def __init__(self, vocab: int, hidden: int) -> None:
        super().__init__()
        self.body, self.lm_head = nn.Embedding(vocab, hidden), nn.Linear(hidden, vocab, bias=False)
        self.config = SimpleNamespace()
        self.double()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.lm_head(self.body(input_ids).tanh()))


def sample_means(lengths: list[int], masks: list[Tensor]) -> Any:
    """What slime passes for its reduction: the sum of the samples' means."""

    def reduce(x: Tensor) -> Tensor:
        return sum((each * mask).sum() / mask.sum() for each, mask in zip(x.split(lengths), masks, strict=True))

    return reduce


def scored(log_probs: Tensor, k: int) -> dict[str, Any]:  # (T, V)
    """SGLang's answer to a prompt of T tokens: entry i is of token i, and so of the logits at position i - 1."""
    best = log_probs.topk(k)
    entries = [[[value, int(id), None] for value, id in zip(*row)] for row in zip(best.values.tolist(), best.indices)]
    return {"meta_info": {"input_top_logprobs": [None, *entries[:-1]]}}


def double(*shape: int) -> Tensor:
    return 2 * torch.randn(shape, dtype=torch.float64)
