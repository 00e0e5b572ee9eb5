"""The deep rivals: their formulas against closed forms, and what they make against known truth."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import nn

from benchmarks.cells import Cells, Training, log_normalise, log_values
from benchmarks.rivals import diffusion, wgan
from benchmarks.rivals import scvi as scvi_rival

N_GENES = 50
needs_scvi = pytest.mark.skipif(
    importlib.util.find_spec("scvi") is None,
    reason="needs scvi-tools, a benchmark extra: pip install scvi-tools",
)


def make_training(sizes, to_add, *, seed=0):
    """Each type has ten marker genes of its own at ten times the rate of the others."""
    rng = np.random.default_rng(5)
    labels = np.repeat(list(sizes), list(sizes.values()))
    rates = np.ones((len(labels), N_GENES))
    for i, name in enumerate(sizes):
        rates[labels == name, 10 * i : 10 * (i + 1)] = 10.0
    rates *= rng.lognormal(0.0, 0.3, (len(labels), 1))
    counts = sparse.csr_matrix(rng.poisson(rng.gamma(4.0, rates / 4.0)).astype(np.float32))
    order = rng.permutation(len(labels))
    genes = np.array([f"gene{i}" for i in range(N_GENES)])
    cells = Cells(counts[order], labels[order], genes)
    return Training(cells, cells.take(np.arange(0)), to_add, seed)


@pytest.fixture(scope="module")
def training():
    return make_training({"T": 150, "B": 100, "NK": 50}, {"NK": 60, "B": 30, "T": 20})


def short_diffusion(training):
    return diffusion.latent_diffusion(training, steps=(150, 300, 150), sampling_steps=40)


def short_wgan(training):
    return wgan.conditional_wgan(training, steps=250)


def short_scvi(training):
    return scvi_rival.scvi(training, max_epochs=150)


def short_scvi_prior(training):
    return scvi_rival.scvi(training, max_epochs=150, latents="prior")


def short_scanvi(training):
    return scvi_rival.scanvi(training, max_epochs=150)


ARMS = [
    pytest.param(short_diffusion, id="diffusion"),
    pytest.param(short_wgan, id="wgan"),
    pytest.param(short_scvi, id="scvi", marks=needs_scvi),
    pytest.param(short_scvi_prior, id="scvi-prior", marks=needs_scvi),
    pytest.param(short_scanvi, id="scanvi", marks=needs_scvi),
]
# Shortest possible: for what does not depend on training.
QUICK = [
    pytest.param(
        lambda t: diffusion.latent_diffusion(t, steps=(3, 3, 3), sampling_steps=4), id="diffusion"
    ),
    pytest.param(lambda t: wgan.conditional_wgan(t, steps=2), id="wgan"),
    pytest.param(lambda t: scvi_rival.scvi(t, max_epochs=1), id="scvi", marks=needs_scvi),
    pytest.param(lambda t: scvi_rival.scanvi(t, max_epochs=2), id="scanvi", marks=needs_scvi),
]


@pytest.mark.parametrize("arm", ARMS)
def test_makes_cells_of_the_types_wanted(arm, training):
    new = arm(training)
    assert {str(n): int((new.labels == n).sum()) for n in set(new.labels)} == dict(training.to_add)
    assert new.values.shape == (110, N_GENES)
    assert new.values.dtype == np.float32
    assert new.values.format == "csr"
    assert np.isfinite(new.values.data).all()
    assert (new.values.data >= 0).all()
    if not new.logged:
        assert (new.values.data == np.rint(new.values.data)).all()

    real = log_normalise(training.cells.counts)
    made = log_values(new)
    for name in training.to_add:
        mean = np.asarray(made[new.labels == name].mean(axis=0)).ravel()
        match = {
            other: np.corrcoef(mean, np.asarray(real[training.cells.labels == other].mean(0)))[0, 1]
            for other in training.to_add
        }
        others = max(r for other, r in match.items() if other != name)
        assert match[name] > max(0.7, others + 0.3), match


@pytest.mark.parametrize("arm", QUICK)
def test_is_a_function_of_its_seed_and_leaves_global_states_alone(arm, training):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    once = arm(training)
    assert torch.equal(torch_state, torch.get_rng_state())
    after = np.random.get_state()  # noqa: NPY002
    assert numpy_state[2] == after[2]
    assert np.array_equal(numpy_state[1], after[1])

    with torch.random.fork_rng(devices=[]):  # another global state must make no difference
        torch.rand(7)
        again = arm(training)
    assert (once.values != again.values).nnz == 0
    assert (once.values != arm(replace(training, seed=1)).values).nnz > 0


@pytest.mark.parametrize("arm", QUICK)
def test_types_of_one_to_three_cells_and_a_lonely_last_cell(arm):
    # 257 cells: the last minibatch of 128 or 256 would hold a single one.
    small = make_training({"T": 251, "B": 3, "NK": 2, "pDC": 1}, {"B": 4, "NK": 3, "pDC": 2})
    new = arm(small)
    assert list(new.labels) == ["B"] * 4 + ["NK"] * 3 + ["pDC"] * 2
    assert np.isfinite(new.values.data).all()


@pytest.mark.parametrize("arm", QUICK)
def test_nothing_wanted_is_nothing_made(arm, training):
    assert len(arm(replace(training, to_add={}))) == 0
    assert len(arm(replace(training, to_add={"T": 0}))) == 0


# Diffusion


def test_alpha_bars_are_those_of_the_linear_schedule():
    alpha_bars = diffusion.alpha_bars()
    assert alpha_bars.shape == (1000,)
    assert float(alpha_bars[0]) == pytest.approx(1.0 - 1e-4)
    ratio = alpha_bars[1:] / alpha_bars[:-1]
    assert np.allclose(1.0 - ratio, np.linspace(1e-4, 0.02, 1000)[1:])


@pytest.mark.parametrize("t", [0, 300, 999])
def test_noising_once_equals_noising_step_by_step(t):
    generator = torch.Generator().manual_seed(0)
    z_0 = 3.0 * torch.randn((100_000, 1), generator=generator, dtype=torch.float64)
    noise = torch.randn(z_0.shape, generator=generator, dtype=torch.float64)
    alpha_bar = diffusion.alpha_bars()[t]
    at_once = diffusion.noised(z_0, alpha_bar, noise)
    # z_s = sqrt(1 - b_s) z_{s-1} + sqrt(b_s) e_s: the moments follow by recursion.
    share, variance = 1.0, 0.0
    for beta in np.linspace(1e-4, 0.02, 1000)[: t + 1]:
        share, variance = share * np.sqrt(1 - beta), (1 - beta) * variance + beta
    assert float(at_once.var()) == pytest.approx(9.0 * share**2 + variance, rel=0.02)
    slope = float((at_once * z_0).mean() / z_0.square().mean())
    assert slope == pytest.approx(share, abs=0.02)


def test_the_posterior_mean_is_bayes_rule_also_over_skipped_steps():
    # p(z_s | z_t, z_0) is proportional to N(z_s; sqrt(b) z_0, 1 - b) N(z_t; sqrt(a) z_s, 1 - a).
    before, now, z_0, z_t = 0.7, 0.2, torch.tensor(1.5), torch.tensor(-0.4)
    a = now / before
    precision = 1 / (1 - before) + a / (1 - a)
    expected = (before**0.5 * z_0 / (1 - before) + a**0.5 * z_t / (1 - a)) / precision
    assert float(diffusion.posterior_mean(z_0, z_t, now, before)) == pytest.approx(float(expected))


def test_guidance_starts_at_the_signal_to_noise_ratio_of_the_source():
    def ratio(t, variance):
        share = float(diffusion.alpha_bars()[t])
        return variance * share / (1.0 - share)

    # Coordinates of unit vectors in 64 dimensions have variance 1 / 64, standardised ones 1.
    assert ratio(diffusion.GUIDED_STEPS, 1.0) == pytest.approx(ratio(500, 1 / 64), rel=0.3)


def test_minibatches_draw_every_type_equally_often():
    codes = np.array([1] * 900 + [0] * 3 + [2] * 60)
    batches = diffusion.draws(codes, 300, np.random.default_rng(0))
    rows = np.concatenate([next(batches) for _ in range(100)])
    assert np.bincount(codes[rows]) / len(rows) == pytest.approx([1 / 3] * 3, abs=0.02)
    assert np.bincount(rows)[codes == 0] / len(rows) == pytest.approx([1 / 9] * 3, abs=0.01)
    assert len(np.unique(rows)) == len(codes)


class GaussianDenoiser(nn.Module):
    """Exact noise of latents that are N(0, I): E[e | z_t] = sqrt(1 - alpha_bar) z_t."""

    def forward(self, z, t):
        return (1.0 - diffusion.alpha_bars()[t.long()]).sqrt().float() * z


class LinearClassifier(nn.Module):
    """Exact ``p(y | z_t)`` for unit normals at -1 and 1, up to the variance of `z_t`."""

    def forward(self, z, t):
        share = diffusion.alpha_bars()[t.long()].sqrt().float()
        return torch.cat([-share * z, share * z], dim=1)


def test_sampling_with_the_exact_denoiser_gives_back_the_distribution():
    z = diffusion.sample(
        GaussianDenoiser(),
        LinearClassifier(),
        torch.zeros(20_000, dtype=torch.int64),
        (torch.full((1,), -9.0), torch.full((1,), 9.0)),
        n_steps=100,
        guidance=0.0,
        generator=torch.Generator().manual_seed(0),
    )
    assert float(z.mean()) == pytest.approx(0.0, abs=0.03)
    assert float(z.var()) == pytest.approx(1.0, abs=0.05)


def test_guidance_pulls_each_cell_to_its_type():
    codes = torch.arange(2000) % 2
    z = diffusion.sample(
        GaussianDenoiser(),
        LinearClassifier(),
        codes,
        (torch.full((1,), -9.0), torch.full((1,), 9.0)),
        n_steps=50,
        guidance=2.0,
        generator=torch.Generator().manual_seed(0),
    )[:, 0]
    assert float(z[codes == 1].mean()) > 0.5
    assert float(z[codes == 0].mean()) < -0.5


# WGAN


def test_lsn_layer_gives_every_cell_the_library_size():
    x = torch.rand((5, 7), generator=torch.Generator().manual_seed(0))
    x[3] = 0.0
    out = wgan.library_size_normalise(x, 300.0)
    assert torch.allclose(out.sum(dim=1), torch.tensor([300.0, 300.0, 300.0, 0.0, 300.0]))
    assert torch.allclose(out[0] / out[0, 0], x[0] / x[0, 0])


def test_generated_cells_have_the_library_size_they_are_logged_for(training):
    new = wgan.conditional_wgan(training, steps=2)
    totals = np.asarray(np.expm1(new.values.toarray().astype(float)).sum(axis=1))
    assert np.allclose(totals, 1e4, rtol=1e-3)


class LinearCritic(nn.Module):
    """``D(x, y) = (w + v_y) . x``, whose gradient in x is ``w + v_y`` everywhere."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Parameter(torch.tensor([3.0, 0.0]))
        self.types = torch.tensor([[0.0, 4.0], [-2.0, 0.0]])

    def forward(self, x, codes):
        return (x * (self.shared + self.types[codes])).sum(dim=1)


