"""`python -m minilm` is `minilm`."""

from minilm.cli import main

if __name__ == "__main__":
    main()
