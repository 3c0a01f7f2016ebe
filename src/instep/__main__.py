"""``python -m instep``: the same as the command ``instep``."""

from __future__ import annotations

import sys

from instep.cli import main

if __name__ == "__main__":
    sys.exit(main())
