"""Bad input to any script: exit code 2, one line that names what is wrong, nothing written."""
import importlib
import json
import math
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies
from PIL import Image

import common
import vicreg

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of images and checkpoint files, most of them unusable in one way."""
    root = tmp_path_factory.mktemp("bad")
    def tree(name, *missing):
        for part in ("train", "test"):
            for label in ("cat", "dog"):
                folder = root / name / part / label
                folder.mkdir(parents=True)
                for i in range(2):
                    Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
        for path in missing:
            path = root / name / path
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return root / name
    tree("good")
    tree("no_train", "train")
    tree("no_test", "test")
    tree("no_classes", "train/cat", "train/dog")
    tree("empty_class", "train/dog/0.png", "train/dog/1.png")
    tree("class_in_test_alone", "train/dog")
    tree("other_classes", "test/dog")
    (tree("text_as_image") / "train" / "cat" / "1.png").write_text("no image")
    (tree("zero_bytes") / "test" / "dog" / "0.png").write_bytes(b"")
    whole = (tree("truncated") / "train" / "cat" / "1.png")
    whole.write_bytes(whole.read_bytes()[:40])
    (root / "a_file").write_text("")
    (root / "dangling").symlink_to(root / "not_mounted")
    (root / "text.pt").write_text("not a checkpoint")
    (root / "pickle.pt").write_bytes(pickle.dumps({"method": "vicreg"}))
    torch.save({"weights": torch.zeros(2)}, root / "foreign.pt")
    return root


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, made):
    """A real checkpoint of vicreg.py on the folder of images, and damaged copies of it."""
    out = tmp_path_factory.mktemp("run")
    vicreg.main(["--dataset", "folder", "--data-dir", str(made / "good"), "--image-size", "8", "--batch-size", "4", "--epochs", "1",
                 "--width", "8", "--projector", "4-4", "--out", str(out)])
    whole = (out / "checkpoint.pt").read_bytes()
    (out / "half.pt").write_bytes(whole[:len(whole) // 2])
    for name, field, value in (("unknown.pt", "method", "simclr"), ("no_model.pt", "model", {}), ("no_config.pt", "config", {})):
        state = torch.load(out / "checkpoint.pt", weights_only=True)
        state[field] = value
        torch.save(state, out / name)
    (out / "eval.json").unlink()
    return out


FOLDER = "--dataset folder --image-size 8 --batch-size 4 --data-dir {made}/"
BAD = [  # script, flags, words of the line
    ("sjea", "--dataset imagenet", "--dataset imagenet stl10"),
    ("sjea", "--unknown 3", "--unknown"),
    ("sjea", "--epoch 3", "--epoch"),
    ("sjea", "--epochs 0", "--epochs 0"),
    ("sjea", "--epochs many", "--epochs many"),
    ("sjea", "--epochs " + "9" * 401, "--epochs"),
    ("vicreg", "--batch-size 1", "--batch-size 1"),
    ("vicreg", "--batch-size 20001", "--batch-size 20001 20000"),
    ("vicreg", "--lr -1", "--lr -1"),
    ("vicreg", "--lr nan", "--lr nan"),
    ("vicreg", "--weight-decay inf", "--weight-decay inf"),
    ("vicreg", "--warmup-epochs 9 --epochs 5", "--warmup-epochs 9 5"),
    ("vicreg", "--mu -25", "--mu -25"),
    ("vicreg", "--lambda x", "--lambda x"),
    ("vicreg", "--crop-min 0", "--crop-min 0"),
    ("vicreg", "--crop-min 1.5", "--crop-min 1.5"),
    ("vicreg", "--image-size 7", "--image-size 7"),
    ("vicreg", "--image-size 5000", "--image-size 5000"),
    ("vicreg", "--width 7", "--width 7"),
    ("vicreg", "--arch resnet34", "--arch resnet34 resnet50"),
    ("vicreg", "--projector 512-0-512", "--projector 512-0-512"),
    ("vicreg", "--projector big", "--projector big"),
    ("vicreg", "--optimizer sgd", "--optimizer sgd lars muon"),
    ("vicreg", "--precision fp16", "--precision fp16 bf16"),
    ("vicreg", "--device tpu", "--device tpu"),
    ("vicreg", "--seed -1", "--seed -1"),
    ("vicreg", "--augmentation simclr", "--augmentation simclr sjea"),
    ("vicreg", "--stacks 2", "--stacks"),
    ("vicreg", "--out {made}/a_file", "--out a_file"),
    ("vicreg", "--out {made}/a_file/run", "--out a_file"),
    ("vicreg", FOLDER + "good --out {made}/dangling", "--out dangling"),
    ("vicreg", FOLDER + "good --out " + 300 * "x", "--out xxx"),
    ("sjea", "--stacks 0", "--stacks 0"),
    ("sjea", "--stacks two", "--stacks two"),
    ("sjea", "--projectors 101", "--projectors 101 2"),
    ("sjea", "--projectors 12", "--projectors 12"),
    ("sjea", "--stack-weights 1 1 1", "--stack-weights 3 2"),
    ("sjea", "--stack-weights 1 -1", "--stack-weights -1"),
    ("sjea", "--dataset folder --data-dir {made}/nowhere", "--data-dir nowhere"),
    ("sjea", "--dataset folder --data-dir {made}/a_file", "--data-dir a_file"),
    ("sjea", "--dataset cifar10 --data-dir {made}/a_file", "--data-dir CIFAR10"),
    ("sjea", "--dataset folder --data-dir " + 300 * "x", "--data-dir xxx"),
    ("sjea", "--dataset cifar10 --data-dir " + 300 * "x", "--data-dir xxx"),
    ("sjea", FOLDER + "no_train", "--data-dir train"),
    ("sjea", FOLDER + "no_test", "--data-dir no_test test"),
    ("sjea", FOLDER + "no_classes", "--data-dir class"),
    ("sjea", FOLDER + "empty_class", "--data-dir dog"),
    ("sjea", FOLDER + "other_classes", "--data-dir dog"),
    ("sjea", FOLDER + "class_in_test_alone", "--data-dir dog"),
    ("sjea", FOLDER + "text_as_image", "--data-dir cat/1.png"),
    ("sjea", FOLDER + "zero_bytes", "--data-dir dog/0.png"),
    ("sjea", FOLDER + "truncated", "--data-dir cat/1.png"),
    ("sjea", "--dataset folder --data-dir {made}/good --image-size 8 --batch-size 5", "--batch-size 5 4"),
    ("sjea", "--resume", "--resume checkpoint.pt"),
    ("sjea", "--resume --out {checkpoints}", "checkpoint.pt vicreg.py sjea.py"),
    ("sjea", "--out {checkpoints}", "--out --resume"),
    ("ijepa", "--patch-size 5", "--patch-size 5 32"),
    ("ijepa", "--patch-size 0", "--patch-size 0"),
    ("ijepa", "--patch-size 8", "--target-scale 4 0.15 0.2 0.75 1.5 --patch-size"),
    ("ijepa", "--image-size 12", "--target-scale 3"),
    ("ijepa", "--target-scale 0.2 0.15", "--target-scale"),
    ("ijepa", "--target-scale 0.2", "--target-scale 2"),
    ("ijepa", "--target-scale 0.2 2", "--target-scale 2"),
    ("ijepa", "--context-scale 0.8 0.85", "--context-scale 8"),
    ("ijepa", "--num-targets 6", "--num-targets 6"),
    ("ijepa", "--num-targets 0", "--num-targets 0"),
    ("ijepa", "--masking stripes", "--masking stripes rasterized"),
    ("ijepa", "--masking rasterized --image-size 36", "--masking 9"),
    ("ijepa", "--masking block --patch-size 16", "--masking 2"),
    ("ijepa", "--target edges", "--target edges pixels"),
    ("ijepa", "--loss l1", "--loss l1 l2"),
    ("ijepa", "--ema 1.1", "--ema 1.1"),
    ("ijepa", "--ema -0.1", "--ema -0.1"),
    ("cjepa", "--ema-end 1.1", "--ema-end 1.1"),
    ("ijepa", "--ema 0.996 --ema-end 0.995", "--ema-end 0.995 0.996"),
    ("ijepa", "--vit nano", "--vit nano micro"),
    ("ijepa", "--predictor-width 62", "--predictor-width 62 4"),
    ("ijepa", "--predictor-width 256", "--predictor-width 256 96"),
    ("ijepa", "--vit tiny --predictor-width 64", "--predictor-width 64 3"),
    ("ijepa", "--predictor-depth 0", "--predictor-depth 0"),
    ("ijepa", "--recipe large", "--recipe large paper"),
    ("ijepa", "--beta-vicreg 0.1", "--beta-vicreg"),
    ("cjepa", "--beta-vicreg -1", "--beta-vicreg -1"),
    ("cjepa", "--beta-cov x", "--beta-cov x"),
    ("cjepa", "--views images", "--views images blocks"),
    ("cjepa", "--masking random", "--views target"),
    ("cjepa", "--num-targets 1", "--views target"),
    ("cjepa", "--resume --out {checkpoints}", "checkpoint.pt vicreg.py cjepa.py"),
    ("eval_linear", "", "checkpoint"),
    ("eval_linear", "{made}/nothing.pt", "nothing.pt"),
    ("eval_linear", "{made}", "bad"),
    ("eval_linear", "{made}/text.pt", "text.pt"),
    ("eval_linear", "{made}/pickle.pt", "pickle.pt"),
    ("eval_linear", "{made}/foreign.pt", "foreign.pt"),
    ("eval_linear", "{checkpoints}/half.pt", "half.pt"),
    ("eval_linear", "{checkpoints}/unknown.pt", "unknown.pt simclr vicreg"),
    ("eval_linear", "{checkpoints}/no_model.pt", "no_model.pt"),
    ("eval_linear", "{checkpoints}/no_config.pt", "no_config.pt"),
    ("eval_linear", "{checkpoints}/checkpoint.pt --labels shape", "--labels shape class"),
    ("eval_linear", "{checkpoints}/checkpoint.pt --data-dir {made}/nowhere", "--data-dir nowhere"),
    ("eval_linear", "{checkpoints}/checkpoint.pt --data-dir {made}/other_classes", "--data-dir dog"),
]


@pytest.mark.parametrize("script, flags, words", BAD, ids=[f"{script} {flags}" for script, flags, _ in BAD])
def test_bad_input(script, flags, words, made, checkpoints, tmp_path, monkeypatch, capfd):
    flags = flags.format(made=made, checkpoints=checkpoints).split()
    if script != "eval_linear" and "--out" not in flags:
        flags += ["--out", "new"] * ("--resume" not in flags)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "augment", lambda *args: pytest.fail("training began"))
    before = snapshot(made, checkpoints)
    capfd.readouterr()
    error = refusal(script, flags, monkeypatch, capfd)
    assert all(word in error for word in words.split()), error
    assert not list(tmp_path.iterdir()) and snapshot(made, checkpoints) == before


def refusal(script, argv, monkeypatch, capfd):
    """The one line with which the script refuses argv, with exit code 2."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
    with pytest.raises(SystemExit) as stop:
        common.command_line(importlib.import_module(script).main)
    error = capfd.readouterr().err.split("\r")[-1].strip()
    assert stop.value.code == 2, error
    assert len(error.splitlines()) == 1 and error.startswith(f"{script}.py: ")
    return error


