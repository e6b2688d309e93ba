"""Numbers of several seeds in words and tables, and what they say about a claim."""

import statistics
from collections.abc import Sequence
from typing import Any

from torch import Tensor

# 97.5 % quantiles for 1 to 10 degrees of freedom. More than 11 values take the last, which is a little too wide.
STUDENTS_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
Rows = list[list[str]]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % confidence interval by Student's t; NaN for a single value."""
    if len(values) < 2:
        return statistics.fmean(values), float("nan")
    quantile = STUDENTS_T[min(len(values) - 1, len(STUDENTS_T)) - 1]
    return statistics.fmean(values), quantile * statistics.stdev(values) / len(values) ** 0.5


def above(values: Sequence[float], limit: float = 0.0) -> bool | None:
    """Whether the mean is above the limit; None where the interval holds the limit, or where there is no interval."""
    if len(values) < 2:
        return None
    mean, half = interval(values)
    return mean > limit if abs(mean - limit) > half else None


def every(verdicts: Sequence[bool | None]) -> bool | None:
    """True if all are, False if one is, and None otherwise."""
    return False if False in verdicts else None if None in verdicts else True


def shown(values: Sequence[float], digits: int = 3) -> str:
    """The mean, and half its interval where there are several values."""
    if not values:
        return "none"
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def reach(values: Sequence[float], form: str = ".3g") -> str:
    """The median, the smallest and the largest."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def rounded(x: Any) -> Any:
    """What JSON holds of it: lists for tensors and tuples, text for keys, five digits for floats."""
    if isinstance(x, Tensor):
        return rounded(x.tolist())
    if isinstance(x, dict):
        return {str(key): rounded(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [rounded(value) for value in x]
    return float(f"{x:.5g}") if isinstance(x, float) else x


def markdown(rows: Rows) -> str:
    """A table; a column of numbers is flush right. A list, such as an arXiv number and a section, is no number."""
    right = [all(cell[:1] in "+-0123456789" and ", " not in cell for cell in column) for column in zip(*rows[1:])]
    lines = [rows[0], ["---:" if x else "---" for x in right], *rows[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
