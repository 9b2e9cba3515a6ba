"""Austin et al. 2021: chains, posteriors, bounds and samplers against enumeration of all chains."""

import dataclasses
import itertools
import json
import math
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import common
import d3pm
from d3pm import Denoiser, Exponential, LowRank, Table

# Small enough for a test, whole enough to pass through every part.
TINY = ["--steps", "2", "--batch-size", "4", "--width", "8", "--blocks", "1", "--T", "3"]
TINY += ["--bound-examples", "4"]


@pytest.fixture(autouse=True)
def _double(request):
    torch.manual_seed(0)
    by_command = {"call", "refused"} & set(request.fixturenames)
    torch.set_default_dtype(torch.float32 if by_command else torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make(family, K, T):
    """A small chain of every family; the mask is the last state."""
    one = torch.ones(K) / K
    e_m = F.one_hot(torch.tensor(K - 1), K).double()
    if family == "uniform":
        return LowRank(one, d3pm.alpha_bar("cosine", T))
    if family == "absorbing":
        return LowRank(e_m, d3pm.alpha_bar("reciprocal", T))
    if family == "mixed":
        return LowRank((2 * e_m + one) / 3, d3pm.alpha_bar("cosine", T))
    if family == "gaussian":
        return Table(d3pm.toeplitz(d3pm.gaussian_kernel(K, torch.linspace(0.1, 2.0, T))))
    if family == "band":
        return Table(d3pm.toeplitz(d3pm.band_kernel(K, torch.linspace(0.2, 1.0, T), 1)))
    R = d3pm.neighbour_rate(torch.randn(K, 2), 2)
    return Exponential(R, 0.01, torch.arange(T + 1) ** 2 * 7)


FAMILIES = ["uniform", "absorbing", "mixed", "gaussian", "band", "neighbours"]
every_family = pytest.mark.parametrize("family", FAMILIES)
every_form = pytest.mark.parametrize("form", ["joint", "posterior"])


def matrices(chain):
    """Q_1 ... Q_T, (T, K, K), read off the columns."""
    states = torch.arange(chain.K).expand(chain.T, -1)
    return chain.log_column(states, torch.arange(1, chain.T + 1)).exp().mT


def table_net(chain, D, mask=False):
    """A net with arbitrary log p~ for every x_t in K^D and t; with a mask, it never predicts it."""
    log_p = torch.randn(chain.T + 1, chain.K**D, D, chain.K)
    if mask:
        log_p[..., -1] = d3pm.NEVER
    log_p = log_p.log_softmax(-1)
    powers = chain.K ** torch.arange(D)

    def net(x_t, time):
        t = torch.searchsorted(chain.times, time - 1e-9)
        return log_p[t, (x_t * powers).sum(1)]

    return net


def all_states(K, D):
    return torch.cartesian_prod(*[torch.arange(K)] * D).view(-1, D)


def step_matrix(net, chain, s, D, form):
    """p_theta(x_{s-1} | x_s) over all of K^D, (from, to)."""
    states = all_states(chain.K, D)
    t = torch.full((len(states),), s)
    log_p = chain.log_p_theta(net(states, chain.times[t]), states, t, form)
    picked = log_p[:, None].expand(-1, len(states), -1, -1)
    return (
        picked.gather(-1, states[None, :, :, None].expand(len(states), -1, -1, 1)).sum((2, 3)).exp()
    )


def exact_p(net, chain, D, form):
    """p_theta(x_0) over all of K^D, by summing over every chain."""
    states = all_states(chain.K, D)
    p = chain.log_pi[states].sum(1).exp()
    for s in range(chain.T, 0, -1):
        p = p @ step_matrix(net, chain, s, D, form)
    return p


def exact_bound(net, chain, x_0, form):
    """The bound of x_0 (D,) in nats, with x_t summed over all of K^D."""
    states = all_states(chain.K, len(x_0))
    x = x_0.expand_as(states)
    total = chain.prior_kl(x_0[None]).sum()
    for s in range(1, chain.T + 1):
        t = torch.full((len(states),), s)
        log_q = chain.log_row(x, t).gather(-1, states[..., None]).sum((1, 2))
        seen = log_q > d3pm.NEVER / 2
        kl, _ = d3pm.bound_term(net, chain, x[seen], states[seen], t[seen], form)
        total = total + (log_q[seen].exp() * kl.sum(1)).sum()
    return total


# ---- Chains: Eq. 2, Eq. 3, App. A.2, A.4 --------------------------------------------------------


@every_family
def test_products_and_posteriors_by_enumerating_every_chain(family):
    K, T = 3, 4
    chain = make(family, K, T)
    Q = matrices(chain)
    assert_close(Q.sum(2), torch.ones(T, K), rtol=0, atol=1e-12)
    for x_0 in range(K):
        paths = torch.tensor([(x_0, *path) for path in itertools.product(range(K), repeat=T)])
        p = torch.stack([Q[t, paths[:, t], paths[:, t + 1]] for t in range(T)]).prod(0)
        assert_close(p.sum().item(), 1.0, rtol=0, atol=1e-12)
        for t in range(1, T + 1):
            when, start = torch.tensor([t]), torch.tensor([[x_0]])
            marginal = torch.zeros(K).index_add(0, paths[:, t], p)
            assert_close(chain.log_row(start, when).exp()[0, 0], marginal, rtol=0, atol=1e-12)
            for x_t in range(K):
                evidence = chain.log_column(torch.tensor([[x_t]]), when, whole=True)[0, 0, x_0]
                assert_close(evidence.exp(), marginal[x_t], rtol=0, atol=1e-12)
                if marginal[x_t] == 0:
                    continue
                through = torch.where(paths[:, t] == x_t, p, 0.0)
                before = torch.zeros(K).index_add(0, paths[:, t - 1], through) / marginal[x_t]
                posterior = chain.log_posterior(torch.tensor([[x_t]]), start, when)
                assert_close(posterior.exp()[0, 0], before, rtol=0, atol=1e-12)


@every_family
def test_p_theta_is_the_sum_over_x_0(family):
    chain = make(family, 4, 5)
    K, T = chain.K, chain.T
    x_t = torch.arange(K)[:, None]
    log_p_0 = torch.randn(K, 1, K).log_softmax(-1)
    for s in range(1, T + 1):
        t = torch.full((K,), s)
        joint, posterior = torch.zeros(K, 1, K), torch.zeros(K, 1, K)
        for x_0 in range(K):
            q_t = chain.log_row(torch.full((K, 1), x_0), t).exp().gather(-1, x_t[..., None])
            mean = log_p_0[..., x_0, None].exp() * chain.log_posterior(x_t, 0 * x_t + x_0, t).exp()
            joint = joint + q_t * mean  # q(x_{t-1}, x_t | x_0) p~(x_0)
            posterior = posterior + (q_t > 0) * mean
        for form, sum_over_x_0 in (("joint", joint), ("posterior", posterior)):
            possible = sum_over_x_0.sum(-1) > 0
            expected = sum_over_x_0 / sum_over_x_0.sum(-1, keepdim=True)
            found = chain.log_p_theta(log_p_0, x_t, t, form).exp()
            assert_close(found[possible], expected[possible], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", ["uniform", "gaussian", "band", "neighbours"])
def test_doubly_stochastic_families(family):
    Q = matrices(make(family, 6, 4))
    assert_close(Q.sum(1), torch.ones(4, 6), rtol=0, atol=1e-12)
    assert (Q >= 0).all()


def test_matrices_are_as_printed():
    K, beta = 5, torch.tensor([0.3])
    i = torch.arange(K)
    gap = (i - i[:, None]).abs().double()
    n = torch.arange(1 - K, K)
    kernel = torch.exp(-4 * gap**2 / ((K - 1) ** 2 * 0.3))
    kernel = kernel / torch.exp(-4 * n**2 / ((K - 1) ** 2 * 0.3)).sum()
    Q = d3pm.toeplitz(d3pm.gaussian_kernel(K, beta))[0]
    assert_close(Q[gap > 0], kernel[gap > 0])  # Eq. 8
    band = d3pm.toeplitz(d3pm.band_kernel(K, beta, 2))[0]
    assert_close(band[gap > 0], torch.where(gap <= 2, 0.06, 0.0)[gap > 0])  # Eq. 10
    uniform = matrices(LowRank(torch.full((K,), 0.2), torch.tensor([1.0, 0.7])))[0]
    assert_close(uniform, 0.7 * torch.eye(K) + 0.3 / K)  # Eq. 6
    absorbing = matrices(LowRank(torch.eye(K)[2], torch.tensor([1.0, 0.7])))[0]
    expected = 0.7 * torch.eye(K)
    expected[:, 2] += 0.3
    assert_close(absorbing, expected)  # Eq. 7


def test_the_papers_gaussian_betas():
    """K = 256: a pixel stays with probability 0.4425 at first, 0.0313 at last."""
    Q = d3pm.gaussian_kernel(256, torch.tensor([1e-4, 0.02]))
    assert_close(Q[:, 255], torch.tensor([0.4425, 0.0313]), rtol=0, atol=5e-5)
    assert_close(d3pm.gaussian_betas(256, 50)[[0, -1]], 20 * torch.tensor([1e-4, 0.02]))
    beta = d3pm.gaussian_betas(8, 100)
    variance = d3pm.gaussian_kernel(8, beta) @ torch.linspace(-1, 1, 15) ** 2
    expected = torch.linspace(1e-4, 0.02, 100) * 10 / 8  # of a continuous step, in ranges
    assert_close(variance[10:50], expected[10:50], rtol=0.02, atol=0)


def test_the_matrix_exponential():
    R = d3pm.neighbour_rate(torch.randn(7, 3), 2)
    assert_close(R.sum(1), torch.zeros(7), rtol=0, atol=1e-12)
    assert_close(R, R.T)
    n = torch.tensor([0, 1, 5, 12, 1000])
    chain = Exponential(R, 0.02, n)
    rows = chain.log_row(torch.arange(7).expand(5, -1), torch.arange(5)).exp()
    rate, U = torch.linalg.eigh(R)
    expected = U * torch.exp(0.02 * n[:, None, None] * rate) @ U.T
    assert_close(rows, expected, rtol=1e-4, atol=1e-10)  # torch.matrix_exp is good to 1e-11
    assert (rows >= 0).all()
    nearest = d3pm.neighbour_rate(torch.tensor([[0.0], [1], [2.5], [9]]), 1)
    assert_close(nearest[3], torch.tensor([0, 0, 0.5, -0.5]))  # Eq. 9: 2.5 is 9's, not vice versa
    assert_close(nearest[0], torch.tensor([-1.0, 1, 0, 0]))


def test_bigrams_tell_vowels_from_consonants():
    letters = "aeibdgk"
    text = "".join(letters[3 + i % 4] + letters[(i // 4) % 3] for i in range(300))
    x = torch.tensor([letters.index(c) for c in text])
    w = d3pm.bigram_embedding(x, len(letters))
    nearest = torch.cdist(w, w).fill_diagonal_(9.0).argmin(1)
    assert ((nearest < 3) == (torch.arange(7) < 3)).all()


@every_family
def test_skipping_keeps_the_marginals(family):
    chain = make(family, 4, 10)
    few = chain.skip(4)
    assert few.T == 4
    grid = (few.times * 10).round().long()
    x_0 = torch.arange(4).expand(5, -1)
    assert_close(few.log_row(x_0, torch.arange(5)).exp(), chain.log_row(x_0, grid).exp())
    product = torch.linalg.multi_dot(list(matrices(chain)[grid[1] : grid[2]]))
    assert_close(matrices(few)[1], product)
    assert chain.skip(99).T == 10


@every_family
def test_samples_follow_the_marginals(family):
    chain = make(family, 4, 6)
    x_0, t = torch.full((4000, 5), 1), torch.full((4000,), 3)
    share = F.one_hot(chain.sample(x_0, t), 4).double().mean((0, 1))
    expected = chain.log_row(x_0[:1, :1], t[:1]).exp()[0, 0]
    assert_close(share, expected, rtol=0, atol=5 * 0.5 / math.sqrt(20_000))  # five standard errors
    prior = F.one_hot(chain.draw_prior(4000, 5), 4).double().mean((0, 1))
    assert_close(prior, chain.log_pi.exp(), rtol=0, atol=5 * 0.5 / math.sqrt(20_000))


def test_many_states_need_no_matrices():
    """Uniform and absorbing chains over 10^5 states: K x K numbers alone would be 80 gigabytes."""
    K, T = 100_000, 1000
    for pi in (torch.full((K,), 1 / K), F.one_hot(torch.tensor(5), K).double()):
        chain = LowRank(pi, d3pm.alpha_bar("cosine", T))
        assert sum(b.numel() for b in chain.buffers()) < 2 * (K + 10 * T)
        x_0, t = torch.randint(K, (2, 3)), torch.tensor([1, 500])
        net = torch.zeros(2, 3, K, requires_grad=True)
        loss = d3pm.hybrid_loss(lambda x, t, net=net: net.log_softmax(-1), chain, x_0, t)
        loss.backward()
        assert net.grad.isfinite().all()


# ---- Schedules: Sec. 3.2, App. A.7 --------------------------------------------------------------


def test_schedules():
    T = 1000
    beta = 1 - d3pm.alpha_bar("cosine", T)[1:] / d3pm.alpha_bar("cosine", T)[:-1]
    t = torch.arange(1, T + 1)
    f = torch.cos((torch.arange(T + 1) / T + 0.008) / 1.008 * math.pi / 2)
    assert_close(beta[:-1], (1 - f[1:] / f[:-1])[:-1])  # Eq. 18
    assert beta[-1] == 1
    a = d3pm.alpha_bar("reciprocal", T)
    assert_close(1 - a[1:] / a[:-1], 1 / (T - t + 1.0))
    a = d3pm.alpha_bar("linear", T)
    assert_close((1 - a[1:] / a[:-1])[[0, 499]], torch.tensor([0.02, 0.02 + 0.98 * 499 / 999]))


def test_mutual_information_of_masks_is_the_reciprocal_schedule():
    """App. A.7, for whatever p(x_0); and it is not so for uniform noise."""
    p_0, T, K = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0]), 50, 5
    errors = {}
    for name, pi in (("mask", torch.eye(K)[4]), ("uniform", torch.ones(K) / K)):
        a = d3pm.mutual_schedule(
            p_0, lambda a, pi=pi: torch.lerp(pi.expand(K, K), torch.eye(K), (-a).exp()), T
        )
        kept = (-a[1:-1]).exp()
        errors[name] = (kept - d3pm.alpha_bar("reciprocal", T)[1:-1]).abs().max()
        for i in (0, 20, 48):
            Q_bar = kept[i] * torch.eye(K) + (1 - kept[i]) * pi
            fraction = d3pm.information(p_0, Q_bar) / -(p_0 * d3pm.log(p_0)).sum()
            assert_close(fraction.item(), 1 - (i + 1) / T, rtol=0, atol=2e-4)  # 1024 nodes
    assert errors["mask"] < 2e-4
    assert errors["uniform"] > 0.05


def settings(**changes):
    return d3pm.Config(**{"device": "cpu", "out": "unused"} | changes)


def grammar(**changes):
    cfg = settings(**d3pm.PRESETS["grammar"] | changes)
    return cfg, d3pm.Text(cfg, d3pm.sentences(300, 37, 0), d3pm.sentences(99, 37, 1), "cpu", 37)


@every_family
def test_every_family_forgets_its_start(family):
    if family in ("gaussian", "band"):
        x = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
        y = torch.zeros(256)
        cfg = settings(family=family, T=1000, levels=8)
        data = d3pm.Pixels(cfg, common.Data("ramp", x, y, x, y))
    else:
        cfg, data = grammar(family=family)
    chain = d3pm.make_chain(cfg, data)
    assert chain.prior_kl(torch.arange(data.K)[:, None]).max() < 1e-3
    rows = chain.log_row(torch.arange(data.K)[:, None], torch.full((data.K,), chain.T)).exp()
    assert_close(rows, chain.log_pi.exp().expand_as(rows), rtol=0, atol=5e-3)
    if isinstance(chain, LowRank):
        for schedule in ("linear", "cosine", "reciprocal", "mutual"):
            d3pm.make_chain(dataclasses.replace(cfg, schedule=schedule), data)
    if family == "neighbours":  # information falls linearly here too
        p_0 = torch.bincount(data.examples.long(), minlength=data.K) / len(data.examples)
        entropy = -(p_0 * d3pm.log(p_0)).sum()
        Q_bar = chain.log_Q_bar(torch.tensor([64, 128, 192])).exp()
        left = torch.stack([d3pm.information(p_0, Q) for Q in Q_bar]) / entropy
        assert_close(left, torch.tensor([0.75, 0.5, 0.25]), rtol=0, atol=1e-3)


# ---- Bounds: Eq. 1, Eq. 4, Eq. 5 ----------------------------------------------------------------


@every_form
@every_family
def test_the_bound_is_one_and_probabilities_sum_to_one(family, form):
    """All of K^D as x_0, all chains enumerated: -log p(x_0) <= bound, and sum of p = 1."""
    chain, D = make(family, 3, 4), 2
    net = table_net(chain, D)
    p = exact_p(net, chain, D, form)
    assert_close(p.sum().item(), 1.0, rtol=0, atol=1e-10)
    bounds = torch.stack([exact_bound(net, chain, x, form) for x in all_states(chain.K, D)])
    gap = bounds + p.log()
    assert (gap > -1e-9).all()
    assert gap.max() > 0.01  # a bound, not the value


def test_both_forms_agree_for_masks():
    chain = make("absorbing", 4, 5)
    net = table_net(chain, 2, mask=True)
    x_0 = torch.tensor([1, 2])
    assert_close(exact_bound(net, chain, x_0, "joint"), exact_bound(net, chain, x_0, "posterior"))
    uniform = make("uniform", 4, 5)
    gap = exact_bound(net, uniform, x_0, "joint") - exact_bound(net, uniform, x_0, "posterior")
    assert gap.abs() > 0.01


@pytest.mark.parametrize("family", ["uniform", "mixed", "gaussian", "neighbours"])
def test_what_p_tilde_must_be_for_one_variable(family):
    """With Eq. 4 the reverse chain is exact if p~ = q(x_0), not for q(x_0 | x_t); the posterior
    form is exact for q(x_0 | x_t).
    """
    chain, q = make(family, 3, 6), torch.tensor([0.6, 0.3, 0.1])

    def prior(x_t, time):
        return q.log().expand(*x_t.shape, -1)

    def posterior(x_t, time):
        t = torch.searchsorted(chain.times, time - 1e-9)
        return (chain.log_column(x_t, t, whole=True) + q.log()).log_softmax(-1)

    def reached(net, form):
        p = q @ chain.log_row(torch.arange(3)[:, None], torch.full((3,), 6)).exp()[:, 0]
        for s in range(6, 0, -1):
            p = p @ step_matrix(net, chain, s, 1, form)
        return p

    assert_close(reached(prior, "joint"), q, rtol=0, atol=1e-12)
    assert_close(reached(posterior, "posterior"), q, rtol=0, atol=1e-12)
    assert (reached(posterior, "joint") - q).abs().max() > 0.02
    few = chain = chain.skip(2)  # k steps at a time, with the exact posterior
    p = q @ few.log_row(torch.arange(3)[:, None], torch.full((3,), 2)).exp()[:, 0]
    for s in (2, 1):
        p = p @ step_matrix(posterior, few, s, 1, "posterior")
    assert_close(p, q, rtol=0, atol=1e-12)


def test_absorbing_bound_is_a_weighted_masked_language_model():
    """Eq. 12, both sides by enumeration: sum over t of 1/t times the masked cross entropies."""
    K, T, D = 4, 5, 3
    chain = make("absorbing", K, T)
    net, x_0 = table_net(chain, D, mask=True), torch.tensor([0, 2, 1])
    expected = torch.tensor(0.0)
    for s in range(1, T + 1):
        for masked in itertools.product([False, True], repeat=D):
            masked = torch.tensor(masked)
            x_t = torch.where(masked, K - 1, x_0)[None]
            log_p_0 = net(x_t, chain.times[s : s + 1])[0]
            k = masked.sum()
            weight = (s / T) ** k * (1 - s / T) ** (D - k) / s
            expected = expected - weight * log_p_0[torch.arange(D), x_0][masked].sum()
    assert_close(exact_bound(net, chain, x_0, "joint"), expected, rtol=1e-12, atol=0)
    log_p = exact_p(net, chain, D, "joint").view(K, K, K)[0, 2, 1].log()
    assert -log_p < expected - 0.01


def test_one_masked_variable_has_a_tight_bound_for_any_T():
    p = torch.tensor([0.5, 0.3, 0.2, 0.0])
    for T in (1, 3, 17):
        chain = make("absorbing", 4, T)
        found = exact_bound(
            lambda x, t: d3pm.log(p).expand(*x.shape, -1), chain, torch.tensor([1]), "joint"
        )
        assert_close(found.item(), -math.log(0.3), rtol=1e-10, atol=0)


def test_an_untrained_network_takes_log_K_bits():
    cfg, data = grammar(width=8, blocks=1, T=9)
    net, chain = Denoiser(cfg, data), d3pm.make_chain(cfg, data)
    bits = d3pm.held_out_bits(dataclasses.replace(cfg, bound_examples=4), net, data, chain)
    assert_close(bits, torch.full((4,), math.log2(data.symbols)), rtol=0, atol=1.0)
    nats = [d3pm.bound(net, chain, data.test[:64], 9) for _ in range(4)]
    mean = torch.cat(nats).mean() / (37 * math.log(2))
    assert_close(mean.item(), math.log2(data.symbols), rtol=0, atol=0.03)


def test_estimates_of_the_bound_are_unbiased():
    chain, D = make("uniform", 3, 7), 2
    net, x_0 = table_net(chain, D), torch.tensor([2, 0])
    exact = exact_bound(net, chain, x_0, "joint").item()
    many = x_0.expand(20_000, -1)
    for times in (1, 3, 7):
        nats = d3pm.bound(net, chain, many, times)
        error = common.standard_error(nats)
        assert error < 0.05
        assert abs(nats.mean().item() - exact) < 5 * error
    t = d3pm.stratified(20_000, 7)
    loss = d3pm.hybrid_loss(net, chain, many, t) * D  # in nats per dimension
    assert_close(loss.item() + chain.prior_kl(x_0[None]).sum().item(), exact, rtol=0.02, atol=0)
    x_t = chain.sample(many, t)  # Eq. 5: the cross entropy is added, T lambda times
    ce = -net(x_t, chain.times[t])[torch.arange(20_000)[:, None], torch.arange(2), x_0].mean()
    more = d3pm.hybrid_loss(net, chain, many, t, 0.1) * D
    assert_close((more - loss).item(), 0.1 * 7 * D * ce.item(), rtol=0.2, atol=0)


def test_stratified_times():
    assert d3pm.stratified(9, 9, 2).T.tolist() == [list(range(1, 10))] * 2
    t = d3pm.stratified(4, 10, 50_000)
    assert_close(t.double().mean(1), torch.tensor([1.8, 4.2, 6.8, 9.2]), rtol=0, atol=0.02)
    counts = torch.bincount(t.flatten(), minlength=11)[1:] / t.numel()
    assert_close(counts, torch.full((10,), 0.1), rtol=0, atol=0.003)  # five standard errors
    many = d3pm.stratified(1000, 3)
    assert many.min() == 1
    assert many.max() == 3


def test_autoregression_is_a_masking_of_one_by_one():
    """alpha_bar of every position its own: x_t lacks the last t tokens; the bound is -log p."""
    K, D = 3, 3
    kept = torch.arange(D) < torch.arange(D, -1, -1)[:, None]
    chain = LowRank(torch.eye(K)[-1], kept.double())
    net, x_0 = table_net(chain, D, mask=True), torch.tensor([1, 0, 1])
    nll = 0.0
    for i in range(D):
        seen = torch.where(torch.arange(D) < i, x_0, K - 1)
        nll = nll - net(seen[None], chain.times[D - i, None])[0, i, x_0[i]]
    assert_close(d3pm.bound(net, chain, x_0[None], D)[0], nll)
    assert_close(exact_bound(net, chain, x_0, "joint"), nll)
    assert_close(-exact_p(net, chain, D, "joint").view(K, K, K)[1, 0, 1].log(), nll)


def test_connections_are_printed(call):
    code, out, err = call("d3pm", "--connections")
    assert code == 0, err
    differences = [float(line.split()[-1]) for line in out.splitlines()[1:]]
    assert len(differences) == 4
    assert max(differences) < 1e-10
    losses = [float(line.split()[-2]) for line in out.splitlines()[1:]]
    assert min(losses) > 100  # nats: not a comparison of noughts


# ---- Networks -----------------------------------------------------------------------------------


def test_the_logistic_head():
    K = 8
    mu, log_s = torch.tensor([-0.9, 0.0, 0.31]), torch.tensor([1.0, 3.0, -1.0])
    p = d3pm.logistic_log_probs(mu, log_s, K).exp()
    assert_close(p.sum(-1), torch.ones(3))
    centres = torch.linspace(-1, 1, K)
    inverse = torch.exp(2 - log_s)[:, None]
    high = torch.sigmoid(inverse * (centres - mu[:, None] + 1 / (K - 1)))
    low = torch.sigmoid(inverse * (centres - mu[:, None] - 1 / (K - 1)))
    assert_close(p, (high - low) / (high - low).sum(-1, keepdim=True))
    assert_close(p[1], p[1].flip(0))  # mu = 0
    sharp = d3pm.logistic_log_probs(torch.tensor([0.99]), torch.tensor([-6.0]), 256)
    assert sharp.isfinite().all()  # where the difference of sigmoids is 0 in float64


def test_the_mask_is_never_predicted():
    cfg, data = grammar(width=8, blocks=1, T=9)
    net, chain = Denoiser(cfg, data), d3pm.make_chain(cfg, data)
    log_p_0 = net(data.test[:2], torch.tensor([0.1, 0.9]))
    assert (log_p_0[..., -1] == d3pm.NEVER).all()
    assert_close(log_p_0.exp().sum(-1), torch.ones(2, 37))
    states = list(d3pm.reverse(net, chain, chain.draw_prior(3, 37)))
    assert [t for t, _ in states] == list(range(9, -1, -1))
    assert (states[0][1] == data.mask).all()
    assert (states[-1][1] < data.mask).all()
    for (_, x), (_, y) in itertools.pairwise(states):
        assert (y == x)[x != data.mask].all()  # a symbol once revealed stays


def image_data(K, family="gaussian", channels=1):
    x = torch.randint(256, (20, channels, 8, 8), dtype=torch.uint8)
    y = torch.zeros(20, dtype=torch.long)
    return d3pm.Pixels(settings(levels=K, family=family), common.Data("noise", x, y, x, y))


IMAGE = {"width": 8, "blocks": 1, "mult": (1,), "T": 12}


def test_image_heads():
    torch.set_default_dtype(torch.float32)
    for head in ("logistic", "categorical"):
        cfg, data = settings(head=head, **IMAGE), image_data(4, channels=3)
        net, x = Denoiser(cfg, data), data.test[:2]
        log_p_0 = net(x, torch.rand(2))
        assert log_p_0.shape == (2, 3, 8, 8, 4)
        assert_close(log_p_0.exp().sum(-1), torch.ones(2, 3, 8, 8))
        assert (log_p_0.argmax(-1) == x).float().mean() > 0.9  # untrained: x_t itself (App. B.1)


def test_levels():
    data = image_data(256)
    assert torch.equal(common.to_uint8(data.decode(data.test)), data.data.test)
    coarse = image_data(3)
    assert coarse.quantise(torch.tensor([0, 85, 86, 170, 171, 255])).tolist() == [0, 0, 1, 1, 2, 2]
    assert coarse.mask == 1
    x, _ = data.batch(5)
    assert x.shape == (5, 1, 8, 8)
    assert x.dtype == torch.int64
    assert (x[:, None] == data.test[None]).flatten(2).all(-1).any(1).all()  # bins survive


def test_independent_bits():
    text = d3pm.Text(settings(length=4), "abab" * 50, "aaaa" * 3, "cpu")
    assert_close(d3pm.independent_bits(text), 1.0, rtol=0, atol=1e-6)
    x = torch.zeros(1000, 1, 1, 2, dtype=torch.uint8)
    x[::2, ..., 1] = 255
    data = d3pm.Pixels(
        settings(levels=2), common.Data("x", x, torch.zeros(1000), x, torch.zeros(1000))
    )
    assert_close(d3pm.independent_bits(data), 0.5, rtol=0, atol=2e-3)  # one pixel is known


def test_networks_compile_without_a_break_and_run_in_bfloat16():
    torch.set_default_dtype(torch.float32)
    cfg, data = grammar(width=8, blocks=1)
    net, x_t, time = Denoiser(cfg, data), data.test[:2], torch.rand(2)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    assert_close(compiled(x_t, time), net(x_t, time))
    images = image_data(4)
    logistic = Denoiser(settings(head="logistic", **IMAGE), images)
    for f, x in ((net, x_t), (logistic, images.test[:2])):
        with torch.autocast("cpu", torch.bfloat16):
            half = f(x, time)
        assert half.dtype == torch.float32
        assert_close(half.exp(), f(x, time).exp(), rtol=0, atol=0.05)  # of 8 bits


@every_form
@every_family
def test_losses_and_samplers_keep_to_their_device(family, form):
    chain = make(family, 4, 3).to("meta")
    x_0, t = (
        torch.empty(2, 5, dtype=torch.long, device="meta"),
        d3pm.stratified(2, 3, device="meta"),
    )

    def net(x_t, time):
        return (time[:, None, None] + F.one_hot(x_t, 4)).log_softmax(-1)

    assert d3pm.hybrid_loss(net, chain, x_0, t, 0.1, form).is_meta
    assert d3pm.bound(net, chain, x_0, 2, form).is_meta
    *_, (_, x) = d3pm.reverse(net, chain, chain.draw_prior(2, 5), form)
    assert x.is_meta


def test_networks_keep_to_their_device():
    cfg, data = grammar(width=8, blocks=1)
    images = image_data(4)
    logistic = Denoiser(settings(head="logistic", **IMAGE), images)
    for net, x_t in ((Denoiser(cfg, data), data.test), (logistic, images.test)):
        time = torch.empty(2, device="meta")
        assert net.to("meta")(x_t[:2].to("meta"), time).is_meta
        assert d3pm.stratified(4, 9, 2, device="meta").is_meta


@every_form
@every_family
def test_gradients_are_finite(family, form):
    """Also at t = 1 and t = T, where logarithms of nought occur; in float32."""
    torch.set_default_dtype(torch.float32)
    chain = make(family, 4, 3)
    for s in (1, 2, 3):
        logits = (30 * torch.randn(50, 4, 4)).requires_grad_()
        x_0, t = torch.randint(4, (50, 4)), torch.full((50,), s)
        loss = d3pm.hybrid_loss(lambda x, t, z=logits: z.log_softmax(-1), chain, x_0, t, 0.1, form)
        loss.backward()
        assert loss.isfinite()
        assert logits.grad.isfinite().all()


# ---- Data and learning --------------------------------------------------------------------------


def test_the_grammar():
    text = d3pm.sentences(300, 40, 0)
    lines = [text[i : i + 40] for i in range(0, len(text), 40)]
    assert all(d3pm.is_true(line) for line in lines)
    assert len(set(lines)) == 300
    assert math.prod(map(len, d3pm.SLOTS)) == 2**d3pm.ENTROPY
    assert max(len(line.rstrip()) for line in lines) == d3pm.LONGEST
    assert d3pm.is_true("2 red cats met 3 shy owls: 5 in all.")
    assert d3pm.is_true("2 red cats met 3 shy owls: 6 in all.  ") is False
    assert d3pm.is_true("2 red cats met 3 shy owl: 5 in all.") is None


def test_text_is_cropped_at_its_stride():
    cfg = settings(length=5, family="uniform")
    text = d3pm.Text(cfg, "abcdefghijklmno", "abcdefgh", "cpu", stride=5)
    assert text.K == 15
    seen = {row for _ in range(20) for row in text.decode(text.batch(4)[0])}
    assert seen == {"abcde", "fghij", "klmno"}
    assert text.decode(text.test) == ["abcde"]
    free = d3pm.Text(cfg, "abcdefg", "abcdefgh", "cpu")
    seen = {row for _ in range(20) for row in free.decode(free.batch(4)[0])}
    assert seen == {"abcde", "bcdef", "cdefg"}


def test_a_short_training_learns_a_text(tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)
    Path(tmp_path, "text.txt").write_text("the cat sat on the mat and the dog " * 60)
    cfg = settings(dataset=str(tmp_path / "text.txt"), out=str(tmp_path / "run"), length=16)
    cfg = dataclasses.replace(
        cfg, width=32, blocks=1, T=20, steps=80, batch_size=32, lr=0.01, bound_examples=12
    )
    run, data, chain = d3pm.prepare(cfg)
    before = d3pm.held_out_bits(cfg, run.ema, data, chain).mean()
    d3pm.train(cfg, run, data, chain)
    after = d3pm.held_out_bits(cfg, run.ema, data, chain).mean()
    assert_close(before.item(), math.log2(data.symbols), rtol=0, atol=0.6)  # 12 random bounds
    assert after < 2.0  # letters alone take 3.4 bits


# ---- The command line ---------------------------------------------------------------------------


def test_images_of_every_family(call, pictures):
    images = pictures(n=40, size=8)
    flags = [*TINY, "--dataset", images, "--image-size", "8", "--mult", "1", "--num-samples", "2"]
    for i, more in enumerate(
        (
            "--T 20",
            "--family absorbing --head categorical --levels 3",
            "--family uniform --form posterior",
            "--family mixed --lam 0.1",
            "--family band --T 100 --band 2 --infer-steps 2 --bound-steps 3",
            "--T 20 --infer-steps 3 --bound-steps 2",
        )
    ):
        code, _, err = call("d3pm", *flags, *more.split(), "--out", f"run{i}", "--bound-times", "2")
        assert code == 0, err
        assert np.load(f"run{i}/samples.npz")["arr_0"].shape == (2, 8, 8, 3)
        last = json.loads(Path(f"run{i}/metrics.jsonl").read_text().splitlines()[-1])
        assert last["bits_per_dim"] > 0
        assert last["examples"] == 4


def test_text_files(call):
    Path("text.txt").write_text("Words, and more words: naïve ones.\n" * 40)
    for family in ("neighbours", "mixed"):
        flags = ["--dataset", "text.txt", "--length", "30", "--family", family]
        flags += ["--form", "posterior", "--num-samples", "3"]
        code, out, err = call("d3pm", *TINY, *flags, "--out", family)
        assert code == 0, err
        points = np.load(f"{family}/samples.npz")["arr_0"]  # of Unicode
        assert points.shape == (3, 30)
        assert set(map(chr, points.flatten())) <= set("Words, and more words: naïve ones.\n")
        assert "known_words" in out
        assert Path(family, "samples.txt").read_text()


def test_compare_prints_the_table(call, pictures, monkeypatch):
    for rows in d3pm.ROWS.values():
        for row in rows.split(", "):
            family, *rest = row.split()
            assert family in FAMILIES
            assert set(rest) <= {"lam", "logistic", "posterior"}
    few = {"text": "uniform posterior lam, absorbing", "images": "gaussian logistic lam"}
    monkeypatch.setattr(d3pm, "ROWS", few)
    Path("words.txt").write_text("words, words\n" * 99)
    images = [pictures(n=20, size=8), "--image-size", "8", "--mult", "1", "--T", "20"]
    tables = []
    for data in (["words.txt", "--length", "9"], [*images, "--bound-times", "1"]):
        code, out, err = call("d3pm", *TINY, "--compare", "--dataset", *data)
        assert code == 0, err
        tables += [line.split()[:4] for line in out.splitlines() if "±" in line]
    assert tables == [
        ["uniform", "categorical", "posterior", "0.01"],
        ["absorbing", "categorical", "joint", "0"],
        ["gaussian", "logistic", "joint", "0.01"],
    ]


def test_bad_input(refused, pictures):
    Path("words.txt").write_text("words, words\n" * 99)
    Path("short.txt").write_text("too short")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00\xd8" * 99)
    images = [*TINY, "--dataset", pictures(), "--image-size", "8"]
    words = [*TINY, "--dataset", "words.txt", "--length", "9"]
    refused("too short for examples of 128", "d3pm", *TINY, "--dataset", "short.txt")
    refused("cannot read binary.txt as text", "d3pm", *TINY, "--dataset", "binary.txt")
    for name in ("moons", "tinyshakspeare.txt"):
        refused(f"{name} is no discrete data set", "d3pm", *TINY, "--dataset", name)
    refused("sentences take 37", "d3pm", *TINY, "--length", "36")
    refused("logistic is for .* images", "d3pm", *words, "--head", "logistic")
    refused("tables of 9999 x 256", "d3pm", *images, "--T", "9999", "--levels", "256")
    refused("--levels: must be", "d3pm", *images, "--levels", "1")
    refused("zero in float32; take joint", "d3pm", *images, "--form", "posterior")
    refused("--compare trains anew", "d3pm", "--compare", "--num-samples", "3")
    for flags in (["--schedule", "cosine"], ["--no-lam"], ["--bound-examples", "0"]):
        refused("--compare takes each family's own", "d3pm", "--compare", *flags)
    refused("is no image: leave out", "d3pm", *words, "--flip")


def test_chains_that_cannot_be():
    cfg, text = grammar()
    images = image_data(4)
    cases = [
        ("gaussian has its own", text, {"family": "gaussian", "schedule": "cosine"}),
        ("over 99 symbols", text, {"family": "neighbours", "neighbours": 99}),
        ("needs a text", images, {"family": "neighbours"}),
        ("still knows .* bits", images, {"family": "band", "T": 5}),
    ]
    for pattern, data, changes in cases:
        with pytest.raises(common.UserError, match=pattern):
            d3pm.make_chain(dataclasses.replace(cfg, **changes), data)


def test_text8_missing_or_damaged(tmp_path, monkeypatch):
    def no_network(*_):
        raise OSError("network is unreachable")

    def refused(pattern):
        with pytest.raises(common.UserError, match=pattern):
            d3pm.text8(tmp_path / "data")

    monkeypatch.setattr("urllib.request.urlretrieve", no_network)
    refused("text8 is not to be had.*unreachable.*grammar")
    path = tmp_path / "data" / "text8.zip"
    path.write_bytes(b"not a zip")
    refused("text8 is not to be had as .*text8.zip")
    for name, pattern in (("other", "no item named 'text8'"), ("text8", "it has 594 characters")):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, "words " * 99)
        refused(pattern)


def test_the_form_reaches_loss_bound_and_samples(tmp_path, monkeypatch):
    seen, log_p_theta = [], d3pm.Chain.log_p_theta

    def recorded(chain, log_p_0, x_t, t, form="joint"):
        seen.append(form)
        return log_p_theta(chain, log_p_0, x_t, t, form)

    monkeypatch.setattr(d3pm.Chain, "log_p_theta", recorded)
    torch.set_default_dtype(torch.float32)
    (tmp_path / "text.txt").write_text("the cat sat on the mat " * 60)
    changes = {"family": "uniform", "form": "posterior", "T": 3, "steps": 1, "bound_examples": 2}
    small = {"width": 8, "blocks": 1, "batch_size": 2, "length": 8, "out": str(tmp_path / "run")}
    cfg = settings(dataset=str(tmp_path / "text.txt"), **changes, **small)
    run, data, chain = d3pm.prepare(cfg)
    d3pm.train(cfg, run, data, chain)
    d3pm.evaluate(cfg, run, data, chain)
    d3pm.draw(cfg, run, data, chain, 2)
    assert len(seen) > 6
    assert set(seen) == {"posterior"}


def test_compare_goes_on_past_a_chain_that_cannot_be(call, tmp_path):
    (tmp_path / "dna.txt").write_text("ACGT" * 200)  # too few symbols for a graph of neighbours
    arguments = [*TINY, "--dataset", tmp_path / "dna.txt", "--length", "8", "--compare"]
    code, out, err = call("d3pm", *arguments)
    assert code == 0, err
    rows = [line for line in out.splitlines() if re.match(r"\w+ +categorical", line)]
    assert sum("±" in row for row in rows) == 6
    assert sum("needs a text of over" in row for row in rows) == 1
