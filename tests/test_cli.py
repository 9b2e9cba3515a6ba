"""The command line: a newcomer's commands, resuming, sampling, and bad input in one line."""

import functools
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import flow_matching

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "common")


def tiny(script):
    """The flags that make a run of the script as small as can be, from its own tests."""
    return importlib.import_module(f"test_{script}").TINY


FM = tiny("flow_matching")
FM_IMAGES = [*FM, "--mult", "1,1", "--blocks", "1", "--tol", "0.1"]


@pytest.fixture
def run(call):
    """run(arguments) of flow_matching.py."""
    return functools.partial(call, "flow_matching")


def metrics(folder):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


# ---- What a newcomer does -----------------------------------------------------------------------


@pytest.mark.parametrize("path", ["vp", "ve"])  # ot: test_every_script_trains_resumes_and_samples
def test_train_resume_sample(run, path):
    code, out, err = run(*FM, "--path", path, "--num-samples", "6", "--divergence", "rademacher")
    assert code == 0, err
    folder = Path("runs/flow_matching-checkerboard")
    assert f"see {folder}/samples.png" in out
    files = {"config.json", "metrics.jsonl", "checkpoint.pt", "samples.png", "samples.npz"}
    assert files <= {path.name for path in folder.iterdir()}
    samples = np.load(folder / "samples.npz")["arr_0"]
    assert samples.shape == (6, 2)
    assert samples.dtype == np.float32
    assert {"nll", "entropy", "gap"} <= metrics(folder)[-2].keys()

    assert run("--resume", "--steps", "5")[0] == 0
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 5
    assert json.loads((folder / "config.json").read_text())["path"] == path  # remembered
    before = (folder / "checkpoint.pt").read_bytes()
    code, out, _ = run("--sample", folder / "checkpoint.pt", "--solver", "heun", "--nfe", "4")
    assert code == 0
    assert "sampling_evaluations 4\n" in out  # as many as asked for
    assert (folder / "samples" / "samples.png").exists()
    assert (folder / "checkpoint.pt").read_bytes() == before


def test_images_of_a_folder(run, pictures):
    images = pictures()
    arguments = [*FM_IMAGES, "--dataset", images, "--image-size", "16", "--flip"]
    code, _, err = run(*arguments, "--num-samples", "3", "--nll-samples", "2")
    assert code == 0, err
    folder = Path("runs/flow_matching-pictures")
    samples, classes = np.load(folder / "samples.npz").values()
    assert samples.shape == (3, 16, 16, 3)
    assert samples.dtype == np.uint8
    assert classes.shape == (3,)
    assert metrics(folder)[-1]["dequantisations"] == 2
    assert run("--dataset", images, "--resume", "--steps", "3")[0] == 0


def test_super_resolution(run, pictures):
    images = pictures(n=160)
    arguments = [*FM_IMAGES, "--dataset", images, "--image-size", "16", "--upsample", "4"]
    code, out, err = run(*arguments)
    assert code == 0, err
    assert "psnr_bicubic" in out


def test_classes(run, refused):
    """2-D points by class; images are by class unless they are told not to be."""
    code, _, err = run(*FM, "--class-conditional", "--num-samples", "6")
    assert code == 0, err
    saved = Path("runs/flow_matching-checkerboard/checkpoint.pt")
    assert "label.weight" in torch.load(saved, weights_only=True)["model"]
    assert run("--sample", saved, "--nll-examples", "4")[0] == 0
    refused("learned with --class-conditional True", "flow_matching", "--sample", saved,
            "--no-class-conditional")  # fmt: skip
    code, _, err = run(*FM_IMAGES, "--dataset", "glyphs", "--no-class-conditional", "--out", "none")
    assert code == 0, err
    state = torch.load("none/checkpoint.pt", weights_only=True)
    assert "label.weight" not in state["model"]
    del state["config"]["class_conditional"]  # a checkpoint older than the setting
    torch.save(state, "none/checkpoint.pt")
    assert run("--sample", "none/checkpoint.pt", "--no-class-conditional")[0] == 0


