"""Building Normalizing Flows with Stochastic Interpolants. Albergo, Vanden-Eijnden, 2209.15571v3

Implements  Eq. 3 (the continuity equation: flow, likelihood); Eq. 4 (interpolants); Prop. 1 (the
            objective G, its minimum, its diagnostic); Prop. 2 (G maximised over the interpolant:
            optimal transport); Prop. 3 (the Wasserstein bound); Prop. 4 (the score from the
            velocity); App. B (the velocity at both ends); Fig. 2 (from noise, and between data)
Conventions t = 0 is the base, x_0 ~ rho_0; t = 1 is the target, x_1 ~ rho_1; both are arbitrary.
            A velocity is v(x, t). In Prop. 4 alone rho_0 is N(0, I).
Departures  1. Numbers of equations and propositions were checked; a setting marked "unverified" is
               as remembered; other settings, the networks, EMA, clipping and decay are our own.
            2. Interpolant and velocity take one step of Adam together, in opposite directions.
            3. The exponent 1 + 2K of Prop. 3 is derived here, in `wasserstein_bound`.
            4. On small images the U-Net sees patches of 2 x 2 pixels, and Muon trains its kernels.
Run         python interflow.py             checkerboard: NLL 2.156 from noise, 2.244 from data (its
                                            entropy is 2.079); 100 s on one core
            python interflow.py --source moons --dataset pinwheel
            python interflow.py --learn     with learned coefficients
            python interflow.py --bound     two Gaussians: W_2² 4e-6, bound 0.041; untrained 5.5, 22
            python interflow.py --dataset table.csv          test likelihood of a table
            python interflow.py --dataset mnist              digits
            python interflow.py --dataset cifar10            not run here
"""

import copy
import dataclasses
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

import common
from common import Count, Natural, Positive, Sizes, UserError, bcast


@dataclass
class Config(common.Config):
    source: str | None = None  # rho_0: normal or a data set [in 2-D: normal,eight_gaussians]
    steps: Natural = 5_000  # optimisation steps of each flow
    batch_size: Count = 512  # n target examples per step, over all processes together
    lr: Positive = 4e-3  # peak learning rate of Adam
    optimizer: Literal["adam", "muon"] = "adam"  # muon: for the kernels of convolutions
    interpolant: Literal["trigonometric", "linear"] = "trigonometric"  # the paper's main choice
    learn: bool = False  # add a Fourier series to a_t and b_t, learned by maximising G (Prop. 2)
    terms: Count = 3  # M of that series
    base_batch: Count | None = None  # N base examples: all N n pairs [n of each, in pairs]
    time_batch: Count = 10  # K times per step, with --base-batch (10 to 20 in tables: unverified)
    time_alpha: Positive = 1.0  # t ~ Beta(alpha, beta)
    time_beta: Positive = 1.0  # below 1: more times near the target
    solver: Literal["euler", "midpoint", "heun", "rk4", "dopri5"] = "dopri5"  # ODE solver
    nfe: Count = 100  # evaluations of a fixed-step solver
    tol: Positive = 1e-5  # atol = rtol of dopri5, in sampling and likelihood
    nll_examples: Natural = 2_000  # held-out examples whose likelihood is computed
    divergence: Literal["exact", "rademacher", "gaussian"] = "exact"  # exact, or Hutchinson's probe
    bound: bool = False  # train on two Gaussians; print the bound of Prop. 3 beside the distance
    width: Count = 128  # units of the MLP, or base channels of the U-Net
    blocks: Count = 2  # residual blocks, of the MLP or of each level of the U-Net
    mult: Sizes = (1, 2, 2, 2)  # channel multiple of each level of the U-Net
    attention: Sizes | None = (16,)  # resolutions with attention, but for the middle block
    patch: Count = 1  # side of the patches of pixels that the U-Net sees as channels
    dropout: common.Fraction = 0.0  # of the U-Net

    learned = (*common.Config.learned, "source", "interpolant")


