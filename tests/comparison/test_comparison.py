"""`whisper-meft compare`: what it chooses by, what it leaves behind, going on, and failures."""

import json
from pathlib import Path

import pytest
from training_fixtures import make_audio_folder, make_backbone
from whisper_meft import MeftConfig, UserError
from whisper_meft.commands.cli import main
from whisper_meft.commands.compare import make_parser
from whisper_meft.commands.train import make_parser as train_parser
from whisper_meft.comparison import costs as compare_costs
from whisper_meft.comparison import runs as compare
from whisper_meft.comparison.arguments import options_of
from whisper_meft.training import run as train

METHODS = ["head", 's2_lora:r=2+target_modules=["fc1","fc2"]']
COSTS = {
    "trainable_parameters": 3,
    "all_parameters": 4,
    "step_time_ratio": 1.5,
    "counted_mib": 2.0,
    "measured_mib": 2.5,
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    make_backbone(folder / "backbone")
    make_audio_folder(folder / "corpus" / "train", per_class=10)
    make_audio_folder(folder / "corpus" / "test", per_class=4, seed=1)
    return folder


def command(work: Path, output: Path, **options) -> list[str]:
    options = {
        "methods": ",".join(METHODS),
        "model_name_or_path": work / "backbone",
        "train_data": work / "corpus",
        "output_dir": output,
        "seeds": 2,
        "num_train_epochs": 1,
        **options,
    }
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return ["compare", *given, "--learning_rates", "1e-3", "1e-2"]


@pytest.fixture
def cheap(monkeypatch):
    """Without measuring time and memory, which has a test of its own. Counts the training runs."""
    runs = []
    original = compare.train

    def counted(model, method, data, training, **options):
        runs.append((method.method, training.learning_rate, training.seed))
        return original(model, method, data, training, **options)

    monkeypatch.setattr(compare, "measure_costs", lambda *a: dict(COSTS))
    monkeypatch.setattr(compare, "train", counted)
    return runs


def test_a_comparison_leaves_json_table_and_figures(work, tmp_path, capsys, cheap, monkeypatch):
    scored = []
    original = compare.evaluate
    monkeypatch.setattr(compare, "evaluate", lambda *a: scored.append(len(a[1])) or original(*a))
    assert main(command(work, tmp_path / "out")) == 0
    results = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert list(results["methods"]) == METHODS
    assert results["settings"]["train_examples"] + results["settings"]["validation_examples"] == 30
    assert scored == [12] * 4  # the test clips: once per method and seed, never for the search
    for method, row in results["methods"].items():
        assert row["status"] == "ok" and row["step_time_ratio"] == 1.5
        assert [run["learning_rate"] for run in row["search"]] == [1e-3, 1e-2]
        best = max(row["search"], key=lambda run: (run["validation_accuracy"], -run["validation_loss"]))
        assert row["learning_rate"] == best["learning_rate"]
        assert [each["seed"] for each in row["seeds"]] == [0, 1]
        values = [each["test"]["accuracy"] for each in row["seeds"]]
        assert row["accuracy"]["values"] == values
        assert row["accuracy"]["mean"] == pytest.approx(sum(values) / 2)
        assert row["accuracy"]["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
        assert all(each["test"]["count"] == 12 for each in row["seeds"])
        assert cheap.count((method.partition(":")[0], row["learning_rate"], 1)) == 1
        assert row["options"]["method"] == method.partition(":")[0]
    table = (tmp_path / "out" / "compare.md").read_text()
    assert all(f"| {method} |" in table for method in METHODS) and "1.50 x" in table
    best = max(row["accuracy"]["mean"] for row in results["methods"].values())
    assert f"standard error of {100 * (best * (1 - best) / 12) ** 0.5:.1f} points" in table
    for name in ("accuracy.png", "costs.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"
    assert not list((tmp_path / "out").rglob("checkpoint-*"))
    assert len(list((tmp_path / "out").rglob("model.safetensors"))) == 4  # of what was scored
    printed = capsys.readouterr().out
    assert "chosen on 6 validation clips, scored on 12 test clips" in printed

    # Once more: everything is there.
    before = list(cheap)
    assert main(command(work, tmp_path / "out")) == 0
    assert cheap == before and len(scored) == 4
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == results
    # Another budget is another comparison.
    assert main(command(work, tmp_path / "out", methods="head", num_train_epochs=2, seeds=1)) == 0
    assert len(cheap) == len(before) + 2
    again = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert (
        again["methods"]["head"]["search"][0]["steps"] == 2 * results["methods"]["head"]["search"][0]["steps"]
    )


def test_an_interrupted_comparison_goes_on_where_it_was(work, tmp_path, capsys, cheap, monkeypatch):
    options = {"methods": "head", "num_train_epochs": 2, "seeds": 1}
    assert main(command(work, tmp_path / "whole", **options)) == 0
    whole = json.loads((tmp_path / "whole" / "compare.json").read_text())

    def interrupt(self, args, state, control, **kwargs):
        if args.learning_rate == 1e-2 and state.epoch == 1:
            raise KeyboardInterrupt

    cheap.clear()
    monkeypatch.setattr(train.LogLines, "on_epoch_begin", interrupt)
    assert main(command(work, tmp_path / "out", **options)) == 130
    assert cheap == [("head", 1e-3, 0), ("head", 1e-2, 0)]
    assert "interrupted" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(compare, "measure_costs", lambda *a: dict(COSTS))
    assert main(command(work, tmp_path / "out", **options)) == 0
    log = (tmp_path / "out" / "runs" / "head" / "lr0.01-seed0" / "log.txt").read_text()
    assert "resuming from" in log
    again = json.loads((tmp_path / "out" / "compare.json").read_text())
    for results in (whole, again):
        for run in results["methods"]["head"]["search"]:
            run["seconds"], run["train_loss"] = None, pytest.approx(run["train_loss"], rel=1e-5)
    assert again == whole


def test_results_of_other_data_are_not_taken_for_those_of_this(work, tmp_path, capsys, cheap):
    """Another column of the same table, another split, another sentence in the same file."""
    files = sorted((work / "corpus").rglob("*.wav"))
    table = tmp_path / "clips.csv"

    def write(swapped=0) -> None:
        lines = ["file,accent,noise,voice,split"]
        for i, file in enumerate(files):
            label = file.parent.name if i >= swapped else files[-1].parent.name
            split = "test" if "test" in file.parts else "train"
            lines.append(f"{file},{label},{'ab'[i % 2]},{i % 5},{split}")
        table.write_text("\n".join(lines) + "\n")

    def arguments(**changes) -> list[str]:
        options = {
            "methods": "head",
            "seeds": 1,
            "train_data": table,
            "label_column_name": "accent",
            **changes,
        }
        return command(work, tmp_path / "out", **options)[:-1]

    def settings(**changes) -> dict:
        return compare.Comparison(*make_parser().parse(arguments(**changes)[1:])).settings

    write()
    assert main(arguments()) == main(arguments()) == 0 and len(cheap) == 1
    capsys.readouterr()
    assert main(arguments(label_column_name="noise")) == 0 and len(cheap) == 2
    assert "trained anew, another digests" in capsys.readouterr().out
    first = settings()
    assert settings() == first
    assert settings(validation_fraction=0.4) != first
    assert settings(speaker_column_name="voice")["digests"] != first["digests"]
    assert settings(audio_column_name="file") != first and settings(data_root="/") != first
    # What changes no clip, and what other clips of validation make of no account.
    of_no_account = {
        "strict": True,
        "data_format": "manifest",
        "layout": "class",
        "dataset_cache_dir": "there",
    }
    assert settings(**of_no_account) == first
    separate = {"eval_data": work / "corpus" / "test", "test_data": work / "corpus" / "test"}
    fractions = [settings(**separate, validation_fraction=fraction) for fraction in (0.1, 0.4)]
    assert fractions[0] == fractions[1] != first
    write(swapped=1)
    assert settings()["digests"]["test"] != first["digests"]["test"]
    # Of a version that did not keep this.
    (path,) = (tmp_path / "out" / "runs").rglob("settings.json")
    kept = json.loads(path.read_text())
    for name in ("digests", "data_format"):
        del kept[name]
    path.write_text(json.dumps(kept))
    assert main(arguments()) == 0 and len(cheap) == 3
    assert "data_format, digests of the run that is there not known" in capsys.readouterr().out


def test_runs_with_other_noise_are_not_taken_for_those_with_this(work, tmp_path):
    make_audio_folder(tmp_path / "noise", per_class=1)
    make_audio_folder(tmp_path / "rooms", per_class=1)

    def settings(*augment) -> dict:
        argv = [*command(work, tmp_path / "out", methods="head")[1:], *map(str, augment)]
        return compare.Comparison(*make_parser().parse(argv)).settings

    plain = settings()
    assert (
        set(plain["digests"])
        == {"training", "validation", "test"}
        == set(settings("--augment", "noise", "spec")["digests"])
    )
    both = ["--augment", "noise", "room", "--noise_dir", tmp_path / "noise", "--room_dir", tmp_path / "rooms"]
    first = settings(*both)
    assert settings(*both) == first
    for name, folder in (("noise_dir", "noise"), ("room_dir", "rooms")):
        (tmp_path / folder / "low" / "low0.wav").rename(tmp_path / folder / "low" / "other.wav")
        second = settings(*both)
        assert compare._differences(first, second) == "another digests"
        assert {n for n, d in second["digests"].items() if d != first["digests"][n]} == {name}
        first = second
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="noise_dir: no audio files were found"):
        settings("--augment", "noise", "--noise_dir", tmp_path / "none")


@pytest.mark.parametrize("windows", [("longest", "fidelity"), ("fidelity", "longest"), ("longest", "20")])
def test_a_window_of_its_own_is_what_a_method_is_trained_and_measured_on(
    windows, work, tmp_path, monkeypatch
):
    """Clips are made into features once, and those of another window are not taken."""
    given, measured = {}, []
    original = compare.train

    def train(model, method, *arguments, make_dataset, **options):
        made = []

        def make(*each, **more):
            made.append(make_dataset(*each, **more))
            return made[-1]

        outcome = original(model, method, *arguments, make_dataset=make, **options)
        given[str(method.max_frames)] = {made[0][i]["input_features"].shape[1] for i in range(len(made[0]))}
        return outcome

    def measure(sizes, config, batch, *_):
        measured.append((str(config.max_frames), batch["input_features"].shape[2]))
        return dict(COSTS)

    monkeypatch.setattr(compare, "train", train)
    monkeypatch.setattr(compare, "measure_costs", measure)
    methods = ",".join(f"head:max_frames={each}" for each in windows)
    assert main(command(work, tmp_path / "out", methods=methods, seeds=1)[:-1]) == 0
    lengths = {"fidelity": {100}, "20": {40}}
    for window, frames in measured:
        assert frames == max(given[window])
        assert given[window] == lengths.get(window, given[window])
    assert [window for window, _ in measured] == list(windows) and len(given["longest"]) > 5


def test_failures_are_rows_with_a_reason(work, tmp_path, capsys, cheap, monkeypatch):
    counted = compare.train

    def failing(model, method, data, training, **options):
        if method.method == "s2_lora" or training.learning_rate > 5e-3:
            raise UserError("the loss is NaN or infinite at step 2")
        return counted(model, method, data, training, **options)

    monkeypatch.setattr(compare, "train", failing)
    assert main(command(work, tmp_path / "out", seeds=1)) == 1
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())["methods"]
    assert rows[METHODS[1]] == {"status": "failed", "reason": "the loss is NaN or infinite at step 2"}
    assert rows["head"]["status"] == "ok" and rows["head"]["learning_rate"] == 1e-3
    assert rows["head"]["search"][1]["failed"] == "the loss is NaN or infinite at step 2"
    assert rows["head"]["accuracy"]["std"] is None
    assert f"| {METHODS[1]} | failed: the loss is NaN" in (tmp_path / "out" / "compare.md").read_text()
    error = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert error == [f"whisper-meft: error: {METHODS[1]} failed, see the table"]


def test_the_rate_is_chosen_by_validation_alone(work, tmp_path, monkeypatch):
    """The better rate on the validation clips wins, also when it is worse on the test clips."""
    monkeypatch.setattr(compare, "measure_costs", lambda *a: dict(COSTS))
    arguments = make_parser().parse(command(work, tmp_path / "out", methods="mezo", seeds=1)[1:])[0]
    comparison = compare.Comparison(arguments)
    validation = {1e-5: (0.5, 1.0), 1e-4: (0.5, 0.9)}  # a tie in accuracy: the loss decides

    def fake_run(method, rate, seed, say):
        accuracy, loss = validation[rate]
        scores = {"validation_accuracy": accuracy, "validation_loss": loss, "seconds": 0.0}
        return {"folder": f"lr{rate}", "learning_rate": rate, "seed": seed, **scores}

    test = {1e-5: 0.9, 1e-4: 0.1}
    monkeypatch.setattr(comparison, "run", fake_run)
    monkeypatch.setattr(comparison, "_can_score", lambda run: True)
    monkeypatch.setattr(
        comparison,
        "score_on_test",
        lambda run: {"accuracy": test[run["learning_rate"]], "mean_class_accuracy": 0.0},
    )
    row = comparison.compare("mezo", lambda text: None)
    assert row["learning_rate"] == pytest.approx(1e-4) and row["accuracy"]["mean"] == 0.1


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"methods": "lst,lora2"}, 2, "--methods must be all or some of "),
        ({"methods": ","}, 2, "--methods is empty"),
        ({"methods": "lst:r"}, 2, "options are written lst:option=value+option=value, got 'lst:r'"),
        ({"methods": "lst:r=3"}, 1, "'r' is not an option of lst"),
        ({"seeds": 0}, 2, "--seeds must be at least 1, got 0"),
        ({"output_dir": None}, 2, "--output_dir is needed"),
        ({"train_data": "{work}/corpus/train"}, 1, "--test_data is needed"),
        ({"output_dir": "{work}/backbone/config.json"}, 1, "is a file, a folder is needed"),
        ({"model_name_or_path": "{work}/nowhere"}, 1, "there is no folder"),
        # What is wrong whatever the data is found before that is looked for.
        ({"num_train_epochs": 0, "train_data": "{work}/nowhere"}, 2, "--num_train_epochs must be above 0"),
        ({"num_train_epochs": -1, "train_data": None}, 2, "--num_train_epochs must be above 0"),
        ({"methods": "head,lst:layers=last:99", "train_data": "{work}/nowhere"}, 1, "lst:layers=last:99: "),
        ({"methods": "lst:placement=both", "train_data": "{work}/nowhere"}, 1, "placement must be 'encoder'"),
    ],
)
def test_mistakes_give_one_line(options, status, message, work, tmp_path, capsys):
    options = {k: v.format(work=work) if isinstance(v, str) else v for k, v in options.items()}
    assert main(command(work, tmp_path / "out", **options)) == status
    error = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(error) == 1 and message in error[0]


