"""Liu et al. 2022: interpolations, fields, losses, measures and reflow against closed forms."""

import copy
import dataclasses
import json
import math
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import common
import rectified_flow as rf
from rectified_flow import VP, ConstantSpeedVP, Linear, SubVP

# Small enough for a test, whole enough to pass through every part.
TINY = ["--steps", "3", "--batch-size", "4", "--width", "8", "--pairs", "10", "--nfe", "2"]
PATHS = [Linear(), VP(), SubVP(), ConstantSpeedVP()]
every_path = pytest.mark.parametrize("path", PATHS, ids=list(rf.INTERPOLATIONS))
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gaussian_nodes(n):
    """Nodes (n, 1) and weights (n,) that integrate polynomials against N(0, 1) exactly."""
    x, w = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(n))
    return x[:, None], w / w.sum()


def uniform_nodes(n):
    """The same on [0, 1], (n,) and (n,)."""
    x, w = map(torch.from_numpy, np.polynomial.legendre.leggauss(n))
    return (x + 1) / 2, w / 2


def grid(*nodes):
    """The product of quadrature rules: the nodes of each, and the weights of all together."""
    index = torch.cartesian_prod(*(torch.arange(len(w)) for _, w in nodes)).unbind(1)
    weights = torch.stack([w[i] for (_, w), i in zip(nodes, index, strict=True)]).prod(0)
    return [x[i] for (x, _), i in zip(nodes, index, strict=True)], weights


def mixture_field(path, means, c):
    """v^X for X_0 ~ N(0, I) and X_1 ~ the even mixture of N(m_k, c² I), independent; means (K, D).

    Given the mode, X_t ~ N(alpha m, S), S = beta² + alpha² c², and dX_t/dt is Gaussian with it.
    """

    def v(x, t):
        alpha, beta, d_alpha, d_beta = path.coefficients(t[:, None])
        variance = beta**2 + alpha**2 * c**2  # (B, 1)
        covariance = beta * d_beta + alpha * d_alpha * c**2
        gap = x[:, None] - alpha[..., None] * means  # (B, K, D)
        w = (-gap.square().sum(2) / (2 * variance)).softmax(dim=1)
        each = d_alpha[..., None] * means + (covariance / variance)[..., None] * gap
        return (w[..., None] * each).sum(1)

    return v


def mixture_cdf(x, path, time, means, c):
    alpha, beta, _, _ = path.coefficients(torch.tensor(time))
    return torch.special.ndtr((x - alpha * means.T) / torch.sqrt(beta**2 + alpha**2 * c**2)).mean(1)


# ---- Interpolations: Eq. 1, 6, 7, 8 --------------------------------------------------------------


@every_path
def test_target_is_the_time_derivative(path):
    x_0, x_1, t = torch.randn(9, 3), torch.randn(9, 3), torch.linspace(0.01, 0.98, 9)
    x_t, dx_t = path.interpolate(x_0, x_1, t)
    again, derivative = torch.func.jvp(
        lambda t: path.interpolate(x_0, x_1, t)[0], (t,), (torch.ones(9),)
    )
    assert_close(x_t, again)
    assert_close(dx_t, derivative, rtol=1e-10, atol=1e-10)


def test_end_points():
    x_0, x_1, zero, one = torch.randn(4, 2), torch.randn(4, 2), torch.zeros(4), torch.ones(4)
    assert_close(Linear().interpolate(x_0, x_1, zero), (x_0, x_1 - x_0))
    assert_close(Linear().interpolate(x_0, x_1, one), (x_1, x_1 - x_0))
    t = torch.linspace(0, 0.999, 7)
    for path, beta_of in ((VP(), lambda a: (1 - a**2).sqrt()), (SubVP(), lambda a: 1 - a**2)):
        alpha, beta, _, _ = path.coefficients(t)
        assert_close(alpha[0].item(), math.exp(-19.9 / 4 - 0.1 / 2))  # 0.0066
        assert_close(beta, beta_of(alpha), rtol=1e-9, atol=0)
        assert_close([c.item() for c in path.coefficients(torch.tensor(1.0))[:2]], [1.0, 0.0])
    alpha, beta, d_alpha, _ = ConstantSpeedVP().coefficients(t)
    assert_close((alpha, d_alpha), (t, torch.ones(7)))
    assert_close(alpha**2 + beta**2, torch.ones(7))
    _, left, _, _ = ConstantSpeedVP().coefficients(torch.tensor(ConstantSpeedVP.t_max))
    assert left < 0.005  # what stays of the source in samples


# ---- Gaussian to Gaussian ------------------------------------------------------------------------

M_0, M_1, S_0, S_1 = 0.7, -1.1, 0.8, 1.9  # means and deviations


def gaussian_moments(path, t):
    """Mean, variance and their time derivatives of X_t for independent N(M, S²)."""
    alpha, beta, d_alpha, d_beta = path.coefficients(t)
    mean, d_mean = alpha * M_1 + beta * M_0, d_alpha * M_1 + d_beta * M_0
    variance = alpha**2 * S_1**2 + beta**2 * S_0**2
    return mean, variance, d_mean, 2 * (alpha * d_alpha * S_1**2 + beta * d_beta * S_0**2)


