"""Train a Sparse Transformer: `python train.py experiment=cifar10_strided`."""

from sparse_tx import command
from sparse_tx.entry import train

if __name__ == "__main__":
    command.main(train, "train")
