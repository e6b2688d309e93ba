"""Bias and variance of the token level and the sequence level, in tables that can be listed."""

from examples.paper.variance.experiment import FULL, SEEDS, Size, measure
from examples.paper.variance.page import claims, tables
from examples.paper.variance.picture import draw

__all__ = ["FULL", "SEEDS", "Size", "claims", "draw", "measure", "tables"]
