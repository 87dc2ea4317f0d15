"""The page as it is served: to whom, what may be asked for, and what stays on the machine."""

import json
import os
import socket
import time
import uuid
from pathlib import Path

import pytest
from page_fixtures import RATE, load_classifier, make_model, sound
from whisper_meft import UserError
from whisper_meft.app.about import About
from whisper_meft.app.hearing import Listener
from whisper_meft.app.page import build
from whisper_meft.app.serving import Guard, free_address, served, shown

gradio = pytest.importorskip("gradio", reason="the app extra is not installed")
httpx = pytest.importorskip("httpx")
soundfile = pytest.importorskip("soundfile")

MEGABYTE = 2**20
ABOUT = About("Tones", "LST side network · 3 classes", "# A card\n\nof tones")


class Broken:
    """A listener with a mistake in it."""

    max_seconds = 60.0

    def hear(self, path):
        raise RuntimeError(f"no such attribute of {path}")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return load_classifier(make_model(tmp_path_factory.mktemp("serving")))


@pytest.fixture(scope="module")
def place(classifier):
    """The address of a page and the folder for what is sent to it, which are gone in the end."""
    before = dict(os.environ)
    with served(
        lambda: build(Listener(classifier, 60.0), ABOUT, MEGABYTE, 3), "localhost", 0, MEGABYTE
    ) as url:
        folder = os.environ["GRADIO_TEMP_DIR"]
        assert url.startswith("http://127.0.0.1:") or url.startswith("http://[::1]:")
        yield url, folder
    assert not os.path.exists(folder)
    changed = {name for name in {*before, *os.environ} if before.get(name) != os.environ.get(name)}
    assert changed <= {"HF_HUB_DISABLE_TELEMETRY", "PYTEST_CURRENT_TEST"}
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def send(url, name, content):
    """Sends a file as the page does; the answer."""
    return httpx.post(f"{url}/gradio_api/upload", files={"files": (name, content)})


def ask(url, path, **more):
    """What is answered to a request for a file, as gradio's messages have it."""
    asked = {"path": path, "meta": {"_type": "gradio.FileData"}, **more}
    session = uuid.uuid4().hex
    body = {"data": [asked], "fn_index": 0, "session_hash": session}
    assert httpx.post(f"{url}/gradio_api/queue/join", json=body).status_code == 200
    with httpx.stream("GET", f"{url}/gradio_api/queue/data?session_hash={session}", timeout=60) as stream:
        for line in stream.iter_lines():
            message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
            if message.get("msg") == "process_completed":
                return message["output"]
    raise AssertionError("no answer")


def wav(path, wave):
    soundfile.write(path, wave, RATE)
    return path.read_bytes()


def test_a_recording_is_answered(place, classifier, tmp_path):
    content = wav(tmp_path / "tone.wav", sound(0.6, 0.9))
    (path,) = send(place[0], "tone.wav", content).json()
    assert os.path.realpath(path).startswith(os.path.realpath(place[1]))
    (html,) = ask(place[0], path)["data"]
    expected = classifier.segments(str(tmp_path / "tone.wav"))
    assert f'id="answer-label">{expected.label}<' in html and html.count("<svg") == 3
    assert f"{expected.probabilities.max():.1%}" in html


def test_a_recording_that_cannot_be_read_is_a_sentence(place):
    (path,) = send(place[0], "note.wav", b"not a sound").json()
    (html,) = ask(place[0], path)["data"]
    assert 'role="alert"' in html and "note.wav cannot be read as audio" in html and place[1] not in html


def test_files_that_are_too_large_are_not_taken(place):
    assert send(place[0], "large.wav", bytes(MEGABYTE - 4096)).status_code == 200
    refused = send(place[0], "large.wav", bytes(MEGABYTE + 1))
    assert refused.status_code == 413
    names = [name for _, _, files in os.walk(place[1]) for name in files]
    assert names.count("large.wav") <= 1 and not [name for name in names if name.startswith("tmp")]


@pytest.mark.parametrize("more", [{}, {"is_stream": True}], ids=["file", "stream"])
@pytest.mark.parametrize("where", ["absolute", "beside", "above", "address", "own address"])
def test_only_what_was_sent_is_heard(place, tmp_path, where, more):
    """Neither other files of the machine nor what an address leads to."""
    wav(tmp_path / "secret.wav", sound(0.5))
    url, folder = place
    path = {
        "absolute": str(tmp_path / "secret.wav"),
        "beside": os.path.relpath(tmp_path / "secret.wav"),
        "above": os.path.join(folder, os.path.relpath(tmp_path / "secret.wav", folder)),
        "address": "http://192.0.2.1/secret.wav",
        "own address": f"{url}/theme.css",
    }[where]
    before = sorted(os.walk(folder))
    output = ask(url, path, **more)
    assert "answer-label" not in json.dumps(output)
    assert "error" in output or "does not exist" in output["data"][0]
    assert sorted(os.walk(folder)) == before


