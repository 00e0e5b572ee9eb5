"""The arms of the benchmark: every way of making rare types heavier that CFGen is held against."""
