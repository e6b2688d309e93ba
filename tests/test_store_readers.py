"""Promise: stored sets. Sets of other programs are read with the shift that each has, from files of their layout."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from tests.stored import HEADER, K, V, rows, same
from topk_rkl.store import Header, Row, Store, Writer
from topk_rkl.store.readers import axolotl, distillkit, megatron
from topk_rkl.support import Support


def full(count: int) -> list[Row]:
    """Rows whose last position speaks of nothing, as files without what comes after a sequence have it."""
    made = [row for row in rows(4 * count, masked=False) if len(row.input_ids) > 1][:count]
    return [Row(r.input_ids, r.support[:-1].pad(len(r.input_ids))) for r in made]


def assert_same(found: Any, want: list[Row]) -> None:
    found = list(found)
    assert len(found) == len(want) and all(same(a, b) for a, b in zip(found, want))


def stored(folder: Path, found: Any, header: Header = HEADER) -> Store:
    with Writer(folder, header) as writer:
        for row in found:
            writer.append([row])
        writer.finish()
    return Store(folder, check="full")


def columns(row: Row, speaks_of: str) -> dict[str, Any]:
    """As axolotl has them: a position without the teacher has a mask of 0, ids of 0, 1, ... and a low number."""
    ids, log_probs = row.support.ids.clone(), row.support.log_probs.clone()
    if speaks_of == "own":
        ids, log_probs = ids.roll(1, 0), log_probs.roll(1, 0)
    used = ids[:, :1] >= 0
    return {
        "input_ids": row.input_ids.tolist(), "target_mask": used.expand(-1, K).int().tolist(),
        "target_token_ids": torch.where(used, ids, torch.arange(K)).tolist(),
        "target_logprobs": torch.where(used, log_probs, -1e30).tolist(),
    }  # fmt: skip


@pytest.mark.parametrize("speaks_of", ["next", "own"])
def test_columns_of_axolotl(tmp_path: Path, speaks_of: str) -> None:
    want = [row._replace(support=Support(*row.support.tensors, normalized=False)) for row in full(6)]
    assert_same(axolotl([columns(row, speaks_of) for row in want], speaks_of=speaks_of), want)
    labelled = [{**columns(row, speaks_of), "labels": [-100, *row.input_ids[1:].tolist()]} for row in want]
    store = stored(tmp_path / "set", axolotl(labelled, speaks_of=speaks_of), replace(HEADER, normalized=False))
    assert [row.loss_mask.tolist() for row in store] == [[False] + [True] * (len(r.input_ids) - 1) for r in want]


@pytest.mark.parametrize("speaks_of", ["next", "own"])
def test_columns_of_the_other_alignment_are_refused_and_the_remedy_works(speaks_of: str) -> None:
    """A teacher that gives the next token: 0, 1, 2, ... up to 80, whose own token is not among K."""
    tokens = torch.arange(80)
    row = Row(tokens, Support((tokens + 1)[:, None].repeat(1, 1), torch.zeros(80, 1))[:-1].pad(80))
    ids, log_probs = row.support.tensors
    if speaks_of == "own":
        ids, log_probs = ids.roll(1, 0), log_probs.roll(1, 0)
    used = (ids >= 0).int()
    example = {"input_ids": tokens, "target_token_ids": ids, "target_logprobs": log_probs, "target_mask": used}
    other = {"next": "own", "own": "next"}[speaks_of]
    with pytest.raises(
        ValueError, match=f"speaks_of is '{other}', but .* 0 tokens so, and 79 .*speaks_of='{speaks_of}'"
    ):
        list(axolotl([example], speaks_of=other))
    ((tokens_found, support, _),) = axolotl([example], speaks_of=speaks_of)
    assert tokens_found is tokens and torch.equal(support.ids, row.support.ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"target_mask": None}, r"examples\[0\] has a column target_mask that is ragged or no numbers"),
     ({"target_token_ids": [[1], [1, 2]]}, "target_token_ids that is ragged"),
     ({"input_ids": [1]}, r"examples\[0\] has input_ids of \(1,\) and target_token_ids of \(\d, 4\)")],
)  # fmt: skip
def test_columns_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    example = columns(full(1)[0], "next")
    with pytest.raises(ValueError, match=message):
        list(axolotl([example | change], speaks_of="next"))
    with pytest.raises(ValueError, match=r"examples\[0\] has columns input_ids; it must have target_token_ids"):
        list(axolotl([{"input_ids": [1]}], speaks_of="next"))
    with pytest.raises(ValueError, match="speaks_of is 'x'; use one of next, own"):
        axolotl([example], speaks_of="x")


def packed(values: list[int], bits: int) -> list[int]:
    """Big-endian, each id in so many bits, the last byte filled with zeros."""
    text = "".join(f"{value:0{bits}b}" for value in values)
    text += "0" * (-len(text) % 8)
    return [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]


def parquet(folder: Path, made: list[Row], d: int, deltas: bool, dtype: torch.dtype, name: str = "data_0") -> None:
    bits = (d - 1).bit_length()
    examples = []
    for row in made:
        values = row.support.log_probs[:-1]
        if deltas:
            values = torch.cat([values[:, :1], values.diff(dim=-1)], -1)
        examples.append({
            "input_ids": row.input_ids.tolist(),
            "compressed_logprobs": values.to(dtype).view(torch.uint8).tolist(),
            "bytepacked_indices": [packed(ids, bits) for ids in row.support.ids[:-1].tolist()],
        })  # fmt: skip
    lists = pyarrow.list_(pyarrow.list_(pyarrow.uint8()))
    schema = pyarrow.schema([
        ("input_ids", pyarrow.list_(pyarrow.uint64())), ("compressed_logprobs", lists), ("bytepacked_indices", lists),
    ])  # fmt: skip
    folder.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(examples, schema), folder / f"{name}.parquet")


@pytest.mark.parametrize("deltas", [True, False])
@pytest.mark.parametrize("d", [V, 64, 65, 151_937])
def test_parquet_of_distillkit(tmp_path: Path, deltas: bool, d: int) -> None:
    want = full(5)
    parquet(tmp_path / "in", want[:3], d, deltas, torch.float32, "data_9")
    parquet(tmp_path / "in", want[3:], d, deltas, torch.float32, "data_10")
    config = {"d": d, "k": K, "exact_k": K, "residual_bins": [], "delta_encoding": deltas}
    found = list(distillkit(tmp_path / "in", config))
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.support.ids, b.support.ids.long())
        torch.testing.assert_close(a.support.log_probs, b.support.log_probs, rtol=1e-6, atol=1e-6)
    assert len(stored(tmp_path / "set", found)) == 5
    assert len(list(distillkit(tmp_path / "in" / "data_9.parquet", config))) == 3


def test_parquet_of_distillkit_in_float16_with_slots_that_have_no_log_prob(tmp_path: Path) -> None:
    """A delta to -inf is -inf, and that after it NaN."""
    row = full(1)[0]
    gone = torch.tensor([False, False, True, True]).expand(row.support.ids.shape)
    log_probs = row.support.log_probs.masked_fill(gone, -torch.inf)
    parquet(tmp_path / "in", [Row(row.input_ids, Support(row.support.ids, log_probs))], V, True, torch.float16)
    config = {"d": V, "k": K, "exact_k": K, "residual_bins": [], "exact_dtype": "float16"}
    (found,) = distillkit(tmp_path / "in", config)
    assert torch.equal(found.support.log_probs[:, 2:], torch.full((len(row.input_ids), 2), -torch.inf))
    torch.testing.assert_close(found.support.log_probs[:-1, :2], log_probs[:-1, :2], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"exact_k": 2}, "config has k = 4, exact_k = 2, .* only read where exact_k is k"),
     ({"polynomial_terms": [0, 1]}, r"polynomial_terms = \[0, 1\]"),
     ({"residual_bins": [{"num_elements": 2}]}, "residual_bins = .*num_elements"),
     ({"k": None}, r"config\['k'\] is None; it must be an int"), ({"d": 2.0}, r"config\['d'\] is 2.0"),
     ({"exact_dtype": "int8"}, r"config\['exact_dtype'\] is 'int8'; use one of float16"),
     ({"exact_dtype": "float64"}, r"data_0.parquet has .* compressed_logprobs of \(\d, 16\) bytes; .* \(\d, 32\)"),
     ({"d": 1 << 20}, r"bytepacked_indices of \(\d, 3\) bytes; the config says \(\d, 10\)")],
)  # fmt: skip
def test_a_config_that_is_not_that_of_the_files_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    parquet(tmp_path / "in", full(1), V, True, torch.float32)
    config = {"d": V, "k": K, "exact_k": K, "residual_bins": []}
    with pytest.raises((TypeError, ValueError), match=message):
        list(distillkit(tmp_path / "in", config | change))
    with pytest.raises(FileNotFoundError, match="has no parquet file"):
        distillkit(tmp_path, config)


def tar(folder: Path, name: str, iterations: dict[int, list[Support]], monolith: bool) -> None:
    """Supports are (S, B, K), one per microbatch; an empty slot is id -1 and -1e4 before 17 bits are kept of the id."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / name, "w") as file:
        payloads = {"_meta.json": json.dumps({"hash": "x"}).encode()}
        for iteration, batches in iterations.items():
            values = [x.log_probs.nan_to_num(neginf=-1e4).half() for x in batches]
            low = [(x.ids & 0xFFFF).to(torch.uint16) for x in batches]
            high = [(x.ids >> 16).bool() for x in batches]
            said: dict[str, Any] = {"values": values, "indices_low": low, "bit_17": high}
            if monolith:
                said = {name: torch.cat(x, 1) for name, x in said.items()} | {"format_version": 2}
            plain = io.BytesIO()
            torch.save(said, plain)
            sink = pyarrow.BufferOutputStream()
            with pyarrow.CompressedOutputStream(sink, "zstd") as out:
                out.write(plain.getvalue())
            payloads[f"{iteration}.pt.zst"] = sink.getvalue().to_pybytes()
        for member, data in payloads.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def samples(count: int) -> list[Row]:
    """Of 5 tokens each, some ids above 16 bits."""
    made = []
    for _ in range(count):
        log_probs, ids = torch.randn(5, V).log_softmax(-1).topk(K)
        ids = torch.where(ids % 2 == 0, ids + 70_000, ids)
        log_probs[2, 2:], ids[2, 2:] = -torch.inf, -1
        made.append(Row(torch.randint(V, (5,)), Support(ids.int(), log_probs.half().float())))
    return made


