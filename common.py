"""What all methods share: command line, datasets, augmentations, encoder, training loop, k-NN.

Nothing in this file knows a method. Read a method's script first and look things up here.
"""
import argparse
import ctypes
import fcntl
import functools
import gc
import http.client
import itertools
import json
import math
import os
import pickle
import pickletools
import re
import resource
import shlex
import signal
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.transforms.functional import pil_to_tensor, rgb_to_grayscale
from tqdm import tqdm


# ---- Command line ----------------------------------------------------------------------------

class Unusable(ValueError):
    """The command line, the data or a checkpoint cannot be used: one line, exit code 2."""


class RunFailed(RuntimeError):
    """The run itself failed; the last good checkpoint is whole: one line, exit code 1."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds "(default: ...)" where the help does not say it itself; "off" for None."""

    def _get_help_string(self, action):
        text = action.help if "(default: " in action.help else super()._get_help_string(action)
        return text.replace("%(default)s", "off") if action.default is None else text


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, defaults in --help, and no abbreviated flags."""

    def __init__(self, description):
        super().__init__(description=description.splitlines()[0], allow_abbrev=False, formatter_class=HelpFormatter)

    def error(self, message):
        raise Unusable(message)

    def given(self, argv):
        """The values of argv's flags before the real parse: some change the defaults of others, which --help, ignored here, is to show."""
        argv = sys.argv[1:] if argv is None else argv
        return self.parse_known_args([word for word in argv if word not in ("-h", "--help")])[0]


def number(kind, low, high=1e12):
    """An argparse type: an int or float in [low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high}]")
        return value
    parse.__name__ = kind.__name__
    return parse


def widths(text):
    """An argparse type, of --projector: "2048-2048-2048" -> [2048, 2048, 2048]."""
    values = text.split("-")
    if not all(value.isdecimal() and 0 < int(value) <= 65536 for value in values):
        raise argparse.ArgumentTypeError(f"{text} is not a list of layer widths such as 512-512-512")
    return [int(value) for value in values]


def add_common_arguments(parser, **defaults):
    """Add the flags that every method has; `defaults` are the method's own."""
    add = parser.add_argument
    add("--dataset", choices=DATASETS, default="shapes", help="what to train on")
    add("--data-dir", default="data", help="where the dataset lies, or is downloaded to")
    add("--image-size", type=number(int, 8, 1024), help="side of a view in pixels (default: the dataset's own; folder: 224)")
    add("--skip-bad-images", action="store_true", help="of a folder: leave out images that cannot be read; when streaming, all are read once to find them")
    add("--stream", action="store_true", help="of a folder: read images from disk when needed; automatic where they would fill half the free memory")
    add("--holdout", action="store_true", help="judge on a tenth of train, held out, instead of on test: for choosing settings")
    add("--epochs", type=number(int, 1), help="passes over the data")
    add("--batch-size", type=number(int, 2), help="n, images per step")
    add("--lr", type=number(float, 0), help="peak learning rate for a batch of 256, scaled by batch size / 256")
    add("--weight-decay", type=number(float, 0), help="on weights only, never on biases and norms")
    add("--warmup-epochs", type=number(float, 0), help="epochs of linear warm-up before the cosine")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of weights, data order and augmentations")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    add("--precision", choices=("fp32", "bf16"), help="of the encoder (default: bf16 where the hardware has it)")
    add("--compile", action="store_true", help="torch.compile the model: worth its minute on long runs")
    add("--eval-every", type=number(int, 0), help="epochs between k-NN evaluations; 0: only after the last")
    add("--checkpoint-minutes", type=number(float, 0), default=10.0, help="minutes between checkpoints; there is one after every epoch, too")
    add("--out", help="folder of the run (default: runs/METHOD-DATASET)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.set_defaults(**defaults)


def parse(parser, argv=None):
    """Parse argv, settle device, precision, --out and image size, and join torchrun's processes. Raises Unusable."""
    args = parser.parse_args(argv)
    args.device = pick_device(args.device)
    args.precision = args.precision or ("bf16" if bf16_is_fast(args.device) else "fp32")
    args.image_size = args.image_size or DATASETS[args.dataset]
    args.out = args.out or f"runs/{args.method}-{args.dataset}"
    if args.device == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)           # it plans anew for every number of tokens, and masks have many
    if args.warmup_epochs > args.epochs:
        raise Unusable(f"argument --warmup-epochs: {args.warmup_epochs} is more than the {args.epochs} epochs of the run")
    check_writable(args.out, "argument --out")
    join_processes(args.device)
    return args


def check_writable(folder, what):
    """Raise Unusable, a line that begins with `what`, where no file can be put into `folder`, which need not be there yet."""
    try:
        existing = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    except OSError as error:
        raise Unusable(f"{what}: {error}") from error
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise Unusable(f"{what}: {existing} is not a folder that can be written to")


def pick_device(name):
    """"auto" -> the best device of this machine. Raises Unusable for one that it lacks."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, there in available.items() if there)
    if not available[name]:
        raise Unusable(f"argument --device: no {name} on this machine; use --device auto")
    return name


def bf16_is_fast(device):
    """Whether `device` multiplies bfloat16 matrices in hardware."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def memory_format(device):
    """Channels-last, in which convolutions are fastest; but not on mps, where BN's gradient of such maps is wrong (pytorch issue 175189)."""
    return torch.contiguous_format if device == "mps" else torch.channels_last


def keep_memory():
    """Have glibc keep the memory of freed tensors: given back, it would return at every step in pages that the system has to clear first."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)                    # M_MMAP_MAX: no tensor has a mapping of its own
        libc.mallopt(-1, -1)                   # M_TRIM_THRESHOLD: nothing goes back


def progress(*args, **options):
    """tqdm's bar, of the first process alone; on a terminal it moves twice a second, in a log file a few times a minute."""
    return tqdm(*args, **options, leave=False, mininterval=0.5 if sys.stderr.isatty() else 60, disable=process()[0] > 0)


@contextmanager
def denormals_flushed():
    """Inside, numbers below 1e-38 are 0: momentum fades to them, and an Intel CPU computes with them many times slower.

    Not outside: scipy's KDTree needs them.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def command_line(main):
    """Run main() with the exit codes of every script: 0 done, 1 the run failed, 2 unusable input."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))      # None where the shell closed it
    keep_memory()
    with denormals_flushed():
        torch.ones(2**20).sqrt()               # starts torch's other threads, which keep to it
    if main.__module__ == "__main__":          # so that eval_linear.py judges by this script, not by what its file may be by then
        sys.modules[Path(sys.argv[0]).stem] = sys.modules["__main__"]
    if os.environ.get("RANK", "0") not in ("0", ""):    # of torchrun's processes the first alone prints
        sys.stdout = open(os.devnull, "w")
    code = 1
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
        return sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except Unusable as error:
        code, line = 2, str(error)
    except RunFailed as error:
        line = str(error)
    except OSError as error:                   # a full disk or a closed pipe behind stdout, say
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())    # what is left to print would fail again
        line = f"{error}; what was saved is whole"
    except (MemoryError, RuntimeError) as error:
        line, signs = f"{error} What was saved is whole.", ("allocate memory", "out of memory", "ALLOC_FAILED")
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(sign in line for sign in signs):
            line = "out of memory; try a smaller --batch-size, --image-size, or network. What was saved is whole."
        elif "by peer" in line or "Broken pipe" in line:                     # gloo's: the connection was closed, or reset
            line = "another process has ended. What was saved is whole."
        elif "DataLoader worker" not in line:  # which are killed, in most cases for their memory or a small /dev/shm
            raise
    if code == 1 or int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"{Path(sys.argv[0]).name}: {' '.join(line.split())}", file=sys.stderr)
    sys.exit(code)


# ---- Datasets --------------------------------------------------------------------------------

DATASETS = {"shapes": 32, "cifar10": 32, "cifar100": 32, "stl10": 96, "folder": 224}  # image sizes

@dataclass
class Dataset:
    """Images [N, 3, S, S] uint8, each a tensor or a Stream, and, per label name, classes [N] int64. The first name is *the* label."""
    images: torch.Tensor                       # what to pre-train on, no labels needed
    train_images: torch.Tensor                 # the same, but for STL-10: its 5,000 labelled images
    train_labels: dict
    test_images: torch.Tensor
    test_labels: dict


def load_dataset(args, download=True):
    """The dataset that args name, resized to args.image_size, on args.device; without `download`, nothing is written to args.data_dir.

    Raises Unusable where the data is missing, empty or unreadable.
    """
    load = {"stl10": load_stl10, "folder": load_folder}.get(args.dataset, load_cifar)
    try:
        data = load_shapes(args) if args.dataset == "shapes" else load(args, download)
    except OSError as error:                   # a folder without classes or images, no permission, a name too long
        raise Unusable(f"argument --data-dir: {error}") from error
    shared = data.images is data.train_images
    if args.holdout:                           # every tenth training image plays the test image
        held = torch.arange(len(data.train_images)) % 10 == 0
        part = lambda where: (data.train_images[where], {name: y[where] for name, y in data.train_labels.items()})
        (data.train_images, data.train_labels), (data.test_images, data.test_labels) = part(~held), part(held)
    data.train_images, data.test_images = data.train_images.to(args.device), data.test_images.to(args.device)
    data.images = data.train_images if shared else data.images.to(args.device)
    return data


