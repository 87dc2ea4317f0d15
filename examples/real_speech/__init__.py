"""The paper's comparison on recordings of people, with pretrained Whisper: `python -m examples.real_speech`."""
