"""The command topk-rkl. Each command is a module, which imports what it needs only where it runs."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from topk_rkl.cli import check, env, extract, inspect
from topk_rkl.cli.refusal import Refusal

DESCRIPTION = "Teachers that run elsewhere: their top-K log-probs, taken once, kept in a store, and looked at."
EPILOG = """\
a first store, and what is in it:
  topk-rkl extract Qwen/Qwen3-8B texts.jsonl --out store --k 64
  topk-rkl inspect store

before a student of another family learns from it:
  topk-rkl check tokenizers Qwen/Qwen3-0.6B Qwen/Qwen3-8B

Each command tells more: topk-rkl extract --help
"""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refusal(f"{message}; see {self.prog} --help")


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The text as it is written, and the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def parser() -> Parser:
    top = Parser(prog="topk-rkl", description=DESCRIPTION, epilog=EPILOG, formatter_class=Help)
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=Parser)
    for command in (extract, inspect, check, env):
        command.add_to(commands, Help)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 1 where a check has found something, or 2 for what cannot be done, or 130 for Ctrl-C."""
    try:
        args = parser().parse_args(argv)
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except Refusal as error:
        print("topk-rkl: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("topk-rkl: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # of `topk-rkl inspect store | head`; what is left in the buffer has no reader
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
