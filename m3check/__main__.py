"""`python -m m3check`, the same as `m3check`."""

import sys

from m3check.cli import main

sys.exit(main())
