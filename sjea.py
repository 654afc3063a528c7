r"""S-JEA: stacked joint-embedding architectures, VICReg on VICReg.

Manova, Durrant, Leontidis 2023, https://arxiv.org/abs/2305.11701

    python sjea.py                                    # ten shapes, made on the fly, minutes on a laptop
    python sjea.py --stacks 2 --dataset stl10         # two stacks are the default

A stack is an encoder f, a projector h and a VICReg loss. Stack 1's encoder reads what stack 0's puts out, the *map*
before pooling, for features that are more abstract. In z0_1 the 0 is the stack and the 1 the view; the code loops
over stacks, so its names keep only the view: z_1 is first z0_1, then z1_1. x is a batch of n = B images (section 3:
X, an image i); its two views are x_k = t_k(x), k = 1, 2. Every image draws a t_k of its own, from T_k (the paper's T):

    y0_k = f[0](x_k)   map [B, C, m, m]      z0_k = h[0](pool(y0_k))   embeddings [B, d]    loss0 = l(z0_1, z0_2)
    y1_k = f[1](y0_k)  map [B, C, m', m']    z1_k = h[1](pool(y1_k))                        loss1 = l(z1_1, z1_2)
    loss = loss0 + loss1, one step for both: loss0 trains f[0] and h[0], loss1 trains f[0], f[1] and h[1]
    ("stack-wise" in section 3.2: a loss per stack, all trained together; in 4.3, proposed: no gradient between stacks)

    here           t_k             x_k    f[0], h[0]          y0_k, z0_k        f[1], h[1]      y1_k, z1_k
    Algorithm 1    transform       x_k    f1, h1              y0_k, z0_k        f2, h2          y1_k, z1_k
    section 3      tau_k; t, t'    V_k    f_theta, h_theta    Y[0]_k, Z[0]_k    f_xi, h_xi      Y[1]_k, Z[1]_k

h is the "projector" or "expander", y the "representation" (pooled, when it is judged); Algorithm 1 leaves the
pooling before h to section 3.2. C is 8 x width (ResNet-18): 128 by default, 512 in the paper; at 32 px stack 1 reads
maps of m = 4 and makes maps of m' = 1. The loss l of a stack, as in the papers (in the code s is divided by d and
the sum of v halved, see below):

    S-JEA Eq. (1)  l(Z_1, Z_2) = lambda s(Z_1, Z_2) + mu [v(Z_1) + v(Z_2)] + nu [c(Z_1) + c(Z_2)]

    s(Z_1, Z_2) = 1/n  sum_i ||z_1i - z_2i||^2          the views agree                 VICReg Eq. (5)
    v(Z) = 1/d  sum_j max(0, 1 - sqrt(Var(z^j) + eps))  each dimension j is spread      VICReg Eq. (1), (2), gamma = 1
    c(Z) = 1/d  sum_{i != j} Cov(Z)_ij^2                no two dimensions say the same  VICReg Eq. (3), (4)

z_ki is image i's embedding, row i of Z_k, and z^j column j of Z; in Cov(Z)_ij, a covariance, i and j are dimensions.
The functions below have VICReg's Z, Z' for Z_1, Z_2, its C(Z) for Cov(Z) and its S for the root; in tensor shapes C
is channels, S the side of a view. Algorithm 1's i_loss is s, its v_loss and c_loss are the sums in brackets, upsilon
is nu. As in VICReg's and S-JEA's authors' code, s is divided by d as well and v_loss halved: section 3.2's
(25, 25, 1) are weights of those terms.

Slips in the paper: f2(y1_1) in Algorithm 1 should be f2(y0_1), f_theta(X2) in section 3.1 f_theta(V2); Table 2 calls
stacks 0 and 1 "1" and "2". The weighted sum of Figure 1 is --stack-weights, all 1 by default. Stack 1 always reads
the map y0, as in section 3.2; by section 4.3 it can read the projector's embeddings, as in the authors' code
(AlzbetaM/S-JEA). For all else in which paper, code and this script differ see the README, "Where papers and code
disagree".

The stem is 3x3, without max-pooling, for images up to 64 px and in every later stack; with the standard one stack 1
would have a single cell to read at 32 px. With --stacks 1 and the same flags the trained weights are those of
vicreg.py, on a CPU bit for bit. The defaults are made for minutes on two CPU cores: width 16, the optimizer Muon
(in common.py), nu = 8 and, on shapes, crops of 0.8 of the image or more. The nearest to Table 1 on CIFAR-10:

    python sjea.py --dataset cifar10 --width 64 --epochs 200 --projectors 10 --nu 1 \
        --optimizer adamw --batch-size 128 --lr 0.002 --weight-decay 0 --warmup-epochs 1

--projectors 10 is a projector on stack 0 and none on stack 1, the column of Table 3 in which Table 1's figures on
CIFAR-10 stand; Algorithm 1, and the default here, has both. AdamW stands for the authors' Adam, --lr 0.002 for its
0.001 (a rate is given for a batch of 256). The accuracy printed is that of a classifier fitted to features of
uncropped images; eval_linear.py CHECKPOINT --augmented 200 fits it to flips and new crops of 30 % and more (in the
authors' code 8 %).
"""
import torch
import torch.nn.functional as F
from torch import nn

