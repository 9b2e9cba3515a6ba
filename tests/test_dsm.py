"""Vincent 2011: the objectives, their equivalences, the energy and the sampler in closed form."""

import json
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import common
import dsm

# Small enough for a test, whole enough to pass through every part.
TINY = ["--steps", "2", "--batch-size", "4", "--hidden", "8", "--examples", "50", "--levels", "2"]
TINY += ["--langevin", "2"]


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gauss(n, dim):
    """Nodes (n^dim, dim) and weights that integrate polynomials against N(0, I) exactly."""
    x, w = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(n))
    index = torch.cartesian_prod(*[torch.arange(n)] * dim).view(-1, dim)
    return x[index], (w / w.sum())[index].prod(1)


def auto_encoder(hidden=5, dim=3):
    """W, b, c of no particular values."""
    return torch.randn(hidden, dim), torch.randn(hidden), torch.randn(dim)


def psi_of(theta, sigma):
    return dsm.residual_score(lambda x: dsm.reconstruct(x, *theta), sigma)


def gradient(f, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]


# ---- Gaussian data, where every objective is known ----------------------------------------------
# x ~ N(0, v I_d), so q_sigma = N(0, (v + sigma²) I); all expectations by Gaussian quadrature.

V, SIGMA, D = 1.7, 0.4, 2
TOTAL = V + SIGMA**2
NODES, MASS = gauss(12, 2 * D)  # of x and of the noise
X, X_TILDE = math.sqrt(V) * NODES[:, :D], math.sqrt(V) * NODES[:, :D] + SIGMA * NODES[:, D:]
PSIS = {
    "exact": lambda x: -x / TOTAL,
    "linear": lambda x: -0.9 * x,
    "curved": lambda x: -0.3 * x - 0.1 * x**3,
    "coupled": lambda x: x.flip(-1) * x - x,
}


def mean(values):
    return (MASS * values).sum().item()


def score(x):
    return -x / TOTAL


@pytest.mark.parametrize("name", list(PSIS))
def test_constants_between_the_objectives(name):
    """J_ESM - J_ISM = d / (2 (v + sigma²)); J_DSM - J_ESM = d v / (2 sigma² (v + sigma²))."""
    psi = PSIS[name]
    explicit = mean(dsm.J_ESM(psi, score, X_TILDE))
    implicit = mean(dsm.J_ISM(psi, X_TILDE).detach())
    denoising = mean(dsm.J_DSM(psi, X, X_TILDE, SIGMA))
    assert explicit == pytest.approx(implicit + D / (2 * TOTAL), rel=1e-9)
    assert denoising == pytest.approx(explicit + D * V / (2 * SIGMA**2 * TOTAL), rel=1e-9)


def test_values_of_the_objectives():
    for k in (-0.9, 0.3):
        exact = D * (k + 1 / TOTAL) ** 2 * TOTAL / 2
        assert mean(dsm.J_ESM(lambda x, k=k: k * x, score, X_TILDE)) == pytest.approx(exact)
    assert mean(dsm.J_ESM(score, score, X_TILDE)) == 0
    psi_x, slopes = dsm.derivatives(PSIS["coupled"], X_TILDE)
    assert_close(psi_x, PSIS["coupled"](X_TILDE))
    assert_close(slopes, X_TILDE.flip(-1) - 1)  # d (x y - x) / dx
    x = X_TILDE
    regularised = dsm.J_ISMreg(PSIS["coupled"], x, 0.7)
    penalty = 0.7 * (x.flip(-1) - 1).square().sum(1)
    assert_close(regularised, dsm.J_ISM(PSIS["coupled"], x) + penalty)


