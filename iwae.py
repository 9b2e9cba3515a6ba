"""Importance Weighted Autoencoders. Burda, Grosse, Salakhutdinov, arXiv 1509.00519v4

Implements  Eq. 1, Eq. 2 (any number of stochastic layers); Eq. 3, Eq. 7 (VAE, k samples); Eq. 4
            (reparameterisation); Eq. 8 (the k-sample bound L_k); Eq. 10 (bounds of growing k);
            Eq. 14 (its gradient by normalised weights); Sec. 3.1 (one backward pass for k of them);
            Sec. 5.1 (schedule, test likelihood by L_5000); Sec. 5.2 (active units, and the
            likelihood without the others); Table 1 (VAE against IWAE); Table 2 (one continued as
            the other); App. C (networks, activity, posteriors); App. D (fixed binarisation)
Conventions x is binary and flat, (B, D), drawn with mean level / 255 at every visit. h_l is
            (k, B, J_l), the k samples first; log_w is (k, B). Nats, summed over pixels and units,
            averaged over images. The loss that is logged is -L_k, for a VAE -L_1.
Departures  1. Batches of 100 and a cosine fall of the rate, for minutes on a CPU instead of the
               paper's 9,840,000 steps of 20 images, which the last command takes.
            2. sigma = exp(linear), not sigma²; the output's first bias is the logit of the mean
               pixel: both as in the official code. A_u is of 2,000 test images, and in an upper
               layer averages over samples of the layer below (there: 500 training images, one).
            3. Images are drawn with replacement; colour channels are binarised like grey ones.
Run         python iwae.py                                          glyphs
            python iwae.py --dataset mnist --objective vae --k 1    a VAE on digits
            python iwae.py --dataset mnist                          IWAE, k = 5
            python iwae.py --latent 2                               posteriors, as in App. C
            python iwae.py --table 1 --dataset mnist                Table 1; --table 2: Table 2
            python iwae.py --dataset mnist --steps 9840000 --batch-size 20 --lr 0.001 --decay stages
                --warmup 0 --adam-eps 1e-4                          the paper's; not run here
"""

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import Count, Natural, Positive, Sizes, UserError


@dataclass
class Config(common.Config):
    dataset: str = "glyphs"  # a data set's name, or a folder of images
    objective: Literal["iwae", "weights", "single", "vae"] = "iwae"  # Eq. 8, 14, Sec. 3.1, Eq. 3
    k: Count = 5  # samples of h for each image in training (Table 1: 1, 5, 50)
    latent: Sizes = (50,)  # units of every stochastic layer, from x up (Sec. 5.1: 50, or 100,50)
    hidden: Sizes = (200,)  # units of the two tanh layers of each (Sec. 5.1: 200, or 200,100)
    steps: Natural = 3_000  # optimisation steps
    batch_size: Count = 100  # images per step (Sec. 5.1: 20)
    lr: Positive = 6e-3  # peak learning rate of Adam (Sec. 5.1: 0.001)
    decay: Literal["constant", "linear", "cosine", "stages"] = "cosine"  # stages: as in Sec. 5.1
    adam_eps: Positive = 1e-8  # of Adam (Sec. 5.1: 1e-4)
    clip: Positive | None = None  # largest norm of the gradient
    ema: common.Fraction | None = None  # decay of the weights' moving average, which is evaluated
    binarization: Literal["stochastic", "fixed"] = "stochastic"  # anew at every visit; App. D
    nll_examples: Count = 100  # random test images whose likelihood is estimated
    nll_samples: Count = 5_000  # samples of h for each of them (Sec. 5.1)
    table: Literal["1", "2"] | None = None  # train and print a table: its objectives, --ks
    ks: Sizes = (1, 5, 50)  # k of the rows of table 1; the last is table 2's


MNIST = {"steps": 24_000, "lr": 4e-3, "nll_examples": 1_000}  # 40 passes
PRESETS = {"mnist": MNIST, "fashion_mnist": MNIST}


