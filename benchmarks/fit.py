"""How a time grows with a size: the slope of the logarithms by least squares."""

import math
import statistics
from collections import defaultdict
from typing import Any

Points = dict[tuple[str, str, str], dict[int, float]]  # work, contestant, axis -> size -> ms


def points(contests: list[tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]]) -> Points:
    found: Points = defaultdict(dict)
    for case, contest in contests:
        for name, lines in contest.items():
            if name != "floor" and "median_ms" in lines[-1]:
                time = statistics.median(line["median_ms"] for line in lines)
                found[case["work"], name, case["axis"]][case[case["axis"]]] = time
    return found


def exponents(
    contests: list[tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]],
) -> dict[tuple[str, str, str], float]:
    return {key: line(times)[0] for key, times in points(contests).items()}


def line(times: dict[int, float]) -> tuple[float, float]:
    """Exponent and factor."""
    slope, start = statistics.linear_regression(*([math.log(x) for x in xs] for xs in (times, times.values())))
    return slope, math.exp(start)
