"""Albergo & Vanden-Eijnden 2022: interpolants, G, flows, scores and bounds against closed forms."""

import json
import math
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import common
import interflow as it
from interflow import Fourier, Gaussian, Interpolant

# Small enough for a test, whole enough to pass through every part.
TINY = ["--source", "normal", "--steps", "2", "--batch-size", "4", "--width", "8"]
TINY += ["--nll-examples", "4", "--solver", "euler", "--nfe", "1"]
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(autouse=True)
def _double(request, monkeypatch):
    torch.manual_seed(0)
    if {"call", "refused"} & set(request.fixturenames):  # the command line runs in float32
        monkeypatch.setattr(it, "HELD_OUT", 60)
    else:
        torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def learned():
    """A Fourier interpolant with coefficients away from 0."""
    interpolant = Fourier(it.trigonometric, 3).double()
    with torch.no_grad():
        interpolant.alpha.copy_(torch.tensor([4.0, -3.0, 2.0]))
        interpolant.beta.copy_(torch.tensor([-2.0, 5.0, 1.0]))
    return interpolant.requires_grad_(False)


def quadratic(t):
    """Curves that are neither of the paper's: any will do that meet Eq. 4."""
    return 1 - t**2, t**3, -2 * t, 3 * t**2


INTERPOLANTS = [Interpolant(it.linear), Interpolant(it.trigonometric), learned()]
INTERPOLANTS.append(Interpolant(quadratic))
every_interpolant = pytest.mark.parametrize(
    "interpolant", INTERPOLANTS, ids=["linear", "trigonometric", "learned", "quadratic"]
)
LINEAR, TRIGONOMETRIC = INTERPOLANTS[:2]


# Two Gaussians whose covariances do not commute.
def gaussian(mean, root):
    return Gaussian("", *(torch.tensor(x, dtype=torch.float64) for x in (mean, root)))


RHO_0 = gaussian([-1.0, 0.5], [[0.8, 0.0], [0.3, 0.5]])
RHO_1 = gaussian([1.0, -0.5], [[0.5, 0.0], [-0.4, 1.0]])


def one_dimensional(mean, std):
    return gaussian([mean], [[std]])


def gaussian_velocity(interpolant, rho_0=RHO_0, rho_1=RHO_1):
    """The minimum of G between two Gaussians, as a field."""

    def v(x, t):
        _, _, A, c = it.gaussian_path(t, interpolant, rho_0, rho_1)
        return (A @ x[..., None])[..., 0] + c

    return v


# ---- Interpolants: Eq. 4 ------------------------------------------------------------------------


@every_interpolant
def test_interpolant_joins_its_ends(interpolant):
    x_0, x_1 = torch.randn(5, 3), torch.randn(5, 3)
    for end, x in enumerate((x_0, x_1)):
        assert_close(interpolant(x_0, x_1, torch.full((5,), float(end)))[0], x)
    t = torch.rand(5)
    _, derivative = torch.autograd.functional.jvp(
        lambda t: interpolant(x_0, x_1, t)[0], t, torch.ones(5)
    )
    assert_close(interpolant(x_0, x_1, t)[1], derivative)
    images = interpolant(torch.randn(5, 1, 4, 4), torch.randn(5, 1, 4, 4), t)[0]
    assert images.shape == (5, 1, 4, 4)


def test_an_unlearned_series_changes_nothing():
    t = torch.linspace(0, 1, 7)
    plain = it.linear(t)
    assert_close(Fourier(it.linear, 4).coefficients(t), plain)
    a, b, _, _ = learned().coefficients(t)
    sines = torch.stack([torch.sin(m * math.pi * t) for m in (1, 2, 3)], dim=1) / 3
    assert_close(a, torch.cos(math.pi / 2 * t) + sines @ torch.tensor([0.4, -0.3, 0.2]))
    assert_close(b, torch.sin(math.pi / 2 * t) + sines @ torch.tensor([-0.2, 0.5, 0.1]))


def test_gradient_of_the_coefficients_is_reversed():
    """What the optimiser descends is G for the velocity and -G for alpha and beta."""
    interpolant = learned().requires_grad_()
    x_0, x_1, t = torch.randn(6, 2), torch.randn(6, 2), torch.rand(6)

    def v(x, t):  # not linear: the gradient through v(I_t) counts as well as that through dI_t/dt
        return torch.sin(2 * x) + t[:, None] * x.flip(1)

    it.G(v, interpolant, x_0, x_1, t).backward()
    for coefficients in (interpolant.alpha, interpolant.beta):
        for m in range(3):
            values = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    coefficients[m] += step
                    values.append(it.G(v, interpolant, x_0, x_1, t).item())
                    coefficients[m] -= step
            slope = (values[0] - values[1]) / 2e-5
            assert abs(slope) > 1e-4
            assert_close(coefficients.grad[m].item(), -slope, rtol=1e-6, atol=1e-9)


# ---- The velocity of Gaussians ------------------------------------------------------------------


@every_interpolant
def test_gaussian_velocity_is_the_conditional_expectation(interpolant):
    """E[dI_t/dt | I_t = x] by Monte Carlo: the mean over the samples that come near x."""
    rho_0, rho_1 = one_dimensional(-0.5, 0.8), one_dimensional(1.7, 2.3)
    n = 200_000
    x_0, x_1 = rho_0.batch(n)[0], rho_1.batch(n)[0]
    for time, at in ((0.2, 0.1), (0.6, 1.5), (0.9, 3.0)):
        t = torch.full((n,), time)
        x_t, dx_t = interpolant(x_0, x_1, t)
        near = (x_t - at).abs()[:, 0] < 0.1  # symmetric, so the error is of second order: < 0.01
        expected = dx_t[near].mean().item()
        v = gaussian_velocity(interpolant, rho_0, rho_1)(torch.tensor([[at]]), t[:1]).item()
        error = dx_t[near].std().item() / math.sqrt(near.sum().item())
        assert abs(v - expected) < 5 * error + 0.01
        assert error < 0.05