def gaussian_field(path):
    def v(x, t):
        mean, variance, d_mean, d_variance = gaussian_moments(path, t[:, None])
        return d_mean + d_variance / (2 * variance) * (x - mean)

    return v


@every_path
def test_gaussian_field_is_the_conditional_expectation(path):
    """E[(dX_t - v) phi(X_t)] = 0 for every phi, so v = E[dX_t | X_t]: here by quadrature."""
    z = gaussian_nodes(30)
    v = gaussian_field(path)
    for time in (0.05, 0.4, 0.9):
        (z_0, z_1), w = grid(z, z)
        t = torch.full((len(w),), time)
        x_t, dx_t = path.interpolate(M_0 + S_0 * z_0, M_1 + S_1 * z_1, t)
        rest = (dx_t - v(x_t, t)).squeeze(1)
        for phi in (torch.ones_like, lambda x: x, lambda x: x**3, torch.sin):
            assert abs((w * rest * phi(x_t.squeeze(1))).sum().item()) < 1e-9
        error = rf.squared_error(v, M_0 + S_0 * z_0, M_1 + S_1 * z_1, t, path)
        _, _, d_alpha, d_beta = path.coefficients(t[0])
        _, variance, _, d_variance = gaussian_moments(path, t[0])
        of_the_rate = d_alpha**2 * S_1**2 + d_beta**2 * S_0**2
        assert_close((w * error).sum(), of_the_rate - d_variance**2 / (4 * variance))


@every_path
def test_gaussian_flow_keeps_the_marginals_and_runs_back(path):
    """Theorem 3.3: the flow is affine, and carries N(m_0, s_0²) to the law of X_t at every t."""
    z_0 = torch.linspace(-2, 2, 9)[:, None]
    times = torch.linspace(0, path.t_max, 5)
    z, _ = rf.simulate(gaussian_field(path), z_0, times, **TIGHT)
    start, variance, _, _ = gaussian_moments(path, torch.tensor(0.0))
    for z_t, time in zip(z, times, strict=True):
        m, s, _, _ = gaussian_moments(path, time)
        assert_close(z_t, m + (s / variance).sqrt() * (z_0 - start), rtol=1e-7, atol=1e-7)
    if isinstance(path, Linear) and type(path) is Linear:  # the monotone, so optimal, map
        assert_close(z[-1], M_1 + S_1 / S_0 * (z_0 - M_0), rtol=1e-8, atol=1e-8)
    back, _ = rf.simulate(gaussian_field(path), z[-1], (path.t_max, 0.0), **TIGHT)
    assert_close(back, z_0, rtol=1e-6, atol=1e-6)


def test_standard_normal_to_itself():
    """S = 2 - pi/2, V = pi/2, and Z_1 = Z_0: all of E|X_1 - X_0|² = 2 is descent, Eq. 13."""

    def v(x, t):
        t = t[:, None]
        return (2 * t - 1) / (t**2 + (1 - t) ** 2) * x

    z_0, times = torch.ones(1, 1), torch.linspace(0, 1, 2001)  # E Z_0² = 1, and S goes as Z_0²
    z, _ = rf.simulate(v, z_0, times, **TIGHT)
    s = rf.straightness(z, times).item()
    assert_close(z[-1], z_0, rtol=0, atol=1e-9)
    assert_close(s, 2 - math.pi / 2, rtol=0, atol=2e-6)  # the chords' error is O(h²)
    (x_0, x_1, t), w = grid(gaussian_nodes(4), gaussian_nodes(4), uniform_nodes(40))
    big_v = (w * rf.squared_error(v, x_0, x_1, t)).sum().item()
    assert_close(big_v, math.pi / 2, rtol=0, atol=1e-9)
    cost = (w * rf.transport_cost(x_0, x_1, 2)).sum().item()
    assert_close(cost - 0, s + big_v, rtol=0, atol=3e-6)
    # Without the squares Eq. 13 does not hold: Departure 1.
    assert abs(2 / math.sqrt(math.pi) - (s + big_v)) > 0.8  # E|X_1 - X_0| of N(0, 2)


# ---- Mixtures ------------------------------------------------------------------------------------

TWO = torch.tensor([[-1.3], [0.9]], dtype=torch.float64)
EIGHT = 2 * torch.tensor([[math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)] for k in range(8)])


@every_path
def test_in_one_dimension_the_coupling_is_monotone(path):
    """Theorem 3.10's mark: a particle keeps its quantile, whatever the interpolation."""
    z_0 = torch.linspace(-3, 3, 61)[:, None]
    z_1, _ = rf.simulate(mixture_field(path, TWO, 0.3), z_0, (0.0, path.t_max), **TIGHT)
    assert (z_1.diff(dim=0) > 0).all()
    levels = mixture_cdf(z_0, path, 0.0, TWO, 0.3)
    assert_close(mixture_cdf(z_1, path, path.t_max, TWO, 0.3), levels, rtol=0, atol=1e-7)


