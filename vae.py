"""Auto-Encoding Variational Bayes. Kingma, Welling, arXiv 1312.6114v11

Implements  Eq. 2, Eq. 3 (the bound); Eq. 4, Eq. 9 (reparameterised encoder); Eq. 6, Eq. 7 (SGVB
            estimators A and B); Eq. 8, Alg. 1 (AEVB on minibatches); Eq. 10, App. B (KL); Eq. 11,
            Eq. 12 (Bernoulli and Gaussian decoders); Sec. 5 (MAP, Adagrad, wake-sleep);
            App. D (marginal likelihood); App. E (HMC, Monte Carlo EM); App. F: Eq. 14, Eq. 19,
            Eq. 21, Eq. 22, Eq. 23, Eq. 24, Alg. 2 (full variational Bayes); Fig. 2, Fig. 3 (as a
            table); Fig. 4 (manifold); Fig. 5 (samples)
Conventions x is flat, (B, D): binary draws with mean level / 255, or for a Gaussian decoder
            dequantised in [-1, 1]. z is (L, B, J), L draws for each x. Bounds and likelihoods are
            summed over pixels and latents, in nats, and averaged over images only.
Departures  1. Adam with a falling rate, and a binarisation that is drawn anew at every visit; the
               paper has Adagrad (--optimizer), and does not say how it binarises (--binarization).
            2. N(0, 0.01) is read as a variance, like all the paper's normals; the prior N(0, I) on
               the weights is a decay of 1 / N, the encoder's too. A Gaussian's means lie in
               [-1, 1], by tanh, the paper's in (0, 1): the densities differ by D log 2 nats.
            3. App. D leaves the density and the chains open: here a full Gaussian, and L chains
               side by side, from draws of the prior picked by p(x | z). Minibatches share a draw of
               theta in Alg. 2: it stays unbiased.
            4. The convolutional network for colour, and the importance-weighted test likelihood
               (Burda et al. 2015), are not in the paper.
Run         python vae.py                                            glyphs
            python vae.py --dataset mnist                            digits
            python vae.py --dataset mnist --compare --latent 3 --hidden 100 --train-size 1000
            python vae.py --method full-vb                           a posterior over the weights
            python vae.py --optimizer adagrad --lr 0.02 --decay constant --warmup 0   its Adagrad
            python vae.py --dataset cifar10                          colour; not run here
"""

import dataclasses
import functools
import math
import os
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import common
from common import Count, Natural, Positive, UserError


@dataclass
class Config(common.Config):
    dataset: str = "glyphs"  # a data set's name, or a folder of images (sub-folders: classes)
    method: Literal["aevb", "wake-sleep", "full-vb"] = "aevb"  # Alg. 1; Fig. 2's rival; App. F
    estimator: Literal["A", "B"] = "B"  # of the bound: Eq. 6, or Eq. 7 with the KL in closed form
    samples: Count = 1  # L, draws of z for each image (Alg. 1)
    steps: Natural = 4_000  # optimisation steps
    batch_size: Count = 100  # M (Alg. 1)
    optimizer: Literal["adam", "adagrad"] = "adam"  # the paper's is adagrad (Sec. 5)
    lr: Positive = 1e-2  # peak learning rate; Adagrad's: one of 0.01, 0.02, 0.1 (Sec. 5)
    map: bool = True  # a prior N(0, I) on the weights, worth one image's bound (Sec. 5)
    clip: Positive | None = None  # largest norm of the gradient
    ema: common.Fraction | None = None  # decay of the weights' moving average, which is evaluated
    latent: Count = 20  # J, latent units (Fig. 2: 3, 5, 10, 20, 200)
    manifold: bool = True  # train a second model, of two latent units, for Fig. 4
    hidden: Count = 200  # tanh units of encoder and decoder (Sec. 5), or channels of the conv
    network: Literal["mlp", "conv"] = "mlp"  # App. C, or strided convolutions
    decoder: Literal["bernoulli", "gaussian"] = "bernoulli"  # App. C.1, or App. C.2
    binarization: Literal["stochastic", "fixed"] = "stochastic"  # anew at every visit, or once
    train_size: Count | None = None  # use only so many training images (Fig. 3: 1,000 and 50,000)
    nll_examples: Natural = 100  # random test images whose likelihood is estimated
    nll_samples: Count = 1_000  # draws of z for each of them
    compare: bool = False  # train AEVB, wake-sleep and Monte Carlo EM; print Fig. 2 and 3's figures


