"""`python -m cnnpipe`, for whatever starts Python itself, as torchrun does."""

from cnnpipe.cli import main

main()
