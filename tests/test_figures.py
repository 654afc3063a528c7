"""figures.py: what is drawn against an independent computation, and index.html in a real browser."""
import base64
import copy
import dataclasses
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

import common
import conftest
import figures

ALL = {"tsne", "class", "covariance", "accuracy", "views", "spectrum", "masks", "predictions", "attention"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{method: Run} of two epochs on 128 images."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    load_shapes, common.load_shapes = common.load_shapes, conftest.tiny_shapes
    options = figures.arguments(["-", "--images", "60"])
    made = {}
    for method in ("sjea", "ijepa"):
        out = tmp_path_factory.mktemp("figures") / method
        small = ["--num-targets", "4", "--predictor-width", "12", "--predictor-depth", "1"] if method == "ijepa" else ["--width", "8", "--projector", "16-16"]
        __import__(method).main(["--batch-size", "32", "--precision", "fp32", "--device", "cpu", "--epochs", "2", "--eval-every", "1", "--out", str(out), *small])
        made[method] = figures.load_run(out / "checkpoint.pt", options)
    yield made
    common.load_shapes = load_shapes


def test_every_figure_that_applies_is_written(runs, capsys, monkeypatch):
    for method, missing in (("sjea", {"masks", "predictions", "attention"}), ("ijepa", {"views", "covariance"})):
        folder = runs[method].path.parent
        figures.main([str(runs[method].path), "--images", "60"])
        assert {path.stem for path in folder.glob("*.png")} - {"curves"} == ALL - missing and (folder / "index.html").exists()
        for path in folder.glob("*.png"):
            pixels = np.asarray(Image.open(path))
            assert pixels.shape[0] > 200 and len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 20, path
        with pytest.raises(common.Unusable, match=f"--only: nothing for {min(missing)} in 1 run of {method}.py"):
            figures.main([str(runs[method].path), "--images", "60", "--only", min(missing)])
    with pytest.raises(common.Unusable, match="nothing for masks in 2 runs of sjea.py, ijepa.py; views, masks and predictions are of the first alone"):
        figures.main([str(runs["sjea"].path), str(runs["ijepa"].path), "--images", "60", "--only", "masks"])


def lines(figure):
    return {line.get_label(): (list(line.get_xdata()), [float(y) for y in line.get_ydata()]) for line in figure.axes[0].lines}


def test_curves_show_the_log(runs):
    history = [json.loads(line) for line in (runs["sjea"].path.parent / "metrics.jsonl").read_text().splitlines()]
    for stack in ("0", "1"):
        assert lines(figures.covariance([runs["sjea"]]))[f"sjea: covariance_{stack}"] == ([1, 2], [row[f"covariance_{stack}"] for row in history])
        assert lines(figures.accuracy([runs["sjea"], runs["ijepa"]]))[f"sjea: level {stack}"] == ([1, 2], [100 * row["knn"][stack] for row in history])
    once = dataclasses.replace(runs["sjea"], history=history[-1:])         # k-NN measured once, say
    for axis in (figures.accuracy([once]).axes[0], *common.draw_curves({"": once.history}).axes[2:]):
        assert all(tick == round(tick) for tick in axis.get_xticks())      # no epoch 1.9
    assert set(lines(figures.accuracy([runs["sjea"], runs["ijepa"]]))) == {"sjea: level 0", "sjea: level 1", "ijepa: level target", "ijepa: level context"}


def test_two_runs_are_compared(runs, tmp_path, monkeypatch):
    """Every term of the log of every run, in tenths of an epoch (here of four steps), and folders of one name told apart."""
    axes = figures.compare([runs["sjea"], runs["ijepa"]]).axes
    assert figures.compare([runs["sjea"]]) is None
    drawn = {line.get_label(): ([float(x) for x in line.get_xdata()], list(line.get_ydata())) for axis in axes for line in axis.lines}
    for method, terms in (("sjea", ["loss", "covariance_0", "variance_1"]), ("ijepa", ["loss", "prediction"])):
        history = [json.loads(line) for line in (runs[method].path.parent / "metrics.jsonl").read_text().splitlines()]
        for term in terms:
            assert drawn[f"{method} {term}"] == ([0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2], history[0]["curve"][term] + history[1]["curve"][term])
            assert sum(history[1]["curve"][term]) / 4 == pytest.approx(history[1][term], rel=1e-3)
        for axis, field in zip(axes[2:], ("effective_rank", "feature_std", "knn")):
            for level in history[0][field]:
                shown, = (line for line in axis.lines if line.get_label() == f"{method} level {level}")
                assert list(shown.get_xdata()) == [1, 2] and list(shown.get_ydata()) == [row[field][level] for row in history] and field.split("_")[0] in axis.get_title().replace("-NN", "nn").replace("standard", "feature")
    styles = {axes[1].lines[0].get_linestyle(), axes[1].lines[-1].get_linestyle()}
    assert len(styles) == 2

    shutil.copytree(runs["sjea"].path.parent, tmp_path / "other" / "sjea")
    named = []
    monkeypatch.setitem(figures.FIGURES, "accuracy", lambda runs: named.extend(run.name for run in runs))
    with pytest.raises(common.Unusable, match="nothing for accuracy in 2 runs of sjea.py"):
        figures.main([str(runs["sjea"].path), str(tmp_path / "other" / "sjea" / "checkpoint.pt"), "--images", "60", "--only", "accuracy"])
    assert named == [str(runs["sjea"].path.parent), str(tmp_path / "other" / "sjea")]

    snapshot = shutil.copy(runs["sjea"].path, runs["sjea"].path.with_name("snapshot.pt"))
    monkeypatch.setitem(figures.FIGURES, "compare", lambda runs: named.extend(run.name for run in runs))
    with pytest.raises(common.Unusable, match="nothing for compare in 2 runs"):
        figures.main([str(runs["sjea"].path), str(snapshot), "--images", "60", "--only", "compare"])
    assert named[2:] == [str(runs["sjea"].path), str(snapshot)]


def test_runs_and_levels_can_be_told_apart(runs):
    """Six runs compared, sixteen levels of one, and two runs' levels have as many styles of line; a run's terms and levels as many colours."""
    look = lambda line: (line.get_color(), line.get_linestyle(), line.get_marker())
    six = [dataclasses.replace(runs["sjea"], name=f"seed {k}") for k in range(6)]
    first = figures.compare(six).axes[0].lines
    assert len({look(line) for line in first}) == 6 and len({line.get_color() for line in first}) == 1
    many = dataclasses.replace(runs["sjea"], history=[{**row, "knn": {str(stack): stack / 16 for stack in range(16)}} for row in runs["sjea"].history])
    assert len({look(line) for line in figures.accuracy([many]).axes[0].lines}) == 16
    for draw, drawn in ((figures.accuracy, 4), (figures.covariance, 4), (figures.spectrum, 4)):
        assert len({look(line) for line in draw(six[:2]).axes[0].lines}) == drawn
    for axis in common.draw_curves({"": runs["sjea"].history}).axes[1:]:
        assert len({line.get_color() for line in axis.lines}) == len(axis.lines) > 1


def test_accuracy_is_drawn_where_it_was_measured(runs):
    """As of --eval-every 2."""
    history = [{name: value for name, value in row.items() if name != "knn" or row["epoch"] == 2} for row in runs["sjea"].history]
    drawn = lines(figures.accuracy([dataclasses.replace(runs["sjea"], history=history)]))
    assert drawn == {f"sjea: level {stack}": ([2], [100 * history[1]["knn"][stack]]) for stack in ("0", "1")}


@pytest.mark.parametrize("name, value", [("dataset", "stl10"), ("data_dir", "elsewhere"), ("image_size", 40), ("holdout", True)])
def test_runs_share_images_where_all_about_them_is_the_same(runs, name, value):
    run, options = runs["sjea"], figures.arguments(["-", "--images", "60"])
    assert figures.load_run(run.path, options, shared=run).images is run.images
    other = dataclasses.replace(run, args=copy.copy(run.args))
    setattr(other.args, name, value)
    assert figures.load_run(run.path, options, shared=other).images is not run.images


def test_every_checkpoint_is_read_before_the_data(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "load_dataset", None)                      # calling it would fail
    with pytest.raises(common.Unusable, match="no checkpoint .*missing.pt"):
        figures.main([str(runs["sjea"].path), str(tmp_path / "missing.pt")])


@pytest.mark.parametrize("scale", [1, 1e20])    # the squares of a run that diverges have no float
def test_spectrum_is_that_of_the_covariance(runs, scale):
    run = dataclasses.replace(runs["sjea"], features={level: scale * z for level, z in runs["sjea"].features.items()})
    drawn = lines(figures.spectrum([run]))
    assert figures.spectrum([run]).axes[0].get_yscale() == "log"
    for level, z in run.features.items():
        expected = np.linalg.svd(z.double().numpy() - z.double().numpy().mean(0), compute_uv=False) ** 2
        label = next(label for label in drawn if f"level {level}," in label)
        assert drawn[label][0] == list(range(1, 60))
        assert drawn[label][1] == pytest.approx(list(expected / (len(z) - 1))[:59], rel=1e-3, abs=1e-5)      # 60 images span 59 directions of 64
        spread = expected / (len(z) - 1)
        shares = np.append(spread, 1) / (spread.sum() + 1)
        assert label.endswith(f"effective rank {np.exp(-sum(p * np.log(p) for p in shares if p > 0)):.1f}")
    one = dataclasses.replace(runs["sjea"], images=runs["sjea"].images[:1], features={level: z[:1] for level, z in runs["sjea"].features.items()})
    assert figures.spectrum([one]) is None


def test_tsne_colours_every_image_by_its_class(runs):
    run = runs["sjea"]
    for axis, level in zip(figures.tsne([run]).axes, run.features):
        assert level in axis.get_title()
        shown = {scatter.get_label(): len(scatter.get_offsets()) for scatter in axis.collections}
        assert shown == {str(c): n for c, n in enumerate(run.labels["shape"].bincount().tolist()) if n}
        points = figures.embed(run.features[level])
        for scatter in axis.collections:
            assert np.allclose(scatter.get_offsets(), points[run.labels["shape"] == int(scatter.get_label())])
        assert len({tuple(scatter.get_facecolor()[0]) for scatter in axis.collections}) == len(shown)


def test_tsne_of_one_image(runs):
    run = runs["sjea"]
    one = dataclasses.replace(run, features={level: z[:1] for level, z in run.features.items()}, labels={name: y[:1] for name, y in run.labels.items()})
    scatter, = figures.tsne([one]).axes[0].collections
    assert scatter.get_offsets().tolist() == [[0.5, 0.5]]


def test_tsne_of_two_datasets_has_one_legend_of_both(runs):
    other = dataclasses.replace(runs["ijepa"], labels={"class": torch.arange(60) % 12})
    for pair in ([runs["sjea"], other], [other, runs["sjea"]]):
        legend = figures.tsne(pair).legends[0]
        assert [text.get_text() for text in legend.get_texts()] == [str(c) for c in range(12)]
        assert legend.get_title().get_text() in ("shape / class", "class / shape")


@pytest.mark.parametrize("classes", (10, 60))
def test_tsne_has_its_legend_beside_square_maps(runs, classes):
    run = dataclasses.replace(runs["sjea"], labels={"class": torch.arange(60) % classes})
    figure = figures.tsne([run])
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [str(c) for c in range(classes)]
    assert figure.bbox.y0 <= legend.y0 and legend.y1 <= figure.bbox.y1 and legend.x1 <= figure.bbox.x1
    for axis in figure.axes:
        assert len({(tuple(scatter.get_facecolor()[0]), scatter.get_paths()[0].vertices.tobytes()) for scatter in axis.collections}) == classes
        assert axis.bbox.x1 <= legend.x0 and axis.bbox.width == pytest.approx(axis.bbox.height, rel=0.15)


def test_compare_leaves_out_a_run_that_was_stopped_in_its_first_epoch(runs):
    stopped = dataclasses.replace(runs["ijepa"], name="stopped", history=[])
    drawn = [line.get_label() for line in figures.compare([stopped, runs["sjea"], runs["ijepa"]]).axes[0].lines]
    assert drawn == ["sjea loss", "ijepa loss"] and figures.compare([stopped, runs["sjea"]]) is None


def test_a_run_is_shown_by_its_own_test_images_and_labels(runs):
    images, labels = common.make_shapes(64, 32, 2)
    for run in runs.values():
        order = [next(i for i in range(64) if torch.equal(images[i], image)) for image in run.images]
        assert len(set(order)) == 60 and order != sorted(order)
        assert all(torch.equal(run.labels[name], y[order]) for name, y in labels.items())


def test_one_class_is_drawn_with_its_images(runs):
    run = runs["sjea"]
    chosen = (run.labels["shape"] == run.labels["shape"].min()).nonzero()[:, 0]
    for axis, level in zip(figures.one_class([run]).axes, run.features):
        for box, i, point in zip(axis.artists, chosen, figures.embed(run.features[level][chosen])):
            assert np.allclose(box.xy, point) and np.allclose(box.offsetbox.get_data(), figures.picture(run.images[i]))
        assert len(axis.artists) == len(chosen)


@pytest.mark.parametrize("offset", [0, 1000])
def test_embed_keeps_neighbours_together(offset):
    """Three far clusters: every point's nearest neighbour in the map is of its own cluster, also where all directions are nearly one."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(90) % 3
    points = figures.embed(offset + 5 * torch.eye(3, 12)[y] + torch.randn(90, 12, generator=generator) / 4)
    distance = np.linalg.norm(points[:, None] - points, axis=2) + 9 * np.eye(90)
    assert points.min() == 0 and points.max() == pytest.approx(1) and (y[distance.argmin(1)] == y).all()


@pytest.mark.parametrize("features", [torch.ones(60, 16), torch.arange(1.0, 9)[:, None] * torch.ones(16), torch.randn(1, 16)])
def test_embed_of_one_point(features):
    """Equal directions, or one image: t-SNE itself ends in a crash of the process, or an error."""
    points = figures.embed(features)
    assert points.shape == (len(features), 2) and (points == 0.5).all()


def test_few_images_are_drawn(runs, tmp_path):
    """Five test images, among them one alone in its class: every figure, and a page whose neighbours are the other four."""
    for name, drawn in (("sjea", ALL - {"masks", "predictions", "attention"}), ("ijepa", ALL - {"views", "covariance"})):
        run = dataclasses.replace(runs[name], images=runs[name].images[:5], labels={label: y[:5] for label, y in runs[name].labels.items()},
                                  features={level: z[:5] for level, z in runs[name].features.items()})
        for figure in drawn:
            figures.FIGURES[figure]([run]).savefig(tmp_path / "figure.png")
        for level in page_data(run)["levels"].values():
            assert np.abs(level["inside"]).sum(1).min() > 0                # each in the map of its class, not left in the corner
            assert [sorted([i, *near]) for i, near in enumerate(level["nearest"])] == [[0, 1, 2, 3, 4]] * 5


def test_the_page_of_large_images_and_the_curves_of_many_stacks(runs):
    run = runs["sjea"]
    large = dataclasses.replace(run, images=run.images.repeat_interleave(16, 2).repeat_interleave(16, 3))   # 512 px: 40 side by side fit no webp
    assert page_data(large)["size"] == 224
    many = dataclasses.replace(run, history=[{**row, "knn": {str(stack): stack / 16 for stack in range(16)}} for row in run.history])
    assert len(lines(figures.accuracy([many]))) == 16


def test_masks_leave_out_what_the_grid_cannot_have(runs):
    """Patches of 8 on 32 px: no multi-block targets on a grid of 4 x 4. An odd grid: no quadrants."""
    for size, patch, rows in ((32, 8, ["rasterized", "block", "random"]), (36, 4, ["multiblock", "block", "random"])):
        args = __import__("ijepa").arguments(["--image-size", str(size), "--patch-size", str(patch), "--masking", "random", "--num-targets", "2"])
        run = dataclasses.replace(runs["ijepa"], args=args, images=common.resize(runs["ijepa"].images, size))
        assert [axis.get_ylabel() for axis in figures.masks([run]).axes[::6]] == rows


def test_scripts_of_ones_own_are_drawn(runs, monkeypatch):
    """With masks of another name, without I-JEPA's `pixels`, with an --augmentation but no transformations."""
    ijepa, run = __import__("ijepa"), runs["ijepa"]
    monkeypatch.setattr(ijepa, "draw_masks", lambda args, n, generator: {"random": ijepa.random_masks, "mine": ijepa.rasterized_masks}[args.masking](n, 8, generator))
    mine = copy.deepcopy(run.args)
    mine.masking = "mine"
    figure = figures.masks([dataclasses.replace(run, args=mine)])
    assert [axis.get_ylabel() for axis in figure.axes[::6]] == ["random", "mine"]
    assert [len(axis.collections) for axis in figure.axes[::6]] == [1, 3]  # outlines of targets
    monkeypatch.undo()
    own = lambda *inputs: run.model(*inputs)
    own.target_encoder = run.model.target_encoder
    drawn = [[np.array(axis.images[0].get_array()) for axis in figures.predictions([made]).axes] for made in (run, dataclasses.replace(run, model=own))]
    assert np.array_equal(*drawn)
    monkeypatch.delattr(__import__("sjea"), "transformations")
    assert figures.views([runs["sjea"]]) is None


def test_attention_is_the_last_blocks_softmax(runs):
    """Against a loop over heads and queries in float64."""
    run = runs["ijepa"]
    figure, encoder = figures.attention([run]), run.model.target_encoder.double()
    x = common.patches(common.normalise(run.images[:2].double() / 255), run.args.patch_size)
    x = encoder.embed(x) + encoder.position
    for block in encoder.blocks[:-1]:
        x = block(x)
    block = encoder.blocks[-1]
    for image in range(2):
        q, k, _ = block.qkv(block.norm1(x[image])).view(64, 3, block.heads, -1).unbind(1)
        total = torch.zeros(64, dtype=torch.float64)
        for head in range(block.heads):
            for query in range(64):
                logits = torch.stack([q[query, head] @ k[key, head] for key in range(64)]) / q.shape[-1] ** 0.5
                total += logits.softmax(0)
        drawn = figure.axes[8 + image].images[0].get_array()
        assert torch.allclose(torch.as_tensor(np.array(drawn)).double().flatten(), total / (64 * block.heads), atol=1e-6)
    encoder.float()


def test_attention_maps_lie_below_their_own_images(runs):
    """Of two runs on the same images and one on others: rows of images, map, map, images, map."""
    run = runs["ijepa"]
    other = dataclasses.replace(run, name="other", images=run.images.flip(0))
    axes = np.array(figures.attention([run, dataclasses.replace(run, name="same"), other]).axes).reshape(5, 8)
    assert [row[0].get_ylabel() for row in axes] == ["image", "ijepa", "same", "image", "other"]
    drawn = [[np.array(axis.images[0].get_array()) for axis in row] for row in axes]
    for i in range(8):
        assert np.allclose(drawn[0][i], run.images[i].permute(1, 2, 0) / 255) and np.allclose(drawn[3][i], run.images[-1 - i].permute(1, 2, 0) / 255)
        assert np.allclose(drawn[1][i], drawn[2][i]) and not np.allclose(drawn[1][i], drawn[4][i])


def test_masks_show_context_and_targets(runs):
    """Grey outside the context, the image's own pixels inside; as many outlines as targets."""
    run = runs["ijepa"]
    figure = figures.masks([run])
    for row, count in enumerate((4, 3, 1, 1)):
        axis, image = figure.axes[6 * row], figures.picture(run.images[0])
        shown = np.array(axis.images[0].get_array())
        same, grey = (abs(shown - image) < 1e-6).all(2), (shown == 0.85).all(2)
        assert (same | grey).all() and 0.1 < same.mean() < 0.6
        assert len(axis.collections) == count
    context, targets = __import__("ijepa").draw_masks(run.args, 32, torch.Generator().manual_seed(0))  # the first row is of the run's own strategy
    for axis, image, chosen in zip(figure.axes[:6], run.images, context):
        inside = np.zeros(64, bool)
        inside[chosen] = True
        pixels = inside.reshape(8, 8).repeat(4, 0).repeat(4, 1)[..., None]
        assert np.allclose(axis.images[0].get_array(), np.where(pixels, figures.picture(image), 0.85))
        assert axis.get_xlim() == (-1, 32) and axis.get_ylim() == (32, -1) # the first row of pixels is on top
    for outline, block in zip(figure.axes[0].collections, targets[0]):
        rows, columns = np.divmod(block.numpy(), 8)
        box = outline.get_paths()[0].get_extents()
        assert [box.x0, box.x1, box.y0, box.y1] == pytest.approx([4 * columns.min() - 0.5, 4 * columns.max() + 3.5, 4 * rows.min() - 0.5, 4 * rows.max() + 3.5], abs=0.6)


def test_predictions_are_patches_of_other_images(runs):
    """Every predicted patch is one of the other images', the one whose target features are nearest (by a loop)."""
    run = runs["ijepa"]
    figure = figures.predictions([run])
    context, targets = (m[:6] for m in __import__("ijepa").draw_masks(run.args, 32, torch.Generator().manual_seed(1)))
    with torch.no_grad():
        s_hat, _ = run.model(common.normalise(run.images[:6].float() / 255), context, targets)
        s = run.model.target_encoder(common.normalise(run.images[6:].float() / 255))
        s = torch.nn.functional.layer_norm(s, s.shape[-1:])
    assert [axis.get_ylabel() for axis in figure.axes[::6]] == ["context", "+ predictions", "image"]
    for axis, image, seen in zip(figure.axes, run.images, context):        # the first row, and below it the third
        whole = np.array(figure.axes[figure.axes.index(axis) + 12].images[0].get_array())
        assert np.allclose(whole, figures.picture(image))
        inside = np.isin(np.arange(64), seen).reshape(8, 8).repeat(4, 0).repeat(4, 1)[..., None]
        assert np.allclose(axis.images[0].get_array(), np.where(inside, whole, 217 / 255))
    shown = np.array(figure.axes[6].images[0].get_array())                 # image 0, second row
    j = targets[0, 3, 5].item()                                            # the last block is never drawn over
    distances = [[(s_hat[0, 3, 5] - s[n, m]).norm().item() for m in range(64)] for n in range(len(s))]
    n, m = np.unravel_index(np.argmin(distances), (len(s), 64))
    cut = lambda image, i: image[i // 8 * 4:i // 8 * 4 + 4, i % 8 * 4:i % 8 * 4 + 4]
    assert np.allclose(cut(shown, j), cut(figures.picture(run.images[6 + n]), m), atol=1e-6)


def test_views_are_those_of_training(runs):
    figure = figures.views([runs["sjea"]])
    images = [np.array(axis.images[0].get_array()) for axis in figure.axes]
    assert np.allclose(images[0], figures.picture(runs["sjea"].images[0]))
    scale = lambda channel, mean, std: (channel * std + mean).clip(0, 1)
    x = common.normalise(runs["sjea"].images[:1].float() / 255)[0]
    undone = np.stack([scale(c.numpy(), *ms) for c, ms in zip(x, ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225)))], axis=2)
    assert np.allclose(figures.picture(x), undone, atol=1e-6) and np.allclose(undone, images[0], atol=1e-6)
    assert not np.allclose(images[8], images[16])
    run, generator = runs["sjea"], torch.Generator().manual_seed(0)
    for row, view in enumerate(__import__("sjea").transformations(run.args), 1):
        for drawn, made in zip(images[8 * row:8 * row + 8], common.augment(run.images[:8], view, 32, generator)):
            assert np.allclose(drawn, figures.picture(made), atol=1e-6)


