"""Lipman et al. 2022: every path, field, loss, sampler and likelihood against a closed form."""

import dataclasses
import itertools
import json
import math
import types

import pytest
import torch
from torch.testing import assert_close

import common
import flow_matching as fm
from flow_matching import OT, VE, VP

# Small enough for a test, whole enough to pass through every part.
TINY = ["--steps", "2", "--batch-size", "4", "--width", "8", "--nll-examples", "4"]
TINY += ["--solver", "euler", "--nfe", "1"]
PATHS = [OT(1e-4), OT(0.1), VP(), VE()]
IDS = ["ot", "ot-wide", "vp", "ve"]
every_path = pytest.mark.parametrize("path", PATHS, ids=IDS)


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def inner_times(n):
    """n times, away from the end where the diffusion paths' fields grow without bound."""
    return torch.linspace(0.02, 0.95, n)


# ---- Conditional paths: Eq. 10 - 22 -------------------------------------------------------------


@every_path
def test_target_is_the_time_derivative_of_the_flow(path):
    x_0, x_1, t = torch.randn(9, 3), torch.randn(9, 3), inner_times(9)
    _, derivative = torch.func.jvp(lambda t: path.psi(x_0, x_1, t), (t,), (torch.ones(9),))
    assert_close(path.dpsi(x_0, x_1, t), derivative, rtol=1e-10, atol=1e-10)


@every_path
def test_conditional_field_moves_the_conditional_flow(path):
    x_0, x_1, t = torch.randn(9, 3), torch.randn(9, 3), inner_times(9)
    x_t = path.psi(x_0, x_1, t)
    assert_close(path.u(x_t, x_1, t), path.dpsi(x_0, x_1, t), rtol=1e-9, atol=1e-9)  # Eq. 13


@every_path
def test_closed_forms_agree_with_theorem_3(path):
    x, x_1, t = torch.randn(9, 3), torch.randn(9, 3), inner_times(9)
    assert_close(path.u(x, x_1, t), fm.Path.u(path, x, x_1, t), rtol=1e-9, atol=1e-9)


@every_path
def test_particles_follow_the_conditional_path(path):
    # Integrating Eq. 15 from psi_0(x_0) must end at psi_t(x_0), for every particle.
    x_0, x_1 = torch.randn(7, 2), torch.randn(7, 2)
    start = path.psi(x_0, x_1, torch.zeros(7))
    x, _ = common.odeint(lambda x, t: path.u(x, x_1, t), start, (0.0, 0.99), rtol=1e-10, atol=1e-10)
    assert_close(x, path.psi(x_0, x_1, torch.full((7,), 0.99)), rtol=1e-7, atol=1e-7)


def test_end_points():
    x_0, x_1 = torch.randn(4, 2), torch.randn(4, 2)
    zero, one = torch.zeros(4), torch.ones(4)
    assert_close(OT(0.1).psi(x_0, x_1, zero), x_0)
    assert_close(OT(0.1).psi(x_0, x_1, one), x_1 + 0.1 * x_0)
    a, sigma, _, _ = VP().coefficients(torch.tensor([0.0, 1 - 1e-5]))
    assert_close(a[0].item(), math.exp(-0.5 * (0.1 + 19.9 / 2)))
    assert_close(a**2 + sigma**2, torch.ones(2))
    assert_close(sigma[1].item(), math.sqrt(0.1 * 1e-5), rtol=1e-3, atol=0)  # sqrt(beta_min s)
    _, sigma, _, _ = VE().coefficients(torch.tensor([0.0, 1.0]))
    assert_close(sigma, torch.tensor([10.0, 0.01]))
    assert VE().sigma_0 == 10.0


# ---- Marginal path and field: Eq. 6, Eq. 8, Theorems 1 and 2 -------------------------------------

DATA = torch.tensor([[1.0, 0.2], [-0.7, 0.9], [-0.5, -1.1]], dtype=torch.float64)


@every_path
def test_marginal_field_solves_the_continuity_equation(path):
    """Theorem 1 as d/dt log p + u . grad log p + div u = 0, Eq. 26 divided by p."""
    t = inner_times(12)
    x = path.psi(torch.randn(12, 2), DATA[torch.arange(12) % 3], t)

    q = fm.FiniteData(DATA, path)

    def log_p(x, t):
        return q.log_prob(x, t)

    x.requires_grad_()
    t.requires_grad_()
    grad_x, grad_t = torch.autograd.grad(log_p(x, t).sum(), (x, t))
    u, div = common.divergence(q.field, x.detach(), t.detach())
    residual = grad_t + (u * grad_x).sum(1) + div
    scale = 1 + grad_t.abs() + div.abs()
    assert_close(residual / scale, torch.zeros(12), rtol=0, atol=1e-9)


@every_path
def test_marginal_density_integrates_to_one(path):
    grid = torch.linspace(-90, 90, 36_001)
    for time in (0.0, 0.3, 0.7):
        t = torch.full_like(grid, time)
        p = fm.FiniteData(DATA[:, :1], path).log_prob(grid[:, None], t).exp()
        assert_close((p.sum() * (grid[1] - grid[0])).item(), 1.0, rtol=1e-9, atol=0)


