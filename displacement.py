"""A Convexity Principle for Interacting Gases. McCann, Advances in Mathematics 128 (1997), 153-179

Implements  Definition 1.1 (displacement interpolation), Example 1.7 (between Gaussians; Bures'
            formulas); as the paper's abstract states them, p. 153: [convexity principle], [norm
            concavity]. By name, where no place could be verified: [monotone rearrangement] (one
            dimension), [push-forward] (with the Jacobian determinant), [internal energy],
            [interaction energy], [pressure], [condition on A], [convex potentials], [ground state],
            [Brunn-Minkowski]. Ours or later: [optimal assignment] (of point clouds, which are no
            densities), [external potential], [velocity]
Conventions t = 0 is rho_0, t = 1 is rho_1, both given; T = grad psi, psi convex, T_# rho_0 = rho_1.
            E = U + F + G: U = int A(rho) dx, F = int W drho, G = 1/2 iint V(x - y) drho drho (the
            abstract's potential energy); the 1/2 stands in G alone. Energies are in float64.
Departures  1. A theory paper: every example here is ours. The gas has V = |x|²/2 (quadratic
               attraction), whose ground states are closed forms.
            2. The external potential W and descent in Wasserstein space are later literature's.
            3. Along mixtures U is convex too, as the condition makes A convex; F is linear. It is
               G whose convexity fails there, and the concavity of the norm.
Run         python displacement.py         10 s; convex where the paper says so, to rounding errors;
              ten gases end at W2 0.042 (A = rho log rho) and 0.004 (rho^2) from the closed form
            python displacement.py --source moons --dataset rings --batch-size 2048
            python displacement.py --num-samples 4096 --time 0.5       points of rho_1/2
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import torch
from torch import nn

import common
from common import Count, Natural, Positive, UserError

Instant = Annotated[float, lambda v: 0 <= v <= 1, "a number in [0, 1]"]


@dataclass
class Config(common.Config):
    dataset: str = "checkerboard"  # rho_1 of the point clouds: a 2-D density's name
    source: str = "two_spirals"  # rho_0 of the point clouds, likewise
    steps: Natural = 4_000  # steps of the descent to the ground state
    batch_size: Count = 1024  # points of each cloud; the assignment's time grows as their cube
    lr: Positive = 1.3e-3  # step of the descent; the explicit scheme's bound falls as 1/quantiles²
    warmup: Natural = 0  # steps of linear rise to the peak
    decay: Literal["constant", "linear", "cosine"] = "constant"  # of the step
    clip: Positive | None = None  # largest norm of the gradient
    ema: common.Fraction | None = None  # the gas itself, no average
    device: str = "cpu"  # cpu, or any torch device that knows float64
    quantiles: Count = 32  # N, the equal masses that make up a gas
    time: Instant = 0.5  # t of the rho_t that --num-samples writes


PRESETS = {}  # no data set changes a setting


# ---- Displacement interpolation -----------------------------------------------------------------


def interpolate(x_0, x_1, t):
    """Where what stood at x_0 and shall stand at x_1 = T(x_0) is at time t: rho_t's points."""
    return (1 - t) * x_0 + t * x_1  # Definition 1.1: rho_t = [(1-t) id + tT]_# rho_0


def wasserstein_squared(x_0, x_1, mass):
    """W2² = int |x - T(x)|² drho_0 of optimal pairs x_0, x_1 (n, D) of masses (n,)."""
    return (mass * (x_0 - x_1).square().sum(-1)).sum(-1)


# In one dimension a density is a list of pieces: piece k spreads mass[k] evenly over the interval
# ends[k], (M, 2). Pieces of two densities that are paired in order give T, affine on every piece.


