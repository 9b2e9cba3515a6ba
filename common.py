"""The parts that no paper is about: settings, data, networks, ODE stepping, the run, pictures.

Copy this file together with any script of this folder: the two need nothing else.

Conventions of the whole folder:
  images   float in [-1, 1], (B, C, H, W); level k of 0..255 is (k + 1/2)/128 - 1, its bin's middle
  vectors  float (B, D); labels int64 (B,)
  fields   f(x, t) or f(x, t, y): networks and vector fields take the state first, t of shape (B,)
  errors   a mistake that the user can mend raises UserError; `cli` prints its one line, exit code 2
"""

import argparse
import copy
import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
import types
import typing
import zlib
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from tqdm import tqdm


class UserError(Exception):
    """A mistake that the user can mend: one line that says what is wrong and how to mend it."""


# ---- Settings and command line ------------------------------------------------------------------

Count = Annotated[int, lambda v: 1 <= v < 2**63, "a whole number of at least 1"]
Natural = Annotated[int, lambda v: 0 <= v < 2**63, "a whole number of at least 0"]
Side = Annotated[int, lambda v: 1 <= v <= 4096, "a whole number from 1 to 4096"]
Positive = Annotated[float, lambda v: 0 < v < math.inf, "a number above 0"]
Number = Annotated[float, math.isfinite, "a finite number"]
Fraction = Annotated[float, lambda v: 0 <= v < 1, "a number in [0, 1)"]
Sizes = Annotated[tuple, lambda v: all(n >= 1 for n in v), "whole numbers such as 1,2,2"]


@dataclass
class Config:
    """Settings that every script shares. The comment on a field's line is its text in --help."""

    dataset: str = "checkerboard"  # a data set's name, or a folder of images (sub-folders: classes)
    data_dir: str = "data"  # where mnist, fashion_mnist and cifar10 lie or are downloaded to
    image_size: Side | None = None  # side to which images are resized (a folder's default: 32)
    flip: bool = False  # mirror training images left to right at random
    steps: Natural = 10_000  # optimisation steps
    batch_size: Count = 256  # examples per step, over all processes together
    lr: Positive = 1e-3  # peak learning rate of Adam
    beta_2: Fraction = 0.999  # Adam's decay of the squared gradient's average
    warmup: Natural = 100  # steps of linear rise to the peak
    decay: Literal["constant", "linear", "cosine"] = "cosine"  # of the learning rate, to the end
    clip: Positive | None = 1.0  # largest norm of the gradient
    ema: Fraction | None = 0.999  # decay of the weights' moving average, which is what samples
    seed: Natural = 0  # of everything random but the embedded data sets
    device: str = "auto"  # auto (cuda, else mps, else cpu) or a torch device
    amp: Literal["off", "on", "auto"] = "off"  # train in bfloat16; auto: if the CPU is made for it
    compile: bool = False  # train the network under torch.compile
    out: str | None = None  # the run's folder (default: a new runs/<script>-<dataset>)
    resume: bool = False  # go on from the checkpoint in the run's folder, up to --steps
    sample: str | None = None  # a checkpoint to sample and evaluate without training
    num_samples: Natural = 0  # samples to write to samples.npz
    checkpoint_every: Count | None = None  # steps between checkpoints (besides every 10 minutes)

    learned = ("optimizer",)  # settings that a checkpoint is made of: no flag may change them
    new = False  # whether `out` was chosen because no run was there

    @property
    def script(self):
        return Path(inspect.getfile(type(self))).stem


