"""`python -m sparse_tx.export checkpoint=PATH to=FOLDER`."""

from sparse_tx import command
from sparse_tx.entry import export

if __name__ == "__main__":
    command.main(export, "export")
