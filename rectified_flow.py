"""Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow.
Liu, Gong, Liu, arXiv 2209.03003v1 (the numbers below are that version's)

Implements  Alg. 1, Alg. 2, Alg. 3, Alg. 4 (main, train, sample, reflow); Eq. 1 (objective, on any
            coupling); Eq. 3 (straightness); Eq. 4 (v^X in closed form); Eq. 5, Sec. 5.1
            (nearest-neighbour estimate); Eq. 6 (nonlinear interpolation); Eq. 7, Eq. 8 (VP and
            sub-VP ODE), Fig. 5 (VP at constant speed); Theorem 3.5 (convex costs); Eq. 12, Eq. 13
            (V, descent of the cost); Eq. 20 (transfer of style); Sec. 2.2 (smoothing, one-step
            distillation); App. A (distillation to k steps, CIFAR-10); Fig. 3 (picture)
Conventions t = 0 is the source, X_0 ~ pi_0: noise or data; t = 1 is the target, X_1 ~ pi_1: data.
            A field is v(x, t). Euler's N steps evaluate it at t = 0, 1/N, ... (N - 1)/N, not N/N.
Departures  1. Eq. 13 has the squares of its proof, c(x) = |x|^2; without them it does not hold.
            2. One-step distillation is by L2; the paper's LPIPS is a metric to pass to `rectify`.
            3. Alg. 2 initialises the model in every round, App. A fine-tunes the one before: here
               its moving average, in the official code its weights.
            4. In 2-D a residual MLP with Fourier features; Fig. 2 to Fig. 5 have Eq. 5's estimate.
            5. The U-Net is Dhariwal & Nichol's, in DDPM++'s sizes on CIFAR-10, t embedded up to 30
               radians. On small images it sees patches of 2 x 2 pixels; Muon trains its kernels.
            6. Eq. 4, Eq. 5 and Eq. 20 are functions, which no flag calls. Left out: VE ODE,
               Sec. 5.4, FID, the cost above that of the optimal assignment.
Run         python rectified_flow.py   noise to eight Gaussians: S 1.47, then 0.0004; E|.|^2 6.11 of
                                       the coupling, then 0.869, 0.865; 90 s on one core
            python rectified_flow.py --source moons --dataset two_spirals data to data
            python rectified_flow.py --interpolation vp                   VP does not straighten
            python rectified_flow.py --dataset mnist                      digits in one step
            python rectified_flow.py --dataset mnist --classes 3,8        threes become eights
            torchrun --nproc_per_node 8 rectified_flow.py --dataset cifar10   App. A; not run here
"""

import copy
import dataclasses
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
from common import Count, Natural, Positive, Sizes, UserError, bcast

Classes = Annotated[tuple, lambda v: len(v) == 2 and min(v) >= 0, "two labels such as 3,8"]


@dataclass
class Config(common.Config):
    dataset: str = "eight_gaussians"  # target pi_1: a data set's name, or a folder of images
    source: str = "noise"  # source pi_0: noise, a data set's name, or a folder of images
    classes: Classes | None = None  # A,B: from the source's class A (of --dataset if noise) to B
    smoothing: Positive | None = None  # deviation of the noise added to a source of data (Sec. 2.2)
    steps: Natural = 5_000  # optimisation steps of the first round
    later: Positive = 0.5  # share of --steps that every later round takes, and the distillation
    batch_size: Count = 512  # examples per step, over all processes together
    lr: Positive = 4e-3  # peak learning rate of Adam
    optimizer: Literal["adam", "muon"] = "adam"  # muon: for the kernels of convolutions
    interpolation: Literal["linear", "vp", "sub-vp", "vp-speed"] = "linear"  # X_t (Sec. 2.3)
    rounds: Count = 2  # K: rectify K times, each time on the pairs of the flow before (Alg. 4)
    pairs: Count = 20_000  # simulated pairs (Z_0, Z_1) that a later round learns from
    distill: Natural = 1  # Euler steps k of the model distilled in the end (App. A); 0: none
    solver: Literal["euler", "dopri5"] = "euler"  # full simulation (Sec. 5: Euler, or RK45)
    nfe: Count = 100  # N, Euler's steps of a full simulation (Sec. 5.1)
    tol: Positive = 1e-5  # atol = rtol of dopri5; official code
    width: Count = 128  # units of the MLP, or base channels of the U-Net
    blocks: Count = 2  # residual blocks, of the MLP or of each level of the U-Net
    mult: Sizes = (1, 2, 2, 2)  # channel multiple of each level of the U-Net
    attention: Sizes | None = None  # resolutions with attention, but for the middle block
    patch: Count = 1  # side of the patches of pixels that the U-Net sees as channels
    dropout: common.Fraction = 0.0  # of the U-Net

    learned = (*common.Config.learned, "source", "classes", "smoothing", "interpolation")


