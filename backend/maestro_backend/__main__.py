"""`python -m maestro_backend` is `maestro`."""

import sys

from maestro_backend.cli import main

sys.exit(main())
