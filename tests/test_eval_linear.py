"""eval_linear.py: the probe against scikit-learn, eval.json against its parts, from the checkpoint alone."""
import json

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import common
import eval_linear


def blobs(seed, n, classes=7, d=12):
    """Overlapping Gaussian classes, features of very different scale."""
    centres = 0.6 * torch.randn(classes, d, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=generator)
    return (centres[y] + torch.randn(n, d, generator=generator)) * torch.logspace(-3, 3, d) + 5, y


def test_linear_probe_equals_scikit_learn():
    """The same objective, so nearly every single prediction agrees: top-1 within 0.2 points, top-5 within 0.2."""
    (x, y), (x_test, y_test) = blobs(1, 2000), blobs(2, 3000)
    scaler = StandardScaler().fit(x.double().numpy())
    reference = LogisticRegression(C=1 / (1e-3 * len(x)), max_iter=5000, tol=1e-8).fit(scaler.transform(x.double().numpy()), y)
    probability = torch.from_numpy(reference.predict_proba(scaler.transform(x_test.double().numpy())))
    hits = probability.topk(5).indices == y_test[:, None]
    top1, top5 = eval_linear.linear_probe(x, y, x_test, y_test)
    assert 0.4 < top1 < 0.9
    assert top1 == pytest.approx(hits[:, 0].float().mean().item(), abs=0.002)
    assert top5 == pytest.approx(hits.any(1).float().mean().item(), abs=0.002)


def test_probe_reads_only_train():
    """Labels that say nothing about the features give chance on test."""
    generator = torch.Generator().manual_seed(9)
    (x, y), (x_test, y_test) = ((torch.randn(2000, 50, generator=generator), torch.randint(7, (2000,), generator=generator)) for _ in range(2))
    assert eval_linear.linear_probe(x, y, x, y)[0] > 0.21                        # 50 features fit some noise
    assert eval_linear.linear_probe(x, y, x_test, y_test)[0] < 0.18              # 1/7, and four standard deviations


def test_scores_come_from_the_checkpoint_alone(tiny_run, tmp_path, monkeypatch, capsys):
    """eval.json holds the probe of each stack's pooled map, of the untrained stacks and of raw pixels, per label."""
    out = tiny_run("sjea", "--epochs", "2", "--lr", "0.05")
    import conftest
    monkeypatch.setattr(common, "load_shapes", conftest.tiny_shapes)
    monkeypatch.chdir(tmp_path)
    eval_linear.main([str(out / "checkpoint.pt"), "--labels", "style", "count"])
    result = json.loads((out / "eval.json").read_text())
    assert set(result["levels"]) == {"0", "1"} and result["label"] == "style"
    assert set(result["baselines"]) == {"untrained 0", "untrained 1", "raw pixels"}
    assert result["levels"] == {level: result["labels"]["style"][level] for level in ("0", "1")}

    model, args = eval_linear.load(out / "checkpoint.pt")
    data = conftest.tiny_shapes(args)
    scale = lambda images: common.normalise(images.float() / 255)
    with torch.no_grad():
        for label in ("style", "count"):
            maps = [model.maps(scale(images)) for images in (data.train_images, data.test_images)]
            for level in (0, 1):
                features = [y[level].mean((2, 3)) for y in maps]
                expected = eval_linear.linear_probe(features[0], data.train_labels[label], features[1], data.test_labels[label])
                assert result["labels"][label][str(level)]["linear_top1"] == pytest.approx(expected[0], abs=0.04)
        pixels = [images.flatten(1).float() for images in (data.train_images, data.test_images)]
        expected = eval_linear.linear_probe(pixels[0], data.train_labels["style"], pixels[1], data.test_labels["style"])[0]
        assert result["baselines"]["raw pixels"]["linear_top1"] == pytest.approx(expected, abs=0.04)

    torch.manual_seed(args.seed)
    untrained = eval_linear.untrained(args)
    trained = torch.load(out / "checkpoint.pt", weights_only=True)["model"]
    assert not torch.equal(untrained.f[0].stem[0].weight, trained["f.0.stem.0.weight"])
    assert torch.equal(model.f[0].stem[0].weight, trained["f.0.stem.0.weight"])