@every_path
def test_marginal_field_carries_the_quantiles(path):
    """In 1-D the flow is monotone: a particle keeps its quantile, F_t(x_t) = F_0(x_0)."""
    data = DATA[:, :1]

    def cdf(x, time):
        a, sigma, _, _ = path.coefficients(torch.tensor(time))
        return torch.special.ndtr((x - a * data.T) / sigma).mean(1)

    x_0 = path.psi(torch.linspace(-2, 2, 41)[:, None], torch.zeros(41, 1), torch.zeros(41))
    v = fm.FiniteData(data, path).field
    x, _ = common.odeint(v, x_0, (0.0, 0.9), rtol=1e-10, atol=1e-10)
    assert_close(cdf(x, 0.9), cdf(x_0, 0.0), rtol=0, atol=1e-7)


@every_path
def test_fm_and_cfm_have_the_same_gradient(path):
    """Theorem 2 by enumeration: three data points, three times, quadrature over x_0 and x."""
    data = torch.tensor([[1.0], [-0.7], [0.3]])
    theta = torch.tensor([0.3, -0.8, 0.5, 1.1], requires_grad=True)

    def v(x, t):
        return (
            theta[0]
            + theta[1] * x
            + theta[2] * torch.sin(x) * t[:, None]
            + theta[3] * torch.tanh(x)
        )

    # x_0 on a grid: the trapezoidal rule is exact to rounding for a smooth Gaussian integrand
    nodes = torch.linspace(-9, 9, 721)[:, None]
    mass = (-nodes.square() / 2).exp()
    mass = mass / mass.sum()
    loss_cfm = 0.0
    loss_fm = 0.0
    for time in (0.1, 0.5, 0.8):
        for x_1 in data:
            for node, m in zip(nodes[::4], mass[::4] * 4, strict=True):
                t = torch.tensor([time])
                weight = path.weight(t)  # VE is weighted in time: undo it
                loss = fm.cfm_loss(v, node[None], x_1[None], t, path) / weight
                loss_cfm = loss_cfm + m * loss.squeeze() / 9
        for x_1 in data:  # x ~ p_t: the mixture, one component after the other
            t = torch.full((len(nodes),), time)
            x = path.psi(nodes, x_1.expand(len(nodes), 1), t)
            error = v(x, t) - fm.FiniteData(data, path).field(x, t)
            loss_fm = loss_fm + (mass * error.square()).sum() / 9
    (grad_cfm,) = torch.autograd.grad(loss_cfm.sum(), theta)
    (grad_fm,) = torch.autograd.grad(loss_fm, theta)
    assert_close(grad_cfm, grad_fm, rtol=1e-7, atol=1e-8)
    assert loss_cfm.item() > loss_fm.item() + 0.01  # they differ, by a constant


@every_path
def test_fm_and_cfm_targets_have_the_same_mean(path):
    """Theorem 2 for what training regresses on: E[u f(x)] is CFM's for any f, class by class."""
    data = torch.tensor([[1.0], [-0.7], [0.3], [-1.5], [0.9]])
    labels = torch.tensor([0, 0, 0, 1, 1])
    fields = [fm.FiniteData(data[labels == c], path).field for c in range(2)]
    nodes = torch.linspace(-9, 9, 181)  # exact to rounding: see above
    mass = (-nodes.square() / 2).exp()
    x_0 = nodes.repeat(5)[:, None]
    x_1, y = data.repeat_interleave(181, 0), labels.repeat_interleave(181)
    mass = (mass / mass.sum()).repeat(5)
    for time, until in ((0.3, 0.4), (0.45, 0.4)):
        t = torch.full((len(x_0),), time)
        x, own = path.psi(x_0, x_1, t), path.dpsi(x_0, x_1, t)
        u = fm.fm_target(x_0, x_1, t, y, path, fields, until)
        for c in range(2):
            for f in (torch.ones_like(x), x, torch.sin(2 * x)):
                weight = mass[:, None] * f * (y == c)[:, None]
                assert_close((weight * u).sum(), (weight * own).sum(), rtol=1e-9, atol=1e-9)
        changed = (u - own).abs().max().item()
        assert changed > 0.1 if time < until else changed == 0


