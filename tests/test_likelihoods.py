"""Noise models against SciPy's closed forms: densities, draws, starts."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from scipy import sparse, stats

from cfgen_augment import draws, likelihoods
from cfgen_augment.likelihoods import (
    LIKELIHOODS,
    Bernoulli,
    Gaussian,
    Likelihood,
    NegativeBinomial,
    Poisson,
    make_likelihood,
    value_kind,
)
from cfgen_augment.minibatch import Minibatch

MEANS = np.array([1e-4, 0.1, 1.0, 10.0, 300.0, 1e4])
ALPHA = 1e-4  # a right sampler fails a test once in ten thousand seeds; the seeds are fixed
COUNTS = np.array([0.0, 1.0, 2.0, 5.0, 20.0, 300.0, 1e4])


def negative_binomial(*log_theta, dtype=torch.float32) -> NegativeBinomial:
    """One dispersion per group (row) and a single gene."""
    model = NegativeBinomial(1, len(log_theta))
    model.log_theta.data = torch.tensor(log_theta, dtype=dtype)[:, None]
    return model


def scipy_nb(mu, theta):
    return stats.nbinom(theta, theta / (theta + mu))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(model, natural, group=None, seed: int = 0):
    """Draw at log means, split into the composition and size factor that the model takes."""
    log_size = natural.logsumexp(dim=1, keepdim=True)
    return model.sample(natural, log_size, group, generator=seeded(seed))


@pytest.fixture(params=["sweep", "dense"])
def way(request, monkeypatch):
    """The CPU's way to draw, and the one of other devices."""

    def dense(profile, scale, theta=None, group=None, *, generator, ceiling=2**31 - 1):
        return draws._dense(profile * scale, theta, group, generator, ceiling)

    if request.param == "dense":
        monkeypatch.setattr(likelihoods, "draw_counts", dense)
    return request.param


def grid(dtype):
    """Every mean against every count: log means, counts, both ``(n, 1)``."""
    mu, x = (values.reshape(-1, 1) for values in np.meshgrid(MEANS, COUNTS))
    return torch.tensor(np.log(mu), dtype=dtype), torch.tensor(x, dtype=dtype), mu, x


# ------------------------------------------------------------------ log_prob


@pytest.mark.parametrize("log_theta", [-25.0, -10.0, -4.0, 0.0, 3.0, 7.0, 10.0, 25.0])
def test_nb_log_prob(log_theta):
    theta = np.exp(np.clip(log_theta, -10.0, 10.0))
    natural, x_, mu, x = grid(torch.float64)
    expected = scipy_nb(mu, theta).logpmf(x)
    got = negative_binomial(log_theta, dtype=torch.float64).log_prob(x_, natural)
    np.testing.assert_allclose(got.detach(), expected, rtol=1e-6, atol=1e-8)
    # In float32 the log-gammas of counts in the thousands are what limits the precision ...
    natural, x_, *_ = grid(torch.float32)
    got = negative_binomial(log_theta).log_prob(x_, natural).detach()
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=2e-2)
    # ... and nothing limits that of the zeros, most of the data.
    zero = (x == 0).ravel()
    np.testing.assert_allclose(got[zero], expected[zero], rtol=1e-4)


@pytest.mark.parametrize("log_theta", [-25.0, -10.0, 0.0, 10.0, 25.0])
def test_nb_gradients_are_finite_and_of_a_sane_size(log_theta):
    model = negative_binomial(log_theta)
    natural, x_, mu, x = grid(torch.float32)
    natural.requires_grad_()
    model.log_prob(x_, natural).sum().backward()
    # d log p / d log mu = (x - mu) / (1 + mu / theta)
    theta = np.exp(np.clip(log_theta, -10.0, 10.0))
    np.testing.assert_allclose(natural.grad, (x - mu) / (1 + mu / theta), rtol=1e-3, atol=1e-3)
    assert torch.isfinite(model.log_theta.grad).all()


def test_nb_approaches_poisson_and_group_picks_the_dispersion():
    natural, x_, mu, x = grid(torch.float64)
    keep = (mu <= 1.0) & (x <= 5.0)
    nb = negative_binomial(10.0, dtype=torch.float64).log_prob(x_, natural).detach().numpy()
    np.testing.assert_allclose(nb[keep], Poisson().log_prob(x_, natural).numpy()[keep], atol=1e-3)

    two = negative_binomial(-1.0, 2.0, dtype=torch.float64)
    group = torch.arange(len(x)) % 2
    got = two.log_prob(x_, natural, group).detach()
    theta = np.exp([-1.0, 2.0])[group.numpy()][:, None]
    np.testing.assert_allclose(got, scipy_nb(mu, theta).logpmf(x), rtol=1e-8)
    with pytest.raises(ValueError, match=r"dispersion='gene-label': expected a label for every"):
        two.log_prob(x_, natural)
    with pytest.raises(ValueError, match=r"got none\. Pass labels"):
        draw(two, natural)


