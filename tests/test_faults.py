"""What happens to a run from outside: kills, signals, full disks, locks, foreign checkpoints, hostile images.

KILLS=25 pytest -s tests/test_faults.py -k kill    # 25 kills per method instead of 5, one line for each
"""
import fcntl
import importlib
import io
import json
import multiprocessing
import os
import pickle
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import conftest
import eval_linear

METHODS = ("vicreg", "sjea", "ijepa", "cjepa")
UNTIMED = {"seconds", "images_per_second", "peak_memory_mb"}               # of the log: what no two runs have in common
processes = multiprocessing.get_context("forkserver")                      # a new process without a new import of torch
processes.set_forkserver_preload(["conftest", "eval_linear", *METHODS])


def flags(method, out, *more):
    small = ["--predictor-width", "12", "--predictor-depth", "1"] if "jepa" in method else ["--width", "8", "--projector", "8-8"]
    return ["--batch-size", "16", "--precision", "fp32", "--device", "cpu", "--epochs", "3", "--eval-every", "0", *small, "--out", str(out), *more]


def start(method, argv, at_step=None, error=os.devnull, output=os.devnull):
    """METHOD.py in a process of its own, on 128 images, stdout and stderr in the files `output` and `error`; at_step(step) is called in every step."""
    torch.set_num_threads(1)                                               # two such processes would wait for each other
    sys.argv, sys.stdout, sys.stderr = [f"{method}.py", *argv], open(output, "w"), open(error, "w")
    common.load_shapes, eval_linear.main = conftest.tiny_shapes, lambda *args: None
    if at_step:
        learning_rate = common.learning_rate
        common.learning_rate = lambda step, *rest: (at_step(step), learning_rate(step, *rest))[1]
    common.command_line(importlib.import_module(method).main)


def run(method, argv, at_step=None, output=os.devnull):
    """The exit code of METHOD.py and what it last wrote on stderr."""
    with tempfile.NamedTemporaryFile("r", newline="") as error:
        process = processes.Process(target=start, args=(method, argv, at_step, error.name, output))
        process.start()
        process.join()
        return process.exitcode, error.read().replace("\r", "\n").strip()


def log(out):
    return [{name: value for name, value in json.loads(line).items() if name not in UNTIMED}
            for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_equal_runs(out, other):
    """Parameters, optimizer and log to the last bit."""
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (out, other))
    assert a["step"] == b["step"]
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    for key, moments in a["optimizer"]["state"].items():
        assert all(torch.equal(value, b["optimizer"]["state"][key][name]) for name, value in moments.items())
    assert log(out) == log(other)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """undisturbed(method): the folder of a whole run of 3 epochs of 8 steps."""
    outs = {}
    def folder(method):
        if method not in outs:
            outs[method] = tmp_path_factory.mktemp("undisturbed") / method
            assert run(method, flags(method, outs[method]))[0] == 0
        return outs[method]
    return folder


# ---- kills and signals ----


@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_at_random_moments_equals_an_undisturbed_one(method, undisturbed, tmp_path):
    """SIGKILL, again and again, at a random place of a random step; each time what is left is taken up again."""
    draw, kills = random.Random(method), 0
    while kills < int(os.environ.get("KILLS", 5)):
        out, step = tmp_path / f"run {kills}", 0
        while step < 14 and kills < int(os.environ.get("KILLS", 5)):
            process = processes.Process(target=start, args=(method, flags(method, out, "--checkpoint-minutes", "0", *["--resume"] * (step > 0))))
            newest = saved(out)
            process.start()
            for _ in range(draw.randrange(1, 5)):
                while saved(out) in (newest, None) and process.is_alive():
                    pass
                newest = saved(out)
            process.join(draw.random() * 0.05)                             # some milliseconds into a step or a save
            process.kill()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL)                # 0: on a busy machine it can be at its end before the kill
            kills, found = kills + (process.exitcode != 0), sorted(path.name for path in out.iterdir())
            step = max(common.load_checkpoint(out / name)["step"] for name in found if name in common.CHECKPOINTS)
            print(f"{method}: kill {kills} after step {step} of 24, left {' '.join(found)}")
        assert run(method, flags(method, out, "--resume"))[0] == 0
        assert_equal_runs(out, undisturbed(method))
        print(f"{method}: resumed to the end, equal to the undisturbed run")


def test_moments_in_another_layout_are_those_of_the_same_weights(tmp_path):
    """As an mps device writes them. A fused step reads memory as it lies."""
    whole, cut = (flags("vicreg", tmp_path / name, "--optimizer", "adamw") for name in ("whole", "cut"))
    assert run("vicreg", whole)[0] == 0 and run("vicreg", cut, Send(12, signal.SIGTERM))[0] == 143
    state = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)
    for moments in state["optimizer"]["state"].values():
        moments.update({name: moment.contiguous() for name, moment in moments.items()})
    torch.save(state, tmp_path / "cut" / "checkpoint.pt")
    assert run("vicreg", [*cut, "--resume"])[0] == 0
    assert_equal_runs(tmp_path / "cut", tmp_path / "whole")


def saved(out):
    """When the checkpoint was written; None where there is none, as between the two renames of a save."""
    try:
        return (out / "checkpoint.pt").stat().st_mtime_ns
    except FileNotFoundError:
        return None


class Send:
    """Sends this process signals in one step."""
    def __init__(self, at, *signals):
        self.at, self.signals = at, signals

    def __call__(self, step):
        if step == self.at:
            for each in self.signals:
                os.kill(os.getpid(), each)
            self.signals = ()                                              # the rate is asked for once per group of parameters


@pytest.mark.parametrize("method, at", [("vicreg", 0), ("ijepa", 7), ("sjea", 12), ("cjepa", 23)])  # an epoch's middle, its end, the run's
def test_a_signal_finishes_the_step_saves_and_says_how_to_resume(method, at, undisturbed, tmp_path):
    which, code = (signal.SIGINT, 130) if at % 2 else (signal.SIGTERM, 143)
    out = tmp_path / "my run"
    exit_code, error = run(method, flags(method, out), Send(at, which))
    said, again = error.splitlines()[-1].split(" to go on: ")
    assert exit_code == code and said == f"stopped after step {at + 1} of 24;" and shlex.split(again) == ["python", f"{method}.py", *flags(method, out), "--resume"]
    assert run(method, flags(method, out))[0] == 2                         # without --resume it would begin afresh
    assert common.load_checkpoint(out / "checkpoint.pt")["step"] == at + 1
    assert run(method, flags(method, out, "--resume"))[0] == 0
    assert_equal_runs(out, undisturbed(method))


