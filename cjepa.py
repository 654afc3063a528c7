"""C-JEPA: I-JEPA with VICReg's terms on the means of its predictions.

Mo, Tong 2024, https://arxiv.org/abs/2410.19560

    python cjepa.py                                   # ten shapes, made on the fly, minutes on a laptop
    python cjepa.py --ema 0 --beta-vicreg 0 --out runs/neither      # neither EMA nor VICReg

An image y is cut into N patches. A target encoder sees all of them, a context encoder only x: those of one large
square that lie in none of M hidden blocks, the targets. From the features of x, at the indices B_x, a predictor
computes what the target encoder makes of the blocks, at B_i:

    s_y = target encoder(y)                       features of all patches [B, N, D], layer-normed, no gradient
    s_x = context encoder(y at B_x)               features of the context's patches [B, Nc, D]
    s_hat(i) = predictor(s_x, where B_i lies)     features of one block's Nt patches [B, Nt, D], each i by itself
    L = 1/M  sum_i  sum_{j in B_i} ||s_hat_j - s_yj||_2^2      the loss; the inner sum is the paper's D (here smooth-L1)
    target encoder <- m target encoder + (1 - m) context encoder    the EMA, m from 0.996 to 1 (here: see settle)

In tensor shapes B is the number of images, D that of features (of pixels: 3 p p, p the side of a patch); B_x and B_i
are sets of indices. Up to here this is ijepa.py's, whose docstring says how it differs from I-JEPA's paper. C-JEPA's
loss adds to that L:

    L_C-JEPA = L + beta_vicreg (beta_sim s(Z, Z') + beta_std [v(Z) + v(Z')] + beta_cov [c(Z) + c(Z')])

with beta_vicreg = 0.001 and (beta_sim, beta_std, beta_cov) = (25, 25, 1). Z and Z' [n, d] are means over patches, n
images by d = D features. s, v and c are VICReg's (https://arxiv.org/abs/2105.04906) in its authors' convention: s
is divided by d as well, v(Z) + v(Z') halved. No projector lies between them and the terms. v and c are to guard
against collapse beside the EMA, s to get the mean of the patches right ("contrastive" is the title's word: there are
no negative pairs). Without an EMA and with AdamW a beta_vicreg of 0.001 does not keep k-NN above an untrained
network's on CIFAR-10, 0.1 does (README, question 16).

This script was written from a review of the paper (where it describes a figure of I-JEPA, it swaps the two
encoders); it has neither this formula nor the coefficients' values, which are the paper's as others quote them, and
does not say what the "augmented views" are whose means are Z and Z'. Our choice (others: README): an image has one
crop; its views are the M predictions, one per block, and the terms are averaged over all pairs of blocks, so that s
draws the means of different blocks together. By a reimplementer's account the paper's Algorithm 1 does so, too, but
through a projection. --views target: mean prediction, mean target. In the code Z and Z' are z_i and z_j, two of the M
slices of z [n, M, D].
"""
import copy
import itertools

import torch
import torch.nn.functional as F
from torch import nn

import common
import eval_linear
from common import View, take

# ---- loss terms -----------------------------------------------------------------------------

def invariance(z_1, z_2):
    """s(Z, Z') of VICReg Eq. (5), divided by d as in its authors' code: the mean squared difference.

    z_1, z_2: [n, d] embeddings of the two views. Returns a scalar >= 0.
    """
    ## Alone, with the weights of the other two at 0, it is minimised by sending every image to one point: collapse.
    return F.mse_loss(z_1, z_2)                                           # VICReg Eq. (5), over n * d


def variance(z, gamma=1.0, eps=1e-4):
    """v(Z) of VICReg Eq. (1): how far the dimensions' standard deviations fall short of gamma, on average.

    z: [n, d] embeddings of one view. Returns a scalar in [0, gamma); 0 when every dimension's spread is gamma or more.
    """
    ## A hinge: it pushes a dimension's spread up to gamma and no further. The gradient of Var fades as the spread
    ## shrinks; that of its square root does so only below a spread of sqrt(eps) = 0.01.
    S = torch.sqrt(z.var(dim=0) + eps)                                    # VICReg Eq. (2), Var over n - 1  [d]
    return F.relu(gamma - S).mean()                                       # VICReg Eq. (1)