def test_poisson_bernoulli_and_gaussian_log_prob():
    natural, x_, mu, x = grid(torch.float64)
    expected = stats.poisson(mu).logpmf(x)
    np.testing.assert_allclose(Poisson().log_prob(x_, natural), expected, rtol=1e-9, atol=1e-12)

    logit = np.linspace(-30.0, 30.0, 13)
    for present in (0.0, 1.0):
        got = Bernoulli().log_prob(torch.full((13,), present).double(), torch.tensor(logit))
        # log p = -log(1 + exp(-logit)): SciPy's bernoulli itself loses 1 - p beyond 16 digits.
        expected = stats.logistic.logcdf(logit if present else -logit)
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-14)
        moderate = np.abs(logit) <= 10.0
        closed_form = stats.bernoulli(stats.logistic.cdf(logit)).logpmf(present)
        np.testing.assert_allclose(got[moderate], closed_form[moderate], rtol=1e-6)

    gaussian = Gaussian(3).double()
    gaussian.initialise(np.array([0.0, 5.0, -2.0]), np.array([1.0, 4.0, 1e-4]), np.ones(9))
    gaussian.log_scale.data = torch.tensor([0.0, -1.0, 25.0]).double()
    scale = np.array([1.0, 2.0, 1e-2]) * np.exp([0.0, -1.0, 10.0])
    x = np.array([[0.3, 2.0, 1.0], [-4.0, 5.0, 1e3]])
    mean = np.array([[0.0, 4.5, -1.0], [1.0, 5.0, 7.0]])
    got = gaussian.log_prob(torch.tensor(x), torch.tensor(mean)).detach()
    np.testing.assert_allclose(got, stats.norm(mean, scale).logpdf(x), rtol=1e-9)


# -------------------------------------------------------------------- sample


def chi_square_p(drawn: np.ndarray, distribution) -> float:
    """P value of counts under a discrete distribution, tails pooled to 10 expected or more."""
    n = drawn.size
    top = int(distribution.ppf(1.0 - 1e-6)) + 1
    cut = np.arange(-1, top + 1)
    if top > 400:  # large means: some 50 bins of about equal mass
        cut = np.unique(distribution.ppf(np.linspace(1e-3, 1.0 - 1e-3, 50)))
    edges = [cut[0]]
    cdf = distribution.cdf(cut)
    last = 0.0 if cut[0] < 0 else cdf[0]
    for value, mass in zip(cut[1:], cdf[1:], strict=True):
        if n * (mass - last) >= 10 and n * (1.0 - mass) >= 10:
            edges.append(value)
            last = mass
    inner = np.concatenate([[-np.inf], edges[1:] if cut[0] < 0 else edges, [np.inf]])
    expected = n * np.diff(np.concatenate([[0.0], distribution.cdf(inner[1:-1]), [1.0]]))
    observed = np.histogram(drawn, np.concatenate([inner[:-1] + 0.5, [np.inf]]))[0]
    assert len(expected) > 1
    assert observed.sum() == n
    return stats.chisquare(observed, expected).pvalue


@pytest.mark.parametrize(
    ("mu", "theta"),
    [
        pytest.param(0.002, 0.5, id="sparse"),
        pytest.param(0.4, 0.05, id="heavy-tail"),
        pytest.param(1.0, np.exp(-10.0), id="heaviest-tail"),
        pytest.param(1.0, 1.0, id="geometric"),
        pytest.param(0.01, np.exp(10.0), id="sparse-nearly-poisson"),
        pytest.param(3.0, 1e4, id="nearly-poisson"),
        pytest.param(3.99, 2.0, id="largest-mean-by-events"),
        pytest.param(4.01, 2.0, id="smallest-mean-by-mixture"),
        pytest.param(10.0, 0.05, id="mixture-heavy-tail"),
        pytest.param(40.0, 8.0, id="mixture"),
        pytest.param(2000.0, 3.0, id="mixture-large"),
        pytest.param(2e5, np.exp(10.0), id="mixture-huge"),
    ],
)
def test_nb_draws(mu, theta, way):
    natural = torch.full((40_000, 1), float(np.log(mu)))
    drawn = draw(negative_binomial(np.log(theta)), natural).toarray()
    assert chi_square_p(drawn, scipy_nb(mu, theta)) > ALPHA
    p_zero = np.exp(-theta * np.log1p(mu / theta))
    assert stats.binomtest(int((drawn == 0).sum()), 40_000, p_zero).pvalue > ALPHA


