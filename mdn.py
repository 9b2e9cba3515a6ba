"""Mixture Density Networks. Bishop, Neural Computing Research Group report NCRG/94/004, Aston, 1994

Implements  Eq. 22, Eq. 23 (mixture of Gaussian kernels); Eq. 25, Eq. 26, Eq. 27 (its parameters);
            Eq. 29 (error function); Eq. 30 (posteriors); Eq. 35, Eq. 38, Eq. 39 (the error's
            derivatives); Eq. 45, Eq. 46, Eq. 47 (mean, variance); Eq. 48 (the highest component);
            Eq. 49 (the most probable one); Sec. 3 (mode, BFGS); Eq. 51 (sum of squares); Eq. 55
            (inverse problem, Sec. 5); Eq. 56, Eq. 57 (robot arm, Sec. 6); Table 1
Conventions t is the target, (B, c); x the input, (B, d); z the network's outputs, (B, (c + 2) K).
            Errors and likelihoods are in nats per case. Everything is float64, but z in training by
            Adam, which Run rounds to float32.
Departures  1. The error is a mean over the cases, not a sum. Where in the paper's BFGS lies a line
               search, here lies one of ours. A .csv is trained by Adam on minibatches instead.
            2. sigma² = exp(2 z) + sigma_min²: the robot's angles have no noise, and without a floor
               their likelihood has no bound. --sigma-min 1e-9 is the paper's sigma = exp(z).
            3. Starting weights and a weight decay of 1e-7 (a .csv's: 1e-5), lest a unit become a
               step between two cases, are ours: inputs are standardised, centres start at targets,
               biases decay too. BFGS begins at the best of three starts: see `best_start`.
            4. Eq. 47 is printed with sigma_i², but Eq. 46, a sum over c dimensions, has c sigma_i².
            5. The robot's networks are those after the last cycle; the paper keeps, of every tenth,
               the best by its test set's error. Our test sets have 10,000 cases, not 1,000.
Run         python mdn.py                                     19 CPU-s: NLL -1.075, limit -1.282
            python mdn.py --dataset robot                     38 CPU-s: RMS of the hand .0036,
                                                              least squares .0537 (15 times)
            python mdn.py --dataset data.csv --targets a,b    any table of numbers
"""

import copy
import csv
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import common
from common import Count, Fraction, Natural, Positive, UserError


@dataclass
class Config(common.Config):
    dataset: str = "inverse"  # inverse, robot, or a .csv file whose first line names its columns
    targets: str | None = None  # columns of the .csv to predict, such as a,b
    inputs: str | None = None  # columns of the .csv to predict from (default: all others)
    kernels: Count = 5  # K, Gaussian kernels in the mixture
    hidden: Count = 50  # tanh units of the mixture density network, in one layer
    ls_hidden: Count = 50  # tanh units of the least-squares network
    optimizer: Literal["bfgs", "adam"] = "adam"  # bfgs: whole data set, own step, as in the paper
    steps: Natural = 4_000  # cycles of BFGS, or steps of Adam, of every network
    lr: Positive = 5e-3  # peak learning rate of Adam; BFGS searches along its line
    ema: Fraction | None = None  # decay of the weights' moving average, for Adam
    weight_decay: Fraction = 1e-5  # half of it times the squared weights joins the error
    sigma_min: Positive = 1e-2  # floor of the widths, in the targets' (or their standardised) units
    device: str = "cpu"  # or any torch device that knows float64

    learned = (*common.Config.learned, "targets", "inputs", "sigma_min")


PAPER = {"optimizer": "bfgs", "clip": None, "weight_decay": 1e-7, "sigma_min": 1e-3}
PRESETS = {
    "inverse": PAPER | {"steps": 1_000, "kernels": 3, "hidden": 20, "ls_hidden": 20},  # Sec. 5
    "robot": PAPER | {"steps": 3_000, "kernels": 2, "hidden": 10, "ls_hidden": 20},  # Sec. 6
}


# ---- The mixture --------------------------------------------------------------------------------


