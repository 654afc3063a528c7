"""Judge a frozen encoder, at every level of a checkpoint: linear probe, k-NN, and the papers' other protocols.

    python eval_linear.py runs/sjea-shapes/checkpoint.pt
    python eval_linear.py runs/sjea-shapes/checkpoint.pt --labels shape style colour
    python eval_linear.py runs/sjea-shapes/checkpoint.pt --within shape style colour pose
    python eval_linear.py runs/sjea-shapes/checkpoint.pt --shots 1 5 20 --augmented 20 --fine-tune 20 --supervised 20

The checkpoint says which method, encoder and dataset it belongs to. Projectors are left out: what is
judged is each encoder's pooled output, frozen (S-JEA section 4.1) but for --fine-tune and --supervised, and,
where S-JEA has several stacks, all of them side by side. Two baselines stand beside it, raw pixels and the
same encoder before training. Features are computed once, without augmentation; --augmented trains the linear
layer as the papers do, on new crops and flips in every epoch. Writes eval.json beside the checkpoint.
"""
import importlib
import json
import shlex
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common

MODELS = {"vicreg": "VICReg", "sjea": "SJEA", "ijepa": "JEPA", "cjepa": "JEPA"}  # method's script: its model class

# ---- protocols on fixed features ------------------------------------------------------------

def linear_probe(features, labels, test_features, test_labels, l2=1e-3):
    """Multinomial logistic regression on standardised features.

    features [N, D] float, labels [N] int, the same for test. Minimises mean cross-entropy plus
    l2 / 2 * ||W||^2 with at most 100 steps of L-BFGS from zero: no seed, no learning rate to tune.
    Returns (top-1, top-5) accuracy in [0, 1] on test.
    """
    ## Published protocols train this layer with SGD or LARS on augmented images for 50 to 300 epochs. On fixed
    ## features the objective is convex, and a quasi-Newton solver is within tenths of a point of its optimum in seconds.
    x, x_test = standardised(features, test_features)
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
    return top1_top5(F.linear(x_test, W, b), y_test)


def standardised(features, test_features):
    """Both, shifted and scaled so that each dimension of features [N, D] has mean 0 and deviation 1; one that is constant there is 0 in both."""
    scale = features.std(0, correction=0) + 1e-6
    scale[features.amax(0) == features.amin(0)] = torch.inf               # where the deviation may come out as 1e-9 instead of 0
    return [(x - features.mean(0)).div_(scale) for x in (features, test_features)]


def top1_top5(logits, y):
    top = logits.topk(min(5, logits.shape[1])).indices                                      # [N, 5]
    hits = (top == y[:, None]).float()
    return hits[:, 0].mean().item(), hits.sum(1).mean().item()


def judge(features, test_features, y, y_test, k=80, temperature=0.1):
    """All scores of one set of features: {"linear_top1", "linear_top5", "knn_top1"} in [0, 1]."""
    top1, top5 = linear_probe(features, y, test_features, y_test)
    return {"linear_top1": top1, "linear_top5": top5, "knn_top1": common.knn(features, y, test_features, y_test, k, temperature)}


def draw_shots(y, shots, seed):
    """Indices of `shots` random images of every class of y [N], or of that share of each class where shots < 1."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    number = lambda of: max(1, round(shots * len(of))) if shots < 1 else int(shots)
    return torch.cat([of[:number(of)] for of in (order[y[order] == c] for c in y.unique())])


def few_shot(features, test_features, y, y_test, shots):
    """{"mean", "std"} of the linear probe's top-1 over 5 stratified subsets of train (I-JEPA: 1 % of ImageNet)."""
    chosen = [draw_shots(y, shots, seed) for seed in range(5)]
    top1 = torch.tensor([linear_probe(features[i.to(features.device)], y[i], test_features, y_test)[0] for i in chosen])
    return {"mean": top1.mean().item(), "std": top1.std().item()}