def monotone_rearrangement(edges_0, p_0, edges_1, p_1):
    """Cut two histograms at each other's quantiles. No grid of levels; gaps are allowed.

    edges_i (K+1,) rise; p_i (K,) >= 0 are the cells' masses, spread evenly in a cell, of sum 1.
    Returns mass (M,), ends_0 (M, 2), ends_1 (M, 2).
    """
    F_0, F_1 = (torch.cat([p.new_zeros(1), p.cumsum(0)]) for p in (p_0, p_1))
    F_0, F_1 = F_0 / F_0[-1], F_1 / F_1[-1]
    u = torch.cat([F_0, F_1]).sort().values
    u = torch.cat([u[:1], u[1:][u.diff() > 1e-12]])  # lighter pieces drown in rounding: joined
    u[-1] = 1
    F_0, F_1 = (u[torch.searchsorted(u, F + 1e-12, right=True) - 1] for F in (F_0, F_1))

    def quantiles(edges, F):
        def Q(u, right):  # the limit from the right, or from the left
            k = torch.searchsorted(F, u, right=right) - 1
            return edges[k] + (u - F[k]) / (F[k + 1] - F[k]) * (edges[k + 1] - edges[k])

        return torch.stack([Q(u[:-1], right=True), Q(u[1:], right=False)], dim=1)

    return u.diff(), quantiles(edges_0, F_0), quantiles(edges_1, F_1)  # [monotone rearrangement]


def histogram(mass, ends, edges):
    """The masses (K,) that pieces in rising order have in the cells between edges (K+1,)."""
    F = torch.cat([mass.new_zeros(1), mass.cumsum(0)])
    F = torch.stack([F[:-1], F[1:]], 1).flatten()
    return torch.from_numpy(np.interp(edges.cpu(), ends.flatten().cpu(), F.cpu())).diff()


def quadrature(mass, ends):
    """Two Gauss points a piece, x (..., 2M, 1) and masses (..., 2M): exact up to cubics.

    They move on straight lines under `interpolate`, so that energies stay exactly convex.
    """
    middle, half = ends.mean(-1), (ends[..., 1] - ends[..., 0]) / math.sqrt(12)
    x = torch.cat([middle - half, middle + half], dim=-1)
    return x[..., None], torch.cat([mass, mass], dim=-1) / 2


def line_wasserstein_squared(mass, ends_0, ends_1):
    """W2² = int (Q_0 - Q_1)² du of two densities in 1-D."""
    x, w = quadrature(mass, ends_0 - ends_1)
    return wasserstein_squared(x, 0, w)


def square_root(S):
    """S^(1/2) of a positive semi-definite S (D, D); eigenvalues of the size of rounding are 0."""
    values, vectors = torch.linalg.eigh(S)
    noise = len(S) * torch.finfo(S.dtype).eps * values[-1].clamp(min=0)
    return (vectors * values.where(values > noise, 0).sqrt()) @ vectors.T


def gaussian_map(S_0, S_1):
    """A with T(x) = m_1 + A (x - m_0) from N(m_0, S_0) to N(m_1, S_1): A S_0 A = S_1, A >= 0.

    A = S_1^½ (S_1^½ S_0 S_1^½)^(-½) S_1^½ divides by the root of a nearly singular S_0, not by S_0;
    singular values of S_0^½ S_1^½ keep full precision. Raises ValueError where no map exists.
    """
    root_1 = square_root(S_1)
    _, s, Vh = torch.linalg.svd(square_root(S_0) @ root_1)
    kept = s > 1e-12 * s[0]
    W = root_1 @ Vh.T
    if W[:, ~kept].norm() > 1e-6 * W.norm():
        raise ValueError("S_1 has directions that S_0 lacks: no map carries one to the other")
    return W[:, kept] / s[kept] @ W[:, kept].T  # Example 1.7


def gaussian_wasserstein_squared(m_0, S_0, m_1, S_1):
    """|m_0 - m_1|² + tr S_0 + tr S_1 - 2 tr (S_0^½ S_1 S_0^½)^½."""
    s = torch.linalg.svdvals(square_root(S_0) @ square_root(S_1))
    bures = (S_0.trace() + S_1.trace() - 2 * s.sum()).clamp(min=0)
    return (m_0 - m_1).square().sum() + bures


def gaussian_interpolation(m_0, S_0, m_1, S_1, t):
    """m_t, S_t of the displacement interpolant, which is a Gaussian too."""
    B = interpolate(torch.eye(len(S_0), dtype=S_0.dtype), gaussian_map(S_0, S_1), t)
    return interpolate(m_0, m_1, t), B @ S_0 @ B  # Definition 1.1