def test_training_fields_are_of_each_class_and_of_mirrored_images():
    """One step's target against Eq. 8 written out over the training images, one after the other."""
    images = torch.randint(0, 256, (12, 1, 4, 4), dtype=torch.uint8)
    labels = torch.arange(12) % 2 * 2  # no image has class 1
    path, t, y = OT(0.1), torch.tensor([0.1, 0.35, 0.2, 0.3]), torch.tensor([0, 2, 2, 0])
    x_0, x_1 = torch.randn(2, 4, 1, 4, 4)
    x, floats = path.psi(x_0, x_1, t), (images.double() + 0.5) / 128 - 1
    for flip, conditional in itertools.product((False, True), repeat=2):
        data = common.Data("toy", images, labels, images, labels, flip)
        cfg = fm.Config(class_conditional=conditional, flip=flip)
        fields = fm.training_fields(cfg, types.SimpleNamespace(amp=False), data, path)
        seen = y if conditional else torch.zeros_like(y)
        u = fm.fm_target(x_0, x_1, t, seen, path, fields, until=0.9)
        for i in range(4):
            rows = floats[labels == y[i]] if conditional else floats
            rows = torch.cat([rows, rows.flip(3)]) if flip else rows
            sigma = 1 - 0.9 * t[i]
            log_p = [-((x[i] - t[i] * row) ** 2).sum() / (2 * sigma**2) for row in rows]
            p = torch.stack(log_p).softmax(0)
            u_i = sum(w * (row - 0.9 * x[i]) / sigma for w, row in zip(p, rows, strict=True))
            assert_close(u[i], u_i, rtol=0, atol=1e-5)  # to_float gives float32


def test_training_fields_in_bfloat16():
    """Strokes on black, as many numbers as MNIST's: u has rounding errors, far below CFM's own."""
    torch.set_default_dtype(torch.float32)
    images, _ = common.glyphs(400)
    data = common.Data("glyphs", images, torch.zeros(400).long(), images, torch.zeros(400).long())
    x_1 = common.to_float(images[:100])
    x_0, y, path = torch.randn_like(x_1), torch.zeros(100).long(), OT()
    runs = types.SimpleNamespace(amp=False), types.SimpleNamespace(amp=True)
    fields = [fm.training_fields(fm.Config(), run, data, path) for run in runs]
    for time in (0.1, 0.2, 0.3, 0.399):
        t = torch.full((100,), time)
        exact, rough = (fm.fm_target(x_0, x_1, t, y, path, f, until=0.4) for f in fields)
        assert (rough - exact).square().mean().sqrt() < 0.01  # 8 bits of log weights and weights
        own = path.dpsi(x_0, x_1, t)
        assert time > 0.2 or (own - exact).square().mean().sqrt() > 0.3


@every_path
def test_cfm_loss_of_another_target(path):
    x_0, x_1, u, t = torch.randn(5, 3), torch.randn(5, 3), torch.randn(5, 3), inner_times(5)
    loss = fm.cfm_loss(lambda x, t: 2 * x, x_0, x_1, t, path, u)
    by_hand = (2 * path.psi(x_0, x_1, t) - u).square() * path.weight(t)[:, None]
    assert_close(loss, by_hand.mean(), rtol=1e-12, atol=0)


# ---- Gaussian data, where the field, the flow and the density are known --------------------------

MEAN = torch.tensor([0.8, -0.5], dtype=torch.float64)
STD = torch.tensor([0.6, 1.7], dtype=torch.float64)


def gaussian_field(path):
    """x_1 ~ N(MEAN, diag STD²): p_t is N(a MEAN, s²) per dimension, s² = a² STD² + sigma²."""

    def v(x, t):
        a, sigma, da, dsigma = path.coefficients(t[:, None])
        variance = a**2 * STD**2 + sigma**2
        return da * MEAN + (a * da * STD**2 + sigma * dsigma) / variance * (x - a * MEAN)

    return v


def gaussian_moments(path, time):
    a, sigma, _, _ = path.coefficients(torch.tensor(time))
    return a * MEAN, torch.sqrt(a**2 * STD**2 + sigma**2)


@every_path
@pytest.mark.parametrize("solver", [{"rtol": 1e-9, "atol": 1e-9}, {"method": "rk4", "steps": 4000}])
def test_sampler_recovers_mean_and_covariance(path, solver):
    # Four points with mean 0 and covariance I; the flow is affine, so their images' mean and
    # covariance are the flow's exactly, without sampling error.
    x_0 = math.sqrt(2) * torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    if path.t_max < 1:
        solver = {"rtol": 1e-9, "atol": 1e-9}  # a fixed step cannot follow VP's last 1e-5
    x, nfe = fm.sample(gaussian_field(path), x_0, path, **solver)
    (m_0, s_0), (m_1, s_1) = gaussian_moments(path, 0.0), gaussian_moments(path, path.t_max)
    assert_close(x.mean(0), m_1 + s_1 / s_0 * (0 - m_0), rtol=0, atol=1e-6)
    covariance = torch.diag((path.sigma_0 * s_1 / s_0) ** 2)
    assert_close(x.T.cov(correction=0), covariance, rtol=1e-6, atol=1e-6)
    assert nfe > 0
    if isinstance(path, OT):  # starts exactly at the prior: then p_1 is the data, widened
        assert_close(x.mean(0), MEAN, rtol=0, atol=1e-6)
        assert_close(
            x.std(0, correction=0), torch.sqrt(STD**2 + path.sigma_min**2), rtol=0, atol=1e-6
        )


