"""A Contrastive Learning Approach for Training Variational Autoencoder Priors (NCP-VAE).
Aneja, Schwing, Kautz, Vahdat, NeurIPS 2021, arXiv 2010.02917v3

Implements  by name, not by number; a name in brackets recurs on the line that computes it:
            [evidence lower bound]; [aggregate posterior]; [noise contrastive prior]; [first stage],
            [second stage] (Fig. 2); [binary classifier], [density ratio]; [SIR]; [Langevin
            dynamics]; [partition function], [bound]; [hierarchical prior], [hierarchical
            classifiers], [ancestral sampling]; [temperature]
Conventions z is (..., K d): K groups of d latents; p(z) = prod_k p(z_k | z_<k), the base prior, is
            trained with the VAE. r(z) = exp(logit) re-weights it: p_NCP(z) = r(z) p(z) / Z.
            x is flat and binary, drawn anew at every visit with mean level / 255. All in nats.
Departures  1. The paper's backbone is NVAE, its classifiers are residual convolutions with squeeze
               and excitation; both are small MLPs here, and colour is averaged to grey.
            2. No code of the paper was found: sizes, rates and Langevin's step are ours; MNIST's
               5,000 proposals, K classifiers that see all z_<k, are as later literature reports.
            3. For FID stands a Frechet distance in the features of a small classifier, trained
               here on the data's labels (if any): comparable within a run, and with nothing else.
            4. log Z by Monte Carlo is low in expectation, so the bound is high, by about
               1 / (2 M) (M / ESS - 1) with M draws: M and, of the first group, ESS / M are printed.
Run         python ncp_vae.py                                    two latents; 93 CPU-s: bound (50
                draws) -137.75 -> -137.33 nats, Frechet distance 126.7 -> 67.7
            python ncp_vae.py --dataset mnist                    ten latents; 4.6 CPU-minutes, one
                thread: bound (50 draws) -94.81 -> -93.66 nats, Frechet distance 25.3 -> 3.7 (SIR)
            python ncp_vae.py --dataset mnist --groups 2 --latent 5   hierarchical
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import Count, Natural, Positive, UserError


@dataclass
class Config(common.Config):
    dataset: str = "glyphs"  # a data set's name, or a folder of images
    steps: Natural = 2_000  # optimisation steps of each stage
    batch_size: Count = 128  # images per step; as many draws of q(z) and of p(z)
    lr: Positive = 2e-3  # peak learning rate of Adam
    clip: Positive | None = None  # largest norm of the gradient
    latent: Count = 2  # d, latents in each group
    groups: Count = 1  # K, groups of the hierarchical prior
    hidden: Count = 400  # units of encoder and decoder
    width: Count = 256  # units of the classifiers
    proposals: Count = 500  # M of SIR
    langevin_steps: Natural = 300  # of Langevin dynamics
    langevin_step: Positive = 0.01  # lambda, the size of a step
    sampler: Literal["sir", "langevin"] = "sir"  # of samples.npz
    temperature: Positive = 1.0  # scales the base prior's deviations, for pictures and samples.npz
    nll_examples: Count = 1_000  # random test images whose likelihood is bounded
    nll_samples: Count = 50  # draws of z for each of them
    judge_steps: Natural = 500  # of the classifier whose features compare images


MNIST = {"steps": 8_000, "latent": 10, "proposals": 5_000, "langevin_steps": 500}
PRESETS = {"mnist": MNIST, "fashion_mnist": MNIST}


# ---- The VAE: first stage -----------------------------------------------------------------------


class Gaussian(NamedTuple):
    """N(mean, diag(sigma²)) over the last axis."""

    mean: Tensor
    log_sigma: Tensor

    def sample(self, *shape, temperature=1.0):
        """Draws, shape + mean's shape."""
        kind = {"dtype": self.mean.dtype, "device": self.mean.device}
        noise = torch.randn(*shape, *self.mean.shape, **kind)
        return self.mean + temperature * self.log_sigma.exp() * noise  # [temperature]

    def log_prob(self, z):
        square = ((z - self.mean) * (-self.log_sigma).exp()).square()
        return -(square / 2 + self.log_sigma + math.log(2 * math.pi) / 2).sum(dim=-1)


def kl(q, p):
    """KL(q || p) of two Gaussians, over the last axis."""
    ratio = (2 * (q.log_sigma - p.log_sigma)).exp()
    square = ((q.mean - p.mean) * (-p.log_sigma).exp()).square()
    return ((ratio + square - 1) / 2 + p.log_sigma - q.log_sigma).sum(dim=-1)


