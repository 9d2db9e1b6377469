"""The published FlowNet2 checkpoints: their sources, sizes, sha256 and licence.

They were trained by the authors of FlowNet 2.0 and converted by NVIDIA for flownet2-pytorch. None is shipped;
``flowreel weights download`` puts them into ``cache_folder("weights")``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from flowreel.engine.data import JSON
from flowreel.engine.errors import UsageError
from flowreel.engine.files import cache_folder

BASELINE = "baseline"  # the shipped weights' name; there is nothing to download
RESEARCH_ONLY = "research only; commercial use needs the consent of FlowNet2's authors (Ilg et al., CVPR 2017)"
LICENCE_URL = "https://drive.google.com/file/d/1R5byo1qLKAFfkPRTM_Ozc8xQoYX7Igv4/view"
LICENCE_TEXT = f"""\
These weights were trained by the authors of FlowNet 2.0 and converted by NVIDIA. They may be used for research only and
come without any warranty; commercial use needs the authors' consent beforehand. Work that uses them cites: E. Ilg,
N. Mayer, T. Saikia, M. Keuper, A. Dosovitskiy, T. Brox, "FlowNet 2.0: Evolution of Optical Flow Estimation with Deep
Networks", CVPR 2017. The licence itself, which is what counts: {LICENCE_URL}"""


@dataclass(frozen=True)
class Source:
    """One place to download a checkpoint from."""

    label: str  # for messages
    url: str
    asks_first: bool = False  # may first answer with a page that asks for confirmation, as Drive does
    page: str = ""  # to open in a browser when all else fails; empty: the url


@dataclass(frozen=True)
class Checkpoint:
    """One published file."""

    name: str  # as --weights and download accept it, in any case, with or without hyphens
    model: str  # the network it holds
    file_name: str
    about_bytes: int  # as in flownet2-pytorch's README, in whole MiB
    size_bytes: int | None  # exact; None: not known from any source
    sha256: str | None  # None: likewise
    sources: tuple[Source, ...]  # in the order they are tried
    licence: str = RESEARCH_ONLY

    @property
    def most_bytes(self) -> int:
        """A file larger than this is not the checkpoint."""
        return 2 * self.about_bytes if self.size_bytes is None else self.size_bytes

    @property
    def path(self) -> Path:
        """The download's path, whether or not it exists."""
        return cache_folder("weights") / self.file_name

    @property
    def downloaded(self) -> bool:
        """Whether ``path`` is a file, of the right size if that is known; the sha256 is checked when it is read."""
        return self.path.is_file() and self.size_bytes in (None, self.path.stat().st_size)


def _drive(file_id: str, age: str) -> Source:
    return Source(
        f"Google Drive ({age} link {file_id})",
        f"https://drive.google.com/uc?export=download&confirm=t&id={file_id}",
        asks_first=True,
        page=f"https://drive.google.com/file/d/{file_id}/view",
    )


def _on_drive(
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


# Drive ids: from NVIDIA/flownet2-pytorch's README since March 2026, then from the one before. Exact sizes and sha256:
# from a single source, the Git LFS pointers of a repository that kept copies. Files elsewhere are listed only if
# identical; ptlflow's, for example, hold the same numbers in a different file.
CHECKPOINTS = (
    _on_drive(
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
    _on_drive(
        "FlowNet2-C",
        149,
        "1elgK52N4EQVi5ywN2Ky4qWvweLh8RE2U",
        "1BFT6b7KgKJC8rA59RmOVAXRM_S7aSfKE",
        156706366,
        "e9f93999ae5f5ed1ba3452b5dc948c38146b48be028ea090d6ba3b8c1885b63f",
    ),
    _on_drive(
        "FlowNet2-CS",
        297,
        "1KyGXiQCiokoMpIFqOYbfA-I3MDU-FsnV",
        "1iBJ1_o7PloaINpa8m7u_7TsLCX0Dt_jS",
        311493223,
        "8becbe035e16285163dec44fa8534184d0fdc1b271cbb527f7636962e9828245",
    ),
    _on_drive(
        "FlowNet2-CSS",
        445,
        "17FQOz8ec2pXBOiV4zqnkVwjRRyUyymQY",
        "157zuzVf4YMN6ABAQgZc8rRmR5cgWzSu8",
        466279904,
        "c9048946be17e50464c3e2929a2fbce619528b11f9b19f952e378c8b70808dba",
    ),
    _on_drive("FlowNet2-CSS-ft-sd", 445, "1AKt20xmjh2Y3Rb-GO5bLs9Ux1tu2AVAt", "1R5xafCIzJCXc8ia4TGfC65irmTNiMg6u"),
    _on_drive(
        "FlowNet2-S",
        148,
        "1FAjmmNMCzKH9PidATQSOX-Z1NHbvg0mK",
        "1V61dZjFomwlynwlYklJHC-TLfdFom3Lg",
        154710631,
        "f6fe1f93c65eef5163104f5682e4e9908b66d174353ed6a3944dac41103e4921",
    ),
    _on_drive("FlowNet2-SD", 173, "1QiT0bxXF04qLWc3ml0kPPlwmHwp24r75", "1QW03eyYG_vD-dT-Mx4wopYvtPu_msTKn"),
)


def find_checkpoint(name: str) -> Checkpoint | None:
    """The checkpoint of that name, in any case and with or without hyphens; None when there is none."""
    return next((known for known in CHECKPOINTS if _bare(known.name) == _bare(name)), None)


def checkpoint(name: str) -> Checkpoint:
    """Like ``find_checkpoint``, but raises UsageError listing the known names."""
    known = find_checkpoint(name)
    if known is None:
        names = ", ".join(known.name for known in CHECKPOINTS)
        why = "is shipped with flowreel: nothing to download" if name == BASELINE else "is not one of the checkpoints"
        raise UsageError(f"{name!r} {why}; there are {names}")
    return known


def checkpoint_of(sha256: str) -> Checkpoint | None:
    """The checkpoint with this sha256; None when it is none of those whose hash is known."""
    return next((known for known in CHECKPOINTS if known.sha256 == sha256), None)


def published() -> list[dict[str, JSON]]:
    """The table as plain values.

    Each has ``name``, ``model``, ``licence``, ``sha256`` and ``size_bytes`` (None: not known), ``about_bytes``,
    ``shipped``, ``downloaded``, and ``path``, that of the download (None: not downloaded).
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
    """In hexadecimal. Reads the file in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bare(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
