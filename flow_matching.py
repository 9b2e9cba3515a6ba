"""Flow Matching for Generative Modeling. Lipman, Chen, Ben-Hamu, Nickel, Le, arXiv 2210.02747v2

Implements  Eq. 1 (flow); Eq. 5, Theorem 2 (FM loss); Eq. 6, Eq. 8 (path and field of finite data);
            Eq. 9, Eq. 10, Eq. 11, Eq. 14, Eq. 15, Theorem 3 (Gaussian paths, CFM loss); Eq. 16,
            Eq. 17 (VE); Eq. 18, Eq. 19 (VP); Eq. 20, Eq. 21, Eq. 22, Eq. 23 (OT); Eq. 31, Eq. 33,
            Eq. 34 (likelihood); Eq. 36, Eq. 37 (bits per dimension); App. E.1, Eq. 42, Eq. 45,
            Eq. 46 (score matching, ScoreFlow, DDPM); Table 3 (CIFAR-10); Eq. 47, Table 4 (K-sample
            NLL); Fig. 4 (picture); Sec. 6.2, Fig. 7 (error of few evaluations); Sec. 6.3, Table 2
            (super-resolution, PSNR)
Conventions t = 0 is noise, x_0 ~ N(0, I); t = 1 is data, x_1 ~ q. A field is v(x, t).
Departures  1. Eq. 43's target and s = eps / sigma_t lack their minus in print; Eq. 42 and Eq. 46
               have it. Here s = grad log p = -eps / sigma_t, so u = T'(1-t)/2 [x + s].
            2. VE: the paper asks sigma_0 = 0, sigma_1 >> 1; here 0.01 to 10, geometric. The target
               spans three orders, so the network's input and output are scaled, the loss weighted.
            3. Not stated: sigma_min (1e-4 here), EMA, clipping, flips, how images are shrunk
               (bicubic). On GPUs float32 products are TF32.
            4. In 2-D a residual MLP with Fourier features, not 5 layers of 512 units.
            5. How v_t sees the low-resolution image is not stated: as further channels.
            6. Training, too, is on dequantised images. 391k steps are Table 3's, not 1000 epochs;
               of its 4 heads and 64 channels a head, the latter. t is embedded up to 30 radians.
            7. Small images: Muon trains the kernels of a U-Net that sees patches of 2 x 2 pixels
               and the class y, as v_t(x | y); log p(x, y) then bounds log p(x) from below. Before
               t = 0.4 the loss is FM's where u_t of the training images is cheap: by Theorem 2 only
               the gradient's variance differs. CIFAR-10's model sees no class, like the paper's.
            8. A second grid of images starts from 0.8 x_0 (Glow, 2018): fewer faults, less variety.
Run         python flow_matching.py                                checkerboard
            python flow_matching.py --dataset mnist                digits
            python flow_matching.py --compare                      evaluations against error
            python flow_matching.py --dataset mnist --upsample 4   super-resolution
            torchrun --nproc_per_node 2 flow_matching.py --dataset cifar10   Table 3; not run here
"""

import dataclasses
import functools
import math
import os
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

import common
from common import Count, Natural, Positive, Sizes, UserError, bcast


@dataclass
class Config(common.Config):
    steps: Natural = 12_000  # optimisation steps
    batch_size: Count = 512  # examples per step, over all processes together
    lr: Positive = 4e-3  # peak learning rate of Adam
    optimizer: Literal["adam", "muon"] = "adam"  # muon: for the kernels of convolutions
    path: Literal["ot", "vp", "ve"] = "ot"  # conditional probability path (Sec. 4.1)
    objective: Literal["cfm", "sm", "sf", "ddpm"] = "cfm"  # CFM, or a VP baseline of App. E.1
    sigma_min: Positive = 1e-4  # OT path: width at t = 1; not stated in the paper
    solver: Literal["euler", "midpoint", "heun", "rk4", "dopri5"] = "dopri5"  # sampler (Sec. 6)
    nfe: Count = 100  # evaluations of a fixed-step solver
    temperature: Positive = 1.0  # deviation of x_0 in --num-samples: Departure 8
    tol: Positive = 1e-5  # atol = rtol of dopri5, in sampling and likelihood (Sec. 6)
    nll_examples: Natural = 10_000  # held-out examples whose likelihood is computed
    nll_samples: Count = 1  # K dequantisations per image (Table 4: 1, 20, 50; Table 1: 50)
    divergence: Literal["exact", "rademacher", "gaussian"] = "exact"  # exact, or Eq. 34's probe z
    class_conditional: bool = False  # v_t(x | y) sees an example's class; not with --upsample
    fm_until: common.Fraction = 0.0  # t before which images' CFM loss is FM's; not with --upsample
    upsample: Count = 1  # super-resolution by this factor (Sec. 6.3); 1 = none
    compare: bool = False  # train every path and loss, print evaluations against error (Sec. 6.2)
    width: Count = 128  # units of the MLP, or base channels of the U-Net
    blocks: Count = 2  # residual blocks, of the MLP or of each level of the U-Net
    mult: Sizes = (1, 2, 2, 2)  # channel multiple of each level of the U-Net
    attention: Sizes | None = (16,)  # resolutions with attention, but for the middle block
    patch: Count = 1  # side of the patches of pixels that the U-Net sees as channels
    dropout: common.Fraction = 0.0  # of the U-Net

    learned = ("optimizer", "class_conditional", "path", "objective", "sigma_min", "upsample")


