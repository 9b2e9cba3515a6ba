"""Song et al. 2021: kernels, losses, samplers, likelihoods, conditioning against closed forms."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import common
import score_sde
from score_sde import VE, VP, SubVP

# Small enough for a test, whole enough to pass through every part.
TINY = ["--steps", "2", "--batch-size", "4", "--width", "8", "--nll-examples", "4"]
TINY += ["--classifier-steps", "2", "--sampler-steps", "2", "--sde", "subvp", "--tol", "0.1"]
IMAGES = ["--mult", "1,1", "--blocks", "1", "--attention", "7", "--corrector-steps", "0"]
SDES = [VE(0.01, 50.0), VP(), SubVP()]
every_sde = pytest.mark.parametrize("sde", SDES, ids=["ve", "vp", "subvp"])
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def scalar(value):
    return torch.tensor(float(value))


def gaussian_score(sde, mean=0.0, std=1.0):
    """The score of p_t if the data are N(mean, diag std²): p_t is N(a mean, a² std² + std_t²)."""

    def score(x, t):
        a, sigma = sde.kernel(t[:, None])
        return -(x - a * mean) / (a**2 * std**2 + sigma**2)

    return score


def variance(sde, time, std=1.0):
    a, sigma = sde.kernel(scalar(time))
    return (a**2 * std**2 + sigma**2).item()


@pytest.fixture
def noise(monkeypatch):
    """Makes randn_like return a unit vector along the first axis that x does not have yet.

    Through updates that are linear, x of shape (1, K) then holds the coefficients of the noises
    that it is made of: its variance is the sum of their squares, exactly. The norms in Langevin's
    step are those of infinitely many dimensions, in units of their root.
    """

    def randn_like(x):
        z = torch.zeros_like(x)
        z[0, (x[0] == 0).nonzero()[0]] = 1
        return z

    monkeypatch.setattr(torch, "randn_like", randn_like)


# ---- The SDEs: Eq. 5, 12, 29 - 34 ---------------------------------------------------------------


@every_sde
def test_kernel_solves_the_moment_equations(sde):
    """d mean / dt = f(mean), d variance / dt = 2 f'(x) variance + g²."""

    def moments(state, t):
        mean, var = state
        f = sde.drift(torch.ones(1), t[0])
        return f * mean, 2 * f * var + sde.g2(t)

    (a_0, std_0), (a_1, std_1) = (sde.kernel(torch.tensor([t])) for t in (sde.eps, 0.8))
    (mean, var), _ = common.odeint(moments, (a_0, std_0**2), (sde.eps, 0.8), **TIGHT)
    assert_close(mean, a_1, rtol=1e-8, atol=0)
    assert_close(var, std_1**2, rtol=1e-7, atol=0)


def test_constants():
    a, std = VP().kernel(torch.tensor([1.0, 1e-3, 1e-5]))
    assert_close(a[0].item(), 0.0065716, rtol=1e-4, atol=0)
    assert_close(std, torch.tensor([0.999978, 0.0104854, 0.0010005]), rtol=1e-4, atol=0)
    _, std = SubVP().kernel(torch.tensor([1.0, 1e-3, 1e-5]))
    assert_close(std, torch.tensor([0.999957, 1.09944e-4, 1.00099e-6]), rtol=1e-5, atol=0)
    for sde in (VP(), SubVP()):  # no cancellation in float32
        exact = sde.kernel(torch.tensor([1e-5]))[1]
        assert_close(sde.kernel(torch.tensor([1e-5]).float())[1].double(), exact, rtol=1e-6, atol=0)
    _, std = VE(0.01, 50.0).kernel(torch.tensor([0.0, 1e-300, 1.0]))
    assert_close(std, torch.tensor([0.0, 0.01, 50.0]))  # Eq. 31: sigma(0) = 0, sigma(0+) is not
    t = torch.linspace(0.01, 1, 50)
    assert (SubVP().kernel(t)[1] < VP().kernel(t)[1]).all()


def test_discretisations_are_the_papers_chains():
    """N forward steps of VE lead to sigma(1)² - sigma(0+)² exactly, of VP to 1 - prod(1 - beta_i);
    and every SDE's step is Euler's in the limit."""
    h, x = 1e-3, torch.ones(1)
    times = [scalar(i * h) for i in range(1, 1001)]
    G2 = sum(SDES[0].discretize(x, t, h)[1] ** 2 for t in times)
    assert_close(G2.item(), 50.0**2 - 0.01**2, rtol=1e-9, atol=0)
    a2, var = 1.0, 0.0
    for t in times:
        f, G = VP().discretize(x, t, h)
        a2, var = a2 * (1 + f.item()) ** 2, (1 + f.item()) ** 2 * var + G.item() ** 2
    assert_close(a2 + var, 1.0)  # preserved
    assert_close(a2**0.5, VP().kernel(scalar(1))[0].item(), rtol=0.1, atol=0)  # O(1 / N)
    for sde in SDES:
        t, h = scalar(0.4), 1e-6
        f, G = sde.discretize(x, t, h)
        assert_close(f / h, sde.drift(x, t), rtol=1e-5, atol=0)
        assert_close(G**2 / h, sde.g2(t), rtol=1e-4, atol=0)


