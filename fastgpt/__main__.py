"""`python -m fastgpt` is `fastgpt`, also where nothing is installed."""

import sys

from fastgpt.cli import main

sys.exit(main())
