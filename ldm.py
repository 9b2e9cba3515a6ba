"""High-Resolution Image Synthesis with Latent Diffusion Models.
Rombach, Blattmann, Lorenz, Esser, Ommer, arXiv 2112.10752v2

Implements  Sec. 3.1, App. G (stage one: KL or VQ, perceptual, adversarial; z rescaled); Eq. 1,
            Eq. 2, Eq. 3 (stage two: of x, of z, of z given y); App. B (process and posterior);
            Sec. 3.3, Table 16 (spatial transformer); App. E.2.1 (tau); Sec. 4.1 (LDM-1);
            Sec. 4.3.2 (convolutional sampling); Sec. 4.4, App. E.3.4 (super-resolution); Sec. 4.5
            (inpainting); App. C, Fig. 14 (guiding by an image); [DDIM]; [classifier-free guidance]
Conventions t = 0 is the latent of data, z_0 = E(x) / sigma_hat; t = T is noise. z_t = alpha_t z_0 +
            sigma_t eps, alpha_t² + sigma_t² = 1. Networks take an integer t, 1 to T.
Departures  1. App. C prints eps + sigma_t grad log p. Since eps = -sigma_t score, it is a minus.
            2. LPIPS is a download: the default takes features of a classifier trained here (as
               it starts, if there is one class). `train_autoencoder` takes any metric, LPIPS too.
            3. E, D and the discriminator step together; its norm and Table 16's first are GroupNorm
               (official code's MLP is gated, and last). No attention in E, D (Table 8, the dagger).
            4. VQ latents are rescaled, too, though their deviation is near 1 (App. D.1).
            5. By default a class stands beside t, an option of official code: the paper's is token.
               Masks are boxes; captions are the labels spelled out. Left out: layouts, semantic
               maps and BSR; guiding by LPIPS and by a classifier; PLMS, a later paper.
            6. Ours: how often y is dropped; sampling times T i / S. Marked: official code.
Run         python ldm.py [--dataset mnist]                  digits by class, through guidance
            python ldm.py --dataset mnist --condition inpainting --first-stage runs/ldm-mnist
            python ldm.py --dataset cifar10                  our preset; not run here
"""

import copy
import dataclasses
import functools
import itertools
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import nn

import common
from common import Count, Natural, Positive, Side, Sizes, UserError, bcast, group_norm, zeroed

Weight = Annotated[float, lambda v: 0 <= v < math.inf, "a number of at least 0"]
Condition = Literal["class", "token", "caption", "super-resolution", "inpainting", "none"]
Rate = Annotated[float, lambda v: 0 < v < 1, "a number between 0 and 1"]
Share = Annotated[float, lambda v: 0 <= v <= 1, "a number in [0, 1]"]


@dataclass
class Config(common.Config):
    dataset: str = "glyphs"  # a data set of images, or a folder of them
    image_size: Side | None = 32  # side to which images are resized
    steps: Natural = 2_000  # optimisation steps of stage two
    batch_size: Count = 32  # examples per step, over all processes together
    lr: Positive = 6e-3  # peak learning rate of stage two
    first_stage: str | None = None  # a run's folder: take its stage one (Sec. 3.1), train none
    f: Count = 4  # down-sampling factor of the autoencoder; 1: none, diffusion of pixels (LDM-1)
    z_channels: Count = 4  # c: z is (c, H/f, W/f)
    reg: Literal["kl", "vq"] = "kl"  # regularisation of the latent space
    kl_weight: Positive = 1e-4  # of the KL summed over z; App. G: about 1e-6, of larger images
    codes: Count = 256  # |Z|, the codebook's size
    perceptual: Weight = 1.0  # weight of the perceptual loss; official code
    adversarial: Weight = 0.0  # weight d_w of the adversarial loss; official code: 0.5, VQ 0.75
    adversarial_start: Natural = 50_000  # steps of stage one before it; official code, KL
    ae_steps: Natural = 250  # optimisation steps of stage one
    ae_lr: Positive = 4e-3  # its peak learning rate
    ae_width: Count = 8  # its base channels, doubled at each level, up to fourfold
    classifier_steps: Natural = 500  # of the perceptual loss's network, and of the judge
    condition: Condition = "class"  # y: a label beside t, or tau's token(s); or an image
    p_drop: common.Fraction = 0.1  # share of classes and captions that are dropped in training
    scale: Weight = 3.0  # s, the guidance towards a class, token or caption
    T: Count = 1_000  # diffusion steps
    beta_1: Rate = 0.0015  # official code
    beta_T: Rate = 0.0195  # official code
    loss: Literal["l2", "l1"] = "l2"  # of stage two; official code: l1 for some data sets
    sampler: Literal["ddim", "ancestral"] = "ddim"  # of the reverse process
    sampling_steps: Count = 25  # S
    eta: Share = 0.0  # noise of DDIM; 1 is ancestral sampling; the paper has both
    width: Count = 32  # base channels of the U-Net
    blocks: Count = 1  # its residual blocks per level
    mult: Sizes = (1,)  # its channel multiples
    attention: Sizes | None = None  # resolutions of z with (cross-)attention, but for the middle
    dropout: common.Fraction = 0.0  # of the U-Net
    depth: Count = 1  # blocks of a spatial transformer
    context: Count = 64  # width of tau(y); Table 13, App. E.2.1: 512
    examples: Count = 200  # test images and samples that are measured
    learned = (*common.Config.learned, "T", "beta_1", "beta_T", "first_stage")