def test_signals_are_the_callers_again_after_training():
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with common.stop_signals():
        assert all(signal.getsignal(each) not in before for each in (signal.SIGINT, signal.SIGTERM))
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def stop_while_judging(step):
    """A SIGTERM while the last step's checkpoint waits for the features that it is judged by."""
    extract = common.extract

    def interrupted(*given):
        common.extract = extract
        os.kill(os.getpid(), signal.SIGTERM)
        return extract(*given)

    if step == 23 and extract.__name__ == "extract":                       # once: the rate is asked for once per group of parameters
        common.extract = interrupted


def test_a_signal_during_the_last_judging_saves_and_ends_there(undisturbed, tmp_path):
    exit_code, error = run("vicreg", flags("vicreg", tmp_path / "run"), stop_while_judging)
    assert exit_code == 143 and "stopped after step 24 of 24; to go on: python vicreg.py" in error
    assert_equal_runs(tmp_path / "run", undisturbed("vicreg"))


def test_a_second_signal_ends_at_once(tmp_path):
    assert run("vicreg", flags("vicreg", tmp_path / "run"), Send(12, signal.SIGINT, signal.SIGTERM))[0] == -signal.SIGTERM
    assert common.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 8


def test_ctrl_c_before_training_leaves_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt
    monkeypatch.setattr(common, "load_shapes", interrupted)
    with pytest.raises(SystemExit) as stop:
        common.command_line(lambda: importlib.import_module("vicreg").main(["--out", str(tmp_path / "run")]))
    assert stop.value.code == 130 and not list(tmp_path.iterdir()) and "Traceback" not in capsys.readouterr().err


# ---- writes that fail ----

STATE = {"method": "vicreg", "config": {"seed": 3}, "step": 2, "terms": {}, "seconds": 0.5, "history": [],
         "model": {"w": torch.arange(1000.0)}, "optimizer": {"state": {}}}


class Disk:
    """Counts the calls by which common.write touches the disk, and makes one of them fail."""
    def __init__(self, monkeypatch, fail_at=None):
        self.calls, self.fail_at = 0, fail_at
        for module, name in ((os, "fsync"), (os, "replace")):
            monkeypatch.setattr(module, name, self.counted(getattr(module, name)))
        monkeypatch.setattr(common, "open", self.open, raising=False)

    def counted(self, call):
        def counting(*args):
            self.calls += 1
            if self.calls - 1 == self.fail_at:
                raise OSError(28, "No space left on device")
            return call(*args)
        return counting

    def open(self, *args):
        file = self.counted(open)(*args)
        class Failing:
            write, flush, fileno = staticmethod(self.counted(file.write)), staticmethod(self.counted(file.flush)), staticmethod(file.fileno)
            __enter__, __exit__ = lambda wrapped: wrapped, lambda wrapped, *error: file.close()
        return Failing()


def test_every_failing_call_of_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    """open, each write, flush, fsync and both renames, one after the other."""
    newest, previous = (tmp_path / name for name in common.CHECKPOINTS)
    save = lambda step: common.write(newest, lambda file: torch.save({**STATE, "step": step}, file), keep=previous)
    save(1), save(2)
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        save(3)
    assert disk.calls > 10
    for k in range(disk.calls):
        save(2), save(3)
        with monkeypatch.context() as patch, pytest.raises(common.RunFailed, match="checkpoint.pt.*(No space|unexpected pos|write)"):
            Disk(patch, fail_at=k)
            save(4)
        steps = [common.load_checkpoint(path)["step"] for path in (newest, previous) if path.exists()]
        assert steps in ([3, 2], [3]), k
        assert {path.name for path in tmp_path.iterdir()} <= set(common.CHECKPOINTS)


def test_a_file_is_on_the_disk_before_it_takes_the_old_ones_name(tmp_path, monkeypatch):
    """All its bytes are synchronised, then it is renamed: else a machine that loses power may keep the name and lose the bytes."""
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (fsync(descriptor), done.append(os.fstat(descriptor).st_size)))
    monkeypatch.setattr(os, "replace", lambda *paths: (replace(*paths), done.append([path.name for path in paths])))
    common.write(tmp_path / "log", lambda file: file.write(b"abc"))
    assert done == [3, ["log.tmp", "log"]]


def test_a_full_disk_ends_the_run_and_loses_nothing(undisturbed, tmp_path):
    """A tmpfs with room for two checkpoints and a half, then one with room for all."""
    size = (undisturbed("vicreg") / "checkpoint.pt").stat().st_size
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(2.5 * size) + 200_000}", "none", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        (tmp_path / "ballast").write_bytes(bytes(150_000))
        code, error = run("vicreg", flags("vicreg", tmp_path / "run"))
        assert code == 1 and error.splitlines()[-1].startswith("vicreg.py: cannot write") and "Traceback" not in error
        assert common.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] in (8, 16)
        subprocess.run(["mount", "-o", "remount,size=100m", str(tmp_path)], check=True)
        assert run("vicreg", flags("vicreg", tmp_path / "run", "--resume"))[0] == 0
        assert_equal_runs(tmp_path / "run", undisturbed("vicreg"))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_output_that_cannot_be_written_ends_in_one_line(undisturbed, tmp_path):
    """stdout on a full disk: every epoch is saved before it is reported."""
    code, error = run("vicreg", flags("vicreg", tmp_path / "run"), output="/dev/full")
    assert code == 1 and error.splitlines()[-1] == "vicreg.py: [Errno 28] No space left on device; what was saved is whole" and "Traceback" not in error
    assert run("vicreg", flags("vicreg", tmp_path / "run", "--resume"))[0] == 0
    assert_equal_runs(tmp_path / "run", undisturbed("vicreg"))


