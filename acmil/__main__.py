"""`python -m acmil` is the console script."""

from acmil.cli import main

main()