def mlp(*sizes):
    layers = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class VAE(nn.Module):
    """q(z_k | x, z_<k), p(z_k | z_<k) and p(x | z), for K groups of d latents."""

    def __init__(self, pixels, hidden, latent, groups=1):
        super().__init__()
        self.latent, self.groups = latent, groups
        self.trunk = mlp(pixels, hidden, hidden)
        before = [k * latent for k in range(groups)]
        self.posteriors = nn.ModuleList(mlp(hidden + n, hidden, 2 * latent) for n in before)
        self.priors = nn.ModuleList(mlp(n, hidden, 2 * latent) for n in before[1:])
        self.decoder = mlp(groups * latent, hidden, hidden, pixels)

    def prior(self, context):
        """p(z_k | z_<k), a Gaussian: z_<k (..., k d); the first group's is N(0, I)."""
        k = context.shape[-1] // self.latent
        if k == 0:
            zero = context.new_zeros(*context.shape[:-1], self.latent)
            return Gaussian(zero, zero)
        parameters = self.priors[k - 1](context).to(context.dtype)
        return Gaussian(*parameters.chunk(2, dim=-1))  # [hierarchical prior]

    def encode(self, x, samples=1):
        """x (B, D) -> z (samples, B, K d) from q(z | x), and the pairs q(z_k | ..), p(z_k | ..)."""
        h = self.trunk(x).to(x.dtype).expand(samples, -1, -1)
        z, pairs = h[..., :0], []
        for posterior in self.posteriors:
            q = Gaussian(*posterior(torch.cat([h, z], dim=-1)).to(x.dtype).chunk(2, dim=-1))
            pairs.append((q, self.prior(z)))
            z = torch.cat([z, q.sample()], dim=-1)  # z ~ q(z) over all x: [aggregate posterior]
        return z, pairs

    def log_likelihood(self, x, z):
        """log p(x | z), summed over pixels: x (B, D) binary, z (..., B, K d) -> (..., B)."""
        logits = self.decoder(z).to(x.dtype)
        return F.logsigmoid((2 * x - 1) * logits).sum(dim=-1)

    def forward(self, x):
        """A bound on log p(x): x (B, D) -> (B,)."""
        z, pairs = self.encode(x)
        divergence = sum(kl(q, p) for q, p in pairs)
        return (self.log_likelihood(x, z) - divergence)[0]  # [evidence lower bound]


# ---- The noise contrastive prior: second stage --------------------------------------------------


