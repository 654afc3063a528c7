"""common.py: augmentations, datasets, encoder, optimisers and files, each against an independent computation."""
import argparse
import colorsys
import hashlib
import http.client
import importlib
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import types
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.v2.functional as TF
from matplotlib.path import Path as Polygon
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__
from PIL import Image
from scipy import ndimage, spatial, stats
from torch import nn

import common
import conftest
import eval_linear
import figures
import sjea

ROOT = Path(__file__).parent.parent


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(n, height, width, seed=0):
    return torch.randint(256, (n, 3, height, width), generator=generator(seed), dtype=torch.uint8)


# ---- Augmentations ---------------------------------------------------------------------------

def parameters(images, **changed):
    """Parameters of draw_view under which nothing happens, with some changed: a list has one value per image."""
    n, _, height, width = images.shape
    neutral = {"top": 0.0, "left": 0.0, "height": float(height), "width": float(width), "flip": False, "brightness": 1.0,
               "contrast": 1.0, "saturation": 1.0, "hue": 0.0, "grey": False, "sigma": 0.0, "solarize": False}
    assert changed.keys() <= neutral.keys() | {"order"}
    p = {name: torch.tensor(changed.get(name, [value] * n)) for name, value in neutral.items()}
    return {**p, "order": changed.get("order", [0, 1, 2, 3])}


def assert_close(x, expected, atol=1e-5):
    torch.testing.assert_close(x, expected, rtol=0, atol=atol)


def test_neutral_parameters_change_nothing():
    images = random_images(3, 32, 32)
    assert_close(common.apply_view(images, parameters(images), 32), images / 255, atol=1e-6)


@pytest.mark.parametrize("height, width, size", [(32, 32, 32), (37, 53, 24), (96, 96, 33), (20, 15, 48)])
def test_crop_and_resize_equal_torchvision(height, width, size):
    """Bilinear with antialiasing, up and down, odd sizes, crops at every border and of one pixel."""
    images = random_images(5, height, width)
    boxes = [(0, 0, height, width), (0, 0, 9, 7), (height - 11, width - 13, 11, 13), (3, 5, 1, 1), (2, 1, height - 5, 6)]
    p = parameters(images, **{name: [float(box[i]) for box in boxes] for i, name in enumerate(("top", "left", "height", "width"))})
    expected = [TF.resized_crop(image / 255, *box, [size, size], TF.InterpolationMode.BILINEAR, antialias=True)
                for image, box in zip(images, boxes)]
    assert_close(common.apply_view(images, p, size), torch.stack(expected))


OPERATIONS = {  # parameter: torchvision's functional on one float image
    "flip": (lambda image, on: TF.horizontal_flip(image) if on else image, [True, False, True]),
    "brightness": (TF.adjust_brightness, [0.6, 1.4, 0.0]),
    "contrast": (TF.adjust_contrast, [0.6, 1.4, 0.0]),
    "saturation": (TF.adjust_saturation, [0.6, 1.8, 0.0]),
    "hue": (TF.adjust_hue, [-0.5, 0.07, 0.4]),
    "grey": (lambda image, on: TF.rgb_to_grayscale(image, 3) if on else image, [True, False, True]),
    "solarize": (lambda image, on: TF.solarize(image, 0.5) if on else image, [True, False, True]),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_equals_torchvision(name):
    """One operation with three settings in one batch; every image obeys its own. Some pixels are grey."""
    images = random_images(3, 32, 32)
    images[:, :, :4] = images[:, :1, :4]
    functional, values = OPERATIONS[name]
    expected = [functional(image / 255, value) for image, value in zip(images, values)]
    assert_close(common.apply_view(images, parameters(images, **{name: values}), 32), torch.stack(expected))


@pytest.mark.parametrize("size, kernel", [(32, 3), (96, 9), (224, 23)])
def test_blur_equals_torchvision(size, kernel):
    """The kernel is a tenth of the image wide; sigma 0 leaves its image alone."""
    images, sigmas = random_images(4, size, size), [0.0, 0.1, 0.7, 2.0]
    expected = [TF.gaussian_blur(image / 255, [kernel, kernel], [sigma, sigma]) if sigma else image / 255
                for image, sigma in zip(images, sigmas)]
    assert_close(common.apply_view(images, parameters(images, sigma=sigmas), size), torch.stack(expected))


@pytest.mark.parametrize("shift", [-0.37, -0.1, 0.2, 0.5])
def test_hue_on_8_bit_images(shift):
    """Within 1/255 of torchvision on uint8; PIL works on 8-bit hues, six times coarser, so there the mean must agree."""
    image = random_images(1, 32, 32)
    ours = common.apply_view(image, parameters(image, hue=[shift]), 32)[0] * 255
    assert_close(ours, TF.adjust_hue(image[0], shift).float(), atol=1.01)
    pil = TF.pil_to_tensor(TF.adjust_hue(TF.to_pil_image(image[0]), shift)).float()
    assert (ours - pil).abs().mean() < 2 < (image[0] - pil).abs().mean()


EVERYTHING = common.View(p_flip=0.5, p_jitter=0.8, jitter=(0.4, 0.4, 0.4, 0.1), p_grey=0.2, p_blur=0.5, p_solarize=0.3)


@pytest.mark.parametrize("height, width, size, kernel", [(32, 32, 32, 3), (45, 64, 40, 5)])
@pytest.mark.parametrize("seed", range(4))
def test_a_random_recipe_equals_torchvision_image_by_image(height, width, size, kernel, seed):
    images = random_images(24, height, width, seed)
    p = common.draw_view(EVERYTHING, 24, height, width, generator(seed))
    views, jitter = common.apply_view(images, p, size), ("brightness", "contrast", "saturation", "hue")
    for i, (image, view) in enumerate(zip(images, views)):
        q = {name: values[i].item() for name, values in p.items() if name != "order"}
        x = TF.resized_crop(image / 255, int(q["top"]), int(q["left"]), int(q["height"]), int(q["width"]), [size, size], antialias=True)
        for name in ["flip"] + [jitter[k] for k in p["order"]] + ["grey"]:
            x = OPERATIONS[name][0](x, q[name])
        if q["sigma"] > 0:
            x = TF.gaussian_blur(x, [kernel, kernel], [q["sigma"], q["sigma"]])
        decided = (x - 0.5).abs() > 1e-4               # solarize jumps at 0.5: there the last bit decides
        if q["solarize"]:
            x = TF.solarize(x, 0.5)
        assert decided.float().mean() > 0.99
        assert_close(view[decided], x[decided], atol=2e-5)


@pytest.mark.parametrize("n, size", [(8, 32), (300, 32), (50, 96), (2, 400)])
def test_augment_gives_every_image_its_own_view(n, size):
    """Copies of one image become n different views, also where the batch is worked on in parts."""
    images = random_images(1, size, size).expand(n, -1, -1, -1)
    views = common.augment(images, common.View(p_jitter=1.0), size, generator())
    assert views.shape == (n, 3, size, size)
    assert len(views.flatten(1).unique(dim=0)) == n


def test_augment_normalises_with_the_statistics_of_imagenet():
    images = random_images(4, 32, 32)
    raw = common.apply_view(images, common.draw_view(EVERYTHING, 4, 32, 32, generator(3)), 32)
    expected = TF.normalize(raw, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert_close(common.augment(images, EVERYTHING, 32, generator(3)), expected)


# ---- The draw --------------------------------------------------------------------------------

N = 20_000
DRAWN = common.View(crop_scale=(0.2, 0.9), p_flip=0.5, p_jitter=0.8, jitter=(0.4, 0.3, 0.2, 0.1), p_grey=0.2, p_blur=0.6, p_solarize=0.1)


@pytest.fixture(scope="module")
def drawn():
    return common.draw_view(DRAWN, N, 40, 64, generator(1))


def test_probabilities(drawn):
    """Every operation happens as often as the view says, within five standard deviations."""
    happened = {"flip": drawn["flip"], "brightness": drawn["brightness"] != 1, "grey": drawn["grey"],
                "sigma": drawn["sigma"] > 0, "solarize": drawn["solarize"]}
    for (name, on), p in zip(happened.items(), (0.5, 0.8, 0.2, 0.6, 0.1)):
        assert abs(on.sum().item() - N * p) < 5 * math.sqrt(N * p * (1 - p)), name
    for p in (0.0, 1.0):
        never_or_always = common.View(p_flip=p, p_jitter=p, p_grey=p, p_blur=p, p_solarize=p)
        q = common.draw_view(never_or_always, 1000, 32, 32, generator())
        assert all((on == bool(p)).all() for on in (q["flip"], q["grey"], q["solarize"], q["hue"] != 0))
        assert (q["sigma"] > 0).all() if p else q["sigma"] is None


def test_strengths_are_uniform_and_neutral_where_not_drawn(drawn):
    """One coin per image for all of jitter; factors in [1 - s, 1 + s], from 0 on where s > 1; hue in [-s, s]."""
    on = drawn["brightness"] != 1
    for name, low, high, neutral in (("brightness", 0.6, 1.4, 1), ("contrast", 0.7, 1.3, 1), ("saturation", 0.8, 1.2, 1), ("hue", -0.1, 0.1, 0)):
        assert (drawn[name][~on] == neutral).all()
        assert stats.kstest(drawn[name][on].numpy(), stats.uniform(low, high - low).cdf).pvalue > 1e-4, name
    sigma = drawn["sigma"][drawn["sigma"] > 0].numpy()
    assert stats.kstest(sigma, stats.uniform(0.1, 1.9).cdf).pvalue > 1e-4
    strong = common.draw_view(common.View(p_jitter=1.0, jitter=(1.5, 0, 0, 0)), N, 32, 32, generator())
    assert stats.kstest(strong["brightness"].numpy(), stats.uniform(0, 2.5).cdf).pvalue > 1e-4


def test_draws_are_independent_of_each_other(drawn):
    """No two parameters share their random numbers: all correlations are within five standard errors of 0."""
    on = (drawn["brightness"] != 1) & (drawn["sigma"] > 0)
    place = {"y": drawn["top"] / (41 - drawn["height"]), "x": drawn["left"] / (65 - drawn["width"]),
             "area": drawn["height"] * drawn["width"]}
    names = ("flip", "brightness", "contrast", "saturation", "hue", "grey", "sigma", "solarize")
    columns = torch.stack([values[on].double() for values in (*place.values(), *(drawn[name] for name in names))])
    correlations = torch.corrcoef(columns) - torch.eye(len(columns))
    # y and x are rounded down to whole pixels, which ties them to the crop's size: leave out the three among themselves
    correlations[:3, :3] = 0
    assert correlations.abs().max() < 5 / math.sqrt(on.sum())
    coins = torch.stack([drawn["flip"], drawn["brightness"] != 1, drawn["grey"], drawn["sigma"] > 0, drawn["solarize"]])
    assert (torch.corrcoef(coins.double()) - torch.eye(5)).abs().max() < 5 / math.sqrt(N)


@pytest.mark.parametrize("height, width", [(32, 32), (40, 64)])
def test_crops_are_distributed_as_torchvisions(height, width):
    """Area, aspect ratio and place against RandomResizedCrop.get_params, by the Kolmogorov-Smirnov test."""
    p = common.draw_view(DRAWN, N, height, width, generator(2))
    torch.manual_seed(0)
    image, scale, ratio = torch.zeros(3, height, width), [0.2, 0.9], [3 / 4, 4 / 3]
    theirs = np.array([torchvision.transforms.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(4000)])
    ours = torch.stack([p[name] for name in ("top", "left", "height", "width")], 1).numpy()
    for measure in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0], lambda b: b[:, 1]):
        assert stats.ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-3
    share = lambda b: (b[:, 2] * b[:, 3]).mean() / (height * width)
    assert share(ours) == pytest.approx(share(theirs), abs=5 * 0.2 / math.sqrt(4000))
    assert 0.17 < (ours[:, 2] * ours[:, 3]).min() / (height * width) < 0.23          # sides are whole pixels
    assert 0.65 < (ours[:, 3] / ours[:, 2]).min() < 0.8 and 1.25 < (ours[:, 3] / ours[:, 2]).max() < 1.5


