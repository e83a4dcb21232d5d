"""`python -m fastjax`: the command line; with nothing after it, the doctor."""

import sys

from fastjax.cli import main

if len(sys.argv) == 1:
    sys.argv.append("doctor")
sys.exit(main())
