"""What becomes of a file that cannot be read: `data.unreadable=refuse` or `skip`."""

import sys

from sparse_tx.errors import UserError

NAMED = 10  # on stderr; meta.json has up to a thousand


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
            more = len(self.problems) - NAMED
            lines = [f"left out {len(self.problems)} that cannot be used:", *self.problems[:NAMED]]
            print("\n  ".join(lines + [f"and {more} more: see meta.json"] * (more > 0)), file=sys.stderr, flush=True)

    def meta(self) -> dict[str, object]:
        """For meta.json."""
        return {"left_out": len(self.problems), "left_out_files": self.problems[:1000]} if self.problems else {}
