"""``python -m benchmarks gpu --out DIR``: all that only a GPU can show, checked and then timed, unattended.

Every part (``parts.py``) runs in a process of its own with a time limit, and writes what it has found as it finds it:
a part that crashes, hangs or lacks a package loses what it had left to do, never what others found.
``docs/gpu-checks.md`` says how to use it.
"""
