"""Score-Based Generative Modeling through Stochastic Differential Equations.
Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole, ICLR 2021, arXiv 2011.13456v2

Implements  Eq. 5, Eq. 30, Eq. 31 (VE SDE), Eq. 32, Eq. 33 (VP), Eq. 12, Eq. 34 (sub-VP); Eq. 20,
            Eq. 24, Eq. 45 (discretisations); Eq. 7 (training), Eq. 1, Eq. 3 (at N noise levels);
            Eq. 6, Eq. 4, Eq. 46, Eq. 47, App. D.3 (predictors); Alg. 4, Alg. 5 (correctors);
            Alg. 1, App. G (PC sampler, its denoising); Eq. 13 (probability flow ODE); Eq. 39,
            Eq. 40, App. D.2 (likelihood); App. D.4, Fig. 6 (codes, interpolation, temperature);
            App. D.5 (two networks, one code); Eq. 49, App. I.1 (by class); App. I.2 (imputation);
            App. I.3 (colourisation); Table 1 (samplers, in 2-D); App. C (schedules, eps); App. H.1,
            App. H.2 (CIFAR-10)
Conventions t = 0 is data, x_0; t = 1 is noise. A score is s(x, t); eps is the smallest time.
Departures  1. N equal steps from t = 1 to eps, beta_i = h beta(t_i): Eq. 20 and Eq. 24 for the
               continuous model. Sub-VP, where the paper gives none, takes Euler's: Eq. 46 is Eq. 6.
            2. The paper, not the official code: the corrector follows the predictor; alpha_i is
               the product a(t_i)², not 1 - beta_i, for sub-VP too; Tweedie's formula at eps ends PC
               (not the ODE); imputation starts from noised data and denoises the unknown part too.
            3. --score residual: the network corrects the score of data N(0, I), with which so small
               a one learns faster; "noise" is the authors' -net / std of VP. It sees x scaled to 1.
            4. --weighting likelihood is of the authors' later paper. Training, too, dequantises.
            5. The U-Net is Dhariwal & Nichol's; DDPM++, and NCSN++ for VE, differ in details. On
               small images it sees patches of 2 x 2 pixels, and Muon trains its kernels. The
               classifier has three convolutions; theirs is a Wide-ResNet-28-10.
Run         python score_sde.py                       checkerboard
            python score_sde.py --dataset mnist       digits: by class, inpainted, interpolated
            python score_sde.py --compare             Table 1 in 2-D
            python score_sde.py --dataset cifar10     App. H; not run here
"""

import dataclasses
import itertools
import math
import os
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import common
from common import Count, Natural, Positive, Sizes, UserError, bcast

PREDICTORS = ("euler_maruyama", "reverse_diffusion", "ancestral", "probability_flow")


@dataclass
class Config(common.Config):
    steps: Natural = 8_000  # optimisation steps
    batch_size: Count = 512  # examples per step, over all processes together
    lr: Positive = 4e-3  # peak learning rate of Adam
    optimizer: Literal["adam", "muon"] = "adam"  # muon: for the kernels of convolutions
    sde: Literal["ve", "vp", "subvp"] = "ve"  # forward SDE (Sec. 3.4)
    sigma_min: Positive = 0.01  # VE: smallest noise (App. C)
    sigma_max: Positive = 10.0  # VE: largest noise, above the data's diameter
    beta_min: Positive = 0.1  # VP, sub-VP: beta(0) (App. C)
    beta_max: Positive = 20.0  # VP, sub-VP: beta(1) (App. C)
    score: Literal["residual", "noise"] = "residual"  # what the network gives: Departure 3
    levels: Natural = 0  # train on N noise levels, as SMLD and DDPM do (Eq. 1, 3); 0: on all
    weighting: Literal["variance", "likelihood"] = "variance"  # lambda(t) in Eq. 7: std² or g²
    predictor: Literal[(*PREDICTORS, "none")] = "reverse_diffusion"  # reverse step (App. H.1)
    sampler_steps: Count = 100  # N, predictor steps from t = 1 to eps (Alg. 1)
    corrector_steps: Natural = 1  # M, Langevin steps per predictor step (App. H.1: VE 1, VP 0)
    snr: Positive = 0.16  # r, signal-to-noise ratio of the Langevin steps (App. H.1: VE)
    tol: Positive = 1e-5  # atol = rtol of the ODE solver (App. D.2, D.4)
    nll_examples: Natural = 2_000  # held-out examples whose likelihood is computed
    nll_repeats: Count = 1  # dequantisations and probes averaged per image (App. D.2: 5)
    divergence: Literal["exact", "rademacher", "gaussian"] = "exact"  # exact, or Eq. 40's probe
    classifier_steps: Natural = 1_000  # of training p_t(y | x), App. I.1; 0: no classifier
    compare: bool = False  # train every SDE, print Table 1 for 2-D data
    width: Count = 128  # units of the MLP, or base channels of the U-Net
    blocks: Count = 2  # residual blocks, of the MLP or of each level of the U-Net
    mult: Sizes = (1, 2, 2, 2)  # channel multiple of each level of the U-Net
    attention: Sizes | None = (16,)  # resolutions with attention, but for the middle block
    patch: Count = 1  # side of the patches of pixels that the U-Net sees as channels
    dropout: common.Fraction = 0.0  # of the U-Net
    learned = ("optimizer", "sde", "score", "sigma_min", "sigma_max", "beta_min", "beta_max")


