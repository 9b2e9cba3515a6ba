"""Speed beside public implementations, in one run: python tests/benchmark.py [--gpu] [--rows unet]

Two kinds of rows are shown only where they are named: `presets --gpu` times the presets of CIFAR-10
(flags such as `--amp on` go on to the scripts), `quality` trains on MNIST.

Peers are used where installed: pip install torchcfm diffusers torchdiffeq scipy. A row's contenders
run in turn, round after round, so that a drift of the machine's speed meets all alike, and the row
shows the least time of each: the rest is other programs'. Not collected by pytest.
"""

import argparse
import copy
import functools
import gc
import importlib
import itertools
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import d3pm
import displacement
import flow_matching
import neural_ode
import rectified_flow
import vae

PRESETS = {  # image channels, side, batch
    "mnist": (4, 14, 64),  # the part of the U-Net that sees patches as channels
    "cifar10": (3, 32, 16),
}


def interleaved(contenders, rounds):
    """The least seconds of each function, taken in turn; one round of warm-up."""
    seconds = {name: [] for name in contenders}
    for i in range(rounds + 1):
        for name, work in contenders.items():
            synchronize()
            start = time.perf_counter()
            work()
            synchronize()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in seconds.items()}


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def row(title, seconds, unit, amount):
    """Our speed, the fastest peer's, and the ratio: above 1 means that we are faster."""
    cells = "  ".join(f"{name} {amount / s:9.1f}" for name, s in seconds.items())
    peers = [s for name, s in seconds.items() if name != "ours"]
    ratio = f"  ratio {min(peers) / seconds['ours']:.2f}" if peers else ""
    print(f"{title:34} {unit:9} {cells}{ratio}", flush=True)


def unets(c, side, cfg, device):
    """U-Nets of the same channels, blocks and attention, for c channels at side x side."""
    width, mult, blocks = cfg.width, cfg.mult, cfg.blocks
    attention = [r for r in cfg.attention or () if side % r == 0 and side // r in (1, 2, 4, 8)]
    nets = {"ours": common.UNet(c, c, side, width, mult, blocks, attention)}
    try:
        import torchcfm.models.unet.unet as torchcfm_unet
    except ImportError:
        print("torchcfm is not installed")
    else:
        resolutions = ",".join(map(str, attention)) or str(2 * side)  # "" is refused
        torchcfm_unet.normalization = common.group_norm  # its own wants multiples of 32 channels
        net = torchcfm_unet.UNetModelWrapper(
            dim=(c, side, side),
            num_channels=width,
            num_res_blocks=blocks,
            channel_mult=list(mult),
            attention_resolutions=resolutions,
            num_head_channels=64,
            use_scale_shift_norm=True,
        )
        nets["torchcfm"] = lambda x, t, net=net: net(t, x)
        nets["torchcfm"].parameters = net.parameters
        net.to(device)
    try:
        from diffusers import UNet2DModel
    except ImportError:
        print("diffusers is not installed")
    else:
        has = [side // 2**i in attention for i in range(len(mult))]
        net = UNet2DModel(
            sample_size=side,
            in_channels=c,
            out_channels=c,
            layers_per_block=blocks,
            block_out_channels=[width * m for m in mult],
            down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in has],
            up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(has)],
            attention_head_dim=64,
            resnet_time_scale_shift="scale_shift",
            norm_num_groups=common.group_norm(width).num_groups,
        )
        nets["diffusers"] = lambda x, t, net=net: net(x, 1000 * t).sample
        nets["diffusers"].parameters = net.parameters
        net.to(device)
    nets["ours"].to(device, memory_format=torch.channels_last)  # as common.Run does
    x = torch.randn(1, c, side, side, device=device)
    return nets, x


def unet_rows(device):
    for name, (channels, side, batch) in PRESETS.items():
        cfg = flow_matching.Config(**flow_matching.PRESETS[name])
        nets, x = unets(channels, side, cfg, device)
        x = x.expand(batch, -1, -1, -1).contiguous()
        t, target = torch.rand(batch, device=device), torch.randn_like(x)
        sizes = {key: sum(p.numel() for p in net.parameters()) / 1e6 for key, net in nets.items()}
        print(f"{name}: millions of parameters", {k: round(v, 2) for k, v in sizes.items()})

        def training(net, x=x, t=t, target=target):
            optimizer = torch.optim.Adam(net.parameters(), fused=True)

            def step():
                optimizer.zero_grad()
                (net(x, t) - target).square().mean().backward()
                optimizer.step()

            return step

        def sampling(net, x=x, t=t):
            def step():
                with torch.no_grad():
                    return x + net(x, t) / 100

            return step

        rounds = 15 if name == "mnist" else 5
        steps = {key: training(net) for key, net in nets.items()}
        row(f"{name}, training, batch {batch}", interleaved(steps, rounds), "images/s", batch)
        steps = {key: sampling(net) for key, net in nets.items()}
        row(f"{name}, sampling, batch {batch}", interleaved(steps, rounds), "images/s", batch)