@every_path
def test_likelihood_is_the_exact_density(path):
    x_1 = MEAN + STD * torch.randn(8, 2)
    log_p, _ = fm.log_prob(gaussian_field(path), x_1, path, rtol=1e-9, atol=1e-9)
    (m_0, s_0), (m_1, s_1) = gaussian_moments(path, 0.0), gaussian_moments(path, path.t_max)
    x_0 = m_0 + s_0 / s_1 * (x_1 - m_1)
    prior = torch.distributions.Normal(0.0, path.sigma_0)
    expected = (prior.log_prob(x_0) + (s_0 / s_1).log()).sum(1)
    assert_close(log_p, expected, rtol=1e-6, atol=1e-6)
    if isinstance(path, OT):
        assert_close(
            log_p, torch.distributions.Normal(m_1, s_1).log_prob(x_1).sum(1), rtol=1e-6, atol=1e-6
        )


def test_hutchinson_likelihood_is_exact_for_a_diagonal_field():
    # zᵀ J z = tr J for every Rademacher probe when J is diagonal.
    path, x_1 = OT(), MEAN + STD * torch.randn(8, 2)
    v = gaussian_field(path)
    exact, _ = fm.log_prob(v, x_1, path, rtol=1e-9, atol=1e-9)
    probed, _ = fm.log_prob(v, x_1, path, fm.probe(x_1, "rademacher"), rtol=1e-9, atol=1e-9)
    assert_close(probed, exact, rtol=1e-7, atol=1e-7)
    gaussian, _ = fm.log_prob(v, x_1, path, fm.probe(x_1, "gaussian"), rtol=1e-9, atol=1e-9)
    assert (gaussian - exact).abs().max() > 0.01


@pytest.mark.parametrize("sign", [1, -1])
def test_score_and_noise_give_the_same_field(sign):
    path, t = VP(), inner_times(9)
    x = torch.randn(9, 2)

    def score(x, t):
        a, sigma, _, _ = path.coefficients(t[:, None])
        return -sign * (x - a * MEAN) / (a**2 * STD**2 + sigma**2)

    def noise(x, t):
        return -path.coefficients(t[:, None])[1] * score(x, t)

    v = gaussian_field(path)(x, t)
    from_score = fm.vector_field(score, path, "sm")(x, t)
    from_noise = fm.vector_field(noise, path, "ddpm")(x, t)
    assert_close(from_noise, from_score, rtol=1e-10, atol=1e-10)
    if sign == 1:  # s = grad log p: Departure 1
        assert_close(from_score, v, rtol=1e-10, atol=1e-10)
    else:  # Eq. 46 as printed, s - x with a minus before it, is not the field for s = grad log p
        assert (from_score - v).abs().max() > 0.1


# ---- Losses -------------------------------------------------------------------------------------


def test_minimum_of_the_cfm_loss():
    # N(0, 1) -> N(0, 1): the best field leaves Var(x_1 - x_0 | x_t), whose mean over t is pi / 2.
    path, n = OT(1e-9), 1_000_000
    x_0, x_1, t = torch.randn(n, 1), torch.randn(n, 1), torch.rand(n)

    def best(x, t):
        t = t[:, None]
        return (2 * t - 1) / (t**2 + (1 - t) ** 2) * x

    loss = fm.cfm_loss(best, x_0, x_1, t, path).item()
    assert_close(loss, math.pi / 2, rtol=0, atol=0.012)  # five standard errors of 0.0023
    assert fm.cfm_loss(lambda x, t: best(x, t) + 0.2, x_0, x_1, t, path).item() > loss + 0.03
    x_t = path.psi(x_0, x_1, t)
    expected = (best(x_t, t) - (x_1 - x_0)).square().mean()  # Eq. 23
    assert_close(loss, expected.item(), rtol=1e-6, atol=0)


def test_score_losses_are_their_definitions():
    path, t = VP(), inner_times(6)
    x_0, x_1 = torch.randn(6, 3), torch.randn(6, 3)
    a, sigma, _, _ = path.coefficients(t[:, None])

    def net(x, t):
        return torch.sin(x) + t[:, None]

    x = path.psi(x_0, x_1, t).requires_grad_()
    log_p = torch.distributions.Normal(a * x_1, sigma).log_prob(x)
    (score,) = torch.autograd.grad(log_p.sum(), x)
    square = (net(x, t) - score).square()
    assert_close(fm.sm_loss(net, x_0, x_1, t, path), (sigma**2 * square).mean())
    beta = 0.1 + (1 - t[:, None]) * 19.9
    assert_close(fm.sf_loss(net, x_0, x_1, t, path), (beta * square).mean())
    assert_close(fm.ddpm_loss(net, x_0, x_1, t, path), (net(x, t) - x_0).square().mean())


def test_ve_network_regresses_on_noise():
    path, t = VE(), inner_times(6)
    x_0, x_1 = torch.randn(6, 3), torch.randn(6, 3)

    def net(x, t):
        return torch.sin(x) + t[:, None]

    sigma = path.coefficients(t[:, None])[1]
    expected = (net(path.psi(x_0, x_1, t) / torch.sqrt(1 + sigma**2), t) - x_0).square().mean()
    assert_close(fm.cfm_loss(path.field(net), x_0, x_1, t, path), expected)


