"""Sample from a checkpoint: `python sample.py checkpoint=PATH count=16 temperature=1.0 prompt=FILE`."""

from sparse_tx import command
from sparse_tx.entry import sample

if __name__ == "__main__":
    command.main(sample, "sample")