# fmt: off
SMALL = {"steps": 8_000, "lr": 4e-3, "width": 48, "ae_steps": 1_500, "ae_width": 16}  # 2 cores
PRESETS = dict.fromkeys(("mnist", "fashion_mnist", "folder"), SMALL) | {
    "cifar10": {  # ours: the paper has no model of 32 x 32 images
        "f": 2, "ae_steps": 100_000, "ae_lr": 2e-4, "ae_width": 64, "classifier_steps": 10_000,
        "kl_weight": 1e-6, "adversarial": 0.5, "flip": True, "condition": "token", "context": 512,
        "steps": 200_000, "batch_size": 128, "lr": 2e-4, "ema": 0.9999, "sampling_steps": 100,
        "width": 128, "blocks": 2, "mult": (1, 2, 2), "attention": (16, 8, 4)},
}
# fmt: on

# ---- The diffusion process (App. B) -------------------------------------------------------------


class Process:
    """q(z_t | z_0) = N(alpha_t z_0, sigma_t² I), t = 0, 1, ... T; z is (B, ...), t int64 (B,)."""

    def __init__(self, T=1000, beta_1=0.0015, beta_T=0.0195, device="cpu"):
        # Table 12's "linear": in the official code, the roots are
        beta = torch.linspace(beta_1**0.5, beta_T**0.5, T, dtype=torch.float64) ** 2
        log_alpha_2 = F.pad(torch.log1p(-beta).cumsum(0), (1, 0))  # of alpha_t², 0 at t = 0
        self.T, dtype = T, torch.get_default_dtype()
        self.alpha = torch.exp(log_alpha_2 / 2).to(device, dtype)
        self.sigma = torch.sqrt(-torch.expm1(log_alpha_2)).to(device, dtype)

    def at(self, t, z):
        """alpha_t and sigma_t, to multiply z."""
        return bcast(self.alpha[t], z), bcast(self.sigma[t], z)

    def diffuse(self, z_0, eps, t):
        alpha, sigma = self.at(t, z_0)
        return alpha * z_0 + sigma * eps  # App. B: q(z_t | z_0)

    def z_0(self, z_t, eps, t):
        """The estimate of z_0 that belongs to an estimate of eps."""
        alpha, sigma = self.at(t, z_t)
        return (z_t - sigma * eps) / alpha  # App. B: eps = (z_t - alpha_t z_0) / sigma_t

    def posterior(self, z_t, z_0, t, s):
        """Mean (B, ...) and deviation of q(z_s | z_t, z_0), s < t."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.at(t, z_t), self.at(s, z_t)
        alpha_ts = alpha_t / alpha_s  # App. B: alpha_{t|s}
        var_ts = sigma_t**2 - alpha_ts**2 * sigma_s**2  # App. B: sigma²_{t|s}
        mean = (alpha_ts * sigma_s**2 * z_t + alpha_s * var_ts * z_0) / sigma_t**2  # App. B: mu
        return mean, var_ts.sqrt() * sigma_s / sigma_t

    def steps(self, S, z):
        """S steps from T to 0 as pairs of times (t, s), each int64 (B,)."""
        times = [self.T * i // S for i in range(S, -1, -1)]  # all different for any S <= T
        times = [torch.full((len(z),), time, device=z.device) for time in times]
        return itertools.pairwise(times)


def ldm_loss(eps_theta, z_0, eps, t, process, power=2, *given):
    """Eq. 1 for images z_0, Eq. 2 for latents, Eq. 3 where y is given; a mean of dimensions."""
    error = eps - eps_theta(process.diffuse(z_0, eps, t), t, *given)
    return error.abs().pow(power).mean()  # Eq. 1, Eq. 2, Eq. 3


def ancestral(eps_theta, z, process, S):
    """z_T ~ N(0, I) to z_0 in S steps by the posterior at the estimated z_0."""
    for t, s in process.steps(S, z):
        z_0 = process.z_0(z, eps_theta(z, t), t)
        mean, deviation = process.posterior(z, z_0, t, s)
        z = mean + deviation * torch.randn_like(z)  # App. B: p(z_s | z_t)
    return z


def ddim(eps_theta, z, process, S, eta=0.0):
    """The same by Song et al. (2021), eta times as noisy: eta = 1 is ancestral, 0 has no noise."""
    for t, s in process.steps(S, z):
        eps = eps_theta(z, t)
        z_0 = process.z_0(z, eps, t)
        alpha_s, sigma_s = process.at(s, z)
        noise = eta * process.posterior(z, z_0, t, s)[1]
        along = (sigma_s**2 - noise**2).clamp(min=0).sqrt()
        z = alpha_s * z_0 + along * eps + noise * torch.randn_like(z)  # [DDIM]
    return z


def guided(eps_theta, y, null, s):
    """eps(z, t) from eps_theta(z, t, y) at guidance scale s: 1 is conditional, 0 unconditional."""

    def eps(z, t):
        if s in (0, 1):
            return eps_theta(z, t, y if s else null)
        both = eps_theta(torch.cat([z, z]), torch.cat([t, t]), torch.cat([null, y]))
        eps_null, eps_y = both.chunk(2)
        return eps_null + s * (eps_y - eps_null)  # [classifier-free guidance]

    return eps


def image_guided(eps_theta, y, transform, process, variance=1.0):
    """eps(z, t) that samples from p(z | y), where y = transform(z_0) but for Gaussian noise."""

    def eps(z, t):
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            estimate = eps_theta(z, t)
            error = y - transform(process.z_0(z, estimate, t))
            log_p = -error.square().sum() / (2 * variance)  # App. C: log p(y | z_t)
            (slope,) = torch.autograd.grad(log_p, z)
        return estimate.detach() - process.at(t, z)[1] * slope  # App. C, Departure 1

    return eps


# ---- Losses of stage one (Sec. 3.1, App. G) -----------------------------------------------------


def gaussian(moments):
    """The encoder's output (B, 2c, h, w) -> E_mu, log E_sigma² and a draw, each (B, c, h, w)."""
    mu, log_var = moments.chunk(2, dim=1)
    log_var = log_var.clamp(-30, 20)  # official code
    return mu, log_var, mu + torch.exp(log_var / 2) * torch.randn_like(mu)  # App. G: E(x)