def gaussian_velocity(m_0, S_0, m_1, S_1):
    """The field v(x, t) whose flow carries N(m_0, S_0) along rho_t: v at x_t is T(x_0) - x_0."""
    a, E = torch.linalg.eigh(gaussian_map(S_0, S_1))  # A = E diag(a) Eᵀ, B_t = (1-t) I + t A

    def v(x, t):  # (B, D), (B,) -> (B, D)
        y = (x - interpolate(m_0, m_1, t[:, None])) @ E
        return m_1 - m_0 + ((a - 1) / interpolate(1, a, t[:, None]) * y) @ E.T  # [velocity]

    return v


def optimal_assignment(cost):
    """The permutation that minimises sum_i cost[i, perm[i]], with its certificate.

    Shortest augmenting paths: Dijkstra over the reduced costs cost_ij - u_i - v_j >= 0 leads from
    each free row to a free column, closing one column a round; a round is O(n) in numpy.

    Returns perm int64 (n,), u (n,), v (n,): u_i + v_j <= cost_ij, with equality on the pairs, so
    that no permutation is cheaper. cost (n, n) of any sign; raises ValueError if not finite.
    """
    c = np.asarray(cost.detach().cpu(), dtype=np.float64)
    n = len(c)
    if c.shape != (n, n) or not np.isfinite(c).all():
        raise ValueError(f"the costs must be a finite square matrix, not of shape {c.shape}")
    v = c.min(axis=0)
    u = (c - v).min(axis=1)
    nearest = (c - v).argmin(axis=1)
    row_of, column_of = np.full(n, -1), np.full(n, -1)
    row_of[nearest] = np.arange(n)  # of the rows that want a column the last has it
    taken = np.flatnonzero(row_of >= 0)
    column_of[row_of[taken]] = taken
    for start in np.flatnonzero(column_of < 0):
        reach, came_from = np.full(n, np.inf), np.full(n, -1)  # by open columns' shortest paths
        price = v.copy()  # -inf once a column is closed
        closed, lengths, row, length = [], [], start, 0.0
        while row >= 0:
            through_row = c[row] - price + (length - u[row])
            shorter = through_row < reach
            reach[shorter] = through_row[shorter]
            came_from[shorter] = row
            column = reach.argmin()
            length = reach[column]
            reach[column], price[column] = np.inf, -np.inf
            closed.append(column)
            lengths.append(length)
            row = row_of[column]
        inner = closed[:-1]
        rise = length - np.array(lengths[:-1])
        v[inner] -= rise
        u[row_of[inner]] += rise
        u[start] += length
        while row != start:  # swap along the path
            row = came_from[column]
            row_of[column] = row
            column_of[row], column = column, column_of[row]
    return tuple(torch.from_numpy(x) for x in (column_of, u, v))  # [optimal assignment]


def optimal_pairs(x_0, x_1):
    """x_1 (n, D) in the order in which x_0 (n, D) is carried to it, and the dual's W2²."""
    mode = "donot_use_mm_for_euclid_dist"  # which cancels
    perm, u, v = optimal_assignment(torch.cdist(x_0, x_1, compute_mode=mode).square())
    return x_1[perm.to(x_1.device)], (u + v).mean().item()


def push_forward(x, log_rho, T, t):
    """x (B, D) and log rho_0(x) (B,) -> x_t (B, D) and log rho_t(x_t) (B,).

    T: (B, D) -> (B, D), row by row, the gradient of a convex function.
    """
    DT = torch.func.vmap(torch.func.jacrev(lambda x: T(x[None])[0]))(x)  # (B, D, D)
    B = interpolate(torch.eye(x.shape[1], dtype=x.dtype, device=x.device), DT, t)
    return interpolate(x, T(x), t), log_rho - torch.logdet(B)  # [push-forward]


# ---- Energies and McCann's conditions -----------------------------------------------------------


def power_law(q):
    """A(rho) = rho^q / (q - 1); at q = 1 its limit up to a multiple of rho, the entropy's."""
    return lambda rho: torch.xlogy(rho, rho) if q == 1 else rho**q / (q - 1)


def quadratic(x):
    return x.square().sum(-1) / 2


def distance(x):
    return x.norm(dim=-1)


def internal(mass, width, A):
    """U of cells (..., M) of even density; inf where a cell has no width."""
    return torch.where(width > 0, width * A(mass / width), torch.inf).sum(-1)  # [internal energy]