@every_sde
def test_prior(sde):
    x = 3 * torch.randn(5, 2, 3)
    normal = torch.distributions.Normal(0.0, sde.prior_std)
    assert_close(sde.prior_log_prob(x), normal.log_prob(x).sum((1, 2)))
    assert_close(sde.prior(10_000, 2).std().item(), sde.prior_std, rtol=0.025, atol=0)  # 5 errors


# ---- Training: Eq. 7 ----------------------------------------------------------------------------


@every_sde
def test_loss_is_its_definition(sde):
    x_0, z, t = torch.randn(6, 3), torch.randn(6, 3), torch.linspace(0.1, 0.9, 6)
    a, std = sde.kernel(t[:, None])
    x = score_sde.perturb(x_0, z, t, sde).requires_grad_()
    log_p = torch.distributions.Normal(a * x_0, std).log_prob(x)
    (target,) = torch.autograd.grad(log_p.sum(), x)

    def score(x, t):
        return torch.sin(x) + t[:, None]

    square = (score(x, t) - target).square()
    for weighting, weight in (("variance", std**2), ("likelihood", sde.g2(t[:, None]))):
        loss = score_sde.dsm_loss(score, x_0, z, t, sde, weighting)
        assert_close(loss, (weight * square).mean())


@every_sde
def test_floor_of_the_loss(sde):
    """At the exact score of N(0.3, 0.7²) it is 1 - std² / v_t; any other score is worse."""
    nodes, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(4))
    x_0, z = (0.3 + 0.7 * nodes).repeat_interleave(4)[:, None], nodes.repeat(4)[:, None]
    mass = 16 * torch.outer(weights, weights).flatten() / weights.sum() ** 2
    for time in (0.2, 0.7):
        t = torch.full((16,), time)
        losses = []
        for factor in (1.0, 1.1, 0.9):
            score = gaussian_score(sde, 0.3, 0.7)

            def weighted(x, t, score=score, factor=factor):  # sqrt(mass) on every error
                _, std = sde.kernel(t[:, None])
                root = mass.sqrt()[:, None]
                return root * factor * score(x, t) + (root - 1) * z / std

            losses.append(score_sde.dsm_loss(weighted, x_0, z, t, sde).item())
        floor = 1 - sde.kernel(scalar(time))[1].item() ** 2 / variance(sde, time, 0.7)
        assert losses[0] == pytest.approx(floor, rel=1e-9)
        assert min(losses[1:]) > losses[0] * (1 + 1e-9)


@every_sde
def test_parametrisations(sde):
    """What each kind of network has to give for the score of N(0, 0.5²); and zero of "residual"
    is the score of N(0, 1)."""
    x, t = torch.randn(6, 2), torch.linspace(0.1, 0.9, 6)
    a, std = sde.kernel(t[:, None])
    total = torch.sqrt(a**2 + std**2)
    exact = gaussian_score(sde, std=0.5)(x, t)
    seen = []

    def noise(x, t):
        seen.append(x)
        return -std * exact

    assert_close(score_sde.score_model(noise, sde, "noise")(x, t), exact)
    assert_close(seen[0], x / total)
    kind = score_sde.score_model(lambda x, t: 0 * x, sde, "residual")
    assert_close(kind(x, t), gaussian_score(sde)(x, t))
    kind = score_sde.score_model(
        lambda u, t: -(exact + x / total**2) * std * total / a, sde, "residual"
    )
    assert_close(kind(x, t), exact)


def test_levels_are_like_those_of_smld_and_ddpm():
    """Eq. 1: sigma_i geometric, up to sigma_max; Eq. 3: beta_i at t = i / N; Eq. 7: all times."""
    t = score_sde.draw_times(5_000, VE(0.01, 50.0), levels=4)
    sigma = VE(0.01, 50.0).kernel(t.unique())[1]
    assert_close(sigma, 0.01 * 5000 ** (torch.arange(1, 5) / 4))
    counts = t.unique(return_counts=True)[1]
    assert (counts - 1250).abs().max() < 160  # five standard errors
    assert_close(score_sde.draw_times(5_000, VP(), levels=4).unique(), torch.arange(1, 5) / 4)
    t = score_sde.draw_times(5_000, VP(), levels=0)
    assert 1e-5 <= t.min() < 0.01
    assert 0.99 < t.max() <= 1
    assert t.mean().item() == pytest.approx(0.5, abs=0.021)  # five standard errors


# ---- Predictors and correctors: Eq. 4, 6, 46, 47, App. D.3, Alg. 1 - 5 ---------------------------