# ---- The model (Sec. 2, App. C) -----------------------------------------------------------------


class Gaussian(NamedTuple):
    """N(mu, sigma²), unit by unit."""

    mu: Tensor
    log_sigma: Tensor

    def sample(self, eps):
        return self.mu + self.log_sigma.exp() * eps  # Eq. 4

    def log_prob(self, h):
        eps = (h - self.mu) * (-self.log_sigma).exp()
        return standard_normal(eps) - self.log_sigma


def standard_normal(eps):
    """log N(eps; 0, 1), unit by unit."""
    return -(eps.square() + math.log(2 * math.pi)) / 2


def network(n_in, hidden, n_out):
    """App. C: two tanh layers and a linear one, initialised as Glorot & Bengio do."""
    sizes = [n_in, hidden, hidden, n_out]
    layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


class IWAE(nn.Module):
    """p(h_L) .. p(h_1 | h_2) p(x | h_1) and q(h_1 | x) .. q(h_L | h_L-1), from x (B, D) upwards.

    Args:
        latent, hidden: units of the layers h_1 .. h_L, and of the networks at each of them.
        mean: the mean of every pixel, (D,), which the untrained p(x | h_1) nearly has.
    """

    def __init__(self, latent, hidden, mean):
        super().__init__()
        self.latent, sizes = tuple(latent), [len(mean), *latent]
        layers = list(zip(sizes[:-1], latent, hidden, strict=True))
        self.q = nn.ModuleList(network(below, n, 2 * above) for below, above, n in layers)
        self.p = nn.ModuleList(
            network(above, n, 2 * below if i else below)
            for i, (below, above, n) in enumerate(layers)
        )
        with torch.no_grad():
            self.p[0][-1].bias.copy_(mean.clamp(0.001, 0.999).logit())  # Departure 2

    def infer(self, x, eps, keep=None):
        """From x upwards: every q(h_l | h_l-1), the sample h_l and log q of its units."""
        h, layers, keep = x, [], keep or [1.0] * len(self.q)
        for q, eps_l, keep_l in zip(self.q, eps.split(self.latent, dim=-1), keep, strict=True):
            q_l = Gaussian(*q(h).to(eps.dtype).chunk(2, dim=-1))
            h = keep_l * q_l.sample(eps_l)  # Eq. 4
            layers.append((q_l, h, keep_l * (standard_normal(eps_l) - q_l.log_sigma)))  # Eq. 2
        return layers

    def logits(self, h_1):
        """Of p(x | h_1): (..., J_1) -> (..., D)."""
        return self.p[0](h_1).to(h_1.dtype)

    def log_weights(self, x, eps, keep=None):
        """log w = log p(x, h) / q(h | x): x (B, D), eps (k, B, J_1 + .. + J_L) -> (k, B).

        A unit whose keep, (J_1 + .. + J_L,), is 0 is removed: no part of w, and 0 to the others.
        """
        keep = [1.0] * len(self.q) if keep is None else keep.split(self.latent)
        layers = self.infer(x, eps, keep)
        log_w = log_bernoulli(x, self.logits(layers[0][1]))
        for i, (_, h, log_q) in enumerate(layers):
            if i + 1 < len(layers):
                above = self.p[i + 1](layers[i + 1][1]).to(h.dtype)
                log_p = keep[i] * Gaussian(*above.chunk(2, dim=-1)).log_prob(h)
            else:
                log_p = keep[i] * standard_normal(h)
            log_w = log_w + (log_p - log_q).sum(-1)  # Eq. 1 over Eq. 2
        return log_w

    def sample(self, n):
        """The means of p(x | h_1) for n descents from h_L ~ N(0, I): (n, D) in [0, 1]."""
        h = torch.randn(n, self.latent[-1], device=self.p[0][0].weight.device)
        for p in reversed(self.p[1:]):
            p_l = Gaussian(*p(h).chunk(2, dim=-1))
            h = p_l.sample(torch.randn_like(p_l.mu))  # Eq. 1
        return self.logits(h).sigmoid()

    def forward(self, objective, *inputs):
        """objective(self, ...): in here it runs compiled, distributed and under autocast."""
        return objective(self, *inputs)


