"""eval_linear.py: the probe against scikit-learn, eval.json against its parts, from the checkpoint alone."""
import copy
import json
import re
import shlex
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

import common
import conftest
import eval_linear


def blobs(seed, n, classes=7, d=12):
    """Overlapping Gaussian classes, features of very different scale."""
    centres = 0.6 * torch.randn(classes, d, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=generator)
    return (centres[y] + torch.randn(n, d, generator=generator)) * torch.logspace(-3, 3, d) + 5, y


@pytest.mark.parametrize("l2", [1e-3, 1.0])
def test_linear_probe_equals_scikit_learn(l2):
    """The same objective, so nearly every single prediction agrees: top-1 within 0.2 points, top-5 within 0.2. (With l2 = 1 two thirds of the weight on ||W||^2 would gain 2.8 points.)"""
    (x, y), (x_test, y_test) = blobs(1, 2000), blobs(2, 3000)
    scaler = StandardScaler().fit(x.double().numpy())
    reference = LogisticRegression(C=1 / (l2 * len(x)), max_iter=5000, tol=1e-8).fit(scaler.transform(x.double().numpy()), y)
    probability = torch.from_numpy(reference.predict_proba(scaler.transform(x_test.double().numpy())))
    hits = probability.topk(5).indices == y_test[:, None]
    top1, top5 = eval_linear.linear_probe(x, y, x_test, y_test, *([l2] if l2 != 1e-3 else []))             # the default
    assert 0.4 < top1 < 0.9
    assert top1 == pytest.approx(hits[:, 0].float().mean().item(), abs=0.002)
    assert top5 == pytest.approx(hits.any(1).float().mean().item(), abs=0.002)


def test_a_constant_feature_changes_nothing():
    """Grey levels whose means round, constant in train and another constant in test: no classifier and no clustering sees them."""
    (x, y), (x_test, y_test) = blobs(1, 999, classes=3), blobs(2, 500, classes=3)
    grey = torch.arange(1, 200) / 255
    more, more_test = torch.cat([x, grey.expand(999, -1)], 1), torch.cat([x_test, grey.expand(500, -1) + 1 / 255], 1)
    assert eval_linear.linear_probe(more, y, more_test, y_test) == pytest.approx(eval_linear.linear_probe(x, y, x_test, y_test), abs=0.005)
    found, expected = (eval_linear.within(*pair, y * 0, y_test * 0, y, y_test) for pair in ((more, more_test), (x, x_test)))
    assert [found[name] for name in ("linear_top1", "nmi", "rand")] == pytest.approx([expected[name] for name in ("linear_top1", "nmi", "rand")], abs=0.005)


def test_probe_reads_only_train():
    """Labels that say nothing about the features give chance on test."""
    generator = torch.Generator().manual_seed(9)
    (x, y), (x_test, y_test) = ((torch.randn(2000, 50, generator=generator), torch.randint(7, (2000,), generator=generator)) for _ in range(2))
    assert eval_linear.linear_probe(x, y, x, y)[0] > 0.21                        # 50 features fit some noise
    assert eval_linear.linear_probe(x, y, x_test, y_test)[0] < 0.18              # 1/7, and four standard deviations