# fmt: off
SMALL_IMAGES = common.SMALL_UNET | {  # minutes on two cores
    "steps": 6_000, "sde": "subvp", "tol": 1e-4, "nll_examples": 64, "divergence": "rademacher",
    "classifier_steps": 4_000, "sigma_max": 50.0,  # VE: about the images' diameter
}
PRESETS = dict.fromkeys(("glyphs", "mnist", "fashion_mnist", "folder"), SMALL_IMAGES) | {
    "cifar10": {  # DDPM++ cont. (sub-VP), Table 2, Table 3; width, mult, attention: official code
        "steps": 1_300_000, "batch_size": 128, "blocks": 4, "ema": 0.9999,  # App. H.1
        "lr": 2e-4, "warmup": 5_000, "decay": "constant", "flip": True,  # official code
        "dropout": 0.1, "divergence": "rademacher",  # official code
        "sde": "subvp", "score": "noise",  # official code; of VE, App. H:
        # --sde ve --predictor reverse_diffusion --corrector-steps 1 --ema 0.999 --steps 950000
        "sigma_min": 0.02, "sigma_max": 100.0,  # official code's 0.01 and 50, of images in [0, 1]
        "nll_examples": 10_000, "nll_repeats": 5,  # App. D.2
        "sampler_steps": 1_000, "corrector_steps": 0,  # App. H.1
        "predictor": "euler_maruyama", "classifier_steps": 50_000,  # App. H.2; not stated
    },
}
# fmt: on


# ---- Stochastic differential equations (Sec. 3.4, App. B, App. C) --------------------------------


class SDE:
    """dx = f(x, t) dt + g(t) dw, Eq. 5, on t in [0, 1], with p_0t(x_t | x_0) = N(a x_0, std² I).

    A subclass has kernel(t) -> (a, std), drift(x, t) = f, g2(t) = g². x is (B, ...), and t of any
    shape that broadcasts with x. A predictor takes x at t and the score s there, and returns the
    mean and the width of x at t - h (Sec. 4.1, App. D.3 - F).
    """

    eps = 1e-5  # smallest t in training and likelihood (App. C)
    eps_sample = 1e-3  # and in sampling, for VP and sub-VP (App. C, D.4)
    prior_std = 1.0  # p_1 is close to N(0, prior_std² I)

    def discretize(self, x, t, h):
        """f_i(x) and G_i of the forward step to t, x + f_i(x) + G_i z; here Euler's."""
        return h * self.drift(x, t), torch.sqrt(h * self.g2(t))  # Eq. 45

    def euler_maruyama(self, x, s, t, h):
        drift = self.drift(x, t) - self.g2(t) * s  # Eq. 6
        return x - h * drift, torch.sqrt(h * self.g2(t))

    def reverse_diffusion(self, x, s, t, h):
        f, G = self.discretize(x, t, h)
        return x - f + G**2 * s, G  # Eq. 46

    def probability_flow(self, x, s, t, h):
        f, G = self.discretize(x, t, h)
        return x - f + G**2 / 2 * s, torch.zeros_like(G)  # App. D.3

    def ancestral(self, x, s, t, h):
        raise TypeError("the paper has no ancestral sampling for this SDE")

    def prior(self, *shape, device=None):
        return self.prior_std * torch.randn(shape, device=device)

    def prior_log_prob(self, x):
        """log p_1(x) in nats, (B, ...) -> (B,)."""
        log_p = common.standard_normal_log_prob(x / self.prior_std)
        return log_p - x[0].numel() * math.log(self.prior_std)