SMALL_IMAGES = common.SMALL_UNET | {  # minutes on two cores
    "steps": 6_500,
    "time_beta": 0.75,  # Beta(1, 0.75): unverified
    "tol": 1e-4,
    "nll_examples": 128,
    "divergence": "rademacher",
}
PRESETS = dict.fromkeys(("glyphs", "mnist", "fashion_mnist", "folder"), SMALL_IMAGES) | {
    "cifar10": {  # the paper's, as remembered: all unverified but the two that say otherwise
        "steps": 500_000,
        "batch_size": 400,
        "lr": 1e-4,  # with a decay by 0.985 every 1000 steps; here a cosine
        "time_beta": 0.75,
        "width": 256,
        "mult": (1, 2, 2, 2, 2),
        "ema": None,
        "nll_examples": 10_000,  # our own
        "divergence": "rademacher",  # our own
    },
}


# ---- Interpolants -------------------------------------------------------------------------------


class Interpolant(nn.Module):
    """I_t(x_0, x_1) = a_t x_0 + b_t x_1, for any curves with a_0 = b_1 = 1 and a_1 = b_0 = 0.

    curves: a function of t, of any shape, that returns a, b and their time derivatives, of t's
    shape. The conditions on them say that I_0 = x_0 and I_1 = x_1 (Eq. 4).
    """

    def __init__(self, curves):
        super().__init__()
        self.curves = curves

    def coefficients(self, t):
        return self.curves(t)

    def forward(self, x_0, x_1, t):
        """x_0, x_1 (B, ...), t (B,) -> I_t and dI_t/dt, (B, ...)."""
        a, b, da, db = (bcast(c, x_1) for c in self.coefficients(t))
        return a * x_0 + b * x_1, da * x_0 + db * x_1  # Eq. 4


def linear(t):
    one = torch.ones_like(t)
    return 1 - t, t, -one, one


def trigonometric(t):
    cos, sin = torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
    return cos, sin, -math.pi / 2 * sin, math.pi / 2 * cos


class Fourier(Interpolant):
    """Given curves plus sine series, which vanish at both ends; their coefficients are learned.

    a_t + 1/M sum_m alpha_m sin(pi m t), and b_t likewise with beta (form: unverified). alpha's and
    beta's gradients are reversed: a step that descends a loss ascends it in them (Prop. 2). They
    are the parameters times `pace`: at the velocity's own pace they would outrun it, and ascend
    its error instead of the minimum of G.
    """

    pace = 0.1

    def __init__(self, curves, terms):
        super().__init__(curves)
        self.alpha = nn.Parameter(torch.zeros(terms))
        self.beta = nn.Parameter(torch.zeros(terms))

    def coefficients(self, t):
        a, b, da, db = self.curves(t)
        M = len(self.alpha)
        angle = math.pi * torch.arange(1, M + 1, dtype=t.dtype, device=t.device)  # (M,)
        sin = torch.sin(angle * t[..., None]) / M
        dsin = angle * torch.cos(angle * t[..., None]) / M
        alpha, beta = (self.pace * (2 * c.detach() - c) for c in (self.alpha, self.beta))  # Prop. 2
        return a + sin @ alpha, b + sin @ beta, da + dsin @ alpha, db + dsin @ beta


# ---- The objective ------------------------------------------------------------------------------


def G(v, interpolant, x_0, x_1, t):
    """E[|v(I_t)|² - 2 dI_t/dt . v(I_t)] over matching rows x_0, x_1 (B, ...) and t (B,).

    Its only minimum is v_t(x) = E[dI_t/dt | I_t = x], where it is -E|v_t(I_t)|².
    """
    x_t, dx_t = interpolant(x_0, x_1, t)
    v_t = v(x_t, t)
    return (v_t.square() - 2 * dx_t * v_t).flatten(1).sum(1).mean()  # Prop. 1


def all_pairs(x_0, x_1, t):
    """x_0 (N, ...), x_1 (n, ...), t (K,) -> K N n rows: every x_0 with every x_1, at every t.

    Over them G is the paper's empirical objective, in which an example serves many times.
    """
    K, N, n = len(t), len(x_0), len(x_1)
    x_0 = x_0[None, :, None].expand(K, N, n, *x_0.shape[1:]).flatten(0, 2)
    x_1 = x_1[None, None].expand(K, N, n, *x_1.shape[1:]).flatten(0, 2)
    return x_0, x_1, t.repeat_interleave(N * n)


