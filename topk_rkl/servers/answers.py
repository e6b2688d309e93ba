"""What an answer is: JSON or an object, one of an error, one of several choices."""

import base64
import binascii
import io
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from topk_rkl import checks

Part = Literal["prompt", "response"]


def field(answer: object, *names: str) -> Any:
    """The value under the names, one within the other, of mappings or of attributes; None where one is missing."""
    for name in names:
        answer = answer.get(name) if isinstance(answer, Mapping) else getattr(answer, name, None)
        if answer is None:
            return None
    return answer


def require_answer(answer: object, *names: str) -> None:
    """Refuses what has none of the fields: an error of the server, by its message, a batch, or another server's."""
    require_no_error(answer)
    if isinstance(answer, (list, tuple)):
        raise TypeError(
            f"answer is {checks.kind_of(answer)} of {len(answer)}; pass one of its items, such as answer[0]"
        )
    if all(getattr(answer, name, None) is None for name in names) and not isinstance(answer, Mapping):
        raise TypeError(
            f"answer is {checks.kind_of(answer)}; it must be a decoded answer, such as "
            f"response.json(), with {' or '.join(names)}"
        )
    if all(field(answer, name) is None for name in names):
        seen = ", ".join(str(x) for x in answer if answer[x] is not None) if isinstance(answer, Mapping) else ""
        raise ValueError(f"answer has {seen or 'no field'}; it must have {' or '.join(names)}")


def require_no_error(answer: object) -> None:
    """Raises with the server's own words where it refused the request."""
    if not isinstance(answer, Mapping):
        return
    error = answer.get("error") or (answer if answer.get("object") == "error" else None)
    if error is None and set(answer) == {"detail"}:  # of FastAPI
        error = answer["detail"]
    if error is None:
        return
    message = str(error.get("message", error) if isinstance(error, Mapping) else error)
    remedy = "; start it with a larger --max-logprobs, or ask for fewer" if "max allowed" in message else ""
    raise ValueError(f"answer is an error of the server: {message}{remedy}")


def require_part(part: object) -> None:
    checks.require_one_of("part", part, get_args(Part))


def chosen(answer: object, choice: int | None, name: str = "choices") -> Any:
    """One of the choices of an answer; all of them where there is one alone."""
    choices = field(answer, name)
    if not isinstance(choices, Sequence) or isinstance(choices, str) or not choices:
        raise ValueError(f"answer: {name} is {short(choices)}; it must be a list with at least one item")
    if choice is None:
        if len(choices) > 1:
            raise ValueError(f"choice is None, but the answer has {len(choices)}; pass one of 0 to {len(choices) - 1}")
        return choices[0]
    choice = checks.require_integer("choice", choice)
    if not 0 <= choice < len(choices):
        raise ValueError(f"choice is {choice}; the answer has {len(choices)}: pass one of 0 to {len(choices) - 1}")
    return choices[choice]


def require_start(start: object) -> int:
    start = checks.require_integer("start", start)
    if not 0 <= start <= 2**31:
        raise ValueError(f"start is {start}; it must be the position, from 0 on, at which the server was to begin")
    return start


def require_rows(name: str, rows: Any, request: str) -> Sequence[Any]:
    """The rows of a field, and the request that makes the server give it."""
    if rows is None:
        raise ValueError(f"answer has no {name}; ask the server for it: {request}")
    if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Sequence):
        raise ValueError(f"answer: {name} is {checks.kind_of(rows)}; it must be a list with a row per token")
    found: Sequence[Any] = rows
    return found


def decoded(name: str, text: object) -> bytes:
    """Of base64."""
    try:
        return base64.b64decode(text, validate=True)  # type: ignore[arg-type]
    except (binascii.Error, TypeError, ValueError):
        raise ValueError(f"answer: {name} is {short(text)}; it must be base64") from None


def raw(name: str, text: object, dtype: torch.dtype) -> Tensor:
    """Base64 of little-endian numbers."""
    data = decoded(name, text)
    if len(data) % dtype.itemsize:
        raise ValueError(f"answer: {name} has {len(data)} bytes; it must hold {dtype.itemsize} per number")
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def array(name: str, values: Any) -> Tensor:
    """An array, a tensor or lists, as a tensor on the CPU."""
    try:
        return values.detach().cpu() if isinstance(values, Tensor) else torch.tensor(values)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"answer: {name} is {short(values)}; it must be an array of numbers") from None


def from_npy(name: str, text: object) -> Tensor:
    """Base64 of a .npy file, which numpy reads, as float32."""
    try:
        import numpy
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(f"{name} is a .npy file, which numpy reads; run pip install numpy") from missing
    try:
        array = numpy.load(io.BytesIO(decoded(name, text)), allow_pickle=False)
        return torch.from_numpy(array.astype(numpy.float32))
    except (ValueError, OSError, EOFError, TypeError, struct.error) as error:
        raise ValueError(f"answer: {name} is no .npy file of numbers: {error}") from None


def short(x: object) -> str:
    text = repr(x)
    return text if len(text) <= 60 else f"{text[:57]}..."
