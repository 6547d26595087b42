"""`python -m synthmed`: the command, where its script is not on the path."""

from synthmed.cli import main

main()
