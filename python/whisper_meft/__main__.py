"""`python -m whisper_meft` is the same as `whisper-meft`."""

import sys

from .commands.cli import main

sys.exit(main())
