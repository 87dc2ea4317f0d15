"""Scores of recognisers beside their backbones: what `whisper-meft evaluate` writes of transcripts."""

import csv
import json

import numpy as np
import pytest
from modelling_fixtures import randomise
from recogniser_fixtures import make_recogniser, noise
from transformers import WhisperForConditionalGeneration
from whisper_meft import LSTConfig, UserError, get_meft_model
from whisper_meft.commands.cli import main
from whisper_meft.data import Example, ExampleSet
from whisper_meft.evaluation.generating import Transcript
from whisper_meft.evaluation.recognition import evaluate_transcripts
from whisper_meft.evaluation.transcripts import ErrorCounts, intervals, score_transcripts, word_errors

from tests.training_fixtures import make_audio_folder, make_backbone


class Heard:
    """In the place of a Transcriber: what it hears is known."""

    def __init__(self, texts, language="nl", adapted=True, bad=()):
        self.texts, self.language, self.adapted, self.bad = texts, language, adapted, bad
        self.tokenizer = None

    def transcribe(self, examples):
        found = [None if i in self.bad else Transcript(text) for i, text in enumerate(self.texts)]
        return found, [(examples[i].name, "too long") for i in self.bad]


def spoken(*texts, speakers=None):
    speakers = speakers or [None] * len(texts)
    examples = (Example(audio=f"{i}.wav", text=t, speaker=s) for i, (t, s) in enumerate(zip(texts, speakers)))
    return ExampleSet(examples, "said")


def test_scores_stand_beside_those_of_the_backbone():
    examples = spoken("een twee drie", "vier vijf", "zes", speakers=["a", "b", "b"])
    result = evaluate_transcripts(
        Heard(["Een twee drie.", "vier vijf", "ze"]), examples, Heard(["een twee", "fier vijf", "zes"])
    )
    assert result.scores.normalized_wer == ErrorCounts(6, 1, 0, 0)
    assert result.zero_shot.normalized_wer == ErrorCounts(6, 1, 1, 0)
    assert [row["errors"] for row in result.rows] == [0, 0, 1]
    assert [row["zero_shot_errors"] for row in result.rows] == [1, 1, 0]
    assert result.drawn == "transcripts" and result.language == "nl"
    lines = [line.split() for line in result.as_text().splitlines()]
    assert ["adapted", "zero-shot"] in lines and ["WER", "16.7%", "33.3%"] in lines
    assert ["b", "2", "33.3%", "8.3%", "33.3%", "8.3%"] in lines  # 1 of 12 letters
    values = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert (
        values["normalized_wer"]["rate"] == 1 / 6 and values["zero_shot"]["normalized_wer"]["rate"] == 1 / 3
    )
    assert values["per_speaker"]["a"]["wer"]["substitutions"] == 2  # as written: "Een" and "drie."
    low, high = values["normalized_wer_difference_interval"]
    assert low < 0 <= high


def test_of_both_only_what_both_could_hear_is_scored():
    examples = spoken("a", "b", "c")
    result = evaluate_transcripts(Heard("abc", bad=[0]), examples, Heard("axc", bad=[0, 2]))
    assert [row["file"] for row in result.rows] == ["1.wav"]
    assert result.left_out == [("0.wav", "too long"), ("2.wav", "too long")]
    with pytest.raises(UserError, match="no example could be transcribed; 0.wav: too long"):
        evaluate_transcripts(Heard("abc", bad=[0, 1, 2]), examples)
    with pytest.raises(UserError, match="have no transcript"):
        evaluate_transcripts(Heard("ab"), spoken("a", None))


def test_a_guessed_language_has_the_normaliser_of_any():
    result = evaluate_transcripts(Heard(["Mr. X"], language=None, adapted=False), spoken("mister X"))
    assert result.scores.normalizer == "basic" and result.scores.normalized_wer.errors == 1
    assert "language guessed" in result.as_text() and "adapted" not in result.as_text()
    assert "zero_shot" not in result.as_csv().splitlines()[0]


def test_errors_of_transcripts_sum_to_the_rate():
    references, said = ["Een twee, drie", "vier"], ["een drie drie!", "vier vijf"]
    each = word_errors(references, said, "nl")
    whole = score_transcripts(references, said, "nl").normalized_wer
    assert sum(one.errors for one in each) == whole.errors and [one.length for one in each] == [3, 1]


def test_intervals_hold_the_rate_as_often_as_they_say():
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        # 40 transcripts of 10 words, each wrong with chance 0.2.
        counts = [ErrorCounts(10, int(e), 0, 0) for e in generator.binomial(10, 0.2, size=40)]
        (ends, _), drawn = intervals([counts], [None] * 40, draws=400)
        held += ends[0] <= 0.2 <= ends[1]
        assert drawn == "transcripts"
    assert 176 <= held <= 200


