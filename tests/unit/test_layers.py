"""A rule on imports that import-linter cannot state: it knows external packages by their first name alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def imported_names(source):
    """Dotted names that a module's import statements mention, at any depth of the code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_any(source, packages):
    return sorted(name for name in imported_names(source)
                  if any(name == package or name.startswith(package + ".") for package in packages))


@pytest.mark.parametrize("line", [
    "import torch.distributed", "import torch.distributed as dist", "from torch import distributed",
    "from torch.distributed.tensor import DTensor", "def late():\n    from torch.distributed import all_reduce"])
def test_every_way_of_importing_torch_distributed_is_seen(line):
    assert imports_any(line, ["torch.distributed"])
    assert not imports_any("import torch\nfrom torch import nn", ["torch.distributed"])


def test_the_model_does_not_know_of_other_processes():
    modules = sorted((ROOT / "longer_rec" / "model").rglob("*.py"))
    assert modules
    for module in modules:
        assert not imports_any(module.read_text(encoding="utf-8"), ["torch.distributed"]), module