def test_steps_are_the_papers():
    x, s, t, h = torch.randn(5, 2), torch.randn(5, 2), scalar(0.6), 0.01
    beta = VP().beta(t) * h
    root = torch.sqrt(1 - beta)
    vp = {
        "euler_maruyama": ((1 + beta / 2) * x + beta * s, beta),
        "reverse_diffusion": ((2 - root) * x + beta * s, beta),  # Alg. 3
        "probability_flow": ((2 - root) * x + beta * s / 2, 0 * beta),  # Eq. 44
        "ancestral": ((x + beta * s) / root, beta),  # Eq. 4
    }
    sigma_i, sigma_j = 0.01 * 5000**t, 0.01 * 5000 ** (t - h)
    G2 = sigma_i**2 - sigma_j**2
    g2 = 2 * math.log(5000) * sigma_i**2 * h
    ve = {
        "euler_maruyama": (x + g2 * s, g2),
        "reverse_diffusion": (x + G2 * s, G2),  # Alg. 2
        "probability_flow": (x + G2 * s / 2, 0 * G2),  # Eq. 43
        "ancestral": (x + G2 * s, sigma_j**2 * G2 / sigma_i**2),  # Eq. 47
    }
    for sde, steps in ((VP(), vp), (VE(0.01, 50.0), ve)):
        for name, (mean, width2) in steps.items():
            got, width = getattr(sde, name)(x, s, t, h)
            assert_close(got, mean)
            assert_close(width**2, width2)
    mean, width = SubVP().reverse_diffusion(x, s, t, h)
    expected, g = SubVP().euler_maruyama(x, s, t, h)
    assert_close(mean, expected)
    assert_close(width, g)
    with pytest.raises(TypeError, match="no ancestral"):
        SubVP().ancestral(x, s, t, h)


def final_variance(sde, predictor, steps, std=1.0, correctors=0, snr=0.16):
    """Of x at the end of the sampler, before and after Tweedie's formula, without sampling error.
    To be used with `noise`."""
    x = torch.zeros(1, 2 + steps * (1 + correctors))
    x[0, 0] = sde.prior_std
    trace = []
    score = gaussian_score(sde, std=std)
    x, _ = score_sde.pc_sample(score, sde, x, steps, predictor, correctors, snr, trace=trace)
    return trace[-1].square().sum().item(), x.square().sum().item()


@pytest.mark.parametrize(
    ("predictor", "expected"),
    [("ancestral", 1.0), ("reverse_diffusion", 1.002807), ("euler_maruyama", 1.001400)],
)
def test_vp_keeps_the_variance(noise, predictor, expected):
    # computed apart for t_i = i / 1000; here the grid ends at 1e-3, one step in a thousand less
    var, _ = final_variance(VP(), predictor, 1000)
    assert var == pytest.approx(expected, abs=5e-6)


@every_sde
@pytest.mark.parametrize("predictor", score_sde.PREDICTORS)
def test_predictors_converge_to_the_variance_of_the_data(noise, sde, predictor):
    if isinstance(sde, SubVP) and predictor == "ancestral":
        return
    sde = VE(0.01, 5.0) if isinstance(sde, VE) else sde
    exact = variance(sde, sde.eps_sample, 0.6)
    errors = [abs(final_variance(sde, predictor, n, 0.6)[0] / exact - 1) for n in (200, 400)]
    assert errors[1] < 0.1
    assert errors[1] < 0.6 * errors[0] or errors[1] < 0.003  # first order, or nothing to gain


def test_ve_point_mass(noise, monkeypatch):
    """Ancestral sampling has the kernel's variance at each time, reverse diffusion the recursion's;
    Tweedie's formula then gives the point itself."""
    sde = VE(0.01, 50.0)
    for predictor in ("ancestral", "reverse_diffusion"):
        x = torch.zeros(1, 42)
        x[0, 0] = sde.prior_std
        trace = []
        x, _ = score_sde.pc_sample(gaussian_score(sde, std=0), sde, x, 40, predictor, trace=trace)
        sigma = sde.kernel(torch.linspace(1, sde.eps_sample, 41))[1]
        var = [sigma[0].item() ** 2]
        for a, b in pairwise(sigma.tolist()):
            var.append(b**2 if predictor == "ancestral" else b**4 / a**4 * var[-1] + a**2 - b**2)
        got = torch.stack([x_t.square().sum() for x_t in trace])
        assert_close(got, torch.tensor(var), rtol=1e-8, atol=0)
        assert_close(x, torch.zeros_like(x), rtol=0, atol=1e-12)


@every_sde
@pytest.mark.parametrize("snr", [0.16, 0.3])
def test_langevin_is_stationary_at_a_variance_of_1_plus_r2(noise, sde, snr):
    """In many dimensions, at a variance v: eps = 2 (r v / std(x))², without the alpha of Alg. 5;
    var' = (1 - eps / v)² var + 2 eps stands at v (1 + r²)."""
    t, x = torch.tensor([0.05]), torch.eye(1, 400)
    v = variance(sde, 0.05, 0.8)
    for _ in range(300):
        x = score_sde.langevin(x, t, gaussian_score(sde, std=0.8), sde, snr)
    a = sde.kernel(t)[0].item()
    assert x.square().sum().item() == pytest.approx(v * (1 + (a * snr) ** 2), rel=1e-3)


