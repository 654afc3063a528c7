"""cjepa.py: I-JEPA bit for bit without its terms, the terms against a loop."""
import itertools

import pytest
import torch

import cjepa
import common
import ijepa
import vicreg

SMALL = ["--precision", "fp32", "--device", "cpu", "--num-targets", "2", "--predictor-width", "24", "--predictor-depth", "2"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_its_terms_it_is_ijepa_bit_for_bit(precision, shapes_64):
    """Twenty steps with optimizer and EMA from the same seed: equal losses, equal parameters."""
    runs = {}
    for method, flags in ((ijepa, []), (cjepa, ["--beta-vicreg", "0"])):
        args = method.arguments(SMALL + ["--precision", precision] + flags)
        method.settle(args, 20)
        torch.manual_seed(0)
        model = method.JEPA(args)
        optimizer, generator, losses = common.make_optimizer(model, args), torch.Generator(), []
        for step in range(20):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss, _, _ = method.training_step(model, shapes_64.images[:16], args, generator.manual_seed(step))
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-3
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            method.update_target(model, args, step / 20)
            losses.append(loss.item())
        runs[method] = losses, [p.detach().clone() for p in model.parameters()]
    assert runs[ijepa][0] == runs[cjepa][0] and len(set(runs[ijepa][0])) == 20
    assert all(torch.equal(p, q) for p, q in zip(runs[ijepa][1], runs[cjepa][1], strict=True))


def test_a_whole_run_without_its_terms_is_ijepas(tiny_run):
    """Two epochs by either script, their EMA included: equal weights, the target's too, and the target moved."""
    flags = ("--epochs", "2", "--ema", "0.9")
    one, other = (torch.load(out / "checkpoint.pt", weights_only=True)["model"]
                  for out in (tiny_run("ijepa", *flags), tiny_run("cjepa", *flags, "--beta-vicreg", "0")))
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
    torch.manual_seed(0)
    start = cjepa.JEPA(cjepa.arguments(["--predictor-width", "12", "--predictor-depth", "1"])).target_encoder
    assert not torch.equal(other["target_encoder.embed.weight"], start.embed.weight)


@pytest.mark.parametrize("views", ["blocks", "target"])
def test_the_loss_is_ijepas_and_the_weighted_terms(views, shapes_64):
    """Terms by hand from the model's predictions: a loop over pairs of blocks, or prediction against target."""
    args = cjepa.arguments(SMALL + ["--num-targets", "4", "--views", views, "--beta-vicreg", "0.5", "--beta-sim", "2", "--beta-std", "3", "--beta-cov", "5"])
    torch.manual_seed(0)
    model, seen = cjepa.JEPA(args), {}
    model.register_forward_hook(lambda module, inputs, output: seen.update(output=output, targets=inputs[2]))
    loss, terms, _ = cjepa.training_step(model, shapes_64.images, args, torch.Generator().manual_seed(1))
    s_hat, s_y = (t.detach().double() for t in seen["output"])
    s = torch.stack([s_y[b][seen["targets"][b]] for b in range(64)])      # [B, M, Nt, D]
    if views == "blocks":
        pairs = [(s_hat[:, i].mean(1), s_hat[:, j].mean(1)) for i in range(4) for j in range(4) if i < j]
    else:
        pairs = [(s_hat.mean((1, 2)), s.mean((1, 2)))]
    mean = lambda values: sum(values) / len(values)
    sim = mean([((a - b) ** 2).mean() for a, b in pairs])
    std = mean([(vicreg.variance(a) + vicreg.variance(b)) / 2 for a, b in pairs])
    cov = mean([vicreg.covariance(a) + vicreg.covariance(b) for a, b in pairs])
    expected = torch.nn.functional.smooth_l1_loss(s_hat, s) + 0.5 * (2 * sim + 3 * std + 5 * cov)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert [terms[name].item() for name in ("invariance", "variance", "covariance")] == pytest.approx([sim.item(), std.item(), cov.item()], rel=1e-4)


def test_the_weights_of_the_terms_are_the_published_ones():
    args = cjepa.arguments([])
    assert (args.beta_vicreg, args.beta_sim, args.beta_std, args.beta_cov) == (0.001, 25, 25, 1)


def test_every_term_alone_reaches_the_context_encoder(shapes_64):
    gradients = {}
    for flag in (None, "--beta-sim", "--beta-std", "--beta-cov"):
        others = itertools.chain(*((f, "0") for f in ("--beta-sim", "--beta-std", "--beta-cov") if f != flag))
        args = cjepa.arguments(SMALL + ["--beta-vicreg", "1", *others])
        torch.manual_seed(0)
        model = cjepa.JEPA(args)
        cjepa.training_step(model, shapes_64.images, args, torch.Generator().manual_seed(1))[0].backward()
        gradients[flag] = model.context_encoder.embed.weight.grad
        assert all(p.grad is None for p in model.target_encoder.parameters())
    assert all(not torch.equal(gradients[None], gradients[flag]) for flag in gradients if flag)