@pytest.mark.parametrize("methods, message", [("all", "no data at"), ("head,lora", "lora: needs peft")])
def test_a_method_that_cannot_be_stops_only_who_named_it(
    methods, message, work, tmp_path, monkeypatch, capsys
):
    def refuse(config, *_):
        if config.method == "lora":
            raise UserError("needs peft")

    monkeypatch.setattr(compare, "check_method", refuse)
    options = {"methods": methods, "train_data": f"{work}/nowhere"}
    assert main(command(work, tmp_path / "out", **options)) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["window", "hop", "cache_features", "cache_storage", "cache_copies"])
def test_what_training_has_and_a_comparison_has_not(option, tmp_path, capsys):
    told = f"--{option} is no option of this command: it t"
    assert main(["compare", f"--output_dir={tmp_path / 'out'}", f"--{option.replace('_', '-')}", "4"]) == 2
    assert told in capsys.readouterr().err
    (tmp_path / "options.json").write_text(json.dumps({"output_dir": "out", option: 4}))
    assert main(["compare", str(tmp_path / "options.json")]) == 2
    error = capsys.readouterr().err
    assert told.removeprefix("--") in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
    known = {action.dest for action in train_parser()._actions}
    assert option in known and option not in {action.dest for action in make_parser()._actions}


def test_several_processes_are_refused(work, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command(work, tmp_path / "out")) == 1
    assert "compare runs in one process" in capsys.readouterr().err


