"""The command topk-rkl: what it reads, what it prints, and what it refuses in one line."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from tests import tiny_teacher  # isort: skip  it keeps the hub out

import datasets
import pytest
import torch

from tests.processes import run
from tests.tiny_teacher import TEXTS
from topk_rkl import cli
from topk_rkl.cli import models, refusal
from topk_rkl.store import Header, Row, Store, Writer
from topk_rkl.support import Support

K = 8
CHATS = [[{"role": "user", "content": "The sea is"}, {"role": "assistant", "content": "cold."}] for _ in range(3)]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_teacher.save(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def chat_teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_teacher.save(tmp_path_factory.mktemp("chat"), chat_template=tiny_teacher.MARKED)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def texts(tmp_path: Path) -> str:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS))
    return str(path)


@pytest.fixture
def out(tmp_path: Path) -> str:
    return str(tmp_path / "store")


@pytest.fixture
def store(teacher: str, texts: str, out: str, capsys: pytest.CaptureFixture) -> str:
    assert cli.main(["extract", teacher, texts, "--out", out, "--k", str(K)]) == 0
    capsys.readouterr()
    return out


def refused(capsys: pytest.CaptureFixture, *words: str) -> str:
    """The one line that says why."""
    capsys.readouterr()
    assert cli.main(words) == 2
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line.startswith("topk-rkl: ")]
    assert printed.out == "" and line.startswith("topk-rkl: error: ") and "Traceback" not in printed.err
    return line


def test_a_text_file_is_a_document_per_line(teacher: str, texts: str, out: str, capsys: pytest.CaptureFixture) -> None:
    Path(texts).write_text("\n\n".join(TEXTS) + "\n   \n")
    assert cli.main(["extract", teacher, texts, "--out", out, "--k", str(K)]) == 0
    printed = capsys.readouterr()
    found, want = Store(out), [tiny_teacher.tokenizer()(text)["input_ids"] for text in TEXTS]
    assert [row.input_ids.tolist() for row in found] == want and found.header.k == K
    assert (found.header.teacher, found.header.vocab_size) == (teacher, tiny_teacher.V)
    tokens = sum(map(len, want))
    assert printed.out.splitlines()[0].startswith(f"{out}: {len(TEXTS)} rows, {tokens} tokens, K = {K}, ")
    assert f"{len(TEXTS)} rows without a token were left out" in printed.out
    assert (
        f"{len(TEXTS)} rows, {tokens} tokens: texts of column text" in printed.err
        and f"{tokens}/{tokens}" in printed.err
    )


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder"])
def test_rows_come_from_files_and_folders_alike(
    kind: str, teacher: str, store: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data, path = datasets.Dataset.from_dict({"id": list(range(len(TEXTS))), "text": TEXTS}), tmp_path / f"data.{kind}"
    write = {"folder": data.save_to_disk, "parquet": data.to_parquet}.get(kind, data.to_json)
    write(str(path))
    again = str(tmp_path / "again")
    assert cli.main(["extract", teacher, str(path), "--out", again, "--k", str(K)]) == 0
    assert same_rows(Store(again), Store(store))
    assert kind != "folder" or not list(path.glob("cache*"))


def same_rows(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.input_ids, y.input_ids)
        and all(torch.equal(p, q) for p, q in zip(x.support.tensors, y.support.tensors))
        and (x.loss_mask is None) == (y.loss_mask is None)
        and (x.loss_mask is None or torch.equal(x.loss_mask, y.loss_mask))
        for x, y in zip(a, b)
    )


def test_a_chat_template_tells_what_the_student_learns(chat_teacher: str, out: str, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": chat}) for chat in CHATS))
    assert cli.main(["extract", chat_teacher, str(path), "--out", out, "--k", "4"]) == 0
    row, tokenizer = Store(out)[0], tiny_teacher.tokenizer()
    assert tokenizer.decode(row.input_ids) == "user:The sea is;assistant:cold.;"
    assert tokenizer.decode(row.input_ids[row.loss_mask]) == "cold."


def test_a_chat_template_without_marks_makes_every_token_count(
    tmp_path: Path, out: str, capsys: pytest.CaptureFixture
) -> None:
    plain = tiny_teacher.MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    teacher = tiny_teacher.save(tmp_path / "teacher", chat_template=plain)
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": chat}) for chat in CHATS))
    assert cli.main(["extract", teacher, str(path), "--out", out, "--k", "4"]) == 0
    assert Store(out)[0].loss_mask is None
    assert "every token counts, as the template marks no answers" in capsys.readouterr().err


@pytest.mark.parametrize("mask", ["labels", "loss_mask", None])
def test_ids_are_taken_as_they_are(mask: str | None, teacher: str, out: str, tmp_path: Path) -> None:
    path, values = tmp_path / "ids.jsonl", {"labels": [-100, 9, 11], "loss_mask": [False, True, True]}
    row = {"input_ids": [7, 9, 11], "text": "not this"} | ({mask: values[mask]} if mask else {})
    path.write_text(json.dumps(row) + "\n" + json.dumps(row))
    assert cli.main(["extract", teacher, str(path), "--out", out, "--k", "4"]) == 0
    found = Store(out)[1]
    assert found.input_ids.tolist() == [7, 9, 11]
    assert found.loss_mask is None if mask is None else found.loss_mask.tolist() == [False, True, True]


def test_another_column_a_limit_and_a_length(
    teacher: str, out: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": "not this", "story": text}) for text in TEXTS))
    words = "--text-column", "story", "--limit", "4", "--max-length", "7"
    assert cli.main(["extract", teacher, str(path), "--out", out, "--k", "4", *words]) == 0
    ids = [tiny_teacher.tokenizer()(text)["input_ids"] for text in TEXTS[:4]]
    assert [row.input_ids.tolist() for row in Store(out)] == [x[:7] for x in ids]
    cut = sum(len(x) > 7 for x in ids)
    assert 0 < cut < 4
    assert f"{cut} rows were longer than 7 tokens and were cut; --max-length keeps more" in capsys.readouterr().out


def test_options_reach_the_store(teacher: str, texts: str, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load, dtypes = models.model, []

    def watched(*args: Any) -> Any:
        model = load(*args)
        dtypes.append(model.dtype)
        return model

    monkeypatch.setattr(models, "model", watched)
    options = {
        "dtype": "float32",
        "temperature": "0.5",
        "model-dtype": "bfloat16",
        "batch-tokens": "30",
        "device": "cpu",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    assert cli.main(["extract", teacher, texts, "--out", out, "--k", "4", *words, "--full-logits"]) == 0
    assert (Store(out).header.log_probs_dtype, Store(out).header.temperature) == ("float32", 0.5)
    assert dtypes == [torch.bfloat16]


def test_ctrl_c_says_how_to_go_on_and_a_whole_store_needs_no_model(
    teacher: str, texts: str, store: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["extract", teacher, texts, "--out", str(tmp_path / "stopped"), "--k", str(K), "--shard-mb", "0.001"]
    load, seen = models.model, []

    def stop(*_: Any) -> None:
        seen.append(0)
        if len(seen) > 3:
            raise KeyboardInterrupt

    def stopping(*args: Any) -> Any:
        model = load(*args)
        model.register_forward_pre_hook(stop)
        return model

    monkeypatch.setattr(models, "model", stopping)
    assert cli.main(words) == 130
    rows = len(Store(tmp_path / "stopped", partial=True))
    assert 0 < rows < len(TEXTS)
    assert f"topk-rkl: {rows} rows are written; the same command goes on from there" in capsys.readouterr().err
    monkeypatch.setattr(models, "model", load)
    assert cli.main(words) == 0
    printed, tokens = capsys.readouterr().err, Store(store).positions
    assert f"going on after row {rows}" in printed and f"{tokens}/{tokens}" in printed
    assert same_rows(Store(tmp_path / "stopped"), Store(store))
    monkeypatch.delattr(models, "model")
    assert cli.main(words) == 0 and "going on" not in capsys.readouterr().err


def test_what_the_teacher_cannot_hold_is_told_with_a_remedy(
    teacher: str, texts: str, out: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = models.model

    def full(*args: Any) -> Any:
        model = load(*args)
        model.model.embed_tokens.register_forward_pre_hook(raise_memory)
        return model

    def raise_memory(_: Any, given: tuple[torch.Tensor]) -> None:
        if given[0].numel() > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(models, "model", full)
    words = ["extract", teacher, texts, "--out", out, "--k", "4"]
    capsys.readouterr()
    assert cli.main(words) == 2
    assert "go on with a --batch-tokens below 8192" in capsys.readouterr().err
    assert cli.main([*words, "--batch-tokens", "40"]) == 0


def test_a_disk_that_is_full_is_told_in_a_line_and_the_run_goes_on(
    teacher: str, texts: str, out: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def full(file: int) -> None:
        if len(list(Path(out).glob("shard-*"))) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    words = ["extract", teacher, texts, "--out", out, "--k", str(K), "--shard-mb", "0.001"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert cli.main(words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("topk-rkl: error: ") and "No space left on device; make room for it and go on" in line
    assert len(Store(out, partial=True).shards) == 2
    assert cli.main(words) == 0 and len(Store(out)) == len(TEXTS)


def test_rows_longer_than_the_teacher_has_positions_are_cut_as_advised(
    teacher: str, texts: str, out: str, capsys: pytest.CaptureFixture
) -> None:
    Path(texts).write_text(" ".join(TEXTS))
    words = ["extract", teacher, texts, "--out", out, "--k", "4"]
    assert "the teacher 64 positions; cut rows to 64 tokens" in (line := refused(capsys, *words))
    assert not Path(out).exists()
    assert cli.main([*words, *line.split("command line by ")[1].split()]) == 0
    assert Store(out).positions == 64


def test_refusals_before_the_teacher_is_loaded(
    teacher: str, texts: str, out: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "model", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    files = {
        "empty.txt": "", "blank.txt": "\n \n", "broken.jsonl": "{", "rows.csv": "text\na",
        "two.jsonl": '{"a": "x", "b": 1}',
        "words.jsonl": '{"input_ids": ["a"]}', "masks.jsonl": '{"input_ids": [1], "loss_mask": [1]}',
        "none.jsonl": '{"input_ids": [1], "labels": [1]}\n{"input_ids": [1], "labels": null}',
        "short.jsonl": '{"input_ids": [1, 2], "labels": [1]}', "high.jsonl": '{"input_ids": [320]}',
        "chats.jsonl": '{"messages": [{"role": "user", "content": "x"}]}',
        "other/notes.md": "mine",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": TEXTS})).save_to_disk(str(tmp_path / "splits"))

    def of(data: str = texts, *words: str, model: str = teacher) -> str:
        data = data if data == texts else str(tmp_path / data)
        return refused(capsys, "extract", model, data, "--out", out, *words)

    assert "--k is 321; it must be at most 320, the vocabulary of" in of(texts, "--k", "321")
    assert "argument --k: 0 must be a whole number of at least 1; see topk-rkl extract --help" in of(texts, "--k", "0")
    assert "argument --shard-mb: nan must be a positive number" in of(texts, "--shard-mb", "nan")
    assert "argument --temperature: cold must be a positive number" in of(texts, "--temperature", "cold")
    assert "argument --dtype: invalid choice: 'int8'" in of(texts, "--dtype", "int8")
    assert "--device gpu is none of auto, cpu, cuda or cuda:1" in of(texts, "--device", "gpu")
    if not torch.cuda.is_available():
        assert "--device is cuda, but torch sees 0 GPUs; use --device cpu or auto" in of(texts, "--device", "cuda")
    assert "nowhere is no folder; give one with a model" in of(texts, model=str(tmp_path / "nowhere"))
    assert "MODEL nowhere cannot be loaded: " in of(texts, model="nowhere")
    assert "nowhere.txt does not exist; give a file of .txt, .json, .jsonl, .parquet" in of("nowhere.txt")
    assert "ends in none of .txt, .json, .jsonl, .parquet" in of("rows.csv")
    assert "empty.txt is empty" in of("empty.txt")
    assert "blank.txt has no row with a token in column text" in of("blank.txt")
    assert "broken.jsonl cannot be read as json" in of("broken.jsonl")
    assert "has the columns a, b; none is input_ids, messages, text: name" in of("two.jsonl")
    assert "has the columns a, b; none is c: name another" in of("two.jsonl", "--text-column", "c")
    assert "column b of DATA" in of("two.jsonl", "--text-column", "b")
    assert "it must hold lists of int" in of("words.jsonl")
    assert "column loss_mask" in (line := of("masks.jsonl")) and "it must hold lists of bool" in line
    assert "rows[0]['input_ids'] holds 320; ids must be from 0 to 319" in of("high.jsonl")
    assert "none.jsonl cannot be made into tokens" in of("none.jsonl")
    assert "rows[0]['loss_mask'] has shape (1,)" in of("short.jsonl")
    assert "holds chats, but the tokenizer has no chat template; give texts" in of("chats.jsonl")
    assert "is not a folder that datasets' save_to_disk wrote" in of("other")
    line = of("splits")
    assert "has the splits train; give one of them, such as" in line
    assert not Path(out).exists()
    assert "cannot be loaded" in of(texts, "--gguf-file", "none.gguf")
    monkeypatch.setattr(models, "config", lambda *_: pytest.fail("the config was read"))
    assert "notes.md" in refused(capsys, "extract", teacher, texts, "--out", str(tmp_path / "other"))
    monkeypatch.undo()
    assert cli.main(["extract", teacher, line.split("such as ")[1], "--out", out, "--k", "4"]) == 0  # as advised


def test_a_template_that_refuses_a_chat_is_told(tmp_path: Path, out: str, capsys: pytest.CaptureFixture) -> None:
    teacher = tiny_teacher.save(tmp_path / "teacher", chat_template="{{ raise_exception('roles must alternate') }}")
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CHATS[0]}))
    line = refused(capsys, "extract", teacher, str(tmp_path / "chats.jsonl"), "--out", out)
    assert "cannot be put into the chat template: roles must alternate" in line


def test_other_data_for_the_same_store_is_refused(
    teacher: str, texts: str, store: str, capsys: pytest.CaptureFixture
) -> None:
    line = refused_last(capsys, "extract", teacher, texts, "--out", store, "--k", str(K), "--limit", "3")
    assert "has source = " in line and "another folder" in line


def refused_last(capsys: pytest.CaptureFixture, *words: str) -> str:
    assert cli.main(words) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, out: str) -> None:
    find = refusal.find_spec
    monkeypatch.setattr(refusal, "find_spec", lambda name: None if name in ("datasets", "gguf") else find(name))
    line = refused(capsys, "extract", "m", "d.txt", "--out", out)
    assert line == "topk-rkl: error: this needs datasets, not installed here; run pip install 'topk-rkl[extract]'"
    assert "this needs datasets, gguf" in refused(capsys, "extract", "m", "d", "--out", out, "--gguf-file", "x")


def test_inspect_tells_what_the_store_holds(store: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["inspect", store, "--json"]) == 0
    found, opened = json.loads(capsys.readouterr().out), Store(store)
    log_probs = torch.cat([row.support.log_probs.double() for row in opened])
    first = torch.stack([row.support.log_probs[0].double() for row in opened])
    ids = [row.input_ids.tolist() for row in opened]
    assert (found["complete"], found["rows"], found["k"], found["vocab_size"]) == (True, len(TEXTS), K, tiny_teacher.V)
    assert found["tokens"] == len(log_probs) and found["bytes_per_token"] == opened.bytes / len(log_probs)
    assert found["mass"]["0"] == pytest.approx(float(first.exp().sum(-1).mean()), abs=1e-12)
    q = first.exp() / first.exp().sum(-1, keepdim=True)
    assert found["entropy"]["0"] == pytest.approx(float(-(q * q.log()).sum(-1).mean()), abs=1e-9)
    assert list(found["mass"]) == list(found["entropy"]) == ["0", "1", "2-3", "4-7", "8-15"]
    assert sum(found["lengths"].values()) == len(TEXTS) and found["lengths"]["8-15"] == sum(
        8 <= len(x) < 16 for x in ids
    )
    assert found["empty_slots"] == 0
    supports = [row.support.ids.tolist() for row in opened]
    for shift, share in enumerate(found["next_token_in_S"]):
        hits = [x[t + shift] in s[t] for x, s in zip(ids, supports) for t in range(len(x) - shift)]
        assert share == pytest.approx(sum(hits) / len(hits), abs=1e-12)

    assert cli.main(["inspect", store]) == 0
    text = capsys.readouterr().out
    assert f"{store}, complete" in text and f"K = {K} of V = 320, float16 log-probs at temperature 1.0" in text
    assert f"{'0':15} {found['mass']['0']:9.4f} {found['entropy']['0']:13.4f}" in text
    most = max(found["lengths"], key=found["lengths"].get)
    assert f"{most:15} {'#' * 40} {found['lengths'][most]}" in text
    assert "next token inside S at shifts 0, 1, 2: {:.3f}, {:.3f}, {:.3f}".format(*found["next_token_in_S"]) in text


def test_positions_of_which_the_teacher_said_nothing_do_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The last one of each row, as other programs write them."""
    header = Header(k=1, vocab_size=9, teacher="t", tokenizer="h", source="s")
    support = Support(torch.full((4, 1), 3), torch.full((4, 1), 0.5).log())
    with Writer(tmp_path / "set", header) as writer:
        writer.append([Row(torch.full((n,), 3), support[: n - 1].pad(n)) for n in (5, 3)])
        writer.finish()
    assert cli.main(["inspect", str(tmp_path / "set"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mass"] == pytest.approx({"0": 0.5, "1": 0.5, "2-3": 0.5}, abs=1e-3)
    assert found["entropy"] == {"0": 0, "1": 0, "2-3": 0}
    assert found["empty_slots"] == 0.25 and found["next_token_in_S"] == [1, 1, 1]
    assert cli.main(["inspect", str(tmp_path / "set")]) == 0


def test_json_of_rows_of_one_token_has_null_where_no_token_follows(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    header = Header(k=1, vocab_size=9, teacher="t", tokenizer="h", source="s")
    with Writer(tmp_path / "set", header) as writer:
        writer.append([Row(torch.tensor([3]), Support(torch.tensor([[3]]), torch.tensor([[-0.5]])))])
        writer.finish()
    assert cli.main(["inspect", str(tmp_path / "set"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["next_token_in_S"] == [1, None, None]


def test_inspect_reads_rows_that_are_spread(store: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["inspect", store, "--json", "--rows", "3"]) == 0
    found, opened = json.loads(capsys.readouterr().out), Store(store)
    first = torch.stack([opened[i].support.log_probs[0].double() for i in (0, 4, 8)])
    assert found["rows_read"] == 3 and len(TEXTS) == 12
    assert found["mass"]["0"] == pytest.approx(float(first.exp().sum(-1).mean()), abs=1e-12)


def test_inspect_shows_a_row_as_text(store: str, teacher: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["inspect", store, "--row", "1", "--tokenizer", teacher]) == 0
    lines, row = capsys.readouterr().out.splitlines(), Store(store)[1]
    assert len(lines) == 2 + len(row.input_ids) and lines[0] == f"row 1: {len(row.input_ids)} tokens"
    tokenizer = tiny_teacher.tokenizer()
    place = row.support.log_probs[0].argmax()
    best, p = tokenizer.decode(row.support.ids[0, place]), row.support.log_probs[0, place].exp()
    assert lines[2].startswith(f"{tokenizer.decode(row.input_ids[0])!r:20} yes     {best!r} {p:.3f}")


def test_what_inspect_refuses(
    store: str, teacher: str, tmp_path: Path, chat_teacher: str, capsys: pytest.CaptureFixture
) -> None:
    assert "--row and --tokenizer go together" in refused(capsys, "inspect", store, "--row", "1")
    assert "index is 12" in refused(capsys, "inspect", store, "--row", "12", "--tokenizer", teacher)
    assert "manifest.json is not there" in refused(capsys, "inspect", str(tmp_path / "none"))
    tiny_teacher.tokenizer(special="<unused>").save_pretrained(tmp_path / "other")
    line = refused(capsys, "inspect", store, "--row", "0", "--tokenizer", str(tmp_path / "other"))
    assert "ids mean other tokens" in line


def test_check_store_finds_what_is_wrong(
    store: str, teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["check", "store", store, "--full", "--tokenizer", teacher]) == 0
    assert "whole; 12 rows" in (text := capsys.readouterr().out) and "every file has its hash" in text
    tiny_teacher.tokenizer(special="<unused>").save_pretrained(tmp_path / "other")
    assert cli.main(["check", "store", store, "--tokenizer", str(tmp_path / "other")]) == 1
    assert "ids mean other tokens" in capsys.readouterr().out
    broken = tmp_path / "broken"
    shutil.copytree(store, broken)
    shard = next(broken.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert cli.main(["check", "store", str(broken)]) == 0  # by size and header alone
    assert cli.main(["check", "store", str(broken), "--full"]) == 1
    assert "SHA-256" in capsys.readouterr().out
    shard.unlink()
    assert cli.main(["check", "store", str(broken)]) == 1
    assert "is missing" in capsys.readouterr().out
    (broken / "manifest.json").write_text("{")
    assert cli.main(["check", "store", str(broken)]) == 1
    assert "is not JSON" in capsys.readouterr().out
    assert "has no manifest.json; give a folder" in refused(capsys, "check", "store", str(tmp_path))


def test_check_store_finds_positions_that_speak_of_the_wrong_token(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    ids = torch.arange(300)
    for shift, code in ((0, 1), (1, 0), (2, 1)):
        header = Header(k=1, vocab_size=400, teacher="t", tokenizer="h", source="s")
        with Writer(tmp_path / str(shift), header) as writer:
            writer.append([Row(ids, Support((ids + shift).int()[:, None], torch.full((300, 1), -1.0)))])
            writer.finish()
        assert cli.main(["check", "store", str(tmp_path / str(shift))]) == code
        shares = ", ".join(f"{float(s == shift):.3f}" for s in (0, 1, 2))
        text = capsys.readouterr().out
        assert f"at shifts 0, 1, 2: {shares}" in text and ("do not speak of the token after" in text) == (code == 1)


def test_check_tokenizers_prints_its_report(teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["check", "tokenizers", teacher, teacher]) == 0
    capsys.readouterr()
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    made = tiny_teacher.tokenizer(special="<unused>")
    made.save_pretrained(other)
    assert cli.main(["check", "tokenizers", teacher, str(other)]) == 1
    assert "<unused>" in capsys.readouterr().out


def test_words_that_it_does_not_know_are_refused(capsys: pytest.CaptureFixture) -> None:
    assert "required: COMMAND" in refused(capsys)
    assert "invalid choice: 'extrakt'" in refused(capsys, "extrakt")
    assert "required: MODEL, DATA, --out" in refused(capsys, "extract")
    assert "required: WHAT" in refused(capsys, "check")


@pytest.mark.parametrize("command", ["", "extract", "inspect", "check", "check tokenizers", "check store", "env"])
def test_help_shows_examples_and_defaults(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and text.startswith("usage: topk-rkl") and "(default: None)" not in text
    assert command in ("check", "env") or "  topk-rkl" in text
    assert command != "extract" or ("tokens kept per position (default: 64)" in text and "{% generation %}" in text)


@pytest.mark.slow
def test_it_runs_as_a_program_without_optional_packages(tmp_path: Path) -> None:
    lean = "import sys; sys.modules['topk_rkl._native'] = None\nfrom topk_rkl.cli import main\n"
    lean += "main(['env']); print(sorted({'transformers', 'datasets', 'safetensors'}.intersection(sys.modules)))"
    outcome = run([sys.executable, "-c", lean])
    assert outcome.returncode == 0 and outcome.stdout.splitlines()[-1] == "[]"
    outcome = run([sys.executable, "-m", "topk_rkl", "inspect", str(tmp_path)])
    assert outcome.returncode == 2 and outcome.stdout == ""
    assert outcome.stderr.startswith("topk-rkl: error: DIR ") and outcome.stderr.count("\n") == 1