def test_scores_come_from_the_checkpoint_alone(tiny_run, tmp_path, monkeypatch, capsys):
    """eval.json holds the probe of each stack's pooled map, of the untrained stacks and of raw pixels, per label."""
    out = tiny_run("sjea", "--epochs", "2", "--lr", "0.05", "--seed", "3")
    import conftest
    monkeypatch.setattr(common, "load_shapes", conftest.tiny_shapes)
    monkeypatch.chdir(tmp_path)
    eval_linear.main([str(out / "checkpoint.pt"), "--labels", "style", "count"])
    result = json.loads((out / "eval.json").read_text())
    assert set(result["levels"]) == {"0", "1", "0+1"} and result["label"] == "style"
    assert set(result["baselines"]) == {"untrained 0", "untrained 1", "raw pixels"}
    assert result["levels"] == {level: result["labels"]["style"][level] for level in ("0", "1", "0+1")}

    model, args = eval_linear.load(out / "checkpoint.pt")
    data = conftest.tiny_shapes(args)
    scale = lambda images: common.normalise(images.float() / 255)
    with torch.no_grad():
        for label in ("style", "count"):
            maps = [model.maps(scale(images)) for images in (data.train_images, data.test_images)]
            for level in ("0", "1", "0+1"):                                # "0+1": both, side by side
                features = [torch.cat([y[int(stack)].mean((2, 3)) for stack in level.split("+")], dim=1) for y in maps]
                expected = eval_linear.linear_probe(features[0], data.train_labels[label], features[1], data.test_labels[label])
                assert result["labels"][label][level]["linear_top1"] == pytest.approx(expected[0], abs=0.04)
        pixels = [images.flatten(1).float() for images in (data.train_images, data.test_images)]
        expected = eval_linear.linear_probe(pixels[0], data.train_labels["style"], pixels[1], data.test_labels["style"])[0]
        assert result["baselines"]["raw pixels"]["linear_top1"] == pytest.approx(expected, abs=0.04)

    untrained = eval_linear.untrained(args)
    torch.manual_seed(3)
    assert all(torch.equal(p, q) for p, q in zip(untrained.state_dict().values(), sys.modules["sjea"].SJEA(args).state_dict().values(), strict=True))
    for k in ("0", "1"):
        x, x_test = (common.extract(untrained, images, args)[k] for images in (data.train_images, data.test_images))
        nearest = KNeighborsClassifier(80, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.1)).fit(x.numpy(), data.train_labels["style"]).score(x_test.numpy(), data.test_labels["style"])
        assert result["baselines"][f"untrained {k}"]["knn_top1"] == pytest.approx(nearest, abs=0.01)
    assert re.search(r"level +linear top-1 % +top-5 % +k-NN %\n0 +" + " +".join(f"{100 * value:.1f}" for value in result["levels"]["0"].values()), capsys.readouterr().out)
    assert list(result["levels"]["0"]) == ["linear_top1", "linear_top5", "knn_top1"]
    trained = torch.load(out / "checkpoint.pt", weights_only=True)["model"]
    assert not torch.equal(untrained.f[0].stem[0].weight, trained["f.0.stem.0.weight"])
    assert torch.equal(model.f[0].stem[0].weight, trained["f.0.stem.0.weight"])