def test_a_file_system_that_becomes_read_only_ends_the_run_in_one_line(tmp_path, monkeypatch):
    common.write(tmp_path / "file", lambda file: file.write(b"old"))
    def read_only(*args, **more):
        raise OSError(30, "Read-only file system")
    monkeypatch.setattr(common.os, "replace", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(common.RunFailed, match="cannot write .*file: .*Read-only"):
        common.write(tmp_path / "file", lambda file: file.write(b"new"))
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_run_that_diverged_without_overflow_is_not_judged(undisturbed):
    """Finite weights whose features are not: one line, where k-NN and probe would give numbers or a traceback."""
    model, args = eval_linear.load(undisturbed("vicreg") / "checkpoint.pt")
    images = conftest.tiny_shapes(args).test_images
    common.extract(model, images, args)
    for p in model.f.parameters():
        p.data.fill_(1e30)
    with pytest.raises(common.RunFailed, match="features of level 0 are not finite"):
        common.extract(model, images, args)


def copy_of(folder, to, *names):
    to.mkdir(parents=True)
    for name in names or os.listdir(folder):
        (to / name).write_bytes((folder / name).read_bytes())
    return to


def test_resume_falls_back_on_the_previous_checkpoint(undisturbed, tmp_path):
    """And the damaged one never takes its place: neither on disk nor in the run's result."""
    out = copy_of(undisturbed("sjea"), tmp_path / "run")
    newest, previous = (out / name for name in common.CHECKPOINTS)
    newest.write_bytes(newest.read_bytes()[:5000])
    code, error = run("sjea", flags("sjea", out, "--resume"), Send(16, signal.SIGKILL))
    assert code == -signal.SIGKILL and f"going on from {previous}" in error
    assert (out / "checkpoint-unread.pt").stat().st_size == 5000              # put aside: it may have been the reading that failed
    assert common.load_checkpoint(newest)["step"] == 16
    assert run("sjea", flags("sjea", out, "--resume"))[0] == 0
    assert_equal_runs(out, undisturbed("sjea"))


def test_a_refused_resume_changes_nothing(undisturbed, tmp_path):
    """Other settings than the run's, with the last checkpoint damaged: both files stay what and where they are."""
    out = copy_of(undisturbed("vicreg"), tmp_path / "run")
    (out / "checkpoint.pt").write_bytes(b"damaged")
    before = {path: path.read_bytes() for path in out.iterdir()}
    code, error = run("vicreg", flags("vicreg", out, "--resume", "--lambda", "3"))
    assert code == 2 and "--lambda: 3.0" in error
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_missing_checkpoint_falls_back_too(undisturbed, tmp_path):
    out = copy_of(undisturbed("sjea"), tmp_path / "run", "checkpoint-previous.pt")
    assert run("sjea", flags("sjea", out, "--resume"))[0] == 0
    assert_equal_runs(out, undisturbed("sjea"))


def test_a_torn_log_is_mended(undisturbed, tmp_path):
    out = copy_of(undisturbed("vicreg"), tmp_path / "run")
    (out / "metrics.jsonl").write_text((out / "metrics.jsonl").read_text()[:-40])
    assert run("vicreg", flags("vicreg", out, "--resume"))[0] == 0
    assert log(out) == log(undisturbed("vicreg"))


# ---- two runs, one folder; memory ----


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_a_folder_takes_one_run_at_a_time(more, undisturbed, tmp_path):
    out = copy_of(undisturbed("vicreg"), tmp_path / "run", *(["checkpoint.pt"] if more else ["config.json"]))
    before = {path: path.read_bytes() for path in out.iterdir()}
    folder = os.open(out, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_SH)                                     # which a run that asked for no more would share
    code, error = run("vicreg", flags("vicreg", out, *more))
    assert code == 2 and error.splitlines()[-1].startswith("vicreg.py: argument --out: another process is writing to") and len(error.splitlines()) == 1
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    os.close(folder)
    assert run("vicreg", flags("vicreg", out, *more))[0] == 0


def allocate(step):
    if step == 9:
        torch.empty(2**52, dtype=torch.uint8)


def test_out_of_memory_says_what_to_lower(tmp_path):
    code, error = run("vicreg", flags("vicreg", tmp_path / "run"), allocate)
    assert code == 1 and error.splitlines()[-1].startswith("vicreg.py: out of memory") and "--batch-size" in error and "Traceback" not in error
    assert common.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 8


@pytest.mark.parametrize("message, words", [
    ("CUDA error: out of memory", "out of memory"), ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "out of memory"),
    ("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5678", "another process has ended"),
    ("[gloo/transport/tcp/pair.cc:547] Read error [127.0.0.1]:5678: Connection reset by peer", "another process has ended"),
    ("[gloo/transport/tcp/pair.cc:268] writev [127.0.0.1]:5678: Broken pipe", "another process has ended")])
def test_messages_of_cuda_and_gloo_in_our_words(message, words, monkeypatch, capsys):
    def main():
        raise RuntimeError(message)
    monkeypatch.setattr(sys, "argv", ["vicreg.py"])
    with pytest.raises(SystemExit) as stop:
        common.command_line(main)
    assert stop.value.code == 1 and capsys.readouterr().err.startswith(f"vicreg.py: {words}")


def test_a_killed_worker_is_one_line_and_a_fault_in_the_code_keeps_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vicreg.py"])
    for message, ends in (("DataLoader worker (pid 7) is killed by signal: Killed.", SystemExit), ("size mismatch", RuntimeError)):
        def main():
            raise RuntimeError(message)
        with pytest.raises(ends):
            common.command_line(main)
    assert capsys.readouterr().err == "vicreg.py: DataLoader worker (pid 7) is killed by signal: Killed. What was saved is whole.\n"