def test_descent_identity_of_a_mixture():
    """Eq. 13 to five digits: V by quadrature over (X_0, X_1, t), S and the cost along the flow."""
    c, v = 0.5, mixture_field(Linear(), TWO, 0.5)
    z = gaussian_nodes(40)
    modes = (TWO, torch.tensor([0.5, 0.5]))
    (x_0, m, noise, t), w = grid(z, modes, gaussian_nodes(30), uniform_nodes(24))
    x_1 = m + c * noise
    big_v = (w * rf.squared_error(v, x_0, x_1, t)).sum().item()
    cost = (w * rf.transport_cost(x_0, x_1, 2)).sum().item()
    assert_close(cost, 1 + TWO.square().mean().item() + c**2)
    z_0 = torch.linspace(-9, 9, 601)[:, None]  # the trapezoidal rule, exact for a smooth Gaussian
    mass = (-z_0.squeeze(1).square() / 2).exp()
    mass = mass / mass.sum()
    times = torch.linspace(0, 1, 1001)
    paths, _ = rf.simulate(v, z_0, times, rtol=1e-8, atol=1e-8)
    s = (mass * rf.straightness(paths, times)).sum().item()
    after = (mass * rf.transport_cost(z_0, paths[-1], 2)).sum().item()
    assert s > 0.1
    assert_close(s + big_v, cost - after, rtol=0, atol=1e-6)
    assert abs(big_v - rf.squared_error(lambda x, t: v(x, t) + 0.1, x_0, x_1, t) @ w + 0.01) < 1e-9


def test_eight_gaussians():
    """The zero-flag toy: S = 1.435, V = 3.731 and costs 6.045 -> .880, in their standard errors."""
    c, v, n = 0.15, mixture_field(Linear(), EIGHT, 0.15), 2000
    z_0, x_0 = torch.randn(n, 2), torch.randn(n, 2)
    x_1 = EIGHT[torch.arange(n) % 8] + c * torch.randn(n, 2)
    times = torch.linspace(0, 1, 101)
    paths, _ = rf.simulate(v, z_0, times, rtol=1e-4, atol=1e-4)
    s, z_1 = rf.straightness(paths, times), paths[-1]
    big_v = rf.squared_error(v, x_0, x_1, (torch.arange(n) + 0.5) / n)
    figures = [(s, 1.435), (big_v, 3.731), (rf.transport_cost(z_0, z_1, 2), 0.880)]
    for values, expected in figures:
        assert_close(values.mean().item(), expected, rtol=0, atol=4 * common.standard_error(values))
    for power in (1, 2, 4):  # Theorem 3.5
        before, after = rf.transport_cost(x_0, x_1, power), rf.transport_cost(z_0, z_1, power)
        assert after.mean() < 0.5 * before.mean()
    assert common.energy_distance(z_1, x_1) < 0.02  # Theorem 3.3: Z_1 ~ pi_1


def test_one_euler_step_reaches_the_mean_and_many_the_data():
    data = torch.randn(6, 2)

    def log_rho(x_0, x_1):
        return -x_0.square().sum(2) / 2

    def v(z, t):
        return rf.closed_form_velocity(z, t, data, log_rho)

    z_0 = torch.randn(50, 2)
    z_1, _ = rf.simulate(v, z_0, method="euler", steps=1)
    assert_close(z_1, data.mean(0).expand(50, 2), rtol=0, atol=1e-13)
    z_1, nfe = rf.simulate(v, z_0, method="euler", steps=100)
    assert nfe == 100
    assert torch.cdist(z_1, data).amin(1).max() < 1e-6
    assert len(torch.cdist(z_1, data).argmin(1).unique()) > 3
    t = torch.linspace(0, 0.9, 50)  # Diracs are Gaussians of no width
    assert_close(v(z_0, t), mixture_field(Linear(), data, 0.0)(z_0, t), rtol=1e-9, atol=1e-9)


def test_closed_form_of_a_dependent_coupling():
    """X_0 given X_1 ~ N(X_1 / 2, 1): then X_t given X_1 ~ N((1 + t) X_1 / 2, (1 - t)²)."""
    data, z, t = torch.randn(5, 2), torch.randn(7, 2), torch.linspace(0, 0.95, 7)
    v = rf.closed_form_velocity(z, t, data, lambda x_0, x_1: -(x_0 - x_1 / 2).square().sum(2) / 2)
    s = t[:, None, None]
    normal = torch.distributions.Normal((1 + s) / 2 * data, 1 - s)
    w = normal.log_prob(z[:, None]).sum(2).softmax(1)[..., None]
    assert_close(v, (w * (data - z[:, None])).sum(1) / (1 - t[:, None]), rtol=1e-9, atol=1e-9)


def test_nearest_neighbours():
    n = 20_000
    x_0, x_1 = torch.randn(n, 1), TWO[torch.randint(2, (n,))] + 0.5 * torch.randn(n, 1)
    z, t = torch.linspace(-1, 1, 5)[:, None], torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8])
    estimate = rf.nearest_neighbour_velocity(z, t, x_0, x_1, h=0.05, m=2000)
    # about 1000 neighbours of deviation 1.2 / (1 - t) or less: 0.05; five times that at t = 0.8
    exact = mixture_field(Linear(), TWO, 0.5)(z, t)
    assert ((1 - t[:, None]) * (estimate - exact)).abs().max() < 0.15
    flat = rf.nearest_neighbour_velocity(z, t, x_0, x_1, h=1e9, m=n)  # no kernel: all draws alike
    assert_close(flat, (x_1.mean() - z) / (1 - t[:, None]))
    few = rf.nearest_neighbour_velocity(z, t, x_0[:9], x_1[:9], h=0.7, m=4)
    for i in range(5):
        x_t = t[i] * x_1[:9] + (1 - t[i]) * x_0[:9]
        near = (x_t - z[i]).abs().squeeze(1).argsort()[:4]
        w = torch.exp(-((x_t[near] - z[i]) ** 2) / (2 * 0.7**2))
        assert_close(few[i], (w * (x_1[near] - z[i])).sum(0) / (w.sum() * (1 - t[i])))
    one = rf.nearest_neighbour_velocity(z[:1], t[:1], x_0, x_1, m=1)
    assert_close(one, x_1[(x_0 - z[0]).abs().argmin()] - z[:1])