def log_bernoulli(x, logits):
    """log p of binary x (B, D), summed over pixels: log sigmoid of plus or minus the logit."""
    return F.logsigmoid((2 * x - 1) * logits).sum(-1)


# ---- Objectives (Sec. 2, Sec. 3) ----------------------------------------------------------------
# Each takes the model, x (B, D) and eps ~ N(0, I), (k, B, J): -> (B,). The value is a bound on
# log p(x), whatever the way to its gradient.


def bound(log_w):
    """L_k = log 1/k sum_i w_i, one sample of it: (k, B) -> (B,)."""
    return log_w.logsumexp(0) - math.log(len(log_w))  # Eq. 8


def vae(model, x, eps):
    return model.log_weights(x, eps).mean(0)  # Eq. 3, Eq. 7: L_1, averaged over k samples


def iwae(model, x, eps):
    return bound(model.log_weights(x, eps))


def iwae_weights(model, x, eps):
    """The gradient sum_i w~_i grad log w_i, w~ normalised and held fixed: that of `iwae`. The sum
    itself is L_k + log k - H(w~), so no bound: L_k takes its place as the value."""
    log_w = model.log_weights(x, eps)
    weighted = (log_w.detach().softmax(0) * log_w).sum(0)  # Eq. 14
    return weighted + (bound(log_w) - weighted).detach()


def iwae_single(model, x, eps):
    """Of the k samples one, drawn by its weight w~, is taken backwards: on average Eq. 14."""
    with torch.no_grad():
        log_w = model.log_weights(x, eps)
    chosen = torch.distributions.Categorical(logits=log_w.T, validate_args=False).sample()  # (B,)
    eps_i = eps.gather(0, chosen[None, :, None].expand_as(eps[:1]))
    log_w_i = model.log_weights(x, eps_i)[0]  # Sec. 3.1
    return log_w_i + (bound(log_w) - log_w_i).detach()


OBJECTIVES = {"vae": vae, "iwae": iwae, "weights": iwae_weights, "single": iwae_single}


# ---- Likelihood and active units (Sec. 5) -------------------------------------------------------