@pytest.mark.parametrize("mu", [0.01, 0.7, 3.9, 4.1, 9.9, 10.1, 80.0, 5000.0, 1e6])
def test_poisson_draws(mu, way):
    natural = torch.full((40_000, 1), float(np.log(mu)))
    assert chi_square_p(draw(Poisson(), natural).toarray(), stats.poisson(mu)) > ALPHA


def test_the_goodness_of_fit_test_can_fail():
    drawn = np.random.default_rng(1).poisson(10.0, 40_000)
    assert chi_square_p(drawn, stats.poisson(10.0)) > ALPHA
    assert chi_square_p(drawn, stats.poisson(10.1)) < ALPHA
    assert chi_square_p(drawn, scipy_nb(10.0, 200.0)) < ALPHA


@pytest.mark.parametrize("present", [4.0, 100.0, 190.0])
def test_bernoulli_draws(present, way):
    log_size = torch.full((200, 1), present).log()
    drawn = Bernoulli().sample(torch.zeros(200, 200), log_size, generator=seeded())
    assert set(drawn.data.tolist()) == {1}
    assert stats.binomtest(drawn.nnz, 40_000, present / 200).pvalue > ALPHA


@pytest.mark.parametrize("size", [1.0, 30.0, 900.0, 1_900.0])
@pytest.mark.parametrize(("spread", "level"), [(0.5, -7.0), (2.0, -5.0), (4.0, 3.0)])
def test_as_many_are_present_as_the_size_factor_says(size, spread, level):
    output = spread * torch.randn(4, 2_000, generator=seeded()) + level
    output[:, 0] = 8.0  # present in nearly every cell
    natural = Bernoulli().natural(output, torch.full((4, 1), size).log())
    np.testing.assert_allclose(torch.sigmoid(natural).sum(dim=1), size, rtol=5e-3)
    ratio = natural - output
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))  # odds keep their ratios


def test_a_size_factor_beyond_the_features_has_nearly_all_present():
    natural = Bernoulli().natural(torch.randn(2, 50, generator=seeded()), torch.full((2, 1), 9.0))
    assert torch.isfinite(natural).all()
    assert (torch.sigmoid(natural).sum(dim=1) > 45).all()


def test_dealing_out_peaks_leaves_the_likelihood_its_optimum():
    """Odds that made the cells also do best on the part that the encoder did not see."""
    generator = seeded()
    truth = torch.tensor([2.0, 0.0, -1.0, -2.0, -3.0]).repeat(40)[None].expand(3_000, -1)
    x = torch.bernoulli(torch.sigmoid(truth), generator=generator)
    cells = Minibatch.of(
        sparse.csr_matrix(x.numpy()), np.arange(3_000), "binary", torch.device("cpu")
    )
    rest = cells.split(generator)[1]
    model, scale = Bernoulli(), torch.tensor(1.0, requires_grad=True)
    centred = truth - truth.mean()
    loss = model.loss(rest, scale * centred, rest.log_totals())
    (slope,) = torch.autograd.grad(loss, scale)
    assert abs(float(slope)) < 2e-3
    for wrong in (0.9, 1.1):
        assert model.loss(rest, wrong * centred, rest.log_totals()) > loss + 2e-4


def test_a_cell_whose_every_peak_went_to_the_encoder_has_a_loss():
    x = Minibatch((1, 3), torch.zeros(3), torch.arange(3))
    output = torch.zeros(1, 3, requires_grad=True)
    loss = Bernoulli().loss(x, output, torch.zeros(1, 1))
    loss.backward()
    assert torch.isfinite(loss)
    assert not output.grad.any()


def test_gaussian_draws():
    model = Gaussian(2)
    model.initialise(np.array([3.0, -1.0]), np.array([4.0, 0.25]), np.ones(5))
    output = torch.tensor([[1.0, 0.0]]).expand(5000, 2)
    drawn = model.sample(output, None, generator=seeded())
    assert isinstance(drawn, np.ndarray)
    for column, (mean, scale) in enumerate([(5.0, 2.0), (-1.0, 0.5)]):
        assert stats.kstest(drawn[:, column], stats.norm(mean, scale).cdf).pvalue > ALPHA


