"""The shared loop: batches, held-out cells, early stopping, devices, and initialisation."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cfgen_augment.training import (
    Schedule,
    hold_out,
    initialise,
    minibatches,
    resolve_device,
    seeded,
    train,
)

# --------------------------------------------------------------- minibatches


@settings(deadline=None)
@given(st.integers(2, 2000), st.integers(2, 300), st.booleans())
def test_minibatches_cover_every_row_once_and_none_is_alone(n, batch_size, shuffled):
    rows = np.arange(100, 100 + n)
    random = np.random.default_rng(0) if shuffled else None
    batches = list(minibatches(rows, batch_size, random))
    sizes = [len(batch) for batch in batches]
    assert min(sizes) >= 2
    assert max(sizes) <= max(batch_size, 3)  # three only where pairs would leave one cell over
    assert max(sizes) - min(sizes) <= 1
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), rows)
    if not shuffled:
        np.testing.assert_array_equal(np.concatenate(batches), rows)


def test_minibatches_are_shuffled_anew_and_leave_the_rows_alone():
    rows, random = np.arange(50), np.random.default_rng(0)
    first, second = (np.concatenate(list(minibatches(rows, 8, random))) for _ in range(2))
    assert (first != second).any()
    np.testing.assert_array_equal(rows, np.arange(50))
    again = np.concatenate(list(minibatches(rows, 8, np.random.default_rng(0))))
    np.testing.assert_array_equal(first, again)


def test_a_single_row_is_one_batch():
    assert [batch.tolist() for batch in minibatches(np.array([7]), 4)] == [[7]]


# ------------------------------------------------------------------ hold out


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=2, max_size=200),
    st.floats(0.0, 0.99),
    st.integers(0, 3),
)
def test_hold_out_gives_each_group_its_share_or_falls_back_to_all(groups, fraction, seed):
    groups = np.array(groups)
    rows, held = hold_out(groups, fraction, np.random.default_rng(seed))
    expected = {g: round(fraction * n) for g, n in enumerate(np.bincount(groups))}
    if sum(expected.values()) in (0, len(groups), len(groups) - 1):
        np.testing.assert_array_equal(rows, np.arange(len(groups)))
        np.testing.assert_array_equal(held, rows)
    else:
        assert len(rows) >= 2
        np.testing.assert_array_equal(np.sort(np.r_[rows, held]), np.arange(len(groups)))
        for group, n in expected.items():
            assert (groups[held] == group).sum() == n


def test_hold_out_is_drawn_from_its_generator():
    groups = np.repeat([0, 1], [60, 3])
    first, again, other = (
        hold_out(groups, 0.1, np.random.default_rng(seed))[1].tolist() for seed in (0, 0, 1)
    )
    assert first == again != other
    assert len(first) == 6
    assert max(first) < 60  # a tenth of three cells is none


# ----------------------------------------------------------------- the loop


class Scripted:
    """One weight that counts optimiser steps, and validation losses read from a script."""

    def __init__(self, validation, loss=None):
        self.module = nn.Linear(1, 1, bias=False, device="meta").to_empty(device="cpu")
        nn.init.zeros_(self.module.weight)
        self.script = iter(validation)
        self.loss_value = loss
        self.modes = []

    def loss(self, batch):
        self.modes.append(self.module.training)
        value = -self.module.weight.sum()  # gradient -1: every SGD step adds the learning rate
        return value if self.loss_value is None else value * self.loss_value

    def validate(self):
        assert not torch.is_grad_enabled()
        self.modes.append(self.module.training)
        return next(self.script)

    def train(self, max_epochs, patience, learning_rate=1.0):
        return train(
            self.module,
            self.loss,
            self.validate,
            rows=np.arange(4),
            optimizer=torch.optim.SGD(self.module.parameters(), lr=learning_rate),
            schedule=Schedule(learning_rate, max_epochs, 4, patience),
            random=np.random.default_rng(0),
            description="autoencoder",
            verbose=False,
        )


def annealed(epochs, max_epochs):
    """Sum of the learning rates of the first `epochs` epochs, from 1 along half a cosine."""
    return sum(0.5 * (1 + math.cos(math.pi * e / max_epochs)) for e in range(epochs))


@pytest.mark.parametrize(
    ("validation", "patience", "epochs", "best"),
    [
        pytest.param([5, 4, 3, 2], 3, 4, 3, id="better-all-the-way"),
        pytest.param([5, 1, 3, 0.5, 9, 9], 3, 6, 3, id="patience-starts-again"),
        pytest.param([1, 2], 1, 2, 0, id="no-epochs-left-to-wind-up-in"),
        pytest.param([5, 1, 3, 2, 4, 7, 7, 7, 0], 3, 8, 1, id="winds-up-after-patience"),
        pytest.param([2, 2, 2, 2, 2, 2, 0], 2, 5, 0, id="equal-is-not-better"),
        pytest.param([5, 1, 3, 2, 4, 6, 6], 3, 7, 1, id="winds-up-within-the-most-epochs"),
    ],
)
def test_early_stopping_restores_the_best_weights(validation, patience, epochs, best):
    run = Scripted(validation)
    history = run.train(len(validation), patience)
    assert history.best_epoch == best
    assert history.validation == validation[:epochs]
    assert len(history.training) == epochs
    assert run.module.weight.item() == pytest.approx(annealed(best + 1, len(validation)))
    assert run.modes == [True, False] * epochs
    assert not run.module.training


def test_winding_up_starts_at_the_best_weights_and_anneals_from_their_rate():
    validation = [5, 1, 3, 2, 0.9, 0.8, 0.7, 0.6]
    run = Scripted([*validation[:4], 3, *validation[4:6], 9])
    history = run.train(20, 3)
    assert history.best_epoch == 6
    rate = 0.5 * (1 + math.cos(math.pi * 1 / 20))  # of the best epoch, as steps of one
    wound_up = annealed(2, 20) + rate * annealed(2, 3)
    assert run.module.weight.item() == pytest.approx(wound_up)


class HostReads(TorchDispatchMode):
    """How often a number leaves its tensor, for which a host waits if that is on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ == "_local_scalar_dense"
        return func(*args, **(kwargs or {}))


