"""llama-server as the benchmark knows it: `/health`, and `/completion` in streams of one token each.

python fake_llama_server.py --model FILE --port P ...
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """Answers with the number of each token, and says that half of the prompt was known."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._send(b'{"status": "ok"}', "application/json")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert self.path == "/completion"
        assert (body["temperature"], body["ignore_eos"], body["return_tokens"]) == (0, True, True)
        timings = {"cache_n": len(body["prompt"]) // 2}
        events = [{"content": "x", "tokens": [number], "stop": False} for number in range(body["n_predict"])]
        if not body["stream"]:
            tokens = [event["tokens"][0] for event in events]
            self._send(json.dumps({"tokens": tokens, "stop": True, "timings": timings}).encode(), "application/json")
            return
        events.append({"content": "", "tokens": [], "stop": True, "timings": timings})
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for event in events:
            time.sleep(0.005)  # as a model takes: prompts arrive while others are answered
            data = f"data: {json.dumps(event)}\n\n".encode()
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    words = sys.argv[1:]
    server = ThreadingHTTPServer(("127.0.0.1", int(words[words.index("--port") + 1])), Handler)
    server.daemon_threads = True
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever()


if __name__ == "__main__":
    main()
