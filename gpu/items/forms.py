"""An item: one piece of work at some sizes, done in one or several forms that take turns."""

from dataclasses import dataclass, field
from typing import NamedTuple

from gpu.items.timing import Call


class Form(NamedTuple):
    call: Call
    backend: str = ""  # of this package, which may be unable to run here; empty for plain PyTorch


@dataclass(frozen=True)
class Item:
    """What must move is what benchmarks/predict.py counts: whole rows of logits, K rows of the head per position.

    What the K slots of a position move besides is left out, so a share at a large K is, if anything, too low.
    """

    name: str
    forms: dict[str, Form]  # the first is what the others are compared with
    kernel: str = ""  # of the predictions, if they have it
    read: int = 0  # bytes that must be read
    written: int = 0  # and written
    sizes: dict[str, int | str] = field(default_factory=dict)
    decision: str = ""  # what the forms compete for, in experiments.DECISIONS
    floor: str = ""  # the form that is the floor of the others, where the rates of the card do not apply
    host_calls: int = 0  # if any, the host's time of a call is meant, over so many
