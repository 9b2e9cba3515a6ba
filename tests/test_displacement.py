"""McCann 1997: interpolants, energies, ground states and assignments against closed forms."""

import itertools
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import common
import displacement as dp
from displacement import interpolate, quadratic

# Small enough for a test, whole enough to pass through every part.
TINY = ["--steps", "2", "--batch-size", "16", "--quantiles", "8"]
TIMES = dp.grid(0, 1, 21)


@pytest.fixture(autouse=True)
def _double(request):
    torch.manual_seed(0)
    if not {"call", "refused"} & set(request.fixturenames):  # the command line runs as it is
        torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def covariance(d, n=None):
    root = torch.randn(*([d, d] if n is None else [n, d, d]))
    return root @ root.mT + 0.1 * torch.eye(d)


def least_bend(values, times=TIMES):
    return dp.second_derivative(torch.stack(list(values)), times).min().item()


# ---- One dimension ------------------------------------------------------------------------------


def test_exponential_to_uniform():
    """Exp(1) -> U(2, 5): W2² = 6.5."""
    edges_0, edges_1 = dp.grid(0, 36, 20_001), torch.tensor([2.0, 5.0])
    p_0 = (-edges_0).exp().diff().neg()
    pieces = dp.monotone_rearrangement(edges_0, p_0, edges_1, torch.ones(1))
    # even density within the cells of width h moves each of their points by O(h²)
    assert_close(dp.line_wasserstein_squared(*pieces).item(), 6.5, rtol=0, atol=1e-5)


def test_uniform_to_uniform_is_exact():
    """T(x) = 1 + 3x; rho_t is uniform on [t, 1 + 3t], and W2² = int (1 + 2x)² dx = 13/3."""
    edges = dp.grid(0, 1, 8)
    mass, ends_0, ends_1 = dp.monotone_rearrangement(
        edges, torch.full((7,), 1 / 7), torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 2.0]) / 3
    )
    assert_close(ends_1, 1 + 3 * ends_0)
    assert_close(dp.line_wasserstein_squared(mass, ends_0, ends_1).item(), 13 / 3)
    for t in TIMES:
        ends = interpolate(ends_0, ends_1, t)
        assert_close(mass / ends.diff().squeeze(1), torch.full_like(mass, 1 / (1 + 2 * t)))


def random_histograms(gaps=True):
    """Two histograms on different edges, some of their cells empty."""
    edges = [
        torch.cat([torch.zeros(1), torch.rand(n).cumsum(0)]) - shift
        for n, shift in ((9, 2), (14, 0))
    ]
    p = [torch.rand(len(e) - 1) * (torch.rand(len(e) - 1) > (0.3 if gaps else 0)) for e in edges]
    return edges[0], p[0] / p[0].sum(), edges[1], p[1] / p[1].sum()


def test_levels_that_agree_but_for_rounding_leave_a_gap_empty():
    """F_0 = .1 + .2 is an ulp above F_1 = .3; beyond both lies a gap of rho_0."""
    edges_0, p_0 = torch.tensor([0.0, 1, 2, 12, 13]), torch.tensor([0.1, 0.2, 0.0, 0.7])
    edges_1, p_1 = torch.tensor([0.0, 1, 2]), torch.tensor([0.3, 0.7])
    mass, ends_0, ends_1 = dp.monotone_rearrangement(edges_0, p_0, edges_1, p_1)
    assert_close(mass, torch.tensor([0.1, 0.2, 0.7]))
    assert_close(ends_0, torch.tensor([[0.0, 1], [1, 2], [12, 13]]))
    back = dp.monotone_rearrangement(edges_1, p_1, edges_0, p_0)
    assert_close(torch.cat(back[1:]), torch.cat([ends_1, ends_0]))


@pytest.mark.parametrize("seed", range(5))
def test_rearrangement_keeps_both_marginals_and_the_order(seed):
    torch.manual_seed(seed)
    edges_0, p_0, edges_1, p_1 = random_histograms()
    mass, ends_0, ends_1 = dp.monotone_rearrangement(edges_0, p_0, edges_1, p_1)
    assert_close(mass.sum().item(), 1.0)
    assert_close(dp.histogram(mass, ends_0, edges_0), p_0, rtol=0, atol=1e-11)
    assert_close(dp.histogram(mass, ends_1, edges_1), p_1, rtol=0, atol=1e-11)
    for t in (0, 0.3, 1):
        assert (interpolate(ends_0, ends_1, t).flatten().diff() >= -1e-12).all()
    # quantile functions: W2² = int (Q_0 - Q_1)² du, by a fine rule in u
    u = (torch.arange(200_000) + 0.5) / 200_000
    Q = []
    for edges, p in ((edges_0, p_0), (edges_1, p_1)):
        F = torch.cat([torch.zeros(1), p.cumsum(0)])
        k = torch.searchsorted(F, u).clamp(1, len(p)) - 1
        Q.append(edges[k] + (u - F[k]) / p[k] * (edges[k + 1] - edges[k]))
    expected = (Q[0] - Q[1]).square().mean().item()
    assert_close(
        dp.line_wasserstein_squared(mass, ends_0, ends_1).item(), expected, rtol=1e-4, atol=0
    )


def test_tails_below_rounding_do_no_harm():
    edges = dp.grid(-30, 30, 2001)
    x = (edges[1:] + edges[:-1]) / 2
    p_0, p_1 = ((-(((x - m) / s) ** 2) / 2).exp() for m, s in ((-4, 0.5), (3, 1.5)))
    p_0, p_1 = p_0 / p_0.sum(), p_1 / p_1.sum()  # far away their masses are 1e-320
    mass, ends_0, ends_1 = dp.monotone_rearrangement(edges, p_0, edges, p_1)
    assert_close(dp.line_wasserstein_squared(mass, ends_0, ends_1).item(), 50.0, rtol=1e-4, atol=0)
    U = [
        dp.internal(mass, interpolate(ends_0, ends_1, t).diff().squeeze(1), dp.power_law(1))
        for t in TIMES
    ]
    expected = [
        -math.log(interpolate(0.5, 1.5, t)) - math.log(2 * math.pi * math.e) / 2 for t in TIMES
    ]
    assert_close(torch.stack(U), torch.tensor(expected), rtol=0, atol=2e-3)  # cells of 0.06 sigma
    assert least_bend(U) > 0.4  # 1 / sigma_t² >= 1 / 1.5²


