"""vicreg.py: loss terms against loops over the definitions, gradients, precision, and a short run."""
import gc
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import common
import sjea
import vicreg


def loop_invariance(z1, z2):
    n, d = z1.shape
    return sum(sum((z1[i, j] - z2[i, j]) ** 2 for j in range(d)) for i in range(n)) / n / d


def loop_variance(z, gamma=1.0, eps=1e-4):
    n, d = z.shape
    total = 0.0
    for j in range(d):
        mean = sum(z[i, j] for i in range(n)) / n
        var = sum((z[i, j] - mean) ** 2 for i in range(n)) / (n - 1)
        total += max(0.0, gamma - math.sqrt(var + eps))
    return total / d


def loop_covariance(z):
    n, d = z.shape
    mean = [sum(z[i, j] for i in range(n)) / n for j in range(d)]
    C = [[sum((z[i, a] - mean[a]) * (z[i, b] - mean[b]) for i in range(n)) / (n - 1) for b in range(d)] for a in range(d)]
    return sum(C[a][b] ** 2 for a in range(d) for b in range(d) if a != b) / d


@pytest.mark.parametrize("n, d", [(2, 1), (3, 5), (7, 4), (16, 9), (9, 16)])
def test_terms_equal_a_loop_over_the_definition(n, d):
    generator = torch.Generator().manual_seed(n * d)
    z1, z2 = (0.9 * torch.randn(n, d, generator=generator, dtype=torch.float64) + 1 for _ in range(2))
    s, v1, v2 = loop_invariance(z1.numpy(), z2.numpy()), loop_variance(z1.numpy()), loop_variance(z2.numpy())
    c1, c2 = loop_covariance(z1.numpy()), loop_covariance(z2.numpy())
    assert vicreg.invariance(z1, z2).item() == pytest.approx(s, abs=1e-10)
    assert vicreg.variance(z1).item() == pytest.approx(v1, abs=1e-10)
    assert vicreg.variance(z1, gamma=2.0, eps=0.1).item() == pytest.approx(loop_variance(z1.numpy(), 2.0, 0.1), abs=1e-10)
    assert vicreg.covariance(z1).item() == pytest.approx(c1, abs=1e-10)
    loss, terms = vicreg.vicreg_loss(z1, z2, 3.0, 5.0, 7.0)
    assert loss.item() == pytest.approx(3 * s + 5 * (v1 + v2) / 2 + 7 * (c1 + c2), abs=1e-9)
    assert terms["variance"].item() == pytest.approx((v1 + v2) / 2, abs=1e-10)
    assert terms["covariance"].item() == pytest.approx(c1 + c2, abs=1e-10)


def test_rounding_brings_no_covariance_below_0():
    """One dimension has no other to be correlated with: in float32 the two sums of c(Z) differ by rounding alone."""
    found = [vicreg.covariance(1000 * torch.randn(64, 1, generator=torch.Generator().manual_seed(seed))).item() for seed in range(50)]
    assert min(found) == 0 and max(found) < 1e-6 * 1000**4


@pytest.mark.parametrize("n, d", [(6, 4), (4, 6)])
def test_gradients(n, d):
    """Central differences in float64; the factor keeps every dimension away from the hinge's kink."""
    z1, z2 = (0.5 * torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    z1.requires_grad_(), z2.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: vicreg.vicreg_loss(a, b, 25, 25, 1)[0], (z1, z2))


