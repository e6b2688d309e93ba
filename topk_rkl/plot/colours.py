"""The colours of a loss, and of both sides. Text on every one of them keeps a contrast of 4.5 to 1."""

import math

LEVELS = 16
INK, PAPER = ("#1b1d22", "#f1f2f4"), ("#ffffff", "#15171c")  # of a light page, and of a dark one
STUDENT, TEACHER = ("#2f6fdb", "#6ea1ff"), ("#7d8590", "#9aa3af")
NOT_A_NUMBER = "#7c3aed"  # with white text
STOPS = (
    ("#ffffff", "#fff1d9", "#ffcf96", "#fb9a63", "#ec6648"),
    ("#15171c", "#37291d", "#65381c", "#943f20", "#bb3b2b"),
)


def _ramp(stops: tuple[str, ...]) -> list[str]:
    """LEVELS colours from the first stop to the last."""
    return [_between(stops, level * (len(stops) - 1) / (LEVELS - 1)) for level in range(LEVELS)]


def _between(stops: tuple[str, ...], at: float) -> str:
    first = min(int(at), len(stops) - 2)
    a, b = (bytes.fromhex(stop[1:]) for stop in stops[first : first + 2])
    return "#" + bytes(round(x + (y - x) * (at - first)) for x, y in zip(a, b)).hex()


RAMPS = tuple(map(_ramp, STOPS))


def level(loss: float, largest: float) -> int | None:
    """0 for no loss to LEVELS - 1 for the largest, by the square root, which tells small ones apart; None for NaN."""
    if math.isnan(loss):
        return None
    return round((LEVELS - 1) * math.sqrt(min(loss / largest, 1))) if largest > 0 else 0


def loss_at(level: float, largest: float) -> float:
    """What `level` makes of the loss, undone."""
    return largest * (level / (LEVELS - 1)) ** 2
