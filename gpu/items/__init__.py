"""Timed items for one GPU: floors of the card, kernels as shares of them, experiments that decide.

    python -m gpu.items --out items.jsonl    # a JSON line per form of an item, as it comes

`registry.py` is the list of items, `experiments.py` the constants under trial, `timing.py` the clock.
"""
