"""A folder that stands for the Hub: a server that speaks what huggingface_hub's client needs to download, list and upload files.

`python fake_hub.py FOLDER` prints its address. FOLDER/org/name holds a repository's files, FOLDER/org/name@REVISION those of another
revision than main; FOLDER/requests.log says what was fetched (name/path).
"""

import base64
import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub(BaseHTTPRequestHandler):
    root: Path

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            folder = self.folder("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
            if not folder.is_dir():
                return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            if "tree" in parts:
                return self.answer(200, [self.facts(folder, path) for path in files_of(folder)])
            siblings = [{"rfilename": path.relative_to(folder).as_posix()} for path in files_of(folder)]
            return self.answer(
                200, {"id": "/".join(parts[2:4]), "sha": commit_of(folder), "siblings": siblings, "private": False}
            )
        if parts == ["api", "whoami-v2"]:
            return self.answer(200, {"type": "user", "name": "me", "auth": {}})
        if "resolve" in parts:
            at = parts.index("resolve")
            folder, name = self.folder("/".join(parts[:at]), parts[at + 1]), "/".join(parts[at + 2 :])
            if not (folder / name).is_file():
                known = folder.is_dir()
                return self.answer(404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"})
            if self.command == "GET":
                with open(self.root / "requests.log", "a", encoding="utf-8") as log:
                    log.write(f"{folder.name}/{name}\n")
            data = (folder / name).read_bytes()
            return self.answer(200, data, {"ETag": f'"{sha(data)}"', "X-Repo-Commit": commit_of(folder)})
        return self.answer(404, {"error": self.path})

    def do_POST(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            (self.root / name).mkdir(parents=True, exist_ok=True)
            return self.answer(200, {"url": f"{self.address()}/{name}", "name": name, "id": name})
        if parts == ["api", "validate-yaml"]:
            return self.answer(200, {"errors": [], "warnings": []})
        folder = self.root / "/".join(parts[2:4])
        if parts[4] == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return self.answer(200, {"files": files})
        if parts[4] == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    target = folder / line["value"]["path"]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(base64.b64decode(line["value"]["content"]))
            url = f"{self.address()}/{'/'.join(parts[2:4])}/commit/{commit_of(folder)}"
            return self.answer(200, {"success": True, "commitOid": commit_of(folder), "commitUrl": url, "hookOutput": ""})
        return self.answer(404, {"error": self.path})

    def folder(self, name, revision):
        """The folder of a revision, by its name or its commit; that of main if there is no such."""
        others = [*self.root.glob(f"{name}@*")]
        found = (other for other in others if other.name.endswith(f"@{revision}") or commit_of(other) == revision)
        return next(found, self.root / name)

    def facts(self, folder, path):
        data = path.read_bytes()
        return {"type": "file", "path": path.relative_to(folder).as_posix(), "size": len(data), "oid": sha(data)}

    def address(self):
        return f"http://{self.headers['Host']}"

    def answer(self, status, content, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if isinstance(content, bytes) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sha(data):
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def commit_of(folder):
    """Forty hex digits that change with any file."""
    return sha("".join(f"{path.relative_to(folder)}{sha(path.read_bytes())}" for path in files_of(folder)).encode())


def serve(folder):
    """The server, of which `server_port` tells where; connections are refused until `server_activate`, `serve_forever` runs it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubOf", (Hub,), {"root": Path(folder)}), bind_and_activate=False)
    server.server_bind()
    return server


if __name__ == "__main__":
    server = serve(sys.argv[1])
    server.server_activate()
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