def kl_to_standard_normal(mu, log_var):
    """KL(N(mu, e^log_var) | N(0, I)) in nats, (B,), summed over the latent's dimensions."""
    return 0.5 * (mu.square() + log_var.exp() - 1 - log_var).flatten(1).sum(1)  # App. G: KL-reg.


def quantise(z, codebook):
    """z (B, c, h, w) with every vector replaced by the nearest code, and the codes' numbers.

    Differentiable in the codebook (K, c) alone.
    """
    rows = z.detach().movedim(1, -1)  # (B, h, w, c)
    numbers = torch.cdist(rows.flatten(0, 2), codebook.detach()).argmin(dim=1).view(rows.shape[:3])
    return codebook[numbers].movedim(-1, 1), numbers


def vq_loss(z, z_q, beta=0.25):
    """Moves codes to latents and, beta times, latents to codes: the mean over all elements.

    (In official code beta stands at the other term, by a mistake that it keeps.)
    """
    codebook, commitment = (z_q - z.detach()).square(), (z_q.detach() - z).square()
    return (codebook + beta * commitment).mean()  # App. G: VQ-reg.; [VQ-VAE]'s loss and beta


def perceptual_distance(features, x, x_hat):
    """In LPIPS's form, (B,): squared distance of features(x), made unit vectors, summed."""
    total = 0
    for a, b in zip(features(x), features(x_hat), strict=True):
        gap = F.normalize(a, dim=1, eps=1e-3) - F.normalize(b, dim=1, eps=1e-3)
        total = total + gap.square().sum(1).mean((1, 2))
    return total


