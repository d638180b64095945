"""`python -m attnseg`: the command line."""

from attnseg.cli.app import main

main()
