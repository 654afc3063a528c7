"""VICReg: Variance-Invariance-Covariance Regularization for self-supervised learning.

Bardes, Ponce, LeCun 2021, https://arxiv.org/abs/2105.04906

    python vicreg.py                                  # ten shapes, made on the fly, minutes on a laptop
    python vicreg.py --dataset cifar10 --epochs 200 --width 64

Two random views of every image go through one encoder and one projector:

    Y = pool(f(X)) representations [n, C], which are kept;  Z = h(Y) embeddings [n, d], which the loss compares

    here     x_1, x_2    f          y_1, y_2 (maps, not yet pooled)    h                        z_1, z_2
    paper    x, x'       f_theta    y, y'; of n images Y, Y'           h_phi, the "expander"    z, z'; Z, Z'

Below, z_i is the embedding of image i, a vector of d (row i of Z), and z^j, column j of Z, one dimension of all n
images; in C(Z)_ij, a covariance, i and j are dimensions. S(x, eps) is the standard deviation of n numbers x. In
tensor shapes C is the number of channels, S the side of a view.

    Eq. (1)  v(Z)     = 1/d  sum_j max(0, gamma - S(z^j, eps))        every dimension keeps its spread
    Eq. (2)  S(x,eps) = sqrt(Var(x) + eps)                            gamma = 1, eps = 1e-4
    Eq. (3)  C(Z)     = 1/(n-1)  sum_i (z_i - mean)(z_i - mean)^T
    Eq. (4)  c(Z)     = 1/d  sum_{i != j} C(Z)_ij^2                   no two dimensions say the same
    Eq. (5)  s(Z,Z')  = 1/n  sum_i ||z_i - z'_i||^2                   the two views agree
    Eq. (6)  l(Z,Z')  = lambda s(Z,Z') + mu [v(Z) + v(Z')] + nu [c(Z) + c(Z')]

Two things are as in the authors' code (facebookresearch/vicreg), not as in Eq. (5) and (6): s is divided by d as well
(so it is in the paper's Algorithm 1), and v(Z) + v(Z') is halved (not so in Algorithm 1). The published coefficients,
(25, 25, 1), are the defaults of that code. The default settings suit minutes on two CPU cores: width 16 (so C = 128
instead of ResNet-18's 512), d = 256 instead of 8192 (12.7 points worse in the paper's Table 12, on ImageNet), the
optimizer Muon, S-JEA's augmentation (on shapes with larger crops), and nu = 8, chosen with AdamW (results/README.md).
The published ones are flags.
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


# ---- model ----------------------------------------------------------------------------------

def projector(in_features, widths):
    """h, VICReg's expander: linear layers, BN and ReLU after all but the last, which has no bias."""
    layers = []
    for width in widths[:-1]:
        layers += [nn.Linear(in_features, width), nn.BatchNorm1d(width), nn.ReLU(True)]
        in_features = width
    return nn.Sequential(*layers, nn.Linear(in_features, widths[-1], bias=False))


class VICReg(nn.Module):
    """Encoder f and projector h, shared by both views."""

    def __init__(self, args):
        super().__init__()
        self.f = common.ResNet(args.arch, args.image_size, width=args.width)
        self.h = projector(self.f.channels, args.projector)

    def forward(self, x_1, x_2):
        """Two views [B, 3, S, S] -> their embeddings [B, d]."""
        y_1, y_2 = self.f(x_1), self.f(x_2)                               # maps [B, C, m, m]; pooled, the paper's Y
        return self.h(pool(y_1)), self.h(pool(y_2))                       # [B, d]

    def representations(self, x):
        """{level: [B, C]}: what common.train and eval_linear judge, the pooled maps, here of one level, "0"."""
        return {"0": pool(self.f(x))}


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
    x_1 = common.augment(x, T_1, args.image_size, generator)              # normalised [B, 3, S, S], S = args.image_size
    x_2 = common.augment(x, T_2, args.image_size, generator)
    z_1, z_2 = model(x_1, x_2)
    z_1, z_2 = common.gather(z_1), common.gather(z_2)                     # [n, d]; under torchrun n = B x processes
    loss, terms = vicreg_loss(z_1, z_2, args.lambda_, args.mu, args.nu)
    return loss, terms, {"0": z_1}                                        # z_1: for the log's effective_rank


# ---- arguments ------------------------------------------------------------------------------

def arguments(argv=None):
    parser = common.Parser(__doc__)
    add, number = parser.add_argument, common.number
    add("--arch", choices=("resnet18", "resnet50"), default="resnet18", help="the encoder f")
    add("--projector", type=common.widths, default="256-256-256", help="widths of h's layers; the last is d")
    add("--augmentation", choices=("vicreg", "sjea", "crop"), default="sjea", help="whose views; crop: only crops and flips; vicreg: with blur above 64 px")
    add("--crop-min", type=number(float, 0.01, 1), help="smallest crop, as a share of the image (default: 0.8 on shapes; else 0.3, of vicreg 0.08)")
    add("--lambda", dest="lambda_", type=number(float, 0), default=25.0, help="lambda: weight of the invariance term")
    add("--mu", type=number(float, 0), default=25.0, help="mu: weight of the variance term")
    add("--nu", type=number(float, 0), default=8.0, help="nu: weight of the covariance term (the papers: 1; 8 was chosen with AdamW, at a small d)")
    add("--width", type=number(int, 8, 1024), default=16, help="base channels of the ResNet; the standard one has 64")
    add("--optimizer", choices=("muon", "adamw", "lars"), default="muon", help="muon, adamw (default --lr: 0.03) or lars, VICReg's (0.3)")
    common.add_common_arguments(parser, method="vicreg", epochs=2, batch_size=64, lr=0.06, weight_decay=1e-4, warmup_epochs=0.5, eval_every=1)
    # --optimizer changes the default of --lr (lars that of --weight-decay, too), so it is looked up in argv first.
    own = {"adamw": dict(lr=0.03), "lars": dict(lr=0.3, weight_decay=1e-6)}
    parser.set_defaults(**own.get(parser.given(argv).optimizer, {}))
    args = common.parse(parser, argv)
    args.crop_min = args.crop_min or (0.8 if args.dataset == "shapes" else 0.08 if args.augmentation == "vicreg" else 0.3)
    return args


# ---- main -----------------------------------------------------------------------------------

def main(argv=None):
    args = arguments(argv)
    data = common.load_dataset(args)
    torch.manual_seed(args.seed)
    model = VICReg(args)
    features = common.train(args, model, training_step, data)             # the loop: backward, step, log, checkpoint
    eval_linear.main(["--device", args.device, "--", f"{args.out}/checkpoint.pt"], data, features)


if __name__ == "__main__":
    common.command_line(main)