class Mixture(NamedTuple):
    """p(t | x) = sum_i alpha_i(x) phi_i(t | x), for every x of a batch."""

    log_alpha: Tensor  # (B, K)
    log_sigma: Tensor  # (B, K)
    mu: Tensor  # (B, K, c)

    @property
    def alpha(self):
        return self.log_alpha.exp()

    @property
    def sigma(self):
        return self.log_sigma.exp()


def mixture(z, kernels, sigma_min=0.0):
    """The network's outputs z (B, (c + 2) K) -> a Mixture: K for alpha, K for sigma, c K for mu."""
    z_alpha, z_sigma, z_mu = z.tensor_split((kernels, 2 * kernels), dim=1)
    log_alpha = z_alpha.log_softmax(dim=1)  # Eq. 25
    floor = z.new_full((), math.log(sigma_min) if sigma_min else -math.inf)
    log_sigma = torch.logaddexp(2 * z_sigma, 2 * floor) / 2  # Eq. 26, Departure 2
    return Mixture(log_alpha, log_sigma, z_mu.unflatten(1, (kernels, -1)))  # Eq. 27


def log_phi(m, t):
    """log phi_i(t | x) of every kernel: t (B, c) -> (B, K); all may have more leading axes."""
    c = t.shape[-1]
    square = (t[..., None, :] - m.mu).square().sum(dim=-1)
    log_norm = c / 2 * math.log(2 * math.pi) + c * m.log_sigma
    return -square / 2 * (-2 * m.log_sigma).exp() - log_norm  # Eq. 23


def log_density(m, t):
    """log p(t | x), (B, c) -> (B,). In logarithms: far from all kernels each phi_i is zero."""
    return (m.log_alpha + log_phi(m, t)).logsumexp(dim=-1)  # Eq. 22


def posterior(m, t):
    """pi_i(x, t), the probability that kernel i made t, (B, K)."""
    return (m.log_alpha + log_phi(m, t)).softmax(dim=-1)  # Eq. 30


# ---- The error and its derivatives --------------------------------------------------------------


def derivatives(m, t, sigma_min=0.0):
    """dE/dz of each case's error, (B, (c + 2) K), in closed form."""
    c, pi = t.shape[1], posterior(m, t)
    precision = (-2 * m.log_sigma).exp()  # 1 / sigma_i²
    error = m.mu - t[:, None]  # (B, K, c)
    free = 1 - sigma_min**2 * precision  # 1 for the paper's sigma = exp(z): Departure 2
    d_alpha = m.alpha - pi  # Eq. 35
    d_sigma = -pi * (error.square().sum(dim=2) * precision - c) * free  # Eq. 38
    d_mu = (pi * precision)[..., None] * error  # Eq. 39
    return torch.cat([d_alpha, d_sigma, d_mu.flatten(1)], dim=1)


class ErrorFunction(torch.autograd.Function):
    """E = -log p(t | x) of each case, (B,); backwards go the closed forms of `derivatives`."""

    @staticmethod
    def forward(ctx, z, t, kernels, sigma_min):
        m = mixture(z, kernels, sigma_min)
        ctx.save_for_backward(*m, t)
        ctx.sigma_min = sigma_min
        return -log_density(m, t)  # Eq. 29

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        *m, t = ctx.saved_tensors
        return grad[:, None] * derivatives(Mixture(*m), t, ctx.sigma_min), None, None, None


def sum_of_squares(y, t):
    """The least-squares network's error of each case, (B, c) -> (B,)."""
    return (y - t).square().sum(dim=1) / 2  # Eq. 51


# ---- What the mixture says about t --------------------------------------------------------------


def conditional_mean(m):
    """<t | x>, (B, c): what a least-squares network would learn."""
    return (m.alpha[..., None] * m.mu).sum(dim=1)  # Eq. 45


def conditional_variance(m):
    """s²(x) = <|t - <t | x>|² | x>, Eq. 46, (B,): the sum over the c dimensions."""
    c = m.mu.shape[2]
    spread = (m.mu - conditional_mean(m)[:, None]).square().sum(dim=2)
    return (m.alpha * (c * m.sigma.square() + spread)).sum(dim=1)  # Eq. 46, Eq. 47