class Ratio(nn.Module):
    """log r(z_k, z_<k) of every group, the logits of K classifiers that share nothing."""

    def __init__(self, latent, groups, width):
        super().__init__()
        self.latent = latent
        sizes = [(k + 1) * latent for k in range(groups)]
        self.logits = nn.ModuleList(mlp(n, width, width, 1) for n in sizes)

    def forward(self, z):
        """z_<=k (..., (k + 1) d) -> (...)."""
        logit = self.logits[z.shape[-1] // self.latent - 1]
        return logit(z)[..., 0]  # D / (1 - D) = exp(logit): [density ratio]


def join(context, z_k):
    """z_<k and z_k side by side, z_<k repeated along z_k's leading axes."""
    return torch.cat([context.expand(*z_k.shape[:-1], -1), z_k], dim=-1)


def nce_loss(log_r, z_q, z_p):
    """Mean cross-entropy of telling z_q ~ q from z_p ~ p, both (..., n): log 2 if they are alike.

    Its minimum is log 2 - JSD(q, p), where log_r = log q(z) / p(z). Of E_x KL(q(z|x) || p(z)) =
    I(x; z) + KL(q(z) || p(z)) a new prior, with a frozen VAE, can lower the second term alone.
    """
    loss_q = F.softplus(-log_r(z_q)).mean()  # -log D, with D = sigmoid(log r)
    loss_p = F.softplus(log_r(z_p)).mean()  # -log(1 - D)
    return (loss_q + loss_p) / 2  # [binary classifier]


def ncp_losses(vae, log_r, x):
    """Every classifier's loss on images x (B, D): z_<k comes from q on both its sides."""
    with torch.no_grad():
        z, pairs = vae.encode(x)
    losses = []
    for k, (_, p) in enumerate(pairs):
        context, z_q = z[..., : k * vae.latent], z[..., : (k + 1) * vae.latent]
        losses.append(nce_loss(log_r, z_q, join(context, p.sample())))  # [hierarchical classifiers]
    return losses


def log_mean(log_w):
    """log of the mean of M weights, (M, ...) -> (...). Of r at draws of the base prior: log Z."""
    return log_w.logsumexp(dim=0) - math.log(len(log_w))  # Z = E_p[r(z)]: [partition function]


def effective_share(log_r):
    """ESS / M of M proposals, (M, ...) -> (...); for many M it is 1 / (1 + chi²(q || p))."""
    return (2 * log_r.logsumexp(dim=0) - (2 * log_r).logsumexp(dim=0)).exp() / len(log_r)


def sir(log_r, proposals):
    """Of M proposals from p, (M, ..., d), each n of its own, one with weight r: (..., d)."""
    weights = log_r(proposals).movedim(0, -1).softmax(dim=-1)  # (..., M)
    index = torch.multinomial(weights.flatten(0, -2), 1).view(1, *proposals.shape[1:-1], 1)
    return proposals.gather(0, index.expand(1, *proposals.shape[1:])).squeeze(0)  # [SIR]


def langevin(log_density, z, steps, step):
    """Unadjusted: z (..., d) moved towards log_density(z) -> (...), known but for a constant."""
    for _ in range(steps):
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            (slope,) = torch.autograd.grad(log_density(z).sum(), z)
        z = z.detach() + step / 2 * slope + math.sqrt(step) * torch.randn_like(z)
    return z  # [Langevin dynamics]


def ancestral(prior, draw, z, groups):
    """z (n, 0) -> (n, K d): each group by draw(p(z_k | z_<k), z_<k), given the groups before."""
    for _ in range(groups):
        z = join(z, draw(prior(z), z))  # [ancestral sampling]
    return z


def by_sir(log_r, proposals, temperature=1.0):
    """A `draw` of `ancestral` for the NCP, by SIR."""

    def draw(p, context):
        z_k = p.sample(proposals, temperature=temperature)
        return sir(lambda z: log_r(join(context, z)), z_k)

    return draw


def by_langevin(log_r, steps, step, temperature=1.0):
    """A `draw` of `ancestral` for the NCP, by Langevin dynamics from the base prior."""

    def draw(p, context):
        p = Gaussian(p.mean, p.log_sigma + math.log(temperature))

        def log_p_ncp(z):
            log_p = p.log_prob(z) + log_r(join(context, z))
            return log_p  # of the [noise contrastive prior], Fig. 1, times Z

        return langevin(log_p_ncp, p.sample(), steps, step)

    return draw


def log_weights(vae, log_r, x, samples, proposals):
    """log p(x, z) - log q(z | x) of draws z ~ q(z | x), by the base prior and by the NCP.

    x (B, D) -> two (samples, B). Their means over the draws are bounds on log p(x), and so are the
    logarithms of their exponentials' means, which are tighter. proposals: M of every Z_k.
    """
    z, pairs = vae.encode(x, samples)
    change, gain = 0, 0  # of the bound: log p(z) - log q(z | x), and what the NCP adds to it
    for k, ((q, p), z_k) in enumerate(zip(pairs, z.split(vae.latent, dim=-1), strict=True)):
        change = change + (p.log_prob(z_k) - q.log_prob(z_k))
        context = z[..., : k * vae.latent] if k else z.new_zeros(0)  # Z_1 is one number
        drawn = vae.prior(context).sample(proposals)
        log_z = log_mean(log_r(join(context, drawn)))
        gain = gain + log_r(z[..., : (k + 1) * vae.latent]) - log_z
    base = vae.log_likelihood(x, z) + change
    return base, base + gain  # E_q[log p(x|z)] - KL(q || p) + E_q[log r] - log Z: [bound]


# ---- Comparing images ---------------------------------------------------------------------------


class Judge(nn.Module):
    """A small classifier of images (B, 1, H, W); the features that it reads the class from."""

    def __init__(self, classes):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2),
            nn.SiLU(),
            nn.Conv2d(16, 32, 5, stride=2, padding=2),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(512, 64),
        )
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        return self.head(F.silu(self.features(x)))


def frechet_distance(a, b):
    """|m - m'|² + tr(S + S' - 2 (S S')^(1/2)) of the Gaussians fitted to (N, D) and (M, D)."""
    a, b = a.cpu().double(), b.cpu().double()
    roots = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0).sqrt()
    spread = a.var(dim=0).sum() + b.var(dim=0).sum() - 2 * roots.sum()
    return ((a.mean(dim=0) - b.mean(dim=0)).square().sum() + spread).item()