COLOUR = {"network": "conv", "decoder": "gaussian", "hidden": 64, "latent": 128, "manifold": False}
MNIST = {"steps": 20_000, "lr": 5e-3, "hidden": 500}  # Sec. 5: 500 units
PRESETS = {
    "mnist": MNIST,
    "fashion_mnist": MNIST,
    "folder": COLOUR,
    "cifar10": COLOUR | {"steps": 100_000, "flip": True},
}


# ---- Distributions and model (Sec. 3, App. C) ---------------------------------------------------


class Gaussian(NamedTuple):
    """N(mu, diag(sigma²)) for every row; the last axis is summed over."""

    mu: Tensor
    log_var: Tensor

    def sample(self, eps):
        return self.mu + (self.log_var / 2).exp() * eps  # Eq. 4

    def log_prob(self, v):
        square = (v - self.mu).square() * (-self.log_var).exp()
        return -(square + self.log_var + math.log(2 * math.pi)).sum(-1) / 2  # Eq. 9, Eq. 12

    def kl(self):
        """KL divergence from N(0, I)."""
        return (self.mu.square() + self.log_var.exp() - 1 - self.log_var).sum(-1) / 2  # App. B

    @property
    def mean(self):
        return self.mu

    def draw(self):
        return self.sample(torch.randn_like(self.mu))


class Bernoulli(NamedTuple):
    """Independent pixels, given by their logits; log_prob is of binary x alone."""

    logits: Tensor

    def log_prob(self, x):
        return F.logsigmoid((2 * x - 1) * self.logits).sum(-1)  # Eq. 11: log y or log(1 - y)

    @property
    def mean(self):
        return self.logits.sigmoid()

    def draw(self):
        return torch.bernoulli(self.mean)


def log_prior(z):
    """log N(z; 0, I), summed over the last axis."""
    return -(z.square() + math.log(2 * math.pi)).sum(-1) / 2


class VAE(nn.Module):
    """q(z | x) and p(x | z) from two networks: x (B, D) -> (B, 2 J) for a Gaussian; z (N, J) -> the
    logits (N, D), or (N, 2 D) for a Gaussian. `theta`: other weights for the decoder, by name."""

    def __init__(self, encoder, decoder, latent, likelihood="bernoulli"):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.latent, self.likelihood = latent, likelihood

    def encode(self, x):
        return Gaussian(*self.encoder(x).to(x.dtype).chunk(2, dim=1))  # Eq. 9

    def decode(self, z, theta=None):
        rows = z.flatten(0, -2)
        h = self.decoder(rows) if theta is None else functional_call(self.decoder, theta, rows)
        h = h.to(z.dtype).unflatten(0, z.shape[:-1])
        if self.likelihood == "bernoulli":
            return Bernoulli(h)  # Eq. 11
        mu, log_var = h.chunk(2, dim=-1)
        return Gaussian(mu.tanh(), log_var)  # Eq. 12, Departure 2

    def log_joint(self, x, z, theta=None):
        """log p(x, z): x (B, D), z (..., B, J) -> (..., B)."""
        return self.decode(z, theta).log_prob(x) + log_prior(z)

    def forward(self, objective, *inputs):
        """objective(self, ...): in here it runs compiled, distributed and under autocast."""
        return objective(self, *inputs)


# ---- The bound's estimators (Sec. 2.3) ----------------------------------------------------------
# x (B, D) and eps ~ N(0, I) of shape (L, B, J) -> an estimate of the bound on log p(x), (B,).


def log_weights(vae, x, eps, theta=None):
    """log p(x, z) - log q(z | x), the integrand of Eq. 2, at every draw: (L, B)."""
    q = vae.encode(x)
    z = q.sample(eps)
    return vae.log_joint(x, z, theta) - q.log_prob(z)  # Eq. 2


