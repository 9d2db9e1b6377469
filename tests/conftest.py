"""Fixtures shared by all test folders."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from tests.fakes.fresh import Fresh

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
MEMORY = Path("/dev/shm")  # a folder in memory, on Linux
ROOM = 2 << 30  # bytes; an eighth of that was seen in use at once

hypothesis.settings.register_profile("unhurried", deadline=None)  # no result may depend on how busy a machine is
hypothesis.settings.load_profile("unhurried")


def pytest_configure() -> None:
    """The tests' files lie in memory where there is room and programs may run: a disk takes longer than most tests.

    ``--basetemp``, ``PYTEST_DEBUG_TEMPROOT`` and ``TMPDIR`` name another place.
    """
    if {"PYTEST_DEBUG_TEMPROOT", "TMPDIR"} & os.environ.keys() or not os.access(MEMORY, os.W_OK | os.X_OK):
        return
    if shutil.disk_usage(MEMORY).free > ROOM and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC:
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(MEMORY)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test that uses the fixture ``gpu``, so that ``-m gpu`` selects it. Tests marked ``early`` run first.

    A parameter called ``gpu`` is not that fixture.
    """
    for item in items:
        given = getattr(getattr(item, "callspec", None), "params", {})
        if "gpu" in getattr(item, "fixturenames", ()) and "gpu" not in given:
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
    """One intra-op thread: small tensors gain nothing from more, and results are easier to reproduce."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Skips tens of thousands of fsyncs, of milliseconds each: only a power cut would show that they are missing.

    ``test_publish.py`` and ``tests/fakes/disk.py`` test that and when they happen. ``fstat`` also fails for a file that
    is not open.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_works() -> None:
    """Restores Python's SIGINT handler: a shell starts background jobs, and so their children, with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _ctrl_c_still_works(_ctrl_c_works: None) -> Iterator[None]:
    """Fails a test that leaves a signal handler installed: a later test's signal would then end the whole process.

    SIGCHLD is reset without a check, because torch's DataLoader installs a handler and never removes it.
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
    """``with files_up_to(n):`` no file can grow beyond n bytes, which fails writes as a full disk does.

    The limit ends with the block, because pytest's own output may go to a longer file.
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
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fresh]:
    """Runs commands in new processes that start fast."""
    made = Fresh(tmp_path_factory.mktemp("fresh"))
    yield made
    made.close()


@pytest.fixture
def small_textures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training draws its scenes from few small textures: painting those of a real one takes a process seconds."""
    from flowreel.engine.training import batches
    from flowreel.engine.training.drawing import SceneConfig

    monkeypatch.setattr(batches, "SCENES", SceneConfig(bank=(0, 16, 128)))


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of reference outputs of layers and networks, computed for this project."""
    return ROOT / "tests" / "data" / "golden"


def saved_network(folder: Path, name: str, width: float, scale: float = 1.0) -> str:
    """Saves random weights, those of the last prediction multiplied by ``scale``, and gives their path."""
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
    """Weights of a small, fast network whose flow clearly depends on its input."""
    return saved_network(tmp_path_factory.mktemp("weights"), "FlowNet2S", 0.05, scale=300)


@pytest.fixture(scope="session")
def tiny_flownetc(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of a small, fast network with a correlation layer."""
    return saved_network(tmp_path_factory.mktemp("weights"), "FlowNet2C", 0.05)


@pytest.fixture(scope="session")
def tiniest_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of the fastest network that can be built."""
    return saved_network(tmp_path_factory.mktemp("weights"), "FlowNet2S", 0.02)
