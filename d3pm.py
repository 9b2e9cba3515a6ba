"""Structured Denoising Diffusion Models in Discrete State-Spaces.
Austin, Johnson, Ho, Tarlow, van den Berg, NeurIPS 2021, arXiv 2107.03006

Implements  Eq. 1 (bound); Eq. 2, Eq. 3 (corruption, marginals, posterior); Eq. 4, Sec. 3.3 (the
            x0-parameterisation, k steps at a time); Eq. 5 (hybrid loss); Eq. 6, Eq. 7, App. A.2.6
            (uniform, absorbing, both); Eq. 8 (discretised Gaussian); Eq. 9 (neighbours); Eq. 10
            (band-diagonal); Eq. 15, App. A.4.1 (low-rank products); Eq. 16, App. A.4.2 (matrix
            exponentials); Sec. 3.2, Eq. 17, App. A.7, Eq. 18 (reciprocal, mutual information,
            cosine); App. A.2.2, App. A.8, App. B.1 (of images); App. B.2 (of text); Sec. 4, Eq. 12
            (BERT, masked language models, autoregression); Table 1, Table 3, Table 5 (families)
Conventions x_0 is data, x_T noise; t = 1 ... T; [Q_t]_ij = q(x_t = j | x_{t-1} = i). States are
            int64 (B, ...), distributions log-probabilities (B, ..., K). Nats, reported in bits.
            alpha_bar is A.4.1's alpha~, a is A.7's alpha_bar, alpha A.4.2's alpha_*, n up to t.
Departures  1. Eq. 4 holds at t = 1 too; official code for images, Sec. 3.4 and BERT take p~ there.
            2. lambda weighs the terms of one t, as in official code: Eq. 5's is T times it. As the
               code's loss is of one t in bits, its clipping at 1 is here at T ln 2.
            3. Eq. 18 is printed with "+ pi/2"; the cosine is of (t/T + s)/(1 + s) times pi/2, and
               s official code's. Eq. 17 lacks p(x_0) above its inner sum, A.3 1 / (1 - alpha~_t).
            4. Eq. 8's beta are for K = 256, T = 1000; others keep variances relative to the range.
            5. More exponents than App. A.7's, interpolated linearly in their log, not by a cubic.
            6. The transformer has depthwise convolutions (a plain one learns slowly), 24 heads, not
               12, learned positions. The U-Net has 38.3 M weights, not 35.7. Eq. 9 is of bigrams.
Run         python d3pm.py                     18.25 ± 0.09 bits a sentence, entropy 18; 51 s
            python d3pm.py --dataset FILE.txt  tinyshakespeare: 2.853 ± 0.015 bits a letter; 11 min
            python d3pm.py --dataset mnist     digits of 8 grey levels
            python d3pm.py --compare           family, loss, bits; --connections: Sec. 4 in numbers
            torchrun --nproc_per_node 8 d3pm.py --dataset cifar10   Table 3; not run here
"""

import dataclasses
import functools
import itertools
import math
import os
import re
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
from common import Count, Natural, Positive, Sizes, UserError, bcast

Levels = Annotated[int, lambda v: 2 <= v <= 256, "a whole number from 2 to 256"]
FAMILIES = Literal["uniform", "absorbing", "mixed", "gaussian", "band", "neighbours"]


@dataclass
class Config(common.Config):
    dataset: str = "grammar"  # grammar, text8, a text file; or images: glyphs, mnist, a folder
    steps: Natural = 3_000  # optimisation steps
    batch_size: Count = 16  # examples per step, over all processes together
    lr: Positive = 2e-3  # peak learning rate of Adam
    T: Count = 1000  # diffusion steps (Sec. 5, Sec. 6)
    family: FAMILIES = "absorbing"  # transition matrices (App. A.2)
    schedule: Literal["linear", "cosine", "reciprocal", "mutual"] | None = None  # or the paper's
    form: Literal["joint", "posterior"] = "joint"  # Eq. 4, or the mean of q(x_{t-1} | x_t, x_0)
    head: Literal["categorical", "logistic"] = "categorical"  # of images (App. A.8)
    lam: Positive | None = 0.01  # lambda of the cross entropy (Eq. 5; absorbing 0.01, images 0.001)
    levels: Levels = 8  # K of images
    length: Count = 128  # characters of an example of text
    neighbours: Count = 5  # k of the graph over characters (App. A.2.4, Fig. 5)
    band: Count = 1  # v of the band-diagonal family (Eq. 10); 8 levels need 2
    infer_steps: Count = 128  # reverse steps of samples, at most T: k at a time (Sec. 3.3)
    bound_steps: Count | None = None  # steps of the chain whose bound is computed; T if not given
    bound_examples: Natural = 512  # held-out examples whose bound is computed
    bound_times: Count | None = 8  # t drawn per example, stratified; none: the sum over all t
    compare: bool = False  # train families and losses on equal budgets, print a table of bits
    connections: bool = False  # print Sec. 4's identities in numbers; trains nothing
    width: Count = 128  # units of the transformer, or base channels of the U-Net
    blocks: Count = 4  # of the transformer, or of each level of the U-Net
    mult: Sizes = (1, 2, 4)  # channel multiple of each level of the U-Net
    attention: Sizes | None = None  # resolutions with attention, of the U-Net, but for the middle
    dropout: common.Fraction = 0.0  # of the U-Net
    learned = ("optimizer", "family", "schedule", "form", "head", "levels", "neighbours", "band")


# fmt: off
IMAGES = {"T": 100, "family": "gaussian", "head": "logistic", "steps": 4_000, "batch_size": 32,
          "lr": 4e-3, "beta_2": 0.99, "amp": "auto", "width": 16, "blocks": 1}