@every_interpolant
def test_gaussian_velocity_solves_the_continuity_equation(interpolant):
    """Eq. 3 divided by rho_t: d/dt log rho + v . grad log rho + div v = 0."""
    t, x = torch.linspace(0.05, 0.95, 9), torch.randn(9, 2)

    def log_rho(x, t):
        mean, cov, _, _ = it.gaussian_path(t, interpolant, RHO_0, RHO_1)
        return torch.distributions.MultivariateNormal(mean, cov).log_prob(x)

    x.requires_grad_()
    t.requires_grad_()
    grad_x, grad_t = torch.autograd.grad(log_rho(x, t).sum(), (x, t))
    v, div = common.divergence(gaussian_velocity(interpolant), x.detach(), t.detach())
    residual = grad_t + (v * grad_x).sum(1) + div
    assert_close(residual, torch.zeros(9), rtol=0, atol=1e-9)


@every_interpolant
def test_end_velocities(interpolant):
    x_0, x_1 = RHO_0.batch(7)[0], RHO_1.batch(7)[0]
    x_0 = x_0 - x_0.mean(0) + RHO_0.mean  # a sample's mean is the exact one
    x_1 = x_1 - x_1.mean(0) + RHO_1.mean
    v = gaussian_velocity(interpolant)
    v_0, v_1 = it.end_velocities(x_0, x_1, interpolant)
    assert_close(v_0, v(x_0, torch.zeros(7)))
    assert_close(v_1, v(x_1, torch.ones(7)))


# ---- The objective: Prop. 1 ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interpolant", "minimum"),
    [(LINEAR, -(2 - math.pi / 2)), (TRIGONOMETRIC, 0.0)],
    ids=["linear", "trigonometric"],
)
def test_minimum_of_G_between_equal_normals(interpolant, minimum):
    normal = one_dimensional(0.0, 1.0)
    v = gaussian_velocity(interpolant, normal, normal)
    figures = it.wasserstein_bound(v, interpolant, normal, normal)
    assert_close(figures["min_G"], minimum, rtol=0, atol=1e-6)  # trapezoidal rule: 2001 points
    n = 400_000
    x_0, x_1, t = torch.randn(n, 1), torch.randn(n, 1), torch.rand(n)
    # five standard errors of v² - 2 v dI: at most 5 * 2.0 / sqrt(n)
    assert_close(it.G(v, interpolant, x_0, x_1, t).item(), minimum, rtol=0, atol=0.016)
    worse = it.G(lambda x, t: v(x, t) + 0.3, interpolant, x_0, x_1, t).item()
    assert_close(worse - it.G(v, interpolant, x_0, x_1, t).item(), 0.09, rtol=0, atol=0.012)


@every_interpolant
def test_minimum_of_G_is_minus_the_kinetic_energy(interpolant):
    """And the excess of any other velocity's G is H = int E|v - u|² dt."""
    n = 50_000
    x_0, x_1, t = RHO_0.batch(n)[0], RHO_1.batch(n)[0], torch.rand(n)
    u = gaussian_velocity(interpolant)

    def v(x, t):
        return u(x, t) + 0.2 * x + t[:, None]

    for field in (u, v):
        figures = it.wasserstein_bound(field, interpolant, RHO_0, RHO_1)
        x_t, dx_t = interpolant(x_0, x_1, t)
        at = field(x_t, t)
        error = (at.square() - 2 * at * dx_t).sum(1).std().item() / math.sqrt(n)
        g = it.G(field, interpolant, x_0, x_1, t).item()
        assert abs(g - figures["G"]) < 5 * error
        assert error < 0.1
        if field is u:
            assert figures["H"] < 1e-20
            assert_close(figures["G"], figures["min_G"])
            kinetic = at.square().sum(1).mean().item()
            assert abs(kinetic + figures["min_G"]) < 5 * error
        else:
            assert figures["H"] > 0.3


def test_diagnostics():
    x_0, x_1 = RHO_0.batch(100_000)[0], RHO_1.batch(100_000)[0]
    figures = it.diagnose(gaussian_velocity(LINEAR), LINEAR, x_0, x_1)
    assert abs(figures["G_plus_v_squared"]) < 0.1  # 5 standard errors of 2 v.(v - dI)
    assert_close(figures["G"] + figures["v_squared"], figures["G_plus_v_squared"])
    assert figures["G"] < -4
    assert max(figures["error_at_0"], figures["error_at_1"]) < 0.02  # the sample's mean's error
    # The means of 512 rows of an image's size are themselves off by more than 1.
    noise, images = torch.randn(512, 784), 0.9 * torch.randn(512, 784)

    def exact(x, t):
        return (0.81 * t - (1 - t))[:, None] * x / ((1 - t) ** 2 + 0.81 * t**2)[:, None]

    ends = it.diagnose(exact, LINEAR, noise, images)
    assert ends["error_at_0"] < 0.5  # 4 standard errors of the square, 0.25 of 1.24
    assert ends["error_at_1"] < 0.6  # 0.31 of 1.53
    nothing = it.diagnose(lambda x, t: 0 * x, LINEAR, x_0, x_1)
    assert nothing["G_plus_v_squared"] == nothing["G"] == nothing["v_squared"] == 0.0
    assert nothing["error_at_0"] > 1
    wrong = it.diagnose(lambda x, t: x, LINEAR, x_0, x_1)
    assert abs(wrong["G_plus_v_squared"]) > 1


def test_empirical_G_takes_all_pairs():
    N, n, K = 3, 4, 2
    x_0, x_1, t = torch.randn(N, 2), torch.randn(n, 2), torch.rand(K)

    def v(x, t):
        return torch.sin(x) + t[:, None]

    total = 0.0
    for k in range(K):
        for i in range(N):
            for j in range(n):
                x_t, dx_t = TRIGONOMETRIC(x_0[i : i + 1], x_1[j : j + 1], t[k : k + 1])
                v_t = v(x_t, t[k : k + 1])
                total += (v_t @ v_t.T - 2 * dx_t @ v_t.T).item()
    rows = it.all_pairs(x_0, x_1, t)
    assert [len(x) for x in rows] == [N * n * K] * 3
    assert_close(it.G(v, TRIGONOMETRIC, *rows).item(), total / (K * N * n))
    assert it.all_pairs(torch.randn(2, 1, 4, 4), torch.randn(3, 1, 4, 4), t)[0].shape[1:] == (
        1,
        4,
        4,
    )


