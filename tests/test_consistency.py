"""Song et al. 2023: on Gaussian, point-mass and mixture data the consistency function is known."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import common
import consistency as cm
from consistency import EPS, T, at

# Small enough for a test, whole enough to pass through every part.
TINY = ["--steps", "2", "--teacher-steps", "4", "--batch-size", "4", "--width", "8"]
TINY += ["--mu", "0.5", "--examples", "20"]
IMAGES = [*TINY, "--mult", "1", "--blocks", "1", "--patch", "2"]
M, S = 0.3, 0.5  # mean and standard deviation of the Gaussian data


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def single():
    """Single precision, as runs have it."""
    torch.set_default_dtype(torch.float32)


def exact_D(x, t):
    """E[x | x_t] for data N(M, S²)."""
    return M + S**2 / (S**2 + common.bcast(t, x) ** 2) * (x - M)


def exact_f(x, t):
    """The consistency function of the same: the ODE scales x - M with the marginal's width."""
    return M + (x - M) * torch.sqrt((S**2 + EPS**2) / (S**2 + common.bcast(t, x) ** 2))


def mixture_denoiser(centres, s):
    """E[x | x_t] for a mixture of N(centre, s²), centres (K, D)."""

    def D(x, t):
        variance = s**2 + t[:, None] ** 2  # (B, 1)
        square = (x[:, None] - centres).square().sum(2)  # (B, K)
        mean = (-square / (2 * variance)).softmax(1) @ centres
        return mean + s**2 / variance * (x - mean)

    return D


# ---- Parameterisation and boundary condition -----------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 0.37])
def test_boundary_condition_holds_bit_for_bit(dtype, sigma_data, single):
    net = common.MLP(2, width=8)
    f = cm.parameterised(lambda x, t: 5 + net(x.float(), t.float()).to(x.dtype), sigma_data)
    x = torch.randn(100, 2).to(dtype)
    assert torch.equal(f(x, at(EPS, x)), x)
    if dtype != torch.bfloat16:
        t_1 = cm.karras_grid(18).to(dtype)[:1].expand(100) if dtype == torch.float32 else at(EPS, x)
        assert torch.equal(f(x, t_1), x)


def test_edm_misses_the_boundary_condition():
    x = torch.tensor([[1.0], [2.0]])
    skip = cm.parameterised(lambda x, t: 0 * x, 0.5, eps=0.0)(x, at(EPS, x)) / x
    shift = cm.parameterised(lambda x, t: 0 * x + 1, 0.5, eps=0.0)(0 * x, at(EPS, x))
    assert_close(skip - 1, torch.full_like(x, -1.6e-5), rtol=1e-4, atol=0)
    assert_close(shift, torch.full_like(x, 0.002), rtol=1e-4, atol=0)


def test_scalings_keep_input_and_target_at_unit_variance():
    """For data of standard deviation sigma_data; eps shifts them by a part in 1000 at t = 1."""
    seen = {}

    def net(x, t):
        seen.update(x=x, t=t)
        return torch.zeros_like(x)

    for t, low, high in ((EPS, 0, 0), (1.0, 0.5, 0.6), (T, 1, 1)):
        x = 0.5 * torch.randn(100_000, 1)
        z = torch.randn_like(x)
        skipped = cm.parameterised(net, 0.5, eps=0.0)(x + t * z, at(t, x))
        assert seen["x"].std().item() == pytest.approx(1, abs=0.012)  # five standard errors
        assert low <= round(seen["t"][0].item(), 12) <= high
        c_out = cm.parameterised(lambda x, t: 0 * x + 1, 0.5, eps=0.0)(0 * x, at(t, x))
        assert ((x - skipped) / c_out).std().item() == pytest.approx(1, abs=0.012)


# ---- The ODE and its exact solution --------------------------------------------------------------


def test_consistency_function_of_a_gaussian():
    """f is constant along the solution, here followed by 400 Heun steps of the exact field."""
    x_T = M + math.sqrt(S**2 + T**2) * torch.randn(50, 1)
    grid = cm.karras_grid(401)
    x = cm.solve_ode(exact_D, x_T, grid)
    assert_close(x, exact_f(x_T, at(T, x_T)), rtol=0, atol=5e-4)  # the local error is of order 3
    half = cm.solve_ode(exact_D, x_T, grid[200:])
    assert_close(
        exact_f(half, at(grid[200].item(), half)), exact_f(x_T, at(T, x_T)), atol=1e-4, rtol=0
    )