def test_quadrature_is_exact_up_to_cubics():
    mass, ends = torch.tensor([0.3, 0.7]), torch.tensor([[-1.0, 2.0], [5.0, 5.5]])
    x, w = dp.quadrature(mass, ends)
    for k in range(4):
        a, b = ends.unbind(1)
        exact = (mass * (b ** (k + 1) - a ** (k + 1)) / ((k + 1) * (b - a))).sum()
        assert_close((w * x[:, 0] ** k).sum(), exact)


# ---- Gaussians ----------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 5])
def test_gaussian_map_and_distance(d):
    S_0, S_1 = covariance(d), covariance(d)
    A = dp.gaussian_map(S_0, S_1)
    assert_close(A @ S_0 @ A, S_1, rtol=1e-9, atol=1e-9)
    assert_close(A, A.T)  # T is a gradient ...
    assert torch.linalg.eigvalsh(A).min() > 0  # ... of a convex function
    m_0, m_1 = torch.randn(2, d)
    # int |x - T(x)|² drho_0 = |m_0 - m_1|² + tr (I - A) S_0 (I - A)
    gap = torch.eye(d) - A
    expected = (m_0 - m_1).square().sum() + (gap @ S_0 @ gap).trace()
    squared = dp.gaussian_wasserstein_squared(m_0, S_0, m_1, S_1)
    assert_close(squared, expected, rtol=1e-10, atol=0)
    s, t = 0.2, 0.9  # constant speed: W2(rho_s, rho_t) = |t - s| W2
    law_s = dp.gaussian_interpolation(m_0, S_0, m_1, S_1, s)
    law_t = dp.gaussian_interpolation(m_0, S_0, m_1, S_1, t)
    between = dp.gaussian_wasserstein_squared(*law_s, *law_t)
    assert_close(between, (t - s) ** 2 * squared, rtol=1e-9, atol=0)


def test_commuting_gaussians_interpolate_their_deviations():
    a, b = torch.tensor([0.5, 2.0, 1.0]), torch.tensor([3.0, 0.1, 1.0])
    m = torch.zeros(3)
    S_t = dp.gaussian_interpolation(m, a.square().diag(), m, b.square().diag(), 0.3)[1]
    assert_close(S_t, interpolate(a, b, 0.3).square().diag())
    squared = dp.gaussian_wasserstein_squared(m, a.square().diag(), m, b.square().diag())
    assert_close(squared, (a - b).square().sum())
    assert dp.gaussian_wasserstein_squared(m, a.diag(), m, a.diag()).item() < 1e-15


def test_nearly_singular_covariances():
    E = torch.linalg.qr(torch.randn(3, 3))[0]
    S_0 = E @ torch.tensor([1.0, 1e-3, 1e-12]).diag() @ E.T
    S_1 = covariance(3)
    A = dp.gaussian_map(S_0, S_1)  # stretches by 1e6
    root = dp.square_root(S_0)  # A S_0 A by its root: the product of S_0 itself would cancel
    assert_close((A @ root) @ (A @ root).T, S_1, rtol=1e-4, atol=1e-4)
    assert A.isfinite().all()
    flat = E @ torch.tensor([2.0, 1.0, 0.0]).diag() @ E.T  # a plane
    A = dp.gaussian_map(S_1, flat)
    assert_close(A @ S_1 @ A, flat, rtol=1e-9, atol=1e-9)
    assert_close(A @ E[:, 2], torch.zeros(3), rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match="no map"):
        dp.gaussian_map(flat, S_1)
    assert_close(
        dp.gaussian_map(flat, 4 * flat) @ E[:, :2], 2 * E[:, :2]
    )  # it can within its plane


def test_entropy_of_gaussians_and_its_second_derivative():
    S_0, S_1, m = covariance(3), covariance(3), torch.zeros(3)
    a = torch.linalg.eigvals(dp.gaussian_map(S_0, S_1)).real
    times = dp.grid(0, 1, 1001)
    laws = [dp.gaussian_interpolation(m, S_0, m, S_1, t)[1] for t in times]
    U = dp.gaussian_internal(torch.stack(laws), 1)
    assert_close(U, U[0] - torch.log(1 + times[:, None] * (a - 1)).sum(1), rtol=1e-9, atol=1e-9)
    bend = ((a - 1) / (1 + times[1:-1, None] * (a - 1))).square().sum(1)
    # differences: error h²/12 of the fourth derivative, 1e-7 times up to 6 max(a, 1/a)⁴
    assert_close(dp.second_derivative(U, times), bend, rtol=1e-2, atol=1e-3)
    assert bend.min() > 0
    normal = torch.distributions.MultivariateNormal(m, S_0)
    assert_close(U[0], -normal.entropy())


@pytest.mark.parametrize("q", [0.6, 1, 1.5, 2, 3])
def test_power_law_energy_of_a_gaussian_against_quadrature(q):
    S = torch.tensor([[0.8, 0.3], [0.3, 0.5]])
    x = dp.grid(-12, 12, 601)
    points = torch.cartesian_prod(x, x)
    rho = torch.distributions.MultivariateNormal(torch.zeros(2), S).log_prob(points).exp()
    U = dp.power_law(q)(rho).sum() * (x[1] - x[0]) ** 2
    # the rule is exact to rounding for Gaussians; the box cuts tails of exp(-0.6 144 / 1.9)
    assert_close(dp.gaussian_internal(S, q), U, rtol=1e-9, atol=1e-9)


# ---- Exact assignment ---------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 8))
def test_assignment_against_brute_force(n):
    for trial in range(8 if n < 7 else 2):
        cost = torch.randn(n, n)
        if trial % 2:
            cost = cost.mul(2).round()  # ties
        perm, u, v = dp.optimal_assignment(cost)
        best = min(
            sum(cost[i, j].item() for i, j in enumerate(p))
            for p in itertools.permutations(range(n))
        )
        assert sorted(perm.tolist()) == list(range(n))
        assert_close(cost[torch.arange(n), perm].sum().item(), best, rtol=0, atol=1e-12)
        assert (cost - u[:, None] - v).min() > -1e-12
        assert_close((u + v).sum().item(), best, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["plane", "random", "product", "ties"])