def test_gradient_penalty_of_a_linear_critic():
    critic = LinearCritic()
    x = torch.randn((3, 2), generator=torch.Generator().manual_seed(0))
    penalty = wgan.gradient_penalty(critic, x, torch.tensor([0, 1, 1]))
    # Slopes are |(3, 4)| = 5 and |(1, 0)| = 1, twice: penalties 16, 0, 0.
    assert penalty.item() == pytest.approx(16.0 / 3.0)
    penalty.backward()
    # d/dw of (|g| - 1)^2 / 3 is 2 (|g| - 1) g / |g| / 3, and zero where |g| is one.
    assert torch.allclose(critic.shared.grad, torch.tensor([8.0 * 0.6, 8.0 * 0.8]) / 3.0)


def test_critic_projects_the_type():
    with torch.random.fork_rng(devices=[]):
        critic = wgan.Critic(N_GENES, 3)
    x = torch.rand((4, N_GENES), generator=torch.Generator().manual_seed(0))
    features = x
    for linear in critic.linears:
        features = torch.relu(linear(features))
    codes = torch.tensor([0, 1, 2, 1])
    shared = critic.out(features)[:, 0]
    assert torch.allclose(critic(x, codes) - shared, (features * critic.types[codes]).sum(1))


# scVI and scANVI


