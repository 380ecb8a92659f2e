"""`python -m coordlib.cli`, for where scripts are not on the path."""

import sys

from coordlib.cli.app import main

sys.exit(main())
