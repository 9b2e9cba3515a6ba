"""Kingma & Welling 2013: estimators and likelihoods where all is known, linear-Gaussian models."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import common
import vae
from vae import VAE, BayesianVAE, Bernoulli, Gaussian

# Small enough for a test, whole enough to pass through every part.
TINY = ["--steps", "2", "--batch-size", "4", "--hidden", "8", "--latent", "3"]
TINY += ["--nll-examples", "3", "--nll-samples", "6"]


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Linear(VAE):
    """Probabilistic PCA: p(x | z) = N(W z + m, s²), q(z | x) = N(A (x - m), diag)."""

    def __init__(self, dims=5, units=2, W=None, s=0.6):
        super().__init__(None, None, units, "gaussian")
        self.W = nn.Parameter(torch.randn(dims, units).cumsum(1) if W is None else W)
        self.m = nn.Parameter(torch.randn(dims))
        self.log_s = nn.Parameter(torch.tensor(s).log())
        M = self.W.T @ self.W + s**2 * torch.eye(units)
        self.M = M.detach()
        A = torch.linalg.solve(M, self.W.T)  # the posterior's mean
        self.A = nn.Parameter(A.detach().contiguous())
        self.log_var = nn.Parameter((s**2 / M.diag()).log().detach())  # the best diagonal q

    def encode(self, x):
        mu = (x - self.m) @ self.A.T
        return Gaussian(mu, self.log_var.expand_as(mu))

    def decode(self, z, theta=None):
        mu = z @ self.W.T + self.m
        return Gaussian(mu, (2 * self.log_s).expand_as(mu))

    def log_p(self, x):
        cov = self.W @ self.W.T + (2 * self.log_s).exp() * torch.eye(len(self.W))
        return torch.distributions.MultivariateNormal(self.m, cov).log_prob(x)


def sigma_points(rows, units):
    """eps whose mean over the first axis is the exact expectation of any quadratic function."""
    points = math.sqrt(units) * torch.cat([torch.eye(units), -torch.eye(units)])
    return points[:, None].expand(-1, rows, -1)


def small(likelihood="bernoulli", kind=VAE, pixels=6, latent=2):
    """A network of random weights, and images for it."""
    outputs = pixels if likelihood == "bernoulli" else 2 * pixels
    networks = vae.mlp(pixels, 5, 2 * latent), vae.mlp(latent, 5, outputs)
    net = kind(*networks, latent, likelihood=likelihood)
    with torch.no_grad():
        for p in [*net.encoder.parameters(), *net.decoder.parameters()]:
            p.normal_(std=0.6)
    return net, torch.bernoulli(torch.full((4, pixels), 0.4))


# ---- Distributions: Eq. 9, Eq. 11, Eq. 12, App. B -----------------------------------------------


def test_gaussian():
    q = Gaussian(torch.randn(4, 3), torch.randn(4, 3))
    normal = torch.distributions.Normal(q.mu, (q.log_var / 2).exp())
    standard = torch.distributions.Normal(torch.zeros(3), torch.ones(3))
    v = torch.randn(7, 4, 3)
    assert_close(q.log_prob(v), normal.log_prob(v).sum(-1))
    assert_close(q.kl(), torch.distributions.kl_divergence(normal, standard).sum(-1))
    assert_close(vae.log_prior(v), standard.log_prob(v).sum(-1))
    draws = torch.stack([q.draw() for _ in range(4000)])
    assert_close(draws.mean(0), q.mu, rtol=0, atol=0.3)  # five standard errors, sigma up to 3
    assert_close(draws.var(0).log(), q.log_var, rtol=0, atol=0.12)  # five standard errors


def test_bernoulli():
    logits, x = 3 * torch.randn(4, 6), torch.bernoulli(torch.full((4, 6), 0.5))
    expected = torch.distributions.Bernoulli(logits=logits).log_prob(x).sum(-1)
    assert_close(Bernoulli(logits).log_prob(x), expected)
    far = Bernoulli(torch.tensor([1000.0, -1000.0]))  # no log(0): the logits' form
    assert far.log_prob(torch.tensor([1.0, 0.0])) == 0
    assert far.log_prob(torch.tensor([0.0, 1.0])) == -2000
    assert_close(
        Bernoulli(torch.full((50_000,), 1.0)).draw().mean().item(), 0.731, rtol=0, atol=0.01
    )


def test_networks():
    net, x = small("gaussian")
    W_1, b_1, W_2, b_2 = net.decoder.parameters()
    z = torch.randn(3, 4, 2)
    p = net.decode(z)
    h = torch.tanh(z @ W_1.T + b_1) @ W_2.T + b_2
    assert_close(p.mu, torch.tanh(h[..., :6]))  # 2 sigmoid(2 h) - 1
    assert_close(p.log_var, h[..., 6:])
    std = torch.cat([p.flatten() for p in vae.mlp(50, 100, 60).parameters()]).std()
    assert_close(std.item(), 0.1, rtol=0.05, atol=0)


# ---- The bound: Eq. 2 - 10 ----------------------------------------------------------------------


def test_bound_on_probabilistic_pca():
    """With the best diagonal q: log p - L = (sum log M_ii - log det M) / 2, for every x."""
    model, x = Linear(), torch.randn(4, 5)
    eps = sigma_points(4, 2)
    gap = (model.M.diag().log().sum() - model.M.logdet()) / 2
    assert gap > 0.01
    assert_close(vae.sgvb_a(model, x, eps), model.log_p(x) - gap, rtol=1e-11, atol=1e-11)
    assert_close(vae.sgvb_b(model, x, eps), model.log_p(x) - gap, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        model.log_var += 0.3
    assert (vae.sgvb_b(model, x, eps) < model.log_p(x) - gap - 0.01).all()  # q was the best


def test_bound_is_tight_at_the_posterior():
    """Orthogonal columns: the posterior is diagonal. Estimator A has no variance there, B has."""
    model = Linear(W=torch.linalg.qr(torch.randn(5, 2))[0] * torch.tensor([1.5, 0.7]))
    x, eps = torch.randn(4, 5), torch.randn(50, 4, 2)
    assert_close(vae.log_weights(model, x, eps), model.log_p(x).expand(50, 4), rtol=0, atol=1e-11)
    b = torch.stack([vae.sgvb_b(model, x, e[None]) for e in eps])
    assert b.std(0).min() > 0.1
    assert_close(vae.sgvb_b(model, x, sigma_points(4, 2)), model.log_p(x))


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_estimators_agree_in_expectation(likelihood):
    net, x = small(likelihood)
    eps = torch.randn(20_000, 4, 2)
    a, b = (vae.SGVB[name](net, x, eps) for name in "AB")
    spread = (vae.log_weights(net, x, eps) - b).std(0) / math.sqrt(20_000)
    assert ((a - b).abs() < 5 * spread).all()
    one = eps[:1]
    q = net.encode(x)
    expected = net.decode(q.sample(one)).log_prob(x)[0] - q.kl()
    assert_close(vae.sgvb_b(net, x, one), expected)
    assert not torch.allclose(vae.sgvb_a(net, x, one), expected)


def test_reparameterised_gradient():
    """Its mean is the gradient of the bound in closed form, for every parameter."""
    model, x = Linear(), torch.randn(4, 5)
    with torch.no_grad():  # away from the optimum of q
        model.A += 0.3 * torch.randn(2, 5)
    q = model.encode(x)
    s2 = (2 * model.log_s).exp()
    square = (x - model.m - q.mu @ model.W.T).square().sum(1)
    square = square + (model.W.square() * q.log_var.exp()[:, None]).sum((1, 2))
    exact = -square / (2 * s2) - 2.5 * torch.log(2 * math.pi * s2) - q.kl()
    parameters = list(model.parameters())
    expected = torch.autograd.grad(exact.sum(), parameters)
    for name in "AB":
        sampled = vae.SGVB[name](model, x, sigma_points(4, 2)).sum()
        for g, e in zip(torch.autograd.grad(sampled, parameters), expected, strict=True):
            assert_close(g, e, rtol=1e-9, atol=1e-10)


def test_linear_vae_finds_the_maximum_likelihood():
    """Its optimum is probabilistic PCA's, with orthogonal columns: the bound is tight there."""
    x = torch.randn(200, 5) * torch.tensor([2.0, 1.3, 0.6, 0.5, 0.4]) @ torch.randn(5, 5)
    eigenvalues = torch.linalg.eigvalsh(x.T.cov(correction=0)).flip(0)
    s2 = eigenvalues[2:].mean()
    log_det = eigenvalues[:2].log().sum() + 3 * s2.log()
    best = -(5 * math.log(2 * math.pi) + log_det + 5) / 2
    model, eps = Linear(), sigma_points(200, 2)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = -vae.sgvb_b(model, x, eps).mean()
        value.backward()
        return value

    start = loss().item()
    optimizer.step(loss)
    assert start > -best + 1
    assert_close(-loss().item(), best.item(), rtol=0, atol=1e-4)
    assert_close((2 * model.log_s).exp().item(), s2.item(), rtol=1e-2, atol=0)
    gram = model.W.T @ model.W
    assert gram[0, 1].abs() < 0.02 * gram.diag().prod().sqrt()


