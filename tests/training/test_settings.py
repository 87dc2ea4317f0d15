"""Options that contradict each other, found before any data is read."""

from types import SimpleNamespace

import pytest
import torch
from training_fixtures import make_backbone
from whisper_meft import LoRAConfig, LSTConfig, UserError
from whisper_meft.options.training import parsed_options
from whisper_meft.synthetic.shipped import shipped_backbone
from whisper_meft.training.settings import _graphs_refused, settle


def arguments(device="cuda", **changes):
    plain = {"cache_features": None, "max_frames_per_batch": None, "gradient_checkpointing": False}
    plain |= {"torch_compile": False, "world_size": 1, "n_gpu": 1}
    return SimpleNamespace(device=torch.device(device), **{**plain, **changes})


@pytest.mark.parametrize(
    "config, changes, reason",
    [
        (LSTConfig(), {}, None),
        (LSTConfig(max_frames=300), {}, None),
        (LoRAConfig(), {}, "lora trains inside the encoder, whose step is not captured"),
        (LSTConfig(max_frames="longest"), {}, "max_frames 'longest' gives batches of many shapes"),
        (LSTConfig(pooling="statistics"), {}, "pooling 'statistics' takes statistics of states"),
        (LSTConfig(), {"cache_features": "states"}, "they cannot be used together with cache_features"),
        (LSTConfig(), {"max_frames_per_batch": 6000}, "they cannot be used together with max_frames_per_"),
        (LSTConfig(), {"gradient_checkpointing": True}, "they cannot be used together with gradient_check"),
        (LSTConfig(), {"torch_compile": True}, "they cannot be used together with torch_compile"),
        (LSTConfig(), {"device": "cpu"}, "they need a CUDA device, this run is on cpu"),
        (LSTConfig(), {"world_size": 4}, "they are for one GPU, this run is on 4"),
        (LSTConfig(), {"n_gpu": 2}, "they are for one GPU, this run is on 2"),
    ],
)
def test_where_cuda_graphs_are_refused(config, changes, reason):
    found = _graphs_refused(config, arguments(**changes))
    assert (found is None) == (reason is None)
    assert reason is None or found.startswith(reason)


def test_an_upload_that_nobody_could_load_is_refused(tmp_path):
    def settled(backbone, **options):
        told = {"train_data": "unread", "output_dir": tmp_path / "out", "reduction_factor": 2, **options}
        model, method, _, training = parsed_options({"model_name_or_path": backbone, **told})
        return settle(model, method, training)

    backbone = make_backbone(tmp_path / "backbone")
    with pytest.raises(UserError, match="push_to_hub: the backbone .* is not on the model hub"):
        settled(backbone, push_to_hub=True)
    settled(backbone)
    settled(shipped_backbone(), push_to_hub=True)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"placement": "both"}, "placement must be 'encoder' for classification"),
        ({"layers": [9]}, "layers"),
    ],
)
def test_a_method_that_cannot_be_is_refused(options, message, tmp_path):
    told = {"train_data": "unread", "output_dir": tmp_path / "out", "reduction_factor": 2, **options}
    model, method, _, training = parsed_options({"model_name_or_path": shipped_backbone(), **told})
    with pytest.raises(UserError, match=message):
        settle(model, method, training)
