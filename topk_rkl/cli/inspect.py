"""`topk-rkl inspect`: what a store holds, in figures."""

import argparse
import json
import math
from typing import Any

import torch
from torch import Tensor

from topk_rkl.cli.options import count
from topk_rkl.cli.refusal import Refusal, refusing, require_packages

ABOUT = "show what a store holds: sizes, the teacher's mass and entropy on S, lengths, alignment"
EPILOG = """\
examples:
  topk-rkl inspect store
  topk-rkl inspect store --row 0 --tokenizer Qwen/Qwen3-8B
  topk-rkl inspect store --json | jq .mass

Mass is the probability that the teacher gives to the K tokens of a position; entropy is that of the teacher among
them, in nats. A next token inside S at shift 1 is how a sound store looks; the best share at shift 0 or 2 means that
each position speaks of the wrong token.
"""
BEST = 5  # tokens shown of each position
WIDTH = 40  # characters of the longest bar


def add_to(commands: Any, formatter: Any) -> None:
    command = commands.add_parser(
        "inspect", help=ABOUT, description=ABOUT.capitalize(), epilog=EPILOG, formatter_class=formatter
    )
    command.set_defaults(run=run)
    add = command.add_argument
    add("store", metavar="DIR", help="a store, finished or not")
    add("--rows", type=count, default=256, metavar="N", help="rows that are read, spread over the store")
    add("--row", type=int, metavar="I", help="shows row I, token by token (needs --tokenizer)")
    add("--tokenizer", metavar="MODEL", help="decodes the ids of --row")
    add("--gguf-file", metavar="NAME", help="a GGUF file within MODEL")
    add("--json", action="store_true", help="for machines")


def run(args: argparse.Namespace) -> int:
    require_packages("safetensors", *(["transformers"] * bool(args.tokenizer)))
    from topk_rkl.store import Store

    if (args.row is None) != (args.tokenizer is None):
        raise Refusal("--row and --tokenizer go together: the one says which row, the other decodes it")
    with refusing(f"DIR {args.store}"):
        store = Store(args.store, partial=True)
    if not len(store):
        raise Refusal(f"DIR {args.store} has no rows yet; let its writer go on")
    if args.row is not None:
        print(shown(store, args.row, args.tokenizer, args.gguf_file))
        return 0
    found = figures(store, args.rows)
    print(json.dumps(found | {"next_token_in_S": numbers(found["next_token_in_S"])}) if args.json else report(found))
    return 0


def figures(store: Any, rows: int) -> dict[str, Any]:
    """Of the header, and of at most so many rows, spread evenly."""
    from topk_rkl.store.files import read_manifest

    read = spread(store, rows)
    lengths = torch.tensor([len(row.input_ids) for row in read])
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()])  # (P,)
    filled, masses, entropies = (torch.cat(x) for x in zip(*(on_support(row.support.log_probs) for row in read)))
    return {
        "folder": str(store.folder), "complete": read_manifest(store.folder).complete, "rows": len(store),
        "shards": len(store.shards), "tokens": store.positions, "bytes": store.bytes,
        "bytes_per_token": store.bytes / store.positions, **store.header.as_dict(), "rows_read": len(read),
        "empty_slots": 1 - float(filled.mean()), "next_token_in_S": inside(read),
        "lengths": histogram(lengths), "mass": by_position(masses, positions) if store.header.normalized else None,
        "entropy": by_position(entropies, positions),
    }  # fmt: skip


def on_support(
    log_probs: Tensor,  # (T, K)
) -> tuple[Tensor, Tensor, Tensor]:  # (T,) each
    """The share of slots that are filled, the probability of all of them, and the entropy among them; NaN of none."""
    x = log_probs.double()
    filled, q = (x > -torch.inf).double().mean(-1), x.softmax(-1)
    return filled, x.exp().sum(-1).masked_fill(filled == 0, torch.nan), torch.special.entr(q).sum(-1)


