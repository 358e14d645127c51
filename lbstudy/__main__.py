"""`python -m lbstudy`."""

from lbstudy.console.cli import main

main()
