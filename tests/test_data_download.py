"""Downloads against a server on this machine that breaks off, refuses, lies and changes its mind."""

import errno
import hashlib
import http.client
import http.server
import io
import multiprocessing
import ssl
import tarfile
import threading
import zipfile

import numpy as np
import pytest

from sparse_tx import UserError
from sparse_tx.data import DataSpec, cifar10, download, enwik8, prepare
from tests.test_data_sources import write_batches, write_parquet

DEAD = "http://127.0.0.1:9/file"


class Server(http.server.ThreadingHTTPServer):
    """Gives `files`; `seen` has each request's path and first byte."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.seen: list[tuple[str, int]] = []
        self.cut: int | None = None  # the next answer stops after so many bytes
        self.errors: list[int] = []  # the next answers are these
        self.type: str | None = None
        self.ranges = True

    def url(self, path="/file"):
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        data = self.server.files.get(self.path)
        etag = f'"{hashlib.md5(data or b"").hexdigest()}"'
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.server.seen.append((self.path, start))
        if not self.server.ranges or self.headers.get("If-Range", etag) != etag:
            start = 0
        if self.server.errors or data is None:
            self.send_error(self.server.errors.pop(0) if self.server.errors else 404)
            return
        if start and start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("ETag", etag)
        if self.server.type:
            self.send_header("Content-Type", self.server.type)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        cut, self.server.cut = self.server.cut, None
        self.wfile.write(data[start:][:cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "WAITS", (0, 0))
    with Server() as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield httpd
        httpd.shutdown()
        thread.join()


@pytest.fixture
def data():
    return np.random.default_rng(0).bytes(300_000)


def md5(data):
    return hashlib.md5(data).hexdigest()


def fetch(urls, target, **more):
    return download.fetch(urls, target, what="it", manual="Do it by hand.", **more)


@pytest.mark.parametrize("stated", [True, False])
def test_a_download_that_breaks_off_goes_on_where_it_broke(server, tmp_path, data, stated):
    server.files["/file"], server.cut = data, 100_000
    path = fetch([server.url()], tmp_path / "file", **({"md5": md5(data)} if stated else {}))
    assert path.read_bytes() == data
    assert server.seen == [("/file", 0), ("/file", 100_000)]
    assert not list(tmp_path.glob("*.part*"))


def test_a_killed_download_goes_on_in_the_next_run(server, tmp_path, data, monkeypatch):
    server.files["/file"], server.cut = data, 100_000
    with monkeypatch.context() as patch:
        patch.setattr(download, "TRIES", 1)
        with pytest.raises(UserError, match=r"broke off at 100000 of 300000 bytes.*Do it by hand"):
            fetch([server.url()], tmp_path / "file")
    assert not (tmp_path / "file").exists()
    assert fetch([server.url()], tmp_path / "file").read_bytes() == data
    assert server.seen[-1] == ("/file", 100_000)


def test_a_file_that_changed_meanwhile_is_not_patched_together(server, tmp_path, data, monkeypatch):
    server.files["/file"], server.cut = data, 100_000
    monkeypatch.setattr(download, "TRIES", 1)
    with pytest.raises(UserError):
        fetch([server.url()], tmp_path / "file")
    server.files["/file"] = data[::-1]
    assert fetch([server.url()], tmp_path / "file").read_bytes() == data[::-1]


def test_a_part_from_elsewhere_that_does_not_fit_is_dropped_and_got_again(server, tmp_path, data):
    server.files["/file"] = data
    (tmp_path / "file.part").write_bytes(b"of something else")
    assert fetch([server.url()], tmp_path / "file", md5=md5(data)).read_bytes() == data
    (tmp_path / "long.part").write_bytes(data + b"more")
    assert fetch([server.url()], tmp_path / "long", md5=md5(data)).read_bytes() == data
    (tmp_path / "whole.part").write_bytes(data)
    assert fetch([server.url()], tmp_path / "whole", md5=md5(data)).read_bytes() == data
    assert server.seen[-1] == ("/file", len(data))


def test_a_server_without_ranges_sends_all_of_it_again(server, tmp_path, data):
    server.files["/file"], server.cut, server.ranges = data, 100_000, False
    assert fetch([server.url()], tmp_path / "file").read_bytes() == data


def test_a_mirror_goes_on_with_what_the_first_address_left(server, tmp_path, data, monkeypatch):
    server.files["/file"] = server.files["/mirror"] = data
    server.cut = 100_000
    monkeypatch.setattr(download, "TRIES", 1)
    path = fetch([DEAD, server.url("/gone"), server.url(), server.url("/mirror")], tmp_path / "file", md5=md5(data))
    assert path.read_bytes() == data
    assert server.seen == [("/gone", 0), ("/file", 0), ("/mirror", 100_000)]


def test_an_error_of_the_server_is_tried_again_and_a_missing_file_is_not(server, tmp_path, data):
    server.files["/file"], server.errors = data, [503, 429]
    assert fetch([server.url()], tmp_path / "file").read_bytes() == data
    with pytest.raises(UserError, match=r"could not download it \(http://127\.0\.0\.1:\d+/gone: Not Found\)"):
        fetch([server.url("/gone")], tmp_path / "other")
    assert [path for path, _ in server.seen] == ["/file", "/file", "/file", "/gone"]


def test_an_address_that_is_slow_is_left_unless_it_is_the_last(server, tmp_path, data, monkeypatch):
    server.files["/slow"] = server.files["/file"] = data
    monkeypatch.setattr(download, "SLOW_AFTER", -1)
    monkeypatch.setattr(download, "SLOW_RATE", 1e18)
    assert fetch([server.url("/slow"), server.url()], tmp_path / "file", md5=md5(data)).read_bytes() == data
    assert [path for path, _ in server.seen] == ["/slow", "/file"]


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_a_download_with_another_hash_is_never_kept(server, tmp_path, data, kind):
    server.files["/file"] = data
    wrong = "0" * 32
    with pytest.raises(UserError, match=rf"{kind} \w+ instead of 0+: dropped\). Do it by hand"):
        fetch([server.url()], tmp_path / "file", **{kind: wrong})
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["file.lock", "file.part.json"]
    assert len(server.seen) == 1


def test_without_a_stated_hash_the_first_download_is_written_down_and_a_change_refused(server, tmp_path, data):
    server.files["/file"] = data
    path = fetch([server.url()], tmp_path / "file")
    assert (tmp_path / "file.sha256").read_text().strip() == hashlib.sha256(data).hexdigest()
    path.unlink()
    server.files["/file"] = data[1:]
    with pytest.raises(UserError, match=r"that of the first download \(remove .*file\.sha256 to take the new file\)"):
        fetch([server.url()], tmp_path / "file")
    assert not path.exists()


def test_a_hash_that_a_full_disk_left_unwritten_is_none(server, tmp_path, data):
    server.files["/file"] = data
    (tmp_path / "file.sha256").touch()
    assert fetch([server.url()], tmp_path / "file").read_bytes() == data
    assert (tmp_path / "file.sha256").read_text().strip() == hashlib.sha256(data).hexdigest()


def test_a_web_page_is_not_taken_for_the_first_download(server, tmp_path, data):
    server.files["/file"], server.type = b"<html>sign in first</html>", "text/html; charset=utf-8"
    with pytest.raises(UserError, match=r"a web page in place of the file\)\. Do it by hand"):
        fetch([server.url()], tmp_path / "file")
    server.files["/file"], server.type = data, "application/octet-stream"
    assert fetch([server.url()], tmp_path / "file").read_bytes() == data


def test_a_network_that_goes_away_meanwhile_is_tried_again(server, tmp_path, data, monkeypatch):
    server.files["/file"] = data
    errors = [OSError(errno.EHOSTUNREACH, "No route to host"), ssl.SSLError("bad record mac")]
    read1 = http.client.HTTPResponse.read1

    def failing(response, n=-1):
        if errors:
            raise errors.pop(0)
        return read1(response, n)

    monkeypatch.setattr(http.client.HTTPResponse, "read1", failing)
    assert fetch([server.url()], tmp_path / "file").read_bytes() == data
    assert len(server.seen) == 3


def test_what_does_not_fit_on_the_disk_is_told_before_it_is_sent(server, tmp_path, data, monkeypatch):
    server.files["/file"] = data
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"takes 0\.0 GB more in .*give data\.root another folder"):
        fetch([server.url()], tmp_path / "file")


def test_no_download_means_no_request(server, tmp_path):
    with pytest.raises(UserError, match=r"downloads are off\. Do it by hand"):
        fetch([server.url()], tmp_path / "file", download=False)
    assert not server.seen


def _fetch_in_a_process(url, target, results):
    results.put(fetch([url], target).read_bytes())


def test_two_processes_downloading_at_once_do_not_collide(server, tmp_path, data):
    server.files["/file"] = data
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    both = [
        context.Process(target=_fetch_in_a_process, args=(server.url(), tmp_path / "file", results)) for _ in range(2)
    ]
    for process in both:
        process.start()
    assert [results.get(timeout=120) for _ in both] == [data, data]
    for process in both:
        process.join()
    assert len(server.seen) == 1


def zipped(text):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("enwik8", text)
    return out.getvalue()


def test_enwik8_is_told_from_what_a_host_may_answer_in_its_place(server, monkeypatch):
    text = b"wiki text " * 500
    server.files = {"/page": b"<html>busy</html>", "/other": zipped(text[1:]), "/enwik8.zip": zipped(text)}
    monkeypatch.setattr(enwik8, "URLS", [server.url(path) for path in server.files])
    monkeypatch.setattr(enwik8, "MD5", md5(text))
    prepared = prepare(DataSpec(name="enwik8", kind="text", context=16))
    assert prepared.split("train").tobytes() == text[:4500]
    assert prepared.meta["is_enwik8"]


def test_cifar10_comes_from_the_parquet_files_if_no_archive_can_be_had(server, tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(256, size=(30, 32, 32, 3), dtype=np.uint8)
    folder = write_parquet(tmp_path / "parquet", images[:25], images[25:])
    for split, name in cifar10.SHARDS.items():
        server.files[f"/hub/{name}"] = (folder / f"{split}.parquet").read_bytes()
    batches = write_batches(tmp_path / "b" / "cifar-10-batches-py", images[:25], images[25:])
    with tarfile.open(tmp_path / "archive", "w:gz") as archive:
        archive.add(batches, "cifar-10-batches-py")
    server.files["/archive"] = (tmp_path / "archive").read_bytes()
    monkeypatch.setattr(cifar10, "MD5", md5(server.files["/archive"]))
    monkeypatch.setattr(cifar10, "HUB", server.url("/hub/"))

    def prepared(url, root):
        monkeypatch.setattr(cifar10, "URLS", (url,))
        return prepare(DataSpec(name="cifar10", kind="image", context=3072, root=str(tmp_path / root)))

    parquet, archived = prepared(DEAD, "one"), prepared(server.url("/archive"), "two")
    for split in ("train", "validation", "test"):
        assert np.array_equal(parquet.split(split), archived.split(split))


@pytest.mark.parametrize(("name", "kind", "context"), [("enwik8", "text", 16), ("cifar10", "image", 3072)])
def test_without_a_network_the_message_says_how_to_get_the_data(server, monkeypatch, name, kind, context):
    monkeypatch.setattr(enwik8, "URLS", (DEAD,))
    monkeypatch.setattr(cifar10, "URLS", (DEAD,))
    monkeypatch.setattr(cifar10, "HUB", DEAD)
    with pytest.raises(UserError, match=r"could not download.*Connection refused.*data\.source=(FILE|PATH)"):
        prepare(DataSpec(name=name, kind=kind, context=context))