PRESETS = dict.fromkeys(("glyphs", "mnist", "fashion_mnist"), IMAGES | {"image_size": 20}) | {
    "folder": IMAGES,
    "grammar": {"steps": 1_300, "batch_size": 32, "lr": 4e-3, "T": 256, "length": 37, "width": 64,
                "blocks": 3, "bound_examples": 64, "bound_times": None, "infer_steps": 256},
    "text8": {"steps": 1_000_000, "batch_size": 512, "lr": 5e-4, "warmup": 10_000, "length": 256,
              "width": 768, "blocks": 12},  # App. B.2; its decay is rsqrt
    "cifar10": {"family": "gaussian", "head": "logistic", "levels": 256, "lam": 0.001,  # App. B.1
                "infer_steps": 1000, "steps": 1_500_000, "batch_size": 128, "lr": 2e-4, "warmup": 0,
                "ema": 0.9999, "dropout": 0.1, "flip": True, "blocks": 2, "attention": (16,),
                "width": 128, "mult": (1, 2, 2, 2), "clip": 693.0, "decay": "constant"},  # its code
}
# fmt: on

# ---- Markov chains (Sec. 3.1, App. A.2, A.4) ----------------------------------------------------
# A chain gives rows, columns and products of its matrices as logarithms; NEVER stands for log 0:
# finite, so that 0 log 0 = 0 and no gradient is NaN. t is int64 (B,) in 1 ... T.

NEVER = -1e30


def log(p):
    return p.log().clamp(min=NEVER)


class Chain(nn.Module):
    """q(x_t | x_{t-1}) = Cat(x_t; p = x_{t-1} Q_t), Eq. 2, over K states; p(x_T) = pi.

    Made on the CPU in float64; its buffers have the default dtype. times (T + 1,): t / T, which the
    network is told, and which a chain of fewer, longer steps keeps.
    """

    def __init__(self, T, log_pi, times=None):
        super().__init__()
        self.K, self.T = len(log_pi), T
        self.keep("log_pi", log_pi)
        self.keep("times", torch.linspace(0, 1, T + 1) if times is None else times)

    def keep(self, name, value):
        self.register_buffer(name, value.to(torch.get_default_dtype()))

    def log_posterior(self, x_t, x_0, t):
        """log q(x_{t-1} | x_t, x_0), (B, ..., K)."""
        joint = self.log_column(x_t, t) + self.log_row(x_0, t - 1)  # x_t Q_t^T * x_0 Q_bar_{t-1}
        return joint.log_softmax(-1)  # Eq. 3

    def log_p_theta(self, log_p_0, x_t, t, form="joint"):
        """log p_theta(x_{t-1} | x_t) from the network's log p~(x_0 | x_t), both (B, ..., K).

        "joint" sums q(x_{t-1}, x_t | x_0) over p~, as the paper does; "posterior" sums
        q(x_{t-1} | x_t, x_0), that is, divides by q(x_t | x_0), and drops what cannot lead to x_t.
        """
        if form == "posterior":
            evidence = self.log_column(x_t, t, whole=True)
            log_p_0 = torch.where(evidence > NEVER / 2, log_p_0 - evidence, NEVER)
        joint = self.log_column(x_t, t) + self.log_forward(log_p_0, t - 1)
        return joint.log_softmax(-1)  # Eq. 4

    def prior_kl(self, x_0):
        """KL(q(x_T | x_0) || p(x_T)) in nats, of x_0's shape."""
        last = torch.full((len(x_0),), self.T, device=x_0.device)
        return kl_divergence(self.log_row(x_0, last), self.log_pi)  # Eq. 1, L_T

    def draw_prior(self, *shape):
        return categorical(self.log_pi.expand(*shape, self.K))

    def skip(self, steps):
        """The chain of so many steps, at most T: k of this one's each, or about (Sec. 3.3)."""
        if steps >= self.T:
            return self
        grid = torch.linspace(0, self.T, steps + 1).round().long()
        return self.at(grid).to(self.times.device)


class LowRank(Chain):
    """Q_t = (1 - beta_t) I + beta_t 1 pi^T, Eq. 15: uniform (Eq. 6) if pi = 1/K, absorbing (Eq. 7)
    if pi = e_m. As (1 pi^T)² = 1 pi^T, Q_bar_t is the same of alpha_bar_t = prod (1 - beta_s): O(T)
    numbers for any K. alpha_bar is (T + 1,), or (T + 1, D), for each position its own.
    """

    def __init__(self, pi, alpha_bar, times=None):
        super().__init__(len(alpha_bar) - 1, log(pi), times)
        self.pi, self.alpha_bar = pi, alpha_bar
        stay = torch.where(alpha_bar[:-1] > 0, alpha_bar[1:] / alpha_bar[:-1], 0.0)
        stay = torch.cat([alpha_bar[:1], stay])
        self.keep("step", log(torch.stack([stay, 1 - stay])))  # Eq. 15
        self.keep("whole", log(torch.stack([alpha_bar, 1 - alpha_bar])))  # App. A.4.1

    def at(self, grid):
        return LowRank(self.pi, self.alpha_bar[grid], self.times[grid])

    def _entries(self, table, t, x, log_pi):
        """Where a state is x: log(stay + leave pi); elsewhere log(leave pi)."""
        stay, leave = (bcast(a[t], x)[..., None] for a in table)
        away = leave + log_pi
        here = x[..., None] == torch.arange(self.K, device=x.device)
        return torch.where(here, torch.logaddexp(stay, away), away)

    def log_row(self, x_0, t):
        """log q(x_t | x_0), (B, ..., K); t may be 0 too."""
        return self._entries(self.whole, t, x_0, self.log_pi)  # Eq. 3

    def log_column(self, x_t, t, whole=False):
        """log q(x_t | x_{t-1}) for every x_{t-1}, (B, ..., K); whole: log q(x_t | x_0)."""
        table = self.whole if whole else self.step
        return self._entries(table, t, x_t, self.log_pi[x_t][..., None])  # Eq. 2

    def log_forward(self, log_p, t):
        """log (p Q_bar_t) of weights p >= 0, (B, ..., K)."""
        stay, leave = (bcast(a[t], log_p) for a in self.whole)
        away = leave + log_p.logsumexp(-1, keepdim=True) + self.log_pi
        return torch.logaddexp(stay + log_p, away)

    def sample(self, x_0, t):
        """x_t ~ q(x_t | x_0): kept, or drawn from pi; this takes no (B, ..., K)."""
        kept = torch.rand(x_0.shape, device=x_0.device) < bcast(self.whole[0, t].exp(), x_0)
        noise = torch.multinomial(self.log_pi.exp(), x_0.numel(), replacement=True)
        return torch.where(kept, x_0, noise.view_as(x_0))