def mixed_block() -> tuple[NegativeBinomial, torch.Tensor]:
    """Every branch in one block: sparse and dense genes, and a cell with nothing to draw."""
    mu = np.array([1e-30, 0.05, 2.0, 9.0, 50.0, 0.5])
    model = NegativeBinomial(6)
    model.log_theta.data = torch.tensor(np.log([1.0, 1.0, 5.0, 0.5, 4.0, 0.01])).float()[None]
    natural = torch.tensor(np.log(mu)).float().repeat(3000, 1)
    natural[1] = -60.0
    natural[-1] = -60.0
    return model, natural


def test_blocks_of_mixed_entries_are_canonical_csr_in_the_right_places(way):
    model, natural = mixed_block()
    drawn = draw(model, natural)
    assert isinstance(drawn, sparse.csr_matrix)
    assert drawn.dtype == np.int32
    assert drawn.shape == (3000, 6)
    drawn.check_format(full_check=True)
    rebuilt = sparse.csr_matrix((drawn.data, drawn.indices, drawn.indptr), drawn.shape)
    assert rebuilt.has_canonical_format  # looked at afresh, not as declared
    assert drawn.data.min() > 0
    dense = drawn.toarray()
    assert dense[[1, -1]].sum() == 0
    assert dense[:, 0].sum() == 0
    inner = np.delete(dense, [1, 2999], axis=0)
    theta = model.log_theta.detach().exp().numpy()[0]
    for gene in range(1, 6):
        mu = float(natural[0, gene].exp())
        assert chi_square_p(inner[:, gene], scipy_nb(mu, theta[gene])) > ALPHA


@pytest.mark.parametrize("shape", [(0, 4), (3, 4)], ids=["no-cells", "no-counts"])
def test_blocks_without_counts(shape, way):
    log_size = torch.full((shape[0], 1), -80.0)
    for model in (NegativeBinomial(4), Poisson(), Bernoulli()):
        drawn = model.sample(torch.full(shape, -80.0), log_size, generator=seeded())
        assert drawn.shape == shape
        assert drawn.nnz == 0


def test_draws_too_large_for_int32_are_held_not_wrapped(way):
    drawn = draw(negative_binomial(-3.0), torch.full((200, 1), 25.0))
    assert drawn.data.min() > 0
    assert drawn.data.max() == np.iinfo(np.int32).max


def test_dispersion_of_the_group_shapes_the_draws(way):
    model = negative_binomial(-1.0, 3.0)
    group = torch.arange(40_000) % 2
    drawn = draw(model, torch.full((40_000, 1), float(np.log(2.0))), group).toarray()
    for code, log_theta in enumerate([-1.0, 3.0]):
        of_group = drawn[group.numpy() == code]
        assert chi_square_p(of_group, scipy_nb(2.0, np.exp(log_theta))) > ALPHA


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_draws_follow_the_generator_and_leave_global_state_alone(name, way):
    model, natural = make_likelihood(name, 6), mixed_block()[1][2:50].clamp(min=-20.0, max=0.5)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    first, again, other = (draw(model, natural, seed=s) for s in (5, 5, 6))
    dense = [x.toarray() if sparse.issparse(x) else x for x in (first, again, other)]
    np.testing.assert_array_equal(dense[0], dense[1])
    assert (dense[0] != dense[2]).any()
    assert torch.equal(torch.get_rng_state(), torch_state)
    after = np.random.get_state()  # noqa: NPY002
    np.testing.assert_array_equal(after[1], numpy_state[1])
    assert after[2:] == numpy_state[2:]


# ------------------------------------------------- natural scale and starts


@pytest.mark.parametrize("name", ["nb", "poisson"])
def test_means_are_a_composition_scaled_by_the_size_factor(name):
    model = make_likelihood(name, 3)
    output = torch.tensor([[0.0, 1.0, 2.0], [500.0, -500.0, 0.0]])
    mu = model.natural(output, torch.tensor([[7.0], [0.0]])).exp()
    np.testing.assert_allclose(mu.sum(dim=1), [np.exp(7.0), 1.0], rtol=1e-5)
    np.testing.assert_allclose(mu[0] / mu[0, 0], np.exp([0.0, 1.0, 2.0]), rtol=1e-5)
    for needy in (model.natural, partial(model.sample, generator=seeded())):
        with pytest.raises(ValueError, match="needs the cells' size factors"):
            needy(output, None)


