"""``python -m etr``, and with it ``torchrun ... -m etr``: the command `etr`."""

import sys

from etr_command import main

sys.exit(main())