def test_terms_stay_in_float32_under_autocast():
    z1, z2 = (torch.randn(64, 32, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    exact, _ = vicreg.vicreg_loss(z1.double(), z2.double(), 25, 25, 1)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = vicreg.vicreg_loss(z1, z2, 25, 25, 1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize("script", [vicreg, sjea])
def test_the_projector_is_the_published_one(script):
    """Three linear layers, BN and ReLU after the first two, no bias in the last."""
    h = script.projector(5, [7, 6, 4])
    assert [type(layer) for layer in h] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert [(layer.in_features, layer.out_features, layer.bias is None) for layer in h if isinstance(layer, nn.Linear)] == [(5, 7, False), (7, 6, False), (6, 4, True)]


@pytest.mark.parametrize("script", [vicreg, sjea])
def test_each_view_is_drawn_from_its_own_distribution(script, shapes_64, monkeypatch):
    augment, drawn = common.augment, []
    monkeypatch.setattr(common, "augment", lambda x, view, *rest: drawn.append(view) or augment(x, view, *rest))
    args = script.arguments(["--width", "8", "--projector", "8-8", "--precision", "fp32", "--augmentation", "vicreg"])
    model = (vicreg.VICReg if script is vicreg else sjea.SJEA)(args)
    script.training_step(model, shapes_64.images, args, torch.Generator().manual_seed(5))
    assert drawn == list(script.transformations(args)) and drawn[0] != drawn[1]


@pytest.mark.parametrize("augmentation", ["sjea", "vicreg", "crop"])
def test_a_step_computes_the_loss_of_its_two_views(augmentation, shapes_64):
    """training_step against the same steps written out with the loops above, in float32."""
    args = vicreg.arguments(["--width", "8", "--projector", "8-8", "--precision", "fp32", "--mu", "3", "--nu", "5", "--augmentation", augmentation])
    torch.manual_seed(0)
    model = vicreg.VICReg(args)
    loss, terms, embeddings = vicreg.training_step(model, shapes_64.images, args, torch.Generator().manual_seed(5))

    torch.manual_seed(0)
    model, generator = vicreg.VICReg(args), torch.Generator().manual_seed(5)
    T_1, T_2 = vicreg.transformations(args)
    z = [model.h(model.f(common.augment(shapes_64.images, T, 32, generator)).mean((2, 3))).detach().double().numpy() for T in (T_1, T_2)]
    expected = (25 * loop_invariance(*z) + 3 * (loop_variance(z[0]) + loop_variance(z[1])) / 2
                + 5 * (loop_covariance(z[0]) + loop_covariance(z[1])))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert embeddings["0"].shape == (64, 8) and model.f.channels == 8 * 8             # --width 8


def test_recipes_are_the_published_ones():
    small, medium, large = (vicreg.transformations(vicreg.arguments(["--augmentation", "vicreg", "--image-size", size])) for size in ("64", "65", "224"))
    assert medium == large
    assert [(v.p_blur, v.p_solarize) for v in large] == [(1.0, 0.0), (0.1, 0.2)]
    assert [(v.p_blur, v.p_solarize) for v in small] == [(0.0, 0.0), (0.0, 0.2)]
    assert all((v.p_flip, v.p_jitter, v.jitter, v.p_grey) == (0.5, 0.8, (0.4, 0.4, 0.2, 0.1), 0.2) for v in large)
    T_1, T_2 = vicreg.transformations(vicreg.arguments(["--augmentation", "sjea"]))
    assert T_1 == T_2 and (T_1.jitter, T_1.p_jitter, T_1.p_grey, T_1.p_blur) == ((0.4, 0.4, 0.4, 0.1), 0.8, 0.2, 0.0)
    for method in (vicreg, sjea):
        smallest = lambda *flags: method.transformations(method.arguments([*flags]))[1].crop_scale
        assert smallest("--dataset", "cifar10") == (0.3, 1.0)                                # S-JEA's authors' global_scale
        assert smallest("--dataset", "cifar10", "--augmentation", "vicreg") == (0.08, 1.0)
        assert smallest("--augmentation", "vicreg") == (0.8, 1.0)                            # shapes
        assert smallest("--augmentation", "crop", "--crop-min", "0.5") == smallest("--crop-min", "0.5") == (0.5, 1.0)


def read_log(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_the_contract_names(tiny_run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vicreg.py", "--out", "my runs"])
    out = tiny_run("vicreg", "--epochs", "2", "--eval-every", "2")
    rows = read_log(out)
    assert [row["epoch"] for row in rows] == [1, 2]
    assert {"loss", "invariance", "variance", "covariance", "lr", "images_per_second", "peak_memory_mb", "effective_rank", "seconds"} <= set(rows[0])
    for row in rows:
        assert row["loss"] == pytest.approx(25 * row["invariance"] + 25 * row["variance"] + 8 * row["covariance"], rel=1e-4)
    assert "knn" not in rows[0] and 0 <= rows[1]["knn"]["0"] <= 1
    assert (out / "vicreg-as-run.py").read_bytes() == Path(vicreg.__file__).read_bytes()
    assert {path.name for path in out.iterdir()} == {"config.json", "vicreg-as-run.py", "metrics.jsonl", "checkpoint.pt", "checkpoint-previous.pt", "curves.png", "eval.json"}
    config = json.loads((out / "config.json").read_text())
    assert config["seed"] == 0 and config["command"] == "vicreg.py --out 'my runs'"
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("raw pixels", "untrained 0", "linear top-1", "eval_linear.py"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lars"])
def test_a_resumed_run_equals_an_undisturbed_one(optimizer, tiny_run):
    """Two of three epochs, then the third from the checkpoint: same parameters and losses to the last bit."""
    flags = ("--epochs", "3", "--optimizer", optimizer)
    whole = tiny_run("vicreg", *flags)
    parts = tiny_run("vicreg", *flags, stop_after=2)
    assert len(read_log(parts)) == 2
    tiny_run("vicreg", *flags, "--resume", out=parts)
    a, b = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (whole, parts))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert [row["loss"] for row in read_log(whole)] == [row["loss"] for row in read_log(parts)]


def test_collapse_shows_and_warns(tiny_run, capsys):
    """Without the variance term the effective rank falls to near 1 and the run says so; with it, neither."""
    flags = ("--epochs", "12", "--lr", "0.2")
    collapsed = tiny_run("vicreg", "--mu", "0", *flags)
    assert "warning: level 0 is collapsing" in capsys.readouterr().err
    assert read_log(collapsed)[-1]["effective_rank"]["0"] < 1.2
    healthy = tiny_run("vicreg", *flags)
    assert "warning" not in capsys.readouterr().err
    assert read_log(healthy)[-1]["effective_rank"]["0"] > 2.5


def test_a_loss_that_is_not_finite_stops_the_run(tiny_run, monkeypatch):
    """Before it reaches the checkpoint, naming the term."""
    out = tiny_run("vicreg", "--epochs", "2", stop_after=1)
    before = (out / "checkpoint.pt").read_bytes()
    invariance, calls = vicreg.invariance, []
    monkeypatch.setattr(vicreg, "invariance", lambda z1, z2: calls.append(1) or invariance(z1, z2) * (math.nan if len(calls) == 3 else 1))
    with pytest.raises(common.RunFailed, match="invariance is nan at step 6"):
        tiny_run("vicreg", "--epochs", "2", "--resume", out=out)
    assert (out / "checkpoint.pt").read_bytes() == before


def test_weights_that_are_not_finite_do_not_reach_the_checkpoint(tiny_run, monkeypatch):
    """The loss of an epoch is finite, its last update is not."""
    out = tiny_run("vicreg", "--epochs", "2", stop_after=1)
    before, learning_rate = (out / "checkpoint.pt").read_bytes(), common.learning_rate
    monkeypatch.setattr(common, "learning_rate", lambda step, *rest: math.inf if step == 7 else learning_rate(step, *rest))
    with pytest.raises(common.RunFailed, match="weights are not finite after step 7"):
        tiny_run("vicreg", "--epochs", "2", "--resume", out=out)
    assert (out / "checkpoint.pt").read_bytes() == before


def test_resume_mends_a_log_that_is_behind_its_checkpoint(tiny_run):
    out = tiny_run("vicreg", "--epochs", "2")
    whole = (out / "metrics.jsonl").read_text()
    (out / "metrics.jsonl").write_text(whole.splitlines(True)[0])
    tiny_run("vicreg", "--epochs", "2", "--resume", out=out)
    assert (out / "metrics.jsonl").read_text() == whole


def test_resume_refuses_other_settings(tiny_run):
    out = tiny_run("vicreg", "--epochs", "1")
    with pytest.raises(common.Unusable, match="--lambda: 3.0, but the run .* was started with 25.0"):
        tiny_run("vicreg", "--epochs", "1", "--resume", "--lambda", "3", out=out)
    with pytest.raises(common.Unusable, match="argument --optimizer, --lr: adamw, 0.03, but the run .* was started with muon, 0.06"):
        tiny_run("vicreg", "--epochs", "1", "--resume", "--optimizer", "adamw", out=out)
    with pytest.raises(common.Unusable, match="already holds a run"):
        tiny_run("vicreg", "--epochs", "1", out=out)
    for flags, words in ((["--epochs", "2"], "--epochs: 2"), (["--epochs", "1", "--seed", "1"], "--seed: 1"), (["--epochs", "1", "--batch-size", "16"], "--batch-size: 16")):
        with pytest.raises(common.Unusable, match=words + ", but the run"):
            tiny_run("vicreg", "--resume", *flags, out=out)
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    del state["model"]["f.stem.0.weight"]
    torch.save(state, out / "checkpoint.pt")
    with pytest.raises(common.Unusable, match="its weights are not those of this model"):
        tiny_run("vicreg", "--epochs", "1", "--resume", out=out)


def test_a_finished_run_says_that_it_is_and_a_script_that_was_changed_is_named(tiny_run, capsys):
    out = tiny_run("vicreg", "--epochs", "1")
    assert "nothing is trained" not in capsys.readouterr().err
    tiny_run("vicreg", "--epochs", "1", "--resume", out=out)
    printed = capsys.readouterr().err
    assert f"all 1 epochs in {out} are done: nothing is trained" in printed and "is not what it was" not in printed
    (out / "vicreg-as-run.py").write_text("loss = 0\n")
    tiny_run("vicreg", "--epochs", "1", "--resume", out=out)
    assert f"warning: vicreg.py is not what it was when this run began: {out / 'vicreg-as-run.py'}" in capsys.readouterr().err
    assert (out / "vicreg-as-run.py").read_text() == "loss = 0\n"


@pytest.mark.parametrize("minutes, saves", [("1", 8), ("2", 4), ("10", 2)])
def test_checkpoints_come_by_the_minute(minutes, saves, tiny_run, monkeypatch):
    """Of eight steps in two epochs, each of which takes 61 s by this clock."""
    write, clock, saved = common.write, [0.0], []
    monkeypatch.setattr(common.time, "monotonic", lambda: clock.append(clock[-1] + 61) or clock[-1])
    monkeypatch.setattr(common, "write", lambda path, *rest, **more: saved.append(path.name) or write(path, *rest, **more))
    tiny_run("vicreg", "--epochs", "2", "--checkpoint-minutes", minutes)
    assert saved.count("checkpoint.pt") == saves


@pytest.mark.parametrize("term", [0.5, torch.ones(64)])
def test_a_term_that_is_no_scalar_tensor_is_named(term, tiny_run, monkeypatch):
    step = vicreg.training_step
    monkeypatch.setattr(vicreg, "training_step", lambda *given: (lambda loss, terms, z: (loss, {**terms, "mine": term}, z))(*step(*given)))
    with pytest.raises(common.RunFailed, match="mine is not a scalar tensor"):
        tiny_run("vicreg", "--epochs", "1")


def test_a_loss_that_is_not_finite_from_the_start_is_not_blamed_on_the_rate(tiny_run, monkeypatch):
    invariance = vicreg.invariance
    monkeypatch.setattr(vicreg, "invariance", lambda z1, z2: torch.log(invariance(z1, z2) * 0 - 1))
    with pytest.raises(common.RunFailed, match="invariance is nan at step 0.*The loss itself is at fault"):
        tiny_run("vicreg", "--epochs", "1")


def test_the_log_has_the_spread_of_the_last_batch(tiny_run, monkeypatch):
    """Per dimension, then the mean: dimensions that stand apart are not a spread."""
    step, seen = vicreg.training_step, []
    def shifted(*given):
        loss, terms, z = step(*given)
        seen.append({"0": z["0"] + torch.arange(16.0)})
        return loss, terms, seen[-1]
    monkeypatch.setattr(vicreg, "training_step", shifted)
    row, = read_log(tiny_run("vicreg", "--epochs", "1"))
    z = seen[-1]["0"].detach().double().numpy()
    assert row["feature_std"]["0"] == pytest.approx(z.std(0, ddof=1).mean(), rel=1e-4)


def test_a_log_without_its_checkpoint_is_not_overwritten(tiny_run):
    out = tiny_run("vicreg", "--epochs", "1")
    log = (out / "metrics.jsonl").read_text()
    (out / "checkpoint.pt").unlink()
    with pytest.raises(common.Unusable, match="already holds a run, or its log"):
        tiny_run("vicreg", "--epochs", "1", "--seed", "1", out=out)
    assert (out / "metrics.jsonl").read_text() == log


def test_a_folder_of_other_things_keeps_them(tiny_run, tmp_path):
    (tmp_path / "vicreg.py").write_text("homework")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(common.Unusable, match="--out: .*config.json is no run's"):
        tiny_run("vicreg", "--epochs", "1", out=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"vicreg.py", "config.json"}
    (tmp_path / "config.json").write_text('{"method": "vicreg"}')         # of a run that ended before it saved
    tiny_run("vicreg", "--epochs", "1", out=tmp_path)
    assert (tmp_path / "vicreg.py").read_text() == "homework" and (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("method, epochs, images, line", [
    ("vicreg", "2", 130, "--data-dir: 130 images to train on, but the run .* was started with 128"),
    ("ijepa", "4000", 160, "--ema: 0.99375, but the run .* was started with 0.9921875, on 128 images, not 160")])
def test_resume_refuses_another_number_of_images(method, epochs, images, line, tiny_run, monkeypatch):
    """Even of less than a batch, which leaves the number of steps as it was, but not the order of the images; and where a default follows from it."""
    out = tiny_run(method, "--epochs", epochs, stop_after=1)
    monkeypatch.setattr("conftest.tiny_shapes.__defaults__", (images, 64))
    with pytest.raises(common.Unusable, match=line):
        tiny_run(method, "--epochs", epochs, "--resume", out=out)


def test_one_direction_is_a_collapse_and_two_are_not(capsys):
    """The warning by the number of directions that embeddings have, each of variance 1, and once for a level that stays there."""
    z = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    z = (z - z.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky((z - z.mean(0)).T @ (z - z.mean(0)) / 499)).T    # covariance I
    row = lambda directions: {"epoch": 1, "loss": 1.0, "images_per_second": 1.0, "peak_memory_mb": 1.0,
                              "effective_rank": {"0": common.effective_rank(0.99 * z[:, :directions])}}
    for directions, warns in ((3, False), (2, False), (1, True)):
        common.report([row(3), row(directions)], 2, 100)
        assert ("level 0 is collapsing" in capsys.readouterr().err) == warns
    common.report([row(1), row(1)], 2, 100)
    assert "collapsing" not in capsys.readouterr().err


def test_a_fall_of_knn_below_its_best_warns_once(capsys):
    """By three points, or, where few images are judged, by four times the sampling error; a later rise and fall warns no more."""
    row = lambda epoch, accuracy: {"epoch": epoch, "loss": 1.0, "images_per_second": 1.0, "peak_memory_mb": 1.0, "effective_rank": {"target": 9.0},
                                   **({} if accuracy is None else {"knn": {"target": accuracy}})}
    for tested, accuracies, warns in ((10000, (0.40, 0.50, None, 0.475), False), (10000, (0.40, 0.50, None, 0.465), True), (10000, (0.50,), False),
                                      (400, (0.40, 0.50, 0.405), False), (400, (0.40, 0.50, 0.395), True), (10000, (0.50, 0.45, 0.52, 0.44), False)):
        common.report([row(1 + i, accuracy) for i, accuracy in enumerate(accuracies)], 9, tested)
        out, err = capsys.readouterr()
        assert out.startswith(f"epoch {len(accuracies)}/9 ") and f"k-NN {100 * accuracies[-1]:.1f} " in out
        assert ("gets worse" in err, "level target gets worse: its k-NN accuracy was 50.0 %" in err) == (warns, warns), accuracies


def test_drawing_the_curves_leaves_no_figure_behind(tmp_path):
    """Figures are full of reference cycles; a run of many epochs must not pile them up until the collector comes by."""
    row = {"epoch": 1, "loss": 1.0, "variance": 0.5, "effective_rank": {"0": 2.0}, "feature_std": {"0": 0.1}, "knn": {"0": 0.5}}
    gc.collect()
    before = sum(type(each) is Figure for each in gc.get_objects())
    gc.disable()                               # not by luck
    try:
        for _ in range(5):
            common.write_log([row], tmp_path)
        assert sum(type(each) is Figure for each in gc.get_objects()) <= before + 1    # the last may wait for the next
    finally:
        gc.enable()


def test_augmentation_crop_leaves_colours_alone():
    args = vicreg.arguments(["--augmentation", "crop"])
    colour = torch.tensor([200, 100, 30], dtype=torch.uint8)
    images = colour[None, :, None, None].expand(64, 3, 32, 32).contiguous()
    expected = common.normalise((colour.float() / 255)[None, :, None, None]).expand(64, 3, 32, 32)
    for view in vicreg.transformations(args):
        torch.testing.assert_close(common.augment(images, view, 32, torch.Generator().manual_seed(0)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("script", [vicreg, sjea])
def test_each_optimizer_has_its_own_rate(script):
    """As documented, and an explicit --lr goes before it."""
    rate = lambda *flags: script.arguments(list(flags)).lr
    assert (rate(), rate("--optimizer", "adamw"), rate("--optimizer", "lars"), rate("--optimizer", "adamw", "--lr", "0.02")) == (0.06, 0.03, 0.3, 0.02)


def test_a_script_that_is_edited_while_it_trains_is_judged_as_it_was(tmp_path):
    here, draw = Path(vicreg.__file__).parent, torch.Generator().manual_seed(0)
    for name in ("common.py", "eval_linear.py"):
        (tmp_path / name).symlink_to(here / name)
    text, start = (here / "vicreg.py").read_text(), 'if __name__ == "__main__":\n'
    assert start in text
    (tmp_path / "vicreg.py").write_text(text.replace(start, start + '    open(__file__, "w").write("raise SystemExit(9)")\n'))
    for folder in (tmp_path / part / label for part in ("train", "test") for label in "ab"):
        folder.mkdir(parents=True)
        for i in range(8):
            Image.fromarray(torch.randint(256, (16, 16, 3), generator=draw, dtype=torch.uint8).numpy()).save(folder / f"{i}.png")
    command = [sys.executable, "vicreg.py", "--dataset", "folder", "--data-dir", ".", "--image-size", "16", "--width", "8", "--projector", "8-8", "--batch-size", "8", "--device", "cpu", "--epochs", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "raw pixels" in done.stdout, done.stderr