def most_probable(m):
    """The centre of the kernel with the largest prior, the most mass: (B, c)."""
    return _centre(m, m.log_alpha)  # Eq. 49


def central_value(m):
    """The centre of the kernel that is highest at its own centre, alpha_i / sigma_i^c: (B, c)."""
    return _centre(m, m.log_alpha - m.mu.shape[2] * m.log_sigma)  # Eq. 48


def _centre(m, score):
    best = score.argmax(dim=1)[:, None, None].expand(-1, 1, m.mu.shape[2])
    return m.mu.gather(1, best).squeeze(1)


def mode(m, iterations=100):
    """The most likely t, (B, c): ascent of p(t | x) from every centre, and the highest end.

    Where the gradient of log p vanishes t is the mean of the centres with weights pi_i / sigma_i²;
    to go there never lowers p, since it is a step of the EM algorithm. (Sec. 3 names no algorithm.)
    """
    spread = Mixture(*(part[:, None] for part in m))  # every kernel, for each of K starts
    t = m.mu  # (B, starts, c)
    for _ in range(iterations):
        log_weight = m.log_alpha[:, None] + log_phi(spread, t) - 2 * m.log_sigma[:, None]
        t = log_weight.softmax(dim=2) @ m.mu  # Sec. 3
    return _centre(m._replace(mu=t), log_density(spread, t))


def sample(m):
    """One t ~ p(t | x) for each x, (B, c)."""
    kernel = torch.multinomial(m.alpha, 1)  # (B, 1)
    mu = m.mu.gather(1, kernel[..., None].expand(-1, 1, m.mu.shape[2])).squeeze(1)
    return mu + m.sigma.gather(1, kernel) * torch.randn_like(mu)


# ---- The inverse problem ------------------------------------------------------------------------

NOISE = 0.1  # of x, uniform in (-0.1, 0.1), Sec. 5


def forward_map(t):
    """x without its noise."""
    return t + 0.3 * torch.sin(2 * math.pi * t)  # Eq. 55


def exact_posterior(x, n=5_000):
    """1 / p(t | x), uniform over the t within NOISE of x, its mean and variance: (B,) each."""
    t = (torch.arange(n).to(x) + 0.5) / n
    inside = ((x[:, None] - forward_map(t)).abs() < NOISE).to(x)  # (B, n)
    length = inside.mean(dim=1)
    mean = inside @ t / n / length
    return length, mean, inside @ t**2 / n / length - mean**2


def inverse_limits(n=2_000):
    """The entropy of t given x, in nats, and its mean variance: no network can do better."""
    x = (torch.arange(n, dtype=torch.float64) + 0.5) / n * (1 + 2 * NOISE) - NOISE
    length, _, variance = exact_posterior(x)
    p_x = length / length.sum()
    return (p_x * length.log()).sum().item(), (p_x * variance).sum().item()


# ---- The robot arm ------------------------------------------------------------------------------

L_1, L_2 = 0.8, 0.2  # lengths of the links
RANGES = ((0.3, 1.2), (math.pi / 2, 3 * math.pi / 2))  # of theta_1 and theta_2
REPORTED = {"least squares": 0.0578, "most probable component": 0.0053}  # Table 1


def elbow(theta):
    """Where the first link ends: (..., 2) angles -> (..., 2)."""
    return L_1 * torch.stack([theta[..., 0].cos(), theta[..., 0].sin()], dim=-1)


def hand(theta):
    """The forward kinematics: angles (theta_1, theta_2), (..., 2), -> the hand (x_1, x_2)."""
    both = theta.sum(dim=-1)
    return elbow(theta) - L_2 * torch.stack([both.cos(), both.sin()], dim=-1)  # Eq. 56, Eq. 57


def miss(theta, x):
    """Root mean square distance between the hand and where it should be."""
    return (hand(theta) - x).square().sum(dim=-1).mean().sqrt().item()


# ---- Data ---------------------------------------------------------------------------------------


