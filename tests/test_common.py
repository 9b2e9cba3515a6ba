"""The parts that no paper is about, against closed forms."""

import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import resource
import signal
import time
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

import common
import d3pm
import flow_matching
from common import SolverError, UserError

ROOT = Path(__file__).parent.parent


def small_config(folder, **settings):
    return flow_matching.Config(**{"out": str(folder), "steps": 10, "batch_size": 16} | settings)


# ---- ODE stepping -------------------------------------------------------------------------------
# x' = x cos t has the solution x_0 exp(sin t - sin t_0): smooth, non-autonomous, exact.


def field(x, t):
    return x * t.cos()[:, None]


def exact(x_0, t_0, t):
    return x_0 * math.exp(math.sin(t) - math.sin(t_0))


X_0 = torch.tensor([[1.0, -0.5], [2.0, 0.3]], dtype=torch.float64)
ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "dopri5": 5}


@pytest.mark.parametrize("times", [(0.0, 2.0), (2.0, 0.0)])
@pytest.mark.parametrize(("method", "order"), ORDERS.items())
def test_solver_order(method, order, times):
    errors = []
    for steps in (32, 64, 128):
        x, _ = common.odeint(field, X_0, times, method, steps=steps)
        errors.append((x - exact(X_0, *times)).abs().max().item())
    # The next term of the error is one order higher: at 128 steps the measured order is off by
    # less than 0.15.
    assert math.log2(errors[1] / errors[2]) == pytest.approx(order, abs=0.15)
    assert errors[2] < 0.1 ** (order - 0.5)


@pytest.mark.parametrize("times", [(0.0, 3.0), (3.0, 0.0)])
def test_dopri5_keeps_its_tolerance(times):
    errors, counts = [], []
    for tol in (1e-3, 1e-5, 1e-7, 1e-9):
        x, nfe = common.odeint(field, X_0, times, rtol=tol, atol=tol)
        errors.append((x - exact(X_0, *times)).abs().max().item() / tol)
        counts.append(nfe)
    assert max(errors) < 30  # the local errors of the ten to sixty steps add up
    assert counts == sorted(counts)
    assert counts[-1] < 400


