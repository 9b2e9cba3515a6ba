"""Consistency Models. Song, Dhariwal, Chen, Sutskever, arXiv 2303.01469v1

Implements  Eq. 3 (probability-flow ODE); Eq. 5 (parameterisation, boundary condition); Eq. 6 (Euler
            or Heun step); Eq. 7 (distillation loss); Eq. 8 (target network); Eq. 10 (training
            loss); Alg. 1 (multistep sampling); Alg. 2 (distillation, "cd"); Alg. 3 (training,
            "ct"); Alg. 4 (zero-shot editing); Sec. 3 (greedy time points); Sec. 4 (time grid);
            App. C (scalings, schedules N(k) and mu(k), LPIPS at 224); Table 3 (CIFAR-10);
            App. D (inpainting, colourisation, super-resolution, strokes, denoising, interpolation)
Extension   "ict": improved consistency training, Song & Dhariwal, arXiv 2310.14189, since plain
            "ct" hardly trains in minutes. The teacher: Karras et al., arXiv 2206.00364 (EDM).
Conventions t = eps = 0.002 is data, t = T = 80 is noise, x_t = x + t z; the data is x.
            The grid is t_1 = eps < ... < t_N = T. f(x, t) estimates x_eps, D(x, t) is E[x | x_t].
Departures  1. Alg. 4 with mask 1, as App. D states it for strokes, erases the strokes in its
               line 2: here they start line 3 as they are. t_1, t_2 are scaled by side / 256.
            2. EDM's c_noise = ln(t) / 4 is moved to [0, 1], the range of the networks' time.
            3. LPIPS is an argument, train(..., d=partial(perceptual, network=lpips)), not a
               download: d is l2, on CIFAR-10 too, where the paper's FIDs are LPIPS's. For FID the
               greedy search has the energy distance; l1 and l2 are means.
            4. Save on CIFAR-10 lambda(t_n) of "cd" is iCT's, which learns faster, rates warm up and
               decay, gradients are clipped. mu(k) has the paper's N(k), official code N(k) - 1.
            5. The U-Net is Dhariwal & Nichol's, not NCSN++. Small images: it sees patches of 2 x 2
               pixels and the class, of an edited image too; Muon trains its kernels; the teacher's
               P_mean is 0: strokes are decided at more noise. The teacher's EMA is --ema's.
Run         python consistency.py     energy distance 0.0016, 0.0011 in one, two steps; ± 0.0006
            python consistency.py --dataset mnist            digits, and editing.png
            python consistency.py --compare                  4 minutes: cd, ict and ct
            torchrun --nproc_per_node 8 consistency.py --dataset cifar10     Table 3; not run here
"""

import copy
import dataclasses
import functools
import math
import os
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import common
from common import Count, Fraction, Natural, Number, Positive, Sizes, UserError, bcast


