"""Teachers' answers on disk: a set of rows, written once and read in every epoch of every run.

docs/stores.md shows how a set is written, read and trained from.
"""

from topk_rkl.store.collator import Collator
from topk_rkl.store.header import Header, tokenizer_hash
from topk_rkl.store.rows import Row
from topk_rkl.store.store import Store
from topk_rkl.store.stream import StoreDataset
from topk_rkl.store.writer import Writer

__all__ = ["Collator", "Header", "Row", "Store", "StoreDataset", "Writer", "tokenizer_hash"]
