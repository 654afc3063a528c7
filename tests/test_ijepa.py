"""ijepa.py: masks, a slow reference of the whole step in float64, the EMA, encoder sizes, a resumed run."""
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

import cjepa
import common
import ijepa

SMALL = ["--precision", "fp32", "--device", "cpu", "--num-targets", "2", "--predictor-width", "24", "--predictor-depth", "3"]


def rectangle(indices, grid):
    """(top, left, h, w) of a set of patches that fills a rectangle, else an assertion fails."""
    rows, columns = indices // grid, indices % grid
    top, left, h, w = rows.min(), columns.min(), rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
    assert sorted(indices.tolist()) == [r * grid + c for r in range(top, top + h) for c in range(left, left + w)]
    return top.item(), left.item(), h.item(), w.item()


def batches(masks, number=10, batch_size=128, grid=14, **options):
    generator = torch.Generator().manual_seed(0)
    for _ in range(number):
        context, targets = masks(batch_size, grid, generator, **options)
        assert context.dtype == targets.dtype == torch.int64
        for c, t in zip(context, targets):
            assert len(set(c.tolist())) == len(c) and 0 <= c.min() and c.max() < grid**2
            assert not set(c.tolist()) & set(t.flatten().tolist())
        yield context, targets


def test_multiblock_masks():
    """1,280 images: full rectangles in the published ranges, one size per batch, a place per block."""
    shares, sizes = [], set()
    for context, targets in batches(ijepa.multiblock_masks):
        assert targets.shape[:2] == (128, 4)
        blocks = [rectangle(block, 14) for image in targets for block in image]
        (h, w), = {block[2:] for block in blocks}
        assert 0.15 <= h * w / 196 <= 0.2 and 0.75 <= h / w <= 1.5
        assert {block[0] for block in blocks} == set(range(14 - h + 1)) and {block[1] for block in blocks} == set(range(14 - w + 1))
        assert len({tuple(image[:, 0].tolist()) for image in targets}) > 120
        sizes.add((h, w))
        shares.append(context.shape[1] / 196)
        assert (context.diff(dim=1) > 0).all()
    assert len(sizes) > 2
    assert sum(shares) / len(shares) == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("grid, sides", [(14, (13,)), (28, (26, 27))])
def test_context_is_what_the_targets_leave_of_a_square(grid, sides):
    """With one image per batch nothing is cut: square minus blocks, exactly."""
    generator = torch.Generator().manual_seed(0)
    squares = [{r * grid + c for r in range(top, top + side) for c in range(left, left + side)}
               for side in sides for top in range(grid - side + 1) for left in range(grid - side + 1)]
    for _ in range(300):
        context, targets = ijepa.multiblock_masks(1, grid, generator)
        hidden = set(targets.flatten().tolist())
        assert set(context[0].tolist()) in [square - hidden for square in squares]


def test_rasterized_masks():
    for context, targets in batches(ijepa.rasterized_masks):
        assert context.shape == (128, 49) and targets.shape == (128, 3, 49)
        corners = {(0, 0, 7, 7), (0, 7, 7, 7), (7, 0, 7, 7), (7, 7, 7, 7)}
        for c, t in zip(context, targets):
            assert {rectangle(block, 14) for block in (c, *t)} == corners
        assert len({rectangle(c, 14) for c in context}) == 4


def test_block_masks():
    shares = []
    for context, targets in batches(ijepa.block_masks):
        (h, w), = {rectangle(block, 14)[2:] for image in targets for block in image}
        assert targets.shape[1] == 1 and 0.55 <= h * w / 196 <= 0.65 and 0.75 <= h / w <= 1.5
        shares.append(context.shape[1] / 196)
        assert context.shape[1] == 196 - h * w
    assert sum(shares) / len(shares) == pytest.approx(0.4, abs=0.03)


def test_random_masks():
    counts = torch.zeros(196)
    for context, targets in batches(ijepa.random_masks):
        assert targets.shape == (128, 1, 118) and context.shape == (128, 78)
        counts += torch.bincount(targets.flatten(), minlength=196)
    assert (counts / 1280 - 118 / 196).abs().max() < 0.07                # five standard deviations


