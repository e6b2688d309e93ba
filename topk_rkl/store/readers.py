"""Rows of the sets that other programs wrote: columns of axolotl, parquet of DistillKit, tars of Megatron.

Each gives rows with the support of the token after each position, whatever the program's own convention is. Three lines
turn them into a set:

with Writer(folder, header) as writer:
    for row in distillkit(parquet_folder, config):
        writer.append([row])  # better some thousand rows at a time
"""

import io
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from topk_rkl import checks
from topk_rkl.servers.shifts import hits
from topk_rkl.store.rows import Row
from topk_rkl.support import Support

__all__ = ["axolotl", "distillkit", "megatron"]

SpeaksOf = Literal["next", "own"]
AXOLOTL = ("input_ids", "target_token_ids", "target_logprobs", "target_mask")
DISTILLKIT = ("input_ids", "compressed_logprobs", "bytepacked_indices")
NONE_AT_ALL = -1_000.0  # Megatron's log-prob of an empty slot is -1e3 or -1e4, whose id -1 its 17 bits make 131,071
TAR = re.compile(r"(cp\d+_)?dp\d+__(\d+-)?(?P<last>\d+)\.tar")  # later versions count samples, from first to last


def axolotl(examples: Iterable[Mapping[str, object]], *, speaks_of: SpeaksOf) -> Iterator[Row]:
    """Rows of axolotl's columns input_ids, target_token_ids, target_logprobs and target_mask, and labels if there.

    Its versions differ: entry t of the teacher's columns speaks of the token after position t, or of token t itself.
    A set that is read with the other one is one token off, and is refused where its tokens show it.

    Args:
        examples: a dataset, or another iterable of dicts of lists.
        speaks_of: the "next" token, as the README of later versions says, or its "own", as older ones have it.

    Yields:
        Row with the loss_mask False where labels are -100. Supports are not `normalized`: axolotl renormalises among
        the K tokens, which no probabilities among all tokens can be made of.

    Raises:
        TypeError, ValueError: a column is missing or ragged, or the tokens are those of the other `speaks_of`.
    """
    checks.require_one_of("speaks_of", speaks_of, get_args(SpeaksOf))
    return _axolotl(examples, speaks_of)


def _axolotl(examples: Iterable[Mapping[str, Any]], speaks_of: SpeaksOf) -> Iterator[Row]:
    found = torch.zeros(3, 2, dtype=torch.long)  # of the tokens at a position, after it, and one further
    for i, example in enumerate(examples):
        tokens, ids, log_probs, used = (_column(f"examples[{i}]", example, name) for name in AXOLOTL)
        if ids.dim() != 2 or not len(ids) == len(tokens) == len(log_probs) == len(used):
            raise ValueError(
                f"examples[{i}] has input_ids of {tuple(tokens.shape)} and target_token_ids of {tuple(ids.shape)}; the "
                "columns must have one entry per token"
            )
        support = Support(ids, log_probs.float(), normalized=False).without(~used.bool())
        found += hits(support, tokens)
        _require_alignment(found, speaks_of)
        labels = _column(f"examples[{i}]", example, "labels") if "labels" in example else None
        mask = None if labels is None else labels != -100
        yield Row(tokens, support if speaks_of == "next" else _moved(support), mask)