def test_assignment_of_512_is_certified_and_fast(kind):
    n = 512
    if kind == "plane":
        x_0, _ = common.DENSITIES["two_spirals"](n, torch.Generator().manual_seed(0))
        x_1, _ = common.DENSITIES["checkerboard"](n, torch.Generator().manual_seed(1))
        cost = torch.cdist(x_0.double(), x_1.double()).square()
    else:
        k = torch.arange(1.0, n + 1)
        costs = {"random": torch.rand(n, n), "product": torch.outer(k, k)}  # the latter: long paths
        cost = costs.get(kind, torch.randint(4, (n, n)).double())
    began = time.process_time()
    perm, u, v = dp.optimal_assignment(cost)
    assert time.process_time() - began < 2.0  # seconds of this process: 0.1 to 0.6 measured
    assert (perm.sort().values == torch.arange(n)).all()
    assert (cost - u[:, None] - v).min() > -1e-9 * cost.max()  # no permutation costs less than ...
    total = cost[torch.arange(n), perm].sum()
    assert_close((u + v).sum(), total, rtol=1e-12, atol=1e-12)  # ... this one


def test_assignment_on_a_line_is_sorting():
    x_0, x_1 = torch.randn(200, 1), torch.randn(200, 1) ** 3
    paired, dual = dp.optimal_pairs(x_0, x_1)
    order = x_0[:, 0].argsort()
    assert_close(paired[order], x_1.sort(dim=0).values)
    squared = dp.wasserstein_squared(x_0, paired, torch.full((200,), 1 / 200))
    assert_close(squared.item(), dual)
    # points of equal mass are histograms of cells without width
    edges = [
        torch.stack([x, x + 1e-9], 1).flatten() for x in (x_0[order, 0], x_1.sort(0).values[:, 0])
    ]
    even = torch.tensor([1.0, 0.0]).repeat(200)[:-1] / 200
    pieces = dp.monotone_rearrangement(edges[0], even, edges[1], even)
    assert_close(dp.line_wasserstein_squared(*pieces), squared, rtol=1e-7, atol=0)


def test_assignment_is_cyclically_monotone_and_tends_to_w2():
    S_0, S_1, m = covariance(2), covariance(2), torch.tensor([3.0, 0.0])
    x_0 = torch.randn(300, 2) @ dp.square_root(S_0)
    x_1 = m + torch.randn(300, 2) @ dp.square_root(S_1)
    paired, dual = dp.optimal_pairs(x_0, x_1)
    # sum <x_0, T x_0 - T of the next> >= 0 over random cycles
    for length in (2, 3, 5):
        cycles = torch.stack([torch.randperm(300)[:length] for _ in range(500)])
        a, b = x_0[cycles], paired[cycles]
        assert ((a * (b - b.roll(1, 1))).sum((1, 2)) > -1e-9).all()
    # Gelbrich: no laws of these means and covariances are nearer than the Gaussians are
    moments = [
        f(x) for x in (x_0, x_1) for f in (lambda x: x.mean(0), lambda x: x.T.cov(correction=0))
    ]
    bound = dp.gaussian_wasserstein_squared(*moments).item()
    assert bound < dual < 1.04 * bound
    part = paired[:100]  # pairs of an optimal pairing are optimal by themselves
    assert_close(dp.optimal_pairs(x_0[:100], part)[0], part)


def test_assignment_refuses_bad_costs():
    for cost in (torch.zeros(2, 3), torch.tensor([[1.0, math.nan], [0.0, 1.0]])):
        with pytest.raises(ValueError, match="finite square matrix"):
            dp.optimal_assignment(cost)


# ---- Push-forward and the link to flow matching --------------------------------------------------


CORNERS = torch.tensor([[2.0, 0.0], [1.0, -1.0], [0.0, 3.0]])


def curved_map(x):
    """Gradient of |x|²/4 + log(e^(2 x_1) + e^(x_1 - x_2) + e^(3 x_2)), which is convex."""
    corners = CORNERS.to(x)
    return x / 2 + (x @ corners.T).softmax(1) @ corners


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_push_forward_is_the_ratio_of_areas(t):
    x, h = torch.randn(50, 2), 1e-4
    x_t, log_rho = dp.push_forward(x, torch.zeros(50), curved_map, t)
    assert_close(x_t, interpolate(x, curved_map(x), t))
    sides = []
    for e in torch.eye(2):  # the sides of a small square's image, by central differences
        ahead, behind = (interpolate(x + s * e, curved_map(x + s * e), t) for s in (h, -h))
        sides.append((ahead - behind) / (2 * h))
    area = torch.linalg.det(torch.stack(sides, dim=1))
    assert_close(log_rho, -area.log(), rtol=0, atol=1e-6)


def test_push_forward_of_a_gaussian_is_gaussian():
    m_0, m_1, S_0, S_1 = torch.randn(3), torch.randn(3), covariance(3), covariance(3)
    A = dp.gaussian_map(S_0, S_1)
    x = torch.randn(20, 3)
    normal = torch.distributions.MultivariateNormal
    for t in (0.0, 0.5, 1.0):
        x_t, log_rho_t = dp.push_forward(
            x, normal(m_0, S_0).log_prob(x), lambda x: m_1 + (x - m_0) @ A, t
        )
        law = normal(*dp.gaussian_interpolation(m_0, S_0, m_1, S_1, t))
        assert_close(log_rho_t, law.log_prob(x_t), rtol=1e-9, atol=1e-9)


def test_push_forward_has_convex_entropy():
    """U_t = E log rho_t(x_t) over rho_0, a term of the proof a point: each is convex in t."""
    x = torch.randn(40, 2)
    log_rho = [dp.push_forward(x, torch.zeros(40), curved_map, t)[1] for t in TIMES.tolist()]
    bend = dp.second_derivative(torch.stack(log_rho, dim=1), TIMES)
    assert bend.min() > -1e-9
    assert bend.max() > 0.1


