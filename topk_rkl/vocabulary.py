"""The tokens of a tokenizer, by what they spell: "Ġthe" of a GPT-2 and "▁the" of a Llama are both " the"."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from topk_rkl import checks

Spelling = Literal["byte-level", "sentencepiece", "plain"]
ROLES = ("bos", "eos", "unk", "pad")
MARKER = re.compile(r"<\S+>|\[\S+\]")  # "<think>", which a tokenizer may have added without calling it special
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[int, int]:
    """The byte of each character in which GPT-2 writes bytes: printable ones are themselves, the others follow 255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)) - set(printable))
    return dict(zip(printable, printable)) | {256 + i: byte for i, byte in enumerate(others)}


BYTES = _byte_alphabet()


@dataclass(frozen=True, eq=False, repr=False)
class Vocabulary:
    """The tokens of one tokenizer, as far as its model has logits of them."""

    strings: dict[int, str]
    """The token of each id, as the tokenizer writes it."""
    spelled: dict[int, bytes]
    """The bytes that each id stands for; of a special token, its name."""
    special: frozenset[int]
    """The ids of special tokens, and of added ones that look like "<...>" or "[...]"."""
    roles: dict[str, int]
    """The ids of bos, eos, unk and pad, as far as they are set."""
    markers: frozenset[str] | None
    """The special tokens that the chat template writes; None without a template."""
    spelling: Spelling
    """How a word begins: with "Ġ" byte-level, with "▁" sentencepiece, plain with neither."""
    logits: int
    """V, the size of the model's logits."""
    beyond: int
    """How many tokens have ids of V or more. They have no logit, and are left out above."""

    def __repr__(self) -> str:
        return f"Vocabulary({len(self.strings)} tokens, {self.logits} logits, {self.spelling})"

    @cached_property
    def ids(self) -> dict[str, int]:
        return {token: i for i, token in self.strings.items()}

    @cached_property
    def first(self) -> dict[bytes, int]:
        """The lowest id of each spelling."""
        return {spelled: i for i, spelled in reversed(self.spelled.items())}

    @property
    def merged(self) -> list[list[int]]:
        """The ids that spell the same bytes, which as text are one token; ascending."""
        found: dict[bytes, list[int]] = {}
        for i, spelled in self.spelled.items():
            if (first := self.first[spelled]) != i:
                found.setdefault(spelled, [first]).append(i)
        return sorted(found.values())

    @cached_property
    def fragments(self) -> list[int]:
        """The ids of parts of characters, whose text is "�": as text they are one token too."""
        return [i for i, spelled in self.spelled.items() if "�" in spelled.decode(errors="replace")]

    @property
    def end(self) -> int:
        """The largest id of a token, and one more. The logits from there on are padding."""
        return max(self.strings, default=-1) + 1


def read_vocabulary(
    name: str,
    tokenizer: Any,  # with get_vocab() and encode()
    logits: int | None,
) -> Vocabulary:
    ids = require_tokenizer(name, tokenizer)
    size = max(ids.values()) + 1 if logits is None else logits
    strings = {i: token for token, i in sorted(ids.items(), key=lambda pair: pair[1]) if i < size}
    added = added_tokens(tokenizer)
    named = {role: getattr(tokenizer, f"{role}_token", None) for role in ROLES}
    roles = {role: ids[str(x)] for role, x in named.items() if x is not None and ids.get(str(x), size) < size}
    special = {i for i, token in added.items() if token.special or MARKER.fullmatch(token.content)}
    special = special.union(roles.values()).intersection(strings)
    spelling = _spelling([token for i, token in strings.items() if i not in added])
    literal = special if spelling == "sentencepiece" else special | added.keys()
    spelled = {i: _spelled(token, "plain" if i in literal else spelling) for i, token in strings.items()}
    markers = _markers(getattr(tokenizer, "chat_template", None), {strings[i] for i in special})
    beyond = sum(i >= size for i in ids.values())
    return Vocabulary(strings, spelled, frozenset(special), roles, markers, spelling, logits=size, beyond=beyond)


def tokenizer_hash(tokenizer: object) -> str:
    """The SHA-256, in hexadecimal, of the tokens with their ids.

    Tokenizers of one hash give ids the same meaning, whether fast or slow and whatever their roles, chat template or
    version. They may cut a text differently; `check_tokenizers` tells.

    Args:
        tokenizer: with `get_vocab` and `encode`, as in `check_tokenizers`.

    Raises:
        TypeError, ValueError: the argument is not as above.
    """
    tokens = sorted(require_tokenizer("tokenizer", tokenizer).items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def require_tokenizer(name: str, x: Any) -> dict[str, int]:
    """Its tokens, each with its id."""
    if isinstance(x, type) or not all(callable(getattr(x, method, None)) for method in ("get_vocab", "encode")):
        within = getattr(x, "tokenizer", None)
        remedy = (
            f"pass {name}.tokenizer"
            if hasattr(within, "get_vocab")
            else "it must have get_vocab() and encode(), as what AutoTokenizer.from_pretrained(...) gives has"
        )
        raise TypeError(f"{name} is {repr(x) if isinstance(x, (str, type)) else checks.kind_of(x)}; {remedy}")
    ids = x.get_vocab()
    if not isinstance(ids, Mapping) or not ids or {*map(type, ids), *map(type, ids.values())} != {str, int}:
        raise ValueError(f"{name}.get_vocab() gives no ids of strings; it must be a dict from tokens to ids, not empty")
    return dict(ids)


def added_tokens(tokenizer: Any) -> dict[int, Any]:
    """The AddedToken of each id that was added to the trained vocabulary."""
    if hasattr(tokenizer, "get_added_tokens_decoder"):  # of tokenizers
        return dict(tokenizer.get_added_tokens_decoder())
    return dict(getattr(tokenizer, "added_tokens_decoder", {}))


def _spelling(tokens: list[str]) -> Spelling:
    byte_level, sentencepiece = (sum(token.startswith(mark) for token in tokens) for mark in "Ġ▁")
    if not byte_level + sentencepiece:
        return "plain"
    return "byte-level" if byte_level > sentencepiece else "sentencepiece"


def _spelled(token: str, spelling: Spelling) -> bytes:
    if spelling == "byte-level":
        try:
            return token.translate(BYTES).encode("latin-1")
        except UnicodeEncodeError:  # not of the alphabet, so it stands for itself
            pass
    if spelling == "sentencepiece":
        if piece := BYTE_PIECE.fullmatch(token):
            return bytes.fromhex(piece[1])
        token = token.replace("▁", " ")
    return token.encode(errors="surrogatepass")


def _markers(template: object, special: set[str]) -> frozenset[str] | None:
    """Of one template, or of several by name."""
    if not template:
        return None
    text = str(template)
    return frozenset(token for token in special if token in text)
