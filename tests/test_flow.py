"""Path, velocity, attribute dropout and guidance re-derived; a flow that learns a Gaussian."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cfgen_augment.flow import (
    NULL,
    SIGMA_MIN,
    VelocityField,
    drop_attributes,
    flow_matching_loss,
    guided,
    interpolate,
    target_velocity,
)
from cfgen_augment.solver import make_solver
from cfgen_augment.training import initialise


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_field(n_latent=2, n_categories=(3, 2), *, size_factor=False, width=16) -> VelocityField:
    """Built as a model builds it, then moved off its neutral start so that inputs matter."""
    with torch.device("meta"):
        field = VelocityField(
            n_latent, n_categories, width=width, n_blocks=2, n_embedding=16, size_factor=size_factor
        )
    field.to_empty(device="cpu")
    initialise(field, seeded())
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

    def __init__(self, z_1=None):
        super().__init__()
        self.z_1 = z_1

    def forward(self, z, t, attributes, log_size):
        self.seen = z, t, attributes, log_size
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


@pytest.mark.parametrize("n", [1, 6, 7])
def test_times_are_antithetic_and_inputs_reach_the_field(n):
    field, z_1 = Recorder(), torch.zeros(n, 2)
    codes, log_size = torch.arange(n)[:, None], torch.rand((n, 1), generator=seeded())
    flow_matching_loss(field, z_1, codes, log_size, seeded())
    z, t, attributes, size = field.seen
    assert t.shape == (n, 1)
    assert ((t >= 0) & (t <= 1)).all()
    half = (n + 1) // 2
    torch.testing.assert_close(t[half:], 1.0 - t[: n - half])
    assert attributes is codes
    assert size is log_size
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
    field = make_field(size_factor=True)
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
    field = make_field(size_factor=True)
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
        flow_matching_loss(field, z_1, given, None, generator).backward()
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
