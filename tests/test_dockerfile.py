"""What can be checked of the Dockerfile without building it. It has not been built yet, and says so itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "Dockerfile").read_text()


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) in order, with continued lines joined and comments removed."""
    lines = [line for line in TEXT.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def given(instruction: str) -> list[str]:
    return [rest for word, rest in instructions() if word == instruction]


def is_ignored(path: str) -> bool:
    """Whether .dockerignore excludes the path; the last pattern that matches decides."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if line and not line.startswith("#") and (fnmatch(path, pattern) or fnmatch(Path(path).name, pattern)):
            ignored = not line.startswith("!")
    return ignored


def test_lint() -> None:
    hadolint = shutil.which("hadolint", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]))
    assert hadolint is not None, "the tests' extra brings it"
    done = subprocess.run([hadolint, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert (done.stdout + done.stderr, done.returncode) == ("", 0)


def test_it_runs_on_cuda_as_a_user_with_the_video_libraries() -> None:
    (base,) = given("FROM")
    assert re.fullmatch(r"nvidia/cuda:[\d.]+-runtime-ubuntu[\d.]+", base)
    assert given("USER")[-1] not in ("root", "0")
    (environment,) = given("ENV")
    capabilities = re.search(r"NVIDIA_DRIVER_CAPABILITIES=(\S+)", environment)
    assert capabilities is not None
    assert set(capabilities[1].split(",")) == {"compute", "utility", "video"}
    after = [word for word, _ in instructions()][[word for word, _ in instructions()].index("USER") :]
    assert "RUN" not in after  # everything is installed as root, so the user cannot change it


def test_whoever_runs_it_may_write_to_its_caches() -> None:
    """With ``docker run --user`` any user may run it, and the home folder is then ``/``, which is not writable."""
    (environment,) = given("ENV")
    (made,) = (re.search(r"mkdir --mode 1777 ((?:/\S+ )+)", rest) for rest in given("RUN") if "useradd" in rest)
    assert made is not None
    for name in ("XDG_CACHE_HOME", "CUPY_CACHE_DIR"):
        folder = re.search(rf"\b{name}=(\S+)", environment)
        assert folder is not None
        assert folder[1] in made[1].split()


def test_it_copies_what_the_package_is_made_of_and_what_is_not_ignored() -> None:
    copied = [source for arguments in given("COPY") for source in arguments.split()[:-1]]
    assert all((ROOT / source).exists() and not is_ignored(source) for source in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {folder.split("/")[0] for folder in project["tool"]["setuptools"]["package-dir"].values()}
    assert folders | {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]} <= set(
        copied
    )


@pytest.mark.parametrize("path", [".git", ".venv", "tests", "benchmarks", "out.zarr", "engine/__pycache__"])
def test_nothing_else_is_sent_to_the_builder(path: str) -> None:
    assert is_ignored(path)


def test_the_extra_is_there_and_its_cuda_is_the_bases() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "'.[cuda]'" in TEXT
    major = re.search(r"cuda:(\d+)", given("FROM")[0])
    assert major is not None
    assert any(f"cupy-cuda{major[1]}x" in needed for needed in extras["cuda"])


def test_it_says_that_nobody_has_built_it() -> None:
    assert "not been built nor run yet" in TEXT
