"""Forward hooks on parts of a model run, or a warning says that they do not."""

import warnings

import pytest
from modelling_fixtures import batch, tiny_whisper
from recognition_fixtures import clips, recogniser
from whisper_meft import LoRAConfig, LSTConfig, get_meft_model


@pytest.mark.parametrize("config", [LSTConfig(reduction_factor=4), LoRAConfig(r=2)])
@pytest.mark.parametrize("transcribes", [False, True])
def test_hooks_run_or_are_told_of(transcribes, config):
    if transcribes:
        model, (features, labels) = get_meft_model(recogniser(), config), clips()
        parts = ("encoder", "decoder", "side_network")
    else:
        model, (features, labels) = get_meft_model(tiny_whisper(), config), batch()
        parts = ("encoder", "side_network", "projector", "classifier")
    for name in parts:
        for register in ("register_forward_hook", "register_forward_pre_hook"):
            seen = []
            hook = getattr(getattr(model, name), register)(lambda *_, seen=seen: seen.append(1))
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                model(features, labels=labels)
            hook.remove()
            found = [str(each.message) for each in told]
            assert bool(seen) != any(each.startswith(f"forward hooks of {name} do not run") for each in found)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model(features, labels=labels)
    assert not [each for each in told if "hooks" in str(each.message)]
