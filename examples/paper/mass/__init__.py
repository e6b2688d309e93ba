"""The critics' claim: whether the student's probability leaks out of S, and what stops the leak."""

from examples.paper.mass.experiment import FULL, SEEDS, Size, measure
from examples.paper.mass.page import claims, tables
from examples.paper.mass.picture import draw

__all__ = ["FULL", "SEEDS", "Size", "claims", "draw", "measure", "tables"]