class Dense(Chain):
    """Doubly stochastic matrices; a subclass has log Q_t and log Q_bar_t, (B, K, K), at t (B,)."""

    def __init__(self, K, T, times=None):
        super().__init__(T, torch.full((K,), -math.log(K)), times)

    def log_row(self, x_0, t):
        return self._pick(self.log_Q_bar(t), x_0)

    def log_column(self, x_t, t, whole=False):
        return self._pick((self.log_Q_bar(t) if whole else self.log_Q(t)).mT, x_t)

    def log_forward(self, log_p, t):
        top = log_p.amax(-1, keepdim=True)
        p = (log_p - top).exp().flatten(1, -2) @ self.log_Q_bar(t).exp()  # (B, D, K)
        # The floor, e^-87 in float32, leaves p_theta a distribution, and so the bound a bound.
        return p.clamp(min=torch.finfo(p.dtype).tiny).log().view_as(log_p) + top

    def sample(self, x_0, t):
        return categorical(self.log_row(x_0, t))

    def _pick(self, matrix, x):
        batch = torch.arange(len(x), device=x.device)[:, None]
        return matrix[batch, x.flatten(1)].view(*x.shape, self.K)


class Table(Dense):
    """Q (T, K, K) and its products, 2 T K² numbers: for families without structure, if they fit."""

    def __init__(self, Q, times=None):
        super().__init__(Q.shape[1], len(Q), times)
        eye = torch.eye(self.K, dtype=Q.dtype)
        Q_bar = itertools.accumulate(Q, torch.matmul, initial=eye)  # Q_1 Q_2 ... Q_t, Eq. 3
        self.Q = Q
        self.keep("table", log(torch.cat([eye[None], Q])))
        self.keep("table_bar", log(torch.stack(list(Q_bar))))

    def at(self, grid):
        Q = [functools.reduce(torch.matmul, self.Q[a:b]) for a, b in itertools.pairwise(grid)]
        return Table(torch.stack(Q), self.times[grid])

    def log_Q(self, t):
        return self.table[t]

    def log_Q_bar(self, t):
        return self.table_bar[t]


class Exponential(Dense):
    """Q_bar_t = exp(n_t alpha R), Eq. 16, for whole n_t (T + 1,), n_0 = 0: the product of those
    exp(2^j alpha R) that n_t's binary digits name, O(K² log n_T) numbers (App. A.4.2). R (K, K) is
    symmetric, >= 0 off its diagonal (A.4.2 prints non-positive), and its rows sum to 0.
    """

    def __init__(self, R, alpha, n, times=None):
        super().__init__(len(R), len(n) - 1, times)
        self.R, self.alpha = R, alpha
        self.register_buffer("n", n)
        shift = R.diagonal().min() * torch.eye(len(R), dtype=R.dtype)
        power = torch.matrix_exp(alpha * (R - shift))  # exp(alpha R) but for a factor; no term < 0
        powers = [power / power.sum(1, keepdim=True)]
        for _ in range(1, int(n[-1]).bit_length()):
            powers.append(powers[-1] @ powers[-1])
        self.keep("powers", torch.stack(powers))

    def at(self, grid):
        return Exponential(self.R, self.alpha, self.n[grid], self.times[grid])

    def log_Q(self, t):
        return self._log_exp(self.n[t] - self.n[t - 1])  # Eq. 16

    def log_Q_bar(self, t):
        return self._log_exp(self.n[t])  # Eq. 16

    def _log_exp(self, n):
        powers = self.powers.double() if n.is_cuda else self.powers  # TF32 would not do
        Q = torch.eye(self.K, dtype=powers.dtype, device=n.device).expand(len(n), -1, -1)
        for j, power in enumerate(powers):
            Q = torch.where((n >> j & 1 == 1)[:, None, None], Q @ power, Q)  # App. A.4.2
        return log(Q).to(self.powers.dtype)


def categorical(log_p):
    """A draw from every row of log_p (..., K), by the Gumbel trick."""
    noise = torch.empty_like(log_p).exponential_().clamp(min=torch.finfo(log_p.dtype).tiny)
    return (log_p - noise.log()).argmax(-1)