class VE(SDE):
    """Variance exploding: noise conditional score networks (SMLD) in continuous time."""

    eps_sample = 1e-5  # App. C

    def __init__(self, sigma_min=0.01, sigma_max=50.0):
        self.sigma_min, self.sigma_max, self.prior_std = sigma_min, sigma_max, sigma_max

    def sigma(self, t):
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t  # App. C

    def kernel(self, t):
        return torch.ones_like(t), self.sigma(t) * (t > 0)  # Eq. 31; sigma(0) is 0, not sigma(0+)

    def drift(self, x, t):
        return torch.zeros_like(x)

    def g2(self, t):
        return 2 * math.log(self.sigma_max / self.sigma_min) * self.sigma(t) ** 2  # Eq. 30

    def discretize(self, x, t, h):
        G2 = self.sigma(t) ** 2 - self.sigma(t - h) ** 2
        return torch.zeros_like(x), torch.sqrt(G2)  # Eq. 20

    def ancestral(self, x, s, t, h):
        _, G = self.discretize(x, t, h)
        return x + G**2 * s, G * self.sigma(t - h) / self.sigma(t)  # Eq. 47


class VP(SDE):
    """Variance preserving: denoising diffusion models (DDPM) in continuous time."""

    def __init__(self, beta_min=0.1, beta_max=20.0):
        self.beta_min, self.beta_max = beta_min, beta_max

    def beta(self, t):
        return self.beta_min + t * (self.beta_max - self.beta_min)  # App. C

    def B(self, t):
        """The integral of beta from 0 to t."""
        return t * self.beta_min + t**2 / 2 * (self.beta_max - self.beta_min)

    def kernel(self, t):
        variance = -torch.expm1(-self.B(t))  # 1 - a², without cancelling
        return torch.exp(-self.B(t) / 2), torch.sqrt(variance)  # Eq. 33

    def drift(self, x, t):
        return -self.beta(t) / 2 * x  # Eq. 32

    def g2(self, t):
        return self.beta(t)  # Eq. 32

    def discretize(self, x, t, h):
        beta_i = h * self.beta(t)
        return (torch.sqrt(1 - beta_i) - 1) * x, torch.sqrt(beta_i)  # Eq. 24

    def ancestral(self, x, s, t, h):
        beta_i = h * self.beta(t)
        return (x + beta_i * s) / torch.sqrt(1 - beta_i), torch.sqrt(beta_i)  # Eq. 4


class SubVP(VP):
    """Of a variance that never exceeds the VP SDE's: made for likelihoods."""

    discretize, ancestral = SDE.discretize, SDE.ancestral

    def kernel(self, t):
        return torch.exp(-self.B(t) / 2), -torch.expm1(-self.B(t))  # Eq. 34

    def g2(self, t):
        return self.beta(t) * -torch.expm1(-2 * self.B(t))  # Eq. 12


def perturb(x_0, z, t, sde):
    """x_t ~ p_0t(. | x_0) by means of z ~ N(0, I): x_0, z (B, ...), t (B,)."""
    a, std = sde.kernel(bcast(t, x_0))
    return a * x_0 + std * z


# ---- Training (Sec. 3.3) ------------------------------------------------------------------------


def scaled(net, sde):
    """The network on x_t at the size that it has for data of variance 1, at all t."""

    def scaled_net(x, t):
        a, std = sde.kernel(bcast(t, x))
        return net(x / torch.sqrt(a**2 + std**2), t)

    return scaled_net


def score_model(net, sde, kind="noise"):
    """The score s(x, t) that a network stands for: Departure 3."""

    def score(x, t):
        a, std = sde.kernel(bcast(t, x))
        if kind == "noise":
            return -scaled(net, sde)(x, t) / std
        total = torch.sqrt(a**2 + std**2)
        return -x / total**2 - a / (std * total) * scaled(net, sde)(x, t)

    return score


def draw_times(n, sde, levels=0, device=None):
    """t ~ U(eps, 1), (n,); or from i / N for N levels, where Eq. 7 becomes Eq. 1 or Eq. 3 as N
    grows. (Below 1 / N such a network is not trained, yet samplers go to eps; SMLD's own levels
    start at sigma_min.)"""
    u = torch.rand(n, device=device)
    if levels:
        return (torch.floor(u * levels) + 1) / levels  # Eq. 1, Eq. 3
    return sde.eps + (1 - sde.eps) * u


