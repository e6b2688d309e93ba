"""`topk-rkl extract`: the teacher's top K of a data set into a store."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from topk_rkl.cli.options import count, positive
from topk_rkl.cli.refusal import Refusal, refusing, require_packages

DTYPES = "float16", "bfloat16", "float32"
MODEL_DTYPES = "auto", "bfloat16", "float16", "float32"
PACKAGES, PACKAGES_OF_GGUF = ("transformers", "datasets", "safetensors", "tqdm"), ("gguf", "accelerate")
AGAIN = "the teacher ran out of memory; go on with a --batch-tokens below {batch_tokens}, or a smaller --model-dtype"
ABOUT = "run a teacher over a data set, and keep its K best tokens at each position"
DESCRIPTION = """\
Runs a teacher over a data set and keeps, for each position, its K best tokens with their log-probs. A student then
trains from the store alone: on other machines, as often as you like, without the teacher.

DATA is one of
  texts.txt                   a document per line; blank lines are left out
  rows.jsonl .json .parquet   rows with a column text, messages or input_ids
  a folder                    that `save_to_disk` of datasets wrote, with the same columns

texts       are tokenized as the teacher's tokenizer does by itself.
messages    go through its chat template. Where the template marks the assistant's tokens ({% generation %}), the
            student learns those alone.
input_ids   are taken as they are. A column labels of -100, or loss_mask of false, tells which tokens the student does
            not learn.
"""
EPILOG = """\
examples:
  topk-rkl extract Qwen/Qwen3-8B texts.jsonl --out store --k 64
  topk-rkl extract ./teacher chats.parquet --out store --max-length 4096 --model-dtype bfloat16
  topk-rkl extract ./folder texts.txt --out store --gguf-file model.Q4_1.gguf --limit 100

What is interrupted, by Ctrl-C or a power cut, goes on when the same command is given again: at most one shard is lost.
"""


def add_to(commands: Any, formatter: Any) -> None:
    command = commands.add_parser(
        "extract", help=ABOUT, description=DESCRIPTION, epilog=EPILOG, formatter_class=formatter
    )
    command.set_defaults(run=run)
    add = command.add_argument
    add("model", metavar="MODEL", help="the teacher: a folder, or a name for from_pretrained of transformers")
    add("data", metavar="DATA", help="the rows that it reads, see above")
    add("--out", required=True, metavar="DIR", help="the store: a new folder, or one to go on with")
    add("--k", type=count, default=64, metavar="K", help="tokens kept per position")
    add("--dtype", choices=DTYPES, default="float16", help="of the stored log-probs")
    add("--temperature", type=positive, default=1.0, metavar="T", help="divides the teacher's logits")
    add("--max-length", type=count, default=2048, metavar="N", help="tokens per row; longer rows are cut, and counted")
    add("--text-column", metavar="NAME", help="of texts (default: input_ids, messages or text, the first there is)")
    add("--limit", type=count, metavar="N", help="reads the first N rows only (default: all)")
    add("--batch-tokens", type=count, default=8192, metavar="N", help="padded tokens per batch; fewer need less memory")
    add("--shard-mb", type=positive, default=64.0, metavar="MB", help="size of a shard, the most that is lost")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:1; auto takes a GPU if there is one")
    add("--model-dtype", choices=MODEL_DTYPES, default="auto", help="of the teacher's weights; auto: as stored")
    add("--gguf-file", metavar="NAME", help="a GGUF file within MODEL")
    add("--full-logits", action="store_true", help="makes all logits of a batch, whatever the teacher's head")


def run(args: argparse.Namespace) -> int:
    require_packages(*PACKAGES, *(PACKAGES_OF_GGUF if args.gguf_file else ()))
    from topk_rkl.cli import data, models
    from topk_rkl.extraction import Extraction, positions, vocab_size
    from topk_rkl.store import Store

    device = models.device(args.device)
    require_ours(args.out)
    with refusing(f"MODEL {args.model}"):
        config = models.config(args.model, args.gguf_file)
        vocab = vocab_size(config)
    if args.k > vocab:
        raise Refusal(f"--k is {args.k}; it must be at most {vocab}, the vocabulary of {args.model}")
    tokenizer = models.tokenizer(args.model, args.gguf_file)
    read = data.read(args.data, tokenizer, args.text_column, args.max_length, args.limit)
    with refusing():
        extraction = Extraction(
            read.rows, args.out, args.k, tokenizer=tokenizer, vocab_size=vocab, positions=positions(config),
            teacher="/".join(filter(None, (args.model, args.gguf_file))), dtype=args.dtype,
            temperature=args.temperature, batch_tokens=args.batch_tokens, shard_mb=args.shard_mb,
        )  # fmt: skip
    say(f"{len(read.rows):,} rows, {extraction.tokens:,} tokens: {read.about}")
    if extraction.writer.rows and not extraction.writer.complete:
        say(f"going on after row {extraction.writer.rows:,}")
    store = Store(args.out) if extraction.writer.complete else _read_all(args, extraction, device)
    print(f"{args.out}: {len(store):,} rows, {store.positions:,} tokens, K = {args.k}, {store.bytes / 1e6:,.2f} MB")
    if read.cut:
        print(f"{read.cut:,} rows were longer than {args.max_length} tokens and were cut; --max-length keeps more")
    if read.empty:
        print(f"{read.empty:,} rows without a token were left out")
    return 0


def _read_all(args: argparse.Namespace, extraction: Any, device: torch.device) -> Any:
    from topk_rkl.cli import models

    model = models.model(args.model, args.gguf_file, args.model_dtype, device)
    try:
        with refusing(AGAIN.format(**vars(args)), torch.OutOfMemoryError), refusing("", ValueError, OSError):
            return extraction.run(model, full_logits=args.full_logits, progress=True)
    except KeyboardInterrupt:
        say(f"{extraction.writer.rows:,} rows are written; the same command goes on from there")
        raise


def require_ours(out: str) -> None:
    """Refuses a folder with other files before hours are spent, or a minute."""
    from topk_rkl.store import files

    if Path(out).exists():
        with refusing(f"--out {out}"):
            files.require_no_foreign(Path(out))


def say(text: str) -> None:
    print(f"topk-rkl: {text}", file=sys.stderr)