def kl_divergence(log_q, log_p):
    """KL(q || p) in nats over the last axis."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)


# ---- Matrices and schedules (App. A.2, A.7) -----------------------------------------------------


def gaussian_kernel(K, beta):
    """exp(-4 n² / ((K - 1)² beta)), normalised over n = 1-K ... K-1: beta (T,) -> (T, 2 K - 1)."""
    n = torch.arange(1 - K, K, dtype=torch.float64)
    return torch.softmax(-4 * n**2 / ((K - 1) ** 2 * beta[:, None]), dim=1)  # Eq. 8


def band_kernel(K, beta, v):
    return beta[:, None] / K * (torch.arange(1 - K, K).abs() <= v)  # Eq. 10


def toeplitz(kernel):
    """Off-diagonals from kernel (T, 2 K - 1), what a row lacks on the diagonal: (T, K, K)."""
    i = torch.arange((kernel.shape[1] + 1) // 2)
    Q = kernel[:, i - i[:, None] + len(i) - 1] * (i != i[:, None])
    return Q + torch.diag_embed(1 - Q.sum(2))


def gaussian_betas(K, T):
    """A step's variance relative to the range is that of K = 256, the chain's that of T = 1000."""
    beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * (1000 / T)  # App. B.1, Departure 4

    def variance(K, beta):  # of a step, relative to the range
        return gaussian_kernel(K, beta) @ torch.linspace(-1, 1, 2 * K - 1, dtype=torch.float64) ** 2

    low, high = torch.full_like(beta, 1e-6), torch.full_like(beta, 1e6)
    for _ in range(60):
        middle = (low * high).sqrt()
        small = variance(K, middle) < variance(256, beta)
        low, high = torch.where(small, middle, low), torch.where(small, high, middle)
    return middle


def bigram_embedding(x, K):
    """Embeddings of the tokens in x (N,), (K, 2 K): roots of what follows and what precedes."""
    counts = torch.bincount(x[:-1] * K + x[1:], minlength=K * K).view(K, K).double() + 0.01
    return torch.cat([n / n.sum(1, keepdim=True) for n in (counts, counts.T)], dim=1).sqrt()


def neighbour_rate(w, k):
    """The rates R (K, K) of a walk over the graph of the k nearest neighbours in w (K, E)."""
    distance = torch.cdist(w, w).fill_diagonal_(math.inf)
    G = torch.zeros_like(distance).scatter_(0, distance.topk(k, 0, largest=False).indices, 1.0)
    A = (G + G.T) / (2 * k)
    return A - torch.diag(A.sum(1))  # Eq. 9


def alpha_bar(schedule, T):
    """alpha_bar_0 = 1 ... alpha_bar_T = 0, (T + 1,)."""
    t = torch.arange(T + 1, dtype=torch.float64)
    if schedule == "linear":
        beta = torch.linspace(0.02, 1, T, dtype=torch.float64)  # App. B.1, uniform
        return F.pad((1 - beta).cumprod(0), (1, 0), value=1.0)
    if schedule == "cosine":
        f = torch.cos((t / T + 0.008) / 1.008 * (math.pi / 2))  # Eq. 18, Departure 3
        return torch.where(t < T, f / f[0], 0.0)
    return 1 - t / T  # "reciprocal": beta_t = 1 / (T - t + 1), Sec. 3.2


def information(p_0, Q):
    """I(x_t; x_0) in nats for x_0 ~ p_0 (K,) and q(x_t | x_0) = Q (K, K)."""
    return (p_0[:, None] * Q * (log(Q) - log(p_0 @ Q))).sum()


def mutual_schedule(p_0, Q_bar, T):
    """Exponents a_0 = 0 ... a_T for which I(x_t; x_0) = (1 - t / T) H(x_0); Q_bar(a) is (K, K)."""
    nodes = torch.logspace(-8, 5, 1024, dtype=torch.float64)
    entropy = -(p_0 * log(p_0)).sum()
    lost = 1 - torch.stack([information(p_0, Q_bar(a)) for a in nodes]) / entropy  # Eq. 17
    a = np.exp(np.interp(np.arange(1, T) / T, lost.numpy(), nodes.log().numpy()))  # App. A.7
    end = nodes[min(int((lost < 1 - 1e-9).sum()), len(nodes) - 1)]  # as good as forgotten
    return torch.cat([torch.zeros(1), torch.from_numpy(a), end[None]])


# App. B.1, App. B.2, but for band and mixed, which are ours. The first three have no other.
SCHEDULES = {"gaussian": "linear", "band": "linear", "neighbours": "mutual"}
DEFAULTS = {"uniform": "cosine", "absorbing": "reciprocal", "mixed": "mutual"}


def make_chain(cfg, data):
    """The chain of cfg.family, cfg.schedule and cfg.T over the data's K states.

    Raises UserError for a schedule that the family does not have, and if x_T still knows x_0.
    """
    K, T, family = data.K, cfg.T, cfg.family
    schedule = cfg.schedule or (SCHEDULES | DEFAULTS)[family]
    tokens = data.examples.flatten().long().cpu()
    p_0 = torch.bincount(tokens, minlength=K).double() / len(tokens)
    if schedule != SCHEDULES.get(family, schedule):
        raise UserError(f"--schedule {schedule}: --family {family} has its own alone")
    if schedule == "linear" and family in SCHEDULES:
        if cfg.form == "posterior":
            why = "it divides by probabilities that are zero in float32"
            raise UserError(f"--form posterior: for --family {family} {why}; take joint")
        if T * K**2 > 2**27:
            raise UserError(f"--family {family}: its tables of {T} x {K} x {K} are too large")
        band = band_kernel(K, torch.linspace(0.02, 1, T), cfg.band).double()
        gaussian = gaussian_kernel(K, gaussian_betas(K, T))
        chain = Table(toeplitz(gaussian if family == "gaussian" else band))
    elif family == "neighbours":
        if data.is_image or cfg.neighbours >= K:
            raise UserError(f"--family neighbours needs a text of over {cfg.neighbours} symbols")
        R = neighbour_rate(bigram_embedding(tokens, K), cfg.neighbours)
        rate, U = torch.linalg.eigh(R)
        a = mutual_schedule(p_0, lambda a: ((U * (a * rate).exp()) @ U.T).clamp(min=0), T)
        alpha = a[-1].item() / 2**24
        chain = Exponential(R, alpha, (a / alpha).round().long())
    else:
        share = {"uniform": 0, "absorbing": 1, "mixed": 2 / 3}[family]  # 2 / 3: BERT, Sec. 4
        e_m, eye = F.one_hot(torch.tensor(data.mask), K), torch.eye(K, dtype=torch.float64)
        pi = share * e_m + (1 - share) * eye.mean(0)  # Eq. 6, Eq. 7, App. A.2.6
        if schedule == "mutual":
            a = mutual_schedule(p_0, lambda a: torch.lerp(pi.expand(K, K), eye, (-a).exp()), T)
            a[-1] = math.inf  # nothing is left of x_0
        chain = LowRank(pi, (-a).exp() if schedule == "mutual" else alpha_bar(schedule, T))
    known = chain.prior_kl(torch.arange(K)[:, None]).max().item() / math.log(2)
    if known > 1e-3:
        ways = "a larger --T, --band or --neighbours"
        raise UserError(f"x_T still knows {known:.2g} bits of x_0: give {ways}")
    return chain


# ---- Bound, loss and sampler (Sec. 2, Sec. 3.3, Sec. 3.4) ---------------------------------------
# net(x_t, time) is log p~(x_0 | x_t): int64 (B, ...), float (B,) in [0, 1] -> (B, ..., K).


def stratified(n, T, *shape, device=None):
    """n times (n, *shape) uniform in 1 ... T, one in each of n equal parts; if n = T, all."""
    part = torch.arange(n, device=device).view(n, *[1] * len(shape))
    return (part * T + torch.randint(T, (n, *shape), device=device)) // n + 1


def bound_term(net, chain, x_0, x_t, t, form="joint"):
    """L_{t-1} of Eq. 1 in nats, (B, ...), and log p~. At t = 1 the posterior is x_0 itself, which
    makes the divergence L_0 = -log p_theta(x_0 | x_1).
    """
    log_p_0 = net(x_t, chain.times[t])
    log_p = chain.log_p_theta(log_p_0, x_t, t, form)
    return kl_divergence(chain.log_posterior(x_t, x_0, t), log_p), log_p_0


def hybrid_loss(net, chain, x_0, t, lam=0.0, form="joint"):
    """L_vb without its constant L_T, and T lam times p~'s cross entropy (Departure 2): an estimate
    in nats per dimension, unbiased for t (B,) uniform in 1 ... T.
    """
    x_t = chain.sample(x_0, t)
    kl, log_p_0 = bound_term(net, chain, x_0, x_t, t, form)
    cross_entropy = -log_p_0.gather(-1, x_0[..., None])[..., 0]
    return chain.T * (kl + lam * cross_entropy).mean()  # Eq. 5


@torch.no_grad()
def bound(net, chain, x_0, times, form="joint"):
    """An unbiased estimate of a bound of -log p(x_0) in nats, (B,), from one x_t at each of so many
    times, stratified for every example by itself; times = T sums over all t.
    """
    total = chain.prior_kl(x_0).flatten(1).sum(1)
    for t in stratified(times, chain.T, len(x_0), device=x_0.device):
        kl, _ = bound_term(net, chain, x_0, chain.sample(x_0, t), t, form)
        total = total + chain.T / times * kl.flatten(1).sum(1)  # Eq. 1
    return total


@torch.no_grad()
def reverse(net, chain, x_t, form="joint"):
    """Ancestral sampling from x_T: yields (t, x_t) for t = T ... 0. chain.skip goes k at a time."""
    yield chain.T, x_t
    for s in range(chain.T, 0, -1):
        t = torch.full((len(x_t),), s, device=x_t.device)
        log_p_0 = net(x_t, chain.times[t])
        x_t = categorical(chain.log_p_theta(log_p_0, x_t, t, form))
        yield s - 1, x_t


# ---- Networks -----------------------------------------------------------------------------------


def logistic_log_probs(mu, log_s, K):
    """log p of K levels, a logistic density on [-1, 1] in bins, truncated: (...) -> (..., K).

    A bin from z - d to z + d has sigmoid(z + d) - sigmoid(z - d) = sigmoid(z + d) sigmoid(d - z)
    (1 - e^{-2 d}), and the last factor is the same for all. mu in [-1, 1].
    """
    inverse = torch.exp(2 - log_s)[..., None]  # the 2, too: App. A.8
    centres = torch.linspace(-1, 1, K, dtype=mu.dtype, device=mu.device)
    z, d = inverse * (centres - mu[..., None]), inverse / (K - 1)
    return (F.logsigmoid(z + d) + F.logsigmoid(d - z)).log_softmax(-1)  # App. A.8


class Denoiser(nn.Module):
    """log p~(x_0 | x_t): x_t int64 (B, L) or (B, C, H, W), time (B,) in [0, 1] -> (B, ..., K)."""

    def __init__(self, cfg, data):
        super().__init__()
        self.K, self.symbols, self.is_image = data.K, data.symbols, data.is_image
        self.logistic = cfg.head == "logistic"
        if self.is_image:
            c, side, _ = data.shape
            outputs = c * (2 if self.logistic else self.K)
            sizes = (side, cfg.width, cfg.mult, cfg.blocks, cfg.attention or ())
            self.net = common.UNet(c, outputs, *sizes, dropout=cfg.dropout)
        else:
            self.net = Transformer(self.K, self.symbols, data.shape[0], cfg.width, cfg.blocks)

    def forward(self, x_t, time):
        x = 2 * x_t / (self.K - 1) - 1 if self.is_image else x_t
        h = self.net(x, time)
        h = h.float() if h.dtype.itemsize < 4 else h
        if not self.is_image:
            mask = self.K - self.symbols  # data has none
            return F.pad(h.log_softmax(-1), (0, mask), value=NEVER)
        h = h.unflatten(1, (x.shape[1], -1)).movedim(2, -1)  # (B, C, H, W, 2 or K)
        if self.logistic:
            return logistic_log_probs(torch.tanh(x + h[..., 0]), h[..., 1], self.K)  # App. B.1
        return (h + F.one_hot(x_t, self.K)).log_softmax(-1)  # App. B.1


class Transformer(nn.Module):
    """x (B, L) of K_in symbols, time (B,) -> logits (B, L, K_out); uniform when untrained."""

    def __init__(self, K_in, K_out, length, width, blocks):
        super().__init__()
        self.token = nn.Embedding(K_in, width)
        self.position = nn.Parameter(0.1 * torch.randn(length, width))
        self.time = nn.Linear(width, width)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(blocks)])
        self.output = nn.Sequential(nn.LayerNorm(width), common.zeroed(nn.Linear(width, K_out)))

    def forward(self, x, time):
        emb = common.time_embedding(time, self.position.shape[1])
        h = self.token(x) + self.position + self.time(emb)[:, None]
        return self.output(self.blocks(h))


class Block(nn.Module):
    """Residual convolution of each channel, attention and MLP, (B, L, C) -> (B, L, C)."""

    def __init__(self, width):
        super().__init__()
        self.heads = common.attention_heads(width, 32)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.conv = nn.Conv1d(width, width, 7, padding=3, groups=width)  # Departure 6
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        hidden = nn.Linear(width, 4 * width)
        self.mlp = nn.Sequential(hidden, nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, h):
        h = h + self.conv(self.norms[0](h).mT).mT
        qkv = self.qkv(self.norms[1](h)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, L, C / heads)
        h = h + self.mix(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return h + self.mlp(self.norms[2](h))


# ---- Data ---------------------------------------------------------------------------------------

ADJECTIVES = ["red", "old", "fat", "shy", "big", "wee", "sad", "odd"]
ANIMALS = ["cats", "dogs", "hens", "mice", "owls", "pigs", "ants", "bees"]
THINGS = [list("2345"), ADJECTIVES, ANIMALS]
SLOTS = [*THINGS, ["met", "saw", "fed", "led"], *THINGS]
ENTROPY = 18  # bits: 2^18 sentences, all equally likely
GRAMMAR = " ".join(f"({'|'.join(slot)})" for slot in SLOTS) + r": (\d+) in all\. *"
LONGEST = 37
MASK = "\N{MEDIUM SHADE}"


def sentences(n, length, seed):
    """n sentences in one string, such as "2 red cats met 3 shy owls: 5 in all."."""
    rng = torch.Generator().manual_seed(seed)
    picks = torch.stack([torch.randint(len(s), (n,), generator=rng) for s in SLOTS], dim=1)
    lines = []
    for pick in picks.tolist():
        words = [slot[i] for slot, i in zip(SLOTS, pick, strict=True)]
        total = int(words[0]) + int(words[4])
        lines.append(f"{' '.join(words)}: {total} in all.".ljust(length))
    return "".join(lines)


def is_true(sentence):
    """None if the grammar has no such sentence, else whether its sum is right."""
    found = re.fullmatch(GRAMMAR, sentence)
    return found and int(found[8]) == int(found[1]) + int(found[5])


class Text:
    """Characters. Examples are crops of a long string that start at multiples of `stride`."""

    is_image = False

    def __init__(self, cfg, train, test, device, stride=1):
        L = cfg.length
        if cfg.image_size or cfg.flip:
            raise UserError(f"{cfg.dataset} is no image: leave out --image-size and --flip")
        if min(len(train), len(test)) < L:
            raise UserError(f"{cfg.dataset} is too short for examples of {L} characters")
        codes = np.frombuffer((train + test).encode("utf-32-le"), np.uint32)
        alphabet, tokens = np.unique(codes, return_inverse=True)
        tokens = torch.from_numpy(tokens.astype(np.int16)).to(device)
        self.alphabet = "".join(map(chr, alphabet)) + MASK
        self.symbols, self.stride, self.shape = len(alphabet), stride, (L,)
        self.K = self.symbols + (cfg.family in ("absorbing", "mixed"))  # [MASK] is the last
        self.mask = self.K - 1
        self.examples, rest = tokens.split([len(train), len(test)])
        self.test = rest[: len(rest) // L * L].view(-1, L).long()
        self.train = train

    def batch(self, n):
        device, (L,) = self.examples.device, self.shape
        starts = (len(self.examples) - L) // self.stride + 1
        start = self.stride * torch.randint(starts, (n, 1), device=device)
        return self.examples[start + torch.arange(L, device=device)].long(), None

    def decode(self, x):
        return ["".join(self.alphabet[i] for i in row) for row in x.tolist()]


class Pixels:
    """Images of K levels, int64 (B, C, H, W); the absorbing one is in the middle."""

    is_image = True

    def __init__(self, cfg, data):
        self.data, self.shape = data, data.shape
        self.K = self.symbols = cfg.levels
        self.mask = self.K // 2  # App. A.2.2
        self.test = self.quantise(data.test)
        self.examples = self.quantise(data.train[:10_000]).flatten(1)

    def batch(self, n):
        x, y = self.data.batch(n)
        return self.quantise(common.to_uint8(x)), y

    def quantise(self, x):
        return x.long() * self.K // 256

    def decode(self, x):
        return 2 * x / (self.K - 1) - 1


def load_data(cfg, device):
    """The Text or Pixels that cfg.dataset names; raises UserError if it cannot be had."""
    name, L = cfg.dataset, cfg.length
    if name == "grammar":
        if L < LONGEST:
            raise UserError(f"--length {L}: the grammar's sentences take {LONGEST} characters")
        return Text(cfg, sentences(20_000, L, 0), sentences(2_000, L, 1), device, stride=L)
    if name == "text8":
        text = text8(Path(cfg.data_dir))
        return Text(cfg, text[: 9 * 10**7], text[95 * 10**6 :], device)  # App. B.2, mended
    if Path(name).is_file():
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {name} as text: {error}") from None
        split = len(text) * 9 // 10
        return Text(cfg, text[:split], text[split:], device)
    if not (name in ("glyphs", "mnist", "fashion_mnist", "cifar10") or Path(name).is_dir()):
        sets = "grammar, text8, a text file, glyphs, mnist, fashion_mnist, cifar10"
        raise UserError(f"{name} is no discrete data set: give {sets}, or a folder of images")
    return Pixels(cfg, common.load_data(cfg, device))


def text8(folder):
    """The 10^8 characters of text8, from the folder, downloaded if missing."""
    path, part = folder / "text8.zip", folder / f"text8-{os.getpid()}.part"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            urllib.request.urlretrieve("http://mattmahoney.net/dc/text8.zip", part)
            os.replace(part, path)
        text = zipfile.ZipFile(path).read("text8").decode("ascii")
        if len(text) != 10**8:
            raise ValueError(f"it has {len(text)} characters")
        return text
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"text8 is not to be had as {path}: {error}; or use grammar") from None


# ---- Training and evaluation --------------------------------------------------------------------


def train(cfg, run, data, chain):
    for x_0, _ in run.batches(data):  # x_0 ~ q(x_0), (B, ...)
        t = stratified(len(x_0), chain.T, device=x_0.device)  # t ~ U{1 ... T}, (B,)
        run.step(hybrid_loss(run.model, chain, x_0, t, cfg.lam or 0.0, cfg.form))  # Eq. 5


def held_out_bits(cfg, net, data, chain):
    """The bound in bits per dimension of cfg.bound_examples spread over the held-out data, (N,)."""
    chain = chain.skip(cfg.bound_steps or cfg.T)
    pick = torch.linspace(0, len(data.test) - 1, min(cfg.bound_examples, len(data.test))).long()
    times = min(cfg.bound_times or chain.T, chain.T)
    nats = [bound(net, chain, x, times, cfg.form) for x in data.test[pick].split(64)]
    return torch.cat(nats) / (math.prod(data.shape) * math.log(2))


def independent_bits(data):
    """Bits per dimension of the held-out data under independent pixels, or characters."""
    x = data.examples if data.is_image else data.examples[:, None]
    counts = torch.stack([(x == k).sum(0) for k in range(data.symbols)]) + 1.0  # (K, D) or (K, 1)
    bits = -(counts / counts.sum(0)).log2().expand(-1, math.prod(data.shape))
    return bits.gather(0, data.test.flatten(1)).mean().item()


def evaluate(cfg, run, data, chain):
    """The bound of held-out data, and samples: their picture, and what can be said of text."""
    if cfg.bound_examples:
        bits = held_out_bits(cfg, run.ema, data, chain)
        error = common.standard_error(bits)
        figures = {"bits_per_dim": bits.mean().item(), "standard_error": error}
        if cfg.dataset == "grammar":
            figures |= {"bits_per_sentence": cfg.length * bits.mean().item(), "entropy": ENTROPY}
        run.report("test", **figures, independent=independent_bits(data), examples=len(bits))
    chain = chain.skip(cfg.infer_steps)
    shown = [round(chain.T * part) for part in (1, 0.85, 0.7, 0.55, 0.4, 0.25, 0.1, 0)]
    n = 64 if data.is_image or cfg.dataset == "grammar" else 24
    chains = reverse(run.ema, chain, chain.draw_prior(n, *data.shape), cfg.form)
    frames = {t: data.decode(x) for t, x in chains if t in shown}
    times = "t = " + ", ".join(f"{cfg.T * chain.times[t].item():.0f}" for t in frames)
    last = frames[0]
    if data.is_image:
        first = torch.cat([x[:16] for x in frames.values()])
        panels = [(times, tiles(first))], [("samples", tiles(last))]
        common.save_panels(run.folder / "samples.png", *panels)
        return
    first = [(x[i], last[i]) for i in range(3) for x in frames.values()]
    panels, high = [(times, page(first))], len(first)
    for lines in (last[:high], last[high : 2 * high]):
        panels += [("samples", page([(x, x) for x in lines]))] if lines else []
    rows = [panels] if cfg.length < 80 else [[panel] for panel in panels]
    common.save_panels(run.folder / "samples.png", *rows)
    (run.folder / "samples.txt").write_text("\n\n".join(last) + "\n", encoding="utf-8")
    if cfg.dataset == "grammar":
        truth = [is_true(line) for line in last]
        sentences = sum(x is not None for x in truth) / len(truth)
        run.report("samples", sentences=sentences, true_sums=truth.count(True) / len(truth))
    else:
        known = set(re.findall(r"[a-z]{3,}", data.train.lower()))
        words = [w for x in last for w in re.findall(r"[a-z]{3,}", x.lower())[1:-1]]  # whole ones
        run.report("samples", known_words=sum(w in known for w in words) / max(1, len(words)))
    run.say(last[0])


def tiles(x):
    """Images in [-1, 1] as one picture, uint8 (3, H, W), small ones enlarged."""
    return common.image_grid(x, 16, scale=max(1, 960 // (16 * (x.shape[-1] + 1) + 1)))


def page(lines):
    """Lines (text, final text) as one picture: masks are squares, what will change is red."""
    shapes, (L, height) = [], (len(lines[0][0]), len(lines))
    square = torch.tensor([[0.1, 0.1], [0.9, 0.1], [0.9, 0.9], [0.1, 0.9]])
    for y, (line, final) in enumerate(lines):
        for x, (symbol, end) in enumerate(zip(line, final, strict=True)):
            corner = torch.tensor([x, height - y - 1.0])
            if symbol == MASK:
                shapes.append(("fill", corner + square, "#d5d9e6", 0))
            elif symbol != " ":
                colour = "#15171f" if symbol == end else "#e07a5f"
                shapes.append(("text", corner[None] + 0.5, colour, symbol.replace("\n", "/")))
    return common.chart(shapes, (0, L, 0, height), (9 * L, 18 * height))


def draw(cfg, run, data, chain, n):
    """n samples, in the chain's steps: images in [-1, 1], or texts, as int64 code points (n, L)."""
    *_, (_, x_0) = reverse(run.ema, chain, chain.draw_prior(n, *data.shape), cfg.form)
    if data.is_image:
        return data.decode(x_0)
    return torch.tensor([[ord(symbol) for symbol in text] for text in data.decode(x_0)])