def test_minibatches_estimate_the_whole():
    """Eq. 8: N / M times the sum over a minibatch is right on average over the minibatches."""
    net, _ = small(kind=BayesianVAE)
    x = torch.bernoulli(torch.full((6, 6), 0.4))
    eps, zeta = torch.randn(1, 6, 2), torch.randn_like(net.log_var_theta)
    whole = vae.full_vb(net, x, eps, zeta, 6)
    parts = [vae.full_vb(net, x[i], eps[:, i], zeta, 6) for i in torch.arange(6).split(2)]
    assert_close(torch.stack(parts).mean(), whole)
    q = net.q_theta()
    each = vae.sgvb_b(net, x, eps, net.weights(q.sample(zeta)))
    assert_close(whole, each.sum() - q.kl())


def test_the_prior_on_the_weights():
    """MAP: the optimiser's decay is the gradient of -log N(theta; 0, I) / N."""
    theta = nn.Parameter(torch.randn(5))
    (expected,) = torch.autograd.grad(-vae.log_prior(theta) / 40, theta)
    for method, share in (("aevb", 1), ("full-vb", 0)):
        cfg = vae.Config(method=method)
        (group,) = vae.optimizer(cfg, 40)([theta]).param_groups
        assert_close(group["weight_decay"] * theta.detach(), share * expected)
    assert vae.optimizer(vae.Config(map=False), 40)([theta]).param_groups[0]["weight_decay"] == 0


