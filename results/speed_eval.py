"""Time to judge a frozen encoder on a CPU, k-NN and linear: eval_linear.py against lightly 1.6, in seconds.

    pip install -r requirements.txt "lightly==1.6.*"
    python vicreg.py --dataset folder --data-dir CIFAR --image-size 32 --epochs 1 --out runs/speed
    python results/speed_eval.py runs/speed/checkpoint.pt --data-dir CIFAR

CIFAR holds train/<class>/* and test/<class>/*. All sides judge the very same network on the same images, decoded in
memory. They take turns, --rounds times; one JSON line per side with the medians:

extract + knn   seconds to compute the features of all images, and the k-NN vote (k 80, temperature 0.1). Ours is
                common.extract and common.knn, lightly's its KNNClassifier under a Lightning Trainer
linear          seconds of the linear classifier on stored features, without augmentation. Ours is eval_linear's own:
                L-BFGS to the optimum. lightly's is its LinearClassifier given features (SGD, batch 256): one epoch
                measured, "linear_90_epochs" is the extrapolation to the 90 epochs that its documentation trains
augmented       images/s of the papers' protocol, a linear layer on new crops and flips, encoder in the loop. Ours is
                eval_linear.py --augmented, lightly's its LinearClassifier; --steps batches measured. "augmented_90_epochs"
                is the extrapolation to 90 epochs of all training images, validations left out
whole           ours alone: python eval_linear.py, from start to end; it reads the images, and judges the untrained
                encoder and raw pixels, too

lightly        fp32, as it comes; lightly-bf16: Lightning's bf16-mixed and channels-last memory
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torchvision
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common
import eval_linear
from lightly.transforms.utils import IMAGENET_NORMALIZE
from lightly.utils.benchmarking import KNNClassifier, LinearClassifier
from pytorch_lightning import Callback, Trainer
from torchvision import transforms as T

EPOCHS, CLASSES = 90, 10


def timed(f, *args):
    began = time.perf_counter()
    result = f(*args)
    return time.perf_counter() - began, result


def every(images, labels, count):
    """`count` images, evenly spread over the classes."""
    chosen = torch.arange(len(images)).float().mul(len(images) / min(count, len(images))).long()[:count].unique()
    return images[chosen], labels[chosen]


def ours(model, args, data, options):
    (x, y), (x_test, y_test) = data
    model.to(memory_format=torch.channels_last)
    extract, features = timed(lambda: [common.extract(model, images, args)["0"] for images in (x, x_test)])
    knn, knn_top1 = timed(common.knn, features[0], y, features[1], y_test)
    linear, (linear_top1, _) = timed(eval_linear.linear_probe, features[0], y, features[1], y_test)
    few = torch.arange(options.steps * 128) % len(x)          # the test images are judged after it: leave it two
    part = common.Dataset(x[few], x[few], {"class": y[few]}, x_test[:2], {"class": y_test[:2]})
    augmented, _ = timed(eval_linear.train_classifier, model, ["0"], part, "class", args, 1, 0.1, True)
    return {"extract + knn": extract + knn, "extract": extract, "knn": knn, "linear": linear, "knn_top1": knn_top1, "linear_top1": linear_top1,
            "augmented": len(few) / augmented, "augmented_90_epochs": EPOCHS * len(x) * augmented / len(few)}


class Encoder(torch.nn.Module):
    """The same network, as lightly wants it: images in, features out."""

    def __init__(self, model, memory_format):
        super().__init__()
        self.model, self.memory_format = model.to(memory_format=memory_format), memory_format

    def forward(self, x):
        return self.model.representations(x.contiguous(memory_format=self.memory_format))["0"]


class InMemory(torch.utils.data.Dataset):
    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images, labels.tolist(), transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.labels[i]


class Clock(Callback):
    """The time at the end of every batch, waiting for data included."""

    def __init__(self):
        self.ends = []

    def on_train_batch_end(self, *_):
        self.ends.append(time.perf_counter())


def lightly(model, data, options, pil, precision, workers):
    (x, y), (x_test, y_test) = data
    encoder = Encoder(model, torch.channels_last if precision == "bf16-mixed" else torch.contiguous_format)
    plain, normalise = [T.ToTensor(), T.Normalize(**IMAGENET_NORMALIZE)], dict(batch_size=256, num_workers=workers)
    trainer = lambda **more: Trainer(accelerator="cpu", devices=1, precision=precision, logger=False, enable_checkpointing=False,
                                     enable_progress_bar=False, enable_model_summary=False, **more)
    loaders = [DataLoader(InMemory(images, labels, T.Compose(plain)), **normalise) for images, labels in zip(pil, (y, y_test))]
    knn = KNNClassifier(encoder, CLASSES, knn_k=min(80, len(x)), knn_t=0.1, train_dataloader_idx=0, val_dataloader_idx=1)
    seconds, scores = timed(lambda: trainer().validate(knn, loaders, verbose=False))

    def train(classifier, loader, steps):
        clock = Clock()
        trainer(max_epochs=EPOCHS, max_steps=steps, callbacks=[clock]).fit(classifier, loader)
        return (clock.ends[-1] - clock.ends[1]) / (len(clock.ends) - 2)        # seconds of a batch, without the first two

    features = knn._train_features_tensor.T.contiguous()
    stored = DataLoader(TensorDataset(features, y), batch_size=256, shuffle=True, drop_last=True)
    linear = train(LinearClassifier(torch.nn.Identity(), 256, feature_dim=features.shape[1], num_classes=CLASSES), stored, max(3, len(stored))) * len(x) / 256
    crops = InMemory(pil[0], y, T.Compose([T.RandomResizedCrop(32, scale=(0.3, 1.0)), T.RandomHorizontalFlip(), *plain]))
    sampler = torch.utils.data.RandomSampler(crops, replacement=True, num_samples=(options.steps + 2 * workers + 2) * 256)
    augmented = train(LinearClassifier(encoder, 256, feature_dim=features.shape[1], num_classes=CLASSES), DataLoader(crops, sampler=sampler, drop_last=True, **normalise), options.steps + 2)
    return {"extract + knn": seconds, "knn_top1": next(value for name, value in scores[-1].items() if "knn_top1" in name),
            "linear, one epoch": linear, "linear_90_epochs": EPOCHS * linear, "augmented": 256 / augmented, "augmented_90_epochs": EPOCHS * len(x) / 256 * augmented}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--train", type=int, default=50000, help="training images")
    parser.add_argument("--test", type=int, default=10000, help="test images")
    parser.add_argument("--steps", type=int, default=40, help="batches of the augmented protocol")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0, help="of lightly's DataLoaders: take the fastest of 0, 1, 2")
    parser.add_argument("--sides", nargs="+", choices=("ours", "lightly", "lightly-bf16"), default=("ours", "lightly", "lightly-bf16"))
    parser.add_argument("--no-whole", action="store_true", help="leave eval_linear.py as a whole out")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    model, args = eval_linear.load(options.checkpoint, "cpu", str(options.data_dir))
    loaded = common.load_dataset(args, download=False)
    data = (every(loaded.train_images, loaded.train_labels["class"], options.train), every(loaded.test_images, loaded.test_labels["class"], options.test))
    pil = [[torchvision.transforms.functional.to_pil_image(image) for image in images] for images, _ in data]
    sides = {"ours": lambda: ours(model, args, data, options), "lightly": lambda: lightly(model, data, options, pil, "32-true", options.workers),
             "lightly-bf16": lambda: lightly(model, data, options, pil, "bf16-mixed", options.workers)}
    results = {name: [] for name in options.sides}
    for _ in range(options.rounds):
        for name in options.sides:
            results[name].append(sides[name]())
            print(name, {part: round(value, 3) for part, value in results[name][-1].items()}, file=sys.stderr)
    if not options.no_whole:
        with tempfile.TemporaryDirectory() as folder:         # eval_linear.py writes beside the checkpoint
            shutil.copy(options.checkpoint, folder)
            command = [sys.executable, ROOT / "eval_linear.py", f"{folder}/{options.checkpoint.name}", "--data-dir", options.data_dir, "--device", "cpu"]
            results["ours"][0]["whole"], _ = timed(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
    for name, rounds in results.items():
        print(json.dumps({"side": name, **{part: round(statistics.median(row[part] for row in rounds if part in row), 3) for part in rounds[0]},
                          "train_images": len(data[0][0]), "test_images": len(data[1][0]), "workers": options.workers, "precision": args.precision if name == "ours" else "bf16" if name == "lightly-bf16" else "fp32",
                          "threads": torch.get_num_threads(), "cores": os.cpu_count(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
