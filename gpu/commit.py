"""The commit of the code that runs."""

import os
import subprocess
from pathlib import Path


def commit(root: Path) -> str:
    """COMMIT says it; else git does, with -dirty for changes other than results; else unknown."""
    if given := os.environ.get("COMMIT"):
        return given
    head = git(root, "rev-parse", "HEAD")
    changed = git(root, "status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results")
    return (head or "unknown") + ("-dirty" if changed else "")


def git(root: Path, *arguments: str) -> str:
    """What it says, or nothing outside a repository or without git."""
    try:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""