@pytest.mark.parametrize("interpolant", [LINEAR, TRIGONOMETRIC], ids=["linear", "trigonometric"])
def test_exchange_of_the_ends(interpolant):
    """Both interpolants are symmetric: swap the ends, reverse time and v, and G stays."""
    x_0, x_1, t = torch.randn(9, 2), torch.randn(9, 2), torch.rand(9)

    def v(x, t):
        return torch.sin(x) + t[:, None] * x

    forwards = it.G(v, interpolant, x_0, x_1, t)
    assert_close(it.G(lambda x, t: -v(x, 1 - t), interpolant, x_1, x_0, 1 - t), forwards)
    assert (it.G(lambda x, t: v(x, 1 - t), interpolant, x_1, x_0, 1 - t) - forwards).abs() > 0.01


def test_times():
    assert_close(it.sample_times(100_000, 1, 1).mean().item(), 0.5, rtol=0, atol=0.005)
    t = it.sample_times(100_000, 1.0, 0.75)  # mean alpha / (alpha + beta); 5 standard errors
    assert_close(t.mean().item(), 1 / 1.75, rtol=0, atol=0.005)
    assert t.shape == (100_000,)
    assert 0 <= t.min() < t.max() <= 1


# ---- A mixture: flow, likelihood, score ---------------------------------------------------------

ANGLES = torch.arange(8, dtype=torch.float64) * math.pi / 4
MODES = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)


def mixture_log_rho(x, t, interpolant):
    """log rho_t(x) between N(0, I) and the eight Gaussians."""
    a, b, _, _ = (c[:, None] for c in interpolant.coefficients(t))
    s = a**2 + (0.15 * b) ** 2  # (B, 1), the variance of every mode
    square = (x[:, None] - b[..., None] * MODES).square().sum(2)
    return (-square / (2 * s) - torch.log(2 * math.pi * s) - math.log(8)).logsumexp(1)


def mixture_velocity(interpolant):
    def v(x, t):
        a, b, da, db = (c[:, None] for c in interpolant.coefficients(t))
        s, ds_half = a**2 + (0.15 * b) ** 2, a * da + 0.15**2 * b * db
        gap = x[:, None] - b[..., None] * MODES  # (B, 8, D)
        weights = (-gap.square().sum(2) / (2 * s)).softmax(1)[..., None]
        return (weights * (db[..., None] * MODES + (ds_half / s)[..., None] * gap)).sum(1)

    return v


@every_interpolant
def test_likelihood_either_way(interpolant):
    """The exact field carries the density of either end to the other's."""
    v, solver = mixture_velocity(interpolant), {"rtol": 1e-8, "atol": 1e-8}
    x_0 = torch.randn(6, 2)
    x_1, forwards = it.transport(v, x_0, **solver)
    log_p_1, _ = it.log_prob(v, x_1, common.standard_normal_log_prob, (1.0, 0.0), **solver)
    assert_close(log_p_1, it.eight_gaussians_log_prob(x_1), rtol=0, atol=1e-5)
    log_p_0, _ = it.log_prob(v, x_0, it.eight_gaussians_log_prob, (0.0, 1.0), **solver)
    assert_close(log_p_0, common.standard_normal_log_prob(x_0), rtol=0, atol=1e-5)
    back, _ = it.transport(v, x_1, (1.0, 0.0), **solver)
    assert_close(back, x_0, rtol=0, atol=1e-5)
    frames, _ = it.transport(v, x_0, torch.tensor([0.0, 0.5, 1.0]), **solver)
    assert_close(frames[-1], x_1, rtol=0, atol=1e-6)
    assert frames.shape == (3, 6, 2)
    assert forwards > 0


def test_density_of_the_eight_gaussians():
    x = common.DENSITIES["eight_gaussians"](20_000, torch.Generator().manual_seed(1))[0].double()
    log_p = it.eight_gaussians_log_prob(x)
    expected = -common.ENTROPIES["eight_gaussians"]
    assert_close(log_p.mean().item(), expected, rtol=0, atol=5 * common.standard_error(log_p))
    one = torch.ones(len(x))
    assert_close(log_p, mixture_log_rho(x, one, TRIGONOMETRIC), rtol=1e-9, atol=1e-9)


@every_interpolant
def test_score_from_the_velocity(interpolant):
    t, x = torch.linspace(0.02, 0.97, 12), torch.randn(12, 2).requires_grad_()
    (expected,) = torch.autograd.grad(mixture_log_rho(x, t, interpolant).sum(), x)
    score = it.score(mixture_velocity(interpolant), x.detach(), t, interpolant)
    assert_close(score, expected, rtol=1e-9, atol=1e-9)


def test_score_of_the_trigonometric_interpolant():
    """Prop. 4's own form, (2 / pi) tan(pi t / 2) v_t(x) - x."""
    t, x = torch.linspace(0.02, 0.97, 12), torch.randn(12, 2)

    def v(x, t):
        return torch.sin(x) + t[:, None]

    expected = 2 / math.pi * torch.tan(math.pi / 2 * t)[:, None] * v(x, t) - x
    assert_close(it.score(v, x, t, TRIGONOMETRIC), expected)
    expected = (t[:, None] * v(x, t) - x) / (1 - t[:, None])
    assert_close(it.score(v, x, t, LINEAR), expected)


@pytest.mark.parametrize("epsilon", [0.0, 1.0])
def test_a_diffusion_with_the_score_has_the_same_density(epsilon):
    """dX = (v + e s) dt + sqrt(2 e) dW from N(0, 1) to t = 0.9, for any e."""
    rho_0, rho_1 = one_dimensional(0.0, 1.0), one_dimensional(1.3, 0.4)
    v = gaussian_velocity(TRIGONOMETRIC, rho_0, rho_1)
    n, steps, end = 20_000, 150, 0.9
    x, h = torch.randn(n, 1), end / steps
    for i in range(steps):
        t = torch.tensor([i * h])
        drift = v(x, t) + epsilon * it.score(v, x, t, TRIGONOMETRIC)
        x = x + h * drift + math.sqrt(2 * epsilon * h) * torch.randn_like(x)
    mean, cov, _, _ = it.gaussian_path(torch.tensor([end]), TRIGONOMETRIC, rho_0, rho_1)
    # sampling errors: 0.003 of the mean, 0.002 of the deviation; Euler's of order h = 0.006
    assert_close(x.mean().item(), mean.item(), rtol=0, atol=0.02)
    assert_close(x.std().item(), cov.sqrt().item(), rtol=0, atol=0.016)


