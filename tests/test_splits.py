"""Splits by donor, thinning, genes and allocation: what a held-out donor must not touch."""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats

from benchmarks.cells import Cells, log_normalise
from benchmarks.genes import allocation, choose_genes
from benchmarks.simulated import simulate
from benchmarks.splits import Split, make_splits, parse_thin
from cfgen_augment import CFGenSampler


def make_cells(n_donors: int | None = 8, per_donor: int = 60, n_genes: int = 12) -> Cells:
    """Cells of three types: in every donor a third B, a tenth NK, and the rest T."""
    sizes = (per_donor // 3, per_donor // 10)
    one = np.repeat(["B", "NK", "T"], [*sizes, per_donor - sum(sizes)])
    n = (n_donors or 8) * per_donor
    rng = np.random.default_rng(0)
    order = rng.permutation(n)
    donors = np.array([f"d{i // per_donor}" for i in order])
    return Cells(
        counts=sparse.csr_matrix(rng.poisson(1.0, (n, n_genes)), dtype=np.float32),
        labels=np.tile(one, n // per_donor)[order],
        genes=np.array([f"g{i}" for i in range(n_genes)]),
        donors=None if n_donors is None else donors,
    )


def same(one: Split, other: Split) -> bool:
    return (one.number, one.held_out) == (other.number, other.held_out) and all(
        np.array_equal(getattr(one, rows), getattr(other, rows))
        for rows in ("train", "test", "pool")
    )


def check_partition(cells: Cells, split: Split) -> None:
    rows = np.concatenate([split.train, split.test, split.pool])
    assert np.array_equal(np.sort(rows), np.arange(len(cells)))
    for part in (split.train, split.test, split.pool):
        assert np.array_equal(part, np.sort(part))


# --- donors -----------------------------------------------------------------------------------


def test_a_held_out_donor_is_nowhere_but_in_the_test_set():
    cells = make_cells()
    for split in make_splits(cells, thin={"T": 30}):
        check_partition(cells, split)
        assert set(cells.donors[split.test]) == set(split.held_out)
        assert not set(cells.donors[split.train]) & set(split.held_out)
        assert not set(cells.donors[split.pool]) & set(split.held_out)


def test_five_splits_of_eight_donors_cover_all_evenly():
    for seed in range(20):
        held_out = [split.held_out for split in make_splits(make_cells(), n_splits=5, seed=seed)]
        assert all(len(donors) == 2 for donors in held_out)
        assert len(set(held_out)) == 5
        times = Counter(donor for donors in held_out for donor in donors)
        assert len(times) == 8
        assert set(times.values()) <= {1, 2}


@settings(max_examples=60, deadline=None)
@given(
    n_donors=st.integers(6, 12),
    n_splits=st.integers(1, 12),
    fraction=st.floats(0.05, 0.6),
    seed=st.integers(0, 2**31),
)
def test_any_number_of_donors_is_held_out_evenly_and_never_the_same_way_twice(
    n_donors, n_splits, fraction, seed
):
    cells = make_cells(n_donors, per_donor=30, n_genes=2)
    n_out = max(1, round(fraction * n_donors))
    if n_splits > math.comb(n_donors, n_out):
        with pytest.raises(ValueError, match="different ways to hold out"):
            make_splits(cells, n_splits=n_splits, held_out_fraction=fraction, seed=seed)
        return
    splits = make_splits(cells, n_splits=n_splits, held_out_fraction=fraction, seed=seed)
    sets = [split.held_out for split in splits]
    assert len(set(sets)) == n_splits
    assert all(len(donors) == n_out for donors in sets)
    times = Counter(dict.fromkeys(np.unique(cells.donors), 0))
    times.update(donor for donors in sets for donor in donors)
    if n_splits * n_out <= n_donors or n_out == 1:  # no repeat can force an uneven deal
        assert max(times.values()) - min(times.values()) <= 1


def test_all_ways_to_hold_out_are_found_even_if_even_deals_run_out():
    splits = make_splits(make_cells(7, 30), n_splits=35, held_out_fraction=3 / 7)
    assert len({split.held_out for split in splits}) == math.comb(7, 3)


@pytest.mark.parametrize("n_donors", [2, 3, 5])
def test_few_donors_are_left_out_one_by_one_and_it_is_said(n_donors, caplog):
    with caplog.at_level(logging.WARNING):
        splits = make_splits(make_cells(n_donors), n_splits=4)
    assert [split.held_out for split in splits] == [(f"d{i}",) for i in range(n_donors)]
    assert f"{n_donors} donors: each is held out once" in caplog.text


def test_without_donors_stratified_folds_stand_in():
    cells = make_cells(None)
    splits = make_splits(cells, n_splits=4, thin={"T": 25})
    assert np.array_equal(np.sort(np.concatenate([s.test for s in splits])), np.arange(len(cells)))
    for split in splits:
        check_partition(cells, split)
        assert split.held_out == ()
        for name, n in cells.take(split.test).sizes().items():
            assert abs(n - cells.sizes()[name] / 4) < 1
        assert cells.take(split.train).sizes()["T"] == 25


def test_a_type_with_fewer_cells_than_folds_does_not_stop_the_run():
    cells = make_cells(None)
    labels = cells.labels.astype("<U9")
    labels[:2] = "very rare"
    assert len(make_splits(replace(cells, labels=labels), n_splits=5)) == 5


# --- training cells ---------------------------------------------------------------------------


def test_thinning_is_exact_and_the_others_keep_all_but_the_reserve():
    cells = make_cells()
    for split in make_splits(cells, thin={"T": 30, "NK": 7}, reserve=0.1):
        rest = cells.take(np.union1d(split.train, split.pool)).sizes()
        assert cells.take(split.train).sizes() == {
            "B": rest["B"] - int(0.1 * rest["B"]),
            "NK": 7,
            "T": 30,
        }


def test_a_type_that_is_rarer_than_asked_for_is_kept_whole():
    cells = make_cells()
    split = make_splits(cells, thin={"NK": 10_000}, reserve=0.5)[0]
    assert "NK" not in cells.take(split.pool).sizes()


def test_no_reserve_and_no_thinning_leave_no_pool():
    assert all(split.pool.size == 0 for split in make_splits(make_cells(), reserve=0.0))


def test_thinned_cells_are_a_random_sample():
    cells = make_cells(2, per_donor=300)
    times = np.zeros(len(cells))
    for seed in range(200):
        times[make_splits(cells, thin={"T": 20}, seed=seed)[0].train] += 1
    rows = np.flatnonzero((cells.labels == "T") & (cells.donors == "d1"))
    # Each is kept with probability p, so the count over seeds is binomial.
    p = 20 / rows.size
    assert abs(times[rows].mean() - 200 * p) < 1e-9
    assert times[rows].std() < 2 * np.sqrt(200 * p * (1 - p))


def test_splits_depend_on_the_seed_and_their_number_only():
    cells = make_cells()
    five, nine = make_splits(cells, n_splits=5, seed=3), make_splits(cells, n_splits=9, seed=3)
    assert all(same(a, b) for a, b in zip(five, nine, strict=False))
    other = make_splits(cells, n_splits=5, seed=4)
    assert not any(same(a, b) for a, b in zip(five, other, strict=True))
    # Not even a common draw of cells, where the donors held out happen to agree.
    assert not np.array_equal(five[0].train, five[1].train)


def test_thinning_one_type_does_not_touch_another_and_thinned_sets_nest():
    cells = make_cells()
    plain, few, more = (make_splits(cells, thin=thin)[0] for thin in ({}, {"T": 20}, {"T": 40}))

    def kept(split, name):
        return set(split.train[cells.labels[split.train] == name].tolist())

    assert kept(plain, "B") == kept(few, "B") == kept(more, "B")
    assert kept(few, "T") < kept(more, "T") < kept(plain, "T")


# --- leakage ----------------------------------------------------------------------------------


def test_counts_of_held_out_donors_change_nothing_of_training():
    cells, _ = simulate(n_donors=6, cells_per_donor=80, n_genes=60, seed=1)
    split = make_splits(cells, thin={"A1": 20})[2]
    wild = cells.counts.toarray()
    wild[split.test] = np.random.default_rng(0).poisson(50.0, (split.test.size, 60))
    changed = replace(cells, counts=sparse.csr_matrix(wild))
    again = make_splits(changed, thin={"A1": 20})[2]
    assert same(split, again)
    genes = choose_genes(cells.take(split.train).counts, 25)
    assert np.array_equal(genes, choose_genes(changed.take(again.train).counts, 25))
    one, two = (c.take(s.train) for c, s in ((cells, split), (changed, again)))
    assert allocation(one) == allocation(two)
    assert (one.counts != two.counts).nnz == 0


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_gene_that_varies_in_held_out_donors_only_is_not_chosen(rate):
    cells, _ = simulate(n_donors=8, cells_per_donor=60, n_genes=80, seed=2)
    split = make_splits(cells)[0]
    planted, rng = 17, np.random.default_rng(0)
    dense = cells.counts.toarray()
    dense[split.test, planted] = 500 * rng.poisson(1.0, split.test.size)
    for rows in (split.train, split.pool):  # the same in all cells of the other donors, or absent
        dense[rows, planted] = rng.poisson(rate, rows.size)
    counts = sparse.csr_matrix(dense)
    assert planted in choose_genes(counts, 30), "the plant would be chosen if donors leaked"
    assert planted not in choose_genes(counts[split.train], 30)


# --- genes ------------------------------------------------------------------------------------


def test_genes_that_training_hardly_has_are_dropped_even_if_all_fit():
    counts = make_cells().counts.tolil()
    counts[:, 3] = 0
    counts[:2, 3] = 7
    assert choose_genes(counts.tocsr(), 100).tolist() == [0, 1, 2, *range(4, 12)]


def test_chosen_genes_are_scanpys():
    scanpy = pytest.importorskip("scanpy")
    import anndata

    cells, _ = simulate(n_donors=2, cells_per_donor=200, seed=5)
    chosen = choose_genes(cells.counts, 50)
    adata = anndata.AnnData(cells.counts.copy())
    scanpy.pp.normalize_total(adata, target_sum=1e4)
    scanpy.pp.log1p(adata)
    scanpy.pp.highly_variable_genes(adata, n_top_genes=50)
    assert chosen.tolist() == np.flatnonzero(adata.var["highly_variable"]).tolist()
    assert np.allclose(log_normalise(cells.counts).toarray(), adata.X.toarray(), rtol=1e-4)


def test_exactly_as_many_genes_as_asked_for_even_if_some_tie():
    counts = make_cells().counts
    doubled = sparse.hstack([counts, counts, counts], format="csr")  # every gene three times
    assert choose_genes(doubled, 10).size == 10


def test_type_markers_are_chosen():
    cells, truth = simulate(n_donors=4, donor_sd=0.0, interaction_sd=0.0, n_genes=200, seed=6)
    spread = truth.programmes.std(axis=0)
    chosen = choose_genes(cells.counts, 50)
    test = stats.mannwhitneyu(spread[chosen], np.delete(spread, chosen), alternative="greater")
    assert test.pvalue < 1e-4


@pytest.mark.parametrize(
    ("counts", "n_genes", "match"),
    [
        pytest.param(np.ones((3, 2)), 0, "n_genes: expected 1 or more", id="none wanted"),
        pytest.param(np.zeros((3, 2)), 5, "none of 2 has them in these 3 cells", id="no counts"),
    ],
)
def test_gene_selection_errors(counts, n_genes, match):
    with pytest.raises(ValueError, match=match):
        choose_genes(sparse.csr_matrix(counts), n_genes)


# --- allocation -------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [2.0, 1.5, 700])
def test_allocation_is_the_samplers_own(target):
    cells = make_cells()
    cells = cells.take(np.flatnonzero(cells.labels != "NK")[:400]).with_genes(np.arange(3))
    labels = cells.labels.astype("<U9")
    labels[:4] = "too rare"
    cells = replace(cells, labels=labels)
    with pytest.warns(UserWarning, match="min_cells=5"):
        expected = CFGenSampler(target_size=target)._allocation(cells.labels)
    got = allocation(cells, target)
    assert got == {name: n for name, n in expected.items() if n}
    assert "too rare" not in got
    total = target if isinstance(target, int) else round(target * len(cells))
    assert sum(got.values()) == total - len(cells)


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "arguments", "match"),
    [
        pytest.param(
            make_cells(), {"thin": {"Tt": 5}}, "among 'B', 'NK', 'T'; got 'Tt'", id="type"
        ),
        pytest.param(make_cells(), {"thin": {"T": 0}}, "expected 1 cell of 'T'", id="thin to none"),
        pytest.param(make_cells(1), {}, "donors: expected two or more", id="one donor"),
        pytest.param(make_cells(6), {"n_splits": 7}, "at most the 6 different ways", id="splits"),
        pytest.param(make_cells(), {"n_splits": 0}, "n_splits: expected 1", id="no splits"),
        pytest.param(make_cells(None), {"n_splits": 1}, "expected from 2 to", id="one fold"),
        pytest.param(make_cells(), {"held_out_fraction": 1.0}, "held_out_fraction", id="all out"),
        pytest.param(make_cells(), {"reserve": 1.0}, "reserve: expected", id="all reserved"),
        pytest.param(
            replace(make_cells(), labels=np.repeat("B", 480)), {}, "two types or more", id="a type"
        ),
    ],
)
def test_errors_say_what_to_do(cells, arguments, match):
    with pytest.raises(ValueError, match=match):
        make_splits(cells, **arguments)