def test_ten_speakers_are_drawn_whole():
    # Every speaker has one rate: speakers differ far more than their transcripts.
    counts = [ErrorCounts(10, speaker, 0, 0) for speaker in range(10) for _ in range(20)]
    speakers = [str(speaker) for speaker in range(10) for _ in range(20)]
    (by_speaker, nothing), drawn = intervals([counts], speakers)
    (by_clip, _), of = intervals([counts], [None, *speakers[1:]])
    assert (drawn, of) == ("speakers", "transcripts") and not nothing.any()
    assert np.ptp(by_speaker) > 3 * np.ptp(by_clip)
    assert np.isnan(intervals([[ErrorCounts(0, 0, 0, 1)]], [None])[0]).all()


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """whisper/, lst/ and said.csv: four clips, one of which cannot be read and one that is long."""
    folder = tmp_path_factory.mktemp("recognition")
    whisper = WhisperForConditionalGeneration.from_pretrained(make_recogniser(folder / "whisper"))
    model = randomise(get_meft_model(whisper, LSTConfig(reduction_factor=4)), std=0.05)
    model.generation_config.language = "dutch"
    model.save_pretrained(folder / "lst")
    for index, seconds in enumerate((0.4, 1.4, 0.6)):
        noise(folder / f"{index}.wav", seconds, seed=index)
    (folder / "3.wav").write_text("no audio")
    lines = ["path,said,speaker", *(f'{i}.wav,"slx, rsl",s{i % 2}' for i in range(4))]
    (folder / "said.csv").write_text("\n".join(lines))
    return folder


def evaluate(work, model, *more):
    return main(["evaluate", str(work / model), "--data", str(work / "said.csv"), *more, "--device", "cpu"])


def test_evaluate_of_a_recogniser(work, tmp_path, capsys):
    options = ["--text_column_name", "said", "--output_dir", str(tmp_path / "scores")]
    assert evaluate(work, "lst", *options) == 0
    out, err = capsys.readouterr()
    assert "language nl" in out and "zero-shot" in out and "3.wav" in err and "1 of 4 examples" in err
    values = json.loads((tmp_path / "scores/eval_results.json").read_text())
    assert values["count"] == 3 and values["language"] == "nl" and values["zero_shot"]["count"] == 3
    assert values["left_out"][0]["file"].endswith("3.wav") and values["generation"]["language"] == "nl"
    assert (tmp_path / "scores/evaluation.txt").read_text().strip() in out
    with open(tmp_path / "scores/transcripts.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"].rpartition("/")[2] for row in rows] == ["0.wav", "1.wav", "2.wav"]
    assert {row["reference"] for row in rows} == {"slx, rsl"}
    assert {row["speaker"] for row in rows} == {"s0", "s1"}
    assert any(row["hypothesis"] != row["zero_shot"] for row in rows)
    total = sum(int(row["errors"]) for row in rows)
    counts = values["normalized_wer"]
    assert total == sum(counts[name] for name in ("substitutions", "deletions", "insertions"))
    written = sorted(path.name for path in (tmp_path / "scores").iterdir())
    assert written == ["eval_results.json", "evaluation.txt", "transcripts.csv"]


def test_evaluate_of_a_plain_whisper_is_the_zero_shot_beside(work, tmp_path, capsys):
    options = ["--text_column_name", "said", "--language", "nl"]
    assert evaluate(work, "whisper", *options, "--output_dir", str(tmp_path / "plain")) == 0
    assert evaluate(work, "lst", *options, "--output_dir", str(tmp_path / "lst")) == 0
    assert evaluate(work, "lst", *options, "--no_zero_shot", "--output_dir", str(tmp_path / "alone")) == 0
    plain, lst, alone = (
        json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("plain", "lst", "alone")
    )
    assert plain["zero_shot"] is None is alone["zero_shot"]
    assert plain["wer"] == lst["zero_shot"]["wer"] and alone["cer"] == lst["cer"]
    assert "adapted" not in (tmp_path / "plain/evaluation.txt").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--language", "klingon"], "language must be a code (nl) or a name (dutch)"),
        (["--num_beams", "0"], "--num_beams must be at least 1"),
        (["--text_column_name", "none"], "none"),
        (["--task", "summarize"], "--task"),
    ],
)
def test_what_cannot_be_scored_is_one_line(options, message, work, tmp_path, capsys):
    columns = [] if "--text_column_name" in options else ["--text_column_name", "said"]
    assert evaluate(work, "lst", *columns, *options, "--output_dir", str(tmp_path / "out")) in (1, 2)
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_classifier_takes_no_options_of_transcription(tmp_path, capsys):
    make_backbone(tmp_path / "base")
    (tmp_path / "base/config.json").rename(tmp_path / "base/kept")
    (tmp_path / "base/config.json").write_text('{"model_type": "whisper_meft", "task": "classification"}')
    folder = make_audio_folder(tmp_path / "data", per_class=1)
    command = ["evaluate", str(tmp_path / "base"), "--data", str(folder), "--language", "nl"]
    assert main(command) == 1
    assert "--language is for models that transcribe" in capsys.readouterr().err
