"""Copies are found, and fresh draws of the training distribution are not mistaken for them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from benchmarks.cells import log_normalise
from benchmarks.memorisation import memorisation
from cfgen_augment.measures import exact_copies

MEASURES = ["dcr_ratio", "nn_ratio", "mia_auc"]


def draws(n, seed, n_genes=40):
    """Counts and types of `n` cells of each of two types, the same two whatever the seed."""
    rng = np.random.default_rng(seed)
    rates = np.random.default_rng(99).gamma(2.0, 2.0, size=(2, n_genes))
    counts = np.concatenate([rng.poisson(rate, size=(n, n_genes)) for rate in rates])
    return sparse.csr_matrix(counts.astype(np.float32)), np.repeat(["A", "B"], n)


def measured(new, new_labels, n_training=300, others=300, **options):
    """Against training cells of seed 0 and as many others of seed 1."""
    training, labels = draws(n_training, 0)
    unused, unused_labels = draws(others, 1)
    return memorisation(
        log_normalise(training),
        labels,
        log_normalise(new),
        new_labels,
        log_normalise(unused),
        unused_labels,
        seed=0,
        **options,
    )


def test_fresh_draws_look_like_cells_that_were_not_trained_on():
    table = measured(*draws(300, 2))
    assert table.index.tolist() == ["A", "B"]
    np.testing.assert_allclose(table["dcr_ratio"], 1.0, atol=0.08)
    np.testing.assert_allclose(table["nn_ratio"], 1.0, atol=0.05)
    np.testing.assert_allclose(table["mia_auc"], 0.5, atol=0.07)
    assert (table["exact_copies"] == 0).all()


def test_copies_are_caught_by_every_measure():
    table = measured(*draws(300, 0))
    assert (table["exact_copies"] == 1).all()
    np.testing.assert_allclose(table["dcr_ratio"], 0.0, atol=1e-5)
    np.testing.assert_allclose(table["nn_ratio"], 0.0, atol=1e-5)
    np.testing.assert_allclose(table["mia_auc"], 1.0)


def test_near_copies_are_caught_without_being_equal():
    """One molecule more of one gene: no copy, and far closer than real cells are."""
    counts, labels = draws(300, 0)
    changed = counts.toarray()
    changed[:, 0] += 1
    table = measured(sparse.csr_matrix(changed), labels)
    assert (table["exact_copies"] == 0).all()
    assert (table["dcr_ratio"] < 0.5).all()
    assert (table["mia_auc"] > 0.95).all()


def test_the_membership_attack_sees_only_the_cells_that_were_copied():
    """A quarter of the members copied: they rank first, the rest at chance: .25 + .75 / 2."""
    counts, labels = draws(300, 0)
    fresh, fresh_labels = draws(300, 2)
    rows = np.concatenate([np.arange(75), 300 + np.arange(75)])
    mixed = sparse.vstack([counts[rows], fresh], format="csr")
    table = measured(mixed, np.concatenate([labels[rows], fresh_labels]))
    np.testing.assert_allclose(table["mia_auc"], 0.625, atol=0.06)
    np.testing.assert_allclose(table["exact_copies"], 75 / 375)


def test_the_size_of_the_training_set_cancels():
    """Distances to the closest of 1,000 cells are shorter than to the closest of 30."""
    few, many = (measured(*draws(300, 2), n_training=n) for n in (30, 1000))
    assert (many["dcr_new"] < few["dcr_new"]).all()
    for table in (few, many):
        np.testing.assert_allclose(table["dcr_ratio"], 1.0, atol=0.1)


def test_distances_are_those_of_a_double_loop():
    """Closest records without any library."""
    training, labels = draws(20, 0)
    new, new_labels = draws(12, 2)
    table = measured(new, new_labels, n_training=20, others=8)

    def places(counts, of):
        return log_normalise(counts).toarray()[of == "A"].astype(np.float64)

    two = [
        sorted(np.linalg.norm(a - b) for b in places(training, labels))[:2]
        for a in places(new, new_labels)
    ]
    assert table.loc["A", "dcr_new"] == pytest.approx(np.median([d[0] for d in two]), rel=1e-4)
    assert table.loc["A", "nn_new"] == pytest.approx(
        np.median([d[0] / d[1] for d in two]), rel=1e-4
    )


def test_blocks_find_the_same_neighbours(monkeypatch):
    whole = measured(*draws(100, 2), n_training=103)
    monkeypatch.setattr("cfgen_augment.measures._BLOCK_VALUES", 17 * 40)
    blocks = measured(*draws(100, 2), n_training=103)
    np.testing.assert_allclose(blocks.to_numpy(), whole.to_numpy(), rtol=1e-5)


def test_nothing_is_fitted_that_would_tell_members_from_others():
    """Few cells and many genes, where components of the training cells would give them away."""
    rng = np.random.default_rng(0)
    rates = rng.gamma(1.0, 0.5, size=400)
    counts = [sparse.csr_matrix(rng.poisson(rates, (200, 400)).astype(np.float32)) for _ in "123"]
    logs, labels = [log_normalise(c) for c in counts], np.repeat("A", 200)
    table = memorisation(logs[0], labels, logs[1], labels, logs[2], labels, seed=0)
    np.testing.assert_allclose(table["mia_auc"], 0.5, atol=0.08)
    np.testing.assert_allclose(table["dcr_ratio"], 1.0, atol=0.03)


def test_copies_of_another_type_do_not_count():
    counts, labels = draws(50, 0)
    table = measured(counts, np.where(labels == "A", "B", "A"), n_training=50)
    assert (table["exact_copies"] == 0).all()


def test_copies_are_sought_in_counts_where_they_are_given():
    """Twice the counts have the same normalised values, and are no copy."""
    counts, labels = draws(50, 0)
    table = measured(counts * 2, labels, n_training=50, counts=(counts, counts * 2))
    assert (table["exact_copies"] == 0).all()


def test_rows_are_equal_however_they_are_stored():
    plain = sparse.csr_matrix(np.array([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]]))
    odd = sparse.csr_matrix(
        (np.array([2.0, 1.0, 0.0, 3.0]), np.array([2, 0, 1, 1]), np.array([0, 3, 4])), shape=(2, 3)
    )
    assert exact_copies(plain, odd) == 1.0
    assert exact_copies(plain, plain * 2) == 0.0
    assert exact_copies(plain[:1], plain) == 0.5
    assert np.isnan(exact_copies(plain, plain[:0]))


@pytest.mark.parametrize("others", [0, 4])
def test_too_few_others_are_no_yardstick(others):
    table = measured(*draws(30, 2), others=others)
    assert table[MEASURES].isna().all().all()
    assert table["exact_copies"].notna().all()
    assert table["n_non_member"].tolist() == [others, others]


def test_a_single_training_cell_has_no_second_neighbour():
    table = measured(*draws(30, 2), n_training=1)
    assert table["nn_ratio"].isna().all()
    assert table["dcr_ratio"].notna().all()


def test_types_that_nobody_was_trained_on_and_no_cells_at_all():
    new, _ = draws(20, 2)
    unknown = measured(new, np.repeat("other", 40))
    assert unknown.loc["other", "exact_copies"] == 0
    assert unknown.loc["other", MEASURES].isna().all()
    none = measured(new[:0], np.array([], dtype=str))
    assert none.empty
    assert none.index.name == "type"
    assert set(MEASURES) < set(none.columns)


def test_large_types_are_sampled_by_the_seed(monkeypatch):
    monkeypatch.setattr("benchmarks.memorisation._MOST", 50)
    new = draws(300, 2)
    first = measured(*new)
    assert first.equals(measured(*new))
    np.testing.assert_allclose(first["dcr_ratio"], 1.0, atol=0.2)
