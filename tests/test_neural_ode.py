"""Chen et al. 2018: the adjoint against closed forms, and what is built upon it."""

import functools
import math
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import common
import neural_ode as no
from neural_ode import odeint_adjoint

# Small enough for a test, whole enough to pass through every part.
TINY = ["--steps", "2", "--batch-size", "4", "--units", "3", "--tol", "0.1"]
TIGHT = {"rtol": 1e-10, "atol": 1e-10}
EXACT = functools.partial(no.ode_solve, **TIGHT)


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Pair(nn.Module):
    """A field on a tuple, of z, of t and of parameters, with every part of it coupled."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 1)

    def forward(self, state, t):
        x, y = state  # (B, 3) and (B,)
        dx = torch.tanh(self.a(torch.cat([x, t[:, None]], dim=1))) - 0.3 * y[:, None] * x
        return dx, self.b(x)[:, 0] * torch.cos(2 * t) - y


def start():
    return torch.randn(5, 3, requires_grad=True), torch.randn(5, requires_grad=True)


# ---- The adjoint: Eq. 4, Eq. 5, Alg. 1, Alg. 2 --------------------------------------------------


@pytest.mark.parametrize("times", [[0.2, 0.5, 0.6, 1.3], [1.3, 0.6, 0.2]], ids=["up", "down"])
def test_gradients_of_a_linear_system_are_the_matrix_exponentials(times):
    """z' = cos(t) A z has z(t) = expm(A (sin t - sin t_0)) z_0: every gradient in closed form,
    of a loss that sees every observation, the first one included."""
    A, z_0 = torch.randn(3, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    t = torch.tensor(times, requires_grad=True)
    weight = torch.randn(len(times), 4, 3)

    def exact():
        flows = torch.linalg.matrix_exp(A * (t.sin() - t[0].sin())[:, None, None])  # (T, 3, 3)
        return flows @ z_0.T

    def f(z, t):
        return t.cos()[:, None] * (z @ A.T)

    z, nfe = odeint_adjoint(f, z_0, t, (A,), **TIGHT)
    assert_close(z.mT, exact(), rtol=1e-8, atol=1e-8)
    assert nfe > 0
    expected = torch.autograd.grad((weight.mT * exact().sin()).sum(), (A, z_0, t))
    gradients = torch.autograd.grad((weight * z.sin()).sum(), (A, z_0, t))
    for ours, theirs in zip(gradients, expected, strict=True):
        assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


def test_start_and_end_times_of_two_numbers():
    """Alg. 2's two: dL/dt_1 = a(t_1) f(z_1), dL/dt_0 = -a(t_0) f(z_0), for a decaying z."""
    t = torch.tensor([0.5, 2.0], requires_grad=True)
    z, _ = odeint_adjoint(lambda z, t: -z, torch.tensor([[3.0]]), t, (), **TIGHT)
    z_1 = 3 * math.exp(-1.5)
    (dL_dt,) = torch.autograd.grad(z[1].sum(), t)
    assert_close(dL_dt, torch.tensor([z_1, -z_1]), rtol=1e-8, atol=0)


def test_error_falls_with_the_fourth_power_of_the_step():
    A, z_0 = torch.randn(3, 3, requires_grad=True), torch.randn(4, 3)
    flow = torch.linalg.matrix_exp(A)
    (expected,) = torch.autograd.grad((z_0 @ flow.T).square().sum(), A)
    errors = []
    for steps in (10, 20, 40):
        z, _ = odeint_adjoint(
            lambda z, t: z @ A.T, z_0, (0.0, 1.0), (A,), method="rk4", steps=steps
        )
        (gradient,) = torch.autograd.grad(z.square().sum(), A)
        errors.append((gradient - expected).norm())
    assert 13 < errors[0] / errors[1] < 19  # 2⁴ = 16, up to higher orders
    assert 14.5 < errors[1] / errors[2] < 17.5


@pytest.mark.parametrize("solver", [TIGHT, {"method": "rk4", "steps": 60}], ids=["dopri5", "rk4"])
def test_gradients_equal_backpropagation_through_the_solver(solver):
    f, z, t = Pair(), start(), torch.tensor([0.0, 0.4, 1.0])
    inputs = (*z, *f.parameters())

    def gradients(solution):
        loss = sum((k + 1) * x.sin().sum() for k, x in enumerate(solution))
        return torch.autograd.grad(loss, inputs)

    ours = gradients(odeint_adjoint(f, z, t, **solver)[0])
    theirs = gradients(common.odeint(f, z, t, **solver)[0])
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, rtol=1e-7, atol=1e-7)  # each to the solver's error, not bit for bit