def test_wake_sleep_keeps_its_two_halves_apart():
    net, x = small()
    torch.manual_seed(3)
    grads = torch.autograd.grad(vae.wake_sleep(net, x).sum(), list(net.parameters()))
    torch.manual_seed(3)
    z = net.encode(x).draw().detach()
    dream_z = torch.randn_like(z)
    dream_x = net.decode(dream_z).draw()
    assert set(dream_x.flatten().tolist()) == {0.0, 1.0}
    wake = net.decode(z).log_prob(x).sum()  # log p(x, z) for theta alone
    sleep = net.encode(dream_x).log_prob(dream_z).sum()  # log q(z | x) for phi alone
    phi = torch.autograd.grad(sleep, list(net.encoder.parameters()))
    theta = torch.autograd.grad(wake, list(net.decoder.parameters()))
    for g, e in zip(grads, (*phi, *theta), strict=True):
        assert_close(g, e)


# ---- Full variational Bayes: App. F -------------------------------------------------------------


class Location(nn.Module):
    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(1))

    def forward(self, z):
        return self.theta.expand(len(z), 1)


class Conjugate(BayesianVAE):
    """x_i ~ N(theta, 1), theta ~ N(0, 1); z has no part in it, and its q is its prior."""

    def encode(self, x):
        return Gaussian(torch.zeros(len(x), 1), torch.zeros(len(x), 1))

    def decode(self, z, theta=None):
        mu = torch.func.functional_call(self.decoder, theta, z.flatten(0, -2))
        return Gaussian(mu.unflatten(0, z.shape[:-1]), torch.zeros(1))