@pytest.mark.parametrize(("sde", "alpha"), [(VE(), 1.0), (VP(), None), (SubVP(), None)])
def test_corrector_step(sde, alpha, monkeypatch):
    """Alg. 4, Alg. 5, with norms averaged over the batch, and alpha_i the product of 1 - beta."""
    x, z, g = torch.randn(3, 5, 2), torch.randn(3, 5, 2), torch.randn(3, 5, 2)
    monkeypatch.setattr(torch, "randn_like", lambda x: z)
    t = torch.full((3,), 0.4)
    steps = torch.linspace(0, 0.4, 100_001)
    alpha = alpha or torch.exp(-torch.trapezoid(VP().beta(steps), steps)).item()
    ratio = 0.16 * z.flatten(1).norm(dim=1).mean() / g.flatten(1).norm(dim=1).mean()
    eps = 2 * alpha * ratio**2
    got = score_sde.langevin(x, t, lambda x, t: g, sde, 0.16)
    assert_close(got, x + eps * g + (2 * eps).sqrt() * z)


def test_correctors_mend_a_coarse_predictor(noise):
    """Table 1's finding, on a Gaussian: with 20 steps, PC is nearer than the predictor alone."""
    sde = VE(0.01, 5.0)
    exact = variance(sde, sde.eps_sample, 0.6)
    alone = final_variance(sde, "reverse_diffusion", 20, 0.6)[0]
    corrected = final_variance(sde, "reverse_diffusion", 20, 0.6, correctors=1)[0]
    assert abs(corrected / exact - 1) < 0.7 * abs(alone / exact - 1)
    only = final_variance(sde, "none", 200, 0.6, correctors=2, snr=0.3)[0]
    assert only == pytest.approx(exact * (1 + 0.3**2), rel=0.1)  # annealed Langevin dynamics


@every_sde
def test_order_of_algorithm_1_and_its_evaluations(sde):
    """Predictor at t_i+1, correctors at t_i, and Tweedie's formula at the end."""
    seen = []

    def score(x, t):
        seen.append(t[0].item())
        return gaussian_score(sde)(x, t)

    trace = []
    _, nfe = score_sde.pc_sample(
        score, sde, sde.prior(4, 2), 2, "euler_maruyama", correctors=2, trace=trace
    )
    half, end = (1 + sde.eps_sample) / 2, sde.eps_sample
    assert seen == pytest.approx([1, half, half, half, end, end, end])
    assert nfe == len(seen)
    assert len(trace) == 3
    seen.clear()
    _, nfe = score_sde.pc_sample(score, sde, sde.prior(4, 2), 3, "none", correctors=1)
    assert nfe == len(seen) == 4


@every_sde
def test_tweedie(sde):
    x, t = torch.randn(6, 2), torch.linspace(0.1, 0.9, 6)
    a, std = sde.kernel(t[:, None])
    v = a**2 * 0.7**2 + std**2
    exact = 0.3 + a * 0.7**2 / v * (x - a * 0.3)  # E[x_0 | x_t] of N(0.3, 0.7²)
    assert_close(score_sde.tweedie(x, t, gaussian_score(sde, 0.3, 0.7), sde), exact)


# ---- The probability flow ODE: Eq. 13, Eq. 39, Eq. 40 -------------------------------------------


@every_sde
def test_flow_maps_a_gaussian(sde):
    """x_t = a_t m + sqrt(v_t / v_0) (x_0 - a_0 m), there and back."""
    x_0 = 0.4 + 0.3 * torch.randn(6, 2)
    score = gaussian_score(sde, 0.4, 0.3)
    times = torch.tensor([sde.eps, 0.3, 1.0])
    x, _ = score_sde.follow(score, sde, x_0, times, **TIGHT)
    a = sde.kernel(times)[0]
    v = torch.tensor([variance(sde, t, 0.3) for t in times.tolist()])
    for i in range(3):
        expected = a[i] * 0.4 + (v[i] / v[0]).sqrt() * (x_0 - a[0] * 0.4)
        assert_close(x[i], expected, rtol=1e-7, atol=1e-7)
    back, _ = score_sde.follow(score, sde, x[-1], (1.0, sde.eps), **TIGHT)
    assert_close(back, x_0, rtol=0, atol=1e-7)


@every_sde
def test_likelihood_is_the_exact_density(sde):
    x_0 = 0.4 + 0.3 * torch.randn(6, 2)
    score, solver = gaussian_score(sde, 0.4, 0.3), {"rtol": 1e-8, "atol": 1e-8}
    log_p, _ = score_sde.log_prob(score, sde, x_0, **solver)
    v_0, v_1 = variance(sde, sde.eps, 0.3), variance(sde, 1, 0.3)
    (a_0, _), (a_1, _) = sde.kernel(scalar(sde.eps)), sde.kernel(scalar(1))
    x_1 = a_1 * 0.4 + math.sqrt(v_1 / v_0) * (x_0 - a_0 * 0.4)
    expected = sde.prior_log_prob(x_1) + 2 * math.log(v_1 / v_0) / 2
    assert_close(log_p, expected, rtol=0, atol=1e-6)
    if isinstance(sde, VE):
        assert math.log(v_1 / v_0) / 2 == pytest.approx(5.11546, abs=5e-6)
    normal = torch.distributions.Normal(0.4, 0.3)
    # p_1 is not quite the prior, and VE's p_eps is smoothed by sigma_min
    assert_close(log_p, normal.log_prob(x_0).sum(1), rtol=0, atol=0.03)
    probed, _ = score_sde.log_prob(score, sde, x_0, "rademacher", **solver)
    assert_close(probed, log_p, rtol=0, atol=1e-6)  # without variance: the Jacobian is diagonal
    gaussian, _ = score_sde.log_prob(score, sde, x_0, "gaussian", rtol=1e-3, atol=1e-3)
    assert (gaussian - log_p).abs().max() > 0.01