@pytest.mark.parametrize("script, flags", [("vicreg", ["--optimizer", "lars"]), ("sjea", ["--optimizer", "adamw"]), ("ijepa", ["--recipe", "paper"]), ("cjepa", ["--optimizer", "adamw"])])
def test_flags_of_the_command_line_change_the_defaults_of_others(script, flags, monkeypatch):
    """As those of a list do."""
    arguments = importlib.import_module(script).arguments
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
    assert arguments() == arguments(flags) and arguments().lr != arguments([]).lr


RESNET = dict(arch="resnet18", width=16, projector=[256, 256, 256], lambda_=25, mu=25, nu=8, augmentation="sjea", crop_min=0.8, lr=0.06, weight_decay=1e-4,
              epochs=2, batch_size=64, warmup_epochs=0.5, eval_every=1)
VIT = dict(vit="micro", patch_size=4, predictor_width=48, predictor_depth=3, masking="multiblock", target="features", loss="smooth_l1", crop_min=0.8,
           lr=0.032, weight_decay=0.04, weight_decay_end=0.04, epochs=3, batch_size=32, warmup_epochs=0.5, eval_every=3)


@pytest.mark.parametrize("script, defaults", [
    ("vicreg", RESNET), ("sjea", RESNET | dict(stacks=2, projectors="11", stack_weights=[1, 1], stop_gradient=False, base="vicreg")),
    ("ijepa", VIT), ("cjepa", VIT | dict(beta_vicreg=0.001, beta_sim=25, beta_std=25, beta_cov=1, views="blocks"))])