def dsm_loss(score, x_0, z, t, sde, weighting="variance"):
    """lambda(t) |s(x_t, t) - grad log p_0t(x_t | x_0)|², its mean over batch and dimensions: Eq. 7.

    x_0 ~ data and z ~ N(0, I) are (B, ...), t is (B,). lambda = std², which is in proportion to
    1 / E |grad log p_0t|², or g².
    """
    _, std = sde.kernel(bcast(t, x_0))
    error = std * score(perturb(x_0, z, t, sde), t) + z  # std (s - grad log p_0t)
    weight = 1.0 if weighting == "variance" else sde.g2(bcast(t, x_0)) / std**2
    return (weight * error.square()).mean()  # Eq. 7


# ---- Predictor-corrector sampling (Sec. 4.2, App. G) ---------------------------------------------


def langevin(x, t, score, sde, snr):
    """A corrector step at time t, (B, ...) -> (B, ...). Norms are means over the batch (App. G)."""
    z = torch.randn_like(x)
    g = score(x, t)
    a, _ = sde.kernel(bcast(t, x))
    ratio = snr * z.flatten(1).norm(dim=1).mean() / g.flatten(1).norm(dim=1).mean()
    step = 2 * a**2 * ratio**2  # Alg. 4, where a = 1; Alg. 5, where alpha_i = a²
    return x + step * g + torch.sqrt(2 * step) * z


def tweedie(x, t, score, sde):
    """E[x_0 | x_t = x], with which a sampler ends: App. G, Denoising."""
    a, std = sde.kernel(bcast(t, x))
    return (x + std**2 * score(x, t)) / a


def pc_sample(score, sde, x, steps, predictor, correctors=0, snr=0.16, impute=None, trace=None):
    """Predictor-corrector sampling: x ~ p_1, (B, ...) -> x_0, and the evaluations of the score.

    Args:
        steps, correctors, snr: N, M and r of the paper.
        predictor: one of PREDICTORS, or "none": Langevin steps alone, the first at t_{N-1}.
        impute: a function (x, t) that puts the known part at time t into x (see `imputation`).
        trace: a list, to which x is appended at each of the N + 1 times.
    """
    impute = impute or (lambda x, t: x)
    trace = [] if trace is None else trace
    times = torch.linspace(1, sde.eps_sample, steps + 1, dtype=torch.float64).tolist()
    with torch.no_grad():
        t = x.new_full((len(x),), times[0])
        x = impute(x, t)
        trace.append(x)
        for time in times[1:]:  # Alg. 1, l. 2
            if predictor != "none":  # Alg. 1, l. 3
                h, s = times[0] - times[1], score(x, t)
                mean, width = getattr(sde, predictor)(x, s, bcast(t, x), h)
                x = mean + width * torch.randn_like(x)
            t = x.new_full((len(x),), time)
            x = impute(x, t)
            for _ in range(correctors):  # Alg. 1, l. 4
                x = impute(langevin(x, t, score, sde, snr), t)  # Alg. 1, l. 5
            trace.append(x)
        x = impute(tweedie(x, t, score, sde), torch.zeros_like(t))
    return x, steps * ((predictor != "none") + correctors) + 1


# ---- The probability flow ODE (Sec. 4.3, App. D) -------------------------------------------------


def flow_field(score, sde):
    """The field v(x, t) whose flow has the marginals of the SDE."""
    return lambda x, t: sde.drift(x, bcast(t, x)) - sde.g2(bcast(t, x)) / 2 * score(x, t)  # Eq. 13


def follow(score, sde, x, times, **solver):
    """The flow of x (B, ...) from times[0], and the evaluations; arguments as odeint's: App. D.4.

    From (eps, 1) it encodes data, from (1, eps) it decodes latent codes, such as p_1's samples.
    """
    with torch.no_grad():
        return common.odeint(flow_field(score, sde), x, times, **solver)  # App. D.4


def slerp(x, y, weights):
    """Spherical interpolation of codes x, y (...) at weights (K,) in [0, 1] -> (K, ...): Fig. 6."""
    angle = torch.arccos((x * y).sum() / (x.norm() * y.norm()))
    w = bcast(weights, x[None])
    return (torch.sin((1 - w) * angle) * x + torch.sin(w * angle) * y) / torch.sin(angle)  # Fig. 6


def log_prob(score, sde, x_0, divergence="exact", **solver):
    """log p_0(x_0) in nats, (B, ...) -> (B,), and the evaluations: exact, or unbiased by a probe.

    It is log p_1(x_1) plus the integral of div v along the ODE from t = eps to 1: Eq. 39.
    """
    z = None if divergence == "exact" else common.hutchinson_probe(x_0, divergence)  # Eq. 40
    prior, v, times = sde.prior_log_prob, flow_field(score, sde), (sde.eps, 1.0)
    with torch.no_grad():
        log_p, _, nfe = common.log_likelihood(v, x_0, prior, times, z=z, **solver)  # Eq. 39
    return log_p, nfe


