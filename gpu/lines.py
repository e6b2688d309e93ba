"""Files of JSON lines that a kill cannot spoil."""

import json
import os
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def append(file: Path, line: Line) -> None:
    """In one write to the end, so that writers side by side cut no line and nothing waits in a buffer."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, (json.dumps(line) + "\n").encode())
    finally:
        os.close(descriptor)


def read(file: Path) -> list[Line]:
    """Every whole line; none where there is no file."""
    if not file.exists():
        return []
    *whole, _rest = file.read_text().split("\n")
    return [json.loads(line) for line in whole]