SMALL_IMAGES = common.SMALL_UNET | {  # minutes on two cores
    "steps": 5_000,
    "later": 1 / 5,
    "pairs": 3_000,
    "nfe": 16,
}
PRESETS = dict.fromkeys(("glyphs", "mnist", "fashion_mnist", "folder"), SMALL_IMAGES) | {
    "cifar10": {  # App. A, where nothing else is said
        "steps": 800_000,  # official code: the published checkpoint
        "later": 3 / 8,  # 300,000 steps; how many the distillation takes is not stated
        "pairs": 4_000_000,
        "batch_size": 128,  # official code
        "lr": 2e-4,
        "warmup": 5_000,  # official code
        "decay": "constant",  # official code
        "ema": 0.999999,
        "flip": True,  # official code
        "solver": "dopri5",  # official code; Sec. 5's default, Euler, would need its N
        "blocks": 4,  # DDPM++'s in official code, like attention, width and mult
        "attention": (16,),
        "dropout": 0.15,
    },
}


# ---- Interpolations (Sec. 2.1, Sec. 2.3) --------------------------------------------------------


class Linear:
    """X_t = alpha_t X_1 + beta_t X_0, here with alpha_t = t and beta_t = 1 - t: straight lines.

    A subclass gives other `coefficients(t)`: alpha_t, beta_t and their time derivatives, of t's
    shape. x_0, x_1 are (B, ...), t is (B,) in [0, t_max].
    """

    t_max = 1.0

    def coefficients(self, t):
        one = torch.ones_like(t)
        return t, 1 - t, one, -one

    def interpolate(self, x_0, x_1, t):
        """X_t and its time derivative, both (B, ...)."""
        alpha, beta, d_alpha, d_beta = self.coefficients(bcast(t, x_1))
        return alpha * x_1 + beta * x_0, d_alpha * x_1 + d_beta * x_0


class VP(Linear):
    """The VP ODE of Song et al. (2021) and the continuous DDIM, as a nonlinear rectified flow."""

    a, b = 19.9, 0.1  # Eq. 7
    t_max = 1 - 1e-3  # at t = 1 d beta / dt is infinite; here beta is 0.01

    def alpha(self, t):
        """alpha_t, its time derivative and 1 - alpha_t²."""
        log_alpha = -self.a / 4 * (1 - t) ** 2 - self.b / 2 * (1 - t)  # Eq. 7
        alpha = torch.exp(log_alpha)
        return alpha, alpha * (self.a * (1 - t) + self.b) / 2, -torch.expm1(2 * log_alpha)

    def coefficients(self, t):
        alpha, d_alpha, rest = self.alpha(t)
        beta = torch.sqrt(rest)  # Eq. 8: sqrt(1 - alpha²)
        return alpha, beta, d_alpha, -alpha * d_alpha / beta


class SubVP(VP):
    t_max = 1.0

    def coefficients(self, t):
        alpha, d_alpha, beta = self.alpha(t)  # Eq. 8: beta = 1 - alpha²
        return alpha, beta, d_alpha, -2 * alpha * d_alpha


class ConstantSpeedVP(VP):
    """The VP ODE's curves at a uniform speed: alpha_t = t (Fig. 5, last column)."""

    t_max = 1 - 1e-5  # where beta, the square root of 1 - t², is 0.004

    def coefficients(self, t):
        beta = torch.sqrt((1 - t) * (1 + t))
        return t, beta, torch.ones_like(t), -t / beta