def test_counts_start_at_the_mean_profile_and_the_moment_dispersion():
    rng = np.random.default_rng(0)
    mu, theta = np.array([1.0, 4.0, 20.0]), np.array([0.5, 2.0, 8.0])
    x = rng.negative_binomial(theta, theta / (theta + mu), size=(20_000, 3))
    x = np.column_stack([x, np.zeros(len(x))])  # and a gene that is never seen
    model = NegativeBinomial(4)
    bias = model.initialise(x.mean(axis=0), x.var(axis=0), np.full(len(x), 25.0))
    np.testing.assert_allclose(torch.softmax(bias, 0)[:3], mu / mu.sum(), rtol=0.05)
    assert torch.isfinite(bias).all()
    np.testing.assert_allclose(model.log_theta.detach().exp()[0, :3], theta, rtol=0.1)
    assert torch.isfinite(model.log_theta).all()


def test_varying_depth_is_not_taken_for_dispersion():
    rng = np.random.default_rng(0)
    totals = rng.lognormal(5.0, 0.6, 20_000)
    x = rng.poisson(totals[:, None] * np.array([0.02, 0.05]))
    model = NegativeBinomial(2)
    model.initialise(x.mean(axis=0), x.var(axis=0), totals)
    assert (model.log_theta.detach().exp() > 15.0).all()  # Poisson: as large as the start allows


def test_bernoulli_starts_at_the_detection_rate():
    bias = Bernoulli().initialise(np.array([0.0, 0.25, 1.0]), np.zeros(3), np.ones(1000))
    assert torch.isfinite(bias).all()
    np.testing.assert_allclose(torch.sigmoid(bias), [0.0, 0.25, 1.0], atol=1e-3)


def test_gaussian_start_standardises_and_owes_nothing_to_uninitialised_memory():
    model = Gaussian(4)
    model.log_scale.data.fill_(float("nan"))  # as after construction on `meta`
    mean, variance = np.array([1e5, 0.0, 2.0, 0.0]), np.array([1e-9, 9.0, 0.0, 0.0])
    assert model.initialise(mean, variance, np.ones(3)).tolist() == [0.0] * 4
    x = torch.tensor([[1e5, 3.0, 2.0, 0.0]])
    assert model.encoder_input(x).tolist() == [[0.0, 1.0, 0.0, 0.0]]
    np.testing.assert_allclose(model.natural(torch.tensor([[0.0, 1.0, 0.0, 0.0]]), None), x)
    assert torch.isfinite(model.log_prob(x, x)).all()


def test_dispersions_of_small_labels_are_pooled():
    model = NegativeBinomial(2, 3)
    own = torch.tensor([[0.0, 2.0], [1.0, 0.0], [9.0, -9.0]])
    model.log_theta.data = own.clone()
    model.pool(np.array([20_000, 20_000, 2]))
    torch.testing.assert_close(model.log_theta.data[:2], own[:2], atol=0.01, rtol=0)
    torch.testing.assert_close(model.log_theta.data[2], torch.tensor([0.5, 1.0]), atol=0.45, rtol=0)
    shared = NegativeBinomial(2)
    shared.pool(np.array([5]))
    assert shared.log_theta.tolist() == [[0.0, 0.0]]


def test_features_are_learned_as_fast_as_their_counts_tell():
    mean = np.array([0.0, 0.01, 1.0, 100.0])
    speeds = NegativeBinomial(4).speeds(mean)
    np.testing.assert_allclose(speeds, [0.0, 0.0995, 0.707, 0.995], atol=1e-3)
    assert Gaussian(4).speeds(mean).tolist() == [1.0] * 4


# -------------------------------------------------------------------- naming


@pytest.mark.parametrize(
    ("name", "kind"),
    [("nb", "count"), ("poisson", "count"), ("bernoulli", "binary"), ("gaussian", "real")],
)
def test_names_and_value_kinds(name, kind):
    assert value_kind(name) == make_likelihood(name, 3).values == kind


@pytest.mark.parametrize(
    ("name", "n_groups", "match"),
    [
        ("zinb", 1, r"expected one of \('nb', .*got 'zinb'"),
        ("poisson", 2, r"expected likelihood='nb'; got likelihood='poisson'.*dispersion='gene'"),
    ],
)
def test_bad_names(name, n_groups, match):
    with pytest.raises(ValueError, match=match):
        make_likelihood(name, 3, n_groups)


def test_the_base_class_is_not_a_model():
    x, base = torch.zeros(1, 1), Likelihood()
    for call in (
        lambda: base.log_prob(x, x),
        lambda: base.sample(x, x, generator=seeded()),
        lambda: base.initialise(np.ones(1), np.ones(1), np.ones(1)),
    ):
        with pytest.raises(TypeError, match="Likelihood is not a noise model by itself"):
            call()