def test_ot_velocity_carries_one_gaussian_to_the_other_at_constant_speed():
    m_0, m_1, S_0, S_1 = torch.randn(2), torch.randn(2), covariance(2), covariance(2)
    v, A = dp.gaussian_velocity(m_0, S_0, m_1, S_1), dp.gaussian_map(S_0, S_1)
    x_0 = m_0 + torch.randn(30, 2) @ dp.square_root(S_0)
    x_1 = m_1 + (x_0 - m_0) @ A
    x, _ = common.odeint(v, x_0, TIMES, rtol=1e-10, atol=1e-10)
    for t, x_t in zip(TIMES, x, strict=True):
        assert_close(x_t, interpolate(x_0, x_1, t), rtol=0, atol=1e-8)
        assert_close(v(x_t, t.expand(30)), x_1 - x_0, rtol=0, atol=1e-7)
    euler, _ = common.odeint(v, x_0, (0.0, 1.0), method="euler", steps=1)
    assert_close(euler, x_1)  # straight paths: one step is exact


def test_ot_velocity_solves_the_continuity_equation():
    """d/dt log rho_t + v . grad log rho_t + div v = 0."""
    m_0, m_1, S_0, S_1 = torch.randn(2), torch.randn(2), covariance(2), covariance(2)
    v = dp.gaussian_velocity(m_0, S_0, m_1, S_1)
    x, t, h = torch.randn(10, 2).requires_grad_(), 0.3, 1e-5

    def log_rho(x, t):
        law = dp.gaussian_interpolation(m_0, S_0, m_1, S_1, t)
        return torch.distributions.MultivariateNormal(*law).log_prob(x)

    (gradient,) = torch.autograd.grad(log_rho(x, t).sum(), x)
    rate = (log_rho(x, t + h) - log_rho(x, t - h)) / (2 * h)
    velocity, div = common.divergence(v, x.detach(), torch.full((10,), t))
    residual = rate + (velocity * gradient).sum(1) + div
    assert_close(residual / (1 + rate.abs()), torch.zeros(10), rtol=0, atol=1e-6)


def test_flow_matching_on_exact_pairs_finds_the_velocity():
    """Regression of x_1 - x_0 on x_t: exact pairs leave no residual, independent ones do."""
    m_0, m_1, S_0 = torch.zeros(2), torch.tensor([2.0, 1.0]), torch.eye(2)
    S_1 = torch.tensor([[2.0, 0.8], [0.8, 0.6]])
    x_0 = torch.randn(256, 2)
    x_1 = m_1 + torch.randn(256, 2) @ dp.square_root(S_1)
    v = dp.gaussian_velocity(m_0, S_0, m_1, S_1)
    residuals = []
    for target in (dp.optimal_pairs(x_0, x_1)[0], x_1):
        x_t = interpolate(x_0, target, 0.5)
        features = torch.cat([x_t, torch.ones(256, 1)], dim=1)
        fit = torch.linalg.lstsq(features, target - x_0).solution
        residuals.append((target - x_0 - features @ fit).square().sum(1).mean().item())
        if len(residuals) == 1:
            error = features @ fit - v(x_t, torch.full((256,), 0.5))
            assert error.square().sum(1).mean().sqrt().item() < 0.2  # sampling: 1/sqrt(256) each
    assert residuals[0] < 0.1 < 1 < residuals[1]


# ---- Energies -----------------------------------------------------------------------------------


def test_potential_energy_is_exactly_one_convex():
    """F_t = (1-t) F_0 + t F_1 - t(1-t)/2 W2² for W = |x|²/2, for clouds and for densities."""
    x_0, x_1 = torch.randn(30, 3), 2 * torch.randn(30, 3) + 1
    x_1, squared = dp.optimal_pairs(x_0, x_1)
    even = torch.full((30,), 1 / 30)
    mass, ends_0, ends_1 = dp.monotone_rearrangement(*random_histograms())
    line = dp.quadrature(mass, ends_0), dp.quadrature(mass, ends_1)
    cases = [(x_0, x_1, even, squared)]
    cases.append(
        (line[0][0], line[1][0], line[0][1], dp.line_wasserstein_squared(mass, ends_0, ends_1))
    )
    for a, b, w, w2 in cases:
        F = torch.stack([dp.external(interpolate(a, b, t), w, quadratic) for t in TIMES])
        assert_close(F, interpolate(F[0], F[-1], TIMES) - TIMES * (1 - TIMES) / 2 * w2)


def test_interaction_energy_identity():
    """G = tr S_t / 2 for V = |x|²/2, so it is 1-convex with W2 of the centred laws."""
    x_0, x_1 = torch.randn(30, 2), 2 * torch.randn(30, 2) + 1
    x_1, _ = dp.optimal_pairs(x_0, x_1)
    even = torch.full((30,), 1 / 30)
    G = torch.stack([dp.interaction(interpolate(x_0, x_1, t), even, quadratic) for t in TIMES])
    assert_close(G[0], x_0.T.cov(correction=0).trace() / 2)  # with the factor 1/2 of G
    centred = dp.wasserstein_squared(x_0 - x_0.mean(0), x_1 - x_1.mean(0), even)
    assert_close(G, interpolate(G[0], G[-1], TIMES) - TIMES * (1 - TIMES) / 2 * centred)


def test_interaction_of_batches_and_of_a_density():
    # uniform on [0, 1]: int int |x - y|²/2 = 1/12, halved
    mass, ends = torch.full((4,), 0.25), torch.stack([dp.grid(0, 0.75, 4), dp.grid(0.25, 1, 4)], 1)
    assert_close(dp.interaction(*dp.quadrature(mass, ends), quadratic).item(), 1 / 24)
    assert_close(dp.external(*dp.quadrature(mass, ends), quadratic).item(), 1 / 6)
    x, w = torch.randn(3, 5, 2), torch.rand(3, 5)
    together = dp.interaction(x, w, dp.distance)
    assert_close(
        together,
        torch.stack([dp.interaction(a, b, dp.distance) for a, b in zip(x, w, strict=True)]),
    )
    assert dp.internal(torch.ones(2), torch.tensor([1.0, 0.0]), dp.power_law(1)) == torch.inf
    assert_close(
        dp.internal(torch.ones(1), torch.full((1,), 2.0), dp.power_law(1)).item(), -math.log(2)
    )