def covariance(z):
    """c(Z) of VICReg Eq. (4): squared off-diagonal covariances, summed and divided by d.

    z: [n, d] embeddings of one view. Returns a scalar >= 0; 0, but for rounding, when no two dimensions are correlated.
    """
    ## Variance alone keeps each dimension alive but lets all of them say the same thing. This term spreads information
    ## over dimensions: with vicreg.py --nu 0 all become copies of one (effective_rank in the log: 1.0).
    n, d = z.shape
    z = (z - z.mean(dim=0)) / (n - 1) ** 0.5                              # z^T z is C(Z) [d, d], VICReg Eq. (3)
    # z^T z and z z^T [n, n] have equal sums of squared entries, tr(z^T z z^T z), so the smaller is computed
    squares = (z.T @ z if d < n else z @ z.T).pow(2).sum()                # sum_ij C(Z)_ij^2
    variances = z.pow(2).sum(dim=0)                                       # C(Z)_jj  [d]
    return (squares - variances.pow(2).sum()).clamp(min=0) / d            # VICReg Eq. (4), kept from rounding below 0


def vicreg_loss(z_1, z_2, lambda_, mu, nu):
    """l(Z, Z') of VICReg Eq. (6), S-JEA Eq. (1), as in both authors' code: s over n * d, v(Z) + v(Z') halved.

    z_1, z_2: [n, d], any float dtype; half precision is computed in float32.
    Returns (loss, {name: unweighted term}), all scalars.
    """
    with torch.autocast(z_1.device.type, enabled=False):                  # bf16 would round the covariance
        z_1, z_2 = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (z_1, z_2))
        s = invariance(z_1, z_2)
        ## The mean, not the papers' sum: in VICReg's authors' code mu = 25 weighs the mean.
        v = (variance(z_1) + variance(z_2)) / 2
        c = covariance(z_1) + covariance(z_2)
        loss = lambda_ * s + mu * v + nu * c                              # VICReg Eq. (6)
    return loss, {"invariance": s, "variance": v, "covariance": c}


def prediction_loss(s_hat, s_y, kind="smooth_l1"):
    """L of I-JEPA: predictions s_hat and target features s_y, both [B, M, Nt, D], -> a scalar >= 0.

    "l2": the paper's, summed over a block's patches and features, averaged over blocks and images.
    "smooth_l1": the authors' code's, averaged over everything. Half precision is computed in float32.
    """
    s_hat, s_y = (s.to(torch.promote_types(s.dtype, torch.float32)) for s in (s_hat, s_y))
    if kind == "l2":
        return (s_hat - s_y).pow(2).sum(dim=(2, 3)).mean()                # I-JEPA loss, with --loss l2
    ## Quadratic for errors below 1 and linear above. A low loss does not mean good features, only easily predicted
    ## ones: watch k-NN instead, and effective_rank, which falls to 1 in a collapse.
    return F.smooth_l1_loss(s_hat, s_y)                                   # the default


# ---- masks ----------------------------------------------------------------------------------

ASPECT = (0.75, 1.5)                           # of a target block, height by width


def block_sizes(grid_size, scale, aspect):
    """[(h, w), ...]: blocks with h w / grid_size^2 in scale, h / w in aspect, and no full side where others fit."""
    sides = range(1, grid_size + 1)
    sizes = [(h, w) for h in sides for w in sides
             if scale[0] <= h * w / grid_size**2 <= scale[1] and aspect[0] <= h / w <= aspect[1]]
    return [size for size in sizes if max(size) < grid_size] or sizes     # the authors' code has no full side at all


def place_blocks(batch_size, count, sizes, grid_size, generator):
    """One of `sizes` for the whole batch, `count` places per image: row-major patch indices [B, count, h w]."""
    h, w = sizes[torch.randint(len(sizes), (), generator=generator)]
    top = torch.randint(grid_size - h + 1, (batch_size, count, 1, 1), generator=generator)
    left = torch.randint(grid_size - w + 1, (batch_size, count, 1, 1), generator=generator)
    rows, columns = top + torch.arange(h)[:, None], left + torch.arange(w)        # [B, count, h, 1], [B, count, 1, w]
    return (rows * grid_size + columns).flatten(2)                                          # [B, count, h w]


