"""Speed of one training step of I-JEPA on a CPU: ijepa.py against the authors' code, in images per second.

    git clone https://github.com/facebookresearch/ijepa AUTHORS
    pip install -r requirements.txt pyyaml
    python results/speed_ijepa.py --authors AUTHORS --image-size 32 --patch-size 4 --steps 10
    python results/speed_ijepa.py --authors AUTHORS --image-size 96 --patch-size 8 --steps 5

ViT-tiny, predictor of depth 6 and width 96, batch 128, random images. First the two are given the same weights and
masks and must return the same loss. Then they take turns, --steps steps at a time, --rounds times, at fp32 and at bf16
autocast. Prints one JSON line per precision and side, medians over the rounds of milliseconds per step:

crop    random crop of (0.3, 1) and normalisation: ours batch-wise from uint8, theirs torchvision on PIL images
masks   drawn in the same process: ours draw_masks, theirs the MaskCollator with its collation of the images
step    forward of both encoders and the predictor, loss, backward, AdamW, schedules, EMA
tokens  of an image, on average: in the two encoders, and in the predictor; the masks of the two differ a little

"ours, authors' masks" is ours with the masks of the authors' collator: its "step" compares at equal numbers of tokens.
"images_per_second" counts masks and step; "with_crop" the crop, too. In the authors' favour, what their loop does
beside is left out: DistributedDataParallel, gradient statistics, the CSV log, the reading of the loss. Their bf16 runs
under torch.autocast("cpu") and without loss scaling, since both are written for CUDA alone.
Their min_keep is 4, the collator's default: with the 10 of their configs it finds no block on a grid of 8 x 8.
"""
import argparse
import copy
import json
import logging
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import ijepa

BATCH, STEPS_OF_RUN = 128, 100_000             # the length of the run that the schedules are made for


class Ours:
    """One training step of ijepa.py as common.train makes it; masks: where those come from if not from itself."""

    def __init__(self, options, precision, masks=None):
        self.args = ijepa.arguments(["--optimizer", "adamw", "--vit", "tiny", "--num-targets", "4", "--predictor-depth", "6", "--predictor-width", "96", "--precision", precision,
                                     "--image-size", str(options.image_size), "--patch-size", str(options.patch_size)])
        ijepa.settle(self.args, STEPS_OF_RUN)
        self.model, self.collate = ijepa.JEPA(self.args).train(), masks
        self.optimizer = common.make_optimizer(self.model, self.args)
        self.generator, self.view, self.steps = torch.Generator().manual_seed(0), common.View((0.3, 1.0), p_flip=0.0, p_jitter=0.0, p_grey=0.0), 0

    def crop(self, images):
        return common.augment(images, self.view, self.args.image_size, self.generator)

    def masks(self, y):
        if self.collate:
            _, context, targets = self.collate([(image, 0) for image in y])
            return y, context[0], torch.stack(targets, dim=1)
        return y, *ijepa.draw_masks(self.args, len(y), self.generator)

    def loss(self, y, context, targets):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.args.precision == "bf16"):
            s_hat, s_y = self.model(y, context, targets)
            return ijepa.prediction_loss(s_hat, common.take(s_y, targets), self.args.loss)

    def step(self, y, context, targets):
        loss = self.loss(y, context, targets)
        for group in self.optimizer.param_groups:
            group["lr"] = common.learning_rate(self.steps, STEPS_OF_RUN, 1000, 5e-4)
        self.optimizer.param_groups[0]["weight_decay"] = common.weight_decay(self.steps, STEPS_OF_RUN, 0.04, 0.4)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        ijepa.update_target(self.model, self.args, self.steps / STEPS_OF_RUN)
        self.steps += 1
        return loss, y.shape[2] * y.shape[3] // self.args.patch_size**2 + context.shape[1], targets.shape[1] * (context.shape[1] + targets.shape[2])


class Authors:
    """One training step of facebookresearch/ijepa, the parts of src/train.py that compute."""

    def __init__(self, options, precision):
        from src.helper import init_model, init_opt
        from src.transforms import make_transforms
        self.collate, self.precision = authors_masks(options), precision
        self.encoder, self.predictor = init_model("cpu", options.patch_size, "vit_tiny", options.image_size, pred_depth=6, pred_emb_dim=96)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.optimizer, _, self.scheduler, self.wd_scheduler = init_opt(
            self.encoder, self.predictor, iterations_per_epoch=1000, start_lr=5e-7, ref_lr=5e-4, warmup=1, num_epochs=100, wd=0.04, final_wd=0.4)
        self.transform, self.steps = make_transforms(options.image_size, (0.3, 1.0)), 0

    def crop(self, images):
        return [self.transform(image) for image in images]

    def masks(self, images):
        (imgs, _), masks_enc, masks_pred = self.collate([(image, 0) for image in images])
        return imgs, masks_enc, masks_pred

    def loss(self, imgs, masks_enc, masks_pred):
        from src.masks.utils import apply_masks
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            with torch.no_grad():
                h = self.target_encoder(imgs)
                h = apply_masks(F.layer_norm(h, (h.size(-1),)), masks_pred)
            z = self.predictor(self.encoder(imgs, masks_enc), masks_enc, masks_pred)
            return F.smooth_l1_loss(z, h)

    def step(self, imgs, masks_enc, masks_pred):
        self.scheduler.step(), self.wd_scheduler.step()
        loss = self.loss(imgs, masks_enc, masks_pred)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            m = 0.996 + self.steps * 0.004 / STEPS_OF_RUN
            for param_q, param_k in zip(self.encoder.parameters(), self.target_encoder.parameters()):
                param_k.data.mul_(m).add_((1.0 - m) * param_q.detach().data)
        self.steps += 1
        context, target = masks_enc[0].shape[1], masks_pred[0].shape[1]
        return loss, self.encoder.patch_embed.num_patches + context, len(masks_pred) * (context + target)