def test_likelihood_of_a_constant_linear_field():
    """v = A x: log p(x) = log N(e^-A x; 0, I) - tr A; a probe's variance is known (1989)."""
    A = torch.tensor([[0.3, 0.7, -0.2], [-0.4, 0.1, 0.5], [0.6, 0.0, -0.5]])

    def v(x, t):
        return x @ A.T

    x, log_normal = torch.randn(5, 3), common.standard_normal_log_prob
    exact = log_normal(x @ torch.linalg.matrix_exp(-A).T) - torch.trace(A)
    assert_close(it.log_prob(v, x, log_normal, **TIGHT)[0], exact, rtol=0, atol=1e-8)
    same = x[:1].expand(40_000, 3)
    sym = (A + A.T) / 2
    off = 2 * (sym - torch.diag(sym.diagonal())).square().sum()
    for probe, variance in (("rademacher", off), ("gaussian", 2 * sym.square().sum())):
        log_p, _ = it.log_prob(v, same, log_normal, divergence=probe, method="rk4", steps=20)
        error = math.sqrt(variance / len(same))
        assert_close(log_p.mean().item(), exact[0].item(), rtol=0, atol=5 * error)
        # the fourth moment of a quadratic form: a relative error of the variance below 2 %
        assert_close(log_p.var().item(), variance.item(), rtol=0.08, atol=0)


def test_bits_per_dimension():
    """The uniform density on [-1, 1]^D has 8 bits per dimension, whatever the flow's start."""
    x = torch.rand(4, 1, 3, 3) * 2 - 1
    uniform = torch.full((4,), -9 * math.log(2))
    log_p, _ = it.log_prob(lambda x, t: 0 * x, x, lambda x: uniform, **TIGHT)
    assert_close(common.bits_per_dim(log_p, 9), torch.full((4,), 8.0))


# ---- Optimal transport: Prop. 2 -----------------------------------------------------------------

NARROW, WIDE = one_dimensional(0.0, 0.8), one_dimensional(1.7, 2.3)
LIMIT = -(1.7**2 + 1.5**2)  # -W_2², -5.14


def lowest_G(interpolant, rho_0=NARROW, rho_1=WIDE):
    """min G on 401 times, differentiable in the interpolant's coefficients."""
    t = torch.linspace(0, 1, 401)
    mean, cov, A, c = it.gaussian_path(t, interpolant, rho_0, rho_1)
    v = (A @ mean[..., None])[..., 0] + c
    return -torch.trapezoid(((A @ cov) * A).sum((1, 2)) + v.square().sum(1), t)


def test_bures_distance():
    ends = [(rho.mean, rho.root) for rho in (NARROW, WIDE)]
    assert_close(it.bures_distance(*ends[0], *ends[1]).item(), -LIMIT)
    assert_close(it.bures_distance(*ends[0], *ends[0]).item(), 0.0, rtol=0, atol=1e-12)
    shift = torch.tensor([3.0, -4.0])
    moved = it.bures_distance(RHO_0.mean, RHO_0.root, RHO_0.mean + shift, RHO_0.root)
    assert_close(moved.item(), 25.0)
    # T = S_0^-1/2 (S_0^1/2 S_1 S_0^1/2)^1/2 S_0^-1/2 is symmetric and carries S_0 to S_1; in two
    # dimensions tr (S_0^1/2 S_1 S_0^1/2)^1/2 has a form without roots of matrices.
    product = RHO_0.cov @ RHO_1.cov
    trace = torch.sqrt(torch.trace(product) + 2 * torch.sqrt(torch.linalg.det(product)))
    expected = (RHO_0.mean - RHO_1.mean).square().sum() + torch.trace(RHO_0.cov + RHO_1.cov)
    w = it.bures_distance(RHO_0.mean, RHO_0.root, RHO_1.mean, RHO_1.root)
    assert_close(w, expected - 2 * trace)


def test_the_optimal_interpolant():
    """b = t with a² = (1 - t)² + 2 t (1 - t) s_1 / s_0 moves the mass optimally: -W_2²."""

    def optimal(t):
        ratio = 2.3 / 0.8
        a = torch.sqrt((1 - t) ** 2 + 2 * t * (1 - t) * ratio)
        slope = (t - 1 + (1 - 2 * t) * ratio) / a
        return a, t, slope, torch.ones_like(t)

    t = torch.linspace(0, 0.999, 2001)  # at t = 1 the slope of a is infinite
    mean, cov, A, c = it.gaussian_path(t, Interpolant(optimal), NARROW, WIDE)
    v = (A @ mean[..., None])[..., 0] + c
    energy = (A @ cov @ A)[:, 0, 0] + v.square()[:, 0]
    assert_close(energy, torch.full((2001,), -LIMIT), rtol=1e-9, atol=0)  # constant in time
    assert_close(lowest_G(LINEAR).item(), -5.930, rtol=0, atol=5e-4)
    assert_close(lowest_G(TRIGONOMETRIC).item(), -6.341, rtol=0, atol=5e-4)


@pytest.mark.parametrize(("terms", "value"), [(1, -5.183), (7, -5.147)])
def test_best_coefficients_approach_optimal_transport(terms, value):
    interpolant = Fourier(it.trigonometric, terms)
    search = torch.optim.LBFGS(
        interpolant.parameters(), max_iter=300, line_search_fn="strong_wolfe"
    )

    def closure():  # min G's gradient comes reversed: it is that of what is descended, -min G
        search.zero_grad()
        lowest_G(interpolant).backward()
        return -lowest_G(interpolant).detach()

    search.step(closure)
    assert_close(lowest_G(interpolant).item(), value, rtol=0, atol=6e-4)
    assert lowest_G(interpolant).item() < LIMIT


