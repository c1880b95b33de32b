"""`python -m dist_lm` is `dist-lm`."""

from dist_lm.cli import main

if __name__ == "__main__":
    main()
