"""python -m olmo2_export.bench; see `cli.py`."""

import sys

from olmo2_export.bench.cli import main

sys.exit(main())
