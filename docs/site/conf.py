"""Sphinx's settings for the pages that stage.py lays out (make docs)."""

project = "LLaVA-Mini in JAX"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = project
# Anchors as GitHub makes them, on which the pages' links rely.
myst_heading_anchors = 4
myst_enable_extensions = ["attrs_inline"]  # classes of pictures
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
# Names of types in docstrings and signatures are words here, not links.
suppress_warnings = ["ref.python"]
