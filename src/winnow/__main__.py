"""`python -m winnow`, which torchrun and accelerate launch start on every process."""

from .cli import main

if __name__ == "__main__":  # a data loader's worker imports this file too
    main()