@pytest.mark.parametrize("height, width, scale", [(32, 32, (0.08, 1.0)), (8, 64, (0.5, 1.0)), (64, 8, (0.5, 1.0)), (32, 32, (1e-5, 1e-4))])
def test_crops_lie_inside_the_image(height, width, scale):
    """Also where no attempt fits: an image eight times as wide as high, an area below one pixel."""
    p = common.draw_view(common.View(crop_scale=scale), N, height, width, generator())
    for start, length, size in ((p["top"], p["height"], height), (p["left"], p["width"], width)):
        assert (start >= 0).all() and (length >= 1).all() and (start + length <= size).all()
        assert (start == start.round()).all() and (length == length.round()).all()
        assert (start == 0).any() and (start + length == size).any()


def test_a_crop_that_never_fits_is_the_whole_image():
    """As torchvision falls back; at scale 1 only an aspect ratio of about 1 fits."""
    p = common.draw_view(common.View((1.0, 1.0)), 1000, 32, 32, torch.Generator().manual_seed(0))
    assert (p["height"] == 32).all() and (p["width"] == 32).all() and (p["top"] == 0).all() and (p["left"] == 0).all()


def test_autocast_does_not_round_the_views():
    images, _ = common.make_shapes(16, 32, 1)
    exact = common.augment(images, common.View(), 32, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(common.augment(images, common.View(), 32, torch.Generator().manual_seed(0)), exact)


def test_colour_operations_come_in_every_order():
    counts = {order: 0 for order in itertools.permutations(range(4))}
    g = generator()
    for _ in range(1200):
        counts[tuple(common.draw_view(common.View(), 1, 8, 8, g)["order"])] += 1
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4


def test_views_differ_and_seeds_repeat():
    """Two draws from one generator are the two views of a batch; the same seed gives the same draw."""
    g = generator(5)
    first, second, again = common.draw_view(EVERYTHING, 64, 32, 32, g), common.draw_view(EVERYTHING, 64, 32, 32, g), \
        common.draw_view(EVERYTHING, 64, 32, 32, generator(5))
    for name in first.keys() - {"order"}:
        assert not torch.equal(first[name], second[name]), name
        assert torch.equal(first[name], again[name]), name
    assert first["order"] == again["order"]


# ---- shapes ----------------------------------------------------------------------------------

PRINT_DIGEST = """
import common, hashlib
images, labels = common.make_shapes(300, 32, 7)
print(hashlib.sha256(images.numpy().tobytes() + b"".join(labels[name].numpy().astype("<i8").tobytes() for name in sorted(labels))).hexdigest())
"""
DIGEST = "142896390c8b59b21f7b3912fa8db79d371b09a9f6c24bd1f11acedaa0ac54eb"


def test_shapes_are_the_same_bytes_everywhere(capsys):
    """Pinned: numbers reported on `shapes` hold only for these bytes. On one thread and on two, and in a
    process of its own without this processor's vector instructions (AVX2, AVX-512, ...)."""
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        exec(PRINT_DIGEST, {})
        assert capsys.readouterr().out.strip() == DIGEST
    torch.set_num_threads(threads)
    vector = [name for name in __cpu_dispatch__ if __cpu_features__[name]]
    left = "from numpy._core._multiarray_umath import __cpu_dispatch__ as d, __cpu_features__ as f; print(sum(f[name] for name in d))"
    run = subprocess.run([sys.executable, "-c", PRINT_DIGEST + left], cwd=ROOT, capture_output=True, text=True, check=True,
                         env={**os.environ, "OMP_NUM_THREADS": "1", "NPY_DISABLE_CPU_FEATURES": " ".join(vector)})
    assert run.stdout.split() == [DIGEST, "0"]


def test_seed_size_and_number_make_different_shapes():
    """Another seed draws other labels and other ground; the image size changes neither the labels nor the shape asked for."""
    images, labels = common.make_shapes(64, 17, 1)
    other_images, other_labels = common.make_shapes(64, 17, 2)
    large, same_labels = common.make_shapes(64, 96, 1)
    assert images.shape == (64, 3, 17, 17) and large.shape == (64, 3, 96, 96) and images.dtype == large.dtype == torch.uint8
    for name in labels:
        assert torch.equal(labels[name], same_labels[name]) and not torch.equal(labels[name], other_labels[name])
    assert not any(torch.equal(a, b) for a, b in zip(images, other_images))


def test_shapes_factors_are_balanced_and_independent():
    """Over the 20,000 training and the 4,000 test labels (which do not depend on the image size, see above):
    counts differ by at most 1, and no factor tells of another (chi-squared, all 15 pairs)."""
    data = common.load_dataset(argparse.Namespace(dataset="shapes", image_size=2, holdout=False, batch_size=256, device="cpu"))
    assert next(iter(data.train_labels)) == "shape"
    assert (len(data.images), len(data.test_images)) == (20_000, 4_000) and data.images is data.train_images
    for labels in (data.train_labels, data.test_labels):
        assert {name: len(label.unique()) for name, label in labels.items()} == \
            {"shape": 10, "style": 4, "colour": 8, "pose": 4, "count": 4, "distance": 3}
        for label in labels.values():
            assert label.bincount().max() - label.bincount().min() <= 1
        for a, b in itertools.combinations(labels, 2):
            table = torch.zeros(int(labels[a].max()) + 1, int(labels[b].max()) + 1)
            table.index_put_((labels[a], labels[b]), torch.ones(len(labels[a])), accumulate=True)
            assert stats.chi2_contingency(table.numpy()).pvalue > 1e-4, (a, b)


def test_outlines_become_signed_distances():
    """Inside and outside as matplotlib's polygons have it, distances as to points set closely along the outline."""
    axis = (np.arange(common.GRID) + 0.5) / common.GRID * 3 - 1.5
    points = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    steps = np.arange(500)[:, None, None] / 500
    for outline, table in zip(common.OUTLINES, common.signed_distances(), strict=True):
        ends, table = np.array(outline), table.ravel()
        along = ends + steps * (np.roll(ends, -1, axis=0) - ends)                 # [500, corners, 2]
        distance, _ = spatial.KDTree(along.reshape(-1, 2)).query(points)
        assert np.abs(np.abs(table) - distance).max() < 0.005                     # half a step; outlines are rounded to 0.001
        inside = Polygon(ends).contains_points(points)
        assert (inside == (table < 0))[distance > 0.002].all()


def turned(outline, degrees):
    """The outline turned clockwise, as the y axis points down."""
    a = math.radians(degrees)
    return np.array(outline) @ np.array([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]])


