"""ms-swift: its loss of GKD, and its own command with the plugin."""

import importlib
import inspect
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from swift.rlhf_trainers import gkd_loss as stock, gkd_trainer
from swift.rlhf_trainers.gkd_loss import TeacherOutput
from swift.utils import import_external_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.trainers.pages import FOLDER, blocks
from tests.trainers.small import VOCAB, tiny
from topk_rkl.loss import Support, topk_reverse_kl
from topk_rkl.trainers import swift as ours

PROJECT = "ms-swift"
B, T, K = 2, 9, 5

pytestmark = pytest.mark.filterwarnings("ignore")  # of ms-swift's own


def given(holes: bool = False) -> tuple[Tensor, TeacherOutput, Tensor]:
    """Student logits, the teacher's first K, labels as ms-swift has shifted them."""
    logits, labels = torch.randn(B, T, VOCAB), torch.randint(0, VOCAB, (B, T))
    best = (logits + torch.randn_like(logits)).log_softmax(-1).topk(K)
    labels[:, :3], labels[1, 7:] = -100, -100
    values = best.values.clone()
    values[0, 5] = -torch.inf  # a position of which the server told nothing
    if holes:
        values[0, 4, 3:], values[1, 4, 1:] = -torch.inf, -torch.inf
    return logits, TeacherOutput(topk_logprobs=values, topk_indices=best.indices, labels=labels), labels


def run(loss: Any, logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, int]:
    z = logits.clone().requires_grad_()
    total, count = loss(z, *arguments)
    total.backward()
    return total.detach(), z.grad, int(count)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_loss_gradient_and_count_are_those_of_ms_swift(beta: float, temperature: float) -> None:
    """`gkd_loss` with forward KL, Jensen-Shannon and reverse KL at two temperatures, against ms-swift's own"""
    logits, teacher, labels = given()
    found, theirs = (run(f, logits, teacher, labels, beta, temperature) for f in (ours.gkd_loss, stock.gkd_loss))
    assert found[2] == theirs[2] == 9 and theirs[0] > 0.1
    torch.testing.assert_close(found[0], theirs[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], theirs[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_a_row_that_a_server_told_in_part(beta: float) -> None:
    """rows of fewer than K tokens: finite and right, where ms-swift's own is infinite or NaN"""
    logits, teacher, labels = given(holes=True)
    theirs, found = (run(f, logits, teacher, labels, beta, 1.0) for f in (stock.gkd_loss, ours.gkd_loss))
    assert not (theirs[0].isfinite() and theirs[1].isfinite().all()) and found[2] == 9
    truth, z = 0.0, logits.double().requires_grad_()
    for b, t in (labels != -100).nonzero().tolist():
        live = teacher.topk_logprobs[b, t] > -torch.inf
        log_q = teacher.topk_logprobs[b, t, live].double().log_softmax(-1)
        log_p = z[b, t, teacher.topk_indices[b, t, live]].log_softmax(-1)
        x, y = (log_p, log_q) if beta else (log_q, log_p)
        truth = truth + (x.exp() * (x - y)).sum()
    truth.backward()
    torch.testing.assert_close(found[0].double(), truth.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1].double(), z.grad, rtol=1e-5, atol=1e-6)


def test_a_teacher_that_reads_another_prompt() -> None:
    """self-distillation: the teacher's answer begins at another position"""
    logits, teacher, labels = given()
    pad = torch.full((B, 4), -100)
    moved = TeacherOutput(
        topk_logprobs=torch.cat((torch.randn(B, 4, K), teacher.topk_logprobs), 1),
        topk_indices=torch.cat((torch.zeros(B, 4, K, dtype=torch.long), teacher.topk_indices), 1),
        labels=torch.cat((pad, labels), 1),
    )
    found, same, theirs = (
        run(f, logits, x, labels, 1.0, 1.0)
        for f, x in ((ours.gkd_loss, moved), (ours.gkd_loss, teacher), (stock.gkd_loss, moved))
    )
    assert torch.equal(found[0], same[0]) and torch.equal(found[1], same[1]) and found[2] == 9
    torch.testing.assert_close(found[1], theirs[1], rtol=1e-5, atol=1e-6)


def test_a_batch_without_a_label_keeps_the_graph() -> None:
    """a micro-batch without a token that counts"""
    logits, teacher, labels = given()
    labels.fill_(-100)
    total, grad, count = run(ours.gkd_loss, logits, teacher, labels, 1.0, 1.0)
    assert total == 0 and count == 0 and not grad.any()


def test_the_whole_vocabulary_is_left_to_ms_swift_with_a_warning() -> None:
    """without --gkd_logits_topk: ms-swift's own loss, and a warning; with it, as the warning says, ours"""
    logits, _, labels = given()
    full = TeacherOutput(full_logits=torch.randn(B, T, VOCAB), labels=labels)
    with pytest.warns(UserWarning, match="since gkd_logits_topk is not set; pass --gkd_logits_topk 32"):
        found = run(ours.gkd_loss, logits, full, labels, 1.0, 1.0)
    assert torch.equal(found[0], run(stock.gkd_loss, logits, full, labels, 1.0, 1.0)[0])
    some = full.to_topk(32)
    weights = labels != -100
    truth = topk_reverse_kl(logits, Support(some.topk_indices, some.topk_logprobs), weights=weights, reduction="sum")
    assert torch.equal(run(ours.gkd_loss, logits, some, labels, 1.0, 1.0)[0], truth)


def test_the_function_of_ms_swift_takes_what_we_take() -> None:
    """the signature of the function that is replaced"""
    assert tuple(inspect.signature(stock.gkd_loss).parameters) == ours.PARAMETERS
    assert tuple(inspect.signature(ours.gkd_loss).parameters) == ours.PARAMETERS
    assert gkd_trainer.gkd_loss is ours.gkd_loss


def test_an_ms_swift_that_has_moved_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """an ms-swift whose function has changed is refused by the names of its arguments"""

    def moved(student: Tensor, teacher: Tensor) -> Tensor:
        return student - teacher

    monkeypatch.setattr(gkd_trainer, "gkd_loss", moved)
    monkeypatch.delitem(sys.modules, "topk_rkl.trainers.swift")
    with pytest.raises(ImportError, match=r"takes \(student, teacher\), and not \(student_logits, .* ms-swift==4.6.0"):
        importlib.import_module("topk_rkl.trainers.swift")


def test_our_own_path_is_refused_as_a_plugin() -> None:
    """--external_plugins with the path of our module is refused; the file that the message tells of runs below"""
    before = list(sys.path)
    try:
        with pytest.raises(ImportError, match=r"a file of yours with the line `import topk_rkl.trainers.swift`"):
            import_external_file(ours.__file__)
    finally:
        sys.path[:] = before


def save_models(folder: Path) -> None:
    """Two models whose tokens are characters, and prompts with answers."""
    characters = {chr(i): i - 29 for i in range(32, 29 + VOCAB)}
    letters = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, **characters}, unk_token="?"))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    for seed, name in enumerate(("student", "teacher")):
        tiny(seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    asked = [("one", "two three"), ("four", "five"), ("six seven", "eight"), ("nine", "ten eleven")]
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in asked]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))