def adversarial_losses(discriminate, x, x_hat):
    """The discriminator's hinge loss, and one with the gradient of -mean D_psi(x_hat) in x_hat.

    The first reaches psi alone and the second x_hat alone, so that one step serves both players.
    """
    fake = x_hat.detach().requires_grad_()
    real_logits, fake_logits = discriminate(torch.cat([x, fake])).chunk(2)
    hinge = (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2
    (slope,) = torch.autograd.grad(-fake_logits.mean(), fake, retain_graph=True)
    return hinge, (slope * x_hat).sum()  # App. G: minus its L_adv; hinge: official code


def adaptive_weight(rec, adv, last):
    """The weight that makes both losses pull equally at `last`, the decoder's last weights."""
    by_rec, by_adv = (torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (rec, adv))
    return (by_rec.norm() / (by_adv.norm() + 1e-4)).clamp(0, 1e4).detach()  # official code


# ---- Networks -----------------------------------------------------------------------------------


def conv(c_in, c_out, normed=True):
    """A 3 x 3 convolution, of a normalised and activated input."""
    layer = nn.Conv2d(c_in, c_out, 3, padding=1)
    return nn.Sequential(group_norm(c_in), nn.SiLU(), layer) if normed else layer


class Residual(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.body = nn.Sequential(conv(c_in, c_out), conv(c_out, c_out))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        return self.skip(x) + self.body(x)


class Autoencoder(nn.Module):
    """E, D and the discriminator psi, called by name; D quantises if there is a codebook.

    encode: x (B, C, H, W) -> z (B, c, H/f, W/f) before quantisation, or for KL (B, 2c, H/f, W/f).
    decode: z -> x. discriminate: x -> logits of patches, (B, 1, h', w').
    """

    def __init__(self, channels, f, z_channels, codes, width, adversarial):
        super().__init__()
        widths = [width * min(2**i, 4) for i in range(f.bit_length())]  # of the levels, fine first
        last = widths[-1]
        encoder = [conv(channels, width, normed=False), Residual(width, width)]
        decoder = [conv(z_channels, last, normed=False), Residual(last, last)]
        for a, b in itertools.pairwise(widths):
            encoder += [nn.Conv2d(a, a, 3, stride=2, padding=1), Residual(a, b)]
        for b, a in itertools.pairwise(widths[::-1]):
            decoder += [nn.Upsample(scale_factor=2), conv(b, a, normed=False), Residual(a, a)]
        encoder += [conv(last, z_channels if codes else 2 * z_channels)]
        decoder += [conv(width, channels)]
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)
        self.codebook = nn.Parameter(torch.randn(codes, z_channels)) if codes else None
        self.psi = patch_discriminator(channels, 4 * width) if adversarial else None

    def forward(self, x, part):
        if part == "discriminate":
            return self.psi(x)
        if part == "encode":
            return self.encoder(x)
        if self.codebook is not None:  # Sec. 3.1: absorbed by D; straight through for gradients
            x = x + (quantise(x, self.codebook)[0] - x).detach()
        return self.decoder(x)


def patch_discriminator(channels, width):
    """Logits of overlapping patches; official code halves three times, small images here twice."""
    layers = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    for c_in, stride in ((width, 2), (2 * width, 1)):
        layers += [nn.Conv2d(c_in, 2 * c_in, 4, stride, padding=1, bias=False)]
        layers += [group_norm(2 * c_in), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(4 * width, 1, 4, padding=1))


def classifier(channels, classes, widths=(24, 48, 96)):
    """Logits (B, classes) of images. One gives the perceptual loss its features, one judges."""
    stages = [
        nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), group_norm(b), nn.SiLU())
        for a, b in itertools.pairwise([channels, *widths])
    ]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))
    return nn.Sequential(*stages, head)


def features(net, x):
    """The maps (B, C_i, H_i, W_i) after each of a classifier's stages."""
    return list(itertools.accumulate(net[:-1], lambda h, stage: stage(h), initial=x))[1:]