# fmt: off
SMALL_IMAGES = common.SMALL_UNET | {  # minutes on two cores
    "steps": 3_000, "batch_size": 64, "attention": (7, 8), "tol": 1e-4, "nll_examples": 128,
    "divergence": "rademacher", "class_conditional": True,
    "fm_until": 0.4,  # soon after, OT's posterior of x_1 is one image
}
PRESETS = dict.fromkeys(("glyphs", "mnist", "fashion_mnist"), SMALL_IMAGES) | {
    "folder": SMALL_IMAGES | {"fm_until": 0.0},  # its sum over the images may be long
    "cifar10": {  # Table 3, App. E.2; the channels' multiples and attention are the defaults
        "steps": 391_000, "batch_size": 256, "lr": 5e-4, "warmup": 45_000, "decay": "linear",
        "width": 256, "divergence": "rademacher",
        "ema": 0.9999, "flip": True,  # not mentioned in the paper
    },
}
# fmt: on


# ---- Conditional probability paths (Sec. 4) -----------------------------------------------------


class Path:
    """p_t(x | x_1) = N(x | mu_t(x_1), sigma_t² I), Eq. 10, with mu_t(x_1) = a_t x_1.

    A subclass gives `coefficients(t)`: a_t, sigma_t and their time derivatives, of t's shape.
    x, x_0, x_1 are (B, ...), t is (B,) in [0, t_max].
    """

    sigma_0 = 1.0  # the prior is N(0, sigma_0² I)
    t_max = 1.0

    def coefficients(self, t):
        raise TypeError("choose OT, VP or VE")

    def psi(self, x_0, x_1, t):
        """The conditional flow: noise x_0 ~ N(0, I) to a point of p_t(. | x_1)."""
        a, sigma, _, _ = self.coefficients(bcast(t, x_1))
        return sigma * x_0 + a * x_1  # Eq. 11

    def dpsi(self, x_0, x_1, t):
        """d psi_t(x_0) / dt, the regression target; never divides by sigma_t."""
        _, _, da, dsigma = self.coefficients(bcast(t, x_1))
        return dsigma * x_0 + da * x_1  # Eq. 14

    def u(self, x, x_1, t):
        """The conditional field u_t(x | x_1) that generates p_t(. | x_1)."""
        a, sigma, da, dsigma = self.coefficients(bcast(t, x))
        return dsigma / sigma * (x - a * x_1) + da * x_1  # Eq. 15, Theorem 3

    def field(self, net):
        """The field v(x, t) that a network stands for."""
        return net

    def weight(self, t):
        """The weight of time t in the CFM loss."""
        return torch.ones_like(t)


class OT(Path):
    """Optimal-transport displacement, Example II: straight lines at constant speed."""

    def __init__(self, sigma_min=1e-4):
        self.sigma_min = sigma_min

    def coefficients(self, t):
        shrink = 1 - self.sigma_min
        one = torch.ones_like(t)
        return t, 1 - shrink * t, one, -shrink * one  # Eq. 20, so psi is Eq. 22

    def u(self, x, x_1, t):
        shrink = 1 - self.sigma_min
        return (x_1 - shrink * x) / (1 - shrink * bcast(t, x))  # Eq. 21