# ---- Straight couplings --------------------------------------------------------------------------


def test_translation_is_straight_and_stays():
    shift = torch.tensor([1.5, -0.5])
    z_0 = torch.randn(40, 2)

    def v(x, t):
        return shift.expand_as(x)

    z_1, _ = rf.simulate(v, z_0, method="euler", steps=1)
    assert_close(z_1, z_0 + shift)
    paths, _ = rf.simulate(v, z_0, torch.linspace(0, 1, 11), method="euler", steps=1)
    assert rf.straightness(paths, torch.linspace(0, 1, 11)).max() < 1e-24
    assert rf.squared_error(v, z_0, z_1, torch.rand(40)).max() < 1e-24  # V = 0: no two lines cross

    def rectified(x, t):  # the rectified flow of these very pairs, estimated
        return rf.nearest_neighbour_velocity(x, t, z_0, z_1, h=0.01, m=1)

    again, _ = rf.simulate(rectified, z_0, method="euler", steps=20)
    assert_close(again, z_1, rtol=0, atol=1e-12)


def test_reflow_of_an_optimal_coupling_leaves_it():
    """Theorem 3.8: from N(M_0, S_0²) the optimal map is affine, and so is every Z_t."""
    z_0 = M_0 + S_0 * torch.randn(40, 1)
    z_1 = M_1 + S_1 / S_0 * (z_0 - M_0)

    def v(x, t):  # the line through x at time t started from z
        t = t[:, None]
        z = M_0 + (x - t * M_1 - (1 - t) * M_0) / (1 - t + t * S_1 / S_0)
        return M_1 - M_0 + (S_1 / S_0 - 1) * (z - M_0)

    assert rf.squared_error(v, z_0, z_1, torch.rand(40)).max() < 1e-24
    assert_close(rf.simulate(v, z_0, method="euler", steps=1)[0], z_1)
    times = torch.linspace(0, 1, 11)
    paths, _ = rf.simulate(v, z_0, times, method="euler", steps=1)
    assert rf.straightness(paths, times).max() < 1e-24
    first = rf.simulate(gaussian_field(Linear()), z_0, **TIGHT)[0]  # one round led to these pairs
    assert_close(first, z_1, rtol=1e-8, atol=1e-8)


def test_straightness_of_euler_paths():
    """S = the mean of |v|² - |Z_1 - Z_0|² over the steps, also over steps of unequal length."""
    times = torch.tensor([0.0, 0.1, 0.5, 0.7, 1.0])
    z = torch.randn(5, 6, 2, 3, 3)
    v = z.diff(dim=0) / times.diff()[:, None, None, None, None]
    action = (times.diff()[:, None] * v.square().flatten(2).sum(2)).sum(0)
    assert_close(rf.straightness(z, times), action - (z[-1] - z[0]).square().flatten(1).sum(1))


def test_transport_costs():
    x = torch.zeros(3, 1, 2, 2)
    for power, expected in ((1, 2.0), (2, 4.0), (4, 16.0)):
        assert_close(rf.transport_cost(x, x + 1, power), torch.full((3,), expected))


# ---- Losses --------------------------------------------------------------------------------------


def net(x, t):
    return torch.sin(x) + common.bcast(t, x) * x.flip(-1)


def test_loss_is_eq_1():
    x_0, x_1, t = torch.randn(9, 2, 3), torch.randn(9, 2, 3), torch.rand(9)
    s = t[:, None, None]
    expected = (net(s * x_1 + (1 - s) * x_0, t) - (x_1 - x_0)).square()
    assert_close(rf.squared_error(net, x_0, x_1, t), expected.sum((1, 2)))
    assert_close(rf.rectified_flow_loss(net, x_0, x_1, t), expected.mean())


def test_loss_is_symmetric_in_time():
    """Sec. 2.1: exchange X_0 and X_1, turn time and v round."""
    x_0, x_1, t = torch.randn(9, 2), torch.randn(9, 2), torch.rand(9)
    turned = rf.squared_error(lambda x, t: -net(x, 1 - t), x_1, x_0, 1 - t)
    assert_close(turned, rf.squared_error(net, x_0, x_1, t))


def test_feature_loss():
    x_0, x_1, t = torch.randn(9, 2), torch.randn(9, 2), torch.rand(9)
    plain = rf.squared_error(net, x_0, x_1, t)
    assert_close(rf.feature_loss(net, lambda x: x, x_0, x_1, t), plain.mean())
    x_t, dx_t = Linear().interpolate(x_0, x_1, t)
    error = dx_t - net(x_t, t)
    matrix = torch.randn(2, 5)
    features = rf.feature_loss(net, lambda x: torch.tanh(x @ matrix), x_0, x_1, t)
    slope = 1 - torch.tanh(x_t @ matrix) ** 2
    assert_close(features, (slope * (error @ matrix)).square().sum(1).mean())
    theta = torch.tensor(0.3, requires_grad=True)
    rf.feature_loss(lambda x, t: theta * x, torch.tanh, x_0, x_1, t).backward()
    assert theta.grad.abs() > 0


