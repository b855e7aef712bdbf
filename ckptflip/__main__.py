"""`python -m ckptflip` is the command line."""

from ckptflip.cli.main import main

main()