def test_gradcheck():
    f, z, t = Pair(), start(), torch.tensor([0.0, 0.3, 0.7], requires_grad=True)
    z = tuple(x[:1].detach().requires_grad_() for x in z)

    def solve(x, y, t, *theta):
        return odeint_adjoint(f, (x, y), t, theta, method="rk4", steps=6)[0]

    theta = (f.a.bias, f.b.weight)
    assert torch.autograd.gradcheck(solve, (*z, t, *theta), atol=1e-6, rtol=1e-5)


def saved_bytes(solve, steps):
    """Bytes that autograd keeps for the backward pass, counted by its hooks."""
    kept = []

    def pack(x):
        kept.append(x.nbytes)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        solve(Pair(), start(), (0.0, 1.0), method="rk4", steps=steps)
    return sum(kept)


def test_memory_does_not_grow_with_the_steps():
    assert saved_bytes(odeint_adjoint, 1000) == saved_bytes(odeint_adjoint, 10) > 0
    assert saved_bytes(common.odeint, 100) > 5 * saved_bytes(common.odeint, 10)


def test_evaluations_are_counted():
    calls = []

    class Counted(Pair):
        def forward(self, state, t):
            calls.append(t)
            return super().forward(state, t)

    backward = []
    z, forward = odeint_adjoint(Counted(), start(), torch.linspace(0, 1, 4), backward=backward)
    assert len(calls) == forward
    z[0].sum().backward()
    assert backward == [len(calls) - forward]


def test_what_depends_on_nothing_has_no_gradient():
    f, (x, y) = Pair(), start()
    f.a.weight.requires_grad_(False)
    z, _ = odeint_adjoint(f, (x, y), (0.0, 1.0))
    z[0].sum().backward()
    assert f.a.weight.grad is None
    assert f.b.weight.grad.abs().sum() > 0
    z, _ = odeint_adjoint(lambda z, t: torch.ones_like(z), x, (0.0, 2.0), ())
    assert_close(z, x + 2)
    assert_close(torch.autograd.grad(z.sum(), x)[0], torch.ones(5, 3))
    with torch.no_grad():
        assert not odeint_adjoint(f, (x, y), (0.0, 1.0))[0][0].requires_grad