def test_a_type_of_one_donor_cannot_be_thinned_where_that_donor_is_held_out(caplog):
    cells = make_cells(4)
    labels = cells.labels.astype("<U8")
    labels[(cells.donors == "d2") & (labels == "NK")] = "d2's own"
    cells = replace(cells, labels=labels)
    with pytest.raises(ValueError, match=r"split 2 \(held out: d2\).* \"d2's own\""):
        make_splits(cells, n_splits=4, thin={"d2's own": 2})
    with caplog.at_level(logging.WARNING):
        make_splits(cells, n_splits=4)
    assert "split 2 (held out: d2): types in the test set without training cells" in caplog.text
    assert caplog.text.count("without training cells") == 1


# --- parse_thin -------------------------------------------------------------------------------

names = st.text(st.characters(exclude_characters=",", exclude_categories=("C", "Z")), min_size=1)


@given(
    st.dictionaries(names, st.integers(1, 10**6), max_size=5),
    st.sampled_from([",", ", ", " , "]),
    st.sampled_from([":", ": ", " :"]),
)
def test_thin_comes_back_whatever_types_are_called(thin, comma, colon):
    assert parse_thin(comma.join(f"{name}{colon}{n}" for name, n in thin.items())) == thin


def test_names_may_hold_spaces_and_colons():
    assert parse_thin("CL:0000235 (a: b):12,T cells:3") == {"CL:0000235 (a: b)": 12, "T cells": 3}


@pytest.mark.parametrize("text", ["B", "B:", ":5", "B:0", "B:-1", "B:1.5", "B:5,", "B:²", "B:5,NK"])
def test_malformed_thinning_is_refused(text):
    with pytest.raises(ValueError, match="expected 'type:cells'"):
        parse_thin(text)


def test_a_type_cannot_be_thinned_twice():
    with pytest.raises(ValueError, match="'B' twice"):
        parse_thin("B:5, B:6")


def test_real_donors(real_data):
    from benchmarks.data import load_cells

    cells = load_cells(str(real_data("kang_pbmc_ctrl_8donors.h5ad")))
    thin = parse_thin("FCGR3A+ Monocytes:20,CD8 T cells:20,B cells:40")
    splits = make_splits(cells, thin=thin)
    assert len({donor for split in splits for donor in split.held_out}) == 8
    for split in splits:
        check_partition(cells, split)
        sizes = cells.take(split.train).sizes()
        assert {name: sizes[name] for name in thin} == thin
        assert len(sizes) == 8
