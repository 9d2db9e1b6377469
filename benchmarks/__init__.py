"""Named measurements. Never installed; run from the repository root: ``python -m benchmarks NAME``."""
