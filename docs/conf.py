"""Sphinx configuration; nothing is fetched, so the build needs no network."""

from cfgen_augment import __version__

project = "cfgen-augment"
author = "The cfgen-augment developers"
copyright = "2026, The cfgen-augment developers"
version = release = __version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_typehints = "none"  # numpydoc's Parameters say it better
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
# Single backticks in docstrings name objects; those without a page are set as code.
default_role = "py:obj"

html_theme = "furo"
html_title = f"cfgen-augment {release}"
