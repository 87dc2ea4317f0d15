"""Where the files that come with the library are."""

from pathlib import Path

from ..errors import UserError

ASSETS = Path(__file__).parent.parent / "assets"


def shipped_backbone() -> Path:
    """The folder of the phoneme-pretrained tiny encoder, for ``from_pretrained``.

    It holds a Whisper encoder of 128 channels and 4 layers that reads 2 seconds of 80-bin log-mel, as
    ``WhisperForAudioClassification`` with an untrained head; its README.md says where it comes from.

    Raises:
        UserError: the installation lacks it.
    """
    folder = ASSETS / "phoneme-tiny"
    if not (folder / "config.json").is_file():
        raise UserError(
            f"the backbone that ships with whisper_meft is missing from this installation: {folder}"
        )
    return folder
