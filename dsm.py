"""A Connection Between Score Matching and Denoising Autoencoders. Vincent, Neural Computation 23(7)
(2011), 1661-1674

Implements  Eq. 2 (explicit and implicit score matching, J_ESMq and J_ISMq), Eq. 7 (J_ESMqsigma,
            against the Parzen density), Eq. 9 (J_DSMqsigma, denoising score matching), Eq. 11 (the
            last two agree), Sec. 4.3 (the energy whose score is an auto-encoder's residual), Eq. 15
            (all agree; Sec. 5), as Technical Report 1358 numbers them, the preprint. By name, where
            no number is known: [J_ISMq0] (on a finite sample), [J_ISMreg] (regularised, Kingma &
            LeCun 2010), [q_sigma] (Parzen density), [J_ISMqsigma], [J_DAEsigma] (denoising
            auto-encoder); [ranking] by the energy and [sampling] from it
Conventions x is data, x_tilde = x + sigma z corrupted data, psi = grad log p = -grad E. Functions
            J_... return values per example, (..., D) -> (...); the paper's J are their means.
Departures  1. The paper has no experiments: data sets, sizes and figures are this file's own.
            2. A hidden unit's step, |W_j| high, is about 4 / |W_j| wide: beside the data it can be
               high and steep only where these are large numbers. --scale multiplies them.
            3. One auto-encoder for each of several noise levels, trained side by side, each on
               sigma² J.
            4. Langevin dynamics without a Metropolis test. A level's chains start where the coarser
               level's ended, as in later papers. On images long chains leave the data for false
               minima of the energy: there each level's start at draws of its q_sigma and are short.
               Such samples are digits, but neighbours of examples, not independent of them.
            5. J_ISMreg's weight is sigma² / 2, by which it approximates noise of that size on x:
               exactly for a linear psi in one dimension.
Run         python dsm.py                      energies at four noise levels beside the exact ones
            python dsm.py --objective ism      the same by second derivatives; or dsm, esm, ismreg
            python dsm.py --dataset mnist      filters, denoising, samples
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import common
from common import Count, Natural, Positive, UserError


@dataclass
class Config(common.Config):
    dataset: str = "pinwheel"  # a data set's name, or a folder of images
    steps: Natural = 6_000  # optimisation steps
    batch_size: Count = 256  # examples per step, over all processes together
    lr: Positive = 2e-2  # peak learning rate of Adam
    clip: Positive | None = None  # largest norm of the gradient
    objective: Literal["dae", "dsm", "esm", "ism", "ismreg"] = "dae"  # J, at every noise level
    examples: Count | None = 10_000  # n of the Parzen density: the data set's first examples
    sigma: Positive = 0.1  # finest noise, in the data's units
    levels: Count = 4  # noise levels, each twice as coarse as the next
    scale: Positive = 25.0  # factor to the data and the noise: Departure 2
    hidden: Count = 512  # units of the auto-encoder
    langevin: Natural = 200  # Langevin steps at each level
    step_size: Positive = 0.2  # of a Langevin step, in units of sigma²
    start: Literal["noise", "data"] = "noise"  # of chains: noise, or draws of q_sigma: Departure 4
    anneal: bool = True  # chains start where those of the coarser level ended: Departure 4

    learned = (*common.Config.learned, "sigma", "levels", "scale")


IMAGES = {  # minutes on two cores
    "steps": 2_000, "batch_size": 128, "lr": 3e-3, "examples": None, "sigma": 0.25, "levels": 3,
    "scale": 1.0, "hidden": 1_024, "langevin": 30, "start": "data", "anneal": False,
}  # fmt: skip
PRESETS = dict.fromkeys(("glyphs", "mnist", "fashion_mnist", "cifar10", "folder"), IMAGES)


# ---- Objectives ---------------------------------------------------------------------------------
# psi and reconstruct are functions of points (..., D) to (..., D).


def J_ESM(psi, score, x):
    """Explicit score matching, x ~ q: 1/2 |psi(x) - score(x)|², the score being grad log q."""
    return (psi(x) - score(x)).square().sum(-1) / 2  # Eq. 2


def J_ISM(psi, x):
    """Implicit score matching, x ~ q or a finite sample of it: no score, but second derivatives."""
    psi_x, slopes = derivatives(psi, x)
    return psi_x.square().sum(-1) / 2 + slopes.sum(-1)  # Eq. 2, [J_ISMq0]


def J_ISMreg(psi, x, weight):
    """Implicit score matching on a finite sample, with a penalty on the second derivatives."""
    psi_x, slopes = derivatives(psi, x)
    penalty = slopes.square().sum(-1)
    return psi_x.square().sum(-1) / 2 + slopes.sum(-1) + weight * penalty  # [J_ISMreg]


def J_DSM(psi, x, x_tilde, sigma):
    """Denoising score matching, x_tilde ~ N(x, sigma² I): neither score nor second derivatives."""
    target = (x - x_tilde) / sigma**2  # grad log q_sigma(x_tilde | x)
    return (psi(x_tilde) - target).square().sum(-1) / 2  # Eq. 9


def J_DAE(reconstruct, x, x_tilde):
    """The denoising auto-encoder's squared error."""
    return (reconstruct(x_tilde) - x).square().sum(-1)  # [J_DAEsigma]


