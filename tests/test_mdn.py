"""Bishop 1994: the mixture, its derivatives and moments, both problems, BFGS, and .csv files."""

import copy
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import mdn
from mdn import Mixture

TINY = ["--steps", "2"]


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def outputs(batch=5, kernels=3, c=2):
    """Outputs z of a network, and targets t."""
    return torch.randn(batch, (c + 2) * kernels), torch.randn(batch, c)


# ---- The mixture --------------------------------------------------------------------------------


def test_heads_are_softmax_exponential_and_linear():
    z, _ = outputs()
    m = mdn.mixture(z, 3)
    assert_close(m.alpha, z[:, :3].softmax(1))
    assert_close(m.sigma, z[:, 3:6].exp())
    assert_close(m.mu, z[:, 6:].view(5, 3, 2))
    assert_close(mdn.mixture(torch.zeros(1, 12), 3).alpha, torch.full((1, 3), 1 / 3))
    floored = mdn.mixture(z - 100, 3, sigma_min=0.25)
    assert_close(floored.sigma, torch.full((5, 3), 0.25))


def test_density_agrees_with_torch_distributions():
    z, t = outputs()
    m = mdn.mixture(z, 3)
    kernel = torch.distributions.Normal(m.mu, m.sigma[..., None])
    kernels = torch.distributions.Independent(kernel, 1)
    mixture = torch.distributions.Categorical(m.alpha)
    exact = torch.distributions.MixtureSameFamily(mixture, kernels)
    assert_close(mdn.log_density(m, t), exact.log_prob(t), rtol=1e-12, atol=1e-12)
    assert_close(mdn.log_phi(m, t), kernels.log_prob(t[:, None]), rtol=1e-12, atol=1e-12)
    assert_close(mdn.conditional_mean(m), exact.mean, rtol=1e-12, atol=1e-12)
    assert_close(mdn.conditional_variance(m), exact.variance.sum(1), rtol=1e-12, atol=1e-12)


def test_density_integrates_to_one_and_moments_agree_with_quadrature():
    z, _ = outputs(batch=4)
    m = mdn.mixture(z / 4, 3)
    axis = torch.linspace(-12, 12, 481)  # the trapezium rule is exact to rounding on Gaussians
    grid = torch.cartesian_prod(axis, axis)  # (G, 2)
    wide = Mixture(*(part[:, None] for part in m))
    p = mdn.log_density(wide, grid.expand(4, -1, 2)).exp() * (axis[1] - axis[0]) ** 2
    assert_close(p.sum(1), torch.ones(4), rtol=1e-10, atol=0)
    mean = p @ grid
    assert_close(mdn.conditional_mean(m), mean, rtol=1e-10, atol=1e-10)
    variance = (p * (grid - mean[:, None]).square().sum(2)).sum(1)
    assert_close(mdn.conditional_variance(m), variance, rtol=1e-10, atol=1e-10)