class VP(Path):
    """Variance-preserving diffusion run backwards, Example I; T and beta as in App. E.1."""

    t_max = 1 - 1e-5  # App. E.1; at t = 1 the field is infinite
    beta_min, beta_max = 0.1, 20.0  # App. E.1

    def beta(self, s):
        return self.beta_min + s * (self.beta_max - self.beta_min)  # T'(s)

    def T(self, s):
        return s * self.beta_min + s**2 / 2 * (self.beta_max - self.beta_min)

    def coefficients(self, t):
        s = 1 - t
        alpha = torch.exp(-self.T(s) / 2)
        sigma = torch.sqrt(-torch.expm1(-self.T(s)))  # Eq. 18: sqrt(1 - alpha²), without cancelling
        return alpha, sigma, self.beta(s) / 2 * alpha, -self.beta(s) / 2 * alpha**2 / sigma

    def u(self, x, x_1, t):
        s = 1 - bcast(t, x)
        e = torch.exp(-self.T(s) / 2)
        return -self.beta(s) / 2 * (e**2 * x - e * x_1) / -torch.expm1(-self.T(s))  # Eq. 19


class VE(Path):
    """Variance-exploding diffusion run backwards, Example I, with a geometric sigma_s."""

    sigma_small, sigma_large = 0.01, 10.0  # sigma_s at s = 0 and s = 1; Departure 2
    sigma_0 = sigma_large

    def coefficients(self, t):
        sigma = self.sigma_small * (self.sigma_large / self.sigma_small) ** (1 - t)
        rate = math.log(self.sigma_large / self.sigma_small)
        return torch.ones_like(t), sigma, torch.zeros_like(t), -rate * sigma  # Eq. 16

    def u(self, x, x_1, t):
        _, sigma, _, dsigma = self.coefficients(bcast(t, x))
        return dsigma / sigma * (x - x_1)  # Eq. 17: d/dt sigma_{1-t} = -sigma'_{1-t}

    def field(self, net):
        def v(x, t):
            _, sigma, _, dsigma = self.coefficients(bcast(t, x))
            return dsigma * net(x / torch.sqrt(1 + sigma**2), t)

        return v

    def weight(self, t):
        return self.coefficients(t)[3] ** -2  # the network regresses on x_0: Departure 2


PATHS = {"ot": OT, "vp": VP, "ve": VE}


class FiniteData:
    """q uniform on the rows of data (N, D): its p_t and u_t, for x (B, D) and t (B,).

    Products with the data are taken in dtype; None is the data's own.
    """

    def __init__(self, data, path, dtype=None):
        self.center, self.path = data.mean(dim=0), path  # near 0, products lose fewer digits
        data = data - self.center
        self.data, self.norm = data.to(dtype or data.dtype), data.square().sum(dim=1)

    def log_prob(self, x, t):
        """log p_t(x) in nats, (B,)."""
        return self.log_joint(x, t).logsumexp(dim=1)  # Eq. 6

    def field(self, x, t):
        """u_t(x), (B, D)."""
        weights = self.log_joint(x, t).softmax(dim=1)  # p_t(x | x_1) q(x_1) / p_t(x), (B, N)
        mean = self.center + (weights.to(self.data.dtype) @ self.data).to(x.dtype)
        return self.path.u(x, mean, t)  # Eq. 8, as u_t(x | x_1) is affine in x_1

    def log_joint(self, x, t):
        """log p_t(x | x_1) + log q(x_1) for every x_1 in data, (B, N)."""
        a, sigma, _, _ = self.path.coefficients(t[:, None])
        x = x - a * self.center
        product = (self.data @ x.T.to(self.data.dtype)).T.to(x.dtype)
        distance = x.square().sum(dim=1, keepdim=True) - 2 * a * product + a**2 * self.norm
        log_normal = -distance / (2 * sigma**2) - x.shape[1] / 2 * torch.log(2 * math.pi * sigma**2)
        return log_normal - math.log(len(self.data))


# ---- Losses -------------------------------------------------------------------------------------
# Each takes what the network stands for, x_0 ~ N(0, I) and x_1 ~ q of shape (B, ...), t (B,), and
# returns the mean over the batch and the dimensions, where the paper sums over the dimensions.


