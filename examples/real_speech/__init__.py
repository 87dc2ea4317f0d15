"""The paper's comparison on recordings of people: `python -m examples.real_speech`."""
