"""`python -m alignpro`: the command line."""

import sys

from alignpro.commands.main import main

sys.exit(main())
