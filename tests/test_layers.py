"""Imports point down: proven on the source (AST) and on a running interpreter (subprocess)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rslightning

PACKAGE = Path(rslightning.__file__).parent

# Module or package -> what of this package it may import.
ALLOWED = {
    "errors": {"redaction"},
    "redaction": set(),
    "manifest": set(),
    "storage": {"errors", "manifest"},
    "random_streams": set(),
    "patient_events": {"errors", "storage"},
    "hyperparameters": {"errors"},
    "batch": set(),
    "losses": {"batch", "cost"},
    "stats": {"errors"},
    "cost": set(),
    "model_shape": {"errors"},
    "training_step": {"cost", "errors", "model_shape"},
    "memory": {"cost", "model_shape", "training_step"},
    "communication": {"memory", "model_shape", "training_step"},
    "assets": {"errors"},
    "model_folder": {"assets", "errors", "manifest", "storage"},
    "rslora": {"cost", "errors", "manifest", "model_folder", "storage"},
    "safe_load": {"errors"},
    "plain_yaml": {"errors"},
    "pickles": {"errors", "model_folder", "safe_load", "storage"},
    "deepspeed_checkpoint": {"errors", "safe_load"},
    "distributed_checkpoint": {"errors", "safe_load"},
    "parts_checkpoint": {"errors", "safe_load", "storage"},
    "checkpoint": {
        "checkpoint_folder",
        "deepspeed_checkpoint",
        "distributed_checkpoint",
        "errors",
        "manifest",
        "parts_checkpoint",
        "rslora",
        "safe_load",
    },
    "checkpoint_folder": {"errors", "manifest", "safe_load", "storage"},
    "run_config": set(),
    "resume": {"checkpoint", "checkpoint_folder", "errors", "run_config"},
    "hf": {"errors", "model_folder", "rslora"},
    "data": {"assets", "batch", "errors", "manifest", "storage"},
    "output_head": {"batch", "losses"},
    "packed_rows": set(),
    "module": {
        "batch",
        "checkpoint",
        "errors",
        "hf",
        "hyperparameters",
        "losses",
        "model_folder",
        "optimizer",
        "output_head",
        "packed_rows",
        "random_streams",
        "rslora",
        "strategies",
    },
    "optimizer": {"errors"},
    "strategies": {
        "deepspeed_checkpoint",
        "errors",
        "parts_checkpoint",
        "rslora",
        "safe_load",
        "storage",
    },
    "callbacks": {
        "checkpoint_folder",
        "cost",
        "errors",
        "manifest",
        "memory",
        "model_folder",
        "model_shape",
        "rslora",
        "stats",
        "storage",
        "training_step",
    },
    "experiments": {"errors", "plain_yaml", "recipes", "redaction", "rslora", "storage"},
    "recipes": {"errors"},
    "verbs": {"assets", "checkpoint", "errors", "model_folder", "pickles", "rslora", "storage"},
    "cli_errors": set(),
    "limits": {"errors"},
    "launch": {"errors", "redaction"},
    "resolve": {"checkpoint", "errors", "launch", "model_folder", "plan", "resume", "rslora"},
    "plan": {
        "cost",
        "errors",
        "memory",
        "model_folder",
        "model_shape",
        "rslora",
        "training_step",
    },
    "plan_text": {"cost", "memory", "plan", "training_step"},
    "recipe_cli": {
        "callbacks",
        "checkpoint",
        "checkpoint_folder",
        "cli_errors",
        "data",
        "errors",
        "hyperparameters",
        "launch",
        "limits",
        "model_folder",
        "module",
        "plan",
        "plan_text",
        "redaction",
        "resolve",
        "resume",
        "run_config",
        "storage",
    },
    "cli": {
        "cli_errors",
        "data",
        "errors",
        "launch",
        "patient_events",
        "plain_yaml",
        "plan",
        "plan_text",
        "recipe_cli",
        "recipes",
        "resume",
    },
    "__init__": {"module"},
    "__main__": {"__init__", "cli", "errors", "redaction"},
}


def imported_units(source: str) -> set[str]:
    """Return the first segments below `rslightning` that a source file imports anywhere."""
    units = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "rslightning":
            names = [
                f"rslightning.{alias.name if not alias.name.startswith('__') else '__init__'}"
                for alias in node.names
            ]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module]
        units |= {name.split(".")[1] for name in names if name.startswith("rslightning.")}
    return units


def violations(unit: str, source: str) -> set[str]:
    return imported_units(source) - ALLOWED[unit] - {unit}


def unit_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def test_every_import_points_down():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 25
    found = {str(p): violations(unit_of(p), p.read_text()) for p in files}
    assert {path: v for path, v in found.items() if v} == {}


def test_an_upward_import_is_noticed():
    source = "def f():\n    from rslightning.cli import run\n    import rslightning.data.base\n"
    assert violations("rslora", source) == {"cli", "data"}
    assert violations("module", "from rslightning import hf, cli") == {"cli"}


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in run.stdout.split()}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import rslightning", {"torch", "lightning", "transformers", "datasets"}),
        ("import rslightning.__main__", {"torch", "lightning", "transformers", "datasets", "yaml"}),
        ("import rslightning.rslora", {"lightning", "transformers", "datasets"}),
        ("import rslightning.stats.distributed", {"lightning", "transformers", "datasets"}),
        ("import rslightning.verbs", {"lightning", "transformers", "datasets"}),
        ("import rslightning.hf", {"lightning", "datasets"}),
        (
            "import rslightning.experiments.report",
            {"torch", "lightning", "transformers", "datasets", "tensorflow", "matplotlib"},
        ),
    ],
)
def test_heavy_libraries_stay_out(statement, absent):
    assert modules_after(statement) & absent == set()


def test_an_imported_library_is_noticed():
    assert "lightning" in modules_after("import rslightning; rslightning.CausalLMModule")