def mixture(x_0, x_1, w, t):
    return torch.cat([x_0, x_1]), torch.cat([(1 - t) * w, t * w])


def test_translates_have_constant_displacement_energy_and_concave_mixture_energy():
    """The reason for the paper: G(t) = tr S / 2 + t(1-t) |dm|² / 2 along the mixture."""
    x, shift = torch.randn(25, 2), torch.tensor([3.0, 4.0])
    even = torch.full((25,), 1 / 25)
    assert_close(dp.optimal_pairs(x, x + shift)[0], x + shift)
    displaced, mixed = [], []
    for t in TIMES:
        displaced.append(dp.interaction(interpolate(x, x + shift, t), even, quadratic))
        mixed.append(dp.interaction(*mixture(x, x + shift, even, t), quadratic))
    assert_close(torch.stack(displaced), displaced[0].expand(21))
    assert_close(torch.stack(mixed), displaced[0] + TIMES * (1 - TIMES) * 25 / 2)
    assert_close(least_bend(mixed), -25.0)


@pytest.mark.parametrize(
    "V", [quadratic, dp.distance, lambda x: x.square().sum(-1) ** 2, lambda x: x.sum(-1).cosh()]
)
def test_convex_potentials_give_convex_energies(V):
    x_0, x_1 = torch.randn(20, 2), torch.randn(20, 2) * torch.tensor([2.0, 0.3]) + 1
    x_1, _ = dp.optimal_pairs(x_0, x_1)
    even = torch.full((20,), 1 / 20)
    assert dp.is_convex(V, 2)
    for energy in (dp.interaction, dp.external):
        assert least_bend(energy(interpolate(x_0, x_1, t), even, V) for t in TIMES) > -1e-9
    if V is dp.distance:  # along the mixture G'' is minus the energy distance: never positive
        mixed = [dp.interaction(*mixture(x_0, x_1, even, t), V) for t in TIMES]
        within = sum(torch.cdist(a, a).mean() for a in (x_0, x_1))
        expected = within - 2 * torch.cdist(x_0, x_1).mean()
        assert_close(least_bend(mixed), expected.item(), rtol=1e-9, atol=0)
        assert expected < -0.1


def test_potentials_that_are_not_convex_are_found_out():
    double_well = lambda x: (x.square().sum(-1) - 1) ** 2  # noqa: E731
    for V in (double_well, lambda x: -quadratic(x), lambda x: x.norm(dim=-1).sqrt()):
        assert not dp.is_convex(V, 2)
    x_0, x_1 = torch.tensor([[-1.0, 0.0]]), torch.tensor([[1.0, 0.0]])  # over the hill
    one = torch.ones(1)
    assert least_bend(dp.external(interpolate(x_0, x_1, t), one, double_well) for t in TIMES) < -1


# ---- The condition on A -------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 3, 10])
def test_condition_on_power_laws(d):
    """rho^q / (q - 1) is displacement convex iff q >= 1 - 1/d."""
    for q in (0.2, 0.3, 0.49, 0.5, 0.6, 2 / 3, 0.8, 0.9, 0.95, 1, 1.5, 2, 3):
        holds = q >= 1 - 1 / d - 1e-12
        assert dp.condition_on_A(dp.power_law(q), d) == (holds, holds), (q, d)


def test_condition_on_other_laws():
    assert dp.condition_on_A(lambda rho: -rho.square(), 1) == (False, False)
    assert dp.condition_on_A(lambda rho: dp.power_law(1)(rho) + rho**3, 3) == (True, True)
    # lambda^2 A(lambda^-2) = lambda is convex, but it rises: the gas would pull itself together
    assert dp.condition_on_A(torch.sqrt, 2) == (False, False)
    rho = torch.tensor([0.5, 2.0])
    assert_close(dp.pressure(dp.power_law(1), rho), rho)  # ideal gas
    assert_close(dp.pressure(dp.power_law(3), rho), rho**3)


def test_violated_condition_makes_the_energy_concave():
    """d = 2, q = 0.3, sigma_t linear: U is proportional to -sigma_t^1.4; A itself is convex."""
    sigma = interpolate(0.5, 2.0, TIMES)
    S = sigma[:, None, None] ** 2 * torch.eye(2)
    U = dp.gaussian_internal(S, 0.3)
    assert_close(U / U[0], (sigma / sigma[0]) ** 1.4)
    assert dp.second_derivative(U, TIMES).max() < -0.1
    rho = dp.grid(0.01, 3, 50)
    assert (dp.power_law(0.3)(rho).diff(n=2) > 0).all()
    assert dp.second_derivative(dp.gaussian_internal(S, 0.7), TIMES).min() > 0.1


def two_bumps():
    """Disjoint uniform densities of widths 1 and 20, on one grid."""
    edges = dp.grid(0, 40, 401)
    p_0, p_1 = torch.zeros(400), torch.zeros(400)
    p_0[:10], p_1[200:] = 1 / 10, 1 / 200
    return edges, p_0, p_1


def test_internal_energy_along_both_paths():
    """U is convex along both; the entropy -U is concave, and its power exp(-U) along one only.

    On disjoint uniform densities of widths a and b the mixture has -U = (1-t) log a + t log b +
    h(t), h the entropy of a coin, so that (log exp(-U))'' = -1/(t(1-t)), but exp(-U)'' > 0 where
    (log b/a + log (1-t)/t)² exceeds 1/(t(1-t)): at t = 1/2, where (log 20)² = 8.97 > 4.
    """
    edges, p_0, p_1 = two_bumps()
    mass, ends_0, ends_1 = dp.monotone_rearrangement(edges, p_0, edges, p_1)
    A = dp.power_law(1)
    displaced = [
        dp.internal(mass, interpolate(ends_0, ends_1, t).diff().squeeze(1), A) for t in TIMES
    ]
    mixed = [dp.internal(interpolate(p_0, p_1, t), edges.diff(), A) for t in TIMES]
    assert_close(torch.stack(displaced), -torch.log(1 + 19 * TIMES), rtol=0, atol=1e-9)
    coin = torch.special.entr(TIMES) + torch.special.entr(1 - TIMES)
    assert_close(torch.stack(mixed), -TIMES * math.log(20) - coin, rtol=0, atol=1e-9)
    assert least_bend(displaced) > 0.5
    assert least_bend(mixed) > 3  # 1 / (t(1-t)) >= 4: U is no better a witness than G
    powers = [torch.exp(-torch.stack(U)) for U in (displaced, mixed)]
    assert_close(powers[0], 1 + 19 * TIMES, rtol=1e-9, atol=0)  # concave: here it is linear
    middle = dp.second_derivative(powers[1], TIMES)[9].item()
    # (f'' = f (f'² + ...)): closed form at 1/2, differences of step 0.05
    assert_close(middle, 2 * math.sqrt(20) * (math.log(20) ** 2 - 4), rtol=0.02, atol=0)
    assert middle > 40


