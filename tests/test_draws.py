"""The sweep: what it costs, what its draws depend on, and what they must not depend on."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from scipy import stats

from cfgen_augment import draws, sweep
from cfgen_augment.draws import draw_counts


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def block(n_cells: int, n_genes: int, total: float, seed: int = 0):
    """Profiles of log-normal genes, size factors around `total`, and dispersions."""
    rng = np.random.default_rng(seed)
    profile = torch.softmax(torch.tensor(rng.normal(0.0, 1.5, (n_cells, n_genes))).float(), dim=1)
    scale = torch.tensor(total * rng.lognormal(0.0, 0.3, (n_cells, 1))).float()
    return profile, scale, torch.tensor(rng.lognormal(0.0, 1.0, (1, n_genes))).float()


def same(first, second) -> bool:
    return all(
        np.array_equal(getattr(first, part), getattr(second, part))
        for part in ("data", "indices", "indptr")
    )


@pytest.fixture
def threads():
    """Set PyTorch's number of threads; put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def numbers(monkeypatch):
    """Run the sweep as plain Python, and list every random number that it draws."""
    taken = []
    compiled = sweep._uniform

    def uniform(state):
        taken.append(compiled(state))
        return taken[-1]

    functions = ("_exponential", "_unit_gamma", "_poisson", "_cluster", "_fill", "_settle", "sweep")
    for name in functions:
        monkeypatch.setattr(sweep, name, getattr(sweep, name).py_func)
    monkeypatch.setattr(sweep, "_uniform", uniform)
    return taken


# ------------------------------------------------------------------ the cost


def test_random_numbers_are_spent_on_events_not_on_zeros(numbers):
    spent = []
    for n_genes in (500, 4000):
        numbers.clear()
        drawn = draw_counts(*block(20, n_genes, total=100.0), generator=seeded())
        spent.append(len(numbers))
        # A buffer of gaps per cell, and a handful of numbers for every count.
        assert len(numbers) < 20 * (sweep._BUFFER + 1) + 6 * drawn.sum()
    assert spent[1] < 20 * 4000 / 8
    assert spent[1] < 1.5 * spent[0]  # eight times the genes, the same total


def test_large_counts_do_not_cost_an_event_each(numbers):
    profile, scale, theta = block(5, 30, total=1e7)
    drawn = draw_counts(profile, scale, theta, generator=seeded())
    assert drawn.sum() > 1e7
    assert len(numbers) < 100 * profile.numel()


def test_nothing_dense_is_made_but_room_for_the_result():
    arguments = block(100, 2000, total=200.0)
    draw_counts(*arguments, generator=seeded())  # compiles
    tracemalloc.start()
    draw_counts(*arguments, generator=seeded())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.3 * 8 * arguments[0].numel()  # an int32 column and count per entry


def test_compiled_and_plain_sweep_agree(request):
    arguments = block(10, 200, total=2000.0)
    compiled = draw_counts(*arguments, generator=seeded(3))
    numbers = request.getfixturevalue("numbers")
    plain = draw_counts(*arguments, generator=seeded(3))
    assert numbers
    assert same(compiled, plain)


def test_uniform_numbers_are_uniform_and_open():
    state = np.array([1, 2, 3, 4], dtype=np.uint64)
    numbers = np.array([sweep._uniform(state) for _ in range(20_000)])
    assert stats.kstest(numbers[20:], "uniform").pvalue > 1e-4  # a poor state needs a few steps
    assert 0.0 < numbers.min() < numbers.max() < 1.0
    assert abs(np.corrcoef(numbers[20:-1], numbers[21:])[0, 1]) < 0.03


def test_without_a_place_for_a_compiled_copy_it_compiles_in_memory():
    names: dict = {}
    exec("def twice(x):\n    return 2 * x", names)  # of no file, so that there is no folder
    assert sweep._compiled(names["twice"])(21) == 42


# -------------------------------------------------- what draws depend upon


def test_counts_do_not_depend_on_the_number_of_threads(threads):
    arguments = block(200, 2000, total=500.0)
    assert arguments[0].numel() > 3 * draws._PART_VALUES
    drawn = []
    for n in (1, 2, 3):
        threads(n)
        drawn.append(draw_counts(*arguments, generator=seeded()))
    assert drawn[0].nnz > 1000
    assert same(drawn[0], drawn[1])
    assert same(drawn[0], drawn[2])


