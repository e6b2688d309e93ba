"""The clock: forms of an item take turns, by events on a GPU whose queue is never empty.

A kernel that waits keeps the GPU busy until the call is queued, so the host's time is not in the GPU's. It is measured
apart.
"""

import time
from collections.abc import Callable, Iterator

import torch

Call = Callable[[int], object]  # is given a number that no other turn has, so that it can take other rows

WAIT = 2_000_000  # cycles, about a millisecond: longer than the host takes to queue any call
WARM_UPS = 2
HOST_ROUNDS = 5


class Clock:
    def __init__(self, device: str, rounds: int) -> None:
        self.device, self.rounds = device, rounds

    def warm_up(self, call: Call) -> None:
        """Compiles, fills torch's pool of memory, and lets a fault show under the name of who made it."""
        for i in range(min(WARM_UPS, self.rounds - 1)):  # none in a rehearsal of one round
            call(i)
        self._finish()

    def take_turns(self, calls: dict[str, Call]) -> dict[str, list[float]]:
        """Milliseconds of every round of each call: first of all, second of all, and so on."""
        if self.device != "cuda":
            return self._on_cpu(calls)
        marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
        for i, name in self._turns(calls):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(WAIT)
            before.record()
            calls[name](i)
            after.record()
            marks[name].append((before, after))
        self._finish()
        return {name: [before.elapsed_time(after) for before, after in pairs] for name, pairs in marks.items()}

    def host_turns(self, calls: dict[str, Call], count: int) -> dict[str, list[float]]:
        """Milliseconds that the host takes for a call, over `count` calls that nobody waits for."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(HOST_ROUNDS if self.device == "cuda" else 1):
            for name, call in calls.items():
                start = time.perf_counter()
                for i in range(count):
                    call(i)
                times[name].append((time.perf_counter() - start) * 1e3 / count)
                self._finish()
        return times

    def _on_cpu(self, calls: dict[str, Call]) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in calls}
        for i, name in self._turns(calls):
            start = time.perf_counter()
            calls[name](i)
            times[name].append((time.perf_counter() - start) * 1e3)
        return times

    def _turns(self, calls: dict[str, Call]) -> Iterator[tuple[int, str]]:
        """The first numbers were those of warm-ups."""
        return enumerate((name for _ in range(self.rounds) for name in calls), start=WARM_UPS)

    def _finish(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