# ---- Controllable generation (Sec. 5, App. I) ----------------------------------------------------


def class_score(score, classifier, y):
    """The score of p_t(x | y), y (B,), by a classifier's logits of p_t(y | x): (x, t) -> (B, K)."""

    def conditional(x, t):
        with torch.enable_grad():
            x_t = x.detach().requires_grad_()
            log_p = classifier(x_t, t).log_softmax(dim=1).gather(1, y[:, None])
            (gradient,) = torch.autograd.grad(log_p.sum(), x_t)
        return score(x, t) + gradient  # Eq. 49

    return conditional


def imputation(y, known, sde, into=None, back=None):
    """A function (x, t) that replaces the known part of x by a sample of p_0t(. | y): App. I.2.

    y (B, ...) holds the known values where known (bool) is True. `into` and `back` rotate x to the
    space of y and known, and back.
    """
    into, back = into or (lambda x: x), back or (lambda x: x)

    def impute(x, t):
        y_t = perturb(y, torch.randn_like(y), t, sde)  # App. I.2
        return back(torch.where(known, y_t, into(x)))

    return impute


def decouple(x, inverse=False):
    """Rotate the colours of x (B, 3, H, W): the first channel becomes sqrt(3) times grey."""
    M = torch.tensor([[2, -(8**0.5), 0], [2, 2**0.5, 6**0.5], [2, 2**0.5, -(6**0.5)]]).to(x)
    M = M / math.sqrt(12)  # App. I.3
    return torch.einsum("bihw,ij->bjhw", x, M.T if inverse else M)


def colorization(x, sde):
    """The imputation of the colours of x (B, 3, H, W), of which only the grey values are used."""
    y = decouple(x)
    known = torch.arange(3, device=x.device)[:, None, None] == 0
    return imputation(y, known, sde, decouple, lambda x: decouple(x, inverse=True))  # App. I.3


class Classifier(nn.Module):
    """p_t(y | x) of images, f(x, t), (B, C, H, W) -> logits (B, K); t shifts the channels."""

    def __init__(self, channels, num_classes, size, width):
        super().__init__()
        self.widths = [width, 2 * width, 2 * width]
        self.time = nn.Linear(width, sum(self.widths))
        layers = zip([channels, *self.widths], self.widths, (5, 3, 3), (2, 2, 1), strict=False)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, k, step, k // 2) for a, b, k, step in layers)
        self.norms = nn.ModuleList(common.group_norm(w) for w in self.widths)
        self.output = nn.Linear(2 * width * math.ceil(size / 4) ** 2, num_classes)

    def forward(self, x, t):
        shifts = self.time(common.time_embedding(t, self.widths[0], 30))[:, :, None, None]
        shifts = shifts.split(self.widths, dim=1)
        for conv, norm, shift in zip(self.convs, self.norms, shifts, strict=True):
            x = F.silu(norm(conv(x)) + shift)
        return self.output(x.flatten(1))


# ---- Training -----------------------------------------------------------------------------------


def train(cfg, run, data, sde):
    """Regress s(x_t, t) on grad log p_0t(x_t | x_0): Sec. 3.3."""
    score = score_model(run.model, sde, cfg.score)
    for x_0, _ in run.batches(data):
        if data.is_image:
            x_0 = common.dequantize(x_0)
        z = torch.randn_like(x_0)  # (B, ...)
        t = draw_times(len(x_0), sde, cfg.levels, x_0.device)  # (B,)
        run.step(dsm_loss(score, x_0, z, t, sde, cfg.weighting))  # Eq. 7


def train_classifier(run, data, sde):
    """Cross-entropy of p_t(y | x_t) at t ~ U(eps, 1): App. I.1."""
    classifier = scaled(run.model, sde)
    for x_0, y in run.batches(data):
        if data.is_image:
            x_0 = common.dequantize(x_0)
        t = draw_times(len(x_0), sde, device=x_0.device)
        x_t = perturb(x_0, torch.randn_like(x_0), t, sde)
        run.step(F.cross_entropy(classifier(x_t, t), y))  # App. I.1


def prepare(cfg, data, device):
    """The run of the score's network, and the SDE."""
    if cfg.sde == "ve":
        sde = VE(cfg.sigma_min, cfg.sigma_max)
    else:
        sde = {"vp": VP, "subvp": SubVP}[cfg.sde](cfg.beta_min, cfg.beta_max)
    return common.Run(cfg, common.network(cfg, data), device, optimizer=cfg.optimizer), sde


