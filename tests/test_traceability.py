"""The house's promises: equal functions in two scripts, tags against the README's map, `##` removable."""
import ast
import importlib.util
import io
import itertools
import json
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
METHODS = [name for name in ("vicreg.py", "sjea.py", "ijepa.py", "cjepa.py") if (ROOT / name).exists()]
OWN = {"training_step", "arguments", "main"}   # every script has its own
TAG = re.compile(r"(?:VICReg|S-JEA|Barlow Twins|I-JEPA|C-JEPA) (?:Eq\. \(\d\)|Algorithm \d|Table \d|masks|loss|predictor|EMA)")


def functions(path):
    """{name: source} of the functions at the top of a script, and of methods as Class.name."""
    text = path.read_text()
    found = {}
    for node in ast.parse(text).body:
        for inner in (node.body if isinstance(node, ast.ClassDef) else [node]):
            if isinstance(inner, ast.FunctionDef):
                name = f"{node.name}.{inner.name}" if isinstance(node, ast.ClassDef) else inner.name
                found[name] = ast.get_source_segment(text, inner)
    return found


def comments(path):
    """(function or Class.method, line, comment) for every comment inside one."""
    text = path.read_text()
    spans = []
    for node in ast.parse(text).body:
        for inner in (node.body if isinstance(node, ast.ClassDef) else [node]):
            if isinstance(inner, ast.FunctionDef):
                spans.append((f"{node.name}.{inner.name}" if isinstance(node, ast.ClassDef) else inner.name, inner.lineno, inner.end_lineno))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield from ((name, token.start[0], token.string) for name, first, last in spans if first <= token.start[0] <= last)


def test_a_method_imports_no_other_method():
    for script in METHODS:
        names = {name.name if isinstance(node, ast.Import) else node.module
                 for node in ast.walk(ast.parse((ROOT / script).read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))
                 for name in node.names}
        assert not names & {method[:-3] for method in METHODS}, script


@pytest.mark.parametrize("one, other", list(itertools.combinations(METHODS, 2)))
def test_functions_of_one_name_are_equal_to_the_letter(one, other):
    a, b = functions(ROOT / one), functions(ROOT / other)
    for name in (a.keys() & b.keys()) - OWN:
        assert a[name] == b[name], f"{name} differs between {one} and {other}"
    shared = {"vicreg.py sjea.py": {"invariance", "variance", "covariance", "vicreg_loss", "projector", "transformations"},
              "vicreg.py cjepa.py": {"invariance", "variance", "covariance", "vicreg_loss"}}
    assert shared.get(f"{one} {other}", set()) <= a.keys() & b.keys()
    if (one, other) == ("ijepa.py", "cjepa.py"):
        assert a.keys() - OWN <= b.keys()


def test_readme_map_and_tags_agree():
    """Each row of the map names a function that carries the tag, and no tag in the code lacks its row."""
    rows = re.findall(r"^\| ([^|]+?) \|[^|]+\| `(\w+\.py)` \| `([\w.]+)` \|$", (ROOT / "README.md").read_text(), re.M)
    mapped = {(script, function, tag) for tag, script, function in rows}
    tagged = {(script, name, tag) for script in METHODS for name, line, comment in comments(ROOT / script) for tag in TAG.findall(comment)}
    assert mapped - tagged == set() and tagged - mapped == set()
    assert len(mapped) >= 10


def test_readmes_first_table_is_the_run_it_names():
    """What "Two commands" prints is what results/ holds of that run, digit for digit."""
    scores = json.loads((ROOT / "results" / "sjea-shapes-seed0-eval.json").read_text())
    printed = re.search(r"^level +linear.*\n((?:.+\n)+?)```", (ROOT / "README.md").read_text(), re.M).group(1)
    assert printed.splitlines() == [f"{level:<13}" + "".join(f"{100 * value:{width}.1f}" for value, width in zip(row.values(), (20, 10, 10)))
                                    for level, row in {**scores["levels"], **scores["baselines"]}.items()]


