"""The three failure modes, in real answers of SmolLM2."""

from examples.paper.failures.experiment import FULL, SEEDS, Size, measure
from examples.paper.failures.page import claims, tables
from examples.paper.failures.picture import draw

__all__ = ["FULL", "SEEDS", "Size", "claims", "draw", "measure", "tables"]
