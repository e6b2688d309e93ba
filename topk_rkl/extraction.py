"""The teacher's top K of a data set, read once and written to a store, from which students train without the teacher.

Rows are read in windows, each of which becomes a shard of the store. A window is read in batches of like length and
written in the order of the rows. What is interrupted goes on after the last shard.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy
import torch
from torch import Tensor, nn

from topk_rkl import checks
from topk_rkl.loss import teacher_topk
from topk_rkl.store import Header, Row, Store, Writer
from topk_rkl.store.header import LogProbsDtype
from topk_rkl.store.rows import id_dtype
from topk_rkl.support import Support
from topk_rkl.trainers.head_loss import HeadTopK
from topk_rkl.trainers.heads import head_of
from topk_rkl.vocabulary import tokenizer_hash

__all__ = ["extract"]

Select = Callable[[Tensor, Tensor], Support]  # (B, T) ids, (B, T) mask -> Support of (B, T, K)
Rows = Sequence[Mapping[str, Any]]


def extract(
    model: nn.Module,
    tokenizer: object,
    rows: Sequence[Mapping[str, object]],
    out: str | Path,
    k: int,
    *,
    teacher: str | None = None,
    dtype: LogProbsDtype = "float16",
    temperature: float = 1.0,
    batch_tokens: int = 8192,
    shard_mb: float = 64.0,
    full_logits: bool = False,
    progress: bool = False,
) -> Store:
    """Writes the teacher's K best tokens at each position of the rows, with their true log-probs, to a store.

    The teacher's hidden states go through its head a part at a time, so that its logits never exist all at once. A head
    that is more than a linear layer, such as a quantised one, makes all logits of a batch instead.

    The same call goes on where an earlier one was interrupted. The rows, K, the tokenizer, the teacher's name, dtype
    and temperature must then be the same; batch_tokens and shard_mb may differ.

    Args:
        model: a causal language model of transformers, on the device where it is to run; put into eval mode.
        tokenizer: a tokenizer of transformers, whose hash the store keeps.
        rows: mappings with "input_ids", T ids, and optionally "loss_mask", T bools: the tokens that a student learns.
            No row may be longer than the positions that the model's config tells.
        out: a folder that is new or empty, or holds a part of this store.
        k: 1 <= k <= V.
        teacher: the name that the store keeps; None takes the model's own.
        dtype: of the stored log-probs, "float16", "bfloat16" or "float32".
        temperature: the log-probs are those of the teacher's logits divided by it.
        batch_tokens: padded tokens per batch; a longer row is a batch of its own.
        shard_mb: size of a shard in 10^6 bytes, which an interruption loses at most.
        full_logits: makes all logits of a batch, whatever the head.
        progress: shows a bar on stderr, with tokens per second and the time left.

    Returns:
        Store: the whole of it, opened.

    Raises:
        TypeError, ValueError: an argument is not as above, the folder holds something else, or the teacher gives NaN.
        OSError: see `topk_rkl.store.Writer`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {checks.kind_of(model)}; it must be a causal language model, an nn.Module")
    checks.require_flag("full_logits", full_logits)
    checks.require_flag("progress", progress)
    config: Any = getattr(model, "config", None)
    extraction = Extraction(
        rows, out, k, tokenizer=tokenizer, vocab_size=vocab_size(config), positions=positions(config), dtype=dtype,
        temperature=temperature, teacher=name_of(model) if teacher is None else teacher, batch_tokens=batch_tokens,
        shard_mb=shard_mb,
    )  # fmt: skip
    return extraction.run(model, full_logits=full_logits, progress=progress)


