"""`python -m topk_rkl`, which is the command topk-rkl."""

import sys

from topk_rkl.cli import main

if __name__ == "__main__":
    sys.exit(main())