LINEAR = Linear()
INTERPOLATIONS = {"linear": Linear, "vp": VP, "sub-vp": SubVP, "vp-speed": ConstantSpeedVP}


# ---- The field without a network ----------------------------------------------------------------


def closed_form_velocity(z, t, x_1, log_rho):
    """v^X(z, t), (B, D), for X_1 uniform on the rows of x_1 (M, D); z (B, D), t (B,) in [0, 1).

    log_rho(x_0, x_1) -> (B, M) is the log density of X_0 given X_1, x_0 being (B, M, D).
    """
    t, z = t[:, None, None], z[:, None]
    eta = log_rho((z - t * x_1) / (1 - t), x_1).softmax(dim=1)  # Eq. 4: eta_t(x_1, z) / M
    return (eta[..., None] * (x_1 - z) / (1 - t)).sum(dim=1)  # Eq. 4


def nearest_neighbour_velocity(z, t, x_0, x_1, h=1.0, m=100):
    """v^X(z, t), (B, D), estimated from draws x_0, x_1 (n, D) of a coupling; t (B,) in [0, 1).

    A Gaussian kernel of bandwidth h, over the m nearest of the X_t (Sec. 5.1: h = 1, m = 100).
    """
    t = t[:, None, None]
    distance = (t * x_1 + (1 - t) * x_0 - z[:, None]).square().sum(dim=2)  # (B, n)
    distance, nearest = distance.topk(min(m, len(x_0)), dim=1, largest=False)  # (B, m)
    omega = (-distance / (2 * h**2)).softmax(dim=1)
    return (omega[..., None] * (x_1[nearest] - z[:, None]) / (1 - t)).sum(dim=1)  # Eq. 5


# ---- Losses -------------------------------------------------------------------------------------
# v(x, t) is a field; (x_0, x_1) are draws of a coupling, (B, ...); t is (B,).


def squared_error(v, x_0, x_1, t, interpolation=LINEAR):
    """|dX_t/dt - v(X_t, t)|² for each pair, (B,). Its mean is Eq. 1, and V(X_0, X_1) if v = v^X."""
    x_t, dx_t = interpolation.interpolate(x_0, x_1, t)
    return (dx_t - v(x_t, t)).square().flatten(1).sum(1)  # Eq. 1; Eq. 6 with w_t = 1; Eq. 12


def rectified_flow_loss(v, x_0, x_1, t, interpolation=LINEAR):
    """Alg. 2's loss: Eq. 1 as a mean over the dimensions too."""
    return squared_error(v, x_0, x_1, t, interpolation).mean() / x_0[0].numel()


def feature_loss(v, h, x_0, x_1, t):
    """For transfer of style: an error of v counts as far as it changes features h(x), (B, ...)."""
    x_t, dx_t = LINEAR.interpolate(x_0, x_1, t)
    _, dh_t = torch.func.jvp(h, (x_t,), (dx_t - v(x_t, t),))
    return dh_t.flatten(1).square().sum(1).mean()  # Eq. 20


def distillation_loss(v, z_0, z_1, k=1, metric=F.mse_loss):
    """To carry z_0 to z_1 in k Euler steps; if k = 1, by any metric(prediction, z_1) -> scalar."""
    t = torch.randint(k, (len(z_0),), device=z_0.device) / k  # App. A: 0, 1/k, ... (k - 1)/k
    if k > 1:
        return rectified_flow_loss(v, z_0, z_1, t)
    return metric(z_0 + v(z_0, t), z_1)  # Sec. 2.2; L2 is Eq. 1 at t = 0


# ---- Simulation and what it measures ------------------------------------------------------------


def simulate(v, z, times=(0.0, 1.0), **solver):
    """Follow dZ_t = v(Z_t, t) dt: from pi_0 to pi_1, or back with times (1, 0). -> (Z, NFE)."""
    with torch.no_grad():
        return common.odeint(v, z, times, **solver)  # Alg. 3