def test_few_test_images(run, pictures):
    """Fewer held-out images than the picture and the likelihood would like."""
    images = pictures(n=30)
    arguments = [*FM_IMAGES, "--dataset", images, "--image-size", "16", "--nll-examples", "128"]
    code, _, err = run(*arguments, "--upsample", "2")
    assert code == 0, err
    assert metrics("runs/flow_matching-pictures")[-1]["examples"] == 3
    arguments = [*FM_IMAGES, "--dataset", "glyphs", "--image-size", "9", "--patch", "1"]
    arguments += ["--width", "15"]
    code, _, err = run(*arguments, "--nll-examples", "1", "--attention", "9,5")
    assert code == 0, err


def test_glyphs(run):
    code, out, err = run(*FM_IMAGES, "--dataset", "glyphs", "--amp", "on", "--no-ema", "--no-clip")
    assert code == 0, err
    assert "bits_per_dim" in out


@pytest.mark.parametrize("objective", ["sm", "sf", "ddpm"])
def test_diffusion_baselines(run, objective):
    code, _, err = run(*FM, "--path", "vp", "--objective", objective, "--nll-examples", "0")
    assert code == 0, err


def test_compare_prints_the_table(run, monkeypatch):
    # two steps leave fields that no adaptive solver follows quickly: a loose tolerance will do
    monkeypatch.setattr(flow_matching, "log_prob", lambda v, x, path, **_: (torch.zeros(len(x)), 0))
    code, out, err = run(*FM, "--compare")
    assert code == 0, err
    assert "NFE 100" in out
    rows = [
        line.split() for line in out.splitlines() if line.split()[:1] in (["ot"], ["vp"], ["ve"])
    ]
    assert [tuple(row[:2]) for row in rows] == [
        ("ot", "cfm"), ("vp", "cfm"), ("ve", "cfm"), ("vp", "sm"), ("vp", "sf"), ("vp", "ddpm"),
    ]  # fmt: skip
    assert all(float(row[2]) >= float(row[7]) >= 0 for row in rows)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_trains_resumes_and_samples(call, script):
    code, out, err = call(script, *tiny(script), "--out", "run", "--num-samples", "3")
    assert code == 0, err
    assert "see run/samples.png" in out
    files = {"config.json", "metrics.jsonl", "checkpoint.pt", "samples.png", "samples.npz"}
    assert files <= {path.name for path in Path("run").iterdir()}
    assert len(np.load("run/samples.npz")["arr_0"]) == 3
    code, _, err = call(script, "--resume", "--out", "run", "--steps", "3")
    assert code == 0, err
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 3
    before = Path("run/checkpoint.pt").read_bytes()
    code, _, err = call(script, "--sample", "run/checkpoint.pt")
    assert code == 0, err
    assert Path("run/samples/samples.png").exists()
    assert Path("run/checkpoint.pt").read_bytes() == before


@pytest.mark.beside
def test_two_processes_under_torchrun(tmp_path):
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    command = [*launcher, str(ROOT / "flow_matching.py"), *FM, "--steps", "60", "--out", "run"]
    command += ["--device", "cpu"]  # NCCL wants a GPU for each
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 60
    assert len(state["rng"]) == 2
    assert done.stdout.count("samples.png") == 1  # one process speaks


# ---- Bad input: one line, exit code 2, nothing on disk lost --------------------------------------

