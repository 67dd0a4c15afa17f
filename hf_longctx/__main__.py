"""`python -m hf_longctx`: the command line, of the Python that runs it."""

from .cli import main

if __name__ == "__main__":
    main()