def derivatives(psi, x):
    """psi(x) and all d psi_i / d x_i, (..., D) both, by D backward passes, differentiable."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        psi_x = psi(x)
        rows = [torch.autograd.grad(y.sum(), x, create_graph=True)[0] for y in psi_x.unbind(-1)]
        return psi_x, torch.stack([row[..., i] for i, row in enumerate(rows)], dim=-1)


# ---- The energy of the denoising auto-encoder ---------------------------------------------------
# x (..., D), W (H, D), b (H,), c (D,); or K auto-encoders at once: x (K, B, D), W (K, H, D),
# b (K, 1, H), c (K, 1, D).


def reconstruct(x, W, b, c):
    """W' sigmoid(W x + b) + c: tied weights, a linear decoder."""
    return torch.sigmoid(x @ W.mT + b) @ W + c


def energy(x, W, b, c, sigma):
    """The energy in nats whose score is the residual: -grad E = (reconstruct(x) - x) / sigma²."""
    hidden = F.softplus(x @ W.mT + b).sum(-1)
    return -((c * x).sum(-1) - x.square().sum(-1) / 2 + hidden) / sigma**2  # Sec. 4.3


def residual_score(reconstruct, sigma):
    """psi of an auto-encoder. It turns J_DSMqsigma into J_DAEsigma / (2 sigma^4)."""
    return lambda x: (reconstruct(x) - x) / sigma**2


class TiedAutoEncoders(nn.Module):
    """One auto-encoder for each of K noise levels: (K, B, D), or (B, D) for all -> (K, B, D).

    It is initialised on examples x (N, D): each unit is at its threshold at one of them, and c
    makes up for the units' mean. W_j is about 0.7 long: from longer ones, energies
    far from the data stay too low; shorter ones learn slower.
    """

    def __init__(self, x, hidden, levels):
        super().__init__()
        dim = x.shape[1]
        W = torch.randn(levels, hidden, dim, device=x.device) * math.sqrt(0.5 / dim)
        thresholds = x[torch.randint(len(x), (levels, hidden), device=x.device)]
        b = -(W * thresholds).sum(-1)[:, None]
        c = (x - reconstruct(x, W, b, 0.0)).mean(1, keepdim=True)
        self.W, self.b, self.c = nn.Parameter(W), nn.Parameter(b), nn.Parameter(c)

    def forward(self, x):
        return reconstruct(x, self.W, self.b, self.c)

    def theta(self, k):
        """W (H, D), b (H,), c (D,) of level k."""
        return self.W[k], self.b[k, 0], self.c[k, 0]


# ---- The Parzen density of a finite data set ----------------------------------------------------


def parzen_log_prob(x_tilde, data, sigma):
    """log q_sigma in nats, (..., D) -> (...): a Gaussian of width sigma on each row of data (N, D).

    Times -1, an energy like the auto-encoder's: a quadratic minus a convex function.
    """
    n, dim = data.shape
    constant = math.log(n) + dim / 2 * math.log(2 * math.pi * sigma**2)
    logits = _parzen_logits(x_tilde, data, sigma)
    return logits.logsumexp(-1) - x_tilde.square().sum(-1) / (2 * sigma**2) - constant  # [q_sigma]