def test_training_learns_the_best_coefficients(tmp_path):
    """Velocity and interpolant, trained against each other, reach the saddle of RHO_0, RHO_1."""
    torch.set_default_dtype(torch.float32)
    cfg = it.Config(out=str(tmp_path), steps=400, lr=3e-2, device="cpu", learn=True)
    cfg.batch_size = 256
    ends = [Gaussian("", rho.mean.float(), rho.root.float()) for rho in (RHO_0, RHO_1)]
    net = it.InterFlow(it.AffineVelocity(2), it.make_interpolant(cfg))
    run = common.Run(cfg, net, torch.device("cpu"))
    it.train(cfg, run, *ends)
    v = run.ema.double()
    figures = it.wasserstein_bound(v, v.interpolant, RHO_0, RHO_1)
    # trigonometric: -5.736; the best three terms: -5.626; optimal transport: -5.537
    assert_close(lowest_G(TRIGONOMETRIC, RHO_0, RHO_1).item(), -5.736, rtol=0, atol=1e-3)
    assert -5.65 < figures["min_G"] < -5.62
    assert figures["H"] < 0.05
    assert_close(figures["limit"], -5.537, rtol=0, atol=1e-3)


# ---- The Wasserstein bound: Prop. 3 -------------------------------------------------------------


@every_interpolant
@pytest.mark.parametrize("size", [0.05, 1.0])
def test_wasserstein_bound_holds(interpolant, size):
    """For perturbations of the exact field by random affine fields, different at every time."""
    u = gaussian_velocity(interpolant)
    A, c = size * torch.randn(2, 2, 2), size * torch.randn(2, 2)

    def v(x, t):
        wave = torch.stack([torch.cos(3 * t), torch.sin(3 * t)], dim=1)
        change = torch.einsum("bk,kij,bj->bi", wave, A, x) + wave @ c
        return u(x, t) + change

    figures = it.wasserstein_bound(v, interpolant, RHO_0, RHO_1)
    assert 1e-5 < figures["W2_squared"] <= figures["bound"]
    assert figures["H"] > 0
    # the flow's end, by four particles that have rho_0's mean and covariance exactly
    sigma = math.sqrt(2) * torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    x, _ = it.transport(v, RHO_0.mean + sigma @ RHO_0.root.T, rtol=1e-8, atol=1e-8)
    root = torch.linalg.cholesky(x.T.cov(correction=0))
    w = it.bures_distance(x.mean(0), root, RHO_1.mean, RHO_1.root).item()
    assert_close(w, figures["W2_squared"], rtol=1e-5, atol=1e-6)


def test_exact_velocity_has_no_distance():
    figures = it.wasserstein_bound(gaussian_velocity(LINEAR), LINEAR, RHO_0, RHO_1)
    assert abs(figures["W2_squared"]) < 1e-7
    assert figures["bound"] < 1e-18
    A = it.gaussian_path(torch.linspace(0, 1, 2001), LINEAR, RHO_0, RHO_1)[2]
    assert_close(figures["K"], torch.linalg.svdvals(A).max().item())


# ---- Tables -------------------------------------------------------------------------------------


def write_table(path, rows, header=""):
    np.savetxt(path, rows, delimiter=",", header=header, comments="")


def test_table_files(tmp_path):
    rows = np.random.default_rng(0).normal(size=(200, 3)) * [1, 10, 0.1] + [0, 5, -2]
    write_table(tmp_path / "plain.csv", rows)
    write_table(tmp_path / "named.csv", rows, "size,weight,1e3 x")
    np.save(tmp_path / "array.npy", rows)
    np.save(tmp_path / "whole.npy", (1000 * rows).astype(np.int32))
    for name in ("plain.csv", "named.csv", "array.npy"):
        np.testing.assert_allclose(it.read_table(tmp_path / name), rows, rtol=1e-15)
    assert it.read_table(tmp_path / "whole.npy").dtype == np.float64

    table = it.load_table(str(tmp_path / "array.npy"))
    assert [len(x) for x in (table.train, table.validation, table.test)] == [160, 20, 20]
    assert table.train.dtype == torch.float32
    assert not table.is_image
    assert_close(table.train.mean(0), torch.zeros(3).float(), rtol=0, atol=1e-6)
    assert_close(table.train.std(0, correction=0), torch.ones(3).float(), rtol=0, atol=1e-6)
    # together the splits are the rows, each once, up to the standardisation
    parts = torch.cat([table.train, table.validation, table.test]).double().numpy()
    order = np.argsort(parts[:, 0])
    scaled = rows[np.argsort(rows[:, 0])]
    slopes = [np.polyfit(scaled[:, i], parts[order, i], 1) for i in range(3)]
    for i, (slope, shift) in enumerate(slopes):
        np.testing.assert_allclose(parts[order, i], slope * scaled[:, i] + shift, atol=1e-5)
    # a density of y = (x - mean) / std becomes that of x by the factor 1 / prod(std)
    expected = sum(math.log(slope) for slope, _ in slopes)
    assert_close(table.log_scale, -expected, atol=1e-6, rtol=0)
    again = it.load_table(str(tmp_path / "array.npy"))
    assert torch.equal(again.test, table.test)  # the same split every time


def test_bad_tables(refused, tmp_path):
    rows = np.random.default_rng(0).normal(size=(30, 3))
    short = ["--dataset", "x.csv", *TINY]
    Path("x.csv").write_text("")
    refused("x.csv is no table of numbers", "interflow", *short)
    Path("x.csv").write_text("a,b,c\n")
    refused("x.csv (is no table|must hold|has 0 rows)", "interflow", *short)
    lines = [",".join(f"{x:.3f}" for x in row) for row in rows]
    Path("x.csv").write_text("\n".join([*lines[:5], "1.0,2.0", *lines[5:]]))
    refused("x.csv is no table of numbers.*6.*2 columns instead of 3", "interflow", *short)
    Path("x.csv").write_text("\n".join(["a,b,c", *lines[:5], "1.0,red,3.0", *lines[5:]]))
    refused("x.csv: line 7, column 2 is no finite number", "interflow", *short)
    Path("x.csv").write_text("\n".join([*lines, "1.0,inf,3.0"]))
    refused("x.csv: line 31, column 2 is no finite number", "interflow", *short)
    Path("x.csv").write_text("\n".join(lines[:19]))
    refused("19 rows and 3 columns; the least is 20 rows and 2 columns", "interflow", *short)
    Path("x.csv").write_text("\n".join(line.split(",")[0] for line in lines))
    refused("must hold one array|30 rows and 1 columns", "interflow", *short)
    Path("x.csv").write_bytes(bytes(range(256)))
    refused("x.csv is no table of numbers", "interflow", *short)
    Path("x.csv").write_text("\n".join(f"{line},0.1" for line in lines))
    refused("column 4 of x.csv is constant", "interflow", *short)

    short = ["--dataset", "x.npy", *TINY]
    refused("there is no file x.npy", "interflow", *short)
    Path("x.npy").write_text("hello")
    refused("x.npy is no table of numbers", "interflow", *short)
    np.save("x.npy", rows)
    Path("x.npy").write_bytes(Path("x.npy").read_bytes()[:-9])
    refused("x.npy is no table of numbers", "interflow", *short)
    for bad in (rows[0], rows > 0, rows.astype(complex), rows.astype(str)):
        np.save("x.npy", bad)
        refused("x.npy must hold one array of real numbers", "interflow", *short)
    np.save("x.npy", np.array([[None, 1]] * 30), allow_pickle=True)
    refused("x.npy is no table of numbers", "interflow", *short)
    rows[7, 1] = np.nan
    np.save("x.npy", rows)
    refused("x.npy: line 8, column 2 is no finite number", "interflow", *short)
    np.save("x.npy", np.random.default_rng(0).normal(size=(30, 3)))
    refused("leave out --image-size and --flip", "interflow", *short, "--flip")
    refused("differ in shape", "interflow", *short, "--source", "moons")