SMALL = """
    --model student --teacher_model teacher --model_type llama --teacher_model_type llama --template dummy
    --tuner_type full --torch_dtype float32 --lmbda 0 --max_steps 3 --gradient_accumulation_steps 1
    --logging_steps 1 --per_device_train_batch_size 2 --learning_rate 1e-2 --report_to none --check_model false
    --save_strategy no --eval_strategy no --dataloader_num_workers 0
"""


def command(folder: Path, plugin: bool) -> list[float]:
    """The losses that the command of the page prints, with models that a CPU holds."""
    from swift.pipelines import rlhf_main

    words = shlex.split(blocks("ms-swift.md", "sh")[0].replace("\\\n", " "))
    assert words[:2] == ["swift", "rlhf"]
    asked = dict(zip(words[2::2], words[3::2], strict=True))
    asked |= dict(zip(*(iter(shlex.split(SMALL)),) * 2, strict=True)) | {"--output_dir": str(folder / "out")}
    if not plugin:
        del asked["--external_plugins"]
    rlhf_main([word for pair in asked.items() for word in pair])
    log = max((folder / "out").rglob("logging.jsonl"), key=lambda path: path.stat().st_mtime)
    lines = map(json.loads, log.read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_the_command_of_the_page_prints_the_losses_of_ms_swift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`swift rlhf --rlhf_type gkd` with the plugin of the page: three steps print the losses of ms-swift's own"""
    save_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    text, file = re.search(r'echo "(.*)" > (\S+)', (FOLDER / "ms-swift.md").read_text()).groups()
    assert file == "topk.py"
    (tmp_path / file).write_text(text + "\n")
    monkeypatch.setattr(gkd_trainer, "gkd_loss", stock.gkd_loss)
    theirs = command(tmp_path, plugin=False)
    assert gkd_trainer.gkd_loss is stock.gkd_loss
    monkeypatch.delitem(sys.modules, "topk_rkl.trainers.swift")
    found = command(tmp_path, plugin=True)
    assert gkd_trainer.gkd_loss.__module__ == "topk_rkl.trainers.swift"
    assert len(found) == 3 and found[0] > 0.01 and found[2] != found[0]
    assert found == pytest.approx(theirs, rel=1e-5)
