"""The AnnData door: what is kept, what is filled in, what is refused."""

from __future__ import annotations

import copy
import re
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from cfgen_augment import CFGen, __version__, augment
from cfgen_augment.augmentation import summary
from cfgen_augment.files import read_h5ad

pytestmark = pytest.mark.filterwarnings("ignore:Dropped what does not hold:UserWarning")


@pytest.fixture(scope="module")
def model(cells):
    """Quickly trained, on the donors as well; its cells need not be good here."""
    return CFGen(n_latent=4, max_epochs=2, random_state=0, device="cpu").fit(
        cells.X, cells.labels, covariates={"donor": cells.donors}
    )


@pytest.fixture
def plain(cells):
    """Nothing but counts and labels, so that nothing is dropped."""
    return anndata.AnnData(
        X=cells.X.copy(),
        obs=pd.DataFrame({"cell_type": cells.labels}, index=[f"c{i}" for i in range(150)]),
    )


def forbid(what):
    """Stands in for a function that must not be reached."""
    return lambda *_, **__: pytest.fail(what)


def dense(X):
    return X.toarray() if sparse.issparse(X) else np.asarray(X)


def assert_same(a, b):
    """Equal in every slot, dtypes and order included."""
    pd.testing.assert_frame_equal(a.obs, b.obs)
    pd.testing.assert_frame_equal(a.var, b.var)
    assert type(a.X) is type(b.X)
    assert a.X.dtype == b.X.dtype
    for slot in ("layers", "obsm", "obsp", "varm", "varp"):
        left, right = getattr(a, slot), getattr(b, slot)
        assert set(left) == set(right)
        for key in left:
            np.testing.assert_array_equal(dense(left[key]), dense(right[key]))
    np.testing.assert_array_equal(dense(a.X), dense(b.X))
    assert (a.raw is None) == (b.raw is None)
    np.testing.assert_equal(dict(a.uns), dict(b.uns))


# ------------------------------------------------------------------ what comes out


def test_returns_a_new_object_and_leaves_the_input_alone(adata, model):
    before = adata.copy()
    result = augment(adata, "cell_type", generator=model, random_state=0)
    assert_same(adata, before)
    assert result is not adata
    assert not result.is_view
    result.X.data[:] = -1
    result.uns["nested"]["values"][:] = -1
    result.varm["PCs"][:] = -1
    result.varp["correlation"].data[:] = -1
    result.var["highly_variable"] = False
    assert_same(adata, before)


def test_real_cells_come_first_and_are_identical(adata, model):
    result = augment(adata, "cell_type", generator=model, random_state=0)
    n = adata.n_obs
    assert result.n_obs == 2 * n
    assert result.X.format == "csr"
    assert result.X.dtype == adata.X.dtype
    np.testing.assert_array_equal(dense(result.X[:n]), dense(adata.X))
    assert list(result.obs_names[:n]) == list(adata.obs_names)
    assert result.obs_names.name == "barcode"
    assert result.obs["is_synthetic"].dtype == bool
    np.testing.assert_array_equal(result.obs["is_synthetic"], np.arange(2 * n) >= n)
    for column in adata.obs:
        real = pd.Series(result.obs[column].iloc[:n])
        pd.testing.assert_series_equal(real, adata.obs[column], check_dtype=False)
    assert list(result.obs) == [*adata.obs, "is_synthetic"]
    new = dense(result.X[n:])
    assert (new >= 0).all()
    assert (new == np.floor(new)).all()
    assert new.sum() > 0


def test_allocation_reaches_the_target_with_rare_types_first(adata, model):
    result = augment(adata, "cell_type", target_size=200, generator=model, random_state=0)
    new = result.obs["cell_type"][150:].value_counts()
    assert result.n_obs == 200
    assert new["NK"] > new["T"] > new["B"] > 0
    assert new["unused"] == 0