def test_regularised_ism_stands_for_noise():
    """In one dimension and for a linear psi = k x, J_ISM on corrupted data is J_ISMreg with weight
    sigma² / 2 on clean data."""
    nodes, mass = gauss(6, 2)
    x, x_tilde = math.sqrt(V) * nodes[:, :1], math.sqrt(V) * nodes[:, :1] + SIGMA * nodes[:, 1:]
    for k in (-0.8, 0.5):
        corrupted = (mass * dsm.J_ISM(lambda x, k=k: k * x, x_tilde)).sum()
        clean = (mass * dsm.J_ISMreg(lambda x, k=k: k * x, x, SIGMA**2 / 2)).sum()
        assert_close(corrupted, clean)


def test_dsm_becomes_ism_as_the_noise_vanishes():
    """J_DSM - d / (2 sigma²) + J_ISM's constant: the difference falls like sigma²."""
    psi, gaps = PSIS["curved"], []
    for sigma in (0.2, 0.1):
        x_tilde = X + sigma * NODES[:, D:]
        J_DSM = mean(dsm.J_DSM(psi, X, x_tilde, sigma)) - D / (2 * sigma**2)
        gaps.append(J_DSM - mean(dsm.J_ISM(psi, X).detach()))
    assert abs(gaps[1]) < 0.05
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.05)


def test_best_linear_auto_encoder():
    """For data of covariance S it is S (S + sigma² I)^-1; J_DAE there is below that of others."""
    root = torch.tensor([[1.2, 0.0], [0.7, 0.5]])
    S, x = root @ root.T, NODES[:, :D] @ root.T
    x_tilde = x + SIGMA * NODES[:, D:]
    R = S @ torch.linalg.inv(S + SIGMA**2 * torch.eye(D))
    R.requires_grad_()
    J = (MASS * dsm.J_DAE(lambda x: x @ R.T, x, x_tilde)).sum()
    (slope,) = torch.autograd.grad(J, R)
    assert_close(slope, torch.zeros(D, D), rtol=0, atol=1e-12)
    assert_close(J.item(), SIGMA**2 * R.trace().item())  # the posterior's variance
    psi = dsm.residual_score(lambda x: x @ R.T, SIGMA)
    exact = -torch.linalg.solve(S + SIGMA**2 * torch.eye(D), x_tilde.T).T
    assert_close(psi(x_tilde), exact)


# ---- The energy of the auto-encoder --------------------------------------------------------------


def test_score_is_the_gradient_of_the_energy():
    theta, x = auto_encoder(), torch.randn(20, 3)
    exact = -gradient(lambda x: dsm.energy(x, *theta, 0.3), x)
    assert_close(psi_of(theta, 0.3)(x), exact, rtol=1e-12, atol=1e-12)


def test_energy_is_the_papers():
    (W, b, c), x = auto_encoder(), torch.randn(20, 3)
    units = sum(torch.log(1 + torch.exp(x @ W[j] + b[j])) for j in range(5))
    expected = -(x @ c - x.square().sum(1) / 2 + units) / 0.3**2
    assert_close(dsm.energy(x, W, b, c, 0.3), expected)
    assert dsm.energy(1e6 * x, W, b, c, 0.3).isfinite().all()


def test_denoising_score_matching_is_the_denoising_auto_encoder():
    """J_DSM = J_DAE / (2 sigma^4), example by example."""
    theta, x = auto_encoder(), torch.randn(20, 3)
    x_tilde = x + 0.3 * torch.randn(20, 3)
    J_DAE = dsm.J_DAE(lambda x: dsm.reconstruct(x, *theta), x, x_tilde)
    J_DSM = dsm.J_DSM(psi_of(theta, 0.3), x, x_tilde, 0.3)
    assert_close(J_DSM, J_DAE / (2 * 0.3**4), rtol=1e-12, atol=0)


def test_only_tied_weights_give_a_gradient_field():
    (W, b, c), x = auto_encoder(), torch.randn(3)

    def untied(x):
        return torch.sigmoid(W @ x + b) @ V + c - x

    V = W
    J = torch.autograd.functional.jacobian(untied, x)
    assert_close(J, J.T)
    assert_close(untied(x), 0.3**2 * psi_of((W, b, c), 0.3)(x))
    V = torch.randn(5, 3)
    J = torch.autograd.functional.jacobian(untied, x)
    assert (J - J.T).norm() > 0.1 * J.norm()


