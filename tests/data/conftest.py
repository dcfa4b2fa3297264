"""What the tests of the data share: pictures as photos are, their files, and a server to ask."""

import email.utils
import hashlib
import io
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage.draw import ellipse
from skimage.filters import gaussian


@pytest.fixture(scope="session")
def photo() -> Callable[..., np.ndarray]:
    def draw(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
        """(height, width, channels) uint8: soft shapes before a gradient, a little noise."""
        rng = np.random.default_rng([seed, height, width])
        slopes = np.linspace(0, 1, height)[:, None] + np.linspace(0, 1, width)
        image = 60 + 60 * slopes[:, :, None] * rng.random(channels)
        for _ in range(12):
            centre = rng.random(2) * (height, width)
            radii = (0.05 + 0.25 * rng.random(2)) * (height, width) + 1
            rows, columns = ellipse(*centre, *radii, shape=(height, width))
            image[rows, columns] = rng.uniform(0, 255, channels)
        image = gaussian(image, 0.7, channel_axis=2) + rng.normal(0, 2, image.shape)
        return image.round().clip(0, 255).astype(np.uint8)

    return draw


@pytest.fixture(scope="session")
def encoded() -> Callable[..., bytes]:
    def encode(image: np.ndarray | Image.Image, kind: str, **options: Any) -> bytes:
        """The bytes of an image file; `kind` is a name that Pillow knows."""
        file = io.BytesIO()
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        picture.save(file, kind, **options)
        return file.getvalue()

    return encode


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty repository's root, which is the current folder."""
    root = tmp_path / "repository"
    root.mkdir()
    monkeypatch.chdir(root)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return root


class Server(ThreadingHTTPServer):
    """Serves `files`, by path, on loopback; the first `failures` answers of a path are 503.

    Ranges are served where `ranges` is set.
    `cuts` are the numbers of bytes after which the next answers' connections are lost.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.failures: Counter[str] = Counter()
        self.requests: list[str] = []
        self.ranges = True
        self.overlap = 0
        """By how much a range begins before it was asked to."""
        self.validators = ("ETag", "Last-Modified")
        self.cuts: list[int] = []
        self.status = 0
        """Of the answers, if not that of a whole file or of a part."""
        self.headers: dict[str, str | None] = {}
        """What the answers say instead of the truth; None is nothing."""
        self.asked: list[dict[str, str]] = []
        """The headers of the requests."""
        self.sent: list[int] = []
        """The bytes of each answer's body."""
        self.hold = threading.Event()
        """Waited for before the second half of each answer."""
        self.hold.set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.requests.append(path)
        self.server.asked.append(dict(self.headers))
        if self.server.failures[path]:
            self.server.failures[path] -= 1
            return self.send_error(503)
        if path not in self.server.files:
            return self.send_error(404)
        data = self.server.files[path]
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "Last-Modified": email.utils.formatdate(zlib.crc32(data), usegmt=True),
        }
        headers = {name: headers[name] for name in self.server.validators}
        first = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-")
        start = max(0, int(first) - self.server.overlap) if self.server.ranges else 0
        if "If-Range" in self.headers and self.headers["If-Range"] not in headers.values():
            start = 0
        if start and start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        headers["Content-Length"] = str(len(data) - start)
        self.send_response(self.server.status or (206 if start else 200))
        for name, value in (headers | self.server.headers).items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        body = data[start:]
        if self.server.cuts:
            body = body[: self.server.cuts.pop(0)]
        self.server.sent.append(len(body))  # before whoever has got it looks
        half = len(body) // 2
        self.wfile.write(body[:half])
        self.server.hold.wait(60)
        self.wfile.write(body[half:])

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
