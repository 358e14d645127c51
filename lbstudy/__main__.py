"""`python -m lbstudy`."""

from lbstudy.cli import main

main()
