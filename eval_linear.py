"""Judge a frozen encoder: linear probe and weighted k-NN, at every level of a checkpoint.

    python eval_linear.py runs/sjea-shapes/checkpoint.pt
    python eval_linear.py runs/sjea-shapes/checkpoint.pt --labels shape style colour

The checkpoint says which method, encoder and dataset it belongs to. Projectors are left out: what is
judged is each encoder's pooled map, with all encoders frozen (S-JEA section 4.1). Two baselines stand
beside it, raw pixels and the same encoder before training. Features are computed once, without
augmentation. Writes eval.json beside the checkpoint.
"""
import importlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F

import common

MODELS = {"vicreg": "VICReg", "sjea": "SJEA", "ijepa": "JEPA", "cjepa": "JEPA"}  # method's script: its model class

# ---- the probe ------------------------------------------------------------------------------


def linear_probe(features, labels, test_features, test_labels, l2=1e-3):
    """Multinomial logistic regression on standardised features.

    features [N, D] float, labels [N] int, the same for test. Minimises mean cross-entropy plus
    l2 / 2 * ||W||^2 with at most 100 steps of L-BFGS from zero: no seed, no learning rate to tune.
    Returns (top-1, top-5) accuracy in [0, 1] on test.
    """
    ## Published protocols train this layer with SGD and augmentation for 100 to 200 epochs. On fixed
    ## features the objective is convex, and a quasi-Newton solver is at its optimum in seconds.
    mean, std = features.mean(0), features.std(0) + 1e-6
    x, x_test = (features - mean) / std, (test_features - mean) / std
    y, y_test = labels.to(x.device), test_labels.to(x.device)
    classes = int(y.max()) + 1
    W = torch.zeros(classes, x.shape[1], device=x.device, requires_grad=True)               # [classes, D]
    b = torch.zeros(classes, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS([W, b], max_iter=100, line_search_fn="strong_wolfe")

    def objective():
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(x, W, b), y) + l2 / 2 * W.pow(2).sum()
        loss.backward()
        return loss

    solver.step(objective)
    top = F.linear(x_test, W, b).topk(min(5, classes)).indices                                    # [N_test, 5]
    hits = (top == y_test[:, None]).float()
    return hits[:, 0].mean().item(), hits.sum(1).mean().item()


def judge(features, test_features, y, y_test):
    """All scores of one set of features: {"linear_top1", "linear_top5", "knn_top1"} in [0, 1]."""
    top1, top5 = linear_probe(features, y, test_features, y_test)
    return {"linear_top1": top1, "linear_top5": top5, "knn_top1": common.knn(features, y, test_features, y_test)}


# ---- arguments ------------------------------------------------------------------------------


