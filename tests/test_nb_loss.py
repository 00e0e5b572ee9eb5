"""The fast losses against the plain densities: values, gradients, precision, and batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse, special
from torch.utils._python_dispatch import TorchDispatchMode

from cfgen_augment.likelihoods import LIKELIHOODS, Likelihood, NegativeBinomial, make_likelihood
from cfgen_augment.minibatch import Minibatch
from cfgen_augment.nb_loss import digamma_difference, nb_loss

CPU = torch.device("cpu")


def counts(n=7, n_features=9, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.poisson(rng.gamma(0.3, 5.0, size=(n, n_features)))
    x[2] = 0  # a cell without counts
    x[:, 3] = 0  # a gene without counts
    x[0, 0] = 1500
    return sparse.csr_matrix(x)


def batch(X, kind="count", dtype=torch.float32, rows=None):
    rows = np.arange(X.shape[0]) if rows is None else rows
    made = Minibatch.of(X, rows, kind, CPU)
    return Minibatch(made.shape, made.values.to(dtype), made.at)


def inputs(n=7, n_features=9, n_groups=1, dtype=torch.float64, seed=0):
    """Decoder output, log size factors, log dispersions and groups."""
    rng = np.random.default_rng(seed)
    drawn = (
        rng.normal(0.0, 2.0, (n, n_features)),
        rng.normal(3.0, 1.0, (n, 1)),
        rng.uniform(-3.0, 4.0, (n_groups, n_features)),
    )
    output, log_size, log_theta = (torch.tensor(v, dtype=dtype, requires_grad=True) for v in drawn)
    group = torch.arange(n) % n_groups if n_groups > 1 else None
    return output, log_size, log_theta, group


def model_with(log_theta):
    model = NegativeBinomial(log_theta.shape[1], log_theta.shape[0]).to(log_theta.dtype)
    model.log_theta.data = log_theta.detach().clone()
    return model


def values_and_gradients(loss, *leaves):
    value = loss()
    return value.detach(), *torch.autograd.grad(value, leaves)


# ---------------------------------------------------------- closed form, NB


@pytest.mark.parametrize("n_groups", [1, 3])
def test_gradients_by_finite_differences(n_groups):
    output, log_size, log_theta, group = inputs(n_groups=n_groups)
    x = batch(counts(), dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *leaves: 60.0 * nb_loss(x, *leaves, group), (output, log_size, log_theta)
    )


@pytest.mark.parametrize("n_groups", [1, 3])
@pytest.mark.parametrize("spread", [0.0, 2.0, 30.0], ids=["flat", "usual", "vanishing-means"])
def test_value_and_gradients_are_those_of_the_plain_density(n_groups, spread):
    output, log_size, log_theta, group = inputs(n_groups=n_groups)
    output.data *= spread / 2.0
    model = model_with(log_theta)
    x = batch(counts(), dtype=torch.float64)
    leaves = (output, log_size, model.log_theta)
    fast = values_and_gradients(lambda: model.loss(x, output, log_size, group), *leaves)
    plain = values_and_gradients(
        lambda: Likelihood.loss(model, x, output, log_size, group), *leaves
    )
    for got, expected in zip(fast, plain, strict=True):
        # 1e-7: the digamma's series ends at its fourth term.
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)
    assert all(value.abs().max() > 0 for value in plain)


@pytest.mark.parametrize("log_theta", [-12.0, -10.0, -2.0, 0.0, 5.0, 10.0, 12.0])
def test_float32_is_as_precise_as_the_plain_density(log_theta):
    rng = np.random.default_rng(0)
    n, n_features = 64, 50
    output = rng.normal(0.0, 6.0, (n, n_features))  # means from 1e-9 to 1e3
    log_size = rng.normal(7.0, 0.5, (n, 1))
    mean = np.exp(output - special.logsumexp(output, axis=1, keepdims=True) + log_size)
    X = sparse.csr_matrix(rng.poisson(mean))

    def errors(loss, dtype):
        model = model_with(torch.full((1, n_features), log_theta, dtype=dtype))
        leaves = [torch.tensor(v, dtype=dtype, requires_grad=True) for v in (output, log_size)]
        return values_and_gradients(
            lambda: loss(model, batch(X, dtype=dtype), *leaves), *leaves, model.log_theta
        )

    exact = errors(Likelihood.loss, torch.float64)
    fast, plain = (errors(f, torch.float32) for f in (NegativeBinomial.loss, Likelihood.loss))
    for name, truth, got, reference in zip(
        ("value", "output", "size", "theta"), exact, fast, plain, strict=True
    ):
        error, allowed = ((v.double() - truth).abs().max() for v in (got, reference))
        assert error <= 2.0 * allowed + 1e-6 * truth.abs().max(), name


def test_a_count_where_the_mean_underflows_has_a_finite_loss():
    output = torch.tensor([[0.0, -200.0]], requires_grad=True)
    model = NegativeBinomial(2)
    x = batch(sparse.csr_matrix([[4, 3]]))
    loss = model.loss(x, output, torch.zeros(1, 1))
    assert loss.item() == pytest.approx(
        Likelihood.loss(model, x, output, torch.zeros(1, 1)).item(), rel=1e-6
    )
    loss.backward()
    assert output.grad[0, 1].item() == pytest.approx(-1.5, rel=1e-6)  # -x / 2 entries


class EntriesSeen(TorchDispatchMode):
    """How many entries go through each operation."""

    def __init__(self):
        super().__init__()
        self.entries = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if isinstance(out, torch.Tensor):
            self.entries[name] = self.entries.get(name, 0) + out.numel()
        return out


def test_log_gammas_are_evaluated_where_there_are_counts_only():
    X = sparse.random(40, 60, 0.1, random_state=0, data_rvs=np.ones)
    output, log_size, log_theta, _ = inputs(40, 60, dtype=torch.float32)
    with EntriesSeen() as seen:
        nb_loss(batch(X.tocsr()), output, log_size, log_theta, None).backward()
    assert 0 < seen.entries["lgamma"] <= 2 * X.nnz + 60
    assert "digamma" not in seen.entries
    # And the dense block goes through one transcendental function besides the softmax.
    assert seen.entries["log1p"] <= 40 * 60 + X.nnz
    assert seen.entries["_softmax"] == 40 * 60
    assert seen.entries.get("exp", 0) <= 40 + 60


def test_dispersion_outside_its_range_stays_put():
    x, (output, log_size, *_) = batch(counts()), inputs(dtype=torch.float32)
    model = NegativeBinomial(9)
    model.log_theta.data[:, ::2] = 11.0
    model.loss(x, output, log_size).backward()
    assert (model.log_theta.grad[:, ::2] == 0).all()
    assert (model.log_theta.grad[:, 1::2] != 0).all()


def test_backward_twice_gives_the_same_gradient():
    x, (output, log_size, log_theta, _) = batch(counts()), inputs(dtype=torch.float32)
    loss = nb_loss(x, output, log_size, log_theta, None)
    first, second = (
        torch.autograd.grad(loss, (output, log_theta), retain_graph=keep) for keep in (True, False)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("theta", [np.exp(-10.0), 0.1, 1.0, 7.5, 300.0, np.exp(10.0)])
def test_digamma_difference(theta):
    x = np.array([1.0, 2.0, 7.0, 60.0, 1e4, 1e6])
    # Where theta is large SciPy's difference loses digits: the sum of 1 / (theta + k) is exact.
    exact = [
        (1.0 / (theta + np.arange(k))).sum()
        if k < 100
        else special.digamma(k + theta) - special.digamma(theta)
        for k in x
    ]
    for dtype, rtol in ((torch.float64, 1e-8), (torch.float32, 1e-6)):
        got = digamma_difference(torch.tensor(x, dtype=dtype), torch.full((6,), theta, dtype=dtype))
        np.testing.assert_allclose(got, exact, rtol=rtol)


# --------------------------------------------------------- every noise model


@pytest.mark.parametrize("container", ["csr", "ndarray", "explicit-zeros"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_losses_are_means_of_the_plain_density(name, container):
    X = counts()
    if name == "bernoulli":
        X = X.minimum(1)
    model = make_likelihood(name, 9).double()
    output, log_size, *_ = inputs()
    dense = X.toarray()
    if name == "gaussian":
        model.initialise(dense.mean(axis=0), dense.var(axis=0), np.ones(7))
    if container == "ndarray":
        X = dense
    elif container == "explicit-zeros":
        X.data[::4] = 0
        dense = X.toarray()
        assert X.nnz > np.count_nonzero(dense)
    x = batch(X, model.values, torch.float64)
    np.testing.assert_array_equal(x.dense(), dense)
    fast = values_and_gradients(lambda: model.loss(x, output, log_size), output)
    density = model.log_prob(torch.tensor(dense).double(), model.natural(output, log_size))
    plain = values_and_gradients(lambda: -density.mean(), output)
    for got, expected in zip(fast, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["nb", "poisson"])
def test_a_composition_needs_size_factors(name):
    output, *_ = inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match="needs the cells' size factors"):
        make_likelihood(name, 9).loss(batch(counts()), output, None)


def test_groups_need_a_group_for_every_cell():
    output, log_size, *_ = inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"dispersion='gene-label': expected a label for every"):
        NegativeBinomial(9, 3).loss(batch(counts()), output, log_size)


# ------------------------------------------------------------------- batches


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float32", "float64"])
def test_minibatches_are_the_same_from_every_container(dtype):
    X = counts().minimum(200).astype(dtype)
    rows = np.array([5, 0, 2, 0])
    made = [batch(c, rows=rows) for c in (X, sparse.csr_array(X), X.toarray())]
    for one in made:
        assert one.values.dtype == torch.float32
        assert torch.equal(one.values, made[0].values)
        assert torch.equal(one.at, made[0].at)
        assert (one.values != 0).all()
        np.testing.assert_array_equal(one.dense(), X.toarray()[rows])
        np.testing.assert_allclose(
            one.dense(torch.log1p), np.log1p(X.toarray()[rows].astype(float)), rtol=1e-6
        )


def test_features_that_are_not_counts_are_kept_whole():
    X = np.array([[-1.5, 0.0], [2.0, 3.0]])
    for container in (np.asarray, sparse.csr_matrix):
        whole = batch(container(X), "real", rows=np.array([1, 0]))
        assert whole.at is None
        shifted = whole.dense(lambda values: values + 1.0)  # zero need not stay zero
        np.testing.assert_array_equal(shifted, X[::-1] + 1.0)
