"""Neural Ordinary Differential Equations. Chen, Rubanova, Bettencourt, Duvenaud, arXiv 1806.07366v5

Implements  Eq. 3, Eq. 4, Eq. 5, Alg. 1, Alg. 2 (adjoint); Eq. 1, Eq. 2, Table 1, Fig. 3a, Fig. 3c
            (ODE-Net and its residual twin); Eq. 8, Eq. 9, Eq. 10, Sec. 4.1, Fig. 5 (continuous
            normalising flows by maximum likelihood and by density matching); Eq. 11, Eq. 12,
            Eq. 13, Eq. 53, App. E, Table 2, Fig. 8 (latent ODE); Sec. 5, Fig. 7 (Poisson process)
Conventions A flow has noise z(0) ~ N(0, I) at t = 0 and data z(1) = x at t = 1. An ODE-Net runs
            over [0, 1]; a latent ODE starts at t_0 = 0, the first time of its window.
Departures  1. Eq. 52 and Alg. 2 disagree on the sign of a_t(t_1); Alg. 2 is right. a_t is not
               integrated here: a shift of t_0 is one of z_0, so dL/dt_0 = -a(t_0) f(z_0, t_0).
            2. Eq. 10 is printed without Eq. 8's minus. The solver is dopri5, not implicit Adams.
            3. u, w, b and the gates all come from one hypernetwork of t; its size is ours.
            4. The free field and its stochastic trace are FFJORD's, arXiv 1810.01367.
            5. The ODE-Net is reduced: 16 channels, not 64, fewer groups in norms, no 3 x 3
               convolution before its stem's two of stride 2, so 7 x 7 maps; its twin's blocks are
               six of the ODE's layers; Adam and no augmentation, not SGD for 160 epochs.
            6. The spirals are the official code's curves of 1,000 points, where that code runs with
               500; windows start at 100 to 700. The adjoint would stop at each of 100 times, so the
               latent ODE backpropagates through one solve with dense output, as that code does. Its
               encoder sees gaps, not times; predictions are of the posterior's mean.
            7. Training is shorter, and its tolerances are looser: see EXPERIMENTS.
Run         python neural_ode.py                                            flow, eight Gaussians
            python neural_ode.py --dataset u1                               density matching
            python neural_ode.py --experiment classify --dataset mnist      Table 1
            python neural_ode.py --experiment latent                        Table 2
            python neural_ode.py --experiment poisson                       Fig. 7
"""

import functools
import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import Count, Natural, Positive, Sizes, UserError


@dataclass
class Config(common.Config):
    experiment: Literal["cnf", "classify", "latent", "poisson"] = "cnf"  # which use of the ODE
    dataset: str = "auto"  # cnf: 2-D data, or an energy u1, u2; classify: images [by experiment]
    steps: Natural | None = None  # optimisation steps of each network [by experiment]
    batch_size: Count | None = None  # examples per step [by experiment]
    lr: Positive | None = None  # peak learning rate of Adam [by experiment]
    tol: Positive | None = None  # atol = rtol of dopri5 in training [by experiment]
    gradient: Literal["adjoint", "backprop"] | None = None  # backprop: RK-Net's [by experiment]
    field: Literal["planar", "free"] = "planar"  # cnf: gated planar units (Eq. 10), or any network
    trace: Literal["exact", "rademacher", "gaussian"] = "exact"  # cnf, in training
    units: Count = 64  # cnf: M hidden units (Sec. 4.1)
    channels: Count = 16  # classify: of the feature maps; the paper's 64
    observations: Sizes = (30, 50, 100)  # latent: the columns of Table 2

    learned = (*common.Config.learned, "experiment", "observations")

    def __post_init__(self):
        names = ("dataset", "steps", "batch_size", "lr", "tol", "gradient")
        for name, value in zip(names, EXPERIMENTS[self.experiment], strict=True):
            if getattr(self, name) in (None, "auto"):
                setattr(self, name, value)


EXPERIMENTS = {  # dataset, steps, batch_size, lr, tol, gradient
    "cnf": ("eight_gaussians", 400, 512, 1e-2, 1e-3, "adjoint"),  # Sec. 6: 1e-5, as its test here
    "classify": ("glyphs", 3_000, 64, 1e-2, 1e-3, "adjoint"),  # tolerance: Sec. 6
    "latent": ("spirals", 1_000, 500, 1e-2, 1e-4, "backprop"),  # lr: official; Sec. 6: 1.5e-8
    "poisson": ("events", 400, 20, 3e-2, 1e-3, "adjoint"),
}
IMAGES = ("glyphs", "mnist", "fashion_mnist", "cifar10", "folder")
PRESETS = dict.fromkeys(IMAGES, {"experiment": "classify"})


# ---- The adjoint method (Sec. 2, App. B, App. C) ------------------------------------------------


