"""How Sphinx builds the documentation: `make docs`, from this repository alone."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE / "extensions"), str(ROOT), str(ROOT / "python")]

import meft_kernels  # noqa: E402

project = "meft_kernels"
author = "The meft_kernels authors"
copyright = "2026, the meft_kernels authors"
version = release = meft_kernels.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "docstrings", "generated"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}
smartquotes = False  # they would turn the dashes of --option into one

# --- Markdown ---
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# --- docstrings ---
autodoc_typehints = "none"  # the docstrings give types as shapes, and the signature has the rest
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
napoleon_use_param = False
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_rtype = False

# --- references ---
# Every reference of our own must lead somewhere. Those of other projects are not looked up, since that takes
# a network, and modules inside the packages are no public names: both are set as plain text.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(torch|transformers|datasets|huggingface_hub|nn|Tensor|collections|typing|pathlib|os)\b.*"),
    ("py:.*", r"whisper_meft\.[a-z_]+(\..*)?"),
    ("py:.*", r"meft_kernels\.(reference|modules)\..*"),
    ("py:data", "FORMATS"),
]

# --- HTML ---
html_theme = "pydata_sphinx_theme"
html_title = "meft_kernels"
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_theme_options = {
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "navbar_end": ["theme-switcher"],
    "header_links_before_dropdown": 6,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_copy_source = False
html_show_sourcelink = False
