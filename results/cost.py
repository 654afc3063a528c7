"""What a step of sjea.py costs as work grows: images/s and peak memory by batch, image size, stacks and number of images.

    python results/cost.py [--device cuda] [--width 16]

Every row is a process of its own: random images, three steps to warm up, then steps for five seconds at least, at the
precision that the script picks. One thing changes at a time from 2 stacks, batch 256, 32 px and 50,000 images;
the rows of image size are of batch 64 and 5,000 images.
"""
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import sjea

BASE = {"batch_size": 256, "image_size": 32, "stacks": 2, "images": 50_000}
GROWTH = {"batch_size": (64, 128, 256, 512, 1024, 2048), "image_size": (32, 64, 96, 160, 224), "stacks": (1, 2, 3, 4),
          "images": (5_000, 50_000, 500_000)}


def measure(batch_size, image_size, stacks, images, device, width):
    """(images per second, peak memory in MB) of one setting."""
    common.keep_memory()                       # as every script does
    args = sjea.arguments(["--batch-size", str(batch_size), "--image-size", str(image_size), "--stacks", str(stacks),
                           "--width", str(width), "--device", device])
    x = torch.randint(256, (images, 3, image_size, image_size), dtype=torch.uint8, device=args.device)
    model = sjea.SJEA(args).to(args.device, memory_format=torch.channels_last).train()
    optimizer, generator = common.make_optimizer(model, args), torch.Generator(args.device)
    order, steps, began = torch.randperm(images, device=args.device), 0, None
    while began is None or time.perf_counter() - began < 5:
        if steps == 3:
            if args.device == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
        start = steps * batch_size % (images - batch_size + 1)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
            loss, *_ = sjea.training_step(model, x[order[start:start + batch_size]], args, generator.manual_seed(steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        steps += 1
    return (steps - 3) * batch_size / (time.perf_counter() - began), common.peak_memory_mb(args.device)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--width", type=int, default=16, help="base channels of the ResNet")
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print("{:.0f} {:.0f}".format(*measure(**args.row, device=args.device, width=args.width)))
        return
    print("| what grows | | images/s | peak memory, MB |\n|---|---|---|---|")
    for name, values in GROWTH.items():
        for value in values:
            command = [sys.executable, __file__, "--device", args.device, "--width", str(args.width), "--row"]
            speed, memory = subprocess.run([*command, json.dumps({**BASE, name: value} | ({"images": 5_000, "batch_size": 64} if name == "image_size" else {}))],
                                           stdout=subprocess.PIPE, text=True, check=True).stdout.split()
            print(f"| {name.replace('_', ' ')} | {value:,} | {speed} | {memory} |", flush=True)


if __name__ == "__main__":
    main()
