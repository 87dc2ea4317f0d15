"""Scores against scikit-learn and against hand-worked values; the figures against their pixels."""

import numpy as np
import pytest
from whisper_meft.errors import UserError
from whisper_meft.evaluation.metrics import Confusion, confusion_matrix, confusion_text, score
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


def many(classes, seed=0):
    """Scores of 5 examples a class, of which some are taken for the next classes; and the labels given."""
    generator = np.random.default_rng(seed)
    reference = generator.permutation(np.arange(5 * classes) % classes)
    steps = generator.integers(1, 4, len(reference)) * (generator.random(len(reference)) < 0.3)
    predicted = (reference + steps) % classes
    return score(reference, predicted, [f"class {i:05d}" for i in range(classes)]), reference, predicted


def test_the_pairs_that_occur_are_the_whole_matrix():
    scores, reference, predicted = many(40)
    matrix = np.zeros((40, 40), int)
    np.add.at(matrix, (reference, predicted), 1)
    np.testing.assert_array_equal(scores.confusion, matrix)
    np.testing.assert_array_equal(Confusion.of(matrix).cells, scores.confusion.cells)
    np.testing.assert_array_equal(scores.confusion.right, matrix.diagonal())
    for axis in (0, 1):
        np.testing.assert_array_equal(scores.confusion.sum(axis), matrix.sum(axis))
    worst = scores.confusion.worst(5)
    assert [matrix[a, b] for a, b, _ in worst] == worst[:, 2].tolist()
    off = np.where(np.eye(40, dtype=bool), 0, matrix)
    assert worst[:, 2].tolist() == sorted(off[off > 0], reverse=True)[:5]


def test_ten_thousand_classes_need_no_table_of_all_pairs(monkeypatch, tmp_path):
    monkeypatch.setattr(Confusion, "__array__", None)  # which would take 800 MB
    scores, reference, predicted = many(10_000)
    assert scores.accuracy == pytest.approx(np.mean(reference == predicted))
    assert scores.mean_class_accuracy == pytest.approx(scores.accuracy)  # all classes have 5 examples
    short, whole = scores.as_text(), scores.as_text(whole=True)
    assert short.count("\n") < 60 and max(map(len, short.splitlines())) < 110
    assert "accuracy of the worst 20 of 10000 classes" in short and "most frequent mistakes" in short
    assert whole.count("(5 examples)") == 10_000
    values = scores.as_dict()
    assert "confusion_matrix" not in values and len(values["per_class_accuracy"]) == 10_000
    found = {(a, b): n for a, row in values["confusions"].items() for b, n in row.items()}
    assert sum(found.values()) == 50_000
    assert found["class 00007", "class 00007"] == np.sum((reference == 7) & (predicted == 7))
    plot_confusion(scores.confusion, scores.labels, tmp_path / "plot.png")
    assert read_png(tmp_path / "plot.png").shape[0] < 1500


@pytest.mark.parametrize(
    ("classes", "has", "has_not"),
    [
        (30, ["confusion matrix", "<- predicted", "class 00029"], ["most frequent"]),
        (31, ["accuracy per class", "class 00030", "most frequent mistakes"], ["<- predicted"]),
        (101, ["the worst 20 of 101 classes", "taken for class"], ["<- predicted", "accuracy per class"]),
    ],
)
def test_the_text_suits_the_number_of_classes(classes, has, has_not):
    scores, _, _ = many(classes)
    text = scores.as_text()
    assert all(each in text for each in has) and not any(each in text for each in has_not)
    assert "confusion_matrix" in scores.as_dict()


def test_the_worst_classes_and_pairs_are_told():
    reference = np.repeat(np.arange(200), 3)
    predicted = reference.copy()
    predicted[reference == 150] = 7
    predicted[:1] = 9  # one of three of class 0
    text = score(reference, predicted, [f"c{i}" for i in range(201)]).as_text().splitlines()
    start = next(i for i, line in enumerate(text) if line.startswith("accuracy of the worst"))
    assert text[start + 1].split() == ["c150", "0.00%", "(3", "examples)"]
    assert text[start + 2].split()[:2] == ["c0", "66.67%"] and not any("c200 " in line for line in text)
    mistakes = text[text.index("most frequent mistakes") + 1 :]
    assert [line.split() for line in mistakes] == [
        ["c150", "3", "of", "3", "taken", "for", "c7"],
        ["c0", "1", "of", "3", "taken", "for", "c9"],
    ]
    perfect = score(reference, reference, [f"c{i}" for i in range(200)])
    assert perfect.as_text().endswith("no class was taken for another")


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


@pytest.mark.parametrize("classes", [25, 26, 101])
def test_the_figure_suits_the_number_of_classes(classes, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    written = []
    monkeypatch.setattr(Axes, "text", lambda self, x, y, text, **_: written.append(text))
    scores, _, _ = many(classes)
    plot_confusion(scores.confusion, scores.labels, tmp_path / "plot.png", "title")
    pixels = read_png(tmp_path / "plot.png")
    assert max(pixels.shape) < 3000
    assert len(written) == (classes**2 if classes == 25 else 0)  # the numbers of a matrix
    orange = (np.abs(pixels[..., :3] - np.array([0xD5, 0x5E, 0x00]) / 255).max(axis=-1) < 0.05).any()
    assert orange == (classes > 100)  # the bars of the worst pairs


def test_a_perfect_result_and_long_names_are_drawn(tmp_path):
    for classes in (3, 120):
        labels = [f"{'long name ' * 100}{i}" for i in range(classes)]
        plot_confusion(Confusion.of(np.eye(classes, dtype=int)), labels, tmp_path / "plot.png")
        assert max(read_png(tmp_path / "plot.png").shape) < 2000


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
