"""How Sphinx builds the documentation: `make docs`, without a look at the network."""

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

_PACKAGE = Path(__file__).parents[1] / "src" / "expertlane" / "version.py"

project = "expertlane"
author = "the expertlane authors"
release = re.findall(r'__version__ = "(.+)"', _PACKAGE.read_text(encoding="utf-8"))[0]
version = release

extensions = ["myst_parser"]
exclude_patterns = ["_build", "log.md", "design_decisions.md"]  # diaries stay in the repository
myst_heading_anchors = 3  # links to headings, as GitHub has them

html_theme = "furo"
html_title = "expertlane"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False


def setup(app: Sphinx) -> None:
    """Write options.md, which is not in the repository, from the code before pages are read."""
    sys.path.insert(0, str(Path(__file__).parent))
    from option_table import render

    Path(__file__).with_name("options.md").write_text(render(), encoding="utf-8")
