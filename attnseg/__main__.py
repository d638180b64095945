"""`python -m attnseg`: the command line."""

from attnseg.cli import main

main()
