"""Aneja et al. 2021: the density ratio, SIR, Langevin and the bound where everything is known."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import common
import ncp_vae
from ncp_vae import VAE, Gaussian, Ratio

TINY = ["--steps", "2", "--batch-size", "4", "--hidden", "8", "--width", "8", "--judge-steps", "2"]
TINY += ["--nll-examples", "4", "--nll-samples", "2", "--proposals", "4", "--langevin-steps", "2"]
M, S = 0.7, 0.5  # the aggregate posterior N(M, S²), where the base prior is N(0, 1)
CHI_2 = math.exp(M**2 / (2 - S**2)) / (S * math.sqrt(2 - S**2)) - 1


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def normal(mean, sigma):
    return torch.distributions.Normal(torch.tensor(mean), torch.tensor(sigma))


def log_ratio(z):
    """log q(z) / p(z), z (..., 1) -> (...)."""
    return (normal(M, S).log_prob(z) - normal(0.0, 1.0).log_prob(z))[..., 0]


def stratified(mean, sigma, n):
    """The n quantiles of a normal, (n, 1): their averages are nearly exact integrals."""
    return normal(mean, sigma).icdf((torch.arange(n) + 0.5) / n)[:, None]


# ---- The classifier -----------------------------------------------------------------------------


def test_cross_entropy_at_the_optimum_is_log_2_less_the_jensen_shannon_divergence():
    grid = torch.linspace(-9, 9, 20_001)
    q, p = (normal(*k).log_prob(grid).exp() for k in ((M, S), (0.0, 1.0)))
    middle = (p + q) / 2
    divergence = (torch.xlogy(q, q / middle) + torch.xlogy(p, p / middle)).sum() / 2
    exact = math.log(2) - divergence * (grid[1] - grid[0])
    z_q, z_p = stratified(M, S, 200_000), stratified(0.0, 1.0, 200_000)
    loss = ncp_vae.nce_loss(log_ratio, z_q, z_p)
    assert_close(loss, exact, rtol=0, atol=2e-6)  # the error of the strata
    for other in (lambda z: log_ratio(z) + 0.1, lambda z: 0.9 * log_ratio(z)):
        assert ncp_vae.nce_loss(other, z_q, z_p) > loss + 1e-4
    alike = ncp_vae.nce_loss(lambda z: 0 * z[..., 0], z_p, z_p)
    assert_close(alike.item(), math.log(2))


def test_odds_of_a_trained_classifier_recover_the_density_ratio():
    """The ratio of two normals is quadratic: logistic regression on 1, z, z² must find it."""
    z_q, z_p = stratified(M, S, 20_000), stratified(0.0, 1.0, 20_000)
    w = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = ncp_vae.nce_loss(lambda z: w[0] + w[1] * z[..., 0] + w[2] * z[..., 0] ** 2, z_q, z_p)
        loss.backward()
        return loss

    optimizer.step(closure)
    exact = [-math.log(S) - M**2 / (2 * S**2), M / S**2, 0.5 - 1 / (2 * S**2)]
    assert_close(w.detach(), torch.tensor(exact), rtol=0, atol=5e-3)


def test_a_small_network_learns_a_ratio_in_two_dimensions():
    def ring(n):
        angle = 2 * math.pi * torch.rand(n)
        noise = 0.1 * torch.randn(n, 2)
        return 1.5 * torch.stack([angle.cos(), angle.sin()], dim=1) + noise

    net = Ratio(latent=2, groups=1, width=32)
    z_q, z_p = ring(5_000), torch.randn(5_000, 2)
    with torch.no_grad():
        assert ncp_vae.nce_loss(net, z_q, z_p) > 0.6  # untrained: about log 2
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        ncp_vae.nce_loss(net, ring(256), torch.randn(256, 2)).backward()
        optimizer.step()
    with torch.no_grad():
        assert ncp_vae.nce_loss(net, z_q, z_p) < 0.5
        z = ncp_vae.sir(net, torch.randn(300, 1_000, 2))
    assert abs(z.norm(dim=1).mean() - 1.5) < 0.05  # the prior's is 1.25
    assert z.norm(dim=1).std() < 0.2  # the prior's is .66


def test_context_comes_from_the_posterior_on_both_sides():
    """A classifier that looks at z_<k alone must not tell the two sides apart."""
    vae = VAE(6, 8, latent=1, groups=2)
    with torch.no_grad():
        for posterior in vae.posteriors:
            posterior[-1].bias[0] += 20  # q far from p
    seen = []

    def log_r(z):
        seen.append(z)
        return 3 * z[..., 0]

    losses = ncp_vae.ncp_losses(vae, log_r, torch.bernoulli(torch.full((50, 6), 0.5)))
    first_q, first_p, second_q, second_p = seen
    assert first_q.shape == first_p.shape == (1, 50, 1)
    assert_close(second_q[..., :1], first_q)
    assert_close(second_p[..., :1], first_q)
    sides = (first_p, first_q, first_q[..., :0]), (second_p, second_q, first_q)
    for z_p, z_q, context in sides:
        p = vae.prior(context)
        of_p, of_q = ((z[..., -1:] - p.mean) / p.log_sigma.exp() for z in (z_p, z_q))
        assert abs(of_p.mean()) < 0.7  # five standard errors of 50 draws
        assert of_p.std().item() == pytest.approx(1, abs=0.5)  # likewise
        assert of_q.min() > 5
    assert losses[1] > math.log(2)  # log 2 is the least for sides alike


# ---- Partition function and effective sample size -----------------------------------------------


def test_partition_function_of_the_exact_ratio_is_one():
    z_p = stratified(0.0, 1.0, 400_000)
    assert_close(ncp_vae.log_mean(log_ratio(z_p)).item(), 0.0, rtol=0, atol=1e-6)
    shifted = ncp_vae.log_mean(log_ratio(z_p) + 800)  # no overflow
    assert_close(shifted.item(), 800.0, rtol=0, atol=1e-6)
    columns = torch.stack([log_ratio(z_p), log_ratio(z_p) + 1], dim=1)
    assert_close(ncp_vae.log_mean(columns), torch.tensor([0.0, 1.0]), rtol=0, atol=1e-6)


def test_effective_share_is_that_of_the_chi_square_divergence():
    share = ncp_vae.effective_share(log_ratio(stratified(0.0, 1.0, 400_000)))
    assert_close(share.item(), 1 / (1 + CHI_2), rtol=0, atol=1e-6)
    assert_close(share.item(), 0.49990, rtol=0, atol=1e-5)  # an independent computation
    assert_close(ncp_vae.effective_share(torch.zeros(7)).item(), 1.0)
    one = torch.full((10,), -1e4)
    one[3] = 0.0
    assert_close(ncp_vae.effective_share(one).item(), 0.1)


# ---- Sampling -----------------------------------------------------------------------------------


def test_sir_goes_from_the_prior_to_the_posterior_with_the_proposals():
    errors = []
    for proposals, n in ((1, 40_000), (3, 40_000), (10, 40_000), (400, 10_000)):
        z = ncp_vae.sir(log_ratio, torch.randn(proposals, n, 1))
        assert z.shape == (n, 1)
        errors.append(abs(z.mean() - M).item() + abs(z.std() - S).item())
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert_close(errors[0], M + 1 - S, rtol=0, atol=0.03)  # M = 1: the prior itself
    assert errors[3] < 0.03  # four standard errors, and a bias of order 1 / 400


def test_sir_takes_its_draws_from_their_own_pools():
    pools = 10.0 * torch.arange(5).expand(30, 5)[..., None] + torch.rand(30, 5, 1)
    z = ncp_vae.sir(lambda z: 0 * z[..., 0], pools)
    assert_close((z[:, 0] / 10).floor(), torch.arange(5.0))
    best = ncp_vae.sir(lambda z: 1e4 * z[..., 0], pools)
    assert_close(best, pools.amax(dim=0))


def test_langevin_has_the_known_bias_of_its_step():
    """The unadjusted chain on N(M, S²) has the variance S² / (1 - lambda / (4 S²)), exactly."""
    step, n = 0.2, 40_000
    p = Gaussian(torch.zeros(n, 1), torch.zeros(n, 1))
    draw = ncp_vae.by_langevin(log_ratio, steps=60, step=step)  # forgets the start: .6^60
    z = draw(p, torch.zeros(n, 0))
    assert_close(z.mean().item(), M, rtol=0, atol=5 * S / n**0.5)
    exact = S**2 / (1 - step / (4 * S**2))  # .3125, where S² = .25
    assert_close(z.var().item(), exact, rtol=5 * (2 / n) ** 0.5, atol=0)


HIERARCHY = {"first": (0.3, 0.8), "slope": -0.4, "second": 0.6}  # of q; p: slope .5, deviation 1


def prior_of_two(context):
    if context.shape[-1] == 0:
        zero = context.new_zeros(*context.shape[:-1], 1)
        return Gaussian(zero, zero)
    return Gaussian(0.5 * context, torch.zeros_like(context))


def log_ratio_of_two(z):
    if z.shape[-1] == 1:
        q = normal(*HIERARCHY["first"])
        return (q.log_prob(z) - normal(0.0, 1.0).log_prob(z))[..., 0]
    q = torch.distributions.Normal(HIERARCHY["slope"] * z[..., 0], HIERARCHY["second"])
    return q.log_prob(z[..., 1]) - torch.distributions.Normal(0.5 * z[..., 0], 1.0).log_prob(
        z[..., 1]
    )


@pytest.mark.parametrize("method", ["prior", "sir", "langevin"])
def test_groups_are_sampled_one_after_the_other(method):
    n = 20_000
    draws = {
        "prior": lambda p, context: p.sample(),
        "sir": ncp_vae.by_sir(log_ratio_of_two, 100),
        "langevin": ncp_vae.by_langevin(log_ratio_of_two, 100, 0.04),
    }
    z = ncp_vae.ancestral(prior_of_two, draws[method], torch.zeros(n, 0), 2)
    (mean, s), slope, rest = HIERARCHY["first"], HIERARCHY["slope"], HIERARCHY["second"]
    if method == "prior":
        mean, s, slope, rest = 0.0, 1.0, 0.5, 1.0
    exact = torch.tensor([[s**2, slope * s**2], [slope * s**2, slope**2 * s**2 + rest**2]])
    # Errors of sampling are about .01; Langevin's step and SIR's pools add about as much.
    assert_close(z.mean(dim=0), torch.tensor([mean, slope * mean]), rtol=0, atol=0.04)
    assert_close(z.T.cov(), exact, rtol=0, atol=0.04)


def test_temperature_scales_the_base_priors_deviation():
    p = Gaussian(torch.full((50_000, 1), 2.0), torch.full((50_000, 1), math.log(3)))
    z = p.sample(temperature=0.5)
    assert_close(z.std().item(), 1.5, rtol=0.02, atol=0)  # five standard errors
    assert_close(z.mean().item(), 2.0, rtol=0, atol=0.04)
    assert p.sample(4).shape == (4, 50_000, 1)


# ---- The bound: a linear model, where q(z) is known ---------------------------------------------

A, V, W, NOISE, DATA = 0.6, 0.3, 1.2, 0.5, 1.4  # q(z|x) = N(A x, V), p(x|z) = N(W z, NOISE²)


class Linear:
    """x ~ N(0, DATA²), so the aggregate posterior is N(0, A² DATA² + V)."""

    latent, groups = 1, 1

    def prior(self, context):
        zero = context.new_zeros(*context.shape[:-1], 1)
        return Gaussian(zero, zero)

    def encode(self, x, samples=1):
        mean = (A * x).expand(samples, *x.shape)
        q = Gaussian(mean, torch.full_like(mean, math.log(V) / 2))
        return q.sample(), [(q, self.prior(mean[..., :0]))]

    def log_likelihood(self, x, z):
        return torch.distributions.Normal(W * z, NOISE).log_prob(x)[..., 0]


VARIANCE = A**2 * DATA**2 + V


def exact_ratio(z):
    q = torch.distributions.Normal(0.0, math.sqrt(VARIANCE))
    return (q.log_prob(z) - normal(0.0, 1.0).log_prob(z))[..., 0]


def test_gain_of_the_bound_is_the_divergence_of_the_aggregate_posterior():
    n = 20_000
    x = stratified(0.0, DATA, n)
    base, ncp = ncp_vae.log_weights(Linear(), exact_ratio, x, 20, 200_000)
    divergence = (VARIANCE - 1 - math.log(VARIANCE)) / 2  # KL(q(z) || p(z))
    # E_q[log r] has a standard error below .001, log Z one of about .002.
    assert_close((ncp - base).mean().item(), divergence, rtol=0, atol=0.01)
    # No other ratio gains more: E_q[log r] - log Z <= KL(q(z) || p(z)).
    _, other = ncp_vae.log_weights(Linear(), lambda z: 0.6 * exact_ratio(z), x, 20, 200_000)
    assert (other - base).mean() < divergence
    recon = -math.log(2 * math.pi * NOISE**2) / 2
    recon -= ((1 - W * A) ** 2 * DATA**2 + W**2 * V) / (2 * NOISE**2)
    kl = (V + A**2 * DATA**2 - 1 - math.log(V)) / 2
    assert_close(base.mean().item(), recon - kl, rtol=0, atol=0.01)


def test_many_draws_come_to_the_exact_likelihood_of_either_prior():
    x = torch.tensor([[-1.0], [0.2], [1.5]])
    base, ncp = ncp_vae.log_weights(Linear(), exact_ratio, x, 200_000, 200_000)
    for log_w, variance in ((base, 1.0), (ncp, VARIANCE)):
        marginal = torch.distributions.Normal(0.0, math.sqrt(W**2 * variance + NOISE**2))
        exact = marginal.log_prob(x)[:, 0]
        assert_close(ncp_vae.log_mean(log_w), exact, rtol=0, atol=0.02)
        assert (log_w.mean(dim=0) < exact).all()
        few = ncp_vae.log_mean(log_w[:100_000].view(10_000, 10, 3).transpose(0, 1).flatten(1))
        assert (few.view(10_000, 3).mean(dim=0) > log_w.mean(dim=0)).all()  # ten draws are tighter
        assert (few.view(10_000, 3).mean(dim=0) < exact).all()


def test_bound_of_two_groups_counts_every_partition_function():
    """Constants in the ratios, whatever they depend on in z_<k, must cancel."""
    vae = VAE(6, 8, latent=2, groups=2)
    x = torch.bernoulli(torch.full((3, 6), 0.5))

    def constants(z):
        return 5.0 + (z[..., :2].square().sum(dim=-1) if z.shape[-1] == 4 else 0 * z[..., 0])

    base, ncp = ncp_vae.log_weights(vae, constants, x, 4, 10)
    assert base.shape == ncp.shape == (4, 3)
    assert_close(ncp, base, rtol=1e-10, atol=1e-10)


# ---- The VAE, and the judge ---------------------------------------------------------------------


def test_divergence_of_gaussians():
    q, p = (Gaussian(torch.randn(4, 3), torch.randn(4, 3)) for _ in range(2))
    theirs = [torch.distributions.Normal(g.mean, g.log_sigma.exp()) for g in (q, p)]
    exact = torch.distributions.kl_divergence(*theirs).sum(dim=1)
    assert_close(ncp_vae.kl(q, p), exact, rtol=1e-11, atol=1e-11)
    z = torch.randn(4, 3)
    assert_close(q.log_prob(z), theirs[0].log_prob(z).sum(dim=1))


@pytest.mark.parametrize("groups", [1, 2])
def test_the_two_forms_of_the_evidence_lower_bound_agree(groups):
    vae = VAE(5, 8, latent=2, groups=groups)
    x = torch.bernoulli(torch.full((1, 5), 0.5))
    with torch.no_grad():
        closed = vae(x.expand(40_000, -1))
        drawn, _ = ncp_vae.log_weights(vae, lambda z: 0 * z[..., 0], x, 40_000, 1)
    error = (closed.var() + drawn.var()).sqrt().item() / 200
    assert_close(closed.mean().item(), drawn.mean().item(), rtol=0, atol=5 * error)


def test_bound_of_two_dependent_groups():
    """With the exact ratio every Z_k is 1, and the NCP gains the two divergences from the prior."""
    (mean, s), slope, rest = HIERARCHY["first"], HIERARCHY["slope"], HIERARCHY["second"]

    class Two:
        latent = 1
        prior = staticmethod(prior_of_two)

        def encode(self, x, samples):
            shape = samples, len(x), 1
            q_1 = Gaussian(torch.full(shape, mean), torch.full(shape, math.log(s)))
            z_1 = q_1.sample()
            q_2 = Gaussian(slope * z_1, torch.full(shape, math.log(rest)))
            pairs = (q_1, prior_of_two(z_1[..., :0])), (q_2, prior_of_two(z_1))
            return torch.cat([z_1, q_2.sample()], dim=-1), pairs

        def log_likelihood(self, x, z):
            return torch.zeros(z.shape[:-1])

    base, ncp = ncp_vae.log_weights(Two(), log_ratio_of_two, torch.zeros(1, 3), 4_000, 1_000)
    first = (s**2 + mean**2 - 1) / 2 - math.log(s)
    second = (rest**2 + (slope - 0.5) ** 2 * (s**2 + mean**2) - 1) / 2 - math.log(rest)
    gain = ncp - base
    # log r has a deviation of about 1, and so a mean an error of .016; log Z_k's are smaller
    assert_close(gain.mean().item(), first + second, rtol=0, atol=0.06)


def test_later_groups_see_the_groups_before():
    vae = VAE(5, 8, latent=2, groups=2)
    z, pairs = vae.encode(torch.bernoulli(torch.full((3, 5), 0.5)), samples=7)
    assert z.shape == (7, 3, 4)
    (_, p_1), (_, p_2) = pairs
    assert (p_1.mean == 0).all()
    again = vae.prior(z[..., :2])
    assert_close(p_2.mean, again.mean)
    with pytest.raises(AssertionError):
        assert_close(again.mean, vae.prior(z[..., :2] + 1).mean)


def test_frechet_distance():
    a = torch.randn(5_000, 3) @ torch.randn(3, 3)
    assert abs(ncp_vae.frechet_distance(a, a)) < 1e-6  # the root of rounding errors
    shifted = ncp_vae.frechet_distance(a, a + torch.tensor([1.0, 0.0, 2.0]))
    assert_close(shifted, 5.0, rtol=1e-6, atol=0)
    stretched = ncp_vae.frechet_distance(a - a.mean(0), 3 * (a - a.mean(0)))
    assert_close(stretched, 4 * a.var(dim=0).sum().item(), rtol=1e-6, atol=0)  # (3 - 1)² tr S
    b = torch.randn(4_000, 3) @ torch.randn(3, 3)
    roots = torch.linalg.eigh(a.T.cov())
    half = roots.eigenvectors @ torch.diag(roots.eigenvalues.sqrt()) @ roots.eigenvectors.T
    middle = torch.linalg.eigvalsh(half @ b.T.cov() @ half).sqrt().sum()
    exact = (a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum() - 2 * middle
    assert_close(ncp_vae.frechet_distance(a, b), exact.item(), rtol=1e-9, atol=0)


def test_images_become_grey_and_binary():
    levels = torch.tensor([0, 128, 255]).view(1, 1, 1, 3).expand(20_000, 3, 1, 3)
    x = (levels + 0.5) / 128 - 1
    grey = ncp_vae.grey(x)
    assert_close(grey[0, 0, 0], torch.tensor([0.0, 128 / 255, 1.0]))
    drawn = ncp_vae.binary(x)
    assert ((drawn == 0) | (drawn == 1)).all()
    assert_close(drawn.mean(0), torch.tensor([0.0, 128 / 255, 1.0]), rtol=0, atol=0.02)


def test_every_part_runs_on_the_meta_device():
    with torch.device("meta"):
        vae, ratio = VAE(12, 8, 2, groups=2), Ratio(2, 2, 8)
        x = torch.zeros(3, 12)
        vae(x).mean().backward()
        sum(ncp_vae.ncp_losses(vae, ratio, x)).backward()
        for draw in (ncp_vae.by_sir(ratio, 4), ncp_vae.by_langevin(ratio, 2, 0.1)):
            z = ncp_vae.ancestral(vae.prior, draw, torch.zeros(5, 0), 2)
            assert z.shape == (5, 4)
            assert z.device.type == "meta"
        base, ncp = ncp_vae.log_weights(vae, ratio, x, 4, 6)
        assert base.shape == ncp.shape == (4, 3)
        assert ncp_vae.effective_share(base).shape == (3,)
        assert ncp_vae.Judge(5)(torch.zeros(2, 1, 20, 20)).shape == (2, 5)


def test_networks_compile_without_a_graph_break():
    vae, ratio = VAE(12, 8, 2, groups=2), Ratio(2, 1, 8)
    x, z = torch.zeros(3, 12), torch.randn(4, 2)
    compiled = torch.compile(vae, fullgraph=True, backend="eager")
    torch.manual_seed(1)
    expected = vae(x)
    torch.manual_seed(1)
    assert_close(compiled(x), expected)
    assert_close(torch.compile(ratio, fullgraph=True, backend="eager")(z), ratio(z))


def test_bounds_under_autocast_are_close():
    torch.set_default_dtype(torch.float32)
    vae, ratio = VAE(12, 8, 2, groups=2), Ratio(2, 2, 8)
    x = torch.bernoulli(torch.full((64, 12), 0.5))
    torch.manual_seed(1)
    expected = vae(x)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        bound = vae(x)
        loss = sum(ncp_vae.ncp_losses(vae, ratio, x))
    assert bound.dtype == torch.float32
    assert_close(bound, expected, rtol=0, atol=0.1)  # of about 9 nats, 8 bits of the logits
    assert loss.isfinite()


def test_temperature_scales_what_langevin_leaves():
    """r = 1: the chain's end has the tempered prior's deviation, as SIR's draws have."""
    draw = ncp_vae.by_langevin(lambda z: 0 * z.sum(-1), 400, 0.05, temperature=0.5)
    p = ncp_vae.Gaussian(torch.zeros(4000, 2), torch.full((4000, 2), math.log(2.0)))
    z = draw(p, torch.zeros(4000, 0))
    biased = (1 - 0.05 / 4) ** -0.5  # by its step, as above
    assert z.std().item() == pytest.approx(biased, abs=5 * (1 / (2 * 8000)) ** 0.5)


