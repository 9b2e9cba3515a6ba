"""Rombach et al. 2022: process, samplers, guidance, both stages and the transformer, by oracles."""

import dataclasses
import functools
import itertools
import math
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import common
import ldm

# Small enough for a test, whole enough to pass through every part.
TINY = ["--steps", "2", "--batch-size", "4", "--width", "8", "--context", "8", "--examples", "40"]
TINY += ["--ae-steps", "1", "--ae-width", "4", "--classifier-steps", "1"]
TINY += ["--sampling-steps", "1", "--mult", "1,1"]


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def few(monkeypatch):
    """Single precision and a few glyphs, which are drawn in no time."""
    torch.set_default_dtype(torch.float32)
    draw = common.glyphs
    monkeypatch.setattr(common, "glyphs", lambda n, seed: draw(n // 100, seed))


def config(**settings):
    sizes = {"width": 8, "context": 8, "ae_width": 4, "device": "cpu", "image_size": 16}
    return ldm.Config(**sizes | settings)


def filled(net, std=0.2):
    """The network with random weights everywhere: the zeros of last layers would hide mistakes."""
    for p in net.parameters():
        torch.nn.init.normal_(p, std=std)
    return net


def exact_eps(process, mean, std):
    """E[eps | z_t], if z_0 ~ N(mean, std²)."""

    def eps(z, t):
        alpha, sigma = process.at(t, z)
        return sigma * (z - alpha * mean) / (alpha**2 * std**2 + sigma**2)

    return eps


# ---- The process: App. B ------------------------------------------------------------------------


def test_schedule():
    process = ldm.Process()
    assert_close(process.alpha**2 + process.sigma**2, torch.ones(1001))
    assert process.alpha[0] == 1
    assert process.sigma[0] == 0
    assert_close(process.sigma[1].item() ** 2, 0.0015, rtol=1e-12, atol=0)
    assert_close(process.alpha[-1].item() ** 2, 1.42e-4, rtol=3e-3, atol=0)  # three digits given
    text = ldm.Process(1000, 0.00085, 0.012)
    assert_close(text.alpha[-1].item(), 0.0683, rtol=1e-3, atol=0)
    assert (process.alpha.diff() < 0).all()


def test_any_number_of_steps_will_do():
    process = ldm.Process(1000)
    for S in (
        *range(1, 40),
        *range(101, 112),
        251,
        300,
        334,
        667,
        999,
        1000,
    ):  # as in reports of bugs
        pairs = [(t.item(), s.item()) for t, s in process.steps(S, torch.zeros(1))]
        assert len(pairs) == S
        assert pairs[0][0] == 1000
        assert pairs[-1][1] == 0
        assert all(t > s for t, s in pairs)


def test_diffusion_and_its_estimate_of_z_0_are_inverse():
    process = ldm.Process(50)
    z_0, eps, t = torch.randn(9, 2, 3, 3), torch.randn(9, 2, 3, 3), torch.randint(1, 51, (9,))
    assert_close(process.z_0(process.diffuse(z_0, eps, t), eps, t), z_0)


def test_posterior_is_bayes_rule():
    """q(z_s | z_t, z_0) q(z_t | z_0) = q(z_t | z_s) q(z_s | z_0), densities of one dimension."""
    process = ldm.Process(20, 0.05, 0.3)
    z_t, z_0, z_s = torch.randn(3, 30, 1)
    t, s = torch.full((30,), 13), torch.full((30,), 8)
    (a_t, b_t), (a_s, b_s) = process.at(t, z_t), process.at(s, z_t)
    beta = torch.linspace(0.05**0.5, 0.3**0.5, 20) ** 2
    keep = (1 - beta[8:13]).prod()  # of the steps between the two times

    def log_p(x, mean, std):
        return torch.distributions.Normal(mean, std).log_prob(x)

    mean, std = process.posterior(z_t, z_0, t, s)
    left = log_p(z_s, mean, std) + log_p(z_t, a_t * z_0, b_t)
    right = log_p(z_t, keep.sqrt() * z_s, (1 - keep).sqrt()) + log_p(z_s, a_s * z_0, b_s)
    assert_close(left, right, rtol=1e-9, atol=1e-9)


def test_losses_of_an_untrained_network():
    """A U-Net starts at zero: E eps² = 1 and E |eps| = sqrt(2 / pi)."""
    torch.set_default_dtype(torch.float32)
    net = ldm.LatentDiffusion(config(f=1), (1, 16, 16), 3)
    z, eps, t = torch.randn(64, 1, 16, 16), torch.randn(64, 1, 16, 16), torch.randint(1, 9, (64,))
    eps_theta = functools.partial(net, y=torch.zeros(64, dtype=torch.long))
    l2, l1 = (ldm.ldm_loss(eps_theta, z, eps, t, ldm.Process(), power) for power in (2, 1))
    five = 5 * math.sqrt(2 / eps.numel())  # standard errors
    assert l2.item() == pytest.approx(1, abs=five)
    assert l1.item() == pytest.approx(math.sqrt(2 / math.pi), abs=five)


def test_the_loss_of_the_exact_eps_is_the_conditional_variance():
    """Of N(0, s²): Var(eps | z_t) = alpha² s² / (alpha² s² + sigma²), which no network beats."""
    process, std = ldm.Process(10, 0.05, 0.4), 1.7
    z_0, eps, t = std * torch.randn(200_000, 1), torch.randn(200_000, 1), torch.full((200_000,), 6)
    loss = ldm.ldm_loss(exact_eps(process, 0, std), z_0, eps, t, process).item()
    alpha, sigma = process.at(t[:1], z_0[:1])
    variance = (alpha * std) ** 2 / ((alpha * std) ** 2 + sigma**2)
    assert loss == pytest.approx(variance.item(), rel=5 * math.sqrt(2 / 200_000))


# ---- Samplers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("S", "known"), [(10, 0.8384), (50, 0.9625), (200, 0.9896)])
def test_ddim_contracts_a_standard_normal_by_cosines(S, known):
    """With the exact eps = sigma_t z every step multiplies z by cos(theta_t - theta_s)."""
    process = ldm.Process()
    z = torch.randn(5, 2)
    theta = torch.arccos(process.alpha)

    def cosines(pairs):
        return math.prod((theta[t] - theta[s]).cos().item() for t, s in pairs)

    pairs = [(t[0].item(), s[0].item()) for t, s in process.steps(S, z)]
    z_0 = ldm.ddim(exact_eps(process, 0, 1), z, process, S)
    assert_close(z_0, cosines(pairs) * z, rtol=1e-9, atol=1e-9)
    official = [1000 * i // S + 1 for i in range(S)][::-1]  # the times of the official code
    assert cosines(itertools.pairwise([*official, 0])) == pytest.approx(known, abs=5e-5)


def test_ddim_is_a_product_of_linear_maps_for_any_gaussian():
    process, mean, std, S = ldm.Process(), 0.7, 0.4, 20
    gain, offset = 1.0, 0.0
    for t, s in process.steps(S, torch.zeros(1)):
        (a_t, b_t), (a_s, b_s) = process.at(t, t.double()), process.at(s, t.double())
        g = b_t / ((a_t * std) ** 2 + b_t**2)  # eps = g (z - a_t m), z_0 = (z - b_t eps) / a_t
        factor = a_s * (1 - b_t * g) / a_t + b_s * g
        offset = factor * offset + a_s * b_t * g * mean - b_s * g * a_t * mean
        gain = factor * gain
    z = torch.randn(6, 1)
    assert_close(ldm.ddim(exact_eps(process, mean, std), z, process, S), gain * z + offset)


def test_ddim_of_eta_1_is_ancestral_sampling():
    assert common.parse(ldm.Config, ldm.PRESETS, ["--eta", "1", "--out", "new"]).eta == 1
    process = ldm.Process(40, 0.01, 0.2)

    def eps(z, t):
        return torch.sin(z) + t[:, None] / 40

    for S in (40, 7, 1):
        results = []
        for sampler in (ldm.ancestral, functools.partial(ldm.ddim, eta=1.0)):
            torch.manual_seed(1)
            results.append(sampler(eps, torch.randn(4, 3), process, S))
        assert_close(*results, rtol=1e-9, atol=1e-9)


def test_ancestral_sampling_has_the_variance_of_its_recursion():
    """Linear steps on Gaussian data: v_s = c² v_t + posterior variance, from v_T = 1."""
    process, std = ldm.Process(1000), 0.5
    z = torch.randn(100_000, 1)
    eps = exact_eps(process, 0, std)

    def variance(S):
        v, one = 1.0, torch.ones(1, 1)
        for t, s in process.steps(S, one):
            mean, noise = process.posterior(one, process.z_0(one, eps(one, t), t), t, s)
            v = mean.item() ** 2 * v + noise.item() ** 2
        return v

    z_0 = ldm.ancestral(eps, z, process, 25)
    assert z_0.var().item() == pytest.approx(variance(25), rel=5 * math.sqrt(2 / 100_000))
    assert variance(1000) == pytest.approx(std**2, rel=0.03)  # too small by the steps' size


# ---- Guidance -----------------------------------------------------------------------------------


def test_guidance_of_scale_1_and_0():
    torch.manual_seed(0)
    weight = torch.randn(4, 3)

    def eps_theta(z, t, y):
        return z * weight[y] + t[:, None]

    z, t = torch.randn(5, 3), torch.arange(5)
    y, null = torch.tensor([0, 1, 2, 0, 1]), torch.full((5,), 3)
    e_y, e_null = eps_theta(z, t, y), eps_theta(z, t, null)
    for s, wanted in ((1, e_y), (0, e_null), (1.0, e_y), (2.5, e_null + 2.5 * (e_y - e_null))):
        assert_close(ldm.guided(eps_theta, y, null, s)(z, t), wanted)


def test_guidance_is_the_score_of_the_tilted_marginals():
    """At every t the guided score is that of p(z | y)^s p(z)^(1 - s): here a Gaussian again."""
    process, s = ldm.Process(), 2.0
    cases = {0: (0.8, 0.5), 1: (0.0, 1.0)}  # mean and deviation given y = 0, and of the whole

    def eps_theta(z, t, y):
        both = [exact_eps(process, *cases[k])(z, t) for k in cases]
        return torch.where(y[:, None] == 0, *both)

    z, t = torch.randn(7, 1), torch.full((7,), 300)
    alpha, sigma = process.at(t, z)
    z.requires_grad_()

    def log_p(k):
        mean, std = cases[k]
        return torch.distributions.Normal(
            alpha * mean, (alpha**2 * std**2 + sigma**2).sqrt()
        ).log_prob(z)

    (score,) = torch.autograd.grad((s * log_p(0) + (1 - s) * log_p(1)).sum(), z)
    y = torch.zeros(7, dtype=torch.long)
    assert_close(ldm.guided(eps_theta, y, y + 1, s)(z.detach(), t), -sigma * score)


def test_image_guiding_points_to_the_image():
    """App. C's sign: eps = -sigma (score of z_t + grad log p(y | z_t)); the printed plus fails."""
    process = ldm.Process()
    eps = exact_eps(process, 0, 1.0)
    z, t, y = torch.randn(6, 2), torch.full((6,), 400), torch.randn(6, 2)
    led = ldm.image_guided(eps, y, lambda z_0: 2 * z_0, process, variance=0.5)(z, t)
    alpha, sigma = process.at(t, z)
    z_0 = alpha * z  # E[z_0 | z_t] of standard normal data
    slope = 2 * alpha * (y - 2 * z_0) / 0.5
    assert_close(led, sigma * z - sigma * slope)
    assert ((process.z_0(z, led, t) - z_0) * (y - 2 * z_0) > 0).all()  # towards the image


# ---- Stage one ----------------------------------------------------------------------------------


def test_kl_in_closed_form():
    mu, log_var = torch.randn(5, 2, 3, 3), torch.randn(5, 2, 3, 3)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mu, (log_var / 2).exp()), normal(0.0, 1.0))
    assert_close(ldm.kl_to_standard_normal(mu, log_var), kl.sum((1, 2, 3)))
    zero = torch.zeros(2, 1, 1, 1)
    assert_close(ldm.kl_to_standard_normal(zero, zero), torch.zeros(2))


def test_the_posterior_is_drawn_with_its_moments():
    moments = torch.tensor([0.3, -1.4])[None, :, None, None].expand(1, 2, 300, 300)
    mu, log_var, z = ldm.gaussian(moments)
    std = math.exp(-0.7)
    assert z.mean().item() == pytest.approx(0.3, abs=5 * std / 300)
    assert z.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * 90_000))
    _, log_var, _ = ldm.gaussian(torch.full((1, 2, 1, 1), 99.0))
    assert log_var.item() == 20


