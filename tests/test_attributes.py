"""Categories to codes and back, and what is said about values that do not fit."""

from __future__ import annotations

import json
import time

import numpy as np
import pandas as pd
import pytest

from cfgen_augment.attributes import Attributes, check_attribute, check_feature_names


@pytest.fixture
def attributes() -> Attributes:
    return Attributes.fit(
        {"label": np.array(["T", "B", "T"]), "donor": np.array([7, 3, 3]), "new": np.array(["n"])}
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param(["B", "T"], ["B", "T"], id="list"),
        pytest.param(np.array([[3], [1]]), [3, 1], id="column"),
        pytest.param(np.array([True, False]), [True, False], id="bool"),
        pytest.param(np.array([0.5, 1.0]), [0.5, 1.0], id="float"),
        pytest.param(pd.Categorical(["B", "T"]), ["B", "T"], id="categorical"),
        pytest.param(pd.Series(["B", "T"], index=[9, 9]), ["B", "T"], id="series"),
        pytest.param(pd.Series(["B", "T"], dtype="string"), ["B", "T"], id="string-dtype"),
        pytest.param(np.array([np.str_("B"), "T"], dtype=object), ["B", "T"], id="numpy-str"),
        pytest.param(np.array([np.int64(3), 1], dtype=object), [3, 1], id="numpy-int"),
        pytest.param(["nan", "NA"], ["nan", "NA"], id="words-that-only-look-missing"),
        pytest.param([], [], id="empty"),
    ],
)
def test_values_are_kept(values, expected):
    checked = check_attribute(values, "donor", len(expected))
    assert checked.ndim == 1
    assert checked.tolist() == expected


@pytest.mark.parametrize(
    "missing",
    [
        pytest.param(np.array(["B", None], dtype=object), id="none"),
        pytest.param(np.array(["B", np.nan], dtype=object), id="nan-among-objects"),
        pytest.param(["B", float("nan")], id="nan-in-a-list-of-strings"),
        pytest.param(np.array([1.0, np.nan]), id="nan"),
        pytest.param(pd.Categorical(["B", None]), id="categorical"),
        pytest.param(pd.Series(["B", pd.NA], dtype="string"), id="pandas-na"),
        pytest.param(np.array(["B", pd.NaT], dtype=object), id="pandas-nat"),
    ],
)
def test_missing_values(missing):
    with pytest.raises(ValueError, match=r"donor: expected a value .*; 1 of 2 are missing\. Drop"):
        check_attribute(missing, "donor")


@pytest.mark.parametrize(
    ("values", "n_cells", "error", "match"),
    [
        pytest.param(["B"], 2, ValueError, r"each of 2 cells; got 1\..*together", id="length"),
        pytest.param(np.ones((2, 2)), None, ValueError, r"got shape \(2, 2\)", id="table"),
        pytest.param(np.array("B"), None, ValueError, r"got shape \(\)", id="scalar"),
        pytest.param(
            np.array(["B", 1], dtype=object), None, TypeError, r"one kind; got int, str", id="mixed"
        ),
        pytest.param(["B", 1], None, TypeError, r"one kind; got int, str", id="mixed-list"),
        pytest.param(np.array([b"B"]), None, TypeError, r"got \|S1", id="bytes"),
        pytest.param(np.array([(1,), ()], dtype=object), None, TypeError, r"tuple", id="tuples"),
        pytest.param(
            np.array(["2020-01-01"], dtype="datetime64[D]"), None, TypeError, r"got datetime64",
            id="dates",
        ),
    ],
)  # fmt: skip
def test_values_that_are_refused(values, n_cells, error, match):
    with pytest.raises(error, match=match):
        check_attribute(values, "donor", n_cells)


def test_categories_are_sorted_and_the_label_comes_first(attributes):
    assert attributes.names == ["label", "donor", "new"]
    assert attributes.sizes == [2, 2, 1]
    assert {k: v.tolist() for k, v in attributes.categories.items()} == {
        "label": ["B", "T"],
        "donor": [3, 7],
        "new": ["n"],
    }


def test_codes_index_the_categories_and_are_minus_one_where_not_given(attributes):
    codes = attributes.encode({"donor": np.array([7, 7, 3])}, 3)
    assert codes.dtype == np.int64
    assert codes.tolist() == [[-1, 1, -1], [-1, 1, -1], [-1, 0, -1]]
    both = attributes.encode({"new": np.array(["n"]), "label": np.array(["T"])}, 1)
    assert both.tolist() == [[1, -1, 0]]
    # Values of another width or container are the same values.
    wide = attributes.encode({"label": np.array(["B", "T"], dtype=object)}, 2)
    assert wide[:, 0].tolist() == [0, 1]