def test_a_cell_depends_on_no_other_cell():
    profile, scale, theta = block(50, 300, total=500.0)
    drawn = draw_counts(profile, scale, theta, generator=seeded())
    generator = seeded()
    in_two = [
        draw_counts(profile[rows], scale[rows], theta, generator=generator)
        for rows in (slice(0, 20), slice(20, 50))
    ]
    assert same(drawn[:20], in_two[0])
    assert same(drawn[20:], in_two[1])
    scale[7] *= 9.0
    other = draw_counts(profile, scale, theta, generator=seeded())
    changed = np.unique((drawn != other).nonzero()[0])
    np.testing.assert_array_equal(changed, [7])


def test_genes_and_cells_are_independent():
    profile, scale, theta = block(1, 12, total=20.0)
    n = 40_000
    drawn = draw_counts(profile.expand(n, 12), scale.expand(n, 1), theta, generator=seeded())
    dense = drawn.toarray().astype(float)
    bound = 5.0 / np.sqrt(n)
    ranks = stats.rankdata(dense, axis=0)
    assert np.abs(np.corrcoef(ranks, rowvar=False) - np.eye(12)).max() < bound
    for gene in range(12):
        assert abs(np.corrcoef(ranks[:-1, gene], ranks[1:, gene])[0, 1]) < bound
    # The last gene of a cell and the first of the next: the sweep starts anew.
    assert abs(np.corrcoef(ranks[:-1, -1], ranks[1:, 0])[0, 1]) < bound
    mean = (profile * scale).double().numpy()[0]
    variance = mean + mean**2 / theta.double().numpy()[0]
    np.testing.assert_allclose(dense.mean(axis=0), mean, atol=5 * np.sqrt(variance.max() / n))
    assert dense.sum(axis=1).var() == pytest.approx(variance.sum(), rel=0.05)


def test_every_cell_has_its_own_mean_and_dispersion():
    rng = np.random.default_rng(1)
    profile, scale, _ = block(30_000, 3, total=6.0)
    theta = torch.tensor([[0.3, 2.0, 50.0], [5.0, 0.1, 1.0]])
    group = torch.tensor(rng.integers(0, 2, 30_000))
    drawn = draw_counts(profile, scale, theta, group, generator=seeded()).toarray()
    mu, shape = (profile * scale).double().numpy(), theta[group].double().numpy()
    nb = stats.nbinom(shape, shape / (shape + mu))
    # Randomised probability integral transform: uniform if every entry has its own law.
    below, at = nb.cdf(drawn - 1), nb.pmf(drawn)
    u = below + rng.uniform(size=drawn.shape) * at
    for gene in range(3):
        assert stats.kstest(u[:, gene], "uniform").pvalue > 1e-4


# ------------------------------------------------------------------ shapes


@pytest.mark.parametrize(
    ("n_cells", "n_genes", "total"),
    [
        pytest.param(6, 28_000, 5_000.0, id="whole-genome"),
        pytest.param(3000, 1, 2.0, id="one-gene"),
        pytest.param(40, 50, 1e9, id="enormous-totals"),
        pytest.param(40, 200, 700.0, id="many-buffers-per-cell"),
        pytest.param(300, 50, 0.02, id="nearly-empty"),
    ],
)
def test_shapes_and_totals(n_cells, n_genes, total):
    profile, scale, _ = block(n_cells, n_genes, total)
    drawn = draw_counts(profile, scale, generator=seeded())
    assert drawn.shape == (n_cells, n_genes)
    drawn.check_format(full_check=True)
    rebuilt = type(drawn)((drawn.data, drawn.indices, drawn.indptr), drawn.shape)
    assert rebuilt.has_canonical_format
    assert {drawn.data.dtype, drawn.indices.dtype, drawn.indptr.dtype} == {np.dtype(np.int32)}
    assert drawn.data.min() > 0
    expected = (profile * scale).double().sum().item()
    assert abs(float(drawn.sum(dtype=np.int64)) - expected) < 5.0 * np.sqrt(expected)


def test_means_that_are_not_numbers_end_in_no_counts_not_in_a_hang():
    profile = torch.full((2, 5), torch.nan)
    assert draw_counts(profile, torch.ones(2, 1), generator=seeded()).nnz == 0
    infinite = draw_counts(torch.full((1, 2), 0.5), torch.tensor([[torch.inf]]), generator=seeded())
    assert infinite.data.tolist() == [2**31 - 1] * 2