def external(x, mass, W):
    """F of points (..., n, D) with masses (..., n)."""
    return (mass * W(x)).sum(-1)  # [external potential]


def interaction(x, mass, V):
    """G of points x (..., n, D) with masses (..., n)."""
    V_xy = V(x[..., :, None, :] - x[..., None, :, :])  # (..., n, n)
    return (mass * (V_xy @ mass[..., None]).squeeze(-1)).sum(-1) / 2  # [interaction energy]


def pressure(A, rho):
    """P(rho) = rho A'(rho) - A(rho), (n,) -> (n,)."""
    return rho * torch.func.vmap(torch.func.grad(A))(rho) - A(rho)  # [pressure]


def condition_on_A(A, d):
    """Whether int A(rho) is displacement convex in d dimensions, tried on a grid of four decades.

    Returns (lambda^d A(lambda^-d) is convex and non-increasing, P >= 0 and P / rho^((d-1)/d) does
    not fall). The two agree: the former's derivative is -d lambda^(d-1) P at rho = lambda^-d.
    """
    x = torch.logspace(-2, 2, 401, dtype=torch.float64)
    slope = (x**d * A(x**-d)).diff() / x.diff()
    P = pressure(A, x)
    ratio = P / x ** ((d - 1) / d)
    convex = slope.diff() >= -1e-9 * slope.abs()[1:]
    falling = slope <= 1e-9 * slope.abs().max()
    rising = ratio.diff() >= -1e-9 * ratio.abs()[1:]
    by_pressure = rising.all() and (P >= 0).all()
    return bool(convex.all() and falling.all()), bool(by_pressure)  # [condition on A]


def is_convex(V, d):
    """Whether V (n, d) -> (n,) lies below the middles of 10,000 random chords, near the origin."""
    rng = torch.Generator().manual_seed(0)
    x, y = 10 * torch.rand(2, 10_000, d, generator=rng, dtype=torch.float64) - 5
    chord = (V(x) + V(y)) / 2
    return bool((V((x + y) / 2) <= chord + 1e-9 * (1 + chord.abs())).all())  # [convex potentials]


def second_derivative(energy, times):
    """Of an energy (T,) at equally spaced times, by differences, (T - 2,)."""
    return energy.diff(n=2) / (times[1] - times[0]) ** 2  # >= 0: p. 153, the [convexity principle]


def norm_power(integral, q, d):
    """||rho||_q^(-p/d), 1/p + 1/q = 1, from int rho^q; concave along rho_t for q >= (d-1)/d."""
    return integral ** (1 / (d * (1 - q)))  # p. 153, [norm concavity]


def gaussian_internal(S, q):
    """U of N(m, S), (..., D, D) -> (...), for A = power_law(q)."""
    d, det = S.shape[-1], torch.linalg.det(S)
    if q == 1:
        return -torch.log((2 * math.pi * math.e) ** d * det) / 2
    return ((2 * math.pi) ** d * det) ** ((1 - q) / 2) * q ** (-d / 2) / (q - 1)


# A convex polygon is its edges (..., k, 2) in any order: sorted by angle they close up convexly.
# A Minkowski sum has the edges of both.


def area(edges):
    """(..., k, 2), of sum zero -> (...)."""
    order = torch.atan2(edges[..., 1], edges[..., 0]).argsort(-1)
    x, y = torch.take_along_dim(edges, order[..., None], -2).unbind(-1)
    return (x.cumsum(-1) * y - y.cumsum(-1) * x).sum(-1) / 2


def minkowski(K, L, t):
    """Edges of (1-t) K + t L."""
    return torch.cat([(1 - t) * K, t * L], dim=-2)


def brunn_minkowski_excess(K, L, t):
    """|(1-t)K + tL|^½ - (1-t)|K|^½ - t|L|^½ of convex polygons: never below 0."""
    roots = area(K).sqrt(), area(L).sqrt()
    return area(minkowski(K, L, t)).sqrt() - interpolate(*roots, t)  # [Brunn-Minkowski]


# ---- The ground state of an interacting gas -----------------------------------------------------

GASES = {"A = rho log rho": 1, "A = rho^2": 2}  # their exponents q; with V = |x|²/2 and no W


def both_gases(rho):
    """A of each of GASES, for rho (gases, ...)."""
    return torch.stack([power_law(q)(r) for q, r in zip(GASES.values(), rho, strict=True)])


