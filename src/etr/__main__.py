"""``python -m etr``, and with it ``torchrun ... -m etr``: the command `etr`."""

import sys

from etr.cli import main

sys.exit(main())