@pytest.mark.parametrize("method", ("sjea", "cjepa"))
def test_a_run_ends_with_the_scores_of_its_checkpoint(method, tiny_run, monkeypatch, capsys):
    """The run hands over the features of its last epoch; alone, and from a resumed run without a step left, they are computed again."""
    out = tiny_run(method, "--epochs", "2", "--eval-every", "1", "--optimizer", "adamw", "--lr", "0.05")
    scores = json.loads((out / "eval.json").read_text())
    logged = [json.loads(line)["knn"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert logged[0] != logged[1] == {level: scores["levels"][level]["knn_top1"] for level in logged[1]}
    (out / "eval.json").unlink()
    tiny_run(method, "--epochs", "2", "--eval-every", "1", "--optimizer", "adamw", "--lr", "0.05", "--resume", out=out)
    assert json.loads((out / "eval.json").read_text()) == scores
    monkeypatch.setattr(common, "load_shapes", conftest.tiny_shapes)
    eval_linear.main([str(out / "checkpoint.pt"), "--device", "cpu"])
    assert json.loads((out / "eval.json").read_text()) == scores


# ---- few-shot, sub-categories ----


def test_shots_are_stratified_and_reproducible():
    y = torch.tensor([0] * 50 + [3] * 20 + [7] * 200)[torch.randperm(270, generator=torch.Generator().manual_seed(0))]
    for shots, counts in ((1, [1, 1, 1]), (5, [5, 5, 5]), (0.1, [5, 2, 20]), (0.001, [1, 1, 1])):
        chosen = eval_linear.draw_shots(y, shots, seed=3)
        assert [(y[chosen] == c).sum().item() for c in (0, 3, 7)] == counts and len(chosen.unique()) == sum(counts)
        assert torch.equal(chosen, eval_linear.draw_shots(y, shots, seed=3))
    assert not torch.equal(eval_linear.draw_shots(y, 5, seed=3), eval_linear.draw_shots(y, 5, seed=4))


def test_few_shot_is_the_mean_of_scikit_learns_probes(monkeypatch):
    """Five draws of 20 per class: scikit-learn's classifier on the same images, within half a point; n - 1 in the deviation."""
    (x, y), (x_test, y_test) = blobs(1, 2000), blobs(2, 3000)
    expected = []
    for seed in range(5):
        chosen = eval_linear.draw_shots(y, 20, seed)
        scaler = StandardScaler().fit(x[chosen].double().numpy())
        reference = LogisticRegression(C=1 / (1e-3 * len(chosen)), max_iter=5000, tol=1e-8).fit(scaler.transform(x[chosen].double().numpy()), y[chosen])
        expected.append(reference.score(scaler.transform(x_test.double().numpy()), y_test))
    draw_shots, seeds = eval_linear.draw_shots, []
    monkeypatch.setattr(eval_linear, "draw_shots", lambda y, shots, seed: seeds.append(seed) or draw_shots(y, shots, seed))
    found = eval_linear.few_shot(x, x_test, y, y_test, 20)
    assert seeds == [0, 1, 2, 3, 4]
    assert found["mean"] == pytest.approx(np.mean(expected), abs=0.005)
    assert found["std"] == pytest.approx(np.std(expected, ddof=1), abs=0.005) and found["std"] > 0.002


def test_within_finds_sub_categories_and_only_those():
    """Well separated ones: all scores 1. Labels at random: accuracy at the share of the largest, agreement as by chance."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: (torch.randint(3, (n,), generator=generator), torch.randint(10, 14, (n,), generator=generator))
    (y, sub), (y_test, sub_test) = draw(1200), draw(600)
    centres = 6 * torch.randn(3, 4, 16, generator=generator)
    features, test_features = (centres[a, b - 10] + torch.randn(len(a), 16, generator=generator) for a, b in ((y, sub), (y_test, sub_test)))
    clear = eval_linear.within(features, test_features, y, y_test, sub, sub_test)
    assert all(clear[name] == pytest.approx(1, abs=0.01) for name in ("linear_top1", "knn_top1", "nmi", "rand")) and 0.005 < clear["chance_nmi"] < 0.05
    random, random_test = (torch.randint(4, (n,), generator=generator) for n in (1200, 600))
    noise = eval_linear.within(features, test_features, y, y_test, random, random_test)
    assert abs(noise["linear_top1"] - 0.25) < 0.08 and abs(noise["knn_top1"] - 0.25) < 0.08 and abs(noise["rand"]) < 0.03
    assert noise["nmi"] == pytest.approx(noise["chance_nmi"], abs=0.02) and noise["chance_nmi"] < 0.05
    shares = [max(((y_test == c) & (sub_test == b)).sum().item() for b in range(10, 14)) / (y_test == c).sum().item() for c in range(3)]
    assert clear["chance_top1"] == pytest.approx(np.mean(shares))


def test_within_equals_scikit_learn_class_by_class():
    """On overlapping sub-categories: its classifier, its scores of its clustering."""
    from sklearn.cluster import KMeans
    (x, sub), (x_test, sub_test) = blobs(3, 1500, classes=4), blobs(4, 900, classes=4)
    y, y_test = torch.arange(1500) % 2, torch.arange(900) % 2
    found = eval_linear.within(x, x_test, y, y_test, sub, sub_test)
    linear, nmi, rand = [], [], []
    for c in (0, 1):
        scaler = StandardScaler().fit(x[y == c].double().numpy())
        a, b = (scaler.transform(features.double().numpy()) for features in (x[y == c], x_test[y_test == c]))
        linear.append(LogisticRegression(C=1 / (1e-3 * len(a)), max_iter=5000).fit(a, sub[y == c]).score(b, sub_test[y_test == c]))
        clusters = KMeans(4, n_init=10, random_state=0).fit_predict(b)
        nmi.append(normalized_mutual_info_score(sub_test[y_test == c], clusters))
        rand.append(adjusted_rand_score(sub_test[y_test == c], clusters))
    assert found["linear_top1"] == pytest.approx(np.mean(linear), abs=0.005)
    assert found["nmi"] == pytest.approx(np.mean(nmi), abs=0.03) and found["rand"] == pytest.approx(np.mean(rand), abs=0.03)


def test_within_votes_as_it_is_told_and_leaves_out_a_class_without_test_images():
    (x, sub), (x_test, sub_test) = blobs(3, 300, classes=4), blobs(4, 200, classes=4)
    y, y_test = torch.arange(300) % 3, torch.arange(200) % 2                                # no class 2 in test
    nearest = {k: np.mean([common.knn(x[y == c], sub[y == c], x_test[y_test == c], sub_test[y_test == c], k, temperature=10) for c in (0, 1)]) for k in (1, 25, 80)}
    for k, neighbours in ((1, 1), (80, 25)):                                                # 100 images of a class, 4 sub-categories
        assert eval_linear.within(x, x_test, y, y_test, sub, sub_test, k, temperature=10)["knn_top1"] == pytest.approx(nearest[neighbours])
    assert len(set(nearest.values())) == 3     # at a temperature of 0.1 the far ones hardly count


def test_within_knows_a_sub_category_that_train_lacks():
    """No prediction of it can be right, and it counts as one of its own."""
    x, sub = torch.tensor([[0.0, 1.0], [0.1, 1.0], [1.0, 0.0], [1.0, 0.1]]), torch.tensor([2, 2, 5, 5])
    y, y_test = torch.zeros(4, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    scores = eval_linear.within(x, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), y, y_test, sub, torch.tensor([3, 2]))      # 3 looks like 5; fewer images than sub-categories
    assert scores["linear_top1"] == scores["knn_top1"] == scores["chance_top1"] == 0.5


def test_a_checkpoint_in_a_read_only_folder_is_loaded_and_not_judged(tiny_run, monkeypatch, capsys):
    """One's own code reads it; what writes beside it says so before it computes."""
    import figures
    path, access = tiny_run("vicreg", "--epochs", "1") / "checkpoint.pt", common.os.access
    monkeypatch.setattr(common.os, "access", lambda folder, mode: not (Path(folder) == path.parent and mode & common.os.W_OK) and access(folder, mode))
    eval_linear.load(path)
    monkeypatch.setattr(common, "extract", lambda *args: pytest.fail("features were computed"))
    for main in (eval_linear.main, figures.main):
        monkeypatch.setattr(figures, "load_run", lambda *args, **more: None)
        with pytest.raises(common.Unusable, match="beside the .*checkpoint: .* is not a folder that can be written to"):
            main([str(path)])


def test_the_command_printed_at_the_end_reads_out_all_labels(tiny_run, tmp_path, monkeypatch, capsys):
    out = tiny_run("vicreg", "--epochs", "1", out=tmp_path / "my run")
    program, script, *flags = shlex.split(re.search("To read out more: (.+)", capsys.readouterr().out)[1])
    monkeypatch.setattr(common, "load_shapes", conftest.tiny_shapes)
    eval_linear.main(flags)
    assert (program, script) == ("python", "eval_linear.py")
    assert list(json.loads((out / "eval.json").read_text())["labels"]) == list(conftest.tiny_shapes(eval_linear.load(out / "checkpoint.pt")[1]).train_labels)
    assert "To read out more" not in capsys.readouterr().out               # nothing is left
    eval_linear.main([flags[0], "--data-dir", "some where"])
    assert shlex.split(re.search("To read out more: (.+)", capsys.readouterr().out)[1])[2:5] == [flags[0], "--data-dir", "some where"]


def test_a_copy_of_sjea_by_another_name_is_judged_as_sjea_is(tiny_run, monkeypatch):
    """Its stacks side by side, and its last stack fine-tuned."""
    copied = types.ModuleType("mine")
    exec((Path(eval_linear.__file__).parent / "sjea.py").read_text().replace('method="sjea"', 'method="mine"'), copied.__dict__)
    monkeypatch.setitem(sys.modules, "mine", copied)
    monkeypatch.setitem(eval_linear.MODELS, "mine", "SJEA")
    out = tiny_run("mine", "--epochs", "1")
    monkeypatch.setattr(common, "load_shapes", conftest.tiny_shapes)
    eval_linear.main([str(out / "checkpoint.pt"), "--fine-tune", "1"])
    result = json.loads((out / "eval.json").read_text())
    assert list(result["levels"]) == ["0", "1", "0+1"] and list(result["fine_tune"]["levels"]) == ["1"]


def test_lists_of_widths_and_of_numbers_pass_through_flags():
    parser = common.Parser("Lists.")
    parser.add_argument("--predictor", type=common.widths, default=[8])
    parser.add_argument("--scale", type=float, nargs=2, default=[0.1, 1.0])
    for argv in ([], ["--predictor", "8192-65536-32"], ["--scale", "0.5", "1"], ["--predictor", "64", "--scale", "1", "2"]):
        args = parser.parse_args(argv)
        assert parser.parse_args(eval_linear.flags(vars(args))) == args


def test_a_model_that_names_its_weights_twice_is_judged(tiny_run, monkeypatch):
    text = (Path(eval_linear.__file__).parent / "vicreg.py").read_text().replace('method="vicreg"', 'method="mine"')
    built, copied = "self.h = projector(self.f.channels, args.projector)\n", types.ModuleType("mine")
    assert text.count(built) == 1
    exec(text.replace(built, built + "        self.both = nn.ModuleList([self.f, self.h])\n"), copied.__dict__)
    monkeypatch.setitem(sys.modules, "mine", copied)
    monkeypatch.setitem(eval_linear.MODELS, "mine", "VICReg")
    model, _ = eval_linear.load(tiny_run("mine", "--epochs", "1") / "checkpoint.pt")
    assert model.both[0] is model.f and len(model.state_dict()) > len(list(model.parameters()))


# ---- protocols that train ----


def test_the_readmes_lines_for_ones_own_code_give_the_features(tiny_run):
    """Run as printed on a run's checkpoint: per stack the means of its maps, here of one image at a time in float64."""
    readme = (Path(eval_linear.__file__).parent / "README.md").read_text()
    out, images = tiny_run("sjea", "--epochs", "1"), torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    names = {"images": images}
    exec(re.search(r"```python\n(.+?)```", readme, re.S).group(1).replace("runs/sjea-shapes", str(out)), names)
    f = copy.deepcopy(names["model"]).double().f
    for i, image in enumerate(images):
        y = ((image.double() / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None])[None]
        for stack in ("0", "1"):
            y = f[int(stack)](y)
            assert torch.allclose(names["features"][stack][i].double(), y.mean((2, 3))[0], rtol=1e-4, atol=1e-5)


@pytest.fixture
def checkpoint(tiny_run, monkeypatch):
    out = tiny_run("vicreg", "--epochs", "1")
    monkeypatch.setattr(common, "load_shapes", lambda args: conftest.tiny_shapes(args, 128, 64))
    return out / "checkpoint.pt"


def plain(monkeypatch):
    monkeypatch.setattr(common, "augment", lambda x, view, size, generator: common.normalise(x.float() / 255))


def test_the_papers_linear_protocol_reaches_the_convex_optimum(checkpoint, monkeypatch):
    """Without augmentation and with many epochs, SGD fits train as logistic regression does; the encoder stays as it was."""
    plain(monkeypatch)
    model, args = eval_linear.load(checkpoint)
    data, before = common.load_dataset(args), copy.deepcopy(model.state_dict())
    data.test_images, data.test_labels = data.train_images, data.train_labels
    sgd = eval_linear.train_classifier(model, ["0"], data, "shape", args, 400, 0.3, frozen=True)["0"][0]
    features = common.extract(model, data.train_images, args)["0"]
    best = eval_linear.linear_probe(features, data.train_labels["shape"], features, data.train_labels["shape"])[0]
    assert best > 0.3 and sgd == pytest.approx(best, abs=0.08)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_one_step_of_the_linear_protocol_standardises_by_what_it_saw():
    """Features far from 0 and one batch: its own mean and deviation, not a tenth of the way there from 0 and 1."""
    class Brightness(torch.nn.Module):
        def representations(self, x):
            return {"0": x.mean((1, 2, 3))[:, None] + 100}
    x = torch.arange(64).repeat_interleave(3 * 8 * 8).view(64, 3, 8, 8).to(torch.uint8) + 96
    y = {"class": (torch.arange(64) >= 32).long()}
    args = eval_linear.importlib.import_module("vicreg").arguments(["--image-size", "8", "--device", "cpu", "--precision", "fp32"])
    assert eval_linear.train_classifier(Brightness(), ["0"], common.Dataset(x, x, y, x, y), "class", args, 1, 1.0, frozen=True)["0"][0] > 0.9


@pytest.mark.parametrize("frozen", [True, False])
def test_what_is_scored_are_the_test_images_each_by_itself(frozen):
    """All of them bright: of class 1 by the training images' statistics, whatever is beside them; at each level, of which one is dark where the other is bright."""
    class Brightness(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def representations(self, x):
            return {"0": self.scale * x.mean((1, 2, 3))[:, None] + 100, "1": 100 - self.scale * x.mean((1, 2, 3))[:, None]}
    x = torch.arange(64).repeat_interleave(3 * 8 * 8).view(64, 3, 8, 8).to(torch.uint8) + 96
    y, bright = {"class": (torch.arange(64) >= 32).long()}, x[40:].clone()
    args = eval_linear.importlib.import_module("vicreg").arguments(["--image-size", "8", "--device", "cpu", "--precision", "fp32"])
    for label, accuracy in ((1, 1.0), (0, 0.0)):                           # named wrongly, all are wrong
        data = common.Dataset(x, x, y, bright, {"class": torch.full((24,), label)})
        scores = eval_linear.train_classifier(Brightness(), ["0", "1"], data, "class", args, 60, 0.5, frozen=frozen)
        assert scores["0"][0] == scores["1"][0] == accuracy


def test_fine_tuning_a_jepa_trains_its_target_encoder(tiny_run, monkeypatch):
    model, args = eval_linear.load(tiny_run("ijepa", "--epochs", "1") / "checkpoint.pt")
    monkeypatch.setattr(common, "load_shapes", conftest.tiny_shapes)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    eval_linear.train_classifier(model, ["target"], common.load_dataset(args), "shape", args, 2, 1e-3, frozen=False)
    assert {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])} == {"target_encoder"}


def test_the_protocols_use_the_first_of_labels(checkpoint, monkeypatch):
    seen = []
    monkeypatch.setattr(eval_linear, "train_classifier", lambda model, levels, data, label, *rest, frozen: seen.append(label) or {level: (0.5, 0.5) for level in levels})
    eval_linear.main([str(checkpoint), "--labels", "style", "shape", "--shots", "2", "--augmented", "1", "--fine-tune", "1", "--supervised", "1", "--device", "cpu"])
    result = json.loads((checkpoint.parent / "eval.json").read_text())
    model, args = eval_linear.load(checkpoint)
    data = common.load_dataset(args)
    features = [common.extract(model, images, args)["0"] for images in (data.train_images, data.test_images)]
    expected = eval_linear.few_shot(*features, data.train_labels["style"], data.test_labels["style"], 2)
    assert seen == ["style"] * 3 and result["few_shot"]["2 per class"]["0"] == pytest.approx(expected, abs=0.02)


def test_an_empty_data_dir_downloads_nothing(checkpoint, monkeypatch):
    """A checkpoint from a stranger must not decide where a download goes."""
    import figures
    asked = []

    def load_dataset(args, download):
        asked.append((args.data_dir, download))
        raise common.Unusable("enough seen")

    monkeypatch.setattr(common, "load_dataset", load_dataset)
    for main in (eval_linear.main, figures.main):
        asked.clear()
        for folder in ([], ["--data-dir", ""], ["--data-dir", "here"]):
            with pytest.raises(common.Unusable, match="enough seen"):
                main([str(checkpoint), *folder])
        assert asked == [("data", False), ("data", False), ("here", True)]


def test_fine_tuning_changes_the_encoder_and_fits_what_it_is_shown(checkpoint, monkeypatch):
    plain(monkeypatch)
    model, args = eval_linear.load(checkpoint)
    data, before = common.load_dataset(args), copy.deepcopy(model.state_dict())
    data.test_images, data.test_labels = data.train_images, data.train_labels
    frozen = eval_linear.train_classifier(model, ["0"], data, "shape", args, 60, 0.1, frozen=True)["0"][0]
    tuned = eval_linear.train_classifier(model, ["0"], data, "shape", args, 60, 3e-3, frozen=False)["0"][0]
    assert tuned > frozen + 0.1
    assert not torch.equal(model.state_dict()["f.stem.0.weight"], before["f.stem.0.weight"])


def test_ten_steps_in_all_have_a_warm_up_of_one(checkpoint, monkeypatch):
    """The learning rates that the optimizer sees: the first is the peak, the last a thousandth of it."""
    model, args = eval_linear.load(checkpoint)
    data, seen, views, augment = common.load_dataset(args), [], [], common.augment
    monkeypatch.setattr(common, "augment", lambda x, view, *rest: views.append(view) or augment(x, view, *rest))
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *_: seen.append(self.param_groups[0]["lr"]))
    eval_linear.train_classifier(model, ["0"], data, "shape", args, 10, 0.1, frozen=True)
    assert len(seen) == 10 and seen[0] == pytest.approx(0.1) and seen[-1] == pytest.approx(1e-4)
    assert all(a >= b for a, b in zip(seen, seen[1:]))
    assert views == 10 * [common.View((0.3, 1.0), p_flip=0.5, p_jitter=0.0, p_grey=0.0)]


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own(checkpoint, monkeypatch):
    """Of 300 images two batches of 128. Ten epochs: a warm-up of two steps, a cosine of eighteen; fine-tuned, with a decay of 0.05."""
    model, args = eval_linear.load(checkpoint)
    data, seen, rates, decays = conftest.tiny_shapes(args, 300), [], [], set()
    number, augment = {image.numpy().tobytes(): i for i, image in enumerate(data.train_images)}, common.augment
    monkeypatch.setattr(common, "augment", lambda x, *rest: seen.append([number[image.numpy().tobytes()] for image in x]) or augment(x, *rest))
    for optimizer in (torch.optim.SGD, torch.optim.AdamW):
        monkeypatch.setattr(optimizer, "step", lambda self, *_: (rates.append(self.param_groups[0]["lr"]), decays.add(self.param_groups[0]["weight_decay"])))
    for frozen, decay in ((True, 0), (False, 0.05)):
        for found in (seen, rates, decays):
            found.clear()
        eval_linear.train_classifier(model, ["0"], data, "shape", args, 10, 0.1, frozen=frozen)
        assert [len(batch) for batch in seen] == [128] * 20
        epochs = [a + b for a, b in zip(seen[::2], seen[1::2])]
        assert all(len(set(epoch)) == 256 for epoch in epochs) and len({tuple(epoch) for epoch in epochs} | {tuple(range(256))}) == 11
        cosine = [0.1 * (0.001 + 0.999 * (1 + np.cos(np.pi * i / 17)) / 2) for i in range(18)]
        assert rates[:20] == pytest.approx([0.05, 0.1, *cosine]) and decays == {decay}