# ---- Data, devices and learning -----------------------------------------------------------------


def test_pairs_for_the_diagnostics_are_independent():
    """The embedded densities draw from one seed: row by row, two of them are not independent."""
    torch.set_default_dtype(torch.float32)
    device = torch.device("cpu")
    cfg = it.Config()
    source, target = (it.load(cfg, name, device) for name in ("eight_gaussians", "checkerboard"))
    x_0, x_1 = it.held_out(source, 20_000), it.held_out(target, 20_000)
    assert abs(torch.corrcoef(torch.cat([x_0, x_1], dim=1).T)[:2, 2:]).max() < 0.035  # 5 / sqrt(n)
    together = torch.cat([source.test[:20_000], target.test[:20_000]], dim=1)
    assert abs(torch.corrcoef(together.T)[:2, 2:]).max() > 0.1
    few = it.diagnose(lambda x, t: x, LINEAR, x_0[:7], x_1)  # as many of each as there are of both
    assert all(map(math.isfinite, few.values()))
    one = it.diagnose(lambda x, t: x, LINEAR, x_0[:1], x_1)
    assert set(one) == {"G", "v_squared", "G_plus_v_squared"}  # its mean is not known
    assert all(map(math.isfinite, one.values()))


def test_images_are_dequantised():
    class Images:
        is_image = True

    x = common.to_float(torch.full((1000, 1, 2, 2), 7, dtype=torch.uint8))
    y = it.continuous(Images, x)
    assert ((y - x).abs() <= 1 / 256).all()
    assert y.std() > 0.002
    assert torch.equal(it.continuous(RHO_0, x), x)


@pytest.mark.parametrize("learn", [False, True])
def test_losses_and_samplers_keep_to_their_device(learn):
    torch.set_default_dtype(torch.float32)
    interpolant = it.make_interpolant(it.Config(learn=learn))
    net = it.InterFlow(common.MLP(2, width=8), interpolant).to("meta")
    x_0, x_1 = torch.empty(4, 2, device="meta"), torch.empty(4, 2, device="meta")
    t = torch.empty(4, device="meta")
    assert it.G(net, net.interpolant, x_0, x_1, t).is_meta
    assert it.G(net, net.interpolant, *it.all_pairs(x_0, x_1, t)).is_meta
    assert it.transport(net, x_0, method="midpoint", steps=2)[0].is_meta
    for trace in ("exact", "rademacher", "gaussian"):
        log_p, _ = it.log_prob(
            net, x_1, it.eight_gaussians_log_prob, divergence=trace, method="euler", steps=2
        )
        assert log_p.is_meta
    assert it.score(net, x_0, t, net.interpolant).is_meta
    assert all(v.is_meta for v in it.end_velocities(x_0, x_1, net.interpolant))
    assert it.AffineVelocity(2).to("meta")(x_0, t).is_meta
    meta = Gaussian("normal", torch.zeros(1, 4, 4, device="meta"))
    assert meta.batch(3)[0].is_meta
    assert meta.shape == (1, 4, 4)


def test_networks_compile_without_a_graph_break():
    net = it.InterFlow(it.AffineVelocity(2), learned())
    whole = torch.compile(net, fullgraph=True, backend="eager")
    x, t = torch.randn(4, 2), torch.rand(4)
    assert_close(whole(x, t), net(x, t))
    interpolant = torch.compile(net.interpolant, fullgraph=True, backend="eager")
    assert_close(interpolant(x, 2 * x, t), net.interpolant(x, 2 * x, t))


@pytest.mark.parametrize("source", ["normal", "eight_gaussians"])
def test_a_short_training_learns_the_checkerboard(tmp_path, source):
    torch.set_default_dtype(torch.float32)
    cfg = it.Config(out=str(tmp_path), steps=200, batch_size=256, device="cpu")
    device = common.setup(cfg)
    target = it.load(cfg, "checkerboard", device)
    run, base = it.prepare(cfg, device, source, target)

    def distances():
        """Energy distances of the flow forwards and backwards."""
        solver = {"method": "midpoint", "steps": 8}
        x_0, x_1 = it.held_out(base, 1_500), it.held_out(target, 1_500)
        y_1, _ = it.transport(run.ema, x_0, **solver)
        y_0, _ = it.transport(run.ema, x_1, (1.0, 0.0), **solver)
        return common.energy_distance(y_1, x_1), common.energy_distance(y_0, x_0)

    before = distances()
    it.train(cfg, run, base, target)
    after = distances()
    assert min(before) > 0.03
    assert max(after) < 0.02  # a perfect flow has 0 +- 0.002
    if source == "normal":
        log_rho, solver = it.LOG_DENSITIES[source], {"method": "midpoint", "steps": 20}
        log_p, _ = it.log_prob(run.ema, target.test[:500], log_rho, **solver)
        assert -log_p.mean().item() < 2.8  # the entropy is log 8 = 2.08; the start has 3.2


