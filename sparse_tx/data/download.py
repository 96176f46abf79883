"""Downloads that survive: resumed where they broke off, checked by hash, put in place by one rename."""

import hashlib
import http.client
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from sparse_tx.data.lock import exclusive
from sparse_tx.data.progress import Progress
from sparse_tx.data.source import CHUNK, read_chunks
from sparse_tx.errors import UserError

TRIES = 3
TIMEOUT = 30  # seconds without a byte


class _Broken(Exception):
    """This try failed; the next may not."""


def fetch(
    urls: Sequence[str], target: Path, *, what: str, manual: str, md5: str | None = None, download: bool = True
) -> Path:
    """The file at `target`, downloaded from the first address that gives it whole.

    md5: as the publisher states it. manual: what a person can do instead, ending every refusal. A part that was
    received stays beside the target as NAME.part and is continued by the next try, from whichever address.
    """
    if target.exists():  # only ever put there whole
        return target
    if not download:
        raise UserError(f"{what} is not in {target.parent} and downloads are off. {manual}")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    problems: list[str] = []
    with exclusive(target.with_name(target.name + ".lock"), f"downloading {what}"):
        if target.exists():
            return target
        for url in urls:
            for _ in range(TRIES):
                try:
                    _receive(url, part, what)
                    _check(part, md5)
                    part.replace(target)
                    return target
                except (_Broken, urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as e:
                    problems.append(f"{url}: {getattr(e, 'reason', None) or e}")
                    if isinstance(e, urllib.error.HTTPError) and 400 <= e.code < 500:
                        break
    raise UserError(f"could not download {what} ({'; '.join(dict.fromkeys(problems))}). {manual}")


def _receive(url: str, part: Path, what: str):
    """Appends what is missing to the part; _Broken if the connection ends before the length that was promised."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:
            if error.headers.get("Content-Range", "").endswith(f"/{have}"):
                return  # it was whole already
            part.unlink()
            raise _Broken("the part was longer than the file and is dropped") from error
        raise
    with response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        length = response.headers.get("Content-Length")
        expected = int(length) + (have if resumed else 0) if length is not None else None
        progress = Progress(f"downloading {what}", expected, "MB", 1e6)
        progress.done = have if resumed else 0
        with part.open("ab" if resumed else "wb") as file:
            while chunk := response.read(CHUNK // 16):
                file.write(chunk)
                progress.add(len(chunk))
        progress.close()
    if expected is not None and part.stat().st_size != expected:
        raise _Broken(f"broke off at {part.stat().st_size} of {expected} bytes")


def _check(part: Path, md5: str | None):
    if md5 is None:
        return
    digest = hashlib.md5(usedforsecurity=False)
    with part.open("rb") as file:
        for chunk in read_chunks(file):
            digest.update(chunk)
    if digest.hexdigest() != md5:
        part.unlink()
        raise _Broken(f"md5 {digest.hexdigest()} instead of {md5}: dropped")