def gas_energy(Q, A):
    """E = U + G of gases in 1-D whose quantiles at the levels k/N are Q (..., N+1), -> (...)."""
    ends = torch.stack([Q[..., :-1], Q[..., 1:]], dim=-1)
    mass = torch.full_like(ends[..., 0], 1 / ends.shape[-2])
    return internal(mass, Q.diff(), A) + interaction(*quadrature(mass, ends), quadratic)


def ground_state(x, q):
    """The minimiser of mean 0 of int A(rho) + 1/2 iint |x-y|²/2, A = power_law(q), q >= 1, in 1-D.

    A'(rho) + x²/2 is constant where rho > 0: the normal law at q = 1, else Barenblatt's profile.
    Returns its density at x and its energy.
    """
    if q == 1:
        return torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi), -math.log(2 * math.pi) / 2
    k = 1 / (q - 1)
    beta = math.sqrt(math.pi) * math.gamma(k + 1) / math.gamma(k + 1.5)  # int (1 - x²)^k dx
    height = ((q - 1) / (2 * q)) ** k
    radius = (height * beta) ** (-1 / (2 * k + 1))  # so that the mass is 1
    rho = height * (radius**2 - x**2).clamp(min=0) ** k  # [ground state], ours
    U = radius**2 / (3 * q - 1)  # int rho^q / (q - 1)
    return rho, U * (q + 1) / 2  # G = (q - 1) U / 2, as dilations leave E at rest


def starts(n):
    """Five quantile functions at the levels k/n, (5, n+1), of density at most 0.6."""
    s = torch.linspace(-1, 1, n + 1, dtype=torch.float64)
    skewed = -2 * torch.log(1.06 - (s + 1) / 2)
    clumps = 2.2 * s + 1.2 * torch.sin(3 * math.pi * s) / (3 * math.pi)
    shapes = [skewed, 3 * s, 1.2 * s, s + 1.3 * torch.tanh(4 * s), clumps]
    means = torch.linspace(-8, 8, 5, dtype=torch.float64)[:, None]
    Q = torch.stack(shapes)
    return Q - mean(Q)[:, None] + means


def mean(Q):
    """Of gases with quantiles Q (..., N+1)."""
    return (Q[..., 1:] + Q[..., :-1]).mean(-1) / 2


class Gases(nn.Module):
    """Quantiles Q (..., N+1) as a parameter theta = sqrt(weight) Q, |d theta|² = int (dQ)² du.

    That is the length of Wasserstein space (by the trapezoidal rule), so that plain gradient
    descent of theta is descent there: in Q it moves N times as far as dE/dQ.
    """

    def __init__(self, Q):
        super().__init__()
        n = Q.shape[-1] - 1
        root = torch.full((n + 1,), n**-0.5, dtype=Q.dtype)
        root[[0, -1]] /= math.sqrt(2)
        self.register_buffer("root", root)
        self.register_buffer("start", Q)
        self.theta = nn.Parameter(Q * root)

    def forward(self):
        return self.theta / self.root


def train(run):
    """Descend E = U + G in Wasserstein space, for every gas and start at once."""
    for _ in run.steps():
        Q = run.net()  # (gases, starts, N+1)
        run.step(gas_energy(Q, both_gases).sum())  # to the [ground state]


# ---- Evaluation: each part reports its figures and returns a row of titled pictures --------------

TEAL, RED, GREY = "#007a87", "#d6463c", "#c8ccd4"


def grid(low, high, n):
    return torch.linspace(low, high, n, dtype=torch.float64)


def curve(x, y):
    """The points (n, 2) of a line in a chart."""
    return torch.stack([x, y], dim=1)


def around(*curves):
    """A box around curves, with a margin."""
    low, high = torch.cat(curves).aminmax(dim=0)
    (left, bottom), (right, top) = low - 0.06 * (high - low), high + 0.06 * (high - low)
    return left, right, bottom, top


def hue(h, alpha=255):
    """A colour of the wheel, of period 1. Time t is 0.67 + 0.4 t: from blue to orange."""
    return (*(int(140 + 110 * math.cos(2 * math.pi * (h - k / 3))) for k in range(3)), alpha)