def test_dopri5_dense_output():
    times = torch.linspace(0, 3, 31, dtype=torch.float64)
    x, nfe = common.odeint(field, X_0, times, rtol=1e-8, atol=1e-8)
    truth = torch.stack([exact(X_0, 0.0, t.item()) for t in times])
    assert_close(x, truth, rtol=0, atol=5e-7)  # 4th order between steps chosen for the 5th
    _, alone = common.odeint(field, X_0, (0.0, 3.0), rtol=1e-8, atol=1e-8)
    assert nfe == alone  # the grid costs no evaluation
    back, _ = common.odeint(field, x[-1], times.flip(0), rtol=1e-8, atol=1e-8)
    assert_close(back.flip(0), truth, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_times_within_one_step_are_interpolated_together(sign):
    """All at once as each one alone; the last is the step's own end, to the bit."""

    def pair(state, t):
        return field(state[0], t), state[1] * a

    a = torch.tensor(0.7, requires_grad=True)
    start = (X_0, torch.ones(2))  # float64 and float32
    times = sign * torch.linspace(0, 3, 31, dtype=torch.float64)
    (x, y), _ = common.odeint(pair, start, times)
    assert x.shape == (31, 2, 2)
    assert y.shape == (31, 2)
    assert torch.equal(x[0], X_0)
    for i in range(1, 30, 4):
        alone, _ = common.odeint(pair, start, torch.stack([times[0], times[i], times[-1]]))
        assert_close(x[i], alone[0][1], rtol=1e-13, atol=1e-13)
        assert_close(y[i], alone[1][1], rtol=1e-6, atol=1e-6)
    end, _ = common.odeint(pair, start, (0.0, 3.0 * sign))
    assert torch.equal(x[-1], end[0])
    assert torch.equal(y[-1], end[1])
    before, after, *slopes = ((v,) for v in torch.randn(9, 1000))
    (states,) = common._dense(before, after, slopes, 0.1, [0.3, 1.0])
    assert torch.equal(states[1], after[0])  # where before + (after - before) is not after
    (gradient,) = torch.autograd.grad(y[:, 0].sum(), a)
    truth = (times * (0.7 * times).exp()).sum()  # d/da of exp(a t)
    assert_close(gradient.item(), truth.item(), rtol=1e-4, atol=0)


def test_odeint_counts_evaluations_and_passes_times():
    seen = []

    def watched(x, t):
        assert t.shape == (2,)
        assert t.dtype == torch.float64
        seen.append(t[0].item())
        return field(x, t)

    for method, stages in {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}.items():
        seen.clear()
        _, nfe = common.odeint(watched, X_0, (0.0, 1.0), method, steps=5)
        assert nfe == len(seen) == 5 * stages == 5 * common.evaluations_per_step(method)
    seen.clear()
    _, nfe = common.odeint(watched, X_0, (0.0, 1.0))
    assert nfe == len(seen)
    assert 0 <= min(seen) <= max(seen) <= 1  # never asks outside the interval


def test_odeint_takes_tuples():
    def pair(state, t):
        return field(state[0], t), 2 * t

    (x, y), _ = common.odeint(pair, (X_0, torch.zeros(2, dtype=torch.float64)), (0.0, 2.0))
    assert_close(x, exact(X_0, 0.0, 2.0), rtol=1e-4, atol=0)
    assert_close(y, torch.full((2,), 4.0, dtype=torch.float64), rtol=1e-10, atol=0)
    times = torch.tensor([0.0, 1.0, 2.0])
    (x, y), _ = common.odeint(pair, (X_0, torch.zeros(2)), times, "rk4", steps=50)
    assert x.shape == (3, 2, 2)
    assert y.shape == (3, 2)
    assert y.dtype == torch.float32
    assert_close(x[1], exact(X_0, 0.0, 1.0), rtol=1e-7, atol=0)


@pytest.mark.parametrize("options", [{"rtol": 1e-9, "atol": 1e-9}, {"method": "rk4", "steps": 200}])
def test_odeint_differentiates(options):
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x_0 = torch.tensor([[1.5]], dtype=torch.float64, requires_grad=True)
    x, _ = common.odeint(lambda x, t: a * x, x_0, (0.0, 2.0), **options)
    grad_a, grad_x = torch.autograd.grad(x.sum(), (a, x_0))
    assert_close(grad_x.item(), math.exp(1.4), rtol=1e-7, atol=0)
    assert_close(grad_a.item(), 2 * 1.5 * math.exp(1.4), rtol=1e-7, atol=0)


def test_odeint_carries_half_precision_in_float32():
    x, _ = common.odeint(
        lambda x, t: torch.ones_like(x).bfloat16(), torch.ones(4, 1).bfloat16(), (0, 1)
    )
    assert x.dtype == torch.float32
    x, _ = common.odeint(
        lambda x, t: torch.ones_like(x), torch.zeros(4, 1), (0, 1), "euler", steps=1000
    )
    assert_close(x, torch.ones(4, 1), rtol=0, atol=1e-5)  # a bfloat16 state would stop at 0.25


def test_odeint_says_why_it_cannot_go_on():
    one = torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(SolverError, match="at t = (0.999|1)"):
        common.odeint(lambda x, t: x**2, one, (0.0, 2.0))  # blows up at t = 1
    with pytest.raises(SolverError, match="non-finite"):
        common.odeint(lambda x, t: torch.where(t > 0.5, math.nan, x.T).T, one, (0.0, 1.0))
    with pytest.raises(SolverError, match="at the start"):
        common.odeint(lambda x, t: x, one * math.nan, (0.0, 1.0))
    with pytest.raises(SolverError, match="3 steps"):
        common.odeint(lambda x, t: 50 * (50 * t).cos() * x, one, (0.0, 9.0), max_steps=3)
    with pytest.raises(SolverError, match="not finite"):
        common.odeint(lambda x, t: x / 0, one, (0.0, 1.0), "euler", steps=2)
    with pytest.raises(ValueError, match="unknown method"):
        common.odeint(field, one, (0.0, 1.0), "rk5", steps=2)
    with pytest.raises(ValueError, match="give steps"):
        common.odeint(field, one, (0.0, 1.0), "euler")
    with pytest.raises(ValueError, match="strictly"):
        common.odeint(field, one, torch.tensor([0.0, 1.0, 0.5]))


# ---- Divergence and likelihood ------------------------------------------------------------------

A = torch.tensor([[0.5, -1.0, 0.2], [0.3, 0.1, 0.7], [-0.4, 0.6, -0.9]], dtype=torch.float64)


def linear(x, t):
    return x @ A.T


def network_field(x, t):
    """A nonlinear field of (B, 1, 3) states, to check the shapes as well."""
    return (x * x.roll(1, 2) + t[:, None, None]).sin() @ A


@pytest.mark.parametrize("forward", [False, True])
def test_divergence_is_the_trace_of_the_jacobian(forward):
    torch.manual_seed(0)
    x, t = torch.randn(5, 1, 3, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    v, div = common.divergence(network_field, x, t, forward=forward)
    assert_close(v, network_field(x, t))
    for b in range(5):
        one = slice(b, b + 1)
        jacobian = torch.autograd.functional.jacobian(
            lambda y, one=one: network_field(y, t[one]), x[one]
        )
        assert_close(div[b], jacobian.reshape(3, 3).trace(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("forward", [False, True])
def test_hutchinson_is_unbiased(forward):
    # The mean over all eight Rademacher probes is the expectation itself.
    x, t = torch.randn(4, 3, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    estimates = []
    for signs in itertools.product((-1.0, 1.0), repeat=3):
        z = torch.tensor(signs, dtype=torch.float64).expand(4, 3)
        estimates.append(common.divergence(linear, x, t, z, forward)[1])
    estimates = torch.stack(estimates)
    assert_close(estimates.mean(0), A.trace().expand(4), rtol=1e-12, atol=1e-12)
    symmetric = (A + A.T) / 2
    off = symmetric.square().sum() - symmetric.diagonal().square().sum()
    assert_close(estimates.var(0, correction=0), (2 * off).expand(4), rtol=1e-10, atol=0)


def test_probes_have_unit_covariance():
    torch.manual_seed(0)
    x = torch.zeros(200_000, 2)
    for kind, fourth in (("rademacher", 1.0), ("gaussian", 3.0)):
        z = common.hutchinson_probe(x, kind)
        # standard errors of the covariance are below 1 / sqrt(200,000) = 0.0022, of z⁴ 0.022
        assert_close(z.T @ z / len(z), torch.eye(2), rtol=0, atol=0.012)
        assert_close(z.pow(4).mean().item(), fourth, rtol=0, atol=0.1)


def test_divergence_trains():
    weight = A.clone().requires_grad_()
    x, t = torch.randn(4, 3, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    _, div = common.divergence(lambda x, t: x.square() @ weight.T / 2, x, t)
    (grad,) = torch.autograd.grad(div.sum(), weight)
    assert_close(grad, torch.diag(x.sum(0)))  # div = sum_i W_ii x_i


def test_log_likelihood_of_a_linear_flow():
    torch.manual_seed(0)
    x_1 = torch.randn(6, 3, dtype=torch.float64)
    prior = common.standard_normal_log_prob
    log_p, x_0, nfe = common.log_likelihood(linear, x_1, prior, rtol=1e-10, atol=1e-10)
    expected = x_1 @ torch.linalg.matrix_exp(-A).T
    assert_close(x_0, expected, rtol=1e-8, atol=1e-8)
    assert_close(log_p, prior(expected) - A.trace(), rtol=1e-8, atol=1e-8)
    assert nfe > 6
    log_p, _, _ = common.log_likelihood(linear, x_1, prior, method="rk4", steps=400)
    assert_close(log_p, prior(expected) - A.trace(), rtol=1e-8, atol=1e-8)


def test_bits_per_dim_of_uniform_images_is_eight():
    d = 3 * 4 * 4
    log_p = torch.full((2,), -d * math.log(2.0), dtype=torch.float64)  # uniform on [-1, 1]^d
    assert_close(common.bits_per_dim(log_p, d), torch.full((2,), 8.0, dtype=torch.float64))
    normal = torch.distributions.Normal(0.0, 1.0)
    x = torch.randn(5, 3, 4, 4)
    assert_close(common.standard_normal_log_prob(x), normal.log_prob(x).flatten(1).sum(1))


# ---- Data ---------------------------------------------------------------------------------------


def test_levels_survive_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    x = common.to_float(levels)
    assert x.min() > -1
    assert x.max() < 1
    assert torch.equal(common.to_uint8(x), levels)
    torch.manual_seed(0)
    noisy = common.dequantize(x.repeat(100, 1))
    assert torch.equal(common.to_uint8(noisy), levels.repeat(100, 1))  # stays in its bin
    variance = (noisy - x).square().mean()  # 25,600 draws: five standard errors are 3 %
    assert_close(variance.item(), 1 / (12 * 128**2), rtol=0.03, atol=0)
    assert torch.equal(
        common.to_uint8(torch.tensor([-3.0, 3.0])), torch.tensor([0, 255], dtype=torch.uint8)
    )


@pytest.mark.parametrize("name", common.DENSITIES)
def test_densities(name):
    draw = common.DENSITIES[name]
    x, y = draw(20_000, torch.Generator().manual_seed(3))
    again, _ = draw(20_000, torch.Generator().manual_seed(3))
    other, _ = draw(20_000, torch.Generator().manual_seed(4))
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    assert x.shape == (20_000, 2)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert x.abs().max() < 3.2
    assert 0.5 < x.std() < 1.6
    assert x.mean(0).abs().max() < 0.4


def test_checkerboard_is_uniform_on_its_cells():
    x, _ = common.DENSITIES["checkerboard"](80_000, torch.Generator().manual_seed(0))
    cell = (x + 2).floor().long()
    assert ((cell.sum(1)) % 2 == 0).all()
    counts = torch.bincount(cell[:, 0] * 4 + cell[:, 1], minlength=16)
    assert (counts > 0).sum() == 8
    # eight cells of 10,000 +- 94: five standard deviations
    assert_close(
        counts[counts > 0].double(),
        torch.full((8,), 10_000.0, dtype=torch.float64),
        rtol=0,
        atol=470,
    )
    assert common.ENTROPIES["checkerboard"] == math.log(8)


def test_entropy_of_the_eight_gaussians():
    x, _ = common.DENSITIES["eight_gaussians"](200_000, torch.Generator().manual_seed(0))
    angle = torch.arange(8) * math.pi / 4
    modes = 2 * torch.stack([angle.cos(), angle.sin()], dim=1)
    log_normal = -(torch.cdist(x, modes) ** 2) / (2 * 0.15**2) - math.log(2 * math.pi * 0.15**2)
    log_p = log_normal.logsumexp(1) - math.log(8)
    # standard error 1 / sqrt(200,000) = 0.0022
    assert_close(-log_p.mean().item(), common.ENTROPIES["eight_gaussians"], rtol=0, atol=0.011)


def test_glyphs_are_a_data_set():
    start = time.process_time()
    x, y = common.glyphs(60_000, seed=0)
    assert time.process_time() - start < 10
    assert x.shape == (60_000, 1, 28, 28)
    assert x.dtype == torch.uint8
    assert torch.equal(y.bincount(), torch.full((10,), 6_000))
    small, _ = common.glyphs(50, seed=7)
    assert torch.equal(small, common.glyphs(50, seed=7)[0])
    assert not torch.equal(small, common.glyphs(50, seed=8)[0])
    ink = (x > 0).float().mean().item()
    assert 0.1 < ink < 0.3  # MNIST: 0.19

    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 5, stride=2, padding=2),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 5, stride=2, padding=2),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(32 * 49, 10),
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for index in torch.randperm(len(x)).split(128):
        optimizer.zero_grad()
        F.cross_entropy(net(common.to_float(x[index])), y[index]).backward()
        optimizer.step()
    x, y = common.glyphs(10_000, seed=1)
    with torch.no_grad():
        accuracy = (net(common.to_float(x)).argmax(1) == y).float().mean().item()
    assert 0.97 < accuracy < 0.9995  # neither noise nor trivial


def image_folder(root, sizes=((40, 30), (20, 20), (30, 50))):
    for i, (name, colour) in enumerate({"a": (250, 0, 0), "b": (0, 250, 0)}.items()):
        (root / name).mkdir(parents=True)
        for j in range(6):
            Image.new("RGB", sizes[(i + j) % len(sizes)], colour).save(root / name / f"{j}.png")
    (root / "notes.txt").write_text("not an image")
    return root


def test_image_folder(tmp_path):
    root = image_folder(tmp_path / "images")
    cfg = small_config(tmp_path, dataset=str(root), image_size=16)
    data = common.load_data(cfg)
    assert data.shape == (3, 16, 16)
    assert len(data.train) == 10
    assert len(data.test) == 2
    assert data.num_classes == 2
    red = data.train[data.train_labels == 0]
    assert torch.equal(red.unique(), torch.tensor([0, 250], dtype=torch.uint8))
    assert (red[:, 0] == 250).all()
    x, y = data.batch(7)
    assert x.shape == (7, 3, 16, 16)
    assert y.shape == (7,)


def test_held_out_images_come_in_no_order(tmp_path):
    """A folder's files are read class by class, and scripts take the first n, held out or not."""
    for name, colour in {"a": 0, "b": 255}.items():
        (tmp_path / name).mkdir()
        for j in range(100):
            level = (colour + (j if name == "a" else -j)) % 256
            Image.new("RGB", (4, 4), (level,) * 3).save(tmp_path / name / f"{j:03}.png")
    cfg = small_config(tmp_path, dataset=str(tmp_path), image_size=4)
    data = common.load_data(cfg)
    assert data.test_labels.tolist().count(0) == 10
    for images, labels in ((data.test, data.test_labels), (data.train, data.train_labels)):
        assert set(labels[:10].tolist()) == {0, 1}  # all of one: in 2 of 184,756 orders, at most
        assert ((images[:, 0, 0, 0] > 127).long() == labels).all()  # with their labels
    assert torch.equal(data.test, common.load_data(cfg).test)


@pytest.mark.parametrize(("kind", "channels"), [("MNIST", 1), ("FashionMNIST", 1), ("CIFAR10", 3)])
@pytest.mark.parametrize("size", [None, 4])
def test_torchvisions_images(tmp_path, monkeypatch, kind, channels, size):
    """Channels first, upright, the training set's beside their labels."""
    levels = np.arange(4 * 8 * 8 * channels).reshape(4, 8, 8, channels) // 4
    levels = levels.astype(np.uint8)

    def stub(root, train, download):
        images = levels[:3] if train else levels[3:]
        if channels == 1:
            return types.SimpleNamespace(
                data=torch.from_numpy(images[..., 0]), targets=torch.arange(len(images))
            )
        return types.SimpleNamespace(data=images, targets=list(range(len(images))))

    monkeypatch.setattr(f"torchvision.datasets.{kind}", stub)
    name = {"FashionMNIST": "fashion_mnist"}.get(kind, kind.lower())
    data = common.load_data(small_config(tmp_path, dataset=name, image_size=size))
    whole = torch.from_numpy(levels).permute(0, 3, 1, 2)
    if size:
        whole = F.interpolate(whole.float(), [4, 4], mode="area").round().byte()
    for x, expected in ((data.train, whole[:3]), (data.test, whole[3:])):
        assert x.dtype == torch.uint8
        error = (x[..., 1:-1, 1:-1].float() - expected[..., 1:-1, 1:-1]).abs().max()
        assert error <= (1 if size else 0)  # a linear image, away from its edges: to rounding
        if not size:
            assert torch.equal(x, expected)
    assert data.train_labels.tolist() == [0, 1, 2]
    assert data.test_labels.tolist() == [0]


def test_pictures_that_are_not_plain_colours(tmp_path, pictures):
    """A drawing on nothing lies on white; what Pillow would clip is refused."""
    pictures("plain", n=2, size=4)
    ink = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    ink.paste((10, 20, 30, 255), (0, 0, 4, 2))
    ink.save(tmp_path / "plain" / "a.png")
    data = common.load_data(small_config(tmp_path, dataset=str(tmp_path / "plain"), image_size=4))
    every = torch.cat([data.train, data.test])
    (drawing,) = [x for x in every if (x[:, 2:] == 255).all()]
    assert (drawing[:, :2] == torch.tensor([10, 20, 30])[:, None, None]).all()
    for mode, level in (("I;16", 40_000), ("F", 0.5)):
        Image.new(mode, (4, 4), level).save(tmp_path / "plain" / "a.tiff")
        with pytest.raises(UserError, match="not of 8 bits but of mode"):
            common.load_data(small_config(tmp_path, dataset=str(tmp_path / "plain")))


def test_photographs_stand_upright(tmp_path):
    """A camera on its side writes its pixels as they fall, and says so by EXIF's orientation."""
    image = Image.new("RGB", (16, 16))
    image.paste((255, 255, 255), (0, 0, 8, 16))  # the left half is white
    sideways = image.getexif()
    sideways[0x0112] = 6  # to be turned by 90° clockwise: then the upper half is
    for i in range(2):
        image.save(tmp_path / f"{i}.png", exif=sideways)
    data = common.load_data(small_config(tmp_path, dataset=str(tmp_path), image_size=16))
    assert (data.train[0, :, :8] == 255).all()
    assert (data.train[0, :, 8:] == 0).all()


def test_flip_mirrors_half_of_the_images():
    x = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    x[..., 0] = 255
    data = common.Data("d", x, torch.zeros(1).long(), x, torch.zeros(1).long(), flip=True)
    torch.manual_seed(0)
    batch, _ = data.batch(1000)
    left = (batch[:, 0, 0, 0] > 0).float().mean().item()
    assert 0.42 < left < 0.58  # five standard deviations of a fair coin
    assert ((batch[:, 0, 0, 0] > 0) != (batch[:, 0, 0, 1] > 0)).all()


# ---- Networks -----------------------------------------------------------------------------------


def test_time_embedding_tells_times_apart():
    emb = common.time_embedding(torch.linspace(0, 1, 101), 64)
    assert emb.shape == (101, 64)
    assert (emb.std(0) > 0.02).sum() >= 60  # unscaled t would leave most channels constant
    assert (common.time_embedding(torch.linspace(0, 1, 101) / 1000, 64).std(0) > 0.02).sum() < 30
    assert torch.cdist(emb, emb).add(torch.eye(101) * 9).min() > 0.1


@pytest.mark.parametrize("frequency", [30, 1000])
def test_time_embedding_has_the_frequencies_it_says(frequency):
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    embed = functools.partial(common.time_embedding, dim=64, frequency=frequency)
    _, slope = torch.func.jvp(embed, (zero,), (one,))  # of cos wt and sin wt at 0: 0 and w
    assert (slope[0, :32] == 0).all()
    powers = torch.linspace(0, 1, 33, dtype=torch.float64)[:-1]
    expected = frequency ** (1 - powers) * 0.1**powers  # geometric from `frequency` to 0.1
    assert_close(slope[0, 32:], expected)


def test_networks_of_a_continuous_time_are_smooth_in_it():
    """From t to t + 0.01 the fastest wave of the embedding turns by 0.3 radians, not by ten."""
    data = types.SimpleNamespace(shape=(1, 8, 8), is_image=True)
    cfg = types.SimpleNamespace(width=8, mult=(1,), blocks=1, attention=None, dropout=0.0, patch=1)
    net = common.network(cfg, data)
    t = torch.tensor([0.5, 0.51])
    near = common.time_embedding(t, 8, net.frequency).diff(dim=0).norm()
    far = common.time_embedding(t, 8).diff(dim=0).norm()
    assert near < 0.35 < 1 < far


@pytest.mark.parametrize(("size", "mult"), [(28, (1, 2, 2)), (32, (1, 2)), (20, (1, 1, 2, 2))])
def test_unet_shapes(size, mult):
    net = common.UNet(3, 5, size, channels=8, mult=mult, blocks=1, attention=(7,), num_classes=4)
    torch.manual_seed(0)
    x, t, y = torch.randn(2, 3, size, size), torch.rand(2), torch.tensor([1, 3])
    assert net(x, t, y).shape == (2, 5, size, size)
    assert (net(x, t, y) == 0).all()  # zero-initialised output
    torch.nn.init.normal_(net.output[2].weight)
    for stage in net.modules():
        if isinstance(stage, common.Stage):
            torch.nn.init.normal_(stage.conv_2.weight, std=0.1)
    assert not torch.equal(net(x, t, y), net(x, t, y.flip(0)))
    assert not torch.equal(net(x, t, y), net(x, t / 2, y))
    alone = net(x[:1], t[:1], y[:1])
    assert_close(net(x, t, y)[:1], alone, rtol=1e-4, atol=1e-4)  # no mixing of the batch
    channels_last = net.to(memory_format=torch.channels_last)(x, t, y)
    assert_close(channels_last[:1], alone, rtol=1e-4, atol=1e-4)


def test_attention_in_bfloat16_is_the_same():
    """Values and gradients; bfloat16 has 8 bits, and weights sum to one: two roundings of 2^-8."""
    q, k, v = torch.randn(3, 2, 4, 49, 16).requires_grad_()
    fused = common.dot_product_attention(q, k, v)
    half = common.dot_product_attention(*(z.bfloat16() for z in (q, k, v)))
    assert_close(half.float(), fused, rtol=0, atol=2**-7 * v.abs().max().item())
    g = torch.randn_like(fused)
    exact = torch.autograd.grad(fused, (q, k, v), g)
    for a, b in zip(torch.autograd.grad(half.float(), (q, k, v), g), exact, strict=True):
        assert_close(a, b, rtol=0, atol=0.03 * b.abs().max().item())


def test_unet_of_patches():
    """A U-Net of the patches' pixels as channels, whose result a block sees beside the pixels."""
    shape = {"channels": 8, "mult": (1, 2), "blocks": 1, "attention": (4,)}
    patches = common.UNet(3, 5, 16, **shape, patch=2)
    pixels = common.UNet(12, 16, 8, **shape)
    pixels.output = torch.nn.Identity()
    missing, _ = pixels.load_state_dict(patches.state_dict(), strict=False)
    assert not missing
    pixels.output = patches.split
    torch.nn.init.normal_(patches.output[2].weight)
    x, t = torch.randn(2, 3, 16, 16), torch.rand(2)
    seen = []
    patches.fine.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    v = patches(x, t)
    assert v.shape == (2, 5, 16, 16)
    coarse = pixels(torch.nn.functional.pixel_unshuffle(x, 2), t)
    assert torch.equal(seen[0][:, :4], torch.nn.functional.pixel_shuffle(coarse, 2))
    assert torch.equal(seen[0][:, 4:], patches.fine_stem(x))
    v.square().sum().backward()
    untouched = [name for name, p in patches.named_parameters() if p.grad is None]
    assert untouched == []
    narrow = common.UNet(1, size=4, channels=1, mult=(1,), blocks=1, attention=(), patch=2)
    assert narrow(torch.randn(2, 1, 4, 4), t).shape == (2, 1, 4, 4)


def test_unet_sizes_of_the_papers():
    with torch.device("meta"):
        paper = common.UNet(3, 3, 32, 256, (1, 2, 2, 2), 2, (16,))  # Lipman et al., Table 3
        small = common.UNet(3, 3, 32, 128, (1, 2, 2, 2), 2, (16,))
    millions = [sum(p.numel() for p in net.parameters()) / 1e6 for net in (paper, small)]
    # the ADM network of these sizes has 143 and 36 million; ours adds scale and shift
    assert 140 < millions[0] < 160
    assert 33 < millions[1] < 42


def test_attention_is_softmax_attention():
    torch.manual_seed(0)
    layer = common.Attention(8, heads=2).double()
    torch.nn.init.normal_(layer.output.weight)
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    h = layer.norm(x).flatten(2).mT  # (B, HW, C)
    q, k, v = layer.qkv(h).chunk(3, dim=2)
    heads = []
    for i in range(2):
        part = slice(4 * i, 4 * i + 4)
        scores = torch.softmax(q[..., part] @ k[..., part].mT / 2.0, dim=2)
        heads.append(scores @ v[..., part])
    expected = x + layer.output(torch.cat(heads, dim=2)).mT.reshape(2, 8, 3, 5)
    assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


def test_networks_compile_without_graph_breaks():
    t, y = torch.rand(2), torch.tensor([0, 2])
    nets = [
        (common.UNet(1, 1, 8, 8, (1, 2), 1, (4,)), torch.randn(2, 1, 8, 8)),
        (common.MLP(2, width=8, num_classes=3), torch.randn(2, 2)),
    ]
    for net, x in nets:
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1)  # the last layer's zeros would hide everything
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        assert net(x, t, y).abs().min() > 0
        assert_close(compiled(x, t, y), net(x, t, y))


def test_any_width_will_do():
    for width in (1, 15, 200):
        net = common.UNet(1, 1, 4, width, (1,), 1, (4,))
        assert net(torch.randn(2, 1, 4, 4), torch.rand(2)).shape == (2, 1, 4, 4)
    assert common.attention_heads(200, 64) == 2
    assert common.time_embedding(torch.rand(3), 5).shape == (3, 5)


def test_networks_run_under_autocast_and_on_meta():
    for net, shape in (
        (common.UNet(1, 1, 8, 8, (1, 2), 1, (4,)), (2, 1, 8, 8)),
        (common.MLP(2), (2, 2)),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            assert net(torch.randn(shape), torch.rand(2)).isfinite().all()
        x, t = torch.empty(shape, device="meta"), torch.empty(2, device="meta")
        assert net.to("meta")(x, t).device.type == "meta"


# ---- The run ------------------------------------------------------------------------------------


class Line(torch.nn.Module):
    """v = w x + b t: a network small enough to follow by hand."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([2.0]))
        self.b = torch.nn.Parameter(torch.tensor([1.0]))

    def forward(self, x, t):
        return self.w * x + self.b * t[:, None]


def line_loss(run, x):
    return (run.model(x, torch.ones(len(x))) - 3 * x).square().mean()


def line_data():
    x = torch.linspace(-1, 1, 64)[:, None]
    y = torch.zeros(64, dtype=torch.long)
    return common.Data("line", x, y, x, y)


def test_schedule(tmp_path):
    for decay, middle in (("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)):
        cfg = small_config(tmp_path / decay, steps=110, warmup=10, decay=decay)
        run = common.Run(cfg, Line(), torch.device("cpu"))
        rates = []
        for run.done in (0, 4, 9, 10, 60, 109):
            rates.append(run.schedule())
        assert rates[:4] == [0.1, 0.5, 1.0, 1.0]
        assert rates[4] == pytest.approx(middle)
        assert rates[5] == (1.0 if decay == "constant" else pytest.approx(0, abs=0.011))


def test_ema_follows_its_recursion(tmp_path):
    cfg = small_config(tmp_path, steps=30, ema=0.8)
    run = common.Run(cfg, Line(), torch.device("cpu"))
    average = torch.tensor([2.0])
    for n, (x, _) in enumerate(run.batches(line_data()), 1):
        run.step(line_loss(run, x))
        decay = min(0.8, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * run.net.w.detach()
        assert_close(run.ema.w, average)
    assert all(p.is_leaf and not p.requires_grad for p in run.ema.parameters())  # no graph grows


def test_step_is_adam_on_the_clipped_gradient(tmp_path):
    cfg = small_config(tmp_path, steps=5, warmup=0, decay="constant", lr=0.1, clip=0.5, ema=None)
    run = common.Run(cfg, Line(), torch.device("cpu"))
    net = Line()
    adam = torch.optim.Adam(net.parameters(), lr=0.1)
    for x, _ in run.batches(line_data()):
        adam.zero_grad()
        (net(x, torch.ones(len(x))) - 3 * x).square().mean().backward()
        norm = torch.stack([p.grad.square().sum() for p in net.parameters()]).sum().sqrt()
        for p in net.parameters():
            p.grad *= min(1.0, 0.5 / norm.item())
        adam.step()
        run.step(line_loss(run, x))
        assert_close(run.net.w, net.w)
        assert_close(run.ema.w, run.net.w.detach())  # --no-ema: the weights themselves


def test_resume_is_exact(tmp_path):
    def finish(run):
        for x, _ in run.batches(data):
            run.step(line_loss(run, x) + 0.1 * torch.randn(()) * run.net.w.sum())
        return torch.load(run.folder / "checkpoint.pt", weights_only=True)

    data, device = line_data(), torch.device("cpu")
    cfg = small_config(tmp_path / "whole", steps=30, checkpoint_every=10)
    torch.manual_seed(0)
    whole = finish(common.Run(cfg, Line(), device))

    cfg = dataclasses.replace(cfg, out=str(tmp_path / "broken"))
    torch.manual_seed(0)
    run = common.Run(cfg, Line(), device)
    for x, _ in run.batches(data):
        run.step(line_loss(run, x) + 0.1 * torch.randn(()) * run.net.w.sum())
        if run.done == 17:
            break
    torch.manual_seed(99)
    resumed = common.Run(dataclasses.replace(cfg, resume=True), Line(), device)
    assert resumed.done == 10
    rest = finish(resumed)
    for part in ("model", "ema"):
        for key in whole[part]:
            assert torch.equal(whole[part][key], rest[part][key])
    assert torch.equal(whole["rng"][0]["cpu"], rest["rng"][0]["cpu"])


def test_orthogonal_factors():
    """Singular values come near one, singular vectors stay: the iteration is odd in the matrix."""
    torch.manual_seed(0)
    shapes = [(16, 72), (40, 24), (8, 8), (24, 16), (24, 40)]  # some share their shorter side
    svds = [torch.linalg.svd(torch.randn(s, dtype=torch.float64), False) for s in shapes]
    spread = [torch.linspace(0.2, 1, len(s), dtype=torch.float64) for _, s, _ in svds]
    matrices = [u * sizes @ v for (u, _, v), sizes in zip(svds, spread, strict=True)]
    factors = common.orthogonal_factors(matrices)
    turned = common.orthogonal_factors([-3 * x for x in matrices])
    for (u, _, v), factor, other in zip(svds, factors, turned, strict=True):
        inside = u.mT @ factor @ v.mT
        diagonal = inside.diagonal()
        # five steps reach about [0.68, 1.13] from any value above 0.01 of the norm (Jordan et al.)
        assert ((diagonal > 0.65) & (diagonal < 1.25)).all()
        assert_close(inside, torch.diag(diagonal), rtol=0, atol=1e-12)
        assert_close(other, -factor, rtol=1e-6, atol=1e-6)


def test_muon_moves_kernels_along_the_orthogonal_factor_and_the_rest_like_adam():
    """By hand: momentum b <- 0.95 b + g, direction g + 0.95 b, ten times Adam's rate."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(8, 6, 3), torch.nn.Conv2d(6, 1, 3))
    twin = copy.deepcopy(net)
    muon = common.Muon(net.parameters(), lr=1e-2, betas=(0.9, 0.99))
    adam = torch.optim.Adam(twin.parameters(), lr=1e-2, betas=(0.9, 0.99))
    momentum = 0
    for step in range(3):
        before = net[0].weight.detach().clone()
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            q.grad = torch.randn(p.shape)
            p.grad = q.grad.clone()
        gradient = net[0].weight.grad.clone()
        muon.step()
        adam.step()
        momentum = 0.95 * momentum + gradient
        direction = (gradient + 0.95 * momentum).flatten(1)
        (factor,) = common.orthogonal_factors([direction])
        wanted = before - 0.1 * factor.view_as(before)
        assert_close(net[0].weight, wanted)
        if step == 1:  # and its state survives
            state = copy.deepcopy(muon.state_dict())
            muon = common.Muon(net.parameters(), lr=1e-2, betas=(0.9, 0.99))
            muon.load_state_dict(state)
    for name in ("0.bias", "1.weight", "1.bias"):  # a kernel of one output channel is Adam's too
        assert_close(net.get_parameter(name), twin.get_parameter(name))


def test_muon_without_kernels_is_adam():
    net, twin = (common.MLP(2, width=8) for _ in range(2))
    twin.load_state_dict(net.state_dict())
    muon, adam = common.Muon(net.parameters()), torch.optim.Adam(twin.parameters())
    x, t = torch.randn(4, 2), torch.rand(4)
    for model, optimizer in ((net, muon), (twin, adam)):
        model(x, t).sub(1).square().sum().backward()
        optimizer.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_setup_on_one_gpu(monkeypatch):
    """Without an index cuda has no device to set; with one it has. (No GPU is needed to see it.)"""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(1))
    assert common.setup(small_config("x", device="auto")).type == "cuda"
    assert chosen == []
    assert common.setup(small_config("x", device="cuda:1")).index == 1
    assert [device.index for device in chosen] == [1]


def test_checkpoints_by_the_clock_and_every_loss_logged(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "SAVE_EVERY", -1)
    monkeypatch.setattr(common, "LOG_EVERY", 5)
    run = common.Run(small_config(tmp_path, decay="constant"), Line(), torch.device("cpu"))
    saved, losses = [], []
    for x, _ in run.batches(line_data()):
        losses.append(line_loss(run, x))
        run.step(losses[-1])
        saved.append(torch.load(run.file, weights_only=True)["step"])
    assert saved == list(range(1, 11))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    means = [sum(losses[:5]).item() / 5, sum(losses[5:]).item() / 5]
    assert_close([line["loss"] for line in lines], means)


def test_a_resumed_optimiser_heeds_the_flags(tmp_path):
    def resumed(**settings):
        cfg = small_config(tmp_path, resume=True, **settings)
        return common.Run(cfg, common.MLP(2), torch.device("cpu"), optimizer=cfg.optimizer)

    cfg = small_config(tmp_path)
    run = common.Run(cfg, common.MLP(2), torch.device("cpu"), optimizer=cfg.optimizer)
    for _ in run.steps():
        run.step(run.model(torch.randn(4, 2), torch.rand(4)).square().mean())
    run = resumed(beta_2=0.9)
    (group,) = run.optimizer.param_groups
    assert group["betas"] == (0.9, 0.9)
    assert run.optimizer.state[group["params"][0]]["step"] == 10
    flags = ["--resume", "--out", str(tmp_path), "--optimizer", "muon"]
    with pytest.raises(UserError, match="learned with --optimizer adam: leave --optimizer as it"):
        common.parse(flow_matching.Config, flow_matching.PRESETS, flags)


def test_other_processes_get_other_noise_when_they_resume(tmp_path):
    torch.manual_seed(0)
    run = common.Run(small_config(tmp_path), Line(), torch.device("cpu"))
    first = torch.randn(8)
    run.save()
    state = torch.load(run.file, weights_only=True)
    torch.save(state | {"rng": 2 * state["rng"]}, run.file)  # as of two processes
    torch.manual_seed(0)
    common.Run(small_config(tmp_path, resume=True), Line(), torch.device("cpu"))
    assert (torch.randn(8) != first).all()


def test_a_stage_refuses_another_stages_checkpoint(tmp_path):
    cfg, other_network = small_config(tmp_path, steps=0), common.MLP(2)
    run = common.Run(cfg, other_network, torch.device("cpu"), stage="second")
    run.save()
    cfg = small_config(tmp_path / "samples", sample=str(run.file))
    with pytest.raises(UserError, match="is of stage 'second'"):
        common.Run(cfg, Line(), torch.device("cpu"))


def test_two_stages_resume_exactly(tmp_path):
    """Each stage has its own checkpoint; a stage's noise does not depend on how the last one was
    reached; metrics.jsonl keeps one line for each step and figure of each stage."""

    def stages(cfg, stop=None):
        run = common.Run(cfg, Line(), device)
        for x, _ in run.batches(data):
            run.step(line_loss(run, x) + 0.1 * torch.randn(()) * run.net.w.sum())
        run.report("test", figure=1.0)
        torch.randn(7)  # as an evaluation might
        shorter = dataclasses.replace(cfg, steps=20)
        second = common.Run(shorter, run.net, device, stage="second", optimizer=torch.optim.SGD)
        for x, _ in second.batches(data):
            second.step(line_loss(second, x) + 0.1 * torch.randn(()) * second.net.w.sum())
            if second.done == stop:
                return second
        second.report("test", figure=2.0)
        return second

    data, device = line_data(), torch.device("cpu")
    cfg = small_config(tmp_path / "whole", steps=30, checkpoint_every=10)
    torch.manual_seed(0)
    whole = stages(cfg)
    assert isinstance(whole.optimizer, torch.optim.SGD)
    assert sorted(path.name for path in whole.folder.glob("*.pt")) == [
        "checkpoint-second.pt",
        "checkpoint.pt",
    ]
    cfg = dataclasses.replace(cfg, out=str(tmp_path / "broken"))
    torch.manual_seed(0)
    stages(cfg, stop=17)
    torch.manual_seed(99)
    rest = stages(dataclasses.replace(cfg, resume=True))
    assert torch.equal(whole.net.w, rest.net.w)
    assert torch.equal(whole.ema.w, rest.ema.w)
    lines = (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()
    kept = [(r.get("stage"), r["step"], "split" in r) for r in map(json.loads, lines)]
    assert kept == [
        (None, 30, False), (None, 30, True), ("second", 20, False), ("second", 20, True),
    ]  # fmt: skip
    assert json.loads((rest.folder / "config.json").read_text())["steps"] == 30  # the run's
    (tmp_path / "broken" / "checkpoint-second.pt").unlink()  # killed before its first checkpoint
    again = stages(dataclasses.replace(cfg, resume=True))
    assert torch.equal(whole.net.w, again.net.w)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_stop(tmp_path, number):
    before = signal.getsignal(number)
    run = common.Run(small_config(tmp_path, steps=100), Line(), torch.device("cpu"))
    with pytest.raises(SystemExit) as stopped:  # noqa: PT012
        for x, _ in run.batches(line_data()):
            if run.done == 3:
                os.kill(os.getpid(), number)
            run.step(line_loss(run, x))
    assert stopped.value.code == 130
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 4
    assert signal.getsignal(number) == before


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    run = common.Run(
        small_config(tmp_path, steps=90, checkpoint_every=20), Line(), torch.device("cpu")
    )
    with pytest.raises(UserError, match="nan at step 27.*last good"):  # noqa: PT012
        for x, _ in run.batches(line_data()):
            run.step(line_loss(run, x) * (math.nan if run.done == 26 else 1.0))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 20
    assert all(value.isfinite().all() for value in state["model"].values())


def test_non_finite_weights_are_never_saved(tmp_path):
    run = common.Run(small_config(tmp_path), Line(), torch.device("cpu"))
    run.net.w.data.fill_(math.inf)
    with pytest.raises(UserError, match="weights are not finite"):
        run.save()
    assert not (tmp_path / "checkpoint.pt").exists()


def test_run_folder(tmp_path):
    run = common.Run(small_config(tmp_path, steps=60), Line(), torch.device("cpu"))
    for x, _ in run.batches(line_data()):
        run.step(line_loss(run, x))
    run.report("test", nll=1.5)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {"script", "python", "torch", "device", "steps", "path"} <= config.keys()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [50, 60, 60]
    assert records[-1] == {"split": "test", "step": 60, "nll": 1.5}
    assert {"loss", "lr", "grad_norm", "steps_per_second"} <= records[0].keys()
    assert not (tmp_path / "checkpoint.tmp").exists()


def test_samples_go_on_where_they_were_interrupted(tmp_path):
    cfg = small_config(tmp_path, num_samples=37)  # in batches of 16
    run = common.Run(cfg, Line(), torch.device("cpu"))
    drawn = []

    def draw(n, most=99):
        if len(drawn) == most:
            raise KeyboardInterrupt
        drawn.append(n)
        return torch.randn(n, 1, 4, 4)

    run.write_samples(draw)
    whole = np.load(tmp_path / "samples.npz")["arr_0"]
    assert drawn == [16, 16, 5]
    assert whole.shape == (37, 4, 4, 1)
    assert whole.dtype == np.uint8
    assert len(np.unique(whole, axis=0)) == 37  # no batch is another's
    drawn.clear()
    with pytest.raises(KeyboardInterrupt):
        run.write_samples(functools.partial(draw, most=2))
    run.save()
    resumed = dataclasses.replace(cfg, resume=True)
    again = common.Run(resumed, Line(), torch.device("cpu"))
    again.write_samples(draw)
    assert drawn == [16, 16, 5]  # the first two were not drawn twice
    assert (np.load(tmp_path / "samples.npz")["arr_0"] == whole).all()
    assert not list(tmp_path.glob("samples-*"))
    assert np.load(tmp_path / "samples.npz").files == ["arr_0"]


def test_samples_on_a_full_disk(tmp_path):
    """An OSError, which `cli` shows in one line."""
    run = common.Run(small_config(tmp_path, num_samples=500), Line(), torch.device("cpu"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        with pytest.raises(OSError, match="File too large"):
            run.write_samples(lambda n: torch.zeros(n, 100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


@pytest.mark.parametrize("known", [True, False])
def test_samples_keep_their_classes(tmp_path, known):
    run = common.Run(small_config(tmp_path, num_samples=37), Line(), torch.device("cpu"))

    def draw(n):
        y = torch.arange(n)
        return y[:, None].repeat(1, 2) / 8, y if known else None

    run.write_samples(draw)
    arrays = np.load(tmp_path / "samples.npz")
    assert arrays.files == ["arr_0", "arr_1"][: 1 + known]
    assert arrays["arr_0"].dtype == np.float32
    if known:
        assert arrays["arr_1"].dtype == np.int64
        assert (arrays["arr_0"] == arrays["arr_1"][:, None] / 8).all()


def test_amp_keeps_losses_in_float32(tmp_path):
    run = common.Run(small_config(tmp_path, amp="on"), common.MLP(2), torch.device("cpu"))
    x = torch.randn(4, 2)
    v = run.model(x, torch.rand(4))
    assert v.dtype == torch.float32
    assert torch.equal(v, v.bfloat16().float())  # and the network did run in bfloat16


def test_compile_on_the_cpu(tmp_path):
    run = common.Run(
        small_config(tmp_path, compile=True, steps=2), common.MLP(2), torch.device("cpu")
    )
    x, t = torch.randn(4, 2), torch.rand(4)
    assert_close(run.model(x, t), run.net(x, t), rtol=1e-4, atol=1e-5)


# ---- Pictures and figures -----------------------------------------------------------------------


def test_density_image_puts_points_where_they_belong():
    points = torch.tensor([[2.0, 2.5]]).repeat(100, 1)  # right, top
    image = common.density_image(points, bound=3.0, bins=8, size=64).float().sum(0)
    row, column = divmod(image.argmax().item(), 64)
    assert 48 <= column < 64
    assert 0 <= row < 16


def test_save_images(tmp_path):
    x = torch.linspace(-1, 1, 10)[:, None, None, None].expand(10, 1, 4, 4)
    common.save_images(tmp_path / "grid.png", x, columns=5)
    image = Image.open(tmp_path / "grid.png")
    assert image.size[0] > 300
    assert image.getextrema()[0] == (0, 255)


def test_image_grid_puts_images_row_by_row():
    x = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 1, 2, 3)
    grid = common.image_grid(x, columns=2, scale=2)
    assert grid.shape == (3, 2 * (3 * 3 + 1), 2 * (2 * 4 + 1))
    small = grid[0, ::2, ::2]
    for i in range(5):
        row, column = divmod(i, 2)
        assert (small[3 * row + 1 : 3 * row + 3, 4 * column + 1 : 4 * column + 4] == i).all()
    assert (small[::3] == 64).all()  # the lines between
    assert (small[7:9, 5:8] == 64).all()  # where there is no sixth image
    assert_close(common.image_grid(common.to_float(x), 2, 2), grid, rtol=0, atol=0)


def test_chart_draws_where_it_should():
    dot = torch.tensor([[0.9, 0.9]])
    red = [("dots", dot, "#ff0000", 4)]
    image = common.chart(red, (0, 1, 0, 1), size=(100, 50))
    assert image.shape == (3, 50, 100)
    assert image[:, 5, 90].tolist() == [255, 0, 0]  # right, near the top
    framed = common.chart(red, (0, 1, 0, 1), size=(100, 50), axes=("x", "y"))
    assert framed.shape[1] > 50
    assert framed.shape[2] > 100
    assert ((framed[0] == 255) & (framed[1] == 0)).sum() == (
        (image[0] == 255) & (image[1] == 0)
    ).sum()


def test_round_numbers():
    assert common.round_numbers(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert common.round_numbers(-37, 41) == [-20, 0, 20, 40]


def test_save_panels(tmp_path):
    one, two = (torch.full((3, 10, w), 7, dtype=torch.uint8) for w in (20, 30))
    common.save_panels(tmp_path / "page.png", [("a", one), ("b", two)], [("c", two)])
    image = Image.open(tmp_path / "page.png")
    assert image.size == (20 + 30 + 8, 2 * (22 + 10) + 8)
    assert (
        image.getpixel((5, 25)) == image.getpixel((40, 25)) == image.getpixel((5, 64)) == (7,) * 3
    )


def test_energy_distance():
    torch.manual_seed(0)
    x, y = torch.randn(3000, 1), torch.randn(3000, 1)
    # N(0,1) against N(m,1): 2 E|N(m, 2)| - 2 E|N(0, 2)|, a folded normal
    m, s = 1.5, math.sqrt(2)
    folded = s * math.sqrt(2 / math.pi) * math.exp(-(m**2) / 4) + m * math.erf(m / 2)
    expected = 2 * folded - 2 * s * math.sqrt(2 / math.pi)
    assert common.energy_distance(x, y) == pytest.approx(0, abs=0.005)
    assert common.energy_distance(x, y + m) == pytest.approx(expected, abs=0.08)


def test_energy_distance_needs_no_exact_self_distances(monkeypatch):
    """In TF32 a GPU puts no point at 0 from itself."""
    torch.manual_seed(0)
    x, y, cdist = torch.randn(20, 2), torch.randn(30, 2), torch.cdist
    expected = common.energy_distance(x, y)
    monkeypatch.setattr(
        torch, "cdist", lambda a, b: cdist(a, b) + (torch.eye(len(a)) if a is b else 0)
    )
    assert common.energy_distance(x, y) == pytest.approx(expected)


@dataclass
class Odd(common.Config):
    share: common.Fraction = 0.5  # a share of 100 %
    mult: common.Sizes = (1, 2)  # sizes
    depth: common.Count | None = 3  # depth


def test_config_precedence_and_kinds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    presets = {"moons": {"steps": 7, "lr": 0.5}}
    assert common.parse(Odd, presets, []).steps == 10_000
    cfg = common.parse(
        Odd, presets, ["--dataset", "moons", "--lr", "0.1", "--mult", "1,3,4", "--no-depth"]
    )
    assert (cfg.steps, cfg.lr, cfg.mult, cfg.depth) == (7, 0.1, (1, 3, 4), None)
    assert cfg.out == "runs/test_common-moons"
    assert common.parse(Odd, presets, ["--no-ema"]).ema is None
    assert common.parse(Odd, presets, ["--flip", "--no-compile"]).flip
    with pytest.raises(UserError, match="share.*0, 1"):
        common.parse(Odd, presets, ["--share", "1.5"])


def test_two_runs_that_begin_together(tmp_path, monkeypatch):
    """Both have chosen the same new folder: the second is refused, and the first one's is whole."""
    monkeypatch.chdir(tmp_path)
    cfgs = [common.parse(flow_matching.Config, {}, ["--seed", str(seed)]) for seed in (0, 1)]
    assert cfgs[0].out == cfgs[1].out
    run = common.Run(cfgs[0], Line(), torch.device("cpu"))
    run.record(step=1)
    with pytest.raises(UserError, match="another run has just begun"):
        common.Run(cfgs[1], Line(), torch.device("cpu"))
    assert json.loads((run.folder / "config.json").read_text())["seed"] == 0
    assert json.loads((run.folder / "metrics.jsonl").read_text()) == {"step": 1}


def test_what_resuming_and_sampling_remember(tmp_path):
    """A resumed run still writes its samples; a sampled one, as many as it is told to."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    cfg = small_config(tmp_path / "run", dataset=f"{folder}/", num_samples=5)
    run = common.Run(cfg, Line(), torch.device("cpu"))
    run.save()
    parse = functools.partial(common.parse, flow_matching.Config, flow_matching.PRESETS)
    resume = ["--resume", "--out", cfg.out]
    assert parse(resume).num_samples == 5
    assert parse(["--sample", str(run.file)]).num_samples == 0
    assert parse([*resume, "--dataset", str(folder)]).dataset == str(folder)  # without the slash
    (tmp_path / "elsewhere").mkdir()
    moved = folder.rename(tmp_path / "elsewhere/pictures")
    assert parse([*resume, "--dataset", str(moved)]).dataset == str(moved)
    with pytest.raises(UserError, match="name that run by --out"):
        parse([*resume, "--dataset", "moons"])


def test_figures_are_not_doubled(tmp_path):
    """By an evaluation of an unfinished run, given twice."""
    run = common.Run(small_config(tmp_path / "run"), Line(), torch.device("cpu"))
    for x, _ in run.batches(line_data()):
        run.step(line_loss(run, x))
        if run.done == 5:
            run.save()
            break
    cfg = small_config(tmp_path / "samples", sample=str(run.file))
    for _ in range(2):
        common.Run(cfg, Line(), torch.device("cpu")).report("test", figure=1.0)
    assert len((tmp_path / "samples/metrics.jsonl").read_text().splitlines()) == 1
    for x, _ in run.batches(line_data()):
        run.step(line_loss(run, x))  # to its end
    common.Run(cfg, Line(), torch.device("cpu")).report("test", figure=2.0)  # of a later checkpoint
    lines = (tmp_path / "samples/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["figure"] for line in lines] == [2.0]


def test_processes_of_neighbouring_seeds_have_streams_of_their_own(tmp_path, monkeypatch):
    seeds = set()
    for rank in range(64):
        monkeypatch.setattr(common, "rank", lambda rank=rank: rank)
        seeds |= {common.process_seed(small_config(tmp_path, seed=s)) for s in range(100)}
    assert len(seeds) == 6400


def test_help_shows_every_field(capsys):
    with pytest.raises(SystemExit) as done:
        common.parse(flow_matching.Config, flow_matching.PRESETS, ["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(flow_matching.Config):
        assert "--" + field.name.replace("_", "-") in text
    assert "peak learning rate of Adam" in text


def test_help_shows_what_a_run_without_flags_takes(capsys):
    with pytest.raises(SystemExit):
        common.parse(d3pm.Config, d3pm.PRESETS, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert d3pm.Config.T != 256 == d3pm.PRESETS["grammar"]["T"]
    assert "diffusion steps (Sec. 5, Sec. 6) [256]" in text


def test_a_run_never_destroys_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def out(*argv):
        return common.parse(Odd, {}, list(argv)).out

    def occupy(folder):
        run = common.Run(Odd(out=folder), Line(), torch.device("cpu"))
        run.save()

    with pytest.raises(UserError, match="nothing to resume"):
        out("--resume")
    first = out()
    occupy(first)
    assert out() == first + "-2"
    Path(first + "-2").mkdir()
    assert out() == first + "-2"  # a folder without a checkpoint may be used again
    occupy(first + "-2")
    assert out() == first + "-3"
    assert out("--resume") == first + "-2"
    with pytest.raises(UserError, match="--resume"):
        out("--out", first)
    assert out("--out", first, "--resume") == first
    assert out("--sample", first + "/checkpoint.pt") == first + "/samples"