def page_data(run):
    return json.loads(re.search(r"const data = (\{.*\});", figures.explorer(run)).group(1))


def test_the_page_holds_images_labels_and_neighbours(runs):
    run, data = runs["sjea"], page_data(runs["sjea"])
    assert data["labels"] == {name: y.tolist() for name, y in run.labels.items()}
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["sheet"].split(",")[1]))).convert("RGB")).astype(int)
    for i in (0, 41, 59):
        tile = sheet[i // 40 * 32:i // 40 * 32 + 32, i % 40 * 32:i % 40 * 32 + 32]
        assert abs(tile - run.images[i].permute(1, 2, 0).numpy()).mean() < 12
    for level, z in run.features.items():
        assert np.allclose(data["levels"][level]["all"], figures.embed(z), atol=1e-4)
        for i in (3, 30):
            cosine = [(torch.dot(z[i], z[j]) / z[i].norm() / z[j].norm()).item() if j != i else -2 for j in range(len(z))]
            assert set(data["levels"][level]["nearest"][i]) == set(np.argsort(cosine)[-8:].tolist())
    for level, z in run.features.items():
        for c in range(10):
            chosen = (run.labels["shape"] == c).nonzero()[:, 0]
            assert np.allclose(np.array(data["levels"][level]["inside"])[chosen, :2], figures.embed(z[chosen]), atol=1e-4)


def test_the_page_shows_a_thousand_images_at_most(runs, monkeypatch):
    """Everything in it is of the same thousand."""
    images, labels = common.make_shapes(1003, 8, 2)
    many = dataclasses.replace(runs["sjea"], images=images, labels=labels, features={"0": torch.randn(1003, 4, generator=torch.Generator().manual_seed(0))})
    monkeypatch.setattr(figures, "embed", lambda features: np.zeros((len(features), 2)))
    data = page_data(many)
    assert data["labels"] == {name: y[:1000].tolist() for name, y in labels.items()}
    assert [len(data["levels"]["0"][name]) for name in ("all", "inside", "nearest")] == [1000] * 3 and np.max(data["levels"]["0"]["nearest"]) < 1000


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def browse(page, address):
    """The page's document after its scripts, at file://page + address."""
    command = [CHROMIUM, "--headless", "--no-sandbox", f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=3000", "--dump-dom", page.as_uri() + address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
@pytest.mark.parametrize("address, chosen, only", [("#class=all&image=43", 43, False), ("#class=2", None, True), ("#class=99&image=900", None, False)])
def test_the_page_in_a_browser(runs, tmp_path, address, chosen, only):
    """Without a network: a chosen image shows its labels and neighbours at each level, a chosen class its clusters; one that is not there, nothing."""
    run, page = runs["sjea"], tmp_path / "index.html"
    page.write_text(figures.explorer(run))
    dom = browse(page, address)
    assert "sjea: sjea on shapes</h1>" in dom and dom.count("<canvas") == 2
    assert ('id="hint">coloured by its 4 k-means clusters' in dom) == only
    data = page_data(run)
    if chosen is not None:
        assert re.search(r'id="point"><span class="tile"[^>]*background-position: -192px -64px', dom)      # column 3, row 1 of the sheet, twice as large
        assert f"image {chosen}: " + ", ".join(f"{name} {y[chosen]}" for name, y in data["labels"].items()) in dom
        for level in data["levels"].values():
            assert f'data-nearest="{" ".join(map(str, level["nearest"][chosen]))}"' in dom
    else:
        assert 'id="labels"' not in dom


VISIT = """<script>{
const canvas = document.getElementById("map 1"), box = canvas.getBoundingClientRect(), dots = POINTS, seen = {};
const pixels = canvas.getContext("2d").getImageData(0, 0, 460, 460).data;
seen.drawn = dots.map(([x, y]) => pixels[4 * (460 * Math.round(y) + Math.round(x)) + 3] > 0);
seen.area = pixels.filter((value, i) => i % 4 === 3 && value > 0).length;
const mouse = (type, i) => canvas.dispatchEvent(new MouseEvent(type, {clientX: box.left + dots[i][0] + 1, clientY: box.top + dots[i][1] + 1}));
const image = () => document.getElementById("labels").textContent.split(":")[0];
mouse("mousemove", TARGET); seen.hovered = image(); seen.before = location.hash;
mouse("click", TARGET); seen.after = location.hash;
mouse("mousemove", OTHER); seen.kept = image();
seen.sheet = document.querySelector(".tile").style.backgroundSize;
document.body.innerHTML = JSON.stringify(seen);
}</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_a_visitor_hovers_and_clicks(runs, tmp_path):
    """Points lie where the maps have them, those of a chosen class alone; the mouse finds the image below it, a click keeps it, in the address, too."""
    run, page = runs["sjea"], tmp_path / "index.html"
    y, level = run.labels["shape"].tolist(), page_data(run)["levels"]["1"]
    for address, which, shown in (("#class=all", "all", list(range(60))), (f"#class={y[23]}", "inside", [i for i in range(60) if y[i] == y[23]])):
        dots = [[10 + 440 * level[which][i][0], 10 + 440 * (1 - level[which][i][1])] for i in shown]            # 460 px, margins of 10
        apart = np.linalg.norm(np.array(dots)[:, None] - dots, axis=2) + 1e3 * np.eye(len(dots))
        target, other = apart.min(1).argsort()[-2:].tolist()               # no other point near them
        script = VISIT.replace("POINTS", json.dumps(dots)).replace("TARGET", str(target)).replace("OTHER", str(other))
        page.write_text(figures.explorer(run).replace("</html>", script))
        seen = json.loads(re.search(r"<body>(\{.*\})", browse(page, address)).group(1).replace("&amp;", "&"))
        assert all(seen["drawn"]) and 10 * len(shown) < seen["area"] < 50 * len(shown)                       # discs with a radius of 3
        assert seen["hovered"] == seen["kept"] == f"image {shown[target]}"
        assert seen["before"] == address and seen["after"] == f"{address}&image={shown[target]}"
        assert seen["sheet"].split()[0] == "2560px"                        # 40 columns of 32 px, twice as large
