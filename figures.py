"""The papers' figures, from checkpoints, and a page to look around in the embedding.

    python figures.py runs/sjea-shapes/checkpoint.pt
    python figures.py runs/ijepa-cifar10/checkpoint.pt runs/cjepa-cifar10/checkpoint.pt --only attention

Writes PNG files and index.html beside the first checkpoint; further checkpoints are drawn into the same axes, or beside
the first (views, masks, predictions and index.html are of the first alone). All are drawn from test images (held-out ones
after --holdout) and the run's log.
"""
import base64
import contextlib
import copy
import importlib
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from sklearn.cluster import KMeans
from sklearn.manifold import TSNE
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

import common
import eval_linear

COLOURS = ["#332288", "#88ccee", "#44aa99", "#117733", "#999933", "#ddcc77", "#cc6677", "#882255", "#aa4499", "#777777"]  # Tol's "muted"
MARKERS = "os^vDP*X<>"                         # the next ten classes have the same colours and the next marker


@dataclass
class Run:
    """A checkpoint with its images and, per level, its features of them."""
    path: Path
    name: str
    args: object
    model: torch.nn.Module
    history: list
    images: torch.Tensor                       # [N, 3, S, S] uint8
    labels: dict                               # {name: [N]}
    features: dict                             # {level: [N, D]}


def load_run(path, options, shared=None):
    """The Run of a checkpoint, on at most --images test images; on those of `shared` where it had the same data."""
    model, args = eval_linear.load(path, options.device, options.data_dir)
    same = ("dataset", "data_dir", "image_size", "holdout")
    if shared and all(getattr(args, name) == getattr(shared.args, name) for name in same):
        images, labels = shared.images, shared.labels
    else:
        data = common.load_dataset(args, download=bool(options.data_dir))
        chosen = torch.randperm(len(data.test_images), generator=torch.Generator().manual_seed(0))[:options.images]
        images = torch.cat([*common.load_batches(data.test_images, chosen.split(500), args.device)])
        labels = {name: y[chosen] for name, y in data.test_labels.items()}
    history, features = common.load_checkpoint(path)["history"], common.extract(model, images, args)
    return Run(path, path.resolve().parent.name, args, model, history, images, labels, features)


def picture(image):
    """[3, H, W], uint8 or ImageNet-normalised -> [H, W, 3] in [0, 1]."""
    image = image.cpu()
    if image.dtype != torch.uint8:
        image = (image * torch.tensor([0.229, 0.224, 0.225])[:, None, None] + torch.tensor([0.485, 0.456, 0.406])[:, None, None]) * 255
    return image.permute(1, 2, 0).float().clamp(0, 255).numpy() / 255