def test_every_label_can_be_read_off_the_pixels(monkeypatch):
    """Each factor, measured in the image by other means than it was drawn with, is the label."""
    n, size = 240, 96
    images, labels = common.make_shapes(n, size, 5)
    y = {name: label.numpy() for name, label in labels.items()}
    nothing = np.full((10, common.GRID, common.GRID), 9, np.float32)
    monkeypatch.setattr(common, "signed_distances", lambda: nothing)
    ground, _ = common.make_shapes(n, size, 5)                                    # the same draw without objects
    mask = (images != ground).any(1).numpy()                                      # [n, S, S] where the object is
    inner = ndimage.binary_erosion(mask, np.ones((1, 3, 3)))
    brightest, darkest = images.amax(1).numpy(), images.amin(1).numpy()

    # count: how many times the area of one such object is painted
    one = np.array([area_and_centre(np.array(outline))[0] for outline in common.OUTLINES])[y["shape"]]
    one = one * (np.array([0.22, 0.19, 0.16])[y["distance"]] * size) ** 2
    copies = (mask.sum((1, 2)) + inner.sum((1, 2))) / 2 / one                      # turned ones may overlap by a little
    assert (np.rint(1.03 * copies) == y["count"] + 1).all()

    # style: outlined = some white pixels inside, striped = some dark ones
    many = lambda pixels: (pixels & inner).sum((1, 2)) > 20
    assert many(darkest >= 250).tolist() == (y["style"] % 2 == 1).tolist()
    assert many(brightest <= 140).tolist() == (y["style"] // 2 == 1).tolist()

    # colour: the hue of plain objects, nearest to red, orange, yellow, green, cyan, blue, purple, pink
    plain = np.flatnonzero(y["style"] == 0)
    hue = np.array([360 * colorsys.rgb_to_hsv(*np.median(images[i].numpy()[:, inner[i]], axis=1))[0] for i in plain])
    away = (hue[:, None] - np.array([0, 30, 60, 110, 180, 230, 275, 325]) + 180) % 360 - 180
    assert (np.abs(away).argmin(1) == y["colour"][plain]).all()

    # shape: of the ten polygons, turned, with the object's area and centre, the one that overlaps most
    # pose: the turn at which the right one overlaps most; distance: the radius at which its area is the object's
    cut = (mask[:, 0] | mask[:, -1] | mask[:, :, 0] | mask[:, :, -1]).any(1)      # by the image's border
    single = np.flatnonzero((y["count"] == 0) & ~cut)
    assert len(single) > 30
    pixels = np.stack(np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5), axis=-1).reshape(-1, 2)

    def overlap(i, shape, degrees):
        outline = turned(common.OUTLINES[shape], degrees)
        area, centre = area_and_centre(outline)
        filled = Polygon((outline - centre) * math.sqrt(mask[i].sum() / area) + pixels[mask[i].ravel()].mean(0)).contains_points(pixels)
        return (filled & mask[i].ravel()).sum() / (filled | mask[i].ravel()).sum()

    turns, radii = np.zeros(n), np.zeros(n)
    for i in single:
        best = [max(overlap(i, shape, degrees) for degrees in range(-48, 49, 12)) for shape in range(10)]
        assert np.argmax(best) == y["shape"][i]
        turns[i] = max(range(-60, 61, 3), key=lambda degrees: overlap(i, y["shape"][i], degrees))
        radii[i] = math.sqrt((mask[i].sum() + inner[i].sum()) / 2 / area_and_centre(np.array(common.OUTLINES[y["shape"][i]]))[0])
    of = lambda values, name, k: values[[i for i in single if y[name][i] == k]]
    for k in range(3):
        assert of(turns, "pose", k).max() < of(turns, "pose", k + 1).min()
    for k in range(2):
        assert of(radii, "distance", k).min() > of(radii, "distance", k + 1).max()


def area_and_centre(polygon):
    """By the shoelace formula."""
    after = np.roll(polygon, -1, axis=0)
    cross = polygon[:, 0] * after[:, 1] - after[:, 0] * polygon[:, 1]
    return abs(cross.sum()) / 2, ((polygon + after) * cross[:, None]).sum(0) / (3 * cross.sum())


# ---- Datasets --------------------------------------------------------------------------------

def arguments(dataset, folder, image_size, holdout=False):
    return argparse.Namespace(dataset=dataset, data_dir=str(folder), image_size=image_size, holdout=holdout, batch_size=2, device="cpu",
                              stream=False, skip_bad_images=False)


def put(folder, name, content):
    """Write a file and return [name, md5], as torchvision's lists have them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return [name, hashlib.md5(content).hexdigest()]


def rows(images):
    """CIFAR's layout: per image 1024 red, 1024 green, 1024 blue bytes, line by line."""
    return np.array([[image[c, i, j] for c in range(3) for i in range(32) for j in range(32)] for image in images.numpy()], np.uint8)


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """Five batches of two images and a test batch of three, in the official format."""
    tv, folder = torchvision.datasets.CIFAR10, tmp_path / "cifar-10-batches-py"
    images, labels = random_images(13, 32, 32), [7, 0, 9, 3, 3, 1, 8, 2, 6, 5, 4, 4, 9]
    batch = lambda name, at: put(folder, name, pickle.dumps({"data": rows(images[at]), "labels": labels[at]}, protocol=2))
    meta = put(folder, "batches.meta", pickle.dumps({"label_names": list("abcdefghij")}, protocol=2))
    monkeypatch.setattr(tv, "url", "file:///nowhere")
    monkeypatch.setattr(tv, "train_list", [batch(f"data_batch_{k + 1}", slice(2 * k, 2 * k + 2)) for k in range(5)])
    monkeypatch.setattr(tv, "test_list", [batch("test_batch", slice(10, 13))])
    monkeypatch.setattr(tv, "meta", {**tv.meta, "md5": meta[1]})
    return tmp_path, images, torch.tensor(labels)


def test_cifar10_is_read_as_it_was_written(cifar10):
    folder, images, labels = cifar10
    data = common.load_dataset(arguments("cifar10", folder, 32))
    assert data.images is data.train_images
    assert torch.equal(data.images, images[:10]) and torch.equal(data.test_images, images[10:])
    assert torch.equal(data.train_labels["class"], labels[:10]) and torch.equal(data.test_labels["class"], labels[10:])


def test_other_image_sizes_are_resampled_as_pil_does_it(cifar10):
    """PIL's bilinear filter is antialiased too; it rounds after each axis."""
    folder, images, _ = cifar10
    for size in (16, 48):
        data = common.load_dataset(arguments("cifar10", folder, size))
        expected = [TF.pil_to_tensor(TF.to_pil_image(image).resize((size, size), Image.BILINEAR)) for image in images]
        assert_close(torch.cat([data.images, data.test_images]).float(), torch.stack(expected).float(), atol=1.01)


CIFAR100 = """
    beaver dolphin otter seal whale / aquarium_fish flatfish ray shark trout / orchid poppy rose sunflower tulip /
    bottle bowl can cup plate / apple mushroom orange pear sweet_pepper / clock keyboard lamp telephone television /
    bed chair couch table wardrobe / bee beetle butterfly caterpillar cockroach / bear leopard lion tiger wolf /
    bridge castle house road skyscraper / cloud forest mountain plain sea / camel cattle chimpanzee elephant kangaroo /
    fox porcupine possum raccoon skunk / crab lobster snail spider worm / baby boy girl man woman /
    crocodile dinosaur lizard snake turtle / hamster mouse rabbit shrew squirrel /
    maple_tree oak_tree palm_tree pine_tree willow_tree / bicycle bus motorcycle pickup_truck train /
    lawn_mower rocket streetcar tank tractor"""


def test_a_download_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    def answer_garbage(root, **options):
        for name in left:                      # what a transfer that broke off leaves
            (root / name).write_text("half")
        raise http.client.BadStatusLine("garbage")
    left = []
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", answer_garbage)
    args = types.SimpleNamespace(dataset="cifar10", data_dir=tmp_path / "new" / "data", image_size=32, holdout=False, device="cpu")
    with pytest.raises(common.Unusable, match="no usable CIFAR10 in .* nor can it be downloaded: garbage"):
        common.load_dataset(args)
    assert not (tmp_path / "new").exists()
    left.append("archive")
    with pytest.raises(common.Unusable, match="no usable CIFAR10 in .* nor can it be downloaded: garbage"):
        common.load_dataset(args)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == ["new/data/archive"]
    left.clear(), shutil.rmtree(tmp_path / "new"), (tmp_path / "new").mkdir()
    (tmp_path / "new" / "thesis").write_text("mine")
    with pytest.raises(common.Unusable):
        common.load_dataset(args)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["thesis"]


def test_cifar100_carries_its_superclasses(tmp_path, monkeypatch):
    """One image of every class; coarse labels from the table at www.cs.toronto.edu/~kriz/cifar.html (above, the
    superclasses in their order). Classes are numbered in alphabetical order."""
    tv, folder = torchvision.datasets.CIFAR100, tmp_path / "cifar-100-python"
    coarse_of = {name: i for i, five in enumerate(CIFAR100.split("/")) for name in five.split()}
    names = sorted(coarse_of)
    assert len(names) == 100
    fine = torch.randperm(100, generator=generator()).tolist()
    coarse, images = [coarse_of[names[k]] for k in fine], random_images(100, 32, 32)
    python2 = b"U\x05batchU\x02\xe9\xff"     # one more entry, of a Python 2 string that is no ASCII, as the official files have them
    batch = lambda name, at: put(folder, name, pickle.dumps(
        {"data": rows(images[at]), "fine_labels": fine[at], "coarse_labels": coarse[at]}, protocol=2)[:-2] + python2 + b"u.")
    meta = put(folder, "meta", pickle.dumps({"fine_label_names": names}, protocol=2))
    monkeypatch.setattr(tv, "url", "file:///nowhere")
    monkeypatch.setattr(tv, "train_list", [batch("train", slice(0, 60))])
    monkeypatch.setattr(tv, "test_list", [batch("test", slice(60, 100))])
    monkeypatch.setattr(tv, "meta", {**tv.meta, "md5": meta[1]})
    data = common.load_dataset(arguments("cifar100", tmp_path, 32))
    assert torch.equal(torch.cat([data.images, data.test_images]), images)
    for name, expected in (("class", fine), ("superclass", coarse)):
        assert (data.train_labels[name].tolist(), data.test_labels[name].tolist()) == (expected[:60], expected[60:])
    assert next(iter(data.train_labels)) == "class"