def test_all_pairs_train_as_well(tmp_path):
    torch.set_default_dtype(torch.float32)
    cfg = it.Config(out=str(tmp_path), steps=200, device="cpu", base_batch=16, batch_size=16)
    cfg.time_batch, cfg.time_beta = 4, 0.75
    run = common.Run(cfg, it.InterFlow(it.AffineVelocity(2), LINEAR), torch.device("cpu"))
    ends = [Gaussian("", rho.mean.float(), rho.root.float()) for rho in (RHO_0, RHO_1)]
    before = it.wasserstein_bound(run.ema.double(), LINEAR, RHO_0, RHO_1)["W2_squared"]
    run.ema.float()
    it.train(cfg, run, *ends)
    after = it.wasserstein_bound(run.ema.double(), LINEAR, RHO_0, RHO_1)["W2_squared"]
    assert before > 4
    assert after < 0.05


# ---- The command line ---------------------------------------------------------------------------


def records(folder):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def test_two_flows_resume_bit_for_bit(call):
    """Zero flags train from noise and from data; half a run, resumed, ends as the whole."""
    tiny = [*TINY[2:], "--decay", "constant", "--learn"]
    code, out, err = call("interflow", *tiny, "--steps", "4", "--out", "whole")
    assert code == 0, err
    assert "flow eight_gaussians to checkerboard, nll" in out
    assert "flow checkerboard to eight_gaussians, energy_distance" in out
    assert call("interflow", *tiny, "--out", "half")[0] == 0
    assert call("interflow", "--resume", "--out", "half", "--steps", "4")[0] == 0
    for name in ("checkpoint.pt", "checkpoint-eight_gaussians.pt"):
        whole, half = (torch.load(Path(out, name), weights_only=True) for out in ("whole", "half"))
        for part in ("model", "ema"):
            assert whole[part].keys() == half[part].keys()
            assert all(torch.equal(whole[part][k], half[part][k]) for k in whole[part])
        assert whole["model"]["interpolant.alpha"].abs().min() > 0
    code, out, _ = call("interflow", "--sample", "half/checkpoint.pt", "--out", "again")
    assert code == 0
    assert [r["flow"] for r in records("again") if r["split"] == "test"] == [
        "normal to checkerboard",
        "eight_gaussians to checkerboard",
    ]


def test_likelihood_of_the_source_from_the_target(call):
    code, _, err = call("interflow", *TINY, "--dataset", "eight_gaussians", "--source", "moons")
    assert code == 0, err
    scored = [r for r in records("runs/interflow-eight_gaussians") if r.get("split") == "test"]
    assert [r["flow"] for r in scored] == ["eight_gaussians to moons"]


def test_likelihoods_are_of_the_end_that_is_reached(call, refused, monkeypatch):
    """From x at its end, where the data are, to the end whose density is known."""
    seen = []

    def log_prob(v, x, log_rho, times, **_):
        seen.append((log_rho, times))
        return torch.zeros(len(x)), 0

    monkeypatch.setattr(it, "log_prob", log_prob)
    for flags in (["--out", "run"], ["--dataset", "eight_gaussians", "--source", "moons"]):
        assert call("interflow", *TINY, *flags)[0] == 0
    towards_noise = common.standard_normal_log_prob, (1.0, 0.0)
    assert seen == [towards_noise, (it.eight_gaussians_log_prob, (0.0, 1.0))]
    refused("learned with --interpolant trig", "interflow", "--sample", "run/checkpoint.pt",
            "--interpolant", "linear")  # fmt: skip


def test_source_images_of_written_samples_are_held_out(call, tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)
    starts = []
    transport = it.transport

    def recorded(v, x, *times, **solver):
        starts.append(x)
        return transport(v, x, *times, **solver)

    monkeypatch.setattr(it, "transport", recorded)
    for name, level in (("dark", 0), ("light", 255)):
        (tmp_path / name).mkdir()
        for i in range(11):
            shade = abs(level - i)
            Image.new("RGB", (8, 8), (shade,) * 3).save(tmp_path / name / f"{i:02}.png")
    flags = [*TINY[2:], "--dataset", "light", "--source", "dark", "--image-size", "8"]
    flags += ["--width", "4", "--mult", "1", "--blocks", "1", "--num-samples", "7"]
    code, _, err = call("interflow", *flags, "--out", "run")
    assert code == 0, err
    drawn = common.to_uint8(torch.cat(starts[-2:]))
    assert len(drawn) == 7  # two batches of at most four
    assert set(drawn.unique().tolist()) == {0, 10}  # every tenth image is held out


def test_bound_prints_distance_and_bound(call):
    arguments = ["--bound", "--steps", "60", "--batch-size", "64", "--warmup", "5", "--lr", "1e-2"]
    code, out, err = call("interflow", *arguments, "--out", "run")
    assert code == 0, err
    before, after = [r for r in records("run") if "bound" in r]
    assert before["split"] == "untrained"
    for figures in (before, after):
        assert figures["W2_squared"] <= figures["bound"]
    assert after["W2_squared"] < 0.5 * before["W2_squared"]
    assert call("interflow", "--sample", "run/checkpoint.pt")[0] == 0


def test_table_run(call):
    rows = np.random.default_rng(0).normal(size=(100, 3)) * [1, 10, 100]
    write_table("table.csv", rows, "a,b,c")
    code, _, err = call("interflow", *TINY, "--dataset", "table.csv", "--num-samples", "3")
    assert code == 0, err
    scored = {r["split"]: r for r in records("runs/interflow-table.csv") if "split" in r}
    assert scored["validation"]["examples"] == scored["test"]["examples"] == 4
    assert 4 < scored["test"]["nll"] < 25  # the normal's own: 3 * 1.42 + log 1000 = 11.2
    samples = np.load("runs/interflow-table.csv/samples.npz")["arr_0"]
    assert samples.shape == (3, 3)
    assert abs(samples[:, 2]).max() > 20  # in the units of the table: its deviation is 100


