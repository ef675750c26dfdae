"""`python -m spectralbasis`: the command line."""

from spectralbasis.cli import main

main()