def test_distillation():
    z_0, z_1, zero = torch.randn(9, 2), torch.randn(9, 2), torch.zeros(9)
    loss = rf.distillation_loss(net, z_0, z_1)
    assert_close(loss, rf.rectified_flow_loss(net, z_0, z_1, zero))  # Eq. 1 at t = 0
    seen = []
    rf.distillation_loss(net, z_0, z_1, metric=lambda x, y: seen.append((x, y)))
    assert_close(seen[0], (z_0 + net(z_0, zero), z_1))
    seen.clear()

    def straight(x, t):
        seen.append((x, t))
        return z_1[:1] - z_0[:1]

    loss = rf.distillation_loss(straight, z_0[:1].expand(500, 2), z_1[:1].expand(500, 2), k=4)
    assert loss < 1e-24
    x, t = seen[0]
    assert_close(t.unique(), torch.tensor([0.0, 0.25, 0.5, 0.75]))
    assert_close(x, z_0[:1] + t[:, None] * (z_1[:1] - z_0[:1]))  # on the line, as Euler's steps are


# ---- Couplings -----------------------------------------------------------------------------------


def test_sources():
    before = torch.get_rng_state()
    points = torch.arange(20.0)[:, None].expand(20, 2)

    def stream():
        return torch.Generator().manual_seed(5)

    for source in (rf.Noise((2,), "cpu"), rf.Examples(points, smoothing=0.1)):
        assert torch.equal(source.draw(6, stream()), source.draw(6, stream()))
        assert not torch.equal(source.draw(6, stream()), source.draw(6))
    once = rf.Examples(points, distinct=True)
    assert sorted(once.draw(20)[:, 0].tolist()) == list(range(20))
    assert len(once.draw(19).unique()) == 19
    assert once.draw(21).shape == (21, 2)  # there are not as many
    noise = rf.Examples(points, smoothing=0.1).draw(5000, stream())
    noise = noise - noise.mean(1, keepdim=True).round()
    assert_close(noise.std().item(), 0.1, rtol=0.05, atol=0)
    images = torch.arange(4, dtype=torch.uint8).expand(7, 1, 2, 4).contiguous()
    flipped = rf.Examples(images, flip=True).draw(400, stream())
    assert flipped.shape == (400, 1, 2, 4)
    assert 0.35 < (flipped[:, 0, 0, 0] == common.to_float(images[0, 0, 0, 3])).float().mean() < 0.65
    torch.set_rng_state(before)
    x_0, x_1 = rf.Independent(rf.Noise((2,), "cpu"), rf.Examples(points)).batch(4000)
    assert abs(torch.corrcoef(torch.stack([x_0[:, 0], x_1[:, 0]]))[0, 1]) < 0.08


def test_pairs_stay_together(tmp_path):
    torch.set_default_dtype(torch.float32)
    cfg = rf.Config(out=str(tmp_path), batch_size=3, nfe=4, device="cpu", dataset="glyphs")
    run = types.SimpleNamespace(
        cfg=cfg,
        stage="",
        device=torch.device("cpu"),
        ema=lambda x, t: 0 * x + t.flip(0)[0] + 1,
        amp=False,
    )
    pairs = rf.simulate_pairs(run, rf.Noise((2,), "cpu"), 29, torch.Generator().manual_seed(1))
    assert pairs.z_0.shape == pairs.z_1.shape == (29, 2)
    assert len(pairs.z_0.unique(dim=0)) == 29
    z_0, z_1 = pairs.batch(50)
    assert_close(z_1 - z_0, torch.full((50, 2), 1 + (0 + 0.25 + 0.5 + 0.75) / 4))
    again = rf.simulate_pairs(run, rf.Noise((2,), "cpu"), 29, torch.Generator().manual_seed(1))
    assert torch.equal(again.z_1, pairs.z_1)
    images = rf.simulate_pairs(run, rf.Noise((1, 4, 4), "cpu"), 5, None)
    assert images.z_0.dtype == torch.float16
    assert images.batch(2)[0].dtype == torch.float32


def test_random_streams_differ():
    draws = []
    for seed in (0, 1):
        for purpose in ("pairs for reflow-2", "pairs for reflow-3"):
            rng = rf.random_stream(rf.Config(seed=seed), "cpu", purpose)
            draws.append(torch.rand(1, generator=rng).item())
    assert len(set(draws)) == 4


# ---- Devices and learning ------------------------------------------------------------------------


