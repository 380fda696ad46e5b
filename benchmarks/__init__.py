"""Every claim of speed or memory, side by side with what it is compared with: `python -m benchmarks.run`."""