ROWS = {  # ours: posterior, mixed, and of images uniform lam, gaussian logistic
    "text": "uniform, uniform lam, uniform posterior lam, neighbours, absorbing, absorbing lam, "
    "mixed lam",
    "images": "uniform, uniform lam, absorbing, absorbing lam, gaussian, gaussian lam, "
    "gaussian logistic, gaussian logistic lam",
}


def compare(cfg):
    """On equal budgets: rows of Table 1, Table 5 (text), Table 3 (images, there with a lambda of
    0.001); ours for comparison."""
    images, table = load_data(cfg, "cpu").is_image, []
    for row in ROWS["images" if images else "text"].split(", "):
        family, *rest = row.split()
        changed = {"family": family, "schedule": None, "lam": cfg.lam if "lam" in rest else None}
        changed["head"] = "logistic" if "logistic" in rest else "categorical"
        changed["form"] = "posterior" if "posterior" in rest else "joint"
        out = common.free_folder(f"{cfg.out}/{row.replace(' ', '-')}")
        here = dataclasses.replace(cfg, **changed, compare=False, out=out)
        cells = f"{family:12}{here.head:13}{here.form:11}{here.lam or 0:<8}"
        try:
            run, data, chain = prepare(here)
        except UserError as error:  # no such chain over these states; the other rows stand
            table.append(f"{cells}{error}")
            continue
        run.say(f"training {row}")
        train(here, run, data, chain)
        bits = held_out_bits(here, run.ema, data, chain)
        error = common.standard_error(bits) or math.nan
        table.append(f"{cells}{bits.mean():.3f} ± {error:.3f}")
    print("family      head         form       lambda  bits per dimension")
    print("\n".join(table))