def cfm_loss(v, x_0, x_1, t, path, u=None):
    """Conditional flow matching for a vector field v; u takes the place of x_1's own target."""
    u = path.dpsi(x_0, x_1, t) if u is None else u
    error = v(path.psi(x_0, x_1, t), t) - u  # Eq. 14; the OT path's is Eq. 23
    return (bcast(path.weight(t), x_1) * error.square()).mean()  # Eq. 9


def fm_target(x_0, x_1, t, y, path, fields, until):
    """The target of cfm_loss, with the known marginal field where t < until: the FM loss, Eq. 5.

    fields[y] is the field u_t(x | y) of x (B, D). By Theorem 2 the expected gradient is CFM's, but
    the target's variance given x is gone.
    """
    x, u = path.psi(x_0, x_1, t), path.dpsi(x_0, x_1, t)
    for c, field in enumerate(fields):
        known = ((t < until) & (y == c)).nonzero()[:, 0]
        if len(known):
            u[known] = field(x[known].flatten(1), t[known]).view_as(u[known])
    return u


def sm_loss(s, x_0, x_1, t, path):
    """Score matching with lambda(t) = sigma_t², for a score s; its target is -x_0 / sigma_t."""
    _, sigma, _, _ = path.coefficients(bcast(t, x_1))
    return (sigma * s(path.psi(x_0, x_1, t), t) + x_0).square().mean()  # Eq. 42


def sf_loss(s, x_0, x_1, t, path):
    """Score matching with lambda(t) = beta(1 - t), for a score s."""
    _, sigma, _, _ = path.coefficients(bcast(t, x_1))
    error = s(path.psi(x_0, x_1, t), t) + x_0 / sigma
    return (path.beta(1 - bcast(t, x_1)) * error.square()).mean()  # App. E.1, ScoreFlow


def ddpm_loss(eps, x_0, x_1, t, path):
    """Noise matching, for a noise predictor eps."""
    return (eps(path.psi(x_0, x_1, t), t) - x_0).square().mean()  # Eq. 45


LOSSES = {"cfm": cfm_loss, "sm": sm_loss, "sf": sf_loss, "ddpm": ddpm_loss}


def score_field(s, path):
    """The VP field of a score s."""
    return lambda x, t: path.beta(1 - bcast(t, x)) / 2 * (x + s(x, t))  # Eq. 46, Departure 1


def vector_field(net, path, objective):
    """The field v(x, t) of Eq. 1 from a network trained with an objective."""
    if objective == "cfm":
        return path.field(net)
    if objective == "ddpm":  # App. E.1, Departure 1: s = -eps / sigma_t
        return score_field(lambda x, t: -net(x, t) / path.coefficients(bcast(t, x))[1], path)
    return score_field(net, path)


# ---- Sampling and likelihood --------------------------------------------------------------------


def sample(v, x_0, path, times=None, **solver):
    """Flow prior noise x_0 ~ N(0, I), (B, ...), to data. Returns (x_1, evaluations)."""
    times = (0.0, path.t_max) if times is None else times
    with torch.no_grad():
        return common.odeint(v, path.sigma_0 * x_0, times, **solver)  # Eq. 1


def log_prob(v, x_1, path, z=None, **solver):
    """log p_1(x_1) in nats, (B, ...) -> (B,), and the evaluations. Exact; unbiased with a probe z.

    Eq. 31 run from t = 1 to 0 gives x_0 and f(0), and log p_1(x_1) = log p_0(x_0) - f(0)  (Eq. 33).
    """

    def log_p_0(x):
        scaled = common.standard_normal_log_prob(x / path.sigma_0)
        return scaled - x[0].numel() * math.log(path.sigma_0)

    times = (path.t_max, 0.0)
    with torch.no_grad():  # Eq. 31, Eq. 33, with Eq. 34's divergence if there is a z
        log_p, _, nfe = common.log_likelihood(v, x_1, log_p_0, times, z=z, **solver)
    return log_p, nfe


def probe(x, divergence):
    """z for log_prob: None for the exact divergence, else random, with E[z zᵀ] = I."""
    return None if divergence == "exact" else common.hutchinson_probe(x, divergence)  # Eq. 34


