"""Scores against scikit-learn and against hand-worked values; the figures against their pixels."""

import numpy as np
import pytest
from whisper_meft.errors import UserError
from whisper_meft.evaluation.metrics import confusion_matrix, confusion_text, score
from whisper_meft.evaluation.plots import plot_confusion, plot_learning_curve


def test_scores_of_a_case_worked_by_hand():
    # class a: 2 of 3 right; b: 1 of 2; c: 0 of 1 (taken for a)
    reference = np.array([0, 0, 0, 1, 1, 2])
    predicted = np.array([0, 0, 1, 1, 0, 0])
    result = score(reference, predicted, ["a", "b", "c"])
    assert result.confusion.tolist() == [[2, 1, 0], [1, 1, 0], [1, 0, 0]]
    assert result.accuracy == pytest.approx(3 / 6)
    assert result.per_class_accuracy.tolist() == pytest.approx([2 / 3, 1 / 2, 0])
    assert result.mean_class_accuracy == pytest.approx((2 / 3 + 1 / 2) / 3)
    # F1: a 2*2/(3+4), b 2*1/(2+2), c 0
    assert result.macro_f1 == pytest.approx((4 / 7 + 1 / 2 + 0) / 3)


@pytest.mark.parametrize("seed", range(5))
def test_scores_agree_with_scikit_learn(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(seed)
    classes = int(generator.integers(2, 9))
    # Skewed draws, so that rare classes sometimes do not occur at all.
    shares = generator.dirichlet(np.full(classes, 0.5))
    reference = generator.choice(classes, size=40, p=shares)
    noise = generator.integers(0, classes, 40)
    predicted = np.where(generator.random(40) < 0.6, reference, noise)
    result = score(reference, predicted, [f"class {index}" for index in range(classes)])
    expected = metrics.confusion_matrix(reference, predicted, labels=range(classes))
    np.testing.assert_array_equal(result.confusion, expected)
    assert result.accuracy == pytest.approx(metrics.accuracy_score(reference, predicted))
    assert result.macro_f1 == pytest.approx(metrics.f1_score(reference, predicted, average="macro"))
    present = np.unique(reference)
    recall = metrics.recall_score(reference, predicted, labels=present, average=None)
    assert result.per_class_accuracy[present].tolist() == pytest.approx(recall.tolist())
    assert result.mean_class_accuracy == pytest.approx(recall.mean())


def test_a_class_absent_from_the_reference_has_no_accuracy_and_leaves_the_mean_alone():
    result = score(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2]), ["a", "b", "c", "d"])
    assert np.isnan(result.per_class_accuracy[2:]).all()
    assert result.mean_class_accuracy == pytest.approx(0.75)
    # d occurs nowhere and is left out of macro-F1; c was predicted once, wrongly, and counts as 0.
    assert result.macro_f1 == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert result.as_dict()["per_class_accuracy"] == {"a": 1.0, "b": 0.5, "c": None, "d": None}
    assert "no examples" in result.as_text()


@pytest.mark.parametrize(
    "reference, predicted, message",
    [
        ([0, 1], [0], "2 labels but predicted has 1"),
        ([0, 2], [0, 1], "reference holds class index 2"),
        ([0, 1], [0, -1], "predicted holds class index -1"),
        ([[0, 1]], [[0, 1]], "1-D"),
        ([0.0, 1.0], [0, 1], "float64"),
        ([], [], "no examples"),
    ],
)
def test_unusable_labels_are_refused(reference, predicted, message):
    with pytest.raises(UserError, match=message):
        score(np.array(reference), np.array(predicted), ["a", "b"])


def test_confusion_text_is_aligned_and_complete():
    text = confusion_text(np.array([[120, 3], [4, 5]]), ["long name", "b"])
    lines = text.splitlines()
    assert lines[0].split() == ["1", "2", "<-", "predicted"]
    assert lines[1].split() == ["1", "long", "name", "120", "3"]
    assert lines[2].split() == ["2", "b", "4", "5"]
    assert len(lines[1]) == len(lines[2])


def test_confusion_matrix_is_int64_also_for_small_integer_types():
    labels = np.full(300, 99, dtype=np.uint8)
    assert confusion_matrix(labels, labels, 100)[99, 99] == 300


def read_png(path):
    from matplotlib.image import imread

    return imread(path)


def test_confusion_plot_is_darkest_where_the_share_is_largest(tmp_path):
    perfect, inverted = tmp_path / "a.png", tmp_path / "b.png"
    plot_confusion(np.array([[90, 0], [0, 9]]), ["x", "y"], perfect, "title")
    plot_confusion(np.array([[0, 90], [9, 0]]), ["x", "y"], inverted)
    for path, dark_diagonal in ((perfect, True), (inverted, False)):
        pixels = read_png(path)[..., :3].mean(axis=-1)
        height, width = pixels.shape
        # The matrix fills the middle left of the figure: compare its upper left and upper right quarters.
        left = pixels[int(0.30 * height), int(0.30 * width)]
        right = pixels[int(0.30 * height), int(0.60 * width)]
        assert bool(left < right) is dark_diagonal
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize("evaluated", [True, False])
def test_learning_curve_is_drawn_with_and_without_evaluations(tmp_path, evaluated):
    history = [{"epoch": 0.5, "loss": 2.0}, {"epoch": 1.0, "loss": 1.0}, {"train_runtime": 3.0, "epoch": 1.0}]
    if evaluated:
        history.insert(2, {"epoch": 1.0, "eval_loss": 1.2, "eval_accuracy": 0.5})
    plot_learning_curve(history, tmp_path / "curve.png", "title")
    pixels = read_png(tmp_path / "curve.png")[..., :3]
    orange = (np.abs(pixels - np.array([0xD5, 0x5E, 0x00]) / 255).max(axis=-1) < 0.05).any()
    assert orange == evaluated


def test_a_plot_into_an_unwritable_place_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        plot_confusion(np.eye(2, dtype=int), ["x", "y"], tmp_path / "file" / "plot.png")


def test_class_names_in_any_script_are_drawn_without_warnings(tmp_path, recwarn):
    plot_confusion(np.eye(3, dtype=int), ["中原官话", "لهجة", "a$^{$b"], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert not recwarn.list
