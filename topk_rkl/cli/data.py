"""DATA of `topk-rkl extract`: a file or folder of documents, chats or token ids, made into rows of token ids."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from topk_rkl.cli.refusal import Refusal, refusing

KINDS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
COLUMNS = "input_ids", "messages", "text"  # the first that there is
LISTS = {"input_ids": "int", "labels": "int", "loss_mask": "bool"}
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")  # a chat template that tells the assistant's tokens
Columns = dict[str, list[Any]]
Tokens = Callable[[Columns], Columns]


class Data(NamedTuple):
    rows: Any  # a datasets.Dataset of input_ids and perhaps loss_mask, as arrays
    cut: int  # rows that were longer
    empty: int  # rows without a token, left out
    about: str  # what was read, for people


def read(path: str, tokenizer: Any, column: str | None, max_length: int, limit: int | None) -> Data:
    """The first `limit` rows, each cut after max_length tokens."""
    import datasets

    datasets.disable_caching()  # what is made of a folder would be written into it
    table = opened(path)
    column = chosen(path, table, column)
    table = table.select(range(min(len(table), limit or len(table))))
    tokens, about = _tokens_of(path, table, column, tokenizer)

    def tokenize(batch: Columns) -> Columns:
        made = tokens(batch)
        kept = [i for i, ids in enumerate(made["input_ids"]) if ids]
        cut = {name: [made[name][i][:max_length] for i in kept] for name in made}
        return cut | {"cut": [len(made["input_ids"][i]) > max_length for i in kept]}

    options = {"batched": True, "batch_size": 256, "remove_columns": table.column_names, "desc": "tokenize"}
    with refusing(f"DATA {path} cannot be made into tokens"):
        rows = table.map(tokenize, **options)
    if not len(rows):
        raise Refusal(f"DATA {path} has no row with a token in column {column}; give it at least one")
    return Data(rows.remove_columns("cut").with_format("numpy"), sum(rows["cut"]), len(table) - len(rows), about)


def opened(path: str) -> Any:
    """The datasets.Dataset of a file, or of a folder that save_to_disk wrote."""
    import datasets

    if not Path(path).exists():
        raise Refusal(f"DATA {path} does not exist; give a file of {', '.join(KINDS)}, or a folder of save_to_disk")
    if Path(path).is_dir():
        with refusing(f"DATA {path} is not a folder that datasets' save_to_disk wrote", FileNotFoundError):
            table = datasets.load_from_disk(path)
        if isinstance(table, datasets.DatasetDict):
            first = Path(path, next(iter(table)))
            raise Refusal(f"DATA {path} has the splits {', '.join(table)}; give one of them, such as {first}")
        return table
    kind = KINDS.get(Path(path).suffix.lower())
    if kind is None:
        raise Refusal(f"DATA {path} ends in none of {', '.join(KINDS)}, by which its kind is told; rename it")
    if not Path(path).stat().st_size:
        raise Refusal(f"DATA {path} is empty; give it at least one row")
    with refusing(f"DATA {path} cannot be read as {kind}", Exception):  # datasets wraps what its readers raise
        return datasets.load_dataset(kind, data_files=path, split="train")


def chosen(path: str, table: Any, column: str | None) -> str:
    """The column of the rows."""
    names = table.column_names
    found = next((name for name in COLUMNS if name in names), None) if column is None else column
    if found not in names:
        asked = f"none is {', '.join(COLUMNS)}: name" if column is None else f"none is {column}: name another"
        raise Refusal(f"DATA {path} has the columns {', '.join(names)}; {asked} the column of texts by --text-column")
    return str(found)


def _tokens_of(path: str, table: Any, column: str, tokenizer: Any) -> tuple[Tokens, str]:
    """What makes the ids, and perhaps the loss mask, of a batch of rows; and words for it."""
    kind, name = table.features[column], f"column {column} of DATA {path}"
    if column == "input_ids":
        return _of_ids(path, table.features)
    if getattr(kind, "dtype", None) in ("string", "large_string"):
        return _of_texts(column, tokenizer), f"texts of {name}"
    if column == "messages":
        return _of_chats(name, tokenizer)
    raise Refusal(f"{name} holds {kind}; it must hold texts, or be named messages or input_ids")


def _of_texts(column: str, tokenizer: Any) -> Tokens:
    def tokens(batch: Columns) -> Columns:
        texts = [text if text and text.strip() else None for text in batch[column]]
        ids = iter(tokenizer([text for text in texts if text], verbose=False)["input_ids"] if any(texts) else ())
        return {"input_ids": [next(ids) if text else [] for text in texts]}

    return tokens


def _of_chats(name: str, tokenizer: Any) -> tuple[Tokens, str]:
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise Refusal(f"{name} holds chats, but the tokenizer has no chat template; give texts, by --text-column")
    marked = bool(MARKED.search(str(template)))
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": marked}

    def tokens(batch: Columns) -> Columns:
        with refusing(f"{name} cannot be put into the chat template", Exception):  # templates raise errors of their own
            made = [tokenizer.apply_chat_template(chat, **options) for chat in batch["messages"]]
        ids = {"input_ids": [list(x["input_ids"]) for x in made]}
        return ids | {"loss_mask": [[bool(m) for m in x["assistant_masks"]] for x in made]} if marked else ids

    counted = "the assistant's tokens count" if marked else "every token counts, as the template marks no answers"
    return tokens, f"chats of {name}; {counted}"


def _of_ids(path: str, features: Any) -> tuple[Tokens, str]:
    for name, want in LISTS.items():
        items = getattr(features.get(name), "feature", None)
        if name in features and want not in str(getattr(items, "dtype", None)):
            raise Refusal(f"column {name} of DATA {path} holds {features[name]}; it must hold lists of {want}")
    mask = next((name for name in ("loss_mask", "labels") if name in features), None)

    def tokens(batch: Columns) -> Columns:
        made = {"input_ids": batch["input_ids"]}
        if mask:
            made["loss_mask"] = [[x if mask == "loss_mask" else x != -100 for x in row] for row in batch[mask]]
        return made

    counted = f"the tokens count that {mask} tells" if mask else "every token counts"
    return tokens, f"token ids of column input_ids of DATA {path}; {counted}"