# ---- The command line ---------------------------------------------------------------------------


def records(folder):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def test_a_short_training_learns(tmp_path):
    """Two patterns of 64 pixels: the bound rises to what two classes and their z cost."""
    torch.set_default_dtype(torch.float32)
    pattern = torch.rand(2, 1, 8, 8) > 0.5
    y = torch.arange(200) % 2
    x = 255 * pattern[y].to(torch.uint8)
    data = common.Data("patterns", x, y, x, y)
    small = {"hidden": 32, "width": 16, "latent": 2, "batch_size": 50, "lr": 1e-2, "device": "cpu"}
    cfg = ncp_vae.Config(dataset="glyphs", out=str(tmp_path), steps=0, judge_steps=1, **small)
    levels = ncp_vae.binary(common.to_float(x))
    bounds, losses = [], []
    for steps in (0, 150):
        cfg.steps, cfg.out = steps, str(tmp_path / str(steps))
        first, second, _ = ncp_vae.train(cfg, torch.device("cpu"), data)
        with torch.no_grad():
            bounds.append(first.ema(levels).mean().item())
            losses.append(sum(ncp_vae.ncp_losses(first.ema, second.ema, levels)).item())
    assert bounds[0] < -40  # 64 fair coins: -44
    assert bounds[1] > -5  # at best -log 2
    assert losses[1] < losses[0] - 0.1  # 2 log 2 at first: q(z) is two clusters, p(z) one