def cli(main, config_class, presets):
    """Run `main(cfg)` on the command line's settings. What the user can mend, be it a flag, a disk
    or too little memory, ends as one line and exit code 2."""
    try:
        main(parse(config_class, presets))
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        line = " ".join(str(error).split())
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in line:
            line = f"too little memory: try a smaller --batch-size or network ({line})"
        elif not (isinstance(error, (UserError, OSError)) or "calculation overflowed" in line):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def parse(config_class, presets, argv=None):
    """Command line -> config. Precedence: default < preset < checkpoint's settings < explicit flag.

    `presets` maps a data set's name (or "folder") to the settings that it changes.
    """
    parser = _Parser(description=inspect.getmodule(config_class).__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    helps = _comments(config_class)
    kinds = typing.get_type_hints(config_class, include_extras=True)
    first = presets.get(config_class.dataset, {})  # the preset of the default data set
    for field in dataclasses.fields(config_class):
        shown = first.get(field.name, field.default)
        _add_flag(parser, field, kinds[field.name], helps[field.name], shown)
    explicit = vars(parser.parse_args(argv))

    name = explicit.get("dataset", config_class.dataset)
    preset = presets.get(name, presets.get("folder", {}) if Path(name).is_dir() else {})
    cfg = config_class(**preset | explicit)
    for flag in ("dataset", "sample"):
        if getattr(cfg, flag) == "":
            raise UserError(f"--{flag} is empty: leave it out, or give it a value")
    if cfg.resume and cfg.sample:
        raise UserError("--resume goes on training and --sample does not train: choose one of them")
    if cfg.resume:
        explicit["out"] = cfg.out or _default_out(cfg, occupied=True)
    path = Path(explicit["out"], "checkpoint.pt") if cfg.resume else cfg.sample
    if path:
        saved = load_checkpoint(path, cfg.script, mmap=True)["config"]
        if unknown := saved.keys() - kinds.keys():
            raise UserError(f"{path} has the unknown setting {min(unknown)}: from another version?")
        of_its_run = {"out": None, "resume": False, "sample": None}
        of_its_run |= {} if cfg.resume else {"num_samples": 0}
        learned = config_class(**saved | of_its_run)
        for key in explicit.keys() & set(config_class.learned):
            if explicit[key] != (value := getattr(learned, key)):
                flag = f"--{key.replace('_', '-')}"
                raise UserError(f"{path} learned with {flag} {value}: leave {flag} as it was")
        cfg = dataclasses.replace(learned, **explicit)
    if cfg.resume:
        if Path(cfg.dataset).resolve().name != Path(saved["dataset"]).resolve().name:
            raise UserError(f"{path} was trained on {saved['dataset']}: name that run by --out")
        for key in [k for k in explicit if k in saved and k not in ("steps", "out", "resume")]:
            if explicit[key] != saved[key]:
                print(f"from here on {key} = {explicit[key]}, not {saved[key]}", file=sys.stderr)
        return cfg
    if cfg.out and Path(cfg.out, "checkpoint.pt").exists():
        raise UserError(f"{cfg.out} holds a checkpoint: add --resume to go on, or another --out")
    if not cfg.out:
        cfg.out, cfg.new = _default_out(cfg), True
    return cfg


@functools.cache  # to find a class in its file takes a tenth of a second
def _comments(config_class):
    """The comments on the lines of the fields, by name."""
    sources = map(inspect.getsource, reversed(config_class.__mro__[:-1]))
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", "".join(sources), re.M))


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def _add_flag(parser, field, kind, text, shown):
    """A field's flag: --x VALUE; --no-x too for a bool, for an optional one with a default, and
    for optional sizes, which a preset may set. The help shows the value `shown`."""
    flag, default = field.name.replace("_", "-"), field.default
    options = {"dest": field.name, "default": argparse.SUPPRESS}
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = kind.__args__[0]
        if default is not None or kind == Sizes:
            off = {"action": "store_const", "const": None, "help": f"without {flag}"}
            parser.add_argument(f"--no-{flag}", **options, **off)
    if shown is not None:
        shown = ",".join(map(str, shown)) if isinstance(shown, tuple) else shown
        text = f"{text} [{shown}]"
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(kind) is Literal:
        options["choices"] = typing.get_args(kind)
    elif kind is not str:
        options |= {"type": functools.partial(_convert, kind), "metavar": field.name.upper()}
    parser.add_argument(f"--{flag}", help=text.replace("%", "%%"), **options)


def _convert(kind, text):
    """A flag's text -> its value, of a kind such as Count or Sizes."""
    valid, wanted = kind.__metadata__
    with suppress(ValueError):
        several = kind.__origin__ is tuple
        value = tuple(map(int, text.split(","))) if several else kind.__origin__(text)
        if valid(value):
            return value
    raise argparse.ArgumentTypeError(f"must be {wanted}, not {text!r}")


def free_folder(stem):
    """The first of stem, stem-2, stem-3 … that holds no run."""
    paths = (Path(f"{stem}-{n}" if n > 1 else stem) for n in itertools.count(1))
    return str(next(path for path in paths if not (path / "config.json").exists()))


def _default_out(cfg, occupied=False):
    """runs/<script>-<dataset>; with --sample, `samples` beside the checkpoint; numbered."""
    if cfg.sample:
        return free_folder(Path(cfg.sample).parent / "samples")
    stem = f"{cfg.script}-{Path(cfg.dataset).resolve().name}"
    if not occupied:
        return free_folder(Path("runs", stem))
    numbered = re.compile(re.escape(stem) + r"(?:-(\d+))?")
    found = [path.parent for path in Path("runs").glob("*/checkpoint.pt")]
    runs = {int(m[1] or 1): path for path in found if (m := numbered.fullmatch(path.name))}
    if not runs:
        raise UserError(f"nothing to resume: runs/{stem} holds no checkpoint (or name it by --out)")
    return str(runs[max(runs)])


def load_checkpoint(path, script, mmap=False):
    """The dict that Run.save wrote, or a UserError that says why it cannot be used by `script`."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint at {path}") from None
    except Exception as error:
        cause = type(error).__name__
        raise UserError(f"{path} is no readable checkpoint: damaged or foreign ({cause})") from None
    if not (isinstance(state, dict) and {"script", "step", "config", "model"} <= state.keys()):
        raise UserError(f"{path} is a torch file, but not a checkpoint of this folder's scripts")
    if state["script"] != script:
        raise UserError(f"{path} belongs to {state['script']}.py, not to {script}.py")
    return state


# ---- Data ---------------------------------------------------------------------------------------


@dataclass
class Data:
    """A whole data set on one device: images uint8 (N, C, H, W) or vectors float32 (N, D)."""

    name: str
    train: Tensor
    train_labels: Tensor  # int64 (N,)
    test: Tensor
    test_labels: Tensor
    flip: bool = False
    entropy: float | None = None  # of the density, in nats, where a closed form is known

    def __post_init__(self):
        self.is_image = self.train.dtype == torch.uint8
        self.shape = tuple(self.train.shape[1:])
        self.num_classes = int(max(self.train_labels.max(), self.test_labels.max())) + 1

    def batch(self, n):
        """n training examples (x, y), drawn with replacement from the device's random stream."""
        index = torch.randint(len(self.train), (n,), device=self.train.device)
        x = to_float(self.train[index])
        return mirrored(x) if self.flip else x, self.train_labels[index]

    def draw_labels(self, n):
        """n classes, int64 (n,), as frequent as in the training set."""
        index = torch.randint(len(self.train_labels), (n,), device=self.train.device)
        return self.train_labels[index]


def to_float(x):
    """uint8 levels -> the middles of their bins in [-1, 1]; vectors pass."""
    return (x.float() + 0.5) / 128 - 1 if x.dtype == torch.uint8 else x


def to_uint8(x):
    """[-1, 1] -> the level whose bin holds x; what lies outside is clamped."""
    return ((x.float() + 1) * 128).floor().clamp(0, 255).to(torch.uint8)


def dequantize(x):
    """Images at their bins' middles -> uniform over the bins, which makes the data a density."""
    return x + (torch.rand_like(x) - 0.5) / 128


def binarize(levels, generator=None):
    """Levels 0 .. 255 -> draws of 0 or 1, uint8 like them, of mean level / 255."""
    return (torch.empty_like(levels).random_(0, 255, generator=generator) < levels).byte()


def mirrored(x, generator=None):
    """Every image of (B, C, H, W) mirrored left to right with probability 1/2."""
    kept = torch.rand(len(x), 1, 1, 1, device=x.device, generator=generator) < 0.5
    return torch.where(kept, x, x.flip(-1))


def load_data(cfg, device="cpu"):
    """The data set that cfg names, on `device`; its first n held-out examples are a random sample.
    Raises UserError if it cannot be had."""
    name = cfg.dataset
    if name in DENSITIES:
        seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        splits = [DENSITIES[name](n, g) for n, g in zip((1_000_000, 100_000), seeds, strict=True)]
        if cfg.image_size or cfg.flip:
            raise UserError(f"{name} is not made of images: leave out --image-size and --flip")
    elif name == "glyphs":
        splits = [glyphs(60_000, seed=0), glyphs(10_000, seed=1)]
    elif name in ("mnist", "fashion_mnist", "cifar10"):
        if rank() > 0:  # rank 0 downloads first
            dist.barrier()
        splits = _torchvision_splits(name, Path(cfg.data_dir))
        if world_size() > 1 and rank() == 0:
            dist.barrier()
    elif Path(name).is_dir():
        splits = _folder_splits(Path(name), cfg.image_size or 32)
    else:
        known = ", ".join([*DENSITIES, "glyphs", "mnist", "fashion_mnist", "cifar10"])
        raise UserError(f"unknown data set {name!r}: give one of {known}, or a folder of images")
    if cfg.image_size and splits[0][0].shape[-1] != cfg.image_size:
        size = [cfg.image_size, cfg.image_size]
        splits = [(F.interpolate(x, size, mode="bilinear", antialias=True), y) for x, y in splits]
    if name not in DENSITIES and name != "glyphs":  # files come by class or by writer
        order = torch.randperm(len(splits[1][1]), generator=torch.Generator().manual_seed(0))
        splits[1] = [v[order] for v in splits[1]]
    (train, train_labels), (test, test_labels) = [(x.to(device), y.to(device)) for x, y in splits]
    entropy = ENTROPIES.get(name)
    return Data(name, train, train_labels, test, test_labels, cfg.flip, entropy)


def load_images(cfg, device="cpu"):
    """load_data for a script of images alone."""
    data = load_data(cfg, device)
    if not data.is_image:
        raise UserError(f"{data.name} is not made of images: give glyphs, mnist or a folder")
    return data


def _polar(r, angle):
    return torch.stack([r * angle.cos(), r * angle.sin()], dim=1)


def checkerboard(n, g):
    cell = torch.randint(8, (n,), generator=g)
    row = cell // 2
    column = 2 * (cell % 2) + row % 2
    return torch.stack([column, row], dim=1) - 2 + torch.rand(n, 2, generator=g), cell


def moons(n, g):
    moon = torch.randint(2, (n,), generator=g)
    x = _polar(1.2, math.pi * torch.rand(n, generator=g)) - torch.tensor([0.6, 0.3])
    x = torch.where(moon[:, None] == 0, x, -x)
    return x + 0.08 * torch.randn(n, 2, generator=g), moon


def eight_gaussians(n, g):
    mode = torch.randint(8, (n,), generator=g)
    return _polar(2.0, mode * math.pi / 4) + 0.15 * torch.randn(n, 2, generator=g), mode


def pinwheel(n, g):
    arm = torch.randint(5, (n,), generator=g)
    along, across = torch.tensor([[0.35], [0.12]]) * torch.randn(2, n, generator=g)
    angle = arm * (2 * math.pi / 5) + 0.35 * along.exp()
    x = _polar(1 + along, angle) + across[:, None] * _polar(1, angle + math.pi / 2)
    return 1.3 * x, arm


def two_spirals(n, g):
    arm = torch.randint(2, (n,), generator=g)
    angle = 3 * math.pi * torch.rand(n, generator=g).sqrt()
    x = _polar(angle / 4.5, angle + arm * math.pi)
    return x + 0.05 * torch.randn(n, 2, generator=g), arm


def swiss_roll(n, g):
    angle = 1.5 * math.pi * (1 + 2 * torch.rand(n, generator=g))
    x = _polar(angle / 6.5, angle) + 0.06 * torch.randn(n, 2, generator=g)
    return x, torch.zeros(n, dtype=torch.long)


def rings(n, g):
    ring = torch.randint(4, (n,), generator=g)
    radius = 0.5 * (ring + 1) + 0.04 * torch.randn(n, generator=g)
    return _polar(radius, 2 * math.pi * torch.rand(n, generator=g)), ring


# All but stragglers lie within [-3, 3]², with a standard deviation of about 1.
DRAWS = (checkerboard, moons, eight_gaussians, pinwheel, two_spirals, swiss_roll, rings)
DENSITIES = {draw.__name__: draw for draw in DRAWS}
ENTROPIES = {
    "checkerboard": math.log(8),  # uniform on eight unit squares
    "eight_gaussians": math.log(8) + math.log(2 * math.pi * math.e * 0.15**2),  # ten sigmas apart
}

# Glyphs: to write a digit is to pick one of the ways people write it, jitter and warp its control
# points, join them by a spline, slant the curve, frame it as MNIST does, draw it with a random nib.
# Five ways for each of 0, 1, ... 9, each a row of points "xy" on a grid from 00 (top left) to 99
# (bottom right); a point given twice is a corner; a comma lifts the pen.
WAYS = """
60301216296987837040 401316396986836031 80400207397997826033 5030131639698683604034
81401105185998947130 50535659 505459 426060636669 43526060636669 33516060636669,396999
12206082744619194989 123070735638190716376998 2060722809365899 133070633719194989
1040808356290918477998 1140717344446487793917 10408080444474876928 116073543454775918
0130807345364575885918 20508163445486693918 201315154585,7072656769 70430606366696,70737679
2014356484,807459 101215155595,80838689 5134152665828080746759 302324245476785918,305080
8050303024246486794918 8040213365775918 3024245375784918,306090 4024246376683908,417090
70421417396977654517 502316296987753517 8050231518497876553628 6043262959675537 70221518598885542638
11408080635649 121010408080625539 10408080635649,254585 12316181634629 11306082756859
81502133557769391735638150 71401223657859281644727050 9050223466684927366390
50211354837140,54151859888544 806021235577692917448280 726030132545737171746769
7140121435657271717578592917 703013357470706559 81502113356481735639 6022143563706081755839
"""
SAMPLES = 80  # along the path of the pen


def _splines():
    """Of all V ways: control points (V, K, 2), spline (V, P, K), which steps draw (V, P-1, 1)."""
    ways = [[re.findall("..", stroke) for stroke in way.split(",")] for way in WAYS.split()]
    most = max(sum(map(len, way)) for way in ways)
    points = torch.zeros(len(ways), most, 2)
    spline = torch.zeros(len(ways), SAMPLES, most)
    drawn = torch.zeros(len(ways), SAMPLES - 1, 1)
    for v, way in enumerate(ways):
        stroke = torch.tensor([i for i, stroke in enumerate(way) for _ in stroke])
        k = len(stroke)
        time = torch.linspace(-0.499, k - 0.501, SAMPLES)[:, None]
        now = stroke[time.round().long()]
        gap = (time - torch.arange(k)).abs()
        bump = torch.where(gap < 0.5, 0.75 - gap**2, (1.5 - gap).clamp(min=0) ** 2 / 2)
        bump *= now == stroke  # strokes do not mix; each runs from its first point to its last
        points[v, :k] = torch.tensor([[float(x), float(y)] for stroke in way for x, y in stroke])
        spline[v, :, :k] = bump / bump.sum(1, keepdim=True)
        drawn[v] = now[1:] == now[:-1]
    return points, spline, drawn


def _write(points, spline, drawn, rng):
    """Draw each of a batch of ways, no two alike: uint8 (B, 28, 28)."""

    def noise(*shape):
        return torch.randn(len(points), *shape, generator=rng)

    haste = (0.4 * noise(1, 1)).exp()  # some write neatly, some do not
    p = points - 4.5 + 0.28 * haste * noise(*points.shape[1:])
    p = p + 0.5 * haste * noise(1, 2) * torch.sin(0.5 * p.flip(2) + 3 * noise(1, 2))
    slant = torch.tensor([[0.85, 0], [-0.15, 1]])
    p = spline @ p @ (slant + torch.tensor([[0.16, 0.07], [0.22, 0.1]]) * noise(2, 2))
    p = p * (17.5 + 0.7 * noise(1, 1)) / (p.amax(1) - p.amin(1)).amax(1)[:, None, None]
    length = p.diff(dim=1).norm(dim=2, keepdim=True) * drawn
    p = (p[:, 1:] + p[:, :-1]) / 2
    centre = (p * length).sum(1, keepdim=True) / length.sum(1, keepdim=True)
    p = p - centre + 13.5 + 0.5 * noise(1, 2)
    # Each step leaves a Gaussian blob, a product of x and y: their sum is one matrix product.
    nib = (0.18 * noise(1, 1)).exp()
    gap = (torch.arange(28) - p[..., None]) / nib[..., None]
    x, y = (gap.square().clamp(max=40) / -2).exp().unbind(2)
    ink = (y * length / (nib * math.sqrt(2 * math.pi))).mT @ x  # 1 in the middle of a line
    return (255 * (2 * ink - 0.4).clamp(0, 1)).byte()


def glyphs(n, seed=0):
    """n handwriting-like digits: uint8 (n, 1, 28, 28), 0 = paper, 255 = ink; labels int64 (n,)."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randperm(n, generator=rng) % 10
    ways = 5 * labels + torch.randint(5, (n,), generator=rng)
    tables = _splines()
    images = [_write(*(table[way] for table in tables), rng) for way in ways.split(500)]
    return torch.cat(images)[:, None], labels


def _torchvision_splits(name, root):
    """mnist, fashion_mnist or cifar10 from `root`, downloaded if missing."""
    from torchvision import datasets as sets  # not above: it takes two seconds to import

    kind = {"mnist": sets.MNIST, "fashion_mnist": sets.FashionMNIST, "cifar10": sets.CIFAR10}[name]
    try:
        with redirect_stdout(sys.stderr):
            splits = [kind(str(root), train=train, download=True) for train in (True, False)]
    except Exception as error:
        damaged = _damaged_file(kind, root)
        cause = f"{damaged} is damaged, remove it" if damaged else f"no download ({error})"
        ways = "--data-dir DIR that holds torchvision's files, or the embedded glyphs, checkerboard"
        raise UserError(f"{name} is not to be had in {root}: {cause}; or use {ways}") from None
    pairs = [(torch.as_tensor(split.data), torch.as_tensor(split.targets)) for split in splits]
    return [
        (x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else x[:, None], y) for x, y in pairs
    ]


def _damaged_file(kind, root):
    """The first of torchvision's files that exists, but is not what it should be; or None."""
    if hasattr(kind, "base_folder"):  # CIFAR-10
        files = kind.train_list + kind.test_list
        marks = {root / kind.base_folder / name: md5 for name, md5 in files}
    else:
        names = [Path(name).stem for name, _ in kind.resources]
        paths = [root / kind.__name__ / "raw" / name for name in names]
        marks = dict(zip(paths, (47_040_016, 60_008, 7_840_016, 10_008), strict=True))  # bytes
    for path, mark in marks.items():
        if path.exists():
            whole = path.read_bytes()
            if mark not in (len(whole), hashlib.md5(whole).hexdigest()):
                return path
    return None


def _folder_splits(root, size):
    """Every image below `root`, on white, centre-cropped to size × size; every tenth one is held
    out. The others are shuffled, so that the first n are of all classes."""
    suffixes = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
    if len(paths) < 2:
        raise UserError(f"{root} holds {len(paths)} images, two is the least: is it the folder?")
    kinds = [path.relative_to(root).parts[0] if path.parent != root else "" for path in paths]
    y = torch.from_numpy(np.unique(kinds, return_inverse=True)[1])
    x = np.empty((len(paths), size, size, 3), dtype=np.uint8)
    for i, path in enumerate(tqdm(paths, "decoding", disable=rank() > 0, leave=False)):
        try:
            with Image.open(path) as image:
                image = ImageOps.exif_transpose(image)  # upright
                if image.mode[0] in "IF":  # which Pillow would clip, not scale
                    raise ValueError(f"its pixels are not of 8 bits but of mode {image.mode}")
                if image.has_transparency_data:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
                x[i] = fitted
        except Exception as error:
            raise UserError(f"cannot read the image {path}: {error}; mend or remove it") from None
    x = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
    held_out = torch.arange(len(paths)) % 10 == 0
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0))
    kept = order[~held_out[order]]
    return [(x[kept], y[kept]), (x[held_out], y[held_out])]