def test_unseen_values_name_what_is_known(attributes):
    with pytest.raises(ValueError, match=r"label: .*\('B', 'T'\); got 'NK', 'Treg'\. Fit on"):
        attributes.encode({"label": np.array(["Treg", "B", "NK"])}, 3)
    many = Attributes.fit({"label": np.arange(30)})
    with pytest.raises(ValueError, match=r"\(0, 1, .*, 9 and 20 more\); got 99\."):
        many.encode({"label": np.array([99])}, 1)


@pytest.mark.parametrize(
    ("guidance", "given", "expected"),
    [
        pytest.param(1.0, {"label"}, {"label": 1.0}, id="one-given"),
        pytest.param(1.0, {"label", "donor"}, {"label+donor": 1.0}, id="unit-weight-is-one-call"),
        pytest.param(2, {"label", "donor"}, {"": -1.0, "label+donor": 2.0}, id="one-number"),
        pytest.param(0.0, {"label"}, {"": 1.0}, id="switched-off"),
        pytest.param(-0.5, set(), {"": 1.0}, id="nothing-given"),
        pytest.param({"label": 1.0}, {"label"}, {"label": 1.0}, id="by-name"),
        pytest.param(
            {"label": 3.0},
            {"label", "donor"},
            {"": -3.0, "label": 3.0, "donor": 1.0},
            id="by-name-else-one",
        ),
        pytest.param(
            {"label": 0.3, "donor": 0.7},
            {"label", "donor"},
            {"label": 0.3, "donor": 0.7},
            id="adding-up-to-one",
        ),
        pytest.param({"donor": 3.0}, {"label"}, {"label": 1.0}, id="not-given-is-left-out"),
        pytest.param({"label": 0.0}, {"label"}, {"": 1.0}, id="by-name-switched-off"),
    ],
)
def test_guidance_terms(attributes, guidance, given, expected):
    terms = attributes.terms(guidance, given)
    names = np.array(attributes.names)
    assert {"+".join(names[mask]): weight for weight, mask in terms} == pytest.approx(expected)
    assert len(terms) == len(expected)
    assert sum(weight for weight, _ in terms) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("guidance", "match"),
    [
        pytest.param({"batch": 1.0}, r"attributes of the model .*; got \['batch'\]", id="unknown"),
        pytest.param(float("nan"), r"finite numbers; got nan", id="nan"),
        pytest.param({"label": float("inf")}, r"finite numbers; got \{'label': inf", id="inf"),
        pytest.param("strong", r"finite numbers; got 'strong'", id="string"),
        pytest.param({"label": None}, r"finite numbers", id="none"),
    ],
)
def test_bad_guidance(attributes, guidance, match):
    with pytest.raises(ValueError, match=match):
        attributes.terms(guidance, {"label"})


@pytest.mark.parametrize(
    "values",
    [
        np.array(["T", "Ä β"]),
        np.array([3, 1], dtype=np.int8),
        np.array([0.1, 1e300]),
        np.array([True, False]),
        np.array(["T", "B"], dtype=object),
    ],
    ids=["str", "int8", "float", "bool", "object"],
)
def test_json_round_trip_keeps_categories_and_dtypes(values):
    before = Attributes.fit({"label": values})
    after = Attributes.from_json(json.loads(json.dumps(before.to_json())))
    np.testing.assert_array_equal(after.categories["label"], before.categories["label"])
    assert after.categories["label"].dtype == before.categories["label"].dtype
    np.testing.assert_array_equal(
        after.encode({"label": values}, 2), before.encode({"label": values}, 2)
    )


GENES = np.array(["CD3E", "MS4A1", "NKG7"])


@pytest.mark.parametrize(
    ("names", "match"),
    [
        pytest.param(["CD3E", "CD3E", "NKG7"], r"duplicates of 'CD3E'.*unique", id="duplicated"),
        pytest.param(["CD3E", "NKG7"], r"1 are absent \('MS4A1'\)", id="absent"),
        pytest.param(["CD3E", "MS4A1", "CD79A"], r"1 are absent \('NKG7'\)", id="replaced"),
        pytest.param([*GENES, "CD79A"], r"got 1 more \('CD79A'\).*Subset", id="unknown"),
        pytest.param(GENES[::-1], r"same features in another order.*Reorder", id="permuted"),
        pytest.param([*GENES[::-1], "A", "B"], r"got 2 more", id="permuted-and-unknown"),
    ],
)
def test_features_that_do_not_match(names, match):
    with pytest.raises(ValueError, match=match):
        check_feature_names(names, GENES)


def test_features_that_match():
    assert check_feature_names(pd.Index(GENES), GENES) is None
    numbers = np.arange(3)
    assert check_feature_names(numbers, numbers.astype(str)) is None


def test_a_whole_genome_of_names_is_checked_in_no_time():
    names = np.array([f"ENSG{i:011d}" for i in range(30_000)])
    start = time.process_time()
    check_feature_names(names, names)
    with pytest.raises(ValueError, match="another order"):
        check_feature_names(names[::-1], names)
    assert time.process_time() - start < 2.0  # quadratic work would take minutes
