"""`python -m septet` is `septet`."""

from septet.cli import main

if __name__ == "__main__":
    main()
