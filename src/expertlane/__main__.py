"""Lets `python -m expertlane` run the command line."""

import sys

# `python -m` puts the working directory first: a file in it named like a module would be run.
# It stays where the package itself is imported from it.
if not sys.flags.safe_path and not __file__.startswith(sys.path[0] + "/"):
    del sys.path[0]

from expertlane.cli.main import main

main()