def ode_rows(device):
    torch.manual_seed(0)
    small = common.MLP(2).to(device).requires_grad_(False)
    angle = torch.arange(8, device=device) * torch.pi / 4
    modes = 2 * torch.stack([angle.cos(), angle.sin()], dim=1)
    mixture = flow_matching.FiniteData(modes, flow_matching.OT(0.1)).field  # exact

    def swirl(x, t):  # costs next to nothing: what the solver itself costs
        return x.flip(1) * torch.tensor([1.0, -1.0], device=device) * (1 + t[:, None])

    try:
        import torchdiffeq
    except ImportError:
        print("torchdiffeq is not installed")
        torchdiffeq = None
    fields = {"swirl": (swirl, 256), "eight points": (mixture, 2048), "network": (small, 2048)}
    for (title, (f, n)), tol in itertools.product(fields.items(), (1e-3, 1e-5)):
        x = torch.randn(n, 2, device=device)
        with torch.no_grad():
            exact, _ = common.odeint(f, x, (0.0, 1.0), steps=300)

        def error(x_1, exact=exact, tol=tol):  # root mean square, in tolerances
            return ((x_1 - exact) / (tol + tol * exact.abs())).square().mean().sqrt().item()

        @torch.no_grad()
        def ours(f=f, x=x, tol=tol):
            return common.odeint(f, x, (0.0, 1.0), rtol=tol, atol=tol)

        @torch.no_grad()
        def theirs(tol=tol, f=f, x=x):
            evaluations = 0

            def counted(t, x):
                nonlocal evaluations
                evaluations += 1
                return f(x, t.to(x.dtype).expand(len(x)))

            times = torch.tensor([0.0, 1.0], device=device)
            solver = {"rtol": tol, "atol": tol, "method": "dopri5"}
            return torchdiffeq.odeint(counted, x, times, **solver)[-1], evaluations

        def show(title, contenders):
            row(f"dopri5 {title}", interleaved(contenders, 7), "solves/s", 1)
            solved = {name: solve() for name, solve in contenders.items()}
            cells = (f"{name} {count} ({error(x_1):.2g})" for name, (x_1, count) in solved.items())
            print(f"{'':34} evaluations (error in tolerances): {', '.join(cells)}")

        if torchdiffeq is None:
            show(f"{tol:g}, {title}", {"ours": ours})
            continue
        show(f"{tol:g}, {title}", {"ours": ours, "torchdiffeq": theirs})
        finer = tol
        while error(theirs(finer)[0]) > error(ours()[0]):
            finer /= 2
        if finer < tol:  # where torchdiffeq is as accurate as ours
            finer_theirs = functools.partial(theirs, finer)
            show(f"{tol:g} to {finer:.2g}", {"ours": ours, "torchdiffeq": finer_theirs})


class Field(torch.nn.Module):
    """An MLP on (B, dim) that counts its evaluations."""

    def __init__(self, dim, width):
        super().__init__()
        self.net, self.calls = neural_ode.mlp(dim, width, width, dim), 0

    def forward(self, z, t):
        self.calls += 1
        return self.net(z)


CPU = [torch.profiler.ProfilerActivity.CPU]