@pytest.fixture
def stl10(tmp_path, monkeypatch):
    """Three labelled, four unlabeled and two test images, column by column as the official files have them."""
    tv, folder = torchvision.datasets.STL10, tmp_path / "stl10_binary"
    images = {split: random_images(n, 96, 96, seed=n) for split, n in (("train", 3), ("unlabeled", 4), ("test", 2))}
    X = {split: put(folder, f"{split}_X.bin", x.transpose(2, 3).contiguous().numpy().tobytes()) for split, x in images.items()}
    put(folder, "class_names.txt", b"airplane\nbird\ncar\ncat\ndeer\ndog\nhorse\nmonkey\nship\ntruck\n")
    monkeypatch.setattr(tv, "url", "file:///nowhere")
    monkeypatch.setattr(tv, "train_list", [X["train"], put(folder, "train_y.bin", bytes([10, 1, 4])), X["unlabeled"]])
    monkeypatch.setattr(tv, "test_list", [X["test"], put(folder, "test_y.bin", bytes([2, 10]))])
    return tmp_path, images


@pytest.mark.parametrize("holdout", [False, True])
def test_stl10_trains_on_its_unlabeled_images(stl10, holdout):
    """Also with --holdout, which divides the labelled ones: the first of every ten becomes the test image."""
    folder, images = stl10
    data = common.load_dataset(arguments("stl10", folder, 96, holdout))
    assert torch.equal(data.images, images["unlabeled"])
    train, test = (images["train"][1:], images["train"][:1]) if holdout else (images["train"], images["test"])
    assert torch.equal(data.train_images, train) and torch.equal(data.test_images, test)
    assert data.train_labels["class"].tolist() == ([0, 3] if holdout else [9, 0, 3])
    assert data.test_labels["class"].tolist() == ([9] if holdout else [1, 9])


def test_stl10_at_another_size(stl10):
    folder, images = stl10
    data = common.load_dataset(arguments("stl10", folder, 64))
    for found, split in ((data.images, "unlabeled"), (data.train_images, "train"), (data.test_images, "test")):
        expected = [np.asarray(Image.fromarray(x.permute(1, 2, 0).numpy()).resize((64, 64), Image.BILINEAR)) for x in images[split]]
        assert np.abs(found.permute(0, 2, 3, 1).numpy().astype(int) - np.stack(expected)).max() <= 1


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "stl10"])
def test_without_leave_nothing_is_downloaded(dataset, tmp_path, monkeypatch):
    """For a judge of somebody else's checkpoint."""
    asked = []

    def absent(root, download, **options):
        asked.append(download)
        raise RuntimeError("not here")

    monkeypatch.setattr(torchvision.datasets, dataset.upper(), absent)
    for download in (False, True):
        with pytest.raises(common.Unusable, match=f"no usable {dataset.upper()} in .*: not here"):
            common.load_dataset(arguments(dataset, tmp_path, 32), download=download)
    assert asked == [False, True]


def test_a_file_system_without_locks_does_no_harm(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(common.fcntl, "flock", no_locks)
    with common.one_at_a_time(tmp_path / "data"):
        assert (tmp_path / "data").is_dir()


def test_sjea_trains_on_stl10_end_to_end(stl10, tmp_path):
    """The README's command on 96 px: stack 1 reads [B, 512, 3, 3], both stacks are judged."""
    read, init = [], sjea.SJEA.__init__
    def watched(self, args):
        init(self, args)
        self.f[1].register_forward_pre_hook(lambda module, inputs: read.append(tuple(inputs[0].shape)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sjea.SJEA, "__init__", watched)
        sjea.main(["--stacks", "2", "--dataset", "stl10", "--data-dir", str(stl10[0]), "--width", "64", "--epochs", "1", "--batch-size", "4",
                   "--device", "cpu", "--out", str(tmp_path / "run")])
    assert read[:2] == [(4, 512, 3, 3)] * 2                               # one step, two views
    assert set(json.loads((tmp_path / "run" / "eval.json").read_text())["levels"]) == {"0", "1", "0+1"}


CORNERS = np.array([[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 255)]], np.uint8)     # red, green / blue, white
SQUARES = CORNERS.repeat(8, axis=0).repeat(8, axis=1)                                          # [16, 16, 3]
GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def save(folder, name, image, **options):
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / name, **options)


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_folder_reads_every_kind_of_file(tmp_path, test_name):
    """RGB, RGBA, palette and grey PNG exactly; CMYK and rotated JPEG within JPEG's error. Classes by folder name."""
    squares = Image.fromarray(SQUARES)
    rgba = squares.convert("RGBA")
    rgba.putalpha(Image.fromarray(GREY))
    ink = Image.fromarray(np.dstack([255 - SQUARES, np.zeros((16, 16), np.uint8)]), mode="CMYK")
    rotated, exif = Image.fromarray(np.rot90(SQUARES).copy()), Image.Exif()
    exif[0x0112] = 6                                                       # to be turned 90 degrees clockwise
    cat, dog = tmp_path / "train" / "cat", tmp_path / "train" / "dog"
    save(cat, "1.png", squares), save(cat, "2.png", rgba), save(cat, "3.png", squares.convert("P", palette=Image.ADAPTIVE))
    save(cat, "4.png", Image.fromarray(GREY))
    save(dog, "1.jpg", ink, quality=100), save(dog, "2.jpg", rotated, quality=100, subsampling=0, exif=exif)
    for name in ("cat", "dog"):
        save(tmp_path / test_name / name, "only.png", squares if name == "cat" else Image.fromarray(GREY))
    data = common.load_dataset(arguments("folder", tmp_path, 16))
    squares, grey = torch.from_numpy(SQUARES).permute(2, 0, 1), torch.from_numpy(GREY).expand(3, 16, 16)
    assert torch.equal(data.images[:4], torch.stack([squares, squares, squares, grey]))
    assert_close(data.images[4:].float(), torch.stack([squares, squares]).float(), atol=4)
    assert data.train_labels["class"].tolist() == [0, 0, 0, 0, 1, 1]
    assert torch.equal(data.test_images, torch.stack([squares, grey])) and data.test_labels["class"].tolist() == [0, 1]


def test_folder_prefers_test_to_val(tmp_path):
    """Also where another file lies beside its classes."""
    for part, value in (("train", 0), ("test", 1), ("val", 2)):
        for i in range(2):
            save(tmp_path / part / "cat", f"{i}.png", Image.new("RGB", (8, 8), (value,) * 3))
    (tmp_path / "test" / "labels.txt").write_text("cat")
    assert common.load_dataset(arguments("folder", tmp_path, 8)).test_images.unique().tolist() == [1]


def test_folder_takes_val_where_test_has_no_classes(tmp_path):
    """As ImageNet comes: its test images lie in one folder, unlabelled."""
    for part, value in (("train/cat", 0), ("test", 1), ("val/cat", 2)):
        save(tmp_path / part, "1.png", Image.new("RGB", (8, 8), (value,) * 3))
    assert common.load_dataset(arguments("folder", tmp_path, 8)).test_images.unique().tolist() == [2]


def test_an_image_whose_exif_data_alone_is_damaged_is_read(tmp_path):
    for part in ("train", "test"):
        save(tmp_path / part / "cat", "1.png", Image.fromarray(SQUARES), exif=b"Exif\0\0garbage!!")
    with Image.open(tmp_path / "train" / "cat" / "1.png") as image, pytest.raises(SyntaxError):
        image.getexif()
    assert torch.equal(common.load_dataset(arguments("folder", tmp_path, 16)).images[0], torch.from_numpy(SQUARES).permute(2, 0, 1))


def test_folder_takes_the_centre_square(tmp_path):
    """Shorter side to the image size, then the centre: torchvision's Resize and CenterCrop, bicubic."""
    noise = random_images(2, 24, 48)
    wide, high = TF.gaussian_blur(noise[0], [5, 5]), TF.gaussian_blur(noise[1], [5, 5]).mT.contiguous()
    for part in ("train", "test"):
        save(tmp_path / part / "cat", "high.png", TF.to_pil_image(high))
        save(tmp_path / part / "cat", "wide.png", TF.to_pil_image(wide))
    for size in (12, 24, 36):
        data = common.load_dataset(arguments("folder", tmp_path, size))
        expected = [TF.center_crop(TF.resize(image.float(), [size], TF.InterpolationMode.BICUBIC, antialias=True), [size, size])
                    for image in (high, wide)]
        assert_close(data.images.float(), torch.stack(expected).clamp(0, 255), atol=2)


def test_holdout_splits_off_a_tenth_of_train(tmp_path):
    """Three of thirty images, with their labels, from both classes; none stays among the training images."""
    for part, first in (("train", 0), ("test", 100)):
        for i in range(30):
            save(tmp_path / part / ("cat" if i < 12 else "dog"), f"{i:02}.png", Image.new("RGB", (8, 8), (first + i,) * 3))
    data = common.load_dataset(arguments("folder", tmp_path, 8, holdout=True))
    kept, held = (images[:, 0, 0, 0].tolist() for images in (data.images, data.test_images))
    assert data.images is data.train_images
    assert len(held) == 3 and sorted(kept + held) == list(range(30))
    for values, labels in ((kept, data.train_labels), (held, data.test_labels)):
        assert labels["class"].tolist() == [0 if value < 12 else 1 for value in values]
    assert set(data.test_labels["class"].tolist()) == {0, 1}


