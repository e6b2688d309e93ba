"""The paper's comparison on small transformers and a task that a program checks."""

from examples.paper.method.experiment import FULL, SEEDS, Size, measure
from examples.paper.method.page import claims, tables
from examples.paper.method.picture import draw

__all__ = ["FULL", "SEEDS", "Size", "claims", "draw", "measure", "tables"]