@every_path
def test_losses_and_samplers_keep_to_their_device(path):
    torch.set_default_dtype(torch.float32)
    model = common.MLP(2, width=8).to("meta")
    x_0, x_1, t = (torch.empty(shape, device="meta") for shape in ((4, 2), (4, 2), (4,)))
    assert rf.rectified_flow_loss(model, x_0, x_1, t, path).is_meta
    assert rf.feature_loss(model, torch.tanh, x_0, x_1, t).is_meta
    assert rf.distillation_loss(model, x_0, x_1).is_meta
    assert rf.distillation_loss(model, x_0, x_1, k=3).is_meta
    times = torch.linspace(0, path.t_max, 4, device="cpu")
    paths, _ = rf.simulate(model, x_0, times, method="euler", steps=1)
    assert rf.straightness(paths, times).is_meta
    assert rf.transport_cost(x_0, x_1, 4).is_meta
    assert rf.nearest_neighbour_velocity(x_0, t, x_0, x_1, m=2).is_meta
    assert rf.closed_form_velocity(x_0, t, x_1, lambda x_0, x_1: x_0.sum(2)).is_meta
    images = torch.empty(5, 1, 4, 4, dtype=torch.uint8, device="meta")
    assert rf.Examples(images, flip=True, smoothing=0.1).draw(3).is_meta
    assert rf.Noise((2,), "meta").draw(3).is_meta


def rectified(cfg, data):
    """The runs of cfg and their measures on the same held-out draws."""
    n, rng = 500, torch.Generator().manual_seed(3)
    x_0, x_1 = torch.randn(n, 2, generator=rng), data.test[:n]
    pi_0, pi_1 = rf.Noise((2,), "cpu"), rf.Examples(data.train)
    rounds = [rf.Round("coupling", torch.stack([x_0, x_1]), {}, rf.costs(x_0, x_1))]
    for run in rf.rectify(cfg, common.network(cfg, data), pi_0, pi_1, torch.device("cpu")):
        rounds.append(rf.measure(run, x_0, x_1, rounds[-1].paths[-1]))
    return [r.figures for r in rounds]


def test_a_short_reflow_straightens(tmp_path):
    torch.set_default_dtype(torch.float32)
    small = {"steps": 300, "pairs": 2000, "nfe": 16, "width": 64, "blocks": 1}
    small |= {"batch_size": 256}
    cfg = rf.Config(out=str(tmp_path), device="cpu", **small)
    torch.manual_seed(0)
    data = common.load_data(cfg)
    coupling, first, second, distilled = rectified(cfg, data)
    assert first["S"] > 5 * second["S"]
    for before, after in ((coupling, first), (first, second)):
        for power in rf.POWERS:  # standard error of the difference: below 1 %
            assert after[f"E|.|^{power}"] < 1.02 * before[f"E|.|^{power}"]
    assert first["N=1"] > 0.7  # one step of the first flow falls near the mean
    assert second["N=1"] < 0.05
    assert distilled["N=1"] < 0.05
    assert abs(first["S+V"] / first["descent"] - 1) < 0.1