def test_heun_with_18_points_is_biased_on_a_gaussian():
    x_T = torch.tensor([[M + 1.0], [M - 30.0]])
    teacher = cm.solve_ode(exact_D, x_T, cm.karras_grid(18))
    ratio = (teacher - M) / (exact_f(x_T, at(T, x_T)) - M)
    assert_close(ratio, torch.full_like(ratio, 1.0553), rtol=0, atol=5e-5)


def test_grid_ends_are_exact():
    for N in (2, 18, 1281):
        assert cm.karras_grid(N)[[0, -1]].tolist() == [EPS, T]  # in double precision as well
        grid = cm.karras_grid(N).float()
        assert grid[0] == torch.tensor(EPS, dtype=torch.float32)
        assert grid[-1] == T
        assert (grid.diff() > 0).all()
    exact = (EPS ** (1 / 7) + 3 / 8 * (T ** (1 / 7) - EPS ** (1 / 7))) ** 7
    assert cm.karras_grid(9)[3].item() == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(
    ("solver", "low", "high", "at_18"), [("euler", 14, 20, 8.7e-5), ("heun", 60, 90, 1.1e-5)]
)
def test_local_error_of_distillation_has_the_solvers_order(solver, low, high, at_18):
    """At the exact f the loss is the squared local error: 2 p + 2 = 4 and 6 powers of the step."""
    losses = []
    for N in (18, 36, 72):
        grid = cm.karras_grid(N)
        n = torch.arange(N - 1).repeat_interleave(4_000)
        x, z = M + S * torch.randn(len(n), 1), torch.randn(len(n), 1)
        args = (x, z, grid[n], grid[n + 1])
        losses.append(cm.cd_loss(exact_f, exact_f, exact_D, *args, solver=solver).item())
    assert losses[0] == pytest.approx(at_18, rel=0.1)
    assert all(low < a / b < high for a, b in zip(losses, losses[1:], strict=False))


