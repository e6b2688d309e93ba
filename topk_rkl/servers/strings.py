"""From the string of a token to its id, where one id alone has that string."""

import weakref
from collections.abc import Sequence
from typing import Any, Literal, get_args

from topk_rkl import checks
from topk_rkl.vocabulary import BYTES

Ambiguous = Literal["refuse", "drop"]
PREFIX = "token_id:"  # of vLLM, with return_tokens_as_token_ids
SEVERAL = -2
_known: "weakref.WeakKeyDictionary[Any, tuple[dict[str, int], dict[bytes, int], int]]" = weakref.WeakKeyDictionary()


class Inverter:
    """Reads tokens as servers write them: an id, `token_id:N`, bytes, or a string.

    A string is read through a tokenizer. It is refused where no id or several have it, and where it is empty, as many
    servers write special tokens. "drop" gives -1 instead, an empty slot.
    """

    def __init__(self, tokenizer: Any, ambiguous: Ambiguous) -> None:
        checks.require_one_of("ambiguous", ambiguous, get_args(Ambiguous))
        if tokenizer is not None:
            require_tokenizer(tokenizer)
        self.tokenizer, self.drop = tokenizer, ambiguous == "drop"

    def id_of(self, name: str, row: int, token: object, data: Sequence[int] | None = None) -> int:
        if not isinstance(token, str):
            raise ValueError(f"answer: {name}[{row}] has the token {token!r}; it must be a string")
        if token.startswith(PREFIX) and token[len(PREFIX) :].isdecimal():
            return int(token[len(PREFIX) :])
        if self.tokenizer is None:
            raise ValueError(
                f"answer: {name}[{row}] has the token {token!r}, a string; ask vLLM for "
                "return_tokens_as_token_ids=True, use the server's own form with ids, or pass tokenizer= to from_openai"
            )
        strings, pieces = inverted(self.tokenizer)
        found = strings.get(token, SEVERAL) if token else SEVERAL
        part = None if data is None else _bytes(name, row, data)  # of a character, which has no string of its own
        if found < 0 and part and part != token.encode():
            found = pieces.get(part, SEVERAL)
        if found >= 0:
            return found
        if self.drop:
            return -1
        raise ValueError(
            f"answer: {name}[{row}] has the token {token!r}, which is not the string of one id alone; ask vLLM for "
            "return_tokens_as_token_ids=True, use the server's own form with ids, or leave such tokens out with "
            "ambiguous='drop'"
        )


def _bytes(name: str, row: int, data: Sequence[int]) -> bytes:
    try:
        return bytes(data)
    except (TypeError, ValueError):
        raise ValueError(f"answer: {name}[{row}] has the bytes {data!r}; they must be ints from 0 to 255") from None


def require_tokenizer(tokenizer: Any) -> None:
    for name in ("__len__", "batch_decode", "convert_ids_to_tokens"):
        if isinstance(tokenizer, type) or not callable(getattr(tokenizer, name, None)):
            raise TypeError(
                f"tokenizer is {checks.kind_of(tokenizer)}; it must be a tokenizer of transformers, that of the teacher"
            )


def inverted(tokenizer: Any) -> tuple[dict[str, int], dict[bytes, int]]:
    """The ids by string and by bytes, SEVERAL where more than one has it; worked out once per tokenizer and length."""
    ids = range(len(tokenizer))
    if tokenizer not in _known or _known[tokenizer][2] != len(ids):
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        strings = tokenizer.batch_decode([[i] for i in ids], **options)
        pieces = bytes_of(tokenizer.convert_ids_to_tokens(list(ids)))
        _known[tokenizer] = (by_value(strings), by_value(pieces), len(ids))
    return _known[tokenizer][:2]


def by_value(values: Sequence[Any]) -> dict[Any, int]:
    found: dict[Any, int] = {}
    for i, value in enumerate(values):
        found[value] = SEVERAL if value in found else i
    return found


def bytes_of(tokens: Sequence[str]) -> list[bytes | None]:
    """Of tokens as a vocabulary spells them: bytes as letters in byte-level BPE, <0xE2> with byte fallback."""
    letters = {chr(letter): byte for letter, byte in BYTES.items()}
    return [
        bytes([int(token[3:5], 16)])
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        else bytes(letters[letter] for letter in token)
        if all(letter in letters for letter in token)
        else None
        for token in map(str, tokens)
    ]
