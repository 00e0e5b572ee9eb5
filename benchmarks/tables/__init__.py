"""The tables and figures of the CFGen paper (arXiv 2407.11734), measured again.

Cells are split at random within types into training and held-out cells, once per seed. Every model
is trained on the training cells and makes as many cells of each type as are held out. Both sides
are projected on principal components of the centred held-out cells and compared there, and so are
as many training cells, which is the floor.
"""