def test_quantisation_takes_the_nearest_code_and_is_idempotent():
    z, codebook = torch.randn(3, 4, 5, 5), torch.randn(7, 4)
    z_q, numbers = ldm.quantise(z, codebook)
    for b, i, j in ((0, 0, 0), (1, 2, 3), (2, 4, 4)):
        distances = (codebook - z[b, :, i, j]).norm(dim=1)
        assert numbers[b, i, j] == distances.argmin()
        assert_close(z_q[b, :, i, j], codebook[distances.argmin()])
    again, same = ldm.quantise(z_q, codebook)
    assert_close(again, z_q)
    assert torch.equal(same, numbers)
    share = numbers.flatten().bincount() / numbers.numel()
    assert 1 <= torch.special.entr(share).sum().exp() <= 7


def test_gradients_pass_straight_through_the_quantiser():
    net = ldm.Autoencoder(1, 4, 4, 6, 4, 0)
    net.decoder = torch.nn.Identity()
    z, weight = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(2, 4, 3, 3)
    decoded = net(z, "decode")
    assert_close(decoded, ldm.quantise(z, net.codebook)[0])
    grads = torch.autograd.grad((weight * decoded).sum(), (z, net.codebook), allow_unused=True)
    assert_close(grads[0], weight)
    assert grads[1] is None  # the codebook learns by its own loss alone