class Extraction:
    """`extract` in two steps: all that can be refused is refused before there is a model."""

    def __init__(
        self,
        rows: Rows,
        out: str | Path,
        k: int,
        *,
        tokenizer: Any,
        teacher: str,
        vocab_size: int,
        positions: int | None = None,
        dtype: LogProbsDtype = "float16",
        temperature: float = 1.0,
        batch_tokens: int = 8192,
        shard_mb: float = 64.0,
    ) -> None:
        k = checks.require_positive_integer("k", k)
        if k > vocab_size:
            raise ValueError(f"k is {k}; it must be between 1 and V = {vocab_size}, the teacher's vocabulary")
        checks.require_one_of("dtype", dtype, get_args(LogProbsDtype))
        checks.require_temperature(temperature)
        checks.require_positive("shard_mb", shard_mb)
        self.batch_tokens = checks.require_positive_integer("batch_tokens", batch_tokens)
        if not isinstance(out, (str, os.PathLike)):
            raise TypeError(f"out is {checks.seen(out)}; it must be the path of a folder, a str or a pathlib.Path")
        self.rows, self.out, self.temperature = rows, Path(out), float(temperature)
        self.lengths, source = survey(rows, vocab_size)
        if positions is not None and self.lengths.max() > positions:
            raise ValueError(
                f"rows[{self.lengths.argmax()}] has {self.lengths.max()} tokens and the teacher {positions} positions; "
                f"cut rows to {positions} tokens, on the command line by --max-length {positions}"
            )
        self.header = Header(
            k=k, vocab_size=vocab_size, teacher=teacher, tokenizer=tokenizer_hash(tokenizer), source=source,
            temperature=self.temperature, normalized=True, log_probs_dtype=dtype,
        )  # fmt: skip
        id_bytes = id_dtype(self.header).itemsize
        self.shard_tokens = int(shard_mb * 1e6 / (k * (id_bytes + self.header.dtype.itemsize) + id_bytes))
        self.writer = Writer(self.out, self.header)

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    def run(self, model: nn.Module, *, full_logits: bool = False, progress: bool = False) -> Store:
        """Reads what is not yet written."""
        model.eval()
        done = int(self.lengths[: self.writer.rows].sum())
        with self.writer as writer, _bar(done, self.tokens, progress) as advance:
            select = self._select(model, full_logits)
            for window in windows(self.lengths, self.shard_tokens, writer.rows):
                writer.append(self._read(window, select, _device_of(model), advance))
            writer.finish()
        return Store(self.out)

    def _select(self, model: nn.Module, full_logits: bool) -> Select:
        k, token = self.header.k, int(self.rows[0]["input_ids"][0])
        within_head = not full_logits and _is_plain(model, k, token)
        return (_within_head if within_head else _from_logits)(model, k, self.temperature)

    def _read(self, window: range, select: Select, device: torch.device, advance: Callable[[int], object]) -> list[Row]:
        given = [self.rows[i] for i in window]
        ids = [torch.as_tensor(numpy.asarray(row["input_ids"]).astype(numpy.int64)) for row in given]
        supports: list[Support | None] = [None] * len(ids)
        for batch in batches([len(x) for x in ids], self.batch_tokens):
            padded = nn.utils.rnn.pad_sequence([ids[i] for i in batch], batch_first=True)  # (B, T)
            lengths = torch.tensor([len(ids[i]) for i in batch])  # (B,)
            mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()  # (B, T)
            with torch.no_grad():
                found = select(padded.to(device), mask.to(device)).to("cpu")  # of (B, T, K)
            for row, (i, length) in enumerate(zip(batch, lengths.tolist())):
                supports[i] = found[row, :length]
            advance(int(lengths.sum()))
        return [_row(*parts) for parts in zip(window, ids, supports, given)]


def survey(rows: Rows, vocab_size: int) -> tuple[Any, str]:
    """The length of each row, and a name for all of them: how many there are, and a hash of what they hold."""
    try:
        count = len(rows)
    except Exception:  # of whatever is given
        raise TypeError(
            f"rows is {checks.kind_of(rows)}; it must be a list or data set of rows with input_ids"
        ) from None
    if not count or isinstance(rows, Mapping):
        raise ValueError(f"rows is {checks.kind_of(rows)} of {count} items; it must be a list of at least one row")
    digest, lengths = hashlib.sha256(), []
    for i in range(count):
        ids, mask = _require_row(f"rows[{i}]", rows[i], vocab_size)
        digest.update(f"{len(ids)} {mask is not None}".encode())
        digest.update(ids.astype("<i4").tobytes() + (b"" if mask is None else mask.tobytes()))
        lengths.append(len(ids))
    return numpy.array(lengths), f"{len(lengths)} rows, {sum(lengths)} tokens, sha256 {digest.hexdigest()[:16]}"