def test_total_energy_of_a_gas_along_the_mixture_is_not_convex():
    """E = U + G of two far translates: convex along the displacement, not along the mixture."""
    edges = dp.grid(-5, 25, 301)
    p_0, p_1 = torch.zeros(300), torch.zeros(300)
    p_0[40:60], p_1[240:260] = 1 / 20, 1 / 20
    mass, ends_0, ends_1 = dp.monotone_rearrangement(edges, p_0, edges, p_1)
    cells = torch.stack([edges[:-1], edges[1:]], dim=1)

    def E(mass, ends):
        width = ends[:, 1] - ends[:, 0]
        U = dp.internal(mass, width, dp.power_law(1))
        return U + dp.interaction(*dp.quadrature(mass, ends), quadratic)

    displaced = [E(mass, interpolate(ends_0, ends_1, t)) for t in TIMES]
    mixed = [E(interpolate(p_0, p_1, t), cells) for t in TIMES]
    assert_close(torch.stack(displaced), displaced[0].expand(21), rtol=1e-9, atol=1e-9)
    assert least_bend(mixed) < -300  # -20² from G, at most +1/(t(1-t)) = 21 from U inside
    assert (torch.stack(mixed)[5:16] > displaced[0] + 30).all()


@pytest.mark.parametrize("seed", range(3))
def test_convexity_principle_for_random_densities(seed):
    torch.manual_seed(seed)
    mass, ends_0, ends_1 = dp.monotone_rearrangement(*random_histograms())
    widths = [interpolate(ends_0, ends_1, t).diff().squeeze(1) for t in TIMES]
    for q in (0.1, 0.5, 1, 2, 4):  # in 1-D every q >= 0
        U = [dp.internal(mass, width, dp.power_law(q)) for width in widths]
        assert least_bend(U) > -1e-9, q


# ---- Norm concavity and Brunn-Minkowski ---------------------------------------------------------


def norm(S, q):
    """||rho||_q^(-p/d) of a Gaussian."""
    return dp.norm_power((q - 1) * dp.gaussian_internal(S, q), q, S.shape[-1])


def test_norms_of_gaussians_are_concave():
    """||rho_t||_q^(-p/d) is a multiple of det(S_t)^(1/(2d)): Minkowski's inequality."""
    S_0, S_1, m = covariance(3), covariance(3), torch.zeros(3)
    S_t = torch.stack([dp.gaussian_interpolation(m, S_0, m, S_1, t)[1] for t in TIMES])
    for q in (0.7, 2, 5):
        values = norm(S_t, q)
        expected = torch.linalg.det(S_t) ** (1 / 6)
        assert_close(values / values[0], expected / expected[0])
        assert dp.second_derivative(values, TIMES).max() < -1e-3
        # p and q as they stand: p = q/(q-1), ||rho||_q = (int rho^q)^(1/q)
        integral = (q - 1) * dp.gaussian_internal(S_0, q)
        assert_close(values[0], (integral ** (1 / q)) ** (-q / (q - 1) / 3))
    S_t = torch.stack([dp.gaussian_interpolation(m, S_0, m, 9 * S_0, t)[1] for t in TIMES])
    assert_close(dp.second_derivative(norm(S_t, 2), TIMES), torch.zeros(19), rtol=0, atol=1e-9)


@pytest.mark.parametrize("q", [0.3, 0.7, 2, 4])
def test_norms_of_densities_on_a_line_are_concave(q):
    for seed in range(4):
        torch.manual_seed(seed)
        mass, ends_0, ends_1 = dp.monotone_rearrangement(*random_histograms())
        widths = [interpolate(ends_0, ends_1, t).diff().squeeze(1) for t in TIMES]
        values = [dp.norm_power(dp.internal(mass, w, lambda r: r**q), q, 1) for w in widths]
        assert least_bend([-value for value in values]) > -1e-9


def test_boxes():
    """Uniform on boxes: T is linear, and every norm is vol^(1/d)."""
    a, b = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([3.0, 0.5, 1.0])
    volumes = interpolate(a, b, TIMES[:, None]).prod(1)
    for q in (0.7, 2, 7):
        integral = volumes ** (1 - q)
        assert_close(dp.norm_power(integral, q, 3), volumes ** (1 / 3))
    assert dp.second_derivative(volumes ** (1 / 3), TIMES).max() < -0.1


def rectangle(a, b):
    return torch.tensor([[a, 0.0], [-a, 0.0], [0.0, b], [0.0, -b]])


def test_areas_and_minkowski_sums_of_polygons():
    assert_close(dp.area(rectangle(3.0, 2.0)).item(), 6.0)
    angle = torch.arange(7) * (2 * math.pi / 7)
    corners = torch.stack([angle.cos(), angle.sin()], dim=1)
    edges = corners.roll(-1, 0) - corners
    assert_close(dp.area(edges[torch.randperm(7)]).item(), 3.5 * math.sin(2 * math.pi / 7))
    K, L, t = rectangle(1.0, 4.0), rectangle(2.0, 1.0), 0.25
    assert_close(dp.area(dp.minkowski(K, L, t)).item(), 1.25 * 3.25)
    # mixed areas: |K + L| = |K| + |L| + 2 V(K, L), and for a triangle T: V(T, -T) = 2 |T|
    triangle = torch.tensor([[1.0, 0.0], [-0.5, 1.0], [-0.5, -1.0]])
    hexagon = 4 * dp.area(dp.minkowski(triangle, -triangle, 0.5))
    assert_close(hexagon, 6 * dp.area(triangle))


