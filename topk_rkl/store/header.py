"""The header: what a set holds, and of which teacher, tokenizer and data. Its manifest and each shard have it."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch

from topk_rkl import checks

LogProbsDtype = Literal["float16", "bfloat16", "float32"]
LARGEST_VOCAB = torch.iinfo(torch.int32).max


@dataclass(frozen=True)
class Header:
    """What holds of every row of a set.

    Args:
        k: slots per position.
        vocab_size: V of the teacher's logits; ids of tokens are below it.
        teacher: a name of the teacher, for people.
        tokenizer: what `tokenizer_hash` gives of the tokenizer that made the tokens.
        source: a name of the data; a writer that goes on with other data is refused by it.
        temperature: that the teacher's logits were divided by.
        normalized: whether log-probs are true ones, as `Support.normalized` says; else they are logits.
        log_probs_dtype: that they are stored in. The loss changes less with "float16" than with "bfloat16".

    Raises:
        TypeError, ValueError: a field is not as above.
    """

    k: int
    vocab_size: int
    teacher: str
    tokenizer: str
    source: str
    temperature: float = 1.0
    normalized: bool = True
    log_probs_dtype: LogProbsDtype = "float16"

    def __post_init__(self) -> None:
        vocab_size = checks.require_integer("vocab_size", self.vocab_size)
        if not 1 <= vocab_size <= LARGEST_VOCAB:
            raise ValueError(f"vocab_size is {vocab_size}; it must be from 1 to {LARGEST_VOCAB}")
        k = checks.require_integer("k", self.k)
        if not 1 <= k <= vocab_size:
            raise ValueError(f"k is {k}; it must be from 1 to vocab_size = {vocab_size}")
        for name in ("teacher", "tokenizer", "source"):
            _require_text(name, getattr(self, name))
        checks.require_temperature(self.temperature)
        checks.require_flag("normalized", self.normalized)
        checks.require_one_of("log_probs_dtype", self.log_probs_dtype, get_args(LogProbsDtype))
        for name, value in (("k", k), ("vocab_size", vocab_size), ("temperature", float(self.temperature))):
            object.__setattr__(self, name, value)

    @property
    def dtype(self) -> torch.dtype:
        """That of the stored log-probs."""
        dtype: torch.dtype = getattr(torch, self.log_probs_dtype)
        return dtype

    def as_dict(self) -> dict[str, Any]:
        """What stands in the manifest."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Header":
        """The Header that `as_dict` gave."""
        names = {field.name for field in fields(Header)}
        if values.keys() != names:
            raise ValueError(f"the header has {', '.join(values)}; it must have {', '.join(sorted(names))}")
        return Header(**values)


def require_same_header(where: str, found: Header, want: Header) -> None:
    """Refuses another header by its first field that differs."""
    for name, value in found.as_dict().items():
        other = getattr(want, name)
        if value != other:
            raise ValueError(
                f"{where} has {name} = {value!r}, and the header given says {other!r}; give the header of the set, or "
                "another folder"
            )


def require_header(header: object) -> None:
    if not isinstance(header, Header):
        raise TypeError(f"header is {checks.kind_of(header)}; it must be a topk_rkl.store.Header")


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of the vocabulary, the merges and the special tokens: tokenizers of one hash give ids the same meaning.

    Args:
        tokenizer: of transformers, or what has its `get_vocab()` and `special_tokens_map`. Merges are those of its
            `backend_tokenizer`, where it has one.

    Returns:
        64 hexadecimal digits.

    Raises:
        TypeError: tokenizer lacks one of these.
    """
    if not callable(getattr(tokenizer, "get_vocab", None)) or not hasattr(tokenizer, "special_tokens_map"):
        raise TypeError(
            f"tokenizer is {checks.kind_of(tokenizer)}; it must have get_vocab() and special_tokens_map, as those of "
            "transformers do"
        )
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    said = json.dumps([tokenizer.get_vocab(), _merges(tokenizer), special], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def _merges(tokenizer: Any) -> list[str]:
    """One text per merge: tokenizers before 0.20 write pairs as a text, later ones as a list."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return []
    merges = json.loads(backend.to_str())["model"].get("merges") or []
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def _require_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} is {checks.seen(value)}; it must be a str")
    if not value:
        raise ValueError(f"{name} is empty; it must be a str that names it")