BAD_FLAGS = [
    ("--dataset nonsense", "unknown data set 'nonsense'.*checkerboard"),
    ("--dataset", "expected one argument"),
    ("--dataset cifar100", "unknown data set"),
    ("--steps -3", "--steps: must be a whole number of at least 0"),
    ("--steps many", "--steps: must be a whole number"),
    ("--steps 1.5", "--steps: must be a whole number"),
    ("--batch-size 0", "at least 1"),
    ("--batch-size -8", "at least 1"),
    ("--lr 0", "a number above 0"),
    ("--lr nan", "a number above 0"),
    ("--lr inf", "a number above 0"),
    ("--lr fast", "a number above 0"),
    ("--warmup -1", "at least 0"),
    ("--ema 1", r"a number in \[0, 1\)"),
    ("--ema -0.5", r"a number in \[0, 1\)"),
    ("--clip -1", "a number above 0"),
    ("--seed -1", "at least 0"),
    ("--num-samples -1", "at least 0"),
    ("--image-size 0 --dataset glyphs", "from 1 to 4096"),
    ("--checkpoint-every 0", "at least 1"),
    ("--decay steep", "invalid choice: 'steep'"),
    ("--path straight", "invalid choice: 'straight'"),
    ("--objective gan", "invalid choice"),
    ("--solver rk5", "invalid choice"),
    ("--divergence some", "invalid choice"),
    ("--tol 0", "a number above 0"),
    ("--nfe 0", "at least 1"),
    ("--sigma-min -1", "a number above 0"),
    ("--mult 1,x", "whole numbers such as 1,2,2"),
    ("--mult 1,0", "whole numbers such as 1,2,2"),
    ("--dropout 1", r"a number in \[0, 1\)"),
    ("--stepz 3", "unrecognized arguments: --stepz"),
    ("--step 3", "unrecognized arguments: --step"),
    ("surplus", "unrecognized arguments: surplus"),
    ("--device warp", "--device warp is not to be had"),
    ("--device cuda:9", "--device cuda:9 is not to be had"),
    ("--objective sm", "add --path vp"),
    ("--solver rk4 --nfe 3", "less than one step of rk4"),
    ("--compare --dataset glyphs", "--compare is made for 2-D data"),
    ("--upsample 2", "needs images"),
    ("--upsample 3 --dataset glyphs", "whose side it divides"),
    ("--upsample 2 --dataset glyphs --num-samples 4", "--num-samples"),
    ("--image-size 8", "not made of images"),
    ("--flip", "not made of images"),
    ("--resume", "nothing to resume"),
    ("--resume --out nowhere", "no checkpoint at nowhere"),
    ("--sample nowhere.pt", "no checkpoint at nowhere.pt"),
    ("--sample a.pt --resume", "choose one of them"),
    ("--batch-size 9000000000000", "too little memory: try a smaller --batch-size"),
    ("--batch-size 9000000000000000000", "overflowed"),
    ("--batch-size 99999999999999999999999", "at least 1"),
    ("--seed 99999999999999999999", "at least 0"),
    ("--image-size 10000000 --dataset glyphs", "from 1 to 4096"),
    ("--compare --num-samples 3", "--compare trains anew"),
    ("--compare --class-conditional", "unconditional models"),
    ("--fm-until 0.4", "a million points"),
    ("--fm-until 1", "a number in"),
    ("--lr 1e30 --clip 1e30 --steps 60 --nll-examples 0", "(loss is|not finite)"),
]


@pytest.mark.parametrize(("arguments", "pattern"), BAD_FLAGS)
def test_bad_flags(refused, arguments, pattern):
    quick = [] if "--steps" in arguments else ["--steps", "2"]
    refused(pattern, "flow_matching", *arguments.split(), *quick)


@pytest.fixture
def trained(run):
    assert run(*FM, "--out", "kept", "--nll-examples", "0")[0] == 0
    return Path("kept/checkpoint.pt")


