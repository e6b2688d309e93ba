"""Tiny models, a tokenizer and prompts for TRL's trainers, all made here: nothing is fetched."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>")
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCAB = len(SPECIAL) + len(BYTES)
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PROMPTS = ["2 + 2", "a cat", "the sky is", "hello", "yes or", "one", "blue and", "why"]
DIALOGS = [
    [{"role": "user", "content": prompt}, {"role": "assistant", "content": prompt[i % 3 :] * (1 + i % 2)}]
    for i, prompt in enumerate(PROMPTS)
]


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte is a token, as GOLD wants them."""
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate((*SPECIAL, *BYTES))}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left",
        model_max_length=128, additional_special_tokens=list(SPECIAL[3:]),
    )  # fmt: skip
    made.chat_template = TEMPLATE
    return made


def save(folder: Path, seed: int, kind: str = "llama", layers: int = 1, **options: Any) -> str:
    """A random model and the tokenizer. Its logits are spread enough that its divergences are not all but 0."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        kind, vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.3, **options,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def server(teacher: str) -> type:
    """TRL's client of a server with the teacher of that folder, which answers by itself, through TRL's own parser."""
    from trl.generation.vllm_client import VLLMClient

    class Client(VLLMClient):
        def __init__(self, **_: Any) -> None:
            self.model = load(teacher).eval()

        @torch.no_grad()
        def get_sequence_logprobs(
            self, sequences: list[list[int]], prompt_lengths: list[int], top_logprobs: int, temperature: float
        ) -> dict[str, list]:
            answers = []
            for ids, start in zip(sequences, prompt_lengths, strict=True):
                log_probs = (self.model(torch.tensor([ids])).logits[0] / temperature).log_softmax(-1)  # (T, V)
                rows: list[dict | None] = [None]  # nothing predicts the first
                for row, token in zip(log_probs, ids[1:], strict=False):
                    best = {int(i): rank + 1 for rank, i in enumerate(row.topk(top_logprobs).indices)}
                    best.setdefault(token, int((row > row[token]).sum()) + 1)  # the actual one always comes
                    rows.append({str(i): {"logprob": float(row[i]), "rank": rank} for i, rank in best.items()})
                answers.append(self._format_sequence_logprobs({"prompt_logprobs": rows}, ids, start, top_logprobs))
            return {key: [answer[key] for answer in answers] for key in answers[0]}

    return Client