@pytest.mark.parametrize("error, code, words", [(common.RunFailed("its memory is full"), 1, "vicreg.py: its memory is full\n"), (common.Unusable("no data"), 2, "")])
def test_every_process_says_why_it_failed_and_the_first_alone_what_is_unusable(error, code, words, monkeypatch, capsys):
    """All find the same command line and data unusable; a failure may be of one process alone."""
    monkeypatch.setattr(sys, "argv", ["vicreg.py"])
    monkeypatch.setenv("LOCAL_RANK", "1")

    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        common.command_line(main)
    assert (stop.value.code, capsys.readouterr().err) == (code, words)


# ---- checkpoints from a stranger ----


class Evil:
    """Unpickling this creates a file."""
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("script", [*METHODS, "eval_linear"])
@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_a_malicious_checkpoint_runs_nothing_in_any_script(script, form, tmp_path, monkeypatch, capfd):
    marker, path = tmp_path / "marker", tmp_path / "checkpoint.pt"
    state = {**STATE, "method": "vicreg" if script == "eval_linear" else script, "config": Evil(marker)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    argv = [str(path)] if script == "eval_linear" else ["--out", str(tmp_path), "--resume"]
    monkeypatch.setattr(common, "load_shapes", conftest.tiny_shapes)
    assert refused(script, argv, capfd)
    assert not marker.exists() and sorted(os.listdir(tmp_path)) == ["checkpoint.pt"]


def refused(script, argv, capfd):
    """Whether the script ends with exit code 2 and one line on stderr."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        common.command_line(lambda: importlib.import_module(script).main(argv))
    error = capfd.readouterr().err.split("\r")[-1].strip()
    return stop.value.code == 2 and len(error.splitlines()) == 1 and "Traceback" not in error


def loads(path, method):
    """Whether both readers of checkpoints take it; only Unusable may keep them from it."""
    script = importlib.import_module(method)
    args = script.arguments(flags(method, path.parent, "--resume"))
    if "jepa" in method:
        script.settle(args, 24)
    model = eval_linear.untrained(args)
    try:
        common.restore(args, model, common.make_optimizer(model, args), 8 * args.batch_size)
        eval_linear.load(path)
    except common.Unusable as error:
        assert "checkpoint" in str(error)
        return False
    return True


@pytest.mark.parametrize("method", ["vicreg", "cjepa"])
def test_a_damaged_checkpoint_loads_or_is_refused(method, undisturbed, tmp_path):
    """Cut at every hundredth of its length: refused. One bit turned over at 250 places: refused, or it changed nothing."""
    path, whole = tmp_path / "checkpoint.pt", (undisturbed(method) / "checkpoint.pt").read_bytes()
    path.write_bytes(whole)
    assert loads(path, method)
    expected = common.load_checkpoint(path)
    for percent in range(100):
        path.write_bytes(whole[:len(whole) * percent // 100])
        assert not loads(path, method), percent
    draw = random.Random(0)
    for _ in range(250):
        where, damaged = draw.randrange(len(whole)), bytearray(whole)
        damaged[where] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        if loads(path, method):
            state = common.load_checkpoint(path)
            assert state["history"] == expected["history"] and state["config"] == expected["config"]
            assert all(torch.equal(value, expected["model"][name]) for name, value in state["model"].items())


def change(state, where, value):
    *keys, last = where.split("/")
    for key in keys:
        state = state[int(key) if key.isdigit() else key]
    if value is KeyError:
        del state[int(last) if last.isdigit() else last]
    else:
        state[int(last) if last.isdigit() else last] = value


FORGED = [  # where, what
    ("step", 10**9), ("step", -1), ("step", "8"), ("terms", {"loss": ["x"]}), ("terms", {"loss": 0.5}), ("terms", {"loss": [0.5]}), ("terms", {"loss": [], "x": [0.5]}), ("history/0/curve", {"loss": 0.5}),
    ("history/1/effective_rank", {"x": 2.0}), ("history/0/feature_std", {"0": 1.0, "x": 1.0}), ("history/0/knn", {"x": 0.5}),
    ("seconds", None), ("history/0/loss", "low"), ("history/0/loss", KeyError),
    ("history/0", 3), ("history/0/effective_rank", {"0": []}), ("history/0/effective_rank", 1.0), ("history/0/lr", {"0": 1.0}), ("history", [{}]), ("model/h.0.weight", 5), ("model/h.0.weight", torch.zeros(3)), ("model/h.0.weight", torch.eye(8).to_sparse()), ("model/h.0.weight", torch.empty(8, 64, device="meta")),
    ("model/h.0.weight", torch.zeros(1).expand(2**40)), ("optimizer/state/0/exp_avg", torch.zeros(1).expand(2**40)),
    ("optimizer/state/0/exp_avg", KeyError), ("optimizer/state/0", KeyError), ("optimizer/state/0/step", torch.zeros(1).expand(2**40)),
    ("optimizer/state", None), ("optimizer", {}), ("config/seed", -1), ("config/width", 10**9), ("config/width", KeyError),
    ("config/projector", [65536] * 50), ("config/projector", 7), ("config/lr", "fast"), ("config/arch", "resnet9000"), ("config/help", True),
    ("config/method", "sjea"), ("config/dataset", "imagenet"), ("config/image_size", 10**9), ("config/epochs", None)]


@pytest.mark.parametrize("where, what", FORGED, ids=[f"{where}-{k}" for k, (where, _) in enumerate(FORGED)])
def test_a_forged_checkpoint_is_refused(where, what, undisturbed, tmp_path):
    """Every field is checked before it is used; declared sizes take no memory."""
    state = torch.load(undisturbed("vicreg") / "checkpoint.pt", weights_only=True)
    change(state, where, what)
    torch.save(state, tmp_path / "checkpoint.pt")
    assert not loads(tmp_path / "checkpoint.pt", "vicreg")
    if where.startswith(("model", "config")):
        with pytest.raises(common.Unusable, match="checkpoint.pt: (its|written|a checkpoint)"):
            eval_linear.load(tmp_path / "checkpoint.pt")


def test_a_log_with_a_field_whose_name_is_a_number_is_refused(undisturbed, tmp_path):
    state = torch.load(undisturbed("vicreg") / "checkpoint.pt", weights_only=True)
    for row in state["history"]:
        row[7] = 0.5
    torch.save(state, tmp_path / "checkpoint.pt")
    assert not loads(tmp_path / "checkpoint.pt", "vicreg")


def test_a_jepa_of_a_forged_image_size_is_refused(undisturbed, tmp_path):
    """Its weights fit any number of patches; their positions, which would take the memory, are in the checkpoint, too."""
    state = torch.load(undisturbed("cjepa") / "checkpoint.pt", weights_only=True)
    state["config"]["image_size"] = 1024
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(common.Unusable, match="its weights are not those of the encoder it names"):
        eval_linear.load(tmp_path / "checkpoint.pt")


def test_a_checkpoint_of_weights_of_another_type_is_not_judged(undisturbed, tmp_path):
    """As small integers the weights have the right shapes and nearly no values."""
    state = torch.load(undisturbed("vicreg") / "checkpoint.pt", weights_only=True)
    state["model"] = {name: value.to(torch.int8) for name, value in state["model"].items()}
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(common.Unusable, match="its weights are not those of the encoder it names"):
        eval_linear.load(tmp_path / "checkpoint.pt")


def test_a_checkpoint_of_weights_that_repeat_one_number_is_refused(undisturbed, tmp_path):
    """The right shapes, but one number in the file for all of a weight."""
    state = torch.load(undisturbed("vicreg") / "checkpoint.pt", weights_only=True)
    state["model"] = {name: torch.zeros((), dtype=value.dtype).expand(value.shape) for name, value in state["model"].items()}
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(common.Unusable, match="its weights are not as"):
        common.load_checkpoint(tmp_path / "checkpoint.pt")


def test_a_checkpoint_that_unpacks_to_more_than_its_size_is_refused(undisturbed, tmp_path):
    packed = tmp_path / "checkpoint.pt"
    with zipfile.ZipFile(undisturbed("vicreg") / "checkpoint.pt") as whole, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in whole.infolist():
            archive.writestr(entry.filename, whole.read(entry))
        archive.writestr("archive/bomb", bytes(10**8))
    with pytest.raises(common.Unusable, match="unpacks to more than its own size"):
        common.load_checkpoint(packed)


class Reserve:
    """Unpickling this takes 100 MB, which torch allows."""
    def __reduce__(self):
        return bytearray, (10**8,)


def test_a_checkpoint_that_asks_for_memory_is_refused_unread(tmp_path, monkeypatch):
    torch.save({**STATE, "terms": Reserve()}, tmp_path / "checkpoint.pt")
    monkeypatch.setattr(torch, "load", lambda *args, **more: pytest.fail("it was read"))
    with pytest.raises(common.Unusable, match="holds .* bytearray"):
        common.load_checkpoint(tmp_path / "checkpoint.pt")


def test_weights_that_share_their_memory_are_not_judged(undisturbed, tmp_path):
    """All in one storage as large as the largest: a file of some numbers would make a model of any size."""
    state = torch.load(undisturbed("vicreg") / "checkpoint.pt", weights_only=True)
    storage = {dtype: torch.zeros(max(value.numel() for value in state["model"].values()), dtype=dtype) for dtype in (torch.float32, torch.int64)}
    state["model"] = {name: storage[value.dtype][:value.numel()].view(value.shape) for name, value in state["model"].items()}
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(common.Unusable, match="its weights are not those of the encoder it names"):
        eval_linear.load(tmp_path / "checkpoint.pt")


def test_nothing_is_written_through_a_link(tmp_path):
    """A stranger's folder may hold a link under the name of a file that is about to be written."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "eval.json.tmp").symlink_to(tmp_path / "mine")
    common.write(tmp_path / "eval.json", lambda file: file.write(b"scores"))
    assert (tmp_path / "mine").read_text() == "mine" and (tmp_path / "eval.json").read_text() == "scores"
    assert sorted(os.listdir(tmp_path)) == ["eval.json", "mine"]


def test_a_checkpoint_does_not_decide_where_a_download_goes(undisturbed, tmp_path, monkeypatch, capfd):
    state = torch.load(undisturbed("vicreg") / "checkpoint.pt", weights_only=True)
    state["config"].update(dataset="cifar10", data_dir=str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    torch.save(state, tmp_path / "checkpoint.pt")
    import torchvision.datasets.cifar
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", lambda *args, **more: pytest.fail("a download began"))
    assert refused("eval_linear", [str(tmp_path / "checkpoint.pt")], capfd)
    assert not list((tmp_path / "elsewhere").iterdir())


# ---- hostile images ----


def folder_of(root, **images):
    """DIR/train/cat and DIR/test/cat, each with one good image; the others go to train."""
    for part in ("train", "test"):
        (root / part / "cat").mkdir(parents=True)
        Image.new("RGB", (8, 8), (10, 20, 30)).save(root / part / "cat" / "good.png")
    for name, content in images.items():
        path = root / "train" / "cat" / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else encoded(content, path.suffix[1:]))
    return root


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, {"jpg": "jpeg", "tif": "tiff"}.get(kind, kind), **options)
    return buffer.getvalue()


