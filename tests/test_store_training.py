"""Promise: stored sets. Ranks and workers share each row once, and a loss from a set is that of the live teacher."""

import json
import re
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from benchmarks.records import is_clean
from benchmarks.store import FILE, measured
from tests.stored import HEADER, K, rows, same, written
from tests.tiny_models import V as TINY_V, tiny
from topk_rkl.loss import Support, causal_topk_reverse_kl, teacher_topk
from topk_rkl.store import Collator, Header, Row, Store, StoreDataset, Writer
from topk_rkl.tokenizers import tokenizer_hash
from topk_rkl.trainers.transformers import distill

FLOAT16 = 2e-3  # relative error of a loss from log-probs in float16; docs/stores.md has what was measured


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "set"


def numbered(folder: Path, count: int) -> Path:
    """A set whose row i is the token i."""
    row = rows(1)[0]
    with Writer(folder, HEADER) as writer:
        for first in range(0, count, 4):
            made = [row._replace(input_ids=torch.tensor([i])) for i in range(first, min(first + 4, count))]
            writer.append(made)
        writer.finish()
    return folder


def seen(data: Any, workers: int = 0) -> list[int]:
    loader = DataLoader(data, batch_size=3, num_workers=workers, collate_fn=lambda rows: rows)
    return [int(row.input_ids) for batch in loader for row in batch]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_share_every_row_once(folder: Path, shuffle: bool, workers: int) -> None:
    numbered(folder, 21)
    shares = [StoreDataset(folder, shuffle=shuffle, rank=rank, world_size=3) for rank in range(3)]
    found = [seen(share, workers) for share in shares]
    assert [len(x) for x in found] == [len(share) for share in shares] == [7, 7, 7]
    assert sorted(chain(*found)) == list(range(21))


def test_a_stream_without_ranks_is_the_whole_set_in_its_order(folder: Path) -> None:
    numbered(folder, 10)
    assert seen(StoreDataset(folder)) == seen(StoreDataset(Store(folder))) == list(range(10))
    assert seen(DataLoader(Store(folder), batch_size=None).dataset) == list(range(10))


@pytest.mark.parametrize(
    ("uneven", "counts", "times"),
    [("keep", [4, 3, 3], [1] * 10), ("drop", [3, 3, 3], [1] * 9 + [0]), ("repeat", [4, 4, 4], [2, 2] + [1] * 8)],
)
def test_rows_that_ranks_cannot_share_evenly(folder: Path, uneven: str, counts: list[int], times: list[int]) -> None:
    numbered(folder, 10)
    with pytest.raises(ValueError, match=r"uneven is 'refuse', and 10 rows do not divide by world_size = 3; choose"):
        StoreDataset(folder, rank=0, world_size=3)
    found = [seen(StoreDataset(folder, rank=rank, world_size=3, uneven=uneven)) for rank in range(3)]
    assert [len(x) for x in found] == counts
    counted = Counter(chain(*found))
    assert [counted[i] for i in range(10)] == times