def test_several_auto_encoders_at_once():
    torch.set_default_dtype(torch.float32)
    data = torch.randn(50, 3)
    net = dsm.TiedAutoEncoders(data, 8, 2)
    x = torch.randn(2, 7, 3)
    both = net(x)
    for k in range(2):
        assert_close(both[k], dsm.reconstruct(x[k], *net.theta(k)))
        assert_close(net(x[0])[k], dsm.reconstruct(x[0], *net.theta(k)))
        # at the start: no bias on the data, and each unit at its threshold at one example
        assert_close(net(data)[k].mean(0), data.mean(0), rtol=0, atol=1e-5)
        W, b, _ = net.theta(k)
        assert ((data @ W.T + b).abs().amin(0) < 1e-4).all()
    assert_close(torch.compile(net, fullgraph=True, backend="eager")(x), both)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x).isfinite().all()


# ---- The Parzen density --------------------------------------------------------------------------

DATA = torch.tensor([[1.0, 0.2], [-0.7, 0.9], [-0.5, -1.1], [0.4, 0.3]], dtype=torch.float64)


def test_parzen_density():
    x = torch.randn(9, 2)
    normal = torch.distributions.Normal(DATA, 0.3)
    log_q = normal.log_prob(x[:, None]).sum(2).logsumexp(1) - math.log(4)
    assert_close(dsm.parzen_log_prob(x, DATA, 0.3), log_q)
    exact = gradient(lambda x: dsm.parzen_log_prob(x, DATA, 0.3), x)
    assert_close(dsm.parzen_score(DATA, 0.3)(x), exact)
    distances = (x[:, None] - DATA).square().sum(2) / (2 * 0.3**2)
    assert_close(dsm.parzen_reconstruct(x, DATA, 0.3), (-distances).softmax(1) @ DATA)


def test_all_pairs_integrate_the_joint_density():
    x, x_tilde, mass = dsm.all_pairs(DATA, 0.3)
    assert mass.sum().item() == pytest.approx(1)
    z = (x_tilde - x) / 0.3
    moments = torch.stack([(mass * z[:, 0] ** n).sum() for n in range(1, 5)])
    assert_close(moments, torch.tensor([0.0, 1, 0, 3]), rtol=1e-6, atol=1e-6)  # cut at 6.5 sigma
    assert_close(mass @ x, DATA.mean(0))
    test = mass @ torch.cos(x_tilde)  # E cos(x + sigma z) = exp(-sigma² / 2) cos x
    assert_close(test, math.exp(-(0.3**2) / 2) * torch.cos(DATA).mean(0), rtol=1e-9, atol=0)


def test_floor_of_denoising_score_matching():
    """It is reached at the Parzen score; elsewhere J_DSM is J_ESM above it."""
    x, x_tilde, mass = dsm.all_pairs(DATA, 0.3)
    exact = dsm.parzen_score(DATA, 0.3)
    floor = (mass * dsm.J_DSM(exact, x, x_tilde, 0.3)).sum()
    psi = psi_of(auto_encoder(dim=2), 0.3)
    J_DSM = (mass * dsm.J_DSM(psi, x, x_tilde, 0.3)).sum()
    J_ESM = (mass * dsm.J_ESM(psi, exact, x_tilde)).sum()
    assert_close(J_DSM - floor, J_ESM)
    assert J_ESM > 0.1


@pytest.mark.parametrize("sigma", [0.2, 0.5])
def test_equivalences(sigma):
    """The four objectives agree, in value and gradient."""
    theta = auto_encoder(dim=2)
    values, distance = dsm.equivalences(theta, DATA, sigma)
    assert set(values) == {"J_ESM", "J_ISM", "J_DSM", "J_DAE"}
    assert list(values.values()) == pytest.approx([values["J_ESM"]] * 4, rel=1e-8)
    assert distance < 1e-8
    with torch.no_grad():  # as the evaluation calls it
        assert dsm.equivalences(theta, DATA, sigma)[1] < 1e-8


