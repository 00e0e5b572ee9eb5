"""scGPT (Cui et al., Nature Methods 2024) in plain torch: frozen embeddings, pretraining.

Reads and writes the official checkpoint format. Nothing here needs the ``scgpt`` package,
flash-attn or torchtext; the tests prove equality against that package where it is installed.
"""