@dataclass
class Pairs:
    """Inputs and targets, float64: x (N, d), t (N, c), and as many columns held out."""

    x: Tensor
    t: Tensor
    test_x: Tensor
    test_t: Tensor
    mean: Tensor  # a .csv's targets are standardised: its columns' means and deviations, (c,)
    std: Tensor
    names: list  # of the targets
    whole: bool  # batches: the whole training set, or n cases at random

    def batch(self, n):
        if self.whole:
            return self.x, self.t
        index = torch.randint(len(self.x), (n,), device=self.x.device)
        return self.x[index], self.t[index]


def load_pairs(cfg, device):
    """The data set that cfg names. Raises UserError if it cannot be had."""
    is_file, rng = cfg.dataset.lower().endswith(".csv"), torch.Generator().manual_seed(0)
    for wrong, message in (
        (cfg.image_size or cfg.flip, "no images: leave out --image-size and --flip"),
        (not (is_file or cfg.dataset in PRESETS), "give inverse, robot, or a file that ends .csv"),
        (not is_file and (cfg.targets or cfg.inputs), "--targets, --inputs are for a .csv"),
    ):
        if wrong:
            raise UserError(f"--dataset {cfg.dataset}: {message}")

    def uniform(*shape):
        return torch.rand(shape, generator=rng, dtype=torch.float64)

    held_out, mean, std = torch.arange(11_000) >= 1_000, torch.zeros(1), torch.ones(1)
    if is_file:
        x, t, inputs, names = read_csv(cfg.dataset, cfg.targets, cfg.inputs)
        if not any("," in name for name in inputs):
            cfg.inputs = ",".join(inputs)  # another table may have them in another order
        held_out = torch.arange(len(x)) % 10 == 0
        training = t[~held_out]
        mean, std = training.mean(dim=0), training.std(dim=0)
        if (same := (training == training[0]).all(dim=0)).any():  # where std may round to above 0
            name = names[same.int().argmax()]
            raise UserError(f"{cfg.dataset}: {name!r} is the same in every case")
    elif cfg.dataset == "robot":
        low, high = torch.tensor(RANGES, dtype=torch.float64).T
        t = low + (high - low) * uniform(11_000, 2)
        x, names = hand(t), ["theta_1", "theta_2"]
    else:
        even = (torch.arange(1_000, dtype=torch.float64)[:, None] + 0.5) / 1_000
        t = torch.cat([even, uniform(10_000, 1)])
        x, names = forward_map(t) + NOISE * (2 * uniform(11_000, 1) - 1), ["t"]
    t = (t - mean) / std
    parts = (x[~held_out], t[~held_out], x[held_out], t[held_out], mean, std)
    return Pairs(*(part.to(device) for part in parts), names, cfg.optimizer == "bfgs")


