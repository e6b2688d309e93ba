"""This package as it was at another commit, in a process of its own that takes its turn when asked."""

import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Client, Listener
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.cases import Case
    from benchmarks.measure import Passes

ROOT = Path(__file__).parent.parent


class Rival:
    """A worker whose `topk_rkl` is that of the commit, and whose benchmarks are these."""

    def __init__(self, ref: str, device: str, threads: int) -> None:
        command = ["git", "rev-parse", "--short", f"{ref}^{{commit}}"]
        self.ref = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
        tree = ROOT / "build" / "against" / self.ref
        if not tree.exists():
            subprocess.run(["git", "clone", "-q", "--shared", ROOT, tree], check=True)
            subprocess.run(["git", "checkout", "-q", "--detach", self.ref], check=True, cwd=tree)
            subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], check=True, cwd=tree)
        with Listener() as listener:
            arguments = [str(tree), str(listener.address), device, str(threads)]
            self.process = subprocess.Popen([sys.executable, "-m", "benchmarks.against", *arguments], cwd=ROOT)
            self.connection = listener.accept()

    def __enter__(self) -> "Rival":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.connection.close()
        self.process.wait()

    def turn(self, case: "Case") -> Callable[[], "Passes"]:
        self.connection.send(case)

        def turn() -> "Passes":
            self.connection.send(None)
            return self.connection.recv()

        return turn


def serve(tree: str, address: str, device: str, threads: str) -> None:
    sys.path.insert(0, tree)
    import topk_rkl

    assert Path(topk_rkl.__file__).is_relative_to(tree), "the package of the commit was not found first"
    sys.path.remove(tree)  # what else is there is not meant
    import torch

    from benchmarks.contestants import CONTESTANTS
    from benchmarks.measure import Stage
    from benchmarks.problems import Problem

    torch.set_num_threads(int(threads))
    stage, runner = Stage(device), None
    with Client(address) as connection:
        while True:
            try:
                case = connection.recv()
            except EOFError:
                return
            if case is None:
                connection.send(stage.passes(runner))
            else:
                (build,) = (c.build for c in CONTESTANTS if (c.name, c.work) == ("topk_rkl", case.work))
                runner = build(Problem(case, device))


if __name__ == "__main__":
    serve(*sys.argv[1:])
