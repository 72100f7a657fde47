"""A local server of the endpoints of the Hugging Face Hub that its client uses; repositories are in
memory."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class Hub:
    """State of the server: the files of each commit of each repository; the last commit is main."""

    def __init__(self):
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        # Replacements of files' contents in downloads.
        self.replaced_content: dict[str, bytes] = {}

    def commit(self, repo, files) -> str:
        commits = self.repositories.setdefault(repo, {})
        parent = list(commits.values())[-1] if commits else {}
        name = hashlib.sha1(repr((repo, len(commits))).encode(), usedforsecurity=False).hexdigest()
        commits[name] = {**parent, **files}
        return name

    def find(self, repo, revision):
        """(commit, files), or None."""
        commits = self.repositories.get(repo, {})
        if revision == "main" and commits:
            revision = list(commits)[-1]
        return (revision, commits[revision]) if revision in commits else None


class Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_):
        pass

    def _send(self, status, body=b"", **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        self.hub.requests.append(f"{self.command} {self.path}")
        path = self.path.split("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)/?", path):
            repo, kind, revision = match.groups()
            found = self.hub.find(repo, revision)
            if found is None:
                known = repo in self.hub.repositories
                code = "RevisionNotFound" if known else "RepoNotFound"
                return self._send(404, {"error": code}, X_Error_Code=code)
            commit, files = found
            if kind == "tree":
                return self._send(
                    200,
                    [
                        {"type": "file", "path": f, "size": len(c), "oid": git_hash(c)}
                        for f, c in files.items()
                    ],
                )
            siblings = [{"rfilename": file} for file in files]
            return self._send(200, {"id": repo, "sha": commit, "siblings": siblings})
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            found = self.hub.find(*match.groups()[:2])
            if found is None or match[3] not in found[1]:
                return self._send(404, X_Error_Code="EntryNotFound")
            content = found[1][match[3]]
            large = match[3].endswith((".safetensors", ".data-00000-of-00001"))
            etag = hashlib.sha256(content).hexdigest() if large else git_hash(content)
            headers = {"X_Linked_Etag" if large else "ETag": f'"{etag}"'}
            content = self.hub.replaced_content.get(match[3], content)
            return self._send(200, content, X_Repo_Commit=found[0], **headers)
        return self._send(404)

    do_HEAD = do_GET  # noqa: N815 - BaseHTTPRequestHandler defines the name

    def do_POST(self):
        self.hub.requests.append(f"{self.command} {self.path}")
        self.hub.tokens.add(self.headers.get("Authorization"))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0]
        if self.headers.get("Authorization") != "Bearer right":
            return self._send(401, {"error": "Invalid token"})
        if path == "/api/repos/create":
            request = json.loads(body)
            repo = f"{request.get('organization') or 'me'}/{request['name']}"
            if repo in self.hub.repositories:
                return self._send(409, {"url": f"{self.server.url}/{repo}"})
            self.hub.repositories[repo] = {}
            return self._send(200, {"url": f"{self.server.url}/{repo}"})
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if re.search(r"/preupload/", path):
            files = json.loads(body)["files"]
            return self._send(
                200,
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in files
                    ]
                },
            )
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            entries = [json.loads(line) for line in body.splitlines()]
            files = {
                e["value"]["path"]: base64.b64decode(e["value"]["content"])
                for e in entries
                if e["key"] == "file"
            }
            name = self.hub.commit(match[1], files)
            url = f"{self.server.url}/{match[1]}/commit/{name}"
            return self._send(200, {"commitOid": name, "commitUrl": url, "success": True})
        return self._send(404)


@contextlib.contextmanager
def serve():
    """Yields (``Hub``, URL of the server)."""
    hub = Hub()
    handler = type("Bound", (Handler,), {"hub": hub})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub, server.url
        finally:
            server.shutdown()
            thread.join()