def test_hutchinson_is_unbiased_for_a_correlated_gaussian():
    sde, C = VP(), torch.tensor([[1.0, 0.6, 0.2], [0.6, 0.8, 0.1], [0.2, 0.1, 0.5]])

    def score(x, t):
        a, std = sde.kernel(t[:, None, None])
        return -torch.linalg.solve(a**2 * C + std**2 * torch.eye(3), x[..., None])[..., 0]

    x_0 = torch.tensor([[0.5, -0.3, 0.8]]).expand(2_000, 3)
    solver = {"method": "rk4", "steps": 40}
    exact, _ = score_sde.log_prob(score, sde, x_0[:1], **solver)
    probed, _ = score_sde.log_prob(score, sde, x_0, "rademacher", **solver)
    assert probed.std() > 0.1  # else there is nothing to test
    error = 5 * common.standard_error(probed)
    assert_close(probed.mean(), exact[0], rtol=0, atol=error)


@every_sde
def test_uniform_density_has_8_bits_per_dimension(sde):
    """The data fill [-1, 1]^D: every 8-bit image has 256^-D of the mass."""

    def score(x, t):  # of the uniform density, scaled by a and smoothed by std, per dimension
        a, std = sde.kernel(t[:, None])
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            u = x.abs()  # the far tail of ndtr is exact, the near one is not
            p = torch.special.ndtr((a - u) / std) - torch.special.ndtr((-a - u) / std)
            return torch.autograd.grad(p.log().sum(), x, create_graph=True)[0]

    x_0 = torch.tensor([[0.1, -0.5, 0.3], [0.7, -0.2, 0.05]])
    log_p, _ = score_sde.log_prob(score, sde, x_0, rtol=1e-6, atol=1e-6)
    assert_close(common.bits_per_dim(log_p, 3), torch.full((2,), 8.0), rtol=0, atol=2e-4)


@every_sde
def test_codes_are_the_datas_alone(sde):
    """App. D.5: the code of x_0 is set by the data. In 1-D it is the quantile of x_0 in p_1."""
    means = torch.tensor([-0.8, 0.5])

    def component(x, t):
        a, std = sde.kernel(t[:, None])
        return torch.distributions.Normal(a * means, torch.sqrt(a**2 * 0.2**2 + std**2))

    def score(x, t):
        normal = component(x, t)
        weights = normal.log_prob(x).softmax(1)
        return -(weights * (x - normal.mean) / normal.variance).sum(1, keepdim=True)

    def cdf(x, time):
        return component(x, torch.full((len(x),), time)).cdf(x).mean(1)

    x_0 = torch.linspace(-1.2, 0.9, 9)[:, None]
    x_1, _ = score_sde.follow(score, sde, x_0, (sde.eps, 1.0), rtol=1e-9, atol=1e-9)
    assert_close(cdf(x_1, 1.0), cdf(x_0, sde.eps), rtol=0, atol=1e-6)


def test_slerp():
    x, y = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])
    half = 3 / math.sqrt(2)
    expected = torch.stack([x, torch.tensor([half, half]), y])
    assert_close(score_sde.slerp(x, y, torch.tensor([0.0, 0.5, 1.0])), expected)
    x, y = torch.randn(2, 1, 8, 8).unbind()
    assert score_sde.slerp(x, y, torch.linspace(0, 1, 5)).shape == (5, 1, 8, 8)


# ---- Controllable generation: Eq. 49, App. I ----------------------------------------------------


@every_sde
def test_guidance_is_exact_on_a_mixture(sde):
    """Score of the mixture + gradient of the posterior = score of the component."""
    means, stds = torch.tensor([[0.5, -1.0], [-0.7, 0.2], [0.1, 0.9]]), torch.tensor([0.2, 0.5, 1])

    def logits(x, t):
        a, std = sde.kernel(t[:, None])
        v = a**2 * stds**2 + std**2  # (B, 3)
        square = (x[:, None] - a[..., None] * means).square().sum(2)
        return -square / (2 * v) - v.log()

    def score(x, t):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(logits(x, t).logsumexp(1).sum(), x)[0]

    x, t, y = torch.randn(9, 2), torch.linspace(0.1, 0.9, 9), torch.arange(9) % 3
    a, std = sde.kernel(t[:, None])
    exact = -(x - a * means[y]) / (a**2 * stds[y, None] ** 2 + std**2)
    with torch.no_grad():
        assert_close(score_sde.class_score(score, logits, y)(x, t), exact, rtol=1e-9, atol=1e-9)