def odeint_adjoint(f, z, t, params=None, *, backward=None, **solver):
    """common.odeint with gradients by the adjoint method: memory does not grow with the steps.

    Args:
        f, z, t, solver: as common.odeint's; z a tensor (B, ...) or a tuple of tensors. If t is a
            1-D tensor, it may require gradients: of the start, the observation and the end times.
        params: the other tensors on which f depends and whose gradients are wanted. Default: f's
            parameters; a function that is no nn.Module must name them.
        backward: a list, to which each backward pass appends its number of evaluations.

    Returns (solution, evaluations), as common.odeint does. Gradients are those of the exact flow,
    to the solver's tolerance, not of the solver's steps; they have no gradients themselves.
    To copy it out: take this function, the class and the two helpers below it, and common.py's
    UserError and section "ODE stepping".
    """
    if params is None:
        if not isinstance(f, nn.Module):
            raise ValueError("f is no nn.Module: give its params (params=() if there are none)")
        params = f.parameters()
    is_tuple, is_grid = isinstance(z, tuple), isinstance(t, Tensor)
    field = f if is_tuple else lambda z, t: (f(z[0], t),)
    z = z if is_tuple else (z,)
    theta = [p for p in params if p.requires_grad]
    times = t if is_grid else torch.tensor(t, dtype=torch.float64)
    *states, nfe = _Adjoint.apply(field, len(z), solver, backward, times, *z, *theta)
    solution = tuple(states) if is_grid else tuple(state[-1] for state in states)
    return (solution if is_tuple else solution[0]), nfe


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, field, n, solver, counts, times, *tensors):
        z, nfe = common.odeint(field, tensors[:n], times.detach(), **solver)  # n of (T, B, ...)
        ctx.autocast = autocast_of(z[0].device.type)
        ctx.field, ctx.n, ctx.solver, ctx.counts = field, n, solver, counts
        ctx.save_for_backward(times, *z, *tensors[n:])
        return (*z, nfe)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        """Alg. 2; where the loss sees z(t_i) at several times, one solve for each interval."""
        n, (times, *tensors) = ctx.n, ctx.saved_tensors
        z, theta, dL_dz = tensors[:n], tensors[n:], grads[:n]

        def f(z, t):
            with torch.autocast(*ctx.autocast) if ctx.autocast else nullcontext():
                return ctx.field(z, t)

        def aug_dynamics(state, t):  # the state is [z, a, dL/dtheta], the last in one vector
            with torch.enable_grad():
                z = tuple(z_k.detach().requires_grad_() for z_k in state[:n])
                v = f(z, t)
                pairs = zip(v, state[n : 2 * n], strict=True)
                pairs = [(v_k, -a_k.to(v_k.dtype)) for v_k, a_k in pairs if v_k.requires_grad]
                v_on, minus_a = zip(*pairs, strict=True) if pairs else ((), ())
                known = {"allow_unused": True, "materialize_grads": True}
                vjps = torch.autograd.grad(v_on, (*z, *theta), minus_a, **known)
            return (*(v_k.detach() for v_k in v), *vjps[:n], *as_vector(vjps[n:]))  # Eq. 4, Eq. 5

        def shift(a, i):  # a(t_i) f(z(t_i), t_i): the loss's change with t_i along the flow
            z_i = tuple(z_k[i] for z_k in z)
            v = f(z_i, z_i[0].new_full(z_i[0].shape[:1], float(times[i])))
            return sum((a_k * v_k).sum() for a_k, v_k in zip(a, v, strict=True))

        dL_dt = torch.zeros_like(times)
        a = tuple(torch.zeros_like(z_k[0]) for z_k in z)
        dL_dtheta = as_vector([torch.zeros_like(p) for p in theta])
        total = 0
        for i in range(len(times) - 1, 0, -1):
            seen = [g[i] for g in dL_dz]  # the direct dL/dz(t_i)
            if times.requires_grad:
                dL_dt[i] = shift(seen, i)  # Alg. 2, l. 1
            a = tuple(a_k + g for a_k, g in zip(a, seen, strict=True))  # Fig. 2
            s = (*(z_k[i] for z_k in z), *a, *dL_dtheta)  # Alg. 1, l. 1: from the z(t_i) kept
            s, nfe = common.odeint(aug_dynamics, s, (times[i], times[i - 1]), **ctx.solver)
            a, dL_dtheta, total = s[n : 2 * n], s[2 * n :], total + nfe
        if times.requires_grad:
            dL_dt[0] = -shift(a, 0)  # Departure 1
        dL_dz_0 = [a_k + g[0] for a_k, g in zip(a, dL_dz, strict=True)]
        if ctx.counts is not None:
            ctx.counts.append(total)
        parts = dL_dtheta[0].split([p.numel() for p in theta]) if theta else ()
        parts = [part.view_as(p) for part, p in zip(parts, theta, strict=True)]
        return None, None, None, None, dL_dt, *dL_dz_0, *parts