# ---- Images -------------------------------------------------------------------------------------


def test_k_samples_approach_the_probability_of_the_bin():
    """The density N(0, 0.004) is steep within a bin of 1/128: K = 1 is loose, K large is exact."""
    normal = torch.distributions.Normal(0.0, 0.004)
    x = common.to_float(torch.tensor([126, 127, 128, 129], dtype=torch.uint8)).double()[:, None]

    def log_p(x):
        return normal.log_prob(x).sum(1)

    mass = normal.cdf(x + 1 / 256) - normal.cdf(x - 1 / 256)
    exact = (128 * mass).log().squeeze(1)
    means = {}
    for k, repeats in ((1, 4000), (16, 400), (2000, 1)):
        draws = [fm.k_sample_log_prob(log_p, x, k) for _ in range(repeats)]
        means[k] = torch.stack(draws).mean(0)
    assert (means[1] < means[16]).all()
    assert (means[16] < exact + 0.02).all()  # a lower bound, up to its sampling error
    assert_close(means[2000], exact, rtol=0, atol=0.15)
    uniform = fm.k_sample_log_prob(lambda x: torch.full((len(x),), -math.log(2.0)), x, 7)
    assert_close(common.bits_per_dim(uniform, 1), torch.full((4,), 8.0))


def test_k_samples_of_an_estimate_keep_one_probe():
    """log p of a linear flow by a probe: with z kept, its error is a constant and K does not tell;
    with a new z each time the mean of the exponentials would rise with K."""
    A = torch.randn(16, 16)
    x, z = torch.zeros(3, 16), fm.probe(torch.zeros(3, 16), "rademacher")

    def log_p(x):
        return fm.log_prob(lambda x, t: x @ A, x, OT(), z, method="euler", steps=1)[0]

    def log_p_anew(x):
        z = fm.probe(x, "rademacher")
        return fm.log_prob(lambda x, t: x @ A, x, OT(), z, method="euler", steps=1)[0]

    one = torch.stack([log_p(x) for _ in range(5)])
    assert_close(one, one[:1].expand_as(one))
    kept = fm.k_sample_log_prob(log_p, x, 50) - fm.k_sample_log_prob(log_p, x, 1)
    anew = fm.k_sample_log_prob(log_p_anew, x, 50) - log_p_anew(x)
    assert kept.abs().max() < 1  # the dequantisations alone differ
    assert (anew.mean() - kept.mean()) > 1


def test_low_resolution():
    flat = torch.full((2, 3, 8, 8), 0.3)
    assert_close(fm.low_resolution(flat, 4), flat)
    x = torch.randn(2, 3, 8, 8)
    low = fm.low_resolution(x, 4)
    assert low.shape == x.shape
    assert low.var() < 0.3 * x.var()
    assert fm.low_resolution(x, 2).var() > 2 * low.var()  # a smaller factor keeps more
    y = torch.tensor([1, 2])
    seen = fm.conditioned(lambda x, t, y: (x, y), y, low)(x, torch.rand(2))
    assert torch.equal(seen[0], torch.cat([x, low], dim=1))
    assert seen[1] is y


