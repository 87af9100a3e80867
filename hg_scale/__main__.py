"""`python -m hg_scale VERB` is the same as `hg-scale VERB`."""

import sys

from hg_scale.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