@dataclass
class Config(common.Config):
    steps: Natural = 4_500  # optimisation steps of the consistency model
    batch_size: Count = 256  # examples per step, over all processes together
    lr: Positive = 6e-3  # peak learning rate
    optimizer: Literal["radam", "muon"] = "radam"  # App. C; the teacher's is adam; or muon for both
    method: Literal["cd", "ct", "ict"] = "cd"  # distillation, consistency training, improved
    teacher_steps: Natural = 6_000  # optimisation steps of the teacher, an EDM (cd alone)
    teacher_lr: Positive = 4e-3  # peak learning rate of the teacher's Adam
    P_mean: Number = -1.2  # of the teacher's ln sigma ~ N(P_mean, 1.2²) in training (EDM, Table 1)
    N: Count = 18  # cd: points of the time grid (Sec. 6.1)
    solver: Literal["heun", "euler"] = "heun"  # cd: of the step from t_{n+1} to t_n (Sec. 6.1)
    mu: Fraction = 0.0  # cd: decay of the target network (Table 3)
    mu_0: Fraction = 0.9  # ct: the same at the start of mu(k) (Table 3)
    s_0: Count | None = None  # first discretisation steps; none: ct 2 (Table 3), ict 10
    s_1: Count | None = None  # last discretisation steps; none: ct 150 (Table 3), ict 1280
    metric: Literal["l1", "l2", "huber"] | None = None  # d(x, y); none: l2, ict huber
    weighting: Literal["one", "step"] | None = None  # 1 or 1 / (t_{n+1} - t_n); none: ct one
    sigma_data: Positive = 1.0  # standard deviation of the data; images 0.5 (App. C)
    class_conditional: bool = False  # all networks see an example's class
    nfe: Count = 2  # evaluations of multistep sampling (Alg. 1); figures are for 1, 2, ... nfe
    examples: Count = 30_000  # samples per energy distance
    compare: bool = False  # train by cd, ict and ct and print a table
    width: Count = 128  # units of the MLP, or base channels of the U-Net
    blocks: Count = 2  # residual blocks, of the MLP or of each level of the U-Net
    mult: Sizes = (1, 2, 2)  # channel multiple of each level of the U-Net
    attention: Sizes | None = (16,)  # resolutions with attention, but for the middle block
    patch: Count = 1  # side of the patches of pixels that the U-Net sees as channels
    dropout: Fraction = 0.0  # of the U-Net (Table 3); one mask for both networks (iCT)
    teacher_dropout: Fraction = 0.0  # of the teacher
    learned = ("optimizer", "class_conditional", "sigma_data")
    learned += ("teacher_steps", "teacher_lr", "teacher_dropout", "P_mean")


# fmt: off
SMALL_IMAGES = common.SMALL_UNET | {  # minutes on two cores
    "steps": 1_500, "teacher_steps": 3_000, "teacher_lr": 1e-3, "P_mean": 0.0, "sigma_data": 0.5,
    "batch_size": 64, "attention": (7, 8), "class_conditional": True, "examples": 500,
}
PRESETS = dict.fromkeys(("glyphs", "mnist", "fashion_mnist", "folder"), SMALL_IMAGES) | {
    "cifar10": {"examples": 5_000,  # and by Table 3 (cd, ct):
        "steps": 800_000, "batch_size": 512, "lr": 4e-4, "ema": 0.9999,  # Table 3
        "warmup": 0, "decay": "constant", "flip": True, "sigma_data": 0.5,  # App. C
        "weighting": "one",  # Sec. 4; ict: --weighting step --steps 400000 --batch-size 1024
        # and --lr 1e-4 --dropout 0.3 --ema 0.99993
        "clip": None, "width": 128, "mult": (2, 2, 2), "blocks": 4,  # official code
        "teacher_steps": 400_000, "teacher_lr": 1e-3, "teacher_dropout": 0.13,  # official code
    },
}
# fmt: on
EPS, T = 0.002, 80.0  # Sec. 2
BOUNDS = {"ct": (2, 150), "ict": (10, 1280)}  # s_0, s_1: Table 3; iCT


# ---- The probability-flow ODE and the consistency function ---------------------------------------


def karras_grid(N, rho=7.0):
    """t_1 = eps < t_2 < ... < t_N = T, (N,), the ends exact; computed in float64."""
    i = torch.arange(N, dtype=torch.float64)
    t = (EPS ** (1 / rho) + i / (N - 1) * (T ** (1 / rho) - EPS ** (1 / rho))) ** rho  # Sec. 4
    t[0], t[-1] = EPS, T
    return t.to(torch.get_default_dtype())


def parameterised(net, sigma_data, eps=EPS):
    """f(x, t) = c_skip(t) x + c_out(t) net(c_in(t) x, c_noise(t)): x (B, ...), t (B,) -> (B, ...).

    f(x, eps) is x itself, whatever the network. With eps = 0 this is EDM's denoiser D(x, t), which
    does not meet the boundary condition at t = 0.002. The network's time is in [0, 1].
    """

    def f(x, t):
        t_ = bcast(t, x)
        c_skip = sigma_data**2 / ((t_ - eps) ** 2 + sigma_data**2)  # App. C
        c_out = sigma_data * (t_ - eps) / torch.sqrt(sigma_data**2 + t_**2)  # App. C
        c_in = 1 / torch.sqrt(sigma_data**2 + t_**2)
        c_noise = torch.log(t / EPS) / math.log(T / EPS)  # Departure 2
        return c_skip * x + c_out * net(c_in * x, c_noise)  # Eq. 5

    return f