def parzen_reconstruct(x_tilde, data, sigma):
    """The best denoiser of noisy rows of data, E[x | x_tilde]: their mean, weighted by
    q_sigma(x_tilde | x_i)."""
    return _parzen_logits(x_tilde, data, sigma).softmax(-1) @ data


def _parzen_logits(x_tilde, data, sigma):
    """log q_sigma(x_tilde | x_i) up to a term of x_tilde, (..., N)."""
    return (x_tilde @ data.T - data.square().sum(1) / 2) / sigma**2


def parzen_score(data, sigma):
    """grad log q_sigma as a function of x_tilde."""
    return residual_score(lambda x_tilde: parzen_reconstruct(x_tilde, data, sigma), sigma)


# ---- The equivalences ---------------------------------------------------------------------------


def all_pairs(data, sigma, reach=6.5, nodes=75):
    """All of q_sigma(x, x_tilde), data (N, 2), by the trapezoidal rule in the noise.

    Returns x, x_tilde (M, 2), mass (M,): sums of mass * f(x, x_tilde) are expectations, to
    rounding for a smooth f.
    """
    line = torch.linspace(-reach, reach, nodes, dtype=data.dtype, device=data.device)
    z = torch.cartesian_prod(line, line)
    mass = (-z.square().sum(1) / 2).softmax(0) / len(data)
    x = data.repeat_interleave(len(z), dim=0)
    return x, x + sigma * z.repeat(len(data), 1), mass.repeat(len(data))


@torch.enable_grad()
def equivalences(theta, data, sigma):
    """The objectives against the Parzen density of data (N, 2), each with its constant.

    All are J_ESMqsigma, and so are their gradients in theta = (W, b, c). Returns the four values
    and the largest distance of a gradient from J_ESMqsigma's, relative to its length.
    """
    theta = [parameter.detach().requires_grad_() for parameter in theta]
    x, x_tilde, mass = all_pairs(data, sigma)

    def network(x):
        return reconstruct(x, *theta)

    psi, score = residual_score(network, sigma), parzen_score(data, sigma)
    C_1 = (mass * J_ESM(torch.zeros_like, score, x_tilde)).sum()  # E 1/2 |grad log q_sigma|²
    C = (mass * J_DSM(torch.zeros_like, x, x_tilde, sigma)).sum() - C_1
    objectives = {
        "J_ESM": J_ESM(psi, score, x_tilde),
        "J_ISM": J_ISM(psi, x_tilde) + C_1,
        "J_DSM": J_DSM(psi, x, x_tilde, sigma) - C,  # Eq. 11
        "J_DAE": J_DAE(network, x, x_tilde) / (2 * sigma**4) - C,
    }
    values, gradients = {}, []
    for name, value in objectives.items():
        J = (mass * value).sum()
        values[name] = J.item()
        gradient = torch.autograd.grad(J, theta, retain_graph=True)
        gradients.append(torch.cat([g.flatten() for g in gradient]))
    apart = (torch.stack(gradients) - gradients[0]).norm(dim=1).max()  # Sec. 5, Eq. 15
    return values, (apart / gradients[0].norm()).item()


# ---- Sampling -----------------------------------------------------------------------------------


def langevin(psi, x, step, steps):
    """Langevin dynamics of the density whose score is psi, from x (B, D): biased by O(step)."""
    with torch.no_grad():
        for _ in range(steps):
            x = x + step / 2 * psi(x) + math.sqrt(step) * torch.randn_like(x)  # [sampling]
    return x


def level(net, k, sigma):
    """psi of level k, and its auto-encoder, the mean of x given x_tilde."""
    theta = net.theta(k)

    def denoise(x):
        return reconstruct(x, *theta)

    return residual_score(denoise, sigma), denoise


