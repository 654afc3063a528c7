"""Many processes compute what one does: losses, gradients, scores, checkpoints. On a CPU, with gloo."""
import importlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import common
import conftest
import eval_linear

METHODS = {"vicreg": ["--augmentation", "vicreg"], "sjea": ["--stacks", "2", "--projectors", "10"], "ijepa": [], "cjepa": ["--beta-vicreg", "0.5"]}
processes = multiprocessing.get_context("forkserver")                      # a new process without a new import of torch
processes.set_forkserver_preload(["conftest", "eval_linear", *METHODS])


def start(task, rank, world, port, arguments):
    """One of `world` processes, as torchrun starts them."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    task(*arguments)


def run(task, world, *arguments):
    """task(*arguments) in `world` processes; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [processes.Process(target=start, args=(task, rank, world, port, arguments)) for rank in range(world)]
    for process in started:
        process.start()
    for process in started:
        process.join(300)
    return [process.exitcode for process in started]


def small(method, *more):
    sizes = ["--num-targets", "2", "--predictor-width", "12", "--predictor-depth", "1"] if "jepa" in method else ["--width", "8", "--projector", "16-16"]
    return ["--precision", "fp32", "--device", "cpu", *sizes, *METHODS[method], *more]


def first_step(method, batch_size):
    """(model, loss, terms, embeddings, args) of one training step of this process's share in float64, BN in evaluation mode, after backward."""
    script = importlib.import_module(method)
    args = script.arguments(small(method, "--batch-size", str(batch_size)))
    normalise = common.normalise
    common.normalise = lambda x: normalise(x).double()                     # a process of its own, or undone below
    try:
        torch.manual_seed(0)
        model = eval_linear.build(args).double().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)                               # zero in the last of each block: most gradients would vanish
        images = common.share(common.make_shapes(batch_size, 32, 3)[0])
        forward = DistributedDataParallel(model) if common.process()[1] > 1 else model
        loss, terms, embeddings = script.training_step(forward, images, args, torch.Generator().manual_seed(5))
        loss.backward()
        return model, loss, terms, embeddings, args
    finally:
        common.normalise = normalise


def save_first_step(method, batch_size, folder):
    model, loss, terms, embeddings, _ = first_step(method, batch_size)
    terms = {name: common.average(value.detach().clone()) for name, value in {"loss": loss, **terms}.items()}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.save((terms, {level: z.detach() for level, z in embeddings.items()}, gradients), folder / f"{common.process()[0]}.pt")


@pytest.mark.parametrize("world", (2, 4))
@pytest.mark.parametrize("method", METHODS)
def test_losses_and_gradients_are_those_of_one_process(method, world, tmp_path):
    """The same global batch of 200 images, of which the augmentation's parts of 128 fit no process's share."""
    assert run(save_first_step, world, method, 200, tmp_path) == [0] * world
    model, loss, terms, embeddings, _ = first_step(method, 200)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) > 10 and max(g.abs().max() for g in gradients.values()) > 1e-3
    for rank in range(world):
        found_terms, found_embeddings, found = torch.load(tmp_path / f"{rank}.pt")
        assert_close(found_terms, {name: value.detach() for name, value in {"loss": loss, **terms}.items()}, rtol=1e-6, atol=1e-6)
        assert_close(found_embeddings, {level: z.detach() for level, z in embeddings.items()}, rtol=1e-6, atol=1e-6)
        assert_close(found, gradients, rtol=1e-6, atol=1e-6)


def script(method, argv):
    """METHOD.py on 128 images, with its evaluation; each process leaves its final parameters beside the run."""
    sys.argv, sys.stderr = [f"{method}.py", *argv], open(os.devnull, "w")
    common.load_shapes = conftest.tiny_shapes
    load, destroy = importlib.import_module(method), torch.distributed.destroy_process_group
    train = common.train

    def training(args, model, *rest):
        rank = common.process()[0]
        try:
            train(args, model, *rest)
        finally:
            torch.save([p.detach() for p in model.parameters()], Path(args.out).with_suffix(f".{rank}.pt"))
    common.train = training
    torch.distributed.destroy_process_group = lambda: destroy()
    common.command_line(load.main)


