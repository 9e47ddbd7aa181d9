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
exclude_patterns = [
    "_build",
    *("log.md", "design_decisions.md"),  # diaries stay in the repository
    *("family_table.md", "beside_table.md"),  # other pages include them
]
myst_heading_anchors = 3  # links to headings, as GitHub has them

html_theme = "furo"
html_title = "expertlane"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False


def setup(app: Sphinx) -> None:
    """Write what is not in the repository from the code and from results, before pages are read."""
    here = Path(__file__).parent
    sys.path += [str(here), str(here.parent / "calibration")]
    import beside_table
    import family_table
    import option_table

    made = {
        "options.md": option_table.render(),
        "family_table.md": family_table.render(),
        "beside_table.md": "\n".join(beside_table.table(beside_table.saved_rows())) + "\n",
    }
    for name, text in made.items():
        (here / name).write_text(text, encoding="utf-8")
