"""Rules of the code layout: who may import whom, which packages are installed, and that importing stays cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.fakes.fresh import Fresh

ROOT = Path(__file__).resolve().parent.parent
BASE_LAYER = {
    f"flowreel.engine.{name}" for name in ("data", "config", "errors", "claims", "files", "protocols", "publish")
}
SINKS_REGISTRY = {"flowreel.sinks"}  # imports the modules behind its names on first use


def modules(folder: str) -> list[tuple[str, Path]]:
    return [(str(path.relative_to(ROOT)), path) for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Every flowreel module that the file imports, at the top or in functions, except under TYPE_CHECKING."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path}: imports are absolute"
            folder = ROOT.joinpath(*node.module.split(".")[1:])  # exists if the import names a package
            inside = {alias.name for alias in node.names if (folder / f"{alias.name}.py").is_file()}
            found.update(f"{node.module}.{name}" for name in inside)
            if len(inside) < len(node.names):
                found.add(node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return {name for name in found if name.split(".")[0] == "flowreel"}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize(("name", "path"), modules("engine"))
def test_engine_reaches_formats_only_through_the_registry(name: str, path: Path) -> None:
    assert {i for i in imports(path) if within(i, "flowreel.sinks")} <= SINKS_REGISTRY


@pytest.mark.parametrize(("name", "path"), modules("sinks"))
def test_sinks_know_of_the_engine_only_the_base_layer(name: str, path: Path) -> None:
    assert {i for i in imports(path) if within(i, "flowreel.engine")} <= BASE_LAYER


@pytest.mark.parametrize(("name", "path"), modules("kernels"))
def test_kernels_stand_below_everything(name: str, path: Path) -> None:
    allowed = BASE_LAYER | {i for i in imports(path) if within(i, "flowreel.kernels")}
    assert imports(path) <= allowed


@pytest.mark.parametrize("name", sorted(BASE_LAYER))
def test_the_base_layer_imports_nothing_above_it(name: str) -> None:
    path = ROOT / "engine" / f"{name.rsplit('.', 1)[1]}.py"
    assert imports(path) <= BASE_LAYER


def test_one_file_knows_of_threads_and_one_moves_data_between_devices() -> None:
    for folder in ("engine", "kernels", "sinks"):
        for name, path in modules(folder):
            source = path.read_text()
            nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
            names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
            names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
            if name != "engine/pipeline.py":
                assert not names & {"threading", "_thread", "queue"}, name
                assert name == "sinks/parallel.py" or "concurrent.futures" not in names, name
            if name != "engine/device.py":
                assert "pin_memory" not in source, name
                assert name == "engine/compiled/graphs.py" or "torch.cuda.Stream" not in source, name


def test_pyproject_lists_every_package() -> None:
    """Including folders that hold only data: setuptools warns about those that are not listed."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = set()
    for folder in ("engine", "kernels", "sinks"):
        places = {path.parent for path in (ROOT / folder).rglob("*.*") if path.is_file()}
        for place in (place for place in places if place.name != "__pycache__"):
            inside = place.relative_to(ROOT / folder).parts
            found.add(".".join(("flowreel", folder, *inside)) if inside != ("public",) else "flowreel")
    assert set(config["packages"]) == found


def test_importing_flowreel_loads_nothing_heavy() -> None:
    code = "import flowreel, sys; print([m for m in ('torch', 'numpy', 'av', 'zarr', 'typer') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "[]"


def test_loading_a_network_loads_no_compiler(fresh: Fresh) -> None:
    """Importing torch's compiler takes a second, and building a network without values must not trigger it either."""
    code = (
        "import sys; from flowreel.engine.config import ModelConfig as Config\n"
        "from flowreel.engine.inference import load_network\n"
        "load_network(Config(device='cpu')); print([m for m in ('sympy', 'torch._dynamo') if m in sys.modules])"
    )
    assert fresh.code(code) == (0, "[]\n")


def test_every_public_name_is_there_and_documented() -> None:
    import flowreel

    assert set(dir(flowreel)) == {*flowreel.__all__, "open"}
    for name in dir(flowreel):
        words = getattr(flowreel, name).__doc__ or ""
        # A dataclass without a docstring gets its signature as one.
        assert name == "__version__" or (words and not words.startswith(f"{name}(")), name
    with pytest.raises(AttributeError, match="nothing_like_it"):
        flowreel.nothing_like_it  # noqa: B018


def test_type_checkers_find_the_errors() -> None:
    """The stub for ``flowreel.errors`` is linked in ``typings`` and installed with the package."""
    stub = ROOT / "engine" / "public" / "errors.pyi"
    assert "from flowreel.engine.errors import *" in stub.read_text()
    assert (ROOT / "typings" / "flowreel" / "errors.pyi").samefile(stub)
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "*.pyi" in config["package-data"]["flowreel"]


def test_errors_can_be_imported_from() -> None:
    code = "from flowreel.errors import StageError; import flowreel; assert flowreel.errors.StageError is StageError"
    subprocess.run([sys.executable, "-c", code], check=True)
