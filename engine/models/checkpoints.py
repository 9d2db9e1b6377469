"""The published FlowNet2 checkpoints: where each is to be had, how large it is, its sha256, and under what terms.

They were trained by the authors of FlowNet 2.0 and converted by NVIDIA for flownet2-pytorch. None is shipped; what
``flowreel weights download`` fetched lies in ``cache_folder("weights")``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from flowreel.engine.data import JSON
from flowreel.engine.errors import UsageError
from flowreel.engine.files import cache_folder

BASELINE = "baseline"  # the shipped weights' name; they are no download
RESEARCH_ONLY = "research only; commercial use needs the consent of FlowNet2's authors (Ilg et al., CVPR 2017)"
LICENCE_URL = "https://drive.google.com/file/d/1R5byo1qLKAFfkPRTM_Ozc8xQoYX7Igv4/view"
LICENCE_TEXT = f"""\
These weights were trained by the authors of FlowNet 2.0 and converted by NVIDIA. They may be used for research only and
come without any warranty; commercial use needs the authors' consent beforehand. Work that uses them cites: E. Ilg,
N. Mayer, T. Saikia, M. Keuper, A. Dosovitskiy, T. Brox, "FlowNet 2.0: Evolution of Optical Flow Estimation with Deep
Networks", CVPR 2017. The licence itself, which is what counts: {LICENCE_URL}"""


@dataclass(frozen=True)
class Source:
    """One place a checkpoint can be had from."""

    label: str  # for messages
    url: str
    asks_first: bool = False  # may answer with a page that wants a click before it gives the file, as Drive does
    page: str = ""  # what to open in a browser when all else fails; empty: the url


@dataclass(frozen=True)
class Checkpoint:
    """One published file."""

    name: str  # what --weights and download take, in any case, with or without its hyphens
    model: str  # the network it holds
    file_name: str
    about_bytes: int  # as its README tells, in whole MiB
    size_bytes: int | None  # exactly; None: nobody has written it down
    sha256: str | None  # None: likewise
    sources: tuple[Source, ...]  # in the order they are tried
    licence: str = RESEARCH_ONLY

    @property
    def most_bytes(self) -> int:
        """More than this is not the file."""
        return 2 * self.about_bytes if self.size_bytes is None else self.size_bytes

    @property
    def path(self) -> Path:
        """Where its download lies, or would."""
        return cache_folder("weights") / self.file_name

    @property
    def downloaded(self) -> bool:
        """Whether a file that may be it is there; its sha256 is checked when it is read."""
        return self.path.is_file() and self.size_bytes in (None, self.path.stat().st_size)


def _drive(file_id: str, age: str) -> Source:
    return Source(
        f"Google Drive ({age} link {file_id})",
        f"https://drive.google.com/uc?export=download&confirm=t&id={file_id}",
        asks_first=True,
        page=f"https://drive.google.com/file/d/{file_id}/view",
    )


def _published(
    name: str,
    about_mib: int,
    drive: str,
    drive_before: str,
    size_bytes: int | None = None,
    sha256: str | None = None,
    others: tuple[Source, ...] = (),
) -> Checkpoint:
    model = name.removesuffix("-ft-sd").replace("-", "")
    sources = (_drive(drive, "new"), _drive(drive_before, "old"), *others)
    return Checkpoint(name, model, f"{name}_checkpoint.pth.tar", about_mib << 20, size_bytes, sha256, sources)