def diagnose(v, interpolant, x_0, x_1):
    """How near v is to the minimum of G, from independent x_0, x_1 of any two numbers: a dict.

    G + E|v|² is 0 at the minimum. So it is at v = 0: read it beside G and E|v|². The last two are
    v's errors in root mean square at t = 0 and t = 1, where the minimum is known but for a mean,
    whose own error over these rows is subtracted; a single row has no such figures.
    """

    def mean_square(v):
        return v.square().flatten(1).sum(1).mean()

    n = min(len(x_0), len(x_1))
    x_0, x_1, t = x_0[:n], x_1[:n], torch.rand(n, device=x_0.device)
    g, square = G(v, interpolant, x_0, x_1, t), mean_square(v(interpolant(x_0, x_1, t)[0], t))
    figures = {"G": g, "v_squared": square, "G_plus_v_squared": g + square}  # Prop. 1
    if n > 1:
        v_0, v_1 = end_velocities(x_0, x_1, interpolant)
        _, _, da, db = interpolant.coefficients(torch.tensor([0.0, 1.0]).to(x_0))
        noise_0, noise_1 = (x.flatten(1).var(dim=0).sum() / n for x in (x_1, x_0))
        error_0 = mean_square(v(x_0, 0 * t) - v_0) - db[0] ** 2 * noise_0
        error_1 = mean_square(v(x_1, 0 * t + 1) - v_1) - da[1] ** 2 * noise_1
        figures |= {"error_at_0": error_0.relu().sqrt(), "error_at_1": error_1.relu().sqrt()}
    return {name: figure.item() for name, figure in figures.items()}


def end_velocities(x_0, x_1, interpolant):
    """The exact v_0 at the rows x_0 and v_1 at x_1, (B, ...): at an end, I_t = x tells nothing of
    the other end, which enters by its mean."""
    _, _, da, db = interpolant.coefficients(torch.tensor([0.0, 1.0]).to(x_0))
    return da[0] * x_0 + db[0] * x_1.mean(0), da[1] * x_0.mean(0) + db[1] * x_1  # App. B


def sample_times(n, alpha, beta, device="cpu"):
    """n times, t ~ Beta(alpha, beta). Any density above 0 on (0, 1) leaves G's minimum in place."""
    return torch.distributions.Beta(alpha, beta).sample((n,)).to(device)


class InterFlow(nn.Module):
    """The velocity v(x, t) together with its interpolant, so that a run trains and saves both."""

    def __init__(self, velocity, interpolant):
        super().__init__()
        self.velocity, self.interpolant = velocity, interpolant

    def forward(self, x, t):
        return self.velocity(x, t)


# ---- Flow, likelihood, score --------------------------------------------------------------------


def transport(v, x, times=(0.0, 1.0), **solver):
    """Solve dX/dt = v(X, t), either way in time: x (B, ...) at times[0] -> (X at times[1], NFE).

    A tensor of times gives the states at all of them, (T, B, ...).
    """
    with torch.no_grad():
        return common.odeint(v, x, times, **solver)  # the characteristics of Eq. 3


def log_prob(v, x, log_rho, times=(1.0, 0.0), divergence="exact", **solver):
    """log density in nats, (B,), of x (B, ...) at times[0], from log_rho at times[1]; and the NFE.

    Times (1, 0) score targets by the base's density, (0, 1) base examples by the target's: along
    the flow d log rho_t / dt = -div v. Unbiased with a probe in place of the exact divergence.
    """
    z = None if divergence == "exact" else common.hutchinson_probe(x, divergence)
    with torch.no_grad():
        log_p, _, nfe = common.log_likelihood(v, x, log_rho, times, z=z, **solver)  # Eq. 3
    return log_p, nfe