# ---- a slow reference: one image, one block, one head, one token at a time ----


def layer_norm(x, weight, bias, eps):
    mean = sum(x) / len(x)
    var = sum((value - mean) ** 2 for value in x) / len(x)
    return (x - mean) / torch.sqrt(var + eps) * weight + bias


def reference_transformer(state, prefix, tokens, heads, depth):
    """tokens [n, D] -> [n, D], from the definition of a pre-norm transformer, weights by name."""
    w = lambda name: state[f"{prefix}.{name}"]
    norm = lambda x, name: torch.stack([layer_norm(token, w(f"{name}.weight"), w(f"{name}.bias"), 1e-6) for token in x])
    n, D = tokens.shape
    d = D // heads
    for k in range(depth):
        x = norm(tokens, f"blocks.{k}.norm1")
        qkv = x @ w(f"blocks.{k}.qkv.weight").T + w(f"blocks.{k}.qkv.bias")
        out = torch.zeros(n, D, dtype=tokens.dtype)
        for h in range(heads):
            q, key, v = (qkv[:, part * D + h * d:part * D + (h + 1) * d] for part in range(3))
            for i in range(n):
                weights = torch.tensor([math.exp(q[i] @ key[j] / math.sqrt(d)) for j in range(n)], dtype=tokens.dtype)
                out[i, h * d:(h + 1) * d] = (weights / weights.sum()) @ v
        tokens = tokens + out @ w(f"blocks.{k}.proj.weight").T + w(f"blocks.{k}.proj.bias")
        x = norm(tokens, f"blocks.{k}.norm2") @ w(f"blocks.{k}.fc1.weight").T + w(f"blocks.{k}.fc1.bias")
        x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        tokens = tokens + x @ w(f"blocks.{k}.fc2.weight").T + w(f"blocks.{k}.fc2.bias")
    return norm(tokens, "norm")