def test_the_commitment_falls_on_the_latents():
    """d/dz = beta 2 (z - e) / n and d/de = 2 (e - z) / n: the weight is not on the codebook's."""
    z, e = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    by_z, by_e = torch.autograd.grad(ldm.vq_loss(z, e, beta=0.25), (z, e))
    assert_close(by_z, 0.25 * 2 * (z - e).detach() / 6)
    assert_close(by_e, 2 * (e - z).detach() / 6)


def test_adversarial_losses_reach_one_player_each():
    psi = filled(ldm.patch_discriminator(1, 8))
    x, x_hat = torch.randn(3, 1, 16, 16), torch.randn(3, 1, 16, 16, requires_grad=True)
    hinge, adv = ldm.adversarial_losses(psi, x, x_hat)
    real, fake = psi(x), psi(x_hat)
    assert_close(hinge, (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2)
    (wanted,) = torch.autograd.grad(-fake.mean(), x_hat)
    (slope,) = torch.autograd.grad(adv, x_hat, retain_graph=True)
    assert_close(slope, wanted)
    weights = list(psi.parameters())
    assert all(g is None for g in torch.autograd.grad(adv, weights, allow_unused=True))
    assert torch.autograd.grad(hinge, x_hat, allow_unused=True, retain_graph=True)[0] is None
    for mine, its in zip(
        torch.autograd.grad(hinge, weights),
        torch.autograd.grad(
            (F.relu(1 - psi(x)).mean() + F.relu(1 + psi(x_hat)).mean()) / 2, weights
        ),
        strict=True,
    ):
        assert_close(mine, its)


def test_an_undecided_discriminator_has_hinge_loss_1():
    hinge, adv = ldm.adversarial_losses(lambda x: 0 * x, torch.ones(2, 1), torch.ones(2, 1))
    assert hinge.item() == 1
    assert adv.item() == 0


def test_the_adaptive_weight_equalises_the_gradients():
    last = torch.randn(4, requires_grad=True)
    rec, adv = 3 * last.square().sum(), (torch.arange(4.0) * last).sum()
    weight = ldm.adaptive_weight(rec, adv, last)
    wanted = (6 * last.detach()).norm() / (torch.arange(4.0).norm() + 1e-4)
    assert_close(weight, wanted)
    assert not weight.requires_grad
    assert ldm.adaptive_weight(rec, 0 * adv, last) == 1e4  # the clamp


def test_perceptual_distance():
    net = filled(ldm.classifier(1, 3))
    x, x_hat = torch.randn(4, 1, 16, 16), torch.randn(4, 1, 16, 16, requires_grad=True)
    maps = functools.partial(ldm.features, net)
    distance = ldm.perceptual_distance(maps, x, x_hat)
    assert distance.shape == (4,)
    assert (distance > 0).all()
    assert_close(ldm.perceptual_distance(maps, x, x), torch.zeros(4))
    assert torch.autograd.grad(distance.sum(), x_hat)[0].abs().min() > 0
    assert [a.shape[1:] for a in maps(x)] == [(24, 8, 8), (48, 4, 4), (96, 2, 2)]
    # By hand for features of one channel: unit vectors are signs, and unlike signs are 2 apart.
    signs = ldm.perceptual_distance(lambda x: [x], torch.ones(1, 1, 2, 2), -torch.ones(1, 1, 2, 2))
    assert_close(signs, torch.tensor([4.0]))


@pytest.mark.parametrize("f", [2, 4, 8])
def test_the_autoencoder_halves_and_doubles(f):
    net = ldm.Autoencoder(3, f, 5, 0, 4, 0.5)
    x = torch.randn(2, 3, 32, 16)
    moments = net(x, "encode")
    assert moments.shape == (2, 10, 32 // f, 16 // f)
    assert net(moments[:, :5], "decode").shape == x.shape
    assert net(x, "discriminate").shape == (2, 1, 6, 2)


def test_latents_are_scaled_to_unit_deviation():
    """App. G: over the first batch; and decoding undoes it. KL and VQ."""
    for reg in ("kl", "vq"):
        model = ldm.LatentDiffusion(config(reg=reg), (1, 16, 16), 3)
        trained = filled(ldm.Autoencoder(1, 4, 4, 256 if reg == "vq" else 0, 4, 0))
        x = torch.randn(8, 1, 16, 16)
        torch.manual_seed(5)
        model.adopt(trained.state_dict(), x)
        torch.manual_seed(5)
        z = model.encode(x)
        assert z.std(correction=0).item() == pytest.approx(1, abs=1e-12)
        assert model.sigma_hat != 1
        assert_close(model.decode(z), trained(z * model.sigma_hat, "decode"))
        assert all(not p.requires_grad for p in model.stage_one.parameters())
    pixels = ldm.LatentDiffusion(config(f=1), (1, 16, 16), 3)
    assert pixels.encode(x) is x
    assert pixels.decode(x) is x


def test_linear_autoencoder_on_gaussian_data_end_to_end():
    """Encode, scale, sample with the exact eps, unscale, decode: a covariance known beforehand.

    x ~ N(0, D), D = diag(4, 1, 0.01, ...): E keeps the first two coordinates, as PCA does. The
    latents' deviation is one scalar, so their covariance after it is diag(4, 1) / sigma_hat².
    DDIM is linear, z_0 = gain z_T per coordinate, and the output has the variances (gain sigma)².
    """
    std = torch.tensor([2.0, 1.0])

    class Linear(torch.nn.Module):
        def forward(self, x, part):
            return x[:, :2] if part == "encode" else F.pad(x, (0, 0, 0, 0, 0, 2))

    model = ldm.LatentDiffusion(config(reg="vq", z_channels=2), (4, 16, 16), 3)
    model.stage_one = Linear()
    x = torch.randn(4096, 4, 1, 1) * torch.tensor([2.0, 1.0, 0.1, 0.1])[:, None, None]
    model.adopt({}, x)
    assert model.sigma_hat.item() == pytest.approx(math.sqrt(2.5), rel=0.05)
    z = model.encode(x)
    scaled = std[:, None, None] / model.sigma_hat
    process = ldm.Process()
    z_T = torch.randn_like(z)
    z_0 = ldm.ddim(exact_eps(process, 0, scaled), z_T, process, 100)
    gains = torch.ones(2)
    for t, s in process.steps(100, z[:1]):
        (a_t, b_t), (a_s, b_s) = ((v.flatten() for v in process.at(time, z[:1])) for time in (t, s))
        g = b_t / ((a_t * scaled.flatten()) ** 2 + b_t**2)
        gains *= a_s * (1 - b_t * g) / a_t + b_s * g
    x_hat = model.decode(z_0)
    covariance = torch.cov(x_hat.flatten(1).T)
    wanted = torch.diag(F.pad((gains * model.sigma_hat) ** 2, (0, 2))) * torch.cov(
        F.pad(z_T.flatten(1), (0, 2)).T
    )
    assert_close(covariance.diagonal(), wanted.diagonal(), rtol=1e-9, atol=1e-12)
    assert_close(covariance.diagonal()[:2], std**2, rtol=0.12, atol=0)  # 100 steps, 4096 samples


# ---- The spatial transformer and tau: Sec. 3.3, Table 16 ----------------------------------------


def test_attention_is_the_papers_formula():
    net = ldm.MultiHeadAttention(6, 5, heads=2)
    h, context = torch.randn(2, 7, 6), torch.randn(2, 3, 5)
    q = net.query(h)
    k, v = net.key_value(context).chunk(2, dim=2)
    heads = []
    for part in (slice(0, 3), slice(3, 6)):
        weights = (q[..., part] @ k[..., part].mT / math.sqrt(3)).softmax(dim=2)
        heads.append(weights @ v[..., part])
    assert_close(net(h, context), net.output(torch.cat(heads, dim=2)))


def test_one_token_is_a_bias_and_the_order_of_tokens_does_not_count():
    net = ldm.MultiHeadAttention(6, 5, heads=2)
    h, context = torch.randn(2, 7, 6), torch.randn(2, 4, 5)
    alone = net(h, context[:, :1])
    assert_close(alone, alone[:, :1].expand_as(alone))  # whatever the query
    assert_close(net(h, context), net(h, context[:, [2, 0, 3, 1]]))


def test_the_spatial_transformer_starts_as_the_identity():
    net = ldm.SpatialTransformer(8, 2, context=5, depth=2)
    x, context = torch.randn(2, 8, 4, 3), torch.randn(2, 6, 5)
    assert torch.equal(net(x, context), x)
    filled(net)
    assert (net(x, context) - x).abs().min() > 0
    assert not torch.equal(net(x, context), net(x, 2 * context))


def test_conditions_reach_every_pixel():
    """Class and caption by cross-attention, images by concatenation, each through the U-Net."""
    z, t, y = torch.randn(2, 4, 4, 4), torch.tensor([3, 900]), torch.tensor([0, 2])
    for condition in ldm.LABELS:
        net = filled(ldm.LatentDiffusion(config(condition=condition), (1, 16, 16), 3))
        assert net(z, t, y).shape == z.shape
        assert (net(z, t, y) - net(z, t, torch.tensor([3, 3]))).abs().min() > 0
        assert_close(net(z, t, y)[:1], net(z[:1], t[:1], y[:1]))  # no mixing of the batch
    for condition, channels in (("super-resolution", 1), ("inpainting", 5)):
        net = filled(ldm.LatentDiffusion(config(condition=condition), (1, 16, 16), 3))
        concat = torch.randn(2, channels, 4, 4)
        assert (net(z, t, None, concat) - net(z, t, None, 2 * concat)).abs().min() > 0


def test_captions_spell_the_labels():
    tokens = ldm.captions(13)
    texts = ["".join(ldm.ALPHABET[i] for i in row).rstrip() for row in tokens]
    assert texts[7] == "seven"
    assert texts[12] == "one two"
    assert texts[-1] == ""
    assert len(texts) == 14


def test_tau_reads_the_order_of_letters():
    net = ldm.TextEncoder(4, 8)
    tokens = torch.tensor([[1, 2, 3, 0], [2, 1, 3, 0]])
    zeta = net(tokens)
    assert zeta.shape == (2, 4, 8)
    assert not torch.allclose(zeta[0].sum(0), zeta[1].sum(0))


# ---- Conditioning on images, and samples larger than in training --------------------------------


def test_boxes_are_boxes():
    holes = ldm.random_boxes(torch.zeros(50, 3, 16, 16))
    assert holes.shape == (50, 1, 16, 16)
    assert set(holes.unique().tolist()) == {0.0, 1.0}
    for hole in holes[:, 0]:
        rows, columns = hole.amax(1), hole.amax(0)
        assert_close(hole, rows[:, None] * columns)
        assert ((rows.diff() > 0).sum() <= 1) & (rows.sum() >= 3)  # one run, a quarter or more


@pytest.mark.parametrize("condition", ldm.IMAGES)
def test_images_are_restored_at_any_size(condition):
    model = filled(
        ldm.LatentDiffusion(config(condition=condition, sampling_steps=2), (1, 16, 16), 3)
    )
    process = ldm.Process()
    for size in ((16, 16), (32, 48)):
        x = torch.randn(2, 1, 48, 48)[:, :, : size[0], : size[1]].contiguous()
        if size[0] != size[1] and condition == "inpainting":
            x = x[..., :32]  # boxes are drawn on squares
        given, concat, holes = ldm.degrade(model, x)
        assert given.shape == x.shape
        assert concat.shape[2:] == (x.shape[2] // 4, x.shape[3] // 4)
        samples = ldm.generate(model, process, 2, concat=concat)
        assert samples.shape == x.shape
        if condition == "inpainting":
            assert_close(given, x * (1 - holes))
            assert_close(concat[:, -1:], F.avg_pool2d(holes, 4))
        else:
            assert_close(concat, ldm.low_resolution(x))


def test_samples_larger_than_in_training():
    model = filled(ldm.LatentDiffusion(config(sampling_steps=2), (1, 16, 16), 3))
    y = torch.tensor([0, 1])
    process = ldm.Process()
    small = ldm.generate(model, process, 2, y)
    assert small.shape == (2, 1, 16, 16)
    for led_by in (None, small):
        x = ldm.generate(model, process, 2, y, enlarge=2, led_by=led_by)
        assert x.shape == (2, 1, 32, 32)


def test_the_guidance_scale_and_the_null_reach_the_network():
    model = filled(ldm.LatentDiffusion(config(sampling_steps=1, scale=4.0), (1, 16, 16), 3))
    process, y, results = ldm.Process(), torch.tensor([0, 1]), {}
    for s in (None, 0.0, 1.0, 4.0):
        torch.manual_seed(3)
        results[s] = ldm.generate(model, process, 2, y, s)
    assert torch.equal(results[None], results[4.0])
    torch.manual_seed(3)
    null = ldm.generate(model, process, 2, torch.tensor([3, 3]), 1.0)
    assert_close(results[0.0], null)
    assert not torch.allclose(results[0.0], results[1.0])


# ---- Devices ------------------------------------------------------------------------------------


def test_losses_and_samplers_keep_to_their_device():
    torch.set_default_dtype(torch.float32)
    process = ldm.Process(device="meta")
    x, t = torch.empty(2, 1, 16, 16, device="meta"), torch.ones(2, dtype=torch.long, device="meta")
    for condition in (*ldm.LABELS, "none", *ldm.IMAGES):
        for reg in ("kl", "vq") if condition == "inpainting" else ("kl",):
            settings = {"condition": condition, "reg": reg, "adversarial": 0.5}
            model = ldm.LatentDiffusion(config(sampling_steps=2, **settings), (1, 16, 16), 3)
            model = model.to("meta")
            _, concat, _ = ldm.degrade(model, x)
            y = t if condition in ldm.LABELS else None
            z_0 = model.encode(x)

            def eps(z, t, model=model, y=y, concat=concat):
                return model(z, t, y, concat)

            assert ldm.ldm_loss(eps, z_0, torch.randn_like(z_0), t, process).is_meta
            assert ldm.generate(model, process, 2, y, concat=concat).is_meta
    assert ldm.generate(model, process, 2, concat=concat).is_meta
    assert ldm.ancestral(eps, z_0, process, 2).is_meta
    psi = model.stage_one.psi
    assert all(loss.is_meta for loss in ldm.adversarial_losses(psi, x, x))
    net = ldm.classifier(1, 3).to("meta")
    assert ldm.perceptual_distance(functools.partial(ldm.features, net), x, x).is_meta
    with torch.autocast("cpu", torch.bfloat16):
        model = filled(ldm.LatentDiffusion(config(), (1, 16, 16), 3))
        z, y = torch.randn(2, 4, 4, 4), torch.tensor([0, 1])
        assert model(z, torch.tensor([1, 1000]), y).isfinite().all()
        assert model.decode(z).isfinite().all()


def test_the_network_compiles_without_a_graph_break():
    torch.set_default_dtype(torch.float32)
    net = filled(ldm.LatentDiffusion(config(condition="caption"), (1, 16, 16), 3))
    z, t, y = torch.randn(2, 4, 4, 4), torch.tensor([3, 900]), torch.tensor([0, 2])
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert_close(compiled(z, t, y), net(z, t, y))


# ---- Learning, and the command line -------------------------------------------------------------


def test_both_stages_learn(tmp_path, few):
    """Stage one from 12 dB to 15, and stage two from a loss of 1 to a half, in a few seconds."""
    sizes = {"ae_steps": 50, "steps": 60, "classifier_steps": 2, "batch_size": 16, "lr": 8e-3}
    cfg = config(out=str(tmp_path), warmup=5, image_size=16, **sizes)
    run, data, process = ldm.prepare(cfg)
    x, y = common.to_float(data.test[:64]), data.test_labels[:64]
    x_hat = run.ema.decode(run.ema.encode(x))
    assert ldm.psnr(x_hat, x) > 15
    assert ldm.psnr(torch.full_like(x, x.mean()), x) < 12
    t = torch.arange(64) % 10 * 100 + 50
    eps = torch.randn(64, 4, 4, 4)

    def loss():
        eps_theta = functools.partial(run.net, y=y)
        with torch.no_grad():
            return ldm.ldm_loss(eps_theta, run.net.encode(x), eps, t, process).item()

    assert loss() == pytest.approx(1, abs=0.15)
    ldm.train(cfg, run, data, process)
    assert loss() < 0.6


def test_labels_are_dropped_as_often_as_asked(tmp_path, monkeypatch, few):
    cfg = config(out=str(tmp_path), steps=1, batch_size=512, f=1, p_drop=0.25, image_size=8)
    cfg = dataclasses.replace(cfg, attention=None, T=3, sampling_steps=1)
    run, data, process = ldm.prepare(cfg)
    seen = {}

    def loss(eps_theta, z_0, eps, t, process, power, y, concat):
        seen.update(y=y, t=t)
        return eps_theta(z_0, t, y, concat).square().mean()

    monkeypatch.setattr(ldm, "ldm_loss", loss)
    ldm.train(cfg, run, data, process)
    share = (seen["y"] == 10).float().mean().item()
    assert share == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / 512))
    counts = torch.bincount(seen["t"], minlength=4) / 512
    assert len(counts) == 4
    for count in counts[1:].tolist():
        assert count == pytest.approx(1 / 3, abs=5 * math.sqrt(2 / 9 / 512))


def test_another_runs_first_stage_is_taken_over(call, refused, few):
    code, out, err = call("ldm", *TINY, "--out", "a", "--reg", "vq", "--codes", "9")
    assert code == 0, err
    assert "codes_used" in out
    arguments = ["--condition", "inpainting", "--first-stage", "a", "--out", "b"]
    code, _, err = call("ldm", *TINY, *arguments, "--adversarial", "0.5")
    assert code == 0, err
    a, b = (torch.load(f"{name}/checkpoint.pt", weights_only=True) for name in "ab")
    assert b["config"]["codes"] == 9
    assert b["config"]["adversarial"] == 0
    for key, value in a["model"].items():
        if key.startswith(("stage_one", "sigma_hat")):
            assert torch.equal(value, b["model"][key])
    assert call("ldm", "--resume", "--out", "b", "--steps", "3")[0] == 0
    path = Path("a/checkpoint-autoencoder.pt")
    state = torch.load(path, weights_only=True)
    torch.save(state | {"step": 0}, path)
    refused("has not finished its stage one", "ldm", *TINY, "--first-stage", "a", "--out", "c")
    Path("b/checkpoint-judge.pt").unlink()  # as if killed before its end
    assert call("ldm", "--sample", "b/checkpoint.pt")[0] == 0


def test_samples_are_of_every_class(call, monkeypatch, few):
    seen = []
    generate = ldm.generate

    def recorded(net, process, n, y=None, *more, **options):
        seen.append(y)
        return generate(net, process, n, y, *more, **options)

    monkeypatch.setattr(ldm, "generate", recorded)
    code, _, err = call("ldm", *TINY, "--num-samples", "60")
    assert code == 0, err
    batch = int(TINY[TINY.index("--batch-size") + 1])
    drawn = torch.cat(seen[-math.ceil(60 / batch) :])
    assert len(drawn) == 60
    saved = np.load(next(Path("runs").glob("ldm-*/samples.npz")))["arr_1"]
    assert (saved == drawn.cpu().numpy()).all()
    assert len(drawn.unique()) == 10  # one is missed with probability 10 * 0.9^60 = 0.02: seeded


def test_an_interrupted_first_stage_is_resumed(call, monkeypatch, few):
    """Bit for bit: killed after one of two steps of stage one, and again in stage two."""
    longer = [*TINY, "--ae-steps", "3", "--checkpoint-every", "1", "--steps", "3"]
    longer += ["--device", "cpu"]  # on a GPU the convolutions' sums have no fixed order
    assert call("ldm", *longer, "--out", "whole")[0] == 0

    def killed(step, stage):
        original = common.Run.step

        def halting(self, loss):
            original(self, loss)
            if self.stage == stage and self.done == step:
                raise SystemExit(9)

        monkeypatch.setattr(common.Run, "step", halting)
        return original

    original = killed(2, "autoencoder")
    assert call("ldm", *longer, "--out", "parts")[0] == 9
    monkeypatch.setattr(common.Run, "step", original)
    original = killed(1, "")
    assert call("ldm", "--resume", "--out", "parts")[0] == 9
    monkeypatch.setattr(common.Run, "step", original)
    assert call("ldm", "--resume", "--out", "parts")[0] == 0
    whole, parts = (
        torch.load(f"{name}/checkpoint.pt", weights_only=True)["model"]
        for name in ("whole", "parts")
    )
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())


