"""`python -m runtimes` is `olmo2-run`."""

import sys

from runtimes.cli import main

if __name__ == "__main__":
    sys.exit(main())
