"""Run every GPU benchmark: `python -m benchmarks.gpu`."""

from __future__ import annotations

from benchmarks.gpu.linear import main

if __name__ == "__main__":
    main()