def prepare_classifier(cfg, data, device):
    """The run of the classifier; None without classes."""
    if cfg.classifier_steps == 0 or data.num_classes < 2:
        return None
    if data.is_image:
        net = Classifier(data.shape[0], data.num_classes, data.shape[1], cfg.width)
    else:
        net = common.MLP(data.shape[0], data.num_classes, cfg.width, cfg.blocks)
    beside = os.path.join(os.path.dirname(cfg.sample or ""), "checkpoint-classifier.pt")
    if cfg.sample and not os.path.exists(beside):
        return None  # the run has not come to it
    run = common.Run(cfg, net, device, stage="classifier")
    run.cfg = dataclasses.replace(cfg, steps=cfg.classifier_steps)
    return run


def check(cfg, data):
    """Refuse settings that do not go together."""
    if cfg.sigma_max <= cfg.sigma_min:
        raise UserError(f"--sigma-max {cfg.sigma_max} must exceed --sigma-min {cfg.sigma_min}")
    if cfg.beta_max < cfg.beta_min:
        raise UserError(f"--beta-max {cfg.beta_max} is below --beta-min {cfg.beta_min}")
    least = math.floor(cfg.beta_max + 1) * (4 if cfg.compare else 1)
    discrete = cfg.sde == "vp" and cfg.predictor not in ("euler_maruyama", "none")
    if (discrete or cfg.compare) and cfg.sampler_steps < least:
        raise UserError(f"--sampler-steps {cfg.sampler_steps}: VP's beta_i need {least} or more")
    if (cfg.sde, cfg.predictor) == ("subvp", "ancestral"):
        raise UserError("--predictor ancestral is not defined for --sde subvp: choose another")
    if cfg.predictor == "none" and cfg.corrector_steps == 0:
        raise UserError("--predictor none leaves the sampling to --corrector-steps: 1 or more")
    if cfg.compare and data.is_image:
        raise UserError("--compare is made for 2-D data: choose a --dataset such as checkerboard")
    if cfg.compare and (cfg.resume or cfg.sample or cfg.num_samples or "RANK" in os.environ):
        raise UserError("--compare trains anew, in one process, and writes no samples")


# ---- Evaluation ---------------------------------------------------------------------------------
# sample(x_1, y=None, **options) is the PC sampler, by class where y is given; flow(x, *times) is
# the ODE. Both return the samples and the evaluations.


