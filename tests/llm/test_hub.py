"""What goes to the hub: the model and its card, nothing of this machine; against a hub of ours."""

import http.server
import json
import os
import subprocess
import sys
import threading

import pytest
from mutants import kills, mutated

from alignpro.errors import AlignProError
from alignpro.llm.models import hub

PATH = "/home/someone/models/base-7b"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """As a trained prompter's, and what does not belong to it."""
    home = tmp_path / "prompter"
    home.mkdir()
    (home / WEIGHTS).write_bytes(b"weights")
    (home / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": PATH, "r": 16}))
    (home / "prompter.json").write_text(json.dumps({"facts": {"targets": [PATH, "owner/name"], "lam": 0.05}}))
    (home / "README.md").write_text("---\nlibrary_name: peft\n---\n# A prompter\n")
    for other in ("optimizer.pt", "answers.sqlite", ".env", "notes.md"):
        (home / other).write_text("private")
    return home


def test_what_is_shared(folder):
    def check(module):
        files = module.shared_files(folder)
        assert set(files) == {
            "adapter_model.safetensors",
            "adapter_config.json",
            "prompter.json",
            "README.md",
        }
        assert json.loads(files["adapter_config.json"]) == {"base_model_name_or_path": "base-7b", "r": 16}
        assert json.loads(files["prompter.json"])["facts"] == {
            "targets": ["base-7b", "owner/name"],
            "lam": 0.05,
        }

    check(hub)
    kills(check, mutated(hub, "elsewhere(read_json(path))", "read_json(path)"))
    kills(check, mutated(hub, "(*HUB_FILES, CARD)", '("*",)'))
    assert hub.elsewhere([r"C:\models\x", "~/y/z/", "a/b", 3, None]) == ["x", "z", "a/b", 3, None]


@pytest.mark.parametrize("name", ["alone", "a/b/c", "../x", "a/..", "a b/c", "", "https://hub/a/b", "a/b--c"])
def test_wrong_names(folder, name):
    with pytest.raises(AlignProError, match="give owner/name"):
        hub.push(folder, name)


@pytest.mark.parametrize(
    ("gone", "said"),
    [("README.md", "no model card"), ("adapter_model.safetensors", "no weights in safetensors")],
)
def test_what_is_no_model(folder, gone, said):
    (folder / gone).unlink()
    with pytest.raises(AlignProError, match=said):
        hub.push(folder, "me/mine")


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's protocol that an upload of small files needs."""

    allowed = True
    asked: list[tuple[str, bytes]]

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append((self.path, body))
        said: object = {}
        here = f"http://{self.headers['Host']}/me/mine"
        if self.path == "/api/repos/create":
            said = {"url": here}
        elif self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            said = {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
        elif self.path.endswith("/commit/main"):
            said = {"success": True, "commitOid": "0" * 40, "commitUrl": f"{here}/commit/0"}
        data = json.dumps(said).encode()
        self.send_response(200 if self.allowed else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("allowed", [True, False])
def test_the_library_uploads_them(folder, allowed):
    """By the hub's own client, in a process that has a token in its environment."""
    ours = type("Ours", (Hub,), {"asked": [], "allowed": allowed})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), ours) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        kept |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": "hf_secret"}
        command = [sys.executable, "-m", "alignpro", "push", str(folder), "me/mine", "--private"]
        done = subprocess.run(command, env=kept, capture_output=True, text=True, timeout=120)
        server.shutdown()
    assert "hf_secret" not in done.stdout + done.stderr
    if not allowed:
        assert done.returncode == 2
        assert "the hub refuses this login; run `hf auth login`" in done.stderr
        assert "Traceback" not in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("/me/mine")
    bodies = dict(ours.asked)
    assert json.loads(bodies["/api/repos/create"])["visibility"] == "private"
    lines = [json.loads(line) for line in bodies["/api/models/me/mine/commit/main"].splitlines()]
    assert {line["value"]["path"] for line in lines if line["key"] == "file"} == set(hub.shared_files(folder))
    assert b"someone" not in bodies["/api/models/me/mine/commit/main"]
