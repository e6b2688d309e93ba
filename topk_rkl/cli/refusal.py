"""What cannot be done, and why: one line for people instead of a traceback."""

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec


class Refusal(Exception):
    """Names the argument, its value and the remedy."""


@contextlib.contextmanager
def refusing(what: str = "", *kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds within the block are refusals, their first paragraph after `what`."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, kinds or (TypeError, ValueError, OSError)):
            raise
        reason = str(error).strip().partition("\n\n")[0] or type(error).__name__
        raise Refusal(f"{what}: {reason}" if what else reason) from error


def require_packages(*names: str) -> None:
    """Refuses before anything is done what would fail for want of a package."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise Refusal(f"this needs {', '.join(missing)}, not installed here; run pip install 'topk-rkl[extract]'")