def starts(cfg, sigmas, n, examples):
    """Points where n chains of each level may start, (K, n, D): the same noise, or its q_sigma."""
    if cfg.start == "data":
        return torch.stack([corrupted(examples, n, sigma) for sigma in sigmas])
    x_0 = cfg.scale * torch.randn(n, examples.shape[1], device=examples.device)
    return x_0.expand(len(sigmas), -1, -1)


def sample(cfg, net, sigmas, x_0):
    """The chains of each level, from the coarsest to the finest, from x_0: (K, n, D) both."""
    samples = []
    for k, sigma in enumerate(sigmas):
        start = samples[-1] if samples and cfg.anneal else x_0[k]
        psi, _ = level(net, k, sigma)
        samples.append(langevin(psi, start, cfg.step_size * sigma**2, cfg.langevin))
    return torch.stack(samples)


# ---- Training -----------------------------------------------------------------------------------


def loss_of(name, net, x, x_tilde, sigma, data=None):
    """sigma² J at every level, (K, B): x (B, D), x_tilde (K, B, D), sigma (K, 1, 1)."""
    psi, weight = residual_score(net, sigma), sigma[..., 0] ** 2
    if name == "dae":
        return J_DAE(net, x, x_tilde) / (2 * weight)  # J_DSM = J_DAE / (2 sigma^4)
    if name == "dsm":
        return weight * J_DSM(psi, x, x_tilde, sigma)
    if name == "esm":
        return weight * J_ESM(psi, parzen_score(data, sigma), x_tilde)  # Eq. 7
    if name == "ism":
        return weight * J_ISM(psi, x_tilde)  # [J_ISMqsigma]
    return weight * J_ISMreg(psi, x.expand_as(x_tilde), weight / 2)  # Departure 5


def train(cfg, run, data, sigmas):
    sigma = torch.tensor(sigmas, device=run.device)[:, None, None]  # (K, 1, 1)
    examples = vectors(cfg, data.train) if cfg.objective == "esm" else None
    for x, _ in run.batches(data):
        x = vectors(cfg, x)  # (B, D)
        x_tilde = x + sigma * torch.randn(len(sigma), *x.shape, device=x.device)  # (K, B, D)
        loss = loss_of(cfg.objective, run.model, x, x_tilde, sigma, examples).mean()
        run.step(loss)


def vectors(cfg, x):
    """Examples as points in the network's units: (B, ...) -> (B, D)."""
    return cfg.scale * common.to_float(x).flatten(1)


# ---- Evaluation ---------------------------------------------------------------------------------


@torch.no_grad()
def evaluate_vectors(cfg, run, data, sigmas):
    """2-D data: each level's score, energy and samples beside the exact Parzen density's."""
    net, examples, test = run.ema, vectors(cfg, data.train), vectors(cfg, data.test[:5_000])
    samples = sample(cfg, net, sigmas, starts(cfg, sigmas, 10_000, examples))  # (K, 10_000, 2)
    bound = 1.2 * test.abs().max().item()
    points = grid(bound, 128, run.device)
    box = (-bound, bound, -bound, bound)
    W, b, _ = net.theta(-1)
    s = torch.sigmoid(points @ W.T + b)
    slope = (s * (1 - s) * W.square().sum(1)).sum(1)  # of the auto-encoder: where its units switch
    denoised = level(net, -1, sigmas[-1])[1](samples[-1])
    exact_row = [(f"{len(examples)} examples", common.density_image(examples, bound, 96))]
    learned_row = [("slope at the finest sigma", common.chart([], box, heat=slope.view(128, 128)))]
    sample_row = [("finest samples, denoised", common.density_image(denoised, bound, 96))]
    for k, sigma in enumerate(sigmas):
        psi, denoise = level(net, k, sigma)
        score = parzen_score(examples, sigma)
        x_tilde = corrupted(examples, 5_000, sigma)
        exact = by_parts(score, x_tilde, examples)
        J = J_ESM(psi, lambda _, exact=exact: exact, x_tilde).mean()  # Eq. 7
        log_q = by_parts(lambda x, s=sigma: parzen_log_prob(x, examples, s), points, examples)
        log_q = log_q.log_softmax(0)
        log_p = (-energy(points, *net.theta(k), sigma)).log_softmax(0)  # normalised on the grid
        chains = samples[k, :5_000]
        distances = {
            "samples_to_q": common.energy_distance(chains, x_tilde),
            "q_to_data": common.energy_distance(x_tilde, test),
            "denoised_to_data": common.energy_distance(denoise(chains), test),
        }
        run.report(
            title := f"sigma {sigma / cfg.scale:g}",
            score_error=(2 * J / exact.square().sum(1).mean()).sqrt().item(),  # relative
            kl=(log_q.exp() * (log_q - log_p)).sum().item(),  # of the two on the grid, in nats
            **{name: distance / cfg.scale for name, distance in distances.items()},
        )
        exact_row.append((f"{title}: -log q_sigma, exact", landscape(log_q, score, sigma, points)))
        learned_row.append(("E(x; W, b, c), learned", landscape(log_p, psi, sigma, points)))
        sample_row.append(("Langevin samples", common.density_image(samples[k], bound, 96)))
    common.save_panels(run.folder / "samples.png", exact_row, learned_row, sample_row)
    theta = [parameter.cpu().double() for parameter in net.theta(-1)]
    values, distance = equivalences(theta, examples[:3].cpu().double(), sigmas[-1])
    values = {name: value * cfg.scale**2 for name, value in values.items()}
    title = f"equivalences of {min(3, len(examples))} examples"
    run.report(title, **values, gradients_differ_by=distance)


