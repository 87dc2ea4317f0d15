"""Error rates against counts made by hand, and the ways to ask for what cannot be scored."""

import json
import math

import pytest
from whisper_meft.errors import UserError
from whisper_meft.evaluation.transcripts import ErrorCounts, score_transcripts, whisper_normalizer


def test_rates_are_of_all_words_and_not_of_sentences():
    scores = score_transcripts(["een twee drie vier", "ja"], ["een twee vier", "nee ja"], "nl")
    assert scores.wer == ErrorCounts(5, substitutions=0, deletions=1, insertions=1)
    assert scores.wer.rate == pytest.approx(2 / 5)
    # "drie " is gone, "nee " is new.
    assert scores.cer == ErrorCounts(20, substitutions=0, deletions=5, insertions=4)
    assert scores.count == 2 and scores.normalizer == "basic"


def test_normalisers_forgive_case_and_marks():
    scores = score_transcripts(["Ja, zeker!"], ["ja zeker"], "dutch")
    assert scores.wer.rate == 1 and scores.normalized_wer.errors == scores.normalized_cer.errors == 0
    scores = score_transcripts(["Mr. Smith didn't."], ["mister smith did not"], "en")
    assert scores.normalizer == "english" and scores.normalized_wer.errors == 0
    colour = ["the colour"], ["the color"]
    assert score_transcripts(*colour, "en").normalized_wer.errors == 1
    assert score_transcripts(*colour, "en", spelling={"colour": "color"}).normalized_wer.errors == 0


@pytest.mark.parametrize("blank", ["\n", "\t", "\u00a0", "\u202f", "\u3000", "  ", "\r\n "])
def test_white_space_of_any_kind_lies_between_words(blank):
    scores = score_transcripts([f"Quoi{blank}?"], ["Quoi ?"], "fr")
    assert scores.wer == ErrorCounts(2, 0, 0, 0) and scores.cer == ErrorCounts(6, 0, 0, 0)


def test_spellings_from_a_file(tmp_path):
    path = tmp_path / "normalizer.json"
    path.write_text('{"colour": "color"}')
    assert score_transcripts(["colour"], ["color"], spelling=path).normalized_wer.errors == 0
    path.write_text("[")
    with pytest.raises(UserError, match="normalizer.json cannot be read"):
        whisper_normalizer("en", path)


def test_languages_without_spaces_are_scored_by_letter():
    scores = score_transcripts(["今天很好"], ["今天不好"], "chinese")
    assert scores.normalized_wer == ErrorCounts(4, 1, 0, 0) and scores.wer == ErrorCounts(1, 1, 0, 0)


def test_a_rate_may_pass_one_and_silence_has_none():
    scores = score_transcripts(["a"], ["b c d"], "de")
    assert scores.wer.rate == 3
    nothing = score_transcripts([""], ["b"], "de")
    assert math.isnan(nothing.wer.rate) and nothing.wer.insertions == 1
    assert nothing.as_dict()["wer"]["rate"] is None and "no reference" in nothing.as_text()
    json.dumps(nothing.as_dict(), allow_nan=False)


def test_by_speaker():
    scores = score_transcripts(["a b", "a b", "a"], ["a b", "a x", ""], "nl", ["s0", "s1", None])
    assert list(scores.per_speaker) == ["s0", "s1"]
    assert scores.per_speaker["s1"].wer == ErrorCounts(2, 1, 0, 0)
    assert "s1" in scores.as_text() and scores.as_dict()["per_speaker"]["s0"]["wer"]["rate"] == 0


def test_what_cannot_be_scored():
    with pytest.raises(UserError, match="0 references and 0 hypotheses"):
        score_transcripts([], [])
    with pytest.raises(UserError, match="2 references and 1 hypotheses"):
        score_transcripts(["a", "b"], ["a"])
    with pytest.raises(UserError, match="language='klingon' is none of Whisper's"):
        score_transcripts(["a"], ["a"], "klingon")