def test_the_host_reads_losses_once_an_epoch_however_many_batches():
    def reads(n_cells):
        module = nn.Linear(1, 1)
        with HostReads() as host:
            train(
                module,
                lambda batch: module(torch.ones(len(batch), 1)).square().mean(),
                lambda: 1.0,
                rows=np.arange(n_cells),
                optimizer=torch.optim.AdamW(module.parameters(), fused=True),
                schedule=Schedule(0.0, 3, 8, 10),
                random=np.random.default_rng(0),
                description="flow",
                verbose=False,
            )
        return host.count

    assert reads(8) == reads(800) == 3


def test_buffers_are_restored_with_the_weights():
    module = nn.BatchNorm1d(1)
    rows = np.arange(8)
    seen = []

    def validate():
        seen.append(float(module.running_mean))
        return float(len(seen))

    history = train(
        module,
        lambda batch: module(torch.full((len(batch), 1), 3.0)).square().mean(),
        validate,
        rows=rows,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.0),
        schedule=Schedule(0.0, 4, 8, 10),
        random=np.random.default_rng(0),
        description="autoencoder",
        verbose=False,
    )
    assert history.best_epoch == 0
    assert seen[0] < seen[-1]
    assert float(module.running_mean) == seen[0]


@pytest.mark.parametrize(
    ("validation", "loss", "match"),
    [
        pytest.param([1.0, float("nan")], None, r"validation nan in epoch 1", id="validation"),
        pytest.param([1.0, float("inf")], None, r"validation inf in epoch 1", id="infinite"),
        pytest.param([1.0], float("nan"), r"training nan .* in epoch 0", id="training"),
    ],
)
def test_a_loss_that_is_not_finite_names_stage_and_epoch(validation, loss, match):
    with pytest.raises(FloatingPointError, match=rf"autoencoder: .*{match}.*Lower learning_rate"):
        Scripted(validation, loss).train(5, 5)