def windows(lengths: Any, tokens: int, first: int) -> Iterator[range]:
    """From the row `first` on, ranges of rows of at most so many tokens, or of one row."""
    ends = numpy.cumsum(lengths)
    while first < len(ends):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(numpy.searchsorted(ends, before + tokens, side="right")))
        yield range(first, last)
        first = last


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices of rows of like length, the longest first, of at most so many padded tokens, or of one row."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    first = 0
    while first < len(order):
        last = first + max(1, tokens // lengths[order[first]])
        yield order[first:last]
        first = last


def name_of(model: nn.Module) -> str:
    """Where transformers loaded it from, or its class."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "")) or type(model).__name__


def vocab_size(config: Any) -> int:
    """V, as a config of transformers tells it."""
    size = getattr(_of_text(config), "vocab_size", None)
    if not isinstance(size, int):
        raise TypeError("model has no config with a vocab_size; it must be a causal language model of transformers")
    return size


def positions(config: Any) -> int | None:
    """How many tokens a row may have; None where a config does not tell, or stretches its rotary embedding."""
    text = _of_text(config)
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [rope, *(each for each in rope.values() if isinstance(each, dict))]  # that of all layers, or of each kind
    if any(each.get("rope_type", "default") != "default" for each in kinds):
        return None
    size = getattr(text, "max_position_embeddings", None)
    return size if isinstance(size, int) else None


def _of_text(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _is_plain(model: nn.Module, k: int, token: int) -> bool:
    """Whether the head's weight and the config tell the logits, as those of a token show."""
    try:
        HeadTopK(model, k)(input_ids=torch.tensor([[token]], device=_device_of(model)))
    except (TypeError, RuntimeError):
        return False
    return True


def _within_head(model: nn.Module, k: int, temperature: float) -> Select:
    head = head_of(model)
    # softcap * tanh(logit_scale * z / softcap) / T is of the same form, with both divided by T.
    bent = {"logit_scale": head.logit_scale / temperature, "softcap": head.softcap and head.softcap / temperature}
    wide = None if head.weight.dtype == torch.float64 else torch.float32
    topk = HeadTopK(model, k, head=head, normalize=True, logits_dtype=wide, **bent)
    return lambda ids, mask: topk(input_ids=ids, attention_mask=mask, use_cache=False)


def _from_logits(model: nn.Module, k: int, temperature: float) -> Select:
    def select(
        ids: Tensor,  # (B, T)
        mask: Tensor,  # (B, T)
    ) -> Support:  # of (B, T, K)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (B, T, V)
        rows = [row.to(torch.promote_types(row.dtype, torch.float32)) / temperature for row in logits]
        return Support.stack([teacher_topk(row, k, normalize=True) for row in rows])

    return select


def _row(i: int, ids: Tensor, support: Support | None, given: Mapping[str, Any]) -> Row:
    if support is None or support.log_probs.isnan().any():
        raise ValueError(
            f"the teacher gives NaN in rows[{i}]; load it in bfloat16 or float32 (--model-dtype), whose range float16 "
            "does not have"
        )
    mask = given.get("loss_mask")
    return Row(ids, support, None if mask is None else torch.as_tensor(numpy.asarray(mask).astype(bool)))


def _require_row(name: str, row: Any, vocab_size: int) -> tuple[Any, Any]:
    """The ids and the loss mask, (T,) each, or None for the latter."""
    if not isinstance(row, Mapping) or "input_ids" not in row:
        found = (
            f"a row of {', '.join(map(str, row)) or 'no column'}" if isinstance(row, Mapping) else checks.kind_of(row)
        )
        raise ValueError(f"{name}: {found}; it must have input_ids, such as {{'input_ids': [1, 2, 3]}}")
    ids = numpy.asarray(row["input_ids"])
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
        raise ValueError(
            f"{name}['input_ids'] has shape {ids.shape} and dtype {ids.dtype}; it must be (T,) ints, T of at least 1"
        )
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(f"{name}['input_ids'] holds {wrong}; ids must be from 0 to {vocab_size - 1}, below V")
    if row.get("loss_mask") is None:
        return ids, None
    mask = numpy.asarray(row["loss_mask"])
    if mask.shape != ids.shape or mask.dtype != bool:
        raise ValueError(
            f"{name}['loss_mask'] has shape {mask.shape} and dtype {mask.dtype}; it must be {ids.shape} bool, as ids"
        )
    return ids, mask


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextlib.contextmanager
def _bar(done: int, total: int, shown: bool) -> Iterator[Callable[[int], object]]:
    if not shown:
        yield lambda _: None
        return
    from tqdm import tqdm

    options = {"initial": done, "total": total, "unit": "tok", "unit_scale": True, "dynamic_ncols": True}
    with tqdm(desc="extract", **options) as bar:
        yield bar.update
