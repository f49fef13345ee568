"""`python -m peft_m2pt`, the same as the command `peft-m2pt`."""

import sys

from .tools.cli import main


sys.exit(main())