def test_full_vb_is_exact_on_a_conjugate_model():
    x = 1 + torch.randn(6, 1)
    model = Conjugate(None, Location(), 1)
    cov = torch.eye(6) + torch.ones(6, 6)
    log_p = torch.distributions.MultivariateNormal(torch.zeros(6), cov).log_prob(x[:, 0])
    with torch.no_grad():
        model.decoder.theta.copy_(x.sum() / 7)
        model.log_var_theta.fill_(-math.log(7))
    eps = torch.randn(1, 6, 1)
    for _ in range(3):  # A has no variance at the posterior
        assert_close(vae.full_vb(model, x, eps, torch.randn(1), 6, "A"), log_p)
    both = [vae.full_vb(model, x, eps, torch.tensor([e]), 6, "B") for e in (1.0, -1.0)]
    assert_close((both[0] + both[1]) / 2, log_p)  # two sigma points: the expectation
    with torch.no_grad():
        model.log_var_theta += 0.5
    both = [vae.full_vb(model, x, eps, torch.tensor([e]), 6, "B") for e in (1.0, -1.0)]
    assert (both[0] + both[1]) / 2 < log_p - 0.01
    # The likelihood of new data integrates over theta: N(x; mean, 1 + variance)
    new = torch.full((1, 1), 0.3)
    with torch.no_grad():
        model.log_var_theta -= 0.5
    std = math.sqrt(1 + 1 / 7)
    expected = torch.distributions.Normal(x.sum() / 7, std).log_prob(new[0])
    assert_close(vae.log_likelihood(model, new, 250 * 400), expected, rtol=0, atol=0.05)


def test_weights_of_a_draw():
    net, x = small(kind=BayesianVAE)
    z = torch.randn(3, 4, 2)
    same = net.decode(z, net.weights(net.q_theta().mu)).logits
    assert_close(same, net.decode(z).logits)
    theta = net.q_theta().sample(torch.ones_like(net.log_var_theta))
    moved = [p + math.exp(-4) for p in net.decoder.parameters()]  # log_var starts at -8
    for w, m in zip(net.weights(theta).values(), moved, strict=True):
        assert_close(w, m)
    bound = vae.full_vb(net, x, torch.zeros(1, 4, 2), torch.zeros_like(theta), 100, "A")
    bound.backward()
    assert all(p.grad is not None for p in net.parameters())


# ---- Likelihood and posterior: App. D, App. E ---------------------------------------------------


def test_importance_weighted_likelihood():
    model, x = Linear(W=torch.linalg.qr(torch.randn(5, 2))[0].cumsum(1)), torch.randn(23, 5)
    with torch.no_grad():
        model.log_var += 0.5  # wider than the posterior: bounded weights
    log_p = vae.log_likelihood(model, x, 601)  # rows and draws that fill no chunk
    assert_close(log_p, model.log_p(x).detach(), rtol=0, atol=0.15)  # five standard errors
    exact = Linear(W=torch.linalg.qr(torch.randn(5, 2))[0])
    assert_close(vae.log_likelihood(exact, x, 3), exact.log_p(x).detach())


def test_hmc_keeps_its_target():
    """Correlated Gaussian: the moments stay, and 90 % of the proposals are accepted once tuned."""
    precision = torch.tensor([[2.0, 0.9], [0.9, 1.0]])

    def log_p(z):
        return -torch.einsum("...i,ij,...j->...", z, precision, z) / 2

    z, step = torch.full((2000, 3, 2), 2.0), None
    z, step = vae.posterior_samples(log_p, z, 40)
    z, same = vae.posterior_samples(log_p, z, 20, step)
    assert torch.equal(same, step)
    _, chance = vae.hmc(log_p, z, step, 4)
    assert_close(chance.mean(0), torch.full((3,), 0.9), rtol=0, atol=0.03)
    for chains in z.unbind(1):  # 2000 independent ones: five standard errors
        assert_close(chains.mean(0), torch.zeros(2), rtol=0, atol=0.2)
        assert_close(chains.T.cov(), precision.inverse(), rtol=0, atol=0.3)