def authors_masks(options):
    from src.masks.multiblock import MaskCollator
    return MaskCollator(input_size=options.image_size, patch_size=options.patch_size, pred_mask_scale=(0.15, 0.2), enc_mask_scale=(0.85, 1.0),
                        aspect_ratio=(0.75, 1.5), nenc=1, npred=4, min_keep=4)


def check(options, images):
    """Both sides at fp32 with the authors' weights and masks: the same numbers of parameters, the same loss."""
    ours, authors = Ours(options, "fp32", authors_masks(options)), Authors(options, "fp32")
    for mine, theirs in ((ours.model.context_encoder, authors.encoder), (ours.model.target_encoder, authors.target_encoder), (ours.model.predictor, authors.predictor)):
        weights = {}
        for name, value in theirs.state_dict().items():
            for old, new in (("patch_embed.proj", "embed"), ("predictor_proj", "project"), ("predictor_", ""), ("attn.", ""), ("mlp.", "")):
                name = name.replace(old, new)
            weights[name] = value
        weights["position"] = weights.pop("pos_embed")[0]
        mine.load_state_dict({name: value.reshape(mine.state_dict()[name].shape) for name, value in weights.items()})
    count = lambda *modules: sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)
    parameters = count(ours.model), count(authors.encoder, authors.predictor)
    y, context, targets = ours.masks(ours.crop(images))
    losses = ours.loss(y, context, targets).item(), authors.loss(y, [context], list(targets.unbind(1))).item()
    assert parameters[0] == parameters[1] and abs(losses[0] - losses[1]) < 1e-5 * losses[0], (parameters, losses)
    print(f"same loss {losses[0]:.6f} {losses[1]:.6f}, trained parameters {parameters[0]}", file=sys.stderr)


def measure(side, images, steps):
    """Milliseconds per step of every part, and tokens, averaged over `steps` steps."""
    sums, clock = [0.0] * 5, time.perf_counter
    for _ in range(steps):
        times = [clock()]
        y = side.crop(images)
        torch.manual_seed(side.steps)          # the authors' collator draws from the global generator: the same masks for whoever uses it
        times.append(clock())
        batch = side.masks(y)
        times.append(clock())
        loss, encoders, predictor = side.step(*batch)
        times.append(clock())
        parts = [1000 * (end - start) for start, end in zip(times, times[1:])]
        sums = [total + value for total, value in zip(sums, (*parts, encoders, predictor))]
    assert torch.isfinite(loss)
    return [total / steps for total in sums]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--authors", type=Path, required=True, help="a clone of facebookresearch/ijepa")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--patch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each side in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=("fp32", "bf16"), help="without bf16 hardware, fp32 alone: bf16 is emulated")
    options = parser.parse_args()
    sys.path.insert(0, str(options.authors.resolve()))
    import src.helper                          # sets up the log that the next line turns off
    logging.disable(logging.WARNING)

    torch.manual_seed(0)
    images = torch.randint(0, 256, (BATCH, 3, options.image_size, options.image_size), dtype=torch.uint8)
    pil = [torchvision.transforms.functional.to_pil_image(image) for image in images]
    check(options, images)
    for precision in options.precisions:
        sides = {"ours": (Ours(options, precision), images), "ours, authors' masks": (Ours(options, precision, authors_masks(options)), images),
                 "authors": (Authors(options, precision), pil)}
        results = {name: [] for name in sides}
        for side in sides.values():
            measure(*side, 2)                  # warm-up
        for _ in range(options.rounds):
            for name, side in sides.items():
                results[name].append(measure(*side, options.steps))
        for name, rounds in results.items():
            crop, masks, step, encoders, predictor = (statistics.median(column) for column in zip(*rounds))
            speeds = [1000 * BATCH / (row[1] + row[2]) for row in rounds]
            print(json.dumps({"side": name, "precision": precision, "images_per_second": round(statistics.median(speeds), 1),
                              "with_crop": round(statistics.median(1000 * BATCH / sum(row[:3]) for row in rounds), 1),
                              "runs": [round(speed, 1) for speed in speeds], "ms": {"crop": round(crop, 1), "masks": round(masks, 1), "step": round(step, 1)},
                              "tokens": {"encoders": round(encoders, 1), "predictor": round(predictor, 1)},
                              "image_size": options.image_size, "patch_size": options.patch_size, "batch": BATCH,
                              "threads": torch.get_num_threads(), "cores": os.cpu_count(), "torch": torch.__version__}), flush=True)


if __name__ == "__main__":
    main()
