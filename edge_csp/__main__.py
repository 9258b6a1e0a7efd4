"""`python -m edge_csp` is `edge-csp`."""

import sys

from edge_csp.cli import main

if __name__ == "__main__":
    sys.exit(main())