def read_csv(path, targets, inputs=None):
    """x (N, d), t (N, c) and their columns' names, of a .csv with a line of names; or UserError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, skipinitialspace=True)
            header = [name.strip() for name in next(lines, [])]
            rows = [(lines.line_num, row) for row in lines if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path} as a .csv in UTF-8: {error}") from None
    t_names = [name.strip() for name in (targets or "").split(",")]
    others = [name for name in header if name not in t_names]
    x_names = [name.strip() for name in inputs.split(",")] if inputs else others
    names, shown = x_names + t_names, ", ".join(header[:12])
    unknown = ", ".join(name for name in names if name not in header)
    for wrong, message in (
        (len(set(header)) < len(header) or "" in header, "columns without a name of their own"),
        (not targets, f"--targets must name the columns to predict, of {shown}"),
        (unknown, f"no column {unknown}: it has {shown}"),
        (len(set(names)) < len(names), "--targets and --inputs name a column twice"),
        (not x_names, "no column besides the targets to predict them from"),
        (len(rows) < 20, f"{len(rows)} cases: at least 20 are needed, 2 to be held out"),
    ):
        if wrong:
            raise UserError(f"{path}: {message}")
    table = []
    for line, row in rows:
        cells = dict(zip(header, row, strict=False))
        try:
            table.append([float(cells[name]) for name in names])
        except (KeyError, ValueError) as error:
            raise UserError(f"{path}, line {line}: no number: {error}") from None
        if len(row) != len(header) or not all(map(math.isfinite, table[-1])):
            raise UserError(f"{path}, line {line}: not {len(header)} finite numbers")
    table = torch.tensor(table, dtype=torch.float64)
    return table[:, : len(x_names)], table[:, len(x_names) :], x_names, t_names


# ---- The network and its training ---------------------------------------------------------------


class Network(nn.Module):
    """One layer of tanh units: x (B, d), standardised by the training cases, -> z (B, outputs)."""

    def __init__(self, x, hidden, bias):
        super().__init__()
        std = x.std(dim=0, correction=0).where((x != x[0]).any(dim=0), 1.0)
        self.register_buffer("mean", x.mean(dim=0))
        self.register_buffer("std", std)
        kind = {"dtype": torch.float64, "device": x.device}
        self.hidden = nn.Linear(x.shape[1], hidden, **kind)
        self.output = nn.Linear(hidden, len(bias), **kind)
        nn.init.normal_(self.hidden.weight, std=x.shape[1] ** -0.5)
        nn.init.normal_(self.hidden.bias)  # the units bend at different places
        nn.init.normal_(self.output.weight, std=0.1 * (hidden + 1) ** -0.5)
        self.output.bias = nn.Parameter(bias.clone())

    def forward(self, x):
        return self.output(self.hidden((x - self.mean) / self.std).tanh())


def starting_mixture(t, kernels):
    """z ((c + 2) K,): kernels at some of the targets, apart so that their gradients differ."""
    mu = t[torch.randint(len(t), (kernels,))]
    log_sigma = t.std(dim=0).log().mean().expand(kernels)
    return torch.cat([0 * log_sigma, log_sigma, mu.flatten()])


class BFGS(torch.optim.Optimizer):
    """Quasi-Newton descent of objective() -> scalar, a cycle a step; H is dense, as in 1994."""

    def __init__(self, parameters, objective):
        super().__init__(parameters, {"lr": 1.0})
        self.objective = objective
        self.weights = self.param_groups[0]["params"]

    def _evaluate(self, w):
        vector_to_parameters(w, self.weights)
        with torch.enable_grad():
            E = self.objective()
        return E.item(), parameters_to_vector(torch.autograd.grad(E, self.weights))

    @torch.no_grad()
    def step(self):
        w, state = parameters_to_vector(self.weights), self.state[self.weights[0]]
        if not state:
            state["E"], state["g"] = self._evaluate(w)
        E, g, H = state["E"], state["g"], state.get("H")
        direction = -g if H is None else -(H @ g)
        slope = (g @ direction).item()
        if slope > 0:  # H is spoilt by rounding: the next cycle begins anew
            state.clear()
            return
        if -slope < 1e-14 * (1 + abs(E)):  # converged, to rounding
            return
        # A point low enough on the line, where the slope has risen enough (Wolfe): then y.s > 0
        length, low, high = 1.0, 0.0, math.inf
        for _ in range(40):
            s = length * direction
            E_new, g_new = self._evaluate(w + s)
            if not E_new <= E + 1e-4 * length * slope:  # too far; also where the error is NaN
                high = length
            elif (g_new @ direction).item() < 0.9 * slope:
                low = length
            else:
                break
            length = (low + high) / 2 if high < math.inf else 2 * length
        else:  # spoilt, too
            vector_to_parameters(w, self.weights)
            state.clear()
            return
        y = g_new - g
        y_s = y @ s
        if H is None:
            H = torch.eye(len(w), dtype=w.dtype, device=w.device) * (y_s / (y @ y))
        H_y = H @ y
        cross = torch.outer(H_y, s)
        H = H + (1 + y @ H_y / y_s) / y_s * torch.outer(s, s) - (cross + cross.T) / y_s  # Sec. 3
        state.update(E=E_new, g=g_new, H=H)


def best_start(nets, pairs, error, cycles=30):
    """Of networks as they start the one whose error is least after some cycles of BFGS. Of the
    robot's one in five never uses a kernel, and shows it by then."""
    errors = []
    for net in nets:
        net = copy.deepcopy(net)
        optimizer = BFGS(net.parameters(), lambda f=net: error(f(pairs.x), pairs.t).mean())
        for _ in range(cycles):
            optimizer.step()
        errors.append(optimizer.objective().item())
    return nets[errors.index(min(errors))]