def ode_step(D, x, t, s, solver="heun"):
    """One step of the ODE from x at time t to time s: x (B, ...), t and s (B,)."""
    h = bcast(s - t, x)
    slope = (x - D(x, t)) / bcast(t, x)  # Eq. 3: -t score, and the score is (D - x) / t²
    x_s = x + h * slope  # Eq. 6, Euler
    if solver == "heun":
        x_s = x + h / 2 * (slope + (x_s - D(x_s, s)) / bcast(s, x))  # Eq. 6, Heun
    return x_s


def solve_ode(D, x, grid):
    """The teacher's sampler, Heun's: from x at the grid's end to its beginning, (B, ...)."""
    for t, s in pairwise(grid.flip(0).tolist()):
        x = ode_step(D, x, at(t, x), at(s, x))
    return x


def at(t, x):
    """The number t as a batch of times, (B,)."""
    return x.new_full((len(x),), t)


# ---- Metrics d(x, y), schedules -----------------------------------------------------------------
# A metric takes x and y of shape (B, ...) and returns (B,).


def l1(x, y):
    return (x - y).abs().flatten(1).mean(1)


def l2(x, y):
    return (x - y).square().flatten(1).mean(1)


def huber(x, y):
    """Pseudo-Huber: |x - y|² / 2c near 0, |x - y| - c far away; c = 0.00054 sqrt(dimensions)."""
    c = 0.00054 * math.sqrt(x[0].numel())  # iCT
    return torch.sqrt((x - y).square().flatten(1).sum(1) + c**2) - c  # iCT


def perceptual(x, y, network, side=224):
    """The metric of a network on pairs of images such as LPIPS, smaller ones scaled to the side."""
    if x.shape[-1] < side:
        x, y = (F.interpolate(v, (side, side), mode="bilinear") for v in (x, y))  # App. C
    return network(x, y).flatten()


METRICS = {"l1": l1, "l2": l2, "huber": huber}


def N_of(k, K, s_0, s_1):
    """N(k) of consistency training: s_0 at k = 0, s_1 + 1 at k = K."""
    return math.ceil(math.sqrt(k / K * ((s_1 + 1) ** 2 - s_0**2) + s_0**2) - 1) + 1  # App. C


def mu_of(N, s_0, mu_0):
    """mu(k) of consistency training at N = N(k): mu_0 where N = s_0, more as N grows."""
    return math.exp(s_0 * math.log(mu_0) / N) if mu_0 else 0.0  # App. C