def test_leapfrogs_conserve_energy():
    def log_p(z):
        return -(z**4).sum(-1) / 4

    z = torch.randn(500, 2)
    losses = [1 - vae.hmc(log_p, z, step, int(0.8 / step))[1].mean() for step in (0.2, 0.1, 0.05)]
    assert losses[0] > 3 * losses[1] > 9 * losses[2] > 0  # the error is of second order
    for lost in (math.nan, -math.inf):  # too long a step loses its way, and is refused
        nowhere, chance = vae.hmc(
            lambda z, lost=lost: log_p(z).where(z.sum(-1) < 9, lost), z, 30.0, 3
        )
        assert (chance == 0).all()
        assert torch.equal(nowhere, z)


def test_reciprocal_likelihood():
    model, x = Linear(), torch.randn(3, 5)
    s2 = (2 * model.log_s).exp()
    posterior = torch.distributions.MultivariateNormal(
        (x - model.m) @ model.A.T, s2 * model.M.inverse()
    )
    z = posterior.sample((40,))
    log_joint = model.log_joint(x, z)
    exact = vae.reciprocal_likelihood(posterior.log_prob(z), log_joint)
    assert_close(exact, model.log_p(x), rtol=0, atol=1e-10)  # no variance with the exact q
    narrow = torch.distributions.MultivariateNormal(posterior.mean, 0.5 * s2 * model.M.inverse())
    z = posterior.sample((20_000,))
    estimate = vae.reciprocal_likelihood(narrow.log_prob(z), model.log_joint(x, z))
    assert_close(estimate, model.log_p(x), rtol=0, atol=0.05)  # five standard errors
    log_ratio = narrow.log_prob(z) - model.log_joint(x, z)
    few = vae.reciprocal_likelihood(log_ratio.view(5, 4000, 3), torch.zeros(()))
    assert (few.mean(0) > model.log_p(x) + 0.01).all()  # of five draws: biased upwards


def test_marginal_likelihood():
    model, x = Linear(), torch.randn(5, 5)
    z = torch.randn(400, 5, 2)  # from the prior, as without an encoder
    log_p = vae.marginal_likelihood(model, x, z, transitions=25)
    assert_close(log_p, model.log_p(x).detach(), rtol=0, atol=0.03)  # q is fitted to 400 draws


def test_monte_carlo_em_climbs(tmp_path):
    torch.set_default_dtype(torch.float32)
    cfg = vae.Config(out=str(tmp_path), steps=150, hidden=16, latent=2, lr=0.02, batch_size=60)
    levels = (255 * torch.eye(6).repeat_interleave(2, 1)).byte().view(6, 1, 3, 4)
    data = common.Data("bars", levels.repeat(20, 1, 1, 1), torch.zeros(120), levels, torch.zeros(6))
    images = vae.Images(cfg, data)
    run = common.Run(cfg, vae.build(cfg, data.shape, 2), torch.device("cpu"))
    before = [p.clone() for p in run.net.encoder.parameters()]

    def log_p():
        return (
            vae.marginal_likelihood(run.net, images.test, torch.randn(50, 6, 2), 15).mean().item()
        )

    start = log_p()
    vae.train_mcem(run, images)
    assert start < -8  # pixels alone: 12 times the entropy of 1/6 is 5.4, untrained 8.3
    assert log_p() > -5  # -log 6 = -1.8 is the most
    for p, q in zip(before, run.net.encoder.parameters(), strict=True):
        assert torch.equal(p, q)  # it does without


# ---- Data, devices, learning --------------------------------------------------------------------