def k_sample_log_prob(log_p, x, k):
    """log 1/K sum_k p(x + u_k), u_k uniform on the bins of the 8-bit images x: Eq. 47, Table 4.

    log_p(x) -> (B,) is a density of continuous images; more samples give a tighter bound, if it is
    exact. An estimate of it must at least keep its probe: independent errors would raise the mean
    of the exponentials with K.
    """
    log_ps = torch.stack([log_p(common.dequantize(x)) for _ in range(k)])  # (K, B)
    return log_ps.logsumexp(dim=0) - math.log(k)


def low_resolution(x, factor):
    """x (B, C, H, W) at 1 / factor of its resolution, scaled up again (Sec. 6.3)."""
    small = F.interpolate(x, scale_factor=1 / factor, mode="bicubic", antialias=True)
    return F.interpolate(small, size=x.shape[2:], mode="bicubic")


def conditioned(net, y, low=None):
    """net's v_t(x | y, low) as a field: y (B,) are classes, for a net that sees them; low is
    Sec. 6.3's low-resolution image, as further channels."""
    return lambda x, t: net(x if low is None else torch.cat([x, low], dim=1), t, y)


def log_prob_class(y, data):
    """log p(y) in nats, (B,), from the training set's counts, and one for each class.

    What a model of classes gives is log p(x | y) + log p(y) = log p(x, y) <= log p(x).
    """
    counts = 1 + torch.bincount(data.train_labels, minlength=data.num_classes)
    return torch.log(counts / counts.sum())[y]


# ---- Training and evaluation --------------------------------------------------------------------


def train(cfg, run, data, path):
    """Regress v_t(psi_t(x_0)) on d psi_t(x_0) / dt: Sec. 3.2 and Sec. 4."""
    loss_of = LOSSES[cfg.objective]
    if cfg.fm_until:
        fields = training_fields(cfg, run, data, path)
        target = functools.partial(fm_target, path=path, fields=fields, until=cfg.fm_until)
    for x_1, y in run.batches(data):  # x_1 ~ q
        low = low_resolution(x_1, cfg.upsample) if cfg.upsample > 1 else None
        if data.is_image:
            x_1 = common.dequantize(x_1)
        x_0 = torch.randn_like(x_1)  # x_0 ~ N(0, I), (B, ...)
        t = path.t_max * torch.rand(len(x_1), device=x_1.device)  # t ~ U[0, t_max], (B,)
        net = conditioned(run.model, y, low)
        f = path.field(net) if cfg.objective == "cfm" else net
        if cfg.fm_until:
            y = y if cfg.class_conditional else torch.zeros_like(y)
            loss = cfm_loss(f, x_0, x_1, t, path, target(x_0, x_1, t, y))  # Eq. 5, 14
        else:
            loss = loss_of(f, x_0, x_1, t, path)  # Eq. 14, or Eq. 42, Eq. 45
        run.step(loss)


def training_fields(cfg, run, data, path):
    """The marginal field of the training images of every class, or of all as class 0.

    Dequantisation's noise, 1 / 128 wide, is left out: beside sigma_t it is nothing before t = 0.9.
    """
    y = data.train_labels if cfg.class_conditional else torch.zeros_like(data.train_labels)
    dtype = torch.bfloat16 if run.amp else None  # u: 0.006 off at t = 0.4
    fields = []
    for c in range(int(y.max()) + 1):
        x = common.to_float(data.train[y == c])
        x = torch.cat([x, x.flip(-1)]) if data.flip else x
        fields.append(FiniteData(x.flatten(1), path, dtype).field)
    return fields


def field(cfg, net, path, y, low=None):
    """The trained field v_t(x | y, low)."""
    return vector_field(conditioned(net, y, low), path, cfg.objective)


