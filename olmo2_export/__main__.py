"""python -m olmo2_export is olmo2-export."""

import sys

from olmo2_export.cli import main

sys.exit(main())