def connections(cfg):
    """Sec. 4 on a random network, in float64: the chain's bound beside the other model's loss."""
    torch.manual_seed(cfg.seed)
    torch.set_default_dtype(torch.float64)
    B, K, L, T = 16, 8, 6, 50
    mask, x_0 = K - 1, torch.randint(K - 1, (B, L))
    e_m = F.one_hot(torch.tensor(mask), K).double()
    transformer = Transformer(K, K - 1, L, 32, 2).requires_grad_(False)
    for p in transformer.parameters():
        p.normal_(0, 0.3)

    def net(x_t, time):
        return F.pad(transformer(x_t, time).log_softmax(-1), (0, 1), value=NEVER)

    def nll(log_p_0):  # (B, L)
        return -log_p_0.gather(-1, x_0[..., None])[..., 0]

    rows = []
    for schedule in ("reciprocal", "cosine"):
        chain, ours, theirs = LowRank(e_m, alpha_bar(schedule, T)), 0.0, 0.0
        for s in range(1, T + 1):
            t = torch.full((B,), s)
            x_t = chain.sample(x_0, t)
            kl, log_p_0 = bound_term(net, chain, x_0, x_t, t)
            a, b = chain.alpha_bar[s - 1 : s + 1]
            weight = (a - b) / (1 - b)  # Eq. 12 for any schedule; 1 / t where alpha_bar = 1 - t / T
            ours += kl.sum().item()
            theirs += (weight * nll(log_p_0)[x_t == mask].sum()).item()
        rows.append((f"absorbing, {schedule} = weighted masked language model", ours, theirs))
    pi = (0.10 * e_m + 0.05 / K) / 0.15
    chain, t = LowRank(pi, torch.tensor([1, 0.85])), torch.ones(B, dtype=torch.long)
    kl, log_p_0 = bound_term(net, chain, x_0, chain.sample(x_0, t), t, "posterior")
    ours, theirs = kl.sum().item(), nll(log_p_0).sum().item()
    rows.append(("one step, 10 % masked, 5 % uniform, p~ = BERT", ours, theirs))  # of all tokens
    kept = torch.arange(L) < torch.arange(L, -1, -1)[:, None]  # at t, all but the last t
    chain, theirs = LowRank(e_m, kept.double()), 0.0
    for i in range(L):
        before = torch.where(torch.arange(L) < i, x_0, mask)
        theirs += nll(net(before, chain.times[L - i].expand(B)))[:, i].sum().item()
    ours = bound(net, chain, x_0, L).sum().item()
    rows.append(("masks from the right, one by one = autoregression", ours, theirs))
    print(f"{'nats of 16 sequences':52}{'L_vb - L_T':>18}{'the other':>18}{'difference':>12}")
    for name, ours, theirs in rows:
        print(f"{name:52}{ours:18.10f}{theirs:18.10f}{abs(ours - theirs):12.1e}")


