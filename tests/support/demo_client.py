"""An HTTP client of the web demo, which ``involution demo`` runs in a subprocess."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys

import httpx


class DemoClient:
    """A running demo and its process."""

    def __init__(self, process, lines, address):
        self.process, self.lines, self.address = process, lines, address
        self.client = httpx.Client(base_url=address + "/gradio_api", timeout=60)

    def upload(self, name, content) -> httpx.Response:
        return self.client.post("/upload", files={"files": (name, content)})

    def request(self, path, **more) -> httpx.Response:
        file = {"path": path, "meta": {"_type": "gradio.FileData"}, **more}
        return self.client.post("/call/classify", json={"data": [file]})

    def result(self, response) -> tuple[str, object]:
        """("complete", the scores) or ("error", its payload)."""
        event = response.json()["event_id"]
        text = self.client.get(f"/call/classify/{event}").text
        kind, data = re.findall(r"event: (\w+)\ndata: (.*)", text)[-1]
        payload = json.loads(data)
        return kind, payload[0] if kind == "complete" else payload

    def classify(self, name, content) -> tuple[str, object]:
        response = self.upload(name, content)
        if response.status_code != 200:
            return str(response.status_code), response.text
        return self.result(self.request(response.json()[0]))

    @property
    def peak_memory(self) -> int:
        """Peak RSS in bytes since the process started or ``reset_peak``."""
        return self._status("VmHWM")

    @property
    def memory(self) -> int:
        return self._status("VmRSS")

    def reset_peak(self):
        with open(f"/proc/{self.process.pid}/clear_refs", "w") as file:
            file.write("5")

    def _status(self, name):
        with open(f"/proc/{self.process.pid}/status") as file:
            return 1024 * int(re.search(rf"{name}:\s+(\d+)", file.read())[1])


@contextlib.contextmanager
def demo(log, *arguments):
    """Context manager of a running ``involution demo``; ``log`` is a file for its stderr."""
    command = [sys.executable, "-m", "involution_cli", "demo", "--port", "0", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment.pop("PYTHONWARNINGS", None)
    with (
        open(log, "wb") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process,
    ):
        lines = []
        try:
            for line in process.stdout:
                lines.append(line.strip())
                if match := re.search(r"Demo: (http://\S+?)/? ", line):
                    page = DemoClient(process, lines, match[1])
                    with page.client:
                        yield page
                    break
            else:
                raise AssertionError(f"The demo did not start: {lines}, {log.read_text()}")
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            lines.extend(line.strip() for line in process.stdout)
