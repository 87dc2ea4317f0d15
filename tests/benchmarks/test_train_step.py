"""The training-step table: what is measured, and that rows which mean nothing say so."""

from dataclasses import replace

import pytest
import torch
from whisper_meft.errors import UserError

from benchmarks import record, steps, train_step
from benchmarks.steps import Setting, TrainingStep, methods, training_step
from meft_kernels import native

TOY = Setting(model="toy", batch=2, frames=20, reduction_factor=4)


@pytest.mark.parametrize("method", methods())
def test_every_method_takes_a_step(method):
    if "lora" in method:
        pytest.importorskip("peft")
    step = training_step(method, TOY)
    before = {n: p.detach().clone() for n, p in step.model.named_parameters()}
    norms = step.gradient_norms()
    assert train_step.verdict(norms) == "ok"
    assert (norms["gradient_norm"] is None) == (method == "head")
    moved = {n for n, p in step.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and moved <= step.trained.keys()
    if norms["gradient_norm"] is not None:  # more than the head moves
        assert any(not name.startswith(steps.HEAD) for name in moved)


@pytest.mark.parametrize("method", steps.recognisers())
def test_every_recogniser_takes_a_step(method):
    if "lora" in method:
        pytest.importorskip("peft")
    setting = replace(TOY, task="transcribe", tokens=5)
    step = training_step(method, setting)
    before = {n: p.detach().clone() for n, p in step.model.named_parameters()}
    norms = step.gradient_norms()
    assert train_step.verdict(norms) == "ok" and norms["head_gradient_norm"] is None
    moved = {n for n, p in step.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and moved <= step.trained.keys()


def test_a_recogniser_is_timed_against_encoder_and_decoder(tmp_path, capsys):
    options = ["--task", "transcribe", "--model", "toy", "--frames", "20", "--tokens", "5"]
    options += ["--reduction_factor", "4", "--methods", "lst:placement=decoder", "--repeats", "1"]
    assert train_step.main([*options, "--output", str(tmp_path)]) == 0
    assert "20 frames, 5 tokens" in capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    found = record.read(path)
    assert found["name"] == "train_step_transcribe" and found["figures"][0]["ratio"] > 1
    ran = []
    forward = steps.InferenceForward(replace(TOY, task="transcribe", tokens=5))
    forward.decoder.layers[-1].register_forward_hook(lambda *_: ran.append(1))
    forward()
    assert ran == [1]
    assert train_step.main([*options, "--methods", "published_lst", "--output", str(tmp_path)]) == 1
    assert "published_lst classifies" in capsys.readouterr().err


def test_full_fine_tuning_reaches_the_first_layer():
    step = TrainingStep("full", TOY)
    step.backward()
    assert all(parameter.grad.any() for name, parameter in step.trained.items() if "conv1" in name)


def test_half_precision_steps_train():
    for dtype in (torch.bfloat16, torch.float16):
        step = TrainingStep("lst", Setting(model="toy", batch=2, frames=20, reduction_factor=4, dtype=dtype))
        norms = step.gradient_norms()
        exact = TrainingStep("lst", TOY).gradient_norms()
        assert norms["gradient_norm"] == pytest.approx(exact["gradient_norm"], rel=0.05)  # unscaled


def test_rows_that_did_not_train_are_invalid():
    good = {"loss": 1.0, "gradient_norm": 0.5, "head_gradient_norm": 0.1}
    assert train_step.verdict(good) == "ok"
    assert train_step.verdict(good | {"gradient_norm": None}) == "ok"
    for name in ("gradient_norm", "head_gradient_norm"):
        assert train_step.verdict(good | {name: 0.0}) == f"invalid: {name} is zero"
    for name in good:
        assert train_step.verdict(good | {name: float("nan")}) == f"invalid: {name} is nan"


def test_a_dropped_gradient_shows(monkeypatch):
    step = TrainingStep("lst", TOY)
    side = step.model.side_network
    monkeypatch.setattr(side, "pooled", lambda *a, **k: type(side).pooled(side, *a, **k).detach())
    assert train_step.verdict(step.gradient_norms()) == "invalid: gradient_norm is zero"


def fake_probe(method, setting):
    if method == "full":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if method == "unipt":
        raise UserError("its own reason")
    norm = float("nan") if method == "sherl" else 1.0
    norms = {"loss": 1.8, "gradient_norm": norm, "head_gradient_norm": 1.0}
    return {"peak_bytes": 2**30, "trainable": 10, "parameters": 100, **norms}


def test_a_failing_method_does_not_end_the_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train_step, "probe_in_fresh_process", fake_probe)
    options = "--model toy --batch 1 --frames 8 --reduction_factor 4 --device cpu --repeats 2 --no-count"
    options += f" --methods full,lst,unipt,sherl --output {tmp_path}"
    assert train_step.main(options.split()) == 1
    (found,) = record.load_all(tmp_path)
    rows = {row["method"]: row for row in found["figures"]}
    assert rows["full"]["status"] == "out of memory"
    assert rows["unipt"]["status"] == "failed: its own reason"
    assert rows["sherl"]["status"] == "invalid: gradient_norm is nan"
    assert rows["lst"]["status"] == "ok" and rows["lst"]["ratio"] > 0
    assert rows["lst"]["counted_bytes"] is None
    assert rows["lst"]["step_ms"]["p20"] <= rows["lst"]["step_ms"]["median"] <= rows["lst"]["step_ms"]["p80"]
    assert found["shapes"]["model"] == "toy" and found["shapes"]["dtype"] == "float32"
    out = capsys.readouterr().out
    assert "out of memory" in out and "20.39" in out and "76.14" not in out.split("\n")[2]


def test_out_of_memory_is_no_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(train_step, "probe_in_fresh_process", fake_probe)
    argv = "--model toy --batch 1 --frames 8 --device cpu --methods full,lst --reduction_factor 4"
    assert train_step.main([*argv.split(), "--repeats", "0", "--no-count", "--output", str(tmp_path)]) == 0
    (found,) = record.load_all(tmp_path)
    assert [row["status"] for row in found["figures"]] == ["out of memory", "ok"]


@pytest.mark.parametrize("method", ["full", "unipt", "sherl"])  # out of memory, failed, invalid
def test_nothing_is_recorded_where_nothing_was_measured(method, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train_step, "probe_in_fresh_process", fake_probe)
    argv = f"--model toy --batch 1 --frames 8 --device cpu --methods {method} --reduction_factor 4"
    assert train_step.main([*argv.split(), "--repeats", "0", "--no-count", "--output", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert method in said.out and "wrote" not in said.out and "nothing is recorded" in said.err
    assert not list(tmp_path.iterdir())


def test_peak_memory_of_a_fresh_process():
    """At so small a batch full fine-tuning is weights, gradients and two moments: 16 bytes a parameter."""
    setting = Setting(model="tiny", batch=1, frames=20)
    row = train_step.probe_in_fresh_process("full", setting)
    assert 1.0 < row["peak_bytes"] / (16 * row["trainable"]) < 1.25
    assert 0.95 < row["peak_bytes"] / train_step.counted("full", setting) < 1.15


def test_options_of_a_method():
    assert steps.options_of("lst") == {"method": "lst"}
    expected = {"method": "lst", "saved_activations": "fp8", "chunk_size": 16}
    assert steps.options_of("lst:saved_activations=fp8+chunk_size=16") == expected
    step = TrainingStep("lst:adapter_dim=24+chunk_size=1", TOY)
    assert step.model.meft_config.adapter_dim == 24 and step.model.meft_config.chunk_size == 1


def test_memory_alone_takes_no_time(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train_step, "probe_in_fresh_process", fake_probe)
    monkeypatch.setattr(train_step, "clock", None)
    argv = "--model toy --batch 1 --frames 8 --device cpu --methods lst --reduction_factor 4 --repeats 0"
    assert train_step.main([*argv.split(), "--output", str(tmp_path)]) == 0
    (found,) = record.load_all(tmp_path)
    assert found["figures"][0]["peak_bytes"] == 2**30 and found["figures"][0]["counted_bytes"] > 0
    assert "1.00" in capsys.readouterr().out


def test_an_interrupted_run_keeps_its_rows(monkeypatch, tmp_path, capsys):
    def probe(method, setting):
        if method == "unipt":
            raise KeyboardInterrupt
        return fake_probe(method, setting)

    monkeypatch.setattr(train_step, "probe_in_fresh_process", probe)
    argv = (
        "--model toy --batch 1 --frames 8 --device cpu --methods lst,unipt --reduction_factor 4 --repeats 0"
    )
    assert train_step.main([*argv.split(), "--output", str(tmp_path)]) == 130
    (found,) = record.load_all(tmp_path)
    assert [row["method"] for row in found["figures"]] == ["lst"]
    assert "interrupted" in capsys.readouterr().err


def test_options_need_not_fit_the_warm_up():
    """A probe warms up on a toy of 2 layers."""
    figures = train_step.probe("lst:layers=[4]", Setting(model="tiny", batch=1, frames=8))
    assert train_step.verdict(figures) == "ok"


def test_a_probe_says_what_was_wrong():
    with pytest.raises(UserError, match="methods must be all or some of .*, got 'nonsense'"):
        train_step.probe_in_fresh_process("nonsense", TOY)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("--methods lst,nope", "methods must be all or some of full, "),
        ("--model huge", "model must be one of toy, tiny"),
        ("--batch 0", "batch must be a positive integer, got 0"),
        ("--repeats -1", "repeats must be 0 (memory alone) or more, got -1"),
        ("--methods lst:chunk_size", "lst's options are written lst:option=value"),
        ("--methods lst:nope=1", "'nope' is not an option of lst, accepted are chunk_size, "),
        (
            "--methods lst:saved_activations=fp7",
            "saved_activations must be one of 'exact', 'int8', 'fp8', got 'fp7'",
        ),
        ("--methods full,lst:layers=[13]", "layers must lie in 1..12"),
        ("--methods lst:method=unipt", "lst's options are written lst:option=value"),
        ("--methods published_lst:x=1", "published_lst has no options"),
        ("--backend native", "backend 'native' has no kernels in this installation"),
        ("--backend triton", "backend 'triton' needs "),
        ("--dtype int8", "dtype must be one of float32"),
        ("--model tiny --reduction_factor 400", "reduction_factor must be at most 384"),
    ],
)
def test_wrong_options_get_one_line(options, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(native, "LOADED", False)
    monkeypatch.setattr(train_step, "measure", None)
    assert train_step.main([*options.split(), "--device", "cpu", "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and "Traceback" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, frames",
    [("", 1500), ("--quick", 300), ("--quick --frames 1500", 1500), ("--frames 20", 20)],
)
def test_a_quick_run_keeps_the_frames_that_were_given(options, frames):
    parsed = train_step._parser().parse_args(["--device", "cpu", *options.split()])
    assert train_step._setting(parsed).frames == frames


def test_output_is_tried_before_anything_is_measured(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(train_step, "measure", None)
    (tmp_path / "file").write_text("")
    argv = f"--model toy --batch 1 --frames 8 --reduction_factor 4 --device cpu --output {tmp_path / 'file'}"
    assert train_step.main(argv.split()) == 1
    error = capsys.readouterr().err
    assert "is not a folder" in error and error.count("\n") == 1
