"""What hypothesis searches through, and for how long."""

import hypothesis.strategies as st
from conftest import DEVICE
from hypothesis import HealthCheck, settings

SEARCH = settings(
    max_examples=40 if DEVICE == "cuda" else 8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SHAPES = st.tuples(st.integers(1, 3), st.integers(2, 150)).flatmap(
    lambda shape: st.tuples(st.just(shape[0]), st.just(shape[1]), st.integers(2, shape[1]))
)
SEEDS = st.integers(0, 2**31)
# Multiples of 1/4: ties are common, and adding a small integer to every logit of a row is exact.
QUARTERS = st.sampled_from([1, 8, 100])
