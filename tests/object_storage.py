"""An S3 server on loopback for tests, which sees what it is asked for and can do harm."""

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import requests

BUCKET = "photos"


class Storage:
    """The server; `cuts` are the numbers of bytes after which answers end that promised more."""

    def __init__(self, port: int) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"
        self.asked: list[tuple[str, str, str]] = []
        """Method, path and range of each request."""
        self.cuts: list[int] = []
        self.failures = 0
        """So many of the next answers are 503."""

    def put(self, key: str, data: bytes, bucket: str = BUCKET) -> None:
        """Makes an object, and its bucket."""
        headers = {"Authorization": "AWS4-HMAC-SHA256 Credential=x/20300101/us-east-1/s3/aws4"}
        requests.put(f"{self.endpoint}/{bucket}", headers=headers).raise_for_status()
        answer = requests.put(f"{self.endpoint}/{bucket}/{key}", data=data, headers=headers)
        answer.raise_for_status()

    def reset(self) -> None:
        """Forgets all objects, requests and faults."""
        self.cuts, self.failures = [], 0
        self.refuse_keys(False)
        requests.post(f"{self.endpoint}/moto-api/reset").raise_for_status()
        self.asked = []

    def ranges(self) -> list[str]:
        """Those of all that was read."""
        return [range for method, _, range in self.asked if method == "GET" and range]

    def refuse_keys(self, refuse: bool) -> None:
        """Whether credentials are looked at from now on; none are good then."""
        number = "0" if refuse else "inf"
        requests.post(f"{self.endpoint}/moto-api/reset-auth", data=number).raise_for_status()

    def environment(self) -> dict[str, str]:
        """What a program needs to use it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "AKIAOFTHETESTS",
            "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests",
            "AWS_SESSION_TOKEN": "token-of-the-tests",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",
            "NO_PROXY": "127.0.0.1",
        }


@contextmanager
def storage_server() -> Iterator[Storage]:
    """The server, as long as the block."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    backend = DomainDispatcherApplication(create_backend_app)

    def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        storage.asked.append((method, path, environ.get("HTTP_RANGE", "")))
        if storage.failures:
            storage.failures -= 1
            start_response("503 Service Unavailable", [("Content-Length", "0")])
            return []
        answer: Iterable[bytes] = backend(environ, start_response)
        if method == "GET" and storage.cuts and "?" not in environ["REQUEST_URI"]:
            return [b"".join(answer)[: storage.cuts.pop(0)]]
        return answer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, application, threaded=True)
    storage = Storage(server.server_port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield storage
    finally:
        server.shutdown()
        thread.join()