def straightness(z, times):
    """The integral of |Z_1 - Z_0 - dZ_t/dt|² for each path, (B,): its mean is S(Z).

    z: paths (T, B, ...) of straight steps between the times (T,), as Euler's are. Of curved ones it
    sees mean velocities alone: a lower bound.
    """
    steps = times.to(z).diff()[:, None]  # (T - 1, 1)
    velocity = z.diff(dim=0).flatten(2) / steps[..., None]
    chord = (z[-1] - z[0]).flatten(1) / (times[-1] - times[0]).item()
    return (steps * (chord - velocity).square().sum(2)).sum(0)  # Eq. 3


def transport_cost(z_0, z_1, power):
    """c(z_1 - z_0) = |z_1 - z_0|^power, (B,); convex for a power of at least 1 (Theorem 3.5)."""
    return (z_1 - z_0).flatten(1).norm(dim=1) ** power


# ---- Couplings ----------------------------------------------------------------------------------


class Noise:
    """N(0, I) as a source."""

    def __init__(self, shape, device):
        self.shape, self.device = shape, device

    def draw(self, n, generator=None):
        return torch.randn(n, *self.shape, device=self.device, generator=generator)


class Examples:
    """A data set (N, ...) as a source or target, flipped, smoothed. Drawn with replacement, or if
    `distinct`, as far as it goes, without: an energy distance is unbiased by distinct points."""

    def __init__(self, x, flip=False, smoothing=None, distinct=False):
        self.x, self.flip, self.smoothing, self.distinct = x, flip, smoothing, distinct

    def draw(self, n, generator=None):
        options = {"device": self.x.device, "generator": generator}
        if self.distinct and n <= len(self.x):
            index = torch.randperm(len(self.x), **options)[:n]
        else:
            index = torch.randint(len(self.x), (n,), **options)
        x = common.to_float(self.x[index])
        if self.flip:
            x = common.mirrored(x, generator)
        if self.smoothing:
            x = x + self.smoothing * torch.randn(x.shape, **options)  # Sec. 2.2: X_0 + xi
        return x


class Independent:
    """(X_0, X_1) ~ pi_0 x pi_1, the coupling of unpaired data."""

    def __init__(self, pi_0, pi_1):
        self.pi_0, self.pi_1 = pi_0, pi_1

    def batch(self, n):
        return self.pi_0.draw(n), self.pi_1.draw(n)


class Pairs:
    """Draws (Z_0, Z_1) of a flow's coupling, (N, ...)."""

    def __init__(self, z_0, z_1):
        self.z_0, self.z_1 = z_0, z_1

    def batch(self, n):
        index = torch.randint(len(self.z_0), (n,), device=self.z_0.device)
        return self.z_0[index].float(), self.z_1[index].float()


# ---- Training -----------------------------------------------------------------------------------


def rectify(cfg, net, pi_0, pi_1, device, metric=F.mse_loss):
    """Alg. 1 with its Reflow and Distill: cfg.rounds rounds, then the last flow is distilled.
    Yields every Run.

    A round simulates its pairs only if it has steps to do, and from a random stream of its own: a
    run that is resumed learns from the same pairs. `metric`: of the one-step distillation.
    """
    interpolation, run = INTERPOLATIONS[cfg.interpolation](), None
    coupling = Independent(pi_0, pi_1)
    for stage in stages(cfg):  # Alg. 4
        before = run
        if before:
            net = copy.deepcopy(before.ema).requires_grad_()  # a warm start: Departure 3
        steps = math.ceil(cfg.later * cfg.steps)
        here = dataclasses.replace(cfg, steps=steps) if stage else cfg
        run = common.Run(here, net, device, stage, cfg.optimizer)
        if before and run.done < steps and not cfg.sample:
            n = math.ceil(cfg.pairs / common.world_size())
            rng = random_stream(cfg, device, f"pairs for {stage}")
            coupling = simulate_pairs(before, pi_0, n, rng)  # Alg. 3
        for x_0, x_1 in [] if cfg.sample else run.batches(coupling):  # Alg. 2
            if stage == "distilled":
                loss = distillation_loss(run.model, x_0, x_1, cfg.distill, metric)
            else:
                t = interpolation.t_max * torch.rand(len(x_0), device=device)  # (B,)
                loss = rectified_flow_loss(run.model, x_0, x_1, t, interpolation)  # Eq. 1, Eq. 6
            run.step(loss)
        yield run


