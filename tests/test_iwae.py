"""Burda et al. 2015: the bound and its gradients by enumeration, on linear-Gaussian models, ..."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import common
import iwae
from iwae import IWAE

# Small enough for a test, whole enough to pass through every part.
TINY = ["--steps", "2", "--batch-size", "4", "--latent", "3", "--hidden", "8"]
TINY += ["--nll-examples", "4", "--nll-samples", "6"]


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small(latent=(3,), hidden=(5,), pixels=7):
    """A model with every weight and bias at random, and binary images for it."""
    model = IWAE(latent, hidden, torch.rand(pixels))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.7)
    return model, torch.bernoulli(torch.full((4, pixels), 0.4))


class LinearGaussian:
    """p(h) = N(0, I), p(x | h) = N(W h, s²), where all is known, with a q of choice."""

    def __init__(self, dims=5, units=2, s=0.6):
        self.latent, self.s = (units,), s
        self.W = torch.randn(dims, units)
        M = self.W.T @ self.W + s**2 * torch.eye(units)
        self.posterior_map = torch.linalg.solve(M, self.W.T)  # E[h | x] = map x
        self.posterior_cov = s**2 * M.inverse()
        self.root = torch.linalg.cholesky(self.posterior_cov)
        self.shift = torch.zeros(units)

    def log_p(self, x):
        cov = self.W @ self.W.T + self.s**2 * torch.eye(len(self.W))
        return torch.distributions.MultivariateNormal(torch.zeros(len(cov)), cov).log_prob(x)

    def log_weights(self, x, eps, keep=None):
        q = torch.distributions.MultivariateNormal(
            x @ self.posterior_map.T + self.shift, scale_tril=self.root
        )
        h = q.loc + eps @ self.root.T
        log_x = torch.distributions.Normal(h @ self.W.T, self.s).log_prob(x).sum(-1)
        return log_x + iwae.standard_normal(h).sum(-1) - q.log_prob(h)


# ---- The bound: Eq. 8 - 10 ----------------------------------------------------------------------


def test_bound_by_enumeration():
    """Three values of h: every k-tuple of them, weighted by its probability."""
    p, q = torch.tensor([0.05, 0.02, 0.01]), torch.tensor([0.2, 0.3, 0.5])
    known = [-3.045685, -2.840494, -2.745851, -2.692505, -2.658839, -2.635934]
    values = []
    for k in range(1, 7):
        tuples = torch.tensor(list(itertools.product(range(3), repeat=k))).T  # (k, 3^k)
        log_w = (p.log() - q.log())[tuples]
        values.append((q[tuples].prod(0) * iwae.bound(log_w)).sum().item())
    assert_close(values, known, rtol=0, atol=1e-6)  # computed independently, six decimals
    log_p = p.sum().log().item()
    assert all(a < b < log_p for a, b in zip(values, values[1:], strict=False))  # Eq. 10


def test_bound_is_exact_at_the_posterior():
    model = LinearGaussian()
    x = torch.randn(4, 5)
    for k in (1, 3, 20):
        log_w = iwae.sample_log_weights(model, x, k, rows=8)
        assert_close(iwae.bound(log_w), model.log_p(x), rtol=0, atol=1e-11)


def test_bound_closes_at_the_rate_of_chi_squared():
    """log p - L_k -> chi²(p(h|x) || q) / (2 k): q is the posterior, wider and shifted."""
    model = LinearGaussian(units=1)
    s_0 = model.root.item()
    model.root, model.shift = 1.3 * model.root, torch.tensor([0.5 * s_0])
    s_1 = model.root.item()
    gap = 2 * s_1**2 - s_0**2
    chi2 = s_1**2 / (s_0 * math.sqrt(gap)) * math.exp((0.5 * s_0) ** 2 / gap) - 1
    x = torch.randn(1, 5)
    log_w = iwae.sample_log_weights(model, x, 400_000, rows=200_000) - model.log_p(x)
    for k in (10, 40):
        L = iwae.bound(log_w.view(-1, k).T)  # of the groups, less log p
        gap = (torch.expm1(L) - L).mean().item()  # E[mean w] = 1: it controls the variance
        assert k * gap == pytest.approx(chi2 / 2, rel=0.6 / k + 0.03)  # next order, sampling error
    kl = math.log(s_0 / s_1) + (s_1**2 + (0.5 * s_0) ** 2) / (2 * s_0**2) - 0.5  # of q from p(h|x)
    L = iwae.bounds(log_w, (1, 10, 100_000))
    assert L[1] == pytest.approx(-kl, abs=0.005)  # five standard errors
    assert L[1] < L[10] < L[100_000]
    assert L[100_000] == pytest.approx(0, abs=0.005)


def test_bounds_from_one_set_of_samples():
    log_w = 3 * torch.randn(12, 5)
    L = iwae.bounds(log_w, (1, 2, 5, 12, 50))
    assert list(L) == [1, 2, 5, 12]
    assert L[1] == pytest.approx(log_w.mean().item())
    assert L[5] == pytest.approx(iwae.bound(log_w[:10].view(2, 5, 5).transpose(0, 1)).mean().item())
    assert L[12] == pytest.approx(log_w.exp().mean(0).log().mean().item())
    assert L[1] < L[2] < L[12]


def test_one_sample_is_the_vae_bit_for_bit():
    model, x = small()
    eps = torch.randn(1, 4, 3)
    assert torch.equal(iwae.iwae(model, x, eps), iwae.vae(model, x, eps))


# ---- Its gradient: Eq. 14, Sec. 3.1 -------------------------------------------------------------


def gradient(objective, model, x, eps):
    value = objective(model, x, eps)
    grads = torch.autograd.grad(value.sum(), list(model.parameters()))
    return value, torch.cat([g.flatten() for g in grads])


def test_normalised_weights_are_the_gradient():
    model, x = small((3, 2), (5, 4))
    eps = torch.randn(6, 4, 5)
    value, by_autograd = gradient(iwae.iwae, model, x, eps)
    value_too, by_weights = gradient(iwae.iwae_weights, model, x, eps)
    assert_close(by_weights, by_autograd, rtol=1e-10, atol=1e-12)
    assert_close(value_too, value, rtol=1e-13, atol=0)

    def not_fixed(model, x, eps):  # weights that are differentiated, too: another gradient
        log_w = model.log_weights(x, eps)
        return (log_w.softmax(0) * log_w).sum(0)

    assert (gradient(not_fixed, model, x, eps)[1] - by_autograd).abs().max() > 0.1


def test_weighted_sum_is_no_bound():
    """sum w~ log w = L_k + log k - H(w~) >= L_k: what must not be logged in its place."""
    log_w = 3 * torch.randn(7, 5)
    w = log_w.softmax(0)
    entropy = -(w * w.log()).sum(0)
    surrogate = (w * log_w).sum(0)
    assert_close(surrogate, iwae.bound(log_w) + math.log(7) - entropy)
    assert (surrogate > iwae.bound(log_w)).all()


def test_one_backward_pass_has_the_right_mean(monkeypatch):
    """Every choice of the sample, weighted by its chance, adds up to Eq. 14."""
    model, x = small()
    x, eps = x[:1], torch.randn(4, 1, 3)
    value, whole = gradient(iwae.iwae, model, x, eps)
    chance = model.log_weights(x, eps).softmax(0)[:, 0].detach()
    total = 0
    for i in range(4):
        monkeypatch.setattr(
            torch.distributions.Categorical, "sample", lambda _, i=i: torch.tensor([i])
        )
        value_i, part = gradient(iwae.iwae_single, model, x, eps)
        assert_close(value_i, value, rtol=1e-13, atol=0)
        total = total + chance[i] * part
    assert_close(total, whole, rtol=1e-10, atol=1e-12)


def test_the_sample_is_drawn_by_its_weight():
    model, x = small()
    log_w = torch.tensor([0.6, 0.3, 0.1]).log()[:, None].expand(3, 5000)

    class Fixed:
        calls = []

        def log_weights(self, x, eps):
            if len(eps) == 3:
                return log_w
            self.calls.append(eps)
            return eps.sum(-1)

    eps = torch.arange(3.0)[:, None, None].expand(3, 5000, 1)
    iwae.iwae_single(Fixed(), torch.zeros(5000, 7), eps)
    share = torch.bincount(Fixed.calls[0].flatten().long()) / 5000
    assert_close(share, torch.tensor([0.6, 0.3, 0.1]), rtol=0, atol=0.035)  # five standard errors


# ---- The model: Eq. 1, Eq. 2, App. C ------------------------------------------------------------


def test_two_layers_are_the_product_of_their_conditionals():
    model, x = small((3, 2), (5, 4))
    eps = torch.randn(6, 4, 5)

    def normal(net, h):
        mu, log_sigma = net(h).chunk(2, dim=-1)
        return torch.distributions.Normal(mu, log_sigma.exp())

    q_1 = normal(model.q[0], x)
    h_1 = q_1.mean + q_1.stddev * eps[..., :3]
    q_2 = normal(model.q[1], h_1)
    h_2 = q_2.mean + q_2.stddev * eps[..., 3:]
    p_2 = torch.distributions.Normal(torch.zeros(2), torch.ones(2))
    p_x = torch.distributions.Bernoulli(logits=model.p[0](h_1))
    log_p = p_2.log_prob(h_2).sum(-1) + normal(model.p[1], h_2).log_prob(h_1).sum(-1)
    log_p = log_p + p_x.log_prob(x).sum(-1)
    expected = log_p - q_1.log_prob(h_1).sum(-1) - q_2.log_prob(h_2).sum(-1)
    assert_close(model.log_weights(x, eps), expected, rtol=1e-11, atol=1e-11)


def test_likelihood_is_the_integral_over_h():
    """One unit: log p(x) by quadrature, against 20,000 samples in chunks."""
    model, x = small(latent=(1,))
    with torch.no_grad():  # q wider than the prior: bounded weights
        model.q[0][-1].weight[1] = 0
        model.q[0][-1].bias.copy_(torch.tensor([0.0, 0.8]))
    h = torch.linspace(-9, 9, 20_001)[:, None]
    log_joint = iwae.log_bernoulli(x[:, None], model.logits(h)) + iwae.standard_normal(h)[:, 0]
    exact = log_joint.logsumexp(1) + math.log(18 / 20_000)
    log_w = iwae.sample_log_weights(model, x, 20_001)
    assert log_w.shape == (20_001, 4)
    assert_close(iwae.bound(log_w), exact, rtol=0, atol=0.1)  # five standard errors


def test_samples_have_the_means_of_the_model():
    model, _ = small((3, 2), (5, 4))
    many = model.sample(20_000).mean(0)
    h_2 = torch.randn(20_000, 2)
    mu, log_sigma = model.p[1](h_2).chunk(2, dim=1)
    h_1 = torch.distributions.Normal(mu, log_sigma.exp()).sample()
    assert_close(many, model.p[0](h_1).sigmoid().mean(0), rtol=0, atol=0.02)  # five standard errors


def test_untrained_decoder_gives_the_mean_image():
    mean = torch.tensor([0.0, 0.2, 0.5, 1.0])
    model = IWAE((2,), (6,), mean)
    assert_close(model.logits(torch.zeros(2)).sigmoid(), mean.clamp(0.001, 0.999))
    bound = math.sqrt(6 / (4 + 6))  # Glorot & Bengio's, uniform
    weights = model.q[0][0].weight
    assert weights.abs().max() <= bound
    assert weights.abs().max() > 0.5 * bound


# ---- Active units: Sec. 5.2 ---------------------------------------------------------------------


def test_activity_of_known_units():
    model, _ = small((3, 2), (5, 4))
    x = torch.bernoulli(torch.full((300, 7), 0.4))
    with torch.no_grad():
        for layer, unit in ((0, 1), (1, 0)):  # their means do not see x: dead, whatever they are
            model.q[layer][-1].weight[unit] = 0
            model.q[layer][-1].bias[unit] = 3.0
    A = iwae.activity(model, x, samples=400)
    mu_1 = model.q[0](x)[:, :3]
    assert_close(A[:3], mu_1.var(0), rtol=1e-12, atol=1e-20)
    assert (A > iwae.ACTIVE).tolist() == [True, False, True, False, True]
    sigma_1 = model.q[0](x)[:, 3:].exp()
    h_1 = mu_1 + sigma_1 * torch.randn(3000, 300, 3)
    mu_2 = model.q[1](h_1)[..., :2].mean(0)  # E_q(u | x)[u], by many samples
    assert_close(A[4], mu_2.var(0)[1], rtol=0.1, atol=0)  # 400 samples add about 1 / 400


def test_removal_is_a_smaller_network():
    model, x = small((3, 2), (5, 4))
    keep = torch.tensor([1.0, 0, 1, 0, 1])
    eps = torch.randn(6, 4, 5)
    one, two = [0, 2], [1]  # the units that stay
    less = IWAE((2, 1), (5, 4), torch.rand(7))
    less.load_state_dict(model.state_dict() | {
        "q.0.4.weight": model.q[0][4].weight[[0, 2, 3, 5]],
        "q.0.4.bias": model.q[0][4].bias[[0, 2, 3, 5]],
        "q.1.0.weight": model.q[1][0].weight[:, one],
        "q.1.4.weight": model.q[1][4].weight[[1, 3]],
        "q.1.4.bias": model.q[1][4].bias[[1, 3]],
        "p.0.0.weight": model.p[0][0].weight[:, one],
        "p.1.0.weight": model.p[1][0].weight[:, two],
        "p.1.4.weight": model.p[1][4].weight[[0, 2, 3, 5]],
        "p.1.4.bias": model.p[1][4].bias[[0, 2, 3, 5]],
    })  # fmt: skip
    expected = less.log_weights(x, eps[..., [0, 2, 4]])
    assert_close(model.log_weights(x, eps, keep), expected, rtol=1e-11, atol=1e-11)
    assert_close(model.log_weights(x, eps, torch.ones(5)), model.log_weights(x, eps))


# ---- Data and schedule --------------------------------------------------------------------------


def test_binarization():
    levels = torch.arange(256, dtype=torch.uint8).repeat(4000, 1)
    x = common.binarize(levels).double().mean(0)
    assert x[0] == 0
    assert x[255] == 1
    assert_close(x, torch.arange(256) / 255, rtol=0, atol=0.04)  # five standard errors
    assert x.sum().item() == pytest.approx(
        128, abs=0.52
    )  # sum of level / 255; five standard errors


@pytest.mark.parametrize("kind", ["stochastic", "fixed"])
def test_images(kind):
    levels = torch.full((50, 1, 4, 4), 128, dtype=torch.uint8)
    labels = torch.zeros(50, dtype=torch.long)
    data = common.Data("grey", levels, labels, levels, labels)
    images = iwae.Images(iwae.Config(binarization=kind), data)
    seen = {}
    for _ in range(200):
        x, index = images.batch(5)
        for row, i in zip(x, index.tolist(), strict=True):
            seen.setdefault(i, set()).add(tuple(row.tolist()))
    kinds = sum(map(len, seen.values())) / len(seen)
    assert kinds == 1 if kind == "fixed" else kinds > 10
    assert torch.equal(images.test, iwae.Images(iwae.Config(binarization=kind), data).test)
    assert set(images.test.flatten().tolist()) == {0.0, 1.0}


def test_the_papers_schedule(tmp_path):
    torch.set_default_dtype(torch.float32)
    cfg = iwae.Config(out=str(tmp_path), steps=3280, decay="stages", warmup=0)
    run = iwae.Run(cfg, torch.nn.Linear(1, 1), torch.device("cpu"))
    rates = []
    for run.done in range(3280):  # a step is a pass
        rates.append(run.schedule())
    for i in range(8):
        assert rates.count(pytest.approx(10 ** (-i / 7))) == 3**i
    assert rates == sorted(rates, reverse=True)
    cfg.decay, run.done = "constant", 7
    assert run.schedule() == 1.0


# ---- Devices and learning -----------------------------------------------------------------------


@pytest.mark.parametrize("latent", [(3,), (3, 2)])
def test_everything_keeps_to_its_device(latent):
    torch.set_default_dtype(torch.float32)
    model = IWAE(latent, (5, 4)[: len(latent)], torch.rand(7)).to("meta")
    x, eps = torch.empty(4, 7, device="meta"), torch.empty(6, 4, sum(latent), device="meta")
    for objective in iwae.OBJECTIVES.values():
        assert objective(model, x, eps).is_meta
    assert model.sample(3).is_meta
    log_w = iwae.sample_log_weights(model, x, 5, keep=torch.empty(sum(latent), device="meta"))
    assert iwae.bound(log_w).is_meta
    assert iwae.activity(model, x).is_meta


def test_compiled_and_in_bfloat16():
    torch.set_default_dtype(torch.float32)
    model, x = small((3, 2), (5, 4))
    eps = torch.randn(6, 4, 5)
    expected = model(iwae.iwae, x, eps)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(iwae.iwae, x, eps), expected)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(iwae.iwae, x, eps)
    assert half.dtype == torch.float32
    assert_close(half, expected, rtol=0.03, atol=0.1)  # bfloat16 has 8 bits
    half.mean().backward()


def test_a_short_training_learns(tmp_path):
    """Images of a bar at one of 12 places: p(x) = 1/12, and no factorial p(x) comes near it."""
    torch.set_default_dtype(torch.float32)
    bars = (255 * torch.eye(12).repeat_interleave(3, 1)).byte().view(12, 1, 6, 6)
    labels = torch.arange(12)
    data = common.Data("bars", bars.repeat(50, 1, 1, 1), labels.repeat(50), bars, labels)
    settings = {"latent": (2,), "hidden": (24,), "steps": 300, "lr": 1e-2, "nll_samples": 200}
    cfg = iwae.Config(out=str(tmp_path), **settings)
    images = iwae.Images(cfg, data)
    run = iwae.start(cfg, images, torch.device("cpu"))
    before, *_ = iwae.evaluate(cfg, run, images)
    iwae.train(cfg, run, images)
    after, *_ = iwae.evaluate(cfg, run, images)
    assert before["nll"] > 9  # pixels alone: 36 times the entropy of 1/12 is 10.3
    assert after["nll"] < 4.5  # log 12 = 2.48 is the least
    assert after["active"] == "2"


# ---- The command line ---------------------------------------------------------------------------


@pytest.fixture
def run(call, pictures):
    torch.set_default_dtype(torch.float32)
    folder = pictures(n=40)
    return lambda *arguments: call(
        "iwae", *TINY, "--dataset", folder, "--image-size", 8, *arguments
    )


@pytest.mark.parametrize("objective", iwae.OBJECTIVES)
def test_objectives(run, objective):
    code, out, err = run("--objective", objective, "--out", "run", "--binarization", "fixed")
    assert code == 0, err
    assert "nll" in out
    assert "active" in out


def test_layers_posteriors_and_settings(run):
    code, out, err = run("--latent", "4,2", "--hidden", "8,6", "--flip", "--decay", "stages")
    assert code == 0, err
    assert "+" in out.split("active ")[1].split(",")[0]
    code, _, err = run("--latent", "2", "--nll-examples", "1", "--num-samples", "5", "--amp", "on")
    assert code == 0, err
    samples = np.load(Path("runs/iwae-pictures-2/samples.npz"))["arr_0"]
    assert samples.shape == (5, 8, 8, 3)


def test_tables(run):
    code, out, err = run(
        "--table", "1", "--ks", "1,5", "--warmup", "0", "--lr", "0.1", "--out", "one"
    )
    assert code == 0, err
    rows = [line.split() for line in out.splitlines() if line[:4].strip() in ("1", "5")]
    assert [row[0] for row in rows] == ["1", "5"]
    assert rows[0][1:7] == rows[0][7:13]  # VAE and IWAE are one for k = 1
    assert rows[1][1:5] != rows[1][7:11]
    assert rows[1][5] == "86.47"
    code, out, err = run("--table", "2", "--ks", "3", "--out", "two")
    assert code == 0, err
    assert {path.name for path in Path("two").iterdir()} == {"vae", "vae-iwae", "iwae", "iwae-vae"}
    assert out.splitlines()[-1].split()[0] == "iwae"


def test_bad_input(refused, pictures):
    torch.set_default_dtype(torch.float32)
    cases = {
        "--dataset moons": "not made of images",
        "--latent 50,20": "as many numbers",
        "--latent 0": "whole numbers such as 1,2,2",
        "--k 0": "at least 1",
        "--nll-examples 0": "at least 1",
        "--nll-samples 0": "at least 1",
        "--adam-eps 0": "a number above 0",
        "--objective elbo": "invalid choice",
        "--table 3": "invalid choice",
        "--table 1 --num-samples 2": "--table trains anew",
        "--binarization none": "invalid choice",
    }
    folder = pictures(n=3)
    for arguments, pattern in cases.items():
        where = [] if "--dataset" in arguments else ["--dataset", folder]
        refused(pattern, "iwae", *where, *arguments.split())
