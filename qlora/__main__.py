"""`python -m qlora` (and `accelerate launch -m qlora`): the same as the `qlora` console script."""

from qlora.cli import main

if __name__ == "__main__":
    main()