def test_hidden_parameters_and_second_derivatives_are_refused():
    x = torch.randn(5, 3, requires_grad=True)
    with pytest.raises(ValueError, match="give its params"):
        odeint_adjoint(lambda z, t: z, x, (0.0, 1.0))
    z, _ = odeint_adjoint(lambda z, t: z.sin(), x, (0.0, 1.0), ())
    (gradient,) = torch.autograd.grad(z.sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_backward_pass_runs_under_the_forward_passes_autocast():
    torch.set_default_dtype(torch.float32)
    seen, layer = [], nn.Linear(3, 3)

    def f(z, t):
        v = layer(z)
        seen.append(v.dtype)
        return v

    x = torch.randn(5, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        z, nfe = odeint_adjoint(f, x, (0.0, 1.0), layer.parameters(), method="rk4", steps=2)
    z.sum().backward()
    assert seen == [torch.bfloat16] * (2 * nfe)
    assert z.dtype == x.grad.dtype == layer.weight.grad.dtype == torch.float32
    assert_close(x.grad, backprop_grad(layer, x), rtol=0.05, atol=0.05)  # bfloat16: three digits


def backprop_grad(layer, x):
    z, _ = common.odeint(lambda z, t: layer(z), x, (0.0, 1.0), method="rk4", steps=2)
    return torch.autograd.grad(z.sum(), x)[0]


# ---- Continuous normalising flows: Eq. 8, Eq. 9, Eq. 10 -----------------------------------------


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.A = nn.Parameter(torch.tensor([[0.3, -0.8], [0.5, 0.2]]))

    def forward(self, z, t):
        return z @ self.A.T


def test_linear_flow_has_the_exact_log_determinant_and_density():
    flow, x = no.CNF(Linear(), solve=EXACT), torch.randn(6, 2)
    E = torch.linalg.matrix_exp(flow.field.A.detach())
    z, change, _ = flow.flow(x, (0.0, 1.0))
    assert_close(z, x @ E.T, rtol=1e-8, atol=1e-8)
    assert_close(change, torch.full((6,), -0.5), rtol=1e-9, atol=0)  # -tr(A)
    normal = torch.distributions.MultivariateNormal(torch.zeros(2), E @ E.T)
    assert_close(flow.log_prob(x)[0], normal.log_prob(x), rtol=1e-8, atol=1e-8)
    assert_close(flow(x), -normal.log_prob(x), rtol=1e-8, atol=1e-8)
    half = torch.linalg.matrix_exp(flow.field.A.detach() / 2)
    normal = torch.distributions.MultivariateNormal(torch.zeros(2), half @ half.T)
    assert_close(flow.log_prob(x, t=0.5)[0], normal.log_prob(x), rtol=1e-8, atol=1e-8)


def test_planar_field_and_trace_are_their_sum_over_units():
    field, z, t = no.PlanarField(3, 5), torch.randn(4, 3), torch.full((4,), 0.3)
    v, trace = field.with_trace(z, t)
    assert_close((v, trace), common.divergence(field, z, t))
    assert_close(field(z, t), v)
    u, w, b, gate = field.hyper(t[:1, None]).view(5, 8).split([3, 3, 1, 1], dim=1)
    by_hand = [gate[n].sigmoid() * u[n] * torch.tanh(z @ w[n] + b[n])[:, None] for n in range(5)]
    assert_close(v, sum(by_hand))
    assert (v - field(z, t + 0.5)).abs().max() > 1e-3  # the weights move with time


@pytest.mark.parametrize("kind", [no.PlanarField, no.FreeField])
def test_density_integrates_to_one_and_runs_both_ways(kind):
    field = kind(2, 8)
    with torch.no_grad():
        for p in field.parameters():
            p.mul_(2)  # far from the identity
        flow = no.CNF(field, solve=functools.partial(no.ode_solve, rtol=1e-7, atol=1e-7))
        axis = torch.linspace(-12, 12, 161)
        log_p, _ = flow.log_prob(torch.cartesian_prod(axis, axis))
        mass = log_p.exp().sum() * 0.15**2
        assert_close(mass.item(), 1.0, rtol=0, atol=2e-4)  # grid of 0.15 against widths near 1
        assert (log_p - common.standard_normal_log_prob(torch.cartesian_prod(axis, axis))).std() > 1
        z_0 = torch.randn(20, 2)
        x, log_q, _ = flow.sample(z_0)
        assert_close(flow.log_prob(x)[0], log_q, rtol=1e-5, atol=1e-5)
        assert_close(flow.flow(x, (1.0, 0.0))[0], z_0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_hutchinsons_trace_is_unbiased_with_one_probe_a_solve(monkeypatch, kind):
    """The path does not feel the probe, so the mean over probes with E[z zᵀ] = I is exact: over
    the signs (1, ±1) or, standing for a Gaussian, over sqrt(2) times the unit vectors."""
    field, x = no.FreeField(2, 8), torch.randn(5, 2)
    exact, _ = no.CNF(field, solve=EXACT).log_prob(x)
    root = math.sqrt(2)
    probes = {"rademacher": [[1.0, 1.0], [1.0, -1.0]], "gaussian": [[root, 0], [0, root]]}[kind]
    drawn, estimates = [], []
    for probe in probes:

        def draw(z, asked, probe=probe):
            drawn.append(asked)
            return torch.tensor(probe).expand_as(z)

        monkeypatch.setattr(common, "hutchinson_probe", draw)
        estimates.append(no.CNF(field, kind, EXACT).log_prob(x)[0])
    assert drawn == [kind, kind]  # once a solve, however many evaluations
    assert_close(sum(estimates) / 2, exact, rtol=1e-8, atol=1e-8)
    assert (estimates[0] - exact).abs().max() > 1e-3


def test_likelihood_and_matching_gradients_by_the_adjoint_equal_backpropagation():
    backprop = functools.partial(no.ode_solve, gradient="backprop", **TIGHT)
    for field in (no.PlanarField(2, 4), no.FreeField(2, 4)):
        for energy in (None, no.u1):
            gradients = []
            for solve in (EXACT, backprop):
                z = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
                loss = no.CNF(field, solve=solve)(z, energy).mean()
                gradients.append(torch.autograd.grad(loss, [*field.parameters()]))
            assert_close(*gradients, rtol=1e-6, atol=1e-8)


def test_energies():
    axis = (torch.arange(1200) + 0.5) / 60 - 10
    grid = torch.cartesian_prod(axis, axis)
    mass = torch.exp(-no.u2(grid)).sum() / 60**2
    assert_close(mass.item(), 2 * math.pi * 0.4 * 2, rtol=1e-5, atol=0)  # of z_1, then z_2 given it
    z = torch.tensor([[2.0, 0.0], [0.0, 2.0], [-1.0, 1.5]])
    r = z.norm(dim=1)
    arcs = torch.exp(-(((z[:, 0] - 2) / 0.6) ** 2) / 2) + torch.exp(
        -(((z[:, 0] + 2) / 0.6) ** 2) / 2
    )
    assert_close(torch.exp(-no.u1(z)), torch.exp(-(((r - 2) / 0.4) ** 2) / 2) * arcs)


def test_the_matching_loss_is_log_q_plus_energy():
    field = no.PlanarField(2, 4)
    nn.init.zeros_(field.hyper[-1].weight)
    nn.init.zeros_(field.hyper[-1].bias)  # u = 0: the identity
    z = torch.randn(7, 2)
    expected = common.standard_normal_log_prob(z) + no.u1(z)
    assert_close(no.CNF(field, solve=EXACT)(z, no.u1), expected)


def test_a_short_training_learns_the_eight_gaussians():
    torch.set_default_dtype(torch.float32)
    x, _ = common.DENSITIES["eight_gaussians"](2_000, torch.Generator().manual_seed(0))
    flow = no.CNF(
        no.PlanarField(2, 32), solve=functools.partial(no.ode_solve, rtol=0.02, atol=0.02)
    )
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-2)
    with torch.no_grad():
        before = flow(x).mean().item()
    for step in range(50):
        optimizer.zero_grad()
        flow(x[torch.arange(128) + 30 * step]).mean().backward()
        optimizer.step()
    with torch.no_grad():
        assert before > 3.3  # the prior's own is about 3.9, the entropy 1.12
        assert flow(x).mean().item() < 2.3


# ---- ODE-Net: Eq. 1, Eq. 2 ----------------------------------------------------------------------


def test_the_residual_twin_with_tied_blocks_is_eulers_method():
    """Eq. 1 is a step of length 1: the six blocks are the field's Euler steps over [0, 6]."""
    net = no.Classifier((1, 8, 8), 3, 8, blocks=6)
    f = net.body[0]
    for block in net.body:
        block.load_state_dict(f.state_dict())
    h = torch.randn(4, 8, 2, 2)
    euler, nfe = common.odeint(lambda h, t: f(h, t / 6), h, (0.0, 6.0), method="euler", steps=6)
    ours, blocks = net.features(h)
    assert_close(ours, euler)
    assert blocks == nfe == 6


def test_classifier_gradients_by_the_adjoint():
    net, x, y = no.Classifier((1, 8, 8), 3, 8), torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    gradients, counts = [], []
    for gradient in ("adjoint", "backprop"):
        net.solve = functools.partial(no.ode_solve, gradient=gradient, rtol=1e-5, atol=1e-5)
        _, forward, backward = no.one_pass(net, x, y)
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        counts.append((forward, backward))
        net.zero_grad()
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert error < 0.05  # the kinks of ReLU keep a Runge-Kutta method from its order
    assert counts[0][0] == counts[1][0] == counts[1][1]  # backpropagation: once each
    assert counts[0][1] != counts[0][0]


def test_a_short_training_tells_digits_apart():
    torch.set_default_dtype(torch.float32)
    x, y = common.glyphs(1_000, seed=0)
    x = F.avg_pool2d(common.to_float(x), 3)  # 9 x 9
    solve = functools.partial(no.ode_solve, rtol=0.1, atol=0.1)
    net = no.Classifier((1, 9, 9), 10, 8, solve=solve)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-2)
    for step in range(40):
        rows = torch.arange(48) + 20 * step
        optimizer.zero_grad()
        F.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        right = (net(x[-100:]).argmax(1) == y[-100:]).float().mean()
    assert right > 0.4  # chance is 0.1


# ---- Latent ODE: Eq. 11, Eq. 12, Eq. 13, App. E -------------------------------------------------


def test_elbo_of_a_linear_system_at_the_exact_posterior_is_the_evidence():
    """z' = (a, b) z and x_i = C z(t_i) + noise, C diagonal: the posterior is Gaussian and diagonal,
    and log p(x, z) - log q(z) is log p(x), whatever the sample; at another q it is less."""
    rate, scale, sigma = torch.tensor([-0.4, 0.3]), torch.tensor([1.5, -0.7]), 0.3
    times = torch.linspace(0, 2, 9)
    index = torch.rand(6, 9).argsort(1)[:, :5].sort(1)[0]
    x = torch.randn(6, 5, 2)
    H = scale * torch.exp(times[index][..., None] * rate)  # (B, n, 2): x_i = H_i z_0 + noise
    precision = 1 + H.square().sum(1) / sigma**2
    mean = (H * x).sum(1) / sigma**2 / precision
    q = (mean, -precision.log() / 2)
    evidence = 0
    for d in range(2):
        covariance = H[..., d, None] * H[:, None, :, d] + sigma**2 * torch.eye(5)
        normal = torch.distributions.MultivariateNormal(torch.zeros(5), covariance)
        evidence = evidence + normal.log_prob(x[..., d])

    def states(z_0, times):
        return EXACT(lambda z, t: rate * z, z_0, times, ())[0]

    bound = no.elbo(x, index, times, q, states, lambda z: scale * z, sigma)
    assert_close(bound, evidence, rtol=1e-6, atol=1e-6)
    wide = (mean + 0.1, q[1] + 0.3)
    gaps = [no.elbo(x, index, times, wide, states, lambda z: scale * z, sigma) for _ in range(50)]
    kl = torch.stack(gaps).mean(0) - evidence
    inverse = precision / 2 * (torch.exp(2 * wide[1]) + 0.1**2) - 0.5
    assert_close(kl, -(inverse - 0.3).sum(1), rtol=0, atol=0.7)  # four standard errors


def test_the_recognition_network_reads_backwards_and_sees_the_gaps():
    net, data = no.LatentODE(), no.Spirals(4, 7, 0, "cpu")
    x, index = data.x.double(), data.index
    net.double()
    t = net.times[index]
    h = torch.zeros(4, 25)
    for i in reversed(range(7)):
        before = t[:, i - 1] if i else torch.zeros(4)  # at last, t_0
        inputs = torch.cat([x[:, i], (t[:, i] - before)[:, None]], dim=1)
        hidden = F.linear(h, net.rnn.weight_hh_l0, net.rnn.bias_hh_l0)
        h = torch.tanh(F.linear(inputs, net.rnn.weight_ih_l0, net.rnn.bias_ih_l0) + hidden)
    assert_close(torch.cat(net.recognise(x, index), dim=1), net.posterior(h))


def test_predictions_continue_the_latent_curve_on_both_sides():
    net, data = no.LatentODE(solve=EXACT).double(), no.Spirals(3, 5, 0, "cpu")
    x = data.x.double()
    curve = net.predict(x, data.index)
    z_0, _ = net.recognise(x, data.index)
    assert curve.shape == (3, 300, 2)
    assert_close(curve[:, 100], net.decode(z_0))
    step = net.times[1]
    for i, end in ((40, -60 * step), (299, 199 * step)):
        z, _ = common.odeint(lambda z, t: net.f(z), z_0, (0.0, end.item()), **TIGHT)
        assert_close(curve[:, i], net.decode(z), rtol=1e-6, atol=1e-6)


def test_the_rnn_predicts_from_its_own_predictions():
    net, data = no.TimeGapRNN().double(), no.Spirals(3, 6, 0, "cpu")
    x, index = data.x.double(), data.index
    points = net.predict(x, index)
    assert points.shape == (3, 100, 2)
    seen = torch.cat([x, points[:, :1]], dim=1)  # as if the first prediction were observed
    places = torch.cat([index, torch.full((3, 1), 100)], dim=1)
    gaps = net.times[places].diff(dim=1, append=net.times[101].expand(3, 1))
    h, _ = net.rnn(torch.cat([seen, gaps[..., None]], dim=2))
    assert_close(points[:, :2], net.mean(h[:, -2:]))
    log_p = torch.distributions.Normal(net.mean(h[:, :5]), no.SIGMA).log_prob(x[:, 1:]).sum((1, 2))
    assert_close(net(x, index), log_p)


def test_spirals():
    data = no.Spirals(400, 30, 0, "cpu")
    assert data.index.diff(dim=1).min() >= 1  # sorted, without replacement
    assert 0 <= data.index.min() < data.index.max() == 99
    clean = data.curve[torch.arange(400)[:, None], 100 + data.index]
    assert_close((data.x - clean).std().item(), 0.3, rtol=0.02, atol=0)  # four standard errors
    centre = torch.tensor([[5.0, 0.0], [-5.0, 0.0]])[torch.arange(400) % 2]
    arm = data.curve - centre[:, None]
    turn = arm[:, :-1, 0] * arm[:, 1:, 1] - arm[:, :-1, 1] * arm[:, 1:, 0]
    assert (turn[::2] > 0).all()  # counter-clockwise
    assert (turn[1::2] < 0).all()
    x, index = data.batch(7)
    assert x.shape == (7, 30, 2)
    assert index.shape == (7, 30)


# ---- Poisson process: Sec. 5 --------------------------------------------------------------------


def test_poisson_likelihood_of_a_constant_and_of_a_decaying_rate():
    events = torch.tensor([0.5, 2.0, 2.5, 0.1, 4.0], requires_grad=True)
    z_0 = torch.tensor([2.0])
    solve = functools.partial(EXACT, params=())

    def rate(z):
        return z[:, 0]

    constant = no.poisson_log_likelihood(torch.zeros_like, rate, z_0, events, 2, 5.0, solve)
    assert_close(constant.item(), 5 * math.log(2) - 2 * 2 * 5.0)
    log_p = no.poisson_log_likelihood(lambda z: -0.3 * z, rate, z_0, events, 2, 5.0, solve)
    integral = 2 / 0.3 * (1 - math.exp(-1.5))
    expected = 5 * math.log(2) - 0.3 * events.sum().item() - 2 * integral
    assert_close(log_p.item(), expected, rtol=1e-8, atol=0)


def test_event_process_has_gradients_of_all_its_parameters():
    events = torch.tensor([0.5, 2.0, 7.0])
    gradients = []
    for gradient in ("adjoint", "backprop"):
        torch.manual_seed(0)
        net = no.EventProcess(solve=functools.partial(no.ode_solve, gradient=gradient, **TIGHT))
        net(events, 1).backward()
        gradients.append([p.grad for p in net.parameters()])
    assert_close(*gradients, rtol=1e-6, atol=1e-7)


def test_events_follow_their_rate():
    torch.set_default_dtype(torch.float32)
    t = torch.cat(no.Events(2_000, 0, "cpu").sequences)
    grid = torch.linspace(0, no.END, 10_001)
    assert no.true_rate(grid).max() < 7  # or thinning would cut it
    edges = torch.tensor([0.0, 2.0, 4.0, 7.0, 8.0, 10.0])
    for low, high in zip(edges, edges[1:], strict=False):
        inside = grid[(grid >= low) & (grid <= high)]
        expected = 2_000 * torch.trapezoid(no.true_rate(inside), inside)
        count = ((t >= low) & (t < high)).sum()
        assert abs(count - expected) < 4 * expected.sqrt()  # four standard deviations


# ---- Devices and compilation --------------------------------------------------------------------


def test_everything_keeps_to_its_device():
    torch.set_default_dtype(torch.float32)
    solve = functools.partial(no.ode_solve, method="euler", steps=1)
    z = torch.empty(4, 2, device="meta")
    cases = [(no.PlanarField(), "exact", None), (no.FreeField(), "exact", no.u1)]
    cases += [(no.FreeField(), "rademacher", no.u2), (no.PlanarField(), "gaussian", None)]
    for field, trace, energy in cases:
        loss = no.CNF(field, trace, solve).to("meta")(z, energy).mean()
        loss.backward()
        assert loss.is_meta
    images = torch.empty(2, 1, 8, 8, device="meta")
    for blocks in (0, 2):
        assert no.Classifier((1, 8, 8), 3, 8, blocks, solve).to("meta")(images).is_meta
    x = torch.empty(4, 5, 2, device="meta")
    index = torch.empty(4, 5, device="meta", dtype=torch.long)
    q = (torch.empty(4, 3, device="meta"), torch.empty(4, 3, device="meta"))
    field, decode = no.mlp(3, 3).to("meta"), no.mlp(3, 2).to("meta")

    def states(z_0, times):
        return solve(lambda z, t: field(z), z_0, times, field.parameters())[0]

    assert no.elbo(x, index, torch.linspace(0, 1, 6), q, states, decode).is_meta
    assert no.TimeGapRNN().to("meta")(x, index).is_meta
    events = torch.empty(6, device="meta")
    assert no.EventProcess(solve=solve).to("meta")(events, 2).is_meta


def test_fields_compile_without_a_graph_break():
    torch.set_default_dtype(torch.float32)
    t = torch.rand(1).expand(4)
    for net, x in (
        (no.PlanarField(), torch.randn(4, 2)),
        (no.FreeField(), torch.randn(4, 2)),
        (no.Layer(8), torch.randn(4, 8, 7, 7)),
    ):
        compiled = torch.compile(net, fullgraph=True, backend="eager")
        assert_close(compiled(x, t), net(x, t))


# ---- The command line ---------------------------------------------------------------------------


@pytest.fixture
def single():
    torch.set_default_dtype(torch.float32)


SMALL = ["--steps", "2", "--batch-size", "4", "--tol", "0.1", "--channels", "4"]


def test_classify_trains_resumes_and_evaluates_a_folder(single, call, refused, pictures, tmp_path):
    refused("of classes", "neural_ode", "--experiment", "classify", "--dataset", pictures(), *SMALL)
    for name in ("cats", "dogs"):
        (tmp_path / "animals").mkdir(exist_ok=True)
        pictures(f"animals/{name}", n=15)
    arguments = ["--experiment", "classify", "--dataset", "animals", *SMALL]
    code, out, err = call("neural_ode", *arguments, "--out", "run")
    assert code == 0, err
    assert "network ODE-Net" in out
    assert "network ResNet" in out
    files = {"checkpoint.pt", "checkpoint-resnet.pt", "samples.png"}
    assert files <= {path.name for path in Path("run").iterdir()}
    resumed = ["--resume", "--out", "run", "--steps", "3", "--gradient", "backprop"]
    assert call("neural_ode", *resumed)[0] == 0
    assert torch.load("run/checkpoint-resnet.pt", weights_only=True)["step"] == 3
    assert call("neural_ode", "--sample", "run/checkpoint.pt")[0] == 0


@pytest.mark.parametrize("experiment", ["latent", "poisson"])
def test_time_series_train_resume_and_sample(single, call, refused, experiment):
    arguments = ["--experiment", experiment, *SMALL, "--observations", "3,5", "--out", "run"]
    code, out, err = call("neural_ode", *arguments)
    assert code == 0, err
    assert "see run/samples.png" in out
    assert call("neural_ode", "--resume", "--out", "run", "--steps", "3")[0] == 0
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 3
    code, out, err = call("neural_ode", "--sample", "run/checkpoint.pt")
    assert code == 0, err
    assert ("latent ODE" if experiment == "latent" else "gap") in out
    other = ["--sample", "run/checkpoint.pt", "--observations", "5"]
    refused(r"learned with --observations \(3, 5\)", "neural_ode", *other)


def reporting(figures, **attributes):
    """What stands for a run: its averaged network has the attributes; its figures are appended."""
    ema = types.SimpleNamespace(**attributes)
    run = types.SimpleNamespace(ema=ema, folder=Path("."), device="cpu", say=lambda _: None)
    run.report = lambda split, **them: figures.append(them)
    return run


def test_rmse_is_of_the_times_it_names(single, monkeypatch):
    """A prediction off by 1, 2 and 3 in x and y before, in and after the window."""
    figures, made = [], []

    class Known(no.Spirals):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    def predict(first, x, index):
        off = torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(100)[first:, None]
        return made[-1].curve[:, first:] + off

    monkeypatch.setattr(no, "Spirals", Known)
    monkeypatch.setattr(common, "save_panels", lambda *_: None)
    runs = {
        (5, name): reporting(figures, predict=functools.partial(predict, first))
        for name, first in (("latent", 0), ("rnn", 200))
    }
    no.evaluate_latent(types.SimpleNamespace(observations=(5,)), runs, "cpu")
    latent, rnn = figures
    found = latent["rmse_before"], latent["rmse_in_window"], latent["rmse"]
    assert found == pytest.approx((1, 2, 3))
    assert rnn["rmse"] == pytest.approx(3)
    assert "rmse_before" not in rnn


def test_the_true_rate_of_events_has_no_gap(monkeypatch):
    """z(t) = t, so that a network's rate can be the true one."""
    figures = []
    net = no.EventProcess(1)
    with torch.no_grad():
        for p in (net.z_0, *net.f.parameters()):
            p.zero_()
        net.f[-1].bias.fill_(1.0)
    monkeypatch.setattr(net, "rate", lambda z: no.true_rate(z[..., 0]))
    monkeypatch.setattr(common, "save_panels", lambda *_: None)
    run = reporting(figures)
    run.ema = net
    no.evaluate_poisson(run, no.Events(50, 1, "cpu"))
    assert figures[0]["gap"] == pytest.approx(0, abs=1e-3)  # the trapezoids' error is less
    assert abs(figures[0]["log_likelihood"]) > 1


def test_the_likelihood_of_a_flow_is_by_the_exact_trace(single, monkeypatch):
    monkeypatch.setattr(common, "save_panels", lambda *_: None)
    run, flow = reporting([]), no.CNF(no.FreeField(2, 8), trace="rademacher")
    run.ema = flow
    x = torch.randn(50, 2)
    data = common.Data("points", x, torch.zeros(50), x, torch.zeros(50))
    no.evaluate_cnf(run, data, None)
    assert flow.trace == "exact"


def test_errors_are_the_digits_misread(single, monkeypatch):
    """Of ten images of class 0 to 9, three have the wrong label."""
    figures = []
    x, y = torch.zeros(10, 1, 9, 9, dtype=torch.uint8), torch.arange(10)
    data = common.Data("digits", x, y, x, torch.where(y < 3, y + 1, y))
    run = reporting(figures)
    run.ema, run.net = lambda x: 5 * torch.eye(10)[: len(x)], torch.nn.Linear(2, 3)
    run.net.solve = no.ode_solve
    monkeypatch.setattr(no, "one_pass", lambda *_: (torch.zeros(2), 4, 5))
    monkeypatch.setattr(common, "save_panels", lambda *_: None)
    no.evaluate_classify([run, run], data)
    assert [row["test_error_percent"] for row in figures] == [30, 30]
    assert figures[0]["parameters"] == 9


@pytest.mark.parametrize(
    "flags", ["--dataset u1", "--field free --trace rademacher --dataset moons"]
)
def test_flows(single, call, flags):
    code, out, err = call("neural_ode", *TINY, *flags.split(), "--num-samples", "3")
    assert code == 0, err
    assert ("kl" if "u1" in flags else "nll") in out


def test_kl_is_measured_against_the_whole_of_u2(single, monkeypatch):
    """A flow that is u2's density itself: z_1 ~ N(0, 2²), z_2 given it N(sin, 0.4²): KL is 0."""
    figures = {}
    z = torch.randn(20_000, 2) * torch.tensor([2.0, 0.4])
    log_q = common.standard_normal_log_prob(z / torch.tensor([2.0, 0.4])) - math.log(0.8)
    z[:, 1] += torch.sin(math.pi / 2 * z[:, 0])

    class Exact:
        def flow(self, z_0, times):
            change = log_q - common.standard_normal_log_prob(z_0)
            return z.expand(len(times), -1, -1), change.expand(len(times), -1), 0

        def log_prob(self, x, t):
            return common.standard_normal_log_prob(x), 0  # for the picture alone

    run = types.SimpleNamespace(ema=Exact(), device="cpu", folder=Path("."))
    run.report = lambda split, **them: figures.update(them)
    monkeypatch.setattr(common, "save_panels", lambda *_: None)
    no.evaluate_cnf(run, None, no.u2)
    assert figures["kl"] == pytest.approx(0, abs=1e-3)  # each term is 0; the grid's error is less


def test_bad_flags(single, refused, pictures):
    cases = {
        "--experiment guess": "invalid choice",
        "--experiment latent --dataset moons": "makes its own spirals",
        "--experiment poisson --dataset moons": "makes its own events",
        "--experiment latent --num-samples 3": "is for the flow",
        "--experiment classify --dataset moons": "needs images",
        "--observations 1,30": "from 2 to 100",
        "--observations 30,101": "from 2 to 100",
        "--dataset u3": "unknown data set",
        "--dataset u1 --flip": "are for --experiment classify",
        "--experiment latent --image-size 8": "are for --experiment classify",
        "--tol 0": "a number above 0",
        "--units 0": "at least 1",
        "--gradient none": "invalid choice",
        f"--experiment cnf --dataset {pictures()}": "add --experiment classify",
    }
    for arguments, pattern in cases.items():
        refused(pattern, "neural_ode", *arguments.split(), "--steps", "0")