@every_sde
def test_imputation_of_independent_dimensions_is_exact(sde):
    """Unknown dimensions end where they would alone; known ones at their values."""
    x_1 = sde.prior(64, 2)
    known = torch.tensor([False, True])
    score, y = gaussian_score(sde, std=0.6), torch.full((64, 2), 0.37)
    impute = score_sde.imputation(y, known, sde)
    torch.manual_seed(1)
    x, _ = score_sde.pc_sample(score, sde, x_1, 20, "probability_flow", impute=impute)
    alone, _ = score_sde.pc_sample(score, sde, x_1, 20, "probability_flow")
    assert_close(x[:, 0], alone[:, 0])
    assert torch.equal(x[:, 1], y[:, 1])


@every_sde
def test_imputation_of_correlated_dimensions_is_biased_without_correctors(sde, monkeypatch):
    """For unit variances and a correlation r, E[x_2 | x_1 = 1] is r. Where only the predictor runs,
    the unknown's mean m solves dm/dw = (w m - r) / (w² - r²) (VE, w = 1 + sigma²), bounded at
    infinity: m = (w - sqrt(w² - r²)) / r, and w ends at 1. Correctors at each time give r."""
    r, sde = 0.8, VE(0.01, 5.0) if isinstance(sde, VE) else sde
    C = torch.tensor([[1.0, r], [r, 1.0]])

    def score(x, t):
        a, std = sde.kernel(t[:, None, None])
        return -torch.linalg.solve(a**2 * C + std**2 * torch.eye(2), x[..., None])[..., 0]

    def opposite_pairs(x):  # every update is linear in x and the noise: the mean has no error
        z = torch.randn(len(x) // 2, *x.shape[1:])
        return torch.cat([z, -z])

    monkeypatch.setattr(torch, "randn_like", opposite_pairs)
    impute = score_sde.imputation(torch.ones(8, 2), torch.tensor([True, False]), sde)
    means = []
    for correctors in (0, 16):
        start, more = torch.zeros(8, 2), {"correctors": correctors, "impute": impute}
        x, _ = score_sde.pc_sample(score, sde, start, 50, "euler_maruyama", **more)
        assert (x[:, 0] == 1).all()
        means.append(x[:, 1].mean().item())
    assert means[0] == pytest.approx((1 - math.sqrt(1 - r**2)) / r, abs=0.015)  # O(1 / N)
    assert means[1] == pytest.approx(r, abs=0.01)


def test_colours():
    x = torch.randn(2, 3, 4, 4)
    y = score_sde.decouple(x)
    assert_close(y[:, 0], math.sqrt(3) * x.mean(1))
    assert_close(y.square().sum(1), x.square().sum(1))  # a rotation
    assert_close(score_sde.decouple(y, inverse=True), x)
    M = score_sde.decouple(torch.eye(3)[:, :, None, None])[..., 0, 0]
    printed = [[0.577, -0.816, 0], [0.577, 0.408, 0.707], [0.577, 0.408, -0.707]]
    assert_close(M, torch.tensor(printed), rtol=0, atol=1e-3)


@every_sde
def test_colourisation_keeps_the_grey_values(sde):
    def score(x, t):
        a, std = sde.kernel(t[:, None, None, None])
        return -x / (a**2 * 0.25 + std**2)

    grey = torch.rand(2, 1, 4, 4) - 0.5
    impute = score_sde.colorization(grey.expand(2, 3, 4, 4), sde)
    x, _ = score_sde.pc_sample(
        score, sde, sde.prior(2, 3, 4, 4), 25, "reverse_diffusion", 1, impute=impute
    )
    assert_close(x.mean(1, keepdim=True), grey)
    assert (x.var(1) > 1e-3).all()  # and has colours


# ---- Measures -----------------------------------------------------------------------------------


def test_independent_pixels():
    train, test = torch.randint(0, 3, (2, 50, 1, 2, 2)).to(torch.uint8)
    bits = [
        -math.log2((1 + (train[:, 0, i, j] == x[0, i, j]).sum().item()) / (50 + 256))
        for x in test
        for i in range(2)
        for j in range(2)
    ]
    got = score_sde.independent_pixels(train, test)
    assert got == pytest.approx(sum(bits) / len(bits), rel=1e-5)  # float32


def test_agreement():
    others, labels = torch.tensor([[0.0, 0], [1, 0], [0, 1]]), torch.tensor([0, 1, 1])
    data = common.Data("points", others, labels, others, labels)
    x, y = torch.tensor([[0.1, 0.1], [0.9, 0.0], [0.1, 0.8], [0, 0]]), torch.tensor([0, 1, 0, 1])
    assert score_sde.agreement(x, y, data) == 0.5


# ---- Devices, precision, compilation ------------------------------------------------------------


@every_sde
def test_losses_and_samplers_keep_to_their_device(sde):
    torch.set_default_dtype(torch.float32)
    net = common.MLP(2, width=8).to("meta")
    x, t = torch.empty(4, 2, device="meta"), torch.empty(4, device="meta")
    assert score_sde.draw_times(4, sde, 0, "meta").is_meta
    assert sde.prior(4, 2, device="meta").is_meta
    for kind in ("noise", "residual"):
        score = score_sde.score_model(net, sde, kind)
        for weighting in ("variance", "likelihood"):
            assert score_sde.dsm_loss(score, x, x, t, sde, weighting).is_meta
    for predictor in score_sde.PREDICTORS:
        if not (isinstance(sde, SubVP) and predictor == "ancestral"):
            assert score_sde.pc_sample(score, sde, x, 2, predictor, 1)[0].is_meta
    for divergence in ("exact", "rademacher", "gaussian"):
        solver = {"method": "euler", "steps": 2}
        assert score_sde.log_prob(score, sde, x, divergence, **solver)[0].is_meta
    images = torch.empty(2, 3, 8, 8, device="meta")
    impute = score_sde.colorization(images, sde)
    assert impute(images, t[:2]).is_meta
    classifier = common.MLP(2, 5, width=8).to("meta")
    y = torch.zeros(4, dtype=torch.long, device="meta")
    assert score_sde.class_score(score, classifier, y)(x, t).is_meta
    assert score_sde.slerp(x[0], x[1], t).is_meta


def test_image_classifier():
    torch.set_default_dtype(torch.float32)
    net = score_sde.Classifier(1, 10, 9, 8)
    x, t = torch.randn(2, 1, 9, 9), torch.rand(2)
    assert net(x, t).shape == (2, 10)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    assert_close(compiled(x, t), net(x, t))
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x, t).isfinite().all()