@pytest.mark.parametrize(
    ("column", "dtype"),
    [
        ("integer", "Int32"),
        ("unsigned", "UInt8"),
        ("boolean", "boolean"),
        ("real", "float32"),
        ("text", "object"),
        ("nullable", "Int16"),
        ("stage", pd.CategoricalDtype(["early", "late"], ordered=True)),
    ],
)
def test_columns_that_were_not_generated_are_missing(adata, model, column, dtype):
    result = augment(adata, "cell_type", generator=model, random_state=0)
    assert result.obs[column].dtype == dtype
    assert result.obs[column][150:].isna().all()
    assert result.obs[column][1:150].notna().all()


def test_without_new_cells_no_dtype_changes(adata, model):
    result = augment(adata, "cell_type", target_size=1.0, generator=model)
    pd.testing.assert_frame_equal(result.obs.drop(columns="is_synthetic"), adata.obs)
    assert not result.obs["is_synthetic"].any()
    assert result.uns["cfgen_augment"]["n_synthetic"].sum() == 0


@pytest.mark.parametrize(
    ("convert", "dtype"),
    [
        (lambda codes: np.array(["B", "NK", "T"], dtype=object)[codes], "object"),
        (lambda codes: pd.array(np.array(["B", "NK", "T"])[codes], dtype="string"), "string"),
        (lambda codes: codes.astype(np.int16), "int16"),
        (lambda codes: pd.array(codes, dtype="Int64"), "Int64"),
        (lambda codes: codes > 0, "bool"),
        (lambda codes: pd.array(codes > 0, dtype="boolean"), "boolean"),
        (lambda codes: codes.astype(np.float32), "float32"),
        (
            lambda codes: pd.Categorical(codes, categories=[2, 7, 0, 1], ordered=True),
            pd.CategoricalDtype([2, 7, 0, 1], ordered=True),
        ),
    ],
    ids=["object", "string", "int", "Int64", "bool", "boolean", "float", "ordered-category"],
)
def test_labels_keep_their_dtype(plain, cells, convert, dtype):
    plain.obs["cell_type"] = convert(np.unique(cells.labels, return_inverse=True)[1])
    result = augment(plain, "cell_type", max_epochs=1, target_size=160, random_state=0)
    assert result.obs["cell_type"].dtype == dtype
    assert result.obs["cell_type"].notna().all()
    assert set(result.obs["cell_type"][150:]) <= set(plain.obs["cell_type"])
    assert result.obs["cell_type"][150:].nunique() > 1


def test_donors_and_batches_are_those_of_real_cells_of_the_type(adata):
    # Donors are told apart by type, so a donor from another type would show.
    adata.obs["donor"] = pd.Categorical(adata.obs["cell_type"].astype(str) + " donor")
    adata.obs["lane"] = np.where(adata.obs["cell_type"] == "B", 1, 2)
    result = augment(
        adata, "cell_type", donor_key="donor", batch_key="lane", max_epochs=1, random_state=0
    )
    new = result.obs[150:]
    assert (new["donor"].astype(str) == new["cell_type"].astype(str) + " donor").all()
    assert (new["lane"] == np.where(new["cell_type"] == "B", 1, 2)).all()
    assert result.obs["donor"].dtype == adata.obs["donor"].dtype
    assert result.obs["lane"].dtype == adata.obs["lane"].dtype


def test_names_stay_unique_whatever_exists(plain, model):
    plain.obs_names = ["synthetic-0", "synthetic-new-3", *plain.obs_names[2:]]
    result = augment(plain, "cell_type", generator=model)
    assert result.obs_names.is_unique
    assert list(result.obs_names[:2]) == ["synthetic-0", "synthetic-new-3"]
    assert all(name.startswith("synthetic") for name in result.obs_names[150:])