class MultiHeadAttention(nn.Module):
    """Queries from h (B, N, C), keys and values from context (B, M, D) -> (B, N, C).

    (Sec. 3.3 prints the shapes of W_Q and W_V in each other's place.)
    """

    def __init__(self, width, context, heads):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(context, 2 * width, bias=False)
        self.output = nn.Linear(width, width)

    def forward(self, h, context):
        q = self.query(h).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, d)
        k, v = self.key_value(context).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v)  # Sec. 3.3: softmax(Q Kᵀ / sqrt(d)) V
        return self.output(h.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Residual self-attention, MLP and, where a context's width is given, cross-attention."""

    def __init__(self, width, heads, context=None):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3 if context else 2))
        self.self_attention = MultiHeadAttention(width, width, heads)
        hidden = 4 * width
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.cross_attention = MultiHeadAttention(width, context, heads) if context else None

    def forward(self, h, context=None):
        normed = self.norms[0](h)
        h = h + self.self_attention(normed, normed)  # Table 16: SelfAttention
        h = h + self.mlp(self.norms[1](h))  # Table 16: MLP
        if self.cross_attention is None:
            return h
        return h + self.cross_attention(self.norms[2](h), context)  # Table 16: CrossAttention


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of h (B, C, H, W), attending to tau(y) (B, M, D)."""

    def __init__(self, channels, heads, context, depth):
        super().__init__()
        self.norm = group_norm(channels)
        self.input = nn.Conv2d(channels, channels, 1)
        blocks = (TransformerBlock(channels, heads, context) for _ in range(depth))
        self.blocks = nn.ModuleList(blocks)
        self.output = zeroed(nn.Conv2d(channels, channels, 1))  # so that it starts as the identity

    def forward(self, x, context):
        h = self.input(self.norm(x)).flatten(2).transpose(1, 2)  # (B, HW, C)
        for block in self.blocks:
            h = block(h, context)
        return x + self.output(h.transpose(1, 2).unflatten(2, x.shape[2:]))


class TextEncoder(nn.Module):
    """tau for captions: int64 (B, M) -> (B, M, width), by a transformer without a mask."""

    def __init__(self, length, width, depth=2):
        super().__init__()
        self.token = nn.Embedding(len(ALPHABET), width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        heads = common.attention_heads(width, 32)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens):
        return self.norm(self.blocks(self.token(tokens) + self.position))  # App. E.2.1


LABELS = ("class", "token", "caption")  # conditions on y
IMAGES = ("super-resolution", "inpainting")  # conditions by concatenation
ALPHABET = " abcdefghijklmnopqrstuvwxyz"
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def captions(classes):
    """Labels spelled out, "seven" or "one two", and last an empty caption: (classes + 1, M)."""
    texts = [" ".join(DIGITS[int(digit)] for digit in str(k)) for k in range(classes)] + [""]
    length = max(map(len, texts))
    return torch.tensor([[ALPHABET.index(a) for a in text.ljust(length)] for text in texts])


class LatentDiffusion(nn.Module):
    """eps_theta(z_t, t, tau_theta(y)), (B, c, h, w), with its latents: E, D and their scale.

    t: int64 (B,), 1 to T. y: None, or int64 (B,), where the number of classes means none of them.
    concat: None, or what is laid beside z_t, (B, C', h, w).
    """

    def __init__(self, cfg, image_shape, classes):
        super().__init__()
        self.cfg, self.classes, (channels, height, width) = cfg, classes, image_shape
        c = cfg.z_channels if cfg.f > 1 else channels
        self.z_shape = (c, height // cfg.f, width // cfg.f)
        self.stage_one = self.tau = attend = None
        if cfg.f > 1:
            codes = cfg.codes if cfg.reg == "vq" else 0
            net = Autoencoder(channels, cfg.f, c, codes, cfg.ae_width, cfg.adversarial)
            self.stage_one = net.requires_grad_(False)
        self.register_buffer("sigma_hat", torch.ones(()))
        if cfg.condition == "token":
            tokens = torch.arange(classes + 1)[:, None]
            self.tau = nn.Embedding(classes + 1, cfg.context)  # App. E.2.1: a class is one token
        elif cfg.condition == "caption":
            tokens = captions(classes)
            self.tau = TextEncoder(tokens.shape[1], cfg.context)
        if self.tau is not None:
            self.register_buffer("tokens", tokens)  # of every y, (classes + 1, M)
            attend = functools.partial(SpatialTransformer, context=cfg.context, depth=cfg.depth)
        labels = classes + 1 if cfg.condition == "class" else 0
        inputs = c + {"super-resolution": channels, "inpainting": c + 1}.get(cfg.condition, 0)
        sizes = cfg.width, cfg.mult, cfg.blocks, cfg.attention or ()
        options = {"dropout": cfg.dropout, "attend": attend, "num_classes": labels}
        self.unet = common.UNet(inputs, *self.z_shape[:2], *sizes, **options)

    def forward(self, z, t, y=None, concat=None):
        h = z if concat is None else torch.cat([z, concat], dim=1)  # Sec. 3.3: concatenation
        if self.tau is None:
            return self.unet(h, t / self.cfg.T, y)  # a class beside the time: official code, "adm"
        return self.unet(h, t / self.cfg.T, context=self.tau(self.tokens[y]))  # tau(y): (B, M, D)

    @torch.no_grad()
    def adopt(self, weights, x):
        """Take a trained autoencoder's weights, and the scale of its latents of a batch x."""
        self.stage_one.load_state_dict(weights)
        self.sigma_hat.fill_(1.0)  # a run that is resumed adopts them again
        z = self.encode(x)
        self.sigma_hat.copy_((z - z.mean()).square().mean().sqrt())  # App. G: over b, c, h and w

    @torch.no_grad()
    def encode(self, x):
        """x -> z_0: for KL a draw from the encoder's Gaussian, for VQ what will be quantised."""
        if self.stage_one is None:
            return x  # Sec. 4.1: LDM-1
        z = self.stage_one(x, "encode")
        return (z if self.cfg.reg == "vq" else gaussian(z)[2]) / self.sigma_hat  # App. G

    def decode(self, z):
        return z if self.stage_one is None else self.stage_one(z * self.sigma_hat, "decode")


# ---- Conditioning on images by concatenation (Sec. 4.4, Sec. 4.5) -------------------------------


def low_resolution(x, factor=4):
    """x (B, C, H, W) shrunk by the factor, bicubic with anti-aliasing."""
    return F.interpolate(x, scale_factor=1 / factor, mode="bicubic", antialias=True)  # App. E.3.4


def random_boxes(x):
    """Holes (B, 1, H, W), 1 inside a box at random, whose sides are a quarter to the whole."""
    n, side = len(x), x.shape[3]
    length = side * (0.25 + 0.75 * torch.rand(2, n, 1, device=x.device))
    start = (side - length) * torch.rand(2, n, 1, device=x.device)
    pixel = torch.arange(side, device=x.device) + 0.5
    rows, columns = ((pixel > start) & (pixel < start + length)).to(x)  # (B, side)
    return (rows[:, :, None] * columns[:, None])[:, None]


def degrade(model, x):
    """For models conditioned on an image: (what is given of x, as an image; concat; holes)."""
    f, condition = model.cfg.f, model.cfg.condition
    if condition == "super-resolution":
        low = low_resolution(x)
        # Sec. 4.4: tau is the identity, if f = 4
        concat = F.interpolate(low, scale_factor=4 / f, mode="bicubic")
        return F.interpolate(low, scale_factor=4, mode="bicubic"), concat, torch.ones_like(x)
    if condition == "inpainting":
        holes = random_boxes(x)
        given = x * (1 - holes)  # Sec. 4.5; in official code holes are -1, their mask +-1
        concat = torch.cat([model.encode(given), F.avg_pool2d(holes, f)], dim=1)
        return given, concat, holes
    return None, None, None


# ---- Training -----------------------------------------------------------------------------------


def train_autoencoder(cfg, run, data, distance):
    """Stage one. distance(x, x_hat) -> (B,) is the perceptual loss, which may be LPIPS."""
    for x, _ in run.batches(data):
        z = run.model(x, "encode")
        if cfg.reg == "vq":
            L_reg = vq_loss(z, quantise(z, run.net.codebook)[0])
        else:
            mu, log_var, z = gaussian(z)
            # Per dimension of x, as L_rec: official code sums both over the dimensions
            L_reg = cfg.kl_weight * kl_to_standard_normal(mu, log_var).mean() / x[0].numel()
        x_hat = run.model(z, "decode")
        L_rec = (x - x_hat).abs().mean() + cfg.perceptual * distance(x, x_hat).mean()
        loss = L_rec + L_reg  # App. G: L_Autoencoder
        started = run.done >= cfg.adversarial_start
        if cfg.adversarial and (started or common.world_size() > 1):  # which wants all gradients
            L_psi, L_adv = adversarial_losses(lambda x: run.model(x, "discriminate"), x, x_hat)
            weight = adaptive_weight(L_rec, L_adv, run.net.decoder[-1][-1].weight)
            loss = loss + started * (L_psi + cfg.adversarial * weight * L_adv)
        run.step(loss)


def train(cfg, run, data, process):
    """Stage two."""
    power = {"l1": 1, "l2": 2}[cfg.loss]
    for x, y in run.batches(data):
        z_0 = run.net.encode(x)
        _, concat, _ = degrade(run.net, x)
        dropped = torch.rand(len(x), device=x.device) < cfg.p_drop
        y = torch.where(dropped, data.num_classes, y) if cfg.condition in LABELS else None
        t = torch.randint(1, cfg.T + 1, (len(x),), device=x.device)  # t ~ U{1, ... T}
        eps = torch.randn_like(z_0)
        loss = ldm_loss(run.model, z_0, eps, t, process, power, y, concat)
        run.step(loss)  # Eq. 2, Eq. 3


def train_classifier(cfg, data, device, stage):
    """A classifier of the labels, as a stage of its own."""
    run = common.Run(cfg, classifier(data.shape[0], data.num_classes), device, stage)
    run.cfg = dataclasses.replace(cfg, steps=cfg.classifier_steps, lr=3e-3)
    for x, y in [] if cfg.sample else run.batches(data):
        run.step(F.cross_entropy(run.model(x), y))
    return run.ema


def stage_one(cfg, net, data, device):
    """Weights of the autoencoder `net` after its training."""
    sees = functools.partial(features, train_classifier(cfg, data, device, "features"))
    distance = functools.partial(perceptual_distance, sees)
    adam = functools.partial(torch.optim.Adam, betas=(0.5, 0.9), fused=True)  # official code
    here = dataclasses.replace(cfg, compile=cfg.compile and not cfg.adversarial)  # it cannot be
    run = common.Run(here, net, device, "autoencoder", adam)
    run.cfg = dataclasses.replace(cfg, steps=cfg.ae_steps, lr=cfg.ae_lr)
    train_autoencoder(run.cfg, run, data, distance)
    return run.ema.state_dict()


def stage_one_of(cfg):
    """The checkpoint of another run's stage one."""
    return common.load_checkpoint(Path(cfg.first_stage, "checkpoint-autoencoder.pt"), cfg.script)


def prepare(cfg):
    """(run of stage two, data, process); stage one is trained, or taken over from another run."""
    device = common.setup(cfg)
    other = None
    if cfg.first_stage and not (cfg.resume or cfg.sample):
        other = stage_one_of(cfg)
        if other["step"] < other["config"]["steps"]:
            raise UserError(f"{cfg.first_stage} has not finished its stage one: --resume it first")
        for name in ("f", "z_channels", "reg", "codes", "ae_width", "adversarial", "image_size"):
            if getattr(cfg, name) != (value := other["config"][name]):
                print(f"from here on {name} = {value}, as in {cfg.first_stage}", flush=True)
                setattr(cfg, name, value)
    process = Process(cfg.T, cfg.beta_1, cfg.beta_T, device)
    if process.alpha[-1] < 1e-30:  # by which z_0 divides
        raise UserError(f"no signal is left at --T {cfg.T} with --beta-T {cfg.beta_T}: lower one")
    if cfg.dataset in common.DENSITIES:
        raise UserError(f"{cfg.dataset} is not made of images: choose glyphs, mnist, or a folder")
    data = common.load_data(cfg, device)
    check(cfg, data)
    if other and other["model"]["encoder.0.weight"].shape[1] != data.shape[0]:
        raise UserError(f"{cfg.first_stage} is of images with other channels than {cfg.dataset}")
    run = common.Run(cfg, LatentDiffusion(cfg, data.shape, data.num_classes), device)
    if run.done == 0 and cfg.f > 1 and not cfg.sample:
        run.save()  # --resume finds the settings here, should stage one be interrupted
        net = copy.deepcopy(run.net.stage_one).requires_grad_()
        other = stage_one_of(cfg)["ema"] if cfg.first_stage else None
        weights = other or stage_one(cfg, net, data, device)
        for each in (run.net, run.ema):
            torch.manual_seed(cfg.seed)  # the same scale in every process
            each.adopt(weights, common.to_float(data.train[: cfg.batch_size]))
        torch.manual_seed(common.process_seed(cfg))  # the same if stage one was interrupted
        run.save()
    return run, data, process


def check(cfg, data):
    """Refuse settings that do not go together."""
    side = data.shape[1]
    if cfg.f & (cfg.f - 1) or side % cfg.f:
        raise UserError(f"--f {cfg.f} must be a power of two and divide {side} pixels")
    if cfg.condition == "super-resolution" and side % 4:
        raise UserError(f"--condition super-resolution: {side} pixels are no multiple of four")
    new = not (cfg.first_stage or cfg.resume or cfg.sample)
    if new and cfg.f > 1 and cfg.adversarial and cfg.adversarial_start >= cfg.ae_steps:
        start = f"starts at step {cfg.adversarial_start}, and stage one has {cfg.ae_steps}"
        raise UserError(f"--adversarial {start}: give a smaller --adversarial-start")
    if new and cfg.f > 1 and cfg.adversarial and side < 12:
        raise UserError(f"--adversarial needs 12 pixels a side, not {side}: leave it out")
    if cfg.condition in LABELS and not cfg.p_drop and cfg.scale != 1:
        raise UserError("--p-drop 0 leaves nothing to guide away from: give --scale 1 with it")
    if cfg.sampling_steps > cfg.T:
        raise UserError(f"--sampling-steps {cfg.sampling_steps} are more than --T {cfg.T}")
    if cfg.num_samples and cfg.condition in IMAGES:
        raise UserError(f"--num-samples writes samples of no image: not for {cfg.condition}")


# ---- Sampling and evaluation --------------------------------------------------------------------


@torch.no_grad()
def generate(model, process, n, y=None, s=None, concat=None, enlarge=1, led_by=None):
    """n images by the trained model, their side `enlarge` times that of training.

    y: labels (n,), guided at scale s. concat: (n, C', h, w), of any h and w. led_by: images of the
    training side, which the enlarged ones are to look like when they are shrunk (Fig. 14).
    """
    cfg, (c, h, w) = model.cfg, model.z_shape
    size = (h * enlarge, w * enlarge) if concat is None else concat.shape[2:]  # Sec. 4.3.2
    z = torch.randn(n, c, *size, device=model.sigma_hat.device)
    eps_theta = functools.partial(model, concat=concat)
    if y is not None:
        null = torch.full_like(y, model.classes)
        eps_theta = guided(eps_theta, y, null, cfg.scale if s is None else s)
    if led_by is not None:
        eps_theta = image_guided(
            eps_theta, led_by, lambda z: low_resolution(model.decode(z), enlarge), process
        )
    if cfg.sampler == "ancestral":
        return model.decode(ancestral(eps_theta, z, process, cfg.sampling_steps))
    return model.decode(ddim(eps_theta, z, process, cfg.sampling_steps, cfg.eta))


def psnr(x, reference):
    """Peak signal-to-noise ratio in dB of images in [-1, 1], the mean over images."""
    mse = (x.clamp(-1, 1) - reference).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / mse)).mean().item()