def test_equivalences_can_fail(monkeypatch):
    right = dsm.J_DAE
    monkeypatch.setattr(dsm, "J_DAE", lambda *inputs: 1.001 * right(*inputs))
    values, distance = dsm.equivalences(auto_encoder(dim=2), DATA, 0.3)
    assert abs(values["J_DAE"] / values["J_ESM"] - 1) > 1e-4
    assert distance > 1e-4


# ---- Training losses -----------------------------------------------------------------------------


def test_losses_of_every_level():
    """Each is sigma² times its objective at each level; dae and dsm are the same."""
    torch.set_default_dtype(torch.float32)
    net = dsm.TiedAutoEncoders(torch.randn(50, 2), 8, 2)
    sigma = torch.tensor([0.5, 0.25])[:, None, None]
    x, data = torch.randn(6, 2), torch.randn(9, 2)
    x_tilde = x + sigma * torch.randn(2, 6, 2)
    losses = {
        name: dsm.loss_of(name, net, x, x_tilde, sigma, data)
        for name in ("dae", "dsm", "esm", "ism", "ismreg")
    }
    assert_close(losses["dae"], losses["dsm"], rtol=1e-4, atol=1e-6)
    for k, s in enumerate((0.5, 0.25)):
        psi = psi_of(net.theta(k), s)
        expected = {
            "dsm": dsm.J_DSM(psi, x, x_tilde[k], s),
            "esm": dsm.J_ESM(psi, dsm.parzen_score(data, s), x_tilde[k]),
            "ism": dsm.J_ISM(psi, x_tilde[k]),
            "ismreg": dsm.J_ISMreg(psi, x, s**2 / 2),
        }
        for name, J in expected.items():
            assert_close(losses[name][k], s**2 * J, rtol=1e-4, atol=1e-5)


# ---- Sampling ------------------------------------------------------------------------------------


def test_langevin_reaches_its_stationary_variance(monkeypatch):
    """For N(0, v) and step h it is v / (1 - h / (4 v)): near v, by O(h). Noises are unit vectors:
    x holds their coefficients, and the variance is the sum of the squares, exactly."""
    count = iter(range(1, 500))
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.eye(1, 400).roll(next(count), 1))
    v, h = 0.5, 0.2
    x = dsm.langevin(lambda x: -x / v, 3 * torch.eye(1, 400), h, 60)
    expected = v / (1 - h / (4 * v))
    assert x.square().sum().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("anneal", [True, False])
def test_chains_start_where_they_should(monkeypatch, anneal):
    torch.set_default_dtype(torch.float32)
    net = dsm.TiedAutoEncoders(torch.randn(50, 2), 8, 2)
    seen = []

    def langevin(psi, x, step, steps):
        seen.append((x, step, steps, psi(torch.ones(1, 2))))
        return x + 1

    monkeypatch.setattr(dsm, "langevin", langevin)
    cfg = dsm.Config(anneal=anneal, scale=2.0, step_size=0.5, langevin=7)
    x_0 = dsm.starts(cfg, [0.6, 0.3], 5000, torch.zeros(3, 2))
    samples = dsm.sample(cfg, net, [0.6, 0.3], x_0)
    assert samples.shape == (2, 5000, 2)
    assert seen[0][0].std().item() == pytest.approx(2.0, rel=0.05)
    assert torch.equal(seen[1][0], samples[0] if anneal else seen[0][0])
    for k, sigma in enumerate((0.6, 0.3)):
        assert seen[k][1:3] == (pytest.approx(0.5 * sigma**2), 7)
        assert_close(seen[k][3], psi_of(net.theta(k), sigma)(torch.ones(1, 2)))