@torch.no_grad()
def sample_log_weights(model, x, samples, keep=None, rows=1_000):
    """log w of so many samples for every image, (samples, B); `rows` of them at once in memory."""
    units, blocks = sum(model.latent), []
    for part in x.split(20):
        chunk = max(1, rows // len(part))
        sizes = [min(chunk, samples - start) for start in range(0, samples, chunk)]
        noise = (torch.randn(n, len(part), units, dtype=x.dtype, device=x.device) for n in sizes)
        blocks.append(torch.cat([model.log_weights(part, eps, keep) for eps in noise]))
    return torch.cat(blocks, dim=1)


def bounds(log_w, ks):
    """L_k for every k, from the same samples in groups of k: (S, B) -> {k: nats}."""
    whole = {k: log_w[: len(log_w) // k * k].unflatten(0, (-1, k)) for k in ks if k <= len(log_w)}
    return {k: bound(groups.transpose(0, 1)).mean().item() for k, groups in whole.items()}  # Eq. 10


@torch.no_grad()
def activity(model, x, samples=20):
    """A_u = Cov_x(E_q(u|x)[u]) of every unit, (J_1 + .. + J_L,), over images x (N, D)."""
    eps = torch.randn(samples, len(x), sum(model.latent), dtype=x.dtype, device=x.device)
    layers = model.infer(x, eps)
    means = [q_l.mu.expand(samples, -1, -1).mean(0) for q_l, _, _ in layers]  # (N, J_l)
    return torch.cat([mu.var(0) for mu in means])  # Sec. 5.2


ACTIVE = 1e-2  # Sec. 5.2: a unit is active if its A_u is larger


# ---- Data and training --------------------------------------------------------------------------


class Images:
    """A data set's images, binary and flat; the test images once and for all, in random order."""

    def __init__(self, cfg, data):
        self.levels, self.shape, self.flip = data.train, data.shape, data.flip
        rng = torch.Generator(data.train.device).manual_seed(cfg.seed)
        order = torch.randperm(len(data.test), generator=rng, device=rng.device)
        self.test = common.binarize(data.test, rng).flatten(1).float()[order]
        if cfg.binarization == "fixed":  # App. D
            self.levels = 255 * common.binarize(self.levels, rng)  # binarised again, these stay

    def batch(self, n):
        """n random training images (x, index)."""
        index = torch.randint(len(self.levels), (n,), device=self.levels.device)
        levels = self.levels[index]
        levels = common.mirrored(levels) if self.flip else levels
        return common.binarize(levels).flatten(1).float(), index


class Run(common.Run):
    """common's run, which knows the paper's schedule, too."""

    def schedule(self):
        """3^i passes at the rate 10^(-i/7), i = 0 .. 7, in proportion to the steps: Sec. 5.1."""
        if self.cfg.decay != "stages" or self.done < self.cfg.warmup:
            return super().schedule()
        passes = 3280 * self.done / self.cfg.steps  # of all 3^0 + .. + 3^7
        return 10 ** (-math.floor(math.log(2 * passes + 1, 3) + 1e-9) / 7)


def train(cfg, run, images):
    """Ascend the bound: Sec. 3.1."""
    units = sum(run.net.latent)
    for x, _ in run.batches(images):
        eps = torch.randn(cfg.k, len(x), units, device=x.device)
        run.step(-run.model(OBJECTIVES[cfg.objective], x, eps).mean())  # Eq. 14, or Eq. 7


def start(cfg, images, device, net=None):
    """The run of a new network, or of one that is there."""
    mean = images.levels[:10_000].flatten(1).float().mean(0) / 255
    net = IWAE(cfg.latent, cfg.hidden, mean) if net is None else net

    def adam(parameters):
        betas = (0.9, cfg.beta_2)
        return torch.optim.Adam(parameters, lr=cfg.lr, betas=betas, eps=cfg.adam_eps, fused=True)

    return Run(cfg, net, device, optimizer=adam)


# ---- Evaluation ---------------------------------------------------------------------------------


def evaluate(cfg, run, images):
    """Report bounds, likelihood, active units, and the likelihood without the others.

    Returns these figures, A_u (J_1 + .. + J_L,) and the samples of log w, (S, N).
    """
    torch.manual_seed(cfg.seed)
    model, x = run.ema, images.test[: cfg.nll_examples]
    log_w = sample_log_weights(model, x, cfg.nll_samples)
    log_p = bound(log_w)  # Sec. 5.1: L_5000
    figures = {f"L_{k}": value for k, value in bounds(log_w, (1, 5, 50, 500)).items()}
    figures |= {"nll": -log_p.mean().item(), "standard_error": common.standard_error(log_p)}
    A = activity(model, images.test[:2_000])
    active = A > ACTIVE
    figures["active"] = "+".join(str(part.sum().item()) for part in active.split(model.latent))
    if not active.all():
        without = bound(sample_log_weights(model, x, cfg.nll_samples, active.to(x.dtype)))
        figures["nll_without_inactive"] = -without.mean().item()  # Sec. 5.2
    run.report("test", **figures, examples=len(x), samples=cfg.nll_samples)
    return figures, A, log_w


def fit(cfg, images, name, net=None, **settings):
    """Train a model in a folder of its own -> the network, and "NLL ± error [active units]"."""
    out = common.free_folder(f"{cfg.out}/{name}")
    here = dataclasses.replace(cfg, table=None, out=out, **settings)
    run = start(here, images, common.setup(here), net)
    run.say(f"training {name}")
    train(here, run, images)
    figures, *_ = evaluate(here, run, images)
    error = figures["standard_error"] or math.nan
    return run.net, f"{figures['nll']:.2f} ± {error:.2f} [{figures['active']}]"


PAPER = {  # Table 1, MNIST: stochastic layers, k -> VAE, IWAE
    (1, 1): ("86.76 [19]", "86.76 [19]"),
    (1, 5): ("86.47 [20]", "85.54 [22]"),
    (1, 50): ("86.35 [20]", "84.78 [25]"),
    (2, 1): ("85.33 [16+5]", "85.33 [16+5]"),
    (2, 5): ("85.01 [17+5]", "83.89 [21+5]"),
    (2, 50): ("84.78 [17+5]", "82.90 [26+7]"),
}


def table_1(cfg, images):
    """Table 1: test likelihood and active units of VAE and IWAE for every k, beside the paper's."""
    rows = []
    for k in cfg.ks:
        _, as_vae = fit(cfg, images, f"vae-{k}", objective="vae", k=k)
        as_iwae = as_vae  # the same objective for k = 1: Sec. 3
        if k > 1:
            _, as_iwae = fit(cfg, images, f"iwae-{k}", objective="iwae", k=k)
        paper = PAPER.get((len(cfg.latent), k), ("", ""))
        columns = (as_vae, paper[0], as_iwae, paper[1])
        rows.append(f"{k:4d}" + "".join(f"{column:>22}" for column in columns))
    print("test -log p(x) in nats [active units]; the paper's columns: MNIST, 3280 passes")
    print("   k" + "".join(f"{title:>22}" for title in ("VAE", "paper", "IWAE", "paper")))
    print("\n".join(rows))


def table_2(cfg, images):
    """Table 2: a VAE continued as an IWAE, and the reverse, for 2/3 as long at a tenth the rate."""
    k, rows = cfg.ks[-1], []
    later = {"decay": "constant", "warmup": 0, "lr": cfg.lr / 10}  # Sec. 5.2: 3^7 passes at 1e-4
    later["steps"] = math.ceil(2 / 3 * cfg.steps)
    for first, second in (("vae", "iwae"), ("iwae", "vae")):
        settings = {
            kind: {"objective": kind, "k": k if kind == "iwae" else 1} for kind in (first, second)
        }
        net, before = fit(cfg, images, first, **settings[first])
        _, after = fit(cfg, images, f"{first}-{second}", net, **settings[second], **later)
        rows.append(f"{first:>12}{before:>22}{second:>12}{after:>22}")
    print(f"test -log p(x) in nats [active units]; IWAE with k = {k}")
    print(f"{'trained as':>12}{'':>22}{'then as':>12}")
    print("\n".join(rows))


# ---- Pictures -----------------------------------------------------------------------------------


def tiles(images, x, columns):
    """Pixels or their means in [0, 1], (N, D), side by side -> uint8 (3, H, W)."""
    return common.image_grid((2 * x - 1).unflatten(1, images.shape), columns)


def bound_chart(log_w):
    """L_k against k (Eq. 10)."""
    ks = [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if k <= len(log_w)]
    values = torch.tensor([[math.log10(k), value] for k, value in bounds(log_w, ks).items()])
    low, high = values[:, 1].min().item(), values[:, 1].max().item()
    margin = 0.1 * (high - low) + 1e-3
    shapes = [("line", values, "#2f5d8c", 2), ("dots", values, "#2f5d8c", 4)]
    box = (-0.1, values[-1, 0].item() + 0.1, low - margin, high + margin)
    return common.chart(shapes, box, (360, 280), ("log10 k", "bound L_k on log p(x), nats"))


def activity_chart(A):
    """A_u of all units in falling order; the line is where activity begins (App. C)."""
    heights = A.clamp(min=1e-6).log10().sort(descending=True).values.tolist()
    shapes = [("line", torch.tensor([[0.0, -2], [len(heights), -2]]), "#c0392b", 1)]
    for i, top in enumerate(heights):
        bar = torch.tensor([[i, -6.2], [i, top], [i + 0.8, top], [i + 0.8, -6.2]])
        shapes.append(("fill", bar, "#2f5d8c" if top > math.log10(ACTIVE) else "#b9bcc8", 0))
    box = (-0.5, len(heights) + 0.5, -6.2, 1.2)
    return common.chart(shapes, box, (360, 280), ("unit, by activity", "log10 A_u"))


def posteriors(model, images, n=6):
    """App. C: for n test images the posterior of two units, and samples of q(h | x) upon it."""
    axis = torch.linspace(-4, 4, 81, device=images.test.device)
    grid = torch.cartesian_prod(axis, axis)  # (6561, 2)
    logits = model.logits(grid)
    above, below = [], []
    for x in images.test[:n]:
        log_p = log_bernoulli(x, logits) + standard_normal(grid).sum(1)
        heat = log_p.softmax(0).view(81, 81)
        eps = torch.randn(60, 1, 2, device=x.device)
        h = model.infer(x[None], eps)[0][1][:, 0]
        shapes = [("dots", h.cpu(), "#7fd1ff", 1.6)]
        posterior = common.chart(shapes, (-4, 4, -4, 4), (174, 174), heat=heat)
        shown = torch.cat([x[None], model.logits(h[:5]).sigmoid()])
        below.append(("" if above else "x, and p(x | h) of five", tiles(images, shown, 6)))
        above.append(("" if above else "posterior, and samples of q", posterior))
    return above, below


@torch.no_grad()
def picture(run, images, A, log_w, n=12):
    model = run.ema
    x = images.test[torch.arange(n * n // 2, device=images.test.device) % len(images.test)]
    eps = torch.randn(1, len(x), sum(model.latent), device=x.device)
    means = model.logits(model.infer(x, eps)[0][1][0]).sigmoid()
    pairs = torch.stack([x.unflatten(0, (-1, n)), means.unflatten(0, (-1, n))], dim=1).flatten(0, 2)
    above = [("test images above their reconstructions", tiles(images, pairs, n))]
    above.append(("samples", tiles(images, model.sample(n * n), n)))
    charts = [("tighter with k", bound_chart(log_w)), ("active units", activity_chart(A))]
    rows = posteriors(model, images) if model.latent == (2,) else ()
    common.save_panels(run.folder / "samples.png", above, charts, *rows)


# ---- The command line ---------------------------------------------------------------------------


def main(cfg):
    if len(cfg.latent) != len(cfg.hidden):
        raise UserError("--latent and --hidden need as many numbers, one for each stochastic layer")
    if cfg.table and (cfg.resume or cfg.sample or cfg.num_samples or "RANK" in os.environ):
        raise UserError("--table trains anew, in one process, and writes no samples")
    device = common.setup(cfg)
    data = common.load_images(cfg, device)
    if len(data.test) < 2:  # which has no A_u
        raise UserError(f"{cfg.dataset} is too small: of a folder's images one in ten is held out")
    images = Images(cfg, data)
    if cfg.table:
        (table_1 if cfg.table == "1" else table_2)(cfg, images)
        return
    run = start(cfg, images, device)
    if not cfg.sample:
        train(cfg, run, images)
    if not run.finish():
        return
    _, A, log_w = evaluate(cfg, run, images)
    picture(run, images, A, log_w)
    if cfg.num_samples:

        def draw(n):
            with torch.no_grad():
                return 2 * run.ema.sample(n).unflatten(1, images.shape) - 1

        run.write_samples(draw)
    run.say(f"see {run.folder / 'samples.png'}")


if __name__ == "__main__":
    common.cli(main, Config, PRESETS)
