"""A stand-in for the Hugging Face hub: one data set, from a folder, over HTTP; `python hub.py FOLDER` tells where.

It answers what `huggingface_hub` and `datasets` ask: the commit, the tree, and files, whole or in parts."""
import hashlib, json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

REPO, COMMIT = "naver-clova-ix/cord-v2", "7f0115a4b758a71d6473b8d085751692da2fef98"


def told(folder, path):
    "What the hub's tree says of a file or folder"
    name = path.relative_to(folder).as_posix()
    facts = dict(path=name, oid=hashlib.sha1(name.encode()).hexdigest())
    return facts | (dict(type="directory", size=0) if path.is_dir() else dict(type="file", size=path.stat().st_size))


class Hub(BaseHTTPRequestHandler):
    protocol_version, folder = "HTTP/1.1", None

    def log_message(self, *_): pass

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        headers = {"Content-Length": str(len(body))} | {key.replace("_", "-"): value for key, value in headers.items()}
        for key, value in headers.items(): self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(body)

    def value(self, found): self.answer(200, json.dumps(found).encode(), Content_Type="application/json")

    def missing(self, code="EntryNotFound"): self.answer(404, b'{"error": "not found"}', X_Error_Code=code)

    def file(self, path):
        "A file, or the part that is asked for"
        if not path.is_file(): return self.missing()
        data, part = path.read_bytes(), self.headers.get("Range")
        facts = dict(ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=COMMIT, Accept_Ranges="bytes")
        if not part: return self.answer(200, data, **facts)
        start, _, end = part.removeprefix("bytes=").partition("-")
        start, end = int(start), min(int(end or len(data)), len(data) - 1)
        self.answer(206, data[start:end + 1], Content_Range=f"bytes {start}-{end}/{len(data)}", **facts)

    def do_HEAD(self): self.do_GET()

    def do_GET(self):
        path, api, files = unquote(urlsplit(self.path).path), f"/api/datasets/{REPO}", f"/datasets/{REPO}/resolve/"
        if path.startswith(files): return self.file(self.folder / path.removeprefix(files).partition("/")[2])
        if path.startswith(f"{api}/tree/"):
            place = self.folder / path.removeprefix(f"{api}/tree/").partition("/")[2]
            inside = place.rglob("*") if "recursive=true" in self.path.lower() else place.glob("*")
            return self.value([told(self.folder, p) for p in sorted(inside)]) if place.is_dir() else self.missing()
        if path == api or path.startswith(f"{api}/revision/"):
            names = [p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file()]
            return self.value(dict(id=REPO, sha=COMMIT, siblings=[dict(rfilename=name) for name in names]))
        self.missing("RepoNotFound")


if __name__ == "__main__":
    Hub.folder = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
