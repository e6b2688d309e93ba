"""A tiny model, a batch for it, and the loss of both in float64."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 96
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.2,
}  # fmt: skip


def tiny(seed: int) -> Any:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))


def rows(*lengths: int, prompt: int = 3, seed: int = 0) -> dict[str, Tensor]:  # (B, T) each
    """Sequences of these lengths; no loss is asked for at the prompt and behind the end."""
    made = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, n in enumerate(lengths):
        ids[i, :n] = torch.randint(3, VOCAB, (n,), generator=made)
        labels[i, prompt:n], mask[i, :n] = ids[i, prompt:n], 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def formula(student: Any, teacher: Any, batch: dict[str, Tensor], k: int) -> Tensor:  # ()
    """The mean over the labels that count, of the models' own logits."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        w, ids = teacher(**inputs).logits[:, :-1].double().topk(k)
    log_p = student(**inputs).logits[:, :-1].double().gather(-1, ids).log_softmax(-1)
    terms = (log_p.exp() * (log_p - w.log_softmax(-1))).sum(-1)
    return terms[batch["labels"][:, 1:] != -100].mean()