def test_permuting_the_kernels_changes_nothing():
    z, t = outputs()
    m, order = mdn.mixture(z, 3), torch.tensor([2, 0, 1])
    permuted = Mixture(*(part[:, order] for part in m))
    for value in (mdn.conditional_mean, mdn.conditional_variance, mdn.most_probable):
        assert_close(value(m), value(permuted), rtol=1e-13, atol=1e-13)
    for value in (mdn.central_value, mdn.mode):
        assert_close(value(m), value(permuted), rtol=1e-13, atol=1e-13)
    assert_close(mdn.log_density(m, t), mdn.log_density(permuted, t), rtol=1e-13, atol=1e-13)
    assert_close(mdn.posterior(m, t)[:, order], mdn.posterior(permuted, t), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_targets_a_thousand_deviations_away_give_no_nan(dtype):
    z, t = (part.to(dtype).requires_grad_() for part in outputs())
    far = 1000 * t.detach().sign()
    E = mdn.ErrorFunction.apply(z, far, 3, 0.0)
    E.sum().backward()
    assert E.isfinite().all()
    assert E.min() > 1e3  # and not the logarithm of a clamped density
    assert z.grad.isfinite().all()
    assert_close(mdn.posterior(mdn.mixture(z, 3), far).sum(1), torch.ones(5, dtype=dtype))


# ---- The error function and its derivatives -----------------------------------------------------


@pytest.mark.parametrize("sigma_min", [0.0, 0.3])
@pytest.mark.parametrize("c", [1, 2])
def test_derivatives_agree_with_autograd(c, sigma_min):
    z, t = outputs(c=c)
    z.requires_grad_()
    E = -mdn.log_density(mdn.mixture(z, 3, sigma_min), t)
    (by_autograd,) = torch.autograd.grad(E.sum(), z, retain_graph=True)
    in_closed_form = mdn.derivatives(mdn.mixture(z, 3, sigma_min), t, sigma_min)
    assert_close(in_closed_form, by_autograd, rtol=1e-11, atol=1e-13)
    custom = mdn.ErrorFunction.apply(z, t, 3, sigma_min)
    assert_close(custom, E)
    weights = torch.rand(5)
    ours, theirs = (torch.autograd.grad(weights @ e, z)[0] for e in (custom, E))
    assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
    assert torch.autograd.gradcheck(lambda z: mdn.ErrorFunction.apply(z, t, 3, sigma_min), (z,))


def test_one_kernel_of_a_fixed_width_is_least_squares():
    z, t = outputs(kernels=1)
    m = mdn.mixture(z, 1)._replace(log_sigma=torch.full((5, 1), math.log(0.7)))
    constant = math.log(2 * math.pi * 0.7**2)  # c = 2 dimensions
    squares = mdn.sum_of_squares(z[:, 2:], t)
    assert_close(-mdn.log_density(m, t), squares / 0.7**2 + constant)


# ---- What the mixture says about t --------------------------------------------------------------


def test_most_probable_and_central_value_are_two_rules():
    alpha, sigma = torch.tensor([[0.7, 0.3]]), torch.tensor([[1.0, 0.1]])
    m = Mixture(alpha.log(), sigma.log(), torch.tensor([[[0.0], [4.0]]]))
    assert mdn.most_probable(m).item() == 0  # the larger prior
    assert mdn.central_value(m).item() == 4  # .3 / .1 > .7 / 1
    wide = m._replace(mu=m.mu.expand(1, 2, 3), log_alpha=torch.tensor([[0.9999, 1e-4]]).log())
    assert (mdn.central_value(wide) == 0).all()  # sigma^3: .9999 against .1
    narrow = wide._replace(log_sigma=torch.tensor([[1.0, 0.04]]).log())
    assert (mdn.central_value(narrow) == 4).all()  # 1e-4 / .04^3 = 1.6


def test_mode_is_the_highest_point_of_the_density():
    m = mdn.mixture(outputs(batch=30, c=1)[0] * 0.7, 3)
    grid = torch.linspace(-6, 6, 24_001)
    log_p = mdn.density_grid(m, grid).log()  # (30, G)
    height, best = log_p.max(dim=1)
    found = mdn.mode(m, iterations=2_000)
    assert_close(mdn.log_density(m, found), height, rtol=0, atol=1e-5)  # second order in the step
    assert_close(found[:, 0], grid[best], rtol=0, atol=2e-3)
    few = [mdn.log_density(m, mdn.mode(m, n)) for n in (0, 1, 2, 5, 20)]
    assert all((later >= earlier - 1e-12).all() for earlier, later in itertools.pairwise(few))


def test_samples_have_the_moments():
    m = Mixture(*(part.expand(200_000, *part.shape[1:]) for part in mdn.mixture(outputs(1)[0], 3)))
    t = mdn.sample(m)
    error = (t - mdn.conditional_mean(m)).mean(0)
    variance = mdn.conditional_variance(m)[0]
    assert (error.abs() < 5 * (variance / 200_000).sqrt()).all()  # five standard errors
    assert_close(t.var(0).sum(), variance, rtol=0.02, atol=0)


# ---- The two problems ---------------------------------------------------------------------------


def test_inverse_problem_has_the_papers_constants():
    pairs = mdn.load_pairs(config(), "cpu")
    assert pairs.t.shape == (1_000, 1)
    assert_close(pairs.t.diff(dim=0), torch.full((999, 1), 1e-3))  # equally spaced
    noise = pairs.x - (pairs.t + 0.3 * (2 * math.pi * pairs.t).sin())
    assert 0.099 < noise.abs().max() <= 0.1
    assert abs(noise.std() - 0.1 / 3**0.5) < 0.005  # uniform


def test_exact_posterior_and_limits():
    x = torch.tensor([0.0, 0.5])
    length, mean, variance = mdn.exact_posterior(x)
    # Near x = 0 the map is monotone: t runs from 0 to where t + 0.3 sin(2 pi t) = 0.1.
    end = 0.0
    for _ in range(50):
        end -= (end + 0.3 * math.sin(2 * math.pi * end) - 0.1) / (
            1 + 0.6 * math.pi * math.cos(2 * math.pi * end)
        )
    assert_close(length[0].item(), end, rtol=0, atol=2e-4)  # one cell of the grid
    assert_close(mean[0].item(), end / 2, rtol=0, atol=2e-4)
    assert_close(variance[0].item(), end**2 / 12, rtol=0, atol=1e-5)
    assert_close(mean[1].item(), 0.5, rtol=0, atol=1e-4)  # by symmetry
    entropy, variance = mdn.inverse_limits()
    assert_close(entropy, -1.2824, rtol=0, atol=2e-4)  # log 0.2 - h(x), by independent quadrature
    assert_close(variance, 0.03830, rtol=0, atol=1e-5)


def inverse_kinematics(x):
    """Both ways to reach x (B, 2): angles (B, 2, 2), and which lie in the ranges, (B, 2).

    The Jacobian of mdn.hand is L_1 L_2 |sin theta_2| for both: where both are allowed, each has the
    probability 1/2.
    """
    cos = (mdn.L_1**2 + mdn.L_2**2 - x.square().sum(dim=1)) / (2 * mdn.L_1 * mdn.L_2)
    theta_2 = cos.clamp(-1, 1).acos()
    theta_2 = torch.stack([theta_2, 2 * math.pi - theta_2], dim=1)  # (B, 2): the two elbows
    link = torch.atan2(-mdn.L_2 * theta_2.sin(), mdn.L_1 - mdn.L_2 * theta_2.cos())
    theta = torch.stack([torch.atan2(x[:, 1], x[:, 0])[:, None] - link, theta_2], dim=2)
    low, high = x.new_tensor(mdn.RANGES).T
    return theta, ((theta > low) & (theta < high)).all(dim=2)


def test_both_ways_of_the_arm_reach_the_hand():
    low, high = torch.tensor(mdn.RANGES).T
    theta = low + (high - low) * torch.rand(1_000, 2)
    x = mdn.hand(theta)
    ways, allowed = inverse_kinematics(x)
    assert_close(mdn.hand(ways), x[:, None].expand(-1, 2, 2), rtol=0, atol=1e-12)
    error = (ways - theta[:, None]).abs().sum(2)
    assert (error.min(1).values < 1e-6).all()  # one of them is the way that was taken
    assert allowed.gather(1, error.argmin(1)[:, None]).all()
    assert 0.63 < allowed.all(1).double().mean() < 0.75  # of them all, 68.8 % have two
    jacobian = torch.func.vmap(torch.func.jacrev(mdn.hand))(theta)
    exact = mdn.L_1 * mdn.L_2 * theta[:, 1].sin().abs()
    assert_close(jacobian.det().abs(), exact, rtol=1e-9, atol=1e-12)


def test_arm_as_drawn():
    straight = torch.tensor([0.5, math.pi])  # the second link goes on where the first one ends
    assert_close(mdn.hand(straight), torch.tensor([math.cos(0.5), math.sin(0.5)]))
    assert_close(mdn.miss(straight, torch.tensor([math.cos(0.5), math.sin(0.5) + 0.1])), 0.1)


# ---- BFGS and the network -----------------------------------------------------------------------


def test_bfgs_minimises_a_quadratic_and_finds_its_inverse_hessian():
    A = torch.randn(6, 6)
    A, b = A @ A.T + torch.eye(6), torch.randn(6)
    w = torch.nn.Parameter(torch.zeros(6))
    optimizer = mdn.BFGS([w], lambda: w @ A @ w / 2 - b @ w)
    errors = []
    for _ in range(40):
        optimizer.step()
        errors.append((A @ w.detach() - b).norm().item())
    assert errors[-1] < 1e-6  # to where the slope no longer shows in E
    H = optimizer.state[w]["H"]
    assert_close(H, H.T, rtol=1e-8, atol=1e-8)
    assert torch.linalg.eigvalsh(H).min() > 0
    assert_close(H @ A, torch.eye(6), rtol=0, atol=0.3)  # inexact searches leave it near


def test_bfgs_minimises_rosenbrock():
    w = torch.nn.Parameter(torch.tensor([-1.2, 1.0]))
    optimizer = mdn.BFGS([w], lambda: (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2)
    for _ in range(60):
        optimizer.step()
    assert_close(w.detach(), torch.ones(2), rtol=0, atol=1e-5)


def config(**changes):
    dataset = changes.get("dataset", "inverse")
    return mdn.Config(**({"dataset": dataset} | mdn.PRESETS.get(dataset, {}) | changes))


def test_network_learns_the_inverse_problem():
    pairs = mdn.load_pairs(config(), "cpu")
    net = mdn.Network(pairs.x, 5, mdn.starting_mixture(pairs.t, 3))

    def error():
        return mdn.ErrorFunction.apply(net(pairs.x), pairs.t, 3, 1e-3).mean()

    start, optimizer = error().item(), mdn.BFGS(list(net.parameters()), error)
    for _ in range(250):
        optimizer.step()
    with torch.no_grad():
        m = mdn.mixture(net(pairs.test_x), 3, 1e-3)
    nll = -mdn.log_density(m, pairs.test_t).mean().item()
    assert start > 0  # about the entropy of a Gaussian as wide as the targets, .18
    entropy, _ = mdn.inverse_limits()
    assert entropy < nll < -0.8  # the best that one kernel can do, at -log .196 - 1.4 = .2, is far


def test_best_start_has_no_kernel_that_is_never_used():
    pairs = mdn.load_pairs(config(dataset="robot"), "cpu")

    def error(z, t):
        return mdn.ErrorFunction.apply(z, t, 2, 1e-3)

    nets = [mdn.Network(pairs.x, 5, mdn.starting_mixture(pairs.t, 2)) for _ in range(3)]
    for dead in (nets[0], nets[2]):
        with torch.no_grad():
            dead.output.bias[0] -= 50  # alpha of e^-50
    before = copy.deepcopy(nets[1].state_dict())
    best = mdn.best_start(nets, pairs, error)
    assert best is nets[1]
    assert all(torch.equal(value, before[key]) for key, value in best.state_dict().items())


def test_mean_of_the_two_ways_stretches_the_arm():
    """So least squares, which learns the mean, moves the hand to the boundary: theta_2 = pi."""
    theta, allowed = inverse_kinematics(mdn.hand(torch.tensor([[0.7, 2.5], [0.8, 4.0]])))
    assert allowed.all()
    mean = theta.mean(dim=1)
    assert_close(mean[:, 1], torch.full((2,), math.pi))
    assert_close(mdn.hand(mean).norm(dim=1), torch.ones(2))  # L_1 + L_2
    x = mdn.load_pairs(config(dataset="robot"), "cpu").test_x
    theta, allowed = inverse_kinematics(x)
    mean = (allowed[..., None] * theta).sum(1) / allowed.sum(1, keepdim=True)
    assert abs(mdn.miss(mean, x) - 0.0583) < 0.001  # about what the paper's least squares has


def test_every_part_runs_on_the_meta_device():
    x, t = torch.randn(4, 3, device="meta"), torch.randn(4, 2, device="meta")
    net = mdn.Network(x, 5, mdn.starting_mixture(t, 3))
    assert all(p.is_meta for p in (*net.parameters(), *net.buffers()))
    m = mdn.mixture(net(x), 3, 1e-3)
    E = mdn.ErrorFunction.apply(net(x), t, 3, 1e-3)
    E.mean().backward()
    assert mdn.derivatives(m, t, 1e-3).is_meta
    for value in (mdn.conditional_mean, mdn.most_probable, mdn.central_value, mdn.mode):
        assert value(m).shape == (4, 2)
        assert value(m).is_meta
    assert mdn.sample(m).shape == (4, 2)
    assert mdn.conditional_variance(m).shape == mdn.sum_of_squares(t, t).shape == (4,)
    assert mdn.hand(t).shape == (4, 2)


def test_network_compiles_without_a_graph_break():
    x = torch.randn(4, 3)
    net = mdn.Network(x, 5, torch.zeros(12))
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    assert_close(compiled(x), net(x))


def test_the_error_stays_in_double_precision_under_autocast():
    x, t = torch.randn(8, 1), torch.randn(8, 1)
    net = mdn.Network(x, 5, torch.zeros(9))
    with torch.autocast("cpu", torch.bfloat16):
        E = mdn.ErrorFunction.apply(net(x).double(), t, 3, 1e-3)
    assert E.dtype == torch.float64
    exact = mdn.ErrorFunction.apply(net(x), t, 3, 1e-3)
    assert torch.equal(E, exact)  # autocast leaves double precision alone


# ---- The command line ---------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path):
    """A .csv of 60 cases: a is u or -u, b is v."""
    u, v = np.random.default_rng(0).random((2, 60))
    a = u * (-1) ** np.arange(60)
    lines = [f"{i:.6f},{j:.6f},{k:.6f},{j + 3:.6f}" for i, j, k in zip(u, v, a, strict=True)]
    path = tmp_path / "table.csv"
    path.write_text("u, v ,a,b\n" + "\n".join(lines) + "\n")
    return path


def test_robot_prints_the_table_beside_the_papers(call):
    code, out, err = call("mdn", *TINY, "--dataset", "robot", "--out", "run")
    assert code == 0, err
    assert "least squares" in out
    assert "0.0578" in out
    assert "0.0053" in out
    record = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert record["most_probable_component"] > 0


def test_any_csv_with_named_targets(call, table):
    arguments = ["--dataset", table, "--targets", "a, b", "--steps", "60", "--out", "run"]
    code, out, err = call("mdn", *arguments, "--num-samples", "7", "--ema", "0.9")
    assert code == 0, err
    assert np.load("run/samples.npz")["arr_0"].shape == (7, 4)  # two inputs, two targets
    assert "see run/samples.png" in out
    code, _, err = call("mdn", "--sample", "run/checkpoint.pt")
    assert code == 0, err
    one = [
        "--dataset",
        table,
        "--targets",
        "a",
        "--inputs",
        "u",
        "--optimizer",
        "bfgs",
        "--steps",
        "3",
    ]
    code, _, err = call("mdn", *one, "--out", "one")
    assert code == 0, err


def test_likelihood_is_in_the_units_of_the_column(call, table):
    """The same targets in a unit a thousand times smaller: the density is a thousandth."""
    other = table.with_name("other.csv")
    rows = [line.split(",") for line in table.read_text().splitlines()]
    small = [[*row[:2], f"{1000 * float(row[2])}", row[3]] for row in rows[1:]]
    other.write_text("\n".join(",".join(row) for row in [rows[0], *small]))
    nll = []
    for path, out in ((table, "x"), (other, "y")):
        assert (
            call("mdn", "--dataset", path, "--targets", "a", "--steps", "5", "--out", out)[0] == 0
        )
        nll.append(json.loads(Path(out, "metrics.jsonl").read_text().splitlines()[-1])["nll"])
    assert_close(nll[1] - nll[0], math.log(1000), rtol=1e-6, atol=0)


def test_another_table_is_read_in_the_units_of_the_training_one(call, table):
    """Targets ten higher than those learned are ten off, and are reported so."""
    other = table.with_name("other.csv")
    rows = [line.split(",") for line in table.read_text().splitlines()]
    higher = [[*row[:2], f"{10 + float(row[2])}", row[3]] for row in rows[1:]]
    other.write_text("\n".join(",".join(row) for row in [rows[0], *higher]))
    flags = ["--targets", "a", "--inputs", "u", "--steps", "5", "--out", "x"]
    assert call("mdn", "--dataset", table, *flags)[0] == 0
    code, _, err = call("mdn", "--sample", "x/checkpoint.pt", "--dataset", other, "--out", "y")
    assert code == 0, err
    record = json.loads(Path("y/metrics.jsonl").read_text().splitlines()[-1])
    assert record["rmse_of_mean"] == pytest.approx(10, abs=1.5)


def test_a_checkpoint_keeps_its_columns_and_units(call, refused, table):
    """Columns in another order are found by name; a resumed run goes on in the old units."""
    flags = ["--dataset", table, "--targets", "a", "--steps", "5", "--out", "x"]
    assert call("mdn", *flags)[0] == 0
    sample = ["--sample", "x/checkpoint.pt"]
    for flag in (["--inputs", "v"], ["--targets", "b"], ["--sigma-min", "0.5"]):
        refused("learned with", "mdn", *sample, *flag)
    refused("leave out --amp", "mdn", *flags[:-1], "y", "--amp", "on")
    refused("is of a later stage", "mdn", "--sample", "x/checkpoint-least-squares.pt")
    rows = [line.split(",") for line in table.read_text().splitlines()]
    swapped = table.with_name("swapped.csv")
    swapped.write_text("\n".join(",".join([b, v, a, u]) for u, v, a, b in rows))
    nll = []
    for path, out in ((table, "same"), (swapped, "other")):
        assert call("mdn", *sample, "--dataset", path, "--out", out)[0] == 0
        nll.append(json.loads(Path(out, "metrics.jsonl").read_text().splitlines()[-1])["nll"])
    assert nll[0] == pytest.approx(nll[1], abs=1e-9)
    higher = [[*row[:2], f"{10 + float(row[2])}", row[3]] for row in rows[1:]]
    table.write_text("\n".join(",".join(row) for row in [rows[0], *higher]))
    assert call("mdn", "--resume", "--out", "x", "--steps", "400")[0] == 0
    resumed = json.loads(Path("x/metrics.jsonl").read_text().splitlines()[-1])
    assert resumed["rmse_of_mean"] < 8  # on the way to targets ten higher
    assert call("mdn", *sample, "--out", "later")[0] == 0
    later = json.loads(Path("later/metrics.jsonl").read_text().splitlines()[-1])
    assert later["nll"] == pytest.approx(resumed["nll"], abs=1e-6)
    assert later["rmse_of_mean"] == pytest.approx(resumed["rmse_of_mean"], abs=1e-6)


def test_bfgs_begins_anew_where_the_error_has_changed():
    """A resumed run may have another error than the one whose value it kept."""
    w, more = torch.nn.Parameter(torch.tensor([-1.2, 1.0])), 0.0
    optimizer = mdn.BFGS([w], lambda: (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2 + more)
    for _ in range(3):
        optimizer.step()
    more = 1e3  # every point lies higher now than the error that is kept
    for _ in range(60):
        optimizer.step()
    assert_close(w.detach(), torch.ones(2), rtol=0, atol=1e-5)


def test_bad_input(refused, tmp_path, table):
    good = table.read_text()
    lines = good.splitlines()
    files = {
        "empty.csv": "",
        "short.csv": "\n".join(lines[:9]),
        "twice.csv": good.replace("u, v ,", "v,v,"),
        "ragged.csv": good.replace(lines[7], "1,2,3"),
        "text.csv": good.replace(lines[7], "1,2,three,4"),
        "long.csv": good.replace(lines[7], "1,2,3,4,5"),
        "nan.csv": good.replace(lines[7], "1,2,nan,4"),
        "constant.csv": "u,a\n" + "\n".join(f"{i},0.1" for i in range(60)),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "binary.csv").write_bytes(bytes(range(128, 256)))
    cases = [
        (table, "a,c", "no column c: it has u, v, a, b"),
        (table, "a,a", "name a column twice"),
        (table, "u,v,a,b", "no column besides the targets"),
        (table, "", "--targets must name"),
        ("nowhere.csv", "a", "cannot read nowhere.csv"),
        ("empty.csv", "a", "no column a"),
        ("short.csv", "a", "8 cases: at least 20"),
        ("twice.csv", "a", "columns without a name of their own"),
        ("ragged.csv", "a", "line 8: no number: 'b'"),
        ("text.csv", "a", "line 8: no number: could not convert string to float: 'three'"),
        ("long.csv", "a", "line 8: not 4 finite numbers"),
        ("nan.csv", "a", "line 8: not 4 finite numbers"),
        ("constant.csv", "a", "'a' is the same in every case"),
        ("binary.csv", "a", "cannot read binary.csv as a .csv in UTF-8"),
        ("inverse", "a", "--targets, --inputs are for a .csv"),
        ("moons", "", "give inverse, robot, or a file"),
    ]
    for dataset, targets, pattern in cases:
        refused(pattern, "mdn", *TINY, "--dataset", dataset, "--targets", targets)
    refused("no column w", "mdn", "--dataset", table, "--targets", "a", "--inputs", "w")
    refused("name a column twice", "mdn", "--dataset", table, "--targets", "a", "--inputs", "a")
    refused("no images", "mdn", *TINY, "--flip")
    refused("a number in", "mdn", "--weight-decay", "-1")
    refused("above 0", "mdn", "--sigma-min", "0")
    assert not Path("runs").exists()