def train(cfg, net, pairs, error, device, stage=""):
    """Minimise the mean of error(z, t) over the cases, and the weight decay; returns the Run."""

    def objective(f, x, t):
        decay = sum(weights.square().sum() for weights in net.parameters())
        return error(f(x).double(), t).mean() + cfg.weight_decay / 2 * decay

    def bfgs(parameters):
        return BFGS(parameters, lambda: objective(net, pairs.x, pairs.t))

    run = common.Run(cfg, net, device, stage, bfgs if cfg.optimizer == "bfgs" else "adam")
    if not cfg.sample:
        for x, t in run.batches(pairs):
            run.step(objective(run.model, x, t))
    return run


# ---- Evaluation ---------------------------------------------------------------------------------


def evaluate(cfg, run, m, y, pairs):
    """Figures of the mixtures m and the least-squares network's y, in the targets' own units."""
    nll = pairs.std.log().sum() - log_density(m, pairs.test_t)
    figures = {"nll": nll.mean().item(), "standard_error": common.standard_error(nll)}
    for name, t in (("mean", conditional_mean(m)), ("least_squares", y)):
        error = pairs.std * (t - pairs.test_t)
        figures[f"rmse_of_{name}"] = error.square().sum(dim=1).mean().sqrt().item()
    if cfg.dataset == "inverse":
        entropy, variance = inverse_limits()
        figures |= {"entropy": entropy, "least_rmse": math.sqrt(variance)}
    run.report("test", **figures)


def robot_table(run, m, y, x):
    """Errors of the hand that should be at x, ours beside the paper's where it has them. (A narrow
    kernel that is unlikely may hold the mode, and the central value.)"""
    angles = {"least squares": y, "conditional mean": conditional_mean(m)}
    angles |= {"most probable component": most_probable(m), "central value": central_value(m)}
    angles |= {"mode": mode(m), "sample": sample(m)}
    errors = {name: miss(theta, x) for name, theta in angles.items()}
    run.report("robot", **{name.replace(" ", "_"): error for name, error in errors.items()})
    run.say("RMS distance of the hand    here   the paper's")
    for name, error in errors.items():
        reported = f"{REPORTED[name]:.4f}" if name in REPORTED else ""
        run.say(f"{name:<24}{error:8.4f}   {reported}".rstrip())
    ratio = errors["least squares"] / errors["most probable component"]
    run.say(f"least squares is {ratio:.1f} times as far off as the most probable component")


# ---- Pictures -----------------------------------------------------------------------------------

RED, TEAL, ORANGE, GREY, BLACK = "#d6463c", "#00838f", "#ef8b1f", "#9aa0ad", "#15171f"
KERNELS = (TEAL, ORANGE, "#7b4bb7", "#5a9e2f", "#c2398b", "#7a5c3e")


def plot(title, box, axes, *series, heat=None):
    """A titled chart of series (name or "", "line" or "dots", x (N,), y (N,), colour, width)."""
    shapes, legend = [], []
    for name, kind, x, y, colour, width in series:
        shapes.append((kind, torch.stack([x.flatten(), y.flatten()], dim=1), colour, width))
        if name:
            legend.append((name, (colour if isinstance(colour, str) else colour[0])[:7]))
    return title, common.chart(shapes, box, (310, 270), axes, legend, heat)


def density_grid(m, values, j=0):
    """p of the j-th target at every one of the values (S,), for each x: (B, S)."""
    one = Mixture(m.log_alpha[:, None], m.log_sigma[:, None], m.mu[:, None, :, j : j + 1])
    return log_density(one, values[None, :, None].expand(len(m.mu), -1, 1)).exp()