def within(features, test_features, y, y_test, sub, sub_test, k=80, temperature=0.1):
    """How well sub-categories can be told apart inside each class, the mean over the classes of y.

    {"linear_top1", "knn_top1"}: accuracy, given the class, beside "chance_top1", the share of the largest
    sub-category; {"nmi", "rand"}: agreement of a k-means clustering of the class's test images with their true
    sub-categories. A random clustering has an adjusted Rand index of 0, but, of so few images, an NMI of "chance_nmi".
    """
    # not at the top: it takes a second or two to import, and every training script imports this file
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    ## S-JEA claims that its higher stack holds sub-categories, and shows t-SNE maps. This measures it.
    rows = []
    for c in sorted(set(y.tolist()) & set(y_test.tolist())):
        train, test = (y == c).to(features.device), (y_test == c).to(features.device)
        x, x_test = features[train], test_features[test]
        names, s = torch.cat([sub[y == c], sub_test[y_test == c]]).unique(return_inverse=True)
        s, s_test = s.split([len(x), len(x_test)])
        scores = judge(x, x_test, s, s_test, min(k, max(1, len(x) // len(names))), temperature)
        clusters = KMeans(min(len(names), len(x_test)), n_init=10, random_state=0).fit_predict(standardised(x, x_test)[1].cpu().numpy())
        shuffled = np.random.default_rng(0).permuted(np.tile(clusters, (20, 1)), axis=1)
        rows.append({"linear_top1": scores["linear_top1"], "knn_top1": scores["knn_top1"],
                     "chance_top1": s_test.bincount().max().item() / len(s_test),
                     "nmi": normalized_mutual_info_score(s_test, clusters),
                     "chance_nmi": np.mean([normalized_mutual_info_score(s_test, random) for random in shuffled]),
                     "rand": adjusted_rand_score(s_test, clusters)})
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


# ---- protocols that train on images ---------------------------------------------------------

def train_classifier(model, levels, data, label, args, epochs, lr, frozen):
    """A linear layer on each level, trained on new crops and flips. Returns {level: (top-1, top-5)} on test.

    frozen: the encoder stays as it is (the papers' linear protocol); otherwise it is trained too (fine-tuning, or
    from scratch). Each layer reads features standardised by a BN without parameters: by the mean of all batches' statistics
    where the encoder is frozen, by their moving average where it changes. Accuracies are in [0, 1].
    """
    x, y = data.train_images, data.train_labels[label].to(args.device)
    width = {level: h.shape[1] for level, h in common.extract(model, data.test_images[[0]], args).items()}
    torch.manual_seed(args.seed)
    classes, momentum = int(y.max()) + 1, None if frozen else 0.1
    norm = lambda D: nn.BatchNorm1d(D, affine=False, momentum=momentum)
    heads = nn.ModuleList(nn.Sequential(norm(width[level]), nn.Linear(width[level], classes)) for level in levels).to(args.device)
    model.requires_grad_(not frozen)
    if frozen:
        optimizer = torch.optim.SGD(heads.parameters(), lr, momentum=0.9)
    else:
        model.stop_gradient = False            # of sjea.py --stop-gradient: the label's loss is to reach every stack
        optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr, weight_decay=0.05)
    batch = min(128, len(x))
    per_epoch, steps = len(x) // batch, epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: common.learning_rate(step, steps, steps // 10, 1.0))
    whole = label in ("pose", "count", "distance")    # labels of shapes that a flip, or a crop, would make wrong
    view = common.View((1.0 if whole else 0.3, 1.0), p_flip=0.0 if whole else 0.5, p_jitter=0.0, p_grey=0.0)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    for _ in common.progress(range(epochs), "epochs"):
        model.train(not frozen)
        batches = torch.randperm(len(x), generator=generator, device=args.device)[:per_epoch * batch].split(batch)
        for chosen, images in zip(batches, common.load_batches(x, batches, args.device)):
            with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
                h = model.representations(common.augment(images, view, args.image_size, generator))
                loss = sum(F.cross_entropy(head(h[level]).float(), y[chosen]) for level, head in zip(levels, heads))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    heads.eval()
    features = common.extract(model, data.test_images, args)
    with torch.no_grad():
        return {level: top1_top5(head(features[level]), data.test_labels[label].to(args.device)) for level, head in zip(levels, heads)}


# ---- arguments ------------------------------------------------------------------------------

def arguments(argv=None):
    parser = common.Parser(__doc__)
    add, number = parser.add_argument, common.number
    add("checkpoint", type=Path, help="checkpoint.pt of a run")
    add("--labels", nargs="+", help="which labels of the dataset to read out; the protocols below use the first (default: the dataset's first)")
    add("--within", nargs="+", metavar=("CLASS", "SUB"), help="how well the labels SUB are told apart inside each class of the label CLASS")
    add("--shots", nargs="+", type=number(float, 1e-6), help="few-shot: labelled images per class, or below 1 the share of each class; 5 draws")
    add("--augmented", type=number(int, 1), metavar="EPOCHS", help="the papers' linear protocol: SGD on new crops and flips for so many epochs")
    add("--fine-tune", type=number(int, 1), metavar="EPOCHS", help="train the whole encoder on the labels")
    add("--supervised", type=number(int, 1), metavar="EPOCHS", help="the same from scratch")
    add("--k", type=number(int, 1), default=80, help="neighbours that vote in k-NN; inside a class at most its images per sub-category")
    add("--temperature", type=number(float, 1e-3), default=0.1, help="a vote counts exp(cosine similarity / temperature)")
    add("--data-dir", help="where the dataset lies now (default: where it lay in training)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    return parser.parse_args(argv)


# ---- main -----------------------------------------------------------------------------------

def load(path, device="auto", data_dir=None):
    """A checkpoint's (model, args) on `device`, the model in evaluation mode. Seeds torch's generator. Raises Unusable."""
    common.join_processes(common.pick_device(device))
    state = common.from_first(common.load_checkpoint(path) if common.process()[0] == 0 else None)    # the others may be on other machines
    if state["method"] not in MODELS:
        raise common.Unusable(f"{path}: a checkpoint of the unknown method {state['method']}; "
                              f"known are {', '.join(MODELS)} (MODELS in eval_linear.py)")
    config = {**state["config"], "device": device, "out": tempfile.gettempdir(), "resume": False}    # out: the checkpoint's own folder may be read-only
    if data_dir:
        config["data_dir"] = data_dir
    script = importlib.import_module(state["method"])
    differ = vars(script.arguments([f"--out={config['out']}"])).keys() ^ config.keys()
    if differ:
        raise common.Unusable(f"{path}: written by another version of {state['method']}.py; judge it with that one: "
                              f"its config differs in {', '.join(sorted(map(str, differ)))}")
    try:                                       # the script's own checks on what a stranger may have written
        args = script.arguments(flags(config))
    except common.Unusable as error:
        raise common.Unusable(f"{path}: its config does not pass: {error}") from error
    for name in config.keys() - {"device"}:
        if config[name] != getattr(args, name):
            raise common.Unusable(f"{path}: its config holds a value that its script does not take: {name} is {config[name]}")
    with torch.device("meta"):                 # no memory for the sizes that the config declares until the weights prove to have them
        weights = build(args).state_dict(keep_vars=True)                  # the same object under two names: one weight
    expected, found = ({name: (value.shape, value.dtype) for name, value in of.items()} for of in (weights, state["model"]))
    own = {value.untyped_storage().data_ptr() for value in state["model"].values()}    # as many as weights, unless forged ones share theirs
    if expected != found or len(own) < len(set(map(id, weights.values()))):
        raise common.Unusable(f"{path}: its weights are not those of the encoder it names, as {state['method']}.py "
                              "builds it now; judge it with the code of its run")
    model = untrained(args)
    model.load_state_dict(state["model"])
    return model, args


def flags(config):
    """The command line that a config comes from."""
    argv = []
    for name, value in {**config, "method": None}.items():                # the script knows its method
        flag = "--" + name.replace("_", "-").strip("-")
        if isinstance(value, list):
            widths = all(isinstance(item, int) for item in value)         # common.widths: 256-256-256
            argv += [flag, "-".join(map(str, value))] if widths else [flag, *map(str, value)]
        elif value is not None and value is not False:
            argv.append(flag if value is True else f"{flag}={value}")
    return argv


def build(args):
    return getattr(importlib.import_module(args.method), MODELS[args.method])(args)


def untrained(args):
    """The model of args as it was before its first step."""
    torch.manual_seed(args.seed)
    return build(args).to(args.device, memory_format=common.memory_format(args.device)).eval()


def main(argv=None, data=None, extracted=None):
    """Judge the checkpoint that argv names; data and extracted: its dataset and what common.train returned, where the caller has them."""
    options = arguments(argv)
    for shots in options.shots or ():
        if shots > 1 and shots != int(shots):
            raise common.Unusable(f"argument --shots: {shots:g} is neither a number of images nor a share below 1")
    if options.within and len(options.within) < 2:
        raise common.Unusable(f"argument --within: {options.within[0]} is the class; name one label or more to be told apart inside it")
    model, args = load(options.checkpoint, options.device, options.data_dir)
    common.check_writable(options.checkpoint.parent, "eval.json goes beside the checkpoint")
    for flag in ("augmented", "fine_tune", "supervised"):
        if getattr(options, flag) and common.process()[1] > 1:
            raise common.Unusable(f"argument --{flag.replace('_', '-')}: trains in one process; run it without torchrun")
    ## A checkpoint from a stranger must not decide where a download goes.
    data = data or common.load_dataset(args, download=bool(options.data_dir))
    labels = options.labels or list(data.train_labels)[:1]
    for flag, name in [("--labels", name) for name in labels] + [("--within", name) for name in options.within or ()]:
        if name not in data.train_labels:
            raise common.Unusable(f"argument {flag}: {args.dataset} has no label {name}; it has {', '.join(data.train_labels)}")
    if len(data.train_images) < 2:
        raise common.Unusable("argument --data-dir: there are fewer than two images to train on")
    fewest = data.train_labels[labels[0]].unique(return_counts=True)[1].min().item()
    if max(options.shots or [0]) > fewest:
        raise common.Unusable(f"argument --shots: a class has only {fewest} training images")

    parts, start = (data.train_images, data.test_images), untrained(args)
    train, test = extracted or [common.extract(model, x, args) for x in parts]
    features, levels = {level: [train[level], test[level]] for level in train}, list(train)
    stacked = levels[0] == "0"                 # VICReg's and S-JEA's levels are numbers, a JEPA's names
    if stacked and len(levels) > 1:
        features["+".join(levels)] = [torch.cat(part, dim=1) for part in zip(*(features[level] for level in levels))]
    own = list(features)
    train, test = (common.extract(start, x, args) for x in parts)
    features |= {f"untrained {level}": [train[level], test[level]] for level in train}
    small = min(32, args.image_size)           # raw pixels of larger images fit neither a memory nor a classifier
    batches = lambda x: common.load_batches(x, torch.arange(len(x), device=x.device).split(500), args.device)
    pixels = lambda x: torch.cat([common.resize(batch, small).flatten(1) for batch in batches(x)])
    features["raw pixels"] = [pixels(x).float().div_(255) for x in parts]                # [N, 3 * small * small]

    split = f"{len(data.test_images)} {'held-out' if args.holdout else 'test'} images"
    y = {label: (data.train_labels[label], data.test_labels[label]) for label in data.train_labels}
    scores = {}
    for label in labels:
        scores[label] = {name: judge(*pair, *y[label], options.k, options.temperature) for name, pair in features.items()}
        table(f"{args.method} on {args.dataset}: {label}, {split}", ("linear top-1 %", "top-5 %", "k-NN %"), scores[label])
    first = scores[labels[0]]
    result = {"method": args.method, "dataset": args.dataset, "judged_on": split, "k": options.k, "temperature": options.temperature,
              "label": labels[0], "levels": {level: first[level] for level in own},
              "baselines": {name: first[name] for name in features if name not in own}, "labels": scores}

    for shots in options.shots or ():
        name = f"{shots:g} per class" if shots >= 1 else f"{100 * shots:g} % of each class"
        result.setdefault("few_shot", {})[name] = {level: few_shot(*pair, *y[labels[0]], shots) for level, pair in features.items()}
        table(f"{labels[0]} from {name}, linear top-1, 5 draws", ("mean %", "std %"), result["few_shot"][name])
    for sub in (options.within or ())[1:]:
        classes, k, temperature = y[options.within[0]], options.k, options.temperature
        found = {level: within(*pair, *classes, *y[sub], k, temperature) for level, pair in features.items()}
        result.setdefault("within", {})[sub] = found
        columns = "linear top-1 %", "k-NN %", "largest share %", "NMI %", "NMI, chance %", "Rand %"
        table(f"{sub} inside each {options.within[0]}", columns, found)
    one = levels[-1:] if stacked else levels[:1]    # S-JEA's last stack, a JEPA's target
    for name, epochs, network, chosen, lr in (("augmented", options.augmented, model, levels, 0.1),
                                              ("fine_tune", options.fine_tune, model, one, 1e-3),
                                              ("supervised", options.supervised, start, one, 1e-3)):
        if epochs:
            top = train_classifier(network, chosen, data, labels[0], args, epochs, lr, frozen=name == "augmented")
            result[name] = {"epochs": epochs, "levels": {level: {"top1": top1, "top5": top5} for level, (top1, top5) in top.items()}}
            table(f"{labels[0]}, {name.replace('_', '-')}, {epochs} epochs", ("top-1 %", "top-5 %"), result[name]["levels"])
    common.write(options.checkpoint.with_name("eval.json"), lambda file: file.write(json.dumps(result, indent=2).encode()))
    if data.train_labels.keys() > set(labels):
        where = ["--data-dir", options.data_dir] if options.data_dir else []
        print(f"\nTo read out more: {shlex.join(['python', 'eval_linear.py', str(options.checkpoint), *where, '--labels', *data.train_labels])}")


def table(title, columns, rows):
    print(f"\n{title}\n{'level':<18}" + "".join(f"{column:>16}" for column in columns))
    for name, row in rows.items():
        print(f"{name:<18}" + "".join(f"{100 * value:>16.1f}" for value in row.values()))


if __name__ == "__main__":
    common.command_line(main)