def evaluate_vectors(cfg, run, data, path):
    """2-D data: likelihood against the entropy, energy distance, and Fig. 4's picture."""
    test, y = data.test[: cfg.nll_examples], data.test_labels[: cfg.nll_examples]
    if len(test):
        v = field(cfg, run.ema, path, y)
        tolerances = {"rtol": cfg.tol, "atol": cfg.tol}
        log_p, nfe = log_prob(v, test, path, probe(test, cfg.divergence), **tolerances)
        if cfg.class_conditional:
            log_p = log_p + log_prob_class(y, data)
        figures = {"nll": -log_p.mean().item(), "standard_error": common.standard_error(log_p)}
        if data.entropy is not None:
            figures |= {"entropy": data.entropy, "gap": figures["nll"] - data.entropy}
        run.report("test", **figures, nll_evaluations=nfe)
    x_0 = torch.randn(50_000, *data.shape, device=run.device)
    y = data.draw_labels(len(x_0))
    x_1, nfe = sample(field(cfg, run.ema, path, y), x_0, path, **common.solver_options(cfg))
    distance = common.energy_distance(x_1[:5_000], data.test[:5_000])
    run.report("samples", energy_distance=distance, sampling_evaluations=nfe)
    bound = 1.3 * data.test[:10_000].abs().max().item()
    panels = [("data", common.density_image(data.test[:50_000], bound))]
    times = torch.linspace(0, path.t_max, 5)
    v = field(cfg, run.ema, path, y[:20_000])
    frames, _ = sample(v, x_0[:20_000], path, times[:-1], method="rk4", steps=5)  # (4, N, 2)
    for t, x_t in zip(times.tolist(), [*frames, x_1], strict=True):
        panels.append((f"t = {t:.2f}", common.density_image(x_t, bound)))
    v, times = field(cfg, run.ema, path, y[:300]), torch.linspace(0, path.t_max, 41)
    lines, _ = sample(v, x_0[:300], path, times, method="rk4", steps=5)
    panels.append(("paths", common.trajectory_image(lines, bound)))
    common.save_panels(run.folder / "samples.png", panels)


