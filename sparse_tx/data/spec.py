"""What is asked of the data: one frozen record, checked when it is made."""

from dataclasses import dataclass
from math import isqrt

from sparse_tx.errors import UserError

KINDS = {"stdlib": "text", "enwik8": "text", "cifar10": "image", "imagenet64": "image", "audio": "audio"}
SIDES = {"cifar10": 32, "imagenet64": 64}
VERSIONS = ("oord", "box")
# What data.mirror=true does in training to data of a kind. Nothing of the sort leaves a text a text.
MIRRORED = {"image": "half of the images mirrored left to right", "audio": "half of the windows inverted in sign"}


@dataclass(frozen=True)
class DataSpec:
    """One dataset, cut into windows of `context` bytes.

    kind: "image", "text" or "audio": decides the position tables and whether bits are per dim or per byte.
    context: bytes a window; of an image all of them, 3 x side x side.
    root: where downloads and prepared arrays live. source: a local file or folder in place of the download.
    version: which of the two published ImageNet64 it is, "oord" or "box"; None: what the source tells.
    unreadable: what a recording or picture that cannot be used does: "refuse" stops, "skip" goes on and names it.
    synthetic: a small made-up twin of the same kind and form: no network, no files, `source` ignored.
    """

    name: str
    kind: str
    context: int
    root: str = "data"
    source: str | None = None
    version: str | None = None
    unreadable: str = "refuse"
    synthetic: bool = False

    def __post_init__(self):
        if self.name not in KINDS:
            raise UserError(f"data={self.name} is not known: use one of {', '.join(KINDS)}")
        if self.kind != KINDS[self.name]:
            raise UserError(f"data.kind={self.kind} does not fit data={self.name}: it is {KINDS[self.name]}")
        if not isinstance(self.context, int) or isinstance(self.context, bool) or self.context < 1:
            raise UserError(f"data.context={self.context} must be a whole number of bytes, 1 or more")
        if self.unreadable not in ("refuse", "skip"):
            raise UserError(f"data.unreadable={self.unreadable} is not known: use refuse or skip")
        if self.version is not None and (self.name != "imagenet64" or self.version not in VERSIONS):
            raise UserError(
                f"data.version={self.version} does not fit data={self.name}: "
                "data=imagenet64 has oord, the paper's, and box; other data have null"
            )
        if self.kind == "image":
            self._check_side()

    def _check_side(self):
        side = isqrt(self.context // 3)
        if 3 * side * side != self.context:
            low = max(side, 1)
            raise UserError(
                f"data.context={self.context} is not a whole image of 3 x side x side bytes: "
                f"the nearest are {3 * low * low} (side {low}) and {3 * (low + 1) ** 2} (side {low + 1})"
            )
        wanted = None if self.name == "imagenet64" and self.source else SIDES[self.name]  # one's own may have any side
        if not self.synthetic and wanted is not None and side != wanted:
            raise UserError(
                f"data.context={self.context} (side {side}) does not fit data={self.name}: "
                f"its images have side {wanted}, use data.context={3 * wanted * wanted}"
            )

    @property
    def side(self) -> int | None:
        """Pixels along an image's edge; None for text and audio."""
        return isqrt(self.context // 3) if self.kind == "image" else None


def check_mirror(name: str, kind: str) -> None:
    """Raises UserError where data.mirror=true has nothing to do."""
    if kind not in MIRRORED:
        raise UserError(f"data.mirror=true is for images and audio: data={name} has {kind}: use data.mirror=false")