def judged(judge, y, **images):
    """The share of each kind of images that the judge, a classifier, takes for their labels y."""
    kinds = images.items() if judge else ()
    return {f"judge_on_{k}": (judge(x).argmax(1) == y).float().mean().item() for k, x in kinds}


@torch.no_grad()
def evaluate_stage_one(run, x, y, judge):
    """Fidelity, KL or the number of codes in use, deviation of the latent, the judge's reading."""
    net = run.ema
    z = net.encode(x)
    x_hat = net.decode(z)
    figures = {"psnr": psnr(x_hat, x), "latent_std": net.sigma_hat.item()}
    figures["scaled_std"] = z.std().item()
    if net.cfg.reg == "vq":
        _, numbers = quantise(z * net.sigma_hat, net.stage_one.codebook)
        share = numbers.flatten().bincount() / numbers.numel()
        figures["codes_used"] = torch.special.entr(share).sum().exp().item()  # of |Z|
    else:
        mu, log_var, _ = gaussian(net.stage_one(x, "encode"))
        figures["kl_nats"] = kl_to_standard_normal(mu, log_var).mean().item()
    run.report("stage one", **figures, **judged(judge, y, data=x, reconstructions=x_hat))
    return [("test images, reconstructions", in_turn(10, x[:20], x_hat[:20]))]