def peak_megabytes(work, device):
    """The most memory of tensors that the work holds at once on top of what was held before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    # The process's size would add the heap's holes and the libraries' buffers, which dwarf these.
    with torch.profiler.profile(activities=CPU, profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events)) / 1e6


def adjoint_rows(device):
    for title, batch, dim, width in (("small", 512, 2, 64), ("large", 4096, 32, 128)):
        for tol in (1e-3, 1e-5):
            torch.manual_seed(0)
            f, z_0 = Field(dim, width).to(device), torch.randn(batch, dim, device=device)

            def ours(f=f, z_0=z_0, tol=tol):
                z, forward = neural_ode.odeint_adjoint(f, z_0, (0.0, 3.0), rtol=tol, atol=tol)
                z.square().sum().backward()
                return forward

            contenders = {"ours": ours}
            try:
                import torchdiffeq
            except ImportError:
                print("torchdiffeq is not installed")
            else:
                theirs_f = torch.nn.Module()
                theirs_f.f, theirs_f.forward = f, lambda t, z, f=f: f(z, t)

                def theirs(f=f, theirs_f=theirs_f, z_0=z_0, tol=tol):
                    times, before = torch.tensor([0.0, 3.0], device=device), f.calls
                    solver = {"rtol": tol, "atol": tol, "method": "dopri5"}
                    z = torchdiffeq.odeint_adjoint(theirs_f, z_0, times, **solver)
                    forward = f.calls - before
                    z[-1].square().sum().backward()
                    return forward

                contenders["torchdiffeq"] = theirs
            row(f"adjoint {tol:g}, {title} field", interleaved(contenders, 5), "solves/s", 1)
            for name, work in contenders.items():
                before = f.calls
                forward = work()
                total, peak = f.calls - before, peak_megabytes(work, device)
                print(f"{'':34} {name}: evaluations {forward} + {total - forward}, {peak:.1f} MB")


def vector_rows(device):
    cfg = flow_matching.Config(device=str(device))
    data = common.load_data(cfg, device)
    net, path = common.MLP(2).to(device), flow_matching.OT()
    optimizer = torch.optim.Adam(net.parameters(), fused=True)

    def hundred_steps():
        for _ in range(100):
            x_1, _ = data.batch(cfg.batch_size)
            x_0, t = torch.randn_like(x_1), torch.rand(len(x_1), device=device)
            optimizer.zero_grad()
            flow_matching.cfm_loss(net, x_0, x_1, t, path).backward()
            optimizer.step()

    seconds = interleaved({"ours": hundred_steps}, 5)
    row(f"2-D training, batch {cfg.batch_size}", seconds, "steps/s", 100)


def vae_rows(device):
    """A step of Alg. 1 of 784-500-20-500-784 tanh units, against the loop that examples write:
    a DataLoader of single images, two heads, reparameterize, Adam as it comes, loss.item()."""
    levels = torch.randint(256, (20_000, 1, 28, 28), dtype=torch.uint8)
    labels = torch.zeros(len(levels), dtype=torch.long)
    cfg = vae.Config(out=tempfile.mkdtemp(), steps=10**9, hidden=500, latent=20)
    images = vae.Images(cfg, common.Data("noise", *[levels.to(device), labels.to(device)] * 2))
    net = vae.build(cfg, (1, 28, 28), cfg.latent)
    run = common.Run(cfg, net, device, optimizer=vae.optimizer(cfg, len(images)))
    batches = run.batches(images)

    def ours():
        for x, _ in itertools.islice(batches, 50):
            run.step(-vae.objective(cfg, run, x, len(images)))

    class Examples(torch.utils.data.Dataset):
        to_tensor = torchvision.transforms.ToTensor()

        def __len__(self):
            return len(levels)

        def __getitem__(self, i):
            return self.to_tensor(Image.fromarray(levels[i, 0].numpy())), 0

    encoder, head_1, head_2 = nn.Linear(784, 500), nn.Linear(500, 20), nn.Linear(500, 20)
    decoder = nn.Sequential(nn.Linear(20, 500), nn.Tanh(), nn.Linear(500, 784), nn.Sigmoid())
    model = nn.ModuleList([encoder, head_1, head_2, decoder]).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def forever():
        while True:
            yield from torch.utils.data.DataLoader(Examples(), batch_size=100, shuffle=True)

    loader, total = forever(), 0.0

    def theirs():
        nonlocal total
        for x, _ in itertools.islice(loader, 50):
            x = x.to(device).view(-1, 784)
            optimizer.zero_grad()
            h = torch.tanh(encoder(x))
            mu, logvar = head_1(h), head_2(h)
            std = torch.exp(0.5 * logvar)
            y = decoder(mu + torch.randn_like(std) * std)
            bce = F.binary_cross_entropy(y, x, reduction="sum")
            loss = bce - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
            loss.backward()
            total += loss.item()
            optimizer.step()

    seconds = interleaved({"ours": ours, "plain": theirs}, 5)
    row("VAE training, batch 100", seconds, "images/s", 5000)


def d3pm_rows(device):
    """A training step's loss and gradient, beside looking up (T, K, K) tables as others do."""
    B, D = 16, 64

    def tables(pi, alpha_bar):
        K, T = len(pi), len(alpha_bar) - 1
        keep = torch.cat([alpha_bar[1:] / alpha_bar[:-1], alpha_bar[1:]])
        Q = torch.lerp(pi.expand(K, K), torch.eye(K), keep.float()[:, None, None])
        Q_T, Q_bar = Q[:T].mT.contiguous().to(device), Q[T:].to(device)

        def loss(logits, x_0, t):
            when = t[:, None] - 1
            x_t = d3pm.categorical((Q_bar[when, x_0] + 1e-6).log())
            before = Q_bar[(t - 2).clamp(min=0)]
            likelihood = (Q_T[when, x_t] + 1e-6).log()
            q = (likelihood + (before[torch.arange(B)[:, None], x_0] + 1e-6).log()).log_softmax(-1)
            p = (likelihood + (logits.softmax(-1) @ before + 1e-6).log()).log_softmax(-1)
            return T * d3pm.kl_divergence(q, p).mean()

        return loss, 4 * (Q_T.numel() + Q_bar.numel())

    def chains(pi, alpha_bar):
        chain = d3pm.LowRank(pi, alpha_bar).to(device)

        def loss(logits, x_0, t):
            return d3pm.hybrid_loss(lambda x, t: logits.log_softmax(-1), chain, x_0, t)

        return loss, sum(4 * b.numel() for b in chain.buffers())

    for K, T in ((32, 1000), (128, 1000), (512, 100), (512, 1000), (8192, 1000)):
        alpha_bar = d3pm.alpha_bar("cosine", T)
        pi, steps, sizes = torch.full((K,), 1 / K), {}, {}
        for name, build in (("ours", chains), ("tables", tables)):
            if name == "tables" and 2 * T * K**2 > 2**28:
                sizes[name] = f"{8 * T * K**2 / 2**20:.0f} MB, not run"
                continue
            loss, size = build(pi, alpha_bar)
            logits = torch.randn(B, D, K, device=device, requires_grad=True)
            x_0, t = torch.randint(K, (B, D), device=device), torch.arange(1, B + 1, device=device)

            def step(loss=loss, logits=logits, x_0=x_0, t=t):
                loss(logits, x_0, t).backward()

            steps[name] = step
            sizes[name] = f"{size / 2**20:.3f} MB"
        row(f"D3PM loss, K = {K}, T = {T}", interleaved(steps, 5), "steps/s", 1)
        print(f"{'':34} transition matrices {sizes}")