def test_brunn_minkowski_on_random_polygons():
    K, L = torch.randn(2, 500, 6, 2)
    K, L = (e - e.mean(1, keepdim=True) for e in (K, L))
    assert (dp.area(K) > 0).all()
    excess = torch.stack([dp.brunn_minkowski_excess(K, L, t) for t in TIMES], dim=1)
    assert excess[:, 1:-1].min() > 0
    assert dp.second_derivative(excess, TIMES).max() < 1e-9  # concave, not only above its chord
    same = dp.brunn_minkowski_excess(K, 3 * K, 0.3)  # homothetic: equality
    assert_close(same, torch.zeros(500), rtol=0, atol=1e-12)


# ---- Ground states ------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [1, 1.5, 2, 3])
def test_ground_states_are_stationary_with_mass_one(q):
    x = dp.grid(-12, 12, 240_001)
    h = x[1] - x[0]
    rho, energy = dp.ground_state(x, q)
    assert_close((rho.sum() * h).item(), 1.0, rtol=0, atol=1e-6)
    variance = (rho * x**2).sum() * h
    total = dp.power_law(q)(rho).sum() * h + variance / 2  # G = int int |x-y|²/4 = variance / 2
    assert_close(total.item(), energy, rtol=0, atol=1e-6)
    inside = rho > 1e-3  # Euler and Lagrange: A'(rho) + x²/2 is constant there
    slope = torch.func.vmap(torch.func.grad(dp.power_law(q)))(rho[inside])
    force = slope + x[inside] ** 2 / 2
    assert_close(force, force.mean().expand_as(force), rtol=0, atol=1e-9)


def test_ground_states_in_closed_form():
    rho, energy = dp.ground_state(torch.tensor([0.0, 1.0, 1.5]), 2)
    c = (3 / 8) ** (2 / 3)
    assert_close(rho, torch.tensor([c, c - 0.25, 0.0]))
    assert_close(energy, 1.2 * c)
    assert_close(dp.ground_state(torch.zeros(1), 1)[1], -math.log(2 * math.pi) / 2)


def test_energy_of_a_gas_is_that_of_its_density():
    """E of N even cells is exact, so never below the minimum; it tends to the closed form."""
    for i, q in enumerate((1, 2)):
        least = dp.ground_state(torch.zeros(1), q)[1]
        Q = dp.starts(30).repeat(2, 1, 1)
        assert (dp.gas_energy(Q, dp.both_gases)[i] > least + 0.01).all()
        u = torch.arange(1, 400) / 400
        if q == 1:
            Q = torch.special.ndtri(u)
        else:  # Newton's steps to F(x) = 1/2 + c x - x³/12 = u
            c, Q = (3 / 8) ** (2 / 3), torch.zeros_like(u)
            for _ in range(60):
                Q = Q - (0.5 + c * Q - Q**3 / 12 - u) / (c - Q**2 / 4).clamp(min=0.02)
        Q = torch.cat([2 * Q[:1] - Q[1:2], Q, 2 * Q[-1:] - Q[-2:-1]])
        E = dp.gas_energy(Q.repeat(2, 1), dp.both_gases)[i].item()
        assert least < E < least + 0.01


def test_uniform_gas_in_closed_form():
    """Uniform of width w: U = -log w or 1/w, G = w²/24; widths stretch without loss."""
    for w in (0.5, 3.0):
        E = dp.gas_energy((w * dp.grid(0, 1, 11)).repeat(2, 1), dp.both_gases)
        assert_close(E, torch.tensor([-math.log(w), 1 / w]) + w**2 / 24)


def test_parameter_has_the_length_of_wasserstein_space():
    Q, shift = dp.starts(50), torch.linspace(-1, 2, 51)
    assert_close(dp.mean(Q), dp.grid(-8, 8, 5))
    assert ((1 / 50) / Q.diff() < 0.6).all()  # densities
    net = dp.Gases(Q)
    assert_close(net(), Q)
    length = ((net.root * shift) ** 2).sum().item()
    trapezoid = torch.trapezoid(shift**2, dx=1 / 50).item()
    assert_close(length, trapezoid)
    loss = dp.gas_energy(net()[None].repeat(2, 1, 1), dp.both_gases).sum()
    loss.backward()
    # the centre of mass does not move: the force of the gas on itself is zero
    assert_close((net.theta.grad * net.root).sum(1), torch.zeros(5), rtol=0, atol=1e-10)


