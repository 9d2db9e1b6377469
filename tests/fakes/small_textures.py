"""``python -m tests.fakes.small_textures ...``: ``benchmarks.gpu.one`` with small textures: large ones take seconds."""

from __future__ import annotations

import sys

from benchmarks.gpu.one import main
from flowreel.engine.scenes import textures

SIZE = 128  # px

if __name__ == "__main__":
    made = textures.make_texture
    textures.make_texture = lambda kind, seed, size: made(kind, seed, min(size, SIZE))
    sys.exit(main(*sys.argv[1:]))