def score(v, x, t, interpolant):
    """grad log rho_t(x), (B, ...), of the velocity v, for rho_0 = N(0, I) and t < 1.

    The expectations z of x_0 and y of x_1 given I_t = x satisfy x = a z + b y, v = a' z + b' y; and
    z = -a grad log rho_t.
    """
    a, b, da, db = (bcast(c, x) for c in interpolant.coefficients(t))
    return (b * v(x, t) - db * x) / (a * (a * db - da * b))  # Prop. 4


# ---- Gaussians: the velocity, W_2 and the bound in closed form ----------------------------------


class Gaussian:
    """N(mean, root rootᵀ), or N(mean, I) without a root: mean of any shape; root (D, D)."""

    is_image = False

    def __init__(self, name, mean, root=None):
        self.name, self.mean, self.root, self.shape = name, mean, root, tuple(mean.shape)

    def batch(self, n):
        z = torch.randn(n, *self.shape, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + (z if self.root is None else z @ self.root.mT), None

    @property
    def cov(self):
        return self.root @ self.root.mT


def gaussian_path(t, interpolant, rho_0, rho_1):
    """For independent Gaussian ends, at times t (T,): I_t's mean (T, D) and covariance (T, D, D),
    and the velocity v_t(x) = A x + c: A (T, D, D), c (T, D)."""
    a, b, da, db = (c[:, None] for c in interpolant.coefficients(t))
    mean = a * rho_0.mean + b * rho_1.mean
    cov = (a**2)[..., None] * rho_0.cov + (b**2)[..., None] * rho_1.cov
    cross = (a * da)[..., None] * rho_0.cov + (b * db)[..., None] * rho_1.cov  # of dI/dt and I
    A = torch.linalg.solve(cov, cross, left=False)  # cross cov⁻¹: the regression on I_t
    c = da * rho_0.mean + db * rho_1.mean - (A @ mean[..., None])[..., 0]
    return mean, cov, A, c


def bures_distance(mean_0, root_0, mean_1, root_1):
    """W_2², the squared Wasserstein distance of the two N(mean, root rootᵀ)."""
    cross = torch.linalg.matrix_norm(root_0.mT @ root_1, "nuc")  # tr (S_0^½ S_1 S_0^½)^½
    traces = root_0.square().sum() + root_1.square().sum()
    return (mean_0 - mean_1).square().sum() + traces - 2 * cross


def wasserstein_bound(v, interpolant, rho_0, rho_1):
    """Of a velocity v(x, t), affine in x, between Gaussians: the dict of

    W2_squared  W_2² of rho_1 and of what v makes of rho_0;
    bound       e^(1 + 2K) H, which is never less;
    H           int E|v - u|² dt, u the minimum of G: the excess of G over its minimum;
    K           the largest Lipschitz constant of v(., t);
    G, min_G    of v, and of u, which is at most
    limit       -W_2²(rho_0, rho_1), the best interpolant's (Prop. 2).

    If X follows u and Y follows v from the same start, d/dt E|Y - X|² is
    2 E (Y - X).(v(Y) - v(X) + v(X) - u(X)) <= (1 + 2K) E|Y - X|² + E|v(X) - u(X)|², so Gronwall's
    lemma gives E|Y_1 - X_1|² <= e^(1 + 2K) H, and W_2² is the least over all couplings.
    Exact up to the trapezoidal rule in time and the solver's tolerance.
    """
    D = len(rho_0.mean)
    t = torch.linspace(0, 1, 2001).to(rho_0.mean)
    mean, cov, A, c = gaussian_path(t, interpolant, rho_0, rho_1)
    corners = torch.cat([torch.zeros(1, D), torch.eye(D)]).to(rho_0.mean)  # 0, e_1, ... e_D
    with torch.no_grad():
        values = v(corners.repeat(len(t), 1), t.repeat_interleave(D + 1)).view(-1, D + 1, D)
    A_hat, c_hat = (values[:, 1:] - values[:, :1]).mT, values[:, 0]

    def energy(A, c):  # int E|A I_t + c|² dt
        spread = ((A @ cov) * A).sum((1, 2))
        shift = (A @ mean[..., None])[..., 0] + c
        return torch.trapezoid(spread + shift.square().sum(1), t)

    H = energy(A_hat - A, c_hat - c)
    K = torch.linalg.matrix_norm(A_hat, ord=2).max()
    ends, _ = transport(v, corners, rtol=1e-9, atol=1e-9)  # the flow is affine as well
    M, m = (ends[1:] - ends[:1]).mT, ends[0]
    W2_squared = bures_distance(M @ rho_0.mean + m, M @ rho_0.root, rho_1.mean, rho_1.root)
    figures = {"W2_squared": W2_squared, "bound": torch.exp(1 + 2 * K) * H}  # Prop. 3
    figures |= {"H": H, "K": K, "G": H - energy(A, c), "min_G": -energy(A, c)}
    figures["limit"] = -bures_distance(rho_0.mean, rho_0.root, rho_1.mean, rho_1.root)  # Prop. 2
    return {name: figure.item() for name, figure in figures.items()}


class AffineVelocity(nn.Module):
    """v(x, t) = A_t x + c_t, with A_t and c_t from an MLP of t: what two Gaussians need."""

    def __init__(self, dim, width=64):
        super().__init__()
        layers = [nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        self.curve = nn.Sequential(*layers, nn.Linear(width, dim * (dim + 1)))

    def forward(self, x, t):
        A, c = self.curve(t[:, None]).split([x.shape[1] ** 2, x.shape[1]], dim=1)
        return (A.view(len(x), x.shape[1], -1) @ x[..., None])[..., 0] + c


# ---- Tables -------------------------------------------------------------------------------------


@dataclass
class Table(common.Data):
    """The rows of a file, standardised by the mean and standard deviation of the training rows."""

    validation: torch.Tensor | None = None
    mean: torch.Tensor | None = None  # (D,), of the training rows, and their deviations
    std: torch.Tensor | None = None

    @property
    def log_scale(self):  # what a row's log density loses
        return self.std.log().sum().item()


def read_table(path):
    """The numbers in a .npy file, or in a .csv file with or without a header: float64 (N, D)."""
    try:
        if Path(path).suffix == ".npy":
            rows, header = np.load(path, allow_pickle=False), 0
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # numpy warns of an empty file
                rows = np.genfromtxt(path, delimiter=",", comments=None, encoding="utf-8-sig")
            header = int(rows.ndim == 2 and np.isnan(rows[0]).all())  # what is no number is nan
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, ValueError, EOFError, UserWarning) as error:
        raise UserError(f"{path} is no table of numbers: {str(error)[:150]}") from None
    if not isinstance(rows, np.ndarray) or rows.dtype.kind not in "fiu" or rows.ndim != 2:
        raise UserError(f"{path} must hold one array of real numbers, rows by columns")
    rows = rows[header:].astype(np.float64)
    if rows.shape[0] < 20 or rows.shape[1] < 2:
        shape = f"{rows.shape[0]} rows and {rows.shape[1]} columns"
        raise UserError(f"{path} has {shape}; the least is 20 rows and 2 columns")
    if not np.isfinite(rows).all():
        row, column = np.argwhere(~np.isfinite(rows))[0] + 1
        at = f"line {row + header}, column {column}"
        raise UserError(f"{path}: {at} is no finite number; mend or remove the line")
    return rows


def load_table(path, device="cpu"):
    """A tenth of the rows to test, a tenth to validate, the others to train, shuffled by seed 0."""
    rows = read_table(path)
    rows = rows[np.random.default_rng(0).permutation(len(rows))]
    tenth = len(rows) // 10
    test, validation, train = np.split(rows, [tenth, 2 * tenth])
    if (train == train[0]).all(0).any():
        column = int((train == train[0]).all(0).argmax()) + 1
        raise UserError(f"column {column} of {path} is constant: it has no density; remove it")
    mean, std = train.mean(0), train.std(0)
    train, test, validation = (
        torch.from_numpy((x - mean) / std).float().to(device) for x in (train, test, validation)
    )
    labels = [torch.zeros(len(x), dtype=torch.long, device=device) for x in (train, test)]
    mean, std = torch.from_numpy(mean), torch.from_numpy(std)  # float64, which not all devices have
    parts = (train, labels[0], test, labels[1])
    return Table(path, *parts, validation=validation, mean=mean, std=std)


# ---- Training and evaluation --------------------------------------------------------------------


def train(cfg, run, source, target):
    """Minimise G over v, and maximise it over the interpolant where that is learned."""
    for x_1, _ in run.batches(target):  # x_1 ~ rho_1, (n, ...)
        x_0, _ = source.batch(cfg.base_batch or len(x_1))  # x_0 ~ rho_0, (N, ...), independent
        x_0, x_1 = continuous(source, x_0), continuous(target, x_1)
        K = cfg.time_batch if cfg.base_batch else len(x_1)
        t = sample_times(K, cfg.time_alpha, cfg.time_beta, x_1.device)  # (K,)
        if cfg.base_batch:
            x_0, x_1, t = all_pairs(x_0, x_1, t)  # K N n rows
        loss = G(run.model, run.net.interpolant, x_0, x_1, t)  # Prop. 1, Prop. 2
        run.step(loss / x_1[0].numel())


HELD_OUT = 10_000  # examples to measure by


def continuous(data, x):
    """Images become a density by uniform noise within their levels; vectors pass."""
    return common.dequantize(x) if data.is_image else x


def held_out(data, n):
    """n examples that the training has not seen, or all there are, in random order, (n, ...)."""
    if isinstance(data, Gaussian):
        return data.batch(n)[0]
    return continuous(data, common.to_float(data.test[torch.randperm(len(data.test))[:n]]))


def eight_gaussians_log_prob(x):
    """The log density in nats, (B, 2) -> (B,), of common's data set of this name."""
    angle = torch.arange(8, device=x.device, dtype=x.dtype) * math.pi / 4
    modes = 2.0 * torch.stack([angle.cos(), angle.sin()], dim=1)
    square = (x[:, None] - modes).square().sum(2) / 0.15**2  # (B, 8)
    return (-square / 2).logsumexp(1) - math.log(8 * 2 * math.pi * 0.15**2)


LOG_DENSITIES = {  # of an end: then the flow has the likelihood of the other end
    "normal": common.standard_normal_log_prob,
    "eight_gaussians": eight_gaussians_log_prob,
}


def report_likelihood(cfg, run, split, data, x, log_rho, times=(1.0, 0.0), **about):
    """Of the rows x of data: mean negative log likelihood in nats, beside the entropy where that is
    known; of images bits per dimension."""
    options = {"divergence": cfg.divergence, "rtol": cfg.tol, "atol": cfg.tol}
    parts = x.split(64 if data.is_image else 10_000)
    log_p = torch.cat([log_prob(run.ema, part, log_rho, times, **options)[0] for part in parts])
    if data.is_image:
        name, figure = "bits_per_dim", common.bits_per_dim(log_p, x[0].numel())
    else:
        name, figure = "nll", data.log_scale - log_p if isinstance(data, Table) else -log_p
    figures = {name: figure.mean().item(), "standard_error": common.standard_error(figure)}
    if data.entropy is not None:
        figures |= {"entropy": data.entropy, "gap": figures[name] - data.entropy}
    run.report(split, **about, **figures, examples=len(x))


def evaluate_vectors(cfg, run, source, target):
    """Report a flow's figures, and return rows of panels: the flow forwards, and backwards."""
    v, n, rows = run.ema, cfg.nll_examples, []
    a, b = (source, held_out(source, HELD_OUT)), (target, held_out(target, HELD_OUT))
    for (start, x), (end, goal), times in ((a, b, (0.0, 1.0)), (b, a, (1.0, 0.0))):
        flow = f"{start.name} to {end.name}"
        if start is source:
            with torch.no_grad():
                run.report("objective", flow=flow, **diagnose(v, v.interpolant, x, goal))
        if n and start.name in LOG_DENSITIES and isinstance(end, common.Data):
            known = LOG_DENSITIES[start.name], times[::-1]
            if isinstance(end, Table):  # to choose settings by
                report_likelihood(cfg, run, "validation", end, end.validation[:n], *known)
            report_likelihood(cfg, run, "test", end, end.test[:n], *known, flow=flow)
        x_1, nfe = transport(v, x, times, **common.solver_options(cfg))
        frames, _ = transport(v, x, torch.linspace(*times, 5), rtol=cfg.tol, atol=cfg.tol)
        frames = torch.cat([frames[:-1], x_1[None]])
        distance = common.energy_distance(x_1[:5_000], goal[:5_000])
        run.report("samples", flow=flow, energy_distance=distance, evaluations=nfe)
        rows.append(panels(v, start, end, times, frames, goal))
    return rows


def panels(v, start, end, times, frames, goal):
    """A flow's frames (5, N, D), its goal (M, D) and its paths, in the first two columns."""
    bound = 1.4 * torch.cat([frames[0, :, :2], goal[:, :2]]).abs().quantile(0.95).item()
    titles = [f"{start.name}, t = {times[0]:.0f}"]
    titles += [f"t = {t:.2f}" for t in torch.linspace(*times, 5)[1:4].tolist()]
    titles += [f"flow to t = {times[1]:.0f}", f"{end.name}, t = {times[1]:.0f}"]
    images = [common.density_image(x[:, :2], bound, bins=64) for x in (*frames, goal)]
    grid = torch.linspace(*times, 41)
    lines, _ = transport(v, frames[0, :300], grid, rtol=1e-4, atol=1e-4)
    paths = common.trajectory_image(lines[..., :2], bound)
    return [*zip(titles, images, strict=True), ("paths", paths)]


def evaluate_images(cfg, run, source, target):
    """A picture of samples, with their starts above them; test bits per dimension from noise."""
    from_noise = isinstance(source, Gaussian)
    x_0 = held_out(source, 64 if from_noise else 32)
    x_1, nfe = transport(run.ema, x_0, **common.solver_options(cfg))
    run.report("samples", evaluations=nfe)
    columns = min(8, len(x_0))
    whole = len(x_0) // columns * columns  # rows
    rows = zip(x_0[:whole].split(columns), x_1[:whole].split(columns), strict=True)
    shown = x_1 if from_noise else torch.cat([torch.cat(pair) for pair in rows])
    common.save_images(run.folder / "samples.png", shown, columns)
    ends = held_out(source, 512), held_out(target, 512)
    with torch.no_grad():
        run.report("objective", **diagnose(run.ema, run.ema.interpolant, *ends))
    if cfg.nll_examples and from_noise:
        x_1 = held_out(target, cfg.nll_examples)
        report_likelihood(cfg, run, "test", target, x_1, common.standard_normal_log_prob)


# ---- The runs -----------------------------------------------------------------------------------


def load(cfg, name, device):
    """The data set of this name, or the table in this file."""
    if Path(name).suffix not in (".npy", ".csv") or Path(name).is_dir():
        return common.load_data(dataclasses.replace(cfg, dataset=name), device)
    if cfg.image_size or cfg.flip:
        raise UserError(f"{name} is not made of images: leave out --image-size and --flip")
    return load_table(name, device)


def make_interpolant(cfg):
    curves = {"linear": linear, "trigonometric": trigonometric}[cfg.interpolant]
    return Fourier(curves, cfg.terms) if cfg.learn else Interpolant(curves)


def prepare(cfg, device, name, target, stage=""):
    """The run and the source of the flow that starts at the density of this name."""
    noise = Gaussian(name, torch.zeros(target.shape, device=device))
    source = noise if name == "normal" else load(cfg, name, device)
    if source.shape != target.shape:
        shapes = f"{source.shape} and {target.shape}"
        raise UserError(f"--source {name} and --dataset {cfg.dataset} differ in shape: {shapes}")
    torch.manual_seed(common.process_seed(cfg))  # the same start, whatever was trained before
    if isinstance(target, Table):  # no random features: of many columns they would be noise
        velocity = common.MLP(*target.shape, width=cfg.width, blocks=cfg.blocks, features=0)
    else:
        velocity = common.network(cfg, target)
    net = InterFlow(velocity, make_interpolant(cfg))
    return common.Run(cfg, net, device, stage, cfg.optimizer), source


def source_names(cfg):
    """The bases, one flow each; Fig. 2's two kinds if none is named. Refuses what cannot go."""
    common.solver_options(cfg)
    names = cfg.source.split(",") if cfg.source else ["normal"]
    if not cfg.source and cfg.dataset in common.DENSITIES:
        eight = cfg.dataset == "eight_gaussians"
        names.append("checkerboard" if eight else "eight_gaussians")  # Fig. 2
    if len({Path(name).stem for name in names}) < len(names):
        raise UserError(f"--source {cfg.source} names a density twice")
    if cfg.learn and not cfg.time_alpha == cfg.time_beta == 1:
        raise UserError("--learn takes every time alike: give --time-alpha 1 --time-beta 1")
    of_flows = ("source", "dataset", "width", "blocks", "num_samples") if cfg.bound else ()
    if unused := [name for name in of_flows if getattr(cfg, name) != getattr(Config, name)]:
        flag = unused[0].replace("_", "-")
        raise UserError(f"--bound has two Gaussians and a small network: leave out --{flag}")
    return names


def bound(cfg):
    """Prop. 3 before and after training, between two Gaussians with different axes."""

    def ends(*kind):
        mean = torch.tensor([[-1.0, 0.5], [1.0, -0.5]]).to(*kind)
        root = torch.tensor([[[0.8, 0.0], [0.3, 0.5]], [[0.5, 0.0], [-0.4, 1.0]]]).to(*kind)
        return [Gaussian(f"rho_{i}", mean[i], root[i]) for i in range(2)]

    device = common.setup(cfg)
    rho_0, rho_1 = ends(device)
    run = common.Run(cfg, InterFlow(AffineVelocity(2), make_interpolant(cfg)), device)

    @torch.no_grad()
    def report(split):
        v = copy.deepcopy(run.ema).cpu().double()
        run.report(split, **wasserstein_bound(v, v.interpolant, *ends(torch.float64)))

    if not cfg.sample:
        if run.done == 0:
            report("untrained")
        train(cfg, run, rho_0, rho_1)
    if run.finish():
        report("test")
        common.save_panels(run.folder / "samples.png", *evaluate_vectors(cfg, run, rho_0, rho_1))
        run.say(f"see {run.folder / 'samples.png'}")


def main(cfg):
    names = source_names(cfg)
    if cfg.bound:
        bound(cfg)
        return
    device = common.setup(cfg)
    target, flows = load(cfg, cfg.dataset, device), []
    if target.is_image and len(names) > 1:
        raise UserError(f"--source {cfg.source}: images take one, which samples.png starts from")
    for name in names:
        stage = Path(name).stem if flows else ""
        later = Path(cfg.sample or "checkpoint.pt").with_name(f"checkpoint-{stage}.pt")
        if cfg.sample and stage and not later.exists():
            continue  # the run has not come to it
        run, source = prepare(cfg, device, name, target, stage)
        if not cfg.sample:
            train(cfg, run, source, target)
        flows.append((run, source))
    run, source = flows[0]
    if not run.finish():
        return

    def draw(n):  # from rho_1
        x_0 = held_out(source, n)
        x_0 = x_0[torch.arange(n) % len(x_0)]
        x_1, _ = transport(run.ema, x_0, **common.solver_options(cfg))
        is_table = isinstance(target, Table)
        return (target.mean + target.std * x_1.cpu()).float() if is_table else x_1

    if target.is_image:
        evaluate_images(cfg, run, source, target)
    else:
        rows = [row for flow in flows for row in evaluate_vectors(cfg, *flow, target)]
        common.save_panels(run.folder / "samples.png", *rows)
    if cfg.num_samples:
        run.write_samples(draw)
    run.say(f"see {run.folder / 'samples.png'}")


if __name__ == "__main__":
    common.cli(main, Config, PRESETS)