def straight_rows(device):
    """The pairs that a reflow learns from; exact assignment of point clouds."""
    cfg = rectified_flow.Config(device=str(device))
    net = common.MLP(2).to(device).requires_grad_(False)
    noise = rectified_flow.Noise((2,), device)
    run = types.SimpleNamespace(cfg=cfg, stage="", device=device, ema=net, amp=False)

    def pairs():
        rectified_flow.simulate_pairs(run, noise, 4 * cfg.batch_size, None)

    seconds = interleaved({"ours": pairs}, 5)
    row("2-D pairs, 100 Euler steps", seconds, "pairs/s", 4 * cfg.batch_size)
    for n in (128, 512, 1024):
        x_0, _ = common.DENSITIES["two_spirals"](n, torch.Generator().manual_seed(0))
        x_1, _ = common.DENSITIES["checkerboard"](n, torch.Generator().manual_seed(1))
        cost = torch.cdist(x_0, x_1).square()
        contenders = {"ours": lambda cost=cost: displacement.optimal_assignment(cost)}
        try:
            from scipy.optimize import linear_sum_assignment
        except ImportError:
            print("scipy is not installed")
        else:
            contenders["scipy"] = lambda cost=cost: linear_sum_assignment(cost.numpy())
        row(f"assignment of {n} points", interleaved(contenders, 5), "solves/s", 1)


# ---- The presets of CIFAR-10 ---------------------------------------------------------------------

OF_CIFAR10 = ["flow_matching", "rectified_flow", "interflow", "score_sde", "consistency", "d3pm"]
OF_CIFAR10 += ["ldm", "vae"]