import common
import eval_linear
from common import View, pool

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


def barlow_twins_loss(z_1, z_2, lambda_=0.005):                           # Barlow Twins' lambda
    """L_BT of Barlow Twins Eq. (1): another base to stack on, which S-JEA's paper does not try.

    Zbontar et al. 2021, https://arxiv.org/abs/2103.03230. z_1, z_2 and what is returned: as in vicreg_loss.
    """
    ## C correlates the dimensions of view 1 with those of view 2. Diagonal to 1: the views agree (a constant dimension
    ## has 0 there); the rest to 0: no two dimensions say the same.
    with torch.autocast(z_1.device.type, enabled=False):
        z_1, z_2 = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (z_1, z_2))
        z_1, z_2 = (F.batch_norm(z, None, None, training=True) for z in (z_1, z_2))
        C = z_1.T @ z_2 / len(z_1)                                        # Barlow Twins Eq. (2)  [d, d]
        on_diagonal = (1 - C.diagonal()).pow(2).sum()
        off_diagonal = C.pow(2).sum() - C.diagonal().pow(2).sum()
        loss = on_diagonal + lambda_ * off_diagonal                       # Barlow Twins Eq. (1)
    return loss, {"on_diagonal": on_diagonal, "off_diagonal": off_diagonal}


# ---- model ----------------------------------------------------------------------------------

def projector(in_features, widths):
    """h, VICReg's expander: linear layers, BN and ReLU after all but the last, which has no bias."""
    layers = []
    for width in widths[:-1]:
        layers += [nn.Linear(in_features, width), nn.BatchNorm1d(width), nn.ReLU(True)]
        in_features = width
    return nn.Sequential(*layers, nn.Linear(in_features, widths[-1], bias=False))