def test_two_stages_groups_and_langevin_samples(call, pictures):
    torch.set_default_dtype(torch.float32)
    arguments = [*TINY, "--dataset", pictures(n=60), "--image-size", "16", "--groups", "2"]
    arguments += ["--sampler", "langevin", "--temperature", "0.7", "--num-samples", "5"]
    code, out, err = call("ncp_vae", *arguments, "--out", "run")
    assert code == 0, err
    for stage in ("", "-ncp", "-judge"):
        assert Path(f"run/checkpoint{stage}.pt").exists()
    assert np.load("run/samples.npz")["arr_0"].shape == (5, 16, 16, 1)
    splits = [record["split"] for record in records("run") if "split" in record]
    assert splits[:3] == ["classifiers", "base VAE", "NCP-VAE"]
    assert set(ncp_vae.SAMPLERS.values()) <= set(splits)
    before = Path("run/checkpoint.pt").read_bytes()
    code, again, err = call("ncp_vae", "--resume", "--out", "run", "--steps", "3")
    assert code == 0, err
    assert torch.load("run/checkpoint-ncp.pt", weights_only=True)["step"] == 3
    assert Path("run/checkpoint.pt").read_bytes() != before
    assert "gain of elbo" in out
    assert "see run/samples.png" in again


def test_bad_input(refused, pictures):
    refused("not made of images", "ncp_vae", *TINY, "--dataset", "moons")
    refused("too small", "ncp_vae", *TINY, "--dataset", pictures(n=9))
    for flag in ("--groups", "--latent", "--proposals", "--nll-samples", "--nll-examples"):
        refused("at least 1", "ncp_vae", flag, "0")
    refused("two latents", "ncp_vae", *TINY, "--dataset", pictures("some", n=60), "--latent", "1")
    refused("above 0", "ncp_vae", "--temperature", "0")
    refused("above 0", "ncp_vae", "--langevin-step", "-1")
    refused("invalid choice", "ncp_vae", "--sampler", "gibbs")
    assert not Path("runs").exists()
