"""`topk-rkl check`: whether two tokenizers agree, or a store is whole. Exit code 1 where something is wrong."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from topk_rkl.cli.refusal import Refusal, require_packages

ROWS = 256  # of which the next tokens are looked up
ABOUT = "check that tokenizers agree, or that a store is whole: exit code 1 if not"
OF_TOKENIZERS = "compare the tokens of student and teacher, and say what to do where they differ"
OF_STORE = "compare the files of a store with its manifest, and each position with the next token"


def add_to(commands: Any, formatter: Any) -> None:
    command = commands.add_parser("check", help=ABOUT, description=ABOUT.capitalize(), formatter_class=formatter)
    kinds = command.add_subparsers(title="what to check", required=True, metavar="WHAT")

    def kind(name: str, about: str, words: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        example, told = f"example:\n  topk-rkl check {name} {words}", about.capitalize()
        made: argparse.ArgumentParser = kinds.add_parser(
            name, help=about, description=told, epilog=example, formatter_class=formatter
        )
        made.set_defaults(run=run)
        return made

    pair = kind("tokenizers", OF_TOKENIZERS, "Qwen/Qwen3-0.6B Qwen/Qwen3-8B", check_pair)
    pair.add_argument("student", metavar="STUDENT", help="a folder, or a name for from_pretrained of transformers")
    pair.add_argument("teacher", metavar="TEACHER", help="the same of the teacher")
    pair.add_argument("--student-gguf", metavar="NAME", help="a GGUF file within STUDENT")
    pair.add_argument("--teacher-gguf", metavar="NAME", help="a GGUF file within TEACHER")
    store = kind("store", OF_STORE, "./store --full --tokenizer Qwen/Qwen3-0.6B", check_store)
    store.add_argument("store", metavar="DIR", help="a finished store")
    store.add_argument("--tokenizer", metavar="MODEL", help="the student, whose ids must be those of the store")
    store.add_argument("--gguf-file", metavar="NAME", help="a GGUF file within MODEL")
    store.add_argument("--full", action="store_true", help="reads every file, and compares its hash")


def check_pair(args: argparse.Namespace) -> int:
    require_packages("transformers")
    from topk_rkl.cli import models
    from topk_rkl.extraction import vocab_size
    from topk_rkl.tokenizers import check_tokenizers

    sides = (args.student, args.student_gguf), (args.teacher, args.teacher_gguf)
    student, teacher = (models.tokenizer(*side) for side in sides)
    sizes = [vocab_size(models.config(*side)) for side in sides]
    report = check_tokenizers(student, teacher, student_vocab=sizes[0], teacher_vocab=sizes[1])
    print(report)
    return 0 if report.same else 1


def check_store(args: argparse.Namespace) -> int:
    require_packages("safetensors", *(["transformers"] * bool(args.tokenizer)))
    from topk_rkl.cli import models
    from topk_rkl.cli.inspect import inside, spread
    from topk_rkl.store import Store
    from topk_rkl.store.files import MANIFEST

    if not Path(args.store, MANIFEST).is_file():
        raise Refusal(f"DIR {args.store} has no {MANIFEST}; give a folder that extract or a Writer wrote")
    tokenizer = models.tokenizer(args.tokenizer, args.gguf_file) if args.tokenizer else None
    try:
        store = Store(args.store, check="full" if args.full else "fast", tokenizer=tokenizer)
    except (ValueError, FileNotFoundError) as error:
        print(error)
        return 1
    rows = spread(store, ROWS)
    shares = inside(rows)
    told = f"next token inside S at shifts 0, 1, 2: {', '.join(f'{share:.3f}' for share in shares)}"
    if max(shares) > shares[1] + noise(sum(len(row.input_ids) for row in rows)):
        print(f"{args.store}: positions do not speak of the token after them; {told}; write it again")
        return 1
    read = "every file has its hash" if args.full else "every file has its size and header (--full reads them)"
    print(f"{args.store}: whole; {len(store):,} rows, {store.positions:,} tokens; {read}; {told}")
    return 0


def noise(tokens: int) -> float:
    """Three standard deviations, at most, of the difference of two shares of so many tokens."""
    return float(3 * (0.5 / tokens) ** 0.5)