def evaluate_vectors(cfg, run, data, sde, score, sample, flow, with_classes):
    """2-D data: likelihood against the entropy; both samplers and their paths; conditioning."""
    x_1, test, trace = sde.prior(10_000, 2, device=run.device), data.test[:10_000], []
    solver = {"rtol": cfg.tol, "atol": cfg.tol}
    if cfg.nll_examples:
        x_0 = data.test[: cfg.nll_examples]
        log_p, nfe = log_prob(score, sde, x_0, cfg.divergence, **solver)
        figures = {"nll": -log_p.mean().item(), "standard_error": common.standard_error(log_p)}
        if data.entropy is not None:
            figures |= {"entropy": data.entropy, "gap": figures["nll"] - data.entropy}
        run.report("test", **figures, nll_evaluations=nfe)
    (by_sde, nfe_sde), (by_ode, nfe_ode) = sample(x_1, trace=trace), flow(x_1, 1, sde.eps_sample)
    sets = {"pc": by_sde, "ode": by_ode, "data": data.train[:10_000]}
    far = {f"energy_distance_{k}": common.energy_distance(x, test) for k, x in sets.items()}
    run.report("samples", **far, pc_evaluations=nfe_sde, ode_evaluations=nfe_ode)
    clouds = {"data": test, "reverse SDE, PC": by_sde, "probability flow ODE": by_ode}
    if with_classes:
        y = torch.arange(3_000, device=run.device) % (data.num_classes // 2)
        clouds["half of the classes"] = x = sample(x_1[: len(y)], y)[0]
        run.report("classes", samples_near_their_class=agreement(x, y, data))
    bound = 1.3 * test.abs().max().item()
    y = (torch.arange(3_000, device=run.device) % 6 - 2.5) * (bound / 4)  # six values
    impute = imputation(y[:, None], torch.tensor([True, False], device=run.device), sde)
    clouds["given one of six abscissae"], _ = sample(x_1[: len(y)], impute=impute)
    panels = [(title, common.density_image(x, bound, bins=64)) for title, x in clouds.items()]
    side = (torch.arange(64, device=run.device) + 0.5) * (2 * bound / 64) - bound
    density, _ = log_prob(score, sde, torch.cartesian_prod(side, side), **solver)
    panels.append(("the ODE's exact density", common.heat_image(density.exp().view(64, 64).cpu())))
    times = torch.linspace(1, sde.eps_sample, len(trace))
    sizes = torch.stack(sde.kernel(times)).norm(dim=0)[:, None]  # sqrt(a² + std²)
    by_ode, _ = follow(score, sde, x_1[:12], times, method="rk4", steps=1)
    for title, x in (("SDE", torch.stack(trace)[:, :12]), ("ODE, same starts", by_ode)):
        curves = (x[..., 0].cpu() / sizes).T
        lines = [("line", torch.stack([1 - times, x], 1), "#3c50a8", 1) for x in curves]
        panels.append((f"abscissa, t = 1 to 0: {title}", common.chart(lines, (0, 1, -3, 3))))
    common.save_panels(run.folder / "samples.png", panels[:4], panels[4:])


def agreement(x, y, data):
    """How many of x (N, ...) have their nearest neighbour in the test set in their class y (N,)."""
    others = common.to_float(data.test[:10_000]).flatten(1)
    nearest = torch.cdist(x.flatten(1), others).argmin(dim=1)
    return (data.test_labels[nearest] == y).float().mean().item()


def evaluate_images(cfg, run, data, sde, score, sample, flow, with_classes):
    """Images: samples, by class, completed, coloured, interpolated; bits per dimension."""
    truth, x_1 = common.to_float(data.test[:10]), sde.prior(40, *data.shape, device=run.device)
    (by_sde, nfe_sde), (by_ode, nfe_ode) = sample(x_1), flow(x_1, 1, sde.eps_sample)
    run.report("samples", pc_evaluations=nfe_sde, ode_evaluations=nfe_ode)
    panels = [("reverse SDE", by_sde), ("probability flow ODE", by_ode)]
    if with_classes:
        y = torch.arange(40, device=run.device) // 4 % data.num_classes
        panels.append(("a class a row", sample(x_1, y)[0]))
        run.report("classes", samples_near_their_class=agreement(panels[-1][1], y, data))

    def complete(title, given, impute):
        """Rows of an image, its given part and two completions."""
        x, _ = sample(x_1[: 2 * len(truth)], impute=impute)
        panels.append((title, torch.stack([truth, given, x[::2], x[1::2]], dim=1).flatten(0, 1)))

    twice = truth.repeat_interleave(2, dim=0)
    left = torch.arange(data.shape[2], device=run.device) < data.shape[2] // 2
    complete("left half given", truth.where(left, -1.0), imputation(twice, left, sde))
    if data.shape[0] == 3:
        grey = truth.mean(dim=1, keepdim=True).expand_as(truth)
        complete("grey given", grey, colorization(twice, sde))
    weights = torch.linspace(0, 1, 10, device=run.device)
    between = [slerp(x_1[i], x_1[i + 2], weights) for i in (0, 1)]
    cooled = [bcast(1 - weights, x_1) * x_1[i] for i in (0, 1)]  # temperature, Fig. 6
    codes = torch.stack([*between, *cooled], dim=1).flatten(0, 1)
    panels.append(("interpolated; cooled", flow(codes, 1, sde.eps_sample)[0]))
    common.save_panels(run.folder / "samples.png", [(title, tile(x)) for title, x in panels])

    test, solver, log_ps = data.test[: cfg.nll_examples], {"rtol": cfg.tol, "atol": cfg.tol}, []
    for x in common.to_float(test).split(64) if len(test) else ():
        draws = [common.dequantize(x) for _ in range(cfg.nll_repeats)]
        log_p = [log_prob(score, sde, x, cfg.divergence, **solver)[0] for x in draws]
        log_ps.append(torch.stack(log_p).mean(0))  # App. D.2
    if log_ps:
        bpd = common.bits_per_dim(torch.cat(log_ps), math.prod(data.shape))
        figures = {"bits_per_dim": bpd.mean().item(), "standard_error": common.standard_error(bpd)}
        baseline = independent_pixels(data.train, test)
        run.report("test", **figures, examples=len(bpd), independent_pixels=baseline)


def tile(x):
    """Images (40, C, H, W) -> one of ten rows, uint8 (3, height, width), small ones enlarged."""
    return common.image_grid(x, 4, scale=max(1, 64 // x.shape[-1]))


def independent_pixels(train, test):
    """Bits per dimension of uint8 test images if each pixel had its own histogram (add-one)."""
    counts = torch.ones(256, train[0].numel(), device=train.device)
    for x in train.flatten(1).split(4_096):
        counts.scatter_add_(0, x.long(), torch.ones_like(x, dtype=counts.dtype))
    bits = torch.log2((len(train) + 256) / counts)
    return bits.gather(0, test.flatten(1).long()).mean().item()


def compare(cfg, data, device):
    """On 2-D data, after Table 1: every SDE's samplers at equal numbers of evaluations, M corrector
    steps after each predictor step; and App. D.5, for sub-VP: codes by two networks, one of half
    the width (the paper: VE, half the depth)."""
    budgets = cfg.sampler_steps // 2, cfg.sampler_steps, 2 * cfg.sampler_steps
    test, table = data.test[:10_000], []

    def trained(name, width):
        out = common.free_folder(f"{cfg.out}/{name}-{width}")
        here = dataclasses.replace(cfg, compare=False, sde=name, width=width, out=out)
        run, sde = prepare(here, data, device)
        run.say(f"training with the {name} SDE, width {width}")
        train(here, run, data, sde)
        return score_model(run.ema, sde, cfg.score), sde

    for name in ("ve", "vp", "subvp"):  # the last one's codes are compared below
        score, sde = trained(name, cfg.width)
        x_1 = sde.prior(5_000, 2, device=device)
        for predictor, M in [*itertools.product(PREDICTORS, (0, 1)), ("none", 2)]:
            if (name, predictor) == ("subvp", "ancestral"):
                continue
            row = f"{name:6}{predictor:18}{M:2}"
            for nfe in budgets:
                steps = nfe // ((predictor != "none") + M)
                x, _ = pc_sample(score, sde, x_1, steps, predictor, M, cfg.snr)
                row += f"{1e3 * common.energy_distance(x, test):8.2f}"
            table.append(row)  # Table 1
        for tol in (1e-2, 1e-3, 1e-5):
            x, nfe = follow(score, sde, x_1, (1, sde.eps_sample), rtol=tol, atol=tol)
            distance = 1e3 * common.energy_distance(x, test)
            table.append(f"{name:6}ODE, tolerance {tol:.0e}{distance:8.2f} ({nfe} evaluations)")
    scores = score, trained("subvp", math.ceil(cfg.width / 2))[0]
    solver = {"rtol": cfg.tol, "atol": cfg.tol}
    a, b = (follow(s, sde, test[:2_000], (sde.eps, 1), **solver)[0] for s in scores)  # App. D.5
    apart, shuffled = ((a - c).square().mean().sqrt().item() for c in (b, b.roll(1, 0)))
    print("1000 times the energy distance of 5000 samples to 10000 points of the data")
    print(f"{'SDE':6}{'predictor':19}M" + "".join(f"{n:8}" for n in budgets), *table, sep="\n")
    print(f"{'data':26}{1e3 * common.energy_distance(data.train[:5_000], test):8.2f}")
    print(f"codes of two networks: {apart:.3f} apart, {shuffled:.3f} if shuffled")


def main(cfg):
    device = common.setup(cfg)
    data = common.load_data(cfg, device)
    check(cfg, data)
    if cfg.compare:
        compare(cfg, data, device)
        return
    run, sde = prepare(cfg, data, device)
    if not cfg.sample:
        train(cfg, run, data, sde)
    classes = prepare_classifier(cfg, data, device)
    if classes and not cfg.sample:
        train_classifier(classes, data, sde)
    if not run.finish():
        return
    score = score_model(run.ema, sde, cfg.score)

    def sample(x_1, y=None, **options):
        s = score if y is None else class_score(score, scaled(classes.ema, sde), y)
        M, r = cfg.corrector_steps, cfg.snr
        return pc_sample(s, sde, x_1, cfg.sampler_steps, cfg.predictor, M, r, **options)

    def flow(x, *times):
        return follow(score, sde, x, times, rtol=cfg.tol, atol=cfg.tol)

    x_0 = common.to_float(data.test[:10])
    x = flow(flow(x_0, sde.eps, 1)[0], 1, sde.eps)[0]
    run.report("codes", round_trip_error=(x - x_0).square().mean().sqrt().item())  # App. D.4
    evaluate = evaluate_images if data.is_image else evaluate_vectors
    evaluate(cfg, run, data, sde, score, sample, flow, classes is not None)
    if cfg.num_samples:
        run.write_samples(lambda n: sample(sde.prior(n, *data.shape, device=device))[0])
    run.say(f"see {run.folder / 'samples.png'}")


if __name__ == "__main__":
    common.cli(main, Config, PRESETS)
