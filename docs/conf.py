"""Configure Sphinx: ``sphinx-build -W --keep-going -b html docs docs/_build/html``.

The build needs no network: it fetches no inventories of other projects and no fonts.
"""

from __future__ import annotations

from optuna_nnhp import __version__

project = "optuna_nnhp"
author = "the authors of optuna_nnhp"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
nitpicky = False

# Docstrings: one pair of backticks marks code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Shape", "notes_style"), ("Source", "notes_style")]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"optuna_nnhp {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_show_copyright = False
html_show_sphinx = False