def load_folder(root, *more):
    args = importlib.import_module("vicreg").arguments(["--dataset", "folder", "--data-dir", str(root), "--image-size", "8", *more])
    return common.load_dataset(args)


def bomb(side=30000):
    """A PNG of side x side pixels in some hundred bytes of header; its data is cut off."""
    small = encoded(Image.new("L", (1, 1)), "png")
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + small[24:29]
    import zlib
    return small[:12] + header + zlib.crc32(header).to_bytes(4, "big") + small[33:]


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
UNREADABLE = {
    "zero_bytes": b"", "text": b"no image", "one_byte": b"\x89", "truncated_png": encoded(NOISE, "png")[:900],
    "truncated_jpg": encoded(NOISE, "jpeg")[:900], "truncated_gif": encoded(NOISE.convert("P"), "gif")[:900],
    "truncated_tif": encoded(NOISE, "tiff")[:900], "html": b"<html>404</html>", "pickle": pickle.dumps(3), "bomb": bomb()}


@pytest.mark.parametrize("what", [KeyError, None, torch.zeros(3), torch.zeros(1).expand(2**40), lambda m: m.to_sparse(), lambda m: torch.zeros(1).expand_as(m)],
                         ids=["missing", "none", "shape", "huge", "sparse", "repeats"])