def test_distillation_of_a_mixture_follows_its_reference_map(single):
    """Trained on an exact teacher, f meets its end points, which no untrained one does."""
    angle = torch.arange(8) * math.pi / 4
    centres = 1.2 * torch.stack([angle.cos(), angle.sin()], 1)
    D = mixture_denoiser(centres, 0.1)
    net = common.MLP(2, width=64, blocks=1)
    f = cm.parameterised(net, 0.85)
    optimizer = torch.optim.Adam(net.parameters(), lr=4e-3)
    grid = cm.karras_grid(18)
    x_T = T * torch.randn(300, 2)
    reference = cm.solve_ode(D, x_T, cm.karras_grid(101))

    def error():
        with torch.no_grad():
            return (f(x_T, at(T, x_T)) - reference).norm(dim=1).mean().item()

    before = error()
    for _ in range(200):
        x = centres[torch.randint(8, (128,))] + 0.1 * torch.randn(128, 2)
        n = torch.randint(17, (128,))
        loss = cm.cd_loss(f, f, D, x, torch.randn_like(x), grid[n], grid[n + 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before > 1.0
    assert error() < 0.7


# ---- Consistency training, schedules, metrics ----------------------------------------------------


def test_consistency_training_on_a_point_mass():
    """f = eps/t x + (1 - eps/t) theta, exact at theta = xi: the loss does not depend on z."""
    xi, target = 0.7, -0.2
    theta = torch.tensor(0.4, requires_grad=True)

    def f(theta):
        return lambda x, t: EPS / t[:, None] * x + (1 - EPS / t[:, None]) * theta

    t = torch.tensor([0.01, 0.5, 3.0])
    t_next = torch.tensor([0.02, 0.9, 80.0])
    x = torch.full((3, 1), xi)
    weight = torch.tensor([1.0, 2.0, 5.0])
    loss = cm.ct_loss(f(theta), f(target), x, torch.randn(3, 1), t, t_next, weight=weight)
    gap = theta - target + EPS / t_next * (xi - theta) - EPS / t * (xi - target)
    assert_close(loss, (weight * gap**2).mean(), rtol=1e-9, atol=0)
    (gradient,) = torch.autograd.grad(loss, theta)
    expected = (weight * 2 * gap * (1 - EPS / t_next)).mean()
    assert_close(gradient, expected, rtol=1e-9, atol=0)
    loss = cm.ct_loss(f(theta), f(theta), x, torch.randn(3, 1), t, t_next)
    (gradient,) = torch.autograd.grad(loss, theta)
    gap = EPS * (1 / t_next - 1 / t) * (xi - theta)
    expected = (2 * gap * (1 - EPS / t_next)).mean()  # stopgrad: none through the target
    assert_close(gradient, expected, rtol=1e-6, atol=0)
    exact = cm.ct_loss(f(xi), f(xi), x, torch.randn(3, 1), t, t_next)
    assert exact.item() == pytest.approx(0, abs=1e-20)


def test_training_approaches_distillation_as_the_grid_grows():
    """Theorem 2: the gradients differ by o(step), here halved at least with each doubling of N.

    With f = theta times the exact f both gradients at theta = 1.2 are integrals over a Gaussian,
    which 100 points of x times as many of z give: an odd function's quadrature errors cancel.
    """
    nodes = torch.erfinv(2 * (torch.arange(200) + 0.5) / 200 - 1) * math.sqrt(2)
    nodes = nodes / nodes.square().mean().sqrt()  # mean 0, variance 1, as the integrals need
    x, z = (v.flatten()[:, None] for v in torch.meshgrid(S * nodes, nodes, indexing="ij"))

    def D(x, t):
        return S**2 / (S**2 + t[:, None] ** 2) * x

    def f(theta):
        return lambda x, t: theta * x * torch.sqrt((S**2 + EPS**2) / (S**2 + t[:, None] ** 2))

    gaps = []
    for h in (0.2, 0.1, 0.05):
        t, t_next = at(1.0, x), at(1.0 + h, x)
        gradients = []
        for loss in (cm.cd_loss, cm.ct_loss):
            theta = torch.tensor(1.2, requires_grad=True)
            between = (D,) if loss is cm.cd_loss else ()
            value = loss(f(theta), f(1.2), *between, x, z, t, t_next)
            gradients.append(torch.autograd.grad(value, theta)[0].item())
        gaps.append(abs(gradients[0] - gradients[1]))
    assert all(b < 0.6 * a for a, b in zip(gaps, gaps[1:], strict=False))


def test_schedules_of_consistency_training():
    assert cm.N_of(0, 800_000, 2, 150) == 2
    assert cm.N_of(800_000, 800_000, 2, 150) == 151
    Ns = [cm.N_of(k, 1000, 2, 150) for k in range(1001)]
    assert Ns == sorted(Ns)
    assert cm.mu_of(2, 2, 0.9) == pytest.approx(0.9)  # the paper; the official code has 0.81 here
    assert cm.mu_of(151, 2, 0.9) == pytest.approx(0.9 ** (2 / 151))
    assert cm.mu_of(151, 2, 0.0) == 0
    doubled = [cm.improved_N_of(k, 400_000, 10, 1280) for k in range(0, 400_000, 50_000)]
    assert doubled == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert cm.improved_N_of(49_999, 400_000, 10, 1280) == 11
    assert cm.improved_N_of(399_999, 400_000, 10, 1280) == 1281


def test_times_of_improved_training_are_lognormal():
    grid = cm.karras_grid(41)
    p = cm.lognormal_probabilities(grid)
    normal = torch.distributions.Normal(-1.1, 2.0)
    mass = normal.cdf(grid[1:].log()) - normal.cdf(grid[:-1].log())
    assert_close(p, mass / mass.sum(), rtol=1e-9, atol=1e-12)
    assert p.sum().item() == pytest.approx(1)


def test_metrics():
    x, y = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4)
    assert_close(cm.l1(x, y), (x - y).abs().mean((1, 2, 3)))
    assert_close(cm.l2(x, y), (x - y).square().mean((1, 2, 3)))
    c = 0.00054 * math.sqrt(48)
    norm = (x - y).flatten(1).norm(dim=1)
    assert_close(cm.huber(x, y), norm - c, rtol=0, atol=c**2 / norm.min().item())  # far away
    close = x + 1e-6 * (y - x)
    assert_close(cm.huber(x, close), (1e-6 * norm) ** 2 / (2 * c), rtol=1e-5, atol=0)
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(cm.huber(x, y).sum(), x)
    assert (gradient.flatten(1).norm(dim=1) <= 1).all()


def test_perceptual_metric_scales_its_images():
    seen = []

    def network(x, y):  # as LPIPS returns it: (B, 1, 1, 1)
        seen.append(x.shape)
        return (x - y).square().mean((1, 2, 3), keepdim=True)

    x = torch.full((2, 3, 8, 8), 0.5)
    assert_close(cm.perceptual(x, 0 * x, network), torch.tensor([0.25, 0.25]))
    assert seen == [(2, 3, 224, 224)]


def test_both_networks_draw_the_same_dropout_mask():
    net = nn.Dropout(0.5)
    x = torch.ones(50, 20)
    t = at(1.0, x)
    draws = []

    def f(x, t):
        draws.append(net(x))
        return draws[-1]

    assert cm.pair_loss(f, f, x, t, x, t, cm.l2).abs().max() == 0
    assert not torch.equal(draws[1], f(x, t))  # and the next call another
    assert not cm.pair_loss(lambda x, t: x.requires_grad_(), f, x, t, x, t, cm.l2).isnan().any()


def test_teachers_loss_at_the_exact_denoiser():
    """Karras et al. 2022: the weight makes the loss 1 at every noise, for sigma_data the data's."""
    x, z = M + S * torch.randn(200_000, 1), torch.randn(200_000, 1)
    loss = cm.edm_loss(exact_D, x, z, sigma_data=S)
    assert loss.item() == pytest.approx(1, abs=5 * math.sqrt(2 / 200_000))


# ---- Sampling ------------------------------------------------------------------------------------


def test_sampling_keeps_the_marginal_of_a_gaussian():
    z = torch.randn(100_000, 1)
    x_T = M + math.sqrt(S**2 + T**2) * z
    width = math.sqrt(S**2 + EPS**2)
    assert_close(cm.sample(exact_f, x_T), M + width * z, rtol=0, atol=1e-12)
    for times in ([5.0], [5.0, 0.8], [5.0, 0.8, 0.1]):
        x = cm.sample(exact_f, x_T, times)
        assert x.mean().item() == pytest.approx(M, abs=5 * width / math.sqrt(100_000))
        assert x.std().item() == pytest.approx(width, abs=5 * width / math.sqrt(200_000))


def test_a_last_step_at_eps_changes_nothing(single):
    f = cm.parameterised(common.MLP(2, width=8), 1.0)
    x_T = T * torch.randn(10, 2)
    assert torch.equal(cm.sample(f, x_T, [EPS]), cm.sample(f, x_T))


def test_greedy_search_finds_the_best_times():
    def f(x, t):
        return x * 0 + t[:, None]

    def score(x):  # least where the last time was 2
        return (math.log(x[0].item()) - math.log(2)) ** 2

    (first, second) = cm.greedy_times(f, torch.zeros(3, 1), score, 2, rounds=25)
    assert first == pytest.approx(2, rel=0.001)
    assert second == pytest.approx(2, rel=0.001)  # its upper end: times fall
    assert second <= first


# ---- Editing -------------------------------------------------------------------------------------


def transformations():
    x = torch.randn(4, 3, 8, 8)
    return {
        "colourisation": (x, *cm.colourisation(x)),
        "super-resolution": (x, *cm.super_resolution(x, 4)),
        "inpainting": (x, (torch.rand(8, 8) < 0.5).double(), cm.same, cm.same),
    }


def some_f(x, t):
    return torch.tanh(x.flip(-1)) + common.bcast(t, x)


@pytest.mark.parametrize("name", ["colourisation", "super-resolution", "inpainting"])
def test_editing_identities(name):
    y, mask, A, A_inverse = transformations()[name]
    assert_close(A_inverse(A(y)), y, rtol=0, atol=1e-12)
    assert_close(A(y).square().sum(), y.square().sum(), rtol=1e-12, atol=0)  # orthogonal
    times = [T, 5.0, 0.7, EPS]
    nothing = cm.edit(some_f, y, times, torch.zeros_like(A(y)), A, A_inverse)
    assert_close(nothing, y, rtol=0, atol=1e-12)
    torch.manual_seed(1)
    everything = cm.edit(some_f, y, times, torch.ones_like(A(y)), A, A_inverse)
    torch.manual_seed(1)
    sampled = cm.sample(some_f, T * torch.randn_like(y), times[1:])
    assert_close(everything, sampled, rtol=0, atol=1e-9)
    edited = cm.edit(some_f, y, times, mask, A, A_inverse)
    assert_close((1 - mask) * A(edited), (1 - mask) * A(y), rtol=0, atol=1e-9)
    assert (edited - y).abs().max() > 0.1


def test_what_colourisation_and_super_resolution_know():
    x, mask, A, _ = transformations()["colourisation"]
    luma = cm.grey(x)[:, 0]
    weights = torch.tensor([0.2989, 0.5870, 0.1140])
    assert mask.flatten().tolist() == [0, 1, 1]
    assert_close(A(x)[:, 0], luma / weights.norm(), rtol=1e-9, atol=1e-12)
    first = cm.orthogonal(weights)[:, 0]
    assert_close(first, torch.tensor([0.4471, 0.8780, 0.1705]), rtol=0, atol=1e-4)  # cut off
    known = cm.edit(some_f, cm.grey(x), [T], mask, A, cm.colourisation(x)[2])
    assert_close(cm.grey(known), cm.grey(cm.grey(x)), rtol=0, atol=1e-9)

    x, mask, A, A_inverse = transformations()["super-resolution"]
    means = torch.nn.functional.avg_pool2d(x, 4)
    assert mask.flatten().tolist() == [0] + 15 * [1]
    assert_close(A(x)[:, :, 0], 4 * means, rtol=1e-9, atol=1e-12)
    pixels = means.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert_close(A_inverse(A(x) * (1 - mask)), pixels, rtol=1e-9, atol=1e-12)


def test_strokes_start_the_sampler():
    seen = []

    def f(x, t):
        seen.append((x, t[0].item()))
        return torch.zeros_like(x)

    y = torch.randn(1, 1, 50, 50)
    cm.edit(f, y, [0.5, 0.2], torch.ones_like(y), start=y)
    assert (seen[0][0] - y).std().item() == pytest.approx(0.5, abs=0.036)  # five standard errors
    assert seen[1][0].std().item() == pytest.approx(math.sqrt(0.2**2 - EPS**2), abs=0.015)
    assert [t for _, t in seen] == [0.5, 0.2]


def test_slerp():
    z_1, z_2 = torch.randn(2, 3, 1, 8, 8)
    assert_close(cm.slerp(z_1, z_2, at(0.0, z_1)), z_1)
    assert_close(cm.slerp(z_1, z_2, at(1.0, z_1)), z_2)
    z_1, z_2 = torch.eye(2)[:1], torch.eye(2)[1:]
    angle = torch.tensor([[0.3 * math.pi / 2]])
    assert_close(cm.slerp(z_1, z_2, at(0.3, z_1)), torch.cat([angle.cos(), angle.sin()], 1))


# ---- Devices, networks, runs ---------------------------------------------------------------------


def test_losses_and_samplers_keep_to_their_device(single):
    net = common.MLP(2, width=8).to("meta")
    f, D = cm.parameterised(net, 0.5), cm.parameterised(net, 0.5, eps=0.0)
    x, z = torch.empty(2, 4, 2, device="meta")
    t, t_next = torch.empty(2, 4, device="meta")
    for d in cm.METRICS.values():
        for solver in ("euler", "heun"):
            assert cm.cd_loss(f, f, D, x, z, t, t_next, d, t, solver).is_meta
        assert cm.ct_loss(f, f, x, z, t, t_next, d, weight=t).is_meta
    assert cm.edm_loss(D, x, z).is_meta
    assert cm.sample(f, x, [2.0, EPS]).is_meta
    assert cm.solve_ode(D, x, cm.karras_grid(3)).is_meta
    assert cm.lognormal_probabilities(cm.karras_grid(5).to("meta")).is_meta
    assert len(cm.greedy_times(f, x, lambda x: float(x.is_meta), 2, rounds=2)) == 2
    images = torch.empty(2, 3, 8, 8, device="meta")
    assert cm.slerp(images, images, t[:2]).is_meta
    assert cm.perceptual(images, images, lambda x, y: (x - y).mean((1, 2, 3))).is_meta
    for mask, A, A_inverse in (cm.colourisation(images), cm.super_resolution(images, 4)):
        assert cm.edit(some_f, images, [T, EPS], mask, A, A_inverse).is_meta
    assert cm.grey(images).is_meta


def image_run(tmp_path, pictures, **settings):
    shared = {"dataset": str(pictures()), "out": str(tmp_path / "run"), "device": "cpu"}
    small = {"width": 8, "mult": (1, 1), "blocks": 1, "attention": None, "patch": 2, "steps": 1}
    cfg = cm.Config(**shared, **small, batch_size=4, teacher_steps=1, **settings)
    device = common.setup(cfg)
    data = common.load_data(cfg, device)
    return cfg, data, cm.prepare(cfg, device, data)


def test_networks_compile_without_a_break_and_run_in_bfloat16(tmp_path, pictures, single):
    settings = {"amp": "on", "dropout": 0.1, "image_size": 8, "class_conditional": True}
    cfg, data, run = image_run(tmp_path, pictures, **settings)
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.zeros(2, dtype=torch.int64)
    compiled = torch.compile(run.net.eval(), backend="eager", fullgraph=True)
    for name in ("online", "teacher"):
        assert_close(compiled(x, t, y, name), run.net(x, t, y, name))
    cm.train(cfg, run, data)
    assert run.done == 1
    assert run.model(x, t, y).dtype == torch.float32


def test_target_follows_the_online_network_and_the_teacher_stays(tmp_path, monkeypatch, single):
    """Eq. 8 after every step; the teacher starts all three."""
    cfg = cm.Config(out=str(tmp_path), device="cpu", steps=3, teacher_steps=1, width=8, mu=0.7)
    cfg = dataclasses.replace(cfg, batch_size=16, N=5, lr=0.1, warmup=0, decay="constant")
    device = common.setup(cfg)
    data = common.load_data(cfg, device)
    run = cm.prepare(cfg, device, data)
    teacher = [p.clone() for p in run.net.teacher.parameters()]
    for name in ("online", "target", "teacher"):
        for net in (run.net, run.ema):
            values = getattr(net, name).parameters()
            assert all(torch.equal(a, b) for a, b in zip(values, teacher, strict=True))
    history, drawn = [], []

    def loss(f, f_target, D, x, z, t, t_next, d, weight, solver):
        assert_close(weight, 1 / (t_next - t))
        history.append([net.output[1].bias.clone() for net in (run.net.online, run.net.target)])
        drawn.append((t, t_next))
        return cm.ct_loss(f, f_target, x, z, t, t_next, d)

    monkeypatch.setattr(cm, "cd_loss", loss)
    cm.train(cfg, run, data)
    for (_, target), (online, after) in zip(history, history[1:], strict=False):
        assert_close(after, 0.7 * target + 0.3 * online)
    assert all(
        torch.equal(a, b) for a, b in zip(run.net.teacher.parameters(), teacher, strict=True)
    )
    grid = cm.karras_grid(5).tolist()
    pairs = {(a.item(), b.item()) for t, t_next in drawn for a, b in zip(t, t_next, strict=True)}
    assert pairs <= set(zip(grid, grid[1:], strict=False))
    assert len(pairs) == 4  # every interval was drawn


@pytest.mark.parametrize("method", ["ct", "ict"])
def test_training_follows_its_schedules(tmp_path, monkeypatch, single, method):
    """Step k draws neighbours of the grid of N(k), the target follows by mu(k - 1), and improved
    training has its own metric, weight and distribution of n."""
    cfg = cm.Config(out=str(tmp_path), device="cpu", steps=8, width=8, method=method)
    cfg = dataclasses.replace(cfg, batch_size=256, s_0=2, s_1=8, lr=0.1, warmup=0)
    device = common.setup(cfg)
    data = common.load_data(cfg, device)
    run = cm.prepare(cfg, device, data)
    history, seen = [], []

    def loss(f, f_target, x, z, t, t_next, d, weight):
        history.append([net.output[1].bias.clone() for net in (run.net.online, run.net.target)])
        seen.append((t, t_next, d, weight))
        return original(f, f_target, x, z, t, t_next, d, weight)

    original = cm.ct_loss
    monkeypatch.setattr(cm, "ct_loss", loss)
    cm.train(cfg, run, data)
    improved = method == "ict"
    Ns = [cm.improved_N_of(k, 8, 2, 8) if improved else cm.N_of(k, 8, 2, 8) for k in range(8)]
    assert len(set(Ns)) > 2  # it grows
    for N, (t, t_next, d, weight) in zip(Ns, seen, strict=True):
        grid = cm.karras_grid(N)
        n = (t[:, None] - grid).abs().argmin(1)
        assert_close(t, grid[n])
        assert_close(t_next, grid[n + 1])
        p = cm.lognormal_probabilities(grid) if improved else torch.full((N - 1,), 1 / (N - 1))
        share = torch.bincount(n, minlength=N - 1) / 256
        assert (share - p).abs().max() < 4.5 * 0.5 / 16  # of 256: 4.5 standard errors, at most
        assert d is (cm.huber if improved else cm.l2)
        assert_close(weight, 1 / (t_next - t) if improved else 1.0)
    for k, ((_, target), (online, after)) in enumerate(zip(history, history[1:], strict=False)):
        mu = 0.0 if improved else cm.mu_of(Ns[k], 2, cfg.mu_0)
        assert_close(after, mu * target + (1 - mu) * online)


def test_every_network_sees_the_class_of_its_example(tmp_path, monkeypatch, single):
    """Images of class k are of level 30 k: teacher, online and target network are told k."""
    y = torch.arange(80) % 8
    x = (30 * y).byte()[:, None, None, None].expand(80, 1, 8, 8).contiguous()
    data = common.Data("levels", x, y, x, y)
    settings = {"dataset": "pictures", "out": str(tmp_path), "steps": 2, "teacher_steps": 2}
    settings |= {"width": 8, "mult": (1,), "blocks": 1, "batch_size": 16, "examples": 20}
    cfg = cm.Config(**settings, class_conditional=True, attention=None, device="cpu")
    shown, calls = [], []

    def forward(net, x, t, y=None, context=None, inner=common.UNet.forward):
        shown.append(y)
        return inner(net, x, t, y, context)

    def recorded(name):
        inner = getattr(cm, name)

        def loss(*arguments, **options):
            shown.clear()
            value = inner(*arguments, **options)
            x = next(v for v in arguments if torch.is_tensor(v))
            assert all(torch.equal(30 * y, common.to_uint8(x)[:, 0, 0, 0]) for y in shown)
            calls.append((name, len(shown)))
            return value

        monkeypatch.setattr(cm, name, loss)

    monkeypatch.setattr(common.UNet, "forward", forward)
    for name in ("edm_loss", "cd_loss", "ct_loss"):
        recorded(name)
    run = cm.prepare(cfg, torch.device("cpu"), data)
    cm.train(cfg, run, data)
    shown.clear()
    cm.evaluate(cfg, run, data, [1.0])
    one, two = shown[-6:-4], shown[-4:]  # one evaluation of 16 and of 4, two of 16 and of 4
    assert [len(y) for y in one + two] == [16, 4, 16, 16, 4, 4]
    for i, j in ((0, 0), (0, 1), (1, 2), (1, 3)):  # a noise keeps its class
        assert torch.equal(one[i], two[j])
    other = dataclasses.replace(cfg, method="ct", out=str(tmp_path / "ct"))
    cm.train(other, cm.prepare(other, torch.device("cpu"), data), data)
    per_step = {"edm_loss": 1, "cd_loss": 4, "ct_loss": 2}  # cd: two of the teacher
    assert calls == [(name, n) for name, n in per_step.items() for _ in range(2)]


def test_teacher_and_samplers_follow_the_settings(tmp_path, monkeypatch, single):
    """The EDM's loss, rate and denoiser; k evaluations go through the first k - 1 time points."""
    cfg = cm.Config(out=str(tmp_path), device="cpu", steps=1, teacher_steps=2, width=8, examples=4)
    cfg = dataclasses.replace(cfg, sigma_data=0.7, P_mean=0.3, teacher_lr=0.25, warmup=0, nfe=3)
    device = common.setup(cfg)
    data = common.load_data(cfg, device)
    told, rates, shown = [], [], []

    def edm_loss(D, x, z, P_mean, P_std=1.2, sigma_data=0.5, inner=cm.edm_loss):
        told.append((P_mean, sigma_data))
        return inner(D, x, z, P_mean, P_std, sigma_data)

    def step(run, loss, inner=common.Run.step):
        rates.append((run.stage, run.cfg.lr))
        return inner(run, loss)

    def sample(f, x, times, inner=cm.sample):
        shown.append(list(times))
        return inner(f, x, times)

    monkeypatch.setattr(cm, "edm_loss", edm_loss)
    monkeypatch.setattr(common.Run, "step", step)
    monkeypatch.setattr(cm, "sample", sample)
    run = cm.prepare(cfg, device, data)
    assert told == [(0.3, 0.7)] * 2
    assert rates == [("teacher", 0.25)] * 2
    D, x, t = run.net.functions(cfg, None)[2], torch.randn(4, 2), torch.full((4,), 0.01)
    edm = cm.parameterised(lambda x, t: run.net(x, t, None, "teacher"), 0.7, eps=0.0)
    assert_close(D(x, t), edm(x, t))
    assert (D(x, t) - x).abs().max() > 1e-4  # with eps > 0 the boundary condition holds near it
    cm.evaluate(cfg, run, data, [2.0, 1.0])
    assert shown == [[], [2.0], [2.0, 1.0]]


def test_settings_of_the_teacher_stay(call, refused, single):
    code, _, err = call("consistency", *TINY, "--out", "run")
    assert code == 0, err
    for flags in ("--teacher-steps 9", "--teacher-lr 1", "--P-mean 1", "--teacher-dropout 0.5"):
        arguments = ["--resume", "--out", "run", "--steps", "3", *flags.split()]
        refused(f"learned with {flags.split()[0]} ", "consistency", *arguments)


def test_energy_distance_and_its_error(single):
    x, y = torch.randn(4_000, 2), torch.randn(3_000, 2)
    value, error = cm.distance(x, y)
    assert abs(value) < 5 * error
    assert cm.distance(x, y, blocks=1) == (pytest.approx(common.energy_distance(x, y)), None)
    assert cm.distance(x[:3], y[:4])[1] is None  # one block, where two would hold one point each
    shifted, error = cm.distance(x + torch.tensor([1.0, 0.0]), y)
    assert shifted == pytest.approx(
        common.energy_distance(x + torch.tensor([1.0, 0.0]), y), abs=5 * error
    )


# ---- The command line ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ct", "ict"])
def test_training_without_a_teacher(call, method, single):
    code, out, err = call("consistency", *TINY, "--method", method, "--nfe", "3", "--out", "run")
    assert code == 0, err
    assert "teacher" not in out
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["evaluations"] for line in lines if "split" in line] == [0, 1, 2, 3]


