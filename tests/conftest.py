"""What the tests share: calling a script as its user does; a second core."""

import importlib
import os
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are small: a second thread costs time
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # alike everywhere; name a GPU to test on it

import numpy as np
import pytest
from PIL import Image

import common

BESIDE = ThreadPoolExecutor(1)


def pytest_collection_finish(session):
    """Tests marked `beside` wait for processes of their own: they run in a thread, beside the rest.

    They take `tmp_path` and their parameters, and are reported in their turn.
    """
    for item in session.items:
        if item.get_closest_marker("beside") and not session.config.option.collectonly:
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            item.beside = BESIDE.submit(in_a_folder, item.function, parameters)


def in_a_folder(test, parameters):
    with tempfile.TemporaryDirectory() as folder:
        test(tmp_path=Path(folder), **parameters)


def pytest_pyfunc_call(pyfuncitem):
    if hasattr(pyfuncitem, "beside"):
        pyfuncitem.beside.result()
        return True  # it has been called
    return None


def pytest_sessionfinish():
    BESIDE.shutdown(cancel_futures=True)


def little_data(common=common):
    """common's embedded data sets of a twentieth of their sizes, and energy distances of the first
    500 examples: attributes to set."""
    glyphs, distance = common.glyphs, common.energy_distance
    densities = {
        name: lambda n, g, draw=draw: draw(n // 20, g) for name, draw in common.DENSITIES.items()
    }
    little = {"glyphs": lambda n, seed: glyphs(n // 20, seed), "DENSITIES": densities}
    return little | {"energy_distance": lambda x, y: distance(x[:500], y[:500])}


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """call(script, *arguments) -> (exit code, stdout, stderr), in an empty folder; little data."""
    monkeypatch.chdir(tmp_path)
    for name, value in little_data().items():
        monkeypatch.setattr(common, name, value)

    def run(script, *arguments):
        module = importlib.import_module(script)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        code = 0
        try:
            common.cli(module.main, module.Config, module.PRESETS)
        except SystemExit as stop:
            code = stop.code
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return run


@pytest.fixture
def refused(call):
    """refused(pattern, script, *arguments): one line on stderr that matches, exit code 2."""

    def check(pattern, script, *arguments):
        code, _, err = call(script, *arguments)
        assert code == 2, err
        lines = [line for line in re.split("[\r\n]", err) if line.strip()]
        lines = [line for line in lines if "it/s" not in line and "?it" not in line]  # the bar
        lines = [line for line in lines if not line.startswith("from here on")]  # a notice
        assert len(lines) == 1, err
        assert re.search(pattern, lines[0]), err
        assert lines[0].startswith(f"{script}.py: error: ")

    return check


@pytest.fixture
def pictures(tmp_path):
    """pictures(name, n, size): a folder of n images of noise."""

    def write(name="pictures", n=12, size=16):
        root = tmp_path / name
        root.mkdir()
        noise = np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
        for i, image in enumerate(noise):
            Image.fromarray(image).save(root / f"{i}.png")
        return root

    return write