def evaluate_line(run):
    """Two densities in 1-D: interpolation beside mixture, and the energies along both."""
    edges, times = grid(-6.5, 6.5, 321), grid(0, 1, 41)
    cells = torch.stack([edges[:-1], edges[1:]], dim=1)
    x = cells.mean(1)

    def bumps(*parts):  # (weight, mean, width)
        rho = sum(w / s * torch.exp(-(((x - m) / s) ** 2) / 2) for w, m, s in parts)
        return rho / rho.sum()

    def energies(mass, ends):
        width, law = ends[:, 1] - ends[:, 0], quadrature(mass, ends)
        U, norm = (internal(mass, width, A) for A in (power_law(1), torch.square))
        F, G = external(*law, quadratic), interaction(*law, quadratic)
        return torch.stack([U, F, G, norm_power(norm, q=2, d=1)])

    p_0 = bumps((0.6, -4.2, 0.5), (0.4, -2.9, 0.35))
    p_1 = bumps((0.3, 1.2, 0.4), (0.3, 3.1, 0.35), (0.4, 4.7, 0.3))
    mass, ends_0, ends_1 = monotone_rearrangement(edges, p_0, edges, p_1)
    run.report("line", W2=line_wasserstein_squared(mass, ends_0, ends_1).sqrt().item())
    displacement = [(mass, interpolate(ends_0, ends_1, t)) for t in times]
    mixture = [(interpolate(p_0, p_1, t), cells) for t in times]
    row = []
    for name, path in ("displacement (teal)", displacement), ("mixture (red)", mixture):
        shapes = []
        for k in range(0, 41, 5):  # from the back, t = 0, to the front, t = 1
            ridge, h = histogram(*path[k], edges) / edges.diff() - 0.08 * k, 0.67 + 0.01 * k
            shapes.append(("fill", curve(x, ridge), hue(h, 80), 0))
            shapes.append(("line", curve(x, ridge), hue(h), 0.7))
        row.append((name, common.chart(shapes, (-6.5, 6.5, -3.4, 0.8), (300, 280))))
    paths = displacement, mixture
    curves = [torch.stack([energies(*law) for law in path], dim=1) for path in paths]
    for name, *paths in zip(("U", "F", "G", "||rho||^-2"), *curves, strict=True):
        sign = -1 if name.startswith("||") else 1  # the norm's power is to be concave
        least = [(sign * second_derivative(path, times)).min().item() for path in paths]
        said = f"{'-' if sign < 0 else ''}d2/dt2"
        run.report(f"{name}, least {said}", displacement=least[0], mixture=least[1])
        lines = [curve(times, path) for path in paths]
        shapes = [("line", torch.stack([lines[0][0], lines[0][-1]]), GREY, 1.3)]  # the chord
        shapes += [("line", line, c, 1.5) for line, c in zip(lines, (TEAL, RED), strict=True)]
        image = common.chart(shapes, around(*lines), (160, 222), ("t", name))
        row.append((f"{said} >= {least[0] + 1e-9:.1f}, {least[1] + 1e-9:.1f}", image))
    return row


def evaluate_clouds(cfg, run, source, data):
    """Two point clouds: exact transport with its certificate, and below it the mixture."""
    n = cfg.batch_size
    x_0, x_1 = (side.batch(n)[0].cpu().double() for side in (source, data))
    mass = torch.full((n,), 1 / n, dtype=torch.float64)
    unpaired = wasserstein_squared(x_0, x_1, mass).sqrt().item()
    x_1, dual = optimal_pairs(x_0, x_1)
    squared = wasserstein_squared(x_0, x_1, mass).item()
    figures = {"W2": squared**0.5, "unpaired": unpaired, "duality_gap": squared - dual}
    run.report("clouds", points=n, **figures)

    colours = [hue(a / (2 * math.pi)) for a in torch.atan2(*x_0.T.flip(0)).tolist()]
    bound = 1.1 * torch.cat([x_0, x_1]).abs().max().item()
    rows = [], []
    for t in grid(0, 1, 5).tolist():
        displaced = interpolate(x_0, x_1, t)
        mixed = torch.where(torch.arange(n)[:, None] >= t * n, x_0, x_1)
        for row, name, x_t in zip(rows, ("displaced", "mixed"), (displaced, mixed), strict=True):
            image = common.chart([("dots", x_t, colours, 1)], (-bound, bound) * 2, (196, 196))
            row.append((f"{name}, t = {t:.2f}", image))
    return rows