def stages(cfg):
    """The trainings' names, which their checkpoints bear; that of the first round is empty.

    With --sample, those that the run has come to.
    """
    later = [f"reflow-{k}" for k in range(2, cfg.rounds + 1)]
    later += ["distilled"] if cfg.distill else []
    if cfg.sample:
        files = [Path(cfg.sample).with_name(f"checkpoint-{stage}.pt") for stage in later]
        later = [stage for stage, file in zip(later, files, strict=True) if file.exists()]
    return ["", *later]


def random_stream(cfg, device, purpose):
    """A generator for one purpose: the same when a run is resumed, another in each process."""
    seed = zlib.crc32(f"{purpose}, seed {cfg.seed}, process {common.rank()}".encode())
    return torch.Generator(device).manual_seed(seed)


def velocity(run):
    """v(x, t) by a run's averaged weights; Euler's steps in bfloat16 if the training is.

    Not so those of an adaptive solver, which would chase the rounding.
    """
    half = run.amp and run.cfg.solver == "euler"

    def v(x, t):
        with torch.autocast(run.device.type, torch.bfloat16, enabled=half):
            return run.ema(x, t)

    return v


def full_simulation(run):
    """The last time and the solver of a run's full simulation; the distilled model's k steps."""
    if run.stage == "distilled":
        return 1.0, {"method": "euler", "steps": run.cfg.distill}
    return INTERPOLATIONS[run.cfg.interpolation].t_max, common.solver_options(run.cfg)


def draw(run, pi_0, n, generator=None):
    """n pairs (z_0, z_1) of a run's flow, each (n, ...)."""
    z_0 = pi_0.draw(n, generator)
    t_1, solver = full_simulation(run)
    return z_0, simulate(velocity(run), z_0, (0.0, t_1), **solver)[0]


def simulate_pairs(run, pi_0, n, generator):
    """n Pairs of a run's flow, simulated in batches; images are kept in half precision."""
    batch, z = 4 * run.cfg.batch_size, None
    for i in tqdm(range(0, n, batch), "pairs", disable=common.rank() > 0, leave=False):
        pair = torch.stack(draw(run, pi_0, min(batch, n - i), generator))  # (2, B, ...)
        if z is None:
            dtype = torch.float16 if pair.ndim == 5 else pair.dtype
            z = pair.new_empty(2, n, *pair.shape[2:], dtype=dtype)
        z[:, i : i + batch] = pair
    return Pairs(*z)


# ---- Evaluation ---------------------------------------------------------------------------------

HELD_OUT = {"images": 256, "vectors": 5_000}  # draws to measure by
POWERS = (1, 2, 4)  # of the costs c(x) = |x|^p
FEW = (1, 2, 4, 8)  # Euler steps
COLUMNS = ["S", "V", "S+V", "descent", *(f"E|.|^{p}" for p in POWERS)]
COLUMNS += [*(f"N={n}" for n in FEW), "full"]


@dataclass
class Round:
    """A flow's paths (T, B, ...) from held-out x_0, where few-step paths end, and its figures."""

    name: str
    paths: torch.Tensor
    ends: dict
    figures: dict

    def row(self):
        return f"{self.name:<12}" + "".join(map(self._cell, COLUMNS))

    def _cell(self, column):
        x = self.figures.get(column)
        return f"{'-':>9}" if x is None else f"{x:9.4f}" if abs(x) < 1000 else f"{x:9.3g}"


