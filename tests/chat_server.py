"""A chat endpoint for tests: speaks the protocol, counts calls, and fails in every way it is told to."""
import json, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text, finish="stop"):
    "A whole reply of the protocol"
    choice = dict(index=0, message=dict(role="assistant", content=text), finish_reason=finish)
    return json.dumps(dict(object="chat.completion", choices=[choice],
                           usage=dict(prompt_tokens=1000, completion_tokens=10))).encode()


class ChatServer(ThreadingHTTPServer):
    "`plan` maps a call's number, from 0, to a way to fail; `answer` makes the text of a good reply from the request"
    daemon_threads = True

    def __init__(self, plan=None, answer=lambda body: '{"total":"1"}', seconds=0.):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.answer, self.seconds = plan or {}, answer, seconds
        self.calls, self.began, self.now, self.most, self.lock = [], [], 0, 0, threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(.02,), daemon=True).start()
        return self

    def __exit__(self, *_): self.shutdown(), self.server_close()
    def handle_error(self, *_): "A client that hung up is no news"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass

    def do_POST(self):
        server, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        with server.lock:
            number, server.now = len(server.calls), server.now + 1
            server.most = max(server.most, server.now)
            server.calls.append(dict(path=self.path, headers=dict(self.headers), body=json.loads(body)))
            server.began.append(time.monotonic())
        try:
            time.sleep(server.seconds)
            plan = server.plan(number, server.calls[number]) if callable(server.plan) else server.plan.get(number)
            self.fail(plan) if plan else self.send(200, completion(server.answer(server.calls[number]["body"])))
        finally:
            with server.lock: server.now -= 1

    def send(self, status, data, length=None, **headers):
        self.send_response(status)
        for name, value in headers.items(): self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(length or len(data)))
        self.end_headers()
        self.wfile.write(data)

    def fail(self, how):
        "A status, or a word for what goes wrong"
        whole = completion('{"total":"1"}')
        if isinstance(how, int): return self.send(how, b'{"error": "told to, with ' + self.key() + b'"}')
        if how == "slow": time.sleep(1.5)
        if how == "cut": return self.send(200, whole[:40], len(whole))  # promises more than it sends
        if how == "half": return self.send(200, whole[:40])
        if how == "hang up": return self.connection.close()
        if how == "later": return self.send(429, b"wait", Retry_After="0.2")
        if how == "away": return self.send(302, b"", Location=self.server.elsewhere)
        odd = {"html": b"<html>Sign in</html>", "empty": b"", "list": b"[]", "refusal": completion(None),
               "error": b'{"error": {"message": "overloaded"}}', "deep": b"[" * 100_000, "binary": b"\xff\xfe\x00{"}
        self.send(200, odd.get(how, whole))

    def key(self): return self.headers.get("Authorization", "no key").encode()