@pytest.mark.parametrize("label, changed", [("shape", True), ("pose", False), ("count", False), ("distance", False)])
def test_no_flip_or_crop_changes_the_label_that_is_learned(label, changed, checkpoint, monkeypatch):
    """A mirrored arrow has another pose, a magnified one another distance, and a crop may cut a copy off: images of these labels stay as they are."""
    model, args = eval_linear.load(checkpoint)
    seen, augment = [], common.augment
    monkeypatch.setattr(common, "augment", lambda x, *rest: seen.append((x, augment(x, *rest))) or seen[-1][1])
    eval_linear.train_classifier(model, ["0"], common.load_dataset(args), label, args, 1, 0.1, frozen=True)
    assert len(seen) == 1 and all(torch.allclose(view, common.normalise(x / 255), atol=1e-5) != changed for x, view in seen)


def test_one_image_per_class_or_in_all(checkpoint):
    """A class with one training image, and a training set of one: the sub-category or class it has is always told."""
    x, x_test = torch.randn(9, 4), torch.randn(6, 4)
    y, y_test = torch.tensor([0] * 8 + [1]), torch.tensor([0] * 5 + [1])
    scores = eval_linear.within(x, x_test, y, y_test, y, y_test)
    assert scores["linear_top1"] == scores["knn_top1"] == 1
    assert eval_linear.few_shot(x[:8], x_test[:5], y[:8], y_test[:5], 1) == {"mean": 1, "std": 0}
    with pytest.raises(common.Unusable, match="--shots: 1.5 is neither"):
        eval_linear.main([str(checkpoint), "--shots", "1.5"])
    with pytest.raises(common.Unusable, match="--shots: a class has only 12 training images"):
        eval_linear.main([str(checkpoint), "--shots", "12", "13"])