def test_a_checkpoint_keeps_to_its_source(call, refused):
    assert call("interflow", *TINY[2:], "--out", "run")[0] == 0
    sample = ["--sample", "run/checkpoint.pt"]
    wrong = [*sample, "--source", "eight_gaussians"]
    refused("learned with --source None: leave --source as it was", "interflow", *wrong)
    Path("run/checkpoint-eight_gaussians.pt").unlink()  # as if killed in the first flow
    code, out, err = call("interflow", *sample, "--out", "first")
    assert code == 0, err
    assert "eight_gaussians" not in out
    refused("a density twice", "interflow", *TINY, "--source", "a/t.csv,b/t.csv")


def test_a_fixed_solver_takes_the_evaluations_it_is_given(call):
    flags = ["--solver", "euler", "--nfe", "8", "--source", "normal", "--out", "run"]
    code, _, err = call("interflow", *TINY, *flags)
    assert code == 0, err
    assert {r["evaluations"] for r in records("run") if r.get("split") == "samples"} == {8}


def test_images(call, refused, pictures):
    arguments = [*TINY[2:], "--mult", "1,1", "--blocks", "1", "--tol", "0.1", "--dataset"]
    arguments += [pictures(), "--image-size", "16", "--time-beta", "0.75"]
    code, out, err = call("interflow", *arguments, "--num-samples", "2", "--out", "noise")
    assert code == 0, err
    assert "bits_per_dim" in out
    assert np.load("noise/samples.npz")["arr_0"].shape == (2, 16, 16, 3)
    other = pictures("others", n=40)
    code, out, err = call(
        "interflow", *arguments, "--source", other, "--out", "pairs", "--amp", "on"
    )
    assert code == 0, err
    assert "bits_per_dim" not in out
    with Image.open("pairs/samples.png") as grid:  # four images held out: starts above ends
        assert 1.5 < grid.width / grid.height < 3
    refused("images take one", "interflow", *arguments, "--source", f"normal,{other}")


BAD_FLAGS = [
    ("--source mooons", "unknown data set 'mooons'"),
    ("--source normal,normal", "names a density twice"),
    ("--interpolant cubic", "invalid choice: 'cubic'"),
    ("--learn --time-beta 0.75", "give --time-alpha 1 --time-beta 1"),
    ("--bound --source normal --dataset moons", "leave out --source"),
    ("--bound --width 8", "leave out --width"),
    ("--time-alpha 0", "a number above 0"),
    ("--terms 0", "at least 1"),
    ("--base-batch 0", "at least 1"),
    ("--time-batch -1", "at least 1"),
    ("--solver rk4 --nfe 3", "less than one step of rk4"),
    ("--divergence some", "invalid choice"),
    ("--dataset gone.csv", "there is no file gone.csv"),
    ("--flip", "not made of images"),
]


@pytest.mark.parametrize(("arguments", "pattern"), BAD_FLAGS)
def test_bad_flags(refused, arguments, pattern):
    refused(pattern, "interflow", *arguments.split(), "--steps", "2")


def test_table_nll_is_in_the_units_of_the_table(tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)
    rows = torch.randn(100, 3) * torch.tensor([1, 10, 100])
    np.save(tmp_path / "t.npy", rows.numpy())
    table, said = it.load_table(str(tmp_path / "t.npy")), {}
    run = types.SimpleNamespace(ema=lambda x, t: 0 * x, report=lambda split, **f: said.update(f))
    cfg = it.Config(tol=1e-3)
    it.report_likelihood(cfg, run, "test", table, table.test, common.standard_normal_log_prob)
    x = table.test.double() * table.std + table.mean
    exact = torch.distributions.Normal(table.mean, table.std).log_prob(x).sum(1)
    assert said["nll"] == pytest.approx(-exact.mean().item(), abs=1e-3)


def test_training_draws_times_and_dequantises_both_ends(tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)
    levels, y = torch.full((4, 1, 4, 4), 7, dtype=torch.uint8), torch.zeros(4).long()
    source, target = (common.Data(n, levels, y, levels, y) for n in "ab")
    small = {"steps": 1, "width": 8, "mult": (1,), "blocks": 1, "attention": None}
    times = {"time_alpha": 4.0, "time_beta": 1.0}
    cfg = it.Config(out=str(tmp_path), device="cpu", batch_size=600, **small, **times)
    net = it.InterFlow(common.network(cfg, target), it.make_interpolant(cfg))
    seen, G = [], it.G
    monkeypatch.setattr(it, "G", lambda *a: seen.append(a) or G(*a))
    it.train(cfg, common.Run(cfg, net, torch.device("cpu")), source, target)
    _, _, x_0, x_1, t = seen[0]
    assert t.mean().item() == pytest.approx(0.8, abs=0.04)  # alpha / (alpha + beta); 5 s.e.
    for x in (x_0, x_1):
        assert ((x + 1) * 128 % 1).std().item() == pytest.approx(12**-0.5, rel=0.02)


def test_end_errors_of_unlike_ends():
    """Ends of unlike variance, and slopes that are not 1: what is subtracted belongs to its end."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    x_0, x_1 = 3 * torch.randn(256, 784), torch.randn(256, 784)
    path = it.Interpolant(it.trigonometric)

    ends = it.diagnose(lambda x, t: 0 * x, path, x_0, x_1)  # exact at both ends, but nowhere else
    # noise to subtract: (pi/2)² (1, 9) 784 / 256 = 7.6, 68; their standard errors 0.4, 3.4
    assert ends["error_at_0"] < 1.3
    assert ends["error_at_1"] < 3.8


def test_likelihood_of_images_is_of_the_dequantised(tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)
    levels, y = torch.full((600, 1, 4, 4), 7, dtype=torch.uint8), torch.zeros(600).long()
    cfg, seen = it.Config(nll_examples=600, solver="euler", nfe=1), []
    monkeypatch.setattr(it, "report_likelihood", lambda *a: seen.append(a[4]))
    run = types.SimpleNamespace(
        ema=it.InterFlow(torch.nn.Identity(), it.make_interpolant(cfg)),
        device="cpu",
        folder=tmp_path,
        report=lambda *a, **k: None,
    )
    run.ema.forward = lambda x, t: 0 * x
    data = common.Data("grey", levels, y, levels, y)
    it.evaluate_images(cfg, run, it.Gaussian("normal", torch.zeros(1, 4, 4)), data)
    assert ((seen[0] + 1) * 128 % 1).std().item() == pytest.approx(12**-0.5, rel=0.05)
