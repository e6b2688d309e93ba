"""Errors after which a process can no longer use its GPU: whatever it runs next fails too."""

import re

LOST = re.compile(
    r"illegal memory access|illegal instruction|misaligned address|illegal address|unspecified launch failure"
    r"|launch timed out|device-side assert|uncorrectable ECC|hardware stack error"
)


def lost(text: str) -> bool:
    return LOST.search(text) is not None