def test_colour_images(call, pictures, single):
    images = pictures(n=30)
    arguments = ["--dataset", images, "--image-size", "8", "--num-samples", "3", "--out", "run"]
    code, out, err = call("consistency", *IMAGES, *arguments)
    assert code == 0, err
    assert Path("run/editing.png").exists()
    assert np.load("run/samples.npz")["arr_1"].shape == (3,)  # a folder's classes are known
    assert "teacher, 34 evaluations" in out


def test_compare_prints_the_table(call, single):
    code, out, err = call("consistency", *TINY, "--compare")
    assert code == 0, err
    rows = [line.split()[0] for line in out.splitlines() if "±" in line and "1000" not in line]
    assert rows == 4 * ["cd"] + 3 * ["ict"] + 3 * ["ct"]


BAD_FLAGS = [
    ("--method gan", "invalid choice: 'gan'"),
    ("--solver rk4", "invalid choice"),
    ("--metric lpips", "invalid choice"),
    ("--mu 1", r"a number in \[0, 1\)"),
    ("--N 0", "at least 1"),
    ("--N 1", "two points at least"),
    ("--method ct --s-0 1", "wants 2 <= s-0 <= s-1"),
    ("--method ict --s-0 20 --s-1 10", "wants 1 <= s-0 <= s-1"),
    ("--compare --s-0 1", "ct wants 2 <= s-0 <= s-1"),
    ("--compare --s-0 20 --s-1 10", "ict wants 1 <= s-0 <= s-1"),
    ("--examples 1", "takes two of each"),
    ("--nfe 0", "at least 1"),
    ("--sigma-data 0", "a number above 0"),
    ("--P-mean=-inf", "must be a finite number, not '-inf'"),
    ("--patch 2", "--patch 2 does not divide"),
    ("--compare --num-samples 3", "--compare trains anew"),
]


@pytest.mark.parametrize(("arguments", "pattern"), BAD_FLAGS)
def test_bad_flags(refused, arguments, pattern, single):
    refused(pattern, "consistency", *TINY, *arguments.split())


def test_bad_pictures(refused, pictures, single):
    flags = [*IMAGES, "--dataset", pictures(), "--image-size", "9"]
    refused(r"--patch 2 does not divide .* \(3, 9, 9\)", "consistency", *flags)
    flags = [*TINY, "--dataset", pictures("few", n=2)]
    refused("few holds out 1: an energy distance takes two", "consistency", *flags)
