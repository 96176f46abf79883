"""`python -m sparse_tx COMMAND`: as the installed program `sparse-tx`."""

from sparse_tx.cli import main

if __name__ == "__main__":
    main()
