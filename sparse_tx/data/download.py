"""Downloads that survive: resumed where they broke off, checked by hash, put in place by one rename."""

import http.client
import json
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from sparse_tx.data.lock import exclusive
from sparse_tx.data.progress import Progress
from sparse_tx.data.source import CHUNK, file_digest
from sparse_tx.errors import UserError

TRIES = 3
WAITS = (1, 5)  # seconds before the second and the third try of an address
TIMEOUT = 30  # seconds without a byte
SLOW_RATE, SLOW_AFTER = 200_000, 20  # bytes a second over the first seconds: less, and another address is tried
AGENT = {"User-Agent": "sparse-tx"}
Check = Callable[[Path], str | None]  # what is wrong with a file; None: nothing
FAILURES = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError)


class _Broken(Exception):
    """This try failed; the next may not."""


class _Useless(Exception):
    """This address will not do better."""


def fetch(
    urls: Sequence[str],
    target: Path,
    *,
    what: str,
    manual: str,
    md5: str | None = None,
    sha256: str | None = None,
    check: Check | None = None,
    download: bool = True,
) -> Path:
    """The file at `target`, downloaded from the first address that gives it whole.

    md5, sha256: as the publisher states it; check: where that is of what is inside, says what is wrong with a file.
    Without any, the sha256 of the first download is kept beside the target as NAME.sha256, and a later download that
    differs is refused. manual: what a person can do instead, ending every refusal. A part that was received stays as
    NAME.part and is continued by the next try: from whichever address if something tells whether the pieces fit, else
    only from where it came and as long as that is the same. An address that is slow is left for the next one; the last
    is waited for.
    """
    if target.exists():  # only ever put there whole
        return target
    if not download:
        raise UserError(f"{what} is not in {target.parent} and downloads are off. {manual}")
    target.parent.mkdir(parents=True, exist_ok=True)
    if md5 or sha256:
        check = _Stated("md5", md5) if md5 else _Stated("sha256", str(sha256))
    problems: list[str] = []
    with exclusive(target.with_name(target.name + ".lock"), f"downloading {what}"):
        if target.exists():
            return target
        for url in urls:
            if _fetched(url, target, what, check, problems, hurry=url != urls[-1]):
                return target
    raise UserError(f"could not download {what} ({'; '.join(dict.fromkeys(problems))}). {manual}")


def _fetched(url: str, target: Path, what: str, check: Check | None, problems: list[str], *, hurry: bool) -> bool:
    """Whether an address gave the file, within a few tries."""
    part = _Part(target, url, any_source=check is not None)
    for attempt in range(TRIES):
        if attempt:
            time.sleep(WAITS[attempt - 1])
        try:
            resumed = part.receive(what, hurry=hurry)
            problem = (check or _Pinned(target))(part.path)
            if problem is not None:
                part.drop()
                # Pieces may not have fitted: then once more from the beginning.
                raise (_Broken if resumed else _Useless)(f"{problem}: dropped")
            part.keep()
            return True
        except (_Broken, _Useless, *FAILURES) as error:
            problems.append(f"{url}: {getattr(error, 'reason', None) or error}")
            if isinstance(error, _Useless) or _is_no_use(error):
                return False
    return False


def _is_no_use(error: Exception) -> bool:
    """Whether another try of the same address is in vain: the file is not there, or the host is not."""
    if isinstance(error, urllib.error.HTTPError):
        return 400 <= error.code < 500 and error.code not in (408, 429)  # too slow, too many requests: later perhaps
    return isinstance(getattr(error, "reason", None), socket.gaierror | ConnectionRefusedError)