@pytest.mark.parametrize(
    "flags",
    [
        "--condition super-resolution",
        "--condition none --f 1 --sampler ancestral --loss l1",
        "--condition token --attention 8,4",
        "--condition caption --compile",
    ],
)
def test_the_other_ways_run(call, monkeypatch, flags, few):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    adversarial = ["--adversarial", "0.5", "--adversarial-start", "0"]
    code, out, err = call("ldm", *TINY, *flags.split(), *adversarial)
    assert code == 0, err
    assert ("psnr_given" in out) == ("super" in flags)


def test_a_small_folder_without_classes(call, refused, pictures, few):
    """Three held-out images, shown again and again; no class is to be judged."""
    flags = ["--dataset", pictures(n=30, size=16), "--image-size", "16", "--out", "run"]
    code, out, err = call("ldm", *TINY, *flags, "--num-samples", "3")
    assert code == 0, err
    assert "agreement" not in out
    assert np.load("run/samples.npz")["arr_1"].tolist() == [0, 0, 0]
    refused("learned with --T 1000", "ldm", "--sample", "run/checkpoint.pt", "--T", "500")


def test_bad_flags(refused, few):
    bad = {
        "--dataset checkerboard --image-size 32": "not made of images",
        "--f 3": "power of two",
        "--f 64": "power of two",
        "--sampling-steps 2000": "more than --T",
        "--condition inpainting --num-samples 3": "not for inpainting",
        "--beta-1 0": "between 0 and 1",
        "--eta 1.5": "in .0, 1.",
        "--first-stage nowhere": "no checkpoint at nowhere",
        "--adversarial 0.5 --adversarial-start 0 --image-size 8": "needs 12 pixels a side, not 8",
        "--adversarial 0.5": "starts at step 50000, and stage one has 1: give a smaller",
    }
    for flags, pattern in bad.items():
        refused(pattern, "ldm", *TINY, *flags.split())


