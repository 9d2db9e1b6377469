"""``python -m tests.fakes.short_demo``: ``flowreel`` with a demonstration of few frames."""

from __future__ import annotations

from dataclasses import replace

from flowreel.engine import demo
from flowreel.engine.cli import main

if __name__ == "__main__":
    demo.SCENE = replace(demo.SCENE, frames=3)
    main()