def evaluate_images(cfg, run, data, path):
    """Images: a grid of samples, test bits per dimension; for super-resolution also PSNR."""
    c, h, w = data.shape
    test, y = common.to_float(data.test[: max(64, cfg.nll_examples)]), data.test_labels
    low = low_resolution(test, cfg.upsample) if cfg.upsample > 1 else None
    shown = None if low is None else low[:16]
    x_0 = torch.randn(64 if low is None else len(shown), c, h, w, device=run.device)
    v = field(cfg, run.ema, path, data.draw_labels(64) if low is None else y[:16], shown)
    x, nfe = sample(v, x_0, path, **common.solver_options(cfg))
    run.report("samples", sampling_evaluations=nfe)
    if low is None:
        cool, _ = sample(v, 0.8 * x_0, path, **common.solver_options(cfg))  # Departure 8
        panels = {"samples": x, "the same noises times 0.8": cool}
        row = [(t, common.image_grid(x, 8, scale=max(1, 80 // w))) for t, x in panels.items()]
        common.save_panels(run.folder / "samples.png", row)
    else:
        run.report("samples", psnr=psnr(x, test[:16]), psnr_bicubic=psnr(shown, test[:16]))
        x = torch.stack([shown, x, test[:16]], dim=1).flatten(0, 1)
        common.save_images(run.folder / "samples.png", x, columns=6)

    log_ps = []
    for i in range(0, min(cfg.nll_examples, len(test)), 64):
        part = slice(i, min(i + 64, cfg.nll_examples))
        x_1, z = test[part], probe(test[part], cfg.divergence)
        v = field(cfg, run.ema, path, y[part], None if low is None else low[part])
        log_p = functools.partial(log_prob, v, path=path, z=z, rtol=cfg.tol, atol=cfg.tol)
        log_p = k_sample_log_prob(lambda x, f=log_p: f(x)[0], x_1, cfg.nll_samples)
        log_ps.append(log_p + log_prob_class(y[part], data) if cfg.class_conditional else log_p)
    if log_ps:
        bpd = common.bits_per_dim(torch.cat(log_ps), c * h * w)  # Eq. 36, Eq. 37
        figures = {"bits_per_dim": bpd.mean().item(), "standard_error": common.standard_error(bpd)}
        run.report("test", **figures, examples=len(bpd), dequantisations=cfg.nll_samples)


def psnr(x, reference):
    """Peak signal-to-noise ratio in dB of images in [-1, 1] (Sec. 6.3, Table 2)."""
    mse = (x.clamp(-1, 1) - reference).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / mse)).mean().item()


def draw(cfg, run, data, path, n):
    """n samples and their classes, as frequent as in the training set; None if v sees no class."""
    x_0 = cfg.temperature * torch.randn(n, *data.shape, device=run.device)
    y = data.draw_labels(n) if cfg.class_conditional else None
    x, _ = sample(field(cfg, run.ema, path, y), x_0, path, **common.solver_options(cfg))
    return x, y


def compare(cfg):
    """On 2-D data, the error of few midpoint evaluations against 1000: Fig. 7, left, which has the
    mean square and no VE path."""
    methods = [
        ("ot", "cfm"),
        ("vp", "cfm"),
        ("ve", "cfm"),
        ("vp", "sm"),
        ("vp", "sf"),
        ("vp", "ddpm"),
    ]
    budgets = [4, 8, 16, 32, 64, 100]
    rows = []
    for name, objective in methods:
        out = common.free_folder(f"{cfg.out}/{name}-{objective}")
        here = dataclasses.replace(cfg, compare=False, path=name, objective=objective, out=out)
        run, data, path = prepare(here)
        run.say(f"training {name} path, {objective} loss")
        train(here, run, data, path)
        v = vector_field(run.ema, path, objective)
        x_0 = torch.randn(256, *data.shape, device=run.device)  # Fig. 7: 256 seeds
        true, _ = sample(v, x_0, path, method="midpoint", steps=500)
        row = f"{name:>4} {objective:<5}"
        for nfe in budgets:
            x, _ = sample(v, x_0, path, method="midpoint", steps=nfe // 2)
            row += f"{(x - true).square().mean().sqrt().item():9.4f}"
        _, nfe = sample(v, x_0, path, rtol=cfg.tol, atol=cfg.tol)
        log_p, _ = log_prob(v, data.test[:2000], path, rtol=cfg.tol, atol=cfg.tol)
        rows.append(f"{row}{nfe:9d}{-log_p.mean().item():9.3f}")
    print("root mean square error of the midpoint rule against its 1000-evaluation solution")
    print("path loss " + "".join(f"{f'NFE {n}':>9}" for n in budgets) + "   dopri5      nll")
    print("\n".join(rows))


def prepare(cfg):
    device = common.setup(cfg)
    data = common.load_data(cfg, device)
    check(cfg, data)
    cfg.class_conditional = cfg.class_conditional and cfg.upsample == 1
    if cfg.upsample > 1 or cfg.objective != "cfm":
        cfg.fm_until = 0.0
    path = OT(cfg.sigma_min) if cfg.path == "ot" else PATHS[cfg.path]()
    inputs = data.shape[0] * (1 if cfg.upsample == 1 else 2)  # with the low-resolution channels
    classes = data.num_classes if cfg.class_conditional else 0
    net = common.network(cfg, data, in_channels=inputs, num_classes=classes)
    return common.Run(cfg, net, device, optimizer=cfg.optimizer), data, path


def check(cfg, data):
    """Refuse settings that do not go together."""
    if cfg.objective != "cfm" and cfg.path != "vp":
        raise UserError(f"--objective {cfg.objective} is a loss for the VP path: add --path vp")
    common.solver_options(cfg)
    if cfg.fm_until and not data.is_image:
        raise UserError("--fm-until is for images: it sums over the data, in 2-D a million points")
    if cfg.upsample > 1 and not (data.is_image and data.shape[1] % cfg.upsample == 0):
        raise UserError(f"--upsample {cfg.upsample} needs images whose side it divides")
    if cfg.upsample > 1 and cfg.num_samples:
        raise UserError("--num-samples writes samples from noise alone: not with --upsample")


def main(cfg):
    if cfg.compare:
        if cfg.resume or cfg.sample or cfg.num_samples or "RANK" in os.environ:
            raise UserError("--compare trains anew, in one process, and writes no samples")
        if cfg.dataset not in common.DENSITIES:
            raise UserError("--compare is made for 2-D data: --dataset checkerboard, or its like")
        if cfg.class_conditional:
            raise UserError("--compare is of unconditional models: leave out --class-conditional")
        if (cfg.path, cfg.objective) != ("ot", "cfm"):
            raise UserError("--compare trains every path and loss: leave out --path, --objective")
        compare(cfg)
        return
    run, data, path = prepare(cfg)
    if not cfg.sample:
        train(cfg, run, data, path)
    if not run.finish():
        return
    evaluate = evaluate_images if data.is_image else evaluate_vectors
    evaluate(cfg, run, data, path)
    if cfg.num_samples:
        run.write_samples(lambda n: draw(cfg, run, data, path, n))
    run.say(f"see {run.folder / 'samples.png'}")


if __name__ == "__main__":
    common.cli(main, Config, PRESETS)