def test_bad_checkpoints(refused, trained):
    good = trained.read_bytes()
    Path("half.pt").write_bytes(good[: len(good) // 2])
    Path("empty.pt").write_bytes(b"")
    Path("text.pt").write_text("hello")
    torch.save({"weights": torch.zeros(3)}, "foreign.pt")
    state = torch.load(trained, weights_only=True)
    torch.save(state | {"script": "vae"}, "vae.pt")
    torch.save([1, 2], "list.pt")
    cases = {
        "half.pt": "no readable checkpoint",
        "empty.pt": "no readable checkpoint",
        "text.pt": "no readable checkpoint",
        "foreign.pt": "not a checkpoint of this folder",
        "list.pt": "not a checkpoint of this folder",
        "vae.pt": "belongs to vae.py, not to flow_matching.py",
        "kept": "no readable checkpoint",  # a folder
    }
    for name, pattern in cases.items():
        refused(pattern, "flow_matching", "--sample", name)
    refused("does not fit", "flow_matching", "--sample", trained, "--width", "16")
    for flag, learned, other in (("--path", "ot", "vp"), ("--upsample", "1", "2")):
        refused(f"learned with {flag} {learned}", "flow_matching", "--sample", trained, flag, other)
    other_network = ["--resume", "--out", "kept", "--blocks", "3", "--steps", "9"]
    refused("does not fit", "flow_matching", *other_network)
    refused("holds a checkpoint: add --resume", "flow_matching", *FM, "--out", "kept")
    state["config"]["from_the_future"] = 1
    torch.save(state, "future.pt")
    refused("from_the_future", "flow_matching", "--sample", "future.pt")
    assert trained.read_bytes() == good  # nothing was lost


def test_bad_resume(refused, trained, run):
    arguments = ["--resume", "--out", "kept"]
    refused("trained on checkerboard", "flow_matching", *arguments, "--dataset", "moons")
    refused("has done 2 already", "flow_matching", *arguments, "--steps", "1")
    for flag in ("--sample", "--dataset"):
        refused(f"{flag} is empty", "flow_matching", flag, "")
    Path("kept/metrics.jsonl").write_text('[1]\n{"a": 1}\n{"step": 1, "loss": 2.0}\n{"ste')
    refused("learned with --path ot", "flow_matching", *arguments, "--path", "vp")
    code, _, err = run(*arguments, "--steps", "3", "--lr", "0.01")
    assert code == 0, err
    assert "from here on lr = 0.01, not 0.004" in err
    assert metrics("kept")[0] == {"step": 1, "loss": 2.0}


def test_bad_output_folders(refused):
    Path("file").write_text("precious")
    for out in ("file", "file/below", "/proc/nowhere/run"):  # in /proc not even root can write
        refused("cannot write to", "flow_matching", *FM, "--out", out)
    assert Path("file").read_text() == "precious"
    Path("run/samples.png").mkdir(parents=True)  # as a full disk: what fails comes after training
    refused("Is a directory: 'run/samples.png'", "flow_matching", *FM, "--out", "run")
    assert Path("run/checkpoint.pt").exists()


def test_bad_image_folders(refused, tmp_path, pictures):
    (tmp_path / "none").mkdir()
    refused("holds 0 images", "flow_matching", *FM, "--dataset", "none")
    root = pictures()
    whole = (root / "5.png").read_bytes()
    (root / "5.png").write_bytes(whole[:80])
    refused("cannot read the image .*5.png", "flow_matching", *FM, "--dataset", root)
    (root / "5.png").write_text("not a picture")
    refused("cannot read the image .*5.png", "flow_matching", *FM, "--dataset", root)


def test_bad_downloads(refused, tmp_path, monkeypatch):
    """Without the files and without a network; and with damaged files."""

    def no_network(*_, **__):
        raise OSError("network is unreachable")

    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", no_network)
    for name in ("mnist", "fashion_mnist", "cifar10"):
        refused("unreachable.*--data-dir.*glyphs", "flow_matching", *FM_IMAGES, "--dataset", name)
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    sizes = {"train-images-idx3": 47_040_016, "train-labels-idx1": 60_008}
    sizes |= {"t10k-images-idx3": 7_840_016, "t10k-labels-idx1": 10_008}
    for name, size in sizes.items():
        (raw / f"{name}-ubyte").write_bytes(b"\0" * (size if "labels" not in name else size // 2))
    refused("train-labels-idx1-ubyte is damaged", "flow_matching", *FM_IMAGES, "--dataset", "mnist")
    batches = tmp_path / "data" / "cifar-10-batches-py"
    batches.mkdir()
    (batches / "data_batch_1").write_bytes(b"half a batch")
    refused("data_batch_1 is damaged", "flow_matching", *FM_IMAGES, "--dataset", "cifar10")


# ---- What the documents promise -----------------------------------------------------------------


BENCHMARK = "tests/benchmark.py"


def readme_commands():
    text = (ROOT / "README.md").read_text()
    for line in re.findall(r"(?:python|--nproc_per_node \d+) ([\w/]+\.py(?: [^`\n|#]*)?)", text):
        script, *arguments = shlex.split(line)
        yield script, arguments


def test_readme_commands_parse(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = list(readme_commands())
    assert len(commands) >= 60
    assert {script for script, _ in commands} == {f"{s}.py" for s in SCRIPTS} | {BENCHMARK}
    for script, arguments in commands:
        module = __import__(Path(script).stem)
        if "--help" in arguments:
            continue
        if script == BENCHMARK:
            module.parse(arguments)
            continue
        if "--sample" in arguments or "--resume" in arguments:
            for flag in ("--sample", "--resume"):  # their files are not here: the other flags count
                if flag in arguments:
                    i = arguments.index(flag)
                    del arguments[i : i + (2 if flag == "--sample" else 1)]
        common.parse(module.Config, module.PRESETS, arguments)


def test_the_benchmark_builds_the_presets_networks():
    benchmark = importlib.import_module("benchmark")
    for name, (channels, side, _) in benchmark.PRESETS.items():
        with torch.device("meta"):
            cfg = flow_matching.Config(**flow_matching.PRESETS[name])
            nets, x = benchmark.unets(channels, side, cfg, "meta")
            assert nets["ours"](x, torch.rand(1)).shape == (1, channels, side, side)


def test_readme_counts_lines_and_shows_every_picture():
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"\[(\w+)\.py\]\(\1\.py\) \| (\d+) ", text)
    counted = {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in SCRIPTS}
    assert {name: int(lines) for name, lines in rows} == counted
    shown = set(re.findall(r"\((assets/[^)]+)\)", text))
    assert shown == {str(path.relative_to(ROOT)) for path in (ROOT / "assets").iterdir()}


def test_readme_example_samples_from_python(run):
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    assert run(*FM, "--nll-examples", "0")[0] == 0
    names = {}
    exec(example, names)
    assert names["x"].shape == (64, 2)


@pytest.mark.beside
def test_importing_the_scripts_does_no_work(tmp_path):
    """No script imports what is slow, draws a random number, or writes a file."""
    lines = ["import sys, torch", "state = torch.get_rng_state()"]
    lines += [f"import {script}" for script in SCRIPTS]
    lines += ["assert torch.equal(state, torch.get_rng_state())"]
    lines += ["print([m for m in ('torchvision', 'torch._dynamo') if m in sys.modules])"]
    here = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(
        command, cwd=tmp_path, env=here, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_item_of_the_card_is_tagged_in_the_code(script):
    source = (ROOT / f"{script}.py").read_text()
    _, card, code = source.split('"""', 2)
    implements = card[card.index("Implements") : card.index("Conventions")]
    kinds = "Eq|Alg|App|Sec|Thm|Prop|Theorem|Definition|Example|Table|Fig"
    numbered = rf"(?:{kinds})\.? (?:[A-Z]\.)?[\dA-Z][\d.]*"
    named = r"\[[A-Za-z][^\]]*\]"  # a result's name, where the paper's numbers cannot be verified
    items = re.findall(f"{numbered}|{named}", " ".join(implements.split()))
    assert len(items) >= 8
    for item in items:
        item = item.rstrip(".")
        assert re.search(re.escape(item) + r"(?![\d])", code), f"{item} has no tag in {script}.py"
    assert len(card.splitlines()) <= 30
    assert source[: source.index("\n# ---- ")].count("\n") < 100  # the mathematics starts early


def test_scripts_do_not_import_each_other():
    for script in SCRIPTS:
        source = (ROOT / f"{script}.py").read_text()
        for other in SCRIPTS:
            assert not re.search(rf"^(?:from|import) {other}\b", source, re.M)