def sgvb_a(vae, x, eps, theta=None):
    """Needs no integral; of zero variance where q is the posterior."""
    return log_weights(vae, x, eps, theta).mean(0)  # Eq. 6


def sgvb_b(vae, x, eps, theta=None):
    """The expectation of log p(z) - log q(z | x) in closed form."""
    q = vae.encode(x)
    return vae.decode(q.sample(eps), theta).log_prob(x).mean(0) - q.kl()  # Eq. 3, Eq. 7, Eq. 10


SGVB = {"A": sgvb_a, "B": sgvb_b}


def wake_sleep(vae, x):
    """Hinton et al.'s rival of Fig. 2: two objectives, for theta and for phi, in one sum, (B,).

    Wake: log p(x, z), z ~ q(z | x), for theta. Sleep: log q(z | x), (z, x) ~ p, for phi.
    """
    with torch.no_grad():
        z = vae.encode(x).draw()
        dream_z = torch.randn_like(z)
        dream_x = vae.decode(dream_z).draw()
    return vae.log_joint(x, z) + vae.encode(dream_x).log_prob(dream_z)  # Sec. 5


# ---- Full variational Bayes (App. F) ------------------------------------------------------------


class BayesianVAE(VAE):
    """A VAE whose decoder's weights have a posterior q(theta), too."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        size = sum(p.numel() for p in self.decoder.parameters())
        self.log_var_theta = nn.Parameter(torch.full((size,), -8.0))

    def q_theta(self):
        mu = torch.cat([p.flatten() for p in self.decoder.parameters()])
        return Gaussian(mu, self.log_var_theta)  # Eq. 23

    def weights(self, theta):
        """theta (P,) -> the decoder's weights, by name."""
        named = dict(self.decoder.named_parameters())
        parts = theta.split([p.numel() for p in named.values()])
        return {k: part.view_as(p) for (k, p), part in zip(named.items(), parts, strict=True)}


def full_vb(vae, x, eps, zeta, n, estimator="B"):
    """A bound on log p(X) of all n images, with zeta ~ N(0, I) of theta's shape: a scalar."""
    q = vae.q_theta()
    theta = q.sample(zeta)  # Eq. 19
    bound = n * SGVB[estimator](vae, x, eps, vae.weights(theta)).mean()  # Eq. 8 within Eq. 14
    if estimator == "A":
        return bound + log_prior(theta) - q.log_prob(theta)  # Eq. 21, Eq. 22
    return bound - q.kl()  # Eq. 24


# ---- Likelihoods of test images, and the posterior (App. D, App. E) ------------------------------


@torch.no_grad()
def log_likelihood(vae, x, samples):
    """log 1/S sum_s p(x, z_s) / q(z_s | x), z_s ~ q: x (B, D) -> (B,), in expectation a bound.

    Memory is bounded. A posterior over the weights is integrated over, one draw a chunk.
    """
    log_p = []
    for part in x.split(20):
        chunks = []
        for start in range(0, samples, 250):
            size = (min(250, samples - start), len(part), vae.latent)
            eps = torch.randn(size, dtype=x.dtype, device=x.device)
            theta = vae.weights(vae.q_theta().draw()) if isinstance(vae, BayesianVAE) else None
            chunks.append(log_weights(vae, part, eps, theta))
        log_p.append(torch.cat(chunks).logsumexp(0) - math.log(samples))
    return torch.cat(log_p)


def hmc(log_p, z, step, leapfrogs):
    """A transition of hybrid Monte Carlo -> (z, probability of acceptance).

    z (..., J), any number of chains; log_p(z) -> (...); step, the size of a step: one, or (..., 1).
    """

    def slope(z):
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            value = log_p(z)
            return value.detach(), torch.autograd.grad(value.sum(), z)[0]

    v, new = torch.randn_like(z), z
    log_p_old, gradient = slope(z)
    energy = v.square().sum(-1) / 2 - log_p_old
    for _ in range(leapfrogs):
        v = v + step / 2 * gradient
        new = new + step * v
        log_p_new, gradient = slope(new)
        v = v + step / 2 * gradient
    rise = v.square().sum(-1) / 2 - log_p_new - energy
    chance = rise.neg().clamp(max=0).exp().nan_to_num(0)  # App. E
    accept = torch.rand_like(chance) < chance
    return torch.where(accept[..., None], new, z), chance


