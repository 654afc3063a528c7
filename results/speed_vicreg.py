"""Training speed on a CPU, the whole loop with data: vicreg.py against lightly 1.6, in source images per second.

    pip install -r requirements.txt "lightly==1.6.*"
    python results/speed_vicreg.py --data-dir CIFAR --width 64 --steps 4
    python results/speed_vicreg.py --data-dir CIFAR --width 16 --steps 20

CIFAR holds train/<class>/*, for example CIFAR-10 as JPEG or PNG. Prints one JSON line: of every side the median of
--rounds runs, and all of them; the sides take turns and every run is a process of its own. A run takes 2 * steps steps
of 256 images, of which the second half is timed. Run nothing beside it.

Common to all sides: the same images, ResNet-18 with the 3x3 stem, projector 2048-2048-2048, VICReg's loss with
(25, 25, 1), crops of (0.08, 1) to 32 px, flip, jitter (0.4, 0.4, 0.2, 0.1) with p 0.8, grey 0.2, solarize 0.1 on average.

ours            vicreg.py's own command line, at the precision it picks for this machine; AdamW
ours-fp32       the same with --precision fp32
ours-compile    the same as ours with --compile
lightly         the loop of lightly's example: fp32, SGD, VICRegTransform, DataLoader. Departs from it by a lower rate, lightly's own
                CIFAR ResNet, three layers in the head (the example has two) and images kept decoded in memory as PIL
lightly-bf16    the same under bf16 autocast, with channels-last memory
lightly-noblur  lightly-bf16 without the blur (p 0.5) that VICRegTransform has by default and vicreg.py leaves out at 32 px

lightly's sides run with the number of DataLoader workers that is fastest for each in a first trial of --workers.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import chain, zip_longest
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
BATCH, WIDTHS = 256, "2048-2048-2048"
OURS = {"ours": [], "ours-fp32": ["--precision", "fp32"], "ours-compile": ["--compile"]}
SIDES = (*OURS, "lightly", "lightly-bf16", "lightly-noblur")


def image_paths(folder, count):
    """The first `count` images of folder/<class>/*, one class after the other in turn."""
    classes = [sorted(path.iterdir()) for path in sorted(folder.iterdir()) if path.is_dir()]
    paths = [path for path in chain(*zip_longest(*classes)) if path]
    if len(paths) < count:
        sys.exit(f"{folder} holds {len(paths)} images; {count} are needed")
    return paths[:count]


def ours(args, flags):
    """images/s in the second epoch of a vicreg.py run on as many images as make args.steps steps."""
    with tempfile.TemporaryDirectory() as folder:
        parts = {"train": image_paths(args.data_dir / "train", args.steps * BATCH)}
        parts["test"] = parts["train"][:100]                  # judged after training, outside the time
        for part, paths in parts.items():
            for path in paths:
                link = Path(folder, part, path.parent.name, path.name)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.resolve())
        subprocess.run([sys.executable, ROOT / "vicreg.py", "--dataset", "folder", "--data-dir", folder, "--image-size", "32",
                        "--batch-size", str(BATCH), "--width", str(args.width), "--projector", WIDTHS, "--augmentation", "vicreg",
                        "--nu", "1", "--optimizer", "adamw", "--lr", "0.001", "--epochs", "2", "--eval-every", "0", "--out", f"{folder}/run", *flags],
                       check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
        return rows[1]["images_per_second"]


class InMemory(torch.utils.data.Dataset):
    """Decoded PIL images and a transform."""

    def __init__(self, paths, transform):
        self.images, self.transform = [Image.open(path).convert("RGB") for path in paths], transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i])


def lightly_model(width):
    from lightly.models import ResNetGenerator
    from lightly.models.modules.heads import VICRegProjectionHead
    layers = list(ResNetGenerator("resnet-18", width=width / 64).children())[:-1]                # as in lightly's CIFAR-10 benchmark
    backbone = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    return torch.nn.Sequential(backbone, VICRegProjectionHead(8 * width, 2048, 2048, num_layers=3))


def lightly(args, side):
    """images/s of the second args.steps of 2 * args.steps steps of lightly's training loop."""
    from lightly.loss import VICRegLoss
    from lightly.transforms import VICRegTransform
    bf16 = side != "lightly"
    transform = VICRegTransform(input_size=32, **{"gaussian_blur": 0.0} if side == "lightly-noblur" else {})
    data, workers = InMemory(image_paths(args.data_dir / "train", args.steps * BATCH), transform), args.workers[0]
    spare = 2 * workers + 2                                   # batches, so that the workers are busy to the end
    sampler = torch.utils.data.RandomSampler(data, replacement=True, num_samples=(2 * args.steps + spare) * BATCH)
    loader = torch.utils.data.DataLoader(data, BATCH, sampler=sampler, drop_last=True, num_workers=workers)
    model, criterion = lightly_model(args.width), VICRegLoss()
    model = model.to(memory_format=torch.channels_last) if bf16 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)                # 0.06, the example's, diverges at times
    for step, (x0, x1) in enumerate(loader):
        if step == args.steps:
            began = time.perf_counter()
        if step == 2 * args.steps:
            break
        if bf16:
            x0, x1 = (x.contiguous(memory_format=torch.channels_last) for x in (x0, x1))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            z0, z1 = model(x0), model(x1)
        loss = criterion(z0.float(), z1.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - began
    if not torch.isfinite(loss):
        sys.exit(f"{side}: the loss is {loss.item()}")
    return args.steps * BATCH / seconds


def measure(args, side, workers=0):
    """images/s of one run of one side, in a process of its own."""
    command = [sys.executable, __file__, "--data-dir", args.data_dir, "--width", args.width, "--steps", args.steps,
               "--workers", workers, "--one", side]
    run = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True)
    speed = float(run.stdout.split()[-1])
    print(f"{side} {f'with {workers} workers ' * (side not in OURS)}{speed:.1f} images/s", file=sys.stderr)
    return speed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--width", type=int, default=16, help="base channels of the ResNet")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a run, and as many before them (the images: 256 times as many)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="of lightly's DataLoader, to choose from")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--one", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(ours(args, OURS[args.one]) if args.one in OURS else lightly(args, args.one))
        return
    workers = {side: max(args.workers, key=lambda n: measure(args, side, n)) if side not in OURS and len(args.workers) > 1
               else args.workers[0] for side in args.sides}
    speeds = {side: [] for side in args.sides}
    for _ in range(args.rounds):
        for side in args.sides:
            speeds[side].append(measure(args, side, workers[side]))
    print(json.dumps({"images_per_second": {side: round(statistics.median(s), 1) for side, s in speeds.items()},
                      "runs": {side: [round(x, 1) for x in s] for side, s in speeds.items()},
                      "workers": {side: n for side, n in workers.items() if side not in OURS},
                      "width": args.width, "batch": BATCH, "steps": args.steps, "threads": torch.get_num_threads(),
                      "cores": os.cpu_count(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