def evaluate_gaussians(run):
    """Two Gaussians: the flow of the OT velocity by odeint, and the change of variables."""
    m_0, m_1 = torch.tensor([[-2.4, -0.7], [2.3, 0.5]]).double()
    S_0, S_1 = torch.tensor([[[0.9, 0.5], [0.5, 0.5]], [[0.3, -0.4], [-0.4, 1.1]]]).double()
    rng = torch.Generator().manual_seed(0)
    x_0 = m_0 + torch.randn(200, 2, generator=rng, dtype=torch.float64) @ square_root(S_0)
    A, times = gaussian_map(S_0, S_1), grid(0, 1, 9)
    x, _ = common.odeint(gaussian_velocity(m_0, S_0, m_1, S_1), x_0, times)  # (9, 200, 2)
    laws = [gaussian_interpolation(m_0, S_0, m_1, S_1, t) for t in times]

    def T(x):
        return m_1 + (x - m_0) @ A

    normal = torch.distributions.MultivariateNormal
    x_half, log_rho = push_forward(x_0, normal(m_0, S_0).log_prob(x_0), T, 0.5)
    speed = x.diff(dim=0).norm(dim=-1) * (len(times) - 1)
    run.report(
        "gaussians",
        W2=gaussian_wasserstein_squared(m_0, S_0, m_1, S_1).sqrt().item(),
        flow_end_error=(x[-1] - T(x_0)).abs().max().item(),
        speed_variation=(speed.amax(0) - speed.amin(0)).max().item(),
        log_density_error=(log_rho - normal(*laws[4]).log_prob(x_half)).abs().max().item(),
    )
    angle = grid(0, 2 * math.pi, 97)
    circle = 2 * torch.stack([angle.cos(), angle.sin()], dim=1)
    shapes = [("line", path, "#787d8c6e", 0.4) for path in x.unbind(1)]
    for k, (m, S) in enumerate(laws):
        ellipse, h = m + circle @ square_root(S), 0.67 + 0.05 * k
        shapes += [("fill", ellipse, hue(h, 26), 0), ("line", ellipse, hue(h), 1)]
    shapes += [("dots", x[k], hue(0.67 + 0.05 * k), 1) for k in (0, 8)]
    image = common.chart(shapes, (-6.9, 6.9, -2.7, 2.9), (484, 196))
    return [("Gaussians: the flow of v(x, t) = T(x_0) - x_0", image)]


def evaluate_conditions(run):
    """McCann's conditions; what the violation of that on A does to a Gaussian that spreads."""
    run.report("convex", quadratic=is_convex(quadratic, 2), distance=is_convex(distance, 2))
    times, shapes = grid(0, 1, 41), []
    S = interpolate(0.3, 1.5, times)[:, None, None] ** 2 * torch.eye(2, dtype=torch.float64)
    for q, colour in ((2, TEAL), (1, TEAL), (0.5, GREY), (0.3, RED)):
        U = gaussian_internal(S, q)
        least = second_derivative(U, times).min().item()
        holds = condition_on_A(power_law(q), 2)[0]
        run.report(f"A = rho^q/(q-1), q = {q}, d = 2", condition=holds, least_d2=least)
        line = curve(times, (U - U[-1]) / (U[0] - U[-1]))
        shapes.append(("line", line, colour, 1.3))
    image = common.chart(shapes, (0, 1, -0.05, 1.05), (180, 138), ("t", "U, A = rho^q / (q - 1)"))
    return [("q = 2, 1, 0.5; 0.3 (red), d = 2", image)]


def evaluate_brunn_minkowski(run):
    """The inequality on random pairs of convex polygons."""
    rng = torch.Generator().manual_seed(0)
    n, times = 2_000, grid(0, 1, 41)
    K, L = torch.randn(2, n, 7, 2, generator=rng, dtype=torch.float64)  # heptagons
    K, L = (e - e.mean(1, keepdim=True) for e in (K, L))
    excess = torch.stack([brunn_minkowski_excess(K, L, t) for t in times], dim=1)  # (n, T)
    run.report("Brunn-Minkowski", pairs=n, least_excess=excess[:, 1:-1].min().item())
    lines = [curve(times, y) for y in excess[:40]]
    shapes = [("line", line, hue(k / 40, 190), 0.7) for k, line in enumerate(lines)]
    image = common.chart(shapes, around(*lines), (180, 138), ("t", "|(1-t)K + tL|^1/2 - chord"))
    return [("Brunn-Minkowski, 40 pairs", image)]


