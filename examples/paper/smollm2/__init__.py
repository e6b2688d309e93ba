"""The objectives on a real language model, on questions that a program checks and on open text."""

from examples.paper.smollm2.experiment import FULL, SEEDS, Size, measure
from examples.paper.smollm2.page import claims, tables
from examples.paper.smollm2.picture import draw

__all__ = ["FULL", "SEEDS", "Size", "claims", "draw", "measure", "tables"]