def test_super_resolution_is_shown_in_training_what_it_is_shown_in_sampling(tmp_path, monkeypatch):
    """The low-resolution image is of the levels, not of the noise that dequantises them."""
    torch.set_default_dtype(torch.float32)
    shown = []
    monkeypatch.setattr(
        fm,
        "conditioned",
        lambda net, y, low: shown.append(low) or (lambda x, t: net(torch.cat([x, low], dim=1), t)),
    )
    x, y = torch.full((4, 1, 8, 8), 77, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    settings = {"dataset": "pictures", "out": str(tmp_path), "device": "cpu", "steps": 2}
    cfg = fm.Config(**settings, width=8, mult=(1, 1), blocks=1, upsample=2, batch_size=4)
    data = common.Data("flat", x, y, x, y)
    run = common.Run(cfg, common.network(cfg, data, in_channels=2), torch.device("cpu"))
    fm.train(cfg, run, data, fm.OT())
    assert len(shown) == 2
    for low in shown:
        assert_close(low, common.to_float(x), rtol=0, atol=1e-6)  # bicubic weights sum to one


def test_psnr():
    x = torch.zeros(1, 1, 4, 4)
    assert fm.psnr(x + 0.2, x) == pytest.approx(20.0)  # 10 log10(2² / 0.2²)


def test_bits_per_dim_of_the_standard_normal(tmp_path):
    """An untrained network is v = 0: p_1 is the prior, and three channels count as three."""
    torch.set_default_dtype(torch.float32)
    settings = {"dataset": "pictures", "out": str(tmp_path), "device": "cpu", "steps": 0}
    cfg = fm.Config(**settings, width=8, mult=(1, 1), blocks=1, nll_examples=70, tol=1e-3)
    cfg.divergence = "rademacher"
    grey = torch.full((70, 3, 4, 4), 127, dtype=torch.uint8)  # within 1/128 of zero
    y = torch.arange(70) % 2
    data = common.Data("grey", grey, y, grey, y)
    path = OT()
    for classes in (0, 2):
        cfg.class_conditional = classes > 0
        net = common.network(dataclasses.replace(cfg, attention=None), data, num_classes=classes)
        run = common.Run(cfg, net, torch.device("cpu"))
        fm.evaluate_images(cfg, run, data, path)
        record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
        assert record["examples"] == 70
        expected = 7 + math.log2(2 * math.pi) / 2 + math.log2(max(1, classes)) / 48  # - log2 p(y)
        assert record["bits_per_dim"] == pytest.approx(expected, abs=1e-4)


def test_training_draws_times_and_data_as_it_should(tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)
    seen = []

    def loss(v, x_0, x_1, t, path):
        seen.append((x_1, t))
        return v(x_0, t).square().mean()

    monkeypatch.setitem(fm.LOSSES, "cfm", loss)
    glyphs = common.glyphs
    monkeypatch.setattr(common, "glyphs", lambda n, seed: glyphs(n // 20, seed))
    cfg = fm.Config(dataset="glyphs", out=str(tmp_path), steps=1, width=8, mult=(1,), blocks=1)
    cfg = dataclasses.replace(cfg, batch_size=512, device="cpu", path="vp", attention=None)
    fm.train(cfg, *fm.prepare(cfg))
    x_1, t = seen[0]
    assert 0 <= t.min() < 0.02
    assert 0.98 < t.max() <= VP.t_max
    assert t.mean().item() == pytest.approx(0.5, abs=0.065)  # five standard errors
    offset = (x_1 + 1) * 128 % 1  # within its bin: uniform, not in the middle
    assert offset.std().item() == pytest.approx(12**-0.5, rel=0.01)


@pytest.mark.parametrize("conditional", [False, True])
def test_training_regresses_on_the_marginal_field_before_fm_until(
    tmp_path, monkeypatch, conditional
):
    torch.set_default_dtype(torch.float32)
    seen = []
    monkeypatch.setattr(
        fm, "cfm_loss", lambda *args: seen.append(args) or args[0](*args[2:4]).mean()
    )
    glyphs = common.glyphs
    monkeypatch.setattr(common, "glyphs", lambda n, seed: glyphs(n // 20, seed))
    settings = {"dataset": "glyphs", "out": str(tmp_path), "steps": 1, "width": 8, "mult": (1,)}
    settings |= {"blocks": 1, "batch_size": 128, "device": "cpu", "attention": None}
    cfg = fm.Config(**settings, fm_until=0.15, class_conditional=conditional)
    run, data, path = fm.prepare(cfg)
    fm.train(cfg, run, data, path)
    _, x_0, x_1, t, _, u = seen[0]
    own, early = path.dpsi(x_0, x_1, t), t < 0.15
    assert_close(u[~early], own[~early], rtol=0, atol=0)
    assert (u - own)[early].flatten(1).square().mean(1).min() > 0.01
    levels, images = common.to_uint8(x_1), common.to_float(data.train).flatten(1)
    for i in early.nonzero()[:, 0].tolist():
        label = data.train_labels[(data.train == levels[i]).flatten(1).all(1)]  # of x_1
        rows = images[data.train_labels == label] if conditional else images
        x = path.psi(x_0, x_1, t)[i].view(1, -1)
        u_i = fm.FiniteData(rows, path).field(x, t[i : i + 1])
        assert_close(u[i].view(1, -1), u_i, rtol=0, atol=1e-4)


def test_fm_until_is_for_the_plain_field_of_cfm(tmp_path, monkeypatch):
    glyphs = common.glyphs
    monkeypatch.setattr(common, "glyphs", lambda n, seed: glyphs(n // 100, seed))
    for n, setting in enumerate(({"upsample": 4}, {"path": "vp", "objective": "sm"}, {})):
        cfg = fm.Config(dataset="glyphs", fm_until=0.3, out=f"{tmp_path}/{n}", device="cpu")
        cfg = dataclasses.replace(cfg, width=8, **setting)
        fm.prepare(cfg)
        assert cfg.fm_until == (0.0 if setting else 0.3)


# ---- Classes ------------------------------------------------------------------------------------


def two_classes():
    """Class 0 is N(m_0, s² I), class 1 N(m_1, s² I), p(y = 0) = 1/4: the exact v_t(x | y)."""
    means, s = torch.tensor([[1.0, -2.0], [0.5, 1.5]]), 0.3

    def v(x, t, y):
        t = t[:, None]
        a, variance = means[y], (1 - t) ** 2 + (t * s) ** 2  # of OT's path with sigma_min = 0
        return a + (t * s**2 - (1 - t)) / variance * (x - t * a)

    y = (torch.arange(398) % 4 > 0).long()  # counts + 1: 101 and 299 of 400
    data = common.Data("two", means[y], y, means[y], y)
    return v, means, s, data


def test_joint_likelihood_of_classes_adds_up_to_the_marginal():
    v, means, s, data = two_classes()
    x, joint = torch.randn(20, 2), []
    for y in torch.zeros(20).long(), torch.ones(20).long():
        f = fm.conditioned(v, y)
        log_p, _ = fm.log_prob(f, x, OT(0.0), rtol=1e-10, atol=1e-10)
        joint.append(log_p + fm.log_prob_class(y, data))
    normal = torch.distributions.Normal(means[:, None], s)
    weights = torch.tensor([[101 / 400], [299 / 400]])
    exact = (normal.log_prob(x).sum(2).exp() * weights).sum(0).log()
    marginal = torch.stack(joint).logsumexp(0)
    assert_close(marginal, exact, rtol=0, atol=1e-7)  # the solver's tolerance, times its steps


def test_samples_are_of_their_classes_and_these_as_frequent_as_in_the_data():
    v, means, s, data = two_classes()
    cfg, run = (
        fm.Config(class_conditional=True, tol=1e-6),
        types.SimpleNamespace(ema=v, device="cpu"),
    )
    x, y = fm.draw(cfg, run, data, OT(0.0), 20_000)
    assert (y == 0).double().mean().item() == pytest.approx(100 / 398, abs=0.016)  # 5 s.e.
    for k in (0, 1):
        n = (y == k).sum()
        assert_close(x[y == k].mean(0), means[k], rtol=0, atol=5 * s / n.item() ** 0.5)
        assert_close(x[y == k].T.cov(), s**2 * torch.eye(2), rtol=0, atol=0.009)  # 5 s.e.


def test_a_class_without_training_examples_has_a_probability():
    y = torch.tensor([0, 0, 1])
    data = common.Data("few", torch.zeros(3, 2), y, torch.zeros(3, 2), torch.tensor([0, 1, 2]))
    assert data.num_classes == 3
    log_p = fm.log_prob_class(torch.arange(3), data)
    assert_close(log_p.exp(), torch.tensor([3 / 6, 2 / 6, 1 / 6]))


def test_a_models_low_resolution_images_are_of_its_examples(tmp_path, monkeypatch):
    """Images of one level each: evaluation shows every image its own, in each part; and each of
    the K dequantisations has the same probe."""
    torch.set_default_dtype(torch.float32)
    y = torch.zeros(70).long()
    x = torch.arange(70).byte()[:, None, None, None].expand(70, 1, 8, 8).contiguous()
    data, lows, seen, probes = common.Data("levels", x, y, x, y), [], [], []
    settings = {"dataset": "pictures", "out": str(tmp_path), "device": "cpu", "steps": 0}
    settings |= {"width": 8, "mult": (1,), "blocks": 1, "nll_examples": 70, "nll_samples": 2}
    cfg = fm.Config(**settings, upsample=2, solver="euler", nfe=1, divergence="rademacher")
    run = common.Run(cfg, common.network(cfg, data, in_channels=2), torch.device("cpu"))

    def conditioned(net, y, low=None):
        lows.append(low)
        return lambda x, t: 0 * x

    def log_prob(v, x_1, path, z=None, **_):
        seen.append(x_1)
        probes.append(z)
        return torch.zeros(len(x_1)), 0

    monkeypatch.setattr(fm, "conditioned", conditioned)
    monkeypatch.setattr(fm, "log_prob", log_prob)
    fm.evaluate_images(cfg, run, data, OT())
    shown, *parts = lows
    assert torch.equal(common.to_uint8(shown), x[:16])
    for part, twice in zip(parts, (seen[:2], seen[2:]), strict=True):
        for x_1 in twice:
            assert torch.equal(common.to_uint8(part), common.to_uint8(x_1))
    assert torch.equal(common.to_uint8(torch.cat(seen[::2])), x)
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(probes[0], probes[1])
    assert torch.equal(probes[2], probes[3])


@pytest.mark.parametrize("kind", ["images", "vectors"])
def test_training_and_evaluation_show_the_class_of_each_example(kind, tmp_path, monkeypatch):
    """Examples of class k are of level 30 k: whoever is shown x_1 must be shown its class."""
    torch.set_default_dtype(torch.float32)
    y = torch.arange(80) % 8
    x = (30 * y).byte()[:, None, None, None].expand(80, 1, 8, 8).contiguous()
    if kind == "vectors":
        x = (30.0 * y)[:, None].expand(80, 2).contiguous()
    data = common.Data("levels", x, y, x.flip(0), y.flip(0))
    settings = {"dataset": "pictures", "out": str(tmp_path), "device": "cpu", "steps": 2}
    settings |= {"width": 8, "mult": (1, 1), "blocks": 1, "nll_examples": 70}
    settings |= {"solver": "euler", "nfe": 1, "divergence": "rademacher"}
    cfg = fm.Config(**settings, batch_size=16, class_conditional=True)
    run = common.Run(cfg, common.network(cfg, data, num_classes=8), torch.device("cpu"))
    shown, pairs = [], []

    def conditioned(net, y, low=None):
        shown.append(y)
        return lambda x, t: net(x, t, y)

    def log_prob(v, x_1, path, z=None, **_):
        pairs.append((x_1, shown[-1]))
        return torch.zeros(len(x_1)), 0

    def loss(v, x_0, x_1, t, path):
        pairs.append((x_1, shown[-1]))
        return v(x_0, t).square().mean()

    monkeypatch.setattr(fm, "conditioned", conditioned)
    monkeypatch.setattr(fm, "log_prob", log_prob)
    monkeypatch.setitem(fm.LOSSES, "cfm", loss)
    fm.train(cfg, run, data, OT())
    if kind == "vectors":
        fm.evaluate_vectors(cfg, run, data, OT())
    else:
        fm.evaluate_images(cfg, run, data, OT())
    assert [len(x_1) for x_1, _ in pairs] == [16, 16, *([70] if kind == "vectors" else [64, 6])]
    for x_1, y in pairs:
        level = x_1 if kind == "vectors" else common.to_uint8(x_1)
        assert torch.equal(level.flatten(1)[:, 0].long(), 30 * y)


# ---- Devices and learning -----------------------------------------------------------------------


@every_path
def test_losses_and_samplers_keep_to_their_device(path):
    torch.set_default_dtype(torch.float32)
    net = common.MLP(2, width=8).to("meta")
    x_0, x_1 = torch.empty(4, 2, device="meta"), torch.empty(4, 2, device="meta")
    t = torch.empty(4, device="meta")
    losses = ["cfm", "sm", "sf", "ddpm"] if isinstance(path, VP) else ["cfm"]
    for name in losses:
        f = path.field(net) if name == "cfm" else net
        assert fm.LOSSES[name](f, x_0, x_1, t, path).is_meta
        v = fm.vector_field(net, path, name)
        assert fm.sample(v, x_0, path, method="midpoint", steps=2)[0].is_meta
        for trace in ("exact", "rademacher", "gaussian"):
            assert fm.log_prob(v, x_1, path, fm.probe(x_1, trace), method="euler", steps=2)[
                0
            ].is_meta
    data = torch.empty(5, 2, device="meta")
    assert fm.FiniteData(data, path).field(x_0, t).is_meta
    assert fm.k_sample_log_prob(lambda x: x.flatten(1).sum(1), x_1, 2).is_meta
    images = torch.empty(2, 3, 8, 8, device="meta")
    assert fm.low_resolution(images, 2).is_meta


def test_a_short_training_learns_the_checkerboard(tmp_path):
    torch.set_default_dtype(torch.float32)
    cfg = fm.Config(out=str(tmp_path), steps=400, device="cpu")
    run, data, path = fm.prepare(cfg)

    def nll():
        log_p, _ = fm.log_prob(run.ema, data.test[:1000], path, method="midpoint", steps=40)
        return -log_p.mean().item()

    before = nll()
    fm.train(cfg, run, data, path)
    assert before > 3.0  # near the prior's own: log 2 pi + 4/3 = 3.17
    assert nll() < 2.5  # the entropy is log 8 = 2.08; standard error 0.02


def test_nll_of_vectors_with_classes_counts_the_class(tmp_path):
    torch.set_default_dtype(torch.float32)
    y = torch.arange(400) % 4
    data = common.Data("four", torch.randn(400, 2), y, torch.randn(400, 2), y)
    cfg = fm.Config(
        out=str(tmp_path), steps=0, width=8, device="cpu", class_conditional=True, tol=1e-3
    )
    said = {}
    run = types.SimpleNamespace(
        ema=lambda x, t, y: 0 * x,
        device=torch.device("cpu"),
        folder=tmp_path,
        report=lambda split, **f: said.setdefault(split, f),
    )
    fm.evaluate_vectors(cfg, run, data, fm.OT())
    exact = -common.standard_normal_log_prob(data.test).mean().item() + math.log(4)
    assert said["test"]["nll"] == pytest.approx(exact, abs=1e-3)


def test_a_temperature_scales_the_noise_alone(tmp_path, monkeypatch):
    """--temperature in the samples that are written; the picture's second grid, at 0.8."""
    torch.set_default_dtype(torch.float32)
    images, y = torch.zeros(70, 1, 4, 4, dtype=torch.uint8), torch.zeros(70)
    data = common.Data("grey", images, y, images, y)
    cfg = fm.Config(out=str(tmp_path), nll_examples=0, solver="euler", nfe=1, temperature=0.5)
    run = types.SimpleNamespace(ema=lambda x, t, y=0: 0 * x, device="cpu", folder=tmp_path)
    run.report = lambda *_, **__: None
    x, _ = fm.draw(cfg, run, data, fm.OT(), 2_000)
    assert x.std().item() == pytest.approx(0.5, rel=0.02)  # five standard errors of 32,000
    starts, sample = [], fm.sample
    monkeypatch.setattr(
        fm, "sample", lambda v, x, *a, **k: starts.append(x) or sample(v, x, *a, **k)
    )
    fm.evaluate_images(cfg, run, data, fm.OT())
    assert starts[0].std().item() == pytest.approx(1, rel=0.12)  # of 1,024
    assert_close(starts[1], 0.8 * starts[0])
    assert (tmp_path / "samples.png").exists()