# ---- Training -----------------------------------------------------------------------------------


def grey(x):
    """Images in [-1, 1], (B, C, H, W), -> levels in [0, 1], (B, 1, H, W)."""
    return ((x.mean(dim=1, keepdim=True) + 1) * 128 - 0.5) / 255


def binary(x):
    """Images in [-1, 1] -> flat binary draws with mean level / 255, (B, D)."""
    return torch.bernoulli(grey(x).clamp(0, 1)).flatten(1)


def train(cfg, device, data):
    """The VAE, then the classifiers on its frozen latents; last the judge. Returns their Runs."""
    vae = VAE(math.prod(data.shape[1:]), cfg.hidden, cfg.latent, cfg.groups)
    first = common.Run(cfg, vae, device)
    for x, _ in first.batches(data) if not cfg.sample else ():
        loss = -first.model(binary(x)).mean()  # [first stage], Fig. 2
        first.step(loss)
    vae = first.ema
    second = common.Run(cfg, Ratio(cfg.latent, cfg.groups, cfg.width), device, "ncp")
    for x, _ in second.batches(data) if not cfg.sample else ():
        loss = sum(ncp_losses(vae, second.model, binary(x)))  # [second stage], Fig. 2
        second.step(loss)
    steps = min(cfg.steps, cfg.judge_steps) if data.num_classes > 1 else 0
    shorter = replace(cfg, steps=steps)
    judge = common.Run(shorter, Judge(data.num_classes), device, "judge")
    for x, y in judge.batches(data) if not cfg.sample else ():
        judge.step(F.cross_entropy(judge.model(grey(x)), y))
    return first, second, judge


# ---- Evaluation ---------------------------------------------------------------------------------


SAMPLERS = {"prior": "base prior", "sir": "NCP by SIR", "langevin": "NCP by Langevin dynamics"}


def draw(cfg, vae, log_r, n, method, temperature=1.0):
    """n latents (n, K d) by the base prior, "prior", or by the NCP: "sir" or "langevin"."""
    device = next(vae.parameters()).device
    how = {
        "prior": lambda p, context: p.sample(temperature=temperature),
        "sir": by_sir(log_r, cfg.proposals, temperature),
        "langevin": by_langevin(log_r, cfg.langevin_steps, cfg.langevin_step, temperature),
    }[method]
    rows = cfg.proposals if method == "sir" else 1  # of a draw
    most = max(1, 500_000 // rows)  # draws at a time: memory is bounded
    parts = [torch.zeros(min(most, n - i), 0, device=device) for i in range(0, n, most)]
    return torch.cat([ancestral(vae.prior, how, part, vae.groups) for part in parts])


def decode(vae, shape, z):
    """Mean images in [-1, 1], (N, 1, H, W)."""
    return 2 * vae.decoder(z).sigmoid().view(len(z), 1, *shape[1:]) - 1


def compare_bounds(cfg, run, vae, log_r, test):
    """Bounds on log p(x) by the base prior and by the NCP, from the same draws z ~ q(z | x)."""
    if vae.groups == 1:
        proposals, size = 100_000, max(1, 20_000 // cfg.nll_samples)
    else:  # Z_k for every draw of z_<k
        proposals, size = cfg.proposals, max(1, 500_000 // (cfg.nll_samples * cfg.proposals))
    parts = [log_weights(vae, log_r, x, cfg.nll_samples, proposals) for x in test.split(size)]
    base, ncp = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))  # (S, N)
    for name, log_w in (("base VAE", base), ("NCP-VAE", ncp)):
        log_p = log_mean(log_w)
        figures = {"elbo": log_w.mean().item(), f"log_p_{cfg.nll_samples}": log_p.mean().item()}
        run.report(name, **figures, standard_error=common.standard_error(log_p))
    gains = {"elbo": (ncp - base).mean(dim=0), "log_p": log_mean(ncp) - log_mean(base)}
    for name, gain in gains.items():
        figures = {"nats": gain.mean().item(), "standard_error": common.standard_error(gain)}
        run.report(f"gain of {name}", **figures, log_z_draws=proposals)  # whose error is left out


def compare_samples(cfg, run, vae, log_r, judge, x, train):
    """Distances of samples to test images x (N, 1, H, W), of levels in [0, 1]: in the judge's
    features, in pixels, and of the latents to those of x. Draws from q(z), of training images,
    reach what a prior equal to q(z) would. Returns each sampler's latents and its first figure."""
    z_x = vae.encode(torch.bernoulli(x).flatten(1))[0][0]
    latents = {name: draw(cfg, vae, log_r, len(x), name) for name in SAMPLERS}
    features, frechet = judge.features(x), {}
    for name, z in (latents | {"draws from q(z)": vae.encode(train)[0][0]}).items():
        y = vae.decoder(z).sigmoid()
        frechet[name] = frechet_distance(judge.features(y.view(-1, *x.shape[1:])), features)
        pixels, gap = common.energy_distance(y, x.flatten(1)), common.energy_distance(z, z_x)
        figures = {"frechet_of_features": frechet[name], "energy_distance_of_pixels": pixels}
        run.report(SAMPLERS.get(name, name), **figures, energy_distance_of_latents=gap)
    return latents, frechet


@torch.no_grad()
def evaluate(cfg, first, second, judge, data):
    """Diagnostics of the classifiers, bounds, sample quality, and the picture."""
    torch.manual_seed(cfg.seed)
    vae, log_r, run = first.ema, second.ema, first
    order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))
    levels = grey(common.to_float(data.test[order[:10_000].to(run.device)])).clamp(0, 1)
    test = torch.bernoulli(levels[: cfg.nll_examples]).flatten(1)
    losses = [loss.item() for loss in ncp_losses(vae, log_r, test)]
    log_r_p = log_r(vae.prior(torch.zeros(50_000, 0, device=run.device)).sample())
    figures = {"log_z": log_mean(log_r_p), "ess_share": effective_share(log_r_p)}
    figures = {name: value.item() for name, value in figures.items()}  # of the first group
    run.report("classifiers", cross_entropy=sum(losses) / len(losses), **figures)
    compare_bounds(cfg, run, vae, log_r, test)
    train = binary(data.batch(len(levels[:2_000]))[0])
    samples = compare_samples(cfg, run, vae, log_r, judge.ema, levels[:2_000], train)
    z_q = vae.encode(torch.bernoulli(levels).flatten(1), 20)[0].flatten(0, 1)
    picture(cfg, run, vae, log_r, data.shape, z_q, *samples)
    if cfg.num_samples:

        def images(n):
            z = draw(cfg, vae, log_r, n, cfg.sampler, cfg.temperature)
            return decode(vae, data.shape, z)

        run.write_samples(images)
    run.say(f"see {run.folder / 'samples.png'}")


