"""csrc/ under AddressSanitizer and UndefinedBehaviorSanitizer, against a stable sort on rows drawn byte by byte.

By hand, for longer: `build/fuzz 600 SEED`, built as here, also with `-DTOPK_RKL_SANITIZE=thread`.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import BACKENDS, DEVICE

ROOT = Path(__file__).parent.parent
SECONDS = "10"

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu" or "native" not in BACKENDS, reason="the extension was not built here"),
    pytest.mark.skipif(not shutil.which("cmake"), reason="CMake is not installed here"),
    pytest.mark.xdist_group("sanitized"),
]


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sanitized")
    configure = ["cmake", "-S", ROOT, "-B", folder, "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS=-O1"]
    subprocess.run([*configure, "-DTOPK_RKL_SANITIZE=address,undefined"], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", folder, "--target", "fuzz"], check=True, capture_output=True)
    return str(folder / "fuzz")


def test_the_sanitizer_catches_a_planted_fault_in_the_extension(fuzz: str) -> None:
    outcome = subprocess.run([fuzz, "plant"], capture_output=True, text=True, timeout=100)
    assert outcome.returncode != 0 and outcome.stdout.strip() == "in bounds"
    assert "heap-buffer-overflow" in outcome.stderr


def test_any_bytes_give_the_stable_order_and_no_fault(fuzz: str) -> None:
    outcome = subprocess.run([fuzz, SECONDS], capture_output=True, text=True, timeout=300)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert int(outcome.stdout.split()[0]) > 100
