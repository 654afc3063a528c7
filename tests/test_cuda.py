"""What only a CUDA GPU can show: pytest -m cuda, skipped where there is none. And, everywhere, a bf16 step on fake CUDA tensors."""
import importlib
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import common
import conftest
import eval_linear
from test_processes import METHODS, run, small


def needs_cuda(test):
    return pytest.mark.cuda(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")(test))


@pytest.mark.parametrize("method, flags", [("vicreg", ["--optimizer", "lars"]), ("vicreg", ["--augmentation", "vicreg", "--image-size", "96"]), ("sjea", []), ("sjea", ["--base", "barlow-twins"]),
                                           ("ijepa", ["--masking", "random", "--target", "pixels"]), ("cjepa", []), ("cjepa", ["--views", "target", "--optimizer", "adamw"])])
def test_a_step_on_fake_cuda_tensors(method, flags, monkeypatch):
    """They have a device, a type and a shape, but no values: what is left on the CPU fails in the next operation, and so does reading a value, which would wait for the GPU."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    script, rand, cuda = importlib.import_module(method), torch.rand, torch.device("cuda")
    args = script.arguments([*small(method, *flags), "--device", "cpu"])
    args.device = "cuda"
    if "jepa" in method:                       # masks are drawn on the CPU
        shapes = [index.shape for index in script.draw_masks(args, args.batch_size, torch.Generator())]
        monkeypatch.setattr(script, "draw_masks", lambda *rest: [torch.zeros(shape, dtype=torch.int64) for shape in shapes])
    monkeypatch.setattr(torch, "rand", lambda *size, generator, device: rand(*size, device=device))
    monkeypatch.setattr(torch, "randperm", lambda n, generator: SimpleNamespace(tolist=lambda: list(range(n))))
    generator = SimpleNamespace(device=cuda, initial_seed=lambda: 0, get_offset=lambda: 0)    # without CUDA there is no torch.Generator("cuda")
    with torch.device("meta"):
        model = eval_linear.build(args).train()
    fake = FakeTensorMode()
    for module in model.modules():
        for name, p in [*module.named_parameters(recurse=False)]:
            setattr(module, name, nn.Parameter(FakeTensor(fake, p.data, cuda), p.requires_grad))
        for name, buffer in [*module.named_buffers(recurse=False)]:
            setattr(module, name, FakeTensor(fake, buffer, cuda))
    common.channels.cache_clear()
    with fake:
        optimizer, images = common.make_optimizer(model, args), torch.empty(args.batch_size, 3, args.image_size, args.image_size, dtype=torch.uint8, device=cuda)
        with torch.autocast("cuda", torch.bfloat16):
            loss, terms, embeddings = script.training_step(model, images, args, generator)
            for p in model.parameters():
                p.grad = torch.empty_like(p) if p.requires_grad else None  # a backward pass needs a GPU
            optimizer.step()
        if "jepa" in method:
            script.settle(args, 20)
            script.update_target(model, args, 0.5)
        features = model.representations(common.normalise(images.float() / 255))
        assert {x.device.type for x in (loss, *terms.values(), *embeddings.values(), *features.values())} == {"cuda"}
        assert {x.dtype for x in (loss, *terms.values(), *(m for state in optimizer.state.values() for m in state.values()))} == {torch.float32}
    common.channels.cache_clear()


def on_cuda(method, *more):
    return importlib.import_module(method).arguments([*small(method, *more), "--device", "cuda"])


@needs_cuda
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-3), ("bf16", 0.01)])
@pytest.mark.parametrize("method", METHODS)
def test_the_loss_of_a_step_is_the_cpus(method, precision, tolerance, monkeypatch):
    """The same views and masks on both: channels-last, autocast and the fused attention change no more than rounding."""
    images, losses = common.make_shapes(64, 32, 3)[0], {}
    monkeypatch.setattr(common, "augment", lambda x, *rest: common.normalise(x.float() / 255))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)         # else fp32 convolutions round to 10 bits
    for device in ("cpu", "cuda"):
        args = on_cuda(method, "--precision", precision)
        torch.manual_seed(0)
        model = eval_linear.build(args).to(device, memory_format=torch.channels_last).train()
        generator = torch.Generator(device).manual_seed(5)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            losses[device] = importlib.import_module(method).training_step(model, images.to(device), args, generator)[0].item()
    assert math.isclose(losses["cpu"], losses["cuda"], rel_tol=tolerance)


@needs_cuda
def test_augmentation_equals_the_cpus():
    """The same parameters, drawn on the CPU, applied on both."""
    images = common.make_shapes(64, 48, 3)[0]
    view = common.View(p_blur=0.5, p_solarize=0.3)
    p = common.draw_view(view, 64, 48, 48, torch.Generator().manual_seed(0))
    there = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in p.items()}
    assert_close(common.apply_view(images.cuda(), there, 32).cpu(), common.apply_view(images, p, 32), rtol=0, atol=1e-4)


@needs_cuda
def test_the_order_of_colour_operations_varies():
    generator = torch.Generator("cuda").manual_seed(0)
    orders = {tuple(common.draw_view(common.View(), 8, 32, 32, generator)["order"]) for _ in range(60)}
    assert len(orders) > 15                    # of 24


@needs_cuda
@pytest.mark.parametrize("method", METHODS)
def test_a_step_never_waits_for_the_device(method):
    args = on_cuda(method)
    model = eval_linear.build(args).to("cuda", memory_format=torch.channels_last)
    images, generator = common.make_shapes(64, 32, 3)[0].cuda(), torch.Generator("cuda").manual_seed(0)
    step = importlib.import_module(method).training_step
    step(model, images, args, generator)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, images, args, generator)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("flags", ([], ["--compile"], ["--precision", "bf16"]))
@pytest.mark.parametrize("method", METHODS)
def test_a_run_and_its_resumption(method, flags, tiny_run, tmp_path):
    """An interrupted run goes on to the log of one that never was."""
    flags = ["--device", "cuda", "--epochs", "2", *flags]
    whole = tiny_run(method, *flags)
    halves = tiny_run(method, *flags, stop_after=1)
    tiny_run(method, *flags, "--resume", out=halves)
    a, b = ([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (whole, halves))
    assert_close(a, b, rtol=5e-4, atol=1e-5)   # some CUDA kernels add in no fixed order; without the optimizer's moments they differ by more


def run_on_cuda(method, out, *more):
    common.load_shapes = conftest.tiny_shapes
    importlib.import_module(method).main([*small(method, "--batch-size", "32", "--epochs", "2", *more), "--device", "cuda", "--out", str(out)])


@needs_cuda
@pytest.mark.parametrize("method", METHODS)
def test_a_run_through_nccl_is_a_run_without(method, tmp_path, monkeypatch):
    """One GPU holds one of torchrun's processes: what it gathers from itself goes through NCCL."""
    monkeypatch.setattr(common, "load_shapes", conftest.tiny_shapes)       # which run_on_cuda does, too, for its process: here it is undone
    run_on_cuda(method, tmp_path / "alone")
    assert run(run_on_cuda, 1, method, tmp_path / "nccl") == [0]
    a, b = ([json.loads(line)["loss"] for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()] for out in ("alone", "nccl"))
    assert_close(a, b, rtol=5e-4, atol=1e-5)


def normalised_step(method, folder):
    """One step in float64 with BN in training mode, synchronised over the processes, which share one GPU (gloo allows that)."""
    rank, world = common.process()
    args = on_cuda(method, "--batch-size", "64")
    torch.manual_seed(0)
    model = eval_linear.build(args).double().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)       # zero in the last of each block
    if world > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.cuda()
    noise = torch.Generator().manual_seed(1)   # views whose bits do not depend on how many images a process has
    common.augment = lambda x, *rest: common.normalise(x.double() / 255) + 0.1 * common.share(torch.randn(64, 3, 32, 32, generator=noise, dtype=torch.float64)).cuda()
    images = common.share(common.make_shapes(64, 32, 3)[0]).cuda()
    forward = DistributedDataParallel(model) if world > 1 else model
    loss = importlib.import_module(method).training_step(forward, images, args, torch.Generator("cuda").manual_seed(5))[0]
    loss.backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    torch.save((common.average(loss.detach()).item(), gradients), folder / f"{world}-{rank}.pt")


def normalised_step_with_gloo(method, folder):
    torch.distributed.init_process_group("gloo")
    normalised_step(method, folder)


@needs_cuda
@pytest.mark.parametrize("method", METHODS)
def test_gradients_with_synchronised_bn_are_those_of_one_process(method, tmp_path):
    for world in (1, 2):
        assert run(normalised_step_with_gloo, world, method, tmp_path) == [0] * world
    loss, gradients = torch.load(tmp_path / "1-0.pt")
    for rank in range(2):
        found_loss, found = torch.load(tmp_path / f"2-{rank}.pt")
        assert math.isclose(loss, found_loss, rel_tol=1e-6)
        assert_close(found, gradients, rtol=1e-6, atol=1e-6)
