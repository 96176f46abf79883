"""What becomes of a file that cannot be read: `data.unreadable=refuse` or `skip`."""

import sys

from sparse_tx.errors import UserError

NAMED = 20  # in a message; meta.json has up to a thousand


class Unreadable:
    """Called with each problem: stops at the first, or keeps it and lets the caller go on."""

    def __init__(self, policy: str):
        self.skips = policy == "skip"
        self.problems: list[str] = []

    def __call__(self, problem: UserError):
        if not self.skips:
            raise UserError(f"{problem}; data.unreadable=skip goes on without such files") from problem
        self.problems.append(str(problem))

    def report(self):
        """Says on stderr what was left out."""
        if self.problems:
            shown = "; ".join(self.problems[:NAMED])
            more = f"; and {len(self.problems) - NAMED} more" if len(self.problems) > NAMED else ""
            print(f"left out {len(self.problems)} files: {shown}{more}", file=sys.stderr, flush=True)

    def meta(self) -> dict[str, object]:
        """For meta.json."""
        return {"left_out": len(self.problems), "left_out_files": self.problems[:1000]} if self.problems else {}