def resize(images, size):
    """[N, 3, H, W] uint8 -> [N, 3, size, size] uint8."""
    if images.shape[-2:] == (size, size):
        return images
    return torch.cat([torchvision.transforms.functional.resize(part, [size, size]) for part in images.split(1000)])


def torchvision_dataset(name, args, **options):
    """One of torchvision's datasets from args.data_dir, where download=True puts it if it is not there yet."""
    root = Path(args.data_dir)
    new = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        with one_at_a_time(root) if options["download"] else nullcontext():
            return getattr(torchvision.datasets, name)(root, **options)
    except (OSError, RuntimeError, EOFError, ValueError, http.client.HTTPException) as error:
        for folder in new:
            with suppress(OSError):            # only an empty one goes
                folder.rmdir()
        nor = ", nor can it be downloaded" * options["download"]
        raise Unusable(f"argument --data-dir: no usable {name} in {args.data_dir}{nor}: {error}") from error


@contextmanager
def one_at_a_time(folder):
    """Make the folder and let the processes of one machine in one at a time: so one downloads for all."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):                # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def load_cifar(args, download):
    name = args.dataset.upper()
    parts = [torchvision_dataset(name, args, train=train, download=download) for train in (True, False)]
    images = [resize(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), args.image_size) for part in parts]
    labels = [{"class": torch.tensor(part.targets)} for part in parts]
    for part, label in zip(parts, labels) if name == "CIFAR100" else ():
        with open(Path(part.root, part.base_folder, "train" if part.train else "test"), "rb") as file:    # torchvision has checked its MD5 sum
            label["superclass"] = torch.tensor(pickle.load(file, encoding="latin1")["coarse_labels"])
    return Dataset(images[0], images[0], labels[0], images[1], labels[1])


def load_stl10(args, download):
    parts = {split: torchvision_dataset("STL10", args, split=split, download=download) for split in ("unlabeled", "train", "test")}
    images = {split: resize(torch.from_numpy(part.data), args.image_size) for split, part in parts.items()}
    label = lambda split: {"class": torch.from_numpy(parts[split].labels).long()}
    return Dataset(images["unlabeled"], images["train"], label("train"), images["test"], label("test"))


def load_folder(args, download):
    """DIR/train/<class>/* and DIR/test/<class>/* (or val): decoded once into one uint8 tensor, or streamed where that is too large."""
    root = Path(args.data_dir)
    # ImageNet's test images have no classes, its val's do.
    has_classes = lambda part: part.is_dir() and any(entry.is_dir() for entry in os.scandir(part))
    test = root / ("val" if has_classes(root / "val") and not has_classes(root / "test") else "test")
    for part in (root, root / "train", test):
        if not part.is_dir():
            raise Unusable(f"argument --data-dir: no folder {part}; --dataset folder reads DIR/train/<class>/* and DIR/test/<class>/* (or val)")
    parts = {part: list_images(part, root / f"{part.name}-index.npz") for part in (root / "train", test)}
    names = [{os.fsdecode(name) for name in index["classes"]} for index in parts.values()]
    if names[0] != names[1]:
        raise Unusable(f"argument --data-dir: class folder {min(names[0] ^ names[1])} is in only one of {root / 'train'} and {test}")
    size = sum(len(index["paths"]) for index in parts.values()) * 3 * args.image_size**2
    stream, loaded = args.stream or size > free_memory(args.device) / 2, []
    for part, index in parts.items():
        images, new = Stream(part, index["paths"], args.image_size), index.pop("new", False)
        if not stream or args.skip_bad_images and "readable" not in index:
            new, (images, index["readable"]) = True, read_all(images, args.skip_bad_images, keep=not stream)
        labels = torch.from_numpy(index["targets"])
        if args.skip_bad_images and not index["readable"].all():
            if not index["readable"].any():
                raise Unusable(f"argument --data-dir: not one of the {len(images)} images in {part} can be read")
            if process()[0] == 0:
                print(f"{part}: skipped {(~index['readable']).sum()} of {len(images)} images that cannot be read", file=sys.stderr)
            images, labels = images[index["readable"]], labels[index["readable"]]
        if stream and new and download:
            try:
                write(root / f"{part.name}-index.npz", lambda file: np.savez(file, **index))
            except RunFailed as error:
                print(f"warning: every start lists all of {part}: {error}", file=sys.stderr)
        loaded += images, {"class": labels}
    return Dataset(loaded[0], *loaded)


def list_images(part, known):
    """All images below a folder of class folders, as arrays: "paths" and "targets" (class numbers) [N], and "classes".

    Beside them the "folders" and when each "changed". What load_folder kept of all this in the file `known` is returned
    while no folder has changed; "new" marks a fresh list. Raises Unusable or OSError.
    """
    with suppress(OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):     # there is none, or a damaged one
        index = dict(np.load(known))                                       # no pickle: loading it runs no code
        if [os.stat(os.fsencode(part) + b"/" + folder).st_mtime_ns for folder in index["folders"]] == index["changed"].tolist():
            return index
    seen, below = {}, lambda paths: np.array([os.fsencode(path)[len(os.fsencode(part)) + 1:] for path in paths])
    for folder, *_ in os.walk(part, followlinks=True):                     # as ImageFolder does: a link to a parent some 40 times over
        if (real := os.path.realpath(folder)) in seen:
            raise Unusable(f"argument --data-dir: {folder} leads to a folder that is in {part} already; remove the link")
        seen[real] = folder, os.stat(folder).st_mtime_ns
    listed = torchvision.datasets.ImageFolder(part)
    folders, changed = zip(*seen.values())
    return {"paths": below(path for path, _ in listed.samples), "targets": np.array(listed.targets), "new": True,
            "classes": np.array([os.fsencode(name) for name in listed.classes]), "folders": below(folders), "changed": np.array(changed)}


def free_memory(device):
    """Bytes for each process: its share of what is free here or, where less, allowed to this job (a container's or
    SLURM's cgroup), but no more than its GPU has free.
    """
    try:
        free = 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
    except (OSError, IndexError):              # not Linux: half of all is near enough
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    with suppress(OSError):
        group = Path("/sys/fs/cgroup" + Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip())
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):                            # no such file; "max": no limit
                free = min(free, int((folder / "memory.max").read_text()))
    free //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))                    # shared by torchrun's processes; each has a GPU of its own
    return min(free, torch.cuda.mem_get_info()[0]) if device == "cuda" else free


class Stream:
    """Images [N, 3, S, S] uint8 that stay in their files: stands for a tensor of them in a Dataset and in load_batches."""
    device = torch.device("cpu")               # where its indices are

    def __init__(self, root, paths, size):
        self.root, self.paths, self.size = root, paths, size  # an array: a list would be copied to every worker, object by object

    def __len__(self):
        return len(self.paths)

    def to(self, device):
        return self                            # load_batches moves each batch

    def __getitem__(self, i):
        """Image i [3, S, S], or a sentence where it cannot be read; for an array or tensor of indices or bools, a Stream of those."""
        if not isinstance(i, int):
            return Stream(self.root, self.paths[np.asarray(i)], self.size)
        path = os.path.join(self.root, os.fsdecode(self.paths[i]))
        try:                                   # shorter side to S, then the centre square
            with Image.open(path) as image:
                return pil_to_tensor(ImageOps.fit(upright_rgb(image), (self.size,) * 2, Image.BICUBIC))
        except Exception as error:             # Pillow's decoders raise anything on damaged bytes
            return f"cannot read the image {path}: {error}"


def read_all(images, skip, keep):
    """Decode a Stream once. Returns (images [N, 3, S, S] uint8, or without `keep` the Stream; [N] bool array, True where one can be read).

    Raises Unusable at the first that cannot be read, unless `skip`.
    """
    whole, readable = torch.empty(len(images) * keep, 3, images.size, images.size, dtype=torch.uint8), np.ones(len(images), bool)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = torch.arange(len(images)).split(5000)                      # a million tasks at once would fill a memory themselves
        decoded = (image for part in parts for image in pool.map(images.__getitem__, part.tolist()))
        for i, image in enumerate(progress(decoded, f"reading {images.root}", len(images))):
            readable[i] = not isinstance(image, str)
            if not readable[i] and not skip:
                pool.shutdown(cancel_futures=True)     # else all the others of the part are decoded first
                raise Unusable(f"argument --data-dir: {image}; --skip-bad-images goes on without it")
            if readable[i] and keep:
                whole[i] = image
    return whole if keep else images, readable


def load_batches(images, index_batches, device):
    """Yield images [b, 3, S, S] uint8 on `device` for each of index_batches, an iterable of indices [b] on images.device.

    Those of a Stream are read ahead by worker processes. Raises RunFailed at one that cannot be read.
    """
    if isinstance(images, torch.Tensor):
        yield from (images[index].to(device) for index in index_batches)
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(16, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    for batch in torch.utils.data.DataLoader(
            images, batch_sampler=(index.tolist() for index in index_batches), collate_fn=stack, num_workers=workers,
            pin_memory=device == "cuda", worker_init_fn=leave_to_trainer, generator=torch.Generator(),  # its own: else it draws from torch's
            multiprocessing_context="fork" if sys.platform == "linux" else None):  # Python 3.14's default imports torch in every worker
        if isinstance(batch, str):
            raise RunFailed(f"{batch}; what was saved is whole. Mend the file and go on by --resume; or, to leave out all such "
                            "images, remove any *-index.npz from --data-dir and start a new run with --skip-bad-images.")
        yield batch.to(device, non_blocking=device == "cuda")


def stack(images):
    """Images [3, S, S] -> [b, 3, S, S]; or the first sentence among them."""
    return next((image for image in images if isinstance(image, str)), None) or torch.stack(images)


def leave_to_trainer(worker):
    """In a worker process: signals are for the process that trains, and so is the lock on its folder."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    for lock in LOCKS:
        os.close(lock)


def upright_rgb(image):
    """A PIL image of any mode as RGB, turned as its EXIF data says; the first frame of an animation."""
    image.load()                               # damaged pixels end here; where the EXIF data alone is damaged, the image stays as it lies
    with suppress(Exception):
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode == "I" and not 0 <= np.asarray(image).min() <= np.asarray(image).max() <= 65535:
        raise ValueError("its pixels are no numbers from 0 to 65535")
    if image.mode.startswith("I"):             # 16-bit grey, which convert() would clip to 255
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


# ---- shapes: a small hierarchy with known labels, made on the fly ----

SHAPES = {"shape": 10, "style": 4, "colour": 8, "pose": 4, "count": 4, "distance": 3}  # factor: classes


def arc(x, y, radius, start, stop, steps=16):
    """Points on an arc around (x, y), angles in turns."""
    turns = np.linspace(start, stop, steps)
    return [(x + radius * np.cos(2 * np.pi * t), y + radius * np.sin(2 * np.pi * t)) for t in turns]


OUTLINES = [  # the ten shapes as polygons in [-1, 1]^2
    [(0, -1), (0.8, 0.9), (-0.8, 0.9)],                                                       # triangle
    arc(0, 0.45, 1, 0.5, 1),                                                                  # half-disc
    arc(-0.45, -0.3, 0.5, 0.42, 0.95) + arc(0.45, -0.3, 0.5, 0.55, 1.08) + [(0, 1)],          # heart
    arc(0, 0, 1, 0.1, 0.9) + arc(0.55, 0, 0.65, 0.82, 0.18),                                  # crescent
    [(0, -1), (0.85, 0), (0.3, 0), (0.3, 1), (-0.3, 1), (-0.3, 0), (-0.85, 0)],               # arrow
    [(-0.9, -0.9), (0.9, -0.9), (0.9, -0.35), (0.27, -0.35), (0.27, 0.95), (-0.27, 0.95), (-0.27, -0.35), (-0.9, -0.35)],  # tee
    [(-0.7, -0.95), (-0.1, -0.95), (-0.1, 0.35), (0.8, 0.35), (0.8, 0.95), (-0.7, 0.95)],     # ell
    [(-0.9, -0.85), (-0.4, -0.85), (-0.4, 0.4), (0.4, 0.4), (0.4, -0.85), (0.9, -0.85), (0.9, 0.9), (-0.9, 0.9)],  # cup
    arc(0, 0, 0.95, 0.11, 0.89, 24) + [(-0.1, 0)],                                            # disc with a wedge cut out
    arc(0, -0.4, 0.6, 0.29, 1.21, 24) + [(0.17, 1), (-0.17, 1)],                              # pin
]
LAYOUTS = np.array([  # by count, where each copy stands (y, x), in radii from the middle of the group
    [(0, 0)] * 4, [(0, -1), (0, 1)] * 2, [(-0.9, 0), (0.9, -1), (0.9, 1), (0, 0)], [(-1, -1), (-1, 1), (1, -1), (1, 1)]])
GRID = 192                                     # cells of a shape's distance table, over [-1.5, 1.5]^2


def signed_distances():
    """[10, GRID, GRID] float32: distance to each outline, negative inside, in units of the radius."""
    axis = (np.arange(GRID) + 0.5) / GRID * 3 - 1.5
    py, px = np.meshgrid(axis, axis, indexing="ij")
    tables = []
    for outline in OUTLINES:
        ends = np.round(np.array(outline), 3)  # rounded: cos and sin differ in their last bit between machines
        distance, inside = np.full((GRID, GRID), np.inf), np.zeros((GRID, GRID), bool)
        for (ax, ay), (bx, by) in zip(ends, np.roll(ends, -1, axis=0)):
            dx, dy = bx - ax, by - ay
            t = np.clip(((px - ax) * dx + (py - ay) * dy) / max(dx * dx + dy * dy, 1e-9), 0, 1)
            distance = np.minimum(distance, np.sqrt((px - ax - t * dx) ** 2 + (py - ay - t * dy) ** 2))
            if ay != by:                       # even-odd rule: a ray to the right crosses this edge
                inside ^= ((ay > py) != (by > py)) & (px < ax + (py - ay) * dx / dy)
        tables.append(np.where(inside, -distance, distance))
    return np.stack(tables).astype(np.float32)


def make_shapes(n, image_size, seed):
    """n images of 1 to 4 copies of one object on textured ground, and the six factors behind them.

    Returns images [n, 3, S, S] uint8 and {factor: [n] int64}. Factors are balanced and drawn
    independently. The bytes depend on the arguments alone: numpy's RandomState is frozen, and
    the drawing uses only operations that IEEE 754 rounds alike everywhere.
    """
    rng = np.random.RandomState(seed)
    labels = {name: rng.permutation(np.arange(n) % classes) for name, classes in SHAPES.items()}
    tables, images = signed_distances(), np.empty((n, 3, image_size, image_size), np.uint8)
    f32 = lambda *shape: rng.random_sample(shape).astype(np.float32)
    axis = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size
    hues = np.array([(230, 60, 50), (240, 150, 40), (235, 225, 60), (90, 200, 70),
                     (60, 200, 210), (70, 100, 240), (160, 80, 220), (240, 120, 190)], np.float32)
    for start in range(0, n, 256):
        y = {name: label[start:start + 256] for name, label in labels.items()}
        b = len(y["shape"])
        column = lambda values: np.asarray(values, np.float32).reshape(b, 1, 1)

        # Ground: a random dark colour, smooth patches on two scales, grain.
        ground = np.broadcast_to(20 + 100 * f32(b, 3, 1, 1), (b, 3, image_size, image_size)).copy()
        for cells, strength in ((3, 40), (7, 25)):
            noise, at = f32(b, 1, cells + 1, cells + 1) - 0.5, axis * cells
            i = at.astype(int)
            w = at - i.astype(np.float32)
            rows = noise[:, :, i] * (1 - w)[:, None] + noise[:, :, i + 1] * w[:, None]
            ground += strength * (rows[..., i] * (1 - w) + rows[..., i + 1] * w)
        ground += 20 * (f32(b, 3, image_size, image_size) - 0.5)

        # Object: lighter than its ground; radius, direction; copies side by side, anywhere.
        fill = hues[y["colour"]][..., None, None] * (0.8 + 0.3 * f32(b, 1, 1, 1))
        radius = column(np.array([0.22, 0.19, 0.16], np.float32)[y["distance"]] * (0.95 + 0.1 * f32(b)))
        turn = (y["pose"] - 1.5) / 24 + 0.02 * (rng.random_sample(b) - 0.5)
        cos, sin = (column(np.round(f(2 * np.pi * turn), 4)) for f in (np.cos, np.sin))
        spread = radius * np.where(column(y["count"]) > 0, np.float32(2.1), np.float32(1))                  # half the group's side
        centre = 0.5 + (2 * f32(2, b, 1, 1) - 1) * np.maximum(0.52 - spread, 0)                             # [2, b, 1, 1]
        for copy in range(4):
            place = LAYOUTS[y["count"], copy]                                                       # [b, 2]
            cy, cx = (centre[i] + 1.08 * radius * column(place[:, i]) for i in (0, 1))
            dy, dx = (axis[:, None] - cy) / radius, (axis[None, :] - cx) / radius                           # [b, S, S]
            u, v = cos * dx + sin * dy, cos * dy - sin * dx
            cell = [np.clip((t + 1.5) * (GRID / 3), 0, GRID - 1).astype(np.int32) for t in (v, u)]
            pixels = radius * image_size
            depth = -tables[y["shape"][:, None, None], cell[0], cell[1]] * pixels                           # in pixels
            inside = np.clip(depth + 0.5, 0, 1) * column(y["count"] >= copy)
            # style = 2 * striped + outlined: differences of lightness, so that they survive colour jitter.
            period = u * 1.5
            stripe = column(y["style"] // 2) * (period - np.floor(period) < 0.5)
            edge = column(y["style"] % 2) * np.clip(0.2 * pixels - depth + 0.5, 0, 1)
            paint = fill * (1 - 0.5 * stripe)[:, None]
            paint = paint + edge[:, None] * (255 - paint)
            ground += inside[:, None] * (paint - ground)
        images[start:start + b] = np.rint(np.clip(ground, 0, 255))
    return torch.from_numpy(images), {name: torch.from_numpy(label).long() for name, label in labels.items()}


def load_shapes(args):
    """20,000 + 4,000 images, the same for every --seed: the data is not part of the draw."""
    train, test = make_shapes(20000, args.image_size, 1), make_shapes(4000, args.image_size, 2)
    return Dataset(train[0], *train, *test)


# ---- Augmentations: one batch at a time, every image with its own draw -----------------------

@dataclass(frozen=True)
class View:
    """How one view is made: probabilities p_*, and ranges as torchvision's transforms take them."""
    crop_scale: tuple = (0.08, 1.0)            # share of the image's area; aspect ratio in (3/4, 4/3)
    p_flip: float = 0.5
    p_jitter: float = 0.8
    jitter: tuple = (0.4, 0.4, 0.2, 0.1)       # brightness, contrast, saturation, hue
    p_grey: float = 0.2
    p_blur: float = 0.0                        # sigma in (0.1, 2.0)
    p_solarize: float = 0.0                    # threshold 0.5


def draw_view(view, n, height, width, generator):
    """Draw the parameters of n views of [3, height, width] images: {name: [n, ...]}, ranges as in `view`.

    An operation that is not drawn has factor 1, hue 0 or sigma 0; sigma is None where none ever is. "order" alone
    is drawn once for all n: the sequence of the four colour operations.
    """
    device = generator.device
    # What the host needs to know comes from a generator of its own: reading the device's would wait for it.
    host = generator if device.type == "cpu" else torch.Generator().manual_seed(generator.initial_seed() + generator.get_offset())
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(n, *shape, generator=generator, device=device)
    happens = lambda p: uniform(0, 1) < p

    # Crop as RandomResizedCrop draws it: area and log aspect ratio, the first of ten attempts that fits, else the
    # largest crop (which torchvision centres).
    area = height * width * uniform(*view.crop_scale, 10)                                   # [n, 10]
    ratio = torch.exp(uniform(math.log(3 / 4), math.log(4 / 3), 10))
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = fits.float().argmax(1, keepdim=True)
    w, h = (torch.where(fits.any(1), side.gather(1, first)[:, 0], largest)
            for side, largest in ((w, min(width, round(height * 4 / 3))), (h, min(height, round(width * 4 / 3)))))
    top, left = (uniform(0, 1) * (height - h + 1)).floor(), (uniform(0, 1) * (width - w + 1)).floor()

    jitter, (b, c, s, hue) = happens(view.p_jitter), view.jitter
    factor = lambda strength: torch.where(jitter, uniform(max(0, 1 - strength), 1 + strength), 1.0)
    p = {"top": top, "left": left, "height": h, "width": w, "flip": happens(view.p_flip),
         "order": torch.randperm(4, generator=host).tolist() if view.p_jitter else [],
         "brightness": factor(b), "contrast": factor(c), "saturation": factor(s),
         "hue": torch.where(jitter, uniform(-hue, hue), 0.0), "grey": happens(view.p_grey),
         "sigma": torch.where(happens(view.p_blur), uniform(0.1, 2.0), 0.0), "solarize": happens(view.p_solarize)}
    return p if view.p_blur else {**p, "sigma": None}


def resampling_matrix(start, length, flip, size_in, size_out):
    """[n, size_out, size_in]: row i holds the weights of the input pixels that make output pixel i.

    Bilinear with antialiasing, as torchvision's resize of the cut-out [start, start + length).
    """
    ## A crop, its resize and its flip are linear in the image and separable: one matrix per axis
    ## does all three, each image with its own, on any device.
    scale = (length / size_out)[:, None, None]
    i = torch.arange(size_out, device=start.device)[None, :, None] + 0.5
    i = torch.where(flip[:, None, None], size_out - i, i)
    j = torch.arange(size_in, device=start.device) + 0.5 - start[:, None, None]             # position inside the cut-out
    weights = (1 - (j - i * scale).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((j > 0) & (j < length[:, None, None]))
    return weights / weights.sum(2, keepdim=True)


def blur_matrix(sigma, size):
    """[n, size, size]: Gaussian blur along one axis, reflected at the border; identity where sigma is 0.

    The kernel is a tenth of the image wide, as in SimCLR and BYOL: 23 at 224 px.
    """
    radius = max(1, size // 20)
    offset = torch.arange(-radius, radius + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (offset / sigma.clamp(min=1e-3)[:, None]) ** 2)               # [n, 2 radius + 1]
    kernel = kernel / kernel.sum(1, keepdim=True)
    at = (torch.arange(size, device=sigma.device)[:, None] + offset).abs()                  # [size, 2 radius + 1]
    at = torch.where(at < size, at, 2 * (size - 1) - at)
    return torch.zeros(len(sigma), size, size, device=sigma.device).scatter_add_(
        2, at.expand(len(sigma), -1, -1), kernel[:, None].expand(-1, size, -1))


def blend(x, other, factor):
    """factor * x + (1 - factor) * other, kept in [0, 1]; factor [n]."""
    factor = factor[:, None, None, None]
    return (factor * x + (1 - factor) * other).clamp_(0, 1)


def shift_hue(x, shift):
    """Turn the hue of x [n, 3, H, W] in [0, 1] by shift [n], in turns of the colour circle."""
    r, g, b = x.unbind(1)
    value = torch.maximum(torch.maximum(r, g), b)                                           # [n, H, W]
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    hue = torch.where(value == r, g - b, torch.where(value == g, 2 * chroma + b - r, 4 * chroma + r - g))
    hue = hue / chroma.clamp(min=1e-6) + 6 * shift[:, None, None]                           # in sixths of a turn
    k = hue[:, None] + channels((5.0, 3.0, 1.0), x.device)                                  # [n, 3, H, W]
    k = k - 6 * (k / 6).floor_()
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


def apply_view(images, p, size):
    """[n, 3, H, W] uint8 and parameters of draw_view -> views [n, 3, size, size] float32 in [0, 1]."""
    rows = resampling_matrix(p["top"], p["height"], torch.zeros_like(p["flip"]), images.shape[2], size)
    columns = resampling_matrix(p["left"], p["width"], p["flip"], images.shape[3], size)
    x = images.float().div_(255) @ columns.mT[:, None]                                      # [n, 3, H, size]
    x = rows[:, None] @ x                                                                   # [n, 3, size, size]
    operations = (lambda x: blend(x, 0, p["brightness"]),
                  lambda x: blend(x, rgb_to_grayscale(x).mean((2, 3), keepdim=True), p["contrast"]),
                  lambda x: blend(x, rgb_to_grayscale(x), p["saturation"]),
                  lambda x: shift_hue(x, p["hue"]))
    for i in p["order"]:
        x = operations[i](x)
    x = torch.where(p["grey"][:, None, None, None], rgb_to_grayscale(x), x)
    if p["sigma"] is not None:
        blur = blur_matrix(p["sigma"], size)[:, None]
        x = blur @ x @ blur.mT
    return torch.where(p["solarize"][:, None, None, None] & (x >= 0.5), 1 - x, x)


def augment(images, view, size, generator):
    """One view [n, 3, size, size], normalised float32 whatever the autocast, of images [n, 3, H, W] uint8."""
    (n, height, width), (rank, world) = images[:, 0].shape, process()
    ## On a CPU, parts that fit its caches take a sixth of the time that the whole batch takes at once.
    part = max(1, 2**17 // size**2) if images.device.type == "cpu" else n * world
    views, first = [], rank * n                # these n images are the rows first, first + 1, ... of the batch
    with torch.autocast(images.device.type, enabled=False):
        for start in range(0, n * world, part):
            p = draw_view(view, min(part, n * world - start), height, width, generator)
            low, high = max(start, first), min(start + part, first + n)
            if low < high:
                mine = {name: value if name == "order" or value is None else value[low - start:high - start] for name, value in p.items()}
                views.append(normalise(apply_view(images[low - first:high - first], mine, size)))
    return torch.cat(views)


def normalise(x):
    """[n, 3, H, W] in [0, 1] -> ImageNet's mean 0 and standard deviation 1 per channel."""
    return (x - channels((0.485, 0.456, 0.406), x.device)) / channels((0.229, 0.224, 0.225), x.device)


@functools.cache
def channels(values, device):
    """[3, 1, 1]: one value per channel. Kept, because a new tensor would wait for the device at every use."""
    return torch.tensor(values, device=device)[:, None, None]


# ---- Encoder ---------------------------------------------------------------------------------

class ResNet(nn.Module):
    """torchvision's residual blocks without the classifier, with a choice of stem and width.

    Up to a size of 64, and therefore on an earlier encoder's map, too, the stem is one 3x3 convolution; larger
    images get the standard 7x7 with stride 2 and max-pooling. The last BN of each block starts at zero.
    width: 8 or more; on a CPU without AVX-512, torch 2.14's 1x1 convolution with a stride, of channels-last maps with
    fewer channels, writes beyond its memory in the backward pass.
    """

    def __init__(self, arch, size, in_channels=3, width=64):
        super().__init__()
        block, depths = {"resnet18": (BasicBlock, (2, 2, 2, 2)), "resnet50": (Bottleneck, (3, 4, 6, 3))}[arch]
        if size <= 64:
            stem = [nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)]
        else:
            stem = [nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(width),
                    nn.ReLU(True), nn.MaxPool2d(3, stride=2, padding=1)]
            size = math.ceil(size / 4)
        self.stem, blocks, channels = nn.Sequential(*stem), [], width
        for i, depth in enumerate(depths):
            for j in range(depth):
                # Not on a map of one cell: there a stride changes nothing, but torch 2.15's bf16 kernels
                # leave the gradient of the taps that see only padding uninitialised.
                planes, stride, shortcut = width * 2**i, 2 if i > 0 and j == 0 and size > 1 else 1, None
                size, out = math.ceil(size / stride), planes * block.expansion
                if stride > 1 or channels != out:
                    shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
                blocks.append(block(channels, planes, stride, shortcut))
                nn.init.zeros_(getattr(blocks[-1], "bn3", blocks[-1].bn2).weight)
                channels = out
        self.blocks, self.channels, self.map_size = nn.Sequential(*blocks), channels, size
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        """[B, C, H, W] -> the map before pooling [B, channels, h, w]."""
        return self.blocks(self.stem(x))


def pool(y):
    """Average-pool a map [B, C, h, w] -> [B, C]."""
    return y.mean((2, 3))


VITS = {"micro": (96, 4, 3), "tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12),
        "large": (1024, 24, 16), "huge": (1280, 32, 16)}  # width D, depth, heads


class ViT(nn.Module):
    """A Vision Transformer without class token that encodes all patches of an image, or some of them."""

    def __init__(self, size, image_size, patch_size):
        super().__init__()
        self.width, depth, heads = VITS[size]
        self.patch_size = patch_size
        self.embed = nn.Linear(3 * patch_size**2, self.width)
        self.register_buffer("position", positions(image_size // patch_size, self.width))
        self.blocks = nn.Sequential(*(Block(self.width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(self.width, eps=1e-6)
        initialise(self)

    def forward(self, x, index=None):
        """[B, 3, H, W] -> features [B, N, D]; of the patches index [B, K] alone -> [B, K, D]."""
        x, position = patches(x, self.patch_size), self.position                                # [B, N, 3 p p], [N, D]
        if index is not None:
            x, position = take(x, index), position[index]                                       # [B, K, ...]
        return self.norm(self.blocks(self.embed(x) + position))


class Block(nn.Module):
    """A pre-norm transformer block: attention, then a perceptron four times as wide."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.proj = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, last=None):
        """[B, N, D] -> [B, N, D]; or of the `last` tokens alone, each of which still looks at all -> [B, last, D]."""
        B, N, D = x.shape
        n = last or N
        q, k, v = self.qkv(self.norm1(x)).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [B, heads, N, D / heads]
        x = x[:, -n:] + self.proj(attention(q[:, :, -n:], k, v).transpose(1, 2).reshape(B, n, D))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v for [B, heads, N, d], by the fused kernel, which holds no [N, N], where that is faster."""
    if q.requires_grad and q.device.type == "cpu" and k.shape[2] < 512:    # in bfloat16 the kernel's backward is slow
        return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def positions(grid_size, width):
    """[grid_size^2, width]: sin and cos of row and column at width / 4 frequencies, row-major."""
    frequency = 10000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequency                   # [grid, width / 4]
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)                                         # [grid, width / 2]
    rows, columns = wave[:, None].expand(-1, grid_size, -1), wave[None].expand(grid_size, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1).float()


def initialise(transformer):
    """Xavier's uniform weights, zero biases; the last layer of either branch of block l scaled by 1 / sqrt(2 l)."""
    ## The authors draw all weights with a standard deviation of 0.02 (which overwrites their scaling by depth). At width 768 that is near
    ## Xavier's, 0.023 to 0.036; with 4 x 4 px patches it shrinks a patch's content to a fifth of the position's size, and a JEPA learns positions.
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for depth, block in enumerate(transformer.blocks, 1):
        for layer in (block.proj, block.fc2):
            layer.weight.data.div_(math.sqrt(2 * depth))


def patches(x, p):
    """[B, 3, H, W] -> [B, N, 3 p p]: patches of p x p pixels, row-major."""
    return F.pixel_unshuffle(x, p).flatten(2).mT.contiguous()


def take(x, index):
    """x [B, N, D], index [B, ...] -> [B, ..., D]: per image, the rows that index names."""
    return x.take_along_dim(index.flatten(1)[..., None], dim=1).unflatten(1, index.shape[1:])


def count_parameters(module):
    return sum(p.numel() for p in module.parameters())


# ---- Many processes --------------------------------------------------------------------------
# Under torchrun each process works on its share of every batch. All draw the random numbers of the whole
# batch and use those of their share, and losses over the batch are of gathered embeddings. Together they
# compute what one process would (but for BN on a CPU, which torch cannot synchronise).

def join_processes(device):
    """Join the processes that torchrun started, if it did; on CUDA each takes a GPU of its own."""
    if "RANK" in os.environ and not dist.is_initialized():
        if device == "mps":
            raise Unusable("argument --device: processes of torchrun meet on cpu or cuda, not on mps")
        if device == "cuda":
            rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            if max(rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1))) > gpus:    # so that the first process, which alone prints, says so
                raise Unusable(f"torchrun's --nproc_per_node: each process takes a GPU of its own, and this machine has {gpus}")
            torch.cuda.set_device(rank)
        try:                                   # two hours: one process may download or decode while others wait
            dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(hours=2))
        except ValueError as error:            # RANK is set, by a cluster say, and the rest is not
            raise Unusable(f"environment variable RANK: start several processes by torchrun, or unset it ({error})") from error


def process():
    """(rank, world): the number of this process, and how many there are; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(x):
    """This process's n / world rows of x [n, ...], which every process has."""
    rank, world = process()
    return x.tensor_split(world)[rank]


def gather(z):
    """[n / world, ...] of every process -> [n, ...], on all, in order; its gradient is exact where all processes compute the same loss from it."""
    if not dist.is_initialized():
        return z
    (rank, world), sent = process(), z.detach().contiguous()
    parts = [torch.empty_like(sent) for _ in range(world)]
    dist.all_gather(parts, sent)
    if z.requires_grad:                        # in this process's own rows alone
        ## DistributedDataParallel takes the mean of the processes' gradients. Each comes through its process's share of the
        ## embeddings alone, so the mean would be 1 / world of the gradient that a single process computes.
        parts[rank] = sent + world * (z - sent)                           # z, with world times its gradient
    return torch.cat(parts)


def check_same(device, *parts):
    """Raise Unusable where the processes, on several machines say, find unequal numbers of images in `parts`."""
    counts = gather(torch.tensor([[len(images) for images in parts]], device=device))       # [world, parts]
    if (counts != counts[0]).any():
        raise Unusable(f"argument --data-dir: the processes find {counts.unique(dim=0).tolist()} images; every machine needs all of the same")


def average(value):
    """The mean of a tensor over all processes."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value / process()[1]


def from_first(value):
    """The first process's value, on all of them."""
    box = [value]
    if process()[1] > 1:                       # it waits for the device
        dist.broadcast_object_list(box)
    return box[0]


# ---- Optimisation ----------------------------------------------------------------------------

class LARS(torch.optim.Optimizer):
    """SGD with a momentum of 0.9 whose step is scaled, per weight tensor, by 0.001 ||w|| / ||gradient|| (You et al. 2017).

    Groups with lars=False (biases, norms) take plain momentum steps.
    """

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr, weight_decay=0.0, lars=True))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                g = p.grad
                if group["lars"]:
                    g = g + group["weight_decay"] * p
                    ratio = 0.001 * p.norm() / g.norm()
                    g = g * torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1.0)
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p)).mul_(0.9).add_(g)
                p.sub_(velocity, alpha=group["lr"])


class Muon(torch.optim.AdamW):
    """AdamW, but weight matrices take steps along their orthogonalised momentum (Jordan et al. 2024).

    The steps are scaled to the size of AdamW's, entries of about 0.2, so that one learning rate serves matrices and all else (Liu et al. 2025).
    Groups with muon=False (biases, norms, the mask token) take AdamW's steps.
    """
    ## A gradient matrix is nearly of low rank: AdamW learns a few directions and hardly moves along the others. With all
    ## singular values near 1, every direction learns at one rate. (torch.optim.Muon does the same matrix by matrix, in
    ## bfloat16: on a CPU without bfloat16 its work alone takes longer than a whole step of I-JEPA's micro ViT.)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}                      # matrices of one shape are orthogonalised together
            for p in (p for p in group["params"] if group["muon"] and p.grad is not None):
                state = self.state[p]
                if not state:                  # AdamW looks for a step when it loads a state
                    state["step"], state["exp_avg"] = torch.zeros(()), torch.zeros_like(p)
                momentum = state["exp_avg"].lerp_(p.grad, 0.05)
                g = p.grad.lerp(momentum, 0.95).flatten(1)                # Nesterov's, momentum 0.95; [m, n], a convolution's [m, channels h w]
                by_shape.setdefault(g.shape, []).append((p, g))
                p.grad = None                  # so that AdamW's own step, below, leaves it alone
            for shape, pairs in by_shape.items():
                for (p, _), direction in zip(pairs, orthogonalise(torch.stack([g for _, g in pairs]))):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction.view_as(p), alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))
        super().step()


def orthogonalise(g):
    """k matrices U S V^T in g [k, m, n] -> roughly their U V^T [k, m, n]: singular values of 0.68 to 1.2, the tiniest less."""
    ## A Newton-Schulz step sends each singular value s of x to 3.4445 s - 4.775 s^3 + 2.0315 s^5. Five bring all from 0.003 to 1 near 1.
    x = g if g.shape[1] <= g.shape[2] else g.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)              # now no s is above 1
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x if g.shape[1] <= g.shape[2] else x.mT


def make_optimizer(model, args):
    """AdamW, LARS or Muon; weight decay (and LARS's scaling, Muon's steps) for weights alone.

    Not for biases, norms and the mask token (which I-JEPA's authors' code decays).
    """
    weights = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if args.optimizer == "lars":
        return LARS([groups[0], {**groups[1], "lars": False}], lr=0.0)
    if args.optimizer == "muon":
        return Muon([{**groups[0], "muon": True}, {**groups[1], "muon": False}], lr=0.0, fused=args.device != "mps")
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=args.device != "mps")
    raise Unusable(f"argument --optimizer: there is no {args.optimizer}, only muon, adamw and lars")


def learning_rate(step, steps, warmup, peak):
    """Linear warm-up over `warmup` steps, then a cosine from peak to peak / 1000 at the last of `steps`, where two or more are left."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * progress)))


def weight_decay(step, steps, start, end):
    """A cosine from start at the first of `steps` to end at the last."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / max(1, steps - 1)))


# ---- Training --------------------------------------------------------------------------------

def train(args, model, training_step, data, after_step=None):
    """Train `model` on data.images and leave config, script, log, checkpoint and curves in args.out.

    training_step(model, images, args, generator) -> (loss, terms, embeddings): a scalar to minimise, its parts {name: scalar
    tensor}, the same names at every step, and {level: [n, d]} of all processes to watch for collapse, not scaled to unit length. It
    calls `model`, which may be wrapped for torchrun, and touches none of its attributes. after_step(model, args, progress), where
    given, gets the bare model after each update; progress goes from 0 to 1 over the run. A step's augmentations are
    seeded with (args.seed, step), an epoch's order with (args.seed, epoch): a resumed run draws what an undisturbed one does.
    Returns the last features of data.train_images and data.test_images, each {level: [N, D]}, or None where no step was left to do.
    Raises Unusable before anything is written, RunFailed later; SIGINT and SIGTERM save, then exit with 130 or 143.
    """
    check_same(args.device, data.images, data.train_images, data.test_images)
    if args.batch_size > len(data.images):
        raise Unusable(f"argument --batch-size: {args.batch_size} is more than the {len(data.images)} training images")
    for images in (data.images, data.train_images, data.test_images):
        if isinstance(images, torch.Tensor) and (images.dtype != torch.uint8 or images.shape[1:] != (3, args.image_size, args.image_size)):
            raise Unusable(f"the images are {images.dtype} {list(images.shape)}, not torch.uint8 from 0 to 255 "
                           f"[N, 3, {args.image_size}, {args.image_size}]")
    rank, world = process()
    if args.batch_size % world or args.batch_size < 2 * world:
        raise Unusable(f"argument --batch-size: {args.batch_size} images cannot be shared by {world} processes, two or more to each")
    out, device = Path(args.out), args.device
    newest, previous = (out / name for name in CHECKPOINTS)
    per_epoch = len(data.images) // args.batch_size
    steps, warmup = args.epochs * per_epoch, int(args.warmup_epochs * per_epoch)
    peak = args.lr * args.batch_size / 256
    if args.compile:
        try:
            torch.compile(torch.sin)(torch.ones(2, device=device))
        except RuntimeError as error:
            raise Unusable(f"argument --compile: torch.compile does not work on this machine: {str(error).splitlines()[0]}") from error
    if world > 1 and device == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device, memory_format=memory_format(device)).train()
    optimizer = make_optimizer(model, args)
    first, so_far, seconds, history, features = 0, {}, 0.0, [], None    # so_far, {term: its values}, and seconds are of this epoch

    with claimed(out, args.resume) if rank == 0 else nullcontext(), stop_signals() as signals, denormals_flushed(), \
            progress(total=per_epoch, unit=" images", unit_scale=args.batch_size) as bar:
        if args.resume:
            first, so_far, seconds, history = restore(args, model, optimizer, len(data.images))
        config = {**vars(args), "command": shlex.join(sys.argv), "torch": torch.__version__, "torchvision": torchvision.__version__}
        write(out / "config.json", lambda file: file.write(json.dumps(config, indent=2).encode()))
        keep_script(training_step, out, args.resume)
        if first == steps and rank == 0:
            tqdm.write(f"all {args.epochs} epochs in {out} are done: nothing is trained, they are judged again", file=sys.stderr)
        if history:
            write_log(history, out)                # the run may have been cut off between its checkpoint and its log
        forward = nn.parallel.DistributedDataParallel(model) if world > 1 else model
        forward = torch.compile(forward) if args.compile else forward
        generator = torch.Generator(device)
        unread, saved, began = [], time.monotonic(), time.perf_counter() - seconds
        names = (history[0] if history else so_far).keys() - LOGGED - OPTIONAL    # none in a new run

        for step, images in enumerate(load_batches(data.images, draw_batches(data.images, args, first, steps), device), first):
            epoch, i = divmod(step, per_epoch)
            if i == 0 or step == first:
                bar.set_description(f"epoch {epoch + 1}/{args.epochs}", refresh=False)
                bar.reset(per_epoch)
                bar.initial = bar.n = bar.last_print_n = i
                ask = i                                           # from which step on processes decide together
            generator.manual_seed(args.seed * 1_000_003 + step)
            with torch.autocast(device, torch.bfloat16, enabled=args.precision == "bf16"):
                loss, terms, embeddings = training_step(forward, images, args, generator)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, warmup, peak)
            decay_end = getattr(args, "weight_decay_end", args.weight_decay)
            optimizer.param_groups[0]["weight_decay"] = weight_decay(step, steps, args.weight_decay, decay_end)
            optimizer.zero_grad()
            loss.backward()
            if step == first and (idle := [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]):
                raise RunFailed(f"the loss does not reach {idle[0]}: use it, or set its requires_grad to False")
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda" and args.precision == "bf16"):
                optimizer.step()                                  # bf16 is for Muon's matrix products
            if after_step:
                after_step(model, args, step / max(1, steps - 1))
            if taken := terms.keys() & (LOGGED | OPTIONAL):
                raise RunFailed(f"{min(taken)} is a field of the log: give that term another name")
            names = names or set(terms)                           # not terms.keys(), which would hold this step's graph
            if terms.keys() != names:
                raise RunFailed(f"the terms of step {step} are {', '.join(sorted(terms))}, of those before "
                                f"{', '.join(sorted(names))}; return a zero tensor for one that is off")
            terms = {"loss": loss, **terms}
            if bad := [name for name, term in terms.items() if not isinstance(term, torch.Tensor) or term.ndim]:
                raise RunFailed(f"{bad[0]} is not a scalar tensor")
            unread.append(torch.stack([term.detach() for term in terms.values()]))
            bar.update()

            last = i + 1 == per_epoch
            if world > 1 and not last and i < ask:                # only every 20 steps or 5 s does the first process decide for all whether to save
                continue
            pace = (time.perf_counter() - began) / (i + 1)
            due = last or bool(signals) or time.monotonic() - saved > 60 * args.checkpoint_minutes
            save, ask = from_first((due, i + min(20, 1 + int(5 / pace))))
            if save or world > 1 or i % 20 == 0:                  # reading a value waits for the device
                collect(so_far, average(torch.stack(unread)).tolist(), list(terms), step)
                bar.set_postfix(loss=f"{unread[-1][0]:.3f}", refresh=False)
                unread = []
            if not save:
                continue
            if not all(torch.isfinite(value).all() for value in model.state_dict().values()):
                raise RunFailed(f"the weights are not finite after step {step}; what was saved is from before. Try a lower --lr.")
            seconds = time.perf_counter() - began
            if last:
                tenths = lambda values: np.array_split(values, min(10, per_epoch))
                row = {"epoch": epoch + 1, **{name: sum(values) / per_epoch for name, values in so_far.items()},
                       "lr": optimizer.param_groups[0]["lr"], "images_per_second": per_epoch * args.batch_size / seconds,
                       "peak_memory_mb": peak_memory_mb(device), "seconds": seconds,
                       "effective_rank": {level: effective_rank(z) for level, z in embeddings.items()},
                       "feature_std": {level: z.detach().float().std(0).mean().item() for level, z in embeddings.items()},
                       "curve": {name: [float(f"{part.mean():.4g}") for part in tenths(values)] for name, values in so_far.items()}}
                if step + 1 == steps or args.eval_every and (epoch + 1) % args.eval_every == 0:
                    features = [extract(model, images, args) for images in (data.train_images, data.test_images)]
                    label, y = next(iter(data.train_labels.items()))
                    row["knn"] = {level: knn(z, y, features[1][level], data.test_labels[label]) for level, z in features[0].items()}
                    features = features if step + 1 == steps else None     # while training goes on, the memory is its own
                history.append(row)
                so_far, seconds = {}, 0.0
            state = {"method": args.method, "config": vars(args), "images": len(data.images), "step": step + 1, "terms": so_far, "seconds": seconds,
                     "history": history, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            write(newest, lambda file: torch.save(state, file), keep=previous)
            saved = time.monotonic()
            if last:
                write_log(history, out)
                if rank == 0:
                    report(history, args.epochs, len(data.test_images))
                began = time.perf_counter()                       # the next epoch waits for its first batch, too
            if stop := from_first(signals[:1]):                   # asked for only now: it may have come while the features were judged
                bar.close()
                again = shlex.join(["python", *sys.argv] + ["--resume"] * (not args.resume))
                if rank == 0:
                    print(f"stopped after step {step + 1} of {steps}; to go on: {again}", file=sys.stderr)
                if world > 1:
                    dist.destroy_process_group()          # together: one that left alone would cut the others off
                sys.exit(128 + stop[0])
    return features


def draw_batches(images, args, first, steps):
    """Indices [args.batch_size / world] of this process's images of each step from `first` on; every epoch has its own order."""
    per_epoch = len(images) // args.batch_size
    for epoch in range(first // per_epoch, steps // per_epoch):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)).to(images.device)
        yield from map(share, order.split(args.batch_size)[max(0, first - epoch * per_epoch):per_epoch])


def collect(so_far, unread, names, step):
    """Append the terms of the last steps up to `step`, each a list of len(names), to so_far[name]. Raises RunFailed at one that is not finite."""
    for t, values in enumerate(unread, step + 1 - len(unread)):
        for name, value in zip(names, values):
            so_far.setdefault(name, []).append(value)
        if bad := [name for name in names if not math.isfinite(so_far[name][-1])]:
            term = bad[-1]                         # not the loss, which comes first, where a term that enters it is bad
            advice = "Try a lower --lr." if t else "The loss itself is at fault: no step was made yet."
            raise RunFailed(f"{term} is {so_far[term][-1]} at step {t}; what was saved is from before. {advice}")


def keep_script(training_step, out, resume):
    """Keep the script of training_step in `out`, so that a run says which code made it; on resuming, warn where the script has changed."""
    script = Path(getattr(sys.modules.get(training_step.__module__), "__file__", ""))
    if not script.is_file():                       # a notebook's cell
        return
    kept = out / f"{script.stem}-as-run.py"        # a name that no file of the user's has
    if not resume or not kept.exists():
        write(kept, lambda file: file.write(script.read_bytes()))
    elif kept.read_bytes() != script.read_bytes() and process()[0] == 0:
        tqdm.write(f"warning: {script.name} is not what it was when this run began: {kept}", file=sys.stderr)


LOCKS = []                                     # descriptors of the folder that this process holds


@contextmanager
def claimed(out, resume):
    """Hold the folder `out` for this process alone; the lock ends with the process, however that ends.

    Raises Unusable where another process holds it, or resume is False and a run, or a config.json of something else, is there already.
    """
    if resume and not out.exists():
        raise Unusable(f"argument --resume: no {out / CHECKPOINTS[0]}; there is no folder {out}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise Unusable(f"argument --out: {error}") from error
    LOCKS.append(folder)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Unusable(f"argument --out: another process is writing to {out}, or it cannot be locked: {error}") from error
        if not resume and any((out / name).exists() for name in (*CHECKPOINTS, "metrics.jsonl")):
            raise Unusable(f"argument --out: {out} already holds a run, or its log; --resume goes on with it, another --out starts afresh")
        if not resume and (out / "config.json").exists() and b'"method"' not in (out / "config.json").read_bytes():
            raise Unusable(f"argument --out: {out / 'config.json'} is no run's; another --out leaves it alone")
        yield
    finally:
        LOCKS.remove(folder)
        os.close(folder)


@contextmanager
def stop_signals():
    """A list that receives the first SIGINT or SIGTERM; the second ends the process at once.

    Under torchrun the second is ignored: torchrun passes on a signal that may have reached all processes already, and kills them after 30 s.
    """
    received = []

    def receive(signum, frame):
        received.append(signum)
        for each in handlers:
            signal.signal(each, signal.SIG_IGN if dist.is_initialized() else signal.SIG_DFL)

    handlers = {each: signal.signal(each, receive) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)


def restore(args, model, optimizer, images):
    """Load the checkpoint in args.out into model and optimizer. Returns step, so_far, seconds and history.

    images: how many there are to train on. Falls back on the checkpoint before, and says so. Raises Unusable where neither can be used.
    """
    out, per_epoch = Path(args.out), images // args.batch_size
    path, previous = (out / name for name in CHECKPOINTS)
    state = damage = None
    if process()[0] == 0:
        try:
            state = load_checkpoint(path, args.method)
        except Unusable as error:
            if not previous.exists():
                raise
            state, path, damage = load_checkpoint(previous, args.method), previous, error
    state = from_first(state)
    started, free = state["config"], {"data_dir", "out", "device", "precision", "compile", "eval_every", "checkpoint_minutes", "stream", "resume"}
    before = state.get("images", images)
    if other := [name for name in started if name not in free and started[name] != getattr(args, name, None)]:
        flags = ", ".join(f"--{name.replace('_', '-').strip('-')}" for name in other)
        now, then = (", ".join(str(values.get(name)) for name in other) for values in (vars(args), started))
        counted = f", on {before} images, not {images}" * (before != images)   # from which a method may derive a default
        raise Unusable(f"argument {flags}: {now}, but the run in {out} was started with {then}{counted}")
    if before != images:
        raise Unusable(f"argument --data-dir: {images} images to train on, but the run in {out} was started with {before}")
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state["optimizer"]["state"]})
        for group, p in ((group, p) for group in optimizer.param_groups for p in group["params"]):
            names = {"velocity"} if isinstance(optimizer, LARS) else {"step", "exp_avg"} if group.get("muon") else {"step", "exp_avg", "exp_avg_sq"}
            if optimizer.state[p].keys() != names or any(m.dtype != p.dtype or m.shape not in (p.shape, ()) for m in optimizer.state[p].values()):
                raise ValueError("the optimizer's moments are not those of its weights")
            for name, moment in optimizer.state[p].items():                # a fused step reads memory as it lies: mps lays maps out differently
                if moment.ndim:
                    optimizer.state[p][name] = torch.empty_like(p).copy_(moment)
    except (RuntimeError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise Unusable(f"{path}: its weights are not those of this model: {str(error).splitlines()[0]}") from error
    steps = len(next(iter(state["terms"].values()), ()))
    if (len(state["history"]), steps) != divmod(state["step"], per_epoch) or state["step"] > args.epochs * per_epoch:
        raise Unusable(f"{path}: its log has {len(state['history'])} epochs and {steps} steps, but its step number, {state['step']}, does not fit")
    if damage:
        tqdm.write(f"warning: {damage}; going on from {previous}", file=sys.stderr)
        with suppress(FileNotFoundError):           # kept, for it may be whole and the reading at fault
            os.replace(out / CHECKPOINTS[0], out / "checkpoint-unread.pt")
        os.replace(previous, out / CHECKPOINTS[0])  # else the next save would drop this
    return state["step"], state["terms"], state["seconds"], state["history"]


def report(history, epochs, tested):
    """One line on the terminal for the last epoch of history, and a warning where embeddings collapse or features get worse.

    tested: the number of images that k-NN accuracies are of.
    """
    row = history[-1]
    line = f"epoch {row['epoch']}/{epochs}  loss {row['loss']:.3f}  rank " + " / ".join(f"{rank:.1f}" for rank in row["effective_rank"].values())
    if "knn" in row:
        line += "  k-NN " + " / ".join(f"{100 * accuracy:.1f}" for accuracy in row["knn"].values())
    tqdm.write(f"{line}  {row['images_per_second']:.0f} images/s  {row['peak_memory_mb']:.0f} MB")
    for level, rank in row["effective_rank"].items():
        if rank < 2 and not any(past["effective_rank"][level] < 2 for past in history[:-1]):  # one direction is left, or none
            tqdm.write(f"warning: level {level} is collapsing: the effective rank of its embeddings is {rank:.2f}. "
                       "Try a lower --lr or, where the method has them, more weight on the variance term or a slower target encoder.",
                       file=sys.stderr)
    for level in row.get("knn", ()):
        scores = [past["knn"][level] for past in history if "knn" in past]
        fall = max(0.03, 2 / math.sqrt(tested))    # four times the sampling error, or more
        low = [score < best - fall for score, best in zip(scores, itertools.accumulate(scores, max))]
        if low[-1] and not any(low[:-1]):          # neither the loss nor the rank says so
            tqdm.write(f"warning: level {level} gets worse: its k-NN accuracy was {100 * max(scores):.1f} % and is {100 * scores[-1]:.1f} %. "
                       "Try fewer --epochs, a lower --lr or, where the method has them, more target blocks or a slower target encoder.", file=sys.stderr)


def peak_memory_mb(device):
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def effective_rank(z):
    """How many directions embeddings z [n, d] spread over: exp of the entropy of their covariance's spectrum.

    As Roy and Vetterli 2007 define it, on the eigenvalues of the covariance and one more, of size 1: the constant
    direction, in units of VICReg's gamma. So it is 1 where all embeddings have become one vector, even if a little
    noise is left, and at most min(n, d + 1). The log holds that of each epoch's last batch.
    """
    z = z.detach().cpu().double()              # squares of a run that diverges have no float
    eigenvalues = torch.linalg.svdvals(z - z.mean(0)).pow(2) / (len(z) - 1)
    p = torch.cat([eigenvalues, torch.ones(1)]) / (eigenvalues.sum() + 1)
    return torch.special.entr(p).sum().exp().item()


def write(path, save, keep=None):
    """save(file) into path so that a reader, even after a crash, finds the old file or the new one, never a part of one.

    The old file stays beside it under the name `keep`, where given (after a crash or failure perhaps under that name alone).
    Raises RunFailed where any of this fails, for a full disk say: the old file is then still there, whole.
    """
    if process()[0] > 0:                           # the first process writes for all
        return
    aside = path.with_name(path.name + ".tmp")
    try:
        aside.unlink(missing_ok=True)
        with open(aside, "xb") as file:            # x: not through a link that a stranger left in the folder
            save(file)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:       # torch.save wraps the one in the other
        with suppress(OSError):                    # of a file system that has become read-only
            aside.unlink(missing_ok=True)
        raise RunFailed(f"cannot write {path}: {error}; what was saved before is whole") from error


CHECKPOINTS = ("checkpoint.pt", "checkpoint-previous.pt")
LOGGED = {"epoch", "loss", "lr", "images_per_second", "peak_memory_mb", "seconds", "effective_rank", "feature_std"}
OPTIONAL = {"knn", "curve"}                     # not in every row; "curve": the terms in tenths of the epoch
# Only these, of what torch's loader lets in: the rest may ask for memory that is not in the file.
PICKLED = "collections OrderedDict|torch._utils _rebuild_tensor_v2|torch [A-Za-z0-9]+Storage"


def load_checkpoint(path, method=None):
    """A checkpoint written by train(), safe to load from a stranger: it runs no code, and what it declares takes no memory.

    Raises Unusable where it is missing, damaged or of another method.
    """
    fields = {"method": str, "config": dict, "step": int, "terms": dict, "seconds": float, "history": list, "model": dict, "optimizer": dict}
    number = lambda x: isinstance(x, (int, float))
    numbers = lambda x: isinstance(x, dict) and all(map(number, x.values()))
    lists = lambda x: isinstance(x, dict) and all(isinstance(y, list) and all(map(number, y)) for y in x.values())
    logged = {"effective_rank": numbers, "feature_std": numbers, "knn": numbers, "curve": lists}    # by level, or term; all else is one number
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > Path(path).stat().st_size:
                raise ValueError("it unpacks to more than its own size")
            if archive.testzip():
                raise ValueError("its bytes are not those that were written")
            pickled, = (archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))
        for opcode, name, _ in pickletools.genops(pickled):
            if "GLOBAL" in opcode.name and not re.fullmatch(PICKLED, str(name)):
                raise ValueError(f"it is not made of numbers, text and tensors alone, but holds {name}")
        state = {"terms": {}, **torch.load(path, map_location="cpu", weights_only=True)}       # older ones have no terms
        log, terms = state.get("history"), state["terms"]
        if not (all(isinstance(state.get(name), kind) for name, kind in fields.items())
                and all(isinstance(row, dict) and row.keys() - OPTIONAL == log[0].keys() - OPTIONAL >= LOGGED for row in log)
                and all(isinstance(name, str) and logged.get(name, number)(value) for row in log for name, value in row.items())
                and all(len({frozenset(row[name]) for row in log if name in row}) <= 1 for name in logged)
                and lists(terms) and len(set(map(len, terms.values()))) <= 1
                and all(isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() >= value.nbytes    # not one number for all of it
                        for values in (state["model"], *state["optimizer"].get("state", {}).values()) for value in values.values())):
            raise ValueError("its fields, its log or its weights are not as these scripts write them")
    except FileNotFoundError as error:
        raise Unusable(f"no checkpoint {path}; --resume goes on with a run, eval_linear.py judges one") from error
    except Exception as error:                 # foreign bytes can make torch.load, and the checks, raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise Unusable(f"{path}: its content is not a checkpoint of these scripts: {reason}") from error
    if method and state["method"] != method:
        raise Unusable(f"{path}: a checkpoint of {state['method']}.py, not of {method}.py")
    return state


def write_log(history, out):
    """metrics.jsonl and curves.png of all epochs so far."""
    write(out / "metrics.jsonl", lambda file: file.write("".join(json.dumps(row) + "\n" for row in history).encode()))
    write(out / "curves.png", lambda file: draw_curves({"": history}).savefig(file, format="png", dpi=100))
    gc.collect()                               # a figure is full of cycles: uncollected, those of 50 epochs hold 100 MB


def draw_curves(logs):
    """{name of a run: its log} as five plots over epochs.

    Loss and its terms (in tenths of an epoch), effective rank and spread of what is watched for collapse, k-NN accuracy.
    A curve has one colour in all runs, a run one style of line (from the fifth on with another marker).
    """
    figure = Figure(figsize=(22, 4), layout="constrained")
    axes = figure.subplots(1, 5)
    styles = itertools.cycle(marker + line for marker in ".x+s" for line in ("-", "--", ":", "-."))
    for (run, history), style in zip(logs.items(), styles):
        draw = lambda axis, k, name, points: axis.plot(*zip(*points), style, color=f"C{k % 10}", label=f"{run} {name}".strip())
        terms = [name for name in history[0] if name not in LOGGED | OPTIONAL]
        for k, name in enumerate(["loss", *terms]):
            parts = [(row["epoch"] - 1, row.get("curve", {}).get(name) or [row[name]]) for row in history]
            points = [(epoch + (i + 1) / len(part), value) for epoch, part in parts for i, value in enumerate(part)]
            draw(axes[min(k, 1)], max(k - 1, 0), name, points)
        for axis, field in zip(axes[2:], ("effective_rank", "feature_std", "knn")):
            rows = [row for row in history if field in row]
            for k, level in enumerate(rows[0][field] if rows else ()):
                draw(axis, k, f"level {level}", [(row["epoch"], row[field][level]) for row in rows])
    for axis, title in zip(axes, ("loss", "loss terms, unweighted", "effective rank", "standard deviation", "k-NN accuracy")):
        axis.set(title=title, xlabel="epoch", xlim=(0, None))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    axes[1].set_yscale("log" if all(min(curve.get_ydata()) >= 0 for curve in axes[1].lines) else "linear")
    return figure


# ---- Judging a frozen encoder ----------------------------------------------------------------

@torch.no_grad()
def extract(model, images, args):
    """Representations {level: [N, D] float32} of images [N, 3, S, S] uint8, a tensor or a Stream, by the model in evaluation mode."""
    check_same(args.device, images)
    training, features, done = model.training, {}, 0
    rank, world = process()
    n = math.ceil(len(images) / world)         # images of each process; the last one's share is filled up with the last image
    model.eval()
    for buffer in model.buffers() if world > 1 else ():            # BN's, which a CPU cannot synchronise: the checkpoint has the first process's
        dist.broadcast(buffer, 0)
    index = torch.arange(rank * n, (rank + 1) * n, device=images.device).clamp(max=len(images) - 1)
    size = 100 if args.device == "cpu" else 500    # what a CPU's cache holds
    for batch in load_batches(images, index.split(size), args.device):
        with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
            x = normalise(batch.float() / 255).contiguous(memory_format=memory_format(args.device))
            for level, y in model.representations(x).items():
                if not done:                   # all at once: kept piece by piece among what comes and goes, they split the memory up
                    features[level] = torch.empty(n, y.shape[1], device=y.device)
                features[level][done:done + len(y)] = y
        done += len(batch)
    model.train(training)
    features = {level: gather(y)[:len(images)] for level, y in features.items()}
    if bad := [level for level, y in features.items() if not torch.isfinite(y).all()]:
        raise RunFailed(f"the features of level {bad[0]} are not finite: the run has diverged. Try a lower --lr.")
    return features


def knn(features, labels, test_features, test_labels, k=80, temperature=0.1):
    """Top-1 accuracy in [0, 1] of the weighted k-nearest-neighbour vote (Wu et al. 2018, section 3.4).

    features [N, D], labels [N], the same for test. Each of the k neighbours most similar by cosine
    votes with weight exp(similarity / temperature). k and temperature are those of S-JEA's authors' code in pre-training (beside its linear layer: k = 200).
    """
    features, test_features = F.normalize(features, dim=1), F.normalize(test_features, dim=1)
    labels, test_labels = labels.to(features.device), test_labels.to(features.device)
    correct, k = torch.zeros((), device=features.device), min(k, len(features))
    for x, y in zip(share(test_features).split(1000), share(test_labels).split(1000)):
        similarity, neighbours = (x @ features.T).topk(k)                                   # [b, k]
        votes = torch.zeros(len(x), int(labels.max()) + 1, device=x.device)
        votes.scatter_add_(1, labels[neighbours], ((similarity - similarity[:, :1]) / temperature).exp())   # at most 1
        correct += (votes.argmax(1) == y).sum()
    return process()[1] * average(correct).item() / len(test_features)