def first_true(mask):
    """mask [B, N] bool -> indices [B, Nc]: per image the first Nc that are True, Nc the smallest count in the batch."""
    ## A tensor needs one length. The first patches stay, row by row, as in the authors' code, so with four blocks the
    ## context encoder seldom sees the lower rows. On 14 x 14 patches four blocks leave 0.42 of an image on average, and
    ## 0.26 after the cut in a batch of 128 (the paper: 0.25). Larger batches are cut more; the authors' code cuts per GPU.
    return mask.argsort(dim=1, descending=True, stable=True)[:, :mask.sum(1).min()]


def multiblock_masks(batch_size, grid_size, generator=None, M=4, target_scale=(0.15, 0.2), context_scale=(0.85, 1.0)):
    """The paper's masks: (context [B, Nc], targets [B, M, Nt]), M blocks and what they leave of one large square.

    All blocks of a batch share one size, all squares another; places differ. Indices count patches row by row.
    """
    sizes, squares = block_sizes(grid_size, target_scale, ASPECT), block_sizes(grid_size, context_scale, (1, 1))
    targets = place_blocks(batch_size, M, sizes, grid_size, generator)    # I-JEPA masks: B_i  [B, M, Nt]
    square = place_blocks(batch_size, 1, squares, grid_size, generator)[:, 0]                       # [B, side^2]
    context = torch.zeros(batch_size, grid_size**2, dtype=torch.bool).scatter_(1, square, True)     # mask [B, N]
    ## A context patch inside a target would give the answer away. (On 8 x 8 patches the square is the whole image:
    ## 7 x 7 are less than 0.85.)
    context.scatter_(1, targets.flatten(1), False)
    return first_true(context), targets                                   # I-JEPA masks: B_x


def rasterized_masks(batch_size, grid_size, generator=None):
    """One quadrant per image, at random, is context [B, N / 4], the others targets [B, 3, N / 4]. grid_size is even."""
    half = grid_size // 2
    quadrants = torch.arange(grid_size**2).view(2, half, 2, half).transpose(1, 2).reshape(4, -1)    # [4, N / 4]
    order = torch.rand(batch_size, 4, generator=generator).argsort(1)
    return quadrants[order[:, 0]], quadrants[order[:, 1:]]


def block_masks(batch_size, grid_size, generator=None):
    """One block, 0.55 to 0.65 of the image (paper: 0.6), is the target [B, 1, Nt], the rest the context [B, N - Nt]."""
    return multiblock_masks(batch_size, grid_size, generator, M=1, target_scale=(0.55, 0.65), context_scale=(1.0, 1.0))


def random_masks(batch_size, grid_size, generator=None):
    """0.6 of the patches, anywhere, are the target [B, 1, Nt], the rest is the context [B, N - Nt]."""
    order, count = torch.rand(batch_size, grid_size**2, generator=generator).argsort(1), round(0.6 * grid_size**2)
    return order[:, count:], order[:, None, :count]


def draw_masks(args, batch_size, generator):
    """(context [B, Nc], targets [B, M, Nt]) by args.masking, on the CPU, which must know their shapes."""
    grid_size = args.image_size // args.patch_size
    if args.masking == "multiblock":
        return multiblock_masks(batch_size, grid_size, generator, args.num_targets, args.target_scale, args.context_scale)
    masks = {"rasterized": rasterized_masks, "block": block_masks, "random": random_masks}[args.masking]
    return masks(batch_size, grid_size, generator)


# ---- model ----------------------------------------------------------------------------------