def spread(store: Any, rows: int) -> list[Any]:
    """At most so many rows of a store, evenly."""
    number = min(rows, len(store))
    return [store[i * len(store) // number] for i in range(number)]


def inside(rows: list[Any]) -> list[float]:
    """The share of tokens that are in the S of 0, 1 and 2 positions before; NaN where rows have no such tokens."""
    from topk_rkl.servers.shifts import hits

    found, counted = torch.stack([hits(row.support, row.input_ids) for row in rows]).sum(0).double().unbind(-1)
    shares: list[float] = (found / counted).tolist()
    return shares


def bucket(
    x: Tensor,  # (N,) ints of at least 0
) -> dict[str, Tensor]:  # (N,) bool each
    """Which are 0, 1, 2-3, 4-7 and so on, as far as there are any."""
    ends = (x.double().log2().floor() + 1).clamp_min(0).long()  # those of bucket e are below 2 ** e
    names = {e: f"{2**e // 2}" if e < 2 else f"{2 ** (e - 1)}-{2**e - 1}" for e in ends.unique().tolist()}
    return {name: ends == e for e, name in names.items()}


def by_position(
    values: Tensor,  # (P,)
    positions: Tensor,  # (P,)
) -> dict[str, float]:
    """The mean of each bucket of positions; those that are wholly empty do not count."""
    means = {name: float(values[where].nanmean()) for name, where in bucket(positions).items()}
    return {name: mean for name, mean in means.items() if not math.isnan(mean)}


def histogram(
    lengths: Tensor,  # (N,)
) -> dict[str, int]:
    return {name: int(where.sum()) for name, where in bucket(lengths).items()}


def numbers(shares: list[float]) -> list[float | None]:
    """JSON has no NaN."""
    return [None if math.isnan(share) else share for share in shares]


def report(found: dict[str, Any]) -> str:
    x, shares = found, ", ".join(f"{share:.3f}" for share in found["next_token_in_S"])
    most = max(x["lengths"].values())
    mass = x["mass"] or {}
    return "\n".join((
        f"store        {x['folder']}, {'complete' if x['complete'] else 'not finished'}",
        f"size         {x['rows']:,} rows, {x['tokens']:,} tokens; {x['shards']:,} shards, {x['bytes'] / 1e6:,.2f} MB, "
        f"{x['bytes_per_token']:.1f} bytes per token",
        f"S            K = {x['k']} of V = {x['vocab_size']:,}, {x['log_probs_dtype']} "
        f"{'log-probs' if x['normalized'] else 'logits'} at temperature {x['temperature']}",
        f"teacher      {x['teacher']}",
        f"tokenizer    {x['tokenizer']}",
        f"source       {x['source']}",
        "",
        f"of {x['rows_read']:,} rows:",
        f"next token inside S at shifts 0, 1, 2: {shares}",
        f"empty slots: {x['empty_slots']:.2%}",
        "",
        "position        mass on S  entropy on S",
        *(f"{name:15} {mass.get(name, float('nan')):9.4f} {value:13.4f}" for name, value in x["entropy"].items()),
        "",
        "tokens per row",
        *(f"{name:15} {'#' * -(-n * WIDTH // most):{WIDTH}} {n:,}" for name, n in x["lengths"].items()),
    ))  # fmt: skip


def shown(store: Any, index: int, model: str, gguf_file: str | None) -> str:
    """A row: each token, and the best tokens for the place after it, with their probabilities."""
    from topk_rkl.cli import models

    tokenizer = models.tokenizer(model, gguf_file)
    with refusing(f"--row {index}", IndexError):
        row = store[index]
    with refusing(f"--tokenizer {model}"):
        store.require_tokenizer(tokenizer)

    def told(i: int) -> str:
        return repr(tokenizer.decode([i]))

    order = row.support.log_probs.argsort(dim=-1, descending=True, stable=True)[:, :BEST]
    ids, log_probs = (x.gather(-1, order) for x in row.support.tensors)  # (T, BEST)
    lines = [f"row {index}: {len(row.input_ids)} tokens", f"{'token':20} learnt  the teacher's best for the next place"]
    for t, token in enumerate(row.input_ids.tolist()):
        learnt = "yes" if row.loss_mask is None or row.loss_mask[t] else "no"
        pairs = zip(ids[t].tolist(), log_probs[t].exp().tolist())
        best = "  ".join(f"{told(i)} {p:.3f}" if store.header.normalized else told(i) for i, p in pairs if i >= 0)
        lines.append(f"{told(token):20} {learnt:7} {best}")
    return "\n".join(lines)
