"""A tiny teacher with a tokenizer, saved as transformers saves them, and texts for it."""

from pathlib import Path

from tests.tiny_models import tiny  # isort: skip  it keeps transformers offline

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

V = 320
TEXTS = [
    f"{a} {b} {c}."
    for a in ("The sea", "A bee", "My tea")
    for b in ("is", "was never")
    for c in ("cold", "as green as a leaf in the early summer")
]
MARKED = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %};{% endfor %}"
)


def tokenizer(chat_template: str | None = None, special: str = "</s>") -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the texts."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names, alphabet = ["<pad>", "<s>", special], pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=V, special_tokens=names, initial_alphabet=alphabet))
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token=special)
    made.chat_template = chat_template
    return made


def save(folder: Path, family: str = "llama", chat_template: str | None = None) -> str:
    tiny(family, vocab_size=V, layers=2).save_pretrained(folder)
    tokenizer(chat_template).save_pretrained(folder)
    return str(folder)
