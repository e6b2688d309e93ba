"""Tokens as text in which everything can be seen: spaces, line ends, bytes that are no character by themselves."""

import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from topk_rkl import checks
from topk_rkl.vocabulary import BYTE_PIECE, BYTES

MARKS = {" ": "·", "\n": "↵", "\t": "⇥"}
UNSEEN = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs")  # categories of Unicode
BROKEN = "\ufffd"  # what decoders give for bytes that are no character
UNKNOWN = (LookupError, OverflowError, TypeError, ValueError)  # what some raise for an id beyond their own


class Decoder(Protocol):
    """A tokenizer of transformers, or of the package tokenizers."""

    @property
    def decode(self) -> Callable[..., object]: ...


Tokenizer = Decoder | Callable[[list[int]], list[str]]
"""Or a function that gives a string for each id."""


def require_tokenizer(tokenizer: Any) -> None:
    decodes = callable(getattr(tokenizer, "decode", None)) or callable(tokenizer)
    if isinstance(tokenizer, type) or not decodes:
        raise TypeError(
            f"tokenizer is {checks.seen(tokenizer)}; it must be a tokenizer with a `decode` method, such as of "
            "AutoTokenizer.from_pretrained, or a function that gives a string for each id of a list"
        )


def shown_tokens(tokenizer: Any, ids: Iterable[int]) -> dict[int, str]:
    """Each id with its token as it is shown; one that the tokenizer does not know, or a negative one, as its number."""
    ids = list(ids)
    known = [i for i in ids if i >= 0]
    decode = _one_by_one(tokenizer) if hasattr(tokenizer, "decode") else tokenizer
    texts = decode(known)
    if not isinstance(texts, (list, tuple)) or len(texts) != len(known) or not all(isinstance(x, str) for x in texts):
        raise TypeError(
            f"tokenizer gave {checks.kind_of(texts)} for a list of {len(known)} ids; it must give a list of as many "
            "strings"
        )
    found = {i: visible(text) for i, text in zip(known, texts)}
    return {i: found.get(i) or f"⟨{i}⟩" for i in ids}


def visible(text: str) -> str:
    """With a mark for each space, tab and line end, and the code of whatever else would not be seen."""
    return "".join(MARKS.get(x) or (f"⟨U+{ord(x):04X}⟩" if _unseen(x) else x) for x in text)


def _unseen(x: str) -> bool:
    return x in MARKS.values() or unicodedata.category(x) in UNSEEN


def _one_by_one(tokenizer: Any) -> Callable[[list[int]], list[str]]:
    """Tokenizers of transformers, and those of the package tokenizers."""
    of_transformers = hasattr(tokenizer, "convert_ids_to_tokens")
    options = {"clean_up_tokenization_spaces": False} if of_transformers else {}
    piece_of = tokenizer.convert_ids_to_tokens if of_transformers else getattr(tokenizer, "id_to_token", lambda _: None)

    def text_of(i: int) -> str:
        try:
            text, piece = str(tokenizer.decode([i], skip_special_tokens=False, **options)), piece_of(i)
        except UNKNOWN:
            return ""
        if BROKEN in text and piece:
            return _bytes_of(piece) or text
        lost = piece and piece.startswith("▁") and not text.startswith((" ", "▁"))  # SentencePiece, at a first token
        return f" {text}" if lost else text

    return lambda ids: [text_of(i) for i in ids]


def _bytes_of(piece: str) -> str | None:
    """The text of a piece that holds part of a character, each odd byte as ⟨e2⟩; None where the piece is no bytes."""
    if code := BYTE_PIECE.fullmatch(piece):
        data = bytes.fromhex(code[1])
    elif all(ord(x) in BYTES for x in piece):
        data = bytes(BYTES[ord(x)] for x in piece)
    else:
        return None
    return re.sub(r"[\udc80-\udcff]", lambda x: f"⟨{ord(x[0]) & 255:02x}⟩", data.decode("utf-8", "surrogateescape"))
