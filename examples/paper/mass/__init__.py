"""The critics' claim: whether the student's probability leaks out of S, and what stops the leak."""

from examples.paper.mass.experiment import FULL, SEEDS, Size, measure
from examples.paper.mass.page import tables
from examples.paper.mass.picture import draw
from examples.paper.mass.verdicts import claims

__all__ = ["FULL", "SEEDS", "Size", "claims", "draw", "measure", "tables"]