class Predictor(nn.Module):
    """A narrow ViT of width d: predicts a block's features from the context's features and the block's positions."""

    def __init__(self, args, D, out_features):
        super().__init__()
        d, heads = args.predictor_width, common.VITS[args.vit][2]         # VITS: width, depth, heads
        self.embed, self.mask_token = nn.Linear(D, d), nn.Parameter(torch.empty(d).normal_(std=0.02))
        self.register_buffer("position", common.positions(args.image_size // args.patch_size, d))
        self.blocks = nn.Sequential(*(common.Block(d, heads) for _ in range(args.predictor_depth)))
        self.norm, self.project = nn.LayerNorm(d, eps=1e-6), nn.Linear(d, out_features)
        common.initialise(self)

    def forward(self, s_x, context, targets):
        """s_x [B, Nc, D], context [B, Nc], targets [B, M, Nt] -> predictions [B, M, Nt, out_features]."""
        B, M, Nt = targets.shape
        known = self.embed(s_x) + self.position[context]                  # s_x with its places  [B, Nc, d]
        asked = self.mask_token + self.position[targets]                  # mask tokens with theirs  [B, M, Nt, d]
        ## Once per target block: in one common sequence the target blocks would see each other.
        tokens = torch.cat([known[:, None].expand(-1, M, -1, -1), asked], dim=2)            # [B, M, Nc + Nt, d]
        tokens = self.blocks[:-1](tokens.flatten(0, 1))                                     # [B M, Nc + Nt, d]
        predicted = self.blocks[-1](tokens, last=Nt)                      # only the asked tokens' outputs  [B M, Nt, d]
        return self.project(self.norm(predicted)).unflatten(0, (B, M))    # I-JEPA predictor  [B, M, Nt, out_features]


class JEPA(nn.Module):
    """The context encoder, the target encoder (its moving average) and the predictor."""

    def __init__(self, args):
        super().__init__()
        self.pixels, self.patch_size = args.target == "pixels", args.patch_size
        self.context_encoder = common.ViT(args.vit, args.image_size, args.patch_size)
        self.target_encoder = copy.deepcopy(self.context_encoder).requires_grad_(False)
        D = self.context_encoder.width
        self.predictor = Predictor(args, D, 3 * args.patch_size**2 if self.pixels else D)

    def forward(self, y, context, targets):
        """Images y [B, 3, H, W], context B_x [B, Nc], targets B_i [B, M, Nt] -> s_hat [B, M, Nt, D], s_y [B, N, D]."""
        with torch.no_grad():
            s_y = common.patches(y, self.patch_size) if self.pixels else self.target_encoder(y)
            ## The encoder's own last norm has a learned scale, which could shrink the loss; this one has none.
            s_y = F.layer_norm(s_y, s_y.shape[-1:])                       # [B, N, D]; pixels: [B, N, 3 p p]
        s_x = self.context_encoder(y, context)                            # of x: y's patches at B_x  [B, Nc, D]
        return self.predictor(s_x, context, targets), s_y

    def representations(self, y):
        """{level: [B, D]}: what common.train and eval_linear judge, the mean of each encoder's patch features."""
        return {"target": self.target_encoder(y).mean(1), "context": self.context_encoder(y).mean(1)}


# ---- one training step ----------------------------------------------------------------------

def training_step(model, images, args, generator):
    """One batch of images [B, 3, H, W] uint8 -> (loss, terms, features whose rank common.train logs)."""
    crop = View((args.crop_min, 1.0), p_flip=0.0, p_jitter=0.0, p_grey=0.0)
    y = common.augment(images, crop, args.image_size, generator)          # [B, 3, S, S], S = args.image_size
    cpu_generator = torch.Generator().manual_seed(generator.initial_seed())       # this step's seed, on the CPU
    masks = draw_masks(args, len(images) * common.process()[1], cpu_generator)    # of all processes: one Nc for all
    # non_blocking: waits for no earlier step; not on MPS, where such a copy may read freed memory (pytorch#189690)
    context, targets = (common.share(i).to(y.device, non_blocking=y.is_cuda) for i in masks)        # [B, Nc], [B, M, Nt]
    s_hat, s_y = model(y, context, targets)                               # [B, M, Nt, D], [B, N, D]
    loss = prediction_loss(s_hat, take(s_y, targets), args.loss)          # take: the s_y(i) [B, M, Nt, D]
    z = common.gather(s_hat.float().mean(2))                              # block means [n, M, D], n = B x processes
    terms = {"prediction": loss}
    watched = {"pixels" if args.target == "pixels" else "target": common.gather(s_y.mean(1)), "prediction": z.mean(1)}
    if args.views == "blocks":
        pairs = list(itertools.combinations(z.unbind(1), 2))              # (Z, Z'), each [n, D]
    else:
        pairs = [(z.mean(1), common.gather(take(s_y, targets).mean((1, 2))))]  # no gradient through Z'
    ## With --views blocks the M predictions of an image are its views, which no one had to design. s makes their means
    ## agree, v keeps those of different images apart, c keeps dimensions from saying the same.
    losses, parts = zip(*(vicreg_loss(z_i, z_j, args.beta_sim, args.beta_std, args.beta_cov) for z_i, z_j in pairs))
    loss = loss + args.beta_vicreg * sum(losses) / len(pairs)             # C-JEPA loss
    terms |= {name: sum(part[name] for part in parts) / len(pairs) for name in parts[0]}
    return loss, terms, watched


@torch.no_grad()
def update_target(model, args, progress):
    """The EMA, after each step: m goes linearly from args.ema at progress 0 to args.ema_end at 1; an m of 0 stays 0."""
    ## With m = 0 the target is the context encoder itself, without its gradient: prediction and target may drift
    ## towards one constant together; on CIFAR-10 with AdamW they nearly do (README, question 15). m = 0.996 averages
    ## over some 250 steps, and was chosen for runs of some 375,000. An m that ends at 1, as published, slows the target
    ## down too soon in a run of a few thousand steps.
    m = args.ema + (args.ema_end - args.ema) * progress if args.ema != 0 else 0.0
    for target, context in zip(model.target_encoder.parameters(), model.context_encoder.parameters()):
        target.lerp_(context, 1 - m)                                      # I-JEPA EMA


# ---- arguments ------------------------------------------------------------------------------

# I-JEPA's, ViT-B/16. --lr is for a batch of 256: the peak is 1.25e-4 x 2048 / 256 = 1e-3 (default: 32e-3 / 8 = 4e-3).
PAPER = dict(vit="base", patch_size=16, image_size=224, predictor_depth=6, num_targets=4, crop_min=0.3,
             batch_size=2048, epochs=600, warmup_epochs=15, optimizer="adamw", lr=1.25e-4,
             weight_decay=0.04, weight_decay_end=0.4, ema=0.996, ema_end=1.0)


def arguments(argv=None):
    parser = common.Parser(__doc__)
    add, number = parser.add_argument, common.number
    add("--recipe", choices=("small", "paper"), default="small", help="which defaults: ours for small images, or I-JEPA's published ones (PAPER in this script)")
    add("--vit", choices=common.VITS, default="micro", help="size of both encoders")
    add("--patch-size", type=number(int, 1), default=4, help="side of a patch in pixels")
    add("--predictor-width", type=number(int, 4), help="features of the predictor's tokens (default: half the encoder's, at most 384)")
    add("--predictor-depth", type=number(int, 1, 64), default=3, help="the predictor's blocks (--recipe paper: 6; large, huge: 12)")
    add("--masking", choices=("multiblock", "rasterized", "block", "random"), default="multiblock", help="which patches are context, which targets")
    add("--num-targets", type=number(int, 1), help="M: target blocks of multiblock (default: 2; 4, the paper's, in runs of over 12,500 steps)")
    scale = dict(type=number(float, 0, 1), nargs=2, metavar=("LOW", "HIGH"))
    add("--target-scale", **scale, default=[0.15, 0.2], help="of multiblock: share of the image in a target block")
    add("--context-scale", **scale, default=[0.85, 1.0], help="of multiblock: share of the image in the context square")
    add("--target", choices=("features", "pixels"), default="features", help="what is predicted: s_y, or the patches, normalised")
    add("--loss", choices=("smooth_l1", "l2"), default="smooth_l1", help="the distance D: the authors' code's, or the paper's")
    add("--ema", type=number(float, 0, 1), help="m: the target's momentum at the start (default: 0.99; 1 - 125 / steps in runs of over 12,500); 0: no EMA, the target is the context encoder")
    add("--ema-end", type=number(float, 0, 1), help="m at the end (default: halfway from --ema to 1; 1, as in the paper, in runs of over 12,500 steps)")
    add("--beta-vicreg", type=number(float, 0), default=0.001, help="weight of the VICReg terms together; 0 is I-JEPA; counts far less with --loss l2")
    add("--beta-sim", type=number(float, 0), default=25.0, help="weight of s, the invariance term, among the three")
    add("--beta-std", type=number(float, 0), default=25.0, help="weight of v, the variance term")
    add("--beta-cov", type=number(float, 0), default=1.0, help="weight of c, the covariance term")
    add("--views", choices=("blocks", "target"), default="blocks", help="Z, Z': mean predictions of two blocks; or of all, and the mean target")
    add("--optimizer", choices=("muon", "adamw"), default="muon", help="muon, or the paper's adamw (default --lr: 0.016; PAPER: 1.25e-4)")
    add("--crop-min", type=number(float, 0.01, 1), help="smallest crop, as a share of the image (default: 0.3; on shapes 0.8, with --recipe paper 0.3)")
    add("--weight-decay-end", type=number(float, 0), help="weight decay at the last step (default: constant; --recipe paper: 0.4)")
    common.add_common_arguments(parser, method="cjepa", epochs=3, batch_size=32, lr=32e-3, weight_decay=0.04, warmup_epochs=0.5, eval_every=3)
    given = parser.given(argv)                                           # three flags change the defaults of others
    if given.optimizer == "adamw":
        parser.set_defaults(lr=16e-3)
    if given.recipe == "paper":
        parser.set_defaults(**PAPER)
        if given.vit in ("large", "huge"):
            parser.set_defaults(predictor_depth=12)
    args = common.parse(parser, argv)
    args.predictor_width = args.predictor_width or min(384, common.VITS[args.vit][0] // 2)
    args.crop_min = args.crop_min or (0.8 if args.dataset == "shapes" else 0.3)
    args.weight_decay_end = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end
    check_grid(args)
    if args.views == "blocks" and (args.masking in ("block", "random") or args.masking == "multiblock" and args.num_targets == 1):
        raise common.Unusable("argument --views: blocks needs two target blocks or more; --views target works with one")
    return args


def check_grid(args):
    """Raises Unusable where the sizes of image, patches, predictor and masks do not fit together."""
    size, p, d = args.image_size, args.patch_size, args.predictor_width
    if size % p:
        raise common.Unusable(f"argument --patch-size: {p} does not divide the image size {size}")
    (width, _, heads), grid_size = common.VITS[args.vit], size // p
    grid = f"grid of {grid_size} x {grid_size} patches"
    if d % heads or d % 4 or d > width:
        raise common.Unusable(f"argument --predictor-width: {d} is not a multiple of 4 and of the {heads} heads, "
                              f"at most {width}, the encoder's width")
    if grid_size < 2 or args.masking == "rasterized" and grid_size % 2:
        raise common.Unusable(f"argument --masking: {args.masking} finds no context and targets on a {grid}")
    wanted = {"multiblock": {"--target-scale": (args.target_scale, ASPECT),
                             "--context-scale": (args.context_scale, (1, 1))},
              "block": {"--masking block": ((0.55, 0.65), ASPECT)}}.get(args.masking, {})
    area = {flag: [h * w for h, w in block_sizes(grid_size, scale, aspect)] for flag, (scale, aspect) in wanted.items()}
    for flag, (scale, aspect) in wanted.items():
        if not area[flag]:
            raise common.Unusable(f"argument {flag}: a {grid} has no block with {scale[0]} to {scale[1]} of them "
                                  f"and an aspect ratio of {aspect[0]} to {aspect[1]}; use a smaller --patch-size "
                                  "or a wider range")
    M = args.num_targets or 2                                            # `settle` may make it 4, and checks again
    if args.masking == "multiblock" and M * max(area["--target-scale"]) >= min(area["--context-scale"]):
        raise common.Unusable(f"argument --num-targets: {M} blocks of --target-scale {args.target_scale[1]} "
                              "can cover the whole context")


def settle(args, steps):
    """M, and m at both ends of a run of `steps`, where no flag sets them. Raises Unusable where they do not fit."""
    ## A run of minutes learns most from an easy task, two blocks, and a fast target, which averages the context encoder
    ## over some 1 / (1 - m) = 100 to 200 steps. In a long run such features get worse again, from the 12,000th step or
    ## so on, while the loss falls (results/README.md). So above 12,500 steps M is the paper's, the target averages at
    ## first over a 125th of the run, and m ends at 1, as published.
    short = steps <= 12_500
    args.num_targets = args.num_targets or (2 if short else 4)
    check_grid(args)
    if args.ema is None:
        args.ema = 1 - 125 / max(12_500, steps)
    if args.ema_end is None:
        args.ema_end = (1 + args.ema) / 2 if short else 1.0
    if args.ema_end < args.ema:
        raise common.Unusable(f"argument --ema-end: {args.ema_end} is less than --ema, {args.ema}; m must not fall")


# ---- main -----------------------------------------------------------------------------------

def main(argv=None):
    args = arguments(argv)
    data = common.load_dataset(args)
    settle(args, args.epochs * (len(data.images) // args.batch_size))
    torch.manual_seed(args.seed)
    model = JEPA(args)
    features = common.train(args, model, training_step, data, update_target)     # the loop: backward, step, EMA, log
    eval_linear.main(["--device", args.device, "--", f"{args.out}/checkpoint.pt"], data, features)


if __name__ == "__main__":
    common.command_line(main)
