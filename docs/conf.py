"""Settings of Sphinx, which makes the site of these pages: `make docs`."""

project = "fastjax"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
html_theme = "alabaster"
html_theme_options = {"description": "Fine-tunes language models with JAX"}
# Anchors of headings, so that a link to one that is gone is an error.
myst_heading_anchors = 3
# Links out of this folder lead to sources, which GitHub shows and the site does not.
suppress_warnings = ["myst.xref_missing"]
nitpicky = True
