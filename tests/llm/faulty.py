"""A chat-completions server on loopback that misbehaves on purpose; what it says depends on the request."""

import hashlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PATIENCE = 20.0  # seconds after which a handler gives up, whatever a test does wrong


def text_of(body: dict[str, Any]) -> str:
    """What the server says: a function of prompt, seed and sampling parameters."""
    seed = body.get("seed", 0)
    asked = [body["messages"], seed, *(body.get(name) for name in ("temperature", "top_p", "max_tokens"))]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[: 3 + seed % 7]


def completion(body: dict[str, Any], **changes: Any) -> dict[str, Any]:
    text = text_of(body)
    return {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": len(body["messages"][0]["content"]), "completion_tokens": len(text)},
        **changes,
    }


class Server:
    """Calls `fault(number of the request, body)`; what it returns is sent, `None` an ordinary answer.

    A fault is (status, headers, bytes), or one of the strings close, stall and drip.
    """

    def __init__(self, fault: Callable[[int, dict[str, Any]], Any] = lambda n, body: None) -> None:
        self.fault = fault
        self.requests: list[tuple[dict[str, Any], dict[str, str]]] = []
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self.dripped = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer.handle(self)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.http.shutdown()
        self.http.server_close()

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        with self.lock:
            number = len(self.requests)
            self.requests.append((body, {k.lower(): v for k, v in handler.headers.items()}))
        fault = self.fault(number, body)
        try:
            if fault == "close":
                handler.close_connection = True
                handler.connection.close()
                return
            if fault == "stall":
                self.ended.wait(PATIENCE)
                handler.close_connection = True
                return
            status, headers, data = fault if isinstance(fault, tuple) else (200, {}, b"")
            if not isinstance(fault, tuple):
                data = json.dumps(completion(body)).encode()
            handler.send_response(status)
            for name, value in {"content-type": "application/json", **headers}.items():
                handler.send_header(name, value)
            handler.send_header("content-length", str(len(data)))
            handler.end_headers()
            if fault == "drip":
                for i in range(len(data)):
                    handler.wfile.write(data[i : i + 1])
                    self.dripped += 1
                    if self.ended.wait(0.05):
                        return
            else:
                handler.wfile.write(data)
        except OSError:
            handler.close_connection = True  # the client has gone
