"""UniPT's forms of attention as an option: config, saved model, command line, recognition."""

import json

import pytest
import torch
from modelling_fixtures import batch, mel_mask, tiny_whisper
from whisper_meft import LSTConfig, MeftConfig, MeftModel, UniPTConfig, get_meft_model
from whisper_meft.commands import compare, predict, train
from whisper_meft.comparison.arguments import options_of, parse_method, split_methods
from whisper_meft.errors import UserError
from whisper_meft.evaluation.loaded import load_trained
from whisper_meft.methods.side_networks import SideNetworkConfig
from whisper_meft.model.published import to_published
from whisper_meft.options.common import MethodArguments
from whisper_meft.options.inference import InferenceArguments

from meft_kernels import CausalUniPT

FORMS = ("pooled:4", "linear", "summary")


def model_of(attention="exact", **options):
    torch.manual_seed(0)
    return get_meft_model(
        tiny_whisper(), UniPTConfig(reduction_factor=4, attention=attention, **options)
    ).eval()


@pytest.mark.parametrize("attention", ["mean", "pooled", "pooled:0", "pooled:1.5", "", None, 4, ["linear"]])
def test_another_word_is_refused(attention):
    with pytest.raises(UserError, match="attention must be 'exact', 'pooled:p' with a positive number p of"):
        UniPTConfig(attention=attention)


def test_it_is_an_option_of_unipt_alone():
    assert UniPTConfig().attention == "exact"
    assert (
        MeftConfig.from_dict({"method": "unipt", "reduction_factor": 8}).attention == "exact"
    )  # as saved before
    with pytest.raises(UserError, match="'attention' is not an option of lst"):
        MeftConfig.from_dict({"method": "lst", "attention": "linear"})


@pytest.mark.parametrize("attention", FORMS)
def test_beside_a_decoder_no_other_than_exact(attention):
    with pytest.raises(UserError, match="attention must be 'exact' for placement='decoder', where no token"):
        UniPTConfig(placement="decoder", attention=attention)
    assert isinstance(UniPTConfig(placement="decoder").build_side_network(16, 2), CausalUniPT)
    pair = UniPTConfig(placement="both", attention=attention).build_pair(16, 2, 2)
    assert pair.memory.attention == attention and pair.decoder.attention == "exact"


@pytest.mark.parametrize("attention", FORMS)
def test_trains_and_is_saved(attention, tmp_path):
    model = model_of(attention)
    features, labels = batch()
    model(features, labels=labels).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.isfinite(p.grad).all() for p in trained.values())
    dead = {name for name, p in trained.items() if not p.grad.any()}
    assert dead == {"side_network.gate.bias"}
    model.save_pretrained(tmp_path, save_backbone=True)
    assert json.loads((tmp_path / "config.json").read_text())["meft"]["attention"] == attention
    loaded = MeftModel.from_pretrained(tmp_path)
    assert loaded.meft_config.attention == attention
    assert torch.equal(loaded(features).logits, model(features).logits)


def test_runs_with_another_than_it_was_trained_with(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path, save_backbone=True)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["meft"]["attention"]  # as one that was saved before there was a choice
    (tmp_path / "config.json").write_text(json.dumps(config))
    features = batch()[0]
    exact = model(features).logits
    assert torch.equal(MeftModel.from_pretrained(tmp_path, attention="exact")(features).logits, exact)
    assert torch.equal(MeftModel.from_pretrained(tmp_path, attention="pooled:1")(features).logits, exact)
    for attention in FORMS:
        other = model_of(attention)
        other.load_state_dict(model.state_dict())
        found = MeftModel.from_pretrained(tmp_path, attention=attention)
        assert found.meft_config.attention == attention
        assert torch.equal(found(features).logits, other(features).logits)
        arguments = InferenceArguments(attention=attention, device="cpu")
        as_command = load_trained(MeftModel, tmp_path, arguments, torch.device("cpu"))
        assert torch.equal(as_command(features).logits, found(features).logits)
    with pytest.raises(UserError, match="attention must be 'exact', 'pooled:p'"):
        MeftModel.from_pretrained(tmp_path, attention="pooled")


def test_of_another_method_there_is_none_to_choose(tmp_path):
    get_meft_model(tiny_whisper(), LSTConfig(reduction_factor=4)).save_pretrained(
        tmp_path, save_backbone=True
    )
    with pytest.raises(
        UserError, match="attention must be None for a model of lst, it is an option of unipt"
    ):
        MeftModel.from_pretrained(tmp_path, attention="linear")


@pytest.mark.parametrize("attention", FORMS)
def test_padding_and_chunks_do_not_count(attention):
    """A clip scores alike alone, cut short, and padded beside a longer one."""
    model = model_of(attention, max_frames="longest")
    features = batch(2)[0]
    total = features.shape[-1]
    mask = mel_mask([total // 2, total], total)
    together = model(features, attention_mask=mask).logits
    alone = model(features[:1, :, : total // 2], attention_mask=mask[:1, : total // 2]).logits
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)
    one_by_one = model_of(attention, max_frames="longest", chunk_size=1)
    torch.testing.assert_close(one_by_one(features, attention_mask=mask).logits, together)


def test_published_code_has_the_exact_one_alone(tmp_path):
    model_of("linear").save_pretrained(tmp_path / "ours", save_backbone=True)
    with pytest.raises(UserError, match="has attention='linear': the published code has the exact one alone"):
        to_published(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize("attention", ["exact", *FORMS])
def test_on_the_command_line(attention):
    needed = ["--model_name_or_path", "m", "--train_data", "d", "--output_dir", "o", "--method", "unipt"]
    method = next(
        group
        for group in train.make_parser().parse([*needed, "--attention", attention])
        if isinstance(group, MethodArguments)
    )
    assert MeftConfig.from_dict(method.chosen()).attention == attention
    inference = predict.make_parser().parse(["m", "a.wav", f"--attention={attention}"])[0]
    assert inference.attention == attention
    arguments = compare.make_parser().parse(
        ["--methods", f"lst,unipt:attention={attention}+reduction_factor=4,head", "--output_dir", "o"]
    )[0]
    assert arguments.chosen == ["lst", f"unipt:attention={attention}+reduction_factor=4", "head"]


def test_a_colon_in_a_value_of_a_compared_method():
    assert split_methods("unipt:attention=pooled:8,lst") == ["unipt:attention=pooled:8", "lst"]
    assert parse_method("unipt:attention=pooled:8+layers=last:2") == (
        "unipt",
        {"attention": "pooled:8", "layers": "last:2"},
    )
    assert options_of("unipt:attention=pooled:8", 384, 8)["attention"] == "pooled:8"
    with pytest.raises(UserError, match="attention must be 'exact'"):
        compare.make_parser().parse(["--methods", "unipt:attention=pooled:x", "--output_dir", "o"])


def test_help_of_the_config_tells_the_choices():
    from dataclasses import fields

    told = next(each for each in fields(UniPTConfig) if each.name == "attention").metadata["help"]
    assert all(word in told for word in ("'exact'", "'pooled:p'", "'linear'", "'summary'"))
    assert "attention" not in {each.name for each in fields(SideNetworkConfig)}