class SJEA(nn.Module):
    """Encoders f[0], f[1], ... and projectors h[0], h[1], ..., shared by both views."""

    def __init__(self, args):
        super().__init__()
        self.f, self.h, self.stop_gradient = nn.ModuleList(), nn.ModuleList(), args.stop_gradient
        channels, size = 3, args.image_size
        for stack in range(args.stacks):
            self.f.append(common.ResNet(args.arch, size, in_channels=channels, width=args.width))   # 3x3 stem to 64 px
            channels, size = self.f[-1].channels, self.f[-1].map_size     # of the map that the next stack reads
            with_projector = args.projectors[stack] == "1"                # S-JEA Table 3
            self.h.append(projector(channels, args.projector) if with_projector else nn.Identity())

    def maps(self, x_k):
        """View k [B, 3, S, S] -> [y0_k, y1_k, ...]: every stack's map before pooling [B, C, m, m]."""
        y, ys = x_k, []
        for f in self.f:
            ## Nothing is pooled or resized between stacks: stack 1 sees what f[0] found, and where in the image.
            ## With --stop-gradient, proposed in section 4.3, loss1 cannot train f[0], and stack 0 is plain VICReg.
            y = f(y.detach() if self.stop_gradient else y)                # S-JEA Algorithm 1: f1(x_k), then f2(y0_k)
            ys.append(y)
        return ys

    def forward(self, x_1, x_2):
        """Two views [B, 3, S, S] -> per stack their embeddings [(z0_1, z0_2), (z1_1, z1_2), ...].

        Each is [B, d], without a projector [B, C].
        """
        ys_1, ys_2 = self.maps(x_1), self.maps(x_2)
        # S-JEA Algorithm 1: z0_k = h1(y0_k), z1_k = h2(y1_k)
        return [(h(pool(y_1)), h(pool(y_2))) for h, y_1, y_2 in zip(self.h, ys_1, ys_2)]

    def representations(self, x):
        """{level: [B, C]}: what common.train and eval_linear judge, the pooled maps."""
        return {str(stack): pool(y) for stack, y in enumerate(self.maps(x))}


# ---- one training step ----------------------------------------------------------------------

def transformations(args):
    """(T_1, T_2): view k of an image is t_k(x), t_k a draw from T_k. S-JEA's or VICReg's code's, or crops and flips."""
    # A View's defaults: p_flip 0.5, p_jitter 0.8, jitter (0.4, 0.4, 0.2, 0.1), p_grey 0.2, no blur or solarizing
    crop = (args.crop_min, 1.0)
    blur = float(args.image_size > 64)                                    # up to 64 px VICReg's blur is left out
    if args.augmentation == "sjea":
        return (View(crop, jitter=(0.4, 0.4, 0.4, 0.1)),) * 2             # one for both; each view is a draw of its own
    if args.augmentation == "crop":
        return (View(crop, p_jitter=0.0, p_grey=0.0),) * 2
    ## In VICReg's authors' code the two views differ: the first is always blurred, the second rarely, and only the
    ## second is ever solarized. (VICReg's paper has both alike: blurred with p = 0.5, solarized with p = 0.1.)
    return View(crop, p_blur=1.0 * blur), View(crop, p_blur=0.1 * blur, p_solarize=0.2)


def training_step(model, x, args, generator):
    """One batch x [B, 3, H, W] uint8 -> (loss, terms, embeddings). The loop and the optimizer are in common.train."""
    T_1, T_2 = transformations(args)
    # S-JEA Algorithm 1: x_1, x_2 = transform(x)  [B, 3, S, S], S = args.image_size; normalised
    x_1 = common.augment(x, T_1, args.image_size, generator)
    x_2 = common.augment(x, T_2, args.image_size, generator)
    loss, terms, embeddings = 0, {}, {}
    for stack, (z_1, z_2) in enumerate(model(x_1, x_2)):
        z_1, z_2 = common.gather(z_1), common.gather(z_2)                 # [n, d]; under torchrun n = B x processes
        if args.base == "vicreg":
            loss_stack, terms_stack = vicreg_loss(z_1, z_2, args.lambda_, args.mu, args.nu)   # S-JEA Eq. (1)
        else:                                                             # not in the paper
            loss_stack, terms_stack = barlow_twins_loss(z_1, z_2)
        loss = loss + args.stack_weights[stack] * loss_stack              # S-JEA Algorithm 1: loss0 + loss1
        terms |= {f"{name}_{stack}": term for name, term in terms_stack.items()}    # covariance_0 and _1: Figure 4
        embeddings[str(stack)] = z_1                                      # for the log's effective_rank
    return loss, terms, embeddings


# ---- arguments ------------------------------------------------------------------------------

