"""Benchmarks for asv: ``asv run --config benchmarks/speed/asv.conf.json``."""