def test_a_forged_momentum_is_refused(what, undisturbed, tmp_path):
    """Of Muon, whose matrices have one moment where AdamW's weights have two."""
    state = torch.load(undisturbed("cjepa") / "checkpoint.pt", weights_only=True)
    assert state["config"]["optimizer"] == "muon" and state["optimizer"]["state"][0].keys() == {"step", "exp_avg"}
    if callable(what) and what is not KeyError:
        what = what(state["optimizer"]["state"][0]["exp_avg"])
    change(state, "optimizer/state/0/exp_avg", what)
    torch.save(state, tmp_path / "checkpoint.pt")
    assert not loads(tmp_path / "checkpoint.pt", "cjepa")


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_image_that_cannot_be_read_is_named_or_skipped(kind, tmp_path, capsys):
    root = folder_of(tmp_path / "data", b__png=UNREADABLE[kind])
    with pytest.raises(common.Unusable, match="--data-dir: cannot read the image .*b.png.*--skip-bad-images"):
        load_folder(root)
    data = load_folder(root, "--skip-bad-images")
    assert data.images[:, :, 0, 0].tolist() == [[10, 20, 30]] and data.train_labels["class"].tolist() == [0]
    assert "skipped 1 of 2 images" in capsys.readouterr().err


def test_a_bad_image_is_named_before_the_others_are_read(tmp_path, monkeypatch):
    root, read, getitem = folder_of(tmp_path / "data", a__png=b"no image", **{f"b{i}__png": b"no image" for i in range(300)}), [], common.Stream.__getitem__
    monkeypatch.setattr(common.Stream, "__getitem__", lambda images, i: time.sleep(0.01) or read.append(i) or getitem(images, i))
    with pytest.raises(common.Unusable, match="cannot read the image .*a.png"):
        load_folder(root)
    assert len(read) < 100


def test_nothing_but_bad_images_is_refused(tmp_path):
    root = folder_of(tmp_path / "data")
    (root / "train" / "cat" / "good.png").write_bytes(b"")
    with pytest.raises(common.Unusable, match="not one of the 1 images"):
        load_folder(root, "--skip-bad-images")


@pytest.mark.parametrize("pixels", [np.full((8, 8), 0.5, np.float32), np.full((8, 8), 10**6, np.int32), np.full((8, 8), -5, np.int16)])
def test_pixels_of_an_unknown_range_are_refused(pixels, tmp_path):
    """A TIFF of floats, of 32-bit or of negative integers has no brightness that all agree on: better no image than a black one."""
    root = folder_of(tmp_path / "data")
    (root / "train" / "cat" / "b.tif").write_bytes(encoded(Image.fromarray(pixels), "tiff"))
    with pytest.raises(common.Unusable, match="cannot read the image .*b.tif: its pixels are no numbers"):
        load_folder(root)