def test_without_teaching_comments_the_program_is_the_same():
    """sed '/^ *##/d' leaves the same syntax tree in every script, and in common.py; and `##` is never mid-line."""
    for path in ROOT.glob("*.py"):
        text = path.read_text()
        stripped = re.sub(r"^ *##.*\n", "", text, flags=re.M)
        assert ast.dump(ast.parse(text)) == ast.dump(ast.parse(stripped)), path
        assert "##" not in stripped, path


@pytest.mark.parametrize("script", ["ijepa.py", "cjepa.py"])
def test_readmes_sed_gives_the_target_its_gradient(script, tmp_path):
    """"Break it and see" edits a script by sed: in the copy, and there alone, a gradient flows through the target."""
    edits = re.search(r"sed '(.+?)' ijepa\.py > collapse\.py", (ROOT / "README.md").read_text()).group(1)
    copy = tmp_path / script
    copy.write_text(subprocess.run(["sed", edits, ROOT / script], capture_output=True, text=True, check=True).stdout)
    for path, flows in ((ROOT / script, False), (copy, True)):
        spec = importlib.util.spec_from_file_location("edited", path)
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        model = module.JEPA(module.arguments([]))
        context, targets = module.draw_masks(module.arguments(["--num-targets", "2"]), 2, torch.Generator())
        assert model(torch.randn(2, 3, 32, 32), context, targets)[1].requires_grad == flows


def test_results_sed_lets_stack_1_read_the_embeddings(tmp_path):
    """The trial in results/README.md: f[1] gets h[0]'s 256 numbers as an image of 16 x 16 with one channel."""
    edits = re.search(r"sed -i '(.+?)' sjea\.py", (ROOT / "results" / "README.md").read_text()).group(1)
    copy = tmp_path / "sjea.py"
    copy.write_text(subprocess.run(["sed", edits, ROOT / "sjea.py"], capture_output=True, text=True, check=True).stdout)
    spec = importlib.util.spec_from_file_location("edited", copy)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    model, seen = module.SJEA(module.arguments([])).eval(), []
    model.f[1].register_forward_hook(lambda f, inputs, output: seen.append(inputs[0]))
    x = torch.randn(2, 3, 32, 32)
    model.representations(x)
    assert torch.equal(seen[0], model.h[0](model.f[0](x).mean((2, 3))).view(2, 1, 16, 16))


@pytest.mark.parametrize("script", METHODS + ["eval_linear.py", "figures.py"])
def test_help_shows_every_flag_with_a_line(script):
    text = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True,
                          env={"COLUMNS": "200", "PATH": ""}).stdout
    for flag in re.findall(r'add\("(--[\w-]+)"', (ROOT / script).read_text() + (ROOT / "common.py").read_text() * (script in METHODS)):
        assert re.search(rf"^  {flag} .*\w", text, re.M), flag
    symbols = {"vicreg.py": ("lambda:", "mu:", "nu:"), "sjea.py": ("lambda:", "Table 3"), "ijepa.py": ("M:", "D:", "m:"), "cjepa.py": ("M:", "m:")}
    assert all(symbol in text for symbol in symbols.get(script, ()))


@pytest.mark.parametrize("script, flags, shown", [
    ("vicreg", ["--optimizer", "lars"], {"--lr": "0.3", "--weight-decay": "1e-06"}), ("sjea", [], {"--lr": "0.06"}), ("sjea", ["--optimizer", "adamw"], {"--lr": "0.03"}),
    ("cjepa", ["--optimizer", "adamw"], {"--lr": "0.016"}), ("ijepa", ["--recipe", "paper"], {"--vit": "base", "--lr": "0.000125", "--batch-size": "2048"})])
def test_help_shows_the_defaults_that_go_with_the_flags_before_it(script, flags, shown, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).arguments([*flags, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for flag, default in shown.items():
        assert re.search(rf" {flag} [^-].*?\(default: ([^)]*)\)", text)[1] == default, flag
