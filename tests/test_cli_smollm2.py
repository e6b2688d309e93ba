"""A real teacher: its store survives kill -9, and a student learns from it by the lines of docs/command_line.md."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from examples.smollm2 import PACKAGE, PROMPTS, WEIGHTS, read_prompts, without_layers
from tests.processes import ROOT
from topk_rkl import cli
from topk_rkl.cli import models
from topk_rkl.loss import Support, causal_topk_reverse_kl
from topk_rkl.store import Collator, Store

SHARDS = "--k", "32", "--batch-tokens", "64", "--shard-mb", "0.01"  # a shard is of some 80 tokens
PAGE = ROOT / "docs/command_line.md"
TEXTS = [text for section in read_prompts(PROMPTS).values() for text in section]

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("smollm2")]


def save(model: Any, tokenizer: Any, folder: Path) -> str:
    """As a model that was never a GGUF file, which transformers would not save."""
    config = type(model.config)(**{k: v for k, v in model.config.to_dict().items() if k != "quantization_config"})
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def killed(command: list[str], out: Path) -> int:
    """The rows that are there after kill -9, which comes when there is a first shard."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(out.glob("*.safetensors")):
        time.sleep(0.002)
    assert process.poll() is None, process.stderr.read()
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return len(Store(out, partial=True))


def mean_loss(student: Any, store: Store, pad: int) -> float:
    (batch,) = DataLoader(store, batch_size=len(store), collate_fn=Collator(pad))
    with torch.no_grad():
        logits = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return float(causal_topk_reverse_kl(logits, Support.from_dict(batch), batch["labels"]))


def test_a_killed_store_goes_on_and_a_student_learns_from_it(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, tokenizer = loaded
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    data = str(tmp_path / "texts.txt")

    gguf = str(Path(importlib.util.find_spec(PACKAGE).origin).parent)
    with monkeypatch.context() as patch:
        patch.setattr(models, "model", lambda *_: teacher)  # which is the same file, loaded before
        words = ["extract", gguf, data, "--gguf-file", WEIGHTS, "--out", str(tmp_path / "whole"), *SHARDS]
        assert cli.main(words) == 0

    folder = save(teacher, tokenizer, tmp_path / "teacher")
    command = [sys.executable, "-m", "topk_rkl", "extract", folder, data, "--out", str(tmp_path / "store"), *SHARDS]
    rows = killed(command, tmp_path / "store")
    assert rows < len(TEXTS)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert rows == 0 or f"going on after row {rows}" in done.stderr
    whole, store = Store(tmp_path / "whole"), Store(tmp_path / "store", tokenizer=tokenizer, check="full")
    assert len(store) == len(whole) == len(TEXTS) and len(store.shards) > 3
    for a, b, text in zip(store, whole, TEXTS):
        assert torch.equal(a.input_ids, b.input_ids) and tokenizer.decode(a.input_ids) == text
        assert torch.equal(a.support.ids, b.support.ids) and torch.equal(a.support.log_probs, b.support.log_probs)
    assert cli.main(["check", "store", str(tmp_path / "store")]) == 0

    student = without_layers(teacher, 24)
    save(student, tokenizer, tmp_path / "student")
    before = mean_loss(student, store, tokenizer.pad_token_id)
    monkeypatch.chdir(tmp_path)
    (lines,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    scope: dict = {}
    exec(lines, scope)
    after = mean_loss(scope["student"], store, tokenizer.pad_token_id)
    assert mean_loss(teacher, store, tokenizer.pad_token_id) < 1e-4 < after < 0.8 * before
