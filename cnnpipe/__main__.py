"""`python -m cnnpipe`, for whatever starts Python itself, as torchrun does."""

import signal

from cnnpipe.cli import main

try:
    main()
finally:
    # torchrun ends the others of a failed training, which may be about to end by themselves.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