def autocast_of(device):
    """The device's type and the dtype of the autocast that is on, or None."""
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return (device, torch.get_autocast_dtype(device)) if on else None


def as_vector(tensors):
    """The tensors end to end, as a tuple of one vector; () of none: what a state can be made of."""
    return (torch.cat([x.flatten() for x in tensors]),) if tensors else ()


def ode_solve(f, z, t, params=None, backward=None, gradient="adjoint", **solver):
    """ODESolve(z(t_0), f, t_0, t_1, theta), Eq. 3, with gradients by "adjoint" or "backprop"."""
    if gradient == "adjoint":
        return odeint_adjoint(f, z, t, params, backward=backward, **solver)
    return common.odeint(f, z, t, **solver)


def mlp(*sizes, activation=nn.Tanh):
    layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    return nn.Sequential(*(m for layer in layers for m in (layer, activation())))[:-1]


# ---- Continuous normalising flows (Sec. 4) ------------------------------------------------------


class PlanarField(nn.Module):
    """f(z, t) = sum_n sigma_n(t) u_n h(w_n · z + b_n), h = tanh; z (B, D), t (B,) all the same.

    All of u, w, b and the gates sigma_n in (0, 1) are functions of t: a hypernetwork.
    """

    def __init__(self, dim=2, units=64, hidden=32):
        super().__init__()
        self.shape = (units, 2 * dim + 2)
        self.hyper = mlp(1, hidden, hidden, units * (2 * dim + 2))

    def with_trace(self, z, t):
        """f (B, D) and tr(df/dz) (B,): linear in the number of units."""
        dim = z.shape[1]
        weights = self.hyper(t[:1, None]).view(self.shape)
        u, w, b, gate = weights.split([dim, dim, 1, 1], dim=1)
        u = torch.sigmoid(gate) * u  # (M, D)
        h = torch.tanh(z @ w.T + b.T)  # (B, M)
        return h @ u, (1 - h.square()) @ (u * w).sum(1)  # Eq. 9, Eq. 10: u · dh/dz

    def forward(self, z, t):
        return self.with_trace(z, t)[0]


class FreeField(nn.Module):
    """An unrestricted f(z, t), z (B, D), t (B,): FFJORD's freedom, Departure 4."""

    def __init__(self, dim=2, units=64):
        super().__init__()
        self.net = mlp(dim + 1, units, units, dim)

    def forward(self, z, t):
        return self.net(torch.cat([z, t[:, None]], dim=1))


class CNF(nn.Module):
    """The density q of x = z(1), where z(0) ~ N(0, I) and dz/dt = field(z, t).

    trace: "exact" (a planar field's in closed form, others' by autograd), or Hutchinson's estimate
    by one "rademacher" or "gaussian" probe a solve: a new one within would be noise to the solver.
    """

    def __init__(self, field, trace="exact", solve=ode_solve):
        super().__init__()
        self.field, self.trace, self.solve = field, trace, solve

    def flow(self, z, t, **solver):
        """z at t[0] -> z at t[1], log p(z(t[1])) - log p(z(t[0])) (B,), and the evaluations."""
        probe = None if self.trace == "exact" else common.hutchinson_probe(z, self.trace)

        def dynamics(state, t):
            if probe is None and hasattr(self.field, "with_trace"):
                v, trace = self.field.with_trace(state[0], t)
            else:
                v, trace = common.divergence(self.field, state[0], t, probe)
            return v, -trace  # Eq. 8

        start, theta = (z, z.new_zeros(len(z))), self.field.parameters()
        (z, change), nfe = self.solve(dynamics, start, t, theta, **solver)
        return z, change, nfe

    def log_prob(self, z, t=1.0, **solver):
        """log p(z(t) = z) in nats, (B, D) -> (B,), and the evaluations."""
        z_0, change, nfe = self.flow(z, (t, 0.0), **solver)
        return common.standard_normal_log_prob(z_0) - change, nfe

    def sample(self, z_0, t=1.0, **solver):
        """z_0 ~ N(0, I), (B, D) -> (z(t), log p(z(t)), evaluations)."""
        z, change, nfe = self.flow(z_0, (0.0, t), **solver)
        return z, common.standard_normal_log_prob(z_0) + change, nfe

    def forward(self, z, energy=None):
        """Losses (B,): -log q(x) of data z = x; with an energy U, of noise, log q(x) + U(x)."""
        if energy is None:
            return -self.log_prob(z)[0]  # Sec. 4.1, maximum likelihood
        x, log_q, _ = self.sample(z)
        return log_q + energy(x)  # Sec. 4.1, density matching: KL(q || p) - log Z


def u1(z):
    """Energy (B, 2) -> (B,) of Rezende & Mohamed (2015), Table 1: two facing arcs."""
    ring = ((z.norm(dim=1) - 2) / 0.4).square() / 2
    arcs = [-((z[:, 0] + side) / 0.6).square() / 2 for side in (-2, 2)]
    return ring - torch.logaddexp(*arcs)