@torch.no_grad()
def evaluate_images(cfg, run, data, sigmas):
    """Images: denoising beside the exact Parzen density's, ranking by energy, filters, samples."""
    net, examples, test = run.ema, vectors(cfg, data.train), vectors(cfg, data.test[:500])
    turned = vectors(cfg, data.test[:500].rot90(2, (2, 3)))
    x_0 = starts(cfg, sigmas, 64, examples)
    samples = sample(cfg, net, sigmas, x_0)  # (K, 64, D)
    first = torch.arange(16) % len(test)
    rows = [], [], []
    for k, sigma in enumerate(sigmas):
        _, denoise = level(net, k, sigma)
        theta = net.theta(k)
        x_tilde = test + sigma * torch.randn_like(test)
        images = [x_tilde, denoise(x_tilde), parzen_reconstruct(x_tilde, examples, sigma)]
        mse = [(x - test).square().mean().item() / cfg.scale**2 for x in images]
        lower = energy(test, *theta, sigma) < energy(turned, *theta, sigma)  # [ranking]
        drawn = denoise(samples[k])
        start = samples[k - 1] if k and cfg.anneal else x_0[k]
        moved = (drawn - denoise(start)).norm(dim=1)
        run.report(
            title := f"sigma {sigma / cfg.scale:g}",
            **dict(zip(("mse_noisy", "mse_denoised", "mse_parzen"), mse, strict=True)),
            upright_below_turned=lower.float().mean().item(),
            samples_moved_by=moved.median().item() / cfg.scale,
            samples_to_examples=to_nearest(drawn, examples) / cfg.scale,
        )
        W = theta[0][theta[0].norm(dim=1).argsort(descending=True)]
        filters = cfg.scale * W / W.abs().amax(1, keepdim=True)
        shown = torch.stack([test[first], *(x[first] for x in images)])  # (4, 16, D)
        shown = shown.unflatten(1, (2, 8)).transpose(0, 1).flatten(0, 2)
        titles = f"{title}: filters", "clean, noisy, denoised, Parzen's", "samples, denoised"
        pictures = filters[torch.arange(64) % len(W)], shown, drawn
        for row, name, x in zip(rows, titles, pictures, strict=True):
            row.append((name, common.image_grid((x / cfg.scale).unflatten(1, data.shape), scale=2)))
    run.report("test", test_to_examples=to_nearest(test, examples) / cfg.scale)
    common.save_panels(run.folder / "samples.png", *rows)


def to_nearest(x, examples):
    """The median over x (B, D) of the distance to the nearest example."""
    return torch.cdist(x, examples).amin(1).median().item()


def corrupted(examples, n, sigma):
    """n draws from q_sigma."""
    x = examples[torch.randint(len(examples), (n,), device=examples.device)]
    return x + sigma * torch.randn_like(x)