GREY = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
PIXELS = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
FRAMES = [Image.fromarray(PIXELS[..., 0] // 2 + k) for k in (0, 100)]


@pytest.mark.parametrize("name, image, expected", [
    ("grey16.png", encoded(Image.fromarray(GREY), "png"), (GREY / 257).round()[..., None].repeat(3, 2)),
    ("grey16.tif", encoded(Image.fromarray(GREY), "tiff"), (GREY / 257).round()[..., None].repeat(3, 2)),
    ("grey16.pgm", b"P5 8 8 65535\n" + GREY.astype(">u2").tobytes(), (GREY / 257).round()[..., None].repeat(3, 2)),
    ("grey_alpha.png", encoded(Image.fromarray(PIXELS[..., :2], "LA"), "png"), PIXELS[..., :1].repeat(3, 2)),
    ("one_bit.png", encoded(Image.fromarray(PIXELS[..., 0] > 127), "png"), (PIXELS[..., :1] > 127).repeat(3, 2) * 255),
    ("animated.tif", encoded(FRAMES[0], "tiff", save_all=True, append_images=FRAMES[1:]), (PIXELS[..., :1] // 2).repeat(3, 2)),
    ("animated.webp", encoded(FRAMES[0].convert("RGB"), "webp", save_all=True, append_images=[FRAMES[1].convert("RGB")], lossless=True), (PIXELS[..., :1] // 2).repeat(3, 2)),
    ("pixel.png", encoded(Image.new("RGB", (1, 1), (7, 8, 9)), "png"), np.full((8, 8, 3), (7, 8, 9))),
    ("long.png", encoded(Image.new("RGB", (20000, 10), (7, 8, 9)), "png"), np.full((8, 8, 3), (7, 8, 9))),
    ("猫 ñ 🐈\n.png", encoded(Image.fromarray(PIXELS), "png"), PIXELS),
])
def test_strange_but_whole_images_are_read_right(name, image, expected, tmp_path):
    root = folder_of(tmp_path / "data")
    (root / "train" / "cat" / "good.png").unlink()
    (root / "train" / "cat" / name).write_bytes(image)
    assert load_folder(root).images[0].permute(1, 2, 0).tolist() == np.asarray(expected).astype(int).tolist()


def test_a_name_that_is_no_text_is_named_in_one_line(tmp_path, capfd):
    root = folder_of(tmp_path / "data")
    Path(os.fsdecode(bytes(root / "train" / "cat") + b"/\xff\xfe\n.png")).write_bytes(b"")
    assert refused("vicreg", ["--dataset", "folder", "--data-dir", str(root), "--image-size", "8", "--out", str(tmp_path / "run")], capfd)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("target", ["..", "../..", "."])
def test_a_loop_of_symbolic_links_is_refused(target, tmp_path):
    root = folder_of(tmp_path / "data")
    (root / "train" / "cat" / "loop").symlink_to(target)
    with pytest.raises(common.Unusable, match="--data-dir: .*loop"):
        load_folder(root)


def test_a_link_to_images_elsewhere_is_followed(tmp_path):
    root, elsewhere = folder_of(tmp_path / "data"), folder_of(tmp_path / "elsewhere")
    (root / "train" / "cat" / "more").symlink_to(elsewhere / "train" / "cat")
    assert len(load_folder(root).images) == 2


# ---- a folder that is streamed ----


STREAMED = ["--dataset", "folder", "--image-size", "8", "--data-dir"]


@pytest.fixture
def pictures(tmp_path):
    """64 + 16 images of noise in two classes; the folders' times are of yesterday, so that a change shows."""
    root, noise = tmp_path / "Bilder für 猫", np.random.default_rng(2).integers(0, 256, (80, 12, 10, 3), dtype=np.uint8)
    for i, image in enumerate(noise):
        folder = root / ("train" if i < 64 else "test") / ("cat", "dog")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:02}.png")
    for folder, *_ in os.walk(root):
        os.utime(folder, (1e9, 1e9))
    return root


class SendToAll(Send):
    """To its worker processes first, as a terminal's Ctrl-C does."""
    def __call__(self, step):
        if step == self.at:
            for child in multiprocessing.active_children():
                for each in self.signals:
                    os.kill(child.pid, each)
            time.sleep(0.5)
        super().__call__(step)


def test_a_streamed_run_equals_one_in_memory(pictures, tmp_path):
    """Also where it was stopped within an epoch by a Ctrl-C, which reaches all of its processes, and goes on."""
    outs = [tmp_path / name for name in ("memory", "streamed", "cut")]
    argv = [flags("vicreg", out, *STREAMED, str(pictures), "--eval-every", "1", *["--stream"] * (out != outs[0])) for out in outs]
    assert run("vicreg", argv[0])[0] == run("vicreg", argv[1])[0] == 0
    assert run("vicreg", argv[2], SendToAll(6, signal.SIGINT))[0] == 128 + signal.SIGINT
    assert run("vicreg", [*argv[2], "--resume"])[0] == 0
    assert "knn" in log(outs[0])[0]
    assert_equal_runs(outs[1], outs[0])
    assert_equal_runs(outs[2], outs[0])


def test_a_killed_run_leaves_its_folder_at_once(pictures, tmp_path):
    """Though the processes that read for it live on for some seconds."""
    assert run("vicreg", flags("vicreg", tmp_path / "run", *STREAMED, str(pictures), "--stream"), Send(6, signal.SIGKILL))[0] == -signal.SIGKILL
    folder = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(folder)


def test_reading_ahead_takes_a_worker_at_least_and_draws_no_numbers(pictures, monkeypatch):
    """Of 64 processes on this machine, say; a method's own draws are those of a run in memory."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    images, state = load_folder(pictures, "--stream").images, torch.get_rng_state()
    assert sum(map(len, common.load_batches(images, torch.arange(64).split(16), "cpu"))) == 64
    assert torch.equal(torch.get_rng_state(), state)


def test_workers_are_forked_on_linux_and_sent_what_they_need_elsewhere(pictures, monkeypatch):
    class Here(common.Stream):                 # a class that no other process can import
        pass

    images, whole = load_folder(pictures, "--stream").images, load_folder(pictures).images[:8]
    read = lambda images: torch.cat([*common.load_batches(images, torch.arange(8).split(4), "cpu")])
    method = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        assert torch.equal(read(Here(images.root, images.paths, images.size)), whole)
        monkeypatch.setattr(sys, "platform", "darwin")
        assert torch.equal(read(images), whole)
    finally:
        multiprocessing.set_start_method(method, force=True)


@pytest.mark.parametrize("holdout", [[], ["--holdout"]])
def test_a_streamed_folder_is_that_in_memory(holdout, pictures, tmp_path, monkeypatch):
    """The same images and labels; the same judgement and pictures of a checkpoint, without the training images in memory."""
    whole, data = load_folder(pictures, *holdout), load_folder(pictures, *holdout, "--stream")
    assert data.images is data.train_images and isinstance(data.images, common.Stream) and isinstance(whole.images, torch.Tensor)
    for name in ("train", "test"):
        a, b = (getattr(each, f"{name}_images") for each in (whole, data))
        assert torch.equal(a, torch.cat([*common.load_batches(b, torch.arange(len(b)).split(500), "cpu")]))
        assert torch.equal(getattr(whole, f"{name}_labels")["class"], getattr(data, f"{name}_labels")["class"])
    results = []
    for stream in ([], ["--stream"]):
        out = tmp_path / f"run{stream}"
        importlib.import_module("vicreg").main(flags("vicreg", out, *STREAMED, str(pictures), *holdout, *stream))
        eval_linear.main([str(out / "checkpoint.pt"), "--device", "cpu", "--augmented", "1", "--fine-tune", "1"])
        results.append(json.loads((out / "eval.json").read_text()))
    assert results[0] == results[1] and results[0]["judged_on"] == f"{len(whole.test_images)} {'held-out' if holdout else 'test'} images"
    import figures
    runs = [figures.load_run(tmp_path / f"run{stream}" / "checkpoint.pt", figures.arguments([str(out / "checkpoint.pt"), "--images", "40"]))
            for stream in ([], ["--stream"])]
    assert torch.equal(runs[0].images, runs[1].images) and torch.equal(runs[0].features["0"], runs[1].features["0"])


def test_what_does_not_fit_in_memory_is_streamed(pictures, monkeypatch):
    size = 80 * 3 * 8 * 8
    for free, kind in ((2 * size, torch.Tensor), (2 * size - 2, common.Stream)):
        monkeypatch.setattr(common, "free_memory", lambda device: free)
        assert type(load_folder(pictures).images) is kind
    monkeypatch.undo()
    assert 2**20 < common.free_memory("cpu") <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_jobs_limit_counts_as_its_memory(tmp_path, monkeypatch):
    """The smallest memory.max of a process's cgroup and those around it, where there is one and it is less than what the machine has free."""
    def put(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(common, "Path", lambda path: tmp_path / path.lstrip("/"))
    assert common.free_memory("cpu") == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2        # no /proc: a Mac
    put("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    assert common.free_memory("cpu") == 8000 * 1024
    put("proc/self/cgroup", "4:memory:/elsewhere\n0::/job/step\n")
    assert common.free_memory("cpu") == 8000 * 1024
    put("sys/fs/cgroup/job/step/memory.max", "max\n")
    assert common.free_memory("cpu") == 8000 * 1024
    put("sys/fs/cgroup/job/memory.max", "5000000\n")
    assert common.free_memory("cpu") == 5000000
    put("sys/fs/cgroup/job/step/memory.max", "3000000\n")
    assert common.free_memory("cpu") == 3000000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")                            # processes of torchrun, which share it; not the memory of a GPU each
    assert common.free_memory("cpu") == 750000
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (500000, 0))
    assert common.free_memory("cuda") == 500000


def test_a_streamed_folder_is_listed_once(pictures, tmp_path, monkeypatch, capsys):
    """Its second start walks no folder and writes nothing; new images and classes, older copies, a damaged index and a stranger's are noticed;
    nothing is kept of a folder in memory."""
    walks, walk = [], os.walk
    monkeypatch.setattr(os, "walk", lambda top, **more: (walks.append(str(top)), walk(top, **more))[1])
    def loaded(*more):
        walks.clear()
        data = load_folder(pictures, "--stream", *more)
        return len(data.images), len(data.test_images), set(Path(path).relative_to(pictures).parts[0] for path in walks)
    load_folder(pictures)
    assert len(list(pictures.iterdir())) == 2
    assert loaded() == (64, 16, {"train", "test"})
    index = (pictures / "train-index.npz").stat().st_ino
    assert loaded() == (64, 16, set()) and (pictures / "train-index.npz").stat().st_ino == index
    (pictures / "train" / "cat" / "new.png").write_bytes((pictures / "train" / "cat" / "00.png").read_bytes())
    assert loaded() == (65, 16, {"train"})
    assert loaded() == (65, 16, set())
    for part in ("train", "test"):
        (pictures / part / "emu").mkdir()
        (pictures / part / "emu" / "1.png").write_bytes((pictures / "train" / "cat" / "00.png").read_bytes())
    assert loaded() == (66, 17, {"train", "test"})
    assert load_folder(pictures, "--stream").train_labels["class"].bincount().tolist() == [33, 32, 1]
    (pictures / "train-index.npz").write_bytes((pictures / "train-index.npz").read_bytes()[:500])
    assert loaded() == (66, 17, {"train"})
    (pictures / "test-index.npz").write_bytes(b"")
    np.save(open(pictures / "train-index.npz", "wb"), np.zeros(3))
    assert loaded() == (66, 17, {"train", "test"})
    (pictures / "test-index.npz").write_bytes(b"")
    np.save(open(pictures / "train-index.npz", "wb"), np.array([Evil(tmp_path / "marker")], dtype=object), allow_pickle=True)
    assert loaded() == (66, 17, {"train", "test"}) and not (tmp_path / "marker").exists()
    for part in ("train", "test"):
        os.utime(pictures / part / "emu", (1, 1))                          # as unpacking an older archive over it leaves it
    assert loaded() == (66, 17, {"train", "test"})
    (pictures / "train" / "dog" / "loop").symlink_to("..")
    with pytest.raises(common.Unusable, match="--data-dir: .*loop"):
        loaded()
    assert "warning" not in capsys.readouterr().err


def test_an_index_that_cannot_be_written_is_a_warning(pictures, monkeypatch, capsys):
    (pictures / "train-index.npz.tmp").mkdir()                             # where root may write anywhere
    assert len(load_folder(pictures, "--stream").images) == 64
    error = capsys.readouterr().err
    assert error.startswith("warning: ") and "train-index.npz" in error and error.count("\n") == 1


def test_workers_leave_signals_and_the_folder_to_the_trainer(pictures, tmp_path):
    """Ctrl-C reaches them, too, and the trainer still needs its batches; one that outlives the trainer keeps no --resume out of the folder."""
    images, out = load_folder(pictures, "--stream").images, tmp_path / "run"
    with closing(common.load_batches(images, torch.arange(64).split(1), "cpu")) as batches:
        with common.claimed(out, resume=False):
            for _ in range(16):                # by then each of the workers, 16 at most, has begun
                next(batches)
        with common.claimed(out, resume=True):
            workers = multiprocessing.active_children()
        for worker in workers:
            os.kill(worker.pid, signal.SIGINT)
            os.kill(worker.pid, signal.SIGTERM)
        assert workers and len(list(batches)) == 48
    assert not common.LOCKS                    # the workers of a next run would close what has their numbers by then


def test_a_foreign_checkpoint_writes_no_index(pictures):
    args = importlib.import_module("vicreg").arguments([*STREAMED, str(pictures), "--stream"])
    common.load_dataset(args, download=False)
    assert len(list(pictures.iterdir())) == 2


def test_a_bad_image_in_a_streamed_run(pictures, tmp_path, capsys):
    """Ends it with one line when its batch comes, what was saved is whole; or is left out by --skip-bad-images, found once."""
    bad = pictures / "train" / "cat" / "30.png"
    bad.write_bytes(b"no image")
    argv = flags("vicreg", tmp_path / "run", *STREAMED, str(pictures), "--stream", "--checkpoint-minutes", "0")
    status, error = run("vicreg", argv)
    line = error.splitlines()[-1]
    assert status == 1 and "Traceback" not in error
    assert "vicreg.py: cannot read the image" in line and str(bad) in line and "go on by --resume" in line and "--skip-bad-images" in line
    assert load_folder(pictures, "--stream").images[[15]][0].startswith("cannot read the image")
    for attempt in ("first", "second"):
        data = load_folder(pictures, "--stream", "--skip-bad-images")
        assert len(data.images) == len(data.train_labels["class"]) == 63
        assert "30.png" not in b" ".join(data.images.paths).decode() and "skipped 1 of 64 images" in capsys.readouterr().err
        with pytest.MonkeyPatch.context() as patch:                        # the second time nothing is decoded
            patch.setattr(common, "read_all", lambda *args, **more: pytest.fail("read again"))
            assert len(load_folder(pictures, "--stream", "--skip-bad-images").images) == 63
    assert len(load_folder(pictures, "--stream").images) == 64