def distillkit(folder: str | os.PathLike[str], config: Mapping[str, object]) -> Iterator[Row]:
    """Rows of the parquet files that DistillKit's sampler writes, where it kept all K log-probs exactly.

    Args:
        folder: of the parquet files, or one of them.
        config: its compression config, as compression_config.yaml beside the files has it: d, k, exact_k, exact_dtype,
            delta_encoding, polynomial_terms and residual_bins. The last two are approximations, which are refused.

    Yields:
        Row with `normalized` supports of (T, K) float32. The last position, of which the files do not speak, is empty.

    Raises:
        FileNotFoundError, TypeError, ValueError: no parquet file, a wrong config, a missing column or a wrong length.
        ModuleNotFoundError: pyarrow is not installed.
    """
    k, d = (checks.require_integer(f"config[{name!r}]", config.get(name)) for name in ("k", "d"))
    if config.get("exact_k") != k or config.get("polynomial_terms") or config.get("residual_bins"):
        raise ValueError(
            f"config has k = {k}, exact_k = {config.get('exact_k')}, polynomial_terms = "
            f"{config.get('polynomial_terms')} and residual_bins = {config.get('residual_bins')}; log-probs are only "
            "read where exact_k is k: others are approximated, which DistillKit's own LogprobCompressor undoes"
        )
    dtype: Any = config.get("exact_dtype", "float32")
    checks.require_one_of("config['exact_dtype']", dtype, ("float16", "bfloat16", "float32", "float64"))
    parquet = _arrow("pyarrow.parquet")
    path = Path(folder)
    found = sorted(path.glob("*.parquet"), key=_number) if path.is_dir() else [path]
    if not found or not found[0].is_file():
        raise FileNotFoundError(f"{path} has no parquet file; folder must be that of DistillKit's output")
    return _distillkit(parquet, found, k, d, getattr(torch, dtype), bool(config.get("delta_encoding", True)))


