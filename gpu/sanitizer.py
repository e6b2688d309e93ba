"""The CUDA kernels under the tools of compute-sanitizer, side by side.

python -m gpu.sanitizer          every tool over the cases; its lines as they come, each with the name of its tool
python -m gpu.sanitizer cases    the cases alone, which is what a tool runs
"""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# The kernels that a tool checks, by a pattern in their mangled names. CUB sorts within our scratch, and initcheck of
# 2025.3.1 counts no write of a kernel that it does not check.
CHECKED = {
    "memcheck": "topk_rkl|cub",
    "initcheck": "topk_rkl|cub",
    "racecheck": "topk_rkl",
    "synccheck": "topk_rkl",
}
TOOLS = tuple(CHECKED)
FAULTS = 9  # the exit code of a tool that found any


def command(tool: str, *program: str, kernels: str | None = None) -> list[str]:
    """The tool over the program, each tool on a port of its own."""
    port = str(49_152 + 100 * TOOLS.index(tool))
    options = ["--tool", tool, "--error-exitcode", str(FAULTS), "--print-limit", "5", "--port", port]
    if kernels:
        options += ["--kernel-name", f"regex={kernels}"]
    return ["compute-sanitizer", *options, *program]


def over_the_cases(tool: str) -> list[str]:
    return command(tool, sys.executable, "-m", "gpu.sanitizer", "cases", kernels=CHECKED[tool])


def environment() -> dict[str, str]:
    # Without its cache torch asks CUDA for each tensor, whose ends the tool then knows.
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def run_cases(cuda: Any, device: str) -> None:
    """Every entry of the backend, on inputs drawn on the host and copied: a copy counts as a write to initcheck."""
    import torch

    from tests import cases

    for dtype in (torch.bfloat16, torch.float32):
        for vocab, k in ((33, 33), (4_099, 300), (40_003, 64)):
            rows = cases.rows(vocab, k, dtype, ["random", "two_valued", "one_nan"], device)
            cuda.select(rows, k, True)
            loss, ids, g = cuda.select_loss(rows[:1], rows[1:2], k, None, 1.0)
            cuda.support_loss(rows[:1], ids, g, loss, 0.5)
            for unique in (True, False):
                cuda.scatter(g, ids, loss, torch.empty_like(rows[:1]), unique)
        hidden, head = torch.randn(300, 1_030).to(dtype).to(device), torch.randn(400, 1_030).to(dtype).to(device)
        ids, values = torch.randint(-1, 400, (300, 100)).to(device), torch.randn(300, 100).to(device)
        _, g, _ = cuda.linear_loss(hidden, head, head[:, 0], ids, values, None, 1.0, 1.0, 9.0, True)
        cuda.linear_weight_grad(g, ids, hidden, torch.empty_like(head), torch.empty_like(head[:, 0]))
    if device == "cuda":
        torch.cuda.synchronize()


def run_tool(tool: str, codes: dict[str, int]) -> None:
    process = subprocess.Popen(
        over_the_cases(tool),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    for line in process.stdout:
        print(f"{tool}: {line}", end="", flush=True)
    codes[tool] = process.wait()
    print(f"{tool}: ends with {codes[tool]}", flush=True)


def main() -> int:
    if sys.argv[1:] == ["cases"]:
        from tests.direct import Direct
        from topk_rkl.backends import cuda

        run_cases(Direct(cuda), "cpu" if cuda.HOST else "cuda")
        return 0
    codes: dict[str, int] = {}
    threads = [threading.Thread(target=run_tool, args=(tool, codes), daemon=True) for tool in TOOLS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 1 if len(codes) < len(TOOLS) or any(codes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