@pytest.mark.parametrize("method, world", [("vicreg", 2), ("sjea", 2), ("ijepa", 2), ("cjepa", 4)])
def test_parameters_agree_across_processes(method, world, tmp_path):
    """After 12 steps, to the last bit, with BN in training mode."""
    out = tmp_path / "run"
    assert run(script, world, method, small(method, "--batch-size", "32", "--epochs", "3", "--out", str(out))) == [0] * world
    first, *others = (torch.load(out.with_suffix(f".{rank}.pt")) for rank in range(world))
    for other in others:
        assert all(torch.equal(p, q) for p, q in zip(first, other))
    assert {path.name for path in out.iterdir()} == {"checkpoint.pt", "checkpoint-previous.pt", "config.json", "curves.png", "metrics.jsonl", "eval.json", f"{method}-as-run.py"}
    assert [json.loads(line)["epoch"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def slow_to_write(method, argv):
    """As script(), with a first process that takes two seconds to write a checkpoint."""
    fsync = os.fsync
    os.fsync = lambda descriptor: (time.sleep(2 * (os.fstat(descriptor).st_size > 100_000)), fsync(descriptor))
    script(method, argv)


def test_no_process_judges_a_checkpoint_before_it_is_written(tmp_path):
    assert run(slow_to_write, 2, "vicreg", small("vicreg", "--batch-size", "32", "--epochs", "1", "--out", str(tmp_path / "run"))) == [0, 0]
    assert (tmp_path / "run" / "eval.json").exists()


def interrupted(method, argv, last=6):
    """As script(), with a SIGTERM to the first process in step `last`."""
    learning_rate = common.learning_rate
    sent = []

    def at_step(step, *rest):
        if step == last and not sent and common.process()[0] == 0:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return learning_rate(step, *rest)
    common.learning_rate = at_step
    script(method, argv)


def interrupted_and_slow(method, argv):
    """As interrupted(), by a clock on which every step takes 4 s."""
    views, augment = [], common.augment
    common.augment = lambda *given: views.append(1) or augment(*given)
    time.perf_counter = lambda: 2.0 * len(views)                           # two views a step
    interrupted(method, argv)


def test_slow_steps_end_soon_after_a_signal(tmp_path):
    """Within the 30 s after which torchrun kills: at the next step but one at the latest, not at the 20th or the epoch's last, the 32nd."""
    out = tmp_path / "run"
    assert run(interrupted_and_slow, 2, "vicreg", small("vicreg", "--batch-size", "4", "--epochs", "1", "--out", str(out))) == [143, 143]
    assert common.load_checkpoint(out / "checkpoint.pt")["step"] in (7, 8)


SIGNALLED = """
import os, signal, sys, time
sys.path[:0] = ["tests", "."]
import common, conftest, vicreg
common.load_shapes = conftest.tiny_shapes
learning_rate, fsync, saving = common.learning_rate, os.fsync, []

def at_step(step, *rest):
    if step == 6 and os.environ["RANK"] == "0":
        saving.append(os.kill(os.getpid(), signal.SIGTERM))
    return learning_rate(step, *rest)

def slow(descriptor):
    if saving and os.fstat(descriptor).st_size > 100_000:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2)
    fsync(descriptor)

common.learning_rate, os.fsync = at_step, slow
common.command_line(vicreg.main)
"""


def test_a_stopped_run_saves_before_torchrun_ends_it(tmp_path):
    """The first process is slow to write and gets the signal twice, the second has nothing to write."""
    (tmp_path / "signalled.py").write_text(SIGNALLED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "signalled.py"),
               *small("vicreg", "--batch-size", "32", "--epochs", "9", "--out", str(tmp_path / "run"))]
    done = subprocess.run(command, cwd=Path(common.__file__).parent, capture_output=True, text=True)
    assert "stopped after step 8 of 36; to go on: " in done.stderr, done.stderr
    assert common.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 8
    assert not (tmp_path / "run" / "checkpoint.pt.tmp").exists()


@pytest.mark.parametrize("method", ("ijepa", "cjepa"))
def test_a_run_stops_and_resumes_on_another_number_of_processes(method, tmp_path):
    """2 processes, a signal, 1, a signal, 4: the log and the scores are those of one that never stopped."""
    flags = small(method, "--batch-size", "32", "--epochs", "4", "--eval-every", "2", "--lr", "0.004")
    one, many = tmp_path / "one", tmp_path / "many"
    assert run(script, 1, method, [*flags, "--out", str(one)]) == [0]
    assert run(interrupted, 2, method, [*flags, "--out", str(many)]) == [143, 143]
    assert common.load_checkpoint(many / "checkpoint.pt")["step"] == 8     # of 16: the first step after the signal at which all look
    assert run(interrupted, 1, method, [*flags, "--out", str(many), "--resume"], 10) == [143]
    assert common.load_checkpoint(many / "checkpoint.pt")["step"] == 11    # one process looks at every step
    assert run(script, 4, method, [*flags, "--out", str(many), "--resume"]) == [0] * 4
    log, other = ([untimed(json.loads(line)) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (one, many))
    scores, others = (untimed(json.loads((out / "eval.json").read_text())) for out in (one, many))
    assert len(log) == 4 and scores["levels"].keys() == {"target", "context"}
    assert_close((log, scores), (other, others), rtol=0.01, atol=0.02)     # a score in steps of 1 / 64


def untimed(value):
    """Numbers alone, without those of no two runs in common."""
    if isinstance(value, dict):
        return {name: untimed(v) for name, v in value.items() if name not in ("seconds", "images_per_second", "peak_memory_mb") and not isinstance(v, str)}
    return [untimed(v) for v in value] if isinstance(value, list) else value


def features_and_knn(folder):
    """extract() and knn() on 101 and 53 images: numbers that no number of processes divides."""
    args = importlib.import_module("vicreg").arguments(small("vicreg"))
    torch.manual_seed(0)
    model = eval_linear.build(args).eval()
    (x, y), (x_test, y_test) = ((images, labels["shape"]) for images, labels in (common.make_shapes(n, 32, n) for n in (101, 53)))
    features, test_features = common.extract(model, x, args)["0"], common.extract(model, x_test, args)["0"]
    accuracy = common.knn(features, y, test_features, y_test, k=5)
    torch.save((features, test_features, accuracy), folder / f"{common.process()[1]}-{common.process()[0]}.pt")


def test_extraction_and_knn_are_shared(tmp_path):
    for world in (1, 3):
        assert run(features_and_knn, world, tmp_path) == [0] * world
    features, test_features, accuracy = torch.load(tmp_path / "1-0.pt")
    assert features.shape == (101, 64) and 0 < accuracy < 1
    for rank in range(3):
        assert_close(torch.load(tmp_path / f"3-{rank}.pt"), (features, test_features, accuracy), rtol=1e-5, atol=1e-5)


def features_after_training_apart(folder):
    """extract() where BN's statistics are other ones in each process."""
    args = importlib.import_module("vicreg").arguments(small("vicreg"))
    torch.manual_seed(0)
    model = eval_linear.build(args).eval()
    for buffer in model.buffers():
        buffer += common.process()[0]
    torch.save(common.extract(model, common.make_shapes(20, 32, 3)[0], args)["0"], folder / f"{common.process()[1]}-{common.process()[0]}.pt")


def test_features_are_those_of_the_first_process(tmp_path):
    for world in (1, 2):
        assert run(features_after_training_apart, world, tmp_path) == [0] * world
    for rank in range(2):
        assert_close(torch.load(tmp_path / f"2-{rank}.pt"), torch.load(tmp_path / "1-0.pt"), rtol=1e-5, atol=1e-5)


class Download:
    """Stands for torchvision's CIFAR10, which takes some time to download."""

    def __init__(self, root, download):
        if not (root / "archive").exists():
            (root / "archive").write_text("half")
            time.sleep(1)
            (root / "archive").write_text("whole")
            with open(root / "downloads", "a") as log:
                log.write("one ")
        if (root / "archive").read_text() != "whole":
            raise RuntimeError("corrupted")


def download(folder):
    common.torchvision.datasets.CIFAR10 = Download
    common.torchvision_dataset("CIFAR10", SimpleNamespace(data_dir=folder), download=True)


def test_one_process_downloads_and_the_others_wait(tmp_path):
    assert run(download, 3, tmp_path / "data") == [0, 0, 0]
    assert (tmp_path / "data" / "downloads").read_text() == "one "


def unequal_data(part, argv):
    """As script(), with one image less of `part` in the second process, as of another copy of the data."""
    tiny = conftest.tiny_shapes

    def uneven(args):
        data = tiny(args)
        setattr(data, part, getattr(data, part)[common.process()[0]:])
        return data

    conftest.tiny_shapes = uneven
    script("vicreg", argv)


@pytest.mark.parametrize("part", ["images", "train_images", "test_images"])
def test_processes_with_unequal_data_are_refused(part, tmp_path):
    assert run(unequal_data, 2, part, small("vicreg", "--batch-size", "32", "--out", str(tmp_path / "run"))) == [2, 2]
    assert not (tmp_path / "run").exists()


def judge_unequal_data():
    """extract() of 9 and 10 images, whose halves, rounded up, are alike."""
    args = importlib.import_module("vicreg").arguments(small("vicreg"))
    common.command_line(lambda: common.extract(eval_linear.build(args), common.make_shapes(10, 32, 0)[0][common.process()[0]:], args))


def test_processes_with_unequal_data_do_not_judge():
    assert run(judge_unequal_data, 2) == [2, 2]


def in_one_folder(folder):
    """vicreg.py into a folder that holds a log: the first process alone looks there. Each process's words end up in `folder`."""
    sys.argv, sys.stderr = ["vicreg.py"], open(folder / f"{os.environ['RANK']}.txt", "w")
    common.load_shapes = conftest.tiny_shapes
    common.command_line(lambda: importlib.import_module("vicreg").main(small("vicreg", "--batch-size", "32", "--out", str(folder))))


def test_what_the_first_process_refuses_is_no_traceback_of_the_others(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("a log\n")
    assert run(in_one_folder, 2, tmp_path) == [2, 1]
    words = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert "already holds a run" in words[0] and words[1] == "vicreg.py: another process has ended. What was saved is whole.\n"


def load_here(folder):
    """eval_linear.load() of a checkpoint that is on the first machine alone."""
    rank = int(os.environ["RANK"])
    model, _ = eval_linear.load(folder / f"machine{rank}" / "checkpoint.pt", "cpu")
    torch.save([p.detach() for p in model.parameters()], folder / f"{rank}.pt")


def test_a_checkpoint_is_read_by_the_first_process_alone(tiny_run, tmp_path):
    (tmp_path / "machine0").symlink_to(tiny_run("vicreg", "--epochs", "1"))
    assert run(load_here, 2, tmp_path) == [0, 0]
    assert all(torch.equal(p, q) for p, q in zip(torch.load(tmp_path / "0.pt"), torch.load(tmp_path / "1.pt")))


def test_nine_images_are_shared_by_four(monkeypatch):
    shares = []
    for rank in range(4):
        monkeypatch.setattr(common, "process", lambda: (rank, 4))
        shares.append(common.share(torch.arange(9)).tolist())
    assert shares == [[0, 1, 2], [3, 4], [5, 6], [7, 8]]


@pytest.mark.parametrize("rank", ("0", "1"))
def test_more_processes_than_gpus_are_refused(rank, monkeypatch):
    """By each of them: the first alone is heard."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(common.Unusable, match="nproc_per_node: each process takes a GPU of its own, and this machine has 1"):
        common.join_processes("cuda")


def test_a_process_takes_the_gpu_of_its_local_rank(monkeypatch):
    """Here the second process of the second of two nodes with two GPUs each."""
    taken, joined = [], []
    for name, value in (("RANK", "3"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    for module, name, value in ((torch.cuda, "device_count", lambda: 2), (torch.cuda, "set_device", taken.append),
                                (common.dist, "init_process_group", lambda backend, timeout: joined.append((backend, *taken)))):
        monkeypatch.setattr(module, name, value)
    common.join_processes("cuda")
    assert joined == [("nccl", 1)]


def test_processes_do_not_meet_on_mps(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(common.Unusable, match="--device: processes of torchrun meet on cpu or cuda, not on mps"):
        common.join_processes("mps")


@pytest.mark.parametrize("rank", ["0", "", "x"])
def test_a_rank_without_torchrun_is_refused(rank, tmp_path, monkeypatch):
    for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(common.Unusable, match="environment variable RANK: start several processes by torchrun, or unset it"):
        common.join_processes("cpu")
    done = subprocess.run([sys.executable, "vicreg.py", "--out", str(tmp_path / "run")], cwd=Path(common.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("vicreg.py: environment variable RANK: ") and len(done.stderr.splitlines()) == 1


def test_a_judge_on_the_cpu_joins_by_gloo_where_there_is_a_gpu(tiny_run, monkeypatch):
    path, joined, waits = tiny_run("vicreg", "--epochs", "1") / "checkpoint.pt", [], []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    for module, name, value in ((torch.cuda, "is_available", lambda: True), (torch.cuda, "device_count", lambda: 1), (torch.cuda, "set_device", lambda rank: None),
                                (torch.cuda, "is_bf16_supported", lambda **options: False), (common.dist, "init_process_group", lambda backend, timeout: (joined.append(backend), waits.append(timeout))),
                                (common.dist, "is_initialized", lambda: bool(joined)), (common.dist, "get_rank", lambda: 0),
                                (common.dist, "get_world_size", lambda: 1), (common.dist, "broadcast_object_list", lambda box: None)):
        monkeypatch.setattr(module, name, value)
    eval_linear.load(path, "cpu")
    assert joined == ["gloo"] and waits == [timedelta(hours=2)]            # one process may download while the others wait


@pytest.mark.parametrize("world, batch", [(3, "32"), (4, "4")])
def test_a_batch_that_cannot_be_shared_is_refused(world, batch, tmp_path):
    """In equal parts, of two images or more each."""
    assert run(script, world, "vicreg", small("vicreg", "--batch-size", batch, "--out", str(tmp_path / "run"))) == [2] * world
    assert not (tmp_path / "run").exists()


COLLAPSING = """
import sys
sys.path.insert(0, ".")
import common, vicreg
common.effective_rank = lambda z: 1.0
common.command_line(vicreg.main)
"""


def on_pictures(tmp_path):
    """Flags of a run on 60 + 20 images in a folder, and a damaged one among the 20."""
    images, _ = common.make_shapes(80, 32, 3)
    for i, image in enumerate(images):
        folder = tmp_path / "data" / ("train" if i < 60 else "test") / str(i % 10)
        folder.mkdir(parents=True, exist_ok=True)
        common.Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    (folder / "damaged.png").write_bytes(b"no image")
    return small("vicreg", "--batch-size", "20", "--epochs", "1", "--warmup-epochs", "0", "--dataset", "folder", "--data-dir", str(tmp_path / "data"),
                 "--image-size", "32", "--skip-bad-images", "--out", str(tmp_path / "run"))


def test_processes_stream_what_they_would_hold(tmp_path):
    """The same log, to the last bit, from images in memory and from images that each process's workers read."""
    argv, logs = on_pictures(tmp_path), []
    for more in ([], ["--stream", "--out", str(tmp_path / "streamed")]):
        assert run(script, 2, "vicreg", [*argv, *more]) == [0, 0]
        logs.append([untimed(json.loads(line)) for line in (Path([*argv, *more][-1]) / "metrics.jsonl").read_text().splitlines()])
    assert logs[0] == logs[1] and logs[0][0]["loss"] > 0


@pytest.mark.parametrize("collapsing", [False, True])
def test_torchrun(collapsing, tmp_path):
    """The command of the README, on images in a folder, one of which is damaged; the first process alone prints and warns."""
    (tmp_path / "collapsing.py").write_text(COLLAPSING)
    argv = on_pictures(tmp_path)
    script = str(tmp_path / "collapsing.py") if collapsing else "vicreg.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, *argv]
    done = subprocess.run(command, cwd=Path(common.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("vicreg on folder: class, 20 test images") == 1
    assert (done.stderr.count("skipped 1 of 21 images"), done.stderr.count("is collapsing")) == (1, collapsing)