# ---- Encoder ---------------------------------------------------------------------------------

def their_resnet(arch, image_size, in_channels):
    """torchvision's, with every parameter and statistic random; small inputs get the stem of CIFAR's ResNets."""
    model = getattr(torchvision.models, arch)()
    if image_size <= 64:
        model.conv1, model.maxpool = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False), nn.Identity()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean, module.running_var):
                values.data.uniform_(0.3, 0.8)
    model.fc = model.avgpool = nn.Identity()
    return model.eval()


@pytest.mark.parametrize("arch, size, in_channels, map_shape", [
    ("resnet18", 224, 3, (512, 7, 7)), ("resnet50", 224, 3, (2048, 7, 7)), ("resnet18", 96, 3, (512, 3, 3)),
    ("resnet18", 65, 3, (512, 3, 3)), ("resnet18", 64, 3, (512, 8, 8)),
    ("resnet18", 32, 3, (512, 4, 4)), ("resnet50", 32, 3, (2048, 4, 4)), ("resnet18", 20, 3, (512, 3, 3)),
    ("resnet18", 7, 512, (512, 1, 1)), ("resnet18", 4, 512, (512, 1, 1)), ("resnet50", 3, 512, (2048, 1, 1)), ("resnet18", 1, 512, (512, 1, 1))])
def test_resnet_equals_torchvisions(arch, size, in_channels, map_shape):
    """The same weights, copied over in order, give the same map: on images, and on an encoder's map."""
    torch.manual_seed(0)
    theirs, ours = their_resnet(arch, size, in_channels), common.ResNet(arch, size, in_channels=in_channels)
    names, values = ours.state_dict().keys(), theirs.state_dict().values()
    assert len(names) == len(values)
    ours.load_state_dict(dict(zip(names, values)))
    ours.eval()
    x = torch.randn(2, in_channels, size, size)
    with torch.no_grad():
        y, pooled = ours(x), theirs(x).unflatten(1, map_shape)             # theirs flattens the map: pooling is left out
    assert y.shape == (2, *map_shape) and (ours.channels, ours.map_size) == map_shape[:2]
    torch.testing.assert_close(y, pooled, rtol=1e-4, atol=1e-5 * pooled.abs().max().item())
    torch.testing.assert_close(common.pool(y), pooled.flatten(2).mean(2), rtol=1e-4, atol=1e-5 * pooled.abs().max().item())


def test_parameter_counts():
    """torchvision's published counts without the classifier; at other widths the formula over all layers."""
    assert common.count_parameters(common.ResNet("resnet18", 224)) == 11_689_512 - 513_000
    assert common.count_parameters(common.ResNet("resnet50", 224)) == 25_557_032 - 2_049_000
    for w in (1, 16, 64):
        total = 27 * w + 2 * w                                                                   # stem: 3x3x3 and BN
        for c_in, c in ((w, w), (w, 2 * w), (2 * w, 4 * w), (4 * w, 8 * w)):
            total += 9 * c_in * c + 3 * 9 * c * c + 4 * 2 * c + (c_in != c) * (c_in * c + 2 * c)  # two blocks, shortcut
        assert common.count_parameters(common.ResNet("resnet18", 32, width=w)) == total