def inverse_page(p, squares, forward, pairs):
    """Both problems by least squares; the mixture's density, priors, mean, mode and variance."""
    x = torch.linspace(-NOISE, 1 + NOISE, 482).double()[1:-1, None].to(pairs.x.device)
    t, unit = (torch.linspace(*ends, 480).to(x)[:, None] for ends in ((-0.05, 1.05), (0, 1)))
    m, (_, mean, variance) = p(x), exact_posterior(x[:, 0])
    wide, box, axes = (-NOISE, 1 + NOISE), (-NOISE, 1 + NOISE, -0.05, 1.05), ("x", "t")
    data = ("data", "dots", pairs.x, pairs.t, GREY + "80", 1.4)
    centres, priors = [], []
    for i in range(m.mu.shape[1]):
        colour = KERNELS[i % len(KERNELS)]
        faded = [f"{colour}{round(255 * a):02x}" for a in m.alpha[:, i].tolist()]
        centres.append((f"mu_{i + 1}", "dots", x, m.mu[:, i], faded, 1.4))
        priors.append((f"alpha_{i + 1}", "line", x, m.alpha[:, i], colour, 2))
    fit = ("network", "line", unit, forward(unit), RED, 2)
    turned = ("data", "dots", pairs.t, pairs.x, GREY + "80", 1.4)
    fits = ("exact", "line", x, mean, BLACK, 1), ("network", "line", x, squares(x), RED, 2)
    values = [("mean", "line", x, conditional_mean(m), RED, 2)]
    values += [("likeliest kernel", "dots", x, most_probable(m), ORANGE, 2.2)]
    values += [("mode", "dots", x, mode(m), TEAL, 1.4)]
    spread = [("exact", "line", x, variance, BLACK, 1)]
    spread += [("network", "line", x, conditional_variance(m), RED, 2)]
    heat = density_grid(m, t[:, 0])
    return [
        plot("forward: least squares is right", (-0.05, 1.05, *wide), ("t", "x"), turned, fit),
        plot("inverse: least squares fails", box, axes, data, *fits),
        plot("p(t | x), and centres", box, axes, *centres, heat=heat),
    ], [
        plot("priors", (*wide, -0.03, 1.03), ("x", "alpha"), *priors),
        plot("mode against mean", box, axes, data, *values),
        plot("variance of t", (*wide, 0, 0.13), ("x", "s^2"), *spread),
    ]


def robot_page(p, squares, pairs):
    """Where the hand ends, by either network, and some arms."""
    x, axes, page = pairs.test_x[:400], ("x_1", "x_2"), []
    ways = [("least squares", squares(x), RED)]
    ways += [("most probable component", most_probable(p(x)), TEAL)]
    for name, theta, colour in ways:
        ends = hand(theta)
        series = [("", "line", *xy.T, colour + "b0", 1) for xy in torch.stack([x, ends], dim=1)]
        series += [("wanted", "dots", *x.T, GREY, 1.6)]
        series += [(f"reached, RMS {miss(theta, x):.4f}", "dots", *ends.T, colour, 1.4)]
        page.append(plot(f"{name}: where the hand goes", (0.15, 1.03) * 2, axes, *series))
    angle = torch.tensor([0.5, 0.78, 1.02]).to(x)
    goal, series = 0.9 * torch.stack([angle.cos(), angle.sin()], dim=1), []
    ways = [(f"kernel {i + 1}", way) for i, way in enumerate(p(goal).mu.unbind(dim=1))]
    for i, (name, theta) in enumerate([*ways, ("least squares", squares(goal))]):
        colour = RED if i == len(ways) else KERNELS[i % len(KERNELS)]
        for n, arm in enumerate(torch.stack([0 * goal, elbow(theta), hand(theta)], dim=2)):
            series.append(("" if n else name, "line", *arm, colour, 2.5))
            series.append(("", "dots", *arm[:, 1:], colour, 3))
    series.append(("", "dots", *goal.T, BLACK, 4))
    return [[*page, plot("three goals, each arm's ways there", (-0.03, 1.03) * 2, axes, *series)]]


