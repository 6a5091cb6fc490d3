"""Multi-process training: `accelerate launch scripts/train.py RECIPE [section.key=value ...]`, the same as `qlora train`."""

import sys

from qlora.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