def _received(response) -> bytes:
    """The next bytes. What breaks here is the connection, whatever the system calls it, and not the disk."""
    try:
        return response.read1(CHUNK // 16)
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(str(error) or type(error).__name__) from error


class _Stated:
    """The hash that the publisher states."""

    def __init__(self, kind: str, wanted: str):
        self.kind, self.wanted = kind, wanted

    def __call__(self, path: Path) -> str | None:
        found = file_digest(path, self.kind)
        return None if found == self.wanted else f"{self.kind} {found} instead of {self.wanted}"


class _Pinned:
    """The hash of the first download, written down then."""

    def __init__(self, target: Path):
        self.pin = target.with_name(target.name + ".sha256")

    def __call__(self, path: Path) -> str | None:
        found = file_digest(path, "sha256")
        wanted = self.pin.read_text().strip() if self.pin.exists() else ""
        if not wanted:  # none, or a full disk left it empty
            self.pin.write_text(found + "\n")
        if wanted in ("", found):
            return None
        return (
            f"sha256 {found} instead of {wanted}, that of the first download (remove {self.pin} to take the new file)"
        )


class _Part:
    """NAME.part, what was received so far, and NAME.part.json, which says of what."""

    def __init__(self, target: Path, url: str, *, any_source: bool):
        self.target, self.url, self.any_source = target, url, any_source
        self.path = target.with_name(target.name + ".part")
        self._told = target.with_name(target.name + ".part.json")

    def receive(self, what: str, *, hurry: bool) -> bool:
        """Appends what is missing. Returns whether there was something to append to."""
        have = self.path.stat().st_size if self.path.exists() else 0
        told = self._told_of()
        if not self.any_source and (told.get("url") != self.url or not told.get("etag")):
            have = 0  # nothing would tell whether the pieces fit
        headers = {"Range": f"bytes={have}-"} if have else {}
        if have and not self.any_source:
            headers["If-Range"] = told["etag"]
        try:
            response = urllib.request.urlopen(
                urllib.request.Request(self.url, headers=AGENT | headers), timeout=TIMEOUT
            )
        except urllib.error.HTTPError as error:
            if error.code == 416 and have:
                if error.headers.get("Content-Range", "").endswith(f"/{have}"):
                    return True  # it was whole already
                self.drop()
                raise _Broken("the part was longer than the file and is dropped") from error
            raise
        with response:
            if response.headers.get_content_type() == "text/html":  # a sign-in or an error page: never a file of data
                raise _Useless("a web page in place of the file")
            resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            length = response.headers.get("Content-Length")
            expected = int(length) + (have if resumed else 0) if length is not None else None
            self._check_space(what, (expected or 0) - (have if resumed else 0))
            etag = response.headers.get("ETag", "")
            have = have if resumed else 0
            with (
                Progress(f"downloading {what}", expected, "MB", 1e6, done=have) as progress,
                self.path.open("ab" if resumed else "wb") as file,  # emptied before what it is of is written down
            ):
                told = {"url": self.url, "etag": "" if etag.startswith("W/") else etag}
                self._told.write_text(json.dumps(told))
                self._copy(response, file, progress, hurry)
        if expected is not None and self.path.stat().st_size != expected:
            raise _Broken(f"broke off at {self.path.stat().st_size} of {expected} bytes")
        return resumed

    def _check_space(self, what: str, more: int):
        free = shutil.disk_usage(self.path.parent).free
        if more > free:
            raise UserError(
                f"{what} takes {more / 1e9:.1f} GB more in {self.path.parent}, which has {free / 1e9:.1f} GB free: "
                "make room, or give data.root another folder"
            )

    @staticmethod
    def _copy(response, file, progress: Progress, hurry: bool):
        started, received = time.monotonic(), 0
        while chunk := _received(response):
            file.write(chunk)
            progress.add(len(chunk))
            received += len(chunk)
            seconds = time.monotonic() - started
            if hurry and seconds > SLOW_AFTER and received < SLOW_RATE * seconds:
                raise _Useless(f"slow, {received / seconds / 1000:.0f} kB/s")

    def keep(self):
        self.path.replace(self.target)
        self._told.unlink(missing_ok=True)

    def drop(self):
        self.path.unlink(missing_ok=True)

    def _told_of(self) -> dict[str, str]:
        """Where the part is from and the server's name for the very bytes: empty if that cannot be relied on."""
        try:
            return json.loads(self._told.read_text())
        except (OSError, ValueError):
            return {}
