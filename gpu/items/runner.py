"""Items one after the other: what fails is a line of the results, and the next one runs."""

import time

import torch

from gpu.items.forms import Form, Item
from gpu.items.records import Line, Records, described, floor_rates, measured
from gpu.items.timing import Clock
from topk_rkl import backends

DEVICE_LOST = 3  # the exit code where no later call of this process can succeed; another process may go on


def run(items: list[Item], file: Records, clock: Clock, skip_done: bool = False) -> int:
    """Exit code 1 if a form failed, DEVICE_LOST if the items after it could not be tried."""
    failed = 0
    if skip_done:
        for name in file.cut_short():
            failed = 1
            file.write({"item": name, "error": "the process ended during this item"})
        done = file.done()
        items = [item for item in items if item.name not in done]
    for item in items:
        file.begin(item)
        if try_item(item, file, clock):
            failed = 1
            if device_lost(clock.device):
                return DEVICE_LOST
    return failed


def try_item(item: Item, file: Records, clock: Clock) -> bool:
    """Writes a line per form and says whether one failed: to be missing, as a backend may be, is no failure."""
    start = time.monotonic()
    found: dict[str, Line] = {}
    calls = {}
    for label, form in item.forms.items():
        if reason := unable(form):
            found[label] = {"missing": reason}
            continue
        try:
            clock.warm_up(form.call)
            calls[label] = form.call
        except Exception as error:
            found[label] = {"error": in_short(error)}
    try:
        times = clock.host_turns(calls, item.host_calls) if item.host_calls else clock.take_turns(calls)
        found |= measured(item, times, floor_rates(file.lines), file.shared["device"])
    except Exception as error:
        found |= {label: {"error": in_short(error)} for label in calls}
    took = round(time.monotonic() - start, 2)
    for label, form in item.forms.items():
        file.write({**described(item, label, form.backend), **found[label], "took_s": took})
    return any("error" in line for line in found.values())


def unable(form: Form) -> str | None:
    return backends.unavailable(form.backend) if form.backend else None


def device_lost(device: str) -> bool:
    """After an illegal access or a fault every call fails, this one too."""
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        return True
    return False


def in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]