def test_keeps_what_is_per_gene_and_uns(adata, model):
    result = augment(adata, "cell_type", generator=model)
    pd.testing.assert_frame_equal(result.var, adata.var)
    assert result.var_names.name == "symbol"
    np.testing.assert_array_equal(result.varm["PCs"], adata.varm["PCs"])
    np.testing.assert_array_equal(dense(result.varp["correlation"]), np.eye(40))
    assert result.uns["cell_type_colors"] == adata.uns["cell_type_colors"]
    assert list(result.obs["cell_type"].cat.categories) == ["T", "unused", "NK", "B"]
    np.testing.assert_array_equal(result.uns["nested"]["values"], np.arange(3))


def test_drops_what_does_not_hold_and_names_all_of_it(adata, model):
    with pytest.warns(UserWarning, match="Dropped what does not hold") as caught:
        result = augment(adata, "cell_type", generator=model)
    assert caught[0].filename == __file__
    message = str(caught[0].message)
    for dropped in (
        "layers['scaled']",
        "obsm['X_pca']",
        "obsp['connectivities']",
        "uns['neighbors']",
        "raw",
    ):
        assert dropped in message
    assert caught[0].filename == __file__
    assert list(result.layers) == ["counts"]  # equal to X, and so known for generated cells
    assert abs(result.layers["counts"] - result.X).sum() == 0
    assert not result.obsm
    assert not result.obsp
    assert result.raw is None
    assert "neighbors" not in result.uns


