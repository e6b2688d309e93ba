"""csrc/ under AddressSanitizer and UndefinedBehaviorSanitizer: the native cases, and rows drawn byte by byte.

By hand, for longer: `fuzz 600 SEED`, built as here, also with `-DTOPK_RKL_SANITIZE=thread`.
"""

import os
from pathlib import Path

import pytest
from conftest import BACKENDS, DEVICE

from tests.processes import SANITIZED, built, can_build, package, run, sanitized_python

SECONDS = "10"
ONE_TOO_MANY = """
import torch
from topk_rkl import _native
row = torch.randn(5_000).bfloat16()
ids, log_probs = torch.empty(4, dtype=torch.int32), torch.empty(4)
print("in bounds", flush=True)
logits = (row.data_ptr(), 0, 1, 5_001, 5_001, 1, 1, 0)
_native.select((logits, False, (ids.data_ptr(), 4), (log_probs.data_ptr(), 4)), 1)
"""

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu" or "native" not in BACKENDS, reason="the extension was not built here"),
    can_build,
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def build() -> Path:
    return built("native-sanitized", "fuzz", "_native", options=SANITIZED)


def test_the_sanitizer_catches_a_planted_fault_in_the_extension(
    build: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    around = package(tmp_path_factory, build)
    for outcome in (run([build / "fuzz", "plant"]), sanitized_python(around, "-c", ONE_TOO_MANY)):
        assert outcome.returncode != 0 and outcome.stdout.strip() == "in bounds", outcome.stderr
        assert "heap-buffer-overflow" in outcome.stderr


def test_the_native_cases_without_a_fault(build: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    options = ["-q", "-s", "-c", os.devnull, "--rootdir", ".", "-p", "no:cacheprovider", "-W", "ignore"]
    options += ["-k", "native and not extremes"]  # whose sums in 50 digits take longer than the code that is checked
    files = ("native", "select", "loss", "linear", "linear_loss", "divergence", "mass", "slabs")
    tests = [f"tests/test_{file}.py" for file in files]
    outcome = sanitized_python(package(tmp_path_factory, build), "-m", "pytest", *options, *tests)
    assert outcome.returncode == 0 and " passed" in outcome.stdout, outcome.stdout + outcome.stderr


def test_any_bytes_give_the_stable_order_and_no_fault(build: Path) -> None:
    cases = seed = 0
    while cases <= 10:  # of which a busy machine has few at a time
        outcome = run([build / "fuzz", SECONDS, str(seed)])
        assert outcome.returncode == 0, outcome.stdout + outcome.stderr
        cases, seed = cases + int(outcome.stdout.split()[0]), seed + 1