@pytest.mark.parametrize("uneven", ["drop", "repeat"])
def test_ranks_with_workers_have_equal_counts_of_batches(folder: Path, uneven: str) -> None:
    """More ranks than rows too."""
    numbered(folder, 5)
    for world in (2, 7):
        shares = [StoreDataset(folder, rank=r, world_size=world, uneven=uneven, shuffle=True) for r in range(world)]
        assert {len(share) for share in shares} == {(5 // world) if uneven == "drop" else -(-5 // world)}
        assert len({len(seen(share)) for share in shares}) == 1


def test_the_order_is_that_of_seed_and_epoch(folder: Path) -> None:
    numbered(folder, 40)
    first, again, other = (StoreDataset(folder, shuffle=True, seed=seed) for seed in (1, 1, 9))
    start = seen(first)
    assert start == seen(first) == seen(again) and sorted(start) == list(range(40))
    first.set_epoch(1)
    orders = [start, seen(first), seen(other), list(range(40))]
    assert len(set(map(tuple, orders))) == 4
    again.set_epoch(1)
    assert seen(again) == orders[1]
    first.set_epoch(0)
    assert seen(first) == start


def test_workers_that_stay_see_a_new_epoch(folder: Path) -> None:
    data = StoreDataset(numbered(folder, 12), shuffle=True)
    loader = DataLoader(data, batch_size=1, num_workers=1, persistent_workers=True, collate_fn=lambda rows: rows)
    found = []
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        found.append([int(row.input_ids) for (row,) in loader])
    assert found[0] == found[2] != found[1]


@pytest.fixture
def rank_1_of_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of torch.distributed, without accelerate, which a Trainer of another test may have started."""
    for name, value in {"is_initialized": True, "get_rank": 1, "get_world_size": 2}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr("accelerate.state.is_initialized", lambda: False)


@pytest.mark.usefixtures("rank_1_of_2")
def test_ranks_of_torch_distributed_are_taken(folder: Path) -> None:
    numbered(folder, 4)
    assert seen(StoreDataset(folder)) == [1, 3]


@pytest.mark.usefixtures("rank_1_of_2")
def test_ranks_that_accelerate_divides_once_more_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbered(folder, 4)
    data = StoreDataset(folder)
    with monkeypatch.context() as patch:
        patch.setattr("accelerate.state.is_initialized", lambda: True)
        for call in (lambda: StoreDataset(folder), lambda: list(data)):
            with pytest.raises(RuntimeError, match=r"the rows of rank 1 among 2 ranks again; give it the Store, or"):
                call()
        assert seen(StoreDataset(folder, rank=0, world_size=1)) == [0, 1, 2, 3]
        assert seen(StoreDataset(folder, rank=1, world_size=2)) == [1, 3]


@pytest.mark.parametrize(
    ("given", "message"),
    [({"shuffle": 1}, "shuffle is 1; it must be True or False"), ({"seed": -1}, "seed is -1; it must be from 0"),
     ({"seed": 0.5}, "seed is 0.5; it must be an int"), ({"uneven": "x"}, "uneven is 'x'; use one of refuse, keep"),
     ({"rank": 0}, "rank is 0 and world_size None; give both"),
     ({"rank": 2, "world_size": 2}, "rank is 2; it must be from 0 to 1"),
     ({"rank": 0, "world_size": 0}, "world_size is 0; it must be at least 1")],
)  # fmt: skip
def test_a_stream_refuses_by_name(folder: Path, given: dict[str, Any], message: str) -> None:
    numbered(folder, 4)
    with pytest.raises((TypeError, ValueError), match=message):
        StoreDataset(folder, **given)
    for epoch, kind in ((-1, ValueError), (0.5, TypeError)):
        with pytest.raises(kind, match=f"epoch is {epoch}"):
            StoreDataset(folder).set_epoch(epoch)


def test_a_batch_is_padded_with_empty_slots_and_labels_of_minus_100(folder: Path) -> None:
    written(folder, 6)
    store = Store(folder)
    batch = Collator(7, pad_to_multiple_of=4)([store[i] for i in range(6)])
    assert batch["input_ids"].shape == (6, 8) and batch["teacher_ids"].shape == (6, 8, K)
    for i, row in enumerate(store):
        n = len(row.input_ids)
        assert batch["input_ids"][i].tolist() == row.input_ids.tolist() + [7] * (8 - n)
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (8 - n)
        labels = [t if m else -100 for t, m in zip(row.input_ids.tolist(), row.loss_mask.tolist(), strict=True)]
        assert batch["labels"][i].tolist() == labels + [-100] * (8 - n)
        support = Support.from_dict(batch)[i]
        want = row.support.pad(8)
        assert torch.equal(support.ids, want.ids) and torch.equal(support.log_probs, want.log_probs)
    dtypes = {name: x.dtype for name, x in batch.items()}
    assert dtypes == {
        "input_ids": torch.int64, "attention_mask": torch.int64, "labels": torch.int64,
        "teacher_ids": torch.int32, "teacher_log_probs": torch.float32,
    }  # fmt: skip


def test_a_batch_is_cut_at_max_length(folder: Path) -> None:
    made = written(folder, 6, masked=False)
    batch = Collator(0, max_length=2, label_pad=-5)(list(Store(folder)))
    assert batch["labels"].tolist() == [row.input_ids[:2].tolist() + [-5] * (2 - len(row.input_ids)) for row in made]
    assert torch.equal(batch["teacher_ids"][5], made[5].support.ids[:2])


def test_logits_make_a_column_of_their_own() -> None:
    row = Row(torch.tensor([1]), Support(torch.tensor([[1]]), torch.tensor([[5.0]]), normalized=False))
    assert Collator(0)([row])["teacher_logits"].tolist() == [[[5.0]]]


@pytest.mark.parametrize(
    ("given", "message"),
    [({"pad_token_id": None}, "pad_token_id is None; .* where a tokenizer has none, any does, such as 0"),
     ({"pad_token_id": 0.5}, "pad_token_id is 0.5; it must be an int"), ({"pad_token_id": -1}, "pad_token_id is -1"),
     ({"label_pad": 3}, "label_pad is 3; it must be negative"), ({"max_length": 0}, "max_length is 0"),
     ({"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0")],
)  # fmt: skip
def test_a_collator_refuses_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Collator(**{"pad_token_id": 0, **given})
    with pytest.raises(ValueError, match="rows is empty"):
        Collator(0)([])
    row = rows(1)[0]
    with pytest.raises(ValueError, match="rows have supports of K = 3, 4; a batch is of rows of one set"):
        Collator(0)([row, row._replace(support=row.support.each(lambda x: x[:, :3]))])


def taught(
    folder: Path, teacher: Any, sequences: list[torch.Tensor], k: int, dtype: str = "float16", normalized: bool = True
) -> Store:
    """The answers of a model, written as a user would."""
    vocab = teacher.config.vocab_size
    with Writer(folder, Header(k, vocab, "tiny", "h", "random", 1.0, normalized, dtype)) as writer:
        for tokens in sequences:
            with torch.no_grad():
                support = teacher_topk(teacher(tokens[None]).logits[0], k, normalize=normalized)
            writer.append([Row(tokens, support, torch.arange(len(tokens)) >= 2)])
        writer.finish()
    return Store(folder, check="full")


def live(student: Any, teacher: Any, batch: dict[str, torch.Tensor], k: int) -> torch.Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        answer = teacher(**inputs).logits
    return causal_topk_reverse_kl(student(**inputs).logits, answer, batch["labels"], k=k)


@pytest.mark.parametrize(("dtype", "bound"), [("float16", FLOAT16), ("bfloat16", 10 * FLOAT16), ("float32", 1e-6)])
def test_a_loss_from_the_set_is_that_of_the_live_teacher(
    folder: Path, one_thread: None, dtype: str, bound: float
) -> None:
    student, teacher = tiny("llama", 0), tiny("llama", 1).eval()
    sequences = [torch.randint(3, TINY_V, (n,)) for n in (6, 14, 9, 11)]
    store = taught(folder, teacher, sequences, 8, dtype)
    batch = Collator(0)(list(store))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    found = causal_topk_reverse_kl(student(**inputs).logits, Support.from_dict(batch), batch["labels"])
    want = live(student, teacher, batch, 8)
    assert want > 0.1 and abs(found / want - 1) < bound
    gradients = [
        torch.cat([g.flatten() for g in torch.autograd.grad(x, [*student.parameters()])]) for x in (found, want)
    ]
    assert (gradients[0] - gradients[1]).norm() < bound * gradients[1].norm()


@pytest.mark.parametrize(("entry", "normalized"), [("hidden", True), ("hidden", False), ("logits", True)])
def test_the_trainer_trains_from_a_set_without_a_teacher(
    folder: Path, one_thread: None, entry: str, normalized: bool
) -> None:
    """From log-probs, or logits; in workers; and it evaluates."""
    student, teacher = tiny("llama", 0), tiny("llama", 1).eval()
    sequences = [torch.randint(3, TINY_V, (n,)) for n in (6, 14, 9, 11)]
    store = taught(folder, teacher, sequences, 8, normalized=normalized)
    want = float(live(student, teacher, Collator(0)(list(store)), 8).detach())
    args = TrainingArguments(
        str(folder.parent / "out"), per_device_train_batch_size=4, max_steps=1, logging_steps=1, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True, dataloader_num_workers=2, learning_rate=0.0,
    )  # fmt: skip
    trainer = Trainer(
        student, args, train_dataset=store, eval_dataset=store, data_collator=Collator(0),
        compute_loss_func=distill(student, entry=entry),
    )  # fmt: skip
    trainer.train()
    found = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
    assert abs(found / want - 1) < FLOAT16 and abs(trainer.evaluate()["eval_loss"] / want - 1) < FLOAT16


@pytest.mark.xdist_group("smollm2")
@pytest.mark.slow
def test_a_set_of_smollm2_gives_the_loss_of_smollm2(folder: Path, loaded: Any) -> None:
    """A trained model's log-probs, and its tokenizer; the student is the model with other numbers in its last layer."""
    model, tokenizer = loaded
    tokens = tokenizer("The capital of France is Paris, and that of Italy is Rome.", return_tensors="pt")["input_ids"][
        0
    ]
    with torch.no_grad():
        logits = model(tokens[None]).logits[0].float()
    header = Header(64, logits.shape[-1], "SmolLM2", tokenizer_hash(tokenizer), "a sentence")
    with Writer(folder, header) as writer:
        writer.append([Row(tokens, teacher_topk(logits, 64, normalize=True))])
        writer.finish()
    store = Store(folder, check="full", tokenizer=tokenizer)
    z = logits + torch.randn_like(logits)
    batch = Collator(tokenizer.eos_token_id)([store[0]])
    found = causal_topk_reverse_kl(z[None], Support.from_dict(batch), batch["labels"])
    want = causal_topk_reverse_kl(z[None].double(), logits[None].double(), batch["labels"], k=64)
    assert abs(found / want - 1) < FLOAT16 and want > 0.1


def test_a_row_of_the_set_is_a_row_of_the_teacher(folder: Path) -> None:
    """The loader's default sampler shuffles a Store as any map-style dataset."""
    made = written(folder)
    loader = DataLoader(Store(folder), batch_size=5, shuffle=True, collate_fn=lambda rows: rows)
    found = [row for batch in loader for row in batch]
    assert len(found) == 12 and all(any(same(a, b) for b in made) for a in found)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Its blocks in their order, with a tiny teacher, a tiny student, and a reader that gives a row."""
    page = (Path(__file__).parent.parent / "docs/stores.md").read_text().replace("49_152", str(TINY_V))
    blocks = re.findall(r"^```python\n(.*?)^```$", page.replace("k=64", "k=8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)
    backend = Tokenizer(BPE({"a": 0, "b": 1, "</s>": 2}, []))
    scope = {
        "tokenizer": PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), "folder": tmp_path / "set",
        "teacher": tiny("llama", 1).eval(), "sequences": [torch.randint(3, TINY_V, (n,)) for n in (6, 14, 9, 11)],
        "other_folder": tmp_path / "other", "parquet_folder": None, "config": None,
    }  # fmt: skip
    for block in blocks[:4]:
        scope["student"] = tiny("llama", 0)  # the Trainer's has hooks
        exec(block, scope)
    assert len(scope["store"]) == 4 and scope["writer"].complete and scope["row"].support.k == 8
    assert scope["student"].lm_head.weight.grad.norm() > 0
    monkeypatch.setattr("topk_rkl.store.readers.distillkit", lambda *_: [scope["store"][0]])
    exec(blocks[4], scope)
    assert len(Store(tmp_path / "other", partial=True)) == 1


def test_the_measurement_runs_and_the_record_is_of_a_commit() -> None:
    threads = torch.get_num_threads()
    found = measured(tiny=True)
    torch.set_num_threads(threads)
    narrow, wide = found["rates"]
    assert (narrow["stored_bytes"], wide["stored_bytes"]) == (8 * 5 * 4 * 4, 8 * 5 * 4 * 6)
    assert all(x[f"{part}_gb_per_s"] > 0 for x in (narrow, wide) for part in ("write", "decode", "pad", "batch"))
    for small, large in (("set, float16", "set, float32"), ("set, float32", "torch"), ("torch", "JSON")):
        assert all(x[small] < x[large] for x in found["bytes_per_token"])
    recorded = json.loads(FILE.read_text())
    assert is_clean(recorded["setting"]["commit"])
    for x in recorded["bytes_per_token"]:  # ids and log-probs, the token, and what a row and a shard take
        exact = x["k"] * (4 if x["vocab"] < 2**16 else 6) + (2 if x["vocab"] < 2**16 else 4)
        assert exact < x["set, float16"] < exact + 0.5
    for x in recorded["rounding"]:  # 11 bits and 8 bits, of log-probs around 8
        assert x["loss_mean"] < x["loss_max"] < (2e-3 if x["dtype"] == "float16" else 2e-2)
    assert all(x["batch_gb_per_s"] > 1 for x in recorded["rates"])
