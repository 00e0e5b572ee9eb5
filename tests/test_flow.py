"""Path, velocity, attribute dropout and guidance re-derived; a flow that learns a Gaussian."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cfgen_augment.flow import (
    NULL,
    SIGMA_MIN,
    Condition,
    VelocityField,
    drop_attributes,
    flow_matching_loss,
    guided,
    interpolate,
    noise_scale,
    on_noise_of_scale,
    target_velocity,
)
from cfgen_augment.solver import make_solver
from cfgen_augment.training import initialise


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_field(n_latent=2, n_categories=(3, 2), *, sizes=0, width=16) -> VelocityField:
    """Built as a model builds it, then moved off its neutral start so that inputs matter."""
    with torch.device("meta"):
        field = VelocityField(
            n_latent, n_categories, width=width, n_blocks=2, n_embedding=16, n_size_factors=sizes
        )
    field.to_empty(device="cpu")
    initialise(field, seeded())
    field.start_without_centres(torch.device("cpu"))
    return field.eval()


# ---------------------------------------------------------------------- path


def test_path_runs_from_noise_to_data():
    z_0, z_1 = torch.randn((2, 5, 3), generator=seeded())
    at = [interpolate(z_0, z_1, torch.full((5, 1), t)) for t in (0.0, 0.25, 1.0)]
    torch.testing.assert_close(at[0], z_0)
    torch.testing.assert_close(at[1], 0.25 * z_1 + (1 - 0.25 * (1 - SIGMA_MIN)) * z_0)
    torch.testing.assert_close(at[2], z_1 + SIGMA_MIN * z_0)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_target_velocity_is_the_time_derivative_of_the_path(t):
    z_0, z_1 = torch.randn((2, 5, 3), generator=seeded(), dtype=torch.float64)
    time = torch.full((5, 1), t, dtype=torch.float64)
    _, derivative = torch.autograd.functional.jvp(
        lambda s: interpolate(z_0, z_1, s), time, torch.ones_like(time)
    )
    torch.testing.assert_close(target_velocity(z_0, z_1), derivative)


class Recorder(nn.Module):
    """A stand-in for the network that answers with the true velocity, or with zero."""

    def __init__(self, z_1=None, scale=1.0):
        super().__init__()
        self.z_1, self.scale = z_1, scale

    def embed(self, attributes, log_size, pooled):
        self.given = attributes, log_size, pooled
        n = len(attributes)
        return Condition(torch.zeros(n, 0), torch.zeros(n, 1), torch.full((n, 1), self.scale))

    def at(self, z, t, given):
        self.seen = z, t
        if self.z_1 is None:
            return torch.zeros_like(z)
        z_0 = (z - t * self.z_1) / (1.0 - (1.0 - SIGMA_MIN) * t)
        return target_velocity(z_0, self.z_1)


def test_loss_vanishes_for_the_true_velocity_and_is_its_variance_for_none():
    z_1 = torch.randn((4000, 3), generator=seeded(), dtype=torch.float64)
    codes = torch.zeros((4000, 1), dtype=torch.long)
    assert flow_matching_loss(Recorder(z_1), z_1, codes, None, seeded(1)) < 1e-12
    # E |z_1 - z_0|^2 = 2 per dimension for standard normal data
    nothing = flow_matching_loss(Recorder(), z_1, codes, None, seeded(1))
    assert nothing == pytest.approx(2.0, abs=0.1)
    # ... and in units of the scale of noise and data, the same for both being three times as wide
    wide = flow_matching_loss(Recorder(scale=3.0), 3.0 * z_1, codes, None, seeded(1))
    assert wide == pytest.approx(nothing.item(), rel=1e-6)


@pytest.mark.parametrize("n", [1, 6, 7])
def test_times_are_antithetic_and_inputs_reach_the_field(n):
    field, z_1 = Recorder(), torch.zeros(n, 2)
    codes, log_size = torch.arange(n)[:, None], torch.rand((n, 1), generator=seeded())
    flow_matching_loss(field, z_1, codes, log_size, seeded())
    (z, t), (attributes, size, pooled) = field.seen, field.given
    assert t.shape == (n, 1)
    assert ((t >= 0) & (t <= 1)).all()
    half = (n + 1) // 2
    torch.testing.assert_close(t[half:], 1.0 - t[: n - half])
    assert attributes is codes
    assert size is log_size
    assert pooled is None
    assert z.std() > 0 if n > 1 else torch.isfinite(z).all()


# ------------------------------------------------------------------- dropout


@pytest.mark.parametrize("dropout", [0.0, 0.2, 0.9])
@pytest.mark.parametrize("n_attributes", [1, 3])
def test_every_subset_is_seen_at_its_rate(dropout, n_attributes):
    n = 20_000
    codes = torch.randint(1, 5, (n, n_attributes), generator=seeded())
    kept = drop_attributes(codes, dropout, seeded(1))
    given = kept != NULL
    assert (kept == torch.where(given, codes, NULL)).all()
    # One attribute is chosen, each of the others joins by the toss of a coin: a subset of k out
    # of m is reached from each of its k members.
    subset = (given.long() * 2 ** torch.arange(n_attributes)).sum(dim=1)
    seen = torch.bincount(subset, minlength=2**n_attributes) / n
    for mask in range(2**n_attributes):
        k = mask.bit_count()
        rate = (1 - dropout) * k / n_attributes * 0.5 ** (n_attributes - 1) if k else dropout
        assert seen[mask] == pytest.approx(rate, abs=0.018)  # five standard errors at most


def test_dropout_is_drawn_for_every_cell_and_follows_the_generator():
    codes = torch.ones((200, 2), dtype=torch.long)
    before = torch.get_rng_state()
    first, again, other = (drop_attributes(codes, 0.2, seeded(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert {tuple(row) for row in first.tolist()} == {(0, 0), (1, 0), (0, 1), (1, 1)}
    assert (codes == 1).all()
    assert torch.equal(torch.get_rng_state(), before)


# --------------------------------------------------------------------- field


def test_field_starts_with_identity_blocks():
    field = make_field()
    z, codes = torch.randn((4, 2), generator=seeded()), torch.tensor([[1, 2]] * 4)
    early, late = torch.zeros(4, 1), torch.ones(4, 1)
    assert not torch.equal(field(z, early, codes), field(z, late, codes))
    field.start_at_zero()
    start = field.outlet(field.inlet(z))
    torch.testing.assert_close(field(z, early, codes), start)
    torch.testing.assert_close(field(z, late, codes), start)


def test_field_depends_on_everything_it_is_given_cell_by_cell():
    field = make_field(sizes=1)
    z = torch.randn((3, 2), generator=seeded())
    t, codes = torch.full((3, 1), 0.4), torch.tensor([[1, 2], [3, 0], [0, 0]])
    size = torch.tensor([[0.1], [0.5], [0.9]])
    v = field(z, t, codes, size)
    changes = {
        "latent": (z + 1.0, t, codes, size),
        "time": (z, t + 0.1, codes, size),
        "label": (z, t, codes + torch.tensor([[0, 0], [-3, 0], [1, 0]]), size),
        "donor": (z, t, codes + torch.tensor([[0, 0], [0, 1], [0, 2]]), size),
        "size factor": (z, t, codes, size + torch.tensor([[0.0], [0.2], [0.2]])),
    }
    for name, inputs in changes.items():
        changed = (field(*inputs) - v).abs().amax(dim=1) > 1e-6
        unchanged_first = name in ("label", "donor", "size factor")
        assert changed.tolist() == [not unchanged_first, True, True], name
    # One row alone, and one time for all rows, give the same.
    torch.testing.assert_close(field(z[1:2], t[:1], codes[1:2], size[1:2]), v[1:2])
    torch.testing.assert_close(field(z, t[:1], codes, size), v)


# ------------------------------------------------------------------ guidance


NONE, FIRST, SECOND, BOTH = (np.array(m, dtype=bool) for m in ((0, 0), (1, 0), (0, 1), (1, 1)))


@pytest.mark.parametrize(
    "terms",
    [
        pytest.param([(1.0, NONE)], id="unconditional"),
        pytest.param([(1.0, FIRST)], id="one-attribute"),
        pytest.param([(1.0, BOTH)], id="both-together"),
        pytest.param([(-1.0, NONE), (2.0, BOTH)], id="stronger"),
        pytest.param([(-1.0, NONE), (1.0, FIRST), (1.0, SECOND)], id="equation-ten"),
    ],
)
@torch.no_grad()
def test_guided_field_is_the_weighted_sum_of_its_terms(terms):
    field = make_field(sizes=1)
    codes = torch.tensor([[1, 2], [3, 1], [2, 2]])
    size = torch.tensor([[0.1], [0.5], [0.9]])
    z, t = torch.randn((3, 2), generator=seeded()), torch.full((3, 1), 0.35)
    expected = sum(
        weight * field(z, t, codes * torch.as_tensor(mask), size) for weight, mask in terms
    )
    calls = []
    field.inlet.register_forward_hook(lambda *_: calls.append(1))
    velocity = guided(field, codes, terms, size)
    torch.testing.assert_close(velocity(0.35, z), expected, rtol=1e-5, atol=1e-6)
    assert len(calls) == len(terms)
    assert codes.tolist() == [[1, 2], [3, 1], [2, 2]]


def gaussian_velocity(z, t, mean, variance, noise=1.0):
    """Exact field for data ``N(mean, variance)`` and noise of standard deviation `noise`."""
    sigma = 1 - (1 - SIGMA_MIN) * t
    along = t * variance - (1 - SIGMA_MIN) * sigma * noise**2
    return mean + along / (t**2 * variance + (sigma * noise) ** 2) * (z - t * mean)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9, 1.0])
def test_field_for_noise_of_another_scale_is_exact(t):
    z, mean = torch.randn((4, 2), generator=seeded()).double(), torch.tensor([1.0, -2.0])
    ratio = torch.tensor([[0.3], [1.0], [2.5], [0.01]]).double()
    time = torch.full((1, 1), t).double()
    trained = on_noise_of_scale(lambda z, t: gaussian_velocity(z, t, mean, 0.7), ratio)
    expected = gaussian_velocity(z, time, mean, 0.7, ratio)
    torch.testing.assert_close(trained(z, time), expected, rtol=1e-6, atol=1e-6)


class GaussianLabels(nn.Module):
    """Exact fields: everything N(0, 1), the label N(2, 0.3^2) from noise of scale 0.3."""

    scales = torch.tensor([[1.0], [0.3]])

    def embed(self, attributes, log_size, pooled):
        scale = self.scales[attributes[:, 0]]
        return Condition(scale, torch.where(scale < 1, 2.0, 0.0), scale)

    def at(self, z, t, given):
        return gaussian_velocity(z, t, given.centre, given.scale**2, given.scale)


@pytest.mark.parametrize(
    ("weight", "mean", "std"),
    [
        pytest.param(0.0, 0.0, 1.0, id="unconditional"),
        # Not the width of the label's noise: its weight is next to nothing.
        pytest.param(0.001, 0.0, 1.0, id="almost unconditional"),
        pytest.param(1.0, 2.0, 0.3, id="label"),
    ],
)
def test_weights_lead_from_all_data_to_the_label(weight, mean, std):
    codes = torch.ones((4000, 1), dtype=torch.long)
    terms = [(w, np.array([sees])) for w, sees in ((1 - weight, False), (weight, True)) if w]
    field = GaussianLabels()
    noise = torch.randn((4000, 2), generator=seeded()) * noise_scale(field, codes, terms)
    assert noise.std().item() == pytest.approx(0.3 if weight else 1.0, rel=0.05)
    velocity = guided(field, codes, terms, None)
    z_1 = make_solver("rk4", 40, lambda: (velocity, noise))(velocity, noise)
    assert z_1.mean().item() == pytest.approx(mean, abs=0.03)
    assert z_1.std().item() == pytest.approx(std, rel=0.03)


# ------------------------------------------------------------ centres and pooling


def latents_of_labels(sizes=(200, 30, 3)):
    """Labels around centres of their own, each with a scale of its own; sizes likewise."""
    generator = seeded(4)
    labels = torch.repeat_interleave(torch.arange(1, len(sizes) + 1), torch.tensor(sizes))
    around = torch.randn((len(labels), 6), generator=generator)
    latents = labels[:, None] + (0.5 * labels)[:, None] * around
    return latents, labels, 0.1 * labels[:, None] + 0.01 * around[:, :1]


def test_centres_and_scales_are_the_moments_of_labels_shrunk_where_cells_are_few():
    latents, labels, size = latents_of_labels()
    field = make_field(6, (3,), sizes=1)
    field.centre_on(latents, labels[:, None], size)
    z, y = latents.numpy(), labels.numpy()
    squares = np.concatenate([np.square(z[y == k] - z[y == k].mean(0)).mean(1) for k in (1, 2, 3)])
    for k, n in ((1, 200), (2, 30), (3, 3)):
        np.testing.assert_allclose(field.effects[k], z[y == k].mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(field.size_centres[k], size[labels == k].mean(), rtol=1e-5)
        own = z[y == k].var(axis=0, ddof=1).mean()
        expected = (n * own + 20 * squares.mean()) / (n + 20)
        assert field.scales[k].item() == pytest.approx(expected**0.5, rel=1e-5)
    assert (field.effects[NULL] == 0).all()
    assert field.scales[NULL] == 1
    assert field.size_centres[NULL] == 0


@torch.no_grad()
def test_the_field_of_a_label_is_moved_along_with_its_centre_and_scaled():
    field = make_field(2, (3, 2), sizes=1)
    z, t = torch.randn((4, 2), generator=seeded(1)), torch.full((4, 1), 0.6)
    codes = torch.tensor([[1, 2], [2, 0], [3, 1], [NULL, 2]])
    size = torch.full((4, 1), 0.4)
    before = field(z, t, codes, size)
    field.effects = torch.tensor(
        [[0.0, 0.0], [1.0, 2.0], [-1.0, 0.5], [0.0, 3.0], *[[0.1, 0.2]] * 3]
    )
    field.expected = torch.tensor([[[0.0, 0.0], [0.3, 0.0], [0.0, -0.3], [1.0, 1.0]]])
    field.scales = torch.tensor([[1.0], [2.0], [0.5], [3.0]])
    field.size_centres = torch.tensor([[0.0], [0.1], [-0.2], [0.3]])
    s, own = (table[codes[:, 0]] for table in (field.scales, field.size_centres))
    # The second attribute's effect if it is given, else what is expected of it in the label.
    m = torch.tensor([[1.1, 2.2], [-1.0, 0.2], [0.1, 3.2], [0.0, 0.0]])
    moved = field(s * z + t * m, t, codes, size + own)
    torch.testing.assert_close(moved, m + s * before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moved[3], before[3])


def test_effects_of_correlated_attributes_are_told_apart():
    random = np.random.default_rng(0)
    labels = random.integers(1, 3, 6_000)
    donors = np.where(random.random(6_000) < 0.9, labels, 3 - labels)  # mostly one donor's each
    label_effect = np.array([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    donor_effect = np.array([[0.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    latents = label_effect[labels] + donor_effect[donors] + 0.3 * random.normal(size=(6_000, 2))
    attributes = torch.as_tensor(np.column_stack([labels, donors]))
    field = make_field(2, (2, 2))
    field.centre_on(torch.as_tensor(latents, dtype=torch.float32), attributes, None)
    wanted = torch.tensor([[1, 2], [2, 2], [1, NULL], [NULL, 1]])
    centre = field.embed(wanted, None).centre
    rare = label_effect[1] + donor_effect[2]
    np.testing.assert_allclose(centre[0], rare, atol=0.1)
    np.testing.assert_allclose(centre[1], label_effect[2] + donor_effect[2], atol=0.1)
    np.testing.assert_allclose(centre[2], latents[labels == 1].mean(axis=0), atol=1e-3)
    assert (centre[3] == 0).all()


@torch.no_grad()
def test_pooled_labels_differ_by_centre_and_scale_alone():
    field = make_field(2, (3, 2))
    z, t = torch.randn((1, 2), generator=seeded(1)).expand(4, 2), torch.full((4, 1), 0.6)
    codes = torch.tensor([[1, 1], [2, 1], [3, 1], [NULL, 1]])
    own = field(z, t, codes)
    pooled = field(z, t, codes, None, torch.tensor([True, True, False, True]))
    torch.testing.assert_close(pooled[0], pooled[1])
    assert not torch.allclose(pooled[0], own[0])
    # What is not pooled, or has no label, is as it was.
    torch.testing.assert_close(pooled[2:], own[2:])
    assert not torch.allclose(pooled[0], own[3])


# ------------------------------------------------------------------ recovery


@pytest.fixture(scope="module")
def gaussian_flow():
    """A flow trained on two categories: N(m_k, s_k^2) with correlated dimensions."""
    field = make_field(n_categories=(2,), width=64)
    field.start_at_zero()
    generator = seeded(3)
    mean = torch.tensor([[1.0, -0.5], [-1.0, 0.5]])
    factor = torch.tensor([[[0.4, 0.0], [0.3, 0.5]], [[0.9, 0.0], [-0.3, 0.3]]])
    n_steps = 1200
    optimizer = torch.optim.AdamW(field.parameters(), lr=4e-3)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    for _ in range(n_steps):
        code = torch.randint(2, (256,), generator=generator)
        noise = torch.randn((256, 2, 1), generator=generator)
        z_1 = mean[code] + (factor[code] @ noise)[..., 0]
        given = drop_attributes(code[:, None] + 1, 0.2, generator)
        optimizer.zero_grad()
        pooled = torch.rand(256, generator=generator) < 0.5
        flow_matching_loss(field, z_1, given, None, generator, pooled=pooled).backward()
        optimizer.step()
        annealing.step()
    return field.requires_grad_(False), mean, factor @ factor.mT


@pytest.mark.parametrize("category", [0, 1])
def test_flow_recovers_a_gaussian_per_category(gaussian_flow, category):
    field, mean, covariance = gaussian_flow
    z_0 = torch.randn((4000, 2), generator=seeded(9))
    codes = torch.full((4000, 1), category + 1)
    velocity = guided(field, codes, [(1.0, np.array([True]))], None)
    z_1 = make_solver("fitted", 10, lambda: (velocity, z_0))(velocity, z_0)
    torch.testing.assert_close(z_1.mean(dim=0), mean[category], atol=0.08, rtol=0)
    torch.testing.assert_close(torch.cov(z_1.T), covariance[category], atol=0.08, rtol=0)


def test_the_unconditional_field_is_the_mixture(gaussian_flow):
    field, mean, covariance = gaussian_flow
    z_0 = torch.randn((4000, 2), generator=seeded(9))
    codes = torch.full((4000, 1), 1)  # given, but not seen
    velocity = guided(field, codes, [(1.0, np.array([False]))], None)
    z_1 = make_solver("fitted", 10, lambda: (velocity, z_0))(velocity, z_0)
    whole = covariance.mean(dim=0) + torch.cov(mean.T, correction=0)
    torch.testing.assert_close(z_1.mean(dim=0), mean.mean(dim=0), atol=0.1, rtol=0)
    torch.testing.assert_close(torch.cov(z_1.T), whole, atol=0.15, rtol=0)
