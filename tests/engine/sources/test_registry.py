"""Which kind of source a name opens, and that finding out costs no heavy import."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from flowreel.engine import sources
from flowreel.engine.config import SelectConfig
from flowreel.engine.describe import describe
from flowreel.engine.errors import FlowreelError, SourceNotFoundError, UnsupportedSourceError, UsageError
from flowreel.engine.sources import kinds


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects the modules that ``open_source`` would load, in place of loading them."""
    modules: list[str] = []

    def note(module: str) -> object:
        modules.append(module.rpartition(".")[2])
        raise InterruptedError

    monkeypatch.setattr(sources, "import_module", note)
    return modules


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("-", "y4m"),
        ("./-", "video"),
        ("synthetic:objects", "synthetic"),
        ("folder", "images"),
        ("folder/*.png", "images"),
        ("folder/one.PNG", "images"),
        ("take[1].mp4", "video"),
        ("missing.mp4", "video"),
        ("clip.mp4", "video"),
    ],
)
def test_name_decides(asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    (tmp_path / "folder").mkdir()
    for file in ("folder/one.PNG", "take[1].mp4", "clip.mp4"):
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    for given in (name, Path(name)) if ":" not in name and name != "./-" else (name,):
        with pytest.raises(InterruptedError):
            sources.open_source(given)
    assert set(asked) == {kind}


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("-", "stdin"),
        ("synthetic:objects?size=64x64", "objects"),
        ("clips/dance.mp4", "dance"),
        ("dance.v2.mkv", "dance.v2"),
        ("missing", "missing"),
        ("shots/take.1", "take.1"),
        ("shots/take.1/", "take.1"),
        ("shots/take.1/0.png", "take.1"),
        ("shots/take.1/*.png", "take.1"),
        ("shots/*/0.png", "take.1"),
        ("nothing/*.png", "nothing"),
        ("shots/..", "here"),
        (".", "here"),
        ("*.png", "here"),
        ("/", "flow"),
    ],
)
def test_what_outputs_are_called_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stem: str) -> None:
    here = tmp_path / "here"
    (here / "shots" / "take.1").mkdir(parents=True)
    (here / "shots" / "take.1" / "0.png").touch()
    monkeypatch.chdir(here)
    assert sources.source_stem(name) == stem


def test_a_lasting_name_keeps_what_leads_through_a_link(
    clip: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``link/..`` is the folder that holds the target of the link, so it must not be shortened to ``.``."""
    (tmp_path / "far" / "folder").mkdir(parents=True)
    clip("clip.mp4").rename(tmp_path / "far" / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("far/folder")
    with closing(sources.open_source(sources.lasting_name("link/../clip.mp4"))) as source:
        assert source.info.source.name == "clip.mp4"
    with pytest.raises(UsageError, match="empty"):
        sources.lasting_name("")


@pytest.mark.parametrize("name", ["https://there/clip.mp4", "https://there/watch?v=1", "rtsp://there/1"])
def test_an_address_is_told_how_to_pipe_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless there is a file of that name."""
    monkeypatch.chdir(tmp_path)
    for looking in (sources.open_source, sources.source_identity, sources.lasting_name, describe):
        with pytest.raises(UsageError, match=rf"^{re.escape(name)} is an address.*ffmpeg -i"):
            looking(name)
    Path(name).parent.mkdir(parents=True)
    Path(name).touch()
    assert sources.lasting_name(name) == str(tmp_path / name)


def test_selection_reaches_the_source(clip: Callable[..., Path]) -> None:
    assert sources.open_source(clip("chosen.mp4"), SelectConfig(step=3)).info.frame_count == 4


def test_package_loads_nothing_heavy() -> None:
    code = "import sys, flowreel.engine.sources; print(sorted({'av', 'torch', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_identity_is_what_the_source_itself_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("take").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(f"take/{number}.png")
    with av.open("clip.mkv", "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(3):
            picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), number, np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    for name in ("take/*.png", Path("clip.mkv")):
        with closing(sources.open_source(name)) as source:
            assert sources.source_identity(name) == replace(source.info.source, duration_s=None)
    for name in ("missing.mkv", "none/*.png"):
        with pytest.raises(SourceNotFoundError, match=r"missing|none"):
            sources.source_identity(name)
    with pytest.raises(UsageError):
        sources.source_identity("synthetic:objects?size=big")
    Path("folder.mkv").mkdir()
    with pytest.raises(FlowreelError):
        sources.source_identity("folder.mkv")
    monkeypatch.setattr(kinds, "KINDS", kinds.KINDS[-1:])
    with pytest.raises(UnsupportedSourceError, match="Is a directory"):
        sources.source_identity("folder.mkv")