def _distillkit(parquet: Any, paths: list[Path], k: int, d: int, dtype: torch.dtype, deltas: bool) -> Iterator[Row]:
    bits = int(torch.tensor(float(d)).log2().ceil())  # of an id
    for path in paths:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=64):
            for example in batch.to_pylist():
                tokens, packed, indices = (_column(str(path), example, name) for name in DISTILLKIT)
                where = f"{path} has a row of {len(tokens)} tokens, with"
                _require_packed(f"{where} compressed_logprobs", packed, len(tokens) - 1, k * dtype.itemsize)
                _require_packed(f"{where} bytepacked_indices", indices, len(tokens) - 1, -(-k * bits // 8))
                log_probs = packed.to(torch.uint8).view(dtype).float()
                if deltas:
                    log_probs = log_probs.cumsum(-1)
                support = Support(_unpacked(indices, bits, k), log_probs.masked_fill(log_probs.isnan(), -torch.inf))
                yield Row(tokens, support.pad(len(tokens)))


def megatron(folder: str | os.PathLike[str], input_ids: Iterable[Tensor]) -> Iterator[Row]:
    """Rows of the tars that Megatron-LM's --logits-save writes, of one data-parallel rank without context parallelism.

    The tars hold no tokens: they are those of the teacher's run, in the order in which it saw them.

    Args:
        folder: of the tars; all of one rank dp.
        input_ids: (S,) tokens of each sample, in order: by iteration, microbatch and place in it.

    Yields:
        Row with `normalized` supports of (S, K) float32.

    Raises:
        FileNotFoundError, ValueError: no tar, tars of several ranks, or another count or length of samples.
        ModuleNotFoundError: pyarrow, which decompresses, is not installed.
    """
    arrow, path = _arrow("pyarrow"), Path(folder)
    tars = [(found, tar) for tar in path.glob("*.tar") if (found := TAR.fullmatch(tar.name))]
    if not tars:
        raise FileNotFoundError(f"{path} has no tar such as cp0_dp0__100.tar; folder must be that of --logits-save")
    ranks = sorted({tar.name.partition("__")[0] for _, tar in tars})
    if len(ranks) > 1:
        raise ValueError(
            f"{path} has tars of {', '.join(ranks)}; move those of each rank dp to a folder of its own, and leave "
            "context parallelism out of the teacher's run, since it cuts sequences"
        )
    ordered = [tar for _, tar in sorted(tars, key=lambda pair: int(pair[0]["last"]))]
    return _megatron(arrow, ordered, iter(input_ids))


def _megatron(arrow: Any, tars: list[Path], input_ids: Iterator[Tensor]) -> Iterator[Row]:
    count = 0
    for tar in tars:
        for support in _supports(arrow, tar):
            tokens = next(input_ids, None)
            if tokens is None:
                raise ValueError(f"input_ids ended after {count} samples and {tar} goes on; give those of every sample")
            if tokens.shape != support.shape:
                raise ValueError(
                    f"input_ids of sample {count} has shape {checks.shape_of(tokens)} and {tar} "
                    f"{tuple(support.shape)}; give the tokens that the teacher read"
                )
            count += 1
            yield Row(tokens, support)
    if next(input_ids, None) is not None:
        raise ValueError(f"input_ids goes on after the {count} samples of the tars; give those of every sample")


def _supports(arrow: Any, tar: Path) -> Iterator[Support]:
    """Of each sample of a tar, whose members, as 100.pt.zst or 0-8.pt.zst, hold (S, B, K), or that per microbatch."""
    with tarfile.open(tar) as file:
        members = [member for member in file.getmembers() if member.name.endswith(".pt.zst")]
        for member in sorted(members, key=lambda member: int(re.split(r"\D", member.name)[0])):
            data = file.extractfile(member)
            assert data is not None
            plain = arrow.CompressedInputStream(arrow.BufferReader(data.read()), "zstd").read()
            said = torch.load(io.BytesIO(plain), weights_only=True)
            columns = [said[name] for name in ("values", "indices_low", "bit_17")]
            batches = [columns] if isinstance(columns[0], Tensor) else zip(*columns, strict=True)
            for values, low, high in batches:
                support = Support((high.int() << 16) | low.int(), values.float())
                support = support.without(support.log_probs <= NONE_AT_ALL)
                for sample in range(support.shape[1]):
                    yield support[:, sample]


def _column(where: str, example: Mapping[str, Any], name: str) -> Tensor:
    if name not in example:
        raise ValueError(f"{where} has columns {', '.join(example)}; it must have {name}")
    try:
        return torch.as_tensor(example[name])
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(f"{where} has a column {name} that is ragged or no numbers; it must be a tensor's") from None


def _require_alignment(
    found: Tensor,  # (3, 2), as `hits` gives them
    speaks_of: SpeaksOf,
) -> None:
    """A teacher gives most tokens that come among its best K; those that stand there already it seldom repeats."""
    own, after = found[:2, 0].tolist()
    ours, other = (after, own) if speaks_of == "next" else (own, after)
    if other >= 64 and other > 2 * ours:
        raise ValueError(
            f"speaks_of is {speaks_of!r}, but the teacher's K tokens held {ours} tokens so, and {other} the "
            f"other way; use speaks_of={'own' if speaks_of == 'next' else 'next'!r}"
        )


def _moved(support: Support) -> Support:
    """Entries of their own token, each moved to the position before it."""
    return support[1:].pad(len(support))


def _require_packed(what: str, x: Tensor, rows: int, width: int) -> None:
    if tuple(x.shape) != (rows, width) and not (rows == 0 and x.numel() == 0):
        raise ValueError(f"{what} of {tuple(x.shape)} bytes; the config says {(rows, width)}: give that of the files")


def _unpacked(
    packed: Tensor,  # (T, bytes), the highest bit of each byte first
    bits: int,
    k: int,
) -> Tensor:  # (T, K) int64
    each = (packed[..., None] >> torch.arange(7, -1, -1)) & 1
    each = each.flatten(1)[:, : k * bits].reshape(-1, k, bits)
    return (each << torch.arange(bits - 1, -1, -1)).sum(-1)


def _number(path: Path) -> tuple[int, str]:
    """data_10.parquet comes after data_9.parquet."""
    return int("".join(re.findall(r"\d", path.stem)) or 0), path.name


def _arrow(name: str) -> ModuleType:
    try:
        return __import__(name, fromlist=["_"])
    except ImportError as error:
        raise ModuleNotFoundError("this reader needs pyarrow: pip install 'topk-rkl[readers]'") from error