# ---- Networks -----------------------------------------------------------------------------------


def bcast(t, x):
    """t of shape (B,) -> (B, 1, ..., 1), to multiply x of shape (B, ...)."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def time_embedding(t, dim, frequency=1000):
    """Sinusoids of t in [0, 1], (B,) -> (B, dim): from `frequency` radians a unit down to 0.1.

    A thousand tells a thousand steps apart; a field that is smooth in t is better learned, and
    solved in fewer evaluations, with tens.
    """
    half = math.ceil(dim / 2)
    steps = torch.arange(half, device=t.device, dtype=t.dtype) / half
    angle = t[:, None] * (frequency * torch.exp(-math.log(10 * frequency) * steps))
    return torch.cat([angle.cos(), angle.sin()], dim=1)[:, :dim]


class MLP(nn.Module):
    """Residual network on vectors: f(x, t, y=None), x (B, D), t (B,), y int64 (B,) -> (B, out_dim).

    y counts with num_classes > 0 alone.

    Random Fourier features of x let so small a network resolve the sharp edges of a density.
    """

    def __init__(self, dim, out_dim=None, width=128, blocks=2, features=64, num_classes=0):
        super().__init__()
        self.register_buffer("frequencies", math.pi * torch.randn(dim, features))
        self.input = nn.Linear(dim + 2 * features, width)
        self.time = nn.Linear(32, width)
        self.label = nn.Embedding(num_classes, width) if num_classes else None
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(blocks)
        )
        self.output = nn.Sequential(nn.SiLU(), nn.Linear(width, out_dim or dim))

    def forward(self, x, t, y=None):
        angle = x @ self.frequencies
        h = self.input(torch.cat([x, angle.cos(), angle.sin()], dim=1))
        angle = t[:, None] * (math.pi * torch.arange(1, 17, dtype=t.dtype, device=t.device))
        h = h + self.time(torch.cat([angle.cos(), angle.sin()], dim=1))
        if self.label is not None:
            h = h + self.label(y)
        for block in self.blocks:
            h = h + block(h)
        return self.output(h)


class UNet(nn.Module):
    """The U-Net of Dhariwal & Nichol (2021): f(x, t, y=None), x (B, in, H, W) -> (B, out, H, W).

    Args:
        channels, mult, blocks: level i has channels * mult[i] channels and `blocks` blocks;
            each level halves the resolution of the one before.
        attention: the sides, of images with side `size`, at which levels get attention.
        attend: (channels, heads) -> a module f(h, context) to stand where attention would; forward
            hands it its `context`.
        patch: all this sees patches of patch x patch pixels as channels, and sides count patches;
            one more block, of half as many channels, sees the pixels themselves.
        frequency: the fastest of the embedding of t: see `time_embedding`.
    """

    def __init__(
        self,
        in_channels,
        out_channels=None,
        size=32,
        channels=128,
        mult=(1, 2, 2, 2),
        blocks=2,
        attention=(16,),
        head_channels=64,
        dropout=0.0,
        num_classes=0,
        attend=None,
        patch=1,
        frequency=1000,
    ):
        super().__init__()
        self.channels, self.patch, self.frequency = channels, patch, frequency
        emb = 4 * channels
        self.time = nn.Sequential(nn.Linear(channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label = nn.Embedding(num_classes, emb) if num_classes else None
        self.stem = nn.Conv2d(in_channels * patch**2, channels, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        size = size // patch
        side, width, widths = size, channels, [channels]

        def stage(c_in, c_out):
            heads = attention_heads(c_out, head_channels) if side in attention else 0
            return Stage(c_in, c_out, emb, dropout, heads, attend)

        for level, m in enumerate(mult):
            if level:
                self.down.append(Downsample(width))
                side = math.ceil(side / 2)
                widths.append(width)
            for _ in range(blocks):
                self.down.append(stage(width, channels * m))
                width = channels * m
                widths.append(width)
        self.middle = nn.ModuleList(
            [
                Stage(width, width, emb, dropout, attention_heads(width, head_channels), attend),
                stage(width, width),
            ]
        )
        for level, m in reversed(list(enumerate(mult))):
            for _ in range(blocks + 1):
                self.up.append(stage(width + widths.pop(), channels * m))
                width = channels * m
            if level:
                self.up.append(Upsample(width))
                side = math.ceil(size / 2 ** (level - 1))
        if patch > 1:
            fine = max(1, channels // 2)
            self.split = nn.Sequential(
                group_norm(width), nn.SiLU(), nn.Conv2d(width, fine * patch**2, 1)
            )
            self.fine_stem = nn.Conv2d(in_channels, fine, 3, padding=1)
            self.fine = Stage(2 * fine, fine, emb, dropout, heads=0)
            width = fine
        out = zeroed(nn.Conv2d(width, out_channels or in_channels, 3, padding=1))
        self.output = nn.Sequential(group_norm(width), nn.SiLU(), out)

    def forward(self, x, t, y=None, context=None):
        emb = self.time(time_embedding(t, self.channels, self.frequency))
        if self.label is not None:
            emb = emb + self.label(y)
        emb = F.silu(emb)  # (B, 4 channels)
        h = self.stem(F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x)
        skips = [h]
        for layer in self.down:
            h = layer(h, emb, context)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, emb, context)
        for layer in self.up:
            if isinstance(layer, Upsample):
                h = layer(h, skips[-1].shape[-2:])
            else:
                h = layer(torch.cat([h, skips.pop()], dim=1), emb, context)
        if self.patch > 1:
            h = F.pixel_shuffle(self.split(h), self.patch)
            h = self.fine(torch.cat([h, self.fine_stem(x)], dim=1), emb)
        return self.output(h)


SMALL_UNET = {  # for small images in minutes of a CPU; see "Small networks" in the README
    "width": 32,
    "mult": (1, 2),
    "blocks": 1,
    "attention": None,
    "patch": 2,
    "batch_size": 32,
    "optimizer": "muon",
    "lr": 2e-3,
    "beta_2": 0.99,
    "decay": "linear",
    "amp": "auto",
}


def network(cfg, data, in_channels=None, frequency=30, num_classes=0):
    """The MLP or the U-Net for the data, shaped by cfg's width, blocks, mult, attention, patch."""
    if any(side % cfg.patch for side in data.shape[1:] or (1,)):
        raise UserError(f"--patch {cfg.patch} does not divide examples of the shape {data.shape}")
    if not data.is_image:
        return MLP(data.shape[0], None, cfg.width, cfg.blocks, num_classes=num_classes)
    c, side, _ = data.shape
    shape = cfg.width, cfg.mult, cfg.blocks, cfg.attention or ()
    options = {"patch": cfg.patch, "frequency": frequency, "num_classes": num_classes}
    return UNet(in_channels or c, c, side, *shape, dropout=cfg.dropout, **options)