def test_chains_start_at_draws_of_each_levels_q_sigma():
    cfg, examples, sigmas = (
        dsm.Config(start="data"),
        torch.tensor([[-9.0, 0.0], [9.0, 0.0]]),
        [1, 0.5],
    )
    for x_0, sigma in zip(dsm.starts(cfg, sigmas, 5000, examples), sigmas, strict=True):
        noise = x_0 - examples[(x_0[:, 0] > 0).long()]
        assert noise.std().item() == pytest.approx(sigma, rel=5 / math.sqrt(20_000))
        assert (x_0[:, 0] > 0).double().mean().item() == pytest.approx(0.5, abs=0.036)  # 5 sd
    torch.manual_seed(1)
    net = dsm.TiedAutoEncoders(examples, 8, 2)
    cfg = dsm.Config(start="data", anneal=False, langevin=0)
    x_0 = dsm.starts(cfg, sigmas, 4, examples)
    assert torch.equal(dsm.sample(cfg, net, sigmas, x_0), x_0)


def test_losses_and_samplers_keep_to_their_device():
    torch.set_default_dtype(torch.float32)
    net = dsm.TiedAutoEncoders(torch.randn(50, 2), 8, 2).to("meta")
    x, x_tilde = torch.empty(6, 2, device="meta"), torch.empty(2, 6, 2, device="meta")
    sigma = torch.empty(2, 1, 1, device="meta")
    for name in ("dae", "dsm", "esm", "ism", "ismreg"):
        assert dsm.loss_of(name, net, x, x_tilde, sigma, x).is_meta
    for start in ("noise", "data"):
        x_0 = dsm.starts(dsm.Config(start=start), [0.6, 0.3], 5, x)
        assert dsm.sample(dsm.Config(langevin=2), net, [0.6, 0.3], x_0).is_meta
    assert dsm.energy(x, *net.theta(0), 0.3).is_meta
    assert dsm.parzen_log_prob(x, x, 0.3).is_meta
    assert all(part.is_meta for part in dsm.all_pairs(x, 0.3))
    assert dsm.corrupted(x, 3, 0.3).is_meta


# ---- Learning, and the command line --------------------------------------------------------------


def test_a_short_training_learns_the_energy_of_a_gaussian(tmp_path):
    """N(0, I) corrupted by 0.5: E rises by |x|² / (2 (1 + 0.5²)); upside down it would fall."""
    torch.set_default_dtype(torch.float32)
    points = torch.randn(20_000, 2)
    data = common.Data("gaussian", points, torch.zeros(20_000), points, torch.zeros(20_000))
    cfg = dsm.Config(out=str(tmp_path), steps=300, device="cpu", hidden=128, levels=1, scale=4.0)
    cfg.lr, cfg.warmup, cfg.ema = 5e-2, 20, 0.95
    net = dsm.TiedAutoEncoders(dsm.vectors(cfg, points), cfg.hidden, 1)
    run = common.Run(cfg, net, torch.device("cpu"))
    sigma = 0.5 * cfg.scale

    def error():
        psi = psi_of(run.ema.theta(0), sigma)
        x_tilde = dsm.corrupted(dsm.vectors(cfg, points), 2_000, sigma)
        exact = -x_tilde / (1.25 * cfg.scale**2)
        J = dsm.J_ESM(psi, lambda _: exact, x_tilde).mean()
        return (2 * J / exact.square().sum(1).mean()).sqrt().item()

    assert error() > 1
    dsm.train(cfg, run, data, [sigma])
    assert error() < 0.25  # 0.13 at this seed
    x = cfg.scale * torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    low, high = dsm.energy(x, *run.ema.theta(0), sigma).tolist()
    assert high - low == pytest.approx(4 / 2.5, rel=0.2)