def test_files_of_the_machine_are_not_shown(place, tmp_path):
    wav(tmp_path / "secret.wav", sound(0.5))
    for path in (str(tmp_path / "secret.wav"), "/etc/passwd", __file__, os.path.abspath("pyproject.toml")):
        assert httpx.get(f"{place[0]}/gradio_api/file={path}").status_code in (403, 404)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:7860"}, 200),
        ({"host": "localhost"}, 200),
        ({"host": "[::1]:7860"}, 200),
        ({"host": "rebound.example:7860"}, 403),
        ({"host": "localhost.example"}, 403),
        ({"host": "127.0.0.1@example.org"}, 403),
        ({"host": ""}, 403),
        ({"host": "localhost:7860", "origin": "http://localhost:7860"}, 200),
        ({"host": "localhost:7860", "origin": "http://localhost:8888"}, 403),
        ({"origin": "https://example.org"}, 403),
        ({"origin": "null"}, 403),
    ],
)
def test_other_names_and_other_sites_are_refused(place, headers, status):
    assert httpx.get(place[0], headers=headers).status_code == status


def test_a_page_for_others_takes_any_name():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})

    def get(local):
        sent = []

        async def note(message):
            sent.append(message)

        scope = {"type": "http", "headers": [(b"host", b"lab.example"), (b"origin", b"https://lab.example")]}
        with pytest.raises(StopIteration):
            Guard(app, local)(scope, None, note).send(None)
        return sent[0]

    assert get(True)["status"] == 403
    assert get(False)["status"] == 200 and (b"a", b"b") in get(False)["headers"]
    assert any(name == b"content-security-policy" for name, _ in get(False)["headers"])


def test_a_browser_is_told_to_ask_nobody_else(place):
    page = httpx.get(place[0])
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    own = {"'self'", "'none'", "data:", "blob:", "'unsafe-inline'", "'unsafe-eval'"}
    assert policy["default-src"] and all(set(value.split()) <= own for value in policy.values())
    assert page.headers["referrer-policy"] == "no-referrer"
    config = httpx.get(f"{place[0]}/config").json()
    assert not config["analytics_enabled"] and config["title"] == "Tones" and not config["footer_links"]
    styles = httpx.get(f"{place[0]}/theme.css").text
    assert "http" not in styles.replace("http://www.w3.org", "")
    for path in ("docs", "redoc", "openapi.json", "monitoring", "gradio_api/runs"):
        assert httpx.get(f"{place[0]}/{path}").status_code in (403, 404)
    assert httpx.get(f"{place[0]}/gradio_api/info").json() == {"named_endpoints": {}, "unnamed_endpoints": {}}


def test_what_is_sent_is_deleted_after_a_while(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr("whisper_meft.app.page.KEPT_SECONDS", 1)
    monkeypatch.setattr("whisper_meft.app.page.LOOKED_SECONDS", 1)
    content = wav(tmp_path / "tone.wav", sound(0.5))
    with served(lambda: build(Listener(classifier), ABOUT, MEGABYTE, 3), "127.0.0.1", 0, MEGABYTE) as url:
        (path,) = send(url, "tone.wav", content).json()
        assert "answer-label" in ask(url, path)["data"][0]
        end = time.monotonic() + 20
        while os.path.exists(path):
            assert time.monotonic() < end
            time.sleep(0.1)


def test_mistakes_of_ours_are_told_in_the_terminal(tmp_path, caplog):
    page = build(Broken(), About("a", "b", None), MEGABYTE, 3)
    (function,) = page.fns.values()
    assert function.fn(None) == ""
    html = function.fn("/somewhere/a.wav")
    assert "Something went wrong" in html and "somewhere" not in html
    assert "no such attribute" in caplog.text


def test_addresses_that_cannot_be_listened_on():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--host localhost --port {port} cannot be listened on: Address"):
            free_address("localhost", port)
    address, free = free_address("127.0.0.1", 0)
    assert address == "127.0.0.1" and 0 < free < 65536
    with pytest.raises(UserError, match="--host: there is no address 'no.such.host.invalid'"):
        free_address("no.such.host.invalid", 0)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1", "http://127.0.0.1:7"),
        ("0.0.0.0", "http://127.0.0.1:7"),
        ("192.0.2.1", "http://192.0.2.1:7"),
        ("::1", "http://[::1]:7"),
        ("::", "http://[::1]:7"),
    ],
)
def test_the_address_that_is_told(address, said):
    assert shown(address, 7) == said


def test_a_page_on_the_other_loopback():
    try:
        free_address("::1", 0)
    except UserError:
        pytest.skip("there is no IPv6 here")
    with served(lambda: build(Broken(), ABOUT, MEGABYTE, 3), "::1", 0, MEGABYTE) as url:
        assert url.startswith("http://[::1]:") and httpx.get(url).status_code == 200
        assert httpx.get(url, headers={"host": "rebound.example"}).status_code == 403


def test_gradio_is_imported_by_nothing_else():
    import ast

    import whisper_meft

    for path in Path(whisper_meft.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        heads = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [alias.name for node in heads for alias in node.names]
        names += [node.module or "" for node in heads if isinstance(node, ast.ImportFrom)]
        assert not {name.split(".")[0] for name in names} & {"gradio", "starlette", "uvicorn", "httpx"}, path