def tuned(step, chance, rate):
    """The step, longer where more than 90 % are accepted, shorter where fewer: App. E."""
    return step * (rate * (chance - 0.9)).exp()


def posterior_samples(log_p, z, transitions, step=None, leapfrogs=4):
    """Chains z (S, B, J) some transitions on -> (z, step); a step (B, 1) is given, or tuned."""
    fixed, step = step is not None, torch.full_like(z[0, :, :1], 0.3) if step is None else step
    for i in range(transitions):
        z, chance = hmc(log_p, z, step, leapfrogs)
        step = step if fixed else tuned(step, chance.mean(0)[:, None], 2 / (1 + i / 5))
    return z, step


def reciprocal_likelihood(log_q, log_p_joint):
    """log p(x) from L draws of the posterior, (L, B) -> (B,): 1 / p(x) = E[q(z) / p(x, z)]. It is
    biased upwards, and exact if q is the posterior."""
    return math.log(len(log_q)) - (log_q - log_p_joint).logsumexp(0)  # App. D


def marginal_likelihood(vae, x, z, transitions):
    """App. D's three stages: x (B, D), chains z (L, B, J), J < 5, wherever they start -> (B,)."""

    def log_p(z):
        return vae.log_joint(x, z)  # log p(z | x) but for a constant

    z, step = posterior_samples(log_p, z, 2 * transitions)  # App. D, 1
    centred = z - z.mean(0)
    covariance = torch.einsum("lbi,lbj->bij", centred, centred) / (len(z) - 1)
    scale = torch.linalg.cholesky(covariance + 1e-6 * torch.eye(z.shape[2]).to(z))
    q = torch.distributions.MultivariateNormal(z.mean(0), scale_tril=scale, validate_args=False)
    z, _ = posterior_samples(log_p, z, transitions, step)  # App. D, 2 was q; 3: new values
    with torch.no_grad():
        return reciprocal_likelihood(q.log_prob(z), log_p(z))


# ---- Networks and data --------------------------------------------------------------------------


def mlp(n_in, hidden, n_out):
    """App. C's network of one tanh layer; all parameters from N(0, 0.01): Sec. 5, Departure 2."""
    net = nn.Sequential(nn.Linear(n_in, hidden), nn.Tanh(), nn.Linear(hidden, n_out))
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    return net