@pytest.mark.parametrize("n", [1, 2, 127, 128, 129, 257, 128 * 129 + 1, 16_513])
def test_no_minibatch_of_scvi_holds_a_single_cell(n):
    size = scvi_rival.batch_size(n)
    assert 128 <= size < 140
    assert n % size != 1 or n == 1


@pytest.mark.parametrize(("n", "expected"), [(100, 100), (8_000, 100), (20_000, 51), (10**6, 1)])
def test_epochs_of_scvi_shrink_with_the_data(n, expected):
    assert scvi_rival.epochs(n) == expected


@needs_scvi
def test_latents_of_scvi_are_checked(training):
    with pytest.raises(ValueError, match="'posterior' or 'prior'"):
        scvi_rival.scvi(training, latents="mean")


@needs_scvi
@pytest.mark.parametrize("fit", [scvi_rival._fit_scvi, scvi_rival._fit_scanvi])
def test_the_kl_warm_up_is_finished(fit, training):
    with scvi_rival.isolated(0):
        plan = fit(scvi_rival._annotated(training), 24).trainer.lightning_module
    assert plan.n_epochs_kl_warmup <= 6  # a quarter of the epochs, at most
    assert plan.kl_weight == 1.0


@pytest.mark.skipif(importlib.util.find_spec("scvi") is not None, reason="scvi-tools is installed")
@pytest.mark.parametrize("arm", [scvi_rival.scvi, scvi_rival.scanvi])
def test_missing_scvi_tools_says_what_to_install(arm, training):
    with pytest.raises(ImportError, match=r"pip install 'scvi-tools"):
        arm(training)