@pytest.mark.parametrize("arch, last", [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_every_block_starts_as_its_shortcut(arch, last):
    """The last BN of each block, and no other, starts at zero: so block(x) is relu(shortcut(x))."""
    encoder = common.ResNet(arch, 32, width=8)
    zero = {name for name, module in encoder.named_modules() if isinstance(module, nn.BatchNorm2d) and (module.weight == 0).all()}
    assert zero == {f"blocks.{i}.{last}" for i in range(len(encoder.blocks))}
    x = torch.randn(4, 8, 8, 8, generator=generator())
    for block in encoder.blocks:
        y, shortcut = block(x), block.downsample(x) if block.downsample else x
        assert_close(y, shortcut.relu())
        x = y.detach()


# ---- Optimisation ----------------------------------------------------------------------------

def test_lars_equals_its_definition():
    """Five steps in float64. Weights: g + wd w, times eta ||w|| / ||.||, or 1 where that is 0 or infinite;
    then momentum 0.9. The others: momentum alone."""
    weights = [torch.randn(3, 4), torch.randn(5, 2) * 10, torch.zeros(2, 2), torch.randn(2, 2)]
    others = [torch.randn(4), torch.zeros(3)]
    ours = [nn.Parameter(w.double()) for w in weights + others]
    optimizer = common.LARS([{"params": ours[:4], "weight_decay": 0.01}, {"params": ours[4:], "lars": False}], lr=0.0)
    plain, velocity = [w.detach().numpy().copy() for w in ours], [np.zeros(w.shape) for w in ours]
    random = np.random.RandomState(0)
    for step in range(5):
        lr = 0.5 / (step + 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for i, w in enumerate(plain):
            g = random.randn(*w.shape)
            if i == 3:
                g = -0.01 * w                                              # cancels the decay: ||g + wd w|| is 0
            ours[i].grad = torch.from_numpy(g.copy())
            if i < 4:
                g = g + 0.01 * w
                w_norm, g_norm = np.sqrt((w**2).sum()), np.sqrt((g**2).sum())
                g = g * (0.001 * w_norm / g_norm if w_norm > 0 and g_norm > 0 else 1)
            velocity[i] = 0.9 * velocity[i] + g
            plain[i] = w - lr * velocity[i]
        optimizer.step()
        for a, b in zip(ours, plain):
            np.testing.assert_allclose(a.detach().numpy(), b, rtol=1e-12, atol=1e-14)


def matrices_and_vectors():
    """(matrices wide, tall, square, two of one shape; vectors; a convolution), float64, and five gradients of each."""
    torch.manual_seed(0)
    weights = [torch.randn(*shape).double() for shape in ((3, 7), (8, 2), (4, 4), (3, 7), (5,), (2,), (4, 3, 2, 5))]
    return weights, [[torch.randn_like(w) for w in weights] for _ in range(5)]


def run_optimizer(optimizer, parameters, gradients):
    for step, gs in enumerate(gradients):
        for p, g in zip(parameters, gs):
            p.grad = g.clone()
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
        optimizer.step()


def test_muon_equals_its_definition():
    """Five steps in float64, matrix by matrix: the singular values of the momentum, by numpy's SVD, go five times through
    Newton-Schulz's polynomial. Vectors, and matrices of a group without muon, are torch's AdamW's."""
    weights, gradients = matrices_and_vectors()
    ours, theirs = ([nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    ours[6].data = ours[6].data.to(memory_format=torch.channels_last)     # as train stores convolutions
    groups = [{"params": ours[:3] + ours[6:], "muon": True, "weight_decay": 0.3}, {"params": ours[3:6], "muon": False, "weight_decay": 0.0}]
    run_optimizer(common.Muon(groups, lr=0.0), ours, gradients)
    run_optimizer(torch.optim.AdamW(theirs[3:6], lr=0.0, weight_decay=0.0), theirs[3:6], [gs[3:6] for gs in gradients])
    for a, b in zip(ours[3:6], theirs[3:6]):
        np.testing.assert_allclose(a.detach().numpy(), b.detach().numpy(), rtol=1e-12, atol=1e-14)
    for i in (0, 1, 2, 6):                                                 # a convolution is the matrix [out, in h w]
        w = weights[i].numpy().reshape(len(weights[i]), -1)
        momentum = np.zeros(w.shape)
        for step, g in enumerate(gs[i].numpy().reshape(w.shape) for gs in gradients):
            lr = 0.1 / (step + 1)
            momentum = 0.95 * momentum + 0.05 * g
            U, S, V = np.linalg.svd(0.05 * g + 0.95 * momentum, full_matrices=False)
            S = S / np.sqrt((S**2).sum())
            for _ in range(5):
                S = 3.4445 * S - 4.775 * S**3 + 2.0315 * S**5
            w = w * (1 - lr * 0.3) - lr * 0.2 * np.sqrt(max(w.shape)) * (U * S) @ V
        np.testing.assert_allclose(ours[i].detach().numpy().reshape(w.shape), w, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bf16", (False, True), ids=("fp32", "bf16"))
def test_muon_is_torchs(bf16):
    """torch.optim.Muon, which rounds to bfloat16, takes the same steps to 2 %; matrices of one shape do not mix. So do ours under autocast, as on CUDA."""
    weights, gradients = matrices_and_vectors()
    start, gradients = torch.stack([*weights[:1], weights[3]]).float(), [[gs[0].float(), gs[3].float()] for gs in gradients]
    ours, theirs = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        run_optimizer(common.Muon([{"params": ours, "muon": True, "weight_decay": 0.3}], lr=0.0), ours, gradients)
    run_optimizer(torch.optim.Muon(theirs, lr=0.0, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"), theirs, gradients)
    for a, b, w in zip(ours, theirs, start):
        assert (a - b).norm() < 0.02 * (b - w).norm()


@pytest.mark.parametrize("optimizer, group", ((common.LARS, {}), (common.Muon, {"muon": True})))
def test_a_weight_without_a_gradient_is_passed_over(optimizer, group):
    """As by torch's optimizers: a loss may reach a weight in some steps alone. The others move as they would by themselves."""
    weights, gradients = matrices_and_vectors()
    ours, theirs = ([nn.Parameter(w.clone()) for w in weights[:2]] for _ in range(2))
    both, alone = (optimizer([{"params": parameters, "weight_decay": 0.3, **group}], lr=0.0) for parameters in (ours, theirs[:1]))
    run_optimizer(both, ours[:1], [gs[:1] for gs in gradients])
    run_optimizer(alone, theirs[:1], [gs[:1] for gs in gradients])
    assert torch.equal(ours[0], theirs[0]) and not torch.equal(ours[0], weights[0])
    assert torch.equal(ours[1], weights[1]) and ours[1] not in both.state


def test_learning_rate():
    """Linear from peak / warmup to peak, a cosine with its middle at half, peak / 1000 at the very last step."""
    rate = lambda step: common.learning_rate(step, 111, 10, 2.0)
    assert rate(0) == pytest.approx(0.2) and rate(4) == pytest.approx(1.0)
    assert rate(9) == rate(10) == pytest.approx(2.0)
    assert rate(60) == pytest.approx((2.0 + 0.002) / 2)
    assert rate(35) == pytest.approx(0.002 + 1.998 * (1 + math.sqrt(0.5)) / 2)              # a quarter of the cosine
    assert rate(110) == pytest.approx(0.002)
    assert common.learning_rate(0, 50, 0, 2.0) == pytest.approx(2.0)
    assert common.learning_rate(49, 50, 0, 2.0) == pytest.approx(0.002)
    assert [common.learning_rate(step, 2, 0, 2.0) for step in (0, 1)] == pytest.approx([2.0, 0.002])
    assert common.learning_rate(0, 1, 0, 2.0) == pytest.approx(2.0)                         # a run of one step
    assert common.learning_rate(4, 5, 10, 2.0) == pytest.approx(1.0)                        # shorter than its warm-up


@pytest.mark.parametrize("name", ["adamw", "lars", "muon"])
def test_only_weights_are_decayed(name):
    """Kernels and matrices in one group, biases and norms in the other, frozen parameters in none."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 6, bias=False))
    model[4].weight.requires_grad = model[3].bias.requires_grad = False
    optimizer = common.make_optimizer(model, argparse.Namespace(optimizer=name, weight_decay=0.3, device="cpu"))
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    ids = lambda parameters: sorted(map(id, parameters))
    assert ids(decayed["params"]) == ids([model[0].weight, model[2].weight])
    assert ids(others["params"]) == ids([model[0].bias, *model[1].parameters(), model[2].bias, model[3].weight])
    assert type(optimizer) is {"adamw": torch.optim.AdamW, "lars": common.LARS, "muon": common.Muon}[name]
    if name != "adamw":
        assert (decayed[name], others[name]) == (True, False)


# ---- Judging ---------------------------------------------------------------------------------

def test_extract_is_the_model_on_every_image():
    """In evaluation mode, image by image: 101 are a full part and one more. The model is left as it was."""
    args = sjea.arguments(["--width", "8", "--projectors", "00", "--precision", "fp32", "--device", "cpu"])
    torch.manual_seed(0)
    model, images = sjea.SJEA(args).train(), common.make_shapes(101, 32, 0)[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    features = common.extract(model, images, args)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    model.eval()
    with torch.no_grad():
        single = [model.representations((image[None] / 255 - mean) / std) for image in images]
    assert features.keys() == single[0].keys()
    for level in features:
        assert_close(features[level], torch.cat([row[level] for row in single]), atol=1e-4)


def loop_knn(train, labels, test, test_labels, k, temperature):
    correct = 0
    for x, label in zip(test, test_labels):
        similarity = [sum(a * b for a, b in zip(x, z)) / math.hypot(*x) / math.hypot(*z) for z in train]
        votes = {}
        for i in sorted(range(len(train)), key=lambda i: -similarity[i])[:k]:
            votes[labels[i]] = votes.get(labels[i], 0) + math.exp(similarity[i] / temperature)
        correct += max(votes, key=votes.get) == label
    return correct / len(test)


def test_knn_equals_a_double_loop():
    """More test features than one part holds, lengths that differ, a class that never occurs, k above the number of features."""
    g = generator()
    centres = torch.randn(4, 6, generator=g)
    labels, test_labels = (torch.randint(4, (n,), generator=g) for n in (60, 1050))
    features, test = (centres[y] + 1.2 * torch.randn(len(y), 6, generator=g) for y in (labels, test_labels))
    features = features * torch.rand(60, 1, generator=g).add(0.1)
    labels[labels == 2] = 5
    test_labels[test_labels == 2] = 5
    values = [t.double().tolist() if t.is_floating_point() else t.tolist() for t in (features, labels, test, test_labels)]
    expected = {setting: loop_knn(*values, *setting) for setting in ((1, 0.1), (10, 0.1), (10, 5.0), (60, 0.1))}
    assert len(set(expected.values())) == 4
    for (k, temperature), accuracy in expected.items():
        assert common.knn(features, labels, test, test_labels, k, temperature) == accuracy
    assert common.knn(features, labels, test, test_labels) == expected[60, 0.1]              # k = 80 of 60
    assert common.knn(features, labels, test, test_labels, 10, 1e-3) == expected[1, 0.1]     # exp(1 / 1e-3) has no float


def test_effective_rank():
    """Many equal directions count each, one repeated vector (with faint noise) is 1, a known spectrum as numpy has it."""
    generator = torch.Generator().manual_seed(0)
    for scale in (1e3, 1e20):                  # squares above 1e38 have no float
        assert common.effective_rank(scale * torch.cat([torch.eye(8), -torch.eye(8)])) == pytest.approx(8, rel=1e-3)
    repeated = torch.ones(50, 8) * torch.arange(1.0, 9.0)
    assert common.effective_rank(repeated) == pytest.approx(1, abs=1e-6)
    assert common.effective_rank(repeated + 0.01 * torch.randn(50, 8, generator=generator)) == pytest.approx(1, abs=0.02)
    z = torch.randn(40, 6, generator=generator) @ torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1, 0.0])) + 7
    spectrum = np.append(np.linalg.eigvalsh(np.cov(z.double().numpy(), rowvar=False)).clip(min=0), 1)
    p = spectrum[spectrum > 1e-12] / spectrum.sum()
    assert common.effective_rank(z.requires_grad_()) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)


# ---- Files -----------------------------------------------------------------------------------

STATE = {"method": "vicreg", "config": {"seed": 3}, "step": 2, "terms": {}, "seconds": 0.5, "history": [],
         "model": {"w": torch.arange(1000.0)}, "optimizer": {"state": {}}}


def saved(state, **options):
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


UNUSABLE = {  # content of the file, words of the message
    "cut short": (saved(STATE)[:2000], ""),
    "old format, cut short": (saved(STATE, _use_new_zipfile_serialization=False)[:300], ""),
    "only a pickle's first bytes": (b"\x80\x02", ""),
    "empty": (b"", ""),
    "text": (b"not a checkpoint\n", ""),
    "pickle": (pickle.dumps({"step": 3}, protocol=2), ""),
    "tensor": (saved(torch.zeros(3)), ""),
    "field missing": (saved({name: value for name, value in STATE.items() if name != "optimizer"}), ""),
    "field of another type": (saved({**STATE, "step": "2"}), ""),
    "other method": (saved({**STATE, "method": "sjea"}), "sjea"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_unusable_checkpoints(tmp_path, kind):
    """The message names the file, in one line of the terminal."""
    path = tmp_path / "checkpoint.pt"
    content, word = UNUSABLE[kind]
    path.write_bytes(content)
    with pytest.raises(common.Unusable, match="checkpoint.pt.*" + word):
        common.load_checkpoint(path, "vicreg")


def test_missing_checkpoint(tmp_path):
    """A path that is not there is said to be that; a folder is no checkpoint either."""
    for path, words in ((tmp_path / "none.pt", "no checkpoint .*none.pt"), (tmp_path, tmp_path.name)):
        with pytest.raises(common.Unusable, match=words):
            common.load_checkpoint(path, "vicreg")


RESIDENT = """
import os, pathlib, common, torch
megabytes = lambda: int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
torch.ones(2**20)
{call}
before = megabytes()
x = torch.ones(2**26)                          # 256 MB
del x
print(megabytes() - before)
"""


@pytest.mark.skipif(os.confstr_names.get("CS_GNU_LIBC_VERSION") is None, reason="of glibc")
def test_the_memory_of_freed_tensors_is_kept():
    """A process that called keep_memory() still has a large tensor's memory after the tensor; one that did not has given it back."""
    resident = lambda call: float(subprocess.run([sys.executable, "-c", RESIDENT.format(call=call)], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert resident("") < 20 and 250 < resident("common.keep_memory()") < 280


TINY = """
import torch, common
def half(n):
    tiny = torch.full((n,), 713_624, dtype=torch.int32).view(torch.float32)     # 1e-39, by its bits
    print((tiny * 0.5).count_nonzero().item(), (tiny.view(-1, 4) @ torch.eye(4)).count_nonzero().item())
def main():
    torch.zeros(2**20) + 1                     # as loading data may, in all threads
    with common.denormals_flushed():
        half(2**20)
    half(16)
common.command_line(main)
"""


def test_denormal_numbers_are_flushed_in_every_thread(byol, tiny_run, monkeypatch):
    """In training alone, on a processor that can. Momentum that fades to them made a step of VICReg four times as long on an Intel CPU."""
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor has no such setting")
    found = subprocess.run([sys.executable, "-c", TINY], cwd=ROOT, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "4"}).stdout
    assert found.split() == ["0", "0", "16", "16"]
    left, half, step = [], lambda: (torch.full((4,), 713_624, dtype=torch.int32).view(torch.float32) * 0.5).count_nonzero().item(), byol.training_step
    monkeypatch.setattr(byol, "training_step", lambda *args: left.append(half()) or step(*args))
    tiny_run("byol", "--epochs", "1")
    assert left == [0] * 4 and half() == 4


def test_peak_memory_is_that_of_the_system():
    """Within 5 % of what Linux itself notes."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs Linux")
    assert common.peak_memory_mb("cpu") == pytest.approx(int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text()).group(1)) / 1024, rel=0.05)


def test_the_seed_decides_weights_order_and_augmentations(byol, tiny_run, monkeypatch):
    """Each of the three by itself; the same seed, the same draws."""
    step, seen = byol.training_step, {}

    def watched(model, x, args, generator):
        seen.setdefault(args.out, []).append((next(model.parameters()).detach().sum().item(), x.float().mean((1, 2, 3)).tolist(), generator.initial_seed()))
        return step(model, x, args, generator)

    monkeypatch.setattr(byol, "training_step", watched)
    for seed in ("0", "0", "1"):
        tiny_run("byol", "--epochs", "1", "--seed", seed)
    a, b, c = seen.values()
    assert a == b and len(a) == 4
    assert all(a[0][i] != c[0][i] for i in range(3))
    assert {generator for *_, generator in a}.isdisjoint(generator for *_, generator in c)


@pytest.mark.parametrize("method", ["vicreg", "sjea", "ijepa", "cjepa"])
def test_the_seed_decides_the_first_weights_of_every_method(method, tmp_path, monkeypatch):
    script, started = importlib.import_module(method), []
    monkeypatch.setattr(common, "load_shapes", conftest.tiny_shapes)
    monkeypatch.setattr(common, "train", lambda args, model, *rest: started.append(torch.cat([p.detach().flatten() for p in model.parameters()])))
    monkeypatch.setattr(eval_linear, "main", lambda *rest: None)
    for seed in ("0", "0", "1"):
        script.main(["--seed", seed, "--device", "cpu", "--out", str(tmp_path)])
    assert torch.equal(started[0], started[1]) and not torch.equal(started[0], started[2])


def test_the_curve_is_of_means_over_tenths_of_an_epoch(byol, tiny_run, monkeypatch):
    """Of 21 steps: ten parts of two, or of three, each the mean of its steps."""
    step, losses = byol.training_step, []
    monkeypatch.setattr(byol, "training_step", lambda *args: losses.append(step(*args)) or losses[-1])
    out = tiny_run("byol", "--epochs", "1", "--batch-size", "6")
    losses = np.array([loss.item() for loss, *_ in losses])
    row = json.loads((out / "metrics.jsonl").read_text())
    parts = np.array_split(losses, 10)
    assert len(losses) == 21 and {len(part) for part in parts} == {2, 3}
    assert row["curve"]["loss"] == pytest.approx([part.mean() for part in parts], rel=1e-3, abs=1e-4) and row["loss"] == pytest.approx(losses.mean(), rel=1e-4)


def test_the_bar_of_a_resumed_epoch_counts_its_own_steps(tiny_run, tmp_path, monkeypatch, capsys):
    """By a clock that ticks once a step, batches of 32 are 32 images/s, however many steps of the epoch came before."""
    class Bar(common.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._time, self.mininterval = lambda: len(ticks), 0
            self.start_t = self.last_print_t = len(ticks)

        def update(self, n=1):
            ticks.append(n)
            if len(ticks) == 3:
                signal.raise_signal(signal.SIGINT)
            return super().update(n)

    ticks = []
    monkeypatch.setattr(common, "tqdm", Bar)
    with pytest.raises(SystemExit):
        tiny_run("vicreg", "--epochs", "1", out=tmp_path / "run")
    capsys.readouterr()
    tiny_run("vicreg", "--epochs", "1", "--resume", out=tmp_path / "run")
    assert set(re.findall(r"([\d.]+) images/s, loss", capsys.readouterr().err)) == {"32.00"}


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_moves_seldom_in_a_log_file(terminal, tiny_run, monkeypatch, capsys):
    """By a clock that ticks ten seconds a step: every step on a terminal, no step of the first minute in a file."""
    class Bar(common.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._time, self.start_t, self.last_print_t = (lambda: 10 * len(ticks)), 0, 0

        def update(self, n=1):
            ticks.append(n)
            return super().update(n)

    ticks = []
    monkeypatch.setattr(common, "tqdm", Bar)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    tiny_run("vicreg", "--epochs", "1")
    moved = {int(n) for n in re.findall(r"(\d+)/128 \[", capsys.readouterr().err)}
    assert moved - {0, 128} == ({32, 64, 96} if terminal else set())       # the bar of a whole epoch is drawn as it goes


def test_a_warm_up_of_part_of_an_epoch(byol, tiny_run, monkeypatch):
    """Half of an epoch of four steps is two: the rates of all eight steps."""
    rates, schedule = [], common.learning_rate
    monkeypatch.setattr(common, "learning_rate", lambda *given: rates.append(schedule(*given)) or rates[-1])
    tiny_run("byol", "--epochs", "2", "--warmup-epochs", "0.5", "--lr", "0.08")
    cosine = [0.01 * (0.001 + 0.999 * (1 + math.cos(math.pi * i / 5)) / 2) for i in range(6)]
    assert rates[::2] == rates[1::2] == pytest.approx([0.005, 0.01, *cosine])    # of two groups, weights and others


@pytest.mark.parametrize("stopped", [6, 8])
def test_epochs_last_as_long_as_their_steps(stopped, byol, tiny_run, tmp_path, monkeypatch):
    """By a clock that ticks while a batch is waited for: four seconds an epoch, also where a run was stopped within one, or after, and went on."""
    waits, steps, load_batches, step = [], [], common.load_batches, byol.training_step

    def late(*given):
        for batch in load_batches(*given):
            waits.append(None)
            yield batch

    def interrupted(*given):
        steps.append(None)
        if len(steps) == stopped:
            signal.raise_signal(signal.SIGINT)
        return step(*given)

    monkeypatch.setattr(common, "load_batches", late)
    monkeypatch.setattr(byol, "training_step", interrupted)
    monkeypatch.setattr(common.time, "perf_counter", lambda: float(len(waits)))
    with pytest.raises(SystemExit):
        tiny_run("byol", "--epochs", "3", out=tmp_path / "run")
    tiny_run("byol", "--epochs", "3", "--resume", out=tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["seconds"], row["images_per_second"]) for row in rows] == [(4, 32)] * 3


def test_knn_comes_every_so_many_epochs_and_after_the_last(byol, tiny_run):
    out = tiny_run("byol", "--epochs", "5", "--eval-every", "2", "--batch-size", "128")
    assert [row["epoch"] for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "knn" in row] == [2, 4, 5]


@pytest.mark.parametrize("steps", [1, 4])
def test_decay_stays_and_progress_goes_from_0_to_1(steps, byol, tiny_run, monkeypatch):
    """Of a method without --weight-decay-end, also in a run of one step."""
    made, seen, make_optimizer = [], [], common.make_optimizer
    monkeypatch.setattr(common, "make_optimizer", lambda *given: made.append(make_optimizer(*given)) or made[-1])
    monkeypatch.setattr(byol, "update_target", lambda model, args, progress: seen.append((progress, *(group["weight_decay"] for group in made[-1].param_groups))))
    tiny_run("byol", "--batch-size", "128", "--epochs", str(steps), "--weight-decay", "0.3")
    assert seen == [(pytest.approx(i / max(1, steps - 1)), 0.3, 0.0) for i in range(steps)]


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_run_computes_in_the_precision_that_is_asked_for(precision, dtype, byol, tiny_run, monkeypatch):
    step, seen, extract = byol.training_step, [], byol.BYOL.representations
    monkeypatch.setattr(byol, "training_step", lambda *given: (lambda found: seen.append(found[2]["online"].dtype) or found)(step(*given)))
    monkeypatch.setattr(byol.BYOL, "representations", lambda self, x: (lambda found: seen.append(found["online"].dtype) or found)(extract(self, x)))
    tiny_run("byol", "--epochs", "1", "--precision", precision)
    assert len(seen) > 5 and set(seen) == {dtype}


def test_a_loss_that_is_not_finite_is_noticed_within_twenty_steps(byol, tiny_run, monkeypatch):
    """Not at the epoch's end, the 32nd."""
    step, calls = byol.training_step, []

    def failing(*given):
        loss, terms, embeddings = step(*given)
        calls.append(loss)
        return loss * (math.nan if len(calls) == 2 else 1), terms, embeddings

    monkeypatch.setattr(byol, "training_step", failing)
    with pytest.raises(common.RunFailed, match="loss is nan at step 1;"):
        tiny_run("byol", "--epochs", "1", "--batch-size", "4")
    assert len(calls) <= 21


def test_a_fresh_start_keeps_the_script_as_it_is_now(tiny_run, tmp_path, capsys):
    """In a folder where an earlier start failed before it saved."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "vicreg-as-run.py").write_text("loss = 0\n")
    tiny_run("vicreg", "--epochs", "1", out=tmp_path / "run")
    assert (tmp_path / "run" / "vicreg-as-run.py").read_bytes() == (ROOT / "vicreg.py").read_bytes()
    assert "is not what it was" not in capsys.readouterr().err


def test_a_run_goes_on_elsewhere(tiny_run):
    """On another machine, with the data in another place: what does not enter the result may differ."""
    out = tiny_run("vicreg", "--epochs", "2", stop_after=1)
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    there = dict(data_dir="/there", out="/there", device="cuda", precision="bf16", compile=True, eval_every=7, checkpoint_minutes=1.0, stream=True, resume=True)
    assert all(state["config"][name] != value for name, value in there.items())
    state["config"].update(there)
    torch.save(state, out / "checkpoint.pt")
    tiny_run("vicreg", "--epochs", "2", "--resume", out=out)
    assert len(common.load_checkpoint(out / "checkpoint.pt")["history"]) == 2


def test_batches_are_on_the_device_that_is_asked_for():
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    assert [batch.device.type for batch in common.load_batches(images, torch.arange(4).split(2), "meta")] == ["meta", "meta"]


# ---- A method of somebody else, as the README describes one -----------------------------------

@pytest.fixture
def byol(monkeypatch):
    """A module with the names that figures.py and eval_linear.py could take for a JEPA's."""
    script = types.ModuleType("byol")
    exec(BYOL, script.__dict__)
    monkeypatch.setitem(sys.modules, "byol", script)
    monkeypatch.setitem(eval_linear.MODELS, "byol", "BYOL")
    return script


BYOL = """
import copy

import torch

import common
import eval_linear
import vicreg


class BYOL(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.online = vicreg.VICReg(args)
        self.target_encoder = copy.deepcopy(self.online).requires_grad_(False)
        self.predictor = vicreg.projector(args.projector[-1], args.projector)

    def forward(self, x_1, x_2):
        return [self.predictor(z) for z in self.online(x_1, x_2)], self.target_encoder(x_1, x_2)

    def representations(self, x):
        return {"online": self.online.representations(x)["0"], "target": self.target_encoder.representations(x)["0"]}


def transformations(args):
    return (common.View((0.8, 1.0)),) * 2


def training_step(model, x, args, generator):
    p, z = model(*(common.augment(x, view, args.image_size, generator) for view in transformations(args)))
    similarity = torch.cosine_similarity(torch.cat(p), torch.cat(z[::-1])).mean()
    return -similarity, {"minus_similarity": -similarity}, {"online": common.gather(p[0]), "target": common.gather(z[0])}


@torch.no_grad()
def update_target(model, args, progress):
    for target, online in zip(model.target_encoder.parameters(), model.online.parameters()):
        target.lerp_(online, 1 - args.ema)


def arguments(argv=None):
    parser = common.Parser("BYOL")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--projector", type=common.widths, default="256-256")
    parser.add_argument("--ema", type=float, default=0.9)
    parser.add_argument("--optimizer", default="muon")
    common.add_common_arguments(parser, method="byol", epochs=2, batch_size=64, lr=0.06, weight_decay=1e-4, warmup_epochs=0.5, eval_every=1)
    return common.parse(parser, argv)


def main(argv=None):
    args = arguments(argv)
    data = common.load_dataset(args)
    torch.manual_seed(args.seed)
    features = common.train(args, BYOL(args), training_step, data, update_target)
    eval_linear.main(["--device", args.device, "--", f"{args.out}/checkpoint.pt"], data, features)
"""


def test_a_method_of_ones_own_is_trained_resumed_judged_and_drawn(byol, tiny_run):
    whole, cut = tiny_run("byol"), tiny_run("byol", stop_after=1)
    tiny_run("byol", "--resume", out=cut)
    whole, cut = ([common.load_checkpoint(out / "checkpoint.pt"), json.loads((out / "eval.json").read_text()), out] for out in (whole, cut))
    assert all(torch.equal(value, cut[0]["model"][name]) for name, value in whole[0]["model"].items()) and whole[1] == cut[1]
    assert whole[1]["levels"].keys() == {"online", "target"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_shapes", conftest.tiny_shapes)
        figures.main([str(whole[2] / "checkpoint.pt"), "--images", "60"])
    assert {path.stem for path in whole[2].glob("*.png")} == {"curves", "tsne", "class", "accuracy", "spectrum"} and (whole[2] / "index.html").exists()


def test_shapes_are_two_seeds_of_their_own(monkeypatch):
    """The same images for every --seed, none of them in both parts."""
    made = []
    monkeypatch.setattr(common, "make_shapes", lambda *given: made.append(given) or (torch.zeros(0), {}))
    common.load_shapes(sjea.arguments(["--seed", "5", "--image-size", "48"]))
    assert made == [(20000, 48, 1), (4000, 48, 2)]


def test_a_figure_of_the_log_is_freed_at_once(tmp_path, monkeypatch):
    """Those of all epochs would stay until Python looks for cycles, some 2 MB each."""
    made, draw = [], common.draw_curves

    def noted(logs):
        figure = draw(logs)
        made.append(weakref.ref(figure))
        return figure

    monkeypatch.setattr(common, "draw_curves", noted)
    common.write_log([{"epoch": 1, "loss": 1.0, "effective_rank": {"0": 1.0}, "feature_std": {"0": 1.0}}], tmp_path)
    assert [figure() for figure in made] == [None]


@pytest.mark.parametrize("term, scale", [(-0.5, "linear"), (0.5, "log")])
def test_terms_are_drawn_whatever_their_sign(monkeypatch, term, scale):
    made, figure = [], common.Figure
    monkeypatch.setattr(common, "Figure", lambda **options: made.append(figure(**options)) or made[-1])
    common.draw_curves({"": [{"epoch": 1, "loss": term, "term": term, "effective_rank": {"0": 1.0}, "feature_std": {"0": 1.0}}]})
    low, high = made[0].axes[1].get_ylim()
    assert made[0].axes[1].get_yscale() == scale and low < term < high


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "lars"])
def test_a_weight_that_the_loss_does_not_reach_is_named(byol, tiny_run, monkeypatch, optimizer):
    build = byol.BYOL.__init__
    monkeypatch.setattr(byol.BYOL, "__init__", lambda self, args: build(self, args) or setattr(self, "head", nn.Linear(2, 2)))
    with pytest.raises(common.RunFailed, match="the loss does not reach head.weight"):
        tiny_run("byol", "--optimizer", optimizer)


@pytest.mark.parametrize("before, after", [("a", "ab"), ("ab", "b"), ("a", "b")])
@pytest.mark.parametrize("batch", ["64", "32"])
def test_terms_that_change_end_the_run_and_leave_what_was_saved(batch, before, after, byol, tiny_run, tmp_path, monkeypatch):
    """In the run, and where it is resumed by a script that was changed in between; after two steps, an epoch or half of one."""
    step, calls = byol.training_step, []

    def changing(*args):
        loss, _, embeddings = step(*args)
        calls.append(loss)
        if stopped and len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return loss, dict.fromkeys(before if len(calls) < 3 else after, loss), embeddings

    monkeypatch.setattr(byol, "training_step", changing)
    for stopped in (False, True):
        calls.clear()
        out = tmp_path / f"run{stopped}"
        if stopped:
            with pytest.raises(SystemExit):
                tiny_run("byol", "--batch-size", batch, out=out)
        with pytest.raises(common.RunFailed, match=f"terms of step 2 are {', '.join(after)}, of those before {', '.join(before)};"):
            tiny_run("byol", "--batch-size", batch, *["--resume"] * stopped, out=out)
        assert not stopped and batch == "32" or common.load_checkpoint(out / "checkpoint.pt")["step"] == 2


@pytest.mark.parametrize("name", ["loss", "lr", "knn"])
def test_a_term_named_like_a_field_of_the_log_is_refused(byol, tiny_run, tmp_path, monkeypatch, name):
    step = byol.training_step
    monkeypatch.setattr(byol, "training_step", lambda *given: (lambda loss, terms, z: (loss, {**terms, name: loss}, z))(*step(*given)))
    with pytest.raises(common.RunFailed, match=f"{name} is a field of the log"):
        tiny_run("byol", out=tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_step_keeps_nothing_of_the_steps_before_the_last(byol, tiny_run, monkeypatch):
    """Else the graph of one step, with its activations, would lie in memory to the end."""
    step, seen, alive = byol.training_step, [], []

    def watched(*args):
        alive.append([term() is not None for term in seen[:-1]])
        loss, terms, embeddings = step(*args)
        seen.append(weakref.ref(terms["minus_similarity"]))
        return loss, terms, embeddings

    monkeypatch.setattr(byol, "training_step", watched)
    tiny_run("byol", "--epochs", "1")
    assert len(alive) == 4 and not any(itertools.chain(*alive))


def test_images_that_are_not_bytes_are_refused(byol, tmp_path, monkeypatch):
    """Scaled to [0, 1] they would be black."""
    monkeypatch.setattr(common, "load_shapes", lambda args: common.Dataset(torch.rand(128, 3, 32, 32), torch.zeros(1), {}, torch.zeros(1), {}))
    with pytest.raises(common.Unusable, match="the images are torch.float32 .*, not torch.uint8"):
        byol.main(["--out", str(tmp_path / "run"), "--device", "cpu"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", range(3))
def test_images_of_another_size_than_image_size_are_refused(part, byol, tmp_path, monkeypatch):
    """Views have --image-size; the images that are judged would have another."""
    images = [torch.zeros(128, 3, 32, 32, dtype=torch.uint8)] * 3
    images[part] = torch.zeros(128, 3, 40, 40, dtype=torch.uint8)
    monkeypatch.setattr(common, "load_shapes", lambda args: common.Dataset(images[0], images[1], {}, images[2], {}))
    with pytest.raises(common.Unusable, match=r"torch.uint8 \[128, 3, 40, 40\], not torch.uint8 from 0 to 255 \[N, 3, 32, 32\]"):
        byol.main(["--out", str(tmp_path / "run"), "--device", "cpu"])
    assert not (tmp_path / "run").exists()


def test_an_optimizer_that_does_not_exist_is_refused(byol, tiny_run, tmp_path):
    with pytest.raises(common.Unusable, match="--optimizer: there is no sgd, only muon, adamw and lars"):
        tiny_run("byol", "--optimizer", "sgd", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