# ---- Resuming ------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def saved(folder):
    files = sorted(Path(folder).glob("checkpoint*.pt"))
    return {file.name: torch.load(file, weights_only=True) for file in files}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, dict):
            assert_same(value, b[key])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, b[key]), key


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The settings of a small run that is not interrupted, and what it saved."""
    small = {"steps": 8, "later": 0.8, "batch_size": 4, "width": 8, "pairs": 9, "nfe": 2}
    out = tmp_path_factory.mktemp("rectified_flow") / "whole"
    cfg = rf.Config(out=str(out), device="cpu", checkpoint_every=3, **small)
    torch.set_default_dtype(torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rf, "HELD_OUT", {"vectors": 20})
        rf.main(cfg)
    return cfg, saved(out)


@pytest.mark.parametrize("moment", ["in the first", "between", "in the second", "distilling"])
def test_a_killed_reflow_ends_where_the_whole_one_does(tmp_path, monkeypatch, whole_run, moment):
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(rf, "HELD_OUT", {"vectors": 20})
    of_whole, whole = whole_run
    assert list(whole) == ["checkpoint-distilled.pt", "checkpoint-reflow-2.pt", "checkpoint.pt"]
    assert [state["step"] for state in whole.values()] == [7, 7, 8]
    cfg = dataclasses.replace(of_whole, out=str(tmp_path / "killed"))
    stage = {"in the first": "", "in the second": "reflow-2", "distilling": "distilled"}
    step, pairs = common.Run.step, rf.simulate_pairs

    def dying_step(run, loss):
        if run.stage == stage.get(moment) and run.done == 5:  # two steps after its checkpoint
            raise Killed
        step(run, loss)

    def dying_pairs(*arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "step", dying_step)
        patch.setattr(rf, "simulate_pairs", dying_pairs if moment == "between" else pairs)
        with pytest.raises(Killed):
            rf.main(cfg)
    rf.main(dataclasses.replace(cfg, resume=True))
    for name, state in saved(cfg.out).items():
        for part in ("model", "ema", "optimizer"):
            assert_same(state[part], whole[name][part])
    figures = []
    for folder in (of_whole.out, cfg.out):
        lines = Path(folder, "metrics.jsonl").read_text().splitlines()
        records = [record for record in map(json.loads, lines) if record.get("split") == "test"]
        figures.append(sorted(records, key=json.dumps))
    assert len(figures[0]) == 3
    assert figures[0] == figures[1]


# ---- The command line ----------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(rf, "HELD_OUT", {"vectors": 200, "images": 16})


@pytest.fixture
def run(call, few):
    return lambda *arguments: call("rectified_flow", *arguments)


def table(text):
    """The printed table: {name: {column: figure}}."""
    lines = [line.split() for line in text.splitlines()]
    start = next(i for i, line in enumerate(lines) if line[:2] == ["S", "V"])
    rows = [line for line in lines[start + 1 :] if len(line) == len(lines[start]) + 1]
    return {row[0]: dict(zip(lines[start], row[1:], strict=True)) for row in rows}


def test_train_resume_sample(run, refused):
    code, out, err = run(*TINY, "--num-samples", "6", "--rounds", "3")
    assert code == 0, err
    folder = Path("runs/rectified_flow-eight_gaussians")
    assert f"see {folder}/samples.png" in out
    rows = table(out)
    assert list(rows) == ["coupling", "1-rectified", "2-rectified", "3-rectified", "distilled"]
    assert rows["coupling"]["S"] == rows["distilled"]["V"] == "-"
    assert float(rows["3-rectified"]["full"]) > -1
    assert rows["distilled"]["N=1"] != "-"
    rounds = list(rows.values())[:4]
    for before, after in zip(rounds, rounds[1:], strict=False):  # each against the one it rectifies
        fall = float(before["E|.|^2"]) - float(after["E|.|^2"])
        assert float(after["descent"]) == pytest.approx(fall, abs=2e-4)  # of four printed digits
    names = ["", "-reflow-2", "-reflow-3", "-distilled"]
    assert all((folder / f"checkpoint{name}.pt").exists() for name in names)
    assert json.loads((folder / "config.json").read_text())["steps"] == 3  # not the later rounds'
    assert np.load(folder / "samples.npz")["arr_0"].shape == (6, 2)

    assert run("--resume", "--steps", "5")[0] == 0
    steps = [state["step"] for state in saved(folder).values()]
    assert steps == [3, 3, 3, 5]  # later rounds: half, rounded up
    before = (folder / "checkpoint-distilled.pt").read_bytes()
    here = ["--resume", "--out", folder]
    for flags in (["--rounds", "4"], ["--distill", "2"]):
        refused("is of --rounds 3 --distill 1: keep both", "rectified_flow", *here, *flags)
    refused("learned with --source noise", "rectified_flow", *here, "--source", "moons")
    one_more = ["--rounds", "4", "--distill", "0"]
    (folder / "checkpoint-distilled.pt").rename("kept.pt")
    assert run(*here, *one_more)[0] == 0
    (folder / "checkpoint-reflow-4.pt").unlink()  # as if killed in round four
    assert run(*here)[0] == 0
    assert (folder / "checkpoint-reflow-4.pt").exists()  # the flags are remembered
    (folder / "checkpoint-reflow-4.pt").unlink()
    assert run(*here, "--rounds", "3", "--distill", "1")[0] == 0
    Path("kept.pt").rename(folder / "checkpoint-distilled.pt")
    code, out, _ = run("--sample", folder / "checkpoint.pt")
    assert code == 0
    assert list(table(out))[-1] == "distilled"
    code, out, _ = run("--sample", folder / "checkpoint-reflow-2.pt", "--num-samples", "4")
    assert list(table(out)) == ["coupling", "1-rectified", "2-rectified"]
    assert (folder / "samples-2" / "samples.npz").exists()
    assert (folder / "checkpoint-distilled.pt").read_bytes() == before
    (folder / "checkpoint-reflow-3.pt").unlink()  # as if killed in round three
    (folder / "checkpoint-distilled.pt").unlink()
    code, out, _ = run("--sample", folder / "checkpoint.pt")
    assert list(table(out))[-1] == "2-rectified"


@pytest.mark.parametrize("path", rf.INTERPOLATIONS)
def test_interpolations(run, path):
    code, out, err = run(*TINY, "--interpolation", path, "--distill", "2", "--solver", "dopri5")
    assert code == 0, err
    rows = table(out)
    assert (rows["2-rectified"]["V"] == "-") == (path != "linear")
    assert rows["distilled"]["N=2"] != "-"


def test_data_to_data(run):
    code, _, err = run(*TINY, "--source", "moons", "--smoothing", "0.1", "--num-samples", "3")
    assert code == 0, err
    code, out, err = run(*TINY, "--classes", "0,4", "--distill", "0", "--rounds", "1")
    assert code == 0, err
    # modes 0 and 4 of the ring lie 4 apart
    assert 3.8 < float(table(out)["coupling"]["E|.|^1"]) < 4.2


def test_image_to_image(run, pictures):
    first, second = pictures("first"), pictures("second")
    images = [*TINY, "--mult", "1,1", "--blocks", "1", "--image-size", "8", "--flip"]
    code, _, err = run(*images, "--dataset", second, "--source", first, "--num-samples", "3")
    assert code == 0, err
    folder = Path("runs/rectified_flow-second")
    samples = np.load(folder / "samples.npz")["arr_0"]
    assert samples.shape == (3, 8, 8, 3)
    assert samples.dtype == np.uint8
    code, _, err = run(*images, "--dataset", second, "--amp", "on", "--no-ema", "--rounds", "1")
    assert code == 0, err


BAD = [
    ("--rounds 0", "--rounds: must be a whole number of at least 1"),
    ("--pairs 0", "--pairs: must be a whole number of at least 1"),
    ("--distill -1", "--distill: must be a whole number of at least 0"),
    ("--nfe 0", "--nfe: must be"),
    ("--solver heun", "--solver: invalid choice: 'heun'"),
    ("--interpolation ve", "invalid choice: 've'"),
    ("--classes 3", "two labels such as 3,8"),
    ("--classes 3,-1", "two labels such as 3,8"),
    ("--classes 3,x", "two labels such as 3,8"),
    ("--classes 3,8", "--classes 3,8: no train examples"),
    ("--source nonsense", "unknown data set 'nonsense'"),
    ("--smoothing 0", "a number above 0"),
    ("--smoothing 0.1", "--smoothing is for a source of data"),
    ("--later 0", "a number above 0"),
    ("--flip", "not made of images"),
    ("--resume", "nothing to resume"),
    ("--sample nowhere/checkpoint-reflow-2.pt", "no checkpoint at nowhere/checkpoint-reflow-2.pt"),
    ("--lr 1e30 --clip 1e30 --steps 60", "(loss is|not finite)"),
]


@pytest.mark.parametrize(("arguments", "pattern"), BAD)
def test_bad_input(refused, few, arguments, pattern):
    refused(pattern, "rectified_flow", *TINY, *arguments.split())


def test_shapes_must_agree(refused, pictures):
    said = r"shape \(3, 32, 32\), eight_gaussians \(2,\): take data sets alike"
    refused(said, "rectified_flow", *TINY, "--source", pictures())


# ---- What a stage is made of ---------------------------------------------------------------------


def small_flow(tmp_path, **more):
    small = {"steps": 3, "later": 1.0, "batch_size": 512, "width": 8, "pairs": 600, "nfe": 2}
    return rf.Config(out=str(tmp_path), device="cpu", **small | more)


def stages_of(cfg):
    data = common.load_data(cfg)
    ends = rf.Noise((2,), "cpu"), rf.Examples(data.train)
    return rf.rectify(cfg, common.network(cfg, data), *ends, torch.device("cpu"))


def test_a_stage_starts_from_the_average_before(tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)
    starts, init = [], common.Run.__init__

    def started(run, cfg, net, *rest):
        starts.append(copy.deepcopy(net.state_dict()))
        init(run, cfg, net, *rest)

    monkeypatch.setattr(common.Run, "__init__", started)
    averages = []
    for run in stages_of(small_flow(tmp_path, distill=2, ema=0.9, lr=0.1)):
        averages.append(copy.deepcopy(run.ema.state_dict()))
        assert not torch.equal(next(run.net.parameters()), next(run.ema.parameters()))
    assert len(starts) == 3
    for start, before in zip(starts[1:], averages, strict=False):
        assert all(torch.equal(start[name], value) for name, value in before.items())


def test_times_end_where_the_interpolation_does(tmp_path, monkeypatch):
    """And only the distillation has its own loss, of k steps (and times)."""
    torch.set_default_dtype(torch.float32)
    times, steps = [], []

    def watch(name, kept):
        inner = getattr(rf, name)
        monkeypatch.setattr(rf, name, lambda *a: kept.append(a[3]) or inner(*a))

    watch("rectified_flow_loss", times)
    watch("distillation_loss", steps)
    monkeypatch.setattr(rf.VP, "t_max", 0.5)
    list(stages_of(small_flow(tmp_path, interpolation="vp", distill=2)))
    first, second, distilled = torch.cat(times).chunk(3)  # three steps of 512 each
    for t in (first, second):
        assert 0.49 < t.max() <= 0.5
    assert set(distilled.tolist()) == {0.0, 0.5}
    assert steps == [2] * 3


def test_classes_and_smoothing_are_of_their_ends():
    torch.set_default_dtype(torch.float32)
    cfg = rf.Config(classes=(0, 4), smoothing=0.1, device="cpu")
    _, *couples = rf.load(cfg, torch.device("cpu"))
    for pi_0, pi_1 in couples:  # modes 0 and 4 lie at (2, 0) and (-2, 0)
        assert pi_0.x[:, 0].min() > 0 > pi_1.x[:, 0].max()
        assert (pi_0.smoothing, pi_1.smoothing) == (0.1, None)


def test_V_of_a_later_round_is_of_its_own_coupling(tmp_path):
    """v = 0 from a coupling that stays where it is: V is E|z_1 - x_0|², not E|x_1 - x_0|²."""
    torch.set_default_dtype(torch.float32)
    cfg = small_flow(tmp_path)
    run = types.SimpleNamespace(
        cfg=cfg, stage="reflow-2", amp=False, device=torch.device("cpu"), ema=lambda x, t: 0 * x
    )
    x_0, x_1 = torch.randn(2, 40, 2)
    figures = rf.measure(run, x_0, x_1, x_0 + 3).figures
    assert figures["V"] == pytest.approx(18, rel=1e-5)


def test_no_held_out_image_is_drawn_twice(call, pictures, monkeypatch):
    """Of 40 images 4 are held out: fewer than are drawn where there are enough."""
    torch.set_default_dtype(torch.float32)
    seen, costs = [], rf.costs
    monkeypatch.setattr(rf, "costs", lambda x_0, x_1: seen.append(x_1) or costs(x_0, x_1))
    code, _, err = call("rectified_flow", *TINY, "--dataset", pictures(n=40), "--image-size", "8")
    assert code == 0, err
    assert len(seen[0]) == len(seen[0].unique(dim=0)) == 4