def test_descent_follows_the_gradient_flow():
    """The flow of int rho log rho + G from N(0, s²) stays Gaussian: s_t² = 1 + (s² - 1) e^(-2t)."""
    N, step, s = 32, 1e-3, 2.0
    u = (torch.arange(N + 1) + 0.0) / N
    u[0], u[-1] = 0.25 / N, 1 - 0.25 / N
    net = dp.Gases((s * torch.special.ndtri(u)).repeat(2, 1, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=step)
    for _ in range(400):
        optimizer.zero_grad()
        dp.gas_energy(net(), dp.both_gases)[0].sum().backward()
        optimizer.step()
    middle = slice(N // 8, -N // 8)  # away from the ends, where cells are wide
    ratio = (net()[0, 0] / (s * torch.special.ndtri(u)))[middle]
    ratio = ratio[(u[middle] - 0.5).abs() > 0.1]
    expected = math.sqrt(1 + (s**2 - 1) * math.exp(-2 * 400 * step)) / s
    assert_close(ratio.mean().item(), expected, rtol=0.01, atol=0)
    assert expected < 0.8  # it has moved


def test_every_start_descends_to_the_ground_state(tmp_path):
    cfg = dp.Config(out=str(tmp_path), steps=700, quantiles=12, lr=8e-3)
    run, _, _ = dp.prepare(cfg)
    least = torch.tensor([dp.ground_state(torch.zeros(1), q)[1] for q in (1, 2)])
    before = dp.gas_energy(run.net(), dp.both_gases) - least[:, None]
    means = dp.mean(run.net().detach())
    dp.train(run)
    Q = run.net().detach()
    after = dp.gas_energy(Q, dp.both_gases) - least[:, None]
    assert (before.min(1).values > torch.tensor([0.25, 0.02])).all()
    assert before.mean() > 0.4
    assert (after > 0).all()  # upper bounds of the minimum ...
    assert (
        after.max(1).values < torch.tensor([0.05, 0.01])
    ).all()  # ... that 12 cells come near to
    assert_close(dp.mean(Q), means)  # each where it began: unique up to translation
    centred = Q - dp.mean(Q)[..., None]
    assert (centred - centred[:, :1]).abs().max() < 1e-3
    edges = dp.grid(-8, 8, 2001)
    even = torch.full((12,), 1 / 12)
    for i, q in enumerate((1, 2)):  # E is 1-convex among centred laws: W2² <= 2 (E - E_min)
        rho, _ = dp.ground_state((edges[1:] + edges[:-1]) / 2, q)
        pieces = dp.monotone_rearrangement(centred[i, 0], even, edges, rho)
        assert dp.line_wasserstein_squared(*pieces) < 2 * after[i, 0] + 1e-6


# ---- Devices and the command line ---------------------------------------------------------------


def test_losses_and_fields_keep_to_their_device():
    def meta(*shape):
        return torch.empty(*shape, device="meta")

    gases = dp.Gases(dp.starts(8).repeat(2, 1, 1)).to("meta")
    loss = dp.gas_energy(gases(), dp.both_gases).sum()
    loss.backward()
    assert loss.is_meta
    assert gases.theta.grad.is_meta
    x_0, x_1, mass = meta(6, 2), meta(6, 2), meta(6)
    assert interpolate(x_0, x_1, 0.5).is_meta
    assert dp.wasserstein_squared(x_0, x_1, mass).is_meta
    for energy in (dp.external, dp.interaction):
        assert energy(x_0, mass, dp.distance).is_meta
    assert all(x.is_meta for x in dp.quadrature(mass, meta(6, 2)))
    assert all(x.is_meta for x in dp.push_forward(x_0, mass, curved_map, 0.5))
    assert dp.gaussian_internal(meta(4, 2, 2), 2).is_meta
    assert dp.brunn_minkowski_excess(meta(3, 5, 2), meta(3, 5, 2), 0.5).is_meta


def test_train_resume_sample(call, refused):
    folder = Path("runs/displacement-moons")
    flags = [*TINY, "--source", "rings", "--dataset", "moons", "--num-samples", "20"]
    code, out, err = call("displacement", *flags, "--time", "0.25")
    assert code == 0, err
    assert f"see {folder}/samples.png" in out
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    figures = {line["split"]: line for line in lines if "split" in line}
    assert figures["U, least d2/dt2"]["displacement"] > -1e-6  # convex along the interpolation
    assert figures["G, least d2/dt2"]["mixture"] < 0 < figures["G, least d2/dt2"]["displacement"]
    assert figures["clouds"]["unpaired"] > 1.05 * figures["clouds"]["W2"] > 0
    files = {"config.json", "metrics.jsonl", "checkpoint.pt", "samples.png", "samples.npz"}
    assert files <= {path.name for path in folder.iterdir()}
    samples = np.load(folder / "samples.npz")["arr_0"]
    assert samples.shape == (20, 2)
    assert samples.dtype == np.float32
    assert call("displacement", "--dataset", "moons", "--resume", "--steps", "5")[0] == 0
    resumed = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert call("displacement", *flags, "--steps", "5", "--out", "whole")[0] == 0
    whole = torch.load("whole/checkpoint.pt", weights_only=True)
    assert resumed["step"] == whole["step"] == 5
    assert torch.equal(resumed["model"]["theta"], whole["model"]["theta"])  # bit for bit
    assert not torch.equal(
        whole["model"]["theta"], whole["model"]["start"] * whole["model"]["root"]
    )
    code, out, err = call("displacement", "--sample", folder / "checkpoint.pt")
    assert code == 0, err
    assert "Brunn-Minkowski: pairs" in out
    assert (folder / "samples" / "samples.png").exists()
    refused("does not fit", "displacement", "--sample", "whole/checkpoint.pt", "--quantiles", "9")


def test_samples_lie_on_rho_t(tmp_path):
    """At t = 0 they are the source, at t = 1 the target."""
    torch.set_default_dtype(torch.float32)
    cfg = dp.Config(source="rings", dataset="eight_gaussians", out=str(tmp_path), steps=0)
    cfg.batch_size = 128
    _, source, data = dp.prepare(cfg)
    radii = []
    for cfg.time in (0.0, 1.0):
        radii.append(dp.draw(cfg, source, data, 64).norm(dim=1))
    cfg.time, parts = 0.5, []
    for n in (cfg.batch_size, 3):  # few come from as large a cloud as many
        torch.manual_seed(1)
        parts.append(dp.draw(cfg, source, data, n))
    assert torch.equal(parts[0][:3], parts[1])
    assert ((radii[0] - 0.5 * (2 * radii[0]).round()).abs() < 0.2).all()  # on the rings, 5 sigma
    assert ((radii[1] - 2).abs() < 0.75).all()  # on the eight modes


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        ("--source nonsense", "'nonsense' is no 2-D density.*checkerboard"),
        ("--dataset glyphs", "'glyphs' is no 2-D density"),
        ("--dataset mnist", "'mnist' is no 2-D density"),
        ("--image-size 8", "not made of images"),
        ("--time 1.5", r"a number in \[0, 1\]"),
        ("--time -0.1", r"a number in \[0, 1\]"),
        ("--quantiles 0", "at least 1"),
        ("--amp on", "leave out --amp and --compile"),
        ("--compile", "leave out --amp and --compile"),
        ("--batch-size 0", "at least 1"),
        ("--lr 0", "a number above 0"),
        ("--decay steep", "invalid choice"),
        ("--lr 1 --steps 60", "the loss is (inf|nan) at step.*smaller --lr"),
        ("--sample nowhere.pt", "no checkpoint at nowhere.pt"),
        ("--points 3", "unrecognized arguments: --points"),
    ],
)
def test_bad_flags(refused, flags, pattern):
    quick = [] if "--steps" in flags else ["--steps", "2"]
    refused(pattern, "displacement", *flags.split(), *quick)


def test_a_step_that_is_too_long_is_refused_before_anything_is_saved(refused):
    refused("nothing was saved", "displacement", "--lr", "0.1", "--steps", "60", "--out", "bad")
    assert not Path("bad/checkpoint.pt").exists()