def measure(run, x_0, x_1, z_1):
    """The figures of a flow, from held-out draws: one row of the table.

    S and V, by v for v^X, of the flow and of the coupling (x_0, z_1) that it rectifies; S+V and the
    descent of E|.|^2, which are equal for an exact flow. E|.|^p: the flow's transport costs. N=n:
    energy distance between x_1 and the ends of n Euler steps; full: of the full simulation.
    """
    cfg, v = run.cfg, velocity(run)
    t_1, solver = full_simulation(run)
    times = torch.linspace(0, t_1, solver.get("steps", cfg.nfe) + 1)
    one_each = {"steps": 1} if "steps" in solver else {}
    paths, nfe = simulate(v, x_0, times, **solver | one_each)  # (T, B, ...)
    if run.stage == "distilled":
        column = f"N={cfg.distill}" if cfg.distill in FEW else "full"
        name, ends, figures = run.stage, {column: paths[-1]}, {}
    else:
        name = f"{run.stage.removeprefix('reflow-') or 1}-rectified"
        few = {n: simulate(v, x_0, (0.0, t_1), method="euler", steps=n)[0] for n in FEW}
        ends = {f"N={n}": end for n, end in few.items()} | {"full": paths[-1]}
        figures = {"evaluations": nfe, "S": straightness(paths, times).mean().item()}
        if cfg.interpolation == "linear":
            figures["V"] = stratified_squared_error(v, x_0, z_1)
            figures["S+V"] = figures["S"] + figures["V"]
            fall = transport_cost(x_0, z_1, 2) - transport_cost(x_0, paths[-1], 2)
            figures["descent"] = fall.mean().item()  # Eq. 13
    figures |= costs(x_0, paths[-1])
    for column, end in ends.items():
        figures[column] = common.energy_distance(end.flatten(1), x_1.flatten(1))
    return Round(name, paths, ends, figures)


def costs(z_0, z_1):
    return {f"E|.|^{p}": transport_cost(z_0, z_1, p).mean().item() for p in POWERS}


def stratified_squared_error(v, x_0, x_1, times=8):
    """The mean of Eq. 1 over pairs, each of them at some evenly spaced times."""
    t = torch.arange(len(x_0), device=x_0.device) / len(x_0)
    with torch.no_grad():
        errors = [squared_error(v, x_0, x_1, (t + i / times) % 1).mean() for i in range(times)]
    return torch.stack(errors).mean().item()


# ---- Pictures -----------------------------------------------------------------------------------

PURPLE, RED, BLUE, LIGHT_RED, GREY = "#6e28aa", "#e12d28", "#1e50c86e", "#e12d2878", "#0000002d"


def vector_picture(path, rounds):
    """Above, paths from pi_0 (purple) to pi_1 (red) as in Fig. 3; below, what few steps reach."""
    x_0, x_1 = rounds[0].paths
    bound = 1.1 * torch.cat([x_0, x_1]).abs().flatten().quantile(0.997).item()
    box, size = (-bound, bound, -bound, bound), (320, 320)
    above, below = [], []
    for r in rounds:
        title = f"{r.name}: E|.|^2 = {r.figures['E|.|^2']:.3f}"
        title += f", S = {r.figures['S']:.4f}" if "S" in r.figures else ""
        shown = r.paths[:, :200]
        shapes = [("line", line, BLUE, 1) for line in shown.unbind(1)]
        shapes += [("dots", shown[0], PURPLE, 2.5), ("dots", shown[-1], RED, 2.5)]
        above.append((title, common.chart(shapes, box, size)))
        title, end = next(iter(r.ends.items()))
        if title in r.figures:
            title += f": energy distance {r.figures[title]:.4f} (grey: data)"
        shapes = [("dots", x_1[:2500], GREY, 2), ("dots", end[:2500], LIGHT_RED, 2)]
        below.append((title, common.chart(shapes, box, size)))
    common.save_panels(path, above, below)


