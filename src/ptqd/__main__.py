"""``python -m ptqd``."""

import sys

from ptqd_cli.main import main

sys.exit(main())
