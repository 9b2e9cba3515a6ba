"""Every script as its operator finds it: killed, interrupted, on a full disk, in two processes.

The runs are processes of their own, forked from a server that has imported torch once, and most
begin as soon as the tests are collected, beside the other tests: see conftest.py.
"""

import importlib
import io
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys

import pytest
import torch
from conftest import little_data
from test_cli import ROOT, SCRIPTS, tiny
from torch.testing import assert_close

import common
import flow_matching

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["torch._dynamo", "torchvision"])  # what is slow to import
SMALL = ["--steps", "6", "--checkpoint-every", "2", "--out", "run"]
PATIENCE = 120  # seconds; a run takes one or two


def child(script, arguments, folder, fault, environment):
    """Run the script in the folder, up to the fault (what, at which call) or training's end."""
    os.chdir(folder)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on a GPU sums have no fixed order; NCCL wants two
    if (folder / "common.py").exists():  # copies, which find nothing but each other
        sys.path[:] = [str(folder)] + [path for path in sys.path if not path.startswith(str(ROOT))]
        for name in [*SCRIPTS, "common"]:
            sys.modules.pop(name, None)
    common = importlib.import_module("common")
    module = importlib.import_module(script)
    os.environ |= environment
    log = os.open(f"log-{os.environ.get('RANK', 0)}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    what, number = fault or (None, 0)

    def at(owner, name, action):
        """Call the action instead of the number-th call of owner.name."""
        original, calls = getattr(owner, name), 0

        def wrapped(*arguments, **options):
            nonlocal calls
            calls += 1
            return (action if calls == number else original)(*arguments, **options)

        setattr(owner, name, wrapped)
        return original

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def die_writing(state, file):
        buffer = io.BytesIO()
        save(state, buffer)
        file.write(buffer.getvalue()[: buffer.tell() // 2])
        file.flush()
        die()

    def fill_the_disk(state, file):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        try:
            save(state, file)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

    def interrupt(run, loss):
        os.kill(os.getpid(), signal.SIGINT)
        return step(run, loss)

    step, save = common.Run.step, torch.save
    if what == "killed at a step":
        at(common.Run, "step", die)
    elif what == "killed while it writes":
        at(torch, "save", die_writing)
    elif what == "killed before it renames":
        at(os, "replace", die)
    elif what == "interrupted":
        at(common.Run, "step", interrupt)
    elif what == "full":
        at(torch, "save", fill_the_disk)

    def finish(run):
        if "RANK" in os.environ:
            torch.save(run.net.state_dict(), f"rank-{common.rank()}.pt")
        raise SystemExit(0)

    if what != "evaluated":
        common.Run.finish = finish
    for name, value in little_data(common).items():
        setattr(common, name, value)
    common.energy_distance = lambda x, y: 0.0  # a round's figures are not what is tested here
    sys.argv = [f"{script}.py", *arguments]
    print(f"running {module.__file__} and {common.__file__}")
    common.cli(module.main, module.Config, module.PRESETS)


def start(script, arguments, folder, fault=None, **environment):
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    process = FORK.Process(target=child, args=(script, arguments, folder, fault, environment))
    process.start()
    return process


def end(process):
    """Its exit code."""
    process.join(PATIENCE)
    return process.exitcode


def train(script, arguments, folder, fault=None):
    """The exit code of a run, and what it printed."""
    code = end(start(script, arguments, folder, fault))
    return code, (folder / "log-0").read_text()


def train_together(script, arguments, folder, faults=(None, None)):
    """The exit codes of two processes that train one model, and what they printed."""
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [
        start(script, arguments, folder, fault, RANK=str(n), LOCAL_RANK=str(n), **together)
        for n, fault in enumerate(faults)
    ]
    codes = [end(process) for process in processes]
    return codes, [file.read_text() for file in sorted(folder.glob("log-*"))]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def checkpoints(folder):
    files = sorted((folder / "run").glob("checkpoint*.pt"))
    return {file.name: torch.load(file, weights_only=True) for file in files}


def assert_same(a, b, where):
    """The same nested dicts and lists, bit for bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where} {key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where} {i}")
    else:
        assert a == b, where


@pytest.mark.beside
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_and_common_alone_run(script, tmp_path):
    for name in (script, "common"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    code, log = train(script, tiny(script), tmp_path, ("evaluated", 0))
    assert code == 0, log
    assert f"running {tmp_path / script}.py and {tmp_path / 'common'}.py" in log
    assert list(tmp_path.glob("runs/*/samples.png"))


@pytest.mark.beside
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_and_resumed_ends_bit_for_bit(script, tmp_path):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    for folder in (whole, pieces):
        folder.mkdir()
    arguments = [*tiny(script), *SMALL]
    undisturbed = start(script, arguments, whole)  # beside the others, on the second core
    rng = random.Random(script)
    faults = [
        ("killed while it writes", 2),
        ("killed at a step", rng.randint(1, 4)),
        ("killed before it renames", rng.randint(1, 2)),
    ]
    for fault in faults:
        code, log = train(script, arguments, pieces, fault)
        assert code == -signal.SIGKILL, (fault, log)
        assert checkpoints(pieces), fault  # whole ones: they load
        with open(pieces / "run" / "metrics.jsonl", "a") as file:
            file.write('{"step": 1')  # it may die in the middle of a line, too
        arguments = ["--resume", "--out", "run"]
    code, log = train(script, arguments, pieces)
    assert code == 0, log
    assert end(undisturbed) == 0, (whole / "log-0").read_text()
    expected, found = checkpoints(whole), checkpoints(pieces)
    assert expected.keys() == found.keys()
    for name in expected:
        for key in ("step", "model", "ema", "optimizer", "rng"):
            assert_same(expected[name][key], found[name][key], f"{script} {name} {key}")


@pytest.mark.beside
@pytest.mark.parametrize("script", SCRIPTS)
def test_interrupted_and_on_a_full_disk(script, tmp_path):
    arguments = [*tiny(script), *SMALL]
    code, log = train(script, arguments, tmp_path, ("interrupted", 3))
    assert code == 130, log
    assert re.search(r"stopped at step \d; --resume --out run goes on", log), log
    before = {file: file.read_bytes() for file in (tmp_path / "run").glob("checkpoint*.pt")}
    code, log = train(script, ["--resume", "--out", "run"], tmp_path, ("full", 1))
    assert code == 2, log
    assert re.search(r"cannot write run/checkpoint[\w-]*\.pt, the one before is kept", log), log
    assert before == {file: file.read_bytes() for file in (tmp_path / "run").glob("checkpoint*.*")}


@pytest.mark.beside
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_hold_the_same_weights(script, tmp_path):
    codes, logs = train_together(script, [*tiny(script), "--out", "run"], tmp_path)
    assert codes == [0, 0], logs
    weights = [torch.load(tmp_path / f"rank-{n}.pt", weights_only=True) for n in range(2)]
    assert_same(*weights, script)


@pytest.mark.beside
def test_two_processes_stop_together_and_resume_bit_for_bit(tmp_path):
    """The signal reaches one alone; both save at the next tenth step."""
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    for folder in (whole, pieces):
        folder.mkdir()
    arguments = [*tiny("flow_matching"), "--steps", "14", "--out", "run"]
    codes, logs = train_together("flow_matching", arguments, pieces, (None, ("interrupted", 3)))
    assert codes == [130, 130], logs
    assert "stopped at step 10" in logs[0]
    codes, logs = train_together("flow_matching", ["--resume", "--out", "run"], pieces)
    assert codes == [0, 0], logs
    codes, logs = train_together("flow_matching", arguments, whole)
    assert codes == [0, 0], logs
    expected, found = (checkpoints(folder)["checkpoint.pt"] for folder in (whole, pieces))
    assert len(expected["rng"]) == 2
    for key in ("step", "model", "ema", "optimizer", "rng"):
        assert_same(expected[key], found[key], key)


def gradient_of_one_of_two(index, out, port):
    os.environ |= {
        "CUDA_VISIBLE_DEVICES": "",
        "RANK": str(index),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    torch.set_num_threads(1)
    cfg = flow_matching.Config(out=out, batch_size=8)
    device = common.setup(cfg)
    streams, x, y = torch.randn(3), torch.randn(64, 2), torch.zeros(64)
    data = common.Data("line", x, y, x, y)
    torch.manual_seed(5 + index)  # DistributedDataParallel must make the weights equal itself
    run = common.Run(cfg, common.MLP(2, width=16), device)
    x, t, target = joint_batch()
    half = slice(4 * index, 4 * index + 4)
    (run.model(x[half], t[half]) - target[half]).square().mean().backward()
    grads = [p.grad for p in run.net.parameters()]
    batch = len(next(iter(run.batches(data)))[0])
    torch.manual_seed(0)
    common.Run(cfg, common.MLP(2, width=16), device, stage="later")
    saved = {"grads": grads, "state": run.net.state_dict(), "batch": torch.tensor(batch)}
    torch.save(saved | {"streams": streams, "later": torch.randn(3)}, f"{out}/{index}.pt")
    run.finish()


def joint_batch():
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(8, 2, generator=g), torch.rand(8, generator=g)
    return x, t, torch.randn(8, 2, generator=g)


def test_two_processes_give_the_gradient_of_one(tmp_path):
    port = free_port()
    arguments = [(n, str(tmp_path), port) for n in (0, 1)]
    processes = [FORK.Process(target=gradient_of_one_of_two, args=a) for a in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
    first, second = (torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in (0, 1))
    net = common.MLP(2, width=16)
    net.load_state_dict(first["state"])
    x, t, target = joint_batch()
    (net(x, t) - target).square().mean().backward()
    for p, a, b in zip(net.parameters(), first["grads"], second["grads"], strict=True):
        assert torch.equal(a, b)
        assert_close(a, p.grad, rtol=1e-5, atol=1e-7)
    for streams in ("streams", "later"):  # each its own noise, in later stages too
        assert not torch.equal(first[streams], second[streams])
    assert first["batch"] == second["batch"] == 4  # of 8 over both