def test_the_defaults_are_those_of_the_results(script, defaults):
    """What `python METHOD.py` trains: the README's figures are of these."""
    args = importlib.import_module(script).arguments(["--device", "cpu"])
    common_to_all = dict(dataset="shapes", data_dir="data", image_size=32, optimizer="muon", seed=0, checkpoint_minutes=10, out=f"runs/{script}-shapes")
    assert {name: getattr(args, name) for name in common_to_all | defaults} == common_to_all | defaults
    assert importlib.import_module(script).arguments(["--dataset", "stl10"]).out == f"runs/{script}-stl10"


@pytest.mark.parametrize("fast, default", [(True, "bf16"), (False, "fp32")])
def test_bf16_is_the_default_where_it_is_fast(fast, default, monkeypatch):
    monkeypatch.setattr(common, "bf16_is_fast", lambda device: fast)
    assert [vicreg.arguments(flags).precision for flags in ([], ["--precision", "fp32"], ["--precision", "bf16"])] == [default, "fp32", "bf16"]


@pytest.mark.parametrize("out", ["a_file", "a_file/run"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_the_data_is_read(out, made, monkeypatch):
    monkeypatch.setattr(common, "load_dataset", lambda args: pytest.fail("the data was read"))
    with pytest.raises(common.Unusable, match="--out: .*a_file is not a folder that can be written to"):
        vicreg.main(["--out", str(made / out)])


def test_compile_without_a_compiler_is_refused(made, tmp_path, monkeypatch, capfd):
    def fail(x):
        raise RuntimeError("no working C++ compiler")
    monkeypatch.setattr(torch, "compile", lambda function: fail)
    monkeypatch.chdir(tmp_path)
    assert "--compile: torch.compile does not work on this machine: no working" in refusal(
        "vicreg", [*FOLDER.format(made=made).split()[:-1], str(made / "good"), "--compile", "--out", "new"], monkeypatch, capfd)
    assert not list(tmp_path.iterdir())


def test_a_run_in_a_folder_named_like_a_flag(tmp_path, monkeypatch, made):
    monkeypatch.chdir(tmp_path)
    vicreg.main([*FOLDER.format(made=made).split()[:-1], str(made / "good"), "--epochs", "1", "--width", "8", "--projector", "4-4", "--out=-dash"])
    assert json.loads((tmp_path / "-dash" / "eval.json").read_text())["levels"].keys() == {"0"}


RANGES = {  # flag: scripts, kind, smallest and largest value that is taken
    "--epochs": ("vicreg sjea ijepa cjepa", int, 1, None), "--batch-size": ("vicreg sjea ijepa cjepa", int, 2, None),
    "--image-size": ("vicreg sjea ijepa cjepa", int, 8, 1024), "--lr": ("vicreg sjea ijepa cjepa", float, 0, None),
    "--weight-decay": ("vicreg sjea ijepa cjepa", float, 0, None), "--warmup-epochs": ("vicreg sjea ijepa cjepa", float, 0, None),
    "--seed": ("vicreg sjea ijepa cjepa", int, 0, 2**31), "--eval-every": ("vicreg sjea ijepa cjepa", int, 0, None),
    "--checkpoint-minutes": ("vicreg sjea ijepa cjepa", float, 0, None), "--width": ("vicreg sjea", int, 8, 1024),
    "--lambda": ("vicreg sjea", float, 0, None), "--mu": ("vicreg sjea", float, 0, None), "--nu": ("vicreg sjea", float, 0, None),
    "--crop-min": ("vicreg sjea ijepa cjepa", float, 0.01, 1), "--stacks": ("sjea", int, 1, 16), "--ema": ("ijepa cjepa", float, 0, 1), "--ema-end": ("ijepa cjepa", float, 0, 1),
    "--patch-size": ("ijepa cjepa", int, 1, None), "--predictor-depth": ("ijepa cjepa", int, 1, 64), "--num-targets": ("ijepa cjepa", int, 1, None),
    "--predictor-width": ("ijepa cjepa", int, 4, None), "--weight-decay-end": ("ijepa cjepa", float, 0, None),
    "--beta-vicreg": ("cjepa", float, 0, None), "--beta-sim": ("cjepa", float, 0, None), "--beta-std": ("cjepa", float, 0, None),
    "--beta-cov": ("cjepa", float, 0, None)}
CHOICES = {"--dataset": "vicreg sjea ijepa cjepa", "--device": "vicreg sjea ijepa cjepa eval_linear", "--precision": "vicreg sjea ijepa cjepa",
           "--arch": "vicreg sjea", "--optimizer": "vicreg sjea", "--augmentation": "vicreg sjea", "--vit": "ijepa cjepa",
           "--masking": "ijepa cjepa", "--target": "ijepa cjepa", "--loss": "ijepa cjepa", "--views": "cjepa", "--recipe": "ijepa cjepa"}


def is_number(text, kind):
    try:
        return math.isfinite(kind(text))
    except (ValueError, OverflowError):
        return False


@strategies.composite
def bad_value(draw):
    """(script, [flag, a value that it does not take])."""
    flag = draw(strategies.sampled_from([*RANGES, *CHOICES]))
    if flag in CHOICES:
        value = draw(strategies.text(strategies.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=8).filter(str.isupper))
        return draw(strategies.sampled_from(CHOICES[flag].split())), [f"{flag}={value}"]
    scripts, kind, low, high = RANGES[flag]
    below = strategies.integers(max_value=math.ceil(low) - 1) if kind is int else strategies.floats(max_value=low, exclude_max=True, allow_infinity=True)
    words = strategies.text(strategies.characters(exclude_categories=("Cs", "Cc")), max_size=8).filter(lambda text: text != "--" and not is_number(text, kind))  # "--": lost by Python 3.11's argparse
    values = [below.map(str), words, strategies.sampled_from(["nan", "inf", "-inf", "1e999", "", "0x10", "1,5"])]
    if high is not None:
        values.append((strategies.integers(min_value=high + 1) if kind is int else strategies.floats(min_value=high, exclude_min=True)).map(str))
    return draw(strategies.sampled_from(scripts.split())), [f"{flag}={draw(strategies.one_of(values))}"]


@settings(max_examples=200, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bad_value())
def test_generated_bad_values(tmp_path, monkeypatch, capfd, command):
    script, flags = command
    monkeypatch.setattr(common, "load_dataset", lambda *args: pytest.fail(f"{flags} passed"))
    monkeypatch.chdir(tmp_path)
    error = refusal(script, ["nothing.pt", *flags] if script == "eval_linear" else [*flags, "--out", "new"], monkeypatch, capfd)
    assert flags[0].split("=")[0] in error
    assert not list(tmp_path.iterdir())


@settings(max_examples=50, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=strategies.binary(max_size=300), script=strategies.sampled_from(["vicreg", "sjea", "ijepa", "cjepa", "eval_linear"]))
def test_generated_checkpoints(tmp_path, monkeypatch, capfd, content, script):
    """Any bytes at all, and any bytes behind the first of a real archive."""
    images = torch.zeros(128, 3, 32, 32, dtype=torch.uint8)
    monkeypatch.setattr(common, "load_shapes", lambda args: common.Dataset(images, images, {}, images, {}))
    monkeypatch.setattr(common, "load_dataset", lambda args: common.load_shapes(args))
    path = tmp_path / "checkpoint.pt"
    for start in (b"", b"PK\x03\x04"):
        path.write_bytes(start + content)
        argv = [str(path)] if script == "eval_linear" else ["--resume", "--batch-size", "16", "--out", str(tmp_path)]
        assert "checkpoint.pt" in refusal(script, argv, monkeypatch, capfd)
        assert list(tmp_path.iterdir()) == [path]


def snapshot(*folders):
    return {path: path.is_file() and path.read_bytes() for folder in folders for path in folder.rglob("*")}


def test_as_a_command(tmp_path):
    """The same in a process of its own: exit code, one line, no traceback."""
    done = subprocess.run([sys.executable, ROOT / "sjea.py", "--stacks", "0"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "sjea.py: argument --stacks: 0 is not in [1, 16]\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_closed_stream_costs_no_run(closed, made, tmp_path):
    """As a daemon may start it: with nowhere to print to."""
    command = f"{sys.executable} {ROOT / 'vicreg.py'} --dataset folder --data-dir {made / 'good'} --image-size 32 --width 8 --projector 16-16 --batch-size 2 --epochs 1 --warmup-epochs 0 --out {tmp_path / 'run'} {closed}"
    assert subprocess.run(["bash", "-c", command]).returncode == 0 and (tmp_path / "run" / "eval.json").exists()