def u2(z):
    """Theirs of a wave, which has no end along z_1, times our N(z_1; 0, 2²)."""
    wave = (z[:, 1] - torch.sin(math.pi / 2 * z[:, 0])) / 0.4
    return (wave.square() + (z[:, 0] / 2).square()) / 2


ENERGIES = {"u1": u1, "u2": u2}


# ---- ODE-Net and its residual twin (Sec. 3) -----------------------------------------------------


class Layer(nn.Module):
    """f(h, t) of the official ODE-Net: norm, ReLU, 3 x 3 convolution, twice, and a norm."""

    def __init__(self, channels):
        super().__init__()
        self.norms = nn.ModuleList(common.group_norm(channels) for _ in range(3))
        self.convs = nn.ModuleList(
            nn.Conv2d(channels + 1, channels, 3, padding=1) for _ in range(2)
        )

    def forward(self, h, t):
        t = common.bcast(t, h).expand(-1, 1, *h.shape[2:])  # (B, 1, H, W), one more channel
        for i, conv in enumerate(self.convs):
            h = conv(torch.cat([F.relu(self.norms[i](h)), t], dim=1))
        return self.norms[2](h)


class Classifier(nn.Module):
    """Images (B, C, H, W) -> logits (B, classes): two halvings, then an ODE or so many blocks."""

    def __init__(self, shape, classes, channels=16, blocks=0, solve=ode_solve):
        super().__init__()
        c = channels
        first, second = (nn.Conv2d(i, c, 4, stride=2, padding=1) for i in (shape[0], c))
        self.stem = nn.Sequential(first, common.group_norm(c), nn.ReLU(), second)
        self.body = nn.ModuleList(Layer(c) for _ in range(blocks)) if blocks else Layer(c)
        self.head = nn.Sequential(common.group_norm(c), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head.extend([nn.Flatten(), nn.Linear(c, classes)])
        self.solve = solve

    def features(self, h, backward=None):
        """h(0) -> h(1), and the evaluations; the list `backward` gets those of a backward pass."""
        if isinstance(self.body, Layer):
            return self.solve(self.body, h, (0.0, 1.0), backward=backward)  # Eq. 2
        for k, f in enumerate(self.body):
            h = h + f(h, h.new_full((len(h),), k / len(self.body)))  # Eq. 1
        return h, len(self.body)

    def forward(self, x):
        return self.head(self.features(self.stem(x))[0])


# ---- Latent ODE (Sec. 5, App. E) ----------------------------------------------------------------

SIGMA = 0.3  # of the observations' noise, which decoder and baseline know; official code
GRID = torch.linspace(0, 6 * math.pi, 1_000)[:201]  # a window's 100 times and those after it


def log_normal(x, mean, log_std):
    """log N(x; mean, exp(log_std)²) in nats, summed over all but the first dimension."""
    square = ((x - mean) * torch.exp(-log_std)).square()
    return -(square / 2 + log_std + math.log(2 * math.pi) / 2).flatten(1).sum(1)


def elbo(x, index, times, q, states, decode, sigma=SIGMA):
    """One-sample ELBO (B,) in nats of x (B, n, D) seen at times[index], index int64 (B, n).

    q = (mean, log_std) of z(t_0), (B, d) each; states(z(t_0), times) -> z (T, B, d).
    """
    mean, log_std = q
    z_0 = mean + torch.exp(log_std) * torch.randn_like(mean)  # App. E, 2
    z = states(z_0, times)  # Eq. 12
    z = z[index, torch.arange(len(x), device=x.device)[:, None]]  # (B, n, d)
    log_p_x = log_normal(x, decode(z), x.new_full((), sigma).log())  # Eq. 13
    log_p_z = common.standard_normal_log_prob(z_0)  # Eq. 11
    return log_p_x + log_p_z - log_normal(z_0, mean, log_std)  # App. E, 4


class LatentODE(nn.Module):
    """Sizes of Sec. 5.1. forward: ELBO (B,) of x (B, n, 2) seen at GRID[index]."""

    def __init__(self, latent=4, solve=ode_solve):
        super().__init__()
        self.rnn = nn.RNN(3, 25, batch_first=True)
        self.posterior = nn.Linear(25, 2 * latent)
        self.f = mlp(latent, 20, latent, activation=nn.ELU)
        self.decode = mlp(latent, 20, 2, activation=nn.ReLU)
        self.register_buffer("times", GRID)
        self.solve = solve

    def recognise(self, x, index):
        """q(z_{t_0} | x) = N(mean, exp(log_std)²), Eq. 53, by an RNN that runs backwards in time.

        Each x_i comes with its distance to the observation before it, the first to t_0.
        """
        t = self.times[index]
        gaps = t.diff(dim=1, prepend=torch.zeros_like(t[:, :1]))
        _, h = self.rnn(torch.cat([x, gaps[..., None]], dim=2).flip(1))
        return self.posterior(h[0]).chunk(2, dim=1)

    def states(self, z_0, times):
        """z (T, B, d) at the times, the first of which is t_0: Eq. 12, with the f of Sec. 5."""
        return self.solve(lambda z, t: self.f(z), z_0, times, self.f.parameters())[0]

    def forward(self, x, index):
        return elbo(x, index, self.times[:100], self.recognise(x, index), self.states, self.decode)

    def predict(self, x, index):
        """The curve (B, 300, 2) before, in and after the window, by the posterior's mean."""
        z_0, _ = self.recognise(x, index)
        before = self.states(z_0, -self.times[:101])[1:].flip(0)  # f knows no time: also t < t_0
        z = torch.cat([before, self.states(z_0, self.times[:200])])  # (300, B, d)
        return self.decode(z).transpose(0, 1)


class TimeGapRNN(nn.Module):
    """Sec. 5.1's baseline: from x_i and the gap to t_{i+1}, the mean of x_{i+1}.

    forward: log-likelihood (B,) in nats of all but the first observation.
    """

    def __init__(self):
        super().__init__()
        self.rnn, self.mean = nn.RNN(3, 25, batch_first=True), nn.Linear(25, 2)
        self.register_buffer("times", GRID)

    def forward(self, x, index):
        gaps = self.times[index].diff(dim=1)[..., None]
        h, _ = self.rnn(torch.cat([x[:, :-1], gaps], dim=2))
        return log_normal(x[:, 1:], self.mean(h), x.new_full((), SIGMA).log())

    def predict(self, x, index):
        """The 100 points (B, 100, 2) after the window: each one is the input for the next."""
        gaps = self.times[index].diff(dim=1, append=self.times[100].expand(len(x), 1))
        steps, h = self.rnn(torch.cat([x, gaps[..., None]], dim=2))
        points = [self.mean(steps[:, -1:])]
        for _ in range(99):
            gap = self.times[1].expand(len(x), 1, 1)
            step, h = self.rnn(torch.cat([points[-1], gap], dim=2), h)
            points.append(self.mean(step))
        return torch.cat(points, dim=1)


class Spirals:
    """Bi-directional spirals of Sec. 5.1, cut at random places out of one curve for each direction.

    curve (N, 300, 2): 100 clean points before the window, 100 in it, 100 after it; index int64
    (N, n): which of the window's are observed, without replacement; x (N, n, 2): with noise.
    """

    def __init__(self, size, n, seed, device):
        g = torch.Generator().manual_seed(seed)
        angle = torch.linspace(0, 6 * math.pi, 1_000)
        back = angle.flip(0) + 1
        curves = [  # official code; the second is clockwise
            torch.stack([5 + 0.3 * angle * angle.cos(), 0.3 * angle * angle.sin()], dim=1),
            torch.stack([15 / back * back.cos() - 5, 15 / back * back.sin()], dim=1),
        ]
        series = torch.arange(size)[:, None]
        place = torch.randint(100, 701, (size, 1), generator=g) + torch.arange(-100, 200)
        self.curve = torch.stack(curves)[series % 2, place].to(device)
        self.index = torch.rand(size, 100, generator=g).argsort(1)[:, :n].sort(1)[0].to(device)
        noise = SIGMA * torch.randn(size, n, 2, generator=g)
        self.x = self.curve[series.to(device), 100 + self.index] + noise.to(device)

    def batch(self, n):
        rows = torch.randint(len(self.x), (n,), device=self.x.device)
        return self.x[rows], self.index[rows]


# ---- Poisson process (Sec. 5) -------------------------------------------------------------------

END = 10.0  # events happen in [0, END]


def poisson_log_likelihood(f, rate, z_0, events, count, end, solve):
    """sum_i log rate(z(t_i)) - count * integral of rate(z(t)) over [0, end], in nats: Sec. 5.

    events (N,): the times of all events in `count` sequences; f(z) (B, d) -> (B, d), rate(z) (B,)
    > 0, z_0 (d,). One solve: a row for each event runs to its own time t_i, by the clock s in
    [0, 1], t = s t_i, and one to `end`. solve(dynamics, state, (0, 1)) as ode_solve does.
    """
    t = torch.cat([events, events.new_full((1,), end)])  # (N + 1,)

    def dynamics(state, s):
        return t[:, None] * f(state[0]), t * rate(state[0])

    start = (z_0.expand(len(t), -1), torch.zeros_like(t))
    (z, integral), _ = solve(dynamics, start, (0.0, 1.0))
    return rate(z[:-1]).log().sum() - count * integral[-1]


class EventProcess(nn.Module):
    """A latent trajectory and its rate of events. forward: log-likelihood in nats, a scalar."""

    def __init__(self, latent=4, solve=ode_solve):
        super().__init__()
        self.z_0 = nn.Parameter(torch.randn(latent))
        self.f, self.log_rate = mlp(latent, 20, latent), mlp(latent, 20, 1)
        self.solve = solve

    def rate(self, z):
        return self.log_rate(z)[..., 0].exp()

    def forward(self, events, count):
        theta = [*self.f.parameters(), *self.log_rate.parameters()]
        solve = functools.partial(self.solve, params=theta)
        return poisson_log_likelihood(self.f, self.rate, self.z_0, events, count, END, solve)


def true_rate(t):
    """Two bursts over a constant, below 7."""
    return 1 + 5 * torch.exp(-((t - 3) ** 2)) + 3 * torch.exp(-((t - 7.5) ** 2) / 0.5)


class Events:
    """Sequences of event times in [0, END] at true_rate, by thinning."""

    def __init__(self, size, seed, device):
        g = torch.Generator().manual_seed(seed)
        counts = torch.poisson(torch.full((size,), 7 * END), generator=g).int().tolist()
        candidates = [END * torch.rand(count, generator=g) for count in counts]
        kept = [t[7 * torch.rand(len(t), generator=g) < true_rate(t)] for t in candidates]
        self.sequences = [t.to(device) for t in kept]

    def batch(self, n):
        rows = torch.randint(len(self.sequences), (n,)).tolist()
        return torch.cat([self.sequences[row] for row in rows]), n


# ---- Experiments --------------------------------------------------------------------------------
# Each trains and returns (run, evaluate, draw): what evaluates it, what draws n samples or None.


def solver(cfg):
    # steps that depend on values make no graph: --compile takes the networks around the solver
    solve = torch.compiler.disable(ode_solve) if cfg.compile else ode_solve
    return functools.partial(solve, gradient=cfg.gradient, rtol=cfg.tol, atol=cfg.tol)


def cnf(cfg, device):
    """Density estimation or density matching, Sec. 4.1."""
    energy = ENERGIES.get(cfg.dataset)
    data = None if energy else common.load_data(cfg, device)
    if data and data.is_image:
        raise UserError(f"a flow is for 2-D data: add --experiment classify for {cfg.dataset}")
    field = {"planar": PlanarField, "free": FreeField}[cfg.field](units=cfg.units)
    run = common.Run(cfg, CNF(field, cfg.trace, solver(cfg)), device)
    n = cfg.batch_size // common.world_size()
    for _ in () if cfg.sample else run.steps():
        z = torch.randn(n, 2, device=device) if energy else data.batch(n)[0]
        run.step(run.model(z, energy).mean())  # Sec. 4.1
    evaluate = functools.partial(evaluate_cnf, run, data, energy)
    return run, evaluate, lambda n: run.ema.sample(torch.randn(n, 2, device=device))[0]


@torch.no_grad()
def evaluate_cnf(run, data, energy):
    """Likelihood or divergence in nats, and Fig. 5: densities and samples over time."""
    flow, bound = run.ema, 4.0 if energy else 3.0
    flow.trace, flow.solve = "exact", functools.partial(ode_solve, rtol=1e-5, atol=1e-5)
    z_0, times = torch.randn(20_000, 2, device=run.device), torch.linspace(0, 1, 41)
    z, change, nfe = flow.flow(z_0, times)  # (41, N, 2), (41, N)
    x, log_q = z[-1], common.standard_normal_log_prob(z_0) + change[-1]
    axis = (torch.arange(100, device=run.device) + 0.5) / 50 * bound - bound
    grid = torch.cartesian_prod(axis, axis)  # (10000, 2)
    if energy:
        mass = torch.exp(-energy(grid))
        log_z = (torch.exp(-energy(2 * grid)).mean() * (4 * bound) ** 2).log()  # over [-8, 8]²
        kl = log_q + energy(x) + log_z
        figures = {"kl": kl.mean().item(), "standard_error": common.standard_error(kl)}
        target = common.heat_image(mass.view(100, 100).cpu())
    else:
        test = data.test[:10_000]
        log_p, nll_nfe = flow.log_prob(test)
        figures = {"nll": -log_p.mean().item(), "standard_error": common.standard_error(log_p)}
        if data.entropy is not None:
            figures |= {"entropy": data.entropy, "gap": figures["nll"] - data.entropy}
        figures["energy_distance"] = common.energy_distance(x[:5_000], test[:5_000])
        figures["nll_evaluations"] = nll_nfe
        target = common.density_image(data.test, bound)
    run.report("test", **figures, sampling_evaluations=nfe)

    paths = common.trajectory_image(z[:, :300], bound)
    upper, lower = [("target", target)], [("paths", paths)]
    for t, frame in zip(times[::10].tolist(), z[::10], strict=True):
        log_p = flow.log_prob(grid, t)[0] if t else common.standard_normal_log_prob(grid)
        density = common.heat_image(log_p.exp().view(100, 100).cpu())
        upper.append((f"density, t = {t:.2f}", density))
        lower.append((f"samples, t = {t:.2f}", common.density_image(frame, bound)))
    common.save_panels(run.folder / "samples.png", upper, lower)


def classify(cfg, device):
    """An ODE-Net and its twin of six residual blocks, trained alike: Table 1, Fig. 3a, 3c."""
    data = common.load_data(cfg, device)
    if not data.is_image or min(data.shape[1:]) < 4 or data.num_classes < 2:
        raise UserError("--experiment classify needs images of 4 x 4 pixels, of classes (folders)")
    sizes = (data.shape, data.num_classes, cfg.channels)
    nets = {"": Classifier(*sizes, 0, solver(cfg)), "resnet": Classifier(*sizes, blocks=6)}
    runs = []
    for stage, net in nets.items():
        run = common.Run(cfg, net, device, stage)
        for x, y in () if cfg.sample else run.batches(data):
            run.step(F.cross_entropy(run.model(x), y))
        runs.append(run)
    return run, functools.partial(evaluate_classify, runs, data), None


def evaluate_classify(runs, data):
    """Test errors, parameters; evaluations and what the tolerance does, of the last weights, not
    their average; digits misread."""
    x, y = common.to_float(data.test[:128]), data.test_labels[:128]
    for run, name in reversed([*zip(runs, ("ODE-Net", "ResNet"), strict=True)]):
        with torch.no_grad():
            guesses = [run.ema(common.to_float(b)).argmax(1) for b in data.test.split(500)]
        guesses = torch.cat(guesses)
        wrong = (guesses != data.test_labels).nonzero()[:, 0].tolist()
        figures = {"network": name, "test_error_percent": 100 * len(wrong) / len(guesses)}
        figures["parameters"] = sum(p.numel() for p in run.net.parameters())
        _, forward, backward = one_pass(run.net, x, y)
        run.report("test", **figures, evaluations_forward=forward, evaluations_backward=backward)
    net, rows = run.net, []
    for tol in (1e-6, 1e-1, 1e-2, 1e-3, 1e-4):
        net.solve = functools.partial(net.solve, rtol=tol, atol=tol)
        rows.append((tol, *one_pass(net, x, y)))
    run.say("tolerance   error of h(1)   evaluations forwards   backwards (Fig. 3a, 3c)")
    points = []
    for tol, h, forward, backward in rows[1:]:
        error = (h - rows[0][1]).square().mean().sqrt().item()
        run.say(f"{tol:9g}{error:16.2e}{forward:23d}{backward:12d}")
        points.append([forward, math.log10(error + 1e-12), backward])
    forward, error, backward = torch.tensor(points).T
    charts, digits, most = [], [], 1.2 * forward.max().item()
    for name, y, box in (
        ("log10 error of h(1) (Fig. 3a)", error, (0, most, error.min() - 0.5, error.max() + 0.5)),
        ("evaluations backwards (Fig. 3c)", backward, (0, most, 0, most)),
    ):
        at, colour = torch.stack([forward, y], dim=1), "#3b6fd4"
        shapes = [("line", at, colour, 2), ("dots", at, colour, 4)]
        axes = ("evaluations forwards", name)
        charts.append(("", common.chart(shapes, tuple(map(float, box)), (380, 220), axes)))
    for i in wrong[:6]:
        image = F.interpolate(data.test[i : i + 1].cpu(), size=(140, 140))[0].expand(3, -1, -1)
        digits.append((f"{data.test_labels[i].item()} read as {guesses[i].item()}", image))
    common.save_panels(run.folder / "samples.png", charts, *([digits] if digits else []))


def one_pass(net, x, y):
    """h(1), and the evaluations of one forward and one backward pass on a batch."""
    counts = []
    h, forward = net.features(net.stem(x), counts)
    F.cross_entropy(net.head(h), y).backward()
    return h.detach(), forward, counts[0] if counts else forward


def latent(cfg, device):
    """A latent ODE and an RNN for each number of observations: Table 2."""
    nets = {}
    for n in cfg.observations:
        nets |= {(n, "latent"): LatentODE(solve=solver(cfg)), (n, "rnn"): TimeGapRNN()}
    runs = {}
    for (n, name), net in nets.items():
        run = runs[n, name] = common.Run(cfg, net, device, f"{name}-{n}" if runs else "")
        for x, index in () if cfg.sample else run.batches(Spirals(1_000, n, 0, device)):
            run.step(-run.model(x, index).mean() / n)  # App. E
    return run, functools.partial(evaluate_latent, cfg, runs, device), None


@torch.no_grad()
def evaluate_latent(cfg, runs, device):
    """Table 2: RMSE against the clean curve at the 100 times after the window; Fig. 8. Test windows
    lie on the same two curves as the training's, with other noise and times."""
    lines, panels = {"rnn": "RNN       ", "latent": "latent ODE"}, {"rnn": [], "latent": []}
    for (n, name), run in runs.items():
        test = Spirals(1_000, n, 1, device)
        curve = run.ema.predict(test.x, test.index)
        errors = (curve - test.curve[:, -curve.shape[1] :]).square().mean((0, 2))
        chunks = [error.mean().sqrt().item() for error in errors.split(100)]  # 3, or the last one
        names = ("rmse_before", "rmse_in_window", "rmse")[-len(chunks) :]
        run.report("test", network=name, observations=n, **dict(zip(names, chunks, strict=True)))
        lines[name] += f"{chunks[-1]:10.4f}"
        if n == cfg.observations[0]:
            title = f"{lines[name][:10].strip()}, {n} observations"
            panels[name] = [(title, spiral_image(test, curve, i)) for i in range(5)]
    run.say("predictive" + "".join(f"{n:6d}/100" for n in cfg.observations) + "  RMSE (Table 2)")
    run.say("\n".join(lines.values()))
    common.save_panels(run.folder / "samples.png", *panels.values())


def spiral_image(test, curve, i):
    """Fig. 8: the truth, what was observed, and the model's curve; red where it extrapolates."""
    truth, seen, curve = test.curve[i].cpu(), test.x[i].cpu(), curve[i].cpu()
    shapes = [("line", truth, "#c3c7d2", 5), ("dots", seen, "#15171f", 1.5)]
    shapes += [("line", part, "#d43b3b", 1.5) for part in (curve[:-200], curve[-100:]) if len(part)]
    shapes += [("line", curve[-201:-99], "#3b6fd4", 1.5)] if len(curve) == 300 else []
    low, high = truth.amin(0) - 1, truth.amax(0) + 1
    side = (high - low).max()
    left, bottom = ((low + high - side) / 2).tolist()
    return common.chart(shapes, (left, left + side, bottom, bottom + side), (200, 200))


def poisson(cfg, device):
    """The rate of events by maximum likelihood: Fig. 7."""
    run = common.Run(cfg, EventProcess(solve=solver(cfg)), device)
    for events, count in () if cfg.sample else run.batches(Events(500, 0, device)):
        run.step(-run.model(events, count) / count)
    return run, functools.partial(evaluate_poisson, run, Events(500, 1, device)), None


@torch.no_grad()
def evaluate_poisson(run, test):
    net, events, count = run.ema, torch.cat(test.sequences), len(test.sequences)
    net.solve = functools.partial(ode_solve, rtol=1e-6, atol=1e-6)
    times = torch.linspace(0, END, 501, device=run.device)
    z, _ = common.odeint(lambda z, t: net.f(z), net.z_0[None], times, rtol=1e-6, atol=1e-6)
    truth = true_rate(times)
    best = true_rate(events).log().sum().item() / count - torch.trapezoid(truth, times).item()
    log_p = net(events, count).item() / count
    run.report("test", log_likelihood=log_p, of_the_true_rate=best, gap=best - log_p)
    colours = {"true": "#c3c7d2", "learned": "#3b6fd4", "events": "#15171f"}
    curves = [torch.stack([times, y], dim=1) for y in (truth, net.rate(z[:, 0]))]
    shapes = [("line", curves[0], colours["true"], 5), ("line", curves[1], colours["learned"], 2)]
    for row, t in enumerate(test.sequences[:5]):
        points = torch.stack([t, torch.full_like(t, -0.4 * (row + 1))], dim=1)
        shapes.append(("dots", points, colours["events"], 2))
    labels, box = ("t", "rate of events"), (0, END, -2.4, 7)
    plot = common.chart(shapes, box, (640, 300), labels, colours.items())
    common.save_panels(run.folder / "samples.png", [("", plot)])


def main(cfg):
    own = {"latent": "spirals", "poisson": "events"}.get(cfg.experiment, cfg.dataset)
    if cfg.dataset != own:
        raise UserError(f"--experiment {cfg.experiment} makes its own {own}: leave out --dataset")
    if cfg.num_samples and cfg.experiment != "cnf":
        raise UserError("--num-samples is for the flow's: leave it out, or --experiment")
    if not all(2 <= n <= 100 for n in cfg.observations):
        raise UserError("--observations: whole numbers from 2 to 100")
    if (cfg.image_size or cfg.flip) and cfg.experiment != "classify":
        raise UserError("--image-size and --flip are for --experiment classify: leave them out")
    experiments = {"cnf": cnf, "classify": classify, "latent": latent, "poisson": poisson}
    run, evaluate, draw = experiments[cfg.experiment](cfg, common.setup(cfg))
    if not run.finish():
        return
    evaluate()
    if cfg.num_samples:
        with torch.no_grad():
            run.write_samples(draw)
    run.say(f"see {run.folder / 'samples.png'}")


if __name__ == "__main__":
    common.cli(main, Config, PRESETS)