def test_images():
    levels = torch.arange(256, dtype=torch.uint8).repeat(40, 1).view(40, 1, 16, 16)
    labels = torch.zeros(40, dtype=torch.long)
    data = common.Data("ramp", levels, labels, levels, labels)
    images = vae.Images(vae.Config(), data)
    x = torch.cat([images.batch(40)[0] for _ in range(100)]).double()
    assert x[:, 0].max() == 0
    assert x[:, 255].min() == 1
    assert_close(x.mean(0), torch.arange(256) / 255, rtol=0, atol=0.04)  # five standard errors
    fixed = vae.Images(vae.Config(binarization="fixed", train_size=3), data)
    assert len(fixed) == 3
    assert torch.equal(fixed.images(torch.arange(3)), fixed.images(torch.arange(3)))
    assert torch.equal(images.test, fixed.test)
    grey = vae.Images(vae.Config(decoder="gaussian"), data)
    offset = 128 * (grey.batch(40)[0] + 1) - torch.arange(256)
    assert 0 <= offset.min() < 0.01
    assert 0.99 < offset.max() <= 1
    mirrored = vae.Images(vae.Config(), common.Data("ramp", *[levels, labels] * 2, flip=True))
    x = torch.cat([mirrored.batch(40)[0] for _ in range(50)])
    assert x[:, 0].mean() < 0.1  # the first pixel of a row changes places with the last
    assert x[:, 240].mean().item() == pytest.approx((240 + 255) / 2 / 255, abs=0.03)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_everything_keeps_to_its_device(likelihood, network):
    torch.set_default_dtype(torch.float32)
    cfg = vae.Config(network=network, decoder=likelihood, hidden=4, method="full-vb")
    net = vae.build(cfg, (3, 8, 8), 2).to("meta")
    x, eps = torch.empty(3, 192, device="meta"), torch.empty(5, 3, 2, device="meta")
    for estimator in "AB":
        assert vae.SGVB[estimator](net, x, eps).is_meta
        assert vae.full_vb(net, x, eps, torch.empty_like(net.log_var_theta), 10, estimator).is_meta
    assert vae.wake_sleep(net, x).is_meta
    assert vae.log_likelihood(net, x, 4).is_meta
    assert vae.marginal_likelihood(net, x, eps, transitions=1).is_meta
    assert net.decode(eps).mean.shape == (5, 3, 192)


def test_compiled_and_in_bfloat16():
    torch.set_default_dtype(torch.float32)
    net, x = small()
    eps = torch.randn(2, 4, 2)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    expected = net(vae.sgvb_b, x, eps)
    assert_close(compiled(vae.sgvb_b, x, eps), expected)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(vae.sgvb_a, x, eps)
    assert half.dtype == torch.float32
    assert_close(half, net(vae.sgvb_a, x, eps), rtol=0.03, atol=0.1)  # bfloat16 has 8 bits


@pytest.mark.parametrize("method", ["aevb", "wake-sleep", "full-vb"])
def test_a_short_training_learns(method, tmp_path):
    """Images of a bar at one of 6 places: p(x) = 1/6, and no factorial p(x) comes near it."""
    torch.set_default_dtype(torch.float32)
    settings = {"steps": 350, "hidden": 16, "latent": 2, "lr": 0.02, "method": method}
    cfg = vae.Config(out=str(tmp_path), **settings)
    levels = (255 * torch.eye(6).repeat_interleave(2, 1)).byte().view(6, 1, 3, 4)
    labels = torch.zeros(6000)
    data = common.Data("bars", levels.repeat(1000, 1, 1, 1), labels, levels, labels[:6])
    images = vae.Images(cfg, data)
    run = common.Run(cfg, vae.build(cfg, data.shape, 2), torch.device("cpu"))

    def nll():
        return -vae.log_likelihood(run.net, images.test, 500).mean().item()

    before = nll()
    vae.train(cfg, run, images)
    assert before > 8
    assert nll() < 5  # pixels alone: 12 times the entropy of 1/6 is 5.4; log 6 = 1.8 is the least


# ---- The command line ---------------------------------------------------------------------------


@pytest.fixture
def run(call, pictures):
    torch.set_default_dtype(torch.float32)
    folder = pictures(n=40)
    return lambda *arguments: call("vae", *TINY, "--dataset", folder, "--image-size", 8, *arguments)


MLP = ["--network", "mlp", "--decoder", "bernoulli"]  # the preset of a folder is for colour


def test_colour_images(run):
    code, out, err = run("--num-samples", "5", "--latent", "7", "--flip", "--nll-examples", "1")
    assert code == 0, err
    assert "bits_per_dim" in out
    samples = np.load(Path("runs/vae-pictures/samples.npz"))["arr_0"]
    assert samples.shape == (5, 8, 8, 3)
    code, out, err = run("--latent", "2", "--manifold", "--nll-examples", "0", "--amp", "on")
    assert code == 0, err
    assert "bound" in out