def group_norm(channels):
    """32 groups as usual, fewer in a narrow layer: none has less than four channels."""
    return nn.GroupNorm(math.gcd(32, max(1, channels // 4), channels), channels)


def attention_heads(channels, head_channels):
    """As many heads as divide the channels, of at least head_channels each (or one head)."""
    most = max(1, channels // head_channels)
    return next(heads for heads in range(most, 0, -1) if channels % heads == 0)


def zeroed(layer):
    """The layer with zero weights: a residual branch that starts as nothing."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class Stage(nn.Module):
    """A residual block, scaled and shifted by the embedding, and attention if heads > 0."""

    def __init__(self, c_in, c_out, emb, dropout, heads, attend=None):
        super().__init__()
        self.norm_1 = group_norm(c_in)
        self.conv_1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(emb, 2 * c_out)
        self.norm_2 = group_norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = (attend or Attention)(c_out, heads) if heads else None

    def forward(self, x, emb, context=None):
        h = self.conv_1(F.silu(self.norm_1(x)))
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm_2(h), 1 + scale)
        h = self.conv_2(self.dropout(F.silu(h)))
        h = self.skip(x) + h
        return h if self.attention is None else self.attention(h, context)


class Attention(nn.Module):
    """Residual self-attention over the pixels, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.output = zeroed(nn.Linear(channels, channels))

    def forward(self, x, context=None):
        b, c, height, width = x.shape
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = self.qkv(h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = dot_product_attention(q, k, v)  # (B, heads, HW, C / heads)
        h = self.output(h.transpose(1, 2).flatten(2))
        return x + h.transpose(1, 2).unflatten(2, (height, width))


def dot_product_attention(q, k, v):
    """softmax(q kᵀ / sqrt(D)) v of (B, heads, N, D) each, by PyTorch's fused kernel.

    But that trains slowly in bfloat16 on a CPU: 5.5 ms against 1.8 at N = 49, B = 32.
    """
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x, emb, context):
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size):
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


# ---- ODE stepping -------------------------------------------------------------------------------


class SolverError(UserError):
    """The solver cannot go on: non-finite values, an underflow of the step, too many steps."""


# fmt: off
TABLEAUX = {  # Butcher's: nodes c, rows a, weights b
    "euler": ([0], [[]], [1]),
    "midpoint": ([0, 1/2], [[], [1/2]], [0, 1]),
    "heun": ([0, 1], [[], [1]], [1/2, 1/2]),
    "rk4": ([0, 1/2, 1/2, 1], [[], [1/2], [0, 1/2], [0, 0, 1]], [1/6, 1/3, 1/3, 1/6]),
    "dopri5": (  # Dormand & Prince (1980); Hairer, Norsett & Wanner, Table II.5.2
        [0, 1/5, 3/10, 4/5, 8/9, 1],
        [[],
         [1/5],
         [3/40, 9/40],
         [44/45, -56/15, 32/9],
         [19372/6561, -25360/2187, 64448/6561, -212/729],
         [9017/3168, -355/33, 46732/5247, 49/176, -5103/18656]],
        [35/384, 0, 500/1113, 125/192, -2187/6784, 11/84],
    ),
}
DOPRI5_ERROR = [71/57600, 0, -71/16695, 71/1920, -17253/339200, 22/525, -1/40]
DOPRI5_DENSE = [  # Hairer, Norsett & Wanner, II.6: the last coefficient of the interpolant
    -12715105075/11282082432, 0, 87487479700/32700410799, -10690763975/1880347072,
    701980252875/199316789632, -1453857185/822651844, 69997945/29380423,
]
# fmt: on


def odeint(f, x, t, method="dopri5", *, steps=None, rtol=1e-5, atol=1e-5, max_steps=100_000):
    """Solve dx/dt = f(x, t) from x at t[0], forwards or backwards in time.

    Args:
        f: field; gets the state and t of shape (B,), B = len(x); returns what the state is.
        x: a tensor (B, ...) or a tuple of them. Half-precision states are carried in float32.
        t: (t_0, t_1) as two numbers -> the state at t_1; a 1-D tensor of monotone times -> the
            states at all of them, stacked (T, B, ...). Times are float64 constants.
        method: "euler", "midpoint", "heun", "rk4" or "dopri5".
        steps: so many equal steps between neighbouring times. None, for dopri5 alone: adaptive,
            local error below atol + rtol |x| in the root mean square (of the tuple's worst
            component), with dense output of 4th order between the steps.

    Returns (solution, number of evaluations of f). Differentiable by backpropagation through x
    and f's parameters. Raises SolverError.
    """
    is_tuple = isinstance(x, tuple)
    times = [float(time) for time in t]
    if len(times) < 2 or sorted(set(times)) not in (times, times[::-1]):
        raise ValueError(f"two times or more, that rise or fall strictly, are needed, not {times}")
    if method not in TABLEAUX:
        raise ValueError(f"unknown method {method!r}: one of {', '.join(TABLEAUX)}")
    if steps is None and method != "dopri5":
        raise ValueError(f"{method} does not adapt its step: give steps")
    evaluations = 0

    def field(state, time):
        nonlocal evaluations
        evaluations += 1
        when = state[0].new_full(state[0].shape[:1], time)
        v = f(state, when) if is_tuple else (f(state[0], when),)
        return tuple(v_i.to(x_i.dtype) for v_i, x_i in zip(v, state, strict=True))

    start = x if is_tuple else (x,)
    start = tuple(x_i.float() if x_i.dtype.itemsize < 4 else x_i for x_i in start)
    if steps is None:
        parts = _dopri5(field, start, times, rtol, atol, max_steps)
    else:
        parts = _fixed_steps(field, start, times, TABLEAUX[method], steps)
    if isinstance(t, Tensor):
        solution = tuple(map(torch.cat, zip(*parts, strict=True)))
    else:
        solution = tuple(x_i[-1] for x_i in parts[-1])
    return (solution if is_tuple else solution[0]), evaluations


def solver_options(cfg):
    """odeint's keywords from cfg's solver, nfe (evaluations of a fixed step) and tol."""
    if cfg.solver == "dopri5":
        return {"method": "dopri5", "rtol": cfg.tol, "atol": cfg.tol}
    if cfg.nfe < evaluations_per_step(cfg.solver):
        raise UserError(f"--nfe {cfg.nfe} is less than one step of {cfg.solver}")
    return {"method": cfg.solver, "steps": cfg.nfe // evaluations_per_step(cfg.solver)}


def evaluations_per_step(method):
    return len(TABLEAUX[method][0])


def _advance(x, h, weights, k):
    """x + h sum_j weights_j k_j, for every component of the state."""
    for weight, k_j in zip(weights, k, strict=True):
        if weight:
            x = tuple(map(functools.partial(torch.add, alpha=h * weight), x, k_j))
    return x


def _step(field, x, t, h, tableau, k):
    """The state after a step; k = [field(x, t)] becomes the list of all its slopes."""
    nodes, rows, weights = tableau
    for node, row in zip(nodes[1:], rows[1:], strict=True):
        k.append(field(_advance(x, h, row, k), t + node * h))
    return _advance(x, h, weights, k)


def _fixed_steps(field, x, times, tableau, steps):
    """The states at the times, a list of tuples of (1, B, ...)."""
    states = [x]
    for a, b in itertools.pairwise(times):
        h = (b - a) / steps
        for t in (a + i * h for i in range(steps)):
            x = _step(field, x, t, h, tableau, [field(x, t)])
        states.append(x)
    if not all(x_i.is_meta or x_i.isfinite().all() for x_i in x):
        raise SolverError("the solution is not finite: take more steps, or look at the field")
    return [tuple(x_i[None] for x_i in state) for state in states]


def _dopri5(field, x, times, rtol, atol, max_steps):
    """The states at the times, a list of tuples of (n, B, ...), one for each step that saw any."""

    def ratio(v_i, a, b):
        return v_i / (atol + rtol * torch.maximum(a.abs(), b.abs()))

    @torch.no_grad()
    def size(v, x, x_new):  # the largest root mean square of the components, in tolerances
        sizes = [r.square().mean().sqrt() for r in map(ratio, v, x, x_new)]
        return torch.stack(sizes).max().item()

    t, *waiting = times
    end, states, k = times[-1], [tuple(x_i[None] for x_i in x)], [field(x, t)]
    h = _first_step(field, x, k[0], t, end, size)
    error, before, after_rejection = 0.0, 1.0, False  # `before`: the last accepted step's error
    for _ in range(max_steps):
        if abs(end - t) <= 1.01 * abs(h):
            h = end - t
        if t + h == t:
            cause = "" if math.isfinite(error) else ": the field returns non-finite values"
            raise SolverError(f"at t = {t:.6g} the step of dopri5 became too small{cause}")
        x_new = _step(field, x, t, h, TABLEAUX["dopri5"], k)
        k.append(field(x_new, t + h))
        with torch.no_grad():
            zero = tuple(map(torch.zeros_like, x))
            error = size(_advance(zero, h, DOPRI5_ERROR, k), x, x_new)
        if not error <= 1:  # rejected; also where the error is NaN
            h *= max(0.2, 0.9 * error**-0.2) if math.isfinite(error) else 0.2
            after_rejection = True
            del k[1:]
            continue
        if seen := [time for time in waiting if abs(time - t) <= abs(h)]:
            states.append(_dense(x, x_new, k, h, [(time - t) / h for time in seen]))
            del waiting[: len(seen)]
        if not waiting:
            return states
        x, t = x_new, t + h
        del k[:-1]  # the last slope of a step is the first of the next
        # Gustafsson's PI controller; Hairer, Norsett & Wanner, IV.2
        factor = 0.9 * max(error, 1e-10) ** -0.17 * before**0.04
        h *= min(1.0 if after_rejection else 10.0, max(0.2, factor))
        before, after_rejection = max(error, 1e-4), False
    raise SolverError(
        f"dopri5 took {max_steps} steps and stands at t = {t:.6g}: loosen rtol and atol"
    )


def _first_step(field, x, k_1, t, end, size):
    """Hairer, Norsett & Wanner, II.4: a first step from the sizes of x, x' and x''."""
    d_0, d_1 = size(x, x, x), size(k_1, x, x)
    if not (math.isfinite(d_0) and math.isfinite(d_1)):
        raise SolverError(f"the state or the field is not finite at the start, t = {t:.6g}")
    sign = 1 if end > t else -1
    h_0 = min(1e-6 if min(d_0, d_1) < 1e-5 else 0.01 * d_0 / d_1, abs(end - t))
    k_2 = field(_advance(x, sign * h_0, [1], [k_1]), t + sign * h_0)
    d_2 = size(tuple(map(torch.sub, k_2, k_1)), x, x) / h_0
    h_1 = max(1e-6, h_0 * 1e-3) if max(d_1, d_2) <= 1e-15 else (0.01 / max(d_1, d_2)) ** 0.2
    return sign * min(100 * h_0, h_1, abs(end - t))


def _dense(x, x_new, k, h, theta):
    """The states (n, B, ...) at n fractions theta of an accepted step; x_new itself at 1."""
    if theta == [1.0]:
        return tuple(b[None] for b in x_new)
    states = []
    for i, (a, b) in enumerate(zip(x, x_new, strict=True)):
        part = a.new_tensor(theta).view(-1, *[1] * a.ndim)  # (n, 1, ..., 1)
        rise = b - a
        bend = h * k[0][i] - rise
        last = h * sum(d * k_j[i] for d, k_j in zip(DOPRI5_DENSE, k, strict=True) if d)
        third = torch.addcmul(rise - h * k[-1][i] - bend, 1 - part, last)
        back = torch.addcmul(rise, -part, torch.addcmul(bend, part, third))
        states.append(torch.addcmul(b, part - 1, back))
    return tuple(states)


def hutchinson_probe(x, kind="rademacher"):
    """z like x with E[z zᵀ] = I: random signs (least variance) or a standard Gaussian."""
    return torch.randn_like(x) if kind == "gaussian" else torch.randn_like(x).sign()


def divergence(f, x, t, z=None, forward=False):
    """(v, div v) of v = f(x, t): (B, ...) and (B,). Row b of v may depend on row b of x alone.

    Exact without a probe, by one derivative per dimension; with a probe z like x Hutchinson's
    estimate zᵀ (dv/dx) z by one. Reverse mode by default; forward=True takes forward mode, which
    needs less memory, but not every operation has it. Differentiable where gradients are enabled.
    """
    if z is None:
        basis = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device)
        probes = [e.view_as(x[0]).expand_as(x) for e in basis]
    else:
        probes = [z]
    if forward:
        pairs = [torch.func.jvp(lambda x: f(x, t), (x,), (e,)) for e in probes]
        traces = ((e * pair[1]).flatten(1).sum(1) for e, pair in zip(probes, pairs, strict=True))
        return pairs[0][0], sum(traces)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        v = f(x, t)
        v = v + 0 * x  # so that a field that does not depend on x has a derivative too
        div = 0
        for i, e in enumerate(probes, 1):
            rest = create_graph or i < len(probes)
            (vjp,) = torch.autograd.grad(v, x, e, retain_graph=rest, create_graph=create_graph)
            div = div + (e * vjp).flatten(1).sum(1)
    return (v, div) if create_graph else (v.detach(), div.detach())


def log_likelihood(f, x, log_prior, t=(1.0, 0.0), *, z=None, **solver):
    """log p(x) of the flow dx/dt = f(x, t) that carries the prior at t[1] to x at t[0].

    log p(x) = log prior(x at t[1]) + the integral of div f from t[0] to t[1]  (Chen et al. 2018).
    z: None for the exact divergence, else a probe, held fixed over the solve. `solver`: odeint's
    keywords. Returns (log p in nats, (B,); the state at t[1]; number of evaluations).
    Call it under no_grad, unless log p is differentiated: the graphs of all evaluations are kept.
    """

    def augmented(state, time):
        return divergence(f, state[0], time, z)

    (x_0, integral), evaluations = odeint(augmented, (x, x.new_zeros(len(x))), t, **solver)
    return log_prior(x_0) + integral, x_0, evaluations


def standard_normal_log_prob(x):
    """log N(x; 0, I) in nats, (B, ...) -> (B,)."""
    return -0.5 * (x.square() + math.log(2 * math.pi)).flatten(1).sum(1)


def bits_per_dim(log_p, dims):
    """Nats of a density over [-1, 1]^dims -> bits per dimension of 8-bit data (bins of 1/128)."""
    return -log_p / (dims * math.log(2)) + 7


def standard_error(x):
    """Of the mean of independent values x (N,); None of a single one."""
    return (x.std() / math.sqrt(len(x))).item() if len(x) > 1 else None


def energy_distance(x, y):
    """Unbiased estimate of 2 E|X - Y| - E|X - X'| - E|Y - Y'| from (N, D) and (M, D) points."""
    n, m = len(x), len(y)
    a, b = torch.cdist(x, x), torch.cdist(y, y)  # on GPUs (TF32) no point is at 0 from itself
    within = (a.sum() - a.trace()) / (n * (n - 1)) + (b.sum() - b.trace()) / (m * (m - 1))
    return (2 * torch.cdist(x, y).mean() - within).item()


# ---- The run around a training loop --------------------------------------------------------------

LOG_EVERY = 50  # steps between lines of metrics.jsonl; the loss is read from the device only then
SAVE_EVERY = 600  # seconds


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def process_seed(cfg):
    """The seed of this process's stream of data and noise: far from those of other --seeds."""
    return cfg.seed + 1_000_003 * rank()


def setup(cfg):
    """Seed, choose the device, join torchrun's process group if there is one -> the device."""
    name = cfg.device
    if name == "auto":
        kinds = {"cuda": torch.cuda, "mps": torch.backends.mps}
        name = next((kind for kind, module in kinds.items() if module.is_available()), "cpu")
    launched = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1
    if launched and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(f"--device {name} is not to be had here: use auto or cpu") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if launched and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.set_float32_matmul_precision("high")  # TF32 where there is any
    torch.manual_seed(process_seed(cfg))
    return device


class Muon(torch.optim.Adam):
    """Adam, but the kernels of convolutions move by the orthogonal factor of their momentum.

    Muon (Jordan et al. 2024): of the momentum U S Vᵀ remains U Vᵀ, by five Newton-Schulz steps, at
    ten times Adam's learning rate. It learns more from an image, which counts where they are few.
    """

    def __init__(self, parameters, **options):
        kernels, others = [], []
        for p in parameters:
            (kernels if p.ndim == 4 and min(p.shape[:2]) > 4 else others).append(p)
        super().__init__([{"params": others}, {"params": kernels}], **options)

    @torch.no_grad()
    def step(self):
        group = self.param_groups[1]
        kernels = [p for p in group["params"] if p.grad is not None]
        if not kernels:
            return super().step()
        for p in kernels:
            if not self.state[p]:  # in Adam's words, so that it loads them
                self.state[p] |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p)}
        gradients = [p.grad for p in kernels]
        momenta = [self.state[p]["exp_avg"] for p in kernels]
        torch._foreach_mul_(momenta, 0.95)
        torch._foreach_add_(momenta, gradients)
        torch._foreach_add_(gradients, momenta, alpha=0.95)  # Nesterov's direction
        for p in kernels:
            p.grad = None  # so that Adam passes it over
        super().step()
        rows = [g.permute(0, 2, 3, 1).flatten(1) for g in gradients]  # views, if channels are last
        factors = [
            factor.view(len(p), *p.shape[2:], -1).permute(0, 3, 1, 2)
            for p, factor in zip(kernels, orthogonal_factors(rows), strict=True)
        ]
        torch._foreach_add_(kernels, factors, alpha=-10 * group["lr"])


def orthogonal_factors(matrices):
    """About U Vᵀ of each matrix U S Vᵀ of a list: singular values in [0.7, 1.2] but the smallest.

    Five steps x <- (a + b xxᵀ + c (xxᵀ)²) x; all are polynomials of the first xxᵀ, so that only
    its powers are taken, of all matrices whose shorter side is the same at once.
    """
    wide = [x.mT if x.shape[0] > x.shape[1] else x for x in matrices]
    norms = [norm + 1e-7 for norm in torch._foreach_norm(wide)]
    wide = torch._foreach_div(wide, norms)
    factors = [None] * len(wide)
    for side in {len(x) for x in wide}:
        same = [i for i, x in enumerate(wide) if len(x) == side]
        gram = torch.stack([wide[i] @ wide[i].mT for i in same])  # (N, side, side)
        product = torch.eye(side, dtype=gram.dtype, device=gram.device)
        for _ in range(5):
            step = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
            step.diagonal(dim1=1, dim2=2).add_(3.4445)
            gram, product = step @ gram @ step, step @ product
        for i, polynomial in zip(same, product, strict=True):
            factors[i] = polynomial @ wide[i]
    pairs = zip(factors, matrices, strict=True)
    return [f.mT if f.shape != x.shape else f for f, x in pairs]


class Run:
    """What stands around a training loop, so that the loop reads like the paper's algorithm:

        run = Run(cfg, network, device)
        for x, y in run.batches(data):
            run.step(loss(run.model, x))    # backward, clip, warm-up, Adam, EMA, log, checkpoint

    It writes config.json, metrics.jsonl and checkpoint.pt to cfg.out. A run that was killed at any
    moment and resumed ends with the same weights, bit for bit on a CPU with as many threads (on a
    GPU convolutions sum in no fixed order, and differ by rounding).

    A paper of several trainings makes one Run for each, in the same folder, and names the later
    ones by `stage`: each has cfg.steps steps, or its own, and a checkpoint-<stage>.pt. `optimizer`:
    "adam", "muon" or a function of the parameters. More --steps on --resume extend every stage
    of cfg.steps steps from where it stands.

    Attributes: `net` the network; `ema` its moving average, to sample from; `done` steps; `folder`.
    """

    def __init__(self, cfg, net, device, stage="", optimizer="adam"):
        self.cfg, self.device, self.stage, self.folder = cfg, device, stage, Path(cfg.out)
        self.file = self.folder / (f"checkpoint-{stage}.pt" if stage else "checkpoint.pt")
        self.done, self._losses, self._stop = 0, [], False
        processes, on_cpu = world_size(), device.type == "cpu"
        if cfg.batch_size % processes:
            raise UserError(f"--batch-size {cfg.batch_size} is to divide by {processes} processes")
        units = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        self.amp = cfg.amp == "on" or (cfg.amp == "auto" and on_cpu and units)
        # Convolutions like channels-last memory; on a CPU, GroupNorm in bfloat16 does not.
        slow = device.type == "mps" or (on_cpu and self.amp)
        layout = torch.preserve_format if slow else torch.channels_last
        self.net = net.to(device, memory_format=layout)
        self._forward = torch.compile(net) if cfg.compile else net
        if processes > 1:
            self._forward = nn.parallel.DistributedDataParallel(self._forward)
        self.ema = copy.deepcopy(net).eval().requires_grad_(False)
        self._parameters, self._ema_parameters = list(net.parameters()), list(self.ema.parameters())
        if optimizer in ("adam", "muon"):
            kind = Muon if optimizer == "muon" else torch.optim.Adam
            optimizer = functools.partial(kind, lr=cfg.lr, betas=(0.9, cfg.beta_2), fused=True)
        self.optimizer = optimizer(self._parameters)
        if stage:  # whether the stages before were trained or loaded, the noise is the same
            torch.manual_seed(process_seed(cfg) + zlib.crc32(stage.encode()))
        if cfg.sample:
            self._load(Path(cfg.sample).with_name(self.file.name) if stage else cfg.sample)
        elif cfg.resume and (self.file.exists() or not stage):
            self._load(self.file)
            if self.done > cfg.steps and not stage:
                raise UserError(f"--steps {cfg.steps}: {self.file} has done {self.done} already")
        self._open_folder()

    def model(self, *inputs):
        """The network in training: compiled, distributed, under autocast; the result is float32."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return self._forward(*inputs).float()

    def batches(self, data):
        """data.batch(n), such as (x, y), for every step up to cfg.steps."""
        for _ in self.steps():
            yield data.batch(self.cfg.batch_size // world_size())

    def steps(self):
        """The numbers of the steps up to cfg.steps. SIGINT or SIGTERM saves and exits: after the
        step, or in a distributed run after the next tenth one."""
        self.net.train()
        started_at = self.done
        self._saved_at = self._logged_at = time.monotonic()
        numbers = (signal.SIGINT, signal.SIGTERM)
        handlers = {number: signal.signal(number, self._on_signal) for number in numbers}
        progress = {"desc": self.stage or None, "total": self.cfg.steps, "initial": self.done}
        between = 0.1 if sys.stderr.isatty() else 30  # seconds between refreshes
        self.bar = tqdm(**progress, disable=rank() > 0, mininterval=between)
        try:
            while self.done < self.cfg.steps:
                yield self.done
            new_flags = self.cfg.resume and not self.stage  # for what comes after this stage
            if self.done > started_at or new_flags or not self.file.exists():
                self.save()
        finally:
            self.bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def step(self, loss):
        """One optimisation step on a scalar loss; raises UserError when the loss is not finite."""
        cfg = self.cfg
        self.optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if cfg.clip:
            nn.utils.clip_grads_with_norm_(self._parameters, cfg.clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = cfg.lr * self.schedule()
        self.optimizer.step()
        self.done += 1
        decay = min(cfg.ema or 0.0, (1 + self.done) / (10 + self.done))
        with torch.no_grad():
            torch._foreach_lerp_(self._ema_parameters, self._parameters, 1 - decay)
        self._losses.append(loss.detach())
        self.bar.update()
        if self.done % LOG_EVERY == 0 or self.done == cfg.steps:
            self._log(norm)
        save, stop = self._agree(time.monotonic() - self._saved_at > SAVE_EVERY, self._stop)
        if save or stop or (cfg.checkpoint_every and self.done % cfg.checkpoint_every == 0):
            self.save()
        if stop:
            self.bar.close()
            self.say(f"stopped at step {self.done}; --resume --out {self.folder} goes on")
            raise SystemExit(130)

    def schedule(self):
        """Linear warm-up from 0 to 1, then constant, or linear or cosine decay to 0 at the end."""
        cfg, n = self.cfg, self.done
        if n < cfg.warmup:
            return (n + 1) / cfg.warmup
        progress = (n - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
        falling = {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
        return falling.get(cfg.decay, 1.0)

    def _agree(self, *flags):
        """A distributed run decides together, every tenth step: any process's flag counts for all
        (torchrun waits 30 seconds for an interrupted process)."""
        if world_size() == 1:
            return flags
        if self.done % 10:
            return [False] * len(flags)
        votes = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return votes.tolist()

    def _check(self):
        """The losses since the last line of metrics, as numbers; a UserError if one is not."""
        losses = torch.stack(self._losses).tolist() if self._losses else []
        kept = f"{self.file} is the last good one" if self.file.exists() else "nothing was saved"
        for step, loss in enumerate(losses, self.done - len(losses) + 1):
            if not math.isfinite(loss):
                raise UserError(f"the loss is {loss} at step {step}; {kept}; try a smaller --lr")
        return losses

    def _log(self, norm):
        losses, self._losses = self._check(), []
        since, self._logged_at = self._logged_at, time.monotonic()
        mean, rate = sum(losses) / len(losses), len(losses) / (self._logged_at - since)
        self.bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
        figures = {"lr": self.optimizer.param_groups[0]["lr"], "grad_norm": norm.item()}
        self.record(step=self.done, loss=mean, **figures, steps_per_second=rate)

    def report(self, split, **figures):
        """Print evaluation figures and add them to metrics.jsonl."""
        self.record(split=split, step=self.done, **figures)
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())
        self.say(f"{split}: {', '.join(shown)}")

    def say(self, text):
        if rank() == 0:
            print(text, flush=True)

    def record(self, **record):
        """Add a line to metrics.jsonl."""
        if rank() == 0:
            record = {"stage": self.stage, **record} if self.stage else record
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")

    def _on_signal(self, number, frame):
        """The first signal asks for a checkpoint after this step, the next one ends at once."""
        self._stop = True
        signal.signal(number, signal.SIG_DFL)

    def save(self):
        """Write the checkpoint beside the old one, then put it in its place: never half a file."""
        self._check()
        if not all(p.isfinite().all() for p in self._parameters):
            raise UserError(f"the weights are not finite at step {self.done}; try a smaller --lr")
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type in ("cuda", "mps"):
            rng["device"] = getattr(torch, self.device.type).get_rng_state()
        every_rng = [rng] * world_size()
        if world_size() > 1:
            dist.all_gather_object(every_rng, rng)
        self._saved_at = time.monotonic()
        if rank() > 0:
            return
        state = {"script": self.cfg.script, "stage": self.stage, "step": self.done}
        state |= {"config": dataclasses.asdict(self.cfg), "rng": every_rng}
        state |= {"model": self.net.state_dict(), "ema": self.ema.state_dict()}
        state["optimizer"] = self.optimizer.state_dict()
        temporary = self.file.with_suffix(".tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.file)
        except (OSError, RuntimeError) as error:  # torch raises either for a disk that is full
            temporary.unlink(missing_ok=True)
            kept = "the one before is kept" if self.file.exists() else "and there is none before it"
            raise UserError(f"cannot write {self.file}, {kept}: {error}") from None

    def _load(self, path):
        state = load_checkpoint(path, self.cfg.script)
        if state.get("stage", "") != self.stage:
            raise UserError(f"{path} is of stage {state['stage']!r}: name the run's checkpoint.pt")
        try:
            self.net.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
        except RuntimeError:
            raise UserError(f"{path} does not fit: was it trained with another network?") from None
        self.done = state["step"]
        if self.cfg.sample:
            return
        groups = self.optimizer.param_groups
        options = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)  # the flags of this command, not the saved ones
        if len(state["rng"]) == world_size():
            rng = state["rng"][rank()]
            torch.set_rng_state(rng["cpu"])
            if "device" in rng and self.device.type in ("cuda", "mps"):
                getattr(torch, self.device.type).set_rng_state(rng["device"])
        else:  # as many streams as there are processes now
            stream = f"seed {self.cfg.seed}, process {rank()}, step {self.done}"
            torch.manual_seed(zlib.crc32(stream.encode()))

    def _open_folder(self):
        """Make the folder, write config.json, drop the metrics that this run will write again."""
        if rank() > 0:
            return
        metrics, temporary = self.folder / "metrics.jsonl", self.folder / "metrics.tmp"
        about = {"script": self.cfg.script, **dataclasses.asdict(self.cfg)}
        about |= {"python": platform.python_version(), "torch": torch.__version__}
        about["device"] = f"{self.device} ({platform.processor() or platform.machine()})"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self.stage:  # a later stage may change its own settings, not the run's
                with open(self.folder / "config.json", "x" if self.cfg.new else "w") as file:
                    file.write(json.dumps(about, indent=2) + "\n")
            lines = metrics.read_text().splitlines(True) if metrics.exists() else []
            temporary.write_text("".join(line for line in lines if self._is_past(line)))
            os.replace(temporary, metrics)
        except OSError as error:
            begun = isinstance(error, FileExistsError) and self.folder.is_dir()
            cause = "another run has just begun there" if begun else error.strerror
            raise UserError(f"cannot write to {self.folder}: {cause}; choose --out") from None

    def _is_past(self, line):
        """Whether a line of metrics.jsonl stands, and will not be written again."""
        try:
            record = json.loads(line)
            stage, step = record.get("stage", ""), record["step"]
        except (ValueError, AttributeError, KeyError):  # a killed run may have left half a line
            return False
        if stage != self.stage:
            return bool(self.cfg.resume or self.stage)
        going_on = self.done < self.cfg.steps
        return self.cfg.resume and step < self.done + ("split" not in record or going_on)

    def write_samples(self, draw):
        """cfg.num_samples of draw(n), x or (x, y), to samples.npz, in batches. arr_0: images uint8
        (N, H, W, C) or vectors float32 (N, D); arr_1, if y is given and not None: classes int64
        (N,). Public evaluators of FID read this layout.

        Every batch has a random stream of its own and is kept in a file of its own until all are
        drawn: the same command with the same --out goes on where it was interrupted.
        """
        total, size = self.cfg.num_samples, self.cfg.batch_size
        own = {"out": None, "resume": False, "done": self.done}
        settings = dataclasses.asdict(self.cfg) | own
        parts = self.folder / f"samples-{zlib.crc32(json.dumps(settings).encode()):08x}"
        parts.mkdir(exist_ok=True)
        files = [parts / f"{i}.npz" for i in range(0, total, size)]
        for i, file in enumerate(tqdm(files, "sampling", leave=False)):
            if file.exists():
                continue
            torch.manual_seed(zlib.crc32(f"seed {self.cfg.seed}, samples {i}".encode()))
            drawn = draw(min(size, total - i * size))
            x, *y = drawn if isinstance(drawn, tuple) else (drawn,)
            x = to_uint8(x).permute(0, 2, 3, 1) if x.ndim == 4 else x
            np.savez(parts / "tmp.npz", *(a.cpu().numpy() for a in (x, *y) if a is not None))
            os.replace(parts / "tmp.npz", file)
        path = self.folder / "samples.npz"
        batches = zip(*([*np.load(file).values()] for file in files), strict=True)
        np.savez(path, *map(np.concatenate, batches))
        shutil.rmtree(parts)
        self.say(f"wrote {total} samples to {path}")

    def finish(self):
        """Leave the process group. True where the evaluation goes on: in process 0."""
        first = rank() == 0
        if dist.is_initialized():
            dist.destroy_process_group()
        return first


# ---- Pictures -----------------------------------------------------------------------------------


def save_images(path, x, columns=8):
    """A grid of images in [-1, 1], (B, C, H, W), small ones enlarged."""
    grid = image_grid(x, columns, scale=max(1, 640 // (columns * x.shape[-1])))
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path)


def image_grid(x, columns=8, scale=1):
    """Images (B, C, H, W), in [-1, 1] or uint8, `scale` times as large -> uint8 (3, H', W')."""
    x = (x if x.dtype == torch.uint8 else to_uint8(x)).cpu()
    columns = min(columns, len(x))
    rows = math.ceil(len(x) / columns)
    missing = rows * columns - len(x)
    x = F.pad(x.expand(-1, 3, -1, -1), (1, 0, 1, 0, 0, 0, 0, missing), value=64)  # and lines
    grid = x.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    grid = F.pad(grid, (0, 1, 0, 1), value=64)
    return grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def heat_image(values, size=256):
    """Values >= 0, (S, S), first axis x to the right, second y upwards -> uint8 (3, size, size)."""
    anchors = [[8, 8, 32], [68, 15, 110], [170, 40, 110], [240, 110, 50], [255, 245, 170]]
    anchors = torch.tensor(anchors)
    top = values.flatten().kthvalue(int(0.995 * values.numel())).values.clamp(min=1e-12)
    level = (values / top).clamp(0, 1).T.flip(0) * (len(anchors) - 1)
    low = level.floor().clamp(max=len(anchors) - 2)
    part = (level - low)[..., None]
    rgb = anchors[low.long()] * (1 - part) + anchors[low.long() + 1] * part
    return F.interpolate(rgb.permute(2, 0, 1)[None], size=(size, size))[0].to(torch.uint8)


def density_image(points, bound=3.0, bins=128, size=256):
    """A 2-D histogram of points (N, 2) over [-bound, bound]²."""
    ends = [-bound, bound, -bound, bound]
    return heat_image(torch.histogramdd(points.cpu(), [bins, bins], range=ends).hist, size)


def trajectory_image(paths, bound=3.0, size=256):
    """Lines along paths (T, N, 2), from dark starts to bright ends."""
    canvas = Image.new("RGB", (2 * size, 2 * size), (8, 8, 32))
    draw = ImageDraw.Draw(canvas)
    xy = ((paths.cpu() / bound * torch.tensor([1.0, -1.0]) + 1) * size).tolist()
    for t, (start, end) in enumerate(zip(xy, xy[1:], strict=False)):
        light = t / max(1, len(xy) - 2)
        colour = (int(70 + 180 * light), int(60 + 130 * light), int(150 - 40 * light))
        for a, b in zip(start, end, strict=True):
            draw.line((*a, *b), fill=colour, width=2)
    canvas = canvas.resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(canvas).copy()).permute(2, 0, 1)


def chart(shapes, box, size=(256, 256), axes=None, legend=(), heat=None):
    """Shapes in a plane -> a picture, uint8 (3, H, W), drawn three times as large and shrunk.

    Args:
        shapes: drawn in order: ("line" | "fill", points (N, 2), colour, width), ("dots", points,
            a colour or a list of N, radius) or ("text", point (1, 2), colour, text). Colours are
            PIL's: "#rrggbb", "#rrggbbaa" or tuples.
        box: (left, right, bottom, top), the part of the plane that is shown.
        size: (width, height) of the plot in pixels; axes and legend come on top.
        axes: two labels, for which ticks, numbers and a grid are drawn. legend: (text, colour)s.
        heat: values >= 0 on a grid (S, S') over the box, beneath the shapes.
    """
    left, right, bottom, top = map(float, box)
    width, height = 3 * size[0], 3 * size[1]
    plot = Image.new("RGB", (width, height), "#fafafc")
    if heat is not None:
        pixels = heat_image(heat.cpu().float()).permute(1, 2, 0).numpy()
        plot = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(plot, "RGBA")

    def pixel(x, y):
        return (x - left) * width / (right - left), (top - y) * height / (top - bottom)

    columns, rows = [round_numbers(*ends) if axes else [] for ends in (box[:2], box[2:])]
    if heat is None:
        grid = [((x, bottom), (x, top)) for x in columns] + [((left, y), (right, y)) for y in rows]
        for start, end in grid:
            draw.line((*pixel(*start), *pixel(*end)), "#e9eaf0", 2)
    for kind, points, colour, extra in shapes:
        pixels = [pixel(x, y) for x, y in points.tolist()]
        if kind == "line":
            draw.line(pixels, colour, round(3 * extra), joint="curve")
        elif kind == "fill":
            draw.polygon(pixels, colour)
        elif kind == "text":
            draw.text(pixels[0], extra, colour, anchor="mm", font_size=36)
        else:
            colours = colour if isinstance(colour, list) else [colour] * len(pixels)
            for point, own in zip(pixels, colours, strict=True):
                draw.circle(point, 3 * extra, own)
    plot = plot.resize(size, Image.Resampling.LANCZOS)
    if axes or legend:
        marks = [(x, pixel(x, 0)[0] / 3) for x in columns], [(y, pixel(0, y)[1] / 3) for y in rows]
        plot = _framed(plot, *marks, axes or ("", ""), legend)
    return torch.from_numpy(np.asarray(plot).copy()).permute(2, 0, 1)


def _framed(plot, columns, rows, labels, legend):
    """The plot in a frame with numbers at (number, pixel)s, two labels and a legend above."""
    x_0, y_0, grey, black = 46, 24, "#555a66", "#15171f"
    x_1, y_1 = x_0 + plot.width, y_0 + plot.height
    page = Image.new("RGB", (x_1 + 12, y_1 + 34), "white")
    page.paste(plot, (x_0, y_0))
    draw = ImageDraw.Draw(page)
    draw.rectangle((x_0 - 1, y_0 - 1, x_1, y_1), outline="#b9bcc8")
    for number, x in columns:
        draw.text((x_0 + x, y_1 + 4), f"{number:.10g}", grey, anchor="ma", font_size=11)
    for number, y in rows:
        draw.text((x_0 - 5, y_0 + y), f"{number:.10g}", grey, anchor="rm", font_size=11)
    draw.text((x_0 + plot.width / 2, y_1 + 17), labels[0], black, anchor="ma", font_size=13)
    draw.text((4, 4), labels[1], black, font_size=13)
    at = x_0 + 14 + draw.textlength(labels[1], font_size=13)
    for text, colour in legend:
        draw.rectangle((at, 9, at + 11, 14), colour)
        draw.text((at + 15, 4), text, grey, font_size=12)
        at += 27 + draw.textlength(text, font_size=12)
    return page


def round_numbers(low, high):
    """About five round numbers between low and high."""
    raw = (high - low) / 5
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= 0.99 * raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def save_panels(path, *rows, gap=8):
    """Rows of titled pictures on a page; a row is a list of (title, uint8 (3, H, W))."""
    heights = [22 + max(image.shape[1] for _, image in row) for row in rows]
    width = max(sum(image.shape[2] + gap for _, image in row) for row in rows) - gap
    page = Image.new("RGB", (width, sum(heights) + gap * (len(rows) - 1)), "white")
    draw = ImageDraw.Draw(page)
    y = 0
    for row, height in zip(rows, heights, strict=True):
        x = 0
        for title, image in row:
            draw.text((x + 4, y + 3), title, fill="black", font_size=14)
            page.paste(Image.fromarray(image.permute(1, 2, 0).numpy()), (x, y + 22))
            x += image.shape[2] + gap
        y += height + gap
    page.save(path)
