"""``python -m benchmarks gpu --out DIR``: checks, then times, everything that needs a GPU, unattended.

Every part (``parts.py``) runs in its own process with a time limit, and writes its findings as it makes them: a part
that crashes, hangs or lacks a package loses only its remaining work, never the findings of others.
``docs/gpu-checks.md`` says how to use it.
"""