def test_two_training_images_are_needed(checkpoint, monkeypatch):
    monkeypatch.setattr(common, "load_shapes", lambda args: conftest.tiny_shapes(args, 1, 64))
    with pytest.raises(common.Unusable, match="--data-dir: there are fewer than two images to train on"):
        eval_linear.main([str(checkpoint)])


def test_fine_tuning_trains_every_stack(tiny_run, monkeypatch):
    """Of a run with --stop-gradient, too."""
    model, args = eval_linear.load(tiny_run("sjea", "--epochs", "1", "--stop-gradient") / "checkpoint.pt")
    monkeypatch.setattr(common, "load_shapes", conftest.tiny_shapes)
    before = {name: p.detach().clone() for name, p in model.f.named_parameters()}
    eval_linear.train_classifier(model, ["1"], common.load_dataset(args), "shape", args, 2, 1e-3, frozen=False)
    assert [name for name, p in model.f.named_parameters() if torch.equal(p, before[name])] == []


@pytest.mark.parametrize("method, judged", [("sjea", "1"), ("ijepa", "target")])
def test_the_highest_stack_and_the_target_encoder_are_fine_tuned(method, judged, tiny_run, monkeypatch):
    """And --supervised starts from scratch, the others from the trained weights."""
    out = tiny_run(method, "--epochs", "1")
    monkeypatch.setattr(common, "load_shapes", conftest.tiny_shapes)
    trained, calls = torch.load(out / "checkpoint.pt", weights_only=True)["model"], []
    same = lambda model: all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    monkeypatch.setattr(eval_linear, "train_classifier", lambda model, levels, data, label, args, *rest, frozen: calls.append((levels, same(model), *rest, frozen)) or {level: (0.5, 0.5) for level in levels})
    eval_linear.main([str(out / "checkpoint.pt"), "--augmented", "1", "--fine-tune", "2", "--supervised", "3"])
    levels = list(json.loads((out / "eval.json").read_text())["augmented"]["levels"])
    assert calls == [(levels, True, 1, 0.1, True), ([judged], True, 2, 1e-3, False), ([judged], False, 3, 1e-3, False)] and len(levels) == 2
    calls.clear()
    eval_linear.main([str(out / "checkpoint.pt"), "--supervised", "2"])
    assert calls == [([judged], False, 2, 1e-3, False)]