@torch.no_grad()
def evaluate_guidance(run, process, n, x, classes, judge):
    """The judge's agreement at each scale on n samples, and the distance of its features from
    those of the test images x."""
    cfg, y, shown = run.cfg, torch.arange(n, device=run.device) % classes, {}
    clock = time.process_time if run.device.type == "cpu" else time.perf_counter
    for s in sorted({0.0, 1.0, 2.0, 3.0, 5.0, cfg.scale}) if cfg.p_drop else (1.0,):
        torch.manual_seed(cfg.seed)  # the same noise at every scale
        start = clock()
        samples = generate(run.ema, process, n, y, s)
        shown[s] = samples[y < 10]  # which waits for the device
        figures = {"seconds_per_sample": (clock() - start) / n}
        if judge:
            maps = [features(judge, images)[-1].mean((2, 3)) for images in (samples, x)]
            figures["agreement"] = judged(judge, y, s=samples)["judge_on_s"]
            figures["feature_distance"] = common.energy_distance(*maps)
        run.report(f"s = {s:g}", **figures)
    wide, chosen = min(10, classes), shown.pop(cfg.scale)
    title = f"a {cfg.condition} a column, s = {cfg.scale:g}"
    above = [(title, common.image_grid(chosen[: 8 * wide], wide, scale=2))]
    if not shown:
        return above, []
    title = f"in turn s = {', '.join(f'{s:g}' for s in shown)}"
    below = torch.cat([samples[: 2 * wide] for samples in shown.values()])
    return above, [(title, common.image_grid(below, wide, scale=2))]


