"""How Sphinx builds this site: sphinx-build -n -W docs dist/docs."""

import importlib.metadata

project = "streamgmm"
copyright = "the streamgmm developers"
release = importlib.metadata.version("streamgmm")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# docstrings say in words what a value is, and types of ours are Any at the door
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
# a list that keeps the underscore at the end of a name
napoleon_custom_sections = [("Attributes", "params_style")]
# quotes in docstrings are those of Python's strings
smartquotes = False
# types in docstrings are words, not references
nitpick_ignore_regex = [("py:class", r"(?!streamgmm\.).*")]

html_theme = "furo"
html_title = f"streamgmm {release}"
