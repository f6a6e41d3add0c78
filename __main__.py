"""`python -m graft` is `graft`."""

from .cli import main

if __name__ == "__main__":
    main()