class LastStage(Exception):
    """The training that a script is named after has been timed."""


def preset_rows(device, flags):
    """A training step of each script's preset for CIFAR-10, on images of noise, by stages: 8 steps
    after 4, and the hours that all would take. flags: the script's own, such as --amp on."""
    step, warm, last = common.Run.step, 4, 12

    def timed(run, loss):
        step(run, loss)
        if run.done == warm:
            synchronize()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            run.started_at = time.perf_counter()
        if run.done == last:
            synchronize()
            seconds = (time.perf_counter() - run.started_at) / (last - warm)
            title = f"{run.cfg.script} {run.stage}, batch {run.cfg.batch_size}"
            row(title, {"ours": seconds}, "images/s", run.cfg.batch_size)
            size = sum(p.numel() for p in run.net.parameters()) / 1e6
            hours = run.cfg.steps * seconds / 3600
            about = f"{size:.1f} M parameters, {run.cfg.steps} steps would take {hours:.1f} h"
            if device.type == "cuda":
                about += f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
            print(f"{'':34} {about}", flush=True)
            run.cfg.steps = last  # so that the next stage begins
            if not run.stage:
                raise LastStage

    def noise(*_):
        return [
            (torch.randint(256, (n, 3, 32, 32)).byte(), torch.arange(n) % 10)
            for n in (10_000, 1000)
        ]

    common.Run.step, common.Run.save, common._torchvision_splits = timed, lambda run: None, noise
    for name in OF_CIFAR10:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        script = importlib.import_module(name)
        arguments = ["--dataset", "cifar10", "--device", device.type, "--out", tempfile.mkdtemp()]
        try:
            script.main(common.parse(script.Config, script.PRESETS, [*arguments, *flags]))
        except LastStage:
            gc.collect()
        except (common.UserError, torch.OutOfMemoryError) as error:
            print(f"{name}: {' '.join(str(error).split())[:100]}")


# ---- Quality on MNIST ----------------------------------------------------------------------------


class Judge(nn.Module):
    """A small classifier trained here; a Fréchet distance in its 64 features, to the test set."""

    def __init__(self, data, steps=3_000):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(64 * 49, 64), nn.ReLU()),
        )
        self.output = nn.Linear(64, 10)
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
        for _ in range(steps):
            x, y = data.batch(128)
            optimizer.zero_grad()
            F.cross_entropy(self.output(self.features(x)), y).backward()
            optimizer.step()
            decay.step()
        with torch.no_grad():
            features = self.features(common.to_float(data.test))
            right = self.output(features).argmax(1) == data.test_labels
        self.accuracy, self.reference = right.float().mean().item(), self.moments(features)

    @staticmethod
    def moments(features):
        features = features.double()
        return features.mean(0), features.T.cov()

    @torch.no_grad()
    def distance(self, x):
        """|mu - mu'|² + tr(C + C' - 2 (C C')^1/2); and the part of x seen with 95 % certainty."""
        features = self.features(x.clamp(-1, 1))
        (mu, cov), (mu_test, cov_test) = self.moments(features), self.reference
        root = torch.linalg.eigvals(cov @ cov_test).real.clamp(min=0).sqrt().sum()
        distance = (mu - mu_test).square().sum() + cov.trace() + cov_test.trace() - 2 * root
        certain = self.output(features).softmax(1).amax(1) > 0.95
        return distance.item(), certain.float().mean().item()

    @torch.no_grad()
    def classes(self, x):
        return self.output(self.features(x.clamp(-1, 1))).argmax(1)