def test_ranks_and_widths_follow_the_backbone():
    for method in MeftConfig.methods():
        options = options_of(method, 768, 8)
        assert MeftConfig.from_dict(options) == MeftConfig.from_dict({"method": method})
    small = {m: options_of(m, 128, 8) for m in ("lora", "adalora", "adapter", "lst")}
    assert small["lora"] == {"method": "lora", "r": 11, "lora_alpha": 88}
    assert small["adalora"] == {"method": "adalora", "init_r": 43, "target_r": 11, "lora_alpha": 86}
    assert small["adapter"] == {"method": "adapter", "adapter_dim": 11}
    assert small["lst"] == {"method": "lst", "reduction_factor": 8, "adapter_dim": 43}
    # What is given behind the colon wins, and the scale of an update goes with its rank.
    assert options_of("lst:reduction_factor=2", 128, 8)["reduction_factor"] == 2
    assert options_of("lora:r=4", 128, 8) == {"method": "lora", "r": 4, "lora_alpha": 32}
    given = options_of('lora:r=4+lora_alpha=7+target_modules=["fc1"]', 128, 8)
    assert given == {"method": "lora", "r": 4, "lora_alpha": 7, "target_modules": ["fc1"]}


@pytest.mark.parametrize("method", ["full", "lst", "mezo", "adalora"])
def test_costs_of_a_step(method, work):
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(work / "backbone")
    batch = {"input_features": torch.randn(3, 80, 100), "labels": torch.zeros(3, dtype=torch.long)}
    options = options_of(method, config.d_model, 4)
    chosen = MeftConfig.from_dict(options)
    costs = compare_costs.measure_costs(config, chosen, batch, torch.device("cpu"))
    assert costs["trainable_parameters"] < costs["all_parameters"]
    assert costs["step_time_ratio"] > 0
    weights = 4 * costs["all_parameters"] / 2**20
    assert costs["counted_mib"] > weights
    # Counting needs no real tensors; run on real ones it finds the same.
    assert costs["counted_mib"] == pytest.approx(costs["measured_mib"], rel=0.01)
    if method == "mezo":  # no gradients, no moments: little beyond the weights
        assert costs["counted_mib"] < weights + 2
