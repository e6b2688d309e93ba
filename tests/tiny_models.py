"""Tiny causal models of six families, with random weights, and batches for them.

`formula` is the loss and its gradient by plain PyTorch in float64, from the logits of whole models.
"""

import os
import random
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

V, K = 96, 8
SIZES = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 0.5},
    "gemma3_text": {"head_dim": 8},
}


def tiny(family: str = "llama", seed: int = 0, layers: int = 1, **options: Any) -> PreTrainedModel:
    """A model in float32 on the CPU; logits spread as those of a trained one do, so that losses are not all alike."""
    torch.manual_seed(seed)
    given = {**SIZES, **FAMILIES[family], "num_hidden_layers": layers, "initializer_range": 0.2, **options}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **given))


def rows(count: int = 8, seed: int = 0) -> list[dict[str, list[int]]]:
    """Sequences of 6 to 14 tokens, whose prompt of 0 to 3 tokens has no labels."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        ids, prompt = [draw.randint(3, V - 1) for _ in range(draw.randint(6, 14))], draw.randint(0, 3)
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


def collate(batch: list[dict[str, list[Any]]]) -> dict[str, Tensor]:
    """Padded on the right, with columns such as `teacher_ids` (T, K) too."""
    length, padding = max(len(row["input_ids"]) for row in batch), {"labels": -100, "teacher_ids": -1}
    given = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in batch]

    def padded(name: str, values: list[Any]) -> Tensor:
        x = torch.as_tensor(values)
        return torch.cat([x, x.new_full((length - len(x), *x.shape[1:]), padding.get(name, 0))])

    return {name: torch.stack([padded(name, row[name]) for row in given]) for name in given[0]}


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def formula(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: dict[str, Tensor],
    k: int = K,
    temperature: float = 1.0,
    factors: Tensor | None = None,  # (B, T), of the labels
    autocast: torch.dtype | None = None,
) -> tuple[float, dict[str, Tensor]]:
    """The mean over the labels, and the gradients of the student's parameters."""
    inputs, labels = inputs_of(batch), batch["labels"][:, 1:]
    with torch.no_grad():
        w = teacher(**inputs).logits[:, :-1].double() / temperature
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        z = student(**inputs).logits[:, :-1].double() / temperature
    best, ids = w.topk(k)
    log_p, log_q = z.gather(-1, ids).log_softmax(-1), best.log_softmax(-1)
    per_token = (log_p.exp() * (log_p - log_q)).sum(-1) * (labels != -100)
    if factors is not None:
        per_token = per_token * factors[:, 1:]
    loss = per_token.sum() / (labels != -100).sum()
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return loss.item(), dict(zip(parameters, gradients))


def distance(found: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Of two gradients, relative to the latter."""
    assert found.keys() == want.keys()
    ours, theirs = (torch.cat([x[name].double().flatten() for name in want]) for x in (found, want))
    return float((ours - theirs).norm() / theirs.norm())