class Plain(nn.Module):
    """The small U-Net of a tutorial: 14 x 14 and 7 x 7 behind a space-to-depth stem."""

    def __init__(self, width=40):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 128))
        self.stem = nn.Conv2d(4, width, 3, padding=1)
        self.shrink = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.grow = nn.Conv2d(2 * width, width, 3, padding=1)
        self.first, self.last = self.block(width, width), self.block(2 * width, width)
        self.low = nn.ModuleList(self.block(2 * width, 2 * width) for _ in range(3))
        self.output = nn.Conv2d(width, 4, 3, padding=1)

    @staticmethod
    def block(c_in, c_out):
        parts = {
            "norm_1": nn.GroupNorm(8, c_in),
            "conv_1": nn.Conv2d(c_in, c_out, 3, padding=1),
            "emb": nn.Linear(128, c_out),
            "norm_2": nn.GroupNorm(8, c_out),
            "conv_2": nn.Conv2d(c_out, c_out, 3, padding=1),
            "skip": nn.Conv2d(c_in, c_out, 1),
        }
        return nn.ModuleDict(parts)

    @staticmethod
    def apply_block(block, x, emb):
        h = block["conv_1"](F.silu(block["norm_1"](x))) + block["emb"](emb)[:, :, None, None]
        return block["skip"](x) + block["conv_2"](F.silu(block["norm_2"](h)))

    def forward(self, x, t):
        emb = F.silu(self.time(common.time_embedding(t, 64)))
        skip = self.apply_block(self.first, self.stem(F.pixel_unshuffle(x, 2)), emb)
        h = self.shrink(skip)
        for block in self.low:
            h = self.apply_block(block, h, emb)
        h = self.grow(F.interpolate(h, scale_factor=2))
        h = self.apply_block(self.last, torch.cat([h, skip], dim=1), emb)
        return F.pixel_shuffle(self.output(F.silu(h)), 2)


def plain_loop(net, data, seconds, batch, optimizer, decay=True):
    """Flow matching as a tutorial writes it, for so many seconds of CPU time -> the EMA, steps."""
    ema = copy.deepcopy(net)
    lr, start, steps = optimizer.param_groups[0]["lr"], time.process_time(), 0
    while (part := (time.process_time() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - part) if decay else lr
        x_1, _ = data.batch(batch)
        x_0, t = torch.randn_like(x_1), torch.rand(batch)
        x_t = torch.lerp(x_0, x_1, common.bcast(t, x_1))
        optimizer.zero_grad()
        (net(x_t, t) - (x_1 - x_0)).square().mean().backward()
        optimizer.step()
        with torch.no_grad():  # warmed up as common.Run's
            pair = list(ema.parameters()), list(net.parameters())
            torch._foreach_lerp_(*pair, 1 - min(0.999, (1 + steps) / (10 + steps)))
        steps += 1
    return ema.eval(), steps


class Swapped(nn.Module):
    """f(x, t) of a network that takes the time first."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t):
        return self.net(t, x)


def shuffled(images):
    """MNIST's images come by writer: the first are no random sample."""
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]


def make_judge(data):
    torch.manual_seed(0)
    judge = Judge(data)
    print(f"the judge is right on {judge.accuracy:.2%} of the test set", flush=True)
    return judge


def in_one_piece(x):
    """Of images (B, 1, H, W), the part whose pixels above -0.5 hang together, corners included."""
    from scipy.ndimage import label

    pieces = [label(image, np.ones((3, 3)))[1] for image in (x[:, 0] > -0.5).numpy()]
    return sum(count == 1 for count in pieces) / len(pieces)


def judge_rows(samples, data_dir):
    """Any script's samples.npz of MNIST, beside as many images of the training and test set."""
    x, *y = (torch.from_numpy(a) for a in np.load(samples).values())
    if x.shape[1:] != (28, 28, 1):
        raise SystemExit(f"{samples} holds {tuple(x.shape[1:])}, MNIST's images are (28, 28, 1)")
    x, y = x.permute(0, 3, 1, 2), y[0] if y else None
    data = common.load_data(common.Config(dataset="mnist", data_dir=data_dir))
    judge, n = make_judge(data), min(len(x), 10_000)
    train = shuffled(data.train), shuffled(data.train_labels)
    test = data.test, data.test_labels
    sets = {"samples": (x, y), "training images": train, "test images": test}
    for name, (images, labels) in sets.items():
        images = common.to_float(images[:n])
        distance, certain = judge.distance(images)
        row = f"{n} {name}: {certain:.1%} certain"
        if name != "test images":  # they are what it is the distance to
            row += f", distance {distance:.1f}"
        if labels is not None:
            row += f", {(judge.classes(images) == labels[:n]).float().mean():.1%} of their class"
        try:
            row += f", {in_one_piece(images):.1%} in one piece"
        except ImportError:
            row += ", scipy is not installed"
        print(row, flush=True)