def csv_page(m, pairs):
    """For the first three targets, the densities predicted for held-out cases."""
    mean, row = conditional_mean(m), []
    for j, name in enumerate(pairs.names[:3]):
        key = pairs.test_x[:, 0] if pairs.x.shape[1] == 1 else mean[:, j]
        order = key.argsort()[torch.linspace(0, len(key) - 1, min(len(key), 320)).round().long()]
        shown, place = Mixture(*(part[order] for part in m)), torch.arange(len(order)).to(key)
        t = pairs.test_t[order, j]
        low, high = t.min().item() - 0.2, t.max().item() + 0.2
        heat = density_grid(shown, torch.linspace(low, high, 320).to(t), j)
        box, axes = (-0.5, len(order) - 0.5, low, high), ("held-out cases", name)
        measured = ("measured", "dots", place, t, "#c8c8d0c0", 1)
        row.append(plot(f"p({name} | x), standardised", box, axes, measured, heat=heat))
    return [row]


# ---- The command line ---------------------------------------------------------------------------


@torch.no_grad()
def report(cfg, run, squares, forward, pairs):
    """Figures, table, picture and samples of the trained networks."""

    def p(x):
        return mixture(run.ema(x), cfg.kernels, cfg.sigma_min)

    def draw(n):  # rows (x, t): x of held-out cases, t ~ p(t | x), in the units of the data
        x = pairs.test_x[torch.randint(len(pairs.test_x), (n,), device=run.device)]
        return torch.cat([x, pairs.mean + pairs.std * sample(p(x))], dim=1).float()

    m, y = p(pairs.test_x), squares(pairs.test_x)
    evaluate(cfg, run, m, y, pairs)
    if cfg.dataset == "inverse":
        page = inverse_page(p, squares, forward, pairs)
    elif cfg.dataset == "robot":
        robot_table(run, m, y, pairs.test_x)
        page = robot_page(p, squares, pairs)
    else:
        page = csv_page(m, pairs)
    common.save_panels(run.folder / "samples.png", *page)
    if cfg.num_samples:
        run.write_samples(draw)
    run.say(f"see {run.folder / 'samples.png'}")


def in_learned_units(pairs, cfg):
    """The pairs, their targets in the units of the table that cfg's checkpoint has learned."""
    path = cfg.sample or Path(cfg.out, "checkpoint.pt")
    state = common.load_checkpoint(path, cfg.script)["model"]
    if "t_mean" not in state:
        raise UserError(f"{path} is of a later stage: name the run's checkpoint.pt")
    mean, std = (state[name].to(pairs.mean) for name in ("t_mean", "t_std"))
    if torch.equal(mean, pairs.mean) and torch.equal(std, pairs.std):
        return pairs
    t, test_t = ((t * pairs.std + pairs.mean - mean) / std for t in (pairs.t, pairs.test_t))
    return dataclasses.replace(pairs, t=t, test_t=test_t, mean=mean, std=std)


def main(cfg):
    if cfg.amp != "off":
        raise UserError("mdn.py computes in float64: leave out --amp")
    device = common.setup(cfg)
    if device.type == "mps":
        raise UserError("--device mps has no float64, which BFGS needs: use cpu")
    pairs = load_pairs(cfg, device)

    def error(z, t):
        return ErrorFunction.apply(z, t, cfg.kernels, cfg.sigma_min)

    starts = range(3 if cfg.optimizer == "bfgs" else 1)
    nets = [Network(pairs.x, cfg.hidden, starting_mixture(pairs.t, cfg.kernels)) for _ in starts]
    if cfg.sample or cfg.resume:  # its weights will be loaded
        net, pairs = nets[0], in_learned_units(pairs, cfg)
    else:
        net = best_start(nets, pairs, error) if len(nets) > 1 else nets[0]
    net.register_buffer("t_mean", pairs.mean.clone())
    net.register_buffer("t_std", pairs.std.clone())
    squares = Network(pairs.x, cfg.ls_hidden, pairs.t.mean(dim=0))
    run = train(cfg, net, pairs, error, device)
    squares = train(cfg, squares, pairs, sum_of_squares, device, "least-squares").ema
    forward = None
    if cfg.dataset == "inverse":
        swapped = dataclasses.replace(pairs, x=pairs.t, t=pairs.x)
        net = Network(swapped.x, cfg.ls_hidden, swapped.t.mean(dim=0))
        forward = train(cfg, net, swapped, sum_of_squares, device, "forward").ema
    if run.finish():
        report(cfg, run, squares, forward, pairs)


if __name__ == "__main__":
    common.cli(main, Config, PRESETS)