def panels(rows, columns, size):
    figure = Figure(figsize=(size * columns, size * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    return figure, axes


def embed(features):
    """t-SNE of features [N, D] by the cosine between them -> [N, 2] in [0, 1]; the middle where all are one point."""
    features = torch.nn.functional.normalize(features.float(), dim=1).cpu().numpy()
    if np.ptp(features, axis=0).max() < 1e-6:
        return np.full((len(features), 2), 0.5)
    points = TSNE(perplexity=min(30, len(features) / 4), init="pca", random_state=0).fit_transform(features)
    return (points - points.min(0)) / (np.ptp(points, axis=0) + 1e-9)


# ---- figures: each takes the runs and returns a Figure, or None where it does not apply ------

def tsne(runs):
    """Every level's map of the test images, coloured by class (S-JEA Figure 2)."""
    columns = [(run, level) for run in runs for level in run.features]
    figure, axes = panels(1, len(columns), 5)
    for axis, (run, level) in zip(axes.flat, columns):
        points, (label, y) = embed(run.features[level]), next(iter(run.labels.items()))
        for c in y.unique().tolist():
            axis.scatter(*points[(y == c).numpy()].T, s=9, label=f"{c}", color=COLOURS[c % 10], marker=MARKERS[c // 10 % 10])
        axis.set(title=f"{run.name}: level {level}, t-SNE by {label}")
    classes = {int(c): handle for axis in axes.flat for handle, c in zip(*axis.get_legend_handles_labels())}
    if len(classes) <= 100:                    # beyond, their styles repeat
        ncols, title = -(-len(classes) // 20), " / ".join(dict.fromkeys(next(iter(run.labels)) for run in runs))
        figure.set_figwidth(figure.get_figwidth() + 0.6 * ncols)
        figure.legend([classes[c] for c in sorted(classes)], sorted(classes), title=title, loc="outside right center", ncols=ncols, markerscale=2)
    return figure


def one_class(runs):
    """The first class alone, its images drawn at their points: are there groups within it? (S-JEA Figure 3)"""
    columns = [(run, level) for run in runs for level in run.features]
    figure, axes = panels(1, len(columns), 8)
    for axis, (run, level) in zip(axes.flat, columns):
        label, y = next(iter(run.labels.items()))
        chosen = (y == y.min()).nonzero()[:150, 0]
        for i, point in zip(chosen.tolist(), embed(run.features[level][chosen])):
            box = OffsetImage(picture(run.images[i]), zoom=26 / run.images.shape[-1])
            axis.add_artist(AnnotationBbox(box, point, frameon=False, pad=0))
        axis.set(title=f"{run.name}: level {level}, t-SNE of {label} {int(y.min())} alone", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    return figure


def covariance(runs):
    """The covariance term of every stack over training; give a second run with a lower --nu to compare (S-JEA Figure 4)."""
    terms = lambda row: {name: value for name, value in row.items() if name.startswith("covariance")}
    return over_epochs(runs, "covariance term c(Z) + c(Z'), unweighted", terms)


def accuracy(runs):
    """k-NN accuracy over training, all runs on one axis (C-JEPA's convergence figure)."""
    return over_epochs(runs, "k-NN accuracy, %", lambda row: {f"level {level}": 100 * value for level, value in row.get("knn", {}).items()})


def compare(runs):
    """curves.png of two runs and more in one: what did a change do to the loss, its terms, the ranks, the accuracy?"""
    logs = {run.name: run.history for run in runs if run.history}
    return common.draw_curves(logs) if len(logs) > 1 else None


def over_epochs(runs, what, values):
    """Curves over epochs of every run: values(row of its log) -> {name: value}."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for k, run in enumerate(runs):
        rows = [(row["epoch"], values(row)) for row in run.history if values(row)]
        for j, name in enumerate(rows[0][1] if rows else ()):
            axis.plot([epoch for epoch, _ in rows], [value[name] for _, value in rows], label=f"{run.name}: {name}",
                      color=COLOURS[(3 * k + 4 * j) % 10], marker=MARKERS[j % 10], linestyle=["-", "--", ":", "-."][(j % 2 + j // 10 * 2) % 4])
    if not axis.lines:
        return None
    axis.set(title=what, xlabel="epoch", xlim=(0, None))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def views(runs):
    """What the two branches see: images, and the two random views of each that are to agree."""
    run = runs[0]
    script = importlib.import_module(run.args.method)
    if not hasattr(run.args, "augmentation") or not hasattr(script, "transformations"):
        return None
    x, generator = run.images[:8], torch.Generator(run.args.device).manual_seed(0)
    figure, axes = panels(3, 8, 1.4)
    rows = [x, *(common.augment(x, view, run.args.image_size, generator) for view in script.transformations(run.args))]
    for row, name, images in zip(axes, ("image", "view 1", "view 2"), rows):
        row[0].set_ylabel(name)
        for axis, image in zip(row, images):
            axis.imshow(picture(image))
    figure.suptitle(f"{run.name}: two random views of every image, --augmentation {run.args.augmentation}")
    return figure


def spectrum(runs):
    """Eigenvalues of the covariance of every level's features: a line that falls off a cliff, or lies near 0, is a collapse at a glance.

    (A JEPA's last eigenvalue is 0: its LayerNorm takes one direction away. Directions beyond the number of images are left out.)
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for k, run in enumerate(runs):
        for j, (level, z) in enumerate(run.features.items() if len(run.images) > 1 else ()):
            eigenvalues = torch.linalg.eigvalsh(z.cpu().double().T.cov()).flip(0)[:len(z) - 1].clamp(min=1e-6)    # mps has neither eigvalsh nor doubles
            axis.plot(range(1, len(eigenvalues) + 1), eigenvalues.numpy(), ["-", "--", ":", "-."][j % 4], color=COLOURS[(3 * k + 4 * j) % 10],
                      label=f"{run.name}: level {level}, effective rank {common.effective_rank(z):.1f}")
    if not axis.lines:
        return None
    axis.set(title="spectrum of the features' covariance", xlabel="direction, by size", ylabel="variance along it", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def masks(runs):
    """Six draws of every masking strategy: the context in colour, targets outlined, all else grey (I-JEPA's table)."""
    run = runs[0]
    script = importlib.import_module(run.args.method)
    if not hasattr(script, "draw_masks"):
        return None
    p, grid, drawn = run.args.patch_size, run.args.image_size // run.args.patch_size, []
    for strategy in dict.fromkeys(("multiblock", "rasterized", "block", "random", run.args.masking)):
        args = copy.copy(run.args)
        args.masking = strategy
        with contextlib.suppress(common.Unusable, KeyError):               # this grid has no blocks for it, or the script does not know it
            script.check_grid(args)
            drawn.append((strategy, *script.draw_masks(args, args.batch_size, torch.Generator().manual_seed(0))))   # the cut of the context is the batch's
    figure, axes = panels(len(drawn), 6, 1.6)
    for row, (strategy, context, targets) in zip(axes, drawn):
        row[0].set_ylabel(strategy)
        for axis, image, seen, blocks in zip(row, run.images, context, targets):
            hidden = np.ones(grid**2, bool)
            hidden[seen] = False
            hidden = np.kron(hidden.reshape(grid, grid), np.ones((p, p), bool))                             # by pixel
            axis.imshow(np.where(hidden[..., None], 0.85, picture(image)))
            for k, block in enumerate(blocks):
                inside = np.zeros((grid + 2, grid + 2))
                inside[block // grid + 1, block % grid + 1] = 1
                axis.contour(np.kron(inside, np.ones((8, 8))), [0.5], colors=COLOURS[6 - k % 4 * 2], linewidths=1.5, extent=np.array([-1, grid + 1] * 2) * p - 0.5)
            axis.set(xlim=(-1, grid * p), ylim=(grid * p, -1))
    figure.suptitle(f"{run.name}: context (in colour) and targets (outlined) by --masking")
    return figure


@torch.no_grad()
def predictions(runs):
    """What is predicted, made visible: every predicted patch is shown as the real patch whose features are nearest."""
    run = runs[0]
    n = min(6, run.args.batch_size, len(run.images) // 2)
    script = importlib.import_module(run.args.method)
    if not hasattr(script, "draw_masks") or getattr(run.model, "pixels", False) or n < 1:
        return None
    p, grid = run.args.patch_size, run.args.image_size // run.args.patch_size
    scale = lambda images: common.normalise(images.float() / 255)
    context, targets = (m[:n].to(run.args.device) for m in script.draw_masks(run.args, run.args.batch_size, torch.Generator().manual_seed(1)))
    s_hat, _ = run.model(scale(run.images[:n]), context, targets)                           # [n, M, Nt, D]
    others = run.images[n:n + 500]             # never the image itself
    s_y = torch.cat([run.model.target_encoder(scale(part)) for part in others.split(50)])   # [500, N, D]
    bank = torch.nn.functional.layer_norm(s_y, s_y.shape[-1:]).flatten(0, 1)                # [500 N, D]
    pixels = common.patches(others.cpu(), p).flatten(0, 1)                                  # [500 N, 3 p p]
    figure, axes = panels(3, n, 1.6)
    for column, image, seen, block, s in zip(axes.T, run.images, context, targets, s_hat):
        nearest = pixels[torch.cdist(s.flatten(0, 1), bank).argmin(1).cpu()]                # [M Nt, 3 p p]
        image, seen, block = image.cpu(), seen.cpu(), block.cpu()
        real = common.patches(image[None], p)[0]                                            # [N, 3 p p]
        shown = torch.full_like(real, 217)
        shown[seen] = real[seen]
        filled = shown.clone()
        filled[block.flatten()] = nearest      # where blocks overlap, one of the predictions
        for axis, patches in zip(column, (shown, filled, real)):
            axis.imshow(picture(torch.nn.functional.pixel_shuffle(patches.mT.unflatten(1, (grid, grid)), p)))   # undoes common.patches
    for axis, name in zip(axes[:, 0], ("context", "+ predictions", "image")):
        axis.set_ylabel(name)
    figure.suptitle(f"{run.name}: predicted features as the nearest real patches of {len(others)} other images")
    return figure


@torch.no_grad()
def attention(runs):
    """How much the patches look at each one in the last block of the target encoder, mean over heads and queries (C-JEPA's figures)."""
    runs = [run for run in runs if isinstance(getattr(run.model, "target_encoder", None), common.ViT)]
    if not runs:
        return None
    rows, above = [], None
    for run in runs:
        if run.images is not above:            # a run on other images has them above its maps
            above = run.images
            rows.append(("image", [dict(X=picture(image)) for image in above[:8]]))
        encoder, caught = run.model.target_encoder, []
        hook = encoder.blocks[-1].qkv.register_forward_hook(lambda module, inputs, output: caught.append(output))
        encoder(common.normalise(run.images[:8].float() / 255))
        hook.remove()
        q, k, _ = caught[0].unflatten(2, (3, encoder.blocks[-1].heads, -1)).permute(2, 0, 3, 1, 4)
        weight = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1).mean((1, 2))               # [8, N]: mean over heads and queries
        grid = math.isqrt(weight.shape[1])
        rows.append((run.name, [dict(X=w.view(grid, grid).cpu().numpy(), cmap="viridis", vmin=0) for w in weight]))
    figure, axes = panels(len(rows), 8, 1.6)
    for row, (name, shown) in zip(axes, rows):
        row[0].set_ylabel(name)
        for axis, panel in zip(row, shown):
            axis.imshow(**panel)
    figure.suptitle("attention that each patch receives in the target encoder's last block, each panel scaled to its own maximum")
    return figure


# ---- the page: a map per level, to be explored -----------------------------------------------

def explorer(run):
    """index.html: one self-contained page with the t-SNE map of each level, neighbours and sub-clusters."""
    images = common.resize(run.images[:1000], min(224, run.images.shape[-1]))                # a webp has 16,383 px a side at most
    count, columns, buffer = len(images), min(40, len(images)), io.BytesIO()
    to_pil_image(make_grid(images, columns, padding=0)).save(buffer, "webp", quality=80)
    y = next(iter(run.labels.values()))[:count]
    levels = {}
    for level, features in run.features.items():
        z = torch.nn.functional.normalize(features[:count].float(), dim=1)
        inside = np.zeros((len(z), 3))         # x, y and cluster within the class
        for c in y.unique():
            chosen = np.flatnonzero(y == c)
            inside[chosen, :2] = embed(features[chosen])
            inside[chosen, 2] = KMeans(min(4, len(chosen)), n_init=10, random_state=0).fit_predict(z[chosen].cpu())
        nearest = (z @ z.T).fill_diagonal_(-2).topk(min(8, len(z) - 1)).indices
        levels[level] = {"all": embed(features[:count]).round(4).tolist(), "inside": inside.round(4).tolist(), "nearest": nearest.tolist()}
    data = {"title": f"{run.name}: {run.args.method} on {run.args.dataset}", "size": images.shape[-1], "columns": columns, "levels": levels, "colours": COLOURS,
            "labels": {name: values[:count].tolist() for name, values in run.labels.items()},
            "sheet": "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()}
    template = Path(__file__).with_name("explorer.html").read_text()
    return template.replace("/*DATA*/", json.dumps(data).replace("<", "\\u003c"))


# ---- main -----------------------------------------------------------------------------------

FIGURES = {"tsne": tsne, "class": one_class, "compare": compare, "covariance": covariance, "accuracy": accuracy, "views": views, "spectrum": spectrum,
           "masks": masks, "predictions": predictions, "attention": attention}


def arguments(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("checkpoints", type=Path, nargs="+", help="checkpoint.pt of one run or more")
    add("--only", choices=(*FIGURES, "index"), help="one figure, or the page index.html (default: all that apply)")
    add("--images", type=common.number(int, 40), default=2000, help="test images that are drawn")
    add("--data-dir", help="where the dataset lies now (default: where it lay in training)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    return parser.parse_args(argv)


def main(argv=None):
    options = arguments(argv)
    folder = options.checkpoints[0].parent
    common.check_writable(folder, "figures go beside the first checkpoint")
    for path in options.checkpoints[1:]:       # before the data of the first is read, or downloaded
        eval_linear.load(path, options.device, options.data_dir)
    runs = []
    for path in options.checkpoints:
        runs.append(load_run(path, options, shared=runs[0] if runs else None))
    for longer in (lambda run: str(run.path.parent), lambda run: str(run.path)):    # folders of one name, checkpoints of one folder
        if len({run.name for run in runs}) < len(runs):
            for run in runs:
                run.name = longer(run)
    for name in [options.only] if options.only else (*FIGURES, "index"):
        if name == "index":
            page = explorer(runs[0])
            path = folder / "index.html"
            common.write(path, lambda file: file.write(page.encode()))
        else:
            figure = FIGURES[name](runs)
            if figure is None and options.only:
                methods = ", ".join(dict.fromkeys(f"{run.args.method}.py" for run in runs))
                raise common.Unusable(f"argument --only: nothing for {name} in {len(runs)} run{'s' * (len(runs) > 1)} of {methods}"
                                      "; views, masks and predictions are of the first alone")
            if figure is None:
                continue
            path = folder / f"{name}.png"
            common.write(path, lambda file: figure.savefig(file, format="png", dpi=110))
        print(path)


if __name__ == "__main__":
    common.command_line(main)