def reference_position(patch, grid, width):
    """sin and cos of the row at width / 4 frequencies, then of the column."""
    frequencies = [10000 ** (-k / (width // 4)) for k in range(width // 4)]
    wave = lambda place: [math.sin(place * f) for f in frequencies] + [math.cos(place * f) for f in frequencies]
    return torch.tensor(wave(patch // grid) + wave(patch % grid), dtype=torch.float64)


@torch.no_grad()
def reference_step(model, args, y, context, targets):
    """([image][block] predictions [Nt, D], targets [Nt, D])."""
    state, p, grid = {name: value.double() for name, value in model.state_dict().items()}, args.patch_size, args.image_size // args.patch_size
    D, depth, heads = common.VITS[args.vit]
    def encode(image, which, name):
        tokens = []
        for j in which:
            r, c = j // grid * p, j % grid * p
            tokens.append(state[f"{name}.embed.weight"] @ image[:, r:r + p, c:c + p].flatten() + state[f"{name}.embed.bias"]
                          + reference_position(j, grid, D))
        return reference_transformer(state, name, torch.stack(tokens), heads, depth)
    result = []
    for image, c, blocks in zip(y, context.tolist(), targets.tolist()):
        s_y = encode(image, range(grid**2), "target_encoder")
        s_y = torch.stack([layer_norm(token, 1, 0, 1e-5) for token in s_y])
        s_x = encode(image, c, "context_encoder")
        result.append([])
        for block in blocks:
            width = args.predictor_width
            tokens = [state["predictor.embed.weight"] @ s + state["predictor.embed.bias"] + reference_position(j, grid, width) for s, j in zip(s_x, c)]
            tokens += [state["predictor.mask_token"] + reference_position(j, grid, width) for j in block]
            out = reference_transformer(state, "predictor", torch.stack(tokens), heads, args.predictor_depth)[len(c):]
            result[-1].append((out @ state["predictor.project.weight"].T + state["predictor.project.bias"], s_y[block]))
    return result


@pytest.fixture
def step():
    """A small model in float64 with an encoder moved away from its target, images and masks."""
    args = ijepa.arguments(SMALL + ["--image-size", "24"])
    torch.manual_seed(0)
    model = ijepa.JEPA(args).double()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    for module in model.modules():
        if hasattr(module, "position"):
            exact = torch.stack([reference_position(j, 6, module.position.shape[1]) for j in range(36)])
            assert module.position.shape == exact.shape and (module.position - exact).abs().max() < 1e-6
            module.position = exact            # the table in full precision
    y = torch.randn(3, 3, 24, 24, dtype=torch.float64)
    return model, args, y, *ijepa.multiblock_masks(3, 6, torch.Generator().manual_seed(1))


def test_predictions_and_loss_equal_a_loop_over_images_and_blocks(step):
    model, args, y, context, targets = step
    s_hat, s_y = model(y, context, targets)
    s = common.take(s_y, targets)
    smooth, squared, count = 0.0, 0.0, 0
    for b, blocks in enumerate(reference_step(*step)):
        for m, (prediction, target) in enumerate(blocks):
            assert (s_hat[b, m] - prediction).abs().max() < 1e-9
            assert (s[b, m] - target).abs().max() < 1e-9
            for e in (prediction - target).flatten().tolist():
                smooth += 0.5 * e * e if abs(e) < 1 else abs(e) - 0.5
                squared, count = squared + e * e, count + 1
    assert ijepa.prediction_loss(s_hat, s).item() == pytest.approx(smooth / count, abs=1e-9)
    assert ijepa.prediction_loss(s_hat, s, "l2").item() == pytest.approx(squared / (3 * 4), rel=1e-12)


def test_pixels_inside_a_target_reach_the_target_and_not_the_prediction(step):
    model, args, y, context, targets = step
    j = targets[0, 2, 0].item()
    changed = y.clone()
    changed[0, :, j // 6 * 4 + 1, j % 6 * 4 + 2] += 1
    (s_hat, s_y), (s_hat_2, s_y_2) = model(y, context, targets), model(changed, context, targets)
    assert torch.equal(s_hat, s_hat_2)
    assert (s_y - s_y_2)[0, j].abs().max() > 1e-3 and torch.equal(s_y[1:], s_y_2[1:])


def test_gradients_reach_context_encoder_and_predictor_alone(step):
    model, args, y, context, targets = step
    s_hat, s_y = model(y, context, targets)
    ijepa.prediction_loss(s_hat, common.take(s_y, targets)).backward()
    assert not s_y.requires_grad
    assert all(p.grad is None and not p.requires_grad for p in model.target_encoder.parameters())
    for part in (model.context_encoder, model.predictor):
        assert all(p.grad.abs().sum() > 0 for name, p in part.named_parameters())


def test_target_is_the_explicit_sum_of_the_ema(step):
    """theta_k = prod m_i theta_0 + sum_i (1 - m_i) prod_{j > i} m_j c_i, m from 0.9 to 0.99."""
    model, args, *_ = step
    args.ema, args.ema_end, k = 0.9, 0.99, 7
    m = [0.9 + 0.09 * i / (k - 1) for i in range(k)]
    contexts, start = [], model.target_encoder.embed.weight.clone()
    for i in range(k):
        weight = model.context_encoder.embed.weight
        weight.data += torch.randn_like(weight)
        contexts.append(weight.detach().clone())
        ijepa.update_target(model, args, i / (k - 1))
    expected = math.prod(m) * start + sum((1 - m[i]) * math.prod(m[i + 1:]) * c for i, c in enumerate(contexts))
    assert (model.target_encoder.embed.weight - expected).abs().max() < 1e-12
    args.ema = 0.0
    ijepa.update_target(model, args, 0.5)
    for target, context in zip(model.target_encoder.parameters(), model.context_encoder.parameters(), strict=True):
        assert torch.equal(target, context)


def test_pixel_targets_are_normalised_patches():
    args = ijepa.arguments(SMALL + ["--target", "pixels"])
    torch.manual_seed(0)
    y = torch.randn(2, 3, 32, 32)
    s_hat, s_y = ijepa.JEPA(args)(y, *ijepa.multiblock_masks(2, 8))
    assert s_hat.shape[-1] == 48
    patch = y[1, :, 8:12, 20:24].flatten()                               # row 2, column 5
    assert torch.allclose(s_y[1, 2 * 8 + 5], (patch - patch.mean()) / patch.std(correction=0), atol=1e-3)


def test_the_weights_start_as_documented():
    """The target as the context encoder; Xavier's uniform, the last layers of block l scaled by 1 / sqrt(2 l); no biases; the mask token small."""
    torch.manual_seed(0)
    model = ijepa.JEPA(ijepa.arguments([*SMALL, "--vit", "tiny", "--predictor-width", "192"]))
    assert model.predictor.mask_token.shape == (192,) and model.predictor.mask_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert all(torch.equal(p, q) for p, q in zip(model.target_encoder.parameters(), model.context_encoder.parameters(), strict=True))
    for transformer in (model.context_encoder, model.predictor):
        for name, layer in transformer.named_modules():
            if isinstance(layer, torch.nn.Linear):
                scaled = name.endswith(("proj", "fc2"))
                bound = math.sqrt(6 / sum(layer.weight.shape)) / (math.sqrt(2 * (int(name.split(".")[1]) + 1)) if scaled else 1)
                assert 0.97 * bound < layer.weight.abs().max() <= bound * 1.0001 and layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
                assert not layer.bias.any()


@pytest.mark.parametrize("script", (ijepa, cjepa))
@pytest.mark.parametrize("target, watched", [("pixels", "pixels"), ("features", "target")])
def test_what_is_watched_for_collapse_has_its_name(script, target, watched):
    """Pixels cannot collapse: their spread is not that of the target encoder."""
    args = script.arguments(SMALL + ["--target", target])
    embeddings = script.training_step(script.JEPA(args), common.make_shapes(4, 32, 1)[0], args, torch.Generator().manual_seed(0))[2]
    assert {name: z.shape[1] for name, z in embeddings.items()} == {watched: 48 if target == "pixels" else 96, "prediction": 48 if target == "pixels" else 96}


@pytest.mark.parametrize("script", (ijepa, cjepa))
@pytest.mark.parametrize("loss", ["smooth_l1", "l2"])
def test_a_step_takes_its_crop_its_masks_its_loss_and_watches_features(script, loss, monkeypatch):
    """From one step to the next other masks; crops alone; the loss that --loss names; the means of what the model returned."""
    args = script.arguments(SMALL + ["--loss", loss, "--crop-min", "0.6", "--batch-size", "4"] + ["--beta-vicreg", "0"] * (script is cjepa))
    model, seen, views, masks = script.JEPA(args), {}, [], []
    model.register_forward_hook(lambda module, inputs, output: seen.update(output=output, context=inputs[1], targets=inputs[2]))
    augment, draw = common.augment, script.draw_masks
    monkeypatch.setattr(common, "augment", lambda x, view, *rest: views.append(view) or augment(x, view, *rest))
    monkeypatch.setattr(script, "draw_masks", lambda *given: masks.append(draw(*given)) or masks[-1])
    for step in range(2):
        value, terms, watched = script.training_step(model, common.make_shapes(4, 32, 1)[0], args, torch.Generator().manual_seed(step))
    assert views == 2 * [common.View((0.6, 1.0), p_flip=0.0, p_jitter=0.0, p_grey=0.0)]
    assert not torch.equal(masks[0][1].flatten()[:10], masks[1][1].flatten()[:10])
    assert torch.equal(seen["context"], masks[1][0]) and torch.equal(seen["targets"], masks[1][1])
    s_hat, s_y = (t.detach().double() for t in seen["output"])
    error = s_hat - torch.stack([s_y[b][seen["targets"][b]] for b in range(4)])
    expected = error.pow(2).sum((2, 3)).mean() if loss == "l2" else torch.where(error.abs() < 1, error.pow(2) / 2, error.abs() - 0.5).mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5) and terms["prediction"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(watched["target"].double(), s_y.mean(1), atol=1e-6) and torch.allclose(watched["prediction"].double(), s_hat.mean((1, 2)), atol=1e-6)


@pytest.mark.parametrize("script", (ijepa, cjepa))
def test_masks_are_waited_for_where_the_device_is_no_cuda(script, monkeypatch):
    """On MPS a copy that is not waited for may read memory that holds the next step's masks (pytorch#189690)."""
    args, copies, to = script.arguments([*SMALL]), [], torch.Tensor.to
    model, images = script.JEPA(args), torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *where, **how: copies.append((x.dtype, how.get("non_blocking"))) or to(x, *where, **how))
    script.training_step(model, images, args, torch.Generator())
    assert [non_blocking for dtype, non_blocking in copies if dtype == torch.int64] == [False, False]


def test_each_level_is_its_own_encoder(step):
    model, _, y, *_ = step
    found = model.representations(y)
    assert torch.equal(found["target"], model.target_encoder(y).mean(1)) and torch.equal(found["context"], model.context_encoder(y).mean(1))
    assert (found["target"] - found["context"]).abs().max() > 0.01


def test_masks_follow_their_flags():
    """--masking names the strategy, the scales its blocks; and where contexts are cut, the first patches stay."""
    draw = lambda *flags: ijepa.draw_masks(ijepa.arguments([*SMALL, *flags]), 16, torch.Generator().manual_seed(3))
    for strategy in ("rasterized", "block", "random"):
        expected = getattr(ijepa, f"{strategy}_masks")(16, 8, torch.Generator().manual_seed(3))
        assert all(map(torch.equal, draw("--masking", strategy), expected))
    _, targets = draw("--num-targets", "3", "--target-scale", "0.3", "0.35")
    assert targets.shape[1] == 3 and 0.3 <= targets.shape[2] / 64 <= 0.35
    context, targets = draw("--num-targets", "1", "--target-scale", "0.1", "0.15", "--context-scale", "0.5", "0.6")
    assert context.shape[1] <= 0.6 * 64
    assert ijepa.first_true(torch.tensor([[1, 0, 1, 1], [0, 1, 0, 1]]).bool()).tolist() == [[0, 2], [1, 3]]


@pytest.mark.parametrize("script, flags", [(ijepa, []), (cjepa, ["--views", "target"])])
@pytest.mark.parametrize("strategy", ("multiblock", "rasterized", "block", "random"))
def test_a_grid_is_taken_where_its_masks_can_be_drawn(script, flags, strategy):
    args, taken, drawn = script.arguments([*SMALL, *flags, "--masking", strategy]), [], []
    args.patch_size = 8
    for grid in range(1, 21):
        args.image_size = 8 * grid
        try:
            script.check_grid(args)
            taken.append(grid)
        except common.Unusable:
            pass
        try:
            context, targets = script.draw_masks(args, 64, torch.Generator().manual_seed(0))
            drawn += [grid] * (context.numel() > 0 and targets.numel() > 0)
        except (RuntimeError, IndexError):     # no size to choose from, no quadrants
            pass
    assert taken == drawn and 2 < len(taken) < 20


@pytest.mark.parametrize("script", (ijepa, cjepa))
def test_blocks_that_could_cover_the_context_and_predictors_wider_than_the_encoder_are_refused(script):
    quarters = [*SMALL, "--target-scale", "0.25", "0.25", "--context-scale", "1", "1"]                 # 4 x 4 of 8 x 8 patches
    script.arguments([*quarters, "--num-targets", "3"])
    with pytest.raises(common.Unusable, match="--num-targets: 4 blocks of --target-scale 0.25"):
        script.arguments([*quarters, "--num-targets", "4"])
    script.arguments([*SMALL, "--predictor-width", "96"])
    for width in ("28", "30", "108"):          # no multiple of 3 heads; none of 4; wider than 96
        with pytest.raises(common.Unusable, match=f"--predictor-width: {width}"):
            script.arguments([*SMALL, "--predictor-width", width])


@pytest.mark.parametrize("size, reference, patch", [("base", "vit_b_16", 16), ("large", "vit_l_16", 16), ("huge", "vit_h_14", 14)])
def test_encoder_sizes_are_the_published_ones(size, reference, patch):
    """torchvision's ViT less its class token, learned positions and classifier; 85,646,592 for ViT-B/16."""
    with torch.device("meta"):
        ours, theirs = common.ViT(size, 224, patch), getattr(torchvision.models, reference)()
    extra = theirs.class_token.numel() + theirs.encoder.pos_embedding.numel() + common.count_parameters(theirs.heads)
    assert common.count_parameters(ours) == common.count_parameters(theirs) - extra
    assert size != "base" or common.count_parameters(ours) == 85_646_592
    assert ours.blocks[0].heads == theirs.encoder.layers[0].num_heads


def test_the_small_encoders_are_deits():
    """Width, depth and heads of DeiT-Ti and DeiT-S (Touvron et al. 2021, table 1)."""
    assert (common.VITS["tiny"], common.VITS["small"]) == ((192, 12, 3), (384, 12, 6))


def test_features_of_all_patches_equal_those_of_their_index_set():
    torch.manual_seed(0)
    encoder, x = common.ViT("micro", 32, 4).eval(), torch.randn(2, 3, 32, 32)
    assert torch.equal(encoder(x), encoder(x, torch.arange(64).expand(2, -1)))
    order = torch.stack([torch.randperm(64), torch.randperm(64)])
    assert torch.allclose(common.take(encoder(x), order), encoder(x, order), atol=1e-5)


@pytest.mark.parametrize("N, gradient", [(9, True), (9, False), (600, True)])
def test_attention_equals_its_definition_token_by_token(N, gradient):
    """By either path, the fused kernel's or, with a gradient and few tokens, the plain one: softmax(q k^T / sqrt(d)) v in float64."""
    q, k, v = torch.randn(3, 2, 4, N, 16, requires_grad=gradient).unbind()
    found = common.attention(q, k, v)
    for b, h, i in itertools.product(range(2), range(4), (0, N // 2, N - 1)):
        weights = torch.tensor([math.exp(q[b, h, i].double().dot(k[b, h, j].double()).item() / 4) for j in range(N)], dtype=torch.float64)
        assert torch.allclose(found[b, h, i].double(), (weights / weights.sum()) @ v[b, h].double(), atol=1e-5)


# ---- whole runs ----


@pytest.mark.parametrize("method", ["ijepa", "cjepa"])
def test_a_run_settles_its_blocks_and_momentum(method, tiny_run, monkeypatch):
    """By its steps: 3 epochs of 128 images, 32 at a time, played as 20,000 steps each."""
    script, settled = __import__(method), []
    settle = script.settle
    monkeypatch.setattr(script, "settle", lambda args, steps: settled.append(steps) or settle(args, steps * 20_000 // 4))
    config = json.loads((tiny_run(method, "--epochs", "3") / "config.json").read_text())
    assert settled == [12] and (config["num_targets"], config["ema"], config["ema_end"]) == pytest.approx((4, 1 - 125 / 60_000, 1))


def test_training_is_a_plain_loop(tiny_run, monkeypatch):
    """What a step saw is taken from the run; rates, decay, optimizer, EMA, and the log's means are computed here."""
    seen, step = [], ijepa.training_step
    monkeypatch.setattr(ijepa, "training_step", lambda model, x, args, generator: seen.append((x.clone(), generator.initial_seed())) or step(model, x, args, generator))
    flags = ["--epochs", "3", "--optimizer", "adamw", "--lr", "0.02", "--warmup-epochs", "1", "--weight-decay", "0.1", "--weight-decay-end", "0.9", "--ema", "0.5", "--ema-end", "1"]
    out = tiny_run("ijepa", *flags)
    args = ijepa.arguments(["--batch-size", "32", "--precision", "fp32", "--device", "cpu", "--num-targets", "2", "--predictor-width", "12", "--predictor-depth", "1", *flags])
    images, number = common.make_shapes(128, 32, 1)[0], lambda x: [image.numpy().tobytes() for image in x]
    orders = [[number(images).index(image) for x, _ in seen[4 * e:4 * e + 4] for image in number(x)] for e in range(3)]
    assert all(sorted(order) == list(range(128)) for order in orders) and len({*map(tuple, orders), tuple(range(128))}) == 4
    assert len({seed for _, seed in seen}) == 12

    torch.manual_seed(0)
    model, losses = ijepa.JEPA(args), []
    parts = [[p for p in model.parameters() if p.requires_grad and (p.ndim > 1) == matrix] for matrix in (True, False)]
    optimizer = torch.optim.AdamW([{"params": parts[0]}, {"params": parts[1], "weight_decay": 0.0}])
    cosine = lambda share: (1 + math.cos(math.pi * share)) / 2
    for t, (x, seed) in enumerate(seen):
        for group in optimizer.param_groups:
            group["lr"] = rate = 0.02 * 32 / 256 * ((t + 1) / 4 if t < 4 else 0.001 + 0.999 * cosine((t - 4) / 7))
        optimizer.param_groups[0]["weight_decay"] = 0.9 - 0.8 * cosine(t / 11)
        loss = step(model, x, args, torch.Generator().manual_seed(seed))[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        m = 0.5 + 0.5 * t / 11
        for target, context in zip(model.target_encoder.parameters(), model.context_encoder.parameters()):
            target.data = m * target.data + (1 - m) * context.data
        losses.append(loss.item())
        if t % 4 == 3:
            row = json.loads((out / "metrics.jsonl").read_text().splitlines()[t // 4])
            assert row["loss"] == pytest.approx(sum(losses[-4:]) / 4, rel=1e-4) and row["curve"]["loss"] == pytest.approx(losses[-4:], rel=1e-3)
            assert row["lr"] == pytest.approx(rate) and row["images_per_second"] == pytest.approx(128 / row["seconds"])
    trained = torch.load(out / "checkpoint.pt", weights_only=True)["model"]
    for name, value in model.state_dict().items():
        assert torch.allclose(trained[name], value, atol=2e-4), name


def test_a_resumed_run_equals_an_undisturbed_one(tiny_run):
    whole, stopped = tiny_run("ijepa", "--epochs", "3"), tiny_run("ijepa", "--epochs", "3", stop_after=2)
    tiny_run("ijepa", "--epochs", "3", "--resume", out=stopped)
    one, other = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (whole, stopped))
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    assert any(not torch.equal(one["model"][name], one["model"][name.replace("target", "context")]) for name in one["model"] if "target_" in name)
    rows, again = ([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (whole, stopped))
    for a, b in zip(rows, again, strict=True):
        assert {name: a[name] for name in ("loss", "lr", "effective_rank", "feature_std")} == {name: b[name] for name in ("loss", "lr", "effective_rank", "feature_std")}
    assert set(rows[-1]["knn"]) == {"target", "context"} and set(rows[-1]["effective_rank"]) == {"target", "prediction"}
    scores = json.loads((whole / "eval.json").read_text())
    assert set(scores["levels"]) == {"target", "context"}
    assert set(scores["baselines"]) == {"untrained target", "untrained context", "raw pixels"}


def test_schedules():
    """Weight decay over the real number of steps."""
    assert [common.weight_decay(step, 11, 0.04, 0.4) for step in (0, 5, 10)] == pytest.approx([0.04, 0.22, 0.4])
    assert [common.weight_decay(step, 2, 0.04, 0.4) for step in (0, 1)] == pytest.approx([0.04, 0.4])
    assert [common.weight_decay(0, 1, 0.1, 0.4), common.weight_decay(3, 11, 0.1, 0.1)] == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize("method", ["ijepa", "cjepa"])
def test_recipes(method):
    """The published values by --recipe paper (C-JEPA's are I-JEPA's); defaults by optimizer and dataset."""
    arguments = __import__(method).arguments
    args = arguments(["--recipe", "paper", "--epochs", "300"])
    assert (args.lr * 2048 / 256, args.weight_decay, args.weight_decay_end, args.ema, args.ema_end) == (1e-3, 0.04, 0.4, 0.996, 1)
    assert (args.epochs, args.batch_size, args.vit, args.patch_size, args.image_size) == (300, 2048, "base", 16, 224)
    assert (args.warmup_epochs, args.predictor_depth, args.predictor_width) == (15, 6, 384)
    assert args.target_scale == [0.15, 0.2] and args.context_scale == [0.85, 1.0] and (args.num_targets, args.crop_min, args.optimizer) == (4, 0.3, "adamw")
    small, adamw = arguments([]), arguments(["--optimizer", "adamw"])
    assert [arguments(["--recipe", "paper", "--vit", size]).predictor_depth for size in ("small", "large", "huge")] == [6, 12, 12]
    assert (small.crop_min, arguments(["--dataset", "cifar10"]).crop_min) == (0.8, 0.3)
    assert (small.optimizer, small.lr, adamw.lr) == ("muon", 0.032, 0.016)


@pytest.mark.parametrize("flags, steps, momentum", [
    ("", 12, (0.99, 0.995)), ("", 12_500, (0.99, 0.995)), ("", 12_501, (1 - 125 / 12_501, 1)), ("", 50_000, (0.9975, 1)), ("", 312_500, (0.9996, 1)),
    ("--ema-end 0.999", 50_000, (0.9975, 0.999)), ("--ema 0.9", 50_000, (0.9, 1)), ("--ema 0.9", 12_500, (0.9, 0.95)), ("--ema 0", 12, (0, 0.5)), ("--ema 1", 12, (1, 1)),
    ("--ema 0.5 --ema-end 0.5", 12, (0.5, 0.5)), ("--recipe paper", 375_000, (0.996, 1))])
def test_the_momentum_of_a_long_run_is_higher(flags, steps, momentum):
    args = ijepa.arguments(flags.split())
    ijepa.settle(args, steps)
    assert (args.ema, args.ema_end) == pytest.approx(momentum, abs=1e-9)


@pytest.mark.parametrize("method", ["ijepa", "cjepa"])
def test_a_long_run_has_the_papers_four_blocks(method):
    script = __import__(method)
    for flags, steps, M in (("", 12_500, 2), ("", 12_501, 4), ("--num-targets 3", 12_500, 3), ("--num-targets 3", 50_000, 3), ("--recipe paper", 12, 4)):
        args = script.arguments(flags.split())
        script.settle(args, steps)
        assert args.num_targets == M
    large = ["--target-scale", "0.3", "0.35"]                             # two of these leave a context, four do not
    script.settle(script.arguments(large), 12_500)
    with pytest.raises(common.Unusable, match="--num-targets: 4 blocks of --target-scale 0.35"):
        script.settle(script.arguments(large), 12_501)


def test_judging_takes_no_memory_but_the_features():
    """4,000 images through both encoders after 20 steps, in a process of its own: its peak grows by less than 100 MB.
    (Were the features kept batch by batch among what comes and goes, by 180, and with 60,000 images by gigabytes.)"""
    script = """
import resource, torch, common, ijepa
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
torch.set_num_threads(1)
common.keep_memory()
args = ijepa.arguments(["--precision", "fp32", "--device", "cpu", "--num-targets", "2"])
model, images = ijepa.JEPA(args), torch.zeros(4000, 3, 32, 32, dtype=torch.uint8)
for _ in range(20):
    ijepa.training_step(model, images[:32], args, torch.Generator().manual_seed(0))[0].backward()
before = peak()
common.extract(model, images, args)
print(peak() - before)
"""
    grown = subprocess.run([sys.executable, "-c", script], cwd=Path(ijepa.__file__).parent, capture_output=True, text=True, check=True).stdout
    assert float(grown) < (100 if sys.platform == "linux" else 100 * 2**10)     # macOS counts bytes
