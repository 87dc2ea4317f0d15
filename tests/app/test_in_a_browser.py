"""The page in a real browser: a file and the microphone go in, and nothing leaves the machine."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from chromium_fixtures import Chromium, find_chromium
from page_fixtures import RATE, load_classifier, make_model, sound

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("gradio", reason="the app extra is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="there is no Chromium (Debian's package: chromium)"),
]

ROOT = Path(__file__).parent.parent.parent
ANSWERED = "!!document.querySelector('#answer-label, #failure')"
LABEL = "(document.querySelector('#answer-label') || {}).innerText"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """tones/: a model; long.wav: 3.3 seconds for it; text.wav: no sound."""
    folder = tmp_path_factory.mktemp("browser")
    make_model(folder)
    soundfile.write(folder / "long.wav", sound(1.3, 1.2, 0.8), RATE)
    (folder / "text.wav").write_text("no sound")
    return folder


@pytest.fixture(scope="module")
def address(work):
    """Of the page that the command serves; Ctrl-C ends it, and leaves nothing behind."""
    (work / "temporary").mkdir()
    command = [sys.executable, "-m", "whisper_meft", "app", str(work / "tones"), "--port", "0"]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "python")))
    environment = {**os.environ, "TMPDIR": str(work / "temporary"), "PYTHONPATH": paths}
    command += ["--device", "cpu", "--max_megabytes", "1", "--title", "Three tones"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    line = process.stdout.readline()
    assert line.startswith("the page is at http://127.0.0.1:"), process.communicate()
    yield line.split()[4]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "", "the page is closed\n")
    assert os.listdir(work / "temporary") == []


@pytest.fixture
def browser(work, address, tmp_path):
    with Chromium(tmp_path, microphone=work / "long.wav") as opened:
        opened.open(address)
        opened.wait_for("!!document.querySelector('input[type=file]')")
        yield opened
        assert all(each.startswith((f"{address}/", "data:", f"blob:{address}/")) for each in opened.requests)
        assert len(opened.requests) > 10 and opened.problems == []


def test_a_file(work, browser):
    browser.choose_file("input[type=file]", work / "long.wav")
    browser.wait_for(ANSWERED)
    expected = load_classifier(work / "tones").segments(str(work / "long.wav"))
    assert browser.evaluate(LABEL) == expected.label
    titles = browser.evaluate("[document.title, document.querySelector('h1').innerText]")
    assert titles == ["Three tones", "Three tones"]
    shown = browser.evaluate("[...document.querySelectorAll('.bars .number')].map(each => each.innerText)")
    assert shown == [f"{p:.1%}" for p in sorted(map(float, expected.probabilities), reverse=True)]
    widths = browser.evaluate(
        "[...document.querySelectorAll('.bar')].map(each => each.firstChild.offsetWidth / each.offsetWidth)"
    )
    assert np.allclose(widths, sorted(expected.probabilities, reverse=True), atol=0.01)
    assert browser.evaluate("document.querySelectorAll('#answer svg').length") == 3
    assert f"in {len(expected.segments)} windows of 1 s" in browser.text()
    # Another one takes its place, and without one nothing is said.
    browser.evaluate("document.querySelector('#recording button[aria-label=Clear]').click()")
    browser.wait_for(f"!({ANSWERED})")
    browser.wait_for("!!document.querySelector('input[type=file]')")
    browser.choose_file("input[type=file]", work / "text.wav")
    browser.wait_for(ANSWERED)
    assert "text.wav cannot be read as audio" in browser.text() and browser.evaluate(LABEL) is None


def test_the_microphone(browser):
    browser.evaluate("document.querySelector('#recording button[aria-label=\"Record audio\"]').click()")
    browser.wait_for("!!document.querySelector('#recording .record-button')")
    browser.evaluate("document.querySelector('#recording .record-button').click()")
    browser.wait_for("/0:0[2-9]/.test(document.querySelector('#recording').innerText)")
    browser.evaluate("document.querySelector('#recording .stop-button').click()")
    browser.wait_for(ANSWERED)
    assert browser.evaluate(LABEL) in ("high", "low", "middle"), browser.text()


def test_a_file_that_is_too_large(work, browser, tmp_path):
    soundfile.write(tmp_path / "large.wav", np.zeros(600_000), RATE)
    browser.choose_file("input[type=file]", tmp_path / "large.wav")
    browser.wait_for("document.body.innerText.includes('exceed')")
    assert browser.evaluate(ANSWERED) is False