def test_raw_pixels_of_larger_images_are_those_of_32_px(tiny_run, monkeypatch):
    """Against Pillow, image by image."""
    out, judged = tiny_run("vicreg", "--epochs", "1", "--image-size", "48"), []
    monkeypatch.setattr(common, "load_shapes", conftest.tiny_shapes)
    monkeypatch.setattr(eval_linear, "judge", lambda *given: judged.append(given[:2]) or dict(linear_top1=0, linear_top5=0, knn_top1=0))
    eval_linear.main([str(out / "checkpoint.pt")])
    for found, images in zip(judged[-1], common.make_shapes(128, 48, 1)[:1] + common.make_shapes(64, 48, 2)[:1]):
        expected = [np.asarray(Image.fromarray(x.permute(1, 2, 0).numpy()).resize((32, 32), Image.BILINEAR)).transpose(2, 0, 1).ravel() for x in images]
        assert np.abs(255 * found.numpy() - np.stack(expected)).max() < 1.5


def test_every_protocol_by_flag(checkpoint, capsys, monkeypatch):
    """Its table is printed and eval.json has its numbers."""
    knn, asked = common.knn, []
    monkeypatch.setattr(common, "knn", lambda *given: asked.append(given[4:]) or knn(*given))
    eval_linear.main([str(checkpoint), "--within", "shape", "style", "--shots", "1", "0.1", "--augmented", "1", "--fine-tune", "1", "--supervised", "1",
                      "--k", "1", "--temperature", "0.05"])
    assert set(asked) == {(1, 0.05)}
    result, printed = json.loads((checkpoint.parent / "eval.json").read_text()), capsys.readouterr().out
    assert (result["judged_on"], result["k"], result["temperature"]) == ("64 test images", 1, 0.05)
    assert set(result["few_shot"]) == {"1 per class", "10 % of each class"} and set(result["within"]) == {"style"}
    assert all(0 <= result[name]["levels"]["0"]["top1"] <= result[name]["levels"]["0"]["top5"] <= 1 for name in ("augmented", "fine_tune", "supervised"))
    for title, row, columns in (
            ("shape from 1 per class, linear top-1, 5 draws", result["few_shot"]["1 per class"]["0"], {"mean %": "mean", "std %": "std"}),
            ("style inside each shape", result["within"]["style"]["0"], {"linear top-1 %": "linear_top1", "k-NN %": "knn_top1", "largest share %": "chance_top1",
                                                                         "NMI %": "nmi", "NMI, chance %": "chance_nmi", "Rand %": "rand"}),
            *((f"shape, {name}, 1 epochs", result[name.replace("-", "_")]["levels"]["0"], {"top-1 %": "top1", "top-5 %": "top5"}) for name in ("augmented", "fine-tune", "supervised"))):
        heading, values = (" +".join(words) for words in (map(re.escape, columns), (re.escape(f"{100 * row[name]:.1f}") for name in columns.values())))
        assert re.search(f"{re.escape(title)}\nlevel +{heading}\n0 +{values}\n", printed), title
    model, args = eval_linear.load(checkpoint)
    data = common.load_dataset(args)
    x, x_test = (common.extract(model, images, args)["0"].numpy() for images in (data.train_images, data.test_images))
    nearest = KNeighborsClassifier(1, metric="cosine").fit(x, data.train_labels["shape"]).score(x_test, data.test_labels["shape"])
    assert result["levels"]["0"]["knn_top1"] == pytest.approx(nearest, abs=0.01)
    y = {name: (data.train_labels[name], data.test_labels[name]) for name in ("shape", "style")}
    assert result["within"]["style"]["0"] == pytest.approx(eval_linear.within(torch.tensor(x), torch.tensor(x_test), *y["shape"], *y["style"], 1, 0.05))