def test_training_fits_and_is_silent_unless_asked(capfd, caplog):
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.normal(size=(101, 3)), dtype=torch.float32)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]])
    module = nn.Linear(3, 1, device="meta").to_empty(device="cpu")
    initialise(module, torch.Generator().manual_seed(0))

    def loss(batch):
        return (module(x[batch]) - y[batch]).square().mean()

    def fit(verbose):
        with caplog.at_level(logging.INFO, logger="cfgen_augment.training"):
            return train(
                module,
                loss,
                lambda: loss(np.arange(101)).item(),
                rows=np.arange(101),
                optimizer=torch.optim.AdamW(module.parameters(), lr=0.1),
                schedule=Schedule(0.1, 40, 16, 40),
                random=np.random.default_rng(0),
                description="flow",
                verbose=verbose,
            )

    history = fit(verbose=False)
    assert history.validation[history.best_epoch] < 1e-3 < history.validation[0]
    assert loss(np.arange(101)).item() == pytest.approx(min(history.validation))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert "flow: 40 epochs" in caplog.text
    fit(verbose=True)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "flow" in captured.err


# ------------------------------------------------------------------- devices


def test_auto_falls_back_and_cpu_is_there(monkeypatch):
    assert resolve_device("cpu") == torch.device("cpu")
    for there, expected in [(False, "cpu"), (True, "cuda")]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert resolve_device("auto") == torch.device(expected)


@pytest.mark.parametrize(
    ("device", "there"), [("cuda", True), ("cuda:0", True), ("cuda:1", True), ("cuda:2", False)]
)
def test_cuda_devices_are_counted(device, there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    if there:
        assert resolve_device(device) == torch.device(device)
    else:
        with pytest.raises(ValueError, match=r"got 'cuda:2', .*offers 2 CUDA device\(s\)\. Use"):
            resolve_device(device)


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_absent_cuda_is_an_error_not_a_fallback(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"this machine offers 0 CUDA device\(s\).*'auto' or 'cpu"):
        resolve_device(device)


@pytest.mark.parametrize("device", ["gpu", "mps", "meta", "", "cuda:x", "cpu:3", None])
def test_unknown_devices(device):
    with pytest.raises(ValueError, match=r"expected 'auto', 'cpu', 'cuda' or 'cuda:N'; got"):
        resolve_device(device)


# ------------------------------------------------------------ initialisation


def build():
    with torch.device("meta"):
        module = nn.Sequential(
            nn.Linear(400, 300), nn.BatchNorm1d(300), nn.ELU(), nn.Linear(300, 2)
        )
        module.append(nn.Embedding(50, 400))
    module.to_empty(device="cpu")
    for tensor in module.state_dict().values():
        tensor.fill_(99)  # whatever the memory held
    return module


def test_initialise_is_a_function_of_its_generator_and_reads_no_global_state():
    before = torch.get_rng_state()
    states = []
    for seed in (0, 0, 1):
        module = build()
        initialise(module, torch.Generator().manual_seed(seed))
        states.append(module.state_dict())
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
        assert not (tensor == 99).any(), name
    assert not torch.equal(states[0]["0.weight"], states[2]["0.weight"])


def test_initialise_draws_by_pytorchs_own_schemes():
    module = build()
    initialise(module, torch.Generator().manual_seed(0))
    linear, norm, embedding = module[0], module[1], module[4]
    bound = 400**-0.5  # uniform on (-1/sqrt(in), 1/sqrt(in))
    for tensor in (linear.weight, linear.bias):
        assert tensor.abs().max() <= bound
        assert float(tensor.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.1)
    assert float(embedding.weight.detach().std()) == pytest.approx(1.0, rel=0.05)
    assert norm.weight.tolist() == norm.running_var.tolist() == [1.0] * 300
    assert norm.bias.tolist() == norm.running_mean.tolist() == [0.0] * 300
    assert int(norm.num_batches_tracked) == 0


def test_seeded_follows_the_random_generator():
    def draws(seed):
        random = np.random.default_rng(seed)
        return [
            float(torch.rand(1, generator=seeded(random, torch.device("cpu")))) for _ in range(2)
        ]

    assert draws(0) == draws(0) != draws(1)
    assert draws(0)[0] != draws(0)[1]
