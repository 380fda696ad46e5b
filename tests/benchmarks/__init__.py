"""The benchmarks' own machinery."""
