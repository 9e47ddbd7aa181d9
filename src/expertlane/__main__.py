"""`python -m expertlane`."""

from expertlane.cli.main import main

main()
