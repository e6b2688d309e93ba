"""A real teacher: its store survives kill -9, a student learns from it by the README's lines, and a page shows where
it errs.
"""

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
from transformers import TrainingArguments

from examples.smollm2 import PROMPTS, read_prompts, without_layers
from tests.processes import ROOT
from topk_rkl import cli
from topk_rkl.cli import models
from topk_rkl.loss import Support, causal_topk_reverse_kl, topk_reverse_kl
from topk_rkl.plot import save_html, token_report
from topk_rkl.store import Collator, Store

SHARDS = "--k", "32", "--batch-tokens", "64", "--shard-mb", "0.005"  # a shard is of some 40 tokens
TEXTS = [text for section in read_prompts(PROMPTS).values() for text in section][:24]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
(LINES,) = (block for block in BLOCKS if 'Store("store", tokenizer=tokenizer)' in block)

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("smollm2")]


def plain(model: Any) -> Any:
    """A copy that was never a GGUF file, which transformers would neither save nor train."""
    config = type(model.config)(**{k: v for k, v in model.config.to_dict().items() if k != "quantization_config"})
    copy = type(model)(config)
    copy.load_state_dict(model.state_dict())
    return copy


def killed(command: list[str], out: Path) -> int:
    """The rows that are there after kill -9, which comes when there is a second shard, so that a first is stored."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(list(out.glob("*.safetensors*"))) < 2:
        time.sleep(0.002)
    assert process.poll() is None, process.stderr.read()
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return len(Store(out, partial=True))


def mean_loss(student: Any, store: Store, pad: int) -> float:
    (batch,) = DataLoader(store, batch_size=len(store), collate_fn=Collator(pad))
    with torch.no_grad():
        logits = student.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return float(causal_topk_reverse_kl(logits, Support.from_dict(batch), batch["labels"]))


def test_a_killed_store_goes_on_a_student_learns_from_it_and_a_page_shows_where_it_errs(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    teacher, tokenizer = loaded
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("\n".join(TEXTS))
    for part in (plain(teacher), tokenizer):
        part.save_pretrained("teacher")
    words = ["extract", str(tmp_path / "teacher"), str(tmp_path / "texts.txt"), *SHARDS, "--out"]
    out = str(tmp_path / "store")
    rows = killed([sys.executable, "-m", "topk_rkl", *words, out], Path(out))
    assert 0 < rows < len(TEXTS)
    with monkeypatch.context() as patch:
        patch.setattr(models, "model", lambda *_: teacher)  # which is the same, loaded before
        assert cli.main([*words, out]) == cli.main([*words, "whole"]) == 0
    assert f"going on after row {rows}" in capsys.readouterr().err
    whole, store = Store("whole"), Store("store", tokenizer=tokenizer, check="full")
    assert len(store) == len(whole) == len(TEXTS) and len(store.shards) > 3
    for a, b, text in zip(store, whole, TEXTS):
        assert torch.equal(a.input_ids, b.input_ids) and tokenizer.decode(a.input_ids) == text
        assert torch.equal(a.support.ids, b.support.ids) and torch.equal(a.support.log_probs, b.support.log_probs)
    assert cli.main(["check", "store", "store"]) == 0

    student, pad = plain(without_layers(teacher, 24)), tokenizer.pad_token_id
    before = mean_loss(student, store, pad)
    args = TrainingArguments(
        "out", num_train_epochs=1, per_device_train_batch_size=4, learning_rate=2e-4, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    exec(LINES, {"tokenizer": tokenizer, "student": student, "args": args})
    assert mean_loss(teacher, store, pad) < 1e-4 < mean_loss(student, store, pad) < 0.8 * before

    row = store[0]
    with torch.no_grad():
        logits = student(row.input_ids[None]).logits[0]
    losses = topk_reverse_kl(logits, row.support, reduction="none")[:-1]
    report = token_report(logits, row.support, row.input_ids, tokenizer)
    save_html(report, "errors.html")
    worst = int(losses.argmax())
    assert report.worst(1) == [(0, worst)] and losses.max() > 0.01
    assert report.token((0, worst)).replace("·", " ") == tokenizer.decode([row.input_ids[worst + 1]])
    listed = re.findall(r'<li><a href="#(\S+?)"', Path("errors.html").read_text())
    assert listed[0] == f"0.{worst}"
