"""`accelerate launch scripts/train.py RECIPE [section.key=value ...]`: `qlora train` in several processes."""

import sys

from qlora.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
