"""Score a checkpoint in bits per dim: `python evaluate.py checkpoint=PATH split=test`."""

from sparse_tx import command
from sparse_tx.entry import evaluate

if __name__ == "__main__":
    command.main(evaluate, "evaluate")