@pytest.mark.parametrize("objective", ["dsm", "esm", "ism", "ismreg"])
def test_every_objective_trains(tmp_path, objective):
    torch.set_default_dtype(torch.float32)
    x, y = torch.randn(60, 2), torch.zeros(60)
    cfg = dsm.Config(out=str(tmp_path), steps=2, device="cpu", hidden=8, objective=objective)
    net = dsm.TiedAutoEncoders(dsm.vectors(cfg, x), 8, 2)
    before = net.W.detach().clone()
    run = common.Run(cfg, net, torch.device("cpu"))
    dsm.train(cfg, run, common.Data("points", x, y, x, y), [5.0, 2.5])
    assert not torch.equal(net.W, before)


def test_images(call, pictures, tmp_path):
    torch.set_default_dtype(torch.float32)
    pictures(n=12, size=8)
    arguments = [*TINY, "--dataset", "pictures", "--image-size", "8", "--examples", "5"]
    code, out, err = call("dsm", *arguments, "--num-samples", "3")
    assert code == 0, err
    for word in ("mse_parzen", "upright_below_turned", "samples_moved_by"):
        assert word in out
    lines = (tmp_path / "runs/dsm-pictures/metrics.jsonl").read_text().splitlines()
    assert len([line for line in lines if "split" in json.loads(line)]) == 3  # two levels, all


def test_networks_are_made_where_the_data_are():
    net = dsm.TiedAutoEncoders(torch.empty(5, 2, device="meta"), hidden=3, levels=2)
    assert all(p.is_meta for p in net.parameters())


def test_landscape_points_downhill(monkeypatch):
    """Arrows point along the score, as far as its step or to the next arrow; the mode is bright."""
    torch.set_default_dtype(torch.float32)
    points = dsm.grid(2.0, 40)
    assert_close(points[0], torch.tensor([-2.0, -2.0]))
    assert_close(points[1] - points[0], torch.tensor([0.0, 4 / 39]))
    log_p = -(points - torch.tensor([1.0, 0.0])).square().sum(1) * 3
    image = dsm.landscape(log_p, lambda x: 0 * x, 0.5, points).float().sum(0)
    assert image[120:136, 184:200].mean() > 2 * image[:, :64].mean()  # x = 1, y = 0; x < -1
    monkeypatch.setattr(common, "chart", lambda shapes, *_, **__: shapes)
    shapes = dsm.landscape(log_p, lambda x: torch.tensor([1.0, 0.0]) - x, 0.5, points)
    assert len(shapes) == 15**2
    for _, (tail, tip, *_), *_ in shapes:
        step = 0.25 * (torch.tensor([1.0, 0.0]) - tail)
        longest = 1.8 * 2 / 15
        assert_close(tip - tail, step * min(1.0, longest / step.norm().item()))


BAD_SETTINGS = [
    ({"step_size": 4.0}, "diverges at a --step-size"),
    ({"levels": 17}, "16 are the most"),
    ({"flip": True}, "--flip adds examples"),
    ({"examples": 9}, "more than the 8 of points"),
    ({"objective": "ism", "compile": True}, "cannot differentiate twice, as --objective ism"),
]


@pytest.mark.parametrize(("settings", "pattern"), BAD_SETTINGS)
def test_settings_that_do_not_go_together(settings, pattern):
    x, y = torch.zeros(8, 2), torch.zeros(8)
    with pytest.raises(common.UserError, match=pattern):
        dsm.check(dsm.Config(**{"examples": None} | settings), common.Data("points", x, y, x, y))


BAD_FLAGS = [
    ("--objective ism --dataset pictures", "takes 768 backward passes"),
    ("--objective gan", "invalid choice"),
    ("--sigma 0", "a number above 0"),
    ("--levels 0", "at least 1"),
    ("--langevin -1", "at least 0"),
]


@pytest.mark.parametrize(("arguments", "pattern"), BAD_FLAGS)
def test_bad_flags(refused, pictures, arguments, pattern):
    pictures()
    flags = arguments.split()
    refused(pattern, "dsm", *flags, "--steps", "2", "--image-size", "16", "--examples", "5")