def improved_N_of(k, K, s_0, s_1):
    """N(k) of improved consistency training: N(k) - 1 doubles, at equal intervals, s_0 to s_1."""
    doublings = math.log2(s_1 // s_0)
    interval = max(1, math.floor(K / (doublings + 1)))
    return min(s_0 * 2 ** (k // interval), s_1) + 1  # iCT


def lognormal_probabilities(grid, P_mean=-1.1, P_std=2.0):
    """P(n) for the N - 1 intervals of the grid: that ln t ~ N(P_mean, P_std²) falls into it."""
    mass = torch.erf((grid.log() - P_mean) / (math.sqrt(2) * P_std)).diff()  # iCT
    return mass / mass.sum()


# ---- Losses -------------------------------------------------------------------------------------
# x (B, ...) data and z ~ N(0, I) like it, t and t_next (B,) neighbours of the grid, t < t_next.


def cd_loss(f, f_target, D, x, z, t, t_next, d=l2, weight=1.0, solver="heun"):
    """Consistency distillation of the denoiser D; weight is lambda(t_n), a number or (B,)."""
    x_next = x + bcast(t_next, x) * z  # x_{t_{n+1}} ~ N(x, t_{n+1}² I)
    with torch.no_grad():
        x_hat = ode_step(D, x_next, t_next, t, solver)  # Eq. 6
    return (weight * pair_loss(f, f_target, x_next, t_next, x_hat, t, d)).mean()  # Eq. 7


def ct_loss(f, f_target, x, z, t, t_next, d=l2, weight=1.0):
    """Consistency training: no teacher, but the two points share their noise z."""
    x_next, x_t = x + bcast(t_next, x) * z, x + bcast(t, x) * z
    return (weight * pair_loss(f, f_target, x_next, t_next, x_t, t, d)).mean()  # Eq. 10


def pair_loss(f, f_target, x_next, t_next, x, t, d):
    """d(f(x_next, t_next), f_target(x, t)), (B,); both networks draw the same dropout mask."""
    rng = getattr(torch, x.device.type) if x.device.type in ("cuda", "mps") else torch
    state = rng.get_rng_state()
    with torch.no_grad():
        target = f_target(x, t)
    rng.set_rng_state(state)
    return d(f(x_next, t_next), target)


def edm_loss(D, x, z, P_mean=-1.2, P_std=1.2, sigma_data=0.5):
    """The teacher's denoising loss: Karras et al. 2022, Eq. 2 there, weighted as in Table 1."""
    sigma = (P_mean + P_std * torch.randn_like(x.flatten(1)[:, 0])).exp()  # (B,)
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return (weight * l2(D(x + bcast(sigma, x) * z, sigma), x)).mean()


# ---- Sampling -----------------------------------------------------------------------------------


def sample(f, x_T, times=()):
    """Multistep consistency sampling from x_T ~ N(0, T² I), (B, ...); without times, one step."""
    x = f(x_T, at(T, x_T))  # Alg. 1
    for tau in times:
        x = refine(f, x, tau, torch.randn_like(x))
    return x


def refine(f, x, tau, z):
    """A sample x at time eps is noised to time tau >= eps by z and mapped back."""
    x_tau = x + math.sqrt(max(0.0, tau**2 - EPS**2)) * z  # Alg. 1
    return f(x_tau, at(tau, x))


def greedy_times(f, x_T, score, count, rounds=10):
    """tau_1 > ... > tau_count for `sample`, one at a time by ternary search on a log scale.

    score(x) -> float is to be minimised: the paper's is the FID. All candidates share their noise.
    """
    times, x = [], sample(f, x_T)
    for _ in range(count):
        z = torch.randn_like(x)
        low, high = math.log(EPS), math.log(times[-1] if times else T)
        for _ in range(rounds):  # Sec. 3
            a, b = low + (high - low) / 3, high - (high - low) / 3
            at_a, at_b = (score(refine(f, x, math.exp(u), z)) for u in (a, b))
            low, high = (low, b) if at_a < at_b else (a, high)
        times.append(math.exp((low + high) / 2))
        x = refine(f, x, times[-1], z)
    return times


# ---- Zero-shot editing (App. D) -----------------------------------------------------------------


def same(x):
    return x


def edit(f, y, times, mask, A=same, A_inverse=same, start=None):
    """Keep what is known of the image y, (B, C, H, W), and generate the rest.

    times t_1 > t_2 > ...; mask is 1 where A(y) is to be generated, 0 where it is known; A is
    linear. start: the image that replaces line 2's (Departure 1).
    """
    known = A(y) * (1 - mask)
    x = A_inverse(known) if start is None else start  # Alg. 4, l. 2
    x = f(x + times[0] * torch.randn_like(y), at(times[0], y))  # Alg. 4, l. 3, l. 4
    x = A_inverse(known + A(x) * mask)  # Alg. 4, l. 5
    for t in times[1:]:
        x = refine(f, x, t, torch.randn_like(y))  # Alg. 4, l. 7, l. 8
        x = A_inverse(known + A(x) * mask)  # Alg. 4, l. 9
    return x


def orthogonal(first):
    """An orthogonal matrix Q (n, n) whose first column is proportional to `first` (n,)."""
    basis = torch.eye(len(first), dtype=torch.float64)
    basis[:, 0] = torch.as_tensor(first)
    Q, R = torch.linalg.qr(basis)
    return Q * R.diagonal().sign()


def colourisation(like):
    """mask, A and A_inverse of `edit` for images (B, 3, H, W): their grey values are known."""
    Q = orthogonal([0.2989, 0.5870, 0.1140]).to(like)  # App. D
    mask = torch.tensor([0.0, 1.0, 1.0]).to(like)[:, None, None]
    return (
        mask,
        lambda x: torch.einsum("bl...,lk->bk...", x, Q),  # App. D
        lambda y: torch.einsum("bl...,kl->bk...", y, Q),
    )


def super_resolution(like, p):
    """The same for images whose means over patches of p x p pixels are known."""
    Q = orthogonal([1 / p] * p**2).to(like)  # App. D
    mask = (torch.arange(p**2, device=like.device) > 0).to(like)[:, None, None]

    def A(x):  # (B, C, H, W) -> (B, C, p², H/p, W/p)
        return torch.einsum("bcmhw,mk->bckhw", F.pixel_unshuffle(x, p).unflatten(1, (-1, p**2)), Q)

    def A_inverse(y):
        return F.pixel_shuffle(torch.einsum("bcmhw,km->bckhw", y, Q).flatten(1, 2), p)

    return mask, A, A_inverse


def grey(x):
    """Colour images (B, 3, H, W) -> the same in grey, three equal channels."""
    weights = torch.tensor([0.2989, 0.5870, 0.1140]).to(x)[:, None, None]  # App. D
    return (weights * x).sum(1, keepdim=True).expand_as(x)


def slerp(z_1, z_2, alpha):
    """Spherical interpolation from z_1 (alpha = 0) to z_2 (alpha = 1), (B, ...); alpha (B,)."""
    cosine = F.cosine_similarity(z_1.flatten(1), z_2.flatten(1), dim=1)
    psi = torch.arccos(cosine)  # App. D
    a, b = torch.sin((1 - alpha) * psi) / psi.sin(), torch.sin(alpha * psi) / psi.sin()
    return bcast(a, z_1) * z_1 + bcast(b, z_2) * z_2  # App. D


# ---- Training -----------------------------------------------------------------------------------


class Networks(nn.Module):
    """The online network, its target and the frozen teacher: one module, hence one checkpoint."""

    def __init__(self, online, teacher=None):
        super().__init__()
        self.online = online
        self.target = copy.deepcopy(online).requires_grad_(False)
        self.teacher = teacher and teacher.requires_grad_(False)

    def forward(self, x, t, y, name="online"):
        return getattr(self, name)(x, t, y)

    def start_from(self, teacher):
        """All three take the weights of a trained teacher (App. C)."""
        for net in (self.online, self.target, self.teacher):
            net.load_state_dict(teacher.state_dict())

    @torch.no_grad()
    def update_target(self, mu):
        """theta^- <- stopgrad(mu theta^- + (1 - mu) theta)."""
        pair = [list(net.parameters()) for net in (self.target, self.online)]
        torch._foreach_lerp_(*pair, 1 - mu)  # Eq. 8

    def functions(self, cfg, y, call=None):
        """f, f_target and D of these networks for examples of classes y (B,), if they see classes;
        called through `call` (Run.model in training)."""

        def net(name):
            return lambda x, t: (call or self)(x, t, y, name)

        f, f_target = (parameterised(net(name), cfg.sigma_data) for name in ("online", "target"))
        return f, f_target, parameterised(net("teacher"), cfg.sigma_data, eps=0.0)


def bounds(cfg):
    """s_0 and s_1 of consistency training."""
    s_0, s_1 = BOUNDS[cfg.method]
    return cfg.s_0 or s_0, cfg.s_1 or s_1


def schedule(cfg, k):
    """N(k) and mu(k) of cfg's method."""
    if cfg.method == "cd":
        return cfg.N, cfg.mu
    s_0, s_1 = bounds(cfg)
    if cfg.method == "ict":
        return improved_N_of(k, cfg.steps, s_0, s_1), 0.0
    N = N_of(k, cfg.steps, s_0, s_1)
    return N, mu_of(N, s_0, cfg.mu_0)


def train(cfg, run, data, d=None):
    """Alg. 2, Alg. 3 and improved consistency training; d replaces the metric, say by LPIPS."""
    d = d or METRICS[cfg.metric or ("huber" if cfg.method == "ict" else "l2")]
    weighting = cfg.weighting or ("one" if cfg.method == "ct" else "step")
    grids = functools.cache(lambda N: karras_grid(N).to(run.device))
    for x, y in run.batches(data):  # x ~ p_data
        f, f_target, D = run.net.functions(cfg, y, run.model)
        k = run.done
        if k:  # here, since run.step has saved before it could be done
            run.net.update_target(schedule(cfg, k - 1)[1])  # Eq. 8
        N, _ = schedule(cfg, k)
        grid = grids(N)
        if cfg.method == "ict":
            n = lognormal_probabilities(grid).multinomial(len(x), replacement=True)  # iCT
        else:
            n = torch.randint(N - 1, (len(x),), device=x.device)  # n ~ U[1, N-1], from 0 here
        t, t_next = grid[n], grid[n + 1]
        z = torch.randn_like(x)
        weight = 1 / (t_next - t) if weighting == "step" else 1.0  # iCT
        if cfg.method == "cd":
            loss = cd_loss(f, f_target, D, x, z, t, t_next, d, weight, cfg.solver)  # Alg. 2
        else:
            loss = ct_loss(f, f_target, x, z, t, t_next, d, weight)  # Alg. 3
        run.step(loss)


def network(cfg, data):
    return common.network(cfg, data, num_classes=data.num_classes if cfg.class_conditional else 0)


def train_teacher(cfg, device, data):
    """The EDM that is distilled, a stage of its own -> its averaged network."""
    net = network(dataclasses.replace(cfg, dropout=cfg.teacher_dropout), data)
    optimizer = "adam" if cfg.optimizer == "radam" else "muon"
    run = common.Run(cfg, net, device, stage="teacher", optimizer=optimizer)
    steps = cfg.teacher_steps
    run.cfg = dataclasses.replace(cfg, steps=steps, lr=cfg.teacher_lr, warmup=steps // 20)
    for x, y in run.batches(data):
        D = parameterised(lambda x, t, y=y: run.model(x, t, y), cfg.sigma_data, eps=0.0)
        run.step(edm_loss(D, x, torch.randn_like(x), cfg.P_mean, sigma_data=cfg.sigma_data))
    return run.ema


def prepare(cfg, device, data):
    """The run, ready for `train`: with cd its teacher is trained first, and is its start."""
    plain = dataclasses.replace(cfg, dropout=0.0)
    teacher = network(plain, data) if cfg.method == "cd" else None
    nets = Networks(network(cfg, data), teacher)

    def radam(parameters):
        trained = [p for p in parameters if p.requires_grad]
        betas = 0.9, cfg.beta_2
        return torch.optim.RAdam(trained, lr=cfg.lr, betas=betas, foreach=True)  # App. C

    run = common.Run(cfg, nets, device, optimizer=radam if cfg.optimizer == "radam" else "muon")
    if teacher and cfg.sample and run.done == 0 < cfg.steps:
        raise UserError(f"{cfg.sample} is from before the first step: go on with --resume")
    if teacher and run.done == 0 and not cfg.sample:
        run.save()  # --resume finds the settings here, should the teacher be interrupted
        trained = train_teacher(cfg, device, data)
        for each in (run.net, run.ema):
            each.start_from(trained)
        torch.manual_seed(common.process_seed(cfg))  # whether the teacher was trained or loaded
        run.save()
    return run


# ---- Evaluation ---------------------------------------------------------------------------------


def distance(x, reference, blocks=10):
    """Energy distance of two sets of points, (N, ...) and (M, ...), and its standard error.

    The mean over blocks of points: unbiased, so negative half of the time where the truth is 0.
    """
    blocks = min(blocks, len(x) // 2, len(reference) // 2)
    pairs = zip(*(v.flatten(1).tensor_split(blocks) for v in (x, reference)), strict=True)
    values = torch.tensor([common.energy_distance(a, b) for a, b in pairs])
    return values.mean().item(), common.standard_error(values)


def choose_times(cfg, run, data):
    """Greedy time points for cfg.nfe evaluations; the energy distance stands for the FID."""
    reference, y = data.batch(min(cfg.examples, 1_000 if data.is_image else 4_000))
    reference = reference.flatten(1)

    def f(x, t):  # in parts, as in `evaluate`
        parts = zip(*(v.split(cfg.batch_size) for v in (x, t, y)), strict=True)
        return torch.cat([run.ema.functions(cfg, y)[0](x, t) for x, t, y in parts])

    x_T = T * torch.randn(len(reference), *data.shape, device=run.device)

    def score(x):
        return common.energy_distance(x.flatten(1), reference)

    times = greedy_times(f, x_T, score, cfg.nfe - 1)
    run.say("time points: " + (", ".join(f"{tau:.3g}" for tau in times) or "none"))
    return times


def evaluate(cfg, run, data, times):
    """Noise x_T, and {title: (samples from it, energy distance to held-out data, its error)}."""

    def f(y):
        return run.ema.functions(cfg, y)[0]

    def D(y):
        return run.ema.functions(cfg, y)[2]

    x_T = T * torch.randn(cfg.examples, *data.shape, device=run.device)
    y = data.draw_labels(cfg.examples)
    test = common.to_float(data.test[: max(cfg.examples, 10_000)])
    samplers = {"data": (0, lambda x, y: data.batch(len(x))[0])}  # the floor: other points of it
    if cfg.method == "cd":
        grid = karras_grid(18)  # Karras et al. 2022
        samplers["teacher, 34 evaluations"] = 34, lambda x, y: solve_ode(D(y), x, grid)
    for k in range(1, cfg.nfe + 1):
        title = f"{k} evaluation{'s' * (k > 1)}"
        samplers[title] = k, lambda x, y, k=k: sample(f(y), x, times[: k - 1])
    results = {}
    for title, (nfe, sampler) in samplers.items():
        parts = zip(x_T.split(cfg.batch_size), y.split(cfg.batch_size), strict=True)
        x = torch.cat([sampler(*part) for part in parts])
        value, error = distance(x, test)
        run.report(title, evaluations=nfe, energy_distance=value, standard_error=error)
        results[title] = x, value, error
    if cfg.method == "cd":
        error = results["1 evaluation"][0] - results["teacher, 34 evaluations"][0]
        run.report("1 evaluation", distance_from_teacher=error.flatten(1).norm(dim=1).mean().item())
    return x_T, results


def picture_vectors(run, x_T, results):
    """Above, densities; below, where each sampler sends noise of each colour."""
    bound = 1.3 * results["data"][0][:10_000].abs().max().item()
    above = [(title, common.density_image(x, bound)) for title, (x, *_) in results.items()]
    z = x_T[:3_000].cpu() / T
    hue = torch.atan2(z[:, 1], z[:, 0]).rad2deg() % 360
    colours = [f"hsl({angle:.0f}, 75%, 50%)" for angle in hue.tolist()]
    below = []
    for title, (x, *_) in results.items():
        title, x = ("the noise", z) if title == "data" else (f"{title.split(',')[0]}, by noise", x)
        dots = ("dots", x[: len(z)].cpu(), colours, 1.5)
        below.append((title, common.chart([dots], (-bound, bound, -bound, bound))))
    common.save_panels(run.folder / "samples.png", above, below)


def tile(x, columns):
    return common.image_grid(x, columns, scale=max(1, 56 // x.shape[-1]))


def picture_editing(f, y):
    """Pictures of App. D's uses, titled, from held-out images y (B, C, H, W)."""
    panels, side = [], y.shape[-1]
    times = karras_grid(40).flip(0).tolist()  # App. D

    def show(title, *columns):
        panels.append((title, tile(torch.stack(columns, dim=1).flatten(0, 1), len(columns))))

    def complete(title, mask, A=same, A_inverse=same, given=None):
        given = A_inverse(A(y) * (1 - mask)) if given is None else given
        show(title, y, given, *(edit(f, y, times, mask, A, A_inverse) for _ in range(2)))

    lower = torch.arange(side, device=y.device)[:, None] >= side // 2
    complete("inpainting", lower.to(y))
    complete("super-resolution", *super_resolution(y, math.gcd(side, 4)))
    if y.shape[1] == 3:
        complete("colourisation", *colourisation(y), given=grey(y))
    blurred = F.avg_pool2d(y, 3, 1, 1, count_include_pad=False)
    paint = (1.5 * (blurred + 1)).round() / 1.5 - 1  # in four shades
    times_2 = [5.38 * side / 256, 2.24 * side / 256]  # App. D, Departure 1
    drawn = [edit(f, paint, times_2, torch.ones_like(y), start=paint) for _ in range(2)]
    show("strokes", y, paint, *drawn)
    noisy = [(sigma, y + sigma * torch.randn_like(y)) for sigma in (0.5, 1.5)]
    show("denoising", *(image for sigma, x in noisy for image in (x, f(x, at(sigma, x)))))
    z_1, z_2 = torch.randn(2, *y.shape, device=y.device)
    between = [T * slerp(z_1, z_2, at(i / 7, y)) for i in range(8)]
    show("interpolation", *(f(x_T, at(T, y)) for x_T in between))
    return panels


def compare(cfg, data, device):
    """Distillation, improved and plain consistency training: as many steps, the teacher's too."""
    rows = []
    for method in ("cd", "ict", "ct"):
        steps = cfg.steps + (cfg.teacher_steps if method != "cd" else 0)
        out = common.free_folder(f"{cfg.out}/{method}")
        here = dataclasses.replace(cfg, compare=False, method=method, steps=steps, out=out)
        run = prepare(here, device, data)
        run.say(f"training by {method}")
        train(here, run, data)
        _, results = evaluate(here, run, data, choose_times(here, run, data))
        for title, (_, value, error) in results.items():
            rows.append(f"{method:>4}  {title:<24}{1e3 * value:9.2f} ± {1e3 * (error or 0):.2f}")
    print("1000 times the energy distance to held-out data, ± standard error")
    print("\n".join(rows))


def draw(cfg, run, data, times, n):
    """n samples and their classes, as frequent as in the training set; None if f sees no class."""
    x_T = T * torch.randn(n, *data.shape, device=run.device)
    y = data.draw_labels(n) if cfg.class_conditional else None
    f, _, _ = run.ema.functions(cfg, y)
    return sample(f, x_T, times), y


# ---- The command line ---------------------------------------------------------------------------


def check(cfg, data):
    """Refuse settings that do not go together."""
    if cfg.N < 2:
        raise UserError("--N 1: a grid of times has two points at least")
    for method in ("ict", "ct") if cfg.compare else {cfg.method} - {"cd"}:
        s_0, s_1 = bounds(dataclasses.replace(cfg, method=method))
        least = 2 if method == "ct" else 1
        if not least <= s_0 <= s_1:
            raise UserError(f"--s-0 {s_0} --s-1 {s_1}: {method} wants {least} <= s-0 <= s-1")
    if min(cfg.examples, len(data.test)) < 2:
        counts = f"--examples {cfg.examples}, and {cfg.dataset} holds out {len(data.test)}"
        raise UserError(f"{counts}: an energy distance takes two of each at least")
    if cfg.compare and (cfg.resume or cfg.sample or cfg.num_samples or "RANK" in os.environ):
        raise UserError("--compare trains anew, in one process, and writes no samples")


def main(cfg):
    device = common.setup(cfg)
    data = common.load_data(cfg, device)
    check(cfg, data)
    if cfg.compare:
        compare(cfg, data, device)
        return
    run = prepare(cfg, device, data)
    if not cfg.sample:
        train(cfg, run, data)
    if not run.finish():
        return
    times = choose_times(cfg, run, data)
    x_T, results = evaluate(cfg, run, data, times)
    if data.is_image:
        panels = [(title, tile(x[:64], 8)) for title, (x, *_) in results.items()]
        common.save_panels(run.folder / "samples.png", panels)
        f, _, _ = run.ema.functions(cfg, data.test_labels[:8])
        edited = picture_editing(f, common.to_float(data.test[:8]))
        common.save_panels(run.folder / "editing.png", edited)
        run.say(f"see {run.folder / 'editing.png'}")
    else:
        picture_vectors(run, x_T, results)
    if cfg.num_samples:
        run.write_samples(lambda n: draw(cfg, run, data, times, n))
    run.say(f"see {run.folder / 'samples.png'}")


if __name__ == "__main__":
    common.cli(main, Config, PRESETS)