def by_parts(f, x, examples):
    """f(x), (N, ...), on some rows at a time: those that make 20 million pairs with examples."""
    return torch.cat([f(part) for part in x.split(max(1, 20_000_000 // len(examples)))])


def grid(bound, n, device=None):
    """(n², 2) points of [-bound, bound]², the second coordinate running fastest."""
    line = torch.linspace(-bound, bound, n, device=device)
    return torch.cartesian_prod(line, line)


def landscape(log_p, psi, sigma, points, depth=8, n=15):
    """The upper nats of a log-density on a grid of points, each its colour, and the score's arrows:
    from x towards E[x | x_tilde = x], cut to the distance between them."""
    bound, side = points.max().item(), math.isqrt(len(points))
    height = (log_p - log_p.max() + depth).clamp(min=0).ceil().view(side, side)
    x = grid(bound * (1 - 1 / n), n, points.device)
    step = sigma**2 * psi(x)
    step = step * (1.8 * bound / n / step.norm(dim=1, keepdim=True)).clamp(max=1)
    turn = torch.tensor([[math.cos(2.7), math.sin(2.7)], [-math.sin(2.7), math.cos(2.7)]]).to(x)
    tip, barbs = x + step, (0.35 * step @ turn, 0.35 * step @ turn.T)
    lines = torch.stack([x, tip, tip + barbs[0], tip, tip + barbs[1]], dim=1).cpu()
    shapes = [("line", line, "#5ae1ff", 0.8) for line in lines]
    return common.chart(shapes, (-bound, bound, -bound, bound), heat=height)


# ---- The command line ---------------------------------------------------------------------------


def prepare(cfg):
    """The run, the data, and the noise levels from the coarsest to the finest, in scaled units."""
    device = common.setup(cfg)
    torch.set_float32_matmul_precision("highest")  # log q_sigma cancels: TF32 is too coarse
    data = common.load_data(cfg, device)
    check(cfg, data)
    data.train = data.train[: cfg.examples]
    sigmas = [cfg.scale * cfg.sigma * 2**k for k in reversed(range(cfg.levels))]
    net = TiedAutoEncoders(vectors(cfg, data.train[:5_000]), cfg.hidden, cfg.levels)
    return common.Run(cfg, net, device), data, sigmas


def check(cfg, data):
    """Refuse settings that do not go together."""
    dim, n = data.train[0].numel(), len(data.train)
    if cfg.objective.startswith("ism") and dim > 64:
        raise UserError(f"--objective {cfg.objective} takes {dim} backward passes: take dae or dsm")
    if cfg.objective.startswith("ism") and cfg.compile:
        raise UserError(
            f"--compile cannot differentiate twice, as --objective {cfg.objective} does"
        )
    if cfg.flip:
        raise UserError("--flip adds examples that the Parzen density lacks: leave it out")
    if cfg.examples and cfg.examples > n:
        raise UserError(f"--examples {cfg.examples} is more than the {n} of {data.name}")
    if cfg.step_size >= 4:
        raise UserError("Langevin dynamics diverges at a --step-size of 4 and above: take 0.2")
    if cfg.levels > 16:
        raise UserError("each of the --levels doubles the noise: 16 are the most")


@torch.no_grad()
def draw(cfg, net, sigmas, examples, n):
    """n samples of the finest level, denoised, in the data's units: (n, D)."""
    _, denoise = level(net, -1, sigmas[-1])
    x_0 = starts(cfg, sigmas, n, examples)
    return denoise(sample(cfg, net, sigmas, x_0)[-1]) / cfg.scale


def main(cfg):
    run, data, sigmas = prepare(cfg)
    if not cfg.sample:
        train(cfg, run, data, sigmas)
    if not run.finish():
        return
    evaluate = evaluate_images if data.is_image else evaluate_vectors
    evaluate(cfg, run, data, sigmas)
    if cfg.num_samples:
        examples = vectors(cfg, data.train)
        shape = -1, *data.shape
        run.write_samples(lambda n: draw(cfg, run.ema, sigmas, examples, n).view(shape))
    run.say(f"see {run.folder / 'samples.png'}")


if __name__ == "__main__":
    common.cli(main, Config, PRESETS)