# ---- The command line ---------------------------------------------------------------------------


def prepare(cfg):
    device = common.setup(cfg)
    data = load_data(cfg, device)
    if cfg.head == "logistic" and not data.is_image:
        raise UserError("--head logistic is for ordinal data: images")
    chain = make_chain(cfg, data).to(device)
    return common.Run(cfg, Denoiser(cfg, data), device), data, chain


def main(cfg):
    if cfg.connections:
        connections(cfg)
        return
    if cfg.compare:
        if cfg.resume or cfg.sample or cfg.num_samples or "RANK" in os.environ:
            raise UserError("--compare trains anew, in one process, and writes no samples")
        if cfg.schedule or not (cfg.lam and cfg.bound_examples):
            raise UserError("--compare takes each family's own schedule, --lam, --bound-examples")
        compare(cfg)
        return
    run, data, chain = prepare(cfg)
    if not cfg.sample:
        train(cfg, run, data, chain)
    if not run.finish():
        return
    evaluate(cfg, run, data, chain)
    if cfg.num_samples:
        shorter = chain.skip(cfg.infer_steps)
        run.write_samples(lambda n: draw(cfg, run, data, shorter, n))
    run.say(f"see {run.folder / 'samples.png'}")


if __name__ == "__main__":
    common.cli(main, Config, PRESETS)