# Drive ids: README of NVIDIA/flownet2-pytorch since March 2026, then the one before it. Exact sizes and sha256: one
# source, the Git-LFS pointers of a repository that kept copies. Files elsewhere are listed only where they are the
# same file; ptlflow's, say, are the same numbers in another one.
CHECKPOINTS = (
    _published(
        "FlowNet2",
        620,
        "1LLYdnObBYzs7rDYYUCGscuC2nwO7y85I",
        "1hF8vS6YeHkx3j2pfCeQqqZGwA_PJq_Da",
        650102505,
        "bc30f54f76aa4c726faada81c9fe5e62da22bfe467f1d65bacd613ba6be53e73",
        (
            Source(
                "Hugging Face (RaphaelLiu/EvalCrafter-Models)",
                "https://huggingface.co/RaphaelLiu/EvalCrafter-Models/resolve/main/FlowNet2_checkpoint.pth.tar",
                page="https://huggingface.co/RaphaelLiu/EvalCrafter-Models/tree/main",
            ),
        ),
    ),
    _published(
        "FlowNet2-C",
        149,
        "1elgK52N4EQVi5ywN2Ky4qWvweLh8RE2U",
        "1BFT6b7KgKJC8rA59RmOVAXRM_S7aSfKE",
        156706366,
        "e9f93999ae5f5ed1ba3452b5dc948c38146b48be028ea090d6ba3b8c1885b63f",
    ),
    _published(
        "FlowNet2-CS",
        297,
        "1KyGXiQCiokoMpIFqOYbfA-I3MDU-FsnV",
        "1iBJ1_o7PloaINpa8m7u_7TsLCX0Dt_jS",
        311493223,
        "8becbe035e16285163dec44fa8534184d0fdc1b271cbb527f7636962e9828245",
    ),
    _published(
        "FlowNet2-CSS",
        445,
        "17FQOz8ec2pXBOiV4zqnkVwjRRyUyymQY",
        "157zuzVf4YMN6ABAQgZc8rRmR5cgWzSu8",
        466279904,
        "c9048946be17e50464c3e2929a2fbce619528b11f9b19f952e378c8b70808dba",
    ),
    _published("FlowNet2-CSS-ft-sd", 445, "1AKt20xmjh2Y3Rb-GO5bLs9Ux1tu2AVAt", "1R5xafCIzJCXc8ia4TGfC65irmTNiMg6u"),
    _published(
        "FlowNet2-S",
        148,
        "1FAjmmNMCzKH9PidATQSOX-Z1NHbvg0mK",
        "1V61dZjFomwlynwlYklJHC-TLfdFom3Lg",
        154710631,
        "f6fe1f93c65eef5163104f5682e4e9908b66d174353ed6a3944dac41103e4921",
    ),
    _published("FlowNet2-SD", 173, "1QiT0bxXF04qLWc3ml0kPPlwmHwp24r75", "1QW03eyYG_vD-dT-Mx4wopYvtPu_msTKn"),
)


def find_checkpoint(name: str) -> Checkpoint | None:
    """The checkpoint of that name, in any case and with or without hyphens; None when there is none."""
    return next((known for known in CHECKPOINTS if _bare(known.name) == _bare(name)), None)


def checkpoint(name: str) -> Checkpoint:
    """The same. Raises UsageError listing the names there are."""
    known = find_checkpoint(name)
    if known is None:
        names = ", ".join(known.name for known in CHECKPOINTS)
        why = "is shipped with flowreel: nothing to download" if name == BASELINE else "is none of the checkpoints"
        raise UsageError(f"{name!r} {why}; there are {names}")
    return known


def checkpoint_of(sha256: str) -> Checkpoint | None:
    """The checkpoint a file with this sha256 is; None when it is none of those whose hash is known."""
    return next((known for known in CHECKPOINTS if known.sha256 == sha256), None)


def published() -> list[dict[str, JSON]]:
    """The table in plain values.

    Each has ``name``, ``model``, ``licence``, ``sha256`` and ``size_bytes`` (None: nobody has written them down),
    ``about_bytes``, ``shipped``, ``downloaded``, and ``path``, where it is downloaded to.
    """
    return [
        {
            "name": known.name,
            "model": known.model,
            "licence": known.licence,
            "sha256": known.sha256,
            "size_bytes": known.size_bytes,
            "about_bytes": known.about_bytes,
            "shipped": False,
            "downloaded": known.downloaded,
            "path": str(known.path) if known.downloaded else None,
        }
        for known in CHECKPOINTS
    ]


def file_sha256(path: Path) -> str:
    """In hexadecimal, reading a little at a time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bare(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