@pytest.mark.parametrize("method", ["aevb", "wake-sleep", "full-vb"])
def test_methods(run, method):
    code, out, err = run(
        *MLP, "--method", method, "--estimator", "A", "--samples", "3", "--manifold"
    )
    assert code == 0, err
    assert out.count("nll_by_mcmc") == 2  # three latents, and two
    assert Path("runs/vae-pictures/checkpoint-manifold.pt").exists()


def test_full_variational_bayes_takes_any_decoder(run):
    code, _, err = run("--network", "conv", "--method", "full-vb", "--nll-examples", "0")
    assert code == 0, err


def test_the_papers_optimiser(run):
    arguments = ["--optimizer", "adagrad", "--lr", "0.02", "--decay", "constant", "--no-map"]
    code, _, err = run(*MLP, *arguments, "--binarization", "fixed", "--train-size", "5")
    assert code == 0, err


def test_chains_find_the_posterior_that_the_encoder_misses():
    """App. D against quadrature over two latents; the encoder is untrained and leads astray."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    net = VAE(vae.mlp(100, 8, 4), vae.mlp(2, 32, 100), 2).requires_grad_(False)
    for p in net.decoder.parameters():
        p.mul_(10)  # so that z shows, and posteriors have several modes
    x = net.decode(torch.randn(1, 10, 2)).draw()[0]
    axis = torch.linspace(-4, 4, 160)
    z = torch.cartesian_prod(axis, axis)[:, None].expand(-1, 10, -1)
    exact = net.log_joint(x, z).logsumexp(0) + 2 * (axis[1] - axis[0]).log()
    # App. D's Gaussian leaves tenths of a nat; from the encoder's draws it was 20 nats off.
    assert_close(vae.app_d(net, x), exact, rtol=0, atol=0.3)


def test_compare_prints_the_table(run, refused, monkeypatch):
    code, out, err = run(*MLP, "--compare", "--train-size", "9", "--out", "three")
    assert code == 0, err
    rows = [re.sub(r" ± +\S+", "", line).split() for line in out.splitlines()[-3:]]
    assert [row[:2] for row in rows] == [["aevb", "9"], ["wake-sleep", "9"], ["mcem", "9"]]
    assert rows[2][2] == rows[2][4] == rows[2][6] == "-"  # no bound without an encoder
    assert all(float(cell) < 0 for row in rows for cell in row[2:] if cell != "-")
    shown = []
    with monkeypatch.context() as patch:
        patch.setattr(common, "save_panels", lambda path, *rows: shown.extend(rows))
        code, out, err = run("--sample", "three/mcem/checkpoint.pt", "--num-samples", "2")
    assert code == 0, err
    titles = [title for row in shown for title, _ in row]
    assert titles == ["samples"]  # nothing that takes an encoder
    assert "nll_by_mcmc" in out
    assert "bound" not in out  # it has no encoder
    refused("by Monte Carlo EM", "vae", "--resume", "--out", "three/mcem", "--steps", "9")
    code, out, err = run(*MLP, "--compare", "--latent", "6", "--out", "six")
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines()[-2:]] == ["aevb", "wake-sleep"]


def test_bad_input(refused, pictures):
    torch.set_default_dtype(torch.float32)
    cases = {
        "--dataset moons": "not made of images",
        "--image-size 10": "multiples of 4",
        "--latent 0": "at least 1",
        "--samples 0": "at least 1",
        "--train-size 0": "at least 1",
        "--nll-samples 0": "at least 1",
        "--method mcem": "invalid choice",
        "--estimator C": "invalid choice",
        "--decoder poisson": "invalid choice",
        "--compare --num-samples 2": "--compare trains anew",
        "--compare --method full-vb": "leave out --method",
        "--compare --nll-examples 0": "at least 1",
    }
    folder = pictures(n=3)
    for arguments, pattern in cases.items():
        where = [] if "--dataset" in arguments else ["--dataset", folder]
        refused(pattern, "vae", *where, *arguments.split())