# ---- Learning, and the command line -------------------------------------------------------------


def test_a_short_training_learns(tmp_path):
    torch.set_default_dtype(torch.float32)
    cfg = score_sde.Config(out=str(tmp_path), steps=200, device="cpu", batch_size=256, width=64)
    cfg.classifier_steps = 60
    x, y = common.DENSITIES["eight_gaussians"](20_000, torch.Generator().manual_seed(0))
    data = common.Data("eight_gaussians", x, y, x[:300], y[:300])
    run, sde = score_sde.prepare(cfg, data, torch.device("cpu"))
    classes = score_sde.prepare_classifier(cfg, data, torch.device("cpu"))

    def nll():
        score = score_sde.score_model(run.ema, sde, cfg.score)
        log_p, _ = score_sde.log_prob(score, sde, data.test[:300], method="rk4", steps=20)
        return -log_p.mean().item()

    before = nll()
    score_sde.train(cfg, run, data, sde)
    score_sde.train_classifier(classes, data, sde)
    assert before > 3.5  # near that of N(0, 1): log 2 pi + 2 = 3.8
    assert nll() < 2.2  # the entropy is 1.12
    classifier = score_sde.scaled(classes.ema, sde)
    logits = classifier(data.test[:300], torch.full((300,), sde.eps))
    right = (logits.argmax(1) == data.test_labels[:300]).float().mean()
    assert right > 0.9  # by chance 1 in 8


def test_training_is_dequantised_on_the_levels_and_with_the_weights_asked_for(
    tmp_path, monkeypatch
):
    torch.set_default_dtype(torch.float32)
    seen = []

    def loss(score, x_0, z, t, sde, weighting):
        seen.append(x_0)
        assert weighting == "likelihood"
        assert set(t.tolist()) == {0.25, 0.5, 0.75, 1.0}  # of 512
        return score(x_0, t).square().mean()

    monkeypatch.setattr(score_sde, "dsm_loss", loss)
    cfg = score_sde.Config(dataset="glyphs", out=str(tmp_path), steps=1, width=8, mult=(1,))
    cfg.blocks, cfg.device, cfg.attention = 1, "cpu", None
    cfg.levels, cfg.weighting = 4, "likelihood"
    images = torch.randint(256, (64, 1, 8, 8)).to(torch.uint8)
    data = common.Data("noise", images, torch.zeros(64), images, torch.zeros(64))
    run, sde = score_sde.prepare(cfg, data, torch.device("cpu"))
    score_sde.train(cfg, run, data, sde)
    offset = (seen[0] + 1) * 128 % 1  # within its bin: uniform, not in the middle
    assert offset.std().item() == pytest.approx(12**-0.5, rel=0.03)