def test_sampler_eta_and_leader_reach_the_samples():
    model = filled(ldm.LatentDiffusion(config(sampling_steps=3), (1, 16, 16), 3))
    y, process = torch.tensor([0, 1]), ldm.Process()

    def sample(led_by=None, **flags):
        model.cfg = config(sampling_steps=3, **flags)
        torch.manual_seed(3)
        return ldm.generate(model, process, 2, y, enlarge=2, led_by=led_by)

    plain, noisy = sample(), sample(eta=1.0)
    assert_close(noisy, sample(sampler="ancestral"))
    for other in (noisy, sample(led_by=torch.ones(2, 1, 16, 16))):
        assert not torch.allclose(plain, other)


def test_every_weight_changes_what_is_learned(tmp_path, few):
    def learned(**flags):
        sizes = {"ae_steps": 2, "steps": 2, "classifier_steps": 1, "batch_size": 4, "warmup": 0}
        sizes |= {"adversarial_start": 0, "adversarial": 0.5} | flags
        out = tmp_path / "-".join(flags or ["plain"])
        run, data, process = ldm.prepare(cfg := config(out=str(out), **sizes))
        ldm.train(cfg, run, data, process)
        state = run.net.state_dict().items()
        return torch.cat([v.flatten().float() for name, v in state if "psi" not in name])

    plain = learned()
    assert torch.equal(plain, learned(sampling_steps=7))  # has no part in training
    for flags in ({"kl_weight": 10.0}, {"perceptual": 9.0}, {"adversarial": 9.0}, {"loss": "l1"}):
        assert not torch.equal(plain, learned(**flags)), flags


