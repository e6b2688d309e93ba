"""The blocks of a page of docs/integrations, as a reader copies them."""

import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "docs" / "integrations"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (FOLDER / page).read_text(), re.DOTALL)


def scope_of(page: str) -> dict[str, Any]:
    """What the Python of the page defines."""
    scope: dict[str, Any] = {}
    for block in blocks(page, "python"):
        exec(block, scope)
    return scope