def arguments(argv=None):
    parser = common.Parser(__doc__)
    add, number = parser.add_argument, common.number
    add("--arch", choices=("resnet18", "resnet50"), default="resnet18", help="the encoder f")
    add("--projector", type=common.widths, default="256-256-256", help="widths of h's layers; the last is d (which stacks have an h: --projectors)")
    add("--stacks", type=number(int, 1, 16), default=2, help="encoders on top of each other; 1 is VICReg")
    add("--projectors", help="a digit per stack, 1 with a projector, 0 without, as in Table 3; 10 (one, zero: on stack 0 alone) is Table 1 (default: all 1)")
    add("--stack-weights", type=number(float, 0), nargs="+", help="weight of each stack's loss (default: all 1)")
    add("--base", choices=("vicreg", "barlow-twins"), default="vicreg", help="whose loss every stack has; barlow-twins does not use lambda, mu, nu")
    add("--stop-gradient", action="store_true", help="between stacks: each learns from its own loss alone (with --stacks 1 there is nothing to stop)")
    add("--augmentation", choices=("vicreg", "sjea", "crop"), default="sjea", help="whose views; crop: only crops and flips; vicreg: with blur above 64 px")
    add("--crop-min", type=number(float, 0.01, 1), help="smallest crop, as a share of the image (default: 0.8 on shapes; else 0.3, of vicreg 0.08)")
    add("--lambda", dest="lambda_", type=number(float, 0), default=25.0, help="lambda: weight of the invariance term")
    add("--mu", type=number(float, 0), default=25.0, help="mu: weight of the variance term")
    add("--nu", type=number(float, 0), default=8.0, help="nu: weight of the covariance term (the papers: 1; 8 was chosen with AdamW, at a small d)")
    add("--width", type=number(int, 8, 1024), default=16, help="base channels of the ResNet; the standard one has 64")
    add("--optimizer", choices=("muon", "adamw", "lars"), default="muon", help="muon, adamw (default --lr: 0.03) or lars, VICReg's (0.3)")
    common.add_common_arguments(parser, method="sjea", epochs=2, batch_size=64, lr=0.06, weight_decay=1e-4, warmup_epochs=0.5, eval_every=1)
    # --optimizer changes the default of --lr (lars that of --weight-decay, too), so it is looked up in argv first.
    own = {"adamw": dict(lr=0.03), "lars": dict(lr=0.3, weight_decay=1e-6)}
    parser.set_defaults(**own.get(parser.given(argv).optimizer, {}))
    args = common.parse(parser, argv)
    args.crop_min = args.crop_min or (0.8 if args.dataset == "shapes" else 0.08 if args.augmentation == "vicreg" else 0.3)
    args.projectors = args.projectors or "1" * args.stacks
    args.stack_weights = args.stack_weights or [1.0] * args.stacks
    if len(args.projectors) != args.stacks or set(args.projectors) - set("01"):
        raise common.Unusable(f"argument --projectors: {args.projectors} is not one 0 or 1 for each of {args.stacks} stacks")
    if len(args.stack_weights) != args.stacks:
        raise common.Unusable(f"argument --stack-weights: {len(args.stack_weights)} weights for {args.stacks} stacks")
    return args


# ---- main -----------------------------------------------------------------------------------

def main(argv=None):
    args = arguments(argv)
    data = common.load_dataset(args)
    torch.manual_seed(args.seed)
    model = SJEA(args)
    for stack, (f, h) in enumerate(zip(model.f, model.h)):                # S-JEA Table 2
        f_million, h_million = common.count_parameters(f) / 1e6, common.count_parameters(h) / 1e6
        print(f"stack {stack}: {f_million + h_million:.2f} M parameters "
              f"(encoder {f_million:.2f}, projector {h_million:.2f})")
    print(f"all stacks: {common.count_parameters(model) / 1e6:.2f} M parameters")
    features = common.train(args, model, training_step, data)             # the loop, "for x in dataloader": backward, step, log
    eval_linear.main(["--device", args.device, "--", f"{args.out}/checkpoint.pt"], data, features)


if __name__ == "__main__":
    common.command_line(main)