def quality_rows(minutes, data_dir, folder):
    """MNIST after equal CPU time: flow_matching.py's preset, a plain U-Net, torchcfm's example."""
    seconds = 60 * minutes

    def settings(out, steps):
        out = common.free_folder(f"{folder}/{out}")
        flags = ["--dataset", "mnist", "--data-dir", data_dir, "--out", out]
        flags += ["--no-class-conditional", "--fm-until", "0", "--amp", "off"]  # as the others are
        return common.parse(flow_matching.Config, flow_matching.PRESETS, [*flags, "--steps", steps])

    def ours():
        def train(out, steps):
            cfg = settings(out, str(steps))
            run, data, path = flow_matching.prepare(cfg)
            start = time.process_time()
            flow_matching.train(cfg, run, data, path)
            return run.ema, time.process_time() - start

        train("warm", 20)
        steps = round(40 * seconds / train("speed", 40)[1])  # within the time
        return train("ours", steps)[0], steps

    def plain():
        net = Plain()
        return plain_loop(net, data, seconds, 32, torch.optim.AdamW(net.parameters(), lr=2e-3))

    def torchcfm():
        from torchcfm.models.unet.unet import UNetModelWrapper

        net = UNetModelWrapper(dim=(1, 28, 28), num_channels=32, num_res_blocks=1)
        optimizer = torch.optim.Adam(net.parameters())
        return plain_loop(Swapped(net), data, seconds, 128, optimizer, decay=False)

    data = common.load_data(settings("data", "1"))
    judge, n = make_judge(data), 500
    floor, certain = judge.distance(common.to_float(shuffled(data.train)[:n]))
    print(f"{n} training images: distance {floor:.1f}, {certain:.0%} certain", flush=True)
    for name, contender in {"ours": ours, "plain": plain, "torchcfm": torchcfm}.items():
        torch.manual_seed(0)
        start = time.process_time()
        try:
            net, steps = contender()
        except ImportError:
            print("torchcfm is not installed")
            continue
        spent = (time.process_time() - start) / 60
        x_0 = torch.randn(n, 1, 28, 28, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            solve = {"method": "midpoint", "steps": 10}
            x = torch.cat(
                [common.odeint(net, part, (0.0, 1.0), **solve)[0] for part in x_0.split(100)]
            )
        common.save_images(f"{folder}/{name}.png", x[:64])
        distance, certain = judge.distance(x)
        parameters = sum(p.numel() for p in net.parameters()) / 1e6
        print(
            f"{name:9} {spent:5.1f} CPU-min, {steps:6} steps, {parameters:5.2f} M parameters: "
            f"distance {distance:6.1f}, {certain:4.0%} certain",
            flush=True,
        )


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="measure on the GPU [on the CPU]")
    kinds = ["unet", "ode", "adjoint", "vector", "vae", "d3pm", "straight", "presets", "quality"]
    parser.add_argument("--rows", choices=kinds, help="these alone [all but presets, quality]")
    about = "of training for each of the quality rows"
    parser.add_argument("--minutes", type=float, default=10.0, help=f"CPU-minutes {about} [10]")
    parser.add_argument("--judge", help="a samples.npz of MNIST to judge, and nothing else")
    parser.add_argument("--data-dir", default="data", help="where MNIST lies for them [data]")
    parser.add_argument("--out", default="runs/quality", help="where they write [runs/quality]")
    arguments, others = parser.parse_known_args(argv)
    if others and arguments.rows != "presets":
        parser.error(f"unknown: {' '.join(others)} (--rows presets hands flags on to the scripts)")
    return arguments, others


def main():
    arguments, others = parse()
    if arguments.gpu and not torch.cuda.is_available():
        sys.exit("--gpu: there is none here")
    if arguments.judge and not Path(arguments.judge).is_file():
        sys.exit(f"--judge: there is no file {arguments.judge}")
    warnings.filterwarnings("ignore")
    device = torch.device("cuda" if arguments.gpu else "cpu")
    torch.set_float32_matmul_precision("high")
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    rows = {
        "unet": unet_rows,
        "ode": ode_rows,
        "adjoint": adjoint_rows,
        "vector": vector_rows,
        "vae": vae_rows,
        "d3pm": d3pm_rows,
        "straight": straight_rows,
    }
    if arguments.judge:
        judge_rows(arguments.judge, arguments.data_dir)
        return
    if arguments.rows == "quality":
        quality_rows(arguments.minutes, arguments.data_dir, arguments.out)
        return
    if arguments.rows == "presets":
        preset_rows(device, others)
        return
    for name, show in rows.items():
        if arguments.rows in (None, name):
            show(device)


if __name__ == "__main__":
    main()