def picture(cfg, run, vae, log_r, shape, z_q, latents, frechet):
    """Above, the densities of q(z), p(z) and p_NCP(z), two latents; below, samples."""
    size, bound, cells = 466, 3.5, 233
    plane = vae.groups == 1 and vae.latent == 2
    z_q, bins = (z_q, 116) if plane else (z_q[: len(latents["prior"])], 40)  # like its neighbours
    above = [("aggregate posterior q(z)", common.density_image(z_q[:, :2], bound, bins, size))]
    if plane:
        axis = torch.linspace(-bound, bound, cells, device=run.device)
        z = torch.cartesian_prod(axis, axis)
        log_p = vae.prior(z[:, :0]).log_prob(z)
        for name, value in (("base prior p(z)", log_p), ("NCP r(z) p(z) / Z", log_p + log_r(z))):
            heat = value.exp().view(cells, cells).cpu()
            above.append((name, common.heat_image(heat, size)))
    else:
        for name in ("prior", "sir"):
            density = common.density_image(latents[name][:, :2], bound, bins, size)
            above.append((f"{SAMPLERS[name]}, two of the latents", density))
    below = []
    for name, title in SAMPLERS.items():
        z = draw(cfg, vae, log_r, 64, name, cfg.temperature)
        grid = common.image_grid(decode(vae, shape, z), scale=max(1, size // (8 * shape[-1] + 9)))
        title += f": Frechet distance {frechet[name]:.1f}" if cfg.temperature == 1 else ""
        below.append((title, grid))
    common.save_panels(run.folder / "samples.png", above, below)


def main(cfg):
    device = common.setup(cfg)
    data = common.load_images(cfg, device)
    if len(data.test) < 2:
        raise UserError(f"{cfg.dataset} is too small: of a folder's images one in ten is held out")
    if cfg.latent * cfg.groups < 2:
        raise UserError("the picture is of two latents: --latent or --groups must be at least 2")
    first, second, judge = train(cfg, device, data)
    if first.finish():
        evaluate(cfg, first, second, judge, data)


if __name__ == "__main__":
    common.cli(main, Config, PRESETS)