def test_drops_nothing_silently_or_needlessly(plain, model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        augment(plain, "cell_type", generator=model)


def test_layer_is_used_kept_and_becomes_x(adata, model):
    adata.X = adata.X.log1p()
    with pytest.warns(UserWarning, match=r"X \(replaced by the counts\)") as caught:
        result = augment(adata, "cell_type", layer="counts", generator=model, random_state=0)
    assert "layers['counts']" not in str(caught[0].message)
    assert list(result.layers) == ["counts"]
    np.testing.assert_array_equal(dense(result.X), dense(result.layers["counts"]))
    np.testing.assert_array_equal(dense(result.X[:150]), dense(adata.layers["counts"]))
    result.X.data[:] = -1  # as normalising in place would
    assert dense(result.layers["counts"]).min() == 0


def test_layer_works_without_x(plain, model):
    counts = plain.X
    without = anndata.AnnData(obs=plain.obs, var=plain.var, layers={"counts": counts})
    result = augment(without, "cell_type", layer="counts", generator=model, random_state=0)
    expected = augment(plain, "cell_type", generator=model, random_state=0)
    np.testing.assert_array_equal(dense(result.X), dense(expected.X))


@pytest.mark.parametrize(
    ("container", "kind"),
    [
        (lambda X: X.toarray(), np.ndarray),
        (sparse.csr_matrix, sparse.csr_matrix),
        (sparse.csc_matrix, sparse.csc_matrix),
        (sparse.csr_array, sparse.csr_array),
    ],
    ids=["dense", "csr", "csc", "csr-array"],
)
def test_container_and_values_do_not_depend_on_each_other(plain, model, container, kind):
    expected = augment(plain, "cell_type", generator=model, random_state=3)
    plain.X = container(plain.X)
    result = augment(plain, "cell_type", generator=model, random_state=3)
    assert isinstance(result.X, kind)
    np.testing.assert_array_equal(dense(result.X), dense(expected.X))


def test_views_give_what_their_copies_give(adata, model):
    view = adata[20:]
    expected = augment(view.copy(), "cell_type", generator=model, random_state=0)
    result = augment(view, "cell_type", generator=model, random_state=0)
    assert view.is_view
    assert not result.is_view
    assert_same(result, expected)
    result.uns["nested"]["values"][:] = -1
    assert adata.uns["nested"]["values"].min() == 0


@pytest.mark.parametrize("container", [sparse.csr_matrix, np.asarray], ids=["csr", "dense"])
@pytest.mark.parametrize("part", [slice(None), slice(20, None)], ids=["whole", "view"])
def test_backed_files_are_read_and_not_changed(plain, model, tmp_path, container, part):
    file = tmp_path / "backed.h5ad"
    plain.X = container(plain.X.toarray())
    plain.write_h5ad(file)
    before = file.read_bytes()
    expected = augment(plain[part].copy(), "cell_type", generator=model, random_state=0)
    backed = anndata.read_h5ad(file, backed="r")
    result = augment(backed[part], "cell_type", generator=model, random_state=0)
    backed.file.close()
    assert not result.isbacked
    np.testing.assert_array_equal(dense(result.X), dense(expected.X))
    assert file.read_bytes() == before


def test_key_added_names_the_mark(plain, model):
    plain.obs["is_synthetic"] = "taken by something else"
    result = augment(plain, "cell_type", generator=model, key_added="generated")
    assert result.obs["generated"].sum() == 150
    assert result.obs["is_synthetic"][150:].isna().all()
    assert result.uns["cfgen_augment"]["key_added"] == "generated"


# ------------------------------------------------------------------ provenance


def test_provenance_says_what_was_done(adata, model):
    result = augment(
        adata,
        "cell_type",
        donor_key="donor",
        target_size=300,
        generator=model,
        solver="heun",
        guidance={"label": 1.5},
        random_state=7,
    )
    record = result.uns["cfgen_augment"]
    assert record["version"] == __version__
    assert record["seed"] == 7
    assert record["key_added"] == "is_synthetic"
    wanted = {
        "label_key": "cell_type",
        "donor_key": "donor",
        "target_size": 300,
        "sampling_strategy": "inverse-sqrt",
        "exponent": 0.5,
        "min_cells": 5,
        "covariates_from": "label",
        "generator": "CFGen",
        "solver": "heun",
        "guidance": "{'label': 1.5}",
        "n_latent": 4,  # the generator's, not the default that trained nothing
        "max_epochs": 2,
        "device": "cpu",
    }
    assert {name: record["parameters"][name] for name in wanted} == wanted
    assert "batch_key" not in record["parameters"]
    assert record["types"].tolist() == ["NK", "T", "B"]
    assert record["n_real"].tolist() == [12, 58, 80]
    new = result.obs["cell_type"][150:].value_counts()
    assert record["n_synthetic"].tolist() == [new[name] for name in ("NK", "T", "B")]


def test_seed_on_file_repeats_the_result(adata, tmp_path):
    file = tmp_path / "augmented.h5ad"
    options = {"donor_key": "donor", "max_epochs": 1, "target_size": 180}
    first = augment(adata, "cell_type", **options)
    first.write_h5ad(file)
    record = read_h5ad(file).uns["cfgen_augment"]
    again = augment(adata, "cell_type", **options, random_state=record["seed"])
    np.testing.assert_array_equal(dense(again.X), dense(first.X))
    assert again.obs["donor"].tolist() == first.obs["donor"].tolist()
    other = augment(adata, "cell_type", **options, random_state=int(record["seed"]) + 1)
    assert (dense(other.X) != dense(first.X)).any()


@pytest.mark.parametrize(
    "strategy", ["not majority", {"NK": 30}, lambda y: {"NK": 20}], ids=["name", "dict", "callable"]
)
def test_result_survives_a_file(adata, model, tmp_path, strategy):
    file = tmp_path / "augmented.h5ad"
    result = augment(
        adata, "cell_type", sampling_strategy=strategy, generator=model, guidance={"donor": 2.0}
    )
    expected = copy.deepcopy(result)
    result.write_h5ad(file)
    found = read_h5ad(file)
    np.testing.assert_array_equal(dense(found.X), dense(expected.X))
    assert list(found.obs_names) == list(expected.obs_names)
    for column in ("cell_type", "stage", "integer", "unsigned", "boolean", "nullable", "real"):
        pd.testing.assert_series_equal(found.obs[column], expected.obs[column], check_names=False)
    # Strings become categories on the way to the file, as for any AnnData; the values stay.
    for column in ("donor", "text"):
        left, right = found.obs[column].astype(object), expected.obs[column]
        np.testing.assert_array_equal(left.isna(), right.isna())
        assert left.dropna().tolist() == right.dropna().tolist()
    assert found.obs["is_synthetic"].dtype == bool
    record, wanted = found.uns["cfgen_augment"], expected.uns["cfgen_augment"]
    assert set(record) == set(wanted)
    assert record["parameters"] == wanted["parameters"]
    for name in ("types", "n_real", "n_synthetic"):
        assert record[name].tolist() == wanted[name].tolist()


def test_summary_is_rarest_first_and_adds_up(adata, model):
    table = summary(augment(adata, "cell_type", generator=model), "cell_type")
    assert table.index.tolist() == ["NK", "T", "B"]
    assert (table["real"] + table["synthetic"] == table["total"]).all()
    assert table["total"].sum() == 300
    np.testing.assert_allclose(table["% before"], [8.0, 38.67, 53.33])
    assert table["% after"].sum() == pytest.approx(100.0, abs=0.02)


# ------------------------------------------------------------------ models


def test_saved_model_gives_the_same_cells_without_training(plain, tmp_path, monkeypatch):
    options = {"target_size": 170, "random_state": 5}
    first = augment(plain, "cell_type", max_epochs=1, save_model=tmp_path / "model", **options)
    monkeypatch.setattr(CFGen, "fit", forbid("trained"))
    again = augment(plain, "cell_type", generator=tmp_path / "model", **options)
    np.testing.assert_array_equal(dense(again.X), dense(first.X))
    assert again.uns["cfgen_augment"]["parameters"]["generator"] == str(tmp_path / "model")
    assert again.uns["cfgen_augment"]["parameters"]["max_epochs"] == 1


@pytest.mark.parametrize("foreign", [True, False], ids=["foreign-files", "saved-model"])
def test_taken_save_model_is_refused_before_training(plain, model, tmp_path, monkeypatch, foreign):
    place = tmp_path / "model"
    if foreign:
        place.mkdir()
        (place / "thesis.txt").write_text("dear")
    else:
        model.save(place)
    monkeypatch.setattr(CFGen, "fit", forbid("trained"))
    with pytest.raises(FileExistsError, match="expected a new or empty directory"):
        augment(plain, "cell_type", save_model=place)


def test_save_model_under_a_file_is_refused_before_training(plain, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(CFGen, "fit", forbid("trained"))
    with pytest.raises(OSError, match="expected a place that can be written to"):
        augment(plain, "cell_type", save_model=tmp_path / "file" / "model")


# ------------------------------------------------------------------ what is refused


def _set(column, values):
    def change(adata):
        adata.obs[column] = values

    return change


def _duplicate_names(adata):
    adata.obs_names = ["same", "same", *adata.obs_names[2:]]


def _some_labels_missing(adata):
    adata.obs["cell_type"] = adata.obs["cell_type"].where(np.arange(150) > 3)


def _without_x(adata):
    del adata.X


def _normalise(adata):
    adata.X = adata.X.log1p()


def _permute_genes(adata):
    adata.var_names = list(adata.var_names[::-1])


def _nothing(adata):
    pass


BAD = [
    (_nothing, {"label_key": "celltype"}, KeyError, r"label_key.*obs \(cell_type, donor, .*'cellt"),
    (_nothing, {"donor_key": "patient"}, KeyError, r"donor_key.*cell_type, donor, .*'patient'"),
    (_nothing, {"batch_key": "lane"}, KeyError, r"batch_key.*cell_type, donor, .*'lane'"),
    (_nothing, {"layer": "raw"}, KeyError, r"layer: .*\(counts, scaled\); got 'raw'"),
    (_nothing, {"donor_key": "cell_type"}, ValueError, r"expected different columns of obs"),
    (_nothing, {"target_size": 100}, ValueError, r"at least the 150 cells already there"),
    (_nothing, {"device": "tpu"}, ValueError, r"device: expected 'auto', 'cpu'"),
    (_nothing, {"random_state": -1}, ValueError, r"random_state"),
    (_nothing, {"layer": "scaled"}, ValueError, r"got the fraction .*log-normalised"),
    (
        _normalise,
        {},
        ValueError,
        r"log-normalised; pass the raw counts \(for AnnData layer='counts'",
    ),
    (_without_x, {}, ValueError, r"no X at all\. Pass layer=, one of: counts, scaled"),
    (_duplicate_names, {}, ValueError, r"obs_names_make_unique"),
    (_set("is_synthetic", True), {}, ValueError, r"no column 'is_synthetic'.*key_added="),
    (_set("mark", 1), {"key_added": "mark"}, ValueError, r"no column 'mark'"),
    (_nothing, {"key_added": "cell_type"}, ValueError, r"no column 'cell_type'"),
    (_some_labels_missing, {}, ValueError, r"obs\['cell_type'\]: .*4 of 150 are missing"),
    (_set("donor", None), {"donor_key": "donor"}, ValueError, r"obs\['donor'\]: .*150 of 150"),
    (_set("cell_type", "B"), {}, ValueError, r"at least two classes; got one class, 'B'"),
]


@pytest.mark.parametrize(
    ("change", "options", "error", "match"),
    BAD,
    ids=[re.sub(r"\W+", "-", f"{c.__name__} {sorted(o)}").strip("-_") for c, o, _, _ in BAD],
)
def test_bad_input_is_refused_before_training(adata, monkeypatch, change, options, error, match):
    change(adata)
    monkeypatch.setattr("cfgen_augment.model.train_autoencoder", forbid("trained"))
    with pytest.raises(error) as caught:
        augment(adata, **{"label_key": "cell_type"} | options)
    # A KeyError's own text is quoted and escaped; the message itself is its argument.
    assert re.search(match, caught.value.args[0])


@pytest.mark.parametrize("other", [None, np.ones((3, 2)), pd.DataFrame({"a": [1, 2]})])
def test_anything_but_anndata_is_refused(other):
    with pytest.raises(
        TypeError, match=r"expected AnnData, MuData or a mapping.*; got .*use CFGenSampler"
    ):
        augment(other, "cell_type")


def test_genes_in_another_order_are_refused(adata, tmp_path):
    augment(adata, "cell_type", max_epochs=1, save_model=tmp_path / "model")
    _permute_genes(adata)
    with pytest.raises(ValueError, match="in another order"):
        augment(adata, "cell_type", generator=tmp_path / "model")


def test_unknown_path_of_a_model_is_refused(plain, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is not there"):
        augment(plain, "cell_type", generator=tmp_path / "absent")


def test_augmented_data_are_not_learned_from_as_if_real(adata, model):
    with pytest.warns(UserWarning, match="Dropped"):
        augmented = augment(adata, "cell_type", generator=model)
    with pytest.raises(ValueError, match="not augmented before"):
        augment(augmented, "cell_type", generator=model, key_added="again")


def test_stale_note_of_a_transformation_goes_with_it(adata, model):
    adata = adata.copy()
    adata.uns["log1p"] = {"base": 2.0}
    with pytest.warns(UserWarning, match=r"uns\['log1p'\]"):
        result = augment(adata, "cell_type", generator=model, layer="counts")
    assert "log1p" not in result.uns


def test_a_summary_of_other_data_says_what_is_missing(adata):
    with pytest.raises(KeyError, match="there are no 'cell_type' and 'is_synthetic'"):
        summary(adata, "cell_type")


def test_real_cells_taken_out_can_be_augmented_again(adata, model):
    augmented = augment(adata, "cell_type", generator=model)
    real = augmented[~augmented.obs["is_synthetic"].to_numpy()].copy()
    with pytest.raises(ValueError, match=r"delete that entry and the column obs\['is_synthetic'\]"):
        augment(real, "cell_type", generator=model)
    del real.uns["cfgen_augment"], real.obs["is_synthetic"]
    again = augment(real, "cell_type", generator=model)
    assert again.n_obs == augmented.n_obs