def conv(shape, channels, latent, outputs):
    """Encoder and decoder of two strided convolutions each, between flat images and vectors."""
    c, inner = shape[0], (2 * channels, shape[1] // 4, shape[2] // 4)
    size = math.prod(inner)
    down = [nn.Conv2d(c, channels, 4, 2, 1), nn.SiLU()]
    down += [nn.Conv2d(channels, 2 * channels, 4, 2, 1), nn.SiLU(), nn.Flatten()]
    up = [nn.ConvTranspose2d(2 * channels, channels, 4, 2, 1), nn.SiLU()]
    up += [nn.ConvTranspose2d(channels, outputs * c, 4, 2, 1), nn.Flatten()]
    encoder = nn.Sequential(nn.Unflatten(1, shape), *down, nn.Linear(size, 2 * latent))
    return encoder, nn.Sequential(nn.Linear(latent, size), nn.SiLU(), nn.Unflatten(1, inner), *up)


def build(cfg, shape, latent):
    """The VAE that cfg describes, for images of the shape (C, H, W)."""
    pixels, outputs = math.prod(shape), 1 if cfg.decoder == "bernoulli" else 2
    if cfg.network == "conv":
        networks = conv(shape, cfg.hidden, latent, outputs)
    else:
        encoder = mlp(pixels, cfg.hidden, 2 * latent)
        networks = encoder, mlp(latent, cfg.hidden, outputs * pixels)
    kind = BayesianVAE if cfg.method == "full-vb" else VAE
    return kind(*networks, latent, likelihood=cfg.decoder)


class Images:
    """A data set's flat images, (B, D), as the decoder's likelihood wants them."""

    def __init__(self, cfg, data):
        self.shape, self.flip, self.gaussian = data.shape, data.flip, cfg.decoder == "gaussian"
        rng = torch.Generator(data.train.device).manual_seed(cfg.seed)
        order = torch.randperm(len(data.test), generator=rng, device=rng.device)
        self.test, self.labels = self.draw(data.test, rng)[order], data.test_labels[order]
        some = torch.randperm(len(data.train), generator=rng, device=rng.device)[: cfg.train_size]
        self.levels = data.train[some] if cfg.train_size else data.train
        if cfg.binarization == "fixed" and not self.gaussian:
            self.levels = 255 * common.binarize(self.levels, rng)  # binarised again, these stay

    def __len__(self):
        return len(self.levels)

    def batch(self, n):
        """n random training images (x, index)."""
        index = torch.randint(len(self), (n,), device=self.levels.device)
        return self.images(index), index

    def images(self, index):
        levels = self.levels[index]
        return self.draw(common.mirrored(levels) if self.flip else levels)

    def draw(self, levels, rng=None):
        """Levels (B, C, H, W) -> (B, D): dequantised for a Gaussian decoder, else binary."""
        if self.gaussian:
            return common.dequantize(common.to_float(levels)).flatten(1)
        return common.binarize(levels, rng).flatten(1).float()


# ---- Training -----------------------------------------------------------------------------------


def objective(cfg, run, x, n):
    """What a step of the method ascends, in nats per image of the n."""
    vae = run.net
    eps = torch.randn(cfg.samples, len(x), vae.latent, device=x.device)
    if cfg.method == "wake-sleep":
        return run.model(wake_sleep, x).mean()
    if cfg.method == "full-vb":
        zeta = torch.randn_like(vae.log_var_theta)
        return run.model(full_vb, x, eps, zeta, n, cfg.estimator) / n  # Alg. 2
    return run.model(SGVB[cfg.estimator], x, eps).mean()  # Eq. 8 divided by N


def train(cfg, run, images):
    for x, _ in run.batches(images):  # Alg. 1: M random images
        run.step(-objective(cfg, run, x, len(images)))  # Alg. 1: eps, gradient, update


def train_mcem(run, images):
    """Monte Carlo EM: a transition of M chains, ten leapfrog steps long, then five updates."""
    vae, m = run.net, run.cfg.batch_size
    chains = torch.randn(len(images), vae.latent, device=run.device)
    step_size = torch.tensor(0.1, device=run.device)
    for step in run.steps():
        if step % 5 == 0:  # App. E
            index = torch.randperm(len(images), device=run.device)[:m]
            x = images.images(index)
            z, chance = hmc(lambda z, x=x: vae.log_joint(x, z), chains[index], step_size, 10)
            chains[index] = z
            step_size = tuned(step_size, chance.mean(), 0.1)
        run.step(-run.model(VAE.log_joint, x, z).mean())


def optimizer(cfg, n):
    """Adam or Adagrad; the prior N(0, I) on the weights is a decay of 1 / N (Sec. 5: MAP)."""
    decay = 1 / n if cfg.map and cfg.method != "full-vb" else 0  # whose bound has the prior in it
    settings = {"lr": cfg.lr, "weight_decay": decay}
    if cfg.optimizer == "adagrad":
        return functools.partial(torch.optim.Adagrad, **settings)
    return functools.partial(torch.optim.Adam, betas=(0.9, cfg.beta_2), fused=True, **settings)


# ---- Evaluation ---------------------------------------------------------------------------------


@torch.no_grad()
def mean_bound(vae, x):
    """The mean of Eq. 7 over x with one draw each."""
    eps = torch.randn(len(x), vae.latent, device=x.device)
    parts = zip(x.split(1000), eps.split(1000), strict=True)
    return torch.cat([sgvb_b(vae, x, eps[None]) for x, eps in parts]).mean().item()


def chain_starts(vae, x, n=50):
    """Of 1,000 draws of the prior the n for each x that p(x | z) picks, (n, B, J): they need no
    encoder, and reach modes that q misses."""
    z, picks = torch.randn(1_000, 1, vae.latent, device=x.device), []
    with torch.no_grad():
        for part in x.split(20):
            log_p = vae.decode(z).log_prob(part)  # log p(x | z), (1000, B)
            picks.append(log_p.T.softmax(dim=1).multinomial(n, replacement=True))  # (B, n)
    return z[torch.cat(picks).T, 0]


def app_d(vae, x, transitions=5):
    """App. D's estimate, (B,), by 50 chains each (App. E)."""
    parts = [(part, chain_starts(vae, part)) for part in x.split(100)]  # at once in memory
    return torch.cat([marginal_likelihood(vae, *part, transitions) for part in parts])


def evaluate(cfg, run, images):
    """The bound on all test images and the likelihood of some, by App. D too if it can be. Of a
    posterior over the weights, bound and App. D take the mean."""
    torch.manual_seed(cfg.seed)
    vae, x = run.ema, images.test[: cfg.nll_examples]
    has_encoder = cfg.method != "mcem"  # which leaves it untrained
    figures = {"bound": mean_bound(vae, images.test)} if has_encoder else {}
    if len(x) and has_encoder:
        log_p = log_likelihood(vae, x, cfg.nll_samples)
        figures |= {"nll": -log_p.mean().item(), "standard_error": common.standard_error(log_p)}
        figures |= {"examples": len(x), "draws": cfg.nll_samples}
        if images.gaussian:
            figures["bits_per_dim"] = common.bits_per_dim(log_p, x.shape[1]).mean().item()
    if len(x) and vae.latent < 5:
        figures["nll_by_mcmc"] = -app_d(vae, x).mean().item()
    run.report("test", **figures)


def compare(cfg):
    """Figures of Fig. 2 and Fig. 3 for AEVB, wake-sleep and Monte Carlo EM, as a table."""

    def cell(log_p):
        return f"{log_p.mean():.1f} ± {common.standard_error(log_p) or math.nan:.1f}"

    few = cfg.latent < 5  # App. D; without an encoder there is no other figure
    rows = []
    for method in ("aevb", "wake-sleep", *(["mcem"] if few else [])):
        encoder = method != "mcem"
        out = common.free_folder(f"{cfg.out}/{method}")
        images, start = prepare(
            dataclasses.replace(cfg, compare=False, manifold=False, method=method, out=out)
        )
        run = start()
        run.say(f"training by {method}")
        if encoder:
            train(run.cfg, run, images)
        else:
            train_mcem(run, images)
        torch.manual_seed(cfg.seed)
        vae, test, figures = run.ema, images.test[: cfg.nll_examples], []
        seen = images.images(torch.arange(min(len(test), len(images)), device=run.device))
        for x in (seen, test):
            figures.append(f"{mean_bound(vae, x):.1f}" if encoder else "-")
            figures.append(cell(app_d(vae, x)) if few else "-")
        figures.append(cell(log_likelihood(vae, test, cfg.nll_samples)) if encoder else "-")
        rows.append(f"{method:<10}{len(images):7d}" + "".join(f"{f:>16}" for f in figures))
    print("nats per image: bound; log p(x) by App. D (MCMC); by importance weighting (IW)")
    titles = ("train L", "MCMC", "test L", "MCMC", "IW")
    print("method          N" + "".join(f"{title:>16}" for title in titles))
    print("\n".join(rows))


# ---- Pictures (App. A) --------------------------------------------------------------------------


def as_images(images, x):
    """Pixels or their means, (N, D) -> (N, C, H, W) in [-1, 1]."""
    return (x if images.gaussian else 2 * x - 1).unflatten(1, images.shape)


@torch.no_grad()
def means(vae, z):
    """The means of p(x | z): z (N, J) -> (N, D)."""
    return vae.decode(z[None]).mean[0]


def manifold(vae, images, side=18):
    """Fig. 4: what two latents decode to, over the unit square; and the codes of test images."""
    u = (torch.arange(side) + 0.5) / side
    z = torch.special.ndtri(u)  # Fig. 4: equal steps through the inverse CDF of N(0, 1)
    z = z.to(images.test.device)  # not all devices have the function
    z = torch.stack([z.repeat(side), z.flip(0).repeat_interleave(side)], dim=1)
    scale = max(1, 8 // images.shape[-1])
    grid = common.image_grid(as_images(images, means(vae, z)), side, scale)
    hues = [f"hsl({36 * label},75%,45%)" for label in range(10)]
    codes, labels = vae.encode(images.test[:1500]).mu.cpu(), images.labels[:1500].tolist()
    dots = [("dots", codes, [hues[label % 10] for label in labels], 2)]
    legend = list(zip("0123456789", hues, strict=True))
    size = (grid.shape[2] - 58,) * 2  # and the axes
    plot = common.chart(dots, (-3.2, 3.2, -3.2, 3.2), size, ("z_1", "z_2"), legend)
    return [("manifold of two latents", grid), ("codes of test images", plot)]


@torch.no_grad()
def picture(runs, images, has_encoder=True, n=12):
    """Reconstructions, samples (Fig. 5), interpolations of the first run; a manifold (Fig. 4)."""
    rows = [manifold(run.ema, images) for run in runs if run.ema.latent == 2]
    vae = runs[0].ema
    x = images.test[torch.arange(n * n // 2, device=images.test.device) % len(images.test)]
    mu = vae.encode(x).mu
    pairs = torch.stack([x.unflatten(0, (-1, n)), means(vae, mu).unflatten(0, (-1, n))], dim=1)
    t = torch.linspace(0, 1, n, device=x.device)[:, None]
    ends = mu[: 2 * n].unflatten(0, (n, 2))
    between = (1 - t) * ends[:, :1] + t * ends[:, 1:]  # (n, n, J)
    panels = {
        "test images above their reconstructions": pairs.flatten(0, 2),
        "samples": means(vae, torch.randn(n * n, vae.latent, device=x.device)),
        "from one test image to another": means(vae, between.flatten(0, 1)),
    }
    if not has_encoder:
        rows, panels = [row[:1] for row in rows], {"samples": panels["samples"]}
    rows.append([(t, common.image_grid(as_images(images, x), n)) for t, x in panels.items()])
    common.save_panels(runs[0].folder / "samples.png", *rows)


# ---- The command line ---------------------------------------------------------------------------


def prepare(cfg):
    """The images, and a function that starts the run of a stage."""
    device = common.setup(cfg)
    data = common.load_images(cfg, device)
    images = Images(cfg, data)
    if cfg.network == "conv" and (data.shape[1] % 4 or data.shape[2] % 4):
        raise UserError("--network conv needs images whose sides are multiples of 4: --image-size")

    def start(stage="", latent=cfg.latent):
        net = build(cfg, data.shape, latent)
        return common.Run(cfg, net, device, stage, optimizer(cfg, len(images)))

    return images, start


def main(cfg):
    if cfg.compare:
        if cfg.resume or cfg.sample or cfg.num_samples or "RANK" in os.environ:
            raise UserError("--compare trains anew, in one process, and writes no samples")
        if not cfg.nll_examples:
            raise UserError("--compare is about likelihoods: --nll-examples must be at least 1")
        if cfg.method != "aevb" or cfg.manifold:
            raise UserError("--compare trains by every method: leave out --method and --manifold")
        compare(cfg)
        return
    if cfg.resume and cfg.method == "mcem":
        raise UserError(f"{cfg.out} is --compare's, by Monte Carlo EM: sample it, or train anew")
    images, start = prepare(cfg)
    stages = {"": cfg.latent} | ({"manifold": 2} if cfg.manifold and cfg.latent != 2 else {})
    runs = []
    for stage, latent in stages.items():
        runs.append(start(stage, latent))
        if not cfg.sample:
            train(cfg, runs[-1], images)
    if not runs[0].finish():
        return
    for run in runs:
        evaluate(cfg, run, images)
    picture(runs, images, cfg.method != "mcem")
    if cfg.num_samples:
        vae, device = runs[0].ema, runs[0].device

        def draw(n):
            return as_images(images, means(vae, torch.randn(n, vae.latent, device=device)))

        runs[0].write_samples(draw)
    runs[0].say(f"see {runs[0].folder / 'samples.png'}")


if __name__ == "__main__":
    common.cli(main, Config, PRESETS)
