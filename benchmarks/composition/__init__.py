"""Whether attributes compose: guidance, unseen combinations, depth, dispersion, translation.

    python -m benchmarks composition --data kang --out composition/

Every part is one kind of measurement with one seed, and is kept as it is finished; the same
command goes on where it stopped, and prints the tables of all that is there.

The parts that share a trained model are done together: `whole` (guidance and translation, a model
of all cells with donors), `unseen` (a model without some combinations of type and donor), `depth`
(a model whose totals depend on the donor) and `dispersion` (models of training donors).
"""