def test_images_by_class_and_in_colour(call, pictures, tmp_path, monkeypatch):
    """And bits per dimension are of images dequantised anew each time; classes by `scaled`."""
    torch.set_default_dtype(torch.float32)
    offsets, kinds = [], []

    def log_prob(score, sde, x, *arguments, inner=score_sde.log_prob, **solver):
        offsets.append((x + 1) * 128 % 1)
        return inner(score, sde, x, *arguments, **solver)

    def scaled(net, sde, inner=score_sde.scaled):
        kinds.append(inner(net, sde))
        return kinds[-1]

    def class_score(score, classifier, y, inner=score_sde.class_score):
        assert classifier is kinds[-1]
        return inner(score, classifier, y)

    for stand_in in (log_prob, scaled, class_score):
        monkeypatch.setattr(score_sde, stand_in.__name__, stand_in)
    for name in ("cats", "dogs"):
        (tmp_path / "animals").mkdir(exist_ok=True)
        pictures(f"animals/{name}", n=12, size=8)
    arguments = [*TINY, *IMAGES, "--dataset", "animals", "--image-size", "8", "--flip"]
    code, out, err = call("score_sde", *arguments, "--nll-repeats", "2", "--num-samples", "3")
    assert code == 0, err
    for word in ("independent_pixels", "samples_near_their_class", "round_trip_error"):
        assert word in out
    lines = (tmp_path / "runs/score_sde-animals/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["examples"] == 3  # all of the held-out ones
    assert len(offsets) == 2
    assert not torch.equal(*offsets)
    assert all(x.std().item() == pytest.approx(12**-0.5, rel=0.1) for x in offsets)  # uniform
    assert kinds


def test_sampling_heeds_its_flags(call, refused, monkeypatch):
    """And a checkpoint is sampled with its own SDE alone."""
    torch.set_default_dtype(torch.float32)
    seen = []

    def pc_sample(score, sde, x, steps, predictor, correctors, snr, **options):
        seen.append((steps, predictor, correctors, snr))
        return original(score, sde, x, steps, predictor, correctors, snr, **options)

    original = score_sde.pc_sample
    monkeypatch.setattr(score_sde, "pc_sample", pc_sample)
    flags = "--sampler-steps 7 --predictor none --corrector-steps 2 --snr 0.3 --num-samples 3"
    code, _, err = call("score_sde", *TINY, *flags.split(), "--out", "run")
    assert code == 0, err
    assert set(seen) == {(7, "none", 2, 0.3)}
    for flag in (["--sde", "vp"], ["--score", "noise"], ["--sigma-max", "20"]):
        refused("learned with", "score_sde", "--sample", "run/checkpoint.pt", *flag)


def test_compare_prints_the_table(call, monkeypatch):
    torch.set_default_dtype(torch.float32)
    kinds = {}

    def pc_sample(score, sde, x, steps, predictor, correctors, snr):
        kinds.setdefault((predictor, correctors), []).append(steps)
        return x, 0

    monkeypatch.setattr(score_sde, "pc_sample", pc_sample)
    monkeypatch.setattr(score_sde, "follow", lambda score, sde, x, times, **_: (x, 7))
    monkeypatch.setattr(common, "energy_distance", lambda x, y: 0.0)
    levels, inner = [], score_sde.draw_times
    monkeypatch.setattr(score_sde, "draw_times", lambda *a: levels.append(a[2]) or inner(*a))
    code, out, err = call("score_sde", *TINY, "--sampler-steps", "84", "--compare", "--levels", "5")
    assert code == 0, err
    assert set(levels) == {5}
    assert "M      42      84     168" in out
    rows = [line.split()[:3] for line in out.splitlines()]
    rows = [row for row in rows if row and row[0] in ("ve", "vp", "subvp")]
    both = [(name, M) for name in score_sde.PREDICTORS for M in "01"] + [("none", "2")]
    both += [("ODE,", "tolerance")] * 3
    expected = [[sde, *row] for sde in ("ve", "vp", "subvp") for row in both]
    expected = [row for row in expected if row[:2] != ["subvp", "ancestral"]]
    assert rows == expected
    for (predictor, M), steps in kinds.items():
        per_step = M + (predictor != "none")
        assert steps[:3] == [42 // per_step, 84 // per_step, 168 // per_step]
    assert "codes of two networks: 0.000 apart" in out  # `follow` gives back the same points


BAD_SETTINGS = [
    ({"sigma_max": 0.001}, "must exceed --sigma-min"),
    ({"beta_max": 0.01}, "below --beta-min"),
    ({"sde": "vp", "sampler_steps": 20}, "--sampler-steps 20: VP's beta_i need 21 or more"),
    ({"sde": "subvp", "predictor": "ancestral"}, "not defined for --sde subvp"),
    ({"predictor": "none", "corrector_steps": 0}, "--predictor none leaves"),
    ({"compare": True, "resume": True}, "trains anew"),
]


@pytest.mark.parametrize(("settings", "pattern"), BAD_SETTINGS)
def test_settings_that_do_not_go_together(settings, pattern):
    x, y = torch.zeros(2, 2), torch.zeros(2)
    with pytest.raises(common.UserError, match=pattern):
        score_sde.check(score_sde.Config(**settings), common.Data("points", x, y, x, y))


def test_what_no_discrete_predictor_asks(call):
    """Euler's steps need no beta_i below 1; and a run that was killed before its classifier."""
    flags = [*TINY, "--sde", "vp", "--predictor", "euler_maruyama", "--sampler-steps", "20"]
    code, _, err = call("score_sde", *flags, "--out", "run")
    assert code == 0, err
    Path("run/checkpoint-classifier.pt").unlink()
    code, out, err = call("score_sde", "--sample", "run/checkpoint.pt")
    assert code == 0, err
    assert "samples_near" not in out


BAD_FLAGS = [
    ("--predictor leap", "invalid choice"),
    ("--sde vq", "invalid choice"),
    ("--snr 0", "a number above 0"),
    ("--levels -1", "at least 0"),
    ("--compare --sampler-steps 40", "need 84 or more"),
    ("--compare --dataset pictures", "made for 2-D data"),
]


@pytest.mark.parametrize(("arguments", "pattern"), BAD_FLAGS)
def test_bad_flags(refused, pictures, arguments, pattern):
    pictures()
    refused(pattern, "score_sde", *arguments.split(), "--steps", "2")