@pytest.mark.parametrize("monolith", [False, True])
@pytest.mark.parametrize("name", ["cp0_dp0__{0}.tar", "dp0__{0}-1{0}.tar"])
def test_tars_of_megatron(tmp_path: Path, monolith: bool, name: str) -> None:
    want = samples(8)
    batch = [Support.stack([row.support for row in want[i : i + 2]], 1) for i in range(0, 8, 2)]
    tar(tmp_path / "in", name.format(10), {10: batch[2:4]}, monolith)
    tar(tmp_path / "in", name.format(9), {9: batch[1:2], 8: batch[:1]}, monolith)
    assert_same(megatron(tmp_path / "in", [row.input_ids for row in want]), want)


def test_tars_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    want = samples(2)
    batch, tokens = [Support.stack([row.support for row in want], 1)], [row.input_ids for row in want]
    with pytest.raises(FileNotFoundError, match=r"has no tar such as cp0_dp0__100.tar"):
        megatron(tmp_path, tokens)
    tar(tmp_path / "in", "cp0_dp0__1.tar", {1: batch}, True)
    for given, message in (
        (tokens[:1], r"input_ids ended after 1 samples and .*cp0_dp0__1.tar goes on"),
        ([*tokens, tokens[0]], "input_ids goes on after the 2 samples"),
        ([tokens[0], tokens[1][:4]], r"input_ids of sample 1 has shape \(4,\) and .*cp0_dp0__1.tar \(5,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            list(megatron(tmp_path / "in", given))
    tar(tmp_path / "in", "cp1_dp0__1.tar", {1: batch}, True)
    with pytest.raises(ValueError, match="has tars of cp0_dp0, cp1_dp0; move those of each rank dp"):
        megatron(tmp_path / "in", tokens)


def test_a_reader_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    for call in (
        lambda: megatron(tmp_path, []),
        lambda: distillkit(tmp_path, {"d": 8, "k": 2, "exact_k": 2}),
    ):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'topk-rkl\[readers\]'"):
            call()
