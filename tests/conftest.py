"""Fixtures every test folder may use."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent

hypothesis.settings.register_profile("unhurried", deadline=None)  # no result may depend on how busy a machine is
hypothesis.settings.load_profile("unhurried")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``-m gpu`` chooses the tests that take the fixture ``gpu``, by name or as a parameter of another one.

    Those that are marked ``early`` come first.
    """
    for item in items:
        chosen = getattr(getattr(item, "callspec", None), "params", {}).values()
        if "gpu" in getattr(item, "fixturenames", ()) or any(isinstance(x, str) and x == "gpu" for x in chosen):
            item.add_marker(pytest.mark.gpu)
    items.sort(key=lambda item: item.get_closest_marker("early") is None)


@pytest.fixture
def gpu() -> torch.device:
    """A CUDA device; the test is skipped where there is none."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """Small tensors gain nothing from intra-op threads, and results repeat more easily without them."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_works() -> None:
    """A shell starts background jobs with SIGINT ignored, and they pass that on to every process they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _ctrl_c_still_works(_ctrl_c_works: None) -> Iterator[None]:
    """A command's own handling of it, left behind by a test, would end a later one's whole process.

    Torch's DataLoader takes SIGCHLD and keeps it.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    left = {number: signal.getsignal(number) for number in before}
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    assert left == before


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real videos, image pairs and goldens that are not part of the repository."""
    folder = Path(os.environ.get("FLOWREEL_DATA", ROOT / ".." / "shared" / "data"))
    if not folder.is_dir():
        message = f"no data folder at {folder}: set FLOWREEL_DATA"
        if os.environ.get("FLOWREEL_REQUIRE_DATA") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return folder.resolve()


@pytest.fixture
def files_up_to() -> Callable[[int], AbstractContextManager[None]]:
    """``with files_up_to(n):`` no file grows beyond n bytes, as good as a full disk.

    Lifted before the test ends: pytest's own output may go to a longer file.
    """

    @contextmanager
    def limited(most_bytes: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Numbers of the reference layers and networks, computed for this project."""
    return ROOT / "tests" / "data" / "golden"


def saved_network(folder: Path, name: str, width: float, scale: float = 1.0) -> str:
    """Path of random weights, the last prediction of which is multiplied."""
    import torch

    from flowreel.engine.models import build_model
    from flowreel.engine.models.saving import save_weights

    torch.manual_seed(0)
    model = build_model(name, width=width)
    with torch.no_grad():
        model.get_submodule("predict_flow2").weight.mul_(scale)  # type: ignore[operator, union-attr]
    path = folder / "tiny.safetensors"
    save_weights(path, model.state_dict(), licence="none", made_by={}, width=width)
    return str(path)


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of a network that is quick and moves with its input."""
    return saved_network(tmp_path_factory.mktemp("weights"), "FlowNet2S", 0.05, scale=300)


@pytest.fixture(scope="session")
def tiny_flownetc(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of a quick network with a correlation."""
    return saved_network(tmp_path_factory.mktemp("weights"), "FlowNet2C", 0.05)


@pytest.fixture(scope="session")
def tiniest_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of a network as quick as ours can be."""
    return saved_network(tmp_path_factory.mktemp("weights"), "FlowNet2S", 0.02)