def image_picture(path, rounds, show_source, columns=8):
    """A panel a round: each column from one x_0 (its top, if it is data), downwards more steps."""
    panels, height = [], None
    for r in rounds:
        rows = ({"x_0": r.paths[0]} if show_source else {}) | r.ends
        height = height or len(rows)  # that of the first panel, filled up from further x_0
        columns = min(columns, len(r.paths[0]))
        whole = len(r.paths[0]) // columns * columns
        x = torch.stack([x[:whole] for x in rows.values()])
        x = x.unflatten(1, (-1, columns)).transpose(0, 1).flatten(0, 2)[: height * columns]
        grid = common.image_grid(x, columns, scale=max(1, 480 // (columns * x.shape[-1])))
        panels.append((f"{r.name}: {', '.join(rows)}", grid))
    common.save_panels(path, panels)


# ---- The command line ---------------------------------------------------------------------------


def load(cfg, device):
    """The target's Data; (pi_0, pi_1) to train on; and the two held out."""
    target = common.load_data(cfg, device)
    if cfg.source == "noise" and not cfg.classes:
        if cfg.smoothing:
            raise UserError("--smoothing is for a source of data, and noise is not: leave it out")
        noise, test = Noise(target.shape, device), Examples(target.test, distinct=True)
        return target, (noise, Examples(target.train, cfg.flip)), (noise, test)
    source = target
    if cfg.source not in ("noise", cfg.dataset):
        source = common.load_data(dataclasses.replace(cfg, dataset=cfg.source), device)
    if source.shape != target.shape:
        shapes = f"{source.name} has the shape {source.shape}, {target.name} {target.shape}"
        raise UserError(f"{shapes}: take data sets alike (--image-size resizes both)")
    couples = []
    for split, flip, distinct in (("train", cfg.flip, False), ("test", False, True)):
        x = [getattr(data, split) for data in (source, target)]
        if cfg.classes:
            labels = [getattr(data, f"{split}_labels") for data in (source, target)]
            x = [x_i[y == label] for x_i, y, label in zip(x, labels, cfg.classes, strict=True)]
        if not all(map(len, x)):
            named = ",".join(map(str, cfg.classes))
            counts = source.num_classes, target.num_classes
            raise UserError(f"--classes {named}: no {split} examples; there are {counts} classes")
        pi_0 = Examples(x[0], flip, cfg.smoothing, distinct)
        couples.append((pi_0, Examples(x[1], flip, distinct=distinct)))
    return target, *couples


def choose(cfg):
    """--sample may name a later round's checkpoint: then go through the rounds up to it."""
    path = Path(cfg.sample)
    stage = path.stem.removeprefix("checkpoint-")
    if stage in stages(cfg)[1:]:
        cfg.sample = str(path.with_name("checkpoint.pt"))
        if stage != "distilled":
            cfg.rounds, cfg.distill = int(stage.removeprefix("reflow-")), 0


def main(cfg):
    device = common.setup(cfg)
    common.solver_options(cfg)
    if cfg.sample:
        choose(cfg)
    file = Path(cfg.sample or f"{cfg.out}/checkpoint.pt").with_name("checkpoint-distilled.pt")
    if cfg.distill and file.exists():
        was = common.load_checkpoint(file, cfg.script, mmap=True)["config"]
        if (was["rounds"], was["distill"]) != (cfg.rounds, cfg.distill):
            flags = f"--rounds {was['rounds']} --distill {was['distill']}"
            raise UserError(f"{file} is of {flags}: keep both, or add --distill 0, or remove it")
    data, couple, held_out = load(cfg, device)
    rng = random_stream(cfg, device, "evaluation")
    n = HELD_OUT["images" if data.is_image else "vectors"]
    few = [len(pi.x) for pi in held_out if isinstance(pi, Examples)]  # and none is drawn twice
    x_0, x_1 = (pi.draw(max(2, min(n, *few)), rng) for pi in held_out)
    rounds = [Round("coupling", torch.stack([x_0, x_1]), {"data": x_1}, costs(x_0, x_1))]
    for run in rectify(cfg, common.network(cfg, data), *couple, device):
        if common.rank():
            continue
        if not run.stage:
            run.say(" " * 12 + "".join(f"{column:>9}" for column in COLUMNS))
            run.say(rounds[0].row())
        rounds.append(measure(run, x_0, x_1, rounds[-1].paths[-1]))
        run.say(rounds[-1].row())
        run.record(split="test", step=run.done, **rounds[-1].figures)
    if not run.finish():
        return
    if data.is_image:
        image_picture(run.folder / "samples.png", rounds[1:], isinstance(held_out[0], Examples))
    else:
        vector_picture(run.folder / "samples.png", rounds)
    if cfg.num_samples:
        run.write_samples(lambda n: draw(run, held_out[0], n)[1])
    run.say(f"see {run.folder / 'samples.png'}")


if __name__ == "__main__":
    common.cli(main, Config, PRESETS)