def arguments(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, help="checkpoint.pt of a run")
    add("--labels", nargs="+", help="which labels of the dataset to read out (default: its first)")
    add("--data-dir", help="where the dataset lies now (default: where it lay in training)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    return parser.parse_args(argv)


# ---- main -----------------------------------------------------------------------------------


def load(path, device="auto", data_dir=None):
    """A checkpoint's (model, args) on `device`, the model in evaluation mode. Raises Unusable."""
    state = common.load_checkpoint(path)
    if state["method"] not in MODELS:
        raise common.Unusable(f"{path}: a checkpoint of the unknown method {state['method']}; known are {', '.join(MODELS)}")
    config = {**state["config"], "device": device, "out": str(path.parent), "resume": False}
    if data_dir:
        config["data_dir"] = data_dir
    script = importlib.import_module(state["method"])
    differ = vars(script.arguments(["--out", config["out"]])).keys() ^ config.keys()
    if differ:
        raise common.Unusable(f"{path}: written by another version of {state['method']}.py: its config differs in {', '.join(sorted(map(str, differ)))}")
    try:                                       # the script's own checks on what a stranger may have written
        args = script.arguments(flags(config))
    except common.Unusable as error:
        raise common.Unusable(f"{path}: its config does not pass: {error}") from error
    for name in config.keys() - {"device"}:
        if config[name] != getattr(args, name):
            raise common.Unusable(f"{path}: its config does not pass: {name} is {config[name]}")
    with torch.device("meta"):                 # no memory for the sizes it declares before its weights are seen to have them
        expected = {name: value.shape for name, value in build(args).state_dict().items()}
    if expected != {name: value.shape for name, value in state["model"].items()}:
        raise common.Unusable(f"{path}: its weights are not those of the encoder it names")
    model = untrained(args)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise common.Unusable(f"{path}: its weights are not those of the encoder it names: {str(error).splitlines()[0]}") from error
    return model, args


def flags(config):
    """The command line that a config comes from."""
    argv = []
    for name, value in config.items():
        flag = "--" + name.replace("_", "-").strip("-")
        if name == "method" or value is None or value is False:
            continue
        if isinstance(value, list) and name == "projector":
            argv.append(f"{flag}={'-'.join(map(str, value))}")
        elif isinstance(value, list):
            argv += [flag, *map(str, value)]
        else:
            argv.append(flag if value is True else f"{flag}={value}")
    return argv


def build(args):
    return getattr(importlib.import_module(args.method), MODELS[args.method])(args)


def untrained(args):
    """The model of args as it was before its first step."""
    torch.manual_seed(args.seed)
    return build(args).to(args.device, memory_format=torch.channels_last).eval()


def main(argv=None, data=None):
    """Judge the checkpoint that argv names; data: its dataset, where the caller has it loaded already."""
    options = arguments(argv)
    model, args = load(options.checkpoint, options.device, options.data_dir)
    ## A checkpoint from a stranger must not decide where a download goes.
    data = data or common.load_dataset(args, download=options.data_dir is not None)
    labels = options.labels or list(data.train_labels)[:1]
    for label in labels:
        if label not in data.train_labels:
            raise common.Unusable(f"argument --labels: {args.dataset} has no label {label}; it has {', '.join(data.train_labels)}")

    parts = (data.train_images, data.test_images)
    features = {level: pair for level, *pair in zip_levels(common.extract(model, x, args) for x in parts)}
    levels = list(features)
    for level, *pair in zip_levels(common.extract(untrained(args), x, args) for x in parts):
        features[f"untrained {level}"] = pair
    small = min(32, args.image_size)           # raw pixels of larger images fit neither a memory nor a classifier
    features["raw pixels"] = [common.resize(x, small).flatten(1).float() / 255 for x in parts]      # [N, 3 * small * small]

    scores = {}
    for label in labels:
        scores[label] = {name: judge(*pair, data.train_labels[label], data.test_labels[label]) for name, pair in features.items()}
        print(f"\n{args.method} on {args.dataset}: {label}, {len(data.test_images)} {'held-out' if args.holdout else 'test'} images")
        print(f"{'level':<18}{'linear top-1 %':>15}{'top-5 %':>10}{'k-NN %':>10}")
        for name, score in scores[label].items():
            print(f"{name:<18}{100 * score['linear_top1']:>15.1f}{100 * score['linear_top5']:>10.1f}{100 * score['knn_top1']:>10.1f}")
    first = scores[labels[0]]
    result = {"method": args.method, "dataset": args.dataset, "label": labels[0],
              "levels": {level: first[level] for level in levels},
              "baselines": {name: first[name] for name in features if name not in levels}, "labels": scores}
    common.write(options.checkpoint.with_name("eval.json"), lambda file: file.write(json.dumps(result, indent=2).encode()))
    print(f"\nTo read out more: python eval_linear.py {options.checkpoint} --labels {' '.join(data.train_labels)}")


def zip_levels(extracted):
    """Two dicts {level: features} -> triples (level, train features, test features)."""
    train, test = extracted
    return [(level, train[level], test[level]) for level in train]


if __name__ == "__main__":
    common.command_line(main)
