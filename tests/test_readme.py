"""The README's commands and Python code are run unchanged; its tables are compared with the recorded results."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.fakes.fresh import Fresh

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"<!-- run[^\n]*-->\n```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the examples use: two videos and a few frames."""
    path = tmp_path_factory.mktemp("readme")
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 255, (20, 24, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    pictures = [np.ascontiguousarray(texture[i : i + 64, 3 * i : 3 * i + 96]) for i in range(20)]
    with av.open(str(path / "dance.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    (path / "other.mp4").write_bytes((path / "dance.mp4").read_bytes())
    (path / "frames").mkdir()
    for number, picture in enumerate(pictures[:3]):
        Image.fromarray(picture).save(path / "frames" / f"{number}.png")
    return path


@pytest.mark.early
def test_commands_and_code(folder: Path, fresh: Fresh) -> None:
    commands, code = blocks("sh"), blocks("python")
    assert len(commands) == len(code) == 1
    for line in commands[0].splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "flowreel"
        module = "flowreel" if arguments[0] != "demo" else "tests.fakes.short_demo"
        exit_code, said = fresh(module, arguments, folder, os.environ | {"PYTHONPATH": str(ROOT)})
        assert exit_code == 0, f"{line}\n{said}"
    made = ("dance.zarr", "dance-flow.mp4", "part.zarr", "flows/000001.flo", "shown/flow.mp4", "out/other.zarr")
    made += ("colour/000001.flo.png", "colour/000000.flo.mp4", "kitti/000004.kitti.png", "shown/comparison.png")
    for name in made:
        assert (folder / name).exists(), name
    (folder / "readme_code.py").write_text(code[0])
    exit_code, said = fresh("readme_code", [], folder)
    assert exit_code == 0, said
    assert "(19, 2, 64, 96)" in said


def test_tables_are_the_latest_results() -> None:
    sys.path.insert(0, str(ROOT))  # benchmarks are not installed, only importable from the root
    try:
        from benchmarks.tables import PAGES, filled
    finally:
        sys.path.remove(str(ROOT))
    assert README.count("<!-- table: ") >= 4
    for page in PAGES:
        text = page.read_text()
        assert filled(text, page) == text, page.name