def test_without_dropped_labels_nothing_is_guided(call, refused, few):
    refused("give --scale 1", "ldm", *TINY, "--p-drop", "0")
    code, out, err = call("ldm", *TINY, "--p-drop", "0", "--scale", "1")
    assert code == 0, err
    assert "s = 1:" in out
    assert "s = 3:" not in out


def test_settings_without_a_signal_or_images(call, refused, few):
    for flags in (["--beta-T", "0.5"], ["--T", "100000"]):
        refused("no signal is left", "ldm", *TINY, *flags)
    refused("checkerboard is not made of images", "ldm", *TINY, "--dataset", "checkerboard")
    assert call("ldm", *TINY, "--out", "run")[0] == 0
    flags = ["--out", "run", "--first-stage", "nowhere", "--steps", "9"]
    refused("learned with --first-stage None", "ldm", "--resume", *flags)


def test_larger_samples_alone_and_led_share_their_noise(monkeypatch):
    drawn = []

    def generate(model, process, n, y, enlarge=1, led_by=None):
        drawn.append(torch.randn(n, 1, 4 * enlarge, 4 * enlarge))
        return drawn[-1]

    monkeypatch.setattr(ldm, "generate", generate)
    run = types.SimpleNamespace(cfg=config(), ema=None, device="cpu")
    ldm.evaluate_enlarged(run, None, 10)
    _, alone, led = drawn
    assert torch.equal(alone, led)
