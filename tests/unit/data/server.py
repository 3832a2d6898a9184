"""A web server for tests that misbehaves in every way we know."""

import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """A folder over HTTP. ``faults`` maps a file name to how it is served; ``asked`` notes (name, range)."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.asked = folder, {}, []
        self.released = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request, client_address):
        """Clients that give up are part of the test."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/data"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        name = self.path.rpartition("/")[2]
        fault = self.server.faults.get(name)
        path = os.path.join(self.server.folder, name)
        if fault == "missing" or not os.path.exists(path):
            self.send_error(404)
            return
        with open(path, "rb") as f:
            content = f.read()
        if fault == "page":
            content = b"<!DOCTYPE html><html>please log in</html>"
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if body:
            self.server.asked.append((name, wanted and wanted.group()))
        if fault == "silent" and body:
            self.server.released.wait(30)
        if isinstance(fault, int) and fault > 0 and body:
            self.server.faults[name] = fault - 1
            self.send_error(503)
            return
        if wanted and fault != "no ranges":
            first, last = int(wanted[1]), min(int(wanted[2]), len(content) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            content = content[first : last + 1]
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        if fault == "no length":
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body and fault == "slow":
            for part in range(0, len(content), 4096):
                time.sleep(0.01)
                self.wfile.write(content[part : part + 4096])
        elif body:
            self.wfile.write(content[: len(content) // 2] if fault == "broken" else content)
            self.close_connection = fault in ("broken", "no length")
