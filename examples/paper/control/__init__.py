"""The controlled study of appendix E: gamma, the variance of the gradient, and drift."""

from examples.paper.control.experiment import FULL, SEEDS, Size, measure
from examples.paper.control.page import claims, tables
from examples.paper.control.picture import draw

__all__ = ["FULL", "SEEDS", "Size", "claims", "draw", "measure", "tables"]
