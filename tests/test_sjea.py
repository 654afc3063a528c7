"""sjea.py: one stack is VICReg, gradients between stacks, Table 2's counts, Table 3's settings, map sizes."""
import pytest
import torch
from torch import nn

import common
import sjea
import vicreg

SMALL = ["--width", "8", "--projector", "16-16-16", "--precision", "fp32", "--device", "cpu"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_stack_is_vicreg_bit_for_bit(precision, shapes_64):
    """Twenty optimizer steps from the same seed: equal losses, equal parameters."""
    runs = {}
    for method, model_class, flags in ((vicreg, vicreg.VICReg, []), (sjea, sjea.SJEA, ["--stacks", "1"])):
        args = method.arguments(SMALL + ["--precision", precision] + flags)
        torch.manual_seed(0)
        model = model_class(args).to(memory_format=torch.channels_last)
        optimizer, generator, losses = common.make_optimizer(model, args), torch.Generator(), []
        for step in range(20):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss, _, _ = method.training_step(model, shapes_64.images[:16], args, generator.manual_seed(step))
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-3
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs[method] = losses, [p.detach().clone() for p in model.parameters()]
    assert runs[vicreg][0] == runs[sjea][0] and len(set(runs[sjea][0])) == 20
    assert all(torch.equal(p, q) for p, q in zip(runs[vicreg][1], runs[sjea][1], strict=True))


def stem_gradient(flags, stack, images):
    """Gradient of stack's own loss at the first convolution of stack 0."""
    args = sjea.arguments(SMALL + flags)
    torch.manual_seed(0)
    model = sjea.SJEA(args)
    x = common.normalise(images.float() / 255)
    z_1, z_2 = model(x, x.flip(3))[stack]
    vicreg.vicreg_loss(z_1, z_2, 25, 25, 1)[0].backward()
    return model.f[0].stem[0].weight.grad


def test_gradient_between_stacks(shapes_64):
    assert stem_gradient([], 1, shapes_64.images).abs().sum() > 0
    assert stem_gradient(["--stop-gradient"], 1, shapes_64.images) is None
    own, stopped = (stem_gradient(flags, 0, shapes_64.images) for flags in ([], ["--stop-gradient"]))
    assert own.abs().sum() > 0 and torch.equal(own, stopped)


def test_the_loss_is_the_weighted_sum_over_stacks(shapes_64):
    def losses(*flags):
        args = sjea.arguments(SMALL + ["--stacks", "3", "--lambda", "2", "--mu", "3", "--nu", "5", *flags])
        torch.manual_seed(0)
        loss, terms, _ = sjea.training_step(sjea.SJEA(args), shapes_64.images, args, torch.Generator().manual_seed(1))
        per_stack = [2 * terms[f"invariance_{k}"] + 3 * terms[f"variance_{k}"] + 5 * terms[f"covariance_{k}"] for k in range(3)]
        return loss.item(), [part.item() for part in per_stack]
    loss, parts = losses()
    assert loss == pytest.approx(sum(parts), rel=1e-5)
    loss, parts = losses("--stack-weights", "1", "0.5", "0.25")
    assert loss == pytest.approx(parts[0] + parts[1] / 2 + parts[2] / 4, rel=1e-5)


def test_each_level_logs_its_own_embeddings(shapes_64):
    args = sjea.arguments(SMALL)
    model, seen = sjea.SJEA(args), []
    model.register_forward_hook(lambda module, inputs, output: seen.extend(output))
    _, _, embeddings = sjea.training_step(model, shapes_64.images, args, torch.Generator().manual_seed(1))
    assert list(embeddings) == ["0", "1"] and all(torch.equal(embeddings[str(k)], seen[k][0]) for k in (0, 1))


@pytest.mark.parametrize("loss", [lambda a, b: sjea.vicreg_loss(a, b, 25, 25, 1), sjea.barlow_twins_loss])
def test_embeddings_of_half_precision_are_computed_in_float32(loss):
    """Under autocast, whose matrix products are bfloat16's."""
    z_1, z_2 = (torch.randn(64, 32, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (1, 2))
    exact, _ = loss(z_1.double(), z_2.double())
    with torch.autocast("cpu", torch.bfloat16):
        value, _ = loss(z_1, z_2)
    assert value.dtype == torch.float32 and value.item() == pytest.approx(exact.item(), rel=1e-5)


def test_algorithm_1_written_out(shapes_64):
    """Two stacks against the paper's lines, with y1_1 = f2(y0_1)."""
    args = sjea.arguments(SMALL + ["--projectors", "10"])
    torch.manual_seed(0)
    model = sjea.SJEA(args).eval()
    x = common.normalise(shapes_64.images.float() / 255)
    y0 = model.f[0](x)
    y1 = model.f[1](y0)
    (z0, _), (z1, _) = model(x, x)
    assert y0.shape == (64, 64, 4, 4)
    assert torch.equal(z0, model.h[0](y0.mean((2, 3)))) and torch.equal(z1, y1.mean((2, 3)))
    kept = model.representations(x)
    assert torch.equal(kept["0"], y0.mean((2, 3))) and torch.equal(kept["1"], y1.mean((2, 3)))


@pytest.mark.parametrize("projectors", ["00", "10", "01", "11"])
def test_table_3_settings(projectors):
    model = sjea.SJEA(sjea.arguments(SMALL + ["--projectors", projectors]))
    assert "".join("1" if common.count_parameters(h) else "0" for h in model.h) == projectors


def test_table_2_parameter_counts():
    """11.6 M for one ResNet-18 stack on average and 23.2 M for two, with the authors' projector."""
    paper = ["--width", "64", "--projector", "256-256-256"]
    assert common.count_parameters(sjea.SJEA(sjea.arguments(paper))) / 1e6 == pytest.approx(23.2, abs=0.05)
    assert common.count_parameters(sjea.SJEA(sjea.arguments(paper))) / 2e6 == pytest.approx(11.6, abs=0.05)


def test_barlow_twins_against_a_loop_over_its_equations(shapes_64):
    """Eq. (1) and (2) in float64, entry by entry; and in every stack of a step, whatever the views are scaled by."""
    torch.manual_seed(0)
    z_1, z_2 = torch.randn(2, 7, 5, dtype=torch.float64)
    a, b = z_1 - z_1.mean(0), z_2 - z_2.mean(0)
    loss = 0.0
    for i in range(5):
        for j in range(5):
            C = (a[:, i] * b[:, j]).sum() / (a[:, i].pow(2).sum().sqrt() * b[:, j].pow(2).sum().sqrt())
            loss += (1 - C) ** 2 if i == j else 0.005 * C**2
    assert sjea.barlow_twins_loss(z_1, z_2)[0].item() == pytest.approx(loss.item(), rel=1e-4)      # batch norm's eps of 1e-5
    assert sjea.barlow_twins_loss(1000 * z_1, 1000 * z_2)[0].item() == pytest.approx(loss.item(), rel=1e-9)

    args = sjea.arguments(SMALL + ["--base", "barlow-twins", "--stack-weights", "1", "0.5"])
    loss, terms, _ = sjea.training_step(sjea.SJEA(args), shapes_64.images, args, torch.Generator().manual_seed(1))
    own = [terms[f"on_diagonal_{k}"] + 0.005 * terms[f"off_diagonal_{k}"] for k in range(2)]
    assert loss.item() == pytest.approx((own[0] + own[1] / 2).item(), rel=1e-5)


def test_taps_that_see_only_padding_get_no_gradient(shapes_64):
    """On stack 1's maps of 2x2 and 1x1, in bf16: kernels have been seen to leave memory's old content there."""
    args = sjea.arguments(["--width", "16", "--precision", "bf16", "--device", "cpu"])
    torch.manual_seed(0)
    model = sjea.SJEA(args).to(memory_format=torch.channels_last)
    for block in model.f[1].blocks[6:]:
        torch.nn.init.ones_(block.bn2.weight)                             # zero at the start, and so would be the gradient
    for step in range(8):
        with torch.autocast("cpu", torch.bfloat16):
            loss, _, _ = sjea.training_step(model, shapes_64.images, args, torch.Generator().manual_seed(step))
        model.zero_grad()
        loss.backward()
        for block in model.f[1].blocks[6:]:
            for conv in (block.conv1, block.conv2):
                gradient = conv.weight.grad.abs().amax((0, 1))
                assert gradient[1, 1] > 0 and gradient.flatten().tolist().count(0.0) == 8


@pytest.mark.parametrize("size, stack_1_reads", [(32, (512, 4, 4)), (96, (512, 3, 3)), (8, (512, 1, 1))])
def test_later_stacks_adapt_to_the_map(size, stack_1_reads):
    """The maps of CIFAR's and STL-10's sizes, and a map of one cell; three stacks."""
    args = sjea.arguments(["--width", "64", "--projector", "8-8", "--image-size", str(size), "--stacks", "3"])
    model = sjea.SJEA(args).train()
    maps = model.maps(torch.randn(2, 3, size, size))
    assert maps[0].shape[1:] == stack_1_reads
    assert model.f[1].stem[0].weight.shape == (64, 512, 3, 3)
    assert maps[2].shape == (2, 512, 1, 1)


def test_no_map_is_channels_last_on_mps(tiny_run, monkeypatch):
    """There BN's gradient of such maps is wrong. In training, in k-NN and in the judge; elsewhere they are channels-last."""
    seen = set()
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: seen.add(inputs[0].is_contiguous()) if isinstance(module, nn.BatchNorm2d) and inputs[0].shape[2] > 1 else None)
    try:
        tiny_run("sjea", "--epochs", "1")
        assert seen == {False}
        seen.clear()
        monkeypatch.setattr(common, "memory_format", lambda device, chosen=common.memory_format: chosen("mps"))
        tiny_run("sjea", "--epochs", "1")
        assert seen == {True}
    finally:
        handle.remove()
