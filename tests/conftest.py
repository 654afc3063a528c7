"""Fixtures for all test files: a tiny `shapes`, and whole runs of a method's script on it."""
import importlib
import os

import pytest
import torch

import common


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA GPU; skipped unless pytest -m cuda finds one")
    if config.getoption("markexpr") != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""                            # the other tests compare with tensors on the CPU


def tiny_shapes(args, n=128, n_test=64):
    (images, labels), (test_images, test_labels) = (common.make_shapes(k, args.image_size, seed) for k, seed in ((n, 1), (n_test, 2)))
    return common.Dataset(images, images, labels, test_images, test_labels)


@pytest.fixture
def shapes_64():
    images, labels = common.make_shapes(64, 32, 3)
    return common.Dataset(images, images, labels, images, labels)


@pytest.fixture
def tiny_run(tmp_path, monkeypatch):
    """tiny_run(method, *flags, out=None, stop_after=None): run METHOD.py's main on 128 images and return
    its folder; with stop_after=k it is interrupted in the first step after epoch k."""
    def run(method, *flags, out=None, stop_after=None):
        out = out or tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        script = importlib.import_module(method)
        small = ["--batch-size", "32", "--precision", "fp32", "--device", "cpu"]
        small += ["--predictor-width", "12", "--predictor-depth", "1"] if "jepa" in method else ["--width", "8", "--projector", "16-16"]
        with monkeypatch.context() as patch:
            patch.setattr(common, "load_shapes", tiny_shapes)
            if stop_after:
                def interrupted(step, *rest):
                    if step >= stop_after * 128 // 32:
                        raise KeyboardInterrupt
                    return learning_rate(step, *rest)
                learning_rate = common.learning_rate
                patch.setattr(common, "learning_rate", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    script.main([*small, "--out", str(out), *flags])
            else:
                script.main([*small, "--out", str(out), *flags])
        return out
    torch.set_num_threads(min(2, torch.get_num_threads()))
    return run