@torch.no_grad()
def evaluate_restoration(run, process, x, y, judge):
    """Super-resolution or inpainting of test images, and of four at a time on a large canvas."""
    canvas = x[:16].unflatten(0, (4, 2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    cases = []
    for images in (x, canvas):  # (B, C, H, W), (4, C, 2H, 2W)
        given, concat, holes = degrade(run.ema, images)
        samples = generate(run.ema, process, len(images), concat=concat)
        cases.append((images, given, given + holes * (samples - given)))  # official code
    _, given, samples = cases[0]
    figures = {"psnr": psnr(samples, x), "psnr_given": psnr(given, x)}
    figures |= judged(judge, y, data=x, given=given, samples=samples)
    run.report(run.cfg.condition, **figures)
    above = in_turn(10, *(part[:30] for part in cases[0]))
    below = [("four at once, twice as large as in training", in_turn(4, *cases[1]))]
    return [(f"{run.cfg.condition}: truth, given, sample", above)], below


@torch.no_grad()
def evaluate_enlarged(run, process, classes, n=4):
    """Samples; samples of latents twice as large; the same led by the first, as in Fig. 14,
    where there are no classes."""
    y = torch.arange(n, device=run.device) % classes if run.cfg.condition in LABELS else None
    small = generate(run.ema, process, n, y)
    large = []
    for x in (None, small):
        torch.manual_seed(run.cfg.seed)  # the same noise, alone and led
        large.append(generate(run.ema, process, n, y, enlarge=2, led_by=x))
    title = "samples; twice as large; the same led by the first"
    return [(title, in_turn(n, F.interpolate(small, scale_factor=2), *large))]


def in_turn(columns, *images):
    """A row of each in turn, as a picture."""
    rows = [part.unflatten(0, (-1, columns)) for part in images]
    return common.image_grid(torch.stack(rows, dim=1).flatten(0, 2), columns, scale=2)


def main(cfg):
    run, data, process = prepare(cfg)
    if not cfg.sample:
        train(cfg, run, data, process)
    if not run.finish():
        return
    known = not cfg.sample or Path(cfg.sample).with_name("checkpoint-judge.pt").exists()
    named = known and data.num_classes > 1
    judge = train_classifier(cfg, data, run.device, "judge") if named else None
    torch.manual_seed(cfg.seed)
    some = torch.arange(max(40, cfg.examples), device=run.device) % len(data.test)
    x, y, classes = common.to_float(data.test[some]), data.test_labels[some], data.num_classes
    first = evaluate_stage_one(run, x, y, judge) if cfg.f > 1 else []
    if cfg.condition in IMAGES:
        above, below = evaluate_restoration(run, process, x, y, judge)
    elif cfg.condition in LABELS:
        distinct = x[: len(data.test)]
        above, below = evaluate_guidance(run, process, len(x), distinct, classes, judge)
    else:
        above, below = [("samples", in_turn(8, generate(run.ema, process, 64)))], []
    if cfg.condition not in IMAGES:
        below += evaluate_enlarged(run, process, classes)
    common.save_panels(run.folder / "samples.png", above + first, below)
    if cfg.num_samples:

        def draw(n):
            y = data.draw_labels(n) if cfg.condition in LABELS else None
            return generate(run.ema, process, n, y), y

        run.write_samples(draw)
    run.say(f"see {run.folder / 'samples.png'}")


if __name__ == "__main__":
    common.cli(main, Config, PRESETS)
