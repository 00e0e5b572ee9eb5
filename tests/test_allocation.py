"""Cells per type: exact, fair and monotone, by properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cfgen_augment.allocation import allocate, largest_remainder, total_after

sizes_of_types = st.lists(st.integers(1, 1_000_000), min_size=1, max_size=30)
totals = st.integers(0, 1_000_000)
exponents = st.floats(0.0, 5.0)


@settings(deadline=None)
@given(sizes_of_types, totals, exponents)
def test_total_is_exact_and_rarer_types_never_get_fewer(sizes, n_new, exponent):
    new = allocate(sizes, n_new, exponent=exponent)
    assert new.sum() == n_new
    assert (new >= 0).all()
    by_rarity = np.lexsort((-new, -np.asarray(sizes)))  # common first; within a size, most first
    ordered_sizes, ordered_new = np.asarray(sizes)[by_rarity], new[by_rarity]
    rarer = np.diff(ordered_sizes) < 0
    assert (np.diff(ordered_new)[rarer] >= 0).all()
    for size in set(sizes):
        same = new[np.asarray(sizes) == size]
        assert same.max() - same.min() <= 1


@settings(deadline=None)
@given(st.data(), totals, exponents)
def test_permuting_types_permutes_the_allocation(data, n_new, exponent):
    # Among types of one size a cell left over goes by position, so sizes differ here.
    sizes = data.draw(st.lists(st.integers(1, 10**6), min_size=1, max_size=20, unique=True))
    order = data.draw(st.permutations(range(len(sizes))))
    new = allocate(sizes, n_new, exponent=exponent)
    permuted = allocate([sizes[i] for i in order], n_new, exponent=exponent)
    np.testing.assert_array_equal(permuted, new[list(order)])


@settings(deadline=None)
@given(st.lists(st.floats(0.0, 1e6), min_size=1, max_size=30), totals)
def test_largest_remainder_stays_within_one_of_the_exact_share(shares, total):
    assume(sum(shares) > 1e-3)
    whole = largest_remainder(shares, total)
    assert whole.sum() == total
    exact = np.asarray(shares) / np.sum(shares) * total
    assert (np.abs(whole - exact) < 1.0 + 1e-6).all()


@settings(deadline=None)
@given(sizes_of_types, totals, st.integers(0, 1_000_000))
def test_types_below_min_cells_get_none_and_the_others_all(sizes, n_new, min_cells):
    assume(max(sizes) >= min_cells)
    sizes = np.array(sizes)
    new = allocate(sizes, n_new, min_cells=min_cells)
    eligible = sizes >= min_cells
    assert new[~eligible].sum() == 0
    np.testing.assert_array_equal(new[eligible], allocate(sizes[eligible], n_new))


@pytest.mark.parametrize(
    ("sizes", "n_new", "exponent", "expected"),
    [
        pytest.param([900, 100], 400, 0.5, [100, 300], id="inverse-sqrt"),
        pytest.param([900, 100], 400, 0.0, [200, 200], id="uniform"),
        pytest.param([900, 100], 400, 1.0, [40, 360], id="inverse"),
        pytest.param([10**9, 1], 7, 300.0, [0, 7], id="steep-exponent-underflows-quietly"),
        pytest.param([5, 5, 5], 2, 0.5, [1, 1, 0], id="ties-to-the-earlier-type"),
        pytest.param([9, 4], 3, 0.0, [1, 2], id="ties-to-the-rarer-type-first"),
        pytest.param([0, 5], 3, 0.5, [0, 3], id="an-empty-type-gets-none"),
        pytest.param([9, 4], 0, 0.5, [0, 0], id="nothing-to-add"),
        pytest.param([1] * 49, 49 * 3, 0.5, [3] * 49, id="whole-shares-survive-rounding"),
    ],
)
def test_allocation_by_hand(sizes, n_new, exponent, expected):
    assert allocate(sizes, n_new, exponent=exponent).tolist() == expected


@pytest.mark.parametrize("sizes", [[3, 4], []], ids=["too-small", "no-types"])
def test_no_type_large_enough_is_an_error_only_if_cells_are_wanted(sizes):
    with pytest.raises(ValueError, match=r"min_cells: expected at least one type with 5 .*Lower"):
        allocate(sizes, 10, min_cells=5)
    assert allocate(sizes, 0, min_cells=5).tolist() == [0] * len(sizes)


@pytest.mark.parametrize(
    ("target_size", "expected"),
    [
        pytest.param(250, 250, id="int"),
        pytest.param(np.int64(101), 101, id="numpy-int"),
        pytest.param(100, 100, id="int-as-is"),
        pytest.param(1.0, 100, id="float-as-is"),
        pytest.param(2.0, 200, id="double"),
        pytest.param(np.float32(1.5), 150, id="numpy-float"),
        pytest.param(1.1, 110, id="float-off-by-an-ulp"),
    ],
)
def test_target_size_is_a_total_or_a_multiple(target_size, expected):
    total = total_after(100, target_size)
    assert type(total) is int
    assert total == expected


@pytest.mark.parametrize(
    ("target_size", "match"),
    [
        pytest.param(99, r"at least the 100 cells already there; got 99 cells", id="int"),
        pytest.param(0.5, r"got 0\.5 x 100 = 50 cells.*raise the target", id="float"),
        pytest.param(True, r"got 1 cells", id="bool-is-one-cell"),
        pytest.param(-2.0, r"got -2 x 100", id="negative"),
        pytest.param(float("nan"), r"a finite float .*got nan", id="nan"),
        pytest.param(float("inf"), r"a finite float .*got inf", id="infinite"),
        pytest.param("2.0", r"expected an integer .*got '2\.0'", id="string"),
        pytest.param(None, r"expected an integer .*got None", id="none"),
    ],
)
def test_bad_target_size(target_size, match):
    with pytest.raises(ValueError, match=match):
        total_after(100, target_size)


@pytest.mark.parametrize(("exponent", "expected"), [(200.0, [5, 0]), (-200.0, [0, 5])])
def test_steep_exponents_do_not_overflow(exponent, expected):
    assert allocate([10, 1000], 5, exponent=exponent).tolist() == expected
