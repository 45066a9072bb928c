"""`python -m compresskv`: the same as the `compresskv` command."""

from compresskv.cli import main

main()