def evaluate_gases(run):
    """Every gas from every start, against the closed form of its ground state."""
    edges, row = grid(-8, 8, 4001), []
    x = (edges[1:] + edges[:-1]) / 2
    with torch.no_grad():
        Q = run.ema().cpu()  # (gases, starts, N+1)
    energies, centred = gas_energy(Q, both_gases), Q - mean(Q)[..., None]
    even = torch.full_like(Q[0, 0, 1:], 1 / (Q.shape[-1] - 1))
    for i, (name, q) in enumerate(GASES.items()):
        rho, least = ground_state(x, q)
        pieces = [monotone_rearrangement(knots, even, edges, rho) for knots in centred[i]]
        far = max(line_wasserstein_squared(*piece).sqrt().item() for piece in pieces)
        apart = (centred[i] - centred[i, 0]).abs().max().item()
        figures = {"energy": energies[i].max().item(), "least": least}
        run.report(f"gas, {name}", **figures, W2_to_closed_form=far, starts_apart=apart)
        shapes = []
        for k, gas in enumerate(Q[i]):
            closed = curve(x + mean(gas), rho)[rho > 1e-4]
            shapes.append(("fill", closed, GREY, 0))
            for knots, floor in ((run.net.start[i, k].cpu(), 0.7), (gas, 0)):
                at = torch.cat([knots[:1], (knots[1:] + knots[:-1]) / 2, knots[-1:]])
                line = curve(at, nn.functional.pad(even / knots.diff(), (1, 1)) + floor)
                shapes.append(("line", line, hue(0.55 + k / 5), 1))
        title = f"gases of {name}, V = |x|^2/2: five starts; their ends, on the closed form (grey)"
        row.append((title, common.chart(shapes, (-12, 12, -0.02, 1.4), (748, 200))))
    return row


# ---- The run ------------------------------------------------------------------------------------


def draw(cfg, source, data, n):
    """n points of rho_t at cfg.time, (n, 2), from clouds of cfg.batch_size or more: small clouds
    move farther than their densities."""
    size = max(n, cfg.batch_size)
    x_0, x_1 = source.batch(size)[0], data.batch(size)[0]
    return interpolate(x_0, optimal_pairs(x_0, x_1)[0], cfg.time)[:n]


def prepare(cfg):
    device = common.setup(cfg)
    if device.type == "mps":
        raise UserError("--device mps has no float64, which the energies need: use cpu")
    if cfg.amp != "off" or cfg.compile:
        raise UserError("the energies are in float64, step by step: leave out --amp and --compile")
    for name in (cfg.source, cfg.dataset):
        if name not in common.DENSITIES:
            known = ", ".join(common.DENSITIES)
            raise UserError(f"{name!r} is no 2-D density to interpolate: give one of {known}")
    source = common.load_data(replace(cfg, dataset=cfg.source), device)
    data = common.load_data(cfg, device)
    Q = starts(cfg.quantiles).repeat(len(GASES), 1, 1)
    run = common.Run(cfg, Gases(Q), device, optimizer=lambda p: torch.optim.SGD(p, lr=cfg.lr))
    return run, source, data


def main(cfg):
    run, source, data = prepare(cfg)
    if not cfg.sample:
        train(run)
    if not run.finish():
        return
    line, (displaced, mixed) = evaluate_line(run), evaluate_clouds(cfg, run, source, data)
    displaced += evaluate_gaussians(run)
    mixed += evaluate_conditions(run) + evaluate_brunn_minkowski(run)
    rows = line, displaced, mixed, evaluate_gases(run)
    common.save_panels(run.folder / "samples.png", *rows)
    if cfg.num_samples:
        run.write_samples(lambda n: draw(cfg, source, data, n))
    run.say(f"see {run.folder / 'samples.png'}")


if __name__ == "__main__":
    common.cli(main, Config, PRESETS)
